"""What a sentence says in numbers: "two and a half hours" = 150 minutes, "$1,000" = 1000.

    in_digits     numbers in words -> in digits          "a dozen eggs" -> "12 eggs"
    value         a statement -> its relation and its quantities, or None for words and formulas
    same_value    do two of these agree?
    spelling      words and formulas, in one spelling: x^{2} = x^2

Used by judge.py. A range, a bound, a negation or an alternative ("5 or 6") is what it says, never
equal to one of its numbers. No algebra: sqrt(12) is not 2 sqrt(3).
"""

import math
import re
from fractions import Fraction

from text_to_num import alpha2digit

# -------------------------------------------------------------------------------------------------
# 1. Words

# The end of a sentence; but the full stop of "B. gold" ends none
SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])[.!?](?:\s|$)|[。\n]")
REASON = re.compile(
    r"[\s,;(]+(?:because|since|as|while|whereas|although|though|which|given|due|based)\b", re.I
)


def sentences(text):
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def plain(text):
    """One line, without quotes, markdown stars and closing punctuation."""
    return " ".join(re.sub(r"[*\"“”`$]", "", text).split()).strip(" .,;!")


# -------------------------------------------------------------------------------------------------
# 2. Numbers in digits


def root(match):
    """The root of a square number: "\\sqrt{16}" -> "4"; \\sqrt{12} stays."""
    radicand = int(match[1] or match[2])
    whole = math.isqrt(radicand)
    return str(whole) if whole * whole == radicand else match[0]


# LaTeX and typography of numbers, in plain ASCII
PLAIN = [
    (r"(?<![\w})])(?:\\sqrt\s*\{(\d{1,9})\}|√(\d{1,9}))(?![\w^/])", root),
    ("\u2212", "-"),
    (r"\\\$", "$"),
    (r"\\%", "%"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}(?:\^\{?[23]\}?)?", r" \1 "),  # \text{ cm}^2
    (r"(?<=\d)(km|kg|cm|mm|ml|kb|mb|ft|min)\b", r" \1"),                              # 5km
    (r"\b([cdk]?m|mm|ft|in)\^\{?[23]\}?(?=\W*$)", r"\1"),                             # 12 cm^2
    (r"\^\s*\{?\s*\\circ\s*\}?|°", " "),                                             # 30^\circ
    (r"(?<=\d)\{,\}(?=\d)|(?<=[\d,])\\[!,](?=\d)", ""),                              # 10{,}000
    (r"(?<![\d.,])(\d{1,3})(?: (\d{3}))+(?![\d.,])", lambda m: m[0].replace(" ", "")),  # 12 500
    (r"(?<!\\)\\[,;:! ]|~", " "),
    (r"\\approx(?![a-z])", "≈"),
    (r"\\[dt]?frac(\d)(\d)", r"\1/\2"),
    (r"\\[dt]?frac\{(-?[\d.]+)\}\{([\d.]+)\}", r" \1/\2"),
    (r"(^|[=:]|\bis)\s*-\s+(?=\d)", r"\1 -"),
    (r"(?i)\b(?:none|nothing|nil)(?=\W*$)", "0"),
    (r"(?i)\ba (?=dozen|hundred|thousand|million|billion)", "1 ")]

LARGE = {"dozen": 12, "hundred": 100, "thousand": 10 ** 3, "million": 10 ** 6, "billion": 10 ** 9}
# "1.5 million"; but "5 dozens" are counted as they are
LARGE_NUMBER = re.compile(rf"(?<![\w.,/])(\d[\d,]*(?:\.\d+)?)\s+({'|'.join(LARGE)})\b", re.I)
# Shares, one after the other: "two and a half" is by now "2 and a half"; "the 3rd" is an ordinal
SHARES = [
    (r"(?i)\b(?:an? |1 )?half\b(?: an?\b)?", "1 2th"),                 # half an hour
    (r"(?i)\bquarter", "4th"),                                         # 3 4ths
    (r"(?i)\ban? (?=\d+(?:rd|th)(?:\s+of\b|\W*$))", "1 "),             # a 3rd of
    (r"(?i)(?:\band )?\b(\d+)[ -](\d+)(?:rd|th)s?\b", r"\1/\2"),       # 2 3rds, 2 and 1 2th
    (r"(?<![\d.,/])(\d{1,1000})\s+(\d{1,1000})\s?/\s?(\d{1,1000})(?![\d/])",       # 2 1/2
     lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}"),
    (r"(\d+)(?: out of | in )(\d+)(?=\W*$| chance)", r"\1/\2")]        # 1 in 6


