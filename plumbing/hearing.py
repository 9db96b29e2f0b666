"""Does it hear? What cannot be asked of a model's class is measured at start, on noise.

    check           an audio language model, on two clips: does the sound reach the decoder, are
                    there as many placeholders as audio vectors, is the head a matrix alone, which
                    parameters get a gradient, can rollouts share a prompt?
    check_teacher   a text LLM: is its head a matrix alone?

So a family that nobody thought of works, or is refused with a sentence that says why.
"""

import contextlib
import math

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

import data
import models


def check(model, processor, *, shared_prompts=False):
    """Ask a model the questions of the opening, on noise of 1 and 1.5 seconds -> the parameters
    that get a gradient from what it hears (a list). Raises SystemExit with what is wrong.

    shared_prompts: also whether two rollouts in one sequence are what each is alone."""
    noise = torch.Generator().manual_seed(0)
    waves = []
    for samples in (16_000, 24_000):
        wave = 0.1 * torch.randn(samples, generator=noise)
        waves.append(wave.numpy())
    question = data.audio_prompt(processor, "What is that?")
    ids, features = data.audio_inputs(processor, [question, question], waves)
    prompts = data.Prompts(examples=[], audio=ids, text=[], features=features)
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
            hidden = models.hear(model, **view.inputs)             # [2, seq, hidden]
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"{name} does not take what its processor makes of a clip ({reason}); "
                         "take both from one checkpoint") from None
    if not scatters.seen:
        raise SystemExit(f"{name} does not scatter the sound into the prompt's embeddings "
                         "(masked_scatter), so nothing here can tell whether it hears; take a "
                         "family of docs/families.md")
    if any(values != places for values, places in scatters.seen):
        raise SystemExit(f"{name} does not put the sound where the prompt's placeholders are "
                         f"((values, places): {scatters.seen}); take model and processor from one "
                         "checkpoint")

    # The same clips backwards must change the hidden states at the audio tokens
    backwards = dict(view.inputs)
    for key, x in view.inputs.items():
        if key in features and x.is_floating_point():
            backwards[key] = x.flip(-1)
    same = (models.hear(model, **backwards) == hidden).flatten(0, 1)           # [2 * seq, hidden]
    if same[view.audio_positions].all(-1).any():
        raise SystemExit(f"{name} does not hear: other sound in the same prompt leaves hidden "
                         "states at its audio tokens as they are")


def _with_gradient(model, inputs):
    # -> the parameters that get a gradient. DDP would wait for the others for ever
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    with _as_trained(model):
        nodes = [models.hear(model, **inputs).sum().grad_fn]

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
    hidden = models.hear(model, **inputs)[real]                                # [tokens, hidden]
    logits = models._forward(model, plain).logits[real]                        # [tokens, 512 or so]
    if not _close(logits, hidden @ models.head_weight(model).T):
        raise SystemExit(_odd_head(model))


def _check_sharing(model, processor, prompts):
    def hidden_of(rows, responses):
        view = data.audio_view(prompts, rows, responses, processor).to(model.device)
        hidden = models.hear(model, **view.inputs).flatten(0, 1)
        return hidden[view.predict_positions]                           # [5, hidden]

    # Only neighbours share a prompt: each response alone, then two of prompt 0 in one sequence
    alone = hidden_of([0, 1, 0], [[1, 2], [3], [4, 5]])
    joint = hidden_of([0, 0, 1], [[1, 2], [4, 5], [3]])
    if not _close(alone[[0, 1, 3, 4, 2]], joint):
        raise SystemExit(f"{type(model).__name__}'s attention does not take a mask of its own, so "
                         "that a prompt's rollouts cannot share it, as CORD has them do; take a "
                         "family of docs/families.md")


def _check_window(model):
    # Rollouts that share a prompt bring one mask for all layers: a window would be lost
    config = models.decoder(model).config
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
        hidden = models.read(model, input_ids=ids)                             # [1, 8, hidden]
        if not _close(model(ids).logits, hidden @ models.head_weight(model).T):
            raise SystemExit(_odd_head(model))


@contextlib.contextmanager
def _in_float32(model, parameters):
    """Inside, `model` computes exactly, and little: the first two layers of its decoder and 512
    rows of its head, in float32 without autocast and gradient.

    In bfloat16 two right ways to the same numbers differ by some per cent at the end of a deep
    model, and so would a wrong one. parameters: those that matter. They come back as they were;
    meanwhile tower, projector and two layers are there twice, about 4 GB more for a 7B model."""
    text, head = models.decoder(model), model.get_output_embeddings()
    if getattr(text.config, "final_logit_softcapping", None):
        raise SystemExit(_odd_head(model))
    weight = models.head_weight(model).detach()
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
    return (
        f"{type(model).__name__} does not get its logits by its head's matrix alone (it scales "
        "or caps them), or counts positions in a way of its own; losses.py would learn another "
        "distribution: take another model"
    )
