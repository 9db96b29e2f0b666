"""What do people find in a description that is in the clip? One page to listen and tick.

prepare.reading asks a text LLM whether it can answer from the descriptions. This asks people,
blind: a third of the texts are foils, which show what a generous rater would
find anyway.

    python -m prepare.rating --data cota-described.jsonl --rating-sheet runs/sheet.html
        # open the page, listen, tick, save; the key to it lies beside it
    python -m prepare.rating --rating-sheet runs/sheet.html --score-ratings anna.json ben.json
"""

import argparse
import base64
import io
import json
import random
from pathlib import Path

import numpy as np
import soundfile

import data
import evaluate
from plumbing.files import write_json

CATEGORIES = {
    "speech": ["the words", "who speaks", "manner and emotion", "background"],
    "sound": ["sources", "order", "how many", "place"],
    "music": ["instruments", "tempo", "melody", "mood"],
}
VERDICTS = ["kept", "partly", "lost", "not in the clip"]
FOILS = 1 / 3       # share of the items that carry another clip's description


def key_path(page):
    return page.with_name(page.stem + "-key.json")


# -------------------------------------------------------------------------------------------------
# 1. The page

def write_sheet(described, page, *, clips, seed):
    """`clips` of each task on one page, and beside it the key, which says what each item really is
    and must not be shown to raters. -> number of items."""
    rng = random.Random(seed)
    by_task = {}
    for example in described:
        if example.task in CATEGORIES:
            by_task.setdefault(example.task, []).append(example)

    items, key = [], {}
    for task, examples in by_task.items():
        chosen = rng.sample(examples, min(len(examples), clips))
        for n, example in enumerate(chosen):
            other = example
            strangers = [e for e in examples
                         if e.description != example.description and e.audio != example.audio]
            if n < round(FOILS * len(chosen)) and strangers:
                other = rng.choice(strangers)
            name = f"{rng.randrange(16 ** 8):08x}"          # says nothing about what the item is
            key[name] = {"id": example.id, "task": task, "description_of": other.id}
            items.append({"item": name, "task": task, "categories": CATEGORIES[task],
                          "text": other.description, "audio": wav_in_page(example)})
    rng.shuffle(items)

    name = f"{rng.randrange(16 ** 8):08x}"
    sheet = json.dumps({"sheet": name, "verdicts": VERDICTS, "items": items})
    sheet = sheet.replace("<", "\\u003c")                   # no text can close the script
    template = Path(__file__).with_name("rating.html").read_text(encoding="utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(template.replace("SHEET", sheet, 1), encoding="utf-8")
    write_json(key_path(page), {"sheet": name, "items": key})
    return len(items)


def wav_in_page(example):
    """The clip as a data: URL, so that the page needs no other file."""
    wave = data.load_audio(example.audio, where=example.where).numpy()
    sound = io.BytesIO()
    soundfile.write(sound, wave, data.SAMPLE_RATE, format="WAV")
    return "data:audio/wav;base64," + base64.b64encode(sound.getvalue()).decode()


# -------------------------------------------------------------------------------------------------
# 2. The answers

def score_ratings(files, page):
    """Saved answers -> {task: {category: {"description" and "foil": {item: [a verdict a rater]}}}}.

    Raises data.DataError for a file that is no ratings, given twice, of another sheet, or with
    items, categories or verdicts the sheet lacks."""
    key = json.loads(key_path(page).read_text(encoding="utf-8"))
    found = {task: {category: {"description": {}, "foil": {}} for category in categories}
             for task, categories in CATEGORIES.items()}
    raters = {}
    for file in files:
        ratings = json.loads(Path(file).read_text(encoding="utf-8"))
        if "answers" not in ratings:
            raise data.DataError(f"{file}: holds no answers; give the file that the rating "
                                 "sheet's button saved")
        if ratings["sheet"] != key["sheet"]:
            raise data.DataError(f"{file}: rates the sheet {ratings['sheet']!r}, not {page} "
                                 f"({key['sheet']!r}); name the sheet that was rated")
        rater = ratings["rater"]
        if rater in raters:
            raise data.DataError(f"{file}: is by {rater!r}, as is {raters[rater]}; give each "
                                 "rater's answers once")
        raters[rater] = file

        for item, answer in ratings["answers"].items():
            if item not in key["items"]:
                raise data.DataError(f"{file}: rates the item {item!r}, which {page} does not "
                                     "have; use the file as the page saved it")
            known = key["items"][item]
            kind = "description" if known["description_of"] == known["id"] else "foil"
            for category, verdict in answer["verdicts"].items():
                if category not in CATEGORIES[known["task"]] or verdict not in VERDICTS:
                    raise data.DataError(
                        f"{file}: the item {item!r} says {verdict!r} of {category!r}, which the "
                        "page does not offer; use the file as the page saved it")
                found[known["task"]][category][kind].setdefault(item, []).append(verdict)
    return found


def retention(items, wanted):
    """{item: verdicts} -> (per cent of what is in the clip that has one of the `wanted` verdicts,
    its 95 % bootstrap interval, items counted).

    Raters are averaged within an item, and items are drawn again, not verdicts: five raters of one
    clip are not five clips."""
    shares = []
    for verdicts in items.values():
        heard = [verdict for verdict in verdicts if verdict != VERDICTS[-1]]
        if heard:
            shares.append(sum(verdict in wanted for verdict in heard) / len(heard))
    if not shares:
        return None, [None, None], 0
    shares = np.array(shares)
    draws = np.random.default_rng(0).choice(shares, (10_000, len(shares))).mean(1)
    return 100 * shares.mean(), evaluate.percentiles(100 * draws), len(shares)


def ratings_table(found):
    """score_ratings' dict as text: of what is in the clip, how much does the text keep?"""
    lines = []
    for task, categories in found.items():
        for category, kinds in categories.items():
            kept, (low, high), clips = retention(kinds["description"], VERDICTS[:1])
            if not clips:
                continue
            partly = retention(kinds["description"], VERDICTS[:2])[0]
            foil = retention(kinds["foil"], VERDICTS[:1])[0]
            foils = f"{'-':>17}" if foil is None else f"{foil:15.0f} %"
            lines.append(f"{task:8}{category:20}{kept:4.0f} %   [{low:3.0f}, {high:3.0f}]"
                         f"  {partly:12.0f} %{foils}{clips:9}")
    if not lines:
        return "no item of a true description was rated yet"
    heading = f"{'':28}{'kept':>6}   95 % interval    kept or partly    kept in foils    clips"
    return "\n".join([heading, *lines])


# -------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rating-sheet", required=True, metavar="PAGE",
        help="the page to write (HTML), or with --score-ratings the one that was rated")
    add("--data", help="described manifest; default: what textualize.py makes of the mini world")
    add("--clips", type=int, default=10,
        help="clips of each task on the page; a third of them with another's description")
    add("--seed", type=int, default=0, help="of what is drawn for the page")
    add("--score-ratings", metavar="JSON", nargs="+", help="saved answers: what was kept?")
    args = parser.parse_args(argv)
    page = Path(args.rating_sheet)
    if args.score_ratings:
        print(ratings_table(score_ratings(args.score_ratings, page)))
        return
    if args.data is None:
        import mini.world
        source = mini.world.build("train")
        args.data = source.with_name(f"{source.stem}-described.jsonl")
        if not args.data.exists():
            parser.error(f"there is no {args.data} yet: run python textualize.py, or give --data")
    described = data.read_manifest(args.data, require=("description",))
    items = write_sheet(described, page, clips=args.clips, seed=args.seed)
    print(f"{page}: {items} items; the key to it is {key_path(page)}")


if __name__ == "__main__":
    main()
