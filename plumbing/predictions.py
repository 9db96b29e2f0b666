"""
Answers and results from elsewhere: benchmark files with somebody's outputs, and the results.json of
another run. Each is checked before it is used; what is wrong is said in one sentence (DataError).
"""
import dataclasses
import json
import re
from pathlib import Path

import data
from plumbing.files import make_folder, replace_text

VIEWS = ("text", "audio")

# Names of the results, which no task may have.
TAKEN = {"average", "ua", "intervals", "official", "groups", "counts", "correct"}


def read_json(path, what, *, jsonl=False):
    """what: what the user should give instead of a file that cannot be read. jsonl: a file with an
    object a line is read, too."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except ValueError:
            lines = [line for line in text.split("\n") if line.strip()]
            if not jsonl or len(lines) < 2:
                raise
            return [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise data.DataError(f"{path}: cannot be read as JSON ({error}); give {what}") from None


def write_samples(out, samples):
    """samples.jsonl: each question with what was answered. Returns the folder."""
    out = make_folder(out or "runs/evaluate")
    replace_text(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    return out


def lettered(letter, choices):
    """A reference that is a letter -> (choices, "B. silver"). The letter is a place: it is not
    taken for a choice that is itself called B. Without such a place: ([], letter)."""
    index = ord(letter) - ord("A")
    if index >= len(choices):
        return [], letter
    return choices, f"{letter}. {choices[index]}"


def as_mmau(record, n, task):
    """The n-th record of a file, MMAU's, MMAR's or VoiceBench's -> in MMAU's form."""
    if task == "mcq":
        prompt = record.get("prompt")
        choices = data.spoken_choices(prompt) if isinstance(prompt, str) else []
        choices = choices or list("ABCD")
        answer = record.get("reference")
        if isinstance(answer, str) and re.fullmatch("[A-Z]", answer.strip()):
            answer = lettered(answer.strip(), choices)[1]
        output = record.get("response")
        fields = {"choices": choices, "answer": answer, "model_output": output}
        return {"id": str(n), "task": "mcq", **fields}

    if "modality" in record:
        output = record.get("answer_prediction", record.get("model_output"))
        return {"id": str(n), **record, "task": record["modality"], "model_output": output}
    return record


def fault_of(record, ids, task):
    """What is wrong with a record in MMAU's form, or None."""
    for key in ("id", "task", "answer"):
        if not isinstance(record.get(key), str) or not record[key]:
            return f"has no text under {'reference' if task == 'mcq' else key!r}"
    choices = record.get("choices")
    if not isinstance(choices, list) or not choices:
        return "has no list of texts under 'choices'"
    if not all(isinstance(choice, str) for choice in choices):
        return "has no list of texts under 'choices'"
    if not isinstance(record.get("model_output"), str | None):
        return ("holds something that is not text under 'model_output', 'answer_prediction' or "
                "'response'")
    if record["task"] in TAKEN:
        return f"has the task {record['task']!r}, the name of one of the results"
    if record["id"] in ids:
        return f"repeats the id {record['id']!r}"
    return None


def read_predictions(path, task="mmau"):
    """MMAU's records (a JSON list), MMAR's (JSONL; its modality is the task) or, with task="mcq",
    VoiceBench's (JSONL) -> MMAU's. Raises data.DataError with the file and the record's number."""
    what = "a JSON list or JSONL of the benchmark's records with the outputs added"
    records = read_json(path, what, jsonl=True)
    if not isinstance(records, list) or not records:
        raise data.DataError(f"{path}: holds no list of records; give {what}")

    converted = {}
    for n, record in enumerate(records, 1):
        fault = "is not an object"
        if isinstance(record, dict):
            record = as_mmau(record, n, task)
            fault = fault_of(record, converted, task)
        if fault:
            raise data.DataError(f"{path}: record {n} {fault}; start from the benchmark's own file "
                                 "and add only the outputs")
        converted[record["id"]] = record
    return list(converted.values())


