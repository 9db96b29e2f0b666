"""Looking inside: CKA against its definition, attention and gradients on planted cases, and the
real command on real models."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_train_source_layer import small_run, write_world

import data
import layer_map
import losses
import mini.world
import models
from lab import inside

ROOT = Path(__file__).parent.parent


# -------------------- CKA ------------------------------------------------------------------------


def hsic_by_definition(k, l):
    """The U-statistic: the mean of K_ij L_ij + K_ij L_qr - 2 K_ij L_iq over all ordered quadruples
    of different tokens."""
    terms = [
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return sum(terms) / len(terms)


def test_cka_is_the_unbiased_estimate():
    torch.manual_seed(0)
    xs, ys = (
        [torch.randn(7, w, dtype=torch.float64) for w in (3, 5)],
        [torch.randn(7, w, dtype=torch.float64) for w in (4, 2, 9)],
    )
    xs.append(ys[0] @ torch.randn(4, 4, dtype=torch.float64))
    kernels = [[x @ x.T for x in side] for side in (xs, ys)]
    table = inside.cka(xs, ys)
    for s, k in enumerate(kernels[0]):
        for t, l in enumerate(kernels[1]):
            norm = hsic_by_definition(k, k) * hsic_by_definition(l, l)
            if norm > 0:
                assert table[s, t].item() == pytest.approx(
                    (hsic_by_definition(k, l) / norm**0.5).item(), rel=1e-9
                )


def test_cka_knows_a_rotation_and_is_not_fooled_by_width():
    torch.manual_seed(0)
    x = torch.randn(60, 20)
    rotation = torch.linalg.qr(torch.randn(20, 20)).Q
    unrelated = [torch.randn(60, 500) for _ in range(6)]  # more features than tokens
    table = inside.cka([x, *unrelated[:3]], [3 * x @ rotation + 1, *unrelated[3:]])
    assert table[0, 0] == pytest.approx(1, abs=1e-5)
    assert table.flatten()[1:].abs().max() < 0.25 and abs(table.flatten()[1:].mean()) < 0.05
    with pytest.raises(ValueError, match="too few"):
        inside.cka([x[:3]], [x[:3]])


# -------------------- attention ------------------------------------------------------------------


def test_attention_on_the_own_token():
    rows = [5, 3]
    target = 40 * torch.eye(8, 16)
    share, first, chance = inside.own_attention(target, target, rows)
    assert (
        share == pytest.approx(1, abs=1e-6) and first == 1 and chance == pytest.approx(2 / 8)
    )  # (5 * 1/5 + 3 * 1/3) / 8
    shifted = torch.cat(
        [part.roll(1, 0) for part in target.split(rows)]
    )  # every token looks like its neighbour
    share, first, _ = inside.own_attention(shifted, target, rows)
    assert share < 1e-6 and first == 0
    share, _, chance = inside.own_attention(torch.zeros(8, 16), target, rows)  # no opinion
    assert share == pytest.approx(chance)


# -------------------- gradients ------------------------------------------------------------------


def test_a_planted_feature_takes_the_raw_gradient_and_nothing_of_the_standardised():
    torch.manual_seed(0)
    teacher = torch.randn(200, 30)
    found = {"student": {1: teacher + 0.3 * torch.randn(200, 30)}, "teacher": {1: teacher}}
    report = inside.features_report(found, [(1, 1)], inside.fit([(1, 1)], found))
    for name in ("jsd", "mse", "cosine"):
        planted, natural = report["planted"], report["natural"]
        assert (
            planted[f"{name}, raw"]["largest"]
            > 0.3
            > 4 * natural[f"{name}, standardised"]["largest"]
        )
        assert planted[f"{name}, standardised"] == pytest.approx(
            natural[f"{name}, standardised"], rel=1e-3
        )
        assert natural[f"{name}, standardised"]["half"] > 0.35
    shares = inside.gradient_shares(losses.hidden_mse, found["student"][1], teacher)
    slope = (
        2 * (found["student"][1] - teacher).abs().sum(0) * teacher.std(0, correction=0)
    )  # by hand, up to a factor
    torch.testing.assert_close(shares, slope / slope.sum())


# -------------------- real models ----------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("inside"), n=8)


@pytest.fixture(scope="module")
def loaded():
    return *models.load_audio_model(mini.world.MINI / "student"), *models.load_text_model(
        mini.world.MINI / "teacher"
    )


@torch.no_grad()
def test_states_are_the_layers_that_lead_to_the_logits(world, loaded):
    student, processor, teacher, tokenizer = loaded
    examples = data.read_manifest(world)[:3]
    found = inside.states(student, processor, teacher, tokenizer, examples, batch_size=2)
    ids = data.shared_vocabulary(processor.tokenizer, tokenizer)[:2]
    said = {}
    for side, model, decoder, index in (
        ("student", student, student.model.language_model, 0),
        ("teacher", teacher, teacher.model, 1),
    ):
        assert sorted(found[side]) == list(range(1, len(decoder.layers) + 1))
        logits = model.lm_head(decoder.norm(found[side][len(decoder.layers)]))
        said[side] = logits[:, ids[index]]
    labels = torch.cat(
        [
            torch.tensor(data.encode_response(processor.tokenizer, data.response_text(e)))
            for e in examples
        ]
    )
    assert sum(found["rows"]) == len(labels)
    best = ids[0][said["student"].argmax(-1)]
    torch.testing.assert_close(
        found["jsd"],
        losses.token_divergence(said["student"], said["teacher"]),
        atol=1e-5,
        rtol=1e-3,
    )
    improbable = said["teacher"].softmax(-1) < inside.IMPROBABLE
    torch.testing.assert_close(
        found["stray"], (said["student"].softmax(-1) * improbable).sum(-1), atol=1e-5, rtol=1e-3
    )
    assert (
        best == labels
    ).float().mean() > 0.9  # the positions are those that predict the response


@pytest.mark.slow
def test_the_command_before_and_after_training(world, tmp_path):
    import train_source_layer

    train_source_layer.main(
        small_run(world, tmp_path / "run", "--text-kd", "skip:3", "--lr", "1e-3")
    )
    model, out = tmp_path / "run" / "step-0000004", tmp_path / "look"
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "lab.inside",
            "layers",
            "--model",
            str(model),
            "--data",
            str(world),
            "--out",
            str(out),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=240,
    )
    report = json.loads((out / "layers.json").read_text())
    assert (
        report["pairs"] == [list(pair) for pair in layer_map.pairs(7, 9)]
        and (out / "layers.png").stat().st_size > 10_000
    )
    for when in ("before", "after"):
        table = torch.tensor(report[when]["cka"])
        assert table.shape == (7, 9) and table.abs().max() <= 1.001 and table[6, 8] > table[0, 8]
        assert [row["student"] for row in report[when]["attention"]] == [1, 2, 3, 4, 5, 6, 7]
        assert all(row["chance"] < row["own"] < 1 for row in report[when]["attention"])
        assert 0 <= report[when]["vocabulary"]["stray"] < 1 and 0 < report[when]["vocabulary"][
            "jsd"
        ] < math.log(2)
    assert report["before"]["cka"] != report["after"]["cka"]


def test_saved_projections_serve_their_own_pairs(tmp_path):
    pairs = [(1, 1), (2, 3)]
    saved, fitted = layer_map.Projections(pairs[1:], 4, 6), layer_map.Projections(pairs, 4, 6)
    with torch.no_grad():
        saved.weights[0].fill_(7)
        saved.mean.fill_(3)
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "p.safetensors")
    merged = inside.trained(tmp_path / "p.safetensors", pairs, fitted)
    assert (
        (merged.weights[1] == 7).all()
        and (merged.mean[1] == 3).all()
        and torch.equal(merged.weights[0], torch.eye(6, 4))
    )


def test_features_on_the_mini_models_and_a_teacher_nobody_named(world, tmp_path, capsys):
    flags = ["features", "--model", str(mini.world.MINI / "student"), "--data", str(world)]
    flags += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="nobody knows its teacher; give --teacher"):
        inside.main(flags)
    inside.main([*flags, "--teacher", str(mini.world.MINI / "teacher")])
    report = json.loads((tmp_path / "features.json").read_text())
    assert (
        report["planted"]["mse, raw"]["largest"] > 0.9
        and report["planted"]["jsd, standardised"]["largest"] < 0.05
    )
    assert (tmp_path / "features.png").exists() and "planted" in capsys.readouterr().out


def test_the_results_page_shows_what_was_seen():
    page = (ROOT / "docs" / "results_source_layer.md").read_text()
    for name, lines in (("features", inside.features_lines), ("layers", inside.layers_lines)):
        assert f"(figures/{name}.png)" in page
        for line in lines(json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text())):
            assert line in page, f"the page lacks a line of {name}: {line}"
