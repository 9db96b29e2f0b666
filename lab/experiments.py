"""
Every number in README's tables, each by one command: both papers' tables in miniature, and the
questions that the papers leave open.

    python -m lab.experiments table             # paper A's Table 1, 35 minutes on two cores
    python -m lab.experiments cord              # paper B's Tables 1 to 3, three seeds: 80 minutes
    python -m lab.experiments alpha-ac skip     # some of the others, by name
    python -m lab.experiments all --seeds 0     # everything, one seed
    python -m lab.experiments table --dry-run   # two steps of every run, and a small evaluation

A row is a set of flags of train_source_layer.py, or of train_cord.py where the table's name begins
with cord, and nothing else. A seed is another world (other clips, questions, speakers' sentences)
and another order of training; the pretrained models are the same. What has run is not run again
(runs/experiments/ holds it); rows that several tables share run once.

An experiment leaves runs/experiments/NAME.json with every answer's verdict and, where a picture
helps, NAME.png; with --publish both go to docs/figures/, from where tests/test_experiments.py
computes README's numbers again. Differences are paired, question by question, over all seeds
together, with 95 % bootstrap intervals: they say how far the questions decide, not how far another
three seeds might; so the seeds' own values stand beside them.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import evaluate
import mini.world
import train_cord
import train_source_layer
from plumbing.files import read_json, write_json

HERE = Path(__file__).resolve().parent.parent
RUNS = Path("runs") / "experiments"
STRONGER = RUNS / "stronger"
# No run of its own: what every run's evaluation before training says
BASELINE = "baseline"
FULL = "layer-wise + acoustic KD + SFT"
NO_ACOUSTIC = "layer-wise text KD + SFT"

# Table 1 of the paper: AQA (MMAU test-mini, accuracy) and SER (IEMOCAP session 5, unweighted
# accuracy), per cent
PAPER = {
    BASELINE: (70.40, 58.89),
    "SFT only": (69.80, 51.93),
    "top-layer text KD + SFT": (70.30, 54.13),
    "skip-layer text KD (1 in 7) + SFT": (70.70, 53.37),
    NO_ACOUSTIC: (72.50, 49.65),
    FULL: (73.30, 56.03),
}

# Paper B, Qwen2-Audio, mean of MMSU, OpenBookQA and GSM8K (its Table 1): per cent of the audio-
# text gap that is gone
PAPER_GAP = {
    "SFT on the text view's answers": "unstable",
    "off-policy forward KL": "28.5",
    "CORD": "41.6",
}
# Its Table 2: MMAU, points over the base
PAPER_ELSEWHERE = {
    "music": ("+1.20", "-2.99"),
    "sound": ("-0.30", "-3.04"),
    "speech; here emotion": ("-3.31", ""),
}
# In GSM8K's place; in MMSU's and OpenBookQA's
SPOKEN_KINDS = {"numbers": ("sum", "story"), "choices": ("comparison", "ordering")}


def experiment(asks, *, against, columns=(), rows):
    """What it asks; the row that the others are compared with; columns beside the accuracies; rows,
    a line each, LABEL | FLAGS of the training script -> {label: flags}."""
    cells = [line.partition("|") for line in rows.strip().splitlines()]
    flags = {label.strip(): flags.strip() for label, _, flags in cells}
    return {"asks": asks, "against": against, "columns": list(columns), "rows": flags}


PAPER_A = {
    "table": experiment(
        "Table 1: what does each part bring?",
        against=BASELINE,
        columns=["minutes"],
        rows="""
        SFT only                          | --text-kd none --no-acoustic-kd
        top-layer text KD + SFT           | --text-kd top --no-acoustic-kd
        skip-layer text KD (1 in 7) + SFT | --text-kd skip:7 --no-acoustic-kd
        layer-wise text KD + SFT          | --text-kd layer --no-acoustic-kd
        layer-wise + acoustic KD + SFT    |
        """,
    ),
    "alpha-ac": experiment(
        "How much acoustic distillation? Drift: the divergence of hidden states at audio tokens,"
        " mean of the last 20 steps",
        against="4 (default)",
        columns=["drift"],
        rows="""
        0           | --alpha-ac 0
        0.01        | --alpha-ac 0.01
        0.05        | --alpha-ac 0.05
        0.1         | --alpha-ac 0.1
        0.5         | --alpha-ac 0.5
        4 (default) |
        16          | --alpha-ac 16
        """,
    ),
    "alpha-layer": experiment(
        "How much layer-wise distillation?",
        against="0.4 (default)",
        rows="""
        0 (top-layer) | --text-kd top
        0.05          | --alpha-layer 0.05
        0.4 (default) |
        4             | --alpha-layer 4
        16            | --alpha-layer 16
        """,
    ),
    "skip": experiment(
        "How many layers?",
        against="every layer",
        columns=["seconds", "memory"],
        rows="""
        every layer |
        1 in 2      | --text-kd skip:2
        1 in 3      | --text-kd skip:3
        1 in 7      | --text-kd skip:7
        """,
    ),
    "divergence": experiment(
        "JSD or forward KL at the top?",
        against="JSD",
        columns=["stray"],
        rows="""
        JSD        |
        forward KL | --divergence kl
        """,
    ),
    "hidden": experiment(
        "Which divergence between hidden states? (A small difference of mean square e costs e in"
        " mse, e/2 in cosine, e/8 in JSD)",
        against="JSD",
        rows="""
        JSD               |
        JSD, raw          | --hidden-divergence raw-jsd
        mse               | --hidden-divergence mse
        cosine            | --hidden-divergence cosine
        mse, as strong    | --hidden-divergence mse --alpha-ac 0.5 --alpha-layer 0.05
        cosine, as strong | --hidden-divergence cosine --alpha-ac 1 --alpha-layer 0.1
        """,
    ),
    "hidden-seeds": experiment(
        "JSD or mse between hidden states, at equal strength and with three seeds?",
        against="JSD",
        columns=["drift"],
        rows="""
        JSD            |
        mse, as strong | --hidden-divergence mse --alpha-ac 0.5 --alpha-layer 0.05
        """,
    ),
    "acoustic-teacher": experiment(
        "Is a stronger acoustic teacher better than the snapshot? (This one also learnt from 4,000"
        " more clips, emotion among them)",
        against="snapshot",
        rows="""
        snapshot |
        stronger | --acoustic-teacher {stronger}
        """,
    ),
    "which-layers": experiment(
        "Which layers carry the gain?",
        against="all 7",
        rows="""
        all 7            |
        1, 2             | --layers 1 2
        3, 4, 5          | --layers 3 4 5
        6, 7             | --layers 6 7
        none (top-layer) | --text-kd top
        """,
    ),
    "descriptions": experiment(
        "How good must the descriptions be?",
        against="true",
        rows="""
        true                             |
        textualize.py's                  | --data {described} --eval-data {test}
        a quarter of the words corrupted | --corrupt-descriptions 0.25
        half                             | --corrupt-descriptions 0.5
        all                              | --corrupt-descriptions 1
        """,
    ),
    "keep": experiment(
        "Can SER be kept without an acoustic teacher?",
        against="with it (default)",
        rows="""
    with it (default)                   |
    without                             | --text-kd layer --no-acoustic-kd
    without, audio tower frozen         | --no-acoustic-kd --train decoder
    tower and lower half frozen         | --no-acoustic-kd --train decoder --lower-lr 0
    tower frozen, lower half at a tenth of the rate |--no-acoustic-kd --train decoder --lower-lr 0.1
        """,
    ),
}
CORD = {
    "cord": experiment(
        "Tables 1 to 3: what does each part bring?",
        against=BASELINE,
        columns=["minutes"],
        rows="""
        SFT on the text view's answers | --token-loss sft --group-size 0 --epochs 2
        off-policy forward KL          | --token-loss forward-kl --group-size 0 --epochs 2
        uniform reverse KL             | --alpha 1 --beta 1 --group-size 0 --epochs 2
        weighted reverse KL            | --group-size 0 --epochs 2
        GRPO only                      | --token-loss none --epochs 2 --eval-every 25
        GRPO + uniform KL              | --alpha 1 --beta 1 --epochs 2 --eval-every 25
        CORD                           | --epochs 2 --eval-every 25
        CORD, lower rate               | --lr 2e-4 --epochs 2 --eval-every 25
        """,
    ),
    "cord-teacher": experiment(
        "Who should read: a frozen copy, or the weights of this step?",
        against="initial, 2e-4",
        rows="""
        initial, 2e-4 | --teacher initial --lr 2e-4 --group-size 0 --epochs 2 --eval-every 50
        initial, 3e-4 | --group-size 0 --epochs 2
        initial, 4e-4 | --teacher initial --lr 4e-4 --group-size 0 --epochs 2 --eval-every 50
        current, 2e-4 | --teacher current --lr 2e-4 --group-size 0 --epochs 2 --eval-every 50
        current, 4e-4 | --teacher current --lr 4e-4 --group-size 0 --epochs 2 --eval-every 50
        """,
    ),
    "cord-weights": experiment(
        "How heavy should the weighted tokens be, and how many? (the paper's Figure 4)",
        against="2 (default)",
        rows="""
        alpha = beta = 1             | --alpha 1 --beta 1 --group-size 0 --epochs 2
        1.5                          | --alpha 1.5 --beta 1.5 --group-size 0 --epochs 2
        2 (default)                  | --group-size 0 --epochs 2
        2.5                          | --alpha 2.5 --beta 2.5 --group-size 0 --epochs 2
        2, a twentieth of the tokens | --top-share 0.05 --group-size 0 --epochs 2
        2, half of the tokens        | --top-share 0.5 --group-size 0 --epochs 2
        """,
    ),
}
EXPERIMENTS = {**PAPER_A, **CORD}


# ------------------------------------------------------------------------------------------------
# 1. Running


def script_of(name):
    return train_cord if name in CORD else train_source_layer


def folder_of(script, flags, seed):
    """One folder for each script, set of flags and seed, named after them, so that tables share
    their rows' runs."""
    named = re.sub(r"[^a-z0-9.]+", "-", flags.lower()).strip("-") or "default"
    return RUNS / f"{'cord-' * (script is train_cord)}{named}-seed{seed}"


