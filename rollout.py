"""How a model is made to speak: answers to many questions, and the rollouts that CORD learns from.

    generate        what the model says to each example, heard or read
    text_answers    the text view's greedy answers to all training prompts, kept in a file
    roll_out        several sampled answers to each prompt of a step, in one batched call

Sampling is keyed (sampler.py), so every answer can be repeated. The checkpoint's own settings
(top_k, repetition penalties, ...) are never used. generate's defaults are paper A's for scoring.
roll_out samples from the full softmax: a rollout from another distribution would bias every
gradient that is taken on it.
"""

import contextlib
import inspect
import zlib
from dataclasses import dataclass, field

import torch
import transformers
from tqdm import tqdm

import data
import models
from plumbing import ranks
from plumbing.files import append_jsonl, keep_lines
from sampler import chooser

# -------------------------------------------------------------------------------------------------
# 1. generate() as it is

@contextlib.contextmanager
def plain_decoding(model):
    """Inside, generate() uses its arguments alone: no settings of the checkpoint
    (repetition_penalty, top_p, ...), no gradient, bfloat16 autocast on a GPU or for bfloat16
    weights, and eval mode (training mode would apply dropout, and with gradient checkpointing lose
    the KV cache)."""
    settings = model.generation_config
    training = [module for module in model.modules() if module.training]
    model.generation_config = transformers.GenerationConfig()
    model.eval()
    try:
        with torch.no_grad(), models.autocast(model):
            yield
    finally:
        model.generation_config = settings
        for module in training:
            module.training = True


def stop_ids(tokenizer):
    """The tokens that end an answer: base models close with <|endoftext|> what a chat model closes
    with its turn's end."""
    return sorted({data.turn_end_id(tokenizer), tokenizer.eos_token_id} - {None})


def banned_ids(model, tokenizer):
    """What must not be said: control tokens but those that end an answer (data.control_ids)."""
    config = model.config
    audio = getattr(config, "audio_token_id", getattr(config, "audio_token_index", None))
    size = config.get_text_config().vocab_size
    return data.control_ids(tokenizer, size, keep=stop_ids(tokenizer), placeholder=audio)


def _answers(model, tokenizer, inputs, keys, banned, *, max_new_tokens, **sampling):
    """generate()'s inputs, left padded -> (text, did it end by itself?, its ids with that end) of
    each row. keys, banned, sampling: as in sampler.chooser."""
    stop = stop_ids(tokenizer)
    prompt_length = inputs["input_ids"].shape[1]
    choose = chooser(keys, prompt_length, banned, max_new_tokens=max_new_tokens, **sampling)
    output = model.generate(                            # [batch, prompt + new]
        **inputs,
        do_sample=False,
        use_cache=True,
        # else the ranks of a sharded model would wait for each other at every token, and for ever
        # for one with fewer questions
        synced_gpus=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
        logits_processor=[choose],
    )
    answers = []
    for row in output[:, prompt_length:].tolist():
        end = next((k for k, token in enumerate(row) if token in stop), len(row))
        text = tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)
        answers.append((text, end < len(row), row[:end + 1]))
    return answers


# -------------------------------------------------------------------------------------------------
# 2. Answers

