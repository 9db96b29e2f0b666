"""
One example, two views, one response.

Both papers train what a model says after HEARING a clip towards what a model says after READING words for that clip, token
by token of the same response. This file makes the two inputs line up:

    audio view   | prompt: <audio> x N + question |  y1   y2   ...  yn  <turn end> |  pad
                                                ^    ^    ^         ^
    text view    | prompt: words + question |  y1   y2   ...  yn  <turn end> |  pad  pad
                                            ^    ^    ^         ^
                   ^ = predict_positions: the logits that PREDICT a token sit one position before it

The response is tokenised once, by the student's tokenizer, and the same ids are appended to both prompts. Gathering each model's output at
its `predict_positions` gives two [tokens, ...] matrices whose row k is about the same token: what every loss here works on. A shift by one
would train without an error and teach nonsense, so tests/test_data.py plants it.

Examples come from a manifest: JSONL, one object per line,

    {"id": "s1", "audio": "clips/s1.flac", "question": "What is asked?", "choices": ["four", "five"], "answer": "five", "task": "speech",
     "reasoning": {"planning": "..", "caption": "..", "reasoning": "..", "summary": ".."},                               # optional
     "description": "words for the audio (paper A)", "transcript": "its words (CORD)", "speaker": "..", "split": "train"}   # optional

Find every fault of one and of its clips, which are decoded from end to end, and see its durations and token lengths:

    python data.py check runs/world/train.jsonl --student mini/student --max-seconds 30
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import string
import struct
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import jinja2
import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

SAMPLE_RATE = 16_000
MIN_SAMPLES = 321                       # fewer give zero audio tokens in Qwen2-Audio and Qwen2.5-Omni, silently
SILENT = 1e-4                           # of full scale: what stays within +-SILENT of some level, three steps of 16 bits, nobody hears
BLOCK = 2**18                           # samples decoded at a time, all channels together: no clip is too long for the memory
TEXT_LIMIT, LINE_LIMIT = 100_000, 4_000_000     # characters in any text, bytes in a manifest's line: beyond is no question, but a file in a field
STAGES = ("planning", "caption", "reasoning", "summary")       # CoTA's four stages of a reasoning trace
TAG = r"</?(?:THINK|PLANNING|CAPTION|REASONING|SUMMARY|RESPONSE)>"


class DataError(ValueError):
    """Bad data, in one sentence: where (file:line), what, and what to do about it."""


# ------------------------------------------------------------ 1. manifests ------------------------------------------------------------

@dataclass
class Example:
    id: str
    audio: Path                         # absolute
    question: str                       # may be empty where the audio itself asks
    choices: list[str]                  # empty: an open question
    answer: str                         # the text of the right choice, not its letter
    task: str                           # "speech", "sound", "music", ...: what results are reported by
    reasoning: dict[str, str] | None = None  # the four STAGES
    description: str | None = None
    transcript: str | None = None
    speaker: str | None = None
    split: str | None = None
    where: str = ""                     # "manifest.jsonl:12", for messages
    kind: str | None = None             # MMAU's "sub-category": the audio-text gap is reported by it


def read_manifest(path, *, require=(), split=None, limit=None, root=None, faults=None) -> list[Example]:
    """Reads a JSONL manifest; the whole file is validated before anything is returned. Unknown keys are ignored.

    require: optional fields that every returned example must have, e.g. ("reasoning", "description"). split, limit: which and how many.
    Audio paths are relative to the manifest's folder and must stay inside it, links resolved, or inside `root` where one is given.
    Raises DataError at the first bad line, or, with a list of `faults`, leaves bad lines out and adds a sentence for each; and where no example is left."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such manifest; check the path")
    folders = [Path(folder).resolve() for folder in (path.parent, root) if folder is not None]
    examples, kept, seen, before = [], [], {}, len(faults or ())
    for number, line in _lines(path):
        try:
            example = parse_line(line, f"{path}:{number}", folders)
            _claim_id(example, seen)
            examples.append(example)
        except DataError as error:
            _refuse(error, faults)
    chosen = [example for example in examples if split is None or example.split == split][:limit]
    for example in chosen:
        if lacks := [name for name in require if not str(getattr(example, name) or "").strip()]:
            _refuse(f"{example.where}: {lacks[0]!r} is missing or empty and is needed here; add it to the line", faults)
        else:
            kept.append(example)
    if examples and not chosen:
        found = sorted({str(example.split) for example in examples})
        raise DataError(f"{path}: no example is left for split {split!r} and limit {limit}; the file has the splits {', '.join(found)}")
    if not kept and len(faults or ()) > before:
        raise DataError(f"{path}: no example is left beside {len(faults) - before:,} with faults, the first being {_brief(faults[before])}; correct them")
    if not kept:
        raise DataError(f"{path}: the manifest is empty; write one JSON object per line")
    return kept


def read_manifests(paths, **how) -> list[Example]:
    """Several manifests behind each other; `how` as in read_manifest. An id that two of them use is a fault of the later."""
    examples, seen = [], {}
    for example in (example for path in paths for example in read_manifest(path, **how)):
        try:
            _claim_id(example, seen)
            examples.append(example)
        except DataError as error:
            _refuse(error, how.get("faults"))
    return examples


def _lines(path):
    # (number, bytes) of each line that is not blank; of a huge one the first LINE_LIMIT bytes and one more, so that a file without line ends is not held
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = rest = file.readline(LINE_LIMIT + 1)
            while len(rest) > LINE_LIMIT and not rest.endswith(b"\n"):
                rest = file.readline(LINE_LIMIT + 1)
            if not line:
                return
            if line.strip():
                yield number, line


