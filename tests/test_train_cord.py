"""CORD's real script: its loss against formulas computed apart from it, rollouts, two processes
against one, killed against uninterrupted."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import soundfile
import torch

import data
import evaluate
import fused
import losses
import mini.world
import models
import rollout
import train_cord
from plumbing import ranks
from plumbing import run as plumbing_run
from rollout import Kind, Rollout
from train_cord import CordStep, main, micro_batches, parse_flags, reward

ROOT = Path(__file__).parent.parent


def write_spoken(folder, n=6, **changes):
    """A manifest of n spoken questions in the mini world's words. changes: keys to set in the
    second line (None: remove)."""
    lines = []
    for i in range(n):
        record = mini.world.make_record("speech", i, "spoken", 7)
        record["audio"] = f"{i}.wav"
        # a tone of its own for every clip in place of speech: nothing here depends on what is said,
        # and espeak keeps state between sentences
        tone = 0.3 * torch.sin(torch.arange(16_000 + 1600 * i) * (0.05 + 0.01 * i))
        soundfile.write(folder / record["audio"], tone.numpy(), 16_000)
        record = {key: value for key, value in record.items() if key not in ("recipe", "ctc")}
        if i == 1:
            record = {
                key: value for key, value in {**record, **changes}.items() if value is not None
            }
        lines.append(json.dumps(record))
    path = folder / "spoken.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_spoken(tmp_path_factory.mktemp("spoken"))


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def small_run(world, out, *more):
    return [
        "--data",
        str(world),
        "--out",
        str(out),
        "--no-eval",
        "--batch-size",
        "2",
        "--micro-batch",
        "4",
        "--max-steps",
        "4",
        "--max-new-tokens",
        "64",
        "--lr",
        "1e-3",
        *more,
    ]


# -------------------- rollouts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    return models.load_audio_model(mini.world.MINI / "student")


@pytest.fixture(scope="module")
def prompts(world, student):
    return data.encode_prompts(
        data.read_manifest(world)[:3], student[1], student[1].tokenizer, words="transcript"
    )


KINDS = [Kind(1.0, kl=True), Kind(3.0, group=True), Kind(3.0, group=True)]


def test_rollouts_are_the_same_alone_and_batched(student, prompts, world):
    together = rollout.roll_out(*student, prompts, KINDS, key="0 5", max_new_tokens=12)
    assert [r.row for r in together] == [0, 0, 0, 1, 1, 1, 2, 2, 2] and [
        r.temperature for r in together
    ] == [1.0, 3.0, 3.0] * 3
    assert len({tuple(r.ids) for r in together}) == 9  # every rollout has numbers of its own
    for n, e in enumerate(prompts.examples):
        alone = data.encode_prompts([e], student[1], student[1].tokenizer, words="transcript")
        assert [
            r.ids for r in rollout.roll_out(*student, alone, KINDS, key="0 5", max_new_tokens=12)
        ] == [r.ids for r in together if r.row == n]
    other = rollout.roll_out(*student, prompts, KINDS, key="0 6", max_new_tokens=12)
    assert all(a.ids != b.ids for a, b in zip(together, other))


def test_every_rollout_hears_its_own_clip(student, prompts):
    """Planted: nearly greedy rollouts of three clips must be what generate says to each clip alone;
    repeat instead of repeat_interleave fails."""
    cold = rollout.roll_out(
        *student, prompts, [Kind(1e-4, kl=True)] * 2, key="0", max_new_tokens=20
    )
    alone = evaluate.generate(
        *student, prompts.examples, temperature=0, max_new_tokens=20, progress=False
    )
    assert len(set(alone)) == 3
    assert [r.text for r in cold] == [text for text in alone for _ in range(2)]


def test_nothing_banned_is_ever_sampled_and_the_checkpoints_settings_do_not_count(student, prompts):
    model, processor = student
    banned = rollout.banned_ids(model, processor.tokenizer)
    vocabulary = processor.tokenizer.get_vocab()
    assert {vocabulary[t] for t in ("<|AUDIO|>", "<|audio_bos|>", "<|im_start|>")} <= set(
        banned
    ) and vocabulary["<|im_end|>"] not in banned
    hot = [Kind(50.0, kl=True)] * 8  # nearly uniform over the whole vocabulary
    free = rollout.roll_out(model, processor, prompts, hot, key="0", max_new_tokens=60)
    assert sum(len(r.ids) for r in free) > 500 and not {t for r in free for t in r.ids} & set(
        banned
    )
    assert len({t for r in free for t in r.ids}) > 200  # top_k = 50 of transformers is off
    settings = model.generation_config
    model.generation_config = type(settings)(top_k=1, repetition_penalty=5.0, temperature=0.1)
    try:
        again = rollout.roll_out(model, processor, prompts, hot, key="0", max_new_tokens=60)
    finally:
        model.generation_config = settings
    assert [r.ids for r in again] == [r.ids for r in free]


def test_a_rollout_ends_with_its_turns_end_or_at_the_limit(student, prompts):
    end = data.turn_end_id(student[1].tokenizer)
    for r in rollout.roll_out(*student, prompts, KINDS, key="1", max_new_tokens=70):
        assert (r.ids[-1] == end) != (len(r.ids) == 70 and end not in r.ids) and r.ids.count(
            end
        ) <= 1
        assert "<|im_end|>" not in r.text
        assert r.ended == (r.ids[-1] == end)


def test_a_rollout_that_ends_with_its_last_allowed_token_was_not_cut(student, prompts):
    free = rollout.roll_out(*student, prompts, KINDS[:1], key="1", max_new_tokens=70)[0]
    assert free.ended
    exact = rollout.roll_out(*student, prompts, KINDS[:1], key="1", max_new_tokens=len(free.ids))[0]
    assert exact.ids == free.ids and exact.ended
    short = rollout.roll_out(
        *student, prompts, KINDS[:1], key="1", max_new_tokens=len(free.ids) - 1
    )[0]
    assert short.ids == free.ids[:-1] and not short.ended


def test_the_cache_is_used_though_training_checkpoints_its_activations(student, prompts):
    """Gradient checkpointing switches transformers' cache off; while rolling out it is on again,
    and the prompt is run once for all rollouts."""
    model, processor = copy.deepcopy(student[0]), student[1]
    expected = [
        r.ids
        for r in rollout.roll_out(model, processor, prompts, KINDS, key="0", max_new_tokens=10)
    ]
    plumbing_run._checkpoint_activations(model)
    model.train()
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(tuple(named["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    assert [
        r.ids
        for r in rollout.roll_out(model, processor, prompts, KINDS, key="0", max_new_tokens=10)
    ] == expected
    hook.remove()
    longest = max(map(len, prompts.audio))
    assert (
        seen[0] == (3, longest - 1)
        and set(seen[1:]) == {(9, 1)}
        and model.training
        and all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    )


def test_nothing_deprecated_is_called(student, prompts):
    """Names that a later transformers drops: the cache's, and that of checkpointing."""
    model = copy.deepcopy(student[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        plumbing_run._checkpoint_activations(model)
        rollout.roll_out(model, student[1], prompts, KINDS, key="0", max_new_tokens=3)


def test_text_answers_are_cached_by_model_and_prompt(student, world, tmp_path, monkeypatch):
    model, processor = copy.deepcopy(student[0]), student[1]
    examples, path = data.read_manifest(world)[:3], tmp_path / "references.jsonl"
    how = dict(max_new_tokens=8, batch_size=2)
    first = rollout.text_answers(model, processor, examples[:2], path, **how)
    path.write_text(path.read_text() + '{"id": "cut off')  # a kill in the middle of a line
    calls, real = [], rollout.generate
    monkeypatch.setattr(
        rollout,
        "generate",
        lambda model, processor, rows, **more: (
            calls.extend(e.id for e in rows) or real(model, processor, rows, **more)
        ),
    )
    both = rollout.text_answers(model, processor, examples, path, **how)
    assert calls == [examples[2].id] and {i: both[i] for i in first} == first
    assert len(path.read_text().splitlines()) == 3
    said = real(
        model,
        processor,
        examples[:1],
        view="text",
        words="transcript",
        temperature=0,
        max_new_tokens=8,
        progress=False,
    )
    assert both[examples[0].id]["text"] == said[0]
    rollout.text_answers(
        model,
        processor,
        [dataclasses.replace(examples[0], transcript="another question"), examples[1]],
        path,
        **how,
    )
    assert calls[1:] == [examples[0].id]  # the same id, another question
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    rollout.text_answers(model, processor, examples[1:2], path, **how)
    assert calls[2:] == [examples[1].id]  # the same question, another model


def test_text_answers_have_a_batch_of_their_own(world, tmp_path, monkeypatch):
    """--text-batch at once, whatever --eval-batch is."""
    sizes, real = [], rollout.generate

    def generate(model, processor, rows, **more):
        if more.get("words") == "transcript":
            sizes.append((len(rows), more["batch_size"]))
        return real(model, processor, rows, **more)

    monkeypatch.setattr(rollout, "generate", generate)
    main(small_run(world, tmp_path, "--max-steps", "4", "--text-batch", "1", "--eval-batch", "7"))
    assert sizes[0] == (4, 1) and len(sizes) > 1 and {batch for _, batch in sizes} == {1}
    assert parse_flags([]).text_batch == 64


# -------------------- the loss -------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(world):
    """A student that has moved away from its frozen teacher, prompts, and scored rollouts of
    several kinds, in float64."""
    model, processor = models.load_audio_model(mini.world.MINI / "student", dtype=torch.float64)
    args = parse_flags(["--alpha", "3", "--beta", "2.5"])
    step = CordStep(model, torch.tensor(rollout.banned_ids(model, processor.tokenizer)), args)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.model.language_model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    prompts = data.encode_prompts(
        data.read_manifest(world)[:3], processor, processor.tokenizer, words="transcript"
    )
    prompts.features["input_features"] = prompts.features["input_features"].double()
    rollouts = rollout.roll_out(model, processor, prompts, KINDS, key="0 0", max_new_tokens=15)
    rollouts[0].ids = rollouts[0].ids[:1]  # T = 1
    for r, advantage in zip((r for r in rollouts if r.group), (0.75, -0.25, 0.0, 0.0, 0.5, -0.5)):
        r.advantage = advantage
    return model, processor, step, prompts, rollouts, args


N_KL, N_GROUP = 3, 6  # rollouts of the global batch


def total(step, batches, n_kl=N_KL):
    sums = dict.fromkeys(("loss", "token", "group"), 0.0)
    for batch in batches:
        loss, seen = step(batch, step.read(batch), n_kl, N_GROUP)
        sums["loss"] = sums["loss"] + loss
        sums["token"] = sums["token"] + seen["token"]
        sums["group"] = sums["group"] + seen["group"]
    return sums


@pytest.mark.parametrize("form", [fused.cord, losses.cord])
def test_a_gradient_arrives_from_every_term_that_is_on(everything, form, monkeypatch):
    """L_tok alone, L_seq alone, and both: their sum."""
    model, processor, step, prompts, rollouts, _ = everything
    monkeypatch.setattr(step, "cord", form)

    def gradient(kl, group):
        kept = [dataclasses.replace(r, kl=r.kl and kl, advantage=r.advantage * group)
                for r in rollouts]
        model.zero_grad()
        total(step, micro_batches(kept, prompts, processor, 9, "cpu"))["loss"].backward()
        return torch.cat([p.grad.flatten() for p in models.decoder(model).layers.parameters()])

    token, sequence, both = gradient(True, 0.0), gradient(False, 1.0), gradient(True, 1.0)
    assert token.norm() > 0 and sequence.norm() > 0
    # Rotary angles are float32 whatever the weights are, and round by the shape of the batch
    assert (both - token - sequence).norm() < 1e-6 * both.norm()
    model.zero_grad()


@pytest.mark.parametrize("form", [fused.cord, losses.cord])
def test_the_loss_is_the_papers_formula(everything, form, monkeypatch):
    """D_t, weights and log p again, one rollout at a time, unbatched, from transformers' own
    logits, with scipy."""
    model, processor, step, prompts, rollouts, args = everything
    monkeypatch.setattr(step, "cord", form)
    token = group = 0.0
    allowed = np.setdiff1d(
        np.arange(model.config.get_text_config().vocab_size),
        rollout.banned_ids(model, processor.tokenizer),
    )
    column = {int(token): k for k, token in enumerate(allowed)}
    teacher = models.load_audio_model(mini.world.MINI / "student", dtype=torch.float64)[0]
    with torch.no_grad():
        found = total(step, micro_batches(rollouts, prompts, processor, 4, "cpu"))
        for r in rollouts:
            n, features = (
                len(r.ids),
                {name: tensor[r.row : r.row + 1] for name, tensor in prompts.features.items()},
            )
            heard = (
                model(
                    input_ids=torch.tensor([prompts.audio[r.row] + r.ids]),
                    attention_mask=torch.ones(1, len(prompts.audio[r.row]) + n, dtype=torch.long),
                    **features,
                )
                .logits[0, -n - 1 : -1]
                .numpy()[:, allowed]
            )
            if r.kl:
                read = (
                    teacher(input_ids=torch.tensor([prompts.text[r.row] + r.ids]))
                    .logits[0, -n - 1 : -1]
                    .numpy()[:, allowed]
                )
                q, p = scipy.special.softmax(heard, -1), scipy.special.softmax(read, -1)
                d = scipy.special.rel_entr(q, p).sum(-1)  # KL(audio || text) [n]
                largest = np.argsort(-d, kind="stable")[: int(np.ceil(0.1 * n))]
                w = np.ones(n)
                w[largest] = 3
                w *= [2.5 - 1.5 * t / max(n - 1, 1) for t in range(n)]
                token += (w * d).sum() / 3
            if r.group:
                log_p = scipy.special.log_softmax(heard / r.temperature, -1)
                group -= r.advantage * sum(log_p[k, column[t]] for k, t in enumerate(r.ids)) / 6
    np.testing.assert_allclose(found["token"].item(), token, rtol=1e-6)
    np.testing.assert_allclose(found["group"].item(), group, rtol=1e-6)
    np.testing.assert_allclose(found["loss"].item(), token + group, rtol=1e-6)


def test_batches_of_any_size_add_up_to_the_same(everything):
    model, processor, step, prompts, rollouts, args = everything
    with torch.no_grad():
        sizes = [
            total(step, micro_batches(rollouts, prompts, processor, size, "cpu"))
            for size in (1, 2, 9)
        ]
    for other in sizes[1:]:
        for name in ("loss", "token", "group"):
            np.testing.assert_allclose(other[name].item(), sizes[0][name].item(), rtol=1e-9)


def test_rollouts_that_share_a_prompt_do_not_see_each_other(everything):
    """Packed behind one prompt, the losses and gradients of rollouts run one by one; and nothing
    changes for one when another changes."""
    model, processor, step, prompts, rollouts, args = everything
    ids = torch.randint(100, 300, (9, 7)).tolist()
    packed, rows = (
        data.audio_view(
            prompts,
            [0, 0, 0, 1, 2, 2],
            [ids[0], ids[1][:3], ids[2], ids[3], ids[4][:1], ids[5]],
            processor,
        ),
        [0, 0, 0, 1, 2, 2],
    )
    assert packed.inputs["input_ids"].shape[0] == packed.inputs["input_features"].shape[0] == 3

    def hidden(view):
        return model.model(**view.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[
            view.predict_positions
        ]

    with torch.no_grad():
        together = hidden(packed)
        alone = torch.cat(
            [
                hidden(data.audio_view(prompts, [row], [said], processor))
                for row, said in zip(rows, (ids[0], ids[1][:3], ids[2], ids[3], ids[4][:1], ids[5]))
            ]
        )
        other = hidden(
            data.audio_view(
                prompts, rows, [ids[0], ids[6][:3], ids[2], ids[3], ids[7][:1], ids[5]], processor
            )
        )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    changed = (together - other).abs().amax(-1) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [
        8,
        9,
    ]  # what stands behind the changed tokens; the first is predicted by the prompt

    gradients, both = (
        [],
        [dataclasses.replace(r, kl=True) for r in rollouts],
    )  # the text view is shared, too
    for size in (9, 1):  # all of a prompt in one row; one rollout a row
        batches = micro_batches(both, prompts, processor, size, "cpu")
        assert len(batches[0].text.inputs["input_ids"]) == (3 if size == 9 else 1)
        total(step, batches, n_kl=9)["loss"].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])
        )
        step.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[
        1
    ].norm()  # the norms of Qwen2 are float32 in any case


