"""Which layer teaches which, how to get at those layers, and how to compare them when one model is
wider than the other.

Paper A (arXiv 2509.18579) distils not only the last layer: student layer l of 28 learns from
teacher layer floor(l * 36 / 28 + 1/2) of 36, so that each student layer looks at the teacher at the
same relative depth. Three things are needed for that, and a fourth for L_ac:

    pairs         the map itself
    Tap           takes the hidden states out of a running model: these layers only, these positions
                  only, BEFORE the final norm
    Projections   W_i per pair, student width -> teacher width, and the teacher's mean and standard
                  deviation per feature, which the divergences of losses.py standardise with
    Statistics    mean and deviation of the acoustic teacher, which needs no W

Layers count from 1, as in the paper: layer l is the output of the l-th decoder layer. Layer 0 would
be the embeddings.

Where the paper is silent, we choose:
1. W_i maps student -> teacher, so that the target is fixed. The other way round, W_i = 0 and a
   student of zeros agree perfectly.
2. W_i starts from least squares on a calibration batch, at equal widths too: between models that do
   not share a base, the features of one have nothing to do with those of the other, and the
   identity would be chance. From a random start the JSD of hidden states lies near its bound ln 2,
   where it is flat, and at the paper's learning rate of 1e-5 it would hardly leave it.
3. A teacher much shallower than the student could round to layer 0. The first layer stands in.

This file needs nothing but torch (and safetensors in `load`), and can be copied by itself.

    pairs(28, 36)              # every student layer (the paper's "layer-wise")
    pairs(28, 36, every=7)     # "skip-layer, 1-in-7": [(7, 9), (14, 18), (21, 27), (28, 36)]
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------
# 1. The map

def pairs(student_layers, teacher_layers, every=1, only=None):
    """[(student_layer, teacher_layer), ...], 1-based, ascending: floor(l * T / S + 1/2) for l = S,
    S - every, S - 2 every, ...

    Counted down, so that the last layer is always taught: pairs(28, 36, every=7) is
    [(7, 9), (14, 18), (21, 27), (28, 36)]. `only` keeps the named student layers of these (which
    layers carry the gain?). ValueError for counts or layers that do not exist."""
    if min(student_layers, teacher_layers, every) < 1:
        raise ValueError(f"student_layers {student_layers}, teacher_layers {teacher_layers} and "
                         f"every {every} must each be at least 1")
    mapped = []
    for layer in range(student_layers, 0, -every):
        # floor(x + 1/2) in integers, which are exact
        nearest = (2 * layer * teacher_layers + student_layers) // (2 * student_layers)
        mapped.insert(0, (layer, max(1, nearest)))
    if only is None:
        return mapped

    layers = [layer for layer, _ in mapped]
    if not only or not set(only) <= set(layers):
        raise ValueError(f"{sorted(only)} must name some of the mapped student layers {layers}")
    return [pair for pair in mapped if pair[0] in set(only)]


# -------------------------------------------------------------------------------------------------
# 2. The tap

class Tap:
    """Keeps the output of chosen decoder layers at chosen positions while a model runs.

        groups = {"response": [7, 14, 21, 28], "audio": range(1, 29)}
        tap = Tap(model.language_model.layers, groups)
        with tap.at(response=predict_positions, audio=audio_positions) as hidden:
            model(**inputs)
        hidden["response"][28]                              # [tokens, hidden]

    Positions are int64, on the flattened [batch * seq] axis. output_hidden_states=True would hold
    every layer at every position, and its last entry is AFTER the final norm: another quantity.

    The hooks stay on the model; outside of `at` they do nothing. A copy.deepcopy of a tapped model
    is not tapped. Gradient checkpointing works with use_reentrant=False, transformers' default."""

    def __init__(self, layers, groups):
        self.groups = {name: frozenset(numbers) for name, numbers in groups.items()}
        self.now = None     # inside `at`: (positions, hidden, grad was enabled)
        wanted = sorted(frozenset().union(*self.groups.values()))
        if wanted and not 1 <= wanted[0] <= wanted[-1] <= len(layers):
            raise ValueError(f"layers {wanted} cannot all be tapped: the model has layers 1 to "
                             f"{len(layers)}")
        for number in wanted:
            self._hook(layers[number - 1], number)

    @contextmanager
    def at(self, **positions):
        """One forward pass with one int64 position vector per group (it may be empty).

        Yields {group: {layer: [tokens, hidden]}}."""
        if positions.keys() != self.groups.keys():
            raise ValueError(f"positions for {sorted(positions)} given to a tap made for "
                             f"{sorted(self.groups)}: name exactly these")
        hidden = {name: {} for name in self.groups}
        self.now = (positions, hidden, torch.is_grad_enabled())
        try:
            yield hidden
        finally:
            self.now = None
        for name, numbers in self.groups.items():
            missing = sorted(numbers - hidden[name].keys())
            if missing:
                raise RuntimeError(f"layers {missing} for {name!r} did not run inside tap.at: run "
                                   "the tapped model itself in the block")

    def _hook(self, layer, number):
        def keep(module, _, output):
            if self.now is None or module is not layer:         # not ours to keep, or a deep copy
                return
            positions, hidden, grad_enabled = self.now
            if isinstance(output, tuple):
                output = output[0]                              # [batch, seq, hidden]
            trains = module.training and any(p.requires_grad for p in module.parameters())
            if trains and grad_enabled and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"layer {number} of a model that trains runs without gradient, so its hidden "
                    "states teach nothing: use gradient checkpointing with use_reentrant=False, "
                    "or, if it is meant, tap.at inside torch.no_grad()")

            for name, numbers in self.groups.items():
                if number not in numbers:
                    continue
                if number in hidden[name]:
                    raise RuntimeError(f"layer {number} ran twice inside one tap.at: one block per "
                                       "forward pass, and backward after it")
                # Gradient checkpointing (use_reentrant=False) may run the layer and this hook again
                # in backward, and compares what autograd saved in both runs. By then the block is
                # over. So the gather saves its positions out of checkpointing's sight, and the
                # second run has nothing to repeat, whichever of several forwards it belongs to
                with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                    flat = output.flatten(0, 1)                 # [batch * seq, hidden]
                    hidden[name][number] = flat.index_select(0, positions[name])
        layer.register_forward_hook(keep)


