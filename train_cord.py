"""
CORD (paper B, arXiv 2601.16547): the model that reads teaches the model that listens. Both are one
model.

    y ~ q(. | audio)                         the model answers what it HEARS, in its own words
    D_t   = KL( q(. | y_<t, audio) || p(. | y_<t, transcript) )
                                             what would it say next if it had READ the question?
    L_tok = sum_t w_t D_t                    w_t: more on the largest D_t and on early tokens
    L_seq = - mean_i A_i log q(y_i | audio)  group reward: does y_i give the text view's answer?
    L     = L_tok + L_seq

    python train_cord.py                     # laptop: the mini world, made on the first run
    python train_cord.py --dry-run           # two steps and a small evaluation of everything
    torchrun --nproc_per_node 8 train_cord.py --student Qwen/Qwen2-Audio-7B-Instruct \\
        --weights bfloat16 --shard --data numina_spoken.jsonl \\
        --eval-data gsm8k_spoken.jsonl openbookqa.jsonl \\
        --lr 3e-5 --batch-size 64 --micro-batch 5 --eval-batch 16
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train_cord.py ...                    # on each node

The rows of the paper's tables (python -m lab.experiments cord: all of them, three seeds each):

    SFT on the text view's answers        --token-loss sft --group-size 0
    off-policy forward KL                 --token-loss forward-kl --group-size 0
    uniform on-policy reverse KL          --alpha 1 --beta 1 --group-size 0
    GRPO only                             --token-loss none
    GRPO + uniform KL                     --alpha 1 --beta 1
    full CORD                             (the default)

Where the paper is silent, and what we do:
1. Teacher: a frozen copy from before training, as the paper's figure draws it. The current weights
   (--teacher current) were no worse at a low learning rate; at twice that both views fell together
   in two of three seeds (python -m lab.experiments cord-teacher).
2. Rollouts: one at temperature 1 for the KL and N = 4 at 1.5 for the group, in one batched call.
3. Control tokens are banned in both views, as in sampling. log q is at the rollout's own
   temperature, D_t at 1.
4. L_tok and L_seq: sums over a rollout's tokens, as written, and means over the rollouts of the
   global batch, on any number of GPUs.
5. Top K is a share of the rollout (a tenth: 20 of the paper's 200 tokens), so that short rollouts
   are weighted alike.
6. AdamW, linear warm-up over 3 %, cosine to zero. Decoder, head and projector learn, the audio
   tower is frozen.
7. A rollout without an answer is judged wrong. Rollouts of a group whose rewards are all equal have
   no gradient and are not run again. An answer of the text view that was cut at the token limit is
   no reference: its prompt gets no group reward.
8. The gradient of E_y[sum_t w_t D_t] has a second term, because the weights also decide which y are
   drawn: the score-function term. Like the paper we leave it out.
"""
import contextlib
import dataclasses
import functools
import itertools
import math

import torch
import torch.nn as nn

import data
import evaluate
import fused
import judge
import losses
import models
import rollout
from plumbing import checkpoints, hearing, ranks
from plumbing.check import about_clips
from plumbing.files import append_jsonl, newest_checkpoint
from plumbing.optimizer import SplitAdamW, learning_rate_factor, parameter_groups
from plumbing.run import Run, add_run_flags, check_run_flags, examples_of_step, flag_parser

# What the default run gives on two cores, per cent (README.md quotes it, a test keeps them equal)
EXPECTED = "text 85.3 -> 84.3  audio 51.7 -> 61.7"


# ---------------------------------------------------------------------------------------------
# 1. Flags

