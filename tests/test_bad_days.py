"""Nothing is lost on bad days: runs that are killed, asked to stop, or find the disk full go on to
the last bit of what an undisturbed run gives."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import bad_days
import pytest
import torch
from bad_days import (
    end,
    family,
    fork,
    lines,
    near_run,
    none_survive,
    ranks_of,
    same_run,
    spawn,
    steps,
    until,
)
from test_train_cord import write_spoken
from test_train_source_layer import write_world

import evaluate
import layer_map
import mini.world
import models
from plumbing import checkpoints, saving
from plumbing.files import (
    append_jsonl,
    complete,
    keep_lines,
    newest_checkpoint,
    write_json,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
SCRIPTS = ("source", "cord")
FLAGS = {
    "source": ["--batch-size", "4", "--micro-batch", "2"],
    "cord": [
        "--batch-size",
        "2",
        "--micro-batch",
        "4",
        "--group-size",
        "2",
        "--max-new-tokens",
        "8",
        "--show-every",
        "2",
    ],
}


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    made = {}
    for script, write in (("source", write_world), ("cord", write_spoken)):
        made[script] = write(tmp_path_factory.mktemp(script))
    return made


@pytest.fixture(scope="session")
def flags(worlds):
    """flags(script, out, *more): of a run that saves at every step."""

    def of(script, out, *more, evaluate=False):
        return [
            "--data",
            str(worlds[script]),
            "--out",
            str(out),
            "--save-every",
            "1",
            "--workers",
            "1",
            "--lr",
            "1e-3",
            *FLAGS[script],
            *(["--eval-data", str(worlds[script])] if evaluate else ["--no-eval"]),
            *more,
        ]

    return of


@pytest.fixture(scope="session")
def undisturbed(flags, tmp_path_factory):
    """undisturbed(script, steps, *more, ranks=1, evaluate=False) -> the folder of a run that
    nothing happened to; made once. wait=False: only begun."""
    made = {}

    def of(script, steps, *more, ranks=1, evaluate=False, wait=True):
        key = (script, steps, more, ranks, evaluate)
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            made[key] = fork(
                script,
                flags(script, out, "--max-steps", str(steps), *more, evaluate=evaluate),
                out,
                ranks,
            )
        assert not wait or made[key].wait() == 0, made[key].text()
        return made[key].out

    return of


# -------------------- killed ---------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_script_goes_on_to_the_last_bit(script, flags, undisturbed, tmp_path):
    """Killed after its second step, and started again."""
    out = tmp_path / "run"
    undisturbed(script, 4, wait=False)  # meanwhile; first, because it may take a while to start
    run = fork(script, flags(script, out, "--max-steps", "4"), out)
    until(lambda: len(lines(out)) >= 2, run)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and steps(out)[-1] < 4
    none_survive(run)
    again = fork(script, flags(script, out, "--max-steps", "4", "--resume", "auto"), out)
    assert again.wait() == 0 and "going on from step" in again.text(), again.text()
    same_run(out, undisturbed(script, 4), 4)


KILLS = 24
LONG = 40  # steps; two kills in three cost at most two of them


def moments(numbers, evaluate):
    """What KILLS kills wait for, in an order of chance: (name, how many steps of its own, seconds
    more)."""
    names = ["while it starts"] * 4 + ["while a checkpoint is written"] * 8
    names += ["while it is evaluated"] * 4 * evaluate
    names += ["somewhere"] * (KILLS - len(names))
    numbers.shuffle(names)
    return [(name, numbers.randrange(3), numbers.random()) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_many_kills_in_a_row(script, flags, undisturbed, tmp_path):
    """Killed 24 times, at moments of chance and at those that hurt most: losses, samples,
    evaluations and weights are those of a run that was left alone."""
    evaluate = [
        "--eval-every",
        "2",
        "--eval-batch",
        "4",
        *(["--max-new-tokens", "8"] if script == "source" else []),
    ]
    whole = undisturbed(script, LONG, *evaluate, evaluate=True)
    out, numbers, fell, dead = tmp_path / "run", random.Random(script), {}, []
    argv = flags(script, out, "--max-steps", str(LONG), *evaluate, evaluate=True)

    def evaluates():
        done = max((int(path.name[5:]) for path in checkpoints.complete(out)), default=0)
        return (
            not (out / "before.json").exists()
            if not done
            else done % 2 == 0 and not (out / f"eval-{done:07d}.json").exists()
        )

    for name, more, seconds in moments(numbers, True):
        done = len(lines(out))
        run = fork(script, argv + ["--resume", "auto"], out)
        if name == "while it starts":
            time.sleep(2.5 * seconds)
        elif name == "while a checkpoint is written":
            # of the first, the second or the third step; then at any moment of the tenth of a
            # second that it takes
            until(
                lambda: (
                    any(int(path.name[8:]) > more for path in out.glob("partial-0*"))
                    and (len(lines(out)) > more)
                ),
                run,
            )
            time.sleep(0.1 * seconds)
            name += "" if list(out.glob("partial-0*")) else ", just done"
        elif name == "while it is evaluated":
            until(lambda: (out / "config.json").exists() and evaluates(), run)
            time.sleep(0.1 * seconds)
        else:
            until(
                lambda: len(lines(out)) > min(done, steps(out)[-1] if steps(out) else 0) + more, run
            )
            time.sleep(0.3 * seconds)
        assert None in run.codes(), (
            f"it ended before it could be killed {name}:\n{run.text()[-3000:]}"
        )
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        fell.setdefault(name, []).append(len(lines(out)))
        dead.append(run)  # its worker may still be about while the next start is
    run = fork(script, argv + ["--resume", "auto"], out)
    assert run.wait() == 0, run.text()
    print(
        f"{script}: {sum(map(len, fell.values()))} kills:",
        "; ".join(
            f"{len(where)} {name}, behind steps {sorted(where)}"
            for name, where in sorted(fell.items())
        ),
    )
    assert sum(map(len, fell.values())) >= 20 and len(fell["while a checkpoint is written"]) >= 5
    same_run(out, whole, LONG)
    for run in dead:
        none_survive(run)


# -------------------- killed under torchrun ------------------------------------------------------

TWO = ("--standalone", "--nproc_per_node", "2")
OWN_STORE = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as README says beside --max-restarts


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, more, late",
    [("source", [], 0), ("cord", [], 1), ("source", ["--shard"], 1), ("cord", ["--shard"], 0)],
    ids=["source", "cord", "source-shard", "cord-shard"],
)
def test_torchrun_starts_again_when_a_rank_is_killed(
    script, more, late, flags, undisturbed, tmp_path, monkeypatch
):
    """With --resume auto a restart finds the newest checkpoint. The other rank, which waits for the
    dead one, does not hang; nor does a rank that starts again early take the address that a dead
    one has left in torchrun's store for that of one who is late."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('RANK') == '{late}' and os.environ['TORCHELASTIC_RESTART_COUNT'] > '0':\n    time.sleep(6)\n"  # noqa: E501
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(*OWN_STORE)
    whole, out = undisturbed(script, 5, *more, ranks=2), tmp_path / "run"
    argv = flags(script, out, "--max-steps", "5", "--resume", "auto", *more)
    run = spawn(script, argv, out, [*TWO, "--max-restarts", "2"])
    until(lambda: len(lines(out)) >= 2 and steps(out), run)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert run.wait(120) == 0, run.text()
    assert "going on from step" in run.text()
    same_run(out, whole, 5)
    none_survive(run)