def read_results(path):
    """--compare: the results of another evaluation, or of a training run after training."""
    other = read_json(path, "the results.json of another run")
    if isinstance(other, dict):
        other = other.get("after", other)
        for part in ("aqa", "ser"):
            scores = other.get(part) if isinstance(other, dict) else None
            if isinstance(scores, dict) and isinstance(scores.get("correct"), dict):
                return other
    raise data.DataError(f"{path}: holds no results; give a results.json that evaluate.py or a "
                         "training run wrote")


def differences(decoding, other):
    """-> "max_new_tokens 200, not 2048": what `other` has first; "" if they are equal."""
    names = [n for n in {**decoding, **other} if decoding.get(n) != other.get(n)]
    return ", ".join(f"{name} {other.get(name)}, not {decoding.get(name)}" for name in names)


def read_baseline(path, decoding):
    """--baseline: a gap that was measured before training, with this decoding."""
    found = read_json(path, "the results.json of a gap evaluation or of a CORD run")
    if isinstance(found, dict):
        found = found.get("before", found)
    if not isinstance(found, dict) or "text_accuracy" not in found:
        raise data.DataError(f"{path}: holds no gap; give a results.json that --task gap or "
                             "train_cord.py wrote")
    if not {"keys", "decoding"} <= found.keys():
        raise data.DataError(f"{path}: does not say how it was decoded; measure the model before "
                             "training anew, with --task gap")
    other = differences(decoding, found["decoding"])
    if other:
        raise data.DataError(f"{path}: was decoded with {other}; give both the same flags")
    return found


def unspoken(path, examples):
    """The ids that prepare.speak left out of the manifest `path`, because nobody can say them."""
    listed = Path(path).with_suffix(".skipped.jsonl")
    if not listed.exists():
        return []
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
        ids = [json.loads(line)["id"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.DataError(f"{listed}: is not what speak.py writes ({error!r}); run it again, or "
                             "move the file away") from None
    asked = {e.id for e in examples}
    return [i for i in ids if i not in asked]


# -------------------------------------------------------------------------------------------------
# Which questions do two files share?

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


def merged(other, name):
    """Another run's results -> those of all its examples, whichever files they stood in, as compare
    takes them. What two of its files hold counts as in the one called `name`."""
    sets = {other.get("set"): other, **other.get("splits", {})}
    found = {"aqa": {"correct": {}}, "ser": {"correct": {}}}
    for key in sorted(sets, key=lambda key: key == name):
        for part in found:
            for group, verdicts in sets[key].get(part, {}).get("correct", {}).items():
                found[part]["correct"].setdefault(group, {}).update(verdicts)
    return found


def question_key(example):
    """The same for the same words about the same clip, wherever the folder of the clips lies."""
    clip = Path(*example.audio.parts[-2:])
    return data.fingerprint([dataclasses.replace(example, audio=clip)])


def earlier_verdicts(baseline, name, examples, path):
    """What the model before training said to these examples of the set `name`, whichever files they
    stood in then -> view -> kind -> id -> right? DataError where it was not asked one of them."""
    sets = {baseline.get("set"): baseline, **baseline.get("splits", {})}
    right = {view: {} for view in VIEWS}                            # question_key -> right?
    for other in sorted(sets, key=lambda other: other == name):     # the namesake last: it counts
        keys = sets[other]["keys"]                                  # what is unspoken has none
        for view in VIEWS:
            verdicts = flat(sets[other]["correct"][view])
            right[view].update({keys[i]: verdict for i, verdict in verdicts.items() if i in keys})

    missing = [e.id for e in examples if question_key(e) not in right["text"]]
    if missing:
        raise data.DataError(f"{path}: lacks {len(missing):,} of the {len(examples):,} questions "
                             f"of {name}, or had them in other words ({missing[0]} is the first); "
                             "measure the model before training on the same files")
    correct = {view: {} for view in VIEWS}
    for e in examples:
        for view in VIEWS:
            kind = correct[view].setdefault(e.kind or e.task, {})
            kind[e.id] = right[view][question_key(e)]
    return correct
