"""Every loss of both papers twice: as its formula, slow and readable, and in the fused form that the training scripts use, which never holds
a [tokens, vocab] matrix and needs no autograd inside. The formula is the measure: the fused form must give the same numbers.

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

Everything here needs nothing but torch (2.11: on a GPU sums in float32 of bfloat16 products): copy the file, or "The fused form" on with the few small functions above that it names.

    python -m lab.bench losses          # time, memory and share of the floor, beside Liger's and beside the formulas

Papers: A = arXiv 2509.18579 (L_top, L_layer, L_ac, L_SFT), B = arXiv 2601.16547 (CORD: the reverse KL per token).
"""

import functools
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


def head_logits(hidden, weight):
    """[tokens, hidden], a head's weight [vocab, hidden] -> logits [tokens, vocab], in float32 (or float64) whatever autocast says: from logits
    rounded to bfloat16 the gradient of a divergence of 0.04 nats is off by about 9 %, of 0.004 by about 30 % (standard deviation 3, 20,000
    words), and CORD drives D_t that low."""
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        return F.linear(hidden.to(dtype), weight.to(dtype))


def _same_shape(student, teacher):
    # PyTorch would broadcast [5, v] against [1, v] without a word, and a student would then learn from the wrong token
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must be the same [tokens, width]: gather both "
                         "at their positions; unequal vocabularies need shared_logits, unequal hidden sizes a projection")


def _count(tokens, denominator):
    """What a sum over so many tokens is divided by: the denominator, or their number; 1 without tokens, because a global count of 0 must not become 0 / 0."""
    denominator = tokens if denominator is None else denominator
    if tokens and denominator <= 0:
        raise ValueError(f"denominator {denominator} for {tokens} tokens: pass the whole step's token count (data.denominators)")
    return denominator if tokens else 1


def _mean(per_token, denominator):
    """[tokens] -> scalar: sum / denominator (default: number of tokens); 0 without tokens, with a graph, whatever the denominator."""
    return per_token.sum() / _count(per_token.numel(), denominator)


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

def _check_lengths(kl, lengths):
    if sum(lengths) != len(kl):
        raise ValueError(f"lengths add up to {sum(lengths)}, but there are {len(kl)} tokens")


def largest_share(kl, lengths, share):
    """The K = share * T (rounded up) tokens of each rollout with the largest D_t: kl [tokens], lengths: list of ints that sum to tokens ->
    [tokens] bool. Of equal ones the earlier counts as larger."""
    _check_lengths(kl, lengths)
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
    return torch.where(largest_share(kl.detach(), lengths, top_share), alpha, 1.0) * position_weights(kl, lengths, beta)


def position_weights(kl, lengths, beta):
    """w_t^pos alone: kl [tokens] gives type and device."""
    _check_lengths(kl, lengths)
    return torch.tensor([beta - (beta - 1) * t / max(length - 1, 1) for length in lengths for t in range(length)], dtype=kl.dtype, device=kl.device)


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

def _check_states(student, teacher, mean, std):
    _same_shape(student, teacher)
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: pass both, or neither for raw features")


def _standardise(student, teacher, mean, std):
    _check_states(student, teacher, mean, std)
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


HIDDEN = {"jsd": hidden_jsd, "mse": hidden_mse, "cosine": hidden_cosine, "raw-jsd": hidden_raw_jsd}     # the training scripts' choice, by name


# ---------------------------------------------------------------------------------------------------------------------------------
# both papers' losses on the response, from hidden states: the formulas that fused_jsd_ce and fused_cord must equal

