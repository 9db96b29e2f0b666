"""
What evaluate.py found, as text: the scores, the difference of two runs, the audio-text gap. Nothing
is computed here.
"""
OUR_TASKS = {"sound", "music", "speech", "mcq"}     # their categories are shown for MMAU's files
NOTES = {
    "indistinct": "a wrong choice has the answer's words: MMAU's rule takes it for right",
    "no_gold": "the answer is none of the choices",
    "no_letter": "VoiceBench's templates find no letter",
}


def report(results):
    """The results as a table, in per cent with 95 % intervals."""
    lines = []
    if "aqa" in results:
        lines += aqa_lines(results["aqa"])
    if "ser" in results:
        lines += ser_lines(results["ser"])
    for name, split in results.get("splits", {}).items():
        lines += [f"-- {name}", report(split)]
    return "\n".join(lines)


def aqa_lines(aqa):
    official = aqa["official"]
    counts = aqa["counts"]
    rule = "VoiceBench's templates" if "no_letter" in counts else "raw text, MMAU's rule"
    wide = first_column(aqa)
    lines = [f"{'AQA':{wide}}{'accuracy':>9}   95 % interval     {rule}"]
    for name in (*aqa["correct"], "average"):
        if aqa[name] is not None:
            low, high = aqa["intervals"][name]
            lines.append(f"{name:{wide}}{aqa[name]:9.2f}   [{low:5.2f}, {high:6.2f}]  "
                         f"{official[name]:9.2f}")

    # The benchmarks' own files and MMAR's mixes are also shown by category.
    if "category" in aqa["groups"] or aqa["correct"].keys() - OUR_TASKS:
        for key in ("category", "sub-category"):
            for name, (hits, n) in sorted(aqa["groups"].get(key, {}).items()):
                raw = official["counts"][key][name][0]
                lines.append(f"    {name:36}{100 * hits / n:7.2f}{100 * raw / n:9.2f}   of {n}")

    lines.append(f"{counts['records']} questions, {counts['skipped']} skipped (no model_output), "
                 f"{counts['no_answer']} without a clear answer")
    return lines + [f"in {counts[k]} of them {NOTES[k]}" for k in NOTES if counts.get(k)]


def first_column(aqa):
    """Its width: the longest task's name has room."""
    return max(10, *(len(name) + 1 for name in aqa["correct"]))


def ser_lines(ser):
    low, high = ser["interval"]
    names = list(next(iter(ser["confusion"].values())))
    lines = [f"{'SER':10}{ser['ua']:9.2f}   [{low:5.2f}, {high:6.2f}]  unweighted "
             "accuracy; below: said (columns) of meant (rows)"]
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
        line = (f"{name:14}{row['text_accuracy']:8.1f}{row['audio_accuracy']:8.1f}"
                f"{row['gap']:8.1f}   [{low:+.1f}, {high:+.1f}]")
        share = (reductions or {}).get(name)
        lines.append(line if share is None else f"{line}{share:18.1f} %")
    return lines


def voicebench_lines(table, drawn):
    """VoiceBench's own count, if the table has one. drawn: a letter is, where none is found."""
    lines = []
    for view, theirs in table.get("voicebench", {}).items():
        counts = theirs["counts"]
        lines.append(f"{view:6}multiple choice by VoiceBench's templates: "
                     f"{theirs['accuracy']:.1f}; in {counts['no_letter']} of {counts['records']} "
                     f"answers they find no letter{' and one is drawn' if drawn else ''}")
    return lines


def name_failures(before, after):
    """Two evaluations of one run -> a sentence for each known failure that they show."""
    sentences = []
    scores = before.get("aqa", {})
    was = {}
    for name in ("sound", "music", "speech"):
        if scores.get(name) is not None:
            was[name] = scores[name]
    gain = {name: after["aqa"][name] - was[name] for name in was}
    lost = before["ser"]["ua"] - after["ser"]["ua"] if "ser" in before else 0
    if lost > 2 and sum(gain.values()) > 0:
        sentences.append(f"SER fell by {lost:.1f} points while AQA rose: the student forgets how "
                         "to hear; raise --alpha-ac")
    if gain.get("speech", 0) <= 5:
        return sentences

    # Share of the errors that are gone: points alone would blame a task near 100.
    mended = {name: max(0, 100 * gain[name] / max(100 - was[name], 1)) for name in was}
    for name in ("sound", "music"):
        if name in was and mended[name] < mended["speech"] / 2:
            sentences.append(f"{name} loses {mended[name]:.0f} % of its errors, speech "
                             f"{mended['speech']:.0f} %: do the descriptions say too little of "
                             f"{name}? read some")
    return sentences