def parse_flags(argv=None):
    parser, add = flag_parser(__doc__)

    # models and data
    add("--student", str(models.MINI / "student"), "audio LM (paper: Qwen2-Audio-7B-Instruct)")
    add("--teacher", "initial", "who reads: a frozen copy, or the weights of this step",
        choices=["initial", "current"])
    add("--data", None, "training manifest with transcripts; default: the mini world")
    add("--eval-data", [], "manifests to score; without --data the mini world's test split",
        nargs="+")
    add("--max-seconds", None, "refuse longer clips; default: cut where hearing stops", type=float)
    add("--judge", "rule", "rule, or a causal LM that is asked (judge.py)")

    # L_tok
    add("--token-loss", "reverse-kl", "reverse KL on rollouts (paper), or a baseline",
        choices=["reverse-kl", "forward-kl", "sft", "none"])
    add("--alpha", 2.0, "weight of the tokens with the largest D_t (paper: 2; 1: uniform)")
    add("--beta", 2.0, "weight of the first token, falling to 1 at the last (paper: 2; 1: uniform)")
    add("--top-share", 0.1, "share of a rollout's tokens that alpha weighs (paper: 20 of 200)")
    add("--loss", "fused", "fused.py, or the formulas of losses.py", choices=["fused", "reference"])

    # rollouts and L_seq
    add("--group-size", 4, "N rollouts of a prompt that are rewarded (paper: 4; 0: no L_seq)")
    add("--temperature", 1.0, "of the rollout that carries L_tok (paper: 1.0)")
    add("--group-temperature", 1.5, "of the group's rollouts (paper: 1.5)")
    add("--max-new-tokens", 200, "longest rollout and answer, in tokens (paper: 200)")

    # optimisation
    add("--train", "decoder", "decoder, head and projector, or all: the audio tower too",
        choices=["decoder", "all"])
    add("--lr", 3e-4, "peak learning rate (paper, 7B: 3e-5)")
    add("--epochs", 0.8, "passes over the data; a fraction will do")
    add("--batch-size", 16, "prompts per step, over all ranks")
    add("--micro-batch", 16, "rollouts per forward on one rank; those of a prompt share a sequence")

    # references and samples
    add("--text-batch", 64, "prompts that one rank reads and answers at once before step 1")
    add("--show-every", 25, "print three rollouts, for samples.jsonl too, every so many steps")

    # --weights, --lora, --shard, --seed, --out, --resume, --clip, --eval-batch, ...
    add_run_flags(add, out="runs/cord")

    args = parser.parse_args(argv)
    check_run_flags(args, parser)
    if args.group_size == 1 or args.group_size < 0:
        parser.error(
            "--group-size is 0 (no group reward) or at least 2: one rollout has nothing "
            "to be better than"
        )
    if args.token_loss == "none" and not args.group_size:
        parser.error("with --token-loss none and --group-size 0 nothing is learnt")
    if args.token_loss == "sft" and args.group_size:
        parser.error("--token-loss sft is a baseline of its own: add --group-size 0")
    if min(args.temperature, args.group_temperature) <= 0 or not 0 <= args.top_share <= 1:
        parser.error(
            "temperatures are above 0 (an argmax explores nothing), --top-share is between 0 and 1"
        )
    return args


# ---------------------------------------------------------------------------------------------
# 2. Rollouts: which are drawn, how they are judged, how they are packed

def rollout_kinds(args):
    """The rollouts that are drawn for every prompt of a step."""
    kinds = []
    if args.token_loss == "reverse-kl":
        kinds.append(rollout.Kind(args.temperature, kl=True))
    return kinds + [rollout.Kind(args.group_temperature, group=True)] * args.group_size


def recite(prompts, references):
    """The off-policy baselines learn along the text view's own answer: a Rollout a prompt."""
    recited = []
    for row, example in enumerate(prompts.examples):
        reference = references[example.id]
        answer = {name: reference[name] for name in ("ids", "text", "ended")}
        recited.append(rollout.Rollout(row, temperature=1.0, kl=True, group=False, **answer))
    return recited


def reward(rollouts, prompts, references, verdicts, run):
    """Set the advantages A_i of the group's rollouts, from their rewards r_i; note the log's means.

    A prompt whose reference was cut at the token limit has none: its rollouts leave the group."""
    group = [r for r in rollouts if r.group]
    if not group:
        return
    size = len(group) // len(prompts.examples)                          # N, of every prompt
    for r in group:
        r.group = references[prompts.examples[r.row].id]["ended"]
    group = [r for r in group if r.group]

    # r_i: 1 where the rollout gives the answer that the text view gives, else 0
    asked = []
    for r in group:
        example = prompts.examples[r.row]
        asked.append((example, r.text, references[example.id]["text"]))
    rewards = torch.tensor(verdicts(asked), dtype=torch.float32).view(-1, size)     # [prompts, N]

    # A_i = r_i - mean over the group
    advantages = losses.group_advantages(rewards)
    for r, a_i in zip(group, advantages.flatten().tolist()):
        r.advantage = a_i

    # Groups whose rewards are all alike teach nothing
    mixed = rewards.min(-1).values < rewards.max(-1).values
    run.note_mean("reward", rewards.sum(), over=rewards.numel())
    run.note_mean("signal", mixed.sum(), over=len(rewards))


