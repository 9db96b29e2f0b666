"""
Datasets as they are downloaded -> our manifests (data.py). Everything after the import reads
manifests only.

    python -m prepare.import_datasets DATASET SOURCE OUT.jsonl [flags]

    cota CoTA CoTA/cota.jsonl                                      # folders of parquet shards
    cota CoTA/meld CoTA/meld.jsonl --max-seconds 30                # one configuration
    cota export.json cota.jsonl --task sound --columns question=text response=label audio=clip
    avqa AVQA/train_qa.jsonl AVQA/train.jsonl --audio-root AVQA/wavs --max-seconds 30
    mmau MMAU/mmau-test-mini.json MMAU/test-mini.jsonl
    mmar MMAR/MMAR-meta.json MMAR/mmar.jsonl
    iemocap IEMOCAP_full_release IEMOCAP_full_release/session5.jsonl --split test
    voicebench voicebench/mmsu voicebench/mmsu.jsonl
    gsm8k gsm8k/main gsm8k.jsonl --split test                      # text only: then prepare.speak
    numinamath NuminaMath-CoT/data numina.jsonl --split train --numeric --limit 100000

Write OUT.jsonl beside the folder of the clips or above it: a manifest may only name audio in its
own folder, links resolved. Clips that lie inside a parquet file are written out, to OUT_audio/.
Rows stream through, so 1.2 million need no more memory than a thousand (but 100 bytes each, to
know the ids); a JSON list alone is read whole. A row that cannot be used is dropped, and the
report says how many, why, and where the first ones stand; what is left is read back by data.py's
own parser before it is written. Parquet needs `pip install pyarrow`.

Where a format leaves something open, and what we do:
1. CoTA's columns are audio, user and assistant, as its public readers have them; we never saw its
   files. Usual exports are recognised, too (messages, conversations, query and response,
   instruction and output); where it is not clear which column is which we stop, list the columns,
   and ask for --columns. A trace must have each of its parts once, closed. A broken shard is
   passed over, and named at the end.
2. CoTA's choices stand in the question's text: "A. gold", "(b) silver", "Choices: [...]". They
   become choices if letters run from A without a gap and the response names one; otherwise the
   question stays as it is, open. Its task comes from a column that says sound, music or speech;
   else from --task; else from the configuration, the folder or file that the shard is called by,
   as the table CONFIGURATIONS has it; else from the clip's path (words, or corpora that CoTA is
   made of); else it is the configuration's own name; a row without any is dropped.
3. An audio path of somebody else's machine ("/data/x/meld/1.wav") is looked for under --audio-root
   by its longest ending that is there.
4. AVQA asks about videos; as in R1-AQA's own loader "video" becomes "audio".
5. VoiceBench speaks question and options, and nothing else is to be read: question and choices are
   empty, the transcript is the whole prompt, the answer is the letter. evaluate.py finds the
   choices in the transcript again, so its numbers are VoiceBench's own.
6. Mathematics keeps what can be checked: no proofs, no answers of several parts, no drawings.
   --numeric keeps answers that are one number. Beside the spoken problem both views read one line,
   ANSWER_LINE, so that an answer can be found; --no-answer-line leaves it out. Of GSM8K all 1,319
   are kept.
7. An id that was used before gets its row's number appended; nothing is lost.
"""

import argparse
import ast
import hashlib
import io
import json
import os
import re
import shutil
import string
from collections import Counter
from functools import cache
from pathlib import Path

import soundfile
from tqdm import tqdm

import data
import judge
from data import DataError
from plumbing import manifest

# CoTA's configurations -> the task that their questions are reported by: four that its readers
# name, then corpora that it is made of. "meld_train" counts as meld. Any other is a task of its
# own; add what you find.
CONFIGURATIONS = {
    "complex_audio": "mix",
    "meld": "speech",
    "S2TT": "speech",
    "audiocap": "sound",
    "covost": "speech",
    "mustard": "speech",
    "multi_speaker": "speech",
    "librispeech": "speech",
    "audioset": "sound",
    "clotho": "sound",
    "avqa": "sound",
    "musicbench": "music",
}
ANSWER_LINE = "Put the final answer in \\boxed{}."  # a form that judge.py reads

# ------------------------------------------------------------------------------------------------
# 1. rows, one at a time

SPLITS = ("train", "validation", "valid", "dev", "test")


