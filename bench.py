"""
Speed and memory, side by side with the peers, in one run: what is quoted in README is printed here.

    python bench.py losses                      # the fused losses against the formulas and Liger-Kernel: under 3 minutes on two cores
    python bench.py step --script cord --shapes qwen2-audio-7b --layers 1 --prompts 1 --seconds 5 --response-tokens 50       # two cores
    python bench.py step --script cord --shapes qwen2-audio-7b                                                             # a 141 GB GPU
    python bench.py rollouts                    # the batched rollouts of a CORD step against generate(), prompt by prompt and one by one
    python bench.py memory --script source_layer --shapes qwen2-audio-7b+qwen3-8b     # GB on 1 to 64 GPUs, by arithmetic; --measure: beside real processes
    python bench.py data                        # how long training waits for its data; clips that a worker prepares in a second
    python bench.py long                        # 2,000 steps of both scripts: does memory stay what it is?

How it measures. Times: all contenders live in one process and take turns, round by round, so that a machine whose speed drifts is unfair to none;
quoted is the median of the ratios within a round, and of the seconds. Memory: each contender in a fresh process, the peak over what its inputs
take. The floor: the matrix products that no one can do without (logits of student and teacher, gradients of hidden states and of the head), timed
in the same rounds. Before anything is timed all contenders must agree on the gradients.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import soundfile
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import common
import data
import layer_map
import losses
import mini_world
import models
import rollout
import shapes
import split_adamw
import train_cord
import train_source_layer


def the_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine():
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    name = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), "") if info.exists() else platform.processor()
    return f"{name or 'CPU'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(work):
    """Seconds that work() takes, the GPU's part included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def take_turns(works, rounds):
    """{name: callable} -> {name: [seconds per round]}. One round to warm up; every round starts with the next one."""
    names, times = list(works), {name: [] for name in works}
    for i in range(rounds + 1):
        for name in names[i % len(names):] + names[:i % len(names)]:
            taken = seconds(works[name])
            if i:
                times[name].append(taken)
    return times


def paired(times, name, other):
    """Median of the ratio name / other within each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


# ---------------------------------------------------------------------------------------------------------------------------------
# losses

CASES = {"jsd_ce": "L_top + L_SFT (paper A)", "cord": "L_tok (paper B), all tokens with KL", "group": "L_seq (paper B), no KL", "states": "L_layer and L_ac (paper A), one pair of layers"}
LEARN = ("hidden", "weight", "states")
ROLLOUT = 128                   # tokens of a rollout in the cases of paper B
WIDTH = 3584                    # features of the hidden states


def loss_inputs(args, device):
    """Random hidden states and heads; the student's learn. Logits of standard deviation 3, as a language model's."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = lambda rows, width, scale=1.0: (scale * torch.randn(rows, width, device=device)).to(dtype)
    return {"hidden": make(args.tokens, args.hidden).requires_grad_(), "weight": make(args.vocab, args.hidden, 3 * args.hidden ** -0.5).requires_grad_(),
            "teacher": make(args.tokens, args.teacher_hidden), "teacher_weight": make(args.vocab, args.teacher_hidden, 3 * args.teacher_hidden ** -0.5),
            "labels": torch.randint(args.vocab, (args.tokens,), device=device), "advantage": torch.randn(args.tokens // ROLLOUT, device=device),
            "states": make(args.tokens, WIDTH).requires_grad_(), "taught": make(args.tokens, WIDTH)}


def contenders(case, x):
    """{name: callable that returns the loss}; "ours" first, Liger's where it can be installed (Linux). Its GRPO is worth -A, ours -A log p, with the same gradient."""
    there = importlib.util.find_spec("liger_kernel") is not None
    if there:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
    gpu, tokens = x["hidden"].is_cuda, len(x["hidden"])
    heads = [x[name] for name in ("hidden", "weight", "teacher", "teacher_weight", "labels")]
    if case == "states":
        how = dict(mean=x["taught"].float().mean(0), std=x["taught"].float().std(0))
        return {"ours": lambda: losses.fused_hidden_jsd(x["states"], x["taught"], **how), "the formula": lambda: losses.hidden_jsd(x["states"], x["taught"], **how)}
    if case == "jsd_ce":
        def liger(size):
            loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=1.0, compiled=gpu, chunk_size=size)
            return lambda: loss(*heads)
        works = {"ours": lambda: losses.fused_jsd_ce(*heads)[0], "the formula": lambda: losses.jsd_ce(*heads)[0]}
        works |= {"Liger, chunks of 1,024 (its default)": liger(1024), "Liger, chunks of 128": liger(128)} if there else {}
        if gpu and there:
            from liger_kernel.transformers import LigerFusedLinearJSD
            works["Liger, Triton, JSD alone"] = lambda: LigerFusedLinearJSD()(*heads)
        return works

    carries = torch.full((tokens,), case == "cord", device=x["hidden"].device)
    advantage = x["advantage"].repeat_interleave(ROLLOUT) * (case == "group")
    how = dict(carries_kl=carries, lengths=[ROLLOUT] * (tokens // ROLLOUT) if case == "cord" else [], advantage=advantage / tokens, temperature=torch.ones_like(advantage))
    if case == "group":
        heads[2:4] = None, None
    works = {"ours": lambda: losses.fused_cord(*heads, **how)[0], "the formula": lambda: losses.cord(*heads, **how)[0]}
    if case == "cord":
        return {**works, "ours, uniform (alpha = beta = 1)": lambda: losses.fused_cord(*heads, **how, alpha=1.0, beta=1.0)[0]}
    if not there:
        return works
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, compiled=gpu, use_ref_model=False, loss_type="grpo")
    rollouts = [t.view(-1, ROLLOUT, *t.shape[1:]) for t in (heads[0], heads[4])]
    return {**works, "Liger, GRPO": lambda: grpo(rollouts[0], heads[1], rollouts[1], torch.ones_like(rollouts[1]), x["advantage"])[0]}


def step_of(loss, x):
    def step():
        for name in LEARN:
            x[name].grad = None
        loss().backward()
    return step


def floor(case, x):
    """The products alone, into memory that is there already: two of logits and two of gradients; without a teacher one less."""
    h, w, t, v = (x[name].detach() for name in ("hidden", "weight", "teacher", "teacher_weight"))
    z, dh, dw = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device), torch.empty_like(h), torch.empty_like(w)

    def products():
        if case != "group":
            torch.mm(t, v.T, out=z)
        torch.mm(h, w.T, out=z)
        torch.mm(z, w, out=dh)
        torch.mm(z.T, h, out=dw)
    return products


