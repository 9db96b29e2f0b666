"""
Does this answer say the same as that one? What counts as the answer in a model's text, and two judges of whether two answers agree.

CORD (paper B) rewards a rollout when its answer means the same as the text view's: r(y) = J(y, y_text) in {0, 1}. The paper distils a model for
J. Here are

    rule      no model: choices by letter or words; otherwise numbers as numbers ("2/4" = "0.5", "$1,000" = "1000", "twelve" = "12"),
              otherwise the words or the formula itself, in one spelling (x^{2} = x^2), without algebra (sqrt(12) is not 2 sqrt(3))
    a model   any causal LM, asked whether the two agree: yes if it gives "yes" more probability than "no"

evaluate.py scores with the same rule. Nothing is guessed: no answer, or two that contradict each other, agrees with nothing.
"""
import re
from fractions import Fraction

import torch
from text_to_num import alpha2digit

import data
import models

# ---------------------------------------------------------------------------------------------------------------------
# 1. What did the model choose?

TAGS = re.compile(data.TAG + r"|<\|[^<>|]*\|>", re.I)                    # the stages' tags and control tokens
STATEMENT = re.compile(r"\b(?:answer|correct (?:option|choice))\b[^.:=\n]{0,40}?(?:\bis\b|[:=])"
                       r"(?=\W*?((?:\\?[(\[{]\s*){0,3}(?:[\u2212±√-]\s*)?\$?(?:\.(?=\d)|\\)?\w.*))", re.I)     # signs too: -5, (1, 2), \frac
SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])[.!?]\s|\n")                 # but the full stop of "B. gold" ends no sentence
LEADING_LETTER = re.compile(r"[(\[]?([A-Z])(?:[)\]]|[.:](?=\s|$)|\s+[-–—]\s|$)", re.I)     # "B", "(B)", "B.", "b) gold", "B - gold"
NAMED_LETTER = re.compile(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+([A-Z])\b")           # "... is (B)", "option B"
BARE_LETTER = re.compile(r"([A-Z])\s")                                  # "B because ..."


def final_answer(output_text):
    """The part of a four-stage answer that is meant to be scored, without tags: <RESPONSE>, closed or not; without one, what
    follows </THINK>; of a trace that never ended, only its last "the answer is ..."; of plain text, everything."""
    text = re.split("</THINK>", output_text, maxsplit=1, flags=re.I)[-1]
    response = data.parse_response(text)["response"]
    if response is not None:
        text = response
    elif re.search("<THINK>", text, re.I):
        text = (STATEMENT.findall(text) or [""])[-1]
    return TAGS.sub(" ", text)


def plain(text):
    """One line, without quotes, markdown stars and closing punctuation."""
    return " ".join(re.sub(r"[*\"“”`]", "", text).split()).strip(" .,;!")


def named_choice(text, choices):
    """The one choice that `text` names by its words or its letter. None when it names none, or several: letter and words that
    contradict each other are not an answer."""
    whole, first = plain(text), plain(SENTENCE_END.split(text.strip(), maxsplit=1)[0])
    for head in (whole, first):                             # "C. E" is option C, though there is an option called C: its letter and its words agree
        lead = LEADING_LETTER.match(head)
        index = ord(lead[1].upper()) - ord("A") if lead else len(choices)
        if index < len(choices) and plain(head[lead.end():]).casefold() == plain(choices[index]).casefold():
            return choices[index]
    heads = {whole.casefold(), first.casefold()}
    by_words, letters, rest = set(), set(), whole
    if any(len(plain(choice)) == 1 for choice in choices):  # "(A)" and "option A" are the place, not the blood group A
        letters = {a or b for a, b in NAMED_LETTER.findall(rest)}
        rest = NAMED_LETTER.sub("\0", rest)
    # Longest first, and what was found is cut out: "white gold" does not also name "gold", the letter in "B minor" not option B.
    for choice in sorted(filter(None, map(plain, choices)), key=len, reverse=True):
        if choice.casefold() in heads:
            return next(c for c in choices if plain(c) == choice)
        words = r"(?<![\w-])(?<!\d[.,])(?<!\bnot )(?<!\bno )" + re.escape(choice) + r"(?![\w#]|[.,-]\d|-\w)"
        rest, found = re.subn(words, "\0", rest, flags=re.I if len(choice) > 1 else 0)     # "a dog" does not name the note A
        if found:
            by_words.add(choice.casefold())
    letters |= {a or b for a, b in NAMED_LETTER.findall(rest)}
    if lead := LEADING_LETTER.match(rest):
        letters.add(lead[1].upper())
    elif (bare := BARE_LETTER.match(rest)) and not (bare[1] == "A" and by_words):      # "A dog barks": an article, not option A
        letters |= {bare[1], *re.findall(r"\b[B-Z]\b", rest)}             # "A and B" is two
    by_letter = {plain(choices[i]).casefold() for i in range(len(choices)) if chr(ord("A") + i) in letters}
    named = by_words | by_letter
    return next(c for c in choices if plain(c).casefold() in named) if len(named) == 1 else None


def extract_choice(output_text, choices):
    """output_text: what the model said. choices: list of str. Returns the chosen one of `choices`, or None; never a guess.

    The last "the answer is ..." counts before the rest of the answer, and its first sentence before the rest of its line."""
    answer = final_answer(output_text)
    statement = (STATEMENT.findall(answer) or [""])[-1]
    return (named_choice(SENTENCE_END.split(statement, maxsplit=1)[0], choices) or named_choice(statement, choices)
            or named_choice(answer, choices))


# Where VoiceBench's evaluator looks for a letter (@, in lower case), in its order: the first that is found counts. It is as blind as it looks:
# "the answer is due to friction" chooses D. Those that an earlier one makes superfluous are left out.
VOICEBENCH = (
    "答案是@|答案是 @|答案是选项@|答案应该是@|答案应该是 @|答案就是选项@|答案是'@|是@：|答案选@|@是正确|选项@是最合适的|answer is: **@|answer is **@|the answer to the question is: **@|"
    "the answer to the multiple-choice question is **@|the answer is '@'|@ is the best answer|the answer is @|the correct answer is @|"
    "would select @|would choose @|would select option @|would choose option @|is \"@\"|is \"@.|is: **@)|is **@,|is **@:|is **@)|is: **@.|"
    "is: **@:|is **@.|be **@,|is: **@**|is therefore option **@:|is: \n\n**@)|as **@:|be **@)|be **@:|is: \n\n**@**|suggests **@)|"
    "be option **@:|with **@)|is typically \"@)|be to **@)|is: \n\n@)|is likely to be: **@.|is **@ (|is option **@**|is likely **@**|is:\n**@.|"
    "is:\n\n**@.|would be @|would be option @|would be (@)|would be option (@)|is @,|is typically @,|is typically @.|i'd say @.|option @.|"
    "option @:|option @,|the answer is:\n**@|is @:|is @.|is: @.|is (@)|is:\n**@)|is likely **@:|is the **@)|:\n@.|:\n@)|:\n@,|: \n@.|:  \n@.|"
    ":\n\n@.|:\n\n@)|is most likely **@:|:\n\n@,|: \n\n@.|(@) would be|is @)|is: @)|is:\n\n@:|is: **@,|(option @)|select option \"@\"|is: @|"
    "is typically **@,|is **@**|is likely '@'|is option '@'|is:\n**@:|is \\( \\boxed{@ |would be '@'|is the **@** |question is @ (|is:\n\n**@)|"
    "closest to option **@**|is most likely **@)|the answer to the question is '@'|known as '@'|is '@)|is typically **@:|"
    "is \\( \\boxed{\\text{@}} \\)|is \\( \\text{@) }|is \\( \\text{@} \\)|is \\( \\text{@:|is \\( \\text{@)|is \\(\\text{@.|is:\n\n**@|"
    "is \\( \\text{@.}|is \\( \\text{@.|is \\( \\boxed{@}|is:\n\\[ \\boxed{\\text{@}}|is:\n\\[ \\text{@)|is:\n\n\\[ \\text{@)|"
    "is \\( \\textbf{@)|is \\( \\text{@}|is: \\( \\text{@.|corresponds to:\n- **@:|would be: **@**.|is \\( @ \\)|is:\n**@ |"
    "corresponds to option **@**|be **@**|be: \n\n@)|is:\n\\[ \\boxed{@}|is:  \n**@:|is: \\( \\text{@)|is likely: **@,|is } \\mathbf{@.|"
    "is \\( \\boxed{@)|is \\( \\textbf{@}|is \\(@\\)|is:\n  \n**@:|is option **@ |is:\n\\( \\textbf{@.|is \\( \\mathbf{@}|was option **@**|"
    "is likely \"@)|option **@:|is \"@)|is most likely **@,|is often **@:|is:  \n@)| @.| @,| @:| @)|**@.|**@)|\"@.|\"@,|\"@:|(@)|\"@\"").split("|")


def voicebench_letter(output_text):
    """The letter, A to D, that VoiceBench's evaluator reads out of an answer (its trace dropped), or None: there it guesses."""
    text = final_answer(output_text).strip().lower()
    text = re.sub(r"^<[123]>\s*", "", text)                               # some models put a style in front
    found = (letter for pattern in VOICEBENCH for letter in "abcd" if pattern.replace("@", letter) in text)
    starts = (letter for letter in "abcd" if text == letter or text.startswith(tuple(letter + mark for mark in ".,:)")))
    letter = next(found, None) or next(starts, None)
    return letter and letter.upper()


# ---------------------------------------------------------------------------------------------------------------------
# 2. The rule

# sign, digits, denominator; "2:30" is a time, and in "2x" and "x2" the 2 is no answer
NUMBER = re.compile(r"(?<![\w.])(?<!\d:)(-|minus |negative )?\$?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?:\s?/\s?(\d+))?(?!\w|:\d|\.\d)", re.I)


def boxed(text):
    """What stands in the last \\boxed{...} or \\fbox{...}, braces matched, or None."""
    box = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?=\w))", text))
    if not box:
        return None
    begin, depth = box[-1].end(), 1
    if not box[-1][1]:                                                    # \boxed 5
        return re.match(r"\w+", text[begin:])[0]
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return text[begin:]