def choose_files(source: Path, splits) -> dict:
    """A file, or the parquet shards of a folder -> {path: its split or None}. The split is what a
    file's name says: "law" of law-00000-of-00001.parquet (as the hub writes them), "test" of
    test.jsonl. splits: files whose name says another are left out. Raises SystemExit where none is
    left."""
    if not source.exists():
        raise SystemExit(f"error: {source}: there is no such file or folder; check the path")
    files = sorted(source.rglob("[!.]*.parquet")) if source.is_dir() else [source]
    if not files:
        raise SystemExit(
            f"error: {source}: the folder holds no .parquet file; give the folder of the shards, or"
            " one JSON, JSONL or parquet file"
        )
    found = {}
    for file in files:
        name = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
        found[file] = name if name != file.stem or name in SPLITS else None
    wanted = {
        file: name for file, name in found.items() if not splits or name is None or name in splits
    }
    if not wanted:
        raise SystemExit(
            f"error: {source}: holds the splits {', '.join(sorted(set(found.values())))}, not"
            f" {', '.join(splits)}; change --split"
        )
    return wanted


def read_rows(files, broken=None):
    """The records of JSONL files, JSON lists and parquet files ({path: split}) -> (where, path,
    split, row). A row is a dict, or the bytes of a line still to be parsed. Raises SystemExit, in
    one sentence, for what cannot be read; of parquet a list `broken` gets the sentence instead."""
    for file, split in files.items():
        try:
            try:
                with open(file, "rb") as start:
                    head = start.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
            except OSError as error:
                raise BrokenFile(f"{file}: cannot be opened ({error}); fetch it again") from None
            rows = jsonl_rows
            if head.startswith(b"PAR1") or file.suffix == ".parquet":
                rows = parquet_rows
            elif head.startswith(b"["):
                rows = list_rows
            for where, row in rows(file):
                yield where, file, split, row
        except BrokenFile as error:
            if broken is None:
                raise SystemExit(f"error: {error}") from None
            broken.append(str(error))


class BrokenFile(Exception):
    """A parquet file that cannot be read to its end, in one sentence."""


@cache
def configuration(file: Path, source: Path):
    """A file of CoTA -> (its task by the table CONFIGURATIONS or None, its configuration or None).
    A shard's configuration is a folder below the source or, without one, the shard's own name, but
    for split and number."""
    folders = file.relative_to(source).parts[:-1] if source.is_dir() else ()
    number = r"(?:(?:^|[-_.])(?:\d+-of-\d+|\d+|part|shard|%s))+$" % "|".join(SPLITS)
    names = [*folders, re.sub(number, "", file.stem)]
    names = [name for name in names if name and name.lower() not in ("data", *SPLITS)]

    def plain(name):
        return re.sub("[^a-z0-9]", "", name.lower())

    for name in (*names, file.parent.name):
        for known, task in CONFIGURATIONS.items():
            if plain(name).startswith(plain(known)):
                return task, name
    return None, names[0] if names and file.suffix == ".parquet" else None


def jsonl_rows(path):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", line


def list_rows(path):
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SystemExit(
            f"error: {path}: breaks off or is not JSON ({error}); fetch it again"
        ) from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def reader_of(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise SystemExit(
            f"error: {path}: parquet is read by pyarrow, which is not installed; pip install"
            " pyarrow"
        ) from None
    return pyarrow


def parquet_rows(path):
    pyarrow, number = reader_of(path), 0
    try:
        # 16 rows at a time, page by page through a buffer of 1 MB: pyarrow's default reads whole
        # row groups ahead, and with clips those are large
        for batch in pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20
        ).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = str(error).partition("\n")[0].rstrip(".")
        raise BrokenFile(
            f"{path}: is not parquet, or broken after row {number} ({what}); fetch it again"
        ) from None


def iemocap_rows(root: Path):
    """IEMOCAP's folders -> rows {"id", "emotion", "audio"}, as read_rows. Session 5 is the test
    split. Raises SystemExit."""
    # "._Ses01F_impro01.txt", a leftover of macOS, is not text
    files = sorted(root.glob("Session[1-5]/dialog/EmoEvaluation/[!.]*.txt"))
    if not files:
        raise SystemExit(
            f"error: {root}: holds no Session1/dialog/EmoEvaluation/*.txt; give the folder that"
            " Session1 to Session5 lie in"
        )
    for file in files:
        session = file.parents[2].name
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            if match := re.match(r"\[[\d.]+ - [\d.]+\]\s+(Ses\w+)\s+(\w+)\s", line):
                utterance, emotion = match.groups()
                wav = f"{session}/sentences/wav/{utterance.rpartition('_')[0]}/{utterance}.wav"
                row = {"id": utterance, "emotion": emotion, "audio": wav}
                yield f"{file}:{number}", file, "test" if session == "Session5" else "train", row