# -------------------------------------------------------------------------------------------------
# 3. From one width to the other

def feature_statistics(hidden):
    """Hidden states of a calibration batch [tokens, width] -> mean [width], std [width], float32.

    A feature that hardly moves on the calibration batch would be blown up into an outlier of our
    own making once the student moves it, so no std is below a hundredth of the median one.
    ValueError for under two tokens or for NaN/inf."""
    if hidden.dim() != 2 or len(hidden) < 2 or not hidden.isfinite().all():
        raise ValueError(
            f"the hidden states to calibrate on, {list(hidden.shape)}, must be finite "
            "[tokens, width] with at least 2 tokens: calibrate on more examples, and in bfloat16 "
            "or float32 if float16 overflowed")
    hidden = hidden.detach().double()
    std = hidden.std(0, correction=0)
    least = max(0.01 * std.median().item(), 1e-6)
    return hidden.mean(0).float(), std.clamp(min=least).float()


class Projections(nn.Module):
    """Per pair i: W_i [teacher_width, student_width] (trained, no bias), and the frozen teacher's
    mean[i] and std[i] [teacher_width].

    Before `fit`: W_i is the (rectangular) identity, a placeholder, mean 0, std 1. Fit on the same
    tokens on every rank, before DDP or FSDP wraps it: neither copies rank 0's mean and std. Keep it
    in float32: at 16 bit, steps of its learning rate would round to nothing. (The product itself
    follows autocast.)"""

    def __init__(self, layer_pairs, student_width, teacher_width):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.eye(teacher_width, student_width) for _ in layer_pairs
        )
        self.register_buffer("mean", torch.zeros(len(layer_pairs), teacher_width))
        self.register_buffer("std", torch.ones(len(layer_pairs), teacher_width))
        self.register_buffer("layers", torch.tensor(layer_pairs))   # [pairs, 2], for `load`

    def forward(self, pair_index, student_hidden):
        """[tokens, student_width] -> [tokens, teacher_width], still in the teacher's raw units."""
        weight = self.weights[pair_index]
        return F.linear(student_hidden.to(weight.dtype), weight)

    @torch.no_grad()
    def fit(self, pair_index, student_hidden, teacher_hidden):
        """Mean and std from the teacher, W by least squares.

        student [tokens, student_width], teacher [tokens, teacher_width]. ValueError for tokens
        that are not finite.

        The ridge is 0.3 * width / tokens. Without one, a batch of about as many tokens as features
        fits its own noise: on new tokens its error is hundreds of times the teacher's variance.
        Features are first scaled to standard deviation 1, so that the outliers do not set the
        ridge of all others. Nothing is centred: W has no bias, and the large constant part of the
        outlier features serves as one."""
        self.mean[pair_index], self.std[pair_index] = feature_statistics(teacher_hidden)

        weight = self.weights[pair_index]
        tokens, width = len(student_hidden), weight.shape[1]
        scale = feature_statistics(student_hidden)[1].double()              # [width]
        x = student_hidden.double() / scale                                 # [tokens, width]
        gram = x.T @ x / tokens                                             # [width, width]
        gram.diagonal().add_(0.3 * width / tokens)
        target = x.T @ teacher_hidden.double() / tokens                     # [width, teacher_width]
        solution = torch.linalg.solve(gram, target)
        weight.copy_((solution / scale[:, None]).T)


class Statistics(nn.Module):
    """The acoustic teacher's feature statistics at audio positions.

    `statistics[layer]`, counted from 1, is mean [width], std [width]."""

    def __init__(self, layers, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(layers), width))
        self.register_buffer("std", torch.ones(len(layers), width))
        self.register_buffer("layers", torch.tensor(list(layers)))          # [layers], for `load`
        self.row = {layer: row for row, layer in enumerate(layers)}

    def __getitem__(self, layer):
        row = self.row[layer]
        return self.mean[row], self.std[row]

    def fit(self, layer, hidden):
        """hidden: the acoustic teacher's, [audio_tokens, width]."""
        row = self.row[layer]
        self.mean[row], self.std[row] = feature_statistics(hidden)


def load(module, path):
    """Fill Projections or Statistics from their safetensors file beside a checkpoint.

    ValueError if made for other layers, RuntimeError for other widths."""
    from safetensors.torch import load_file  # here, so that this file needs torch alone

    saved = load_file(path)
    theirs, ours = saved["layers"].tolist(), module.layers.tolist()
    if theirs != ours:
        raise ValueError(f"{path}: made for layers {theirs}, but this run maps layers {ours}: use "
                         "the flags and models of the run that saved it")
    module.load_state_dict(saved)