def jsd_ce(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *, jsd_weight=1.0, ce_weight=0.5, beta=0.5, temperature=1.0,
           shared_ids=None, denominator=None):
    """
    jsd_weight * L_top + ce_weight * L_SFT of paper A -> (loss, jsd, ce): scalars, of which only the loss has a graph.

    student_hidden [tokens, hidden] and student_weight [vocab, hidden], teacher_hidden [tokens, teacher hidden] and teacher_weight [teacher vocab,
    teacher hidden]: last hidden states at predict_positions, and the heads (no bias); both teacher's None: no L_top. labels [tokens] int64; rows
    labelled -100 count for neither. beta and temperature: as in token_divergence (0: forward, 1: reverse KL), of L_top alone; L_SFT is over the whole student head.
    shared_ids: the tokens that L_top runs over, int64 [shared], or a pair (student's ids, teacher's ids); None: all, and vocabularies of one size.
    """
    counted = labels != IGNORE
    logits = head_logits(student_hidden[counted], student_weight)                                # [counted, vocab]
    ce, top = cross_entropy(logits, labels[counted], denominator=denominator), torch.zeros_like(logits.sum())
    if teacher_hidden is not None:
        target = head_logits(teacher_hidden[counted], teacher_weight)                            # [counted, teacher vocab]
        if shared_ids is not None:
            logits, target = shared_logits(logits, target, *_id_pair(shared_ids))                # [counted, shared] each
        top = jsd(logits, target, beta=beta, temperature=temperature, denominator=denominator)
    return jsd_weight * top + ce_weight * ce, top.detach(), ce.detach()


def _id_pair(shared_ids):
    return (shared_ids, shared_ids) if torch.is_tensor(shared_ids) else shared_ids


def cord(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *, lengths, carries_kl, advantage, temperature, banned=None,
         divergence_beta=1.0, alpha=2.0, beta=2.0, top_share=0.1, denominator=None):
    """
    L_tok + L_seq of paper B = sum_t w_t D_t / denominator - sum_t advantage_t log q(label_t) -> (loss, kl, log_p, entropy): a scalar, and
    without gradient D_t, log q(label_t) and the entropy of the student's distribution, [tokens] each; D_t and entropy 0 where no KL is carried.

    Flat axes over the tokens of several rollouts. student_hidden [tokens, hidden], labels (the sampled tokens), advantage (A_i over the number of
    rewarded rollouts) and temperature (at which the row was sampled; of log q alone, D_t is at 1): [tokens]. carries_kl: [tokens] bool; lengths: tokens of
    each rollout that does, teacher_hidden: [their sum, teacher hidden]. banned: int64 ids that are never sampled, without probability in both views.
    divergence_beta: 1 for the reverse KL; 0 for forward, the off-policy baseline's. denominator: rollouts of the whole step that carry the KL (default: len(lengths)).
    """
    _check_cord(student_hidden, teacher_hidden, labels, lengths, carries_kl, advantage, temperature, banned, divergence_beta, denominator)

    def logits_of(hidden, weight):
        logits = head_logits(hidden, weight)
        return logits if banned is None else logits.index_fill(-1, banned, FLOOR)

    logits = logits_of(student_hidden, student_weight)                                           # [tokens, vocab]
    log_p = log_probability(logits, labels, temperature)                                         # [tokens]
    loss, kl, entropy = -(advantage * log_p).sum(), torch.zeros_like(log_p), torch.zeros_like(log_p)
    if lengths:
        heard = logits[carries_kl]                                                               # [kl tokens, vocab]
        divergence = token_divergence(heard, logits_of(teacher_hidden, teacher_weight), beta=divergence_beta)      # D_t [kl tokens]
        weight = cord_weights(divergence, lengths, alpha=alpha, beta=beta, top_share=top_share)
        loss = loss + (weight * divergence).sum() / (len(lengths) if denominator is None else denominator)
        log_q = _log_softmax(heard.detach(), 1.0)
        kl[carries_kl], entropy[carries_kl] = divergence.detach(), -(log_q.exp() * log_q).sum(-1)
    return loss, kl.detach(), log_p.detach(), entropy.detach()


