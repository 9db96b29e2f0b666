"""Many ranks and bad data, bad numbers, in both real scripts: two processes against one, sharded against not, steps that must be left out, clips that vanish."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import data
import test_train_cord
import test_train_source_layer
import train_cord
import train_source_layer
from plumbing import checkpoints
from plumbing import run as plumbing_run
from plumbing.optimizer import clip

ROOT = Path(__file__).parent.parent
SCRIPTS = {"source_layer": train_source_layer, "cord": train_cord}
STEPS = {"source_layer": train_source_layer.SourceLayerStep, "cord": train_cord.CordStep}
# answers of 64 tokens at a low temperature: some rollouts give the text view's answer and some do not, so that the group reward teaches something
USUAL = {"source_layer": ["--batch-size", "4", "--micro-batch", "1"],
         "cord": ["--batch-size", "4", "--micro-batch", "3", "--max-new-tokens", "64", "--group-temperature", "0.8", "--lr", "3e-5"]}
SAME = {"source_layer": ("loss", "top", "layer", "acoustic", "sft"), "cord": ("loss", "token", "group", "kl", "entropy", "reward", "signal", "length", "at_limit")}


def write(script, folder, n=8):
    folder.mkdir(parents=True, exist_ok=True)
    return test_train_source_layer.write_world(folder, n) if script == "source_layer" else test_train_cord.write_spoken(folder, n)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {script: write(script, tmp_path_factory.mktemp(script)) for script in SCRIPTS}


def flags(script, world, out, *more):
    return ["--data", str(world), "--out", str(out), "--no-eval", *USUAL[script], *map(str, more)]


def run(script, world, out, *more, ranks=1, **environment):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *start, str(ROOT / f"train_{script}.py"), *flags(script, world, out, *more)], cwd=ROOT, text=True, capture_output=True,
                          timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return log_of(out)


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def equal(ones, others, names, rel):
    assert [line["step"] for line in ones] == [line["step"] for line in others]
    for one, other in zip(ones, others):
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=rel, abs=1e-7), (one["step"], name)


# ------------------------------------------------------------- 1. many ranks -------------------------------------------------------------

@pytest.fixture(scope="module")
def alone(worlds, tmp_path_factory):
    """{script: folder of a run of ten steps by one process}, made when first asked for."""
    made = {}

    def of(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp(f"alone-{script}")
            run(script, worlds[script], made[script], "--max-steps", 10, "--save-every", 5)
        return made[script]
    return of


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_equal_one(script, worlds, alone, tmp_path):
    """Ten steps in float32: the same losses, CORD's rollouts to the token; weights that are equal to the last bit on both ranks (save_checkpoint looks)."""
    log = run(script, worlds[script], tmp_path, "--max-steps", 10, ranks=2)
    equal(log_of(alone(script)), log, SAME[script], 1e-5)
    if script == "cord":
        assert sum(line["signal"] for line in log) > 0 and len({line["length"] for line in log}) > 1          # the reward taught, on rollouts of many lengths
    one, two = (safetensors.torch.load_file(folder / "step-0000010" / "model.safetensors") for folder in (alone(script), tmp_path))
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-5, name


SHARDED = [("source_layer", []), ("source_layer", ["--checkpoint-activations", "--train", "decoder", "--text-kd", "skip:3"]), ("source_layer", ["--lora", "4"]),
           ("source_layer", ["--text-kd", "none", "--no-acoustic-kd"]), ("cord", []), ("cord", ["--checkpoint-activations", "--train", "all"]),
           ("cord", ["--lora", "4"]), ("cord", ["--teacher", "current"]), ("cord", ["--token-loss", "sft", "--group-size", "0"]), ("cord", ["--token-loss", "none"])]


