"""Listen, answer, score: the two benchmarks of paper A, and whether one run is really better than another.

Audio question answering (AQA) is scored as MMAU scores it: multiple choice over sound, music and speech, accuracy in per
cent. Emotion recognition (SER) is scored by unweighted accuracy: the mean of the recall of each emotion, so that a model that
says "neutral" to everything gets 25 of 100 however many neutral sentences there are. The file goes from text to numbers:
what did the model choose (1), was it right (2), how sure are we (3), how it was made to talk (4), and all of it together (5).

Where this departs from the papers and from MMAU's own script:
1. Both counts are given. MMAU's script matches words in the whole output, where a reasoning trace that merely discusses a
   wrong choice loses the point. As in the paper, our headline drops the trace and extracts the option that was chosen; MMAU's
   rule then judges that option. The same rule on the raw text is under "official".
2. An answer that names no option, or two, is wrong and counted under "no_answer". Nothing is guessed.
3. "average" is over questions (micro), not over tasks. On MMAU test-mini, 333 + 334 + 333, the two agree.
4. Decoding is the paper's (temperature 0.6, top-k 5, top-p 0.5), but every random number belongs to (seed, example, position):
   the same question gets the same answer alone, in any batch, on any number of ranks.

    python evaluate.py --task mmau --predictions FILE --out results.json      # score MMAU's own format, no model needed
    python evaluate.py --task both --model DIR --data test.jsonl --out runs/eval
    python evaluate.py --task both --model DIR --data test.jsonl noise.jsonl telephone.jsonl      # the further sets are reported apart
    python evaluate.py --task both --model DIR2 --data test.jsonl --compare runs/eval/results.json
    python evaluate.py --task layers --model runs/source_layer/step-0000169 --data test.jsonl     # which layers are alike? (inside.py)
"""

import argparse
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import GenerationConfig

import data

TASKS = ("sound", "music", "speech")    # MMAU's tasks: what is scored as multiple choice
SER_TASK = "emotion"                    # the task name of emotion recognition in a manifest
NO_ANSWER = "no answer"

# ---------------------------------------------------------------------------------------------------------------------
# 1. What did the model choose?

