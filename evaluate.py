"""Listen, answer, score: the two benchmarks of paper A, the audio-text gap of paper B, and how sure
we are.

Audio question answering (AQA) is scored as MMAU and MMAR score it: multiple choice over sound,
music, speech and their mixes, accuracy in per cent. Emotion recognition (SER) is scored by
unweighted accuracy, the mean of the recall of each emotion: of four emotions, a model that says
"neutral" to everything gets 25 of 100, however many neutral sentences there are.

Where this departs from the papers and from the benchmarks' own scripts:
1. Two accuracies are given. MMAU's script matches words in the whole output, where a reasoning
   trace that merely discusses a wrong choice loses the point. As in the paper, our headline drops
   the trace and extracts the chosen option, which is right if it is the answer. MMAU's rule on the
   raw text is under "official". predictions.json is in MMAU's format, for its own script.
2. An answer that names no option, or two, is wrong and counted under "no_answer". VoiceBench's
   script draws a letter where its templates find none; nothing is drawn here.
3. "average" is over questions (micro), not over tasks. On MMAU test-mini the two agree.
4. Temperature, top-k and top-p are the paper's (0.6, 5, 0.5), but random numbers are keyed: each
   belongs to (seed, example, position). So the same question gets the same answer in any batch, on
   any number of ranks.

    python evaluate.py --task both --model DIR --data test.jsonl noise.jsonl --out runs/eval
    python evaluate.py --task gap --model DIR --data mmsu.jsonl obqa.jsonl    # paper B's Table 1
    torchrun --nproc_per_node 8 evaluate.py --task gap ...  # each GPU asks its share

Each manifest is reported apart. Two results, paired: python -m lab.compare A/results.json
B/results.json; a run's picture: python -m lab.report RUN; a look inside a model: python -m
lab.inside --help.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch

import data
import judge
import models
from plumbing import hearing, ranks, tables
from plumbing.files import make_folder, newest_checkpoint, replace_text, write_json
from rollout import generate

TASKS = ("sound", "music", "speech")    # MMAU's; every other task gets a row behind them
SER_TASK = "emotion"                    # the task name of emotion recognition in a manifest
EMOTIONS = {                            # IEMOCAP: excited is happy
    "anger": "angry",
    "sadness": "sad",
    "happiness": "happy",
    "excited": "happy",
    "excitement": "happy",
}
NO_ANSWER = "no answer"
VIEWS = ("text", "audio")
TAKEN = {"average", "intervals", "official", "counts", "correct"}       # no task's names


# -------------------------------------------------------------------------------------------------
# 1. Was it right?

def word_set(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmau_correct(answer, prediction, choices):
    """MMAU's rule: every word of the answer is said, and no word that only wrong choices have.

    Words are sets, so the rule is blind to order ("knock then beep" = "beep then knock"), and "The
    answer is (A) gold" fails beside the choice "a ring"."""
    spoken_words = word_set(prediction)
    wanted = word_set(answer)
    forbidden = set().union(*map(word_set, choices)) - wanted
    return bool(spoken_words) and wanted <= spoken_words and not spoken_words & forbidden


def accuracies(correct):
    """task -> id -> right? -> accuracy and interval of each task and of all ("average")."""
    per_cent = {}
    intervals = {}
    for name, verdicts in {**correct, "average": flat(correct)}.items():
        right = sum(verdicts.values())
        n = len(verdicts)
        per_cent[name] = 100 * right / n if n else None
        intervals[name] = wilson(right, n)
    return per_cent, intervals


def flat(by_group):
    """group -> id -> right? -> {id: right?}"""
    return {i: right for group in by_group.values() for i, right in group.items()}


def score_mmau(samples):
    """Score samples in MMAU's format: dicts with id, task, choices, answer and model_output, and
    with what was "chosen" and whether it is "correct".

    Returns {task: accuracy of the chosen option, None where nothing was asked; "average";
    "intervals"; "official": the same by MMAU's rule on the raw output; "counts"; "correct":
    task -> id -> bool}."""
    tasks = [*TASKS, *sorted({s["task"] for s in samples} - set(TASKS))]
    correct = {task: {} for task in tasks}
    official = {task: {} for task in tasks}
    for s in samples:
        raw = mmau_correct(s["answer"], s["model_output"], s["choices"])
        correct[s["task"]][s["id"]] = s["correct"]
        official[s["task"]][s["id"]] = raw

    per_cent, intervals = accuracies(correct)
    no_answer = sum(s["chosen"] is None for s in samples)
    return {
        **per_cent,
        "intervals": intervals,
        "official": accuracies(official)[0],
        "counts": {"records": len(samples), "no_answer": no_answer},
        "correct": correct,
    }


