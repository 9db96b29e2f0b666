"""bench.py at sizes that say nothing about speed: every command runs, its contenders agree, its
tables add up."""

import argparse
import re

import pytest
import torch

from lab import bench, shapes


def rows(text):
    """{first cell: [the others]} of the markdown tables in a text."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {cells[0]: cells[1:] for cells in lines if not set(cells[0]) <= {"-", " "}}


def shrink(set_item):
    """Shapes of a few thousand parameters. set_item(dict, key, value): monkeypatch.setitem, or
    what does so for good."""
    for shape in (*shapes.STUDENTS.values(), *shapes.TEACHERS.values()):
        for name, value in dict(
            hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
        ).items():
            set_item(shape, name, value)
    for name, value in dict(d_model=32, encoder_attention_heads=2, encoder_ffn_dim=32).items():
        set_item(shapes.EARS, name, value)
    for name, value in dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2).items():
        set_item(shapes.EYES, name, value)


def test_ratios_are_taken_within_a_round():
    assert bench.paired({"a": [1.0, 20, 3], "b": [2.0, 10, 6]}, "a", "b") == 0.5
    calls = []
    times = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "abbaab" and [len(t) for t in times.values()] == [2, 2]


class Inline:
    """In place of processes of their own, whose start takes ten seconds: work is done at once."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *a):
        value = work(*a)
        return argparse.Namespace(result=lambda: value)