def peak_of(case, name, args):
    """Gigabytes that one contender needs beyond its inputs; runs in a process of its own."""
    device = the_device()
    x = loss_inputs(args, device)
    step = step_of(contenders(case, x)[name], x)
    common.forget_peak_memory(device)
    before = common.peak_memory_gb(device)
    step()
    return common.peak_memory_gb(device) - before


def bench_losses(args):
    device = the_device()
    gpu = device.type == "cuda"
    args.tokens, args.vocab = args.tokens or (8192 if gpu else 1024), args.vocab or (151_936 if gpu else 16_384)
    args.hidden, args.teacher_hidden = args.hidden or (3584 if gpu else 512), args.teacher_hidden or (4096 if gpu else 512)
    if args.tokens % ROLLOUT:
        raise SystemExit(f"--tokens {args.tokens} is no multiple of {ROLLOUT}, the length of a rollout here; change it")
    x = loss_inputs(args, device)
    processes = multiprocessing.get_context("forkserver")                   # a clean process for each, with the libraries loaded once
    processes.set_forkserver_preload(["torch", "common", "losses", "liger_kernel.chunked_loss"])
    fresh = ProcessPoolExecutor(1, mp_context=processes, max_tasks_per_child=1)
    print(f"{machine()}; {args.tokens:,} tokens, hidden {args.hidden:,}, teacher {args.teacher_hidden:,}, vocabulary {args.vocab:,}, "
          f"{'bfloat16' if gpu else 'float32'}; forward and backward, head and hidden states learn; {args.rounds} rounds")
    for case, title in CASES.items():
        works, too_large = contenders(case, x), []
        for name, loss in list(works.items()):
            try:
                step_of(loss, x)()
            except torch.cuda.OutOfMemoryError:             # the formula's matrices of tokens x vocabulary, on 80 GB
                too_large.append(name)
                del works[name]
                continue
            gradients = [x[learner].grad.float() for learner in LEARN if x[learner].grad is not None]
            ours = gradients if name == "ours" else ours
            off = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, ours))
            if off > (3e-2 if gpu else 1e-4) and not name.endswith(("uniform (alpha = beta = 1)", "JSD alone")):
                raise SystemExit(f"{title}: the gradient of {name!r} is off ours by {off:.1e}; nothing is worth timing")
        del gradients, ours
        products = {} if case == "states" else {"floor": floor(case, x)}
        times = take_turns({**{name: step_of(loss, x) for name, loss in works.items()}, **products}, args.rounds)
        print(f"\n| {title} | time, over ours | seconds | memory, over ours | GB | share of the floor |\n| --- | --- | --- | --- | --- | --- |")
        if gpu:
            torch.cuda.empty_cache()                        # the fresh processes need what the contenders had
        memory = {}
        for name in works:
            memory[name] = fresh.submit(peak_of, case, name, args).result()
            print(f"| {name} | {paired(times, name, 'ours'):.2f} | {statistics.median(times[name]):.3f} | {memory[name] / memory['ours']:.2f} | {memory[name]:.2f} | "
                  + (f"{100 * paired(times, 'floor', name):.0f} % |" if products else "|"), flush=True)
        for name in too_large:
            print(f"| {name} | out of memory | | | | |")
        if products:
            print(f"| the {3 if case == 'group' else 4} matrix products alone | {paired(times, 'floor', 'ours'):.2f} | {statistics.median(times['floor']):.3f} | | | |")