def ser_class(output, classes):
    """The one emotion of `classes` that an answer names: "She sounds angry.", "(B)". Besides the
    classes' names EMOTIONS count and nothing else; two of them, or none, are no answer."""
    lower = {name.casefold() for name in classes}
    for word, name in EMOTIONS.items():
        if name in lower and word not in lower:
            output = re.sub(rf"\b{word}\b", name, output, flags=re.I)
    return judge.extract_choice(output, classes)


def score_ser(samples):
    """Score samples: dicts with id, choices, answer, what was "chosen" (one of the choices or None,
    which is wrong) and whether it is "correct".

    Returns {"ua": per cent; "recall": per class; "interval": bootstrap 95 %, resampled within each
    class; "confusion": label -> prediction or "no answer" -> count; "correct": label -> id ->
    bool}."""
    classes = sorted(set().union(*(s["choices"] for s in samples)))
    confusion = {label: dict.fromkeys((*classes, NO_ANSWER), 0) for label in classes}
    correct = {label: {} for label in classes}
    for s in samples:
        confusion[s["answer"]][s["chosen"] or NO_ANSWER] += 1
        correct[s["answer"]][s["id"]] = s["correct"]

    # UA = 1/C sum_c right_c / n_c, over the classes that have an utterance
    sizes = {c: len(correct[c]) for c in classes if correct[c]}
    recall = {c: 100 * confusion[c][c] / n for c, n in sizes.items()}
    ua = sum(recall.values()) / len(recall)

    # Of n utterances drawn with replacement, k of n right: Binomial(n, k / n) are right.
    rng = np.random.default_rng(0)
    drawn = [rng.binomial(n, recall[c] / 100, 10_000) / n for c, n in sizes.items()]
    return {
        "ua": ua,
        "recall": recall,
        "interval": percentiles(100 * np.mean(drawn, axis=0)),
        "confusion": confusion,
        "correct": correct,
    }


# -------------------------------------------------------------------------------------------------
# 2. How sure are we?

def percentiles(draws):
    return np.percentile(draws, [2.5, 97.5]).tolist()


def wilson(right, total):
    """Wilson's 95 % interval of an accuracy, per cent. Unlike p +- 2 s.e. it stays inside 0..100
    and is not empty at 0 and 100."""
    if not total:
        return [None, None]
    z = 1.959964
    # (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n)
    p = right / total
    shrink = 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    variance = p * (1 - p) / total + z * z / (4 * total * total)
    half = z / shrink * variance ** 0.5
    return [100 * max(0.0, centre - half), 100 * min(1.0, centre + half)]


def paired_bootstrap(correct_a, correct_b, *, labels=None, samples=10_000):
    """How much better is A than B on the same examples? correct_a, correct_b: bools in one order,
    at least one.

    Returns (difference, [low, high]): accuracy of A minus that of B in points, and its 95 %
    bootstrap interval. With `labels` (the class of each example) it is the difference in unweighted
    accuracy, resampled within each class. Pairing removes what makes a question easy for both: the
    interval is narrower than two separate ones suggest. ValueError: lengths differ."""
    # d_i = a_i - b_i: +1 only A is right, -1 only B, 0 no difference
    d = np.array([int(a) - int(b) for a, b in zip(correct_a, correct_b, strict=True)])
    labels = np.zeros(len(d)) if labels is None else np.asarray(labels)
    rng = np.random.default_rng(0)
    differences = []
    draws = []
    for label in np.unique(labels):
        d_class = d[labels == label]
        n = len(d_class)

        # n draws of d_i with replacement are Multinomial(n, shares of +1, -1 and 0)
        shares = [np.mean(d_class == value) for value in (1, -1, 0)]
        drawn = rng.multinomial(n, shares, samples)      # [samples, 3]
        differences.append(d_class.mean())
        draws.append((drawn[:, 0] - drawn[:, 1]) / n)
    return 100 * float(np.mean(differences)), percentiles(100 * np.mean(draws, axis=0))