TAGS = re.compile(data.TAG + r"|<\|[^<>|]*\|>", re.I)                    # the stages' tags and control tokens
STATEMENT = re.compile(r"\b(?:answer|correct (?:option|choice))\b[^.:=\n]{0,40}?(?:\bis\b|[:=])(?=\W*?((?:[(\[-]\s*)?\w.*))", re.I)
SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])[.!?]\s|\n")                 # but the full stop of "B. gold" ends no sentence
LEADING_LETTER = re.compile(r"[(\[]?([A-Z])(?:[)\]]|[.:](?=\s|$)|\s+[-–—]\s|$)", re.I)     # "B", "(B)", "B.", "b) gold", "B - gold"
NAMED_LETTER = re.compile(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+([A-Z])\b")           # "... is (B)", "option B"
BARE_LETTER = re.compile(r"([A-Z])\s")                                  # "B because ..."


def final_answer(output_text):
    """The part of a four-stage answer that is meant to be scored, without tags: <RESPONSE>, closed or not; without one, what
    follows </THINK>; of a trace that never ended, only its last "the answer is ..."; of plain text, everything."""
    text = re.split("</THINK>", output_text, maxsplit=1, flags=re.I)[-1]
    response = data.parse_response(text)["response"]
    if response is not None:
        text = response
    elif re.search("<THINK>", text, re.I):
        text = (STATEMENT.findall(text) or [""])[-1]
    return TAGS.sub(" ", text)


def plain(text):
    """One line, without quotes, markdown stars and closing punctuation."""
    return " ".join(re.sub(r"[*\"“”`]", "", text).split()).strip(" .,;!")


def named_choice(text, choices):
    """The one choice that `text` names by its words or its letter. None when it names none, or several: letter and words that
    contradict each other are not an answer."""
    heads = {plain(text).casefold(), plain(SENTENCE_END.split(text.strip(), maxsplit=1)[0]).casefold()}      # all of it; its first sentence
    by_words, rest = set(), plain(text)
    # Longest first, and what was found is cut out: "white gold" does not also name "gold", the letter in "B minor" not option B.
    for choice in sorted(filter(None, map(plain, choices)), key=len, reverse=True):
        if choice.casefold() in heads:
            return next(c for c in choices if plain(c) == choice)
        words = r"(?<![\w-])(?<!\d[.,])(?<!\bnot )(?<!\bno )" + re.escape(choice) + r"(?![\w#]|[.,-]\d|-\w)"
        rest, found = re.subn(words, "\0", rest, flags=re.I if len(choice) > 1 else 0)     # "a dog" does not name the note A
        if found:
            by_words.add(choice.casefold())
    letters = {a or b for a, b in NAMED_LETTER.findall(rest)}
    if lead := LEADING_LETTER.match(rest):
        letters.add(lead[1].upper())
    elif (bare := BARE_LETTER.match(rest)) and not (bare[1] == "A" and by_words):      # "A dog barks": an article, not option A
        letters |= {bare[1], *re.findall(r"\b[B-Z]\b", rest)}             # "A and B" is two
    by_letter = {plain(choices[i]).casefold() for i in range(len(choices)) if chr(ord("A") + i) in letters}
    named = by_words | by_letter
    return next(c for c in choices if plain(c).casefold() in named) if len(named) == 1 else None


def extract_choice(output_text, choices):
    """output_text: what the model said. choices: list of str. Returns the chosen one of `choices`, or None; never a guess.

    The last "the answer is ..." counts before the rest of the answer, and its first sentence before the rest of its line."""
    answer = final_answer(output_text)
    statement = (STATEMENT.findall(answer) or [""])[-1]
    return (named_choice(SENTENCE_END.split(statement, maxsplit=1)[0], choices) or named_choice(statement, choices)
            or named_choice(answer, choices))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Was it right?

def tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmau_correct(answer, prediction, choices):
    """MMAU's official rule: every word of the answer is said, and no word that only wrong choices have.

    Words are sets, so the rule is blind to order ("knock then beep" = "beep then knock"), and an innocent "the" or "a" counts
    against an output where a wrong choice holds it: "The answer is (A) gold" fails beside the choice "a ring"."""
    said, wanted = tokens(prediction), tokens(answer)
    forbidden = set().union(*map(tokens, choices)) - wanted
    return bool(said) and wanted <= said and not said & forbidden


def score_mmau(records):
    """Score predictions in MMAU's record format: dicts with id, task, choices, answer and (if there is one) model_output.

    Returns {"sound", "music", "speech", "average": accuracy in per cent of the chosen option (None where nothing was scored);
    "intervals": Wilson's 95 %, per cent; "official": the same by MMAU's rule on the raw output, with the official script's
    [right, scored] by task, difficulty and sub-category; "counts"; "correct": task -> id -> bool, for pairing}. "average" is
    over all scored records (micro). As in the official script, a record without model_output is skipped, not failed.
    "counts" also holds "indistinct", questions where a wrong choice would pass for the answer under MMAU's rule, and "no_gold",
    questions whose answer is none of the choices."""
    correct, official = {task: {} for task in TASKS}, {task: {} for task in TASKS}
    counts = Counter(records=len(records), skipped=0, no_answer=0, indistinct=0, no_gold=0)
    groups = {"task": {}, "difficulty": {}, "sub-category": {}}
    for record in records:
        output, choices, task = record.get("model_output"), record["choices"], record["task"]
        if output is None:
            counts["skipped"] += 1
            continue
        # Some of MMAU's answers carry their letter, "(A) Violin and Cello", though the choices do not: read them like an output.
        gold = extract_choice(record["answer"], choices)
        answer = gold or record["answer"]
        chosen = extract_choice(output, choices)
        counts["no_answer"] += chosen is None
        counts["no_gold"] += gold is None
        counts["indistinct"] += any(mmau_correct(answer, c, choices) for c in choices if c != answer)
        correct[task][record["id"]] = chosen is not None and mmau_correct(answer, chosen, choices)
        official[task][record["id"]] = raw = mmau_correct(record["answer"], output, choices)
        for key, table in groups.items():
            if key in record:
                right, scored = table.get(str(record[key]), (0, 0))
                table[str(record[key])] = [right + raw, scored + 1]

    def accuracies(by_task):
        lists = {task: list(by_task[task].values()) for task in TASKS}
        lists["average"] = sum(lists.values(), [])
        return {name: 100 * sum(v) / len(v) if v else None for name, v in lists.items()}, lists

    per_cent, lists = accuracies(correct)
    return {**per_cent, "intervals": {name: wilson(sum(v), len(v)) for name, v in lists.items()},
            "official": {**accuracies(official)[0], "counts": groups}, "counts": dict(counts), "correct": correct}


def score_ser(labels, predictions, classes, *, samples=10_000, seed=0):
    """labels, predictions: lists of class names, one per utterance; a prediction outside `classes` (None) is no answer: wrong.

    Returns {"ua": per cent, the mean over classes of recall (classes without an utterance are left out); "recall": per class;
    "interval": bootstrap 95 %, resampled within each class; "confusion": label -> prediction or "no answer" -> count}.
    Raises ValueError for a label that is no class."""
    if unknown := sorted(set(labels) - set(classes)):
        raise ValueError(f"the label {unknown[0]!r} is not among the classes {', '.join(classes)}")
    confusion = {label: {name: 0 for name in (*classes, NO_ANSWER)} for label in classes}
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label][prediction if prediction in classes else NO_ANSWER] += 1
    sizes = {label: sum(row.values()) for label, row in confusion.items()}
    recall = {label: 100 * confusion[label][label] / sizes[label] for label in classes if sizes[label]}
    if not recall:
        return {"ua": None, "recall": {}, "interval": [None, None], "confusion": confusion}
    # n utterances drawn with replacement from n of which k were right hold Binomial(n, k/n) right ones: no need to draw them.
    random = np.random.default_rng(seed)
    draws = np.mean([random.binomial(sizes[c], recall[c] / 100, samples) / sizes[c] for c in recall], axis=0)     # [samples]
    return {"ua": sum(recall.values()) / len(recall), "recall": recall, "interval": percentiles(100 * draws), "confusion": confusion}


