"""
Text to speech, for questions and facts that exist only as text.

What this file teaches: how to get a hundred different voices out of one 21 MB wheel (espeak-ng,
through ctypes, about 20 ms for a sentence), with the four knobs of prosody that mini/world.py
builds its emotions from: rate, pitch, range and loudness; and how to have a whole dataset read
aloud, as paper B (CORD, arXiv 2601.16547) has 80,000 NuminaMath problems read by Kokoro.

    python -m prepare.speak "seven plus two minus four" sum.wav --voice f2 --rate 200
    python -m prepare.speak gsm8k.jsonl gsm8k-spoken.jsonl      # laptop: espeak-ng, six voices
    torchrun --nproc_per_node 8 -m prepare.speak numina.jsonl numina-spoken.jsonl --tts kokoro

The input is a manifest (data.py) without audio, as import_datasets.py writes it; the output is its
lines with "audio", "speaker" and "spoken", ready for train_cord.py --data. "transcript" stays what
was written, for the text view; "spoken" is what verbalise.py made of it. A line that cannot be
said with certainty is left out and listed, with the reason, in OUT.skipped.jsonl. Killed, it goes
on where it stopped; one rank or many on a shared disk, killed or not, write the same files.

Where the paper is silent, and what we do:
1. It does not say how formulas become words: verbalise.py is ours.
2. It does not say how many voices: every id draws one of --voices, always the same one.
"""

import _ctypes
import argparse
import ctypes
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

import data
from data import SAMPLE_RATE  # what every audio tower in the project hears
from plumbing import manifest, ranks
from plumbing.files import append_jsonl, read_json, replace_text, write_json
from prepare.verbalise import verbalise

# ------------------------------------------------------------------------------------------------
# 1. One sentence, by espeak-ng

# Espeak_PARAMETER in speak_lib.h
ESPEAK_RATE, ESPEAK_VOLUME, ESPEAK_PITCH, ESPEAK_RANGE = 1, 2, 3, 4
# AUDIO_OUTPUT_RETRIEVAL, POS_CHARACTER, espeakCHARS_UTF8
RETRIEVAL, POS_CHARACTER, CHARS_UTF8 = 1, 1, 1
SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@cache
def espeak_data():
    """The folder of espeak-ng's voices and dictionaries."""
    import espeakng_loader

    data_path = espeakng_loader.get_data_path()
    # Espeak-ng keeps this path in 160 bytes and falls silent when it does not fit
    if len(data_path) > 140:
        link = os.path.join(tempfile.mkdtemp(), "data")
        os.symlink(data_path, link)
        data_path = link
    return data_path


