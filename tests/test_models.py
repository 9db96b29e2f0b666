"""Five families at random weights: the same five questions answered rightly by each, both scripts
end to end, and every trap sprung once."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import families
import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import TEACHER_TEMPLATE
from peft import PeftModel
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)

import data
import layer_map
import models
import rollout
import sampler
import train_cord
import train_source_layer
from lab import shapes
from plumbing import hearing, hub, saving

ROOT = Path(__file__).parent.parent
ALL = list(families.FAMILIES)
MORE = ("musicflamingo", "qwen3_asr", "glmasr")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in ALL]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: (student's folder, teacher's folder)}"""
    return {name: families.save_family(name, tmp_path_factory.mktemp(name)) for name in ALL}


@pytest.fixture(scope="session")
def loaded(folders):
    """{family: (model, processor)}; do not train these, copy them."""
    return {name: models.load_audio_model(student) for name, (student, _) in folders.items()}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six examples of noise of different lengths, with everything that either paper asks for."""
    folder, noise, lines = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0), []
    for i in range(6):
        soundfile.write(
            folder / f"{i}.wav",
            (0.1 * torch.randn(8_000 + 4_321 * i, generator=noise)).numpy(),
            16_000,
        )
        stages = dict.fromkeys(data.STAGES, "three plus five" + " then four" * i)
        lines.append(
            {
                "id": f"s{i}",
                "audio": f"{i}.wav",
                "question": "What is seven plus two?" + " Which?" * i,
                "choices": ["nine", "eight"],
                "answer": "nine",
                "task": "speech",
                "reasoning": stages,
                "description": "A man says: what" + " is" * i,
                "transcript": "what is seven plus two" + " minus four" * i,
            }
        )
    (folder / "noise.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "noise.jsonl"


@pytest.fixture
def examples(world):
    return data.read_manifest(world)


# ------------------------------------------ every family ------------------------------------------

NEVER = {
    "qwen2_5_omni": ("visual.", "audio_tower.audio_bos_eos_token."),
    "qwen3_omni": ("visual.",),
}


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_what_never_gets_a_gradient(name, loaded):
    model, processor = loaded[name]
    before = [p.requires_grad for p in model.parameters()]
    used = {id(p) for p in hearing.check(model, processor, shared_prompts=True)}
    unused = [
        n.removeprefix("model.") for n, p in model.named_parameters() if id(p) not in used
    ]  # the newest Omnis keep all inside model
    assert all(n.startswith(NEVER.get(name, ())) for n in unused) and {
        n.split(".")[0] for n in unused
    } == {p.split(".")[0] for p in NEVER.get(name, ())}
    assert [
        p.requires_grad for p in model.parameters()
    ] == before and model.get_output_embeddings().weight is models.head_weight(model)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_company_change_nothing(name, loaded, examples):
    """A batch, padded on either side, is what each example is alone: hidden states, and every
    generated token."""
    model, processor = loaded[name]
    # One's tower has no mask, the other's features end otherwise beside a longer clip: equal clips
    if name in ("granite_speech", "qwen3_asr"):
        examples = [replace(e, audio=examples[1].audio) for e in examples]
    # Its tower pads a last piece to a second where there is a whole one: clips over 1 s
    examples = examples[3:] if name == "qwen3_omni" else examples[:3]
    batch = data.collate(examples, processor, processor.tokenizer, words="transcript")
    with torch.no_grad():
        together = models.hear(model, **batch.audio.inputs).flatten(0, 1)[
            batch.audio.predict_positions
        ]
        alone = []
        for example in examples:
            one = data.collate([example], processor, processor.tokenizer, words="transcript").audio
            alone.append(models.hear(model, **one.inputs).flatten(0, 1)[one.predict_positions])
        other = models.hear(
            model,
            **{
                k: x.flip(-1) if k == "input_features" else x for k, x in batch.audio.inputs.items()
            },
        ).flatten(0, 1)[batch.audio.predict_positions]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=1e-3)
    assert (other - together).norm() > 0.004 * together.norm()  # and other sound would change much
    said = rollout.generate(
        model,
        processor,
        examples,
        max_new_tokens=12,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        progress=False,
    )
    assert said == [
        rollout.generate(
            model,
            processor,
            [e],
            max_new_tokens=12,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            progress=False,
        )[0]
        for e in examples
    ]
    assert len(set(said)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_are_those_of_plain_generate(name, loaded, examples):
    """From the shared prompt's cache, behind another call of another size (Omni keeps the last
    call's positions), token for token."""
    model, processor = loaded[name]
    examples = (
        examples[2:4]
        if name != "granite_speech"
        else [examples[2], replace(examples[3], audio=examples[2].audio)]
    )
    prompts = data.encode_prompts(examples, processor, processor.tokenizer, words="transcript")
    rollout.generate(model, processor, examples[:1], max_new_tokens=3, progress=False)
    said = rollout.roll_out(
        model,
        processor,
        prompts,
        [rollout.Kind(1.0, kl=True), rollout.Kind(1.5, group=True)],
        key="0 5",
        max_new_tokens=12,
    )
    inputs = data.prompt_batch([e for e in examples for _ in range(2)], processor)
    choose = sampler.chooser(
        [f"0 5 {e.id} {i}" for e in examples for i in range(2)],
        inputs["input_ids"].shape[1],
        rollout.banned_ids(model, processor.tokenizer),
        max_new_tokens=12,
        temperature=[1.0, 1.5] * 2,
    )
    inputs.pop("position_ids")  # as transformers counts by itself
    stop = rollout.stop_ids(processor.tokenizer)
    with rollout.plain_decoding(model):
        plain = model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
            logits_processor=[choose],
        )
    for r, row in zip(said, plain[:, inputs["input_ids"].shape[1] :].tolist()):
        assert r.ids == row[: len(r.ids)] and len(r.ids) > 2
    assert all(
        processor.tokenizer.convert_tokens_to_ids(processor.audio_token) not in r.ids for r in said
    )


def small(world, out, *more):
    return [
        "--data",
        str(world),
        "--eval-data",
        str(world),
        "--out",
        str(out),
        "--batch-size",
        "4",
        "--micro-batch",
        "2",
        "--max-new-tokens",
        "8",
        "--eval-batch",
        "8",
        "--dry-run",
        *more,
    ]


# Granite Speech brings an adapter of its own
ADAPTED = ["granite_speech"]


