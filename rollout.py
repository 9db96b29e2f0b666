"""
How a model is made to speak: answers to many questions (generate), and the rollouts that CORD learns from (roll_out).

What this file teaches: sampling that can be repeated. Every random number belongs to a key and a position, never to a batch, a rank or a
generator's state, so that the same question gets the same answer alone, in any batch, on any number of ranks, and after a resume. And what
the checkpoint's author thought of sampling (top_k = 50 in transformers, repetition penalties, ...) is put aside: a rollout that is not from
the model's own distribution would bias every gradient that is taken on it.
"""
import contextlib
import inspect
import json
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

import data
import models

# ---------------------------------------------------------------------------------------------------------------------
# 1. One logits processor, and generate() as it is

def chooser(keys, prompt_length, banned, *, max_new_tokens, temperature, top_k=0, top_p=1.0):
    """The whole decoding rule as one logits processor: it leaves one token possible, so that generate's argmax takes it.

    keys: one string a row, such as "seed id". The number that decides row r's token at position t depends on (keys[r], t) alone: not on the
    batch around it, the rank, or what was sampled before. banned: ids that are never drawn. temperature: one for all rows, or a list of
    theirs; 0: the most probable token. top_k 0 and top_p 1: the full softmax."""
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(zlib.crc32(str(key).encode())))
                           for key in keys]).double()                     # [batch, max_new_tokens]
    banned = torch.tensor(banned, dtype=torch.long)
    hot = torch.as_tensor(temperature, dtype=torch.float32).expand(len(uniform))[:, None]               # [batch, 1]

    def choose(input_ids, scores):                                        # [batch, prompt + t], [batch, vocab]
        scores = scores.float().index_fill(1, banned.to(scores.device), -torch.inf)
        if (hot == 0).all():
            return scores
        logits, candidates = scores / hot.to(scores.device), None         # in the order of the ids
        if top_k or top_p < 1:
            logits, candidates = logits.topk(min(top_k or scores.shape[1], scores.shape[1]))            # [batch, k], best first
        p = logits.softmax(-1).double()
        if top_p < 1:
            p = p * (p.cumsum(-1) - p < top_p)                            # a token stays while those before it hold less than top_p
        below = p.cumsum(-1)
        u = uniform[:, input_ids.shape[1] - prompt_length, None].to(p.device) * below[:, -1:]            # [batch, 1]
        pick = (below <= u).sum(-1, keepdim=True)                         # inverse of the cumulative sum: what has no probability is skipped
        pick = pick if candidates is None else candidates.gather(1, pick)
        return torch.full_like(scores, -torch.inf).scatter(1, pick, 0.0)

    return choose


@contextlib.contextmanager
def plain_decoding(model):
    """Inside, model.generate does what its arguments say and nothing else, with a KV cache, without gradients, in bfloat16 on a GPU or if the weights are.

    What it is not told, generate() would fill from the checkpoint's own settings (repetition_penalty, top_p, ...): lend it empty ones. A
    model in training mode would drop units, and with gradient checkpointing its cache."""
    settings, training = model.generation_config, [module for module in model.modules() if module.training]
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda" or model.dtype == torch.bfloat16):
            yield
    finally:
        model.generation_config = settings
        for module in training:
            module.training = True


def stop_ids(tokenizer):
    """The tokens that end an answer: base models close with <|endoftext|> what a chat model closes with its turn's end."""
    return sorted({data.turn_end_id(tokenizer), tokenizer.eos_token_id} - {None})


def banned_ids(model, tokenizer):
    """What must not be said: control tokens but those that end an answer (data.control_ids)."""
    config = model.config
    audio = getattr(config, "audio_token_id", getattr(config, "audio_token_index", None))
    size = config.get_text_config().vocab_size
    return data.control_ids(tokenizer, size, keep=stop_ids(tokenizer), placeholder=audio)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Answers

