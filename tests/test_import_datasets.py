"""Importers: small files in each dataset's own layout, odd records included, through the real
command line; what comes out must be a manifest."""

import hashlib
import io
import json
import os
import re
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import soundfile

import data
import judge
import models
from mini.world import MINI
from plumbing import manifest
from prepare import import_datasets
from prepare.import_datasets import boxes, main, named, split_choices

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A bell.</CAPTION><REASONING>It"
    " rings.</REASONING><SUMMARY>Bell.</SUMMARY></THINK><RESPONSE>{}</RESPONSE>"
)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_parquet(path, rows, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **how)
    return path


def clip(seconds=0.1, format="WAV"):
    content = io.BytesIO()
    soundfile.write(
        content, 0.1 * np.sin(np.arange(round(seconds * 16_000)) / 9), 16_000, format=format
    )
    return content.getvalue()


def put_clips(folder, *names, seconds=0.1):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(clip(seconds))


def run(capsys, *args):
    """-> (what was printed, the lines that were written)"""
    main([str(arg) for arg in args])
    return capsys.readouterr().out, [json.loads(line) for line in args[2].read_text().splitlines()]


def refusal(*args):
    with pytest.raises(SystemExit) as refused:
        main([str(arg) for arg in args])
    sentence = str(refused.value.code)
    assert sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def dropped(printed, reason, count, *places):
    """Is the reason in the report, with its count and its first places?"""
    line = next(line for line in printed.splitlines() if reason in line)
    assert line.split()[0] == f"{count:,}" and all(str(place) in line for place in places), line


# ------------------------------------------------------------------------------------------------
# CoTA


def cota_row(n, question="<audio>What rings?", response=TRACE.format("a bell"), **more):  # noqa: B008
    return {
        "id": f"c{n}",
        "query": question,
        "response": response,
        "audios": [f"wavs/{n}.wav"],
        **more,
    }


def test_cota_jsonl_with_odd_rows(tmp_path, capsys):
    rows = [
        cota_row(0),
        cota_row(1, "<audio>\nWhat rings?\nA. gong\nB. bell", TRACE.format("B. bell")),
        cota_row(2, response=TRACE.replace("</CAPTION>", "").format("a bell")),
        cota_row(3, response=TRACE.replace("It rings.", " ").format("x")),
        cota_row(4, audios=["wavs/0.wav", "wavs/1.wav"]),
        cota_row(5, audios=[]),
        "{broken",
        "[1, 2]",
        cota_row(6, audios=["../../secret.wav"]),
        cota_row(1),
        cota_row(8, task="music_qa"),
        cota_row(9, response=TRACE.replace("It rings.", "It <SUMMARY>rings.").format("x")),
        cota_row(10, response="A bell."),
        cota_row(11, query=None),
    ]
    put_clips(tmp_path, *(f"wavs/{n}.wav" for n in range(12)))
    source, out = write_jsonl(tmp_path / "cota.jsonl", rows), tmp_path / "out.jsonl"
    printed, lines = run(capsys, "cota", source, out, "--task", "sound")
    examples = data.read_manifest(out, require=("reasoning",))
    assert [e.id for e in examples] == ["c0", "c1", "c1-10", "c8"]
    assert [e.task for e in examples] == ["sound", "sound", "sound", "music"]
    assert (
        examples[0].question == "What rings?"
        and examples[0].choices == []
        and examples[0].answer == "a bell"
    )
    assert examples[0].reasoning == {
        "planning": "Listen.",
        "caption": "A bell.",
        "reasoning": "It rings.",
        "summary": "Bell.",
    }
    assert (examples[1].question, examples[1].choices, examples[1].answer) == (
        "What rings?",
        ["gong", "bell"],
        "bell",
    )
    assert (
        lines[0]["audio"] == "wavs/0.wav"
        and examples[0].audio == (tmp_path / "wavs/0.wav").resolve()
    )
    assert "4 of 14 rows were imported" in printed
    dropped(printed, "one <CAPTION> that is closed", 1, f"{source}:3")
    dropped(printed, "one <REASONING> that is closed", 2, f"{source}:4", f"{source}:12")
    dropped(printed, "one <PLANNING> that", 1, f"{source}:13")
    dropped(printed, "several clips", 1, f"{source}:5")
    dropped(printed, "no audio", 1, f"{source}:6")
    dropped(printed, "the line is not JSON", 1, f"{source}:7")
    dropped(printed, "no JSON object", 1, f"{source}:8")
    dropped(printed, "the audio path leaves the folder", 1, f"{source}:9")
    dropped(printed, "not one question and one answer", 1, f"{source}:14")
    dropped(printed, "ids that were used before", 1, f"{source}:10")


LLAMA_FACTORY = {
    "instruction": "Which scene is it? (a) A quarrel. (b) A late apology.",
    "input": "<audio>",
    "history": [],
    "audio_path": "/data/x/meld/wavs/1.wav",
    "output": TRACE.format("The voice is soft. The answer is B.").replace("THINK>", "think>\n"),
}


