"""
A world small enough to see everything: real waveforms, real transformers architectures, two cores.

What this file teaches: what a model needs before reasoning can be distilled into it. The world has four tasks. Speech (spoken sums,
comparisons, orderings, two-step stories), sound (sequences of events), music (short melodies) are what is TAUGHT: their
training examples carry a four-stage reasoning trace. Emotion (how a sentence is said) is what must be KEPT: it is in
the student's pretraining only, never in the distillation set, so a fall there is forgetting.

Two tiny models live in it, in the papers' proportions: the student is a Qwen2-Audio with 7 decoder layers, the teacher a wider
Qwen3 with 9 (28:36). The teacher reads descriptions and reasons better than the student; the student describes what it hears well, but
has hardly practised answering questions about sound: that is the room to be taught. mini/figures.json holds what each can do.

    python -m mini.world data                 # synthesise every split (train_source_layer.py makes only those it needs)
    python -m mini.world pretrain             # rebuild mini/student and mini/teacher (a GPU if there is one)

Everything comes from --seed. Audio is cached under runs/mini_world/. Test speakers and seeds are disjoint from training.
"""
import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, Qwen3ForCausalLM,
                          WhisperFeatureExtractor)

from data import (Example, audio_prompt, encode_response, parse_response, prompt_batch, question_text, read_manifest, response_text,
                  text_prompt, turn_end_id)
from models import load_audio_model, load_text_model
from lab.shapes import STUDENT_SPECIALS, STUDENT_TEMPLATE, TEACHER_SPECIALS, TEACHER_TEMPLATE
from prepare.speak import SAMPLE_RATE, speak

WORLD = 2                       # part of the cache's name: raise it when the same seed gives another world
MINI = Path(__file__).resolve().parent
CACHE = Path("runs") / "mini_world"
MAX_SECONDS = 3.0               # what the student's audio tower holds: 300 mel frames, 75 audio tokens
TAUGHT, KEPT = ("speech", "sound", "music"), "emotion"
# split -> examples per task. "pretrain" is heard by the student before any distillation; "train" is paper A's distillation set, "spoken" CORD's.
SPLITS = {
    "pretrain": {"speech": 4000, "sound": 2000, "music": 2000, "emotion": 2000},
    "train": {"speech": 300, "sound": 300, "music": 300},
    "spoken": {"speech": 1000},
    "test": {"speech": 1000, "sound": 1000, "music": 1000, "emotion": 1000},
    "test-voices": {"speech": 300, "emotion": 300},
    "test-rates": {"speech": 300, "sound": 300, "emotion": 300},
    "test-noise": {"speech": 300, "sound": 300, "music": 300, "emotion": 300},
    "test-telephone": {"speech": 300, "sound": 300, "music": 300, "emotion": 300},
}

# ---------------------------------------------------------------------------------------------------------------------------------
# 1. What is said: questions, answers and four-stage traces. A trace looks things up forwards: small models find what FOLLOWED a word ("eleven
#    for Ben", "knock two") long before they find what stood in front of it ("Ben has eleven", "two knock").

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
           "nineteen twenty").split()
NAMES = ["Anna", "Ben", "Carl", "Dora", "Emma", "Finn"]
THINGS = ["apples", "coins", "pears", "books", "cards", "eggs"]
EVENTS = ["knock", "beep", "rising siren", "falling siren", "chirp", "noise burst"]
INSTRUMENTS, TEMPOS = ["flute", "organ", "bell", "reed"], {"slow": 0.43, "medium": 0.29, "fast": 0.18}      # seconds a note
DIRECTIONS = ["rising", "falling", "like a hill", "like a valley"]      # no two of the same words: MMAU's rule compares sets
EMOTIONS = {"angry": "loud, fast and harsh", "happy": "high and lively", "sad": "slow, low and quiet", "neutral": "calm and even"}
SENTENCES = ["the train leaves at noon", "the book is on the table", "they walked to the station", "it is raining outside again",
             "the door was open all night", "he will call you tomorrow", "we have to go there now", "she put the letter in the box",
             "dinner is at seven today", "the keys are in the car", "there is a man at the door", "you said that last week"]
MISLEADING = ["what a wonderful day", "this is terrible news", "I am so happy for you", "leave me alone", "we lost everything",
              "thank you so much", "I hate this place", "best birthday ever"]       # words that pull against the voice
# (accent, espeak variant). The test's speakers are never heard in training; "test-voices" is further away still: other accents.
MEN, WOMEN = ["m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"], ["f1", "f2", "f3", "f4", "f5"]
TRAIN_VOICES = [(accent, voice) for accent in ("en-us", "en-gb-x-rp") for voice in ("m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4")]
TEST_VOICES = [(accent, voice) for accent in ("en-us", "en-gb-x-rp") for voice in ("m5", "m6", "f5")]
FAR_VOICES = [(accent, voice) for accent in ("en-gb-scotland", "en-029") for voice in ("m7", "m8", "f5")]
SESSIONS = [("m1", "f1"), ("m2", "f2"), ("m3", "f3"), ("m4", "f4"), ("m7", "f5")]   # emotion: a man and a woman each, the fifth held out


def numbers_near(n, rng, low=0, high=20):
    """The answer n among three near misses, shuffled, as words."""
    near = [m for m in range(low, high + 1) if m != n and abs(m - n) <= 4]
    choices = rng.sample(near, 3) + [n]
    rng.shuffle(choices)
    return [NUMBERS[m] for m in choices]


def shuffled(answer, others, rng):
    choices = [answer] + list(others)
    rng.shuffle(choices)
    return choices


def trace(planning, caption, reasoning, summary):
    return {"planning": planning, "caption": caption, "reasoning": reasoning, "summary": summary}


def first_upper(text):
    return text[0].upper() + text[1:]


def order_words(rng):
    """Who came when -> spoken words, [first, second, last, somebody else]."""
    people = rng.sample(NAMES, 4)
    first, second, third, _ = people
    return rng.choice([f"{first} came before {second} and {second} came before {third}",
                       f"{second} came after {first} and {third} came after {second}",
                       f"{second} came before {third} and {first} came before {second}"]), people


