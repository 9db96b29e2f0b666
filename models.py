"""
What an audio language model is made of, whichever family it is from: where its parts are, how it is loaded, what of it learns, how it is saved.

Both papers need five things of a student, and every family of transformers puts them elsewhere:

    decoder     the text LLM inside: its layers are tapped, and CORD's teacher reads with it           decoder(model)
    head        last hidden state -> logits, a matrix and nothing else: losses.py multiplies by it     head_weight(model)
    tower       the audio encoder, frozen or slow                                                      tower(model)
    projector   whatever else stands between the two                                                   projector(model)
    hear        the whole model without its head: sound is merged into the prompt inside               hear(model, **inputs)

Nothing here is a list of families. What cannot be asked of the model's class is measured at start, on a second of noise (check): does the sound
reach the decoder, are there as many placeholders as pieces of sound, is the head a matrix alone, which parameters get a gradient, can a prompt's
rollouts share it? A family that nobody thought of therefore works, or is refused with the sentence that says what it lacks.
Tried with random weights: Qwen2-Audio, Qwen2.5-Omni and Qwen3-Omni (their thinkers, also out of a full checkpoint), AudioFlamingo3, Granite Speech.

    python models.py mini/student                       # check a model, folder or hub id, and print its parts
    python models.py mini/student --teacher mini/teacher      # and how its vocabulary goes with a text teacher's
    python models.py runs/lora --save runs/lora/merged       # a LoRA adapter added into its base, for those who do not know peft
    python models.py Qwen/Qwen3-8B --random-weights 1 --save Qwen/Qwen3-8B      # no download: its shape with one layer of random weights (shapes.py)
"""
import argparse
import contextlib
import copy
import json
import math
from pathlib import Path

import jinja2
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM,
                          AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file, logging

import data
from lab import shapes

