"""
A world small enough to see everything: real waveforms, real architectures, two cores.

What this file teaches: what a model needs before reasoning can be distilled into it. Four tasks:
speech (spoken sums, comparisons, orderings, two-step stories), sound (sequences of events) and
music (short melodies) are what is TAUGHT: their training examples carry a four-stage reasoning
trace. Emotion (how a sentence is said) is what must be KEPT: it is in the student's pretraining
only, never in the distillation set, so a fall there is forgetting.

    python -m mini.world data         # every split (train_source_layer.py makes those it needs)
    python -m mini.world pretrain     # rebuild mini/student and mini/teacher: mini/pretrain.py

Everything comes from --seed. Audio is cached under runs/mini_world/. Test speakers and seeds are
disjoint from training.
"""
import argparse
import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

from plumbing.files import replace_text
from prepare.speak import SAMPLE_RATE, speak

WORLD = 2  # part of the cache's name: raise it when the same seed gives another world
MINI = Path(__file__).resolve().parent
CACHE = Path("runs") / "mini_world"
MAX_SECONDS = 3.0  # what the student's audio tower holds: 300 mel frames, 75 audio tokens
TAUGHT = ("speech", "sound", "music")
KEPT = "emotion"

# split -> examples per task. The student hears "pretrain" before any distillation; "train" is
# paper A's distillation set, "spoken" is CORD's.
SPLITS = {
    "pretrain": {"speech": 4000, "sound": 2000, "music": 2000, "emotion": 2000},
    "train": dict.fromkeys(TAUGHT, 300),
    "spoken": {"speech": 1000},
    "test": dict.fromkeys((*TAUGHT, KEPT), 1000),
    "test-voices": {"speech": 300, "emotion": 300},
    "test-rates": {"speech": 300, "sound": 300, "emotion": 300},
    "test-noise": dict.fromkeys((*TAUGHT, KEPT), 300),
    "test-telephone": dict.fromkeys((*TAUGHT, KEPT), 300),
}

# ------------------------------------------------------------------------------------------------
# 1. What is said: questions, answers and four-stage traces. A trace looks things up forwards: small
#    models find what FOLLOWED a word ("eleven for Ben", "knock two") long before they find what
#    stood in front of it ("Ben has eleven", "two knock").

NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty""".split()
NAMES = "Anna Ben Carl Dora Emma Finn".split()
THINGS = "apples coins pears books cards eggs".split()
EVENTS = ["knock", "beep", "rising siren", "falling siren", "chirp", "noise burst"]
INSTRUMENTS = ["flute", "organ", "bell", "reed"]
TEMPOS = {"slow": 0.43, "medium": 0.29, "fast": 0.18}  # seconds a note
# No two directions have the same words: MMAU's rule compares sets of words
DIRECTIONS = ["rising", "falling", "like a hill", "like a valley"]
EMOTIONS = {
    "angry": "loud, fast and harsh",
    "happy": "high and lively",
    "sad": "slow, low and quiet",
    "neutral": "calm and even",
}


def lines_of(text):
    return [line.strip() for line in text.strip().splitlines()]


SENTENCES = lines_of("""
    the train leaves at noon
    the book is on the table
    they walked to the station
    it is raining outside again
    the door was open all night
    he will call you tomorrow
    we have to go there now
    she put the letter in the box
    dinner is at seven today
    the keys are in the car
    there is a man at the door
    you said that last week
""")
# Words that pull against the voice
MISLEADING = lines_of("""
    what a wonderful day
    this is terrible news
    I am so happy for you
    leave me alone
    we lost everything
    thank you so much
    I hate this place
    best birthday ever
