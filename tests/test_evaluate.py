"""From text to numbers: extraction, MMAU's rule, unweighted accuracy, intervals, decoding, the
command line."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import balanced_accuracy_score
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import data
import evaluate
import judge
import rollout
import sampler
from evaluate import mmau_correct, paired_bootstrap, wilson
from judge import extract_choice
from lab import compare
from plumbing import plots, tables

ROOT = Path(__file__).parent.parent
METALS = ["gold", "silver", "white gold", "a ring"]
TRACE = (
    "<THINK><PLANNING>p</PLANNING><CAPTION>silver, (B)</CAPTION><REASONING>The answer is silver.</REASONING>"  # noqa: E501
    "<SUMMARY>s</SUMMARY></THINK>"
)


# -------------------- what was chosen ------------------------------------------------------------


@pytest.mark.parametrize(
    "output, choice",
    [
        (TRACE + "<RESPONSE>gold</RESPONSE>", "gold"),  # the trace speaks of silver: dropped
        (TRACE + "<RESPONSE>White Gold.", "white gold"),  # never closed
        (TRACE + "<RESPONSE>gold</RESPONSE><RESPONSE>silver</RESPONSE>", "gold"),
        (TRACE + " I hear gold.", "gold"),  # no response tag: what follows the trace
        (TRACE, None),  # only a trace: no answer, not the trace's words
        (TRACE + "<RESPONSE></RESPONSE>", None),
        (
            "<THINK><PLANNING>gold or silver? The answer is silver, I thi",
            "silver",
        ),  # cut off, but it says so
        ("<THINK><PLANNING>it may be silver", None),  # cut off before any statement
        ("gold<|im_end|>", "gold"),
        ("B", "silver"),
        ("b", "silver"),
        ("(B)", "silver"),
        ("B.", "silver"),
        ("B)", "silver"),
        ("[B]", "silver"),
        ("**B**", "silver"),
        ("B. silver", "silver"),
        ("(A) gold", "gold"),
        ("a) gold", "gold"),
        ("A: gold", "gold"),
        ("A - gold", "gold"),
        ("The answer is B", "silver"),
        ("The answer is (C).", "white gold"),
        ("**Answer:** (C) white gold", "white gold"),
        ('The correct answer is: "gold".', "gold"),
        ("the answer is option B, not A", "silver"),
        ("The answer to this is B", "silver"),
        ("the correct option is C", "white gold"),
        ("I choose option D", "a ring"),
        ("B because silver is lighter", "silver"),
        ("B because it is not gold", "silver"),
        ("A is a letter of gold", "gold"),
        (
            "It is silver. Gold would sound brighter.",
            None,
        ),  # two are named, and no statement says which
        (
            "silver. Gold would sound brighter.",
            "silver",
        ),  # the first sentence is an answer by itself
        ("The answer is silver. Gold would be brighter.", "silver"),
        ("Either gold or silver. The answer is silver", "silver"),
        ("The answer is gold? No, the answer is silver", "silver"),
        ("The answer is gold.\nNo: the answer is silver.", "silver"),
        ("The answer is silver. The answer is easy to hear.", "silver"),
        ("gold or silver", None),
        ("(A) silver", None),
        ("A and B", None),  # contradictions are no answer
        ("", None),
        ("I do not know", None),
        ("golden", None),
        ("marigold", None),
        ("non-gold", None),
        ("E", None),
        ("(F)", None),
    ],
)
def test_extraction(output, choice):
    assert extract_choice(output, METALS) == choice


@pytest.mark.parametrize(
    "output, choices, choice",
    [
        ("A dog barks", ["cat", "dog"], "dog"),  # an article, not option A
        ("A dog barks", ["a dog", "cat"], "a dog"),
        ("The answer is A because", ["cat", "dog"], "cat"),
        ("B minor", ["C major", "A", "B minor"], "B minor"),  # a key, not option B
        ("It is B minor, I hear it", ["B minor", "C major"], "B minor"),
        ("a chord of C", ["A", "C", "G"], "C"),
        ("It takes 1.5 seconds", ["5 seconds", "2 seconds"], None),  # 1.5 is not 5
        ("It takes 1.5 seconds", ["5 seconds", "1.5 seconds"], "1.5 seconds"),
        ("C:maj/1 to G:maj/1", ["G:maj/1 to C:maj/1", "C:maj/1 to G:maj/1"], "C:maj/1 to G:maj/1"),
        ("beep, knock", ["knock, beep", "beep, knock"], "beep, knock"),
        ("not present", ["present", "not present"], "not present"),
        ("It is hip-hop, not rock", ["rock", "hip-hop"], "hip-hop"),
        ("It is not present", ["present", "absent"], None),
        ("3", ["1", "2", "3"], "3"),
        ("There are 3 knocks", ["13", "3", "33"], "3"),
        ("D", ["1.63 s", "2.74 s", "1.53 s", "1.63 s"], "1.63 s"),  # a doubled choice, as MMAU has
        ("C (unclear)", ["x", "y", "z"], "z"),
        ("anything", [], None),
    ],
)
def test_extraction_pitfalls(output, choices, choice):
    assert extract_choice(output, choices) == choice


def test_extraction_does_not_depend_on_the_order_of_choices():
    for seed in range(20):
        shuffled = random.Random(seed).sample(METALS, len(METALS))
        for choice in METALS:
            letter = "ABCD"[shuffled.index(choice)]
            for output in (
                choice,
                f"The answer is {choice}",
                f"I hear {choice} here",
                letter,
                f"({letter}) {choice}",
                f"it is ({letter})",
            ):
                assert extract_choice(f"{TRACE}<RESPONSE>{output}</RESPONSE>", shuffled) == choice


# -------------------- MMAU's rule ----------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, prediction, choices, right",
    [
        ("gold", "gold", ["gold", "silver"], True),
        ("gold", "GOLD!", ["gold", "silver"], True),
        ("gold", "It must be gold", ["gold", "silver"], True),
        ("gold", "gold, not silver", ["gold", "silver"], False),  # a word of a wrong choice
        ("gold", "golden", ["gold", "silver"], False),
        ("gold", "", ["gold", "silver"], False),
        ("", "", ["", "silver"], False),
        (
            "gold",
            "The answer is (A) gold",
            ["gold", "a ring"],
            False,
        ),  # "a" belongs to a wrong choice
        ("gold", "The answer is (A) gold", ["gold", "silver"], True),  # here it does not
        ("gold", "The answer is (A) gold", ["gold", "the ring"], False),
        (
            "a gold ring",
            "a gold ring",
            ["a gold ring", "a silver ring"],
            True,
        ),  # words it shares with a wrong choice are free
        (
            "a gold ring",
            "gold ring",
            ["a gold ring", "a silver ring"],
            False,
        ),  # all words are needed
        ("gold", "white gold", ["gold", "white gold"], False),
        ("white gold", "white gold", ["gold", "white gold"], True),
        (
            "knock then beep",
            "beep then knock",
            ["knock then beep", "beep then knock"],
            True,
        ),  # blind to order: so is MMAU's script
        ("C#", "C", ["C#", "D"], True),  # and to signs
    ],
)
def test_official_rule(answer, prediction, choices, right):
    for seed in range(5):  # the order of choices must not matter
        assert (
            mmau_correct(answer, prediction, random.Random(seed).sample(choices, len(choices)))
            is right
        )


def test_score_mmau():
    said = [
        ("sound", "gold"),
        ("sound", "The answer is (A) gold"),
        ("sound", "silver"),
        ("music", "<THINK>silver</THINK><RESPONSE>gold</RESPONSE>"),
        ("speech", "gold or silver"),
        ("speech", ""),
    ]
    choices = ["gold", "silver", "a ring"]
    examples = [
        data.Example(f"q{n}", None, "?", choices, "gold", task) for n, (task, _) in enumerate(said)
    ]
    outputs = [output for _, output in said]
    score = evaluate.score(examples, outputs)["aqa"]
    tasks = ("sound", "music", "speech", "average")
    assert [score[task] for task in tasks] == pytest.approx(
        [200 / 3, 100, 0, 50]
    )  # micro: 3 of 6, not the mean of the tasks
    assert [score["official"][task] for task in tasks] == pytest.approx([100 / 3, 0, 0, 100 / 6])
    assert score["counts"] == {"records": 6, "no_answer": 2}
    assert score["correct"] == {
        "sound": {"q0": True, "q1": True, "q2": False},
        "music": {"q3": True},
        "speech": {"q4": False, "q5": False},
    }
    assert score["intervals"]["average"] == wilson(3, 6)
    assert evaluate.score(examples[:1], outputs[:1])["aqa"]["music"] is None


@pytest.mark.parametrize("answer, other", [
    ("C minor", "C# minor"),
    ("3", "-3"),
    ("knock then beep", "beep then knock"),
])
def test_another_choice_of_the_same_words_is_wrong(answer, other):
    """MMAU's rule compares sets of words, and takes one for the other."""
    example = data.Example("q", None, "?", [answer, other, "a ring"], answer, "sound")
    for said, right in ((answer, 100), (other, 0)):
        score = evaluate.score([example], [said])["aqa"]
        assert score["sound"] == right and score["official"]["sound"] == 100


