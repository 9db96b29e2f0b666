"""
One example, two views, one response.

Both papers train what a model says after HEARING a clip towards what a model says after READING
words for that clip, token by token of the same response. This file makes the two inputs line up:

    audio view   | prompt: <audio> x N + question |  y1   y2   ...  yn  <turn end> |  pad
                                                ^    ^    ^         ^
    text view    | prompt: words + question |  y1   y2   ...  yn  <turn end> |  pad  pad
                                          ^    ^    ^         ^
                   ^ = predict_positions: the logits that PREDICT a token sit one position before it

The response is tokenised once, by the student's tokenizer, and the same ids are appended to both
prompts. Gathering each model's output at its `predict_positions` gives two [tokens, ...] matrices
whose row k is about the same token: what every loss here works on. A shift by one would train
without an error and teach nonsense, so tests/test_data.py plants it.

Examples come from a manifest: JSONL, one object per line,

    {"id": "s1", "audio": "clips/s1.flac", "task": "speech",
     "question": "What is asked?", "choices": ["four", "five"], "answer": "five",
     "reasoning": {"planning": "..", "caption": "..", "reasoning": "..", "summary": ".."},
     "description": "words for the audio (paper A)", "transcript": "its words (CORD)",
     "speaker": "..", "split": "train", "sub-category": ".."}       # optional: the choices, the
                                                        # reasoning, and the last two lines

See both views of one of your own examples, and find every fault of a manifest and its clips:

    python data.py show FILE --id s1 --student mini/student --teacher mini/teacher
    python data.py check FILE --max-seconds 30
"""
import argparse
import functools
import hashlib
import itertools
import math
import random
import re
import string
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

# jinja2, soundfile and torchaudio are imported where they are used, so that --help is quick. For
# forked workers plumbing/run.py imports them once, before the fork.

SAMPLE_RATE = 16_000
MIN_SAMPLES = 321               # fewer give no audio token in Qwen2-Audio and Omni, silently
STAGES = ("planning", "caption", "reasoning", "summary")        # CoTA's stages of a reasoning trace
TAG = r"</?(?:THINK|PLANNING|CAPTION|REASONING|SUMMARY|RESPONSE)>"


class DataError(SystemExit, ValueError):
    """Bad data, in one sentence: where (file:line), what, and what to do about it. A script ends
    with the sentence and without a traceback. (A thread ends without a word: catch it there.)"""


@dataclass
class Example:
    id: str
    audio: Path                         # absolute
    question: str                       # may be empty where the audio itself asks
    choices: list[str]                  # empty: an open question
    answer: str                         # the text of the right choice, not its letter
    task: str                           # "speech", "sound", ...: results are reported by it
    reasoning: dict[str, str] | None = None         # the four STAGES
    description: str | None = None
    transcript: str | None = None
    speaker: str | None = None
    split: str | None = None
    where: str = ""                     # "manifest.jsonl:12", for messages
    sub_category: str | None = None     # MMAU's "sub-category", another grouping of results


# ---------------------------------------------------------------------------------------------
# 1. The response: the same tokens in both views

def response_text(example: Example) -> str:
    """The reference response in CoTA's tags, without whitespace between them."""
    answer = f"<RESPONSE>{example.answer}</RESPONSE>"
    if example.reasoning is None:
        return answer
    stages = [f"<{stage.upper()}>{example.reasoning[stage]}</{stage.upper()}>" for stage in STAGES]
    return f"<THINK>{''.join(stages)}</THINK>{answer}"


def parse_response(text: str) -> dict[str, str | None]:
    """The reverse, for what a model wrote: its stages, and "response" (None when missing).

    Tolerant: tags in any case, text between tags is ignored, a part that was never closed ends at
    the next tag, and of a repeated part the first counts."""
    parts = {}
    for name in (*STAGES, "response"):
        match = re.search(rf"<{name}>(.*?)(?={TAG}|\Z)", text, re.IGNORECASE | re.DOTALL)
        if match:
            parts[name] = match[1].strip()
    parts.setdefault("response", None)
    return parts


