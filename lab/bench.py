"""
Speed and memory, side by side with the peers, in one run: what docs/speed.md quotes.

    python -m lab.bench losses        # beside the formulas, Liger-Kernel and TRL: 3 minutes
    python -m lab.bench step --script cord --shapes qwen2-audio-7b --layers 1 \\
        --prompts 1 --seconds 5 --response-tokens 50                        # two cores
    python -m lab.bench step --script cord --shapes qwen2-audio-7b       # a 141 GB GPU
    python -m lab.bench rollouts      # CORD's batched rollouts against generate()
    python -m lab.bench data          # how long training waits for its data; clips a second
    python -m lab.bench long          # 2,000 steps of both scripts: does memory stay what it is?

How it measures. Times: all contenders live in one process and take turns, round by round, so that
a machine whose speed drifts is unfair to none; quoted is the median of the ratios within a round,
and of the seconds. Memory: each contender in a fresh process, the peak over what its inputs take.
The floor: the matrix products that no one can do without (logits of student and teacher, gradients
of hidden states and of the head), timed in the same rounds. Before anything is timed all
contenders must agree on the gradients.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import data
import fused
import layer_map
import losses
import mini.world
import models
import rollout
import sampler
import train_cord
import train_source_layer
from lab import memory, shapes
from lab.printed import Printed
from plumbing import optimizer as split_adamw
from plumbing import run


def the_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine():
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    return f"{[*names, 'CPU'][0]}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def wait():
    """For the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work):
    """Seconds that work() takes, the GPU's part included."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def take_turns(works, rounds):
    """{name: callable} -> {name: [seconds per round]}. One round to warm up; every round starts
    with the next one."""
    names, times = list(works), {name: [] for name in works}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = seconds(works[name])
            if i:
                times[name].append(taken)
    return times


def paired(times, name, other):
    """Median of the ratio name / other within each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def ceiling(device, side):
    """What a product of two bfloat16 matrices [side, side] reaches here, FLOP/s."""
    a = torch.randn(side, side, device=device).bfloat16()
    return 2 * side**3 / min(seconds(lambda: a @ a) for _ in range(5))