def call(log, threads, script, *arguments):
    """Run a script of ours with its output in a file. Raises SystemExit with the last line of what
    it said."""
    where = [str(HERE / script)] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, "-W", "ignore", *where, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise SystemExit(
            f"{script} {shlex.join(map(str, arguments))} failed: {said[-1]}; all of its output is"
            f" in {log}"
        )


def arguments_of(script, flags, seed, dry_run=False):
    """A row's flags as its script takes them: what stands in braces is named, seed and folder are
    added."""
    named = flags
    if "{" in flags:
        named = flags.format(
            stronger=newest(STRONGER),
            described=described(seed, dry_run),
            test=world("test", seed, dry_run),
        )
    arguments = shlex.split(f"{named} --seed {seed} --out {folder_of(script, flags, seed)}")
    return arguments + ["--dry-run"] * dry_run


def results_of(script, flags, seed, dry_run=False):
    """A finished run's results.json, or None. Raises SystemExit if the folder holds a run with
    other settings than these flags now mean."""
    folder = folder_of(script, flags, seed)
    results = read_json(folder / "results.json")
    if results is None:
        return None
    had = read_json(folder / "config.json")
    wants = vars(script.parse_flags(arguments_of(script, flags, seed, dry_run)))
    other = [
        f"{name} {had.get(name)}, not {value}"
        for name, value in wants.items()
        if name not in ("out", "resume") and had.get(name) != value
    ]
    if other:
        raise SystemExit(
            f"{folder} holds a run with {'; '.join(other)}: move it away, and this one will be run"
            " again"
        )
    return results


