"""The fused losses against the formulas in float64, against Liger-Kernel and TRL, by gradcheck, and
what they must not do: hold a [tokens, vocab]
matrix, run the teacher where no KL is, compute a gradient that nobody wants, say NaN."""

import inspect
import math
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused
import losses

BETAS = [0.0, 0.3, 0.5, 1.0]
KINDS = ["random", "close", "identical", "one-hot", "disjoint", "huge"]
many = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True, params=["by blocks", "as for a compiler"])
def way(request):
    """Everything here twice: as a CPU goes through a chunk, and as a GPU does, there compiled."""
    if request.param == "by blocks":
        yield request.param
    else:
        with mock.patch.multiple(fused, _compiles=lambda device: True, _compiled=lambda work: work):
            yield request.param


def model(kind, tokens, vocab, width, generator, scale=1.0, twin=None):
    """hidden [tokens, width] and weight [vocab, width], float32. Logits of 1e4 are made so that
    float32 holds them exactly: hidden states that pick one
    column of the weight. twin: the student, of whom a teacher may be a copy or the opposite."""
    random = lambda *shape: torch.randn(*shape, generator=generator)
    if kind in ("random", "close", "identical"):
        if twin is None or kind == "random":
            return random(tokens, width), scale * random(vocab, width)
        return tuple(x + (1e-3 * random(*x.shape) if kind == "close" else 0) for x in twin)
    hidden = torch.eye(width)[torch.randint(width, (tokens,), generator=generator)]
    if kind == "huge":
        return hidden, torch.randint(-10_000, 10_001, (vocab, width), generator=generator).float()
    favourite = (
        torch.randint(vocab, (width,), generator=generator) if twin is None else twin[1].argmax(0)
    )
    if twin is not None:  # who speaks the same words, or never the same
        hidden, favourite = twin[0], (favourite + (kind == "disjoint")) % vocab
    return hidden, 1e4 * torch.nn.functional.one_hot(favourite, vocab).T.float()


