"""
From what is written to what is said: "$80,000" is "eighty thousand dollars", "\\frac{1}{2}" is
"one half".

What this file teaches: why a speech synthesiser must not be given a problem as it is printed. It
reads "x^2" as "x two", "$5" as "dollar five" and "\\sqrt" letter by letter, and the model that
hears this is asked another question than the one that reads it. So every number, symbol, unit and
formula becomes words first, and what has no certain reading is refused: a skipped problem costs
nothing, a wrong one teaches.

    python -m prepare.verbalise 'What is $x^2$ if $\\frac{3x+1}{2} \\le 5$?'

A formula is parsed by pylatexenc, never by regular expressions, and read so that a listener can
tell where its parts end: "the square root of x plus one, end root". Plain text is rewritten from
the special to the general: money, units, dates and ordinals before bare numbers.
"""

import argparse
import re
import unicodedata
from functools import cache

# Inside this file $, % and # that are no LaTeX are written full-width, so that the parser leaves
# them alone; LETTER marks the name of a variable, OPEN and CLOSE what a formula became: all are
# gone from the result.
DOLLAR, PERCENT, HASH, LETTER, OPEN, CLOSE = "\uff04\uff05\uff03\ue000\ue001\ue002"
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
SCALE = r"(hundred|thousand|million|billion|trillion)"
MONEY = rf"([{DOLLAR}€£])\s?({NUMBER})(?!\d|,\d|\.\d)(?:\s?{SCALE}\b)?(?![A-Za-z])"


def table(text):
    """Entries of a key and its words, two spaces between them -> {key: words}."""
    return dict(entry.split(" ", 1) for entry in re.split(r"\s{2,}", text.strip()))


# by Unicode character; pylatexenc knows which one a command stands for
SYMBOLS = table("""
    + plus  = equals  < is less than  > is greater than  ≤ is less than or equal to
    ⩽ is less than or equal to  ≥ is greater than or equal to  ⩾ is greater than or equal to
    ≠ is not equal to  ≈ is approximately  ≡ is congruent to  ≅ is congruent to  ∼ is similar to
    ~ is similar to  ∝ is proportional to  × times  · times  ⋅ times  * times  ∗ times
    ÷ divided by  / over  ± plus or minus  ∓ minus or plus  ∥ is parallel to  ⊥ is perpendicular to
    ∈ in  ∉ not in  ⊂ is a subset of  ⊆ is a subset of  ∪ union  ∩ intersection  ∖ minus  → to
    ⟶ to  ↦ maps to  ⇒ implies  ⟹ implies  ⇔ if and only if  ⟺ if and only if  ∧ and  ∨ or
    ∤ does not divide  ∴ therefore  ∵ because  ≪ is much less than  ≫ is much greater than  , ,
    ; ,  ? ?
""")
PREFIXES = table("""
    ∠ angle  △ triangle  ⊙ circle  □ quadrilateral  ∀ for all  ∃ there exists  ¬ not
""")
ATOMS = table("""
    ∞ infinity  ∅ the empty set  … dot dot dot  ⋯ dot dot dot  ⋮ dot dot dot  ℓ l  ϕ phi  ϵ epsilon
    ℝ the real numbers  ℤ the integers  ℕ the natural numbers  ℚ the rational numbers
    ℂ the complex numbers
""")
BRACKETS = table("""
    ( open parenthesis  ) close parenthesis  [ open bracket  ] close bracket  { open brace
    } close brace  ⌊ the floor of  ⌋ , end floor,  ⌈ the ceiling of  ⌉ , end ceiling,
    ⟨ open angle bracket  ⟩ close angle bracket
""")
# where pylatexenc has no character for a command
OUR_MACROS = table("""
    ne ≠  cdotp ·  triangle △  degree °  bigtriangleup △  square □  Box □  odot ⊙  iff ⇔  implies ⇒
    neg ¬  lnot ¬  lor ∨  land ∧  lbrace {  rbrace }  lbrack [  rbrack ]  vert |  lvert |  rvert |
    colon :  dotsc …  dotsb …  setminus ∖  leqq ≤  geqq ≥  Leftrightarrow ⇔  varnothing ∅  lt <
    gt >  ast *  longrightarrow →
""")
FUNCTIONS = table("""
    sin sine  cos cosine  tan tangent  cot cotangent  sec secant  csc cosecant  arcsin arc sine
    arccos arc cosine  arctan arc tangent  sinh hyperbolic sine  cosh hyperbolic cosine
    tanh hyperbolic tangent  tg tangent  ctg cotangent  log log  ln natural log  lg log
    exp the exponential  gcd the greatest common divisor  lcm the least common multiple
    det the determinant  deg the degree
""")
BIG = table("""
    sum the sum  prod the product  int the integral  lim the limit  max the maximum
    min the minimum  bigcup the union  bigcap the intersection  ∑ the sum  ∏ the product
    ∫ the integral
""")
ACCENTS = table("""
    overline overline  bar overline  vec vector  overrightarrow vector  hat hat  widehat hat
    tilde tilde  widetilde tilde
""")
ACCENTS |= dict.fromkeys("mathbf boldsymbol mathit mathcal mathscr boxed underline".split(), "")
TEXTS = """
    text textbf textit textrm emph mbox mathrm operatorname rm textnormal textsf texttt hbox mathop
""".split()
SPACES = """
    , ; : ! quad qquad \\ displaystyle textstyle limits nolimits newline par noindent hfill left
    right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr thinspace > centering
""".split()
SPACES = {" ", *SPACES}
# One formula a row
ROWS = {
    "cases",
    "align",
    "align*",
    "aligned",
    "gather",
    "gather*",
    "gathered",
    "equation",
    "equation*",
    "split",
}
BLACKBOARD = dict(zip("RZNQC", "ℝℤℕℚℂ"))

LENGTHS = table("""
    mm millimeter  cm centimeter  dm decimeter  m meter  km kilometer  ft foot  yd yard  mi mile
""")
UNITS = LENGTHS | table("""
    kg kilogram  g gram  mg milligram  lb pound  lbs pound  oz ounce  L liter  l liter
    mL milliliter  ml milliliter  h hour  hr hour  hrs hour  min minute  mins minute  s second
    sec second  secs second  gal gallon  qt quart  tsp teaspoon  tbsp tablespoon
    mpg mile per gallon  mph mile per hour  kph kilometer per hour  ha hectare  Hz hertz
    kW kilowatt  MB megabyte  GB gigabyte
""")
PER = (
    "hour|hr|h|minute|min|second|sec|s|day|week|month|year|mile|foot|pound|lb|kg|L|l|gallon|person|"
    "piece|item|yard|ounce|bag|box|ticket|"
    "cm|m|km|mi|ft|yd|oz|gal|g|mL|ml"
)
MONTHS = (
    "January|February|March|April|May|June|July|August|September|October|November|December"
).split("|")
# With an index and an exponent: combinations and permutations, in some countries
COUNTED = [LETTER + name for name in "ACP"]
# The synthesisers spell "nth" out
NTH = {"n": "enth", "k": "kayth", "m": "emth", "i": "eyeth", "j": "jayth"}


# ------------------------------------------------------------------------------------------------
# 1. Numbers


def in_words(value, **how):
    """A whole number in words; num2words is imported where the first one is said."""
    from num2words import num2words

    return num2words(value, **how)


def number(text):
    """ "1,234.50" -> "one thousand two hundred and thirty-four point five zero"."""
    whole, _, part = text.replace(",", "").partition(".")
    if len(whole) > 15:
        raise ValueError(f"the number {text[:20]}..., which is too long to follow")
    digits = lambda s: " ".join(in_words(int(d)) for d in s)
    if len(whole) > 1 and whole[0] == "0":  # a code or a clock
        raise ValueError(f"the number {text}, which begins with a zero")
    words = in_words(int(whole or 0)).replace(",", "")
    return f"{words} point {digits(part)}".rstrip() if "." in text else words


def ordinal(text):
    return in_words(int(text.replace(",", "")), to="ordinal").replace(",", "")


