"""Files that promise to be copied by themselves: each alone in an empty directory, with our other
files and all requirements but torch out of reach, is imported and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# After torch, nothing can be imported: no other requirement, and of ours the one file alone
BLOCK = """
import sys
import torch
for name in ("transformers safetensors peft soundfile scipy sklearn matplotlib pyarrow pylatexenc "
             "num2words espeakng_loader soxr tqdm tokenizers huggingface_hub accelerate data "
             "losses fused layer_map sampler rollout judge models plumbing mini lab "
             "prepare").split():
    if name != NAME:
        sys.modules[name] = None
"""

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


# Each in a fork of one process that has imported torch, in its own directory
FORKS = """
import os, sys, traceback
import torch, torch._dynamo
for folder, name, code in CASES:
    if os.fork() == 0:
        os.chdir(folder)
        sys.path[:] = [folder, *(p for p in sys.path if p)]
        exec(code, {"NAME": name})
        os._exit(0)
    if os.wait()[1]:
        print("failed:", name)
"""


def run_alone(folder, codes):
    """{path: code} -> the names of the files whose code fails, each copied to its own folder."""
    cases = []
    for path, code in codes.items():
        name = Path(path).stem
        (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / path, folder / name)
        cases.append((str(folder / name), name, BLOCK + code))
    ran = subprocess.run([sys.executable, "-c", f"CASES = {cases!r}\n{FORKS}"], cwd=folder,
                         capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 or "failed:" in ran.stdout, ran.stderr
    return re.findall("failed: (.*)", ran.stdout), ran.stderr


def test_each_runs_alone(tmp_path):
    """And rollout.py, which does import others of ours, is noticed not to."""
    failed, said = run_alone(tmp_path, {**RUN, "rollout.py": "import rollout"})
    assert failed == ["rollout"] and "ModuleNotFoundError" in said, said
