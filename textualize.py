"""
Words for sound: an audio LLM listens to every clip and writes the description that paper A's text teacher will read instead.

What the teacher is never told, the student cannot learn from it: L_top and L_layer are as good as the descriptions. So this file writes
them (1), and measures them twice: can the text teacher answer from the description alone (2), and what do people find in it that is in
the clip (3)?

    python textualize.py --check                    # laptop: the mini world's training clips, described by mini/student
    torchrun --nproc_per_node 8 textualize.py --model Qwen/Qwen2-Audio-7B-Instruct --data cota.jsonl --out cota-described.jsonl
    python textualize.py --model Qwen/Qwen2-Audio-7B-Instruct --data cota.jsonl --out cota-described.jsonl --check --teacher Qwen/Qwen3-8B
    python textualize.py --rating-sheet runs/sheet.html            # one page: open it, listen, tick, save; its key lies beside it
    python textualize.py --score-ratings anna.json ben.json --rating-sheet runs/sheet.html

The output is the manifest again with new descriptions, ready for train_source_layer.py --data. Killed, it goes on where it stopped.

Where the paper (arXiv 2509.18579) is silent, and what we do:
1. It grounds the description with the reasoning trace and shows no prompt: PROMPTS below are ours. A trace ends in the answer, and a
   description that repeats it would let the teacher answer without hearing: the prompt forbids that, and --grounding caption shows only
   the trace's second stage, none nothing.
2. mini/student knows one captioning question and no notes, so the mini world's descriptions are made by ear alone.
3. A description that is empty, cut at the token limit or in a loop is tried once more, sampled and with twice the tokens; if that is no
   better, the clip is left out and listed in OUT.failed.jsonl. Decoding is greedy otherwise, as in the paper.
"""
import argparse
import base64
import dataclasses
import io
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from plumbing import ranks
from plumbing.check import about_clips

from plumbing.files import write_json
from plumbing.predictions import read_json
from plumbing.whole import newest_checkpoint
import data
import evaluate
import judge
import mini.world
import models
import rollout

# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Writing: one prompt per kind of sound, because what a reader must know differs

PROMPTS = {
    "speech": "Listen to this recording of speech. Write down what is said, word for word where you can. Then say who speaks (how many "
              "voices, what kind), in what manner and mood, how fast, with what emphasis, and what is heard in the background.",
    "sound": "Listen to this recording of sounds. Name every source in the order in which it is heard, with how often and how long, near "
             "or far, loud or quiet, and say what place or event they suggest.",
    "music": "Listen to this piece of music. Describe instruments and voices, genre and mood, tempo and metre, how the melody moves, harmony, "
             "dynamics and form, and write down any lyrics.",
}
RULES = ("Write for somebody who cannot hear it and must be able to answer any question about it. One paragraph of plain prose, only what "
         "is in the audio. Do not mention notes or questions.")
NOTES = ("Notes of somebody who studied this clip, to check yourself against; they belong to a question that you must not answer:\n{notes}")
MINI_PROMPTS = dict.fromkeys(PROMPTS, "Describe the audio.")        # the one question that mini/student was taught to describe by


def prompt(example, prompts, grounding):
    """The captioning request for an example, as text. Tasks without a prompt of their own (emotion, ...) are taken for speech."""
    parts = [prompts.get(example.task, prompts["speech"])]
    if prompts is not MINI_PROMPTS:
        parts.append(RULES)
    if grounding != "none":
        stages = data.STAGES if grounding == "reasoning" else ("caption",)
        parts.append(NOTES.format(notes=" ".join(example.reasoning[stage] for stage in stages)))
    return "\n\n".join(parts)


def fault(description, finished):
    """What is wrong with a description, as a word or two; None if nothing is. A loop: the same eight words for the third time."""
    words = description.lower().split()
    if not words:
        return "empty"
    if any(n > 2 for n in Counter(zip(*(words[i:] for i in range(8)))).values()):
        return "repeats itself"
    return None if finished else "cut at the token limit"