# -------------------- spoken choices -------------------------------------------------------------


PROMPT = "Which is yellow and rings like vitamin A. in a test?\nWhat is the answer? Select one of the following:\nA. gold\nB. silver\nC. white gold\nD. a ring"  # noqa: E501


@pytest.mark.parametrize(
    "prompt, choices",
    [
        (PROMPT, METALS),
        (PROMPT.replace("\n", " "), METALS),
        ("Which? A) gold B) silver C) white gold D) a ring", METALS),
        ("What is A. and B.?", []),
        ("", []),
        (None, []),
    ],
)
def test_spoken_choices(prompt, choices):
    assert judge.spoken_choices(prompt) == choices


# -------------------- unweighted accuracy --------------------------------------------------------


@pytest.mark.parametrize(
    "output, emotion",
    [
        ("The speaker sounds angry.", "angry"),
        ("happy/excited", "happy"),
        ("(D)", "sad"),
        ("neutral", "neutral"),
        ("He is excited.", "happy"),
        ("Anger", "angry"),
        ("Sadness.", "sad"),
        ("a tone of happiness and excitement", "happy"),
        ("not happy", None),
        ("happy or sad", None),
        ("furious", None),
        ("joyful", None),
        ("unhappy", None),
        ("", None),
        (TRACE + "<RESPONSE>sad</RESPONSE>", "sad"),
    ],
)
def test_what_counts_as_one_of_iemocaps_classes(output, emotion):
    assert evaluate.ser_class(output, ["angry", "happy", "neutral", "sad"]) == emotion