def run(script, flags, seed, *, threads, dry_run, look):
    """Train one row with one seed unless its results are there; look: also at its layers and
    vocabulary (lab.inside layers)."""
    folder = folder_of(script, flags, seed)
    if not results_of(script, flags, seed, dry_run):
        arguments = arguments_of(script, flags, seed, dry_run)
        if not dry_run:
            arguments += ["--resume", "auto"]
        call(folder / "run.txt", threads, f"{script.__name__}.py", *arguments)
        # Ctrl-C reaches the run first, which saves and stops as it should
        if not results_of(script, flags, seed, dry_run):
            raise SystemExit(f"{folder} was interrupted; the same command goes on with it")
    if look and not (folder / "layers.json").exists():
        arguments = f"layers --model {newest(folder)} --data {world('test', seed, dry_run)}"
        arguments += f" --out {folder}"
        call(folder / "layers.txt", threads, "lab.inside", *arguments.split())


def world(split, seed, dry_run):
    """The manifest that train_source_layer.py takes by default, or a small one; made unless it is
    there."""
    clips = {"train": 16, "test": 8} if dry_run else {"train": None, "test": 300}
    return mini.world.build(split, seed=seed, per_task=clips[split])


def described(seed, dry_run):
    """What textualize.py makes of it."""
    path = world("train", seed, dry_run)
    return path.with_name(f"{path.stem}-described.jsonl")


