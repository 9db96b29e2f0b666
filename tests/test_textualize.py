"""Descriptions: written by a real model, resumed after a kill, retried when broken, checked by the
teacher, rated by people."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bad_days
import pytest
from test_train_source_layer import write_world

import data
import evaluate
import mini.world
import models
import rollout
import textualize
from prepare import rating, reading

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("textualize"), n=16)


@pytest.fixture(scope="module")
def described(world):
    """The world described in one go, by the real command."""
    textualize.main(["--data", str(world), "--batch-size", "3"])
    return world.with_name("world-described.jsonl")


def copy_of(world, folder):
    shutil.copytree(world.parent, folder, ignore=shutil.ignore_patterns("*described*"))
    return folder / world.name


# -------------------- prompts --------------------------------------------------------------------


def test_each_kind_of_sound_is_asked_about_in_its_own_way_and_grounded(world):
    example = data.read_manifest(world)[0]
    asked = {
        task: textualize.prompt(
            dataclasses.replace(example, task=task), "reasoning"
        )
        for task in evaluate.TASKS
    }
    assert len(set(asked.values())) == 3
    for text in asked.values():
        assert (
            all(stage in text for stage in example.reasoning.values()) and textualize.RULES in text
        )
    caption = textualize.prompt(example, "caption")
    assert example.reasoning["caption"] in caption and example.reasoning["summary"] not in caption
    assert example.reasoning["caption"] not in textualize.prompt(example, "none")
    assert (
        textualize.prompt(
            dataclasses.replace(example, task="emotion"), "reasoning"
        )
        == asked["speech"]
    )
    assert (
        textualize.prompt(example, "none", is_mini=True) == "Describe the audio."
    )  # what mini/student was taught


def test_without_traces_there_is_nothing_to_ground_on(world, tmp_path):
    path = copy_of(world, tmp_path / "w")
    path.write_text(
        "".join(
            json.dumps({k: v for k, v in json.loads(line).items() if k != "reasoning"}) + "\n"
            for line in path.open()
        )
    )
    with pytest.raises(
        data.DataError, match=r"world.jsonl:1: has no reasoning trace .*--grounding none"
    ):
        textualize.main(["--data", str(path), "--grounding", "reasoning"])


def test_grounding_reaches_the_model(world, tmp_path, monkeypatch):
    path, heard = copy_of(world, tmp_path / "w"), []
    monkeypatch.setattr(
        rollout,
        "generate",
        lambda model, processor, examples, **k: (
            heard.extend(examples) or [("A bell.", True, [])] * len(examples)
        ),
    )
    textualize.main(
        ["--data", str(path), "--grounding", "caption", "--model", str(mini.world.MINI / "student")]
    )
    first = data.read_manifest(path)[0]
    assert first.reasoning["caption"] in heard[0].question and not heard[0].choices


# -------------------- writing --------------------------------------------------------------------


def test_descriptions_are_what_the_model_says_greedily(world, described):
    model, processor = models.load_audio_model(mini.world.MINI / "student")
    truth, written = (
        data.read_manifest(world),
        data.read_manifest(described, require=("description", "reasoning")),
    )
    assert [e.id for e in truth] == [e.id for e in written]
    asked = [dataclasses.replace(e, question="Describe the audio.", choices=[]) for e in truth]
    inputs = data.prompt_batch(asked[:1], processor)
    said = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=data.turn_end_id(processor.tokenizer),
        pad_token_id=0,
    )
    text = processor.tokenizer.decode(
        said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert data.parse_response(text)["response"] == written[0].description
    assert (
        sum(a.description == b.description for a, b in zip(truth, written)) >= 12
    )  # 95 % of clips of this kind, measured
    line = json.loads(described.read_text().splitlines()[0])
    assert (
        line["described_by"].endswith("student, grounding: none")
        and line["audio_id"] == json.loads(world.read_text().splitlines()[0])["audio_id"]
    )


def test_a_manifest_by_hand_is_not_taken_for_a_line_cut_off(tmp_path):
    path = tmp_path / "by_hand.jsonl"
    path.write_text('{"id": "a", "description": "a dog"}\n')
    with pytest.raises(SystemExit, match="by_hand.jsonl:1 is no line that a run wrote"):
        textualize.earlier(path, "model")
    assert "a dog" in path.read_text()


@pytest.mark.slow
def test_killed_half_way_and_resumed_gives_the_same_file(world, described, tmp_path):
    path = copy_of(world, tmp_path / "w")
    out = path.with_name("world-described.jsonl")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "textualize.py"),
        "--data",
        str(path),
        "--batch-size",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while (
        not (out.exists() and out.stat().st_size)
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 0 < len(out.read_bytes().splitlines()) < 16, "the kill came too late to test anything"
    with open(out, "a") as file:
        file.write('{"id": "torn')  # as a kill inside a write leaves it
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=240
    )
    assert out.read_text() == described.read_text()


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(world, described, tmp_path):
    path = copy_of(world, tmp_path / "w")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29617",
            str(ROOT / "textualize.py"),
            "--data",
            str(path),
            "--batch-size",
            "32",
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert path.with_name("world-described.jsonl").read_text() == described.read_text()


def test_each_rank_takes_a_batch_of_its_own(world, described, tmp_path):
    """Two gloo processes, --batch-size 3: three clips at once on each of them, and the same
    file."""
    path = copy_of(world, tmp_path / "w")
    code = f"""