def test_an_emotion_that_is_a_class_itself_is_not_merged():
    assert evaluate.ser_class("excited", ["angry", "excited", "happy"]) == "excited"
    assert evaluate.ser_class("She sounds excited.", ["Angry", "Happy", "Sad"]) == "Happy"


CLASSES = ["angry", "happy", "neutral", "sad"]


def score_ser(labels, said):
    """Of class names, one per utterance."""
    samples = []
    for n, (label, name) in enumerate(zip(labels, said)):
        sample = {"id": f"u{n}", "choices": CLASSES, "answer": label, "chosen": name}
        samples.append({**sample, "correct": name == label})
    return evaluate.score_ser(samples)


def test_ua_is_sklearns_balanced_accuracy():
    for seed in range(10):
        rng = random.Random(seed)
        labels = rng.choices(CLASSES, [1, 5, 20, 3], k=200) + CLASSES
        predictions = [label if rng.random() < 0.6 else rng.choice(CLASSES) for label in labels]
        score = score_ser(labels, predictions)
        assert score["ua"] == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
        assert sum(sum(row.values()) for row in score["confusion"].values()) == len(labels)
        assert score["interval"][0] < score["ua"] < score["interval"][1]


def test_confusion_keeps_what_had_no_answer():
    score = score_ser(["angry", "angry", "sad", "sad"], ["angry", None, "angry", None])
    assert score["ua"] == 25 and score["recall"] == {
        "angry": 50,
        "sad": 0,
    }  # classes without an utterance do not count
    assert score["confusion"]["angry"] == {
        "angry": 1,
        "happy": 0,
        "neutral": 0,
        "sad": 0,
        "no answer": 1,
    }
    assert score["confusion"]["sad"] == {
        "angry": 1,
        "happy": 0,
        "neutral": 0,
        "sad": 0,
        "no answer": 1,
    }
    assert score["correct"]["angry"] == {"u0": True, "u1": False}


# -------------------- intervals ------------------------------------------------------------------


def test_wilson_against_known_values():
    assert wilson(81, 263) == pytest.approx([25.53, 36.62], abs=0.01)  # Newcombe 1998, Table I
    assert wilson(15, 148) == pytest.approx([6.24, 16.05], abs=0.01)
    assert wilson(0, 20) == pytest.approx([0, 16.11], abs=0.01)
    assert wilson(20, 20) == pytest.approx([83.89, 100], abs=0.01)
    assert wilson(0, 0) == [None, None]


def runs(rng, n, easy=0.5, gain=0.1):
    """Two runs over n questions, half of them easy for both: A is right 10 points more often."""
    both = rng.random(n) < easy
    return both | (rng.random(n) < 2 * gain), both


def test_paired_bootstrap_against_the_closed_form():
    a, b = runs(np.random.default_rng(1), 20_000)
    difference, (low, high) = paired_bootstrap(a, b, samples=20_000)
    d = a.astype(float) - b
    error = 100 * d.std() / len(d) ** 0.5  # of the mean of the paired differences
    assert difference == pytest.approx(100 * d.mean())
    assert [low, high] == pytest.approx(
        [difference - 1.96 * error, difference + 1.96 * error], abs=0.05 * error
    )
    unpaired = 100 * ((a.var() + b.var()) / len(d)) ** 0.5
    assert high - low < 0.7 * 2 * 1.96 * unpaired  # pairing pays
    assert paired_bootstrap(b, a, samples=20_000)[0] == -difference
    assert (
        paired_bootstrap(a, b)
        == paired_bootstrap(a, b)
        != paired_bootstrap(a, b, samples=9_000)
    )
    assert paired_bootstrap(a, a) == (0, [0, 0])
    assert paired_bootstrap([True] * 5, [False] * 5) == (100, [100, 100])


def test_paired_bootstrap_covers_the_truth_95_times_in_100():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(1000):
        low, high = paired_bootstrap(*runs(rng, 300), samples=1000)[1]
        hits += low <= 10 <= high
    assert 925 <= hits <= 970, hits