def encode_response(tokenizer, text: str) -> list[int]:
    """Ids of the response and of the turn's end, which is trained like any other token: without
    it a model never learns to stop."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [turn_end_id(tokenizer)]


def turn_end_id(tokenizer) -> int:
    """The token that closes an assistant's turn, by the chat template (<|im_end|> in Qwen's).

    The first special token behind the content: some templates put a space or a newline before it.
    Raises DataError where there is none, as in GLM-ASR: nothing would teach to stop."""
    content = "one two three"
    turns = [{"role": "user", "content": "count"}, {"role": "assistant", "content": content}]
    conversation = tokenizer.apply_chat_template(turns, tokenize=False)
    closing = conversation.partition(content)[2]
    special = _special_ids(tokenizer)
    for token in tokenizer(closing, add_special_tokens=False)["input_ids"]:
        if token in special:
            return token
    raise DataError(f"the chat template of {tokenizer.name_or_path} closes an assistant's turn "
                    "with no special token, so that nothing would say where an answer ends; "
                    "use an instruct model whose template closes its turns")


def _special_ids(tokenizer):
    added = tokenizer.added_tokens_decoder.items()
    return {index for index, token in added if token.special}.union(tokenizer.all_special_ids)


def control_ids(tokenizer, size, *, keep=(), placeholder=None) -> list[int]:
    """What a model of `size` output rows must never say: special tokens (placeholders, turn marks)
    but those in `keep`, and rows that are no token at all.

    placeholder: the audio's id, which some tokenizers do not count as special. Sampled, it would
    ask the next forward for audio that is not there."""
    unused = set(range(size)) - set(tokenizer.get_vocab().values())
    banned = {placeholder, *_special_ids(tokenizer), *unused}
    banned -= {None, *keep}                             # None: what this tokenizer does not have
    return sorted(index for index in banned if index < size)


def shared_vocabulary(student, teacher, *, minimum=0.9):
    """Two tokenizers -> the ids of tokens that are equal AS STRINGS in both: (student_ids [n],
    teacher_ids [n], counts).

    Ids alone would lie: 151,646 is <|AUDIO|> in Qwen2.5-Omni and <|object_ref_start|> in Qwen3.
    Raises DataError where less than `minimum` of the smaller vocabulary is shared: such a teacher
    speaks another alphabet, and its distribution cannot be copied."""
    ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    shared = sorted((ids[token], teacher_ids[token]) for token in ids.keys() & teacher_ids.keys())
    same_id = set(ids.values()) & set(teacher_ids.values())
    counts = {
        "shared": len(shared),
        "only_student": len(ids) - len(shared),
        "only_teacher": len(teacher_ids) - len(shared),
        "same_id_other_meaning": len(same_id) - len(ids.items() & teacher_ids.items()),
    }
    if len(shared) < minimum * min(len(ids), len(teacher_ids)):
        raise DataError(f"the teacher's tokenizer ({teacher.name_or_path}, "
                        f"{len(teacher_ids)} tokens) shares only {len(shared)} with the student's "
                        f"{len(ids)}, under {minimum:.1%} of the smaller; "
                        "choose one from its family")
    student_ids, teacher_ids = torch.tensor(shared).T.contiguous()
    return student_ids, teacher_ids, counts


def token_map(student_ids, teacher_ids, size):
    """shared_vocabulary's pairs -> [size] int64: the teacher's id of each student token, or -1."""
    return torch.full((size,), -1).scatter(0, student_ids, teacher_ids)


# ---------------------------------------------------------------------------------------------
# 2. The prompts: where the views differ

def question_text(example: Example) -> str:
    """The question, then one line per choice: "A. gold"."""
    choices = zip(string.ascii_uppercase, example.choices)
    lines = [f"{letter}. {choice}" for letter, choice in choices]
    return "\n".join(filter(None, [example.question, *lines]))


def audio_prompt(processor, question: str) -> str:
    """The audio view's prompt as text: the student's chat template around a clip and the question.

    Templates that know no parts (Granite Speech's) get the placeholder written into the text.
    Raises DataError where neither gives exactly one."""
    import jinja2

    parts = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": question}]
    for content in (parts, processor.audio_token + question):
        turns = [{"role": "user", "content": content}]
        try:
            prompt = processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except (TypeError, jinja2.TemplateError):
            continue
        if isinstance(prompt, str) and prompt.count(processor.audio_token) == 1:
            return prompt
    raise DataError("the chat template does not put one audio placeholder "
                    f"{processor.audio_token} for one clip; use the template of the model's own "
                    "checkpoint")


def text_prompt(tokenizer, words: str, question: str) -> str:
    """The text view's prompt as text: words for the audio, then the question.

    enable_thinking=False makes Qwen3's template append its empty think block, so that the teacher
    is asked in training exactly as it is scored; other templates ignore it."""
    content = "\n".join(filter(None, [words, question]))
    turns = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def _audio_id(processor) -> int:
    return processor.tokenizer.convert_tokens_to_ids(processor.audio_token)


def needed(example, name):
    """example.<name>. Raises DataError where there is nothing in it."""
    value = getattr(example, name)
    if not str(value or "").strip():
        raise DataError(f"{example.where}: {name!r} is missing or empty and is needed here; "
                        "add it to the line")
    return value


def _words_and_question(example, processor, field=None):
    words = needed(example, field) if field else ""
    question = question_text(example)
    # A placeholder would ask the model for audio that is not there. A text LLM's tokenizer may
    # stand in for the processor: it has none
    placeholder = getattr(processor, "audio_token", None)
    if placeholder and placeholder in words + question:
        raise DataError(f"{example.where}: the text contains the audio placeholder {placeholder}; "
                        "remove it")
    return words, question


def extractor(processor):
    """What makes features of a waveform, by whichever name the processor holds it, or None."""
    audio_processor = getattr(processor, "audio_processor", None)
    return getattr(processor, "feature_extractor", None) or audio_processor


def longest(processor) -> float:
    """How many seconds of a clip the model hears: its feature extractor would cut off the rest
    without a word. inf: all of it."""
    features = extractor(processor)
    return getattr(features, "n_samples", math.inf) / features.sampling_rate


def audio_inputs(processor, prompts, waves):
    """Prompts as text and their waves [samples] -> (ids of each prompt, with as many placeholders
    as its wave gives; features, one row per wave)."""
    options = {"sampling_rate": SAMPLE_RATE}
    if 30 < longest(processor) < math.inf:
        # Whisper's encoder wants its 30 s and no less. With a longer window the tower splits clips
        # itself: padding to its end (Omni: 300 s, 15 MB a clip) is waste. With 400 samples of
        # silence behind the longest clip its last frames are the same as beside a longer one.
        samples = max(map(len, waves)) + 400
        options.update(padding="max_length", max_length=160 * math.ceil(samples / 160))
    with torch.autocast("cpu", enabled=False):          # the spectrogram is not for 16 bits
        inputs = processor(
            text=prompts,
            audio=waves,
            audio_kwargs=options,
            return_tensors="pt",
            text_kwargs={"add_special_tokens": False, "padding": True},
        )

    # Padding off again: it belongs after the response
    inputs = dict(inputs)
    mask = inputs.pop("attention_mask").bool()
    ids = [row[keep].tolist() for row, keep in zip(inputs.pop("input_ids"), mask)]
    for name, tensor in inputs.items():                 # rows are picked by example from here on
        if len(tensor) != len(waves):
            raise DataError(f"the processor gives {len(tensor)} rows of {name} for {len(waves)} "
                            "clips; one clip of this model must be one row")
    return ids, inputs


def _audio_prompts(examples, processor):
    # -> (ids of each prompt, features), as audio_inputs
    texts, waves = [], []
    for example in examples:
        wave = load_audio(example.audio, where=example.where, cut=longest(processor))
        waves.append(wave.numpy())
        texts.append(audio_prompt(processor, _words_and_question(example, processor)[1]))
    return audio_inputs(processor, texts, waves)


def _text_prompts(examples, processor, tokenizer, field):
    ids = []
    for example in examples:
        prompt = text_prompt(tokenizer, *_words_and_question(example, processor, field))
        ids.append(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids


@dataclass
class Prompts:
    """Both views' prompts, encoded once. Responses are appended to them: the reference's
    (collate), or sampled ones (CORD)."""
    examples: list[Example]
    audio: list[list[int]]              # ids of each audio prompt, placeholders included
    text: list[list[int]]               # ids of each text prompt, in the text view's vocabulary
    features: dict[str, torch.Tensor]   # what the audio tower takes, one row per example


def encode_prompts(examples, processor, tokenizer, *, words) -> Prompts:
    """Examples -> Prompts, reading the audio files; arguments as in collate. Raises DataError."""
    audio, features = _audio_prompts(examples, processor)
    text = _text_prompts(examples, processor, tokenizer, words)
    return Prompts(examples, audio, text, features)


# ---------------------------------------------------------------------------------------------
# 3. The two views

@dataclass
class View:
    """One batch as one model reads it.

    Positions index the FLATTENED axis: hidden.flatten(0, 1)[positions] -> [tokens, hidden]."""
    inputs: dict[str, torch.Tensor]     # exactly what model.forward takes; ids [batch, seq]
    predict_positions: torch.Tensor     # [tokens] int64: where the response's tokens are predicted
    audio_positions: torch.Tensor       # [audio tokens] int64: placeholders; empty in a text view

    def to(self, device) -> "View":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return View(inputs, self.predict_positions.to(device), self.audio_positions.to(device))


@dataclass
class Batch:
    audio: View
    text: View
    # [tokens] int64: the responses' ids, student's numbering, in the order of predict_positions
    labels: torch.Tensor
    examples: list[Example]

    def to(self, device) -> "Batch":
        return replace(
            self,
            audio=self.audio.to(device),
            text=self.text.to(device),
            labels=self.labels.to(device),
        )


def pad(rows, tokenizer, side):
    """Lists of ids -> {"input_ids", "attention_mask"} [batch, seq], padded at that side."""
    rows = [torch.tensor(row) for row in rows]
    beside = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    fill = tokenizer.pad_token_id or 0                  # any id will do: attention_mask hides it
    return {
        "input_ids": beside(rows, padding_value=fill),
        "attention_mask": beside([torch.ones_like(row) for row in rows]),
    }


def pack(prompts, rows, responses, tokenizer, *, audio_id=-1, features=None) -> View:
    """Response i behind prompt rows[i]; neighbours with the same prompt share one sequence.

    Two prompts, A B C and D E, and three responses, of which two are to the first: rows [0, 0, 1]

        column          0   1   2   3   4   5   6   7
        sequence 0      A   B   C   y1  y2  y3  z1  z2
          position_ids  0   1   2   3   4   5   3   4       both responses follow the prompt
          predicts              y1  y2  y3      z2          C predicts z1 too
          y3 sees       x   x   x   x   x   x
          z2 sees       x   x   x               x   x       no response sees another
        sequence 1      D   E   w1  w2  pad pad pad pad     right: the causal mask hides it
          predicts          w1  w2

        predict_positions = [2, 3, 4,  2, 6,  8 + 1, 8 + 2]         of y1 y2 y3  z1 z2  w1 w2

    So a prompt, with its sound, is run once however many responses it has. attention_mask is then
    bool [batch, 1, seq, seq], for models with PyTorch's own attention; else int64 [batch, seq].

    audio_id: the placeholder's. features: {name: [prompts, ...]}, what the audio tower takes."""
    # 1. Neighbours with the same prompt: [(0, [y, z]), (1, [w])]
    groups = []
    for row, group in itertools.groupby(range(len(rows)), key=lambda i: rows[i]):
        groups.append((row, [responses[i] for i in group]))
    sequences = [[*prompts[row], *itertools.chain(*group)] for row, group in groups]
    inputs = pad(sequences, tokenizer, "right")

    # 2. What predicts a token: one column before its own, or the prompt's end
    batch, seq = inputs["input_ids"].shape
    positions = torch.arange(seq).repeat(batch, 1)                      # [batch, seq]
    predictor = torch.arange(batch * seq).view(batch, seq) - 1          # on the flattened axis
    branch = inputs["attention_mask"] - 1               # 0 prompt, 1, 2, .. responses, -1 padding
    for sequence, (row, group) in enumerate(groups):
        begin = len(prompts[row])
        for number, response in enumerate(group, start=1):
            end = begin + len(response)
            others = begin - len(prompts[row])          # columns of the responses before this one
            positions[sequence, begin:end] -= others
            if response:                                # its first token: by the prompt's last
                predictor[sequence, begin] -= others
            branch[sequence, begin:end] = number
            begin = end
    audio = (branch == 0) & (inputs["input_ids"] == audio_id)

    # 3. position_ids are always given: some families (Omni) would count them for sound and pictures
    inputs["position_ids"] = positions
    if len(groups) < len(rows):
        same = branch[:, None] == branch[:, :, None]                    # [batch, seq, seq]
        sees = (branch[:, None] == 0) | same
        causal = torch.ones(seq, seq, dtype=torch.bool).tril()
        inputs["attention_mask"] = (sees & causal)[:, None]
    for name, tensor in (features or {}).items():
        inputs[name] = tensor[[row for row, _ in groups]]
    return View(inputs, predictor[branch > 0], audio.flatten().nonzero()[:, 0])


def audio_view(prompts: Prompts, rows, responses, processor) -> View:
    """Response i (list of ids) behind the audio prompt of example rows[i], with its sound."""
    return pack(
        prompts.audio,
        rows,
        responses,
        processor.tokenizer,
        audio_id=_audio_id(processor),
        features=prompts.features,
    )


def collate(
    examples, processor, tokenizer, *, words="description", student_to_teacher=None
) -> Batch:
    """Examples -> Batch with their reference responses, reading the audio files.

    processor: the student's. tokenizer: the text view's, the text teacher's in paper A, the
    student's own in CORD. words: the field with words for the audio, "description" (A) or
    "transcript" (CORD). student_to_teacher: token_map's, where the two number their tokens
    differently. Raises DataError."""
    student = processor.tokenizer
    control = (_audio_id(processor), turn_end_id(student))
    responses, teacher_responses = [], []
    for example in examples:
        response = encode_response(student, response_text(example))
        # A placeholder would ask for audio that is not there, a turn end would teach to stop
        for token in response[:-1]:
            if token in control:
                raise DataError(f"{example.where}: the response contains the control token "
                                f"{student.convert_ids_to_tokens(token)}; "
                                "remove it from the answer or the reasoning")
        responses.append(response)

        if student_to_teacher is not None:
            mapped = student_to_teacher[response].tolist()
            if -1 in mapped:
                token = student.convert_ids_to_tokens(response[mapped.index(-1)])
                raise DataError(f"{example.where}: the response's token {token!r} is not in the "
                                "teacher's vocabulary; rewrite the response")
            response = mapped
        teacher_responses.append(response)

    if teacher_responses[0][-1] != turn_end_id(tokenizer):
        raise DataError(f"the text view's tokenizer ({tokenizer.name_or_path}) closes turns with "
                        "another token than the student's; choose a teacher with the student's "
                        "chat format")

    prompts = encode_prompts(examples, processor, tokenizer, words=words)
    rows = range(len(examples))
    return Batch(
        audio=audio_view(prompts, rows, responses, processor),
        text=pack(prompts.text, rows, teacher_responses, tokenizer),
        labels=torch.tensor(list(itertools.chain(*responses))),
        examples=examples,
    )


def pad_left(prompts, tokenizer):
    """Lists of ids -> {"input_ids", "attention_mask", "position_ids"} [batch, seq] for generation:
    every row's first new token follows its last prompt token. Positions count real tokens."""
    inputs = pad(prompts, tokenizer, "left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def prompt_batch(examples, processor, *, view="audio", tokenizer=None, words=None):
    """Examples -> the inputs of model.generate, a dict of tensors: prompts only, left padded.

    view "text": tokenizer (default: the student's) and the field of `words`; without words the
    question alone."""
    if view == "audio":
        prompts, features = _audio_prompts(examples, processor)
        return {**pad_left(prompts, processor.tokenizer), **features}
    tokenizer = tokenizer or processor.tokenizer
    return pad_left(_text_prompts(examples, processor, tokenizer, words), tokenizer)


def audio_prefix(view: View) -> View:
    """The same view cut right after the batch's last audio token, for the acoustic teacher.

    The decoder is causal: its states at audio positions depend on nothing later, so question and
    response need not be computed. One response a prompt: the mask is [batch, seq]."""
    seq = view.inputs["input_ids"].shape[1]
    row = view.audio_positions // seq
    column = view.audio_positions % seq
    cut = int(column.max()) + 1
    inputs = dict(view.inputs)
    for name in ("input_ids", "attention_mask", "position_ids"):
        inputs[name] = inputs[name][:, :cut]
    return View(inputs, view.predict_positions[:0], row * cut + column)


# ---------------------------------------------------------------------------------------------
# 4. Manifests

def read_manifest(path, *, require=(), split=None, limit=None) -> list[Example]:
    """Reads a JSONL manifest; the whole file is validated before anything is returned.

    require: optional fields that every returned example must have. split, limit: which and how
    many. Audio paths are relative to the manifest's folder and must stay inside it, links
    resolved. Unknown keys are ignored. Raises DataError at the first fault."""
    from plumbing import manifest

    examples = []
    for example in manifest.parse(path):
        if isinstance(example, DataError):
            raise example
        examples.append(example)

    chosen = [example for example in examples if split is None or example.split == split][:limit]
    if not chosen:
        splits = ", ".join(sorted({str(example.split) for example in examples}))
        raise DataError(f"{path}: no example is left for split {split!r} and limit {limit}; "
                        f"the file has the splits {splits}")
    for example in chosen:
        for name in require:
            needed(example, name)
    return chosen


def read_manifests(paths, **options) -> list[Example]:
    """Several manifests behind each other; options as in read_manifest. Ids differ across all."""
    from plumbing import manifest

    examples, seen = [], {}
    for path in paths:
        for example in read_manifest(path, **options):
            manifest.claim_id(example, seen)
            examples.append(example)
    return examples


def fingerprint(examples) -> str:
    """The same for the same questions, to tell whether an evaluation is about these."""
    questions = [
        (e.id, str(e.audio), e.question, e.choices, e.answer, e.transcript) for e in examples
    ]
    return hashlib.sha256(repr(questions).encode()).hexdigest()[:16]


def corrupt_descriptions(examples, share, seed=0) -> list[Example]:
    """What if the words for the audio were worse? Of every description, `share` of the words go
    wrong: half of these are dropped, half swapped for a word out of another description of the
    same task (so that some words come back by chance)."""
    by_task = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example.description)
    corrupted = []
    for example in examples:
        rng = random.Random(f"{seed} {example.id}")
        drawn = (rng.choice(by_task[example.task]) for _ in range(20))
        others = (text for text in drawn if text != example.description)
        other = next(others, "something").split()

        words, fallback = [], None
        for word in example.description.split():
            luck = rng.random()
            instead = rng.choice(other)
            fallback = fallback or instead
            if luck >= share:
                words.append(word)
            elif luck >= share / 2:
                words.append(instead)
        description = " ".join(words or [fallback])             # never nothing at all
        corrupted.append(replace(example, description=description))
    return corrupted


# ---------------------------------------------------------------------------------------------
# 5. Audio. Whether a file is one that can be used is plumbing/check.py's question

def load_audio(path, *, where=None, cut=math.inf) -> torch.Tensor:
    """The first `cut` seconds of a WAV, FLAC, OGG or MP3 file as float32 [samples]: 16 kHz, mono
    (mean of the channels), 1.0 is full scale. Raises DataError."""
    import torchaudio

    from plumbing import check

    with check.open_audio(path, where=where) as file:
        count = math.ceil(min(cut * file.samplerate, file.frames))
        _, mono = check.read_frames(file, count, check.clip_name(path, where))
    # torchaudio's filter bank has numerator x denominator entries: 44,101 Hz would take gigabytes.
    # A denominator up to 1,000 is exact for every usual rate, and off by at most 0.05 % for odd
    # ones up to 192 kHz.
    ratio = Fraction(SAMPLE_RATE, file.samplerate).limit_denominator(1000)
    wave = torch.from_numpy(mono)
    return torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)


