"""
The mini world's two models, from nothing: python -m mini.world pretrain (a GPU if there is one).

They stand in the papers' proportions: the student is a Qwen2-Audio with 7 decoder layers, the
teacher a wider Qwen3 with 9 (28:36). The teacher reads descriptions and reasons better than the
student; the student describes what it hears well, but has hardly practised answering questions
about sound: that is the room to be taught. mini/figures.json holds what each can do.

First the ear (CTC), then reading (next token), then listening. Trained end to end from scratch the
decoder would never listen: guessing from the text is the easier way down, so the audio tower
learns to hear before anything reads it.
"""
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import time
from functools import partial

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import data
import rollout
from lab.shapes import STUDENT_SPECIALS, STUDENT_TEMPLATE, TEACHER_SPECIALS, TEACHER_TEMPLATE
from mini.world import (
    CACHE,
    KEPT,
    MAX_SECONDS,
    MINI,
    SAMPLE_RATE,
    SPLITS,
    TAUGHT,
    WORLD,
    build,
    make_record,
)
from models import load_audio_model, load_text_model

# Kinds that are still wrong after 50,000 texts: one token in fifty says which name goes with which
# number
HARD = {"comparison", "count"}
# Sequences in a step of listening; few questions, so that there is room to be taught
MIX = {"text": 6, "describe": 12, "emotion": 5, "ask": 1}

# ------------------------------------------------------------------------------------------------
# 1. Texts and tokenizers


def as_example(record, **changes):
    """A record as the Example that data.py's prompt functions read."""
    names = {field.name for field in dataclasses.fields(data.Example)}
    fields = {name: value for name, value in record.items() if name in names}
    return data.Example(**{**fields, "where": record["id"], **changes})


CAPTIONING = {"question": "Describe the audio.", "choices": [], "reasoning": None}


def describe(record):
    """The same clip as a captioning example."""
    return as_example(record, answer=record["description"], **CAPTIONING)


def make_tokenizers(seed):
    """Byte-level BPE over the world's texts -> (student's, teacher's): the same words, other
    special tokens, as Qwen2-Audio and Qwen3 have them."""
    corpus = ["user\n", "assistant\n"] * 100
    for task in SPLITS["pretrain"]:
        for i in range(3000):
            record = make_record(task, i, "tokenizer", seed)
            asked, described = as_example(record), describe(record)
            corpus += [data.question_text(asked), data.response_text(asked)]
            corpus += [data.response_text(described), "\n" + record["description"]]
    return [
        make_tokenizer(corpus, STUDENT_SPECIALS, STUDENT_TEMPLATE),
        make_tokenizer(corpus, TEACHER_SPECIALS, TEACHER_TEMPLATE),
    ]