@cache
def espeak():
    """The library, initialised once per process -> (ctypes library, its sampling rate in Hz, the
    list its callback fills)."""
    import espeakng_loader

    data_path = espeak_data()
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(RETRIEVAL, 0, data_path.encode(), 0)
    if rate <= 0:
        raise RuntimeError(
            f"espeak-ng did not start from {data_path}; reinstall it with `pip install"
            " --force-reinstall espeakng-loader`"
        )
    chunks = []

    @SYNTH_CALLBACK
    def receive(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    library.receive = receive  # keep the callback alive as long as the library
    return library, rate, chunks


def forget_espeak():
    """Unload the library, so that the next sentence is a fresh process's first one: the same
    samples wherever it is spoken. Under a millisecond.

    espeak_Terminate alone does not do it: the synthesiser's state lies in static variables, which
    go when the C library unmaps ours (glibc does)."""
    library = espeak()[0]
    library.espeak_Terminate()
    espeak.cache_clear()
    (_ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose)(library._handle)


def speak(text, *, voice="m3", accent="en-us", rate=190, pitch=50, pitch_range=50, volume=100):
    """
    Speak one sentence.

    voice: an espeak-ng variant (m1..m8, f1..f5, or a name such as "Andy"); accent: its language;
    rate: words per minute (80 to 450); pitch and pitch_range: 0 to 100, 50 is the voice's own;
    volume: per cent. espeak-ng keeps state between sentences: the same arguments give the same
    samples only at the same place in a fresh process's sequence of calls. Returns float32
    [samples] at 16 kHz, without leading and trailing silence. Raises ValueError for an unknown
    voice or silent text.
    """
    library, sample_rate, chunks = espeak()
    # Of a variant that it lacks espeak-ng says nothing
    known = (Path(espeak_data()) / "voices" / "!v" / voice).is_file()
    if not known or library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()) != 0:
        raise ValueError(
            f"espeak-ng has no voice {accent}+{voice}; use a variant such as m1..m8 or f1..f5 with"
            " an accent such as en-us"
        )
    for parameter, value in (
        (ESPEAK_RATE, rate),
        (ESPEAK_PITCH, pitch),
        (ESPEAK_RANGE, pitch_range),
        (ESPEAK_VOLUME, volume),
    ):
        library.espeak_SetParameter(parameter, int(value), 0)
    chunks.clear()
    # The breath of f2 and f3 is noise, and espeak-ng seeds it with the clock
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    library.espeak_Synchronize()
    if not chunks or not np.concatenate(chunks).any():
        raise ValueError(f"nothing to hear in {text!r}; give text with words in it")
    waveform = torch.from_numpy(np.concatenate(chunks).astype(np.float32) / 32768)
    waveform = torchaudio.functional.resample(waveform, sample_rate, SAMPLE_RATE)
    loud = (waveform.abs() > 0.002).nonzero()[:, 0]
    return waveform[loud[0] : loud[-1] + 1]


# ------------------------------------------------------------------------------------------------
# 2. Two readers: a function (words, voice, seed) -> float32 [samples] at 16 kHz

ESPEAK_VOICES = ["en-us+m3", "en-us+f2", "en-us+m7", "en-us+f5", "en-gb-x-rp+m1", "en-gb-x-rp+f4"]
KOKORO_VOICES = "af_heart af_bella af_nicole am_fenrir am_michael am_puck bf_emma bm_george".split()
READING = hashlib.sha256(Path(__file__).with_name("verbalise.py").read_bytes()).hexdigest()
KOKORO, KOKORO_RATE = "hexgrad/Kokoro-82M", 24_000


def espeak_reader(voices, rate, pitch):
    """espeak-ng as a reader. Raises DataError for a voice it does not have."""

    def read(words, voice, _seed):
        accent, _, variant = voice.partition("+")
        forget_espeak()
        return speak(words, voice=variant, accent=accent, rate=rate, pitch=pitch)

    for voice in voices:
        try:
            read("one", voice, 0)
        except ValueError as error:
            raise data.DataError(f"--voices {voice}: {error}") from None
    return read


def kokoro_reader(voices, folder, device):
    """Kokoro as a reader, from the hub or a folder with config.json, kokoro-v1_0.pth and
    voices/NAME.pt. Raises DataError where something is missing.

    A voice's first letter is its language: af_heart is American, bf_emma British. Kokoro's breath
    is noise: it is seeded anew for every line."""
    try:
        from kokoro import KModel, KPipeline
    except ImportError as error:
        raise data.DataError(
            f"--tts kokoro cannot be used ({error}); run `pip install kokoro`"
        ) from None
    files, names = {}, dict(zip(voices, voices))
    if folder is not None:
        files = {"config": f"{folder}/config.json", "model": f"{folder}/kokoro-v1_0.pth"}
        names = {voice: f"{folder}/voices/{voice}.pt" for voice in voices}
        for path in (*files.values(), *names.values()):
            if not Path(path).is_file():
                raise data.DataError(
                    f"--kokoro {folder}: {path} is missing; put there what {KOKORO} has on the hub"
                )
    try:
        model = KModel(repo_id=KOKORO, **files).to(device).eval()
        pipelines = {
            language: KPipeline(lang_code=language, repo_id=KOKORO, model=model)
            for language in {voice[0] for voice in voices}
        }
        for voice, name in names.items():
            pipelines[voice[0]].load_voice(name)
    # An unknown language, no network, no spaCy model: all sorts come out of there
    except (Exception, SystemExit) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise data.DataError(
            f"Kokoro cannot be started ({reason}); without a network, give --kokoro DIR and install"
            " spaCy's en_core_web_sm"
        ) from None

    def read(words, voice, seed):
        torch.manual_seed(seed)
        waves = []
        for part in pipelines[voice[0]](words, voice=names[voice], speed=1):
            # What Kokoro takes at a time; it cuts off the rest without an error
            if len(part.phonemes) >= 510:
                raise ValueError("a sentence of more than 510 phonemes")
            if part.audio is not None:
                waves.append(part.audio.float().cpu().flatten())
        if not waves:
            raise ValueError("nothing to hear")
        return torchaudio.functional.resample(torch.cat(waves), KOKORO_RATE, SAMPLE_RATE)

    return read


