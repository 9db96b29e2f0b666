"""Every loss of both papers as its formula: slow, readable, and the measure of everything faster.

The training scripts use fused.py by default. It gives the same numbers and gradients without ever
holding a [tokens, vocab] matrix, and the tests hold it against this file in float64.

Notation   Logits z, teacher p = softmax(z_teacher), student q = softmax(z_student).
Shapes     All losses take flat matrices [tokens, vocab] or [tokens, features], one row per token
           that counts: no padding, no batch axis. Row k of the student and row k of the teacher
           speak about the same response token; that is the collator's work (data.py).

Four rules hold for every loss here:
1. It returns a SUM over its rows divided by `denominator`. The papers mean over tokens, and the
   mean that stays the same on one GPU or eight is over the tokens of the whole step. So the caller
   counts those once, gives the count to every rank and micro-batch, and the parts add up. Without
   `denominator` it is the number of rows (of `cord`: of rollouts that carry L_tok).
2. An empty input gives 0 (with a graph, so that backward still runs on that rank), not NaN.
3. The arithmetic is float32, or float64 if the inputs are: differences of logarithms do not
   survive in bfloat16.
4. The teacher's side is detached: only the student learns.

Papers: A = arXiv 2509.18579, B = arXiv 2601.16547 (CORD). This file needs nothing but torch and
can be copied by itself. Beside fused.py and Liger-Kernel: python -m lab.bench losses
"""

import math

import torch
import torch.nn.functional as F

IGNORE = -100   # the label that counts for nothing, as everywhere in PyTorch

# The logit of an id that must have no probability. Not -inf, because -inf - -inf is NaN. A KL that
# is truly infinite (the student excludes what the teacher wants) comes out huge: finite and loud.
FLOOR = -1e30


# -------------------------------------------------------------------------------------------------
# 1. What all losses share

def _wide(x):
    """float32, or float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def _log_softmax(logits, temperature=1.0):
    return F.log_softmax(_wide(logits).clamp(min=FLOOR) / temperature, dim=-1)


def head_logits(hidden, weight):
    """[tokens, hidden], a head's weight [vocab, hidden] -> logits [tokens, vocab].

    In float32 (or float64) whatever autocast says: rounded to bfloat16, logits put an error of 9 %
    on the gradient of a divergence of 0.04 nats, 30 % at 0.004; CORD's D_t become that small."""
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        return F.linear(hidden.to(dtype), weight.to(dtype))


def _same_shape(student, teacher):
    # PyTorch would broadcast [5, v] against [1, v] without a word, and the student would then
    # learn from the wrong token
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must be "
                         "the same [tokens, width]: gather both at predict_positions; unequal "
                         "vocabularies need shared_logits, unequal hidden sizes a projection")


def _mean(per_token, denominator):
    """[tokens] -> scalar: sum / denominator (default: the number of tokens)."""
    tokens = per_token.numel()
    if tokens == 0:
        return per_token.sum()          # 0, with a graph, even where the whole step counted 0
    if denominator is None:
        denominator = tokens
    if denominator <= 0:
        raise ValueError(f"denominator {denominator} for {tokens} tokens: pass the whole step's "
                         "token count")
    return per_token.sum() / denominator


# -------------------------------------------------------------------------------------------------
# 2. Divergences between next-token distributions (A: L_top; B: D_t)

