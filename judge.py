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

# The stages' tags, other models', and control tokens
TAGS = re.compile(r"</?(?!answer)[a-z]{3,}>|<\|[^<>|]*\|>", re.I)

# What follows "the answer is" starts at its first word, with the brackets and the sign before it:
# (B, -5, $5, \frac, .5
ANSWER_IS = r"""
    (?<!wrong[ ])(?<!incorrect[ ])(?<!least[ ]likely[ ])
    \b(?:answer|(?:correct|best|right)[ ](?:option|choice))\b
    (?: [^.:=\n]{0,40}?                                    # my answer to this is, the answer isn't
        (?:\bis(?=n't|\b)|\bwas|'s\b|\b(?:would|could|should|might|must|may|will)[ ]be\b)
      | (?:\s+(?:to|for)\b[^.:=\n,]{0,40})? [\s*_]*[:=] )  # "answer: B"; but not "let me answer
                                                           # step by step:"
  | (?:答案(?:应该|就)?(?:是|选|为|[:：])|选择?)(?:选项)?"""
I_CHOOSE = r"| \bI(?:'d|[ ]would|'ll|[ ]will)?[ ](?:choose|pick|select|go[ ]with)"
BEHIND = r"(?=\W*?((?:\\?[(\[{]\s*){0,3}(?:[\u2212±√-]\s*)?[$£€]?(?:\.(?=\d)|\\)?\w.*))"
# "The answer is as follows:" states nothing yet
FOLLOWS = r"(?:as[ ]follows|(?:the[ ])?following|(?:given[ ]|shown[ ])?below)\b"
STATEMENT = re.compile(rf"(?:{ANSWER_IS})(?!\W*{FOLLOWS}){BEHIND}", re.I | re.X)
CHOICE_STATEMENT = re.compile(f"(?:{ANSWER_IS}{I_CHOOSE}){BEHIND}", re.I | re.X)

# What stands in braces, with braces in braces in braces: {\frac{\sqrt{2}}{2}}
INSIDE = r"[^{}]*"
for _ in range(3):
    INSIDE = rf"(?:[^{{}}]|\{{{INSIDE}\}})*"
BOX = re.compile(rf"(?=\\(?:boxed|fbox)\s*(?:\{{({INSIDE})|(\w+)))")         # \boxed{5}, \boxed 5


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


def without_questions(text):
    """"B? No, C." states C; but a text that is nothing but a question stays."""
    statements = re.sub(r"[^.!?\n]*\?", " ", text)
    return statements if statements.strip() else text


def boxed(text):
    """What stands in the last \\boxed{...}, \\fbox{...} or <answer>...</answer>, or ""."""
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|\Z)", text, re.I | re.S)
    boxes = ["".join(found) for found in BOX.findall(text)]
    return (tagged or boxes or [""])[-1]


# ------------------------------------------------------------------------------------------------
# 2. Choices: which one does it name?

