"""Words for sound: an audio LLM listens to every clip and writes the description that paper A's
text teacher will read instead.

What the teacher is never told, the student cannot learn from it: L_top and L_layer are as good as
the descriptions. Can the teacher answer from one alone? python -m prepare.reading asks it. What
people find in it that is in the clip is asked by prepare.rating.

    python textualize.py                # laptop: the mini world's training clips, by mini/student
    torchrun --nproc_per_node 8 textualize.py --model Qwen/Qwen2-Audio-7B-Instruct \\
        --data cota.jsonl --out cota-described.jsonl

The output is the manifest again with new descriptions, ready for train_source_layer.py --data.
Killed, it goes on where it stopped.

Where the paper (arXiv 2509.18579) is silent, and what we do:
1. It grounds the description with the reasoning trace and shows no prompt: PROMPTS below are ours.
   A trace ends in the answer, and a description that repeats it would let the teacher answer
   without hearing: the prompt forbids that. --grounding caption shows only the trace's second
   stage, none nothing.
2. mini/student knows one captioning question and no notes, so the mini world's descriptions are
   made by ear alone.
3. A description that is empty, cut at the token limit or in a loop is tried once more, sampled and
   with twice the tokens. If that is no better, the clip is left out and listed in
   OUT.failed.jsonl. Decoding is greedy otherwise, as in the paper.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
import judge
import models
import rollout
from plumbing import hearing, manifest, ranks
from plumbing.check import about_clips
from plumbing.files import append_jsonl, keep_lines, newest_checkpoint

# -------------------------------------------------------------------------------------------------
# 1. One prompt per kind of sound, because what a reader must know differs

PROMPTS = {
    "speech": "Listen to this recording of speech. Write down what is said, word for word where "
              "you can. Then say who speaks (how many voices, what kind), in what manner and mood, "
              "how fast, with what emphasis, and what is heard in the background.",
    "sound": "Listen to this recording of sounds. Name every source in the order in which it is "
             "heard, with how often and how long, near or far, loud or quiet, and say what place "
             "or event they suggest.",
    "music": "Listen to this piece of music. Describe instruments and voices, genre and mood, "
             "tempo and metre, how the melody moves, harmony, dynamics and form, and write down "
             "any lyrics.",
}
RULES = (
    "Write for somebody who cannot hear it and must be able to answer any question about it. "
    "One paragraph of plain prose, only what is in the audio. Do not mention notes or "
    "questions."
)
NOTES = (
    "Notes of somebody who studied this clip, to check yourself against; they belong to a "
    "question that you must not answer:\n{notes}"
)

# The one question that mini/student was taught to describe by
MINI_PROMPTS = dict.fromkeys(PROMPTS, "Describe the audio.")


def prompt(example, prompts, grounding):
    """The captioning request for an example, as text.

    Tasks without a prompt of their own (emotion, ...) are taken for speech."""
    parts = [prompts.get(example.task, prompts["speech"])]
    if prompts is not MINI_PROMPTS:
        parts.append(RULES)
    if grounding != "none":
        stages = data.STAGES if grounding == "reasoning" else ("caption",)
        notes = " ".join(example.reasoning[stage] for stage in stages)
        parts.append(NOTES.format(notes=notes))
    return "\n\n".join(parts)


def fault(description, finished):
    """What is wrong with a description, as a word or two; None if nothing is."""
    words = description.lower().split()
    if not words:
        return "empty"
    # A loop: the same eight words for the third time
    eights = Counter(zip(*(words[i:] for i in range(8))))
    if any(times > 2 for times in eights.values()):
        return "repeats itself"
    return None if finished else "cut at the token limit"


def describe(examples, model, processor, prompts, grounding, *, batch_size, max_new_tokens):
    """-> {id: (description, what is wrong with it or None)}, and why some were tried again."""
    asked = [
        dataclasses.replace(e, question=prompt(e, prompts, grounding), choices=[]) for e in examples
    ]

    def listen(rows, **decoding):
        outputs = rollout.generate(
            model, processor, rows, batch_size=batch_size, progress=False, with_end=True, **decoding
        )
        found = {}
        for e, (text, ended, _) in zip(rows, outputs):
            description = judge.final_answer(text).strip()
            found[e.id] = (description, fault(description, ended))
        return found

    said = listen(asked, temperature=0, max_new_tokens=max_new_tokens)
    again = [e for e in asked if said[e.id][1]]
    why = Counter(said[e.id][1] for e in again)
    if again:
        said |= listen(
            again, temperature=0.6, top_k=0, top_p=0.9, max_new_tokens=2 * max_new_tokens
        )
    return said, why


# -------------------------------------------------------------------------------------------------
# 2. The run

def parse_flags(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(models.MINI / "student"),
        help="audio LLM, folder or hub id (paper: Qwen2.5-Omni-7B)")
    add("--data", help="manifest to describe (data.py); default: the mini world's training split")
    add("--out", help="manifest to write, in the folder of --data; default: its name with "
        "-described")
    add("--grounding", choices=["reasoning", "caption", "none"],
        help="what of the trace the model is shown; default: reasoning (paper), with mini/student "
        "none")
    add("--max-new-tokens", type=int, default=256, help="tokens a description may have")
    add("--batch-size", type=int, default=32, help="clips described at once on one rank (one GPU)")
    add("--limit", type=int, help="only the first N examples")
    add("--seed", type=int, default=0, help="of the mini world")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.max_new_tokens) < 1:
        parser.error("--batch-size and --max-new-tokens must be at least 1")
    return args


def earlier(path, name):
    """The records of an output that an earlier run by `name` left; a line that a kill cut off is
    removed from it. Raises data.DataError for descriptions by another model."""
    records = keep_lines(path, lambda record: record["id"] and record["described_by"])
    for record in records:
        if record["described_by"] != name:
            raise data.DataError(f"{path}: holds descriptions by {record['described_by']}, not "
                                 f"{name}; give another --out, or that --model")
    return records


def main(argv=None):
    args = parse_flags(argv)
    world, device = ranks.start_distributed()[1:]
    say = print if ranks.rank() == 0 else (lambda *_: None)

    # 2.1 The manifest, and where its twin is written: audio paths are relative to their folder
    if args.data is None:
        import mini.world
        with ranks.rank_zero_first():
            args.data = mini.world.build("train", seed=args.seed)
    source = Path(args.data)
    out = Path(args.out or source.with_name(f"{source.stem}-described.jsonl"))
    failed = out.with_suffix(".failed.jsonl")
    if out.resolve().parent != source.resolve().parent or out.resolve() == source.resolve():
        raise data.DataError(f"{out}: must be another file in the folder of {source}, because "
                             "audio paths are relative to it; change --out")
    examples = data.read_manifest(source, limit=args.limit)
    records = {}                                        # id -> its line, as an object
    for _, line in manifest.lines(source):
        record = json.loads(line.decode("utf-8-sig"))
        records[record["id"]] = record

    # 2.2 Who describes, how it is asked, and what is not described yet
    is_mini = Path(args.model).resolve() == models.MINI / "student"
    prompts = MINI_PROMPTS if is_mini else PROMPTS
    grounding = args.grounding or ("none" if is_mini else "reasoning")
    args.model = ranks.of_rank_zero(newest_checkpoint(args.model))          # of a run's folder
    name = f"{args.model}, grounding: {grounding}"
    done = []
    if ranks.rank() == 0:
        done = [record["id"] for record in earlier(out, name) + earlier(failed, name)]
    done = set(ranks.of_rank_zero(done))
    todo = [e for e in examples if e.id not in done]
    for e in todo:
        if grounding != "none" and not e.reasoning:
            raise data.DataError(f"{e.where}: has no reasoning trace to ground the description "
                                 "with; add one, or use --grounding none")
    if todo:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, processor = models.load_audio_model(args.model, dtype=dtype)
        seconds = data.check_audio(examples)
        hearing.check(model.to(device), processor)
        say(f"{about_clips(seconds, processor)}\ndescribed on {device} x {world} by {name}")

    # 2.3 A batch for each rank at a time, which rollout.generate shares out; a kill loses no more
    tried_again = Counter()
    size = args.batch_size * world
    bar = tqdm(total=len(todo), desc="descriptions", unit="clip", disable=ranks.rank() > 0)
    for start in range(0, len(todo), size):
        rows = todo[start:start + size]
        said, why = describe(
            rows,
            model,
            processor,
            prompts,
            grounding,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        tried_again += why
        for e in rows:
            text, wrong = said[e.id]
            path, record = out, {**records[e.id], "description": text}
            if wrong:
                path, record = failed, {"id": e.id, "fault": wrong, "said": text}
            if ranks.rank() == 0:
                append_jsonl(path, {**record, "described_by": name})
        bar.update(len(rows))
    bar.close()

    # 2.4 What happened
    for wrong, n in sorted(tried_again.items()):
        say(f"tried again, {wrong}: {n}")
    if ranks.rank() == 0:
        faults = Counter(record["fault"] for record in earlier(failed, name))
        for wrong, n in sorted(faults.items()):
            say(f"left out, {wrong}: {n} (see {failed}; delete it to try them again)")
        described = [record for record in earlier(out, name) if record["id"] in records]
        say(f"{out}: {len(described):,} described clips; train with --data {out}")
    ranks.stop_distributed()


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
