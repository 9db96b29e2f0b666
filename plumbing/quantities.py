"""What a sentence says in numbers: "two and a half hours" = 150 minutes, "$1,000" = 1000.

    in_digits     numbers in words -> in digits          "a dozen eggs" -> "12 eggs"
    value         a statement -> its relation and its quantities, or None for words and formulas
    same_value    do two of these agree?
    spelling      words and formulas, in one spelling: x^{2} = x^2

Used by judge.py. A range, a bound, a negation or an alternative ("5 or 6") is what it says, never
equal to one of its numbers. No algebra: sqrt(12) is not 2 sqrt(3).
"""

import re
from fractions import Fraction

from text_to_num import alpha2digit

# -------------------------------------------------------------------------------------------------
# 1. Words

# The end of a sentence; but the full stop of "B. gold" ends none
SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])[.!?](?:\s|$)|\n")
REASON = re.compile(
    r"[\s,;(]+(?:because|since|as|while|whereas|although|though|which|given|due|based)\b", re.I
)


def sentences(text):
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def plain(text):
    """One line, without quotes, markdown stars and closing punctuation."""
    return " ".join(re.sub(r"[*\"“”`]", "", text).split()).strip(" .,;!")


# -------------------------------------------------------------------------------------------------
# 2. Numbers in digits

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
SHARE = re.compile(
    r"\b(?:(\d+) and )?(?:(an?|\d+)[ -])?"
    r"(?:(hal)(?:f|ves)|(quarter)s?|(\d+)(?:rd|th)s?)\b(?: an?\b)?",
    re.I,
)


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


# -------------------------------------------------------------------------------------------------
# 3. Quantities

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
    r"(?:\s?/\s?(\d+(?:\.\d+)?))?(?!\w|:\d|\.\d)(?:\s?-?([€£¢]|[A-Za-z]+)(?![/\w]))?",
    re.I,
)