def test_cota_as_llama_factory_has_it(tmp_path, capsys):
    put_clips(tmp_path, "meld/wavs/1.wav", "clotho/wavs/1.wav", "1.wav")
    _, lines = run(
        capsys, "cota", write_json(tmp_path / "sft.json", [LLAMA_FACTORY]), tmp_path / "out.jsonl"
    )
    (example,) = data.read_manifest(tmp_path / "out.jsonl", require=("reasoning",))
    assert (example.question, example.choices, example.answer) == (
        "Which scene is it?",
        ["A quarrel.", "A late apology."],
        "A late apology.",
    )
    assert lines[0]["audio"] == "meld/wavs/1.wav" and example.task == "speech"


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "system", "content": "You hear."},
                {"role": "user", "content": "<audio>What rings?"},
                {"role": "assistant", "content": TRACE.format("a bell")},
            ],
            "audios": ["a.wav"],
        },
        {
            "conversations": [
                {"from": "human", "value": "<audio>What rings?"},
                {"from": "gpt", "value": TRACE.format("a bell")},
            ],
            "audio": "a.wav",
        },
        {
            "instruction": "What rings?",
            "input": "<audio>",
            "output": TRACE.format("a bell").replace("THINK", "think"),
            "audio_path": "/data/x/a.wav",
        },
    ],
)
def test_cota_layouts_are_recognised(tmp_path, capsys, row):
    put_clips(tmp_path, "a.wav")
    for source in (
        write_json(tmp_path / "list.json", [row]),
        write_jsonl(tmp_path / "lines.jsonl", [row]),
    ):
        run(capsys, "cota", source, tmp_path / "out.jsonl", "--task", "sound")
        (example,) = data.read_manifest(tmp_path / "out.jsonl")
        assert (example.question, example.answer, example.audio.name) == (
            "What rings?",
            "a bell",
            "a.wav",
        ) and example.audio.is_file()


def test_cota_parquet_writes_its_clips_out(tmp_path, capsys):
    formats = ["WAV", "FLAC", "OGG", "MP3"]
    rows = [
        {
            "id": f"../{n}/ä",
            "question": "<audio>What rings?",
            "response": TRACE.format("a bell"),
            "task": "sound",
            "audio": {"bytes": clip(format=format), "path": "x.wav"},
        }
        for n, format in enumerate(formats)
    ]
    rows += [
        {**rows[0], "audio": {"bytes": b"no audio at all", "path": "x.wav"}},
        {**rows[0], "audio": {"bytes": None, "path": None}},
    ]
    for shard in range(2):
        write_parquet(
            tmp_path / f"data/train-0000{shard}-of-00002.parquet",
            rows[3 * shard : 3 * shard + 3],
            row_group_size=2,
        )
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", rows[:1])
    (tmp_path / "data/._test-00000-of-00001.parquet").write_bytes(b"\x00\x05macOS")
    printed, lines = run(
        capsys,
        "cota",
        tmp_path / "data",
        tmp_path / "elsewhere/cota.jsonl",
        "--split",
        "train",
        "--check-audio",
    )
    examples = data.read_manifest(tmp_path / "elsewhere/cota.jsonl", split="train")
    assert [e.audio.suffix for e in examples] == [".wav", ".flac", ".ogg", ".mp3"]
    assert (
        all(e.audio.parent == (tmp_path / "elsewhere/cota_audio").resolve() for e in examples)
        and len({e.audio for e in examples}) == 4
    )
    assert data.check_audio(examples) == pytest.approx([0.1] * 4, abs=0.06)
    assert {path.name for path in (tmp_path / "elsewhere/cota_audio").iterdir()} == {
        e.audio.name for e in examples
    }
    dropped(printed, "no WAV, FLAC, OGG or MP3", 1, "train-00001-of-00002.parquet row 2")
    dropped(printed, "no audio, neither bytes nor a path", 1, "train-00001-of-00002.parquet row 3")
    assert "train" in printed and "the folder of the shards" in refusal(
        "cota", tmp_path / "elsewhere", tmp_path / "out.jsonl"
    )
    assert "holds the splits test, train, not law" in refusal(
        "cota", tmp_path / "data", tmp_path / "out.jsonl", "--split", "law"
    )


def hub_row(n):
    """CoTA on the hub, as its public readers load it. Every clip is another one."""
    sound = {"bytes": clip(0.2 + n / 1000), "path": f"{n:07d}.wav"}
    return {"audio": sound, "user": "<audio>What rings?", "assistant": TRACE.format("a bell")}


def test_cota_in_configurations(tmp_path, capsys):
    """Folders or file names; a broken shard is passed over, what it held before its break is kept;
    the disk that the clips take is said before them."""
    shards = {
        "complex_audio/train-00000-of-00002": "mix",
        "meld/data/train-0-of-1": "speech",
        "S2TT/e2z-00000-of-00001": "speech",
        "audiocap-00000-of-00001": "sound",
        "MELD_train_3": "speech",
        "data/AudioCaps/part-1": "sound",
        "odd_sounds/train-00000-of-00001": "odd_sounds",
        "odd_train-00001-of-00002": "odd",
    }
    for n, name in enumerate(shards):
        write_parquet(tmp_path / f"CoTA/{name}.parquet", [hub_row(2 * n), hub_row(2 * n + 1)])
    cut = write_parquet(tmp_path / "CoTA/meld/cut.parquet", [hub_row(90)])
    cut.write_bytes(cut.read_bytes()[:-100])
    rows = [hub_row(n) for n in range(91, 95)]
    how = {"row_group_size": 1, "compression": "gzip"}
    torn = write_parquet(tmp_path / "CoTA/meld/torn.parquet", rows, **how)
    content = bytearray(torn.read_bytes())
    at = parquet.read_metadata(torn).row_group(2).column(0).data_page_offset
    content[at : at + 200] = b"x" * 200
    torn.write_bytes(content)
    out = tmp_path / "CoTA/cota.jsonl"
    printed, _ = run(capsys, "cota", tmp_path / "CoTA", out, "--check-audio")
    examples = data.read_manifest(out, require=("reasoning",))
    tasks = Counter(e.task for e in examples)
    assert tasks["speech"] in range(6, 9)  # 0 to 2 rows of the torn shard
    tasks["speech"] = 6
    assert tasks == Counter(task for task in shards.values() for _ in "ab")
    assert {(e.question, e.answer) for e in examples} == {("What rings?", "a bell")}
    broken = [line for line in printed.splitlines() if line.startswith("broken, the rest of it")]
    assert len(broken) == 2 and str(cut) in broken[0] and str(torn) in broken[1]
    first = printed.splitlines()[0]
    assert re.fullmatch(
        r"cota_audio/ will take about [\d.e-]+ GB, for all clips inside 10 parquet "
        r"files; [\d.e+]+ GB are free there",
        first,
    )
    written = sum(path.stat().st_size for path in (tmp_path / "CoTA/cota_audio").iterdir())
    assert written < 1e9 * float(first.split()[4]) < 1.5 * written  # torn rows counted


