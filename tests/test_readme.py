"""Prose that rots: the commands of README, docs/ and the scripts' openings parse, the quoted
numbers
are the measured ones, links and names resolve, and imports point down only."""
import argparse
import ast
import functools
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import evaluate
import train_cord
import train_source_layer
from lab import experiments, inside

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]}
FOLDERS = ["plumbing", "mini", "prepare", "lab"]
SCRIPTS = [path for folder in ["", *FOLDERS] for path in sorted((ROOT / folder).glob("*.py"))]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


OURS = {module_name(path) for path in SCRIPTS if path.name != "__init__.py"}
OPENINGS = {module_name(path): ast.get_docstring(ast.parse(path.read_text())) or ""
            for path in SCRIPTS}


# ---------------------------------------------------------------------------------------------
# 1. Commands

def shown_commands(text):
    """Indented lines, a trailing backslash joins them, and `python ...` in the middle of prose."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"^ {4,}(.*)", joined, re.M):
        for part in line.split("&&"):
            yield shlex.split(part, comments=True, posix=True) if "python" in part \
                or part.strip().startswith("torchrun") else []
    prose = re.sub(r"^ {4,}.*", "", text, flags=re.M)
    for command in re.findall(r"`((?:python|torchrun) [^`]+)`", prose):
        yield shlex.split(command)


def commands():
    """(where, module, arguments) of every command that runs a file of ours."""
    # CHANGELOG.md is left out: half of its commands are those of before
    for where, text in {**PAGES, **OPENINGS}.items():
        if where == "CHANGELOG.md":
            continue
        for words in shown_commands(text):
            if not words or words[0] not in ("python", "torchrun"):
                continue
            for i, word in enumerate(words):
                if word == "-m" and words[i + 1].split(".")[0] in FOLDERS:
                    yield where, words[i + 1], words[i + 2:]
                    break
                if word.endswith(".py"):
                    yield where, word.removesuffix(".py").replace("/", "."), words[i + 1:]
                    break


class Captured(Exception):
    pass


@functools.cache
def parser_of(module):
    """The ArgumentParser that a module's main() builds."""
    def capture(parser, *_, **__):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        patch.setattr(sys, "argv", [module])
        with pytest.raises(Captured) as caught:
            importlib.import_module(module).main()
    return caught.value.args[0]


def all_flags(parser):
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags = flags.union(*map(all_flags, action.choices.values()))
    return flags


def test_there_are_commands_to_check():
    assert len(list(commands())) > 60
    assert {"train_source_layer", "lab.experiments", "prepare.speak"} <= {
        module for _, module, _ in commands()}


@pytest.mark.parametrize("module", sorted({module for _, module, _ in commands()}))
def test_commands_use_flags_that_exist(module, capsys):
    if module not in OURS:                              # a script of the tests: no flags of ours
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        return
    parser = parser_of(module)
    for where, other, arguments in commands():
        if other != module:
            continue
        unknown = {word for word in arguments if re.fullmatch(r"--[a-z][\w-]*", word)}
        unknown -= all_flags(parser)
        assert not unknown, f"{where}: {module} has no {unknown}"

        # FILE, NAME and ... stand for something; what has none of these must parse as it stands
        if arguments and not any(re.fullmatch(r"[A-Z]+\d?|.*\.\.\..*", word) for word in arguments):
            try:
                parser.parse_args(arguments)
            except SystemExit:
                pytest.fail(f"{where}: {module} {arguments}: {capsys.readouterr().err}")


def test_training_commands_pass_the_scripts_own_checks():
    scripts = {"train_source_layer": train_source_layer, "train_cord": train_cord}
    for _, module, arguments in commands():
        if module in scripts and "..." not in arguments and "FLAGS" not in arguments:
            scripts[module].parse_flags(arguments)


# ---------------------------------------------------------------------------------------------
# 2. Numbers

def committed(name):
    return json.loads((FIGURES / f"{name}.json").read_text())


