"""
run.png, the figure that a training script draws at its end.
"""
import json
import math
from pathlib import Path

import numpy as np

BLUE, RED, ORANGE = "#2f5d9b", "#b04a5a", "#d98c3f"
TINY = 1e-6                 # what a log scale shows of 0


def read_lines(path):
    """The whole lines of a JSONL file, as dicts; none without the file. A kill cuts the last line off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def curve(log, name):
    """Where a term was logged -> (steps, values). Lines without it, null and what is not finite are left out."""
    found = [(line["step"], line[name]) for line in log if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
    return tuple(zip(*found)) or ((), ())


def smooth(values):
    """The mean of the twentieth of all around each of them, of fewer at both ends."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def draw(axis, log, name, colour, label=None, scale="linear"):
    """A term over the steps, faint as it was and smoothed -> the line for a legend, if there is anything to draw. scale: linear, log, or exact, which
    is linear and nothing to smooth."""
    steps, values = curve(log, name)
    if not values:
        return []
    if scale == "log":                                                    # one step's jump is not to lift all around it
        axis.set_yscale("log")
        values = np.maximum(values, TINY)
        soft = np.exp(smooth(np.log(values)))
    else:
        soft = values if scale == "exact" else smooth(values)
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    return axis.plot(steps, soft, color=colour, linewidth=1.5, label=label or name, marker="o" if len(values) == 1 else None)


def plot_run(folder):
    """A training run's folder (log.jsonl, results.json) -> run.png: the loss terms over the steps, accuracies before and after."""
    import matplotlib
    matplotlib.use("Agg")                                                 # no screen needed
    import matplotlib.pyplot as plt

    log = read_lines(Path(folder) / "log.jsonl")
    results = json.loads((Path(folder) / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name in ("sft", "top", "layer", "acoustic"):
        steps, values = curve(log, name)
        if values:
            left.plot(steps, np.maximum(values, 1e-6), label=name, linewidth=1.5)
    left.set(xlabel="step", ylabel="loss term, unweighted", yscale="log", title="what the student learns from")
    left.legend(frameon=False)
    bars = [(name, *((r["aqa"][name], r["aqa"]["intervals"][name]) for r in (results["before"], results["after"])))
            for name in (*results["before"].get("aqa", {}).get("correct", ()), "average") if "aqa" in results["before"]
            and results["before"]["aqa"][name] is not None]
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


def plot_cord(folder):
    """A CORD run's folder (log.jsonl, before, step-N and after.json) -> run.png: both views' accuracy over the steps, and what drove them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    log = read_lines(folder / "log.jsonl")
    points = [(0, "before")] + [(int(path.stem[5:]), path.stem) for path in folder.glob("eval-*.json")] + [(log[-1]["step"], "after")]
    evaluations = [(step, json.loads((folder / f"{name}.json").read_text())) for step, name in sorted(points)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for view, colour in (("text", ORANGE), ("audio", BLUE)):
        values = [found[f"{view}_accuracy"] for _, found in evaluations]
        low, high = zip(*(found["intervals"][view] for _, found in evaluations))
        left.plot([step for step, _ in evaluations], values, "-o", color=colour, label=f"{view} view")
        left.fill_between([step for step, _ in evaluations], low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102), title="the same questions, read and heard")
    left.legend(frameon=False, loc="lower right")
    for name, label, axis, colour in (("kl", "KL per token (nats)", right, BLUE), ("reward", "reward, mean of the groups", right.twinx(), RED)):
        draw(axis, log, name, colour)
        axis.set_ylabel(label, color=colour)
        axis.set_ylim(bottom=0)
    right.set(xlabel="step", title="what the student learns from")
    left.spines[["top", "right"]].set_visible(False)
    right.spines["top"].set_visible(False)
    figure.savefig(folder / "run.png", dpi=130)
    plt.close(figure)
