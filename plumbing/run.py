"""
The run: what both training scripts need around their loops, and no paper is about.

    with Run(args) as run:                          # ranks, device
        for step, batch in run.batches(examples, prepare):      # from here on signals wait
            for part in run.accumulate(parts):
                run.note(loss=loss)                 # summed over parts and ranks
            if run.finite(norm):                    # the same answer on every rank
                optimizer.step()
            run.log(step, ids)                      # log.jsonl, the bar, a line in the terminal
            run.save_or_stop()                      # checkpoints; a signal ends the run with one

It holds no forward, no loss and no schedule. On N ranks every rank calls every method.
"""
import argparse
import ctypes
import importlib.util
import json
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
import transformers
from tqdm import tqdm

import data
import models
from plumbing import check, checkpoints, ranks, tracking
from plumbing.files import append_jsonl, keep_lines, read_json, replace_text, write_json

NOT_FINITE = 5              # steps in a row without a finite loss and gradient that end a run


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
    counts = (
        args.batch_size,
        args.micro_batch,
        args.eval_batch,
        args.max_new_tokens,
        args.save_every,
        args.keep,
    )
    if args.max_steps is not None:
        counts = (*counts, args.max_steps)
    if min(counts) < 1 or args.epochs <= 0:
        parser.error(
            "batch sizes, --max-new-tokens, --max-steps, --save-every and --keep are at least 1, "
            "--epochs above 0"
        )
    if min(args.workers, args.lora, args.eval_every) < 0:
        parser.error("--workers, --lora and --eval-every are at least 0")
    if args.track and importlib.util.find_spec(args.track) is None:
        parser.error(f"--track {args.track} needs its package: pip install {args.track}")


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
    """One training run, on this rank.

    To be read: rank, world (the number of ranks), device, out (the run's folder, a Path), done and
    steps (how many steps are done, and how many there will be); after `finite` also totals and
    seconds, the step's sums over all ranks and its laps. To be set before the loop: model and
    checkpoint_parts. Every rank calls every method."""

    def __init__(self, args):
        self.args = args
        self.started = time.time()
        self.rank, self.world, self.device = ranks.start_distributed()
        if args.shard and self.world == 1:
            raise SystemExit("--shard shares the weights among ranks, and this is one process; "
                             "start it with torchrun --nproc_per_node N")
        self.out = Path(args.out)
        self.done = 0                       # steps
        self.steps = 0                      # in all, as the schedule counts them
        self.model = None                   # the step module as DDP or FSDP runs it, see `wrap`
        self.checkpoint = None              # the newest one of this run
        self.checkpoint_parts = {}          # what checkpoints.save wants: model, optimizer, ...
        self.track = None                   # sends numbers to --track

        # Of the loop, see `batches`
        self.feed = None                    # prepared examples
        self.first = self.last = 0          # its steps
        self.begun = self.started           # when
        self.handlers = {}                  # of SIGTERM and Ctrl-C, as they were before
        self.signals = []                   # when SIGTERM and Ctrl-C came
        self.asked_to_stop = False          # any rank, by one of them
        self.bad_steps = 0                  # in a row

        # Of the step
        self.clock = self.started           # when it began
        self.seconds = {}                   # of its laps
        self.sums = {}                      # what was noted: {name: [values]}
        self.weights = {}                   # what the means among them are divided by
        self.totals = {}                    # the sums over all ranks
        self.scalars = {}                   # what of them goes into the log
        torch.manual_seed(args.seed)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._end_loop()
        if kind is None:
            self.model = None               # DDP's reducer must go before its process group
            ranks.stop_distributed()
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) \
                or "can't allocate memory" in str(error):
            print(
                "Out of memory: lower --micro-batch or --eval-batch, shorten clips and answers, "
                "or use --checkpoint-activations, --lora RANK, --weights bfloat16 or --shard.",
                file=sys.stderr,
            )

    def _end_loop(self):
        if self.feed is not None:
            self.feed.close()
            self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.feed, self.handlers = None, {}

    def _note_signal(self, number, _):
        # The step ends, all ranks save, then they leave. A second signal, not the copy that
        # torchrun passes on at once, is meant: it ends the process.
        if self.signals and time.monotonic() - self.signals[-1] > 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signals.append(time.monotonic())

    def say(self, *words):
        """print, on rank 0 alone, above the progress bar."""
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))

    # -- before the loop ----------------------------------------------------------------------

    def read_data(self, train_file, eval_files, *, require):
        """-> the training examples, those to evaluate on, the durations of all their clips.

        Both are read whole and every clip is decoded before anything trains. Raises
        data.DataError at the first fault."""
        limit = 16 if self.args.dry_run and self.args.eval_data else None
        examples = data.read_manifest(train_file, require=require)
        scored = data.read_manifests(eval_files, limit=limit)
        seconds = check.check_clips(examples, self.args.max_seconds)
        seconds += check.check_clips(scored, self.args.max_seconds)
        return examples, scored, seconds

    def start(self, steps, logs=("log",)):
        """Make --out this run's folder -> the checkpoint that it goes on from, or None."""
        self.checkpoint = checkpoints.find(self.out, self.args.resume, self.args.dry_run)
        checkpoints.start_folder(self.out, self.checkpoint)
        self.steps = steps
        if self.checkpoint is not None:
            self.done = read_json(self.checkpoint / "checkpoint.json")["step"]
            self.say(f"going on from step {self.done}, {self.checkpoint}")
        if self.rank == 0:
            flags = {**vars(self.args), "ranks": self.world, "steps": steps}
            write_json(self.out / "config.json", {**flags, **_facts()})
            for name in logs:       # a resumed run writes the steps behind its checkpoint again
                path = self.out / f"{name}.jsonl"
                if self.done == 0:
                    path.unlink(missing_ok=True)            # whatever is in it
                else:
                    keep_lines(path, lambda line: line["step"] <= self.done)
        return self.checkpoint

    def wrap(self, step_module, student, compute):
        """-> the step module as one process, DDP or FSDP runs it. compute: see ranks.shard."""
        if self.args.checkpoint_activations:
            _checkpoint_activations(student)
        self.model = ranks.wrap(
            step_module, blocks=models.blocks(student), shard_it=self.args.shard, compute=compute
        )
        return self.model

    def evaluate(self, when, examples, work):
        """work() -> results, with all weights gathered; into when.json and samples-when.jsonl.

        An evaluation of the same questions, decoded alike, that this run made before it was killed
        is not made again. -> the results without their samples."""
        begun = time.time()
        asked = [data.fingerprint(examples), self.args.max_new_tokens, self.args.seed]
        known = None
        if self.done:
            known = read_json(self.out / f"{when}.json")
        if known and known.get("asked") != asked:
            known = None
        known = ranks.of_rank_zero(known)
        if known:
            return known

        results = ranks.whole(self.model, work)
        samples = results.pop("samples")
        results["asked"] = asked
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
        more, a clip that is gone say, ends the run with a checkpoint."""
        last = min(self.steps, 2) if self.args.dry_run else self.steps
        self.first = self.done
        self.last = last
        self.begun = time.time()
        self.bar = tqdm(
            initial=self.done,
            total=last,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.rank == 0 else True,
        )
        self.feed = self._feed(examples, prepare)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._note_signal)
        forget_peak_memory(self.device)
        for step in range(self.done, last):
            self.clock = time.time()
            self.seconds = {}
            batch = next(self.feed)
            self.seconds["waiting"] = time.time() - self.clock

            broken = isinstance(batch, data.DataError)
            if ranks.over_ranks(broken, dist.ReduceOp.MAX, self.device):
                faults = ranks.gather_lists([str(batch)] if broken else [])
                self.stop(faults[0])

            # Whatever draws from torch's own generator in a step (a dropout of yours; nothing of
            # ours does) starts from here, so that a resumed run draws the same
            torch.manual_seed((self.args.seed * 1_000_003 + step) * 10_007 + self.rank)
            self.sums = defaultdict(list)
            self.weights = defaultdict(list)
            yield step, batch
        self._end_loop()

    def _feed(self, examples, prepare):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"          # threads do not survive a fork
        share = self.args.batch_size // self.world

        def shares():
            for step in range(self.first, self.last):
                batch = examples_of_step(examples, step, self.args.batch_size, self.args.seed)
                yield batch[self.rank * share:(self.rank + 1) * share]

        prepared = _Prepared(prepare)
        if self.args.workers == 0 or sys.platform != "linux":   # elsewhere a fork is not safe
            yield from map(prepared.__getitem__, shares())
            return

        # What data.py imports where it uses it: here once, before the fork, not in every worker
        import jinja2  # noqa: F401, I001
        import soundfile            # noqa: F401
        import torchaudio           # noqa: F401

        # Workers get their examples from here and never touch the list of all: counting
        # references to its parts would copy it, page by page
        others = set(multiprocessing.active_children())
        loader = torch.utils.data.DataLoader(
            prepared,
            batch_size=None,
            sampler=shares(),
            num_workers=self.args.workers,
            worker_init_fn=_deaf_worker,
            multiprocessing_context="fork",
        )
        batches = iter(loader)
        # A dead worker shows where its batch is waited for, not while a checkpoint is written
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise SystemExit(f"a data worker died ({reason}); see whether memory or /dev/shm is "
                             "full, lower --workers, and go on with --resume auto") from None
        finally:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()               # it is deaf, and may be busy with a clip for long

    def gathered(self, module, work):
        """work(), with all of a sharded module's weights gathered once, not once a token."""
        return ranks.whole(module, work)

    def equalised(self, batches, idle):
        """FSDP runs as many micro-batches on every rank: `batches`, and idle() behind them."""
        if self.args.shard:
            most = ranks.over_ranks(len(batches), dist.ReduceOp.MAX, self.device)
            batches = batches + [idle() for _ in range(int(most) - len(batches))]
        return batches

    def accumulate(self, batches):
        """The micro-batches of a step; DDP adds gradients over the ranks in the last one alone."""
        return ranks.accumulate(self.model, batches)

    def sum(self, **values):
        """-> {name: the sum over all ranks}, at once."""
        return ranks.sum_over_ranks(values, self.device)

    def note(self, **values):
        """Add numbers or scalar tensors to the step's sums, over micro-batches and ranks.

        Every rank has to note the same names in a step. Tensors are read when the step is over."""
        for name, value in values.items():
            self.sums[name].append(value)

    def note_mean(self, name, total, over):
        """The same for a mean: the sum of all totals over the sum of all `over`."""
        self.note(**{name: total})
        self.weights[name].append(over)

    def lap(self, name):
        """The seconds since the last lap, or the step's start, are the log's seconds_NAME."""
        now = time.time()
        self.seconds[name] = now - self.clock - sum(self.seconds.values())

    def step_seconds(self):
        """Since the step began, the wait for its data included."""
        return time.time() - self.clock

    def finite(self, norm):
        """Are the step's loss and its gradient's norm finite? The same answer on every rank.

        Here the step's notes are summed over micro-batches and ranks."""
        own_loss = sum(map(float, self.sums["loss"]))
        totals = {name: sum(map(float, values)) for name, values in self.sums.items()}
        counts = {f"over {name}": sum(map(float, over)) for name, over in self.weights.items()}
        totals = self.sum(**totals, **counts, asked_to_stop=len(self.signals))
        self.asked_to_stop = totals.pop("asked_to_stop") > 0
        self.totals = totals

        self.scalars = {}
        for name in self.sums:
            count = totals.get(f"over {name}", 1)
            if count:
                self.scalars[name] = totals[name] / count
        self.scalars["grad_norm"] = norm
        self.own_loss_is_finite = math.isfinite(own_loss)
        is_finite = math.isfinite(self.scalars["loss"] + norm)
        self.bad_steps = 0 if is_finite else self.bad_steps + 1
        return is_finite

    def log(self, step, ids, **scalars):
        """A line into log.jsonl, and every tenth into the terminal. ids: this rank's examples."""
        self.done = step + 1
        line = {"step": self.done, **self.scalars, **scalars}
        text = "  ".join(
            f"{name} {value:,.4g}" for name, value in line.items() if name not in ("step", "lr")
        )
        line["seconds"] = self.step_seconds()
        line.update({f"seconds_{name}": value for name, value in self.seconds.items()})
        line.update(memory_gb=peak_memory_gb(self.device), host_gb=_host_memory_gb())

        if self.bad_steps:
            # Those of the ranks whose own loss shows it; the gradient alone shows no rank
            suspects = ranks.gather_lists([] if self.own_loss_is_finite else ids)
            suspects = suspects or ranks.gather_lists(ids)
            reason = f"its loss is {line['loss']}, its gradient's norm {line['grad_norm']}"
            self.say(
                f"step {self.done} is left out: {reason}; examples: "
                f"{', '.join(suspects[:8])}{', ...' if len(suspects) > 8 else ''}"
            )
            line = {"step": self.done, "skipped": reason, "ids": suspects}

        if self.rank == 0:
            append_jsonl(self.out / "log.jsonl", line)
            if self.args.track and self.track is None:
                self.track = tracking.start(self.args.track, self.out, self.first, vars(self.args))
            if self.track:
                numbers = {name: x for name, x in line.items() if isinstance(x, int | float)}
                del numbers["step"]
                self.track(numbers, self.done)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        now = time.time()
        if self.done == self.first + 1:
            self.say(
                f"the first step was done {now - self.started:.1f} s after the start, "
                f"{now - self.begun:.1f} s of them its own"
            )
        if self.done % 10 == 0 or self.done <= 2 or self.done == self.last:
            left = (now - self.begun) / (self.done - self.first) * (self.last - self.done)
            self.say(f"step {self.done}/{self.last}  {text}  {left / 60:.0f} min left")

    def save_or_stop(self):
        """A checkpoint, where one is due. A signal, or too many steps that are not finite in a
        row, end the run behind it: SystemExit."""
        if self.asked_to_stop:
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
            self.out, step=self.done, keep=self.args.keep, **self.checkpoint_parts
        )

    def stop(self, why, status=1):
        """Save and end the run before its end: SystemExit."""
        self.save()
        self.say(f"\n{why}; saved {self.checkpoint}: go on with --resume auto")
        ranks.wait_for_all()                # torchrun kills the others when the first has left
        raise SystemExit(status)

    # -- after the loop -----------------------------------------------------------------------

    def finish(self, table, plot, **results):
        """results.json, the table in the terminal and in the model's card, run.png."""
        minutes = (time.time() - self.started) / 60
        if self.rank > 0:
            return
        write_json(self.out / "results.json", {**results, "minutes": minutes})
        self.checkpoint_parts["card"](self.checkpoint, results=table)
        self.say(table)
        plot(self.out)
        self.say(
            f"{self.out}: results.json, log.jsonl, samples, run.png, checkpoint "
            f"{self.checkpoint.name}; {minutes:.1f} minutes in all"
        )


# ---------------------------------------------------------------------------------------------
# 3. Small parts

class _Prepared(torch.utils.data.Dataset):
    """What DataLoader asks of its workers: a rank's examples of a step -> prepare(them)."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __getitem__(self, examples):
        try:
            return self.prepare(examples)
        except data.DataError as error:     # as a value: DataLoader would add its own traceback
            return error


def _deaf_worker(_):
    # Signals are for the main process, which needs its workers until it has saved
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: it goes with its parent


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
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            timeout=10,
            capture_output=True,
            text=True,
        )
        commit = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "python": platform.python_version(),
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


def _host_memory_gb():
    """What this process holds of the main memory now; None where the system does not tell."""
    return _status_gb("VmRSS")


def _status_gb(name):
    status = Path("/proc/self/status")      # Linux alone
    if not status.exists():
        return None
    return int(status.read_text().split(f"{name}:")[1].split()[0]) / 1e6
