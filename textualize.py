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
MINI_PROMPT = "Describe the audio."


def prompt(example, grounding, is_mini=False):
    """The captioning request for an example, as text.

    Tasks without a prompt of their own (emotion, ...) are taken for speech."""
    text = PROMPTS.get(example.task, PROMPTS["speech"])
    parts = [MINI_PROMPT] if is_mini else [text, RULES]
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


def describe(asked, model, processor, *, batch_size, max_new_tokens):
    """Examples whose question is the request -> {id: (description, its fault or None)}."""
    said = {}
    for decoding in (
        {"temperature": 0, "max_new_tokens": max_new_tokens},
        # once more what had a fault
        {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "max_new_tokens": 2 * max_new_tokens},
    ):
        outputs = rollout.generate(
            model,
            processor,
            asked,
            batch_size=batch_size,
            progress=False,
            with_end=True,
            **decoding,
        )
        for e, (text, ended, _) in zip(asked, outputs):
            description = judge.final_answer(text).strip()
            said[e.id] = (description, fault(description, ended))
        asked = [e for e in asked if said[e.id][1]]
    return said


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
    return parser.parse_args(argv)


def earlier(path, name):
    """The records of an output that an earlier run by `name` left; a line that a kill cut off is
    removed from it. Raises data.DataError for descriptions by another model."""
    records = keep_lines(path, lambda record: record["id"] and record["described_by"])
    for record in records:
        if record["described_by"] != name:
            raise data.DataError(f"{path}: holds descriptions by {record['described_by']}, not "
                                 f"{name}; give another --out, or that --model and --grounding")
    return records


def main(argv=None):
    args = parse_flags(argv)
    world, device = ranks.start_distributed()[1:]
    say = print if ranks.rank() == 0 else (lambda *_: None)

    # 2.1 The manifest, and where its twin is written: audio paths are relative to their folder
    if args.data is None:
        import mini.world
        with ranks.rank_zero_first():
            args.data = mini.world.build("train")
    source = Path(args.data)
    out = Path(args.out or source.with_name(f"{source.stem}-described.jsonl"))
    failed = out.with_suffix(".failed.jsonl")
    if out.parent.resolve() != source.parent.resolve() or out.name == source.name:
        raise data.DataError(f"{out}: must be another file in the folder of {source}, because "
                             "audio paths are relative to it; change --out")
    examples = data.read_manifest(source, limit=args.limit)
    lines = {e.id: line for e, (_, line) in zip(examples, manifest.lines(source))}

    # 2.2 Who describes, how it is asked, and what is not described yet
    is_mini = Path(args.model).resolve() == models.MINI / "student"
    grounding = args.grounding or ("none" if is_mini else "reasoning")
    args.model = ranks.of_rank_zero(newest_checkpoint(args.model))          # of a run's folder
    name = f"{args.model}, grounding: {grounding}"
    described = []
    faulty = []
    if ranks.rank() == 0:
        described = earlier(out, name)
        faulty = earlier(failed, name)
    done = ranks.of_rank_zero({record["id"] for record in described + faulty})
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
    size = args.batch_size * world
    batches = range(0, len(todo), size)
    for start in tqdm(batches, "descriptions", disable=ranks.rank() > 0):
        asked = [
            dataclasses.replace(e, question=prompt(e, grounding, is_mini), choices=[])
            for e in todo[start:start + size]
        ]
        said = describe(
            asked,
            model,
            processor,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        if ranks.rank() > 0:
            continue
        for i, (text, wrong) in said.items():
            if wrong:
                faulty.append({"id": i, "fault": wrong, "said": text, "described_by": name})
                append_jsonl(failed, faulty[-1])
            else:
                line = json.loads(lines[i])
                described.append({**line, "description": text, "described_by": name})
                append_jsonl(out, described[-1])

    # 2.4 What happened
    for wrong, n in sorted(Counter(record["fault"] for record in faulty).items()):
        say(f"left out, {wrong}: {n} (see {failed}; delete it to try them again)")
    say(f"{out}: {len(described):,} described clips; train with --data {out}")
    ranks.stop_distributed()


if __name__ == "__main__":
    main()
