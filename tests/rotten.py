"""A corpus with every fault that data.py must find, each planted once, and between them good
examples, some of which look odd.

    manifest, planted = rotten(folder)      # planted: {fault: (line, words of its sentence)}

The ids of good examples begin with "good" or, where `check` shall say a word about them, with
"odd"; ODD holds that word.
"""

import json
import struct

import numpy as np
import soundfile

RATE = 16_000
STAGES = {
    "planning": "Listen.",
    "caption": "A tone.",
    "reasoning": "It rings.",
    "summary": "A bell.",
}
ODD = {
    "odd clipped": "is clipped (",
    "odd clipped stereo": "is clipped (",
    "odd scaled": "is clipped (",
}


def tone(seconds=0.5, rate=RATE, level=0.3):
    """[samples] float64, with a little noise, as every recording has: FLAC's and OGG's pages shall
    not be empty."""
    samples = round(seconds * rate)
    return level * np.sin(
        440 * 2 * np.pi * np.arange(samples) / rate
    ) + level / 30 * np.random.default_rng(0).standard_normal(samples)


def sound(wave, rate=RATE, **options):
    return lambda path: soundfile.write(path, wave, rate, **options)


def altered(change, wave=None, rate=RATE, **options):
    """A good file whose bytes are then changed."""

    def write(path):
        soundfile.write(path, tone() if wave is None else wave, rate, **options)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return write


def cut(share):
    return lambda content: content[: int(len(content) * share)]


def claims(size, *places):
    """A WAV whose header says so many bytes: of the file at place 4, of its sound at 40."""

    def change(content):
        for place in places:
            content[place : place + 4] = struct.pack("<I", size)
        return content

    return change


def counts(samples):
    """A FLAC whose header says that it has so many samples (36 bits behind rate and channels)."""

    def change(content):
        content[21:26] = ((content[21] & 0xF0) << 32 | samples).to_bytes(5, "big")
        return content

    return change


def without_tag(content):
    """An MP3 whose first frame does not say how long it is."""
    return content.replace(b"Xing", bytes(4))


def with_bad_sample(value, channels=1):
    wave = np.repeat(tone()[:, None], channels, 1)
    wave[-7, 0] = value
    return sound(wave, subtype="FLOAT")


def symlink(target):
    return lambda path: path.symlink_to(target)


STEREO = np.stack([tone(rate=48_000), np.zeros(24_000)], 1)
QUIET_THEN_LOUD = np.concatenate(
    [tone(1, level=1e-3), np.random.default_rng(0).uniform(-0.9, 0.9, RATE)]
)

