"""data.py against independent sources: a hand-written search for the response, transformers' own
loss, and one forward per example.

`problems` is the judge: it names everything that is wrong with a batch. It must find nothing in
what collate returns, and must notice each planted error, because every one of them trains without
an error message."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import SENTENCES, STUDENT_TEMPLATE, TEACHER_TEMPLATE, bpe
from hypothesis import given, settings, strategies
from torch.nn.functional import cross_entropy

import data
from plumbing.check import about_clips, check_clips

END = "<|im_end|>"


def record(number, **changes):
    """A valid line of a manifest."""
    line = {
        "id": f"s{number}",
        "audio": f"clips/{number}.wav",
        "question": "What is seven plus two?",
        "choices": ["eight", "nine"],
        "answer": "nine",
        "task": "speech",
        "speaker": "anna",
        "split": "train",
        "description": "A man says: what is seven plus two?",
        "transcript": "what is seven plus two",
        "reasoning": {
            "planning": "Listen.",
            "caption": "A man asks.",
            "reasoning": "7 + 2 = 9",
            "summary": "So nine.",
        },
    }
    line.update(changes)
    return {key: value for key, value in line.items() if value != "DROP"}


def write(path, lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_wav):
    """Four examples that differ in everything that padding and positions depend on."""
    folder = tmp_path_factory.mktemp("world")
    for number, (seconds, rate) in enumerate(
        [(1.0, 16_000), (0.4, 8_000), (2.9, 44_100), (0.25, 16_000)]
    ):
        make_wav(folder / f"clips/{number}.wav", seconds, rate, frequency=300 + 200 * number)
    return write(
        folder / "manifest.jsonl",
        [
            record(0),
            record(
                1,
                question="Which sound?",
                choices=[],
                answer="knock",
                task="sound",
                reasoning="DROP",
                description="a knock",
                split="test",
            ),
            record(
                2,
                question="",
                choices=["up", "down", "none"],
                answer="up",
                description="A melody, four notes, each higher than the last.",
            ),
            record(3, answer="eight", choices=["eight"], description="x"),
        ],
    )


@pytest.fixture(scope="module")
def examples(world):
    return data.read_manifest(world, require=("description",))


def id_map(student, teacher):
    student_ids, teacher_ids, _ = data.shared_vocabulary(student, teacher)
    return data.token_map(student_ids, teacher_ids, len(student))


@pytest.fixture(scope="module")
def shifted_teacher():
    """A teacher in which every control token has another id than in the student."""
    return bpe(["<think>", "</think>", "<|im_start|>", "<|object_ref_start|>"], TEACHER_TEMPLATE)


@pytest.fixture(scope="module")
def make_batch(examples, tiny_processor, shifted_teacher):
    def make(**changes):
        mapping = id_map(tiny_processor.tokenizer, shifted_teacher)
        return data.collate(
            examples, tiny_processor, shifted_teacher, student_to_teacher=mapping, **changes
        )

    return make


def labels_like_transformers(batch):
    """The audio view's labels [batch, seq] as transformers wants them: the response's ids AT their
    own positions, -100 elsewhere."""
    labels = torch.full_like(batch.audio.inputs["input_ids"], -100)
    labels.view(-1)[batch.audio.predict_positions + 1] = batch.labels
    return labels


@pytest.fixture(scope="module")
def judge(examples, tiny_processor, shifted_teacher, tiny_student_model):
    model, student = tiny_student_model, tiny_processor.tokenizer
    responses = [data.response_text(example) + END for example in examples]

    @torch.no_grad()
    def alone(view):
        """Log probability of each response token, one example at a time, no padding, prompt and
        response tokenised as one string."""
        rows = []
        for example, response in zip(examples, responses):
            question = data.question_text(example)
            if view == "audio":
                wave = data.load_audio(example.audio).numpy()
                prompt = data.audio_prompt(tiny_processor, question)
                inputs = tiny_processor(
                    text=prompt + response, audio=wave, sampling_rate=16_000, return_tensors="pt"
                )
                tokens = student(response)["input_ids"]
            else:
                inputs = shifted_teacher(
                    data.text_prompt(shifted_teacher, example.description, question) + response,
                    return_tensors="pt",
                )
                tokens = shifted_teacher(response)["input_ids"]
            assert inputs["input_ids"][0, -len(tokens) :].tolist() == tokens
            logits = model(
                input_ids=inputs.pop("input_ids"),
                **{k: v for k, v in inputs.items() if k != "token_type_ids"},
            ).logits[0]
            rows.append(
                logits[-len(tokens) - 1 : -1]
                .log_softmax(-1)
                .gather(1, torch.tensor(tokens)[:, None])[:, 0]
            )
        return torch.cat(rows)  # [tokens]

    expected = {"audio": alone("audio"), "text": alone("text")}

    @torch.no_grad()
    def problems(batch) -> set[str]:
        found = set()
        for name, view, tokenizer in (
            ("audio", batch.audio, student),
            ("text", batch.text, shifted_teacher),
        ):
            ids, mask = view.inputs["input_ids"], view.inputs["attention_mask"].bool()
            predict, labels = [], torch.full_like(ids, -100)
            for row, response in enumerate(responses):  # the hand-written search
                wanted = tokenizer(response)["input_ids"]
                columns = mask[row].nonzero()[:, 0][-len(wanted) :]
                if ids[row, columns].tolist() != wanted:
                    found.add(f"{name}: response")
                labels[row, columns] = ids[row, columns]
                predict += (row * ids.shape[1] + columns - 1).tolist()
            if view.predict_positions.tolist() != predict:
                found.add(f"{name}: positions")
            if mask.int().diff(dim=1).max() > 0:  # 0 -> 1 somewhere: padding before a token
                found.add(f"{name}: padding")
            output = model(**view.inputs, labels=labels)
            gathered = output.logits.flatten(0, 1)[view.predict_positions]
            targets = ids.flatten()[view.predict_positions + 1]  # in this view's own numbering
            if name == "audio":
                if not torch.allclose(
                    cross_entropy(gathered, batch.labels), output.loss, atol=1e-5
                ):
                    found.add("audio: loss")
                if not torch.equal(labels_like_transformers(batch), labels):
                    found.add("audio: labels")
                if tiny_processor.audio_token_id in batch.labels:
                    found.add("audio: placeholder in a label")
                if (
                    view.audio_positions.tolist()
                    != (ids.flatten() == tiny_processor.audio_token_id).nonzero()[:, 0].tolist()
                ):
                    found.add("audio: audio positions")
            elif student.convert_ids_to_tokens(
                batch.labels.tolist()
            ) != tokenizer.convert_ids_to_tokens(targets.tolist()):
                found.add("text: another response")
            chosen = gathered.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            if chosen.shape != expected[name].shape or not torch.allclose(
                chosen, expected[name], atol=1e-4
            ):
                found.add(f"{name}: alone")
        return found

    return problems


# ---------------------------------------------------------------------------------------------
# The two views


def test_collate_is_right_by_every_check(make_batch, judge):
    assert judge(make_batch()) == set()


@pytest.mark.parametrize("view", ["audio", "text"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_planted_shift_by_one(make_batch, judge, view, shift):
    batch = make_batch()
    positions = (getattr(batch, view).predict_positions + shift).clamp(
        max=getattr(batch, view).inputs["input_ids"].numel() - 2
    )
    batch = replace(batch, **{view: replace(getattr(batch, view), predict_positions=positions)})
    assert {f"{view}: positions", f"{view}: alone"} <= judge(batch)
    assert ("audio: loss" if view == "audio" else "text: another response") in judge(batch)


def test_planted_dropped_end_token(make_batch, judge, monkeypatch):
    encode = data.encode_response
    monkeypatch.setattr(data, "encode_response", lambda *arguments: encode(*arguments)[:-1])
    with pytest.raises(data.DataError):  # collate itself notices
        make_batch()
    monkeypatch.undo()
    whole = make_batch()
    ends = (whole.labels == whole.labels[-1]).nonzero()[:, 0]
    assert len(ends) == len(whole.examples)  # one turn end for each example
    kept = torch.ones(len(whole.labels), dtype=torch.bool)
    kept[ends] = False
    cut = replace(
        whole,
        labels=whole.labels[kept],
        audio=replace(whole.audio, predict_positions=whole.audio.predict_positions[kept]),
        text=replace(whole.text, predict_positions=whole.text.predict_positions[kept]),
    )
    assert {
        "audio: positions",
        "audio: loss",
        "audio: labels",
        "audio: alone",
        "text: positions",
        "text: alone",
    } <= judge(cut)


def test_planted_left_padding(make_batch, judge, monkeypatch):
    pad = data.pad
    monkeypatch.setattr(data, "pad", lambda rows, tokenizer, side: pad(rows, tokenizer, "left"))
    found = judge(make_batch())
    assert {
        "audio: padding",
        "audio: positions",
        "audio: loss",
        "audio: alone",
        "text: padding",
        "text: positions",
        "text: alone",
    } <= found


def test_planted_placeholder_in_a_label(make_batch, judge, tiny_processor):
    batch = make_batch()
    batch.labels[3] = tiny_processor.audio_token_id
    assert {
        "audio: placeholder in a label",
        "audio: loss",
        "audio: labels",
        "text: another response",
    } <= judge(batch)


def test_planted_student_ids_in_the_text_view(make_batch, judge):
    batch = make_batch()
    last = batch.text.predict_positions[-1] + 1
    assert (
        batch.text.inputs["input_ids"].flatten()[last] != batch.labels[-1]
    )  # the turn end has two ids here
    batch.text.inputs["input_ids"].view(-1)[last] = batch.labels[-1]
    assert {"text: response", "text: another response"} <= judge(batch)


def test_planted_audio_positions(make_batch, judge):
    batch = make_batch()
    assert judge(
        replace(batch, audio=replace(batch.audio, audio_positions=batch.audio.audio_positions + 1))
    ) == {"audio: audio positions"}


def test_batch_contents(make_batch, examples, tiny_processor, shifted_teacher, tiny_student_model):
    batch = make_batch()
    assert batch.examples == examples
    assert set(batch.audio.inputs) == {
        "input_ids",
        "attention_mask",
        "position_ids",
        "input_features",
        "feature_attention_mask",
    }
    assert (
        set(batch.text.inputs) == {"input_ids", "attention_mask", "position_ids"}
        and len(batch.text.audio_positions) == 0
    )
    assert all(
        tensor.dtype == torch.int64
        for tensor in (batch.labels, batch.audio.predict_positions, batch.text.predict_positions)
    )
    per_row = (batch.audio.inputs["input_ids"] == tiny_processor.audio_token_id).sum(1).tolist()
    frames = [
        math.ceil(len(data.load_audio(example.audio)) / 160) for example in examples
    ]  # 100 mel frames a second
    assert per_row == [
        ((count - 1) // 2 + 1 - 2) // 2 + 1 for count in frames
    ]  # about 25 audio tokens a second
    assert "<think>\n\n</think>\n\n<THINK><PLANNING>" in shifted_teacher.decode(
        batch.text.inputs["input_ids"][0]
    )
    # the model hears: another clip, another output at the same positions (a processor called with
    # audios= would stay deaf)
    with torch.no_grad():
        heard = tiny_student_model(**batch.audio.inputs).logits
        quiet = torch.zeros_like(batch.audio.inputs["input_features"])
        silent = tiny_student_model(**{**batch.audio.inputs, "input_features": quiet}).logits
    assert not torch.allclose(heard, silent, atol=1e-3)


def test_to_moves_everything(make_batch):
    moved = make_batch().to("meta")
    tensors = [
        moved.labels,
        *(
            tensor
            for view in (moved.audio, moved.text)
            for tensor in (*view.inputs.values(), view.predict_positions, view.audio_positions)
        ),
    ]
    assert len(tensors) == 13 and all(tensor.device.type == "meta" for tensor in tensors)


def test_cord_uses_the_students_own_tokenizer_and_the_transcript(examples, tiny_processor):
    batch = data.collate(examples[:2], tiny_processor, tiny_processor.tokenizer, words="transcript")
    at = [
        view.inputs["input_ids"].flatten()[view.predict_positions + 1]
        for view in (batch.audio, batch.text)
    ]
    assert torch.equal(at[0], batch.labels) and torch.equal(at[1], batch.labels)
    assert "what is seven plus two\nWhat is seven" in tiny_processor.tokenizer.decode(
        batch.text.inputs["input_ids"][0]
    )


@torch.no_grad()
def test_audio_prefix_says_the_same_at_audio_positions(
    make_batch, tiny_student_model, tiny_processor
):
    whole = make_batch().audio
    prefix = data.audio_prefix(whole)
    ids = prefix.inputs["input_ids"]
    assert (ids[:, -1] == tiny_processor.audio_token_id).any() and ids.shape[1] < whole.inputs[
        "input_ids"
    ].shape[1]
    assert prefix.inputs["attention_mask"].shape == ids.shape and len(prefix.predict_positions) == 0
    assert (
        prefix.audio_positions.tolist()
        == (ids.flatten() == tiny_processor.audio_token_id).nonzero()[:, 0].tolist()
    )
    states = [
        tiny_student_model(**view.inputs, output_hidden_states=True).hidden_states
        for view in (whole, prefix)
    ]
    for full, short in zip(*states):
        full, short = (
            full.flatten(0, 1)[whole.audio_positions],
            short.flatten(0, 1)[prefix.audio_positions],
        )
        torch.testing.assert_close(full, short, atol=1e-5, rtol=1e-4)


def generate(model, inputs, tokens=6):
    ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def test_prompt_batch_generates_as_one_by_one(examples, tiny_processor, tiny_student_model):
    for how in ({}, {"view": "text", "words": "description"}, {"view": "text"}):
        alone = [
            generate(tiny_student_model, data.prompt_batch([example], tiny_processor, **how))[0]
            for example in examples
        ]
        inputs = data.prompt_batch(examples, tiny_processor, **how)
        assert (
            inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"].all()
        )  # left padding, and there is some
        assert generate(tiny_student_model, inputs) == alone
    prompt = tiny_processor.tokenizer.decode(inputs["input_ids"][1], skip_special_tokens=True)
    assert "Which sound?" in prompt and "knock" not in prompt  # without words: the question alone


def test_planted_right_padding_at_generation(
    examples, tiny_processor, tiny_student_model, monkeypatch
):
    alone = [
        generate(tiny_student_model, data.prompt_batch([example], tiny_processor))[0]
        for example in examples
    ]
    pad = data.pad
    monkeypatch.setattr(data, "pad", lambda rows, tokenizer, side: pad(rows, tokenizer, "right"))
    assert generate(tiny_student_model, data.prompt_batch(examples, tiny_processor)) != alone


# ---------------------------------------------------------------------------------------------
# Text

WORDS = strategies.text("aZ7 .,/&\n\u00e9\u6f22\U0001f3b5", max_size=12).map(
    lambda text: f"x{text}y"
)


@settings(max_examples=40, deadline=None)
@given(strategies.lists(WORDS, min_size=5, max_size=5), strategies.booleans())
def test_parse_response_reverses_response_text(parts, with_reasoning):
    reasoning = dict(zip(data.STAGES, parts)) if with_reasoning else None
    example = data.Example("i", None, "q", [], parts[4], "t", reasoning)
    assert data.parse_response(data.response_text(example)) == {
        **(reasoning or {}),
        "response": parts[4],
    }


def test_response_text_is_cotas(examples):
    assert data.response_text(examples[0]) == (
        "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A man asks.</CAPTION>"
        "<REASONING>7 + 2 = 9</REASONING>"
        "<SUMMARY>So nine.</SUMMARY></THINK><RESPONSE>nine</RESPONSE>"
    )
    assert data.response_text(examples[1]) == "<RESPONSE>knock</RESPONSE>"
    assert data.question_text(examples[0]) == "What is seven plus two?\nA. eight\nB. nine"
    assert (
        data.question_text(examples[1]) == "Which sound?"
        and data.question_text(examples[2]) == "A. up\nB. down\nC. none"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {"response": None}),
        ("just words", {"response": None}),
        ("<response> nine \n</Response> and more", {"response": "nine"}),
        (
            "<THINK>\n <PLANNING>p\n<CAPTION>c</CAPTION>\n</THINK><RESPONSE>a < b",
            {"planning": "p", "caption": "c", "response": "a < b"},
        ),
        ("<THINK><SUMMARY>s</THINK>", {"summary": "s", "response": None}),
        ("<RESPONSE></RESPONSE>", {"response": ""}),
        ("<RESPONSE>one</RESPONSE><RESPONSE>two</RESPONSE>", {"response": "one"}),
    ],
)
def test_parse_response_is_tolerant(text, expected):
    assert data.parse_response(text) == expected


def test_prompts_and_turn_end(tiny_processor, tiny_teacher_tokenizer):
    prompt = data.audio_prompt(tiny_processor, "Which?")
    assert prompt.count(tiny_processor.audio_token) == 1 and prompt.endswith(
        "Which?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = data.text_prompt(tiny_teacher_tokenizer, "a knock", "Which?")
    assert (
        prompt
        == "<|im_start|>user\na knock\nWhich?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    for tokenizer in (tiny_processor.tokenizer, tiny_teacher_tokenizer):
        assert data.turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids(END)
        ids = data.encode_response(tokenizer, "eight")
        assert tokenizer.decode(ids) == "eight" + END
    other = bpe(["</s>"], "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}")
    assert data.turn_end_id(other) == other.convert_tokens_to_ids("</s>")


SPACED = "{% for message in messages %}{{ message['content'] }} \n</s>{% endfor %}"
GLM = (
    # as GLM-ASR's: the next turn just begins
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_the_turns_end_is_a_special_token_whatever_stands_before_it():
    spaced = bpe(["<|endoftext|>", "</s>"], SPACED)
    assert data.turn_end_id(spaced) == spaced.convert_tokens_to_ids("</s>")
    assert data.encode_response(spaced, "eight")[-1] == spaced.convert_tokens_to_ids("</s>")


@pytest.mark.parametrize(
    "template",
    [
        GLM,
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        "{% for message in messages %}<|user|>{{ message['role'] }}<|user|>{% endfor %}",
    ],
)
def test_a_template_that_never_closes_a_turn_is_refused(template):
    with pytest.raises(
        data.DataError,
        match="closes an assistant's turn with no special token, "
        "so that nothing would say where an answer ends; use",
    ):
        data.turn_end_id(bpe(["<|endoftext|>", "<|user|>", "<|assistant|>"], template))


def test_the_placeholder_is_never_said_whatever_its_flag():
    words = bpe(["<|endoftext|>", "<|im_end|>"], SPACED)
    words.add_tokens(["<|AUDIO|>"])  # an ordinary added token: not special
    placeholder, end = words.convert_tokens_to_ids(["<|AUDIO|>", "<|im_end|>"])
    banned = data.control_ids(words, len(words) + 2, keep=[end], placeholder=placeholder)
    assert {
        placeholder,
        words.convert_tokens_to_ids("<|endoftext|>"),
        len(words),
        len(words) + 1,
    } == set(banned)
    # A placeholder behind the head's rows cannot be said, and is no row to ban
    assert max(data.control_ids(words, placeholder, placeholder=placeholder)) < placeholder


def test_shared_vocabulary(tiny_processor, tiny_teacher_tokenizer, shifted_teacher):
    student = tiny_processor.tokenizer
    for teacher in (tiny_teacher_tokenizer, shifted_teacher):
        student_ids, teacher_ids, summary = data.shared_vocabulary(student, teacher)
        expected = [
            (i, teacher.convert_tokens_to_ids(student.convert_ids_to_tokens(i)))
            for i in range(len(student))
            if student.convert_ids_to_tokens(i) in teacher.get_vocab()
        ]
        assert list(zip(student_ids.tolist(), teacher_ids.tolist())) == expected
        assert (
            summary["shared"]
            == len(expected)
            == len(student) - summary["only_student"]
            == len(teacher) - summary["only_teacher"]
        )
        assert summary["same_id_other_meaning"] == sum(
            teacher.convert_ids_to_tokens(i) != student.convert_ids_to_tokens(i)
            for i in range(len(student))
            if i < len(teacher)
        )
        assert tiny_processor.audio_token_id not in student_ids
    assert data.shared_vocabulary(student, tiny_teacher_tokenizer)[2] == {
        "shared": 333,
        "only_student": 3,
        "only_teacher": 3,
        "same_id_other_meaning": 3,
    }


def test_a_teacher_that_shares_too_little_is_refused(tiny_processor, tiny_teacher_tokenizer):
    with pytest.raises(data.DataError) as refused:
        data.shared_vocabulary(tiny_processor.tokenizer, tiny_teacher_tokenizer, minimum=0.995)
    assert "336 tokens) shares only 333 with the student's 336, under 99.5% of the smaller" in str(
        refused.value
    )
    assert "; choose one from its family" in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------
# Audio

FORMATS = [
    ("u8.wav", {"subtype": "PCM_U8"}),
    ("i16.wav", {}),
    ("i24.wav", {"subtype": "PCM_24"}),
    ("f32.wav", {"subtype": "FLOAT"}),
    ("f64.wav", {"subtype": "DOUBLE"}),
    ("a.flac", {}),
    ("a.ogg", {}),
    ("a.mp3", {}),
]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("name, options", FORMATS)
def test_formats(tmp_path, make_wav, name, options, rate):
    wave = data.load_audio(make_wav(tmp_path / name, 0.5, rate, channels=2, **options))
    assert wave.dtype == torch.float32 and wave.shape == (8_000,)
    tone = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(8_000) / 16_000)
    assert (wave - tone)[
        400:-400
    ].abs().max() < 0.05  # lossy formats included; one sample late would be 0.09


@pytest.mark.parametrize("rate", [1_000, 11_025, 22_050, 22_255, 44_101, 48_000, 192_000])
def test_any_rate(tmp_path, make_wav, rate):
    wave = data.load_audio(make_wav(tmp_path / "a.wav", 0.5, rate, frequency=200, subtype="FLOAT"))
    assert abs(len(wave) - 8_000) <= 1
    tone = 0.5 * torch.sin(2 * math.pi * 200 * torch.arange(len(wave)) / 16_000)
    assert (wave - tone)[400:-400].abs().max() < 0.002


def test_stereo_is_the_mean_of_the_channels(tmp_path):
    left = 0.5 * torch.sin(torch.arange(8_000) / 10)
    soundfile.write(
        tmp_path / "a.wav",
        torch.stack([left, torch.zeros(8_000)], 1).numpy(),
        16_000,
        subtype="FLOAT",
    )
    torch.testing.assert_close(data.load_audio(tmp_path / "a.wav"), left / 2)


def test_shortest_clip_has_one_audio_token(tmp_path, examples, tiny_processor):
    soundfile.write(tmp_path / "a.wav", torch.arange(321).sin().numpy(), 16_000)
    ids = data.prompt_batch([replace(examples[0], audio=tmp_path / "a.wav")], tiny_processor)[
        "input_ids"
    ]
    assert (ids == tiny_processor.audio_token_id).sum() == 1


def assert_one_sentence(refused, where):
    message = str(refused.value)
    assert (
        message.startswith(where) and "; " in message and "\n" not in message and len(message) < 500
    ), message


# ---------------------------------------------------------------------------------------------
# Manifests


def test_read_manifest(world):
    first, second, third, fourth = data.read_manifest(world)
    assert first == data.Example(
        "s0",
        world.parent.resolve() / "clips/0.wav",
        "What is seven plus two?",
        ["eight", "nine"],
        "nine",
        "speech",
        record(0)["reasoning"],
        record(0)["description"],
        record(0)["transcript"],
        "anna",
        "train",
        f"{world}:1",
    )
    assert (
        second.reasoning is None
        and second.choices == []
        and second.where == f"{world}:2"
        and third.question == ""
    )
    assert [example.id for example in data.read_manifest(world, split="train", limit=2)] == [
        "s0",
        "s2",
    ]
    assert data.check_audio([first, fourth]) == [1.0, 0.25]
    # what is required of the lines that are read: line 2 has no reasoning, but is in another split
    assert len(data.read_manifest(world, require=("reasoning", "description"), split="train")) == 3


def test_a_manifest_by_another_hand(tmp_path):
    """A byte order mark, blank lines, Windows line ends, unknown keys, null for what is absent."""
    line = record(
        0,
        extra=[1],
        choices=None,
        reasoning=None,
        split=None,
        question="caf\u00e9 \u2028 \U0001f3b5",
    )
    first, second = json.dumps(line, ensure_ascii=False), json.dumps(record(1))
    (tmp_path / "m.jsonl").write_bytes(f"\ufeff{first}\r\n\r\n{second}".encode())
    first, second = data.read_manifest(tmp_path / "m.jsonl")
    assert (
        first.question == line["question"]
        and first.choices == []
        and first.split is None
        and second.where.endswith("m.jsonl:3")
    )


STAGES = record(1)["reasoning"]
BAD_FIELDS = [  # what tests/rotten.py's lines do not hold already
    *[
        ({name: 7}, f"field '{name}' must be a string, not int")
        for name in ("audio", "question", "task", "transcript", "speaker", "split")
    ],
    *[({name: " "}, f"field '{name}' is empty") for name in ("id", "audio", "task")],
    *[
        ({"choices": choices}, "'choices' must be a list")
        for choices in ({"A": "nine"}, 0, ["nine"] * 27)
    ],
    ({"choices": ["nine", 9]}, "a choice must be a string, not int"),
    ({"choices": ["nine", ""]}, "a choice is empty"),
    ({"answer": "ten"}, r"answer 'ten' is not among the choices \['eight', 'nine'\]"),
    ({"reasoning": {**STAGES, "caption": ["x"]}}, "field 'caption' must be a string"),
    ({"reasoning": {**STAGES, "summary": None}}, "field 'summary' is missing or null"),
    ({"reasoning": {**STAGES, "caption": "</think> x"}}, "contains the tag </think>"),
]


@pytest.mark.parametrize("change, message", BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_fields(tmp_path, change, message):
    manifest = write(tmp_path / "m.jsonl", [record(0), record(1, **change), record(2)])
    for options in (
        {},
        {"limit": 1},
        {"split": "train"},
    ):  # the whole file is validated, whatever is asked for
        with pytest.raises(data.DataError, match=message) as refused:
            data.read_manifest(manifest, **options)
        assert_one_sentence(refused, f"{manifest}:2: ")


def test_nothing_to_read(tmp_path, world):
    with pytest.raises(data.DataError, match="no such manifest; check"):
        data.read_manifest(tmp_path / "missing.jsonl")
    with pytest.raises(data.DataError, match="is empty; write"):
        data.read_manifest(write(tmp_path / "m.jsonl", ["", " "]))
    with pytest.raises(
        data.DataError, match="no example is left for split 'dev' .* the splits test, train"
    ):
        data.read_manifest(world, split="dev")
    with pytest.raises(
        data.DataError,
        match="manifest.jsonl:1: id 's0' was already used at .*manifest.jsonl:1; give",
    ):
        data.read_manifests([world, world])
    with pytest.raises(
        data.DataError,
        match=r"manifest.jsonl:2: 'reasoning' is missing or empty and is needed here; add it",
    ):
        data.read_manifest(world, require=("reasoning",))
    (tmp_path / "latin.jsonl").write_bytes('{"id": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(data.DataError, match="latin.jsonl:1: the line is not JSON"):
        data.read_manifest(tmp_path / "latin.jsonl")


# ---------------------------------------------------------------------------------------------
# Bad input at collate


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": "so <|AUDIO|>"}, r"response contains the control token <\|AUDIO\|>"),
        (
            {"reasoning": dict.fromkeys(data.STAGES, f"a {END} b")},
            r"response contains the control token <\|im_end\|>",
        ),
        ({"question": "what is <|AUDIO|>?"}, "contains the audio placeholder"),
        ({"choices": ["nine", "<|AUDIO|>"]}, "contains the audio placeholder"),
        ({"description": "<|AUDIO|>"}, "contains the audio placeholder"),
        ({"description": None}, "'description' is missing or empty"),
    ],
)
def test_collate_refuses(examples, tiny_processor, tiny_teacher_tokenizer, change, message):
    with pytest.raises(data.DataError, match=message) as refused:
        data.collate(
            [examples[1], replace(examples[0], **change)], tiny_processor, tiny_teacher_tokenizer
        )
    assert_one_sentence(refused, examples[0].where)


def test_long_clips_are_cut_where_the_model_stops_hearing_and_counted_or_refused(
    tmp_path, make_wav, examples, tiny_processor
):
    long, short = (
        replace(examples[0], audio=make_wav(tmp_path / f"{seconds}.wav", seconds, rate=44_100))
        for seconds in (3.2, 3.0)
    )
    ids, features = data._audio_prompts([long, short], tiny_processor)
    assert ids[0] == ids[1] and ids[0].count(tiny_processor.audio_token_id) == 75
    assert features["feature_attention_mask"].sum(1).tolist() == [300, 300]
    torch.testing.assert_close(
        features["input_features"][0, :, :295],
        features["input_features"][1, :, :295],
        atol=0.02,
        rtol=0,
    )  # but for the cut edge
    line = about_clips([3.2, 3.0, 1.0], tiny_processor)
    assert line.startswith(
        "3 clips, 0.00 hours, longest 3.2 s; "
        "1 are longer than the 3 s that the model hears and are cut there"
    )
    assert "longer" not in about_clips([3.0, 1.0], tiny_processor)
    with pytest.raises(data.DataError, match="lasts 3.20 s, over the limit of 3 s"):
        check_clips([long], max_seconds=3)


def test_collate_refuses_a_teacher_without_the_words(examples, tiny_processor):
    student, special = tiny_processor.tokenizer, ["<|im_start|>", END]
    poor = bpe(special, TEACHER_TEMPLATE, SENTENCES[:1])  # knows few merges of the response's
    with pytest.raises(
        data.DataError, match="response's token .* is not in the teacher's vocabulary"
    ) as refused:
        data.collate(examples, tiny_processor, poor, student_to_teacher=id_map(student, poor))
    assert_one_sentence(refused, examples[0].where)
    other = bpe([END, "</s>"], STUDENT_TEMPLATE.replace(END, "</s>"))
    with pytest.raises(
        data.DataError, match="closes turns with another token than the student's; choose"
    ):
        data.collate(examples, tiny_processor, other, student_to_teacher=id_map(student, other))


# ---------------------------------------------------------------------------------------------
# The command


def test_check_command(world, tmp_path, monkeypatch, capsys):
    def check(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", "check", *map(str, arguments)])
        data.main()

    check(world)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{world}: 4 examples are valid, 0 have faults, 0 odd things"
    assert [line.split() for line in lines[3:]] == [
        ["sound", "1", "0.4", "0.4"],
        ["speech", "3", "1.4", "2.9"],
        ["together", "4", "1.1", "2.9"],
    ]
    with pytest.raises(SystemExit) as status:  # tests/test_rotten.py: every fault there is
        check(world, "--max-seconds", 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert status.value.code == 1 and [line.partition(": the audio")[0] for line in lines[:2]] == [
        f"fault: {world}:{number}" for number in (1, 3)
    ]
    assert lines[2] == f"{world}: 2 examples are valid, 2 have faults, 0 odd things"
    assert lines[-1].split() == ["together", "2", "0.3", "0.4"]
    for arguments, message in (
        ((tmp_path / "none.jsonl",), "there is no such manifest"),
        ((world, "--max-seconds", 0.1), "^1$"),
    ):
        with pytest.raises(SystemExit, match=message):
            check(*arguments)


def test_show_says_which_models_it_cannot_read(world, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    flags = ["--student", str(tmp_path / "nowhere")]
    monkeypatch.setattr(sys, "argv", ["data.py", "show", str(world), *flags])
    with pytest.raises(SystemExit, match="there is no processor or .*name the models' folders"):
        data.main()


def test_the_code_that_comes_with_a_tokenizer_is_not_run(world, tmp_path, monkeypatch):
    """Not even where somebody answers transformers' question with yes."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", None]}})
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unknown", "auto_map": {"AutoConfig": "trap.Trap"}})
    )
    (tmp_path / "trap.py").write_text(
        f"open({str(tmp_path / 'EXECUTED')!r}, 'w')\nclass Trap: pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for flag in ("--student", "--teacher"):
        flags = [flag, str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["data.py", "show", str(world), *flags])
        with pytest.raises(SystemExit, match="there is no processor or tokenizer"):
            data.main()
        assert not (tmp_path / "EXECUTED").exists()


# ---------------------------------------------------------------------------------------------
# The picture


def test_pack_is_what_its_docstring_draws(tiny_processor):
    view = data.pack(
        [[1, 2, 3], [4, 5]], [0, 0, 1], [[11, 12, 13], [21, 22], [31, 32]], tiny_processor.tokenizer
    )
    assert view.inputs["input_ids"][0].tolist() == [1, 2, 3, 11, 12, 13, 21, 22]
    assert view.inputs["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert view.predict_positions.tolist() == [2, 3, 4, 2, 6, 8 + 1, 8 + 2]
    sees = view.inputs["attention_mask"][0, 0]
    assert sees[5].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5] and sees[7].nonzero()[
        :, 0
    ].tolist() == [0, 1, 2, 6, 7]


def test_pack_takes_an_empty_response(tiny_processor):
    view = data.pack([[1, 2, 3]], [0, 0, 0], [[11], [], [31, 32]], tiny_processor.tokenizer)
    assert view.predict_positions.tolist() == [2, 2, 4]


def test_show_draws_both_views(
    world, examples, tiny_processor, shifted_teacher, tmp_path, monkeypatch, capsys
):
    """Row k of both columns predicts response token k; the clip's 25 placeholders are one line."""
    tiny_processor.save_pretrained(tmp_path / "student")
    shifted_teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "data.py",
            "show",
            str(world),
            "--id",
            "s0",
            "--student",
            str(tmp_path / "student"),
            "--teacher",
            str(tmp_path / "teacher"),
        ],
    )
    data.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and sum("<|AUDIO|> x 25" in line for line in lines) == 1
    rows = [line.split() for line in lines if "-->" in line]
    batch = data.collate(
        examples[:1],
        tiny_processor,
        shifted_teacher,
        student_to_teacher=id_map(tiny_processor.tokenizer, shifted_teacher),
    )
    assert [int(row[0]) for row in rows] == batch.audio.predict_positions.tolist()
    assert [int(row[-3]) for row in rows] == batch.text.predict_positions.tolist()
    assert [row[4] for row in rows] == [f"y{k + 1}" for k in range(len(batch.labels))]
    assert [row[2] for row in rows][1:] == [row[5] for row in rows][:-1] and rows[-1][
        5
    ] == "<|im_end|>"
    with pytest.raises(
        SystemExit, match="has no valid example with the id nobody; python data.py check"
    ):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "data.py",
                "show",
                str(world),
                "--id",
                "nobody",
                "--student",
                str(tmp_path / "student"),
            ],
        )
        data.main()


def test_the_committed_picture_is_what_show_prints(tmp_path, monkeypatch, capsys):
    """docs/two_views.txt, of the mini world's first example of sound."""
    import mini.world

    root = Path(__file__).parent.parent
    manifest = mini.world.build("train", per_task=16, tasks=["sound"], root=tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "data.py",
            "show",
            str(manifest),
            "--id",
            "train-sound-00000",
            "--student",
            str(root / "mini/student"),
            "--teacher",
            str(root / "mini/teacher"),
        ],
    )
    data.main()
    assert capsys.readouterr().out == (root / "docs/two_views.txt").read_text()


def test_import_data_is_light():
    """Nor may --help cost more than torch: whatever is slow is imported where it is used."""
    slow = "{'transformers', 'torchaudio', 'jinja2', 'soundfile'}"
    code = f"import sys, data, plumbing.check; print({slow} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert ran.stdout.strip() == "set()"