ASIDE = re.compile(r"(?<=[\w%])\s+(?:in|for|per|from|after|by|over|at|with|on|when|because|since|if|each|every|during|than)\b|,\s+not\b", re.I)


def open_answer(output_text):
    """The part of an answer to an open question that states it: the last \\boxed{}, what follows GSM8K's last ####, what follows the last
    "the answer is", or all of it."""
    answer = final_answer(output_text)
    marked, statement = re.findall(r"####\s*(\S.*)", answer), (STATEMENT.findall(answer) or [""])[-1]
    stated = boxed(answer) or (marked[-1] if marked else "")
    if not stated and statement:
        stated = SENTENCE_END.split(statement, maxsplit=1)[0]
        head = ASIDE.split(stated.rpartition("=")[2], maxsplit=1)[0]      # "366 downloads in 3 months": what is stated comes first
        stated = head if number(head) is not None else stated
    return (stated or answer)[-2000:]                                     # a model that never stops: the patterns are slow on endless digits


FORMULA = re.compile(r"\\[a-z]|[\^_√π∞±]|(?<![\\a-zA-Z])pi\b"                                            # \sqrt{2}, 2^3, 2√3
                     r"|\b[a-zA-Z]\s*[-+*/]\s*(?:\d|\(|[a-zA-Z]\b)|[\d)]\s*[-+*/]\s*[a-zA-Z]\b")         # x+3, 2-x, x/y; no km/h
