"""
The run: what both training scripts need around their loops, and no paper is about.

    with Run(args) as run:                          # ranks, device
        for step, batch in run.batches(examples, prepare):      # from here on signals wait
            for part in run.accumulate(parts):
                run.note(loss=loss)                 # summed over parts and ranks
            if run.finite(norm):                    # the same answer on every rank
                optimizer.step()
            run.log(step, ids)                      # log.jsonl, a line in the terminal
            run.save_or_stop()                      # checkpoints; a signal ends the run with one

It holds no forward, no loss and no schedule. On N ranks every rank calls every method.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.utils.data
import transformers
from torch.nn.parallel import DistributedDataParallel

import data
import models
from plumbing import check, checkpoints, plots, ranks, saving, tracking
from plumbing.files import append_jsonl, keep_lines, read_json, replace_text, write_json

NOT_FINITE = 5              # steps in a row without a finite loss and gradient that end a run
OUT_OF_MEMORY = ("MemoryError", "out of memory", "allocate memory", "DataLoader worker (pid")


# ---------------------------------------------------------------------------------------------
# 1. Flags, and the order of the examples

def flag_parser(opening):
    """-> (parser, add). add(flag, default, help): a flag of its default's type, a bool a switch."""
    parser = argparse.ArgumentParser(
        description=opening.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag, default, help, **options):
        if default is True:
            options["action"] = argparse.BooleanOptionalAction
        elif default is False:
            options["action"] = "store_true"
        elif isinstance(default, (int, float, str)):
            options["type"] = type(default)
        parser.add_argument(flag, default=default, help=help, **options)

    return parser, add


def add_run_flags(add, *, out):
    """The flags that are the same in both training scripts."""
    add("--clip", 1.0, "largest gradient norm")
    add("--weights", "float32", "bfloat16: 10 bytes a parameter, not 16 (plumbing/optimizer.py)",
        choices=["float32", "bfloat16"])
    add("--lora", 0, "learn adapters of this rank alone, by peft; 0: the weights themselves")
    add("--seed", 0, "of the order of the examples and of every draw")
    add("--out", out, "folder for log, checkpoints, samples, results and figure")
    add("--max-steps", None, "so many steps, whatever --epochs says", type=int)
    add("--eval-every", 0, "steps between evaluations; 0: before and after alone")
    add("--eval-batch", 64, "questions answered at once on one rank")
    add("--no-eval", False, "train only")
    add("--track", None, "send the log's numbers there too (plumbing/tracking.py)",
        choices=["wandb", "tensorboard", "trackio"])
    add("--dry-run", False, "two steps and a small evaluation of everything, then stop")
    add("--workers", 1, "processes on each rank that prepare the next steps' clips")
    # many GPUs
    add("--shard", False, "FSDP2: every rank holds its share of all weights")
    add("--checkpoint-activations", False, "keep each layer's input alone, and run it again")
    # long runs
    add("--save-every", 100, "steps between checkpoints; one is written at the end too")
    add("--keep", 2, "newest checkpoints that stay")
    add("--resume", None, "auto (the newest checkpoint in --out, if any) or a checkpoint's folder")


