"""losses.py against formulas written again in numpy float64, against other libraries, and against
its own promises.

Where a silent error lives, the error is planted here too (`wrong = ...`) and must be caught by the
same check.
"""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import sklearn.metrics
import sklearn.preprocessing
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import losses

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
BOTH = dict(rtol=1e-12, atol=1e-13)  # float64 against float64


def logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def pair(tokens=6, vocab=11, **kwargs):
    return logits(tokens, vocab, seed=1, **kwargs), logits(tokens, vocab, seed=2, **kwargs)


def formula(student, teacher, beta, tau=1.0):
    """The generalised JSD straight from its definition, probabilities and all: numpy, float64, one
    token at a time."""
    rows = []
    for s, t in zip(np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)):
        q = np.exp(s / tau - (s / tau).max())
        q = q / q.sum()
        p = np.exp(t / tau - (t / tau).max())
        p = p / p.sum()
        kl = lambda a, b: (
            sum(x * np.log(x / y) for x, y in zip(a, b) if x > 0)
            if (b[a > 0] > 0).all()
            else np.inf
        )
        m = beta * p + (1 - beta) * q
        rows.append({0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m)))
    return np.array(rows)


# --------------------------------------------------------------------------------------------------
# divergences between distributions


@pytest.mark.parametrize("tau", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_its_formula(beta, tau):
    student, teacher = pair()
    want = formula(student, teacher, beta, tau)
    student, teacher = student / tau, teacher / tau
    got = losses.token_divergence(student, teacher, beta=beta)
    np.testing.assert_allclose(got, want, **BOTH)
    np.testing.assert_allclose(losses.jsd(student, teacher, beta=beta), want.mean(), **BOTH)
    if beta != 0.5:  # the planted error: student and teacher swapped
        wrong = losses.token_divergence(teacher, student, beta=beta)
        assert not np.allclose(wrong, want, rtol=1e-3)


def test_kl_against_torch_and_jsd_against_scipy():
    student, teacher = pair()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(
        losses.jsd(student, teacher, beta=0),
        F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
    )
    torch.testing.assert_close(
        losses.jsd(student, teacher, beta=1),
        F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
    )
    want = scipy.spatial.distance.jensenshannon(log_p.exp(), log_q.exp(), axis=-1) ** 2
    np.testing.assert_allclose(losses.token_divergence(student, teacher), want, rtol=1e-10)


@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_is_the_closed_form(beta, tau):
    """d/dz_i of JSD_beta, forward and reverse KL in closed form: what the fused losses will rely
    on."""
    student, teacher = pair()
    student.requires_grad_()
    losses.token_divergence(student / tau, teacher / tau, beta=beta).sum().backward()
    q, p = (student.detach() / tau).softmax(-1), (teacher / tau).softmax(-1)
    if beta == 0:
        want = (q - p) / tau
    else:
        inner = (q / (p if beta == 1 else beta * p + (1 - beta) * q)).log()
        want = (
            q * (inner - (q * inner).sum(-1, keepdim=True)) * (1 if beta == 1 else 1 - beta) / tau
        )
    torch.testing.assert_close(student.grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck_divergence(beta):
    student, teacher = pair(3, 5)
    assert torch.autograd.gradcheck(
        lambda z: losses.jsd(z, teacher, beta=beta, denominator=5),
        student.requires_grad_(),
    )


def test_gradcheck_others():
    student, teacher = pair(3, 5)
    student.requires_grad_()
    labels, mean, std = torch.tensor([4, -100, 0]), teacher.mean(0), teacher.std(0)
    assert torch.autograd.gradcheck(
        lambda z: losses.cross_entropy(z, labels, denominator=7), student
    )
    for hidden_loss in losses.HIDDEN.values():
        assert torch.autograd.gradcheck(
            lambda h: hidden_loss(h, teacher, mean=mean, std=std, denominator=2), student
        )
        assert torch.autograd.gradcheck(lambda h: hidden_loss(h, teacher), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_far_apart_logits_stay_finite(beta, dtype):
    student = torch.tensor(
        [[1e4, 0, -1e4], [-1e4, 1e4, 0], [1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True
    )
    teacher = torch.tensor([[-1e4, 0, 1e4], [-1e4, 1e4, 0], [0, 0, 0]], dtype=dtype)
    value = losses.token_divergence(student, teacher, beta=beta)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()
    if beta == 0.5:
        torch.testing.assert_close(value, torch.tensor([math.log(2), 0, 0]))
        p, q = teacher.float().softmax(-1), student.detach().float().softmax(-1)
        wrong = p * (
            p.log() - (0.5 * (p + q)).log()
        )  # the planted error: log of the mixture instead of logaddexp
        assert wrong.isnan().any()


@pytest.mark.parametrize("beta", BETAS)
def test_masked_ids_do_not_exist(beta):
    student, teacher = pair(4, 9)
    keep = torch.tensor([0, 2, 3, 5, 8])
    masked = torch.ones(9, dtype=torch.bool).index_fill(0, keep, False)
    masked_student = student.masked_fill(masked, -math.inf).requires_grad_()
    got = losses.token_divergence(masked_student, teacher.masked_fill(masked, -math.inf), beta=beta)
    torch.testing.assert_close(
        got, losses.token_divergence(student[:, keep], teacher[:, keep], beta=beta)
    )
    got.sum().backward()
    assert masked_student.grad.isfinite().all() and (masked_student.grad[:, masked] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_ids_masked_on_one_side_only(beta):
    student, teacher = pair(4, 9, dtype=torch.float32)
    student[:, 3] = -math.inf
    teacher[:, 5] = -math.inf
    student.requires_grad_()
    value = losses.token_divergence(student, teacher, beta=beta)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()
    if 0 < beta < 1:
        np.testing.assert_allclose(
            value.detach(), formula(student.detach(), teacher, beta), rtol=1e-5
        )
    else:
        assert (value > 1e20).all()  # truly infinite: loud


def test_bad_arguments_are_named():
    student, teacher = pair()
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            losses.jsd(student, teacher, beta=beta)
    for wrong in (teacher[:1], teacher[:, :1], teacher[0]):  # each of these would broadcast
        for loss in (losses.jsd, losses.hidden_mse, losses.hidden_cosine):
            with pytest.raises(ValueError, match="same"):
                loss(student, wrong)
    with pytest.raises(ValueError, match="mean and std"):
        losses.hidden_mse(student, teacher, mean=teacher.mean(0))
    with pytest.raises(ValueError, match="labels"):
        losses.cross_entropy(student, torch.zeros(3, dtype=torch.int64))


numbers = st.floats(-30, 30, width=32)
two_rows = st.integers(2, 6).flatmap(
    lambda n: st.tuples(*[st.lists(numbers, min_size=n, max_size=n)] * 2)
)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(two_rows, st.floats(0.01, 0.99), st.floats(-50, 50), st.randoms(use_true_random=False))
def test_properties(rows, beta, shift, random):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in rows)
    value = losses.jsd(student, teacher, beta=beta)
    half = losses.jsd(student, teacher)
    assert value >= -1e-12 and -1e-12 <= half <= math.log(2) + 1e-12
    torch.testing.assert_close(half, losses.jsd(teacher, student))  # symmetric
    torch.testing.assert_close(
        value, losses.jsd(teacher, student, beta=1 - beta), rtol=1e-6, atol=1e-9
    )  # and mirrored
    torch.testing.assert_close(
        value, losses.jsd(student + shift, teacher - shift, beta=beta), rtol=1e-6, atol=1e-9
    )
    order = random.sample(range(student.shape[1]), student.shape[1])
    torch.testing.assert_close(value, losses.jsd(student[:, order], teacher[:, order], beta=beta))
    torch.testing.assert_close(
        losses.jsd(student, student, beta=beta), torch.zeros((), dtype=torch.float64)
    )
    # KL is convex, so KL(p || m) <= KL(p || q) / 2 and KL(q || m) <= KL(q || p) / 2
    forward = losses.jsd(student, teacher, beta=0)
    reverse = losses.jsd(student, teacher, beta=1)
    assert half <= 0.25 * (forward + reverse) + 1e-9


# --------------------------------------------------------------------------------------------------
# what all losses share: denominators, no tokens, precision, who learns

ALL = {
    "jsd": lambda s, t, **k: losses.jsd(s, t, **k),
    "forward_kl": lambda s, t, **k: losses.jsd(s, t, beta=0, **k),
    "reverse_kl": lambda s, t, **k: losses.jsd(s, t, beta=1, **k),
    "cross_entropy": lambda s, t, **k: losses.cross_entropy(s, t.argmax(-1), **k),
    "hidden_jsd": lambda s, t, **k: losses.hidden_jsd(
        s, t, mean=t.new_ones(t.shape[-1]), std=t.new_full(t.shape[-1:], 2), **k
    ),
    "hidden_mse": lambda s, t, **k: losses.hidden_mse(
        s, t, mean=t.new_ones(t.shape[-1]), std=t.new_full(t.shape[-1:], 2), **k
    ),
    "hidden_cosine": lambda s, t, **k: losses.hidden_cosine(
        s, t, mean=t.new_ones(t.shape[-1]), std=t.new_full(t.shape[-1:], 2), **k
    ),
}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())


@every_loss
def test_parts_of_a_batch_add_up(loss):
    student, teacher = pair(10, 7)
    whole = loss(student, teacher)
    torch.testing.assert_close(loss(student, teacher, denominator=10), whole)
    torch.testing.assert_close(loss(student, teacher, denominator=2.5), whole * 4)
    parts = sum(
        loss(student[a:b], teacher[a:b], denominator=10)
        for a, b in [(0, 1), (1, 1), (1, 8), (8, 10)]
    )
    torch.testing.assert_close(parts, whole)
    wrong = (
        sum(loss(student[a:b], teacher[a:b]) for a, b in [(0, 1), (1, 8), (8, 10)]) / 3
    )  # the planted error: a mean of means
    assert abs(wrong - whole) > 1e-4 * whole


@every_loss
@pytest.mark.parametrize("denominator", [None, 0, 5, 0.0])
def test_no_tokens_is_zero_with_a_graph(loss, denominator):
    weight = torch.randn(4, 7, requires_grad=True)
    value = loss(torch.zeros(0, 4) @ weight, torch.zeros(0, 7), denominator=denominator)
    assert value == 0 and value.requires_grad
    value.backward()
    assert (weight.grad == 0).all()


@every_loss
def test_tokens_without_a_count_are_refused(loss):
    with pytest.raises(ValueError, match="denominator 0"):
        loss(*pair(), denominator=0)


@every_loss
def test_only_the_student_learns(loss):
    student, teacher = pair()
    loss(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@every_loss
def test_arithmetic_is_float32(loss):
    student, teacher = pair(16, 300, dtype=torch.bfloat16)
    teacher = (student + 0.1 * teacher).to(
        torch.bfloat16
    )  # close, where differences of logarithms are small
    exact = loss(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(student.requires_grad_(), teacher)
    got.backward()
    assert (
        got.dtype == torch.float32
        and exact.dtype == torch.float64
        and student.grad.dtype == torch.bfloat16
    )
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=0)


def test_bfloat16_arithmetic_would_be_caught():
    student, teacher = pair(16, 300, dtype=torch.bfloat16)
    teacher = (student + 0.1 * teacher).to(torch.bfloat16)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    wrong = (log_p.exp() * (log_p - log_q)).sum(-1).mean().double()
    exact = losses.jsd(student.double(), teacher.double(), beta=0)
    assert abs(wrong - exact) > 1e-3 * exact


# --------------------------------------------------------------------------------------------------
# unequal vocabularies


def test_logits_are_float32_under_autocast_too():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 500, bias=False), torch.randn(7, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, rounded = losses.head_logits(hidden, head.weight), head(hidden)
    exact = hidden.double() @ head.weight.double().T
    assert rounded.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        losses.head_logits(hidden.double(), head.double().weight), exact.double()
    )
    losses.head_logits(hidden.double(), head.weight).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("noise, kl, off", [(0.3, 0.04, 0.09), (0.09, 0.004, 0.30)])
def test_what_logits_rounded_to_bfloat16_would_cost(noise, kl, off):
    """The figures in head_logits: standard deviation 3, 20,000 words, two distributions that are
    nearly the same."""
    torch.manual_seed(0)
    teacher = 3 * torch.randn(64, 20_000)
    student = teacher + noise * torch.randn(64, 20_000)

    def gradient(cast):
        z = cast(student).requires_grad_()
        losses.jsd(z, cast(teacher), beta=1).backward()
        return z.grad

    exact, rounded = gradient(lambda z: z.clone()), gradient(lambda z: z.bfloat16().float())
    assert losses.jsd(student, teacher, beta=1).item() == pytest.approx(kl, rel=0.15)
    assert ((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item() == pytest.approx(
        off, rel=0.15
    )


def test_shared_logits_renormalise_over_the_shared_tokens():
    student_logits, teacher_logits = logits(5, 8, seed=1).requires_grad_(), logits(5, 6, seed=2)
    student_ids, teacher_ids = (
        torch.tensor([7, 0, 2, 5]),
        torch.tensor([1, 4, 3, 0]),
    )  # other order, other numbers, holes
    student, teacher = losses.shared_logits(
        student_logits, teacher_logits, student_ids, teacher_ids
    )
    assert student.shape == teacher.shape == (5, 4)
    q = scipy.special.softmax(student_logits.detach().numpy(), -1)[:, [7, 0, 2, 5]]
    p = scipy.special.softmax(teacher_logits.numpy(), -1)[:, [1, 4, 3, 0]]
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    value = losses.jsd(student, teacher)
    np.testing.assert_allclose(
        value.item(), (scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2).mean(), rtol=1e-9
    )

    value.backward()
    foreign = [1, 3, 4, 6]
    assert (student_logits.grad[:, foreign] == 0).all() and (
        student_logits.grad[:, student_ids] != 0
    ).all()
    changed = student_logits.detach().clone()
    changed[:, foreign] += 100
    torch.testing.assert_close(losses.jsd(changed[:, student_ids], teacher), value.detach())

    wrong = losses.jsd(
        student_logits[:, teacher_ids], teacher
    )  # the planted error: the teacher's numbers on the student's side
    assert abs(wrong - value) > 1e-2
    with pytest.raises(ValueError, match="must be the same"):
        losses.jsd(
            *losses.shared_logits(student_logits, teacher_logits, student_ids, teacher_ids[:3])
        )


# --------------------------------------------------------------------------------------------------
# cross-entropy


def test_cross_entropy_against_torch_and_sklearn():
    z, labels = logits(40, 5), torch.arange(40) % 5
    torch.testing.assert_close(losses.cross_entropy(z, labels), F.cross_entropy(z, labels))
    np.testing.assert_allclose(
        losses.cross_entropy(z, labels), sklearn.metrics.log_loss(labels, z.softmax(-1)), rtol=1e-9
    )
    labels[::3] = -100
    torch.testing.assert_close(losses.cross_entropy(z, labels), F.cross_entropy(z, labels))
    torch.testing.assert_close(
        losses.cross_entropy(z, labels, denominator=100),
        F.cross_entropy(z, labels, reduction="sum") / 100,
    )
    wrong = F.cross_entropy(z, labels, reduction="sum") / len(
        labels
    )  # the planted error: ignored rows in the mean
    assert abs(wrong - losses.cross_entropy(z, labels)) > 1e-2


def test_cross_entropy_with_masked_ids_and_nothing_to_learn():
    z = logits(3, 5, dtype=torch.float32)
    z[:, 2] = -math.inf
    z.requires_grad_()
    value = losses.cross_entropy(z, torch.tensor([0, 1, 4]))
    torch.testing.assert_close(value, F.cross_entropy(z, torch.tensor([0, 1, 4])))
    value.backward()
    assert z.grad.isfinite().all()
    nothing = losses.cross_entropy(z, torch.full((3,), -100))
    assert nothing == 0 and nothing.requires_grad
    with pytest.raises((RuntimeError, IndexError)):
        losses.cross_entropy(
            z, torch.tensor([0, -1, 4])
        )  # -1 marks an unmapped token elsewhere: never silently label 0


# --------------------------------------------------------------------------------------------------
# hidden states


def test_hidden_losses_against_sklearn_and_scipy():
    student, teacher = logits(20, 12, seed=3, scale=5) + 2, logits(20, 12, seed=4, scale=2) - 1
    mean, std = teacher.mean(0), teacher.std(0, correction=0)
    scaler = sklearn.preprocessing.StandardScaler().fit(teacher.numpy())
    s, t = scaler.transform(student.numpy()), scaler.transform(teacher.numpy())
    cosine = sklearn.metrics.pairwise.paired_cosine_distances
    want = {
        "jsd": (
            scipy.spatial.distance.jensenshannon(
                scipy.special.softmax(s, -1), scipy.special.softmax(t, -1), axis=-1
            )
            ** 2
        ).mean(),
        "mse": sklearn.metrics.mean_squared_error(t, s),
        "cosine": cosine(t, s).mean(),
    }
    p, q = (scipy.special.softmax(x.numpy(), -1) for x in (student, teacher))
    want["raw-jsd"] = (
        scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2
    ).mean()  # statistics or not
    assert losses.HIDDEN.keys() == want.keys()
    for name, loss in losses.HIDDEN.items():
        np.testing.assert_allclose(
            loss(student, teacher, mean=mean, std=std), want[name], rtol=1e-9
        )
        own = (student - student.mean(0)) / student.std(
            0, correction=0
        )  # the planted error: the student's own statistics
        assert name == "raw-jsd" or abs(loss(own, torch.from_numpy(t)) - want[name]) > 1e-3
    np.testing.assert_allclose(
        losses.hidden_cosine(student, teacher), cosine(teacher, student).mean()
    )


@quick
@given(two_rows, st.floats(0.1, 10))
def test_hidden_properties(rows, length):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in rows)
    assert -1e-12 <= losses.hidden_jsd(student, teacher) <= math.log(2) + 1e-12
    assert losses.hidden_mse(student, teacher) >= 0
    assert -1e-12 <= losses.hidden_cosine(student, teacher) <= 2 + 1e-12
    for loss in losses.HIDDEN.values():
        # The zero vector has no direction, nor has one that is shorter than F.normalize's eps
        nowhere = loss is losses.hidden_cosine and teacher.norm() < 1e-12
        expect = 1.0 - teacher.square().sum().item() * 1e24 if nowhere else 0.0
        assert abs(loss(teacher, teacher) - expect) < 1e-12
    if student.norm() > 1e-3:
        torch.testing.assert_close(
            losses.hidden_cosine(length * student, teacher), losses.hidden_cosine(student, teacher)
        )


def outlier_world(size=300.0, tokens=64, features=256):
    """Hidden states like those of large decoders: one feature `size` times the others (and it
    varies as they do, relative to its size)."""
    teacher = logits(tokens, features, seed=5, scale=1)
    student = teacher + logits(tokens, features, seed=6, scale=0.5)
    for hidden, seed in ((teacher, 7), (student, 8)):
        hidden[:, 17] = size * (1 + 0.3 * logits(tokens, seed=seed, scale=1))
    return student, teacher, teacher.mean(0), teacher.std(0, correction=0)


def share_of_the_outlier(loss, **standardised):
    student, teacher, _, _ = outlier_world()
    student.requires_grad_()
    loss(student, teacher, **standardised).backward()
    # how far a step along the gradient moves each feature, in that feature's own standard
    # deviations
    moved = (student.grad.abs() * teacher.std(0)).sum(0)
    return (moved[17] / moved.sum()).item(), student.grad


@pytest.mark.parametrize("name", ["jsd", "mse", "cosine"])
def test_an_outlier_feature_owns_the_raw_loss_but_not_the_standardised_one(name):
    _, teacher, mean, std = outlier_world()
    raw, raw_grad = share_of_the_outlier(losses.HIDDEN[name])
    fair, fair_grad = share_of_the_outlier(losses.HIDDEN[name], mean=mean, std=std)
    assert raw > (0.3 if name == "cosine" else 0.9), raw  # 0.3 is still 80 times its fair share
    assert fair < 0.05, fair  # 1 of 256 features
    if name == "jsd":  # the softmax of raw features is saturated: nobody else learns
        others = torch.arange(256) != 17
        assert raw_grad[:, others].abs().sum() < 1e-6 * fair_grad[:, others].abs().sum()


def test_scaling_the_whole_token_does_not_help():
    """The tempting remedy, root mean square 1 per token, leaves the outlier an outlier."""
    student, teacher, mean, std = outlier_world()
    rms = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
    student.requires_grad_()
    losses.hidden_jsd(rms(student), rms(teacher)).backward()
    others = torch.arange(256) != 17
    scaled = (student.grad * std)[:, others].abs().sum()
    student.grad = None
    losses.hidden_jsd(student, teacher, mean=mean, std=std).backward()
    assert scaled < 0.01 * (student.grad * std)[:, others].abs().sum()


def test_raw_cosine_sees_no_difference_between_tokens():
    _, teacher, mean, std = outlier_world()
    shuffled = teacher.roll(1, 0)
    assert losses.hidden_cosine(shuffled, teacher) < 0.01
    assert losses.hidden_cosine(shuffled, teacher, mean=mean, std=std) > 0.9


def test_what_a_small_difference_of_hidden_states_costs():
    """e, e / 2 and e / 8: README compares the three at equal alpha and at equal strength."""
    torch.manual_seed(0)
    teacher = torch.randn(40, 2048, dtype=torch.float64)
    student = teacher + 0.05 * torch.randn_like(teacher)
    mse = losses.hidden_mse(student, teacher)
    assert mse / losses.hidden_cosine(student, teacher) == pytest.approx(2, rel=0.02)
    assert mse / losses.hidden_jsd(student, teacher) == pytest.approx(8, rel=0.02)


# -------------------- CORD: weights and advantages -----------------------------------------------


def weights(kl, lengths, **how):
    return losses.cord_weights(torch.tensor(kl, dtype=torch.float64), lengths, **how).tolist()


def test_cord_weights_by_hand():
    # T = 5, K = 2: the largest D_t are the third and the first
    np.testing.assert_allclose(
        weights([0.5, 0.1, 0.9, 0.2, 0.0], [5], alpha=2, beta=2, top_share=0.4),
        [2 * 2, 1.75, 2 * 1.5, 1.25, 1],
    )
    np.testing.assert_allclose(
        weights([0.7], [1], alpha=3, beta=2, top_share=0.1), [6]
    )  # T = 1: the start, and the largest
    np.testing.assert_allclose(
        weights([0.1, 0.2], [2], alpha=2, beta=1, top_share=1.0), [2, 2]
    )  # T < K of the paper: all of them
    np.testing.assert_allclose(
        weights([0.3] * 4, [4], alpha=2, beta=1, top_share=0.5), [2, 2, 1, 1]
    )  # ties: the earlier ones
    np.testing.assert_allclose(weights([0.3] * 3, [3], alpha=1, beta=1), [1, 1, 1])  # uniform
    np.testing.assert_allclose(
        weights([1.0, 0, 0, 9], [4], alpha=2, beta=1, top_share=0), [1, 1, 1, 1]
    )
    # two rollouts behind each other: each has its own K and its own positions
    two = weights([5.0, 4, 3, 2, 0.1, 0.2], [4, 2], alpha=2, beta=3, top_share=0.25)
    np.testing.assert_allclose(two, [2 * 3, 3 - 2 / 3, 3 - 4 / 3, 1, 3, 2 * 1])
    np.testing.assert_allclose(
        weights([0.2, 0.1, 0.4], [2, 0, 1], alpha=2, beta=2, top_share=0.5), [4, 1, 4]
    )  # an empty one in between
    assert weights([], []) == []


def test_the_papers_top_20_of_200():
    kl = torch.rand(200, dtype=torch.float64)
    assert losses.largest_share(kl, [200], 0.1).sum() == 20 and set(
        kl.topk(20).indices.tolist()
    ) == set(losses.largest_share(kl, [200], 0.1).nonzero()[:, 0].tolist())
    with pytest.raises(RuntimeError, match=r"\(200\) must match .* \(199\)"):
        losses.cord_weights(kl, [199])


def test_weights_carry_no_gradient():
    kl = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert not losses.cord_weights(kl, [4, 2]).requires_grad


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_allclose(
        losses.group_advantages(rewards),
        [[0.75, -0.25, -0.25, -0.25], [0] * 4, [0] * 4, [0.5, 0.5, -0.5, -0.5]],
    )


def test_log_probability_is_torchs_and_its_gradient_too():
    torch.manual_seed(0)
    logits, tokens, heat = (
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 6, 3, 3, 1]),
        torch.tensor([1.0, 1.5, 0.5, 2, 1], dtype=torch.float64),
    )
    expected = torch.distributions.Categorical(logits=logits / heat[:, None]).log_prob(tokens)
    torch.testing.assert_close(losses.log_probability(logits, tokens, heat), expected)
    assert torch.autograd.gradcheck(lambda z: losses.log_probability(z, tokens, heat), (logits,))