def speech_content(rng):
    """-> kind, spoken words, question, choices, answer, trace."""
    kind = rng.choice(["sum", "comparison", "ordering", "story"])
    if kind == "sum":
        while True:
            a, b, c = (rng.randint(0, 9) for _ in range(3))
            signs = [rng.choice(["plus", "minus"]) for _ in range(2)]
            first = a + b if signs[0] == "plus" else a - b
            total = first + c if signs[1] == "plus" else first - c
            if 0 <= first and 0 <= total <= 20:
                break
        words = f"{NUMBERS[a]} {signs[0]} {NUMBERS[b]} {signs[1]} {NUMBERS[c]}"
        question = rng.choice(["What is the result of the sum?", "What does the spoken sum come to?"])
        steps = (f"First {NUMBERS[a]} {signs[0]} {NUMBERS[b]} is {NUMBERS[first]}, "
                 f"then {NUMBERS[first]} {signs[1]} {NUMBERS[c]} is {NUMBERS[total]}.")
        return kind, words, question, numbers_near(total, rng), NUMBERS[total], trace(
            "Work from left to right.", f"The voice says: {words}.", steps, f"The result is {NUMBERS[total]}.")
    if kind == "comparison":
        one, two, *others = rng.sample(NAMES, 4)
        a, b = rng.sample(range(1, 13), 2)
        thing, more = rng.choice(THINGS), rng.random() < 0.5
        words = f"{one} has {NUMBERS[a]} {thing} and {two} has {NUMBERS[b]}"
        answer = one if (a > b) == more else two
        word, n, m = ("more", max(a, b), min(a, b)) if more else ("fewer", min(a, b), max(a, b))
        return kind, words, f"Who has {word} {thing}?", shuffled(answer, [two if answer == one else one] + others, rng), answer, trace(
            "Compare the two numbers.", f"The voice says: {words}.",
            f"It is {NUMBERS[a]} for {one}, {NUMBERS[b]} for {two}, and {NUMBERS[n]} is {word} than {NUMBERS[m]}: {NUMBERS[n]} for {answer}.",
            f"{answer} has {word}.")
    if kind == "ordering":
        words, people = order_words(rng)
        first, second, third, _ = people
        place = rng.randrange(3)
        answer = people[place]
        word = ("first", "second", "last")[place]
        return kind, words, f"Who came {word}?", shuffled(answer, [p for p in people if p != answer], rng), answer, trace(
            "Put them in order.", f"The voice says: {words}.", f"First {first}, second {second}, last {third}.", f"{answer} came {word}.")
    one, two = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        c = rng.randint(1, min(9, a + b))
        words = f"{one} has {NUMBERS[a]} {thing}, gets {NUMBERS[b]} and loses {NUMBERS[c]}"
        question, total = f"How many {thing} are left?", a + b - c
        steps = f"First {NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}, then {NUMBERS[a + b]} minus {NUMBERS[c]} is {NUMBERS[total]}."
    else:
        a, b = rng.randint(1, 7), rng.randint(1, 6)
        words = f"{one} has {NUMBERS[a]} {thing} and {two} has {NUMBERS[b]} more"
        question, total = f"How many {thing} do they have together?", a + a + b
        steps = f"First {NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}, then {NUMBERS[a]} plus {NUMBERS[a + b]} is {NUMBERS[total]}."
    return kind, words, question, numbers_near(total, rng), NUMBERS[total], trace(
        "Take two steps.", f"The voice says: {words}.", steps, f"The number is {NUMBERS[total]}.")


def numbered(events):
    return f"The sounds are {', '.join(f'{event} {NUMBERS[i + 1]}' for i, event in enumerate(events))}."


def sound_content(rng, most=5):
    """-> kind, the events, question, choices, answer, trace."""
    kind = rng.choice(["count", "order", "presence"])
    events = [rng.choice(EVENTS) for _ in range(rng.randint(2, most))]
    caption = numbered(events)
    if kind == "count":
        event = rng.choice(events)
        places = [NUMBERS[i + 1] for i, e in enumerate(events) if e == event]
        return kind, events, f"How many times is the {event} heard?", numbers_near(len(places), rng, 1, 5), NUMBERS[len(places)], trace(
            f"Count the {event}.", caption, f"The {event} is number {', '.join(places)}.", f"That makes {NUMBERS[len(places)]}.")
    if kind == "order":
        once = [i for i, e in enumerate(events[:-1]) if events.count(e) == 1]
        where = rng.choice(["first", "last"] + (["after"] * 2 if once else []))
        if where == "after":
            i = rng.choice(once)
            answer, question, plan = events[i + 1], f"Which sound comes right after the {events[i]}?", f"Find the {events[i]}."
            reason = f"After {events[i]} {NUMBERS[i + 1]} comes {answer} {NUMBERS[i + 2]}."
        else:
            answer = events[0] if where == "first" else events[-1]
            place = NUMBERS[1 if where == "first" else len(events)]
            question, plan, reason = f"Which sound comes {where}?", "Listen to the order.", f"The {where} is {answer} {place}."
        choices = shuffled(answer, rng.sample([e for e in EVENTS if e != answer], 3), rng)
        return kind, events, question, choices, answer, trace(plan, caption, reason, f"It is the {answer}.")
    while len(set(events)) > len(EVENTS) - 3:           # presence needs three absent sounds to choose from
        events = events[:-1]
    absent = [e for e in EVENTS if e not in events]
    caption = numbered(events)
    answer = rng.choice(events)
    return kind, events, "Which of these sounds is heard?", shuffled(answer, rng.sample(absent, 3), rng), answer, trace(
        "Check each choice.", caption, f"Only the {answer} is among them.", f"It is the {answer}.")