def newest(folder):
    return max(folder.glob("step-*"), default="missing")


def prepare(flags, seeds, threads, dry_run):
    """What rows name in braces: a stronger acoustic teacher, textualize.py's descriptions."""
    if any("{stronger}" in f for f in flags) and not (STRONGER / "results.json").exists():
        clips = mini.world.build("pretrain", per_task=8 if dry_run else 1000, seed=9)
        arguments = f"--text-kd none --no-acoustic-kd --epochs 1 --data {clips} --eval-data"
        arguments += f" {world('test', 0, dry_run)} --out {STRONGER}" + " --dry-run" * dry_run
        call(STRONGER / "run.txt", threads, "train_source_layer.py", *arguments.split())
    for seed in seeds if any("{described}" in f for f in flags) else []:
        log = RUNS / f"textualize-seed{seed}.txt"
        call(log, threads, "textualize.py", "--data", world("train", seed, dry_run))


# ------------------------------------------------------------------------------------------------
# 2. Collecting: verdicts as strings of 0 and 1, one character a question, in the order of the
#    questions' ids


def bits(correct):
    return {
        group: "".join(str(int(hits[i])) for i in sorted(hits)) for group, hits in correct.items()
    }


def verdicts(results):
    """An evaluation of either script -> {"aqa", "ser", and for CORD "text", "audio"}: group ->
    bits."""
    views, heard = results.get("correct", {}), results.get("elsewhere", results)
    return {
        **{view: bits(correct) for view, correct in views.items()},
        "aqa": bits(heard["aqa"]["correct"]),
        "ser": bits(heard["ser"]["correct"]),
    }


def curve(folder, steps):
    """A CORD run's evaluations -> [[step, text accuracy, audio accuracy], ...]."""
    points = {0: "before", steps: "after"}
    points |= {int(path.stem[5:]): path.stem for path in folder.glob("eval-*.json")}
    found = []
    for step, name in sorted(points.items()):
        scores = read_json(folder / f"{name}.json")
        accuracies = scores["text_accuracy"], scores["audio_accuracy"]
        found.append([step, *(round(accuracy, 2) for accuracy in accuracies)])
    return found


def collect(name, seeds):
    """The runs' folders -> {"asks", "rows": {row: {"flags", "runs": {seed: {"aqa": {task: bits},
    "ser": {emotion: bits}, "minutes", ...}}}}}."""
    experiment, script = EXPERIMENTS[name], script_of(name)
    rows = {}
    if experiment["against"] == BASELINE or script is train_cord:
        rows[BASELINE] = {"flags": None, "runs": {}}
    for row, flags in experiment["rows"].items():
        rows[row] = {"flags": flags, "runs": {}}
        for seed in map(str, seeds):
            folder, results = folder_of(script, flags, seed), results_of(script, flags, seed)
            if not results:
                raise SystemExit(
                    f"{folder} holds no finished run; leave --collect out, or choose other --seeds"
                )
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            measured = {
                "minutes": results["minutes"],
                "seconds": statistics.median(line["seconds"] for line in log),
                "memory": max(line["memory_gb"] for line in log),
            }
            if "acoustic" in log[-1]:
                measured["drift"] = statistics.mean(line["acoustic"] for line in log[-20:])
            if layers := read_json(folder / "layers.json"):
                measured["stray"] = layers["vocabulary"]["stray"]
            run = verdicts(results["after"])
            run |= {name: round(value, 4) for name, value in measured.items()}
            if script is train_cord:
                run["curve"] = curve(folder, log[-1]["step"])
            rows[row]["runs"][seed] = run
            if BASELINE in rows:
                rows[BASELINE]["runs"][seed] = verdicts(results["before"])
    return {**experiment, "rows": rows}


