"""Every fault that tests/rotten.py plants must be named with file and line, once, and nothing else; what is left must be good."""
import json
import multiprocessing
import sys
from dataclasses import replace

import pytest
import torch

import data
import rotten


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return rotten.rotten(tmp_path_factory.mktemp("rotten"))


@pytest.fixture(scope="module")
def lines(corpus):
    """id -> line of every example that is good."""
    places = {}
    for number, line in enumerate(corpus[0].read_bytes().splitlines(), 1):
        if line.strip() and b'"id": "good' in line or b'"id": "odd' in line:
            places.setdefault(json.loads(line.decode("utf-8-sig"))["id"], number)
    return places


def places(sentences, manifest):
    """["m.jsonl:3: ..."] -> {3: "..."}; every sentence names the manifest, and no line is named twice."""
    assert all(sentence.startswith(f"{manifest}:") for sentence in sentences)
    found = [sentence.removeprefix(f"{manifest}:").partition(": ") for sentence in sentences]
    assert len({number for number, *_ in found}) == len(found)
    return {int(number): sentence for number, _, sentence in found}


def assert_planted(faults, corpus):
    manifest, planted = corpus
    found = places(faults, manifest)
    assert set(found) == {number for number, _ in planted.values()}
    for fault, (number, words) in planted.items():
        assert words in found[number], (fault, found[number])
        assert "; " in found[number] and "\n" not in found[number] and len(found[number]) < 500, fault


def test_check_names_every_fault_and_what_is_odd_and_nothing_else(corpus, lines, tiny_processor, tmp_path, monkeypatch, capsys):
    tiny_processor.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(corpus[0]), "--student", str(tmp_path)])
    with pytest.raises(SystemExit) as status:
        data.main()
    printed = capsys.readouterr().out.splitlines()
    faults = [line.removeprefix("fault: ") for line in printed if line.startswith("fault: ")]
    odd = places([line.removeprefix("odd: ") for line in printed if line.startswith("odd: ")], corpus[0])
    assert_planted(faults, corpus)
    assert list(places(faults, corpus[0])) == sorted(places(faults, corpus[0]))
    assert {number: words in odd.get(number, "") for number, words in ((lines[name], words) for name, words in rotten.ODD.items())} == dict.fromkeys(odd, True)
    rest = printed[len(faults) + len(odd):]
    assert rest[0] == f"{corpus[0]}: {len(lines)} examples are valid, {len(corpus[1])} have faults, {len(odd)} odd things"
    assert rest[1] == "converted to 16,000 Hz, mono, as they are read: 1 from 8,000 Hz, 1 from 44,100 Hz, 1 from 48,000 Hz, 2 from several channels"
    assert rest[-1].split()[:2] == ["together", str(len(lines))] and status.value.code == 1


def test_what_is_left_is_good(corpus, lines):
    faults = []
    examples = data.read_manifest(corpus[0], faults=faults)
    examples, seconds = data.check_clips(examples, 30, faults)
    assert_planted(faults, corpus)
    assert {example.id: int(example.where.rpartition(":")[2]) for example in examples} == lines
    for example, duration in zip(examples, seconds):
        wave = data.load_audio(example.audio, where=example.where, max_seconds=30)
        assert abs(len(wave) - 16_000 * duration) <= 1 and wave.isfinite().all() and wave.max() - wave.min() > 1e-3
        assert example.id == "odd mp3" or duration == data.audio_seconds(example.audio)
    assert data.check_clips(examples, 30) == (examples, seconds)


def test_load_audio_refuses_what_the_check_refuses_in_the_same_words(corpus):
    examples = data.read_manifest(corpus[0], faults=[])
    for found, example in zip(data.decode_all(examples, 30), examples):
        for cut in (0.1, float("inf")) if isinstance(found, str) else ():
            if cut < 1 and ("NaN" in example.id or "infinity" in example.id or "FLAC" in example.id or "MP3" in example.id):
                continue                                                # what is behind the cut is not looked at
            with pytest.raises(data.DataError) as refused:
                data.load_audio(example.audio, where=example.where, max_seconds=30, cut=cut)
            assert str(refused.value) == f"{example.where}: {found}"


def test_without_a_list_the_first_fault_stops(corpus, lines):
    manifest, planted = corpus
    with pytest.raises(data.DataError, match=f":{planted['cut JSON'][0]}: the line is not JSON"):      # the first of the lines': clips are not looked at
        data.read_manifest(manifest)
    with pytest.raises(data.DataError, match=rf":{planted['truncated WAV'][0]}: .* is cut off \(6,"):
        data.check_clips(data.read_manifest(manifest, faults=[]), 30)


