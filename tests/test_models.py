"""Five families at random weights: the same five questions answered rightly by each, both scripts end to end, and every trap sprung once."""
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import soundfile
import torch

import data
import families
import models
import rollout
import train_cord
import train_source_layer
from conftest import TEACHER_TEMPLATE, bpe

ROOT = Path(__file__).parent.parent
NAMES = list(families.FAMILIES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: (student's folder, teacher's folder)}"""
    return {name: families.save_family(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="session")
def loaded(folders):
    """{family: (model, processor)}; do not train these, copy them."""
    return {name: models.load_audio_model(student) for name, (student, _) in folders.items()}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six examples of noise of different lengths, with everything that either paper asks for."""
    folder, noise, lines = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0), []
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", (0.1 * torch.randn(8_000 + 4_321 * i, generator=noise)).numpy(), 16_000)
        stages = dict.fromkeys(data.STAGES, "three plus five" + " then four" * i)
        lines.append({"id": f"s{i}", "audio": f"{i}.wav", "question": "What is seven plus two?" + " Which?" * i, "choices": ["nine", "eight"], "answer": "nine", "task": "speech",
                      "reasoning": stages, "description": "A man says: what" + " is" * i, "transcript": "what is seven plus two" + " minus four" * i})
    (folder / "noise.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "noise.jsonl"


@pytest.fixture
def examples(world):
    return data.read_manifest(world)


# ------------------------------------------------------------- every family ---------------------------------------------------------------

NEVER = {"qwen2_5_omni": ("visual.", "audio_tower.audio_bos_eos_token."), "qwen3_omni": ("visual.",)}


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_what_never_gets_a_gradient(name, loaded):
    model, processor = loaded[name]
    before = [p.requires_grad for p in model.parameters()]
    used = {id(p) for p in models.check(model, processor, shared_prompts=True)}
    unused = [n for n, p in model.named_parameters() if id(p) not in used]
    assert all(n.startswith(NEVER.get(name, ())) for n in unused) and {n.split(".")[0] for n in unused} == {p.split(".")[0] for p in NEVER.get(name, ())}
    assert [p.requires_grad for p in model.parameters()] == before and model.get_output_embeddings().weight is models.head_weight(model)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_company_change_nothing(name, loaded, examples):
    """A batch, padded on either side, is what each example is alone: hidden states, and every generated token."""
    model, processor = loaded[name]
    examples = examples[:3] if name != "granite_speech" else [examples[1]] + [replace(e, audio=examples[1].audio) for e in examples[2:4]]  # its tower has no mask: equal clips
    batch = data.collate(examples, processor, processor.tokenizer, words="transcript")
    with torch.no_grad():
        together = models.hear(model, **batch.audio.inputs).flatten(0, 1)[batch.audio.predict_positions]
        alone = []
        for example in examples:
            one = data.collate([example], processor, processor.tokenizer, words="transcript").audio
            alone.append(models.hear(model, **one.inputs).flatten(0, 1)[one.predict_positions])
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=1e-3)
    said = rollout.generate(model, processor, examples, max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0, progress=False)
    assert said == [rollout.generate(model, processor, [e], max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0, progress=False)[0] for e in examples]
    assert len(set(said)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_are_those_of_plain_generate(name, loaded, examples):
    """From the shared prompt's cache, behind another call of another size (Omni keeps the last call's positions), token for token."""
    model, processor = loaded[name]
    examples = examples[2:4] if name != "granite_speech" else [examples[2], replace(examples[3], audio=examples[2].audio)]
    prompts = data.encode_prompts(examples, processor, processor.tokenizer, words="transcript")
    rollout.generate(model, processor, examples[:1], max_new_tokens=3, progress=False)
    said = rollout.roll_out(model, processor, prompts, [(1.0, True, False), (1.5, False, True)], key="0 5", max_new_tokens=12)
    inputs = data.prompt_batch([e for e in examples for _ in range(2)], processor)
    choose = rollout.chooser([f"0 5 {e.id} {i}" for e in examples for i in range(2)], inputs["input_ids"].shape[1], rollout.banned_ids(model, processor.tokenizer),
                             max_new_tokens=12, temperature=[1.0, 1.5] * 2)
    inputs.pop("position_ids")                              # as transformers counts by itself
    stop = rollout.stop_ids(processor.tokenizer)
    with rollout.plain_decoding(model):
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=stop[0], logits_processor=[choose])
    for r, row in zip(said, plain[:, inputs["input_ids"].shape[1]:].tolist()):
        assert r.ids == row[:len(r.ids)] and len(r.ids) > 2
    assert all(processor.tokenizer.convert_tokens_to_ids(processor.audio_token) not in r.ids for r in said)


def small(world, out, *more):
    return ["--data", str(world), "--eval-data", str(world), "--out", str(out), "--batch-size", "4", "--micro-batch", "2", "--max-new-tokens", "8", "--eval-batch", "8",
            "--dry-run", *more]


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("name", NAMES)
def test_both_scripts_run(name, lora, folders, world, tmp_path):
    student, teacher = map(str, folders[name])
    more = ("--lora", str(lora)) if lora else ()
    train_source_layer.main(small(world, tmp_path / "a", "--student", student, "--teacher", teacher, *more))
    train_cord.main(small(world, tmp_path / "b", "--student", student, *more))
    for out, terms in ((tmp_path / "a", ("top", "layer", "acoustic", "sft")), (tmp_path / "b", ("loss", "kl"))):
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert len(log) == 2 and all(line[term] > 0 for line in log for term in terms if term != "acoustic")
        assert (out / "step-0000002" / ("adapter_model.safetensors" if lora else "model.safetensors")).is_file() and (out / "results.json").is_file()
        models.check(*models.load_audio_model(out / "step-0000002"))        # what was saved is a student again; an adapter with its base