def written(path, name):
    """The ids in an output that may have been killed in the middle of a line, which is cut off. -> set of ids. name: who described them."""
    if not path.exists():
        return set()
    whole = path.read_bytes()
    kept = whole[:whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        os.truncate(path, len(kept))
    try:
        records = [json.loads(line) for line in kept.splitlines()]
        ids, names = {r["id"] for r in records}, {r["described_by"] for r in records}
    except (ValueError, KeyError, TypeError) as error:
        raise data.DataError(f"{path}: is not what an earlier run of this command wrote ({error!r}); move it away, or give another --out") from None
    if names - {name}:
        raise data.DataError(f"{path}: holds descriptions by {', '.join(map(str, names))}, not {name}; give another --out, or that --model")
    return ids


def say_failed(failed):
    """What was left out so far, in this run or an earlier one -> a sentence or two."""
    why = Counter(json.loads(line)["fault"] for line in failed.read_bytes().splitlines()) if failed.exists() else {}
    return [f"left out, {fault}: {n} (see {failed}; delete it to try them again)" for fault, n in sorted(why.items())]


def textualize(examples, records, model, processor, out, *, prompts, grounding, batch_size,
               max_new_tokens, rank, name):
    """Describe `examples` into the manifest `out`, `batch_size` at a time on each rank. records:
    id -> its line of the source.

    Rank 0 appends all ranks' lines at once, so that a kill loses one batch a rank at most.
    -> Counter of why descriptions were tried again"""
    counts, failed = Counter(), out.with_suffix(".failed.jsonl")
    done = written(out, name) | written(failed, name)
    todo = [e for e in examples if e.id not in done]
    if grounding != "none" and (blind := [e for e in todo if not e.reasoning]):
        raise data.DataError(f"{blind[0].where}: has no reasoning trace to ground the description with; add one, or use --grounding none")
    asked = [dataclasses.replace(e, question=prompt(e, prompts, grounding), choices=[]) for e in todo]
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    chunk = batch_size * world                  # rollout.generate gives each rank its share of it
    listen = dict(batch_size=batch_size, progress=False, with_end=True)
    with tqdm(total=len(examples), initial=len(examples) - len(todo), desc="descriptions", unit="clip", disable=rank > 0) as bar:
        for start in range(0, len(asked), chunk):
            rows = asked[start:start + chunk]
            said = {e.id: text for e, text in zip(rows, rollout.generate(model, processor, rows, temperature=0,
                                                                          max_new_tokens=max_new_tokens, **listen))}
            said = {i: (judge.final_answer(text).strip(), end) for i, (text, end, _) in said.items()}
            if again := [e for e in rows if fault(*said[e.id])]:
                counts.update(fault(*said[e.id]) for e in again)
                second = rollout.generate(model, processor, again, temperature=0.6, top_k=0, top_p=0.9,
                                           max_new_tokens=2 * max_new_tokens, **listen)
                said |= {e.id: (judge.final_answer(text).strip(), end) for e, (text, end, _) in zip(again, second)}
            good, bad = [], []
            for e in rows:
                if why := fault(*said[e.id]):
                    bad.append(json.dumps({"id": e.id, "fault": why, "said": said[e.id][0], "described_by": name}, ensure_ascii=False) + "\n")
                else:
                    record = {**records[e.id], "description": said[e.id][0], "described_by": name}
                    good.append(json.dumps(record, ensure_ascii=False) + "\n")
            if rank == 0:
                for path, texts in ((failed, bad), (out, good)):
                    if texts:
                        with open(path, "a", encoding="utf-8") as file:
                            file.write("".join(texts))
            bar.update(len(rows))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()                     # nobody reads the output before rank 0 has written the last chunk
    return counts


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Check: how often does the text teacher answer right from the description alone?

def check(examples, described, teacher, tokenizer, *, batch_size):
    """Teacher, greedy, on the questions of both lists -> {"described", "true", "nothing": {task: per cent, ..., "average"}, "questions": n}.

    examples: with the true descriptions, if there are any (else "true" is left out); described: the same ones with ours. "nothing" is what
    guessing from question and choices gives: a description is worth what it adds to that. Open questions, without choices, cannot be scored
    and are left out. Raises data.DataError if there is no other."""
    described = [e for e in described if e.choices]
    ids = {e.id for e in described}
    same = [e for e in examples if e.id in ids]
    if not same:
        raise data.DataError("no described example has choices, so nothing can be checked; give multiple choice questions")
    views = {"described": (described, "description"), "true": (same, "description"), "nothing": (same, None)}
    if not all(e.description for e in same):
        del views["true"]
    found = {"questions": len(same)}
    for name, (chosen, words) in views.items():
        outputs = rollout.generate(teacher, tokenizer, chosen, view="text", words=words, temperature=0, batch_size=batch_size)
        right = {}
        for sample in evaluate.score(chosen, outputs)[1]:
            right.setdefault(sample["task"], []).append(sample["correct"])
        found[name] = {task: round(100 * sum(hits) / len(hits), 1) for task, hits in [*right.items(), ("average", sum(right.values(), []))]}
    return found


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Rating: what do people find in the description that is in the clip? Blind: some texts are foils, another clip's description.

CATEGORIES = {
    "speech": ["the words", "who speaks", "manner and emotion", "background"],
    "sound": ["sources", "order", "how many", "place"],
    "music": ["instruments", "tempo", "melody", "mood"],
}
VERDICTS = ["kept", "partly", "lost", "not in the clip"]
FOILS = 1 / 3                                    # share of the items that carry another clip's description

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>What does the description keep?</title>
<style>
 body {font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; background: #fafbfc}
 section {background: #fff; border: 1px solid #d8dee6; border-radius: 8px; padding: 1rem 1.25rem; margin: 1.25rem 0}
 section.done {border-color: #3b8f5a} audio {width: 100%} blockquote {margin: .75rem 0; padding-left: .75rem; border-left: 4px solid #2f5d9b}
 table {border-collapse: collapse; width: 100%} td, th {padding: .25rem; text-align: center; font-weight: normal}
 td:first-child, th:first-child {text-align: left} tr + tr {border-top: 1px solid #eef1f5} textarea {width: 100%; box-sizing: border-box}
 footer {position: sticky; bottom: 0; background: #fafbfc; padding: .75rem 0; border-top: 1px solid #d8dee6}
 button {font: inherit; padding: .4rem 1rem} input[type=text] {font: inherit}
</style>
<h1>What does the description keep?</h1>
<p>Listen to each clip, read the text below it, and say for each line whether the text tells a reader what you hear. Some texts
belong to other clips: judge them just the same. Answers stay in this browser until you save them as a file.</p>
<main></main>
<footer><label>Your name <input type="text" id="rater"></label> <button id="save">Save answers</button> <span id="count"></span></footer>
<script>
const sheet = SHEET, place = "ratings " + sheet.sheet;
let answers = {};
try { answers = JSON.parse(localStorage.getItem(place)) || {} } catch { /* a browser without storage: saving still works */ }
const make = (parent, tag, text, more = {}) => parent.appendChild(Object.assign(document.createElement(tag), {textContent: text}, more));
function remember(item, name, value) {
  ((answers[item.item] ??= {verdicts: {}}), name === "note" ? answers[item.item].note = value : answers[item.item].verdicts[name] = value);
  try { localStorage.setItem(place, JSON.stringify(answers)) } catch { }
  show();
}
function show() {
  const done = sheet.items.filter(i => i.categories.every(c => answers[i.item]?.verdicts[c]));
  for (const i of sheet.items) document.getElementById(i.item).className = done.includes(i) ? "done" : "";
  document.getElementById("count").textContent = `${done.length} of ${sheet.items.length} rated`;
}
sheet.items.forEach((item, n) => {
  const box = make(document.querySelector("main"), "section", "", {id: item.item});
  make(box, "h2", `${n + 1}. ${item.task}`);
  make(box, "audio", "", {controls: true, src: item.audio, preload: "metadata"});
  make(box, "blockquote", item.text);
  const table = make(box, "table", ""), head = make(table, "tr", "");
  ["in the text?", ...sheet.verdicts].forEach(v => make(head, "th", v));
  for (const category of item.categories) {
    const row = make(table, "tr", "");
    make(row, "td", category);
    for (const verdict of sheet.verdicts) {
      const cell = make(row, "td", "");
      make(cell, "input", "", {type: "radio", name: item.item + category, ariaLabel: category + ": " + verdict,
        checked: answers[item.item]?.verdicts[category] === verdict, onchange: () => remember(item, category, verdict)});
    }
  }
  make(box, "label", "What is lost, or wrong?");
  make(box, "textarea", "", {rows: 2, value: answers[item.item]?.note || "", oninput: e => remember(item, "note", e.target.value)});
});
document.getElementById("save").onclick = () => {
  const rater = document.getElementById("rater").value.trim() || "anonymous";
  const file = new Blob([JSON.stringify({sheet: sheet.sheet, rater, answers}, null, 1)], {type: "application/json"});
  Object.assign(document.createElement("a"), {href: URL.createObjectURL(file), download: `ratings-${rater}.json`}).click();
};
show();
</script></html>
"""


def key_path(page):
    return page.with_name(page.stem + "-key.json")


def write_sheet(described, page, *, clips, seed):
    """The page, and beside it the key, which says what each item really is and must not be shown to raters. -> number of items."""
    rng, by_task = random.Random(seed), {}
    for example in described:
        if example.task in CATEGORIES:
            by_task.setdefault(example.task, []).append(example)
    items, key = [], {}
    for task, examples in by_task.items():
        chosen = rng.sample(examples, min(len(examples), clips))
        for n, example in enumerate(chosen):
            foil = n < round(FOILS * len(chosen))
            strangers = [e for e in examples if e.description != example.description and e.audio != example.audio]
            other = rng.choice(strangers) if foil and strangers else example
            sound = io.BytesIO()
            soundfile.write(sound, data.load_audio(example.audio, where=example.where).numpy(), data.SAMPLE_RATE, format="WAV")
            name = f"{rng.randrange(16 ** 8):08x}"                         # says nothing about what the item is
            key[name] = {"id": example.id, "task": task, "description_of": other.id}
            items.append({"item": name, "task": task, "categories": CATEGORIES[task], "text": other.description,
                          "audio": "data:audio/wav;base64," + base64.b64encode(sound.getvalue()).decode()})
    rng.shuffle(items)
    name = f"{rng.randrange(16 ** 8):08x}"
    sheet = json.dumps({"sheet": name, "verdicts": VERDICTS, "items": items}).replace("<", "\\u003c")      # no text can close the script
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(PAGE.replace("SHEET", sheet, 1), encoding="utf-8")
    write_json(key_path(page), {"sheet": name, "items": key})
    return len(items)


def score_ratings(files, page):
    """Saved answers -> {task: {category: {"description" and "foil": {item: [one verdict per rater]}}}}.

    Raises data.DataError for a file that is no ratings, given twice, of another sheet, or with items, categories or verdicts the sheet lacks."""
    key = read_json(key_path(page), "the key that was written beside the rating sheet")
    found, raters = {task: {c: {"description": {}, "foil": {}} for c in categories} for task, categories in CATEGORIES.items()}, {}
    for file in files:
        ratings = read_json(file, "the answers that the rating sheet saved")
        if not isinstance(ratings, dict) or not isinstance(ratings.get("answers"), dict):
            raise data.DataError(f"{file}: holds no answers; give the file that the rating sheet's button saved")
        if ratings.get("sheet") != key["sheet"]:
            raise data.DataError(f"{file}: rates the sheet {ratings.get('sheet')!r}, not {page} ({key['sheet']!r}); name the sheet that was rated")
        rater = str(ratings.get("rater"))
        if rater in raters:
            raise data.DataError(f"{file}: is by {rater!r}, as is {raters[rater]}; give each rater's answers once")
        raters[rater] = file
        for item, answer in ratings["answers"].items():
            if item not in key["items"]:
                raise data.DataError(f"{file}: rates the item {item!r}, which {page} does not have; use the file as the page saved it")
            known = key["items"][item]
            kind = "description" if known["description_of"] == known["id"] else "foil"
            verdicts = answer.get("verdicts") if isinstance(answer, dict) else None
            if not isinstance(verdicts, dict):
                raise data.DataError(f"{file}: the item {item!r} has no verdicts; use the file as the page saved it")
            for category, verdict in verdicts.items():
                if category not in CATEGORIES[known["task"]] or verdict not in VERDICTS:
                    raise data.DataError(f"{file}: the item {item!r} says {verdict!r} of {category!r}, which the page does not offer; use the "
                                         "file as the page saved it")
                found[known["task"]][category][kind].setdefault(item, []).append(verdict)
    return found


def retention(items, wanted):
    """{item: verdicts} -> (per cent of what is in the clip that has one of the `wanted` verdicts, its 95 % bootstrap interval, items counted).

    Raters are averaged within an item, and items are drawn again, not verdicts: five raters of one clip are not five clips."""
    heard = [[v for v in verdicts if v != VERDICTS[-1]] for verdicts in items.values()]
    shares = np.array([sum(v in wanted for v in verdicts) / len(verdicts) for verdicts in heard if verdicts])
    if not len(shares):
        return None, [None, None], 0
    draws = np.random.default_rng(0).choice(shares, (10_000, len(shares))).mean(1)
    return 100 * shares.mean(), evaluate.percentiles(100 * draws), len(shares)


def ratings_table(found):
    """score_ratings' dict as text: of what is in the clip, how much does the text keep? Foils say what a generous rater would find anyway."""
    lines = [f"{'':28}{'kept':>6}   95 % interval    kept or partly    kept in foils    clips"]
    for task, categories in found.items():
        for category, kinds in categories.items():
            kept, (low, high), clips = retention(kinds["description"], VERDICTS[:1])
            if clips:
                foil = retention(kinds["foil"], VERDICTS[:1])[0]
                lines.append(f"{task:8}{category:20}{kept:4.0f} %   [{low:3.0f}, {high:3.0f}]  {retention(kinds['description'], VERDICTS[:2])[0]:12.0f} %"
                             + (f"{foil:15.0f} %" if foil is not None else f"{'-':>17}") + f"{clips:9}")
    return "\n".join(lines) if len(lines) > 1 else "no item of a true description was rated yet"


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. The run

def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # writing
    parser.add_argument("--model", default=str(mini.world.MINI / "student"), help="audio LLM, folder or hub id (paper: Qwen2.5-Omni-7B)")
    parser.add_argument("--data", help="manifest to describe (data.py); default: the mini world's training split")
    parser.add_argument("--out", help="manifest to write, in the folder of --data; default: its name with -described")
    parser.add_argument("--grounding", choices=["reasoning", "caption", "none"],
                        help="what of the trace the model is shown; default: reasoning (paper), with mini/student none")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens a description may have")
    parser.add_argument("--batch-size", type=int, default=32,
                        help="clips described at once on one rank (one GPU)")
    parser.add_argument("--limit", type=int, help="only the first N examples")
    parser.add_argument("--seed", type=int, default=0, help="of the mini world and the rating sheet")
    # measuring
    parser.add_argument("--check", action="store_true", help="how often --teacher answers right from the description alone")
    parser.add_argument("--teacher", default=str(mini.world.MINI / "teacher"), help="text LLM for --check (paper: Qwen3-8B)")
    parser.add_argument("--rating-sheet", metavar="PAGE", help="write a page for blind human rating (HTML), and its key beside it")
    parser.add_argument("--clips", type=int, default=10, help="clips of each task on the page; a third of them with another's description")
    parser.add_argument("--score-ratings", metavar="JSON", nargs="+", help="saved answers: what was kept? needs --rating-sheet, the page rated")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.clips, args.max_new_tokens) < 1:
        parser.error("--batch-size, --clips and --max-new-tokens must be at least 1")
    if args.score_ratings and not args.rating_sheet:
        parser.error("--score-ratings needs --rating-sheet PAGE, the page that was rated: its key lies beside it")
    return args


def main(argv=None):
    args = parse_flags(argv)
    if args.score_ratings:
        print(ratings_table(score_ratings(args.score_ratings, Path(args.rating_sheet))))
        return
    rank, world, device = ranks.start_distributed()
    say = print if rank == 0 else (lambda *a, **k: None)
    if args.data is None:
        with ranks.rank_zero_first(rank, world):
            args.data = mini.world.build("train", seed=args.seed)
    source = Path(args.data)
    out = Path(args.out) if args.out else source.with_name(f"{source.stem}-described.jsonl")
    if out.resolve().parent != source.resolve().parent or out.resolve() == source.resolve():
        raise data.DataError(f"{out}: must be another file in the folder of {source}, because audio paths are relative to it; change --out")
    examples = data.read_manifest(source, limit=args.limit)
    records = [json.loads(line.decode("utf-8-sig")) for line in source.read_bytes().split(b"\n") if line.strip()]
    records = {record["id"]: record for record in records}

    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_mini = Path(args.model).resolve() == (mini.world.MINI / "student").resolve()
    grounding = args.grounding or ("none" if is_mini else "reasoning")
    args.model = ranks.of_rank_zero(newest_checkpoint(args.model))      # of a run's folder
    name, failed = f"{args.model}, grounding: {grounding}", out.with_suffix(".failed.jsonl")
    if {e.id for e in examples} - written(out, name) - written(failed, name):
        model, processor = models.load_audio_model(args.model, dtype=half)
        seconds = data.check_audio(examples)
        models.check(model.to(device), processor)
        say(f"{about_clips(seconds, processor)}\ndescribed on {device} x {world} by {name}")
        counts = textualize(examples, records, model, processor, out, prompts=MINI_PROMPTS if is_mini else PROMPTS,
                            grounding=grounding, batch_size=args.batch_size,
                            max_new_tokens=args.max_new_tokens, rank=rank, name=name)
        del model
        say("\n".join(f"tried again, {why}: {n}" for why, n in sorted(counts.items())) or "no description had to be tried again")
    say(*say_failed(failed), sep="\n", end="\n" * failed.exists())
    ids = {e.id for e in examples}
    described = [e for e in data.read_manifest(out, require=("description",)) if e.id in ids]
    say(f"{out}: {len(described):,} described clips; train with --data {out}")
    if args.check:
        teacher, tokenizer = models.load_text_model(args.teacher, dtype=half)
        found = check(examples, described, teacher.to(device), tokenizer, batch_size=args.batch_size)
        tasks = list(found["nothing"])
        say(f"\n{args.teacher} answers {found['questions']:,} questions right, per cent, when it reads\n{'':12}" + "".join(f"{t:>10}" for t in tasks))
        for view in ("described", "true", "nothing"):
            if view in found:
                say(f"{view:12}" + "".join(f"{found[view][t]:10.1f}" for t in tasks))
        if rank == 0:
            write_json(out.with_suffix(".check.json"), found)
    if args.rating_sheet and rank == 0:
        page = Path(args.rating_sheet)
        say(f"{page}: {write_sheet(described, page, clips=args.clips, seed=args.seed)} items; the key to it is {key_path(page)}")
    ranks.stop_distributed()


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
