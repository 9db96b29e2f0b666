"""
Is the data good? Every clip is decoded from end to end before anything trains on it.

    seconds = check_clips(examples, max_seconds=30)     # DataError: the first bad clip of them all
    python data.py check FILE                           # names every fault, and what looks odd

A fault is what training cannot use: a clip that is missing, empty, cut off, too long or too short,
silent, or not finite. Odd is what it can use, but somebody should look at: clipping.
"""
import itertools
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import DataError
from plumbing import ranks

SILENT = 2e-4       # peak-to-peak below this share of full scale is silence: 6 steps of 16 bits
FULL = 0.9999       # of full scale: three samples in a row at this level are clipped
BLOCK = 2**18       # samples decoded at a time, all channels together: no clip is too long
AT_ONCE = 8         # clips that a thread decodes before it asks for more


@dataclass
class Clip:
    """What a clip turned out to be when it was decoded."""
    seconds: float
    odd: str | None                     # a sentence about what is no fault, but worth a look


# ---------------------------------------------------------------------------------------------
# 1. One clip

def clip_name(path, where=None) -> str:
    """How every sentence about a clip begins."""
    return f"{where}: the audio file {path}" if where else f"the audio file {path}"


def read_frames(file, count, clip):
    """The next `count` frames, -1 for all -> [samples, channels] float32. Raises DataError."""
    try:
        return file.read(count, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, MemoryError, ValueError) as error:
        raise DataError(f"{clip} breaks off while decoding ({str(error).rstrip('.')}); "
                        "make or fetch it again") from None


def open_audio(path, *, where=None, max_seconds=None):
    """-> soundfile's open file, once its header makes sense. Raises DataError."""
    import soundfile  # see data.py's imports

    path, clip = Path(path), clip_name(path, where)
    if not os.path.isfile(path):            # pathlib's raises for names that are too long
        raise DataError(f"{clip} does not exist; put it there or correct the path")
    if path.stat().st_size == 0:
        raise DataError(f"{clip} is empty (0 bytes); make or fetch it again")
    try:
        file = soundfile.SoundFile(path)
        absent = missing_bytes(path, file.format)
    except (RuntimeError, OSError, TypeError, ValueError) as error:     # TypeError: such as .raw
        raise DataError(f"{clip} cannot be decoded ({str(error).rstrip('.')}); "
                        "convert it to WAV, FLAC, OGG or MP3") from None
    frames, rate = file.frames, file.samplerate
    seconds = frames / rate
    if absent > 0:
        raise DataError(f"{clip} is cut off ({absent:,} bytes that its header promises are not "
                        "there); make or fetch it again")
    if not 1_000 <= rate <= 1_000_000 or frames > 2**40:        # a streamed FLAC's
        raise DataError(f"{clip} claims {frames} samples at {rate} Hz; convert it to a new file")
    if frames == 0:             # of a WAV whose writer was killed, libsndfile reads nothing
        raise DataError(f"{clip} is empty (it holds no samples, or its header does not know how "
                        "many); make it again, or have ffmpeg copy it to a new file")
    if math.ceil(frames * data.resample_ratio(rate)) < data.MIN_SAMPLES:
        raise DataError(f"{clip} lasts {seconds:.3f} s, too short for a single audio token; "
                        "use at least 0.021 s")
    if max_seconds is not None and seconds > max_seconds:
        raise DataError(f"{clip} lasts {seconds:.2f} s, over the limit of {max_seconds:g} s; "
                        "cut it, or raise the limit")
    return file


