"""The real script: its loss against formulas computed apart from it, two processes against one,
killed against uninterrupted, bad input."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.spatial.distance
import scipy.special
import soundfile
import test_tracking
import torch

import data
import fused
import layer_map
import losses
import mini.world
import models
import train_source_layer
from plumbing.optimizer import learning_rate_factor, parameter_groups
from plumbing.run import examples_of_step
from train_source_layer import SourceLayerStep, main, parse_flags

ROOT = Path(__file__).parent.parent


def write_world(folder, n=8, **changes):
    """A manifest of n sound and music clips in the mini world's words. changes: keys to set in the
    second line (None: remove)."""
    lines = []
    for i in range(n):
        record = mini.world.make_record(("sound", "music")[i % 2], i, "train", 7)
        record["audio"] = f"{i}.wav"
        soundfile.write(
            folder / record["audio"], mini.world.synthesise(record.pop("recipe")).numpy(), 16_000
        )
        if i == 1:
            record = {
                key: value for key, value in {**record, **changes}.items() if value is not None
            }
        lines.append(json.dumps(record))
    path = folder / "world.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


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
        "4",
        "--micro-batch",
        "2",
        "--max-steps",
        "4",
        *more,
    ]


# -------------------- the loss -------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(world):
    """Student, snapshot that differs from it, teacher, a batch, and the step module, all in
    float64."""
    student, processor = models.load_audio_model(mini.world.MINI / "student", dtype=torch.float64)
    teacher, tokenizer = models.load_text_model(mini.world.MINI / "teacher", dtype=torch.float64)
    snapshot = copy.deepcopy(student)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.model.language_model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    student_ids, teacher_ids, _ = data.shared_vocabulary(processor.tokenizer, tokenizer)
    examples = data.read_manifest(world)[:3]
    batch = data.collate(examples, processor, tokenizer)
    batch.audio.inputs["input_features"] = batch.audio.inputs["input_features"].double()
    args = parse_flags(["--text-kd", "skip:3", "--alpha-layer", "0.3", "--alpha-ac", "0.2"])
    pairs = layer_map.pairs(7, 9, every=3)
    step = SourceLayerStep(student, teacher, snapshot, pairs, (student_ids, teacher_ids), args)
    step.calibrate([batch])
    step.double()
    return (
        student,
        snapshot,
        teacher,
        processor,
        tokenizer,
        batch,
        step,
        examples,
        (student_ids, teacher_ids),
    )


def layer_outputs(layers, run):
    """What each decoder layer returns during run(), by hooks of our own: before the final norm. ->
    {layer: [seq, hidden]}"""
    got, handles = {}, []
    for number, layer in enumerate(layers, 1):
        handles.append(
            layer.register_forward_hook(
                lambda m, i, o, number=number: got.__setitem__(
                    number, (o[0] if isinstance(o, tuple) else o)[0]
                )
            )
        )
    run()
    for handle in handles:
        handle.remove()
    return got


def js(p, q):
    return scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2


FORMULAS = {
    "jsd": lambda x, y: js(scipy.special.softmax(x, -1), scipy.special.softmax(y, -1)),
    "mse": lambda x, y: ((x - y) ** 2).mean(-1),
}


def gradient(loss, module):
    """[numbers of the module's parameters], 0 where none arrives."""
    module.zero_grad()
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("form", ["fused", "reference"])
def test_a_gradient_arrives_from_every_term_that_is_on(everything, form, monkeypatch):
    """Each weight changes the decoder's gradient; L_top has none, and gives one alone."""
    student, *_, batch, step, _, _ = everything
    divergences = {**losses.HIDDEN, **fused.HIDDEN} if form == "fused" else losses.HIDDEN
    monkeypatch.setattr(step, "hidden_divergence", divergences["jsd"])
    monkeypatch.setattr(step, "jsd_ce", fused.jsd_ce if form == "fused" else losses.jsd_ce)
    tokens = {"response": len(batch.labels), "audio": len(batch.audio.audio_positions)}

    def with_weights(**weights):
        for name in ("alpha_layer", "alpha_ac", "alpha_sft"):
            monkeypatch.setattr(step.args, name, weights.get(name, 0.0))
        return gradient(step(batch, tokens)["loss"], models.decoder(student))

    alone = with_weights()
    assert alone.norm() > 0
    for name in ("alpha_layer", "alpha_ac", "alpha_sft"):
        assert (with_weights(**{name: 1.0}) - alone).norm() > 0.01 * alone.norm(), name
    student.zero_grad()


@pytest.mark.parametrize("form", ["fused", "reference"])
@pytest.mark.parametrize("divergence", FORMULAS)
def test_the_loss_is_the_papers_formula(everything, divergence, form, monkeypatch):
    """Every term recomputed one example at a time, unbatched, with transformers' own logits, hooks
    of our own, and scipy's divergence."""
    (
        student,
        snapshot,
        teacher,
        processor,
        tokenizer,
        batch,
        step,
        examples,
        (student_ids, teacher_ids),
    ) = everything
    monkeypatch.setattr(
        step,
        "hidden_divergence",
        ({**losses.HIDDEN, **fused.HIDDEN} if form == "fused" else losses.HIDDEN)[divergence],
    )
    monkeypatch.setattr(step, "jsd_ce", fused.jsd_ce if form == "fused" else losses.jsd_ce)
    sums, counts = (
        dict.fromkeys(["top", "layer", "acoustic", "sft"], 0.0),
        {"response": 0, "audio": 0},
    )
    with torch.no_grad():
        parts = step(
            batch, {"response": len(batch.labels), "audio": len(batch.audio.audio_positions)}
        )
        for example in examples:
            response = data.encode_response(processor.tokenizer, data.response_text(example))
            n = len(response)
            wave = data.load_audio(example.audio).numpy()
            heard = processor(
                text=data.audio_prompt(processor, data.question_text(example)),
                audio=[wave],
                sampling_rate=16_000,
                return_tensors="pt",
            )
            heard["input_ids"] = torch.cat([heard["input_ids"], torch.tensor([response])], 1)
            heard["attention_mask"] = torch.ones_like(heard["input_ids"])
            heard["input_features"] = heard["input_features"].double()
            read = torch.tensor(
                [
                    tokenizer(
                        data.text_prompt(
                            tokenizer, example.description, data.question_text(example)
                        )
                    )["input_ids"]
                    + response
                ]
            )
            out = {}
            inside = layer_outputs(
                student.model.language_model.layers,
                lambda: out.update(s=student(**heard).logits[0]),
            )
            taught = layer_outputs(
                teacher.model.layers, lambda: out.update(t=teacher(input_ids=read).logits[0])
            )
            kept = layer_outputs(snapshot.model.language_model.layers, lambda: snapshot(**heard))
            z, zt = (
                out["s"][-n - 1 : -1],
                out["t"][-n - 1 : -1],
            )  # the n positions before each response token
            sums["sft"] += torch.nn.functional.cross_entropy(
                z, torch.tensor(response), reduction="sum"
            ).item()
            sums["top"] += js(
                scipy.special.softmax(z[:, student_ids].numpy(), -1),
                scipy.special.softmax(zt[:, teacher_ids].numpy(), -1),
            ).sum()
            for i, (s, t) in enumerate(step.pairs):
                mean, std = step.projections.mean[i], step.projections.std[i]
                x = (inside[s][-n - 1 : -1] @ step.projections.weights[i].T - mean) / std
                y = (taught[t][-n - 1 : -1] - mean) / std
                sums["layer"] += FORMULAS[divergence](x.numpy(), y.numpy()).sum() / len(step.pairs)
            sound = (heard["input_ids"][0] == processor.audio_token_id).nonzero()[:, 0]
            for l in range(1, 8):
                mean, std = step.statistics[l]
                x, y = ((h[l][sound] - mean) / std for h in (inside, kept))
                sums["acoustic"] += FORMULAS[divergence](x.numpy(), y.numpy()).sum() / 7
            counts["response"] += n
            counts["audio"] += len(sound)
    want = {
        name: value / counts["audio" if name == "acoustic" else "response"]
        for name, value in sums.items()
    }
    for name, value in want.items():
        np.testing.assert_allclose(parts[name].item(), value, rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(
        parts["loss"].item(),
        want["top"] + 0.3 * want["layer"] + 0.2 * want["acoustic"] + 0.5 * want["sft"],
        rtol=2e-6,
    )


def test_a_shift_by_one_changes_every_term(everything):
    step, batch = everything[6], everything[5]
    tokens = {"response": len(batch.labels), "audio": len(batch.audio.audio_positions)}
    with torch.no_grad():
        right = step(batch, tokens)
        shifted = copy.deepcopy(batch)
        shifted.audio.predict_positions += 1
        wrong = step(shifted, tokens)
    for name in ("top", "layer", "sft"):
        assert abs(wrong[name] - right[name]) > 0.01 * right[name]
    assert wrong["acoustic"] == right["acoustic"]


def test_only_the_student_and_its_projections_learn(everything):
    student, snapshot, teacher, *_, batch, step, _, _ = everything
    models.choose_trained(student, "decoder", list(student.parameters()))
    step(batch, {"response": len(batch.labels), "audio": len(batch.audio.audio_positions)})[
        "loss"
    ].backward()
    got = {
        name for name, p in step.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert got == {
        name for name, p in step.named_parameters() if p.requires_grad
    }  # nothing that DDP would wait for in vain
    assert (
        not any("audio_tower" in name for name in got)
        and any("projections" in name for name in got)
        and any("multi_modal_projector" in name for name in got)
    )
    assert all(p.grad is None for model in (snapshot, teacher) for p in model.parameters())
    step.zero_grad()


def test_the_snapshot_needs_no_question_and_no_response(everything):
    snapshot, batch = everything[1], everything[5]
    whole = layer_map.Tap(snapshot.model.language_model.layers, {"audio": [1, 7]})
    with torch.no_grad():
        with whole.at(audio=batch.audio.audio_positions) as full:
            snapshot.model(**batch.audio.inputs)
        short = data.audio_prefix(batch.audio)
        with whole.at(audio=short.audio_positions) as cut:
            snapshot.model(**short.inputs)
    assert short.inputs["input_ids"].shape[1] < batch.audio.inputs["input_ids"].shape[1] / 1.5
    for layer in (1, 7):
        torch.testing.assert_close(cut["audio"][layer], full["audio"][layer], rtol=1e-6, atol=1e-6)


# -------------------- the loop -------------------------------------------------------------------


def test_every_example_once_an_epoch_and_the_same_batches_whatever_came_before():
    examples = list(range(10))
    seen = [e for step in range(5) for e in examples_of_step(examples, step, 4, seed=3)]
    assert sorted(seen[:10]) == examples and sorted(seen[10:]) == examples
    assert seen[:10] != seen[10:]
    assert examples_of_step(examples, 3, 4, seed=3) == seen[12:16]
    assert examples_of_step(examples, 3, 4, seed=4) != seen[12:16]


def test_schedule():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    np.testing.assert_allclose(factors[:3], [1 / 3, 2 / 3, 1])
    assert (
        factors[3] == 1
        and all(a > b for a, b in zip(factors[3:], factors[4:]))
        and factors[-1] < 0.001
    )


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    main(small_run(world, out, "--save-every", "2", "--track", "tensorboard"))
    return out


def test_losses_fall_and_the_log_has_every_term(one_process):
    log = log_of(one_process)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {
        "loss",
        "top",
        "layer",
        "acoustic",
        "sft",
        "grad_norm",
        "lr",
        "seconds",
        "seconds_waiting",
        "tokens_per_second",
        "memory_gb",
        "host_gb",
    } <= log[0].keys()
    assert (
        log[0]["acoustic"] == pytest.approx(0, abs=1e-6) and log[-1]["acoustic"] > 0
    )  # the snapshot is the student before step 1
    config = json.loads((one_process / "config.json").read_text())
    assert (
        config["alpha_layer"] == parse_flags([]).alpha_layer
        and config["steps"] == 4
        and config["torch"] == torch.__version__
    )


def test_calibration_holds_a_bounded_number_of_tokens_of_every_clip(everything, monkeypatch):
    *_, batch, step, _, _ = everything
    kept, monkey = [], monkeypatch.setattr
    monkey(step.projections, "fit", lambda i, student, teacher: kept.append((student, teacher)))
    monkey(step.statistics, "fit", lambda layer, hidden: kept.append((hidden, hidden)))
    step.calibrate([batch, batch])
    everything_kept, kept[:] = kept[:], []
    monkey(train_source_layer, "CALIBRATION_TOKENS", 5)
    step.calibrate([batch, batch])
    for fewer, more in zip(kept, everything_kept, strict=True):
        assert 15 < len(fewer[0]) <= 2 * 5 * len(batch.examples) < len(more[0])
        assert len(fewer[0]) == len(fewer[1])
        stride = -(-(len(more[0]) // 2) // (5 * len(batch.examples)))
        assert all(
            torch.equal(one[: len(one) // 2], other[: len(other) // 2 : stride])
            for one, other in zip(fewer, more)
        )
        assert (
            fewer[0].untyped_storage().nbytes() == fewer[0].nbytes
        )  # a copy, not a window onto all of them


def test_a_killed_run_goes_on_to_the_last_bit(world, one_process, tmp_path):
    shutil.copytree(one_process / "step-0000002", tmp_path / "step-0000002")
    assert len(list((tmp_path / "step-0000002" / "optimizer").glob("*.safetensors"))) > 1
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log_of(one_process)[:3])
    )  # killed after step 3
    main(small_run(world, tmp_path, "--resume", "auto", "--save-every", "2"))
    for name in ("loss", "top", "layer", "acoustic", "sft"):
        assert [line[name] for line in log_of(tmp_path)] == [
            line[name] for line in log_of(one_process)
        ], name
    assert [line["grad_norm"] for line in log_of(tmp_path)] == [
        line["grad_norm"] for line in log_of(one_process)
    ]


def test_a_tracker_has_what_the_log_has(one_process):
    log = log_of(one_process)
    numbers = test_tracking.scalars(one_process)
    assert numbers.keys() == log[0].keys() - {"step"} >= {"loss", "lr", "memory_gb"}
    for name, values in numbers.items():
        expected = [(line["step"], pytest.approx(line[name])) for line in log]
        assert values == expected, name


def test_a_checkpoint_is_an_ordinary_model_with_its_projections_beside_it(one_process):
    folder = one_process / "step-0000004"
    model, _ = models.load_audio_model(folder)
    assert not any(
        "projection" in name and "multi_modal" not in name for name in model.state_dict()
    )
    layer_map.load(
        layer_map.Projections(layer_map.pairs(7, 9), 128, 160), folder / "projections.safetensors"
    )
    assert not list(one_process.glob("partial-*"))


def test_everything_that_should_learn_does(one_process):
    """Student and projections move at every step; the audio tower's sinusoids do not."""
    two, four = (
        {
            path.name: safetensors.torch.load_file(path)
            for path in (one_process / f"step-000000{n}").glob("*.safetensors")
        }
        for n in (2, 4)
    )
    moved = lambda name: {
        key for key in two[name] if not torch.equal(two[name][key], four[name][key])
    }
    assert (
        moved("projections.safetensors")
        == {key for key in two["projections.safetensors"] if key.startswith("weights")}
        != set()
    )
    assert moved("statistics.safetensors") == set()
    assert moved("model.safetensors") == {
        key for key in two["model.safetensors"] if "embed_positions" not in key
    }


def test_every_parameter_that_learns_is_in_one_group():
    module = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 2), "own": torch.nn.Linear(2, 2)})
    groups = parameter_groups(
        module, lr=1e-3, weight_decay=0.1, special=[(module["own"].parameters(), 1e-2, 0.0)]
    )  # a generator
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in module.parameters()
    )
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups] == [
        (1, 1e-3, 0.1),
        (1, 1e-3, 0.0),
        (1, 1e-2, 0.0),
        (1, 1e-2, 0.0),
    ]


