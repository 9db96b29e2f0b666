"""Words for sound: an audio LLM listens to every clip and writes the description that paper A's
text teacher will read instead.

What the teacher is never told, the student cannot learn from it: L_top and L_layer are as good as
the descriptions. So this file writes them (1), and asks whether the text teacher can answer from
the description alone (2). What people find in it that is in the clip is prepare/rating.py's.

    python textualize.py --check        # laptop: the mini world's training clips, by mini/student
    torchrun --nproc_per_node 8 textualize.py --model Qwen/Qwen2-Audio-7B-Instruct \\
        --data cota.jsonl --out cota-described.jsonl --check --teacher Qwen/Qwen3-8B

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
import os
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import judge
import models
import rollout
from plumbing import hearing, ranks
from plumbing.check import about_clips
from plumbing.files import newest_checkpoint, write_json

# -------------------------------------------------------------------------------------------------
# 1. Writing: one prompt per kind of sound, because what a reader must know differs

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
RULES = ("Write for somebody who cannot hear it and must be able to answer any question about it. "
         "One paragraph of plain prose, only what is in the audio. Do not mention notes or "
         "questions.")
NOTES = ("Notes of somebody who studied this clip, to check yourself against; they belong to a "
         "question that you must not answer:\n{notes}")

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


def written(path, name):
    """The ids in an output of `name`; a line that a kill cut off is removed from it. -> set of ids.

    Raises data.DataError for another file, and for descriptions by another model."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    kept = content[:content.rfind(b"\n") + 1]
    if len(kept) < len(content):
        os.truncate(path, len(kept))
    try:
        records = [json.loads(line) for line in kept.splitlines()]
        ids = {record["id"] for record in records}
        names = {record["described_by"] for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise data.DataError(f"{path}: is not what an earlier run of this command wrote "
                             f"({error!r}); move it away, or give another --out") from None
    if names - {name}:
        raise data.DataError(f"{path}: holds descriptions by {', '.join(map(str, names))}, not "
                             f"{name}; give another --out, or that --model")
    return ids


def describe(examples, model, processor, prompts, grounding, *, batch_size, max_new_tokens):
    """-> {id: (description, what is wrong with it or None)}, and why some were tried again."""
    asked = [dataclasses.replace(e, question=prompt(e, prompts, grounding), choices=[])
             for e in examples]

    def listen(rows, **decoding):
        outputs = rollout.generate(model, processor, rows, batch_size=batch_size, progress=False,
                                   with_end=True, **decoding)
        found = {}
        for e, (text, ended, _) in zip(rows, outputs):
            description = judge.final_answer(text).strip()
            found[e.id] = (description, fault(description, ended))
        return found

    said = listen(asked, temperature=0, max_new_tokens=max_new_tokens)
    again = [e for e in asked if said[e.id][1]]
    why = Counter(said[e.id][1] for e in again)
    if again:
        said |= listen(again, temperature=0.6, top_k=0, top_p=0.9,
                       max_new_tokens=2 * max_new_tokens)
    return said, why


def textualize(examples, records, model, processor, out, *, prompts, grounding, batch_size,
               max_new_tokens, rank, name):
    """Describe `examples` into the manifest `out`, `batch_size` at a time on each rank.

    records: id -> its line of the source. Rank 0 appends all ranks' lines at once, so that a kill
    loses one batch a rank at most. -> Counter of why descriptions were tried again. Raises
    data.DataError for an example without the trace that grounds it."""
    tried_again = Counter()
    failed = out.with_suffix(".failed.jsonl")
    done = written(out, name) | written(failed, name)
    todo = [e for e in examples if e.id not in done]
    for e in todo:
        if grounding != "none" and not e.reasoning:
            raise data.DataError(f"{e.where}: has no reasoning trace to ground the description "
                                 "with; add one, or use --grounding none")

    together = torch.distributed.is_initialized()
    chunk = batch_size * (torch.distributed.get_world_size() if together else 1)
    before = len(examples) - len(todo)
    with tqdm(total=len(examples), initial=before, desc="descriptions", unit="clip",
              disable=rank > 0) as bar:
        for start in range(0, len(todo), chunk):
            rows = todo[start:start + chunk]        # rollout.generate gives each rank its share
            said, why = describe(rows, model, processor, prompts, grounding,
                                 batch_size=batch_size, max_new_tokens=max_new_tokens)
            tried_again += why
            lines = {out: "", failed: ""}
            for e in rows:
                text, wrong = said[e.id]
                if wrong:
                    path = failed
                    record = {"id": e.id, "fault": wrong, "said": text, "described_by": name}
                else:
                    path = out
                    record = {**records[e.id], "description": text, "described_by": name}
                lines[path] += json.dumps(record, ensure_ascii=False) + "\n"
            for path, text in lines.items():
                if text and rank == 0:
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(text)
            bar.update(len(rows))
    if together:
        torch.distributed.barrier()     # nobody reads before rank 0 has written the last chunk
    return tried_again


def say_failed(failed):
    """What was left out so far, in this run or an earlier one -> a sentence for each fault."""
    if not failed.exists():
        return []
    why = Counter(json.loads(line)["fault"] for line in failed.read_bytes().splitlines())
    return [f"left out, {wrong}: {n} (see {failed}; delete it to try them again)"
            for wrong, n in sorted(why.items())]


# -------------------------------------------------------------------------------------------------
# 2. Check: how often does the text teacher answer right from the description alone?

def check(examples, described, teacher, tokenizer, *, batch_size):
    """Teacher, greedy, on the questions of both lists
    -> {"described", "true", "nothing": {task: per cent, ..., "average"}, "questions": n}.

    examples: with the true descriptions, if there are any (else "true" is left out); described:
    the same ones with ours. "nothing" is what guessing from question and choices gives: a
    description is worth what it adds to that. Open questions, without choices, cannot be scored
    and are left out. Raises data.DataError if there is no other."""
    described = [e for e in described if e.choices]
    ids = {e.id for e in described}
    same = [e for e in examples if e.id in ids]
    if not same:
        raise data.DataError("no described example has choices, so nothing can be checked; give "
                             "multiple choice questions")
    views = {"described": (described, "description")}
    if all(e.description for e in same):
        views["true"] = (same, "description")
    views["nothing"] = (same, None)

    found = {"questions": len(same)}
    for name, (chosen, words) in views.items():
        outputs = rollout.generate(teacher, tokenizer, chosen, view="text", words=words,
                                   temperature=0, batch_size=batch_size)
        right = {}
        for sample in evaluate.score(chosen, outputs)[1]:
            right.setdefault(sample["task"], []).append(sample["correct"])
        right["average"] = sum(right.values(), [])
        found[name] = {task: round(100 * sum(hits) / len(hits), 1) for task, hits in right.items()}
    return found


def check_table(found, teacher):
    """check's dict as text: a row for what the teacher read, a column a task."""
    tasks = list(found["nothing"])
    lines = [f"\n{teacher} answers {found['questions']:,} questions right, per cent, when it reads",
             f"{'':12}" + "".join(f"{task:>10}" for task in tasks)]
    for view in ("described", "true", "nothing"):
        if view in found:
            lines.append(f"{view:12}" + "".join(f"{found[view][task]:10.1f}" for task in tasks))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# 3. The run

def parse_flags(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # Writing
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
    # Measuring
    add("--check", action="store_true",
        help="how often --teacher answers right from the description alone")
    add("--teacher", default=str(models.MINI / "teacher"),
        help="text LLM for --check (paper: Qwen3-8B)")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.max_new_tokens) < 1:
        parser.error("--batch-size and --max-new-tokens must be at least 1")
    return args


def main(argv=None):
    args = parse_flags(argv)
    rank, world, device = ranks.start_distributed()
    say = print if rank == 0 else (lambda *_, **__: None)

    # The manifest, and where its twin is written: audio paths are relative to their folder
    if args.data is None:
        import mini.world
        with ranks.rank_zero_first(rank, world):
            args.data = mini.world.build("train", seed=args.seed)
    source = Path(args.data)
    out = source.with_name(f"{source.stem}-described.jsonl")
    if args.out:
        out = Path(args.out)
    if out.resolve().parent != source.resolve().parent or out.resolve() == source.resolve():
        raise data.DataError(f"{out}: must be another file in the folder of {source}, because "
                             "audio paths are relative to it; change --out")
    examples = data.read_manifest(source, limit=args.limit)
    lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
    records = [json.loads(line.decode("utf-8-sig")) for line in lines]
    records = {record["id"]: record for record in records}

    # Who describes, and how it is asked
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_mini = Path(args.model).resolve() == models.MINI / "student"
    grounding = args.grounding or ("none" if is_mini else "reasoning")
    args.model = ranks.of_rank_zero(newest_checkpoint(args.model))          # of a run's folder
    name = f"{args.model}, grounding: {grounding}"
    failed = out.with_suffix(".failed.jsonl")

    # What is not described yet
    if {e.id for e in examples} - written(out, name) - written(failed, name):
        model, processor = models.load_audio_model(args.model, dtype=dtype)
        seconds = data.check_audio(examples)
        hearing.check(model.to(device), processor)
        say(f"{about_clips(seconds, processor)}\ndescribed on {device} x {world} by {name}")
        tried_again = textualize(
            examples, records, model, processor, out, name=name, rank=rank,
            prompts=MINI_PROMPTS if is_mini else PROMPTS, grounding=grounding,
            batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
        del model
        for why, n in sorted(tried_again.items()):
            say(f"tried again, {why}: {n}")
        if not tried_again:
            say("no description had to be tried again")
    for sentence in say_failed(failed):
        say(sentence)
    ids = {e.id for e in examples}
    described = [e for e in data.read_manifest(out, require=("description",)) if e.id in ids]
    say(f"{out}: {len(described):,} described clips; train with --data {out}")

    if args.check:
        teacher, tokenizer = models.load_text_model(args.teacher, dtype=dtype)
        found = check(examples, described, teacher.to(device), tokenizer,
                      batch_size=args.batch_size)
        say(check_table(found, args.teacher))
        if rank == 0:
            write_json(out.with_suffix(".check.json"), found)
    ranks.stop_distributed()


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
