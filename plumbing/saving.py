"""Models on disk: saved as the hub has them, filled in again, and the card beside them."""

import copy
import json
import re
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

import models
from plumbing import hub

ADAPTER_WEIGHTS = "adapter_model.safetensors"           # peft's name for the file


def save(model, processor, folder, state=None):
    """Weights under the hub's own names as safetensors of at most 5 GB, config, generation config,
    tokenizer, processor and chat template. With LoRA the adapter alone, as peft saves it. state:
    the model's state_dict, where it had to be gathered from many ranks.

    Tokenizer and processor are the base's own files, byte for byte: nothing here changes them, and
    what transformers 5 writes 4 cannot read."""
    state = model.state_dict() if state is None else state
    folder = Path(folder)
    if models.has_lora(model):
        named = {key: state[name] for key, name in _adapter_names(state).items()}
        save_file(named, folder / ADAPTER_WEIGHTS)
        model.peft_config["default"].save_pretrained(folder)
    else:
        _save_weights(model, folder, state)
    files = getattr(model, "processor_files", {})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not files:
        processor.save_pretrained(folder)


def _adapter_names(state):
    # The names that peft's PeftModel gives to an adapter's matrices -> their names in a state_dict
    names = [name for name in state if ".lora_" in name]
    return {f"base_model.model.{name.replace('.default', '')}": name for name in names}


def _save_weights(model, folder, state):
    # On the CPU: the hub's layout of experts is a copy
    state = {name: tensor.cpu() for name, tensor in state.items()}
    embedding = models.decoder(model).get_input_embeddings().weight
    if model.get_output_embeddings().weight is embedding:       # one matrix, saved once
        state = {name: x for name, x in state.items() if not name.endswith("lm_head.weight")}
    state = hub.hub_names(model, state)
    model.save_pretrained(
        folder, state_dict=state, save_original_format=False, max_shard_size="5GB"
    )
    config = folder / "config.json"
    config.write_text(json.dumps(hub.hub_config(json.loads(config.read_text())), indent=2) + "\n")


def fill(model, folder):
    """A saved model's weights, or its adapter's, into this one in place. Raises OSError,
    RuntimeError or ValueError where they do not fit."""
    hub.check_weights(folder)
    if models.has_lora(model):
        saved = load_file(Path(folder) / ADAPTER_WEIGHTS)
        ours = _adapter_names(model.state_dict())
        if saved.keys() != ours.keys():
            raise ValueError(f"an adapter of {len(saved)} matrices does not fit one of {len(ours)}")
        model.load_state_dict({ours[key]: x for key, x in saved.items()}, strict=False)
        return
    # Through the class, because the hub's names are not the module's own; with this model's
    # config: without a config.json the class would build its default of 7B
    saved, loading = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=model.dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    for kind in ("missing", "unexpected"):
        names = sorted(loading[f"{kind}_keys"])
        if names:
            raise ValueError(f"{len(names)} tensors are {kind}, such as {names[0]}")
    model.load_state_dict(saved.state_dict())


def write_card(folder, flags, results=None):
    """README.md beside the weights: the base (flags["student"]), the flags, and what the model
    scored (a table, as text)."""
    folder, base = Path(folder), flags["student"]
    card = ["---", "pipeline_tag: audio-text-to-text", "tags: [audio, distillation]"]
    library = "peft" if (folder / models.ADAPTER).exists() else "transformers"
    card += [f"library_name: {library}"]
    # The hub takes its own ids alone, no folders
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        card += [f"base_model: {base}"]
    script = Path(sys.argv[0]).name
    card += ["---", f"# {base}, trained further by {script}", "", "With these flags:", "", "```"]
    card += [f"{name}: {value}" for name, value in flags.items() if value is not None]
    card += ["```"]
    if results:
        card += ["", "## Results, before and after", "", "```", results, "```"]
    (folder / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")


def save_new(model, processor, folder):
    """Make a folder and save a model there."""
    Path(folder).mkdir(parents=True)
    save(model, processor, folder)
    print(f"{folder}: {model.num_parameters():,} parameters saved")
