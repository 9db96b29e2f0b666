"""Listen, answer, score: the two benchmarks of paper A, the audio-text gap of paper B, and how sure
we are.

Audio question answering (AQA) is scored as MMAU and MMAR score it: multiple choice over sound,
music, speech and their mixes, accuracy in per cent. Emotion recognition (SER) is scored by
unweighted accuracy, the mean of the recall of each emotion: of four emotions, a model that says
"neutral" to everything gets 25 of 100, however many neutral sentences there are.

Where this departs from the papers and from the benchmarks' own scripts:
1. Two accuracies are given. MMAU's script matches words in the whole output, where a reasoning
   trace that merely discusses a wrong choice loses the point. As in the paper, our headline drops
   the trace and extracts the chosen option; MMAU's rule then judges that option. The same rule on
   the raw text is under "official". predictions.json is in MMAU's format, for its own script.
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
from judge import extract_choice
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

def tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))


def mmau_correct(answer, prediction, choices):
    """MMAU's rule: every word of the answer is said, and no word that only wrong choices have.

    Words are sets, so the rule is blind to order ("knock then beep" = "beep then knock"), and "The
    answer is (A) gold" fails beside the choice "a ring"."""
    spoken_words = tokens(prediction)
    wanted = tokens(answer)
    forbidden = set().union(*map(tokens, choices)) - wanted
    return bool(spoken_words) and wanted <= spoken_words and not spoken_words & forbidden


def accuracies(correct):
    """task -> id -> right? -> accuracy and interval of each task and of all ("average")."""
    verdicts = {task: list(by_id.values()) for task, by_id in correct.items()}
    verdicts["average"] = sum(verdicts.values(), [])
    per_cent, intervals = {}, {}
    for name, v in verdicts.items():
        per_cent[name] = 100 * sum(v) / len(v) if v else None
        intervals[name] = wilson(sum(v), len(v))
    return per_cent, intervals


def score_mmau(records):
    """Score records in MMAU's format: dicts with id, task, choices, answer and model_output.

    Returns {task: accuracy of the chosen option, None where nothing was scored; "average";
    "intervals"; "official": the same by MMAU's rule on the raw output; "counts"; "correct":
    task -> id -> bool}."""
    tasks = [*TASKS, *sorted({record["task"] for record in records} - set(TASKS))]
    correct = {task: {} for task in tasks}
    official = {task: {} for task in tasks}
    no_answer = 0
    for record in records:
        answer, choices, output = record["answer"], record["choices"], record["model_output"]
        chosen = extract_choice(output, choices)
        no_answer += chosen is None
        right = chosen is not None and mmau_correct(answer, chosen, choices)
        correct[record["task"]][record["id"]] = right
        official[record["task"]][record["id"]] = mmau_correct(answer, output, choices)

    per_cent, intervals = accuracies(correct)
    counts = {"records": len(records), "no_answer": no_answer}
    return {
        **per_cent,
        "intervals": intervals,
        "official": accuracies(official)[0],
        "counts": counts,
        "correct": correct,
    }


def ser_class(output, classes):
    """The one emotion of `classes` that an answer names: "She sounds angry.", "(B)". Besides the
    classes' names EMOTIONS count and nothing else; two of them, or none, are no answer."""
    for word, name in EMOTIONS.items():
        if name in classes and word not in classes:
            output = re.sub(rf"\b{word}\b", name, output, flags=re.I)
    return extract_choice(output, classes)


def score_ser(labels, said, classes, *, samples=10_000, seed=0):
    """labels, said: class names, one per utterance; None is no answer, which is wrong.

    Returns {"ua": per cent; "recall": per class; "interval": bootstrap 95 %, resampled within each
    class; "confusion": label -> prediction or "no answer" -> count}. Raises ValueError for an
    unknown label."""
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise ValueError(f"the label {unknown[0]!r} is not among the classes {', '.join(classes)}")
    confusion = {label: dict.fromkeys((*classes, NO_ANSWER), 0) for label in classes}
    for label, name in zip(labels, said, strict=True):
        confusion[label][name if name in classes else NO_ANSWER] += 1

    # UA = 1/C sum_c right_c / n_c, over the classes that have an utterance
    sizes = {label: sum(row.values()) for label, row in confusion.items()}
    recall = {c: 100 * confusion[c][c] / sizes[c] for c in classes if sizes[c]}
    if not recall:
        return {"ua": None, "recall": {}, "interval": [None, None], "confusion": confusion}

    # Of n utterances drawn with replacement, k of n right: Binomial(n, k / n) are right.
    rng = np.random.default_rng(seed)
    drawn = [rng.binomial(sizes[c], recall[c] / 100, samples) / sizes[c] for c in recall]
    interval = percentiles(100 * np.mean(drawn, axis=0))
    ua = sum(recall.values()) / len(recall)
    return {"ua": ua, "recall": recall, "interval": interval, "confusion": confusion}


