"""
Ranks and sharding: the same script on one process, under torchrun with DDP, or with FSDP2 (--shard).
"""
import contextlib
import dataclasses
import datetime
import functools
import gc
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import models


def start_distributed():
    """-> (rank, world size, device). One process unless torchrun started us; then NCCL on GPUs, gloo on CPUs."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ or os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun sets one thread per process; on a machine with cores to spare that would waste them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    # an hour: all wait while rank 0 writes the model (NCCL's own limit is ten minutes); a dead rank torchrun notices at once
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    if dist.get_rank() == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torch 2.11 keeps one store over all restarts, with the addresses of the dead in it (pytorch issue 135712); this variable gives every start its own
        print("--max-restarts: a new rank may wait for a dead one; put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, with --standalone or --rdzv_backend c10d")
    return dist.get_rank(), dist.get_world_size(), device


def stop_distributed():
    """Wait for every rank, then leave the process group; nothing may hold a DDP module any more."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first(rank, world):
    """Rank 0 runs the block alone, then the others: they find what it downloaded or synthesised."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def over_ranks(value, operation, device):
    """One number, the same on every rank: sum, max, ... (dist.ReduceOp) of theirs."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(float(value), device=device, dtype=torch.float64)
    dist.all_reduce(total, operation)
    return total.item()


def sum_over_ranks(values, device):
    """{name: float} -> the same summed over all ranks: with losses divided by global token counts, the sum is the global mean."""
    if not dist.is_initialized():
        return values
    total = torch.tensor([float(v) for v in values.values()], device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def of_rank_zero(value):
    """Rank 0's value, on every rank: what a file says may reach the others later. Every rank must come here."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather_lists(some):
    """A list on every rank -> all of them behind each other, on every rank. Every rank must come here."""
    if not dist.is_initialized():
        return some
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, some)
    return [x for share in shares for x in share]


def shard(module, blocks=(), compute=None):
    """
    FSDP2, in place -> module: every rank keeps 1/ranks of each tensor. A block (a layer) is gathered when it runs and dropped again; what is in none of
    them (embeddings, head, projections, norms) is gathered when `module` itself runs, and stays until its backward is over: the head's weight is whole
    wherever the losses look at it.

    compute: the type that weights are gathered in (bfloat16), while each rank's share, its gradient and their sum over ranks are float32; None: their own."""
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    outer = dataclasses.replace(policy, cast_forward_inputs=False)          # advantages and temperatures stay what they are
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for p in module.parameters() if p.requires_grad and id(p) not in inside]
    if len({p.dtype for p in outside}) > 1:                 # FSDP takes what learns together in one type; split_adamw.py keeps the bits that this cuts off
        for p in outside:
            p.data = p.data.bfloat16()
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    frozen = not any(p.requires_grad for p in module.parameters())
    fully_shard(module, mp_policy=outer, reshard_after_forward=frozen or None)      # None: kept for the backward pass, which no frozen model has
    if frozen:
        module.register_forward_hook(forget_forward)
    module.with_all = functools.partial(with_all, module, frozen)           # for `whole`
    register_fsdp_forward_method(module, "with_all")        # the first to run forward is FSDP's root, and that must be this one
    return module


def sharded_parts(module):
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def with_all(module, frozen, work):
    """work(), with all weights gathered. Those of `module` itself are already, as before any forward of it; but they too must outlast one that is inside: a rank
    which runs it twice would gather them twice, and the others not."""
    for part in sharded_parts(module):
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        return work()
    finally:
        for part in sharded_parts(module):
            part.set_reshard_after_forward(frozen or part is not module, recurse=False)
            part.reshard()


def forget_forward(module, *_):
    """FSDP notes each forward for the backward that follows. Behind a frozen model none does, and the notes would come to gigabytes in a few days."""
    # Private names of torch, here alone (tests/test_private_names.py). The public reset_iter_state, since
    # torch 2.14, also drops the gathered weights that `whole` needs.
    for group in (part._get_fsdp_state()._fsdp_param_group for part in sharded_parts(module)):
        if group is not None:
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()


def shard_reader(decoder, head):
    """A frozen text LLM: its decoder, which runs by itself, and its head, whose weight the losses gather (full)."""
    if head.weight is decoder.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    shard(decoder, decoder.layers)
    shard(head)


def whole(module, work):
    """work(), with all weights of a sharded module gathered once: a rollout runs through them once a token, and must not fetch them each time. Every
    rank must come here, even with nothing to do. A module that is not sharded: work()."""
    if not isinstance(module, FSDPModule):
        return work()
    found = module.with_all(work)
    module.reshard()
    return found


def full(tensor):
    """A tensor that lies in shards -> the whole of it, on every rank (each must ask); any other: itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrap(step_module, student, args, *, world, compute):
    """The step module as one process, DDP or, with --shard, FSDP2 runs it; with --checkpoint-activations too."""
    if args.checkpoint_activations:
        checkpoint_activations(student)
    if args.shard:
        return shard(step_module, models.blocks(student), compute)
    return DistributedDataParallel(step_module, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else step_module


def accumulating(wrapped, last):
    """DDP adds up gradients over the ranks in the last micro-batch alone. FSDP does it in each: it has no room for whole gradients."""
    return contextlib.nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()


def checkpoint_activations(model):
    """Of each decoder layer only the input is kept for the backward pass, which runs the layer again: a third more time for a small part of the memory."""
    # transformers 5.17 knows the second name alone, version 6 will know the first alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in models.decoder(model).layers:
        layer.training = True           # the layer's own flag, which transformers asks; not that of what is inside it: nothing shall drop out


def memory_line(args, world, module, **parts):
    """A sentence: what each rank holds all the time, in GB. parts: {name: modules, None where there is none}; what a part shares with one before it is there once.
    AdamW keeps two moments as wide as a weight, and SplitAdamW 16 bits beside one of 16 bits."""
    one_type = args.shard and args.weights == "bfloat16" and not args.lora                   # `shard` gives the projections the weights' type
    width = lambda p: 2 if one_type else p.element_size()
    size = lambda parameters: sum(p.numel() * width(p) for p in parameters) / 1e9 / (world if args.shard else 1)
    held, seen, learns = {}, set(), [p for p in module.parameters() if p.requires_grad]
    for name, modules in {**parts, "projections": [module]}.items():
        own = {p for part in modules if part is not None for p in part.parameters()} - seen
        held[name], seen = size(own), seen | own
    held |= {"gradients": size(learns), "optimizer": 2 * size(learns) + size(p for p in learns if width(p) == 2)}
    of = f" of {torch.cuda.mem_get_info()[1] / 1e9:.0f}" if learns[0].is_cuda else ""
    return (f"held by each rank, GB: {', '.join(f'{name} {value:.3g}' for name, value in held.items() if value)}; together {sum(held.values()):.3g}{of}; "
            "activations, logits, answers, weights gathered or cast, and a judge come on top (python -m lab.memory)")
