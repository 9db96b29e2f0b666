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
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import DataError
from plumbing import manifest, ranks

SILENT = 2e-4       # peak-to-peak below this share of full scale is silence: 6 steps of 16 bits
FULL = 0.9999       # of full scale: three samples in a row at this level are clipped
BLOCK = 2**18       # samples decoded at a time, all channels together: no clip is too long


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
    """The next `count` frames -> their samples [frames, channels] and the mean of the channels
    [frames], float32. Raises DataError."""
    try:
        block = file.read(count, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, MemoryError, ValueError) as error:
        raise DataError(f"{clip} breaks off while decoding ({str(error).rstrip('.')}); "
                        "make or fetch it again") from None
    mono = sum(block.T) / file.channels
    if not np.isfinite(mono).all():
        raise DataError(f"{clip} holds samples that are not finite numbers; make or fetch it again")
    return block, mono


def open_audio(path, *, where=None, max_seconds=None):
    """-> soundfile's open file, once its header makes sense. Raises DataError."""
    import soundfile  # see data.py's imports

    clip = clip_name(path, where)
    if not os.path.isfile(path):            # pathlib's raises for names that are too long
        raise DataError(f"{clip} does not exist; put it there or correct the path")
    try:
        file = soundfile.SoundFile(path)
        absent = missing_bytes(path, file.format)
    except (RuntimeError, OSError, TypeError, ValueError) as error:     # TypeError: such as .raw
        raise DataError(f"{clip} cannot be decoded ({str(error).rstrip('.')}); "
                        "make or fetch it again, as WAV, FLAC, OGG or MP3") from None
    frames, rate = file.frames, file.samplerate
    seconds = frames / rate
    if absent:
        raise DataError(f"{clip} is cut off ({absent:,} bytes that its header promises are not "
                        "there); make or fetch it again")
    if not 1_000 <= rate <= 1_000_000 or frames > 2**40:        # a streamed FLAC's
        raise DataError(f"{clip} claims {frames} samples at {rate} Hz; convert it to a new file")
    if frames == 0:             # of a WAV whose writer was killed, libsndfile reads nothing
        raise DataError(f"{clip} is empty (it holds no samples, or its header does not know how "
                        "many); make it again, or have ffmpeg copy it to a new file")
    if seconds * data.SAMPLE_RATE < data.MIN_SAMPLES:
        raise DataError(f"{clip} lasts {seconds:.3f} s, too short for a single audio token; "
                        "use at least 0.021 s")
    if max_seconds is not None and seconds > max_seconds:
        raise DataError(f"{clip} lasts {seconds:.2f} s, over the limit of {max_seconds:g} s; "
                        "cut it, or raise the limit")
    return file


def decode(path, max_seconds=None) -> Clip:
    """Decodes a clip from end to end, block by block. Raises DataError for a clip with a fault."""
    clip = clip_name(path)
    there = 0                           # frames
    clipped = 0                         # samples, the mean of the channels
    low, high = math.inf, -math.inf     # of the mean of the channels
    with open_audio(path, max_seconds=max_seconds) as file:
        while there < file.frames:
            block, mono = read_frames(file, max(1, BLOCK // file.channels), clip)
            if not len(block):
                break
            there += len(block)
            low = min(low, mono.min())
            high = max(high, mono.max())
            full = np.abs(block) >= FULL
            in_a_run = full[2:] & full[1:-1] & full[:-2]
            clipped += in_a_run.sum() / file.channels

    seconds = there / file.samplerate
    promised = file.frames / file.samplerate
    if there < file.frames and file.format != "MP3":        # many MP3 files only guess their length
        raise DataError(f"{clip} is cut off ({seconds:.2f} s of the {promised:.2f} s that its "
                        "header promises are there); make or fetch it again")
    if high - low < SILENT:
        raise DataError(f"{clip} is silent (its {seconds:.2f} s, mixed to mono, are all zeros or "
                        "next to it); make it again, or leave the line out")
    odd = None
    if clipped > 0.01 * there:
        odd = (f"{clip} is clipped ({clipped / there:.0%} of its samples lie in runs at full "
               "scale); record it at a lower level")
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
    absent = promised - os.path.getsize(path)
    return absent if absent > 128 and not streamed else 0      # some count their own header twice


# ---------------------------------------------------------------------------------------------
# 2. All clips

def check_clips(examples, max_seconds=None) -> list[float]:
    """Decodes every clip -> their durations in seconds, on every rank the same. Then raises
    DataError for the first with a fault."""
    clips = decode_all(examples, max_seconds)
    for example in examples:
        if isinstance(clips[example.audio], str):
            raise DataError(f"{example.where}: {clips[example.audio]}")
    return [clips[example.audio].seconds for example in examples]


def decode_all(examples, max_seconds=None) -> dict[Path, Clip | str]:
    """What each file turns out to be: its Clip, or the sentence that says what is wrong with it.

    Each file is decoded once, in threads (libsndfile lets go of Python's lock), and under
    torch.distributed by one rank, which tells the others."""
    paths = list(dict.fromkeys(example.audio for example in examples))
    share = paths[ranks.rank()::ranks.world_size()]

    def decode_one(path):
        try:
            return path, decode(path, max_seconds)
        except DataError as error:
            return path, str(error)

    threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPool(max(1, threads)) as pool:
        bar = tqdm(
            pool.imap(decode_one, share, chunksize=8),
            "decoding clips",
            len(share),
            leave=False,
            disable=True if ranks.rank() > 0 else None,
        )
        clips = list(bar)
    return dict(ranks.gather_lists(clips))


def about_clips(seconds, processor) -> str:
    """How many clips of these durations there are, and what of them a model hears, in a line."""
    window = data.longest(processor)
    line = (f"{len(seconds):,} clips, {sum(seconds) / 3600:.2f} hours, "
            f"longest {max(seconds):.1f} s")
    cut = sum(duration > window for duration in seconds)
    if cut:
        line += (f"; {cut:,} are longer than the {window:g} s that the model hears and are cut "
                 "there (--max-seconds refuses them)")
    return line


# ---------------------------------------------------------------------------------------------
# 3. python data.py check FILE

def command(args):
    """Prints what is wrong or odd, in the order of the lines, then the clips' durations by task.
    Exits with 1 if there is a fault."""
    lines = list(manifest.parse(args.file))
    examples = [line for line in lines if isinstance(line, data.Example)]
    clips = decode_all(examples, args.max_seconds)
    faults, odd = 0, 0
    seconds = defaultdict(list)         # task -> of its clips
    for line in lines:
        if isinstance(line, DataError):
            print(f"fault: {line}")
            faults += 1
            continue
        clip = clips[line.audio]
        if isinstance(clip, str):
            print(f"fault: {line.where}: {clip}")
            faults += 1
            continue
        seconds[line.task].append(clip.seconds)
        if clip.odd:
            print(f"odd: {line.where}: {clip.odd}")
            odd += 1

    together = list(itertools.chain(*seconds.values()))
    print(f"{args.file}: {len(together)} examples are valid, {faults} have faults, "
          f"{odd} odd things")
    if together:
        print(f"\n{'task':12}{'count':>8}{'mean, s':>10}{'longest, s':>12}")
        for task, values in [*sorted(seconds.items()), ("together", together)]:
            print(f"{task:12}{len(values):8}{sum(values) / len(values):10.1f}{max(values):12.1f}")
    if faults:
        raise SystemExit(1)
