"""
A GPU's eight minutes: every open question about speed, most valuable first, on one GPU of 80 or
141 GB, on a bare machine without network.

    python -m lab.gpu --out runs/gpu                # at most 8 minutes; writes runs/gpu/gpu.json
    python -m lab.report_gpu runs/gpu/gpu.json      # that, as the rows of docs/speed.md
    python -m lab.gpu --rehearse --out runs/r       # the same, tiny, anywhere: at most 24 minutes

Each part is a process of its own with a limit of time, and gpu.json is written anew behind each:
what is stopped leaves the tables that it had. Models of 7B have random weights: nothing is
downloaded. What a machine with torch, transformers and peft may lack travels as wheels, 15 MB:

    pip download --no-deps --only-binary=:all: -d wheels liger-kernel trl datasets dill \\
        multiprocess soundfile cffi pycparser espeakng-loader num2words text2num
    pip install --no-index --no-deps wheels/*       # there
"""
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import write_json

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0               # for all parts together
PATIENCE = 3                # a rehearsal may take so many times as long


@dataclass
class Part:
    name: str
    seconds: float              # at most
    command: list[str]          # behind "python"
    gigabytes: float = 0        # of GPU memory that it needs


def parts(rehearse, out):
    bench = ["-m", "lab.bench"]
    losses = ["losses"]
    rollouts = ["rollouts"]
    size = ["--prompts", "2", "--seconds", "10", "--response-tokens", "100", "--steps", "2"]
    mini = []
    device = ["device"]
    if rehearse:
        device += ["--side", "256"]
        losses += ["--tokens", "256", "--hidden", "64", "--teacher-hidden", "64"]
        losses += ["--vocab", "1000", "--rounds", "1"]
        size = ["--layers", "1", "--prompts", "1", "--seconds", "1", "--response-tokens", "8",
                "--steps", "1", "--side", "256"]
        rollouts += ["--prompts", "2", "--rounds", "1", "--max-new-tokens", "8"]
        mini = ["--dry-run"]
    cord = ["step", "--script", "cord", "--shapes", "qwen2-audio-7b", *size]
    source = ["step", "--script", "source_layer", "--shapes", "qwen2.5-omni-7b+qwen3-8b", *size]
    lora = ["--lora", "64"]
    tests = ["-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "tests"]
    return [
        Part("the machine", 30, [*bench, *device]),
        Part("fused losses", 150, [*bench, *losses]),
        Part("a CORD step, LoRA", 80, [*bench, *cord, *lora]),
        Part("a paper A step, LoRA", 80, [*bench, *source, *lora]),
        Part("the tests marked gpu", 70, tests),
        Part("a CORD step, all weights", 80, [*bench, *cord], gigabytes=120),
        Part("a paper A step, all weights", 80, [*bench, *source], gigabytes=135),
        Part("rollouts of the mini world", 40, [*bench, *rollouts]),
        Part("paper A on the mini world", 120,
             ["train_source_layer.py", "--out", str(out / "a"), *mini]),
        Part("paper B on the mini world", 120, ["train_cord.py", "--out", str(out / "b"), *mini]),
    ]


def run(part, limit, out):
    """One part -> its record. Killed with its children behind `limit` seconds."""
    command = [sys.executable, *part.command]
    printed = out / "printed.json"
    printed.unlink(missing_ok=True)
    if "lab.bench" in command:
        command += ["--json", str(printed)]
    log = out / "log.txt"
    begun = time.time()
    ended = "well"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            if process.wait(limit):
                ended = f"with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tables = json.loads(printed.read_text()) if printed.exists() else []
    return {"part": part.name, "command": " ".join(["python", *part.command]), "ended": ended,
            "seconds": round(time.time() - begun, 1), "printed": tables,
            "tail": log.read_text(errors="replace")[-4000:]}


def gpu_gigabytes():
    """Of the first GPU, asked in a process that ends; 0 without one."""
    code = ("import torch; there = torch.cuda.is_available(); "
            "print(torch.cuda.mem_get_info()[1] / 1e9 if there else 0)")
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    return float(said.split()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a new folder for gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine")
    args = parser.parse_args(argv)
    begun = time.time()
    out = Path(args.out).resolve()
    out.mkdir(parents=True)
    records = []
    memory = gpu_gigabytes()
    patience = PATIENCE if args.rehearse else 1
    for part in parts(args.rehearse, out):
        left = patience * MINUTES * 60 - (time.time() - begun)
        limit = min(patience * part.seconds, left)
        if part.gigabytes > memory and not args.rehearse:
            ended = f"not begun: it needs {part.gigabytes:g} GB of GPU memory"
            record = {"part": part.name, "ended": ended}
        elif limit < 10:
            record = {"part": part.name, "ended": "not begun: no time was left"}
        else:
            record = run(part, limit, out)
        records.append(record)
        write_json(out / "gpu.json", records)
        print(f"{time.time() - begun:5.0f} s  {part.name}: {record['ended']}", flush=True)


if __name__ == "__main__":
    main()
