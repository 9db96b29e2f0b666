"""bench.py at sizes that say nothing about speed: every command runs, its contenders agree, its tables add up."""
import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import models

ROOT = Path(__file__).parent.parent


def rows(text):
    """{first cell: [the others]} of the markdown tables in a text."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines if not set(cells[0]) <= {"-", " "}}


def shrink(set_item):
    """Shapes of a few thousand parameters. set_item(dict, key, value): monkeypatch.setitem, or what does so for good."""
    for shape in (*models.shapes.STUDENTS.values(), *models.shapes.TEACHERS.values()):
        for name, value in dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1).items():
            set_item(shape, name, value)
    for name, value in dict(d_model=32, encoder_attention_heads=2, encoder_ffn_dim=32).items():
        set_item(models.shapes.EARS, name, value)
    for name, value in dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2).items():
        set_item(models.shapes.EYES, name, value)


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


def test_a_contender_that_does_not_fit_has_a_row_that_says_so(monkeypatch, capsys):
    def too_large(*a, **k):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.losses, "cord", too_large)
    bench.main(["losses", "--tokens", "128", "--hidden", "16", "--teacher-hidden", "16", "--vocab", "100", "--rounds", "1"])
    text = capsys.readouterr().out
    assert text.count("| the formula | out of memory | | | | |") == 2 and text.count("| the formula |") == 4      # L_tok and L_seq; not paper A's


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
    shrink(monkeypatch.setitem)
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


@pytest.mark.parametrize("script, shapes", [("cord", "qwen2-audio-7b"), ("source_layer", "qwen2.5-omni-7b+qwen3-8b")])
@pytest.mark.parametrize("weights, lora", [("bfloat16", 0), ("bfloat16", 16), ("float32", 0)])
def test_the_line_of_a_run_says_the_same(script, shapes, weights, lora):
    """What a script says that it holds, of its own models, beside the estimate from shapes: at full depth, on the meta device."""
    flags = {"cord": bench.train_cord, "source_layer": bench.train_source_layer}[script].parse_flags(["--weights", weights, "--lora", str(lora)])
    args = argparse.Namespace(script=script, shapes=shapes, lora=lora, train=None, weights=weights)
    built = bench.build(args, torch.device("meta"), flags, bench.ALL)
    parts = dict(teacher=[built.teacher], snapshot=[built.snapshot]) if script == "source_layer" else dict(teacher=built.step.teacher)
    said = bench.common.memory_line(flags, 8, built.step, student=[built.student], **parts)
    assert float(re.search(r"together ([\d.]+)", said)[1]) == pytest.approx(sum(bench.held_by(args, built.student, built.teacher, 1).values()), rel=0.01), said
    flags.shard = True
    assert float(re.search(r"together ([\d.]+)", bench.common.memory_line(flags, 8, built.step, student=[built.student], **parts))[1]) == pytest.approx(
        sum(bench.held_by(args, built.student, built.teacher, 1).values()) / 8, rel=0.01)


# ------------------------------------------------------------- memory ------------------------------------------------------------------

SIZES = ["--layers", "2", "--words", "3000", "--seconds", "1", "--response-tokens", "20"]


def memory_table(capsys, *arguments):
    """-> {first cell: [a number for each number of GPUs]}, in the printed order"""
    bench.main(["memory", *SIZES, *arguments])
    return rows(capsys.readouterr().out)


@pytest.mark.parametrize("weights, lora", [("float32", 0), ("bfloat16", 0), ("float32", 4)])
@pytest.mark.parametrize("script, shapes", [("cord", "qwen2-audio-7b"), ("source_layer", "qwen2.5-omni-7b+qwen3-8b")])
def test_memory(script, shapes, weights, lora, monkeypatch):
    """Sums are sums, the most is the largest moment, shares shrink with the GPUs, and one GPU holds what `step` says of full depth."""
    shrink(monkeypatch.setitem)
    args = argparse.Namespace(script=script, shapes=shapes, weights=weights, lora=lora, train=None, memory=80.0, checkpoint_activations=False, group_size=4 * (script == "cord"),
                              response_tokens=20, seconds=1.0, prompts=2, eval_batch=2, words=None)
    flags = {"cord": bench.train_cord, "source_layer": bench.train_source_layer}[script].parse_flags([])
    shape = bench.shape_of(args, flags, 2)
    one, two, many = (bench.estimate(args, shape, gpus, 1) for gpus in (1, 2, 64))
    assert one[0] == bench.at_full_depth(args, flags, layers=2)
    for part in one[0]:
        assert two[0][part] == pytest.approx(one[0][part] / 2 * (10 / 16 if part == "projections" and weights == "bfloat16" else 1), rel=0.02), part
        assert many[0][part] < 0.2 * one[0][part]
    for held, moments in (one, two, many):
        assert all(parts["held"] == sum(held.values()) for moment, parts in moments.items() if not moment.startswith("loading"))
        assert ("rollouts" in moments) == ("text view" in moments) == (script == "cord")
    assert not any(value for parts in one[1].values() for name, value in parts.items() if name.startswith("gathered"))
    assert (one[1]["forward pass, at the losses"]["bfloat16 copies of weights, by autocast"] > 0) == (weights == "float32" and not lora)
    # more clips, more activations; run again in backward, fewer
    first = lambda clips: bench.estimate(args, shape, 2, clips)[1]["forward pass, at the losses"]["activations"]
    plain = first(1)
    assert first(3) == pytest.approx(3 * plain)
    args.checkpoint_activations = True
    assert first(1) < plain
    # the largest micro-batch that fits
    most = lambda clips: max(sum(parts.values()) for parts in bench.estimate(args, shape, 2, clips)[1].values())
    args.memory = 1e-9                                          # leaves nothing to the chunk of logits but its least
    assert bench.most_clips(args, shape, 2) == 0 and most(100) < most(101)
    args.memory = (most(100) + most(101)) / 2
    assert bench.most_clips(args, shape, 2) == 100


def test_memory_is_printed_for_each_number_of_gpus(capsys):
    """At full width, two layers: the most is the largest of the moments, and a moment the sum of its parts."""
    table = memory_table(capsys, "--script", "cord", "--shapes", "qwen2-audio-7b", "--gpus", "1", "8")
    assert table["GPUs"] == ["1", "8"]
    bold = {name.strip("*"): [float(x) for x in cells] for name, cells in table.items() if name.startswith("**")}
    moments = {name: values for name, values in bold.items() if name not in ("held all the time", "the most")}
    for i in range(2):
        assert bold["the most"][i] == max(values[i] for values in moments.values())
        assert sum(float(table[part][i]) for part in ("student", "optimizer", "gradients", "teacher (a copy of the decoder)")) == pytest.approx(bold["held all the time"][i], abs=0.2)
    assert table["clips in a micro-batch, at most 80 GB"] == ["256", "256"]
    with pytest.raises(SystemExit, match="needs a textual teacher"):
        memory_table(capsys, "--script", "source_layer", "--shapes", "qwen2-audio-7b")


@pytest.mark.parametrize("name", list(models.shapes.STUDENTS))
def test_what_autograd_keeps_is_what_a_real_run_keeps(name, monkeypatch):
    """The meta device's count against real tensors, by a hook of this test's own; PyTorch's CPU attention keeps the same as a GPU's."""
    shrink(monkeypatch.setitem)
    lengths = {"audio view": 50, "frames": 200}
    with torch.device("meta"):
        meta = models.shapes.random_student(name, 2, torch.bfloat16)[0]
    real = models.shapes.random_student(name, 2, torch.bfloat16)[0]
    for student in (meta, real):
        models.choose_trained(student, "all", bench.of_use(student))
    counted, weights, kept = bench.activations(meta, lengths), {p.data_ptr() for p in real.parameters()}, {}

    def bytes_of(run):
        kept.clear()
        keep = lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            run()
        return sum(x.untyped_storage().nbytes() for x in kept.values() if x.untyped_storage().data_ptr() not in weights) / 1e9

    decoder, tower = models.decoder(real), models.tower(real)
    embeds = torch.randn(1, 50, 32).bfloat16().requires_grad_()
    mask = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    assert counted["layers"] == pytest.approx(bytes_of(lambda: decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(50)[None], use_cache=False)), rel=0.1)
    heard = torch.randn(1, 200, 32).bfloat16().requires_grad_()
    how = (heard[0], torch.tensor([0, 100, 200])) if "Omni" in name else (heard, None)
    assert counted["tower"] == pytest.approx(2 * bytes_of(lambda: tower.layers[0](*how)), rel=0.1)
    assert counted["inputs"] == 2 * 50 * 32 * 2 / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("script, shapes, more", [("cord", "qwen2-audio-7b", ["--weights", "bfloat16"]), ("source_layer", "qwen2.5-omni-7b+qwen3-8b", ["--checkpoint-activations"])])
def test_measured_is_what_was_estimated(script, shapes, more, tmp_path):
    """Two ranks under --shard: what their tensors hold is the estimate's, within 10 %."""
    run = tmp_path / "run.py"
    run.write_text(f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport bench, test_bench\ntest_bench.shrink(dict.__setitem__)\nbench.main(sys.argv[1:])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(run), "memory", "--measure", "--gpus", "2", *SIZES]
    done = subprocess.run([*command, "--script", script, "--shapes", shapes, *more], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    ratios = re.findall(r"^\| (\d) \| ([^|]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$", done.stdout, re.M)
    parts = {"student", "optimizer", "gradients", "**together**", *({"teacher", "snapshot", "projections"} if script == "source_layer" else {"teacher (a copy of the decoder)"})}
    assert {(rank, name) for rank, name, _ in ratios} >= {(rank, name) for rank in "01" for name in parts}
    assert all(abs(float(ratio) - 1) <= 0.1 for _, name, ratio in ratios if name in parts), done.stdout


def test_measuring_takes_several_ranks():
    with pytest.raises(SystemExit, match="--gpus 2"):
        bench.main(["memory", "--measure", "--gpus", "1", "--script", "cord", "--shapes", "qwen2-audio-7b"])


# --------------------------------------------------------- data, long runs --------------------------------------------------------------

@pytest.fixture
def short_runs(tmp_path, monkeypatch):
    """Both scripts on four clips of noise."""
    bench.write_examples(argparse.Namespace(seconds=0.5, response_tokens=20), tmp_path, 4)
    small = ["--data", str(tmp_path / "noise.jsonl"), "--batch-size", "2", "--micro-batch", "2"]
    for name in ("RUNS", "LONG"):
        monkeypatch.setattr(bench, name, {"source_layer": small, "cord": [*small, "--group-size", "2", "--max-new-tokens", "4"]})


@pytest.mark.slow
def test_data(short_runs, capsys):
    bench.main(["data", "--steps", "4", "--clips", "3", "--seconds", "1", "--response-tokens", "20", "--workers", "0", "1"])
    text = capsys.readouterr().out
    waits = re.findall(r"^\| (source_layer|cord) \| (\d) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \|$", text, re.M)
    assert [(script, workers) for script, workers, *_ in waits] == [(script, n) for script in ("source_layer", "cord") for n in "01"]
    assert all(0 < float(step) and 0 <= float(share) < 100 for *_, step, share, _ in waits)
    clips = rows(text.split("clips of 1 s")[1])
    assert list(clips) == ["clips", "wav", "flac", "mp3"] and all(float(x) > 0 for kind in ("wav", "flac", "mp3") for x in clips[kind][4:7])
    assert all(0 < float(x.removesuffix(" %")) < 50 for kind in ("wav", "flac", "mp3") for x in clips[kind][7:]) and len(clips["wav"]) == 9


@pytest.mark.slow
def test_long_runs(short_runs, capsys):
    bench.main(["long", "--steps", "20", "--script", "source_layer"])
    table = rows(capsys.readouterr().out)
    assert list(table) == ["script, process", "source_layer, training", "source_layer, its data worker"]
    for name in list(table)[1:]:
        assert all(float(x.replace(",", "")) > 100 for x in table[name][:3]), "megabytes of a process with torch"
    with pytest.raises(SystemExit, match="train_cord.py .*--nonsense failed(.|\n)*unrecognized arguments"):
        bench.run_script("cord", "--nonsense")


def test_growth_is_told_from_noise():
    assert bench.slope([(step, 500 + step / 100 + step % 2) for step in range(1000, 2001)]) == pytest.approx(10, abs=0.1)
    assert bench.slope([(step, 500.0) for step in range(1000, 2001)]) == 0


@pytest.mark.slow
def test_readmes_table_of_many_gpus_is_what_the_command_prints(capsys):
    text = (Path(bench.__file__).parent / "README.md").read_text()
    for row, flags in {"source_layer, qwen2.5-omni-7b+qwen3-8b": ["--script", "source_layer", "--shapes", "qwen2.5-omni-7b+qwen3-8b", "--response-tokens", "700"],
                       "cord, qwen2-audio-7b": ["--script", "cord", "--shapes", "qwen2-audio-7b"]}.items():
        bench.main(["memory", *flags])
        most = rows(capsys.readouterr().out)["**the most**"]
        assert f"| {row} | {' | '.join(most)} |" in text
