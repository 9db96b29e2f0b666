"""
What a run's folder says, without the code: all its curves in one picture, and how it goes in a page of text.

    python -m lab.report runs/source_layer      # in the middle of a run, after a kill, at the end

Both training scripts leave the same files, and this is all that is read:

    config.json                             every flag, the command, commit and versions, ranks, how many steps there will be
    log.jsonl                               a line a step; terms that are off are missing, and a step that was left out says why instead
    before, eval-NNNNNNN, after.json        evaluations: of both, or of neither with --no-eval
    skipped.jsonl                           training examples that could not be used
    step-NNNNNNN/checkpoint.json            what a checkpoint scored

A run may be read while it is being written, so that nothing here takes for granted that a file exists, that its last line is whole, or that a line has
a term. It trusts the log alone about how far the run is: an evaluation beyond its last step is one that a resumed run will make again.
"""
import argparse
import json
import math
import textwrap
import time
from pathlib import Path

import numpy as np

import data
import evaluate
from plumbing.files import writing
from plumbing.plots import BLUE, ORANGE, RED, TINY, curve, draw, read_lines

LOSSES = ("loss", "sft", "top", "layer", "acoustic", "token", "group")      # of both scripts, in the order of the colours
COLOURS = ("#333333", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")      # Paul Tol's: also for the colour-blind
RECENT = 50                 # steps that the time left is judged by
ROWS = 20                   # evaluations in the table


# ---------------------------------------------------------------------------------------------------------------------
# 1. What is there


def read_whole(path):
    """A JSON object that is written at once, or None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def scores(found):
    """An evaluation of either script -> {name: (value in per cent, its 95 % interval)}, tasks first, what they come to last."""
    if "text_accuracy" in found:
        views = {view: (found[f"{view}_accuracy"], found["intervals"][view]) for view in ("text", "audio")}
        return {**views, "gap": (found["gap"], found["intervals"]["gap"]), **scores(found.get("elsewhere", {}))}
    aqa, ser = found.get("aqa", {}), found.get("ser", {})
    named = {name: (aqa[name], aqa["intervals"][name]) for name in (*aqa.get("correct", ()), "average") if aqa.get(name) is not None}
    return named | ({"SER": (ser["ua"], ser["interval"])} if ser.get("ua") is not None else {})


def read_run(folder):
    """A training run's folder -> {"folder", "config", "log": a line a step, "done": the last step, "steps": of how many (None: nobody knows),
    "finished", "evaluations": [(step, scores)], "checkpoints": [(step, {name: score})], "unusable": lines of skipped.jsonl, "results" or None}.
    Raises data.DataError for a folder without a run."""
    folder = Path(folder)
    config = read_whole(folder / "config.json")
    if config is None or "command" not in config:                         # a model's folder has a config.json, too
        raise data.DataError(f"{folder}: holds no run, or one that has not begun to train (no config.json of one); give the folder that a "
                             "training script's --out named")
    lines = {line["step"]: line for line in read_lines(folder / "log.jsonl") if isinstance(line.get("step"), int)}
    log = [lines[step] for step in sorted(lines)]
    for line in log:                                                      # older logs of train_cord.py have a step's parts only
        if parts := [line[name] for name in ("seconds_rollout", "seconds_scoring", "seconds_update") if line.get(name) is not None]:
            line.setdefault("seconds", sum(parts))
    done, steps = log[-1]["step"] if log else 0, config.get("steps")
    finished = bool(log) and (config.get("dry_run", False) or steps is not None and done >= steps)
    files = [(0, "before")] + sorted((int(path.stem[5:]), path.stem) for path in folder.glob("eval-*.json")) + [(done, "after")] * finished
    found = [(step, read_whole(folder / f"{name}.json")) for step, name in files if step <= done]
    whole = [path for path in sorted(folder.glob("step-*")) if (path / "checkpoint.json").exists()]
    rated = [(int(path.name[5:]), (read_whole(path / "checkpoint.json") or {}).get("scores") or {}) for path in whole]
    unusable = {(line.get("step"), line.get("id")): line for line in read_lines(folder / "skipped.jsonl")}         # once, if a resumed run met it again
    return {"folder": folder, "config": config, "log": log, "done": done, "steps": steps, "finished": finished,
            "evaluations": [(step, scores(results)) for step, results in found if results], "checkpoints": rated,
            "unusable": list(unusable.values()), "results": read_whole(folder / "results.json") if finished else None}


# ---------------------------------------------------------------------------------------------------------------------
# 2. In words

def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def tenths(values):
    """Mean of the first tenth -> of the last."""
    n = max(1, len(values) // 10)
    return f"{np.mean(values[:n]):.4g} -> {np.mean(values[-n:]):.4g}"


def progress(run):
    return f"{run['done']:,} of {'?' if run['steps'] is None else format(run['steps'], ',')} steps"


def waited(line):
    """Does a line tell how long its step waited for data?"""
    return all(curve([line], name)[1] for name in ("seconds_waiting", "seconds")) and line["seconds"] > 0


def some(names, most=5):
    """A few of them, and how many more."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def host_growth(log):
    """-> (first, last GB, MB a thousand steps) of the host's memory, or None. A resumed run is a new process with less of it: what counts is the
    part since the last fall by a tenth, and the slope is that of its last nine tenths, since caches fill at first."""
    steps, values = curve(log, "host_gb")
    falls = [i for i in range(1, len(values)) if values[i] < 0.9 * values[i - 1]]
    steps, values = (x[falls[-1] if falls else 0:] for x in (steps, values))
    if not values:
        return None
    warm = len(values) // 10
    slope = np.polyfit(steps[warm:], values[warm:], 1)[0] if len(values) - warm > 2 else 0.0
    return values[0], values[-1], 1e6 * slope


