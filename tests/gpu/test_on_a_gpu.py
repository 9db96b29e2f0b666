"""On a real GPU, if there is one: the fused losses and the optimizer in their compiled form.

    python -m pytest -o addopts= -m gpu tests
"""

import argparse

import pytest
import torch

from lab import bench
from plumbing import optimizer as split_adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("vocab", [20_000, 20_001])
@pytest.mark.parametrize("case", bench.CASES)
def test_the_fused_losses_against_the_formula_in_float64(case, vocab):
    """From bfloat16 inputs. (The formula's own error is that of its bfloat16 logits.)"""
    sizes = argparse.Namespace(tokens=256, hidden=256, teacher_hidden=320, vocab=vocab)
    loss, gradients = bench.exactness(case, sizes, torch.device("cuda"))["ours"]
    assert loss < 1e-2 and gradients < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_optimizer_is_the_eager_one(dtype):
    torch.manual_seed(0)
    start, gradients = torch.randn(300, 70), torch.randn(20, 300, 70)
    after = {}
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(start.clone().to(device, dtype))
        optimizer = split_adamw.SplitAdamW([p], lr=1e-4)
        for gradient in gradients:
            p.grad = gradient.to(device, dtype)
            optimizer.step()
        after[device] = p.detach().cpu().float()
    moved = (after["cpu"] - start.to(dtype).float()).norm()
    assert (after["cuda"] - after["cpu"]).norm() < 1e-2 * moved