# A letter in front, that is the answer whatever follows
LEADING_LETTER = re.compile(
    r"""[(\[]?([A-Z])
        (?: [)\]][.:]? | [.:](?=\s|$) | \s[-–—]\s | $      # (B), b) gold, B. gold, B - gold, B
          | ,(?=\s+(?!or\b|and\b|[A-Z]\b)\w+\s+\w) )\s*    # B, the voice is high; but not B, C or D
    """, re.I | re.X
)
LISTED_LETTER = re.compile(r"(?<!\w)\(?([A-Z])[).:]\s")    # and those of a list, B. gold  C. silver
# A letter that is called one: "(B)", "option b"
NAMED_LETTER = re.compile(r"(\((?=[A-Z]\))|\b(?:[Oo]ption|[Cc]hoice)\s+\(?)([A-Za-z])\b")
# A bare capital where an answer stands: "it's C", "not B but C", "B because ...". In "a C note" or
# "A dog barks" it is none.
BARE_LETTER = re.compile(
    r"""(^|[.,:;!?]\s*
        |(?i:'s|n't|\b(?:is|was|be|with|choose|chose|pick|select|say|think|guess|believe|feel|that
            |not|but|or|and|nor|neither|either|both|than|of|probably|maybe|likely|definitely|clearly
            |answer))\s+)
        ([A-HJ-Z])
        (?=$|\s*[.,;:!?()]|是
          |\s+(?:because|since|as|and|or|nor|but|is|are|isn't|was|would|could|can|may|might|must
            |seems?|rather|instead|over)\b)
    """, re.X
)
CONCLUSION = re.compile(
    r"\b(?:so|therefore|thus|hence|consequently|overall|based on this|in conclusion)\b,?\s+(\S.*)",
    re.I,
)
CLAUSE = re.compile(
    r"[,;:.!?，；：。？\n]|(?<!anything )(?<!everything )\b(?:but|so|therefore|thus|hence)\b", re.I
)
# What denies all that follows in its clause
DENIES = re.compile(
    r"""\b(?:not|no(?![ ]doubt)|nor|neither|never|without(?![ ](?:a|any)[ ]doubt)|cannot
          |(?<!other[ ])than|instead[ ]of|unlike|except|(?:any|every)thing[ ]but|far[ ]from
          |hardly|unlikely|least[ ]likely|wrong|incorrect|false[ ]to
          |(?<!\bno[ ])(?<!\ba[ ])(?<!\bany[ ])doubt
          |thought[ ](?:it|this|that|(?:(?:the|an?)[ ])?⟦)
          |rul(?:e|es|ed|ing)[ ]out|exclud(?:e|es|ed|ing))\b|n't\b
    """, re.I | re.X
)
# A choice that only says when: "After the bell I hear ..."
WHEN = r"(?i:\b(?:before|after)\s(?:(?:the|an?)\s)?⟦\d+⟧)"
# What is denied behind it, "A dog is wrong", and what says when something is, "What comes after the
# bell is a dog"; but "a dog barks after the bell" names two
DENIED = re.compile(
    rf"""⟦\d+⟧(?=.*\b(?:(?:is|are|was|were|be)(?:n't|[ ]not)|incorrect|wrong|false|unlikely
          |impossible|ruled[ ]out|excluded|eliminated)\b)
      | {WHEN}(?=[ ](?:is|was|comes|came|would|must)\b)
    """, re.I | re.X
)


def names_of(choices):
    """The choices in one spelling, without article: "the dog" -> "dog"; but beside "E major" the
    choice "A major" is not "major"."""
    names = [spelt(choice) for choice in choices]
    bare = [without_article(name) for name in names]
    return [
        name if any(short in other and short != other for other in bare) else short
        for name, short in zip(names, bare)
    ]


def spelt(text):
    return plain(text).casefold().replace("-", " ")


def without_article(name):
    return re.sub(r"^(?:a|an|the)\s+(?=\w)", "", name)


def place_of(text, choices):
    """The place of the choice that `text` is, word for word but for case and article; or None."""
    names, words = names_of(choices), spelt(text)
    for name in (words, without_article(words)):
        if name in names:
            return names.index(name)
    return None


def letter_place(letter):
    return ord(letter.upper()) - ord("A")


def standing_alone(sentence, choices):
    """The places that a sentence names that is nothing but a choice, or begins with a letter: {1}
    for "cat", "B", "B. cat", "B. A dog would bark". A letter and words that contradict each other
    are two, "(B) dog", and so are the letters of a list."""
    place = place_of(sentence, choices)
    if place is not None:
        return {place}
    lead = LEADING_LETTER.match(sentence)
    if not lead or letter_place(lead[1]) >= len(choices):
        return set()
    letters = LISTED_LETTER.findall(REASON.split(sentence, maxsplit=1)[0])
    places = {letter_place(letter) for letter in (lead[1], *letters)}
    places.add(place_of(sentence[lead.end():], choices))
    return places & set(range(len(choices)))