def _claim_id(example, seen):
    if example.id in seen:
        raise DataError(f"{example.where}: id {_short(example.id)} was already used at {seen[example.id]}; give every example its own id")
    seen[example.id] = example.where


def _refuse(sentence, faults):
    # a fault stops everything, unless somebody collects them
    if faults is None:
        raise DataError(sentence) from None
    faults.append(str(sentence))


def _brief(fault):
    return fault.rpartition("; ")[0] or fault                       # without what to do about it


def _short(value):
    return value if len(value := repr(value)) < 200 else f"{value[:150]} ... ({len(value):,} characters)"


def tolerate(faults, most):
    """Raises DataError where there are more than `most` of the faults that were collected; what has them was left out."""
    if len(faults) > most:
        few = " | ".join(map(_brief, faults[:3])) + " | ..." * (len(faults) > 3)
        raise DataError(f"{len(faults):,} {'examples have' if len(faults) > 1 else 'example has'} faults, and {most:,} may be left out: {few}; see them all by "
                        f"python data.py check FILE and correct them, or leave them out by --skip-bad {len(faults)}")


def fingerprint(examples) -> str:
    """The same for the same questions, to tell whether an evaluation is about these."""
    return hashlib.sha256(repr([(e.id, str(e.audio), e.question, e.choices, e.answer, e.transcript) for e in examples]).encode()).hexdigest()[:16]


def parse_line(line: bytes, where: str, folders: list[Path]) -> Example:
    """One line of a manifest -> Example. where: "manifest.jsonl:12", for messages. folders: the manifest's own, resolved, and further ones that audio may
    lie in. Raises DataError."""
    if len(line) > LINE_LIMIT:
        raise DataError(f"{where}: the line is longer than {LINE_LIMIT:,} bytes; write one JSON object per line, with the audio in a file of its own")
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()             # half a surrogate pair parses, but no tokenizer takes it
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the line is not JSON ({error}); write one JSON object per line in UTF-8") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: the line holds a {type(record).__name__}, not an object; write {{\"id\": ...}}")

    def text(name, holder=record, *, optional=False, blank=False):
        value = holder.get(name)
        if value is None and optional:
            return None
        if name not in holder:
            raise DataError(f"{where}: the field {name!r} is missing; add it to the line")
        if value is None:
            raise DataError(f"{where}: the field {name!r} is null; fill it in or remove the line")
        if not isinstance(value, str):
            raise DataError(f"{where}: the field {name!r} must be a string, not {type(value).__name__}; put it in quotes")
        if not blank and not value.strip():
            raise DataError(f"{where}: the field {name!r} is empty; fill it in or remove the line")
        return sound(value, f"the field {name!r}")

    def sound(value, what):
        if "\0" in value:
            raise DataError(f"{where}: {what} holds a NUL character; remove it, and look where the text was read from")
        if len(value) > TEXT_LIMIT:
            raise DataError(f"{where}: {what} has {len(value):,} characters, over the limit of {TEXT_LIMIT:,} for a text; shorten it or remove the line")
        return value

    choices, reasoning = record.get("choices"), record.get("reasoning")
    choices = [] if choices is None else choices
    if not isinstance(choices, list) or len(choices) > 26 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{where}: 'choices' must be a list of at most 26 non-empty strings; write [] for an open question")
    choices = [sound(choice, "a choice") for choice in choices]
    if choices and text("answer") not in choices:
        raise DataError(f"{where}: the answer {_short(text('answer'))} is not among the choices {_short(choices)}; write the text of one choice")
    if reasoning is not None:
        if not isinstance(reasoning, dict):
            raise DataError(f"{where}: 'reasoning' must be an object with the keys {', '.join(STAGES)}; split the trace into its stages")
        reasoning = {stage: text(stage, reasoning) for stage in STAGES}
    example = Example(
        text("id"), _inside(text("audio"), folders, where), text("question", blank=True), choices, text("answer"), text("task"), reasoning,
        *(text(name, optional=True, blank=True) for name in ("description", "transcript", "speaker", "split")), where,
        text("sub-category", optional=True, blank=True))
    for part in (example.answer, *(example.reasoning or {}).values()):
        if tag := re.search(TAG, part, re.IGNORECASE):
            raise DataError(f"{where}: the text {part[:60]!r} contains the tag {tag[0]}, which marks the response's parts; remove the tag")
    return example