def paired(ours, others, classes=None):
    """{id: right?} of two models -> (difference, [low, high], pairs) on the ids that both have;
    None: there are none. classes: {id: class}, for unweighted accuracy."""
    shared = [i for i in ours if i in others]
    if not shared:
        return None
    difference, interval = paired_bootstrap(
        [ours[i] for i in shared],
        [others[i] for i in shared],
        labels=[classes[i] for i in shared] if classes else None,
    )
    return difference, interval, len(shared)


# -------------------------------------------------------------------------------------------------
# 3. AQA and SER of a model

def score(examples, outputs):
    """Examples and what was said -> {"samples": a dict for each; "aqa": score_mmau's dict, "ser":
    score_ser's, each only if it has examples}."""
    # What each answer chose, and whether that is right
    samples = []
    for e, output in zip(examples, outputs):
        choose = ser_class if e.task == SER_TASK else judge.extract_choice
        chosen = choose(output, e.choices)
        sample = {
            "id": e.id,
            "audio_id": str(e.audio),
            "question": e.question,
            "choices": e.choices,
            "answer": e.answer,
            "task": e.task,
            "split": e.split,
            "model_output": output,
            "chosen": chosen,
            "correct": chosen == e.answer,
        }
        if e.sub_category:
            sample["sub-category"] = e.sub_category
        samples.append(sample)

    # The tables of each kind of question
    results = {"samples": samples}
    aqa = [s for s in samples if s["task"] != SER_TASK]
    ser = [s for s in samples if s["task"] == SER_TASK]
    if aqa:
        results["aqa"] = score_mmau(aqa)
    if ser:
        results["ser"] = score_ser(ser)
    return results


def evaluate_model(model, processor, examples, **decoding):
    """Generate (decoding: generate's keywords) and score; every task but SER's is AQA. DataError
    for an open question. Returns score's dict, and "keys" and "decoding" as comparable."""
    check_scorable(examples)
    outputs = generate(model, processor, examples, **decoding)
    return {**score(examples, outputs), **comparable(examples, **decoding)}


def check_scorable(examples):
    """DataError for an open question, and for a task that would hide one of the results."""
    for e in examples:
        if not e.choices or e.task in TAKEN:
            raise data.DataError(f"{e.where}: an open question, or a task called {e.task!r} as one "
                                 "of the results is, is not scored here; give it choices (or a "
                                 "transcript and --task gap), or rename the task")


def comparable(examples, *, max_new_tokens=512, temperature=0.6, top_k=5, top_p=0.5, seed=0, **_):
    """What two evaluations must share to be compared -> {"keys", "decoding"}.

    keys: {id: a hash of the question, its choices, answer and words, and of the last two parts of
    the clip's path, so that the dataset may be moved}. decoding: generate's keywords that change an
    answer; at temperature 0 top_k, top_p and seed do not."""
    keys = {}
    for e in examples:
        clip = Path(*e.audio.parts[-2:])
        keys[e.id] = data.fingerprint([dataclasses.replace(e, audio=clip)])
    drawn = {"top_k": top_k, "top_p": top_p, "seed": seed} if temperature else {}
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, **drawn}
    return {"keys": keys, "decoding": decoding}


def compare(results, other):
    """How far `results` are from `other` (evaluate_model's dicts) on the examples that both have.

    Returns {(part, name): (points, [low, high], pairs)}, part and name as in ("aqa", "sound"),
    ("aqa", "average") and ("ser", "ua")."""
    differences = {}
    if "aqa" in results and "aqa" in other:
        correct = results["aqa"]["correct"]
        others = flat(other["aqa"]["correct"])
        for name, verdicts in {**correct, "average": flat(correct)}.items():
            differences["aqa", name] = paired(verdicts, others)
    if "ser" in results and "ser" in other:
        correct = results["ser"]["correct"]
        classes = {i: name for name, by_id in correct.items() for i in by_id}
        others = flat(other["ser"]["correct"])
        differences["ser", "ua"] = paired(flat(correct), others, classes)
    return {name: found for name, found in differences.items() if found}


def report_change(before, after):
    """Two evaluations of one run as a table: before, after, paired difference, its interval."""
    return tables.change_table(before, after, compare(after, before))


# -------------------------------------------------------------------------------------------------
# 4. The audio-text gap (paper B): the same questions, heard and read

def spoken(examples):
    """The examples that can be asked in both views: those with a transcript, but for emotions,
    which no transcript holds."""
    return [e for e in examples if e.transcript and e.task != SER_TASK]