# ---------------------------------------------------------------------------------------------------------------------
# 3. How sure are we?

def percentiles(draws):
    return [float(x) for x in np.percentile(draws, [2.5, 97.5])]


def wilson(right, total, z=1.959964):
    """Wilson's 95 % interval of an accuracy, per cent: unlike p +- 2 s.e. it stays inside 0..100 and is not empty at 0 and 100."""
    if not total:
        return [None, None]
    p, shrink = right / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * (p * (1 - p) / total + z * z / (4 * total * total)) ** 0.5
    return [100 * max(0.0, centre - half), 100 * min(1.0, centre + half)]


def paired_bootstrap(correct_a, correct_b, *, labels=None, samples=10_000, seed=0):
    """How much better is A than B on the same examples? correct_a, correct_b: bools, one per example, in the same order.

    Returns (difference, [low, high]): accuracy of A minus that of B in points, and its 95 % bootstrap interval. With `labels`
    (class of each example) it is the difference in unweighted accuracy, resampled within each class. Pairing removes what makes
    a question easy or hard for both: the interval is much narrower than two separate ones suggest.
    Raises ValueError when the lists differ in length or are empty."""
    a, b = np.asarray(correct_a, dtype=int), np.asarray(correct_b, dtype=int)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"a paired comparison needs two equally long lists, not {a.size} and {b.size} examples")
    labels = np.zeros(a.size) if labels is None else np.asarray(labels)
    random, differences, draws = np.random.default_rng(seed), [], []
    for label in np.unique(labels):
        d = (a - b)[labels == label]                                      # +1 only A is right, -1 only B, 0 no difference
        n, wins, losses = d.size, (d == 1).sum(), (d == -1).sum()
        # n draws with replacement, counted by outcome: no need to draw them one by one
        drawn = random.multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], samples)      # [samples, 3]
        differences.append(d.mean())
        draws.append((drawn[:, 0] - drawn[:, 1]) / n)
    return 100 * float(np.mean(differences)), percentiles(100 * np.mean(draws, axis=0))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Making the model talk