def music_content(rng):
    """-> kind, melody (dict), question, choices, answer, trace."""
    kind = rng.choice(["timbre", "tempo", "direction", "notes", "twice"])
    notes = rng.randint(3, 6)
    melody = {"instrument": rng.choice(INSTRUMENTS), "tempo": rng.choice(list(TEMPOS)), "direction": rng.choice(DIRECTIONS), "notes": notes}
    caption = f"{first_upper(melody_words(melody))}."
    if kind == "timbre":
        answer, question = melody["instrument"], "Which instrument plays the melody?"
        choices = shuffled(INSTRUMENTS[0], INSTRUMENTS[1:], rng)
        plan, reason = "Listen to the tone.", f"The tone is that of a {answer}."
    elif kind == "tempo":
        answer, question, choices = melody["tempo"], "How fast is the melody?", shuffled("slow", ["medium", "fast"], rng)
        plan, reason = "Listen to the pace.", f"The pace is {answer}."
    elif kind == "direction":
        answer, question, choices = melody["direction"], "How does the melody move?", shuffled(DIRECTIONS[0], DIRECTIONS[1:], rng)
        plan, reason = "Follow the pitch.", f"The pitch moves {answer}."
    elif kind == "notes":
        answer, question, choices = NUMBERS[notes], "How many notes are played?", numbers_near(notes, rng, 2, 8)
        plan, reason = "Count the notes.", f"There are {answer} notes."
    else:
        answer, question = NUMBERS[2 * notes], "How many notes are there if the melody is played twice?"
        choices = numbers_near(2 * notes, rng, 4, 16)
        plan = "Count the notes and add."
        reason = f"There are {NUMBERS[notes]} notes, and {NUMBERS[notes]} plus {NUMBERS[notes]} is {answer}."
    return kind, melody, question, choices, answer, trace(plan, caption, reason, f"It is {answer}.")


def melody_words(melody):
    article = "an" if melody["instrument"] == "organ" else "a"
    return f"{article} {melody['instrument']} plays {NUMBERS[melody['notes']]} {melody['tempo']} notes, {melody['direction']}"


def emotion_content(rng):
    """-> emotion, spoken words, question, choices, answer, trace. A third of the sentences say something else than the voice."""
    emotion = rng.choice(list(EMOTIONS))
    words = rng.choice(MISLEADING if rng.random() < 1 / 3 else SENTENCES)
    question = rng.choice(["Which emotion does the speaker show?", "How does the speaker feel?"])
    return emotion, words, question, shuffled("angry", ["happy", "sad", "neutral"], rng), emotion, trace(
        "Listen to the voice, not the words.", f"The voice is {EMOTIONS[emotion]}.", f"This is how {emotion} sounds.",
        f"The speaker is {emotion}.")


