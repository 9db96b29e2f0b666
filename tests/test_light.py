"""Light to start: nothing heavy for --help, and no speech, formulas or figures where --data is
given."""

import json
import subprocess
import sys
from pathlib import Path

import bad_days
import pytest

import mini.world

ROOT = Path(__file__).parent.parent
EXTRAS = ("espeakng_loader", "num2words", "pylatexenc", "matplotlib")
HEAVY = (*EXTRAS, "pyarrow", "peft", "scipy", "transformers.modeling_utils")


def commands():
    """Every module that is a command, by its name for python -m."""
    for folder in ("", "mini", "prepare", "lab"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if "__main__" in path.read_text():
                yield f"{folder}.{path.stem}".lstrip(".")


# Runs each module as a command, one after the other, and prints what has been imported by then
HELP = """
import runpy, sys
heavy = sys.argv[1].split(",")
for module in sys.argv[2:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print("ended:", module, end.code, *[name for name in heavy if name in sys.modules])
"""


def test_help_imports_nothing_heavy():
    names = list(commands())
    done = subprocess.run(
        [sys.executable, "-c", HELP, ",".join(HEAVY), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended:")]
    assert ended == [f"ended: {name} 0" for name in names] and len(names) > 15
    assert done.stdout.count("usage:") >= len(names)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Four clips of the mini world, as anybody's own data."""
    import soundfile

    folder = tmp_path_factory.mktemp("light")
    lines = []
    for i in range(4):
        record = mini.world.make_record("sound", i, "train", 7)
        record["audio"] = f"{i}.wav"
        wave = mini.world.synthesise(record.pop("recipe")).numpy()
        soundfile.write(folder / record["audio"], wave, mini.world.SAMPLE_RATE)
        lines.append(json.dumps({**record, "transcript": record["description"]}) + "\n")
    path = folder / "manifest.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    "command",
    [
        "source --dry-run --batch-size 2 --micro-batch 2",
        "cord --dry-run --batch-size 2 --group-size 2 --max-new-tokens 8",
        "textualize",
    ],
)
def test_own_data_needs_no_speech_no_formulas_and_no_figures(command, manifest, tmp_path):
    script, *flags = command.split()
    flags += ["--data", str(manifest)]
    if script != "textualize":
        flags += ["--out", str(tmp_path / "run")]
    run = bad_days.fork(script, flags, tmp_path / "run", habit=("without", *EXTRAS))
    assert run.wait() == 0, run.text()[-4000:]
    if script != "textualize":
        assert (tmp_path / "run" / "log.jsonl").exists()
