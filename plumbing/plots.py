"""
run.png, the figure that a training script draws at its end. Without matplotlib there is none.
"""
import json
from pathlib import Path

import numpy as np

from plumbing.files import read_json
from plumbing.tables import scores

BLUE, PALE, RED, ORANGE, GREY = "#2f5d9b", "#b8c4d6", "#b04a5a", "#d98c3f", "#777777"
TINY = 1e-6                 # what a log scale shows of 0


def curve(log, name):
    """Where a term was logged -> (steps, values), lists without null and what is not finite."""
    steps = np.array([line["step"] for line in log])
    values = np.array([line.get(name) for line in log], dtype=float)        # None becomes nan
    there = np.isfinite(values)
    return steps[there].tolist(), values[there].tolist()


def smooth(values):
    """The mean of the twentieth of all around each of them, of fewer at both ends."""
    window = np.ones(max(1, len(values) // 20))
    around = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / around


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


# -------------------------------------------------------------------------------------------------
# The two panels of a run, each drawn by a function of (axis, folder, log)

def two_panels(folder, left, right):
    plt = pyplot()
    if plt is None:
        return
    folder = Path(folder)
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, panel in zip(axes, (left, right)):
        panel(axis, folder, log)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "run.png", dpi=130)
    plt.close(figure)


def plot_run(folder):
    """A training run's folder (log.jsonl, results.json) -> run.png: the loss terms over the steps,
    accuracies before and after."""
    two_panels(folder, draw_terms, draw_scores)


def draw_terms(axis, folder, log):
    axis.set(xlabel="step", ylabel="loss term, unweighted", yscale="log")
    axis.set_title("what the student learns from")
    for name, colour in (("sft", GREY), ("top", RED), ("layer", BLUE), ("acoustic", ORANGE)):
        draw(axis, log, name, colour)
    axis.legend(frameon=False)


def draw_scores(axis, folder, log):
    results = read_json(folder / "results.json")
    for when, side, colour in (("before", -0.2, PALE), ("after", 0.2, BLUE)):
        names = list(scores(results[when]))
        heights, intervals = zip(*scores(results[when]).values())
        low, high = np.transpose(intervals)
        error = np.maximum(0, [heights - low, high - heights])
        places = np.arange(len(names)) + side
        bars = axis.bar(places, heights, 0.38, color=colour, label=when, yerr=error, capsize=2)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set(ylabel="accuracy (%)", title="hearing questions, before and after", ylim=(0, 125))
    axis.set_xticks(range(len(names)), names)
    axis.legend(frameon=False, loc="upper center", ncols=2)


def plot_cord(folder):
    """A CORD run's folder (log.jsonl, before, eval-N and after.json) -> run.png: both views'
    accuracy over the steps, and what drove them."""
    two_panels(folder, draw_views, draw_drive)


def draw_views(axis, folder, log):
    names = {0: "before"}
    for path in sorted(folder.glob("eval-*.json")):
        names[int(path.stem[5:])] = path.stem
    names[log[-1]["step"]] = "after"
    found = [read_json(folder / f"{name}.json") for name in names.values()]
    for view, colour in (("text", ORANGE), ("audio", BLUE)):
        values = [evaluation[f"{view}_accuracy"] for evaluation in found]
        low, high = np.transpose([evaluation["intervals"][view] for evaluation in found])
        axis.plot(list(names), values, "-o", color=colour, label=f"{view} view")
        axis.fill_between(list(names), low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102))
    axis.set_title("the same questions, read and heard")
    axis.legend(frameon=False, loc="lower right")


def draw_drive(axis, folder, log):
    axis.set(xlabel="step", title="what the student learns from")
    for side, name, label, colour in (
        (axis, "kl", "KL per token (nats)", BLUE),
        (axis.twinx(), "reward", "reward, mean of the groups", RED),
    ):
        draw(side, log, name, colour)
        side.set_ylabel(label, color=colour)
        side.set_ylim(bottom=0)
