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

Validate one and see its durations and token lengths:

    python data.py check runs/world/train.jsonl --student mini/student --max-seconds 30
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
import string
import sys
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import jinja2
import soundfile
import torch
import torchaudio

SAMPLE_RATE = 16_000
MIN_SAMPLES = 321                       # fewer give zero audio tokens in Qwen2-Audio and Qwen2.5-Omni, silently
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


def read_manifest(path, *, require=(), split=None, limit=None, root=None) -> list[Example]:
    """Reads a JSONL manifest; the whole file is validated before anything is returned. Unknown keys are ignored.

    require: optional fields that every returned example must have, e.g. ("reasoning", "description"). split, limit: which and how many.
    Audio paths are relative to the manifest's folder and must stay inside it, links resolved, or inside `root` where one is given.
    Raises DataError at the first bad line, and where no example is left."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such manifest; check the path")
    folders = [Path(folder).resolve() for folder in (path.parent, root) if folder is not None]
    examples, seen = [], {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            example = parse_line(line, f"{path}:{number}", folders)
            if example.id in seen:
                raise DataError(f"{example.where}: id {example.id!r} was already used at {seen[example.id]}; give every example its own id")
            seen[example.id] = example.where
            examples.append(example)
    if not examples:
        raise DataError(f"{path}: the manifest is empty; write one JSON object per line")
    kept = [example for example in examples if split is None or example.split == split][:limit]
    if not kept:
        found = sorted({str(example.split) for example in examples})
        raise DataError(f"{path}: no example is left for split {split!r} and limit {limit}; the file has the splits {', '.join(found)}")
    for example in kept:
        for name in require:
            if not str(getattr(example, name) or "").strip():
                raise DataError(f"{example.where}: {name!r} is missing or empty and is needed here; add it to the line")
    return kept


def read_manifests(paths, **how) -> list[Example]:
    """Several manifests behind each other; `how` as in read_manifest. Raises DataError where two of them use one id."""
    examples, seen = [example for path in paths for example in read_manifest(path, **how)], {}
    for example in examples:
        if example.id in seen:
            raise DataError(f"{example.where}: id {example.id!r} was already used at {seen[example.id]}; give every example its own id")
        seen[example.id] = example.where
    return examples


def fingerprint(examples) -> str:
    """The same for the same questions, to tell whether an evaluation is about these."""
    return hashlib.sha256(repr([(e.id, str(e.audio), e.question, e.choices, e.answer, e.transcript) for e in examples]).encode()).hexdigest()[:16]


def parse_line(line: bytes, where: str, folders: list[Path]) -> Example:
    """One line of a manifest -> Example. where: "manifest.jsonl:12", for messages. folders: the manifest's own, resolved, and further ones that audio may
    lie in. Raises DataError."""
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
        if not isinstance(value, str):
            raise DataError(f"{where}: the field {name!r} must be a string, not {type(value).__name__}; put it in quotes")
        if not blank and not value.strip():
            raise DataError(f"{where}: the field {name!r} is empty; fill it in or remove the line")
        return value

    choices, reasoning = record.get("choices"), record.get("reasoning")
    choices = [] if choices is None else choices
    if not isinstance(choices, list) or len(choices) > 26 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{where}: 'choices' must be a list of at most 26 non-empty strings; write [] for an open question")
    if choices and text("answer") not in choices:
        raise DataError(f"{where}: the answer {text('answer')!r} is not among the choices {choices}; write the text of one choice")
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
        path = (folders[0] / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:            # a circle of links, a zero byte
        raise DataError(f"{where}: the audio path {name!r} cannot be used ({error}); correct it") from None
    if not any(path.is_relative_to(folder) for folder in folders):
        raise DataError(f"{where}: the audio path {name!r} leaves the folder {folders[-1]}; move it there, or name its folder as root")
    return path


# -------------------------------------------------------------- 2. audio --------------------------------------------------------------

def audio_seconds(path, *, where=None, max_seconds=None) -> float:
    """A clip's duration in seconds, from its header alone. Raises DataError where load_audio would have no chance."""
    path, clip = Path(path), f"{where}: the audio file {path}" if where else f"the audio file {path}"
    if not path.is_file():
        raise DataError(f"{clip} does not exist; put it there or correct the path")
    if path.stat().st_size == 0:
        raise DataError(f"{clip} is empty (0 bytes); make or fetch it again")
    try:
        info = soundfile.info(path)
    except (RuntimeError, OSError, TypeError, ValueError) as error:     # TypeError: headerless formats, such as .raw
        raise DataError(f"{clip} cannot be decoded ({str(error).rstrip('.')}); convert it to WAV, FLAC, OGG or MP3") from None
    if not 1_000 <= info.samplerate <= 1_000_000 or info.frames > 2**40:        # a streamed FLAC does not know its length
        raise DataError(f"{clip} claims {info.frames} samples at {info.samplerate} Hz; convert it to a new file")
    if math.ceil(info.frames * SAMPLE_RATE / info.samplerate) < MIN_SAMPLES:
        raise DataError(f"{clip} lasts {info.duration:.3f} s, too short for a single audio token; use at least 0.021 s")
    if max_seconds is not None and info.duration > max_seconds:
        raise DataError(f"{clip} lasts {info.duration:.2f} s, over the limit of {max_seconds:g} s; cut it, or raise the limit")
    return info.duration