@pytest.mark.parametrize("name, lora", [
    *((name, 0) for name in ALL),
    *((name, 4) for name in ADAPTED),
    *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ALL if name not in ADAPTED),
])
def test_both_scripts_run(name, lora, folders, world, tmp_path):
    student, teacher = map(str, folders[name])
    more = ("--lora", str(lora)) if lora else ()
    train_source_layer.main(
        small(world, tmp_path / "a", "--student", student, "--teacher", teacher, *more)
    )
    train_cord.main(small(world, tmp_path / "b", "--student", student, *more))
    for out, terms in (
        (tmp_path / "a", ("top", "layer", "acoustic", "sft")),
        (tmp_path / "b", ("loss", "kl")),
    ):
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert len(log) == 2 and all(
            line[term] > 0 for line in log for term in terms if term != "acoustic"
        )
        assert (
            out / "step-0000002" / ("adapter_model.safetensors" if lora else "model.safetensors")
        ).is_file() and (out / "results.json").is_file()
        hearing.check(
            *models.load_audio_model(out / "step-0000002")
        )  # what was saved is a student again; an adapter with its base


# ---------------------------------------------- LoRA ----------------------------------------------


@torch.no_grad()
def stir(model):
    """Adapters that change what is said: as made they add zero."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.05)


@pytest.fixture
def adapted(loaded):
    """A Qwen2-Audio with an adapter of rank 4 that changes what it says, and the same model without
    it."""
    model, processor = copy.deepcopy(loaded["qwen2_audio"][0]), loaded["qwen2_audio"][1]
    before = copy.deepcopy(model)
    models.choose_trained(model, "decoder", hearing.check(model, processor))
    torch.manual_seed(0)
    models.add_lora(model, 4)
    stir(model)
    return model, processor, before


def test_only_the_adapters_learn_and_without_them_the_model_is_what_it_was(adapted, examples):
    model, processor, before = adapted
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (
        learns
        and all(".lora_" in name for name in learns)
        and not any("audio_tower" in name or "lm_head" in name for name in learns)
    )
    assert (
        sum("multi_modal_projector" in name for name in learns) == 2
        and sum(".layers.2." in name for name in learns) == 14
    )  # q k v o gate up down, A and B
    view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
    with torch.no_grad():
        base, changed = models.hear(before, **view.inputs), models.hear(model, **view.inputs)
        with models.without_lora(model):
            off = models.hear(model, **view.inputs)
        again = models.hear(model, **view.inputs)
    assert (
        torch.equal(base, off)
        and torch.equal(changed, again)
        and (base - changed).abs().max() > 0.01
    )
    assert learns == {name for name, p in model.named_parameters() if p.requires_grad}


def test_snapshot_and_teacher_are_read_with_the_adapter_off(adapted, folders, examples):
    """With it on, L_ac would be 0 for ever, and CORD's initial teacher the weights of this step."""
    model, processor, before = adapted
    batch = data.collate(examples[:2], processor, processor.tokenizer, words="transcript")
    args = train_source_layer.parse_flags(["--text-kd", "none", "--lora", "4"])
    parts = [
        train_source_layer.SourceLayerStep(model, None, snapshot, [], None, args)(
            batch, {"response": len(batch.labels), "audio": len(batch.audio.audio_positions)}
        )
        for snapshot in (model, before)
    ]
    assert parts[0]["acoustic"] > 0.01 and torch.allclose(
        parts[0]["acoustic"], parts[1]["acoustic"]
    )
    prompts = data.encode_prompts(examples[:1], processor, processor.tokenizer, words="transcript")
    (chunk,) = train_cord.micro_batches(
        [rollout.Rollout(0, 1.0, True, False, [1, 2, 3])], prompts, processor, 4, "cpu"
    )
    banned = torch.tensor([0])
    initial, current = (
        train_cord.CordStep(
            model, banned, train_cord.parse_flags(["--lora", "4", "--teacher", teacher])
        ).read(chunk)
        for teacher in ("initial", "current")
    )
    assert (
        torch.equal(
            initial, train_cord.CordStep(before, banned, train_cord.parse_flags([])).read(chunk)
        )
        and (initial - current).abs().max() > 0.01
    )


def test_an_adapter_on_an_adapter_is_refused(adapted, folders, tmp_path):
    model, processor, before = adapted
    (tmp_path / "first").mkdir()
    saving.save(model, processor, tmp_path / "first")
    again = models.load_audio_model(tmp_path / "first")[0]
    models.choose_trained(again, "decoder", list(again.parameters()))
    refused(
        "is an adapter, and one on top of it would lose it; first: python models.py",
        models.add_lora,
        again,
        4,
    )
    config = json.loads((tmp_path / "first/adapter_config.json").read_text())
    (tmp_path / "first/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    refused(
        "does not say which model the adapter is for", models.load_audio_model, tmp_path / "first"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_familys_adapter_merges_into_a_model_that_loads(name, loaded, tmp_path):
    model, processor = copy.deepcopy(loaded[name][0]), loaded[name][1]
    models.choose_trained(model, "all", hearing.check(model, processor), lora=2)
    stir(model)
    (tmp_path / "adapter").mkdir()
    saving.save(model, processor, tmp_path / "adapter")
    models.main([str(tmp_path / "adapter"), "--save", str(tmp_path / "merged")])
    models.merge_lora(model)
    merged = models.load_audio_model(tmp_path / "merged")[0].state_dict()
    assert all(
        torch.allclose(x, merged[key], atol=1e-6) for key, x in model.state_dict().items()
    ) and not torch.equal(
        models.decoder(model).layers[0].self_attn.q_proj.weight,
        models.decoder(loaded[name][0]).layers[0].self_attn.q_proj.weight,
    )
    refused(
        "is there already",
        models.main,
        [str(tmp_path / "adapter"), "--save", str(tmp_path / "merged")],
    )


def test_granites_own_adapter_becomes_its_weights(loaded, folders, tmp_path):
    """Granite Speech ships one beside its weights; transformers puts it on while loading."""
    model, processor = copy.deepcopy(loaded["granite_speech"][0]), loaded["granite_speech"][1]
    folder = altered(folders["granite_speech"][0], tmp_path / "own")
    models.choose_trained(model, "decoder", list(model.parameters()), lora=2)
    stir(model)
    (tmp_path / "adapter").mkdir()
    saving.save(model, processor, tmp_path / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / file, folder / file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(folder)})
    )
    found, _ = models.load_audio_model(folder)
    models.merge_lora(model)
    assert not models.has_lora(found) and all(
        torch.allclose(x, found.state_dict()[key], atol=1e-6)
        for key, x in model.state_dict().items()
    )
    (tmp_path / "again").mkdir()
    saving.save(found, processor, tmp_path / "again")
    assert all(
        torch.equal(x, found.state_dict()[key])
        for key, x in models.load_audio_model(tmp_path / "again")[0].state_dict().items()
    )