def test_a_shift_by_one_changes_both_terms(everything):
    model, processor, step, prompts, rollouts, args = everything
    (batch,) = micro_batches(rollouts, prompts, processor, 9, "cpu")
    with torch.no_grad():
        right = step(batch, step.read(batch), N_KL, N_GROUP)[1]
        batch.audio.predict_positions += 1
        wrong = step(batch, step.read(batch), N_KL, N_GROUP)[1]
    for name in ("token", "group"):
        assert abs(wrong[name] - right[name]) > 0.01 * abs(right[name]), name


def test_what_carries_no_gradient_is_not_run(everything):
    model, processor, step, prompts, rollouts, args = everything
    batches = micro_batches(rollouts, prompts, processor, 4, "cpu")
    assert sum(len(batch.labels) for batch in batches) == sum(
        len(r.ids) for r in rollouts if r.kl or r.advantage
    )
    assert sorted(batch.audio.inputs["input_ids"].shape[0] for batch in batches) == [
        1,
        2,
    ]  # of nine rollouts seven: 3 and 3 + 1, one prompt a row
    assert (
        sum(len(batch.text.inputs["input_ids"]) for batch in batches if batch.text) == 3
    )  # the teacher reads what carries the KL, nothing else
    silent = [r for r in rollouts if not r.kl and not r.advantage]
    (batch,) = micro_batches(
        silent, prompts, processor, 4, "cpu"
    )  # a rank with nothing to learn still takes part
    loss, seen = step(batch, step.read(batch), N_KL, N_GROUP)
    assert loss.item() == 0 and len(seen["kl"]) == 0 and batch.text is None
    loss.backward()
    assert all(
        p.grad is not None
        for name, p in step.named_parameters()
        if "language_model" in name or "lm_head" in name
    )
    step.zero_grad()


