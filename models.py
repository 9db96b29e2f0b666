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
on two clips of noise (check): does the audio reach the decoder, are there as many placeholders as
audio vectors, is the head a matrix alone, which parameters get a gradient, can rollouts share a
prompt? So a family that nobody thought of works, or is refused with a sentence that says why.
Tried with random weights: Qwen2-Audio, Qwen2.5-Omni and Qwen3-Omni (their thinkers, also out of a
full checkpoint), AudioFlamingo3, Granite Speech.

    python models.py mini/student                          # check a model and print its parts
    python models.py mini/student --teacher mini/teacher   # and compare the vocabularies
    python models.py runs/lora --save runs/lora/merged     # a LoRA adapter added into its base
"""
import argparse
import contextlib
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from torch.overrides import TorchFunctionMode

import data
from plumbing import hub
from plumbing.whole import newest_checkpoint

MINI = Path(__file__).resolve().parent / "mini"     # the embedded default: student and teacher
ADAPTER = "adapter_config.json"         # peft's file beside an adapter's weights


# ---------------------------------------- 1. its parts ------------------------------------------

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
    """The parameters of neither decoder, head nor tower: projectors, and what the model has for
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
        return _forward(model, inputs, use_cache).logits
    finally:
        model.set_output_embeddings(head)


def _forward(model, inputs, use_cache=False):
    # A processor's features are float32; the tower wants them in its own type
    dtype = next(tower(model).parameters()).dtype
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            inputs = {**inputs, name: x.to(dtype)}
    return model(**inputs, use_cache=use_cache)


def read(model, **inputs):
    """The decoder alone on text, of an audio language model or a text LLM -> last hidden states
    [batch, seq, hidden]"""
    return decoder(model)(**inputs, use_cache=False).last_hidden_state


# ----------------------------------------- 2. loading -------------------------------------------

def load_audio_model(path, *, dtype=torch.float32):
    """A directory or hub id of a model, a directory of a LoRA adapter (which is added into its
    base's weights), or a training run's folder (its newest whole checkpoint) -> (audio language
    model, its processor), in eval mode. Raises SystemExit with one sentence when it cannot be used.
    """
    auto = transformers.AutoModelForMultimodalLM
    # AudioFlamingo3 is filed under "sequence to sequence"
    model, processor = _load(path, "an audio language model",
                             (auto, transformers.AutoModelForSeq2SeqLM),
                             transformers.AutoProcessor, dtype)
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
    _check_template(path, processor.chat_template)
    # The processor's template makes the audio view. Where it takes plain text it makes the text
    # view too, so that both views are asked in one way
    if tokenizer.chat_template is None or _takes_plain_text(processor):
        tokenizer.chat_template = processor.chat_template
    _check_turn_end(tokenizer)
    return model, processor


def load_text_model(path, *, dtype=torch.float32):
    """A directory or hub id -> (causal language model, tokenizer), in eval mode. Raises SystemExit
    with one sentence when it cannot be used."""
    model, tokenizer = _load(path, "a causal language model", (transformers.AutoModelForCausalLM,),
                             transformers.AutoTokenizer, dtype)
    _check_template(path, tokenizer.chat_template)
    _check_turn_end(tokenizer)
    return model, tokenizer


def load_same_shape(path, student, dtype):
    """Another acoustic teacher than the student's snapshot: L_ac compares them layer by layer.
    Raises SystemExit if the shapes differ."""
    model = load_audio_model(path, dtype=dtype)[0]
    ours, theirs = decoder(student).config, decoder(model).config
    same_depth = ours.num_hidden_layers == theirs.num_hidden_layers
    if not same_depth or ours.hidden_size != theirs.hidden_size:
        raise SystemExit(
            f"{path} has {theirs.num_hidden_layers} layers of width {theirs.hidden_size}, the "
            f"student {ours.num_hidden_layers} of {ours.hidden_size}; L_ac compares layers: give a "
            "model of the same shape")
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


def _check_template(path, template):
    if not isinstance(template, str):
        raise SystemExit(f"{path} has no chat template, so no prompt can be built; give the "
                         "instruction-tuned version of this model")


def _check_turn_end(tokenizer):
    try:
        data.turn_end_id(tokenizer)
    except data.DataError as error:
        raise SystemExit(str(error)) from None


