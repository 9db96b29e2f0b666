"""Listen, answer, score: the two benchmarks of paper A, and whether one run is really better than another.

Audio question answering (AQA) is scored as MMAU and MMAR score it: multiple choice over sound, music, speech and their mixes, accuracy in per
cent. Emotion recognition (SER) is scored by unweighted accuracy: the mean of the recall of each emotion, so that a model that
says "neutral" to everything gets 25 of 100 however many neutral sentences there are. The file goes from text to numbers:
what did the model choose (1), was it right (2), how sure are we (3), how it was made to talk (4), and all of it together (5).

Where this departs from the papers and from MMAU's own script:
1. Both counts are given. MMAU's script matches words in the whole output, where a reasoning trace that merely discusses a
   wrong choice loses the point. As in the paper, our headline drops the trace and extracts the option that was chosen; MMAU's
   rule then judges that option. The same rule on the raw text is under "official".
2. An answer that names no option, or two, is wrong and counted under "no_answer". Nothing is guessed; VoiceBench's script draws a letter where its
   templates find none (--voicebench-guess). What its templates find is given beside what we read, as for MMAU.
3. "average" is over questions (micro), not over tasks. On MMAU test-mini, 333 + 334 + 333, the two agree.
4. Decoding is the paper's (temperature 0.6, top-k 5, top-p 0.5), but every random number belongs to (seed, example, position):
   the same question gets the same answer alone, in any batch, on any number of ranks.

    python evaluate.py --task mmau --predictions FILE --out results.json      # score MMAU's or MMAR's own format, no model needed
    python evaluate.py --task mcq --predictions FILE                          # VoiceBench's: OpenBookQA and MMSU
    python evaluate.py --task gap --model DIR --data mmsu.jsonl obqa.jsonl gsm8k.jsonl          # paper B's Table 1, one table a file
    python evaluate.py --task both --model DIR --data test.jsonl --out runs/eval
    python evaluate.py --task both --model DIR --data test.jsonl noise.jsonl telephone.jsonl      # the further sets are reported apart
    torchrun --nproc_per_node 8 evaluate.py --task both --model DIR --data test.jsonl             # each GPU asks its share; aqa, ser and gap, too
    python evaluate.py --task both --model DIR2 --data test.jsonl --compare runs/eval/results.json
    python evaluate.py --task layers --model runs/source_layer --data test.jsonl    # which layers are alike? (inside.py)
    python evaluate.py --task report --run runs/source_layer                                      # how does a training run go? (report.py)
"""

import argparse
import dataclasses
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from plumbing import ranks

from plumbing.files import make_folder, replace_text, write_json, writing
from plumbing.whole import newest_checkpoint
import data
import judge
import models
from judge import extract_choice, voicebench_letter
from lab.report import plot_report, read_run, summary
from rollout import generate

TASKS = ("sound", "music", "speech")    # MMAU's tasks; every other one (MMAR's mixes, ...) gets a row of its own behind them
SER_TASK = "emotion"                    # the task name of emotion recognition in a manifest
EMOTIONS = {"anger": "angry", "sadness": "sad", "happiness": "happy", "excited": "happy", "excitement": "happy"}     # IEMOCAP: excited is happy
NO_ANSWER = "no answer"
VIEWS = ("text", "audio")
UNSPOKEN = "unspoken"                   # the kind of question that nobody could say aloud
SHARED = ("aqa", "ser", "both", "gap")                                  # the tasks that several ranks may do together
TAKEN = {"average", "ua", "intervals", "official", "groups", "counts", "correct"}             # names in the results, which no task may have

# ---------------------------------------------------------------------------------------------------------------------
# 1. Was it right?

def tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmau_correct(answer, prediction, choices):
    """MMAU's official rule: every word of the answer is said, and no word that only wrong choices have.

    Words are sets, so the rule is blind to order ("knock then beep" = "beep then knock"), and an innocent "the" or "a" counts
    against an output where a wrong choice holds it: "The answer is (A) gold" fails beside the choice "a ring"."""
    said, wanted = tokens(prediction), tokens(answer)
    forbidden = set().union(*map(tokens, choices)) - wanted
    return bool(said) and wanted <= said and not said & forbidden