def accuracy(run, part, only=None):
    """Per cent over the questions of a part ("aqa", "text", "audio"), or of its groups `only`
    (tasks, kinds); "ser": mean of the emotions' recalls."""
    groups = [hits for group, hits in run[part].items() if only is None or group in only]
    if part != "ser":
        groups = ["".join(groups)]
    return 100 * statistics.mean(sum(map(int, hits)) / len(hits) for hits in groups)


def difference(row, other, part, only=None):
    """(points, [low, high]) of one row over another, paired by question over the seeds that both
    have; SER within each seed's emotions."""
    pairs = [
        (a, b, f"{seed} {group}")
        for seed in row["runs"].keys() & other["runs"].keys()
        for group in row["runs"][seed][part]
        if only is None or group in only
        for a, b in zip(
            row["runs"][seed][part][group], other["runs"][seed][part][group], strict=True
        )
    ]
    mine, theirs, groups = zip(*sorted(pairs, key=lambda pair: pair[2]))
    return evaluate.paired_bootstrap(
        [int(a) for a in mine], [int(b) for b in theirs], labels=groups if part == "ser" else None
    )


def reduction(row, baseline, samples=2000):
    """(per cent of the audio-text gap that is gone, mean over the seeds; its 95 % interval,
    questions resampled within each seed; each seed's)."""
    random, each, draws = np.random.default_rng(0), [], []
    for seed in sorted(row["runs"]):
        before, after = baseline["runs"][seed], row["runs"][seed]
        views = before["text"], before["audio"], after["audio"]
        answers = ["".join(view[kind] for kind in sorted(view)) for view in views]
        right = np.array([list(map(int, view)) for view in answers])
        n = right.shape[1]
        for found, chosen in ((each, np.arange(n)), (draws, random.integers(n, size=(samples, n)))):
            text, audio, now = right[:, chosen].mean(-1)
            found.append(100 * (now - audio) / (text - audio))
    interval = evaluate.percentiles(np.mean(draws, axis=0))
    return float(np.mean(each)), interval, [float(gone) for gone in each]


# ------------------------------------------------------------------------------------------------
# 3. Tables and figures

COLUMNS = {
    "minutes": ("minutes", "{:.1f}"),
    "drift": ("drift", "{:.4f}"),
    "seconds": ("s a step", "{:.2f}"),
    "memory": ("GB", "{:.2f}"),
    "stray": ("stray mass", "{:.2e}"),
}


def mean(row, part, only=None):
    return statistics.mean(accuracy(run, part, only) for run in row["runs"].values())


def with_seeds(average, each):
    return f"{average:.1f}" + (f" ({', '.join(f'{x:.1f}' for x in each)})" if len(each) > 1 else "")


def in_points(row, other, part, only=None):
    points, (low, high) = difference(row, other, part, only)
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(name, found):
    """An experiment as README's table: accuracies, their differences, the gap's reduction (CORD),
    what else was measured, the flags."""
    cord, other = name in CORD, found["rows"][found["against"]]
    parts = ("text", "audio") if cord else ("aqa", "ser")

    heads = [name.replace("-", " ")]
    if name == "cord":
        heads += ["paper: gap reduction"]
    if name == "table":
        heads += ["paper: AQA", "SER", "here: sound", "music", "speech"]
    for part in parts:
        heads += [part if cord else part.upper(), f"over {found['against']}"]
    if cord:
        heads += ["gap reduction", *SPOKEN_KINDS, "sound", "music", "SER"]
    heads += [COLUMNS[column][0] for column in found["columns"]]
    lines = [[*heads, "flags"], ["---"] * (len(heads) + 1)]

    for label, row in found["rows"].items():
        cells = [label]
        if name == "cord":
            cells += [PAPER_GAP.get(label, "")]
        if name == "table":
            cells += [f"{value:.2f}" for value in PAPER[label]]
            cells += [f"{mean(row, 'aqa', [task]):.1f}" for task in evaluate.TASKS]
        for part in parts:
            each = [accuracy(row["runs"][seed], part) for seed in sorted(row["runs"])]
            cells += [with_seeds(mean(row, part), each)]
            cells += ["" if row is other else in_points(row, other, part)]
        if cord:
            gone, (low, high), each = reduction(row, found["rows"][BASELINE])
            gone = f"{with_seeds(gone, each)} [{low:.1f}, {high:.1f}]"
            cells += ["" if label == BASELINE else gone]
            cells += [f"{mean(row, 'audio', kinds):.1f}" for kinds in SPOKEN_KINDS.values()]
            cells += [f"{mean(row, 'aqa', [task]):.1f}" for task in ("sound", "music")]
            cells += [f"{mean(row, 'ser'):.1f}"]
        for column in found["columns"]:
            values = [run[column] for run in row["runs"].values() if column in run]
            cells += [COLUMNS[column][1].format(statistics.mean(values)) if values else ""]
        flags = "" if row["flags"] is None else f"`{row['flags']}`"
        lines.append([*cells, "(none)" if row["flags"] == "" else flags])
    return table_of(lines)