# -------------------------------------------------------------------------------------------------
# 2. How sure are we?

def percentiles(draws):
    return [float(x) for x in np.percentile(draws, [2.5, 97.5])]


def wilson(right, total, z=1.959964):
    """Wilson's 95 % interval of an accuracy, per cent. Unlike p +- 2 s.e. it stays inside 0..100
    and is not empty at 0 and 100."""
    if not total:
        return [None, None]
    # (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n)
    p = right / total
    shrink = 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    variance = p * (1 - p) / total + z * z / (4 * total * total)
    half = z / shrink * variance ** 0.5
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return [100 * low, 100 * high]


def paired_bootstrap(correct_a, correct_b, *, labels=None, samples=10_000, seed=0):
    """How much better is A than B on the same examples? correct_a, correct_b: bools in one order.

    Returns (difference, [low, high]): accuracy of A minus that of B in points, and its 95 %
    bootstrap interval. With `labels` (the class of each example) it is the difference in unweighted
    accuracy, resampled within each class. Pairing removes what makes a question easy for both: the
    interval is narrower than two separate ones suggest. ValueError: lengths differ, or are 0."""
    a = np.asarray(correct_a, dtype=int)
    b = np.asarray(correct_b, dtype=int)
    if a.shape != b.shape or a.size == 0:
        raise ValueError("a paired comparison needs two equally long lists, not "
                         f"{a.size} and {b.size} examples")
    labels = np.zeros(a.size) if labels is None else np.asarray(labels)
    rng = np.random.default_rng(seed)
    differences_of_classes = []
    draws = []
    for label in np.unique(labels):
        # d_i = a_i - b_i: +1 only A is right, -1 only B, 0 no difference
        d = (a - b)[labels == label]
        n = d.size
        wins = (d == 1).sum()
        losses = (d == -1).sum()

        # n draws of d_i with replacement are Multinomial(n, shares of +1, -1 and 0)
        shares = [wins / n, losses / n, (n - wins - losses) / n]
        drawn = rng.multinomial(n, shares, samples)      # [samples, 3]
        differences_of_classes.append(d.mean())
        draws.append((drawn[:, 0] - drawn[:, 1]) / n)
    difference = 100 * float(np.mean(differences_of_classes))
    return difference, percentiles(100 * np.mean(draws, axis=0))


# -------------------------------------------------------------------------------------------------
# 3. AQA and SER of a model

def score(examples, outputs):
    """Examples and what was said -> ({"aqa": score_mmau's dict, "ser": score_ser's and "correct":
    class -> id -> bool}, each only if it has examples; a list of samples, one dict each)."""
    samples = []
    for e, output in zip(examples, outputs, strict=True):
        choose = ser_class if e.task == SER_TASK else extract_choice
        sample = {
            "id": e.id,
            "audio_id": str(e.audio),
            "question": e.question,
            "choices": e.choices,
            "answer": e.answer,
            "task": e.task,
            "split": e.split,
            "model_output": output,
            "chosen": choose(output, e.choices),
        }
        if e.kind:
            sample["sub-category"] = e.kind
        samples.append(sample)

    results = {}
    aqa = [s for s in samples if s["task"] != SER_TASK]
    ser = [s for s in samples if s["task"] == SER_TASK]
    if aqa:
        results["aqa"] = score_mmau(aqa)
    for s in aqa:
        s["correct"] = results["aqa"]["correct"][s["task"]][s["id"]]
    if ser:
        classes = sorted(set().union(*(s["choices"] for s in ser)))
        answers = [s["answer"] for s in ser]
        results["ser"] = score_ser(answers, [s["chosen"] for s in ser], classes)
        results["ser"]["correct"] = {c: {} for c in classes}
    for s in ser:
        s["correct"] = s["chosen"] == s["answer"]
        results["ser"]["correct"][s["answer"]][s["id"]] = s["correct"]
    return results, samples


def evaluate_model(model, processor, examples, **decoding):
    """Generate (decoding: generate's keywords) and score; every task but SER's is AQA. DataError
    as check_scorable.

    Returns {"aqa": score_mmau's dict, "ser": score_ser's dict, "samples": list of dicts; "keys"
    (id -> question_key) and "decoding": what two evaluations must share to be compared}."""
    check_scorable(examples)
    outputs = generate(model, processor, examples, **decoding)
    results, samples = score(examples, outputs)
    keys = {e.id: question_key(e) for e in examples}
    decided = decoding_of(**decoding)
    return {**results, "samples": samples, "keys": keys, "decoding": decided}