def gradients(loss, hidden, weight, *more, **how):
    """(values, gradient of hidden, gradient of weight) of loss(hidden, weight, ...)."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = loss(hidden, weight, *more, **how)
    values[0].backward()
    return [v.detach().double() for v in values], hidden.grad.double(), weight.grad.double()


def double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def compare(fused, formula, args, how, tolerance, chunk, scale=1.0):
    """Norm-wise relative errors below tolerance. Floors, for what is nearly zero itself: what
    float32 can know of logits that large, 2^-20 of them, in nats; for gradients the same share of
    that of -log q alone, of the least likely tokens. scale: what the loss weighs, against that
    mean."""
    floor = (
        2**-20
        * scale
        * max(
            1.0,
            *(
                (double(h) @ double(w).T).abs().max().item()
                for h, w in (args[:2], args[2:4])
                if len(h)
            ),
        )
    )
    got = gradients(fused, *args, **how, chunk_tokens=chunk)
    want = gradients(formula, *map(double, args), **{name: double(x) for name, x in how.items()})
    unlikely = (double(args[0]) @ double(args[1]).T).argmin(-1)
    unit = gradients(
        losses.jsd_ce, double(args[0]), double(args[1]), None, None, unlikely, ce_weight=1.0
    )[1:]
    for name, x, y in zip(("loss", "second", "third", "fourth"), got[0], want[0]):
        assert x.isfinite().all(), name
        assert (x - y).norm() <= tolerance * y.norm() + floor * math.sqrt(x.numel()), (name, x, y)
    # Where all tokens have the same row of weights the gradient is 0, and rounding is not
    factors = [double(x).abs().max() / len(args[0]) if x.numel() else 0.0 for x in args[1::-1]]
    for name, x, y, one, factor in zip(("hidden", "weight"), got[1:], want[1:], unit, factors):
        assert x.isfinite().all(), name
        assert (x - y).norm() <= tolerance * y.norm() + floor * max(one.norm(), factor), (
            name,
            (x - y).norm() / y.norm(),
            y.norm(),
            one.norm(),
        )


@many
@given(
    st.integers(1, 300),
    st.one_of(st.integers(2, 60), st.integers(2, 5000)),
    st.integers(1, 12),
    st.integers(1, 400),
    st.sampled_from(KINDS),
    st.sampled_from(BETAS),
    st.sampled_from(["none", "pair"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 10_000),
)
@example(1, 2, 1, 1, "random", 0.5, "none", 0.0, torch.float32, 0)
@example(300, 5000, 12, 77, "random", 0.5, "pair", 0.3, torch.float32, 1)
@example(40, 900, 12, 7, "identical", 0.5, "none", 0.0, torch.float32, 2)
@example(40, 900, 12, 7, "disjoint", 0.5, "none", 0.0, torch.float32, 3)
@example(40, 900, 12, 7, "huge", 1.0, "none", 0.0, torch.float32, 4)
@example(9, 50, 3, 4, "random", 0.5, "none", 1.0, torch.float32, 5)
def test_jsd_ce_equals_its_formula(
    tokens, vocab, width, chunk, kind, beta, share, ignored, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    student = model(kind, tokens, vocab, width, generator, scale=2.0)
    teacher = model(kind, tokens, vocab, width, generator, scale=2.0, twin=student)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    ids = {"none": None}
    if share == "pair":  # the teacher numbers them otherwise, and has rows to spare
        order, spare = (
            torch.randperm(vocab, generator=generator),
            torch.randn(3, width, generator=generator),
        )
        teacher = teacher[0], torch.cat([spare, teacher[1][order]])
        ids["pair"] = (order[: max(1, vocab - 1)], 3 + torch.arange(vocab)[: max(1, vocab - 1)])
    args = [x.to(dtype) for x in (*student, *teacher)]
    compare(
        fused.jsd_ce,
        losses.jsd_ce,
        [*args, labels],
        dict(ce_weight=0.4, beta=beta, shared_ids=ids[share]),
        2e-5 if dtype == torch.float32 else 1e-2,
        chunk,
    )


@many
@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),
            st.booleans(),
            st.sampled_from([0.0, 0.75, -0.25]),
            st.sampled_from([1.0, 1.5, 0.6]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.one_of(st.integers(4, 60), st.integers(4, 5000)),
    st.integers(1, 12),
    st.integers(1, 400),
    st.sampled_from(["random", "identical", "huge"]),
    st.sampled_from([(2.0, 2.0, 0.1), (1.0, 1.0, 0.1), (3.0, 1.0, 0.5)]),
    st.sampled_from([1.0, 0.0]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 10_000),
)
def test_cord_equals_its_formula(
    rollouts, vocab, width, chunk, kind, weights, divergence_beta, bans, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    counts = [n for n, *_ in rollouts]
    flat = lambda values, kind: torch.tensor(
        [v for v, n in zip(values, counts) for _ in range(n)], dtype=kind
    )
    carries_kl, lengths = (
        flat([kl for _, kl, *_ in rollouts], torch.bool),
        [n for n, kl, *_ in rollouts if kl],
    )
    student = model(kind, sum(counts), vocab, width, generator)
    hidden, weight = model(kind, sum(counts), vocab, width, generator, twin=student)
    args = [x.to(dtype) for x in (*student, hidden[carries_kl], weight)]
    labels = torch.randint(2, vocab, (sum(counts),), generator=generator)
    alpha, beta, top_share = weights
    # Which tokens are the largest is a jump: two that float32 cannot tell apart may change places.
    # Equal or well apart here: all of random, none of identical.
    compare(
        fused.cord,
        losses.cord,
        [*args, labels],
        dict(
            lengths=lengths,
            carries_kl=carries_kl,
            advantage=flat([a / 7 for *_, a, _ in rollouts], torch.float32),
            temperature=flat([t for *_, t in rollouts], torch.float32),
            banned=torch.tensor([0, 1]) if bans else None,
            divergence_beta=divergence_beta,
            alpha=1.0 if kind == "identical" else alpha,
            beta=beta,
            top_share=top_share,
            denominator=5,
        ),
        2e-5 if dtype == torch.float32 else 1e-2,
        chunk,
        scale=sum(counts) * alpha * beta / 5,
    )


@many
@given(
    st.integers(1, 300),
    st.integers(2, 200),
    st.sampled_from(["random", "close", "identical"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 10_000),
)
def test_hidden_jsd_equals_its_formula(tokens, width, kind, standardised, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, width, generator=generator)
    teacher = {"random": torch.randn(tokens, width, generator=generator), "identical": student}.get(
        kind, student * 1.001
    )
    student, teacher = (3 * student).to(dtype), (3 * teacher).to(dtype)
    how = (
        dict(
            mean=torch.randn(width, generator=generator),
            std=0.5 + torch.rand(width, generator=generator),
        )
        if standardised
        else {}
    )
    results = []
    for loss, cast in ((fused.hidden_jsd, lambda x: x), (losses.hidden_jsd, torch.Tensor.double)):
        x = cast(student).clone().requires_grad_()
        value = loss(
            x, cast(teacher), denominator=2 * tokens, **{name: cast(y) for name, y in how.items()}
        )
        value.backward()
        results.append((value.detach().double(), x.grad.double()))
    (got, grad), (want, exact) = results
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    assert abs(got - want) <= tolerance * want + 1e-7 and (
        grad - exact
    ).norm() <= tolerance * exact.norm() + 1e-6 / math.sqrt(tokens)


def test_the_idea_is_the_mean_reverse_kl_and_its_gradients():
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 8).double(), torch.randn(50, 8).double()
    teacher, teacher_weight = torch.randn(30, 6).double(), torch.randn(50, 6).double()
    loss, d_hidden, d_weight = fused.the_idea(hidden, weight, teacher, teacher_weight, 7)
    formula = lambda h, w: (losses.jsd(h @ w.T, teacher @ teacher_weight.T, beta=1),)
    want = gradients(formula, hidden, weight)
    torch.testing.assert_close([loss, d_hidden, d_weight], [want[0][0], want[1], want[2]])
    source = inspect.getsource(fused.the_idea).splitlines()
    assert len([line for line in source if line.strip()]) <= 25


def test_a_planted_error_is_seen():
    """The comparison above must notice a tenth of a per cent, in a weight or in the temperature."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (model("random", 30, 50, 4, generator) for _ in range(2))
    args = [*student, *teacher, torch.randint(50, (30,), generator=generator)]
    for wrong in (
        lambda *a, **k: fused.jsd_ce(*a, **{**k, "ce_weight": 0.5005}),
        lambda hidden, *a, **k: fused.jsd_ce(hidden / 1.001, *a, **k),
    ):
        with pytest.raises(AssertionError):
            compare(wrong, losses.jsd_ce, args, {}, 2e-5, 7)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "shared", [None, (torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3]))]
)
def test_gradcheck_jsd_ce(beta, shared):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (6, 3))
    )
    teacher, teacher_weight, labels = (
        torch.randn(5, 2).double(),
        torch.randn(6, 2).double(),
        torch.tensor([4, -100, 0, 1, 5]),
    )
    assert torch.autograd.gradcheck(
        lambda h, w: fused.jsd_ce(
            h,
            w,
            teacher,
            teacher_weight,
            labels,
            beta=beta,
            shared_ids=shared,
            denominator=3,
            chunk_tokens=2,
        )[0],
        (hidden, weight),
    )


