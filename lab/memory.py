"""
What a training script holds of one GPU of many, moment by moment: by arithmetic, from the models'
shapes alone.

    python -m lab.memory --script source_layer --shapes qwen2-audio-7b+qwen3-8b   # 1 to 64 GPUs
    python -m lab.memory --script cord --shapes qwen2-audio-7b --gpus 1 --weights bfloat16 --lora 16

Exact: parameters, gradients, optimizer, what is gathered, logits. What autograd keeps is counted by
running a layer on the meta device, where tensors have a shape and no memory. Left out: what CUDA
itself and the allocator's gaps take.
"""
import argparse
import functools
import json
import tempfile
from pathlib import Path
from unittest import mock

import soundfile
import torch
import torch.nn.functional as F

import data
import models
import train_cord
import train_source_layer
from lab import shapes
from lab.printed import Printed

SHAPES = {"qwen2-audio-7b": "Qwen/Qwen2-Audio-7B-Instruct",
          "qwen2.5-omni-7b": "Qwen/Qwen2.5-Omni-7B",
          "qwen3-8b": "Qwen/Qwen3-8B"}
MODELS = ["qwen2.5-omni-7b+qwen3-8b", "qwen2-audio-7b+qwen3-8b",
          "qwen2.5-omni-7b", "qwen2-audio-7b"]
SCRIPTS = {"source_layer": train_source_layer, "cord": train_cord}
ALL = 1_000                 # layers, more than any has


# ------------------------------- 1. flags, models and examples ----------------------------------
# bench.py uses these, too.

def add_shapes(parser):
    """The flags that say which script trains which models."""
    parser.add_argument("--script", choices=list(SCRIPTS), required=True)
    parser.add_argument("--shapes", choices=MODELS, required=True,
                        help="student+teacher; CORD needs no other teacher")
    parser.add_argument("--layers", type=int, default=ALL,
                        help="of each model's, at most so many; all the widths stay")


def with_flags(args):
    """args, and beside them the defaults of the training script's flags. SystemExit for paper A
    without a teacher."""
    if args.script == "source_layer" and "+" not in args.shapes:
        raise SystemExit("--script source_layer needs a textual teacher: "
                         f"--shapes {args.shapes}+qwen3-8b")
    flags = SCRIPTS[args.script].parse_flags([])
    return argparse.Namespace(**vars(flags) | vars(args))


def random_models(args, device, layers):
    """-> (student, processor, teacher or None, its tokenizer) with at most so many layers: the
    student in the type of --weights, what is frozen in bfloat16."""
    name, _, reader = args.shapes.partition("+")
    dtype = torch.float32 if wide(args) else torch.bfloat16
    teacher = tokenizer = None
    with device:
        student, processor = shapes.random_student(SHAPES[name], layers, dtype)
        if reader:
            teacher, tokenizer = shapes.random_teacher(SHAPES[reader], layers, torch.bfloat16)
            teacher.requires_grad_(False)
    return student, processor, teacher, tokenizer


def wide(args):
    """Are the weights that learn float32 themselves? Below LoRA's adapters they never are."""
    return args.weights == "float32" and not args.lora


def choose_trained(args, student):
    # What hearing.check would find by running the model: everything but Omni's vision tower
    of_use = [p for name, p in student.named_parameters() if "visual" not in name.split(".")]
    models.choose_trained(student, args.train, of_use, lora=args.lora)


