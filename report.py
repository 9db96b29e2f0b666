"""
What a run's folder says, without the code: the figure of a finished run.
"""
import json
from pathlib import Path

import numpy as np


def plot_run(folder):
    """A training run's folder (log.jsonl, results.json) -> run.png: the loss terms over the steps, accuracies before and after."""
    import matplotlib
    matplotlib.use("Agg")                                                 # no screen needed
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    results = json.loads((Path(folder) / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name in ("sft", "top", "layer", "acoustic"):
        values = [line[name] for line in log if name in line]
        if values:
            left.plot([line["step"] for line in log if name in line], np.maximum(values, 1e-6), label=name, linewidth=1.5)
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
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    points = [(0, "before")] + [(int(path.stem[5:]), path.stem) for path in folder.glob("eval-*.json")] + [(log[-1]["step"], "after")]
    scores = [(step, json.loads((folder / f"{name}.json").read_text())) for step, name in sorted(points)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for view, colour in (("text", "#d98c3f"), ("audio", "#2f5d9b")):
        values = [found[f"{view}_accuracy"] for _, found in scores]
        low, high = zip(*(found["intervals"][view] for _, found in scores))
        left.plot([step for step, _ in scores], values, "-o", color=colour, label=f"{view} view")
        left.fill_between([step for step, _ in scores], low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102), title="the same questions, read and heard")
    left.legend(frameon=False, loc="lower right")
    lines = []
    for name, label, axis, colour in (("kl", "KL per token (nats)", right, "#2f5d9b"), ("reward", "reward, mean of the groups", right.twinx(), "#b04a5a")):
        if values := [(line["step"], line[name]) for line in log if name in line]:
            steps, raw = zip(*values)
            width = max(1, len(raw) // 20)
            smooth = np.convolve(np.pad(raw, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
            axis.plot(steps, raw, color=colour, alpha=0.25, linewidth=0.8)
            lines += axis.plot(steps, smooth, color=colour, label=label)
        axis.set_ylabel(label, color=colour)
        axis.set_ylim(bottom=0)
    right.set(xlabel="step", title="what the student learns from")
    left.spines[["top", "right"]].set_visible(False)
    right.spines["top"].set_visible(False)
    figure.savefig(folder / "run.png", dpi=130)
    plt.close(figure)