def score_mmau(records, *, voicebench=False, guess=None):
    """Score predictions in MMAU's record format: dicts with id, task, choices, answer and (if there is one) model_output.

    Returns {task: accuracy in per cent of the chosen option, for sound, music, speech (None where nothing was scored) and every other
    task; "average"; "intervals": Wilson's 95 %, per cent; "official": the same by MMAU's rule on the raw output, with the official script's
    [right, scored] by task, difficulty, category and sub-category; "groups": these by the chosen option; "counts"; "correct": task -> id ->
    bool, for pairing}. "average" is over all scored records (micro). As in the official script, a record without model_output is skipped,
    not failed. "counts" also holds "indistinct", questions where a wrong choice would pass for the answer under MMAU's rule, and "no_gold",
    questions whose answer is none of the choices.

    voicebench: "official" is the letter that VoiceBench's templates find instead; where they find none ("no_letter") the answer is wrong, or,
    with `guess` (an int, the seed), a letter is drawn, as its script does."""
    tasks = [*TASKS, *sorted({record["task"] for record in records} - set(TASKS))]
    correct, official = {task: {} for task in tasks}, {task: {} for task in tasks}
    counts = Counter(records=len(records), skipped=0, no_answer=0, indistinct=0, no_gold=0, **{"no_letter": 0} if voicebench else {})
    groups, official_groups = ({"task": {}, "difficulty": {}, "sub-category": {}} for _ in range(2))
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
        if voicebench:
            letter = voicebench_letter(output)
            counts["no_letter"] += letter is None
            if letter is None and guess is not None:
                letter = random.Random(f"{guess} {record['id']}").choice("ABCD")
            right, raw = chosen is not None and chosen == gold, gold is not None and letter == chr(ord("A") + choices.index(gold))
        else:
            counts["indistinct"] += any(mmau_correct(answer, c, choices) for c in choices if c != answer)
            right, raw = chosen is not None and mmau_correct(answer, chosen, choices), mmau_correct(record["answer"], output, choices)
        correct[task][record["id"]], official[task][record["id"]] = right, raw
        for tables, hit in (groups, right), (official_groups, raw):
            for key in {"task", "difficulty", "category", "sub-category"} & record.keys():
                rows = tables.setdefault(key, {})
                hits, scored = rows.get(str(record[key]), (0, 0))
                rows[str(record[key])] = [hits + hit, scored + 1]

    def accuracies(by_task):
        lists = {task: list(by_task[task].values()) for task in tasks}
        lists["average"] = sum(lists.values(), [])
        return {name: 100 * sum(v) / len(v) if v else None for name, v in lists.items()}, lists

    per_cent, lists = accuracies(correct)
    return {**per_cent, "intervals": {name: wilson(sum(v), len(v)) for name, v in lists.items()}, "groups": groups,
            "official": {**accuracies(official)[0], "counts": official_groups}, "counts": dict(counts), "correct": correct}


def lettered(letter, choices):
    """A reference that is a letter -> (choices, "B. silver"), which is not taken for a choice that is itself called B; ([], letter) without such a choice."""
    index = ord(letter) - ord("A")
    return (choices, f"{letter}. {choices[index]}") if index < len(choices) else ([], letter)


def ser_class(output, classes):
    """The one emotion of `classes` that an answer names: "The speaker sounds angry.", "(B)", "happy/excited". Besides the classes' names EMOTIONS
    count and nothing else; two of them, or none, are no answer."""
    for word, name in EMOTIONS.items():
        if name in classes and word not in classes:
            output = re.sub(rf"\b{word}\b", name, output, flags=re.I)
    return extract_choice(output, classes)


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
    rng = np.random.default_rng(seed)
    draws = np.mean([rng.binomial(sizes[c], recall[c] / 100, samples) / sizes[c] for c in recall], axis=0)     # [samples]
    return {"ua": sum(recall.values()) / len(recall), "recall": recall, "interval": percentiles(100 * draws), "confusion": confusion}


# ---------------------------------------------------------------------------------------------------------------------
# 2. How sure are we?

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
    rng, differences, draws = np.random.default_rng(seed), [], []
    for label in np.unique(labels):
        d = (a - b)[labels == label]                                      # +1 only A is right, -1 only B, 0 no difference
        n, wins, losses = d.size, (d == 1).sum(), (d == -1).sum()
        # n draws with replacement, counted by outcome: no need to draw them one by one
        drawn = rng.multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], samples)      # [samples, 3]
        differences.append(d.mean())
        draws.append((drawn[:, 0] - drawn[:, 1]) / n)
    return 100 * float(np.mean(differences)), percentiles(100 * np.mean(draws, axis=0))


# ---------------------------------------------------------------------------------------------------------------------
# 3. All of it together

def score(examples, outputs):
    """Multiple choice and emotion examples, and what was said: {"aqa": score_mmau's dict, "ser": score_ser's and "correct":
    class -> id -> bool}, each only if it has examples; and a list of samples, one dict each."""
    samples = [{"id": e.id, "audio_id": str(e.audio), "question": e.question, "choices": e.choices, "answer": e.answer,
                "task": e.task, "split": e.split, **({"sub-category": e.kind} if e.kind else {}), "model_output": output,
                "chosen": (ser_class if e.task == SER_TASK else extract_choice)(output, e.choices)}
               for e, output in zip(examples, outputs, strict=True)]
    aqa, ser, results = [s for s in samples if s["task"] != SER_TASK], [s for s in samples if s["task"] == SER_TASK], {}
    if aqa:
        results["aqa"] = score_mmau(aqa)
    if ser:
        classes = sorted({c for s in ser for c in s["choices"]})
        results["ser"] = score_ser([s["answer"] for s in ser], [s["chosen"] for s in ser], classes)
        results["ser"]["correct"] = {c: {s["id"]: s["chosen"] == c for s in ser if s["answer"] == c} for c in classes}
    for s in samples:
        s["correct"] = s["chosen"] == s["answer"] if s["task"] == SER_TASK else results["aqa"]["correct"][s["task"]][s["id"]]
    return results, samples


