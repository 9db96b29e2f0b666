"""Prose that rots: README's commands must parse, its numbers must be the ones in the files, and imports must point down only."""
import ast
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import evaluate
from lab import inside
import train_cord
import train_source_layer
from mini.world import MINI

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README, **{path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in ROOT.glob("*.py")}}


def commands():
    """(where, script, arguments) of every command shown in README and in the scripts' openings."""
    for where, text in TEXTS.items():
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if match := re.match(r" {4,}(?:pip install -r requirements.txt && )?(?:python|torchrun [^.]*?) (\w+\.py) ?([^#]*)", line):
                arguments = match[2].strip()
                if not arguments.endswith("..."):
                    yield where, match[1], shlex.split(arguments)


def test_there_are_commands_to_check():
    assert len(list(commands())) > 15


@pytest.mark.parametrize("script", sorted({script for _, script, _ in commands()}))
def test_commands_use_flags_that_exist(script, monkeypatch, capsys):
    def shown(*parts):
        monkeypatch.setattr(sys, "argv", [script, *parts, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not end.value.code
        return capsys.readouterr().out

    text = shown()
    if parts := re.search(r"usage: \S+ \[-h\] {(.*?)}", text):                 # a script of several commands: bench.py
        text += "".join(map(shown, parts[1].split(",")))
    for where, other, arguments in commands():
        if other == script:
            for flag in (a for a in arguments if a.startswith("--")):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{where}: {script} has no {flag}"


def test_training_commands_parse():
    for where, script, arguments in commands():
        if script in ("train_source_layer.py", "train_cord.py"):
            {"train_source_layer.py": train_source_layer, "train_cord.py": train_cord}[script].parse_flags(arguments)


def test_quoted_numbers_are_the_measured_ones():
    """EXPECTED (which the run prints), README's table and the committed results of the default run are one and the same."""
    results = json.loads((ROOT / "figures" / "source_layer.json").read_text())
    for name, part in (("average", "aqa"), ("SER", "ser")):
        key = "average" if part == "aqa" else "ua"
        before, after = results["before"][part][key], results["after"][part][key]
        assert train_source_layer.EXPECTED[part] == (round(before, 1), round(after, 1))
        row = re.search(rf"^ +{name} +([\d.]+) +([\d.]+)", README, re.M)
        assert [float(row[1]), float(row[2])] == pytest.approx([before, after], abs=0.006)
    assert results["after"]["aqa"]["average"] > results["before"]["aqa"]["average"]
    for name, tasks in json.loads((MINI / "figures.json").read_text()).items():
        if name != "heard":
            row = re.search(rf"\| {name} \|(.*)\|", README)
            assert [float(x) for x in row[1].split("|")] == [tasks[t] for t in ("speech", "sound", "music", "emotion")], name


def test_quoted_numbers_of_cord_are_the_measured_ones():
    """The same for the default run of train_cord.py, its report letter by letter, and the KL analysis."""
    results = json.loads((ROOT / "figures" / "cord_run.json").read_text())
    for view in ("text", "audio"):
        assert train_cord.EXPECTED[view] == tuple(round(results[when][f"{view}_accuracy"], 1) for when in ("before", "after"))
    assert results["gap_reduction_percent"] == evaluate.gap_reduction(results["before"], results["after"]) > 0
    for line in evaluate.report_gap(results["after"], results["before"]).splitlines() + inside.kl_lines(json.loads((ROOT / "figures" / "kl.json").read_text())):
        assert f"    {line}".rstrip() in README, line


ALLOWED = {"losses": set(), "layer_map": set(), "data": set(), "common": {"data", "models"}, "models": {"data", "shapes"}, "shapes": set(), "import_datasets": {"data"}, "verbalise": set(), "speak": {"data", "common", "verbalise"}, "mini_world": {"data", "models", "shapes", "common", "speak"},
           "rollout": {"data", "models"}, "judge": {"data", "models"}, "inside": {"data", "models", "losses", "layer_map", "rollout"},
           "evaluate": {"data", "models", "common", "layer_map", "inside", "judge", "report", "rollout"}, "report": {"data"},
           "textualize": {"data", "models", "common", "mini_world", "evaluate", "judge", "rollout"}, "experiments": {"common", "mini_world", "evaluate", "train_source_layer", "train_cord"},
           "train_source_layer": {"data", "models", "common", "losses", "layer_map", "mini_world", "evaluate", "report", "split_adamw"},
           "train_cord": {"data", "models", "common", "losses", "mini_world", "evaluate", "judge", "report", "rollout", "split_adamw"}, "split_adamw": set(),
           "memory": {"data", "models", "shapes", "common", "layer_map", "rollout", "split_adamw", "train_source_layer", "train_cord"},
           "bench": {"data", "models", "common", "losses", "memory", "mini_world", "rollout", "split_adamw", "train_source_layer", "train_cord"}}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down_only(path):
    ours = {p.stem for p in ROOT.glob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & ours
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & ours
    assert found <= ALLOWED[path.stem], f"{path.name} imports {found - ALLOWED[path.stem]}"


def test_readmes_oldest_versions_are_the_requirements_lower_ends():
    requirements = (ROOT / "requirements.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)>=([\d.]+)", requirements, re.M))
    assert {"torch", "transformers"} <= oldest.keys() and "==" not in re.sub("#.*|;.*", "", requirements)
    command, = re.findall(r"^    pip install -r requirements.txt (torch==.*)", README, re.M)
    asked = dict(word.split("==") for word in shlex.split(command))
    assert asked.keys() == oldest.keys()
    assert all(asked[name].startswith(f"{version}.") for name, version in oldest.items())


def test_every_file_of_ours_is_in_readmes_list():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name
