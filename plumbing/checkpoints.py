"""
Checkpoints: written so that a kill at any moment leaves the last one whole, and read so that a run goes on as if nothing had happened.
"""
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import uuid
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

import models
from plumbing import whole
from plumbing import ranks
from plumbing.files import flush, make_folder, read_json, write_json, writing

try:
    import fcntl
except ImportError:             # Windows: nothing keeps two runs out of one --out there
    fcntl = None


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
    free = ranks.over_ranks(shutil.disk_usage(folder).free if rank == 0 else 0, dist.ReduceOp.MAX, next(module.parameters()).device)
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
                paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
                files = {str(path.relative_to(partial)): path.stat().st_size for path in paths}
                about = {"step": step, "ranks": ranks.world_size(), "files": files}
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
    if faults := [found for found in ranks.gather_lists([fault]) if found is not None]:
        raise OSError(faults[0])


def to_save(module):
    """The part of a module's state_dict that a checkpoint holds: with LoRA the adapters alone."""
    adapters = models.has_lora(module)
    return {name: tensor for name, tensor in module.state_dict().items() if ".lora_" in name or not adapters}


def on_rank_zero(module, rank):
    """What is to be saved of a module, whole, in rank 0's main memory; every rank must come here, the others get {}."""
    kept = {}
    for name, tensor in to_save(module).items():
        tensor = ranks.full(tensor)               # one after the other, so that no other rank ever holds more than one of them whole
        if rank == 0:
            kept[name] = tensor.detach().cpu()
    return kept


def complete(folder):
    """The complete checkpoints of a run's folder, oldest first."""
    return [path for path in sorted(Path(folder).glob("step-*")) if (path / "checkpoint.json").is_file()]


def drop_old(folder, keep, best=None):
    """Keep the `keep` newest checkpoints, and the one with the highest score named `best`."""
    found = complete(folder)
    scores = {}
    for path in found:
        if best and whole.fault_of(path) is None:
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
    found = ranks.gather_lists([digest.hexdigest()])
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
    ranks.wait_for_all()


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
        except BlockingIOError:
            fault = f"another run is writing into {folder}; wait for its end, or give another --out"
        except OSError as error:
            print(f"{folder}: its disk has no locks ({error}), so nothing keeps a second run out")
        except SystemExit as error:
            fault = str(error)
    if fault := ranks.of_rank_zero(fault):
        raise SystemExit(fault)


def find_checkpoint(args, folder, device):
    """--resume auto: the newest whole checkpoint below folder, or None; --resume DIR: that one; the
    same on every rank, which all must come here. torchrun --max-restarts starts us again after a
    rank died: then auto, whatever was asked, if the folder is that of a run with the same flags.
    Raises SystemExit if DIR is none or not whole, and for a dry run: it would leave a real run's
    folder looking like its own, which the next run clears."""
    claim(folder)
    same_folder(folder)
    # each node's torchrun counts its own restarts; and it starts again after a refusal too, so that the count alone does not make a checkpoint ours
    again = ranks.over_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), dist.ReduceOp.MAX, device) > 0 and same_flags(args, folder)
    found, passed_over = (None, []) if was_dry(folder) else whole.newest_whole(folder)
    found, passed_over = ranks.of_rank_zero((found, passed_over))
    if args.dry_run and args.resume:
        raise SystemExit("--dry-run starts from nothing: leave --resume out, and give another --out than that of a real run")
    if args.dry_run or args.resume in (None, "auto") or ranks.of_rank_zero(again and found):
        if args.dry_run or not ranks.of_rank_zero(again or args.resume):
            return None
        if passed_over and not found:
            raise SystemExit(f"{folder} has no checkpoint that is whole: {'; '.join(passed_over)}; "
                             "give another --out")
        for sentence in passed_over:
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(sentence)
        return found
    if not (Path(args.resume) / "checkpoint.json").is_file():
        raise SystemExit(f"{args.resume} is not a checkpoint (it has no checkpoint.json); give a folder such as {folder}/step-0000100, or auto")
    if fault := whole.fault_of(Path(args.resume)):
        raise SystemExit(f"{args.resume} is not whole ({fault}); go on from another, or with auto")
    return Path(args.resume)


def same_folder(folder):
    """Raises SystemExit, on every rank, where one does not see what rank 0 writes into folder: each node would keep its own part of every checkpoint."""
    mark = Path(folder) / ranks.of_rank_zero(f"partial-{uuid.uuid4().hex}")        # start_folder removes what a kill leaves of it
    if dist.is_initialized():
        if dist.get_rank() == 0:
            mark.mkdir(parents=True)
        dist.barrier()
        blind = [str(rank) for rank, sees in enumerate(ranks.gather_lists([mark.exists()])) if not sees]
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
    # whole.fault_of has looked for the files that checkpoint.json lists; an old one lists none
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
    return f"{path} was saved by another model ({reason}); resume with the flags of its config.json"