def test_paired_bootstrap_of_unweighted_accuracy():
    rng = np.random.default_rng(3)
    labels = np.repeat(["angry", "sad"], [4000, 16_000])
    a = rng.random(20_000) < np.where(labels == "angry", 0.9, 0.5)
    b = rng.random(20_000) < np.where(labels == "angry", 0.4, 0.6)
    difference, (low, high) = paired_bootstrap(a, b, labels=labels, samples=20_000)
    d = a.astype(float) - b
    parts = [d[labels == c] for c in ("angry", "sad")]
    assert difference == pytest.approx(
        50 * sum(p.mean() for p in parts)
    )  # the rare class weighs as much as the common one
    other = np.where(labels == "sad", "angry", "sad")
    assert difference == pytest.approx(
        100
        * (
            balanced_accuracy_score(labels, np.where(a, labels, other))
            - balanced_accuracy_score(labels, np.where(b, labels, other))
        )
    )
    error = 50 * sum(p.var() / len(p) for p in parts) ** 0.5
    assert [low, high] == pytest.approx(
        [difference - 1.96 * error, difference + 1.96 * error], abs=0.06 * error
    )


def test_ua_interval_against_the_closed_form():
    labels = ["angry"] * 3000 + ["sad"] * 12_000
    predictions = (
        ["angry"] * 2400 + ["sad"] * 600 + ["angry"] * 3000 + ["sad"] * 9000
    )  # recalls 0.8 and 0.75
    score = score_ser(labels, predictions)
    error = 50 * (0.8 * 0.2 / 3000 + 0.75 * 0.25 / 12_000) ** 0.5
    assert score["ua"] == pytest.approx(77.5)
    assert score["interval"] == pytest.approx(
        [77.5 - 1.96 * error, 77.5 + 1.96 * error], abs=0.06 * error
    )


def test_paired_bootstrap_refuses_lists_of_two_lengths():
    with pytest.raises(ValueError, match="longer"):
        paired_bootstrap([True], [True, False])


# -------------------- decoding -------------------------------------------------------------------


def test_chooser_samples_what_transformers_would():
    torch.manual_seed(0)
    logits, rows, prompt = 2 * torch.randn(1, 30), 20_000, torch.zeros(1, 7, dtype=torch.long)
    for temperature, top_k, top_p in (0.6, 5, 0.5), (1.3, 8, 0.9), (1.0, 0, 1.0), (1.0, 0, 0.3):
        warped = TemperatureLogitsWarper(temperature)(prompt, logits)
        warped = TopPLogitsWarper(top_p)(
            prompt, TopKLogitsWarper(top_k)(prompt, warped) if top_k else warped
        )
        choose = sampler.chooser(
            range(rows), 7, [], max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p
        )
        scores = choose(prompt.expand(rows, -1), logits.expand(rows, -1))
        assert (scores > -torch.inf).sum(1).eq(1).all()  # one token is left: argmax takes it
        share = torch.bincount(scores.argmax(1), minlength=30) / rows
        expected = warped.softmax(-1)[0]
        assert set(share.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
        assert (share - expected).abs().max() < 0.015


def test_chooser_is_keyed_by_seed_name_and_position():
    def pick(names, seed=0, position=0):
        choose = sampler.chooser(
            [f"{seed} {name}" for name in names], 4, [], max_new_tokens=50, temperature=1.0
        )
        return (
            choose(torch.zeros(len(names), 4 + position), torch.zeros(len(names), 1000))
            .argmax(1)
            .tolist()
        )

    assert pick(["a", "b", "c"]) == pick(["a"]) + pick(["b"]) + pick(["c"])
    assert (
        len(
            {
                pick(["a"])[0],
                pick(["b"])[0],
                pick(["a"], seed=1)[0],
                pick(["a"], position=1)[0],
                pick(["a"], position=2)[0],
            }
        )
        == 5
    )


def test_every_row_of_the_full_softmax_has_its_own_temperature():
    """Chi-square of 40,000 draws a temperature against the softmax, banned ids left out; one call
    for both, rows mixed."""
    torch.manual_seed(1)
    logits, rows = 2 * torch.randn(40), 40_000
    heat = [0.7, 1.5] * rows
    choose = sampler.chooser(range(2 * rows), 1, [3, 39], max_new_tokens=2, temperature=heat)
    for position in (0, 1):
        drawn = choose(torch.zeros(2 * rows, 1 + position), logits.expand(2 * rows, -1)).argmax(1)
        for n, temperature in enumerate((0.7, 1.5)):
            counts = torch.bincount(drawn[n::2], minlength=40)
            expected = rows * (
                logits.double().index_fill(0, torch.tensor([3, 39]), -torch.inf) / temperature
            ).softmax(-1)
            assert counts[3] == counts[39] == 0
            kept = expected > 0
            assert (
                scipy.stats.chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 0.001
            )


def test_chooser_bans():
    scores = torch.tensor([[9.0, 1.0, 0.0]])
    for temperature in 0, 1.0:
        choose = sampler.chooser(
            ["a"], 1, [0], max_new_tokens=1, temperature=temperature, top_k=1, top_p=0.5
        )
        assert choose(torch.zeros(1, 1), scores).argmax(1).item() == 1
    assert scores[0, 0] == 9  # the model's own tensor is left alone


@pytest.mark.parametrize("temperature, top_p", [([0.0, 1.0], 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_chooser_refuses_what_it_would_draw_wrongly(temperature, top_p):
    with pytest.raises(ValueError, match="must"):
        sampler.chooser(
            ["a", "b"], 1, [], max_new_tokens=1, temperature=temperature, top_p=top_p
        )


@pytest.mark.parametrize("flag, value", [("--top-p", "0"), ("--temperature", "-1")])
def test_decoding_flags_out_of_range(flag, value, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "aqa", "--model", "x", "--data", "y", flag, value])
    assert "--top-p above 0" in capsys.readouterr().err


@pytest.fixture(scope="module")
def examples(tmp_path_factory, make_wav):
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for n in range(7):
        task = ["sound", "music", "speech", "emotion"][n % 4]
        make_wav(folder / f"{n}.wav", seconds=0.3 + 0.25 * (n * 3 % 7), frequency=200 + 150 * n)
        choices = CLASSES if task == "emotion" else ["seven", "two", "four"]
        lines.append(
            {
                "id": f"e{n}",
                "audio": f"{n}.wav",
                "question": "What is " + "seven plus " * (n * 5 % 4) + "two?",
                "choices": choices,
                "answer": choices[n % 3],
                "task": task,
                "transcript": "seven plus " * (n % 3) + "two",
                "split": "test",
            }
        )
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return data.read_manifest(folder / "manifest.jsonl")


@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=1.0, top_k=0, top_p=1.0)])
def test_batched_equals_single_and_keeps_the_order(
    tiny_student_model, tiny_processor, examples, how
):
    def answers(rows, **more):
        return rollout.generate(
            tiny_student_model,
            tiny_processor,
            rows,
            max_new_tokens=12,
            progress=False,
            **{**how, **more},
        )

    alone = [answers([e])[0] for e in examples]
    assert len(set(alone)) > 3  # else order could not show
    before = torch.get_rng_state()
    assert answers(examples, batch_size=3) == alone
    assert answers(examples[::-1], batch_size=7) == alone[::-1]
    assert torch.equal(
        before, torch.get_rng_state()
    )  # a training run's random numbers are not touched
    if how["temperature"]:
        assert answers(examples, seed=1) != alone


