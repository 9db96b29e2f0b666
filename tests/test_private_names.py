"""
Private names of other packages that our scripts use, each in one place, because there is no
public one.

A new version may change them without a word. When a test here fails, look at the place that it
names, and at the test that sees what the name does there. (The pretended GPU,
kernels_for_h100.py and test_fused.py reach deeper into torch, on purpose: they fail by themselves.)
"""
import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("*.py")]
for folder in ("plumbing", "mini", "prepare", "lab"):
    FILES += (ROOT / folder).glob("*.py")
OURS = {path.stem for path in FILES}
# (our file, name) -> the module that has it, where we use it, the test that sees what it does
PRIVATE = {
    ("fused.py", "_dynamo"): (
        "torch", "fused._any_rows", "test_fused.py (slow: what is compiled for a GPU)"),
    ("models.py", "_hf_peft_config_loaded"): (
        "transformers.integrations.peft", "models._load",
        "test_models.py::test_granites_own_adapter_becomes_its_weights"),
    ("models.py", "_weight_conversions"): (
        "transformers.core_model_loading", "models._load",
        "test_models.py::test_granites_own_adapter_becomes_its_weights"),
    ("models.py", "_disable_adapters"): (
        "peft.tuners.tuners_utils", "models.without_lora",
        "test_models.py::test_snapshot_and_teacher_are_read_with_the_adapter_off"),
    ("prepare/speak.py", "_handle"): ("ctypes", "speak's library of espeak-ng", "test_speak.py"),
}


@pytest.mark.parametrize("file, name", PRIVATE)
def test_the_name_is_still_there(file, name):
    module, place, test = PRIVATE[file, name]
    source = inspect.getsource(importlib.import_module(module))
    assert name in source, f"{module} has no {name} any more: look at {place} and at {test}"


def test_no_other_private_name_is_used():
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        # Our own modules, also under another name: from plumbing import optimizer as adamw
        ours = OURS | {"self", "cls"}
        for node in ast.walk(tree):
            if isinstance(node, ast.alias) and node.name.rpartition(".")[2] in OURS:
                ours.add(node.asname or node.name)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            of_ours = isinstance(node.value, ast.Name) and node.value.id in ours
            if not of_ours and not node.attr.startswith("__"):
                found.add((str(path.relative_to(ROOT)), node.attr))
    assert found == PRIVATE.keys()


def test_the_compilers_marks_are_still_there():
    for mark in ("maybe_mark_dynamic", "mark_static"):
        assert hasattr(torch._dynamo, mark), (
            f"torch._dynamo has no {mark} any more: look at fused._any_rows")
