"""
run.png, the figure that a training script draws at its end. Without matplotlib there is none.
"""
import itertools
import json
from pathlib import Path

import numpy as np

from plumbing.files import read_json
from plumbing.tables import scores

# Paul Tol's colours, which the colour-blind can tell apart
COLOURS = (
    "#333333", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"
)
TINY = 1e-6                 # what a log scale shows of 0


def curve(log, name):
    """Where a term was logged -> (steps, values), lists without null and what is not finite."""
    steps = np.array([line["step"] for line in log])
    values = np.array([line.get(name) for line in log], dtype=float)        # None becomes nan
    there = np.isfinite(values)
    return steps[there].tolist(), values[there].tolist()


def smooth(values):
    """A moving average over a twentieth of them; beyond both ends the outermost are repeated."""
    n = max(1, len(values) // 20)
    longer = np.pad(values, (n // 2, (n - 1) // 2), mode="edge")
    return np.convolve(longer, np.ones(n) / n, mode="valid")


def draw(axis, log, name, colour, label=None):
    """A term over the steps, faint as it was and smoothed -> the lines for a legend."""
    steps, values = curve(log, name)
    if not values:
        return []
    if axis.get_yscale() == "log":
        # smoothed as logarithms, so that one step's jump does not lift all around it
        values = np.maximum(values, TINY)
        soft = np.exp(smooth(np.log(values)))
    else:
        soft = smooth(values)
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    return axis.plot(steps, soft, color=colour, linewidth=1.5, label=label or name)


def plot_run(folder, terms, unit, scale="linear"):
    """Draw run.png in a finished run's folder: terms of its log.jsonl over the steps, and the
    accuracies of before, eval-NNNNNNN and after.json."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no figure was drawn, because matplotlib cannot be imported ({error})")
        return
    folder = Path(folder)
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="step", ylabel=unit, yscale=scale, title="what the student learns from")
    for name, colour in zip(terms, COLOURS):
        draw(left, log, name, colour)

    # What it can do, with 95 % intervals
    files = {0: "before"}
    for path in sorted(folder.glob("eval-*.json")):
        files[int(path.stem[5:])] = path.stem
    files[log[-1]["step"]] = "after"
    steps = list(files)
    found = [scores(read_json(folder / f"{name}.json")) for name in files.values()]
    right.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102), title="what it can do")
    for name, colour in zip(found[0], itertools.cycle(COLOURS)):
        values, intervals = zip(*(evaluation[name] for evaluation in found))
        low, high = np.transpose(intervals)
        right.plot(steps, values, "-o", color=colour, label=name)
        right.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0)
    for axis in (left, right):
        axis.legend(frameon=False, ncols=2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "run.png", dpi=130)
