"""Files that promise to be copied by themselves: each alone in an empty directory, with our other
files and all requirements but torch out of reach, is imported and run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Found nowhere, although installed: every requirement but torch and what torch itself imports
BLOCK = """
import sys
for name in ("transformers safetensors peft soundfile scipy sklearn matplotlib pyarrow pylatexenc "
             "num2words espeakng_loader soxr tqdm tokenizers huggingface_hub accelerate data "
             "losses fused layer_map sampler rollout judge models plumbing mini lab prepare").split():
    if name != NAME:
        sys.modules[name] = None
"""  # noqa: E501

RUN = {
    "losses.py": """
import torch, losses
z, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
loss = losses.jsd(z, t) + losses.hidden_mse(z, t)
(loss + losses.cross_entropy(z, torch.tensor([1, -100, 4]))).backward()
assert z.grad.isfinite().all() and (z.grad != 0).all()
""",
    "fused.py": """
import torch, fused
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
t, labels = (torch.randn(3, 4), torch.randn(9, 4)), torch.tensor([1, -100, 4])
fused.jsd_ce(h, w, *t, labels, chunk_tokens=2)[0].backward()
fused.cord(h, w, *t, labels.abs() % 9, lengths=[3], carries_kl=torch.ones(3).bool(),
           advantage=torch.ones(3), temperature=torch.ones(3))[0].backward()
fused.hidden_jsd(h, t[0]).backward()
assert h.grad.isfinite().all() and w.grad.isfinite().all() and (w.grad != 0).all()
fused.the_idea(h.detach(), w.detach(), *t)
""",
    "layer_map.py": """
import torch, layer_map
assert layer_map.pairs(28, 36, every=7) == [(7, 9), (14, 18), (21, 27), (28, 36)]
layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
tap = layer_map.Tap(layers, {"all": [1, 2]})
with tap.at(all=torch.tensor([0, 5])) as hidden:
    layers[1](layers[0](torch.randn(2, 3, 4)))
assert hidden["all"][2].shape == (2, 4)
projections = layer_map.Projections([(1, 1)], 4, 6)
projections.fit(0, torch.randn(20, 4), torch.randn(20, 6))
assert projections(0, hidden["all"][1]).shape == (2, 6)
""",
    "sampler.py": """
import torch, sampler
choose = sampler.chooser(["7 a", "7 b"], 1, [0], max_new_tokens=3, temperature=0.7)
scores = choose(torch.zeros(2, 1, dtype=torch.int64), torch.randn(2, 9))
assert (scores > -1).sum() == 2 and (scores[:, 0] == -torch.inf).all()
""",
    "plumbing/optimizer.py": """
import torch, optimizer
p = torch.nn.Parameter(torch.ones(8).bfloat16())
p.grad = torch.ones_like(p)
step = optimizer.SplitAdamW([p], lr=1e-4, weight_decay=0.0)
for _ in range(3):
    step.step()
assert (optimizer.join(p.detach(), step.state[p]["low"]) - (1 - 3e-4)).abs().max() < 1e-6
""",
}


@pytest.mark.parametrize("path", RUN)
def test_it_runs_alone(path, tmp_path):
    shutil.copy(ROOT / path, tmp_path)
    name = Path(path).stem
    code = f"NAME = {name!r}\n{BLOCK}\n{RUN[path]}"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_is_not_there_is_noticed(tmp_path):
    """The same test of a file that does import another of ours."""
    shutil.copy(ROOT / "rollout.py", tmp_path)
    ran = subprocess.run([sys.executable, "-c", f"NAME = 'rollout'\n{BLOCK}\nimport rollout"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode != 0 and "ModuleNotFoundError" in ran.stderr
