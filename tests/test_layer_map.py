"""layer_map.py: the map by hand-made lists, the tap against transformers' own hidden states, the
projections against a planted map.

The models are the real architectures, tiny and with random weights. Where a silent error lives it
is planted, and must be caught.
"""

import copy
import weakref

import numpy as np
import pytest
import sklearn.preprocessing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import layer_map
import losses
from layer_map import Projections, Statistics, Tap, pairs

AUDIO = 7  # the audio placeholder's id in the tiny models


# --------------------------------------------------------------------------------------------------
# the map


def test_the_papers_map():
    assert pairs(28, 36, every=7) == [(7, 9), (14, 18), (21, 27), (28, 36)]
    layerwise = pairs(28, 36)
    assert (
        len(layerwise) == 28
        and layerwise[:5] == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 6)]
        and layerwise[-1] == (28, 36)
    )
    assert pairs(28, 36, every=14) == [(14, 18), (28, 36)]
    assert pairs(28, 36, every=3)[:2] == [(1, 1), (4, 5)] and pairs(28, 36, every=3)[-1] == (28, 36)
    assert pairs(7, 9) == [
        (1, 1),
        (2, 3),
        (3, 4),
        (4, 5),
        (5, 6),
        (6, 8),
        (7, 9),
    ]  # the mini world has the same shape
    assert pairs(7, 9, every=14) == [(7, 9)]
    assert pairs(6, 3) == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 3),
        (6, 3),
    ]  # halves round up: 1.5 -> 2, 2.5 -> 3
    assert pairs(28, 4)[0] == (1, 1)  # 1/7 rounds to the embeddings: layer 1 instead
    assert pairs(28, 36, every=7, only=[21, 7]) == [(7, 9), (21, 27)]
    assert pairs(28, 36, only=range(1, 4)) == layerwise[:3]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 30))
def test_properties_of_the_map(students, teachers, every):
    found = pairs(students, teachers, every)
    left, right = zip(*found)
    assert found[-1] == (students, teachers)
    assert all(b - a == every for a, b in zip(left, left[1:])) and 1 <= left[0] <= every
    assert list(right) == sorted(right) and right[0] >= 1
    assert all(abs(t - s * teachers / students) <= 0.5 or t == 1 for s, t in found)
    if students == teachers:
        assert left == right


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 36),
        (28, 0),
        (28, 36, 0),
        (8, 9, -7),
        (28, 36, 7, [8]),
        (28, 36, 7, [7, 29]),
        (28, 36, 7, []),
    ],
)
def test_impossible_maps_are_refused(arguments):
    with pytest.raises(ValueError):
        pairs(*arguments)


# --------------------------------------------------------------------------------------------------
# tiny models


def text_model():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=280,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        model.model.norm.weight.uniform_(
            0.5, 2
        )  # as after training: at its initial 1 the final norm would be harder to notice
    return model.eval()


def audio_model():
    torch.manual_seed(0)
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config=dict(
                model_type="qwen2_audio_encoder",
                num_mel_bins=16,
                d_model=32,
                encoder_layers=2,
                encoder_attention_heads=2,
                encoder_ffn_dim=48,
                max_source_positions=100,
            ),
            text_config=dict(
                model_type="qwen2",
                vocab_size=280,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
            ),
            audio_token_index=AUDIO,
        )
    ).eval()