GOOD_AUDIO = {  # id -> (file, how to write it)
    "good wav": ("good.wav", sound(tone())),
    "good flac": ("24 bits.flac", sound(tone(), subtype="PCM_24")),
    "good ogg": ("good.ogg", sound(tone())),
    "good opus": ("opus.ogg", sound(tone(), format="OGG", subtype="OPUS")),
    "good mp3": ("good.mp3", sound(tone(rate=44_100), 44_100)),
    "good float": ("float.wav", sound(tone(), subtype="FLOAT")),
    "good telephone": ("telephone.wav", sound(tone(rate=8_000), 8_000, subtype="ULAW")),
    "good 48 kHz stereo": ("48 kHz, one channel silent.wav", sound(STEREO, 48_000)),
    "good non-ASCII": ("Ünï çødé/日本語 🎵.wav", sound(tone())),
    "good and quiet": ("quiet.wav", sound(tone(level=1e-3))),
    "good after a silence": ("late.wav", sound(np.concatenate([np.zeros(3 * RATE), tone()]))),
    "good stream": ("stream.wav", altered(claims(2**32 - 1, 4, 40))),
    "good stream of SoX": ("sox.wav", altered(claims(0x7FFFF000, 4, 40))),
    "good but counts its header": ("header.wav", altered(claims(2 * 8_000 + 44, 4))),
    "good RF64": ("rf64.wav", sound(tone(), format="RF64")),
    "good 8 bits": ("8 bits.wav", sound(tone(), subtype="PCM_U8")),
    "good RIFX": ("rifx.wav", sound(tone(), endian="BIG")),
    "good with another end": ("wav.mp3", altered(lambda content: content, format="WAV")),
    "good link": ("link.wav", symlink("good.wav")),
    "odd clipped": ("clipped.wav", sound(np.clip(tone(level=2), -1, 1))),
    "odd clipped stereo": (
        "clipped stereo.flac",
        sound(np.stack([np.clip(tone(level=2), -1, 1), tone()], 1)),
    ),
    "odd scaled": ("scaled.wav", sound(30_000 * tone(), subtype="FLOAT")),
    "good mp3 that does not know its length": (
        "no tag.mp3",
        altered(without_tag, QUIET_THEN_LOUD, bitrate_mode="VARIABLE", compression_level=0.5),
    ),
}
BAD_AUDIO = {  # fault -> (file, how to write it, words)
    "truncated WAV": ("cut.wav", altered(cut(0.6)), "is cut off (6,"),
    "truncated RIFX": ("cut-rifx.wav", altered(cut(0.6), endian="BIG"), "is cut off (6,"),
    "truncated FLAC": ("cut.flac", altered(cut(0.6)), "breaks off while decoding"),
    "truncated in its header": (
        "cut-early.wav",
        altered(lambda content: content[:30]),
        "cannot be decoded",
    ),
    "zero-length file": ("empty.wav", lambda path: path.touch(), "cannot be decoded"),
    "zero samples": ("none.wav", sound(np.zeros(0)), "is empty (it holds no samples"),
    "a header without its length": (
        "unclosed.wav",
        altered(claims(0, 40)),
        "its header does not know how many)",
    ),
    "too short": ("short.wav", sound(tone()[:320]), "too short for a single audio token"),
    "too long": (
        "long.wav",
        sound(tone(31, 8_000), 8_000),
        "lasts 31.00 s, over the limit of 30 s",
    ),
    "NaN": ("nan.wav", with_bad_sample(np.nan), "not finite"),
    "NaN in one channel": ("nan2.wav", with_bad_sample(np.nan, 2), "not finite"),
    "infinity": ("inf.wav", with_bad_sample(-np.inf), "not finite"),
    "silence": ("silent.wav", sound(np.zeros(8_000)), "is silent (its 0.50 s, mixed"),
    "silence in an MP3": ("silent.mp3", sound(np.zeros(8_000)), "is silent (its 0.50 s"),
    "next to silence": ("hush.wav", sound(tone(level=5e-5)), "is silent ("),
    "silence at a level": (
        "level.wav",
        sound(np.full(8_000, -1 / 128), subtype="PCM_U8"),
        "is silent (",
    ),
    "channels that cancel": (
        "cancel.wav",
        sound(np.stack([tone(), -tone()], 1), subtype="FLOAT"),
        "is silent (",
    ),
    "a FLAC of ten hours, by its header": (
        "hours.flac",
        altered(counts(36_000 * RATE)),
        "lasts 36000.00 s, over the limit",
    ),
    "a FLAC of 20 seconds, by its header": ("20s.flac", altered(counts(20 * RATE)), "breaks off"),
    "a FLAC that was streamed": (
        "stream.flac",
        altered(counts(0)),
        "claims 9223372036854775807 samples",
    ),
    "three samples a second": ("slow.wav", sound(tone(), 3), "8000 samples at 3 Hz"),
    "text renamed to WAV": (
        "text.wav",
        lambda path: path.write_text("It is a truth universally acknowledged " * 99),
        "cannot be decoded",
    ),
    "text renamed to MP3": (
        "text.mp3",
        lambda path: path.write_text("It is a truth universally acknowledged " * 99),
        "cannot be decoded",
    ),
    "no header": ("samples.raw", lambda path: path.write_bytes(bytes(4_000)), "cannot be decoded"),
    "missing file": ("missing.wav", lambda path: None, "does not exist"),
    "a folder": ("folder.wav", lambda path: path.mkdir(), "does not exist"),
}
LONG = "la " * 33_334
BAD_LINES = {  # fault -> (what is changed in a good line, or the line itself; words)
    "cut JSON": (b'{"id": "x", "audio": "good.w', "not JSON"),
    "no JSON": (b"id,audio,question", "not JSON"),
    "Python, not JSON": (b"{'id': 'x'}", "not JSON"),
    "broken UTF-8": ({"question": "caf\xe9"}, "not JSON ('utf-8' codec"),
    "half a surrogate pair": (b'{"id": "\\ud83c"}', "not JSON"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "a list": (b"[1, 2]", "holds a list"),
    "null": (b"null", "holds a NoneType"),
    **{
        f"null {name}": ({name: None}, f"field '{name}' is missing or null")
        for name in ("id", "audio", "question", "answer", "task")
    },
    "null stage": (
        {"reasoning": {**STAGES, "caption": None}},
        "field 'caption' is missing or null",
    ),
    **{
        f"no {name}": ({name: ...}, f"field '{name}' is missing or null")
        for name in ("id", "audio", "question", "answer", "task")
    },
    "empty answer": ({"answer": " "}, "field 'answer' is empty"),
    "id of another type": ({"id": 7}, "must be a string, not int"),
    "answer of another type": ({"answer": ["bell"], "choices": []}, "must be a string, not list"),
    "description of another type": (
        {"description": {"en": "a bell"}},
        "must be a string, not dict",
    ),
    "choices of another type": ({"choices": "bell"}, "'choices' must be a list"),
    "null choice": ({"choices": ["bell", None]}, "a choice is missing or null"),
    "reasoning of another type": ({"reasoning": "It rings."}, "'reasoning' must be an object"),
    "answer not among the choices": ({"answer": "B"}, "'B' is not among the choices"),
    "a tag in the answer": (
        {"answer": "</RESPONSE>", "choices": []},
        "contains the tag </RESPONSE>",
    ),
    **{
        f"NUL in {name}": ({name: "be\0ll"}, f"field '{name}' holds a NUL character")
        for name in ("id", "audio", "question", "transcript", "speaker")
    },
    "NUL in a choice": ({"choices": ["bell", "go\0ng"]}, "a choice holds a NUL character"),
    "NUL in a stage": (
        {"reasoning": {**STAGES, "summary": "\0"}},
        "field 'summary' holds a NUL character",
    ),
    "huge question": (
        {"question": LONG},
        "field 'question' has 100,002 characters, over the limit of 100,000",
    ),
    "huge choice": ({"choices": ["bell", LONG]}, "a choice has 100,002 characters, over the limit"),
    "huge stage": (
        {"reasoning": {**STAGES, "reasoning": LONG}},
        "field 'reasoning' has 100,002 characters",
    ),
    "huge name": ({"audio": "a" * 300}, "does not exist"),
    "path upwards": ({"audio": "../outside.wav"}, "leaves the folder"),
    "path down and upwards": ({"audio": "x/../../outside.wav"}, "leaves the folder"),
    "absolute path": ({"audio": "/etc/passwd"}, "leaves the folder"),
    "link outwards": ({"audio": "out.wav"}, "leaves the folder"),
    "link to a folder outside": ({"audio": "up/outside.wav"}, "leaves the folder"),
    "circle of links": ({"audio": "circle.wav"}, "does not exist"),
    "duplicate id": ({"id": "good wav"}, "was already used at "),
}


def rotten(folder):
    """Writes the corpus into folder/set, something to steal beside it -> (the manifest's path,
    {fault: (line, words)})."""
    home = folder / "set"
    home.mkdir(parents=True)
    soundfile.write(folder / "outside.wav", tone(), RATE)
    (home / "out.wav").symlink_to(folder / "outside.wav")
    (home / "up").symlink_to(folder)
    (home / "circle.wav").symlink_to(home / "circle.wav")
    for name, write, *_ in (*GOOD_AUDIO.values(), *BAD_AUDIO.values()):
        (home / name).parent.mkdir(exist_ok=True)
        write(home / name)

    def line(**changes):
        fields = {
            "id": "x",
            "audio": "good.wav",
            "question": "What rings?",
            "choices": ["bell", "gong"],
            "answer": "bell",
            "task": "sound",
            "reasoning": STAGES,
            "description": "A bell.",
            "transcript": None,
            "extra": [1, None],
            **changes,
        }
        return json.dumps(
            {key: value for key, value in fields.items() if value is not ...}, ensure_ascii=False
        ).encode()

    good = [line(id=name, audio=file) for name, (file, _) in GOOD_AUDIO.items()]
    good += [
        line(id="good, with its clip again"),
        line(id="good, without a reasoning", reasoning=None, choices=None),
        line(id="good, 100,000 characters", question="x" * 100_000),
    ]
    bad = [
        (fault, line(id=fault, audio=file), words) for fault, (file, _, words) in BAD_AUDIO.items()
    ]
    for fault, (change, words) in BAD_LINES.items():
        change = {"id": fault, **change} if isinstance(change, dict) else change
        text = change if isinstance(change, bytes) else line(**change)
        if fault == "broken UTF-8":
            text = text.replace("é".encode(), b"\xe9")
        bad.append((fault, text, words))
    lines, planted = [b"\xef\xbb\xbf" + good.pop(0)], {}
    for number, (fault, text, words) in enumerate(bad):  # good, bad, bad, bad, blank, good, ...
        lines += [b" " * (number % 2), good.pop(0)] if number % 3 == 0 and good else []
        lines.append(text)
        planted[fault] = (len(lines), words)
    lines += good
    ends = [b"\r\n" if number % 4 == 0 else b"\n" for number in range(len(lines) - 1)] + [b""]
    (home / "rotten.jsonl").write_bytes(b"".join(text + end for text, end in zip(lines, ends)))
    return home / "rotten.jsonl", planted
