"""
What lab.gpu measured, as the rows of docs/speed.md; and what the hardware allows, so that a
measurement can be judged.

    python -m lab.report_gpu runs/gpu/gpu.json
    python -m lab.report_gpu                    # the bounds alone

A bound is arithmetic over a datasheet: FLOP over the tensor cores' rate in bfloat16, bytes over the
memory's. It is a bound for what this repository does: where one thing here waits for the other (the
passes between a loss's products, a rollout's tokens), the times add up. Left out: launches,
attention, activations, the audio tower.
"""
import argparse
import json
from pathlib import Path

from lab.printed import as_markdown, table_lines

CHIPS = {"H100, 80 GB": (989e12, 3.35e12), "H200, 141 GB": (989e12, 4.8e12)}    # FLOP/s, bytes/s

# The shapes that lab.gpu measures: bench losses, and the two steps of two prompts. Tokens as
# lab.memory counts them
TOKENS, VOCAB, STUDENT, TEACHER = 8192, 151_936, 3584, 4096
PROMPTS, RESPONSES = 2, 5
AUDIO, BESIDE, READ = 250, 37, 136      # of a clip of 10 s, the words beside it, a text prompt
ROLLOUT, TRACE = 100, 86                # of CORD's rollouts, of paper A's responses
TWICE = 0.1                             # CORD goes over a tenth of the tokens a second time


def loss_bounds(flops, bandwidth):
    """{loss: seconds}: its matrix products, and between them three readings of each matrix of
    float32 logits and one writing of the gradient in bfloat16."""
    logits = 4 * TOKENS * VOCAB
    gradient = logits / 2
    bounds = {}
    for name, widths, matrices in (
        ("L_top + L_SFT (paper A)", 3 * STUDENT + TEACHER, 2),
        ("L_tok (paper B), all tokens with KL", (1 + TWICE) * (3 * STUDENT + TEACHER),
         (1 + TWICE) * 2),
        ("L_seq (paper B), no KL", 3 * STUDENT, 1),
    ):
        products = 2 * TOKENS * VOCAB * widths / flops
        passes = (3 * matrices * logits + gradient) / bandwidth
        bounds[name] = products + passes
    return bounds


def layers_of(hidden, inner, layers, key_value=1.0):
    """Parameters of a decoder's matrices. key_value: key and value heads over query heads."""
    return layers * (2 * hidden**2 * (1 + key_value) + 3 * hidden * inner)


def step_bounds(flops, bandwidth):
    """{step: seconds}. A token costs 2 FLOP a parameter forward, 2 more backward with LoRA (the
    gradients of the weights are not needed) and 4 with all weights; AdamW in 16 bits reads and
    writes 18 bytes a weight; every token of a rollout reads all weights once."""
    bounds = {}

    # CORD, Qwen2-Audio: a prompt once, behind it its five rollouts; the teacher reads one of them
    decoder = layers_of(4096, 11_008, 32)
    head = 156_032 * 4096
    heard = PROMPTS * (AUDIO + BESIDE + RESPONSES * ROLLOUT)
    read = PROMPTS * (READ + ROLLOUT)
    responses = PROMPTS * RESPONSES * ROLLOUT
    with_kl = PROMPTS * ROLLOUT
    rollout = ROLLOUT * 2 * (decoder + head) / bandwidth
    for kind, backward, adamw in (("LoRA", 2, 0), ("all weights", 4, 18)):
        work = (2 + backward) * decoder * heard + 2 * decoder * read
        work += head * ((2 + backward) * (responses + TWICE * with_kl) + 2 * (1 + TWICE) * with_kl)
        optimizer = adamw * (decoder + head) / bandwidth
        bounds[f"a CORD step, {kind}"] = rollout + work / flops + optimizer

    # Paper A, Omni and Qwen3-8B; the snapshot hears the clip again
    decoder, head = layers_of(3584, 18_944, 28, 1 / 7), 152_064 * 3584
    teacher, teacher_head = layers_of(4096, 12_288, 36, 1 / 4), 151_936 * 4096
    heard, read = PROMPTS * (AUDIO + BESIDE + TRACE), PROMPTS * (READ + TRACE)
    responses = PROMPTS * TRACE
    for kind, backward, adamw in (("LoRA", 2, 0), ("all weights", 4, 18)):
        work = (2 + backward) * decoder * heard + 2 * teacher * read
        work += 2 * decoder * PROMPTS * AUDIO
        work += responses * ((2 + backward) * head + 2 * teacher_head)
        optimizer = adamw * (decoder + head) / bandwidth
        bounds[f"a paper A step, {kind}"] = work / flops + optimizer
    return bounds


def measured(records):
    """{bounded name: seconds} out of gpu.json: "ours" of the losses, the sum of a step's parts."""
    found = {}
    for record in records:
        for table in record.get("printed", ()):
            if isinstance(table, str):
                continue
            first, second, *_ = table["columns"]
            if second == "time, over ours":
                seconds = {row[0]: row[2] for row in table["rows"]}
                if "ours" in seconds:                       # not where the part was stopped
                    found[first] = float(seconds["ours"])
            if first == "part":
                found[record["part"]] = sum(float(row[1]) for row in table["rows"])
    return found


def bounds_table(records):
    """What each chip allows, and what was measured, in milliseconds."""
    bounds = {chip: {**loss_bounds(*rates), **step_bounds(*rates)}
              for chip, rates in CHIPS.items()}
    found = measured(records)
    rows = []
    for name in next(iter(bounds.values())):
        allowed = [f"{1000 * bounds[chip][name]:,.0f}" for chip in CHIPS]
        rows.append([name, *allowed, f"{1000 * found[name]:,.0f}" if name in found else ""])
    return table_lines({"columns": ["at least, milliseconds", *CHIPS, "measured"], "rows": rows})


def report(records):
    """lab.gpu's records -> lines of markdown."""
    lines = []
    for record in records:
        lines += ["", f"### {record['part']}", ""]
        if "command" not in record:
            lines.append(f"{record['ended'].capitalize()}.")
            continue
        lines += [f"    {record['command']}", "",
                  f"{record['seconds']:.0f} s, ended {record['ended']}."]
        lines += as_markdown(record["printed"])
        if not record["printed"] or record["ended"] != "well":
            last = [line.rpartition("\r")[2] for line in record["tail"].splitlines()][-12:]
            lines += [""] + [f"    {line}" for line in last]
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="gpu.json; without it the bounds alone")
    args = parser.parse_args(argv)
    records = json.loads(Path(args.file).read_text()) if args.file else []
    print(*report(records), *bounds_table(records), sep="\n")


if __name__ == "__main__":
    main()