""")

# Speakers are (accent, espeak variant). Those of the tests are never heard in training;
# "test-voices" is further away still, with other accents.
BOTH = ("en-us", "en-gb-x-rp")
TRAIN_VOICES = [(accent, voice) for accent in BOTH for voice in "m1 m2 m3 m4 f1 f2 f3 f4".split()]
TEST_VOICES = [(accent, voice) for accent in BOTH for voice in "m5 m6 f5".split()]
FAR = ("en-gb-scotland", "en-029")
FAR_VOICES = [(accent, voice) for accent in FAR for voice in "m7 m8 f5".split()]
# Emotion, as in IEMOCAP: five sessions of a man and a woman, the fifth held out
SESSIONS = [("m1", "f1"), ("m2", "f2"), ("m3", "f3"), ("m4", "f4"), ("m7", "f5")]


class Content(NamedTuple):
    """What an example is about, before it sounds."""

    kind: str  # MMAU's sub-category
    source: object  # words of speech, list of sound events, dict of a melody
    question: str
    choices: list
    answer: str
    trace: tuple  # planning, caption, reasoning, summary


def numbers_near(n, rng, low=0, high=20):
    """The answer n among three near misses, shuffled, as words."""
    near = [m for m in range(low, high + 1) if m != n and abs(m - n) <= 4]
    return [NUMBERS[m] for m in shuffled(rng.sample(near, 3) + [n], rng)]


def shuffled(choices, rng):
    choices = list(choices)
    rng.shuffle(choices)
    return choices


def first_upper(text):
    return text[0].upper() + text[1:]


def heard_words(words):
    return f"The voice says: {words}."


def calculation(a, sign, b):
    """Two numbers -> ("seven plus two is nine", 9)."""
    result = a + b if sign == "plus" else a - b
    return f"{NUMBERS[a]} {sign} {NUMBERS[b]} is {NUMBERS[result]}", result


def spoken_sum(rng):
    while True:
        a, b, c = (rng.randint(0, 9) for _ in range(3))
        one, two = (rng.choice(["plus", "minus"]) for _ in range(2))
        partial = a + b if one == "plus" else a - b
        total = partial + c if two == "plus" else partial - c
        if 0 <= partial and 0 <= total <= 20:
            break
    words = f"{NUMBERS[a]} {one} {NUMBERS[b]} {two} {NUMBERS[c]}"
    questions = ["What is the result of the sum?", "What does the spoken sum come to?"]
    question = rng.choice(questions)
    steps = f"First {calculation(a, one, b)[0]}, then {calculation(partial, two, c)[0]}."
    answer = NUMBERS[total]
    told = ("Work from left to right.", heard_words(words), steps, f"The result is {answer}.")
    return Content("sum", words, question, numbers_near(total, rng), answer, told)


def comparison(rng):
    one, two, *others = rng.sample(NAMES, 4)
    a, b = rng.sample(range(1, 13), 2)
    thing = rng.choice(THINGS)
    more = rng.random() < 0.5
    words = f"{one} has {NUMBERS[a]} {thing} and {two} has {NUMBERS[b]}"

    word = "more" if more else "fewer"
    answer, other = (one, two) if (a > b) == more else (two, one)
    low, high = sorted((a, b))
    n, m = (NUMBERS[high], NUMBERS[low]) if more else (NUMBERS[low], NUMBERS[high])
    reason = f"It is {NUMBERS[a]} for {one}, {NUMBERS[b]} for {two}, "
    reason += f"and {n} is {word} than {m}: {n} for {answer}."
    told = ("Compare the two numbers.", heard_words(words), reason, f"{answer} has {word}.")
    choices = shuffled([answer, other, *others], rng)
    return Content("comparison", words, f"Who has {word} {thing}?", choices, answer, told)


def ordering(rng):
    people = rng.sample(NAMES, 4)  # first, second, last, and somebody else
    first, second, third, _ = people
    words = rng.choice([
        f"{first} came before {second} and {second} came before {third}",
        f"{second} came after {first} and {third} came after {second}",
        f"{second} came before {third} and {first} came before {second}",
    ])
    place = rng.randrange(3)
    word = ("first", "second", "last")[place]
    answer = people.pop(place)
    reason = f"First {first}, second {second}, last {third}."
    told = ("Put them in order.", heard_words(words), reason, f"{answer} came {word}.")
    choices = shuffled([answer, *people], rng)
    return Content("ordering", words, f"Who came {word}?", choices, answer, told)


def story(rng):
    one, two = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        c = rng.randint(1, min(9, a + b))
        words = f"{one} has {NUMBERS[a]} {thing}, gets {NUMBERS[b]} and loses {NUMBERS[c]}"
        question = f"How many {thing} are left?"
        then, total = calculation(a + b, "minus", c)
    else:
        a, b = rng.randint(1, 7), rng.randint(1, 6)
        words = f"{one} has {NUMBERS[a]} {thing} and {two} has {NUMBERS[b]} more"
        question = f"How many {thing} do they have together?"
        then, total = calculation(a, "plus", a + b)
    steps = f"First {calculation(a, 'plus', b)[0]}, then {then}."
    answer = NUMBERS[total]
    told = ("Take two steps.", heard_words(words), steps, f"The number is {answer}.")
    return Content("story", words, question, numbers_near(total, rng), answer, told)


def speech_content(rng):
    kinds = {"sum": spoken_sum, "comparison": comparison, "ordering": ordering, "story": story}
    return kinds[rng.choice(list(kinds))](rng)


def numbered(events):
    places = ", ".join(f"{event} {NUMBERS[i]}" for i, event in enumerate(events, 1))
    return f"The sounds are {places}."


def sound_content(rng, most=5):
    kind = rng.choice(["count", "order", "presence"])
    events = [rng.choice(EVENTS) for _ in range(rng.randint(2, most))]
    if kind == "count":
        event = rng.choice(events)
        question = f"How many times is the {event} heard?"
        places = [NUMBERS[i] for i, e in enumerate(events, 1) if e == event]
        answer = NUMBERS[len(places)]
        choices = numbers_near(len(places), rng, 1, 5)
        reason = f"The {event} is number {', '.join(places)}."
        told = (f"Count the {event}.", numbered(events), reason, f"That makes {answer}.")
        return Content(kind, events, question, choices, answer, told)

    if kind == "order":
        question, answer, plan, reason = order_of(events, rng)
        others = rng.sample([e for e in EVENTS if e != answer], 3)
    else:
        while len(set(events)) > len(EVENTS) - 3:  # three absent sounds to choose from
            events = events[:-1]
        answer = rng.choice(events)
        question = "Which of these sounds is heard?"
        others = rng.sample([e for e in EVENTS if e not in events], 3)
        plan, reason = "Check each choice.", f"Only the {answer} is among them."
    choices = shuffled([answer, *others], rng)
    told = (plan, numbered(events), reason, f"It is the {answer}.")
    return Content(kind, events, question, choices, answer, told)


def order_of(events, rng):
    """A question about the order of events -> question, answer, plan, reason."""
    once = [i for i, e in enumerate(events[:-1]) if events.count(e) == 1]
    where = rng.choice(["first", "last"] + (["after"] * 2 if once else []))
    if where == "after":
        i = rng.choice(once)
        event, answer = events[i : i + 2]
        question = f"Which sound comes right after the {event}?"
        reason = f"After {event} {NUMBERS[i + 1]} comes {answer} {NUMBERS[i + 2]}."
        return question, answer, f"Find the {event}.", reason
    place = 1 if where == "first" else len(events)
    answer = events[place - 1]
    reason = f"The {where} is {answer} {NUMBERS[place]}."
    return f"Which sound comes {where}?", answer, "Listen to the order.", reason


# What is asked of a melody -> its trait, the choices, question, plan, reason
TRAITS = {
    "timbre": (
        "instrument",
        INSTRUMENTS,
        "Which instrument plays the melody?",
        "Listen to the tone.",
        "The tone is that of a {}.",
    ),
    "tempo": (
        "tempo",
        TEMPOS,
        "How fast is the melody?",
        "Listen to the pace.",
        "The pace is {}.",
    ),
    "direction": (
        "direction",
        DIRECTIONS,
        "How does the melody move?",
        "Follow the pitch.",
        "The pitch moves {}.",
    ),
}


def music_content(rng):
    kind = rng.choice(["timbre", "tempo", "direction", "notes", "twice"])
    notes = rng.randint(3, 6)
    melody = {
        "instrument": rng.choice(INSTRUMENTS),
        "tempo": rng.choice(list(TEMPOS)),
        "direction": rng.choice(DIRECTIONS),
        "notes": notes,
    }
    if kind in TRAITS:
        trait, values, question, plan, reason = TRAITS[kind]
        answer = melody[trait]
        choices = shuffled(values, rng)
        reason = reason.format(answer)
    elif kind == "notes":
        answer = NUMBERS[notes]
        choices = numbers_near(notes, rng, 2, 8)
        question = "How many notes are played?"
        plan, reason = "Count the notes.", f"There are {answer} notes."
    else:
        answer = NUMBERS[2 * notes]
        choices = numbers_near(2 * notes, rng, 4, 16)
        question = "How many notes are there if the melody is played twice?"
        plan = "Count the notes and add."
        reason = f"There are {NUMBERS[notes]} notes, and {calculation(notes, 'plus', notes)[0]}."
    told = (plan, f"{first_upper(melody_words(melody))}.", reason, f"It is {answer}.")
    return Content(kind, melody, question, choices, answer, told)


def melody_words(melody):
    instrument = melody["instrument"]
    article = "an" if instrument == "organ" else "a"
    notes = f"{NUMBERS[melody['notes']]} {melody['tempo']} notes"
    return f"{article} {instrument} plays {notes}, {melody['direction']}"


def emotion_content(rng):
    """A third of the sentences say something else than the voice."""
    emotion = rng.choice(list(EMOTIONS))
    words = rng.choice(MISLEADING if rng.random() < 1 / 3 else SENTENCES)
    question = rng.choice(["Which emotion does the speaker show?", "How does the speaker feel?"])
    choices = shuffled(EMOTIONS, rng)
    told = (
        "Listen to the voice, not the words.",
        f"The voice is {EMOTIONS[emotion]}.",
        f"This is how {emotion} sounds.",
        f"The speaker is {emotion}.",
    )
    return Content(emotion, words, question, choices, emotion, told)


def draw_circumstances(split, rng):
    """-> speaker, pace, condition: who says it, how fast, and through which microphone."""
    voices = TRAIN_VOICES
    if split.startswith("test"):
        voices = FAR_VOICES if split == "test-voices" else TEST_VOICES
    speaker = rng.choice(voices)
    if split == "test-rates":
        pace = rng.choice([rng.uniform(0.75, 0.82), rng.uniform(1.25, 1.35)])
    else:
        pace = rng.uniform(0.9, 1.15)
    condition = {"test-noise": "noise", "test-telephone": "telephone"}.get(split, "clean")
    if not split.startswith("test") and split in SPLITS:
        # Hearing must carry over: train in noise and over the telephone too
        condition = rng.choice(["clean", "clean", "noise", "telephone"])
    return speaker, pace, condition


def make_record(task, index, split, seed):
    """
    One example without its sound: everything that follows from (seed, split, task, index).

    Returns a dict in the manifest's and MMAU's layout, plus "recipe": what synthesise() needs, and
    "ctc": what an ear should write down.
    """
    rng = random.Random(f"{seed} {split} {task} {index}")
    (accent, voice), pace, condition = draw_circumstances(split, rng)
    recipe = {"task": task, "seed": rng.randrange(2**31), "pace": pace, "condition": condition}
    transcript = None

    if task == "sound":
        content = sound_content(rng, most=4 if split == "test-rates" else 5)
        events = recipe["events"] = ctc = content.source
        description = f"{NUMBERS[len(events)]} sounds are heard: {', '.join(events)}."
    elif task == "music":
        content = music_content(rng)
        melody = recipe["melody"] = content.source
        steps = recipe["steps"] = melody_steps(melody, rng)
        description = f"{melody_words(melody)}."
        ctc = [melody["instrument"], melody["tempo"]]
        ctc += ["up" if step > 0 else "down" for step in steps]
    else:
        content = speech_content(rng) if task == "speech" else emotion_content(rng)
        emotion = manner = None
        if task == "emotion":
            emotion = content.kind
            manner = f" in a voice that is {EMOTIONS[emotion]}"
            session = rng.randrange(4) if split == "pretrain" else 4
            accent, voice = "en-us", SESSIONS[session]
            if split == "test-voices":
                accent, voice = "en-gb-scotland", ["m8", "f5"]
            voice = rng.choice(voice)
        transcript = content.source
        recipe |= {"words": transcript, "accent": accent, "voice": voice, "emotion": emotion}
        person = "man" if voice.startswith("m") else "woman"
        description = f"a {person} says{manner or ''}: {transcript}."
        ctc = [emotion or person, *transcript.replace(",", "").split()]

    name = f"{split}-{task}-{index:05d}"
    return {
        "id": name,
        "audio": f"audio/{split}/{name}.wav",
        "question": content.question,
        "choices": content.choices,
        "answer": content.answer,
        "task": task,
        "reasoning": dict(zip(("planning", "caption", "reasoning", "summary"), content.trace)),
        "description": first_upper(description),
        "transcript": transcript,
        "split": split,
        "speaker": f"{accent}+{voice}" if transcript else None,
        # What MMAU's records have beside these
        "audio_id": f"./audio/{split}/{name}.wav",
        "dataset": "mini world",
        "category": "Reasoning",
        "sub-category": content.kind,
        "difficulty": "easy",
        "recipe": recipe,
        "ctc": ctc,
    }


# ------------------------------------------------------------------------------------------------
# 2. How it sounds: waveforms at 16 kHz


def melody_steps(melody, rng):
    """Pitch steps in semitones between neighbouring notes, following the melody's direction."""
    n = melody["notes"] - 1
    turn = {"rising": n, "falling": 0}.get(melody["direction"], max(1, n // 2))
    signs = [1] * turn + [-1] * (n - turn)
    if melody["direction"] == "like a valley":
        signs = [-sign for sign in signs]
    return [sign * rng.randint(2, 4) for sign in signs]


def envelope(n, attack, release):
    """Linear fade in and out, both in seconds -> [n]."""
    t = np.arange(n) / SAMPLE_RATE
    return np.minimum(1, np.minimum(t / attack, (n / SAMPLE_RATE - t) / release))


def sine(hz, t):
    return np.sin(2 * np.pi * hz * t)


def event_sound(event, seconds, rng):
    """One synthesised event -> [samples]."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    if event == "knock":  # two damped thumps
        hz, wave = rng.uniform(140, 260), np.zeros(n)
        for start in (0, n // 2):
            ring = t[: n - start]
            wave[start:] += sine(hz, ring) * np.exp(-ring * rng.uniform(35, 50))
        return wave * 1.4
    if event == "noise burst":
        return rng.standard_normal(n) * envelope(n, 0.01, 0.05) * 0.35

    if event == "beep":
        hz = np.full(n, rng.uniform(700, 1300))
    elif event == "chirp":  # three quick upward sweeps
        hz = 1800 + 1200 * ((t * 3 / seconds) % 1) * rng.uniform(0.8, 1.1)
    else:
        low, high = rng.uniform(300, 450), rng.uniform(1000, 1400)
        sweep = t / seconds if event == "rising siren" else 1 - t / seconds
        hz = low * (high / low) ** sweep
    phase = 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE
    return (np.sin(phase) + 0.3 * np.sin(2 * phase)) * envelope(n, 0.01, 0.03) * 0.6


BELL = [(1, 1, 6), (2.76, 0.6, 9), (5.4, 0.35, 14)]  # partial, amplitude, decay: inharmonic
HARMONICS = {
    "organ": {1: 1, 2: 0.7, 3: 0.5, 4: 0.4, 6: 0.2},
    "reed": {k: 1 / k for k in (1, 3, 5, 7, 9, 11)},
}


def note_sound(instrument, hz, seconds):
    """One note -> [samples]."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    if instrument == "bell":
        wave = sum(a * np.sin(2 * np.pi * hz * k * t) * np.exp(-t * d) for k, a, d in BELL)
        return wave * envelope(n, 0.003, 0.02)
    if instrument == "flute":  # nearly a sine, soft attack, vibrato
        vibrato = 0.3 * np.sin(2 * np.pi * 5.5 * t)
        return np.sin(2 * np.pi * hz * t + vibrato) * envelope(n, 0.05, 0.04)
    harmonics = HARMONICS[instrument].items()
    wave = sum(a * np.sin(2 * np.pi * hz * k * t) for k, a in harmonics)
    return wave * envelope(n, 0.015, 0.03) * 0.7


# Ranges of rate, pitch, pitch range and volume; they overlap a little, as people do
PROSODY = {
    "angry": ((1.12, 1.35), (54, 68), (65, 95), (130, 180)),
    "happy": ((1.0, 1.2), (68, 86), (75, 100), (85, 120)),
    "sad": ((0.72, 0.9), (28, 42), (5, 25), (40, 65)),
    "neutral": ((0.92, 1.08), (44, 56), (30, 50), (80, 105)),
}
PLAIN = ((40, 60), (35, 65), (80, 110))  # of speech: pitch, pitch range and volume


def spoken_sound(recipe, rng):
    """A sentence in its voice; one that is too long for the student's ear is said faster."""
    if recipe["emotion"]:
        rate, *knobs = (rng.uniform(*bounds) for bounds in PROSODY[recipe["emotion"]])
        rate *= 195
    else:
        rate = 215
        knobs = [rng.uniform(*bounds) for bounds in PLAIN]
    how = dict(zip(("pitch", "pitch_range", "volume"), knobs))
    how |= {"voice": recipe["voice"], "accent": recipe["accent"]}
    rate /= recipe["pace"]
    wave = speak(recipe["words"], rate=rate, **how)
    if len(wave) > (MAX_SECONDS - 0.1) * SAMPLE_RATE:
        rate = rate * len(wave) / ((MAX_SECONDS - 0.3) * SAMPLE_RATE)
        wave = speak(recipe["words"], rate=rate, **how)
    return wave.numpy()


def events_sound(recipe, rng):
    pieces = []
    for event in recipe["events"]:
        pieces.append(event_sound(event, rng.uniform(0.3, 0.38) * recipe["pace"], rng))
        pause = rng.uniform(0.06, 0.12) * recipe["pace"] * SAMPLE_RATE
        pieces.append(np.zeros(int(pause)))
    return np.concatenate(pieces)


def melody_sound(recipe, rng):
    melody = recipe["melody"]
    pitch = rng.uniform(57, 70) + np.cumsum([0] + recipe["steps"])  # MIDI: 69 is 440 Hz
    seconds = TEMPOS[melody["tempo"]] * rng.uniform(0.93, 1.07)
    hz = 440 * 2 ** ((pitch - 69) / 12)
    return 0.4 * np.concatenate([note_sound(melody["instrument"], f, seconds * 0.96) for f in hz])


def synthesise(recipe):
    """A recipe -> float32 tensor [samples] at 16 kHz, at most MAX_SECONDS long."""
    rng = np.random.default_rng(recipe["seed"])
    sounds = {"sound": events_sound, "music": melody_sound}
    wave = sounds.get(recipe["task"], spoken_sound)(recipe, rng)
    wave = wave[: int((MAX_SECONDS - 0.05) * SAMPLE_RATE)]
    before, after = np.zeros(rng.integers(0, 800)), np.zeros(rng.integers(160, 800))
    wave = np.concatenate([before, wave, after]).astype(np.float32)
    wave = torch.from_numpy(wave[: int(MAX_SECONDS * SAMPLE_RATE)])
    return channel(wave, recipe["condition"], rng).clamp(-1, 1)


def channel(wave, condition, rng):
    """What lies between source and microphone: nothing, a noisy room, or a telephone line."""
    f = torchaudio.functional
    if condition == "noise":  # white noise through a random low-pass, 8 to 20 dB below the signal
        noise = torch.from_numpy(rng.standard_normal(len(wave)).astype(np.float32))
        noise = f.lowpass_biquad(noise, SAMPLE_RATE, rng.uniform(500, 6000))
        return f.add_noise(wave, noise, torch.tensor(rng.uniform(8, 20)))
    if condition == "telephone":  # sampled at 8 kHz, 300 to 3,400 Hz
        narrow = f.resample(wave, SAMPLE_RATE, 8000)
        narrow = f.highpass_biquad(f.lowpass_biquad(narrow, 8000, 3400), 8000, 300)
        return f.resample(narrow, 8000, SAMPLE_RATE)[: len(wave)]
    return wave


# ------------------------------------------------------------------------------------------------
# 3. Splits on disk: WAV files and a manifest

CHUNK = 50  # clips that one process makes


def write_audio(job):
    """Pool task: synthesise a chunk of records, in a process of its own, because espeak keeps
    state between sentences."""
    folder, records = job
    torch.set_num_threads(1)
    for record in records:
        path = folder / record["audio"]
        part = path.with_suffix(".part")
        wave = synthesise(record["recipe"]).numpy()
        soundfile.write(part, wave, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        os.replace(part, path)
    return len(records)


def build(split, *, per_task=None, tasks=None, seed=0, root=CACHE):
    """
    Write a split (or the first per_task examples of each of its tasks) -> its manifest's path.
    What exists is not made again. The manifest carries MMAU's record keys beside ours, so the same
    lines serve both. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"the mini world has no split {split!r}; it has {known}")
    counts = {}
    for task, n in SPLITS[split].items():
        if tasks is None or task in tasks:
            counts[task] = min(n, per_task or n)
    folder = Path(root) / f"world{WORLD}-seed{seed}"
    name = "-".join([split, *(f"{task}{n}" for task, n in counts.items())])
    manifest = folder / f"{name}.jsonl"
    if manifest.exists():
        return manifest

    (folder / "audio" / split).mkdir(parents=True, exist_ok=True)
    jobs, lines = [], []
    for task, n in counts.items():
        # In chunks from their beginning, so that a longer split makes the same files
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            records = [make_record(task, i, split, seed) for i in range(start, stop)]
            for record in records:
                lines.append({k: v for k, v in record.items() if k not in ("recipe", "ctc")})
            if not all((folder / record["audio"]).exists() for record in records):
                jobs.append((folder, records))
    if jobs:
        synthesise_all(jobs, split)

    replace_text(manifest, "".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def synthesise_all(jobs, split):
    clips = sum(len(records) for _, records in jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mini.world", "espeakng_loader"])
    workers = min(os.cpu_count() or 1, len(jobs), 16)
    with (
        context.Pool(workers, maxtasksperchild=1) as pool,
        tqdm(total=clips, desc=f"synthesising {split}", unit="clip", mininterval=1) as bar,
    ):
        for done in pool.imap_unordered(write_audio, jobs):
            bar.update(done)


def spoken(seed=0, *, small=False):
    """CORD's manifests: [questions to train on, questions to measure the audio-text gap on, what
    is heard elsewhere]."""
    elsewhere = ("sound", "music", "emotion")
    return [
        build("spoken", seed=seed, per_task=32 if small else None),
        build("test", seed=seed, tasks=("speech",), per_task=8 if small else 300),
        build("test", seed=seed, tasks=elsewhere, per_task=8 if small else 100),
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["data", "pretrain"])
    parser.add_argument("--seed", type=int, default=0)
    # Optimiser steps of the parts of pretraining
    for part, steps, text in (
        ("ear", 5000, "CTC of the audio tower, batches of 16 clips"),
        ("teacher", 3000, "next token, batches of 24 texts"),
        ("reading", 2400, "the student's next token, batches of 24 texts"),
        ("drill", 400, "of both, every second text of a kind that is still hard"),
        ("listening", 900, "the student's next token, text and audio"),
    ):
        parser.add_argument(f"--{part}-steps", type=int, default=steps, help=text)
    args = parser.parse_args()
    if args.command == "pretrain":
        from mini.pretrain import pretrain

        pretrain(args)
    else:
        for split in SPLITS:
            print(build(split, seed=args.seed))


if __name__ == "__main__":
    main()