@pytest.mark.slow
@pytest.mark.parametrize("script, more", SHARDED, ids=[" ".join([script, *more]) for script, more in SHARDED])
def test_sharded_equals_not(script, more, worlds, tmp_path):
    """FSDP2 on two gloo processes against one process, float32, five steps."""
    one = run(script, worlds[script], tmp_path / "one", "--max-steps", 5, *more)
    two = run(script, worlds[script], tmp_path / "two", "--max-steps", 5, "--shard", *more, ranks=2)
    equal(one, two, [name for name in (*SAME[script], "grad_norm") if name in one[0]], 1e-4)
    name = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    one, two = (safetensors.torch.load_file(tmp_path / n / "step-0000005" / name) for n in ("one", "two"))
    assert one.keys() == two.keys() and all((one[name] - two[name]).norm() <= 1e-4 * one[name].norm() + 1e-5 for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_sharded_16_bit_weights_train_save_and_go_on(script, worlds, tmp_path):
    """--weights bfloat16 --shard: the optimizer's 16 bits are each rank's own, a restart finds them, and DDP does about the same."""
    more = ["--max-steps", 4, "--save-every", 2, "--weights", "bfloat16"]
    whole = run(script, worlds[script], tmp_path / "ddp", *more, ranks=2)
    sharded = run(script, worlds[script], tmp_path / "fsdp", *more, "--shard", ranks=2)
    equal(whole, sharded, ["loss"], 0.02)
    again = run(script, worlds[script], tmp_path / "again", *more, "--shard", "--resume", tmp_path / "fsdp" / "step-0000002", ranks=2)
    equal(sharded[2:], again, ["loss", "grad_norm"], 1e-6)


def on_two_ranks(code, folder):
    (folder / "ranks.py").write_text("import torch\nfrom plumbing import checkpoints, ranks, run\nrank, world, device = ranks.start_distributed()\n" + code + "\nopen(f'{rank}.fine', 'w')\nranks.stop_distributed()\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"], cwd=folder, capture_output=True, text=True,
                          timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (folder / "0.fine").exists() and (folder / "1.fine").exists(), done.stderr[:2000] + done.stderr[-2000:]


def test_a_shard_is_a_share(worlds, tmp_path):
    """What a rank holds of a sharded model is its part of it; `whole` and `full` give it back, and inside `whole` ranks may run it differently often: they wait for
    none. What goes into it keeps its type."""
    on_two_ranks(f"""
import data, mini_world, models, rollout
from torch.distributed.tensor import DTensor
model, processor = models.load_audio_model(mini.world.MINI / "student")
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
examples = data.read_manifest({str(worlds["cord"])!r})[:3]
ask = lambda: rollout.generate(model, processor, examples, view="text", words="transcript", batch_size=1, max_new_tokens=4 + 4 * rank, progress=False)
answers = ask()
ranks.shard(model, models.blocks(model))
held = sum(p.to_local().numel() for p in model.parameters())
assert abs(held - sum(p.numel() for p in before.values()) / 2) < 10_000, held
assert all(torch.equal(ranks.full(p), before[name]) for name, p in model.named_parameters())
seen = ranks.whole(model, lambda: [name for name, p in model.named_parameters() if not isinstance(p, DTensor) and torch.equal(p, before[name])])
assert len(seen) == len(before) and all(isinstance(p, DTensor) for p in model.parameters())
assert ranks.whole(torch.nn.Linear(1, 1), lambda: 3) == 3
assert ranks.whole(model, ask) == answers and len(answers) == 3                # rank 0 has two of the questions, rank 1 one

reader, tokenizer = models.load_text_model(mini.world.MINI / "teacher")
prompt, decoder = torch.tensor([tokenizer.encode("what animal do you hear")]), models.decoder(reader.requires_grad_(False))
read = lambda: decoder(input_ids=prompt).last_hidden_state
right = read()
ranks.shard_reader(decoder, reader.get_output_embeddings())
found = ranks.whole(decoder, lambda: [read() for _ in range(3 * rank)]) + [read(), read()]        # rank 0 has nothing to read inside `whole`, rank 1 much
assert len(found) == 2 + 3 * rank and all(torch.equal(one, right) for one in found)
assert all(isinstance(p, DTensor) for p in decoder.parameters()) and not decoder._get_fsdp_state()._comm_ctx.post_forward_order

class Step(torch.nn.Linear):
    def forward(self, chunk):
        assert chunk["advantage"].dtype == torch.float32 and self.weight.dtype == torch.bfloat16
        return super().forward(chunk["advantage"].bfloat16()).sum()
step = ranks.shard(Step(2, 2), compute=torch.bfloat16)
step({{"advantage": torch.ones(2)}}).backward()
assert step.weight.grad.dtype == torch.float32
""", tmp_path)
    with pytest.raises(SystemExit, match="--shard shares .* torchrun --nproc_per_node N"):
        train_cord.main(["--shard", "--data", "any.jsonl"])


def test_a_folder_that_is_not_the_same_for_all_is_refused(tmp_path):
    on_two_ranks("""
checkpoints.same_folder("shared")
ranks.wait_for_all()
assert not any(run.Path("shared").iterdir())
try:
    checkpoints.same_folder(f"of-rank-{rank}")
except SystemExit as error:
    assert "is not the same folder for all: rank 1 does not see what rank 0 writes there" in str(error)
else:
    raise AssertionError
assert ranks.of_rank_zero(rank + 7) == 7
""", tmp_path)


# ------------------------------------------------------- 2. numbers that go wrong --------------------------------------------------------

def spoil(monkeypatch, script, steps, value=math.nan):
    """The loss of these steps (counted from 1) is multiplied by `value`."""
    right, seen = STEPS[script].forward, {}

    def forward(self, batch, *rest):
        out = right(self, batch, *rest)
        parts = out if script == "source_layer" else out[0]
        if seen["step"] in steps:
            parts["loss"] = parts["loss"] * value
        return out

    def seed_step(seed, step, rank):
        seen["step"] = step + 1
    monkeypatch.setattr(STEPS[script], "forward", forward)
    monkeypatch.setattr(plumbing_run, "seed_step", seed_step)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_with_a_spoilt_loss_is_left_out(script, worlds, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, script, {2})
    SCRIPTS[script].main(flags(script, worlds[script], tmp_path, "--max-steps", 3, "--save-every", 1, "--keep", 9))
    one, two, three = log_of(tmp_path)
    assert two["step"] == 2 and "nan" in two["skipped"] and "loss" not in two and len(two["ids"]) == 4 and "loss" in three
    weights = [safetensors.torch.load_file(tmp_path / f"step-000000{n}" / "model.safetensors") for n in (1, 2, 3)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) and any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert "step 2 is left out: its loss is nan" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_spoils_a_step_too(worlds, tmp_path, monkeypatch):
    right, calls = clip, []
    monkeypatch.setattr(train_source_layer, "clip", lambda *a: calls.append(1) or (math.inf if len(calls) == 1 else right(*a)))
    train_source_layer.main(flags("source_layer", worlds["source_layer"], tmp_path, "--max-steps", 2))
    one, two = log_of(tmp_path)
    assert "norm inf" in one["skipped"] and len(one["ids"]) == 4 and math.isfinite(two["grad_norm"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_five_in_a_row_stop_the_run_with_a_checkpoint(script, worlds, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, script, set(range(2, 20)), math.inf)
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(flags(script, worlds[script], tmp_path, "--max-steps", 20))
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6] and checkpoints.complete(tmp_path)[-1].name == "step-0000006"
    assert "not finite in 5 steps in a row" in (said := capsys.readouterr().out) and "lower --lr" in said and "step-0000006" in said


@pytest.mark.parametrize("script, part, words", [("source_layer", "forward", "the forward pass, with 1 examples of up to"), ("cord", "forward", "the forward pass, with 3 rollouts of up to"),
                                                 ("source_layer", "calibrate", "the calibration, with 1 examples of up to"),
                                                 ("cord", "roll_out", "the rollouts, with 20 rollouts of up to"), ("cord", "read", "the text view, with 3 rollouts")])
def test_out_of_memory_is_one_sentence(script, part, words, worlds, tmp_path, monkeypatch):
    def full(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    monkeypatch.setattr(train_cord.rollout if part == "roll_out" else STEPS[script], part, full)
    with pytest.raises(SystemExit, match=f"^out of memory in {words}.* tokens each; lower --.*--shard$"):
        SCRIPTS[script].main(flags(script, worlds[script], tmp_path, "--max-steps", 2))


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shape"), plumbing_run.out_of_memory_named({}):
        raise RuntimeError("shape mismatch")


# ------------------------------------------------------------- 3. bad data ---------------------------------------------------------------

def dying(tmp_path, script, when, what):
    """A world of its own, and a log_step that does `what(folder)` behind step `when`."""
    world, right = write(script, tmp_path / "world"), plumbing_run.log_step

    def log_step(line, *a, **k):
        right(line, *a, **k)
        if line["step"] == when:
            what(world.parent)
    return world, log_step


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_clip_that_vanishes_is_skipped_and_counted(script, workers, tmp_path, monkeypatch, capsys):
    world, log_step = dying(tmp_path, script, 1, lambda folder: (folder / "3.wav").unlink())
    monkeypatch.setattr(plumbing_run, "log_step", log_step)
    run_flags = flags(script, world, tmp_path / "out", "--max-steps", 6, "--workers", workers)
    SCRIPTS[script].main([*run_flags, "--skip-bad", "1"])
    skipped, = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped["id"].endswith("3") and "3.wav does not exist" in skipped["fault"] and f"{world.name}:4" in skipped["fault"]
    assert len(log_of(tmp_path / "out")) == 6 and all("loss" in line for line in log_of(tmp_path / "out"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_more_than_allowed_stops_the_run_with_a_checkpoint(script, tmp_path, monkeypatch, capsys):
    world, log_step = dying(tmp_path, script, 1, lambda folder: (folder / "3.wav").unlink())
    monkeypatch.setattr(plumbing_run, "log_step", log_step)
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(flags(script, world, tmp_path / "out", "--max-steps", 20))
    last = log_of(tmp_path / "out")[-1]["step"]
    assert 1 < last < 20 and checkpoints.complete(tmp_path / "out")[-1].name == f"step-{last:07d}"
    assert "1 training examples could not be used, and --skip-bad allows 0" in capsys.readouterr().out
    with pytest.raises(data.DataError, match=f"{world.name}:4.*does not exist"):                             # now the check at the start finds it
        SCRIPTS[script].main(flags(script, world, tmp_path / "out", "--max-steps", 20, "--resume", "auto"))
    monkeypatch.undo()
    SCRIPTS[script].main(flags(script, world, tmp_path / "out", "--max-steps", last + 1, "--resume", "auto", "--skip-bad", 1))
    assert "left out: " in (said := capsys.readouterr().out) and "3.wav" in said and log_of(tmp_path / "out")[-1]["step"] == last + 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_is_gone_stops_the_run_with_a_checkpoint(script, tmp_path, monkeypatch, capsys):
    world, log_step = dying(tmp_path, script, 2, lambda folder: [path.unlink() for path in folder.glob("*.wav")])
    monkeypatch.setattr(plumbing_run, "log_step", log_step)
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(flags(script, world, tmp_path / "out", "--max-steps", 20, "--skip-bad", 100, "--workers", 0))
    assert checkpoints.complete(tmp_path / "out")[-1].name == "step-0000002"
    assert "none of the 4 examples of a step can be used" in (said := capsys.readouterr().out) and "step-0000002: go on with --resume auto" in said


def test_what_stands_in_is_the_same_on_any_number_of_ranks():
    class Example:
        def __init__(self, name):
            self.id = name

    batch = [Example(name) for name in "abcdef"]

    def make(some):
        if bad := [e.id for e in some if e.id in "bcf"]:
            raise data.DataError(f"{bad[0]} is rotten")
        return [e.id for e in some]

    whole, faults = run.without_bad(make, batch, batch)
    assert whole == list("addde" "a") and faults.keys() == set("bcf") and faults["b"] == "b is rotten"
    halves = [run.without_bad(make, part, batch) for part in (batch[:3], batch[3:])]
    assert halves[0][0] + halves[1][0] == whole and [found.keys() for _, found in halves] == [set("bc"), {"f"}]
    with pytest.raises(data.DataError, match="none of the 2 .* b is rotten"):
        run.without_bad(make, batch[1:3], batch[1:3])


def test_a_worker_that_dies_is_named(worlds, tmp_path, monkeypatch):
    parent, right = os.getpid(), data.collate

    def collate(some, *a, **k):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(some, *a, **k)
    monkeypatch.setattr(data, "collate", collate)
    with pytest.raises(SystemExit, match="a data worker died .*while train-(sound|music)-.* were read; .*lower --workers"):
        train_source_layer.main(flags("source_layer", worlds["source_layer"], tmp_path, "--max-steps", 2))


def test_a_rotten_manifest_is_refused_or_left_out(tmp_path, capsys):
    """At the start: one line that is no JSON and one clip that is text, of eight."""
    world = write("source_layer", tmp_path / "world")
    lines = world.read_text().splitlines()
    world.write_text("\n".join([*lines[:2], "{", *lines[3:]]))
    (tmp_path / "world" / "5.wav").write_text("this is no sound")
    for allowed in (0, 1):
        with pytest.raises(data.DataError, match="world.jsonl:3"):
            train_source_layer.main(flags("source_layer", world, tmp_path / "out", "--max-steps", 1, "--skip-bad", allowed))
    assert not (tmp_path / "out").exists()
    train_source_layer.main(flags("source_layer", world, tmp_path / "out", "--max-steps", 1, "--skip-bad", 2))
    said, listed = capsys.readouterr().out, (tmp_path / "out" / "skipped.jsonl").read_text()
    assert all(where in said and where in listed for where in ("world.jsonl:3", "world.jsonl:6")) and "6 examples to learn from" in said
