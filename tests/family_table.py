"""Which of transformers' audio-text models can be a student here: the table of docs/families.md.

    PYTHONPATH=. python tests/family_table.py           # half a minute; nothing is downloaded

A model type is one of transformers' own that takes sound and writes text. Of the families that
families.py can make tiny, one with random weights is saved, loaded, and asked plumbing/hearing.py's
questions. Of the others only the structure is looked at: the class is built at its default size on
the meta device, where tensors have a shape and no memory.
"""

import copy
import re
import tempfile
import warnings
from pathlib import Path

import families
import torch
import transformers
from transformers.models.auto import modeling_auto

import models
from plumbing import hearing

MADE = {
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni",
    **{name: name for name in families.FAMILIES},
}
WHOLE = {"qwen2_5_omni": "runs, as its thinker", "qwen3_omni_moe": "runs, as its thinker"}
# What neither the class nor its structure tells, read in its processor or its documentation
READ = {
    "voxtral": "refused: its processor builds prompts with mistral-common alone, without a chat "
               "template",
    "voxtral_realtime": "refused: as Voxtral; and it listens while it writes",
    "moshi": "refused: it listens and speaks in streams, without prompts",
    "vibevoice": "refused: it writes speech, not text",
    "glmasr": "runs with a chat template that closes turns; its own never does, and is refused",
}


def audio_text_types():
    """{model type: class} of what takes sound and writes text."""
    found = {}
    for mapping in ("MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for model_type, name in names.items():
            if model_type not in transformers.CONFIG_MAPPING:
                continue
            config = transformers.CONFIG_MAPPING[model_type]
            parts = {*getattr(config, "sub_configs", ()), *getattr(config, "__annotations__", ())}
            takes = {"audio_config", "audio_encoder_config", "thinker_config", "encoder_config"}
            takes = takes & parts if "speech" in model_type else takes & parts - {"encoder_config"}
            if takes:
                found.setdefault(model_type, name)
    return found


def asked(family):
    """A tiny one of random weights: what hearing.check says of it."""
    with tempfile.TemporaryDirectory() as folder:
        student, _ = families.save_family(family, Path(folder))
        model, processor = models.load_audio_model(student)
        hearing.check(model, processor)                                 # or SystemExit
        try:
            hearing.check(model, processor, shared_prompts=True)
        except SystemExit as refusal:
            return f"paper A; CORD refuses: {short(refusal)}"
    return "runs"


def structure(model_type, name):
    """The class at its default size, on the meta device: whether its parts are where they are
    looked for."""
    config = transformers.CONFIG_MAPPING[model_type]()
    config = getattr(config, "thinker_config", config)
    with torch.device("meta"):
        model = getattr(transformers, name)(copy.deepcopy(config))
    if not hasattr(models.decoder(model), "layers"):
        return "refused: its decoder has no list of layers"
    models.tower(model)
    models.head_weight(model)
    if getattr(models.decoder(model).config, "final_logit_softcapping", None):
        return "refused: it caps its logits"
    try:
        hearing._check_window(model)
    except SystemExit as refusal:
        return f"structure fits paper A, not run; CORD refuses: {short(refusal)}"
    return "structure fits, not run"


def short(error):
    """The first part of a sentence, with nothing that differs from run to run."""
    sentence = " ".join(str(error).split())
    return re.split(r"[;:(]|, so that|\. ", sentence)[0].strip()


def verdict(model_type, name):
    if model_type in READ:
        return READ[model_type]
    if model_type in WHOLE:
        return WHOLE[model_type]
    try:
        if model_type in MADE:
            return asked(MADE[model_type])
        return structure(model_type, name)
    except ImportError:
        return "not looked at: it needs the package timm"
    except (SystemExit, Exception) as error:            # whatever a class of somebody's says
        return f"refused: {short(error) or type(error).__name__}"


def main():
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"| model type in transformers {transformers.__version__} | as a student |")
    print("| --- | --- |")
    for model_type, name in sorted(audio_text_types().items()):
        print(f"| {model_type} | {verdict(model_type, name)} |", flush=True)


if __name__ == "__main__":
    main()
