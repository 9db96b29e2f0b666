"""--track: what arrives at TensorBoard, and what wandb and trackio are told."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_cord
from plumbing import tracking


def scalars(out):
    """The run in a run's folder, as TensorBoard reads it -> {name: [(step, value), ...]}"""
    (folder,) = out.glob(f"{out.name}-*")
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_a_run_that_was_killed_as_one(tmp_path):
    """Killed behind step 5, it goes on from its checkpoint of step 3."""
    out = tmp_path / "run"
    out.mkdir()
    for done, last in ((0, 5), (3, 7)):
        send = tracking.start("tensorboard", out, done, {})
        for step in range(done + 1, last + 1):
            send({"loss": 1 / step + done}, step)
        send.__closure__[0].cell_contents.close()
    expected = [(step, 1 / step + 3 * (step > 3)) for step in range(1, 8)]
    assert scalars(out) == {"loss": [(step, pytest.approx(x)) for step, x in expected]}

    # Begun anew in the same folder it is another run
    before = (out / "tracked.txt").read_text()
    tracking.start("tensorboard", out, 0, {})
    assert (out / "tracked.txt").read_text() != before


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_goes_on_does_so_in_the_same_tracked_run(name, tmp_path, monkeypatch):
    """(Both were tried for real, wandb offline; here they note what they are told.)"""
    told = []
    package = SimpleNamespace(
        init=lambda *given, **named: told.append(named),
        log=lambda numbers, step: told.append((numbers, step)),
    )
    monkeypatch.setitem(sys.modules, name, package)
    for done in (0, 3, 0):
        tracking.start(name, tmp_path, done, {"lr": 1e-5})({"loss": 0.5}, done + 1)
    first, again, anew = told[::2]
    assert first == again and first["name"] != anew["name"]
    assert first["resume"] == "allow" and first["config"] == {"lr": 1e-5}
    assert told[1::2] == [({"loss": 0.5}, step) for step in (1, 4, 1)]


def test_a_tracker_that_is_not_installed_is_named_at_once(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_cord.parse_flags(["--track", "wandb"])
    assert "--track wandb needs its package: pip install wandb" in capsys.readouterr().err
