"""
Checkpoints: written so that a kill at any moment leaves the last one whole, and read so that a run
goes on as if nothing had happened, with any number of ranks.

    step-N/model*.safetensors, config.json, ...    the model in the hub's layout, with its card
    step-N/NAME.safetensors                        what lies beside it, such as the projections
    step-N/optimizer/*.safetensors                 each rank writes its part
    step-N/checkpoint.json                         step, and whether anything was updated yet

Everything random is a function of (seed, step), so that no generator's state has to be saved. A
checkpoint is written under a temporary name, flushed to the disk and renamed when it is complete.
"""
import contextlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from plumbing import ranks, saving
from plumbing.files import complete, flush, make_folder, read_json, writing

OPTIMIZER_FILE = 30             # tensors in one file of the optimizer's, about 5 GB at 7B


# ---------------------------------------------------------------------------------------------
# 1. Writing. Every rank has to call these functions

def save(folder, *, step, model, processor, beside, module, optimizer, flags, keep):
    """Write folder/step-N -> its path; the `keep` newest stay, this one included.

    beside: {file name: module}. module: holds every parameter that the optimizer knows.
    flags: for the model's card. Raises SystemExit where the disk is full; the checkpoints
    before are as they were."""
    from torch.distributed import checkpoint as dcp  # slow to import

    folder = Path(folder)
    final = folder / f"step-{step:07d}"
    partial = folder / f"partial-{step:07d}"
    on_rank_zero = ranks.rank() == 0
    if ranks.of_rank_zero(final.exists()):              # of this moment already
        return final
    moments = {}                                            # {"parameter.exp_avg": tensor}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{key}"] = value
    needed = sum(x.nbytes for x in [*moments.values(), *_saved_tensors(module).values()])
    try:
        # The model, gathered tensor by tensor in rank 0's main memory
        weights = _gathered(model)
        states = {name: _gathered(part) for name, part in beside.items()}
        if on_rank_zero:
            (partial / "optimizer").mkdir(parents=True)
            saving.save(model, processor, partial, weights)
            for name, state in states.items():
                save_file(state, partial / name)
        del weights, states
        ranks.wait_for_all()

        # The optimizer, each rank its part
        if moments:
            files = {name: 1 + i // OPTIMIZER_FILE for i, name in enumerate(moments)}
            writer = dcp.HuggingFaceStorageWriter(
                str(partial / "optimizer"), files, save_distributed=True
            )
            with warnings.catch_warnings(action="ignore"):
                dcp.save(moments, storage_writer=writer)

        # All is there: flush it, give it its name
        if on_rank_zero:
            saving.write_card(partial, flags)
            about = {"step": step, "updated": bool(moments)}
            (partial / "checkpoint.json").write_text(json.dumps(about))
            for path in [*partial.rglob("*"), partial]:
                flush(path)
            os.replace(partial, final)
            flush(folder)
            for old in complete(folder)[:-keep]:
                # Its checkpoint.json first: half of a folder must not look whole
                (old / "checkpoint.json").unlink()
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        if on_rank_zero:
            shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(
            f"checkpoint {final} cannot be written ({_reason(error)}); it needs about "
            f"{needed / 1e9:.2f} GB, and {shutil.disk_usage(folder).free / 1e9:.2f} GB are free in "
            f"{folder}: make room, and go on with --resume auto from the last one that is complete"
        ) from None
    return final


def _reason(error):
    # Of a CheckpointException the cause, of the first rank that failed
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    return " ".join(str([*causes, error][0]).split())[:300]


def _saved_tensors(module):
    """What a checkpoint holds of a module's state: with LoRA the adapters alone."""
    state = module.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return adapter or state


def _gathered(module):
    state = {}
    for name, tensor in _saved_tensors(module).items():
        tensor = ranks.unsharded(tensor)             # one by one: no other rank holds more than one
        if ranks.rank() == 0:
            state[name] = tensor.detach().cpu().contiguous()
    return state


# ---------------------------------------------------------------------------------------------
# 2. The run's folder, and where the run goes on

def start_folder(folder, resume):
    """Make a run's folder ready -> the checkpoint that the run starts from, on every rank the same;
    None: from nothing.

    resume: None, "auto" (the newest checkpoint in folder, if there is one), or a path. Removed are
    what a kill or a dry run left in the folder, and evaluations made after the checkpoint.

    Raises SystemExit where resume is no checkpoint; where the folder holds checkpoints and the run
    does not go on from the newest of them, which would pass for this run's own; and where a rank
    does not see the folder: each node would keep a part of every checkpoint. (Files are not looked
    at until they are loaded. Nothing keeps two runs that start together out of one folder.)"""
    folder = make_folder(folder)
    config = read_json(folder / "config.json") or {}
    was_dry = config.get("dry_run") and resume in (None, "auto")
    whole = ranks.of_rank_zero([] if was_dry else complete(folder))
    checkpoint = Path(resume) if resume else None
    if resume == "auto":
        checkpoint = whole[-1] if whole else None
    elif resume and not (checkpoint / "checkpoint.json").is_file():
        raise SystemExit(f"{checkpoint} is not a checkpoint (it has no checkpoint.json); give a "
                         f"folder such as {folder}/step-0000100, or auto")
    if whole and (checkpoint is None or checkpoint.resolve() != whole[-1].resolve()):
        raise SystemExit(f"{folder} already holds checkpoints, the newest {whole[-1].name}; go on "
                         "from it by --resume auto, move newer ones away to go on from an earlier "
                         "one, or give another --out")

    mark = None
    if ranks.rank() == 0:
        with writing(folder):
            _clear(folder, whole)
            mark = tempfile.mkdtemp(dir=folder, prefix="partial-")
    mark = folder / Path(ranks.of_rank_zero(mark)).name
    seen_by_all = all(ranks.gather_lists([mark.exists()]))
    if ranks.rank() == 0:
        mark.rmdir()
    if not seen_by_all:
        raise SystemExit(f"--out {folder} is not the same folder for all ranks; give one that "
                         "every node can write to")
    return checkpoint


def _clear(folder, whole):
    newest = whole[-1].name if whole else ""
    old = [*folder.glob("partial-*"), folder / "after.json", folder / "results.json"]
    old += set(folder.glob("step-" + 7 * "[0-9]")) - set(whole)
    for path in folder.glob("eval-*.json"):
        if path.stem.replace("eval", "step") > newest:
            old.append(path)
    if not whole:
        for name in ("before.json", "log.jsonl", "samples.jsonl"):
            old.append(folder / name)
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# 3. Reading

def load_model(path, model, beside=None, load=None):
    """Fill a model and what lies beside it, in place, before sharding.

    beside: {file name: module}, filled by load(module, file). Raises SystemExit where one does not
    fit."""
    with _fitting(path):
        saving.fill(model, path)
        for name, module in (beside or {}).items():
            load(module, Path(path) / name)


def load_optimizer(path, module, optimizer):
    """Fill the optimizer's state, each rank its part, whatever number of ranks wrote it.

    Learning rates and decay are those of today's flags. Raises SystemExit where other parameters
    were trained."""
    from torch.distributed import checkpoint as dcp

    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with _fitting(path):
        reader = dcp.HuggingFaceStorageReader(str(Path(path) / "optimizer"))
        saved = reader.read_metadata().state_dict_metadata
        trained_there = {key.rpartition(".")[0] for key in saved}
        odd = sorted(trained_there ^ trainable.keys())
        if odd and read_json(Path(path) / "checkpoint.json")["updated"]:
            raise ValueError(f"{odd[0]} did not learn there, or does not learn here")

        # Empty tensors, each with its rank's share of the parameter, which dcp fills in place
        state = {}
        for key, about in saved.items():
            name, _, moment = key.rpartition(".")
            like = trainable[name] if about.size else torch.zeros(())
            state[key] = torch.zeros_like(like, dtype=about.properties.dtype)
            optimizer.state[trainable[name]][moment] = state[key]
        if state:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(state, storage_reader=reader)


@contextlib.contextmanager
def _fitting(path):
    try:
        yield
    except Exception as error:
        raise SystemExit(
            f"{path} was saved by another model, or is not whole ({_reason(error)}); resume with "
            "the flags of its config.json or, if a file is truncated or damaged, move it away and "
            "go on from the one before"
        ) from None