def generate(model, processor, examples, *, view="audio", tokenizer=None, words=None, batch_size=16, max_new_tokens=512,
             temperature=0.6, top_k=5, top_p=0.5, seed=0, progress=True, with_end=False):
    """What the model says to each example: a list of str in the order of `examples` (list of data.Example), tags included.

    view="audio": the model hears; "text": it reads example.<words> instead, through `tokenizer` (default: the processor's own;
    for a text-only LLM pass its tokenizer as processor). with_end: triples (str, did it end by itself?, its token
    ids with that end) instead. The checkpoint's own sampling settings are put aside. Under torch.distributed each rank takes its share, and every
    rank returns all outputs."""
    tokenizer = tokenizer or getattr(processor, "tokenizer", processor)
    stop, banned = stop_ids(tokenizer), banned_ids(model, tokenizer)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    mine = list(range(rank, len(examples), world))
    # The rows of a batch should be about as long: in tokens, roughly, 25 a second of audio and one for 4 characters of text.
    lengths = {i: len(examples[i].question + (getattr(examples[i], words) or "" if words else "")) / 4 for i in mine}
    if view == "audio":
        lengths = {i: lengths[i] + 25 * s for i, s in zip(mine, data.check_audio([examples[i] for i in mine]))}
    mine.sort(key=lengths.get, reverse=True)                              # longest first: out of memory shows at once, not at the end
    said = {}
    with plain_decoding(model):
        for start in tqdm(range(0, len(mine), batch_size), desc="answers", disable=not progress or rank > 0, leave=False):
            rows = mine[start:start + batch_size]
            inputs = data.prompt_batch([examples[i] for i in rows], processor, view=view, tokenizer=tokenizer, words=words)
            inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
            prompt_length = inputs["input_ids"].shape[1]
            choose = chooser([f"{seed} {examples[i].id}" for i in rows], prompt_length, banned, max_new_tokens=max_new_tokens,
                             temperature=temperature, top_k=top_k, top_p=top_p)
            # synced_gpus: transformers would let the ranks of a sharded model wait for each other at every token, and for one with fewer questions for ever
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=stop, synced_gpus=False,
                                    pad_token_id=stop[0], logits_processor=[choose])       # [batch, prompt + new], left padded
            for i, row in zip(rows, output[:, prompt_length:].tolist()):
                end = next((k for k, token in enumerate(row) if token in stop), len(row))
                text = tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)
                said[i] = (text, end < len(row), row[:end + 1]) if with_end else text
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, said)
        said = {i: text for share in shares for i, text in share.items()}
    return [said[i] for i in range(len(examples))]


def text_answers(model, processor, examples, path, *, max_new_tokens, batch_size=64, progress=True,
                 **decoding):
    """The text view's greedy answers -> {id: {"text", "ids", "ended"}}; what a file at `path` holds
    of the same model and prompts is not asked again.

    Each rank takes its share of a chunk; rank 0 appends a chunk's lines at once, so that a kill
    loses one chunk at most. Behind the first chunk it says how long all of them take."""
    path, tokenizer = Path(path), processor.tokenizer
    some = torch.cat([p.detach().flatten()[:1000].float().cpu() for p in (*models.decoder(model).parameters(), models.head_weight(model))])
    weights = zlib.crc32(some.numpy().tobytes())                                                 # another student, or this one trained further
    asks = {e.id: f"{weights} {max_new_tokens} {data.text_prompt(tokenizer, e.transcript, data.question_text(e))}" for e in examples}
    keys = {i: zlib.crc32(prompt.encode()) for i, prompt in asks.items()}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")] if path.exists() else []
    known = {line["id"]: line for line in map(json.loads, lines) if keys.get(line["id"]) == line["key"] and "ended" in line}
    world = 1
    if dist.is_initialized():
        dist.barrier()                                                    # everybody has read before anybody writes
        world = dist.get_world_size()
    first = world == 1 or dist.get_rank() == 0
    if first:                                                             # other questions' answers and a line that a kill cut off go
        partial = path.with_name(f"{path.name}.part")                     # renamed, so that a kill here does not cost all answers
        partial.write_text("".join(json.dumps(line) + "\n" for line in known.values()), encoding="utf-8")
        os.replace(partial, path)
    todo, chunk = [e for e in examples if e.id not in known], 4 * batch_size * world
    begun = time.time()
    for start in tqdm(range(0, len(todo), chunk), desc="the text view's answers", disable=not progress or not todo or not first):
        rows = todo[start:start + chunk]
        said = generate(model, processor, rows, view="text", words="transcript", temperature=0, max_new_tokens=max_new_tokens, with_end=True,
                        batch_size=batch_size, progress=False, **decoding)
        new = [{"id": e.id, "key": keys[e.id], "text": text, "ids": ids, "ended": ended}
               for e, (text, ended, ids) in zip(rows, said)]
        known |= {line["id"]: line for line in new}
        if first:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in new))
            if progress and start == 0 and len(todo) > chunk:
                minutes = (time.time() - begun) / chunk * len(todo) / 60
                tqdm.write(f"the text view answers {len(todo):,} prompts, "
                           f"about {minutes:.0f} minutes")
    return {e.id: known[e.id] for e in examples}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Rollouts