THINKER = "_thinker"                    # the end of an Omni's model type without its talker
ADAPTER = "adapter_config.json"         # peft's file beside an adapter's weights
READER = (                              # the files of a tokenizer and a processor
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


# ------------------------------------------------------------ 1. loading --------------------------------------------------------------

def load_audio_model(path, *, dtype=torch.float32):
    """A directory or hub id of a model, a directory of a LoRA adapter (which is added into its
    base's weights), or a training run's folder (its newest whole checkpoint) -> (audio language
    model, its processor), in eval mode.

    Raises SystemExit with one sentence when it cannot be used."""
    model, processor = _load(path, "an audio language model", (AutoModelForMultimodalLM, AutoModelForSeq2SeqLM), AutoProcessor, dtype)
    placeholder = getattr(processor, "audio_token", None)
    if not placeholder or data.extractor(processor) is None:
        raise SystemExit(f"{path} holds {type(model).__name__}, which takes no audio; give an audio language model, such as Qwen2-Audio")
    if placeholder not in processor.tokenizer.get_vocab():
        raise SystemExit(f"{path}: the processor's audio placeholder {placeholder} is not in its tokenizer; take both from one checkpoint")
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template        # some keep it with one of the two alone
    if not isinstance(processor.chat_template, str):
        raise SystemExit(f"{path} has no chat template, so no prompt can be built; give the instruction-tuned version of this model")
    # Both views are to be asked in one way: the processor's template, which makes the audio view, is the tokenizer's too, if it takes plain text
    turns = [[{"role": "user", "content": content}] for content in ("What?", [{"type": "text", "text": "What?"}])]
    with contextlib.suppress(TypeError, jinja2.TemplateError):
        asked = {processor.apply_chat_template(turn, tokenize=False) for turn in turns}
        if len(asked) == 1 and "What?" in asked.pop() or processor.tokenizer.chat_template is None:
            processor.tokenizer.chat_template = processor.chat_template
    _check_template(processor.tokenizer)
    return model, processor


def load_text_model(path, *, dtype=torch.float32):
    """A directory or hub id -> (causal language model, tokenizer). Raises SystemExit with one sentence when it cannot be used."""
    model, tokenizer = _load(path, "a causal language model", (AutoModelForCausalLM,), AutoTokenizer, dtype)
    if tokenizer.chat_template is None:
        raise SystemExit(f"{path} has no chat template, so no prompt can be built; give the instruction-tuned version of this model")
    _check_template(tokenizer)
    return model, tokenizer


def _check_template(tokenizer):
    try:
        data.turn_end_id(tokenizer)
    except data.DataError as error:
        raise SystemExit(str(error)) from None


def load_same_shape(path, student, dtype):
    """Another acoustic teacher than the student's snapshot: L_ac compares them layer by layer. Raises SystemExit if the shapes differ."""
    model = load_audio_model(path, dtype=dtype)[0]
    ours, theirs = decoder(student).config, decoder(model).config
    if (ours.hidden_size, ours.num_hidden_layers) != (theirs.hidden_size, theirs.num_hidden_layers):
        raise SystemExit(f"{path} has {theirs.num_hidden_layers} layers of width {theirs.hidden_size}, the student "
                         f"{ours.num_hidden_layers} of {ours.hidden_size}; L_ac compares layers: give a model of the same shape")
    return model


def _load(path, what, autos, reader_class, dtype):
    # No remote code, and safetensors alone (check_weights): nothing is executed or unpickled
    path = newest_checkpoint(path)
    adapter = Path(path) if (Path(path) / ADAPTER).is_file() and not (Path(path) / "config.json").exists() else None
    if adapter:
        try:
            path = json.loads((adapter / ADAPTER).read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{adapter / ADAPTER} is broken or names no base ({error!r}); get the "
                             "adapter again") from None
        if not path or adapter.resolve() == Path(path).resolve():
            raise SystemExit(f"{adapter / ADAPTER} does not say which model the adapter is for; write its folder or hub id as base_model_name_or_path")
    try:
        reader = reader_class.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        whole = hasattr(config, "thinker_config")           # Omni: a thinker, which is our model, and a talker that says aloud what it thinks
        check_weights(path, config)
        if whole:
            config = config.thinker_config
            check_weights(path, config)
        # AudioFlamingo3 is filed under "sequence to sequence"
        auto = autos[0] if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else autos[-1]
        model, found = auto.from_pretrained(path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
        model.reader_files = _reader_files(path)
        if adapter:
            peft = _peft()
            peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(adapter)), model)
            fill(model, adapter)
            merge_lora(model)
            model.name_or_path = str(adapter)
        elif has_lora(model):                               # Granite Speech brings one of its own, and transformers puts it on
            merge_lora(model)
            # private names of transformers, here alone (tests/test_private_names.py)
            model._hf_peft_config_loaded, model._weight_conversions, model.config.has_lora_adapter = False, None, False
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        advice = "" if Path(path).is_dir() else "; a hub id needs the network once, or its files in the hub's cache"
        of = f", the base of {adapter}" if adapter else ""
        raise SystemExit(f"cannot load {what} from {path}{of} ({reason}); give a directory or a hub id of one, with safetensors{advice}") from None
    odd = {kind: sorted(name for name in found[f"{kind}_keys"] if not (whole and kind == "unexpected" and not name.startswith("thinker.")))
           for kind in ("missing", "unexpected")}
    if names := [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for kind, names in odd.items() if names]:
        raise SystemExit(f"{path} does not fit {type(model).__name__}: tensors {' and '.join(names)}; get the checkpoint again, or the right version of it")
    return model.eval(), reader


def check_weights(path, config=None):
    """Every weight that from_pretrained would load of this folder or hub id is a safetensors file
    inside it, links followed. Raises SystemExit if not.

    An index may name any file, which transformers then opens: a pickle, ../another.safetensors."""
    # Whatever is called so may be read, whether an index names it or not
    names = ["model.safetensors", "adapter_model.safetensors"]
    names += [file.name for file in Path(path).glob("*.safetensors")]
    if getattr(config, "transformers_weights", None):
        names.append(config.transformers_weights)
    with contextlib.suppress(OSError):                      # most models have no index
        index = Path(cached_file(str(path), "model.safetensors.index.json"))
        try:
            names += json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"{index} is broken ({error!r}); get the checkpoint again") from None
    roots = [Path(path).resolve()]
    cache = roots[0].parent.parent                          # of the hub: links to ../../blobs
    if roots[0].parent.name == "snapshots" and cache.name.startswith("models--"):
        roots.append(cache / "blobs")
    for name in names:
        file = (Path(path) / name).resolve()
        inside = any(file.is_relative_to(root) for root in roots)
        if not inside or not name.endswith(".safetensors"):
            raise SystemExit(f"{path} wants {name} loaded, which is no safetensors file inside this "
                             "folder; get the checkpoint again, or convert it")