def token_divergence(student_logits, teacher_logits, *, beta=0.5):
    """The generalised Jensen-Shannon divergence in nats: [tokens, vocab] twice -> [tokens].

        m = beta p + (1 - beta) q
        JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m)

    beta = 1/2 is the symmetric one, between 0 and ln 2. At both ends JSD_beta itself is 0, so by
    convention (Liger's and TRL's too) beta = 0 means the forward KL(p || q), the limit of
    JSD_beta / beta, and beta = 1 the reverse KL(q || p), that of JSD_beta / (1 - beta).

    At temperature 1: the papers have no other. Logits may be -inf. ValueError for unequal shapes
    and for beta outside [0, 1]."""
    _same_shape(student_logits, teacher_logits)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta {beta} must lie in [0, 1]")
    log_q = _log_softmax(student_logits)                            # [tokens, vocab]
    log_p = _log_softmax(teacher_logits.detach())                   # [tokens, vocab]

    # Forward KL: where the teacher is, the student must be. It covers every mode
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    # Reverse KL: where the student is, the teacher must be. It seeks a mode
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    # log m from the logarithms: where p and q both underflow to 0, log(beta p + (1 - beta) q)
    # would be -inf, and the product NaN
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)                  # KL(p || m)  [tokens]
    kl_q = (log_q.exp() * (log_q - log_m)).sum(-1)                  # KL(q || m)  [tokens]
    return beta * kl_p + (1 - beta) * kl_q


def jsd(student_logits, teacher_logits, *, beta=0.5, denominator=None):
    """L_top of paper A (beta 1/2): the sum of token_divergence / denominator, a scalar."""
    return _mean(token_divergence(student_logits, teacher_logits, beta=beta), denominator)


def shared_logits(student_logits, teacher_logits, student_ids, teacher_ids):
    """Two vocabularies -> the tokens they share: [tokens, vocab] each -> [tokens, shared] each.

    Ids [shared] int64: student_ids[i] and teacher_ids[i] are one token (data.shared_vocabulary).
    The softmax that follows then runs over the shared tokens alone, which renormalises both sides.
    All other tokens, and the unused rows that pad an embedding table, get no gradient from it."""
    student = student_logits.index_select(-1, student_ids)
    teacher = teacher_logits.index_select(-1, teacher_ids)
    return student, teacher


# -------------------------------------------------------------------------------------------------
# 3. Paper A on the response: L_SFT, and both terms from hidden states

def cross_entropy(logits, labels, *, denominator=None):
    """L_SFT: -log q(label), over the whole vocabulary.

    [tokens, vocab], [tokens] int64 -> scalar. Rows labelled -100 count nowhere. Nothing is shifted:
    the logits are already those that predict these labels. ValueError for labels of other rows."""
    if len(labels) != len(logits):              # gather would take the first rows without a word
        raise ValueError(f"{len(labels)} labels for {len(logits)} rows of logits")
    counted = labels != IGNORE
    log_q = _log_softmax(logits)                                    # [tokens, vocab]
    labels = labels.masked_fill(~counted, 0)
    picked = log_q.gather(-1, labels[:, None])[:, 0]                # [tokens]
    return _mean(-picked[counted], denominator)


def jsd_ce(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *,
    ce_weight=0.5, beta=0.5, shared_ids=None, denominator=None,
):
    """L_top + ce_weight * L_SFT -> (loss, jsd, ce); only the loss has a graph.

    student_hidden [tokens, hidden]           last hidden states at predict_positions
    student_weight [vocab, hidden]            the head (no bias)
    teacher_hidden [tokens, teacher hidden]   None (its head too): no L_top
    teacher_weight [teacher vocab, teacher hidden]
    labels [tokens] int64                     rows labelled -100 count for neither term
    beta                                      as in token_divergence
    shared_ids                                the tokens that L_top runs over: student's ids and
                                              teacher's ids, int64 [shared] each; None: all. L_SFT
                                              is over the student's whole head."""
    counted = labels != IGNORE
    student = head_logits(student_hidden[counted], student_weight)          # [counted, vocab]
    ce = cross_entropy(student, labels[counted], denominator=denominator)
    top = torch.zeros_like(ce)
    if teacher_hidden is not None:
        teacher = head_logits(teacher_hidden[counted], teacher_weight)      # [counted, its vocab]
        if shared_ids is not None:
            student, teacher = shared_logits(student, teacher, *shared_ids)     # [counted, shared]
        top = jsd(student, teacher, beta=beta, denominator=denominator)
    return top + ce_weight * ce, top.detach(), ce.detach()


