"""
Plumbing that must never disagree between the two training scripts: ranks, optimizer groups, checkpoints, logs.

What this file teaches: what has to be saved so that a killed run goes on as if nothing had happened (weights, optimizer, step;
everything random is a function of seed and step, so that no generator state needs saving), and how to write it so that a kill at
any moment leaves the last checkpoint whole: to a temporary name first, then one rename.

Plain functions, explicit arguments, explicit returns; no loop, no loss, no globals.
"""
import contextlib
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

import models


# ------------------------------------------------------------- 1. ranks ---------------------------------------------------------------

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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def stop_distributed():
    """Wait for every rank, then leave the process group; nothing may hold a DDP module any more."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first(rank, world):
    """Rank 0 runs the block alone, then the others: they find what it downloaded or synthesised."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def sum_over_ranks(values, device):
    """{name: float} -> the same summed over all ranks: with losses divided by global token counts, the sum is the global mean."""
    if not dist.is_initialized():
        return values
    total = torch.tensor([float(v) for v in values.values()], device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def examples_of_step(examples, step, batch_size, seed):
    """The global batch of a step, a pure function of (seed, step): a resumed run and any number of ranks see the same ones.

    Every epoch is its own permutation, and batches run on across its end."""
    rows = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
              for epoch in {row // len(examples) for row in rows}}
    return [examples[orders[row // len(examples)][row % len(examples)]] for row in rows]


# ------------------------------------------------------ 2. optimizer groups -------------------------------------------------------------

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


# --------------------------------------------------------- 3. checkpoints ---------------------------------------------------------------

def save_checkpoint(folder, *, step, model, processor, beside, optimizer, card, keep=2):
    """Write folder/step-N: the model in the hub's layout with its card, `beside` {file name: module} (all safetensors), state.pt; then drop old ones.

    Written under a temporary name and renamed when complete, so that a folder called step-N is always whole."""
    folder = Path(folder)
    final, partial = folder / f"step-{step:07d}", folder / f"partial-{step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    models.save(model, processor, partial)
    for name, module in beside.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in module.state_dict().items()}, partial / name)
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, partial / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    card(final)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def was_dry(folder):
    """Was the last run in this folder one with --dry-run?"""
    config = Path(folder) / "config.json"
    return config.exists() and json.loads(config.read_text()).get("dry_run", False)


def start_folder(folder, checkpoint, rank, world):
    """Make the run's folder. A run that does not resume from there wants it to itself: another's checkpoints and evaluations would pass for its own.
    What a dry run left is removed; raises SystemExit where it would be a real run's checkpoints."""
    folder = Path(folder)
    if rank == 0 and (checkpoint is None or checkpoint.resolve().parent != folder.resolve()):
        if list(folder.glob("step-*")) and not was_dry(folder):
            raise SystemExit(f"{folder} holds the checkpoints of another run; go on with it by --resume auto, or give another --out")
        for old in folder.glob("step-*"):
            shutil.rmtree(old)
        for old in (path for name in ("eval-*.json", "before.json", "after.json", "results.json") for path in folder.glob(name)):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.barrier()


def find_checkpoint(resume, folder, dry_run):
    """--resume auto: the newest complete checkpoint below folder, or None; --resume DIR: that one. Raises SystemExit if DIR is none, and for a
    dry run: it would leave a real run's folder looking like its own, which the next run clears."""
    if resume is None:
        return None
    if dry_run:
        raise SystemExit("--dry-run starts from nothing: leave --resume out, and give another --out than that of a real run")
    if resume == "auto":
        return max(Path(folder).glob("step-*"), default=None) if not was_dry(folder) else None
    if not (Path(resume) / "state.pt").is_file():
        raise SystemExit(f"{resume} is not a checkpoint (it has no state.pt); give a folder such as {folder}/step-0000100, or auto")
    return Path(resume)


def load_checkpoint(path, model, optimizer):
    """Fill model and optimizer in place -> the number of steps that were done. Rates and decay stay those of today's flags."""
    flags = [{name: group[name] for name in ("peak_lr", "weight_decay")} for group in optimizer.param_groups]
    try:
        models.fill(model, path)
        state = torch.load(Path(path) / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])           # ValueError: other parameters learnt (--train, --lower-lr)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"{path} was saved by another model ({reason}); resume with the flags of its config.json") from None
    for group, ours in zip(optimizer.param_groups, flags):
        group.update(ours)
    return state["step"]


# ------------------------------------------------------------- 4. logs -----------------------------------------------------------------

def write_json(path, value):
    """Indented JSON, complete or not at all."""
    partial = Path(f"{path}.part")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def append_jsonl(path, record):
    """One line, flushed: what a killed run logged is on disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def open_log(path, done):
    """Start a log, or cut an old one back to the `done` steps that the checkpoint holds: a resumed run writes the rest again. A last line that a
    kill cut off goes too."""
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if done and path.exists() else []
    path.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= done))


def keep_evaluation(folder, when, results, asked, rank):
    """Rank 0 writes when.json and, apart, what was said to samples-when.jsonl -> the results without the samples, with the questions' fingerprint."""
    samples, results["asked"] = results.pop("samples"), asked
    if rank == 0:
        (folder / f"samples-{when}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        write_json(folder / f"{when}.json", results)
    return results


def read_known(path, asked):
    """An evaluation that an earlier part of a run saved, if it asked the same questions (data.fingerprint), or None."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("asked") == asked else None


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


def peak_memory_gb(device):
    """Peak memory so far: the GPU's allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path("/proc/self/status").exists():              # as getrusage's, but it can be made to forget
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
    import resource   # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
