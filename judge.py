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
from fractions import Fraction

import torch
from text_to_num import alpha2digit

import data
import models

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
    r"|(?:\s+(?:to|for)\b[^.:=\n,]{0,40})?[\s*_]*[:=])"          # but not "let me answer step by step:"
    r"|(?:答案(?:应该|就)?(?:是|选|为|:)|选择?)(?:选项)?")
I_CHOOSE = r"|\bI(?:'d| would|'ll| will)? (?:choose|pick|select|go with)"
BEHIND = r"(?=\W*?((?:\\?[(\[{]\s*){0,3}(?:[\u2212±√-]\s*)?[$£€]?(?:\.(?=\d)|\\)?\w.*))"
STATEMENT = re.compile(f"(?:{ANSWER_IS}){BEHIND}", re.I)
CHOICE_STATEMENT = re.compile(f"(?:{ANSWER_IS}{I_CHOOSE}){BEHIND}", re.I)

# The end of a sentence; but the full stop of "B. gold" ends none
SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])[.!?](?:\s|$)|\n")


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


def sentences(text):
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def plain(text):
    """One line, without quotes, markdown stars and closing punctuation."""
    return " ".join(re.sub(r"[*\"“”`]", "", text).split()).strip(" .,;!")


# ------------------------------------------------------------------------------------------------
# 2. Choices: which one does it name?

# A letter in front: "B", "(B)", "B.", "b) gold", "B - gold", "B, the voice is high"; not "B, C or D"
LEADING_LETTER = re.compile(r"[(\[]?([A-Z])(?:[)\]][.:]?|[.:](?=\s|$)|\s[-–—]\s|$"
                            r"|,(?=\s+(?!or\b|and\b|[A-Z]\b)\w+\s+\w))\s*", re.I)
# A letter that is called one: "(B)", "option b", and those of a list, "B. gold  C. silver"
NAMED_LETTER = re.compile(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Za-z])\b\)?")
LISTED_LETTER = re.compile(r"(?<!\w)\(?([A-Z])[).:]\s")
# A bare capital where an answer stands: "it's C", "not B but C", "B because ...". In "a C note" or
# "A dog barks" it is none.
BARE_LETTER = re.compile(
    r"(?:^|[.,:;!?]\s*|(?i:\b(?:is|was|be|with|choose|chose|pick|select|say|think|guess|believe|feel|that|not|but|or"
    r"|and|nor|neither|either|both|than|of|probably|maybe|likely|definitely|clearly|answer)|'s|n't)\s+)"
    r"([A-HJ-Z])"
    r"(?=$|\s*[.,;:!?()]|是|\s+(?:because|since|as|and|or|nor|but|is|are|isn't|was|would|could|can"
    r"|may|might|must|seems?|rather|instead|over)\b)")
REASON = re.compile(
    r"[\s,;(]+(?:because|since|as|while|whereas|although|though|which|given|due|based)\b", re.I)
CONCLUSION = re.compile(
    r"\b(?:so|therefore|thus|hence|consequently|overall|based on this|in conclusion)\b,?\s+(\S.*)",
    re.I)
CLAUSE = re.compile(r"[,;:.!?\n]|(?<!anything )\b(?:but|so|therefore|thus|hence)\b", re.I)
# What denies a choice that follows it in the same clause, and one that stands before it
DENIES = re.compile(r"\b(?:not|no(?! doubt)|nor|neither|never|without(?! (?:a|any) doubt)|cannot|(?<!other )than"
                    r"|instead of|unlike|except|anything but|thought (?:it|this|that)|wrong to"
                    r"|rul(?:e|es|ed|ing) out|exclud(?:e|es|ed|ing))\b|n't\b", re.I)
