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
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import data
import fused
import losses
import mini.world
import models
import rollout
import sampler
import train_cord
import train_source_layer
from lab import memory
from lab.printed import Printed
from plumbing import optimizer as split_adamw
from plumbing import run
from plumbing.optimizer import parameter_groups


def the_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine():
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    name = (
        next(
            (
                line.split(":")[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            "",
        )
        if info.exists()
        else platform.processor()
    )
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


def ceiling(device):
    """What a product of two bfloat16 matrices reaches here -> (FLOP/s, its side)."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).bfloat16()
    return 2 * side**3 / min(seconds(lambda: a @ a) for _ in range(5)), side


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
    flops, side = ceiling(device)
    out.row(f"bfloat16 product of {side}, TFLOP/s", f"{flops / 1e12:.1f}")
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


def loss_inputs(args, device):
    """Random hidden states and heads; the student's learn. Logits of standard deviation 3, as a
    language model's."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = lambda rows, width, scale=1.0: (scale * torch.randn(rows, width, device=device)).to(
        dtype
    )
    return {
        "hidden": make(args.tokens, args.hidden).requires_grad_(),
        "weight": make(args.vocab, args.hidden, 3 * args.hidden**-0.5).requires_grad_(),
        "teacher": make(args.tokens, args.teacher_hidden),
        "teacher_weight": make(args.vocab, args.teacher_hidden, 3 * args.teacher_hidden**-0.5),
        "labels": torch.randint(args.vocab, (args.tokens,), device=device),
        "advantage": torch.randn(args.tokens // ROLLOUT, device=device),
        "states": make(args.tokens, WIDTH).requires_grad_(),
        "taught": make(args.tokens, WIDTH),
    }


def contenders(case, x):
    """{name: callable that returns the loss}; "ours" first, Liger's where it can be installed
    (Linux). Its GRPO is worth -A, ours -A log p, with the same gradient. TRL's (the chunked JSD of
    its DistillationTrainer) is the divergence alone. "X, PART" has the gradient of "ours, PART"."""
    there = importlib.util.find_spec("liger_kernel") is not None
    if there:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
    gpu, tokens = x["hidden"].is_cuda, len(x["hidden"])

    def trl(beta, count):
        student, weight, teacher, teacher_weight, _ = heads
        return chunked_divergence(
            student, weight, None, teacher, teacher_weight, None, beta)[0].sum() / count

    chunked_divergence = None
    with contextlib.suppress(ImportError):                  # since TRL 1.16
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        chunked_divergence = ChunkedDivergenceFunction.apply
    heads = [x[name] for name in ("hidden", "weight", "teacher", "teacher_weight", "labels")]
    if case == "states":
        how = dict(mean=x["taught"].float().mean(0), std=x["taught"].float().std(0))
        return {
            "ours": lambda: fused.hidden_jsd(x["states"], x["taught"], **how),
            "the formula": lambda: losses.hidden_jsd(x["states"], x["taught"], **how),
        }
    if case == "jsd_ce":

        def liger(size):
            loss = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.5, weight_soft_loss=1.0, compiled=gpu, chunk_size=size
            )
            return lambda: loss(*heads)

        works = {
            "ours": lambda: fused.jsd_ce(*heads)[0],
            "the formula": lambda: losses.jsd_ce(*heads)[0],
        }
        works |= (
            {
                "Liger in chunks of 1,024 (its default)": liger(1024),
                "Liger in chunks of 128": liger(128),
            }
            if there
            else {}
        )
        works["ours, JSD alone"] = lambda: fused.jsd_ce(*heads, ce_weight=0.0)[0]
        if chunked_divergence:
            works["TRL, JSD alone"] = lambda: trl(0.5, tokens)
        if gpu and there:
            from liger_kernel.transformers import LigerFusedLinearJSD

            works["Liger's Triton, JSD alone"] = lambda: LigerFusedLinearJSD()(*heads)
        return works

    carries = torch.full((tokens,), case == "cord", device=x["hidden"].device)
    advantage = x["advantage"].repeat_interleave(ROLLOUT) * (case == "group")
    how = dict(
        carries_kl=carries,
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
        if chunked_divergence:
            works["TRL, alpha = beta = 1"] = lambda: trl(1.0, tokens // ROLLOUT)
        return works
    if not there:
        return works
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, compiled=gpu, use_ref_model=False, loss_type="grpo")
    rollouts = [t.view(-1, ROLLOUT, *t.shape[1:]) for t in (heads[0], heads[4])]
    return {
        **works,
        "Liger's GRPO": lambda: grpo(
            rollouts[0], heads[1], rollouts[1], torch.ones_like(rollouts[1]), x["advantage"]
        )[0],
    }


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
    x = loss_inputs(args, device)
    step = step_of(contenders(case, x)[name], x)
    run.forget_peak_memory(device)
    before = run.peak_memory_gb(device)
    step()
    return run.peak_memory_gb(device) - before


def exactness(case, args, device):
    """{contender: (error of the loss, largest error of a gradient)}, relative, on two rollouts:
    against the formula in float64, from the same numbers."""
    x = loss_inputs(argparse.Namespace(**{**vars(args), "tokens": 2 * ROLLOUT}), device)
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


def agreeing(case, x, gpu):
    """Every contender once -> those that fit into memory, those that do not, and the seconds of
    each one's first call, with what it compiles. Raises SystemExit where a gradient is another."""
    works, too_large, first, ours = contenders(case, x), [], {}, {}
    for name, loss in list(works.items()):
        try:
            first[name] = seconds(step_of(loss, x))
        # The formula's matrices of tokens x vocabulary, on 80 GB
        except torch.cuda.OutOfMemoryError:
            if name == "ours":
                raise
            too_large.append(name)
            del works[name]
            continue
        gradients = [gradient.float() for gradient in gradients_of(x)]
        if name.startswith("ours"):
            ours[part_of(name)] = gradients
        off = furthest(gradients, ours[part_of(name)])
        if off > (3e-2 if gpu else 1e-4):
            raise SystemExit(f"{CASES[case]}: the gradient of {name!r} is off ours by {off:.1e}; "
                             "nothing is worth timing")
    return works, too_large, first


def bench_losses(args, out):
    device = the_device()
    gpu = device.type == "cuda"
    sizes = {"tokens": (8192, 1024), "vocab": (151_936, 16_384), "hidden": (3584, 512),
             "teacher_hidden": (4096, 512)}
    for name, (on_a_gpu, on_a_cpu) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, on_a_gpu if gpu else on_a_cpu)
    if args.tokens % ROLLOUT:
        raise SystemExit(f"--tokens {args.tokens} is no multiple of {ROLLOUT}, the length of a "
                         "rollout here; change it")
    fresh = None
    if not gpu:
        # a clean process for each, with the libraries loaded once
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(
            ["torch", "plumbing.run", "losses", "liger_kernel.chunked_loss",
             "trl.kernels.chunked_divergence"])
        fresh = ProcessPoolExecutor(1, mp_context=processes, max_tasks_per_child=1)

    out.say(f"{machine()}; {args.tokens:,} tokens, hidden {args.hidden:,}, teacher "
            f"{args.teacher_hidden:,}, vocabulary {args.vocab:,}, "
            f"{'bfloat16' if gpu else 'float32'}; forward and backward, head and hidden states "
            f"learn; {args.rounds} rounds")
    for case, title in CASES.items():
        x = loss_inputs(args, device)
        works, too_large, first = agreeing(case, x, gpu)
        steps = {name: step_of(loss, x) for name, loss in works.items()}
        if case != "states":
            steps["floor"] = floor(case, x)
        times = take_turns(steps, args.rounds)
        del steps, x

        out.table(title, "time, over ours", "seconds", "memory, over ours", "GB",
                  "floor over this", *["first call"] * gpu)
        peaks = {}
        for name in works:
            if gpu:
                torch.cuda.empty_cache()
            peak = fresh.submit(peak_of, case, name, args).result() if fresh else peak_of(
                case, name, args)
            peaks[name] = peak
            share = ""
            if "floor" in times:
                share = f"{100 * paired(times, 'floor', name):.0f} %"
            ratio = f"{peak / peaks['ours']:.2f}" if peaks["ours"] else ""
            out.row(name, f"{paired(times, name, 'ours'):.2f}",
                    f"{statistics.median(times[name]):.3f}", ratio, f"{peak:.2f}", share,
                    *[f"{first[name]:.1f}"] * gpu)
        for name in too_large:
            out.row(name, "out of memory", "", "", "", "", *[""] * gpu)
        if "floor" in times:
            out.row(f"the {3 if case == 'group' else 4} matrix products alone",
                    f"{paired(times, 'floor', 'ours'):.2f}",
                    f"{statistics.median(times['floor']):.3f}", "", "", "", *[""] * gpu)

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
    examples = data.read_manifest(mini.world.spoken(0, small=True)[0], require=("transcript",))[
        : args.prompts
    ]
    prompts = data.encode_prompts(examples, processor, processor.tokenizer, words="transcript")
    plan = [rollout.Kind(1.0, kl=True)] + [rollout.Kind(1.5, group=True)] * args.group_size
    n, stop, banned = (
        len(plan),
        rollout.stop_ids(processor.tokenizer),
        rollout.banned_ids(student, processor.tokenizer),
    )

    def ours():
        return [
            r.ids
            for r in rollout.roll_out(
                student, processor, prompts, plan, key="0 0", max_new_tokens=args.max_new_tokens
            )
        ]

    def generate(rows):
        """transformers' generate for rollouts rows = [(prompt, which of its rollouts)], each with
        its sound and prompt."""
        at = [prompt for prompt, _ in rows]
        inputs = {
            **data.pad_left([prompts.audio[i] for i in at], processor.tokenizer),
            **{k: v[torch.tensor(at)] for k, v in prompts.features.items()},
        }
        length = inputs["input_ids"].shape[1]
        choose = sampler.chooser(
            [f"0 0 {examples[i].id} {k}" for i, k in rows],
            length,
            banned,
            max_new_tokens=args.max_new_tokens,
            temperature=[plan[k].temperature for _, k in rows],
        )
        with rollout.plain_decoding(student):
            said = student.generate(
                **{k: v.to(device) for k, v in inputs.items()},
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=stop,
                pad_token_id=stop[0],
                logits_processor=[choose],
            )[:, length:].tolist()
        return [
            row[: next((k for k, token in enumerate(row) if token in stop), len(row)) + 1]
            for row in said
        ]

    def by_prompt():
        return [ids for i in range(len(examples)) for ids in generate([(i, k) for k in range(n)])]

    def one_by_one():
        return [ids for i in range(len(examples)) for k in range(n) for ids in generate([(i, k)])]

    works = {
        "ours: all in one call, sound and prompt once": ours,
        "generate(), prompt by prompt": by_prompt,
        "generate(), one by one": one_by_one,
    }
    said = {name: work() for name, work in works.items()}
    lengths = [len(ids) for ids in said["ours: all in one call, sound and prompt once"]]
    times = take_turns(works, args.rounds)
    out.say(f"{machine()}; the mini world's student, {len(examples)} prompts of "
            f"{sum(map(len, prompts.audio)) / len(examples):.0f} tokens, {n} rollouts each of "
            f"{sum(lengths) / len(lengths):.0f} tokens (longest {max(lengths)}); {args.rounds} "
            "rounds")
    out.table("rollouts", "tokens/s, ours over this", "tokens/s", "same tokens")
    for name in works:
        same = sum(a == b for a, b in zip(said[name], next(iter(said.values()))))
        out.row(name, f"{paired(times, name, next(iter(works))):.2f}",
                f"{sum(lengths) / statistics.median(times[name]):,.0f}",
                f"{same} of {len(lengths)}")

    # The update: neighbours with one prompt share its sequence (data.audio_view), so an order in
    # which neighbours differ shares nothing.
    rows, ids = [i for i in range(len(examples)) for _ in range(n)], next(iter(said.values()))
    orders = {
        "ours: a prompt's rollouts in one sequence": range(len(rows)),
        "one sequence a rollout": [i * n + k for k in range(n) for i in range(len(examples))],
    }
    views = {
        name: (
            data.audio_view(
                prompts, [rows[i] for i in order], [ids[i] for i in order], processor
            ).to(device)
        )
        for name, order in orders.items()
    }

    def hidden(view):
        return student.model(**view.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[
            view.predict_positions
        ]

    sums = [hidden(view).sum(0) for view in views.values()]
    times = take_turns(
        {
            name: lambda view=view: (hidden(view).sum().backward(), student.zero_grad())
            for name, view in views.items()
        },
        args.rounds,
    )
    out.table("update, forward and backward", "seconds, over ours", "seconds", "tokens run")
    for name, view in views.items():
        out.row(name, f"{paired(times, name, next(iter(views))):.2f}",
                f"{statistics.median(times[name]):.2f}",
                f"{view.inputs['input_ids'].numel():,}")
    off = ((sums[0] - sums[1]).norm() / sums[1].norm()).item()
    out.say(f"hidden states differ by {off:.0e}")


# ------------------------------------------------------------------------------------------------
# whole steps at the shapes of real models, with random weights: nothing is downloaded

# torch 2.11 stumbles over addmm with an out_dtype, and has no rule for addmm_
FLOPS = dict.fromkeys(
    (torch.ops.aten.addmm, torch.ops.aten.addmm_), lambda x, a, b, *_, **__: mm_flop(a, b)
)


def bench_step(args, out):
    """Real steps of the real step modules: one warms up, in one the FLOPs are counted, the others
    are timed."""
    device, spent, peak, running = the_device(), {}, {}, []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(name, work):
        # Of the innermost part that runs; then it starts afresh
        def note_peak():
            if running:
                peak[running[-1]] = max(peak.get(running[-1], 0.0), run.peak_memory_gb(device))
            run.forget_peak_memory(device)

        def timed_work(*a, **k):
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

        return timed_work

    flags = {"source_layer": train_source_layer, "cord": train_cord}[args.script].parse_flags(
        ["--weights", args.weights, "--lora", str(args.lora)]
    )
    built = memory.build(args, device, flags, args.layers or memory.ALL)
    student, step, frozen = built.student, built.step, built.frozen
    parts = {
        "source_layer": {
            "teacher": "read",
            "snapshot": "remember",
            "losses on the response": "jsd_ce",
            "losses on hidden states": "hidden_divergence",
        },
        "cord": {"teacher": "read", "losses on the response": "cord"},
    }[args.script]
    examples = memory.write_examples(args, Path(tempfile.mkdtemp()), args.prompts)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    learns = [p for p in step.parameters() if p.requires_grad]
    optimizer = (torch.optim.AdamW if args.lora else split_adamw.SplitAdamW)(
        parameter_groups(step, lr=1e-5, weight_decay=0.01), betas=(0.9, 0.98)
    )
    wraps = {attribute: timed(name, getattr(step, attribute)) for name, attribute in parts.items()}

    def batches():
        with autocast():
            return memory.batches_of(
                args,
                built,
                flags,
                examples,
                device,
                timed("rollout", rollout.roll_out),
                lambda chunks: [wraps["read"](chunk) for chunk in chunks],
            )

    def update(work):
        for arguments in work:
            with autocast():
                loss = timed("forward", step)(*arguments)
                loss = loss[0] if args.script == "cord" else loss["loss"]
            timed("backward", loss.backward)()
        timed(
            "optimizer",
            lambda: (
                torch.nn.utils.clip_grad_norm_(learns, 1.0),
                optimizer.step(),
                optimizer.zero_grad(set_to_none=True),
            ),
        )()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()}; the figures would be worth nothing")

    work, tokens, views = batches()
    if args.script == "source_layer":
        with autocast():
            step.calibrate([work[0][0]])
    # Warms up; what is compiled on a GPU is compiled here
    update(work)
    work, tokens, views = batches()
    eager = mock.patch.multiple(
        fused, _compiled=lambda work: work, _rows_per_chunk=lambda *_: 128
    ), mock.patch.multiple(split_adamw, _compiled_update=lambda: split_adamw._update)
    with eager[0], eager[1], FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        # Counted: what learns, and the teacher; not the rollout
        if args.script == "cord":
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

    top, side = ceiling(device)
    inner = [
        name
        for name in spent
        if name in parts and not (name == "teacher" and args.script == "cord")
    ]
    spent["student forward"] = spent.pop("forward") - sum(spent[name] for name in inner)
    peak["student forward"] = peak.pop("forward")
    spent = {name: value / args.steps for name, value in spent.items()}
    whole, outside = sum(spent.values()), sum(
        value for name, value in spent.items() if name not in ("rollout", "optimizer")
    )
    states = [x for state in optimizer.state.values() for x in state.values()]
    held = {
        "student": memory.gigabytes(*student.parameters()),
        **{name: memory.gigabytes(*them) for name, them in frozen.items()},
        "optimizer": memory.gigabytes(*states),
        "gradients": memory.gigabytes(*learns),
    }
    padding = 1 - sum(
        (
            view.inputs["attention_mask"].any(1).any(-2)
            if view.inputs["attention_mask"].dim() == 4
            else view.inputs["attention_mask"]
        )
        .sum()
        .item()
        for view in views
    ) / sum(view.inputs["input_ids"].numel() for view in views)
    depth = f", {args.layers} layer(s) of each" if args.layers else ""
    learning = f"LoRA of rank {args.lora}" if args.lora else "all weights"
    out.say(f"{machine()}; train_{args.script}.py at the shapes of {args.shapes}{depth}, bfloat16 "
            f"weights, {learning}: {sum(p.numel() for p in learns):,} parameters learn; "
            f"{len(examples)} clips of {args.seconds:g} s, {tokens:,} response tokens, "
            f"{100 * padding:.0f} % padding; mean of {args.steps} steps")
    out.say(f"{tokens / whole:,.1f} response tokens/s, {3600 * len(examples) / whole:,.0f} clips "
            f"an hour; {counter.get_total_flops() / 1e12:.3g} TFLOP outside the rollout, "
            f"{100 * counter.get_total_flops() / outside / top:.0f} % of what a matrix product "
            f"of {side} reaches here ({top / 1e12:.1f} TFLOP/s in bfloat16)")
    out.table("part", "seconds", "share", "peak GB")
    for name in sorted(spent, key=spent.get, reverse=True):
        out.row(name, f"{spent[name]:.3f}", f"{100 * spent[name] / whole:.0f} %",
                f"{peak[name]:.1f}")

    def listed(held):
        parts = [f"{name} {value:.1f}" for name, value in held.items()]
        return f"{', '.join(parts)}; together {sum(held.values()):.1f}"

    out.say(f"held all the time, GB: {listed(held)}")
    if args.layers:
        out.say(f"at full depth, by arithmetic: {listed(memory.at_full_depth(args, flags))}")


# ------------------------------------------------------------------------------------------------
# the data's share of a step, and whether memory stays what it is

# On the mini world
RUNS = {"source_layer": ["--batch-size", "16", "--micro-batch", "8"], "cord": ["--batch-size", "4"]}
# Many steps, soon
LONG = {
    "source_layer": ["--batch-size", "2", "--micro-batch", "2"],
    "cord": ["--batch-size", "1", "--group-size", "2", "--max-new-tokens", "8"],
}


def run_script(script, *flags):
    """A training script as a user starts it, on the mini world, in a folder that is not kept ->
    its log.jsonl, a list of dicts; and [(step, MB that its data workers hold)], looked at twice a
    second."""
    held, here = [], Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as said:
        log = Path(out, "run", "log.jsonl")
        process = subprocess.Popen(
            [sys.executable, here / f"train_{script}.py", "--no-eval", "--out", log.parent, *flags],
            cwd=here,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
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
    with contextlib.suppress(OSError, IndexError):  # it has just ended
        return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3
    return 0.0


def bench_data(args, out):
    """How long training waits for its data; and how many long clips a worker prepares."""
    # The workers start when the loop does
    first = min(5, args.steps // 2)
    out.say(f"{machine()}; both scripts on the mini world, {args.steps} steps, of which the first "
            f"{first} are left out")
    out.table("script", "--workers", "seconds a step", "waited for data, share of the time",
              "longest wait, seconds")
    for script in RUNS:
        for workers in args.workers:
            log = run_script(
                script, *RUNS[script], "--max-steps", str(args.steps), "--workers", str(workers)
            )[0][first:]
            waits = [line["seconds_waiting"] for line in log]
            whole = sum(line["seconds"] for line in log)
            out.row(script, workers, f"{whole / len(log):.3f}",
                    f"{100 * sum(waits) / whole:.2f} %", f"{max(waits):.3f}")

    processor = memory.random_models(args, torch.device("meta"), 1)[1]
    out.say(f"clips of {args.seconds:g} s at 44.1 kHz for the processor of {args.shapes} "
            f"({data.extractor(processor).feature_size} mel bins), responses of "
            f"{args.response_tokens} tokens; mean of {args.clips}")
    out.table("clips", "decode, ms", "to 16 kHz, ms", "features, ms", "the rest, ms",
              "clips/s, one worker's work")
    for kind in ("wav", "flac", "mp3"):
        with tempfile.TemporaryDirectory() as folder:
            examples = memory.write_examples(args, Path(folder), args.clips, kind, 44_100)
            collate = lambda some: data.collate(some, processor, processor.tokenizer)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in a worker
            collate(examples[:1])
            each = lambda work, over: sum(seconds(lambda: work(x)) for x in over) / len(examples)
            waves = [
                data.load_audio(example.audio, cut=data.longest(processor)).numpy()
                for example in examples
            ]
            spent = [
                each(lambda e: soundfile.read(e.audio, dtype="float32"), examples),
                each(lambda e: data.load_audio(e.audio), examples),
                each(
                    lambda w: data.extractor(processor)(
                        w, sampling_rate=data.SAMPLE_RATE, return_tensors="pt"
                    ),
                    waves,
                ),
                each(lambda e: collate([e]), examples),
            ]
            torch.set_num_threads(threads)
        decode, load, features, whole = (1000 * x for x in spent)
        out.row(kind, f"{decode:.0f}", f"{load - decode:.0f}", f"{features:.0f}",
                f"{max(0.0, whole - load - features):.0f}", f"{1000 / whole:.1f}")


def bench_long(args, out):
    """What a run's processes hold of the main memory, from its beginning to its end."""
    marks = [max(1, args.steps // 20), args.steps // 2, args.steps]
    out.say(f"{machine()}; both scripts on the mini world, a checkpoint every 100 steps; resident "
            "MB")
    out.table("script, process", *(f"step {mark:,}" for mark in marks),
              "more in 1,000 steps, second half")
    for script in args.script:
        log, workers = run_script(
            script, *LONG[script], "--max-steps", str(args.steps), "--workers", "1"
        )
        of = {
            "training": [(line["step"], 1000 * line["host_gb"]) for line in log],
            "its data worker": workers,
        }
        for name, held in of.items():
            at = [min(held, key=lambda x: abs(x[0] - mark))[1] for mark in marks]
            out.row(f"{script}, {name}", *(f"{mb:,.0f}" for mb in at),
                    f"{slope([x for x in held if x[0] >= marks[1]]):+.1f}")


def slope(points):
    """[(step, MB)] -> MB in 1,000 steps, by the line of least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points))
    x, y = x - x.mean(), y - y.mean()
    return 1000 * ((x * y).sum() / x.square().sum().clamp(min=1e-9)).item()


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    part = functools.partial(
        commands.add_parser, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    part("device", help="what this machine is, and its ceilings")
    losses_part = part("losses", help="the fused losses against the formulas and Liger-Kernel")
    for name, text in (
        ("tokens", "response tokens (CPU: 1,024; GPU: 8,192)"),
        ("hidden", "student's width (512; 3,584)"),
        ("teacher-hidden", "teacher's width (512; 4,096)"),
        ("vocab", "words of both (16,384; 151,936)"),
    ):
        losses_part.add_argument(f"--{name}", type=int, help=text)
    losses_part.add_argument(
        "--rounds", type=int, default=5, help="rounds in which every contender runs once"
    )
    rollouts_part = part("rollouts", help="one CORD step's rollouts against plain generate()")
    for name, default, text in (
        ("prompts", 16, "prompts of the step"),
        ("group-size", 4, "rollouts of a prompt beside the one with the KL"),
        ("max-new-tokens", 200, "longest rollout"),
        ("rounds", 3, "rounds in which every way runs once"),
    ):
        rollouts_part.add_argument(f"--{name}", type=int, default=default, help=text)
    step_part = part(
        "step",
        help="whole steps of a training script at a real model's shapes, with random weights",
    )
    step_part.set_defaults(weights="bfloat16")
    step_part.add_argument("--script", choices=["source_layer", "cord"], required=True)
    step_part.add_argument(
        "--shapes",
        choices=memory.MODELS,
        required=True,
        help="student+teacher; CORD needs no other teacher",
    )
    step_part.add_argument(
        "--layers", type=int, help="of each model's, at most so many; all the widths stay"
    )
    step_part.add_argument(
        "--train", choices=["decoder", "all"], help="what learns; default: the script's"
    )
    step_part.add_argument(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="adapters learn, and nothing is there twice; 0: the weights",
    )
    for name, kind, default, text in (
        ("prompts", int, 2, "clips of a step, in one micro-batch"),
        ("seconds", float, 10.0, "length of a clip"),
        ("response-tokens", int, 200, "tokens of a response or rollout"),
        ("steps", int, 3, "steps that are timed"),
    ):
        step_part.add_argument(f"--{name}", type=kind, default=default, help=text)
    data_part = part(
        "data", help="how long training waits for its data, and how many clips a worker prepares"
    )
    data_part.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="data workers")
    long_part = part(
        "long", help="2,000 steps of both scripts on the mini world: does memory stay what it is?"
    )
    long_part.add_argument("--script", nargs="+", choices=list(LONG), default=list(LONG))
    for where, name, kind, default, text in (
        (data_part, "steps", int, 30, "steps of a run"),
        (data_part, "clips", int, 32, "long clips"),
        (data_part, "seconds", float, 30.0, "their length"),
        (data_part, "response-tokens", int, 700, "tokens of their responses"),
        (long_part, "steps", int, 2000, "steps of a run"),
    ):
        where.add_argument(f"--{name}", type=kind, default=default, help=text)
    data_part.set_defaults(shapes="qwen2-audio-7b", weights="bfloat16", lora=0)
    for one in commands.choices.values():
        one.add_argument("--json", metavar="FILE", help="write there what is printed, too")
    args = parser.parse_args(argv)
    work = {
        "device": bench_device,
        "losses": bench_losses,
        "rollouts": bench_rollouts,
        "step": bench_step,
        "data": bench_data,
        "long": bench_long,
    }[args.command]
    work(args, Printed(args.json))


if __name__ == "__main__":
    main()