# Formulas are compared as they are spelt: \sqrt{2}, 2^3, 2√3, x+3, 2-x, x/y; no km/h
FORMULA = re.compile(
    r"\\[a-z]|[\^_√π∞±]|(?<![\\a-zA-Z])pi\b"
    r"|\b[a-zA-Z]\s*[-+*/]\s*(?:\d|\(|[a-zA-Z]\b)|[\d)]\s*[-+*/]\s*[a-zA-Z]\b"
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")          # English: neither x nor \sqrt
CLOCK = re.compile(r"\b(\d\d?):(\d\d)\b(?:\s*([ap])\.?m\b)?", re.I)   # 2:30, 9:30 a.m.
STRUCTURE = re.compile(r"^\W*[(\[{].*,|[<>≤≥≠]|\d\s*:\s*\d|\d[A-Za-z]")      # (1, 2), x < 2, 2:3
ASSIGNED = re.compile(r"\b[A-Za-z]\w?\s*=")                # x = 1, y = 2

# What a number alone would not say, the first that is found
NEXT = r"\s+[$£€]?\d"
# What has still to be computed, or is denied behind the number: "5 divided by 2", "20 % of 50"
COMPUTED = re.compile(
    r"\bto the power\b|\b(?:divided|multiplied) by\b|\bsquared\b|\bcubed\b|\bsquare root of\b"
    r"|\d!(?!\w)"
    rf"|(?:%|\bpercent) of{NEXT}|\d\s+(?:of|(?:more|less|fewer) than){NEXT}"
    r"|^\W*\d\S*\s+(?:is|was|are)(?: not|n't)\b",
    re.I,
)
RELATIONS = {
    name: re.compile(pattern, re.I)
    for name, pattern in {
        "not": r"\b(?:not|cannot|never)\b|n't\b",
        "twice": rf"\b(?:twice|double|triple|times){NEXT}",
        "or": r"\bor\b\D*\d|\beither\b",
        "range": r"\bbetween\b.*\band\b|\d\S*\s?(?:to|[-–—])\s?[$£€]?\d",
        "at least": rf"\b(?:at least|no less than|minimum of){NEXT}"
        r"|\d\S*\s*(?:\+(?!\s*\d)|(?:\w+ )?or more\b)",
        "at most": rf"\b(?:at most|no more than|up to|maximum of){NEXT}"
        r"|\d\S*\s*(?:\w+ )?or (?:less|fewer)\b",
        "more": rf"\b(?:more than|greater than|over|above){NEXT}",
        "less": rf"\b(?:less than|fewer than|under|below){NEXT}",
    }.items()
}

# "5 (3 red and 2 green)"; but "5 (or 6)"
BRACKETS = re.compile(r"(?<=[\w%])\s\((?!or\b)[^()]*\)")
# "not 5 but 7", "isn't 7, it's 8"
DENIED_NUMBER = re.compile(r"(?:\bnot\b|n't\b)[^\d,;]*\d[\d.,/]*\b[^,;]*?(?:[,;]|\bbut\b)", re.I)
# A number that only says of what, or when: "each of the 3 friends", "in 5 days"
CONTEXT = re.compile(
    r"(?:\b(?:the|these|those|all|his|her|their|its|of|in|for|after|with|from"
    r"|at|by|per)|'s)\s+[$£€]?\d[\d.,/]*(?![\w.,/:])"
    r"(?!\s*(?:to|and|-|–)\s*\d)",
    re.I,
)
# Behind the first number, no part of the answer: "366 downloads in 3 months", "5, so she has 3
# more"
ASIDE = re.compile(
    r"\s+(?:in|for|per|from|after|by|at|with|on|when|if|each|every|during|that|to(?!\s+[$£€]?\d)"
    r"|over(?=\s+\S+\s+(?:second|minute|hour|day|week|month|year)s?\b))\b"
    r"|[,;]?\s+(?:because|since|which|while|so|leaving|making|rather|instead|not|than)\b"
    r"|,?\s+and (?=\S+ of (?:these|those|them|which|the)\b)"
    r"|,\s+\S+ (?:of|more|less|fewer)\b",
    re.I,
)


def value(text):
    """What a statement says in numbers -> (relation, ((Fraction, unit), ...)), or None.

    None for words and formulas. relation: "is", "time", or a name in RELATIONS. Several numbers
    are several."""
    text = comes_to(in_digits(SQUARE_ROOT.sub(square_root, text)))
    if times := CLOCK.findall(text):
        return "time", tuple(
            (Fraction(int(hour) * 60 + int(minute)), half and half.lower() + "m")
            for hour, minute, half in times
        )
    if not WORD.search(text) and STRUCTURE.search(text):
        return None

    # What is beside the answer goes, as long as a number stays
    text = re.sub(r"(\d+)(?: out of | in )(\d+)(?=\W*$| chance)", r"\1/\2", text)     # 1 in 6
    if len(ASSIGNED.findall(text)) < 2:
        text = one_side(text)
    else:                                                  # "x = 1, y = 2", by name
        parts = re.split(r"\b(?=[A-Za-z]\w?\s*=)", text)
        text = " ".join(sorted(part for part in parts if "=" in part))
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
    if relation == "or" and len(set(quantities)) == 1:     # "0.75, or 3/4"
        return "is", tuple(quantities[:1])
    return relation, compound(quantities)


def comes_to(text):
    """A formula that comes to a number, as that number: "2^3 = 8" is 8, "let x + 3 = 43, so x = 40"
    is 40. Another formula is "", and so is "x^2 = 9"."""
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
    """The one number that a text states, as a Fraction.

    None for none, several, a range, a bound."""
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
        quantities = sorted(quantities, key=lambda pair: pair[0])
        others = sorted(others, key=lambda pair: pair[0])
    elif relation != other_relation:
        return False
    return all(map(same_quantity, quantities, others))


# -------------------------------------------------------------------------------------------------
# 4. Words and formulas in one spelling

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

    for _ in range(3):                  # a fraction in a fraction: the inner first
        text = OVER.sub(over, text)
    text = plain(text).casefold()
    text = re.sub(r"^(yes|no)\b.*", r"\1", text)           # "No, he does not."
    text = "".join(text.split())
    text = re.sub(r"^[a-z](?:_\w+)?(?:=|\\in(?![a-z]))", "", text)       # the name of the unknown
    return re.sub(r"^\(([a-z])\)$", r"\1", text)