def rewritten(text, rules):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def fraction(digits, below="1"):
    """"1,234" or "1.5" / "2" -> Fraction; None for "1" / "0" and for endless digits."""
    if max(len(digits), len(below)) > 1000 or not Fraction(below):
        return None
    return Fraction(digits.replace(",", "")) / Fraction(below)


def in_digits(text):
    """Numbers in English words in digits, with shares and large ones: "two and a half" -> "5/2",
    "$2.5 million" -> "$2500000", "a dozen" -> "12"."""
    def large(match):
        amount = fraction(match[1])
        return match[0] if amount is None else str(amount * LARGE[match[2].lower()])

    text = LARGE_NUMBER.sub(large, rewritten(text, PLAIN))
    text = alpha2digit(text, "en", threshold=0.0)
    return rewritten(LARGE_NUMBER.sub(large, text), SHARES)


# -------------------------------------------------------------------------------------------------
# 3. Quantities

# Units that are told apart; of the same dimension they convert. All other words behind a number are
# its noun, and say nothing. (No "in": it is a preposition. No "pounds": they may be money.)
UNITS = {}
for line in """
    money            1        $ dollar dollars
    money            1/100    cent cents ¢
    euro             1        € euro euros
    sterling         1        £
    length           1/1000   mm
    length           1/100    cm
    length           1        m meter meters metre metres
    length           1000     km kilometers kilometres
    imperial_length  1        inch inches
    imperial_length  12       foot feet ft
    imperial_length  36       yard yards
    imperial_length  63360    mile miles
    mass             1        g gram grams
    mass             1000     kg kilogram kilograms
    imperial_mass    1        oz ounce ounces
    imperial_mass    16       lb lbs
    volume           1/1000   ml
    volume           1        l liter liters litre litres
    time             1        second seconds
    time             60       minute minutes min
    time             3600     hour hours
    time             86400    day days
    time             604800   week weeks
    a.m.             1        am
    p.m.             1        pm
""".strip().splitlines():
    dimension, factor, *names = line.split()
    UNITS |= dict.fromkeys(names, (dimension, Fraction(factor)))

# Sign, currency, digits, denominator, unit; in "2x" and "x2" the 2 is no answer
NUMBER = re.compile(
    r"""(?<![\w.])(?<!\d:)
        (-|minus[ ]|negative[ ])?  ([$£€]?)  (-?)           # -5, minus 5, $5, -$5, $-5
        (\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)    # 1,234.5, 0.5, .5, 12
        (?:\s?/\s?(\d+(?:\.\d+)?))?                          # 3/4
        (?!\w|:\d|\.\d)
        (?:\s?-?([€£¢]|[A-Za-z]+)(?![/\w]))?                 # 5 apples, 5-mile; but 60 km/h
    """, re.I | re.X
)