def text_inputs(seed=0):
    ids = torch.randint(10, 280, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # the second row is shorter: right padding
    return dict(input_ids=ids, attention_mask=mask), dict(
        response=torch.tensor([4, 5, 6, 7, 12, 13])
    )


def audio_inputs():
    """Two clips of 80 and 48 mel frames: 20 and 12 audio tokens."""
    frames, tokens = [80, 48], [20, 12]
    mel_mask, ids, mask = (
        torch.zeros(2, 200, dtype=torch.int64),
        torch.full((2, 30), 9),
        torch.zeros(2, 30, dtype=torch.int64),
    )
    for row in range(2):
        mel_mask[row, : frames[row]] = 1
        ids[row, 1 : 1 + tokens[row]] = AUDIO
        ids[row, 1 + tokens[row] : tokens[row] + 8] = torch.arange(20, 27)
        mask[row, : tokens[row] + 8] = 1
    inputs = dict(
        input_ids=ids,
        attention_mask=mask,
        feature_attention_mask=mel_mask,
        input_features=torch.randn(2, 16, 200, generator=torch.Generator().manual_seed(1)),
    )
    response = torch.cat(
        [row * 30 + torch.arange(tokens[row] + 3, tokens[row] + 7) for row in range(2)]
    )
    return inputs, dict(response=response, audio=(ids.flatten() == AUDIO).nonzero()[:, 0])


def check_against_transformers(hidden, model, decoder, inputs, positions):
    """Every inner layer must equal transformers' hidden state; the last one must become it, and the
    logits, through the final norm."""
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    last = len(decoder.layers)
    for name, layers in hidden.items():
        for layer, got in layers.items():
            got = got if layer < last else decoder.norm(got)
            torch.testing.assert_close(got, out.hidden_states[layer].flatten(0, 1)[positions[name]])
            if layer == last:
                torch.testing.assert_close(
                    model.lm_head(got), out.logits.flatten(0, 1)[positions[name]]
                )


# --------------------------------------------------------------------------------------------------
# the tap


def test_tap_is_transformers_hidden_state_before_the_final_norm():
    model = text_model()
    inputs, positions = text_inputs()
    tap = Tap(model.model.layers, {"response": [1, 3, 4]})
    with torch.no_grad(), tap.at(**positions) as hidden:
        model(**inputs)
    assert sorted(hidden["response"]) == [1, 3, 4] and hidden["response"][3].shape == (6, 32)
    check_against_transformers(hidden, model, model.model, inputs, positions)

    with torch.no_grad():
        states = [
            state.flatten(0, 1)[positions["response"]]
            for state in model(**inputs, output_hidden_states=True).hidden_states
        ]
    planted = {
        "after the final norm": {4: states[-1]},
        "off by one layer": {3: states[2]},
        "the layer's input, not output": {1: states[0]},
        "one position late": {3: torch.roll(states[3], 1, 0)},
    }
    for wrong in planted.values():
        with pytest.raises(AssertionError):
            check_against_transformers({"response": wrong}, model, model.model, inputs, positions)


def test_tap_on_an_audio_model_at_two_kinds_of_positions():
    model = audio_model()
    inputs, positions = audio_inputs()
    tap = Tap(model.model.language_model.layers, {"response": [2, 4], "audio": range(1, 5)})
    with torch.no_grad(), tap.at(**positions) as hidden:
        model(**inputs)
    assert sorted(hidden["response"]) == [2, 4] and sorted(hidden["audio"]) == [1, 2, 3, 4]
    assert hidden["response"][2].shape == (8, 32) and hidden["audio"][1].shape == (32, 32)
    check_against_transformers(hidden, model, model.model.language_model, inputs, positions)


def test_tap_takes_tuples_and_no_positions():
    class Tuple(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), "cache"

    layers = torch.nn.ModuleList([Tuple(3, 3), torch.nn.Linear(3, 3)])
    x = torch.randn(2, 4, 3)
    with Tap(layers, {"some": [1, 2], "none": [2]}).at(
        some=torch.tensor([5]), none=torch.tensor([], dtype=torch.int64)
    ) as hidden:
        first, _ = layers[0](x)
        second = layers[1](first)
    torch.testing.assert_close(hidden["some"], {1: first[1, 1][None], 2: second[1, 1][None]})
    assert hidden["none"][2].shape == (0, 3) and hidden["none"][2].requires_grad
    assert losses.hidden_jsd(hidden["none"][2], torch.zeros(0, 3)) == 0


def test_tap_keeps_only_what_was_asked_for():
    model = text_model()
    inputs, positions = text_inputs()
    tap = Tap(model.model.layers, {"response": [2, 4]})
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(weakref.ref(output))
        )
    with torch.no_grad(), tap.at(**positions) as hidden:
        model(**inputs)
    assert len(outputs) == 4 and all(
        output() is None for output in outputs
    )  # the full [batch, seq, hidden] are gone
    assert all(
        kept.untyped_storage().nbytes() == 6 * 32 * 4 for kept in hidden["response"].values()
    )
    model(**inputs)  # outside of `at` nothing happens
    assert sorted(hidden["response"]) == [2, 4] and tap.now is None