THOUGHT = re.compile(r"\bthought\s+(?:(?:the|an?)\s+)?$", re.I)
# "What comes after the bell is a dog"; but "a dog barks after the bell" names two
BEFORE_OR_AFTER = re.compile(r"\b(?:before|after)\s+(?:(?:the|an?)\s+)?$", re.I)
VERB = re.compile(r"\s*(?:,|(?:is|was|comes|came|would|must)\b)", re.I)
DENIED = re.compile(r"\b(?:is|are|was|were|be)(?:n't| not)\b|\b(?:incorrect|wrong|false|unlikely"
                    r"|impossible|ruled out|excluded|eliminated)\b", re.I)


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
    alone = set().union(*(standing_alone(plain(sentence), choices) for sentence in sentences(text)))
    if alone:
        return alone
    text = plain(text)
    lead = LEADING_LETTER.match(text)
    if lead and letter_place(lead[1]) < len(choices):      # "B. A dog would bark."; a list names more
        listed = LISTED_LETTER.findall(REASON.split(text, maxsplit=1)[0])
        places = {letter_place(letter) for letter in (lead[1], *listed)}
        places.add(place_of(sentences(text[lead.end():])[0], choices))
        return {place for place in places if place is not None and place < len(choices)}

    text = marked(text, choices)
    text = re.sub(r"⟧,?\s+(?:(?:or|and|nor)\s+)?⟦", "⟧ ⟦", text)         # "not A, B, or C" is one clause
    before_reason = REASON.split(text, maxsplit=1)[0]                    # "C, because B is a cat" is C
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


# ------------------------------------------------------------------------------------------------
# 3. The letter that VoiceBench's evaluator reads

# Where VoiceBench's evaluator looks for a letter (@, in lower case), in its order: the first that is
# found counts. It is as blind as it looks: "the answer is due to friction" chooses D. Those that an
# earlier one makes superfluous are left out.
VOICEBENCH = (
    "答案是@|答案是 @|答案是选项@|答案应该是@|答案应该是 @|答案就是选项@|答案是‘@|是@：|"
    "答案选@|@是正确|选项@是最合适的|answer is: **@|answer is **@|"
    "the answer to the question is: **@|the answer to the multiple-choice question is **@|"
    "the answer is '@'|@ is the best answer|the answer is @|the correct answer is @|"
    "would select @|would choose @|would select option @|would choose option @|is \"@\"|"
    "is \"@.|is: **@)|is **@,|is **@:|is **@)|is: **@.|is: **@:|is **@.|be **@,|is: **@**|"
    "is therefore option **@:|is: \n\n**@)|as **@:|be **@)|be **@:|is: \n\n**@**|suggests **@)|"
    "be option **@:|with **@)|is typically \"@)|be to **@)|is: \n\n@)|is likely to be: **@.|"
    "is **@ (|is option **@**|is likely **@**|is:\n**@.|is:\n\n**@.|would be @|"
    "would be option @|would be (@)|would be option (@)|is @,|is typically @,|is typically @.|"
    "i'd say @.|option @.|option @:|option @,|the answer is:\n**@|is @:|is @.|is: @.|is (@)|"
    "is:\n**@)|is likely **@:|is the **@)|:\n@.|:\n@)|:\n@,|: \n@.|:  \n@.|:\n\n@.|:\n\n@)|"
    "is most likely **@:|:\n\n@,|: \n\n@.|(@) would be|is @)|is: @)|is:\n\n@:|is: **@,|"
    "(option @)|select option \"@\"|is: @|is typically **@,|is **@**|is likely '@'|"
    "is option '@'|is:\n**@:|is \\( \\boxed{@ |would be '@'|is the **@** |question is @ (|"
    "is:\n\n**@)|closest to option **@**|is most likely **@)|the answer to the question is '@'|"
    "known as '@'|is '@)|is typically **@:|is \\( \\boxed{\\text{@}} \\)|is \\( \\text{@) }|"
    "is \\( \\text{@} \\)|is \\( \\text{@:|is \\( \\text{@)|is \\(\\text{@.|is:\n\n**@|"
    "is \\( \\text{@.}|is \\( \\text{@.|is \\( \\boxed{@}|is:\n\\[ \\boxed{\\text{@}}|"
    "is:\n\\[ \\text{@)|is:\n\n\\[ \\text{@)|is \\( \\textbf{@)|is \\( \\text{@}|"
    "is: \\( \\text{@.|corresponds to:\n- **@:|would be: **@**.|is \\( @ \\)|is:\n**@ |"
    "corresponds to option **@**|be **@**|be: \n\n@)|is:\n\\[ \\boxed{@}|is:  \n**@:|"
    "is: \\( \\text{@)|is likely: **@,|is } \\mathbf{@.|is \\( \\boxed{@)|is \\( \\textbf{@}|"
    "is \\(@\\)|is:\n  \n**@:|is option **@ |is:\n\\( \\textbf{@.|is \\( \\mathbf{@}|"
    "was option **@**|is likely \"@)|option **@:|is \"@)|is most likely **@,|is often **@:|"
    "is:  \n@)| @.| @,| @:| @)|**@.|**@)|\"@.|\"@,|\"@:|(@)|\"@\""
).split("|")