def _reader_files(path):
    # {name: bytes}, read now: by the time of a checkpoint the folder may be gone, or another one
    folder, files = Path(cached_file(str(path), "config.json")).parent, {}
    for name in READER:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files if "tokenizer.json" in files else {}


def cast(model, dtype):
    """What a checkpoint holds of a model to a type, in place -> the model. Other buffers stay as they are, as in from_pretrained: .to(bfloat16) would round
    the rotary frequencies too, and a thousand tokens on every position would be another one."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def frozen_copy(model, dtype):
    """A copy in another type that learns nothing, without one in the old type in between: 8 billion float32 weights twice would not fit into 80 GB."""
    made = {id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in model.parameters()}
    return cast(copy.deepcopy(model, made), dtype)


# ------------------------------------------------------------ 2. its parts ------------------------------------------------------------

def decoder(model):
    """The text LLM inside an audio language model, or a text LLM without its head: a module with .layers and .config."""
    return model.get_decoder()


def tower(model):
    """The audio encoder. Raises SystemExit when the model does not say where it is."""
    found = model.get_encoder(modality="audio")
    if found is model:                                      # transformers' own search knows audio_tower and the like; Granite says encoder
        found = getattr(model.base_model, "encoder", None)
    if found is None:
        raise SystemExit(f"{type(model).__name__} does not say which of its modules hears: no audio_tower, audio_encoder, speech_encoder or encoder")
    return found


def projector(model):
    """What is neither decoder, head nor tower: projectors, and what the model has for other senses. -> list of parameters"""
    elsewhere = {id(p) for part in (decoder(model), model.get_output_embeddings(), tower(model)) for p in part.parameters()}
    return [p for p in model.parameters() if id(p) not in elsewhere]


def blocks(model):
    """What a large model's weights are in: the layers of decoder and tower. -> list of modules"""
    return [*decoder(model).layers, *getattr(tower(model), "layers", ())]


def head_weight(model):
    """The output head [vocab, hidden] as losses.py takes it. Raises SystemExit if it has a bias as well."""
    head = model.get_output_embeddings()
    if head.bias is not None:
        raise SystemExit(f"the output head of {type(model).__name__} has a bias, which losses.py does not know; take a model whose head is a matrix alone")
    return head.weight


def hear(model, *, use_cache=False, **inputs):
    """An audio language model without its head -> last hidden states [batch, seq, hidden], after the final norm.

    Some families merge sound and words in model.model, others in the model itself; none needs to be known if the whole runs with an identity in
    the head's place. (To run the head and drop its logits would cost [batch, seq, vocab], 10 GB for 16 thousand tokens.) Features come in float32 and
    are cast to the tower's type."""
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Identity())
    try:
        return _whole(model, inputs, use_cache).logits
    finally:
        model.set_output_embeddings(head)


def _whole(model, inputs, use_cache=False):
    kind = next(tower(model).parameters()).dtype
    return model(**{name: x.to(kind) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()}, use_cache=use_cache)


def read(model, **inputs):
    """The decoder alone on text, of an audio language model or a text LLM -> last hidden states [batch, seq, hidden]"""
    return decoder(model)(**inputs, use_cache=False).last_hidden_state


# ----------------------------------------------------------- 3. does it hear? -----------------------------------------------------------

class Scatters(TorchFunctionMode):
    """Counts, while it is on, how many vectors wait and how many places there are for them, wherever sound is scattered into a prompt's embeddings."""

    def __init__(self):
        super().__init__()
        self.seen = []                                      # [(elements that wait, elements' places)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.masked_scatter:
            into, mask, source = args
            self.seen.append((source.numel(), int(mask.expand_as(into).sum())))
        return function(*args, **(kwargs or {}))