def gradients(model, decoder, views, checkpointing, **kwargs):
    """All views forward, THEN one backward of a loss on tapped states and logits: checkpointing
    must keep its recomputations apart."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable(kwargs or None)  # None: transformers' default
    groups = {name: [2, 4] for name in views[0][1]}
    tap = Tap(decoder(model).layers, groups)
    loss = 0
    for index, (inputs, positions) in enumerate(views):
        with tap.at(**positions) as hidden:
            logits = model(**inputs).logits
            for name, layers in hidden.items():  # noqa: B007
                for number, kept in layers.items():
                    loss = loss + (index + number) * kept.square().mean()
            loss = loss + logits.flatten(0, 1)[positions["response"]].square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "early_stop", [True, False]
)  # False: the recomputation runs to the very end of the layer, hooks included
def test_checkpointing_gives_the_same_gradients(early_stop):
    first, second = text_inputs(), text_inputs(seed=1)
    second[1]["response"] = torch.tensor(
        [0, 3, 10]
    )  # other positions, and another number of them, than in the first forward
    decoder = lambda m: m.model
    plain = gradients(text_model(), decoder, [first, second], checkpointing=False)
    assert len(plain) == len(list(text_model().parameters()))
    with set_checkpoint_early_stop(early_stop):
        torch.testing.assert_close(
            gradients(text_model(), decoder, [first, second], True, use_reentrant=False), plain
        )
    # transformers' own hidden states give the same: the tap's gradient is the right one, not only
    # the same twice
    model = text_model().train()
    loss = 0
    into_norm = []
    model.model.norm.register_forward_pre_hook(lambda module, args: into_norm.append(args[0]))
    for index, (inputs, positions) in enumerate([first, second]):
        out = model(**inputs, output_hidden_states=True)
        for weight, states in [
            (index + 2, out.hidden_states[2]),
            (index + 4, into_norm[-1]),
            (1, out.logits),
        ]:
            loss = loss + weight * states.flatten(0, 1)[positions["response"]].square().mean()
    loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, plain)


def test_checkpointing_on_an_audio_model_with_transformers_default():
    views, decoder = [audio_inputs()], lambda m: m.model.language_model
    plain = gradients(audio_model(), decoder, views, checkpointing=False)
    torch.testing.assert_close(gradients(audio_model(), decoder, views, checkpointing=True), plain)


def test_reentrant_checkpointing_is_refused():
    """Around a layer with its hooks: they run without gradient."""
    layer, x = torch.nn.Linear(3, 3), torch.randn(2, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        with Tap([layer], {"some": [1]}).at(some=torch.tensor([0])):
            checkpoint(layer, x, use_reentrant=True)


def test_reentrant_checkpointing_of_transformers_is_refused_or_right():
    """5.17 has the hooks inside the checkpoint, where the tap refuses; 5.24 has them outside."""
    plain = gradients(text_model(), lambda m: m.model, [text_inputs()], checkpointing=False)
    try:
        found = gradients(
            text_model(), lambda m: m.model, [text_inputs()], True, use_reentrant=True
        )
    except RuntimeError as error:
        assert "use_reentrant=False" in str(error)
    else:
        torch.testing.assert_close(found, plain)


def test_a_frozen_model_in_training_mode_may_run_without_gradient():
    model = text_model().train().requires_grad_(False)
    inputs, positions = text_inputs()
    with Tap(model.model.layers, {"response": [4]}).at(**positions) as hidden, torch.no_grad():
        model(**inputs)
    assert not hidden["response"][4].requires_grad


def test_tap_refuses_misuse():
    model = text_model()
    inputs, positions = text_inputs()
    for layers in ([0], [5], [2, 5]):
        with pytest.raises(ValueError, match="layers 1 to 4"):
            Tap(model.model.layers, {"response": layers})
    tap = Tap(model.model.layers, {"response": [2]})
    for wrong in (
        {},
        dict(audio=positions["response"]),
        dict(positions, audio=positions["response"]),
    ):
        with pytest.raises(ValueError, match="response"):
            with tap.at(**wrong):
                pass
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="did not run"):
            with tap.at(**positions):
                pass
        with pytest.raises(RuntimeError, match="twice"):
            with tap.at(**positions):
                model(**inputs)
                model(**inputs)
        with pytest.raises(
            ZeroDivisionError
        ):  # the block's own error comes through, and the tap is free again
            with tap.at(**positions):
                1 / 0  # noqa: B018
        with tap.at(**positions) as hidden:
            copy.deepcopy(model)(**inputs)  # a copy (the snapshot) is not tapped
            model(**inputs)
    assert hidden["response"][2].shape == (6, 32)


def test_a_hook_that_gathers_naively_would_fail_under_checkpointing():
    """Why the tap hides its gather: a plain one saves its positions on the first run and, after the
    block, not on the second."""
    layer, x, now = (
        torch.nn.Linear(3, 3),
        torch.randn(1, 5, 3, requires_grad=True),
        [torch.tensor([1, 2])],
    )
    kept = []
    layer.register_forward_hook(
        lambda module, args, output: kept.append(output.flatten(0, 1)[now[0]]) if now else None
    )
    y = checkpoint(layer, x, use_reentrant=False)
    now.clear()
    with pytest.raises(CheckpointError):
        (kept[0].sum() + y.square().sum()).backward()


# --------------------------------------------------------------------------------------------------
# projections and statistics


def planted(tokens, student_width=12, teacher_width=20, outlier=300.0):
    """Student features of very unequal size, a linear map, and the teacher's features that follow
    from it."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(tokens, student_width, generator=generator)
    student[:, 4] = outlier + 20 * student[:, 4]
    weight = torch.randn(teacher_width, student_width, generator=generator)
    return student, student @ weight.T, weight


