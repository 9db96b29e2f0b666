"""
Source- and layer-wise distillation (paper A, arXiv 2509.18579): a text LLM teaches an audio model
to reason, layer by layer, while a frozen snapshot of the audio model itself keeps its hearing.

    L = L_top + alpha_layer L_layer + alpha_ac L_ac + alpha_sft L_SFT

    L_top     what the text teacher would say next after READING a description of the clip, against
              what the student says after HEARING it
    L_layer   the same, inside: hidden states of each student layer against those of the teacher
              layer at the same relative depth
    L_ac      the student's hidden states at the AUDIO tokens against those of its own snapshot from
              before training
    L_SFT     cross-entropy on the reference trace and answer

All but L_ac are taken at the positions that predict the response's tokens, which are the same
tokens in both views (data.py).

    python train_source_layer.py                # laptop: the mini world, made on the first run
    python train_source_layer.py --dry-run      # two steps and a small evaluation of everything
    torchrun --nproc_per_node 8 train_source_layer.py \\
        --student Qwen/Qwen2-Audio-7B-Instruct --teacher Qwen/Qwen3-8B --weights bfloat16 --shard \\
        --data cota.jsonl --eval-data mmau.jsonl iemocap5.jsonl --lr 1e-5 --tower-lr 1 \\
        --batch-size 64 --micro-batch 1 --eval-batch 16
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train_source_layer.py ...               # on each node

Table 1 of the paper, row by row (python -m lab.experiments table: all of them, three seeds each):

    SFT only                              --text-kd none --no-acoustic-kd
    top-layer text KD + SFT               --text-kd top --no-acoustic-kd
    skip-layer text KD (1 in 7) + SFT     --text-kd skip:7 --no-acoustic-kd
    layer-wise text KD + SFT              --text-kd layer --no-acoustic-kd
    layer-wise + acoustic KD + SFT        (the default)

Where the paper is silent, and what we do:
1. Divergence of hidden states: JSD of softmaxes over features, standardised with the frozen
   teacher's mean and deviation; raw, a few "massive" features would own it (losses.py). On the mini
   world three seeds do not decide between it and mse at equal strength (python -m lab.experiments
   hidden-seeds). For a small difference it is an eighth of mse: our alphas are 8 times those that
   were best for mse.
2. W_i maps student to teacher width, starts from least squares on a calibration batch, has its own
   learning rate and is saved beside the model, never inside it (layer_map.py).
3. Mean over layer pairs, and over layers in L_ac, so that alpha_layer and alpha_ac mean the same at
   any skip.
4. AdamW, linear warm-up over 3 %, cosine to zero. All learns, the audio tower too (in the mini
   world at the highest rate): a frozen tower would have no hearing to lose.
5. Means are over the tokens of the global batch: neither the number of GPUs nor accumulation
   changes a step. (The start of W_i is fitted micro-batch by micro-batch, where examples have more
   than 128 tokens.)
"""
import math
import re

import torch
import torch.nn as nn

import data
import evaluate
import fused
import layer_map
import losses
import models
from plumbing import checkpoints, hearing, ranks
from plumbing.check import about_clips
from plumbing.files import newest_checkpoint
from plumbing.optimizer import SplitAdamW, learning_rate_factor, parameter_groups
from plumbing.run import Run, add_run_flags, check_run_flags, examples_of_step, flag_parser

# What the default run gives on two cores, per cent (README.md quotes it, a test keeps them equal)
EXPECTED = "AQA 67.7 -> 79.2  SER 80.5 -> 80.9"

# Projections and feature statistics are fitted before the first step, on this many examples, of
# each micro-batch at most this many tokens an example: at 7B, all layers' states of 8,192 tokens
# are 7 GB
CALIBRATION_EXAMPLES = 64
CALIBRATION_TOKENS = 128


# ---------------------------------------------------------------------------------------------
# 1. Flags