@pytest.mark.slow
def test_two_nodes_start_again_though_only_one_of_them_counts(
    flags, undisturbed, tmp_path, monkeypatch
):
    """Both nodes go on from the same checkpoint, though a rank of only one of them died."""
    monkeypatch.setenv(*OWN_STORE)
    whole, out = undisturbed("source", 5, ranks=2), tmp_path / "run"
    nodes = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{bad_days.free_port()}",
        "--max-restarts",
        "2",
    ]
    one, other = (
        spawn("source", flags("source", out, "--max-steps", "5", "--resume", "auto"), out, nodes)
        for _ in range(2)
    )
    until(lambda: len(lines(out)) >= 2 and steps(out), one)
    ranks = {**ranks_of(one), **ranks_of(other)}
    os.kill(ranks[1], signal.SIGKILL)
    try:
        assert (one.wait(150), other.wait(150)) == (0, 0), one.text() + other.text()
    finally:
        end(one), end(other)
    assert "going on from step" in one.text() + other.text()
    near_run(
        out, whole, 1e-4
    )  # each has all cores of its node, so that sums round in another order


@pytest.mark.slow
def test_an_evaluation_that_was_killed_is_made_up_for(flags, undisturbed, tmp_path):
    """The checkpoint is there, what it scored is not: else the best of a run might never be
    known."""
    more, out = (
        ["--eval-every", "2", "--max-new-tokens", "8", "--eval-batch", "1", "--keep", "4"],
        tmp_path / "run",
    )
    undisturbed("source", 4, *more, evaluate=True, wait=False)
    run = fork("source", flags("source", out, "--max-steps", "4", *more, evaluate=True), out)
    until(lambda: 2 in steps(out), run)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not (out / "eval-0000002.json").exists()
    goes_on(
        "source",
        flags,
        out,
        undisturbed("source", 4, *more, evaluate=True),
        4,
        *more,
        evaluate=True,
    )
    assert (out / "eval-0000002.json").exists()


