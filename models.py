"""
What an audio language model is made of, whichever family it is from: where its parts are, how it
is loaded, what of it learns, how it is saved.

Both papers need five things of a student, and every family of transformers puts them elsewhere:

    decoder     the text LLM inside; its layers are tapped                      decoder(model)
    head        last hidden state -> logits: a matrix alone, as losses.py       head_weight(model)
                multiplies by it
    tower       the audio encoder, frozen or slow                               tower(model)
    projector   whatever else stands between the two                            projector(model)
    hear        the whole model without its head; audio and text are merged     hear(model, **x)
                inside

Nothing here is a list of families. What cannot be asked of the model's class is measured at start,
on two clips of noise (plumbing/hearing.py): does the audio reach the decoder, are there as many
placeholders as audio vectors, is the head a matrix alone, which parameters get a gradient, can
rollouts share a prompt? So a family that nobody thought of works, or is refused with a sentence
that says why. docs/families.md lists those of transformers.

    python models.py mini/student                         # check a model, as training does
    python models.py runs/lora --save runs/lora/merged    # a LoRA adapter added into its base
"""
import argparse
import contextlib
import copy
from pathlib import Path

import torch
import torch.nn as nn
import transformers

import data
from plumbing import hub
from plumbing.files import newest_checkpoint, read_json

MINI = Path(__file__).resolve().parent / "mini"     # the embedded default: student and teacher
ADAPTER = "adapter_config.json"         # peft's file beside an adapter's weights


# -------------------------------------------------------------------------------------------------
# 1. Its parts

def decoder(model):
    """The text LLM without its head, alone or inside an audio language model: a module with
    .layers and .config."""
    return model.get_decoder()


def tower(model):
    """The audio encoder. Raises SystemExit when the model does not say where it is."""
    found = model.get_encoder(modality="audio")
    # transformers' own search knows audio_tower and the like; Granite's is called encoder
    if found is model:
        found = getattr(model.base_model, "encoder", None)
    if found is None:
        raise SystemExit(f"{type(model).__name__} does not say which of its modules hears: no "
                         "audio_tower, audio_encoder, speech_encoder or encoder")
    return found


def projector(model):
    """The parameters outside decoder, head and tower: projectors, and what the model has for
    other senses. -> list"""
    elsewhere = set()
    for part in (decoder(model), model.get_output_embeddings(), tower(model)):
        elsewhere.update(id(p) for p in part.parameters())
    return [p for p in model.parameters() if id(p) not in elsewhere]


def blocks(model):
    """The layers of decoder and tower, which hold most weights of a large model. -> list"""
    return [*decoder(model).layers, *getattr(tower(model), "layers", ())]