def bench_device(args, out):
    """Versions, memory, and the two ceilings: a large product and a copy."""
    device = the_device()
    out.say(machine())
    out.table("package", "version")
    for name in ("torch", "transformers", "triton", "liger-kernel", "trl", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out.row(name, importlib.metadata.version(name))
    out.table("ceiling", "measured")
    if device.type == "cuda":
        out.row("memory, GB", f"{torch.cuda.mem_get_info()[1] / 1e9:.0f}")
    flops = ceiling(device, args.side)
    out.row(f"bfloat16 product of {args.side}, TFLOP/s", f"{flops / 1e12:.1f}")
    numbers = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    copy = torch.empty_like(numbers)
    fastest = min(seconds(lambda: copy.copy_(numbers)) for _ in range(5))
    out.row("copy, read and written, GB/s", f"{2 * numbers.nbytes / fastest / 1e9:,.0f}")


# ------------------------------------------------------------------------------------------------
# losses

CASES = {
    "jsd_ce": "L_top + L_SFT (paper A)",
    "cord": "L_tok (paper B), all tokens with KL",
    "group": "L_seq (paper B), no KL",
    "states": "L_layer and L_ac (paper A), one pair of layers",
}
LEARN = ("hidden", "weight", "states")
ROLLOUT = 128  # tokens of a rollout in the cases of paper B
WIDTH = 3584  # features of the hidden states


def loss_inputs(args, device, tokens):
    """Random hidden states and heads; the student's learn. Logits of standard deviation 3, as a
    language model's."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make(rows, width, scale=1.0):
        return (scale * torch.randn(rows, width, device=device)).to(dtype)

    return {
        "hidden": make(tokens, args.hidden).requires_grad_(),
        "weight": make(args.vocab, args.hidden, 3 * args.hidden**-0.5).requires_grad_(),
        "teacher": make(tokens, args.teacher_hidden),
        "teacher_weight": make(args.vocab, args.teacher_hidden, 3 * args.teacher_hidden**-0.5),
        "labels": torch.randint(args.vocab, (tokens,), device=device),
        "advantage": torch.randn(tokens // ROLLOUT, device=device),
        "states": make(tokens, WIDTH).requires_grad_(),
        "taught": make(tokens, WIDTH),
    }


def peer(module, name):
    """What another library calls so; None where it is not installed, or too old."""
    with contextlib.suppress(ImportError):
        return getattr(importlib.import_module(module), name)


def contenders(case, x):
    """{name: callable that returns the loss}; "ours" first, Liger's and TRL's where they are
    installed. Liger's GRPO is worth -A, ours -A log p, with the same gradient. TRL's (the chunked
    JSD of its DistillationTrainer, since 1.16) is the divergence alone. "X, PART" has the gradient
    of "ours, PART"."""
    if case == "states":
        how = dict(mean=x["taught"].float().mean(0), std=x["taught"].float().std(0))
        return {
            "ours": lambda: fused.hidden_jsd(x["states"], x["taught"], **how),
            "the formula": lambda: losses.hidden_jsd(x["states"], x["taught"], **how),
        }
    gpu, tokens = x["hidden"].is_cuda, len(x["hidden"])
    names = ("hidden", "weight", "teacher", "teacher_weight", "labels")
    hidden, weight, teacher, teacher_weight, labels = heads = [x[name] for name in names]
    chunked = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def trl(beta, count):
        out = chunked.apply(hidden, weight, None, teacher, teacher_weight, None, beta)
        return out[0].sum() / count

    if case == "jsd_ce":
        works = {
            "ours": lambda: fused.jsd_ce(*heads)[0],
            "the formula": lambda: losses.jsd_ce(*heads)[0],
        }
        liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
        for size, name in ((1024, "1,024 (its default)"), (128, "128")) if liger else ():
            how = dict(weight_hard_loss=0.5, weight_soft_loss=1.0, compiled=gpu)
            loss = liger(**how, chunk_size=size)
            works[f"Liger in chunks of {name}"] = functools.partial(loss, *heads)
        works["ours, JSD alone"] = lambda: fused.jsd_ce(*heads, ce_weight=0.0)[0]
        if chunked:
            works["TRL, JSD alone"] = lambda: trl(0.5, tokens)
        return works

    # Paper B: rollouts of equal length, all with the KL or all with an advantage
    advantage = x["advantage"].repeat_interleave(ROLLOUT) * (case == "group")
    how = dict(
        carries_kl=torch.full_like(labels, case == "cord", dtype=torch.bool),
        lengths=[ROLLOUT] * (tokens // ROLLOUT) if case == "cord" else [],
        advantage=advantage / tokens,
        temperature=torch.ones_like(advantage),
    )
    if case == "group":
        heads[2:4] = None, None
    works = {
        "ours": lambda: fused.cord(*heads, **how)[0],
        "the formula": lambda: losses.cord(*heads, **how)[0],
    }
    if case == "cord":
        works["ours, alpha = beta = 1"] = lambda: fused.cord(*heads, **how, alpha=1.0, beta=1.0)[0]
        if chunked:
            works["TRL, alpha = beta = 1"] = lambda: trl(1.0, tokens // ROLLOUT)
        return works
    liger = peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if liger:
        grpo = liger(beta=0.0, compiled=gpu, use_ref_model=False, loss_type="grpo")
        said = labels.view(-1, ROLLOUT)
        rows = (hidden.view(len(said), ROLLOUT, -1), weight, said, torch.ones_like(said))
        works["Liger's GRPO"] = lambda: grpo(*rows, x["advantage"])[0]
    return works


def step_of(loss, x):
    def step():
        for name in LEARN:
            x[name].grad = None
        value = loss()
        value.backward()
        return value.item()

    return step


def gradients_of(x):
    return [x[name].grad for name in LEARN if x[name].grad is not None]


def furthest(gradients, others):
    """The largest relative distance of two lists of gradients."""
    return max(((a.to(b.dtype) - b).norm() / b.norm()).item() for a, b in zip(gradients, others))


def floor(case, x):
    """The products alone, into memory that is there already: two of logits and two of gradients;
    without a teacher one less."""
    h, w, t, v = (x[name].detach() for name in ("hidden", "weight", "teacher", "teacher_weight"))
    z = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device)
    dh = torch.empty_like(h)
    dw = torch.empty_like(w)

    def products():
        if case != "group":
            torch.mm(t, v.T, out=z)
        torch.mm(h, w.T, out=z)
        torch.mm(z, w, out=dh)
        torch.mm(z.T, h, out=dw)

    return products


def peak_of(case, name, args):
    """Gigabytes that one contender needs beyond its inputs. On a CPU it wants a process of its own;
    a GPU's allocator tells."""
    device = the_device()
    torch.cuda.empty_cache()
    x = loss_inputs(args, device, args.tokens)
    step = step_of(contenders(case, x)[name], x)
    run.forget_peak_memory(device)
    before = run.peak_memory_gb(device)
    step()
    return run.peak_memory_gb(device) - before


def exactness(case, args, device):
    """{contender: (error of the loss, largest error of a gradient)}, relative, on two rollouts:
    against the formula in float64, from the same numbers."""
    x = loss_inputs(args, device, 2 * ROLLOUT)
    exact = {}
    for name, tensor in x.items():
        exact[name] = tensor.detach()
        if tensor.is_floating_point():
            exact[name] = exact[name].double().requires_grad_(tensor.requires_grad)
    truth = step_of(contenders(case, exact)["the formula"], exact)()
    errors = {}
    for name, work in contenders(case, x).items():
        if part_of(name) == "":
            loss = step_of(work, x)()
            off = furthest(gradients_of(x), gradients_of(exact))
            errors[name] = abs(loss - truth) / abs(truth), off      # GRPO's loss is another one
    return errors


def part_of(name):
    """"TRL, JSD alone" -> "JSD alone": what this contender has of the loss; "": all of it."""
    return name.partition(", ")[2]


def agreeing(case, x, works):
    """Every contender once -> {name: seconds of its first call, with what it compiles} of those
    that fit into memory. Raises SystemExit where a gradient is another."""
    first = {}
    ours = {}
    for name, loss in works.items():
        try:
            first[name] = seconds(step_of(loss, x))
        # The formula's matrices of tokens x vocabulary, on 80 GB
        except torch.cuda.OutOfMemoryError:
            if name == "ours":
                raise
            continue
        gradients = [gradient.float() for gradient in gradients_of(x)]
        if name.startswith("ours"):
            ours[part_of(name)] = gradients
        off = furthest(gradients, ours[part_of(name)])
        if off > (3e-2 if x["hidden"].is_cuda else 1e-4):
            raise SystemExit(f"{CASES[case]}: the gradient of {name!r} is off ours by {off:.1e}; "
                             "nothing is worth timing")
    return first


def bench_losses(args, out):
    device = the_device()
    gpu = device.type == "cuda"
    if args.tokens % ROLLOUT:
        raise SystemExit(f"--tokens {args.tokens} is no multiple of {ROLLOUT}, the length of a "
                         "rollout here; change it")
    peak = peak_of
    if not gpu:
        # a clean process for each, with the libraries loaded once
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(
            ["torch", "plumbing.run", "losses", "liger_kernel.chunked_loss",
             "trl.kernels.chunked_divergence"])
        fresh = ProcessPoolExecutor(1, mp_context=processes, max_tasks_per_child=1)
        peak = lambda *a: fresh.submit(peak_of, *a).result()

    out.say(f"{machine()}; {args.tokens:,} tokens, hidden {args.hidden:,}, teacher "
            f"{args.teacher_hidden:,}, vocabulary {args.vocab:,}, "
            f"{'bfloat16' if gpu else 'float32'}; forward and backward, head and hidden states "
            f"learn; {args.rounds} rounds")
    for case, title in CASES.items():
        x = loss_inputs(args, device, args.tokens)
        works = contenders(case, x)
        first = agreeing(case, x, works)
        steps = {name: step_of(works[name], x) for name in first}
        if case != "states":
            steps["floor"] = floor(case, x)
        times = take_turns(steps, args.rounds)
        names = list(works)
        del works, steps, x

        out.table(title, "time, over ours", "seconds", "memory, over ours", "GB",
                  "floor over this", *["first call"] * gpu)
        ours = peak(case, "ours", args)
        for name in names:
            if name not in first:
                out.row(name, "out of memory")
                continue
            gigabytes = ours if name == "ours" else peak(case, name, args)
            share = ""
            if "floor" in times:
                share = f"{100 * paired(times, 'floor', name):.0f} %"
            out.row(name, f"{paired(times, name, 'ours'):.2f}",
                    f"{statistics.median(times[name]):.3f}",
                    f"{gigabytes / ours:.2f}" if ours else "", f"{gigabytes:.2f}", share,
                    *[f"{first[name]:.1f}"] * gpu)
        if "floor" in times:
            out.row(f"the {3 if case == 'group' else 4} matrix products alone",
                    f"{paired(times, 'floor', 'ours'):.2f}",
                    f"{statistics.median(times['floor']):.3f}")

    out.table("against the formula in float64", "loss", "gradients", "")
    for case, title in CASES.items():
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            for name, (loss, gradients) in exactness(case, args, device).items():
                loss = "" if name == "Liger's GRPO" else f"{loss:.0e}"
                out.row(name, loss, f"{gradients:.0e}", title)


# ------------------------------------------------------------------------------------------------
# rollouts


def bench_rollouts(args, out):
    """One step's rollouts of CORD with the mini world's student. All three ways must say the same,
    token by token: the sampler's numbers are keyed."""
    device = the_device()
    student, processor = models.load_audio_model(mini.world.MINI / "student")
    student.to(device)
    manifest = mini.world.spoken(0, small=True)[0]
    examples = data.read_manifest(manifest, require=("transcript",))[:args.prompts]
    prompts = data.encode_prompts(examples, processor, processor.tokenizer, words="transcript")
    kinds = [rollout.Kind(1.0, kl=True)] + [rollout.Kind(1.5, group=True)] * args.group_size
    n = len(kinds)
    rows = [(i, k) for i in range(len(examples)) for k in range(n)]     # prompt, its rollout
    stop = rollout.stop_ids(processor.tokenizer)
    banned = rollout.banned_ids(student, processor.tokenizer)

    def ours():
        rollouts = rollout.roll_out(
            student, processor, prompts, kinds, key="0 0", max_new_tokens=args.max_new_tokens
        )
        return [r.ids for r in rollouts]

    def generate(size):
        """transformers' generate(), so many rollouts at once, each with its sound and prompt."""
        said = []
        for start in range(0, len(rows), size):
            batch = rows[start:start + size]
            at = [i for i, _ in batch]
            inputs = data.pad_left([prompts.audio[i] for i in at], processor.tokenizer)
            inputs |= {name: x[at] for name, x in prompts.features.items()}
            length = inputs["input_ids"].shape[1]
            choose = sampler.chooser(
                [f"0 0 {examples[i].id} {k}" for i, k in batch],
                length,
                banned,
                max_new_tokens=args.max_new_tokens,
                temperature=[kinds[k].temperature for _, k in batch],
            )
            with rollout.plain_decoding(student):
                output = student.generate(
                    **{name: x.to(device) for name, x in inputs.items()},
                    do_sample=False,
                    use_cache=True,
                    max_new_tokens=args.max_new_tokens,
                    eos_token_id=stop,
                    pad_token_id=stop[0],
                    logits_processor=[choose],
                )
            said += output[:, length:].tolist()
        return said

    first = "ours: all in one call, sound and prompt once"
    works = {
        first: ours,
        "generate(), prompt by prompt": lambda: generate(n),
        "generate(), one by one": lambda: generate(1),
    }
    said = {name: work() for name, work in works.items()}
    answers = said[first]
    lengths = [len(ids) for ids in answers]
    times = take_turns(works, args.rounds)
    out.say(f"{machine()}; the mini world's student, {len(examples)} prompts of "
            f"{statistics.mean(map(len, prompts.audio)):.0f} tokens, {n} rollouts each of "
            f"{statistics.mean(lengths):.0f} tokens; {args.rounds} rounds")
    out.table("rollouts", "tokens/s, ours over this", "tokens/s", "same tokens")
    for name in works:
        # generate() pads behind an answer's end
        same = sum(row[:len(ids)] == ids for row, ids in zip(said[name], answers))
        out.row(name, f"{paired(times, name, first):.2f}",
                f"{sum(lengths) / statistics.median(times[name]):,.0f}",
                f"{same} of {len(lengths)}")

    # The update: neighbours with one prompt share its sequence (data.audio_view), so an order in
    # which neighbours differ shares nothing.
    first = "ours: a prompt's rollouts in one sequence"
    orders = {
        first: range(len(rows)),
        "one sequence a rollout": sorted(range(len(rows)), key=lambda j: rows[j][1]),
    }
    views = {}
    for name, order in orders.items():
        at = [rows[j][0] for j in order]
        view = data.audio_view(prompts, at, [answers[j] for j in order], processor)
        views[name] = view.to(device)

    def hidden(view):
        last = student.model(**view.inputs, use_cache=False).last_hidden_state
        return last.flatten(0, 1)[view.predict_positions]

    def update(view):
        hidden(view).sum().backward()
        student.zero_grad()

    sums = [hidden(view).sum(0) for view in views.values()]
    works = {name: functools.partial(update, view) for name, view in views.items()}
    times = take_turns(works, args.rounds)
    out.table("update, forward and backward", "seconds, over ours", "seconds", "tokens run")
    for name, view in views.items():
        out.row(name, f"{paired(times, name, first):.2f}", f"{statistics.median(times[name]):.2f}",
                f"{view.inputs['input_ids'].numel():,}")
    off = ((sums[0] - sums[1]).norm() / sums[1].norm()).item()
    out.say(f"hidden states differ by {off:.0e}")


# ------------------------------------------------------------------------------------------------
# whole steps at the shapes of real models, with random weights: nothing is downloaded

# torch 2.11 stumbles over addmm with an out_dtype, and has no rule for addmm_
FLOPS = dict.fromkeys(
    (torch.ops.aten.addmm, torch.ops.aten.addmm_), lambda x, a, b, *_, **__: mm_flop(a, b)
)


class Clock:
    """Seconds and peak memory of a step's parts. What a part within a part takes is its own."""

    def __init__(self, device):
        self.device = device
        self.running = []                       # the innermost part last
        self.seconds = defaultdict(float)
        self.peaks = defaultdict(float)         # GB

    def note_peak(self):
        if self.running:
            name = self.running[-1]
            self.peaks[name] = max(self.peaks[name], run.peak_memory_gb(self.device))
        run.forget_peak_memory(self.device)

    @contextlib.contextmanager
    def part(self, name):
        """What runs inside is this part; as a decorator, what a callable does."""
        self.note_peak()
        self.running.append(name)
        wait()
        start = time.perf_counter()
        yield
        wait()
        taken = time.perf_counter() - start
        self.note_peak()
        self.running.pop()
        self.seconds[name] += taken
        if self.running:
            self.seconds[self.running[-1]] -= taken


# A training script's step -> (step module, {part: frozen model}, work). work() prepares
# a step -> [arguments of the module's forward], tokens that learn

def source_layer_step(args, device, examples, clock):
    student, processor, teacher, tokenizer = memory.random_models(args, device, args.layers)
    snapshot = student
    frozen = {"teacher": teacher}
    if not args.lora:
        snapshot = models.frozen_copy(student, torch.bfloat16)
        snapshot.set_output_embeddings(torch.nn.Identity())
        frozen["snapshot"] = snapshot
    memory.choose_trained(args, student)

    shared = data.shared_vocabulary(processor.tokenizer, tokenizer)[:2]
    pairs = layer_map.pairs(*(len(models.decoder(m).layers) for m in (student, teacher)))
    step = train_source_layer.SourceLayerStep(
        student, teacher, snapshot, pairs, [ids.to(device) for ids in shared], args
    ).to(device)
    step.projections.float()
    table = data.token_map(*shared, student.config.text_config.vocab_size)
    batch = data.collate(examples, processor, tokenizer, student_to_teacher=table).to(device)
    step.calibrate([batch])
    counts = {"response": len(batch.labels), "audio": len(batch.audio.audio_positions)}
    inner = {
        "teacher": "read",
        "snapshot": "remember",
        "losses on the response": "jsd_ce",
        "losses on hidden states": "hidden_divergence",
    }
    for name, method in inner.items():
        setattr(step, method, clock.part(name)(getattr(step, method)))
    return step, frozen, lambda: ([(batch, counts)], counts["response"])


def cord_step(args, device, examples, clock):
    student, processor, _, _ = memory.random_models(args, device, args.layers)
    memory.choose_trained(args, student)
    banned = torch.tensor(rollout.banned_ids(student, processor.tokenizer), device=device)
    step = train_cord.CordStep(student, banned, args)
    frozen = {}
    if not args.lora:
        frozen["teacher (a copy of the decoder)"] = torch.nn.ModuleDict(step.teacher)
    prompts = data.encode_prompts(examples, processor, processor.tokenizer, words="transcript")
    kinds = train_cord.rollout_kinds(args)
    step.cord = clock.part("losses on the response")(step.cord)

    def work():
        with clock.part("rollout"):
            rollouts = rollout.roll_out(
                student, processor, prompts, kinds, key="0", max_new_tokens=args.response_tokens
            )
        # A judge would call random words all wrong; here all rollouts of the group count
        for i, r in enumerate(rollouts):
            r.advantage = 0.0 if r.kl else (0.5, -0.5)[i % 2]
        batches = train_cord.micro_batches(rollouts, prompts, processor, args.micro_batch, device)
        with clock.part("teacher"):
            hidden = [step.read(batch) for batch in batches]
        n_kl, n_group = len(examples), len(examples) * args.group_size
        arguments = [(batch, h, n_kl, n_group) for batch, h in zip(batches, hidden)]
        return arguments, sum(len(r.ids) for r in rollouts)

    return step, frozen, work


def bench_step(args, out):
    """Real steps of the real step modules: one warms up, in one the FLOPs are counted, the others
    are timed."""
    device = the_device()
    clock = Clock(device)
    args = memory.with_flags(args)
    examples = memory.write_examples(args, Path(tempfile.mkdtemp()), args.prompts)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    make = source_layer_step if args.script == "source_layer" else cord_step
    with autocast():
        step, frozen, work = make(args, device, examples, clock)
    learns = [p for p in step.parameters() if p.requires_grad]
    optimizer = (torch.optim.AdamW if args.lora else split_adamw.SplitAdamW)(
        split_adamw.parameter_groups(step, lr=1e-5, weight_decay=0.01), betas=(0.9, 0.98)
    )

    def update(batches):
        for arguments in batches:
            with autocast(), clock.part("student forward"):
                found = step(*arguments)
            loss = found[0] if args.script == "cord" else found["loss"]
            with clock.part("backward"):
                loss.backward()
        with clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def prepared():
        with autocast():
            return work()

    # Warms up; what is compiled on a GPU is compiled here
    update(prepared()[0])
    batches, _ = prepared()
    eager = {"_compiled": lambda work: work, "_rows_per_chunk": lambda *_: 128}
    eager_losses = mock.patch.multiple(fused, **eager)
    eager_update = {"_compiled_update": lambda: split_adamw._update}
    eager_optimizer = mock.patch.multiple(split_adamw, **eager_update)
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with eager_losses, eager_optimizer, counter:
        # Counted: what learns, and the teacher; not the rollout
        if args.script == "cord":
            with autocast():
                for batch, *_ in batches:
                    step.read(batch)
        update(batches)
    clock.seconds.clear()
    clock.peaks.clear()
    for _ in range(args.steps):
        batches, tokens = prepared()
        update(batches)

    top = ceiling(device, args.side)
    flops = counter.get_total_flops()
    spent = {name: value / args.steps for name, value in clock.seconds.items()}
    whole = sum(spent.values())
    outside = whole - spent["optimizer"] - spent.get("rollout", 0.0)
    states = [x for state in optimizer.state.values() for x in state.values()]
    held = {}
    for name, model in {"student": step.student, **frozen}.items():
        held[name] = memory.gigabytes(*model.parameters())
    held["optimizer"] = memory.gigabytes(*states)
    held["gradients"] = memory.gigabytes(*learns)
    out.say(f"{machine()}; train_{args.script}.py --weights bfloat16 --lora {args.lora} at the "
            f"shapes of {args.shapes}, at most {args.layers} layer(s) of each: "
            f"{sum(p.numel() for p in learns):,} parameters learn; {len(examples)} clips of "
            f"{args.seconds:g} s, {tokens:,} response tokens; mean of {args.steps} steps")
    out.say(f"{tokens / whole:,.1f} response tokens/s, {3600 * len(examples) / whole:,.0f} clips "
            f"an hour; {flops / 1e12:.3g} TFLOP outside the rollout, "
            f"{100 * flops / outside / top:.0f} % of what a matrix product of {args.side} reaches "
            f"here ({top / 1e12:.1f} TFLOP/s in bfloat16)")
    out.table("part", "seconds", "share", "peak GB")
    for name in sorted(spent, key=spent.get, reverse=True):
        out.row(name, f"{spent[name]:.3f}", f"{100 * spent[name] / whole:.0f} %",
                f"{clock.peaks[name]:.1f}")

    def listed(held):
        parts = [f"{name} {value:.1f}" for name, value in held.items()]
        return f"{', '.join(parts)}; together {sum(held.values()):.1f}"

    out.say(f"held all the time, GB: {listed(held)}")
    if args.layers < memory.ALL:
        out.say(f"at full depth, by arithmetic: {listed(memory.at_full_depth(args))}")


# ------------------------------------------------------------------------------------------------
# the data's share of a step, and whether memory stays what it is

# On the mini world
RUNS = {"source_layer": [], "cord": ["--batch-size", "4"]}
# Many steps, soon
LONG = {
    "source_layer": ["--batch-size", "2", "--micro-batch", "2"],
    "cord": ["--batch-size", "1", "--group-size", "2", "--max-new-tokens", "8"],
}


def run_script(script, *flags):
    """A training script as a user starts it, on the mini world, in a folder that is not kept ->
    its log.jsonl, a list of dicts; and [(step, MB that its data workers hold)], looked at twice a
    second."""
    held = []
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as said:
        log = Path(out, "run", "log.jsonl")
        command = [sys.executable, f"train_{script}.py", "--no-eval", "--out", log.parent, *flags]
        process = subprocess.Popen(command, cwd=here, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                steps = log.read_text().count("\n") if log.exists() else 0
                workers = children_mb(process.pid)
                if steps and workers:
                    held.append((steps, workers))
        finally:
            process.kill()
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"train_{script}.py {' '.join(flags)} failed:\n{said.read()[-2000:]}")
        return [json.loads(line) for line in log.read_text().splitlines()], held


def children_mb(pid):
    """What the processes that one has started hold, where the system tells (Linux)."""
    held = 0.0
    with contextlib.suppress(OSError, IndexError):          # one has just ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            held += int(status.split("VmRSS:")[1].split()[0]) / 1e3
    return held


def bench_data(args, out):
    """How long training waits for its data; and how many long clips a worker prepares."""
    # The workers start when the loop does
    first = min(5, args.steps // 2)
    out.say(f"{machine()}; both scripts on the mini world, {args.steps} steps, of which the first "
            f"{first} are left out")
    out.table("script", "--workers", "seconds a step", "waited for data, share of the time",
              "longest wait, seconds")
    for script, flags in RUNS.items():
        for workers in args.workers:
            steps = ["--max-steps", str(args.steps), "--workers", str(workers)]
            log, _ = run_script(script, *flags, *steps)
            waits = [line["seconds_waiting"] for line in log[first:]]
            whole = sum(line["seconds"] for line in log[first:])
            out.row(script, workers, f"{whole / len(waits):.3f}",
                    f"{100 * sum(waits) / whole:.2f} %", f"{max(waits):.3f}")

    with torch.device("meta"):
        _, processor = shapes.random_student("Qwen/Qwen2-Audio-7B-Instruct", 1, torch.bfloat16)
    extract = data.extractor(processor)
    out.say(f"clips of {args.seconds:g} s at 44.1 kHz for the processor of Qwen2-Audio "
            f"({extract.feature_size} mel bins), responses of {args.response_tokens} tokens; mean "
            f"of {args.clips}")
    out.table("clips", "decode, ms", "to 16 kHz, ms", "features, ms", "the rest, ms",
              "clips/s, one worker's work")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as in a worker

    def each(work, inputs):
        """Milliseconds, in the mean."""
        return 1000 * statistics.mean(seconds(lambda: work(x)) for x in inputs)

    for kind in ("wav", "flac", "mp3"):
        with tempfile.TemporaryDirectory() as folder:
            examples = memory.write_examples(args, Path(folder), args.clips, kind, 44_100)
            collate = lambda e: data.collate([e], processor, processor.tokenizer)
            collate(examples[0])
            waves = [
                data.load_audio(e.audio, cut=data.longest(processor)).numpy() for e in examples
            ]
            decode = each(lambda e: soundfile.read(e.audio, dtype="float32"), examples)
            load = each(lambda e: data.load_audio(e.audio), examples)
            how = dict(sampling_rate=data.SAMPLE_RATE, return_tensors="pt")
            features = each(lambda wave: extract(wave, **how), waves)
            whole = each(collate, examples)
        out.row(kind, f"{decode:.0f}", f"{load - decode:.0f}", f"{features:.0f}",
                f"{max(0.0, whole - load - features):.0f}", f"{1000 / whole:.1f}")
    torch.set_num_threads(threads)


def bench_long(args, out):
    """What a run's processes hold of the main memory, from its beginning to its end."""
    marks = [max(1, args.steps // 20), args.steps // 2, args.steps]
    out.say(f"{machine()}; both scripts on the mini world, a checkpoint every 100 steps; resident "
            "MB")
    out.table("script, process", *(f"step {mark:,}" for mark in marks),
              "more in 1,000 steps, second half")
    for script, flags in LONG.items():
        log, workers = run_script(script, *flags, "--max-steps", str(args.steps), "--workers", "1")
        training = [(line["step"], 1000 * line["host_gb"]) for line in log]
        for name, held in (("training", training), ("its data worker", workers)):
            at = [min(held, key=lambda x: abs(x[0] - mark))[1] for mark in marks]
            later = [x for x in held if x[0] >= marks[1]]
            growth = statistics.linear_regression(*zip(*later)).slope
            out.row(f"{script}, {name}", *(f"{mb:,.0f}" for mb in at), f"{1000 * growth:+.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    gpu = torch.cuda.is_available()

    def command(name, work, text):
        shown = argparse.ArgumentDefaultsHelpFormatter
        part = commands.add_parser(name, help=text, formatter_class=shown)
        part.set_defaults(work=work)
        part.add_argument("--json", metavar="FILE", help="write there what is printed, too")
        return part

    def add(name, default, text):
        part.add_argument(name, type=type(default), default=default, help=text)

    side = 8192 if gpu else 2048
    side_text = "of the product that is the ceiling (a CPU without bfloat16 takes minutes)"
    part = command("device", bench_device, "what this machine is, and its ceilings")
    add("--side", side, side_text)
    part = command("losses", bench_losses, "the fused losses, the formulas, Liger-Kernel and TRL")
    add("--tokens", 8192 if gpu else 1024, "response tokens")
    add("--hidden", 3584 if gpu else 512, "student's width")
    add("--teacher-hidden", 4096 if gpu else 512, "teacher's width")
    add("--vocab", 151_936 if gpu else 16_384, "words of both")
    add("--rounds", 5, "rounds in which every contender runs once")
    part = command("rollouts", bench_rollouts, "a CORD step's rollouts against plain generate()")
    add("--prompts", 16, "prompts of the step")
    add("--group-size", 4, "rollouts of a prompt beside the one with the KL")
    add("--max-new-tokens", 200, "longest rollout")
    add("--rounds", 3, "rounds in which every way runs once")
    part = command("step", bench_step, "whole steps at a real model's shapes, random weights")
    memory.add_shapes(part)
    part.set_defaults(weights="bfloat16")
    add("--lora", 0, "rank of adapters, and nothing is there twice; 0: the weights learn")
    add("--prompts", 2, "clips of a step, in one micro-batch")
    add("--seconds", 10.0, "length of a clip")
    add("--response-tokens", 200, "tokens of a response or rollout")
    add("--steps", 3, "steps that are timed")
    add("--side", side, side_text)
    part = command("data", bench_data, "how long training waits for its data; clips a second")
    part.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="data workers")
    add("--steps", 30, "steps of a run")
    add("--clips", 32, "long clips")
    add("--seconds", 30.0, "their length")
    add("--response-tokens", 700, "tokens of their responses")
    part = command("long", bench_long, "both scripts, long: does memory stay what it is?")
    add("--steps", 2000, "steps of a run")
    args = parser.parse_args(argv)
    args.work(args, Printed(args.json))


if __name__ == "__main__":
    main()