def evaluate_model(model, processor, examples, *, splits=(), **decoding):
    """Generate (decoding: generate's keywords) and score. splits: [(name, examples), ...], each reported apart. Raises data.DataError
    for an example without choices. Every task but SER's is AQA.

    Returns {"aqa": score_mmau's dict, "ser": score_ser's dict, "splits": name -> the same two, "samples": list of dicts}."""
    groups = [("main", examples), *splits]
    everything = [e for _, examples in groups for e in examples]
    for e in everything:
        if e.task in TAKEN:
            raise data.DataError(f"{e.where}: the task {e.task!r} has the name of one of the results; rename it")
        if not e.choices:
            raise data.DataError(f"{e.where}: an open question is not scored here; give it choices, or a transcript and --task gap")
    outputs = iter(generate(model, processor, everything, **decoding))
    results, samples = {}, []
    for name, examples in groups:
        results[name], said = score(examples, [next(outputs) for _ in examples])
        samples += [{"set": name, **s} for s in said]
    main = results.pop("main")
    return {**main, "splits": results, "samples": samples, "decoding": decoding_of(**decoding)}


def decoding_of(*, max_new_tokens=512, temperature=0.6, top_k=5, top_p=0.5, seed=0, **_):
    """generate's keywords, its defaults filled in -> those that decide what is said (at
    temperature 0 nothing is drawn)."""
    drawn = {"top_k": top_k, "top_p": top_p, "seed": seed} if temperature else {}
    return {"max_new_tokens": max_new_tokens, "temperature": temperature, **drawn}


def differences(decoding, other):
    """-> "max_new_tokens 200, not 2048": what `other` has first; "" if they are equal."""
    names = [name for name in {**decoding, **other} if decoding.get(name) != other.get(name)]
    return ", ".join(f"{name} {other.get(name)}, not {decoding.get(name)}" for name in names)


def report(results):
    """The results as a table, in per cent with 95 % intervals."""
    lines = []
    if aqa := results.get("aqa"):
        rule = "VoiceBench's templates" if "no_letter" in aqa["counts"] else "raw text, MMAU's rule"
        wide = max(10, *(len(name) + 1 for name in aqa["correct"]))
        lines.append(f"{'AQA':{wide}}{'accuracy':>9}   95 % interval     {rule}")
        for name in (*aqa["correct"], "average"):
            if aqa[name] is not None:
                low, high = aqa["intervals"][name]
                lines.append(f"{name:{wide}}{aqa[name]:9.2f}   [{low:5.2f}, {high:6.2f}]  {aqa['official'][name]:9.2f}")
        if "category" in aqa["groups"] or aqa["correct"].keys() - {*TASKS, "mcq"}:                 # the benchmarks' own files, MMAR's mixes
            lines += [f"    {name:36}{100 * hits / n:7.2f}{100 * aqa['official']['counts'][key][name][0] / n:9.2f}   of {n}"
                      for key in ("category", "sub-category") for name, (hits, n) in sorted(aqa["groups"].get(key, {}).items())]
        lines.append("{records} questions, {skipped} skipped (no model_output), {no_answer} without a clear answer".format(**aqa["counts"]))
        for key, what in {"indistinct": "a wrong choice has the answer's words: MMAU's rule takes it for right",
                          "no_gold": "the answer is none of the choices", "no_letter": "VoiceBench's templates find no letter"}.items():
            lines += [f"in {aqa['counts'][key]} of them {what}"] if aqa["counts"].get(key) else []
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
    for part in "aqa", "ser":
        mine, theirs = (r.get(part, {}).get("correct", {}) for r in (results, other))
        for name in (*mine, "average") if part == "aqa" else ("ua",):
            group = [(g, i) for g in mine if name in (g, "average", "ua") for i in mine[g] if i in theirs.get(g, {})]
            if group:
                difference, (low, high) = paired_bootstrap([mine[g][i] for g, i in group], [theirs[g][i] for g, i in group],
                                                           labels=[g for g, _ in group] if part == "ser" else None)
                lines.append(f"{part} {name:8}{difference:+7.2f} points  [{low:+.2f}, {high:+.2f}]  {len(group)} pairs")
    return lines or ["the two have no example in common"]