def write_examples(args, folder, count, kind="wav", rate=16_000):
    """A manifest of noise, with texts of the asked lengths: question 30 words, description or
    transcript 100."""
    generator = torch.Generator().manual_seed(0)

    def text(n):
        ids = torch.randint(151_600, (n,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())

    lines = []
    for i in range(count):
        wave = 0.1 * torch.randn(round(rate * args.seconds), generator=generator)
        soundfile.write(folder / f"{i}.{kind}", wave.numpy(), rate)
        stage = text(max(1, (args.response_tokens - 12) // 4))
        stages = ("planning", "caption", "reasoning", "summary")
        lines.append(json.dumps({
            "id": str(i), "audio": f"{i}.{kind}", "question": text(30), "task": "speech",
            "answer": "w1", "description": text(100), "transcript": text(100),
            "reasoning": dict.fromkeys(stages, stage)}))
    (folder / "noise.jsonl").write_text("\n".join(lines) + "\n")
    return data.read_manifest(folder / "noise.jsonl")


def billions(parameters):
    return sum(p.numel() for p in parameters) / 1e9


def projections(student, teacher):
    """Parameters of paper A's W_i, in billions."""
    text = student.config.get_text_config()
    return text.num_hidden_layers * text.hidden_size * teacher.config.hidden_size / 1e9


def gigabytes(*tensors):
    return sum(t.nbytes for t in tensors) / 1e9


# ------------------------------- 2. what is held all the time -----------------------------------

def at_full_depth(args):
    """{part: GB} that a step holds all the time on one GPU."""
    student, _, teacher, _ = random_models(args, torch.device("meta"), ALL)
    choose_trained(args, student)
    return held_by(args, student, teacher, 1)


def held_by(args, student, teacher, gpus):
    """The same of given models, on each of so many GPUs (--shard). Bytes a parameter: 16 for what
    learns in float32 (with gradient and two moments), 10 in bfloat16 (plumbing/optimizer.py), 2 for
    what is frozen, 16 for projections and adapters (but FSDP gathers what learns in one type: then
    they are as the weights). With DDP the gradients live in its buckets, so that they are not there
    twice."""
    def share(parameters):
        return billions(parameters) / gpus

    learns = [p for p in student.parameters() if p.requires_grad]
    head = models.head_weight(student)
    base = [p for p in student.parameters() if not (args.lora and p.requires_grad)]
    each = 4 if wide(args) else 2
    held = {"student": each * share(base)}
    if args.lora:
        held["adapters"] = 16 * share(learns)
    else:
        held["optimizer"] = (8 if wide(args) else 6) * share(learns)
        held["gradients"] = each * share(learns)

    if args.script == "cord":
        if not args.lora:
            copied = [*models.decoder(student).parameters(), head]
            held["teacher (a copy of the decoder)"] = 2 * share(copied)
        return held
    held["teacher"] = 2 * share(teacher.parameters())
    if not args.lora:
        held["snapshot"] = 2 * share(p for p in base if p is not head)
    bytes_each = 16 if gpus == 1 or wide(args) or args.lora else 10
    held["projections"] = bytes_each * projections(student, teacher) / gpus
    return held


# --------------------------------- 3. what autograd keeps ---------------------------------------

class Attention(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: operands, mask, result, and a number a
    row. (On the meta device PyTorch would write down the matrix of all scores.)"""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = torch.empty_like(q)
        row_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, row_sums)
        return out


def kept_for_backward(run, parameters):
    """Bytes that autograd keeps of what run() computes on the meta device under bfloat16 autocast,
    weights left out: each storage once."""
    half, plain_linear = torch.bfloat16, F.linear
    weights = {p.untyped_storage() for p in parameters}
    kept = set()

    def keep(x):
        kept.add(x.untyped_storage())               # one object, the same for all its tensors
        return x

    # Autocast does not know the meta device: these two do what it does
    def linear(x, weight, bias=None):
        if weight.dtype != half:
            weight = torch.empty_like(weight, dtype=half, requires_grad=weight.requires_grad)
        weights.add(weight.untyped_storage())
        return plain_linear(x.to(half), weight, None if bias is None else bias.to(half))

    def attention(q, k, v, attn_mask=None, **_):
        mask = None if attn_mask is None else torch.empty_like(attn_mask, dtype=half)
        return Attention.apply(q.to(half), k.to(half), v.to(half), mask)

    patched = mock.patch.multiple(F, linear=linear, scaled_dot_product_attention=attention)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), patched:
        run()
    return sum(storage.nbytes() for storage in kept - weights)


def activations(student, lengths):
    """GB that the student keeps for one clip: {"layers": all of the decoder, "inputs": its layers'
    inputs alone, "tower": all of the tower, where that learns}."""
    decoder, tower = models.decoder(student), models.tower(student)
    meta = functools.partial(torch.empty, device="meta")
    dtype = decoder.get_input_embeddings().weight.dtype
    seq = lengths["audio view"]
    embeds = meta(1, seq, decoder.config.hidden_size, dtype=dtype, requires_grad=True)
    positions = meta(1, seq, dtype=torch.long)
    mask = meta(1, 1, seq, seq, dtype=torch.bool)
    kept = kept_for_backward(
        lambda: decoder(inputs_embeds=embeds, use_cache=False, position_ids=positions,
                        attention_mask=mask), student.parameters())
    found = {"layers": kept / 1e9, "inputs": len(decoder.layers) * gigabytes(embeds), "tower": 0.0}

    if any(p.requires_grad for p in tower.layers.parameters()):
        frames = lengths["frames"]
        states = meta(1, frames, tower.config.d_model, dtype=dtype, requires_grad=True)
        inputs = (states, None)
        # Omni's attention stays within pieces, and its clips lie behind each other
        piece = getattr(tower, "n_window", None)
        if piece:
            inputs = (states[0], torch.tensor([*range(0, frames, piece), frames]))
        layer = kept_for_backward(lambda: tower.layers[0](*inputs), student.parameters())
        found["tower"] = len(tower.layers) * layer / 1e9
    return found


def lengths_of(args, processor, teacher_tokenizer):
    """{what: tokens of one clip}, as the collator makes them. CORD: a prompt and all of its
    rollouts are one sequence."""
    words = processor.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        examples = write_examples(args, Path(folder), 1)
        prompts = data.encode_prompts(examples, processor, teacher_tokenizer or words,
                                      words="description")
    if args.script == "cord":
        rollouts, said = 1 + args.group_size, args.response_tokens
    else:
        rollouts = 1
        said = len(data.encode_response(words, data.response_text(examples[0])))
    prompt = len(prompts.audio[0])
    features = next(x for x in prompts.features.values() if x.is_floating_point())
    return {
        "prompt": prompt,
        "response": rollouts * said,
        "sound": prompts.audio[0].count(words.convert_tokens_to_ids(processor.audio_token)),
        "frames": features.shape[-1] // 2,
        "audio view": prompt + rollouts * said,
        "text view": len(prompts.text[0]) + said}


def shape_of(args):
    """Everything that an estimate needs, from models on the meta device: parameters in billions,
    tokens of a clip, and what autograd keeps of it."""
    meta = torch.device("meta")
    student, processor, teacher, teacher_tokenizer = random_models(args, meta, args.layers)
    choose_trained(args, student)
    decoder, blocks = models.decoder(student), models.blocks(student)
    head = models.head_weight(student)
    reader = models.decoder(teacher or student)
    text = student.config.get_text_config()

    def sizes(parameters, blocks):
        """-> billions of parameters: all of these, those in no block (FSDP gathers them as one),
        and those of the largest block."""
        numbers = {p: p.numel() / 1e9 for p in parameters}
        of_blocks = [sum(numbers.get(p, 0) for p in block.parameters()) for block in blocks]
        whole = sum(numbers.values())
        return whole, whole - sum(of_blocks), max(of_blocks)

    s = argparse.Namespace(student=student, teacher=teacher, words=len(head))
    s.depth = len(decoder.layers)
    s.width = text.hidden_size
    s.reader_width = reader.config.hidden_size
    s.projections = projections(student, teacher) if teacher else 0.0
    learns = [p for p in student.parameters() if p.requires_grad]
    s.whole, s.root, s.block = sizes(student.parameters(), blocks)
    s.learns, s.root_learns, s.block_learns = sizes(learns, blocks)
    s.root += s.projections
    s.learns += s.projections
    s.root_learns += s.projections
    s.reader, s.reader_root, s.reader_block = sizes(reader.parameters(), reader.layers)
    s.decoder = billions(decoder.parameters())
    s.head = billions([head])
    s.snapshot_root = s.root - s.projections - s.head
    s.largest = max(billions([p]) for p in student.parameters())
    s.head_learns = s.head * head.requires_grad
    s.linear = billions(
        m.weight for m in student.modules()
        if isinstance(m, torch.nn.Linear) and m.weight.requires_grad and m.weight is not head)
    s.reader_head = billions([models.head_weight(teacher or student)])
    head_dim = getattr(text, "head_dim", None) or s.width // text.num_attention_heads
    s.cached = 4 * s.depth * text.num_key_value_heads * head_dim / 1e9              # GB a token

    # Gathered, all is bfloat16; else what the layers add up to is as wide as the embeddings
    s.lengths = lengths_of(args, processor, teacher_tokenizer)
    s.kept = {wide(args): activations(student, s.lengths)}
    if wide(args):
        s.kept[False] = activations(student.to(torch.bfloat16), s.lengths)
    return s


# ------------------------------------- 4. the estimate ------------------------------------------

def estimate(args, shape, gpus, clips):
    """-> {part: GB held all the time on one GPU}, {moment: {part: GB}}, what is held among them. On
    one GPU nothing is gathered; on more --shard shares everything out.

    FSDP gathers in bfloat16: what is in no layer for as long as a step runs, a layer when it runs,
    with the next one on its way. A layer's gradient is whole in bfloat16, then in float32 for the
    sum over ranks. Of frozen models nothing stays gathered when they have run."""
    s, shared = shape, gpus > 1
    held = held_by(args, shape.student, shape.teacher, gpus)
    always = {"held": sum(held.values())}
    copies = {"bfloat16 copies of weights, by autocast": 2 * s.linear * (wide(args) and not shared)}
    everything = dict(always)
    if shared:                              # FSDP keeps what a root was gathered into
        name = "gathered: the whole student, what is in no layer twice"
        everything[name] = 2 * (s.whole + s.projections + s.root)
    everything |= copies

    moments = step_moments(args, s, gpus, clips, always, copies)
    if args.script == "cord":
        copied = not args.lora
        reader = s.decoder + s.reader_root if copied else s.whole + s.root
        kept = s.kept[wide(args) and not shared]
        rows = args.prompts * (1 + args.group_size)
        moments["rollouts"] = everything | answers(args, s, rows)
        moments["text view"] = always | {
            "gathered: the whole reader, what is in no layer twice": 2 * reader * shared,
            "a layer": clips * kept["layers"] / s.depth}
    moments["evaluation"] = everything | answers(args, s, args.eval_batch)
    largest = (4 if wide(args) else 2) * s.largest
    moments["checkpoint"] = always | {"one tensor, whole": largest * shared}
    return held, moments | loading_moments(args, s, gpus, copies)


def answers(args, s, rows, tokens=None):
    """Sampling so many answers at once. Of a token: logits three times, probabilities twice in
    float64."""
    tokens = tokens or s.lengths["prompt"] + args.response_tokens
    return {f"keys and values of {rows}": rows * tokens * s.cached,
            "sampling": 28 * rows * s.words / 1e9}


def step_moments(args, s, gpus, clips, always, copies):
    """Forward, backward, optimizer."""
    shared, source = gpus > 1, args.script == "source_layer"
    kept = s.kept[wide(args) and not shared]
    gathered = dict(always)
    if shared:
        gathered["gathered: what is in no layer"] = 2 * s.root
        gathered["gathered: two layers"] = 4 * max(s.block, s.reader_block)
    gathered |= copies

    clip = kept["layers"]
    if args.checkpoint_activations:
        clip = kept["inputs"] + kept["layers"] / s.depth
    clip += kept["tower"]
    # For every pair of layers, 2 bytes each: tapped states, the teacher's, the snapshot's, the
    # projected ones, and the fused losses' gradients
    if source:
        response = s.lengths["response"] * (s.width + 3 * s.reader_width)
        clip += 2 * s.depth * (response + s.lengths["sound"] * 3 * s.width) / 1e9

    # Bytes of what becomes the head's gradient; summed over chunks of tokens in float32
    head = 4 if wide(args) and not shared else 2
    forward = gathered | {
        "activations": clips * clip,
        "gathered: the teacher's head": 2 * s.reader_head * (shared and (source or not args.lora)),
        "the head's gradient, in float32 and as it is kept":
            s.head_learns * (4 if head == 4 else 6)}
    # As fused._rows_per_chunk cuts them: a quarter of what is free
    free = int((args.memory - sum(forward.values())) * 1e9 / 4)
    chunk = min(2048, max(128, free // (12 * s.words) // 128 * 128), clips * s.lengths["response"])
    square_roots = 4 * s.learns / gpus * (wide(args) or args.lora > 0)
    return {
        "forward pass, at the losses": forward | {
            "a chunk: logits of both, gradient": 12 * s.words * chunk / 1e9},
        "backward pass, its begin": gathered | {
            "activations": clips * clip,
            "the head's gradient, kept and multiplied": 2 * head * s.head_learns,
            "a layer's gradient, whole, and two float32 sums": 10 * s.block_learns * shared},
        "backward pass, its end": gathered | {
            "gradient of what is in no layer, whole, and its float32 sum":
                (6 + 4 / gpus) * s.root_learns * shared},
        "optimizer": always | {"AdamW's square roots": square_roots}}


def loading_moments(args, s, gpus, copies):
    """Before it is shared out, the student is whole on every GPU, and gives its first answers."""
    shared, copied = gpus > 1, not args.lora
    source = args.script == "source_layer"
    each = 4 if wide(args) else 2
    student = {"the student": each * s.whole}
    copy = {"its copy": 2 * (s.whole if source else s.decoder + s.head) * copied}
    answering = student | {"bfloat16 copies of weights, by autocast": 2 * s.linear * wide(args)}
    moments = {"loading, the copy": student | copy}
    if source:
        snapshot = {"snapshot": 2 * (s.whole - s.head) / gpus * copied}
        teacher = {"the teacher": 2 * s.reader / gpus}
        moments["loading, the teacher"] = student | snapshot | {
            "the teacher": 2 * (s.reader + s.reader_head)}
        roots, layers = max(s.snapshot_root, s.reader_root), max(s.block, s.reader_block)
        widths = each * s.width + 2 * s.reader_width + 2 * s.width
        tokens = train_source_layer.CALIBRATION_EXAMPLES * train_source_layer.CALIBRATION_TOKENS
        moments["loading, the calibration"] = student | snapshot | teacher | copies | {
            "gathered": (2 * roots + 4 * layers) * shared,
            "states of every layer": s.depth * tokens * widths / 1e9}
        answering |= snapshot | teacher
    else:
        answering |= copy
        texts = answers(args, s, args.text_batch, s.lengths["text view"])
        moments["loading, the text view's answers"] = answering | texts
    moments["loading, the evaluation before"] = answering | answers(args, s, args.eval_batch)
    return moments


def most(moments):
    return max(sum(parts.values()) for parts in moments.values())


def most_clips(args, shape, gpus):
    """The largest micro-batch whose every moment fits into --memory, in clips; 0: none does."""
    for clips in range(1, 257):
        if most(estimate(args, shape, gpus, clips)[1]) > args.memory:
            return clips - 1
    return 256


# ----------------------------------------- 5. the table -----------------------------------------

def print_estimate(args):
    shape = shape_of(args)
    helds, moments = zip(*(estimate(args, shape, n, args.micro_batch) for n in args.gpus))
    lengths = [f"{n:,} {what}" for what, n in shape.lengths.items()]
    print(f"train_{args.script}.py --weights {args.weights} --lora {args.lora} at the shapes of "
          f"{args.shapes}, {args.micro_batch} clip(s) of {args.seconds:g} s in a micro-batch: "
          f"{', '.join(lengths)}")
    print("\nGB on each GPU: what is held all the time, then each moment; more than one GPU: "
          "--shard")
    out = Printed()
    out.table("GPUs", *args.gpus)

    def row(name, numbers):
        out.row(name, *(f"{x:.1f}" for x in numbers))

    for part in helds[0]:
        row(part, [held[part] for held in helds])
    row("**held all the time**", [sum(held.values()) for held in helds])
    for moment in moments[0]:
        columns = [found[moment] for found in moments]
        row(f"**{moment}**", [sum(parts.values()) for parts in columns])
        # In the order of their first appearance
        names = dict.fromkeys(name for parts in columns for name in parts)
        for name in names:
            if name != "held" and any(parts.get(name) for parts in columns):
                row(f"+ {name}", [parts.get(name, 0) for parts in columns])
    row("**the most**", [most(found) for found in moments])
    clips = [most_clips(args, shape, n) or "none" for n in args.gpus]
    out.row(f"clips in a micro-batch, at most {args.memory:g} GB", *clips)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shapes(parser)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64],
        help="how many, a column each; over 1: --shard")
    add("--weights", choices=["float32", "bfloat16"], default="float32", help="as in the scripts")
    add("--lora", type=int, default=0, help="rank of adapters; 0: the weights learn")
    add("--checkpoint-activations", action="store_true", help="as in the scripts")
    add("--micro-batch", type=int, default=1,
        help="clips in one forward pass; CORD: with all their rollouts")
    add("--prompts", type=int, default=8,
        help="CORD: prompts of a step on one GPU, whose rollouts are sampled at once")
    add("--eval-batch", type=int, default=8, help="answers at once in an evaluation")
    add("--text-batch", type=int, default=64, help="CORD: the text view's answers at once")
    add("--seconds", type=float, default=30.0, help="length of a clip")
    add("--response-tokens", type=int,
        help="tokens of a response or rollout; default: source_layer 700, cord 200")
    add("--memory", type=float, default=80.0, help="GB of one GPU")
    args = parser.parse_args(argv)
    if args.response_tokens is None:
        args.response_tokens = {"source_layer": 700, "cord": 200}[args.script]
    print_estimate(with_flags(args))


if __name__ == "__main__":
    main()
