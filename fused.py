"""The losses of losses.py, the same numbers, without a [tokens, vocab] matrix.

Over a vocabulary of 152,000, 8,192 response tokens have 5 GB of float32 logits, and autograd keeps
several matrices of that size for each loss, twice: student and teacher. But the gradient of each of
these losses with respect to the logits is known in closed form. So the forward pass takes the
tokens in chunks. For each chunk it computes the logits, the loss, the gradient, and at once the two
products that carry the gradient on to the hidden states and to the head's weight. Then the chunk is
forgotten. backward only multiplies what is known by what comes from above.

    jsd_ce, cord, hidden_jsd    take and return what their namesakes in losses.py do
    HIDDEN                      those of losses.HIDDEN that have a faster form

Read section 1, then 2. On a GPU a chunk's logits, 1 GB of them, fit into no cache, and one compiled
kernel reads them three times and writes the gradient once (section 3). A CPU may have no compiler:
there the same lines run as they stand, on blocks of rows that stay in its cache.

Needs nothing but torch (2.11 or newer, which on a GPU sums products of bfloat16 matrices in
float32), and can be copied by itself.

    python -m lab.bench losses          # time, memory and share of the floor, beside Liger-Kernel's
"""

import functools
import math
import typing

import torch

IGNORE = -100   # the label that counts for nothing
FLOOR = -1e30   # the logit of what must have no probability: -inf - -inf would be NaN

# -------------------------------------------------------------------------------------------------
# 1. The idea, in 25 lines that run (tests/test_fused.py): CORD's L_tok without weights, that is
#    the mean reverse KL, and what its backward pass would give

def the_idea(student_hidden, student_weight, teacher_hidden, teacher_weight, chunk_tokens=256):
    """[tokens, hidden], [vocab, hidden], the teacher's two -> loss, d_hidden, d_weight."""
    tokens = len(student_hidden)
    loss = 0.0
    d_hidden = torch.empty_like(student_hidden)                     # [tokens, hidden]
    d_weight = torch.zeros_like(student_weight)                     # [vocab, hidden]
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, start + chunk_tokens)

        # Only these rows' logits ever exist: [chunk, vocab]
        log_q = (student_hidden[rows] @ student_weight.T).log_softmax(-1)
        log_p = (teacher_hidden[rows] @ teacher_weight.T).log_softmax(-1)
        q = log_q.exp()

        # D_t = KL(q || p), and dD_t/dz in closed form: no autograd
        divergence = (q * (log_q - log_p)).sum(-1)                              # [chunk]
        d_logits = q * (log_q - log_p - divergence[:, None]) / tokens           # [chunk, vocab]

        # Back through logits = hidden @ weight.T, now, while they are at hand
        d_hidden[rows] = d_logits @ student_weight
        d_weight += d_logits.T @ student_hidden[rows]
        loss += divergence.sum() / tokens
    return loss, d_hidden, d_weight


# -------------------------------------------------------------------------------------------------
# 2. The gradients
#
# With z = h W^T / tau, q = softmax(z):   dq_i/dz_j = q_i (1[i = j] - q_j), so that for any D(q)
#
#     dD/dz_j = q_j (dD/dq_j - sum_i q_i dD/dq_i)
#
#                                       dD/dq                      dD/dz
#     reverse KL   sum q log(q/p)       log(q/p) + 1               q (log(q/p) - D)
#     forward KL   sum p log(p/q)       -p/q                       q - p
#     JSD_beta                          (1 - beta) log(q/m)       (1 - beta) q (log(q/m) - KL(q||m))
#     -log q_y                          -1[i = y] / q_y            q - 1[i = y]
#
# with m = beta p + (1 - beta) q. (JSD: beta KL(p || m) gives -beta (1 - beta) p/m, and
# (1 - beta) KL(q || m) gives (1 - beta) (log(q/m) + 1 - (1 - beta) q/m). All but the logarithm adds
# up to (1 - beta) (1 - m/m) = 0.) Then dh = dD/dz W / tau and dW = (dD/dz)^T h / tau.