# ---------------------------------------------------------------------------------------------------------------------------------
# rollouts

def bench_rollouts(args):
    """One step's rollouts of CORD with the mini world's student. All three ways must say the same, token by token: the sampler's numbers are keyed."""
    device = the_device()
    student, processor = models.load_audio_model(mini_world.MINI / "student")
    student.to(device)
    examples = data.read_manifest(mini_world.spoken(0, small=True)[0], require=("transcript",))[:args.prompts]
    prompts = data.encode_prompts(examples, processor, processor.tokenizer, words="transcript")
    plan = [(1.0, True, False)] + [(1.5, False, True)] * args.group_size
    n, stop, banned = len(plan), rollout.stop_ids(processor.tokenizer), rollout.banned_ids(student, processor.tokenizer)

    def ours():
        return [r.ids for r in rollout.roll_out(student, processor, prompts, plan, key="0 0", max_new_tokens=args.max_new_tokens)]

    def generate(rows):
        """transformers' generate for rollouts rows = [(prompt, which of its rollouts)], each with its sound and prompt."""
        at = [prompt for prompt, _ in rows]
        inputs = {**data.pad_left([prompts.audio[i] for i in at], processor.tokenizer), **{k: v[torch.tensor(at)] for k, v in prompts.features.items()}}
        length = inputs["input_ids"].shape[1]
        choose = rollout.chooser([f"0 0 {examples[i].id} {k}" for i, k in rows], length, banned, max_new_tokens=args.max_new_tokens, temperature=[plan[k][0] for _, k in rows])
        with rollout.plain_decoding(student):
            said = student.generate(**{k: v.to(device) for k, v in inputs.items()}, max_new_tokens=args.max_new_tokens, do_sample=False, use_cache=True,
                                    eos_token_id=stop, pad_token_id=stop[0], logits_processor=[choose])[:, length:].tolist()
        return [row[:next((k for k, token in enumerate(row) if token in stop), len(row)) + 1] for row in said]

    def by_prompt():
        return [ids for i in range(len(examples)) for ids in generate([(i, k) for k in range(n)])]

    def one_by_one():
        return [ids for i in range(len(examples)) for k in range(n) for ids in generate([(i, k)])]

    works = {"ours: all in one call, sound and prompt once": ours, "generate(), prompt by prompt": by_prompt, "generate(), one by one": one_by_one}
    said = {name: work() for name, work in works.items()}
    lengths = [len(ids) for ids in said["ours: all in one call, sound and prompt once"]]
    times = take_turns(works, args.rounds)
    print(f"{machine()}; the mini world's student, {len(examples)} prompts of {sum(map(len, prompts.audio)) / len(examples):.0f} tokens, {n} rollouts each of "
          f"{sum(lengths) / len(lengths):.0f} tokens (longest {max(lengths)}); {args.rounds} rounds\n\n| rollouts | tokens/s, ours over this | tokens/s | same tokens |\n"
          "| --- | --- | --- | --- |")
    for name in works:
        same = sum(a == b for a, b in zip(said[name], next(iter(said.values()))))
        print(f"| {name} | {paired(times, name, next(iter(works))):.2f} | {sum(lengths) / statistics.median(times[name]):,.0f} | {same} of {len(lengths)} |")

    # The update: neighbours with one prompt share its sequence (data.audio_view), so an order in which neighbours differ shares nothing.
    rows, ids = [i for i in range(len(examples)) for _ in range(n)], next(iter(said.values()))
    orders = {"ours: a prompt's rollouts in one sequence": range(len(rows)), "one sequence a rollout": [i * n + k for k in range(n) for i in range(len(examples))]}
    views = {name: data.audio_view(prompts, [rows[i] for i in order], [ids[i] for i in order], processor).to(device) for name, order in orders.items()}

    def hidden(view):
        return student.model(**view.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[view.predict_positions]

    sums = [hidden(view).sum(0) for view in views.values()]
    times = take_turns({name: (lambda view=view: (hidden(view).sum().backward(), student.zero_grad())) for name, view in views.items()}, args.rounds)
    print("\n| update, forward and backward | seconds, over ours | seconds | tokens run |\n| --- | --- | --- | --- |")
    for name, view in views.items():
        print(f"| {name} | {paired(times, name, next(iter(views))):.2f} | {statistics.median(times[name]):.2f} | {view.inputs['input_ids'].numel():,} |")
    print(f"hidden states differ by {((sums[0] - sums[1]).norm() / sums[1].norm()).item():.0e}")


# ---------------------------------------------------------------------------------------------------------------------------------
# whole steps at the shapes of real models, with random weights: nothing is downloaded

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
    return [p for name, p in student.named_parameters() if not name.startswith("visual.")]


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


def build(args, device, flags, layers, sharded=False):
    """A script's models, step module and optimizer as its main() makes them, of random weights. -> a namespace of them; frozen: {part: its parameters}"""
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


def bench_step(args):
    """Real steps of the real step modules: one warms up, in one the FLOPs are counted, the others are timed."""
    device, spent, peak, running = the_device(), {}, {}, []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(name, work):
        def note_peak():                        # of the innermost part that runs; then it starts afresh
            if running:
                peak[running[-1]] = max(peak.get(running[-1], 0.0), common.peak_memory_gb(device))
            common.forget_peak_memory(device)

        def run(*a, **k):
            wait()
            note_peak()
            running.append(name)
            start = time.perf_counter()
            out = work(*a, **k)
            wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            note_peak()
            running.pop()
            return out
        return run

    flags = {"source_layer": train_source_layer, "cord": train_cord}[args.script].parse_flags(["--weights", args.weights, "--lora", str(args.lora)])
    built = build(args, device, flags, args.layers or ALL)
    student, step, frozen = built.student, built.step, built.frozen
    parts = {"source_layer": {"teacher": "read", "snapshot": "remember", "losses on the response": "jsd_ce", "losses on hidden states": "hidden_divergence"},
             "cord": {"teacher": "read", "losses on the response": "cord"}}[args.script]
    examples = write_examples(args, Path(tempfile.mkdtemp()), args.prompts)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    learns = [p for p in step.parameters() if p.requires_grad]
    optimizer = (torch.optim.AdamW if args.lora else split_adamw.SplitAdamW)(common.parameter_groups(step, lr=1e-5, weight_decay=0.01), betas=(0.9, 0.98))
    wraps = {attribute: timed(name, getattr(step, attribute)) for name, attribute in parts.items()}

    def batches():
        with autocast():
            return batches_of(args, built, flags, examples, device, timed("rollout", rollout.roll_out), lambda chunks: [wraps["read"](chunk) for chunk in chunks])

    def update(work):
        for arguments in work:
            with autocast():
                loss = timed("forward", step)(*arguments)
                loss = (loss[0] if isinstance(loss, tuple) else loss)["loss"]
            timed("backward", loss.backward)()
        timed("optimizer", lambda: (torch.nn.utils.clip_grad_norm_(learns, 1.0), optimizer.step(), optimizer.zero_grad(set_to_none=True)))()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()}; the figures would be worth nothing")

    work, tokens, views = batches()
    if args.script == "source_layer":
        with autocast():
            step.calibrate([work[0][0]])
    update(work)                                # warms up; what is compiled on a GPU is compiled here
    work, tokens, views = batches()
    eager = mock.patch.multiple(losses, _compiled=lambda work: work), mock.patch.multiple(split_adamw, _compiled_update=lambda: split_adamw._update)
    adds_up = {torch.ops.aten.addmm: lambda x, a, b, *_, **__: mm_flop(a, b)}         # torch 2.11's own rule stumbles over out_dtype
    with eager[0], eager[1], FlopCounterMode(display=False, custom_mapping=adds_up) as counter:
        if args.script == "cord":               # counted: what learns, and the teacher; not the rollout
            with autocast():
                for chunk, *_ in work:
                    step.read(chunk)
        update(work)
    for attribute, wrapped in wraps.items():
        setattr(step, attribute, wrapped)
    spent.clear(), peak.clear()
    for _ in range(args.steps):
        work, tokens, views = batches()
        update(work)

    side = 4096 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).bfloat16()
    ceiling = 2 * side ** 3 / min(seconds(lambda: a @ a) for _ in range(5))
    inner = [name for name in spent if name in parts and not (name == "teacher" and args.script == "cord")]
    spent["student forward"] = spent.pop("forward") - sum(spent[name] for name in inner)
    peak["student forward"] = peak.pop("forward")
    spent = {name: value / args.steps for name, value in spent.items()}
    whole, outside = sum(spent.values()), sum(value for name, value in spent.items() if name not in ("rollout", "optimizer"))
    states = [x for state in optimizer.state.values() for x in state.values()]
    held = {"student": gigabytes(*student.parameters()), **{name: gigabytes(*them) for name, them in frozen.items()},
            "optimizer": gigabytes(*states), "gradients": gigabytes(*learns)}
    padding = 1 - sum((view.inputs["attention_mask"].any(1).any(-2) if view.inputs["attention_mask"].dim() == 4 else view.inputs["attention_mask"]).sum().item() for view in views) \
        / sum(view.inputs["input_ids"].numel() for view in views)
    print(f"{machine()}; train_{args.script}.py at the shapes of {args.shapes}{f', {args.layers} layer(s) of each' * bool(args.layers)}, bfloat16 weights, {sum(p.numel() for p in learns):,} "
          f"parameters learn; {len(examples)} clips of {args.seconds:g} s, {tokens:,} response tokens, {100 * padding:.0f} % padding; mean of {args.steps} steps\n")
    print(f"{tokens / whole:,.1f} response tokens/s, {3600 * len(examples) / whole:,.0f} clips an hour; {counter.get_total_flops() / 1e12:.3g} TFLOP outside the rollout, "
          f"{100 * counter.get_total_flops() / outside / ceiling:.0f} % of what a matrix product of {side} reaches here ({ceiling / 1e12:.1f} TFLOP/s in bfloat16)\n")
    print("| part | seconds | share | peak GB |\n| --- | --- | --- | --- |")
    for name in sorted(spent, key=spent.get, reverse=True):
        print(f"| {name} | {spent[name]:.3f} | {100 * spent[name] / whole:.0f} % | {peak[name]:.1f} |")
    show = lambda held: ", ".join(f"{name} {value:.1f}" for name, value in held.items()) + f"; together {sum(held.values()):.1f}"
    print(f"\nheld all the time, GB: {show(held)}")
    if args.layers:
        print(f"at full depth, by arithmetic: {show(at_full_depth(args, flags))}")