def audio_seconds(path, *, where=None, max_seconds=None) -> float:
    """A clip's duration in seconds, from its header alone. Raises DataError."""
    from plumbing import check

    with check.open_audio(path, where=where, max_seconds=max_seconds) as file:
        return file.frames / file.samplerate


def check_audio(examples) -> list[float]:
    """The clips' durations; raises DataError at the first whose header shows a fault."""
    return [audio_seconds(example.audio, where=example.where) for example in examples]


# ---------------------------------------------------------------------------------------------
# 6. python data.py show | check FILE

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=["show", "check"], help="show: both views of an example, token by "
        "token. check: every fault of a manifest and its clips, and a table by task; exit status "
        "1 if there is any")
    add("file", help="the manifest, JSONL")
    # show
    add("--id", help="the example's id; the first one's without")
    add("--student", default=str(Path(__file__).with_name("mini") / "student"),
        help="folder or hub name of the student")
    add("--teacher", help="folder or hub name of a text teacher, which reads the description "
        "(paper A); without, the student reads the transcript (CORD), else the description")
    # check
    add("--max-seconds", type=float, default=30.0,
        help="longest clip allowed, in seconds (Qwen2-Audio's window: 30)")
    args = parser.parse_args()

    from plumbing import check, show
    command = check.command if args.command == "check" else show.command
    command(args)


if __name__ == "__main__":
    from data import main  # not a second copy of this module: plumbing/ imports `data`
    main()