import os
import data, textualize
right, sizes = data.prompt_batch, []
data.prompt_batch = lambda rows, *a, **k: sizes.append(len(rows)) or right(rows, *a, **k)
textualize.main(["--data", {str(path)!r}, "--batch-size", "3"])
open("sizes-" + os.environ["RANK"], "w").write(repr(sizes))
"""
    bad_days.on_two_ranks(code, tmp_path)
    assert [(tmp_path / f"sizes-{rank}").read_text() for rank in "01"] == [
        "[3, 3, 2]"
    ] * 2  # 16 clips are 6 + 6 + 4
    assert path.with_name("world-described.jsonl").read_text() == described.read_text()


@pytest.mark.parametrize(
    "text, finished, why",
    [
        ("", True, "empty"),
        ("  \n", True, "empty"),
        ("A dog barks", False, "cut at the token limit"),
        ("A dog barks.", True, None),
        ("Five sounds are heard: beep, beep, beep, beep, beep.", True, None),  # the world says so
        ("a dog " * 20, True, "repeats itself"),
        ("the voice says that it is going to rain again. " * 3, True, "repeats itself"),
        ("the voice says that it is going to rain again. " * 2, True, None),
    ],
)
def test_faults(text, finished, why):
    assert textualize.fault(text, finished) == why


def test_a_real_model_that_is_cut_is_seen_to_be(world):
    model, processor = models.load_audio_model(mini.world.MINI / "student")
    asked = [
        dataclasses.replace(e, question="Describe the audio.", choices=[])
        for e in data.read_manifest(world)[:2]
    ]
    listen = lambda n: rollout.generate(
        model, processor, asked, temperature=0, max_new_tokens=n, with_end=True, progress=False
    )
    whole, cut = listen(60), listen(4)
    assert [end for _, end, _ in whole] == [True, True] and [end for _, end, _ in cut] == [
        False,
        False,
    ]
    assert all(
        long.startswith(short) and len(short) < len(long)
        for (long, *_), (short, *_) in zip(whole, cut)
    )


def test_a_broken_description_is_retried_once_then_reported(world, tmp_path, monkeypatch, capsys):
    path, calls = copy_of(world, tmp_path / "w"), []

    def generate(model, processor, examples, **decoding):
        calls.append(([e.id for e in examples], decoding))
        second = decoding["temperature"] > 0
        texts = {
            "train-music-00001": ("", True, []),
            "train-music-00003": ("a bell " * 30, True, []),
            "train-music-00005": ("A bell", False, []),
        }
        if second:
            texts.pop("train-music-00001")
        return [texts.get(e.id, ("A bell.", True, [])) for e in examples]

    monkeypatch.setattr(rollout, "generate", generate)
    textualize.main(["--data", str(path), "--max-new-tokens", "7"])
    assert [ids for ids, k in calls if k["temperature"] > 0] == [
        ["train-music-00001", "train-music-00003", "train-music-00005"]
    ]
    assert {k["max_new_tokens"] for _, k in calls} == {7, 14}
    said = capsys.readouterr().out
    assert (
        "left out, repeats itself: 1" in said
        and "left out, cut at the token limit: 1" in said
    )
    kept = [e.id for e in data.read_manifest(path.with_name("world-described.jsonl"))]
    assert len(kept) == 14 and "train-music-00001" in kept and "train-music-00003" not in kept
    failed = [json.loads(line) for line in path.with_name("world-described.failed.jsonl").open()]
    assert {(r["id"], r["fault"]) for r in failed} == {
        ("train-music-00003", "repeats itself"),
        ("train-music-00005", "cut at the token limit"),
    }
    calls.clear()
    textualize.main(["--data", str(path)])  # nothing is tried a third time
    assert (
        calls == [] and "left out, repeats itself: 1" in capsys.readouterr().out
    )  # but it is said again


def test_an_output_by_another_model_or_of_another_kind_is_refused(world, described, tmp_path):
    path = copy_of(world, tmp_path / "w")
    shutil.copy(described, path.with_name("world-described.jsonl"))
    with pytest.raises(
        data.DataError,
        match="holds descriptions by .*student, grounding: none, not somebody, grounding: reasoning; give another --out",  # noqa: E501
    ):
        textualize.main(["--data", str(path), "--model", "somebody"])
    with pytest.raises(SystemExit, match="other.jsonl:1 is no line that a run wrote"):
        textualize.main(
            ["--data", str(path), "--out", str(shutil.copy(path, path.with_name("other.jsonl")))]
        )
    for out in (tmp_path / "elsewhere.jsonl", path):
        with pytest.raises(data.DataError, match="must be another file in the folder of"):
            textualize.main(["--data", str(path), "--out", str(out)])


def test_a_model_without_a_chat_template_is_refused(world, tmp_path, monkeypatch):
    load = models._load

    def bare(*args):
        model, processor = load(*args)
        processor.chat_template = processor.tokenizer.chat_template = None
        return model, processor

    monkeypatch.setattr(models, "_load", bare)
    with pytest.raises(SystemExit, match="has no chat template"):
        textualize.main(["--data", str(copy_of(world, tmp_path / "w"))])


def test_a_template_that_only_the_processor_has_serves_the_tokenizer_too(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(mini.world.MINI / "student", folder)
    (folder / "chat_template.jinja").unlink()  # Qwen2-Audio's processor class then brings its own
    _, processor = models.load_audio_model(folder)
    assert data.turn_end_id(processor.tokenizer) == processor.tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )


def test_training_takes_the_descriptions(described, tmp_path):
    import train_source_layer

    train_source_layer.main(
        [
            "--data",
            str(described),
            "--out",
            str(tmp_path),
            "--no-eval",
            "--dry-run",
            "--batch-size",
            "4",
            "--micro-batch",
            "2",
        ]
    )
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


# -------------------- check ----------------------------------------------------------------------


def test_check_tells_good_descriptions_from_none(world, described, tmp_path):
    teacher, tokenizer = models.load_text_model(mini.world.MINI / "teacher")
    truth, ours = data.read_manifest(world), data.read_manifest(described)
    found = reading.check(ours, truth, teacher, tokenizer, batch_size=16)
    assert found["questions"] == 16 and found["true"].keys() == {"sound", "music", "average"}
    assert (
        found["true"]["average"] > 85
        and found["described"]["average"] > 70
        and found["nothing"]["average"] < 60
    )
    wrong = [
        dataclasses.replace(e, description=ours[i - 2].description) for i, e in enumerate(ours)
    ]  # of the same task
    assert (
        reading.check(wrong, truth, teacher, tokenizer, batch_size=16)["described"]["average"]
        < found["described"]["average"]
    )
    assert "true" not in reading.check(ours[:4], None, teacher, tokenizer, batch_size=16)


def test_the_command_reads_a_manifest_and_writes_its_table(world, described, capsys):
    reading.main([str(described), "--true", str(world)])
    table = capsys.readouterr().out
    found = json.loads(described.with_suffix(".check.json").read_text())
    for view in ("described", "true", "nothing"):
        assert re.search(rf"^{view} .* {found[view]['average']:.1f}$", table, re.M)


# -------------------- rating ---------------------------------------------------------------------


@pytest.fixture
def sheet(described, tmp_path):
    page = tmp_path / "sheet.html"
    rating.main(["--data", str(described), "--rating-sheet", str(page), "--clips", "6"])
    key = json.loads(rating.key_path(page).read_text())
    return (
        page,
        key,
        json.loads(
            re.search(r"const sheet = (.*?), place", page.read_text())[1].replace("\\u003c", "<")
        ),
    )


def answers(sheet, key, choose, path, rater="test"):
    """A rater: choose(item's key, category) -> verdict."""
    verdicts = {
        i["item"]: {"verdicts": {c: choose(key["items"][i["item"]], c) for c in i["categories"]}}
        for i in sheet["items"]
    }
    path.write_text(json.dumps({"sheet": sheet["sheet"], "rater": rater, "answers": verdicts}))
    return path


def test_the_sheet_is_blind_and_self_contained(sheet, described):
    page, key, shown = sheet
    by_id = {e.id: e for e in data.read_manifest(described)}
    assert len(shown["items"]) == 12 and not re.search(
        r"https?://|src=\"(?!data:)", page.read_text()
    )
    assert not any(name in page.read_text() for name in by_id)  # ids would tell
    foils = 0
    for item in shown["items"]:
        known = key["items"][item["item"]]
        assert item["text"] == by_id[known["description_of"]].description and item[
            "audio"
        ].startswith("data:audio/wav;base64,UklGR")
        assert (item["text"] == by_id[known["id"]].description) == (
            known["id"] == known["description_of"]
        )
        assert by_id[known["id"]].task == by_id[known["description_of"]].task == item["task"]
        foils += known["id"] != known["description_of"]
    assert foils == 4


def test_ratings_become_retention(sheet, tmp_path, capsys):
    page, key, shown = sheet
    honest = lambda known, category: (
        "lost"
        if known["id"] != known["description_of"]
        else "partly"
        if category == "tempo"
        else "kept"
    )
    careless = lambda known, category: "kept"
    one, two = (
        answers(shown, key, honest, tmp_path / "1.json"),
        answers(shown, key, careless, tmp_path / "2.json", "another"),
    )
    found = rating.score_ratings([one, two], page)
    tempo = found["music"]["tempo"]
    assert sorted(map(sorted, tempo["description"].values())) == [["kept", "partly"]] * 4
    assert sorted(map(sorted, tempo["foil"].values())) == [["kept", "lost"]] * 2
    assert found["speech"]["the words"] == {"description": {}, "foil": {}}
    rating.main(["--score-ratings", str(one), str(two), "--rating-sheet", str(page)])
    row = next(line for line in capsys.readouterr().out.splitlines() if "tempo" in line)
    assert row.split()[2:] == "50 % [ 50, 50] 100 % 50 % 4".split()
    with pytest.raises(
        data.DataError, match="is by 'test', as is .*1.json; give each rater's answers once"
    ):
        rating.score_ratings(
            [one, answers(shown, key, careless, tmp_path / "again.json", "test")], page
        )


def test_retention_draws_clips_and_leaves_out_what_nobody_can_hear():
    items = {
        "a": ["kept", "kept", "not in the clip"],
        "b": ["lost", "kept"],
        "c": ["not in the clip"],
        "d": ["partly"],
    }
    share, (low, high), clips = rating.retention(items, ["kept"])
    assert (
        share == pytest.approx(50) and clips == 3 and low == 0 and high == 100
    )  # (1 + 1/2 + 0) / 3
    assert rating.retention({"c": ["not in the clip"]}, ["kept"])[0] is None


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda r: r["answers"].update(ffff={"verdicts": {}}),
            "rates the item 'ffff', which .* does not have",
        ),
        (lambda r: r.update(sheet="another"), "rates the sheet 'another', not"),
        (lambda r: r.pop("answers"), "holds no answers"),
        (
            lambda r: next(iter(r["answers"].values()))["verdicts"].update(tempo="fine"),
            "says 'fine' of 'tempo'",
        ),
    ],
)
def test_foreign_ratings_are_refused(sheet, tmp_path, spoil, message):
    page, key, shown = sheet
    path = answers(shown, key, lambda *_: "kept", tmp_path / "r.json")
    ratings = json.loads(path.read_text())
    spoil(ratings)
    path.write_text(json.dumps(ratings))
    with pytest.raises(data.DataError, match=message):
        rating.score_ratings([path], page)


def test_no_text_can_break_out_of_the_page(described, tmp_path):
    evil = [
        dataclasses.replace(e, description=f"</script><script>alert({i})</script>")
        for i, e in enumerate(data.read_manifest(described))
    ]
    page = tmp_path / "evil.html"
    rating.write_sheet(evil, page, clips=4, seed=0)
    assert page.read_text().count("</script>") == 1 and "alert(" in page.read_text()