# ------------------------------------------------------------------------------------------------
# 3. A whole manifest. Each rank speaks every n-th line of what is left and notes it in a journal
#    of its own as soon as its clip is whole; nothing else is kept, so that a run may be killed
#    anywhere and taken up by more or fewer ranks. At the end rank 0 writes the manifest from all
#    journals.


def read_lines(path, limit):
    """A manifest without audio -> [(where, record)]. Raises DataError at the first bad line,
    before anything is spoken."""
    lines, seen = [], {}
    for number, line in itertools.islice(manifest.lines(path), limit):
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            record = None  # parse_line says what is wrong
        if isinstance(record, dict):
            if record.get("audio"):
                raise data.DataError(
                    f"{where}: the line has audio already ({record['audio']!r}); give a"
                    " manifest without it"
                )
            # what read_manifest will ask of the line once it has its audio
            line = json.dumps({**record, "audio": "clip.flac"}).encode()
        example = manifest.parse_line(line, where, path.parent.resolve())
        if not (example.transcript or "").strip():
            raise data.DataError(
                f"{where}: the field 'transcript' is missing or empty; it holds the words"
                " to be spoken"
            )
        manifest.claim_id(example, seen)
        lines.append((where, record))
    return lines


def key_of(record):
    """The name of a line's clip: another one as soon as its words are others, or verbalise.py
    reads otherwise. Python's hash() differs from process to process."""
    digest = hashlib.sha256(
        json.dumps([record["id"], record["transcript"], READING]).encode()
    ).hexdigest()
    return f"{digest[:2]}/{re.sub(r'[^A-Za-z0-9.-]', '_', record['id'])[:60]}-{digest[:12]}"


def voice_of(identifier, voices):
    drawn = int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big")
    return voices[drawn % len(voices)]


def read_journals(folder):
    """What all ranks of all runs noted -> {key: note}. A last line that a kill tore, or that is
    being written, does not count."""
    notes = {}
    for path in sorted(folder.glob("journal-*.jsonl")):
        whole = path.read_bytes()
        for line in whole[: whole.rfind(b"\n") + 1].splitlines():
            try:
                note = json.loads(line)
                clip = folder / f"{note['key']}.flac"
                if "skipped" in note or clip.is_file() and clip.stat().st_size:
                    notes[note["key"]] = note
            except (ValueError, KeyError, TypeError) as error:
                raise data.DataError(
                    f"{path}: is not what an earlier run of this command wrote ({error!r}); move"
                    f" {folder} away"
                ) from None
    return notes


def speak_line(record, folder, reader, voices, *, max_characters, max_seconds):
    """Speak one line into its clip, complete or not at all -> its note: {"key", "spoken",
    "speaker", "seconds"} or {"key", "skipped"}."""
    key, voice = key_of(record), voice_of(record["id"], voices)
    try:
        words = verbalise(record["transcript"])
        if len(words) > max_characters:
            raise ValueError(f"more than {max_characters:,} characters")
        wave = reader(words, voice, int(key.rsplit("-", 1)[1], 16))
        if len(wave) > max_seconds * SAMPLE_RATE:
            raise ValueError(f"more than {max_seconds:g} seconds")
        if len(wave) < data.MIN_SAMPLES:
            raise ValueError("nothing to hear")
    except ValueError as error:
        return {"key": key, "skipped": str(error)}
    path = folder / f"{key}.flac"
    path.parent.mkdir(exist_ok=True)
    soundfile.write(
        path.with_suffix(".part"), wave.numpy(), SAMPLE_RATE, format="FLAC", subtype="PCM_16"
    )
    os.replace(path.with_suffix(".part"), path)
    return {"key": key, "spoken": words, "speaker": voice, "seconds": len(wave) / SAMPLE_RATE}