def make_tokenizer(corpus, specials, template):
    bpe = Tokenizer(models.BPE())
    # A tag of the four-stage trace stays in one piece, so that sequences stay short
    words = Regex(r"</?[A-Z]+>| ?\p{L}+| ?[^\s\p{L}]|\s")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(words, "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------------------------------------------
# 2. Two tiny models in the hub's layout. The configs are ordinary ones: only the numbers are small.


def make_models(seed):
    """Untrained -> (student, processor, teacher, teacher's tokenizer)."""
    student_tokenizer, teacher_tokenizer = make_tokenizers(seed)
    ears = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=int(MAX_SECONDS))
    processor = transformers.Qwen2AudioProcessor(
        ears, student_tokenizer, chat_template=STUDENT_TEMPLATE
    )
    ids = {
        "bos_token_id": None,
        "eos_token_id": student_tokenizer.eos_token_id,
        "pad_token_id": student_tokenizer.pad_token_id,
    }
    same = dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **ids,
    )
    audio_config = dict(
        num_mel_bins=80,
        d_model=128,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=384,
        max_source_positions=int(MAX_SECONDS * 50),
    )
    text_config = dict(
        model_type="qwen2",
        vocab_size=rows(student_tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=7,
        **same,
    )
    student_config = transformers.Qwen2AudioConfig(
        audio_config=audio_config,
        text_config=text_config,
        audio_token_index=processor.audio_token_id,
        **ids,
    )
    teacher_config = transformers.Qwen3Config(
        vocab_size=rows(teacher_tokenizer) + 64,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=9,
        head_dim=32,
        **same,
    )
    torch.manual_seed(seed)
    student = transformers.Qwen2AudioForConditionalGeneration(student_config)
    open_ears(student.model.audio_tower, seed)
    teacher = transformers.Qwen3ForCausalLM(teacher_config)
    open_minds(student, seed)
    open_minds(teacher, seed)
    return student, processor, teacher, teacher_tokenizer


def rows(tokenizer):
    """As in the real pair, the embedding has padding rows."""
    return math.ceil(len(tokenizer) / 64) * 64


@torch.no_grad()
def open_ears(tower, seed):
    """What from-scratch training of the audio tower needs and pretrained checkpoints bring along:
    sinusoids as positions, as in Whisper, and weights that pass a signal on (the library's 0.02 is
    meant for widths of thousands)."""
    generator = torch.Generator().manual_seed(seed)
    half = tower.config.d_model // 2
    rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angle = torch.arange(tower.max_source_positions)[:, None] * rates
    tower.embed_positions.weight.copy_(torch.cat([angle.sin(), angle.cos()], 1))
    for name, p in tower.named_parameters():
        if p.dim() >= 2 and "embed" not in name:
            gain = (2 if p.dim() == 3 else 1) ** 0.5  # convolutions feed a GELU
            p.copy_(torch.randn(p.shape, generator=generator) * gain / p[0].numel() ** 0.5)
    tower.embed_positions.weight.requires_grad_(False)


@torch.no_grad()
def open_minds(model, seed):
    """The same for a decoder and its head: 1 over the root of the fan-in; what is added to the
    residual stream is smaller the deeper the model. From the library's 0.02 at half the learning
    rate, 350 steps of the teacher's reading leave twice the loss (0.16, not 0.07)."""
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.get_text_config().num_hidden_layers
    decoder = getattr(model.model, "language_model", model.model)
    for name, p in [*decoder.named_parameters(), *model.lm_head.named_parameters()]:
        if p.dim() != 2:
            continue
        std = 0.1
        if "embed" not in name:
            adds = "o_proj" in name or "down_proj" in name
            std = p.shape[1] ** -0.5 * ((2 * layers) ** -0.5 if adds else 1)
        p.copy_(torch.randn(p.shape, generator=generator) * std)


# ------------------------------------------------------------------------------------------------
# 3. The ear


def learning_rate(step, steps, peak):
    """Linear warm-up over the first 5 %, then a cosine to a tenth of the peak."""
    warm = max(1, steps // 20)
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1, (step + 1) / warm) * cosine


def optimise(name, steps, peak, parameters, loss_of_step):
    """AdamW over `parameters`; loss_of_step(step) returns a loss. Prints the running mean."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    mean = None
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 49 or step + 1 == steps:
            took = time.time() - start
            print(f"{name} {step + 1}/{steps} loss {mean:.4f} {took:.0f} s", flush=True)


def load_split(split, processor, seed, **which):
    """Records and mel features of a split -> (records, mels [clips, 80, 300] in 16 bit, frames per
    clip after the tower's stride of 2)."""
    manifest = build(split, seed=seed, **which)
    records = []
    for line in map(json.loads, open(manifest, encoding="utf-8")):
        records.append(make_record(line["task"], int(line["id"][-5:]), split, seed))
    mels, frames = [], []
    for start in tqdm(range(0, len(records), 64), desc=f"mel features of {split}"):
        paths = [manifest.parent / r["audio"] for r in records[start : start + 64]]
        features = processor.feature_extractor(
            [soundfile.read(path, dtype="float32")[0] for path in paths],
            sampling_rate=SAMPLE_RATE,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        mels.append(features["input_features"].half())
        frames.append((features["attention_mask"].sum(-1) - 1) // 2 + 1)
    return records, torch.cat(mels), torch.cat(frames)


def hear(tower, mels, frames, device):
    """The audio tower as the full model runs it, padding masked -> [clips, 75, d_model];
    frames // 2 of the 75 are sound."""
    positions = torch.arange(tower.max_source_positions, device=device)
    padding = positions[None] >= frames.to(device)[:, None]  # before pooling by 2
    mask = torch.zeros(padding.shape, device=device)
    mask = mask.masked_fill(padding, torch.finfo(torch.float32).min)[:, None, None, :]
    mask = mask.expand(-1, -1, len(positions), -1)
    return tower(mels.to(device).float(), attention_mask=mask).last_hidden_state


def flat_start(record, frames, number):
    """A first guess at which word is heard in which frame, as in classical speech recognition: one
    after the other, spoken words as long as their letters, sounds and notes equally long; the last
    frame of each is silence. -> [frames]"""
    words = record["ctc"]
    lengths = [len(w) if record["transcript"] else 1 for w in words]
    ends = np.cumsum([0] + lengths) / sum(lengths) * frames
    guess = torch.zeros(frames, dtype=torch.long)
    for word, start, end in zip(words, ends, ends[1:]):
        guess[int(start) : max(int(start) + 1, int(end) - 1)] = number[word]
    return guess


def ctc_words(records):
    """Everything an ear may write down -> {word: number}; 0 is CTC's blank."""
    words = set()
    for record in records:
        words |= set(record["ctc"])
    return {word: i for i, word in enumerate(sorted(words), 1)}


def pretrain_ear(ear, records, mels, frames, *, steps, batch, seed, device):
    """CTC: words of speech, names of sounds, note steps, and a label for voice or emotion; ear:
    {"tower", "head"}. Every 25th clip is held out."""
    number = ctc_words(records)
    train = torch.tensor([i for i in range(len(records)) if i % 25])
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step):
        clips = train[torch.randint(len(train), (batch,), generator=generator)]
        batch_mels = mels[clips].float()
        # SpecAugment: two bands of the spectrum go missing
        for low in torch.randint(0, 70, (2,), generator=generator).tolist():
            batch_mels[:, low : low + 6] = batch_mels.amin((1, 2), keepdim=True)
        hidden = hear(ear["tower"], batch_mels, frames[clips], device)
        log_p = ear["head"](hidden).float().log_softmax(-1)  # [batch, 75, words + 1]

        # What is heard, in its order
        chosen = [records[i] for i in clips.tolist()]
        targets = [torch.tensor([number[w] for w in record["ctc"]]) for record in chosen]
        tokens = (frames[clips] // 2).tolist()  # audio tokens per clip
        loss = F.ctc_loss(
            log_p.transpose(0, 1),
            torch.cat(targets).to(device),
            torch.tensor(tokens, device=device),
            torch.tensor([len(target) for target in targets], device=device),
            zero_infinity=True,
        )
        # Guess where things are first, then let CTC find it (not measured apart)
        trust = max(0.0, 2 - 4 * step / steps)
        if trust == 0:
            return loss
        guesses = [flat_start(record, n, number) for record, n in zip(chosen, tokens)]
        told = torch.cat([row[:n] for row, n in zip(log_p, tokens)])
        return loss + trust * F.nll_loss(told, torch.cat(guesses).to(device))

    ear["tower"].train()
    trainable = [p for p in ear.parameters() if p.requires_grad]
    optimise("hearing", steps, 2.5e-3, trainable, loss_of_step)


@torch.no_grad()
def written_down(ear, records, mels, frames, device):
    """Share of the held-out clips that the ear writes down without a fault -> {task: per cent}."""
    tower = ear["tower"].eval()
    words = [None, *ctc_words(records)]
    exact = {}
    for clips in torch.arange(0, len(records), 25).split(100):
        best = ear["head"](hear(tower, mels[clips], frames[clips], device)).argmax(-1).cpu()
        for i, path in zip(clips.tolist(), best):
            path = torch.unique_consecutive(path[: frames[i] // 2])
            written = [words[p] for p in path if p > 0]
            exact.setdefault(records[i]["task"], []).append(written == records[i]["ctc"])
    return {task: per_cent(hits) for task, hits in exact.items()}


def per_cent(hits):
    return round(100 * sum(hits) / len(hits), 1)


# ------------------------------------------------------------------------------------------------
# 4. Reading and listening


def encode(tokenizer, prompt, example):
    """-> (ids, labels) of prompt and response: the response is what is learnt."""
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response = data.encode_response(tokenizer, data.response_text(example))
    return prompt + response, [-100] * len(prompt) + response


def pad_right(pairs, pad, device):
    """[(ids, labels)] -> input ids [batch, seq], attention mask, labels (-100: not learnt)."""
    ids, labels = zip(*pairs)
    masks = [[1] * len(row) for row in ids]
    padded = []
    for rows, value in ((ids, pad), (masks, 0), (labels, -100)):
        rows = [torch.tensor(row) for row in rows]
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        padded.append(rows.to(device))
    return padded


def read_loss(decoder, head, embeds, mask, labels):
    """Mean next-token cross-entropy over response tokens; the head runs on those alone.
    embeds [batch, seq, hidden]"""
    with torch.autocast(embeds.device.type, torch.bfloat16, enabled=embeds.is_cuda):
        out = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        learnt = labels[:, 1:] != -100
        logits = head(out.last_hidden_state[:, :-1][learnt]).float()  # [tokens, vocab]
        return F.cross_entropy(logits, labels[:, 1:][learnt])


def text_pair(tokenizer, rng, seed, kinds=None):
    """A fresh text-only example: words for the sound (mostly the description, sometimes the
    transcript), question, trace, answer."""
    while True:
        task = rng.choices(["speech", "sound", "music", "emotion"], [6, 4, 1, 1])[0]
        record = make_record(task, rng.randrange(10**9), "reading", seed)
        if kinds is None or record["sub-category"] in kinds:
            break
    words = record["description"]
    if task == "speech" and rng.random() < 0.3:
        words = record["transcript"]
    example = as_example(record)
    prompt = data.text_prompt(tokenizer, words, data.question_text(example))
    return encode(tokenizer, prompt, example)


def pretrain_reading(name, decoder, head, tokenizer, *, steps, seed, device, drill=False):
    """Descriptions, questions, traces: text without end, every example new. The teacher's whole
    schooling, and the student's first. drill: every second text is of a HARD kind."""
    if drill:
        name += " drill"
    rng = random.Random(f"{seed} {name}")

    def loss_of_step(step):
        kinds = [HARD if drill and i % 2 else None for i in range(24)]
        pairs = [text_pair(tokenizer, rng, seed, kind) for kind in kinds]
        ids, mask, labels = pad_right(pairs, tokenizer.pad_token_id, device)
        return read_loss(decoder, head, decoder.embed_tokens(ids), mask, labels)

    decoder.train()
    trainable = [*decoder.parameters(), *head.parameters()]
    optimise(name, steps, 1e-3 if drill else 3e-3, trainable, loss_of_step)


def pretrain_listening(student, processor, records, mels, frames, *, steps, seed, device):
    """Describing and emotion from audio, and a little answering about sound, while reading goes
    on. The audio tower stays as it is."""
    rng = random.Random(f"{seed} listening")
    tokenizer = processor.tokenizer
    model = student.model
    with torch.no_grad():
        heard = []
        for i in range(0, len(mels), 100):
            hidden = hear(model.audio_tower, mels[i : i + 100], frames[i : i + 100], device)
            heard.append(hidden.half().cpu())
        heard = torch.cat(heard)  # [clips, 75, d_model]
    tokens = frames // 2
    clips_of = {task: [] for task in SPLITS["pretrain"]}
    for i, record in enumerate(records):
        clips_of[record["task"]].append(i)
    taught = [i for task in TAUGHT for i in clips_of[task]]

    def loss_of(pairs, sound=None):
        ids, mask, labels = pad_right(pairs, tokenizer.pad_token_id, device)
        embeds = model.get_input_embeddings()(ids)
        if sound is not None:
            places = (ids == processor.audio_token_id)[..., None]
            projected = model.multi_modal_projector(sound).to(embeds.dtype)
            embeds = embeds.masked_scatter(places, projected)
        return read_loss(model.language_model, student.lm_head, embeds, mask, labels)

    def audio_pair(i, example):
        prompt = data.audio_prompt(processor, data.question_text(example))
        places = processor.audio_token * int(tokens[i])
        return encode(tokenizer, prompt.replace(processor.audio_token, places), example)

    def loss_of_step(step):
        texts = [text_pair(tokenizer, rng, seed) for _ in range(MIX["text"])]
        loss = loss_of(texts)
        batch = [(rng.randrange(len(records)), describe) for _ in range(MIX["describe"])]
        batch += [(rng.choice(clips_of[KEPT]), as_example) for _ in range(MIX["emotion"])]
        batch += [(rng.choice(taught), as_example) for _ in range(MIX["ask"])]
        sound = torch.cat([heard[i, : tokens[i]] for i, _ in batch])  # [audio tokens, d_model]
        pairs = [audio_pair(i, make(records[i])) for i, make in batch]
        return loss + loss_of(pairs, sound.to(device).float())

    student.train()
    trainable = []
    for name, p in student.named_parameters():
        if p.requires_grad and "audio_tower" not in name:
            trainable.append(p)
    optimise("listening", steps, 1.5e-3, trainable, loss_of_step)


# ------------------------------------------------------------------------------------------------
# 5. What the two models can do


def words_right(response, wanted):
    """The share of words in their place."""
    wanted = wanted.split()
    return sum(a == b for a, b in zip(response.split(), wanted)) / len(wanted)


def figures(student, processor, teacher, tokenizer, *, seed, per_task=300):
    """What the two models can do, on the test split -> {name: {task: per cent}}. Reading is scored
    on the same questions as listening."""
    examples = data.read_manifest(build("test", seed=seed, per_task=per_task))
    captions = [dataclasses.replace(e, answer=e.description, **CAPTIONING) for e in examples]
    greedy = dict(batch_size=100, max_new_tokens=80, temperature=0)
    read = dict(view="text", words="description", **greedy)
    found = {}
    for name, model, reader, asked, how in (
        ("teacher reads", teacher, tokenizer, examples, read),
        ("student reads", student, processor, examples, read),
        ("student listens", student, processor, examples, greedy),
        ("student describes, words right", student, processor, captions, greedy),
    ):
        score = words_right if asked is captions else str.__eq__
        hits = {}
        for example, output in zip(asked, rollout.generate(model, reader, asked, **how)):
            response = data.parse_response(output)["response"] or ""
            hits.setdefault(example.task, []).append(score(response, example.answer))
        found[name] = {task: per_cent(right) for task, right in hits.items()}
    return found


# ------------------------------------------------------------------------------------------------
# 6. All of it, in parts that a killed run need not repeat


def stage(folder, name, module, train):
    """Train one part of the models, or take it from a run that finished it and was killed later."""
    path = folder / f"{name}.safetensors"
    if path.exists():
        module.load_state_dict(load_file(path))
        print(f"{name}: found in {path}")
        return
    train()
    tensors = {key: t.detach().contiguous() for key, t in module.state_dict().items()}
    save_file(tensors, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def save_mini(name, model, reader):
    folder = MINI / name
    copy.deepcopy(model).half().save_pretrained(folder)
    reader.save_pretrained(folder)

    # The names that transformers 4 knows too: a run's checkpoints carry these files as they are
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(config, indent=2) + "\n")
    if hasattr(reader, "feature_extractor"):
        reader.feature_extractor.save_pretrained(folder)


def pretrain_teacher(folder, args, device):
    """The teacher's whole schooling is reading."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    _, _, teacher, tokenizer = make_models(args.seed)
    teacher.to(device)
    same = dict(seed=args.seed, device=device)
    read = partial(pretrain_reading, "teacher", teacher.model, teacher.lm_head, tokenizer, **same)
    stage(folder, "teacher", teacher, partial(read, steps=args.teacher_steps))
    drill = partial(read, steps=args.drill_steps, drill=True)
    stage(folder, "teacher-drill", teacher, drill)
    save_mini("teacher", teacher, tokenizer)


def pretrain_student(folder, args, device):
    """The student hears, then reads, then listens."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    student, processor, _, _ = make_models(args.seed)
    clips = load_split("pretrain", processor, args.seed)
    tower = student.model.audio_tower
    head = torch.nn.Linear(tower.config.d_model, len(ctc_words(clips[0])) + 1)
    ear = torch.nn.ModuleDict({"tower": tower, "head": head})
    ear.to(device)
    student.to(device)
    same = dict(seed=args.seed, device=device)

    hearing = partial(pretrain_ear, ear, *clips, steps=args.ear_steps, batch=16, **same)
    stage(folder, "ear", ear, hearing)
    (folder / "heard.json").write_text(json.dumps(written_down(ear, *clips, device)))

    decoder = student.model.language_model
    tokenizer = processor.tokenizer
    read = partial(pretrain_reading, "student", decoder, student.lm_head, tokenizer, **same)
    stage(folder, "reader", student, partial(read, steps=args.reading_steps))
    stage(folder, "reader-drill", student, partial(read, steps=args.drill_steps, drill=True))

    steps = args.listening_steps
    listening = partial(pretrain_listening, student, processor, *clips, steps=steps, **same)
    stage(folder, "student", student, listening)
    save_mini("student", student, processor)


def pretrain(args):
    """Teacher and student side by side, each with half of the cores; then say what they can do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = CACHE / f"pretrain{WORLD}-seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    build("pretrain", seed=args.seed)
    processes = multiprocessing.get_context("spawn")
    beside = processes.Process(target=pretrain_teacher, args=(folder, args, device))
    beside.start()
    try:
        pretrain_student(folder, args, device)
    finally:
        beside.join()
    if beside.exitcode:
        raise SystemExit(
            "the teacher's pretraining failed (see above); run the command again, and it goes on "
            "with what is missing"
        )

    student, processor = load_audio_model(str(MINI / "student"))
    teacher, tokenizer = load_text_model(str(MINI / "teacher"))
    pair = student.to(device), processor, teacher.to(device), tokenizer
    found = figures(*pair, seed=args.seed)
    for name, tasks in found.items():
        values = "".join(f"  {task} {value:5.1f}" for task, value in tasks.items())
        print(f"{name:32}{values}")
    found = {"heard": json.loads((folder / "heard.json").read_text()), **found}
    (MINI / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