def test_generate_is_transformers_greedy_search_without_the_checkpoints_settings(
    tiny_student_model, tiny_processor, examples
):
    model, tokenizer = tiny_student_model, tiny_processor.tokenizer
    inputs = data.prompt_batch(examples[:1], tiny_processor)
    plain = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bad_words_ids=[[tiny_processor.audio_token_id]],
    )
    expected = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :]).split("<|im_end|>")[0]
    settings = GenerationConfig(
        repetition_penalty=50.0,
        do_sample=True,
        temperature=5.0,
        no_repeat_ngram_size=1,
        num_beams=3,
        max_length=9,
        suppress_tokens=[40, 41, 42],
        forced_eos_token_id=44,
        bad_words_ids=[[n] for n in range(50, 150)],
    )
    original, model.generation_config = model.generation_config, settings
    model.train()
    model.model.audio_tower.eval()
    modes = set()
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: modes.add(module.training)
    )
    try:
        assert rollout.generate(
            model, tiny_processor, examples[:1], max_new_tokens=12, temperature=0, progress=False
        ) == [expected]
        assert modes == {False}  # no dropout while answering
        assert (
            model.generation_config is settings
            and model.training
            and not model.model.audio_tower.training
        )  # all put back
    finally:
        hook.remove()
        model.generation_config = original
        model.eval()


def test_generate_stops_at_the_turn_end_and_never_says_the_audio_placeholder(
    tiny_student_model, tiny_processor, examples
):
    tokenizer = tiny_processor.tokenizer
    letter = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    bias = torch.zeros(len(tokenizer))
    bias[tiny_processor.audio_token_id], bias[letter] = 2000, 1000
    hook = tiny_student_model.lm_head.register_forward_hook(
        lambda module, inputs, output: output + bias
    )
    try:
        for temperature in 0, 0.6:
            how = dict(max_new_tokens=5, temperature=temperature, progress=False)
            assert (
                rollout.generate(tiny_student_model, tiny_processor, examples[:2], **how)
                == ["xxxxx"] * 2
            )
        bias[data.turn_end_id(tokenizer)] = 1500
        assert rollout.generate(tiny_student_model, tiny_processor, examples[:2], **how) == ["", ""]
    finally:
        hook.remove()


def test_text_view(tiny_student_model, tiny_processor, examples):
    def read(rows, **how):
        return rollout.generate(
            tiny_student_model,
            tiny_processor,
            rows,
            max_new_tokens=8,
            temperature=0,
            progress=False,
            **how,
        )

    alone = [read([e], view="text", words="transcript")[0] for e in examples]
    assert read(examples, view="text", words="transcript") == alone != read(examples)