def fraction(above, below):
    """Two strings of digits -> "two thirds"; "thirty-one over seventy-three" where an ordinal
    would be hard to hear."""
    n, d = int(above.replace(",", "")), int(below.replace(",", ""))
    if (
        len(above) > 15
        or len(below) > 15
        or n > 100
        or not (2 <= d <= 20 or d in (24, 25, 30, 32, 40, 50, 60, 64, 100, 1000))
    ):
        return f"{number(above)} over {number(below)}"
    part = {2: "half", 4: "quarter"}.get(d) or ordinal(below)
    part = "halves" if d == 2 and n != 1 else part + "s" * (n != 1)
    return (
        f"{number(above)}"
        f" {part.replace('one hundredth', 'hundredth').replace('one thousandth', 'thousandth')}"
    )


def money(sign, amount, scale=None, *, adjective=False):
    """("$", "5.50") -> "five dollars and fifty cents"."""
    unit = {"€": "euro", "£": "pound"}.get(sign, "dollar")
    whole, _, part = amount.replace(",", "").partition(".")
    if scale:
        return f"{number(amount)} {scale} {unit}{'' if adjective else 's'}"
    if part and len(part) != 2:
        return f"{number(amount)} {unit}s"
    small = {"£": ("penny", "pence")}.get(sign, ("cent", "cents"))
    parts = (
        [f"{number(whole)} {unit}" + "s" * (int(whole) != 1 and not adjective)]
        if int(whole or 0) or not int(part or 0)
        else []
    )
    if int(part or 0):
        parts.append(f"{in_words(int(part))} {small[int(part) != 1]}")
    return " and ".join(parts)


def measure(amount, unit, power=None, per=None):
    """(words, "km", None, "h") -> "five kilometers per hour"; power: None, "2" or "3"; amount
    "one" takes the singular."""
    head, *tail = UNITS[unit].split(" ", 1)
    if amount not in ("one", "negative one"):
        head = {"foot": "feet", "hertz": "hertz"}.get(head, head + "s")
    if power and unit not in LENGTHS:
        raise ValueError(f"the unit {unit} with an exponent")
    words = [amount, {None: "", "2": "square", "3": "cubic"}[power], head, *tail]
    return " ".join(filter(None, words + (["per", UNITS.get(per, per)] if per else [])))


# ------------------------------------------------------------------------------------------------
# 2. Formulas. First flat items: ("n", number), ("v", variable), ("c", character), ("t", words),
#    ("f", function), ("b", big operator), ("m", command, arguments), ("g", items of a group),
#    ("r", rows of an environment), ("u", unit[, unit below it])


@cache
def latex():
    """pylatexenc's knowledge of commands, with those it lacks -> (for parsing, command ->
    character)."""
    from pylatexenc import latex2text, latexwalker
    from pylatexenc.macrospec import MacroSpec

    two, one = ["dfrac", "tfrac", "cfrac", "dbinom", "tbinom", "binom"], [
        *TEXTS,
        *ACCENTS,
        "mathbb",
        "bmod",
        "pmod",
        "mod",
    ]
    ours = [MacroSpec(name, "{{") for name in two] + [
        MacroSpec(name, "{") for name in one if name not in ("rm", "bmod")
    ]
    parsing = latexwalker.get_default_latex_context_db()
    parsing.add_context_category("spoken", macros=ours, prepend=True)
    shown = latex2text.get_default_latex_context_db()

    def character(name):
        found = OUR_MACROS.get(name) or getattr(shown.get_macro_spec(name), "simplify_repl", None)
        return found.strip() if isinstance(found, str) and len(found.strip()) == 1 else None

    return parsing, cache(character)


def parse(text):
    from pylatexenc import latexwalker

    try:
        return latexwalker.LatexWalker(
            text, latex_context=latex()[0], tolerant_parsing=False
        ).get_latex_nodes()[0]
    except latexwalker.LatexWalkerError as error:
        raise ValueError(f"LaTeX that does not parse ({str(error).splitlines()[0]})") from None


def items_of(nodes):
    """Parsed LaTeX of a formula -> flat items, as above."""
    found = []
    for node in nodes:
        kind = type(node).__name__
        if kind == "LatexCharsNode":
            for match in re.finditer(
                rf"[{DOLLAR}€£]\s*(?:{NUMBER})(?!\d|[,.]\d|[A-Za-z])|{NUMBER}|[A-Za-z]+|\S",
                node.chars,
            ):
                token = match[0]
                if token[0] in f"{DOLLAR}€£" and len(token) > 1:
                    found.append(("t", money(*re.match(r"(.)\s*(.+)", token).groups())))
                elif token[0].isdigit() or token[0] == "." and len(token) > 1:
                    if token[0] == "." and found and found[-1][0] == "n":
                        raise ValueError(f"the number {found[-1][1]}{token}")
                    found.append(("n", token))
                elif token.isascii() and token.isalpha():
                    if token in FUNCTIONS or token in ("max", "min"):
                        found.append(("f", token) if token in FUNCTIONS else ("b", token))
                    elif is_word(token):
                        raise ValueError(f"the word {token!r} inside a formula")
                    else:
                        found += [("v", letter) for letter in token]
                else:
                    found.append(("c", token))
        elif kind == "LatexGroupNode":
            found.append(("g", items_of(node.nodelist)))
        elif kind == "LatexMathNode":
            found += items_of(node.nodelist)
        elif kind == "LatexSpecialsNode":
            if node.specials_chars == "&":
                raise ValueError("a table (&)")
            found += [("c", c) for c in node.specials_chars if c != "~"]
        elif kind == "LatexEnvironmentNode":
            found.append(("r", rows_of(node)))
        elif kind == "LatexMacroNode":
            found += command(node)
        else:
            raise ValueError("a LaTeX comment")
    return found


def rows_of(node):
    if node.environmentname not in ROWS:
        raise ValueError(f"the environment {node.environmentname}")
    rows = [[]]
    for child in node.nodelist:
        if type(child).__name__ == "LatexMacroNode" and child.macroname == "\\":
            rows.append([])
        elif type(child).__name__ == "LatexSpecialsNode" and child.specials_chars == "&":
            # Elsewhere it only lines things up
            if node.environmentname == "cases":
                rows[-1] += [("c", ","), ("t", "if")]
        else:
            rows[-1] += items_of([child])
    return [row for row in rows if row]


def command(node):
    """One LaTeX command -> its items."""
    name, arguments = node.macroname, list(node.nodeargd.argnlist or []) if node.nodeargd else []
    if name in ("\\", "newline"):
        if any(
            argument
            and re.match(r"\[(?!-?[\d.]+ *(?:pt|em|ex|mm|cm)\])", argument.latex_verbatim())
            for argument in arguments
        ):
            # \\ [0, 1], which is no distance
            raise ValueError("a bracket behind a new line")
        return [("c", "\\")]
    if name in SPACES:
        return []
    if name in TEXTS and arguments:
        if name in ("mathrm", "operatorname", "mathop", "text", "textbf", "textit") and (
            plain := items_or_none(arguments)
        ):
            return plain
        return [("t", " ".join(say(text_of(arguments)).split()))]
    if name in FUNCTIONS:
        return [("f", name)]
    if name in BIG:
        return [("b", name)]
    if name in (
        "frac",
        "dfrac",
        "tfrac",
        "cfrac",
        "binom",
        "dbinom",
        "tbinom",
        "sqrt",
        "pmod",
        "mathbb",
        *ACCENTS,
    ):
        # \sqrt\sqrt{2}: TeX would not take it either
        if not arguments:
            raise ValueError(f"a \\{name} without braces")
        return [
            (
                "m",
                name.lstrip("dtc") if name.endswith(("frac", "binom")) else name,
                [items_of([a]) if a else [] for a in arguments],
            )
        ]
    if name in ("bmod", "mod"):
        return [("t", "mod")] + [item for a in arguments if a for item in items_of([a])]
    if name in ("mid", "nmid"):
        return [("c", "∣" if name == "mid" else "∤")]
    if name in ("{", "}"):
        return [("c", name)]
    if name == "|":
        return [("c", "‖")]
    if (character := latex()[1](name)) is None:
        raise ValueError(f"the command \\{name}")
    return [("c", character)]