def check_scorable(examples):
    """DataError for an open question, and for a task whose name the results need."""
    for e in examples:
        if e.task in TAKEN:
            raise data.DataError(f"{e.where}: the task {e.task!r} has the name of one of the "
                                 "results; rename it")
        if not e.choices:
            raise data.DataError(f"{e.where}: an open question is not scored here; give it "
                                 "choices, or a transcript and --task gap")


def question_key(example):
    """The same for the same words about the same clip, wherever the folder of the clips lies."""
    clip = Path(*example.audio.parts[-2:])
    return data.fingerprint([dataclasses.replace(example, audio=clip)])


def decoding_of(*, max_new_tokens=512, temperature=0.6, top_k=5, top_p=0.5, seed=0, **_):
    """generate's keywords that decide what is said (at temperature 0 nothing is drawn)."""
    drawn = {"top_k": top_k, "top_p": top_p, "seed": seed} if temperature else {}
    return {"max_new_tokens": max_new_tokens, "temperature": temperature, **drawn}


def compare(results, other):
    """How far `results` are from `other` (evaluate_model's dicts) on the examples that both have.

    Returns {(part, name): (points, [low, high], pairs)}, part and name as in ("aqa", "sound"),
    ("aqa", "average") and ("ser", "ua")."""
    differences = {}
    for part, whole in ("aqa", "average"), ("ser", "ua"):
        verdicts = results.get(part, {}).get("correct", {})
        others = other.get(part, {}).get("correct", {})
        pairs = []                                          # (group, right here, right there)
        for group, by_id in verdicts.items():
            shared = [i for i in by_id if i in others.get(group, {})]
            pairs += [(group, by_id[i], others[group][i]) for i in shared]

        names = [*verdicts, whole] if part == "aqa" else [whole]
        for name in names:
            rows = [pair for pair in pairs if name == whole or name == pair[0]]
            if rows:
                groups, a, b = zip(*rows)
                labels = groups if part == "ser" else None
                points, interval = paired_bootstrap(a, b, labels=labels)
                differences[part, name] = points, interval, len(rows)
    return differences


def report_change(before, after):
    """Two evaluations of one run as a table: before, after, paired difference, its interval."""
    return tables.change_table(before, after, compare(after, before))


# -------------------------------------------------------------------------------------------------
# 4. The audio-text gap (paper B): the same questions, heard and read

def spoken(examples):
    """What can be asked in both views: a transcript is needed, and none holds an emotion."""
    return [e for e in examples if e.transcript and e.task != SER_TASK]


def flat(by_group):
    """group -> id -> right? -> {id: right?}"""
    return {i: right for group in by_group.values() for i, right in group.items()}


def gap_of(text, audio):
    """{id: right?} of both views -> accuracies in per cent, their gap in points, 95 % intervals."""
    n = len(text)
    text_right = sum(text.values())
    audio_right = sum(audio.values())
    _, gap = paired_bootstrap(list(text.values()), [audio[i] for i in text])
    intervals = {
        "text": wilson(text_right, n),
        "audio": wilson(audio_right, n),
        "gap": gap,
    }
    return {
        "text_accuracy": 100 * text_right / n,
        "audio_accuracy": 100 * audio_right / n,
        "gap": 100 * (text_right - audio_right) / n,
        "questions": n,
        "intervals": intervals,
    }


def table_of(correct):
    """view -> kind -> id -> right? -> gap_of's dict of all; "kinds": of each kind; "correct"."""
    text = correct["text"]
    audio = correct["audio"]
    kinds = {kind: gap_of(text[kind], audio[kind]) for kind in text}
    both = gap_of(flat(text), flat(audio))
    return {**both, "kinds": kinds, "correct": correct}


def gap_reduction(before, after):
    """Per cent of the gap that is gone; None where there was no gap. Text AFTER has no part in it,
    so that a model whose text view rots cannot look good."""
    # (audio after - audio before) / (text before - audio before)
    gap = before["text_accuracy"] - before["audio_accuracy"]
    if gap <= 0:
        return None
    return 100 * (after["audio_accuracy"] - before["audio_accuracy"]) / gap