def report_change(before, after):
    """Two evaluations of one run as a table: before, after, paired difference with its interval."""
    wide = max(10, *(len(name) + 1 for name in before.get("aqa", {}).get("correct", ("",))))
    lines = [f"{'':{wide}}{'before':>9}{'after':>9}   difference, paired, 95 % interval"]
    differences = {tuple(line.split(None, 2)[:2]): line.split(None, 2)[2] for line in compare(after, before)}
    for part in [part for part in ("aqa", "ser") if part in before]:
        for name in (*before["aqa"]["correct"], "average") if part == "aqa" else ("ua",):
            if before[part][name] is not None:
                label = name if part == "aqa" else "SER"
                lines.append(f"{label:{wide}}{before[part][name]:9.2f}{after[part][name]:9.2f}   {differences.get((part, name), '')}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The audio-text gap (paper B): the same questions, heard and read

def spoken(examples):
    """The examples that can be asked in both views: those with a transcript, but for emotion, which no transcript holds."""
    return [e for e in examples if e.transcript and e.task != SER_TASK]


def gap_of(text, audio):
    """{id: right?} of both views -> accuracies in per cent, their gap in points, and 95 % intervals (Wilson's; the gap's paired)."""
    (n, t, a), (_, gap) = (len(text), sum(text.values()), sum(audio.values())), paired_bootstrap([*text.values()], [audio[i] for i in text])
    return {"text_accuracy": 100 * t / n, "audio_accuracy": 100 * a / n, "gap": 100 * (t - a) / n, "questions": n,
            "intervals": {"text": wilson(t, n), "audio": wilson(a, n), "gap": gap}}


def flat(by_group):
    """group -> id -> right? -> {id: right?}"""
    return {i: right for group in by_group.values() for i, right in group.items()}


def table_of(correct):
    """correct: view -> kind -> id -> right? -> gap_of's dict of all; "kinds": the same for each
    kind of question; "correct" itself."""
    text, audio = correct["text"], correct["audio"]
    kinds = {kind: gap_of(text[kind], audio[kind]) for kind in text}
    return {**gap_of(flat(text), flat(audio)), "kinds": kinds, "correct": correct}


def question_key(example):
    """The same for the same words about the same clip, wherever the folder of the clips lies."""
    clip = Path(*example.audio.parts[-2:])
    return data.fingerprint([dataclasses.replace(example, audio=clip)])


def evaluate_views(model, processor, examples, *, elsewhere=True, temperature=0.0, **decoding):
    """Ask every spoken question twice, as audio and as text; greedy by default. elsewhere: also score what only audio can ask (Table 2).

    Returns table_of's dict; "keys" (id -> question_key) and "decoding": what two runs must share to
    be compared; "elsewhere": evaluate_model's dict on the other examples, if there are any;
    "samples": list of dicts. Raises data.DataError without a spoken question."""
    asked, samples = spoken(examples), []
    if not asked:
        raise data.DataError("no example has a transcript, so the audio-text gap cannot be measured; add transcripts to the manifest")
    kinds = sorted({e.kind or e.task for e in asked})
    correct = {view: {kind: {} for kind in kinds} for view in VIEWS}
    for view, words in ("text", "transcript"), ("audio", None):
        said = generate(model, processor, asked, view=view, words=words, temperature=temperature, **decoding)
        for e, output in zip(asked, said):
            kind = e.kind or e.task
            choices, answer = e.choices, e.answer
            if not choices and re.fullmatch("[A-Z]", answer):             # VoiceBench's are in the sound, and the answer is a letter
                choices, answer = lettered(answer, data.spoken_choices(e.transcript))
            correct[view][kind][e.id] = right = judge.agree(output, answer, choices)
            samples.append({"id": e.id, "view": view, "transcript": e.transcript, "question": e.question, "choices": choices, "answer": answer,
                            "kind": kind, "model_output": output, "correct": right})
    results = {
        **table_of(correct), "samples": samples, "keys": {e.id: question_key(e) for e in asked},
        "decoding": {**decoding_of(temperature=temperature, **decoding), "words": "transcript"},
    }
    rest = [e for e in examples if e not in asked]
    if elsewhere and rest:
        found = evaluate_model(model, processor, rest, temperature=temperature, **decoding)
        results["samples"] += [{"view": "audio", **s} for s in found.pop("samples")]
        results["elsewhere"] = found
    return results


def gap_reduction(before, after):
    """(audio after - audio before) / (text before - audio before), per cent; None where there was no gap. Text AFTER has no part in it, so that
    a model whose text view rots cannot look good."""
    gap = before["text_accuracy"] - before["audio_accuracy"]
    return 100 * (after["audio_accuracy"] - before["audio_accuracy"]) / gap if gap > 0 else None


def report_gap(results, before=None):
    """The gap as a table, by kind of question; with `before` (another such dict) also its reduction and paired differences."""
    lines = [f"{'':14}{'text':>8}{'audio':>8}{'gap':>8}   95 % interval of the gap" + "   reduction" * bool(before)]
    for name, row in [*results["kinds"].items(), ("together", results)]:
        low, high = row["intervals"]["gap"]
        was = before and (before if name == "together" else before["kinds"].get(name))
        share = gap_reduction(was, row) if was else None
        lines.append(f"{name:14}{row['text_accuracy']:8.1f}{row['audio_accuracy']:8.1f}{row['gap']:8.1f}   [{low:+.1f}, {high:+.1f}]"
                     + (f"{share:18.1f} %" if share is not None else ""))
    if before:
        for view in ("text", "audio"):
            mine, theirs = flat(results["correct"][view]), flat(before["correct"][view])
            if shared := [i for i in mine if i in theirs]:
                points, (low, high) = paired_bootstrap([mine[i] for i in shared], [theirs[i] for i in shared])
                lines.append(f"{view:6}{before[f'{view}_accuracy']:7.1f} -> {results[f'{view}_accuracy']:.1f}   {points:+.1f} points, paired "
                             f"[{low:+.1f}, {high:+.1f}], {len(shared)} questions")
        if "elsewhere" in results and "elsewhere" in before:
            lines += ["elsewhere (heard only):", report_change(before["elsewhere"], results["elsewhere"])]
    return "\n".join(lines)


def read_baseline(path, decoding):
    """--baseline: a gap that was measured before training, with this decoding. Raises DataError."""
    found = read_json(path, "the results.json of a gap evaluation or of a CORD run")
    if isinstance(found, dict):
        found = found.get("before", found)              # a training run holds "before" and "after"
    if not isinstance(found, dict) or "text_accuracy" not in found:
        raise data.DataError(f"{path}: holds no gap; give a results.json that --task gap or "
                             "train_cord.py wrote")
    if not {"keys", "decoding"} <= found.keys():
        raise data.DataError(f"{path}: does not say how it was decoded; measure the model before "
                             "training anew, with --task gap")
    if other := differences(decoding, found["decoding"]):
        raise data.DataError(f"{path}: was decoded with {other}; give both the same flags")
    return found


def baseline_of(baseline, name, examples, path):
    """What the model before training said to these examples of the set `name`, whichever files they
    stood in then -> table_of's dict. Raises DataError where it was not asked one of them."""
    sets = {baseline.get("set"): baseline, **baseline.get("splits", {})}
    right = {view: {} for view in VIEWS}                            # question_key -> right?
    for other in sorted(sets, key=lambda other: other == name):     # the namesake last: it counts
        keys = sets[other]["keys"]                                  # what is unspoken has none
        for view in VIEWS:
            verdicts = flat(sets[other]["correct"][view])
            right[view].update({keys[i]: verdict for i, verdict in verdicts.items() if i in keys})
    if missing := [e.id for e in examples if question_key(e) not in right["text"]]:
        raise data.DataError(f"{path}: lacks {len(missing):,} of the {len(examples):,} questions "
                             f"of {name}, or had them in other words ({missing[0]} is the first); "
                             "measure the model before training on the same files")
    correct = {view: {} for view in VIEWS}
    for e in examples:
        for view in VIEWS:
            kind = correct[view].setdefault(e.kind or e.task, {})
            kind[e.id] = right[view][question_key(e)]
    return table_of(correct)


def unspoken(path, examples):
    """The ids that speak.py left out of the manifest `path`, because there is no saying them: they
    belong to the benchmark all the same. Raises DataError."""
    listed = Path(path).with_suffix(".skipped.jsonl")
    asked = {e.id for e in examples}
    if not listed.exists():
        return []
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
        ids = [json.loads(line)["id"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.DataError(f"{listed}: is not what speak.py writes ({error!r}); run it again, or "
                             "move the file away") from None
    return [i for i in ids if i not in asked]


def with_unspoken(table, ids):
    """table_of's dict, with these questions counted as wrong in both views: a kind of their own."""
    if not ids:
        return table
    wrong = {UNSPOKEN: dict.fromkeys(ids, False)}
    return {**table, **table_of({view: {**table["correct"][view], **wrong} for view in VIEWS})}


def together(tables):
    """set -> table_of's dict -> one such dict of all questions, whose kinds are the sets."""
    correct = {view: {} for view in VIEWS}
    for name, table in tables.items():
        for view in VIEWS:
            verdicts = flat(table["correct"][view])         # two files may use the same id
            correct[view][name] = {f"{name} {i}": verdict for i, verdict in verdicts.items()}
    return table_of(correct)


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


def read_json(path, kind):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise data.DataError(f"{path}: cannot be read as JSON ({error}); give {kind}") from None


def read_predictions(path, task="mmau"):
    """MMAU's records (a JSON list), MMAR's (JSONL; its modality is the task) or, with task="mcq", VoiceBench's (JSONL) -> MMAU's, all of it
    checked. Raises data.DataError with the file, the record's number and a remedy."""
    what, ids = "a JSON list or JSONL of the benchmark's records with the outputs added", set()
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            records = json.loads(text)
        except ValueError:                                                # several values: one a line?
            if len(lines := [line for line in text.split("\n") if line.strip()]) < 2:
                raise
            records = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise data.DataError(f"{path}: cannot be read as JSON ({error}); give {what}") from None
    if not isinstance(records, list) or not records:
        raise data.DataError(f"{path}: holds no list of records; give {what}")
    for n, r in enumerate(records, 1):
        fault = None
        if isinstance(r, dict) and task == "mcq":
            choices, answer = data.spoken_choices(r.get("prompt") if isinstance(r.get("prompt"), str) else "") or list("ABCD"), r.get("reference")
            if isinstance(answer, str) and re.fullmatch("[A-Z]", answer.strip()):
                answer = lettered(answer.strip(), choices)[1]
            r = {"id": str(n), "task": "mcq", "choices": choices, "answer": answer, "model_output": r.get("response")}
        elif isinstance(r, dict) and "modality" in r:
            r = {"id": str(n), **r, "task": r["modality"], "model_output": r.get("answer_prediction", r.get("model_output"))}
        if not isinstance(r, dict):
            fault = "is not an object"
        elif missing := [key for key in ("id", "task", "answer") if not isinstance(r.get(key), str) or not r[key]]:
            fault = f"has no text under {'reference' if task == 'mcq' else missing[0]!r}"
        elif not isinstance(r.get("choices"), list) or not r["choices"] or not all(isinstance(c, str) for c in r["choices"]):
            fault = "has no list of texts under 'choices'"
        elif not isinstance(r.get("model_output"), str | None):
            fault = "holds something that is not text under 'model_output', 'answer_prediction' or 'response'"
        elif r["task"] in TAKEN:
            fault = f"has the task {r['task']!r}, the name of one of the results"
        elif r["id"] in ids:
            fault = f"repeats the id {r['id']!r}"
        if fault:
            raise data.DataError(f"{path}: record {n} {fault}; start from the benchmark's own file and add only the outputs")
        ids.add(r["id"])
        records[n - 1] = r
    return records


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["mmau", "mcq", "aqa", "ser", "both", "gap", "layers", "features", "kl", "report"],
                        help="mmau: score a file of predictions, MMAU's or MMAR's; mcq: VoiceBench's (OpenBookQA, MMSU); aqa, ser, both: run a "
                             "model, on multiple choice, emotions or both; gap: the same questions heard and read; layers, features, kl: look inside "
                             "a student and its teacher (inside.py); report: what a training run's folder says, at any time (report.py)")
    parser.add_argument("--run", metavar="DIR", help="report: the folder that the training script's --out named; the picture goes there, too")
    parser.add_argument("--out", help="mmau, mcq: the file for results.json; otherwise a folder (default runs/evaluate)")
    parser.add_argument("--compare", metavar="RESULTS", help="another run's results.json: print how far this run is from it, paired")
    parser.add_argument("--baseline", metavar="RESULTS", help="gap: the results.json of the model before training: print the gap's reduction")
    # what is scored
    parser.add_argument("--predictions", metavar="FILE", help="mmau: MMAU's records with the output under model_output, or MMAR's "
                                                                "(answer_prediction); mcq: VoiceBench's (prompt, reference, response)")
    parser.add_argument("--voicebench-guess", action="store_true",
                        help="mcq, gap: where VoiceBench's templates find no letter, draw one (--seed) as its script does; default: wrong, counted")
    parser.add_argument("--model", metavar="DIR",
                        help="an audio language model: a folder, a name on the hub, or a run's "
                             "folder (its newest whole checkpoint)")
    parser.add_argument("--data", metavar="FILE", nargs="+", help="a manifest (JSONL; see data.py); each further one is reported apart")
    parser.add_argument("--teacher", metavar="DIR", help="layers, features: the text LLM; default: the one that the run of --model names")
    parser.add_argument("--split", help="only the manifest's examples of this split")
    parser.add_argument("--limit", type=int, help="only the first N examples; layers, features: N of them, spread over the file")
    # how the model talks
    parser.add_argument("--temperature", type=float, help="default: 0.6 (paper A); gap: 0, the most probable token")
    parser.add_argument("--top-k", type=int, default=5, help="paper: 5; 0: all tokens")
    parser.add_argument("--top-p", type=float, default=0.5, help="paper: 0.5; 1: all of the probability")
    parser.add_argument("--greedy", action="store_true", help="the most probable token, always")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int,
                        help="tokens an answer may have, trace included; default: 2048, room for a trace like CoTA's; kl: 200 (paper B)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions answered at once")
    args = parser.parse_args(argv)
    for flag in {"mmau": ["predictions"], "mcq": ["predictions"], "report": ["run"]}.get(args.task, ["model", "data"]):
        if not getattr(args, flag):
            parser.error(f"--task {args.task} needs --{flag}")
    if args.greedy or args.temperature is None:
        args.temperature = 0.0 if args.greedy or args.task == "gap" else 0.6
    args.max_new_tokens = args.max_new_tokens or (200 if args.task == "kl" else 2048)
    rank, world, device = ranks.start_distributed()
    try:
        if args.model:
            args.model = ranks.of_rank_zero(newest_checkpoint(args.model))
        if args.task not in ("mmau", "mcq", "report") and rank == 0:
            make_folder(args.out or "runs/evaluate")         # not after hours of answers
        if args.task in SHARED:
            (run_gap if args.task == "gap" else run)(args, rank, device)
        elif world > 1:
            raise data.DataError(f"--task {args.task} runs in one process, and torchrun started {world}; start it with python")
        else:
            {"mmau": score_file, "mcq": score_file, "kl": run_kl, "report": run_report}.get(args.task, look_inside)(args)
    except data.DataError as error:
        if rank > 0:                    # rank 0 mostly meets the same error: then it says so and ends, and torchrun ends this process before it can
            time.sleep(30)
        raise SystemExit(f"evaluate.py: {error}") from None
    ranks.stop_distributed()


def look_inside(args):
    """--task layers and features: what inside.py has to say, as JSON, a PNG and a few lines. A checkpoint's run tells the rest: its teacher,
    its map, and the student that it started from. Every second example fits W_i, the others are looked at."""
    from lab import inside
    import layer_map

    model = Path(args.model)
    settings = read_json(model.parent / "config.json", "a run's flags") if (model / "checkpoint.json").exists() else {}
    teacher_name = args.teacher or settings.get("teacher")
    if not teacher_name:
        raise data.DataError(f"{model}: is no checkpoint of a run, so nobody knows its teacher; give --teacher")
    examples = [e for e in data.read_manifest(args.data[0], split=args.split) if e.reasoning and e.description and e.task != SER_TASK]
    if len(args.data) > 1:
        raise data.DataError(f"{args.data[1]}: --task {args.task} looks at one manifest; give the first alone")
    most = min(len(examples), args.limit or 80)
    examples = [examples[i * len(examples) // most] for i in range(most)]                  # of every task, however the file is sorted
    if len(examples) < 4:
        raise data.DataError(f"{args.data[0]}: has {len(examples)} examples with reasoning and description; at least 4 are needed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, tokenizer = models.load_text_model(teacher_name, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    models.check_teacher(teacher.to(device))

    def states(name):
        student, processor = models.load_audio_model(str(name), dtype=teacher.dtype)
        return [inside.states(student.to(device), processor, teacher, tokenizer, part) for part in (examples[::2], examples[1::2])]

    known, found = states(settings.get("student", model) if args.task == "layers" else model)
    pairs = layer_map.pairs(len(found["student"]), len(found["teacher"]))                  # the whole map, whatever the run distilled
    projections = inside.fit(pairs, known)
    out = make_folder(args.out or "runs/evaluate")
    if args.task == "features":
        report_ = inside.features_report(found, pairs, projections)
        with writing(out / "features.png"):
            inside.plot_features(report_, out / "features.png")
    else:
        before = inside.layers_report(found, pairs, projections)
        known, found = states(model)
        beside = model / "projections.safetensors"
        refitted = inside.fit(pairs, known)                                                # for pairs that the run did not distil
        trained = inside.trained(beside, pairs, refitted) if beside.exists() else refitted
        report_ = {"pairs": pairs, "before": before, "after": inside.layers_report(found, pairs, trained)}
        report_["vocabulary"] = report_["after"]["vocabulary"]
        with writing(out / "layers.png"):
            inside.plot_layers(before, report_["after"], pairs, out / "layers.png")
    print(*(inside.features_lines if args.task == "features" else inside.layers_lines)(report_), sep="\n")
    write_json(out / f"{args.task}.json", report_)
    print(f"{out}: {args.task}.json, {args.task}.png")


def stems(files):
    """The names that several manifests are reported by. Raises data.DataError where two have the same."""
    names = [Path(file).stem for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise data.DataError(f"two of the manifests are called {twice.pop()}, and results are reported by that name; rename one")
    return names


def run_gap(args, rank, device):
    """--task gap: every question of every manifest, heard and read; with --baseline, how much of
    its gap is gone. Each rank asks its share."""
    say = print if rank == 0 else (lambda *a, **k: None)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    decoding = {name: getattr(args, name) for name in names}
    baseline, befores = None, {}
    if args.baseline:
        baseline = read_baseline(args.baseline, {**decoding_of(**decoding), "words": "transcript"})

    # 1. The questions, and what the baseline said to each of them
    sets, left_out = {}, {}
    whole = not args.limit and args.split is None           # a part of a file is no benchmark
    for name, file in zip(stems(args.data), args.data):
        examples = spoken(data.read_manifest(file, split=args.split))[:args.limit]
        if not examples:
            raise data.DataError(f"{file}: has no example with a transcript, so nothing can be "
                                 "asked in both views; add transcripts")
        sets[name] = examples
        left_out[name] = unspoken(file, examples)
        if left_out[name] and not whole:
            say(f"{file}: {len(left_out[name]):,} questions could not be spoken and do not count "
                "here, beside --limit or --split")
            left_out[name] = []
        if baseline:
            before = baseline_of(baseline, name, examples, args.baseline)
            befores[name] = with_unspoken(before, left_out[name])
    # by every rank, so that all stop for the same clip
    data.check_audio([e for examples in sets.values() for e in examples])

    # 2. The model, asked
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, processor = models.load_audio_model(args.model, dtype=kind)
    models.check(model.to(device), processor)
    found, samples = {}, []
    for name, examples in sets.items():
        table = evaluate_views(model, processor, examples, batch_size=args.batch_size, **decoding)
        said = table.pop("samples")
        samples += [{"set": name, **s} for s in said]
        for view in VIEWS:
            choosing = [s for s in said if s["view"] == view and s["choices"] and "kind" in s]
            if not choosing:
                continue
            guess = args.seed if args.voicebench_guess else None
            mcq = score_mmau([{**s, "task": "mcq"} for s in choosing], voicebench=True, guess=guess)
            by_letter = {"accuracy": mcq["official"]["mcq"], "counts": mcq["counts"]}
            table.setdefault("voicebench", {})[view] = by_letter
        found[name] = with_unspoken(table, left_out[name])

    # 3. The tables: of each set and, of several, together
    tables = dict(found)
    if len(sets) > 1:
        tables["all files"] = together(found)
        befores["all files"] = together(befores) if baseline else None
    for name, table in tables.items():
        before = befores.get(name)
        if before:
            table["gap_reduction_percent"] = gap_reduction(before, table)
        say(f"-- {name}\n{report_gap(table, before)}")
        if left_out.get(name):
            say(f"{len(left_out[name]):,} of {table['questions']:,} questions could not be spoken: "
                "counted as wrong")
        for view, theirs in table.get("voicebench", {}).items():
            counts = theirs["counts"]
            drawn = " and one is drawn" if args.voicebench_guess else ""
            say(f"{view:6}multiple choice by VoiceBench's templates: {theirs['accuracy']:.1f}; in "
                f"{counts['no_letter']} of {counts['records']} answers they find no letter{drawn}")
    if rank > 0:
        return
    first, *further = found
    results = {**found[first], "set": first, "splits": {name: found[name] for name in further}}
    if further:
        results["together"] = tables["all files"]
        del results["together"]["correct"]                  # it stands in the sets
    out = make_folder(args.out or "runs/evaluate")
    replace_text(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    write_json(out / "results.json", {**results, "settings": vars(args)})


def run_kl(args):
    """--task kl: the spread of D_t over rollouts, as JSON, a PNG and a few lines. A checkpoint's run names the student that it started from, which
    is the teacher before and after training."""
    from lab import inside

    model = Path(args.model)
    settings = read_json(model.parent / "config.json", "a run's flags") if (model / "checkpoint.json").exists() else {}
    if len(args.data) > 1:
        raise data.DataError(f"{args.data[1]}: --task kl looks at one manifest; give the first alone")
    examples = spoken(data.read_manifest(args.data[0], split=args.split))[:args.limit or 200]
    if not examples:
        raise data.DataError(f"{args.data[0]}: has no example with a transcript, so no text view can be compared; add transcripts")
    gpu = torch.cuda.is_available()

    def load(name):
        student, processor = models.load_audio_model(str(name), dtype=torch.bfloat16 if gpu else torch.float32)
        return student.to("cuda" if gpu else "cpu"), processor

    teacher, processor = load(settings.get("student", model))
    reports = {}
    for when, student in [("before", teacher)] + [("after", load(model)[0])] * bool(settings):
        pairs = inside.divergences(student, processor, teacher, examples, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, seed=args.seed)
        reports[when] = inside.kl_report(pairs, processor.tokenizer)
    out = make_folder(args.out or "runs/evaluate")
    write_json(out / "kl.json", reports)
    with writing(out / "kl.png"):
        inside.plot_kl(reports, out / "kl.png")
    print(*inside.kl_lines(reports), sep="\n")
    print(f"{out}: kl.json, kl.png")


def run_report(args):
    """--task report: report.py's summary and picture and, of a run that is finished, what it says at its end."""
    found = read_run(args.run)
    with writing(found["folder"] / "report.png"):
        plot_report(found)
    print(*summary(found), sep="\n")
    if found["results"]:
        before, after = found["results"]["before"], found["results"]["after"]
        print(report_gap(after, before) if "text_accuracy" in before else report_change(before, after))
    print(found["folder"] / "report.png")


def other_results(path):
    """--compare: another run's results, read before the work and not after it."""
    if not path:
        return None
    other = read_json(path, "the results.json of another run")
    other = other.get("after", other) if isinstance(other, dict) else {}                  # a training run holds "before" and "after"
    if not any(isinstance(other.get(part), dict) and isinstance(other[part].get("correct"), dict) for part in ("aqa", "ser")):
        raise data.DataError(f"{path}: holds no results; give a results.json that evaluate.py or a training run wrote")
    return other


def merged(other, name):
    """Another run's results -> those of all its examples, whichever files they stood in, as compare
    takes them. What two of its files hold counts as in the one called `name`."""
    sets = {other.get("set"): other, **other.get("splits", {})}
    found = {"aqa": {"correct": {}}, "ser": {"correct": {}}}
    for key in sorted(sets, key=lambda key: key == name):
        for part in found:
            for group, verdicts in sets[key].get(part, {}).get("correct", {}).items():
                found[part]["correct"].setdefault(group, {}).update(verdicts)
    return found


def tell(results, other, args, out):
    """Write results.json, if there is a name for it, and print the tables."""
    if out:
        make_folder(out.parent)
        write_json(out, {**results, "settings": vars(args)})
    print(report(results))
    if other is None:
        return
    decoded = ""
    if "decoding" in results and "decoding" in other:
        decoded = differences(results["decoding"], other["decoding"])
    decoded = f", which was decoded with {decoded}" if decoded else ""
    print(f"against {args.compare}{decoded}, paired, 95 % bootstrap interval:")
    print(*compare(results, merged(other, results.get("set"))), sep="\n")
    for name, split in results.get("splits", {}).items():
        print(f"-- {name}", *compare(split, merged(other, name)), sep="\n")


def score_file(args):
    """--task mmau and mcq: somebody's predictions."""
    other, records, how = other_results(args.compare), read_predictions(args.predictions, args.task), {}
    if args.task == "mcq":
        how = {"voicebench": True, "guess": args.seed if args.voicebench_guess else None}
    tell({"aqa": score_mmau(records, **how)}, other, args, args.out and Path(args.out))


def run(args, rank, device):
    """--task aqa, ser and both: a model is asked. Each rank asks its share (rollout.generate); rank 0 writes and prints."""
    other, sets = other_results(args.compare), []
    wanted = {"aqa": (False,), "ser": (True,), "both": (False, True)}[args.task]          # is it about emotion?
    for name, file in zip(stems(args.data), args.data):
        sets.append((name, [e for e in data.read_manifest(file, split=args.split) if (e.task == SER_TASK) in wanted][:args.limit]))
        if not sets[-1][1]:
            raise data.DataError(f"{file}: has no example for --task {args.task}; check --task and --split")
    data.check_audio([e for _, examples in sets for e in examples])                       # by every rank, so that all stop for the same clip
    model, processor = models.load_audio_model(args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    models.check(model.to(device), processor)
    results = evaluate_model(model, processor, sets[0][1], splits=sets[1:], batch_size=args.batch_size,
                             max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    if rank > 0:
        return
    results["set"] = sets[0][0]
    out, samples = make_folder(args.out or "runs/evaluate"), results.pop("samples")
    replace_text(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    mmau = [s for s in samples if s["task"] != SER_TASK]
    write_json(out / "predictions.json", mmau)       # MMAU's format, for its own script
    tell(results, other, args, out / "results.json")


if __name__ == "__main__":
    main()