def _divergence(log_q, q, log_p, beta, kl_weight, nll_weight):
    """losses.token_divergence and, ready to use, a gradient: q and both logarithms [n, vocab],
    weights [n, 1] or scalars -> D [n], kl_weight dD/dz + nll_weight q [n, vocab].

    Works in the memory of the logarithms: on a CPU fresh memory costs as much as the work."""
    p = log_p.exp()
    if beta == 0:
        divergence = (p * (log_p - log_q)).sum(-1)
        return divergence, q * (kl_weight + nll_weight) - p * kl_weight
    if beta == 1:
        log_ratio = log_q.sub_(log_p)
        divergence = kl_q = (q * log_ratio).sum(-1)                             # KL(q || p)
    else:
        # Where p and q both underflow, m = 0. Any finite logarithm will do: p and q are 0 there
        tiny = torch.finfo(q.dtype).tiny
        log_m = torch.lerp(q, p, beta).clamp_(min=tiny).log_()
        log_ratio = log_q.sub_(log_m)
        kl_p = log_p.sub_(log_m).mul_(p).sum(-1)                                # KL(p || m)
        kl_q = (q * log_ratio).sum(-1)                                          # KL(q || m)
        divergence = beta * kl_p + (1 - beta) * kl_q
        kl_weight = (1 - beta) * kl_weight
    # kl_weight q (log(q/m) - KL(q || m)) + nll_weight q
    factor = nll_weight - kl_weight * kl_q[:, None]                             # [n, 1]
    return divergence, log_ratio.mul_(kl_weight).add_(factor).mul_(q)


# -------------------------------------------------------------------------------------------------
# 3. A chunk: what lies between the products
#
# Each entry of the gradient depends on the two logits at its place and on a few sums over its row.
# So a GPU's kernel reads both matrices three times (normalisers, sums, gradient), writes the
# gradient, and stores nothing else of that size. tests/gpu/kernels_for_h100.py counts it in the
# code. On a CPU each line is an operation of its own, and a block of rows stays in the cache from
# one to the next.

def _chunk(
    student, teacher, labels, kl_weight, nll_weight, nll_temperature, *,
    beta, shared, entropy, dtype,
):
    """Losses and gradient of n tokens.

    student [n, vocab], teacher [n, teacher vocab] or None   logits
    labels, kl_weight, nll_weight [n]   the gradient is of the sum of
                                        kl_weight D - nll_weight log q(label)
    nll_temperature [n] or None         of log q alone; D is at 1
    shared                              None, or two [vocab]: the teacher's id for each of the
                                        student's, and 0, or FLOOR where it has none

    -> D, -log q(label), entropy [n] (0 where not asked for), gradient [n, vocab] in dtype."""
    labels = labels[:, None]
    kl_weight = kl_weight[:, None]
    nll_weight = nll_weight[:, None]

    # -log q(label); its gradient is nll_weight (q - 1[i = y]) / nll_temperature
    logits = student
    if nll_temperature is not None:
        logits = student / nll_temperature[:, None]
        nll_weight = nll_weight / nll_temperature[:, None]
    log_q = torch.log_softmax(logits, -1)
    q = log_q.exp()
    nll = -log_q.gather(1, labels)[:, 0]
    divergence = entropies = torch.zeros_like(nll)

    # D: of the same softmax, or of one over the shared tokens, or at temperature 1
    if teacher is None:
        gradient = q * nll_weight
    else:
        same = shared is None and nll_temperature is None
        if not same:
            gradient = q * nll_weight
            if shared is not None:
                ids, floor = shared
                student = student + floor
                teacher = teacher.index_select(1, ids) + floor
            log_q = torch.log_softmax(student, -1)
            q = log_q.exp()
        if entropy:
            entropies = -(q * log_q).sum(-1)
        log_p = torch.log_softmax(teacher, -1)
        with_nll = nll_weight if same else torch.zeros_like(nll_weight)
        divergence, d_logits = _divergence(log_q, q, log_p, beta, kl_weight, with_nll)
        gradient = d_logits if same else gradient + d_logits

    # The label's own entry. A compiler would first store the whole gradient for scatter_add
    if _compiles(student.device):
        at_label = torch.arange(student.shape[1], device=student.device) == labels
        gradient = gradient - torch.where(at_label, nll_weight, 0.0)
    else:
        gradient.scatter_add_(1, labels, -nll_weight)
    return divergence, nll, entropies, gradient.to(dtype)


def _states_chunk(student, teacher, mean, std, weight, dtype):
    """Hidden states [n, features] twice -> the sum of weight * JSD, and its gradient."""
    student, teacher = _wide(student), _wide(teacher)
    if mean is not None:
        student, teacher = (student - mean).div_(std), (teacher - mean).div_(std)
    log_q = torch.log_softmax(student, -1)
    log_p = torch.log_softmax(teacher, -1)
    divergence, d_states = _divergence(
        log_q, log_q.exp(), log_p, 0.5, weight, torch.zeros_like(weight)
    )
    if std is not None:
        d_states.div_(std)
    return weight * divergence.sum(), d_states.to(dtype)


