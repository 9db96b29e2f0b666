"""
python data.py show FILE --id X --student S [--teacher T]: both views of one example, side by side.

A line is a position: its token and, in the response, what the model predicts there. Row k of both
columns predicts the same response token; that is what every loss relies on.
"""
import itertools

import data
from plumbing import check

SIDE = 36           # columns of a view: position, id, token
MIDDLE = 28         # columns between the views: the token that both predict
TOKEN = 15          # columns of a token's text


def command(args):
    """Finds the example and prints both its views."""
    import transformers

    lines = data.parse_manifest(args.file)
    examples = [line for line in lines if isinstance(line, data.Example)]
    if args.id is not None:
        examples = [example for example in examples if example.id == args.id]
    if not examples:
        raise data.DataError(f"{args.file} has no valid example with the id {args.id}; "
                             "python data.py check names the lines with faults")
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            args.student, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise data.DataError(f"there is no processor in {args.student} "
                             f"({str(error).splitlines()[0]}); "
                             "name the student's folder with --student") from None
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    reader = processor.tokenizer
    if args.teacher:
        reader = check.load_tokenizer(args.teacher)
    print(*picture(examples[0], processor, reader, args.words), sep="\n")


def picture(example, processor, reader, words="description") -> list[str]:
    """Both views of an example, 100 columns wide. reader: the text view's tokenizer."""
    student = processor.tokenizer
    student_ids, reader_ids, _ = data.shared_vocabulary(student, reader)
    mapping = data.token_map(student_ids, reader_ids, len(student))
    batch = data.collate([example], processor, reader, words=words, student_to_teacher=mapping)
    audio = tokens(batch.audio, student)
    text = tokens(batch.text, reader)
    audio_places = batch.audio.predict_positions.tolist()
    text_places = batch.text.predict_positions.tolist()

    # 1. The prompts, each by itself; they end together, where the response begins
    columns = f"{'position':>9}{'id':>8}  token"
    lines = [
        side_by_side("AUDIO VIEW", "", "TEXT VIEW"),
        side_by_side(columns, "", columns),
    ]
    left = folded(audio[:audio_places[0]])
    right = folded(text[:text_places[0]])
    height = max(len(left), len(right))
    left = [""] * (height - len(left)) + left
    right = [""] * (height - len(right)) + right
    lines += [side_by_side(one, "", other) for one, other in zip(left, right)]

    # 2. The response: row k of both sides predicts its token k
    lines += ["", side_by_side("predict_positions", "both predict", "predict_positions")]
    for k, label in enumerate(batch.labels.tolist()):
        middle = f"--> {f'y{k + 1}':<5}{readable(student, label):<{TOKEN}}<--"
        left, right = audio[audio_places[k]], text[text_places[k]]
        lines.append(side_by_side(entry(*left), middle, entry(*right)))

    # 3. The turn's end is predicted, and predicts nothing
    lines.append(side_by_side(entry(*audio[-1]), "", entry(*text[-1])))
    return lines


def tokens(view, tokenizer) -> list[tuple]:
    """A view of one example -> (position, id, text) of each token."""
    ids = view.inputs["input_ids"][0].tolist()
    return [(str(place), token, readable(tokenizer, token)) for place, token in enumerate(ids)]


def readable(tokenizer, token) -> str:
    """A token's text, with a space as "_" and a line's end as "\\n", cut to fit."""
    text = tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "_")
    return text if len(text) < TOKEN else text[:TOKEN - 3] + ".."


def folded(column) -> list[str]:
    """The lines of a prompt; equal tokens in a row, such as a clip's placeholders, are one line."""
    lines = []
    for _, run in itertools.groupby(column, key=lambda entry: entry[1]):
        run = list(run)
        place, token, text = run[0]
        if len(run) > 2:
            place, text = f"{place}-{run[-1][0]}", f"{text} x {len(run)}"
            lines.append(entry(place, token, text))
        else:
            lines += [entry(*one) for one in run]
    return lines


def entry(place, token, text) -> str:
    return f"{place:>9}{token:>8}  {text}"


def side_by_side(left, middle, right) -> str:
    return f"{left:{SIDE}}{middle:^{MIDDLE}}{right}".rstrip()