def voicebench_letter(output_text):
    """The letter, A to D, that VoiceBench's evaluator reads out of an answer (its trace dropped), or
    None: there it guesses."""
    text = final_answer(output_text).lower()
    if re.match("<[123]>", text):                          # some models put a style in front
        text = text[3:].strip()
    for template in VOICEBENCH:
        for letter in "abcd":
            if template.replace("@", letter) in text:
                return letter.upper()
    for letter in "abcd":
        if text == letter or text.startswith(tuple(letter + mark for mark in ".,:)")):
            return letter.upper()
    return None


# ------------------------------------------------------------------------------------------------
# 4. Open answers: what does it state?

# Sentences that state nothing: "I hope this helps!", "If you have 1 more question", "Let's check: ...",
# "That is 2 less than before"
COURTESY = re.compile(r"(?:i hope|hope|let me know|if you (?:have|need|want|would)|feel free|please"
                      r"|(?:let's |let me |to )?(?:check|verify)"
                      r"|(?:this|that)(?: is|'s) .*(?:less|more|fewer))\b", re.I)
# "The answer is as follows:" states nothing yet
FOLLOWS = re.compile(r"(?:as follows|(?:the )?following|(?:given |shown )?below)\b", re.I)
# What states the number in a sentence: behind "so", then behind "is" ("the sum of 3 and 4 is 7")
THEREFORE = re.compile(r"\b(?:so|therefore|thus|hence|for a total of|in total|altogether)\b(?=.*\d)"
                       r"|\bwhich (?:is|equals|gives|makes)\b(?=\s*[$£€]?[\d.,/]+\W*$)", re.I)
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


# LaTeX and typography of numbers, in plain ASCII
PLAIN = [
    ("\u2212", "-"),
    (r"\\\$", "$"),
    (r"\\%", "%"),
    (r"(?<=\d)(?=[\u4e00-\u9fff])|(?<=[\u4e00-\u9fff])(?=\d)", " "),                    # 15个苹果
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}(?:\^\{?[23]\}?)?", r" \1 "),  # \text{ cm}^2
    (r"\b([cdk]?m|mm|ft|in)\^\{?[23]\}?(?=\W*$)", r"\1"),                             # 12 cm^2
    (r"\^\s*\{?\s*\\circ\s*\}?|°", " "),                                             # 30^\circ
    (r"(?<=\d)\{,\}(?=\d)|(?<=[\d,])\\[!,](?=\d)", ""),                              # 10{,}000
    (r"(?<![\d.,])(\d{1,3})(?: (\d{3}))+(?![\d.,])", lambda m: m[0].replace(" ", "")),  # 12 500
    (r"(?<!\\)\\[,;:! ]|~", " "),
    (r"\\approx(?![a-z])", "≈"),
    (r"\\[dt]?frac(\d)(\d)", r"\1/\2"),
    (r"\\[dt]?frac\{(-?[\d.]+)\}\{([\d.]+)\}", r" \1/\2"),
    (r"(^|[=:]|\bis)\s*-\s+(?=\d)", r"\1 -")]