def generate(
    model,
    processor,
    examples,
    *,
    view="audio",
    words=None,
    batch_size=16,
    max_new_tokens=512,
    temperature=0.6,
    top_k=5,
    top_p=0.5,
    seed=0,
    progress=True,
    with_end=False,
):
    """What the model says to each example: a list of str in the order of `examples`, tags included.

    view="audio": the model hears; "text": it reads example.<words> instead. A text-only LLM passes
    its tokenizer as processor. No two examples may have the same id. with_end: instead of each str
    a triple (str, did it end by itself?, its token ids with that end). Under torch.distributed each
    rank takes its share, and every rank returns all outputs."""
    tokenizer = getattr(processor, "tokenizer", processor)
    banned = banned_ids(model, tokenizer)

    def length(e):
        # in tokens, roughly: 25 a second of audio, and one for 4 characters of text
        if view == "audio":
            return 25 * data.audio_seconds(e.audio, where=e.where) + len(e.question) / 4
        read = getattr(e, words) if words else ""
        return len(e.question + read) / 4

    # Rows of a batch should be about as long. Longest first, so that out of memory shows at once
    local = examples[ranks.rank()::ranks.world_size()]
    local = sorted(local, key=length, reverse=True)

    by_id = {}
    quiet = not progress or ranks.rank() > 0
    with plain_decoding(model):
        for start in tqdm(range(0, len(local), batch_size), "answers", disable=quiet, leave=False):
            rows = local[start:start + batch_size]
            inputs = data.prompt_batch(
                rows,
                processor,
                view=view,
                tokenizer=tokenizer,
                words=words,
            )
            answers = _answers(
                model,
                tokenizer,
                transformers.BatchFeature(inputs).to(model.device, model.dtype),    # ids stay int64
                [f"{seed} {e.id}" for e in rows],
                banned,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            for e, answer in zip(rows, answers):
                by_id[e.id] = answer if with_end else answer[0]

    by_id = dict(ranks.gather_lists(list(by_id.items())))
    return [by_id[e.id] for e in examples]


def text_answers(model, processor, examples, path, *, max_new_tokens, batch_size):
    """The text view's greedy answers -> {id: {"text", "ids", "ended"}}. What a file at `path` holds
    of the same model and prompts is not asked again.

    Each rank takes its share of a chunk; rank 0 appends a chunk's lines, so that a kill loses one
    chunk at most."""
    # An answer's key: these weights (1,000 numbers of each tensor), this limit, this prompt.
    # Another student, or this one trained further, asks anew
    weights = 0
    for p in model.parameters():
        beginning = p.detach().flatten()[:1000].float().cpu()
        weights = zlib.crc32(beginning.numpy(), weights)
    keys = {}
    for e in examples:
        prompt = data.text_prompt(processor.tokenizer, e.transcript, data.question_text(e))
        keys[e.id] = zlib.crc32(f"{weights} {max_new_tokens} {prompt}".encode())
    stored = []
    if ranks.rank() == 0:
        stored = keep_lines(path, lambda line: keys.get(line["id"]) == line["key"])
    answers = {line["id"]: line for line in ranks.of_rank_zero(stored)}

    # Ask the rest, a chunk of all ranks at a time
    todo = [e for e in examples if e.id not in answers]
    chunk = 4 * batch_size * ranks.world_size()
    steps = range(0, len(todo), chunk)
    for start in tqdm(steps, "the text view's answers", disable=ranks.rank() > 0):
        rows = todo[start:start + chunk]
        answered = generate(
            model,
            processor,
            rows,
            view="text",
            words="transcript",
            temperature=0,
            max_new_tokens=max_new_tokens,
            with_end=True,
            batch_size=batch_size,
            progress=False,
        )
        for e, (text, ended, ids) in zip(rows, answered):
            line = {"id": e.id, "key": keys[e.id], "text": text, "ids": ids, "ended": ended}
            answers[e.id] = line
            if ranks.rank() == 0:
                append_jsonl(path, line)
    return answers


# -------------------------------------------------------------------------------------------------
# 3. Rollouts

@dataclass
class Kind:
    """One of the rollouts that are drawn for every prompt."""
    temperature: float
    kl: bool = False            # L_tok is computed on it
    group: bool = False         # it belongs to the rewarded group


@dataclass
class Rollout:
    row: int                    # which of the rank's prompts of this step it answers
    temperature: float
    kl: bool                    # as in Kind
    group: bool                 # as in Kind, until its prompt turns out to have no reference
    ids: list[int]              # its tokens, the one that ended it too
    text: str = ""
    ended: bool = True          # by itself; False: cut at max_new_tokens
    advantage: float = 0.0
    divergence: list[float] = field(default_factory=list)      # D_t of its tokens, once scored


def roll_out(student, processor, prompts, kinds, *, key, max_new_tokens):
    """data.Prompts -> Rollouts: `kinds` for each prompt, in one batched call, grouped by prompt.

    key: seeds this step's random numbers, such as "seed step". Sampled from the full softmax
    without the control tokens."""
    if not kinds:
        return []
    tokenizer = processor.tokenizer
    n = len(kinds)
    places = data.pad_left(prompts.audio, tokenizer)    # ids, mask, positions: [prompts, seq] each
    inputs = transformers.BatchFeature({**places, **prompts.features}).to(student.device)
    keys = [f"{key} {example.id} {i}" for example in prompts.examples for i in range(n)]

    with plain_decoding(student):
        # A prompt's n rollouts share its sound and text: fill the KV cache once, up to the last
        # token, with which generate() begins, and repeat it n times
        cache = transformers.DynamicCache(config=student.config.get_text_config())
        # past_key_values of transformers 5.17 will be named cache in 5.40
        takes = inspect.signature(student.forward).parameters
        with_cache = {"cache" if "cache" in takes else "past_key_values": cache}
        before = {name: x[:, :-1] if name in places else x for name, x in inputs.items()}
        models.hear(student, **before, **with_cache, use_cache=True)
        cache.batch_repeat_interleave(n)                # A A A B B B, as the rollouts

        repeated = {name: inputs[name].repeat_interleave(n, 0) for name in places}
        answers = _answers(
            student,
            tokenizer,
            {**repeated, **with_cache},
            keys,
            banned_ids(student, tokenizer),
            max_new_tokens=max_new_tokens,
            temperature=[kind.temperature for kind in kinds] * len(prompts.examples),
        )
    rollouts = []
    for i, (text, ended, ids) in enumerate(answers):
        kind = kinds[i % n]
        rollouts.append(Rollout(i // n, **vars(kind), ids=ids, text=text, ended=ended))
    return rollouts


def samples(shown, prompts, references, verdicts, tokenizer):
    """Scored Rollouts -> records to read (samples.jsonl).

    Each has the transcript, the question, the rollout with its five most divergent tokens marked
    ("is [[seven 2.31]]"), the text view's answer, and what the judge says to both."""
    asked = []
    for r in shown:
        e = prompts.examples[r.row]
        asked.append((e, r.text, references[e.id]["text"]))
    records = []
    for r, (e, _, reference), right in zip(shown, asked, verdicts(asked)):
        places = range(len(r.divergence))
        top = sorted(places, key=r.divergence.__getitem__, reverse=True)[:5]
        text = ""
        for i, token in enumerate(map(tokenizer.decode, r.ids)):
            text += f"[[{token} {r.divergence[i]:.2f}]]" if i in top else token
        verdict = "right" if right else "wrong"
        if not references[e.id]["ended"]:
            verdict = "no reference"
        records.append(
            {
                "id": e.id,
                "temperature": r.temperature,
                "transcript": e.transcript,
                "question": data.question_text(e),
                "rollout": text,
                "text_view": reference,
                "verdict": verdict,
            }
        )
    return records