def parse_flags(argv=None):
    parser, add = flag_parser(__doc__)

    # models and data
    add("--student", str(models.MINI / "student"), "audio LM (paper: Qwen2.5-Omni-7B)")
    add("--teacher", str(models.MINI / "teacher"), "text LLM that reads (paper: Qwen3-8B)")
    add("--acoustic-teacher", "snapshot", "snapshot (paper), or a model of the student's shape")
    add("--data", None, "manifest with reasoning and description; default: the mini world")
    add("--eval-data", [], "manifests to score; without --data the mini world's test split",
        nargs="+")
    add("--max-seconds", None, "refuse longer clips; default: cut where hearing stops", type=float)

    # the method
    add("--text-kd", "layer", "none | top | skip:K (one student layer in K) | layer (paper's best)")
    add("--acoustic-kd", True, "L_ac: keep the hidden states at audio tokens")
    add("--alpha-layer", 0.4, "weight of L_layer (paper: 0.05, of an unknown divergence)")
    add("--alpha-ac", 4.0, "weight of L_ac (paper: 0.05, of an unknown divergence)")
    add("--alpha-sft", 0.5, "weight of L_SFT (paper: 0.5)")
    add("--divergence", "jsd", "of L_top (paper: jsd); kl: forward", choices=["jsd", "kl"])
    add("--hidden-divergence", "jsd", "of L_layer and L_ac", choices=list(losses.HIDDEN))
    add("--layers", None, "of the mapped student layers, only these (from 1)", type=int, nargs="+")
    add("--corrupt-descriptions", 0.0, "share of their words that are dropped or swapped")
    add("--loss", "fused", "fused.py, or the formulas of losses.py", choices=["fused", "reference"])

    # optimisation
    add("--train", "all", "all, or the decoder with head and projector",
        choices=["decoder", "all"])
    add("--lr", 5e-4, "peak learning rate (paper, 7B: 1e-5)")
    add("--tower-lr", 5.0, "the audio tower's learning rate over --lr (1 for large models)")
    add("--lower-lr", 1.0, "the same for projector, embeddings and lower decoder; 0: frozen")
    add("--projection-lr", 1e-3, "peak learning rate of the W_i: 100 times the paper's 1e-5")
    add("--epochs", 3.0, "passes over the data (paper: 3)")
    add("--batch-size", 16, "examples per step, over all ranks")
    add("--micro-batch", 8, "examples per forward on one rank")

    # evaluation
    add("--max-new-tokens", 80, "tokens of an answer, its trace included (7B with CoTA: 2048)")
    # --weights, --lora, --shard, --seed, --out, --resume, --clip, --eval-batch, ...
    add_run_flags(add, out="runs/source_layer")

    args = parser.parse_args(argv)
    check_run_flags(args, parser)
    if not re.fullmatch(r"none|top|layer|skip:[1-9]\d*", args.text_kd):
        parser.error(
            f"--text-kd {args.text_kd} is none of none, top, skip:K, layer; for the "
            "paper's 1-in-7 write skip:7"
        )
    if args.text_kd == "none" and not args.alpha_sft:
        parser.error(
            "with --text-kd none and --alpha-sft 0 nothing teaches the response; leave one on"
        )
    if args.corrupt_descriptions > 1:
        parser.error("--corrupt-descriptions is a share, between 0 and 1")
    if args.text_kd == "none" and args.corrupt_descriptions:
        parser.error("--corrupt-descriptions needs a text teacher, who reads them")
    if args.layers and args.text_kd in ("none", "top"):
        parser.error("--layers chooses among distilled layers: it needs --text-kd layer or skip:K")
    return args


# ---------------------------------------------------------------------------------------------
# 2. One step: forward and losses in one module, because DDP synchronises only what runs inside the
#    forward that it wraps