# \sqrt{16} is 4
SQUARE_ROOT = re.compile(r"(?<![\w})])(?:\\sqrt\s*\{(\d{1,9})\}|√(\d{1,9}))(?![\w^/])")

LARGE = {"dozen": 12, "hundred": 100, "thousand": 10 ** 3, "million": 10 ** 6, "billion": 10 ** 9}
# "1.5 million"; but "5 dozens" are counted as they are
LARGE_NUMBER = re.compile(rf"(?<![\w.,/])(\d[\d,]*(?:\.\d+)?)\s+({'|'.join(LARGE)})\b", re.I)
MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d/])")                # 2 1/2
# "two and a half", "2 3rds", "a quarter", "half"; "the 3rd" is an ordinal
SHARE = re.compile(r"\b(?:(\d+) and )?(?:(an?|\d+)[ -])?"
                   r"(?:(hal)(?:f|ves)|(quarter)s?|(\d+)(?:rd|th)s?)\b(?: an?\b)?", re.I)


def fraction(text):
    """"1,234", "3/4" or "1.5/2" -> Fraction; None for "1/0" and for endless digits."""
    if len(text) > 1000:
        return None
    above, _, below = text.replace(",", "").partition("/")
    below = Fraction(below or 1)
    return Fraction(above) / below if below else None


def in_digits(text):
    """Numbers in English words in digits, with shares and large ones: "two and a half" -> "5/2",
    "$2.5 million" -> "$2500000", "a dozen" -> "12"."""
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"\b(?:none|nothing|nil)(?=\W*$)", "0", text, flags=re.I)
    text = re.sub(rf"\ba (?={'|'.join(LARGE)})", "1 ", text, flags=re.I)
    text = alpha2digit(LARGE_NUMBER.sub(large, text), "en", threshold=0.0)
    text = SHARE.sub(share, LARGE_NUMBER.sub(large, text))
    text = MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)
    return re.sub(r"(?<=\d)(km|kg|cm|mm|ml|kb|mb|ft|min)\b", r" \1", text)


def large(match):
    """A match of LARGE_NUMBER, in digits."""
    amount = fraction(match[1])
    return match[0] if amount is None else str(amount * LARGE[match[2].lower()])


def share(match):
    """A match of SHARE as a fraction; an ordinal as it is."""
    whole, above, half, quarter, ordinal = match.groups()
    below = 2 if half else 4 if quarter else int(ordinal)
    counted = above is not None and above.isdigit()
    a_share = above is not None and re.match(r"\s+of\b|\W*$", match.string[match.end():])
    if below == 0 or not (half or counted or a_share):
        return match[0]
    return f"{int(whole or 0) * below + (int(above) if counted else 1)}/{below}"


# Units that are told apart; of the same dimension they convert. All other words behind a number are
# its noun, and say nothing. (No "in": it is a preposition.)
UNITS = {name: (dimension, Fraction(factor)) for dimension, units in {
    "money": {"$ dollar dollars": "1", "cent cents ¢": "1/100"},
    "euro": {"€ euro euros": "1"},
    "sterling": {"£": "1"},
    "length": {"mm": "1/1000", "cm": "1/100", "m meter meters metre metres": "1",
               "km kilometers kilometres": "1000"},
    "imperial length": {"inch inches": "1", "foot feet ft": "12", "yard yards": "36",
                        "mile miles": "63360"},
    "mass": {"g gram grams": "1", "kg kilogram kilograms": "1000"},
    "imperial mass": {"oz ounce ounces": "1", "lb lbs": "16"},          # "pounds" may be money
    "volume": {"ml": "1/1000", "l liter liters litre litres": "1"},
    "a.m.": {"am": "1"}, "p.m.": {"pm": "1"},
    "time": {"second seconds": "1", "minute minutes min": "60", "hour hours": "3600",
             "day days": "86400", "week weeks": "604800"},
}.items() for names, factor in units.items() for name in names.split()}