def check(model, processor, *, shared_prompts=False):
    """Ask a model the questions of the opening, on noise of 1 and 1.5 seconds -> the parameters that get a gradient from what it hears (a list).

    shared_prompts: also whether two rollouts in one sequence are what each is alone (data.audio_view). Raises SystemExit with what is wrong."""
    name, noise = type(model).__name__, torch.Generator().manual_seed(0)
    two = data.noise_prompts(processor, [(0.1 * torch.randn(n, generator=noise)).numpy() for n in (16_000, 24_000)])
    view = data.audio_view(two, [0, 1], [[1, 2], [3]], processor).to(model.device)
    if shared_prompts:
        _check_window(model)

    with torch.no_grad(), _as_trained(model):
        try:
            with Scatters() as scatters:
                heard = hear(model, **view.inputs)                                           # [2, seq, hidden]
        except (ValueError, RuntimeError, TypeError) as error:
            raise SystemExit(f"{name} does not take what its processor makes of a clip ({str(error).strip().splitlines()[0]}); take both from one "
                             "checkpoint") from None
        if not scatters.seen:
            raise SystemExit(f"{name} does not scatter the sound into the prompt's embeddings (masked_scatter), so nothing here can tell whether it hears; "
                             "take a family of README's table")
        if any(waiting != places for waiting, places in scatters.seen):
            raise SystemExit(f"{name} does not put the sound where the prompt's placeholders are ((values, places): {scatters.seen}); take model and "
                             "processor from one checkpoint")
        swapped = {key: x.flip(-1) if key in two.features and x.is_floating_point() else x for key, x in view.inputs.items()}
        if (hear(model, **swapped) == heard).flatten(0, 1)[view.audio_positions].all(-1).any():
            raise SystemExit(f"{name} does not hear: other sound in the same prompt leaves hidden states at its audio tokens as they are")

    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    with _as_trained(model):
        nodes, seen, used = [hear(model, **view.inputs).sum().grad_fn], set(), {id(p) for p in model.get_output_embeddings().parameters()}
    while nodes:                                            # down the graph to its leaves: nothing is computed, no gradient is made
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used |= {id(node.variable)} if hasattr(node, "variable") else set()
            nodes += [parent for parent, _ in node.next_functions]
    for parameter in frozen:
        parameter.requires_grad_(False)
    learns = [p for p in model.parameters() if id(p) in used]

    with _in_float32(model, learns):
        # without our position_ids: as transformers counts positions by itself
        alone = {key: x for key, x in view.inputs.items() if key != "position_ids"}
        real = view.inputs["attention_mask"].bool()
        last = hear(model, **view.inputs)[real]                                  # [tokens, hidden]
        if not _close(_whole(model, alone).logits[real], last @ head_weight(model).T):
            raise SystemExit(_odd_head(model))
        if shared_prompts:
            def heard_at(rows, said):                       # only neighbours share a prompt
                view = data.audio_view(two, rows, said, processor).to(model.device)
                last = hear(model, **view.inputs).flatten(0, 1)
                return last[view.predict_positions]                              # [5, hidden]

            apart = heard_at([0, 1, 0], [[1, 2], [3], [4, 5]])
            joint = heard_at([0, 0, 1], [[1, 2], [4, 5], [3]])
            if not _close(apart[[0, 1, 3, 4, 2]], joint):
                raise SystemExit(f"{name}'s attention does not take a mask of its own, so that a "
                                 "prompt's rollouts cannot share it, as CORD has them do; take a "
                                 "family of README's table")
    return learns


def check_teacher(model):
    """Is a text LLM's head a matrix alone? Raises SystemExit if not (Granite scales its logits, Gemma caps them); a judge's may be anything."""
    with _in_float32(model, list(model.parameters())):
        ids = torch.arange(8, device=model.device)[None]
        last = read(model, input_ids=ids)                                                    # [1, 8, hidden]
        if not _close(model(ids).logits, last @ head_weight(model).T):
            raise SystemExit(_odd_head(model))