def text_of(nodes):
    """Nodes of text -> a string in which formulas are spoken already, between OPEN and CLOSE."""
    parts = []
    for node in nodes:
        kind = type(node).__name__
        if kind == "LatexCharsNode":
            parts.append(node.chars)
        elif kind == "LatexGroupNode":
            parts.append(text_of(node.nodelist))
        elif kind == "LatexMathNode" or kind == "LatexEnvironmentNode":
            parts.append(OPEN + formula(items_of([node])) + CLOSE)
            if kind == "LatexEnvironmentNode" or node.displaytype == "display":
                parts.append(" , ")  # a line of its own: a pause
        elif kind == "LatexSpecialsNode":
            if node.specials_chars == "&":
                raise ValueError("a table (&)")
            parts.append(
                {"~": " ", "--": "–", "---": "—", "``": '"', "''": '"'}.get(
                    node.specials_chars, node.specials_chars
                )
            )
        elif kind == "LatexMacroNode" and node.macroname in SPACES:
            parts.append(" , " if node.macroname in ("\\", "newline") else " ")
        elif (
            kind == "LatexMacroNode"
            and node.macroname in (*TEXTS, "underline")
            and node.nodeargd
            and node.nodeargd.argnlist
        ):
            parts.append(text_of(node.nodeargd.argnlist))
        else:
            # a formula's command outside of a formula: read it as there
            parts.append(OPEN + formula(items_of([node])) + CLOSE)
    return "".join(parts)


def is_word(token):
    """Three small letters or more that are no product such as abc: a word, which has no business
    in a formula."""
    return (
        len(token) > 2
        and not token.isupper()
        and list(token) != sorted(set(token))
        and token not in FUNCTIONS
    )


def items_or_none(arguments):
    """What \\mathrm and \\text hold, as items where it is a function, a unit or letters of a
    formula: not words."""
    raw = "".join(a.latex_verbatim() for a in arguments).strip("{} ~")
    if raw in FUNCTIONS:
        return [("f", raw)]
    if raw in ("max", "min"):
        return [("b", raw)]
    if raw in UNITS or raw == "in":
        return [("u", raw)]
    if match := re.fullmatch(rf"({'|'.join(UNITS)})\s*/\s*({PER})", raw):
        return [("u", match[1], match[2])]
    if re.fullmatch(r"[A-Z]{1,6}|[a-z]", raw):
        return [("v", letter) for letter in raw]
    return None


def formula(items):  # noqa: C901
    """Items of a formula -> words. A fraction, a root or an exponent of several parts says where
    it ends."""
    items = [
        (
            ("c", "∣")
            if item == ("c", "|")
            and items[max(0, i - 2) : i] == [("c", "{"), items[i - 1]]
            and items[i - 1][0] == "v"
            else item
        )
        for i, item in enumerate(items)
    ]  # {x | ...}: the bar of a set
    items = conditions(items)
    out, i, last, depth, opened = [], 0, "start", 0, False
    if items.count(("c", "|")) % 2:
        raise ValueError("a single vertical bar")
    while i < len(items):
        kind, value = items[i][:2]
        if kind == "c" and value == "|":
            opened = not opened
            if opened and i + 1 < len(items) and items[i + 1] == ("c", "|"):
                raise ValueError("vertical bars inside vertical bars")
            if opened and last == "atom":
                raise ValueError("a vertical bar behind a letter, which may mean divides")
            out.append("the absolute value of" if opened else ", end absolute value,")
            last, i = ("open" if opened else "atom"), i + 1
        elif kind == "c" and value in BRACKETS:
            if value in "([{":
                depth += 1
                out += ["times"] * (last == "part")
            depth -= value in ")]}"
            out.append(BRACKETS[value])
            last, i = ("open" if value in "([{⌊⌈⟨" else "closed"), i + 1
            if last == "closed":
                i = scripts(items, i, out, base="closed")
        elif kind == "c" and value in "-−–":
            if i + 1 == len(items):
                raise ValueError("a minus sign with nothing after it")
            out.append("negative" if last in ("start", "open", "operator") else "minus")
            last, i = "operator", i + 1
        elif kind == "c" and value == ":":
            out.append(colon(items, i, depth))
            last, i = "operator", i + 1
        elif kind == "c" and value == "∣":
            out.append(bar(items, i, depth))
            last, i = "operator", i + 1
        elif kind == "c" and value in ("given", "\\"):
            if value == "\\" and (
                depth
                or items[i + 1 : i + 2]
                and items[i + 1][0] == "c"
                and items[i + 1][1] in "-−–"
            ):
                raise ValueError("a new line where a formula may go on")
            out.append("given" if value == "given" else ",")
            last, i = "open", i + 1
        elif kind == "c" and value in f"{PERCENT}°∘′'":
            if last == "start" or value == "∘":
                raise ValueError(f"the symbol {value}")
            out.append({PERCENT: "percent", "°": "degrees"}.get(value, "prime"))
            last, i = "atom", i + 1
        elif kind == "c" and value == ".":
            if i + 1 < len(items):
                raise ValueError("a period inside a formula")
            out.append(".")
            i += 1
        elif kind == "c" and value in SYMBOLS:
            if (
                value == ","
                and last == "number"
                and i + 1 < len(items)
                and items[i + 1][0] == "n"
                and not depth
                and sum(item == ("c", ",") for item in items) == 1
            ):
                raise ValueError("a comma between two numbers, which may be a decimal one")
            if value == "∼" and not shapes(items, i):
                raise ValueError("the symbol ∼ between other things than triangles")
            if value == "/" and last == "operator":
                raise ValueError("a stroke with nothing before it")
            if (
                value == "/"
                and i > 0
                and i + 1 < len(items)
                and items[i - 1][0] == items[i + 1][0] == "n"
                and plain(items, i - 1, i + 2)
            ):
                out[-1] = fraction(items[i - 1][1], items[i + 1][1])
                last, i = "part", i + 2
                continue
            out.append(SYMBOLS[value])
            last, i = "operator", i + 1
        elif kind == "c" and value in PREFIXES:
            out.append(PREFIXES[value])
            last, i = "operator", i + 1
        elif kind == "t":
            out.append(value)
            last, i = (
                "open"
                if value.split()[-1:] in [[w] for w in "if and or for when where is mod".split()]
                else "text"
            ), i + 1
        elif kind == "r":
            rows = [
                re.sub(r"[ ,]+if (?=if|when|for|otherwise|where)|[ ,]+(?=if )", " ", formula(row))
                for row in value
            ]
            out.append(", and ".join(row.strip(" ,.") for row in rows))
            last, i = "closed", i + 1
        elif kind == "u":
            if last in ("start", "operator", "open"):
                raise ValueError(f"the unit {value} without a number")
            power = None
            if items[i + 1 : i + 2] == [("c", "^")] and i + 2 < len(items):
                power, i = exponent_of_unit(items[i + 2]), i + 2
            amount = out.pop()
            out.append(
                "inches"
                if value == "in"
                else measure(amount, value, power, *items[i][2:] if power is None else ())
            )
            if value == "in":
                if power:
                    raise ValueError("square inches")
                out.insert(-1, amount)
            last, i = "text", i + 1
            if (
                items[i : i + 1] == [("c", "/")]
                and i + 1 < len(items)
                and items[i + 1][0] == "u"
                and len(items[i + 1]) == 2
            ):
                # \mathrm{m} / \mathrm{s}^2
                out.append(f"per {UNITS.get(items[i + 1][1], 'inch')}")
                i += 2
                if items[i : i + 1] == [("c", "^")] and i + 1 < len(items):
                    out.append({"2": "squared", "3": "cubed"}[exponent_of_unit(items[i + 1])])
                    i += 2
        else:
            if kind == "n" and "," in value and depth:
                raise ValueError(f"the comma in {value}, which may separate two numbers")
            i, last = atom(items, i, out, last)
    return " ".join(" ".join(out).split())