# sign, currency, digits, denominator, unit; in "2x" and "x2" the 2 is no answer
NUMBER = re.compile(
    r"(?<![\w.])(?<!\d:)(-|minus |negative )?([$£€]?)(-?)"
    r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)"
    r"(?:\s?/\s?(\d+(?:\.\d+)?))?(?!\w|:\d|\.\d)(?:\s?-?([€£¢]|[A-Za-z]+)(?![/\w]))?", re.I)

# Formulas are compared as they are spelt: \sqrt{2}, 2^3, 2√3, x+3, 2-x, x/y; no km/h
FORMULA = re.compile(r"\\[a-z]|[\^_√π∞±]|(?<![\\a-zA-Z])pi\b"
                     r"|\b[a-zA-Z]\s*[-+*/]\s*(?:\d|\(|[a-zA-Z]\b)|[\d)]\s*[-+*/]\s*[a-zA-Z]\b")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")          # English: neither x nor \sqrt
CLOCK = re.compile(r"\b(\d\d?):(\d\d)\b(?:\s*([ap])\.?m\b)?", re.I)   # 2:30, 9:30 a.m.
STRUCTURE = re.compile(r"^\W*[(\[{].*,|[<>≤≥≠]|\d\s*:\s*\d|\d[A-Za-z]")      # (1, 2), x < 2, 2:3
ASSIGNED = re.compile(r"\b[A-Za-z]\w?\s*=")                # x = 1, y = 2

# What a number alone would not say, the first that is found
NEXT = r"\s+[$£€]?\d"
# What has still to be computed, or is denied behind the number: "5 divided by 2", "20 % of 50"
COMPUTED = re.compile(
    r"\bto the power\b|\b(?:divided|multiplied) by\b|\bsquared\b|\bcubed\b|\bsquare root of\b|\d!(?!\w)"
    rf"|(?:%|\bpercent) of{NEXT}|\d\s+(?:of|(?:more|less|fewer) than){NEXT}"
    r"|^\W*\d\S*\s+(?:is|was|are)(?: not|n't)\b", re.I)
RELATIONS = {name: re.compile(pattern, re.I) for name, pattern in {
    "not": r"\b(?:not|cannot|never)\b|n't\b",
    "twice": rf"\b(?:twice|double|triple|times){NEXT}",
    "or": r"\bor\b\D*\d|\beither\b",
    "range": r"\bbetween\b.*\band\b|\d\S*\s?(?:to|[-–—])\s?[$£€]?\d",
    "at least": rf"\b(?:at least|no less than|minimum of){NEXT}|\d\S*\s*(?:\+(?!\s*\d)|(?:\w+ )?or more\b)",
    "at most": rf"\b(?:at most|no more than|up to|maximum of){NEXT}|\d\S*\s*(?:\w+ )?or (?:less|fewer)\b",
    "more": rf"\b(?:more than|greater than|over|above){NEXT}",
    "less": rf"\b(?:less than|fewer than|under|below){NEXT}"}.items()}

# "5 (3 red and 2 green)"; but "5 (or 6)"
BRACKETS = re.compile(r"(?<=[\w%])\s\((?!or\b)[^()]*\)")
# "not 5 but 7", "isn't 7, it's 8"
DENIED_NUMBER = re.compile(r"(?:\bnot\b|n't\b)[^\d,;]*\d[\d.,/]*\b[^,;]*?(?:[,;]|\bbut\b)", re.I)
# A number that only says of what, or when: "each of the 3 friends", "in 5 days"
CONTEXT = re.compile(r"(?:\b(?:the|these|those|all|his|her|their|its|of|in|for|after|with|from|at|by"
                     r"|per)|'s)\s+[$£€]?\d[\d.,/]*(?![\w.,/:])(?!\s*(?:to|and|-|–)\s*\d)", re.I)
