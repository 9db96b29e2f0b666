"""
CORD (paper B, arXiv 2601.16547): the model that reads teaches the model that listens. Both are one model.

    y ~ p(. | audio)                                              the model answers what it HEARS, in its own words, on-policy
    D_t   = KL( p(. | y_<t, audio) || p(. | y_<t, transcript) )   what would it say next if it had READ the question instead?
    L_tok = sum_t w_t D_t                                         w_t: more on the largest D_t and on early tokens (losses.cord_weights)
    L_seq = - mean_i A_i log p(y_i | audio)                       group reward: does y_i give the answer that the text view gives?
    L     = L_tok + L_seq

    python train_cord.py                                  # laptop: the mini world, audio synthesised on the first run
    python train_cord.py --dry-run                        # two steps and a small evaluation of everything
    torchrun --nproc_per_node 8 train_cord.py --student Qwen/Qwen2-Audio-7B-Instruct \\
        --weights bfloat16 --shard --data numina_spoken.jsonl \\
        --eval-data gsm8k_spoken.jsonl openbookqa.jsonl --lr 3e-5 --batch-size 64 --micro-batch 5 --eval-batch 16
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train_cord.py ...        # on each node

The rows of the paper's tables (python experiments.py cord: all of them, two epochs, three seeds each):

    SFT on the text view's answers        --token-loss sft --group-size 0
    off-policy forward KL                 --token-loss forward-kl --group-size 0
    uniform on-policy reverse KL          --alpha 1 --beta 1 --group-size 0
    GRPO only                             --token-loss none
    GRPO + uniform KL                     --alpha 1 --beta 1
    full CORD                             (the default)

Where the paper is silent, and what we do:
1. Teacher: a frozen copy from before training, as the paper's figure draws it. The current weights
   (--teacher current) were no worse at a low learning rate; at twice that both views fell together in
   two of three seeds (python experiments.py cord-teacher).
2. Rollouts: one at temperature 1 for the KL and N = 4 at 1.5 for the group, in one batched call; --share-rollouts takes the KL on the group's.
3. D_t and log p are of what was sampled from: control tokens are banned in both views; log p at the row's own temperature, D_t at 1.
4. L_tok and L_seq: sums over a rollout's tokens, as written, and means over the rollouts of the global batch, on any number of GPUs.
5. Top K is a share of the rollout (a tenth: 20 of the paper's 200 tokens), so that short rollouts are weighted alike.
6. AdamW, linear warm-up over 3 %, cosine to zero. Decoder and projector learn, the audio tower is frozen.
7. A rollout without an answer is judged wrong. Rollouts of a group whose rewards are all equal have no gradient and are not run again.
   An answer of the text view that was cut at the token limit is no reference: its prompt gets no group reward.
8. E_y[sum_t w_t D_t] also depends on which y are drawn. That term of its gradient, the score-function
   term, is dropped, as the paper writes it: L_tok changes the tokens' distributions, not the draw.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import time
from pathlib import Path

import torch
import torch.nn as nn

import common
import data
import evaluate
import judge
import losses
import mini_world
import models
import report
import rollout
from split_adamw import SplitAdamW

# What the default run gives on two cores, per cent (README.md quotes it; tests/test_readme.py keeps the two equal).
EXPECTED = {"text": (85.3, 84.3), "audio": (51.7, 61.7)}
QUIET = 20                  # steps without any signal from the judge after which a warning says so
# what is logged beside the losses -> (sum over all ranks, divided by another)
MEANS = {"kl": ("kl", "tokens"), "entropy": ("entropy", "tokens"), "top_weight": ("top", "weight"), "reward": ("reward", "rewarded"),
         "signal": ("signal", "groups"), "length": ("sampled", "rollouts"), "at_limit": ("at_limit", "rollouts"),
         "reference_cut": ("reference_cut", "prompts")}


# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Flags

def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # models and data
    parser.add_argument("--student", default=str(mini_world.MINI / "student"), help="audio LM, folder or hub id (paper: Qwen2-Audio-7B-Instruct)")
    parser.add_argument("--teacher", default="initial", choices=["initial", "current"], help="who reads: a frozen copy, or the weights of this step")
    parser.add_argument("--data", help="training manifest with transcripts (data.py); default: the mini world")
    parser.add_argument("--eval-data", nargs="+", default=[], help="manifests to evaluate on; without --data: the mini world's test split")
    parser.add_argument("--max-seconds", type=float, default=None, help="refuse longer clips, in seconds; default: cut where the model stops hearing")
    # the method
    parser.add_argument("--token-loss", default="reverse-kl", choices=["reverse-kl", "forward-kl", "sft", "none"],
                        help="L_tok: reverse KL on rollouts (paper); baselines along the text view's own answer: forward-kl, sft")
    parser.add_argument("--alpha", type=float, default=2.0, help="weight of the tokens with the largest D_t (paper: 2; 1: uniform)")
    parser.add_argument("--beta", type=float, default=2.0, help="weight of the first token, falling to 1 at the last (paper: 2; 1: uniform)")
    parser.add_argument("--top-share", type=float, default=0.1, help="share of a rollout's tokens that alpha weighs (paper: 20 of 200)")
    parser.add_argument("--group-size", type=int, default=4, help="N rollouts of a prompt that are rewarded (paper: 4; 0: no L_seq)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollout that carries the KL (paper: 1.0)")
    parser.add_argument("--group-temperature", type=float, default=1.5, help="of the group's rollouts (paper: 1.5)")
    parser.add_argument("--loss", default="fused", choices=["fused", "reference"], help="the fast form of losses.py, or its readable formulas")
    parser.add_argument("--share-rollouts", action="store_true", help="the KL is taken on the group's rollouts, and no other is sampled")
    parser.add_argument("--judge", default="rule", help="rule, or a causal LM that is asked (folder or hub id; judge.py)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest rollout and answer, in tokens (paper: 200)")
    parser.add_argument("--train", default="decoder", choices=["decoder", "all"], help="decoder (with head and projector), or all: the audio tower too")
    # optimisation
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate (paper, 7B: 3e-5)")
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16"], help="bfloat16: 10 bytes a parameter, not 16 (split_adamw.py)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="learn low-rank adapters alone, by peft (models.py); 0: the weights themselves")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="AdamW, on matrices only")
    parser.add_argument("--epochs", type=float, default=0.8, help="passes over the data; a fraction will do")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per step over all ranks")
    parser.add_argument("--micro-batch", type=int, default=16, help="rollouts per forward on one rank; those of a prompt share its sequence")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    # evaluation
    parser.add_argument("--eval-every", type=int, default=0, help="steps between evaluations in the middle; 0: none")
    parser.add_argument("--eval-batch", type=int, default=64, help="questions answered at once on one rank")
    parser.add_argument("--text-batch", type=int, default=64,
                        help="prompts that one rank reads and answers at once before step 1")
    parser.add_argument("--show-every", type=int, default=25, help="steps between three rollouts in the terminal and samples.jsonl")
    common.add_run_flags(parser, out="runs/cord", best=["audio", "text"])
    args = parser.parse_args(argv)
    if args.group_size == 1 or args.group_size < 0:
        parser.error("--group-size is 0 (no group reward) or at least 2: one rollout has nothing to be better than")
    if not args.group_size and (args.token_loss == "none" or args.share_rollouts) or args.share_rollouts and args.token_loss != "reverse-kl":
        parser.error("with --token-loss none and --group-size 0 nothing is learnt; --share-rollouts needs --token-loss reverse-kl and a --group-size")
    sizes = (args.batch_size, args.micro_batch, args.max_new_tokens, args.eval_batch,
             args.text_batch, args.show_every)
    if min(*sizes, args.lora + 1) < 1 or args.epochs <= 0:
        parser.error("batch sizes, --max-new-tokens and --show-every are at least 1, --epochs above 0, --lora at least 0")
    if min(args.temperature, args.group_temperature) <= 0 or not 0 <= args.top_share <= 1:
        parser.error("temperatures are above 0 (an argmax explores nothing), --top-share is between 0 and 1")
    common.check_run_flags(args, parser)
    return args


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. One step: rewards, then forward and losses in one module, because DDP synchronises only what runs inside the forward it wraps

def reward(rollouts, prompts, references, verdicts):
    """Judge the group's rollouts against the text view's answer: fills reward and advantage. -> sums for the log

    An answer that was cut at the token limit is no reference: its prompt's rollouts are not rewarded, and no part of L_seq's mean."""
    group = [r for r in rollouts if r.group]
    if not group:
        return {}
    ended = [references[e.id]["ended"] for e in prompts.examples]
    for r in group:
        r.group = ended[r.row]
    group = [r for r in group if r.group]
    cut = {"reference_cut": ended.count(False), "prompts": len(ended)}
    if not group:
        return cut
    judged = verdicts([(prompts.examples[r.row], r.text, references[prompts.examples[r.row].id]["text"]) for r in group])
    rewards = torch.tensor(judged, dtype=torch.float32).view(sum(ended), -1)                     # [prompts, N]
    for r, won, advantage in zip(group, rewards.flatten().tolist(), losses.group_advantages(rewards).flatten().tolist()):
        r.reward, r.advantage = won, advantage
    mixed = rewards.min(-1).values < rewards.max(-1).values                                      # all alike: no signal
    return {**cut, "reward": rewards.sum().item(), "rewarded": rewards.numel(), "signal": mixed.sum().item(), "groups": len(rewards)}


@dataclasses.dataclass
class Chunk:
    """A micro-batch of rollouts. Flat token axes: [tokens] of all its rollouts, [kl tokens] of those that carry L_tok."""
    audio: data.View
    text: data.View | None      # the rollouts that carry L_tok, behind the transcript; None without any
    labels: torch.Tensor        # [tokens] int64
    temperature: torch.Tensor   # [tokens]
    advantage: torch.Tensor     # [tokens], 0 where a rollout is not rewarded
    kl: torch.Tensor            # [tokens] bool
    read: list                  # the Rollouts of the text view, in its order
    rows: list                  # which prompts are in it


def chunks_of(rollouts, prompts, processor, size, device):
    """Rollouts -> Chunks of at most `size`; what carries no gradient stays out. A prompt's rollouts go together, so that they share it, and long
    prompts go with long ones, so that little is padded."""
    live = [r for r in rollouts if r.kl or r.advantage] or rollouts[:1]         # one in any case: no rank may miss the others' backward
    of_prompt = [list(group) for _, group in itertools.groupby(sorted(live, key=lambda r: r.row), key=lambda r: r.row)]
    pieces = [group[i:i + size] for group in of_prompt for i in range(0, len(group), size)]
    pieces.sort(key=lambda piece: len(prompts.audio[piece[0].row]) + sum(len(r.ids) for r in piece), reverse=True)
    parts, chunks = [[]], []
    for piece in pieces:
        parts += [[]] * (len(parts[-1]) + len(piece) > size)
        parts[-1] = parts[-1] + piece
    for part in parts:
        read = [r for r in part if r.kl]
        flat = lambda values, kind: torch.tensor([v for r, v in zip(part, values) for _ in r.ids], dtype=kind, device=device)
        chunks.append(Chunk(
            audio=data.audio_view(prompts, [r.row for r in part], [r.ids for r in part], processor).to(device),
            text=data.text_view(prompts, [r.row for r in read], [r.ids for r in read], processor.tokenizer).to(device) if read else None,
            labels=torch.tensor([token for r in part for token in r.ids], device=device), read=read, rows=sorted({r.row for r in part}),
            temperature=flat([r.temperature for r in part], torch.float32), advantage=flat([r.advantage for r in part], torch.float32),
            kl=flat([r.kl for r in part], torch.bool)))
    return chunks


class CordStep(nn.Module):
    """
    Losses of one chunk: forward(chunk, read, counts) -> ({"loss", "token", "group"}, those that are on, scalars; for the log and detached,
    {"kl", "entropy", "weight", "top": the weight where D_t is among the K largest, "tokens": ones}, all [kl tokens]).

    read: [kl tokens, hidden] from CordStep.read. counts: {"token", "group"}, rollouts of the global batch, so that summing over chunks and
    ranks gives the global mean. The frozen teacher lives in a tuple: no submodule, so DDP neither broadcasts nor checks it.
    """

    def __init__(self, student, banned, args):
        super().__init__()
        self.student, self.args, self.banned = student, args, banned
        self.cord = losses.fused_cord if args.loss == "fused" else losses.cord
        self.teacher = (models.decoder(student), student.get_output_embeddings())                # reading needs no audio tower
        if args.teacher == "initial" and args.token_loss in ("reverse-kl", "forward-kl") and not args.lora:
            kind = torch.bfloat16 if student.device.type == "cuda" else student.dtype            # no master weights needed
            self.teacher = tuple(models.frozen_copy(part, kind) for part in self.teacher)

    @torch.no_grad()
    def read(self, chunk):
        """The teacher on the text view: last hidden states that predict the rollouts' tokens -> [kl tokens, hidden]."""
        if chunk.text is None or self.args.token_loss == "sft":
            return None
        with models.without_lora(self.teacher[0]) if self.args.teacher == "initial" else contextlib.nullcontext():      # LoRA: no copy is needed
            last = self.teacher[0](**chunk.text.inputs, use_cache=False).last_hidden_state       # [prompts, seq, hidden]
        return last.flatten(0, 1)[chunk.text.predict_positions]

    def forward(self, chunk, read, counts):
        args, view, parts, each, teacher_head = self.args, chunk.audio, {}, {}, common.full(self.teacher[1].weight)      # gathered by all ranks, or by none
        last = models.hear(self.student, **view.inputs)                                          # [prompts, seq, hidden]
        heard, lengths = last.flatten(0, 1)[view.predict_positions], [len(r.ids) for r in chunk.read]        # [tokens, hidden]
        advantage, sft, on_policy = chunk.advantage / max(counts["group"], 1), args.token_loss == "sft", args.token_loss == "reverse-kl"
        how = dict(alpha=args.alpha, beta=args.beta, top_share=args.top_share) if on_policy else dict(alpha=1.0, beta=1.0, top_share=0.0)
        # L = sum_t w_t D_t / rollouts with a KL - sum_t A_i log p_t / rewarded rollouts. SFT: log p of the text view's tokens in the place of the KL
        loss, kl, log_p, entropy = self.cord(
            heard, models.head_weight(self.student), read, None if read is None else teacher_head, chunk.labels,
            lengths=[] if sft else lengths, carries_kl=chunk.kl & (not sft), advantage=advantage + (chunk.kl & sft) / max(counts["token"], 1),
            temperature=chunk.temperature, banned=self.banned, divergence_beta=1.0 if on_policy else 0.0, denominator=counts["token"], **how)
        if lengths and sft:
            parts["token"] = -log_p[chunk.kl].sum() / counts["token"]
        elif lengths:
            kl = kl[chunk.kl]                                                                    # D_t [kl tokens]
            weight, largest = losses.cord_weights(kl, lengths, **how), losses.largest_share(kl, lengths, args.top_share)
            parts["token"] = (weight * kl).sum() / counts["token"]
            each = {"kl": kl, "entropy": entropy[chunk.kl], "weight": weight, "top": weight * largest, "tokens": torch.ones_like(kl)}
        if chunk.advantage.any():
            parts["group"] = -(advantage * log_p).sum()
        return {**parts, "loss": loss}, each


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Schedule