@pytest.mark.parametrize("divergence_beta", [0.0, 1.0])
def test_gradcheck_cord_and_hidden(divergence_beta):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 3), (6, 3))
    )
    carries_kl = torch.tensor([True] * 3 + [False] * 2 + [True] * 2)
    how = dict(
        lengths=[3, 2],
        carries_kl=carries_kl,
        advantage=torch.tensor([0, 0, 0, 0.5, 0.5, -0.3, -0.3]),
        temperature=torch.tensor([1, 1, 1, 1.5, 1.5, 0.8, 0.8]),
        banned=torch.tensor([2]),
        divergence_beta=divergence_beta,
        top_share=0.4,
        denominator=4,
        chunk_tokens=2,
    )
    teacher, teacher_weight, labels = (
        torch.randn(5, 2).double(),
        torch.randn(6, 2).double(),
        torch.tensor([4, 3, 0, 1, 5, 0, 1]),
    )
    assert torch.autograd.gradcheck(
        lambda h, w: fused.cord(h, w, teacher, teacher_weight, labels, **how)[0], (hidden, weight)
    )
    mean, std, other = (
        torch.randn(3).double(),
        torch.rand(3).double() + 0.5,
        torch.randn(7, 3).double(),
    )
    assert torch.autograd.gradcheck(
        lambda h: fused.hidden_jsd(h, other, mean=mean, std=std, denominator=4), hidden
    )
    assert torch.autograd.gradcheck(lambda h: fused.hidden_jsd(h, other), hidden)