@contextlib.contextmanager
def _in_float32(model, parameters):
    """Inside, `model` computes exactly, and little: the first two layers of its decoder and 512
    rows of its head, in float32 without autocast and gradient.

    In bfloat16 two right ways to the same numbers differ by some per cent at the end of a deep
    model, and so would a wrong one. parameters: those that matter. They come back as they were; meanwhile
    tower, projector and two layers are there twice, about 4 GB more for a 7B model."""
    weight, head, text = head_weight(model), model.get_output_embeddings(), decoder(model)
    if getattr(text.config, "final_logit_softcapping", None):
        raise SystemExit(_odd_head(model))
    layers, embeddings = text.layers, text.get_input_embeddings()
    rows = weight.detach()[::max(1, len(weight) // 512)].float()            # [512 or so, hidden]
    few = nn.Linear(*rows.T.shape, bias=False, device="meta")
    few.weight = nn.Parameter(rows)
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    kept, wanted = {}, {id(tensor) for tensor in [*parameters, *buffers]}
    hook = embeddings.register_forward_hook(lambda module, given, out: out.float())
    text.layers = layers[:2]
    model.set_output_embeddings(few)
    try:
        for tensor in [*model.parameters(), *model.buffers()]:
            if id(tensor) in wanted and tensor is not embeddings.weight:
                kept[tensor] = tensor.data
                tensor.data = tensor.data.float()
        # cuDNN's convolutions may round to TF32
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False), \
                torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        for tensor, own in kept.items():
            tensor.data = own
        text.layers = layers
        model.set_output_embeddings(head)
        hook.remove()


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
                         "(layer_types or sliding_window in its config), so that a prompt's rollouts "
                         "cannot share it, as CORD has them do; take a model with full attention in every layer")


def _as_trained(model):
    # the autocast of both scripts: on a GPU, or with 16-bit weights
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda" or model.dtype == torch.bfloat16)