def load_audio(path, *, where=None, max_seconds=None, cut=math.inf) -> torch.Tensor:
    """Any WAV, FLAC, OGG or MP3 file as a float32 tensor [samples]: 16 kHz, mono (mean of the channels), 1.0 is full scale; its first `cut` seconds.

    Raises DataError for a file that is missing, empty, undecodable, too short for an audio token, over max_seconds, or not finite."""
    duration = audio_seconds(path, where=where, max_seconds=max_seconds)
    clip = f"{where}: the audio file {path}" if where else f"the audio file {path}"
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            wave = file.read(-1 if cut == math.inf else math.ceil(cut * rate), dtype="float32", always_2d=True)      # [samples, channels]
    except (RuntimeError, OSError, MemoryError, ValueError) as error:
        raise DataError(f"{clip} breaks off while decoding ({str(error).rstrip('.')}); make or fetch it again") from None
    wave = torch.from_numpy(wave).mean(1)
    if not wave.isfinite().all():
        raise DataError(f"{clip} holds samples that are not finite numbers; make or fetch it again")
    if rate != SAMPLE_RATE and len(wave):
        # torchaudio's filter bank has numerator x denominator entries: 44,101 Hz would take gigabytes. A denominator up to 1,000 is exact
        # for every usual rate, and off by about one part in 100,000 at most for odd ones up to 192 kHz.
        ratio = Fraction(SAMPLE_RATE, rate).limit_denominator(1000)
        wave = torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)
    if len(wave) < MIN_SAMPLES:
        raise DataError(f"{clip} holds {len(wave)} samples where its header promises {duration:.2f} s; make it again")
    return wave


def extractor(processor):
    """What makes features of a waveform, by whichever name the processor holds it, or None."""
    return getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)


def longest(processor) -> float:
    """How much of a clip the model hears, in seconds: what is beyond, its feature extractor would cut off without a word. inf: all of it."""
    return getattr(extractor(processor), "n_samples", math.inf) / extractor(processor).sampling_rate


def check_audio(examples, max_seconds=None) -> list[float]:
    """The durations in seconds, from the headers; raises DataError at the first clip that training could not use."""
    return [audio_seconds(example.audio, where=example.where, max_seconds=max_seconds) for example in examples]


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
    """The id of the token that closes an assistant's turn, read off the tokenizer's own chat template (<|im_end|> in Qwen's)."""
    said = "one two three"
    turns = [{"role": "user", "content": "count"}, {"role": "assistant", "content": said}]
    closing = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)[2]
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"the chat template of {tokenizer.name_or_path or 'a tokenizer'} closes turns with no token; use an instruct model")
    return ids[0]


def control_ids(tokenizer, size, *, keep=()) -> list[int]:
    """What a model of `size` output rows must never say: special tokens (placeholders, turn marks) but those in `keep`, and rows that are no
    token at all. A sampled audio placeholder would ask the next forward for audio that is not there."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = set(range(size)) - set(tokenizer.get_vocab().values())
    return sorted((special | unused) - set(keep))


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
    parser.add_argument("command", choices=["check"], help="validate a manifest and every clip's header, then print a table by task")
    parser.add_argument("file", help="the manifest, JSONL")
    parser.add_argument("--student", default="mini/student", help="folder or hub name of the student, for its tokenizer")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longest clip allowed, in seconds (Qwen2-Audio's window: 30)")
    args = parser.parse_args()

    from transformers import AutoTokenizer                                 # slow to import, and only needed here

    try:
        examples = read_manifest(args.file)
        durations = check_audio(examples, args.max_seconds)
        tokenizer = AutoTokenizer.from_pretrained(args.student)
    except DataError as error:
        sys.exit(f"error: {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: there is no tokenizer in {args.student} ({str(error).splitlines()[0]}); name the student's folder with --student")

    rows = defaultdict(list)                                               # task -> [(seconds, question tokens, response tokens)]
    for example, seconds in zip(examples, durations):
        question = tokenizer(question_text(example), add_special_tokens=False)["input_ids"]
        rows[example.task].append((seconds, len(question), len(encode_response(tokenizer, response_text(example)))))
    print(f"{args.file}: {len(examples)} examples are valid\n")
    print(f"{'':12}{'':>8}{'seconds':>16}{'question tokens':>18}{'response tokens':>18}")
    print(f"{'task':12}{'count':>8}{'mean':>10}{'max':>6}" + f"{'mean':>12}{'max':>6}" * 2)
    for task, values in [*sorted(rows.items()), ("together", sum(rows.values(), []))]:
        line = f"{task:12}{len(values):8}"
        for column, form in zip(zip(*values), ("{:10.1f}{:6.1f}", "{:12.0f}{:6}", "{:12.0f}{:6}")):
            line += form.format(sum(column) / len(column), max(column))
        print(line)


if __name__ == "__main__":
    main()