# Behind the first number, no part of the answer: "366 downloads in 3 months", "5, so she has 3 more"
ASIDE = re.compile(
    r"\s+(?:in|for|per|from|after|by|at|with|on|when|if|each|every|during|that|to(?!\s+[$£€]?\d)"
    r"|over(?=\s+\S+\s+(?:second|minute|hour|day|week|month|year)s?\b))\b"
    r"|[,;]?\s+(?:because|since|which|while|so|leaving|making|rather|instead|not|than)\b"
    r"|,?\s+and (?=\S+ of (?:these|those|them|which|the)\b)"
    r"|,\s+\S+ (?:of|more|less|fewer)\b", re.I)


def value(text):
    """What a statement says in numbers -> (relation, ((Fraction, unit), ...)), or None for words and
    formulas. relation: "is", "time", or a name in RELATIONS. Several numbers are several."""
    text = comes_to(in_digits(SQUARE_ROOT.sub(square_root, text)))
    if times := CLOCK.findall(text):
        return "time", tuple((Fraction(int(hour) * 60 + int(minute)), half and half.lower() + "m")
                             for hour, minute, half in times)
    if not WORD.search(text) and STRUCTURE.search(text):
        return None

    # What is beside the answer goes, as long as a number stays
    text = re.sub(r"(\d+)(?: out of | in )(\d+)(?=\W*$| chance)", r"\1/\2", text)     # 1 in 6
    if len(ASSIGNED.findall(text)) < 2:
        text = one_side(text)
    else:                                                                               # by name
        text = " ".join(sorted(part for part in re.split(r"\b(?=[A-Za-z]\w?\s*=)", text) if "=" in part))
    computed = COMPUTED.search(BRACKETS.sub(" ", text))
    for aside in (BRACKETS, DENIED_NUMBER, CONTEXT):
        rest = aside.sub(" ", text)
        text = rest if NUMBER.search(rest) else text
    first = NUMBER.search(text)
    if not first:
        return None
    text = text[:first.end(4)] + ASIDE.split(text[first.end(4):], maxsplit=1)[0]

    quantities = [quantity(found) for found in NUMBER.finditer(text)]
    if any(amount is None for amount, _ in quantities):                                 # 1/0
        return None
    if computed:
        return "computed", ((computed[0], None), *quantities)
    relation = next((name for name, pattern in RELATIONS.items() if pattern.search(text)), "is")
    if relation == "or" and len(set(quantities)) == 1:                                  # 0.75, or 3/4
        return "is", tuple(quantities[:1])
    return relation, compound(quantities)


def comes_to(text):
    """A formula that comes to a number, as that number: "2^3 = 8" is 8, "let x + 3 = 43, so x = 40" is
    40. Another formula is "", and so is "x^2 = 9"."""
    if FORMULA.search(text):
        text = sentences(text)[-1]
    if not FORMULA.search(text):
        return text
    left, _, right = text.rpartition("=")
    an_unknown = not WORD.search(left) and re.search("[A-Za-z]", re.sub(r"\\[a-z]+", "", left))
    if re.fullmatch(r"\W*[a-z](?:\s*[-+]\s*[a-z])+\s*", left, re.I):           # "so x + y = 7" is 7
        an_unknown = None
    return "" if not left or an_unknown or FORMULA.search(right) else right


def square_root(match):
    radicand = int(match[1] or match[2])
    root = round(radicand ** 0.5)
    return str(root) if root * root == radicand else match[0]