def conditions(items):
    """P(A | B) and E[X | Y]: the bar is "given". Where both sides are a single letter, "P of A
    given B" is said, else the parentheses as well."""
    done, i = [], 0
    while i < len(items):
        done.append(items[i])
        i += 1
        if (
            items[i - 1] not in (("v", "P"), ("v", "E"))
            or items[i : i + 1] not in ([("c", "(")], [("c", "[")])
            or len(done) > 1
            and done[-2][0] == "v"
        ):
            continue
        depth, end, bars = 0, i, []
        while end < len(items):
            depth += (items[end][0] == "c" and items[end][1] in "([{") - (
                items[end][0] == "c" and items[end][1] in ")]}"
            )
            if not depth:
                break
            bars += [end] * (items[end] in (("c", "|"), ("c", "∣")))
            end += 1
        if end == len(items) or len(bars) != 1 or bars[0] in (i + 1, end - 1):
            # None at all, or |X| inside: for the rules of bars
            continue
        sides = items[i + 1 : bars[0]], items[bars[0] + 1 : end]
        named = lambda side: any(
            kind == "v" and value.isupper() or (kind, value) in [("c", c) for c in "=<>≤≥"]
            for kind, value, *_ in side
        )
        if not (named(sides[0]) or sides[0][0][0] != "n" and named(sides[1])):
            raise ValueError("a bar that may mean divides or given")  # P(3 | n)
        if all(map(simple, sides)) and (
            end + 1 == len(items) or items[end + 1][0] == "c" and items[end + 1][1] not in "^([{'!/"
        ):
            done[-1] = (
                "t",
                f"{LETTER}{items[i - 1][1]} of {formula(sides[0])} given {formula(sides[1])}",
            )
            i = end + 1
        else:
            done += [*items[i : bars[0]], ("c", "given")]
            i = bars[0] + 1
    return done


def bar(items, i, depth):
    """What \\mid says: in a set "such that", once; between numbers or small letters at the top
    "divides"; elsewhere it may be a condition."""
    since = (
        items[i - items[:i][::-1].index(("c", "{")) : i]
        if depth and ("c", "{") in items[:i]
        else None
    )
    if since is not None and ("c", "}") not in since:
        if ("c", "∣") in since or ("c", ":") in since:
            raise ValueError("two bars in a set, one of which may mean divides")
        return "such that"
    sides = items[i - 1 : i] + items[i + 1 : i + 2]
    if depth or len(sides) < 2 or all(kind == "v" and value.isupper() for kind, value, *_ in sides):
        raise ValueError("a bar that may mean divides or given")
    return "divides"


def colon(items, i, depth):
    """A set's condition, a function's domain, a ratio, or the name of a curve: "l: y = 2x" is no
    ratio, but who knows about "x:y = 2"?"""
    if depth and ("c", "{") in items[:i]:
        return "such that"
    if ("c", "→") in items[i:]:
        return "from"
    if ("c", "=") in items[i:] and items.count(("c", ":")) == 1:
        if i == 1 and items[0][0] == "v" and items[0][1] in "CDEGLMPQSTlpqr":
            return ","
        raise ValueError("a colon that may name a curve or divide")
    if not (0 < i < len(items) - 1 and items[i - 1][0] in "nv" and items[i + 1][0] in "nv"):
        raise ValueError("a colon that is no ratio")
    return "to"


def plain(items, before, after):
    """Are the digits at before and after a fraction of their own: no exponent, letter or stroke
    next to them, no decimals?"""
    near = [items[j] for j in (before - 1, after) if 0 <= j < len(items)]
    return (
        items[before][1].isdigit()
        and items[after - 1][1].isdigit()
        and not any(item in [("c", c) for c in "^_/!"] for item in near)
        and (before == 0 or items[before - 1][0] == "c" and items[before - 1][1] not in ")]}")
        and (after == len(items) or items[after][0] in "cut")
    )


def shapes(items, i):
    """Stands ∼ between the names of two triangles or polygons? X ∼ N(0,1) is a distribution, f ∼ g
    a limit, a ∼ b any relation."""
    capital = lambda item: item[0] == "v" and item[1].isupper()
    after = [item for item in items[i + 1 :] if item not in (("c", "△"), ("c", "□"))]
    before = [item for item in items[:i] if item[0] != "c"]
    return (
        len(after) > 2
        and capital(after[0])
        and after[1] not in (("c", "("), ("c", "["))
        and len(before) > 2
        and sum(map(capital, before)) > 2
        and sum(map(capital, after)) > 2
    )


def exponent_of_unit(item):
    inner = item[1] if item[0] == "g" else [item]
    if inner in ([("n", "2")], [("n", "3")]):
        return inner[0][1]
    raise ValueError("a unit with an exponent other than two or three")


def simple(items):
    """One number, letter or character: nothing a listener could take apart wrongly."""
    items = items[0][1] if len(items) == 1 and items[0][0] == "g" else items
    return (
        len(items) == 1
        and items[0][0] in "nvc"
        or len(items) == 2
        and items[0] == ("c", "-")
        and items[1][0] in "nv"
    )


def inner(items):
    return items[0][1] if len(items) == 1 and items[0][0] == "g" else items


def atom(items, i, out, last):
    """Append the words of what stands at i, with its exponents and indices -> (where to go on,
    what it was)."""
    kind, value, *rest = items[i]
    base, i = kind, i + 1
    joined = last in ("number", "atom", "closed", "part")  # a factor of what came before
    if kind == "n":
        if joined:
            raise ValueError(f"the number {value} right behind another part of a formula")
        if value.endswith(".") or i < len(items) and items[i] == ("c", ".") and i + 1 < len(items):
            raise ValueError(f"the number {value}.")
        words = number(value)
        if (
            i < len(items)
            and items[i][:2] == ("m", "frac")
            and all(digits(part) for part in items[i][2])
        ):
            words, i, base = f"{words} and {fraction(*map(digits, items[i][2]))}", i + 1, "part"
    elif kind == "v":
        words = LETTER + value
        if (
            value in "fghFGHPQ"
            and items[i : i + 1] == [("c", "(")]
            and items[i + 2 : i + 3] == [("c", ")")]
            and items[i + 1][0] in "nv"
        ):
            words, i, base = f"{words} of {formula(items[i + 1:i + 2])}", i + 3, "g"
    elif kind == "f":
        words, before = FUNCTIONS[value], len(out)
        out.append(words)
        if items[i : i + 2] in ([("c", "^"), ("g", [("c", "-"), ("n", "1")])],):
            out[before], i = f"inverse {words}", i + 2
        i = scripts(items, i, out, base="function")
        if i == len(items):
            raise ValueError(f"a {value} of nothing")
        out.append("of")
        return i, "operator"
    elif kind == "b":
        return big(items, i, out, value)
    elif kind == "g":
        if not value:
            return i, last
        words, base = formula(value), ("n" if simple(value) and inner(value)[-1][0] == "n" else "g")
    elif kind == "m":
        words, base = structure(value, rest[0])
    elif kind == "c" and value in ATOMS:
        words = ATOMS[value]
    elif kind == "c" and value.isalpha() and unicodedata.name(value, "").startswith("GREEK"):
        name = unicodedata.name(value).replace(" FINAL", "").split()
        words = {"lamda": "lambda", "xi": "zai"}.get(
            name[-1].lower() if "SYMBOL" not in name else name[1].lower(), name[-1].lower()
        )
        words = f"capital {words}" if "CAPITAL" in name else words
    elif kind == "c" and value == "√":
        if i >= len(items) or items[i][0] not in "nv":
            raise ValueError("a root sign with nothing certain below it")
        words, i, base = f"the square root of {formula(items[i:i + 1])}", i + 1, "part"
    elif kind == "c" and value in "²³":
        out.append("squared" if value == "²" else "cubed")
        return i, "atom"
    else:
        raise ValueError(f"the symbol {value}")
    if last == "part" and joined or base == "part" and joined:
        out.append("times")
    out.append(words)
    i = scripts(items, i, out, base=base, number=value if kind == "n" else None)
    return i, {"n": "number", "part": "part"}.get(base, "atom")