def test_only_decoder_and_projector_learn_and_the_teacher_does_not(everything):
    model, processor, step, prompts, rollouts, args = everything
    models.choose_trained(model, "decoder", list(model.parameters()))
    total(step, micro_batches(rollouts, prompts, processor, 9, "cpu"))["loss"].backward()
    got = {
        name for name, p in step.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert got == {
        name for name, p in step.named_parameters() if p.requires_grad
    }  # nothing that DDP would wait for in vain
    assert not any("audio_tower" in name for name in got) and any(
        "multi_modal_projector" in name for name in got
    )
    assert all(
        not p.requires_grad and p.grad is None
        for part in step.teacher.values()
        for p in part.parameters()
    )
    step.zero_grad()


def test_the_current_teacher_is_the_student_without_gradient(everything):
    model, processor, _, prompts, rollouts, _ = everything
    step = CordStep(
        model,
        torch.tensor(rollout.banned_ids(model, processor.tokenizer)),
        parse_flags(["--teacher", "current"]),
    )
    assert step.teacher == {"decoder": model.model.language_model, "head": model.lm_head}
    batch = micro_batches([r for r in rollouts if r.kl], prompts, processor, 9, "cpu")[0]
    read = step.read(batch)
    assert not read.requires_grad
    loss, _ = step(batch, read, N_KL, N_GROUP)
    loss.backward()
    with torch.no_grad():  # the same gradient as against constants
        target = model.lm_head(read)
    grad = model.lm_head.weight.grad.clone()
    step.zero_grad()
    last = model.model(**batch.audio.inputs).last_hidden_state.flatten(0, 1)[
        batch.audio.predict_positions
    ]
    kl = losses.token_divergence(
        *(
            model_logits.index_fill(-1, step.banned, losses.FLOOR)
            for model_logits in (model.lm_head(last), target)
        ),
        beta=1,
    )
    weight = losses.cord_weights(kl, [len(r.ids) for r in batch.kl_rollouts])
    ((weight * kl).sum() / 3).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, grad)
    step.zero_grad()


