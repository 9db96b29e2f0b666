"""What a run's folder says: in the middle, killed, resumed, skipped, finished, and when it is no
run."""

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from lab import report
from plumbing import plots

matplotlib.use("Agg")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_complaints():
    """matplotlib warns where a layout collapses or a log scale has nothing to show."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write_run(
    folder, lines, *, steps=100, script="train_source_layer.py", cut='{"step": 999, "lo', **config
):
    """A run's folder with these lines in its log, and one that a kill cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "command": f"{script} --out {folder.name}",
        "commit": "abc1234",
        "torch": "2.11.0",
        "gpu": None,
        "ranks": 2,
        "steps": steps,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    return folder


def source_layer(step, **more):
    return {
        "step": step,
        "loss": 2 / step,
        "top": 0.1,
        "layer": 0.3,
        "acoustic": 0.01 * (step - 1) or -1e-9,
        "sft": 1 / step,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "seconds": 2.0,
        "seconds_waiting": 0.5,
        "tokens_per_second": 1000 + step,
        "memory_gb": 3.0 + (step > 5),
        "host_gb": 8 + 0.001 * step,
        **more,
    }


def cord(step, **more):
    return {
        "step": step,
        "loss": 9.0,
        "token": 10.0,
        "group": -1.0,
        "grad_norm": 5.0,
        "lr": 1e-4,
        "kl": 0.5 / step,
        "entropy": 0.1,
        "reward": 0.25,
        "length": 50.0,
        "seconds": 3.0,
        "seconds_rollout": 1.0,
        "seconds_scoring": 0.5,
        "seconds_update": 1.5,
        "rollout_tokens_per_second": 500.0,
        "memory_gb": 2.0,
        **more,
    }


def heard(average, ser):
    aqa = {"sound": average - 5, "speech": average + 5, "music": None, "average": average}
    return {
        "aqa": {
            **aqa,
            "correct": {"sound": {"a": True}, "music": {}, "speech": {"b": False}},
            "intervals": {name: [0, 100] for name in aqa},
        },
        "ser": {"ua": ser, "interval": [ser - 5, ser + 5], "correct": {"sad": {"c": True}}},
    }


def views(text, audio, **more):
    return {
        "text_accuracy": text,
        "audio_accuracy": audio,
        "gap": text - audio,
        "intervals": {name: [0, 100] for name in ("text", "audio", "gap")},
        **more,
    }


def told(folder):
    """The summary as {name: text}, and as lines."""
    lines = report.summary(report.read_run(folder))
    return {line[:12].strip(): line[12:] for line in lines if line[:1] != " "}, lines


def drawn(folder):
    """The figure's panels by their titles, and all its axes, once it could be drawn."""
    figure = report.plot_report(report.read_run(folder))
    figure.savefig(folder / "report.png")
    assert (folder / "report.png").stat().st_size > 20_000
    titled = [axis for axis in figure.axes if axis.get_title("left")]
    return {axis.get_title("left").split(":")[0]: axis for axis in titled}, figure.axes


# -------------------- what is there --------------------------------------------------------------


