"""
Plumbing that must never disagree between the two training scripts: ranks, sharding, optimizer groups, checkpoints, bad days, logs.

What this file teaches: what has to be saved so that a killed run goes on as if nothing had happened (weights, optimizer, step;
everything random is a function of seed and step, so that no generator state needs saving), and how to write it so that a kill at
any moment leaves the last checkpoint whole: to a temporary name first, to the disk itself, then one rename.

Many GPUs are PyTorch's own business here: torchrun starts them, DDP or FSDP2 (--shard) wraps the step module, and
torch.distributed.checkpoint writes and reads the optimizer, so that a run goes on with another number of ranks.

Plain functions, explicit arguments, explicit returns; no loop, no loss, no globals.
"""
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.data
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import models

try:
    import fcntl
except ImportError:             # Windows: nothing keeps two runs out of one --out there
    fcntl = None


# --------------------------------------------------- 1. flags of a run, and its ranks ---------------------------------------------------

def add_run_flags(parser, *, out, best):
    """The flags that are the same in both training scripts. best: names of the scores that --keep-best can go by."""
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--out", default=out, help="folder for config, log, checkpoints, samples, results and figure")
    add("--max-steps", type=int, help="stop here, whatever --epochs says")
    add("--no-eval", action="store_true", help="train only")
    add("--dry-run", action="store_true", help="two steps and one small evaluation of everything, then stop")
    # many GPUs
    add("--shard", action="store_true", help="FSDP2: every rank holds its share of all weights, gradients and optimizer states, frozen models too")
    add("--checkpoint-activations", action="store_true", help="run each decoder layer again in backward instead of keeping what is inside it")
    # long runs
    add("--save-every", type=int, default=100, help="steps between checkpoints; one is written at the end too")
    add("--keep", type=int, default=2, metavar="K", help="newest checkpoints that stay")
    add("--keep-best", choices=best, help="the one that scored best stays as well (each --eval-every steps)")
    add("--resume", help="auto (newest checkpoint in --out, if there is one) or a checkpoint's folder")
    # bad days
    add("--workers", type=int, default=1, help="processes on each rank that read and prepare the next steps' clips; 0: none")
    add("--skip-bad", type=int, default=0, metavar="N", help="unusable training examples that may be left out; one more stops the run")


def check_run_flags(args, parser):
    """The part of a script's checks that concerns add_run_flags."""
    if min(args.save_every, args.keep) < 1 or min(args.workers, args.skip_bad) < 0:
        parser.error("--save-every and --keep are at least 1, --workers and --skip-bad at least 0")
    if args.keep_best and not args.eval_every:
        parser.error("--keep-best goes by what evaluations in the middle say, so it needs --eval-every N")


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