def noted_by_reward(rollouts, prompts, answers, verdicts):
    """What `reward` notes for the log: {name: (total, over)}."""
    notes = {}
    run = SimpleNamespace(note_mean=lambda name, total, over: notes.update({name: (total, over)}))
    reward(rollouts, prompts, answers, verdicts, run)
    return notes


def test_rewards_and_advantages(student, prompts):
    answers = {
        e.id: {"text": f"<RESPONSE>{e.choices[0]}</RESPONSE>", "ended": True}
        for e in prompts.examples
    }
    said = [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]  # which choice each rollout names
    rollouts = [
        Rollout(row, 1.5, False, True, [1, 2], f"The answer is {prompts.examples[row].choices[c]}")
        for row in range(3)
        for c in said[row]
    ]
    rollouts.insert(0, Rollout(0, 1.0, True, False, [1, 2], "whatever"))
    verdicts = train_cord.judge.load("rule", torch.device("cpu"))
    assert noted_by_reward(rollouts, prompts, answers, verdicts) == {
        "reward": (7.0, 12),
        "signal": (1, 3),
    }
    np.testing.assert_allclose(
        [r.advantage for r in rollouts[1:]], [0.25, -0.75, 0.25, 0.25] + [0] * 8
    )
    assert rollouts[0].advantage == 0
    assert noted_by_reward(rollouts[:1], prompts, answers, verdicts) == {}