def digits(items):
    """The items of a fraction's half -> its digits where it is one whole number, else None."""
    items = inner(items)
    return (
        items[0][1]
        if len(items) == 1 and items[0][0] == "n" and items[0][1].replace(",", "").isdigit()
        else None
    )


def structure(name, arguments):
    """Fractions, roots and accents -> (words, kind)."""
    if name == "mathbb":
        found = inner(arguments[0])
        if len(found) != 1 or found[0][0] != "v" or found[0][1] not in BLACKBOARD:
            raise ValueError("a blackboard letter that is no set of numbers")
        return ATOMS[BLACKBOARD[found[0][1]]], "v"
    if name == "pmod":
        return f"modulo {formula(arguments[0])}", "v"
    if name in ("frac", "binom"):
        if len(arguments) != 2 or not all(map(inner, arguments)):
            raise ValueError(f"a \\{name} with an empty half")
        if (
            name == "frac"
            and inner(arguments[0])[0] == ("v", "d") == inner(arguments[1])[0]
            and (len(inner(arguments[0])) == 1 or inner(arguments[0])[1] == ("c", "^"))
            and len(inner(arguments[1])) > 1
        ):
            raise ValueError("a derivative")
        if name == "frac" and all(map(digits, arguments)):
            return fraction(*map(digits, arguments)), "part"
        above, below = map(formula, arguments)
        word = "over" if name == "frac" else "choose"
        if all(map(simple, arguments)):
            return f"{above} {word} {below}", "part"
        whole = "fraction" if name == "frac" else "binomial"
        return f"the {whole} {above} {word} {below}, end {whole},", "part"
    if name == "sqrt":
        index, below = arguments if len(arguments) == 2 else [[], arguments[-1]]
        if not inner(below):
            raise ValueError("a root of nothing")
        which = digits(index) if index else "2"
        which = {"2": "square", "3": "cube"}.get(which) or (
            ordinal(which) if which else NTH.get(formula(index)[1:])
        )
        if not which:
            raise ValueError("a root with such an index")
        words = f"the {which} root of {formula(below)}"
        return (words if simple(below) else f"{words}, end root,"), "part"
    words = formula(arguments[0])
    if not words:
        raise ValueError(f"an empty \\{name}")
    return (
        f"{words} {ACCENTS[name]}"
        if ACCENTS[name] in ("hat", "tilde")
        else f"{ACCENTS[name]} {words}"
    ).strip(), "g"


def scripts(items, i, out, *, base, number=None):
    """Exponents, indices, primes and factorials behind an atom. -> where to go on"""
    while i < len(items):
        if items[i] in (("c", "'"), ("c", "′"), ("c", "'")):
            out.append("prime")
            i += 1
        elif items[i] == ("c", "!"):
            out.append("factorial" if items[i + 1 : i + 2] != [("c", "!")] else "double factorial")
            i += 1 if out[-1] == "factorial" else 2
        elif items[i][0] == "c" and items[i][1] in "_^":
            if i + 1 == len(items):
                raise ValueError(f"a {items[i][1]} with nothing behind it")
            what, script = items[i][1], items[i + 1]
            # LaTeX raises the first digit alone, an author may have meant both
            if script[0] == "n" and len(script[1]) > 1:
                raise ValueError(f"{what}{script[1]} without braces")
            script = script[1] if script[0] == "g" else [script]
            if not script:
                raise ValueError(f"an empty {what}")
            i += 2
            if what == "_":
                # C^2_n
                if (
                    out[-2:-1]
                    and out[-2] in COUNTED
                    and out[-1].startswith(("squared", "cubed", "to the "))
                ):
                    raise ValueError(
                        "an exponent and an index, which may be a number of combinations"
                    )
                words = formula(script)
                out.append(
                    f"base {words}"
                    if base in ("n", "function")
                    else f"sub {words}" + ", end sub," * (not simple(script) and len(script) > 1)
                )
            else:
                i = power(items, i, out, script, number, base)
        else:
            return i
    return i


def power(items, i, out, script, number, base):
    if script == [("c", "∘")] or script == [("c", "°")]:
        out.append("degree" if number == "1" else "degrees")
        if (
            i < len(items)
            and items[i] in (("v", "C"), ("v", "F"))
            and (i + 1 == len(items) or items[i + 1][0] != "v")
        ):
            out.append("Celsius" if items[i][1] == "C" else "Fahrenheit")
            return i + 1
    elif script[0][0] == "c" and script[0][1] in "'′" or script == [("m", "prime")]:
        out.append("prime " * len(script))
    elif out[-1].startswith("sub ") and out[-2] in COUNTED:
        raise ValueError("an index and an exponent, which may be a number of combinations")
    elif script == [("n", "2")] or script == [("n", "3")]:
        out.append("squared" if script[0][1] == "2" else "cubed")
    elif (
        script[-1][0] == "t"
        and script[-1][1] in ("th", "st", "nd", "rd")
        or script in ([("v", "t"), ("v", "h")], [("v", "s"), ("v", "t")])
    ):
        if len(out) > 1:  # n+1^{th}: of the sum, or of the one?
            raise ValueError("an ordinal of several parts")
        if number and number.isdigit():
            out[-1] = ordinal(number)
        elif out[-1][1:] in NTH:
            out[-1] = NTH[out[-1][1:]]
        else:
            raise ValueError("an ordinal of several parts")
    elif script in ([("c", "+")], [("c", "-")], [("c", "*")], [("v", "T")], [("c", "⊥")]):
        raise ValueError(f"the exponent {script[0][1]}")
    elif script == [("c", "-"), ("n", "1")] and out[-1] in [LETTER + name for name in "fgh"]:
        out.append("inverse")
    elif simple(script):
        out.append(f"to the power of {formula(script)}")
    else:
        out.append(f"to the {formula(script)} power")
    return i


def big(items, i, out, name):
    """Sums, integrals, limits with what stands below and above."""
    limits = {}
    while (
        i + 1 < len(items)
        and items[i][0] == "c"
        and items[i][1] in "_^"
        and items[i][1] not in limits
    ):
        script = items[i + 1]
        limits[items[i][1]] = formula(script[1] if script[0] == "g" else [script])
        i += 2
    below, above, words = limits.get("_"), limits.get("^"), BIG[name]
    if above and not below or i == len(items):
        raise ValueError(f"a \\{name} that is not complete")
    if name == "lim" and below:
        if " to " not in below:
            raise ValueError("a limit without an arrow")
        words += f" as {below.replace(' to ', ' approaches ', 1)}"
    elif above:
        words += f" from {below} to {above}"
    elif below:
        words += f" over {below}"
    out.append(f"{words} of")
    return i, "operator"


# ------------------------------------------------------------------------------------------------
# 3. Text

REFUSED = [
    (r"\[/?asy\]|\\begin\{asy\}|\\begin\{tikz", "a diagram"),
    (r"!\[|<img|\\includegraphics", "an image"),
    (r"https?:|www\.", "a web address"),
    (r"\\begin\{(tabular|table)|\|\s*:?-{2,}|^\s*\|.*\|\s*$", "a table"),
    (r"<[a-z/]+>", "HTML"),
    (r"```", "a code block"),
    (
        r"[\u0400-\u04ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0590-\u06ff\u0900-\u0dff]",
        "a script other than Latin",
    ),
    ("[\ue000-\ue002\uff03-\uff05]", "a character of no script"),
    (r"\d[/-]\d+[/-]\d{2,4}\b", "a date in digits"),
    (r"\d{3}-\d{4}", "a telephone number"),
    (
        r"\b(?:[Oo]n|[Ss]ince|[Uu]ntil|[Bb]efore|[Aa]fter|[Ff]rom|[Dd]ue|[Dd]ated)"
        r" (?:0?[1-9]|1[0-2])/(?:0?[1-9]|[12]\d|3[01])\b"
        r"(?! (?:of|a|an|the|hours?|minutes?|miles?|inch\w*|pounds?|gallons?|cups?|acres?)\b)",
        "a date in digits",
    ),
    (r"\b24/7\b", "24/7"),
    (
        r"\d ?'\s?\d|\d ?''|\d ?['\"]\s?[xX×]|\d\" (?:by|x|long|tall|wide)",
        "feet and inches by their signs",
    ),
    (r"\d in\.(?=\s?[a-z,x])", "inches by 'in.'"),
    (r"(?<![\d,.])\d{1,3}(?: \d{3})+(?![\d,.]\d|\d)", "numbers side by side"),
    (r"\d\.\d+\.\d", "a number with two points"),
    (r"(?<![\w$\\])\d{2,4}'?s\b", "a decade"),
]


