"""Every loss of both papers as its formula: slow, readable, and the measure of anything faster.

Notation. z are logits, p = softmax(z_teacher / tau) the teacher, q = softmax(z_student / tau) the student.
Shapes. All losses take flat matrices [tokens, vocab] or [tokens, features], one row per token that counts: no padding, no batch axis.
Row k of the student and row k of the teacher must speak about the same response token; that is the collator's work (data.py).

Four rules hold for every loss here:
1. It returns a SUM over its rows divided by `denominator`. The papers mean over tokens, and the mean that stays the same on one GPU or
   eight, with or without accumulation, is over the tokens of the whole step: so the caller counts those once, gives the count to
   every rank and every micro-batch, and the parts add up. Without `denominator` it is the number of rows: a plain mean.
2. No rows give zero (with a graph, so that backward still runs on a rank without such tokens), never 0 / 0.
3. The arithmetic is float32, or float64 if the inputs are: differences of logarithms do not survive in bfloat16.
4. The teacher's side is detached: only the student learns.

Papers: A = arXiv 2509.18579 (L_top, L_layer, L_ac, L_SFT), B = arXiv 2601.16547 (CORD: the reverse KL per token).
"""

import math

import torch
import torch.nn.functional as F

IGNORE = -100   # the label that counts for nothing, as everywhere in PyTorch

# Masked ids have logit -inf, and -inf - -inf is NaN. Anything this far below the others has probability exactly 0 too, but 0 * FLOOR
# is 0 where 0 * inf is NaN. A KL that is truly infinite (the student excludes what the teacher wants) comes out huge: finite and loud.
FLOOR = -1e30


# ---------------------------------------------------------------------------------------------------------------------------------
# what all losses share

def _wide(x):
    """float32, or float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def _log_softmax(logits, temperature):
    return F.log_softmax(_wide(logits).clamp(min=FLOOR) / temperature, dim=-1)


def head_logits(head, hidden):
    """Logits [tokens, vocab] of a linear head, in float32 (or float64) whatever autocast says: from logits rounded to bfloat16 the gradient of a
    divergence of 0.04 nats is off by about 9 %, of 0.004 by about 30 % (standard deviation 3, 20,000 words), and CORD drives D_t that low."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(_wide(hidden), _wide(head.weight), head.bias)


def _same_shape(student, teacher):
    # PyTorch would broadcast [5, v] against [1, v] without a word, and a student would then learn from the wrong token
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must be the same [tokens, width]: gather both "
                         "at their positions; unequal vocabularies need shared_logits, unequal hidden sizes a projection")


def _mean(per_token, denominator):
    """[tokens] -> scalar: sum / denominator (default: number of tokens); 0 without tokens, whatever the denominator."""
    if per_token.numel() == 0:
        return per_token.sum()      # 0 with a graph; a global count of 0 must not become 0 / 0 either
    denominator = per_token.numel() if denominator is None else denominator
    if denominator <= 0:
        raise ValueError(f"denominator {denominator} for {per_token.numel()} tokens: pass the whole step's token count (data.denominators)")
    return per_token.sum() / denominator


# ---------------------------------------------------------------------------------------------------------------------------------
# divergences between next-token distributions (A: L_top; B: D_t)

def token_divergence(student_logits, teacher_logits, *, beta=0.5, temperature=1.0):
    """The generalised Jensen-Shannon divergence of each token, in nats: [tokens, vocab] twice -> [tokens].

        m = beta p + (1 - beta) q
        JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m)

    beta = 1/2 is the symmetric one, between 0 and ln 2. At both ends JSD_beta itself is 0, so by convention (Liger's and TRL's too) they
    stand for its limits after division by beta and by 1 - beta: beta = 0 is the forward KL(p || q), beta = 1 the reverse KL(q || p).

    No factor temperature ** 2 (Hinton's), because the papers have none. Logits may be -inf (masked ids).
    """
    _same_shape(student_logits, teacher_logits)
    if not 0 <= beta <= 1 or temperature <= 0:
        raise ValueError(f"beta {beta} must lie in [0, 1] and temperature {temperature} above 0")
    log_q = _log_softmax(student_logits, temperature)              # [tokens, vocab]
    log_p = _log_softmax(teacher_logits.detach(), temperature)     # [tokens, vocab]
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)             # where the teacher is, the student must be: covers every mode
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)             # where the student is, the teacher must be: seeks a mode

    # log m from the logarithms: where p and q both underflow to 0, log(beta * p + (1 - beta) * q) would be -inf and the product NaN
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)                 # KL(p || m)  [tokens]
    kl_q = (log_q.exp() * (log_q - log_m)).sum(-1)                 # KL(q || m)  [tokens]
    return beta * kl_p + (1 - beta) * kl_q