@pytest.mark.parametrize("inline", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses(inline, monkeypatch, capsys):
    pytest.importorskip("liger_kernel")
    if inline:
        monkeypatch.setattr(bench, "ProcessPoolExecutor", Inline)
    bench.main(
        [
            "losses",
            "--tokens",
            "256",
            "--hidden",
            "32",
            "--teacher-hidden",
            "16",
            "--vocab",
            "500",
            "--rounds",
            "1",
        ]
    )
    text = capsys.readouterr().out
    assert (
        text.count("| ours | 1.00 |") == 4
        and text.count("| TRL, ") == 2
        and len(re.findall("Liger", text)) == 6  # the second time against float64
        and text.count("matrix products alone") == 3
    )
    timed, exact = text.split("| against the formula in float64")
    rated = re.findall(r"\| (?:Liger|TRL)[^|]*\|([^|]*)\|([^|]*)\|", timed)
    assert len(rated) == 5 and all(float(x) >= 0 for cells in rated for x in cells)
    errors = re.findall(r"^\| (ours|the formula|Liger.*?) \| (\S*) ?\| (\S+) \|", exact, re.M)
    assert len(errors) == 11 and all(float(e or 0) < 1e-5 for row in errors for e in row[1:])
    with pytest.raises(SystemExit, match="multiple of 128"):
        bench.main(["losses", "--tokens", "100"])


def test_the_flops_of_a_loss_are_those_of_its_four_products():
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with bench.FlopCounterMode(display=False, custom_mapping=bench.FLOPS) as counter:
        bench.fused.jsd_ce(
            hidden, weight, torch.randn(30, 8), torch.randn(50, 8), torch.randint(50, (30,))
        )[0].backward()
    assert counter.get_total_flops() == 4 * 2 * 30 * 50 * 8


def test_without_liger_its_rows_are_left_out(monkeypatch):
    monkeypatch.setattr(bench, "peer", lambda module, name: None)
    args = argparse.Namespace(hidden=8, teacher_hidden=8, vocab=50)
    x = bench.loss_inputs(args, torch.device("cpu"), 128)
    for case in ("jsd_ce", "group"):
        names = list(bench.contenders(case, x))
        assert names[:2] == ["ours", "the formula"] and not any("Liger" in name for name in names)


def test_a_contender_that_does_not_fit_has_a_row_that_says_so(monkeypatch, capsys):
    def too_large(*a, **k):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(bench.losses, "cord", too_large)
    bench.main(
        [
            "losses",
            "--tokens",
            "128",
            "--hidden",
            "16",
            "--teacher-hidden",
            "16",
            "--vocab",
            "100",
            "--rounds",
            "1",
        ]
    )
    text = capsys.readouterr().out
    # L_tok and L_seq; not paper A's
    assert (
        text.count("| the formula | out of memory | | | | |") == 2
        and text.split("| against")[0].count("| the formula |") == 4
    )


def test_a_contender_that_disagrees_is_not_timed(monkeypatch):
    right = bench.losses.jsd_ce
    monkeypatch.setattr(
        bench.losses, "jsd_ce", lambda *a, **k: right(*a, **{**k, "ce_weight": 0.6})
    )
    with pytest.raises(SystemExit, match="the formula.*nothing is worth timing"):
        bench.main(
            [
                "losses",
                "--tokens",
                "128",
                "--hidden",
                "16",
                "--teacher-hidden",
                "16",
                "--vocab",
                "100",
                "--rounds",
                "1",
            ]
        )


def test_rollouts(capsys):
    bench.main(
        [
            "rollouts",
            "--prompts",
            "2",
            "--group-size",
            "1",
            "--max-new-tokens",
            "6",
            "--rounds",
            "1",
        ]
    )
    text = capsys.readouterr().out
    table = rows(text)
    assert [
        cells[-1] for name, cells in table.items() if "all in one" in name or "generate" in name
    ] == ["4 of 4"] * 3
    shared, apart = (
        int(table[name][-1].replace(",", ""))
        for name in ("ours: a prompt's rollouts in one sequence", "one sequence a rollout")
    )
    assert shared < 0.7 * apart and float(text.split("differ by ")[1]) < 1e-5


@pytest.mark.parametrize("lora", [0, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "script, shapes, parts",
    [
        (
            "cord",
            "qwen2-audio-7b",
            {
                "rollout",
                "teacher",
                "student forward",
                "losses on the response",
                "backward",
                "optimizer",
            },
        ),
        (
            "source_layer",
            "qwen2.5-omni-7b+qwen3-8b",
            {
                "teacher",
                "snapshot",
                "student forward",
                "losses on the response",
                "losses on hidden states",
                "backward",
                "optimizer",
            },
        ),
    ],
)
def test_steps(script, shapes, parts, lora, monkeypatch, capsys):
    shrink(monkeypatch.setitem)
    bench.main(
        [
            "step",
            "--script",
            script,
            "--shapes",
            shapes,
            "--layers",
            "2",
            "--prompts",
            "2",
            "--seconds",
            "1",
            "--response-tokens",
            "20",
            "--steps",
            "1",
            "--lora",
            str(lora),
            "--side",
            "256",
        ]
    )
    text = capsys.readouterr().out
    table = rows(text)
    assert table.keys() - {"part"} == parts and all(float(table[part][0]) >= 0 for part in parts)
    assert sum(float(table[part][1].rstrip(" %")) for part in parts) == pytest.approx(100, abs=4)
    assert float(re.search(r"([\d.e-]+) TFLOP outside", text)[1]) > 0
    held, full = (float(x) for x in re.findall(r"together ([\d.]+)", text))
    # Without copies these tiny ones round to 0.0 GB
    assert (held > 0 or lora) and held <= full
    assert ("adapters" in text) == bool(lora) and (
        "a copy of the decoder" in text or "snapshot 0" in text
    ) == (not lora)
    assert torch.get_default_dtype() == torch.float32


# ------------------------------------------------------------------------------------------------
# Data, long runs


@pytest.fixture
def short_runs(tmp_path, monkeypatch):
    """Both scripts on four clips of noise."""
    bench.memory.write_examples(argparse.Namespace(seconds=0.5, response_tokens=20), tmp_path, 4)
    small = ["--data", str(tmp_path / "noise.jsonl"), "--batch-size", "2", "--micro-batch", "2"]
    cord = [*small, "--group-size", "2", "--max-new-tokens", "4"]
    monkeypatch.setattr(bench, "RUNS", {"source_layer": small, "cord": cord})
    monkeypatch.setattr(bench, "LONG", {"source_layer": small})


@pytest.mark.slow
def test_data(short_runs, capsys):
    bench.main(
        [
            "data",
            "--steps",
            "4",
            "--clips",
            "3",
            "--seconds",
            "1",
            "--response-tokens",
            "20",
            "--workers",
            "0",
            "1",
        ]
    )
    text = capsys.readouterr().out
    waits = re.findall(
        r"^\| (source_layer|cord) \| (\d) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \|$", text, re.M
    )
    assert [(script, workers) for script, workers, *_ in waits] == [
        (script, n) for script in ("source_layer", "cord") for n in "01"
    ]
    assert all(0 < float(step) and 0 <= float(share) < 100 for *_, step, share, _ in waits)
    clips = rows(text.split("clips of 1 s")[1])
    assert list(clips) == ["clips", "wav", "flac", "mp3"]
    for kind in ("wav", "flac", "mp3"):
        *milliseconds, clips_a_second = map(float, clips[kind])
        assert len(milliseconds) == 4 and min(milliseconds) >= 0 and clips_a_second > 0


@pytest.mark.slow
def test_long_runs(short_runs, capsys):
    bench.main(["long", "--steps", "20"])
    table = rows(capsys.readouterr().out)
    assert list(table) == [
        "script, process",
        "source_layer, training",
        "source_layer, its data worker",
    ]
    for name in list(table)[1:]:
        assert all(
            float(x.replace(",", "")) > 100 for x in table[name][:3]
        ), "megabytes of a process with torch"
    with pytest.raises(
        SystemExit, match="train_cord.py .*--nonsense failed(.|\n)*unrecognized arguments"
    ):
        bench.run_script("cord", "--nonsense")
