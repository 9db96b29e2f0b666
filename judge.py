"""
Does this answer say the same as that one? What counts as the answer in a model's text, and two
judges of whether two answers agree.

CORD (paper B) rewards a rollout when its answer means the same as the text view's:
r(y) = J(y, y_text) in {0, 1}. The paper distils a model for J. Here are

    rule      no model: choices by letter or words; otherwise numbers as numbers ("2/4" = "0.5",
              "$1,000" = "1000", "twelve" = "12"); otherwise the words or the formula itself, in one
              spelling (x^{2} = x^2), without algebra (sqrt(12) is not 2 sqrt(3))
    a model   any causal LM, asked whether the two agree: yes if it gives "yes" more probability
              than "no"

evaluate.py scores with the same rule. It reads in this order, and the first that is there decides:

    1. the box           \\boxed{B}, <answer>B</answer>, and for open questions GSM8K's "#### 12"
    2. the statement     "The answer is B", the last one, to the end of its sentence
    3. the conclusion    choices: "so it is a cat"; numbers: the last sentence that has one
    4. everything        a sentence that is nothing but a choice; else two choices anywhere are none

Nothing is guessed. No answer, or two that contradict each other, agrees with nothing. A range, a
bound, a negation or an alternative ("5 or 6") is what it says, never equal to one of its numbers.
"""
import re
import string

import torch

import data
import models
from plumbing.quantities import (
    BEHIND_WORDS,
    REASON,
    in_digits,
    number,
    plain,
    same_value,
    sentences,
    spelling,
    value,
)

# ------------------------------------------------------------------------------------------------
# 1. Where does the answer stand?

TAGS = re.compile(data.TAG + r"|<\|[^<>|]*\|>", re.I)      # the stages' tags and control tokens
OTHER_TAGS = re.compile(r"</?(?!answer)[a-z]{3,}>", re.I)
CHINESE = str.maketrans({"。": ". ", "，": ", ", "：": ": ", "；": "; ", "？": "? "})

# "The answer is ...", "my answer would be: ...", "the correct option isn't ...", "答案是...".
# What follows starts at its first word, with the brackets and the sign before it: (B, -5, \frac, .5
ANSWER_IS = (
    r"\b(?:answer|(?:correct|best|right) (?:option|choice))\b(?:[^.:=\n]{0,40}?"
    r"(?:\bis(?=n't|\b)|\bwas|'s\b|\b(?:would|could|should|might|must|may|will) be\b)"
    # "answer: B"; but not "let me answer step by step:"
    r"|(?:\s+(?:to|for)\b[^.:=\n,]{0,40})?[\s*_]*[:=])"
    r"|(?:答案(?:应该|就)?(?:是|选|为|:)|选择?)(?:选项)?")
I_CHOOSE = r"|\bI(?:'d| would|'ll| will)? (?:choose|pick|select|go with)"
BEHIND = r"(?=\W*?((?:\\?[(\[{]\s*){0,3}(?:[\u2212±√-]\s*)?[$£€]?(?:\.(?=\d)|\\)?\w.*))"
STATEMENT = re.compile(f"(?:{ANSWER_IS}){BEHIND}", re.I)
CHOICE_STATEMENT = re.compile(f"(?:{ANSWER_IS}{I_CHOOSE}){BEHIND}", re.I)


def final_answer(output_text):
    """The part of a four-stage answer that is meant to be scored, without tags: <RESPONSE>, closed
    or not; without one, what follows </THINK>; of a trace that never ended, only its last "the
    answer is ..."; of plain text, everything."""
    text = re.split("</THINK>", output_text, maxsplit=1, flags=re.I)[-1]
    response = data.parse_response(text)["response"]
    if response is not None:
        text = response
    elif re.search("<THINK>", text, re.I):
        text = (CHOICE_STATEMENT.findall(text) or [""])[-1]
    return TAGS.sub(" ", text)


def stated(output_text):
    """final_answer, in ASCII punctuation and without other models' tags."""
    return OTHER_TAGS.sub(" ", final_answer(output_text).translate(CHINESE))