def test_a_reference_that_was_cut_gives_no_reward(prompts):
    """Its rollouts are no part of the group loss, neither of its sum nor of its mean; the share is
    logged."""
    answers = {
        e.id: {"text": e.choices[0], "ended": row != 0} for row, e in enumerate(prompts.examples)
    }
    rollouts = [
        Rollout(row, 1.5, False, True, [1, 2], prompts.examples[row].choices[c])
        for row in range(3)
        for c in (0, 1)
    ]
    verdicts = train_cord.judge.load("rule", torch.device("cpu"))
    assert noted_by_reward(rollouts, prompts, answers, verdicts) == {
        "reward": (2, 4),
        "signal": (2, 2),
    }
    assert [r.group for r in rollouts] == [False, False] + [True] * 4 and [
        r.advantage for r in rollouts
    ] == [0, 0] + [0.5, -0.5] * 2
    for answer in answers.values():
        answer["ended"] = False
    rollouts = [
        Rollout(row, 1.5, False, True, [1, 2], prompts.examples[row].choices[0]) for row in range(3)
    ]
    assert noted_by_reward(rollouts, prompts, answers, verdicts) == {
        "reward": (0, 0),
        "signal": (0, 0),
    }
    assert not rollouts[0].group


def test_with_a_frozen_teacher_d_t_falls_on_a_fixed_batch(student, prompts):
    model, processor = copy.deepcopy(student[0]), student[1]
    models.choose_trained(model, "decoder", list(model.parameters()))
    step = CordStep(
        model,
        torch.tensor(rollout.banned_ids(model, processor.tokenizer)),
        parse_flags(["--group-size", "0"]),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    (batch,) = micro_batches(
        rollout.roll_out(model, processor, prompts, KINDS[:1], key="0", max_new_tokens=40),
        prompts,
        processor,
        9,
        "cpu",
    )
    history = []
    for _ in range(12):
        loss, seen = step(batch, step.read(batch), N_KL, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(seen["kl"].mean().item())
    assert history[-1] < 0.5 * history[0] and history[0] > 0.05


# -------------------- the loop -------------------------------------------------------------------

TERMS = (
    "loss",
    "token",
    "group",
    "kl",
    "entropy",
    "reward",
    "signal",
    "length",
    "at_limit",
    "grad_norm",
)


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    main(small_run(world, out, "--save-every", "2"))
    return out


def test_the_log_has_what_a_person_watches(one_process):
    log = log_of(one_process)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {
        *TERMS,
        "lr",
        "seconds_rollout",
        "seconds_scoring",
        "seconds_update",
        "rollout_tokens_per_second",
        "memory_gb",
    } <= log[0].keys()
    assert (
        log[0]["kl"] > 0
        and 0 < log[0]["length"] <= 64
        and 0 <= log[0]["at_limit"] < 1
    )
    samples = [
        json.loads(line) for line in (one_process / "samples.jsonl").read_text().splitlines()
    ]
    assert [s["step"] for s in samples] == [1, 1] and all(
        s["rollout"].count("[[") == 5 and s["verdict"] in ("right", "wrong") for s in samples
    )


def test_a_killed_run_goes_on_to_the_last_bit(world, one_process, tmp_path):
    shutil.copytree(one_process / "step-0000002", tmp_path / "step-0000002")
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log_of(one_process)[:3])
    )  # killed after step 3
    main(small_run(world, tmp_path, "--resume", "auto", "--save-every", "2"))
    for name in TERMS:
        assert [line[name] for line in log_of(tmp_path)] == [
            line[name] for line in log_of(one_process)
        ], name


