"""
AdamW for bfloat16 weights in which no update is lost: how a 7B model learns on one GPU at a learning rate of 1e-5.

A bfloat16 number has 8 significant bits: next to 1.0 comes 1.0078. An update of 1e-5 is rounded away, and the next one too: the model stands
still. The usual remedy is a float32 copy of every weight. But the weight's upper half is in the model already: bfloat16 IS the upper half
of float32. So only the lower 16 bits are kept beside it, joined before every update and split again after it:

    float32 weight = bfloat16 weight (in the model) + 16 bits (here)           rounded to nearest, so the 16 bits are signed

    bytes a parameter             weight   beside it   gradient   both moments      sum     8.4 billion parameters (Qwen2-Audio-7B)
    torch's AdamW, float32           4         0           4          8              16     134 GB
    float32 copy of bf16 weights     2         4           2          8              16     134 GB
    this                             2         2           2          4              10      84 GB

The moments are bfloat16 too; all arithmetic is float32. What that costs, beside other ways to spend no more memory (400 updates at 1e-5 from noisy
gradients, distance from float32 AdamW over what that moved; weights of size 0.02 and of size 1, tests/test_split_adamw.py):

    this                               0.2 %     0.2 %
    Kahan summation in bfloat16          3 %      80 %       its correction has 8 bits itself
    stochastic rounding                 29 %     200 %       right on average, noisy in each weight
    plain bfloat16                      95 %     100 %       stands still

The second moment's memory must be short: at beta2 = 0.999 a step's 0.1 % of a bfloat16 moment would round away, so this is refused (ours is 0.98).
Parameters in float32 (paper A's projections) are updated as torch's AdamW would, in the same step.
"""
import functools

import torch
from torch.distributed.tensor import DTensor

PIECE = 2 ** 18         # elements at a time on a CPU, which stay in its cache; what stands beside the weights is never [parameters] of float32
GPU_PIECE = 2 ** 27


def join(high, low):
    """bfloat16 and the 16 bits kept for it (in the bits of another bfloat16 tensor, because optimizers cast the state that they load) -> float32."""
    return ((high.view(torch.int16).int() << 16) + low.view(torch.int16).int()).view(torch.float32)


def split(x):
    """float32 -> (bfloat16, the 16 bits that it lacks). join gives x back; off by one in the last of 24 bits where x lies just between two bfloat16."""
    high = x.bfloat16()
    low = (x.view(torch.int32) - (high.view(torch.int16).int() << 16)).clamp(max=2 ** 15 - 1)
    return high, low.short().view(torch.bfloat16)


def _update(weight, low, gradient, m, v, rates):
    """One piece, in place: all [n] in the weight's type, low None for float32; rates: lr / (1 - beta1^t), 1 / (1 - beta2^t), 1 - lr * decay, beta1, beta2, eps."""
    lr, correction, keep, beta1, beta2, eps = rates.unbind()
    gradient, x = gradient.float(), weight if low is None else join(weight, low)
    new_m = beta1 * m.float() + (1 - beta1) * gradient
    new_v = beta2 * v.float() + (1 - beta2) * gradient * gradient
    x = keep * x - lr * new_m / ((correction * new_v).sqrt() + eps)
    m.copy_(new_m)
    v.copy_(new_v)
    if low is None:
        weight.copy_(x)
    else:
        for old, new in zip((weight, low), split(x)):
            old.copy_(new)


_compiled_update = functools.cache(lambda: torch.compile(_update, dynamic=True))


class SplitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's rule and state_dict for parameters in bfloat16 or float32; groups with "lr" and "weight_decay", as there."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        for group in self.param_groups:
            kinds = {p.dtype for p in group["params"]}
            if not kinds <= {torch.bfloat16, torch.float32}:
                raise ValueError(f"parameters of {kinds}: SplitAdamW knows bfloat16 and float32")
            if torch.bfloat16 in kinds and 1 - group["betas"][1] < 2 ** -7:
                raise ValueError(f"beta2 {group['betas'][1]} forgets too slowly for second moments of 8 bits: at most 0.992 with bfloat16 weights")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), rates = group["betas"], {}
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                if p.dtype == torch.bfloat16 and "low" not in state:        # a state that float32 weights left may go on here
                    state["low"] = torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()
                if t not in rates:
                    rates[t] = torch.tensor([group["lr"] / (1 - beta1 ** t), 1 / (1 - beta2 ** t), 1 - group["lr"] * group["weight_decay"], beta1, beta2,
                                             group["eps"]], device=p.device)
                update, piece = (_compiled_update(), GPU_PIECE) if p.is_cuda else (_update, PIECE)
                ours = [x.to_local() if isinstance(x, DTensor) else x               # sharded: this rank's part
                        for x in (p, state.get("low"), p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])]
                flat = [x if x is None else x.view(-1).split(piece) for x in ours]
                flat[1] = flat[1] or [None] * len(flat[0])
                for parts in zip(*flat):
                    update(*parts, rates[t])


def parameter_groups(module, *, lr, weight_decay, special=()):
    """AdamW groups: matrices decay, vectors (norms, biases) do not; special: [(parameters, lr, weight decay)] have rates of their own.

    Each group remembers its peak as "peak_lr", which the schedule multiplies."""
    special = [([p for p in parameters if p.requires_grad], *rates) for parameters, *rates in special]  # a generator can be read only once
    apart = {id(p) for parameters, *_ in special for p in parameters}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    groups = []
    for parameters, own, decay in [(rest, lr, weight_decay), *special]:
        groups += [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay, "lr": own, "peak_lr": own},
                   {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": own, "peak_lr": own}]
    return [group for group in groups if group["params"]]


def clip(parameters, most):
    """Gradients scaled down to a norm of `most` -> the norm before, a float. Not finite: they are spoiled, and the step must be left out."""
    return _whole(torch.nn.utils.clip_grad_norm_(parameters, most)).item()


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