# ---------------------------------------------------------------------------------------------------------------------------------
# memory of one GPU of many, by arithmetic from the models' shapes; with --measure beside what processes really hold

class Attention(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: operands, mask, result, and a number a row. (On the meta device PyTorch would write the matrix of all scores down.)"""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def kept_for_backward(run, parameters):
    """Bytes that autograd keeps of what run() computes on the meta device under bfloat16 autocast, weights left out: each storage once."""
    ours, kept, plain, half = {p.untyped_storage()._cdata for p in parameters}, {}, torch.nn.functional.linear, torch.bfloat16

    def keep(x):
        kept[x.untyped_storage()._cdata] = x                    # the tensor too, so that no other gets its place
        return x

    def linear(x, weight, bias=None):                           # autocast knows no meta device
        weight = weight if weight.dtype == half else torch.empty_like(weight, dtype=half, requires_grad=weight.requires_grad)
        ours.add(weight.untyped_storage()._cdata)
        return plain(x.to(half), weight, bias if bias is None else bias.to(half))

    def attention(q, k, v, attn_mask=None, **_):
        return Attention.apply(*(x.to(half) for x in (q, k, v)), None if attn_mask is None else torch.empty_like(attn_mask, dtype=half))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), mock.patch.multiple(torch.nn.functional, linear=linear, scaled_dot_product_attention=attention):
        run()
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in ours)


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
    answers = lambda n: {f"keys and values of {n}": n * (lengths["prompt"] + args.response_tokens) * s.cached, "sampling": 28 * n * s.words / 1e9}     # logits three times, probabilities twice in float64
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


def bench_memory(args):
    """What one GPU of so many holds, moment by moment."""
    args.response_tokens = args.response_tokens or {"source_layer": 700, "cord": 200}[args.script]
    if args.script == "source_layer" and "+" not in args.shapes:
        raise SystemExit(f"--script source_layer needs a textual teacher: --shapes {args.shapes}+qwen3-8b")
    with vocabulary_of(args.words):
        (measure_memory if args.measure else estimate_memory)(args)


def estimate_memory(args):
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


def measure_memory(args):
    """Two real steps of as many processes as --gpus says, under --shard: what the second one holds, by the estimate and by the tensors that are there; and, apart from both, what the
    process has come to hold."""
    if len(args.gpus) > 1 or args.gpus[0] < 2:
        raise SystemExit("--measure takes one number of GPUs, at least 2: --gpus 2")
    if "RANK" not in os.environ:
        raise SystemExit(subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.gpus[0]), *sys.argv]).returncode)
    rank, world, device = common.start_distributed()
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
    lines = common.gather_lists(lines)
    if rank == 0:
        print(f"{machine()}; train_{args.script}.py on {world} ranks with --shard, at the shapes of {args.shapes}{f', {args.layers} layer(s) of each' * bool(args.layers)}"
              f"{f', {args.words:,} words' * bool(args.words)}, {args.weights} weights{f', LoRA of rank {args.lora}' * (args.lora > 0)}\n\n| rank | part | estimate, GB | measured, GB | ratio |\n"
              "| --- | --- | --- | --- | --- |", *lines, sep="\n")
    common.stop_distributed()


def steps_of_ranks(args, flags, device, examples):
    """-> {part: GB of this rank's share of its tensors, gradients there}, GB that the process has come to hold then, the most that it held in the second step."""
    def now():
        gc.collect()
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device) / 1e9
        if sys.platform == "linux":                             # what is free shall not count
            ctypes.CDLL(None).malloc_trim(0)
        return common.host_memory_gb()

    before = now()
    built = build(args, device, flags, args.layers or ALL)
    student, step, source, half, frozen = built.student, built.step, args.script == "source_layer", torch.bfloat16, {}
    built.frozen.clear()                                        # it holds the whole of them
    if source:
        common.shard_reader(models.decoder(built.teacher), built.teacher.get_output_embeddings())
        frozen = {"teacher": [built.teacher], **({} if args.lora else {"snapshot": [common.shard(built.snapshot, models.blocks(built.snapshot))]})}
    elif not args.lora:
        common.shard_reader(*step.teacher)
        frozen = {"teacher (a copy of the decoder)": step.teacher}
    reader = step.teacher[0] if not source and not args.lora else step
    wrapped = common.wrap(step, student, flags, world=torch.distributed.get_world_size(), compute=half)
    learns = [p for p in step.parameters() if p.requires_grad]
    optimizer = (torch.optim.AdamW if wide(args) or args.lora else split_adamw.SplitAdamW)(common.parameter_groups(step, lr=1e-5, weight_decay=0.01), betas=(0.9, 0.98))
    autocast = functools.partial(torch.autocast, device.type, half)

    for _ in range(2):
        common.forget_peak_memory(device)
        with autocast():
            work, *_ = batches_of(args, built, flags, examples, device, lambda *a, **k: common.whole(wrapped, lambda: rollout.roll_out(*a, **k)),
                                  lambda chunks: common.whole(reader, lambda: [step.read(chunk) for chunk in chunks]))
        for arguments in work:
            with autocast():
                loss = wrapped(*arguments)
                loss = (loss[0] if isinstance(loss, tuple) else loss)["loss"]
            loss.backward()
        del work, arguments, loss
        common.clip(learns, 1.0)
        optimizer.step()
        most, after = common.peak_memory_gb(device), now()
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
# the data's share of a step, and whether memory stays what it is

PACE = 0.5      # seconds in which a GPU trains on a clip, about (README's arithmetic for an H100); here the main process sleeps that long
RUNS = {"source_layer": ["--batch-size", "16", "--micro-batch", "8"], "cord": ["--batch-size", "4"]}                                # on the mini world
LONG = {"source_layer": ["--batch-size", "2", "--micro-batch", "2"], "cord": ["--batch-size", "1", "--group-size", "2", "--max-new-tokens", "8"]}      # many steps, soon


def run_script(script, *flags):
    """A training script as a user starts it, on the mini world, in a folder that is not kept -> its log.jsonl, a list of dicts; and [(step, MB that its data workers hold)],
    looked at twice a second."""
    held, here = [], Path(__file__).parent
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as said:
        log = Path(out, "run", "log.jsonl")
        process = subprocess.Popen([sys.executable, here / f"train_{script}.py", "--no-eval", "--out", log.parent, *flags], cwd=here, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                steps = log.read_text().count("\n") if log.exists() else 0
                if steps and (workers := sum(map(resident_mb, children(process.pid)))):
                    held.append((steps, workers))
        finally:
            process.kill()
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"train_{script}.py {' '.join(flags)} failed:\n{said.read()[-2000:]}")
        return [json.loads(line) for line in log.read_text().splitlines()], held


def children(pid):
    """The processes that one has started, where the system tells (Linux)."""
    known = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in known.read_text().split()] if known.exists() else []


