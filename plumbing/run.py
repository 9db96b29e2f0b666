"""
Plumbing that must never disagree between the two training scripts: ranks, sharding, optimizer groups, checkpoints, bad days, logs.

What this file teaches: what has to be saved so that a killed run goes on as if nothing had happened (weights, optimizer, step;
everything random is a function of seed and step, so that no generator state needs saving), and how to write it so that a kill at
any moment leaves the last checkpoint whole: to a temporary name first, to the disk itself, then one rename.

Many GPUs are PyTorch's own business here: torchrun starts them, DDP or FSDP2 (--shard) wraps the step module, and
torch.distributed.checkpoint writes and reads the optimizer, so that a run goes on with another number of ranks.

Plain functions, explicit arguments, explicit returns; no loop, no loss, no globals.
"""
import collections
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.data
import transformers
from tqdm import tqdm

import data
from plumbing import ranks
from plumbing.files import append_jsonl, open_log, read_json, replace_text, write_json


def add_run_flags(parser, *, out, best):
    """The flags that are the same in both training scripts. best: names of the scores that --keep-best can go by."""
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--out", default=out, help="folder for config, log, checkpoints, samples, results and figure")
    add("--max-steps", type=int, help="stop here, whatever --epochs says")
    add("--no-eval", action="store_true", help="train only")
    add("--dry-run", action="store_true", help="two steps and one small evaluation of everything, then stop")
    # many GPUs
    add("--shard", action="store_true", help="FSDP2: every rank holds its share of all weights, gradients and optimizer states, frozen models too")
    add("--checkpoint-activations", action="store_true", help="run each decoder layer again in backward instead of keeping what is inside it")
    # long runs
    add("--save-every", type=int, default=100, help="steps between checkpoints; one is written at the end too")
    add("--keep", type=int, default=2, metavar="K", help="newest checkpoints that stay")
    add("--keep-best", choices=best, help="the one that scored best stays as well (each --eval-every steps)")
    add("--resume", help="auto (newest checkpoint in --out, if there is one) or a checkpoint's folder")
    # bad days
    add("--workers", type=int, default=1, help="processes on each rank that read and prepare the next steps' clips; 0: none")
    add("--skip-bad", type=int, default=0, metavar="N", help="unusable training examples that may be left out; one more stops the run")


def check_run_flags(args, parser):
    """The part of a script's checks that concerns add_run_flags."""
    if min(args.save_every, args.keep) < 1 or min(args.workers, args.skip_bad) < 0:
        parser.error("--save-every and --keep are at least 1, --workers and --skip-bad at least 0")
    if args.keep_best and not args.eval_every:
        parser.error("--keep-best goes by what evaluations in the middle say, so it needs --eval-every N")