def test_the_default_run_of_paper_a():
    """What the run says it expects, README's table and the committed results are the same."""
    results = committed("source_layer")
    for line in evaluate.report_change(results["before"], results["after"]).splitlines():
        assert f"    {line}".rstrip() in README, line
    for part, key in (("aqa", "average"), ("ser", "ua")):
        before, after = (results[when][part][key] for when in ("before", "after"))
        assert f"{part.upper()} {before:.1f} -> {after:.1f}" in train_source_layer.EXPECTED


def test_the_default_run_of_cord():
    """The same; README shows the lines that matter most, docs/results_cord.md all of them."""
    results = committed("cord_run")
    lines = evaluate.report_gap(results["after"], results["before"]).splitlines()
    for line in lines:
        assert f"    {line}".rstrip() in PAGES["docs/results_cord.md"], line
    for line in lines:
        if line.startswith((" " * 10, "together", "text", "audio")) and "before" not in line:
            assert f"    {line}".rstrip() in README, line
    for view in ("text", "audio"):
        before, after = (results[when][f"{view}_accuracy"] for when in ("before", "after"))
        assert f"{view} {before:.1f} -> {after:.1f}" in train_cord.EXPECTED
    reduction = evaluate.gap_reduction(results["before"], results["after"])
    assert results["gap_reduction_percent"] == reduction > 0


def test_where_hearing_and_reading_part_ways():
    for line in inside.kl_lines(committed("kl")):
        assert f"    {line}".rstrip() in PAGES["docs/results_cord.md"], line


def test_what_the_mini_models_can_do():
    figures = json.loads((ROOT / "mini" / "figures.json").read_text())
    for name, tasks in figures.items():
        if name != "heard":
            cells = [str(tasks[task]) for task in ("speech", "sound", "music", "emotion")]
            assert f"| {name} | {' | '.join(cells)} |" in PAGES["docs/mini_world.md"]


def accuracies(row, part):
    """The mean over the seeds, and each."""
    each = [experiments.accuracy(row["runs"][seed], part) for seed in sorted(row["runs"])]
    return experiments.with_seeds(experiments.mean(row, part), each)


def flags_cell(row, without=""):
    if row["flags"] is None:
        return ""
    flags = re.sub(without, "", row["flags"]).strip()
    return f"`{flags}`" if flags else "(none)"


def test_readmes_table_of_paper_a():
    for label, row in committed("table")["rows"].items():
        cells = [label, flags_cell(row), *map("{:.2f}".format, experiments.PAPER[label]),
                 accuracies(row, "aqa"), accuracies(row, "ser")]
        assert f"| {' | '.join(cells)} |" in README, label


def test_readmes_table_of_paper_b():
    rows = committed("cord")["rows"]
    for label, row in rows.items():
        gone, _, each = experiments.reduction(row, rows[experiments.BASELINE])
        closed = "" if label == experiments.BASELINE else experiments.with_seeds(gone, each)
        cells = [label, flags_cell(row, r"--epochs 2|--eval-every 25"),
                 experiments.PAPER_GAP.get(label, ""), accuracies(row, "text"),
                 accuracies(row, "audio"), closed]
        assert f"| {' | '.join(cells)} |" in README, label


def test_readmes_sentences_are_those_of_the_results():
    """Three seeds in a row, as README quotes them, stand in the results pages too."""
    results = PAGES["docs/results_source_layer.md"] + PAGES["docs/results_cord.md"]
    results = " ".join(results.split())
    quoted = re.findall(r"[-+]?\d+\.\d, [-+]?\d+\.\d and [-+]?\d+\.\d", " ".join(README.split()))
    assert len(quoted) >= 5
    for three in quoted:
        assert three in results, three


def test_no_sentence_rests_on_an_interval_over_questions():
    """Intervals stand in tables and in what a run prints, where their heading says what they
    are."""
    for where, text in PAGES.items():
        prose = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
        found = re.search(r"\[[-+]?\d+\.\d, [-+]?\d+\.\d\]", "\n".join(prose))
        assert not found, f"{where}: {found}"


