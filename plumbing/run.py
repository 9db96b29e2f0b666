"""
The run: what both training scripts need around their loops, and no paper is about.

    with Run(args) as run:                          # ranks, device, folder, signals
        for step, batch in run.batches(examples, prepare):
            for part in run.accumulate(model, parts):
                run.note(loss=loss)                 # summed over parts and ranks
            if run.finite(norm):                    # the same answer on every rank
                optimizer.step()
            run.log(step)                           # log.jsonl, the bar, a line in the terminal
            run.save_or_stop(step)                  # checkpoints; a signal ends the run with one

It holds no forward, no loss and no schedule. On N ranks every rank calls every method.
"""
import contextlib
import ctypes
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.data
from tqdm import tqdm

import data
from plumbing import checkpoints, ranks
from plumbing.files import append_jsonl, open_log, read_json, replace_text, write_json

NOT_FINITE = 5              # steps in a row without a finite loss and gradient that end a run


# ---------------------------------------------------------------------------------------------
# 1. Flags, and the order of the examples

def add_run_flags(parser, *, out):
    """The flags that are the same in both training scripts."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the order of the examples and of every draw")
    add("--out", default=out, help="folder for log, checkpoints, samples, results and figure")
    add("--max-steps", type=int, help="stop here, whatever --epochs says")
    add("--no-eval", action="store_true", help="train only")
    add("--dry-run", action="store_true", help="two steps and a small evaluation, then stop")
    add("--workers", type=int, default=1, help="processes a rank that prepare the next steps' clips")
    # many GPUs
    add("--shard", action="store_true", help="FSDP2: every rank holds its share of all weights")
    add("--checkpoint-activations", action="store_true",
        help="run each decoder layer again in backward instead of keeping what is inside it")
    # long runs
    add("--save-every", type=int, default=100, help="steps between checkpoints; one at the end too")
    add("--keep", type=int, default=2, metavar="K", help="newest checkpoints that stay")
    add("--resume", help="auto (the newest checkpoint in --out, if any) or a checkpoint's folder")


def check_run_flags(args, parser):
    if min(args.save_every, args.keep) < 1 or args.workers < 0:
        parser.error("--save-every and --keep are at least 1, --workers at least 0")


def examples_of_step(examples, step, batch_size, seed):
    """The global batch of a step, a pure function of (seed, step).

    So a resumed run, on any number of ranks, sees the same batches. Every epoch is its own
    permutation, and batches run on across its end."""
    batch, orders = [], {}
    for row in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(row, len(examples))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(examples), generator=generator)
        batch.append(examples[orders[epoch][place]])
    return batch


# ---------------------------------------------------------------------------------------------
# 2. The run

class Run:
    """One training run, on this rank. `rank`, `world` (how many ranks), `device`, `out` (a Path),
    `done` and `steps` (how many steps are done, and how many there will be) can be read."""

    def __init__(self, args):
        self.args = args
        self.started = time.time()
        self.rank, self.world, self.device = ranks.start_distributed()
        if args.shard and self.world == 1:
            raise SystemExit("--shard shares the weights among ranks, and this is one process; "
                             "start it with torchrun --nproc_per_node N")
        self.out = Path(args.out)
        self.done = 0
        self.steps = 0
        self.checkpoint_parts = {}          # what checkpoints.save takes: model, optimizer, ...
        self.last_checkpoint = None
        self.signals = []
        self.bad_steps = 0                  # in a row
        self.source = None                  # of the examples, see `batches`
        torch.manual_seed(args.seed)

    def __enter__(self):
        self._handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note_signal)
        return self

    def __exit__(self, kind, error, traceback):
        if self.source is not None:
            self.source.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            ranks.stop_distributed()
        elif kind in (torch.OutOfMemoryError, MemoryError) or "can't allocate memory" in str(error):
            print("out of memory: lower --micro-batch or --eval-batch, shorten clips and answers, "
                  "or use --checkpoint-activations, --lora RANK, --weights bfloat16 or --shard",
                  file=sys.stderr)

    def _note_signal(self, number, _):
        # The step ends and all ranks save. A second signal, not the copy that torchrun passes on
        # at once, is meant: it ends the process.
        if self.signals and time.monotonic() - self.signals[-1] > 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signals.append(time.monotonic())

    def say(self, *words):
        """print, on rank 0 alone, above the progress bar."""
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))

    # -- before the loop

    def read_data(self, train_file, eval_files, *, require):
        """-> the training examples, those to evaluate on, the durations of all clips.

        Both manifests are read and every clip is decoded before anything trains. Raises
        data.DataError at the first fault."""
        limit = 16 if self.args.dry_run and self.args.data else None
        examples, seconds = data.check_clips(
            data.read_manifest(train_file, require=require), self.args.max_seconds)
        scored, more = data.check_clips(
            data.read_manifests(eval_files, limit=limit), self.args.max_seconds)
        return examples, scored, seconds + more

    def start(self, steps, logs=("log",)):
        """Make the folder this run's -> the checkpoint to go on from, or None."""
        checkpoints.claim(self.out)
        checkpoint = checkpoints.find(self.out, self.args.resume, self.args.dry_run)
        checkpoints.start_folder(self.out, checkpoint)
        self.last_checkpoint = checkpoint
        self.steps = steps
        if checkpoint is not None:
            self.done = read_json(checkpoint / "checkpoint.json")["step"]
        if self.rank == 0:
            facts = {**vars(self.args), **_facts(), "ranks": self.world, "steps": steps}
            write_json(self.out / "config.json", facts)
            for name in logs:
                open_log(self.out / f"{name}.jsonl", self.done)
        return checkpoint

    def known(self, when, questions):
        """An evaluation of these questions that an earlier part of this run saved, or None."""
        saved = read_json(self.out / f"{when}.json") or {}
        if self.done == 0 or saved.get("asked") != questions:
            saved = None
        return ranks.of_rank_zero(saved)

    def evaluated(self, when, results, questions):
        """Write an evaluation down -> its results without the samples."""
        samples = results.pop("samples")
        results["asked"] = questions
        if self.rank == 0:
            lines = "".join(json_line(sample) for sample in samples)
            replace_text(self.out / f"samples-{when}.jsonl", lines)
            write_json(self.out / f"{when}.json", results)
        return results