def check_settings(folder, settings):
    """A folder of clips belongs to one way of speaking. Raises DataError where it was another one.
    -> the file that says which"""
    path = folder / "settings.json"
    before = read_json(path) or settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise data.DataError(
                f"{folder}: was spoken with {name} {before.get(name)}, not {value}; give another"
                f" output, or the flags of {path}"
            )
    return path


def write_manifest(lines, notes, folder, out):
    """The journals' notes and the input's lines -> OUT.jsonl and OUT.skipped.jsonl, in the input's
    order, each complete or not at all."""
    spoken, skipped = [], []
    for _, record in lines:
        note = notes[key_of(record)]
        if "skipped" in note:
            skipped.append({"id": record["id"], "skipped": note["skipped"]})
        else:
            clip = {"audio": f"{folder.name}/{note['key']}.flac"}
            clip |= {name: note[name] for name in ("speaker", "spoken")}
            spoken.append(record | clip)
    for path, records in ((out, spoken), (out.with_suffix(".skipped.jsonl"), skipped)):
        rows = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        replace_text(path, "".join(rows))
    return spoken, skipped


def summary(spoken, skipped, hours, out):
    """What was made, as lines of text; the 20 most frequent reasons, without their numbers and
    quotations."""
    voices = Counter(record["speaker"] for record in spoken)
    skipped_file = out.with_suffix(".skipped.jsonl")
    lines = [
        f"{out}: {len(spoken):,} lines spoken, {hours:.2f} hours; {len(skipped):,} left out"
        f" (see {skipped_file})",
        "voices: " + ", ".join(f"{voice} {n:,}" for voice, n in sorted(voices.items())),
    ]
    reasons = {}
    for record in skipped:
        reason = re.sub(r"'[^']*'|(?<!\S)\S*\d\S*", "...", record["skipped"])
        reasons.setdefault(reason, []).append(record["id"])
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for reason, ids in most[:20]:
        more = ", ..." if len(ids) > 3 else ""
        lines.append(f"left out, {reason}: {len(ids):,} ({', '.join(ids[:3])}{more})")
    return lines


