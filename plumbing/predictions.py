"""
evaluate.py's files: samples.jsonl, and the results.json of another run for --compare and
--baseline, read, checked, and matched question by question. What is wrong is said in one sentence
(DataError).
"""
import dataclasses
import json
from pathlib import Path

import data
from plumbing.files import make_folder, replace_text

VIEWS = ("text", "audio")

# Names of the results, which no task may have.
TAKEN = {"average", "ua", "intervals", "official", "counts", "correct"}


def write_samples(out, samples):
    """samples.jsonl: each question with what was answered. Returns the folder."""
    out = make_folder(out)
    replace_text(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    return out


def read_json(path, what):
    """what: what the user should give instead of a file that cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise data.DataError(f"{path}: cannot be read as JSON ({error}); give {what}") from None


def read_results(path):
    """--compare: the results of another evaluation, or of a training run after training."""
    other = read_json(path, "the results.json of another run")
    other = other.get("after", other)
    for part in ("aqa", "ser"):
        scores = other.get(part)
        if isinstance(scores, dict) and isinstance(scores.get("correct"), dict):
            return other
    raise data.DataError(f"{path}: holds no results; give a results.json that evaluate.py or a "
                         "training run wrote")


def read_baseline(path, decoding):
    """--baseline: a gap that was measured before training, with this decoding."""
    found = read_json(path, "the results.json of a gap evaluation or of a CORD run")
    found = found.get("before", found)
    if not {"text_accuracy", "keys", "decoding"} <= found.keys():
        raise data.DataError(f"{path}: holds no gap; give a results.json that --task gap or "
                             "train_cord.py wrote")
    other = differences(decoding, found["decoding"])
    if other:
        raise data.DataError(f"{path}: was decoded with {other}; give both the same flags")
    return found


def differences(decoding, other):
    """-> "max_new_tokens 200, not 2048": what `other` has first; "" if they are equal."""
    names = [n for n in {**decoding, **other} if decoding.get(n) != other.get(n)]
    return ", ".join(f"{name} {other.get(name)}, not {decoding.get(name)}" for name in names)


def stems(files):
    """The names that several manifests are reported by. DataError where two have the same."""
    names = [Path(file).stem for file in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise data.DataError(f"two of the manifests are called {twice[0]}, and results are "
                             "reported by that name; rename one")
    return names


def flat(by_group):
    """group -> id -> right? -> {id: right?}"""
    return {i: right for group in by_group.values() for i, right in group.items()}


def set_of(other, name, path):
    """Another run's results of the manifest `name`. A training run asks all its files at once.
    DataError where the other was not asked it."""
    sets = {other.get("set"): other, **other.get("splits", {})}
    if name not in sets and None not in sets:
        raise data.DataError(f"{path}: has no manifest called {name}, only {', '.join(sets)}; give "
                             "the same files to both")
    return sets.get(name) or sets[None]


def question_key(example):
    """The same for the same words about the same clip, wherever the folder of the clips lies."""
    clip = Path(*example.audio.parts[-2:])
    return data.fingerprint([dataclasses.replace(example, audio=clip)])


def earlier_verdicts(baseline, name, examples, path):
    """What the model before training said to these examples of the manifest `name` -> view -> kind
    -> id -> right? DataError where it was not asked one of them."""
    other = set_of(baseline, name, path)
    missing = [e.id for e in examples if other["keys"].get(e.id) != question_key(e)]
    if missing:
        raise data.DataError(f"{path}: lacks {len(missing):,} of the {len(examples):,} questions "
                             f"of {name}, or had them in other words ({missing[0]} is the first); "
                             "measure the model before training on the same files")
    correct = {view: {} for view in VIEWS}
    for view in VIEWS:
        verdicts = flat(other["correct"][view])
        for e in examples:
            kind = correct[view].setdefault(e.kind or e.task, {})
            kind[e.id] = verdicts[e.id]
    return correct