def learning_rate_factor(step, steps):
    """Linear warm-up over 3 % of the steps, then a cosine to zero."""
    warm = max(1, round(0.03 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. The run

def main(argv=None):
    args = parse_flags(argv)
    started, out, (rank, world, device) = time.time(), Path(args.out), common.start_distributed()
    say = common.speaker(rank)
    torch.manual_seed(args.seed)
    args.student = common.newest_checkpoint(args, "student")
    # 4.1 data: the whole manifest and every clip are checked before anything trains
    if args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of the {world} ranks; change one")
    share = args.batch_size // world
    train_file, eval_files = args.data, args.eval_data
    if train_file is None:
        with common.rank_zero_first(rank, world):
            train_file, *made = mini_world.spoken(args.seed, small=args.dry_run)
        eval_files = eval_files or made
    examples, scored, seconds, unusable = common.read_data(train_file, eval_files, args, ("transcript",), say)

    # 4.2 models
    kind = torch.bfloat16 if args.weights == "bfloat16" or args.lora and device.type == "cuda" else torch.float32
    student, processor = models.load_audio_model(args.student, dtype=kind)
    tokenizer, verdicts = processor.tokenizer, judge.load(args.judge, device)
    student.to(device).set_attn_implementation("sdpa")                                   # takes the mask of shared prompts
    models.choose_trained(student, args.train, models.check(student, processor, shared_prompts=True), lora=args.lora)
    step_module = wrapped = CordStep(student, torch.tensor(rollout.banned_ids(student, tokenizer), device=device), args)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda" or args.weights == "bfloat16")
    encode = functools.partial(data.encode_prompts, processor=processor, tokenizer=tokenizer, words="transcript", max_seconds=args.max_seconds)

    # 4.3 before: what the student can do as it comes, and the text view's answers, which the judge compares with
    checkpoint, done = common.find_checkpoint(args, out, device), 0
    steps = args.max_steps or math.ceil(args.epochs * len(examples) / args.batch_size)
    stop = min(steps, 2) if args.dry_run else steps
    learns = sum(p.numel() for p in step_module.parameters() if p.requires_grad)
    say(f"{device} x {world}, {student.dtype} weights{', float32 adapters' * (args.lora > 0)}{', bfloat16 autocast' * (device.type == 'cuda')}{', sharded' * args.shard}; "
        f"student {student.num_parameters():,} parameters, {learns:,} learn; teacher: {args.teacher} weights")
    apart = args.token_loss == "reverse-kl" and not args.share_rollouts
    plan = [(args.temperature, True, False)] * apart + [(args.group_temperature, args.share_rollouts, True)] * args.group_size
    say(common.memory_line(args, world, step_module, student=[student], teacher=step_module.teacher))
    say(data.about_clips(seconds, processor))
    say(f"{len(examples):,} prompts to learn from, {len(scored):,} to score; {share} x {len(plan)} x {world} "
        f"(prompts x rollouts x ranks) = {args.batch_size * len(plan)} rollouts a step, {steps} steps")
    common.start_folder(out, checkpoint, rank, world)
    answering = dict(batch_size=args.eval_batch, max_new_tokens=args.max_new_tokens, seed=args.seed)

    def score(when, elsewhere=True):
        return common.evaluation(lambda: evaluate.evaluate_views(student, processor, scored, elsewhere=elsewhere, **answering), when, data.fingerprint(scored),
                                 module=wrapped, out=out, args=args, rank=rank)

    before = None if args.no_eval or not scored else checkpoint and common.read_known(out / "before.json", data.fingerprint(scored)) or score("before")
    asked = {e.id: e for step in range(stop) for e in common.examples_of_step(examples, step, args.batch_size, args.seed)}
    with common.writing(out / "references.jsonl"):
        how = {**answering, "batch_size": args.text_batch}
        references = rollout.text_answers(student, processor, [*asked.values()],
                                          out / "references.jsonl", **how)
    agreed = verdicts([(e, references[e.id]["text"], e.answer) for e in list(asked.values())[:1000]])
    say(f"judge ({args.judge}): the text view gives the gold answer to {100 * sum(agreed) / len(agreed):.1f} % of {len(agreed)} prompts")
    if cut := sum(not reference["ended"] for reference in references.values()):
        say(f"{cut} of the text view's {len(references)} answers were cut at --max-new-tokens {args.max_new_tokens}: no group reward for their prompts")

    # 4.4 checkpoint; DDP or FSDP; optimizer
    reader = step_module if step_module.teacher[0] is models.decoder(student) else step_module.teacher[0]        # the module whose weights reading needs
    if args.shard and reader is not step_module:
        common.shard_reader(*step_module.teacher)
    if checkpoint:
        done = common.load_model(checkpoint, student)
        say(f"going on from step {done}, {checkpoint}")
    wrapped = common.wrap(step_module, student, args, world=world, compute=kind if device.type == "cpu" else torch.bfloat16)
    learns = [p for p in step_module.parameters() if p.requires_grad]
    groups = common.parameter_groups(step_module, lr=args.lr, weight_decay=args.weight_decay)
    optimizer = (torch.optim.AdamW if args.weights == "float32" or args.lora else SplitAdamW)(groups, betas=(0.9, 0.98))
    if checkpoint:
        common.load_optimizer(checkpoint, step_module, optimizer)
    card = functools.partial(models.write_card, base=args.student, script=Path(__file__).name, flags=vars(args))
    save = functools.partial(common.save_checkpoint, out, model=student, processor=processor, beside={}, module=step_module, optimizer=optimizer,
                             card=card, rank=rank, keep=args.keep, best=args.keep_best)
    common.start_logs(out, args, done, unusable, steps=steps, rank=rank, world=world, names=("log", "samples"))

    # 4.5 the loop: roll out, judge, read, then forward, accumulate, backward, clip, step
    first, begun, saved, quiet, spoiled = done, time.time(), checkpoint, 0, 0                            # quiet: steps since a group last had any signal
    prepared = common.feed(encode, examples, args, done=done, stop=stop, rank=rank, world=world, device=device)
    where = {"do": "lower --batch-size or --micro-batch, shorten --max-new-tokens, or use --checkpoint-activations, --lora RANK or --shard"}
    common.forget_peak_memory(device)
    with common.bad_days(where, prepared, lambda: save(step=done), say) as signals, common.progress(done, stop, rank) as bar:
        for step, (prompts, faults, waited) in zip(range(done, stop), prepared):
            if before and args.eval_every and step and step % args.eval_every == 0:        # here, so that it is made up for by a run that was killed meanwhile
                now = common.read_known(out / f"eval-{step:07d}.json", data.fingerprint(scored)) or score(f"eval-{step:07d}", elsewhere=False)
                common.note_scores(saved, {view: now[f"{view}_accuracy"] for view in ("text", "audio")}, args, rank)
                say(f"step {step}: text {now['text_accuracy']:.1f}  audio {now['audio_accuracy']:.1f}")
            clock, mine, spoilt = [time.time()], prompts.examples, []
            common.seed_step(args.seed, step, rank)
            where |= {"part": "the rollouts", "batch": f"{share * len(plan)} rollouts", "length": max(map(len, prompts.audio)) + args.max_new_tokens}
            rollouts = common.whole(wrapped, lambda: rollout.roll_out(student, processor, prompts, plan, key=f"{args.seed} {step}", max_new_tokens=args.max_new_tokens))
            clock.append(time.time())
            sums = {**dict.fromkeys(("loss", "token", "group", *sum(MEANS.values(), ())), 0.0), "rollouts": len(rollouts),
                    "sampled": sum(len(r.ids) for r in rollouts), "at_limit": sum(not r.ended for r in rollouts),
                    **reward(rollouts, prompts, references, verdicts), "faults": len(faults)}
            if args.token_loss in ("sft", "forward-kl"):            # off-policy: along the text view's own answer
                rollouts += [rollout.Rollout(row, 1.0, True, False, references[e.id]["ids"], ended=references[e.id]["ended"])
                             for row, e in enumerate(mine)]
            chunks = chunks_of(rollouts, prompts, processor, args.micro_batch, device)
            if args.shard:                              # every rank runs as many: one with nothing in it does no harm
                idle = chunks_of([dataclasses.replace(rollouts[0], kl=False, advantage=0.0)], prompts, processor, 1, device)
                chunks += idle * (int(common.over_ranks(len(chunks), torch.distributed.ReduceOp.MAX, device)) - len(chunks))
            where |= {"part": "the text view", "batch": f"{args.micro_batch} rollouts"}
            with autocast():
                taught = common.whole(reader, lambda: [step_module.read(chunk) for chunk in chunks])
            clock.append(time.time())
            counts = common.sum_over_ranks({"token": sum(r.kl for r in rollouts), "group": sum(r.group for r in rollouts)}, device)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(step, steps)
            for i, (chunk, read) in enumerate(zip(chunks, taught)):
                where |= {"part": "the forward pass", "length": chunk.audio.inputs["input_ids"].shape[1]}
                with common.accumulating(wrapped, last=i + 1 == len(chunks)):
                    with autocast():
                        parts, each = wrapped(chunk, read, counts)
                    where["part"] = "the backward pass"
                    (parts["loss"] * world).backward()             # DDP and FSDP average over ranks; ours are parts of a sum
                spoilt += [] if parts["loss"].isfinite() else [mine[row].id for row in chunk.rows]
                for name, value in {**parts, **each}.items():
                    sums[name] += value.sum().item()
                for r, divergence in zip(chunk.read, each["kl"].split([len(r.ids) for r in chunk.read]) if each else ()):
                    r.divergence = divergence.tolist()
            where["part"] = "the optimizer"
            norm, sums = common.clip(learns, args.clip), common.sum_over_ranks({**sums, "asked": len(signals)}, device)
            if sound := math.isfinite(sums["loss"] + norm):        # the same on every rank
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done, spoiled = step + 1, 0 if sound else spoiled + 1
            clock.append(time.time())
            if sums.pop("faults"):
                common.note_unusable(faults, unusable, out, done, rank)
            why = common.reason_to_stop(sums.pop("asked"), spoiled, len(unusable), args.skip_bad)
            line = {"step": done, **{name: sums[name] for name in ("loss", "token", "group")}, "grad_norm": norm,
                    "lr": optimizer.param_groups[0]["lr"], **{name: sums[x] / sums[y] for name, (x, y) in MEANS.items() if sums[y]},
                    **{f"seconds_{what}": end - start for what, start, end in zip(("rollout", "scoring", "update"), clock, clock[1:])},
                    "rollout_tokens_per_second": sums["sampled"] / (clock[1] - clock[0]), **common.costs(clock[-1] - clock[0] + waited, waited, device)}
            text = "  ".join(f"{name} {line[name]:.3f}" for name in ("loss", *MEANS) if name in line) + f"  {line['rollout_tokens_per_second']:,.0f} rollout tokens/s"
            if (quiet := quiet + 1 if sums["groups"] and not sums["signal"] else 0) == QUIET:
                say(f"step {done}: for {QUIET} steps all rollouts of every group were judged alike, so the group reward teaches nothing: read "
                    "samples.jsonl, then raise --group-temperature or set --group-size 0")
            if dead := [e.id for n, e in enumerate(mine) if all(r.unusable for r in rollouts if r.row == n)]:
                say(f"step {done}: all rollouts of {', '.join(dead)} are empty or were cut at --max-new-tokens {args.max_new_tokens}")
            if not sound:
                line = common.left_out(done, sums["loss"], norm, spoilt, [e.id for e in mine], say)
            common.log_step(line, text, span=(first, stop), clock=(started, begun), out=out, bar=bar, say=say, rank=rank)
            if rank == 0 and (done % args.show_every == 0 or done == 1):
                for record in rollout.samples([r for r in rollouts if r.kl or not apart][:3], prompts, references, verdicts, tokenizer):
                    common.append_jsonl(out / "samples.jsonl", {"step": done, **record})
                    say("  {transcript} | {rollout} | {verdict}".format(**record))
            if done == stop or why or done % args.save_every == 0 or before and args.eval_every and done % args.eval_every == 0:
                where["part"] = "writing a checkpoint"
                saved = save(step=done)
            if why:
                common.leave(why, saved, say)

    # 4.6 after
    if before:
        after = score("after")
        table, minutes = evaluate.report_gap(after, before), (time.time() - started) / 60
        if rank == 0:
            common.write_json(out / "results.json", {"before": before, "after": after, "minutes": minutes,
                                                     "gap_reduction_percent": evaluate.gap_reduction(before, after)})
            card(out / f"step-{done:07d}", results=table)
            say(table)
            if args.data is None and not args.dry_run:
                say("expected without flags:  text {:.1f} -> {:.1f}  audio {:.1f} -> {:.1f}".format(*sum(EXPECTED.values(), ())))
            report.plot_cord(out)
            say(f"{out}: results.json, log.jsonl, samples, run.png, checkpoint step-{done:07d}; {minutes:.1f} minutes in all")
    wrapped = None                      # DDP's reducer must go before its process group does, or gloo waits forever at exit
    common.stop_distributed()


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