@dataclasses.dataclass
class CordBatch:
    """A micro-batch of rollouts. Flat axes: [tokens] of all its rollouts, [kl tokens] of those that
    carry L_tok."""
    audio: data.View
    text: data.View | None      # the rollouts that carry L_tok, behind the transcript
    labels: torch.Tensor        # [tokens] int64
    temperature: torch.Tensor   # [tokens]
    advantage: torch.Tensor     # [tokens], 0 where a rollout is not rewarded
    carries_kl: torch.Tensor    # [tokens] bool
    kl_rollouts: list           # the Rollouts of the text view, in its order


def micro_batches(rollouts, prompts, processor, size, device):
    """Rollouts -> CordBatches of at most `size`; what carries no gradient stays out.

    A prompt's rollouts go together, so that they share it; long prompts go with long ones, so that
    little is padded."""
    live = [r for r in rollouts if r.kl or r.advantage]
    live = live or rollouts[:1]             # at least one: every rank must run a backward
    pieces = []
    by_row = sorted(live, key=lambda r: r.row)
    for _, group in itertools.groupby(by_row, key=lambda r: r.row):
        group = list(group)
        pieces += [group[i:i + size] for i in range(0, len(group), size)]

    def sequence_length(piece):
        return len(prompts.audio[piece[0].row]) + sum(len(r.ids) for r in piece)

    parts = [[]]
    for piece in sorted(pieces, key=sequence_length, reverse=True):
        if len(parts[-1]) + len(piece) > size:
            parts.append([])
        parts[-1] += piece
    return [_batch(part, prompts, processor, device) for part in parts]


def _batch(rollouts, prompts, processor, device):
    def by_token(values, dtype):            # one value a rollout -> one a token
        flat = [value for r, value in zip(rollouts, values) for _ in r.ids]
        return torch.tensor(flat, dtype=dtype, device=device)

    kl_rollouts = [r for r in rollouts if r.kl]
    audio = data.audio_view(
        prompts, [r.row for r in rollouts], [r.ids for r in rollouts], processor
    )
    text = None
    if kl_rollouts:
        text = data.pack(
            prompts.text,
            [r.row for r in kl_rollouts],
            [r.ids for r in kl_rollouts],
            processor.tokenizer,
        ).to(device)
    return CordBatch(
        audio=audio.to(device),
        text=text,
        labels=torch.tensor([token for r in rollouts for token in r.ids], device=device),
        temperature=by_token([r.temperature for r in rollouts], torch.float32),
        advantage=by_token([r.advantage for r in rollouts], torch.float32),
        carries_kl=by_token([r.kl for r in rollouts], torch.bool),
        kl_rollouts=kl_rollouts,
    )


# ---------------------------------------------------------------------------------------------
# 3. One step: forward and losses in one module, because DDP synchronises only what runs inside the
#    forward that it wraps