def _inside(name: str, folders: list[Path], where: str) -> Path:
    # resolve() follows links first, so that neither "..", nor an absolute path, nor a link can read a file from elsewhere
    try:
        if len(name) > 1_000:
            raise OSError("no file has so long a name")
        path = (folders[0] / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:            # RuntimeError: a circle of links
        raise DataError(f"{where}: the audio path {_short(name)} cannot be used ({_short(str(error))}); correct it") from None
    if not any(path.is_relative_to(folder) for folder in folders):
        raise DataError(f"{where}: the audio path {_short(name)} leaves the folder {folders[-1]}; move it there, or name its folder as root")
    return path


# -------------------------------------------------------------- 2. audio --------------------------------------------------------------

@dataclass
class Clip:
    """What a clip turned out to be when it was decoded."""
    seconds: float
    rate: int
    channels: int
    odd: list[str]                      # what is no fault and worth a look, in sentences


def _open(path, where, max_seconds):
    # soundfile's open file, once its header makes sense, and how its messages begin
    path, clip = Path(path), f"{where}: the audio file {path}" if where else f"the audio file {path}"
    try:
        size = path.stat().st_size if path.is_file() else None
        file = soundfile.SoundFile(path) if size else None
        absent = missing_bytes(path) if size and file.format in ("WAV", "WAVEX", "RF64", "OGG") else 0
    except (RuntimeError, OSError, TypeError, ValueError) as error:     # TypeError: headerless formats, such as .raw
        raise DataError(f"{clip} cannot be decoded ({str(error).rstrip('.')}); convert it to WAV, FLAC, OGG or MP3") from None
    if size is None:
        raise DataError(f"{clip} does not exist; put it there or correct the path")
    if size == 0:
        raise DataError(f"{clip} is empty (0 bytes); make or fetch it again")
    frames, rate = file.frames, file.samplerate
    if absent > 0:
        raise DataError(f"{clip} is cut off ({absent:,} bytes that its header promises are not there); make or fetch it again")
    if not 1_000 <= rate <= 1_000_000 or frames > 2**40:                # a streamed FLAC does not know its length
        raise DataError(f"{clip} claims {frames} samples at {rate} Hz; convert it to a new file")
    if frames == 0:                                                     # of a WAV whose writer was killed, libsndfile reads nothing
        raise DataError(f"{clip} is empty (it holds no samples, or its header does not know how many); make it again, or have ffmpeg copy it to a new file")
    if math.ceil(frames * _ratio(rate)) < MIN_SAMPLES:
        raise DataError(f"{clip} lasts {frames / rate:.3f} s, too short for a single audio token; use at least 0.021 s")
    if max_seconds is not None and frames / rate > max_seconds:
        raise DataError(f"{clip} lasts {frames / rate:.2f} s, over the limit of {max_seconds:g} s; cut it, or raise the limit")
    return file, clip


def _ratio(rate):
    # torchaudio's filter bank has numerator x denominator entries: 44,101 Hz would take gigabytes. A denominator up to 1,000 is exact
    # for every usual rate, and off by about one part in 100,000 at most for odd ones up to 192 kHz.
    return Fraction(SAMPLE_RATE, rate).limit_denominator(1000)


def missing_bytes(path) -> int:
    """How many bytes a WAV's or an OGG's headers promise beyond the file's end: libsndfile shortens such a clip without a word.

    A WAV written to a pipe promises 2 or 4 GiB, more or less, because its writer could not know better: that is none."""
    with open(path, "rb") as file:
        size, kind, wide = os.fstat(file.fileno()).st_size, file.read(12)[:4], None
        if kind == b"OggS":
            file.seek(max(0, size - 2**17))                             # a page has 27 bytes, the lengths of its parts, and these: 65,307 at most
            tail = file.read()
            page = tail[max(0, tail.rfind(b"OggS")):]
            return 27 - len(page) if len(page) < 27 else 27 + page[26] + sum(page[27:27 + page[26]]) - len(page)
        while len(head := file.read(8)) == 8:
            name, promised = struct.unpack(">4sI" if kind == b"RIFX" else "<4sI", head)
            if name == b"data":
                promised = wide if wide and promised == 2**32 - 1 else promised
                absent = promised - (size - file.tell())
                stream = min(abs(promised - 2**31), abs(promised - 2**32)) < 2**13 or promised > 2**40
                return absent if absent > 128 and not stream else 0     # some writers count their own header in
            if name == b"ds64":                                         # RF64: the true size, for more than 4 GiB
                wide = int.from_bytes(file.read(16)[8:], "little")
                promised -= 16
            file.seek(promised + promised % 2, 1)
    return 0


def _knows_length(path):
    # an MP3 without such a tag in its first frame does not say how long it is: libsndfile guesses by the bit rate there, and reads no further
    with open(path, "rb") as file:
        head = file.read(10)
        size = sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:])) if head[:3] == b"ID3" else -10       # its ID3 tag's, 7 bits a byte
        file.seek(10 + size)
        frame = file.read(4096)
    return any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def audio_seconds(path, *, where=None, max_seconds=None) -> float:
    """A clip's duration in seconds, from its header alone. Raises DataError where load_audio would have no chance."""
    with _open(path, where, max_seconds)[0] as file:
        return file.frames / file.samplerate


