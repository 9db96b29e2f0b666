"""
Can the text teacher answer from the description alone? It is asked every question with it, with the
true description if there is one, and with neither, which is what guessing gives.

    python -m prepare.reading                       # what textualize.py made of the mini world
    torchrun --nproc_per_node 8 -m prepare.reading cota-described.jsonl --teacher Qwen/Qwen3-8B

A description is worth what it adds to guessing. Open questions, without choices, cannot be scored
and are left out. The table is written beside the manifest, as NAME.check.json.
"""
import argparse
from pathlib import Path

import torch

import data
import evaluate
import models
import rollout
from plumbing import ranks
from plumbing.files import write_json


def check(described, truth, teacher, tokenizer, *, batch_size):
    """Teacher, greedy, on the questions of the described examples
    -> {"described", "true", "nothing": {task: per cent, ..., "average"}, "questions": n}.

    truth: the same examples with the true descriptions, or None: "true" is left out. Raises
    data.DataError where no question has choices, or truth lacks one."""
    described = [e for e in described if e.choices]
    if not described:
        raise data.DataError("no described example has choices, so nothing can be checked; give "
                             "multiple choice questions")
    views = {"described": (described, "description"), "nothing": (described, None)}
    if truth is not None:
        by_id = {e.id: e for e in truth}
        missing = [e.id for e in described if e.id not in by_id]
        if missing:
            raise data.DataError(f"--true lacks {len(missing):,} of the described examples, such "
                                 f"as {missing[0]}; give the manifest that was described")
        views["true"] = ([by_id[e.id] for e in described], "description")

    found = {"questions": len(described)}
    for name, (chosen, words) in views.items():
        outputs = rollout.generate(teacher, tokenizer, chosen, view="text", words=words,
                                   temperature=0, batch_size=batch_size)
        right = {}
        for sample in evaluate.score(chosen, outputs)["samples"]:
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


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="?", help="a manifest that textualize.py wrote")
    add("--true", help="a manifest of the same examples with their true descriptions")
    add("--teacher", default=str(models.MINI / "teacher"), help="text LLM (paper: Qwen3-8B)")
    add("--batch-size", type=int, default=32, help="questions answered at once on one rank")
    args = parser.parse_args(argv)
    device = ranks.start_distributed()[2]

    if args.data is None:
        import mini.world
        with ranks.rank_zero_first():
            source = mini.world.build("train")
        args.data = source.with_name(f"{source.stem}-described.jsonl")
        args.true = args.true or source
    described = data.read_manifest(args.data, require=["description"])
    examples = None
    if args.true:
        examples = data.read_manifest(args.true, require=["description"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher, tokenizer = models.load_text_model(args.teacher, dtype=dtype)
    found = check(described, examples, teacher.to(device), tokenizer, batch_size=args.batch_size)
    if ranks.rank() == 0:
        print(check_table(found, args.teacher))
        write_json(Path(args.data).with_suffix(".check.json"), found)
    ranks.stop_distributed()


if __name__ == "__main__":
    main()
