"""Runs of the real scripts that are started, watched, hit and compared, for test_bad_days.py.

A run is a subprocess of the script, torchrun with it, or its main() in a fork of a process that has
imported everything already (forkserver): that one starts in a second, so that forty kills fit into
a test."""

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
MAIN = {
    "source": "train_source_layer",
    "source_layer": "train_source_layer",
    "cord": "train_cord",
    "textualize": "textualize",
}
TIMES = {
    "seconds",
    "seconds_waiting",
    "seconds_rollout",
    "seconds_scoring",
    "seconds_update",
    "rollout_tokens_per_second",
    "tokens_per_second",
    "memory_gb",
    "host_gb",
}
# an environment variable of its own for every subprocess: what it starts carries it too
MARK = "BAD_DAYS_RUN"

os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)  # before the fork server starts, which hands them on
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])     # found from the top level


@dataclass
class Run:
    out: Path
    said: Path  # what it prints
    processes: list = field(default_factory=list)  # one, or forked ranks
    mark: str = ""

    @property
    def pid(self):
        return self.processes[0].pid

    def text(self):
        return self.said.read_text(errors="replace")

    def codes(self):
        """Exit statuses, None for what still runs."""
        return [p.poll() if isinstance(p, subprocess.Popen) else p.exitcode for p in self.processes]

    def wait(self, seconds=240):
        """-> the exit status (with many ranks: the first that is not 0). Too long: everything is
        killed, and the test fails."""
        until = time.monotonic() + seconds
        while None in self.codes():
            if time.monotonic() > until:
                end(self)
                raise AssertionError(f"still running after {seconds} s:\n{self.text()[-3000:]}")
            time.sleep(0.01)
        return next((code for code in self.codes() if code), 0)


def alone(said, env):
    """A fork gets a session of its own, a file for what it says, and its environment."""
    os.setsid()
    number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1), os.dup2(number, 2)
    os.environ.update(env)


def execute(code, folder, said, env, habit):
    alone(said, env)
    os.chdir(folder)
    exec(code, {})


def enter(script, argv, said, env, habit):
    """What a fork does: the script. habit: a function of this module that is called first."""
    alone(said, env)
    if habit:
        name, *values = habit
        globals()[name](*values)
    module = importlib.import_module(MAIN[script])
    module.main(argv)


def fork(script, argv, out, ranks=1, habit=None):
    """main(argv) in a forked process, or in one for each rank, with the environment that torchrun
    would give them."""
    return fork_ranks(enter, (script, argv), out, ranks, habit)


def on_two_ranks(code, folder):
    """Python code on two gloo ranks, in that folder; it must end well."""
    run = fork_ranks(execute, (code, str(folder)), folder / "ranks", 2, None)
    assert run.wait() == 0, run.text()[-4000:]


def fork_ranks(target, given, out, ranks, habit):
    run, env = Run(out, said_of(out)), {}
    for rank in range(ranks):
        if ranks > 1:
            env = env or {
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = FORKS.Process(target=target, args=(*given, str(run.said), dict(env), habit))
        process.start()
        run.processes.append(process)
    return run


def spawn(script, argv, out, torchrun=()):
    """The script itself as a user starts it; torchrun: its flags."""
    before = [sys.executable, *(["-m", "torch.distributed.run", *torchrun] if torchrun else ())]
    run = Run(out, said_of(out), mark=uuid.uuid4().hex)
    with open(run.said, "w") as file:
        run.processes.append(
            subprocess.Popen(
                [*before, str(ROOT / f"{MAIN[script]}.py"), *argv],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, MARK: run.mark},
            )
        )
    return run


def said_of(out):
    return out.with_name(f"{out.name}-{len(list(out.parent.glob(f'{out.name}-*.txt')))}.txt")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -------------------- what a run does ------------------------------------------------------------


