"""The recipes of docs/recipes.md, command after command, from files as they are downloaded to a row
of a table: with small files, the mini models and no GPU."""

import functools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_import_datasets import clip, write_parquet

import evaluate
import textualize
import train_cord
import train_source_layer
from lab import compare, shapes
from mini.world import MINI
from prepare import import_datasets, speak

RECIPES = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
SCRIPTS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (
        compare,
        evaluate,
        import_datasets,
        shapes,
        speak,
        textualize,
        train_cord,
        train_source_layer,
    )
}


def recipe(title):
    """The commands below a heading, one list of words each."""
    text = RECIPES.split(f"\n## {title}\n")[1].split("\n#")[0]
    return [
        shlex.split(line)
        for line in re.sub(r"\\\n\s*", " ", text).splitlines()
        if re.match(r"    (hf|python|torchrun) ", line)
    ]


SMALL = {
    "Qwen/Qwen2.5-Omni-7B": MINI / "student",
    "Qwen/Qwen2-Audio-7B-Instruct": MINI / "student",
    "Qwen/Qwen3-8B": MINI / "teacher",
    "kokoro": "espeak",
}


def run(command, small=SMALL, **changes):
    """A recipe's command in this process, with other flags where they are given, two steps where it
    trains, and small models for the real ones."""
    command = command[:]
    if command[0] == "torchrun":
        del command[1:3]
    if command[1] == "-m":
        del command[1]
    script = command[1].removesuffix(".py").rpartition(".")[2]
    arguments = [str(small.get(word, word)) for word in command[2:]]
    for flag, value in changes.items():
        flag = "--" + flag.replace("_", "-")
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = str(value)
    if script.startswith("train") and "--dry-run" not in arguments:
        arguments += ["--dry-run"]
    SCRIPTS[script](arguments)
    return script


TRACE = "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A bell rings.</CAPTION><REASONING>It is metal.</REASONING><SUMMARY>A bell.</SUMMARY></THINK><RESPONSE>{}</RESPONSE>"  # noqa: E501


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """What `hf download` and the authors' pages would leave here."""
    monkeypatch.chdir(tmp_path)
    audio = lambda i: {"bytes": clip(), "path": f"{i}.wav"}
    for name, task in ("complex_audio", "bell"), ("meld", "dog"):
        asked = {"user": "<audio>What is heard? A. bell B. dog", "assistant": TRACE.format(task)}
        write_parquet(
            tmp_path / f"CoTA/{name}/train-00000-of-00002.parquet",
            [{"audio": audio(i), **asked} for i in range(35)],
        )
        (tmp_path / f"CoTA/{name}/train-00001-of-00002.parquet").write_bytes(b"PAR1 cut")
    (tmp_path / "MMAU/test-mini-audios").mkdir(parents=True)
    (tmp_path / "MMAU/test-mini-audios/x.wav").write_bytes(clip())
    (tmp_path / "MMAU/mmau-test-mini.json").write_text(
        json.dumps(
            [
                {
                    "id": f"x{i}",
                    "audio_id": "./test-mini-audios/x.wav",
                    "question": "What is heard?",
                    "choices": ["bell", "dog"],
                    "answer": "bell",
                    "dataset": "X",
                    "task": task,
                    "split": "test-mini",
                    "category": "['Reasoning']",
                    "sub-category": "Y",
                    "difficulty": "easy",
                }
                for i, task in enumerate(("sound", "music", "speech"))
            ]
        )
    )
    session = tmp_path / "IEMOCAP_full_release/Session5"
    (session / "dialog/EmoEvaluation").mkdir(parents=True)
    (session / "sentences/wav/Ses05F_impro01").mkdir(parents=True)
    for i, emotion in enumerate(("ang", "sad", "neu", "exc")):  # noqa: B007
        (session / f"sentences/wav/Ses05F_impro01/Ses05F_impro01_F00{i}.wav").write_bytes(clip())
    (session / "dialog/EmoEvaluation/Ses05F_impro01.txt").write_text(
        "".join(
            f"[6.2901 - 8.2357]\tSes05F_impro01_F00{i}\t{emotion}\t[2.5000, 2.5000, 2.5000]\n"
            for i, emotion in enumerate(("ang", "sad", "neu", "exc"))
        )
    )
    write_parquet(
        tmp_path / "NuminaMath-CoT/data/train-00000-of-00001.parquet",
        [
            {
                "source": "orca_math",
                "problem": f"What is {i} plus 4?",
                "solution": f"It is $\\boxed{{{i + 4}}}$.",
            }
            for i in range(20)
        ],
    )
    write_parquet(
        tmp_path / "gsm8k/main/test-00000-of-00001.parquet",
        [
            {"question": f"Ann has {i} apples and gets 2 more.", "answer": f"So.\n#### {i + 2}"}
            for i in range(3)
        ],
    )
    for name in ("mmsu/law", "openbookqa/test"):
        write_parquet(
            tmp_path / f"voicebench/{name}-00000-of-00001.parquet",
            [
                {
                    "audio": audio(i),
                    "prompt": "What shines?\nA. rain\nB. the sun\nC. mud\nD. soup",
                    "reference": "B",
                }
                for i in range(3)
            ],
        )
    return tmp_path