def jsd(student_logits, teacher_logits, *, beta=0.5, temperature=1.0, denominator=None):
    """L_top of paper A (beta 1/2): sum of token_divergence over the tokens / denominator. [tokens, vocab] twice -> scalar."""
    return _mean(token_divergence(student_logits, teacher_logits, beta=beta, temperature=temperature), denominator)


def forward_kl(student_logits, teacher_logits, *, temperature=1.0, denominator=None):
    """KL(teacher || student): paper A's alternative to JSD, paper B's off-policy baseline."""
    return jsd(student_logits, teacher_logits, beta=0, temperature=temperature, denominator=denominator)


def reverse_kl(student_logits, teacher_logits, *, temperature=1.0, denominator=None):
    """KL(student || teacher): paper B's D_t with all weights 1."""
    return jsd(student_logits, teacher_logits, beta=1, temperature=temperature, denominator=denominator)


def shared_logits(student_logits, teacher_logits, student_ids, teacher_ids):
    """Two vocabularies -> the tokens they share: student_ids[i] in the one is the same token as teacher_ids[i] in the other.

    [tokens, student_vocab], [tokens, teacher_vocab], [shared], [shared] (int64, from data.shared_vocabulary) -> two [tokens, shared].
    The softmax that follows then runs over the shared tokens alone, which renormalises both sides; all other tokens, and the unused
    rows that pad an embedding table, get no gradient from it.
    """
    if student_ids.shape != teacher_ids.shape:
        raise ValueError(f"{len(student_ids)} student ids for {len(teacher_ids)} teacher ids: they come in pairs (data.shared_vocabulary)")
    return student_logits.index_select(-1, student_ids), teacher_logits.index_select(-1, teacher_ids)


# ---------------------------------------------------------------------------------------------------------------------------------
# cross-entropy (A: L_SFT)