def _blocks(rows, width, numbers):
    """Slices of rows: so many numbers each, which stay in a CPU's cache, but at least two rows a
    thread."""
    size = max(numbers // width, 2 * torch.get_num_threads())
    return [slice(start, start + size) for start in range(0, rows, size)]


def _chunk_by_blocks(student, *per_row, **how):
    """_chunk for a CPU. The gradient takes the place of the student's logits."""
    of_blocks = []
    for rows in _blocks(*student.shape, 2 ** 17):
        of_block = [None if x is None else x[rows] for x in per_row]
        *values, student[rows] = _chunk(student[rows], *of_block, **how)
        of_blocks.append(values)
    return *(torch.cat(parts) for parts in zip(*of_blocks)), student


def _states_by_blocks(student, teacher, mean, std, weight, dtype):
    """_states_chunk for a CPU."""
    loss = torch.zeros_like(weight)
    gradient = torch.empty(student.shape, dtype=dtype)
    for rows in _blocks(*student.shape, 2 ** 18):
        part, gradient[rows] = _states_chunk(student[rows], teacher[rows], mean, std, weight, dtype)
        loss += part
    return loss, gradient


def _compiles(device):
    return device.type == "cuda"


@functools.cache
def _compiled(work):
    """torch.compile, told to compute again rather than store what is needed twice (the
    thresholds), and not to split a row's sum where the first chunk has few rows."""
    return torch.compile(
        work,
        options={
            "realize_opcount_threshold": 10 ** 6,
            "realize_reads_threshold": 10 ** 6,
            "realize_acc_reads_threshold": 10 ** 6,
            "split_reductions": False,
        },
    )


def _any_rows(x, of_width=False):
    """Tells the compiler: one kernel for any number of rows; of_width: of this width.

    PyTorch has no public name for it (2.14), so it stands here alone
    (tests/test_private_names.py)."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    if of_width:
        torch._dynamo.mark_static(x, 1)


# -------------------------------------------------------------------------------------------------
# 4. The products: two for logits, two for gradients

def _operands(hidden, weight):
    """Both in the wider of their types, whatever autocast says.

    On a GPU both may be bfloat16, and nothing is rounded; with a float32 head the products are
    float32: slow. On a CPU 16-bit products win nothing, and float16 has too small a range for
    gradients: both become float32."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.device.type == "cpu" or dtype == torch.float16:
        dtype = torch.promote_types(dtype, torch.float32)
    return hidden.detach().to(dtype), weight.detach().to(dtype)


def _logits(hidden, weight, buffers, name):
    """hidden @ weight.T [n, vocab], in float32 or wider.

    buffers: {name: the first chunk's memory, the largest}, used again: on a CPU new memory costs
    as much time as the product."""
    # bfloat16 comes on a GPU alone. Its tensor cores sum in float32; that sum is kept as it is
    if hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if name not in buffers:
        buffers[name] = hidden.new_empty(len(hidden), len(weight))
    return torch.mm(hidden, weight.T, out=buffers[name][:len(hidden)])


def _back(d_logits, weight):
    """d_logits @ weight [n, hidden], in float32 or wider."""
    if d_logits.dtype == torch.bfloat16:
        return torch.mm(d_logits, weight, out_dtype=torch.float32)
    return torch.mm(d_logits, weight)


def _add_outer(d_weight, d_logits, hidden):
    """d_weight [vocab, hidden] += d_logits.T @ hidden, summed in float32 over all chunks."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    else:       # the product adds it up itself: no second matrix of that size
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=torch.float32, out=d_weight)


# -------------------------------------------------------------------------------------------------
# 5. The walk over the tokens

def _rows_per_chunk(chunk_tokens, vocab, device):
    """How many tokens go through the products at once: as given, else by memory.

    On a GPU as many as have three float32 [rows, vocab] matrices in a quarter of the free memory,
    from 128 to 2,048; on a CPU 64 MB of logits, but at least 256 rows. Every chunk reads and writes
    d_weight once, so large ones are faster and small ones leaner."""
    if chunk_tokens is not None:
        return chunk_tokens
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        return min(2048, max(128, free // 4 // (3 * 4 * vocab) // 128 * 128))
    return max(256, 2 ** 24 // vocab)


def _head_pass(
    rows, student, teacher, labels, kl_weight, nll_weight, nll_temperature, *,
    chunk_tokens, shared=None, banned=None, **how,
):
    """These rows [n] of the student through both heads, chunk by chunk -> D, -log q, entropy [n].

    student   a _Student, whose gradients are added to
    teacher   hidden [n, teacher hidden] and weight, or None
    labels [tokens]; kl_weight, nll_weight, nll_temperature [n], as in _chunk
    shared: a pair of ids, [shared] each. banned [ids]: what neither side can say"""
    hidden, weight, d_hidden, d_weight = student
    device, vocab = hidden.device, len(weight)
    if teacher is not None and shared is None and len(teacher[1]) != vocab:
        raise ValueError(f"heads of {vocab} and {len(teacher[1])} tokens: unequal vocabularies "
                         "need shared_ids")
    compiled, size = _compiles(device), _rows_per_chunk(chunk_tokens, vocab, device)
    buffers = {}
    per_row = (labels[rows], kl_weight, nll_weight, nll_temperature)
    if shared is not None:     # as _chunk wants it
        ids = torch.zeros(vocab, dtype=torch.int64, device=device).index_copy_(0, *shared)
        shared = ids, nll_weight.new_full((vocab,), FLOOR).index_fill_(0, shared[0], 0.0)

    def through_heads(part):
        own = rows[part]
        own_hidden = hidden[own]
        logits = _logits(own_hidden, weight, buffers, "student")                # [n, vocab]
        teacher_logits = None
        if teacher is not None:
            teacher_logits = _logits(teacher[0][part], teacher[1], buffers, "teacher")
        if banned is not None:
            logits.index_fill_(1, banned, FLOOR)
            if teacher is not None:
                teacher_logits.index_fill_(1, banned, FLOOR)

        operands = [logits, teacher_logits] + [None if x is None else x[part] for x in per_row]
        if compiled:
            for x in operands:
                if x is not None:
                    _any_rows(x)            # the last chunk is shorter; vocab stays a constant
        chunk = _compiled(_chunk) if compiled else _chunk_by_blocks
        *values, d_logits = chunk(*operands, shared=shared, dtype=hidden.dtype, **how)

        if d_hidden is not None:
            d_hidden.index_add_(0, own, _back(d_logits, weight))
        if d_weight is not None:
            _add_outer(d_weight, d_logits, own_hidden)
        return values                       # and the chunk's logits are freed

    with torch.autocast(device.type, enabled=False):
        chunks = [
            through_heads(slice(start, start + size)) for start in range(0, len(rows), size)
        ]
    if not chunks:
        chunks = [[nll_weight.new_zeros(0)] * 3]
    divergence, nll, entropy = (torch.cat(parts) for parts in zip(*chunks))
    return divergence, nll, entropy


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients are known already.

    apply(loss, x, y, ..., d_x, d_y, ...): d_x is x's gradient, None for what learns nothing."""

    @staticmethod
    def forward(ctx, loss, *tensors):
        half = len(tensors) // 2
        kept = []
        for x, gradient in zip(tensors[:half], tensors[half:]):
            if gradient is not None and x.dtype == torch.bfloat16:
                gradient = gradient.to(x.dtype)                     # no wider than it will be used
            kept.append(gradient)
        ctx.save_for_backward(*kept)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above):
        gradients = [None if g is None else above * g for g in ctx.saved_tensors]
        return None, *gradients, *[None] * len(gradients)