def boxed(text):
    """What stands in the last \\boxed{...}, \\fbox{...} or <answer>...</answer>, or None."""
    if tagged := re.findall(r"<answer>(.*?)(?:</answer>|\Z)", text, re.I | re.S):
        return tagged[-1]
    box = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?=\w))", text))
    if not box:
        return None
    begin, depth = box[-1].end(), 1
    if not box[-1][1]:                                     # \boxed 5
        return re.match(r"\w+", text[begin:])[0]
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)       # braces matched
        if depth == 0:
            return text[begin:end]
    return text[begin:]


def without_questions(text):
    """"B? No, C." states C; but a text that is nothing but a question stays."""
    statements = re.sub(r"[^.!?\n]*\?", " ", text)
    return statements if statements.strip() else text


# ------------------------------------------------------------------------------------------------
# 2. Choices: which one does it name?

# A letter in front: "B", "(B)", "B.", "b) gold", "B - gold", "B, the voice is high"; but not
# "B, C or D"
LEADING_LETTER = re.compile(
    r"[(\[]?([A-Z])(?:[)\]][.:]?|[.:](?=\s|$)|\s[-–—]\s|$"
    r"|,(?=\s+(?!or\b|and\b|[A-Z]\b)\w+\s+\w))\s*",
    re.I,
)
# A letter that is called one: "(B)", "option b", and those of a list, "B. gold  C. silver"
NAMED_LETTER = re.compile(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Za-z])\b\)?")
LISTED_LETTER = re.compile(r"(?<!\w)\(?([A-Z])[).:]\s")
# A bare capital where an answer stands: "it's C", "not B but C", "B because ...". In "a C note" or
# "A dog barks" it is none.
BARE_LETTER = re.compile(
    r"(?:^|[.,:;!?]\s*|(?i:\b(?:is|was|be|with|choose|chose|pick|select|say|think|guess|believe"
    r"|feel|that|not|but|or|and|nor|neither|either|both|than|of|probably|maybe|likely|definitely"
    r"|clearly|answer)|'s|n't)\s+)"
    r"([A-HJ-Z])"
    r"(?=$|\s*[.,;:!?()]|是|\s+(?:because|since|as|and|or|nor|but|is|are|isn't|was|would|could|can"
    r"|may|might|must|seems?|rather|instead|over)\b)"
)
CONCLUSION = re.compile(
    r"\b(?:so|therefore|thus|hence|consequently|overall|based on this|in conclusion)\b,?\s+(\S.*)",
    re.I,
)
CLAUSE = re.compile(r"[,;:.!?\n]|(?<!anything )\b(?:but|so|therefore|thus|hence)\b", re.I)
# What denies a choice that follows it in the same clause, and one that stands before it
DENIES = re.compile(
    r"\b(?:not|no(?! doubt)|nor|neither|never|without(?! (?:a|any) doubt)|cannot"
    r"|(?<!other )than|instead of|unlike|except|anything but"
    r"|thought (?:it|this|that)|wrong to"
    r"|rul(?:e|es|ed|ing) out|exclud(?:e|es|ed|ing))\b|n't\b",
    re.I,
)
THOUGHT = re.compile(r"\bthought\s+(?:(?:the|an?)\s+)?$", re.I)
# "What comes after the bell is a dog"; but "a dog barks after the bell" names two
BEFORE_OR_AFTER = re.compile(r"\b(?:before|after)\s+(?:(?:the|an?)\s+)?$", re.I)
VERB = re.compile(r"\s*(?:,|(?:is|was|comes|came|would|must)\b)", re.I)
DENIED = re.compile(
    r"\b(?:is|are|was|were|be)(?:n't| not)\b|\b(?:incorrect|wrong|false|unlikely"
    r"|impossible|ruled out|excluded|eliminated)\b",
    re.I,
)


def without_article(text, choices=()):
    """"the dog" -> "dog"; but beside "E major" the choice "A major" is not "major"."""
    text = plain(text).casefold().replace("-", " ")
    bare = re.sub(r"^(?:a|an|the)\s+(?=\w)", "", text)
    others = {plain(choice).casefold().replace("-", " ") for choice in choices} - {text}
    return text if any(bare in other for other in others) else bare


