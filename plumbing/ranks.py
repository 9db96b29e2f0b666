"""
Ranks and sharding: one script on one process, under torchrun with DDP, or with FSDP2 (--shard).

torchrun starts the ranks; PyTorch's DDP or FSDP2 wraps the step module. Every function here gives
the obvious answer on one process, so that a script never asks how many ranks there are.
"""
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import os

import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------
# 1. Ranks

def start_distributed():
    """-> (rank, ranks, device). NCCL on GPUs, gloo on CPUs; one process without torchrun."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device

    # An hour: all ranks wait while rank 0 writes the model. torchrun notices a dead rank at once.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


def stop_distributed():
    """Wait for every rank and leave the process group. No DDP module may be alive any more."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block alone, then the others, who find what it downloaded or made."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


# The functions below are collective: every rank has to call them.

def gather_lists(values):
    """A list on every rank -> all of them behind each other, on every rank."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return list(itertools.chain(*lists))


def sum_over_ranks(**values):
    """-> {name: the sum over all ranks}"""
    of_all = gather_lists([values])
    return {name: sum(of_one[name] for of_one in of_all) for name in values}


def of_rank_zero(value):
    """Rank 0's value on every rank. What rank 0 reads in a file, others may see only later."""
    return gather_lists([value])[0]


# ---------------------------------------------------------------------------------------------
# 2. FSDP2, for what does not fit

def shard(module, blocks=(), compute=None):
    """
    FSDP2, in place -> module: every rank keeps its share of each tensor.

    A block is gathered when it runs and dropped again. What is in no block (embeddings, head,
    projections, norms) is gathered when `module` runs and stays until its backward is over, so
    that the head's weight is whole wherever the losses look at it.

    compute: the dtype that weights are gathered in; None: their own. Each rank's share and its
    gradient keep the weights' dtype; gradients are summed over ranks in float32.
    """
    # Here, because it takes as long to import as half of torch
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    inside = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    outside = dataclasses.replace(inside, cast_forward_inputs=False)   # advantages stay float32

    # FSDP wants one dtype for all that learns together. This rounds once; SplitAdamW keeps the
    # bits of what later updates add
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in in_blocks]
    if len({p.dtype for p in rest}) > 1:
        for p in rest:
            p.data = p.data.bfloat16()

    # None: keep the outer weights for the backward pass, which a frozen model does not have. (FSDP
    # notes the order of a model's forwards until its next backward: for a frozen one some bytes a
    # block and step, which are never freed)
    frozen = not any(p.requires_grad for p in module.parameters())
    for block in blocks:
        fully_shard(block, mp_policy=inside)
    fully_shard(module, mp_policy=outside, reshard_after_forward=True if frozen else None)

    # Each rank generates as many tokens as it likes, while FSDP would gather weights at every
    # forward, on all ranks together. So `with_weights_gathered` gathers them once, by a forward
    # method of this module's own. (The first module to run a forward becomes FSDP's root, too.)
    module.work_gathered = functools.partial(_work_gathered, module, frozen)
    register_fsdp_forward_method(module, "work_gathered")
    return module


def shard_reader(decoder, head):
    """A frozen text LLM in two sharded parts: its decoder, and its head, which losses gather."""
    if head.weight is decoder.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    shard(decoder, decoder.layers)
    shard(head)


def with_weights_gathered(module, work):
    """work(), with all weights of a sharded module gathered once. Collective.

    Generation runs through the weights once a token and must not fetch them each time."""
    if not hasattr(module, "work_gathered"):        # `shard` gives it one
        return work()
    result = module.work_gathered(work)
    module.reshard()
    return result


def unsharded(tensor):
    """A sharded tensor -> the whole of it, on every rank (collective). Any other: itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_parts(module):
    return [part for part in module.modules() if hasattr(part, "unshard")]


def _work_gathered(module, frozen, work):
    # Parts must outlast a forward inside work(): a rank that runs it twice would gather twice
    for part in _sharded_parts(module):
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        return work()
    finally:
        for part in _sharded_parts(module):
            part.set_reshard_after_forward(frozen or part is not module, recurse=False)
            part.reshard()