def test_what_a_script_asks_for_is_asked_of_every_line(corpus, tmp_path):
    manifest, _ = corpus
    faults, all_faults = [], []
    examples = data.read_manifest(manifest, require=("reasoning",), faults=faults)
    every = data.read_manifest(manifest, faults=all_faults)
    assert {e.id for e in every} - {e.id for e in examples} == {"good, without a reasoning"}
    more = [fault.partition(": ")[2] for fault in faults if fault not in all_faults]
    assert more == ["'reasoning' is missing or empty and is needed here; add it to the line"]
    # two manifests that share ids: the second one's are left out
    (manifest.parent / "again.jsonl").write_bytes(manifest.read_bytes())
    twice = []
    assert data.read_manifests([manifest, manifest.parent / "again.jsonl"], faults=twice) == every
    assert len(twice) == 2 * len(all_faults) + len(every) and twice[-1].startswith(f"{manifest.parent / 'again.jsonl'}:")
    # nothing left
    (tmp_path / "bad.jsonl").write_text("{}\n[]\n")
    faults = ["an old one"]
    with pytest.raises(data.DataError, match="bad.jsonl: no example is left beside 2 with faults, the first being .*:1: the field 'id' is missing; "):
        data.read_manifest(tmp_path / "bad.jsonl", faults=faults)
    assert len(faults) == 3
    with pytest.raises(data.DataError, match=f"no example is left beside {len(corpus[1]) - len(rotten.BAD_AUDIO) + len(every)} with faults"):
        data.read_manifest(manifest, require=("transcript",), faults=[])
    silent = [example for example in every if "silen" in example.id and "good" not in example.id]
    with pytest.raises(data.DataError, match="no clip of 4 is good, the first fault being .* is silent .*; correct them"):
        data.check_clips(silent, faults=faults)
    assert data.check_clips([]) == ([], [])


def test_so_many_faults_are_tolerated():
    faults = [f"m.jsonl:{number}: the clip is silent (zeros); make it again" for number in range(1, 5)]
    data.tolerate([], 0)
    data.tolerate(faults, 4)
    with pytest.raises(data.DataError) as refused:
        data.tolerate(faults, 3)
    assert str(refused.value) == (
        "4 examples have faults, and 3 may be left out: m.jsonl:1: the clip is silent (zeros) | m.jsonl:2: the clip is silent (zeros) | m.jsonl:3: the clip is "
        "silent (zeros) | ...; see them all by python data.py check FILE and correct them, or leave them out by --skip-bad 4")
    with pytest.raises(data.DataError, match=r"^1 example has faults, and 0 may be left out: m.jsonl:1: the clip is silent \(zeros\); see"):
        data.tolerate(faults[:1], 0)


def test_in_small_blocks_as_in_one(corpus, monkeypatch):
    examples, whole = data.read_manifest(corpus[0], faults=[]), None
    for block in (2**18, 1_000):
        monkeypatch.setattr(data, "BLOCK", block)
        waves = {example.id: data.decode(example.audio, keep=0.3) for example in examples if example.id[:3] in ("goo", "odd")}
        said = [found if isinstance(found, str) else replace(found, odd=[]) for found in data.decode_all(examples)]
        if whole:
            assert said == whole[1]
            for name, (wave, _) in waves.items():                       # an MP3's decoder starts anew in every block, nearly alike
                assert abs(wave - whole[0][name][0]).max() <= ("mp3" in name and 2e-3), name
        whole = waves, said
    # what is kept is no longer than asked for, and a clip is read on until something is heard
    assert all(len(wave) == round(0.3 * clip.rate) for wave, clip in waves.values())
    assert waves["good after a silence"][1].seconds > 3 and waves["good wav"][1].seconds < 0.4


def test_a_clip_of_many_lines_is_decoded_once(corpus, monkeypatch):
    examples, decode, calls = data.read_manifest(corpus[0], faults=[]), data.decode, []
    monkeypatch.setattr(data, "decode", lambda path, **how: calls.append(path) or decode(path, **how))
    data.decode_all(examples)
    assert sorted(calls) == sorted({example.audio for example in examples}) and len(calls) < len(examples)


def _rank(rank, folder, manifest, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    faults = []
    examples, seconds = data.check_clips(data.read_manifest(manifest, faults=faults), 30, faults)
    try:
        data.check_clips(data.read_manifest(manifest, faults=[]), 30)
    except data.DataError as error:
        answers.put((examples, seconds, faults, str(error)))
    torch.distributed.destroy_process_group()


def test_two_ranks_find_what_one_finds(corpus, tmp_path):
    faults = []
    examples, seconds = data.check_clips(data.read_manifest(corpus[0], faults=faults), 30, faults)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(rank, tmp_path, corpus[0], answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    first = next(fault for fault in faults if "the audio file" in fault)
    assert [answers.get(timeout=60) for _ in ranks] == [(examples, seconds, faults, first)] * 2
    for rank in ranks:
        rank.join()
