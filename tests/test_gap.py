"""Paper B's evaluation: the audio-text gap by hand-computed cases, the real command on real views,
and the KL analysis on planted divergences."""

import json
import re
import sys

import numpy as np
import pytest
import soundfile
from test_train_cord import write_spoken

import data
import evaluate
import mini.world
import models
import rollout
from lab import compare, inside
from plumbing import hearing


def views(text, audio, kind="sum"):
    """Bits -> what evaluate_views returns, for questions q0, q1, ..."""
    correct = {
        view: {kind: {f"q{i}": bool(int(bit)) for i, bit in enumerate(bits)}}
        for view, bits in (("text", text), ("audio", audio))
    }
    return evaluate.table_of(correct)


def test_gap_by_hand():
    found = views("1111111100", "1100000010")
    assert (found["text_accuracy"], found["audio_accuracy"], found["gap"], found["questions"]) == (
        80,
        30,
        50,
        10,
    )
    low, high = found["intervals"]["gap"]
    assert low < 50 < high and found["intervals"]["audio"] == evaluate.wilson(3, 10)
    # paired: of ten questions six are lost by hearing and one is won, so the difference has
    # variance (7 - 25/10) / 100 of a point squared
    assert high - low == pytest.approx(2 * 1.96 * 100 * (0.7 - 0.25) ** 0.5 / 10**0.5, rel=0.1)


@pytest.mark.parametrize(
    "before, after, gone",
    [
        (("11111111", "11110000"), ("11111111", "11111100"), 50),
        (
            ("11111111", "11110000"),
            ("11000000", "11111100"),
            50,
        ),  # a text view that rots earns nothing
        (("11111111", "11110000"), ("11111111", "11000000"), -50),
        (("1100", "1111"), ("1100", "1111"), None),
        (("1100", "1100"), ("1111", "1111"), None),
    ],
)
def test_gap_reduction_by_hand(before, after, gone):
    assert evaluate.gap_reduction(views(*before), views(*after)) == gone


def test_the_report_tells_before_from_after():
    text = evaluate.report_gap(views("1111111100", "1111110000"), views("1111111100", "1100000000"))
    assert (
        "audio    20.0 -> 60.0   +40.0 points" in text
        and "66.7 %" in text
        and "text     80.0 -> 80.0   +0.0 points" in text
    )


def test_only_spoken_questions_are_asked_twice(tmp_path):
    examples = data.read_manifest(write_spoken(tmp_path, n=3))
    examples[1].task = evaluate.SER_TASK
    examples[2].transcript = ""
    assert evaluate.spoken(examples) == examples[:1]
    with pytest.raises(data.DataError, match="no example has a transcript"):
        evaluate.evaluate_views(None, None, examples[1:])
    # An open question that only audio can ask is named before any question is asked
    examples[2].choices = []
    with pytest.raises(data.DataError, match=":3: an open question"):
        evaluate.evaluate_views(None, None, examples)


def test_the_command_measures_both_views_and_the_reduction(tmp_path, monkeypatch, capsys):
    manifest, further = write_spoken(tmp_path), tmp_path / "telephone.jsonl"
    further.write_text("\n".join(manifest.read_text().splitlines()[:3]) + "\n")
    run = lambda *more: (
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "evaluate.py",
                "--task",
                "gap",
                "--model",
                str(mini.world.MINI / "student"),
                "--data",
                str(manifest),
                str(further),
                "--max-new-tokens",
                "70",
                *more,
            ],
        )
        or evaluate.main()
    )
    run("--out", str(tmp_path / "a"))
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    said = [
        json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    ]
    model, processor = models.load_audio_model(mini.world.MINI / "student")
    examples = data.read_manifest(manifest)
    read = rollout.generate(
        model,
        processor,
        examples,
        view="text",
        words="transcript",
        temperature=0,
        max_new_tokens=70,
        progress=False,
    )
    assert [s["model_output"] for s in said if s["view"] == "text" and s["set"] == "spoken"] == read
    assert (
        found["text_accuracy"]
        == 100
        * sum(f"<RESPONSE>{e.answer}</RESPONSE>" in text for e, text in zip(examples, read))
        / 6
        > 50
    )
    assert found["questions"] == 6 and found["splits"]["telephone"]["questions"] == 3
    assert (
        sum(kind["questions"] for kind in found["kinds"].values()) == 6
        and found["gap"] == found["text_accuracy"] - found["audio_accuracy"]
    )
    assert found["decoding"] == {"max_new_tokens": 70, "temperature": 0.0, "words": "transcript"}
    assert found["together"]["questions"] == 9
    assert list(found["together"]["kinds"]) == ["spoken", "telephone"]
    capsys.readouterr()
    before = str(tmp_path / "a" / "results.json")
    compare.main([before, before])  # the same student again
    printed = capsys.readouterr().out
    assert printed.count("+0.0 points") == 6 and printed.count(" 0.0 %") >= 3


# ------------------------------------ two results, manifest by manifest ---------------------------