@pytest.fixture(scope="module")
def tiny_reader(tiny_teacher_tokenizer):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tiny_teacher_tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def test_text_model(tiny_reader, tiny_processor, tiny_teacher_tokenizer, examples):
    how = dict(view="text", words="transcript", max_new_tokens=8, temperature=0, progress=False)
    said = rollout.generate(tiny_reader, tiny_teacher_tokenizer, examples, **how)
    inputs = data.prompt_batch(
        examples[:1],
        tiny_processor,
        view="text",
        tokenizer=tiny_teacher_tokenizer,
        words="transcript",
    )
    expected = tiny_reader.generate(**inputs, max_new_tokens=8, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert (
        said[0] == tiny_teacher_tokenizer.decode(expected).split("<|im_end|>")[0]
        and len(set(said)) > 1
    )


def test_bad_audio_is_named_before_the_model_runs(
    tiny_student_model, tiny_processor, examples, monkeypatch
):
    monkeypatch.setattr(tiny_student_model, "generate", None)
    missing = data.Example(
        "m",
        examples[0].audio.parent / "gone.wav",
        "?",
        ["a", "b"],
        "a",
        "sound",
        where="manifest.jsonl:8",
    )
    with pytest.raises(data.DataError, match="manifest.jsonl:8.*gone.wav"):
        rollout.generate(
            tiny_student_model, tiny_processor, [*examples, missing], batch_size=2, progress=False
        )


@pytest.mark.slow
def test_two_ranks_share_the_work_and_say_what_one_says(
    tiny_student_model, tiny_processor, examples, monkeypatch
):
    """Two ranks played one after the other; tests/test_train_source_layer.py runs real ones."""
    how = dict(max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0, batch_size=2, progress=False)
    alone = rollout.generate(tiny_student_model, tiny_processor, examples, **how)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rows, sizes in (
        (examples, [4, 3]),
        (
            examples[:1],
            [1, 0],
        ),
    ):  # the second: a rank without work
        said = {}

        def gather(shares, mine):
            said[torch.distributed.get_rank()] = mine
            shares[:] = [said.get(0, {}), said.get(1, {})]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        for rank in 0, 1, 0:  # rank 0 once more: by then both have given their share
            monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
            try:
                answers = rollout.generate(tiny_student_model, tiny_processor, rows, **how)
            except KeyError:
                assert len(said) == 1 < len(rows)
        assert answers == alone[: len(rows)]
        assert [len(said[0]), len(said[1])] == sizes


# -------------------- all of it ------------------------------------------------------------------


def test_evaluate_model(monkeypatch, examples):
    """What the model says is planted: e1 no answer, e3 "angry", the rest right."""

    def said(model, processor, rows, **how):
        assert how == {"seed": 5}
        return [
            {"e1": "hm", "e3": "angry"}.get(e.id, f"{TRACE}<RESPONSE>{e.answer}</RESPONSE>")
            for e in rows
        ]

    monkeypatch.setattr(evaluate, "generate", said)
    aqa, ser = (
        [e for e in examples if e.task != "emotion"],
        [e for e in examples if e.task == "emotion"],
    )
    results = evaluate.evaluate_model(None, None, aqa + ser, seed=5)
    assert {k: results["aqa"][k] for k in ("sound", "music", "speech")} == {
        "sound": 100,
        "music": 50,
        "speech": 100,
    }
    assert results["aqa"]["average"] == pytest.approx(500 / 6)
    assert results["ser"]["ua"] == 100 and results["ser"]["confusion"]["angry"]["angry"] == 1
    assert results["ser"]["correct"]["angry"] == {"e3": True}
    assert [s["id"] for s in results["samples"]] == [e.id for e in aqa + ser]
    assert results["samples"][1]["chosen"] is None and results["samples"][1]["correct"] is False
    text = tables.report(results)
    assert "83.33" in text and "1 without a clear answer" in text
    noise = evaluate.evaluate_model(None, None, [examples[1], examples[3]], seed=5)
    assert noise["aqa"]["music"] == 0 and noise["ser"]["ua"] == 100
    assert "ser" not in evaluate.evaluate_model(None, None, [examples[0]], seed=5)
    json.dumps(results)


def test_evaluate_model_refuses_what_it_cannot_score(examples):
    for task in "math", "sound", "emotion":
        odd = data.Example("o", examples[0].audio, "?", [], "a", task, where="manifest.jsonl:9")
        with pytest.raises(data.DataError, match="manifest.jsonl:9"):
            evaluate.evaluate_model(None, None, [odd])  # before any model is touched


def test_a_task_that_nobody_listed_gets_its_own_row(monkeypatch, examples, tmp_path):
    """From the manifest to the tables, the paired comparison, the table of a training run and its
    figure."""

    def results(right):
        rows = [
            data.Example(
                f"m{n}",
                examples[0].audio,
                "?",
                ["gold", "silver"],
                "gold",
                task,
                sub_category="Counting",
            )
            for n, task in enumerate(["mix", "mix", "sound", "another"])
        ]
        monkeypatch.setattr(
            evaluate,
            "generate",
            lambda model, processor, asked, **how: [
                "gold" if n in right else "silver" for n in range(4)
            ],
        )
        return evaluate.evaluate_model(None, None, rows)

    before, after = results([0]), results([0, 1, 3])
    assert list(after["aqa"]["correct"]) == ["sound", "music", "speech", "another", "mix"]
    assert (
        before["aqa"]["mix"],
        after["aqa"]["mix"],
        after["aqa"]["another"],
        after["aqa"]["average"],
    ) == (50, 100, 100, 75)
    assert after["samples"][0]["correct"] and after["samples"][0]["sub-category"] == "Counting"
    assert re.search(
        r"^mix +100.00", tables.report(after), re.M
    )
    points, _, pairs = evaluate.compare(after, before)["aqa", "another"]
    assert points == 100 and pairs == 1
    assert re.search(r"^mix +50.00 +100.00 +[+]50.00", evaluate.report_change(before, after), re.M)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "sft": 1.0}\n')
    for name, found in ("before", before), ("after", after):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    plots.plot_run(tmp_path, ["sft"], "loss term", "log")
    assert (tmp_path / "run.png").stat().st_size > 10_000