def test_fit_recovers_a_planted_map():
    student, teacher, weight = planted(8000)
    projections = Projections([(7, 9), (14, 18)], 12, 20)
    projections.fit(1, student, teacher)
    torch.testing.assert_close(projections.weights[1].detach(), weight, rtol=0, atol=3e-3)
    torch.testing.assert_close(
        projections(1, student), teacher, rtol=1e-3, atol=0.2
    )  # of a teacher with std around 20
    assert (
        losses.hidden_jsd(
            projections(1, student), teacher, mean=projections.mean[1], std=projections.std[1]
        )
        < 1e-6
    )

    scaler = sklearn.preprocessing.StandardScaler().fit(teacher.double().numpy())
    np.testing.assert_allclose(projections.mean[1], scaler.mean_, rtol=1e-5)
    np.testing.assert_allclose(projections.std[1], scaler.scale_, rtol=1e-5)
    assert torch.equal(projections.weights[0], torch.eye(20, 12))  # the other pair is untouched
    assert (projections.mean[0] == 0).all() and (projections.std[0] == 1).all()
    assert [tuple(weight.shape) for weight in projections.parameters()] == [
        (20, 12)
    ] * 2  # trained: W alone, [teacher, student]


def test_fit_against_numpy_least_squares():
    student, teacher, _ = planted(5000)
    teacher = teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(4))
    projections = Projections([(1, 1)], 12, 20)
    projections.fit(0, student.bfloat16(), teacher)  # 16-bit hidden states are fine
    want = np.linalg.lstsq(
        student.bfloat16().double().numpy(), teacher.double().numpy(), rcond=None
    )[0].T
    np.testing.assert_allclose(projections.weights[0].detach(), want, atol=0.02)


def test_the_ridge_keeps_a_small_batch_from_fitting_noise():
    """As many tokens as features, where plain least squares interpolates: judge both on new
    tokens."""
    student, teacher, _ = planted(200, student_width=100, teacher_width=120)
    noisy = teacher + teacher.std(0) * torch.randn(
        teacher.shape, generator=torch.Generator().manual_seed(4)
    )
    projections = Projections([(1, 1)], 100, 120)
    projections.fit(0, student[:100], noisy[:100])
    error = lambda w: (
        ((student[100:] @ w.T - teacher[100:]) / teacher.std(0)).square().mean()
    ).item()
    plain = torch.linalg.lstsq(student[:100].double(), noisy[:100].double()).solution.T.float()
    assert error(projections.weights[0].detach()) < 1.5 < 10 < error(plain)


def test_a_fitted_start_is_far_from_the_bound_and_a_random_one_is_not():
    student, teacher, _ = planted(2000, outlier=30.0)
    projections = Projections([(1, 1)], 12, 20)
    projections.fit(0, student, teacher)
    against = lambda hidden: losses.hidden_jsd(
        hidden, teacher, mean=projections.mean[0], std=projections.std[0]
    ).item()
    random = torch.randn(20, 12, generator=torch.Generator().manual_seed(9))
    assert against(projections(0, student)) < 1e-4 < 0.3 < against(student @ random.T)


