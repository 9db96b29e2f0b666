"""The experiments: every command runs, the statistics are evaluate.py's, and README's numbers
follow from the committed verdicts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_gap import views
from test_train_cord import write_spoken
from test_train_source_layer import write_world

import evaluate
import mini.world
import train_cord
import train_source_layer
from lab import experiments
from lab.experiments import BASELINE, CORD, EXPERIMENTS, FULL, NO_ACOUSTIC, PAPER_A

ROOT = Path(__file__).parent.parent
README = "\n".join(
    page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)


def committed(name):
    return json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------
# Every command runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("experiments"), n=8)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    return write_spoken(tmp_path_factory.mktemp("spoken"), n=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", sorted({flags for e in CORD.values() for flags in e["rows"].values()})
)
def test_every_row_of_cord_trains(spoken, flags, tmp_path):
    train_cord.main(
        [
            *flags.split(),
            "--data",
            str(spoken),
            "--out",
            str(tmp_path),
            "--no-eval",
            "--batch-size",
            "2",
            "--max-steps",
            "1",
            "--max-new-tokens",
            "12",
        ]
    )
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # GRPO alone has no loss where all are judged alike, or no prompt has a reference
    assert line["loss"] != 0 or line.get("signal", 0) == 0


@pytest.mark.slow
def test_the_command_runs_cord(tmp_path, monkeypatch):
    """One row, through the real script, from synthesis to results."""
    monkeypatch.chdir(tmp_path)
    # Main() sets it for a dry run
    monkeypatch.setattr(experiments, "RUNS", experiments.RUNS)
    monkeypatch.setattr(experiments, "STRONGER", experiments.STRONGER)
    monkeypatch.setitem(
        EXPERIMENTS,
        "cord-weights",
        {**CORD["cord-weights"], "rows": {"0.5": "--top-share 0.5 --eval-every 1 --group-size 2"}},
    )
    monkeypatch.setattr(
        sys, "argv", ["experiments.py", "cord-weights", "--seeds", "3", "--dry-run"]
    )
    experiments.main()
    folder = (
        tmp_path / "runs" / "experiments-dry" / "cord-top-share-0.5-eval-every-1-group-size-2-seed3"
    )
    results = json.loads((folder / "results.json").read_text())
    assert (
        results["after"]["questions"] == 8
        and json.loads((folder / "config.json").read_text())["top_share"] == 0.5
    )
    assert [step for step, _, _ in experiments.curve(folder, 2)] == [0, 1, 2]
    assert experiments.verdicts(results["after"]).keys() == {"text", "audio", "aqa", "ser"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", sorted({flags for e in PAPER_A.values() for flags in e["rows"].values()})
)
def test_every_row_trains(world, flags, tmp_path):
    """Two steps and an evaluation of every row, in this process, on a world of eight clips."""
    flags = flags.format(stronger=mini.world.MINI / "student", described=world, test=world).split()
    given = [] if "--data" in flags else ["--data", str(world), "--eval-data", str(world)]
    train_source_layer.main(
        [
            *flags,
            *given,
            "--out",
            str(tmp_path),
            "--dry-run",
            "--batch-size",
            "4",
            "--micro-batch",
            "4",
        ]
    )
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2] and json.loads(
        (tmp_path / "results.json").read_text()
    )["after"]["aqa"]


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """The rows that need something prepared (another acoustic teacher, textualize.py's
    descriptions) or looked at, as a user runs them."""
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "lab.experiments",
            "divergence",
            "acoustic-teacher",
            "descriptions",
            "--seeds",
            "0",
            "--dry-run",
        ],
        check=True,
        capture_output=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    runs = tmp_path / "runs" / "experiments-dry"
    folders = {path.name for path in runs.iterdir() if path.is_dir()}
    assert {
        "default-seed0",
        "divergence-kl-seed0",
        "stronger",
        "acoustic-teacher-stronger-seed0",
        "data-described-eval-data-test-seed0",
    } <= folders
    assert all((runs / name / "results.json").exists() for name in folders)
    assert all(
        (runs / name / "layers.png").exists() for name in ("default-seed0", "divergence-kl-seed0")
    )
    config = json.loads((runs / "acoustic-teacher-stronger-seed0" / "config.json").read_text())
    assert config["acoustic_teacher"].endswith("stronger/step-0000002") and config["dry_run"]


def finished_run(folder, flags, seed, before, after):
    """What a run leaves that the tables are made of."""
    folder.mkdir(parents=True)
    config = vars(train_source_layer.parse_flags([*flags.split(), "--seed", str(seed)]))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "seconds": i, "memory_gb": 1 + i, "acoustic": 0.5}) + "\n"
            for i in (1, 2, 3)
        )
    )
    (folder / "results.json").write_text(
        json.dumps({"before": before, "after": after, "minutes": 4.0})
    )


@pytest.fixture
def three_rows(tmp_path, monkeypatch):
    """An experiment of two rows, run with one seed, in a folder of its own."""
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "world", lambda split, seed, dry_run: Path(f"{split}.jsonl"))
    monkeypatch.setitem(
        EXPERIMENTS,
        "skip",
        {
            "asks": "?",
            "rows": {"one": "--text-kd skip:2", "two": "--text-kd top"},
            "against": BASELINE,
            "columns": ["drift", "seconds", "memory", "minutes"],
        },
    )
    for seed, flags in ((1, "--text-kd skip:2"), (2, "--text-kd top")):
        finished_run(
            experiments.folder_of(train_source_layer, flags, 0),
            flags,
            0,
            fake_results(0),
            fake_results(seed),
        )
    return tmp_path


def test_tables_are_made_of_what_runs_left(three_rows):
    found = experiments.collect("skip", [0])
    assert found["rows"][BASELINE]["runs"]["0"] == experiments.verdicts(fake_results(0))
    one = found["rows"]["one"]["runs"]["0"]
    assert {k: one[k] for k in ("aqa", "ser")} == experiments.verdicts(fake_results(1))
    assert (one["drift"], one["seconds"], one["memory"], one["minutes"]) == (0.5, 2, 4, 4)
    table = experiments.markdown("skip", found).splitlines()
    points, (low, high) = experiments.difference(
        found["rows"]["two"], found["rows"][BASELINE], "ser"
    )
    assert (
        len(table) == 5
        and table[4].startswith("| two | ")
        and table[4].endswith("| 0.5000 | 2.00 | 4.00 | 4.0 | `--text-kd top` |")
    )
    assert (
        f"| {experiments.accuracy(found['rows']['two']['runs']['0'], 'ser'):.1f} | {points:+.1f}"
        f" [{low:+.1f}, {high:+.1f}] |"
        in table[4]
    )


def test_a_run_that_is_missing_or_was_another_one_is_refused(three_rows):
    with pytest.raises(
        SystemExit, match="text-kd-skip-2-seed1 holds no finished run; leave --collect out"
    ):
        experiments.collect("skip", [0, 1])
    path = experiments.folder_of(train_source_layer, "--text-kd top", 0) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_sft": 0.7}))
    with pytest.raises(SystemExit, match="holds a run with alpha_sft 0.7, not 0.5: move it away"):
        experiments.collect("skip", [0])


def test_an_interrupted_run_stops_the_rest(three_rows, monkeypatch):
    # As after Ctrl-C: it saves, and ends without an error
    monkeypatch.setattr(experiments, "call", lambda *a: None)
    with pytest.raises(SystemExit, match="seed7 was interrupted; the same command goes on"):
        experiments.run(
            train_source_layer, "--text-kd top", 7, threads=1, dry_run=False, look=False
        )


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(
        SystemExit,
        match=r"--text-kd sideways failed: .*--text-kd sideways is none of none.*out.txt",
    ):
        experiments.call(tmp_path / "out.txt", 1, "train_source_layer.py", "--text-kd", "sideways")


# ------------------------------------------------------------------------------------------------
# The numbers mean what they say


def fake_results(seed):
    import random

    rng = random.Random(seed)
    said = [
        {"id": f"{task}{i}", "task": task, "correct": rng.random() < 0.7}
        for task in evaluate.TASKS
        for i in range(20)
    ]
    correct = {
        task: {s["id"]: s["correct"] for s in said if s["task"] == task} for task in evaluate.TASKS
    }
    emotions = {
        name: {f"{name}{i}": rng.random() < p for i in range(n)}
        for name, n, p in (("angry", 30, 0.9), ("sad", 10, 0.3))
    }
    return {"aqa": {"correct": correct}, "ser": {"correct": emotions}}


def test_accuracies_and_differences_come_back_from_the_verdicts():
    a, b = fake_results(1), fake_results(2)
    rows = [{"runs": {"0": experiments.verdicts(r)}} for r in (a, b)]
    flat = [
        [hit for task in evaluate.TASKS for hit in r["aqa"]["correct"][task].values()]
        for r in (a, b)
    ]
    assert experiments.accuracy(rows[0]["runs"]["0"], "aqa") == pytest.approx(
        100 * sum(flat[0]) / 60
    )
    assert experiments.accuracy(rows[0]["runs"]["0"], "aqa", ["sound"]) == pytest.approx(
        100 * sum(a["aqa"]["correct"]["sound"].values()) / 20
    )
    recall = [sum(hits.values()) / len(hits) for hits in a["ser"]["correct"].values()]
    assert experiments.accuracy(rows[0]["runs"]["0"], "ser") == pytest.approx(50 * sum(recall))
    points, (low, high) = experiments.difference(*rows, "aqa")
    assert points == pytest.approx(100 * (sum(flat[0]) - sum(flat[1])) / 60) and low < points < high
    # The same question, asked of evaluate.py
    differences = evaluate.compare(a, b)
    for part, name in (("aqa", "average"), ("ser", "ua")):
        points, _ = experiments.difference(*rows, part)
        assert points == pytest.approx(differences[part, name][0])


def test_seeds_are_pooled():
    one, two = (experiments.verdicts(fake_results(seed)) for seed in (1, 2))
    row, other = {"runs": {"0": one, "1": one}}, {"runs": {"0": two, "1": two}}
    single = experiments.difference({"runs": {"0": one}}, {"runs": {"0": two}}, "ser")
    double = experiments.difference(row, other, "ser")
    assert double[0] == pytest.approx(single[0]) and double[1][1] - double[1][0] < 0.8 * (
        single[1][1] - single[1][0]
    )


def test_the_gaps_reduction_comes_back_from_the_verdicts():
    before, after = views("1111111100" * 20, "1100000000" * 20), views(
        "1111110000" * 20, "1111100000" * 20
    )
    run = lambda found: {
        part: experiments.bits(found["correct"][part]) for part in ("text", "audio")
    }
    baseline, row = {"runs": {"0": run(before), "1": run(before)}}, {
        "runs": {"0": run(after), "1": run(before)}
    }
    gone, (low, high), each = experiments.reduction(row, baseline)
    assert each == pytest.approx([50, 0]) == [
        evaluate.gap_reduction(before, after),
        evaluate.gap_reduction(before, before),
    ] and gone == pytest.approx(25)
    assert 0 <= low < 25 < high


# ------------------------------------------------------------------------------------------------
# README says what was measured


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_readme_shows_the_committed_table(name):
    for line in experiments.markdown(name, committed(name)).splitlines():
        assert line in README, f"README lacks a line of {name}: {line}"
    found = committed(name)
    assert {
        row: run["flags"] for row, run in found["rows"].items() if row != BASELINE
    } == EXPERIMENTS[name]["rows"]


def test_table_1s_claims():
    """What the project set out to reach: the full method over +2.9 points AQA above the baseline,
    and SER over 6.4 points above the same run without acoustic KD, both with intervals above zero;
    three seeds for all six rows."""
    rows = committed("table")["rows"]
    assert list(rows) == list(experiments.PAPER) and all(
        len(row["runs"]) == 3 for row in rows.values()
    )
    points, (low, _) = experiments.difference(rows[FULL], rows[BASELINE], "aqa")
    assert points > 2.9 and low > 0
    points, (low, _) = experiments.difference(rows[FULL], rows[NO_ACOUSTIC], "ser")
    assert points > 6.4 and low > 0


def test_cords_claims():
    """What README says of CORD, with three seeds: over 60 % of the gap is gone, and at the lower
    rate the text view loses less than 2 points."""
    found = committed("cord")["rows"]
    assert all(len(row["runs"]) == 3 for row in found.values())
    for row in ("CORD", "CORD, lower rate"):
        gone, (low, _), _ = experiments.reduction(found[row], found[BASELINE])
        assert gone > 60 and low > 50
    points, _ = experiments.difference(found["CORD, lower rate"], found[BASELINE], "text")
    assert points > -2
    for line in experiments.markdown_elsewhere(committed("cord")).splitlines():
        assert line in README, line


ROWS = {
    "full": FULL,
    "no acoustic": NO_ACOUSTIC,
    "top": "top-layer text KD + SFT",
    "forward KL": "off-policy forward KL",
    "SFT": "SFT on the text view's answers",
}
# table, row, over which, parts
SEEDS = [
    ("table", "full", BASELINE, ["aqa"]),
    ("table", "full", "no acoustic", ["aqa", "ser"]),
    ("table", "SFT only", BASELINE, ["aqa"]),
    ("table", "top", "SFT only", ["aqa"]),
    ("table", "no acoustic", "top", ["aqa"]),
    ("hidden-seeds", "JSD", "mse, as strong", ["aqa", "ser"]),
    ("cord", "CORD", BASELINE, ["text"]),
    ("cord", "CORD, lower rate", BASELINE, ["text"]),
    ("cord", "CORD", "forward KL", ["audio"]),
    ("cord", "CORD", "SFT", ["audio"]),
    ("cord", "forward KL", BASELINE, ["text"]),
    ("cord", "SFT", BASELINE, ["text"]),
    ("cord", "weighted reverse KL", "uniform reverse KL", ["audio"]),
    ("cord", "CORD", "GRPO + uniform KL", ["audio"]),
    ("cord", "GRPO only", BASELINE, ["audio", "text"]),
    ("cord", "CORD", "weighted reverse KL", ["audio"]),
    ("cord-teacher", "current, 2e-4", "initial, 2e-4", ["audio", "text"]),
    ("cord-teacher", "current, 4e-4", "initial, 4e-4", ["audio", "text"]),
    ("cord-teacher", "initial, 2e-4", BASELINE, ["text"]),
    ("cord-teacher", "initial, 4e-4", BASELINE, ["text"]),
]


@pytest.mark.parametrize("name, row, other, parts", SEEDS)
def test_readme_quotes_what_each_seed_gave(name, row, other, parts):
    """One seed's intervals do not carry a claim about another run: the text quotes all three
    seeds."""
    rows = committed(name)["rows"]
    runs, others = (rows[ROWS.get(label, label)]["runs"] for label in (row, other))
    for part in parts:
        first, second, third = (
            experiments.accuracy(runs[seed], part) - experiments.accuracy(others[seed], part)
            for seed in ("0", "1", "2")
        )
        assert f"{first:+.1f}, {second:+.1f} and {third:+.1f}" in " ".join(README.split())


def test_readme_quotes_the_gap_that_each_seed_closed():
    for name, rows in (
        ("cord", ["CORD", "CORD, lower rate"]),
        ("cord-teacher", ["initial, 2e-4", "initial, 4e-4"]),
    ):
        found = committed(name)["rows"]
        for row in rows:
            _, _, (first, second, third) = experiments.reduction(found[row], found[BASELINE])
            said = f"{first:.1f}, {second:.1f} and {third:.1f} %"
            assert said in " ".join(README.split()), (name, row)


def test_no_sentence_of_readme_rests_on_an_interval_over_questions():
    """Intervals stand in tables and in what a run prints, where their heading says what they are
    of."""
    sentences = [line for line in README.splitlines() if not line.startswith(("|", "    "))]
    assert not [line for line in sentences if re.search(r"\[[-+]?\d+\.\d, [-+]?\d+\.\d\]", line)]


def test_how_much_of_the_test_stands_in_training():
    def share(task, words, split, count):
        """Per cent of the test's 300 whose words stand in the training set."""
        record = lambda split, i: mini.world.make_record(task, i, split, seed=0)[words]
        known = {record(split, i) for i in range(count)}
        return sum(record("test", i) in known for i in range(300)) / 3

    transcripts = share("speech", "transcript", "spoken", mini.world.SPLITS["spoken"]["speech"])
    melodies = share("music", "description", "train", mini.world.SPLITS["train"]["music"])
    text = " ".join(README.split())
    assert (
        f"about {5 * round(transcripts / 5)} % of the test's transcripts stand in training" in text
    )
    assert f"about {5 * round(melodies / 5)} % of the test's melody descriptions" in text


def test_the_term_that_is_dropped_is_named():
    assert all(
        "score-function term" in " ".join(text.split()) for text in (train_cord.__doc__, README)
    )


def test_pictures_are_drawn_from_the_committed_numbers(tmp_path):
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for name, plot in experiments.PLOTS.items():
        plot(committed(name), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert f"figures/{name}.png" in pages