def decode(path, *, where=None, max_seconds=None, keep=0) -> tuple[np.ndarray, Clip]:
    """A clip's first `keep` seconds [samples], mono (mean of the channels), at its own rate, and what there is to say about it.

    With keep=0 it is decoded from end to end, block by block; otherwise no further than is kept, and than it takes to hear anything.
    Raises DataError for a file that is missing, empty, undecodable, too short for an audio token, over max_seconds, cut off, not finite, or silent."""
    file, clip = _open(path, where, max_seconds)
    rate, frames, channels, form = file.samplerate, file.frames, file.channels, (file.format, file.subtype)
    kept, there, clipped, low, high, loud = [np.zeros(0, np.float32)], 0, 0, [], [], 0.0
    with file:
        while there < frames and not (0 < keep * rate <= there and max(high) - min(low) >= 2 * SILENT):
            try:
                block = file.read(max(1, BLOCK // channels), dtype="float32", always_2d=True)                   # [samples, channels]
            except (RuntimeError, OSError, MemoryError, ValueError) as error:
                raise DataError(f"{clip} breaks off while decoding ({str(error).rstrip('.')}); make or fetch it again") from None
            if not len(block):
                break
            mono = block[:, 0] if channels == 1 else sum(block.T) / channels
            low.append(float(mono.min()))
            high.append(float(mono.max()))                              # of NaN and a number NaN
            if not math.isfinite(high[-1] - low[-1]):
                raise DataError(f"{clip} holds samples that are not finite numbers; make or fetch it again")
            top, bottom = (high[-1], low[-1]) if channels == 1 else (float(block.max()), float(block.min()))
            loud = max(loud, top - bottom)
            if max(top, -bottom) >= 0.9999:                             # three in a row at full scale: a wave just touches it
                full = np.abs(block) >= 0.9999
                clipped += int((full[2:] & full[1:-1] & full[:-2]).sum()) / channels
            if there < keep * rate:
                kept.append(mono)
            there += len(block)
    slack = 2 * 1152 if form[0] == "MP3" else 0                          # some encoders count their own tag as a frame of 1,152
    whole = there >= frames - slack or 0 < keep * rate <= there
    guessed = form[0] == "MP3" and not _knows_length(path)
    if not there or not whole and not guessed:
        raise DataError(f"{clip} is cut off ({there / rate:.2f} s of the {frames / rate:.2f} s that its header promises are there); make or fetch it again")
    if max(high) - min(low) < 2 * SILENT:
        reason = "its channels cancel each other when they are mixed" if loud >= 2 * SILENT else f"its {there / rate:.2f} s are all zeros or next to it"
        raise DataError(f"{clip} is silent ({reason}); make it again, or leave the line out")
    odd = [f"{clip} is clipped ({clipped / there:.0%} of its samples lie in runs at full scale); record it at a lower level"] * (clipped > 0.01 * there)
    odd += [f"{clip} has samples of 8 bits ({form[1]}), whose noise is heard; use its original if there is one"] * (form[1] in ("PCM_U8", "PCM_S8"))
    odd += [f"{clip} is an MP3 that does not say how long it is ({frames / rate:.2f} s is a guess, what lies beyond is not read); convert it to FLAC"] * guessed
    wave = np.concatenate(kept)
    return wave[:math.ceil(keep * rate)] if keep < math.inf else wave, Clip(there / rate, rate, channels, odd)


def load_audio(path, *, where=None, max_seconds=None, cut=math.inf) -> torch.Tensor:
    """Any WAV, FLAC, OGG or MP3 file as a float32 tensor [samples]: 16 kHz, mono (mean of the channels), 1.0 is full scale; its first `cut` seconds.

    Raises DataError for what decode refuses; what comes after `cut` it does not look at."""
    wave, clip = decode(path, where=where, max_seconds=max_seconds, keep=cut)
    wave, ratio = torch.from_numpy(wave), _ratio(clip.rate)
    return wave if clip.rate == SAMPLE_RATE else torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)


def extractor(processor):
    """What makes features of a waveform, by whichever name the processor holds it, or None."""
    return getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)


def longest(processor) -> float:
    """How much of a clip the model hears, in seconds: what is beyond, its feature extractor would cut off without a word. inf: all of it."""
    return getattr(extractor(processor), "n_samples", math.inf) / extractor(processor).sampling_rate


def check_audio(examples, max_seconds=None) -> list[float]:
    """The durations in seconds, from the headers; raises DataError at the first clip whose header shows that training could not use it."""
    return [audio_seconds(example.audio, where=example.where, max_seconds=max_seconds) for example in examples]


def check_clips(examples, max_seconds=None, faults=None) -> tuple[list[Example], list[float]]:
    """Decodes every clip from end to end -> (the examples whose clips are good, their durations in seconds); in every rank the same.

    Raises DataError for the first bad clip, or, with a list of `faults`, leaves bad ones out and adds a sentence for each; and where none is left."""
    kept, before = [], len(faults or ())
    for example, found in zip(examples, decode_all(examples, max_seconds)):
        if isinstance(found, str):
            _refuse(f"{example.where}: {found}", faults)
        else:
            kept.append((example, found.seconds))
    if examples and not kept:
        raise DataError(f"no clip of {len(examples):,} is good, the first fault being {_brief(faults[before])}; correct them")
    return [example for example, _ in kept], [seconds for _, seconds in kept]