# -------------------------------------------------------------------------------------------------
# 4. Paper A inside: divergences between hidden states (L_layer, L_ac)
#
# The paper says "divergence" and leaves it open. The three below work on features standardised with
# the TEACHER's mean and standard deviation, measured once on a calibration batch and then fixed
# (layer_map.py keeps them):
#
#     s = (student - mean) / std        t = (teacher - mean) / std
#
# because a few features of every large decoder are hundreds of times larger than the rest ("massive
# activations", arXiv 2402.17762). Raw, they own everything: a softmax over features puts all its
# mass on them and the other thousands get no gradient; a squared error is their error; a cosine is
# nearly 1 between any two tokens. Scaling the token as a whole does not help: an outlier stays one.
#
# Of mean square e, a small difference costs e in mse, e / 2 in cosine, e / 8 in JSD: alphas differ.

def _standardise(student, teacher, mean, std):
    _same_shape(student, teacher)
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: pass both, or neither for raw features")
    student = _wide(student)
    teacher = _wide(teacher.detach())
    if mean is None:
        return student, teacher
    return (student - mean) / std, (teacher - mean) / std           # [tokens, features]


def hidden_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    """JSD (beta 1/2) between softmaxes over features, at most ln 2.

    [tokens, features] twice, mean and std [features] -> scalar. A softmax ignores what is added to
    all features of a token, so this compares which features stand out, and by how much."""
    student, teacher = _standardise(student, teacher, mean, std)
    return jsd(student, teacher, denominator=denominator)


def hidden_mse(student, teacher, *, mean=None, std=None, denominator=None):
    """Squared error in units of the teacher's variance, averaged over the features so that wide
    and narrow models weigh the same. Shapes as in hidden_jsd."""
    student, teacher = _standardise(student, teacher, mean, std)
    return _mean((student - teacher).square().mean(-1), denominator)


def hidden_cosine(student, teacher, *, mean=None, std=None, denominator=None):
    """1 - cosine, between 0 and 2: direction only, the length of a hidden state is free."""
    student, teacher = _standardise(student, teacher, mean, std)
    student = F.normalize(student, dim=-1)
    teacher = F.normalize(teacher, dim=-1)
    cosine = (student * teacher).sum(-1)                            # [tokens]
    return _mean(1 - cosine, denominator)


def hidden_raw_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    """The JSD of raw features, statistics ignored: what a first reading of the paper would write,
    kept so that it can be measured."""
    return hidden_jsd(student, teacher, denominator=denominator)


# --hidden-divergence of train_source_layer.py, by name
HIDDEN = {
    "jsd": hidden_jsd,
    "mse": hidden_mse,
    "cosine": hidden_cosine,
    "raw-jsd": hidden_raw_jsd,
}


# -------------------------------------------------------------------------------------------------
# 5. Paper B: which tokens of a rollout count more, which rollouts were better than their siblings
#
#     L_tok = sum_t w_t D_t        D_t = KL(q_t || p_t): token_divergence(student, teacher, beta=1)
#     L_seq = - A log q(y | audio)
#
# Tokens of all rollouts lie behind each other on one flat axis; each has `lengths` of them.

def largest_share(kl, lengths, share):
    """The K = share * T (rounded up) tokens of each rollout with the largest D_t: kl [tokens],
    lengths that sum to tokens -> [tokens] bool. Of equal ones the earlier counts as larger."""
    mask = torch.zeros_like(kl, dtype=torch.bool)
    start = 0
    for length in lengths:
        order = kl[start:start + length].argsort(descending=True, stable=True)
        k = math.ceil(share * length - 1e-9)            # 0.07 * 100 is 7.000000000000001
        mask[start + order[:k]] = True
        start += length
    return mask


def position_weights(kl, lengths, beta):
    """w_t^pos = beta - (beta - 1) (t - 1) / (T - 1), t = 1 ... T: from beta down to 1 -> [tokens].

    kl gives type and device. A rollout of one token gets beta."""
    weights = [beta - (beta - 1) * t / max(length - 1, 1)       # here t counts from 0
               for length in lengths for t in range(length)]
    return torch.tensor(weights, dtype=kl.dtype, device=kl.device)