def prose(inside):
    """Does what stands between two dollar signs read like a sentence?"""
    bare = re.sub(
        r"\\(?:text\w*|mathrm|operatorname|mbox|begin|end|mathbb|mathcal)\s*\{[^{}]*\}|\\[a-zA-Z]+",
        " ",
        inside,
    )
    return (
        bool(re.search(r"\n\s*\n|[.!?]\s+[A-Z]", bare))
        or any(map(is_word, re.findall(r"[A-Za-z]+", bare)))
        or bool(re.search(r"(?<![A-Za-z])(?:is|of|or|to|in|he|at|on)\s", bare))
    )


def protect(text):
    """Which dollar signs are money and which open a formula? pandoc's rule: the opening one has a
    character right behind it, the closing one right before it and no digit behind it. Where that
    leaves prose between two signs and no amount of money after the first, there is no telling."""
    text = re.sub(
        r"\\left\s*\\\{\s*\\begin\{array\}\{[lcr]+\}(.*?)\\end\{array\}\s*\\right\s*\.",
        r"\\begin{cases}\1\\end{cases}",
        text,
        # How formulas that were read from print write cases
        flags=re.DOTALL,
    )
    # a gap to fill in
    text = re.sub(
        r"(\$?)\\underline\s*\{(?:\\q?quad|\\hspace\*?\{[^{}]*\}|[\s~_\\,;])*\}\1", " __ ", text
    )
    text = re.sub(r"(\$?)(?:\\_\s?){2,}\1", " __ ", text)
    # cm$^2$: with a number or a formula before it a unit like cm^2, else words
    text = re.sub(
        rf"(\d\$?|\$|[)}}])?(\s?)(?<![A-Za-z])({'|'.join(LENGTHS)}|in)"
        r"\s?\$\s?\^\s?\{?([23])\}?\s?\$",
        lambda m: (
            f"{m[1]}{m[2]}{m[3]}^{m[4]}"
            if m[1] and m[3] != "in"
            else (
                refuse("an exponent on its own")
                if m[3] == "in"
                else (
                    f"{m[2]}{'square' if m[4] == '2' else 'cubic'}"
                    f" {'feet' if m[3] == 'ft' else LENGTHS[m[3]] + 's'}"
                )
            )
        ),
        text,
    )
    text = re.sub(r"\\(?:left|right)\s*\.", "", text).replace(r"\$", DOLLAR)
    text = re.sub(r"\\?%", PERCENT, text)
    text = re.sub(r"\\?#(?=\s?\d)", HASH, text).replace(r"\&", " and ")
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ |\\;)(?=\d{3}(?!\d))", ",", text)
    done, i = [], 0
    while i < len(text):
        if text[i] != "$":
            if (
                text.startswith(("\\[", "\\("), i)
                and (end := text.find("\\]" if text[i + 1] == "[" else "\\)", i)) > 0
            ):
                done.append(text[i : end + 2])
                i = end + 2
                continue
            done.append(text[i])
            i += 1
            continue
        sign = "$$" if text.startswith("$$", i) else "$"
        end = text.find(sign, i + len(sign))
        inside = text[i + len(sign) : end] if end > 0 else ""
        pairs = (
            inside
            and sign == "$"
            and not inside[-1].isspace()
            and not text[end + 1 : end + 2].isdigit()
        )
        if sign == "$" and re.match(r"\.?\d", text[i + 1 :]) and (not pairs or prose(inside)):
            done.append(DOLLAR)
            i += 1
        elif not inside.strip() or prose(inside):
            raise ValueError("dollar signs that do not pair up")
        else:
            # a bare number is one, with or without the signs
            whole = re.fullmatch(rf"\s*({NUMBER})\s*", inside)
            done.append(whole[1] if whole else text[i : end + len(sign)])
            i = end + len(sign)
    return "".join(done)


def plain_formula(match):
    """x^2+1 or 5 + 3 = 8 outside of dollar signs. What is only joined by - or / is left to the
    rules of text."""
    raw = match[0]
    if not re.search(r"[+*=<>^×÷≤≥≠·]|\s[-−/]\s", raw):
        return raw
    raw = re.sub(r"\^(\d+)", r"^{\1}", raw)
    return OPEN + formula(items_of(parse(f"\\({raw}\\)"))) + CLOSE


def amount(match):
    """A $20 bill is "a twenty dollar bill", but it costs "twenty dollars"."""
    return money(*match.groups(), adjective=bool(re.match(THING, match.string[match.end() :])))


def between(match):
    """5-10 is a range, and 10-5 may be a score or a difference."""
    low, high = (float(match[n].replace(",", "")) for n in (1, 2))
    if low >= high:
        raise ValueError(f"{match[0]}, which may be a difference or a score")
    return f"{match[1]} to {match[2]}"


def money_between(match):
    """$5-$8 is a range; with spaces or beside a sign of calculation $8-$5 is left to the rules of
    formulas."""
    minus, sign, low, scale, space, again, high, thousand, above = match.groups()
    near = match.string[: match.start()].rstrip()[-1:] + match.string[match.end() :].lstrip()[:1]
    if set(near) & set("+*/=<>^×÷-–"):
        if set(near) & set("+*=<>^×÷") and not (scale or thousand or above):
            return match[0]
        if not (
            match.string[match.end() : match.end() + 1] in "-/"
            and not re.match(rf"[-–/][\d{DOLLAR}€£]", match.string[match.end() :])
        ):
            raise ValueError(f"{match[0]}, which may be a difference or a range")
    value = lambda amount, scale: float(amount.replace(",", "")) * {
        "thousand": 1e3,
        "million": 1e6,
        "billion": 1e9,
        "trillion": 1e12,
    }.get(scale, 1)
    above = "thousand" if thousand else above
    if minus or value(low, scale and scale.strip()) >= value(high, above):
        if space and not minus and again:
            return match[0]
        raise ValueError(f"{match[0]}, which may be a difference")
    cents = "." in low + high and not scale and not above
    first = money(sign, low) if cents else f"{number(low)}{scale or ''}"
    return (
        f"{first} to"
        f" {money(sign, high, above, adjective=bool(re.match(THING, match.string[match.end():])))}"
    )


def dimensions(match):
    """5 x 3 is a size where a length or a thing that has two sides follows in the sentence;
    elsewhere it may be a product."""
    after = re.split(r"[.?!](?:\s|$)", match.string[match.end() :])[0]
    if (
        re.match(r"\s*[=+*/^<>(-]", after)
        or re.search(rf"[=+*/^<>{DOLLAR}-]\s*$", match.string[: match.start()])
        or not re.search(rf"{FLAT}|^ ?m\b", after)
    ):
        raise ValueError(f"{match[0]}, which may be a size or a product")
    return re.sub(r"\s?[xX]\s?", " by ", match[0])


def parts_of_unit(match):
    """1/2 lb, 3/4 km, 3 1/2 lbs -> "one half pound", "three quarters kilometer", "three and one
    half pounds"."""
    whole, above, below, unit, exponent, per = match.groups()
    exponent = exponent and exponent.translate(str.maketrans("²³", "23"))
    part = fraction(above, below)
    # 12 1/2-lb bags: how many bags?
    if whole and "-" in match[0][match.start(3) - match.start() + len(below) :]:
        raise ValueError(f"{match[0]}, which may be a number of things")
    if not whole and int(above) <= int(below) and "over" not in part:
        return part + measure("one", unit, exponent, per).removeprefix("one")
    return measure(f"{number(whole)} and {part}" if whole else part, unit, exponent, per)