@pytest.mark.parametrize(
    "row, terms, absent",
    [
        (["--token-loss", "sft", "--group-size", "0"], {"token"}, {"kl", "reward", "length"}),
        (
            ["--token-loss", "forward-kl", "--group-size", "0"],
            {"token", "kl"},
            {"reward", "length"},
        ),
        (
            ["--alpha", "1", "--beta", "1", "--group-size", "0"],
            {"token", "kl", "length"},
            {"reward"},
        ),
        (["--token-loss", "none"], {"reward", "signal"}, {"kl"}),
        (["--alpha", "1", "--beta", "1"], {"kl", "reward"}, set()),
        (["--teacher", "current", "--train", "all"], {"kl", "reward"}, set()),
    ],
)
def test_every_row_trains(world, tmp_path, row, terms, absent):
    main(small_run(world, tmp_path, "--max-steps", "1", *row))
    (line,) = log_of(tmp_path)
    assert (
        terms <= line.keys()
        and not absent & line.keys()
        and all(np.isfinite(line[name]) for name in terms)
    )
    assert (line["token"] != 0) == ("none" not in row)
    if {"sft", "forward-kl"} & {*row}:  # shown are the text view's own answers
        samples = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert "wrong" not in [json.loads(sample)["verdict"] for sample in samples]