def table_of(lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown_elsewhere(found):
    """CORD's Table 2: what happens to what was not trained, points over the baseline, the paper's
    beside ours."""
    rows = ("CORD", "off-policy forward KL", "SFT on the text view's answers")
    heads = ["heard elsewhere", "paper: CORD", "forward KL", "here: CORD", *rows[1:]]
    lines = [heads, ["---"] * 6]
    for name, paper in PAPER_ELSEWHERE.items():
        part, only = ("aqa", [name]) if name in ("music", "sound") else ("ser", None)
        cells = [name, *paper]
        for row in rows:
            cells.append(in_points(found["rows"][row], found["rows"][BASELINE], part, only))
        lines.append(cells)
    return table_of(lines)


@contextlib.contextmanager
def two_axes(path, **how):
    """Two plots side by side, saved to a PNG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, constrained_layout=True, **how)
    yield figure, axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


AXES = {"xlabel": "AQA: accuracy (%)", "ylabel": "SER: unweighted accuracy (%)"}
ARROW = {"arrowstyle": "->", "color": "#2f5d9b", "lw": 1.5, "shrinkA": 8, "shrinkB": 8}


def plot_table(found, path):
    """AQA against SER, the paper's six rows beside ours, small dots for the seeds; the arrow is
    what acoustic KD does."""
    ours, seeds = {}, {}
    for row in PAPER:
        runs = found["rows"][row]["runs"].values()
        ours[row] = mean(found["rows"][row], "aqa"), mean(found["rows"][row], "ser")
        seeds[row] = [(accuracy(run, "aqa"), accuracy(run, "ser")) for run in runs]
    colours = ["#555555", "#d98c3f", "#c9b037", "#5fa55a", "#b04a5a", "#2f5d9b"]
    with two_axes(path, figsize=(11, 4.6)) as (figure, (left, right)):
        for row, colour in zip(PAPER, colours):
            how = {"s": 110, "color": colour, "label": row, "zorder": 3}
            how["marker"] = "s" if row == BASELINE else "o"
            left.scatter(*PAPER[row], **how)
            right.scatter(*ours[row], **how)
            right.scatter(*zip(*seeds[row]), s=22, color=colour, alpha=0.6, zorder=2)
        left.set(title="paper: Qwen2.5-Omni-7B, MMAU and IEMOCAP", **AXES)
        right.set(title="here: the mini world", **AXES)
        for axis, points in ((left, PAPER), (right, ours)):
            axis.annotate("", points[FULL], points[NO_ACOUSTIC], arrowprops=ARROW)
            axis.grid(alpha=0.25)
        legend = left.get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=3, frameon=False)


def plot_alpha(found, path):
    """Left: what each alpha_ac gives, SER against AQA. Right: how far the hidden states at audio
    tokens have moved."""
    labels = [label.split()[0] for label in found["rows"]]
    rows = list(found["rows"].values())
    points = [(mean(row, "aqa"), mean(row, "ser")) for row in rows]
    drifts = [statistics.mean(run["drift"] for run in row["runs"].values()) for row in rows]
    with two_axes(path, figsize=(10, 3.8)) as (_, (left, right)):
        left.plot(*zip(*points), "-o", color="#2f5d9b")
        for label, point in zip(labels, points):
            left.annotate(label, point, textcoords="offset points", xytext=(7, 4))
        left.set(title="alpha_ac along the line", **AXES)
        right.bar(labels, drifts, color="#b8c4d6")
        right.set(xlabel="alpha_ac", ylabel="divergence from the snapshot")
        right.set(title="drift of hidden states at audio tokens")


def plot_curves(found, path):
    """Both views' accuracy over the steps, for the rows that were also evaluated on the way: mean
    of the seeds, and each of them thin."""
    rows = {}
    for label, row in found["rows"].items():
        curves = [run.get("curve", []) for run in row["runs"].values()]
        if label != BASELINE and len(curves[0]) > 2:
            rows[label] = np.array(curves)  # [seeds, evaluations, (step, text, audio)]
    colours = ["#2f5d9b", "#7fa8dc", "#b04a5a", "#d98c3f"]
    with two_axes(path, figsize=(11, 4.2), sharey=True) as (_, axes):
        for axis, view, title in zip(axes, (1, 2), ("read", "heard")):
            for (label, values), colour in zip(rows.items(), colours):
                steps = values[0, :, 0]
                each = values[:, :, view]
                axis.plot(steps, each.T, color=colour, linewidth=0.8, alpha=0.4)
                axis.plot(steps, each.mean(0), "-o", color=colour, markersize=4, label=label)
            axis.set(xlabel="step", title=f"the same questions, {title}")
        axes[0].set(ylabel="accuracy (%)", ylim=(0, 100))
        axes[0].legend(frameon=False, loc="lower left")


PLOTS = {
    "table": plot_table,
    "alpha-ac": plot_alpha,
    "cord": plot_curves,
    "cord-teacher": plot_curves,
}


# ------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = ", ".join(EXPERIMENTS)
    add("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME", help=f"{known}, or all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--jobs", type=int, default=2, help="runs side by side; each takes its share of the cores")
    add("--dry-run", action="store_true", help="two steps of each, in another folder; no tables")
    add(
        "--publish",
        action="store_true",
        help="tables and figures to docs/figures/, which README shows; else to runs/experiments",
    )
    add(
        "--collect",
        action="store_true",
        help="no training: tables and figures from the runs that are there",
    )
    args = parser.parse_args()
    names = list(EXPERIMENTS) if "all" in args.names else args.names
    if args.dry_run:
        global RUNS, STRONGER
        RUNS = Path("runs") / "experiments-dry"
        STRONGER = RUNS / "stronger"
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    # (script, flags, seed) -> is its vocabulary looked at too?
    wanted = {}
    for seed in args.seeds:
        for name in names:
            for flags in EXPERIMENTS[name]["rows"].values():
                row = script_of(name), flags, seed
                wanted[row] = wanted.get(row, False) or "stray" in EXPERIMENTS[name]["columns"]
    if not args.collect:
        # Before the runs, which would make it side by side
        for seed in args.seeds:
            if any(name in CORD for name in names):
                mini.world.spoken(seed, small=args.dry_run)
            if any(name not in CORD for name in names):
                world("train", seed, args.dry_run), world("test", seed, args.dry_run)
        prepare([flags for _, flags, _ in wanted], args.seeds, threads, args.dry_run)
        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(wanted), desc="runs") as bar:
            try:
                for done in [
                    pool.submit(run, *row, threads=threads, dry_run=args.dry_run, look=look)
                    for row, look in wanted.items()
                ]:
                    done.result()
                    bar.update()
            except BaseException:
                # What has not begun never will; what runs is finished first
                pool.shutdown(cancel_futures=True)
                raise
    place = HERE / "docs/figures" if args.publish else RUNS
    for name in names if not args.dry_run else []:
        found = collect(name, args.seeds)
        write_json(place / f"{name}.json", found)
        if name in PLOTS:
            PLOTS[name](found, place / f"{name}.png")
        print(f"\n{found['asks']}\n\n{markdown(name, found)}")
        if name == "cord":
            print(f"\n{markdown_elsewhere(found)}")


if __name__ == "__main__":
    main()