def make_record(task, index, split, seed):
    """
    One example of the world, without its sound: everything that follows from (seed, split, task, index).

    Returns a dict in the manifest's and MMAU's layout, plus "recipe": what synthesise() needs, "ctc": what an ear should write down.
    """
    rng = random.Random(f"{seed} {split} {task} {index}")
    voices = FAR_VOICES if split == "test-voices" else TEST_VOICES if split.startswith("test") else TRAIN_VOICES
    accent, voice = rng.choice(voices)
    pace = rng.uniform(0.9, 1.15) if split != "test-rates" else rng.choice([rng.uniform(0.75, 0.82), rng.uniform(1.25, 1.35)])
    condition = {"test-noise": "noise", "test-telephone": "telephone"}.get(split, "clean")
    if split in ("pretrain", "train", "spoken"):        # hearing must carry over: train in noise and over the telephone too
        condition = rng.choice(["clean", "clean", "noise", "telephone"])
    recipe = {"task": task, "seed": rng.randrange(2 ** 31), "pace": pace, "condition": condition}
    transcript = None
    if task == "speech":
        kind, transcript, question, choices, answer, reasoning = speech_content(rng)
    elif task == "emotion":
        kind, transcript, question, choices, answer, reasoning = emotion_content(rng)
        session = rng.randrange(4) if split == "pretrain" else 4
        accent, voice = ("en-gb-scotland", rng.choice(["m8", "f5"])) if split == "test-voices" else ("en-us", rng.choice(SESSIONS[session]))
    if task in ("speech", "emotion"):
        person = "man" if voice.startswith("m") else "woman"
        recipe |= {"words": transcript, "accent": accent, "voice": voice, "emotion": kind if task == "emotion" else None}
        manner = f" in a voice that is {EMOTIONS[kind]}" if task == "emotion" else ""
        description = f"A {person} says{manner}: {transcript}."
        ctc = [kind if task == "emotion" else person] + transcript.replace(",", "").split()
    elif task == "sound":
        kind, events, question, choices, answer, reasoning = sound_content(rng, most=4 if split == "test-rates" else 5)
        recipe["events"] = events
        description, ctc = f"{first_upper(NUMBERS[len(events)])} sounds are heard: {', '.join(events)}.", events
    else:
        kind, melody, question, choices, answer, reasoning = music_content(rng)
        recipe["melody"] = melody
        recipe["steps"] = steps = melody_steps(melody, rng)
        description = f"{first_upper(melody_words(melody))}."
        ctc = [melody["instrument"], melody["tempo"]] + ["up" if s > 0 else "down" for s in steps]
    name = f"{split}-{task}-{index:05d}"
    return {
        "id": name, "audio": f"audio/{split}/{name}.wav", "question": question, "choices": choices, "answer": answer, "task": task,
        "reasoning": reasoning, "description": description, "transcript": transcript, "split": split,
        "speaker": f"{accent}+{voice}" if transcript else None,
        "audio_id": f"./audio/{split}/{name}.wav", "dataset": "mini world", "category": "Reasoning", "sub-category": kind,
        "difficulty": "easy", "recipe": recipe, "ctc": ctc,
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. How it sounds: waveforms at 16 kHz

def melody_steps(melody, rng):
    """Pitch steps in semitones between neighbouring notes, following the melody's direction."""
    n = melody["notes"] - 1
    turn = {"rising": n, "falling": 0}.get(melody["direction"], max(1, n // 2))
    signs = [1] * turn + [-1] * (n - turn) if melody["direction"] != "like a valley" else [-1] * turn + [1] * (n - turn)
    return [sign * rng.randint(2, 4) for sign in signs]


def envelope(n, attack, release):
    """Linear fade in and out, both in seconds -> [n]."""
    t = np.arange(n) / SAMPLE_RATE
    return np.minimum(1, np.minimum(t / attack, (n / SAMPLE_RATE - t) / release))


def event_sound(event, seconds, rng):
    """One synthesised event -> [samples]."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    if event == "knock":                                # two damped thumps
        hz, wave = rng.uniform(140, 260), np.zeros(n)
        for start in (0, n // 2):
            ring = t[:n - start]
            wave[start:] += np.sin(2 * np.pi * hz * ring) * np.exp(-ring * rng.uniform(35, 50))
        return wave * 1.4
    if event == "noise burst":
        return rng.standard_normal(n) * envelope(n, 0.01, 0.05) * 0.35
    if event == "beep":
        hz = np.full(n, rng.uniform(700, 1300))
    elif event == "chirp":                              # three quick upward sweeps
        hz = 1800 + 1200 * ((t * 3 / seconds) % 1) * rng.uniform(0.8, 1.1)
    else:
        low, high = rng.uniform(300, 450), rng.uniform(1000, 1400)
        sweep = t / seconds if event == "rising siren" else 1 - t / seconds
        hz = low * (high / low) ** sweep
    phase = 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE
    return (np.sin(phase) + 0.3 * np.sin(2 * phase)) * envelope(n, 0.01, 0.03) * 0.6


def note_sound(instrument, hz, seconds):
    """One note -> [samples]."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    if instrument == "bell":                            # inharmonic partials that die away
        wave = sum(a * np.sin(2 * np.pi * hz * k * t) * np.exp(-t * d) for k, a, d in ((1, 1, 6), (2.76, 0.6, 9), (5.4, 0.35, 14)))
        return wave * envelope(n, 0.003, 0.02)
    if instrument == "flute":                           # nearly a sine, soft attack, vibrato
        return np.sin(2 * np.pi * hz * t + 0.3 * np.sin(2 * np.pi * 5.5 * t)) * envelope(n, 0.05, 0.04)
    harmonics = {"organ": {1: 1, 2: 0.7, 3: 0.5, 4: 0.4, 6: 0.2}, "reed": {k: 1 / k for k in (1, 3, 5, 7, 9, 11)}}[instrument]
    return sum(a * np.sin(2 * np.pi * hz * k * t) for k, a in harmonics.items()) * envelope(n, 0.015, 0.03) * 0.7


def prosody(emotion, rng):
    """espeak's knobs for an emotion; the ranges overlap a little, as people do."""
    low_high = {"angry": ((1.12, 1.35), (54, 68), (65, 95), (130, 180)), "happy": ((1.0, 1.2), (68, 86), (75, 100), (85, 120)),
                "sad": ((0.72, 0.9), (28, 42), (5, 25), (40, 65)), "neutral": ((0.92, 1.08), (44, 56), (30, 50), (80, 105))}[emotion]
    rate, pitch, pitch_range, volume = (rng.uniform(*bounds) for bounds in low_high)
    return {"rate": 195 * rate, "pitch": pitch, "pitch_range": pitch_range, "volume": volume}


def synthesise(recipe):
    """A recipe -> float32 tensor [samples] at 16 kHz, at most MAX_SECONDS long."""
    rng = np.random.default_rng(recipe["seed"])
    pace = recipe["pace"]
    if recipe["task"] in ("speech", "emotion"):
        knobs = prosody(recipe["emotion"], rng) if recipe["emotion"] else {
            "rate": 215, "pitch": rng.uniform(40, 60), "pitch_range": rng.uniform(35, 65), "volume": rng.uniform(80, 110)}
        knobs["rate"] /= pace
        said = partial(speak, recipe["words"], voice=recipe["voice"], accent=recipe["accent"])
        wave = said(**knobs)
        if len(wave) > (MAX_SECONDS - 0.1) * SAMPLE_RATE:
            wave = said(**{**knobs, "rate": knobs["rate"] * len(wave) / ((MAX_SECONDS - 0.3) * SAMPLE_RATE)})
        wave = wave.numpy()
    elif recipe["task"] == "sound":
        wave = np.concatenate([np.concatenate([event_sound(event, rng.uniform(0.3, 0.38) * pace, rng),
                                               np.zeros(int(rng.uniform(0.06, 0.12) * pace * SAMPLE_RATE))]) for event in recipe["events"]])
    else:
        melody, midi = recipe["melody"], rng.uniform(57, 70)
        hz = 440 * 2 ** ((midi + np.cumsum([0] + recipe["steps"]) - 69) / 12)
        seconds = TEMPOS[melody["tempo"]] * rng.uniform(0.93, 1.07)
        wave = np.concatenate([note_sound(melody["instrument"], f, seconds * 0.96) for f in hz]) * 0.4
    wave = wave[:int((MAX_SECONDS - 0.05) * SAMPLE_RATE)]
    wave = np.concatenate([np.zeros(rng.integers(0, 800)), wave, np.zeros(rng.integers(160, 800))]).astype(np.float32)
    wave = torch.from_numpy(wave[:int(MAX_SECONDS * SAMPLE_RATE)])
    return channel(wave, recipe["condition"], rng).clamp(-1, 1)


def channel(wave, condition, rng):
    """What lies between source and microphone: nothing, a noisy room, or an 8 kHz telephone line (300 to 3,400 Hz)."""
    if condition == "noise":                            # white noise through a random low-pass, 8 to 20 dB below the signal
        noise = torch.from_numpy(rng.standard_normal(len(wave)).astype(np.float32))
        noise = torchaudio.functional.lowpass_biquad(noise, SAMPLE_RATE, rng.uniform(500, 6000))
        return torchaudio.functional.add_noise(wave, noise, torch.tensor(rng.uniform(8, 20)))
    if condition == "telephone":
        narrow = torchaudio.functional.resample(wave, SAMPLE_RATE, 8000)
        narrow = torchaudio.functional.highpass_biquad(torchaudio.functional.lowpass_biquad(narrow, 8000, 3400), 8000, 300)
        return torchaudio.functional.resample(narrow, 8000, SAMPLE_RATE)[:len(wave)]
    return wave


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Splits on disk: WAV files and a manifest

def write_audio(job):
    """Pool task: synthesise a chunk of records. A fresh process for each chunk, because espeak keeps state between sentences."""
    folder, records = job
    torch.set_num_threads(1)
    for record in records:
        path = folder / record["audio"]
        soundfile.write(path.with_suffix(".part"), synthesise(record["recipe"]).numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        os.replace(path.with_suffix(".part"), path)
    return len(records)


def build(split, *, per_task=None, tasks=None, seed=0, root=CACHE):
    """
    Write a split (or the first per_task examples of each of its tasks) and return its manifest's path; what exists is not made again.

    Raises ValueError for an unknown split. The manifest carries MMAU's record keys beside ours, so the same lines serve both.
    """
    if split not in SPLITS:
        raise ValueError(f"the mini world has no split {split!r}; it has {', '.join(SPLITS)}")
    folder = Path(root) / f"world{WORLD}-seed{seed}"
    counts = {task: min(n, per_task or n) for task, n in SPLITS[split].items() if tasks is None or task in tasks}
    manifest = folder / f"{split}-{'-'.join(f'{task}{n}' for task, n in counts.items())}.jsonl"
    if manifest.exists():
        return manifest
    (folder / "audio" / split).mkdir(parents=True, exist_ok=True)
    chunk = 50
    jobs, lines = [], []
    for task, n in counts.items():
        for start in range(0, n, chunk):                # whole chunks, so that a longer split later finds the same files
            records = [make_record(task, i, split, seed) for i in range(start, min(start + chunk, SPLITS[split][task]))]
            lines += records[:n - start]
            if not all((folder / r["audio"]).exists() for r in records):
                jobs.append((folder, records))
    if jobs:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mini_world"])
        with context.Pool(min(os.cpu_count() or 1, len(jobs), 16), maxtasksperchild=1) as pool, \
                tqdm(total=sum(len(records) for _, records in jobs), desc=f"synthesising {split}", unit="clip", mininterval=1) as bar:
            for done in pool.imap_unordered(write_audio, jobs):
                bar.update(done)
    text = "".join(json.dumps({k: v for k, v in r.items() if k not in ("recipe", "ctc")}) + "\n" for r in lines)
    manifest.with_suffix(".part").write_text(text, encoding="utf-8")
    os.replace(manifest.with_suffix(".part"), manifest)
    return manifest


def spoken(seed=0, *, small=False):
    """CORD's manifests: [questions to train on, questions to measure the audio-text gap on, what is heard elsewhere]."""
    make = partial(build, seed=seed)
    return [make("spoken", per_task=32 if small else None), make("test", tasks=("speech",), per_task=8 if small else 300),
            make("test", tasks=("sound", "music", "emotion"), per_task=8 if small else 100)]


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. Two tiny models in the hub's layout: a Qwen2-Audio student and a Qwen3 teacher

def as_example(record, **changes):
    """A record as the Example that data.py's prompt functions read."""
    names = {field.name for field in dataclasses.fields(Example)}
    fields = {name: value for name, value in record.items() if name in names}
    return Example(**{**fields, "where": record["id"], **changes})


def describe(record):
    """The same clip as a captioning example."""
    return as_example(record, question="Describe the audio.", choices=[], answer=record["description"], reasoning=None)


def make_tokenizers(seed):
    """Byte-level BPE over the world's texts -> (student's, teacher's): the same words, other special tokens, as Qwen2-Audio and Qwen3."""
    corpus = ["user\n", "assistant\n"] * 100
    for task in SPLITS["pretrain"]:
        for i in range(3000):
            record = make_record(task, i, "tokenizer", seed)
            asked, described = as_example(record), describe(record)
            corpus += [question_text(asked), response_text(asked), response_text(described), "\n" + record["description"]]
    made = []
    for specials, template in ((STUDENT_SPECIALS, STUDENT_TEMPLATE), (TEACHER_SPECIALS, TEACHER_TEMPLATE)):
        bpe = Tokenizer(models.BPE())
        # a tag of the four-stage trace stays in one piece, so that the tiny models' sequences stay short
        pieces = pre_tokenizers.Split(Regex(r"</?[A-Z]+>| ?\p{L}+| ?[^\s\p{L}]|\s"), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(corpus, trainers.BpeTrainer(
            vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
                                            model_max_length=512, clean_up_tokenization_spaces=False)
        tokenizer.add_special_tokens({"additional_special_tokens": specials})
        tokenizer.chat_template = template
        made.append(tokenizer)
    return made


def open_ears(tower, seed):
    """What from-scratch training of the audio tower needs and pretrained checkpoints bring along: sinusoids as positions, as in Whisper,
    and weights that pass a signal on (the library's 0.02 is meant for widths of thousands)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        half = tower.config.d_model // 2
        angle = torch.arange(tower.max_source_positions)[:, None] * torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        tower.embed_positions.weight.copy_(torch.cat([angle.sin(), angle.cos()], 1))
        for name, p in tower.named_parameters():
            if p.dim() >= 2 and "embed" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (2 if p.dim() == 3 else 1) ** 0.5 / p[0].numel() ** 0.5)
    tower.embed_positions.weight.requires_grad_(False)


def open_minds(model, seed):
    """The same for a decoder and its head: 1 over the root of the fan-in; what is added to the residual stream is smaller the deeper the
    model. From the library's 0.02 at half the learning rate, 350 steps of the teacher's reading leave twice the loss (0.16, not 0.07)."""
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.get_text_config().num_hidden_layers
    decoder = getattr(model.model, "language_model", model.model)
    with torch.no_grad():
        for name, p in [*decoder.named_parameters(), *model.lm_head.named_parameters()]:
            if p.dim() == 2:
                adds = "o_proj" in name or "down_proj" in name
                std = 0.1 if "embed" in name else p.shape[1] ** -0.5 * ((2 * layers) ** -0.5 if adds else 1)
                p.copy_(torch.randn(p.shape, generator=generator) * std)


def make_models(seed):
    """Untrained -> (student, processor, teacher, teacher's tokenizer). The configs are ordinary ones: only the numbers are small."""
    student_tokenizer, teacher_tokenizer = make_tokenizers(seed)
    ears = WhisperFeatureExtractor(feature_size=80, chunk_length=int(MAX_SECONDS))
    processor = Qwen2AudioProcessor(ears, student_tokenizer, chat_template=STUDENT_TEMPLATE)
    rows = lambda tokenizer: math.ceil(len(tokenizer) / 64) * 64      # as in the real pair, the embedding has padding rows
    ids = {"bos_token_id": None, "eos_token_id": student_tokenizer.eos_token_id, "pad_token_id": student_tokenizer.pad_token_id}
    torch.manual_seed(seed)
    student = Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(
        audio_config=dict(num_mel_bins=80, d_model=128, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=384,
                          max_source_positions=int(MAX_SECONDS * 50)),
        text_config=dict(model_type="qwen2", vocab_size=rows(student_tokenizer), hidden_size=128, intermediate_size=384,
                         num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         tie_word_embeddings=False, **ids),
        audio_token_index=processor.audio_token_id, **ids))
    open_ears(student.model.audio_tower, seed)
    teacher = Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=rows(teacher_tokenizer) + 64, hidden_size=160, intermediate_size=448, num_hidden_layers=9, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=False, **ids))
    open_minds(student, seed), open_minds(teacher, seed)
    return student, processor, teacher, teacher_tokenizer


# ---------------------------------------------------------------------------------------------------------------------------------
# 5. Pretraining: first the ear (CTC), then reading (next token), then listening. Trained end to end from scratch the decoder would never
#    listen: guessing from the text is the easier way down, so the audio tower learns to hear before anything reads it.

HARD = {"comparison", "count"}      # still wrong after 50,000 texts, because one token in fifty says which name goes with which number
MIX = {"text": 6, "describe": 12, "emotion": 5, "ask": 1}      # sequences a step of listening; few questions: there is room to be taught


def learning_rate(step, steps, peak):
    """Linear warm-up over the first 5 %, then a cosine to a tenth of the peak."""
    warm = max(1, steps // 20)
    return peak * min(1, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def optimise(name, steps, peak, parameters, loss_of_step):
    """AdamW over `parameters`; loss_of_step(step) returns a loss. Prints the running mean now and then."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    mean, start = None, time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 49 or step + 1 == steps:
            print(f"{name} {step + 1}/{steps} loss {mean:.4f} {time.time() - start:.0f} s", flush=True)


def load_split(split, processor, seed, **which):
    """Records and mel features of a split -> (records, mels [clips, 80, 300] in 16 bit, frames per clip after the tower's stride of 2)."""
    manifest = build(split, seed=seed, **which)
    records = [make_record(line["task"], int(line["id"][-5:]), split, seed) for line in map(json.loads, open(manifest, encoding="utf-8"))]
    mels, frames = [], []
    for start in tqdm(range(0, len(records), 64), desc=f"mel features of {split}"):
        waves = [soundfile.read(manifest.parent / r["audio"], dtype="float32")[0] for r in records[start:start + 64]]
        heard = processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, return_attention_mask=True, padding="max_length",
                                            return_tensors="pt")
        mels.append(heard["input_features"].half())
        frames += [(n - 1) // 2 + 1 for n in heard["attention_mask"].sum(-1).tolist()]
    return records, torch.cat(mels), torch.tensor(frames)


def hear(tower, mels, frames, device):
    """The audio tower as the full model runs it, padding masked -> [clips, 75, d_model]; frames // 2 of the 75 are sound."""
    seen = torch.arange(tower.max_source_positions, device=device)[None] < frames.to(device)[:, None]      # before pooling by 2
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None, None, :]
    return tower(mels.to(device).float(), attention_mask=mask.expand(-1, -1, seen.shape[1], -1)).last_hidden_state


def flat_start(record, frames, number):
    """A first guess at which word is heard in which frame, as in classical speech recognition: one after the other, spoken words as long
    as their letters, sounds and notes equally long; the last frame of each is silence. -> [frames]"""
    words = record["ctc"]
    lengths = [len(w) if record["transcript"] else 1 for w in words]
    ends = np.cumsum([0] + lengths) / sum(lengths) * frames
    guess = torch.zeros(frames, dtype=torch.long)
    for word, start, end in zip(words, ends, ends[1:]):
        guess[int(start):max(int(start) + 1, int(end) - 1)] = number[word]
    return guess


def ctc_words(records):
    """Everything an ear may write down -> {word: number}; 0 is CTC's blank."""
    return {word: i + 1 for i, word in enumerate(sorted({w for r in records for w in r["ctc"]}))}


def pretrain_ear(ear, records, mels, frames, *, steps, batch, seed, device):
    """CTC: words of speech, names of sounds, note steps, and a label for voice or emotion; ear: {"tower", "head"}. Every 25th clip is
    held out."""
    tower, head, number = ear["tower"], ear["head"], ctc_words(records)
    train = torch.tensor([i for i in range(len(records)) if i % 25])
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step):
        rows = train[torch.randint(len(train), (batch,), generator=generator)]
        clips = mels[rows].float()
        for low in torch.randint(0, 70, (2,), generator=generator).tolist():   # SpecAugment: two bands of the spectrum go missing
            clips[:, low:low + 6] = clips.amin((1, 2), keepdim=True)
        log_p = head(hear(tower, clips, frames[rows], device)).float().log_softmax(-1)               # [batch, 75, words + 1]
        targets = [torch.tensor([number[w] for w in records[i]["ctc"]]) for i in rows.tolist()]
        heard = (frames[rows] // 2).tolist()                            # audio tokens per clip
        ctc = F.ctc_loss(log_p.transpose(0, 1), torch.cat(targets).to(device), torch.tensor(heard, device=device),
                         torch.tensor([len(t) for t in targets], device=device), zero_infinity=True)
        trust = max(0.0, 2 - 4 * step / steps)      # guess where things are first, then let CTC find it (not measured apart)
        if trust == 0:
            return ctc
        guess = torch.cat([flat_start(records[i], n, number) for i, n in zip(rows.tolist(), heard)]).to(device)
        return ctc + trust * F.nll_loss(torch.cat([p[:n] for p, n in zip(log_p, heard)]), guess)

    tower.train()
    optimise("hearing", steps, 2.5e-3, [p for p in ear.parameters() if p.requires_grad], loss_of_step)


@torch.no_grad()
def written_down(ear, records, mels, frames, device):
    """Share of the held-out clips that the ear writes down without a fault -> {task: per cent}."""
    tower, words, exact = ear["tower"].eval(), [None, *ctc_words(records)], {}
    for rows in torch.arange(0, len(records), 25).split(100):
        best = ear["head"](hear(tower, mels[rows], frames[rows], device)).argmax(-1).cpu()
        for i, path in zip(rows.tolist(), best):
            path = torch.unique_consecutive(path[:frames[i] // 2])
            exact.setdefault(records[i]["task"], []).append([words[p] for p in path if p > 0] == records[i]["ctc"])
    return {task: round(100 * sum(hits) / len(hits), 1) for task, hits in exact.items()}


def pack(pairs, pad, device):
    """[(ids, labels)] -> input ids [batch, seq], attention mask, labels (-100 where nothing is learnt), padded on the right."""
    width = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in pairs])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in pairs])
    lengths = torch.tensor([len(row) for row, _ in pairs])
    return ids.to(device), (torch.arange(width)[None] < lengths[:, None]).long().to(device), labels.to(device)


def answered(prompt, response):
    """Ids of a prompt and of its response -> (ids, labels): the response is what is learnt."""
    return prompt + response, [-100] * len(prompt) + response


def read_loss(decoder, head, embeds, mask, labels):
    """Mean next-token cross-entropy over response tokens; the head runs on those alone. embeds [batch, seq, hidden]."""
    with torch.autocast(embeds.device.type, torch.bfloat16, enabled=embeds.is_cuda):
        hidden = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != -100
        return F.cross_entropy(head(hidden[:, :-1][wanted]).float(), labels[:, 1:][wanted])


def text_pair(tokenizer, rng, seed, kinds=None):
    """A fresh text-only example: words for the sound (mostly the description, sometimes the transcript), question, trace, answer."""
    while True:
        task = rng.choices(["speech", "sound", "music", "emotion"], [6, 4, 1, 1])[0]
        record = make_record(task, rng.randrange(10 ** 9), "reading", seed)
        if kinds is None or record["sub-category"] in kinds:
            break
    words = record["transcript"] if task == "speech" and rng.random() < 0.3 else record["description"]
    example = as_example(record)
    prompt = text_prompt(tokenizer, words, question_text(example))
    return answered(tokenizer(prompt, add_special_tokens=False)["input_ids"], encode_response(tokenizer, response_text(example)))


def pretrain_reading(name, decoder, head, tokenizer, *, steps, seed, device, drill=False):
    """Descriptions, questions, traces: text without end, every example new. The teacher's whole schooling, and the student's first.
    drill: every second text is of a HARD kind."""
    name += " drill" * drill
    rng = random.Random(f"{seed} {name}")

    def loss_of_step(step):
        pairs = [text_pair(tokenizer, rng, seed, HARD if drill and i % 2 else None) for i in range(24)]
        ids, mask, labels = pack(pairs, tokenizer.pad_token_id, device)
        return read_loss(decoder, head, decoder.embed_tokens(ids), mask, labels)

    decoder.train()
    optimise(name, steps, 1e-3 if drill else 3e-3, [*decoder.parameters(), *head.parameters()], loss_of_step)


def pretrain_listening(student, processor, records, mels, frames, *, steps, seed, device):
    """Describing and emotion from audio, and a little answering about sound, while reading goes on. The audio tower stays as it is."""
    rng, tokenizer, model = random.Random(f"{seed} listening"), processor.tokenizer, student.model
    with torch.no_grad():
        heard = torch.cat([hear(model.audio_tower, mels[i:i + 100], frames[i:i + 100], device).half().cpu()
                           for i in range(0, len(mels), 100)])
    tokens = frames // 2
    by_task = {task: [i for i, r in enumerate(records) if r["task"] == task] for task in SPLITS["pretrain"]}
    taught = [i for task in TAUGHT for i in by_task[task]]

    def audio_pair(i, example):
        prompt = audio_prompt(processor, question_text(example)).replace(processor.audio_token, processor.audio_token * int(tokens[i]))
        return answered(tokenizer(prompt, add_special_tokens=False)["input_ids"], encode_response(tokenizer, response_text(example)))

    def loss_of_step(step):
        pairs = [text_pair(tokenizer, rng, seed) for _ in range(MIX["text"])]
        ids, mask, labels = pack(pairs, tokenizer.pad_token_id, device)
        loss = read_loss(model.language_model, student.lm_head, model.get_input_embeddings()(ids), mask, labels)
        rows = [(rng.randrange(len(records)), describe) for _ in range(MIX["describe"])]
        rows += [(rng.choice(by_task[KEPT]), as_example) for _ in range(MIX["emotion"])]
        rows += [(rng.choice(taught), as_example) for _ in range(MIX["ask"])]
        ids, mask, labels = pack([audio_pair(i, make(records[i])) for i, make in rows], tokenizer.pad_token_id, device)
        sound = torch.cat([heard[i, :tokens[i]] for i, _ in rows]).to(device).float()                # [audio tokens, d_model]
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == processor.audio_token_id)[..., None], model.multi_modal_projector(sound).to(embeds.dtype))
        return loss + read_loss(model.language_model, student.lm_head, embeds, mask, labels)

    student.train()
    learns = [p for name, p in student.named_parameters() if p.requires_grad and "audio_tower" not in name]
    optimise("listening", steps, 1.5e-3, learns, loss_of_step)


@torch.no_grad()
def share_right(model, tokenizer, inputs, answers, *, whole=False):
    """Greedy answers to left-padded prompts -> per cent whose <RESPONSE> is right (whole: fraction of its words in place)."""
    model.eval()
    said = model.generate(**inputs, max_new_tokens=80, do_sample=False, eos_token_id=turn_end_id(tokenizer),
                          pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    responses = [parse_response(text)["response"] or "" for text in texts]
    if whole:
        return [sum(a == b for a, b in zip(response.split(), answer.split())) / len(answer.split())
                for response, answer in zip(responses, answers)]
    return [response == answer for response, answer in zip(responses, answers)]


def figures(student, processor, teacher, tokenizer, *, seed, device, per_task=300):
    """What the two models can do, on the test split -> {name: {task: per cent}}. Reading is scored on the same questions as listening."""
    manifest = build("test", seed=seed, per_task=per_task)
    examples = read_manifest(manifest)
    spoken = [dataclasses.replace(e, question="Describe the audio.", choices=[], answer=e.description, reasoning=None) for e in examples]
    hits = {}
    for start in tqdm(range(0, len(examples), 100), desc="scoring the pretrained models"):
        batch, said = examples[start:start + 100], spoken[start:start + 100]
        reading = partial(prompt_batch, batch, processor, view="text", words="description")
        for name, model, reader, chunk, inputs in (
                ("teacher reads", teacher, tokenizer, batch, reading(tokenizer=tokenizer)),
                ("student reads", student, processor.tokenizer, batch, reading()),
                ("student listens", student, processor.tokenizer, batch, prompt_batch(batch, processor)),
                ("student describes, words right", student, processor.tokenizer, said, prompt_batch(said, processor))):
            inputs = {k: v.to(device) for k, v in inputs.items()}
            right = share_right(model, reader, inputs, [e.answer for e in chunk], whole=name.endswith("words right"))
            for example, hit in zip(chunk, right):
                hits.setdefault(name, {}).setdefault(example.task, []).append(hit)
    return {name: {task: round(100 * sum(h) / len(h), 1) for task, h in tasks.items()} for name, tasks in hits.items()}


def stage(folder, name, module, train):
    """Train one part of the models, or take it from a run that finished it and was killed later on."""
    path = folder / f"{name}.safetensors"
    if path.exists():
        module.load_state_dict(load_file(path))
        print(f"{name}: found in {path}")
        return
    train()
    save_file({key: tensor.detach().contiguous() for key, tensor in module.state_dict().items()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def save_mini(name, model, reader):
    folder = MINI / name
    copy.deepcopy(model).half().save_pretrained(folder)
    reader.save_pretrained(folder)

    # The names that transformers 4 knows too: a run's checkpoints carry these files as they are
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(config, indent=2) + "\n")
    if hasattr(reader, "feature_extractor"):
        reader.feature_extractor.save_pretrained(folder)


def pretrain_teacher(folder, args, device):
    """The teacher's whole schooling is reading."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    _, _, teacher, tokenizer = make_models(args.seed)
    teacher.to(device)
    read = partial(pretrain_reading, "teacher", teacher.model, teacher.lm_head, tokenizer, seed=args.seed, device=device)
    stage(folder, "teacher", teacher, partial(read, steps=args.teacher_steps))
    stage(folder, "teacher-drill", teacher, partial(read, steps=args.drill_steps, drill=True))
    save_mini("teacher", teacher, tokenizer)


def pretrain_student(folder, args, device):
    """The student hears, then reads, then listens."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    student, processor, _, _ = make_models(args.seed)
    records, mels, frames = load_split("pretrain", processor, args.seed)
    tower = student.model.audio_tower
    ear = torch.nn.ModuleDict({"tower": tower, "head": torch.nn.Linear(tower.config.d_model, len(ctc_words(records)) + 1)})
    ear.to(device), student.to(device)
    same = dict(seed=args.seed, device=device)
    stage(folder, "ear", ear, partial(pretrain_ear, ear, records, mels, frames, steps=args.ear_steps, batch=16, **same))
    (folder / "heard.json").write_text(json.dumps(written_down(ear, records, mels, frames, device)))
    read = partial(pretrain_reading, "student", student.model.language_model, student.lm_head, processor.tokenizer, **same)
    stage(folder, "reader", student, partial(read, steps=args.reading_steps))
    stage(folder, "reader-drill", student, partial(read, steps=args.drill_steps, drill=True))
    stage(folder, "student", student, partial(pretrain_listening, student, processor, records, mels, frames,
                                              steps=args.listening_steps, **same))
    save_mini("student", student, processor)


def pretrain(args):
    """Rebuild mini/: teacher and student side by side, each with half of the cores; then say what they can do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = CACHE / f"pretrain{WORLD}-seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    build("pretrain", seed=args.seed)
    beside = multiprocessing.get_context("spawn").Process(target=pretrain_teacher, args=(folder, args, device))
    beside.start()
    try:
        pretrain_student(folder, args, device)
    finally:
        beside.join()
    if beside.exitcode:
        raise SystemExit("the teacher's pretraining failed (see above); run the command again, and it goes on with what is missing")
    (student, processor), (teacher, tokenizer) = load_audio_model(str(MINI / "student")), load_text_model(str(MINI / "teacher"))
    found = figures(student.to(device), processor, teacher.to(device), tokenizer, seed=args.seed, device=device)
    for name, tasks in found.items():
        print(f"{name:32}" + "".join(f"  {task} {value:5.1f}" for task, value in tasks.items()))
    (MINI / "figures.json").write_text(json.dumps({"heard": json.loads((folder / "heard.json").read_text()), **found}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["data", "pretrain"])
    parser.add_argument("--seed", type=int, default=0)
    # optimiser steps of the four parts of pretraining
    parser.add_argument("--ear-steps", type=int, default=5000, help="CTC of the audio tower, batches of 16 clips")
    parser.add_argument("--teacher-steps", type=int, default=3000, help="next token, batches of 24 texts")
    parser.add_argument("--reading-steps", type=int, default=2400, help="the student's next token, batches of 24 texts")
    parser.add_argument("--drill-steps", type=int, default=400, help="of both, every second text of a kind that is still hard")
    parser.add_argument("--listening-steps", type=int, default=900, help="the student's next token, text and audio")
    args = parser.parse_args()
    if args.command == "pretrain":
        pretrain(args)
    else:
        for split in SPLITS:
            print(build(split, seed=args.seed))


if __name__ == "__main__":
    main()