def chooser(ids, prompt_length, banned, *, max_new_tokens, temperature, top_k, top_p, seed):
    """The whole decoding rule as one logits processor: it leaves one token possible, so that generate's argmax takes it.

    ids: names of the batch's rows. The number that decides row r's token at position t depends on (seed, ids[r], t) alone:
    not on the batch around it, the rank, or what was sampled before. temperature 0: the most probable token."""
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
                           for name in ids])                              # [batch, max_new_tokens]

    def choose(input_ids, scores):                                        # [batch, prompt + t], [batch, vocab]
        scores = scores.float().index_fill(1, torch.tensor(banned, dtype=torch.long, device=scores.device), -torch.inf)
        if temperature == 0:
            return scores
        logits, candidates = (scores / temperature).topk(min(top_k or scores.shape[1], scores.shape[1]))     # [batch, k], best first
        p = logits.softmax(-1)
        p = p * (p.cumsum(-1) - p < top_p)                                # a token stays while those before it hold less than top_p
        u = uniform[:, input_ids.shape[1] - prompt_length, None].to(p.device) * p.sum(-1, keepdim=True)       # [batch, 1]
        pick = (p.cumsum(-1) <= u).sum(-1, keepdim=True).minimum((p > 0).sum(-1, keepdim=True) - 1)          # inverse of the cumulative sum
        return torch.full_like(scores, -torch.inf).scatter(1, candidates.gather(1, pick), 0.0)

    return choose


@torch.no_grad()
def generate(model, processor, examples, *, view="audio", tokenizer=None, words=None, batch_size=16, max_new_tokens=512,
             temperature=0.6, top_k=5, top_p=0.5, seed=0, progress=True, with_end=False):
    """What the model says to each example: a list of str in the order of `examples` (list of data.Example), tags included.

    view="audio": the model hears; "text": it reads example.<words> instead, through `tokenizer` (default: the processor's own;
    for a text-only LLM pass its tokenizer as processor). with_end: pairs (str, did it end by itself?) instead. The checkpoint's own
    sampling settings are put aside: what the arguments say is what happens. Under torch.distributed each rank takes its share, and every
    rank returns all outputs."""
    tokenizer = tokenizer or getattr(processor, "tokenizer", processor)
    audio_token = getattr(processor, "audio_token", None)
    vocabulary = tokenizer.get_vocab()
    banned = [vocabulary[audio_token]] if audio_token in vocabulary else []               # it stands for sound; nobody can say it
    stop = sorted({data.turn_end_id(tokenizer), tokenizer.eos_token_id} - {None})          # base models close with <|endoftext|>
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    mine = list(range(rank, len(examples), world))
    # The rows of a batch should be about as long: in tokens, roughly, 25 a second of audio and one for 4 characters of text.
    lengths = {i: len(examples[i].question + (getattr(examples[i], words) or "" if words else "")) / 4 for i in mine}
    if view == "audio":
        lengths = {i: lengths[i] + 25 * s for i, s in zip(mine, data.check_audio([examples[i] for i in mine]))}
    mine.sort(key=lengths.get, reverse=True)                              # longest first: out of memory shows at once, not at the end
    # generate() fills what it is not told from model.generation_config (repetition_penalty, top_p, ...): lend it an empty one.
    settings, training = model.generation_config, [module for module in model.modules() if module.training]
    model.generation_config = GenerationConfig()
    model.eval()
    said = {}
    try:
        for start in tqdm(range(0, len(mine), batch_size), desc="answers", disable=not progress or rank > 0, leave=False):
            rows = mine[start:start + batch_size]
            inputs = data.prompt_batch([examples[i] for i in rows], processor, view=view, tokenizer=tokenizer, words=words)
            inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
            prompt_length = inputs["input_ids"].shape[1]
            choose = chooser([examples[i].id for i in rows], prompt_length, banned, max_new_tokens=max_new_tokens,
                             temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=stop,
                                    pad_token_id=stop[0], logits_processor=[choose])       # [batch, prompt + new], left padded
            for i, row in zip(rows, output[:, prompt_length:].tolist()):
                end = next((k for k, token in enumerate(row) if token in stop), len(row))
                text = tokenizer.decode(row[:end], clean_up_tokenization_spaces=False)
                said[i] = (text, end < len(row)) if with_end else text
    finally:
        model.generation_config = settings
        for module in training:
            module.training = True
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, said)
        said = {i: text for share in shares for i, text in share.items()}
    return [said[i] for i in range(len(examples))]