def choose_columns(dataset, given, row) -> dict[str, str]:
    """{our name: the file's name} of the columns that go by another name, judged by the first row.
    given: --columns. Raises SystemExit."""
    _, needed, optional = IMPORTERS[dataset]
    needed = [names.split("/") for names in needed.split()]
    known = [names[0] for names in needed] + optional.split()
    columns, there = {}, f"the file has the columns {', '.join(map(str, row))}"
    for pair in given:
        ours, _, theirs = pair.partition("=")
        if ours not in known:
            raise SystemExit(
                f"error: --columns {pair}: {dataset} knows no column {ours!r}; before the = write"
                f" {', '.join(known) or 'nothing (it has no columns)'}"
            )
        if theirs not in row:
            raise SystemExit(f"error: --columns {pair}: {there}; after the = write one of them")
        columns[ours] = theirs
    for names in needed:
        ours = names[0]
        if ours in columns:
            continue
        found = [name for name in names if name in row]
        if len(found) != 1:
            problem = f"any of {', '.join(found)} may be {ours!r}" if found else f"none is {ours!r}"
            raise SystemExit(
                f"error: {dataset}: {there}, and {problem}; say which with --columns {ours}=NAME"
            )
        columns[ours] = found[0]
    return columns


# ------------------------------------------------------------------------------------------------
# 2. text: choices and answers

# "B", "(b)", "B. "
LETTER = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:](?!\w)|\s*$)\s*")
# The same in the middle of a text
MARK = re.compile(r"(?<!\S)(?:\(([A-Za-z])\)|([A-Za-z])([.):]))\s+(?=\S)")