# ---------------------------------------------------------------------------------------------
# 3. Files, links, names

def test_readme_is_short():
    assert len(README.splitlines()) <= 180
    assert len(README.encode()) <= 14_000
    tables = [line for line in README.splitlines() if line.startswith("|")]
    assert max(line.count("|") for line in tables) - 1 <= 6


def test_the_top_level_is_in_readmes_list():
    for path in ROOT.glob("*.py"):
        assert f"| `{path.name}` |" in README, path.name
    for folder in [*FOLDERS, "docs", "tests"]:
        assert f"`{folder}/`" in README, folder


def anchors(text):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("where", PAGES)
def test_links_resolve(where):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[where]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / where if not name else (ROOT / where).parent / name
        assert path.exists(), f"{where}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{where}: {target}"


def test_every_page_is_reached_from_readme():
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name}" in README, path.name


@pytest.mark.parametrize("where", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_files_and_names_in_prose_exist(where):
    """`losses.jsd` is a name in losses.py, and `plumbing/optimizer.py` is a file."""
    for quoted in re.findall(r"`([\w./]+)`", PAGES[where]):
        if re.fullmatch(r"(tests|docs|plumbing|mini|prepare|lab)/[\w./]+\.(py|md|json)", quoted):
            assert (ROOT / quoted).exists(), f"{where}: {quoted}"
        module, _, attributes = quoted.partition(".")
        if module in OURS and attributes != "py" and attributes:
            found = importlib.import_module(module)
            for name in attributes.split("."):
                assert hasattr(found, name), f"{where}: {quoted}"
                found = getattr(found, name)


def test_the_oldest_versions_are_the_requirements_lower_ends():
    requirements = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    oldest = dict(re.findall(r"^([\w-]+)>=([\d.]+)", requirements, re.M))
    assert {"torch", "transformers"} <= oldest.keys()
    assert "==" not in re.sub("#.*|;.*", "", requirements)
    page = PAGES["docs/troubleshooting.md"]
    command, = re.findall(r"^    pip install -r requirements.txt (torch==.*)", page, re.M)
    asked = dict(word.split("==") for word in shlex.split(command))
    assert asked.keys() == oldest.keys()
    assert all(asked[name].startswith(f"{version}.") for name, version in oldest.items())


def test_both_papers_can_be_cited():
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    ids = [paper["identifiers"][0]["value"] for paper in papers]
    assert ids == ["arXiv:2509.18579", "arXiv:2601.16547"]
    assert (papers[1]["start"], papers[1]["end"]) == (31602, 31612)


# ---------------------------------------------------------------------------------------------
# 4. Imports point down only

def imports(path):
    """-> (modules of ours that are imported when the file is, those inside functions)."""
    tree = ast.parse(path.read_text())
    inside_functions = {id(node) for function in ast.walk(tree)
                        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
                        for node in ast.walk(function)}
    early, late = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        (late if id(node) in inside_functions else early).update(OURS.intersection(names))
    early.discard(module_name(path))                    # data.py, run as a script, imports itself
    return early, late


TORCH_ALONE = ["losses", "fused", "layer_map", "sampler", "plumbing.optimizer"]


@pytest.mark.parametrize("path", SCRIPTS, ids=module_name)
def test_imports_point_down_only(path):
    early, late = imports(path)
    name = module_name(path)
    folder = name.partition(".")[0] if "." in name else ""
    if name in TORCH_ALONE:
        assert not early | late
    if folder in ("", "plumbing"):                      # the method, and what serves its runs
        above = {module for module in early | late if module.startswith(("lab.", "prepare."))}
        assert not above, f"{name} imports {above}"
        assert "mini.world" not in early, f"{name} loads the mini world for everybody"
        if folder == "plumbing":
            assert "mini.world" not in late


def test_no_imports_go_round():
    early = {module_name(path): imports(path)[0] for path in SCRIPTS}
    finished = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for other in early[name]:
                visit(other, [*path, name])
            finished.add(name)

    for name in early:
        visit(name, [])
