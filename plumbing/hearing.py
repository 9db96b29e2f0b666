"""Does it hear? What cannot be asked of a model's class is measured at start, on noise.

    check           an audio language model, on two clips: does the sound reach the decoder, are
                    there as many placeholders as audio vectors, is the head a matrix alone, which
                    parameters get a gradient, can rollouts share a prompt?
    check_teacher   a text LLM: is its head a matrix alone?

So a family that nobody thought of works, or is refused with a sentence that says why.
"""

import math

import torch
from torch.overrides import TorchFunctionMode

import data
import models


def check(model, processor, *, shared_prompts=False):
    """Ask a model the questions of the opening, on noise of 1 and 1.5 seconds -> the parameters
    that get a gradient from what it hears (a list). Raises SystemExit with what is wrong.

    shared_prompts: also whether two rollouts in one sequence are what each is alone."""
    noise = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=noise).numpy() for n in (16_000, 24_000)]
    question = data.audio_prompt(processor, "What is that?")
    ids, features = data.audio_inputs(processor, [question, question], waves)
    prompts = data.Prompts(examples=[], audio=ids, text=[], features=features)
    view = data.audio_view(prompts, [0, 1], [[1, 2], [3]], processor).to(model.device)
    if shared_prompts:
        _check_window(model)
    with torch.no_grad(), models.autocast(model):
        hidden = _check_hearing(model, view, prompts.features)
        _check_positions(model, view.inputs, hidden)
        _check_head(model, hidden, lambda: models.forward(model, view.inputs))
    with models.autocast(model):                # anew: it has kept casts without a gradient
        if shared_prompts:
            _check_sharing(model, processor, prompts)
        return _with_gradient(model, view.inputs)


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
    # -> the last hidden states [2, seq, hidden]
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
    return hidden


def _check_positions(model, inputs, hidden):
    # Positions that count 0, 1, 2, ... are those that the model would count by itself
    real = inputs["attention_mask"].bool()                              # [2, seq]
    plain = {key: x for key, x in inputs.items() if key != "position_ids"}
    if not torch.equal(models.hear(model, **plain)[real], hidden[real]):
        raise SystemExit(f"{type(model).__name__} counts positions in a way of its own, so that "
                         "the two views would not line up; take another model")


def _check_head(model, hidden, forward):
    """Does the head get these hidden states, and are its products the logits as they are? Granite
    scales them, Gemma caps them. forward(): the whole model on the same tokens."""
    seen = {}

    def note(module, given, output):
        seen.update(given=given[0], output=output)

    models.head_weight(model)                                           # refuses a bias
    hook = model.get_output_embeddings().register_forward_hook(note)
    try:
        logits = forward().logits
    finally:
        hook.remove()
    as_they_are = torch.equal(seen["output"].float(), logits.float())   # float() rounds nothing
    if not torch.equal(seen["given"], hidden) or not as_they_are:
        raise SystemExit(f"{type(model).__name__} does not get its logits by its head's matrix "
                         "alone (it scales or caps them); losses.py would learn another "
                         "distribution: take another model")


def check_teacher(model):
    """Is a text LLM's head a matrix alone? Raises SystemExit if not."""
    ids = torch.arange(8, device=model.device)[None]                    # [1, 8]
    with torch.no_grad():
        _check_head(model, models.read(model, input_ids=ids), lambda: model(ids))


def _check_sharing(model, processor, prompts):
    """Two responses behind one prompt: the second must depend on the prompt and on itself, and
    have no gradient at all from the first, whatever the type of the weights."""
    first, second = [1, 2], [4, 5]
    view = data.audio_view(prompts, [0, 0], [first, second], processor).to(model.device)
    end = len(prompts.audio[0])
    embeddings = []

    def keep(module, given, output):
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0].clone()                                    # some write into it

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        hidden = models.hear(model, **view.inputs)[0]                   # [seq, hidden]
    finally:
        hook.remove()
    gradient, = torch.autograd.grad(hidden[-1, 0], embeddings[0])       # of a feature of its end
    used = gradient[0].any(-1).tolist()                                 # [seq]
    with torch.no_grad():
        in_a_row = torch.arange(len(used), device=model.device)[None]
        elsewhere = models.hear(model, **{**view.inputs, "position_ids": in_a_row})[0]

    sees_the_first = any(used[end:end + len(first)])
    sees_the_prompt = used[0] and used[end - 1]
    moves = not torch.equal(hidden[-1], elsewhere[-1])
    if sees_the_first or not sees_the_prompt or not moves:
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


def _with_gradient(model, inputs):
    # -> the parameters that get a gradient. DDP would wait for the others for ever
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
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