# -------------------------------------------------------------------------------------------------
# 6. The losses, as losses.py has them

def jsd_ce(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *,
    ce_weight=0.5, beta=0.5, shared_ids=None, denominator=None, chunk_tokens=None,
):
    """Paper A: L_top + ce_weight * L_SFT -> (loss, jsd, ce), as losses.jsd_ce.

    Both come from one pass over the student's logits. chunk_tokens: how many tokens at a time;
    None: by memory. ValueError for arguments that do not fit together."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta {beta} must lie in [0, 1]")
    teacher_rows = None if teacher_hidden is None else len(teacher_hidden)
    if labels.shape != student_hidden.shape[:1] or teacher_rows not in (None, len(student_hidden)):
        raise ValueError(f"{list(labels.shape)} labels and {teacher_rows} teacher rows for "
                         f"{len(student_hidden)} hidden states")

    student = _student(student_hidden, student_weight)
    counted = (labels != IGNORE).nonzero()[:, 0]                                # [rows]
    teacher = None
    if teacher_hidden is not None:
        teacher_hidden, teacher_weight = _operands(teacher_hidden, teacher_weight)
        teacher = teacher_hidden[counted], teacher_weight

    weight_of_row = 1 / _count(len(counted), denominator)
    dtype = _sum_dtype(student.hidden)
    row_weight = torch.full_like(counted, weight_of_row, dtype=dtype)           # [rows]
    divergence, nll, _ = _head_pass(
        counted,
        student,
        teacher,
        labels,
        row_weight,
        ce_weight * row_weight,
        None,
        chunk_tokens=chunk_tokens,
        beta=beta,
        entropy=False,
        shared=shared_ids,
    )
    top, ce = (row_weight * divergence).sum(), (row_weight * nll).sum()
    loss = _KnownGradient.apply(
        top + ce_weight * ce,
        student_hidden,
        student_weight,
        student.d_hidden,
        student.d_weight,
    )
    return loss, top, ce


def cord(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, *,
    lengths, carries_kl, advantage, temperature, banned=None, divergence_beta=1.0,
    alpha=2.0, beta=2.0, top_share=0.1, denominator=None, chunk_tokens=None,
):
    """Paper B: L_tok + L_seq -> (loss, kl, log_q, entropy), as losses.cord.

    The position weights are known beforehand. Which tokens are a rollout's K largest is known only
    after its last D_t. So the first pass weighs by position alone, and a second one adds
    (alpha - 1) times that for the K largest: a tenth of the tokens once more, instead of the
    gradient of all. Tokens that carry no KL never touch the teacher's head.

    chunk_tokens: how many tokens at a time; None: by memory. ValueError for arguments that
    do not fit together."""
    _check_rows(student_hidden, labels, carries_kl, advantage, temperature)
    _check_rollouts(lengths, carries_kl, teacher_hidden, labels, banned)
    if not 0 <= divergence_beta <= 1:
        raise ValueError(f"divergence_beta {divergence_beta} must lie in [0, 1]")
    if lengths and denominator is not None and denominator <= 0:
        raise ValueError(f"denominator {denominator} must be above 0: the whole step's rollouts "
                         "with a KL")
    student = _student(student_hidden, student_weight)
    if teacher_hidden is not None:
        teacher_hidden, teacher_weight = _operands(teacher_hidden, teacher_weight)
    dtype = _sum_dtype(student.hidden)
    advantage = advantage.to(dtype)
    kl = torch.zeros_like(labels, dtype=dtype)                                  # [tokens]
    log_q, entropy = torch.zeros_like(kl), torch.zeros_like(kl)

    def add(rows, hidden, kl_weight, nll_weight, temperature):
        """Adds these rows' gradients -> their D, -log q and entropy."""
        return _head_pass(
            rows,
            student,
            None if hidden is None else (hidden, teacher_weight),
            labels,
            kl_weight,
            nll_weight,
            None if (temperature == 1).all() else temperature.to(dtype),
            chunk_tokens=chunk_tokens,
            beta=divergence_beta,
            banned=banned,
            entropy=True,
        )

    # L_seq of the tokens that carry nothing else: the weight of their KL is 0
    rows = (~carries_kl).nonzero()[:, 0]
    _, nll, _ = add(rows, None, kl[rows], advantage[rows], temperature[rows])
    log_q[rows] = -nll
    loss = -(advantage[rows] * log_q[rows]).sum()

    if lengths:
        # L_tok with w^pos, and L_seq of the same tokens
        rows = carries_kl.nonzero()[:, 0]
        rollouts = len(lengths) if denominator is None else denominator
        position = position_weights(kl[rows], lengths, beta) / rollouts         # [kl tokens]
        kl[rows], nll, entropy[rows] = add(
            rows, teacher_hidden, position, advantage[rows], temperature[rows]
        )
        log_q[rows] = -nll

        # L_tok with w^KL: a second pass adds (alpha - 1) w^pos for the K largest
        factor = torch.where(largest_share(kl[rows], lengths, top_share), alpha, 1.0)
        top = (factor != 1).nonzero()[:, 0]
        extra = (factor - 1)[top] * position[top]
        add(rows[top], teacher_hidden[top], extra, torch.zeros_like(extra), torch.ones_like(extra))
        loss = loss + (factor * position * kl[rows]).sum() + (advantage[rows] * nll).sum()

    loss = _KnownGradient.apply(
        loss, student_hidden, student_weight, student.d_hidden, student.d_weight
    )
    return loss, kl, log_q, entropy


