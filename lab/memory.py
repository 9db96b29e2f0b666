"""
What a training script holds of one GPU of many, moment by moment: by arithmetic from the models' shapes, or beside what real processes hold.

    python -m lab.memory --script source_layer --shapes qwen2-audio-7b+qwen3-8b                        # GB on 1, 2, 4, 8 and 64 GPUs
    python -m lab.memory --script cord --shapes qwen2-audio-7b --gpus 1 --weights bfloat16 --lora 16   # on one
    python -m lab.memory --script cord --shapes qwen2-audio-7b --measure --gpus 2 --layers 1 --words 16000 --seconds 5 --response-tokens 20

Exact: parameters, gradients, optimizer, what is gathered, logits. What autograd keeps is counted by running a layer on the meta device, where tensors have a
shape and no memory. Left out: what CUDA itself and the allocator's gaps take.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import soundfile
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plumbing import ranks, run

from plumbing.optimizer import clip, parameter_groups
import data
import layer_map
import models
import rollout
from lab import shapes
from plumbing import optimizer as split_adamw
import train_cord
import train_source_layer


# ---------------------------------------------------------------------------------------------------------------------------------
# 1. a step at the shapes of real models, with random weights: nothing is downloaded

SHAPES = {"qwen2-audio-7b": "Qwen/Qwen2-Audio-7B-Instruct", "qwen2.5-omni-7b": "Qwen/Qwen2.5-Omni-7B", "qwen3-8b": "Qwen/Qwen3-8B"}
MODELS = ["qwen2.5-omni-7b+qwen3-8b", "qwen2-audio-7b+qwen3-8b", "qwen2.5-omni-7b", "qwen2-audio-7b"]
ALL = 1_000                 # layers, more than any has


def random_models(args, device, layers):
    """-> (student, processor, teacher or None, its tokenizer), with random weights and at most so many layers: the student in the type of --weights, what is frozen in bfloat16."""
    name, _, reader = args.shapes.partition("+")
    with device:
        student, processor = shapes.random_student(SHAPES[name], layers, torch.float32 if wide(args) else torch.bfloat16)
        teacher, tokenizer = shapes.random_teacher(SHAPES[reader], layers, torch.bfloat16) if reader else (None, None)
    return student, processor, teacher and teacher.requires_grad_(False), tokenizer


def wide(args):
    """Are the weights that learn float32 themselves? Below LoRA's adapters they never are."""
    return args.weights == "float32" and not args.lora


def of_use(student):
    """What models.check would find by running the model: everything but Omni's eyes."""
    return [p for name, p in student.named_parameters() if "visual" not in name.split(".")]