def decode(path, *, where=None, max_seconds=None) -> Clip:
    """Decodes a clip from end to end, block by block. Raises DataError for a clip with a fault."""
    clip = clip_name(path, where)
    there = 0                           # frames
    clipped = 0                         # samples, the mean of the channels
    low, high = math.inf, -math.inf     # of the mean of the channels
    with open_audio(path, where=where, max_seconds=max_seconds) as file:
        rate, frames, channels = file.samplerate, file.frames, file.channels
        guessed = file.format == "MP3"              # many do not say how long they are
        while there < frames:
            block = read_frames(file, max(1, BLOCK // channels), clip)
            if not len(block):
                break
            there += len(block)
            mono = data.mean_of_channels(block)
            if not np.isfinite(mono).all():
                raise DataError(f"{clip} holds samples that are not finite numbers; "
                                "make or fetch it again")
            low = min(low, float(mono.min()))
            high = max(high, float(mono.max()))
            if max(block.max(), -block.min()) >= FULL:
                full = np.abs(block) >= FULL
                in_a_run = full[2:] & full[1:-1] & full[:-2]
                clipped += int(in_a_run.sum()) / channels

    seconds = there / rate
    if there == 0 or (there < frames and not guessed):
        raise DataError(f"{clip} is cut off ({seconds:.2f} s of the {frames / rate:.2f} s that its "
                        "header promises are there); make or fetch it again")
    if high - low < SILENT:
        raise DataError(f"{clip} is silent (its {seconds:.2f} s, mixed to mono, are all zeros or "
                        "next to it); make it again, or leave the line out")
    odd = None
    if clipped > 0.01 * there:
        odd = (
            f"{clip} is clipped ({clipped / there:.0%} of its samples lie in runs at full "
            "scale); record it at a lower level"
        )
    return Clip(seconds, odd)


def missing_bytes(path, form) -> int:
    """How many bytes a WAV's header promises beyond the file's end: libsndfile shortens such a clip
    without a word. form: soundfile's name of the format. (Of the other formats it says so itself,
    but for OGG and MP3, of which a cut clip is only a shorter one.)"""
    if form not in ("WAV", "WAVEX"):
        return 0
    with open(path, "rb") as file:
        head = file.read(8)
    promised = 8 + int.from_bytes(head[4:], "big" if head[:4] == b"RIFX" else "little")
    # A writer to a pipe cannot know the size, and promises 2 or 4 GiB, more or less
    streamed = min(abs(promised - 2**31), abs(promised - 2**32)) < 2**13
    absent = promised - path.stat().st_size
    return absent if absent > 128 and not streamed else 0      # some count their own header twice


# ---------------------------------------------------------------------------------------------
# 2. All clips

def check_clips(examples, max_seconds=None) -> list[float]:
    """Decodes every clip -> their durations in seconds, on every rank the same. Then raises
    DataError for the first with a fault."""
    seconds = []
    for example, clip in zip(examples, decode_all(examples, max_seconds)):
        if isinstance(clip, str):
            raise DataError(f"{example.where}: {clip}")
        seconds.append(clip.seconds)
    return seconds


def decode_all(examples, max_seconds=None) -> list[Clip | str]:
    """Each example's clip, or the sentence that says what is wrong with it.

    Each file is decoded once, in threads (libsndfile lets go of Python's lock), and under
    torch.distributed by one rank, which tells the others."""
    paths = list(dict.fromkeys(example.audio for example in examples))
    share = paths[ranks.rank()::ranks.world_size()]
    tasks = [share[start:start + AT_ONCE] for start in range(0, len(share), AT_ONCE)]

    def decode_some(task):
        clips = []
        for path in task:
            try:
                clips.append(decode(path, max_seconds=max_seconds))
            except DataError as error:
                clips.append(str(error))
        return clips

    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        bar = tqdm(
            pool.map(decode_some, tasks),
            "decoding clips",
            len(tasks),
            leave=False,
            disable=True if ranks.rank() > 0 else None,
        )
        clips = list(itertools.chain(*bar))
    by_path = dict(ranks.gather_lists(list(zip(share, clips))))
    return [by_path[example.audio] for example in examples]


def about_clips(seconds, processor) -> str:
    """What clips of these durations mean for a model, in a line: what of them it hears, and the
    memory of one clip's features."""
    window = data.longest(processor)
    wave = torch.zeros(math.ceil(min(window, max(seconds)) * data.SAMPLE_RATE))
    prompt = data.audio_prompt(processor, "")
    _, features = data.audio_inputs(processor, [prompt], [wave.numpy()])
    size = sum(tensor.nbytes for tensor in features.values()) / 2**20
    line = (
        f"{len(seconds):,} clips, {sum(seconds) / 3600:.2f} hours, longest "
        f"{max(seconds):.1f} s; features at most {size:.2f} MiB a clip"
    )
    cut = sum(duration > window for duration in seconds)
    if cut:
        line += (
            f"; {cut:,} are longer than the {window:g} s that the model hears and are cut "
            "there (--max-seconds refuses them)"
        )
    return line


# ---------------------------------------------------------------------------------------------
# 3. python data.py check FILE

def command(args):
    """Prints every fault in the order of the lines, then a table; exits with 1 if there is any."""
    tokenizer = load_tokenizer(args.student)
    faults, examples = [], []
    for item in data.parse_manifest(args.file):
        if isinstance(item, DataError):
            faults.append(str(item))
        else:
            examples.append(item)
    if not faults and not examples:
        raise DataError(f"{args.file}: the manifest is empty; write one JSON object per line")

    good, odd = [], []
    for example, clip in zip(examples, decode_all(examples, args.max_seconds)):
        if isinstance(clip, str):
            faults.append(f"{example.where}: {clip}")
        else:
            good.append((example, clip))
            if clip.odd:
                odd.append(f"{example.where}: {clip.odd}")

    prefix = f"{Path(args.file)}:"
    faults.sort(key=lambda fault: int(fault.removeprefix(prefix).partition(":")[0]))
    for fault in faults:
        print(f"fault: {fault}")
    for sentence in odd:
        print(f"odd: {sentence}")
    counts = [f"{len(good)} examples are valid"]
    if faults:
        counts.append(f"{len(faults)} have faults")
    if odd:
        counts.append(f"{len(odd)} odd things")
    print(f"{args.file}: {', '.join(counts)}")
    if good:
        print_table(good, tokenizer)
    if faults:
        raise SystemExit(1)


def load_tokenizer(name):
    """The tokenizer in a folder or on the hub, or one sentence and the end."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: there is no tokenizer in {name} ({str(error).splitlines()[0]}); "
                         "name the student's folder with --student") from None


def print_table(good, tokenizer):
    """[(Example, Clip)] -> how many, how long and how many tokens, by task."""
    rows = defaultdict(list)            # task -> [(seconds, question tokens, response tokens)]
    for example, clip in good:
        question = tokenizer(data.question_text(example), add_special_tokens=False)["input_ids"]
        response = data.encode_response(tokenizer, data.response_text(example))
        rows[example.task].append((clip.seconds, len(question), len(response)))
    together = list(itertools.chain(*rows.values()))

    print(f"\n{'':12}{'':>8}{'seconds':>16}{'question tokens':>18}{'response tokens':>18}")
    print(f"{'task':12}{'count':>8}{'mean':>10}{'max':>6}" + f"{'mean':>12}{'max':>6}" * 2)
    for task, values in [*sorted(rows.items()), ("together", together)]:
        seconds, question, response = zip(*values)
        line = f"{task:12}{len(values):8}"
        line += f"{sum(seconds) / len(seconds):10.1f}{max(seconds):6.1f}"
        for tokens in (question, response):
            line += f"{sum(tokens) / len(tokens):12.0f}{max(tokens):6}"
        print(line)