def speak_manifest(args):
    """The batch mode; every rank runs it."""
    source, out = Path(args.text), Path(args.out)
    if out.resolve() == source.resolve():
        raise data.DataError(f"{out}: would be written over its own input; give another name")
    lines = read_lines(source, args.limit)
    folder = out.with_name(f"{out.stem}_audio")
    limits = {"max_characters": args.max_characters, "max_seconds": args.max_seconds}
    if args.tts == "espeak":
        voices = args.voices or ESPEAK_VOICES
        voices = [voice if "+" in voice else f"en-us+{voice}" for voice in voices]
        how = {"rate": args.rate, "pitch": args.pitch}
    else:
        voices = args.voices or KOKORO_VOICES
        how = {"kokoro": args.kokoro}
    settings = {"tts": args.tts, "voices": voices, **limits, **how}
    rank, world, device = ranks.start_distributed()
    with ranks.rank_zero_first():
        folder.mkdir(parents=True, exist_ok=True)
        said = check_settings(folder, settings)
        notes = read_journals(folder)
        left = [record for _, record in lines if key_of(record) not in notes]
        reader = None
        if left and args.tts == "espeak":
            reader = espeak_reader(voices, args.rate, args.pitch)
        elif left:
            reader = kokoro_reader(voices, args.kokoro, device)
        if rank == 0:
            # Only now: a reader that could not be started has said nothing
            write_json(said, settings)
            print(f"{len(lines):,} lines, {len(voices)} voices of {args.tts} on {device} x {world}")
    # Nobody speaks before all know what is left, or they would share it out in different ways
    ranks.wait_for_all()
    todo = left[rank::world]
    journal = folder / f"journal-{rank}.jsonl"
    if journal.exists():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    for record in tqdm(todo, desc="speaking", unit="line", disable=rank > 0):
        append_jsonl(journal, speak_line(record, folder, reader, voices, **limits))
    ranks.wait_for_all()  # then all journals are complete
    if rank == 0:
        notes = read_journals(folder)
        spoken, skipped = write_manifest(lines, notes, folder, out)
        hours = sum(notes[key_of(record)]["seconds"] for record in spoken) / 3600
        print(*summary(spoken, skipped, hours, out), sep="\n")
        if not spoken:
            raise data.DataError(
                f"{source}: no line of it could be spoken; {out.with_suffix('.skipped.jsonl')}"
                " says why"
            )
        data.read_manifest(out, require=("transcript",))
        print(f"train with --data {out}")
    ranks.stop_distributed()


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("text", help="what to say, or IN.jsonl: a manifest whose lines lack audio")
    add(
        "out",
        help="the WAV file to write (16 kHz, mono, 16 bit), or OUT.jsonl: the manifest with"
        " audio, in OUT_audio/ beside it",
    )
    add("--rate", type=int, default=190, help="words per minute, of espeak-ng")
    add("--pitch", type=int, default=50, help="0 to 100, of espeak-ng")
    # one sentence
    add("--voice", help="espeak-ng variant: m1..m8, f1..f5, or a name; default: m3")
    add("--accent", help="espeak-ng language: en-us, en-gb-x-rp, ...; default: en-us")
    # a manifest
    add(
        "--tts",
        choices=["espeak", "kokoro"],
        default="espeak",
        help="who speaks (paper: kokoro, which is `pip install kokoro`)",
    )
    add(
        "--voices",
        nargs="+",
        help=f"every id draws one; default: {', '.join(ESPEAK_VOICES)}; {', '.join(KOKORO_VOICES)}",
    )
    add(
        "--kokoro",
        metavar="DIR",
        help="Kokoro without the hub: a folder with config.json, kokoro-v1_0.pth, voices/NAME.pt",
    )
    add("--limit", type=int, help="only the first N lines")
    add(
        "--max-characters",
        type=int,
        default=1000,
        help="leave out what takes more to say, in characters of the words",
    )
    add(
        "--max-seconds",
        type=float,
        default=30,
        help="leave out longer clips, in seconds (Qwen2-Audio hears 30)",
    )
    args = parser.parse_args(argv)
    args.batch = args.out.endswith(".jsonl")
    if args.text.endswith(".jsonl") != args.batch:
        parser.error(
            "a manifest is spoken into a manifest: give IN.jsonl OUT.jsonl, or a sentence and"
            " OUT.wav"
        )
    if args.batch and (args.voice or args.accent):
        parser.error("--voice and --accent are for one sentence; use --voices en-us+m3 ...")
    if not args.batch and (args.voices or args.kokoro or args.limit):
        parser.error("--voices, --kokoro and --limit are for a manifest")
    if args.kokoro and args.tts != "kokoro" or args.tts == "kokoro" and not args.batch:
        parser.error("--kokoro goes with --tts kokoro, and that with a manifest")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    return args


def main(argv=None):
    args = parse_flags(argv)
    if args.batch:
        speak_manifest(args)
    else:
        try:
            wave = speak(
                args.text,
                voice=args.voice or "m3",
                accent=args.accent or "en-us",
                rate=args.rate,
                pitch=args.pitch,
            )
        except ValueError as error:
            raise data.DataError(str(error)) from None
        soundfile.write(args.out, wave.numpy(), SAMPLE_RATE)


if __name__ == "__main__":
    main()