def one_side(text):
    """Of "48 / 2 = 24 clips" the right side; of "22/7 ≈ 3.14" and "15 minutes = 900 seconds" the
    left one."""
    sides = [side for side in re.split("[=≈]", text) if side.strip()]
    if len(sides) < 2:
        return text
    if re.fullmatch(r"\W*-?[$£€]?[\d.,/]+(?:\s+[A-Za-z]+)?\W*", sides[0]):
        return sides[0]
    return sides[-1]


def quantity(found):
    """A match of NUMBER -> (Fraction, its unit or None); the Fraction is None for 1/0."""
    minus, currency, sign, digits, below, noun = found.groups()
    amount = fraction(f"{digits}/{below}" if below else digits)
    if amount is not None and (minus or sign):
        amount = -amount
    unit = currency or (noun or "").lower()
    return amount, unit if unit in UNITS else None


def compound(quantities):
    """"3 hours and 20 minutes", "42 dollars and 50 cents" are one quantity, in the larger unit."""
    joined = quantities[:1]
    for amount, unit in quantities[1:]:
        total, larger = joined[-1]
        if unit and larger and smaller_unit(unit, larger):
            joined[-1] = (total + amount * UNITS[unit][1] / UNITS[larger][1], larger)
        else:
            joined.append((amount, unit))
    return tuple(joined)


def smaller_unit(unit, other):
    """Of the same dimension, and smaller?"""
    (dimension, factor), (other_dimension, other_factor) = UNITS[unit], UNITS[other]
    return dimension == other_dimension and factor < other_factor


def number(text):
    """The one number that a text states, as a Fraction; None for none, several, a range, a bound."""
    found = value(text)
    return found[1][0][0] if found and found[0] == "is" and len(found[1]) == 1 else None


def same_quantity(one, other):
    """12 = $12 = 12 apples; 15 minutes = 900 seconds; 5 m is not 5 km."""
    (amount, unit), (other_amount, other_unit) = one, other
    if not unit or not other_unit:
        return amount == other_amount
    (dimension, factor), (other_dimension, other_factor) = UNITS[unit], UNITS[other_unit]
    return dimension == other_dimension and amount * factor == other_amount * other_factor


def same_value(one, other):
    """Two of value(): the same relation, and the same quantities in order; but "x = 3 or x = 2" is
    "2, 3" """
    (relation, quantities), (other_relation, others) = one, other
    if len(quantities) != len(others):
        return False
    if {relation, other_relation} in ({"or"}, {"or", "is"}) and len(quantities) > 1:
        quantities, others = (sorted(pairs, key=lambda pair: pair[0]) for pairs in (quantities, others))
    elif relation != other_relation:
        return False
    return all(map(same_quantity, quantities, others))


# One spelling for what LaTeX spells in several ways. Not algebra: \sqrt{12} and 2\sqrt{3} stay
# different.
SPELLING = [
    (r"\\(?:left|right|displaystyle|quad)(?![a-z])|\$|\\[()\[\]]|≈", " "),
    (r"\\geq(?![a-z])|≥|>=", r"\\ge "),
    (r"\\leq(?![a-z])|≤|<=", r"\\le "),
    (r"\\neq(?![a-z])|≠|!=", r"\\ne "),
    (r"π|(?<![\\a-zA-Z])pi\b", r"\\pi "), ("∞", r"\\infty "), ("√", r"\\sqrt "),
    ("×", r"\\times "), ("·", r"\\cdot "), ("±", r"\\pm "), ("∪", r"\\cup "),
    (r"\\([{}])", r"\1"),
    (r"([\^_]|\\sqrt)\s*\{(\w+)\}", r"\1\2"),              # x^{2} = x^2
    (r"(?<=\d)\s+(?=\d)", "&")]                            # 2 1/2 is not 21/2
BEHIND_WORDS = re.compile(REASON.pattern + r"|,?\s+(?:not|rather than|instead of)\b", re.I)
OVER = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")


