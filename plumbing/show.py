"""
python data.py show FILE --id X --student S [--teacher T]: both views of one example, side by side.

A line is a position: its token and, in the response, what the model predicts there. Row k of both
columns predicts the same response token; that is what every loss relies on.
"""
import itertools

import data
from plumbing import manifest

SIDE = 36           # columns of a view: position, id, token
MIDDLE = 28         # columns between the views: the token that both predict
TOKEN = 15          # columns of a token's text


def command(args):
    """Finds the example and prints both its views."""
    import transformers

    examples = []
    for line in manifest.parse(args.file):
        if isinstance(line, data.Example) and args.id in (None, line.id):
            examples.append(line)
    if not examples:
        raise data.DataError(f"{args.file} has no valid example with the id {args.id}; "
                             "python data.py check names the lines with faults")
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            args.student, trust_remote_code=False
        )
        text_tokenizer = transformers.AutoTokenizer.from_pretrained(
            args.teacher or args.student, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise data.DataError(f"there is no processor or tokenizer ({str(error).splitlines()[0]}); "
                             "name the models' folders with --student and --teacher") from None
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    words = "transcript"
    if args.teacher or not examples[0].transcript:
        words = "description"
    print(*picture(examples[0], processor, text_tokenizer, words), sep="\n")


def picture(example, processor, text_tokenizer, words) -> list[str]:
    """Both views of an example, 100 columns wide. words: the field that the text view reads."""
    student = processor.tokenizer
    student_ids, text_ids, _ = data.shared_vocabulary(student, text_tokenizer)
    mapping = data.token_map(student_ids, text_ids, len(student))
    batch = data.collate(
        [example], processor, text_tokenizer, words=words, student_to_teacher=mapping
    )

    # 1. Each view is a column: its prompt, then its response, which begins at the prompt's end
    heading = "predict_positions"
    columns = []
    for view, tokenizer in ((batch.audio, student), (batch.text, text_tokenizer)):
        ids = view.inputs["input_ids"][0].tolist()
        begin = int(view.predict_positions[0])
        prompt = entries(ids[:begin], 0, tokenizer, fold=True)
        response = entries(ids[begin:], begin, tokenizer)
        columns.append([*prompt, "", heading, *response])

    # 2. Between them what both predict. The turn's end is predicted, and predicts nothing
    middle = ["", "both predict"]
    for k, label in enumerate(batch.labels.tolist(), 1):
        middle.append(f"--> {f'y{k}':<5}{readable(student, label):<{TOKEN}}<--")
    middle.append("")

    # 3. All three end together: from below, the shorter are filled up
    columns.insert(1, middle)
    from_below = itertools.zip_longest(*map(reversed, columns), fillvalue="")
    title = f"{'position':>9}{'id':>8}  token"
    rows = [("AUDIO VIEW", "", "TEXT VIEW"), (title, "", title), *reversed(list(from_below))]
    return [f"{left:{SIDE}}{between:^{MIDDLE}}{right}".rstrip() for left, between, right in rows]


def readable(tokenizer, token) -> str:
    """A token's text, with a space as "_" and a line's end as "\\n", cut to fit."""
    text = tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "_")
    return text if len(text) < TOKEN else text[:TOKEN - 3] + ".."


def entries(ids, place, tokenizer, *, fold=False) -> list[str]:
    """A line for each token, the first of which stands at this place.

    fold: equal tokens in a row, such as a clip's placeholders, are one line."""
    lines = []
    for token, run in itertools.groupby(ids):
        count = len(list(run))
        text = readable(tokenizer, token)
        places = range(place, place + count)
        if fold and count > 2:
            places = [f"{place}-{place + count - 1}"]
            text = f"{text} x {count}"
        lines += [f"{place:>9}{token:>8}  {text}" for place in places]
        place += count
    return lines