PLAIN = [("\u2212", "-"), (r"\\\$", "$"),                                                                # NuminaMath writes LaTeX
         (r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}(?:\^\{?[23]\}?)?", r" \1 "),                # 12\text{ cm}^2, \text{(B)}
         (r"\b([cdk]?m|mm|ft|in)\^\{?[23]\}?(?=\W*$)", r"\1"),                                           # 12 cm^2
         (r"\^\s*\{?\s*\\circ\s*\}?|°|\\approx(?![a-z])|≈", " "),                                        # 30^\circ
         (r"(?<=\d)\{,\}(?=\d)|(?<=[\d,])\\[!,](?=\d)", ""),                                             # 10{,}000 and 10,\!000
         (r"(?<![\d.,])(\d{1,3})(?: (\d{3}))+(?![\d.,])", lambda m: m[0].replace(" ", "")),              # 12 500 000
         (r"(?<!\\)\\[,;:! ]|~", " "),
         (r"\\[dt]?frac(\d)(\d)", r"\1/\2"), (r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r" \1/\2"),
         (r"(^|[=:]|\bis)\s*-\s+(?=\d)", r"\1 -")]
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")                                                        # English: neither x nor \sqrt
SEVERAL = re.compile(r"^\W*[(\[].*,|,(?!\d{3}(?!\d))\s*[\w\\(\[$+-]|[<>≤≥≠]|\d\s*:\s*\d|\d[A-Za-z]")        # (1, 2), 1, 2, x < 2, 2:3, 3+4i
LARGE = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s+(thousand|million|billion)\b", re.I)
MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d/])")                                    # 2 1/2
SHARES = re.compile(r"\b(?:hal(?:f|ves)|(?:quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth)s?)\b", re.I)
EITHER = re.compile(r"\d\S*(?:\s\w+)?\s+or\s+[-$]?\d", re.I)                                             # 5 or 6 is no answer


def number(text):
    """The last number that a text names, in digits or in English words, as a Fraction. None without one, for a formula ("x+3") unless it comes
    to a number ("2^3 = 8"), for several (a pair, an interval), for shares in words ("two thirds") and for an either-or ("5 or 6")."""
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    if FORMULA.search(text):
        text = [part for part in SENTENCE_END.split(text) if part.strip()][-1]
    if FORMULA.search(text):
        left, _, text = text.rpartition("=")                              # left of it must be arithmetic, or talk: "x^2 = 9" is not the number 9
        if not left or FORMULA.search(text) or not WORD.search(left) and re.search("[A-Za-z]", re.sub(r"\\[a-z]+", "", left)):
            return None
    if SHARES.search(text) or not WORD.search(text) and SEVERAL.search(text):
        return None
    text = LARGE.sub(lambda m: str(Fraction(m[1].replace(",", "")) * 10 ** {"t": 3, "m": 6, "b": 9}[m[2][0].lower()]), text)
    text = MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", alpha2digit(text, "en", threshold=0.0))
    found = NUMBER.findall(text)
    if not found or EITHER.search(text) or found[-1][2] and int(found[-1][2]) == 0 or len(found[-1][1]) > 1000:
        return None
    sign, digits, below = found[-1]
    return Fraction(digits.replace(",", "")) / int(below or 1) * (-1 if sign else 1)


# One spelling for what LaTeX spells in several ways. Not algebra: \sqrt{12} and 2\sqrt{3} stay different.
SPELLING = [(r"\\(?:left|right|displaystyle|quad)(?![a-z])|\$|\\[()\[\]]", " "), (r"π|(?<![\\a-zA-Z])pi\b", r"\\pi "),
            (r"\\geq(?![a-z])|≥|>=", r"\\ge "), (r"\\leq(?![a-z])|≤|<=", r"\\le "), (r"\\neq(?![a-z])|≠|!=", r"\\ne "),
            ("∞", r"\\infty "), ("√", r"\\sqrt "), ("×", r"\\times "), ("·", r"\\cdot "), ("±", r"\\pm "), ("∪", r"\\cup "),
            (r"([\^_]|\\sqrt)\s*\{(\w+)\}", r"\1\2"), (r"(?<=\d)\s+(?=\d)", "&")]                        # x^{2} = x^2; 2 1/2 is not 21/2