def _load(path, description, auto_classes, reader_class, dtype):
    # No remote code, and safetensors alone (hub.check_weights): nothing is executed or unpickled
    from safetensors import SafetensorError
    path, adapter = _base_of(newest_checkpoint(path))
    try:
        reader = reader_class.from_pretrained(path, trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        hub.check_weights(path, config)
        # An Omni has a thinker, which is our model, and a talker that says aloud what it thinks
        omni = hasattr(config, "thinker_config")
        if omni:
            config = config.thinker_config
            hub.check_weights(path, config)
        multimodal = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
        model, loading = auto_classes[0 if multimodal else -1].from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True)
        model.reader_files = hub.reader_files(path)
        if adapter:
            peft = _peft()
            peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(adapter)), model)
            fill(model, adapter)
            merge_lora(model)
            model.name_or_path = str(adapter)
        # Granite Speech brings an adapter of its own, and transformers puts it on
        elif has_lora(model):
            merge_lora(model)
            # Private names of transformers, here alone (tests/test_private_names.py)
            model._hf_peft_config_loaded = False
            model._weight_conversions = None
            model.config.has_lora_adapter = False
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError,
            SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        base = f", the base of {adapter}" if adapter else ""
        advice = "give a directory or a hub id of one, with safetensors"
        if not Path(path).is_dir():
            advice += "; a hub id needs the network once, or its files in the hub's cache"
        raise SystemExit(f"cannot load {description} from {path}{base} ({reason}); "
                         f"{advice}") from None

    # Every tensor has its place, but for those of an Omni's talker
    faults = []
    for kind in ("missing", "unexpected"):
        names = sorted(loading[f"{kind}_keys"])
        if omni and kind == "unexpected":
            names = [name for name in names if name.startswith("thinker.")]
        if names:
            more = ", ..." if len(names) > 3 else ""
            faults.append(f"{len(names)} {kind} ({', '.join(names[:3])}{more})")
    if faults:
        raise SystemExit(f"{path} does not fit {type(model).__name__}: tensors "
                         f"{' and '.join(faults)}; get the checkpoint again, or the right version "
                         "of it")
    return model.eval(), reader


def _base_of(path):
    # -> (the model's own path, the folder of an adapter for it or None)
    file = Path(path) / ADAPTER
    if not file.is_file() or (Path(path) / "config.json").exists():
        return path, None
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{file} is broken or names no base ({error!r}); get the adapter "
                         "again") from None
    if not base or Path(path).resolve() == Path(base).resolve():
        raise SystemExit(f"{file} does not say which model the adapter is for; write its folder "
                         "or hub id as base_model_name_or_path")
    return base, Path(path)


def cast(model, dtype):
    """What a checkpoint holds of a model to another type, in place -> the model. Other buffers stay
    as they are, as in from_pretrained: .to(bfloat16) would round the rotary frequencies too, and
    move every position behind the first thousand tokens."""
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


# --------------------------------------- 3. does it hear? ---------------------------------------

def check(model, processor, *, shared_prompts=False):
    """Ask a model the questions of the opening, on noise of 1 and 1.5 seconds -> the parameters
    that get a gradient from what it hears (a list). Raises SystemExit with what is wrong.

    shared_prompts: also whether two rollouts in one sequence are what each is alone."""
    noise = torch.Generator().manual_seed(0)
    waves = [(0.1 * torch.randn(n, generator=noise)).numpy() for n in (16_000, 24_000)]
    prompts = data.noise_prompts(processor, waves)
    view = data.audio_view(prompts, [0, 1], [[1, 2], [3]], processor).to(model.device)
    if shared_prompts:
        _check_window(model)
    with torch.no_grad(), _as_trained(model):
        _check_hearing(model, view, prompts.features)
    used = _with_gradient(model, view.inputs)
    with _in_float32(model, used):
        _check_head(model, view.inputs)
        if shared_prompts:
            _check_sharing(model, processor, prompts)
    return used


class Scatters(TorchFunctionMode):
    """While it is on, notes wherever audio is scattered into a prompt's embeddings how many numbers
    wait and how many places there are for them."""

    def __init__(self):
        super().__init__()
        self.seen = []                                      # [(values, places)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.masked_scatter:
            embeds, mask, source = args
            self.seen.append((source.numel(), int(mask.expand_as(embeds).sum())))
        return function(*args, **(kwargs or {}))