class CordStep(nn.Module):
    """
    Losses of one CordBatch: forward(batch, teacher_hidden, n_kl, n_group) -> (loss, seen).

    teacher_hidden: [kl tokens, hidden] from CordStep.read. n_kl, n_group: rollouts of the GLOBAL
    batch that carry L_tok and L_seq, so that sums over batches and ranks are global means.
    seen, for the log and without gradient: both parts of the loss, "token" and "group"; D_t "kl"
    and "entropy", [kl tokens] each.

    The teacher lives in a dict: no submodule, so that DDP neither broadcasts nor checks it.
    """

    def __init__(self, student, banned, args):
        super().__init__()
        self.args = args
        self.student = student
        self.banned = banned
        self.cord = fused.cord if args.loss == "fused" else losses.cord

        # The teacher is the student's decoder and head: reading needs no audio tower. With LoRA
        # the adapter is switched off, and no copy is needed.
        self.teacher = {"decoder": models.decoder(student),
                        "head": student.get_output_embeddings()}
        reads = args.token_loss in ("reverse-kl", "forward-kl")
        if args.teacher == "initial" and reads and not args.lora:
            on_gpu = student.device.type == "cuda"
            dtype = torch.bfloat16 if on_gpu else student.dtype         # no master weights needed
            for name, part in self.teacher.items():
                self.teacher[name] = models.frozen_copy(part, dtype)

    @torch.no_grad()
    def read(self, batch):
        """p(. | transcript, y_<t): the teacher's last hidden states [kl tokens, hidden]."""
        if batch.text is None or self.args.token_loss == "sft":
            return None
        adapter_off = contextlib.nullcontext()
        if self.args.teacher == "initial":
            adapter_off = models.without_lora(self.teacher["decoder"])
        with adapter_off:
            output = self.teacher["decoder"](**batch.text.inputs, use_cache=False)
        last = output.last_hidden_state                                  # [prompts, seq, hidden]
        return last.flatten(0, 1)[batch.text.predict_positions]

    def forward(self, batch, teacher_hidden, n_kl, n_group):
        args = self.args
        last = models.hear(self.student, **batch.audio.inputs)           # [prompts, seq, hidden]
        student_hidden = last.flatten(0, 1)[batch.audio.predict_positions]       # [tokens, hidden]
        if args.token_loss == "sft":
            return self.sft_loss(batch, student_hidden, n_kl)
        # On every rank, even one without KL tokens: gathering a sharded head is collective
        teacher_head = ranks.unsharded(self.teacher["head"].weight)

        # Weights w_t: the baseline forward KL has none
        weighting = dict(alpha=args.alpha, beta=args.beta, top_share=args.top_share)
        if args.token_loss == "forward-kl":
            weighting = dict(alpha=1.0, beta=1.0)

        # L = sum_t w_t D_t / n_kl - sum_i A_i log q(y_i) / n_group
        lengths = [len(r.ids) for r in batch.kl_rollouts]
        advantage = batch.advantage / max(n_group, 1)                    # [tokens]
        loss, kl, log_q, entropy = self.cord(
            student_hidden,
            models.head_weight(self.student),
            teacher_hidden,
            teacher_head if lengths else None,
            batch.labels,
            lengths=lengths,
            carries_kl=batch.carries_kl,
            advantage=advantage,
            temperature=batch.temperature,
            banned=self.banned,
            divergence_beta=0.0 if args.token_loss == "forward-kl" else 1.0,
            denominator=n_kl,
            **weighting,
        )

        group = -(advantage * log_q).sum()
        seen = {
            "token": loss.detach() - group,
            "group": group,
            "kl": kl[batch.carries_kl],
            "entropy": entropy[batch.carries_kl],
        }
        return loss, seen

    def sft_loss(self, batch, student_hidden, n_kl):
        # The baseline's cross-entropy: L_seq with every A_i = 1, on the text view's own answers
        loss, *_ = self.cord(
            student_hidden,
            models.head_weight(self.student),
            None,
            None,
            batch.labels,
            lengths=[],
            carries_kl=torch.zeros_like(batch.carries_kl),
            advantage=batch.carries_kl / n_kl,
            temperature=batch.temperature,
            banned=self.banned,
        )
        none = student_hidden.new_zeros(0)
        return loss, {"token": loss.detach(), "group": none.sum(), "kl": none, "entropy": none}


# ---------------------------------------------------------------------------------------------
# 4. What the log says of a batch

def note_batch(run, batch, loss, seen):
    """A batch's losses and means for the log, and each rollout's D_t for samples.jsonl."""
    run.note(loss=loss.detach(), token=seen["token"], group=seen["group"])
    tokens = len(seen["kl"])
    run.note_mean("kl", seen["kl"].sum(), over=tokens)
    run.note_mean("entropy", seen["entropy"].sum(), over=tokens)
    if tokens:
        by_rollout = seen["kl"].split([len(r.ids) for r in batch.kl_rollouts])
        for r, divergence in zip(batch.kl_rollouts, by_rollout):
            r.divergence = divergence.tolist()


def show(run, rollouts, prompts, references, verdicts, tokenizer):
    """Three rollouts in the terminal and samples.jsonl, with their most divergent tokens marked."""
    records = rollout.samples(rollouts[:3], prompts, references, verdicts, tokenizer)
    for record in records:
        append_jsonl(run.out / "samples.jsonl", {"step": run.done, **record})
        run.say("  {transcript} | {rollout} | {verdict}".format(**record))