def test_equal_widths_of_two_models_start_far_from_chance():
    """Two decoders of one width that share no base: the identity would say no more of a token than
    of any other."""
    ids = torch.randint(10, 40, (64, 24), generator=torch.Generator().manual_seed(7))
    first = text_model()
    second = Qwen3ForCausalLM(first.config).eval()  # drawn after the first: other weights
    states = []
    for model in (first, second):
        with (
            torch.no_grad(),
            Tap(model.model.layers, {"all": [4]}).at(all=torch.arange(ids.numel())) as hidden,
        ):
            model(input_ids=ids)
        states.append(hidden["all"][4])
    student, teacher = states  # [1536, 32] each, of the same tokens
    projections = Projections([(4, 4)], 32, 32)
    projections.fit(0, student[:1024], teacher[:1024])
    mean, std = projections.mean[0], projections.std[0]
    against = lambda hidden: losses.hidden_jsd(hidden, teacher[1024:], mean=mean, std=std).item()
    fitted = projections(0, student[1024:]).detach()  # tokens that the fit has not seen
    shuffled = fitted[torch.randperm(len(fitted), generator=torch.Generator().manual_seed(8))]
    assert against(fitted) < 0.5 * against(shuffled)
    assert against(student[1024:]) > 0.9 * against(
        student[1024:].roll(1, 0)
    )  # what the identity would be: chance
    torch.testing.assert_close(mean, teacher[:1024].mean(0))


def test_projection_learns_and_its_target_does_not():
    student, teacher, _ = planted(40)
    projections = Projections([(1, 1)], 12, 20)
    projections.fit(0, student, teacher)
    student.requires_grad_(), teacher.requires_grad_()
    losses.hidden_mse(
        projections(0, student * 1.1), teacher, mean=projections.mean[0], std=projections.std[0]
    ).backward()
    assert (
        projections.weights[0].grad.abs().sum() > 0
        and student.grad.abs().sum() > 0
        and teacher.grad is None
    )
    assert (
        projections(0, student.bfloat16()).dtype == torch.float32
    )  # a 16-bit student, W stays float32


def test_a_feature_that_stands_still_is_not_blown_up():
    hidden = torch.randn(100, 9, generator=torch.Generator().manual_seed(0))
    hidden[:, 3] = 5.0
    mean, std = layer_map.feature_statistics(hidden)
    assert mean[3] == 5 and 0.005 < std[3] < 0.02
    mean, std = layer_map.feature_statistics(torch.ones(2, 9))
    assert (std > 0).all()


def test_bad_calibration_is_refused():
    student, teacher, _ = planted(20)
    projections = Projections([(1, 1)], 12, 20)
    nan = teacher.clone()
    nan[3, 3] = torch.nan
    for s, t, words in [
        (student[:1], teacher[:1], "at least 2 tokens"),
        (student, nan, "finite"),
        (student[:19], teacher, "shapes cannot be multiplied"),
        (student * torch.inf, teacher, "finite"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=words):
            projections.fit(0, s, t)


def test_statistics_of_the_acoustic_teacher():
    statistics = Statistics(range(2, 5), 12)
    hidden, _, _ = planted(60)
    statistics.fit(3, hidden)
    for got, want in zip(statistics[3], layer_map.feature_statistics(hidden)):
        assert torch.equal(got, want)
    assert (statistics[2][0] == 0).all() and (statistics[4][1] == 1).all()
    assert not list(statistics.parameters())
    with pytest.raises(KeyError):
        statistics[1]


def test_what_a_checkpoint_saved_is_loaded_for_the_same_layers_only(tmp_path):
    student, teacher, _ = planted(60)
    projections, statistics = Projections(pairs(4, 6, every=2), 12, 20), Statistics([1, 2], 20)
    projections.fit(1, student, teacher)
    statistics.fit(2, teacher)
    for module, twin, other in [
        (
            projections,
            Projections(pairs(4, 6, every=2), 12, 20),
            Projections(pairs(4, 8, every=2), 12, 20),
        ),
        (statistics, Statistics([1, 2], 20), Statistics([1, 3], 20)),
    ]:
        path = tmp_path / "saved.safetensors"
        save_file(module.state_dict(), path)
        layer_map.load(twin, path)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
        with pytest.raises((ValueError, RuntimeError), match="made for layers|size mismatch"):
            layer_map.load(other, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer_map.load(Statistics([1, 2], 21), path)