def table(evaluations):
    """[(step, scores)] as lines, a row a step; of many every second, or third, ..., and the last."""
    evaluations = evaluations[::-math.ceil(len(evaluations) / ROWS)][::-1]
    names = list(dict.fromkeys(name for _, found in evaluations for name in found))
    wide = {name: max(8, len(name) + 2) for name in names}
    lines = [f"{'step':>12}" + "".join(f"{name:>{wide[name]}}" for name in names)]
    return lines + [f"{step:12,}" + "".join(f"{found[name][0]:{wide[name]}.1f}" if name in found else f"{'-':>{wide[name]}}" for name in names)
                    for step, found in evaluations]


def summary(run):
    """read_run's dict -> lines."""
    config, log, done, steps = (run[name] for name in ("config", "log", "done", "steps"))
    versions = [f"{name} {config[name]}" for name in ("commit", "python", "torch", "transformers") if config.get(name)]
    where = f"{config.get('ranks', 1)} x {config.get('gpu') or 'CPU'}"
    lines = [f"{run['folder']}: {config['command'].split(' ')[0]} on {where}, {', '.join(versions)}", config["command"]]

    def say(name, text):
        lines.append(f"{name:12}{text}")

    _, seconds = curve(log, "seconds")
    state = ", a dry run" if config.get("dry_run") else ", finished" if run["finished"] else ""
    if log and not run["finished"]:                                       # is it alive?
        state = f", the last one {duration(max(0, time.time() - (run['folder'] / 'log.jsonl').stat().st_mtime))} ago"
    say("done", progress(run) + state)
    if seconds:
        recent = float(np.mean(seconds[-RECENT:]))
        left = f", {duration(recent * (steps - done))} of them left at {recent:.3g} s a step" if steps and not run["finished"] else f", {recent:.3g} s a step"
        minutes = (run["results"] or {}).get("minutes")
        say("time", f"{duration(sum(seconds))} of steps" + (f", {duration(60 * minutes)} in all, the last start" if minutes else "") + left)
    for name in (*LOSSES, "kl", "entropy", "reward", "length", "grad_norm"):
        if any(values := curve(log, name)[1]):                            # train_cord.py logs 0 for what is off
            say(name, tenths(values) + "   (means of the first tenth and of the last)" * (name == "loss"))
    for name in ("tokens_per_second", "rollout_tokens_per_second"):
        if values := curve(log, name)[1]:
            say("speed", f"{np.median(values):,.0f} {name.replace('_', ' ')}, median")
    if waits := [line for line in log if waited(line)]:
        share = sum(line["seconds_waiting"] for line in waits) / sum(line["seconds"] for line in waits)
        say("waiting", f"{100 * share:.1f} % of the steps' time went by waiting for data")
    memory, host = curve(log, "memory_gb")[1], host_growth(log)
    if memory or host:
        parts = [f"{max(memory):.2f} GB of the {'GPU' if config.get('gpu') else 'process'} at the peak"] if memory else []
        parts += ["host {:.2f} -> {:.2f} GB since the last start, {:+.0f} MB a thousand steps".format(*host)] if host else []
        say("memory", "; ".join(parts))
    if left_out := [line for line in log if "skipped" in line]:
        ids = list(dict.fromkeys(i for line in left_out for i in line.get("ids") or ()))
        say("left out", f"{len(left_out)} of the steps: {some([line['step'] for line in left_out])}; the first: {left_out[0]['skipped']}")
        if ids:
            say("", f"their examples: {some(ids)}")
    if run["unusable"]:
        first = run["unusable"][0]
        ids = list(dict.fromkeys(line.get("id") for line in run["unusable"]))
        say("unusable", f"{len(ids)} of the training examples: {some(ids)}; the first: {first.get('fault')}")
    if run["checkpoints"]:
        rated = {}
        for step, found in run["checkpoints"]:
            for name, value in found.items():
                if isinstance(value, int | float) and value > rated.get(name, (-math.inf,))[0]:
                    rated[name] = (value, step)
        say("checkpoints", f"{some([step for step, _ in run['checkpoints']][::-1])}, the newest first"
            + "".join(f"; best {name} {value:.1f} at {step}" for name, (value, step) in rated.items()))
    else:
        say("checkpoints", "none yet")
    if run["evaluations"]:
        lines += table(run["evaluations"])
    else:
        say("evaluations", "none")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# 3. In pictures


