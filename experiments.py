"""
Every number in README's tables, each by one command: paper A's Table 1 in miniature, and the questions that the paper leaves open.

    python experiments.py table                     # the six rows of Table 1, three seeds each: 35 minutes on two cores
    python experiments.py alpha-ac skip             # some of the others, by name
    python experiments.py all --seeds 0             # everything, one seed
    python experiments.py table --dry-run           # two steps of every run, and a small evaluation

A row is a set of flags of train_source_layer.py and nothing else. A seed is another world (other clips, questions, speakers' sentences)
and another order of training; the two pretrained models are the same. What has run is not run again (runs/experiments/ holds it);
rows that several tables share run once.

An experiment leaves runs/experiments/NAME.json with every answer's verdict and, where a picture helps, NAME.png; with --publish both go to
figures/, from where tests/test_experiments.py computes README's numbers again. Differences are paired, question by question, over all seeds
together, with 95 % bootstrap intervals: they say how far the questions decide, not how far another three seeds might; so the seeds' own values
stand beside them.
"""
import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import common
import evaluate
import mini_world
import train_source_layer

HERE = Path(__file__).parent
RUNS = Path("runs") / "experiments"
STRONGER = RUNS / "stronger"
BASELINE = "baseline"           # no run of its own: what every run's evaluation before training says
FULL = "layer-wise + acoustic KD + SFT"
NO_ACOUSTIC = "layer-wise text KD + SFT"

# Table 1 of the paper: AQA (MMAU test-mini, accuracy) and SER (IEMOCAP session 5, unweighted accuracy), per cent
PAPER = {BASELINE: (70.40, 58.89), "SFT only": (69.80, 51.93), "top-layer text KD + SFT": (70.30, 54.13),
         "skip-layer text KD (1 in 7) + SFT": (70.70, 53.37), NO_ACOUSTIC: (72.50, 49.65), FULL: (73.30, 56.03)}

# name -> what it asks; its rows, label -> flags; the row that the others are compared with; columns beside AQA and SER
EXPERIMENTS = {
    "table": {
        "asks": "Table 1: what does each part bring?",
        "rows": {"SFT only": "--text-kd none --no-acoustic-kd", "top-layer text KD + SFT": "--text-kd top --no-acoustic-kd",
                 "skip-layer text KD (1 in 7) + SFT": "--text-kd skip:7 --no-acoustic-kd", NO_ACOUSTIC: "--text-kd layer --no-acoustic-kd",
                 FULL: ""},
        "against": BASELINE, "columns": ["minutes"]},
    "alpha-ac": {
        "asks": "How much acoustic distillation? Drift: the divergence of hidden states at audio tokens, mean of the last 20 steps",
        "rows": {"0": "--alpha-ac 0", "0.01": "--alpha-ac 0.01", "0.05": "--alpha-ac 0.05", "0.1": "--alpha-ac 0.1", "0.5": "--alpha-ac 0.5",
                 "4 (default)": "", "16": "--alpha-ac 16"},
        "against": "4 (default)", "columns": ["drift"]},
    "alpha-layer": {
        "asks": "How much layer-wise distillation?",
        "rows": {"0 (top-layer)": "--text-kd top", "0.05": "--alpha-layer 0.05", "0.4 (default)": "", "4": "--alpha-layer 4", "16": "--alpha-layer 16"},
        "against": "0.4 (default)", "columns": []},
    "skip": {
        "asks": "How many layers?",
        "rows": {"every layer": "", "1 in 2": "--text-kd skip:2", "1 in 3": "--text-kd skip:3", "1 in 7": "--text-kd skip:7"},
        "against": "every layer", "columns": ["seconds", "memory"]},
    "divergence": {
        "asks": "JSD or forward KL at the top?",
        "rows": {"JSD": "", "forward KL": "--divergence kl"},
        "against": "JSD", "columns": ["stray"]},
    "hidden": {
        "asks": "Which divergence between hidden states? (A small difference of mean square e costs e in mse, e/2 in cosine, e/8 in JSD)",
        "rows": {"JSD": "", "JSD, raw": "--hidden-divergence raw-jsd", "mse": "--hidden-divergence mse", "cosine": "--hidden-divergence cosine",
                 "mse, as strong": "--hidden-divergence mse --alpha-ac 0.5 --alpha-layer 0.05",
                 "cosine, as strong": "--hidden-divergence cosine --alpha-ac 1 --alpha-layer 0.1"},
        "against": "JSD", "columns": []},
    "hidden-seeds": {
        "asks": "JSD or mse between hidden states, at equal strength and with three seeds?",
        "rows": {"JSD": "", "mse, as strong": "--hidden-divergence mse --alpha-ac 0.5 --alpha-layer 0.05"},
        "against": "JSD", "columns": ["drift"]},
    "acoustic-teacher": {
        "asks": "Is a stronger acoustic teacher better than the snapshot? (This one also learnt from 4,000 more clips, emotion among them)",
        "rows": {"snapshot": "", "stronger": "--acoustic-teacher {stronger}"},
        "against": "snapshot", "columns": []},
    "which-layers": {
        "asks": "Which layers carry the gain?",
        "rows": {"all 7": "", "1, 2": "--layers 1 2", "3, 4, 5": "--layers 3 4 5", "6, 7": "--layers 6 7", "none (top-layer)": "--text-kd top"},
        "against": "all 7", "columns": []},
    "descriptions": {
        "asks": "How good must the descriptions be?",
        "rows": {"true": "", "textualize.py's": "--data {described} --eval-data {test}",
                 "a quarter of the words corrupted": "--corrupt-descriptions 0.25", "half": "--corrupt-descriptions 0.5", "all": "--corrupt-descriptions 1"},
        "against": "true", "columns": []},
    "keep": {
        "asks": "Can SER be kept without an acoustic teacher?",
        "rows": {"with it (default)": "", "without": "--text-kd layer --no-acoustic-kd",
                 "without, audio tower frozen": "--no-acoustic-kd --train decoder",
                 "tower and lower half frozen": "--no-acoustic-kd --train decoder --lower-lr 0",
                 "tower frozen, lower half at a tenth of the rate": "--no-acoustic-kd --train decoder --lower-lr 0.1"},
        "against": "with it (default)", "columns": []},
}


# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Running

def folder_of(flags, seed):
    """One folder per set of flags and seed, named after them, so that tables share their rows' runs."""
    return RUNS / f"{re.sub(r'[^a-z0-9.]+', '-', flags.lower()).strip('-') or 'default'}-seed{seed}"


def call(log, threads, script, *arguments):
    """Run a script of ours with its output in a file. Raises SystemExit with the last line of what it said."""
    command = [sys.executable, "-W", "ignore", str(HERE / script), *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise SystemExit(f"{script} {shlex.join(map(str, arguments))} failed: {said[-1]}; all of its output is in {log}")


def arguments_of(flags, seed, dry_run=False):
    """A row's flags as train_source_layer.py takes them: what stands in braces is named, seed and folder are added."""
    named = flags.format(stronger=newest(STRONGER), described=described(seed, dry_run), test=world("test", seed, dry_run))
    return [*shlex.split(named), "--seed", str(seed), "--out", str(folder_of(flags, seed))] + ["--dry-run"] * dry_run


def results_of(flags, seed, dry_run=False):
    """A finished run's results.json, or None. Raises SystemExit if the folder holds a run with other settings than these flags now mean."""
    folder = folder_of(flags, seed)
    if not (folder / "results.json").exists():
        return None
    had, wants = json.loads((folder / "config.json").read_text()), vars(train_source_layer.parse_flags(arguments_of(flags, seed, dry_run)))
    if other := [f"{name} {had.get(name)}, not {value}" for name, value in wants.items() if name not in ("out", "resume") and had.get(name) != value]:
        raise SystemExit(f"{folder} holds a run with {'; '.join(other)}: move it away, and this one will be run again")
    return json.loads((folder / "results.json").read_text())


def run(flags, seed, *, threads, dry_run, look):
    """Train one row with one seed unless its results are there; look: also at its layers and vocabulary (evaluate.py --task layers)."""
    folder = folder_of(flags, seed)
    if not results_of(flags, seed, dry_run):
        call(folder / "run.txt", threads, "train_source_layer.py", *arguments_of(flags, seed, dry_run), *["--resume", "auto"] * (not dry_run))
        if not results_of(flags, seed, dry_run):        # Ctrl-C reaches the run first, which saves and stops as it should
            raise SystemExit(f"{folder} was interrupted; the same command goes on with it")
    if look and not (folder / "layers.json").exists():
        call(folder / "layers.txt", threads, "evaluate.py", "--task", "layers", "--model", newest(folder), "--data", world("test", seed, dry_run),
             "--out", folder, *["--limit", "8"] * dry_run)


def world(split, seed, dry_run):
    """The manifest that train_source_layer.py takes by default, or a small one; made unless it is there."""
    return mini_world.build(split, seed=seed, per_task={"train": 16, "test": 8}[split] if dry_run else {"train": None, "test": 300}[split])


def described(seed, dry_run):
    """What textualize.py makes of it."""
    path = world("train", seed, dry_run)
    return path.with_name(f"{path.stem}-described.jsonl")


def newest(folder):
    return max(folder.glob("step-*"), default="missing")


def prepare(flags, seeds, threads, dry_run):
    """What rows name in braces: a stronger acoustic teacher, textualize.py's descriptions."""
    if any("{stronger}" in f for f in flags) and not (STRONGER / "results.json").exists():
        clips = mini_world.build("pretrain", per_task=8 if dry_run else 1000, seed=9)
        call(STRONGER / "run.txt", threads, "train_source_layer.py", "--text-kd", "none", "--no-acoustic-kd", "--epochs", 1, "--data", clips,
             "--eval-data", world("test", 0, dry_run), "--out", STRONGER, *["--dry-run"] * dry_run)
    for seed in seeds if any("{described}" in f for f in flags) else []:
        call(RUNS / f"textualize-seed{seed}.txt", threads, "textualize.py", "--check", "--data", world("train", seed, dry_run))


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Collecting: verdicts as strings of 0 and 1, one character a question, in the order of the questions' ids

def bits(correct):
    return {group: "".join(str(int(hits[i])) for i in sorted(hits)) for group, hits in correct.items()}


def verdicts(results):
    return {"aqa": bits(results["aqa"]["correct"]), "ser": bits(results["ser"]["correct"])}


def collect(name, seeds):
    """The runs' folders -> {"asks", "rows": {row: {"flags", "runs": {seed: {"aqa": {task: bits}, "ser": {emotion: bits}, "minutes", ...}}}}}."""
    experiment = EXPERIMENTS[name]
    rows = {BASELINE: {"flags": None, "runs": {}}} if experiment["against"] == BASELINE else {}
    for row, flags in experiment["rows"].items():
        rows[row] = {"flags": flags, "runs": {}}
        for seed in map(str, seeds):
            folder, results = folder_of(flags, seed), results_of(flags, seed)
            if not results:
                raise SystemExit(f"{folder} holds no finished run; leave --collect out, or choose other --seeds")
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            measured = {"minutes": results["minutes"], "seconds": statistics.median(line["seconds"] for line in log),
                        "memory": max(line["memory_gb"] for line in log)}
            if "acoustic" in log[-1]:
                measured["drift"] = statistics.mean(line["acoustic"] for line in log[-20:])
            if (folder / "layers.json").exists():
                measured["stray"] = json.loads((folder / "layers.json").read_text())["vocabulary"]["stray"]
            rows[row]["runs"][seed] = {**verdicts(results["after"]), **{k: round(v, 4) for k, v in measured.items()}}
            if BASELINE in rows:
                rows[BASELINE]["runs"][seed] = verdicts(results["before"])
    return {"asks": experiment["asks"], "against": experiment["against"], "columns": experiment["columns"], "rows": rows}


def accuracy(run, part):
    """AQA: accuracy over questions; SER: mean of the emotions' recalls; a task by its name. Per cent."""
    groups = run["aqa"] if part == "aqa" else run["ser"] if part == "ser" else {part: run["aqa"][part]}
    shares = [sum(map(int, g)) / len(g) for g in (["".join(groups.values())] if part != "ser" else groups.values())]
    return 100 * sum(shares) / len(shares)


def difference(row, other, part):
    """(points, [low, high]) of one row over another, paired by question over the seeds that both have; SER within each seed's emotions."""
    pairs = [(a, b, f"{seed} {group}") for seed in row["runs"].keys() & other["runs"].keys() for group in row["runs"][seed][part]
             for a, b in zip(row["runs"][seed][part][group], other["runs"][seed][part][group], strict=True)]
    mine, theirs, groups = zip(*sorted(pairs, key=lambda pair: pair[2]))
    return evaluate.paired_bootstrap([int(a) for a in mine], [int(b) for b in theirs], labels=groups if part == "ser" else None)


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Tables and figures

COLUMNS = {"minutes": ("minutes", "{:.1f}"), "drift": ("drift", "{:.4f}"), "seconds": ("s a step", "{:.2f}"), "memory": ("GB", "{:.2f}"),
           "stray": ("stray mass", "{:.2e}")}


def mean(row, part):
    return statistics.mean(accuracy(run, part) for run in row["runs"].values())


def markdown(name, found):
    """An experiment as README's table."""
    paper, against = name == "table", found["against"]
    heads = [name.replace("-", " "), *["paper: AQA", "SER", "here: sound", "music", "speech"] * paper, "AQA", f"over {against}", "SER",
             f"over {against}", *[COLUMNS[c][0] for c in found["columns"]], "flags"]
    lines = [heads, ["---"] * len(heads)]
    for label, row in found["rows"].items():
        cells = [label, *([f"{x:.2f}" for x in PAPER[label]] + [f"{mean(row, task):.1f}" for task in evaluate.TASKS] if paper else [])]
        for part in ("aqa", "ser"):
            each = [accuracy(row["runs"][seed], part) for seed in sorted(row["runs"])]
            cells.append(f"{statistics.mean(each):.1f}" + (f" ({', '.join(f'{x:.1f}' for x in each)})" if len(each) > 1 else ""))
            if label == against:
                cells.append("")
            else:
                points, (low, high) = difference(row, found["rows"][against], part)
                cells.append(f"{points:+.1f} [{low:+.1f}, {high:+.1f}]")
        for column in found["columns"]:
            values = [run[column] for run in row["runs"].values() if column in run]
            cells.append(COLUMNS[column][1].format(statistics.mean(values)) if values else "")
        cells.append("" if row["flags"] is None else f"`{row['flags']}`" if row["flags"] else "(none)")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plot_table(found, path):
    """AQA against SER, the paper's six rows beside ours, small dots for the seeds; the arrow is what acoustic KD does."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(PAPER)
    ours = {row: (mean(found["rows"][row], "aqa"), mean(found["rows"][row], "ser")) for row in rows}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    colours = ["#555555", "#d98c3f", "#c9b037", "#5fa55a", "#b04a5a", "#2f5d9b"]
    for axis, points, title in ((axes[0], PAPER, "paper: Qwen2.5-Omni-7B, MMAU and IEMOCAP"), (axes[1], ours, "here: the mini world")):
        for row, colour in zip(rows, colours):
            axis.scatter(*points[row], s=110, color=colour, label=row, zorder=3, marker="s" if row == BASELINE else "o")
            if points is ours:
                each = [(accuracy(run, "aqa"), accuracy(run, "ser")) for run in found["rows"][row]["runs"].values()]
                axis.scatter(*zip(*each), s=22, color=colour, alpha=0.6, zorder=2)
        axis.annotate("", points[FULL], points[NO_ACOUSTIC], arrowprops=dict(arrowstyle="->", color="#2f5d9b", lw=1.5, shrinkA=8, shrinkB=8))
        axis.set(xlabel="AQA: accuracy (%)", ylabel="SER: unweighted accuracy (%)", title=title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_alpha(found, path):
    """Left: what each alpha_ac gives, SER against AQA. Right: how far the hidden states at audio tokens have moved."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [label.split()[0] for label in found["rows"]]
    rows = list(found["rows"].values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    points = [(mean(row, "aqa"), mean(row, "ser")) for row in rows]
    left.plot(*zip(*points), "-o", color="#2f5d9b")
    for label, point in zip(labels, points):
        left.annotate(label, point, textcoords="offset points", xytext=(7, 4))
    left.set(xlabel="AQA: accuracy (%)", ylabel="SER: unweighted accuracy (%)", title="alpha_ac along the line")
    right.bar(labels, [statistics.mean(run["drift"] for run in row["runs"].values()) for row in rows], color="#b8c4d6")
    right.set(xlabel="alpha_ac", ylabel="divergence from the snapshot", title="drift of hidden states at audio tokens")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PLOTS = {"table": plot_table, "alpha-ac": plot_alpha}


# ---------------------------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; each takes its share of the cores")
    parser.add_argument("--dry-run", action="store_true", help="every command with --dry-run, in a folder of its own; no tables")
    parser.add_argument("--publish", action="store_true", help="write tables and figures to figures/, which README shows; else to runs/experiments")
    parser.add_argument("--collect", action="store_true", help="no training: tables and figures from the runs that are there")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    names = list(EXPERIMENTS) if "all" in args.names else args.names
    if args.dry_run:
        global RUNS, STRONGER
        RUNS, STRONGER = Path("runs") / "experiments-dry", Path("runs") / "experiments-dry" / "stronger"
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    wanted = {}                                         # (flags, seed) -> is its vocabulary looked at too?
    for seed in args.seeds:
        for name in names:
            for flags in EXPERIMENTS[name]["rows"].values():
                wanted[flags, seed] = wanted.get((flags, seed), False) or "stray" in EXPERIMENTS[name]["columns"]
    if not args.collect:
        for seed in args.seeds:                         # before the runs, which would make it side by side
            world("train", seed, args.dry_run), world("test", seed, args.dry_run)
        prepare([flags for flags, _ in wanted], args.seeds, threads, args.dry_run)
        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(wanted), desc="runs") as bar:
            try:
                for done in [pool.submit(run, *row, threads=threads, dry_run=args.dry_run, look=look) for row, look in wanted.items()]:
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)      # what has not begun never will; what runs is finished first
                raise
    place = HERE / "figures" if args.publish else RUNS
    for name in names if not args.dry_run else []:
        found = collect(name, args.seeds)
        common.write_json(place / f"{name}.json", found)
        if name in PLOTS:
            PLOTS[name](found, place / f"{name}.png")
        print(f"\n{found['asks']}\n\n{markdown(name, found)}")


if __name__ == "__main__":
    main()