# -------------------- other libraries ------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_against_liger(beta):
    LigerFusedLinearJSDLoss = pytest.importorskip(
        "liger_kernel.chunked_loss"
    ).LigerFusedLinearJSDLoss
    generator = torch.Generator().manual_seed(0)
    student, teacher = (model("random", 50, 300, 16, generator) for _ in range(2))
    labels = torch.randint(300, (50,), generator=generator)
    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5,
        weight_soft_loss=1.0,
        beta=beta,
        compiled=False,
        chunk_size=16,
    )
    theirs = gradients(lambda h, w, *more: (liger(h, w, *more),), *student, *teacher, labels)
    ours = gradients(
        fused.jsd_ce,
        *student,
        *teacher,
        labels,
        beta=beta,
        chunk_tokens=13,
    )
    torch.testing.assert_close(ours[0][0], theirs[0][0], rtol=2e-5, atol=0)
    for x, y in zip(ours[1:], theirs[1:]):
        assert (x - y).norm() < 2e-5 * y.norm()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_formula_against_trl(beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(2, 9, 40, dtype=torch.float64),
        torch.randn(2, 9, 40, dtype=torch.float64),
    )
    labels = torch.where(torch.rand(2, 9) < 0.3, -100, 1)
    theirs = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels=labels, beta=beta, temperature=0.9
    )
    counted = labels != -100
    student, teacher = student / 0.9, teacher / 0.9
    torch.testing.assert_close(losses.jsd(student[counted], teacher[counted], beta=beta), theirs)
    # Hidden states that are the logits at that temperature
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    head = torch.eye(40, dtype=torch.float64)
    _, top, _ = fused.jsd_ce(
        student, head, teacher, head, labels.flatten(), beta=beta, chunk_tokens=4
    )
    torch.testing.assert_close(top, theirs)


# -------------------- what must and must not happen ----------------------------------------------