def resident_mb(pid):
    with contextlib.suppress(OSError, IndexError):              # it has just ended
        return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3
    return 0.0


def bench_data(args):
    """How long training waits for its data; and how many long clips a worker prepares."""
    first = min(5, args.steps // 2)                             # the workers start when the loop does
    print(f"{machine()}; both scripts on the mini world, {args.steps} steps, of which the first {first} are left out\n\n"
          "| script | --workers | seconds a step | waited for data, share of the time | longest wait, seconds |\n| --- | --- | --- | --- | --- |")
    for script in RUNS:
        for workers in args.workers:
            log = run_script(script, *RUNS[script], "--max-steps", str(args.steps), "--workers", str(workers))[0][first:]
            waits, whole = [line["seconds_waiting"] for line in log], sum(line["seconds"] for line in log)
            print(f"| {script} | {workers} | {whole / len(log):.3f} | {100 * sum(waits) / whole:.2f} % | {max(waits):.3f} |", flush=True)

    processor = random_models(args, torch.device("meta"), 1)[1]
    print(f"\nclips of {args.seconds:g} s at 44.1 kHz for the processor of {args.shapes} ({data.extractor(processor).feature_size} mel bins), responses of "
          f"{args.response_tokens} tokens; mean of {args.clips}\n\n| clips | decode, ms | to 16 kHz, ms | features, ms | the rest, ms | clips/s, one worker's work | "
          + " | ".join([*(f"clips/s, --workers {n}" for n in args.workers), *(f"waited at {PACE:g} s a clip, --workers {n}" for n in args.workers)])
          + " |\n" + "| --- " * (6 + 2 * len(args.workers)) + "|")
    for kind in ("wav", "flac", "mp3"):
        with tempfile.TemporaryDirectory() as folder:
            examples = write_examples(args, Path(folder), args.clips, kind, 44_100)
            collate = lambda some: data.collate(some, processor, processor.tokenizer)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)                            # as in a worker
            collate(examples[:1])
            each = lambda work, over: sum(seconds(lambda: work(x)) for x in over) / len(examples)
            waves = [data.load_audio(example.audio, cut=data.longest(processor)).numpy() for example in examples]
            spent = [each(lambda e: soundfile.read(e.audio, dtype="float32"), examples), each(lambda e: data.load_audio(e.audio), examples),
                     each(lambda w: data.extractor(processor)(w, sampling_rate=data.SAMPLE_RATE, return_tensors="pt"), waves), each(lambda e: collate([e]), examples)]
            torch.set_num_threads(threads)

            def feed(workers, stop):                            # as training asks for them
                fed = common.feed(collate, examples, argparse.Namespace(batch_size=1, seed=0, workers=workers), done=0, stop=stop, rank=0, world=1, device=the_device())
                next(fed)                                       # the workers have started
                return fed

            rates = [(len(examples) - 1) / seconds(lambda: list(fed)) for fed in (feed(workers, len(examples)) for workers in args.workers)]
            waits = [statistics.mean([time.sleep(PACE) or waited for *_, waited in feed(workers, 12)][1:]) for workers in args.workers]
        decode, load, features, whole = (1000 * x for x in spent)
        print(f"| {kind} | {decode:.0f} | {load - decode:.0f} | {features:.0f} | {max(0.0, whole - load - features):.0f} | {1000 / whole:.1f} | "
              + " | ".join([*(f"{rate:.1f}" for rate in rates), *(f"{100 * wait / (wait + PACE):.2f} %" for wait in waits)]) + " |", flush=True)


