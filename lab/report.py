"""
What a run's folder says: all its curves in one picture, and how it goes in a page of text.

    python -m lab.report runs/source_layer      # in the middle of a run, after a kill, at the end

Both training scripts leave the same files, and this is all that is read:

    config.json                         every flag, the command, versions, ranks, number of steps
    log.jsonl                           a line a step; one that was left out says why instead
    before, eval-NNNNNNN, after.json    evaluations; none with --no-eval
    step-NNNNNNN/checkpoint.json        what a checkpoint scored

A run may be read while it is being written: any file but config.json may be missing, the last line
of the log may be cut, and any line may lack a term. The log alone says how far the run is: an
evaluation beyond its last step is one that a resumed run will make again.
"""
import argparse
import itertools
import json
import math
import textwrap
import time
from pathlib import Path

import numpy as np

import evaluate
from plumbing import tables
from plumbing.files import complete, read_json, writing
from plumbing.plots import COLOURS, TINY, curve, draw

LOSSES = ("loss", "sft", "top", "layer", "acoustic", "token", "group")      # of both scripts
BLUE, RED = "#2f5d9b", "#b04a5a"
RECENT = 50                 # steps that the time left is judged by
ROWS = 20                   # evaluations in the table


# -------------------------------------------------------------------------------------------------
# 1. What is there

def read_log(path):
    """The lines of a JSONL file, as dicts; none without the file. The last may be cut, by a kill:
    it has no end."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def scores(found):
    """An evaluation of either script -> {name: (value in per cent, its 95 % interval)}."""
    named = tables.scores(found)
    if "gap" in found:
        named["gap"] = (found["gap"], found["intervals"]["gap"])
        named |= tables.scores(found.get("elsewhere", {}))
    return named


def read_run(folder):
    """A training run's folder -> {"folder", "config", "log": a line a step, "done": the last step,
    "steps": of how many (None: nobody knows), "finished", "evaluations": [(step, scores)],
    "checkpoints": [step], "results" or None}. Raises SystemExit for a folder without a run."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None or "command" not in config:           # a model's folder has one, too
        raise SystemExit(f"{folder}: holds no run, or one that has not begun to train (no "
                         "config.json of one); give the folder that a training script's --out "
                         "named")
    log = read_log(folder / "log.jsonl")
    for line in log:
        if line.get("seconds") and "seconds_waiting" in line:
            line["waiting"] = 100 * line["seconds_waiting"] / line["seconds"]
    done = log[-1]["step"] if log else 0
    steps = config.get("steps")
    finished = bool(log) and (config.get("dry_run", False) or done == steps)
    files = {0: "before"}
    for path in sorted(folder.glob("eval-*.json")):
        files[int(path.stem[5:])] = path.stem
    if finished:
        files[done] = "after"
    found = {step: read_json(folder / f"{name}.json") for step, name in files.items()}
    return {
        "folder": folder,
        "config": config,
        "log": log,
        "done": done,
        "steps": steps,
        "finished": finished,
        "evaluations": [
            (step, scores(results)) for step, results in found.items() if results and step <= done
        ],
        "checkpoints": [int(path.name[5:]) for path in complete(folder)],
        "results": read_json(folder / "results.json") if finished else None,
    }


# -------------------------------------------------------------------------------------------------
# 2. In words

def duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def tenths(values):
    """Mean of the first tenth -> of the last."""
    n = max(1, len(values) // 10)
    return f"{np.mean(values[:n]):.4g} -> {np.mean(values[-n:]):.4g}"


def progress(run):
    return f"{run['done']:,} of {'?' if run['steps'] is None else format(run['steps'], ',')} steps"


def some(names):
    """A few of them, and how many more."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more


def host_growth(log):
    """-> (first, last GB, MB a thousand steps) of the host's memory, or None. A resumed run is a
    new process with less: only what follows the last fall by a tenth counts. Caches fill at
    first: the slope is that of the last nine tenths."""
    steps, values = curve(log, "host_gb")
    if not values:
        return None
    starts = [0] + [i for i in range(1, len(values)) if values[i] < 0.9 * values[i - 1]]
    steps = steps[starts[-1]:]
    values = values[starts[-1]:]
    warm = len(values) // 10
    slope = np.polyfit(steps[warm:], values[warm:], 1)[0] if len(values) - warm > 2 else 0.0
    return values[0], values[-1], 1e6 * slope


def table(evaluations):
    """[(step, scores)] as lines, a row a step; of many every second, or third, ..., to the last."""
    evaluations = evaluations[::-math.ceil(len(evaluations) / ROWS)][::-1]
    names = list(dict.fromkeys(name for _, found in evaluations for name in found))
    rows = [["step", *names]]
    for step, found in evaluations:
        cells = [f"{found[name][0]:.1f}" if name in found else "-" for name in names]
        rows.append([f"{step:,}", *cells])
    wide = max(12, *(len(name) + 2 for name in names))
    return ["".join(f"{cell:>{wide}}" for cell in row) for row in rows]


def state_of(run):
    if run["config"].get("dry_run"):
        return f"{progress(run)}, a dry run"
    if run["finished"]:
        return f"{progress(run)}, finished"
    if not run["log"]:
        return progress(run)
    age = time.time() - (run["folder"] / "log.jsonl").stat().st_mtime       # is it alive?
    return f"{progress(run)}, the last one {duration(age)} ago"


def time_of(run, seconds):
    recent = np.mean(seconds[-RECENT:])
    text = f"{duration(sum(seconds))} of steps, "
    if run["results"]:
        text += f"{duration(60 * run['results']['minutes'])} in all, the last start, "
    elif run["steps"]:
        text += f"{duration(recent * (run['steps'] - run['done']))} of them left at "
    return f"{text}{recent:.3g} s a step"


def summary(run):
    """read_run's dict -> lines."""
    config = run["config"]
    log = run["log"]
    names = ("commit", "torch", "transformers")
    versions = ", ".join(f"{name} {config[name]}" for name in names if config.get(name))
    where = f"{config['ranks']} x {config['gpu'] or 'CPU'}"
    script = config["command"].split(" ")[0]
    lines = [f"{run['folder']}: {script} on {where}, {versions}", config["command"]]

    def say(name, text):
        lines.append(f"{name:12}{text}")

    # How far, how long, and what the terms came to
    say("done", state_of(run))
    _, seconds = curve(log, "seconds")
    if seconds:
        say("time", time_of(run, seconds))
    for name in (*LOSSES, "kl", "entropy", "reward", "length", "grad_norm"):
        _, values = curve(log, name)
        if any(values):                                     # train_cord.py logs 0 for what is off
            note = "   (means of the first tenth and of the last)" if name == "loss" else ""
            say(name, tenths(values) + note)

    # Speed and memory
    for name in ("tokens_per_second", "rollout_tokens_per_second"):
        _, values = curve(log, name)
        if values:
            say("speed", f"{np.median(values):,.0f} {name.replace('_', ' ')}, median")
    waits = [line for line in log if "waiting" in line]
    if waits:
        waiting = sum(line["seconds_waiting"] for line in waits)
        share = waiting / sum(line["seconds"] for line in waits)
        say("waiting", f"{100 * share:.1f} % of the steps' time went by waiting for data")
    _, memory = curve(log, "memory_gb")
    if memory:
        owner = "GPU" if config["gpu"] else "process"
        say("memory", f"{max(memory):.2f} GB of the {owner} at the peak")
    host = host_growth(log)
    if host:
        say("host", "{:.2f} -> {:.2f} GB since the last start, {:+.0f} MB a thousand steps"
            .format(*host))

    # What went wrong, and what was saved
    left_out = [line for line in log if "skipped" in line]
    if left_out:
        ids = list(dict.fromkeys(i for line in left_out for i in line.get("ids") or ()))
        say("left out", f"{len(left_out)} of the steps: {some([x['step'] for x in left_out])}; the "
                        f"first: {left_out[0]['skipped']}")
        if ids:
            say("", f"their examples: {some(ids)}")
    newest = f"{some(run['checkpoints'][::-1])}, the newest first"
    say("checkpoints", newest if run["checkpoints"] else "none yet")
    if run["evaluations"]:
        return lines + table(run["evaluations"])
    say("evaluations", "none")
    return lines


# -------------------------------------------------------------------------------------------------
# 3. In pictures

def two_scales(axis, log, left, right):
    """Two terms in one panel, (name, label, scale) each, each with an axis in its own colour. A
    term that nobody logged has none."""
    for side, colour, (name, label, scale) in ((axis, BLUE, left), (None, RED, right)):
        if not curve(log, name)[1]:
            continue
        side = side or axis.twinx()
        side.set_yscale(scale)
        draw(side, log, name, colour)
        side.set_ylabel(label, color=colour)
        side.tick_params(axis="y", which="both", colors=colour)
        if scale != "log":
            side.set_ylim(bottom=0)


def plot_losses(axis, log):
    """The sum and its terms on a log scale; a term that changes its sign (the group's) has a linear
    one of its own."""
    terms = {name: curve(log, name)[1] for name in LOSSES}
    terms = {name: values for name, values in terms.items() if any(values)}     # 0: it is off
    colours = dict(zip(LOSSES, COLOURS))
    signed = [name for name in terms if min(terms[name]) < -TINY]               # not by rounding
    positive = [name for name in terms if name not in signed]
    lines = []
    axis.set_yscale("log" if positive else "linear")
    for name in positive:
        lines += draw(axis, log, name, colours[name])
    if positive:
        # L_ac starts at nothing, which is not to squeeze the rest
        low = min(np.percentile(terms[name], 5) for name in positive)
        axis.set_ylim(bottom=max(TINY, 0.5 * low))
    side = axis.twinx() if signed and positive else axis
    for name in signed:
        label = f"{name} (right)" if positive else name
        lines += draw(side, log, name, colours[name], label)
        side.tick_params(axis="y", colors=colours[name])
    axis.set_ylabel("loss")
    axis.legend(handles=lines, frameon=False, fontsize=8, ncols=3)


def plot_scores(axis, evaluations):
    """Accuracies over the steps, with their intervals. Of a CORD run not the tasks that only audio
    can ask."""
    names = list(dict.fromkeys(name for _, found in evaluations for name in found))
    if "text" in names:
        names = [name for name in ("text", "audio", "average", "SER") if name in names]
    for name, colour in zip(names, itertools.cycle(COLOURS)):
        rows = [(step, *found[name]) for step, found in evaluations if name in found]
        steps, values, intervals = zip(*rows)
        low, high = np.transpose(intervals)
        axis.plot(steps, values, "-o", label=name, color=colour, markersize=4)
        axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set(ylabel="per cent", ylim=(0, 102))
    if names:
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center")


def plot_memory(axis, log, gpu):
    for name, label, colour in (
        ("memory_gb", "GPU, peak" if gpu else "process, peak", BLUE),
        ("host_gb", "host, rank 0's process", RED),
    ):
        axis.plot(*curve(log, name), color=colour, label=label, linewidth=1.5)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set_ylabel("GB")
    axis.set_ylim(bottom=0)


TITLES = {
    "loss": "losses: the sum, and its unweighted terms",
    "scores": "accuracy, with 95 % intervals",
    "signal": "what the student learns from",
    "gradient": "gradient norm before clipping, and learning rate",
    "speed": "speed",
    "memory": "memory",
}


def plot_report(run):
    """read_run's dict -> Figure."""
    from matplotlib.figure import Figure

    log = run["log"]
    rollouts = bool(curve(log, "kl")[1] or curve(log, "reward")[1])
    upper = 3 * ["loss"] + 3 * ["scores"]
    if rollouts:
        upper = 2 * ["loss"] + 2 * ["scores"] + 2 * ["signal"]
    lower = 2 * ["gradient"] + 2 * ["speed"] + 2 * ["memory"]
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    panels = figure.subplot_mosaic([upper, lower])

    plot_losses(panels["loss"], log)
    plot_scores(panels["scores"], run["evaluations"])
    if rollouts:
        two_scales(panels["signal"], log, ("kl", "KL per token (nats)", "linear"),
                   ("reward", "reward, mean of the groups", "linear"))
    two_scales(panels["gradient"], log, ("grad_norm", "gradient norm", "log"),
               ("lr", "learning rate", "linear"))
    speed = "rollout_tokens_per_second" if rollouts else "tokens_per_second"
    two_scales(panels["speed"], log, (speed, speed.replace("_", " "), "linear"),
               ("waiting", "% of a step waiting for data", "linear"))
    plot_memory(panels["memory"], log, run["config"]["gpu"])

    left_out = [line["step"] for line in log if "skipped" in line]
    end = max(1, run["done"])
    for name, axis in panels.items():
        axis.set_title(TITLES[name], loc="left", fontsize=11)
        axis.set(xlabel="step", xlim=(-0.01 * end, 1.01 * end))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if left_out:                        # an empty curve that is not clipped has no size
            how = {"transform": axis.get_xaxis_transform(), "clip_on": False, "markersize": 5}
            axis.plot(left_out, [0] * len(left_out), "x", color="black", **how)
    for axis in figure.axes:                # those on the right, too
        axis.spines[["top", "right"]].set_visible(False)
    note = f"; x: {len(left_out)} that were left out" if left_out else ""
    command = textwrap.shorten(run["config"]["command"], 150, placeholder=" ...")
    figure.suptitle(f"{command}   ({progress(run)}{note})", fontsize=10)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the folder that the script's --out named")
    args = parser.parse_args(argv)
    run = read_run(args.run)
    picture = run["folder"] / "report.png"
    with writing(picture):
        plot_report(run).savefig(picture, dpi=110)
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
