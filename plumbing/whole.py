"""
Which checkpoints of a run's folder are whole.

A run writes each checkpoint as step-N/, with a checkpoint.json that lists its files and their
bytes. A copy that broke off, or a disk that was full, leaves one that is not whole.
"""
import json
from pathlib import Path


def fault_of(checkpoint, *, optimizer=True):
    """Why a checkpoint is not whole, in a few words; None where it is. optimizer=False: its model
    alone is wanted."""
    try:
        saved = json.loads((checkpoint / "checkpoint.json").read_text())
        int(saved["step"])
        for name, size in saved.get("files", {}).items():
            path = checkpoint / name
            if name.startswith("optimizer/") and not optimizer:
                continue
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size < size:
                return f"{name} is truncated: {path.stat().st_size:,} of {size:,} bytes"
    except FileNotFoundError:
        return "checkpoint.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"checkpoint.json is broken: {error!r}"
    return None


def newest_whole(folder, *, optimizer=True):
    """A run's folder -> (its newest whole checkpoint or None, a sentence on each newer one)."""
    passed_over = []
    for checkpoint in sorted(Path(folder).glob("step-*"), reverse=True):
        fault = fault_of(checkpoint, optimizer=optimizer)
        if fault is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over ({fault})")
    return None, passed_over


def newest_checkpoint(path):
    """A run's folder -> its newest checkpoint whose model is whole; any other path or hub id:
    itself."""
    checkpoint, passed_over = newest_whole(path, optimizer=False)
    if passed_over and checkpoint is None:
        raise SystemExit(f"{path} has no checkpoint that is whole: {'; '.join(passed_over)}; "
                         "give another folder")
    for sentence in passed_over:
        print(sentence)
    return str(checkpoint or path)