def test_merged_is_equal_and_an_adapter_loads_with_and_without_peft(
    adapted, folders, examples, tmp_path
):
    model, processor, before = adapted
    view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
    plain = {name: x for name, x in view.inputs.items() if name != "position_ids"}
    with torch.no_grad():
        right = model(**plain).logits
        (tmp_path / "adapter").mkdir()
        saving.save(model, processor, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 0.5 * (
            folders["qwen2_audio"][0] / "model.safetensors"
        ).stat().st_size
        torch.testing.assert_close(
            models.load_audio_model(tmp_path / "adapter")[0](**plain).logits,
            right,
            atol=1e-4,
            rtol=1e-4,
        )
        elsewhere = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "adapter")
        torch.testing.assert_close(elsewhere(**plain).logits, right)
        fresh = copy.deepcopy(before)
        models.choose_trained(fresh, "decoder", list(fresh.parameters()))
        models.add_lora(fresh, 4)
        saving.fill(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(**plain).logits, right)
        models.merge_lora(model)
        assert not models.has_lora(model)
        torch.testing.assert_close(model(**plain).logits, right, atol=1e-4, rtol=1e-4)
        (tmp_path / "merged").mkdir()
        saving.save(model, processor, tmp_path / "merged")
        torch.testing.assert_close(
            models.load_audio_model(tmp_path / "merged")[0](**plain).logits,
            right,
            atol=1e-4,
            rtol=1e-4,
        )
    other = copy.deepcopy(before)
    models.choose_trained(other, "all", list(other.parameters()))
    models.add_lora(other, 4)
    with pytest.raises(ValueError, match="an adapter of 44 matrices does not fit one of"):
        saving.fill(other, tmp_path / "adapter")


# --------------------------------------------- saving ---------------------------------------------

FRESH = """
import sys, torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, AutoProcessor
for folder in sys.argv[1:]:
    auto = AutoModelForSeq2SeqLM if "flamingo" in folder else AutoModelForMultimodalLM
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "thinker_config", config)
    model = auto.from_pretrained(folder, config=config).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**torch.load(folder + "/batch.pt", weights_only=True)).logits
    vocabulary, eos = processor.tokenizer.get_vocab(), model.generation_config.eos_token_id
    torch.save((logits, vocabulary, processor.chat_template, eos), folder + "/out.pt")
"""
HUB = {
    "qwen2_audio": (
        "audio_tower.conv1.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear.weight",
    ),
    "audioflamingo3": (
        "audio_tower.conv1.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    ),
    "granite_speech": (
        "encoder.input_linear.weight",
        "language_model.model.embed_tokens.weight",
        "projector.query",
    ),
    "qwen2_5_omni": (
        "thinker.audio_tower.conv1.weight",
        "thinker.model.layers.0.mlp.down_proj.weight",
        "thinker.lm_head.weight",
    ),
    "qwen3_omni": (
        "thinker.model.layers.0.mlp.experts.3.down_proj.weight",
        "thinker.lm_head.weight",
    ),
    "musicflamingo": ("language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"),
    "qwen3_asr": ("model.audio_tower.conv_out.weight",),
    "glmasr": ("language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"),
}


# What vLLM 0.33 loads (its registry.py and the class's own file, read, not run): architectures in
# config.json, what its hf_to_vllm_mapper makes of the beginnings of names, and its modules
OMNI_MAPPER = {
    "thinker.lm_head.": "language_model.lm_head.",
    "thinker.model.": "language_model.model.",
    "thinker.": "",
}
LANGUAGE = ("language_model.model.", "language_model.lm_head.")
SERVED = {
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {},
        ("audio_tower.", "multi_modal_projector.linear.", *LANGUAGE),
    ),
    "audioflamingo3": (
        "AudioFlamingo3ForConditionalGeneration",
        {},
        ("audio_tower.", "multi_modal_projector.", *LANGUAGE),
    ),
    "granite_speech": (
        "GraniteSpeechForConditionalGeneration",
        {"language_model.model.model.": "language_model.model."},
        ("encoder.", "projector.", *LANGUAGE),
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniForConditionalGeneration",
        OMNI_MAPPER,
        ("audio_tower.", "visual.", *LANGUAGE),
    ),
    "qwen3_omni": (
        "Qwen3OmniMoeForConditionalGeneration",
        OMNI_MAPPER,
        ("audio_tower.", "visual.", *LANGUAGE),
    ),
    "qwen3_asr": (
        "Qwen3ASRForConditionalGeneration",
        {
            "model.audio_tower.": "audio_tower.",
            "model.language_model.": "language_model.model.",
            "model.multi_modal_projector.linear_1.": "audio_tower.proj1.",
            "model.multi_modal_projector.linear_2.": "audio_tower.proj2.",
        },
        ("audio_tower.", *LANGUAGE),
    ),
    "glmasr": (
        "GlmAsrForConditionalGeneration",
        {},
        ("audio_tower.", "multi_modal_projector.", *LANGUAGE),
    ),
}


