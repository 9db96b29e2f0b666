"""
What a line of a manifest must hold, and a sentence for everything that may be wrong with it.

data.py calls it; nobody else has to. Every fault is a data.DataError.
"""
import json
import re
from pathlib import Path

from data import STAGES, TAG, DataError

TEXT_LIMIT = 100_000            # characters in a text: beyond is no question, but a file in a field


def lines(path):
    """Yields (number, bytes) of each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def parse_record(line: bytes, where: str) -> dict:
    """One line -> its object, with all fields of the right type. Raises DataError."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        # Half a surrogate pair parses, but no tokenizer takes it
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the line is not JSON ({error}); "
                        "write one JSON object per line in UTF-8") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: the line holds a {type(record).__name__}, not an object; "
                        'write {"id": ...}')

    # Texts
    for name in ("id", "audio", "answer", "task"):
        check_field(record, name, where)
    check_field(record, "question", where, blank=True)
    for name in ("description", "transcript", "speaker", "split", "sub-category"):
        if record.get(name) is not None:
            check_field(record, name, where, blank=True)

    # Choices, and an answer that is one of them
    choices = record.get("choices")
    if choices is not None:
        check_choices(choices, record["answer"], where)

    # The reasoning, all four stages of it
    parts = [record["answer"]]
    reasoning = record.get("reasoning")
    if reasoning is not None:
        if not isinstance(reasoning, dict):
            raise DataError(f"{where}: 'reasoning' must be an object with the keys "
                            f"{', '.join(STAGES)}; split the trace into its stages")
        for stage in STAGES:
            check_field(reasoning, stage, where)
            parts.append(reasoning[stage])
    for part in parts:
        tag = re.search(TAG, part, re.IGNORECASE)
        if tag:
            raise DataError(f"{where}: the text {part[:60]!r} contains the tag {tag[0]}, "
                            "which marks the response's parts; remove the tag")
    return record


def check_field(record, name, where, *, blank=False):
    if name not in record:
        raise DataError(f"{where}: the field {name!r} is missing; add it to the line")
    value = record[name]
    if value is None:
        raise DataError(f"{where}: the field {name!r} is null; fill it in or remove the line")
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {name!r} must be a string, not "
                        f"{type(value).__name__}; put it in quotes")
    if not blank and not value.strip():
        raise DataError(f"{where}: the field {name!r} is empty; fill it in or remove the line")
    check_text(value, f"the field {name!r}", where)


def check_choices(choices, answer, where):
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or len(choices) > 26 or not all(choice.strip() for choice in choices):
        raise DataError(f"{where}: 'choices' must be a list of at most 26 non-empty strings; "
                        "write [] for an open question")
    for choice in choices:
        check_text(choice, "a choice", where)
    if choices and answer not in choices:
        raise DataError(f"{where}: the answer {short(answer)} is not among the choices "
                        f"{short(choices)}; write the text of one choice")


def check_text(value, what, where):
    if "\0" in value:
        raise DataError(f"{where}: {what} holds a NUL character; "
                        "remove it, and look where the text was read from")
    if len(value) > TEXT_LIMIT:
        raise DataError(f"{where}: {what} has {len(value):,} characters, over the limit of "
                        f"{TEXT_LIMIT:,} for a text; shorten it or remove the line")


def inside(name: str, folder: Path, where: str) -> Path:
    """The path of an audio file that lies in the folder. Raises DataError."""
    # resolve() follows links first, so that neither "..", nor an absolute path, nor a link can
    # read a file from elsewhere
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:        # RuntimeError: a circle of links
        raise DataError(f"{where}: the audio path {short(name)} cannot be used "
                        f"({short(str(error))}); correct it") from None
    if not path.is_relative_to(folder):
        raise DataError(f"{where}: the audio path {short(name)} leaves the folder {folder}; "
                        "put the clip or the manifest elsewhere")
    return path


def claim_id(example, seen):
    """Ids are unique. seen: {id: where it was used}."""
    if example.id in seen:
        raise DataError(f"{example.where}: id {short(example.id)} was already used at "
                        f"{seen[example.id]}; give every example its own id")
    seen[example.id] = example.where


def short(value):
    """repr, cut where it is long."""
    text = repr(value)
    if len(text) < 200:
        return text
    return f"{text[:150]} ... ({len(text):,} characters)"