def hidden_jsd(student, teacher, *, mean=None, std=None, denominator=None):
    """Paper A's L_layer and L_ac, as losses.hidden_jsd: one pass, of which nothing is kept but the
    gradient, in the student's own precision."""
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must "
                         "be the same [tokens, features]")
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: pass both, or neither for raw features")
    learns = torch.is_grad_enabled() and student.requires_grad
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    weight_of_row = 1 / _count(len(student), denominator)
    weight_of_row = _wide(student.new_zeros(())).fill_(weight_of_row)   # not rounded to 16 bits
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        states = student.detach(), teacher.detach()
        chunk = _states_by_blocks
        if _compiles(student.device):
            chunk = _compiled(_states_chunk)
            for x in states:
                _any_rows(x, of_width=True)     # a kernel for each width, of any number of rows
        loss, gradient = chunk(*states, mean, std, weight_of_row, dtype)
    return _KnownGradient.apply(loss, student, gradient if learns else None)


# mse and cosine stay as losses.py has them, because there is nothing to fuse; raw-jsd because it
# is there to be compared with, not to be trained with
HIDDEN = {"jsd": hidden_jsd}


class _Student(typing.NamedTuple):
    hidden: torch.Tensor                # [tokens, hidden]
    weight: torch.Tensor                # [vocab, hidden]
    d_hidden: torch.Tensor | None       # their gradients, to be added to; None: it does not learn
    d_weight: torch.Tensor | None