class Watch(TorchDispatchMode):
    """Records the largest output of any operation and the rows of every matrix product with a given
    number of columns."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x):
                self.largest = max(self.largest, x.numel())
        if "mm" in func.__name__:
            self.products.append((tuple(args[-2].shape), tuple(args[-1].shape)))
        return out


def cord_arguments(vocab=600, teacher_width=5):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(500, 4, requires_grad=True),
        torch.randn(vocab, 4, requires_grad=True),
    )
    carries_kl = torch.arange(500) < 200
    return (
        hidden,
        weight,
        torch.randn(200, teacher_width),
        torch.randn(vocab, teacher_width),
        torch.randint(vocab, (500,)),
    ), dict(
        lengths=[120, 80],
        carries_kl=carries_kl,
        advantage=torch.where(carries_kl, 0, 0.5),
        temperature=torch.where(carries_kl, 1.0, 1.5),
        chunk_tokens=50,
    )


def test_no_matrix_of_tokens_by_vocabulary_is_ever_made():
    (hidden, weight, teacher, teacher_weight, labels), how = cord_arguments()
    with Watch() as cord:
        fused.cord(hidden, weight, teacher, teacher_weight, labels, **how)[0].backward()
    with Watch() as jsd:
        fused.jsd_ce(hidden, weight, hidden.detach(), weight.detach(), labels, chunk_tokens=50)[
            0
        ].backward()
    with Watch() as formula:
        losses.jsd_ce(hidden, weight, hidden.detach(), weight.detach(), labels)[0].backward()
    assert cord.largest <= 50 * 600 and jsd.largest <= 50 * 600 and formula.largest == 500 * 600


def test_the_teacher_runs_for_tokens_with_kl_alone_and_the_largest_once_more():
    args, how = cord_arguments(teacher_width=5)
    with Watch() as watch:
        fused.cord(*args, **how)
    teacher = sum(a[0] for a, b in watch.products if b == (5, 600))
    student = sum(a[0] for a, b in watch.products if b == (4, 600))
    assert (
        teacher == 200 + 12 + 8 and student == 500 + 12 + 8
    )  # a tenth of 120 and of 80, a second time
    how["carries_kl"], how["lengths"] = torch.zeros(500, dtype=torch.bool), []
    with Watch() as watch:
        fused.cord(*args[:2], None, None, args[4], **how)
    assert sum(a[0] for a, b in watch.products if b == (4, 600)) == 500


def test_a_chunks_logits_are_gone_before_the_next(monkeypatch):
    made, alive, real = [], [], fused._logits

    def watched(*args):
        alive.append(sum(ref() is not None for ref in made))
        z = real(*args).clone()  # not the pool's
        made.append(weakref.ref(z))
        return z

    monkeypatch.setattr(fused, "_logits", watched)
    (hidden, weight, teacher, teacher_weight, labels), how = cord_arguments()
    banned = torch.tensor([next(i for i in range(600) if i not in labels)])
    fused.cord(hidden, weight, teacher, teacher_weight, labels, **how, banned=banned)
    assert len(alive) > 10 and max(alive) == 1  # the student's, when the teacher's are made


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gradients_only_for_what_learns(frozen):
    (hidden, weight, *_, labels), _ = cord_arguments()
    learns = {"hidden": frozen == "weight", "weight": frozen == "hidden"}
    hidden, weight = (
        hidden.detach().requires_grad_(learns["hidden"]),
        weight.detach().requires_grad_(learns["weight"]),
    )
    with Watch() as watch:
        loss = fused.jsd_ce(
            hidden, weight, hidden.detach(), weight.detach(), labels, chunk_tokens=500
        )[0]
    assert len(watch.products) == 2 + sum(learns.values()) and loss.requires_grad == any(
        learns.values()
    )
    with Watch() as watch, torch.no_grad():
        assert not fused.jsd_ce(
            hidden.requires_grad_(), weight, hidden, weight, labels, chunk_tokens=500
        )[0].requires_grad
    assert len(watch.products) == 2


@pytest.mark.parametrize("denominator", [None, 0, 5])
def test_no_tokens_and_all_ignored_are_zero_with_a_graph(denominator):
    for tokens in (0, 3):
        hidden, weight = (
            torch.randn(tokens, 4, requires_grad=True),
            torch.randn(9, 4, requires_grad=True),
        )
        for loss in (fused.jsd_ce, losses.jsd_ce):
            value, jsd, ce = loss(
                hidden,
                weight,
                hidden.detach(),
                weight.detach(),
                torch.full((tokens,), -100),
                denominator=denominator,
            )
            value.backward()
            assert value == jsd == ce == 0 and (weight.grad == 0).all() and (hidden.grad == 0).all()
        none = dict(
            lengths=[],
            carries_kl=torch.zeros(0, dtype=torch.bool),
            advantage=torch.zeros(0),
            temperature=torch.zeros(0),
        )
        for loss in (fused.cord, losses.cord):
            value, *each = loss(
                hidden[:0], weight, None, None, torch.zeros(0, dtype=torch.int64), **none
            )
            value.backward()
            assert value == 0 and all(len(x) == 0 for x in each)
    assert fused.hidden_jsd(
        torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4), denominator=denominator
    ).requires_grad


def test_parts_of_a_batch_add_up():
    (hidden, weight, *_, labels), _ = cord_arguments()
    teacher = torch.randn_like(hidden), torch.randn_like(weight)
    whole = fused.jsd_ce(hidden, weight, *teacher, labels)[0]
    parts = sum(
        fused.jsd_ce(
            hidden[a:b], weight, teacher[0][a:b], teacher[1], labels[a:b], denominator=500
        )[0]
        for a, b in ((0, 1), (1, 1), (1, 320), (320, 500))
    )
    torch.testing.assert_close(parts, whole)


def test_bad_arguments_are_named():
    (hidden, weight, teacher, teacher_weight, labels), how = cord_arguments()
    cases = [
        (lambda: fused.jsd_ce(hidden, weight, hidden, weight, labels[1:]), "labels"),
        (lambda: fused.jsd_ce(hidden, weight, hidden[1:], weight, labels), "teacher rows"),
        (lambda: fused.jsd_ce(hidden, weight, hidden, weight, labels, beta=1.5), "beta"),
        (
            lambda: fused.jsd_ce(hidden, weight, hidden, weight, labels, denominator=0),
            "denominator 0",
        ),
        (lambda: fused.cord(hidden, weight, teacher[1:], teacher_weight, labels, **how), "lengths"),
        (lambda: fused.cord(hidden, weight, teacher, teacher_weight[1:], labels, **how), "heads"),
        (lambda: fused.jsd_ce(hidden, weight, hidden, weight[1:], labels), "heads"),
        (
            lambda: fused.cord(
                torch.cat([hidden, hidden]), weight, teacher, teacher_weight, labels, **how
            ),
            "rows: these must be the same",
        ),
        (
            lambda: fused.cord(
                hidden, weight, teacher, teacher_weight, labels, **{**how, "lengths": [120, 81]}
            ),
            "lengths",
        ),
        (
            lambda: fused.cord(
                hidden, weight, teacher, teacher_weight, labels, **{**how, "lengths": []}
            ),
            "the same",
        ),
        (
            lambda: losses.cord(
                hidden,
                weight,
                teacher[1:],
                teacher_weight,
                labels,
                **{k: v for k, v in how.items() if k != "chunk_tokens"},
            ),
            "the same",
        ),
        (
            lambda: fused.cord(
                hidden, weight, teacher, teacher_weight, labels, **how, banned=labels[7:8]
            ),
            f"label {labels[7].item()} is banned",
        ),
        (
            lambda: fused.cord(
                hidden, weight, teacher, teacher_weight, labels, **how, denominator=0
            ),
            "denominator 0",
        ),
        (
            lambda: fused.cord(
                hidden, weight, teacher, teacher_weight, labels, **how, divergence_beta=1.7
            ),
            "divergence_beta 1.7",
        ),
        (lambda: fused.hidden_jsd(hidden, hidden[:1]), "same"),
        (lambda: fused.hidden_jsd(hidden, hidden.detach(), mean=hidden[0]), "mean and std"),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()


def test_autocast_rounds_neither_inputs_nor_logits():
    """Two distributions that are nearly the same: fused, under autocast, beside the formula in
    float64, and what autocast's own logits would give."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), 0.5 * torch.randn(4000, 32)
    other, labels, how = (
        hidden + 0.02 * torch.randn_like(hidden),
        torch.zeros(64, dtype=torch.int64),
        dict(ce_weight=0.0, beta=1.0),
    )
    exact = gradients(
        losses.jsd_ce, *map(torch.Tensor.double, (hidden, weight, other, weight)), labels, **how
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(fused.jsd_ce, hidden, weight, other, weight, labels, **how)
        z = torch.nn.functional.linear(hidden.requires_grad_(), weight)
        losses.jsd(
            z.float(), torch.nn.functional.linear(other, weight).float(), beta=1
        ).backward()
    assert (got[1] - exact[1]).norm() < 1e-4 * exact[1].norm()
    assert (hidden.grad.double() - exact[1]).norm() > 3e-2 * exact[1].norm()


def test_the_denominator_is_not_rounded_to_16_bits():
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    for denominator in (700, 1030, 70_001):
        torch.testing.assert_close(
            fused.hidden_jsd(student, teacher, denominator=denominator),
            losses.hidden_jsd(student, teacher, denominator=denominator),
            rtol=1e-5,
            atol=0,
        )


def test_float16_hidden_states_and_a_large_loss_scale():
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 16).half().requires_grad_(), torch.randn(40, 16).half()
    (2**16 * fused.hidden_jsd(student, teacher)).backward()
    exact = student.detach().double().requires_grad_()
    losses.hidden_jsd(exact, teacher.double()).backward()
    assert ((student.grad.double() / 2**16) - exact.grad).norm() < 1e-2 * exact.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_path_has_the_right_shapes_and_types(dtype, monkeypatch):
    """No GPU at hand: fake tensors on a fake CUDA device go the same way, and every operation
    checks its types."""
    monkeypatch.setattr(fused, "_compiled", lambda work: work)
    monkeypatch.setattr(
        torch,
        "addmm",
        lambda x, a, b, out_dtype, out: out.copy_(x + torch.mm(a, b, out_dtype=out_dtype)),
    )  # fake tensors only know it for one type
    monkeypatch.setattr(fused, "_rows_per_chunk", lambda chunk_tokens, vocab, device: 2048)
    with FakeTensorMode():
        on = dict(device="cuda")
        hidden, weight, teacher, teacher_weight = (
            torch.empty(*shape, dtype=dtype, **on)
            for shape in ((6000, 32), (151_936, 32), (6000, 48), (152_064, 48))
        )
        d_weight, each = torch.zeros(151_936, 32, **on), torch.empty(6000, **on)
        shared = (
            torch.empty(151_000, dtype=torch.int64, **on),
            torch.empty(151_000, dtype=torch.int64, **on),
        )
        d_hidden = torch.zeros(6000, 32, **on)
        operands = [*fused._operands(hidden, weight), *fused._operands(teacher, teacher_weight)]
        d, nll, spread = fused._head_pass(
            torch.arange(6000, **on),
            (*operands[:2], d_hidden, d_weight),
            operands[2:],
            torch.empty(6000, dtype=torch.int64, **on),
            each,
            each,
            each,
            chunk_tokens=None,
            beta=0.5,
            shared=shared,
            banned=torch.empty(5, dtype=torch.int64, **on),
            entropy=True,
        )
    assert all(x.dtype == dtype for x in operands)
    assert (
        all(x.dtype == torch.float32 and x.shape == (6000,) for x in (d, nll, spread))
        and d_hidden.shape == (6000, 32)
        and d_hidden.dtype == torch.float32
    )