def bench_long(args):
    """What a run's processes hold of the main memory, from its beginning to its end."""
    marks = [max(1, args.steps // 20), args.steps // 2, args.steps]
    print(f"{machine()}; both scripts on the mini world, a checkpoint every 100 steps; resident MB\n\n| script, process | " + " | ".join(f"step {mark:,}" for mark in marks)
          + " | more in 1,000 steps, second half |\n| --- | --- | --- | --- | --- |")
    for script in args.script:
        log, workers = run_script(script, *LONG[script], "--max-steps", str(args.steps), "--workers", "1")
        of = {"training": [(line["step"], 1000 * line["host_gb"]) for line in log], "its data worker": workers}
        for name, held in of.items():
            at = [min(held, key=lambda x: abs(x[0] - mark))[1] for mark in marks]
            print(f"| {script}, {name} | " + " | ".join(f"{mb:,.0f}" for mb in at) + f" | {slope([x for x in held if x[0] >= marks[1]]):+.1f} |", flush=True)


def slope(points):
    """[(step, MB)] -> MB in 1,000 steps, by the line of least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points))
    x, y = x - x.mean(), y - y.mean()
    return 1000 * ((x * y).sum() / x.square().sum().clamp(min=1e-9)).item()


# ---------------------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = functools.partial(commands.add_parser, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    losses_part = part("losses", help="the fused losses against the formulas and Liger-Kernel")
    for name, text in (("tokens", "response tokens (CPU: 1,024; GPU: 8,192)"), ("hidden", "student's width (512; 3,584)"),
                       ("teacher-hidden", "teacher's width (512; 4,096)"), ("vocab", "words of both (16,384; 151,936)")):
        losses_part.add_argument(f"--{name}", type=int, help=text)
    losses_part.add_argument("--rounds", type=int, default=5, help="rounds in which every contender runs once")
    rollouts_part = part("rollouts", help="one CORD step's rollouts against plain generate()")
    for name, default, text in (("prompts", 16, "prompts of the step"), ("group-size", 4, "rollouts of a prompt beside the one with the KL"),
                                ("max-new-tokens", 200, "longest rollout"), ("rounds", 3, "rounds in which every way runs once")):
        rollouts_part.add_argument(f"--{name}", type=int, default=default, help=text)
    step_part = part("step", help="whole steps of a training script at a real model's shapes, with random weights")
    step_part.set_defaults(weights="bfloat16")
    step_part.add_argument("--script", choices=["source_layer", "cord"], required=True)
    step_part.add_argument("--shapes", choices=MODELS, required=True,
                           help="student+teacher; CORD needs no other teacher")
    step_part.add_argument("--layers", type=int, help="of each model's, at most so many; all the widths stay")
    step_part.add_argument("--train", choices=["decoder", "all"], help="what learns; default: the script's")
    step_part.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters learn, and nothing is there twice; 0: the weights")
    for name, kind, default, text in (("prompts", int, 2, "clips of a step, in one micro-batch"), ("seconds", float, 10.0, "length of a clip"),
                                      ("response-tokens", int, 200, "tokens of a response or rollout"), ("steps", int, 3, "steps that are timed")):
        step_part.add_argument(f"--{name}", type=kind, default=default, help=text)
    memory_part = part("memory", help="GB on one GPU of many, part by part and moment by moment, by arithmetic; or measured")
    memory_part.add_argument("--script", choices=["source_layer", "cord"], required=True)
    memory_part.add_argument("--shapes", choices=MODELS, required=True, help="student+teacher; CORD needs no other teacher")
    memory_part.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 64], help="how many, a column each; over 1: --shard")
    memory_part.add_argument("--weights", choices=["float32", "bfloat16"], default="float32", help="as in the scripts")
    memory_part.add_argument("--train", choices=["decoder", "all"], help="what learns; default: the script's")
    memory_part.add_argument("--checkpoint-activations", action="store_true", help="as in the scripts")
    memory_part.add_argument("--measure", action="store_true", help="real steps of so many processes on CPUs (--gpus, one number) beside the estimate")
    memory_part.add_argument("--layers", type=int, help="of each model's, at most so many; all the widths stay")
    memory_part.add_argument("--words", type=int, help="of each vocabulary, at most so many, for --measure on a small machine")
    for name, kind, default, text in (("lora", int, 0, "rank of adapters; 0: the weights learn"), ("micro-batch", int, 1, "clips in one forward pass; CORD: with all their rollouts"),
                                      ("prompts", int, 8, "CORD: prompts of a step on one GPU, whose rollouts are sampled at once"), ("eval-batch", int, 8, "answers at once in an evaluation"),
                                      ("seconds", float, 30.0, "length of a clip"), ("response-tokens", int, None, "tokens of a response or rollout; default: source_layer 700, cord 200"), ("memory", float, 80.0, "GB of one GPU")):
        memory_part.add_argument(f"--{name}", type=kind, default=default, help=text)
    data_part = part("data", help="how long training waits for its data, and how many clips a worker prepares")
    data_part.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="data workers")
    long_part = part("long", help="2,000 steps of both scripts on the mini world: does memory stay what it is?")
    long_part.add_argument("--script", nargs="+", choices=list(LONG), default=list(LONG))
    for where, name, kind, default, text in ((data_part, "steps", int, 30, "steps of a run"), (data_part, "clips", int, 32, "long clips"),
                                             (data_part, "seconds", float, 30.0, "their length"), (data_part, "response-tokens", int, 700, "tokens of their responses"),
                                             (long_part, "steps", int, 2000, "steps of a run")):
        where.add_argument(f"--{name}", type=kind, default=default, help=text)
    data_part.set_defaults(shapes="qwen2-audio-7b", weights="bfloat16", lora=0)
    args = parser.parse_args(argv)
    {"losses": bench_losses, "rollouts": bench_rollouts, "step": bench_step, "memory": bench_memory, "data": bench_data, "long": bench_long}[args.command](args)


if __name__ == "__main__":
    main()