def _check_hearing(model, view, features):
    name = type(model).__name__
    try:
        with Scatters() as scatters:
            hidden = hear(model, **view.inputs)             # [2, seq, hidden]
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"{name} does not take what its processor makes of a clip ({reason}); "
                         "take both from one checkpoint") from None
    if not scatters.seen:
        raise SystemExit(f"{name} does not scatter the sound into the prompt's embeddings "
                         "(masked_scatter), so nothing here can tell whether it hears; take a "
                         "family of README's table")
    if any(values != places for values, places in scatters.seen):
        raise SystemExit(f"{name} does not put the sound where the prompt's placeholders are "
                         f"((values, places): {scatters.seen}); take model and processor from one "
                         "checkpoint")

    # The same clips backwards must change the hidden states at the audio tokens
    backwards = dict(view.inputs)
    for key, x in view.inputs.items():
        if key in features and x.is_floating_point():
            backwards[key] = x.flip(-1)
    same = (hear(model, **backwards) == hidden).flatten(0, 1)           # [2 * seq, hidden]
    if same[view.audio_positions].all(-1).any():
        raise SystemExit(f"{name} does not hear: other sound in the same prompt leaves hidden "
                         "states at its audio tokens as they are")


def _with_gradient(model, inputs):
    # -> the parameters that get a gradient. DDP would wait for the others for ever
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    with _as_trained(model):
        nodes = [hear(model, **inputs).sum().grad_fn]

    # Down the graph to its leaves: nothing is computed, no gradient is made
    used = {id(p) for p in model.get_output_embeddings().parameters()}
    visited = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return [p for p in model.parameters() if id(p) in used]


def _check_head(model, inputs):
    # Logits = hidden states times the head, with positions as transformers counts them by itself
    plain = {key: x for key, x in inputs.items() if key != "position_ids"}
    real = inputs["attention_mask"].bool()                              # [2, seq]
    hidden = hear(model, **inputs)[real]                                # [tokens, hidden]
    logits = _forward(model, plain).logits[real]                        # [tokens, 512 or so]
    if not _close(logits, hidden @ head_weight(model).T):
        raise SystemExit(_odd_head(model))


def _check_sharing(model, processor, prompts):
    def hidden_of(rows, responses):
        view = data.audio_view(prompts, rows, responses, processor).to(model.device)
        hidden = hear(model, **view.inputs).flatten(0, 1)
        return hidden[view.predict_positions]                           # [5, hidden]

    # Only neighbours share a prompt: each response alone, then two of prompt 0 in one sequence
    alone = hidden_of([0, 1, 0], [[1, 2], [3], [4, 5]])
    joint = hidden_of([0, 0, 1], [[1, 2], [4, 5], [3]])
    if not _close(alone[[0, 1, 3, 4, 2]], joint):
        raise SystemExit(f"{type(model).__name__}'s attention does not take a mask of its own, so "
                         "that a prompt's rollouts cannot share it, as CORD has them do; take a "
                         "family of README's table")


def _check_window(model):
    # Rollouts that share a prompt bring one mask for all layers: a window would be lost
    config = decoder(model).config
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        partial = set(layer_types) != {"full_attention"}
    else:
        longest = getattr(config, "max_position_embeddings", math.inf)
        window = getattr(config, "sliding_window", None) or longest
        partial = getattr(config, "use_sliding_window", True) and window < longest
    if partial:
        raise SystemExit(f"{type(model).__name__} has layers that do not see the whole prompt "
                         "(layer_types or sliding_window in its config), so that a prompt's "
                         "rollouts cannot share it, as CORD has them do; take a model with full "
                         "attention in every layer")


def check_teacher(model):
    """Is a text LLM's head a matrix alone? Raises SystemExit if not: Granite scales its logits,
    Gemma caps them."""
    with _in_float32(model, list(model.parameters())):
        ids = torch.arange(8, device=model.device)[None]                # [1, 8]
        hidden = read(model, input_ids=ids)                             # [1, 8, hidden]
        if not _close(model(ids).logits, hidden @ head_weight(model).T):
            raise SystemExit(_odd_head(model))