def named_choices(text, choices):
    """The places of all choices that a text names, by words or letter, and does not deny."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
    several = False
    if all(number(choice) is not None for choice in choices):
        choices = [in_digits(plain(choice)) for choice in choices]
        text = re.sub(r"\b(correct|right|only|this|that|which) one\b|\bone (?=of\b)", r"\1", text)
        text = in_digits(text[-2000:]).rpartition("=")[2]  # "10 + 3 = 13" is 13
        text = re.sub(r"(?i)(?<!\d )\b(?:minus|negative) (?=[$£€]?\d)", "-", text)
        relation, quantities = value(REASON.split(text, maxsplit=1)[0]) or ("is", ())
        several = relation != "is" or len(set(quantities)) > 1      # "at least 2", "1 or 2"
    if set(names_of(choices)) <= {"yes", "no"}:
        text = re.split(r"[,;:]", text)[0]                 # "Yes, there is no silence"

    alone = set()
    for sentence in sentences(text):
        alone |= standing_alone(plain(sentence), choices)
    if alone or several and len(sentences(text)) == 1:
        return alone

    text = marked(plain(text), choices)
    if "⟦" not in re.sub(WHEN, "", text):
        return set()
    # "not A, B, or C" is one clause; "C, because B is a cat" is C
    text = re.sub(r"⟧\)?,?\s+(?:(?:or|and|nor)\s+)?\(?⟦", "⟧ ⟦", text)
    before_reason = REASON.split(text, maxsplit=1)[0]
    named = set()
    for clause in CLAUSE.split(before_reason if "⟦" in before_reason else text):
        asserted = DENIES.split(DENIED.sub("", clause), maxsplit=1)[0]
        named.update(int(place) for place in re.findall(r"⟦(\d+)⟧", asserted))
    return named


def marked(text, choices):
    """What names a choice, replaced by its place: "It's a cat, not A" -> "It's a ⟦1⟧, not ⟦0⟧". So
    "white gold" does not also name "gold", and the "no" of a choice denies nothing."""
    def mark_letter(match):
        place = letter_place(match[2])
        return match[1] + (f"⟦{place}⟧" if place < len(choices) else "⟦⟧")

    names = names_of(choices)
    if any(len(name) == 1 for name in names):              # of blood groups "(A)" is the first, O
        text = NAMED_LETTER.sub(mark_letter, text)
    for place, name in sorted(enumerate(names), key=lambda pair: -len(pair[1])):
        flags = re.I
        if len(name) == 1:
            name, flags = plain(choices[place]), 0         # "a dog" does not name the note A
        words = re.escape(name).replace(r"\ ", "[ -]")     # hip hop, hip-hop
        pattern = rf"(?<![\w⟦-])(?<!\d[.,]){words}(?![\w#⟧]|[.,-]\d|-\w)"
        text = re.sub(pattern, f"⟦{place}⟧", text, flags=flags)
    return BARE_LETTER.sub(mark_letter, NAMED_LETTER.sub(mark_letter, text))


def extract_choice(output_text, choices):
    """output_text: what the model said. choices: list of str. Returns the chosen one of `choices`,
    or None; never a guess. The first place that names any choice decides; if it names two, none."""
    answer = final_answer(output_text)
    parts = [boxed(answer)]
    for statement in reversed(CHOICE_STATEMENT.findall(answer)[-5:]):     # some models never stop
        sentence = sentences(statement)[0]
        parts += [re.split(r"[:;]\s", sentence)[0], sentence, statement]    # "yes: no louder"
    answer = without_questions(answer)
    for conclusion in CONCLUSION.findall(answer)[-1:]:
        parts += sentences(conclusion)[:1]
    for part in (*parts, answer):
        if named := named_choices(part, choices):
            return choices[named.pop()] if len(named) == 1 else None
    return None


def spoken_choices(text) -> list[str]:
    """The choices that a spoken question lists itself, as VoiceBench's do, or []: lines "A. gold",
    "B. silver", ..., whatever is between them; or "A. gold B. silver C. iron D. tin" in one."""
    some_lines = r"\s*\n(?:[^\n]*\n)*?\s*"
    lines = [(string.ascii_uppercase[:n], some_lines) for n in range(26, 1, -1)]
    for letters, gap in (*lines, ("ABCD", r"\s+")):
        pieces = gap.join(rf"(?<!\w)\(?{letter}[.):]\s*(\S[^\n]*?)" for letter in letters)
        if found := re.match(rf".*{pieces}\s*$", text or "", re.S | re.M):
            return list(found.groups())
    return []


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
    answer = final_answer(output_text)[-2000:]             # of a model that never stops, the end
    box = boxed(answer)
    if box.strip():
        return box
    if marked := re.findall(r"####\s*(\S.*)", answer):
        return marked[-1]
    answer = re.sub(r"\\[\[\]]|\$\$", " ", answer)           # a formula on a line of its own
    if statements := STATEMENT.findall(answer):
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
    return bool(spelling(said)) and spelling(said) == spelling(reference)


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
        prompts = []
        for example, said, reference in chunk:
            # What is spoken and what is written: beside a spoken problem may stand no more than
            # "answer in a box"
            question = filter(None, (example.transcript, data.question_text(example)))
            prompt = ASK.format(
                question="\n".join(question),
                reference=open_answer(reference),
                said=open_answer(said),
            )
            prompt = data.text_prompt(tokenizer, prompt, "")
            prompts.append(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        inputs = data.pad_left(prompts, tokenizer)
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]         # [batch, vocab]
        p = logits.float().softmax(-1)
        agreed = p[:, yes].sum(-1) > p[:, no].sum(-1)                    # [batch]
        for verdict, (_, said, _) in zip(agreed.tolist(), chunk):
            verdicts.append(verdict and bool(plain(open_answer(said))))
    return verdicts