# -------------------- the command line -----------------------------------------------------------


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_compare_pairs_each_file_with_its_namesake(monkeypatch, tmp_path, capsys, make_wav):
    """The files use the same ids for other questions. Against another evaluation, in another order,
    and against a training run, which asked them all at once."""

    def write(name, right):
        make_wav(tmp_path / name / "x.wav")
        line = {"audio": f"{name}/x.wav", "question": "?", "choices": ["a", "b"], "answer": "a"}
        lines = [{"id": f"q{n}", **line, "task": "sound"} for n in range(4)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        planted.update({(name, f"q{n}"): n < right for n in range(4)})
        return path

    def said(model, processor, asked, **how):
        return ["a" if planted[e.audio.parent.name, e.id] else "b" for e in asked]

    planted = {}
    (tmp_path / "clean").mkdir()
    (tmp_path / "noise").mkdir()
    clean, noise = write("clean", 4), write("noise", 1)
    monkeypatch.setattr(evaluate, "generate", said)
    monkeypatch.setattr(evaluate.hearing, "check", lambda *_: None)
    model = type("Model", (), {"to": lambda self, device: self})()
    monkeypatch.setattr(evaluate.models, "load_audio_model", lambda *_, **__: (model, None))
    command = ["--task", "aqa", "--model", "x", "--data"]
    run_main(monkeypatch, *command, clean, noise, "--out", tmp_path / "a")
    run_main(monkeypatch, *command, noise, clean, "--out", tmp_path / "b")
    run_main(monkeypatch, *command, noise, "--out", tmp_path / "c")
    capsys.readouterr()
    results = {name: str(tmp_path / name / "results.json") for name in "abc"}
    compare.main([results["b"], results["a"]])
    assert capsys.readouterr().out.count("aqa average   +0.00 points  [+0.00, +0.00]  4 pairs") == 2
    with pytest.raises(SystemExit, match="has no manifest called clean, only noise"):
        compare.main([results["a"], results["c"]])

    asked = {"decoding": {"max_new_tokens": 9}, "aqa": {"correct": {"sound": {"q0": False}}}}
    asked["keys"] = {"q0": json.loads(Path(results["c"]).read_text())["keys"]["q0"]}
    (tmp_path / "after.json").write_text(json.dumps(asked))
    compare.main([results["c"], str(tmp_path / "after.json")])
    printed = capsys.readouterr().out
    assert "after.json was decoded with max_new_tokens 9, not 2048, temp" in printed
    assert "+100.00 points" in printed and "1 pairs" in printed

    asked["keys"]["q0"] = "another question"
    (tmp_path / "after.json").write_text(json.dumps(asked))
    with pytest.raises(SystemExit, match="questions of noise, or had them in other words .q0 is"):
        compare.main([results["c"], str(tmp_path / "after.json")])

    nothing = evaluate.compare({"aqa": {"correct": {"sound": {"other": True}}}}, asked)
    assert nothing == {}
    for content in "[]", '{"aqa": 5}', '{"aqa": {"sound": 3}}', "{":
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(SystemExit, match="other.json cannot be compared"):
            compare.main([results["a"], str(tmp_path / "other.json")])


def test_an_answer_that_is_a_letter_is_a_place_not_a_choice():
    """Blood groups: the answer A means the first choice, O."""
    spoken = "Which group is it? A. O B. A C. AB D. B"
    example = data.Example("x", None, "", [], "A", "speech", transcript=spoken)
    choices, answer = judge.choices_and_answer(example)
    assert choices == ["O", "A", "AB", "B"] and answer == "A. O"
    said = ("A. O", "The answer is O.", "B. A", "The answer is (A).")
    assert [judge.agree(one, answer, choices) for one in said] == [True, True, False, True]
    example.answer = "E"
    assert judge.choices_and_answer(example) == ([], "E")
    example.choices = ["E", "F"]
    assert judge.choices_and_answer(example) == (["E", "F"], "E")


def test_compare_weighs_emotions_alike():
    mine, theirs = (
        {"ser": {"correct": {"angry": {"a": right}, "sad": {f"s{n}": False for n in range(9)}}}}
        for right in (True, False)
    )
    assert evaluate.compare(mine, theirs)["ser", "ua"][0] == 50


def test_command_line_runs_a_model(
    tmp_path, monkeypatch, capsys, tiny_student_model, tiny_processor, examples
):
    tiny_student_model.save_pretrained(tmp_path / "tiny")
    tiny_processor.save_pretrained(tmp_path / "tiny")
    manifest, out = examples[0].audio.parent / "manifest.jsonl", tmp_path / "run"
    tiny = ["--model", tmp_path / "tiny", "--data", manifest, "--max-new-tokens", 4]
    run_main(
        monkeypatch, "--task", "both", *tiny, "--split", "test", "--temperature", 0, "--out", out
    )
    results = json.loads((out / "results.json").read_text())
    assert results["aqa"].keys() >= {
        "sound",
        "music",
        "speech",
        "average",
        "official",
        "intervals",
        "correct",
    }
    assert (
        results["ser"].keys() >= {"ua", "confusion", "interval"}
        and results["settings"]["temperature"] == 0
    )
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    expected = rollout.generate(
        tiny_student_model,
        tiny_processor,
        examples,
        temperature=0,
        max_new_tokens=4,
        progress=False,
    )
    assert {s["id"]: s["model_output"] for s in samples} == {
        e.id: text for e, text in zip(examples, expected)
    }
    predictions = json.loads((out / "predictions.json").read_text())
    assert evaluate.score_mmau(predictions) == results["aqa"]
    assert predictions[0].keys() >= {"id", "audio_id", "question", "choices", "answer", "task"}
    capsys.readouterr()
    run_main(monkeypatch, "--task", "aqa", *tiny, "--limit", 2, "--out", out)
    assert "2 questions" in capsys.readouterr().out
    assert "ser" not in json.loads((out / "results.json").read_text())
    shutil.copy(manifest, manifest.parent / "again.jsonl")
    run_main(
        monkeypatch,
        "--task",
        "aqa",
        *tiny,
        "--limit",
        2,
        "--out",
        out,
        "--data",
        manifest,
        manifest.parent / "again.jsonl",
    )
    assert "-- again" in capsys.readouterr().out  # each further file apart
    results = json.loads((out / "results.json").read_text())
    assert results["splits"]["again"]["aqa"] == results["aqa"]
    with pytest.raises(SystemExit, match="splits test"):
        run_main(monkeypatch, "--task", "aqa", *tiny, "--split", "train")


def by_ranks(ranks, folder, *arguments):
    """evaluate.py in a folder of its own, by one process or several."""
    folder.mkdir()
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else []
    )
    return subprocess.run(
        [
            sys.executable,
            *launcher,
            str(ROOT / "evaluate.py"),
            *map(str, arguments),
            "--out",
            "out",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tiny_student_model, tiny_processor):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_student_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, files",
    [
        ("both", {"results.json", "samples.jsonl", "predictions.json"}),
        ("gap", {"results.json", "samples.jsonl"}),
    ],
)
def test_two_ranks_write_and_print_what_one_does(tiny_folder, examples, tmp_path, task, files):
    """An odd number of questions, so that the shares differ."""
    arguments = [
        "--task",
        task,
        "--model",
        tiny_folder,
        "--data",
        examples[0].audio.parent / "manifest.jsonl",
        "--max-new-tokens",
        6,
        "--batch-size",
        2,
    ]
    one, two = (by_ranks(ranks, tmp_path / str(ranks), *arguments) for ranks in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout and len(one.stdout.splitlines()) > 3
    for folder in "12":
        assert {path.name for path in (tmp_path / folder / "out").iterdir()} == files
    for name in files:
        assert (tmp_path / "1/out" / name).read_bytes() == (tmp_path / "2/out" / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_say_what_is_wrong(tiny_folder, examples, tmp_path):
    """A clip that only rank 1 would ask about: one sentence, of each rank that still lives."""
    rows = [
        json.loads(line)
        for line in (examples[0].audio.parent / "manifest.jsonl").read_text().splitlines()
    ]
    rows[1]["audio"] = "broken.wav"
    bad = examples[0].audio.parent / "bad.jsonl"
    bad.write_text("\n".join(map(json.dumps, rows)))
    (bad.parent / "broken.wav").write_bytes(b"RIFF")
    how = ["--task", "both", "--model", tiny_folder, "--data", bad, "--max-new-tokens", 2]
    done = by_ranks(2, tmp_path / "both", *how)
    sentences = [line for line in done.stderr.splitlines() if line.startswith(f"{bad}:2: ")]
    assert done.returncode and len(set(sentences)) == 1, done.stderr
    assert "broken.wav" in sentences[0]
    assert done.stdout == "" and 'evaluate.py", line' not in done.stderr


def test_what_cannot_be_scored_is_named():
    """A task called "average" would hide the average of all."""
    asked = data.Example("q", Path("a.wav"), "What?", ["a", "b"], "a", "sound", where="m.jsonl:1")
    evaluate.check_scorable([asked])
    for wrong in (replace(asked, task="average"), replace(asked, choices=[])):
        with pytest.raises(data.DataError, match="m.jsonl:1: an open question, or a task called"):
            evaluate.check_scorable([wrong])
