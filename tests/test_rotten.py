"""Every fault that tests/rotten.py plants must be named with file and line, once, and nothing else;
what is left must be good."""

import json
import multiprocessing
import sys
from dataclasses import replace

import pytest
import rotten
import torch

import data
from plumbing import check, manifest


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
    """["m.jsonl:3: ..."] -> {3: "..."}; all name the manifest, and no line is named twice."""
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
        assert (
            "; " in found[number] and "\n" not in found[number] and len(found[number]) < 500
        ), fault


def test_check_names_every_fault_and_what_is_odd_and_nothing_else(
    corpus, lines, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(corpus[0])])
    with pytest.raises(SystemExit) as status:
        data.main()
    printed = capsys.readouterr().out.splitlines()
    faults = [line.removeprefix("fault: ") for line in printed if line.startswith("fault: ")]
    odd = places(
        [line.removeprefix("odd: ") for line in printed if line.startswith("odd: ")], corpus[0]
    )
    assert_planted(faults, corpus)
    assert list(places(faults, corpus[0])) == sorted(places(faults, corpus[0]))
    assert {
        number: words in odd.get(number, "")
        for number, words in ((lines[name], words) for name, words in rotten.ODD.items())
    } == dict.fromkeys(odd, True)
    rest = printed[len(faults) + len(odd) :]
    assert (
        rest[0]
        == f"{corpus[0]}: {len(lines)} examples are valid, {len(corpus[1])} have faults, "
        f"{len(odd)} odd things"
    )
    assert rest[-1].split()[:2] == ["together", str(len(lines))] and status.value.code == 1


def parsed(path):
    """-> (the examples whose lines are good, the faults of the other lines)."""
    lines = list(manifest.parse(path))
    examples = [line for line in lines if isinstance(line, data.Example)]
    return examples, [str(line) for line in lines if isinstance(line, data.DataError)]


@pytest.fixture(scope="module")
def clips(corpus):
    """[(example, its Clip or what is wrong with it)] of all good lines."""
    examples, _ = parsed(corpus[0])
    clips = check.decode_all(examples, 30)
    return [(example, clips[example.audio]) for example in examples]


def test_what_is_left_is_good(corpus, lines, clips):
    faults = parsed(corpus[0])[1]
    faults += [f"{example.where}: {clip}" for example, clip in clips if isinstance(clip, str)]
    assert_planted(faults, corpus)
    good = [(example, clip) for example, clip in clips if not isinstance(clip, str)]
    assert {example.id: int(example.where.rpartition(":")[2]) for example, _ in good} == lines
    for example, clip in good:
        wave = data.load_audio(example.audio, where=example.where)
        assert abs(len(wave) - 16_000 * clip.seconds) <= 1
        assert wave.isfinite().all() and wave.max() - wave.min() > 1e-3
        assert "mp3" in example.id or clip.seconds == data.audio_seconds(example.audio)
    examples = [example for example, _ in good]
    assert check.check_clips(examples, 30) == [clip.seconds for _, clip in good]
    assert check.check_clips([]) == []


def test_load_audio_refuses_what_the_check_refuses_in_the_same_words(clips):
    """But for silence and length, which only the check before training looks for."""
    refusals = 0
    for example, clip in clips:
        if not isinstance(clip, str) or " is silent (" in clip or ", over the limit of" in clip:
            continue
        with pytest.raises(data.DataError) as refused:
            data.load_audio(example.audio, where=example.where)
        assert str(refused.value) == f"{example.where}: {clip}"
        refusals += 1
    # 5 are silent, 2 too long; a name that is too long and a circle of links are clips' faults
    assert refusals == len(rotten.BAD_AUDIO) - 5 - 2 + 2


def test_the_first_fault_stops(corpus, lines, clips):
    manifest, planted = corpus
    # the first of the lines': clips are not looked at
    with pytest.raises(data.DataError, match=f":{planted['cut JSON'][0]}: the line is not JSON"):
        data.read_manifest(manifest)
    examples = [example for example, _ in clips]
    with pytest.raises(
        data.DataError, match=rf":{planted['truncated WAV'][0]}: .* is cut off \(6,"
    ):
        check.check_clips(examples, 30)
    with pytest.raises(
        data.DataError, match=rf":{planted['truncated WAV'][0]}: .* is cut off \(6,"
    ):
        data.check_audio(examples)


def test_in_small_blocks_as_in_one(clips, monkeypatch):
    monkeypatch.setattr(check, "BLOCK", 1_000)
    examples = [example for example, _ in clips]

    def without_shares(clip):  # a run at full scale may lie across two blocks
        return clip if isinstance(clip, str) else replace(clip, odd=None)

    again = check.decode_all(examples, 30)
    for example, clip in clips:
        assert without_shares(again[example.audio]) == without_shares(clip)


def test_a_clip_of_many_lines_is_decoded_once(clips, monkeypatch):
    examples = [example for example, _ in clips]
    decode, calls = check.decode, []
    monkeypatch.setattr(
        check, "decode", lambda path, *how: calls.append(path) or decode(path, *how)
    )
    check.decode_all(examples)
    assert sorted(calls) == sorted({example.audio for example in examples}) and len(calls) < len(
        examples
    )


def _rank(rank, folder, examples, good, answers):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        check.check_clips(examples, 30)
    except data.DataError as error:
        answers.put((check.check_clips(good, 30), str(error)))
    torch.distributed.destroy_process_group()


def test_two_ranks_find_what_one_finds(clips, tmp_path):
    examples = [example for example, _ in clips]
    good = [(example, clip.seconds) for example, clip in clips if not isinstance(clip, str)]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    arguments = (tmp_path, examples, [example for example, _ in good], answers)
    ranks = [fork.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    first = next(f"{example.where}: {clip}" for example, clip in clips if isinstance(clip, str))
    assert [answers.get(timeout=60) for _ in ranks] == [
        ([seconds for _, seconds in good], first)
    ] * 2
    for rank in ranks:
        rank.join()