def squares(match):
    """100 sq. ft, per sq ft, 5 cu. yd, 3 fl oz, a 100-sq-ft room."""
    before, value, joint, kind, unit = match.groups()
    unit = (
        {"in": "inch", "feet": "foot", "inches": "inch"}.get(unit)
        or UNITS.get(unit)
        or unit.removesuffix("s")
    )
    if (kind == "fl") != (unit == "ounce"):
        raise ValueError(f"the unit {match[0]}")
    one = before or joint == "-" or value == "1"
    unit = unit if one else {"foot": "feet", "inch": "inches"}.get(unit, unit + "s")
    words = f"{ {'sq': 'square', 'cu': 'cubic', 'fl': 'fluid'}[kind]} {unit}"
    return (
        f"{before} {words}"
        if before
        else f"{number(value)}{joint}{words.replace(' ', joint)}" if value else words
    )


def clock(match):
    hour, minute, half = int(match[1]), int(match[2]), match[3]
    if re.search(RATIO, match.string) and not half:
        return match[0]
    before = r"\b(?:at|from|until|till|by|before|after) $"
    # "It was 8:00", while 8:30 may be a score or a ratio
    if not minute and hour:
        before += r"|\b[Ii]t(?:'s| is| was) (?:now |already |only |about |almost |exactly )?$"
    if (
        not half
        and not re.search(before, match.string[: match.start()])
        or hour > 23
        or minute > 59
    ):
        raise ValueError(f"{match[0].strip()}, which may be a time or a ratio")
    words = in_words(hour) + (
        f" {'oh ' * (minute < 10)}{in_words(minute)}" if minute else "" if half else " o'clock"
    )
    return words + (f" {half[0].upper().replace('A', 'eh')} M" if half else "")


THING = (
    r" (?:bills?|notes?|coins?|gift|tickets?|coupons?|stamps?|"
    r"discount|fee|tip|bonus|deposit|loan)\b|-"
)
FLAT = (
    r"\b(?:feet|foot|ft|inch(?:es)?|cm|mm|km|yd|yards?|(?:centi|milli|kilo)?met(?:er|re)s?|miles?|"
    r"rugs?|grids?|boards?|rooms?|rectang\w+|"
    r"fields?|gardens?|photos?|pictures?|frames?|squares?|checkerboards?|"
    r"chessboards?|tiles?|posters?|canvas|quilts?|patios?|lots?|plots?)\b"
)
RATIO = "ratio|scale|proportion"
TERM = rf"(?:(?<![\d,.])\d[\d,]*(?:\.\d+)?|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[()π²³{PERCENT}])+"
N = rf"(?<![\d.,])(?:{NUMBER})(?!\d|,\d|\.\d)"
UNIT = rf"({'|'.join(sorted(UNITS, key=len, reverse=True))})"
# The period of an abbreviation, unless it ends the sentence
STOP = r"(?:\.(?=\s?[,;a-z)]))?"
POWER = rf"(?:\^?\{{?([23²³])\}}?)?(?:/({PER}))?(?![A-Za-z0-9'^]){STOP}"
RULES = [  # from the special to the general; each sees what those before it left
    (r"\*\*(.+?)\*\*", r"\1"),
    (r"(?:\\?_\s?){2,}|\(\s+\)", " blank "),
    (
        rf"({N}) ?(?:°|degrees?) ?([CF])\b",
        lambda m: f"{m[1]} degrees {'Celsius' if m[2] == 'C' else 'Fahrenheit'}",
    ),
    (rf"({N})°", r"\1 degrees"),
    (
        rf"([{DOLLAR}€£]\s?(?:{NUMBER}))([kKM])\b",
        lambda m: m[1] + (" million" if m[2] == "M" else " thousand"),
    ),
    (
        rf"(-?)([{DOLLAR}€£])\s?({NUMBER})( million|"
        rf" thousand)?(\s?)[-–]\5(\2?)\s?({NUMBER})(?!\d|,\d|\.\d)(k\b)?"
        r"(?:\s?(hundred|thousand|million|billion|trillion)\b)?",
        money_between,
    ),
    (r"(?<![\d/.,])(\d+)/(\d+)(?:rds?|ths?)\b", lambda m: f"{m[1]}/{m[2]}"),
    (r"(?<=[\da-z])/(?=(?:sq|cu|fl)\b)", " per "),
    (rf"{N}\s?[xX]\s?[{DOLLAR}€£]", lambda m: refuse(f"{m[0]}, which may be a product")),
    (rf"({N})(?:(?:\s[xX]\s|[xX])(?:{N}))+", dimensions),
    (
        rf"({N}\s?(?:{UNIT}\.?|feet|foot|inch|inches|yards?|meters?|centimeters?))"
            rf"\s?[xX]\s?(?={N})",
        r"\1 by ",
    ),
    (
        rf"({N})[xX](?= (?:as|more|less|fewer|faster|larger|bigger|longer|the)\b)",
        lambda m: (
            f"{m[1]} times"
            if m.string.startswith(" as", m.end())
            else refuse(f"{m[0]}, which may be times or a variable")
        ),
    ),
    (rf"(?:({N})(?: |-| and ))?(?<![\d/.,])(\d+)/(\d+)[ -]?{UNIT}{POWER}", parts_of_unit),
    (
        (
            rf"(?<![=+*/<>^×÷-])(?<![=+*/<>^×÷-] )({N})[-–]({N})(?=["
            rf" -]?(?:{UNIT}|sq|cu|fl)(?![A-Za-z]))"
        ),
        between,
    ),
    (
        rf"(?:\d|\b[A-Za-z]) - {N}\s?{UNIT}(?![A-Za-z])",
        lambda m: refuse(f"{m[0]}, which may be a difference or a range"),
    ),
    (
        (
            rf"(?:\b(per|a|each) |({N})([ -]))?\b(sq|cu|fl)\b\.?["
            rf" -]?(ft|in|yd|mi|cm|m|km|oz|feet|foot|inch|inches|yards?|miles?|meters?)\b{STOP}"
        ),
        squares,
    ),
    # 5-m may be a difference
    (
        rf"({N})-(?=[a-zA-Z]{{2}}|L|[mhgsl]"
        rf" (?!is|are|and|or|has|was|for|then|equals)[a-z]{{3}})({UNIT[1:-1]}|in)\b"
        rf"(?!['^/]|-(?!by|long|wide|tall|high|deep)){STOP}",
        lambda m: f"{number(m[1])}-{'inch' if m[2] == 'in' else UNITS[m[2]].replace(' ', '-')}",
    ),
    (rf"({N})(\s?){UNIT}{POWER}", lambda m: measured(m)),
    (
        (
            rf"(?<![\w.])({'|'.join(u for u in LENGTHS if len(u) == 2)})"
            r"(?:\^\{?([23])\}?|([²³]))(?!\w)"
        ),
        lambda m: measure(
            "one" if m.string.endswith("per ", 0, m.start()) else "",
            m[1],
            {"²": "2", "³": "3"}.get(m[3], m[2]),
        ).removeprefix("one "),
    ),
    (
        rf"{CLOSE}\s?{UNIT}{POWER}",
        lambda m: CLOSE
        + measure("", m[1], m[2] and m[2].translate(str.maketrans("²³", "23")), m[3]),
    ),
    (
        rf"(?<![\w.,{LETTER}])[{DOLLAR}√-]*{TERM}"
            rf"(?:\s*[+*=<>^×÷≤≥≠·−/-]\s*[{DOLLAR}√-]*{TERM})+(?!\w)",
        plain_formula,
    ),
    (
        rf"(?<=\d)-\s?[{DOLLAR}€£]|[{DOLLAR}€£]\s?(?:{NUMBER})\s-(?=[{DOLLAR}€£])",
        lambda m: refuse(f"{m[0]}, which may be a difference or a debt"),
    ),
    (
        rf"(?<![\w.,){CLOSE}])-(?=[{DOLLAR}€£]\s?\.?\d)|(?<![\w.,)])[{DOLLAR}]-(?=\.?\d)",
        lambda m: f"negative {m[0].strip('-')}",
    ),
    (MONEY, amount),
    # The period of "p.m." ends the sentence as well
    (r"(?<=[AaPp]\.[Mm])\.(?=\s+[A-Z]|\s*$)", ".."),
    (r"(?<![\d:])(\d{1,2}):(\d{2})(?![\d:])(?:\s?([aApP](?:\.[mM]\.|[mM]\b)))?", clock),
    (
        r"\b(\d{1,2}) ?([aApP])(?:\.[mM]\.|[mM]\b)",
        lambda m: f"{in_words(int(m[1]))} {m[2].upper().replace('A', 'eh')} M",
    ),
    (
        r"(\d+):(?=\d)",
        lambda m: (
            f"{m[1]} to "
            if re.search(RATIO, m.string)
            else refuse(f"{m[0]}, which may be a time or a ratio")
        ),
    ),
    (
        rf"\b({'|'.join(MONTHS)}) (\d{{1,2}})(?:st|nd|rd|th)?\b(?:(,?) (\d{{4}})\b)?",
        lambda m: f"{m[1]} {ordinal(m[2])}"
        + (f", {in_words(int(m[4]), to='year')}" if m[4] else ""),
    ),
    (
        rf"\b({'|'.join(MONTHS)}),? (1[1-9]\d\d|20\d\d)\b",
        lambda m: f"{m[1]} {in_words(int(m[2]), to='year')}",
    ),
    (
        (
            r"\b([Yy]ears?|[Ii]n|[Ss]ince|[Bb]y|[Uu]ntil) (1[5-9]\d\d|20\d\d)(?=[,.;?!)]|$|"
            r" (?:and|was|were|is|the|to|he|she|they|but|than)\b)"
        ),
        lambda m: f"{m[1]} {in_words(int(m[2]), to='year')}",
    ),
    (rf"{OPEN}{LETTER}([{''.join(NTH)}]){CLOSE}\s?-?th\b", lambda m: OPEN + NTH[m[1]] + CLOSE),
    (
        rf"(?:{CLOSE}|[)²³])\s?-?(?:th|st|nd|rd)\b|(?:[+^*]|\b[A-Za-z]\s?-)\s?\d+(?:th|st|nd|rd)\b",
        lambda m: refuse("an ordinal of several parts"),
    ),
    (r"\b(\d{1,3}(?:,\d{3})*|\d+)(?:st|nd|rd|th)\b", lambda m: ordinal(m[1])),
    (rf"{HASH}\s?", "number "),
    (
        (
            r"\b(?:sq|cu|fl|sqft)\b|\d["
            rf" -]?(?:pts?|doz|ea)\b|\d-(?:{'|'.join(unit for unit in UNITS if len(unit) > 1)})\b"
        ),
        lambda m: refuse(f"the unit {m[0]}"),
    ),
    (r"(^|[a-z,(] ?)No\. ?(?=\d)", r"\1number "),
    (
        r"\b[Nn]os?\. ?(?=\d)",
        lambda m: refuse(f"{m[0].strip()}, which may be a number or the answer no"),
    ),
    (
        rf"({N})[ -](?:and )?(\d+)/(\d+)(?![\d/])",
        lambda m: f"{number(m[1])} and {fraction(m[2], m[3])}",
    ),
    (r"(?<![\d/.,])(\d+)/(\d+)(?![\d/]|[.,]\d)", lambda m: fraction(m[1], m[2])),
    (rf"({N})[-–](?={DOLLAR}?)({N})(?![-–]\d)", between),
    (rf"(?<![\w{CLOSE}]){DOLLAR}?[-−]({N})", r"negative \1"),
    (rf"(?<=\d|{CLOSE})\s?{PERCENT}", " percent"),
    (r"(\d)\s?¢", r"\1 cents"),
    (r"\d!(?!\S*[\"')])", lambda m: refuse(f"{m[0]}, which may be a factorial")),
    (rf"({N})(?=([A-Za-z])?)", lambda m: number(m[1]) + " " * bool(m[2])),
    (
        r"\b(and|he|his|him|she|her|hers)/(or|she|her|hers|he|his|him)\b",
        lambda m: f"{m[1]} or {m[2]}".replace("or or", "or"),
    ),
    (
        rf"(?<=[a-z])(?<!hour)(?<!day)(?<!week)(?<!month)(?<!year)/({PER}|each|per)\b",
        lambda m: f" per {UNITS.get(m[1], m[1])}",
    ),
    (r"\(([A-H])\)", rf"({LETTER}\1)"),
    # Within a sentence a lone A is a name, at its beginning the article
    (r"(?<=[a-z,;] )A(?=[\s.,;?!)]|$)", f"{LETTER}A"),
    (r"\s[-–—]+\s|—", ", "),
    (r"(?<=[a-z])–(?=[a-z])", "-"),
    ("&", " and "),
    ("@", " at "),
    ("[…]", "..."),
    (r"\[|\]", lambda m: {"[": "(", "]": ")"}[m[0]]),
]