def _close(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()                # float32 keeps 1e-6


def _odd_head(model):
    return (f"{type(model).__name__} does not get its logits by its head's matrix alone (it scales or caps them), or counts positions in a way of its own; "
            "losses.py would learn another distribution: take another model")


# ---------------------------------------------------------- 4. what of it learns ----------------------------------------------------------

def choose_trained(student, train, used, *, frozen=(), lora=0):
    """What learns: "decoder" = decoder, head and projector, audio tower frozen; "all" = the audio tower too; in any case only of `used` (what check
    found to get a gradient: DDP waits forever for the others) and not `frozen`. lora: not these themselves, but adapters of that rank beside them.

    The tower's position embeddings stay frozen either way, as in the original (from_pretrained forgets that): they are sinusoids."""
    student.requires_grad_(False)
    ears = tower(student)
    sinusoids = getattr(ears, "embed_positions", None)
    apart = {id(p) for p in (ears.parameters() if train != "all" else sinusoids.parameters() if sinusoids is not None else ())}
    for parameter in used:
        parameter.requires_grad_(id(parameter) not in apart)
    for parameter in frozen:
        parameter.requires_grad_(False)
    if lora:
        add_lora(student, lora)


def lower_half(student):
    """What the words and sounds pass first: projector, embeddings and the lower half of the decoder's layers. -> list of parameters"""
    layers = decoder(student).layers
    parts = [decoder(student).get_input_embeddings(), *layers[:len(layers) // 2]]
    return projector(student) + [p for part in parts for p in part.parameters()]


def add_lora(student, rank):
    """LoRA (arXiv 2106.09685): of what choose_trained let learn nothing does any more, but each linear layer of it gets a low-rank update beside it,

        W x + 32 / rank * B A x,    A [rank, in] random, B [out, rank] zero, both float32

    so that the student starts as it came, and `with without_lora(student)` is what it was, for ever, without a copy: paper A's snapshot and CORD's
    initial teacher. Head, embeddings, convolutions and experts stay as they are. The 32 keeps the best learning rate about the same at
    any rank, ten times that of full training by others' measurements ("LoRA without regret"). Raises SystemExit where peft is not installed, or the student is an adapter itself."""
    peft, head = _peft(), student.get_output_embeddings()
    if (Path(student.name_or_path) / ADAPTER).is_file():
        raise SystemExit(f"{student.name_or_path} is an adapter, and one on top of it would lose it; first: python models.py {student.name_or_path} --save DIR")
    targets = [name for name, m in student.named_modules() if isinstance(m, nn.Linear) and m is not head and m.weight.requires_grad]
    # not transformers' add_adapter: Granite Speech's generate() would switch an adapter off that it knows of whenever no sound is given, as behind a cache
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=32, target_modules=targets, base_model_name_or_path=str(student.name_or_path)), student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextlib.contextmanager
def without_lora(model):
    """Inside, every adapter of `model` is off (nothing happens without one). peft's own switch also turns requires_grad off and on, under DDP's feet."""
    # a private name of peft, here alone (tests/test_private_names.py)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def has_lora(model):
    return any(hasattr(m, "lora_A") for m in model.modules())


def merge_lora(model):
    """W <- W + 32 / rank * B A, in place; then the model is one without adapters again. Weights in 16 bits round: an update below 2^-8 of a weight goes."""
    for name, layer in [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A")]:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())


def _peft():
    try:
        import peft
    except ImportError:
        raise SystemExit("LoRA needs the package peft: pip install peft") from None
    return peft


# -------------------------------------------------------------- 5. saving ---------------------------------------------------------------

def save(model, processor, folder, state=None):
    """Weights under the hub's own names as safetensors of at most 5 GB, config, generation config, tokenizer, processor and chat template. With LoRA the
    adapter alone, as peft saves it. state: the model's state_dict, where it had to be gathered from many ranks.

    Tokenizer and processor are the base's own files, byte for byte: nothing here changes them, and
    what transformers 5 writes 4 cannot read."""
    state, folder = model.state_dict() if state is None else state, Path(folder)
    if has_lora(model):
        save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in _peft().get_peft_model_state_dict(model, state_dict=state).items()},
                  folder / "adapter_model.safetensors")
        model.peft_config["default"].save_pretrained(folder)
    else:
        state = {name: tensor.cpu() for name, tensor in state.items()}                      # the hub's layout of experts is a copy: not on the GPU
        if model.config.get_text_config().tie_word_embeddings and model.get_output_embeddings().weight is decoder(model).get_input_embeddings().weight:
            state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
        # Back to the hub's names: transformers 5.17 writes one ".model" too many for decoders inside, which other loaders miss, and on the hub Omni's
        # thinker is a part, thinker.* (5.24 says so by itself where the model came from a whole one)
        part = "thinker." if model.config.model_type.endswith(THINKER) else ""
        extra, hub = "language_model.model.model.", {}
        for name, tensor in revert_weight_conversion(model, state).items():
            name = name.removeprefix(part).replace(extra, "language_model.model.")
            hub[part + name] = tensor
        logging.disable_progress_bar()
        model.save_pretrained(folder, state_dict=hub, save_original_format=False,
                              max_shard_size="5GB")
        logging.enable_progress_bar()
        config = folder / "config.json"
        config.write_text(json.dumps(hub_config(json.loads(config.read_text())), indent=2) + "\n")
    if files := getattr(model, "reader_files", None):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    else:
        processor.save_pretrained(folder)


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
        rope = dict(part["rope_parameters"]) if part and part.get("rope_parameters") else {}
        if "rope_theta" in rope:
            part["rope_theta"] = rope.pop("rope_theta")
            part["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    return config


def fill(model, folder):
    """A saved model's weights, or its adapter's, into this one in place. Raises OSError, RuntimeError or ValueError where they do not fit."""
    check_weights(folder)
    if has_lora(model):
        saved = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items()}
        if saved.keys() != (ours := _peft().get_peft_model_state_dict(model)).keys():
            raise ValueError(f"an adapter of {len(saved)} matrices does not fit one of {len(ours)}")
        _peft().set_peft_model_state_dict(model, saved)
    else:                           # through the class, because the hub's names are not the module's own
        # with this model's config: without config.json the class's default of 7B would be built
        saved, found = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=model.dtype,
            use_safetensors=True, output_loading_info=True)
        for kind in ("missing", "unexpected"):
            if names := sorted(found[f"{kind}_keys"]):
                raise ValueError(f"{len(names)} tensors are {kind}, such as {names[0]}")
        model.load_state_dict(saved.state_dict())