def examples_of_step(examples, step, batch_size, seed):
    """The global batch of a step, a pure function of (seed, step): a resumed run and any number of ranks see the same ones.

    Every epoch is its own permutation, and batches run on across its end."""
    rows = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
              for epoch in {row // len(examples) for row in rows}}
    return [examples[orders[row // len(examples)][row % len(examples)]] for row in rows]


def seed_step(seed, step, rank):
    """Whatever draws from torch's own generator in a step (nothing of ours does; your dropout would) starts from (seed, step, rank), not from what
    was drawn before: so a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 10_007 + rank)


@contextlib.contextmanager
def signals_noted():
    """Inside, SIGTERM (a preemption) and Ctrl-C do no more than put their name into the list that is given: the step ends, all ranks save, then they leave. A second
    one, some seconds later, is meant: it ends the process."""
    noted, since = [], time.monotonic()

    def note(number, _):
        nonlocal since
        if noted and time.monotonic() - since > 3:          # torchrun passes on what the terminal has sent us already
            signal.signal(number, signal.SIG_DFL)           # no KeyboardInterrupt, which is lost where Python is just clearing up (__del__)
            os.kill(os.getpid(), number)
        since = time.monotonic()
        noted.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def out_of_memory_named(where):
    """where: {"part", "batch", "length", "do"}, kept up to date inside. Raises SystemExit with them when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:            # torch.OutOfMemoryError is a RuntimeError, and the CPU's allocator raises a plain one
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise SystemExit("out of memory in {part}, with {batch} of up to {length} tokens each; {do}".format(**where)) from None


class NoneLeft(data.DataError):
    """No example of a step can be used."""


@contextlib.contextmanager
def bad_days(where, prepared, save, say):
    """What may come over the loop inside: a signal is noted in the list that is given, memory that runs out is named (where), data that are gone end the run with a
    checkpoint (save), and the workers of `prepared` (feed) end with it in any case."""
    with contextlib.closing(prepared), signals_noted() as signals, out_of_memory_named(where):
        try:
            yield signals
        except NoneLeft as error:                           # on every rank, so that all can save; what one rank alone meets (in an evaluation) ends the run as it is
            leave(str(error), save(), say)


ASKED = "asked to stop"


SPOILED = 5                 # steps in a row whose loss or gradient is not finite, after which a run stops


def reason_to_stop(asked, spoiled, unusable, allowed):
    """-> a sentence, or None. asked: how many ranks got a signal; spoiled: steps left out in a row; unusable: training examples skipped so far."""
    if asked:
        return ASKED
    if spoiled >= SPOILED:
        return (f"the loss or its gradient was not finite in {spoiled} steps in a row (log.jsonl names their examples): look at these, lower --lr or --clip, and "
                "go on from an earlier checkpoint (--resume DIR)")
    if unusable > allowed:
        return f"{unusable} training examples could not be used, and --skip-bad allows {allowed}: skipped.jsonl names them; mend them or raise --skip-bad"
    return None


def read_data(train_file, eval_files, args, require, say):
    """-> the training examples, those to evaluate on, the durations of their clips, {why: why} of the unusable ones. The whole of both is looked at, every clip decoded, before
    anything trains. Raises data.DataError at the first fault; with --skip-bad N, for training alone, where there are more than N."""
    if args.shard and not dist.is_initialized():
        raise SystemExit("--shard shares the weights among ranks, and this is one process; start it with torchrun --nproc_per_node N")
    faults = [] if args.skip_bad else None
    examples, seconds = data.check_clips(data.read_manifest(train_file, require=require, faults=faults), args.max_seconds, faults)
    scored, more = data.check_clips(data.read_manifests(eval_files, limit=16 if args.dry_run and args.data else None), args.max_seconds)
    for fault in faults or ():
        say(f"left out: {fault}")
    data.tolerate(faults or [], args.skip_bad)
    return examples, scored, seconds + more, {fault: fault for fault in faults or ()}


class Prepared(torch.utils.data.Dataset):
    """What DataLoader asks of its workers: (this rank's examples, the step's) -> without_bad of them, or the DataError that it raised."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, examples):
        try:
            return without_bad(self.make, *examples)
        except data.DataError as error:                     # as a value: DataLoader would put its own traceback into the sentence
            return error


def feed(make, examples, args, *, done, stop, rank, world, device):
    """For each step from `done` on: yields (make(this rank's share of its examples), {id: why} of those that were unusable, seconds that were waited for it). --workers processes
    are ahead of the training by two steps each; close() ends them. They get their examples from here and never touch the list of all: counting references to its parts would copy
    it, page by page.

    Raises SystemExit where a worker dies (killed for its memory, most likely), NoneLeft, on every rank, where no example of a step can be used."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"          # threads do not survive a fork
    awaited, share, workers = collections.deque(), args.batch_size // world, args.workers      # awaited: ids on their way

    def work():
        for step in range(done, stop):
            batch = examples_of_step(examples, step, args.batch_size, args.seed)
            mine = batch[rank * share:(rank + 1) * share]
            awaited.append([example.id for example in mine])
            yield mine, batch

    def deaf(_):
        for number in (signal.SIGTERM, signal.SIGINT):      # these are for the main process, which needs its workers until it has saved
            signal.signal(number, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: it goes with its parent, however that ends, and with it what it has open of a GPU

    prepared, others = Prepared(make), set(multiprocessing.active_children())
    if workers and sys.platform == "linux":                 # elsewhere a process cannot be forked safely
        source = iter(torch.utils.data.DataLoader(prepared, batch_size=None, sampler=work(), num_workers=workers, worker_init_fn=deaf, multiprocessing_context="fork"))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # a dead worker shows where its batch is waited for, not in the middle of writing a checkpoint
    else:
        source = map(prepared.__getitem__, work())
    try:
        while True:
            start = time.perf_counter()
            try:
                made = next(source)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise SystemExit(f"a data worker died ({' '.join(str(error).split())[:200]}) while {', '.join(awaited[0][:8])} or the next examples were read; see whether "
                                 "memory or /dev/shm is full, lower --workers, and go on with --resume auto") from None
            awaited.popleft()
            if ranks.over_ranks(isinstance(made, data.DataError), dist.ReduceOp.MAX, device):
                raise NoneLeft(made if isinstance(made, data.DataError) else "another rank can use none of this step's examples")
            yield *made, time.perf_counter() - start
    finally:
        for worker in set(multiprocessing.active_children()) - others:      # deaf, and it may be busy with a clip for long
            worker.kill()


def without_bad(make, mine, batch):
    """make(mine) -> (what it made, {id: why} of the examples that cannot be used: a clip that was deleted since the start, say). In their place comes the next
    of the step's global batch that can, so that no rank runs short, and any number of ranks takes the same. Raises DataError where none can."""
    try:
        return make(mine), {}
    except data.DataError:
        faults, usable = {}, set()

    def can(example):
        if example.id not in faults and example.id not in usable:
            try:
                make([example])
                usable.add(example.id)
            except data.DataError as error:
                faults[example.id] = str(error)
        return example.id in usable

    kept = []
    for example in mine:
        at = batch.index(example)
        kept.append(next(filter(can, batch[at:] + batch[:at]), None))
    if None in kept:
        raise data.DataError(f"none of the {len(batch)} examples of a step can be used; the first: {next(iter(faults.values()))}")
    ours = {example.id for example in mine}
    return make(kept), {name: why for name, why in faults.items() if name in ours}          # its own: another rank's it reports itself


def note_unusable(faults, unusable, out, step, rank):
    """faults: {id: why} of this rank's step. `unusable` ({id: why}, those of the whole run) gets every rank's new ones, and rank 0 writes them down. Every rank must come here."""
    for name, why in ranks.gather_lists(sorted(faults.items())):
        if name not in unusable and rank == 0:
            append_jsonl(out / "skipped.jsonl", {"step": step, "id": name, "fault": why})
        unusable[name] = why


def speaker(rank):
    """print, on rank 0 alone, above a progress bar if there is one."""
    return (lambda *words: tqdm.write(" ".join(map(str, words)))) if rank == 0 else (lambda *words: None)


def progress(done, stop, rank):
    """A bar of the steps, with the time that is left; on rank 0, and only where somebody looks at it."""
    return tqdm(initial=done, total=stop, unit="step", disable=None if rank == 0 else True, dynamic_ncols=True)


def log_step(line, text, *, span, clock, out, bar, say, rank):
    """A step's line into log.jsonl, its text onto the bar and, every tenth, into the terminal, with the time that is left. span: the step that this start began
    behind, and the last one; clock: when the script started, and when its loop did (seconds since the epoch)."""
    (first, stop), (started, begun), done = span, clock, line["step"]
    if rank == 0:
        append_jsonl(out / "log.jsonl", line)
    bar.set_postfix_str(text, refresh=False)
    bar.update()
    if done == first + 1:
        say(f"the first step was done {time.time() - started:.1f} s after the start, {time.time() - begun:.1f} s of them its own")
    if done % 10 == 0 or done <= 2 or done == stop:
        left = (time.time() - begun) / (done - first) * (stop - done)
        say(f"step {done}/{stop}  {text}  {left / 60:.0f} min left" if left >= 60 else f"step {done}/{stop}  {text}")


def costs(taken, waited, device):
    """What a step's line says of its price: seconds, those of them in which the data were not ready, memory now and at its peak."""
    return {"seconds": taken, "seconds_waiting": waited, "memory_gb": peak_memory_gb(device), "host_gb": host_memory_gb()}


def left_out(step, loss, norm, spoilt, ids, say):
    """The line of a step whose loss or gradient was not finite, so that nothing was learnt from it. spoilt: ids whose loss shows it, of this rank; ids: all of this rank's.
    Every rank must come here."""
    found = list(dict.fromkeys(ranks.gather_lists(spoilt) or ranks.gather_lists(ids)))
    reason = f"its loss is {loss}, its gradient's norm {norm}"
    say(f"step {step} is left out: {reason}; examples: {', '.join(found[:8])}{', ...' * (len(found) > 8)}")
    return {"step": step, "skipped": reason, "ids": found}


def leave(why, saved, say):
    """The end of a run that stops before its end: SystemExit."""
    say(f"\n{why}; saved {saved}: go on with --resume auto")
    ranks.wait_for_all()                                          # torchrun kills the others when the first has left
    raise SystemExit(130 if why == ASKED else 1)


def start_logs(out, args, done, unusable, *, steps, rank, world, names=("log",)):
    """config.json, the logs as a run that goes on behind `done` steps needs them, and what was left out at the start; by rank 0."""
    if rank == 0:
        write_json(out / "config.json", {**vars(args), **run_facts(), "ranks": world, "steps": steps})
        for name in names:
            open_log(out / f"{name}.jsonl", done)
        for why in unusable if not done else ():
            append_jsonl(out / "skipped.jsonl", {"step": 0, "fault": why})


def evaluation(work, when, asked, *, module, out, args, rank):
    """work() -> results, with all weights of a sharded module whole; rank 0 writes them to when.json and, apart, what was said to samples-when.jsonl. -> the results without
    the samples, with the questions' fingerprint `asked`."""
    where = {"part": f"the evaluation {when}", "batch": f"{args.eval_batch} questions", "length": args.max_new_tokens, "do": "lower --eval-batch"}
    with out_of_memory_named(where):
        results = ranks.whole(module, work)
    samples, results["asked"] = results.pop("samples"), asked
    if rank == 0:
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        replace_text(out / f"samples-{when}.jsonl", text)
        write_json(out / f"{when}.json", results)
    return results


def read_known(path, asked):
    """An evaluation that an earlier part of a run saved, if it asked the same questions (data.fingerprint), or None. Every rank must come here."""
    found = read_json(path) or {}
    return ranks.of_rank_zero(found if found.get("asked") == asked else None)


def run_facts():
    """Command, versions and commit, for config.json."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent, timeout=10).stdout.strip()
    except OSError:
        commit = ""
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit or "unknown",
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def forget_peak_memory(device):
    """What was needed up to here (an evaluation, say) shall not count. On a CPU only Linux can forget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def host_memory_gb():
    """What this process holds of the main memory now (resident set), where the system tells; None elsewhere."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1e6 if status.exists() else None


def peak_memory_gb(device):
    """Peak memory so far: the GPU's allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if Path("/proc/self/status").exists():              # as getrusage's, but it can be made to forget
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
    import resource   # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