def test_one_configuration_of_cota(tmp_path, capsys):
    """By its folder, and by its file. Of a source that is all broken there is nothing to import; a
    benchmark's shard must be whole."""
    shard = write_parquet(tmp_path / "S2TT/e2z-00000-of-00001.parquet", [hub_row(0)])
    for source in shard.parent, shard:
        _, (line,) = run(capsys, "cota", source, tmp_path / "out.jsonl")
        assert line["task"] == "speech"
    _, (line,) = run(capsys, "cota", shard, tmp_path / "out.jsonl", "--task", "music")
    assert line["task"] == "music"
    (tmp_path / "S2TT/f-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert len(run(capsys, "cota", shard.parent, tmp_path / "out.jsonl")[1]) == 1
    assert "f-00000-of-00001.parquet: is not parquet" in refusal(
        "voicebench", shard.parent, tmp_path / "v.jsonl", "--split", "f"
    )
    shard.write_bytes(b"")
    sentence = refusal("cota", shard.parent, tmp_path / "none.jsonl")
    assert "none of the shards can be read" in sentence and str(shard) in sentence


def test_cota_columns(tmp_path, capsys):
    put_clips(tmp_path, "a.wav")
    row = {
        "uid": 7,
        "text": "<audio>What rings?",
        "label": TRACE.format("(B)"),
        "clip": "a.wav",
        "options": ["gong", "bell"],
        "domain": "Sound",
    }
    source, out = (
        write_jsonl(
            tmp_path / "x.jsonl", [row, {**row, "uid": 8, "label": TRACE.format("a horn")}]
        ),
        tmp_path / "out.jsonl",
    )
    sentence = refusal("cota", source, out)
    assert (
        "uid, text, label, clip, options, domain" in sentence
        and "--columns question=NAME" in sentence
    )
    assert "uid, text" in refusal("cota", source, out, "--columns", "question=nothing")
    assert "'questions'" in refusal("cota", source, out, "--columns", "questions=text")
    columns = [
        "id=uid",
        "question=text",
        "response=label",
        "audio=clip",
        "choices=options",
        "task=domain",
    ]
    printed, lines = run(capsys, "cota", source, out, "--columns", *columns)
    (example,) = data.read_manifest(out)
    assert (example.id, example.question, example.choices, example.answer, example.task) == (
        "7",
        "What rings?",
        ["gong", "bell"],
        "bell",
        "sound",
    )
    dropped(printed, "names none of the choices", 1, f"{source}:2")
    both = write_jsonl(tmp_path / "both.jsonl", [{**cota_row(0), "answer": "a bell"}])
    assert "any of response, answer may be 'response'" in refusal("cota", both, out)


def test_cota_task_from_column_flag_or_path(tmp_path, capsys):
    paths = ["MELD/1.wav", "AudioSet/1.wav", "music/1.wav", "x/1.wav", "AudioSet/music/2.wav"]
    put_clips(tmp_path, *paths)
    rows = [
        {
            "id": path,
            "question": "What?",
            "response": TRACE.format("a bell"),
            "audio": path,
            "task": None,
        }
        for path in paths
    ]
    source = write_jsonl(
        tmp_path / "x.jsonl", [*rows, {**rows[0], "id": "column", "task": "Sound QA"}]
    )
    printed, lines = run(capsys, "cota", source, tmp_path / "out.jsonl")
    tasks = {line["id"]: line["task"] for line in lines}
    assert tasks == {
        "MELD/1.wav": "speech",
        "AudioSet/1.wav": "sound",
        "music/1.wav": "music",
        "column": "sound",
    }
    dropped(printed, "neither a column nor the path says", 2, f"{source}:4", f"{source}:5")
    _, lines = run(capsys, "cota", source, tmp_path / "out.jsonl", "--task", "music")
    assert [line["task"] for line in lines] == ["music"] * 5 + ["sound"]


@pytest.mark.parametrize(
    "text, question, choices",
    [
        ("What?\nA. gold\nB. white gold", "What?", ["gold", "white gold"]),
        (
            "What? Options:\n  A) gold\n  B) silver\nAnswer with a letter.",
            "What?\nAnswer with a letter.",
            ["gold", "silver"],
        ),
        (
            "What? (a) A heartfelt word. (b) A doctor, at work. (c) None.",
            "What?",
            ["A heartfelt word.", "A doctor, at work.", "None."],
        ),
        (
            "What is it: A. gold, B. silver, or C. bronze",
            "What is it:",
            ["gold", "silver", "bronze"],
        ),
        (
            "Choose only A or B or C. Do it.\nWhich?\nA. x\nB. y",
            "Choose only A or B or C. Do it.\nWhich?",
            ["x", "y"],
        ),
        ("What? Choices: ['gold', \"silver\"]. Say it.", "What?\nSay it.", ["gold", "silver"]),
        (
            "Please choose from the following options: ['a b', 'c'].",
            "Please choose from the following",
            ["a b", "c"],
        ),
    ],
)
def test_choices_in_a_question(text, question, choices):
    assert split_choices(text) == (question, choices)


@pytest.mark.parametrize(
    "text",
    [
        "Who wrote it, A. Smith or B. Jones?",
        "What?\nA. gold\nC. silver",
        "What?\nA. gold",
        "What?\nA. gold\nB. gold",
        "What?\nA. gold\nor so\nB. silver",
        "What? (A) gold B. silver",
        "What? A. gold b. silver",
        "Plan A. Good?",
        "What? Choices: [gold, silver]",
        "What? Choices: ['gold']",
        "What?",
        "",
        "What? Choices: [{{}: 1}]",
        "What? Choices: [1, 2]",
        "What? A. gold B. silver. Answer with the letter.",
        "What?\nA. gold\nB. \n",
        "A. gold\nB. silver",
    ],
)
def test_doubtful_choices_leave_the_question_open(text):
    assert split_choices(text) == (text, [])


@pytest.mark.parametrize(
    "answer, choice",
    [
        ("gold", "gold"),
        ("Gold.", "gold"),
        ("(C) Gold", "gold"),
        ("B", "white gold"),
        ("(b)", "white gold"),
        ("B.", "white gold"),
        ("A", "gold"),
        ("B. white gold, because it is", "white gold"),
        ("It is said often. The answer is C.", "A horn"),
        ("a horn", "A horn"),
        ("So the correct answer is: **(C) a horn**.", "A horn"),
        ("The answer is gold, not silver", None),
        ("bronze", None),
        ("B. gold, because", None),
        ("Gold is heard.", None),
        ("E", None),
        ("", None),
        (None, None),
        (1, None),
        ("A dog", None),
    ],
)
def test_an_answer_names_a_choice(answer, choice):
    assert named(answer, ["gold", "white gold", "A horn"]) == choice


def test_two_choices_that_differ_in_case_alone_are_not_guessed():
    assert named("gold.", ["Gold", "gold"]) is None and named("gold", ["Gold", "gold"]) == "gold"


# ------------------------------------------------------------------------------------------------
# The other datasets


def test_avqa(tmp_path, capsys):
    def row(n, **more):
        return {
            "id": n,
            "video_name": "-HG_30",
            "video_id": 341,
            "question_text": "What happened in the video?",
            "answer": 1,
            "dataset_name": "AVQA",
            "multi_choice": ["motorboat", "Yacht", "Sail", "Car"],
            "question_relation": "View",
            "question_type": "Happening",
            "audio_path": "Path to wav dir/-HG_30.wav",
            **more,
        }

    rows = [
        row(183),
        row(184, answer=4),
        row(185, answer=-1),
        row(186, answer=True),
        row(187, multi_choice=None),
        row(188, audio_path="Path to wav dir/missing.wav"),
        row(189, audio_path="long.wav"),
        row(190, audio_path="bad.wav"),
        row(191, question_text=5),
    ]
    source, out = write_jsonl(tmp_path / "train_qa.data", rows), tmp_path / "train.jsonl"
    put_clips(tmp_path / "wavs", "-HG_30.wav")
    put_clips(tmp_path / "wavs", "long.wav", seconds=1.5)
    (tmp_path / "wavs/bad.wav").write_bytes(b"RIFF")
    printed, lines = run(capsys, "avqa", source, out, "--audio-root", tmp_path / "wavs")
    example = data.read_manifest(out)[0]
    assert (example.id, example.question, example.answer, example.task) == (
        "183",
        "What happened in the audio?",
        "Yacht",
        "sound",
    )
    assert lines[0]["audio"] == "wavs/-HG_30.wav" and len(lines) == 4
    dropped(printed, "not the index of a choice", 3, *(f"{source}:{n}" for n in (2, 3, 4)))
    dropped(printed, "no list of texts", 1)
    dropped(printed, "the field 'question' must be a string", 1, f"{source}:9")
    dropped(printed, "not there yet", 1, f"{source}:6")
    printed, lines = run(
        capsys, "avqa", source, out, "--audio-root", tmp_path / "wavs", "--check-audio"
    )
    assert [line["id"] for line in lines] == ["183", "189"]
    dropped(printed, "the audio file does not exist", 1, f"{source}:6")
    dropped(printed, "the audio file cannot be decoded", 1, f"{source}:8")
    printed, lines = run(
        capsys, "avqa", source, out, "--audio-root", tmp_path / "wavs", "--max-seconds", 1
    )
    assert [line["id"] for line in lines] == ["183"]
    dropped(printed, "the audio file is over the limit of 1 s", 1, f"{source}:7")


def refused_as_manifest(path):
    with pytest.raises(data.DataError, match="'audio' is missing"):
        data.read_manifest(path)


def test_numinamath(tmp_path, capsys):
    solutions = [
        "so \\boxed{\\frac{3}{4}}.",
        "none",
        "\\boxed{x+3}",
        "\\boxed{1} and \\boxed{2}",
        "\\boxed{(1, 2)}",
        "\\boxed{10{,}000}",
        "\\boxed{2 \\text{ or } 3}",
        "\\boxed{1,250}",
        "\\boxed{5",
        "$\\boxed{7}$ so \\boxed{7}",
        "\\boxed{45^\\circ}",
        "\\boxed{12 \\text{ cm}}",
    ]
    rows = [
        {
            "source": "olympiads",
            "problem": f"Find x_{n}.",
            "solution": solution,
            "messages": [{"content": "x", "role": "user"}],
        }
        for n, solution in enumerate(solutions)
    ]
    rows += [
        {**rows[0], "problem": "Prove that x = 3/4."},
        {**rows[0], "problem": "[asy] draw(x); [/asy] Find x."},
        {**rows[0], "problem": " "},
    ]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    printed, lines = run(capsys, "numinamath", tmp_path / "data", tmp_path / "n.jsonl")
    assert [line["answer"] for line in lines] == [
        "\\frac{3}{4}",
        "x+3",
        "10{,}000",
        "1,250",
        "7",
        "45^\\circ",
        "12 \\text{ cm}",
    ]
    assert lines[0] == {
        "id": "numinamath-train-1",
        "question": import_datasets.ANSWER_LINE,
        "choices": [],
        "answer": "\\frac{3}{4}",
        "task": "math",
        "transcript": "Find x_0.",
        "sub-category": "olympiads",
        "split": "train",
    }
    dropped(printed, "several parts", 3)
    dropped(printed, "no answer after", 2)
    dropped(printed, "a proof", 1, "row 13")
    dropped(printed, "a drawing", 1)
    dropped(printed, "the problem is empty", 1)
    assert "python -m prepare.speak" in printed.splitlines()[-1]
    refused_as_manifest(tmp_path / "n.jsonl")
    printed, lines = run(
        capsys, "numinamath", tmp_path / "data", tmp_path / "n.jsonl", "--numeric", "--limit", 5
    )
    assert [line["answer"] for line in lines] == [
        "\\frac{3}{4}",
        "10{,}000",
        "1,250",
        "7",
        "45^\\circ",
    ]
    dropped(printed, "not one number", 1, "row 3")
    # What speak.py adds
    spoken = [{**line, "audio": f"{n}.wav"} for n, line in enumerate(lines)]
    assert (
        len(
            data.read_manifest(
                write_jsonl(tmp_path / "spoken.jsonl", spoken), require=("transcript",)
            )
        )
        == 5
    )


def test_gsm8k(tmp_path, capsys):
    rows = [
        {"question": "How much?", "answer": "She has 16 - 3 = <<16-3=13>>13.\n#### 13"},
        {"question": "And now?", "answer": "#### 1,000"},
        {"question": "So?", "answer": "13"},
    ]
    rows += [{"question": "She wants to prove it. How many?", "answer": "#### 3"}]  # no proof
    printed, lines = run(
        capsys,
        "gsm8k",
        write_jsonl(tmp_path / "test.jsonl", rows),
        tmp_path / "g.jsonl",
        "--numeric",
    )
    assert [(line["id"], line["answer"], line["transcript"], line["split"]) for line in lines] == [
        ("gsm8k-test-1", "13", "How much?", "test"),
        ("gsm8k-test-2", "1,000", "And now?", "test"),
        ("gsm8k-test-4", "3", "She wants to prove it. How many?", "test"),
    ]
    dropped(printed, "no answer after ####", 1, "test.jsonl:3")
    refused_as_manifest(tmp_path / "g.jsonl")


def test_both_views_read_the_line_that_asks_for_a_box(tmp_path, capsys):
    """Beside the spoken problem, and beside its transcript; what it asks for, the judge reads."""
    source = write_jsonl(tmp_path / "test.jsonl", [{"question": "How much?", "answer": "#### 13"}])
    _, (line,) = run(capsys, "gsm8k", source, tmp_path / "g.jsonl")
    put_clips(tmp_path, "x.wav")
    spoken = write_jsonl(tmp_path / "spoken.jsonl", [{**line, "audio": "x.wav"}])
    (example,) = data.read_manifest(spoken)
    processor = models.load_audio_model(MINI / "student")[1]
    heard = data.audio_prompt(processor, data.question_text(example))
    read = data.text_prompt(processor.tokenizer, example.transcript, data.question_text(example))
    asked = "Put the final answer in \\boxed{}."
    assert asked in heard and "How much?" not in heard
    assert f"How much?\n{asked}" in read
    assert judge.agree("16 - 3 is 13, so \\boxed{13} it is, of 16.", example.answer)
    _, (line,) = run(capsys, "gsm8k", source, tmp_path / "g.jsonl", "--no-answer-line")
    assert line["question"] == ""


def test_boxes():
    assert boxes("a \\boxed{1}, \\boxed{\\frac{3}{4}} \\boxed{open") == ["1", "\\frac{3}{4}"]


def mmau_row(n, **more):
    return {
        "id": f"m{n}",
        "audio_id": f"./test-mini-audios/m{n}.wav",
        "question": "Which one?",
        "choices": ["Violin and Cello", "Flute"],
        "answer": "Flute",
        "dataset": "MusicBench",
        "task": "music",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Instrumentation",
        "difficulty": "hard",
        **more,
    }


def test_mmau(tmp_path, capsys):
    rows = [
        mmau_row(0, category="['Reasoning']"),
        mmau_row(1, answer="(A) Violin and Cello"),
        mmau_row(2, dataset="IEMOCAP", task="speech"),
        mmau_row(3, answer="violin and cello."),
        mmau_row(4, answer="Piano"),
        mmau_row(5, choices=["(A) a dog", "(B) a cat"], answer="(B) a cat"),
        mmau_row(6, choices=[str(n) for n in range(8)], answer="7"),
        mmau_row(7, answer=None),
        mmau_row(8, choices=[]),
    ]
    put_clips(tmp_path, *(f"test-mini-audios/m{n}.wav" for n in range(9)))
    source, out = write_json(tmp_path / "mmau-test-mini.json", rows), tmp_path / "mmau.jsonl"
    printed, lines = run(capsys, "mmau", source, out)
    examples = data.read_manifest(out, split="test-mini")
    assert [e.id for e in examples] == ["m0", "m1", "m2", "m3", "m5", "m6"]
    assert [e.answer for e in examples] == [
        "Flute",
        "Violin and Cello",
        "Flute",
        "Violin and Cello",
        "a cat",
        "7",
    ]
    assert (
        examples[4].choices == ["a dog", "a cat"]
        and examples[0].sub_category == "Instrumentation"
        and lines[0]["difficulty"] == "hard"
    )
    assert [line.get("leak") for line in lines] == [
        None,
        None,
        "IEMOCAP",
        None,
        None,
        None,
    ] and examples[0].audio.is_file()
    dropped(printed, "none of the choices", 3, *(f"{source} row {n}" for n in (5, 8, 9)))
    dropped(printed, "a leak, if you train on IEMOCAP", 1, f"{source} row 3")
    assert "    music       test-mini                5" in printed
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    record = {"source": source.name, "bytes": source.stat().st_size, "sha256": sha256}
    assert sha256 in printed and json.loads((tmp_path / "mmau.source.json").read_text()) == record


def test_mmar(tmp_path, capsys):
    rows = [
        {
            "id": f"r{n}",
            "audio_path": f"./audio/{n}.wav",
            "question": "What?",
            "choices": ["x", "y"],
            "answer": "y",
            "modality": modality,
            "category": "Signal Layer",
            "sub-category": "Counting",
            "language": "en",
            "source": "youtube",
            "url": "u",
            "timestamp": "t",
        }
        for n, modality in enumerate(["sound", "music", "speech", "mix-sound-speech", "smell"])
    ]
    put_clips(tmp_path, *(f"audio/{n}.wav" for n in range(5)))
    for source in (
        write_jsonl(tmp_path / "MMAR.jsonl", rows),
        write_json(tmp_path / "MMAR-meta.json", rows),
    ):
        printed, _ = run(capsys, "mmar", source, tmp_path / "out.jsonl")
        examples = data.read_manifest(tmp_path / "out.jsonl")
        assert [e.task for e in examples] == ["sound", "music", "speech", "mix"] and examples[
            0
        ].sub_category == "Counting"
        dropped(printed, "the modality is neither", 1)


def test_mmar_without_its_empty_choices(tmp_path, capsys):
    lists = ["x", "y", "z", ""], ["", "x", "y"], ["A. x", "B. y", " "]
    rows = [
        {
            "audio_path": "0.wav",
            "question": "What?",
            "choices": choices,
            "answer": choices[1],
            "modality": "sound",
        }
        for choices in lists
    ]
    put_clips(tmp_path, "0.wav")
    run(capsys, "mmar", write_jsonl(tmp_path / "MMAR.jsonl", rows), tmp_path / "out.jsonl")
    examples = data.read_manifest(tmp_path / "out.jsonl")
    assert [(e.choices, e.answer) for e in examples] == [
        (["x", "y", "z"], "y"),
        (["x", "y"], "x"),
        (["x", "y"], "y"),
    ]


def test_iemocap(tmp_path, capsys):
    # a "Session" above the corpus
    root = tmp_path / "Session1/corpus"
    for session, lines in (
        (
            "Session1",
            [
                "ang\tSes01F_impro01_F000",
                "neu\tSes01F_impro01_M000",
                "xxx\tSes01F_impro01_M001",
                "exc\tSes01F_script01_1_F000",
            ],
        ),
        ("Session5", ["hap\tSes05M_impro01_M000", "sad\tSes05M_impro01_F000"]),
    ):
        folder = root / session / "dialog/EmoEvaluation"
        (folder / "Categorical").mkdir(parents=True)
        dialogs = {}
        for line in lines:
            emotion, utterance = line.split("\t")
            dialog = utterance.rpartition("_")[0]
            dialogs.setdefault(dialog, []).append(
                f"[6.2901 - 8.2357]\t{utterance}\t{emotion}\t[2.5000, 2.5000, 2.5000]"
            )
            put_clips(root, f"{session}/sentences/wav/{dialog}/{utterance}.wav")
        for dialog, found in dialogs.items():
            text = (
                "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
                + "\nC-E2:\tNeutral;\t()\n".join(found)
                + "\nA-E3:\tval 3;\t()\n"
            )
            (folder / f"{dialog}.txt").write_text(text)
            (folder / f"._{dialog}.txt").write_bytes(
                b"\x00\x05\x16\x07\xff\xfe \n[1.0 - 2.0]\tSes01F_x_F000\tang\t[1, 1, 1]\n"
            )
        (folder / "Categorical/e1.txt").write_text(
            "[6.2901 - 8.2357]\tSes01F_impro01_F009\tang\t[1, 1, 1]\n"
        )
    printed, _ = run(capsys, "iemocap", root, root / "all.jsonl", "--check-audio")
    examples = {e.id: e for e in data.read_manifest(root / "all.jsonl")}
    assert {e.id: (e.answer, e.split, e.speaker) for e in examples.values()} == {
        "Ses01F_impro01_F000": ("angry", "train", "Ses01F"),
        "Ses01F_impro01_M000": ("neutral", "train", "Ses01M"),
        "Ses01F_script01_1_F000": ("happy", "train", "Ses01F"),
        "Ses05M_impro01_M000": ("happy", "test", "Ses05M"),
        "Ses05M_impro01_F000": ("sad", "test", "Ses05F"),
    }
    assert all(
        e.task == "emotion" and sorted(e.choices) == ["angry", "happy", "neutral", "sad"]
        for e in examples.values()
    )
    dropped(printed, "the emotion xxx is none of the four classes", 1, "Ses01F_impro01.txt:7")
    assert "5,531" in printed and "1,241" in printed and "here 5 and 2" in printed
    _, lines = run(capsys, "iemocap", root, root / "test.jsonl", "--split", "test")
    assert len(lines) == 2
    assert "Session1 to Session5" in refusal("iemocap", root / "Session1", root / "out.jsonl")
    assert "knows no column" in refusal("iemocap", root, root / "out.jsonl", "--columns", "id=x")


def test_voicebench(tmp_path, capsys):
    prompt = (
        "The sun is responsible for\nA. puppies learning new tricks\nB. plants sprouting\nC. old"
        " age\nD. rain"
    )
    rows = [
        {"audio": {"bytes": clip(), "path": "1.wav"}, "prompt": prompt, "reference": reference}
        for reference in ("B", "E", "plants", None)
    ]
    write_parquet(tmp_path / "mmsu/law-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "openbookqa/test-00000-of-00001.parquet", rows[:1])
    write_parquet(
        tmp_path / "alpacaeval/test-00000-of-00001.parquet",
        [{"audio": rows[0]["audio"], "prompt": "Tell me a story.", "output": "Once."}],
    )
    printed, lines = run(capsys, "voicebench", tmp_path / "mmsu", tmp_path / "mmsu.jsonl")
    (example,) = data.read_manifest(tmp_path / "mmsu.jsonl", require=("transcript",))
    task = example.task, example.sub_category
    assert (example.question, example.answer, example.transcript, *task) == (
        "",
        "B",
        prompt,
        "speech",
        "law",
    )
    # Heard, not read
    assert (
        example.choices == []
        and judge.spoken_choices(prompt)[1] == "plants sprouting"
        and example.audio.is_file()
    )
    dropped(printed, "the reference is no letter", 2)
    dropped(printed, "none with the reference's letter", 1)
    printed, lines = run(capsys, "voicebench", tmp_path / "openbookqa", tmp_path / "obqa.jsonl")
    assert data.read_manifest(tmp_path / "obqa.jsonl", split="test")[0].sub_category is None
    sentence = refusal("voicebench", tmp_path / "alpacaeval", tmp_path / "alpaca.jsonl")
    assert (
        "all 1 rows were dropped" in sentence
        and "the reference is no letter" in sentence
        and not (tmp_path / "alpaca.jsonl").exists()
    )


# ------------------------------------------------------------------------------------------------
# Paths, failures, size


def test_a_manifest_must_lie_where_it_can_name_the_clips(tmp_path, capsys):
    put_clips(tmp_path / "mmau", "test-mini-audios/m0.wav")
    source = write_json(tmp_path / "mmau/list.json", [mmau_row(0)])
    sentence = refusal("mmau", source, tmp_path / "elsewhere/out.jsonl")
    assert str((tmp_path / "mmau").resolve()) in sentence and "--audio-root" in sentence
    assert os.listdir(tmp_path / "elsewhere") == []
    _, lines = run(capsys, "mmau", source, tmp_path / "above.jsonl")
    assert lines[0]["audio"] == "mmau/test-mini-audios/m0.wav" and data.read_manifest(
        tmp_path / "above.jsonl"
    )


def test_links_and_dots_cannot_leave_the_folder(tmp_path, capsys):
    put_clips(tmp_path, "outside/m0.wav", "data/in/m0.wav")
    (tmp_path / "data/link").symlink_to(tmp_path / "outside")
    (tmp_path / "data/in/circle.wav").symlink_to(tmp_path / "data/in/circle.wav")
    paths = [
        "link/m0.wav",
        "../outside/m0.wav",
        str(tmp_path / "outside/m0.wav"),
        "in/x\0.wav",
        "in/circle.wav",
        "in/m0.wav",
        "n" * 300 + ".wav",
        "/nowhere/in/m0.wav",
    ]
    source = write_json(
        tmp_path / "data/list.json", [mmau_row(n, audio_id=path) for n, path in enumerate(paths)]
    )
    printed, lines = run(capsys, "mmau", source, tmp_path / "data/out.jsonl")
    # Python versions differ in what they say of m3, m4 and m6
    written = {line["id"]: line["audio"] for line in lines}
    assert written["m5"] == written["m7"] == "in/m0.wav" and not {"m0", "m1", "m2"} & set(written)
    dropped(
        printed, "the audio path leaves the folder", 3, *(f"{source} row {n}" for n in (1, 2, 3))
    )
    data.read_manifest(tmp_path / "data/out.jsonl")


def test_clips_are_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to/out_audio").symlink_to(tmp_path / "elsewhere")
    row = {
        "audio": {"bytes": clip(), "path": None},
        "prompt": "What?\nA. x\nB. y",
        "reference": "A",
    }
    assert "the audio path leaves" in refusal(
        "voicebench", write_parquet(tmp_path / "x.parquet", [row]), tmp_path / "to/out.jsonl"
    )
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_clip_that_is_too_long_is_not_left_behind(tmp_path, capsys):
    rows = [
        {
            "audio": {"bytes": clip(seconds), "path": None},
            "prompt": "What?\nA. x\nB. y",
            "reference": "A",
        }
        for seconds in (0.1, 2)
    ]
    printed, lines = run(
        capsys,
        "voicebench",
        write_parquet(tmp_path / "x.parquet", rows),
        tmp_path / "out.jsonl",
        "--max-seconds",
        1,
    )
    assert os.listdir(tmp_path / "out_audio") == [os.path.basename(lines[0]["audio"])]
    dropped(printed, "over the limit of 1 s", 1, "x.parquet row 2")


def test_a_killed_import_leaves_no_manifest(tmp_path, monkeypatch):
    source = write_jsonl(
        tmp_path / "test.jsonl", [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(100)]
    )
    out = tmp_path / "out.jsonl"
    out.write_text("the old one")
    parse, calls = manifest.parse_line, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return parse(*args)

    monkeypatch.setattr(manifest, "parse_line", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["gsm8k", str(source), str(out)])
    assert out.read_text() == "the old one" and sorted(os.listdir(tmp_path)) == [
        "out.jsonl",
        "test.jsonl",
    ]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.jsonl", None, "there is no such file"),
        ("empty.jsonl", b"\n \n", "holds no rows"),
        ("empty.json", b"[]", "holds no rows"),
        ("x.parquet", b"no parquet", "is not parquet"),
        ("cut.json", b'[{"question": "a", "answer": "#### 1"}, {"que', "breaks off"),
        ("latin.json", b'[{"question": "\xe9", "answer": "#### 1"}]', "is not JSON"),
        ("junk.json", b"[{1}]", "not JSON"),
        ("text.csv", b"question,answer\na,b\n", "all 2 rows were dropped"),
        (
            "x.jsonl",
            b'{"problem": "a", "solution": "b"}',
            "the file has the columns problem, solution",
        ),
        ("deep.jsonl", b"[" * 5000, "is not JSON"),
    ],
)
def test_bad_sources_get_one_sentence(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    sentence = refusal("gsm8k", tmp_path / name, tmp_path / "out.jsonl")
    assert words in sentence and str(tmp_path / name) in sentence or "columns" in sentence
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.part").exists()


def test_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", [{"question": "a", "answer": "#### 1"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal("gsm8k", tmp_path / "x.parquet", tmp_path / "out.jsonl")


def test_flags_that_do_not_belong_and_the_source_as_out(tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "#### 1"}])
    for flags in (
        ["--task", "sound"],
        ["--limit", "0"],
        ["--max-seconds", "1"],
        ["--check-audio"],
        ["--audio-root", "."],
    ):
        with pytest.raises(SystemExit):
            main(["gsm8k", str(source), str(tmp_path / "out.jsonl"), *flags])
        assert flags[0] in capsys.readouterr().err
    assert "the source itself" in refusal("gsm8k", source, source) and "####" in source.read_text()
    assert "no such folder of clips" in refusal(
        "mmau", source, tmp_path / "out.jsonl", "--audio-root", tmp_path / "nowhere"
    )


