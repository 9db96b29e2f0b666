"""Sampling that can be repeated: every random number belongs to a key and a position.

Usually a sampled token depends on the state of a generator, and therefore on the batch around it,
on the rank, and on everything that was drawn before. Here the number that decides row r's token at
position t depends on (keys[r], t) alone. The same question gets the same answer alone, in any
batch, on any number of ranks, and after a resume, as far as its logits are the same (batches round
differently); and a rollout can be drawn again from its key.

How: the key seeds one stream of uniform numbers u_0, u_1, ... At position t the distribution's
cumulative sum is laid out on [0, 1), in the order of the ids (with top_k or top_p: the most
probable first), and the token is where u_t falls.

    0        p(a)       p(a) + p(b)                  1
    |---a----|-----b----|-------------c--------------|
                             ^ u_t                        -> c

The logits processor leaves exactly one token possible, so that generate(..., do_sample=False) of
transformers takes it. (A checkpoint's own penalties would act before it: give the model a plain
GenerationConfig.) Needs nothing but torch: copy the file.

    prompt_length = inputs["input_ids"].shape[1]
    choose = chooser(["7 question-1", "7 question-2"], prompt_length, [], max_new_tokens=512,
                     temperature=0.6)
    model.generate(**inputs, do_sample=False, logits_processor=[choose], max_new_tokens=512)
"""

import zlib

import torch


def chooser(keys, prompt_length, banned, *, max_new_tokens, temperature, top_k=0, top_p=1.0):
    """The whole decoding rule as one logits processor, choose(input_ids, scores) -> scores.

    keys           one string a row, such as "seed id"
    prompt_length  of input_ids before the first new token
    banned         ids that are never drawn
    temperature    a number, or one for each row; 0 (for all rows): the most probable token
    top_k, top_p   0 and 1: the full softmax

    ValueError for a top_p outside (0, 1], a temperature below 0, and 0 in some rows only."""
    streams = [torch.Generator().manual_seed(zlib.crc32(str(key).encode())) for key in keys]
    uniform = torch.stack([torch.rand(max_new_tokens, generator=stream) for stream in streams])
    uniform = uniform.double()                                              # [batch, new tokens]
    banned = torch.tensor(banned, dtype=torch.long)
    temperature = torch.as_tensor(temperature, dtype=torch.float32)
    temperature = temperature.expand(len(uniform))[:, None]                 # [batch, 1]
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in (0, 1]")
    if not ((temperature > 0).all() or (temperature == 0).all()):
        raise ValueError("temperatures must be above 0, or 0 in all rows")

    def choose(input_ids, scores):                  # [batch, prompt + t], [batch, vocab]
        scores = scores.float().index_fill(1, banned.to(scores.device), -torch.inf)
        if (temperature == 0).all():
            return scores                           # generate takes the largest

        # The candidates: all, in the order of their ids, or the best k, best first
        logits = scores / temperature.to(scores.device)
        candidates = None
        if top_k or top_p < 1:
            most = min(top_k or scores.shape[1], scores.shape[1])
            logits, candidates = logits.topk(most)                          # [batch, k]
        p = logits.softmax(-1).double()
        if top_p < 1:
            # A token stays while those before it hold less than top_p
            p = p * (p.cumsum(-1) - p < top_p)

        # Where u_t falls. What has no probability has no width, and is skipped
        below = p.cumsum(-1)
        t = input_ids.shape[1] - prompt_length
        u = uniform[:, t, None].to(p.device) * below[:, -1:]                # [batch, 1]
        pick = (below <= u).sum(-1, keepdim=True)
        if candidates is not None:
            pick = candidates.gather(1, pick)
        return torch.full_like(scores, -torch.inf).scatter(1, pick, 0.0)

    return choose
