"""
AdamW for bfloat16 weights in which no update is lost: how a 7B model learns on one GPU at a
learning rate of 1e-5.

A bfloat16 number has 8 significant bits: next to 1.0 comes 1.0078. An update of 1e-5 is rounded
away, and the next one too: the model stands still. The usual remedy is a float32 copy of every
weight. But the weight's upper half is in the model already: bfloat16 IS the upper half of float32.
So only the lower 16 bits are kept beside it, joined before every update and split again after it:

    float32 weight = bfloat16 weight (in the model) + 16 bits (here)
                                                        rounded to nearest, so they are signed

    bytes a parameter             weight   beside it   gradient   both moments   sum   8.4 billion
    torch's AdamW, float32           4         0           4          8           16   134 GB
    float32 copy of bf16 weights     2         4           2          8           16   134 GB
    this                             2         2           2          4           10    84 GB
                                                       (8.4 billion parameters: Qwen2-Audio-7B)

The moments are bfloat16 too; all arithmetic is float32. What that costs, beside other ways to spend
no more memory (400 updates at 1e-5 from noisy gradients, distance from float32 AdamW over what that
moved; weights of size 0.02 and of size 1, tests/test_split_adamw.py):

    this                               0.2 %     0.2 %
    Kahan summation in bfloat16          3 %      80 %       its correction has 8 bits itself
    stochastic rounding                 29 %     200 %       right on average, noisy in each weight
    plain bfloat16                      95 %     100 %       stands still

The second moment's memory must be short: at beta2 = 0.999 a step's 0.1 % of a bfloat16 moment would
round away, so this is refused (ours is 0.98). Parameters in float32 (paper A's projections) are
updated as torch's AdamW would, in the same step. Torch alone: the file can be copied by itself.
"""

import functools
import itertools
import math

import torch

# Elements at a time. On a CPU as many as stay in its cache; what stands beside the weights is never
# a float32 matrix of all parameters
PIECE = 2 ** 18
GPU_PIECE = 2 ** 27


def join(high, low):
    """bfloat16 and the 16 bits kept for it -> float32.

    `low` holds the bits in another bfloat16 tensor, because optimizers cast the state they load."""
    upper = high.view(torch.int16).int() << 16
    lower = low.view(torch.int16).int()
    return (upper + lower).view(torch.float32)


def split(x):
    """float32 -> (bfloat16, the 16 bits that it lacks).

    join gives x back; off by one in the last of 24 bits where x lies just between two bfloat16."""
    high = x.bfloat16()
    upper = high.view(torch.int16).int() << 16
    lower = (x.view(torch.int32) - upper).clamp(max=2 ** 15 - 1)
    return high, lower.short().view(torch.bfloat16)


def _update(weight, low, gradient, m, v, rates):
    """One piece, in place: all [n] in the weight's type, low None for float32.

    rates: lr / (1 - beta1^t), 1 / (1 - beta2^t), 1 - lr * decay, beta1, beta2, eps."""
    lr, correction, keep, beta1, beta2, eps = rates.unbind()
    gradient = gradient.float()
    x = weight if low is None else join(weight, low)
    new_m = beta1 * m.float() + (1 - beta1) * gradient
    new_v = beta2 * v.float() + (1 - beta2) * gradient * gradient
    x = keep * x - lr * new_m / ((correction * new_v).sqrt() + eps)
    m.copy_(new_m)
    v.copy_(new_v)
    if low is None:
        weight.copy_(x)
    else:
        high, rest = split(x)
        weight.copy_(high)
        low.copy_(rest)


_compiled_update = functools.cache(lambda: torch.compile(_update, dynamic=True))


class SplitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's rule and state_dict for parameters in bfloat16 or float32.

    Groups with "lr" and "weight_decay", as there. ValueError for a beta2 that bfloat16 moments
    cannot follow. (Other types are not refused, and not helped.)"""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        for group in self.param_groups:
            in_16_bits = any(p.dtype == torch.bfloat16 for p in group["params"])
            if in_16_bits and 1 - group["betas"][1] < 2 ** -7:
                raise ValueError(f"beta2 {group['betas'][1]} forgets too slowly for second moments "
                                 "of 8 bits: at most 0.992 with bfloat16 weights")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_of(p, self.state[p], group)

    def _step_of(self, p, state, group):
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        # A state that weights of the other type left may go on here
        if p.dtype != torch.bfloat16:
            state.pop("low", None)
        elif "low" not in state:
            state["low"] = torch.zeros_like(p)
        state["step"] += 1
        t = state["step"].item()
        beta1, beta2 = group["betas"]
        rates = torch.tensor(
            [
                group["lr"] / (1 - beta1 ** t),
                1 / (1 - beta2 ** t),
                1 - group["lr"] * group["weight_decay"],
                beta1,
                beta2,
                group["eps"],
            ],
            device=p.device,
        )
        update, piece = _update, PIECE
        if p.is_cuda:
            update, piece = _compiled_update(), GPU_PIECE

        def pieces(x):
            if x is None:
                return itertools.repeat(None)
            if hasattr(x, "to_local"):
                x = x.to_local()                        # sharded: this rank's part
            return x.view(-1).split(piece)

        tensors = (p, state.get("low"), p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        for parts in zip(*map(pieces, tensors)):
            update(*parts, rates)


def parameter_groups(module, *, lr, weight_decay, special=()):
    """AdamW groups: matrices decay, vectors (norms, biases) do not.

    special: [(parameters, lr, weight decay)] have rates of their own. Each group remembers its peak
    as "peak_lr", which the schedule multiplies."""
    groups = []
    taken = set()                       # whoever names a parameter first has it
    for parameters, own_lr, decay in [*special, (module.parameters(), lr, weight_decay)]:
        learning = [p for p in parameters if p.requires_grad and id(p) not in taken]
        taken.update(map(id, learning))
        matrices = [p for p in learning if p.dim() >= 2]
        vectors = [p for p in learning if p.dim() < 2]
        rates = {"lr": own_lr, "peak_lr": own_lr}
        groups = [
            {"params": matrices, "weight_decay": decay, **rates},
            {"params": vectors, "weight_decay": 0.0, **rates},
            *groups,
        ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(step, steps):
    """Linear warm-up over 3 % of the steps, then a cosine to zero."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    angle = math.pi * (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(angle))