def test_ids_stay_unique_and_bad_letters_do_not_break_the_file(tmp_path, capsys):
    rows = [
        {"id": name, "question": "a\u2028b?", "answer": "#### 1"}
        for name in ("x", "x", "x-2", "", None, 7, "x", "\ud800")
    ]
    printed, lines = run(
        capsys, "gsm8k", write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    )
    assert [line["id"] for line in lines] == [
        "x",
        "x-2",
        "x-2-3",
        "gsm8k-a-4",
        "gsm8k-a-5",
        "7",
        "x-7",
    ]
    dropped(printed, "ids that were used before", 3, "a.jsonl:2", "a.jsonl:3", "a.jsonl:7")
    dropped(printed, "the line is not JSON", 1, "a.jsonl:8")


def test_reasons_are_bounded(tmp_path, capsys):
    rows = [{"question": "a?", "answer": "#### 1"}] + [
        {"id": n, "question": "a?", "answer": "#### 1", "split": [n]} for n in range(2000)
    ]
    table = {}
    for n in range(2000):
        import_datasets.note(table, f"reason {n}", f"row {n}")
    assert len(table) == 51 and table["other reasons"][0] == 1950
    printed, _ = run(
        capsys, "gsm8k", write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    )
    dropped(printed, "the field 'split' must be a string, not list", 2000, "a.jsonl:2", ", ...")