class SourceLayerStep(nn.Module):
    """
    Losses of one micro-batch: forward(batch, tokens) -> {"loss", "top", "layer", "acoustic",
    "sft"}, scalars; those that are off are missing.

    tokens: {"response", "audio"}, counts over the global batch, so that summing over micro-batches
    and ranks gives the global mean. teacher and snapshot live in a dict: they are no submodules,
    so that DDP neither broadcasts nor checks them.
    """

    def __init__(self, student, teacher, snapshot, pairs, shared_ids, args):
        super().__init__()
        self.args = args
        self.student = student
        self.frozen = {"teacher": teacher, "snapshot": snapshot}
        self.pairs = pairs                              # [(student layer, teacher layer)], from 1
        self.shared_ids = shared_ids                    # tokens that both vocabularies hold
        self.jsd_ce = losses.jsd_ce
        self.hidden_divergence = losses.HIDDEN[args.hidden_divergence]
        if args.loss == "fused":
            self.jsd_ce = fused.jsd_ce
            self.hidden_divergence = {**losses.HIDDEN, **fused.HIDDEN}[args.hidden_divergence]

        # Taps hand out hidden states of chosen layers at chosen tokens (layer_map.py)
        layers = models.decoder(student).layers
        width = models.decoder(student).config.hidden_size
        self.acoustic_layers = []
        if snapshot is not None:
            self.acoustic_layers = list(range(1, len(layers) + 1))
        self.tap = layer_map.Tap(
            layers, {"response": [s for s, _ in pairs], "audio": self.acoustic_layers}
        )
        if teacher is not None:
            reader = models.decoder(teacher)
            self.teacher_tap = layer_map.Tap(reader.layers, {"response": [t for _, t in pairs]})
            self.projections = layer_map.Projections(pairs, width, reader.config.hidden_size)
        if snapshot is not None:
            self.snapshot_tap = layer_map.Tap(
                models.decoder(snapshot).layers, {"audio": self.acoustic_layers}
            )
            self.statistics = layer_map.Statistics(self.acoustic_layers, width)

    def hear(self, batch):
        """The student on the audio view -> its last hidden states at the response's positions
        [tokens, hidden], and the tapped ones {"response", "audio"}: {layer: [tokens, hidden]}."""
        view = batch.audio
        with self.tap.at(response=view.predict_positions, audio=view.audio_positions) as tapped:
            last = models.hear(self.student, **view.inputs)              # [batch, seq, hidden]
        return last.flatten(0, 1)[view.predict_positions], tapped

    @torch.no_grad()
    def read(self, batch):
        """The text teacher on the text view -> the same two, at the same response tokens."""
        view = batch.text
        with self.teacher_tap.at(response=view.predict_positions) as tapped:
            last = models.read(self.frozen["teacher"], **view.inputs)
        return last.flatten(0, 1)[view.predict_positions], tapped

    @torch.no_grad()
    def remember(self, batch):
        """The hidden states of the snapshot (or --acoustic-teacher) at audio tokens. The decoder is
        causal, so that its input can stop behind the last of them."""
        view = data.audio_prefix(batch.audio)
        snapshot = self.frozen["snapshot"]
        with models.without_lora(snapshot):
            with self.snapshot_tap.at(audio=view.audio_positions) as tapped:
                models.hear(snapshot, **view.inputs)
        return tapped

    def forward(self, batch, tokens):
        args = self.args
        student_hidden, student_tapped = self.hear(batch)                # [tokens, hidden]
        teacher_hidden = teacher_head = None
        if self.frozen["teacher"] is not None:
            teacher_hidden, teacher_tapped = self.read(batch)            # [tokens, teacher hidden]
            teacher_head = ranks.unsharded(models.head_weight(self.frozen["teacher"]))

        # L_top + alpha_sft L_SFT in one pass over the vocabulary; top and sft carry no gradient
        loss, top, sft = self.jsd_ce(
            student_hidden,
            models.head_weight(self.student),
            teacher_hidden,
            teacher_head,
            batch.labels,
            ce_weight=args.alpha_sft,
            beta=0.5 if args.divergence == "jsd" else 0.0,
            shared_ids=self.shared_ids,
            denominator=tokens["response"],
        )
        parts = {}
        if teacher_hidden is not None:
            parts["top"] = top
        if args.alpha_sft:
            parts["sft"] = sft

        # + alpha_layer L_layer: student layer s, projected to the teacher's width, against layer t
        if self.pairs:
            total = 0.0
            for i, (s, t) in enumerate(self.pairs):
                total = total + self.hidden_divergence(
                    self.projections(i, student_tapped["response"][s]),
                    teacher_tapped["response"][t],
                    mean=self.projections.mean[i],
                    std=self.projections.std[i],
                    denominator=tokens["response"],
                )
            parts["layer"] = total / len(self.pairs)
            loss = loss + args.alpha_layer * parts["layer"]

        # + alpha_ac L_ac: every layer against the snapshot's, where the sound is
        if self.acoustic_layers:
            snapshot_tapped = self.remember(batch)
            total = 0.0
            for layer in self.acoustic_layers:
                mean, std = self.statistics[layer]
                total = total + self.hidden_divergence(
                    student_tapped["audio"][layer],
                    snapshot_tapped["audio"][layer],
                    mean=mean,
                    std=std,
                    denominator=tokens["audio"],
                )
            parts["acoustic"] = total / len(self.acoustic_layers)
            loss = loss + args.alpha_ac * parts["acoustic"]
        return {**parts, "loss": loss}

    @torch.no_grad()
    def calibrate(self, batches):
        """Fit W_i and the feature statistics on a few micro-batches, before training."""
        student_states = {s: [] for s, _ in self.pairs}
        teacher_states = {t: [] for _, t in self.pairs}
        audio_states = {layer: [] for layer in self.acoustic_layers}

        def sample(hidden, batch):                      # [tokens, width] -> fewer, evenly spaced
            most = CALIBRATION_TOKENS * len(batch.examples)
            return hidden[::max(1, math.ceil(len(hidden) / most))].clone()

        for batch in batches:
            if self.pairs:
                _, student_tapped = self.hear(batch)
                _, teacher_tapped = self.read(batch)
                for s, t in self.pairs:
                    student_states[s].append(sample(student_tapped["response"][s], batch))
                    teacher_states[t].append(sample(teacher_tapped["response"][t], batch))
            if self.acoustic_layers:
                for layer, hidden in self.remember(batch)["audio"].items():
                    audio_states[layer].append(sample(hidden, batch))

        for i, (s, t) in enumerate(self.pairs):
            self.projections.fit(i, torch.cat(student_states[s]), torch.cat(teacher_states[t]))
        for layer in self.acoustic_layers:
            self.statistics.fit(layer, torch.cat(audio_states[layer]))