def decode_all(examples, max_seconds=None) -> list[Clip | str]:
    """What decode says about each example's clip, or why it refuses it. Each file is decoded once, in threads (libsndfile lets go of Python's lock),
    and under torch.distributed by one rank, which tells the others."""
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    paths = list(dict.fromkeys(example.audio for example in examples))
    mine, few = paths[rank::world], 8                                   # a task is a few clips: one alone would cost more to hand over than to decode

    def some(start):
        said = []
        for path in mine[start:start + few]:
            try:
                said.append(decode(path, max_seconds=max_seconds)[1])
            except DataError as error:
                said.append(str(error))
        return said

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) as pool:
        tasks = range(0, len(mine), few)
        found = list(itertools.chain(*tqdm(pool.map(some, tasks), "decoding clips", len(tasks), leave=False, disable=rank > 0 or None)))
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, found)
        found = [shares[i % world][i // world] for i in range(len(paths))]
    found = dict(zip(paths, found))
    return [found[example.audio] for example in examples]


def about_clips(seconds, processor) -> str:
    """What clips of these durations mean for a model, in a line: what of them it hears, and the memory of one clip's features."""
    window = longest(processor)
    wave = torch.zeros(math.ceil(min(window, max(seconds)) * SAMPLE_RATE))
    features = _audio_inputs(processor, [audio_prompt(processor, "")], [wave.numpy()])[1]
    long, size = sum(s > window for s in seconds), sum(x.nbytes for x in features.values()) / 2**20
    return (f"{len(seconds):,} clips, {sum(seconds) / 3600:.2f} hours, longest {max(seconds):.1f} s; features at most {size:.2f} MiB a clip"
            + f"; {long:,} are longer than the {window:g} s that the model hears and are cut there (--max-seconds refuses them)" * (long > 0))


def corrupt_descriptions(examples, share, seed=0) -> list[Example]:
    """What if the words for the audio were worse? Of every description, `share` of the words go wrong: half of these are dropped, half
    swapped for a word out of another description of the same task (so that some words come back by chance)."""
    by_task = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example.description)
    corrupted = []
    for example in examples:
        rng = random.Random(f"{seed} {example.id}")
        drawn = (rng.choice(by_task[example.task]) for _ in range(20))
        other = next((text for text in drawn if text != example.description), "something").split()
        fate = [(word, rng.random(), rng.choice(other)) for word in example.description.split()]
        kept = [word if luck >= share else swapped for word, luck, swapped in fate if luck >= share / 2]
        corrupted.append(dataclasses.replace(example, description=" ".join(kept or [fate[0][2]])))
    return corrupted


# ---------------------------------------------------------- 3. text and prompts ---------------------------------------------------------

def question_text(example: Example) -> str:
    """The question, then one line per choice: "A. gold"."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, example.choices)]
    return "\n".join([example.question] * bool(example.question) + lines)


def spoken_choices(text) -> list[str]:
    """The choices that a spoken question lists itself, or []: lines "A. gold", "B. silver", ... without a gap; or "... A. gold B. silver C. iron D. tin" in
    one line. VoiceBench's questions do."""
    listed = re.findall(r"^\s*\(?([A-Z])[.):]\s*(\S.*)$", text or "", re.M)
    start = max((i for i, (letter, _) in enumerate(listed) if letter == "A"), default=0)
    if len(listed[start:]) > 1 and "".join(letter for letter, _ in listed[start:]) in string.ascii_uppercase and listed[start][0] == "A":
        return [choice.strip() for _, choice in listed[start:]]
    found = re.search(r".*(?<!\w)A[.):]\s*(.+?)\s+B[.):]\s*(.+?)\s+C[.):]\s*(.+?)\s+D[.):]\s*([^\n]+)", text or "", re.S)
    return [choice.strip() for choice in found.groups()] if found else []


def response_text(example: Example) -> str:
    """The reference response in CoTA's tags, without whitespace between them."""
    answer = f"<RESPONSE>{example.answer}</RESPONSE>"
    if example.reasoning is None:
        return answer
    stages = "".join(f"<{stage.upper()}>{example.reasoning[stage]}</{stage.upper()}>" for stage in STAGES)
    return f"<THINK>{stages}</THINK>{answer}"


def parse_response(text: str) -> dict[str, str | None]:
    """The reverse of response_text for what a model wrote: the stages that are there, and "response" (None when missing).

    Tolerant: tags in any case, text between tags ignored, a part that was never closed ends at the next tag; of a repeated part the first
    counts."""
    parts: dict[str, str | None] = {}
    for name in (*STAGES, "response"):
        if match := re.search(rf"<{name}>(.*?)(?={TAG}|\Z)", text, re.IGNORECASE | re.DOTALL):
            parts[name] = match[1].strip()
    return {**parts, "response": parts.get("response")}


def audio_prompt(processor, question: str) -> str:
    """The audio view's prompt as text: the student's own chat template around one clip and the question.

    Templates that know no parts (Granite Speech's) get the placeholder written into the text. Raises DataError where neither gives exactly one."""
    for content in ([{"type": "audio", "audio": "clip"}, {"type": "text", "text": question}], processor.audio_token + question):
        try:
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        except (TypeError, jinja2.TemplateError):
            continue
        if isinstance(prompt, str) and prompt.count(processor.audio_token) == 1:
            return prompt
    raise DataError(f"the chat template does not put one audio placeholder {processor.audio_token} for one clip; use the template of the model's own "
                    "checkpoint")


def text_prompt(tokenizer, words: str, question: str) -> str:
    """The text view's prompt as text: words for the audio, then the question.

    enable_thinking=False makes Qwen3's template append its empty think block, so that the teacher is asked in training exactly as it is
    scored; other templates ignore it."""
    turns = [{"role": "user", "content": "\n".join(part for part in (words, question) if part)}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def turn_end_id(tokenizer) -> int:
    """The token that closes an assistant's turn, by the chat template (<|im_end|> in Qwen's).

    The first special token behind what was said: some templates put a space or a newline before it.
    Raises DataError where there is none, as in GLM-ASR: nothing would teach to stop."""
    said = "one two three"
    turns = [{"role": "user", "content": "count"}, {"role": "assistant", "content": said}]
    _, found, closing = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)
    special = _special_ids(tokenizer)
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"] if found else []
    for token in ids:
        if token in special:
            return token
    name = tokenizer.name_or_path or "a tokenizer"
    raise DataError(f"the chat template of {name} closes an assistant's turn with no special "
                    "token, so that nothing would say where an answer ends; "
                    "use an instruct model whose template closes its turns")


def _special_ids(tokenizer) -> set[int]:
    named = {index for index in tokenizer.all_special_ids if index is not None}
    added = tokenizer.added_tokens_decoder.items()
    return named | {index for index, token in added if token.special}


def control_ids(tokenizer, size, *, keep=(), placeholder=None) -> list[int]:
    """What a model of `size` output rows must never say: special tokens (placeholders, turn marks)
    but those in `keep`, and rows that are no token at all.

    placeholder: the audio's id, which some tokenizers do not count as special. Sampled, it would
    ask the next forward for audio that is not there."""
    unused = set(range(size)) - set(tokenizer.get_vocab().values())
    banned = (_special_ids(tokenizer) | unused) - set(keep)
    if placeholder is not None:
        banned.add(placeholder)
    return sorted(banned)


def encode_response(tokenizer, text: str) -> list[int]:
    """Ids of the response with the turn's end token, which is trained like any other: without it a model never learns to stop."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [turn_end_id(tokenizer)]


def shared_vocabulary(student_tok, teacher_tok, *, minimum=0.9) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Ids of the tokens that are equal AS STRINGS in both vocabularies: (student_ids [n], teacher_ids [n], summary of counts).

    Ids alone would lie: 151,646 is <|AUDIO|> in Qwen2.5-Omni and <|object_ref_start|> in Qwen3. Raises DataError where less than `minimum`
    of the smaller vocabulary is shared: the teacher then speaks another alphabet and its distribution cannot be copied."""
    student, teacher = student_tok.get_vocab(), teacher_tok.get_vocab()
    shared = sorted((student[token], teacher[token]) for token in student.keys() & teacher.keys())
    at_id = {index: token for token, index in teacher.items()}
    summary = {"shared": len(shared), "only_student": len(student) - len(shared), "only_teacher": len(teacher) - len(shared),
               "same_id_other_meaning": sum(at_id.get(index, token) != token for token, index in student.items())}
    if len(shared) < minimum * min(len(student), len(teacher)):
        raise DataError(f"the teacher's tokenizer ({teacher_tok.name_or_path or 'unnamed'}, {len(teacher)} tokens) shares only "
                        f"{len(shared)} with the student's {len(student)}, under {minimum:.1%} of the smaller; choose one from its family")
    student_ids, teacher_ids = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return student_ids, teacher_ids, summary


def token_map(student_ids, teacher_ids, size):
    """shared_vocabulary's pairs -> [size] int64: the teacher's id of each of the student's `size` tokens, -1 where it has none."""
    return torch.full((size,), -1).scatter(0, student_ids, teacher_ids)


# ------------------------------------------------------------ 4. the two views -----------------------------------------------------------

@dataclass
class View:
    """One batch as one model reads it. Positions index the FLATTENED axis: hidden.flatten(0, 1)[positions] -> [tokens, hidden]."""
    inputs: dict[str, torch.Tensor]     # exactly what model.forward takes; input_ids, position_ids [batch, seq], attention_mask too (but see audio_view)
    predict_positions: torch.Tensor     # [tokens] int64: where the response's tokens are predicted
    audio_positions: torch.Tensor       # [audio tokens] int64: the audio placeholders; empty in a text view

    def to(self, device) -> "View":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return View(inputs, self.predict_positions.to(device), self.audio_positions.to(device))


@dataclass
class Batch:
    audio: View
    text: View
    labels: torch.Tensor                # [tokens] int64: the response's ids, student's numbering, in the order of both predict_positions
    ids: list[str]
    examples: list[Example]

    def to(self, device) -> "Batch":
        return Batch(self.audio.to(device), self.text.to(device), self.labels.to(device), self.ids, self.examples)


def _audio_id(processor) -> int:
    return processor.tokenizer.convert_tokens_to_ids(processor.audio_token)


def _question(example, processor, words=None) -> tuple[str, str]:
    # (words for the audio, question); a placeholder written into either would ask the model for audio that is not there
    said, question = getattr(example, words) if words else "", question_text(example)
    if words and not said:
        raise DataError(f"{example.where}: {words!r} is missing or empty and is needed here; add it to the line")
    placeholder = getattr(processor, "audio_token", None)              # a text LLM's tokenizer may stand in for the processor: it has none
    if placeholder and placeholder in f"{said}\n{question}":
        raise DataError(f"{example.where}: the text contains the audio placeholder {placeholder}; remove it")
    return said, question


def _audio_prompts(examples, processor, max_seconds) -> tuple[list[list[int]], dict]:
    waves = [load_audio(example.audio, where=example.where, max_seconds=max_seconds, cut=longest(processor)).numpy() for example in examples]
    ids, inputs = _audio_inputs(processor, [audio_prompt(processor, _question(example, processor)[1]) for example in examples], waves)
    for example, row in zip(examples, ids):
        if _audio_id(processor) not in row:
            raise DataError(f"{example.where}: the clip {example.audio} gives no audio token; use a longer clip")
    return ids, inputs


def _audio_inputs(processor, prompts, waves) -> tuple[list[list[int]], dict]:
    # -> ids of each prompt, with as many placeholders as its wave [samples] gives; features, one row per wave
    how = {"sampling_rate": SAMPLE_RATE}
    if 30 < longest(processor) < math.inf:
        # Whisper's encoder wants its 30 s and no less. A longer window means that the tower splits a clip by itself, and zeros up to the window's end
        # (Omni: 300 s, 15 MB a clip) are waste. 400 samples behind the longest clip keep its last frames what they are beside a longer one.
        how |= {"padding": "max_length", "max_length": 160 * math.ceil((max(map(len, waves)) + 400) / 160)}
    with torch.autocast("cpu", enabled=False):                         # the spectrogram is not a matter of 16 bits
        inputs = dict(processor(text=prompts, audio=waves, text_kwargs={"add_special_tokens": False, "padding": True}, audio_kwargs=how, return_tensors="pt"))
    mask = inputs.pop("attention_mask").bool()
    ids = [row[keep].tolist() for row, keep in zip(inputs.pop("input_ids"), mask)]       # padding off again: it belongs after the response
    if odd := [name for name, x in inputs.items() if len(x) != len(waves)]:              # rows are picked by example from here on
        raise DataError(f"the processor gives {len(inputs[odd[0]])} rows of {odd[0]} for {len(waves)} clips; one clip of this model must be one row")
    return ids, inputs


def noise_prompts(processor, waves) -> "Prompts":
    """Waves [samples] in prompts that ask what they are, without any example: what models.check listens to."""
    ids, features = _audio_inputs(processor, [audio_prompt(processor, "What is that?")] * len(waves), waves)
    return Prompts([], ids, [], features)


def _text_prompts(examples, processor, tokenizer, words) -> list[list[int]]:
    prompts = [text_prompt(tokenizer, *_question(example, processor, words)) for example in examples]
    return [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


def _pad(rows: list[list[int]], tokenizer, side: str) -> dict[str, torch.Tensor]:
    width, fill = max(map(len, rows)), tokenizer.pad_token_id
    fill = turn_end_id(tokenizer) if fill is None else fill         # any id will do: attention_mask hides it
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.int64)      # [batch, seq] each
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def _view(prompts, rows, responses, tokenizer, *, audio_id=None, extra={}) -> View:
    # Responses that stand together and are to the same prompt share it: one sequence, prompt + response + response + ..., in which each response
    # sees the prompt and itself, and counts its positions from the prompt's end. Right padding: the causal mask keeps real tokens blind to it.
    groups = [list(group) for _, group in itertools.groupby(range(len(rows)), key=lambda i: rows[i])]
    starts = [prompts[rows[group[0]]] for group in groups]
    inputs = _pad([prompt + [token for i in group for token in responses[i]] for prompt, group in zip(starts, groups)], tokenizer, "right")
    batch, seq = inputs["input_ids"].shape
    places, branch = torch.arange(seq).repeat(batch, 1), inputs["attention_mask"] - 1            # [batch, seq]; branch: 0 the prompt, -1 padding
    predict = []
    for row, (prompt, group) in enumerate(zip(starts, groups)):
        begin = len(prompt)
        for number, i in enumerate(group, 1):
            end = begin + len(responses[i])
            # response token k stands at column begin + k of its row; what predicts it one column earlier, the first by the prompt's last
            predict += [row * seq + (column - 1 if column > begin else len(prompt) - 1) for column in range(begin, end)]
            places[row, begin:end] = torch.arange(len(prompt), len(prompt) + end - begin)
            branch[row, begin:end] = number
            begin = end
    inputs["position_ids"] = places                         # given to all: some families (Omni) would count them for sound and pictures, row by row
    if len(groups) < len(rows):
        sees = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])                  # [batch, seq, seq]: may q see k?
        inputs["attention_mask"] = (sees & torch.ones(seq, seq, dtype=torch.bool).tril())[:, None]
    audio = [row * seq + column for row, prompt in enumerate(starts) for column, token in enumerate(prompt) if token == audio_id]
    return View({**inputs, **extra}, torch.tensor(predict, dtype=torch.int64), torch.tensor(audio, dtype=torch.int64))


