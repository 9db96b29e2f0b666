"""
The files of a model's folder, as the hub, transformers 4 and vLLM expect them: nothing else is
loaded, and what we save can be loaded elsewhere.
"""
import contextlib
from pathlib import Path

import transformers

from plumbing.files import read_json

THINKER = "_thinker"                    # the end of an Omni's model type without its talker
PROCESSOR = (                           # the files of a tokenizer and a processor
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def check_weights(path, config=None):
    """Every weight that from_pretrained would load of this folder or hub id is by its name a
    safetensors file in it. Raises SystemExit if not.

    A config or an index may name any file, which transformers then opens: a pickle, ../another."""
    names = []
    if getattr(config, "transformers_weights", None):
        names.append(config.transformers_weights)
    with contextlib.suppress(OSError):                      # most models have no index
        index = transformers.utils.cached_file(str(path), "model.safetensors.index.json")
        names += read_json(index)["weight_map"].values()

    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SystemExit(f"{path} wants {name} loaded, which is no safetensors file inside "
                             "this folder; get the checkpoint again, or convert it")


def processor_files(path):
    """The files of a model's tokenizer and processor -> {name: bytes}, read at once: by the time of
    a checkpoint the folder may be gone, or another one."""
    folder = Path(transformers.utils.cached_file(str(path), "config.json")).parent
    files = {}
    for name in PROCESSOR:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files if "tokenizer.json" in files else {}


def hub_names(model, state):
    """A state_dict -> the same under the hub's names.

    transformers 5.17 writes one ".model" too many for decoders inside, which other loaders miss. On
    the hub an Omni's thinker is a part, thinker.* (5.24 says so by itself where the model came from
    a whole one)."""
    from transformers.core_model_loading import revert_weight_conversion
    part = "thinker." if model.config.model_type.endswith(THINKER) else ""
    renamed = {}
    for name, tensor in revert_weight_conversion(model, state).items():
        name = name.removeprefix(part)
        name = name.replace("language_model.model.model.", "language_model.model.")
        renamed[part + name] = tensor
    return renamed


def hub_config(config):
    """config.json as a dict -> the same as other loaders expect it, transformers 4 and vLLM:
    an Omni around its thinker, and the rotary settings under their old names too."""
    if config["model_type"].endswith(THINKER):
        config = {
            "architectures": [name.replace("Thinker", "") for name in config["architectures"]],
            "dtype": config["dtype"],
            "enable_audio_output": False,                   # the talker is not ours
            "model_type": config["model_type"].removesuffix(THINKER),
            "thinker_config": config}
    thinker = config.get("thinker_config", {})
    for part in (config, config.get("text_config"), thinker.get("text_config")):
        if part and "rope_theta" in (part.get("rope_parameters") or {}):
            rope = dict(part["rope_parameters"])
            part["rope_theta"] = rope.pop("rope_theta")
            part["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    return config