def test_memory_does_not_grow_with_the_file(tmp_path, capsys):
    """30 MB of rows, of which a megabyte at a time may be in memory."""
    text = "Natalia sold clips to her friends. " * 600
    source = write_jsonl(
        tmp_path / "big.jsonl",
        [{"question": f"{n} {text}", "answer": f"#### {n}"} for n in range(1500)],
    )
    main(["gsm8k", str(source), str(tmp_path / "warm.jsonl"), "--limit", "1"])
    tracemalloc.start()
    main(["gsm8k", str(source), str(tmp_path / "out.jsonl")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.stat().st_size > 28e6 and peak < 9e6
    assert "1,500 of 1,500" in capsys.readouterr().out


def test_memory_does_not_grow_with_parquet(tmp_path, capsys):
    text = os.urandom(20_000).hex()
    rows = [{"question": f"{n} {text[n:]}", "answer": f"#### {n}"} for n in range(1000)]
    # One row group, many pages
    how = {"row_group_size": 1000, "use_dictionary": False, "write_batch_size": 10}
    source = write_parquet(tmp_path / "big.parquet", rows, **how)
    before = pyarrow.total_allocated_bytes()
    rows, peak = import_datasets.parquet_rows(source), 0
    for _ in rows:
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert source.stat().st_size > 15e6 and peak < 8e6


@pytest.mark.parametrize(
    "gold, kept",
    [
        ("10\\text{ hours } 30 \\text{ minutes}", False),
        ("8\\text{ R }3", False),
        ("5\\text{ to }3", False),
        ("12 34", False),
        ("7\\text{:}30", False),
        ("x+1", False),
        ("12\\text{ cm}^2", True),
        ("12\\ 345", True),
        ("18", True),
        ("-3", True),
        ("2\\frac{1}{2}", True),
        ("30^\\circ", True),
        ("\\frac{3}{4}", True),
        ("1{,}000", True),
    ],
)
def test_numeric_means_one_number(gold, kept, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(
            json.dumps({"problem": "How much is it?", "solution": f"So $\\boxed{{{text}}}$."})
            + "\n"
            for text in (gold, "7")
        )
    )
    _, lines = run(capsys, "numinamath", path, tmp_path / "out.jsonl", "--numeric")
    assert [line["answer"] for line in lines] == [gold] * kept + ["7"]


def test_voicebench_options_that_hold_initials(tmp_path, capsys):
    prompts = [
        "Which case was it?\nA. Plessy v. Ferguson\nB. Brown v. Board\nC. Roe v. Wade\nD. none",
        "Who?\nA. W. E. B. Du Bois\nB. Franklin D. Roosevelt\nC. Harry S. Truman\nD. X",
        "Same?\nA. one\nB. one\nC. two\nD. three",
    ]
    rows = [
        {"audio": {"bytes": clip(), "path": "1.wav"}, "prompt": prompt, "reference": "B"}
        for prompt in prompts
    ]
    _, lines = run(
        capsys,
        "voicebench",
        write_parquet(tmp_path / "mmsu/law-00000-of-00001.parquet", rows),
        tmp_path / "out.jsonl",
    )
    assert len(lines) == 3
    assert [judge.spoken_choices(prompt)[1] for prompt in prompts] == [
        "Brown v. Board",
        "Franklin D. Roosevelt",
        "one",
    ]


def test_a_shard_that_cannot_be_opened_is_passed_over_and_named(tmp_path):
    """A pruned cache of the hub is full of links to nothing."""
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    broken = []
    files = {tmp_path / "gone.parquet": None, tmp_path / "rows.jsonl": None}
    assert len(list(import_datasets.read_rows(files, broken))) == 1
    assert len(broken) == 1 and "gone.parquet: cannot be opened" in broken[0]