def assert_vllm_loads(name, folder, names):
    if name == "musicflamingo":  # no longer, since vLLM 0.24
        return
    architecture, mapper, modules = SERVED[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [architecture]
    for tensor in names:
        for prefix, instead in mapper.items():
            if tensor.startswith(prefix):
                tensor = instead + tensor.removeprefix(prefix)
                break
        assert tensor.startswith(modules), tensor
    # Its processor is transformers' own, of these files
    files = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files
    assert files & {"processor_config.json", "preprocessor_config.json"}


def test_saved_under_the_hubs_names_and_equal_in_a_fresh_process(loaded, examples, tmp_path):
    batches = {}
    for name, (model, processor) in loaded.items():
        folder = tmp_path / name
        folder.mkdir()
        saving.save(model, processor, folder)
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert set(HUB[name]) <= names and not any("model.model.model" in n for n in names), name
        assert_vllm_loads(name, folder, names)
        view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
        batches[name] = {key: x for key, x in view.inputs.items() if key != "position_ids"}
        torch.save(batches[name], folder / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *(str(tmp_path / name) for name in loaded)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for name, (model, processor) in loaded.items():
        logits, vocabulary, template, eos = torch.load(
            tmp_path / name / "out.pt", weights_only=True
        )
        with torch.no_grad():
            torch.testing.assert_close(logits, model(**batches[name]).logits, atol=1e-5, rtol=1e-5)
        assert (
            vocabulary == processor.tokenizer.get_vocab()
            and template == processor.chat_template
            and eos == model.generation_config.eos_token_id
        )


@pytest.mark.parametrize("adapter", [False, True])
def test_tokenizer_and_processor_are_the_bases_own_files(adapter, folders, tmp_path):
    """Byte for byte, whatever version wrote them, and though the base is gone by then: what
    transformers 5 would write, 4 cannot read."""
    base = altered(
        folders["qwen2_audio"][0],
        tmp_path / "base",
        drop=("processor_config.json",),
        merges__txt="#version: 0.2\n",
    )
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop(
        "extra_special_tokens"
    )  # as transformers 4 wrote it
    files = {
        "tokenizer_config.json": json.dumps(config),
        "processor_config.json": (folders["qwen2_audio"][0] / "processor_config.json").read_text()
        + "\n",
    }
    for name, text in files.items():
        (base / name).write_text(text)
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.name in hub.PROCESSOR}
    model, processor = models.load_audio_model(base)
    if adapter:
        models.choose_trained(model, "decoder", list(model.parameters()), lora=2)
    shutil.rmtree(base)
    (tmp_path / "saved").mkdir()
    saving.save(model, processor, tmp_path / "saved")
    after = {
        path.name: path.read_bytes()
        for path in (tmp_path / "saved").iterdir()
        if path.name in hub.PROCESSOR
    }
    assert (
        after == before
        and {
            "tokenizer.json",
            "tokenizer_config.json",
            "processor_config.json",
            "chat_template.jinja",
        }
        <= before.keys()
    )
    if not adapter:  # a checkpoint is a base in its turn
        (tmp_path / "again").mkdir()
        saving.save(*models.load_audio_model(tmp_path / "saved"), tmp_path / "again")
        assert all(
            (tmp_path / "again" / name).read_bytes() == content for name, content in before.items()
        )


@pytest.mark.parametrize(
    "name, whole, architecture",
    [
        ("qwen2_5_omni", "qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration"),
        ("qwen3_omni", "qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration"),
    ],
)
def test_an_omni_is_saved_as_the_whole_of_which_it_is_the_thinker(
    name, whole, architecture, loaded, tmp_path
):
    """By these names AutoConfig and vLLM's registry know it; and our own loader reads it back, to
    go on too."""
    model, processor = loaded[name]
    saving.save(model, processor, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["enable_audio_output"]) == (
        whole,
        [architecture],
        False,
    )
    assert config["thinker_config"]["model_type"] == f"{whole}_thinker"
    assert type(AutoConfig.from_pretrained(tmp_path).thinker_config) is type(model.config)
    again, filled = models.load_audio_model(tmp_path)[0], copy.deepcopy(model)
    with torch.no_grad():
        models.head_weight(filled).zero_()
    saving.fill(filled, tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor) and torch.equal(
            filled.state_dict()[key], tensor
        )
    assert (
        again.config.get_text_config().rope_parameters
        == model.config.get_text_config().rope_parameters
    )


def test_rotary_settings_have_their_old_names_too():
    """transformers 4 does not know rope_parameters, and would take its own default for theta
    without a word."""
    saved = hub.hub_config(
        {
            "model_type": "qwen2_audio",
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        }
    )
    assert saved["text_config"] == {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_theta": 5e5,
        "rope_scaling": None,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "dtype": "float32",
        "text_config": {"rope_parameters": rope},
    }
    text = hub.hub_config(thinker)["thinker_config"]["text_config"]
    assert text["rope_theta"] == 1e6 and text["rope_scaling"] == {
        "rope_type": "default",
        "mrope_section": [2, 2, 2],
    }
    assert text["rope_parameters"] == rope


@pytest.mark.parametrize(
    "name", [pytest.param("qwen2_audio", marks=pytest.mark.slow), "qwen2_5_omni"]
)
def test_what_is_saved_loads_with_transformers_alone(name, loaded, tmp_path):
    """README's command for another environment, in this one: no tensor is left over, and the logits
    are ours."""
    model, processor = loaded[name]
    saving.save(model, processor, tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", str(ROOT / "tests/loads_elsewhere.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "{'missing': 0, 'unexpected': 0, 'mismatched': 0}" in done.stdout
    wave = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    with torch.no_grad():
        question = data.audio_prompt(processor, "What is that?")
        ids, features = data.audio_inputs(processor, [question], [wave])
        prompts = data.Prompts([], ids, [], features)
        view = data.audio_view(prompts, [0], [[]], processor)
        logits = (models.hear(model, **view.inputs) @ models.head_weight(model).T)[0, -1]
    norm = float(re.search(r"norm ([\d.]+)", done.stdout)[1])
    assert (
        norm == pytest.approx(logits.norm().item(), rel=1e-3)
        and f"logits {logits.argmax().item()} " in done.stdout
    )


def test_large_models_are_saved_in_shards_of_5_gb(loaded, tmp_path, monkeypatch):
    model, processor = loaded["qwen2_audio"]
    asked = {}

    def save(self, folder, **how):
        asked.update(how)
        self.config.save_pretrained(folder)

    monkeypatch.setattr(type(model), "save_pretrained", save)
    saving.save(model, processor, tmp_path)
    assert asked["max_shard_size"] == "5GB" and asked["state_dict"]


def test_the_card_says_what_the_model_is(tmp_path):
    saving.write_card(
        tmp_path,
        {
            "student": "Qwen/Qwen2-Audio-7B-Instruct",
            "lr": 3e-5,
            "batch_size": 64,
            "resume": None,
        },
        results="audio 51.7 61.7",
    )
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen2-Audio-7B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["audio", "distillation"],
    }
    for words in ("batch_size: 64", "audio 51.7 61.7"):
        assert words in card.text
    assert "resume" not in card.text

    # A folder is none of the hub's models, and its validator would refuse the card
    for base in (str(models.MINI / "student"), "mini/student"):
        saving.write_card(tmp_path, {"student": base})
        card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model is None and f"student: {base}" in card.text


# ------------------------------------------- the traps -------------------------------------------


def refused(match, work, *a, **k):
    with pytest.raises(SystemExit, match=match):
        work(*a, **k)


def test_a_model_that_does_not_hear_is_refused(loaded):
    model, processor = copy.deepcopy(loaded["qwen2_audio"][0]), loaded["qwen2_audio"][1]
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, given, out: torch.zeros_like(out)
    )
    refused(
        "does not hear: other sound in the same prompt leaves hidden states",
        hearing.check,
        model,
        processor,
    )
    deaf = copy.deepcopy(loaded["qwen2_audio"][0])
    deaf.model.register_forward_pre_hook(
        lambda module, a, k: (a, {**k, "input_features": None}), with_kwargs=True
    )  # as with the keyword audios=
    refused(
        "does not scatter the sound into the prompt's embeddings", hearing.check, deaf, processor
    )