def refuse(what):
    raise ValueError(what)


def measured(match):
    """A number and its unit in text. "5 in" is left alone, and "5s" too: neither need be a
    measure."""
    value, space, unit, exponent, per = match.groups()
    if unit == "s" and not space:
        raise ValueError(f"{match[0]}, which may be seconds or a plural")
    return measure(
        number(value), unit, exponent and exponent.translate(str.maketrans("²³", "23")), per
    )


def say(text):
    """Text whose formulas are spoken already -> words, still with marks."""
    for pattern, spoken in RULES:
        text = re.sub(pattern, spoken, text)
    return text


def verbalise(text):
    """Text with numbers, symbols, units and LaTeX -> the words a speaker says: letters and . , ; :
    ? ! ' " ( ) - alone.

    The variable a is written "eh": both espeak-ng and Kokoro read a lone "a" as the article.
    Raises ValueError that names the first thing that cannot be said with certainty, e.g. "a table
    (&)", "the command \\foo", "a date in digits"."""
    if len(text) > 10_000:
        raise ValueError("a text of more than 10,000 characters")
    text = unicodedata.normalize("NFC", text).translate(
        {0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"', 0x2212: "-", 0xA0: " ", 0x2009: " "}
    )
    for pattern, what in REFUSED:
        if re.search(pattern, text, re.MULTILINE):
            raise ValueError(what)
    try:
        words = say(text_of(parse(protect(text))))
    except RecursionError:
        raise ValueError("LaTeX nested too deeply") from None
    names = set(re.findall(rf"{LETTER}(.)", words))
    both = {name for name in names if name.swapcase() in names}

    def name(match):
        said = "eh" if match[1] in "aA" else match[1]
        return f"capital {said}" if match[1] in both and match[1].isupper() else said

    words = re.sub(rf"{LETTER}(.)", name, words.replace(OPEN, " ").replace(CLOSE, f" {CLOSE}"))
    # "x" + "-axis" stay together, "x" + "is" do not
    words = re.sub(rf" {CLOSE}(?=[\w(\"])", " ", words).replace(f" {CLOSE}", "")
    words = re.sub(r"\s+", " ", words)
    words = re.sub(r"\s+([.,;:?!)])", r"\1", words)
    words = re.sub(r",(?:\s*,)+", ",", words)
    words = re.sub(r",([.;:?!])|([.;:?!]),", r"\1\2", words).strip(" ,")
    for character in words:
        if not (
            character in " .,;:?!'\"()-"
            or unicodedata.name(character, "").startswith("LATIN")
            and character.isalpha()
        ):
            raise ValueError(f"the character {character!r}")
    if not re.search("[A-Za-z]", words):
        raise ValueError("no words at all")
    return words


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    try:
        print(verbalise(parser.parse_args().text))
    except ValueError as error:
        raise SystemExit(f"error: cannot say {error}; leave it out, or write it in words") from None


if __name__ == "__main__":
    main()
