"""
Speed and memory, side by side with the peers, in one run: what is quoted in README is printed here.

    python bench.py losses                      # the fused losses against the formulas and Liger-Kernel: under 3 minutes on two cores
    python bench.py rollouts                    # the batched rollouts of a CORD step against generate(), prompt by prompt and one by one

How it measures. Times: all contenders live in one process and take turns, round by round, so that a machine whose speed drifts is unfair to none;
quoted is the median of the ratios within a round, and of the seconds. Memory: each contender in a fresh process, the peak over what its inputs
take. The floor: the matrix products that no one can do without (logits of student and teacher, gradients of hidden states and of the head), timed
in the same rounds. Before anything is timed all contenders must agree on the gradients.
"""
import argparse
import functools
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import common
import data
import losses
import mini_world
import rollout


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

CASES = {"jsd_ce": "L_top + L_SFT (paper A)", "cord": "L_tok (paper B), all tokens with KL", "group": "L_seq (paper B), no KL"}
ROLLOUT = 128                   # tokens of a rollout in the cases of paper B


def loss_inputs(args, device):
    """Random hidden states and heads; the student's learn. Logits of standard deviation 3, as a language model's."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = lambda rows, width, scale=1.0: (scale * torch.randn(rows, width, device=device)).to(dtype)
    return {"hidden": make(args.tokens, args.hidden).requires_grad_(), "weight": make(args.vocab, args.hidden, 3 * args.hidden ** -0.5).requires_grad_(),
            "teacher": make(args.tokens, args.teacher_hidden), "teacher_weight": make(args.vocab, args.teacher_hidden, 3 * args.teacher_hidden ** -0.5),
            "labels": torch.randint(args.vocab, (args.tokens,), device=device), "advantage": torch.randn(args.tokens // ROLLOUT, device=device)}


def contenders(case, x):
    """{name: callable that returns the loss}; "ours" first. Liger's GRPO is worth -A, ours -A log p, with the same gradient."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
    gpu, tokens = x["hidden"].is_cuda, len(x["hidden"])
    heads = [x[name] for name in ("hidden", "weight", "teacher", "teacher_weight", "labels")]
    if case == "jsd_ce":
        def liger(size):
            loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=1.0, compiled=gpu, chunk_size=size)
            return lambda: loss(*heads)
        works = {"ours": lambda: losses.fused_jsd_ce(*heads)[0], "the formula": lambda: losses.jsd_ce(*heads)[0],
                 "Liger, chunks of 1,024 (its default)": liger(1024), "Liger, chunks of 128": liger(128)}
        if gpu:
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
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, compiled=gpu, use_ref_model=False, loss_type="grpo")
    rollouts = [t.view(-1, ROLLOUT, *t.shape[1:]) for t in (heads[0], heads[4])]
    return {**works, "Liger, GRPO": lambda: grpo(rollouts[0], heads[1], rollouts[1], torch.ones_like(rollouts[1]), x["advantage"])[0]}


def step_of(loss, x):
    def step():
        x["hidden"].grad = x["weight"].grad = None
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
        works, gradients = contenders(case, x), {}
        for name, loss in works.items():
            step_of(loss, x)()
            gradients[name] = [g.grad.float() for g in (x["hidden"], x["weight"])]
            off = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients[name], gradients["ours"]))
            if off > (3e-2 if gpu else 1e-4) and not name.endswith(("uniform (alpha = beta = 1)", "JSD alone")):
                raise SystemExit(f"{title}: the gradient of {name!r} is off ours by {off:.1e}; nothing is worth timing")
        gradients.clear()
        times = take_turns({**{name: step_of(loss, x) for name, loss in works.items()}, "floor": floor(case, x)}, args.rounds)
        print(f"\n| {title} | time, over ours | seconds | memory, over ours | GB | share of the floor |\n| --- | --- | --- | --- | --- | --- |")
        memory = {}
        for name in works:
            memory[name] = fresh.submit(peak_of, case, name, args).result()
            print(f"| {name} | {paired(times, name, 'ours'):.2f} | {statistics.median(times[name]):.3f} | {memory[name] / memory['ours']:.2f} | {memory[name]:.2f} | "
                  f"{100 * paired(times, 'floor', name):.0f} % |", flush=True)
        print(f"| the {3 if case == 'group' else 4} matrix products alone | {paired(times, 'floor', 'ours'):.2f} | {statistics.median(times['floor']):.3f} | | | |")


# ---------------------------------------------------------------------------------------------------------------------------------
# rollouts

def bench_rollouts(args):
    """One step's rollouts of CORD with the mini world's student. All three ways must say the same, token by token: the sampler's numbers are keyed."""
    device = the_device()
    student, processor = common.load_audio_model(mini_world.MINI / "student")
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


# ---------------------------------------------------------------------------------------------------------------------------------

def main():
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
    args = parser.parse_args()
    {"losses": bench_losses, "rollouts": bench_rollouts}[args.command](args)


if __name__ == "__main__":
    main()