def evaluate_views(model, processor, examples, *, elsewhere=True, temperature=0.0, **decoding):
    """Ask every spoken question twice, as audio and as text; greedy by default. elsewhere: also
    score what only audio can ask (Table 2). DataError without a spoken question.

    Returns table_of's dict; "keys" (id -> question_key) and "decoding": what two runs must share to
    be compared; "elsewhere": evaluate_model's dict on the other examples; "samples"."""
    asked = spoken(examples)
    if not asked:
        raise data.DataError("no example has a transcript, so the audio-text gap cannot be "
                             "measured; add transcripts to the manifest")
    samples = []
    kinds = sorted({e.kind or e.task for e in asked})
    correct = {view: {kind: {} for kind in kinds} for view in VIEWS}
    for view, words in ("text", "transcript"), ("audio", None):
        how = {"view": view, "words": words, "temperature": temperature, **decoding}
        for e, output in zip(asked, generate(model, processor, asked, **how)):
            kind = e.kind or e.task
            choices, answer = judge.choices_and_answer(e)
            right = judge.agree(output, answer, choices)
            correct[view][kind][e.id] = right
            samples.append(
                {
                    "id": e.id,
                    "view": view,
                    "transcript": e.transcript,
                    "question": e.question,
                    "choices": choices,
                    "answer": answer,
                    "kind": kind,
                    "model_output": output,
                    "correct": right,
                }
            )

    results = table_of(correct)
    results["samples"] = samples
    results["keys"] = {e.id: question_key(e) for e in asked}
    decided = decoding_of(temperature=temperature, **decoding)
    results["decoding"] = {**decided, "words": "transcript"}
    ids = {e.id for e in asked}
    rest = [e for e in examples if e.id not in ids]
    if elsewhere and rest:
        found = evaluate_model(model, processor, rest, temperature=temperature, **decoding)
        results["samples"] += [{"view": "audio", **s} for s in found.pop("samples")]
        results["elsewhere"] = found
    return results


def report_gap(results, before=None):
    """The gap as a table; with `before` (another such dict) its reduction, paired differences."""
    if not before:
        return "\n".join(tables.gap_lines(results, None))
    kinds = results["kinds"].items()
    reductions = {
        name: gap_reduction(before["kinds"][name], row)
        for name, row in kinds
        if name in before["kinds"]
    }
    reductions["together"] = gap_reduction(before, results)
    lines = tables.gap_lines(results, reductions)

    for view in VIEWS:
        now = flat(results["correct"][view])
        then = flat(before["correct"][view])
        shared = [i for i in now if i in then]
        if shared:
            pairs = [now[i] for i in shared], [then[i] for i in shared]
            points, (low, high) = paired_bootstrap(*pairs)
            key = f"{view}_accuracy"
            lines.append(
                f"{view:6}{before[key]:7.1f} -> {results[key]:.1f}   {points:+.1f} "
                f"points, paired [{low:+.1f}, {high:+.1f}], {len(shared)} questions"
            )
    if "elsewhere" in results and "elsewhere" in before:
        change = report_change(before["elsewhere"], results["elsewhere"])
        lines += ["elsewhere (heard only):", change]
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

def stems(files):
    """The names that several manifests are reported by. DataError where two have the same."""
    names = [Path(file).stem for file in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise data.DataError(f"two of the manifests are called {twice[0]}, and results are "
                             "reported by that name; rename one")
    return names


def wanted(examples, task):
    """What --task asks of a manifest: gap needs transcripts, ser emotions, aqa all others."""
    if task == "gap":
        return spoken(examples)
    if task == "both":
        return examples
    return [e for e in examples if (e.task == SER_TASK) == (task == "ser")]


def run(args, rank, device):
    """Ask a model the questions of each manifest, its share on each rank, and score the answers."""
    # 1. What is asked
    sets = {}
    for name, file in zip(stems(args.data), args.data):
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
    decoding = {name: getattr(args, name) for name in names}
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
    splits = {name: found[name] for name in further}
    results = {**found[first], "set": first, "splits": splits}
    report = tables.report
    if args.task == "gap":
        report = report_gap
        if further:
            found["all files"] = results["together"] = together(found)
            del results["together"]["correct"]              # it stands in the sets
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
    args = flags().parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.0 if args.task == "gap" else 0.6

    rank, _, device = ranks.start_distributed()
    try:
        args.model = ranks.of_rank_zero(newest_checkpoint(args.model))
        if rank == 0:
            make_folder(args.out)                           # not after hours of answers
        run(args, rank, device)
    except data.DataError as error:
        raise SystemExit(f"evaluate.py: {error}") from None
    ranks.stop_distributed()


if __name__ == "__main__":
    main()
