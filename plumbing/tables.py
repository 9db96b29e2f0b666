"""
What evaluate.py found, as text: the scores, the difference of two runs, the audio-text gap. Nothing
is computed here.
"""


def report(results):
    """The results as a table, in per cent with 95 % intervals."""
    lines = []
    if "aqa" in results:
        lines += aqa_lines(results["aqa"])
    if "ser" in results:
        lines += ser_lines(results["ser"])
    return "\n".join(lines)


def aqa_lines(aqa):
    counts = aqa["counts"]
    wide = first_column(aqa)
    lines = [f"{'AQA':{wide}}{'accuracy':>9}   95 % interval     raw text, MMAU's rule"]
    for name in (*aqa["correct"], "average"):
        if aqa[name] is not None:
            low, high = aqa["intervals"][name]
            lines.append(
                f"{name:{wide}}{aqa[name]:9.2f}   [{low:5.2f}, {high:6.2f}]  "
                f"{aqa['official'][name]:9.2f}"
            )
    lines.append(f"{counts['records']} questions, {counts['no_answer']} without a clear answer")
    return lines


def first_column(aqa):
    """Its width: the longest task's name has room."""
    return max(10, *(len(name) + 1 for name in aqa["correct"]))


def ser_lines(ser):
    low, high = ser["interval"]
    names = list(next(iter(ser["confusion"].values())))
    lines = [
        f"{'SER':10}{ser['ua']:9.2f}   [{low:5.2f}, {high:6.2f}]  unweighted "
        "accuracy; below: said (columns) of meant (rows)"
    ]
    lines.append(" " * 10 + "".join(f"{name:>10}" for name in names))
    for label, row in ser["confusion"].items():
        lines.append(f"{label:10}" + "".join(f"{row[name]:10}" for name in names))
    return lines


def difference(points, interval, pairs):
    low, high = interval
    return f"{points:+.2f} points  [{low:+.2f}, {high:+.2f}]  {pairs} pairs"


def difference_lines(differences):
    """evaluate.compare's differences, one a line."""
    lines = []
    for (part, name), (points, interval, pairs) in differences.items():
        wide = 7 - len(f"{points:+.2f}")
        lines.append(f"{part} {name:8}{' ' * wide}{difference(points, interval, pairs)}")
    return lines or ["the two have no example in common"]


def change_table(before, after, differences):
    """Before, after, their paired difference and its interval."""
    rows = []
    wide = 10
    if "aqa" in before:
        wide = first_column(before["aqa"])
        rows += [("aqa", name, name) for name in (*before["aqa"]["correct"], "average")]
    if "ser" in before:
        rows.append(("ser", "ua", "SER"))
    lines = [f"{'':{wide}}{'before':>9}{'after':>9}   difference, paired, 95 % interval"]
    for part, name, label in rows:
        if before[part][name] is None:
            continue
        found = differences.get((part, name))
        paired = difference(*found) if found else ""
        lines.append(f"{label:{wide}}{before[part][name]:9.2f}{after[part][name]:9.2f}   {paired}")
    return "\n".join(lines)


def gap_lines(table, reductions):
    """evaluate.table_of's dict, a line per kind of question and one for all. reductions: name ->
    per cent of the gap that is gone; None: there is no model to compare with."""
    header = f"{'':14}{'text':>8}{'audio':>8}{'gap':>8}   95 % interval of the gap"
    lines = [header if reductions is None else header + "   reduction"]
    for name, row in [*table["kinds"].items(), ("together", table)]:
        low, high = row["intervals"]["gap"]
        line = (
            f"{name:14}{row['text_accuracy']:8.1f}{row['audio_accuracy']:8.1f}"
            f"{row['gap']:8.1f}   [{low:+.1f}, {high:+.1f}]"
        )
        share = (reductions or {}).get(name)
        lines.append(line if share is None else f"{line}{share:18.1f} %")
    return lines