@dataclass
class Prompts:
    """Both views' prompts of some examples, encoded once: responses are appended to them, the reference's (collate) or sampled ones (CORD)."""
    examples: list[Example]
    audio: list[list[int]]              # ids of each audio prompt, placeholders included
    text: list[list[int]]               # ids of each text prompt, in the text view's vocabulary
    features: dict[str, torch.Tensor]   # what the audio tower takes, one row per example


def encode_prompts(examples, processor, tokenizer, *, words, max_seconds=None) -> Prompts:
    """Examples -> Prompts, reading the audio files; arguments as in collate. Raises DataError."""
    audio, features = _audio_prompts(examples, processor, max_seconds)
    return Prompts(list(examples), audio, _text_prompts(examples, processor, tokenizer, words), features)


def audio_view(prompts: Prompts, rows, responses, processor) -> View:
    """Response i (list of ids) behind the audio prompt of example rows[i], with that example's sound.

    Neighbours with the same row share one sequence: sound and prompt are run once, and no response sees another (attention_mask is then bool
    [batch, 1, seq, seq], and there are position_ids; for models with PyTorch's own attention). predict_positions: in the order of the responses."""
    features = {name: tensor[torch.as_tensor([row for row, _ in itertools.groupby(rows)])] for name, tensor in prompts.features.items()}
    return _view(prompts.audio, rows, responses, processor.tokenizer, audio_id=_audio_id(processor), extra=features)