def test_dry_run_of_everything(tmp_path):
    """The default run's own path, synthesis and evaluation included, as a newcomer would try it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_cord.py"), "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for when in ("before", "after"):
        assert all(0 <= results[when][name] <= 100 for name in ("text_accuracy", "audio_accuracy"))
        assert results[when]["gap"] == pytest.approx(
            results[when]["text_accuracy"] - results[when]["audio_accuracy"]
        )
        assert {"aqa", "ser"} <= results[when]["elsewhere"].keys()
    assert "gap_reduction_percent" in results and (tmp_path / "run.png").stat().st_size > 10_000
    assert (
        "[[" in done.stdout
        and "rollout_tokens_per_second" in done.stdout
        and "gold answer" in done.stdout
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (
                ["--token-loss", "forward-kl", "--group-size", "0"],
                ["--token-loss", "sft", "--group-size", "0"],
            )
        ),
    ],
    ids=["cord", "forward-kl", "sft"],
)
def test_the_fused_loss_trains_as_the_formulas_do(world, tmp_path, flags):
    """Three steps, float32: rollouts to the token, losses to a relative 1e-4."""
    logs = []
    for form in ("fused", "reference"):
        main(
            small_run(
                world,
                tmp_path / form,
                *flags,
                "--max-steps",
                "3",
                "--micro-batch",
                "3",
                "--lr",
                "3e-4",
                "--loss",
                form,
            )
        )
        logs.append(log_of(tmp_path / form))
    timing = ("seconds", "rollout_tokens_per_second", "memory_gb", "host_gb")
    for ours, reference in zip(*logs):
        assert ours.keys() == reference.keys() and ours.get("length") == reference.get("length")
        for name, value in reference.items():
            assert name.startswith(timing) or ours[name] == pytest.approx(
                value, rel=1e-4, abs=1e-6
            ), (reference["step"], name)
    assert len(logs[0]) == 3 and logs[0][-1]["loss"] != logs[0][0]["loss"]


@pytest.mark.slow
def test_16_bit_weights_train_save_and_go_on(world, tmp_path):
    flags = ["--weights", "bfloat16", "--lr", "3e-4", "--save-every", "2"]
    main(small_run(world, tmp_path / "a", *flags))
    main(small_run(world, tmp_path / "b", *flags, "--resume", str(tmp_path / "a" / "step-0000002")))
    whole, rest = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert [line["loss"] for line in rest] == [line["loss"] for line in whole[2:]] and whole[0][
        "kl"
    ] > 0
    main(small_run(world, tmp_path / "exact", "--lr", "3e-4", "--max-steps", "1"))
    assert whole[0]["kl"] == pytest.approx(log_of(tmp_path / "exact")[0]["kl"], rel=0.2)


def test_a_cast_keeps_the_rotary_frequencies():
    """Rounded to bfloat16 they would turn long positions into others."""
    model = models.load_audio_model(mini.world.MINI / "student")[0]
    exact = model.model.language_model.rotary_emb.inv_freq.clone()
    models.cast(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.equal(
        model.model.language_model.rotary_emb.inv_freq, exact
    )
    loaded = models.load_audio_model(mini.world.MINI / "student", dtype=torch.bfloat16)[0]
    ids = torch.randint(5, 300, (1, 900))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
        wrong = (
            model.to(torch.float32).to(torch.bfloat16)(input_ids=ids).logits
        )  # the planted error
    assert not torch.equal(wrong, loaded(input_ids=ids).logits)
    step = CordStep(models.cast(loaded, torch.bfloat16), torch.tensor([0]), parse_flags([]))
    assert torch.equal(step.teacher["decoder"].rotary_emb.inv_freq, exact)


def test_another_rate_counts_after_a_resume(world, one_process, tmp_path):
    shutil.copytree(one_process / "step-0000002", tmp_path / "step-0000002")
    main(small_run(world, tmp_path, "--resume", "auto", "--lr", "1e-5"))
    assert [line["lr"] for line in log_of(tmp_path)] == pytest.approx(
        [line["lr"] / 100 for line in log_of(one_process)[2:]]
    )


def test_a_folder_holds_one_run(world, one_process, tmp_path, capsys):
    """A second run does not mix with a real one, what a dry run left goes, and an evaluation of
    other questions is not taken for this run's."""
    shutil.copytree(one_process, tmp_path / "run")
    with pytest.raises(SystemExit, match="already holds checkpoints, the newest step-"):
        main(small_run(world, tmp_path / "run"))
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dry_run": True}))
    (tmp_path / "run" / "eval-0000001.json").write_text("{}")
    main(small_run(world, tmp_path / "run", "--max-steps", "1", "--resume", "auto"))
    assert sorted(path.name for path in (tmp_path / "run").glob("*-0*")) == ["step-0000001"]
    with pytest.raises(SystemExit):         # or the next run would clear a real run's checkpoints
        main(small_run(world, tmp_path / "run", "--resume", "auto", "--dry-run"))
    assert "--dry-run starts from nothing" in capsys.readouterr().err
    assert not json.loads(config.read_text())["dry_run"]
    assert (tmp_path / "run" / "step-0000001").exists()
    with pytest.raises(SystemExit, match="already holds checkpoints"):  # resumed from elsewhere
        main(small_run(world, tmp_path / "run", "--resume", str(one_process / "step-0000002")))