def gap_of(text, audio):
    """{id: right?} of both views -> accuracies in per cent, their gap in points, 95 % intervals."""
    read = sum(text.values())
    heard = sum(audio.values())
    _, interval, n = paired(text, audio)
    return {
        "text_accuracy": 100 * read / n,
        "audio_accuracy": 100 * heard / n,
        "gap": 100 * (read - heard) / n,
        "questions": n,
        "intervals": {"text": wilson(read, n), "audio": wilson(heard, n), "gap": interval},
    }


def table_of(correct):
    """view -> kind -> id -> right? -> gap_of's dict of all; "kinds": of each kind; "correct"."""
    text = correct["text"]
    audio = correct["audio"]
    kinds = {kind: gap_of(text[kind], audio[kind]) for kind in text}
    return {**gap_of(flat(text), flat(audio)), "kinds": kinds, "correct": correct}


def gap_reduction(before, after):
    """Per cent of the gap that is gone; None where there was no gap. Text AFTER has no part in it,
    so that a model whose text view rots cannot look good."""
    # (audio after - audio before) / (text before - audio before)
    gap = before["text_accuracy"] - before["audio_accuracy"]
    if gap <= 0:
        return None
    return 100 * (after["audio_accuracy"] - before["audio_accuracy"]) / gap


def evaluate_views(model, processor, examples, *, elsewhere=True, **decoding):
    """Ask every spoken question twice, as audio and as text; greedy by default. elsewhere: also
    score what only audio can ask (Table 2). DataError without a spoken question, and for an open
    one among the others.

    Returns table_of's dict; "samples"; "keys" and "decoding", as comparable; "elsewhere":
    evaluate_model's dict on the other examples."""
    asked = spoken(examples)
    if not asked:
        raise data.DataError("no example has a transcript, so the audio-text gap cannot be "
                             "measured; add transcripts to the manifest")
    rest = [e for e in examples if elsewhere and not spoken([e])]
    check_scorable(rest)

    # Each view: ask, judge, keep
    decoding = {"temperature": 0.0, **decoding}
    samples = []
    kinds = sorted({e.sub_category or e.task for e in asked})
    correct = {view: {kind: {} for kind in kinds} for view in VIEWS}
    for view in VIEWS:
        outputs = generate(model, processor, asked, view=view, words="transcript", **decoding)
        for e, output in zip(asked, outputs):
            choices, answer = judge.choices_and_answer(e)
            sample = {
                "id": e.id,
                "view": view,
                "transcript": e.transcript,
                "question": e.question,
                "choices": choices,
                "answer": answer,
                "kind": e.sub_category or e.task,
                "model_output": output,
                "correct": judge.agree(output, answer, choices),
            }
            samples.append(sample)
            correct[view][sample["kind"]][e.id] = sample["correct"]

    results = {**table_of(correct), "samples": samples, **comparable(asked, **decoding)}
    results["decoding"]["words"] = "transcript"

    # What only audio can ask
    if rest:
        found = evaluate_model(model, processor, rest, **decoding)
        samples += [{"view": "audio", **s} for s in found.pop("samples")]
        results["elsewhere"] = found
    return results


def report_gap(results, before=None):
    """The gap as a table, a line per kind of question and one for all; with `before` (another such
    dict, of the same questions) its reduction, and paired differences."""
    header = f"{'':14}{'text':>8}{'audio':>8}{'gap':>8}   95 % interval of the gap"
    lines = [header + "   reduction" if before else header]
    for name, row in [*results["kinds"].items(), ("together", results)]:
        low, high = row["intervals"]["gap"]
        line = (
            f"{name:14}{row['text_accuracy']:8.1f}{row['audio_accuracy']:8.1f}"
            f"{row['gap']:8.1f}   [{low:+.1f}, {high:+.1f}]"
        )
        share = gap_reduction(before["kinds"].get(name, before), row) if before else None
        lines.append(line if share is None else f"{line}{share:18.1f} %")
    if not before:
        return "\n".join(lines)

    for view in VIEWS:
        now = flat(results["correct"][view])
        then = flat(before["correct"][view])
        points, (low, high), n = paired(now, then)
        key = f"{view}_accuracy"
        lines.append(
            f"{view:6}{before[key]:7.1f} -> {results[key]:.1f}   {points:+.1f} "
            f"points, paired [{low:+.1f}, {high:+.1f}], {n} questions"
        )
    if "elsewhere" in before:
        lines.append("elsewhere (heard only):")
        lines.append(report_change(before["elsewhere"], results["elsewhere"]))
    return "\n".join(lines)