def text_view(prompts: Prompts, rows, responses, tokenizer) -> View:
    """The same behind the text prompts; the responses in the text view's vocabulary."""
    return _view(prompts.text, rows, responses, tokenizer)


def collate(examples, processor, tokenizer, *, words="description", student_to_teacher=None, max_seconds=None) -> Batch:
    """Examples -> Batch with their reference responses, reading the audio files.

    processor: the student's. tokenizer: the text view's (the text teacher's in paper A, the student's own in CORD). words: the field that
    holds words for the audio, "description" (A) or "transcript" (CORD). student_to_teacher: [student vocabulary] int64, the teacher's id of
    each student token or -1, where the two number their tokens differently (see shared_vocabulary). Raises DataError."""
    responses = [encode_response(processor.tokenizer, response_text(example)) for example in examples]
    audio_id, end_id = _audio_id(processor), turn_end_id(processor.tokenizer)
    for example, response in zip(examples, responses):
        # a placeholder asks the model for audio that is not there; a turn end in the middle would teach it to stop
        if audio_id in response or end_id in response[:-1]:
            token = processor.audio_token if audio_id in response else processor.tokenizer.convert_ids_to_tokens(end_id)
            raise DataError(f"{example.where}: the response contains the control token {token}; remove it from the answer or the reasoning")

    teacher_responses = responses
    if student_to_teacher is not None:
        teacher_responses = [student_to_teacher[response].tolist() for response in responses]
        for example, response, mapped in zip(examples, responses, teacher_responses):
            if -1 in mapped:
                token = processor.tokenizer.convert_ids_to_tokens(response[mapped.index(-1)])
                raise DataError(f"{example.where}: the response's token {token!r} is not in the teacher's vocabulary; rewrite the response")
    if teacher_responses[0][-1] != turn_end_id(tokenizer):
        raise DataError(f"the text view's tokenizer ({tokenizer.name_or_path or 'unnamed'}) closes turns with another token than the "
                        "student's; choose a teacher with the student's chat format")

    prompts, rows = encode_prompts(examples, processor, tokenizer, words=words, max_seconds=max_seconds), range(len(examples))
    return Batch(audio=audio_view(prompts, rows, responses, processor), text=text_view(prompts, rows, teacher_responses, tokenizer),
                 labels=torch.tensor([token for response in responses for token in response]),
                 ids=[example.id for example in examples], examples=list(examples))