def test_paper_a(downloads):
    done = [
        run(command, max_new_tokens=16, lora=4, batch_size=4)
        for command in recipe("Paper A: from download to table")
        if command[0] != "hf"
    ]
    assert done == ["import_datasets"] * 3 + ["textualize", "train_source_layer", "evaluate"]
    row = json.loads((downloads / "runs/a/results.json").read_text())
    assert (
        set(row["after"]["aqa"]) >= {"sound", "music", "speech", "average"}
        and row["after"]["ser"]["ua"] is not None
    )
    assert (downloads / "runs/a/step-0000002/adapter_model.safetensors").is_file() and json.loads(
        (downloads / "runs/a-table/results.json").read_text()
    )


def test_paper_b(downloads):
    commands = recipe("Paper B: from download to table")
    done = [
        run(command, max_new_tokens=16, lora=4, batch_size=4)
        for command in commands
        if command[0] != "hf"
    ]
    assert done == [
        "import_datasets",
        "speak",
        "import_datasets",
        "speak",
        "import_datasets",
        "import_datasets",
        "train_cord",
        "evaluate",
        "compare",
    ]
    table = json.loads((downloads / "runs/b-table/results.json").read_text())
    assert np.isfinite(table["audio_accuracy"]) and {"obqa", "gsm8k-spoken"} == set(table["splits"])


def test_what_a_recipe_downloads_is_what_it_uses():
    for title in ("Paper A: from download to table", "Paper B: from download to table"):
        commands = recipe(title)
        text = " ".join(" ".join(command) for command in commands if command[0] != "hf")
        for command in commands:
            if command[0] == "hf":
                for word in command:
                    if word.startswith(("Qwen/", "CoTA", "NuminaMath-CoT", "voicebench", "gsm8k")):
                        assert word in text, word


@pytest.mark.slow
def test_the_walk_without_a_download(downloads, monkeypatch):
    """Folders of the models' names from their shapes (here narrow ones, too), then both papers'
    training and evaluation by those names, letter by letter."""
    narrow = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
    )
    for shape in (*shapes.STUDENTS.values(), *shapes.TEACHERS.values()):
        for name, value in narrow.items():
            monkeypatch.setitem(shape, name, value)
    monkeypatch.setattr(
        shapes, "word_tokenizer", functools.partial(shapes.word_tokenizer, words=300)
    )
    monkeypatch.setattr(
        shapes, "EYES", dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)
    )
    for name, value in dict(d_model=32, encoder_attention_heads=2, encoder_ffn_dim=32).items():
        monkeypatch.setitem(shapes.EARS, name, value)
    walk = recipe("Without a GPU and without a download")
    assert [run(command, small={}) for command in walk[:3]] == ["shapes"] * 3 and Path(
        "Qwen/Qwen2.5-Omni-7B/model.safetensors"
    ).is_file()
    papers = [
        command
        for title in ("Paper A: from download to table", "Paper B: from download to table")
        for command in recipe(title)
    ]
    words = [
        command for command in papers if any("import_datasets" in word for word in command)
    ] + [["python", "textualize.py", "--data", "CoTA/cota.jsonl"]]
    for command in words[:3]:
        run(command, small={})
    run([*words[-1], "--limit", "8"])  # noise describes nothing: by the mini student
    trained = [
        command
        for command in papers
        if any(word.startswith(("train_source", "evaluate")) for word in command)
    ][:2]
    for command in trained:
        run(command, small={}, max_new_tokens=6, lora=4, batch_size=4)
    assert (
        json.loads(Path("runs/a/step-0000002/adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "Qwen/Qwen2.5-Omni-7B"
    )
    for command in walk[3:]:
        monkeypatch.setattr(shapes, "STUDENTS", {})  # they are loaded, not made
        run(command, small={}, max_new_tokens=6)