def check_run_flags(args, parser):
    ones = (
        "batch_size micro_batch eval_batch text_batch max_new_tokens max_steps save_every "
        "show_every keep"
    )
    zeros = "workers lora eval_every tower_lr lower_lr corrupt_descriptions"
    limits = {**dict.fromkeys(ones.split(), 1), **dict.fromkeys(zeros.split(), 0)}
    for name, least in limits.items():
        value = vars(args).get(name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is at least {least}")
    if args.epochs <= 0:
        parser.error("--epochs is above 0")
    if args.dry_run and args.resume:
        parser.error("--dry-run starts from nothing: leave --resume out, and give another --out "
                     "than that of a real run")
    if args.track and importlib.util.find_spec(args.track) is None:
        parser.error(f"--track {args.track} needs its package: pip install {args.track}")


def examples_of_step(examples, step, batch_size, seed):
    """The global batch of a step, a pure function of (seed, step).

    So a resumed run, on any number of ranks, sees the same batches. Every epoch is its own
    permutation, and batches run on across its end."""
    epoch, start = divmod(step * batch_size, len(examples))
    rows = []
    while len(rows) < start + batch_size:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        rows += torch.randperm(len(examples), generator=generator).tolist()
        epoch += 1
    return [examples[row] for row in rows[start:start + batch_size]]


# ---------------------------------------------------------------------------------------------
# 2. The run

class Run:
    """One training run, on this rank.

    To be read: rank, world (the number of ranks), device, frozen_dtype and student_dtype, out (the
    run's folder, a Path), done and steps (how many steps are done, and how many there will be);
    after `finite` also totals and seconds, the step's sums over all ranks and its laps. To be set
    before the loop: checkpoint_parts, what checkpoints.save wants. Every rank calls every
    method."""

    def __init__(self, args):
        self.args = args
        self.started = time.time()
        self.rank, self.world, self.device = ranks.start_distributed()
        if args.shard and self.world == 1:
            raise SystemExit("--shard shares the weights among ranks, and this is one process; "
                             "start it with torchrun --nproc_per_node N")
        self.out = Path(args.out)
        self.done = 0
        self.model = None                   # what `wrap` gives; nothing is sharded before
        self.at_end = contextlib.ExitStack()            # what is undone when the loop ends
        self.signals = []                   # SIGTERM and Ctrl-C, as they came
        self.bad_steps = 0                  # in a row
        self.clock = self.started           # when the step began

        # Only what an optimizer updates needs float32
        self.frozen_dtype = torch.float32
        if self.device.type == "cuda" or args.weights == "bfloat16":
            self.frozen_dtype = torch.bfloat16
        self.student_dtype = self.frozen_dtype if args.lora else getattr(torch, args.weights)
        torch.manual_seed(args.seed)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.at_end.close()
        if kind is None:
            self.model = None               # DDP's reducer must go before its process group
            ranks.stop_distributed()
        elif any(sign in repr(error) for sign in OUT_OF_MEMORY):
            print(
                "Out of memory: lower --micro-batch or --eval-batch, shorten clips and answers, "
                "or use --checkpoint-activations, --lora RANK, --weights bfloat16 or --shard. If a "
                "data worker died, lower --workers. Go on with --resume auto.",
                file=sys.stderr,
            )

    def say(self, text):
        """print, on rank 0 alone."""
        if self.rank == 0:
            print(text, flush=True)

    # -- before the loop ----------------------------------------------------------------------

    def read_data(self, train_file, eval_files, *, require):
        """-> the training examples, those to evaluate on, the durations of all their clips.

        Both are read whole and every clip is decoded before anything trains. Raises
        data.DataError at the first fault."""
        limit = 16 if self.args.dry_run and self.args.eval_data else None
        examples = data.read_manifest(train_file, require=require)
        scored = data.read_manifests(eval_files, limit=limit)
        return examples, scored, check.check_clips(examples + scored, self.args.max_seconds)

    def start(self, steps):
        """Make --out this run's folder -> the checkpoint that it goes on from, or None."""
        self.checkpoint = checkpoints.start_folder(self.out, self.args.resume)
        self.steps = steps
        if self.checkpoint is not None:
            self.done = read_json(self.checkpoint / "checkpoint.json")["step"]
            self.say(f"going on from step {self.done}, {self.checkpoint}")
        if self.rank == 0:
            flags = {**vars(self.args), "ranks": self.world, "steps": steps}
            write_json(self.out / "config.json", {**flags, **_facts()})
            for name in ("log", "samples"):     # the steps after the checkpoint are made again
                keep_lines(self.out / f"{name}.jsonl", lambda line: line["step"] <= self.done)
        return self.checkpoint

    def wrap(self, step_module, student):
        """-> the step module as one process, DDP or FSDP runs it."""
        self.model = step_module
        if self.args.checkpoint_activations:
            _checkpoint_activations(student)
        if self.args.shard:
            ranks.shard(step_module, models.blocks(student), self.frozen_dtype)
        elif self.world > 1:
            self.model = DistributedDataParallel(
                step_module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return self.model

    def evaluate(self, when, examples, work):
        """work(), with all weights gathered -> its results without their samples; into when.json
        and samples-when.jsonl.

        A run that goes on from a checkpoint finds the evaluations up to it, and does not make them
        again if they asked the same questions and decoded alike."""
        begun = time.time()
        key = [data.fingerprint(examples), self.args.max_new_tokens, self.args.seed]
        known = ranks.of_rank_zero(read_json(self.out / f"{when}.json"))
        if known and known["asked"] == key:
            return known

        results = ranks.with_weights_gathered(self.model, work)
        samples = results.pop("samples")
        results["asked"] = key
        if self.rank == 0:
            lines = "".join(json.dumps(sample) + "\n" for sample in samples)
            replace_text(self.out / f"samples-{when}.jsonl", lines)
            write_json(self.out / f"{when}.json", results)
        self.clock += time.time() - begun               # an evaluation is no part of a step
        return results

    # -- the loop -----------------------------------------------------------------------------

    def batches(self, examples, prepare):
        """(step, prepare(this rank's share of the step's examples)) for every step that is left.

        --workers processes prepare the next steps meanwhile. An example that cannot be used any
        more, a clip that is gone say, ends the run with a checkpoint. So does a signal, SIGTERM or
        Ctrl-C, to any rank, when the step is done. (A second one changes nothing.)"""
        self.first = self.done
        self.last = min(self.steps, 2) if self.args.dry_run else self.steps
        self.begun = self.told = time.time()            # the loop; the last line in the terminal
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, lambda *received: self.signals.append(received))
            self.at_end.callback(signal.signal, number, before)
        prepared = self._prepared(examples, prepare)
        forget_peak_memory(self.device)
        for step in range(self.first, self.last):
            self.clock = time.time()
            self.seconds = {}                           # of the step's laps
            self.notes = defaultdict(list)              # {name: values}
            batch = next(prepared)
            self.lap("waiting")
            broken = isinstance(batch, data.DataError)
            faults = ranks.gather_lists([str(batch)] if broken else [])
            if faults:
                self.stop(faults[0])

            # Whatever draws from torch's own generator in a step (a dropout of yours; nothing of
            # ours does) starts from here, so that a resumed run draws the same
            torch.manual_seed((self.args.seed * 1_000_003 + step) * 10_007 + self.rank)
            yield step, batch
        self.at_end.close()

    def _prepared(self, examples, prepare):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"          # threads do not survive a fork
        share = self.args.batch_size // self.world

        def shares():
            for step in range(self.first, self.last):
                batch = examples_of_step(examples, step, self.args.batch_size, self.args.seed)
                yield batch[self.rank * share:(self.rank + 1) * share]

        # What data.py imports where it uses it: here once, before the fork, not in every worker
        import jinja2  # noqa: F401, I001
        import soundfile            # noqa: F401
        import torchaudio           # noqa: F401

        # Workers get their examples from here and never touch the list of all: counting
        # references to its parts would copy it, page by page
        others = set(multiprocessing.active_children())
        workers = self.args.workers if sys.platform == "linux" else 0   # elsewhere no safe fork
        loader = iter(torch.utils.data.DataLoader(
            _Prepared(prepare),
            batch_size=None,
            sampler=shares(),
            num_workers=workers,
            worker_init_fn=_deaf_worker,
            multiprocessing_context="fork" if workers else None,
        ))
        for worker in set(multiprocessing.active_children()) - others:
            self.at_end.callback(worker.kill)   # it is deaf, and may be busy with a clip for long
        # A dead worker shows where its batch is waited for, not while a checkpoint is written
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return loader

    def equalised(self, batches, idle):
        """FSDP runs as many micro-batches on every rank: `batches`, and idle() after them."""
        if self.args.shard:
            most = max(ranks.gather_lists([len(batches)]))
            batches = batches + [idle() for _ in range(most - len(batches))]
        return batches

    def accumulate(self, batches):
        """The micro-batches of a step; DDP adds gradients over the ranks in the last one alone.

        FSDP adds them after each: it has no room for whole gradients."""
        for number, batch in enumerate(batches, 1):
            self.model.require_backward_grad_sync = number == len(batches)      # DDP's switch
            yield batch

    def note(self, **values):
        """Add numbers or scalar tensors to the step's sums, over micro-batches and ranks.

        Every rank has to note the same names in a step. Tensors are read when the step is over."""
        for name, value in values.items():
            self.notes[name].append(value)

    def note_mean(self, name, total, over):
        """The same for a mean: the sum of all totals over the sum of all `over`."""
        self.note(**{name: total, f"over {name}": over})

    def lap(self, name):
        """Log the seconds since the last lap, or the step's start, as seconds_NAME."""
        now = time.time()
        self.seconds[f"seconds_{name}"] = now - self.clock - sum(self.seconds.values())

    def step_seconds(self):
        """Since the step began, the wait for its data included."""
        return time.time() - self.clock

    def finite(self, norm):
        """Are the step's loss and its gradient's norm finite? The same answer on every rank.

        Here the step's notes are summed over micro-batches and ranks."""
        sums = {name: sum(map(float, values)) for name, values in self.notes.items()}
        self.totals = ranks.sum_over_ranks(**sums, signals=len(self.signals))
        self.scalars = {}                               # for the log
        for name in sums:
            count = self.totals.get(f"over {name}", 1)
            if count and not name.startswith("over "):
                self.scalars[name] = self.totals[name] / count
        self.scalars["grad_norm"] = norm
        is_finite = math.isfinite(self.scalars["loss"] + norm)
        self.bad_steps = 0 if is_finite else self.bad_steps + 1
        return is_finite

    def log(self, step, ids, **scalars):
        """A line into log.jsonl, and every tenth into the terminal. ids: this rank's examples."""
        self.done = step + 1
        scalars = {**self.scalars, **scalars}
        text = "  ".join(f"{name} {value:,.4g}" for name, value in scalars.items())
        line = {
            "step": self.done,
            **scalars,
            "seconds": self.step_seconds(),
            **self.seconds,
            "memory_gb": peak_memory_gb(self.device),
            "host_gb": _status_gb("VmRSS"),
        }
        if self.bad_steps:
            reason = f"its loss is {line['loss']}, its gradient's norm {line['grad_norm']}"
            line = {"step": self.done, "skipped": reason, "ids": ranks.gather_lists(ids)}
            self.say(f"step {self.done} is left out: {reason}; log.jsonl names its examples")

        if self.rank == 0:
            append_jsonl(self.out / "log.jsonl", line)
            if self.args.track:
                if self.done == self.first + 1:         # not earlier: trackers start threads
                    self.track = tracking.start(
                        self.args.track, self.out, self.first, vars(self.args)
                    )
                self.track({name: x for name, x in line.items() if isinstance(x, float)}, self.done)
        now = time.time()
        if self.done == self.first + 1:
            self.say(f"the first step was done {now - self.started:.1f} s after the start")
        # Every tenth step, and no longer silence than half a minute
        if self.done % 10 == 0 or self.done in (1, 2, self.last) or now - self.told > 30:
            self.told = now
            left = (now - self.begun) / (self.done - self.first) * (self.last - self.done)
            self.say(f"step {self.done}/{self.last}  {text}  {left / 60:.0f} min left")

    def save_or_stop(self):
        """A checkpoint, where one is due. A signal, or too many steps that are not finite in a
        row, end the run after it: SystemExit."""
        if self.totals["signals"]:
            self.stop("asked to stop", status=130)
        if self.bad_steps >= NOT_FINITE:
            self.stop(
                f"the loss or its gradient was not finite in {self.bad_steps} steps in a row "
                "(log.jsonl names their examples): look at these, and lower --lr or --clip"
            )
        if self.done == self.last or self.done % self.args.save_every == 0 \
                or self.evaluation_is_due():
            self.save()

    def evaluation_is_due(self):
        every = self.args.eval_every
        return every > 0 and self.done > 0 and self.done % every == 0

    def save(self):
        """A checkpoint of this moment."""
        self.checkpoint = checkpoints.save(
            self.out,
            step=self.done,
            keep=self.args.keep,
            flags=vars(self.args),
            **self.checkpoint_parts,
        )

    def stop(self, why, status=1):
        """Save and end the run before its end: SystemExit."""
        self.save()
        self.say(f"{why}; saved {self.checkpoint}: go on with --resume auto")
        ranks.wait_for_all()                # torchrun kills the others when the first has left
        raise SystemExit(status)

    # -- after the loop -----------------------------------------------------------------------

    def finish(self, table, terms, unit, scale="linear", **results):
        """results.json, the table in the terminal and in the model's card, run.png.

        terms: of the log, to be drawn over the steps; unit and scale: of their axis."""
        minutes = (time.time() - self.started) / 60
        if self.rank > 0:
            return
        write_json(self.out / "results.json", {**results, "minutes": minutes})
        saving.write_card(self.checkpoint, vars(self.args), table)
        self.say(table)
        plots.plot_run(self.out, terms, unit, scale)
        self.say(
            f"{self.out}: results.json, log.jsonl, samples, run.png, checkpoint "
            f"{self.checkpoint.name}; {minutes:.1f} minutes in all"
        )


# ---------------------------------------------------------------------------------------------
# 3. Small parts

class _Prepared:
    """What DataLoader asks of its workers: a rank's examples of a step -> prepare(them)."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __getitem__(self, examples):
        try:
            return self.prepare(examples)
        except data.DataError as error:     # as a value: DataLoader would add its own traceback
            return error


def _deaf_worker(_):
    # Signals are for the main process, which needs its workers until it has saved. (If that dies,
    # DataLoader's workers see it, and end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _checkpoint_activations(model):
    # Keep only each decoder layer's input for backward, which runs the layer again: a third more
    # time. transformers 5.17 knows the second name alone, version 6 will know the first alone.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in models.decoder(model).layers:
        layer.training = True               # transformers asks the layer; nothing shall drop out


def _facts():
    """Command, commit and versions, for config.json."""
    root = Path(__file__).resolve().parent.parent
    failed, commit = subprocess.getstatusoutput(f'git -C "{root}" describe --always --dirty')
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": "unknown" if failed else commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def forget_peak_memory(device):
    # What was needed before the loop, by an evaluation say, shall not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(device):
    """The peak so far: of the GPU's allocator, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return _status_gb("VmHWM")


def _status_gb(name):
    """A line of Linux's status of this process: VmRSS, what it holds of the main memory now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(status.read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e9