def spelling(text):
    """A text without quotes, case and spaces, formulas in one spelling: x^{2} = x^2,
    \\dfrac{a}{b} = a/b, (B) = B, "x = 2\\pi" = "2π"."""
    def bracketed(part):
        return part if re.fullmatch(r"\s*\\?\w+\s*", part) else f"({part})"

    for pattern, replacement in PLAIN + SPELLING:
        text = re.sub(pattern, replacement, text)
    def over(match):
        return f"{bracketed(match[1] or match[2] or '')}/{bracketed(match[3] or match[4] or '')}"

    for _ in range(3):                                     # a fraction in a fraction: the inner first
        text = OVER.sub(over, text)
    text = plain(text).casefold()
    text = re.sub(r"^(yes|no)\b.*", r"\1", text)           # "No, he does not."
    text = "".join(text.split())
    text = re.sub(r"^[a-z](?:_\w+)?(?:=|\\in(?![a-z]))", "", text)       # the name of the unknown
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


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
    said, reference = (spelling(BEHIND_WORDS.split(text.strip(), maxsplit=1)[0]) for text in (said, reference))
    return bool(said) and said == reference


# ------------------------------------------------------------------------------------------------
# 5. A model

ASK = ("Question: {question}\nReference answer: {reference}\nGiven answer: {said}\n"
       "Do the two answers mean the same? Reply with yes or no.")


def choices_of(example):
    """The choices that the manifest lists, or else, where the answer is a letter, those that the
    spoken question lists itself."""
    if example.choices or not re.fullmatch("[A-Z]", example.answer or ""):
        return example.choices
    return data.spoken_choices(example.transcript)


def load(name, device):
    """--judge: "rule" -> agree itself, otherwise a causal LM (folder or hub id).

    -> verdicts(triples): [(example, said, reference)] -> list of bool. Raises SystemExit with one
    sentence if the model cannot be loaded or has no word for yes or no."""
    if name == "rule":
        return lambda triples: [agree(said, reference, choices_of(example))
                                for example, said, reference in triples]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = models.load_text_model(name, dtype=dtype)
    model.to(device).requires_grad_(False)

    def first_tokens(*words):
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return {tokens[0] for tokens in ids if tokens}

    yes, no = first_tokens("yes", "Yes"), first_tokens("no", "No")
    if not yes or not no or yes & no:
        raise SystemExit(f"--judge {name}: its tokenizer begins \"yes\" and \"no\" with the same token, "
                         "so it cannot be asked; give another model")
    return lambda triples: ask(model, tokenizer, triples, sorted(yes), sorted(no))


@torch.no_grad()
def ask(model, tokenizer, triples, yes, no, *, batch_size=32):
    """p(yes) > p(no) as the next token, summed over spellings. An answer that says nothing is no
    answer, whatever the model thinks."""
    verdicts = []
    for start in range(0, len(triples), batch_size):
        chunk = triples[start:start + batch_size]
        said = [open_answer(output) for _, output, _ in chunk]
        # what is spoken and what is written: beside a spoken problem may stand no more than "answer in a box"
        questions = ["\n".join(filter(None, (example.transcript, data.question_text(example))))
                     for example, _, _ in chunk]
        prompts = [ASK.format(question=question, reference=open_answer(reference), said=answer)
                   for question, (_, _, reference), answer in zip(questions, chunk, said)]
        prompts = [data.text_prompt(tokenizer, prompt, "") for prompt in prompts]
        prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        inputs = {name: x.to(model.device) for name, x in data.pad_left(prompts, tokenizer).items()}
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]         # [batch, vocab]
        p = logits.float().softmax(-1)
        agreed = (p[:, yes].sum(-1) > p[:, no].sum(-1)).tolist()
        verdicts += [verdict and bool(plain(answer)) for verdict, answer in zip(agreed, said)]
    return verdicts