# ---------------------------------------------------------------------------------------------
# 5. The run

def main(argv=None):
    args = parse_flags(argv)
    with Run(args) as run:
        train(args, run)


def train(args, run):
    # 5.1 Data: the whole manifest and every clip are checked before anything trains
    if args.batch_size % run.world:
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of the {run.world} ranks; "
                         "change one")
    train_file, eval_files = args.data, args.eval_data
    if train_file is None:
        import mini.world

        with ranks.rank_zero_first():
            train_file, *test_files = mini.world.spoken(args.seed, small=args.dry_run)
        eval_files = eval_files or test_files
    examples, scored, clip_seconds = run.read_data(train_file, eval_files, require=["transcript"])

    # 5.2 The student, and who judges. Only what an optimizer updates needs float32
    args.student = ranks.of_rank_zero(newest_checkpoint(args.student))
    student, processor = models.load_audio_model(args.student, dtype=run.student_dtype)
    tokenizer = processor.tokenizer
    verdicts = judge.load(args.judge, run.device)
    student.to(run.device).set_attn_implementation("sdpa")      # takes the mask of shared prompts
    used = hearing.check(student, processor, shared_prompts=True)
    models.choose_trained(student, args.train, used, lora=args.lora)

    # 5.3 The step, and the teacher inside it
    banned = torch.tensor(rollout.banned_ids(student, tokenizer), device=run.device)
    cord = CordStep(student, banned, args)
    encode = functools.partial(
        data.encode_prompts,
        processor=processor,
        tokenizer=tokenizer,
        words="transcript",
    )

    # 5.4 What will happen, in a few lines
    steps = args.max_steps or math.ceil(args.epochs * len(examples) / args.batch_size)
    kinds = rollout_kinds(args)
    checkpoint = run.start(steps)
    trainable_count = sum(p.numel() for p in cord.parameters() if p.requires_grad)
    run.say(
        f"{run.device} x {run.world}, {student.dtype} weights; student "
        f"{student.num_parameters():,} parameters, {trainable_count:,} learn; teacher: "
        f"{args.teacher} weights"
    )
    run.say(about_clips(clip_seconds, processor))
    run.say(
        f"{len(examples):,} prompts to learn from, {len(scored):,} to score; "
        f"{args.batch_size // run.world} x {len(kinds)} x {run.world} "
        f"(prompts x rollouts x ranks) = {args.batch_size * len(kinds)} rollouts a step, "
        f"{steps} steps"
    )

    # 5.5 Before: what the student can do as it comes
    def score(when, elsewhere=True):
        return run.evaluate(
            when,
            scored,
            lambda: evaluate.evaluate_views(
                student,
                processor,
                scored,
                elsewhere=elsewhere,
                batch_size=args.eval_batch,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
            ),
        )

    before = None
    if scored and not args.no_eval:
        before = score("before")

    # 5.6 The text view's answers, which the judge compares with
    needed = {}
    for step in range(min(steps, 2) if args.dry_run else steps):
        for example in examples_of_step(examples, step, args.batch_size, args.seed):
            needed[example.id] = example
    to_ask = list(needed.values())
    references = rollout.text_answers(
        student,
        processor,
        to_ask,
        run.out / "references.jsonl",
        batch_size=args.text_batch,
        max_new_tokens=args.max_new_tokens,
    )
    checked = to_ask[:1000]                                     # enough for a percentage
    agreed = verdicts([(e, references[e.id]["text"], e.answer) for e in checked])
    run.say(
        f"judge ({args.judge}): the text view gives the gold answer to "
        f"{100 * sum(agreed) / len(agreed):.1f} % of {len(agreed)} prompts"
    )
    cut = sum(not reference["ended"] for reference in references.values())
    if cut:
        run.say(
            f"{cut} of the text view's {len(references)} answers were cut at --max-new-tokens "
            f"{args.max_new_tokens}: no group reward for their prompts"
        )

    # 5.7 Go on from a checkpoint; DDP or FSDP; the optimizer
    own_weights = cord.teacher["decoder"] is models.decoder(student)
    if args.shard and not own_weights:
        ranks.shard_reader(cord.teacher["decoder"], cord.teacher["head"])
    reader = cord if own_weights else cord.teacher["decoder"]   # whose weights reading needs
    if checkpoint:
        checkpoints.load_model(checkpoint, student)
    model = run.wrap(cord, student)
    trainable = [p for p in cord.parameters() if p.requires_grad]
    groups = parameter_groups(cord, lr=args.lr, weight_decay=0.01)
    Optimizer = SplitAdamW if args.weights == "bfloat16" and not args.lora else torch.optim.AdamW
    optimizer = Optimizer(groups, betas=(0.9, 0.98))
    if checkpoint:
        checkpoints.load_optimizer(checkpoint, cord, optimizer)
    run.checkpoint_parts = dict(
        model=student, processor=processor, beside={}, module=cord, optimizer=optimizer
    )

    # 5.8 The loop
    for step, prompts in run.batches(examples, encode):
        if before and run.evaluation_is_due():
            middle = score(f"eval-{step:07d}", elsewhere=False)
            run.say(f"step {step}: text {middle['text_accuracy']:.1f}  "
                    f"audio {middle['audio_accuracy']:.1f}")

        # 1. y_i ~ q(. | audio): the model answers what it HEARS, in its own words
        rollouts = ranks.with_weights_gathered(model, lambda: rollout.roll_out(
            student, processor, prompts, kinds, key=f"{args.seed} {step}",
            max_new_tokens=args.max_new_tokens))
        run.lap("rollout")
        run.note_mean("length", sum(len(r.ids) for r in rollouts), over=len(rollouts))
        run.note_mean("at_limit", sum(not r.ended for r in rollouts), over=len(rollouts))

        # 2. r_i: is it the answer that the same model gives when it READS?  A_i = r_i - mean
        reward(rollouts, prompts, references, verdicts, run)
        if args.token_loss in ("sft", "forward-kl"):            # the off-policy baselines
            rollouts += recite(prompts, references)

        # 3. Losses are means over the rollouts of the WHOLE step, all ranks and micro-batches
        counts = ranks.sum_over_ranks(
            kl=sum(r.kl for r in rollouts),
            group=sum(r.group for r in rollouts))
        batches = micro_batches(rollouts, prompts, processor, args.micro_batch, run.device)
        # FSDP needs as many batches on every rank: fill up with one that has no gradient
        no_gradient = [dataclasses.replace(rollouts[0], kl=False, advantage=0.0)]
        batches = run.equalised(
            batches, idle=lambda: micro_batches(no_gradient, prompts, processor, 1, run.device)[0])

        # 4. p(. | transcript): the teacher READS the words, then the same y; no gradient
        with models.autocast(student):
            teacher_hidden = ranks.with_weights_gathered(
                reader, lambda: [cord.read(batch) for batch in batches])
        run.lap("scoring")

        # 5. L = sum_t w_t D_t / n_kl - sum_i A_i log q(y_i) / n_group
        for batch, hidden in run.accumulate(list(zip(batches, teacher_hidden))):
            with models.autocast(student):
                loss, seen = model(batch, hidden, counts["kl"], counts["group"])
            (loss * run.world).backward()                       # DDP and FSDP average over ranks
            note_batch(run, batch, loss, seen)

        # 6. Clip and step. A step that is not finite is left out, on every rank alike
        norm = ranks.unsharded(torch.nn.utils.clip_grad_norm_(trainable, args.clip)).item()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, steps)
        if run.finite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.lap("update")

        # 7. What happened?
        run.log(step, ids=[example.id for example in prompts.examples],
                lr=optimizer.param_groups[0]["lr"],
                rollout_tokens_per_second=run.totals["length"] / run.seconds["seconds_rollout"])
        if run.rank == 0 and (run.done == 1 or run.done % args.show_every == 0):
            show(run, [r for r in rollouts if r.kl or args.token_loss == "none"], prompts,
                 references, verdicts, tokenizer)
        run.save_or_stop()

    # 5.9 After
    if before:
        after = score("after")
        run.finish(
            evaluate.report_gap(after, before),
            terms=("kl", "reward"),
            unit="KL per token (nats); mean reward of the groups",
            before=before,
            after=after,
            gap_reduction_percent=evaluate.gap_reduction(before, after),
        )
        if args.data is None and not args.dry_run:
            run.say(f"expected without flags:  {EXPECTED}")
    else:
        run.say(f"{run.out}: trained, and nothing was scored")


if __name__ == "__main__":
    main()