def _check_cord(hidden, teacher, labels, lengths, carries_kl, advantage, temperature, banned, divergence_beta, denominator):
    if not len(labels) == len(carries_kl) == len(advantage) == len(temperature) == len(hidden):
        raise ValueError(f"{len(hidden)} hidden states, {len(labels)} labels, {len(carries_kl)} carries_kl, {len(advantage)} advantages and "
                         f"{len(temperature)} temperatures must be as many")
    if not sum(lengths) == carries_kl.sum() == (0 if teacher is None else len(teacher)):
        raise ValueError(f"lengths add up to {sum(lengths)}; carries_kl names {carries_kl.sum().item()} tokens and the teacher has "
                         f"{0 if teacher is None else len(teacher)} rows: these must be the same")
    if not 0 <= divergence_beta <= 1 or denominator is not None and lengths and denominator <= 0:
        raise ValueError(f"divergence_beta {divergence_beta} must lie in [0, 1] and denominator {denominator} above 0: the whole step's rollouts with a KL")
    if banned is not None and torch.isin(labels, banned).any():
        raise ValueError(f"label {labels[torch.isin(labels, banned)][0].item()} is banned, so it cannot have been sampled")


# ---------------------------------------------------------------------------------------------------------------------------------
# The fused form: the same numbers without the [tokens, vocab] matrices
#
# At 152,000 words, 8,192 response tokens have 5 GB of float32 logits, and autograd keeps several matrices of that size for each loss, twice:
# student and teacher. But the gradient of each of these losses with respect to the logits is known in closed form. So the forward pass
# takes the tokens in chunks: logits of a chunk, its losses, its gradient, and at once the two products that carry the gradient on to
# the hidden states and to the head's weight. Then the chunk is forgotten. backward only multiplies what is known by what comes from above.
#
# With z = h W^T / tau, q = softmax(z): dq_i/dz_j = q_i (1[i = j] - q_j), so that for any D(q)     dD/dz_j = q_j (dD/dq_j - sum_i q_i dD/dq_i).
#
#     reverse KL    D = sum q log(q/p)           dD/dq = log(q/p) + 1                dD/dz = q (log(q/p) - D)
#     forward KL    D = sum p log(p/q)           dD/dq = -p/q                        dD/dz = q - p
#     JSD_beta      m = beta p + (1 - beta) q    dD/dq = (1 - beta) log(q/m)         dD/dz = (1 - beta) q (log(q/m) - KL(q || m))
#     -log q_y                                   dD/dq = -1[i = y] / q_y             dD/dz = q - 1[i = y]
#
# (JSD: beta KL(p || m) gives -beta (1 - beta) p/m, (1 - beta) KL(q || m) gives (1 - beta) (log(q/m) + 1 - (1 - beta) q/m); all but the logarithm
# adds up to (1 - beta) (1 - m/m) = 0.) Then dh = dD/dz W / tau and dW = (dD/dz)^T h / tau. What remains are four matrix products, two
# for logits and two for gradients, and what lies between them: on a CPU about fifteen operations on rows that stay in its cache (_chunk_in_place), on a
# GPU, where a chunk's logits of 1 GB fit into no cache, one compiled kernel that reads them three times and writes the gradient (_chunk).

