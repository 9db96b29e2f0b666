"""Both real scripts on many ranks, with numbers that go wrong and with clips that vanish."""

import json
import math
import os
import signal
from pathlib import Path

import bad_days
import pytest
import safetensors.torch
import test_train_cord
import test_train_source_layer
import torch

import data
import train_cord
import train_source_layer
from plumbing import checkpoints
from plumbing import run as plumbing_run

ROOT = Path(__file__).parent.parent
SCRIPTS = {"source_layer": train_source_layer, "cord": train_cord}
STEPS = {"source_layer": train_source_layer.SourceLayerStep, "cord": train_cord.CordStep}
# answers of 64 tokens at a low temperature: some rollouts give the text view's answer and some do
# not, so that the group reward teaches something
USUAL = {
    "source_layer": ["--batch-size", "4", "--micro-batch", "1"],
    "cord": [
        "--batch-size",
        "4",
        "--micro-batch",
        "3",
        "--max-new-tokens",
        "64",
        "--group-temperature",
        "0.8",
        "--lr",
        "3e-5",
    ],
}
SAME = {
    "source_layer": ("loss", "top", "layer", "acoustic", "sft"),
    "cord": ("loss", "token", "group", "kl", "entropy", "reward", "signal", "length", "at_limit"),
}


def write(script, folder, n=8):
    folder.mkdir(parents=True, exist_ok=True)
    return (
        test_train_source_layer.write_world(folder, n)
        if script == "source_layer"
        else test_train_cord.write_spoken(folder, n)
    )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {script: write(script, tmp_path_factory.mktemp(script)) for script in SCRIPTS}


def flags(script, world, out, *more):
    return ["--data", str(world), "--out", str(out), "--no-eval", *USUAL[script], *map(str, more)]


def run(script, world, out, *more, ranks=1):
    """A whole run in processes of its own, which must end well -> its log."""
    done = bad_days.fork(script, flags(script, world, out, *more), Path(out), ranks)
    assert done.wait() == 0, done.text()[-4000:]
    return log_of(out)


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def equal(ones, others, names, rel):
    assert [line["step"] for line in ones] == [line["step"] for line in others]
    for one, other in zip(ones, others):
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=rel, abs=1e-7), (one["step"], name)


# -------------------- 1. many ranks --------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(script, worlds, tmp_path):
    """Five steps in float32: the same losses, CORD's rollouts to the token; weights that are equal
    to the last bit on both ranks (save_checkpoint looks)."""
    one = run(script, worlds[script], tmp_path / "one", "--max-steps", 5)
    two = run(script, worlds[script], tmp_path / "two", "--max-steps", 5, ranks=2)
    equal(one, two, SAME[script], 1e-5)
    if script == "cord":                # the reward taught, on rollouts of many lengths
        assert sum(line["signal"] for line in two) > 0
        assert len({line["length"] for line in two}) > 1
    one, two = (
        safetensors.torch.load_file(tmp_path / n / "step-0000005" / "model.safetensors")
        for n in ("one", "two")
    )
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-5, name