def test_a_log_is_cut_back_by_a_rename(tmp_path):
    """Planted: writing it anew in its place would lose all of it to a kill in between."""
    log = tmp_path / "log.jsonl"
    for step in range(1, 5):
        append_jsonl(log, {"step": step})
    os.link(log, tmp_path / "before")
    keep_lines(log, lambda line: line["step"] <= 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2] and len(
        (tmp_path / "before").read_text().splitlines()
    ) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_data_worker_that_dies_is_named(script, flags, undisturbed, tmp_path):
    """Killed for its memory, while the main process is at anything."""
    out = tmp_path / "run"
    run = fork(script, flags(script, out, "--max-steps", "1000", "--keep", "1000"), out)
    until(lambda: len(lines(out)) >= 2, run)
    (worker,) = family(run).keys() - {run.pid}
    os.kill(worker, signal.SIGKILL)
    assert run.wait(60) == 1, run.text()
    assert "DataLoader worker (pid(s) " in run.text()
    assert "a data worker died, lower --workers. Go on with --resume auto" in run.text()
    assert not list(out.glob("partial-*"))
    none_survive(run)


# -------------------- asked to stop --------------------------------------------------------------


def goes_on(script, flags, out, whole, last, *more, ranks=1, evaluate=False):
    """The rest of a run that stopped, by --resume auto, gives what the undisturbed one gave."""
    again = fork(
        script,
        flags(script, out, "--max-steps", str(last), "--resume", "auto", *more, evaluate=evaluate),
        out,
        ranks,
    )
    assert again.wait() == 0, again.text()
    assert "going on from step" in again.text()
    same_run(out, whole, last)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, number, to_all",
    [
        ("source", signal.SIGTERM, False),
        ("cord", signal.SIGINT, True),
        pytest.param("cord", signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param("source", signal.SIGINT, False, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM-to-all", "SIGINT"],
)
def test_asked_to_stop_it_saves_and_says_where(
    script, number, to_all, flags, undisturbed, tmp_path
):
    """A preemption signals the process; a terminal everything that it runs, data workers
    included."""
    out = tmp_path / "run"
    run = fork(script, flags(script, out, "--max-steps", "6", "--save-every", "100"), out)
    until(lambda: len(lines(out)) >= 2, run)
    assert len(family(run)) == 2  # it and its worker
    seen = len(lines(out))
    (os.killpg if to_all else os.kill)(run.pid, number)
    assert run.wait(60) == 130, run.text()
    done = len(lines(out))
    assert seen <= done <= seen + 1 < 6 and steps(out) == [done]
    assert (
        f"asked to stop; saved {out / f'step-{done:07d}'}: go on with --resume auto" in run.text()
        and "Traceback" not in run.text()
    )
    none_survive(run)
    goes_on(script, flags, out, undisturbed(script, 6), 6)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_before_training_there_is_nothing_to_save(script, flags, tmp_path):
    out = tmp_path / "run"
    run = fork(
        script, flags(script, out, "--max-steps", "4", "--eval-batch", "1", evaluate=True), out
    )
    until(lambda: (out / "config.json").exists(), run)
    time.sleep(0.3)
    assert not (out / "before.json").exists()
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(20) == -signal.SIGTERM and steps(out) == [] and lines(out) == []
    none_survive(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, number, to_all, more",
    [
        ("source", signal.SIGTERM, False, []),
        ("cord", signal.SIGINT, True, []),
        ("source", signal.SIGINT, False, ["--shard"]),
        ("cord", signal.SIGTERM, False, ["--shard"]),
    ],
)
def test_torchrun_passes_it_on(script, number, to_all, more, flags, undisturbed, tmp_path):
    whole, out = undisturbed(script, 8, *more, ranks=2), tmp_path / "run"
    run = spawn(
        script, flags(script, out, "--max-steps", "8", "--save-every", "100", *more), out, TWO
    )
    until(lambda: len(lines(out)) >= 2, run)
    (os.killpg if to_all else os.kill)(run.pid, number)
    assert run.wait(60) != 0
    none_survive(run)
    done = len(lines(out))
    assert (
        done < 8
        and steps(out) == [done]
        and f"saved {out / f'step-{done:07d}'}: go on with --resume auto" in run.text()
    ), run.text()
    goes_on(script, flags, out, whole, 8, *more, ranks=2)


@pytest.mark.slow
def test_one_rank_alone_is_asked(flags, undisturbed, tmp_path):
    """A node that must go: all ranks save and leave."""
    out = tmp_path / "run"
    run = fork("source", flags("source", out, "--max-steps", "6", "--save-every", "100"), out, 2)
    until(lambda: len(lines(out)) >= 2, run)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    run.wait(60)
    assert run.codes() == [130, 130], run.text()
    assert steps(out) == [len(lines(out))]
    none_survive(run)


# -------------------- the disk -------------------------------------------------------------------

SIZE = 66 << 20  # two of the source script's checkpoints of 30 MB


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own -> its folder; None where nobody may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
            capture_output=True,
        ).returncode
    ):
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "ranks, moment",
    [
        (1, "saving.save"),
        pytest.param(1, "dcp.save", marks=pytest.mark.slow),
        pytest.param(2, "saving.save", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    ranks, moment, disk, flags, undisturbed, tmp_path
):
    """There was room when it began; then somebody else took it, before the model or before the
    optimizer was written. One sentence, and everything is as it was before that checkpoint."""
    out = (disk or tmp_path) / "run"
    run = fork(
        "source",
        flags("source", out, "--max-steps", "3", "--keep", "1"),
        out,
        ranks,
        habit=("eat_before", moment, 2, str(out.parent / "other") if disk else None, 0),
    )
    until(lambda: run.codes()[0] is not None, run)
    end(run)  # the other rank, as torchrun does
    assert run.codes()[0] == 1 and "Traceback" not in run.text(), run.text()
    (said,) = [line for line in run.text().splitlines() if "cannot be written" in line]
    assert f"checkpoint {out / 'step-0000002'} cannot be written (" in said
    assert ("No space left on device" if disk else "File too large") in said
    # About what the checkpoint before took
    needed = 1e9 * float(re.search(r"it needs about ([\d.]+) GB, and [\d.]+ GB are free", said)[1])
    files = [path for path in (out / "step-0000001").rglob("*") if path.is_file()]
    assert needed == pytest.approx(sum(path.stat().st_size for path in files), rel=0.25)
    assert said.endswith("and go on with --resume auto from the last one that is complete")
    assert steps(out) == [1] and not list(out.glob("partial-*"))
    (out.parent / "other").unlink(missing_ok=True)
    goes_on(
        "source", flags, out, undisturbed("source", 3, ranks=ranks), 3, "--keep", "1", ranks=ranks
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_log_that_cannot_be_written(ranks, disk, flags, undisturbed, tmp_path):
    """A disk that is full between two checkpoints shows in the log first."""
    if not disk:
        pytest.skip("no small disk can be mounted here")
    out, more = disk / "run", ["--keep", "1", "--save-every", "10"]
    run = fork(
        "source",
        flags("source", out, "--max-steps", "20", *more),
        out,
        ranks,
        habit=("eat_before", "run.append_jsonl", 11, str(disk / "other"), 0),
    )  # some still fit in
    run.wait(90)
    assert (
        all(run.codes())
        and f"{out / 'log.jsonl'} cannot be written ([Errno 28] No space left on device)"
        in run.text()
    ), run.text()
    assert ranks == 2 or "Traceback" not in run.text()  # the other rank waits for one that has gone
    assert steps(out) == [10]
    none_survive(run)
    (disk / "other").unlink()
    if ranks == 1:
        goes_on("source", flags, out, undisturbed("source", 20), 20, *more)


# ------------------------------------------------------------- which ones stay


def folder_of(tmp_path, number):
    """A run's folder with checkpoints 1, 2, ..., number, of which nothing but the list is there."""
    for step in range(1, number + 1):
        folder = tmp_path / f"step-{step:07d}"
        folder.mkdir()
        write_json(folder / "checkpoint.json", {"step": step})
    return tmp_path


def test_going_back_needs_another_folder(tmp_path):
    """--resume DIR of an earlier checkpoint: auto would take the later ones for this run's."""
    folder = folder_of(tmp_path, 3)
    earlier = folder / "step-0000002"
    with pytest.raises(SystemExit, match="the newest step-0000003; .* earlier one"):
        checkpoints.start_folder(folder, earlier)
    assert checkpoints.start_folder(tmp_path / "elsewhere", earlier) == earlier
    assert checkpoints.start_folder(folder, folder / "step-0000003") == folder / "step-0000003"


def test_results_behind_a_checkpoint_are_not_taken_over(tmp_path):
    folder = folder_of(tmp_path, 2)
    for name in ("eval-0000002", "eval-0000004", "after"):
        (folder / f"{name}.json").write_text("{}")
    checkpoints.start_folder(folder, folder / "step-0000002")
    assert sorted(path.name for path in folder.glob("*.json")) == ["eval-0000002.json"]


# -------------------- other ranks, other folders -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, ways, rel",
    [
        ("source", [(1, []), (2, []), (1, [])], 1e-5),
        pytest.param("cord", [(1, []), (2, []), (1, [])], 1e-5, marks=pytest.mark.slow),
        pytest.param(
            "source", [(2, ["--shard"]), (2, []), (2, ["--shard"])], 1e-4, marks=pytest.mark.slow
        ),
        pytest.param(
            "cord", [(2, ["--shard"]), (1, []), (2, ["--shard"])], 1e-4, marks=pytest.mark.slow
        ),
    ],
    ids=["source", "cord", "source-shard", "cord-shard"],
)
def test_another_number_of_ranks_goes_on(script, ways, rel, flags, undisturbed, tmp_path):
    """Three starts of two steps each, however many ranks hold the weights and the optimizer, are
    one run of six."""
    out = tmp_path / "run"
    undisturbed(script, 6, "--workers", "0", wait=False)
    for number, (ranks, more) in enumerate(ways, 1):
        run = fork(
            script,
            flags(script, out, "--max-steps", "6", "--resume", "auto", *more),
            out,
            ranks,
            habit=("stop_at", 2 * number) if number < 3 else None,
        )
        run.wait()
        assert set(run.codes()) == ({130} if number < 3 else {0}), run.text()
        assert len(lines(out)) == 2 * number and (out / f"step-{2 * number:07d}").exists()
        assert json.loads((out / "config.json").read_text())["ranks"] == ranks
    near_run(out, undisturbed(script, 6, "--workers", "0"), rel)


@pytest.mark.slow
def test_a_folder_that_cannot_be_gone_on_from(flags, undisturbed, tmp_path):
    """--resume DIR: no checkpoint, another script's, another model's, of other flags, one that lost
    a file: one sentence each, and no half of a run's folder."""
    source, cord = (undisturbed(script, 4) / "step-0000004" for script in SCRIPTS)
    (tmp_path / "nothing").mkdir()
    for name in ("model.safetensors", "projections.safetensors", "optimizer", "cut"):
        broken = tmp_path / f"without-{name}"
        shutil.copytree(source, broken)
        if name == "cut":
            os.truncate(broken / "model.safetensors", 1 << 20)
        elif name == "optimizer":
            shutil.rmtree(broken / name)
        else:
            (broken / name).unlink()
    tries = {
        "nowhere": ("source", tmp_path / "nowhere", [], "nowhere is not a checkpoint"),
        "nothing": ("cord", tmp_path / "nothing", [], "nothing is not a checkpoint"),
        "cord's": ("source", cord, [], "was saved by another model"),
        "source's": ("cord", source, [], "was saved by another model"),
        "rows": ("source", source, ["--text-kd", "none"], "was saved by another model"),
        "layers": ("source", source, ["--text-kd", "skip:3"], "made for layers"),
        "train": ("source", source, ["--train", "decoder"], "was saved by another model"),
        "lora": ("cord", cord, ["--lora", "4"], "was saved by another model"),
        **{
            name: ("source", tmp_path / f"without-{name}", [], f"without-{name}")
            for name in ("model.safetensors", "projections.safetensors", "optimizer", "cut")
        },
    }
    runs = {}
    for name, (script, folder, more, _) in tries.items():
        out = tmp_path / f"out-{name}" / "run"
        out.parent.mkdir()
        runs[name] = fork(
            script, flags(script, out, "--max-steps", "5", "--resume", str(folder), *more), out
        )
        if len(runs) % 2 == 0:
            runs[name].wait()
    odd = {}
    for name, run in runs.items():
        code, said = run.wait(), run.text()
        last = [
            line for line in said.splitlines() if line.strip() and "Loading weights" not in line
        ][-1]
        if code != 1 or "Traceback" in said or tries[name][3] not in last or lines(run.out):
            odd[name] = (code, said[-1500:])
    assert not odd, "\n\n".join(f"{name}: {code}\n{said}" for name, (code, said) in odd.items())


# -------------------- checkpoints that are not whole ---------------------------------------------


def test_only_what_was_completed_counts_as_a_checkpoint(undisturbed, tmp_path):
    """checkpoint.json is written last; a folder without it, or under a temporary name, is none."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("source", 4), folder)
    assert [path.name for path in complete(folder)] == ["step-0000003", "step-0000004"]
    (folder / "step-0000004").rename(folder / "partial-0000004")
    assert checkpoints.start_folder(folder, "auto") == folder / "step-0000003"
    (folder / "step-0000003" / "checkpoint.json").unlink()
    assert checkpoints.start_folder(folder, "auto") is None
    with pytest.raises(SystemExit, match="step-0000003 is not a checkpoint .*no checkpoint.json"):
        checkpoints.start_folder(folder, folder / "step-0000003")


def test_weights_are_filled_into_the_model_that_is_there(undisturbed, tmp_path):
    """Without config.json transformers would build its default of 7B; and a deeper model's weights
    do not fit, whatever is missing."""
    folder = tmp_path / "step"
    shutil.copytree(undisturbed("source", 4) / "step-0000004", folder)
    trained = models.load_audio_model(folder)[0]
    (folder / "config.json").unlink()
    model = models.load_audio_model(mini.world.MINI / "student")[0]
    saving.fill(model, folder)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            model.state_dict().values(), trained.state_dict().values(), strict=True
        )
    )
    layers = models.decoder(model).layers
    del layers[-1]
    model.config.text_config.num_hidden_layers = len(layers)
    with pytest.raises(ValueError, match="tensors are unexpected, such as"):
        saving.fill(model, folder)


def test_a_truncated_file_is_called_that_when_it_is_loaded(undisturbed, tmp_path):
    """Of the model or of the optimizer; and an optimizer that is gone is not begun anew."""
    folder = tmp_path / "step"
    shutil.copytree(undisturbed("source", 4) / "step-0000004", folder)
    os.truncate(folder / "model.safetensors", 1 << 20)
    model = models.load_audio_model(mini.world.MINI / "student")[0]
    with pytest.raises(
        SystemExit, match=f"{folder} .* is not whole .*if a file is truncated or damaged, move it"
    ):
        checkpoints.load_model(folder, model)
    files = sorted((folder / "optimizer").glob("*.safetensors"))
    os.truncate(files[0], files[0].stat().st_size - 1000)
    step = torch.nn.Module()
    step.student, step.projections = model, layer_map.Projections(layer_map.pairs(7, 9), 128, 160)
    step.requires_grad_(True)
    step.student.get_encoder(modality="audio").embed_positions.requires_grad_(False)
    with pytest.raises(SystemExit, match="is not whole .*truncated or damaged"):
        checkpoints.load_optimizer(folder, step, torch.optim.AdamW(step.parameters()))
    for file in files:
        file.unlink()
    with pytest.raises(SystemExit, match="or is not whole .*did not learn there"):
        checkpoints.load_optimizer(folder, step, torch.optim.AdamW(step.parameters()))
    shutil.rmtree(folder / "optimizer")
    with pytest.raises(SystemExit, match="or is not whole"):
        checkpoints.load_optimizer(folder, step, torch.optim.AdamW(step.parameters()))


def test_a_runs_folder_is_its_newest_checkpoint(undisturbed, tmp_path):
    """Wherever a model is named: --model runs/a, --student runs/a. A model needs no optimizer."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("source", 4), folder)
    assert newest_checkpoint(folder) == str(folder / "step-0000004")
    assert newest_checkpoint("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert newest_checkpoint(mini.world.MINI / "student") == str(mini.world.MINI / "student")
    shutil.rmtree(folder / "step-0000004" / "optimizer")
    assert models.load_audio_model(folder)[0].name_or_path == str(folder / "step-0000004")


def test_a_run_that_starts_from_a_runs_folder_notes_which_checkpoint(flags, undisturbed, tmp_path):
    out, base = tmp_path / "run", undisturbed("source", 4)
    run = fork("source", flags("source", out, "--max-steps", "1", "--student", str(base)), out)
    assert run.wait() == 0, run.text()
    assert json.loads((out / "config.json").read_text())["student"] == str(base / "step-0000004")


# -------------------- files of a run -------------------------------------------------------------


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, flush, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")) or flush(number),
    )
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(str(new)) or replace(old, new))
    write_json(tmp_path / "results.json", {"a": 1})
    assert done == [str(tmp_path / "results.json.part"), str(tmp_path / "results.json")]