def test_a_log_is_read_whatever_a_kill_left_of_it(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0, "sft": None},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": 1.0, "sft": 0.5},
    ]
    run = report.read_run(write_run(tmp_path, lines))
    assert (
        [line["step"] for line in run["log"]] == [1, 2, 3]
        and run["done"] == 3
        and not run["finished"]
    )
    assert plots.curve(run["log"], "loss") == ([1, 3], [3.0, 1.0])
    assert plots.curve(run["log"], "sft") == ([3], [0.5]) and plots.curve(run["log"], "top") == (
        [],
        [],
    )
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 3.0}\n\xff\xfe{"st')
    assert report.read_run(tmp_path)["done"] == 1


@pytest.mark.parametrize(
    "content", [None, '{"architectures": ["Qwen2AudioForConditionalGeneration"]}']
)
def test_a_folder_without_a_run_gets_one_sentence(tmp_path, content):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(SystemExit, match="holds no run, .*; give the folder that") as stop:
        report.main([str(folder)])
    assert str(folder) in str(stop.value) and "\n" not in str(stop.value)


def test_only_evaluations_that_this_run_made_count(tmp_path):
    """Resumed from step 50 towards 100: the evaluation of step 60 will be made again, and the end
    is the one of an earlier, shorter run."""
    write_run(tmp_path, [source_layer(step) for step in range(1, 56)])
    for name, average in ("before", 50), ("eval-0000060", 70), ("eval-0000040", 60), ("after", 80):
        (tmp_path / f"{name}.json").write_text(json.dumps(heard(average, 90)))
    (tmp_path / "results.json").write_text(json.dumps({"before": {}, "after": {}, "minutes": 5}))
    run = report.read_run(tmp_path)
    assert [(step, found["average"][0]) for step, found in run["evaluations"]] == [
        (0, 50),
        (40, 60),
    ] and run["results"] is None
    write_run(tmp_path, [source_layer(step) for step in range(1, 101)], cut="")
    run = report.read_run(tmp_path)
    assert [(step, found["average"][0]) for step, found in run["evaluations"]] == [
        (0, 50),
        (40, 60),
        (60, 70),
        (100, 80),
    ] and run["results"]["minutes"] == 5


def test_scores_of_both_scripts():
    assert list(report.scores(heard(60, 80))) == [
        "sound",
        "speech",
        "average",
        "SER",
    ] and report.scores(heard(60, 80))["SER"] == (80, [75, 85])
    found = report.scores(views(90, 70, elsewhere=heard(60, 80)))
    assert list(found) == ["text", "audio", "gap", "sound", "speech", "average", "SER"] and found[
        "gap"
    ] == (20, [0, 100])


# -------------------- in words -------------------------------------------------------------------


def test_the_summary_of_a_run_in_its_middle(tmp_path):
    lines = [
        source_layer(step, **({"seconds": 10.0, "seconds_waiting": 1.0} if step <= 20 else {}))
        for step in range(1, 101)
    ]
    lines[29] = {"step": 30, "skipped": "the gradient was not finite", "ids": ["q7", "q8"]}
    write_run(tmp_path, lines, steps=1000)
    for step in (20, 40, 60):
        (tmp_path / f"step-{step:07d}").mkdir()
        (tmp_path / f"step-{step:07d}" / "checkpoint.json").write_text(json.dumps({"step": step}))
    (tmp_path / "step-0000080").mkdir()  # not whole
    said, text = told(tmp_path)
    assert (
        "train_source_layer.py on 2 x CPU, commit abc1234, torch 2.11.0" in text[0]
        and text[1] == f"train_source_layer.py --out {tmp_path.name}"
    )
    assert said["done"].startswith("100 of 1,000 steps, the last one ") and said["done"].endswith(
        " s ago"
    )
    assert (
        said["time"] == "6.0 minutes of steps, 30.0 minutes of them left at 2 s a step"
    )  # 20 x 10 + 79 x 2 = 358; 900 x 2
    assert (
        said["sft"]
        == f"{np.mean([1 / n for n in range(1, 10)]):.4g} -> {np.mean([1 / n for n in range(92, 101)]):.4g}"  # noqa: E501
    )
    assert said["speed"] == "1,051 tokens per second, median" and said["waiting"].startswith(
        f"{100 * (20 + 79 * 0.5) / 358:.1f} % of"
    )
    assert said["memory"] == "4.00 GB of the process at the peak"
    growth = "8.00 -> 8.10 GB since the last start, +1000 MB a thousand steps"
    assert said["host"] == growth
    assert (
        said["left out"] == "1 of the steps: 30; the first: the gradient was not finite"
        and "            their examples: q7, q8" in text
    )
    assert (
        said["checkpoints"] == "60, 40, 20, the newest first"
        and said["evaluations"] == "none"
    )


def test_the_host_memory_of_the_process_that_runs_now():
    """100 MB a thousand steps, and 2 GB of caches at first; a resume at step 1000 begins anew, far
    below."""
    fills = lambda step: min(step, 50) * 0.04 + 1e-4 * step
    log = [
        {"step": step, "host_gb": 10 + 3 * (step < 1000) + fills(step - 1000 * (step >= 1000))}
        for step in range(1, 3000)
    ]
    first, last, growth = report.host_growth(log)
    assert (first, last) == pytest.approx((10, 12.2), abs=1e-3) and growth == pytest.approx(100)
    assert report.host_growth([]) is None and report.host_growth(log[:1])[2] == 0


def test_the_table_of_evaluations():
    rows = [
        (step, {"text": (50.0, None), **({"SER": (80.0, None)} if step in (0, 1000) else {})})
        for step in range(0, 1001, 10)
    ]
    lines = report.table(rows)
    assert (
        len(lines) <= report.ROWS + 1
        and lines[-1].split() == ["1,000", "50.0", "80.0"]
        and lines[1].split()[2] == "-"
    )
    assert len(report.table(rows[:3])) == 4 and report.table(rows[:3])[0].split() == [
        "step",
        "text",
        "SER",
    ]


def test_a_finished_run_ends_with_its_paired_differences(tmp_path, capsys):
    write_run(tmp_path, [source_layer(1), source_layer(2)], steps=2, cut="")
    before, after = heard(50, 80), heard(60, 75)
    before["aqa"]["correct"]["sound"]["a"] = False
    for name, found in (
        ("before", before),
        ("after", after),
        ("results", {"before": before, "after": after, "minutes": 3.0}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    report.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert (
        "2 of 2 steps, finished" in said
        and "3.0 minutes in all" in said
        and "average       50.00    60.00   +50.00 points" in said
    )
    assert re.search(
        r"^ +0 +45.0 +55.0 +50.0 +80.0\n +2 +55.0 +65.0 +60.0 +75.0$", said, re.M
    ) and said.endswith("report.png\n")


def test_before_the_first_step(tmp_path):
    (write_run(tmp_path, [], cut="") / "before.json").write_text(json.dumps(heard(50, 80)))
    said, text = told(tmp_path)
    assert (
        said["done"] == "0 of 100 steps"
        and "loss" not in said
        and text[-1].split() == ["0", "45.0", "55.0", "50.0", "80.0"]
    )
    assert len(drawn(tmp_path)[0]) == 5


# -------------------- in pictures ----------------------------------------------------------------


def test_the_panels_of_source_layer(tmp_path):
    lines = [source_layer(step) for step in range(1, 201)]
    lines[49], lines[99]["layer"] = (
        {
            "step": 50,
            "skipped": "the loss was not finite",
            "ids": [],
        },
        None,
    )
    write_run(tmp_path, lines, steps=300)
    for name, average in ("before", 50), ("eval-0000100", 60):
        (tmp_path / f"{name}.json").write_text(json.dumps(heard(average, 80)))
    panels, axes = drawn(tmp_path)
    assert list(panels) == [
        "losses",
        "accuracy, with 95 % intervals",
        "gradient norm before clipping, and learning rate",
        "speed",
        "memory",
    ]
    curves = {line.get_label(): line.get_xydata() for line in panels["losses"].lines}
    assert (
        {"loss", "sft", "top", "layer", "acoustic"} <= curves.keys()
        and len(curves["layer"]) == 198
        and len(curves["sft"]) == 199
    )
    assert (
        panels["losses"].get_yscale() == "log" and panels["losses"].get_ylim()[0] > 1e-3
    )  # not down to the first L_ac
    points = {
        line.get_label(): line.get_xydata().tolist()
        for line in panels["accuracy, with 95 % intervals"].lines
    }
    assert (
        points["average"] == [[0, 50], [100, 60]]
        and points["sound"] == [[0, 45], [100, 55]]
        and points["SER"] == [[0, 80], [100, 80]]
    )
    assert {line.get_label() for line in panels["memory"].lines} >= {
        "process, peak",
        "host, rank 0's process",
    }
    for axis in panels.values():
        assert [
            line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else line.get_xdata()
            for line in axis.lines
            if line.get_marker() == "x"
        ] == [[50]]
    assert {"% of a step waiting for data", "learning rate"} <= {axis.get_ylabel() for axis in axes}


def test_the_panels_of_cord(tmp_path):
    write_run(tmp_path, [cord(step) for step in range(1, 41)], script="train_cord.py")
    (tmp_path / "before.json").write_text(json.dumps(views(90, 70, elsewhere=heard(60, 80))))
    (tmp_path / "eval-0000020.json").write_text(json.dumps(views(91, 75)))
    panels, axes = drawn(tmp_path)
    assert "what the student learns from" in panels and {
        "KL per token (nats)",
        "reward, mean of the groups",
        "rollout tokens per second",
    } <= {a.get_ylabel() for a in axes}
    points = {
        line.get_label(): line.get_xydata().tolist()
        for line in panels["accuracy, with 95 % intervals"].lines
    }
    assert points == {
        "text": [[0, 90], [20, 91]],
        "audio": [[0, 70], [20, 75]],
        "average": [[0, 60]],
        "SER": [[0, 80]],
    }
    (right,) = (
        axis for axis in axes if any(line.get_label() == "group (right)" for line in axis.lines)
    )
    assert right.get_yscale() == "linear" and panels["losses"].get_yscale() == "log"
    said, _ = told(tmp_path)
    assert (
        said["time"] == "2.0 minutes of steps, 3.0 minutes of them left at 3 s a step"
        and said["kl"] == "0.2604 -> 0.013"
        and said["group"] == "-1 -> -1"
    )


@pytest.mark.parametrize(
    "line",
    [
        {"step": 1},
        {"step": 1, "loss": None, "kl": None, "grad_norm": None},
        {"step": 1, "skipped": "why", "ids": ["q"]},
        {"step": 1, "skipped": "why"},
        {"step": 1, "loss": -2.0, "group": -2.0, "token": 0.0, "reward": 0.5},
        {"step": 1, "loss": 1.0, "seconds": 0.0, "seconds_waiting": 0.0},
    ],
)
def test_lines_that_lack_terms(tmp_path, line):
    write_run(tmp_path, [line], steps=None)
    assert told(tmp_path)[0]["done"].startswith("1 of ? steps")
    drawn(tmp_path)


def test_smoothing_neither_lags_nor_loses_the_ends():
    line = np.arange(200.0)
    assert plots.smooth(line)[50:150] == pytest.approx(line[50:150], abs=0.51) and plots.smooth(
        np.ones(77)
    ) == pytest.approx(np.ones(77))
    assert plots.smooth([3.0, 1.0]) == pytest.approx([3, 1])


def test_the_figures_at_the_end_survive_a_step_that_was_left_out(tmp_path):
    left_out = {"step": 2, "skipped": "the gradient was not finite", "ids": ["q"]}
    write_run(tmp_path / "a", [source_layer(1, sft=None), left_out, source_layer(3)], cut="")
    for name, found in ("before", heard(50, 80)), ("after", heard(60, 75)):
        (tmp_path / "a" / f"{name}.json").write_text(json.dumps(found))
    plots.plot_run(tmp_path / "a", ["sft", "top"], "loss term", "log")
    write_run(tmp_path / "b", [cord(1), left_out, cord(3, kl=None)], cut="")
    for name in "before", "after":
        (tmp_path / "b" / f"{name}.json").write_text(json.dumps(views(90, 70)))
    plots.plot_run(tmp_path / "b", ["kl", "reward"], "nats")
    assert all((tmp_path / name / "run.png").stat().st_size > 10_000 for name in "ab")


# -------------------- real runs ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_source_layer.py", "train_cord.py"])
def test_a_real_run(tmp_path, capsys, script):
    """Dry, so two steps; then as a kill leaves it: the last line cut, nothing of the end."""
    subprocess.run(
        [sys.executable, str(ROOT / script), "--dry-run", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )

    def say():
        report.main([str(tmp_path / "run")])
        return capsys.readouterr().out

    whole = say()
    assert (
        "2 of " in whole
        and ", a dry run" in whole
        and "checkpoints 2, the newest first" in whole
        and "paired" in whole
    )
    assert (
        re.search(r"^ +0 .*\n +2 ", whole, re.M)
        and (tmp_path / "run" / "report.png").stat().st_size > 20_000
    )
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text()[:-30])
    for name in "results.json", "after.json":
        (tmp_path / "run" / name).unlink()
    killed = say()
    assert "1 of " in killed and "paired" not in killed and re.search(r"^ +0 ", killed, re.M)


def test_without_matplotlib_the_figure_is_left_out_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plots.plot_run(tmp_path, ["kl"], "nats")
    assert "no figure was drawn, because matplotlib cannot" in capsys.readouterr().out
    assert not (tmp_path / "run.png").exists()
