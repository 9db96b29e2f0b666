"""
Is one model really better than another? Both were asked already; this pairs what they said,
question by question.

    python -m lab.compare runs/b-test/results.json runs/a-test/results.json
    python -m lab.compare runs/b-table/results.json runs/b/before.json   # how much of a gap is gone

The files are what evaluate.py wrote (results.json), or a training run (before.json, after.json,
eval-NNNNNNN.json). Of multiple choice and emotions it prints how far the first model is from the
second, of --task gap also by how much the gap has shrunk. A manifest is compared with its namesake;
a training run asks all its manifests at once. Intervals: paired bootstrap, 95 %, over questions.
"""
import argparse
import json
from pathlib import Path

import evaluate
from plumbing import tables

EVERYTHING = "all manifests"        # the name of what a training run asks: all of them at once


def read(path):
    """An evaluation's JSON. Raises SystemExit for a file that holds none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not (found.keys() & {"aqa", "ser", "text_accuracy"} and "keys" in found):
            raise ValueError("it holds no evaluation")
        return found
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"{path} cannot be compared ({error}); give the results.json of "
                         "evaluate.py, or before.json or after.json of a training run") from None


def differences(decoding, other):
    """-> "max_new_tokens 200, not 2048": what `other` has first; "" if they are equal."""
    names = [n for n in {**decoding, **other} if decoding.get(n) != other.get(n)]
    return ", ".join(f"{name} {other.get(name)}, not {decoding.get(name)}" for name in names)


def sets_of(results):
    """{manifest's name: its results}"""
    return {results.get("set", EVERYTHING): results, **results.get("splits", {})}


def paired(results, other, path):
    """-> [(manifest, its results, the other's of its namesake)]. Raises SystemExit where the other
    was not asked it, had one of its questions in other words or, of a gap, which is about all of
    them, not at all."""
    others = sets_of(other)
    pairs = []
    for name, part in sets_of(results).items():
        before = others.get(name) or others.get(EVERYTHING)
        if before is None:
            raise SystemExit(f"{path} has no manifest called {name}, only {', '.join(others)}; ask "
                             "both models the same manifests")
        missing = []
        for i, key in part["keys"].items():
            absent = None if "text_accuracy" in results else key
            if before["keys"].get(i, absent) != key:
                missing.append(i)
        if missing:
            raise SystemExit(f"{path} lacks {len(missing):,} of the {len(part['keys']):,} "
                             f"questions of {name}, or had them in other words ({missing[0]} is "
                             "the first); ask both models the same manifests")
        pairs.append((name, part, before))
    return pairs


def on_the_same_questions(table, other):
    """table_of's dict of the other model, on the questions and by the kinds of this one's."""
    correct = {}
    for view in evaluate.VIEWS:
        verdicts = evaluate.flat(other["correct"][view])
        correct[view] = {kind: {i: verdicts[i] for i in by_id}
                         for kind, by_id in table["correct"][view].items()}
    return evaluate.table_of(correct)


def compare_gaps(pairs):
    """The gaps of both, per manifest and together, as lines."""
    nows, befores = {}, {}
    for name, table, before in pairs:
        nows[name] = table
        befores[name] = on_the_same_questions(table, before)
    if len(nows) > 1:
        nows["all files"] = evaluate.together(nows)
        befores["all files"] = evaluate.together(befores)
    return [f"-- {name}\n{evaluate.report_gap(nows[name], befores[name])}" for name in nows]


def compare_scores(pairs):
    """Multiple choice and emotions of both, per manifest, as lines."""
    lines = []
    for name, part, before in pairs:
        lines.append(f"-- {name}")
        differences = evaluate.compare(part, before)
        if not differences:
            lines.append("the two have no example in common")
        for (task, group), found in differences.items():
            lines.append(f"{task} {group:8}{tables.difference(*found, wide=7)}")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="an evaluation")
    parser.add_argument("other", help="the one that it is compared with")
    args = parser.parse_args(argv)
    results, other = read(args.results), read(args.other)
    if ("text_accuracy" in results) != ("text_accuracy" in other):
        raise SystemExit(f"one of {args.results} and {args.other} is of --task gap, the other is "
                         "not; ask both models for the same")
    decoded = differences(results["decoding"], other["decoding"])
    if decoded:
        print(f"note: {args.other} was decoded with {decoded}")
    compare = compare_gaps if "text_accuracy" in results else compare_scores
    print(*compare(paired(results, other, args.other)), sep="\n")


if __name__ == "__main__":
    main()