def lower_half(model):
    """What the input passes first: projector, embeddings and the lower half of the decoder's
    layers. -> list of parameters"""
    layers = decoder(model).layers
    parameters = projector(model)
    for part in (decoder(model).get_input_embeddings(), *layers[:len(layers) // 2]):
        parameters += part.parameters()
    return parameters


def head_weight(model):
    """The output head [vocab, hidden] as losses.py takes it. Raises SystemExit if it has a bias."""
    head = model.get_output_embeddings()
    if head.bias is not None:
        raise SystemExit(f"the output head of {type(model).__name__} has a bias, which losses.py "
                         "does not know; take a model whose head is a matrix alone")
    return head.weight


def hear(model, *, use_cache=False, **inputs):
    """An audio language model without its head -> last hidden states [batch, seq, hidden], after
    the final norm.

    Some families merge audio and text in model.model, others in the model itself. Run with an
    identity in the head's place, all are alike. (To run the head and drop its logits would cost
    [batch, seq, vocab], 10 GB for 16 thousand tokens.)"""
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Identity())
    try:
        return forward(model, inputs, use_cache).logits
    finally:
        model.set_output_embeddings(head)


def forward(model, inputs, use_cache=False):
    # A processor's features are float32; the tower wants them in its own type
    dtype = next(tower(model).parameters()).dtype
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            inputs = {**inputs, name: x.to(dtype)}
    return model(**inputs, use_cache=use_cache)


def autocast(model):
    """The autocast context to run a model in: bfloat16 on a GPU, and wherever its weights are."""
    half = model.device.type == "cuda" or model.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def read(model, **inputs):
    """The decoder alone on text, of an audio language model or a text LLM -> last hidden states
    [batch, seq, hidden]"""
    return decoder(model)(**inputs, use_cache=False).last_hidden_state


# -------------------------------------------------------------------------------------------------
# 2. Loading

def load_audio_model(path, *, dtype=torch.float32):
    """A directory or hub id of a model, a directory of a LoRA adapter (which is added into its
    base's weights), or a training run's folder (its newest checkpoint) -> (audio language
    model, its processor), in eval mode. Raises SystemExit with one sentence when it cannot be used.
    """
    auto = transformers.AutoModelForMultimodalLM
    # AudioFlamingo3 is filed under "sequence to sequence"
    model, processor = _load(
        path,
        "an audio language model",
        (auto, transformers.AutoModelForSeq2SeqLM),
        transformers.AutoProcessor,
        dtype,
    )
    placeholder = getattr(processor, "audio_token", None)
    if not placeholder or data.extractor(processor) is None:
        raise SystemExit(f"{path} holds {type(model).__name__}, which takes no audio; give an "
                         "audio language model, such as Qwen2-Audio")
    if placeholder not in processor.tokenizer.get_vocab():
        raise SystemExit(f"{path}: the processor's audio placeholder {placeholder} is not in its "
                         "tokenizer; take both from one checkpoint")

    # Some families keep the template with the processor or with the tokenizer alone
    tokenizer = processor.tokenizer
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    # The processor's template makes the audio view. Where it takes plain text it makes the text
    # view too, so that both views are asked in one way
    if tokenizer.chat_template is None or _takes_plain_text(processor):
        tokenizer.chat_template = processor.chat_template
    _check_chat(path, tokenizer)
    return model, processor


def load_text_model(path, *, dtype=torch.float32):
    """A directory or hub id -> (causal language model, tokenizer), in eval mode. Raises SystemExit
    with one sentence when it cannot be used."""
    model, tokenizer = _load(
        path,
        "a causal language model",
        (transformers.AutoModelForCausalLM,),
        transformers.AutoTokenizer,
        dtype,
    )
    _check_chat(path, tokenizer)
    return model, tokenizer


def load_same_shape(path, student, dtype):
    """Another acoustic teacher than the student's snapshot: L_ac compares them layer by layer.
    Raises SystemExit if the shapes differ."""
    model = load_audio_model(path, dtype=dtype)[0]
    configs = decoder(model).config, decoder(student).config
    theirs, ours = ((c.num_hidden_layers, c.hidden_size) for c in configs)
    if theirs != ours:
        raise SystemExit(f"{path} has {theirs[0]} layers of width {theirs[1]}, the student "
                         f"{ours[0]} of {ours[1]}; L_ac compares them: give one of its shape")
    return model


def _takes_plain_text(processor):
    # Is a content that is a string written as one that is a list of parts?
    import jinja2
    prompts = set()
    try:
        for content in ("What?", [{"type": "text", "text": "What?"}]):
            turns = [{"role": "user", "content": content}]
            prompts.add(processor.apply_chat_template(turns, tokenize=False))
    except (TypeError, jinja2.TemplateError):
        return False
    return len(prompts) == 1 and "What?" in prompts.pop()


def _check_chat(path, tokenizer):
    if not isinstance(tokenizer.chat_template, str):
        raise SystemExit(f"{path} has no chat template, so no prompt can be built; give the "
                         "instruction-tuned version of this model")
    data.turn_end_id(tokenizer)             # raises where an answer would have no end


def _load(path, description, auto_classes, processor_class, dtype):
    # No remote code, and safetensors alone (hub.check_weights): nothing is executed or unpickled
    path, adapter = _base_of(newest_checkpoint(path))
    try:
        processor = processor_class.from_pretrained(path, trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        hub.check_weights(path, config)
        # An Omni has a thinker, which is our model, and a talker that says aloud what it thinks
        omni = hasattr(config, "thinker_config")
        if omni:
            config = config.thinker_config
            hub.check_weights(path, config)
        multimodal = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
        model, loading = auto_classes[0 if multimodal else -1].from_pretrained(
            path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model.processor_files = hub.processor_files(path)
        if adapter:
            peft = import_peft()
            peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(adapter)), model)
            from plumbing import saving  # here, because it imports this file
            saving.fill(model, adapter)
            merge_lora(model)
            model.name_or_path = str(adapter)
        # Granite Speech brings an adapter of its own, and transformers puts it on
        elif has_lora(model):
            merge_lora(model)
            # Private names of transformers, here alone (tests/test_private_names.py)
            model._hf_peft_config_loaded = False
            model._weight_conversions = None
            model.config.has_lora_adapter = False
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        base = f", the base of {adapter}" if adapter else ""
        raise SystemExit(f"cannot load {description} from {path}{base} ({reason}); give a "
                         "directory or a hub id of one, with safetensors; a hub id needs the "
                         "network once, or its files in the hub's cache") from None

    # Every tensor has its place, but for those of an Omni's talker
    for kind in ("missing", "unexpected"):
        names = sorted(loading[f"{kind}_keys"])
        if omni and kind == "unexpected":
            names = [name for name in names if name.startswith("thinker.")]
        if names:
            raise SystemExit(f"{path} does not fit {type(model).__name__}: {len(names)} tensors "
                             f"are {kind}, such as {names[0]}; get the checkpoint again, or the "
                             "right version of it")
    return model.eval(), processor


def _base_of(path):
    # -> (the model's own path, the folder of an adapter for it or None)
    file = Path(path) / ADAPTER
    if not file.is_file() or (Path(path) / "config.json").exists():
        return path, None
    base = read_json(file).get("base_model_name_or_path")
    if not base:
        raise SystemExit(f"{file} does not say which model the adapter is for; write its folder "
                         "or hub id as base_model_name_or_path")
    return base, Path(path)


def cast(model, dtype):
    """Cast a model's parameters and saved buffers, in place -> the model. Other buffers stay as
    they are, as in from_pretrained: .to(bfloat16) would round the rotary frequencies too, and
    shift every position after the first thousand."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def frozen_copy(model, dtype):
    """A copy in another type without gradients. It is never there in the old type: 8 billion
    float32 weights twice would not fit into 80 GB."""
    copies = {}
    for p in model.parameters():
        copies[id(p)] = nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False)
    return cast(copy.deepcopy(model, copies), dtype)


# -------------------------------------------------------------------------------------------------
# 3. What of it learns

def choose_trained(student, train, used, *, frozen=(), lora=0):
    """What learns. train: "decoder" = decoder, head and projector; "all" = the audio tower too; of
    these only `used` (hearing.check's answer) without `frozen`. lora: adapters of this rank
    instead.

    The tower's position embeddings never learn, as in the original: they are sinusoids, and
    from_pretrained forgets that."""
    student.requires_grad_(False)
    for parameter in used:
        parameter.requires_grad_(True)
    encoder = tower(student)
    fixed = encoder if train != "all" else getattr(encoder, "embed_positions", None)
    if fixed is not None:
        fixed.requires_grad_(False)
    for parameter in frozen:
        parameter.requires_grad_(False)
    if lora:
        add_lora(student, lora)


def add_lora(student, rank):
    """LoRA (arXiv 2106.09685): of what choose_trained let learn, each linear layer gets a low-rank
    update beside it, and nothing else learns any more:

        W x + 32 / rank * B A x,    A [rank, in] random, B [out, rank] zero, both float32

    So the student starts as it came, and `with without_lora(student)` it is paper A's snapshot and
    CORD's initial teacher, without a copy. Head, embeddings, convolutions and experts stay as they
    are. The 32 keeps the best learning rate about the same at any rank, ten times that of full
    training by others' measurements ("LoRA without regret")."""
    if (Path(student.name_or_path) / ADAPTER).is_file():
        raise SystemExit(f"{student.name_or_path} is an adapter, and one on top of it would lose "
                         f"it; first: python models.py {student.name_or_path} --save DIR")
    head = student.get_output_embeddings()
    targets = []
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad:
            targets.append(name)
    # Not transformers' add_adapter: Granite Speech's generate() switches an adapter that it knows
    # of off whenever no audio is given, as behind a cache
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=32,
        target_modules=targets,
        base_model_name_or_path=str(student.name_or_path),
    )
    peft.inject_adapter_in_model(config, student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def without_lora(model):
    """Inside, every adapter of `model` is off (nothing happens without one). peft's own switch also
    turns requires_grad off and on, which DDP does not survive."""
    # A private name of peft, here alone (tests/test_private_names.py)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def has_lora(model):
    return any(hasattr(module, "lora_A") for module in model.modules())


def merge_lora(model):
    """W <- W + 32 / rank * B A, in place; then the model has no adapters any more. Weights in 16
    bits round: an update below 2^-8 of a weight is lost."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def import_peft():
    try:
        import peft
    except ImportError:
        raise SystemExit("LoRA needs the package peft: pip install peft") from None
    return peft


# ------------------------------------------------------------------------------------------------

def main(argv=None):
    from plumbing import hearing, saving  # here, because they import this file

    parser = argparse.ArgumentParser(
        description="Check an audio language model as the training scripts do."
    )
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument(
        "--save",
        metavar="OUT",
        help="save the model in this new folder; an adapter is added into its base's weights",
    )
    args = parser.parse_args(argv)
    if args.save and Path(args.save).exists():
        raise SystemExit(f"--save {args.save}: is there already; name a new folder")

    model, processor = load_audio_model(args.model, dtype="auto")
    used = hearing.check(model, processor, shared_prompts=True)
    config = decoder(model).config
    print(
        f"{type(model).__name__}: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}; {model.num_parameters():,} parameters, of which "
        f"{sum(p.numel() for p in used):,} can learn; placeholder {processor.audio_token}; clips "
        f"up to {data.longest(processor):g} s"
    )
    if args.save:
        saving.save_new(model, processor, args.save)


if __name__ == "__main__":
    from models import main  # not a second copy of this module: plumbing/ imports `models`
    main()