def place_of(text, choices):
    """The place of the choice that `text` is, word for word but for case and article; or None."""
    exact = [plain(choice).casefold() for choice in choices]
    bare = [without_article(choice, choices) for choice in choices]
    for words, names in ((plain(text).casefold(), exact), (without_article(text), bare)):
        if words and words in names:
            return names.index(words)
    return None


def letter_place(letter):
    return ord(letter.upper()) - ord("A")


def standing_alone(text, choices):
    """The places that a text without anything else in it names: {1} for "cat", "B", "B. cat". A
    letter and words that contradict each other are two: "(B) dog"."""
    place = place_of(text, choices)
    if place is not None:
        return {place}
    lead = LEADING_LETTER.match(text)
    letter = letter_place(lead[1]) if lead else len(choices)
    if letter >= len(choices):
        return set()
    rest = text[lead.end():]
    place = place_of(rest, choices)
    if place is None and plain(rest):
        return set()
    return {letter, letter if place is None else place}


def named_choices(text, choices):
    """The places of all choices that a text names, by words or letter, and does not deny."""
    text = re.sub(r"\$|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
    choices = [choice.replace("$", "") for choice in choices]
    if choices and all(number(choice) is not None for choice in choices):
        choices = [in_digits(plain(choice)) for choice in choices]
        text = re.sub(r"\b(correct|right|only|this|that|which) one\b|\bone (?=of\b)", r"\1", text)
        text = in_digits(text).rpartition("=")[2]          # "10 + 3 = 13" is 13
        found = value(text)
        if found and found[0] != "is" and len(sentences(text)) == 1:
            return set()                                   # "at least 2", "1 or 2"
    if {without_article(choice) for choice in choices} <= {"yes", "no"}:
        text = re.split(r"[,;:]", text)[0]                 # "Yes, there is no silence"
    alone = set()
    for sentence in sentences(text):
        alone |= standing_alone(plain(sentence), choices)
    if alone:
        return alone
    text = plain(text)
    lead = LEADING_LETTER.match(text)
    if lead and letter_place(lead[1]) < len(choices):
        # "B. A dog would bark."; a list names more
        listed = LISTED_LETTER.findall(REASON.split(text, maxsplit=1)[0])
        places = {letter_place(letter) for letter in (lead[1], *listed)}
        places.add(place_of(sentences(text[lead.end():])[0], choices))
        return {place for place in places if place is not None and place < len(choices)}

    text = marked(text, choices)
    # "not A, B, or C" is one clause; "C, because B is a cat" is C
    text = re.sub(r"⟧,?\s+(?:(?:or|and|nor)\s+)?⟦", "⟧ ⟦", text)
    before_reason = REASON.split(text, maxsplit=1)[0]
    named, times = set(), set()
    for clause in CLAUSE.split(before_reason if "⟦" in before_reason else text):
        for found in re.finditer(r"⟦(\d+)⟧", clause):
            before, behind = clause[:found.start()], clause[found.end():]
            if DENIES.search(before) or THOUGHT.search(before) or DENIED.search(behind):
                continue
            if not BEFORE_OR_AFTER.search(before):
                named.add(int(found[1]))
            elif not VERB.match(behind):
                times.add(int(found[1]))
    return named | times if named else named


def marked(text, choices):
    """What names a choice, replaced by its place: "It's a cat, not A" -> "It's a ⟦1⟧, not ⟦0⟧". So
    "white gold" does not also name "gold", and the "no" of a choice denies nothing."""
    def mark(place):
        return f"⟦{place}⟧" if place < len(choices) else "⟦⟧"

    def mark_named(match):
        return mark(letter_place(match[1] or match[2]))

    def mark_bare(match):
        return match[0][:match.start(1) - match.start()] + mark(letter_place(match[1]))

    if any(len(plain(choice)) == 1 for choice in choices):
        text = NAMED_LETTER.sub(mark_named, text)          # blood groups: "(A)" is the first, O
    for choice in sorted(choices, key=lambda choice: len(plain(choice)), reverse=True):
        words, flags = without_article(choice, choices), re.I
        if len(plain(choice)) == 1:
            words, flags = plain(choice), 0                # "a dog" does not name the note A
        if words:
            pattern = r"(?<![\w⟦-])(?<!\d[.,])" + re.escape(words) + r"(?![\w#⟧]|[.,-]\d|-\w)"
            text = re.sub(pattern, mark(place_of(choice, choices)), text, flags=flags)
    return BARE_LETTER.sub(mark_bare, NAMED_LETTER.sub(mark_named, text))


def extract_choice(output_text, choices):
    """output_text: what the model said. choices: list of str. Returns the chosen one of `choices`,
    or None; never a guess. The first place that names any choice decides; if it names two, none."""
    answer = stated(output_text)
    parts = [boxed(answer) or ""]
    for statement in reversed(CHOICE_STATEMENT.findall(answer)[-5:]):     # some models never stop
        head = re.split("[:;]", statement)[0]              # "yes: it gets no louder"
        if standing_alone(plain(head), choices):
            parts.append(head)
        parts += [sentences(statement)[0], statement]
    answer = without_questions(answer)
    for conclusion in CONCLUSION.findall(answer)[-1:]:
        parts.append(sentences(conclusion)[0])
    parts.append(answer)
    for part in parts:
        if named := named_choices(part, choices):
            return choices[named.pop()] if len(named) == 1 else None
    return None


def spoken_choices(text) -> list[str]:
    """The choices that a spoken question lists itself, as VoiceBench's do, or []: lines "A. gold",
    "B. silver", ... without a gap; or "A. gold B. silver C. iron D. tin" in one line."""
    text = text or ""
    listed = re.findall(r"^\s*\(?([A-Z])[.):]\s*(\S.*)$", text, re.M)
    starts = [i for i, (letter, _) in enumerate(listed) if letter == "A"]
    listed = listed[starts[-1]:] if starts else []
    letters = "".join(letter for letter, _ in listed)
    if len(letters) > 1 and string.ascii_uppercase.startswith(letters):
        return [choice.strip() for _, choice in listed]
    pieces = r".*(?<!\w)A[.):]\s*(.+?)\s+B[.):]\s*(.+?)\s+C[.):]\s*(.+?)\s+D[.):]\s*([^\n]+)"
    found = re.search(pieces, text, re.S)
    return [choice.strip() for choice in found.groups()] if found else []


def choices_and_answer(example):
    """An example's choices and its answer. Where the manifest lists none and the answer is a
    letter, as in VoiceBench, they are those that the spoken question lists: the letter B is a
    place, "B. silver", and never a choice that is itself called B."""
    choices, answer = example.choices, example.answer
    if choices or not re.fullmatch("[A-Z]", answer):
        return choices, answer
    choices = spoken_choices(example.transcript)
    place = letter_place(answer)
    if place >= len(choices):
        return [], answer
    return choices, f"{answer}. {choices[place]}"


# ------------------------------------------------------------------------------------------------
# 3. Open answers: what does it state?

# Sentences that state nothing: "I hope this helps!", "If you have 1 more question", "Let's check:
# ...", "That is 2 less than before"
COURTESY = re.compile(
    r"(?:i hope|hope|let me know|if you (?:have|need|want|would)|feel free|please"
    r"|(?:let's |let me |to )?(?:check|verify)"
    r"|(?:this|that)(?: is|'s) .*(?:less|more|fewer))\b",
    re.I,
)
# "The answer is as follows:" states nothing yet
FOLLOWS = re.compile(r"(?:as follows|(?:the )?following|(?:given |shown )?below)\b", re.I)
# What states the number in a sentence: behind "so", then behind "is" ("the sum of 3 and 4 is 7")
THEREFORE = re.compile(
    r"\b(?:so|therefore|thus|hence|for a total of|in total|altogether)\b(?=.*\d)"
    r"|\bwhich (?:is|equals|gives|makes)\b(?=\s*[$£€]?[\d.,/]+\W*$)",
    re.I,
)
PREDICATE = re.compile(r"\b(?:is|are|was|were|equals)\b(?=[^=]*\d[^=]*$)", re.I)


def open_answer(output_text):
    """The part of an answer to an open question that states it: the box, what follows GSM8K's last
    "####", what follows the last "the answer is", the last sentence that has a number, or all."""
    answer = stated(output_text)[-2000:]                   # of a model that never stops, the end
    box = boxed(answer)
    if box and box.strip():
        return box
    if marked := re.findall(r"####\s*(\S.*)", answer):
        return marked[-1]
    answer = re.sub(r"\\[\[\]]|\$\$", " ", answer)           # a formula on a line of its own
    statements = [text for text in STATEMENT.findall(answer) if not FOLLOWS.match(text)]
    if statements:
        return sentences(statements[-1])[0]
    stating = [part for part in sentences(without_questions(answer)) if not COURTESY.match(part)]
    for sentence in reversed(stating):
        digits = in_digits(sentence)
        if re.search(r"\d", digits):
            predicate = PREDICATE.split(THEREFORE.split(digits)[-1], maxsplit=1)[-1]
            return sentence if predicate == digits else predicate
    if len(stating) == 1:                                  # "the capital is Paris"
        return re.split(r"\b(?:is|are|was|were)\b", stating[0], maxsplit=1)[-1]
    return "\n".join(stating)


def agree(said, reference, choices=()):
    """Do two answers mean the same, by the rule? With choices: both name the same one. Without: the
    same numbers in the same relation, or the same words."""
    if choices:
        chosen = extract_choice(said, choices)
        return chosen is not None and chosen == extract_choice(reference, choices)
    said, reference = open_answer(said), open_answer(reference)
    values = value(said), value(reference)
    if values[1] is not None:
        return values[0] is not None and same_value(*values)
    if values[0] is not None:                              # "yes, since 3 > 2" for "Yes"
        said = re.split("[,;]", said)[0]
    said, reference = (
        spelling(BEHIND_WORDS.split(text.strip(), maxsplit=1)[0]) for text in (said, reference)
    )
    return bool(said) and said == reference


# ------------------------------------------------------------------------------------------------
# 4. A model

ASK = (
    "Question: {question}\nReference answer: {reference}\nGiven answer: {said}\n"
    "Do the two answers mean the same? Reply with yes or no."
)


def load(name, device):
    """--judge: "rule" -> agree itself, otherwise a causal LM (folder or hub id).

    -> verdicts(triples): [(example, said, reference)] -> list of bool. Raises SystemExit with one
    sentence if the model cannot be loaded or has no word for yes or no."""
    if name == "rule":
        return lambda triples: [
            agree(said, reference, choices_and_answer(example)[0])
            for example, said, reference in triples
        ]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = models.load_text_model(name, dtype=dtype)
    model.to(device).requires_grad_(False)

    def first_tokens(*words):
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return {tokens[0] for tokens in ids if tokens}

    yes, no = first_tokens("yes", "Yes"), first_tokens("no", "No")
    if not yes or not no or yes & no:
        raise SystemExit(f"--judge {name}: its tokenizer begins \"yes\" and \"no\" with the same "
                         "token, so it cannot be asked; give another model")
    return lambda triples: ask(model, tokenizer, triples, sorted(yes), sorted(no))


@torch.no_grad()
def ask(model, tokenizer, triples, yes, no, *, batch_size=32):
    """p(yes) > p(no) as the next token, summed over spellings. An answer that says nothing is no
    answer, whatever the model thinks."""
    verdicts = []
    for start in range(0, len(triples), batch_size):
        chunk = triples[start:start + batch_size]
        said = [open_answer(output) for _, output, _ in chunk]
        # What is spoken and what is written: beside a spoken problem may stand no more than
        # "answer in a box"
        questions = [
            "\n".join(filter(None, (example.transcript, data.question_text(example))))
            for example, _, _ in chunk
        ]
        prompts = [
            ASK.format(question=question, reference=open_answer(reference), said=answer)
            for question, (_, _, reference), answer in zip(questions, chunk, said)
        ]
        prompts = [data.text_prompt(tokenizer, prompt, "") for prompt in prompts]
        prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        inputs = data.pad_left(prompts, tokenizer)
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]         # [batch, vocab]
        p = logits.float().softmax(-1)
        agreed = p[:, yes].sum(-1) > p[:, no].sum(-1)                    # [batch]
        for verdict, answer in zip(agreed.tolist(), said):
            verdicts.append(verdict and bool(plain(answer)))
    return verdicts