def plain_ticks(axis, colour="black"):
    """0.2, not 2 x 10^-1, and on a log scale labels between the powers of ten, too."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 10 * low else (2, 5)))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.tick_params(axis="y", which="both", colors=colour)


def two_scales(axis, log, left, right):
    """Two terms in one panel, each with an axis in its own colour: (name, label, scale) each. A term that nobody logged has none."""
    for side, colour, (name, label, scale) in ((axis, BLUE, left), (None, RED, right)):
        if curve(log, name)[1]:
            side = side or axis.twinx()
            draw(side, log, name, colour, scale=scale)
            side.set_ylabel(label, color=colour)
            if scale != "log":
                side.set_ylim(bottom=0)
            plain_ticks(side, colour)


def plot_losses(axis, log):
    """The sum and its terms on a log scale; a term that changes its sign (the group's) has a linear one of its own."""
    terms = {name: values for name in LOSSES if any(values := curve(log, name)[1])}              # train_cord.py logs 0 for what is off
    colours, lines = dict(zip(LOSSES, COLOURS)), []
    odd = [name for name, values in terms.items() if min(values) < -TINY]                        # rounding is no sign
    even = [name for name in terms if name not in odd]
    for name in even:
        lines += draw(axis, log, name, colours[name], scale="log")
    if even:                                                              # L_ac starts at nothing, which is not to squeeze the rest
        axis.set_ylim(bottom=max(TINY, 0.5 * min(np.percentile(terms[name], 5) for name in even)))
        plain_ticks(axis)
    side = axis.twinx() if odd and even else axis
    for name in odd:
        lines += draw(side, log, name, colours[name], f"{name} (right)" if even else name)
        plain_ticks(side, colours[name])
    axis.set_ylabel("loss")
    if lines:
        axis.legend(handles=lines, frameon=False, fontsize=8, ncols=3)


def plot_scores(axis, evaluations):
    """Accuracies over the steps: thick with their intervals what counts, thin what it is made of. Of a CORD run not the tasks that only audio can ask."""
    names = list(dict.fromkeys(name for _, found in evaluations for name in found))
    main, thin = {"average": BLUE, "SER": RED}, [name for name in names if name not in ("average", "SER")]
    if "audio" in names:
        main, thin = {"text": ORANGE, "audio": BLUE}, [name for name in ("average", "SER") if name in names]
    colours = dict(zip(thin, [colour for colour in COLOURS if colour not in main.values()] * len(thin))) | {"SER": RED} | main
    for name in [name for name in (*thin, *main) if name in names]:
        steps, values, intervals = zip(*[(step, *found[name]) for step, found in evaluations if name in found])
        axis.plot(steps, values, "-o" if name in main else "--o", color=colours[name], linewidth=2 if name in main else 1, markersize=4, label=name)
        if name in main:
            axis.fill_between(steps, *np.transpose(intervals), color=colours[name], alpha=0.12, linewidth=0)
    axis.set(ylabel="per cent", ylim=(0, 102))
    if names:
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center")
    else:
        axis.text(0.5, 0.5, "no evaluation", transform=axis.transAxes, ha="center", color="#888888")


def plot_report(run):
    """read_run's dict -> report.png in the run's folder: losses, accuracies, what drives the run, speed and memory."""
    import matplotlib
    matplotlib.use("Agg")                                                 # no screen needed
    import matplotlib.pyplot as plt

    log, rollouts = run["log"], bool(curve(run["log"], "kl")[1] or curve(run["log"], "reward")[1])
    figure, panels = plt.subplot_mosaic([["loss"] * 2 + ["scores"] * 2 + ["signal"] * 2 if rollouts else ["loss"] * 3 + ["scores"] * 3,
                                         ["gradient"] * 2 + ["speed"] * 2 + ["memory"] * 2], figsize=(15, 7.5), constrained_layout=True)
    titles = {"loss": "losses: the sum, and its unweighted terms", "scores": "accuracy, with 95 % intervals", "signal": "what the student learns from",
              "gradient": "gradient norm before clipping, and learning rate", "speed": "speed", "memory": "memory"}
    plot_losses(panels["loss"], log)
    plot_scores(panels["scores"], run["evaluations"])
    if rollouts:
        two_scales(panels["signal"], log, ("kl", "KL per token (nats)", "linear"), ("reward", "reward, mean of the groups", "linear"))
    two_scales(panels["gradient"], log, ("grad_norm", "gradient norm", "log"), ("lr", "learning rate", "exact"))
    speed = "rollout_tokens_per_second" if rollouts else "tokens_per_second"
    waits = [{"step": line["step"], "waiting": 100 * line["seconds_waiting"] / line["seconds"]} for line in log if waited(line)]
    two_scales(panels["speed"], [*log, *waits], (speed, speed.replace("_", " "), "linear"), ("waiting", "% of a step waiting for data", "linear"))
    memory = panels["memory"]
    for name, label, colour in (("memory_gb", "GPU, peak" if run["config"].get("gpu") else "process, peak", BLUE), ("host_gb", "host, rank 0's process", RED)):
        steps, values = curve(log, name)
        if values:
            memory.plot(steps, values, color=colour, label=label, linewidth=1.5)
            memory.legend(frameon=False, fontsize=8, loc="lower right")
    memory.set(ylabel="GB", ylim=(0, 1.15 * memory.get_ylim()[1]))
    left_out = [line["step"] for line in log if "skipped" in line]
    for name, axis in panels.items():
        axis.set_title(titles[name], loc="left", fontsize=11)
        axis.set(xlabel="step", xlim=(-0.01 * max(1, run["done"]), 1.01 * max(1, run["done"])))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if left_out:                                                      # without any, an empty curve that is not clipped has no size
            axis.plot(left_out, [0] * len(left_out), "x", color="black", transform=axis.get_xaxis_transform(), clip_on=False, markersize=5)
    for axis in figure.axes:                                              # those on the right, too
        axis.spines[["top", "right"]].set_visible(False)
    note = f"; x: {len(left_out)} that were left out" if left_out else ""
    figure.suptitle(f"{textwrap.shorten(run['config']['command'], 150, placeholder=' ...')}   ({progress(run)}{note})", fontsize=10)
    figure.savefig(run["folder"] / "report.png", dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the folder that the script's --out named")
    args = parser.parse_args(argv)
    try:
        run = read_run(args.run)
    except data.DataError as error:
        raise SystemExit(f"lab.report: {error}") from None
    picture = run["folder"] / "report.png"
    with writing(picture):
        plot_report(run)
    print(*summary(run), sep="\n")
    if run["results"]:
        before = run["results"]["before"]
        after = run["results"]["after"]
        if "text_accuracy" in before:
            print(evaluate.report_gap(after, before))
        else:
            print(evaluate.report_change(before, after))
    print(picture)


if __name__ == "__main__":
    main()
