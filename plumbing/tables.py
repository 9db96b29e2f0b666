"""
What evaluate.py found, as text: the scores, and the difference of two runs.
"""


def scores(results):
    """An evaluation -> {name: (per cent, its 95 % interval)} of every task that was asked, of all
    of them ("average"), and of emotions ("SER"); of both views ("text", "audio")."""
    found = {}
    if "text_accuracy" in results:
        for view in ("text", "audio"):
            found[view] = results[f"{view}_accuracy"], results["intervals"][view]
    if "aqa" in results:
        aqa = results["aqa"]
        for name in (*aqa["correct"], "average"):
            if aqa[name] is not None:
                found[name] = aqa[name], aqa["intervals"][name]
    if "ser" in results:
        found["SER"] = results["ser"]["ua"], results["ser"]["interval"]
    return found


def first_column(found):
    """Its width: the longest task's name has room."""
    return max(10, *(len(name) + 1 for name in found))


def report(results):
    """The results as a table, in per cent with 95 % intervals."""
    found = scores(results)
    wide = first_column(found)
    rows = {}
    for name, (value, (low, high)) in found.items():
        rows[name] = f"{name:{wide}}{value:9.2f}   [{low:5.2f}, {high:6.2f}]  "

    lines = []
    if "aqa" in results:
        counts = results["aqa"]["counts"]
        lines.append(f"{'AQA':{wide}}{'accuracy':>9}   95 % interval     raw text, MMAU's rule")
        for name, official in results["aqa"]["official"].items():
            if name in rows:
                lines.append(f"{rows[name]}{official:9.2f}")
        lines.append(f"{counts['records']} questions, {counts['no_answer']} without a clear answer")
    if "ser" in results:
        confusion = results["ser"]["confusion"]
        lines.append(
            rows["SER"] + "unweighted accuracy; below: said (columns) of meant (rows)"
        )
        names = next(iter(confusion.values()))
        lines.append(" " * 10 + "".join(f"{name:>10}" for name in names))
        for label, row in confusion.items():
            lines.append(f"{label:10}" + "".join(f"{count:10}" for count in row.values()))
    return "\n".join(lines)


def difference(points, interval, pairs, wide=1):
    low, high = interval
    return f"{points:+{wide}.2f} points  [{low:+.2f}, {high:+.2f}]  {pairs} pairs"


def change_table(before, after, differences):
    """Before, after, their paired difference and its interval."""
    before = scores(before)
    after = scores(after)
    wide = first_column(before)
    lines = [f"{'':{wide}}{'before':>9}{'after':>9}   difference, paired, 95 % interval"]
    for name, (value, _) in before.items():
        paired = differences["ser", "ua"] if name == "SER" else differences["aqa", name]
        row = f"{name:{wide}}{value:9.2f}{after[name][0]:9.2f}   {difference(*paired)}"
        lines.append(row)
    return "\n".join(lines)