def test_every_part_of_the_student_has_its_learning_rate(world, tmp_path):
    """--tower-lr, --lower-lr and --lr reach the optimizer: what each part moves by in AdamW's first
    step is its own rate."""
    student, _ = models.load_audio_model(mini.world.MINI / "student")
    parts = {
        "tower": student.model.audio_tower.layers,
        "lower": student.model.language_model.layers[:3],
        "upper": student.model.language_model.layers[3:],
        "head": student.lm_head,
    }

    def moved(*flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))  # a folder for each run
        main(small_run(world, out, "--max-steps", "1", *flags))
        after = models.load_audio_model(out / "step-0000001")[0].state_dict()
        before = student.state_dict()
        names = {id(p): name for name, p in student.named_parameters()}
        return {
            part: max(
                (after[names[id(p)]] - before[names[id(p)]]).abs().max().item()
                for p in module.parameters()
            )
            for part, module in parts.items()
        }

    rates = moved("--lr", "1e-3", "--train", "all", "--tower-lr", "4", "--lower-lr", "0.1")
    assert rates == pytest.approx(
        {"tower": 4e-3, "lower": 1e-4, "upper": 1e-3, "head": 1e-3}, rel=0.05
    )
    rates = moved("--lr", "1e-3", "--train", "decoder", "--lower-lr", "0")
    assert rates == pytest.approx({"tower": 0, "lower": 0, "upper": 1e-3, "head": 1e-3}, rel=0.05)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (
                ["--divergence", "kl", "--text-kd", "top", "--alpha-sft", "0"],
                ["--text-kd", "none"],
            )
        ),
    ],
    ids=["default", "kl", "sft"],
)
def test_the_fused_loss_trains_as_the_formulas_do(world, tmp_path, flags):
    """Three steps, float32: every term of the curve to a relative 1e-4."""
    logs = []
    for form in ("fused", "reference"):
        main(small_run(world, tmp_path / form, *flags, "--max-steps", "3", "--loss", form))
        logs.append(log_of(tmp_path / form))
    for ours, reference in zip(*logs):
        for name in reference.keys() - {
            "seconds",
            "seconds_waiting",
            "tokens_per_second",
            "memory_gb",
            "host_gb",
        }:
            assert ours[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-8), (
                reference["step"],
                name,
            )
    assert len(logs[0]) == 3 and logs[0][-1]["loss"] != logs[0][0]["loss"]