def together(by_set):
    """set -> table_of's dict -> one such dict of all questions, whose kinds are the sets."""
    correct = {view: {} for view in VIEWS}
    for name, table in by_set.items():
        for view in VIEWS:
            # Two files may use the same id
            verdicts = flat(table["correct"][view])
            correct[view][name] = {f"{name} {i}": verdict for i, verdict in verdicts.items()}
    return table_of(correct)


# -------------------------------------------------------------------------------------------------
# 5. The tasks of the command line

def wanted(examples, task):
    """What --task asks of a manifest: gap needs transcripts, ser emotions, aqa all others."""
    if task == "gap":
        return spoken(examples)
    return [e for e in examples if task == "both" or (task == "ser") == (e.task == SER_TASK)]


def run(args, rank, device):
    """Ask a model the questions of each manifest, its share on each rank, and score the answers."""
    # 1. What is asked
    sets = {}
    for file in args.data:
        name = Path(file).stem
        if name in sets:
            raise data.DataError(f"two of the manifests are called {name}, and results are "
                                 "reported by that name; rename one")
        examples = data.read_manifest(file, split=args.split)
        sets[name] = wanted(examples, args.task)[:args.limit]
        if not sets[name]:
            raise data.DataError(f"{file}: has no example for --task {args.task} (gap needs "
                                 "transcripts); check --task and --split")
        if args.task != "gap":
            check_scorable(sets[name])
    data.check_audio(sum(sets.values(), []))        # by every rank, so that all stop for one clip

    # 2. The model, and its answers
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, processor = models.load_audio_model(args.model, dtype=dtype)
    hearing.check(model.to(device), processor)
    names = ("batch_size", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    decoding = {name: vars(args)[name] for name in names}
    ask = evaluate_views if args.task == "gap" else evaluate_model
    found = {}
    samples = []
    for name, examples in sets.items():
        found[name] = ask(model, processor, examples, **decoding)
        samples += [{"set": name, **s} for s in found[name].pop("samples")]
    if rank > 0:
        return

    # 3. The files and the tables, of each manifest and, of several gaps, together
    first, *further = found
    results = {**found[first], "set": first, "splits": {name: found[name] for name in further}}
    report = report_gap if args.task == "gap" else tables.report
    if args.task == "gap" and further:
        found["all files"] = results["together"] = together(found)
        del results["together"]["correct"]                  # it stands in the sets
    for name, result in found.items():
        print(f"-- {name}\n{report(result)}")
    out = Path(args.out)
    write_json(out / "results.json", {**results, "settings": vars(args)})
    replace_text(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    if args.task in ("aqa", "both"):
        # MMAU's format, for its own script
        write_json(out / "predictions.json", [s for s in samples if s["task"] != SER_TASK])


def flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", required=True, choices=["aqa", "ser", "both", "gap"],
        help="multiple choice, emotions or both; gap: the same questions heard and read")
    add("--out", default="runs/evaluate", help="folder for results.json and samples.jsonl")

    # what is scored
    add("--model", metavar="DIR", required=True,
        help="an audio language model: a folder, a name on the hub, or a run's folder (its newest "
             "checkpoint)")
    add("--data", metavar="FILE", nargs="+", required=True,
        help="manifests (data.py), each reported apart")
    add("--split", help="only the manifest's examples of this split")
    add("--limit", type=int, help="only the first N examples")

    # how the model talks
    add("--temperature", type=float,
        help="default: 0.6 (paper A); gap: 0; at 0 always the most probable token")
    add("--top-k", type=int, default=5, help="paper: 5; 0: all tokens")
    add("--top-p", type=float, default=0.5, help="paper: 0.5; 1: all of the probability")
    add("--seed", type=int, default=0)
    add("--max-new-tokens", type=int, default=2048,
        help="tokens an answer may have, trace included: 2048 leave room for a trace like CoTA's")
    add("--batch-size", type=int, default=16, help="questions answered at once")
    return parser


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    if args.temperature is not None and args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature is at least 0, --top-p above 0 and at most 1")
    if args.temperature is None:
        args.temperature = 0.0 if args.task == "gap" else 0.6

    rank, _, device = ranks.start_distributed()
    args.model = ranks.of_rank_zero(newest_checkpoint(args.model))
    if rank == 0:
        make_folder(args.out)                               # not after hours of answers
    run(args, rank, device)
    ranks.stop_distributed()


if __name__ == "__main__":
    main()