def texts(choices) -> list[str]:
    """Choices without the letters A, B, C in front, if all have theirs. Raises DataError for
    anything but a list of strings."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError("the choices are no list of texts")
    marks = [LETTER.match(choice) for choice in choices]
    if all(
        mark and mark[0] != choice and mark[1].upper() == chr(65 + i)
        for i, (mark, choice) in enumerate(zip(marks, choices))
    ):
        return [choice[mark.end() :] for mark, choice in zip(marks, choices)]
    return choices


def words(text) -> str:
    return " ".join(re.findall(r"[\w#+/-]+", text.casefold()))


def named(answer, choices):
    """The one choice that an answer is: its text, whatever case and punctuation, with or without a
    letter in front; or its letter; or either of them after the last "answer is". None if it is
    none, or two. Text counts before letter, since choices get shuffled."""
    if not isinstance(answer, str) or answer in choices:
        return answer if answer in choices else None
    answer = answer.replace("**", "").strip()
    letter = LETTER.match(answer)
    rest = words(answer[letter.end() :] if letter else answer)
    for text in (words(answer), rest):
        if found := [choice for choice in choices if text and text == words(choice)]:
            return found[0] if len(found) == 1 else None
    if letter and (index := ord(letter[1].upper()) - 65) < len(choices):
        # "B"; "B. gold, because ..."
        if not rest or f"{rest} ".startswith(f"{words(choices[index])} "):
            return choices[index]
    statement = re.split(r"\banswer\b[^.:\n]{0,30}?(?:\bis\b:?|:)\s*", answer, flags=re.I)[1:]
    if not statement:
        return None
    return named(re.split(r"(?<=\w\w)[.!?](?:\s|$)|\n", statement[-1])[0], choices)


def split_choices(text):
    """A question that holds its choices -> (question, choices); choices [] where it is not beyond
    doubt what they are."""
    if listed := re.search(
        r"\s*\b(?:choices|options)\b[^\[\n]{0,20}(\[[^\]\n]*\])[.\s]*", text, re.I
    ):
        try:
            choices = ast.literal_eval(listed[1])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text, []
        head, tail = text[: listed.start()], text[listed.end() :]
    else:
        marks = list(MARK.finditer(text))
        letters = "".join(mark[1] or mark[2] for mark in marks)
        # "choose from A. or B." may go before the list itself
        start = max(letters.rfind("A"), letters.rfind("a"), 0)
        marks, letters = marks[start:], letters[start:]
        count = len(letters)
        head = text[: marks[0].start()] if marks else ""
        # A list's letters run from A in one style, and it begins after the end of a sentence or on
        # a line of its own
        if (
            not letters
            or letters not in (string.ascii_uppercase[:count], string.ascii_lowercase[:count])
            or len({mark[3] for mark in marks}) > 1
            or not re.search(r"[?.:!\n]\s*$", head)
        ):
            return text, []
        ends = [*(mark.start() for mark in marks[1:]), (text + "\n").index("\n", marks[-1].end())]
        choices = [
            re.sub(r"[,;]?(?:\s+(?:or|and))?$", "", text[mark.end() : end].strip())
            for mark, end in zip(marks, ends)
        ]
        # "... B. silver. Answer with the letter.": where does B end?
        if re.search(r"[.?!]\s", choices[-1]) and head.rstrip(" \t")[-1:] != "\n":
            return text, []
        head = re.sub(r"\b(?:choices|options)(?:\s+are)?\s*:?\s*$", "", head, flags=re.I)
        tail = text[ends[-1] :]
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= 26
        or not all(isinstance(choice, str) for choice in choices)
        or len({choice.strip() for choice in choices} - {""}) < len(choices)
        or "\n" in "".join(choices)
    ):
        return text, []
    return "\n".join(part for part in (head.strip(), tail.strip()) if part), choices


def boxes(text) -> list[str]:
    """What stands in each \\boxed{...}, braces matched; unclosed ones are none."""
    found = []
    for start in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, start.end()
        while depth and end < len(text):
            depth, end = depth + {"{": 1, "}": -1}.get(text[end], 0), end + 1
        if not depth:
            found.append(text[start.end() : end - 1].strip())
    return found


# ------------------------------------------------------------------------------------------------
# 3. one row -> one line of a manifest
# Each takes a row under our column names, and the flags; it returns the line, with "audio" as it
# stands in the row, or raises DataError with the reason to drop it.

KINDS = {
    "sound": r"sound|audiocaps|audioset|clotho|\bavqa",
    "music": r"music",
    "speech": r"speech|speaker|covost|\bmeld\b|librispeech",
}


def kind_of(text):
    """The one kind of sound that a text speaks of, or None."""
    found = [kind for kind, names in KINDS.items() if re.search(names, str(text), re.I)]
    return found[0] if len(found) == 1 else None


def cota(row, args):
    # a text, or a chat of one question and one answer
    def turn(value, *roles):
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict)]
            said = [
                turn.get("content", turn.get("value"))
                for turn in turns
                if turn.get("role", turn.get("from")) in roles
            ]
            value = said[0] if len(said) == 1 else None
        if not isinstance(value, str):
            raise DataError("not one question and one answer in text")
        return value

    asked, said = turn(row["question"], "user", "human"), turn(row["response"], "assistant", "gpt")
    # Alpaca's layout: the placeholder, or the rest of the question
    if "instruction" in row and isinstance(row.get("input"), str):
        asked = f"{asked}\n{row['input']}"
    asked = re.sub(r"\s*<audio>\s*", "\n", asked).strip()
    reasoning = {}
    # Stricter than parse_response, which forgives a model an open tag
    for part in (*data.STAGES, "response"):
        found = re.findall(f"<{part}>(.*?)</{part}>", said, re.I | re.S)
        if len(found) != 1 or not found[0].strip() or re.search(data.TAG, found[0], re.I):
            raise DataError(
                f"the trace has not exactly one <{part.upper()}> that is closed and filled"
            )
        reasoning[part] = found[0].strip()
    answer = reasoning.pop("response")
    if row.get("choices"):
        question, choices = asked, texts(row["choices"])
        if (chosen := named(answer, choices)) is None:
            raise DataError("the response names none of the choices")
    else:
        question, choices = split_choices(asked)
        chosen = named(answer, choices)
    if chosen is None:
        question, choices, chosen = asked, [], answer
    clip = row["audio"][0] if isinstance(row["audio"], list) and row["audio"] else row["audio"]
    path = clip.get("path") if isinstance(clip, dict) else clip
    known, name = row["configuration"]
    task = kind_of(row.get("task")) or args.task or known or kind_of(path) or name
    if task is None:
        raise DataError(
            "neither a column nor the path says whether it is sound, music or speech (--task)"
        )
    return {
        "audio": row["audio"],
        "question": question,
        "choices": choices,
        "answer": chosen,
        "task": task,
        "reasoning": reasoning,
    }


def avqa(row, args):
    choices = texts(row["multi_choice"])
    answer, question = row["answer"], row["question_text"]
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError("the answer is not the index of a choice")
    question = re.sub(r"\bvideo\b", "audio", question) if isinstance(question, str) else question
    return {
        "audio": row["audio_path"],
        "question": question,
        "choices": choices,
        "answer": choices[answer],
        "task": "sound",
    }


def mathematics(problem, gold, args):
    """A spoken question that nobody has spoken yet: a line without audio."""
    if not isinstance(problem, str) or not problem.strip():
        raise DataError("the problem is empty")
    if re.search(r"\[asy\]|!\[|\\includegraphics", problem):
        raise DataError("the problem has a drawing, which cannot be spoken")
    if not gold:
        raise DataError("no answer after #### or in \\boxed{}")
    # 1,000 is one number, (1, 2) is two
    bare = re.sub(r"\\[,!;$%]|[$%]|(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", gold)
    if re.search(r"[,;&]|\\\\|\\quad|\b(?:and|or)\b", bare):
        raise DataError("the answer has several parts")
    # 12\ 345
    bare = re.sub(r"(?<=\d)\\ (?=\d{3}(?!\d))", "", bare)
    # Units; a space stays: "10 h 30 min" is two
    bare = re.sub(
        r"\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?[23]\}?)?|\^\{?\\circ\}?|\\ ", " ", bare
    )
    bare = " ".join(re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r" \1/\2", bare).split())
    if args.numeric and not re.fullmatch(
        r"-?\s?(?:\d+(?:\.\d+)?|\.\d+)(?:/\d+)?|-?\s?\d+ \d+/\d+", bare
    ):
        raise DataError("the answer is not one number (--numeric)")
    return {
        "question": "" if args.no_answer_line else ANSWER_LINE,  # beside the words, in both views
        "choices": [],
        "answer": gold,
        "task": "math",
        "transcript": problem.strip(),
    }


def numinamath(row, args):
    found = boxes(row["solution"]) if isinstance(row["solution"], str) else []
    if len(set(found)) > 1:
        raise DataError("the answer has several parts")
    if re.search(r"\bprove\b|\bshow that\b", str(row["problem"]), re.I):
        raise DataError("a proof is asked for")
    return mathematics(row["problem"], found[-1] if found else None, args) | {
        "sub-category": row.get("source")
    }


def gsm8k(row, args):
    _, mark, gold = str(row["answer"]).rpartition("####")
    return mathematics(row["question"], gold.strip() if mark else None, args)


def mmau(row, args):
    leak = str(row.get("dataset")).upper() == "IEMOCAP"
    return benchmark(row) | {
        "audio": row["audio_id"],
        "task": row["task"],
        "difficulty": row.get("difficulty"),
        "leak": "IEMOCAP" if leak else None,
    }


def mmar(row, args):
    modality = str(row["modality"])
    if modality not in KINDS and not modality.startswith("mix"):
        raise DataError("the modality is neither sound, music, speech nor a mix")
    if isinstance(row["choices"], list):  # some lists hold an empty text
        choices = [choice for choice in row["choices"] if str(choice).strip()]
        row = {**row, "choices": choices}
    return benchmark(row) | {
        "audio": row["audio_path"],
        "task": modality if modality in KINDS else "mix",
    }


def benchmark(row):
    choices = texts(row["choices"])
    if (answer := named(row["answer"], choices)) is None:
        raise DataError("the answer is none of the choices")
    return {
        "question": row["question"],
        "choices": choices,
        "answer": answer,
        "sub-category": row.get("sub-category"),
    }


# The usual four classes: excited is happy
EMOTIONS = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}


def iemocap(row, args):
    if row["emotion"] not in EMOTIONS:
        raise DataError(f"the emotion {row['emotion']} is none of the four classes")
    # Ses01F_impro01_M000: session 1's man. The F says whose motion was captured, the last part who
    # speaks.
    speaker = row["id"][:5] + row["id"].rpartition("_")[2][0]
    return {
        "audio": row["audio"],
        "question": "Which emotion does the speaker show?",
        "choices": ["angry", "happy", "sad", "neutral"],
        "answer": EMOTIONS[row["emotion"]],
        "task": "emotion",
        "speaker": speaker,
    }


def voicebench(row, args):
    prompt, letter = row["prompt"], str(row.get("reference")).strip()
    if not re.fullmatch("[A-Z]", letter):
        raise DataError("the reference is no letter, as it is in openbookqa and mmsu")
    if not isinstance(prompt, str) or ord(letter) - 65 >= len(judge.spoken_choices(prompt)):
        raise DataError(
            "the prompt lists no choices A., B., ..., or none with the reference's letter"
        )
    return {
        "audio": row["audio"],
        "question": "",
        "choices": [],
        "answer": letter,
        "task": "speech",
        "transcript": prompt,
        # Mmsu's domain: the audio-text gap is reported by it
        "sub-category": None if row["split"] == "test" else row["split"],
    }


# name -> (function, columns it needs, each with the other names that it goes by, columns that it
# takes if there are any)
IMPORTERS = {
    "cota": (
        cota,
        "question/user/query/prompt/instruction/messages/conversations"
        " response/assistant/answer/output/completion/messages/conversations"
        " audio/audios/audio_path/wav",
        "id task choices split",
    ),
    "avqa": (avqa, "question_text multi_choice answer audio_path", "id split"),
    "numinamath": (numinamath, "problem solution", "id source split"),
    "gsm8k": (gsm8k, "question answer", "id split"),
    "mmau": (
        mmau,
        "audio_id question choices answer task",
        "id dataset split sub-category difficulty",
    ),
    "mmar": (mmar, "audio_path question choices answer modality", "id split sub-category"),
    "iemocap": (iemocap, "", ""),
    "voicebench": (voicebench, "audio prompt", "id reference split"),
}
TEXT_ONLY = ("numinamath", "gsm8k")


# ------------------------------------------------------------------------------------------------
# 4. audio

SUFFIXES = {"WAV": ".wav", "WAVEX": ".wav", "FLAC": ".flac", "OGG": ".ogg", "MP3": ".mp3"}


def locate_audio(value, new: Path, root: Path, folder: Path):
    """A row's clip -> (absolute path, bytes still to be written there or None).

    value: a path, {"bytes", "path"}, or a list of one of these. new: where bytes shall go, without
    suffix. root: what paths are relative to. folder: the manifest's. Raises DataError; SystemExit
    where the manifest could name no clip of root."""
    if isinstance(value, list):
        if len(value) > 1:
            raise DataError("several clips, and a line of a manifest takes one")
        value = value[0] if value else None
    if not isinstance(value, dict):
        value = {"path": value}
    content, path = value.get("bytes"), value.get("path")
    if content:
        try:
            suffix = SUFFIXES[soundfile.info(io.BytesIO(content)).format]
            return new.with_name(new.name + suffix), content
        except (RuntimeError, TypeError, KeyError):
            raise DataError("the bytes of the clip are no WAV, FLAC, OGG or MP3") from None
    if not isinstance(path, str) or not path.strip():
        raise DataError("no audio, neither bytes nor a path")
    try:
        parts = Path(path).parts
        # The whole path first; an absolute one is itself
        endings = (root.joinpath(*parts[i:]) for i in range(len(parts)))
        path = next((ending for ending in endings if ending.is_file()), root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"the audio path cannot be used ({error})") from None
    if not path.is_relative_to(folder) and not root.is_relative_to(folder):
        raise SystemExit(
            f"error: {folder}: a manifest here may only name audio in this folder, but clips are"
            f" looked for in {root}; write OUT.jsonl into that folder or one above it, or name the"
            " right one with --audio-root"
        )
    return path, None


# ------------------------------------------------------------------------------------------------
# 5. all of it


def note(table, reason, where):
    """table: reason -> [count, first places]. Bounded, whatever the reasons hold."""
    if reason not in table and len(table) >= 50:
        reason = "other reasons"
    entry = table.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < 3:
        entry[1].append(where)


def reason_of(error):
    """A DataError's sentence without what differs from row to row: place, remedy, path, details in
    brackets (but not our flags), seconds."""
    reason = str(error).removeprefix("row: ").partition("; ")[0]
    reason = re.sub(
        r"^(the (?:audio path|audio file|text)) .+?"
        r" (?=(?:leaves|contains|cannot|does|is|lasts|claims) )",
        r"\1 ",
        reason,
    )
    return re.sub(r"lasts [\d.]+ s, ", "is ", re.sub(r" \((?!--).*\)", "", reason))


def import_row(row, split, number, args, folder, root, ids):
    """A row as it stands in the file -> (its line of the manifest, path of the clip or None, bytes
    still to be written there or None). number: of the row; ids: those so far. Raises
    DataError with the reason to drop it."""
    row = {**row, "split": row.get("split") or split}
    if args.split and row["split"] not in args.split:
        raise DataError("of another split (--split)")
    line = IMPORTERS[args.dataset][0](row, args)
    name = str(row["id"])
    if row["id"] in (None, ""):
        name = f"{args.dataset}-{row['split'] or Path(args.source).stem}-{number}"
    if name in ids:
        name = f"{name}-{number}"
    line, path, content = {"id": name, **line, "split": row["split"]}, None, None
    if args.dataset not in TEXT_ONLY:
        safe = f"{number:07d}-" + re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
        path, content = locate_audio(
            line["audio"], folder / f"{Path(args.out).stem}_audio" / safe, root, folder
        )
        line["audio"] = os.path.relpath(path, folder)
    line = {key: value for key, value in line.items() if value is not None}
    try:
        # what read_manifest would say; a line without audio is judged as if it had been spoken
        manifest.parse_line(json.dumps({"audio": "spoken.wav", **line}).encode(), "row", folder)
    except TypeError as error:
        raise DataError(f"a column holds what is no text ({error})") from None
    return line, path, content


def convert(args):
    """Imports args.source and writes args.out, complete or not at all. -> (Counter of (task,
    split), rows read, what was dropped and what else to know, both as in note(), sentences about
    broken shards). Raises SystemExit, in one sentence, where nothing can be imported."""
    source, out = Path(args.source), Path(args.out)
    if out.is_dir() or source.exists() and out.resolve() == source.resolve():
        raise SystemExit(
            f"error: {out}: is a folder or the source itself; name a new file for the manifest"
        )
    root = Path(args.audio_root or (source if source.is_dir() else source.parent)).resolve()
    folder = out.parent.resolve()
    if args.audio_root and not root.is_dir():
        raise SystemExit(f"error: {root}: there is no such folder of clips; check --audio-root")
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{out}.part")
    columns, read = None, 0
    ids, counts = set(), Counter()
    dropped, notes, broken = {}, {}, []
    if args.dataset == "iemocap":
        rows = iemocap_rows(source)
    else:
        files = choose_files(source, args.split)
        # a training set can do without a shard, a benchmark cannot
        rows = read_rows(files, broken if args.dataset == "cota" else None)
        if args.dataset not in TEXT_ONLY:
            say_disk([file for file in files if file.suffix == ".parquet"], out)
    try:
        with open(partial, "wb") as file:
            rows = tqdm(rows, desc=args.dataset, unit=" rows", mininterval=1)
            for where, shard, split, row in rows:
                read, content = read + 1, None
                try:
                    row = parse_row(row)
                    if columns is None:
                        columns = choose_columns(args.dataset, args.columns, row)
                    row |= {ours: row.get(theirs) for ours, theirs in columns.items()}
                    row.setdefault("id", None)
                    if args.dataset == "cota":
                        row["configuration"] = configuration(shard, source)
                    line, path, content = import_row(row, split, read, args, folder, root, ids)
                    if content:
                        path.parent.mkdir(exist_ok=True)
                        path.write_bytes(content)
                    if path and (args.check_audio or args.max_seconds):
                        data.audio_seconds(path, where="row", max_seconds=args.max_seconds)
                except DataError as error:
                    if content:
                        path.unlink()
                    note(dropped, reason_of(error), where)
                    continue
                file.write(json.dumps(line).encode() + b"\n")
                ids.add(line["id"])
                counts[line["task"], line.get("split")] += 1
                if row["id"] not in (None, "") and str(row["id"]) != line["id"]:
                    note(notes, "ids that were used before: the row's number was appended", where)
                if "leak" in line:
                    note(notes, "clips of IEMOCAP: a leak, if you train on IEMOCAP", where)
                if path and not path.is_file():
                    note(notes, "clips that are not there yet (--check-audio drops them)", where)
                if sum(counts.values()) == args.limit:
                    break
        if not read and broken:
            raise SystemExit(f"error: none of the shards can be read; {broken[0]}")
        if not read:
            raise SystemExit(f"error: {source}: holds no rows; fetch it again, or check the path")
        if counts:
            os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return counts, read, dropped, notes, broken


def say_disk(shards, out):
    """Before anything is written: how much disk the clips inside parquet files will take. By their
    footers, columns called NAME.bytes."""
    size, free = 0, shutil.disk_usage(out.parent).free
    for shard in shards:
        pyarrow = reader_of(shard)
        try:
            footer = pyarrow.parquet.read_metadata(shard).to_dict()
        except (pyarrow.ArrowException, OSError):
            continue  # broken: read_rows says so
        for group in footer["row_groups"]:
            for column in group["columns"]:
                if column["path_in_schema"].endswith(".bytes"):
                    size += column["total_uncompressed_size"]
    if size:
        print(
            f"{out.stem}_audio/ will take about {size / 1e9:.3g} GB, for all clips inside "
            f"{len(shards):,} parquet files; {free / 1e9:.3g} GB are free there",
            flush=True,
        )


def record_source(source, out) -> str:
    """Which file was it? Its hash, into OUT.source.json and as a line of text."""
    with open(source, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"source": source.name, "bytes": source.stat().st_size, "sha256": sha256}
    out.with_suffix(".source.json").write_text(json.dumps(record, indent=1) + "\n")
    return f"{source}: sha256 {sha256} (MMAU was revised in 2025: compare scores on one file)"


def parse_row(row) -> dict:
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):
        raise DataError("the line is not JSON") from None
    if not isinstance(row, dict):
        raise DataError("the row is no JSON object")
    return row


def report(args, counts, read, dropped, notes, broken) -> str:
    """The counts by task and split, and what was dropped and why, as text."""
    kept = sum(counts.values())
    lines = [
        f"{args.out}: {kept:,} of {read:,} rows were imported",
        f"    {'task':12}{'split':16}{'count':>10}",
    ]
    for (task, split), count in sorted(counts.items(), key=str):
        lines.append(f"    {task:12}{split or '-':16}{count:10,}")
    for title, table in (("dropped:", dropped), ("to know:", notes)):
        if table:
            lines.append(title)
        for reason, (count, places) in sorted(table.items(), key=lambda item: -item[1][0]):
            more = ", ..." if count > 3 else ""
            lines.append(f"{count:10,}  {reason}   [{', '.join(places)}{more}]")
    lines += [f"broken, the rest of it is lost: {sentence}" for sentence in broken]
    if args.dataset == "iemocap":
        lines.append(
            "the complete corpus has 5,531 utterances of the four classes, 1,241 of them in"
            f" session 5 (split test); here {kept:,} and {counts['emotion', 'test']:,}"
        )
    if args.dataset in TEXT_ONLY and counts:
        lines.append(
            "nobody has spoken these yet, and until then data.py refuses the file: python -m"
            f" prepare.speak {args.out} SPOKEN.jsonl adds the audio"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", choices=IMPORTERS)
    add(
        "source",
        metavar="SOURCE",
        help="a JSON, JSONL or parquet file, or a folder of shards; iemocap: of Session1 to 5",
    )
    add(
        "out", metavar="OUT.jsonl", help="the manifest; beside the folder of the clips, or above it"
    )
    add(
        "--audio-root",
        metavar="DIR",
        help="the folder that audio paths are relative to; default: SOURCE's own",
    )
    add(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="which column is which, where the file has names of its own",
    )
    add(
        "--split",
        nargs="+",
        metavar="NAME",
        help="only these splits, by the column or the file's name",
    )
    add("--limit", type=int, metavar="N", help="stop after N lines")
    add(
        "--check-audio",
        action="store_true",
        help="drop clips that are missing or cannot be decoded (slow over a network)",
    )
    add(
        "--max-seconds",
        type=float,
        metavar="S",
        help="drop longer clips, too, in seconds (Qwen2-Audio's window: 30)",
    )
    add("--task", choices=KINDS, help="cota: the task of rows whose column does not say it")
    add(
        "--numeric",
        action="store_true",
        help="numinamath, gsm8k: only answers that are one number, for the rule that judges",
    )
    add(
        "--no-answer-line",
        action="store_true",
        help=f"numinamath, gsm8k: without the written line {ANSWER_LINE!r}",
    )
    args = parser.parse_args(argv)
    heard = [name for name in IMPORTERS if name not in TEXT_ONLY]
    takers = {"task": ["cota"], "numeric": TEXT_ONLY, "no_answer_line": TEXT_ONLY}
    takers |= dict.fromkeys(("audio_root", "check_audio", "max_seconds"), heard)
    for flag, datasets in takers.items():
        if getattr(args, flag) and args.dataset not in datasets:
            known = " and ".join(datasets)
            parser.error(f"--{flag.replace('_', '-')} is for {known}, not for {args.dataset}")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    counts, read, dropped, notes, broken = convert(args)
    print(report(args, counts, read, dropped, notes, broken))
    if args.dataset == "mmau" and counts and Path(args.source).is_file():
        print(record_source(Path(args.source), Path(args.out)))
    if not counts:
        most = max(dropped, key=lambda reason: dropped[reason][0])
        raise SystemExit(
            f"error: {args.source}: all {read:,} rows were dropped, most because of: {most};"
            " nothing was written"
        )


if __name__ == "__main__":
    main()