def _rows_per_chunk(chunk_tokens, vocab, device):
    """How many tokens go through the products at once. As given; else on a GPU what fits into a quarter of the free memory, three float32 matrices deep,
    up to 2,048; on a CPU 64 MB of logits. Every chunk reads and writes dW once: large ones are faster, small ones leaner."""
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens {chunk_tokens} must be at least 1, or None to let free memory decide")
        return chunk_tokens
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(2048, max(128, free // 4 // (3 * 4 * vocab) // 128 * 128))
    return max(256, 2 ** 24 // vocab)


# What lies between the products. First as mathematics:

def _divergence(log_q, log_p, beta):
    """token_divergence and its gradient: log-softmaxes [n, vocab] -> D [n], dD/dz [n, vocab]."""
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1), q - p
    if beta == 1:
        d = (q * (log_q - log_p)).sum(-1)
        return d, q * (log_q - log_p - d[:, None])
    # where p and q both underflow, m = 0: any finite logarithm will do, since p and q are 0 there
    log_m = torch.lerp(q, p, beta).clamp(min=torch.finfo(q.dtype).tiny).log()
    pull = (q * (log_q - log_m)).sum(-1)                                                         # KL(q || m)
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * pull, (1 - beta) * q * (log_q - log_m - pull[:, None])


def _chunk(z, t, labels, a, c, heat, *, beta, temperature, shared, entropy, dtype):
    """
    Losses and gradient of one chunk of tokens, as a compiler wants them (on a GPU): every value comes of the logits at its place and of a few numbers
    of its row. So both matrices are read three times (normalisers, sums, gradient), the gradient is written, and nothing else is of that size.

    z [n, vocab], t [n, teacher vocab] or None: logits. labels [n]; a, c [n]: what D and -log q(label) of each row weigh; heat [n] or None: temperature
    of the latter. shared [vocab] or None: the teacher's id for each of the student's, -1 where it has none.
    -> D, -log q, entropy [n] (0 where not asked for), and the gradient of sum(a D - c log q) with respect to z [n, vocab], in dtype.
    """
    labels, a, c = labels[:, None], a[:, None], c[:, None]
    log_s = torch.log_softmax(z if heat is None else z / heat[:, None], -1)
    nll, c = -log_s.gather(1, labels)[:, 0], c if heat is None else c / heat[:, None]
    here = torch.arange(z.shape[1], device=z.device) == labels                                   # not scattered: the compiler would write, then add
    g, none = log_s.exp() * c - torch.where(here, c, 0.0), torch.zeros_like(nll)                 # c (q - 1[i = y]) / heat
    if t is None:
        return none, nll, none, g.to(dtype)
    if shared is not None:
        z, t = torch.where(shared >= 0, z, FLOOR), torch.where(shared >= 0, t[:, shared.clamp(min=0)], FLOOR)
    if temperature != 1:
        z, t = z / temperature, t / temperature
    log_q, log_p = torch.log_softmax(z, -1), torch.log_softmax(t, -1)
    d, g_d = _divergence(log_q, log_p, beta)
    return d, nll, -(log_q.exp() * log_q).sum(-1) if entropy else none, (g + a / temperature * g_d).to(dtype)


def _states_chunk(student, teacher, mean, std, each, dtype):
    """The same for hidden states [n, features] -> the sum of each * JSD over the rows, its gradient with respect to student [n, features], in dtype."""
    s, t = ((_wide(x) if mean is None else (_wide(x) - mean) / std for x in (student, teacher)))
    d, g = _divergence(torch.log_softmax(s, -1), torch.log_softmax(t, -1), 0.5)
    return each * d.sum(), (g * (each if std is None else each / std)).to(dtype)


# On a GPU it is compiled as it stands:

def _compiles(device):
    return device.type == "cuda"


def _any_rows(x, of_width=False):
    """Tells the compiler: one kernel for any number of rows; of_width: of this width.

    PyTorch has no public name for it (2.14), so it stands here alone (tests/test_private_names.py)."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    if of_width:
        torch._dynamo.mark_static(x, 1)


@functools.cache
def _compiled(work):
    """For a GPU. Left to itself Inductor would store what it needs twice, and cut the rows where the first chunk has few of them; to read the logits and compute it
    again costs less than to write anything of their size."""
    return torch.compile(work, options={"realize_opcount_threshold": 10**6, "realize_reads_threshold": 10**6, "split_reductions": False})


# On a CPU:

def _rows_per_block(width):
    """How many rows the passes between the products take at once on a CPU: as many as stay in its cache, 1 MB a matrix, but two for every thread."""
    return max(2 ** 18 // width, 2 * torch.get_num_threads())


def _buffer(pool, name, rows, width):
    """A [rows, width] view of memory that all blocks share: a fresh matrix per operation costs a CPU as much as the operation, in page faults."""
    if pool.get(name) is None or pool[name].numel() < rows * width:
        pool[name] = pool["like"].new_empty(rows * width)
    return pool[name][:rows * width].view(rows, width)


def _softmaxes(z, pool, name):
    """z [n, vocab], used up -> its log-softmax and its softmax, [n, vocab] each. Two fused kernels; the second writes where z was."""
    log_p = torch.log_softmax(z, -1, out=_buffer(pool, name, *z.shape))
    return log_p, torch.softmax(log_p, -1, out=z)


def _divergence_(log_q, log_p, q, p, a, c, beta, out):
    """token_divergence and its gradient: four [n, vocab] that are used up, a and c [n, 1] -> D [n], d(a D + c * -log q_y)/dz [n, vocab] but for the
    -c at y, in the place of q."""
    def expect(p, x):
        return torch.mul(p, x, out=out).sum(-1)                                                  # [n]

    if beta == 0:
        return expect(p, log_p.sub_(log_q)), q.mul_(a + c).sub_(p.mul_(a))
    if beta == 1:
        d = pull = expect(q, log_q.sub_(log_p))
    else:
        # where p and q both underflow, m = 0: any finite logarithm will do, since p and q are 0 there
        log_m = torch.lerp(q, p, beta, out=out).clamp_(min=torch.finfo(q.dtype).tiny).log_()     # [n, vocab]
        log_q, log_p, a = log_q.sub_(log_m), log_p.sub_(log_m), (1 - beta) * a
        pull = expect(q, log_q)                                                                  # KL(q || m)
        d = beta * expect(p, log_p) + (1 - beta) * pull
    return d, q.mul_(log_q.mul_(a).add_(c - a * pull[:, None]))                                  # q (a (log(q/m) - pull) + c)


def _chunk_in_place(z, t, labels, a, c, heat, *, beta, temperature, shared, entropy, pool):
    """The same for a CPU, where no compiler is at hand: each operation works in memory that is in the cache already. z and t are used up; shared: the pair of ids."""
    rows, labels, a, c = len(z), labels[:, None], a[:, None], c[:, None]
    together = heat is None and shared is None and temperature == 1 and t is not None            # D and -log q are of the same q
    if not together:
        heat = 1.0 if heat is None else heat[:, None]
        log_q, g = _softmaxes(torch.div(z, heat, out=z if t is None else _buffer(pool, "g", *z.shape)), pool, "log_q")
        nll = -log_q.gather(1, labels)[:, 0]
        g = g.mul_(c / heat).scatter_add_(1, labels, -c / heat)                                  # c (q - 1[i = y]) / heat
        if t is None:
            return torch.zeros_like(nll), nll, torch.zeros_like(nll), g
        if shared is not None:
            z = torch.index_select(z, 1, shared[0], out=_buffer(pool, "z", rows, len(shared[0])))          # [n, shared]
            t = torch.index_select(t, 1, shared[1], out=_buffer(pool, "t", rows, len(shared[1])))
        if temperature != 1:
            z, t = z.div_(temperature), t.div_(temperature)

    (log_q, q), (log_p, p), m = _softmaxes(z, pool, "log_s"), _softmaxes(t, pool, "log_t"), _buffer(pool, "m", *z.shape)
    spread = -torch.mul(q, log_q, out=m).sum(-1) if entropy else torch.zeros_like(a[:, 0])
    if together:
        nll = -log_q.gather(1, labels)[:, 0]
    d, g_d = _divergence_(log_q, log_p, q, p, a / temperature, c if together else torch.zeros_like(c), beta, m)
    if together:
        return d, nll, spread, g_d.scatter_add_(1, labels, -c)
    return d, nll, spread, g.add_(g_d) if shared is None else g.index_add_(1, shared[0], g_d)


def _states_in_place(student, teacher, mean, std, each, dtype):
    """_states_chunk for a CPU: block by block."""
    rows, width = student.shape
    gradient, pool, total, none = torch.empty(rows, width, dtype=dtype), {"like": each}, torch.zeros_like(each), each.new_zeros((1, 1))
    for i in range(0, rows, size := _rows_per_block(width)):
        s, t = (_wide(x[i:i + size]) for x in (student, teacher))                                # [n, features]
        s, t = (s.clone(), t.clone()) if mean is None else ((s - mean).div_(std), (t - mean).div_(std))
        shape = s.shape
        (log_q, q), (log_p, p) = _softmaxes(s, pool, "log_s"), _softmaxes(t, pool, "log_t")
        d, g = _divergence_(log_q, log_p, q, p, each.view(1, 1), none, 0.5, _buffer(pool, "m", *shape))
        total += each * d.sum()
        gradient[i:i + size] = g if std is None else g.div_(std)
    return total, gradient


# The products:

def _operands(hidden, weight):
    """What goes into the products: the wider type of the two, whatever autocast says (see head_logits). With weights in bfloat16 both are that, and
    nothing is rounded; with float32 heads the products are float32, on a GPU too: slow. (allow_tf32 would make them fast, and cut the angles of rotary
    embeddings to 11 bits, too, for transformers multiplies them as matrices.)"""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype                                   # too small a range for gradients
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    return (_wide(hidden), weight) if hidden.device.type == "cpu" else (hidden, weight)          # 16-bit products win nothing there


def _slices(weight):
    """The rows of a 16-bit weight, 64 MB at a time in float32."""
    step = max(1, 2 ** 24 // weight.shape[1])
    return [slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step)]


def _logits(hidden, weight, pool, name):
    """hidden weight^T [n, vocab], in float32 from bfloat16 too: what a tensor core has summed anyway, before it would be rounded."""
    if hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    out = _buffer(pool, name, len(hidden), len(weight))
    if hidden.dtype == weight.dtype:
        return torch.mm(hidden, weight.T, out=out)
    for some in _slices(weight):
        torch.mm(hidden, weight[some].to(hidden.dtype).T, out=out[:, some])
    return out


def _back(g, weight):
    """g weight [n, hidden], the same way."""
    if g.dtype == torch.bfloat16:
        return torch.mm(g, weight, out_dtype=torch.float32)
    if g.dtype == weight.dtype:
        return torch.mm(g, weight)
    return sum(g[:, some] @ weight[some].to(g.dtype) for some in _slices(weight))


def _add_outer(d_weight, g, hidden):
    """d_weight [vocab, hidden] += g^T hidden, summed in float32 over all chunks."""
    if g.dtype == d_weight.dtype:
        d_weight.addmm_(g.T, hidden)
    else:
        torch.addmm(d_weight, g.T, hidden, out_dtype=torch.float32, out=d_weight)                # the product adds it up: no second matrix of that size


def _head_pass(hidden, weight, teacher_hidden, teacher_weight, labels, a, c, heat, d_weight, *, chunk_tokens, wants_hidden, shared=None, banned=None, **how):
    """
    All rows through both heads, chunk by chunk: hidden [rows, hidden], teacher_hidden [rows, teacher hidden] or None, the rest as in _chunk, [rows].

    shared: a pair of ids, [words] each. banned [ids]: what neither side can say. -> D, -log q, entropy [rows], the gradient with respect to hidden
    [rows, hidden] or None. d_weight [vocab, hidden], unless None, is added to.
    """
    device, vocab, gpu = hidden.device, len(weight), _compiles(hidden.device)
    size, out = _rows_per_chunk(chunk_tokens, vocab, device), []
    block, pool = _rows_per_block(vocab), {"like": c}
    d_hidden = torch.empty(hidden.shape, dtype=c.dtype, device=device) if wants_hidden else None
    if gpu and shared is not None:
        shared = torch.full((vocab,), -1, device=device).index_copy_(0, *shared)                 # [vocab], as _chunk wants it
    with torch.autocast(device.type, enabled=False):
        for i in range(0, len(hidden), size):
            part = slice(i, i + size)
            h, t = hidden[part], None                                                            # [n, hidden]
            z = _logits(h, weight, pool, "student")                                              # [n, vocab]
            if teacher_hidden is not None:
                t = _logits(teacher_hidden[part], teacher_weight, pool, "teacher")
            for logits in (z, t):
                if banned is not None and logits is not None:
                    logits.index_fill_(1, banned, FLOOR)
            if gpu:
                rows = [z, t, *(None if x is None else x[part] for x in (labels, a, c, heat))]
                for x in rows:
                    if x is not None:
                        _any_rows(x)                                                             # the last chunk is shorter; vocab stays a constant
                *values, g = _compiled(_chunk)(*rows, shared=shared, dtype=h.dtype, **how)
                out.append(values)
            else:
                for j in range(0, len(h), block):
                    some, rows = slice(j, j + block), slice(i + j, min(i + j + block, i + len(h)))
                    *values, g = _chunk_in_place(z[some], None if t is None else t[some], labels[rows], a[rows], c[rows], None if heat is None else heat[rows],
                                                 shared=shared, pool=pool, **how)
                    out.append(values)
                    if len(h) > block and g.data_ptr() != z[some].data_ptr():
                        z[some].copy_(g)
                g = z if len(h) > block else g                                                   # of several blocks: where their logits were
            if wants_hidden:
                d_hidden[part] = _back(g, weight)                                                # [n, hidden]
            if d_weight is not None:
                _add_outer(d_weight, g, h)
            del z, t, g, rows, logits                                                            # before there are the next chunk's
    d, nll, entropy = (torch.cat(x) for x in zip(*out)) if out else (c.new_zeros(0) for _ in range(3))
    return d, nll, entropy, d_hidden


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients are known already: apply(loss, x, y, ..., its gradient d_x, d_y, ...), None for what learns nothing."""

    @staticmethod
    def forward(ctx, loss, *tensors):
        inputs, gradients = tensors[:len(tensors) // 2], tensors[len(tensors) // 2:]             # kept as wide as they will be used
        ctx.save_for_backward(*(g.to(x.dtype) if g is not None and x.dtype == torch.bfloat16 else g for x, g in zip(inputs, gradients)))
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above):
        gradients = [None if g is None else above * g for g in ctx.saved_tensors]
        return None, *gradients, *[None] * len(gradients)


def _heads(student_hidden, student_weight, teacher_hidden, teacher_weight, shared_ids=None):
    """-> the four operands of the products; whether hidden and weight learn; zeros [vocab, hidden] for the weight's gradient, or None."""
    if student_hidden.shape[1:] != student_weight.shape[1:] or (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError(f"hidden {list(student_hidden.shape)} does not fit weight {list(student_weight.shape)}, or the teacher lacks one of the two")
    if teacher_weight is not None and shared_ids is None and len(teacher_weight) != len(student_weight):
        raise ValueError(f"vocabularies of {len(student_weight)} and {len(teacher_weight)} tokens: say which they share (shared_ids)")
    learn = [torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_weight)]
    operands = [*_operands(student_hidden, student_weight), *((None, None) if teacher_hidden is None else _operands(teacher_hidden, teacher_weight))]
    exact = torch.float64 if operands[0].dtype == torch.float64 else torch.float32
    return operands, learn, torch.zeros(student_weight.shape, dtype=exact, device=student_weight.device) if learn[1] else None, exact


def fused_jsd_ce(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *, jsd_weight=1.0, ce_weight=0.5, beta=0.5, temperature=1.0,
                 shared_ids=None, denominator=None, chunk_tokens=None):
    """jsd_ce, fused: the same arguments, the same (loss, jsd, ce), from one pass over the student's logits. chunk_tokens: how many at a time."""
    if not 0 <= beta <= 1 or temperature <= 0:
        raise ValueError(f"beta {beta} must lie in [0, 1] and temperature {temperature} above 0")
    (hidden, weight, teacher, teacher_weight), learn, d_weight, exact = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight, shared_ids)
    if labels.shape != hidden.shape[:1] or teacher is not None and len(teacher) != len(hidden):
        raise ValueError(f"{list(labels.shape)} labels and {None if teacher is None else len(teacher)} teacher rows for {len(hidden)} hidden states")
    counted = (labels != IGNORE).nonzero()[:, 0]                                                 # [rows]
    each = hidden.new_full((len(counted),), 1 / _count(len(counted), denominator), dtype=exact)
    d, nll, _, d_rows = _head_pass(
        hidden[counted], weight, None if teacher is None else teacher[counted], teacher_weight, labels[counted], jsd_weight * each, ce_weight * each, None,
        d_weight, chunk_tokens=chunk_tokens, wants_hidden=learn[0], beta=beta, temperature=temperature, banned=None, entropy=False,
        shared=None if shared_ids is None else _id_pair(shared_ids))
    top, ce = (each * d).sum(), (each * nll).sum()
    d_hidden = d_rows.new_zeros(hidden.shape).index_copy_(0, counted, d_rows) if learn[0] else None
    return _KnownGradient.apply(jsd_weight * top + ce_weight * ce, student_hidden, student_weight, d_hidden, d_weight), top, ce


def fused_cord(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *, lengths, carries_kl, advantage, temperature, banned=None,
               divergence_beta=1.0, alpha=2.0, beta=2.0, top_share=0.1, denominator=None, chunk_tokens=None):
    """
    cord, fused: the same arguments, the same (loss, kl, log_p, entropy). chunk_tokens: how many at a time.

    The position weights are known beforehand; which tokens are a rollout's K largest only after its last D_t. So the first pass weighs by position
    alone, and a second one adds (alpha - 1) times that for the K largest: a tenth of the tokens once more, instead of the gradient of all.
    Tokens that carry no KL never touch the teacher's head.
    """
    _check_cord(student_hidden, teacher_hidden, labels, lengths, carries_kl, advantage, temperature, banned, divergence_beta, denominator)
    operands, learn, d_weight, exact = _heads(student_hidden, student_weight, teacher_hidden, teacher_weight)
    hidden, weight, teacher, teacher_weight = operands
    kl, log_p, entropy = (hidden.new_zeros(len(hidden), dtype=exact) for _ in range(3))          # [tokens]
    d_hidden = hidden.new_zeros(hidden.shape, dtype=exact) if learn[0] else None

    def run(rows, teacher, a, c, heat):
        d, nll, spread, d_rows = _head_pass(
            hidden[rows], weight, teacher, teacher_weight, labels[rows], a, c, None if (heat == 1).all() else heat.to(exact), d_weight,
            chunk_tokens=chunk_tokens, wants_hidden=learn[0], beta=divergence_beta, temperature=1, banned=banned, shared=None, entropy=True)
        if learn[0]:
            d_hidden.index_add_(0, rows, d_rows)
        return d, nll, spread

    alone, rows = (~carries_kl).nonzero()[:, 0], carries_kl.nonzero()[:, 0]
    c = advantage.to(exact)
    log_p[alone] = -run(alone, None, c[alone], c[alone], temperature[alone])[1]
    loss = -(c[alone] * log_p[alone]).sum()
    if lengths:
        position = position_weights(kl[rows], lengths, beta) / (len(lengths) if denominator is None else denominator)        # [kl tokens]
        kl[rows], nll, entropy[rows] = run(rows, teacher, position, c[rows], temperature[rows])
        log_p[rows] = -nll
        factor = torch.where(largest_share(kl[rows], lengths, top_share), alpha, 1.0)            # w_t^KL [kl tokens]
        again = (factor != 1).nonzero()[:, 0]
        run(rows[again], teacher[again], (factor - 1)[again] * position[again], 0 * position[again], torch.ones_like(position[again]))
        loss = loss + (factor * position * kl[rows]).sum() + (c[rows] * nll).sum()
    return _KnownGradient.apply(loss, student_hidden, student_weight, d_hidden, d_weight), kl, log_p, entropy


def fused_hidden_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    """hidden_jsd, fused: one pass, of which nothing is kept but the gradient, in the student's own precision."""
    _check_states(student, teacher, mean, std)
    rows, width = student.shape
    each = 1 / _count(rows, denominator)
    learns = torch.is_grad_enabled() and student.requires_grad
    kind = torch.float32 if student.dtype == torch.float16 else student.dtype
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        states, chunk = (student.detach(), teacher.detach()), _states_in_place
        if _compiles(student.device):
            chunk = _compiled(_states_chunk)
            for x in states:
                _any_rows(x, of_width=True)                                                      # a kernel for each width, of any number of rows
        total, gradient = chunk(*states, mean, std, _wide(student.new_zeros(())).fill_(each), kind)
    return _KnownGradient.apply(total, student, gradient if learns else None)


def _fused_raw_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    return fused_hidden_jsd(student, teacher, denominator=denominator)


FUSED_HIDDEN = {**HIDDEN, "jsd": fused_hidden_jsd, "raw-jsd": _fused_raw_jsd}       # mse and cosine are one pass as they are