# ---------------------------------------------------------------------------------------------------------------------
# 5. All of it together

def score(examples, outputs):
    """Multiple choice and emotion examples, and what was said: {"aqa": score_mmau's dict, "ser": score_ser's and "correct":
    class -> id -> bool}, each only if it has examples; and a list of samples, one dict each."""
    samples = [{"id": e.id, "audio_id": str(e.audio), "question": e.question, "choices": e.choices, "answer": e.answer,
                "task": e.task, "split": e.split, "model_output": output, "chosen": extract_choice(output, e.choices)}
               for e, output in zip(examples, outputs, strict=True)]
    aqa, ser, results = [s for s in samples if s["task"] in TASKS], [s for s in samples if s["task"] == SER_TASK], {}
    if aqa:
        results["aqa"] = score_mmau(aqa)
    if ser:
        classes = sorted({c for s in ser for c in s["choices"]})
        results["ser"] = score_ser([s["answer"] for s in ser], [s["chosen"] for s in ser], classes)
        results["ser"]["correct"] = {c: {s["id"]: s["chosen"] == c for s in ser if s["answer"] == c} for c in classes}
    for s in samples:
        s["correct"] = results["aqa"]["correct"][s["task"]][s["id"]] if s["task"] in TASKS else s["chosen"] == s["answer"]
    return results, samples


def evaluate_model(model, processor, examples, *, splits=(), **decoding):
    """Generate (decoding: generate's keywords) and score. splits: [(name, examples), ...], each reported apart. Raises data.DataError
    for an example without choices or of another task than AQA's and SER's.

    Returns {"aqa": score_mmau's dict, "ser": score_ser's dict, "splits": name -> the same two, "samples": list of dicts}."""
    groups = [("main", examples), *splits]
    everything = [e for _, examples in groups for e in examples]
    for e in everything:
        if e.task not in (*TASKS, SER_TASK) or not e.choices:
            raise data.DataError(f"{e.where}: cannot be scored; give it choices and one of the tasks {', '.join((*TASKS, SER_TASK))}")
    outputs = iter(generate(model, processor, everything, **decoding))
    results, samples = {}, []
    for name, examples in groups:
        results[name], said = score(examples, [next(outputs) for _ in examples])
        samples += [{"set": name, **s} for s in said]
    return {**results.pop("main"), "splits": results, "samples": samples}


def report(results):
    """The results as a table, in per cent with 95 % intervals."""
    lines = []
    if aqa := results.get("aqa"):
        lines.append(f"{'AQA':10}{'accuracy':>9}   95 % interval     raw text, MMAU's rule")
        for name in (*TASKS, "average"):
            if aqa[name] is not None:
                low, high = aqa["intervals"][name]
                lines.append(f"{name:10}{aqa[name]:9.2f}   [{low:5.2f}, {high:6.2f}]  {aqa['official'][name]:9.2f}")
        lines.append("{records} questions, {skipped} skipped (no model_output), {no_answer} without a clear answer".format(**aqa["counts"]))
        for key, what in {"indistinct": "a wrong choice has the answer's words: MMAU's rule takes it for right",
                          "no_gold": "the answer is none of the choices"}.items():
            lines += [f"in {aqa['counts'][key]} of them {what}"] * (aqa["counts"][key] > 0)
    if ser := results.get("ser"):
        low, high = ser["interval"]
        names = list(next(iter(ser["confusion"].values())))
        lines += [f"{'SER':10}{ser['ua']:9.2f}   [{low:5.2f}, {high:6.2f}]  unweighted accuracy; below: said (columns) of meant (rows)",
                  " " * 10 + "".join(f"{name:>10}" for name in names)]
        lines += [f"{label:10}" + "".join(f"{row[name]:10}" for name in names) for label, row in ser["confusion"].items()]
    for name, split in results.get("splits", {}).items():
        lines += [f"-- {name}", report(split)]
    return "\n".join(lines)