# ---------------------------------------------------------------------------------------------
# 3. The run

def main(argv=None):
    args = parse_flags(argv)
    with Run(args) as run:
        train(args, run)


def train(args, run):
    # 3.1 Data: the whole manifest and every clip are checked before anything trains
    forward_size = args.micro_batch * run.world
    if args.batch_size % forward_size:
        raise SystemExit(f"--batch-size {args.batch_size} is no multiple of {args.micro_batch} x "
                         f"{run.world} = {forward_size} (--micro-batch x ranks); change one")
    train_file, eval_files = args.data, args.eval_data
    if train_file is None:
        import mini.world

        with ranks.rank_zero_first():
            small = args.dry_run
            train_file = mini.world.build("train", seed=args.seed, per_task=16 if small else None)
            if not eval_files:
                test_file = mini.world.build("test", seed=args.seed, per_task=8 if small else 300)
                eval_files = [test_file]
    require = ["reasoning"] if args.text_kd == "none" else ["reasoning", "description"]
    examples, scored, clip_seconds = run.read_data(train_file, eval_files, require=require)
    if args.corrupt_descriptions:
        examples = data.corrupt_descriptions(examples, args.corrupt_descriptions, args.seed)

    # 3.2 The student. Only what an optimizer updates needs float32; frozen weights do without
    args.student = ranks.of_rank_zero(newest_checkpoint(args.student))
    student, processor = models.load_audio_model(args.student, dtype=run.student_dtype)
    used = hearing.check(student.to(run.device), processor)

    # 3.3 Its snapshot, which remembers what audio tokens looked like before training
    snapshot = None
    if args.acoustic_kd and args.acoustic_teacher == "snapshot" and args.lora:
        snapshot = student                              # without its adapter it is what it was
    elif args.acoustic_kd:
        if args.acoustic_teacher == "snapshot":
            snapshot = models.frozen_copy(student, run.frozen_dtype)
        else:
            args.acoustic_teacher = ranks.of_rank_zero(newest_checkpoint(args.acoustic_teacher))
            snapshot = models.load_same_shape(args.acoustic_teacher, student, run.frozen_dtype)
            snapshot.to(run.device).requires_grad_(False)
        snapshot.set_output_embeddings(nn.Identity())   # it is never asked for a word
        if args.shard:
            ranks.shard(snapshot, models.blocks(snapshot))

    # 3.4 The teacher, a text LLM, and the tokens that it shares with the student
    teacher = tokenizer = shared_ids = student_to_teacher = None
    if args.text_kd != "none":
        teacher, tokenizer = models.load_text_model(args.teacher, dtype=run.frozen_dtype)
        hearing.check_teacher(teacher.to(run.device).requires_grad_(False))
        if args.shard:
            ranks.shard_reader(models.decoder(teacher), teacher.get_output_embeddings())
        student_ids, teacher_ids, summary = data.shared_vocabulary(processor.tokenizer, tokenizer)
        shared_ids = (student_ids.to(run.device), teacher_ids.to(run.device))
        vocabulary_size = len(models.head_weight(student))
        student_to_teacher = data.token_map(student_ids, teacher_ids, vocabulary_size)
        run.say(f"vocabulary: {summary}")

    # 3.5 What learns, and from which layer to which
    frozen = models.lower_half(student) if args.lower_lr == 0 else ()
    models.choose_trained(student, args.train, used, frozen=frozen, lora=args.lora)
    pairs = []
    if args.text_kd not in ("none", "top"):
        every = 1 if args.text_kd == "layer" else int(args.text_kd.removeprefix("skip:"))
        student_depth = len(models.decoder(student).layers)
        teacher_depth = len(models.decoder(teacher).layers)
        try:
            pairs = layer_map.pairs(student_depth, teacher_depth, every=every, only=args.layers)
        except ValueError as error:
            raise SystemExit(f"--layers: {error}")
    step_module = SourceLayerStep(student, teacher, snapshot, pairs, shared_ids, args)
    step_module = step_module.to(run.device)

    def micro_batches(examples):
        return [
            data.collate(
                examples[i:i + args.micro_batch],
                processor,
                tokenizer or processor.tokenizer,
                words="description" if teacher else None,
                student_to_teacher=student_to_teacher,
            )
            for i in range(0, len(examples), args.micro_batch)
        ]

    # 3.6 What will happen, in a few lines
    steps = args.max_steps or math.ceil(args.epochs * len(examples) / args.batch_size)
    checkpoint = run.start(steps)
    trainable_count = sum(p.numel() for p in step_module.parameters() if p.requires_grad)
    accumulation = args.batch_size // forward_size
    run.say(
        f"{run.device} x {run.world}, {student.dtype} weights; student "
        f"{student.num_parameters():,} parameters, {trainable_count:,} learn; teacher "
        f"{teacher.num_parameters() if teacher else 0:,}"
    )
    run.say(about_clips(clip_seconds, processor))
    run.say(
        f"{len(examples):,} examples to learn from, {len(scored):,} to score; "
        f"{args.micro_batch} x {accumulation} x {run.world} (micro-batch x accumulation x "
        f"ranks) = {args.batch_size} examples a step, {steps} steps"
    )
    arrows = ", ".join(f"{s} <- {t}" for s, t in pairs)
    run.say(f"layers, student <- teacher: {arrows or 'none'}")

    # 3.7 Before: what the student can do as it comes
    def score(when):
        return run.evaluate(
            when,
            scored,
            lambda: evaluate.evaluate_model(
                student,
                processor,
                scored,
                batch_size=args.eval_batch,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
            ),
        )

    before = None
    if scored and not args.no_eval:
        before = score("before")

    # 3.8 Go on from a checkpoint, or fit the projections; then DDP or FSDP, and the optimizer
    beside = {}
    if pairs:
        beside["projections.safetensors"] = step_module.projections
    if snapshot is not None:
        beside["statistics.safetensors"] = step_module.statistics
    if checkpoint:
        checkpoints.load_model(checkpoint, student, beside, layer_map.load)
    elif beside:
        number = min(CALIBRATION_EXAMPLES, len(examples))
        calibration = micro_batches(examples_of_step(examples, 0, number, args.seed + 1))
        with models.autocast(student):
            step_module.calibrate(batch.to(run.device) for batch in calibration)
    model = run.wrap(step_module, student)

    trainable = [p for p in step_module.parameters() if p.requires_grad]
    special = [                                             # parameters, lr, weight decay
        (models.lower_half(student), args.lower_lr * args.lr, 0.01),
        (models.tower(student).parameters(), args.tower_lr * args.lr, 0.01),
    ]
    if pairs:
        special.append((step_module.projections.parameters(), args.projection_lr, 0.0))
    groups = parameter_groups(step_module, lr=args.lr, weight_decay=0.01, special=special)
    Optimizer = SplitAdamW if args.weights == "bfloat16" and not args.lora else torch.optim.AdamW
    optimizer = Optimizer(groups, betas=(0.9, 0.98))
    if checkpoint:
        checkpoints.load_optimizer(checkpoint, step_module, optimizer)
    run.checkpoint_parts = dict(
        model=student,
        processor=processor,
        beside=beside,
        module=step_module,
        optimizer=optimizer,
    )

    # 3.9 The loop
    for step, batches in run.batches(examples, micro_batches):
        if before and run.evaluation_is_due():
            score(f"eval-{step:07d}")

        # 1. Losses are means over the tokens of the WHOLE step, all ranks and micro-batches
        batches = [batch.to(run.device) for batch in batches]
        tokens = ranks.sum_over_ranks(
            response=sum(len(batch.labels) for batch in batches),
            audio=sum(len(batch.audio.audio_positions) for batch in batches))

        # 2. L = L_top + alpha_layer L_layer + alpha_ac L_ac + alpha_sft L_SFT
        for batch in run.accumulate(batches):
            with models.autocast(student):
                parts = model(batch, tokens)
            (parts["loss"] * run.world).backward()          # DDP and FSDP average over the ranks
            run.note(**{name: part.detach() for name, part in parts.items()})

        # 3. Clip and step. A step that is not finite is left out, on every rank alike
        norm = ranks.unsharded(torch.nn.utils.clip_grad_norm_(trainable, args.clip)).item()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, steps)
        if run.finite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. What happened?
        ids = [example.id for batch in batches for example in batch.examples]
        run.log(step, ids, lr=optimizer.param_groups[0]["lr"],
                tokens_per_second=(tokens["response"] + tokens["audio"]) / run.step_seconds())
        run.save_or_stop()

    # 3.10 After
    if before:
        after = score("after")
        run.finish(
            evaluate.report_change(before, after),
            terms=("sft", "top", "layer", "acoustic"),
            unit="loss term, unweighted",
            scale="log",
            before=before,
            after=after,
        )
        if args.data is None and not args.dry_run:
            run.say(f"expected without flags:  {EXPECTED}")
    else:
        run.say(f"{run.out}: trained, and nothing was scored")


if __name__ == "__main__":
    main()