class Planted:
    """The gap command with planted answers: said[view] holds the (file, id) of the right ones.
    Every file's examples have a clip in a folder of their own."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        monkeypatch.setattr(hearing, "check", lambda *_: None)
        model = type("Model", (), {"to": lambda self, device: self})()
        monkeypatch.setattr(models, "load_audio_model", lambda *_, **__: (model, None))

    def manifest(self, name, ids, question=""):
        (self.folder / name).mkdir(exist_ok=True)
        wave = 0.1 * np.sin(np.arange(16_000) / 9)
        soundfile.write(self.folder / name / "x.wav", wave, 16_000)
        line = {
            "audio": f"{name}/x.wav",
            "question": question,
            "choices": [],
            "answer": "7",
            "task": "math",
            "transcript": "How much?",
        }
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": i, **line}) + "\n" for i in ids))
        return path

    def generate(self, said):
        def generate(model, processor, asked, view="audio", **how):
            right = [(e.audio.parent.name, e.id) in said[view] for e in asked]
            return ["#### 7" if hit else "#### 8" for hit in right]

        self.monkeypatch.setattr(evaluate, "generate", generate)

    def run(self, said, out, *arguments):
        self.generate(said)
        self.capsys.readouterr()
        command = ["--task", "gap", "--model", "x", "--out", self.folder / out, *arguments]
        evaluate.main([str(word) for word in command])
        results = json.loads((self.folder / out / "results.json").read_text())
        return results, self.capsys.readouterr().out


    def compare(self, results, other):
        self.capsys.readouterr()
        compare.main([str(self.folder / results), str(self.folder / other)])
        return self.capsys.readouterr().out


@pytest.fixture
def planted(tmp_path, monkeypatch, capsys):
    return Planted(tmp_path, monkeypatch, capsys)


def said_of(**files):
    """said_of(a=("0123", "01")): of file a the questions 0 to 3 are right when they are read, 0
    and 1 when they are heard."""
    return {
        view: {(name, i) for name, both in files.items() for i in both[at]}
        for at, view in enumerate(evaluate.VIEWS)
    }


BEFORE = said_of(a=("01234567", "0123"), b=("0123", ""), c=("01", "0"))


@pytest.mark.parametrize("order", ["abc", "cab", "b"])
def test_an_unchanged_student_has_reduced_nothing(planted, order):
    """Of each file and together, in any order. The files use the same ids for other questions."""
    sizes = {"a": 8, "b": 4, "c": 2}
    files = {name: planted.manifest(name, "01234567"[:size]) for name, size in sizes.items()}
    planted.run(BEFORE, "before", "--data", *files.values())
    given = [files[name] for name in order]

    def reductions(said):
        planted.run(said, "after", "--data", *given)
        printed = planted.compare("after/results.json", "before/results.json")
        parts = re.findall(r"^-- (.*)\n(?:.*\n)*?together.* (-?[\d.]+) %$", printed, re.M)
        return {name: float(share) for name, share in parts}, printed

    gone, _ = reductions(BEFORE)
    assert len(gone) in (1, 4) and set(gone.values()) == {0}
    better = {**BEFORE, "audio": BEFORE["audio"] | {("b", "0"), ("b", "1"), ("b", "2")}}
    gone, printed = reductions(better)  # of the gaps 4, 4 and 1, 3 questions of b
    expected = {"a": 0, "b": 75, "c": 0, "all files": 33.3}
    assert gone == {name: expected[name] for name in gone}
    if order == "abc":
        table = r"-- all files\n.*\na .*\nb .* 75.0 %\nc .*\ntogether .* 33.3 %"
        assert re.search(table, printed)


def test_a_training_runs_before_is_compared_with_each_file(planted):
    """train_cord.py asks all files at once and writes one before.json. Another decoding is named;
    a run that was not asked these questions, or in other words, is refused."""
    files = [planted.manifest("a", "01234567"), planted.manifest("b", "89")]
    said = said_of(a=("01234567", "0123"), b=("89", ""))
    planted.generate(said)
    asked = data.read_manifests(files)
    before = evaluate.evaluate_views(None, None, asked, batch_size=64, max_new_tokens=200, seed=3)
    before.pop("samples")
    (planted.folder / "before.json").write_text(json.dumps(before))
    same = ["--max-new-tokens", 200]
    planted.run(said, "after", "--data", *files, *same)
    printed = planted.compare("after/results.json", "before.json")
    assert "decoded" not in printed
    assert re.findall(r"^together.* (\S+ %)$", printed, re.M) == ["0.0 %"] * 3

    planted.run(said, "hot", "--data", *files, "--temperature", 0.6)
    printed = planted.compare("hot/results.json", "before.json")
    assert "decoded with max_new_tokens 200, not 2048, temperature 0.0, not 0.6, top_k" in printed

    def refusal(*arguments):
        planted.run(said, "refused", "--data", *arguments, *same)
        with pytest.raises(SystemExit) as refused:
            planted.compare("refused/results.json", "before.json")
        sentence = str(refused.value.code)
        assert "before.json" in sentence and "\n" not in sentence
        return sentence

    other = planted.manifest("c", "01")
    assert "lacks 2 of the 2 questions of c" in refusal(files[0], other)
    words = planted.manifest("b", "89", question="Put it in a box.")
    assert "of b, or had them in other words (8 is" in refusal(files[0], words)


def test_paper_bs_table_out_of_one_command(tmp_path, monkeypatch):
    """OBQA as it is spoken (the choices are in the sound, the answer is a letter), or with its
    choices as text; GSM8K as an open question."""
    rows = [json.loads(line) for line in write_spoken(tmp_path).read_text().splitlines()[:4]]
    spoken = "Which is yellow? A. gold B. silver C. tin D. iron"
    for name, fields in {
        "obqa": {"transcript": spoken, "choices": [], "answer": "A"},
        "gsm8k": {"choices": [], "answer": "18"},
        "mmsu": {"choices": ["gold", "silver", "tin", "iron"], "answer": "gold"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({**row, "question": "", "task": "math", **fields}) for row in rows)
        )
    said = {
        "obqa": ["A", "The answer is gold.", "silver", "hm"],
        "gsm8k": ["#### 18", "It costs $18.00.", "x+18", "19"],
    }
    said["mmsu"] = said["obqa"]
    monkeypatch.setattr(
        evaluate,
        "generate",
        lambda model, processor, asked, view, **how: said[
            asked[0].where.split("/")[-1].split(".")[0]
        ],
    )
    monkeypatch.setattr(hearing, "check", lambda *_: None)
    monkeypatch.setattr(
        models,
        "load_audio_model",
        lambda *_, **__: (type("Model", (), {"to": lambda self, device: self})(), None),
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--task",
            "gap",
            "--model",
            "x",
            "--out",
            str(tmp_path / "out"),
            "--data",
            *(str(tmp_path / f"{name}.jsonl") for name in said),
        ],
    )
    evaluate.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        found["audio_accuracy"]
        == found["splits"]["gsm8k"]["text_accuracy"]
        == found["splits"]["mmsu"]["audio_accuracy"]
        == 50
    )
    assert found["settings"]["temperature"] == 0 and found["settings"]["max_new_tokens"] == 2048


# -------------------- the KL analysis ------------------------------------------------------------


def test_kl_report_finds_what_was_planted():
    """100 rollouts of 20 tokens: D_t is 5 on token 7, which stands early, 0.01 elsewhere."""
    tokenizer = models.load_audio_model(mini.world.MINI / "student")[1].tokenizer
    rng, pairs = np.random.default_rng(0), []
    for _ in range(100):
        at = int(rng.integers(5))
        ids = [int(x) for x in rng.integers(50, 60, 20)]
        ids[at] = 7
        pairs.append((ids, [5.0 if token == 7 else 0.01 for token in ids]))
    report = inside.kl_report(pairs, tokenizer)
    assert (report["rollouts"], report["tokens"]) == (100, 2000)
    assert report["mean"] == pytest.approx((5 + 19 * 0.01) / 20) and report["percentiles"][
        "80"
    ] == pytest.approx(0.01)
    assert report["percentiles"]["99"] == 5 and report["tenth"] == pytest.approx(
        (500 + 100 * 0.01) / (500 + 1900 * 0.01)
    )
    assert (
        report["by_token"][0]["token"] == tokenizer.decode([7])
        and report["by_token"][0]["mean"] == 5
        and report["by_token"][0]["count"] == 100
    )
    place = [t / 19 for _ in range(100) for t in range(20)]
    assert (
        report["correlation"]
        == pytest.approx(np.corrcoef(place, [d for _, row in pairs for d in row])[0, 1])
        and report["correlation"] < -0.2
    )
    assert sum(report["histogram"]["counts"]) == 2000 and report["by_position"][0] > report[
        "by_position"
    ][10] == pytest.approx(0.01)


def test_the_kl_command_before_and_after(tmp_path, capsys):
    """The student against itself reading: mean D_t as train_cord.py's own step computes it on the
    same rollouts."""
    manifest = write_spoken(tmp_path)
    inside.main(
        [
            "kl",
            "--model",
            str(mini.world.MINI / "student"),
            "--data",
            str(manifest),
            "--max-new-tokens",
            "20",
            "--out",
            str(tmp_path),
        ]
    )
    report = json.loads((tmp_path / "kl.json").read_text())
    assert (
        list(report) == ["before"]
        and (tmp_path / "kl.png").stat().st_size > 10_000
        and "largest on:" in capsys.readouterr().out
    )
    student, processor = models.load_audio_model(mini.world.MINI / "student")
    pairs = inside.divergences(
        student, processor, student, data.read_manifest(manifest), batch_size=2, max_new_tokens=20
    )
    assert report["before"]["mean"] == pytest.approx(
        np.mean([d for _, row in pairs for d in row]), rel=1e-4
    )
    assert (
        report["before"]["tokens"] == sum(len(ids) for ids, _ in pairs)
        and report["before"]["mean"] > 0.01
    )