def compare(results, other):
    """Lines that say how far `results` are from `other` (dicts of evaluate_model), on the examples that both have."""
    lines = []
    for part, names in ("aqa", (*TASKS, "average")), ("ser", ("ua",)):
        mine, theirs = (r.get(part, {}).get("correct", {}) for r in (results, other))
        for name in names:
            group = [(g, i) for g in mine if name in (g, "average", "ua") for i in mine[g] if i in theirs.get(g, {})]
            if group:
                difference, (low, high) = paired_bootstrap([mine[g][i] for g, i in group], [theirs[g][i] for g, i in group],
                                                           labels=[g for g, _ in group] if part == "ser" else None)
                lines.append(f"{part} {name:8}{difference:+7.2f} points  [{low:+.2f}, {high:+.2f}]  {len(group)} pairs")
    return lines or ["the two have no example in common"]


def report_change(before, after):
    """Two evaluations of one run as a table: before, after, paired difference with its interval."""
    lines = [f"{'':10}{'before':>9}{'after':>9}   difference, paired, 95 % interval"]
    differences = {tuple(line.split(None, 2)[:2]): line.split(None, 2)[2] for line in compare(after, before)}
    for part, names in ("aqa", (*TASKS, "average")), ("ser", ("ua",)):
        for name in names:
            if part in before and before[part][name] is not None:
                label = name if part == "aqa" else "SER"
                lines.append(f"{label:10}{before[part][name]:9.2f}{after[part][name]:9.2f}   {differences.get((part, name), '')}")
    return "\n".join(lines)


def name_failures(before, after):
    """Two evaluations of one run -> a sentence for each known failure signature that they show (README, Troubleshooting)."""
    said = []
    was = {name: before["aqa"][name] for name in TASKS if before.get("aqa", {}).get(name) is not None}
    gain = {name: after["aqa"][name] - was[name] for name in was}
    lost = before["ser"]["ua"] - after["ser"]["ua"] if "ser" in before else 0
    if lost > 2 and sum(gain.values()) > 0:
        said.append(f"SER fell by {lost:.1f} points while AQA rose: the student forgets how to hear; raise --alpha-ac")
    if gain.get("speech", 0) > 5:                       # of what was wrong, how much is right now? (points alone would blame a task near 100)
        mended = {name: max(0, 100 * gain[name] / max(100 - was[name], 1)) for name in was}
        said += [f"{name} loses {mended[name]:.0f} % of its errors, speech {mended['speech']:.0f} %: do the descriptions say too little of {name}? "
                 "read some" for name in ("sound", "music") if name in was and mended[name] < mended["speech"] / 2]
    return said