@pytest.mark.parametrize(
    "name, text, words",
    [
        (
            "log.jsonl",
            '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n',
            "log.jsonl:2 is no line that a run wrote .*mend it, or move the file away",
        ),
        (
            "log.jsonl",
            '{"step": 1}\n"step"\n{"step": 3}\n',
            "log.jsonl:2 is no line that a run wrote",
        ),
        (
            "log.jsonl",
            b'{"step": 1}\n\xff\n{"step": 3}\n',
            "log.jsonl:2 is no line that a run wrote",
        ),
    ],
)
def test_a_broken_file_of_a_run_is_named(name, text, words, tmp_path):
    folder = folder_of(tmp_path, 3)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=f"^{folder}/{words}"):
        keep_lines(folder / "log.jsonl", lambda line: line["step"] <= 3)


def test_a_log_that_a_kill_cut_off_is_no_broken_one(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n\0\0\0')
    keep_lines(tmp_path / "log.jsonl", lambda line: line["step"] <= 3)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "script, ranks", [("source", 1), ("cord", 1), pytest.param("cord", 2, marks=pytest.mark.slow)]
)
def test_an_out_that_is_a_file(script, ranks, flags, tmp_path):
    out = tmp_path / "run"
    out.write_text("mine")
    run = fork(script, flags(script, out, "--max-steps", "1"), out, ranks)
    run.wait(90)
    assert (
        run.codes() == [1] * ranks
        and "Traceback" not in run.text()
        and f"{out} cannot be written ([Errno 17] File exists" in run.text()
    ), run.text()
    assert out.read_text() == "mine"


