"""A GPU's eight minutes (lab/gpu.py), rehearsed where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretend_gpu
import pytest
import torch

from lab import gpu, report_gpu

ROOT = Path(__file__).parents[2]
STEPS = [part.name for part in gpu.parts(True, Path(".")) if " step, " in part.name]


def test_what_is_stopped_leaves_what_it_had(tmp_path, monkeypatch):
    """A part of its own, which prints two lines and sleeps."""
    code = (
        "import sys, time; from lab.printed import Printed; out = Printed(sys.argv[-1]); "
        "out.table('loss', 'time, over ours', 'seconds'); out.row('ours', '1.00', '0.044'); "
        "time.sleep(99)"
    )
    (tmp_path / "lab.bench").write_text("")  # so that it is told where to write
    part = gpu.Part("fused losses", 9, ["-c", code, "lab.bench"])
    record = gpu.run(part, 3, tmp_path)
    assert record["ended"] == "stopped after 3 s" and record["seconds"] < 20
    assert record["printed"] == [
        {"columns": ["loss", "time, over ours", "seconds"], "rows": [["ours", "1.00", "0.044"]]}
    ]
    lines = report_gpu.report([record])
    assert "| ours | 1.00 | 0.044 |" in lines and "3 s, ended stopped after 3 s." in lines
    assert report_gpu.measured([record]) == {"loss": 0.044}


def test_the_minutes_are_shared_out_in_order(tmp_path, monkeypatch, capsys):
    """On 80 GB, with a clock that runs: what does not fit is said, and nothing else is begun."""
    now = [0.0]

    def run(part, limit, out):
        now[0] += limit
        return {"part": part.name, "ended": f"stopped after {limit:.0f} s"}

    monkeypatch.setattr(gpu, "gpu_gigabytes", lambda: 80.0)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "time", lambda: now[0])
    gpu.main(["--out", str(tmp_path / "out")])
    records = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [record["part"] for record in records] == [p.name for p in gpu.parts(False, tmp_path)]
    ended = [record["ended"].partition(":")[0].partition(" after")[0] for record in records]
    assert ended == ["stopped"] * 5 + ["not begun"] * 2 + ["stopped"] * 2 + ["not begun"]
    assert now[0] == pytest.approx(480)


def test_the_bounds_are_arithmetic():
    """L_top + L_SFT on an H200, by hand: 37.4 ms of products, 6.7 ms of passes."""
    bounds = report_gpu.loss_bounds(*report_gpu.CHIPS["H200, 141 GB"])
    products = 2 * 8192 * 151_936 * (3 * 3584 + 4096) / 989e12
    assert products == pytest.approx(0.0374, rel=0.01)
    assert bounds["L_top + L_SFT (paper A)"] == pytest.approx(products + 0.0067, rel=0.01)
    page = (ROOT / "docs/speed.md").read_text()
    assert "\n".join(report_gpu.bounds_table([])) in page
    for chip, rates in report_gpu.CHIPS.items():
        steps = report_gpu.step_bounds(*rates)
        assert sorted(steps) == sorted(STEPS) and all(0.01 < x < 1 for x in steps.values()), chip


@pytest.mark.slow
@pytest.mark.skipif(not pretend_gpu.LINKED.exists() or torch.cuda.is_available(), reason="")
def test_rehearsed_whole_on_the_pretended_gpu(tmp_path):
    """With models of a few thousand parameters, every part ends well."""
    shrink = "import test_bench; test_bench.shrink(dict.__setitem__)"
    # Peers make tensors on the GPU where no mode of Python's sees it, and run Triton
    shrink += "; import sys; sys.modules.update(liger_kernel=None, trl=None)"
    (tmp_path / "made").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lab.gpu", "--rehearse", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, **pretend_gpu.everywhere(tmp_path / "made", shrink)},
        timeout=1500,
    )
    assert done.returncode == 0
    records = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {r["part"]: r["ended"] for r in records} == {
        part.name: "well" for part in gpu.parts(True, tmp_path)
    }, [record["tail"] for record in records if record["ended"] != "well"]
    assert "no GPU, torch" in records[0]["printed"][0]
    assert report_gpu.measured(records).keys() >= set(STEPS)