def test_chunks_by_free_memory(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free // 2 << 30, 80 << 30)
    )  # the other half is in PyTorch's own cache, unused
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 + free - free // 2 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 << 30)
    sizes = []
    for free in (1, 8, 40, 80):         # noqa: B007 (the fakes above read it)
        sizes.append(fused._rows_per_chunk(None, 151_936, torch.device("cuda")))
    assert (
        sizes == sorted(sizes)
        and all(128 <= size <= 2048 and size % 128 == 0 for size in sizes)
        and sizes[0] < sizes[-1]
    )
    assert 4 * 4 * 151_936 * sizes[1] < 8 << 30


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.slow
@pytest.mark.parametrize("case", ["jsd", "shared", "cord", "group"])
def test_compiled_it_says_the_same(case, way):
    """On a GPU the chunk is compiled; here by the CPU's compiler, from the same lines."""
    if way != "by blocks":
        pytest.skip("compiles nothing")
    torch.manual_seed(0)
    z, t, labels, a, c, heat = (
        3 * torch.randn(33, 70),
        3 * torch.randn(33, 72),
        torch.randint(70, (33,)),
        torch.rand(33),
        torch.rand(33),
        0.5 + torch.rand(33),
    )
    how = dict(
        beta=1.0 if case == "cord" else 0.5,
        shared=None,
        entropy=case == "cord",
        dtype=torch.bfloat16,
    )
    if case == "shared":
        how["shared"] = torch.randint(72, (70,)), torch.tensor([0.0, fused.FLOOR]).repeat(35)
    args = (
        z,
        None if case == "group" else t if case == "shared" else t[:, :70].contiguous(),
        labels,
        a,
        c,
        heat if case == "group" else None,
    )
    for x, y in zip(fused._compiled(fused._chunk)(*args, **how), fused._chunk(*args, **how)):
        torch.testing.assert_close(x, y, rtol=1e-5 if x.dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
def test_states_compiled_say_the_same_for_any_number_of_rows(way, monkeypatch):
    if way != "by blocks":
        pytest.skip("compiles nothing")
    monkeypatch.setattr(fused, "_compiles", lambda device: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for width in (48, 64):
        for rows in (50, 40, 33, 70):
            torch.manual_seed(rows)
            student, teacher, mean, std = (
                torch.randn(rows, width).bfloat16(),
                torch.randn(rows, width).bfloat16(),
                torch.randn(width),
                0.5 + torch.rand(width),
            )
            got, want = (
                loss(student, teacher, mean=mean, std=std)
                for loss in (fused.hidden_jsd, losses.hidden_jsd)
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for each width


@pytest.mark.slow
def test_a_gpu_reads_the_logits_three_times_and_writes_the_gradient_once(way):
    pytest.importorskip("triton")
    if way != "by blocks":
        pytest.skip("the same again")
    said = subprocess.run(
        [sys.executable, Path(__file__).parent / "gpu" / "kernels_for_h100.py"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.stdout.count("| 6 | 1 |") == 6 and said.stdout.count(" | 3 | 1 |") == 2, (
        said.stdout + said.stderr
    )
