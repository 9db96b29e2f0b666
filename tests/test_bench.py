"""bench.py at sizes that say nothing about speed: every command runs, its contenders agree, its tables add up."""
import argparse
import re
from pathlib import Path

import pytest
import torch

import bench
import models


def rows(text):
    """{first cell: [the others]} of the markdown tables in a text."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines if not set(cells[0]) <= {"-", " "}}


def test_ratios_are_taken_within_a_round():
    assert bench.paired({"a": [1.0, 20, 3], "b": [2.0, 10, 6]}, "a", "b") == 0.5
    calls = []
    times = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "abbaab" and [len(t) for t in times.values()] == [2, 2]


def test_losses(capsys):
    pytest.importorskip("liger_kernel")
    bench.main(["losses", "--tokens", "256", "--hidden", "32", "--teacher-hidden", "16", "--vocab", "500", "--rounds", "1"])
    text = capsys.readouterr().out
    assert text.count("| ours | 1.00 |") == 4 and len(re.findall("Liger", text)) == 3 and text.count("matrix products alone") == 3
    assert all(float(x) >= 0 for cells in re.findall(r"\| Liger[^|]*\|([^|]*)\|([^|]*)\|", text) for x in cells)
    with pytest.raises(SystemExit, match="multiple of 128"):
        bench.main(["losses", "--tokens", "100"])


def test_without_liger_its_rows_are_left_out(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    args = argparse.Namespace(tokens=128, hidden=8, teacher_hidden=8, vocab=50)
    x = bench.loss_inputs(args, torch.device("cpu"))
    assert [list(bench.contenders(case, x)) for case in ("jsd_ce", "group")] == [["ours", "the formula"]] * 2


def test_a_contender_that_disagrees_is_not_timed(monkeypatch):
    right = bench.losses.jsd_ce
    monkeypatch.setattr(bench.losses, "jsd_ce", lambda *a, **k: right(*a, **{**k, "ce_weight": 0.6}))
    with pytest.raises(SystemExit, match="the formula.*nothing is worth timing"):
        bench.main(["losses", "--tokens", "128", "--hidden", "16", "--teacher-hidden", "16", "--vocab", "100", "--rounds", "1"])


def test_rollouts(capsys):
    bench.main(["rollouts", "--prompts", "2", "--group-size", "1", "--max-new-tokens", "6", "--rounds", "1"])
    text = capsys.readouterr().out
    table = rows(text)
    assert [cells[-1] for name, cells in table.items() if "all in one" in name or "generate" in name] == ["4 of 4"] * 3
    shared, apart = (int(table[name][-1].replace(",", "")) for name in ("ours: a prompt's rollouts in one sequence", "one sequence a rollout"))
    assert shared < 0.7 * apart and float(text.split("differ by ")[1]) < 1e-5


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("script, shapes, parts", [
    ("cord", "qwen2-audio-7b", {"rollout", "teacher", "student forward", "losses on the response", "backward", "optimizer"}),
    ("source_layer", "qwen2.5-omni-7b+qwen3-8b", {"teacher", "snapshot", "student forward", "losses on the response", "losses on hidden states", "backward", "optimizer"})])
def test_steps(script, shapes, parts, lora, monkeypatch, capsys):
    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    for shape in (*models.shapes.STUDENTS.values(), *models.shapes.TEACHERS.values()):
        for name, value in small.items():
            monkeypatch.setitem(shape, name, value)
    for name, value in dict(d_model=32, encoder_attention_heads=2, encoder_ffn_dim=32).items():
        monkeypatch.setitem(models.shapes.EARS, name, value)
    monkeypatch.setattr(models.shapes, "EYES", dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2))
    bench.main(["step", "--script", script, "--shapes", shapes, "--layers", "2", "--prompts", "2", "--seconds", "1", "--response-tokens", "20", "--steps", "1",
                "--lora", str(lora)])
    text = capsys.readouterr().out
    table = rows(text)
    assert table.keys() - {"part"} == parts and all(float(table[part][0]) >= 0 for part in parts)
    assert sum(float(table[part][1].rstrip(" %")) for part in parts) == pytest.approx(100, abs=4)
    assert float(re.search(r"([\d.e-]+) TFLOP outside", text)[1]) > 0
    held, full = (float(x) for x in re.findall(r"together ([\d.]+)", text))
    assert (held > 0 or lora) and held <= full          # without copies these tiny ones round to 0.0 GB
    assert ("adapters" in text) == bool(lora) and ("a copy of the decoder" in text or "snapshot 0" in text) == (not lora)
    assert torch.get_default_dtype() == torch.float32


def test_readmes_memory_table_is_what_the_arithmetic_gives():
    """Both papers' own models, from their shapes, without any memory (the meta device)."""
    found = re.findall(r"^\| (cord|source_layer), (qwen\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (Path(bench.__file__).parent / "README.md").read_text(), re.M)
    assert len(found) == 4
    for script, name, *cells in found[::2]:
        for lora, cell in zip((0, 64), cells[::2]):
            flags = {"cord": bench.train_cord, "source_layer": bench.train_source_layer}[script].parse_flags([])
            held = bench.at_full_depth(argparse.Namespace(script=script, shapes=name, lora=lora, train=None, weights="bfloat16"), flags)
            assert f"{sum(held.values()):.1f}" == cell, (script, name, lora)