def cord_weights(kl, lengths, *, alpha=2.0, beta=2.0, top_share=0.1):
    """w_t = w_t^KL * w_t^pos of flat tokens, constants (no gradient), as above -> [tokens].

        w_t^KL = alpha for the K tokens of a rollout with the largest D_t, else 1

    The paper has K = 20 for rollouts of at most 200 tokens; we keep the share, K = top_share * T,
    so that short rollouts are weighted alike."""
    largest = largest_share(kl.detach(), lengths, top_share)
    return torch.where(largest, alpha, 1.0) * position_weights(kl, lengths, beta)


def group_advantages(rewards):
    """A_i = r_i - mean of its group: [prompts, rollouts] -> the same shape.

    No division by the deviation, as in the paper (and Dr. GRPO): it would blow up groups that
    nearly all agree. Equal rewards give no signal."""
    return rewards - rewards.mean(-1, keepdim=True)


def log_probability(logits, tokens, temperature):
    """log q(token) of the distribution that was sampled from: [tokens, vocab] -> [tokens]."""
    log_q = _log_softmax(logits, temperature[:, None])
    return log_q.gather(-1, tokens[:, None])[:, 0]


def cord(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *,
    lengths, carries_kl, advantage, temperature, banned=None, divergence_beta=1.0,
    alpha=2.0, beta=2.0, top_share=0.1, denominator=None,
):
    """sum_t w_t D_t / denominator - sum_t advantage_t log q(label_t) -> (loss, kl, log_q, entropy).

    A scalar, and without gradient D_t, log q(label_t) and the student's entropy, [tokens] each;
    D_t and entropy are 0 where no KL is carried.

    student_hidden [tokens, hidden]     flat, over the tokens of several rollouts
    labels [tokens] int64               the sampled tokens
    advantage [tokens]                  A_i / (rewarded rollouts of the whole step), already
                                        divided: `denominator` is L_tok's alone
    temperature [tokens]                at which the row was sampled; of log q alone, D_t is at 1
    carries_kl [tokens] bool            the tokens of rollouts that L_tok is for
    lengths                             how many tokens each of those rollouts has
    teacher_hidden [their sum, teacher hidden]
    banned                              int64 ids without probability in either view
    divergence_beta                     1: reverse KL; 0: forward, the off-policy baseline's
    denominator                         rollouts of the step that carry it; None: len(lengths)
    alpha, beta, top_share              as in cord_weights: not token_divergence's beta

    ValueError for teacher rows that do not pair up. fused.cord checks the lengths too, and refuses
    a banned label; here its log q is about FLOOR / temperature."""
    def logits_of(hidden, weight):
        logits = head_logits(hidden, weight)
        return logits if banned is None else logits.index_fill(-1, banned, FLOOR)

    # L_seq
    logits = logits_of(student_hidden, student_weight)                      # [tokens, vocab]
    log_q = log_probability(logits, labels, temperature)                    # [tokens]
    loss = -(advantage * log_q).sum()
    kl, entropy = torch.zeros_like(log_q), torch.zeros_like(log_q)

    # L_tok
    if carries_kl.any():
        kl_logits = logits[carries_kl]                                      # [kl tokens, vocab]
        teacher = logits_of(teacher_hidden, teacher_weight)
        divergence = token_divergence(kl_logits, teacher, beta=divergence_beta)     # D_t
        weight = cord_weights(divergence, lengths, alpha=alpha, beta=beta, top_share=top_share)
        rollouts = len(lengths) if denominator is None else denominator
        loss = loss + _mean(weight * divergence, rollouts)
        kl[carries_kl] = divergence.detach()
        log_q_all = _log_softmax(kl_logits.detach())                        # [kl tokens, vocab]
        entropy[carries_kl] = -(log_q_all.exp() * log_q_all).sum(-1)
    return loss, kl, log_q.detach(), entropy
