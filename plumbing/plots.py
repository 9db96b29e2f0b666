"""
run.png, the figure that a training script draws at its end. Without matplotlib there is none.
"""
import json
import math
from pathlib import Path

import numpy as np

BLUE, PALE, RED, ORANGE = "#2f5d9b", "#b8c4d6", "#b04a5a", "#d98c3f"
TINY = 1e-6                 # what a log scale shows of 0


def read_log(folder):
    """The lines of a finished run's log.jsonl, as dicts."""
    with open(Path(folder) / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def curve(log, name):
    """Where a term was logged -> (steps, values), without null and what is not finite."""
    lines = [line for line in log if isinstance(line.get(name), int | float)]
    lines = [line for line in lines if math.isfinite(line[name])]
    return tuple(line["step"] for line in lines), tuple(line[name] for line in lines)


def smooth(values):
    """The mean of the twentieth of all around each of them, of fewer at both ends."""
    window = np.ones(max(1, len(values) // 20))
    around = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / around


def draw(axis, log, name, colour, label=None, scale="linear"):
    """A term over the steps, faint as it was and smoothed -> the lines for a legend. scale: linear,
    log, or exact, which is linear with nothing to smooth."""
    steps, values = curve(log, name)
    if not values:
        return []
    if scale == "log":
        # smoothed as logarithms, so that one step's jump does not lift all around it
        axis.set_yscale("log")
        values = np.maximum(values, TINY)
        soft = np.exp(smooth(np.log(values)))
    else:
        soft = values if scale == "exact" else smooth(values)
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(values) == 1 else None
    return axis.plot(steps, soft, color=colour, linewidth=1.5, label=label or name, marker=marker)


def pyplot():
    """matplotlib.pyplot without a screen, or None where it cannot be imported."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError as error:
        print(f"no figure was drawn, because matplotlib cannot be imported ({error})")
        return None
    return matplotlib.pyplot


def scores(results):
    """An evaluation -> [(name, per cent, low, high)] of every task, of all, and of emotions."""
    rows = []
    aqa = results.get("aqa", {})
    for name in [*aqa.get("correct", ()), "average"]:
        if aqa.get(name) is not None:
            rows.append((name, aqa[name], *aqa["intervals"][name]))
    if "ser" in results:
        rows.append(("SER\n(never trained)", results["ser"]["ua"], *results["ser"]["interval"]))
    return rows


def plot_run(folder):
    """A training run's folder (log.jsonl, results.json) -> run.png: the loss terms over the steps,
    accuracies before and after."""
    plt = pyplot()
    if plt is None:
        return
    log = read_log(folder)
    results = json.loads((Path(folder) / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name in ("sft", "top", "layer", "acoustic"):
        steps, values = curve(log, name)
        if values:
            left.plot(steps, np.maximum(values, TINY), label=name, linewidth=1.5)
    left.set(xlabel="step", ylabel="loss term, unweighted", yscale="log")
    left.set_title("what the student learns from")
    left.legend(frameon=False)

    for when, side, bar, ink in (
        ("before", -0.2, PALE, "black"),
        ("after", 0.2, BLUE, "white"),
    ):
        names, height, low, high = zip(*scores(results[when]))
        at = np.arange(len(names)) + side
        below = np.subtract(height, low)
        above = np.subtract(high, height)
        error = np.maximum(0, [below, above])
        right.bar(at, height, 0.38, color=bar, label=when, yerr=error, ecolor="#555", capsize=2)
        for x, y in zip(at, height):
            right.text(x, 2, f"{y:.0f}", ha="center", fontsize=8, color=ink)
    right.set(ylabel="accuracy (%)", title="hearing questions, before and after",
              ylim=(0, 112), yticks=range(0, 101, 20))          # room for the legend
    right.set_xticks(range(len(names)), names)
    right.legend(frameon=False, loc="upper center", ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(folder) / "run.png", dpi=130)
    plt.close(figure)


def plot_cord(folder):
    """A CORD run's folder (log.jsonl, before, eval-N and after.json) -> run.png: both views'
    accuracy over the steps, and what drove them."""
    plt = pyplot()
    if plt is None:
        return
    folder = Path(folder)
    log = read_log(folder)
    points = [(int(path.stem[5:]), path.stem) for path in folder.glob("eval-*.json")]
    points = sorted([(0, "before"), *points, (log[-1]["step"], "after")])
    steps = [step for step, _ in points]
    evaluations = [json.loads((folder / f"{name}.json").read_text()) for _, name in points]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for view, colour in (("text", ORANGE), ("audio", BLUE)):
        values = [found[f"{view}_accuracy"] for found in evaluations]
        low, high = zip(*(found["intervals"][view] for found in evaluations))
        left.plot(steps, values, "-o", color=colour, label=f"{view} view")
        left.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102))
    left.set_title("the same questions, read and heard")
    left.legend(frameon=False, loc="lower right")

    rewards = right.twinx()
    for axis, name, label, colour in (
        (right, "kl", "KL per token (nats)", BLUE),
        (rewards, "reward", "reward, mean of the groups", RED),
    ):
        draw(axis, log, name, colour)
        axis.set_ylabel(label, color=colour)
        axis.set_ylim(bottom=0)
    right.set(xlabel="step", title="what the student learns from")
    left.spines[["top", "right"]].set_visible(False)
    right.spines["top"].set_visible(False)
    figure.savefig(folder / "run.png", dpi=130)
    plt.close(figure)