def cross_entropy(logits, labels, *, denominator=None):
    """-log q(label), over the whole vocabulary: [tokens, vocab], [tokens] int64 -> scalar. Rows labelled -100 count nowhere.

    The logits are already the ones that predict these labels (one position earlier in the sequence): nothing is shifted here.
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} for logits {list(logits.shape)}: gather the logits at predict_positions")
    counted = labels != IGNORE
    log_q = _log_softmax(logits, temperature=1.0)                                       # [tokens, vocab]
    picked = log_q.gather(-1, labels.masked_fill(~counted, 0)[:, None])[:, 0]           # [tokens]
    return _mean(-picked[counted], denominator)


# ---------------------------------------------------------------------------------------------------------------------------------
# CORD (B): which tokens of a rollout count more, and which rollouts were better than their siblings
#
#     L_tok = sum_t w_t D_t        D_t = KL(q_t || p_t), reverse: token_divergence(student, teacher, beta=1)
#     L_seq = - A log q(y | audio)
#
# Tokens of all rollouts lie behind each other in one flat axis; `lengths` says how many belong to each.

def largest_share(kl, lengths, share):
    """The K = share * T (rounded up) tokens of each rollout with the largest D_t: kl [tokens], lengths: list of ints that sum to tokens ->
    [tokens] bool. Of equal ones the earlier counts as larger."""
    if sum(lengths) != len(kl):
        raise ValueError(f"lengths add up to {sum(lengths)}, but there are {len(kl)} tokens")
    mask, start = torch.zeros_like(kl, dtype=torch.bool), 0
    for length in lengths:
        order = kl[start:start + length].argsort(descending=True, stable=True)
        mask[start + order[:math.ceil(share * length - 1e-9)]] = True
        start += length
    return mask


def cord_weights(kl, lengths, *, alpha=2.0, beta=2.0, top_share=0.1):
    """w_t = w_t^KL * w_t^pos of flat tokens: kl [tokens], lengths: list of ints that sum to tokens -> [tokens], constants (no gradient).

        w_t^KL  = alpha for the K tokens of a rollout with the largest D_t, else 1
        w_t^pos = beta - (beta - 1) (t - 1) / (T - 1)              from beta at the first token down to 1 at the last

    The paper has K = 20 for rollouts of at most 200 tokens; we keep the share, K = top_share * T, so that short rollouts are weighted alike.
    A rollout of one token is its own start: w^pos = beta.
    """
    largest = largest_share(kl.detach(), lengths, top_share)
    position = [beta - (beta - 1) * t / max(length - 1, 1) for length in lengths for t in range(length)]
    return torch.where(largest, alpha, 1.0) * torch.tensor(position, dtype=kl.dtype, device=kl.device)


def group_advantages(rewards):
    """A_i = r_i - mean of its group: [prompts, rollouts] -> the same shape. No division by the deviation, as in the paper (and Dr. GRPO):
    it would blow up groups that nearly all agree. A group whose rewards are all equal has no signal."""
    return rewards - rewards.mean(-1, keepdim=True)


def log_probability(logits, tokens, temperature):
    """log q(token) of the distribution that was sampled from: [tokens, vocab], [tokens] int64, temperature [tokens] -> [tokens]."""
    return _log_softmax(logits, temperature[:, None]).gather(-1, tokens[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# divergences between hidden states (A: L_layer, L_ac)
#
# The paper says "divergence" and leaves it open. All three below work on features standardised with the TEACHER's mean and standard
# deviation, measured once on a calibration batch and then fixed (layer_map.py keeps them):
#
#     s = (student - mean) / std        t = (teacher - mean) / std
#
# because a few features of every large decoder are hundreds of times larger than the rest ("massive activations", arXiv 2402.17762).
# Raw, they own everything: a softmax over features puts all its mass on them and the other thousands get no gradient; a squared error is
# their error; a cosine is nearly 1 between any two tokens. Scaling the token as a whole does not help: an outlier stays an outlier.
#
# A small difference with mean square e costs e in mse, e / 2 in cosine, e / 8 in JSD: the same alpha does not mean the same in all three.

def _standardise(student, teacher, mean, std):
    _same_shape(student, teacher)
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: pass both, or neither for raw features")
    student, teacher = _wide(student), _wide(teacher.detach())
    if mean is None:
        return student, teacher
    return (student - mean) / std, (teacher - mean) / std          # [tokens, features]


def hidden_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    """JSD (beta 1/2) between softmaxes over features, at most ln 2: [tokens, features] twice, mean and std [features] -> scalar.

    A softmax ignores what is added to all features of a token, so this compares which features stand out, and by how much.
    """
    return jsd(*_standardise(student, teacher, mean, std), denominator=denominator)


def hidden_mse(student, teacher, *, mean=None, std=None, denominator=None):
    """Squared error, averaged over features so that wide and narrow models weigh the same: in units of the teacher's variance."""
    student, teacher = _standardise(student, teacher, mean, std)
    return _mean((student - teacher).square().mean(-1), denominator)


def hidden_cosine(student, teacher, *, mean=None, std=None, denominator=None):
    """1 - cosine, between 0 and 2: direction only, the length of a hidden state is free."""
    student, teacher = _standardise(student, teacher, mean, std)
    return _mean(1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1), denominator)


def hidden_raw_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    """The JSD of raw features, statistics ignored: what a first reading of the paper would write, kept so that it can be measured."""
    return hidden_jsd(student, teacher, denominator=denominator)


# the training scripts' choice of divergence, by name
HIDDEN = {"jsd": hidden_jsd, "mse": hidden_mse, "cosine": hidden_cosine, "raw-jsd": hidden_raw_jsd}