@dataclass
class Kind:
    """What a prompt's rollout is drawn for."""
    temperature: float
    kl: bool = False            # it carries L_tok
    group: bool = False         # it is rewarded


@dataclass
class Rollout:
    row: int                    # which of the rank's prompts of this step it answers
    temperature: float
    kl: bool                    # does it carry L_tok?
    group: bool                 # is it rewarded?
    ids: list[int]              # its tokens, the one that ended it too
    text: str = ""
    ended: bool = True          # by itself; False: cut at max_new_tokens
    reward: float = 0.0
    advantage: float = 0.0
    divergence: list[float] = field(default_factory=list)      # D_t of its tokens, once it has been scored

    @property
    def unusable(self):
        """Empty, or cut off: no answer can be learnt from it."""
        return not self.ended or len(self.ids) == 1


def roll_out(student, processor, prompts, kinds, *, key, max_new_tokens):
    """data.Prompts -> Rollouts in one batched call, each prompt's behind each other. kinds: the Kinds of every prompt's
    rollouts; key: what makes this step's random numbers its own, such as "seed step". From the full softmax minus the control tokens."""
    if not kinds:
        return []
    rollouts = [Rollout(row, kind.temperature, kind.kl, kind.group, []) for row in range(len(prompts.examples)) for kind in kinds]
    tokenizer, stop, banned, n = processor.tokenizer, stop_ids(processor.tokenizer), banned_ids(student, processor.tokenizer), len(kinds)
    places = data.pad_left(prompts.audio, tokenizer)                                             # ids, mask, positions: [prompts, seq] each
    inputs, seq = {k: v.to(student.device) for k, v in {**places, **prompts.features}.items()}, places["input_ids"].shape[1]
    keys = [f"{key} {example.id} {i}" for example in prompts.examples for i in range(n)]
    choose = chooser(keys, seq, banned, max_new_tokens=max_new_tokens, temperature=[r.temperature for r in rollouts])
    # transformers 5.17 calls it past_key_values, 5.40 will call it cache alone
    cached = "cache" if "cache" in inspect.signature(student.forward).parameters else "past_key_values"
    with plain_decoding(student):
        # Sound and prompt are the same for a prompt's n rollouts: run them once, all but the last token, which generate() starts from
        cache = DynamicCache(config=student.config.get_text_config())
        models.hear(student, **{name: x[:, :-1] if name in places else x for name, x in inputs.items()}, **{cached: cache}, use_cache=True)
        cache.batch_repeat_interleave(n)                                                         # A A A B B B, as the rollouts
        said = student.generate(**{name: inputs[name].repeat_interleave(n, 0) for name in places}, **{cached: cache},
                                max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=stop, pad_token_id=stop[0],
                                synced_gpus=False, logits_processor=[choose])[:, seq:].tolist()  # [rollouts, new]
    for rollout, row in zip(rollouts, said):
        end = next((k for k, token in enumerate(row) if token in stop), len(row))
        rollout.ids = row[:end + 1]
        rollout.ended = end < len(row)
        rollout.text = tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)
    return rollouts


def samples(shown, prompts, references, verdicts, tokenizer, most=5):
    """Scored Rollouts -> records to read: transcript, question, the rollout with its `most` divergent tokens marked ("is [[seven 2.31]]"), the text
    view's answer, and what the judge says to both."""
    examples = [prompts.examples[r.row] for r in shown]
    judged = verdicts([(e, r.text, references[e.id]["text"]) for e, r in zip(examples, shown)])
    records = []
    for e, r, right in zip(examples, shown, judged):
        top = sorted(range(len(r.divergence)), key=lambda i: -r.divergence[i])[:most]
        text = "".join(f"[[{token} {r.divergence[i]:.2f}]]" if i in top else token for i, token in enumerate(map(tokenizer.decode, r.ids)))
        records.append({"id": e.id, "temperature": r.temperature, "transcript": e.transcript, "question": data.question_text(e), "rollout": text,
                        "text_view": references[e.id]["text"],
                        "verdict": "no reference" if not references[e.id]["ended"] else "right" if right else "wrong"})
    return records
