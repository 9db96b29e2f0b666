"""
Files of a run: complete or not at all, and one sentence where the disk refuses.
"""
import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def writing(path):
    """What cannot be written inside (no room, no permission) becomes one sentence: SystemExit."""
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


def flush(path):
    """What was written to a file, or the names in a folder, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path, text):
    """A file's new content or, whenever we are killed, its old one. Raises SystemExit."""
    partial = Path(f"{path}.part")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        flush(partial)          # else a power cut could leave the new name with nothing in it
        os.replace(partial, path)


def write_json(path, value):
    """Indented JSON, complete or not at all. Raises SystemExit."""
    replace_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path):
    """A JSON file -> its object; None without the file. Raises SystemExit for a broken one."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} is broken ({error}); move it away, or get it again") from None


def append_jsonl(path, record):
    """One more line, on disk even if we are killed next. Raises SystemExit where it is full."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def keep_lines(path, wanted):
    """Cut a JSONL file of a run, if there is one, down to the records that wanted(record) is true
    of -> these records.

    A last line that a kill cut off goes too. Raises SystemExit for any other line that no run
    wrote."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_bytes().splitlines()
    kept, records = "", []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if wanted(record):
                kept += line.decode() + "\n"
                records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            cut_off = number == len(lines) and isinstance(error, ValueError)        # no JSON
            if not cut_off:
                raise SystemExit(f"{path}:{number} is no line that a run wrote ({error!r}); mend "
                                 "it, or move the file away, and start again") from None
    replace_text(path, kept)
    return records


def complete(folder):
    """The checkpoints of a run's folder, oldest first: one gets its name when it is complete."""
    return sorted(file.parent for file in Path(folder).glob("step-*/checkpoint.json"))


def newest_checkpoint(path):
    """A run's folder -> its newest checkpoint; any other path or hub id: itself."""
    return str([path, *complete(path)][-1])