@pytest.mark.parametrize("name", NAMES)
def test_too_few_placeholders_are_noticed(name, loaded, monkeypatch):
    """Omni would take the sound's beginning for the whole, without a word."""
    model, processor = loaded[name]
    inputs = data.audio_inputs

    def one_less(*a):
        ids, features = inputs(*a)
        ids[0].remove(processor.tokenizer.convert_tokens_to_ids(processor.audio_token))
        return ids, features

    monkeypatch.setattr(data, "audio_inputs", one_less)
    refused(
        "does not put the sound where|does not take what its processor makes of a clip",
        hearing.check,
        model,
        processor,
    )


def test_a_window_of_300_seconds_is_not_padded_to_its_end(loaded, examples):
    """Omni's features, cropped, are those of the processor's own padding, frame for frame, in any
    company; 2,000 times less memory."""
    _, processor = loaded["qwen2_5_omni"]
    waves = [data.load_audio(e.audio).numpy() for e in examples[:3]]
    prompt = data.audio_prompt(processor, "What?")
    whole = processor(
        text=[prompt] * 3, audio=waves, sampling_rate=16_000, padding=True, return_tensors="pt"
    )
    ids, cropped = data.audio_inputs(processor, [prompt] * 3, waves)
    assert whole["input_features"].shape[-1] == 30_000 and cropped["input_features"].shape[-1] < 110
    mask = cropped["feature_attention_mask"].bool()
    assert torch.equal(mask.sum(1), whole["feature_attention_mask"].sum(1))
    for i in range(3):
        n = int(mask[i].sum())
        torch.testing.assert_close(
            cropped["input_features"][i, :, :n],
            whole["input_features"][i, :, :n],
            atol=1e-5,
            rtol=0,
        )
    assert [
        row.count(processor.tokenizer.convert_tokens_to_ids(processor.audio_token)) for row in ids
    ] == (whole["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")).sum(
        1
    ).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_final_norm_is_counted_once_and_labels_are_the_response(name, loaded, examples):
    model, processor = loaded[name]
    batch = data.collate(examples[:2], processor, processor.tokenizer, words="transcript")
    responses = [
        data.encode_response(processor.tokenizer, data.response_text(e)) for e in examples[:2]
    ]
    assert batch.labels.tolist() == sum(responses, [])  # no placeholder, no pad, and the turn's end
    decoder = models.decoder(model)
    tap = layer_map.Tap(decoder.layers, {"response": [len(decoder.layers)]})
    with torch.no_grad(), tap.at(response=batch.audio.predict_positions) as hidden:
        last = models.hear(model, **batch.audio.inputs).flatten(0, 1)[batch.audio.predict_positions]
    (raw,) = hidden["response"].values()
    torch.testing.assert_close(decoder.norm(raw), last)
    assert (raw - last).abs().max() > 0.1
    with torch.no_grad():
        logits = model(
            **{k: x for k, x in batch.audio.inputs.items() if k != "position_ids"}
        ).logits.flatten(0, 1)[batch.audio.predict_positions]
    torch.testing.assert_close(last @ models.head_weight(model).T, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_towers_of_16_bits_take_features_of_32(name, loaded, examples):
    model, processor = copy.deepcopy(loaded[name][0]), loaded[name][1]
    view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
    with torch.no_grad():
        right = models.hear(model, **view.inputs)
        models.cast(model, torch.bfloat16)
        rough = models.hear(model, **view.inputs)
    real = view.inputs["attention_mask"].bool()
    # Rounding sends a token to another expert now and then
    limit = {"qwen3_omni": 0.3, "qwen3_asr": 0.2}.get(name, 0.1)
    assert (
        rough.dtype == torch.bfloat16
        and (rough[real].float() - right[real]).norm() < limit * right[real].norm()
    )


@pytest.mark.slow
@pytest.mark.parametrize("script, lora", [(train_source_layer, 0), (train_cord, 4)])
def test_two_processes_are_one_and_nobody_waits_for_what_never_gets_a_gradient(
    script, lora, folders, world, tmp_path
):
    """Omni: its vision tower and more would stop DDP at the second step. With LoRA, adapters go on
    and off inside the wrapped forward."""
    student, teacher = map(str, folders["qwen2_5_omni"])
    flags = [
        "--data",
        str(world),
        "--student",
        student,
        "--batch-size",
        "4",
        "--micro-batch",
        "2",
        "--max-steps",
        "3",
        "--no-eval",
        "--train",
        "all",
        "--max-new-tokens",
        "8",
    ]
    flags += (["--teacher", teacher] if script is train_source_layer else ["--group-size", "2"]) + (
        ["--lora", str(lora)] if lora else []
    )
    script.main([*flags, "--out", str(tmp_path / "one")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            script.__file__,
            *flags,
            "--out",
            str(tmp_path / "two"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-5) and two[
            "grad_norm"
        ] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_a_run_with_lora_goes_on_and_merges(folders, world, tmp_path):
    student, teacher = map(str, folders["qwen2_5_omni"])
    flags = [
        "--data",
        str(world),
        "--student",
        student,
        "--teacher",
        teacher,
        "--batch-size",
        "2",
        "--micro-batch",
        "2",
        "--no-eval",
        "--lora",
        "4",
        "--lr",
        "1e-2",
    ]
    train_source_layer.main([*flags, "--out", str(tmp_path / "whole"), "--max-steps", "4"])
    models.main(
        [str(tmp_path / "whole" / "step-0000004"), "--save", str(tmp_path / "whole" / "merged")]
    )
    train_source_layer.main(
        [*flags, "--out", str(tmp_path / "parts"), "--max-steps", "4", "--save-every", "2"]
    )
    shutil.rmtree(tmp_path / "parts" / "step-0000004")
    train_source_layer.main(
        [*flags, "--out", str(tmp_path / "parts"), "--max-steps", "4", "--resume", "auto"]
    )
    whole, parts = (
        safetensors.torch.load_file(tmp_path / name / "step-0000004" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert (
        whole.keys() == parts.keys()
        and all(torch.equal(whole[key], parts[key]) for key in whole)
        and any(x.abs().max() > 0 for k, x in whole.items() if "lora_B" in k)
    )
    merged, from_adapter = (
        models.load_audio_model(tmp_path / "whole" / name)[0].state_dict()
        for name in ("merged", "step-0000004")
    )
    assert all(torch.allclose(merged[key], from_adapter[key], atol=1e-6) for key in merged)
    card = (tmp_path / "whole" / "step-0000004" / "README.md").read_text()
    assert f"{student}, trained further by" in card and "library_name: peft" in card
    refused(
        "was saved by another model, .*size mismatch",
        train_source_layer.main,
        [
            *flags[:-4],
            "--lora",
            "8",
            "--out",
            str(tmp_path / "parts"),
            "--resume",
            str(tmp_path / "parts" / "step-0000004"),
        ],
    )


# ------------------------------------- what cannot be loaded -------------------------------------


def altered(source, folder, change=None, drop=(), **files):
    """A copy of a saved model: its tensors through `change`, some files dropped, others written."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in drop:
            (folder / path.name).write_bytes(path.read_bytes())
    if change:
        tensors = safetensors.torch.load_file(source / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(
            tensors, folder / "model.safetensors", metadata={"format": "pt"}
        )
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_checkpoint_with_wrong_tensors_is_named(folders, tmp_path):
    source = folders["qwen2_5_omni"][0]
    lost = altered(
        source, tmp_path / "lost", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")
    )
    # the module's own name, which in transformers 5.24 has .language_model in it
    own = r"model\.(language_model\.)?layers\.1\.mlp\.up_proj\.weight"
    refused(
        rf"1 tensors are missing, such as {own}; get the checkpoint again",
        models.load_audio_model,
        lost,
    )
    more = altered(
        source,
        tmp_path / "more",
        lambda tensors: tensors.update({"extra.x": torch.zeros(2), "extra.y": torch.zeros(2)}),
    )
    refused("2 tensors are unexpected, such as extra.x", models.load_audio_model, more)
    with pytest.raises(ValueError, match=f"1 tensors are missing, such as {own}"):
        saving.fill(
            models.load_audio_model(source)[0], lost
        )  # a resume would go on with random ones
    torn = altered(source, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    refused("cannot load an audio language model", models.load_audio_model, torn)
    wide = altered(
        source,
        tmp_path / "wide",
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 48)}),
    )
    refused("cannot load an audio language model", models.load_audio_model, wide)


def test_a_whole_omni_gives_its_thinker(folders, loaded, tmp_path):
    """The hub's checkpoint holds a talker as well, and names the thinker's tensors thinker.*"""
    source = folders["qwen2_5_omni"][0]

    def whole(tensors):
        for name in list(tensors):
            tensors[f"thinker.{name}"] = tensors.pop(name)
        tensors["talker.model.embed_tokens.weight"] = torch.zeros(4, 4)
        tensors["token2wav.x"] = torch.zeros(2)

    config = json.dumps(
        {
            "model_type": "qwen2_5_omni",
            "architectures": ["Qwen2_5OmniModel"],
            "thinker_config": json.loads((source / "config.json").read_text()),
        }
    )
    folder = altered(source, tmp_path / "whole", whole, config__json=config)
    model, processor = models.load_audio_model(folder)
    ours = loaded["qwen2_5_omni"][0].state_dict()
    assert model.state_dict().keys() == ours.keys() and all(
        torch.equal(x, ours[name]) for name, x in model.state_dict().items()
    )
    hearing.check(model, processor)
    (tmp_path / "saved").mkdir()
    saving.save(model, processor, tmp_path / "saved")
    with safetensors.safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"thinker"} and not any(
            "thinker.thinker" in name for name in file.keys()
        )
    again = models.load_audio_model(tmp_path / "saved")[0]
    assert all(torch.equal(x, ours[name]) for name, x in again.state_dict().items())


def test_pickles_are_refused(folders, tmp_path):
    folder = altered(folders["qwen2_audio"][0], tmp_path / "pickle", drop=("model.safetensors",))
    torch.save({}, folder / "pytorch_model.bin")
    refused(
        "cannot load an audio language model from .*safetensors", models.load_audio_model, folder
    )


def indexed(source, folder, shard):
    """A copy of a saved model in two shards: one of them named `shard`, by the index alone."""
    altered(source, folder, drop=("model.safetensors",))
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    first = {name: tensors.pop(name) for name in list(tensors)[:3]}
    safetensors.torch.save_file(tensors, folder / "rest.safetensors", metadata={"format": "pt"})
    if shard.endswith(".bin"):
        torch.save(first, folder / shard)
    else:
        safetensors.torch.save_file(first, folder / shard, metadata={"format": "pt"})
    files = dict.fromkeys(first, shard) | dict.fromkeys(tensors, "rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    return folder


@pytest.mark.parametrize("shard", ["weights.bin", "../outside.safetensors", "absolute"])
def test_an_index_that_names_other_files_is_refused(shard, folders, loaded, tmp_path):
    shard = str(tmp_path / "absolute.safetensors") if shard == "absolute" else shard
    source = folders["qwen2_audio"][0]
    models.load_audio_model(indexed(source, tmp_path / "good", "first.safetensors"))
    folder = indexed(source, tmp_path / "bad", shard)
    refused(
        "wants .*, which is no safetensors file inside this folder; get the checkpoint again",
        models.load_audio_model,
        folder,
    )
    refused(
        "wants .*, which is no safetensors file inside this folder",
        saving.fill,
        copy.deepcopy(loaded["qwen2_audio"][0]),
        folder,
    )


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": 3}'])
def test_a_broken_index_is_a_sentence(text, folders, tmp_path):
    folder = altered(folders["qwen2_audio"][0], tmp_path / "index",
                     model__safetensors__index__json=text)
    refused(
        "model.safetensors.index.json is broken|cannot load an audio language model",
        models.load_audio_model,
        folder,
    )


@pytest.mark.parametrize("text", ['{"base', "[]", "{}"])
def test_a_broken_adapter_config_is_a_sentence(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    refused(
        "adapter_config.json (is broken|does not say which model the adapter is for)",
        models.load_audio_model,
        tmp_path,
    )


def test_an_omnis_inner_config_may_name_no_other_weights(folders, tmp_path):
    source = folders["qwen2_5_omni"][0]
    config = hub.hub_config(json.loads((source / "config.json").read_text()))
    config["thinker_config"]["transformers_weights"] = "x.safetensors.index.json"
    folder = altered(source, tmp_path / "omni", config__json=json.dumps(config))
    refused("wants x.safetensors.index.json loaded", models.load_audio_model, folder)


def test_a_config_that_names_other_weights_is_refused(folders, tmp_path):
    source = folders["qwen2_audio"][0]
    config = json.loads((source / "config.json").read_text())
    config["transformers_weights"] = "adapter_model.bin"
    folder = altered(source, tmp_path / "named", config__json=json.dumps(config))
    refused(
        "wants adapter_model.bin loaded, which is no safetensors file",
        models.load_audio_model,
        folder,
    )


@pytest.mark.parametrize("by_name", [True, False])
def test_the_hubs_cache_is_all_links_and_loads(by_name, folders, tmp_path, monkeypatch):
    """snapshots/COMMIT/FILE -> ../../blobs/HASH, by the model's name or by the snapshot's own
    folder."""
    store, commit = tmp_path / "models--some--model", "0" * 40
    (store / "snapshots" / commit).mkdir(parents=True)
    (store / "blobs").mkdir()
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    for path in folders["qwen2_audio"][0].iterdir():
        (store / "blobs" / path.name).write_bytes(path.read_bytes())
        (store / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    models.load_audio_model("some/model" if by_name else store / "snapshots" / commit)


def test_an_adapter_in_a_pickle_is_refused(adapted, folders, tmp_path, capfd):
    """Beside a model's own weights, as Granite Speech has one, or alone: what it would execute is
    not executed."""

    class Trap:
        def __reduce__(self):
            return print, ("EXECUTED",)

    model, processor, _ = adapted
    (tmp_path / "alone").mkdir()
    saving.save(model, processor, tmp_path / "alone")
    (tmp_path / "alone" / "adapter_model.safetensors").unlink()
    beside = altered(folders["granite_speech"][0], tmp_path / "beside")
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    (beside / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(beside)})
    )
    for folder in (tmp_path / "alone", beside):
        torch.save({"x": Trap()}, folder / "adapter_model.bin")
        refused("cannot load an audio language model", models.load_audio_model, folder)
    assert "EXECUTED" not in capfd.readouterr().out


def test_a_processor_without_a_template_of_its_own_is_refused(tmp_path):
    """Voxtral: its prompts are made by mistral-common alone."""
    words = families.tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[AUDIO]"],
        families.OMNI_TEMPLATE,
        "<|im_end|>",
    )
    ears = dict(
        num_mel_bins=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_source_positions=1500,
    )
    config = VoxtralConfig(
        audio_config=ears,
        text_config=families.text_shape(words, model_type="llama"),
        audio_token_id=words.convert_tokens_to_ids("[AUDIO]"),
    )
    VoxtralForConditionalGeneration(config).save_pretrained(tmp_path)
    VoxtralProcessor(
        WhisperFeatureExtractor(feature_size=16, chunk_length=30), words
    ).save_pretrained(tmp_path)
    with pytest.raises(data.DataError, match="does not put one audio placeholder"):
        hearing.check(*models.load_audio_model(tmp_path))


def test_names_that_cannot_be_had(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(
        "cannot load an audio language model from Qwen/Nothing-7B .*"
        "a hub id needs the network once, or its files in the hub's cache",
        models.load_audio_model,
        "Qwen/Nothing-7B",
    )
    refused(
        "cannot load a causal language model from .*nowhere",
        models.load_text_model,
        tmp_path / "nowhere",
    )
    refused(
        "which takes no audio|cannot load an audio language model",
        models.load_audio_model,
        folders["qwen2_audio"][1],
    )


def test_a_placeholder_that_is_no_token_is_refused(folders, tmp_path):
    source = folders["granite_speech"][0]
    config = json.loads((source / "processor_config.json").read_text())
    folder = altered(
        source,
        tmp_path / "odd",
        processor_config__json=json.dumps({**config, "audio_token": "<|noise|>"}),
    )
    refused(
        r"the processor's audio placeholder <\|noise\|> is not in its tokenizer",
        models.load_audio_model,
        folder,
    )


@pytest.mark.parametrize("keeper", ["processor", "tokenizer"])
def test_one_template_serves_both_views(keeper, folders, tmp_path, monkeypatch):
    """Kept with one of the two alone, or another with each: the text view is asked as the audio
    view is."""
    load = models._load

    def bare(*a):
        model, processor = load(*a)
        if keeper == "tokenizer":
            processor.chat_template = None
        else:
            processor.tokenizer.chat_template = processor.chat_template.replace(
                "assistant", "system\nYou are somebody else."
            )
        return model, processor

    monkeypatch.setattr(models, "_load", bare)
    _, processor = models.load_audio_model(folders["qwen2_audio"][0])
    heard, read = data.audio_prompt(processor, "What?"), data.text_prompt(
        processor.tokenizer, "", "What?"
    )
    assert (
        read in (heard.replace("Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n", ""), heard)
        and "somebody" not in read
    )


def test_a_template_that_never_closes_turns_is_refused_at_the_start(folders, tmp_path):
    template = families.OMNI_TEMPLATE.replace("<|im_end|>\n", "")
    for load, source in zip(
        (models.load_audio_model, models.load_text_model), folders["qwen2_audio"]
    ):
        folder = altered(source, tmp_path / source.name, chat_template__jinja=template)
        refused(
            "closes an assistant's turn with no special token, so that nothing would say "
            "where an answer ends",
            load,
            folder,
        )


def test_a_placeholder_that_is_not_special_is_banned(loaded):
    """Sampled, it would ask the next forward for audio that is not there."""
    model, processor = loaded["qwen2_audio"]
    words = families.tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], TEACHER_TEMPLATE, "<|im_end|>"
    )
    words.add_tokens([processor.audio_token])
    assert words.convert_tokens_to_ids(processor.audio_token) == model.config.audio_token_id
    assert model.config.audio_token_id in rollout.banned_ids(model, words)


def test_a_template_without_a_place_for_sound_is_refused(loaded):
    processor = copy.deepcopy(loaded["qwen2_audio"][1])
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(
        data.DataError, match=r"does not put one audio placeholder <\|AUDIO\|> for one clip"
    ):
        data.audio_prompt(processor, "What?")


def test_heads_that_do_more_than_multiply_are_refused(folders, loaded, tmp_path):
    """Granite's text models divide their logits by a constant: losses.py would learn another
    distribution."""
    words = families.tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], TEACHER_TEMPLATE, "<|im_end|>"
    )
    words.save_pretrained(tmp_path / "granite")
    GraniteForCausalLM(
        GraniteConfig(**families.text_shape(words), logits_scaling=8.0)
    ).save_pretrained(tmp_path / "granite")
    refused(
        "does not get its logits by its head's matrix alone",
        hearing.check_teacher,
        models.load_text_model(tmp_path / "granite")[0],
    )
    hearing.check_teacher(models.load_text_model(folders["qwen2_audio"][1])[0])
    model = copy.deepcopy(loaded["qwen2_audio"][0])
    model.lm_head.bias = torch.nn.Parameter(torch.ones(len(model.lm_head.weight)))
    refused("has a bias", hearing.check, model, loaded["qwen2_audio"][1])


def test_rollouts_cannot_share_a_prompt_where_attention_takes_no_mask(loaded, monkeypatch):
    model, processor = loaded["qwen2_audio"]
    view = data.audio_view

    def blind(*a):  # as a family would see it that makes its own causal mask
        made = view(*a)
        mask = made.inputs["attention_mask"]
        return replace(
            made,
            inputs={
                **made.inputs,
                "attention_mask": mask if mask.dim() == 2 else mask[:, 0, -1].long() * 0 + 1,
            },
        )

    monkeypatch.setattr(data, "audio_view", blind)
    refused("does not take a mask of its own", hearing.check, model, processor, shared_prompts=True)


def deep(model, **text):
    """A model of 28 layers in bfloat16, made as `model` is, with other settings of its decoder."""
    config = copy.deepcopy(model.config)
    for name, value in {
        "num_hidden_layers": 28,
        "layer_types": ["full_attention"] * 28,
        **text,
    }.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    return models.cast(type(model)(config).eval(), torch.bfloat16)


def test_a_good_model_in_16_bits_passes_and_comes_back_as_it_was(loaded):
    """Other kernels round otherwise: one step of bfloat16 in every layer is several per cent at the
    end of 28, and nothing is wrong. (For one shape a kernel rounds in one way.)"""
    model, processor = deep(loaded["qwen2_audio"][0]), loaded["qwen2_audio"][1]

    def rounds(module, given, out):
        shape = torch.Generator().manual_seed(out.numel())
        noise = torch.randn(out.shape, generator=shape, dtype=out.dtype)
        return out * (1 + 2 * torch.finfo(out.dtype).eps * noise)

    for layer in models.decoder(model).layers:
        layer.register_forward_hook(rounds)
    before, head = {
        name: x.clone() for name, x in model.state_dict().items()
    }, model.get_output_embeddings()
    hearing.check(model, processor, shared_prompts=True)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in after.items()
    )
    assert model.get_output_embeddings() is head and len(models.decoder(model).layers) == 28
    with torch.no_grad():  # nothing of the check is left behind
        assert model.get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16


def test_rollouts_that_would_see_each_other_are_noticed(loaded, monkeypatch):
    """The branch mask away, in a deep model in bfloat16: 2 to 4 per cent of its last hidden states.
    """
    model, processor = deep(loaded["qwen2_audio"][0]), loaded["qwen2_audio"][1]
    view = data.audio_view

    def causal(*a):
        made = view(*a)
        mask = made.inputs["attention_mask"]
        if mask.dim() == 4:
            seq = mask.shape[-1]
            mask = torch.ones(seq, seq, dtype=torch.bool).tril().expand_as(mask)
        return replace(made, inputs={**made.inputs, "attention_mask": mask})

    hearing.check(model, processor, shared_prompts=True)
    monkeypatch.setattr(data, "audio_view", causal)
    refused("does not take a mask of its own", hearing.check, model, processor, shared_prompts=True)


def test_capped_logits_are_refused(loaded):
    """A cap of 30 changes a random model's small logits by less than a thousandth, a trained one's
    by much."""
    shape = families.text_shape(
        loaded["qwen2_audio"][1].tokenizer, num_hidden_layers=2, head_dim=12
    )
    for cap in (None, 30.0):
        torch.manual_seed(0)
        teacher = Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=cap)).eval()
        if cap:
            refused("scales or caps them", hearing.check_teacher, teacher)
        else:
            hearing.check_teacher(teacher)
    capped = copy.deepcopy(loaded["qwen2_audio"][0])

    def cap(module, given, output):
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    capped.register_forward_hook(cap)
    refused("scales or caps them", hearing.check, capped, loaded["qwen2_audio"][1])


def test_rollouts_cannot_share_a_prompt_that_a_layer_does_not_see_whole(loaded):
    """The mask of their own is every layer's: the window would be off without a word."""
    whole, processor = loaded["qwen2_audio"]
    match = "has layers that do not see the whole prompt .*; take a model with full attention"
    model = deep(
        whole,
        layer_types=["full_attention", "sliding_attention"] * 14,
        use_sliding_window=True,
        sliding_window=8,
    )
    refused(match, hearing.check, model, processor, shared_prompts=True)
    hearing.check(model, processor)  # paper A shares no prompts

    old = copy.deepcopy(whole)  # a config that does not list its layers
    config = models.decoder(old).config
    config.layer_types, config.use_sliding_window, config.sliding_window = None, True, 8
    refused(match, hearing.check, old, processor, shared_prompts=True)
    config.sliding_window = config.max_position_embeddings  # a window that no sequence fills
    hearing._check_window(old)
    config.sliding_window, config.use_sliding_window = 8, False
    hearing._check_window(old)


# ------------------------------------------ shapes ------------------------------------------------


def test_a_papers_shape_is_saved_and_loads(tmp_path, monkeypatch):
    """python -m lab.shapes: narrow here, otherwise as it stands in the recipe."""
    for name, value in {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}.items():
        monkeypatch.setitem(shapes.TEACHERS["Qwen/Qwen3-8B"], name, value)
    command = ["Qwen/Qwen3-8B", "--layers", "1", "--save", str(tmp_path / "teacher")]
    shapes.main(command)
    teacher, tokenizer = models.load_text_model(tmp_path / "teacher")
    assert len(models.decoder(teacher).layers) == 1
    assert tokenizer.encode("w7 nothing") == [7, 151_600]
    refused("is there already", shapes.main, command)