# -------------------- bad input ------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--group-size", "1"], "at least 2"),
        (["--token-loss", "none", "--group-size", "0"], "nothing is learnt"),
        (["--temperature", "0"], "above 0"),
        (["--token-loss", "sft"], "--group-size 0"),
        (["--top-share", "2"], "between 0 and 1"),
        (["--micro-batch", "0"], "at least 1"),
    ],
)
def test_flags_that_make_no_sense(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse_flags(flags)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"transcript": None}, "'transcript' is missing"),
        ({"audio": "gone.wav"}, "does not exist"),
        ({"audio": None}, "'audio' is missing"),
    ],
)
def test_a_bad_line_stops_the_run_before_training(tmp_path, changes, words):
    path = write_spoken(tmp_path, n=3, **changes)
    with pytest.raises(data.DataError, match=words) as error:
        main(small_run(path, tmp_path / "out"))
    assert "spoken.jsonl:2" in str(error.value) and not (tmp_path / "out" / "log.jsonl").exists()


def test_models_and_ranks_that_do_not_fit(world, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="cannot load a causal language model"):
        main(small_run(world, tmp_path, "--judge", str(tmp_path / "nowhere")))
    monkeypatch.setattr(ranks, "start_distributed", lambda: (0, 4, torch.device("cpu")))
    with pytest.raises(SystemExit, match="--batch-size 2 is no multiple of the 4 ranks"):
        main(small_run(world, tmp_path))


def test_references_that_were_cut_are_said(world, tmp_path, capsys):
    main(small_run(world, tmp_path, "--max-new-tokens", "3", "--max-steps", "3"))
    said = capsys.readouterr().out
    assert "answers were cut at --max-new-tokens 3: no group reward for their prompts" in said
    line = log_of(tmp_path)[0]
    assert line["at_limit"] > 0.5 and "signal" not in line
    assert line["group"] == 0 and "reward" not in line