def examples_of_step(examples, step, batch_size, seed):
    """The global batch of a step, a pure function of (seed, step): a resumed run and any number of ranks see the same ones.

    Every epoch is its own permutation, and batches run on across its end."""
    rows = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
              for epoch in {row // len(examples) for row in rows}}
    return [examples[orders[row // len(examples)][row % len(examples)]] for row in rows]


def seed_step(seed, step, rank):
    """Whatever draws from torch's own generator in a step (nothing of ours does; your dropout would) starts from (seed, step, rank), not from what
    was drawn before: so a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 10_007 + rank)


# ---------------------------------------------------- 2. DDP, or FSDP2 for what does not fit ---------------------------------------------

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
            "activations, logits, answers, weights gathered or cast, and a judge come on top (python memory.py)")


# ------------------------------------------------------ 3. optimizer groups -------------------------------------------------------------

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
    return full(torch.nn.utils.clip_grad_norm_(parameters, most)).item()


# --------------------------------------------------------- 4. checkpoints ---------------------------------------------------------------

OPTIMIZER_FILE = 5 * 10**9      # bytes, about, in one file of the optimizer's: each is put together in main memory


def save_checkpoint(folder, *, step, model, processor, beside, module, optimizer, card, rank, keep=2, best=None):
    """Write folder/step-N; every rank must come here -> its path. Then old ones go: the `keep` newest stay, and the best by the score named `best`.

        model*.safetensors, config.json, ...    `model` in the hub's layout, with its card (README.md)
        NAME.safetensors                        each of `beside`, {file name: module}
        optimizer/*.safetensors                 of `module`'s parameters; each rank writes its part, any number of ranks can read it
        checkpoint.json                         step, ranks, files and their bytes, later scores

    Written under a temporary name, flushed to the disk, and renamed when complete, so that a folder called step-N is always whole. Raises SystemExit where the
    disk is full (or the ranks' weights are not the same): the checkpoints before are as they were."""
    folder = Path(folder)
    final, partial = folder / f"step-{step:07d}", folder / f"partial-{step:07d}"
    same_on_all_ranks(module)
    moments = {f"{name}.{key}": value for name, p in module.named_parameters() for key, value in optimizer.state.get(p, {}).items()}
    size = lambda tensor: tensor.numel() * tensor.element_size()
    needed = sum(map(size, [*moments.values(), *(t for part in (model, *beside.values()) for t in to_save(part).values())]))
    files = {name: 1 + end // OPTIMIZER_FILE for name, end in zip(moments, itertools.accumulate(map(size, moments.values())))}
    free = over_ranks(shutil.disk_usage(folder).free if rank == 0 else 0, dist.ReduceOp.MAX, next(module.parameters()).device)
    try:
        if free < needed:
            raise OSError("the disk is full")
        with failing_together():
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "optimizer").mkdir(parents=True)
        weights, states = on_rank_zero(model, rank), {name: on_rank_zero(part, rank) for name, part in beside.items()}
        with failing_together():
            if rank == 0:
                models.save(model, processor, partial, weights)
                for name, state in states.items():
                    save_file({key: tensor.contiguous() for key, tensor in state.items()}, partial / name)
        del weights, states
        with failing_together(), warnings.catch_warnings(action="ignore"):      # that one process is one process
            if moments:
                dcp.save(moments, storage_writer=HuggingFaceStorageWriter(str(partial / "optimizer"), files, save_distributed=True))
        with failing_together():
            if rank == 0:
                ranks = dist.get_world_size() if dist.is_initialized() else 1
                paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
                files = {str(path.relative_to(partial)): path.stat().st_size for path in paths}
                about = {"step": step, "ranks": ranks, "files": files}
                (partial / "checkpoint.json").write_text(json.dumps(about))
                for path in [*partial.rglob("*"), partial]:
                    flush(path)
                put_away(final)
                os.replace(partial, final)
                flush(folder)
    except OSError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"checkpoint {final} cannot be written ({reason}): it needs {needed / 1e9:.2f} GB, and {shutil.disk_usage(folder).free / 1e9:.2f} GB are free in "
                         f"{folder}; make room, and go on with --resume auto from the last one that is complete") from None
    if rank == 0:
        with writing(final / "README.md"):
            card(final)
        drop_old(folder, keep, best)
    return final


@contextlib.contextmanager
def failing_together():
    """What one rank cannot write inside is an OSError on every rank at its end: none waits for a rank that has given up. Every rank must come here."""
    fault = None
    try:
        yield
    except CheckpointException as error:                    # the same on every rank, with a traceback for each that failed
        fault = next(str(cause) for cause, _ in error.failures.values())
    except (OSError, SafetensorError) as error:
        fault = str(error)
    if faults := [found for found in gather_lists([fault]) if found is not None]:
        raise OSError(faults[0])


def to_save(module):
    """The part of a module's state_dict that a checkpoint holds: with LoRA the adapters alone."""
    adapters = models.has_lora(module)
    return {name: tensor for name, tensor in module.state_dict().items() if ".lora_" in name or not adapters}


def on_rank_zero(module, rank):
    """What is to be saved of a module, whole, in rank 0's main memory; every rank must come here, the others get {}."""
    kept = {}
    for name, tensor in to_save(module).items():
        tensor = full(tensor)               # one after the other, so that no other rank ever holds more than one of them whole
        if rank == 0:
            kept[name] = tensor.detach().cpu()
    return kept


def flush(path):
    """What was written to a file, or the names in a folder, are on the disk itself when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def complete(folder):
    """The complete checkpoints of a run's folder, oldest first."""
    return [path for path in sorted(Path(folder).glob("step-*")) if (path / "checkpoint.json").is_file()]


def drop_old(folder, keep, best=None):
    """Keep the `keep` newest checkpoints, and the one with the highest score named `best`."""
    found = complete(folder)
    scores = {}
    for path in found:
        if best and models.fault_of(path) is None:
            scores[path] = read_json(path / "checkpoint.json").get("scores", {})
    scored = [path for path in scores if scores[path].get(best) is not None]        # nothing may have been asked that gives it
    for old in set(found[:-keep]) - {max(scored, key=lambda path: scores[path][best])} if scored else found[:-keep]:
        put_away(old)


def put_away(checkpoint):
    """A checkpoint that goes, if it is there, is renamed first: half of a folder must not look whole."""
    if checkpoint.exists():
        gone = checkpoint.with_name(checkpoint.name.replace("step", "partial-old"))
        os.replace(checkpoint, gone)
        shutil.rmtree(gone)


def note_scores(checkpoint, scores, args, rank):
    """What an evaluation said of a checkpoint of this run, into its checkpoint.json; with --keep-best, one that was the best until now may go."""
    path = Path(checkpoint) / "checkpoint.json"
    if rank == 0 and path.parent.parent.resolve() == Path(args.out).resolve():
        write_json(path, {**json.loads(path.read_text()), "scores": {name: score for name, score in scores.items() if score is not None}})
        drop_old(args.out, args.keep, args.keep_best)


def same_on_all_ranks(module):
    """Under DDP every rank holds all weights, and they must be the same to the last bit. Raises SystemExit where they are not: a bad memory module, or a
    parameter that learns without the others' gradients, would otherwise spoil a run in silence."""
    if not dist.is_initialized() or any(isinstance(p, DTensor) for p in module.parameters()):
        return
    digest = hashlib.sha256()
    for p in module.parameters():
        if p.requires_grad:
            bits = p.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
    found = gather_lists([digest.hexdigest()])
    if odd := [rank for rank, ours in enumerate(found) if ours != found[0]]:
        raise SystemExit(f"the weights of rank {', '.join(map(str, odd))} are not those of rank 0, so that nothing is saved: go on with --resume auto, and if it "
                         "happens again, on another machine")


def was_dry(folder):
    """Was the last run in this folder one with --dry-run?"""
    return (read_json(Path(folder) / "config.json") or {}).get("dry_run", False)


ABOUT = """What is in this folder
lock                  held by the run that writes here, for as long as its process lives
config.json           every flag, versions, commit, ranks, steps
log.jsonl             a line a step: loss terms, speed, seconds spent, memory; a step that was left out says why
step-N/               a checkpoint: the model in the hub's layout, the optimizer, checkpoint.json (step, scores)
aside-N/              a checkpoint that a run went back behind; nothing reads it
before, eval-N, after.json    evaluations, each question's verdict in them; samples-*.jsonl: what was said
skipped.jsonl         training examples that could not be used, and why
results.json, run.png         before and after
python evaluate.py --task report --run THIS_FOLDER     draws all curves, and says in a few lines how it goes
python train_....py (flags of config.json) --resume auto     goes on from the newest checkpoint
"""


def start_folder(folder, checkpoint, rank, world):
    """Make the run's folder. A run that does not resume from there wants it to itself: another's checkpoints and evaluations would pass for its own.
    What a dry run or a kill left is removed; raises SystemExit where it would be a real run's checkpoints."""
    if rank == 0:
        with writing(folder):
            clear_folder(Path(folder), checkpoint)
            (Path(folder) / "README.txt").write_text(ABOUT)
    wait_for_all()


def clear_folder(folder, checkpoint):
    """What another run left goes. Behind an earlier checkpoint a run takes another way: what
    came later is not its own."""
    if checkpoint is None or checkpoint.resolve().parent != folder.resolve():
        if list(folder.glob("step-*")) and not was_dry(folder):
            raise SystemExit(f"{folder} holds the checkpoints of another run; go on with it by "
                             "--resume auto, or give another --out")
        for old in folder.glob("step-*"):
            shutil.rmtree(old)
        for name in ("eval-*.json", "before.json", "after.json", "results.json", "skipped.jsonl"):
            for old in folder.glob(name):
                old.unlink()
    else:
        for later in sorted(folder.glob("step-*"), reverse=True):
            if later.name > checkpoint.name:
                aside = later.with_name(later.name.replace("step", "aside"))
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(later, aside)
        for old in folder.glob("eval-*.json"):
            if old.stem[5:] > checkpoint.name[5:]:
                old.unlink()
    for old in folder.glob("partial-*"):
        shutil.rmtree(old)


def claim(folder):
    """Take a run's folder for this process, as long as it lives; the folder is made. Every rank has to
    come here. Raises SystemExit, on all, where it cannot be written or another run holds it.

    lockf, not flock: data workers would inherit that one, and hold it a moment longer than a run
    that was killed. The file is never closed, because that would give the lock back."""
    fault = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            with writing(folder):
                lock = os.open(make_folder(folder) / "lock", os.O_RDWR | os.O_CREAT)
            if fcntl:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):          # POSIX allows both
            fault = f"another run is writing into {folder}; wait for its end, or give another --out"
        except OSError as error:
            print(f"{folder}: its disk has no locks ({error}), so nothing keeps a second run out")
        except SystemExit as error:
            fault = str(error)
    if fault := of_rank_zero(fault):
        raise SystemExit(fault)


def newest_checkpoint(args, name):
    """The model that the flag `name` means, the same on every rank: of another run's folder its
    newest checkpoint, and for a run that goes on the one that it began with. Raises SystemExit
    where that one is gone."""
    path = getattr(args, name)
    begun = list(Path(args.out).glob("step-*")) and not was_dry(args.out)
    before = (read_json(Path(args.out) / "config.json") or {}).get(name) if begun else None
    if before and Path(before).resolve().parent == Path(path).resolve():
        if not Path(before).is_dir():
            raise SystemExit(f"{args.out} began with {before}, which is gone; put it back, or give "
                             "another --out")
        path = before
    return of_rank_zero(models.newest_checkpoint(path))


def find_checkpoint(args, folder, device):
    """--resume auto: the newest whole checkpoint below folder, or None; --resume DIR: that one; the
    same on every rank, which all must come here. torchrun --max-restarts starts us again after a
    rank died: then auto, whatever was asked, if the folder is that of a run with the same flags.
    Raises SystemExit if DIR is none or not whole, and for a dry run: it would leave a real run's
    folder looking like its own, which the next run clears."""
    claim(folder)
    same_folder(folder)
    # each node's torchrun counts its own restarts; and it starts again after a refusal too, so that the count alone does not make a checkpoint ours
    again = over_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), dist.ReduceOp.MAX, device) > 0 and same_flags(args, folder)
    found, passed_over = (None, []) if was_dry(folder) else models.newest_whole(folder)
    found, passed_over = of_rank_zero((found, passed_over))
    if args.dry_run and args.resume:
        raise SystemExit("--dry-run starts from nothing: leave --resume out, and give another --out than that of a real run")
    if args.dry_run or args.resume in (None, "auto") or of_rank_zero(again and found):
        if args.dry_run or not of_rank_zero(again or args.resume):
            return None
        if passed_over and not found:
            raise SystemExit(f"{folder} has no checkpoint that is whole: {'; '.join(passed_over)}; "
                             "give another --out")
        for sentence in passed_over:
            speaker(dist.get_rank() if dist.is_initialized() else 0)(sentence)
        return found
    if not (Path(args.resume) / "checkpoint.json").is_file():
        raise SystemExit(f"{args.resume} is not a checkpoint (it has no checkpoint.json); give a folder such as {folder}/step-0000100, or auto")
    if fault := models.fault_of(Path(args.resume)):
        raise SystemExit(f"{args.resume} is not whole ({fault}); go on from another, or with auto")
    return Path(args.resume)


def same_folder(folder):
    """Raises SystemExit, on every rank, where one does not see what rank 0 writes into folder: each node would keep its own part of every checkpoint."""
    mark = Path(folder) / of_rank_zero(f"partial-{uuid.uuid4().hex}")        # start_folder removes what a kill leaves of it
    if dist.is_initialized():
        if dist.get_rank() == 0:
            mark.mkdir(parents=True)
        dist.barrier()
        blind = [str(rank) for rank, sees in enumerate(gather_lists([mark.exists()])) if not sees]
        if dist.get_rank() == 0:
            mark.rmdir()
        if blind:
            raise SystemExit(f"--out {folder} is not the same folder for all: rank {', '.join(blind)} does not see what rank 0 writes there; give one that every node can write to")


def same_flags(args, folder):
    """Was the last run in this folder one of exactly these flags?"""
    known = read_json(Path(folder) / "config.json")
    if known is None:
        return False
    ours = json.loads(json.dumps(vars(args), default=str))
    return all(name in known and known[name] == value for name, value in ours.items())


def load_model(path, model, *beside):
    """Fill a model in place, before it is sharded -> the number of steps that were done. beside: functions that fill what lies beside it. Raises SystemExit
    where one of them does not fit."""
    try:
        models.fill(model, path)
        for fill in beside:
            fill()
        return json.loads((Path(path) / "checkpoint.json").read_text())["step"]
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise SystemExit(of_no_use(path, error)) from None


def load_optimizer(path, module, optimizer):
    """Fill the optimizer's state, each rank its part, whatever number of ranks wrote it. Rates and decay are those of today's flags. Raises SystemExit where
    other parameters learnt."""
    # models.fault_of has looked for the files that checkpoint.json lists; an old one lists none
    listed = "files" in read_json(Path(path) / "checkpoint.json")
    if not listed and not any(Path(path).glob("optimizer/*.safetensors")):
        raise SystemExit(f"{path} is not whole (no optimizer/*.safetensors); go on from another")
    reader = HuggingFaceStorageReader(str(Path(path) / "optimizer"))
    try:
        known, learns = reader.read_metadata().state_dict_metadata, {n: p for n, p in module.named_parameters() if p.requires_grad}
        empty = {}
        for key, about in known.items():
            name, _, what = key.rpartition(".")
            if name not in learns or about.size not in (learns[name].shape, torch.Size()):
                raise ValueError(f"{name} does not learn here, or in another shape")
            empty[key] = torch.zeros(()) if what == "step" else torch.zeros_like(learns[name], dtype=about.properties.dtype)
        if missing := learns.keys() - {key.rpartition(".")[0] for key in known} if known else ():
            raise ValueError(f"{sorted(missing)[0]} did not learn there")
        if empty:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(empty, storage_reader=reader)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
        raise SystemExit(of_no_use(path, error)) from None
    for key, value in empty.items():
        name, _, what = key.rpartition(".")
        optimizer.state[learns[name]][what] = value


def of_no_use(path, error):
    if isinstance(error, CheckpointException):              # of each rank that failed, its own
        error = next(cause for cause, _ in error.failures.values())
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, SafetensorError):
        return (f"{path} holds a file that is truncated or damaged ({reason}); go on from another "
                "checkpoint (--resume DIR)")
    if isinstance(error, OSError):
        return (f"{path} was saved by another model, or is not whole ({reason}); resume with the "
                "flags of its config.json, or from another checkpoint")
    return f"{path} was saved by another model ({reason}); resume with the flags of its config.json"


# ----------------------------------------------------------- 5. bad days ---------------------------------------------------------------

@contextlib.contextmanager
def signals_noted():
    """Inside, SIGTERM (a preemption) and Ctrl-C do no more than put their name into the list that is given: the step ends, all ranks save, then they leave. A second
    one, some seconds later, is meant: it ends the process."""
    noted, since = [], time.monotonic()

    def note(number, _):
        nonlocal since
        if noted and time.monotonic() - since > 3:          # torchrun passes on what the terminal has sent us already
            signal.signal(number, signal.SIG_DFL)           # no KeyboardInterrupt, which is lost where Python is just clearing up (__del__)
            os.kill(os.getpid(), number)
        since = time.monotonic()
        noted.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def out_of_memory_named(where):
    """where: {"part", "batch", "length", "do"}, kept up to date inside. Raises SystemExit with them when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:            # torch.OutOfMemoryError is a RuntimeError, and the CPU's allocator raises a plain one
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise SystemExit("out of memory in {part}, with {batch} of up to {length} tokens each; {do}".format(**where)) from None


class NoneLeft(data.DataError):
    """No example of a step can be used."""


@contextlib.contextmanager
def bad_days(where, prepared, save, say):
    """What may come over the loop inside: a signal is noted in the list that is given, memory that runs out is named (where), data that are gone end the run with a
    checkpoint (save), and the workers of `prepared` (feed) end with it in any case."""
    with contextlib.closing(prepared), signals_noted() as signals, out_of_memory_named(where):
        try:
            yield signals
        except NoneLeft as error:                           # on every rank, so that all can save; what one rank alone meets (in an evaluation) ends the run as it is
            leave(str(error), save(), say)


ASKED = "asked to stop"
SPOILED = 5                 # steps in a row whose loss or gradient is not finite, after which a run stops


def reason_to_stop(asked, spoiled, unusable, allowed):
    """-> a sentence, or None. asked: how many ranks got a signal; spoiled: steps left out in a row; unusable: training examples skipped so far."""
    if asked:
        return ASKED
    if spoiled >= SPOILED:
        return (f"the loss or its gradient was not finite in {spoiled} steps in a row (log.jsonl names their examples): look at these, lower --lr or --clip, and "
                "go on from an earlier checkpoint (--resume DIR)")
    if unusable > allowed:
        return f"{unusable} training examples could not be used, and --skip-bad allows {allowed}: skipped.jsonl names them; mend them or raise --skip-bad"
    return None


def read_data(train_file, eval_files, args, require, say):
    """-> the training examples, those to evaluate on, the durations of their clips, {why: why} of the unusable ones. The whole of both is looked at, every clip decoded, before
    anything trains. Raises data.DataError at the first fault; with --skip-bad N, for training alone, where there are more than N."""
    if args.shard and not dist.is_initialized():
        raise SystemExit("--shard shares the weights among ranks, and this is one process; start it with torchrun --nproc_per_node N")
    faults = [] if args.skip_bad else None
    examples, seconds = data.check_clips(data.read_manifest(train_file, require=require, faults=faults), args.max_seconds, faults)
    scored, more = data.check_clips(data.read_manifests(eval_files, limit=16 if args.dry_run and args.data else None), args.max_seconds)
    for fault in faults or ():
        say(f"left out: {fault}")
    data.tolerate(faults or [], args.skip_bad)
    return examples, scored, seconds + more, {fault: fault for fault in faults or ()}


class Prepared(torch.utils.data.Dataset):
    """What DataLoader asks of its workers: (this rank's examples, the step's) -> without_bad of them, or the DataError that it raised."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, examples):
        try:
            return without_bad(self.make, *examples)
        except data.DataError as error:                     # as a value: DataLoader would put its own traceback into the sentence
            return error


def feed(make, examples, args, *, done, stop, rank, world, device):
    """For each step from `done` on: yields (make(this rank's share of its examples), {id: why} of those that were unusable, seconds that were waited for it). --workers processes
    are ahead of the training by two steps each; close() ends them. They get their examples from here and never touch the list of all: counting references to its parts would copy
    it, page by page.

    Raises SystemExit where a worker dies (killed for its memory, most likely), NoneLeft, on every rank, where no example of a step can be used."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"          # threads do not survive a fork
    awaited, share, workers = collections.deque(), args.batch_size // world, args.workers      # awaited: ids on their way

    def work():
        for step in range(done, stop):
            batch = examples_of_step(examples, step, args.batch_size, args.seed)
            mine = batch[rank * share:(rank + 1) * share]
            awaited.append([example.id for example in mine])
            yield mine, batch

    def deaf(_):
        for number in (signal.SIGTERM, signal.SIGINT):      # these are for the main process, which needs its workers until it has saved
            signal.signal(number, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: it goes with its parent, however that ends, and with it what it has open of a GPU

    prepared, others = Prepared(make), set(multiprocessing.active_children())
    if workers and sys.platform == "linux":                 # elsewhere a process cannot be forked safely
        source = iter(torch.utils.data.DataLoader(prepared, batch_size=None, sampler=work(), num_workers=workers, worker_init_fn=deaf, multiprocessing_context="fork"))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # a dead worker shows where its batch is waited for, not in the middle of writing a checkpoint
    else:
        source = map(prepared.__getitem__, work())
    try:
        while True:
            start = time.perf_counter()
            try:
                made = next(source)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise SystemExit(f"a data worker died ({' '.join(str(error).split())[:200]}) while {', '.join(awaited[0][:8])} or the next examples were read; see whether "
                                 "memory or /dev/shm is full, lower --workers, and go on with --resume auto") from None
            awaited.popleft()
            if over_ranks(isinstance(made, data.DataError), dist.ReduceOp.MAX, device):
                raise NoneLeft(made if isinstance(made, data.DataError) else "another rank can use none of this step's examples")
            yield *made, time.perf_counter() - start
    finally:
        for worker in set(multiprocessing.active_children()) - others:      # deaf, and it may be busy with a clip for long
            worker.kill()


def without_bad(make, mine, batch):
    """make(mine) -> (what it made, {id: why} of the examples that cannot be used: a clip that was deleted since the start, say). In their place comes the next
    of the step's global batch that can, so that no rank runs short, and any number of ranks takes the same. Raises DataError where none can."""
    try:
        return make(mine), {}
    except data.DataError:
        faults, usable = {}, set()

    def can(example):
        if example.id not in faults and example.id not in usable:
            try:
                make([example])
                usable.add(example.id)
            except data.DataError as error:
                faults[example.id] = str(error)
        return example.id in usable

    kept = []
    for example in mine:
        at = batch.index(example)
        kept.append(next(filter(can, batch[at:] + batch[:at]), None))
    if None in kept:
        raise data.DataError(f"none of the {len(batch)} examples of a step can be used; the first: {next(iter(faults.values()))}")
    ours = {example.id for example in mine}
    return make(kept), {name: why for name, why in faults.items() if name in ours}          # its own: another rank's it reports itself


def note_unusable(faults, unusable, out, step, rank):
    """faults: {id: why} of this rank's step. `unusable` ({id: why}, those of the whole run) gets every rank's new ones, and rank 0 writes them down. Every rank must come here."""
    for name, why in gather_lists(sorted(faults.items())):
        if name not in unusable and rank == 0:
            append_jsonl(out / "skipped.jsonl", {"step": step, "id": name, "fault": why})
        unusable[name] = why


# ------------------------------------------------------------- 6. logs -----------------------------------------------------------------

def speaker(rank):
    """print, on rank 0 alone, above a progress bar if there is one."""
    return (lambda *words: tqdm.write(" ".join(map(str, words)))) if rank == 0 else (lambda *words: None)


def progress(done, stop, rank):
    """A bar of the steps, with the time that is left; on rank 0, and only where somebody looks at it."""
    return tqdm(initial=done, total=stop, unit="step", disable=None if rank == 0 else True, dynamic_ncols=True)


def log_step(line, text, *, span, clock, out, bar, say, rank):
    """A step's line into log.jsonl, its text onto the bar and, every tenth, into the terminal, with the time that is left. span: the step that this start began
    behind, and the last one; clock: when the script started, and when its loop did (seconds since the epoch)."""
    (first, stop), (started, begun), done = span, clock, line["step"]
    if rank == 0:
        append_jsonl(out / "log.jsonl", line)
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    if done == first + 1:
        say(f"the first step was done {time.time() - started:.1f} s after the start, {time.time() - begun:.1f} s of them its own")
    if done % 10 == 0 or done <= 2 or done == stop:
        left = (time.time() - begun) / (done - first) * (stop - done)
        say(f"step {done}/{stop}  {text}  {left / 60:.0f} min left" if left >= 60 else f"step {done}/{stop}  {text}")


def costs(taken, waited, device):
    """What a step's line says of its price: seconds, those of them in which the data were not ready, memory now and at its peak."""
    return {"seconds": taken, "seconds_waiting": waited, "memory_gb": peak_memory_gb(device), "host_gb": host_memory_gb()}


def left_out(step, loss, norm, spoilt, ids, say):
    """The line of a step whose loss or gradient was not finite, so that nothing was learnt from it. spoilt: ids whose loss shows it, of this rank; ids: all of this rank's.
    Every rank must come here."""
    found = list(dict.fromkeys(gather_lists(spoilt) or gather_lists(ids)))
    reason = f"its loss is {loss}, its gradient's norm {norm}"
    say(f"step {step} is left out: {reason}; examples: {', '.join(found[:8])}{', ...' * (len(found) > 8)}")
    return {"step": step, "skipped": reason, "ids": found}


def leave(why, saved, say):
    """The end of a run that stops before its end: SystemExit."""
    say(f"\n{why}; saved {saved}: go on with --resume auto")
    wait_for_all()                                          # torchrun kills the others when the first has left
    raise SystemExit(130 if why == ASKED else 1)


@contextlib.contextmanager
def writing(path):
    """What cannot be written inside (no room, no permission, a file in a folder's place) is one
    sentence: SystemExit."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error}); make room there or give another "
                         "--out, and start again (a training run with --resume auto)") from None


def make_folder(path):
    """-> the folder, made if it is missing. Raises SystemExit where nobody can write into it."""
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission, or a read-only disk")
    return path


def read_json(path):
    """A JSON file of a run -> a dict; None without the file. Raises SystemExit for a broken one."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is not the JSON that a run wrote there ({error}); move it away "
                         "and start again") from None


def write_json(path, value):
    """Indented JSON, complete or not at all."""
    replace_text(path, json.dumps(value, indent=1, default=str) + "\n")


def replace_text(path, text):
    """A file's new content, or, whenever we are killed, its old one."""
    partial = Path(f"{path}.part")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        flush(partial)          # else a power cut could leave the new name with nothing in it
        os.replace(partial, path)


def append_jsonl(path, record):
    """One line, flushed: what a killed run logged is on disk. Raises SystemExit where the disk is full."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def start_logs(out, args, done, unusable, *, steps, rank, world, names=("log",)):
    """config.json, the logs as a run that goes on behind `done` steps needs them, and what was left out at the start; by rank 0."""
    if rank == 0:
        write_json(out / "config.json", {**vars(args), **run_facts(), "ranks": world, "steps": steps})
        for name in names:
            open_log(out / f"{name}.jsonl", done)
        for why in unusable if not done else ():
            append_jsonl(out / "skipped.jsonl", {"step": 0, "fault": why})


def open_log(path, done):
    """Start a log, or cut an old one back to the `done` steps that the checkpoint holds: a resumed run writes the rest again. A last line that a
    kill cut off goes too. Raises SystemExit for any other line that is broken."""
    lines, kept = [], []
    if done and path.exists():
        lines = path.read_bytes().splitlines()
    for n, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError) as error:
            if n < len(lines):
                raise SystemExit(f"{path}:{n} is no line that a run wrote ({error!r}); mend it, or "
                                 "move the file away, and start again") from None
    replace_text(path, "".join(kept))


def evaluation(work, when, asked, *, module, out, args, rank):
    """work() -> results, with all weights of a sharded module whole; rank 0 writes them to when.json and, apart, what was said to samples-when.jsonl. -> the results without
    the samples, with the questions' fingerprint `asked`."""
    where = {"part": f"the evaluation {when}", "batch": f"{args.eval_batch} questions", "length": args.max_new_tokens, "do": "lower --eval-batch"}
    with out_of_memory_named(where):
        results = whole(module, work)
    samples, results["asked"] = results.pop("samples"), asked
    if rank == 0:
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        replace_text(out / f"samples-{when}.jsonl", text)
        write_json(out / f"{when}.json", results)
    return results


def read_known(path, asked):
    """An evaluation that an earlier part of a run saved, if it asked the same questions (data.fingerprint), or None. Every rank must come here."""
    found = read_json(path) or {}
    return of_rank_zero(found if found.get("asked") == asked else None)


def run_facts():
    """Command, versions and commit, for config.json."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10).stdout.strip()
    except OSError:
        commit = ""
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit or "unknown",
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def forget_peak_memory(device):
    """What was needed up to here (an evaluation, say) shall not count. On a CPU only Linux can forget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def host_memory_gb():
    """What this process holds of the main memory now (resident set), where the system tells; None elsewhere."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1e6 if status.exists() else None


def peak_memory_gb(device):
    """Peak memory so far: the GPU's allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path("/proc/self/status").exists():              # as getrusage's, but it can be made to forget
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
    import resource   # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