SHARDED = [
    ("source_layer", []),
    ("source_layer", ["--checkpoint-activations", "--train", "decoder", "--text-kd", "skip:3"]),
    ("source_layer", ["--lower-lr", "0.1", "--tower-lr", "3"]),
    ("source_layer", ["--lora", "4", "--lower-lr", "0.1"]),
    ("source_layer", ["--text-kd", "none", "--no-acoustic-kd"]),
    ("cord", []),
    ("cord", ["--checkpoint-activations", "--train", "all"]),
    ("cord", ["--lora", "4"]),
    ("cord", ["--teacher", "current"]),
    ("cord", ["--token-loss", "sft", "--group-size", "0"]),
    ("cord", ["--token-loss", "none"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, more", SHARDED, ids=[" ".join([script, *more]) for script, more in SHARDED]
)
def test_sharded_equals_not(script, more, worlds, tmp_path):
    """FSDP2 on two gloo processes against one process, float32, five steps."""
    one = run(script, worlds[script], tmp_path / "one", "--max-steps", 5, *more)
    two = run(script, worlds[script], tmp_path / "two", "--max-steps", 5, "--shard", *more, ranks=2)
    equal(one, two, [name for name in (*SAME[script], "grad_norm") if name in one[0]], 1e-4)
    name = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    one, two = (
        safetensors.torch.load_file(tmp_path / n / "step-0000005" / name) for n in ("one", "two")
    )
    assert one.keys() == two.keys() and all(
        (one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-5 for name in one
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_sharded_16_bit_weights_train_save_and_go_on(script, worlds, tmp_path):
    """--weights bfloat16 --shard: the optimizer's 16 bits are each rank's own, a restart finds
    them, and DDP does about the same."""
    more = ["--max-steps", 4, "--save-every", 2, "--weights", "bfloat16"]
    whole = run(script, worlds[script], tmp_path / "ddp", *more, ranks=2)
    sharded = run(script, worlds[script], tmp_path / "fsdp", *more, "--shard", ranks=2)
    equal(whole, sharded, ["loss"], 0.02)
    again = run(
        script,
        worlds[script],
        tmp_path / "again",
        *more,
        "--shard",
        "--resume",
        tmp_path / "fsdp" / "step-0000002",
        ranks=2,
    )
    equal(sharded[2:], again, ["loss", "grad_norm"], 1e-6)


def on_two_ranks(code, folder):
    start = """
import torch
from plumbing import checkpoints, ranks, run
rank, world, device = ranks.start_distributed()
"""
    end = """
open(f"{rank}.fine", "w")
ranks.stop_distributed()
"""
    bad_days.on_two_ranks(start + code + end, folder)
    assert (folder / "0.fine").exists() and (folder / "1.fine").exists()


def test_a_shard_is_a_share(worlds, tmp_path):
    """What a rank holds of a sharded model is its part of it; `whole` and `full` give it back, and
    inside `whole` ranks may run it differently often: they wait for
    none. What goes into it keeps its type."""
    on_two_ranks(
        f"""
import data, mini.world, models, rollout
from torch.distributed.tensor import DTensor
model, processor = models.load_audio_model(mini.world.MINI / "student")
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
examples = data.read_manifest({str(worlds["cord"])!r})[:3]
ask = lambda: rollout.generate(model, processor, examples, view="text", words="transcript", batch_size=1, max_new_tokens=4 + 4 * rank, progress=False)
answers = ask()
ranks.shard(model, models.blocks(model))
held = sum(p.to_local().numel() for p in model.parameters())
assert abs(held - sum(p.numel() for p in before.values()) / 2) < 10_000, held
assert all(torch.equal(ranks.unsharded(p), before[name]) for name, p in model.named_parameters())
seen = ranks.with_weights_gathered(model, lambda: [name for name, p in model.named_parameters() if not isinstance(p, DTensor) and torch.equal(p, before[name])])
assert len(seen) == len(before) and all(isinstance(p, DTensor) for p in model.parameters())
assert ranks.with_weights_gathered(torch.nn.Linear(1, 1), lambda: 3) == 3
# rank 0 has two of the questions, rank 1 one
assert ranks.with_weights_gathered(model, ask) == answers and len(answers) == 3

reader, tokenizer = models.load_text_model(mini.world.MINI / "teacher")
prompt, decoder = torch.tensor([tokenizer.encode("what animal do you hear")]), models.decoder(reader.requires_grad_(False))
read = lambda: decoder(input_ids=prompt).last_hidden_state
right = read()
ranks.shard_reader(decoder, reader.get_output_embeddings())
# rank 0 has nothing to read inside `whole`, rank 1 much
found = ranks.with_weights_gathered(decoder, lambda: [read() for _ in range(3 * rank)]) + [read(), read()]
assert len(found) == 2 + 3 * rank and all(torch.equal(one, right) for one in found)
assert all(isinstance(p, DTensor) for p in decoder.parameters())

class Step(torch.nn.Linear):
    def forward(self, chunk):
        assert chunk["advantage"].dtype == torch.float32 and self.weight.dtype == torch.bfloat16
        return super().forward(chunk["advantage"].bfloat16()).sum()
step = ranks.shard(Step(2, 2), compute=torch.bfloat16)
step({{"advantage": torch.ones(2)}}).backward()
assert step.weight.grad.dtype == torch.float32
""",  # noqa: E501
        tmp_path,
    )
    with pytest.raises(SystemExit, match="--shard shares .* torchrun --nproc_per_node N"):
        train_cord.main(["--shard", "--data", "any.jsonl"])


def test_a_folder_that_is_not_the_same_for_all_is_refused(tmp_path):
    on_two_ranks(
        """
checkpoints.start_folder("shared", None)
try:
    checkpoints.start_folder(f"of-rank-{rank}", None)
except SystemExit as error:
    assert "is not the same folder for all ranks" in str(error)
else:
    raise AssertionError
""",
        tmp_path,
    )


# -------------------- 2. numbers that go wrong ---------------------------------------------------


def spoil(monkeypatch, script, steps, value=math.nan):
    """The loss of these steps (counted from 1) is multiplied by `value`."""
    right_forward, right_finite = STEPS[script].forward, plumbing_run.Run.finite
    seen = {"step": 1}

    def forward(self, *inputs):
        out = right_forward(self, *inputs)
        factor = value if seen["step"] in steps else 1.0
        if script == "source_layer":
            return {**out, "loss": out["loss"] * factor}
        loss, parts = out
        return loss * factor, parts

    def finite(self, norm):
        seen["step"] += 1
        return right_finite(self, norm)

    monkeypatch.setattr(STEPS[script], "forward", forward)
    monkeypatch.setattr(plumbing_run.Run, "finite", finite)


@pytest.mark.parametrize(
    "script", ["cord", pytest.param("source_layer", marks=pytest.mark.slow)]
)
def test_a_step_with_a_spoilt_loss_is_left_out(script, worlds, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, script, {2})
    more = ["--max-steps", 3, "--save-every", 1, "--keep", 9]
    SCRIPTS[script].main(flags(script, worlds[script], tmp_path, *more))
    _, two, three = log_of(tmp_path)
    assert two["step"] == 2 and "nan" in two["skipped"] and "loss" not in two
    assert len(two["ids"]) == 4 and "loss" in three
    one, two, three = (
        safetensors.torch.load_file(tmp_path / f"step-000000{n}" / "model.safetensors")
        for n in (1, 2, 3)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], three[name]) for name in one)
    assert "step 2 is left out: its loss is nan" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_spoils_a_step_too(worlds, tmp_path, monkeypatch):
    right, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, most):
        calls.append(most)
        norm = right(parameters, most)
        return norm * math.inf if len(calls) == 1 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    world = worlds["source_layer"]
    train_source_layer.main(flags("source_layer", world, tmp_path, "--max-steps", 2))
    one, two = log_of(tmp_path)
    assert "norm inf" in one["skipped"] and len(one["ids"]) == 4
    assert math.isfinite(two["grad_norm"])


@pytest.mark.parametrize(
    "script", ["source_layer", pytest.param("cord", marks=pytest.mark.slow)]
)
def test_five_in_a_row_stop_the_run_with_a_checkpoint(
    script, worlds, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, script, set(range(2, 20)), math.inf)
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(flags(script, worlds[script], tmp_path, "--max-steps", 20))
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert checkpoints.complete(tmp_path)[-1].name == "step-0000006"
    said = capsys.readouterr().out
    assert "not finite in 5 steps in a row" in said and "lower --lr" in said
    assert "step-0000006" in said


def test_a_run_whose_steps_were_all_left_out_goes_on(worlds, tmp_path, monkeypatch):
    """Its optimizer has no state yet, which is no fault of the checkpoint's. What an old log holds
    is nothing to a run that starts anew."""
    world = worlds["source_layer"]
    (tmp_path / "log.jsonl").write_text("no line of ours\n{}\n")
    with monkeypatch.context() as context:
        spoil(context, "source_layer", set(range(1, 20)), math.inf)
        with pytest.raises(SystemExit):
            train_source_layer.main(flags("source_layer", world, tmp_path, "--max-steps", 20))
    more = ["--max-steps", 6, "--resume", "auto"]
    train_source_layer.main(flags("source_layer", world, tmp_path, *more))
    assert "loss" in log_of(tmp_path)[-1] and len(log_of(tmp_path)) == 6


def test_out_of_memory_has_a_hint(worlds, tmp_path, monkeypatch, capsys):
    def forward(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(train_source_layer.SourceLayerStep, "forward", forward)
    world = worlds["source_layer"]
    with pytest.raises(torch.OutOfMemoryError):
        train_source_layer.main(flags("source_layer", world, tmp_path, "--max-steps", 2))
    assert "Out of memory: lower --micro-batch" in capsys.readouterr().err


# ------------------------------------------------------------- 3. bad data


@pytest.mark.parametrize("script, workers", [
    ("source_layer", 0),
    ("cord", 1),
    pytest.param("source_layer", 1, marks=pytest.mark.slow),
    pytest.param("cord", 0, marks=pytest.mark.slow),
])
def test_a_clip_that_vanishes_stops_the_run_with_a_checkpoint(
    script, workers, tmp_path, monkeypatch, capsys
):
    """The sentence names the manifest's line; a mended clip, and the run goes on."""
    world = write(script, tmp_path / "world")
    clip, right = world.parent / "3.wav", plumbing_run.Run.log
    sound = clip.read_bytes()

    def log(self, step, *more, **scalars):
        right(self, step, *more, **scalars)
        if self.done == 1:
            clip.unlink()

    monkeypatch.setattr(plumbing_run.Run, "log", log)
    more = ["--max-steps", 20, "--workers", workers]
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(flags(script, world, tmp_path / "out", *more))
    last = log_of(tmp_path / "out")[-1]["step"]
    said = capsys.readouterr().out
    assert 1 <= last < 20
    assert checkpoints.complete(tmp_path / "out")[-1].name == f"step-{last:07d}"
    assert f"{world.name}:4" in said and "3.wav does not exist" in said

    monkeypatch.undo()
    clip.write_bytes(sound)
    more = ["--max-steps", last + 1, "--resume", "auto"]
    SCRIPTS[script].main(flags(script, world, tmp_path / "out", *more))
    assert log_of(tmp_path / "out")[-1]["step"] == last + 1


def test_a_worker_that_dies_is_named(worlds, tmp_path, monkeypatch, capsys):
    parent, right = os.getpid(), data.collate

    def collate(*inputs, **options):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*inputs, **options)

    monkeypatch.setattr(data, "collate", collate)
    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        world = worlds["source_layer"]
        train_source_layer.main(flags("source_layer", world, tmp_path, "--max-steps", 2))
    assert "If a data worker died, lower --workers" in capsys.readouterr().err


def test_a_rotten_manifest_is_refused(tmp_path):
    """At the start: one line that is no JSON."""
    world = write("source_layer", tmp_path / "world")
    lines = world.read_text().splitlines()
    world.write_text("\n".join([*lines[:2], "{", *lines[3:]]))
    with pytest.raises(data.DataError, match="world.jsonl:3"):
        train_source_layer.main(flags("source_layer", world, tmp_path / "out", "--max-steps", 1))
    assert not (tmp_path / "out").exists()


def test_only_the_runs_own_folders_are_cleared(tmp_path):
    """What a user put beside the checkpoints stays; a checkpoint that is asked for does too."""
    newest = tmp_path / "step-0000002"
    for name in ("step-0000002", "step-0000003", "step-0000002-merged"):
        (tmp_path / name).mkdir()
    (newest / "checkpoint.json").write_text('{"step": 2, "updated": true}')
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text('{"dry_run": false}')
    assert checkpoints.start_folder(tmp_path, "auto") == newest
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-0000002", "step-0000002-merged", "step-notes.txt", "config.json"}

    (tmp_path / "config.json").write_text('{"dry_run": true}')
    assert checkpoints.start_folder(tmp_path, str(newest)) == newest and newest.exists()
    assert checkpoints.start_folder(tmp_path, None) is None and not newest.exists()
