"""A manifest read aloud: the same bytes whoever is killed and however many read; every clip whole;
what cannot be said is listed."""

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import soundfile
import torch

import data
from prepare import speak

ROOT = Path(__file__).parent.parent
TEXTS = [
    "Weng earns $12 an hour for babysitting. She did 50 minutes. How much did she earn?",
    r"What is $\frac{1}{2}$ of $x^2$?",
    "[asy] draw((0,0)--(1,1)); [/asy] What is it?",
    "A box has 3 red and 1/2 as many blue balls.",
    r"Is $\foo$ even?",
    "On January 5 he ran 10 km.",
]


def write_lines(path, n=12, **more):
    """n lines as import_datasets.py writes them; every sixth holds a diagram, every sixth an
    unknown command."""
    lines = [
        {
            "id": f"q/{i}",
            "transcript": TEXTS[i % 6],
            "question": "",
            "choices": [],
            "answer": str(i),
            "task": "speech",
            "split": "train",
            **more,
        }
        for i in range(n)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def everything(folder):
    """Every file that a run leaves but its journals -> {path: hash}."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith("journal-")
    }


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """The lines spoken in one go, by the real command in a process of its own. -> (input, folder
    of the output, what was printed)"""
    folder = tmp_path_factory.mktemp("speak")
    source = write_lines(folder / "in.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "prepare.speak", str(source), str(folder / "out" / "spoken.jsonl")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return source, folder / "out", done.stdout


def test_the_output_is_a_manifest_that_training_takes(spoken):
    source, folder, said = spoken
    examples = data.read_manifest(folder / "spoken.jsonl", require=("transcript", "speaker"))
    records = [json.loads(line) for line in (folder / "spoken.jsonl").open()]
    asked = [json.loads(line) for line in source.open()]
    assert [e.id for e in examples] == [
        r["id"] for r in asked if "asy" not in r["transcript"] and "foo" not in r["transcript"]
    ]
    assert len(examples) == 8
    for record in records:
        original = next(r for r in asked if r["id"] == record["id"])
        # The text view reads what was written
        assert {k: record[k] for k in original} == original
        assert (
            set(record) - set(original) == {"audio", "speaker", "spoken"}
            and record["speaker"] in speak.ESPEAK_VOICES
        )
        info = soundfile.info(folder / record["audio"])
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC") and record[
            "audio"
        ].startswith("spoken_audio/")
    assert records[0]["spoken"].startswith("Weng earns twelve dollars an hour")
    assert all(1 < seconds < 10 for seconds in data.check_audio(examples))
    assert len({record["speaker"] for record in records}) > 2
    skipped = [json.loads(line) for line in (folder / "spoken.skipped.jsonl").open()]
    assert skipped == [
        {"id": f"q/{i}", "skipped": "a diagram" if i % 6 == 2 else r"the command \foo"}
        for i in (2, 4, 8, 10)
    ]
    assert (
        "8 lines spoken" in said
        and "4 left out" in said
        and "left out, a diagram: 2 (q/2, q/8)" in said
    )
    assert r"left out, the command \foo: 2 (q/4, q/10)" in said
    assert not list(folder.rglob("*.part"))


def test_the_voice_follows_from_the_id_alone():
    voices = ["a", "b", "c"]
    # As on every machine, in every process
    assert [speak.voice_of(f"q/{i}", voices) for i in range(6)] == list("cacbcc")
    drawn = [speak.voice_of(str(i), voices) for i in range(300)]
    assert all(70 < drawn.count(voice) < 130 for voice in voices)


@pytest.mark.slow
def test_killed_half_way_and_resumed_gives_the_same_files(spoken, tmp_path):
    source, whole, _ = spoken
    out, journal = tmp_path / "spoken.jsonl", tmp_path / "spoken_audio" / "journal-0.jsonl"
    command = [sys.executable, "-m", "prepare.speak", str(source), str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while (
        not (journal.exists() and journal.stat().st_size)
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = len(journal.read_bytes().splitlines())
    assert 0 < done < 12 and not out.exists(), "the kill came too late to test anything"
    with open(journal, "a") as file:
        # As a kill inside a write leaves it
        file.write('{"key": "torn')
    # And a clip that somebody deleted
    (next((tmp_path / "spoken_audio").glob("*/*.flac"))).unlink()
    half = (
        tmp_path
        / "spoken_audio"
        / f"{speak.key_of(json.loads(source.read_text().splitlines()[11]))}.part"
    )
    half.parent.mkdir(exist_ok=True)
    # As a kill inside a clip leaves it
    half.write_bytes(b"fLaC")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert everything(tmp_path) == everything(whole)
    lines = len(journal.read_bytes().splitlines())
    # Nothing is spoken twice
    speak.main([str(source), str(out)])
    assert (
        everything(tmp_path) == everything(whole)
        and len(journal.read_bytes().splitlines()) == lines
    )


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(spoken, tmp_path):
    source, whole, _ = spoken
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29643",
            "-m",
            "prepare.speak",
            str(source),
            str(tmp_path / "spoken.jsonl"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert everything(tmp_path) == everything(whole)
    assert [
        len((tmp_path / "spoken_audio" / f"journal-{r}.jsonl").read_bytes().splitlines())
        for r in (0, 1)
    ] == [6, 6]
    assert "8 lines spoken" in done.stdout and done.stdout.count("lines spoken") == 1


def test_a_forgotten_espeak_speaks_as_a_fresh_process_does():
    words, other = "Anna has five apples.", "How many are left?"
    reader = speak.espeak_reader(["en-us+f2"], 190, 50)
    first = reader(words, "en-us+f2", 0)
    reader(other, "en-us+f2", 0)
    assert torch.equal(first, reader(words, "en-us+f2", 0))
    speak.speak(other, voice="f2")
    # Without forgetting: what makes the line above able to fail
    assert not torch.equal(first, speak.speak(words, voice="f2"))
    code = (
        f"import hashlib; from prepare import speak; print(hashlib.sha256(speak.speak({words!r},"
        " voice='f2').numpy().tobytes()).hexdigest())"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    assert fresh == hashlib.sha256(first.numpy().tobytes()).hexdigest()


def test_limits_skip_and_say_so(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", 4)
    speak.main(
        [
            str(source),
            str(tmp_path / "a.jsonl"),
            "--max-characters",
            "60",
            "--limit",
            "2",
            "--voices",
            "m3",
        ]
    )
    assert "left out, more than ... characters: 1 (q/0)" in capsys.readouterr().out
    assert [json.loads(line)["speaker"] for line in (tmp_path / "a.jsonl").open()] == ["en-us+m3"]
    speak.main([str(source), str(tmp_path / "b.jsonl"), "--max-seconds", "3.5", "--limit", "2"])
    assert [json.loads(line)["skipped"] for line in (tmp_path / "b.skipped.jsonl").open()] == [
        "more than 3.5 seconds"
    ]
    # The rest, later
    speak.main([str(source), str(tmp_path / "a.jsonl"), "--max-characters", "60", "--voices", "m3"])
    assert [e.id for e in data.read_manifest(tmp_path / "a.jsonl")] == ["q/1", "q/3"]


def test_changed_words_are_spoken_anew(tmp_path):
    source, out = write_lines(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    speak.main([str(source), str(out)])
    first = data.read_manifest(out)[0]
    source.write_text(source.read_text().replace("$12", "$13"))
    speak.main([str(source), str(out)])
    again = data.read_manifest(out)[0]
    assert again.audio != first.audio and "thirteen dollars" in out.read_text()
    assert dataclasses.replace(again, audio=first.audio, transcript=first.transcript) == first


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda line: line.update(audio="a.wav"),
            r"in.jsonl:2: the line has audio already \('a.wav'\); give a manifest without it",
        ),
        (
            lambda line: line.pop("transcript"),
            r"in.jsonl:2: the field 'transcript' is missing or empty; it holds",
        ),
        (
            lambda line: line.update(transcript=5),
            r"in.jsonl:2: the field 'transcript' must be a string",
        ),
        (
            lambda line: line.pop("answer"),
            r"in.jsonl:2: the field 'answer' is missing or null; add it",
        ),
        (
            lambda line: line.update(id="q/0"),
            r"in.jsonl:2: id 'q/0' was already used at .*in.jsonl:1; give",
        ),
    ],
)
def test_a_bad_line_is_named_before_anything_is_spoken(tmp_path, spoil, message):
    source = write_lines(tmp_path / "in.jsonl", 3)
    lines = [json.loads(line) for line in source.open()]
    spoil(lines[1])
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(data.DataError, match=message):
        speak.main([str(source), str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out_audio").exists()


def test_other_mistakes_are_one_sentence(tmp_path, capsys):
    source, out = write_lines(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    for text in ("", "{", "[1]"):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(data.DataError, match="is empty|is not JSON|holds a list"):
            speak.main([str(tmp_path / "bad.jsonl"), str(out)])
    with pytest.raises(data.DataError, match="no such manifest"):
        speak.main([str(tmp_path / "none.jsonl"), str(out)])
    with pytest.raises(data.DataError, match="written over its own input"):
        speak.main([str(source), str(source)])
    with pytest.raises(data.DataError, match="--voices nowhere.m3: espeak-ng has no voice"):
        speak.main([str(source), str(tmp_path / "c.jsonl"), "--voices", "nowhere+m3"])
    with pytest.raises(data.DataError, match="--voices en-us.nosuch: espeak-ng has no voice"):
        speak.main([str(source), str(tmp_path / "c.jsonl"), "--voices", "en-us+nosuch"])
    speak.main([str(source), str(out), "--voices", "m3"])
    with pytest.raises(
        data.DataError,
        match=r"was spoken with voices \['en-us\+m3'\], not .*'en-us\+f2'.*; give another output",
    ):
        speak.main([str(source), str(out), "--voices", "f2"])
    (tmp_path / "out_audio" / "journal-7.jsonl").write_text('{"no": "key"}\n')
    with pytest.raises(data.DataError, match="journal-7.jsonl: is not what an earlier run"):
        speak.main([str(source), str(out), "--voices", "m3"])
    only = write_lines(tmp_path / "only.jsonl", 1)
    only.write_text(only.read_text().replace("$12", r"\\foo"))
    with pytest.raises(
        data.DataError, match="no line of it could be spoken; .*only-out.skipped.jsonl says why"
    ):
        speak.main([str(only), str(tmp_path / "only-out.jsonl")])
    with pytest.raises(data.DataError, match="nothing to hear"):
        speak.main(["...", str(tmp_path / "x.wav")])
    for flags in (
        ["hello", str(out)],
        [str(source), "a.wav"],
        [str(source), str(out), "--voice", "m3"],
        ["hello", "a.wav", "--voices", "m3"],
        ["hello", "a.wav", "--tts", "kokoro"],
        [str(source), str(out), "--kokoro", "x"],
        [str(source), str(out), "--limit", "0"],
    ):
        with pytest.raises(SystemExit):
            speak.parse_flags(flags)
    assert "Traceback" not in capsys.readouterr().err


def test_one_sentence_still_works(tmp_path):
    speak.main(["seven plus two", str(tmp_path / "sum.wav"), "--voice", "f2", "--rate", "200"])
    assert 0.3 < data.audio_seconds(tmp_path / "sum.wav") < 3


# ------------------------------------------------------------------------------------------------
# Kokoro


class FakePipeline:
    """What kokoro documents: called with text, voice and speed, it yields results with .phonemes
    and .audio (24 kHz), some without audio."""

    def __init__(self, lang_code, repo_id=None, model=True):
        assert lang_code in "ab" and isinstance(model, torch.nn.Module)

    def load_voice(self, voice):
        if voice == "af_nobody":
            raise OSError("404 Client Error: no such file\nmore")

    def __call__(self, text, voice=None, speed=1):
        yield types.SimpleNamespace(phonemes="", audio=None)
        for part in text.split(". "):
            yield types.SimpleNamespace(phonemes=part, audio=0.1 * torch.rand(24_000))


class FakeModel(torch.nn.Module):
    def __init__(self, repo_id, config=None, model=None):
        super().__init__()


@pytest.fixture
def fake_kokoro(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "kokoro", types.SimpleNamespace(KModel=FakeModel, KPipeline=FakePipeline)
    )


def test_kokoro_speaks_every_part_at_16_khz_with_noise_of_its_own(fake_kokoro):
    reader = speak.kokoro_reader(["af_heart", "bf_emma"], None, "cpu")
    one = reader("Seven. Plus two", "af_heart", 1)
    assert one.shape == (32_000,) and one.dtype == torch.float32
    reader("other words", "bf_emma", 5)
    assert torch.equal(one, reader("Seven. Plus two", "af_heart", 1)) and not torch.equal(
        one, reader("Seven. Plus two", "af_heart", 2)
    )
    with pytest.raises(ValueError, match="more than 510 phonemes"):
        reader("a" * 510, "af_heart", 1)


def test_a_manifest_by_kokoro(fake_kokoro, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", 6)
    speak.main([str(source), str(tmp_path / "out.jsonl"), "--tts", "kokoro"])
    assert {e.speaker for e in data.read_manifest(tmp_path / "out.jsonl")} <= set(
        speak.KOKORO_VOICES
    )
    with pytest.raises(
        data.DataError,
        match=r"Kokoro cannot be started \(404 Client Error: no such file\); without a network",
    ):
        speak.main(
            [str(source), str(tmp_path / "b.jsonl"), "--tts", "kokoro", "--voices", "af_nobody"]
        )
    with pytest.raises(
        data.DataError, match="config.json is missing; put there what hexgrad/Kokoro-82M has"
    ):
        speak.main(
            [str(source), str(tmp_path / "c.jsonl"), "--tts", "kokoro", "--kokoro", str(tmp_path)]
        )


def test_kokoro_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kokoro", None)
    with pytest.raises(
        data.DataError, match=r"--tts kokoro cannot be used \(.*\); run `pip install kokoro`$"
    ):
        speak.main(
            [
                str(write_lines(tmp_path / "in.jsonl", 1)),
                str(tmp_path / "out.jsonl"),
                "--tts",
                "kokoro",
            ]
        )
    # Nothing was said yet, so that another voice may
    speak.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])


def test_ranks_share_what_is_left(tmp_path, monkeypatch):
    """One of two ranks died early: what it left is not all its own again."""
    source, out = write_lines(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    folder = tmp_path / "out_audio"
    folder.mkdir()
    (folder / "journal-0.jsonl").write_text(
        "".join(
            json.dumps({"key": speak.key_of(line), "skipped": "for the test"}) + "\n"
            for line in lines[0::2]
        )
    )
    monkeypatch.setattr(speak.ranks, "start_distributed", lambda: (1, 2, torch.device("cpu")))
    monkeypatch.setattr(
        speak.ranks, "rank_zero_first", contextlib.nullcontext
    )
    speak.main([str(source), str(out)])
    done = {
        json.loads(line)["key"] for line in (folder / "journal-1.jsonl").read_text().splitlines()
    }
    assert done == {speak.key_of(line) for line in lines[1::2][1::2]}


def test_changed_readings_are_spoken_anew(monkeypatch):
    record = {"id": "1", "transcript": "one"}
    before = speak.key_of(record)
    monkeypatch.setattr(speak, "READING", "another verbalise.py")
    assert speak.key_of(record) != before


def test_the_real_kokoro_at_random_weights(tmp_path):
    """Its own classes from a local folder; by espeak's phonemes (a Spanish voice), since the
    English ones ask for a spaCy model from the network."""
    pytest.importorskip("kokoro")
    letters = dict.fromkeys("abcdefghijklmnopqrstuvwxyzɑɐæɛɪɔʊʌəɜɡŋɹʃʒθðʧʤɾʔβɣˈˌː ;:,.!?")
    config = {
        "vocab": {letter: i + 1 for i, letter in enumerate(letters)},
        "n_token": 178,
        "hidden_dim": 512,
        "style_dim": 128,
        "n_layer": 1,
        "max_dur": 2,
        "dropout": 0.0,
        "text_encoder_kernel_size": 5,
        "n_mels": 80,
        "plbert": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
            "num_hidden_layers": 1,
            "dropout": 0.0,
        },
        "istftnet": {
            "upsample_kernel_sizes": [20, 12],
            "upsample_rates": [10, 6],
            "gen_istft_hop_size": 5,
            "gen_istft_n_fft": 20,
            "upsample_initial_channel": 512,
            "resblock_dilation_sizes": [[1, 3, 5]] * 3,
            "resblock_kernel_sizes": [3, 7, 11],
        },
    }
    folder = tmp_path / "kokoro"
    (folder / "voices").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    # No weights: they stay as they were drawn
    torch.save({}, folder / "kokoro-v1_0.pth")
    torch.save(torch.randn(510, 1, 256), folder / "voices" / "ef_dora.pt")
    torch.manual_seed(0)
    reader = speak.kokoro_reader(["ef_dora"], folder, "cpu")
    one = reader("Seven plus two.", "ef_dora", 1)
    assert one.dim() == 1 and len(one) > 3_000 and one.isfinite().all()
    assert torch.equal(one, reader("Seven plus two.", "ef_dora", 1)) and not torch.equal(
        one, reader("Seven plus two.", "ef_dora", 2)
    )