# --------------------------------------------------------------- LoRA --------------------------------------------------------------------

@pytest.fixture
def adapted(loaded):
    """A Qwen2-Audio with an adapter of rank 4 that changes what it says, and the same model without it."""
    model, processor = copy.deepcopy(loaded["qwen2_audio"][0]), loaded["qwen2_audio"][1]
    before = copy.deepcopy(model)
    models.choose_trained(model, "decoder", models.check(model, processor))
    torch.manual_seed(0)
    models.add_lora(model, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model, processor, before


def test_only_the_adapters_learn_and_without_them_the_model_is_what_it_was(adapted, examples):
    model, processor, before = adapted
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns and all(".lora_" in name for name in learns) and not any("audio_tower" in name or "lm_head" in name for name in learns)
    assert sum("multi_modal_projector" in name for name in learns) == 2 and sum(".layers.2." in name for name in learns) == 14        # q k v o gate up down, A and B
    view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
    with torch.no_grad():
        base, changed = models.hear(before, **view.inputs), models.hear(model, **view.inputs)
        with models.without_lora(model):
            off = models.hear(model, **view.inputs)
        again = models.hear(model, **view.inputs)
    assert torch.equal(base, off) and torch.equal(changed, again) and (base - changed).abs().max() > 0.01
    assert learns == {name for name, p in model.named_parameters() if p.requires_grad}


def test_merged_is_equal_and_an_adapter_loads_with_and_without_peft(adapted, folders, examples, tmp_path):
    from peft import PeftModel
    model, processor, before = adapted
    view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
    plain = {name: x for name, x in view.inputs.items() if name != "position_ids"}
    with torch.no_grad():
        right = model(**plain).logits
        (tmp_path / "adapter").mkdir()
        models.save(model, processor, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 0.5 * (folders["qwen2_audio"][0] / "model.safetensors").stat().st_size
        torch.testing.assert_close(models.load_audio_model(tmp_path / "adapter")[0](**plain).logits, right, atol=1e-4, rtol=1e-4)
        elsewhere = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "adapter")
        torch.testing.assert_close(elsewhere(**plain).logits, right)
        fresh = copy.deepcopy(before)
        models.choose_trained(fresh, "decoder", list(fresh.parameters()))
        models.add_lora(fresh, 4)
        models.fill(fresh, tmp_path / "adapter")
        assert torch.equal(fresh(**plain).logits, right)
        models.merge_lora(model)
        assert not models.has_lora(model)
        torch.testing.assert_close(model(**plain).logits, right, atol=1e-4, rtol=1e-4)
        (tmp_path / "merged").mkdir()
        models.save(model, processor, tmp_path / "merged")
        torch.testing.assert_close(models.load_audio_model(tmp_path / "merged")[0](**plain).logits, right, atol=1e-4, rtol=1e-4)
    other = copy.deepcopy(before)
    models.choose_trained(other, "all", list(other.parameters()))
    models.add_lora(other, 4)
    with pytest.raises(ValueError, match="an adapter of 44 matrices does not fit one of"):
        models.fill(other, tmp_path / "adapter")


# -------------------------------------------------------------- saving -------------------------------------------------------------------

FRESH = """
import sys, torch, transformers
from transformers import AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, AutoProcessor
folder, batch, out = sys.argv[1:]
auto = AutoModelForSeq2SeqLM if "flamingo" in folder else AutoModelForMultimodalLM
model, processor = auto.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
with torch.no_grad():
    torch.save((model(**torch.load(batch)).logits, processor.tokenizer.get_vocab(), processor.chat_template or processor.tokenizer.chat_template,
                model.generation_config.eos_token_id), out)
"""
HUB = {"qwen2_audio": ("audio_tower.conv1.weight", "language_model.model.layers.0.mlp.down_proj.weight", "language_model.lm_head.weight", "multi_modal_projector.linear.weight"),
       "audioflamingo3": ("audio_tower.conv1.weight", "language_model.model.layers.0.mlp.down_proj.weight", "language_model.lm_head.weight"),
       "granite_speech": ("encoder.input_linear.weight", "language_model.model.embed_tokens.weight", "projector.query"),
       "qwen2_5_omni": ("audio_tower.conv1.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"),
       "qwen3_omni": ("model.layers.0.mlp.experts.3.down_proj.weight", "lm_head.weight")}


@pytest.mark.parametrize("name", NAMES)
def test_saved_under_the_hubs_names_and_equal_in_a_fresh_process(name, loaded, examples, tmp_path):
    model, processor = loaded[name]
    folder = tmp_path / name
    folder.mkdir()
    models.save(model, processor, folder)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert set(HUB[name]) <= names and not any("model.model.model" in n for n in names)
    view = data.collate(examples[:2], processor, processor.tokenizer, words="transcript").audio
    batch = {key: x for key, x in view.inputs.items() if key != "position_ids"}
    torch.save(batch, tmp_path / "batch.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, str(folder), str(tmp_path / "batch.pt"), str(tmp_path / "out.pt")], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    logits, vocabulary, template, eos = torch.load(tmp_path / "out.pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert vocabulary == processor.tokenizer.get_vocab() and template == processor.chat_template and eos == model.generation_config.eos_token_id