def fault_of(checkpoint, *, optimizer=True):
    """Why a run's checkpoint is not whole, in a few words; None where it is. Its checkpoint.json
    lists its files, with their bytes. optimizer=False: its model alone is wanted."""
    try:
        saved = json.loads((checkpoint / "checkpoint.json").read_text())
        int(saved["step"])
        for name, size in saved.get("files", {}).items():
            path = checkpoint / name
            if name.startswith("optimizer/") and not optimizer:
                continue
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size < size:
                return f"{name} is truncated: {path.stat().st_size:,} of {size:,} bytes"
    except FileNotFoundError:
        return "checkpoint.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"checkpoint.json is broken: {error!r}"
    return None


def newest_whole(folder, *, optimizer=True):
    """A run's folder -> (its newest whole checkpoint or None, a sentence on each newer one)."""
    passed_over = []
    for checkpoint in sorted(Path(folder).glob("step-*"), reverse=True):
        fault = fault_of(checkpoint, optimizer=optimizer)
        if fault is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over ({fault})")
    return None, passed_over


def newest_checkpoint(path):
    """A training run's folder -> its newest checkpoint whose model is whole; any other: itself."""
    checkpoint, passed_over = newest_whole(path, optimizer=False)
    if passed_over and checkpoint is None:
        raise SystemExit(f"{path} has no checkpoint that is whole: {'; '.join(passed_over)}; "
                         "give another folder")
    for sentence in passed_over:
        print(sentence)
    return str(checkpoint or path)


def write_card(folder, *, base, script, flags, results=None):
    """README.md beside the weights: what this model is, of which flags, and what it scored (a table, as text). Nothing where there is no folder."""
    if not Path(folder).is_dir():
        return
    library = "peft" if (Path(folder) / ADAPTER).exists() else "transformers"
    lines = ["---", f"base_model: {base}", f"library_name: {library}", "tags: [audio, distillation]", "---",
             f"# {Path(folder).resolve().parent.name}, {Path(folder).name}", "", f"{base}, trained further by `{script}` with these flags:", "", "```",
             *(f"{name}: {value}" for name, value in flags.items() if value is not None), "```"]
    lines += ["", "## Results, before and after", "", "```", results, "```"] if results else []
    (Path(folder) / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Check an audio language model as the training scripts do, and print its parts.")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--teacher", help="a text LLM: how the two vocabularies go together")
    parser.add_argument("--save", metavar="OUT", help="save the model in this folder; an adapter is added into its base's weights")
    parser.add_argument("--random-weights", type=int, metavar="LAYERS", help="load nothing: the shape of one of the papers' models, at most so deep")
    args = parser.parse_args(argv)
    if args.save and Path(args.save).exists():
        raise SystemExit(f"--save {args.save}: is there already; name a new folder")
    if args.random_weights:
        make = shapes.random_teacher if args.model in shapes.TEACHERS else shapes.random_student
        model, processor = make(args.model, args.random_weights, torch.bfloat16)
        return _save(model, processor, args.save)
    model, processor = load_audio_model(args.model, dtype="auto")
    used = {id(p) for p in check(model, processor, shared_prompts=True)}
    parts = {"decoder": decoder(model).parameters(), "head": model.get_output_embeddings().parameters(), "tower": tower(model).parameters(),
             "rest": projector(model)}
    print(f"{type(model).__name__}: {len(decoder(model).layers)} layers of width {decoder(model).config.hidden_size}; placeholder {processor.audio_token}; "
          f"clips up to {data.longest(processor):g} s")
    for name, parameters in parts.items():
        sizes = {id(p): p.numel() for p in parameters}
        idle = sum(size for key, size in sizes.items() if key not in used)
        print(f"{name:8} {sum(sizes.values()):14,} parameters, {idle:,} of them never get a gradient")
    if args.teacher:
        *_, summary = data.shared_vocabulary(processor.tokenizer, load_text_model(args.teacher)[1])
        print("vocabulary:", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in summary.items()))
    _save(model, processor, args.save)


def _save(model, processor, folder):
    if folder:
        Path(folder).mkdir(parents=True)
        save(model, processor, folder)
        print(f"{folder}: {model.num_parameters():,} parameters saved")


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