def test_dry_run_of_everything(tmp_path):
    """The default run's own path, synthesis and evaluation included, as a newcomer would try it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_source_layer.py"), "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for when in ("before", "after"):
        assert {"sound", "music", "speech", "average"} <= results[when][
            "aqa"
        ].keys() and 0 <= results[when]["ser"]["ua"] <= 100
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert len((tmp_path / "samples-after.jsonl").read_text().splitlines()) == 32


@pytest.mark.parametrize(
    "row, terms",
    [
        (["--text-kd", "none", "--no-acoustic-kd"], {"sft"}),
        (["--text-kd", "top", "--no-acoustic-kd"], {"sft", "top"}),
        (
            ["--text-kd", "skip:7", "--no-acoustic-kd", "--divergence", "kl"],
            {"sft", "top", "layer"},
        ),
        (
            ["--text-kd", "layer", "--no-acoustic-kd", "--hidden-divergence", "mse"],
            {"sft", "top", "layer"},
        ),
        (
            [
                "--text-kd",
                "layer",
                "--layers",
                "6",
                "7",
                "--alpha-sft",
                "0",
                "--train",
                "all",
                "--hidden-divergence",
                "cosine",
            ],
            {"top", "layer", "acoustic"},
        ),
    ],
)
def test_every_row_of_table_1_trains(world, tmp_path, row, terms):
    main(small_run(world, tmp_path, "--max-steps", "1", *row))
    (line,) = log_of(tmp_path)
    assert terms | {"loss"} == {"loss", "top", "layer", "acoustic", "sft"} & line.keys()
    assert all(np.isfinite(line[name]) for name in terms)


# -------------------- bad input ------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--text-kd", "skip:0"], "skip:7"),
        (["--text-kd", "layers"], "none, top, skip:K, layer"),
        (["--text-kd", "skip:x"], "skip:7"),
        (["--text-kd", "none", "--alpha-sft", "0"], "nothing teaches"),
        (["--text-kd", "top", "--layers", "3"], "--layers"),
        (["--corrupt-descriptions", "30"], "between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse_flags(flags)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"description": None}, "description"),
        ({"reasoning": None}, "reasoning"),
        ({"answer": "no such choice"}, "not among the choices"),
        ({"audio": "gone.wav"}, "does not exist"),
        ({"audio": "../0.wav"}, "leaves the (manifest's )?folder"),
    ],
)
def test_a_bad_line_stops_the_run_before_training(tmp_path, changes, words):
    path = write_world(tmp_path, n=3, **changes)
    with pytest.raises(data.DataError, match=words) as error:
        main(small_run(path, tmp_path / "out"))
    assert "world.jsonl:2" in str(error.value)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_an_error_is_one_sentence_without_a_traceback(tmp_path):
    path = write_world(tmp_path, n=3, audio="gone.wav")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_source_layer.py"), *small_run(path, tmp_path / "out")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "world.jsonl:2: " in last and "does not exist" in last


def test_models_that_do_not_fit(world, tmp_path):
    with pytest.raises(SystemExit, match="cannot load an audio language model"):
        main(small_run(world, tmp_path, "--student", str(tmp_path / "nowhere")))
    with pytest.raises(SystemExit, match="takes no audio|cannot load"):
        main(small_run(world, tmp_path, "--student", str(mini.world.MINI / "teacher")))
    with pytest.raises(SystemExit, match="--batch-size 5"):
        main(small_run(world, tmp_path, "--batch-size", "5"))
    with pytest.raises(SystemExit, match="not a checkpoint"):
        main(small_run(world, tmp_path, "--resume", str(tmp_path)))
    with pytest.raises(SystemExit, match="--layers: .*must name some of the mapped"):
        main(small_run(world, tmp_path, "--layers", "99"))