def family(run):
    """{pid: command} of what a run has started and still lives: its sessions, and whoever carries
    its mark, though their parent may be gone."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            ours = (
                int(session) in {p.pid for p in run.processes}
                or run.mark
                and f"{MARK}={run.mark}".encode() in (stat.parent / "environ").read_bytes()
            )
            if ours and state not in "ZX":
                found[int(stat.parent.name)] = (
                    (stat.parent / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                )
        except (OSError, ValueError):  # gone meanwhile
            continue
    return found


def ranks_of(run):
    """{rank: pid} of the ranks under torchrun: the processes that have RANK and are no fork of
    another rank."""
    found = {}
    for pid in family(run):
        try:
            env = dict(
                x.split("=", 1)
                for x in (Path("/proc") / str(pid) / "environ")
                .read_bytes()
                .decode(errors="replace")
                .split("\0")
                if "=" in x
            )
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if "RANK" in env and (parent == run.pid or parent not in family(run)):
            found[int(env["RANK"])] = pid
    return found


def end(run):
    """Everything of it is killed."""
    for pid in family(run):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def until(condition, run=None, seconds=240):
    """Wait until condition() holds -> its value. A run that ends before, or too long a time, fails
    the test; run None: what is waited for may come at its end."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        if run is not None and None not in run.codes():
            raise AssertionError(
                f"the run ended ({run.codes()}) before it came so far:\n{run.text()[-3000:]}"
            )
        if time.monotonic() > limit:
            raise AssertionError(
                f"waited {seconds} s in vain" + (f":\n{run.text()[-3000:]}" if run else "")
            )
        time.sleep(0.003)
    return value


def none_survive(run, seconds=10):
    """Nothing that it has started lives on, data workers in the middle of a long clip included."""
    limit = time.monotonic() + seconds
    while left := family(run):
        assert time.monotonic() < limit, f"still alive {seconds} s after its end: {left}"
        time.sleep(0.05)


def lines(out, name="log"):
    """The whole lines of a log while somebody may be writing it."""
    path = Path(out) / f"{name}.jsonl"
    return (
        [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
        if path.exists()
        else []
    )


def losses(out, name="log"):
    return [
        {key: value for key, value in line.items() if key not in TIMES} for line in lines(out, name)
    ]


def steps(out):
    return sorted(int(path.name[5:]) for path in Path(out).glob("step-*"))


def content(out, step):
    """{name: bytes} of everything that a checkpoint holds: files, and the optimizer's tensors one
    by one (their order in the file is that in which they came
    to be). Not the card, which names flags, and the scores."""
    folder, found = Path(out) / f"step-{step:07d}", {}
    for path in sorted(folder.rglob("*")):
        if path.parent.name == "optimizer":
            found |= {key: tensor.tobytes() for key, tensor in load_file(path).items()}
        elif path.is_file() and path.name not in ("README.md", "checkpoint.json"):
            found[path.name] = path.read_bytes()
    return found


def same_run(out, other, step):
    """Two runs ended alike, to the last bit."""
    assert losses(out) == losses(other) and len(losses(out)) == step
    assert losses(out, "samples") == losses(other, "samples")
    ours, theirs = content(out, step), content(other, step)
    assert (
        ours.keys() == theirs.keys()
        and "model.safetensors" in ours
        and any(name.endswith(".exp_avg_sq") for name in ours)
    )
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert not list(Path(out).glob("partial-*"))


def near_run(out, other, rel):
    """Two runs ended alike but for rounding."""
    ours, theirs = losses(out), losses(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name in a.keys() - {"grad_norm"}:
            assert abs(a[name] - b[name]) <= rel * abs(b[name]) + rel / 10, (
                a["step"],
                name,
                a[name],
                b[name],
            )


# -------------------- habits of a fork -----------------------------------------------------------


def without(*names):
    """None of these modules is there, nor has one been imported."""
    for name in names:
        assert name not in sys.modules, f"{name} is imported at the start"
        sys.modules[name] = None


def eat_before(name, step, path, rank):
    """Before a function ("saving.save") does its work for the step-th time on that rank, somebody
    else fills the disk with a file at `path`.

    None: no small disk could be mounted. Then files cannot grow beyond a megabyte."""
    from plumbing import checkpoints, run

    module, function = name.split(".")
    if module == "dcp":
        from torch.distributed import checkpoint as holder
    else:
        holder = run if module == "run" else getattr(checkpoints, module)
    work = getattr(holder, function)

    def hungry(*args, **named):
        hungry.calls += 1
        is_now = hungry.calls == step and os.environ.get("RANK", "0") == str(rank)
        if is_now and path:
            fill(path)
        elif is_now:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        return work(*args, **named)

    hungry.calls = 0
    setattr(holder, function, hungry)


def fill(path, leave=0):
    """A file that takes all but `leave` bytes of the disk it is on."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while shutil.disk_usage(Path(path).parent).free >= leave + size:
                    file.write(b"x" * size)
            except OSError:
                pass


def stop_at(step):
    """Asked to stop in that step."""
    from plumbing.run import Run

    log = Run.log

    def until_then(self, *more, **named):
        log(self, *more, **named)
        if self.done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Run.log = until_then
