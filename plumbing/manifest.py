"""
What a line of a manifest must hold, and a sentence for everything that may be wrong with it.

data.read_manifest calls it for who wants the examples or the first fault. Every fault is a
data.DataError.
"""
import json
import os
import re
from dataclasses import fields
from pathlib import Path

from data import STAGES, TAG, DataError, Example

TEXT_LIMIT = 100_000            # characters in a text: beyond is no question, but a file in a field
NEEDED = ("id", "audio", "answer", "task")      # the question too, but that may be blank
OPTIONAL = ("description", "transcript", "speaker", "split", "sub-category")


def parse(path):
    """Yields an Example, or the DataError that says what is wrong, for each line with content.
    Raises DataError where there is none."""
    path = Path(path)
    folder = path.parent.resolve()
    seen = {}
    for number, line in lines(path):
        try:
            example = parse_line(line, f"{path}:{number}", folder)
            claim_id(example, seen)
            yield example
        except DataError as error:
            yield error


def lines(path):
    """Yields (number, bytes) of each line that is not blank. Raises DataError if there is none."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such manifest; check the path")
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield number, line
    if empty:
        raise DataError(f"{path}: the manifest is empty; write one JSON object per line")


def parse_line(line: bytes, where: str, folder: Path) -> Example:
    """One line -> Example. Raises DataError.

    where: "manifest.jsonl:12", for messages. folder: the manifest's own, resolved."""
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
    for name in (*NEEDED, "question", *OPTIONAL):
        value = record.get(name)
        if value is not None or name not in OPTIONAL:
            check_text(value, f"the field {name!r}", where, blank=name not in NEEDED)

    # Choices, and an answer that is one of them
    if record.get("choices") is None:
        record["choices"] = []
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) > 26:
        raise DataError(f"{where}: 'choices' must be a list of at most 26 strings; "
                        "write [] for an open question")
    for choice in choices:
        check_text(choice, "a choice", where)
    if choices and answer not in choices:
        raise DataError(f"{where}: the answer {answer!r:.150} is not among the choices "
                        f"{str(choices):.150}; write the text of one choice")

    # The reasoning, all four stages of it
    reasoning = record.get("reasoning")
    stages = []
    if reasoning is not None:
        if not isinstance(reasoning, dict):
            raise DataError(f"{where}: 'reasoning' must be an object with the keys "
                            f"{', '.join(STAGES)}; split the trace into its stages")
        for stage in STAGES:
            stages.append(check_text(reasoning.get(stage), f"the field {stage!r}", where))
        record["reasoning"] = dict(zip(STAGES, stages))
    for text in (answer, *stages):
        tag = re.search(TAG, text, re.IGNORECASE)
        if tag:
            raise DataError(f"{where}: the text {text[:60]!r} contains the tag {tag[0]}, "
                            "which marks the response's parts; remove the tag")

    # The clip. realpath follows links first, so that neither "..", nor an absolute path, nor a link
    # can read a file from elsewhere
    audio = Path(os.path.realpath(folder / record["audio"]))
    if not audio.is_relative_to(folder):
        raise DataError(f"{where}: the audio path {record['audio']!r:.150} leaves the folder "
                        f"{folder}; put the clip or the manifest elsewhere")

    record["audio"] = audio
    record["sub_category"] = record.get("sub-category")
    record["where"] = where
    return Example(**{field.name: record.get(field.name) for field in fields(Example)})


def check_text(value, what, where, *, blank=False):
    """Returns the value if it is a text that can be used. Raises DataError.

    what: "a choice", for messages. blank: whether it may be."""
    if value is None:
        wrong = "is missing or null; add it, or remove the line"
    elif not isinstance(value, str):
        wrong = f"must be a string, not {type(value).__name__}; put it in quotes"
    elif not blank and not value.strip():
        wrong = "is empty; fill it in or remove the line"
    elif "\0" in value:
        wrong = "holds a NUL character; remove it, and look where the text was read from"
    elif len(value) > TEXT_LIMIT:
        wrong = (f"has {len(value):,} characters, over the limit of {TEXT_LIMIT:,} for a text; "
                 "shorten it or remove the line")
    else:
        return value
    raise DataError(f"{where}: {what} {wrong}")


def claim_id(example, seen):
    """Ids are unique. seen: {id: where it was used}."""
    if example.id in seen:
        raise DataError(f"{example.where}: id {example.id!r:.150} was already used at "
                        f"{seen[example.id]}; give every example its own id")
    seen[example.id] = example.where