def plot_run(folder):
    """A training run's folder (log.jsonl, results.json) -> run.png: the loss terms over the steps, accuracies before and after."""
    import matplotlib
    matplotlib.use("Agg")                                                 # no screen needed
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    results = json.loads((Path(folder) / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name in ("sft", "top", "layer", "acoustic"):
        values = [line[name] for line in log if name in line]
        if values:
            left.plot([line["step"] for line in log if name in line], np.maximum(values, 1e-6), label=name, linewidth=1.5)
    left.set(xlabel="step", ylabel="loss term, unweighted", yscale="log", title="what the student learns from")
    left.legend(frameon=False)
    bars = [(name, *((r["aqa"][name], r["aqa"]["intervals"][name]) for r in (results["before"], results["after"])))
            for name in (*TASKS, "average") if results["before"].get("aqa", {}).get(name) is not None]
    if "ser" in results["before"]:
        bars.append(("SER\n(never trained)", *((r["ser"]["ua"], r["ser"]["interval"]) for r in (results["before"], results["after"]))))
    for side, (when, colour) in enumerate((("before", "#b8c4d6"), ("after", "#2f5d9b"))):
        at = np.arange(len(bars)) + 0.4 * side - 0.2
        height = np.array([bar[1 + side][0] for bar in bars])
        low, high = np.array([bar[1 + side][1] for bar in bars]).reshape(-1, 2).T
        error = [np.maximum(0, height - low), np.maximum(0, high - height)]
        right.bar(at, height, 0.38, color=colour, label=when, yerr=error, ecolor="#555555", capsize=2)
        for x, y in zip(at, height):
            right.text(x, 2, f"{y:.0f}", ha="center", fontsize=8, color="black" if side == 0 else "white")
    right.set(ylabel="accuracy (%)", ylim=(0, 100), title="hearing questions, before and after")
    right.set_xticks(range(len(bars)), [bar[0] for bar in bars])
    right.legend(frameon=False, loc="upper center", ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(folder) / "run.png", dpi=130)
    plt.close(figure)


def read_json(path, kind):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise data.DataError(f"{path}: cannot be read as JSON ({error}); give {kind}") from None


def read_predictions(path):
    """A JSON list of MMAU records, all of it checked. Raises data.DataError with the file, the record's number and a remedy."""
    records, ids = read_json(path, "a JSON list of MMAU's records with the key model_output"), set()
    if not isinstance(records, list) or not records:
        raise data.DataError(f"{path}: holds no list of records; give a JSON list of MMAU's records with the key model_output")
    for n, r in enumerate(records, 1):
        fault = None
        if not isinstance(r, dict):
            fault = "is not an object"
        elif missing := [key for key in ("id", "task", "answer") if not isinstance(r.get(key), str) or not r[key]]:
            fault = f"has no text under {missing[0]!r}"
        elif not isinstance(r.get("choices"), list) or not r["choices"] or not all(isinstance(c, str) for c in r["choices"]):
            fault = "has no list of texts under 'choices'"
        elif not isinstance(r.get("model_output"), str | None):
            fault = "holds something that is not text under 'model_output'"
        elif r["task"] not in TASKS:
            fault = f"has the task {r['task']!r}, not one of {', '.join(TASKS)}"
        elif r["id"] in ids:
            fault = f"repeats the id {r['id']!r}"
        if fault:
            raise data.DataError(f"{path}: record {n} {fault}; start from MMAU's own file and add only model_output")
        ids.add(r["id"])
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["mmau", "aqa", "ser", "both", "layers", "features"],
                        help="mmau: score a file of predictions; aqa, ser, both: run a model, on multiple choice, emotions or both; layers, "
                             "features: look inside a student and its teacher (inside.py)")
    parser.add_argument("--out", help="mmau: the file for results.json; otherwise a folder (default runs/evaluate)")
    parser.add_argument("--compare", metavar="RESULTS", help="another run's results.json: print how far this run is from it, paired")
    # what is scored
    parser.add_argument("--predictions", metavar="FILE", help="mmau: JSON list of MMAU's records, with the output under model_output")
    parser.add_argument("--model", metavar="DIR", help="an audio language model: a folder or a name on the hub")
    parser.add_argument("--data", metavar="FILE", nargs="+", help="a manifest (JSONL; see data.py); each further one is reported apart")
    parser.add_argument("--teacher", metavar="DIR", help="layers, features: the text LLM; default: the one that the run of --model names")
    parser.add_argument("--split", help="only the manifest's examples of this split")
    parser.add_argument("--limit", type=int, help="only the first N examples; layers, features: N of them, spread over the file")
    # how the model talks
    parser.add_argument("--temperature", type=float, default=0.6, help="paper: 0.6")
    parser.add_argument("--top-k", type=int, default=5, help="paper: 5; 0: all tokens")
    parser.add_argument("--top-p", type=float, default=0.5, help="paper: 0.5; 1: all of the probability")
    parser.add_argument("--greedy", action="store_true", help="the most probable token, always")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens an answer may have, trace included")
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered at once")
    args = parser.parse_args()
    for flag in ["predictions"] if args.task == "mmau" else ["model", "data"]:
        if not getattr(args, flag):
            parser.error(f"--task {args.task} needs --{flag}")
    if args.greedy:
        args.temperature = 0.0
    try:
        look_inside(args) if args.task in ("layers", "features") else run(args)
    except data.DataError as error:
        raise SystemExit(f"evaluate.py: {error}") from None


def look_inside(args):
    """--task layers and features: what inside.py has to say, as JSON, a PNG and a few lines. A checkpoint's run tells the rest: its teacher,
    its map, and the student that it started from. Every second example fits W_i, the others are looked at."""
    import common
    import inside
    import layer_map

    model = Path(args.model)
    settings = read_json(model.parent / "config.json", "a run's flags") if (model / "state.pt").exists() else {}
    teacher_name = args.teacher or settings.get("teacher")
    if not teacher_name:
        raise data.DataError(f"{model}: is no checkpoint of a run, so nobody knows its teacher; give --teacher")
    examples = [e for e in data.read_manifest(args.data[0], split=args.split) if e.reasoning and e.description and e.task in TASKS]
    if len(args.data) > 1:
        raise data.DataError(f"{args.data[1]}: --task {args.task} looks at one manifest; give the first alone")
    most = min(len(examples), args.limit or 80)
    examples = [examples[i * len(examples) // most] for i in range(most)]                  # of every task, however the file is sorted
    if len(examples) < 4:
        raise data.DataError(f"{args.data[0]}: has {len(examples)} examples with reasoning and description; at least 4 are needed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, tokenizer = common.load_text_model(teacher_name, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    teacher.to(device)

    def states(name):
        student, processor = common.load_audio_model(str(name), dtype=teacher.dtype)
        return [inside.states(student.to(device), processor, teacher, tokenizer, part) for part in (examples[::2], examples[1::2])]

    known, found = states(settings.get("student", model) if args.task == "layers" else model)
    pairs = layer_map.pairs(len(found["student"]), len(found["teacher"]))                  # the whole map, whatever the run distilled
    projections = inside.fit(pairs, known)
    out = Path(args.out or "runs/evaluate")
    out.mkdir(parents=True, exist_ok=True)
    if args.task == "features":
        report_ = inside.features_report(found, pairs, projections)
        inside.plot_features(report_, out / "features.png")
    else:
        before = inside.layers_report(found, pairs, projections)
        known, found = states(model)
        beside = model / "projections.safetensors"
        refitted = inside.fit(pairs, known)                                                # for pairs that the run did not distil
        trained = inside.trained(beside, pairs, refitted) if beside.exists() else refitted
        report_ = {"pairs": pairs, "before": before, "after": inside.layers_report(found, pairs, trained)}
        report_["vocabulary"] = report_["after"]["vocabulary"]
        inside.plot_layers(before, report_["after"], pairs, out / "layers.png")
    print(*(inside.features_lines if args.task == "features" else inside.layers_lines)(report_), sep="\n")
    common.write_json(out / f"{args.task}.json", report_)
    print(f"{out}: {args.task}.json, {args.task}.png")


def run(args):
    other = None
    if args.compare:                                                      # before the work, not after it
        other = read_json(args.compare, "the results.json of another run")
        other = other.get("after", other) if isinstance(other, dict) else {}          # a training run holds "before" and "after"
        if not any(isinstance(other.get(part), dict) and isinstance(other[part].get("correct"), dict) for part in ("aqa", "ser")):
            raise data.DataError(f"{args.compare}: holds no results; give a results.json that evaluate.py or a training run wrote")
    if args.task == "mmau":
        results, out = {"aqa": score_mmau(read_predictions(args.predictions))}, args.out and Path(args.out)
    else:
        wanted = {"aqa": TASKS, "ser": (SER_TASK,), "both": (*TASKS, SER_TASK)}[args.task]
        sets = []
        for file in args.data:
            sets.append((Path(file).stem, [e for e in data.read_manifest(file, split=args.split) if e.task in wanted][:args.limit]))
            if not sets[-1][1]:
                raise data.DataError(f"{file}: has no example of the tasks {', '.join(wanted)}; check --task and --split")
        out = Path(args.out or "runs/evaluate") / "results.json"
        from common import load_audio_model
        gpu = torch.cuda.is_available()
        model, processor = load_audio_model(args.model, dtype=torch.bfloat16 if gpu else torch.float32)
        model.to("cuda" if gpu else "cpu")
        results = evaluate_model(model, processor, sets[0][1], splits=sets[1:], batch_size=args.batch_size,
                                 max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                 seed=args.seed)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    if samples := results.pop("samples", None):
        (out.parent / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        mmau = [s for s in samples if s["task"] in TASKS]
        (out.parent / "predictions.json").write_text(json.dumps(mmau, indent=1))          # MMAU's format, for its own script
    if out:
        out.write_text(json.dumps({**results, "settings": vars(args)}, indent=1))
    print(report(results))
    if other is not None:
        print(f"against {args.compare}, paired, 95 % bootstrap interval:", *compare(results, other), sep="\n")


if __name__ == "__main__":
    main()