@contextlib.contextmanager
def _in_float32(model, parameters):
    """Inside, `model` computes exactly, and little: the first two layers of its decoder and 512
    rows of its head, in float32 without autocast and gradient.

    In bfloat16 two right ways to the same numbers differ by some per cent at the end of a deep
    model, and so would a wrong one. parameters: those that matter. They come back as they were;
    meanwhile tower, projector and two layers are there twice, about 4 GB more for a 7B model."""
    text, head = decoder(model), model.get_output_embeddings()
    if getattr(text.config, "final_logit_softcapping", None):
        raise SystemExit(_odd_head(model))
    weight = head_weight(model).detach()
    rows = weight[::max(1, len(weight) // 512)].float()                 # [512 or so, hidden]
    small_head = nn.Linear(*rows.T.shape, bias=False, device="meta")
    small_head.weight = nn.Parameter(rows)
    layers, embeddings = text.layers, text.get_input_embeddings()
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    to_cast = {id(tensor) for tensor in [*parameters, *buffers]}
    originals = {}

    # The embeddings stay in their type, because they are large; what they give becomes float32
    hook = embeddings.register_forward_hook(lambda module, given, out: out.float())
    text.layers = layers[:2]
    model.set_output_embeddings(small_head)
    try:
        for tensor in [*model.parameters(), *model.buffers()]:
            if id(tensor) in to_cast and tensor is not embeddings.weight:
                originals[tensor] = tensor.data
                tensor.data = tensor.data.float()
        # cuDNN's convolutions may round to TF32
        with (torch.no_grad(), torch.autocast(model.device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=False)):
            yield
    finally:
        for tensor, original in originals.items():
            tensor.data = original
        text.layers = layers
        model.set_output_embeddings(head)
        hook.remove()


def _as_trained(model):
    # The autocast of both scripts: on a GPU, or with 16-bit weights
    half = model.device.type == "cuda" or model.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def _close(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()                            # float32 keeps 1e-6


def _odd_head(model):
    return (f"{type(model).__name__} does not get its logits by its head's matrix alone (it scales "
            "or caps them), or counts positions in a way of its own; losses.py would learn another "
            "distribution: take another model")


# ------------------------------------- 4. what of it learns -------------------------------------

def choose_trained(student, train, used, *, frozen=(), lora=0):
    """What learns. train: "decoder" = decoder, head and projector; "all" = the audio tower too; of
    these only `used` (check's answer) without `frozen`. lora: adapters of this rank instead.

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
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules=targets,
                             base_model_name_or_path=str(student.name_or_path))
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


def _peft():
    try:
        import peft
    except ImportError:
        raise SystemExit("LoRA needs the package peft: pip install peft") from None
    return peft


# ------------------------------------------ 5. saving -------------------------------------------

def save(model, processor, folder, state=None):
    """Weights under the hub's own names as safetensors of at most 5 GB, config, generation config,
    tokenizer, processor and chat template. With LoRA the adapter alone, as peft saves it. state:
    the model's state_dict, where it had to be gathered from many ranks.

    Tokenizer and processor are the base's own files, byte for byte: nothing here changes them, and
    what transformers 5 writes 4 cannot read."""
    state = model.state_dict() if state is None else state
    folder = Path(folder)
    if has_lora(model):
        _save_adapter(model, folder, state)
    else:
        _save_weights(model, folder, state)
    files = getattr(model, "reader_files", None)
    if not files:
        processor.save_pretrained(folder)
        return
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _save_adapter(model, folder, state):
    import safetensors.torch
    matrices = _peft().get_peft_model_state_dict(model, state_dict=state)
    named = {f"base_model.model.{name}": x.contiguous() for name, x in matrices.items()}
    safetensors.torch.save_file(named, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)


def _save_weights(model, folder, state):
    # On the CPU: the hub's layout of experts is a copy
    state = {name: tensor.cpu() for name, tensor in state.items()}
    tied = head_is_embedding(model)
    if tied:
        state = {name: x for name, x in state.items() if not name.endswith("lm_head.weight")}

    state = hub.hub_names(model, state)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=state, save_original_format=False,
                          max_shard_size="5GB")
    transformers.utils.logging.enable_progress_bar()
    config = folder / "config.json"
    config.write_text(json.dumps(hub.hub_config(json.loads(config.read_text())), indent=2) + "\n")


def head_is_embedding(model):
    """Are head and input embeddings one matrix? It is saved once then."""
    embedding = decoder(model).get_input_embeddings().weight
    same = model.get_output_embeddings().weight is embedding
    return same and model.config.get_text_config().tie_word_embeddings


def fill(model, folder):
    """A saved model's weights, or its adapter's, into this one in place. Raises OSError,
    RuntimeError or ValueError where they do not fit."""
    hub.check_weights(folder)
    if has_lora(model):
        _fill_adapter(model, Path(folder) / "adapter_model.safetensors")
        return
    # Through the class, because the hub's names are not the module's own; with this model's
    # config: without a config.json the class would build its default of 7B
    saved, loading = type(model).from_pretrained(
        folder, config=copy.deepcopy(model.config), dtype=model.dtype, use_safetensors=True,
        output_loading_info=True)
    for kind in ("missing", "unexpected"):
        names = sorted(loading[f"{kind}_keys"])
        if names:
            raise ValueError(f"{len(names)} tensors are {kind}, such as {names[0]}")
    model.load_state_dict(saved.state_dict())


def _fill_adapter(model, file):
    import safetensors.torch
    saved = {}
    for name, matrix in safetensors.torch.load_file(file).items():
        saved[name.removeprefix("base_model.model.")] = matrix
    ours = _peft().get_peft_model_state_dict(model)
    if saved.keys() != ours.keys():
        raise ValueError(f"an adapter of {len(saved)} matrices does not fit one of {len(ours)}")
    _peft().set_peft_model_state_dict(model, saved)


def write_card(folder, *, base, script, flags, results=None):
    """README.md beside the weights: the base, the flags, and what the model scored (a table, as
    text). Nothing where there is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    library = "peft" if (folder / ADAPTER).exists() else "transformers"
    lines = ["---", f"base_model: {base}", f"library_name: {library}"]
    lines += ["tags: [audio, distillation]", "---"]
    lines += [f"# {folder.resolve().parent.name}, {folder.name}", ""]
    lines += [f"{base}, trained further by `{script}` with these flags:", "", "```"]
    lines += [f"{name}: {value}" for name, value in flags.items() if value is not None]
    lines += ["```"]
    if results:
        lines += ["", "## Results, before and after", "", "```", results, "```"]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Check an audio language model as the training "
                                                 "scripts do, and print its parts.")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--teacher", help="a text LLM: how the two vocabularies go together")
    parser.add_argument("--save", metavar="OUT", help="save the model in this new folder; an "
                                                      "adapter is added into its base's weights")
    args = parser.parse_args(argv)
    if args.save and Path(args.save).exists():
        raise SystemExit(f"--save {args.save}: is there already; name a new folder")

    model, processor = load_audio_model(args.model, dtype="auto")
    used = {id(p) for p in check(model, processor, shared_prompts=True)}
    config = decoder(model).config
    print(f"{type(model).__name__}: {config.num_hidden_layers} layers of width "
          f"{config.hidden_size}; placeholder {processor.audio_token}; "
          f"clips up to {data.longest(processor):g} s")
    parts = {
        "decoder": decoder(model).parameters(),
        "head": model.get_output_embeddings().parameters(),
        "tower": tower(model).parameters(),
        "rest": projector(model)}
    for name, parameters in parts.items():
        sizes = {id(p): p.numel() for p in parameters}
        idle = sum(size for key, size in sizes.items() if key not in used)
        print(f"{name:8} {sum(sizes.values()):14,} parameters, {idle:,} of them never get a "
              "gradient")
    if args.teacher:
        _, tokenizer = load_text_model(args.teacher)
        *_, summary = data.shared_vocabulary(processor.tokenizer, tokenizer)
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in summary.items()]
        print("vocabulary:", ", ".join(counts))
    if args.save:
        save_new(model, processor, args.save)


def save_new(model, reader, folder):
    """Make a folder and save a model there."""
    Path(folder).mkdir(parents=True)
    save(model, reader, folder)
    print(f"{folder}: {model.num_parameters():,} parameters saved")


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