def write_examples(args, folder, count, kind="wav", rate=16_000):
    """A manifest of noise, with texts of the asked lengths: question 30 words, description or transcript 100."""
    generator = torch.Generator().manual_seed(0)
    text = lambda n: " ".join(f"w{i}" for i in torch.randint(151_600, (n,), generator=generator).tolist())
    lines = []
    for i in range(count):
        soundfile.write(folder / f"{i}.{kind}", (0.1 * torch.randn(round(rate * args.seconds), generator=generator)).numpy(), rate)
        stage = text(max(1, (args.response_tokens - 12) // 4))
        lines.append(json.dumps({"id": str(i), "audio": f"{i}.{kind}", "question": text(30), "task": "speech", "answer": "w1", "description": text(100), "transcript": text(100),
                                 "reasoning": {name: stage for name in ("planning", "caption", "reasoning", "summary")}}))
    (folder / "noise.jsonl").write_text("\n".join(lines) + "\n")
    return data.read_manifest(folder / "noise.jsonl")


def gigabytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None) / 1e9


def at_full_depth(args, flags, gpus=1, layers=ALL):
    """{part: GB} that a step holds all the time on each of so many GPUs (--shard), or on one."""
    student, _, teacher, _ = random_models(args, torch.device("meta"), layers)
    models.choose_trained(student, args.train or flags.train, of_use(student), lora=args.lora)
    return held_by(args, student, teacher, gpus)


def held_by(args, student, teacher, gpus):
    """The same of given models. 16 bytes for what learns in float32 (its gradient and two moments with it), split_adamw.py's 10 in bfloat16; 2 for what does not; 16 for projections
    and LoRA (but FSDP gathers what learns in one type: then they are as the weights). With DDP the gradients live in its buckets, so that they are not there twice."""
    mine = lambda parameters: sum(-(-p.shape[0] // gpus) * p[0].numel() for p in parameters) / 1e9       # FSDP cuts the first axis; the first rank's share is never the smallest
    learns, head = [p for p in student.parameters() if p.requires_grad], models.head_weight(student)
    base, each = [p for p in student.parameters() if not (args.lora and p.requires_grad)], 4 if wide(args) else 2
    held = {"student": each * mine(base), **({"adapters": 16 * mine(learns)} if args.lora else {"optimizer": (8 if wide(args) else 6) * mine(learns), "gradients": each * mine(learns)})}
    if args.script == "cord":
        return held if args.lora else {**held, "teacher (a copy of the decoder)": 2 * mine([*models.decoder(student).parameters(), head])}
    depth, one = student.config.text_config.num_hidden_layers, torch.empty(teacher.config.hidden_size, student.config.text_config.hidden_size, device="meta")
    return {**held, "teacher": 2 * mine(teacher.parameters()), **({} if args.lora else {"snapshot": 2 * mine(p for p in base if p is not head)}),
            "projections": (16 if gpus == 1 or wide(args) or args.lora else 10) * depth * mine([one])}


def build(args, device, flags, layers):
    """A script's models and step module as its main() makes them, of random weights. -> a namespace of them; frozen: {part: its parameters}"""
    student, processor, teacher, tokenizer = random_models(args, device, layers)
    if args.script == "source_layer" and teacher is None:
        raise SystemExit(f"--script source_layer needs a textual teacher: --shapes {args.shapes}+qwen3-8b")
    snapshot, frozen, shared = student, {}, None
    if args.script == "source_layer":
        if not args.lora:
            snapshot = models.frozen_copy(student, torch.bfloat16)
            snapshot.set_output_embeddings(torch.nn.Identity())
        frozen = {"teacher": list(teacher.parameters()), **({} if args.lora else {"snapshot": list(snapshot.parameters())})}
        shared = data.shared_vocabulary(processor.tokenizer, tokenizer)[:2]
        pairs = layer_map.pairs(student.config.text_config.num_hidden_layers, teacher.config.num_hidden_layers)
    models.choose_trained(student, args.train or flags.train, of_use(student), lora=args.lora)
    if args.script == "source_layer":
        step = train_source_layer.SourceLayerStep(student, teacher, snapshot, pairs, [ids.to(device) for ids in shared], flags).to(device)
        step.projections.float()
    else:
        step = train_cord.CordStep(student, torch.tensor(rollout.banned_ids(student, processor.tokenizer), device=device), flags)
        if not args.lora:
            models.cast(step.teacher[0], torch.bfloat16), step.teacher[1].bfloat16()
            frozen = {"teacher (a copy of the decoder)": [p for part in step.teacher for p in part.parameters()]}
    return argparse.Namespace(student=student, processor=processor, teacher=teacher, tokenizer=tokenizer, snapshot=snapshot, step=step, frozen=frozen, shared=shared)


def batches_of(args, built, flags, examples, device, roll_out, read):
    """-> [(arguments of the step module's forward)], tokens that learn, views run. CORD: roll_out, as rollout.roll_out; read: chunks -> what the teacher says to each."""
    if args.script == "source_layer":
        table = data.token_map(*built.shared, built.student.config.text_config.vocab_size)
        batch = data.collate(examples, built.processor, built.tokenizer, student_to_teacher=table).to(device)
        counted = data.denominators([batch])
        return [(batch, counted)], counted["response"], (batch.audio, batch.text)
    prompts = data.encode_prompts(examples, built.processor, built.processor.tokenizer, words="transcript")
    plan = [(1.0, True, False)] + [(1.5, False, True)] * flags.group_size
    rollouts = roll_out(built.student, built.processor, prompts, plan, key="0", max_new_tokens=args.response_tokens)
    for i, r in enumerate(rollouts):        # a judge would call random words all wrong; here all rollouts of the group count
        r.advantage = 0.0 if r.kl else (0.5, -0.5)[i % 2]
    chunks = train_cord.chunks_of(rollouts, prompts, built.processor, flags.micro_batch, device)
    counts = {"token": len(examples), "group": len(examples) * flags.group_size}
    return ([(chunk, taught, counts) for chunk, taught in zip(chunks, read(chunks))], sum(len(r.ids) for r in rollouts),
            [v for chunk in chunks for v in (chunk.audio, chunk.text) if v])


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. the estimate, and what is measured

class Attention(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: operands, mask, result, and a number a row. (On the meta device PyTorch would write the matrix of all scores down.)"""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def kept_for_backward(run, parameters):
    """Bytes that autograd keeps of what run() computes on the meta device under bfloat16 autocast, weights left out: each storage once."""
    ours, kept, plain, half = {p.untyped_storage() for p in parameters}, set(), torch.nn.functional.linear, torch.bfloat16

    def keep(x):
        kept.add(x.untyped_storage())                           # an object for each, the same for all its tensors
        return x

    def linear(x, weight, bias=None):                           # autocast knows no meta device
        weight = weight if weight.dtype == half else torch.empty_like(weight, dtype=half, requires_grad=weight.requires_grad)
        ours.add(weight.untyped_storage())
        return plain(x.to(half), weight, bias if bias is None else bias.to(half))

    def attention(q, k, v, attn_mask=None, **_):
        return Attention.apply(*(x.to(half) for x in (q, k, v)), None if attn_mask is None else torch.empty_like(attn_mask, dtype=half))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), mock.patch.multiple(torch.nn.functional, linear=linear, scaled_dot_product_attention=attention):
        run()
    return sum(storage.nbytes() for storage in kept - ours)


def activations(student, lengths):
    """GB that the student keeps for one clip: {"layers": all of the decoder, "inputs": its layers' inputs alone, "tower": all of the tower, where that learns}."""
    decoder, tower, meta = models.decoder(student), models.tower(student), functools.partial(torch.empty, device="meta")
    kind, seq, depth = decoder.get_input_embeddings().weight.dtype, lengths["audio view"], len(decoder.layers)
    embeds = meta(1, seq, decoder.config.hidden_size, dtype=kind, requires_grad=True)
    places = dict(position_ids=meta(1, seq, dtype=torch.long), attention_mask=meta(1, 1, seq, seq, dtype=torch.bool))
    kept = kept_for_backward(lambda: decoder(inputs_embeds=embeds, use_cache=False, **places), student.parameters())
    found = {"layers": kept / 1e9, "inputs": depth * gigabytes(embeds), "tower": 0.0}
    if any(p.requires_grad for p in tower.layers.parameters()):
        heard = meta(1, lengths["frames"], tower.config.d_model, dtype=kind, requires_grad=True)
        pieces = getattr(tower, "n_window", None)               # Omni's attention stays within them, and its clips lie behind each other
        how = (heard[0], torch.tensor([*range(0, lengths["frames"], pieces), lengths["frames"]])) if pieces else (heard, None)
        found["tower"] = len(tower.layers) * kept_for_backward(lambda: tower.layers[0](*how), student.parameters()) / 1e9
    return found


def lengths_of(args, processor, teacher_tokenizer):
    """{what: tokens of one clip}, as the collator makes them. CORD: a prompt and all of its rollouts are one sequence."""
    with tempfile.TemporaryDirectory() as folder:
        examples = write_examples(args, Path(folder), 1)
        prompts = data.encode_prompts(examples, processor, teacher_tokenizer or processor.tokenizer, words="description")
    rollouts, said = (1 + args.group_size, args.response_tokens) if args.script == "cord" else (1, len(data.encode_response(processor.tokenizer, data.response_text(examples[0]))))
    sound = prompts.audio[0].count(processor.tokenizer.convert_tokens_to_ids(processor.audio_token))
    frames = next(x for x in prompts.features.values() if x.is_floating_point()).shape[-1] // 2
    return {"prompt": len(prompts.audio[0]), "response": rollouts * said, "sound": sound, "frames": frames, "audio view": len(prompts.audio[0]) + rollouts * said,
            "text view": len(prompts.text[0]) + said}


def shape_of(args, flags, layers):
    """Everything that an estimate needs, from models on the meta device: parameters in billions, tokens of a clip, and what autograd keeps of it."""
    student, processor, teacher, teacher_tokenizer = random_models(args, torch.device("meta"), layers)
    models.choose_trained(student, args.train or flags.train, of_use(student), lora=args.lora)
    decoder, head, reader, blocks, text = models.decoder(student), models.head_weight(student), models.decoder(teacher or student), models.blocks(student), student.config.get_text_config()
    count = lambda parameters: sum(p.numel() for p in parameters) / 1e9
    learns = lambda module: [p for p in module.parameters() if p.requires_grad]

    def root(parameters, blocks):           # FSDP gathers it as one: what is in no layer
        within = {id(p) for block in blocks for p in block.parameters()}
        return count(p for p in parameters if id(p) not in within)

    s = argparse.Namespace(student=student, teacher=teacher, depth=len(decoder.layers), width=text.hidden_size, reader_width=reader.config.hidden_size, words=len(head))
    s.projections = s.depth * s.reader_width * s.width / 1e9 if teacher else 0.0
    s.whole, s.decoder, s.head, s.largest = count(student.parameters()), count(decoder.parameters()), count([head]), max(count([p]) for p in student.parameters())
    s.learns, s.head_learns = count(learns(student)) + s.projections, s.head * head.requires_grad
    s.root, s.root_learns = root(student.parameters(), blocks) + s.projections, root(learns(student), blocks) + s.projections
    s.block, s.block_learns = max(count(block.parameters()) for block in blocks), max(count(learns(block)) for block in blocks)
    s.linear = count(m.weight for m in student.modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad and m.weight is not head)
    s.snapshot_root = root((p for p in student.parameters() if p is not head), blocks)
    s.reader, s.reader_head, s.reader_root = count(reader.parameters()), count([models.head_weight(teacher or student)]), root(reader.parameters(), reader.layers)
    s.reader_block = count(reader.layers[0].parameters())
    s.cached = 4 * s.depth * text.num_key_value_heads * (getattr(text, "head_dim", None) or s.width // text.num_attention_heads) / 1e9         # GB a token
    s.lengths, s.kept = lengths_of(args, processor, teacher_tokenizer), {}
    for float32 in {wide(args), False}:     # gathered, all is bfloat16; else what the layers add up to is as wide as the embeddings
        other = random_models(argparse.Namespace(**{**vars(args), "weights": "float32" if float32 else "bfloat16"}), torch.device("meta"), layers)[0]
        models.choose_trained(other, args.train or flags.train, of_use(other), lora=args.lora)
        s.kept[float32] = activations(other, s.lengths)
    return s


def estimate(args, shape, gpus, clips):
    """-> {part: GB held all the time on one GPU}, {moment: {part: GB}}, what is held among them. On one GPU nothing is gathered; on more --shard shares everything out.

    FSDP gathers in bfloat16: `root` for as long as a step runs, a layer when it runs, with the next one on its way; a layer's gradient is whole in bfloat16, then in float32 for the sum over
    ranks. Of frozen models nothing stays gathered when they have run."""
    s, held, source, copied, shared = shape, held_by(args, shape.student, shape.teacher, gpus), args.script == "source_layer", not args.lora, gpus > 1
    lengths, kept, each, rows = s.lengths, s.kept[wide(args) and not shared], 4 if wide(args) else 2, args.prompts * (1 + args.group_size)
    gathered = {"gathered: what is in no layer": 2 * s.root, "gathered: two layers": 4 * max(s.block, s.reader_block)} if shared else {}
    everything = {"gathered: the whole student, what is in no layer twice": 2 * (s.whole + s.projections + s.root)} if shared else {}        # FSDP keeps what a root was gathered into
    copies = {"bfloat16 copies of weights, by autocast": 2 * s.linear * (wide(args) and not shared)}
    clip = (kept["inputs"] + kept["layers"] / s.depth if args.checkpoint_activations else kept["layers"]) + kept["tower"]
    if source:      # for every pair of layers, 2 bytes each: tapped states, the teacher's, the snapshot's, the projected ones, and the fused losses' gradients
        clip += 2 * s.depth * (lengths["response"] * (s.width + 3 * s.reader_width) + lengths["sound"] * 3 * s.width) / 1e9
    head = 4 if wide(args) and not shared else 2                # bytes of what becomes the head's gradient; summed over chunks of tokens in float32
    reader_head = 2 * s.reader_head * (shared and (source or copied))
    forward = {"held": sum(held.values()), **gathered, **copies, "activations": clips * clip, "gathered: the teacher's head": reader_head,
               "the head's gradient, in float32 and as it is kept": s.head_learns * (4 if head == 4 else 6)}
    tokens = min(2048, max(128, int((args.memory - sum(forward.values())) * 1e9 / 4) // (12 * s.words) // 128 * 128), clips * lengths["response"])       # losses._rows_per_chunk

    def answers(n, tokens=lengths["prompt"] + args.response_tokens):
        # of a token: logits three times, probabilities twice in float64
        kept = n * tokens * s.cached
        return {f"keys and values of {n}": kept, "sampling": 28 * n * s.words / 1e9}

    moments = {
        "forward pass, at the losses": {**forward, "a chunk: logits of both, gradient": 12 * s.words * tokens / 1e9},
        "backward pass, its begin": {"held": sum(held.values()), **gathered, **copies, "activations": clips * clip, "the head's gradient, kept and multiplied": 2 * head * s.head_learns,
                                     "a layer's gradient, whole, and two float32 sums": 10 * s.block_learns * shared},
        "backward pass, its end": {"held": sum(held.values()), **gathered, **copies, "gradient of what is in no layer, whole, and its float32 sum": (6 + 4 / gpus) * s.root_learns * shared},
        "optimizer": {"held": sum(held.values()), "AdamW's square roots": 4 * s.learns / gpus * (wide(args) or args.lora > 0)}}
    if not source:
        reader = {"gathered: the whole reader, what is in no layer twice": 2 * (s.decoder + s.reader_root if copied else s.whole + s.root) * shared}
        moments |= {"rollouts": {"held": sum(held.values()), **everything, **copies, **answers(rows)},
                    "text view": {"held": sum(held.values()), **reader, "a layer": clips * kept["layers"] / s.depth}}
    moments["evaluation"] = {"held": sum(held.values()), **everything, **copies, **answers(args.eval_batch)}
    moments["checkpoint"] = {"held": sum(held.values()), "one tensor, whole": each * s.largest * shared}
    # Before it is shared out, the student is whole on every GPU
    moments["loading, the copy"] = {"the student": each * s.whole, "its copy": 2 * (s.whole if source else s.decoder + s.head) * copied}
    if source:
        snapshot, tokens = 2 * (s.whole - s.head) / gpus * copied, train_source_layer.CALIBRATION * train_source_layer.CALIBRATION_TOKENS
        moments["loading, the teacher"] = {"the student": each * s.whole, "snapshot": snapshot, "the teacher": 2 * (s.reader + s.reader_head)}
        moments["loading, the calibration"] = {"the student": each * s.whole, "snapshot": snapshot, "the teacher": 2 * s.reader / gpus, **copies,
                                  "gathered": (2 * max(s.snapshot_root, s.reader_root) + 4 * max(s.block, s.reader_block)) * shared,
                                  "states of every layer": s.depth * tokens * (each * s.width + 2 * s.reader_width + 2 * s.width) / 1e9}
    # The first answers are given before it is shared out, too
    loaded = {"the student": each * s.whole}
    loaded["bfloat16 copies of weights, by autocast"] = 2 * s.linear * wide(args)
    if source:
        loaded |= {"snapshot": snapshot, "the teacher": 2 * s.reader / gpus}
    else:
        loaded["its copy"] = 2 * (s.decoder + s.head) * copied
        texts = answers(args.text_batch, lengths["text view"])
        moments["loading, the text view's answers"] = {**loaded, **texts}
    moments["loading, the evaluation before"] = {**loaded, **answers(args.eval_batch)}
    return held, moments


def most_clips(args, shape, gpus):
    """The largest micro-batch whose every moment fits into --memory, in clips; 0: none does."""
    fits = lambda clips: max(sum(parts.values()) for parts in estimate(args, shape, gpus, clips)[1].values()) <= args.memory
    return next((clips - 1 for clips in range(1, 257) if not fits(clips)), 256)


@contextlib.contextmanager
def vocabulary_of(words):
    """Inside, no vocabulary has more words; None: all of them."""
    with contextlib.ExitStack() as stack:
        if words:
            for shape in (*shapes.STUDENTS.values(), *shapes.TEACHERS.values()):
                stack.enter_context(mock.patch.dict(shape, vocab_size=min(words, shape["vocab_size"])))
            stack.enter_context(mock.patch.object(shapes, "word_tokenizer", functools.partial(shapes.word_tokenizer, words=words - 32)))
        yield


def print_estimate(args):
    flags = {"source_layer": train_source_layer, "cord": train_cord}[args.script].parse_flags([])
    args.group_size = flags.group_size if args.script == "cord" else 0
    shape = shape_of(args, flags, args.layers or ALL)
    found = {gpus: estimate(args, shape, gpus, args.micro_batch) for gpus in args.gpus}
    line = lambda name, values: print(f"| {name} | " + " | ".join(f"{x:.1f}" if isinstance(x, float) else str(x) for x in values) + " |")
    print(f"train_{args.script}.py at the shapes of {args.shapes}{f', {args.layers} layer(s) of each' * bool(args.layers)}; {args.weights} weights{f', LoRA of rank {args.lora}' * (args.lora > 0)}"
          f"{', --checkpoint-activations' * args.checkpoint_activations}; {args.micro_batch} clip(s) of {args.seconds:g} s in a micro-batch: " + ", ".join(f"{n:,} {what}" for what, n in shape.lengths.items()))
    print("\nGB on each GPU: what is held all the time, then each moment; more than one GPU: --shard\n")
    line("GPUs", args.gpus)
    line("---", ["---"] * len(args.gpus))
    for name in next(iter(found.values()))[0]:
        line(name, [held[name] for held, _ in found.values()])
    line("**held all the time**", [sum(held.values()) for held, _ in found.values()])
    for moment in next(iter(found.values()))[1]:
        each = [moments[moment] for _, moments in found.values()]
        line(f"**{moment}**", [float(sum(parts.values())) for parts in each])
        for name in {name: None for parts in each for name, value in parts.items() if name != "held"}:
            if any(parts.get(name) for parts in each):
                line(f"+ {name}", [float(parts.get(name, 0.0)) for parts in each])
    line("**the most**", [max(sum(parts.values()) for parts in moments.values()) for _, moments in found.values()])
    line(f"clips in a micro-batch, at most {args.memory:g} GB", [most_clips(args, shape, gpus) or "none" for gpus in args.gpus])


def measure(args):
    """Two real steps of as many processes as --gpus says, under --shard: what the second one holds, by the estimate and by the tensors that are there; and, apart from both, what the
    process has come to hold."""
    if len(args.gpus) > 1 or args.gpus[0] < 2:
        raise SystemExit("--measure takes one number of GPUs, at least 2: --gpus 2")
    if "RANK" not in os.environ:
        raise SystemExit(subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus[0]), *sys.argv]).returncode)
    rank, world, device = ranks.start_distributed()
    gpu, script = device.type == "cuda", {"source_layer": train_source_layer, "cord": train_cord}[args.script]
    flags = script.parse_flags(["--weights", args.weights, "--lora", str(args.lora), "--shard", "--micro-batch", "1000", *["--checkpoint-activations"] * args.checkpoint_activations])
    args.group_size = flags.group_size if args.script == "cord" else 0
    with tempfile.TemporaryDirectory() as folder:
        measured, resident, most = steps_of_ranks(args, flags, device, write_examples(args, Path(folder), args.micro_batch))
    shape = shape_of(args, flags, args.layers or ALL)
    held, moments = estimate(args, shape, world, args.micro_batch)
    lines = [f"| {rank} | {name} | {held[name]:.3f} | {measured[name]:.3f} | {measured[name] / held[name]:.3f} |" for name in held if held[name]]
    lines.append(f"| {rank} | **together** | {sum(held.values()):.3f} | {sum(measured.values()):.3f} | {sum(measured.values()) / sum(held.values()):.3f} |")
    there = sum(held.values())
    lines.append(f"| {rank} | {'allocated' if gpu else 'resident'}, after - before | {there:.3f} | {resident:.3f} | {resident / there:.3f} |")
    if gpu:                 # on a CPU products and losses need other things beside them
        most_expected = max(sum(parts.values()) for name, parts in moments.items() if name.split(",")[0] in ("forward pass", "backward pass", "optimizer", "rollouts", "text view"))
        lines.append(f"| {rank} | the most in a step | {most_expected:.3f} | {most:.3f} | {most / most_expected:.3f} |")
    lines = ranks.gather_lists(lines)
    if rank == 0:
        print(f"train_{args.script}.py on {world} ranks with --shard, at the shapes of {args.shapes}{f', {args.layers} layer(s) of each' * bool(args.layers)}"
              f"{f', {args.words:,} words' * bool(args.words)}, {args.weights} weights{f', LoRA of rank {args.lora}' * (args.lora > 0)}\n\n| rank | part | estimate, GB | measured, GB | ratio |\n"
              "| --- | --- | --- | --- | --- |", *lines, sep="\n")
    ranks.stop_distributed()


def steps_of_ranks(args, flags, device, examples):
    """-> {part: GB of this rank's share of its tensors, gradients there}, GB that the process has come to hold then, the most that it held in the second step."""
    def now():
        gc.collect()
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device) / 1e9
        if sys.platform == "linux":                             # what is free shall not count
            ctypes.CDLL(None).malloc_trim(0)
        return run.host_memory_gb()

    before = now()
    built = build(args, device, flags, args.layers or ALL)
    student, step, source, half, frozen = built.student, built.step, args.script == "source_layer", torch.bfloat16, {}
    built.frozen.clear()                                        # it holds the whole of them
    if source:
        ranks.shard_reader(models.decoder(built.teacher), built.teacher.get_output_embeddings())
        frozen = {"teacher": [built.teacher], **({} if args.lora else {"snapshot": [ranks.shard(built.snapshot, models.blocks(built.snapshot))]})}
    elif not args.lora:
        ranks.shard_reader(*step.teacher)
        frozen = {"teacher (a copy of the decoder)": step.teacher}
    reader = step.teacher[0] if not source and not args.lora else step
    wrapped = ranks.wrap(step, student, flags, world=torch.distributed.get_world_size(), compute=half)
    learns = [p for p in step.parameters() if p.requires_grad]
    optimizer = (torch.optim.AdamW if wide(args) or args.lora else split_adamw.SplitAdamW)(parameter_groups(step, lr=1e-5, weight_decay=0.01), betas=(0.9, 0.98))
    autocast = functools.partial(torch.autocast, device.type, half)

    for _ in range(2):
        run.forget_peak_memory(device)
        with autocast():
            work, *_ = batches_of(args, built, flags, examples, device, lambda *a, **k: ranks.whole(wrapped, lambda: rollout.roll_out(*a, **k)),
                                  lambda chunks: ranks.whole(reader, lambda: [step.read(chunk) for chunk in chunks]))
        for arguments in work:
            with autocast():
                loss = wrapped(*arguments)
                loss = (loss[0] if isinstance(loss, tuple) else loss)["loss"]
            loss.backward()
        del work, arguments, loss
        clip(learns, 1.0)
        optimizer.step()
        most, after = run.peak_memory_gb(device), now()
        ours = lambda tensors: gigabytes(*(t.to_local() if isinstance(t, DTensor) else t for t in tensors))
        theirs = {id(p) for p in step.projections.parameters()} if source else set()
        base = [p for p in student.parameters() if not (args.lora and p.requires_grad)]
        of = lambda some: [*some, *(p.grad for p in some if p.grad is not None), *(x for p in some for x in optimizer.state.get(p, {}).values())]
        weights = [p for p in learns if id(p) not in theirs]
        measured = {"student": ours(base), **({"adapters": ours(of(weights))} if args.lora else {
            "optimizer": ours(x for p in weights for x in optimizer.state[p].values()), "gradients": ours(p.grad for p in weights)})}
        for name, modules in frozen.items():
            for part in (part for module in modules for part in module.modules() if isinstance(part, FSDPModule)):
                part.reshard()                                  # what stayed gathered is counted in `after`
            measured[name] = ours(p for module in modules for p in module.parameters())
        measured |= {"projections": ours(of(list(step.projections.parameters())))} if source else {}
        optimizer.zero_grad(set_to_none=True)
    return measured, after - before, most - before


# ---------------------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--script", choices=["source_layer", "cord"], required=True)
    add("--shapes", choices=MODELS, required=True, help="student+teacher; CORD needs no other teacher")
    add("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64], help="how many, a column each; over 1: --shard")
    add("--weights", choices=["float32", "bfloat16"], default="float32", help="as in the scripts")
    add("--train", choices=["decoder", "all"], help="what learns; default: the script's")
    add("--checkpoint-activations", action="store_true", help="as in the scripts")
    add("--measure", action="store_true", help="real steps of so many processes on CPUs (--gpus, one number) beside the estimate")
    add("--layers", type=int, help="of each model's, at most so many; all the widths stay")
    add("--words", type=int, help="of each vocabulary, at most so many, for --measure on a small machine")
    for name, kind, default, text in (("lora", int, 0, "rank of adapters; 0: the weights learn"), ("micro-batch", int, 1, "clips in one forward pass; CORD: with all their rollouts"),
                                      ("prompts", int, 8, "CORD: prompts of a step on one GPU, whose rollouts are sampled at once"), ("eval-batch", int, 8, "answers at once in an evaluation"),
                                      ("text-batch", int, 64, "CORD: the text view's answers at once"),
                                      ("seconds", float, 30.0, "length of a clip"), ("response-tokens", int, None, "tokens of a response or rollout; default: source_layer 700, cord 200"), ("memory", float, 80.0, "GB of one GPU")):
        add(f"--{name}", type=kind, default=default, help=text)
    args = parser.parse_args(argv)
    args.response_tokens = args.response_tokens or {"source_layer": 700, "cord": 200}[args.script]
    if args.script == "source_layer" and "+" not in args.shapes:
        raise SystemExit(f"--script source_layer needs a textual teacher: --shapes {args.shapes}+qwen3-8b")
    with vocabulary_of(args.words):
        (measure if args.measure else print_estimate)(args)


if __name__ == "__main__":
    main()
