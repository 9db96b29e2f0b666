"""memory.py: sums are sums, the arithmetic is what tensors and processes really hold, and README's
tables are what it prints."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from test_bench import rows, shrink

import models
from lab import memory, shapes

ROOT = Path(__file__).parent.parent


def test_the_memory_table_is_what_the_arithmetic_gives():
    """Both papers' own models, from their shapes, without any memory (the meta device)."""
    found = re.findall(
        r"^\| (cord|source_layer), (qwen\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "recipes.md").read_text(),
        re.M,
    )
    assert len(found) == 4
    for script, name, *cells in found[::2]:
        for lora, cell in zip((0, 64), cells[::2]):
            args = argparse.Namespace(script=script, shapes=name, weights="bfloat16", lora=lora)
            held = memory.at_full_depth(memory.with_flags(args))
            assert f"{sum(held.values()):.1f}" == cell, (script, name, lora)


SIZES = ["--layers", "2", "--seconds", "1", "--response-tokens", "20"]


def memory_table(capsys, *arguments):
    """-> {first cell: [a number for each number of GPUs]}, in the printed order"""
    memory.main([*SIZES, *arguments])
    return rows(capsys.readouterr().out)


@pytest.mark.parametrize("weights, lora", [
    ("float32", 0),
    ("bfloat16", 0),
    pytest.param("float32", 4, marks=pytest.mark.slow),
])
@pytest.mark.parametrize(
    "script, shapes", [("cord", "qwen2-audio-7b"), ("source_layer", "qwen2.5-omni-7b+qwen3-8b")]
)
def test_memory(script, shapes, weights, lora, monkeypatch):
    """Sums are sums, the most is the largest moment, shares shrink with the GPUs, and one GPU holds
    what `step` says of full depth."""
    shrink(monkeypatch.setitem)
    monkeypatch.setattr(memory, "ALL", 2)
    args = argparse.Namespace(
        script=script,
        shapes=shapes,
        weights=weights,
        lora=lora,
        layers=2,
        memory=80.0,
        response_tokens=20,
        seconds=1.0,
        prompts=2,
        eval_batch=2,
        text_batch=2,
    )
    args = memory.with_flags(args)
    shape = memory.shape_of(args)
    one, two, many = (memory.estimate(args, shape, gpus, 1) for gpus in (1, 2, 64))
    assert one[0] == memory.at_full_depth(args)
    for part in one[0]:
        assert two[0][part] == pytest.approx(
            one[0][part] / 2 * (10 / 16 if part == "projections" and weights == "bfloat16" else 1),
            rel=0.02,
        ), part
        assert many[0][part] < 0.2 * one[0][part]
    for held, moments in (one, two, many):
        assert all(
            parts["held"] == sum(held.values())
            for moment, parts in moments.items()
            if not moment.startswith("loading")
        )
        assert ("rollouts" in moments) == ("text view" in moments) == (script == "cord")
    assert not any(
        value
        for parts in one[1].values()
        for name, value in parts.items()
        if name.startswith("gathered")
    )
    assert (
        one[1]["forward pass, at the losses"]["bfloat16 copies of weights, by autocast"] > 0
    ) == (weights == "float32" and not lora)
    # more clips, more activations; run again in backward, fewer
    first = lambda clips: memory.estimate(args, shape, 2, clips)[1]["forward pass, at the losses"][
        "activations"
    ]
    plain = first(1)
    assert first(3) == pytest.approx(3 * plain)
    args.checkpoint_activations = True
    assert first(1) < plain
    # the largest micro-batch that fits
    most = lambda clips: max(
        sum(parts.values()) for parts in memory.estimate(args, shape, 2, clips)[1].values()
    )
    args.memory = 1e-9  # leaves nothing to the chunk of logits but its least
    assert memory.most_clips(args, shape, 2) == 0 and most(100) < most(101)
    args.memory = (most(100) + most(101)) / 2
    assert memory.most_clips(args, shape, 2) == 100


def test_memory_is_printed_for_each_number_of_gpus(capsys):
    """At full width, two layers: the most is the largest of the moments, and a moment the sum of
    its parts."""
    table = memory_table(
        capsys, "--script", "cord", "--shapes", "qwen2-audio-7b", "--gpus", "1", "8"
    )
    assert table["GPUs"] == ["1", "8"]
    bold = {
        name.strip("*"): [float(x) for x in cells]
        for name, cells in table.items()
        if name.startswith("**")
    }
    moments = {
        name: values
        for name, values in bold.items()
        if name not in ("held all the time", "the most")
    }
    for i in range(2):
        assert bold["the most"][i] == max(values[i] for values in moments.values())
        assert sum(
            float(table[part][i])
            for part in ("student", "optimizer", "gradients", "teacher (a copy of the decoder)")
        ) == pytest.approx(bold["held all the time"][i], abs=0.2)
    assert table["clips in a micro-batch, at most 80 GB"] == ["256", "256"]
    with pytest.raises(SystemExit, match="needs a textual teacher"):
        memory_table(capsys, "--script", "source_layer", "--shapes", "qwen2-audio-7b")