# Formulas are compared as they are spelt
FORMULA = re.compile(
    r"""\\[a-z] | [\^_√π∞±] | (?<![\\a-zA-Z])pi\b                   # \sqrt{2}, 2^3, 4 pi
      | \b[a-zA-Z]\s*[-+*/]\s*(?:\d|\(|[a-zA-Z]\b)                 # x+3, x/y; but no km/h
      | [\d)]\s*[-+*/]\s*[a-zA-Z]\b                                # 2-x
    """, re.X
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")          # English: neither x nor \sqrt
CLOCK = re.compile(r"\b(\d\d?):(\d\d)\b(?:\s*([ap])\.?m\b)?", re.I)   # 2:30, 9:30 a.m.
STRUCTURE = re.compile(r"^\W*[(\[{].*,|[<>≤≥≠]|\d\s*:\s*\d|\d[A-Za-z]")      # (1, 2), x < 2, 2:3
ASSIGNED = re.compile(r"\b[A-Za-z]\w?\s*=")                # x = 1, y = 2

# What has still to be computed, or is denied behind the number
COMPUTED = re.compile(
    r"""\bto[ ]the[ ]power\b | \b(?:divided|multiplied)[ ]by\b      # 5 divided by 2
      | \bsquared\b | \bcubed\b | \bsquare[ ]root[ ]of\b | \d!(?!\w)
      | (?:%|\bpercent)[ ]of\s+[$£€]?\d                             # 20 % of 50
      | \d\s+(?:of|(?:more|less|fewer)[ ]than)\s+[$£€]?\d           # 5 of 6, 5 more than 3
      | ^\W*\d\S*\s+(?:is|was|are)(?:[ ]not|n't)\b                  # 5 is not the answer
    """, re.I | re.X
)
# What a number alone would not say
RELATION = re.compile(
    r"""(?P<not> \b(?:not|cannot|never)\b | n't\b)
      | (?P<twice> \b(?:twice|double|triple|times)) \s+[$£€]?\d
      | (?P<range> \bbetween\b.*\band\b | \d\S*\s?(?:to|[-–—])\s?[$£€]?\d)         # 5-10, 5 to 10
      | (?P<at_least> \b(?:at[ ]least|no[ ]less[ ]than|minimum[ ]of)\s+[$£€]?\d
                    | \d\S*\s*(?:\+(?!\s*\d)|(?:\w+[ ])?or[ ]more\b))       # 20 minutes or more
      | (?P<at_most> \b(?:at[ ]most|no[ ]more[ ]than|up[ ]to|maximum[ ]of)\s+[$£€]?\d
                   | \d\S*\s*(?:\w+[ ])?or[ ](?:less|fewer)\b)
      | (?P<more> \b(?:more[ ]than|greater[ ]than|over|above)\s+[$£€]?\d)
      | (?P<less> \b(?:less[ ]than|fewer[ ]than|under|below)\s+[$£€]?\d)
    """, re.I | re.X
)

# "5 (3 red and 2 green)"; but "5 (or 6)"
BRACKETS = re.compile(r"(?<=[\w%])\s\((?!or\b)[^()]*\)")
# "not 5 but 7", "isn't 7, it's 8"
DENIED_NUMBER = re.compile(r"(?:\bnot\b|n't\b)[^\d,;]*\d[\d.,/]*\b[^,;]*?(?:[,;]|\bbut\b)", re.I)
# A number that only says of what, or when: "each of the 3 friends", "in 5 days"; not "in 5 to 7
# days"
CONTEXT = re.compile(
    r"""(?:\b(?:the|these|those|all|his|her|their|its|of|in|for|after|with|from|at|by|per)|'s)
        \s+[$£€]?\d[\d.,/]*(?![\w.,/:]) (?!\s*(?:to|and|-|–)\s*\d)
    """, re.I | re.X
)
# Behind the first number, no part of the answer
ASIDE = re.compile(
    r"""\s+(?:in|for|per|from|after|by|at|with|on|when|if|each|every|during|that    # in 3 months
            |to(?!\s+[$£€]?\d)
            |over(?=\s+\S+\s+(?:second|minute|hour|day|week|month|year)s?\b))\b
      | [,;]?\s+(?:because|since|which|while|so|leaving|making|rather|instead|not|than)\b
      | ,?\s+and[ ](?=\S+[ ]of[ ](?:these|those|them|which|the)\b)          # and 4 of these are red
      | ,\s+\S+[ ](?:of|more|less|fewer)\b                                  # , 3 more than before
    """, re.I | re.X
)


def value(text):
    """What a statement says in numbers -> (relation, ((Fraction, unit), ...)), or None.

    None for words and formulas. relation: "is", "time", a name in RELATION, or what is COMPUTED.
    Several numbers are several. unit: (dimension, factor), or None."""
    text = comes_to(in_digits(text))
    if times := CLOCK.findall(text):
        return "time", tuple(
            (Fraction(int(hour) * 60 + int(minute)), half and UNITS[half.lower() + "m"])
            for hour, minute, half in times
        )
    if not WORD.search(text) and STRUCTURE.search(text):
        return None

    if len(ASSIGNED.findall(text)) > 1:                    # "y = 2, x = 1" is x = 1, y = 2
        text = " ".join(sorted(re.split(r"\b(?=[A-Za-z]\w?\s*=)", text)))
    else:
        # "48 / 2 = 24" is 24, but "22/7 ≈ 3.14" and "15 minutes = 900 seconds" say it first
        sides = re.split("[=≈]", text)
        number_alone = re.fullmatch(r"\W*-?[$£€]?[\d.,/]+(?:\s+[A-Za-z]+)?\W*", sides[0])
        text = sides[0] if number_alone else sides[-1]

    # What is beside the answer goes, as long as a number stays
    computed = COMPUTED.search(BRACKETS.sub(" ", text))
    for aside in (BRACKETS, DENIED_NUMBER, CONTEXT):
        rest = aside.sub(" ", text)
        text = rest if NUMBER.search(rest) else text
    first = NUMBER.search(text)
    if not first:
        return None
    text = text[:first.end(4)] + ASIDE.split(text[first.end(4):], maxsplit=1)[0]

    quantities = [quantity(found) for found in NUMBER.finditer(text)]
    if any(amount is None for amount, _ in quantities):    # 1/0
        return None
    if computed:
        return computed[0], tuple(quantities)
    if relation := RELATION.search(text):
        return relation.lastgroup, compound(quantities)
    if re.search(r"\bor\b\D*\d", text):                    # "x = 3 or x = 2", "0.75, or 3/4"
        return "is", tuple(sorted(set(quantities), key=lambda pair: pair[0]))
    return "is", compound(quantities)


def comes_to(text):
    """A formula that comes to a number, as that number: "2^3 = 8" is 8, "let x + 3 = 43, so x = 40"
    is 40, "x + y = 7" is 7. Another formula is "", and so is "x^2 = 9"."""
    if FORMULA.search(text):
        text = sentences(text)[-1]
    if not FORMULA.search(text):
        return text
    left, _, right = text.rpartition("=")
    term = re.sub(r"\\[a-z]+", "", left)
    to_solve = not WORD.search(left) and re.search("[A-Za-z]", term) and re.search(r"[\d=,]", term)
    return "" if not left or to_solve or FORMULA.search(right) else right


def quantity(found):
    """A match of NUMBER -> (Fraction, its unit or None); the Fraction is None for 1/0."""
    minus, currency, sign, digits, below, noun = found.groups()
    amount = fraction(digits, below or "1")
    if amount is not None and (minus or sign):
        amount = -amount
    return amount, UNITS.get(currency or (noun or "").lower())


def compound(quantities):
    """"3 hours and 20 minutes", "42 dollars and 50 cents" are one quantity, in the larger unit."""
    joined = quantities[:1]
    for amount, unit in quantities[1:]:
        total, larger = joined[-1]
        if unit and larger and unit[0] == larger[0] and unit[1] < larger[1]:
            joined[-1] = (total + amount * unit[1] / larger[1], larger)
        else:
            joined.append((amount, unit))
    return tuple(joined)


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
    return unit[0] == other_unit[0] and amount * unit[1] == other_amount * other_unit[1]


def same_value(one, other):
    """Two of value(): the same relation, and the same quantities in order."""
    (relation, quantities), (other_relation, others) = one, other
    same_kind = relation == other_relation and len(quantities) == len(others)
    return same_kind and all(map(same_quantity, quantities, others))


# -------------------------------------------------------------------------------------------------
# 4. Words and formulas in one spelling

# One spelling for what LaTeX spells in several ways. Not algebra: \sqrt{12} and 2\sqrt{3} stay
# different.
FRACTION = r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"
SPELLING = [
    (r"\\(?:left|right|displaystyle|quad)(?![a-z])|\$|\\[()\[\]]|≈", " "),
    (r"\\geq(?![a-z])|≥|>=", r"\\ge "),
    (r"\\leq(?![a-z])|≤|<=", r"\\le "),
    (r"\\neq(?![a-z])|≠|!=", r"\\ne "),
    (r"π|(?<![\\a-zA-Z])pi\b", r"\\pi "), ("∞", r"\\infty "), ("√", r"\\sqrt "),
    ("×", r"\\times "), ("·", r"\\cdot "), ("±", r"\\pm "), ("∪", r"\\cup "),
    (r"\\([{}])", r"\1"),
    (r"([\^_]|\\sqrt)\s*\{(\w+)\}", r"\1\2"),              # x^{2} = x^2
    (r"(?<=\d)\s+(?=\d)", "&"),                            # 2 1/2 is not 21/2
    *[(FRACTION, r"(\1\2)/(\3\4)")] * 3,                   # three deep, the inner first
]
# "Paris, because ...", "Paris, not Rome"
BEHIND_WORDS = re.compile(REASON.pattern + r"|,?\s+(?:not|rather than|instead of)\b", re.I)


def spelling(text):
    """A text without its reasons, quotes, case and spaces, formulas in one spelling: x^{2} = x^2,
    \\dfrac{a}{b} = a/b, (B) = B, "x = 2\\pi" = "2π"."""
    text = BEHIND_WORDS.split(text.strip(), maxsplit=1)[0]
    text = plain(rewritten(text, PLAIN + SPELLING)).casefold()
    text = re.sub(r"^(yes|no)\b.*", r"\1", text)           # "No, he does not."
    text = "".join(text.split())
    text = re.sub(r"\(\s*(\\?\w+)\s*\)", r"\1", text)      # (a)/(b) = a/b
    return re.sub(r"^[a-z](?:_\w+)?(?:=|\\in(?![a-z]))", "", text)       # the name of the unknown
