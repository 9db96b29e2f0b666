"""What is written for GPUs, run on a GPU that is not there (pretend_gpu.py): both scripts, on one
and, sharded, on two, and what a GPU would refuse."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bad_days
import pytest
import torch
from pretend_gpu import LINKED
from test_train_cord import write_spoken
from test_train_source_layer import write_world

pytestmark = pytest.mark.skipif(
    sys.platform != "linux"
    or not shutil.which("g++")
    or not shutil.which("nm")
    or not LINKED.exists()
    or torch.cuda.is_available(),
    reason="the pretended driver is compiled by g++, for Linux and a torch that knows CUDA",
)

ROOT = Path(__file__).parents[2]


def run(script, *flags, ranks=1):
    """A script on the pretended GPU, in processes of its own, which must end well. -> what rank 0
    said"""
    started, said = [], [tempfile.TemporaryFile("w+") for _ in range(ranks)]
    together = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(bad_days.free_port()),
    }
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **together} if ranks > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests/gpu/pretend_gpu.py"), str(script), *flags],
                text=True,
                cwd=ROOT,
                stdout=said[rank],
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
            )
        )
    try:
        codes = [process.wait(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    said = [file.seek(0) or file.read() for file in said]
    assert not any(codes), "\n".join(said)[-4000:]
    return said[0]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{script: a manifest of eight clips}"""
    write = {"train_source_layer.py": write_world, "train_cord.py": write_spoken}
    return {name: make(tmp_path_factory.mktemp("world"), 8) for name, make in write.items()}


def losses_of(script, world, out, *flags, gpu, ranks=1):
    flags = ["--data", str(world), "--dry-run", "--no-eval", "--out", str(out), *flags]
    if gpu:
        said = run(ROOT / script, *flags, ranks=ranks)
    else:
        name = script.removeprefix("train_").removesuffix(".py")
        cpu = bad_days.fork(name, flags, out)
        assert cpu.wait() == 0, cpu.text()[-4000:]
        said = cpu.text()
    assert ("cuda:0" in said) == gpu
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# for bfloat16; CORD's few rollouts may go another way at a word that is as likely as the next
TOLERANCE = {
    "train_source_layer.py": dict.fromkeys(("loss", "top", "sft", "layer", "grad_norm"), 0.05),
    "train_cord.py": {"kl": 0.2, "entropy": 0.2},
}


def nearly_equal(script, one, other):
    for a, b in zip(one, other, strict=True):
        for name, tolerance in TOLERANCE[script].items():
            assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)


@pytest.mark.parametrize(
    "script, flags",
    [
        pytest.param(
            "train_source_layer.py",
            ("--batch-size", "8", "--micro-batch", "8"),
            marks=pytest.mark.slow,
        ),
        ("train_cord.py", ("--batch-size", "2", "--weights", "bfloat16", "--max-new-tokens", "12")),
    ],
)
def test_a_gpu_says_what_a_cpu_says(script, flags, worlds, tmp_path):
    nearly_equal(
        script,
        losses_of(script, worlds[script], tmp_path / "gpu", *flags, gpu=True),
        losses_of(script, worlds[script], tmp_path / "cpu", *flags, gpu=False),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_source_layer.py", ("--weights", "bfloat16")),
        ("train_source_layer.py", ("--lora", "4")),
        ("train_cord.py", ("--batch-size", "4")),
        ("train_cord.py", ("--batch-size", "4", "--lora", "4")),
    ],
)
def test_two_gpus_say_what_one_says(script, flags, worlds, tmp_path):
    """Sharded. NCCL is gloo here, but takes no tensor of a CPU's."""
    nearly_equal(
        script,
        losses_of(script, worlds[script], tmp_path / "two", *flags, "--shard", gpu=True, ranks=2),
        losses_of(script, worlds[script], tmp_path / "one", *flags, gpu=True),
    )


def test_what_a_gpu_would_refuse_is_refused(tmp_path):
    (tmp_path / "wrong.py").write_text("""
import torch, torch.distributed as dist
there, here = torch.ones(3, device="cuda", requires_grad=True), torch.ones(3)
# numbers may come from anywhere
(there * 2.0 + here.cuda() * here[0]).sum().backward()
assert there.grad.is_cuda and there.grad.tolist() == [2, 2, 2] and (there.detach().cpu() + here).tolist() == [2, 2, 2]
layer = torch.nn.Linear(3, 2).to("cuda")
with torch.autocast("cuda", torch.bfloat16):
    assert layer(there).dtype == torch.bfloat16
for wrong in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()], lambda: layer(here), lambda: there.detach().numpy(), lambda: dist.all_reduce(here),
              lambda: torch.stack([there[0], here[0]]), lambda: there.detach().index_put_((here.long(),), here), lambda: here.index_put_((there.long(),), there.detach())):
    try:
        wrong()
    except (RuntimeError, TypeError) as error:
        print("refused:", error)
""")  # noqa: E501
    said = run(tmp_path / "wrong.py")
    assert said.count("refused:") == 9 and said.count("between devices") == 7, said