@pytest.mark.parametrize("name", list(shapes.STUDENTS))
def test_what_autograd_keeps_is_what_a_real_run_keeps(name, monkeypatch):
    """The meta device's count against real tensors, by a hook of this test's own; PyTorch's CPU
    attention keeps the same as a GPU's."""
    shrink(monkeypatch.setitem)
    lengths = {"audio view": 50, "frames": 200}
    with torch.device("meta"):
        meta = shapes.random_student(name, 2, torch.bfloat16)[0]
    real = shapes.random_student(name, 2, torch.bfloat16)[0]
    for student in (meta, real):
        memory.choose_trained(argparse.Namespace(train="all", lora=0), student)
    counted, weights, kept = (
        memory.activations(meta, lengths),
        {p.data_ptr() for p in real.parameters()},
        {},
    )

    def bytes_of(run):
        kept.clear()
        keep = lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast(
            "cpu", torch.bfloat16
        ):
            run()
        return (
            sum(
                x.untyped_storage().nbytes()
                for x in kept.values()
                if x.untyped_storage().data_ptr() not in weights
            )
            / 1e9
        )

    decoder, tower = models.decoder(real), models.tower(real)
    embeds = torch.randn(1, 50, 32).bfloat16().requires_grad_()
    mask = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    assert counted["layers"] == pytest.approx(
        bytes_of(
            lambda: decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=torch.arange(50)[None],
                use_cache=False,
            )
        ),
        rel=0.1,
    )
    heard = torch.randn(1, 200, 32).bfloat16().requires_grad_()
    how = (heard[0], torch.tensor([0, 100, 200])) if "Omni" in name else (heard, None)
    assert counted["tower"] == pytest.approx(2 * bytes_of(lambda: tower.layers[0](*how)), rel=0.1)
    assert counted["inputs"] == 2 * 50 * 32 * 2 / 1e9


@pytest.mark.slow
def test_the_table_of_many_gpus_is_what_the_command_prints(capsys):
    text = (ROOT / "docs" / "many_gpus.md").read_text()
    for row, flags in {
        "source_layer, qwen2.5-omni-7b+qwen3-8b": [
            "--script",
            "source_layer",
            "--shapes",
            "qwen2.5-omni-7b+qwen3-8b",
            "--response-tokens",
            "700",
        ],
        "cord, qwen2-audio-7b": ["--script", "cord", "--shapes", "qwen2-audio-7b"],
    }.items():
        memory.main([*flags])
        most = rows(capsys.readouterr().out)["**the most**"]
        assert f"| {row} | {' | '.join(most)} |" in text


@pytest.mark.parametrize("script", ["source_layer", "cord"])
def test_the_command_of_each_opening_fits_into_72_gb(script):
    """The training commands of the scripts' first lines, at the real models' shapes and with their
    own flags, on as many GPUs as they name."""
    module = {"source_layer": memory.train_source_layer, "cord": memory.train_cord}[script]
    text = re.sub(r"\\\n\s*", " ", module.__doc__)
    gpus, words = re.search(
        r"torchrun --nproc_per_node (\d+) train_\w+\.py\s+(--student Qwen/.*)", text
    ).groups()
    flags, gpus = module.parse_flags(words.split()), int(gpus)
    names = {name: shape for shape, name in memory.SHAPES.items()}
    args = argparse.Namespace(
        **{
            **vars(flags),
            "script": script,
            "seconds": 30.0,
            "memory": 80.0,
            "layers": memory.ALL,
            **(
                {
                    "shapes": names[flags.student],
                    "response_tokens": flags.max_new_tokens,
                    "prompts": flags.batch_size // gpus,
                }
                if script == "cord"
                else {
                    "shapes": f"{names[flags.student]}+{names[flags.teacher]}",
                    "response_tokens": 700,
                    "prompts": 0,
                    "group_size": 0,
                    "text_batch": 0,
                }
            ),
        }
    )
    clips = -(-flags.micro_batch // (1 + args.group_size))
    held, moments = memory.estimate(
        args, memory.shape_of(args), gpus if flags.shard else 1, clips
    )
    most = max(sum(parts.values()) for parts in moments.values())
    print(f"{script}: {most:.1f} GB")
    assert sum(held.values()) < most <= 72


def test_the_first_answers_are_counted(monkeypatch):
    """Planted: before it is shared out, the student is whole on every GPU while it answers, in 16
    bits beside its float32 weights."""
    shrink(monkeypatch.setitem)
    args = argparse.Namespace(
        script="cord",
        shapes="qwen2-audio-7b",
        layers=2,
        memory=80.0,
        response_tokens=20,
        seconds=1.0,
        prompts=2,
        eval_batch=2,
        text_batch=8,
    )
    args = memory.with_flags(args)
    shape = memory.shape_of(args)
    moments = [memory.estimate(args, shape, gpus, 1)[1] for gpus in (2, 64)]
    for name, count, tokens in (
        ("the text view's answers", 8, "text view"),
        ("the evaluation before", 2, "prompt"),
    ):
        few, many = (found[f"loading, {name}"] for found in moments)
        assert (
            few == many
            and few["the student"] == pytest.approx(4 * shape.whole)
            and few["bfloat16 copies of weights, by autocast"] == 2 * shape.linear > 0
        )
        assert few[f"keys and values of {count}"] == pytest.approx(
            count * (shape.lengths[tokens] + 20 * (tokens == "prompt")) * shape.cached
        )