def test_an_out_that_nobody_may_write_to(tmp_path, monkeypatch):
    """root may write anywhere, so that the system's answer is put in; and in /proc nobody makes a
    folder."""
    with pytest.raises(
        SystemExit, match=r"^/proc/run cannot be written \(\[Errno 2\].*give another --out"
    ):
        checkpoints.start_folder("/proc/run", None)
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(
        SystemExit,
        match=r"run cannot be written \(no permission, or a read-only disk\); make room there or give another --out",  # noqa: E501
    ):
        checkpoints.start_folder(tmp_path / "run", None)
    with pytest.raises(SystemExit, match="run cannot be written"):
        evaluate.main(
            [
                "--task",
                "both",
                "--model",
                str(mini.world.MINI / "student"),
                "--data",
                "any.jsonl",
                "--out",
                str(tmp_path / "run"),
            ]
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_is_full_at_the_start(script, disk, flags, tmp_path):
    if not disk:
        pytest.skip("no small disk can be mounted here")
    out = disk / "run"
    bad_days.fill(disk / "other")
    run = fork(script, flags(script, out, "--max-steps", "1"), tmp_path / "said")
    assert run.wait(90) == 1 and "Traceback" not in run.text(), run.text()
    assert re.search(
        rf"^{out}\S* cannot be written \(.*No space left on device.*\); make room there",
        run.text(),
        re.M,
    ), run.text()


def test_an_evaluation_that_cannot_be_written_is_not_begun(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        SystemExit, match=f"^{tmp_path / 'file'} cannot be written .*File exists"
    ):  # before a model is loaded
        evaluate.main(
            [
                "--task",
                "gap",
                "--model",
                "nowhere",
                "--data",
                "any.jsonl",
                "--out",
                str(tmp_path / "file"),
            ]
        )