def pad_left(prompts, tokenizer) -> dict[str, torch.Tensor]:
    """Lists of ids -> {"input_ids", "attention_mask", "position_ids"} [batch, seq] for generation: every row's first new token follows its last
    prompt token. Positions count real tokens."""
    inputs = _pad(prompts, tokenizer, "left")
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def prompt_batch(examples, processor, *, view="audio", tokenizer=None, words=None, max_seconds=None) -> dict[str, torch.Tensor]:
    """Inputs for model.generate: prompts only, left padded.

    view "text": tokenizer (default: the student's) and the field of `words`; without words the question alone."""
    if view == "audio":
        prompts, features = _audio_prompts(examples, processor, max_seconds)
        return {**pad_left(prompts, processor.tokenizer), **features}
    tokenizer = tokenizer or processor.tokenizer
    return pad_left(_text_prompts(examples, processor, tokenizer, words), tokenizer)


def audio_prefix(view: View) -> View:
    """The same view cut right after the batch's last audio token, for the acoustic teacher.

    The decoder is causal: what it says at audio positions depends on nothing later, so question and response need not be computed."""
    seq = view.inputs["input_ids"].shape[1]
    row, column = view.audio_positions // seq, view.audio_positions % seq
    cut = int(column.max()) + 1
    inputs = {**view.inputs, **{name: view.inputs[name][:, :cut] for name in ("input_ids", "attention_mask", "position_ids")}}
    return View(inputs, view.predict_positions[:0], row * cut + column)


def labels_like_transformers(batch: Batch) -> torch.Tensor:
    """The audio view's labels [batch, seq] in transformers' convention: the response's ids AT their own positions, -100 elsewhere."""
    labels = torch.full_like(batch.audio.inputs["input_ids"], -100)
    labels.view(-1)[batch.audio.predict_positions + 1] = batch.labels
    return labels


def denominators(batches: list[Batch]) -> dict[str, int]:
    """Response and audio tokens of the global batch: all given micro-batches, all ranks. A sum divided by these is the large batch's mean;
    the mean of the ranks' means is not."""
    counts = torch.tensor([sum(len(batch.labels) for batch in batches), sum(len(batch.audio.audio_positions) for batch in batches)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.cuda() if torch.distributed.get_backend() == "nccl" else counts
        torch.distributed.all_reduce(counts)
    return dict(zip(("response", "audio"), counts.tolist()))


# --------------------------------------------------------------- check FILE ---------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check"], help="find every fault of a manifest and its clips, then print a table by task; 1 if there is any")
    parser.add_argument("file", help="the manifest, JSONL")
    parser.add_argument("--student", default="mini/student", help="folder or hub name of the student, for its tokenizer")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longest clip allowed, in seconds (Qwen2-Audio's window: 30)")
    args = parser.parse_args()

    from transformers import AutoTokenizer                                 # slow to import, and only needed here

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.student, trust_remote_code=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: there is no tokenizer in {args.student} ({str(error).splitlines()[0]}); name the student's folder with --student")
    faults, error = [], None
    try:
        examples = read_manifest(args.file, faults=faults)
    except DataError as none_left:
        examples, error = [], none_left
    found = decode_all(examples, args.max_seconds)
    faults += [f"{example.where}: {clip}" for example, clip in zip(examples, found) if isinstance(clip, str)]
    good = [(example, clip) for example, clip in zip(examples, found) if not isinstance(clip, str)]
    faults.sort(key=lambda fault: int(fault.removeprefix(f"{Path(args.file)}:").partition(":")[0]))        # as the lines come
    odd = [f"{example.where}: {sentence}" for example, clip in good for sentence in clip.odd]
    print(*(f"fault: {fault}" for fault in faults), *(f"odd: {sentence}" for sentence in odd), sep="\n", end="\n" * bool(faults or odd))
    if error and not faults:
        sys.exit(f"error: {error}")                                        # no manifest, or nothing in it
    print(f"{args.file}: {len(good)} examples are valid" + f", {len(faults)} have faults" * bool(faults) + f", {len(odd)} odd things" * bool(odd))
    if good:
        print_table(good, tokenizer)
    if faults:
        sys.exit(1)


def print_table(good, tokenizer):
    """[(Example, Clip)] -> how many, how long and how many tokens, by task, and what is converted when it is read."""
    other = Counter(clip.rate for _, clip in good if clip.rate != SAMPLE_RATE)
    converted = [f"{count:,} from {rate:,} Hz" for rate, count in sorted(other.items())]
    converted += [f"{count:,} from several channels" for count in [sum(clip.channels > 1 for _, clip in good)] if count]
    if converted:
        print(f"converted to {SAMPLE_RATE:,} Hz, mono, as they are read: {', '.join(converted)}")
    rows = defaultdict(list)                                               # task -> [(seconds, question tokens, response tokens)]
    for example, clip in good:
        question = tokenizer(question_text(example), add_special_tokens=False)["input_ids"]
        rows[example.task].append((clip.seconds, len(question), len(encode_response(tokenizer, response_text(example)))))
    print(f"\n{'':12}{'':>8}{'seconds':>16}{'question tokens':>18}{'response tokens':>18}")
    print(f"{'task':12}{'count':>8}{'mean':>10}{'max':>6}" + f"{'mean':>12}{'max':>6}" * 2)
    for task, values in [*sorted(rows.items()), ("together", sum(rows.values(), []))]:
        line = f"{task:12}{len(values):8}"
        for column, form in zip(zip(*values), ("{:10.1f}{:6.1f}", "{:12.0f}{:6}", "{:12.0f}{:6}")):
            line += form.format(sum(column) / len(column), max(column))
        print(line)


if __name__ == "__main__":
    main()