def _student(hidden, weight):
    """The student's operands, and zeros for the gradients of what learns."""
    learns = torch.is_grad_enabled()
    operand, operand_weight = _operands(hidden, weight)
    d_hidden = d_weight = None
    if learns and hidden.requires_grad:
        d_hidden = operand.new_zeros(hidden.shape, dtype=_sum_dtype(operand))
    if learns and weight.requires_grad:
        d_weight = operand.new_zeros(weight.shape, dtype=_sum_dtype(operand))
    return _Student(operand, operand_weight, d_hidden, d_weight)


def _sum_dtype(x):
    """In which sums over x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Small parts. losses.py has most of them too; here once more, so that this file can be copied

def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _count(tokens, denominator):
    """What a sum over so many tokens is divided by; 1 without tokens, never 0."""
    if tokens == 0:
        return 1
    if denominator is not None and denominator <= 0:
        raise ValueError(f"denominator {denominator} for {tokens} tokens: pass the whole step's "
                         "token count")
    return tokens if denominator is None else denominator


def largest_share(kl, lengths, share):
    """The K = share * T (rounded up) tokens of each rollout of the largest D_t -> [tokens] bool."""
    mask = torch.zeros_like(kl, dtype=torch.bool)
    start = 0
    for length in lengths:
        order = kl[start:start + length].argsort(descending=True, stable=True)
        mask[start + order[:math.ceil(share * length - 1e-9)]] = True
        start += length
    return mask


def position_weights(kl, lengths, beta):
    """w^pos: from beta at a rollout's first token down to 1 at its last -> [tokens]."""
    weights = [
        beta - (beta - 1) * t / max(length - 1, 1) for length in lengths for t in range(length)
    ]
    return torch.tensor(weights, dtype=kl.dtype, device=kl.device)


def _check_rows(*per_token):
    rows = [len(x) for x in per_token]
    if len(set(rows)) > 1:
        raise ValueError(f"student_hidden, labels, carries_kl, advantage, temperature have {rows} "
                         "rows: these must be the same")


def _check_rollouts(lengths, carries_kl, teacher, labels, banned):
    teacher_rows = 0 if teacher is None else len(teacher)
    if not sum(lengths) == carries_kl.sum() == teacher_rows:
        raise ValueError(
            f"lengths add up to {sum(lengths)}; carries_kl names {carries_kl.sum().item()} tokens "
            f"and the teacher has {teacher_rows} rows: these must be the same")
    if banned is not None and torch.isin(labels, banned).any():
        wrong = labels[torch.isin(labels, banned)][0].item()
        raise ValueError(f"label {wrong} is banned, so it cannot have been sampled")