OVER = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")


def spelling(text):
    """A text without quotes, case and spaces, formulas in one spelling: x^{2} = x^2, \\dfrac{a}{b} = a/b, (B) = B, "x = 2\\pi" = "2π"."""
    for pattern, replacement in PLAIN + SPELLING:
        text = re.sub(pattern, replacement, text)
    bracketed = lambda part: part if re.fullmatch(r"\s*\\?\w+\s*", part) else f"({part})"
    for _ in range(3):                                                    # a fraction in a fraction: the inner one first
        text = OVER.sub(lambda m: f"{bracketed(m[1] or m[2] or '')}/{bracketed(m[3] or m[4] or '')}", text)
    text = "".join(plain(text).casefold().split())
    text = re.sub(r"^[a-z](?:_\w+)?(?:=|\\in(?![a-z]))", "", text)         # the name of the unknown
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


def agree(said, reference, choices=()):
    """Do two answers mean the same, by the rule? With choices: both name the same one. Without: the same number, or the same words."""
    if choices:
        return (chosen := extract_choice(said, choices)) is not None and chosen == extract_choice(reference, choices)
    said, reference = open_answer(said), open_answer(reference)
    numbers = number(said), number(reference)
    if numbers != (None, None):
        return numbers[0] == numbers[1]
    said, reference = spelling(said), spelling(reference)
    return bool(said) and said == reference


# ---------------------------------------------------------------------------------------------------------------------
# 3. A model

ASK = ("Question: {question}\nReference answer: {reference}\nGiven answer: {said}\n"
       "Do the two answers mean the same? Reply with yes or no.")


def load(name, device):
    """--judge: "rule" -> agree itself, otherwise a causal LM (folder or hub id). -> verdicts(triples), triples [(example, said, reference)] ->
    list of bool. Raises SystemExit with one sentence if the model cannot be loaded or has no word for yes or no."""
    if name == "rule":
        return lambda triples: [agree(said, reference, example.choices) for example, said, reference in triples]
    model, tokenizer = models.load_text_model(name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.to(device).requires_grad_(False)
    yes, no = ({ids[0] for word in words if (ids := tokenizer(word, add_special_tokens=False)["input_ids"])}
               for words in (("yes", "Yes"), ("no", "No")))
    if not yes or not no or yes & no:
        raise SystemExit(f"--judge {name}: its tokenizer begins \"yes\" and \"no\" with the same token, so it cannot be asked; give another model")
    return lambda triples: ask(model, tokenizer, triples, sorted(yes), sorted(no))


@torch.no_grad()
def ask(model, tokenizer, triples, yes, no, *, batch_size=32):
    """p(yes) > p(no) as the next token, summed over spellings. An answer that says nothing is no answer, whatever the model thinks."""
    verdicts = []
    for start in range(0, len(triples), batch_size):
        chunk = triples[start:start + batch_size]
        prompts = [ASK.format(question=data.question_text(example) or example.transcript, reference=open_answer(reference), said=open_answer(said))
                   for example, said, reference in chunk]
        prompts = [tokenizer(data.text_prompt(tokenizer, prompt, ""), add_special_tokens=False)["input_ids"] for prompt in prompts]
        inputs = {name: tensor.to(model.device) for name, tensor in data.pad_left(prompts, tokenizer).items()}
        p = model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)                  # [batch, vocab]
        agreed = (p[:, yes].sum(-1) > p[:, no].sum(-1)).tolist()
        verdicts += [verdict and bool(plain(open_answer(said))) for verdict, (_, said, _) in zip(agreed, chunk)]
    return verdicts
