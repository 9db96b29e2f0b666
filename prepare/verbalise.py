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
PRICE = rf"[{DOLLAR}€£]\s?(?:{NUMBER})"
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
    ℂ the complex numbers  λ lambda  Λ capital lambda  ξ zai  Ξ capital zai
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
    gt >  ast *  longrightarrow →  mid ∣
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
    min the minimum  bigcup the union  bigcap the intersection
""")
# What is written as a word, in a formula or a \text: a function or a big operator
NAMED = dict.fromkeys(FUNCTIONS, "f") | {"max": "b", "min": "b"}
ACCENTS = table("""
    overline overline  bar overline  vec vector  overrightarrow vector  hat hat  widehat hat
    tilde tilde  widetilde tilde
""")
ACCENTS |= dict.fromkeys("mathbf boldsymbol mathit mathcal mathscr boxed underline".split(), "")
TEXTS = """
    text textbf textit textrm emph mbox mathrm operatorname textnormal textsf texttt hbox mathop
""".split()
PAIRS = "frac dfrac tfrac cfrac binom dbinom tbinom".split()
SPECIALS = {"~": " ", "--": "–", "---": "—", "``": '"', "''": '"'}
SPACES = [" "]
SPACES += """
    , ; : ! quad qquad \\ displaystyle textstyle limits nolimits newline par noindent hfill left
    right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr thinspace > centering
""".split()
# One formula a row
ROWS = "cases align align* aligned gather gather* gathered equation equation* split".split()
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
POWERS = {None: "", "2": "square", "²": "square", "3": "cubic", "³": "cubic"}
PER = (
    "hour|hr|h|minute|min|second|sec|s|day|week|month|year|mile|foot|pound|lb|kg|L|l|gallon|person|"
    "piece|item|yard|ounce|bag|box|ticket|"
    "cm|m|km|mi|ft|yd|oz|gal|g|mL|ml"
)
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
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
    if len(whole) > 1 and whole[0] == "0":  # a code or a clock
        raise ValueError(f"the number {text}, which begins with a zero")
    words = in_words(int(whole or 0)).replace(",", "")
    if part:
        words += " point " + " ".join(in_words(int(digit)) for digit in part)
    return words


def ordinal(text):
    return in_words(int(text.replace(",", "")), to="ordinal").replace(",", "")


def year(text):
    return in_words(int(text), to="year")


def fraction(above, below):
    """Two strings of digits -> "two thirds"; "thirty-one over seventy-three" where an ordinal
    would be hard to hear."""
    n, d = int(above.replace(",", "")), int(below.replace(",", ""))
    if n > 100 or d not in (*range(2, 21), 24, 25, 30, 32, 40, 50, 60, 64, 100, 1000):
        return f"{number(above)} over {number(below)}"
    part = {2: "half", 4: "quarter"}.get(d) or ordinal(below).removeprefix("one ")
    if n != 1:
        part = "halves" if d == 2 else part + "s"
    return f"{number(above)} {part}"


def money(sign, amount, scale=None, *, adjective=False):
    """("$", "5.50") -> "five dollars and fifty cents"."""
    unit = {"€": "euro", "£": "pound"}.get(sign, "dollar")
    whole, _, part = amount.replace(",", "").partition(".")
    if scale:
        return f"{number(amount)} {scale} {unit}{'' if adjective else 's'}"
    if part and len(part) != 2:
        return f"{number(amount)} {unit}s"
    small = {"£": ("penny", "pence")}.get(sign, ("cent", "cents"))
    parts = []
    if int(whole or 0) or not int(part or 0):
        parts.append(f"{number(whole)} {unit}" + "s" * (int(whole) != 1 and not adjective))
    if int(part or 0):
        parts.append(f"{in_words(int(part))} {small[int(part) != 1]}")
    return " and ".join(parts)


def measure(amount, unit, power=None, per=None):
    """("five", "km", None, "h") -> "five kilometers per hour"; power: a key of POWERS; amount "one"
    takes the singular."""
    head, *tail = UNITS.get(unit, "inch").split(" ", 1)
    if amount not in ("one", "negative one"):
        head = plural(head)
    if power and unit not in LENGTHS:
        raise ValueError(f"the unit {unit} with an exponent")
    words = [amount, POWERS[power], head, *tail]
    if per:
        words += ["per", UNITS.get(per, per)]
    return " ".join(filter(None, words))


def plural(unit):
    return {"foot": "feet", "inch": "inches", "hertz": "hertz"}.get(unit, unit + "s")


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

    ours = [MacroSpec(name, "{{") for name in PAIRS]
    ours += [MacroSpec(name, "{") for name in (*TEXTS, *ACCENTS, "mathbb", "pmod", "mod")]
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
                    found.append(("t", money(token[0], token[1:].strip())))
                elif re.fullmatch(NUMBER, token):
                    if token[0] == "." and found and found[-1][0] == "n":
                        raise ValueError(f"the number {found[-1][1]}{token}")
                    found.append(("n", token))
                elif token in NAMED:
                    found.append((NAMED[token], token))
                elif is_word(token):
                    raise ValueError(f"the word {token!r} inside a formula")
                elif token.isascii() and token.isalpha():
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


def arguments_of(node):
    """A command's arguments; none where it is itself the argument of another, without braces."""
    return node.nodeargd.argnlist if node.nodeargd else []


def command(node):
    """One LaTeX command -> its items."""
    name, arguments = node.macroname, arguments_of(node)
    if name in ("\\", "newline"):
        distance = "".join(argument.latex_verbatim() for argument in arguments if argument)
        if distance.startswith("[") and not re.search(r"\d *(?:pt|em|ex|mm|cm)\]", distance):
            # \\ [0, 1]
            raise ValueError("a bracket behind a new line")
        return [("c", "\\")]
    if name in SPACES:
        return []
    if name in TEXTS and arguments:
        return items_or_none(arguments) or [("t", " ".join(say(text_of(arguments)).split()))]
    if name in FUNCTIONS:
        return [("f", name)]
    if name in BIG:
        return [("b", name)]
    parts = [items_of([argument]) if argument else [] for argument in arguments]
    if name in ("bmod", "mod"):
        return [("t", "mod"), *sum(parts, [])]
    if name in (*PAIRS, *ACCENTS, "sqrt", "pmod", "mathbb"):
        # \sqrt\sqrt{2}: TeX would not take it either
        if not parts:
            raise ValueError(f"a \\{name} without braces")
        return [("m", name.lstrip("dtc") if name in PAIRS else name, parts)]
    if (character := latex()[1](name)) is None:
        raise ValueError(f"the command \\{name}")
    return [("c", character)]


def text_of(nodes):
    """Nodes of text -> a string in which formulas are spoken already, between OPEN and CLOSE."""
    parts = []
    for node in nodes:
        kind = type(node).__name__
        name = getattr(node, "macroname", None)
        if kind == "LatexCharsNode":
            parts.append(node.chars)
        elif kind == "LatexGroupNode":
            parts.append(text_of(node.nodelist))
        elif kind == "LatexSpecialsNode":
            if node.specials_chars == "&":
                raise ValueError("a table (&)")
            parts.append(SPECIALS.get(node.specials_chars, node.specials_chars))
        elif name in SPACES:
            parts.append(" , " if name in ("\\", "newline") else " ")
        elif name in (*TEXTS, "underline") and arguments_of(node):
            parts.append(text_of(arguments_of(node)))
        else:
            # A formula, or its command outside of one, which is read as there
            parts.append(OPEN + formula(items_of([node])) + CLOSE)
            if kind == "LatexEnvironmentNode" or getattr(node, "displaytype", "") == "display":
                parts.append(" , ")  # a line of its own: a pause
    return "".join(parts)


def is_word(token):
    """Three small letters or more that are no product such as abc: a word, which has no business
    in a formula."""
    return (
        re.fullmatch("[A-Za-z]{3,}", token)
        and not token.isupper()
        and list(token) != sorted(set(token))
        and token not in FUNCTIONS
    )


def items_or_none(arguments):
    """What \\mathrm and \\text hold, as items where it is a function, a unit or letters of a
    formula: not words."""
    raw = "".join(argument.latex_verbatim() for argument in arguments).strip("{} ~")
    if raw in NAMED:
        return [(NAMED[raw], raw)]
    if raw in UNITS or raw == "in":
        return [("u", raw)]
    if match := re.fullmatch(rf"({'|'.join(UNITS)})\s*/\s*({PER})", raw):
        return [("u", match[1], match[2])]
    if re.fullmatch(r"[A-Z]{1,6}|[a-z]", raw):
        return [("v", letter) for letter in raw]
    return None


def peek(items, i):
    """The item at place i, or a blank of the kind "end" before the first and behind the last."""
    return items[i] if 0 <= i < len(items) else ("end", " ")


def mark(items, i):
    """The character at place i; a blank where there is something else, or nothing."""
    kind, value, *_ = peek(items, i)
    return value if kind == "c" else " "


def inner(items):
    """The items of a group that stands alone, or just the items."""
    return items[0][1] if len(items) == 1 and items[0][0] == "g" else items


def simple(items):
    """One number, letter or character: nothing a listener could take apart wrongly."""
    items = inner(items)
    if len(items) == 2 and mark(items, 0) == "-":
        return items[1][0] in "nv"
    return len(items) == 1 and items[0][0] in "nvc"


def digits(items):
    """The items of a fraction's half -> its digits where it is one whole number, else None."""
    items = inner(items)
    whole = len(items) == 1 and items[0][0] == "n" and items[0][1].replace(",", "").isdigit()
    return items[0][1] if whole else None


def capital(item):
    return item[0] == "v" and item[1].isupper()


def formula(items):  # noqa: C901
    """Items of a formula -> words. A fraction, a root or an exponent of several parts says where
    it ends."""
    items = list(items)
    for i, item in enumerate(items):
        # {x | ...}: the bar of a set
        if item == ("c", "|") and mark(items, i - 2) == "{" and items[i - 1][0] == "v":
            items[i] = ("c", "∣")
    items = conditions(items)
    if items.count(("c", "|")) % 2:
        raise ValueError("a single vertical bar")
    out, i, last, depth, opened = [], 0, "start", 0, False
    while i < len(items):
        at = i
        kind, value = items[at][:2]
        sign = mark(items, at)
        i += 1
        if sign == "|":
            opened = not opened
            if opened and mark(items, i) == "|":
                raise ValueError("vertical bars inside vertical bars")
            if opened and last == "atom":
                raise ValueError("a vertical bar behind a letter, which may mean divides")
            out.append("the absolute value of" if opened else ", end absolute value,")
            last = "open" if opened else "atom"
        elif sign in BRACKETS:
            if sign in "([{":
                depth += 1
                if last == "part":
                    out.append("times")
            elif sign in ")]}":
                depth -= 1
            out.append(BRACKETS[sign])
            last = "open" if sign in "([{⌊⌈⟨" else "closed"
            if last == "closed":
                i = scripts(items, i, out, base="closed")
        elif sign in "-−–":
            if i == len(items):
                raise ValueError("a minus sign with nothing after it")
            out.append("negative" if last in ("start", "open", "operator") else "minus")
            last = "operator"
        elif sign in ":∣":
            out.append(colon(items, at, depth) if sign == ":" else bar(items, at, depth))
            last = "operator"
        elif sign == "\\":
            if depth or mark(items, i) in "-−–":
                raise ValueError("a new line where a formula may go on")
            out.append(",")
            last = "open"
        elif sign in f"{PERCENT}°∘′'":
            if last == "start" or sign == "∘":
                raise ValueError(f"the symbol {sign}")
            out.append({PERCENT: "percent", "°": "degrees"}.get(sign, "prime"))
            last = "atom"
        elif sign == ".":
            if i < len(items):
                raise ValueError("a period inside a formula")
            out.append(".")
        elif sign == "/" and bare_fraction(items, at):
            out[-1] = fraction(items[at - 1][1], items[i][1])
            last = "part"
            i += 1
        elif sign in SYMBOLS:
            lone = items.count(("c", ",")) == 1 and not depth
            if sign == "," and lone and last == "number" and peek(items, i)[0] == "n":
                raise ValueError("a comma between two numbers, which may be a decimal one")
            if sign == "∼" and not shapes(items, at):
                raise ValueError("the symbol ∼ between other things than triangles")
            if sign == "/" and last == "operator":
                raise ValueError("a stroke with nothing before it")
            out.append(SYMBOLS[sign])
            last = "operator"
        elif sign in PREFIXES:
            out.append(PREFIXES[sign])
            last = "operator"
        elif kind == "t":
            out.append(value)
            goes_on = re.search(r"\b(?:if|and|or|for|when|where|is|mod|given)$", value)
            last = "open" if goes_on else "text"
        elif kind == "r":
            rows = [
                re.sub(r"[ ,]+if (?=if|when|for|otherwise|where)|[ ,]+(?=if )", " ", formula(row))
                for row in value
            ]
            out.append(", and ".join(row.strip(" ,.") for row in rows))
            last = "closed"
        elif kind == "u":
            if last in ("start", "operator", "open"):
                raise ValueError(f"the unit {value} without a number")
            below = items[at][2:]
            exponent = None
            if mark(items, i) == "^" and not below:
                exponent = exponent_of_unit(items, i)
                i += 2
            out.append(measure(out.pop(), value, exponent, *below))
            last = "text"
            # \mathrm{m} / \mathrm{s}^2
            if mark(items, i) == "/" and peek(items, i + 1)[0] == "u":
                out.append(f"per {UNITS.get(items[i + 1][1], 'inch')}")
                i += 2
                if mark(items, i) == "^":
                    out.append({"2": "squared", "3": "cubed"}[exponent_of_unit(items, i)])
                    i += 2
        else:
            if kind == "n" and "," in value and depth:
                raise ValueError(f"the comma in {value}, which may separate two numbers")
            i, last = atom(items, at, out, last)
    return " ".join(" ".join(out).split())


def conditions(items):
    """P(A | B) and E[X | Y]: the bar is "given". Where both sides are a single letter, "P of A
    given B" is said, else the parentheses as well."""
    done, i = [], 0
    while i < len(items):
        letter = items[i]
        done.append(letter)
        i += 1
        if (
            letter not in (("v", "P"), ("v", "E"))
            or mark(items, i) not in "(["
            or len(done) > 1
            and done[-2][0] == "v"
        ):
            continue
        depth, end, bars = 0, i, []
        while end < len(items):
            depth += (mark(items, end) in "([{") - (mark(items, end) in ")]}")
            if not depth:
                break
            if mark(items, end) in "|∣":
                bars.append(end)
            end += 1
        if end == len(items) or len(bars) != 1 or bars[0] in (i + 1, end - 1):
            # None at all, or |X| inside: for the rules of bars
            continue
        left, right = items[i + 1 : bars[0]], items[bars[0] + 1 : end]
        named = lambda side: any(
            capital(side[j]) or mark(side, j) in "=<>≤≥" for j in range(len(side))
        )
        if not (named(left) or left[0][0] != "n" and named(right)):
            raise ValueError("a bar that may mean divides or given")  # P(3 | n)
        after = peek(items, end + 1)
        ends = after[0] in ("c", "end") and after[1] not in "^([{'!/"
        if ends and simple(left) and simple(right):
            done[-1] = ("t", f"{LETTER}{letter[1]} of {formula(left)} given {formula(right)}")
            i = end + 1
        else:
            done += [*items[i : bars[0]], ("t", "given")]
            i = bars[0] + 1
    return done


def bar(items, i, depth):
    """What \\mid says: in a set "such that", once; between numbers or small letters at the top
    "divides"; elsewhere it may be a condition."""
    marks = "".join(mark(items, j) for j in range(i))
    _, brace, since = marks.rpartition("{")
    if depth and brace and "}" not in since:
        if "∣" in since or ":" in since:
            raise ValueError("two bars in a set, one of which may mean divides")
        return "such that"
    sides = peek(items, i - 1), peek(items, i + 1)
    if depth or ("end", " ") in sides or all(map(capital, sides)):
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
    if peek(items, i - 1)[0] not in "nv" or peek(items, i + 1)[0] not in "nv":
        raise ValueError("a colon that is no ratio")
    return "to"


def bare_fraction(items, i):
    """Stands the stroke at i between whole numbers that are a fraction of their own: no exponent,
    letter or stroke next to them, no decimals?"""
    sides = peek(items, i - 1), peek(items, i + 1)
    if not all(kind == "n" and value.isdigit() for kind, value, *_ in sides):
        return False
    before, after = peek(items, i - 2), peek(items, i + 2)
    return (
        before[0] in ("c", "end")
        and before[1] not in "^_/!)]}"
        and after[0] in ("c", "u", "t", "end")
        and after[1] not in ("^", "_", "/", "!")
    )


def shapes(items, i):
    """Stands ∼ between the names of two triangles or polygons? X ∼ N(0,1) is a distribution, f ∼ g
    a limit, a ∼ b any relation."""
    after = [item for item in items[i + 1 :] if mark([item], 0) not in "△□"]
    return (
        sum(map(capital, items[:i])) > 2
        and sum(map(capital, after)) > 2
        and capital(after[0])
        and mark(after, 1) not in "(["
    )


def exponent_of_unit(items, i):
    """The exponent of the unit whose ^ stands at i."""
    exponent = digits([peek(items, i + 1)])
    if exponent not in ("2", "3"):
        raise ValueError("a unit with an exponent other than two or three")
    return exponent


def atom(items, i, out, last):
    """Append the words of what stands at i, with its exponents and indices -> (where to go on,
    what it was)."""
    kind, value, *rest = items[i]
    base, i = kind, i + 1
    joined = last in ("number", "atom", "closed", "part")  # a factor of what came before
    if kind == "n":
        if joined:
            raise ValueError(f"the number {value} right behind another part of a formula")
        if mark(items, i) == "." and i + 1 < len(items):
            raise ValueError(f"the number {value}.")
        words = number(value)
        if peek(items, i)[:2] == ("m", "frac") and all(map(digits, items[i][2])):
            words = f"{words} and {fraction(*map(digits, items[i][2]))}"
            i, base = i + 1, "part"
    elif kind == "v":
        words = LETTER + value
        called = mark(items, i) == "(" and mark(items, i + 2) == ")"
        if value in "fghFGHPQ" and called and items[i + 1][0] in "nv":
            words = f"{words} of {formula([items[i + 1]])}"
            i, base = i + 3, "g"
    elif kind == "f":
        words, before = FUNCTIONS[value], len(out)
        out.append(words)
        if items[i : i + 2] == [("c", "^"), ("g", [("c", "-"), ("n", "1")])]:
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
    elif value in ATOMS:
        words = ATOMS[value]
    elif value.isalpha() and unicodedata.name(value, "").startswith("GREEK"):
        name = unicodedata.name(value).removesuffix(" SYMBOL").split()
        words = name[-1].lower()
        if "CAPITAL" in name:
            words = f"capital {words}"
    elif value == "√":
        if peek(items, i)[0] not in "nv":
            raise ValueError("a root sign with nothing certain below it")
        words = f"the square root of {formula([items[i]])}"
        i, base = i + 1, "part"
    else:
        raise ValueError(f"the symbol {value}")
    if joined and "part" in (last, base):
        out.append("times")
    out.append(words)
    i = scripts(items, i, out, base=base, number=value if kind == "n" else None)
    return i, {"n": "number", "part": "part"}.get(base, "atom")


def structure(name, arguments):
    """Fractions, roots and accents -> (words, kind)."""
    if name == "mathbb":
        letter = BLACKBOARD.get(formula(arguments[0]).strip(LETTER))
        if letter is None:
            raise ValueError("a blackboard letter that is no set of numbers")
        return ATOMS[letter], "v"
    if name == "pmod":
        return f"modulo {formula(arguments[0])}", "v"
    if name in ("frac", "binom"):
        if len(arguments) != 2 or not all(map(inner, arguments)):
            raise ValueError(f"a \\{name} with an empty half")
        above, below = map(inner, arguments)
        if (
            name == "frac"
            and above[0] == ("v", "d") == below[0]
            and (len(above) == 1 or mark(above, 1) == "^")
            and len(below) > 1
        ):
            raise ValueError("a derivative")
        if name == "frac" and digits(above) and digits(below):
            return fraction(digits(above), digits(below)), "part"
        words = f"{formula(above)} {'over' if name == 'frac' else 'choose'} {formula(below)}"
        if simple(above) and simple(below):
            return words, "part"
        whole = "fraction" if name == "frac" else "binomial"
        return f"the {whole} {words}, end {whole},", "part"
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
    accent = ACCENTS[name]
    parts = [words, accent] if accent in ("hat", "tilde") else [accent, words]
    return " ".join(parts).strip(), "g"


def scripts(items, i, out, *, base, number=None):
    """Exponents, indices, primes and factorials behind an atom. -> where to go on"""
    while mark(items, i) in "'′!_^":
        sign = mark(items, i)
        i += 1
        if sign in "'′":
            out.append("prime")
        elif sign == "!" and mark(items, i) == "!":
            out.append("double factorial")
            i += 1
        elif sign == "!":
            out.append("factorial")
        else:
            if i == len(items):
                raise ValueError(f"a {sign} with nothing behind it")
            # LaTeX raises the first digit alone, an author may have meant both
            if items[i][0] == "n" and len(items[i][1]) > 1:
                raise ValueError(f"{sign}{items[i][1]} without braces")
            script = inner([items[i]])
            if not script:
                raise ValueError(f"an empty {sign}")
            i += 1
            if sign == "^":
                i = power(items, i, out, script, number, base)
                continue
            # C^2_n
            raised = out[-1].startswith(("squared", "cubed", "to the "))
            if raised and out[-2:-1] and out[-2] in COUNTED:
                raise ValueError("an exponent and an index, which may be a number of combinations")
            words = formula(script)
            if base in ("n", "function"):
                out.append(f"base {words}")
            else:
                several = len(script) > 1 and not simple(script)
                out.append(f"sub {words}, end sub," if several else f"sub {words}")
    return i


def power(items, i, out, script, number, base):
    alone = mark(script, 0) if len(script) == 1 else " "
    if alone in "∘°":
        out.append("degree" if number == "1" else "degrees")
        scale = peek(items, i)
        if scale in (("v", "C"), ("v", "F")) and peek(items, i + 1)[0] != "v":
            out.append("Celsius" if scale[1] == "C" else "Fahrenheit")
            i += 1
    elif mark(script, 0) in "'′":
        out.append("prime " * len(script))
    elif out[-1].startswith("sub ") and out[-2] in COUNTED:
        raise ValueError("an index and an exponent, which may be a number of combinations")
    elif digits(script) in ("2", "3"):
        out.append("squared" if digits(script) == "2" else "cubed")
    elif (
        script[-1][0] == "t"
        and script[-1][1] in ("th", "st", "nd", "rd")
        or script in ([("v", "t"), ("v", "h")], [("v", "s"), ("v", "t")])
    ):
        nth = ordinal(number) if number and number.isdigit() else NTH.get(out[-1][1:])
        if len(out) > 1 or not nth:  # n+1^{th}: of the sum, or of the one?
            raise ValueError("an ordinal of several parts")
        out[-1] = nth
    elif alone in "+-*⊥" or script == [("v", "T")]:
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
    while mark(items, i) in "_^" and mark(items, i) not in limits and i + 1 < len(items):
        limits[mark(items, i)] = formula(inner([items[i + 1]]))
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
    sentence = r"\n\s*\n|[.!?]\s+[A-Z]|(?<![A-Za-z])(?:is|of|or|to|in|he|at|on)\s"
    return re.search(sentence, bare) or any(map(is_word, re.findall(r"[A-Za-z]+", bare)))


def raised_unit(match):
    """cm$^2$: behind a number or a formula a unit like cm^2, else words."""
    before, space, unit, exponent = match.groups()
    if unit == "in":
        raise ValueError("an exponent on its own")
    if before:
        return f"{before}{space}{unit}^{exponent}"
    return space + measure("", unit, exponent)


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
    text = re.sub(
        rf"(\d\$?|\$|[)}}])?(\s?)(?<![A-Za-z])({'|'.join(LENGTHS)}|in)"
        r"\s?\$\s?\^\s?\{?([23])\}?\s?\$",
        raised_unit,
        text,
    )
    text = re.sub(r"\\(?:left|right)\s*\.", "", text).replace(r"\$", DOLLAR)
    text = re.sub(r"\\?%", PERCENT, text)
    text = re.sub(r"\\?#(?=\s?\d)", HASH, text).replace(r"\&", " and ")
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ |\\;)(?=\d{3}(?!\d))", ",", text)
    done, i = [], 0
    outside = re.compile(r"\\\[.*?\\\]|\\\(.*?\\\)|[^$]", re.DOTALL)
    while i < len(text):
        if match := outside.match(text, i):
            done.append(match[0])
            i = match.end()
            continue
        sign = "$$" if text.startswith("$$", i) else "$"
        end = text.find(sign, i + len(sign))
        inside = text[i + len(sign) : end] if end > 0 else ""
        pairs = inside and not inside[-1].isspace() and not text[end + 1 : end + 2].isdigit()
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


def before_thing(match):
    """A $20 bill is "a twenty dollar bill", but it costs "twenty dollars"."""
    return bool(re.match(THING, match.string[match.end() :]))


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
    scales = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
    value = lambda amount, scale: float(amount.replace(",", "")) * scales.get(scale, 1)
    above = "thousand" if thousand else above
    if minus or value(low, (scale or "").strip()) >= value(high, above):
        if space and not minus and again:
            return match[0]
        raise ValueError(f"{match[0]}, which may be a difference")
    cents = "." in low + high and not scale and not above
    first = money(sign, low) if cents else f"{number(low)}{scale or ''}"
    return f"{first} to {money(sign, high, above, adjective=before_thing(match))}"


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
    whole, above, below, *unit = match.groups()
    part = fraction(above, below)
    # 12 1/2-lb bags: how many bags?
    if whole and "-" in match[0][match.start(3) - match.start() + len(below) :]:
        raise ValueError(f"{match[0]}, which may be a number of things")
    if not whole and int(above) <= int(below) and "over" not in part:
        return part + measure("one", *unit).removeprefix("one")
    return measure(f"{number(whole)} and {part}" if whole else part, *unit)


def squares(match):
    """100 sq. ft, per sq ft, 5 cu. yd, 3 fl oz, a 100-sq-ft room."""
    before, value, joint, kind, unit = match.groups()
    unit = {"in": "inch", "feet": "foot", "inches": "inch"}.get(unit, unit.removesuffix("s"))
    unit = UNITS.get(unit, unit)
    if (kind == "fl") != (unit == "ounce"):
        raise ValueError(f"the unit {match[0]}")
    if not before and joint != "-" and value != "1":
        unit = plural(unit)
    words = f"{ {'sq': 'square', 'cu': 'cubic', 'fl': 'fluid'}[kind]} {unit}"
    if before:
        return f"{before} {words}"
    return f"{number(value)}{joint}{words.replace(' ', joint)}" if value else words


def clock(match):
    hour, minute, half = int(match[1]), int(match[2]), match[3]
    if re.search(RATIO, match.string) and not half:
        return match[0]
    before = r"\b(?:at|from|until|till|by|before|after) $"
    # "It was 8:00", while 8:30 may be a score or a ratio
    if not minute and hour:
        before += r"|\b[Ii]t(?:'s| is| was) (?:now |already |only |about |almost |exactly )?$"
    known = half or re.search(before, match.string[: match.start()])
    if not known or hour > 23 or minute > 59:
        raise ValueError(f"{match[0].strip()}, which may be a time or a ratio")
    words = in_words(hour)
    if minute:
        words += f" {'oh ' * (minute < 10)}{in_words(minute)}"
    if half:
        return f"{words} {half_of_day(half)}"
    return words if minute else f"{words} o'clock"


def half_of_day(half):
    return "eh M" if half[0] in "aA" else "P M"


def refuse(what):
    raise ValueError(what)


def unclear(why):
    """For a rule: what it finds is refused."""
    return lambda match: refuse(f"{match[0].strip()}, {why}")


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
RAISED = (
    rf"(?<![\w.])({'|'.join(unit for unit in LENGTHS if len(unit) == 2)})"
    r"(?:\^\{?([23])\}?|([²³]))(?!\w)"
)
RULES = [  # from the special to the general; each sees what those before it left
    (r"\*\*(.+?)\*\*", r"\1"),
    (r"(?:\\?_\s?){2,}|\(\s+\)", " blank "),
    (
        rf"({N}) ?(?:°|degrees?) ?([CF])\b",
        lambda m: f"{m[1]} degrees {'Celsius' if m[2] == 'C' else 'Fahrenheit'}",
    ),
    (rf"({N})°", r"\1 degrees"),
    (rf"({PRICE})[kK]\b", r"\1 thousand"),
    (rf"({PRICE})M\b", r"\1 million"),
    (
        rf"(-?)([{DOLLAR}€£])\s?({NUMBER})( million| thousand)?(\s?)[-–]\5(\2?)\s?"
        rf"({NUMBER})(?!\d|,\d|\.\d)(k\b)?(?:\s?{SCALE}\b)?",
        money_between,
    ),
    (r"(?<![\d/.,])(\d+)/(\d+)(?:rds?|ths?)\b", lambda m: f"{m[1]}/{m[2]}"),
    (r"(?<=[\da-z])/(?=(?:sq|cu|fl)\b)", " per "),
    (rf"{N}\s?[xX]\s?[{DOLLAR}€£]", unclear("which may be a product")),
    (rf"({N})(?:(?:\s[xX]\s|[xX])(?:{N}))+", dimensions),
    (
        rf"({N}\s?(?:{UNIT}\.?|feet|foot|inch|inches|yards?|meters?|centimeters?))"
        rf"\s?[xX]\s?(?={N})",
        r"\1 by ",
    ),
    (rf"({N})[xX](?= as\b)", r"\1 times"),
    (
        rf"({N})[xX](?= (?:more|less|fewer|faster|larger|bigger|longer|the)\b)",
        unclear("which may be times or a variable"),
    ),
    (rf"(?:({N})(?: |-| and ))?(?<![\d/.,])(\d+)/(\d+)[ -]?{UNIT}{POWER}", parts_of_unit),
    (
        rf"(?<![=+*/<>^×÷-])(?<![=+*/<>^×÷-] )({N})[-–]({N})"
        rf"(?=[ -]?(?:{UNIT}|sq|cu|fl)(?![A-Za-z]))",
        between,
    ),
    (
        rf"(?:\d|\b[A-Za-z]) - {N}\s?{UNIT}(?![A-Za-z])",
        unclear("which may be a difference or a range"),
    ),
    (
        rf"(?:\b(per|a|each) |({N})([ -]))?\b(sq|cu|fl)\b\.?[ -]?"
        rf"(ft|in|yd|mi|cm|m|km|oz|feet|foot|inch|inches|yards?|miles?|meters?)\b{STOP}",
        squares,
    ),
    # 5-m may be a difference
    (
        rf"({N})-(?=[a-zA-Z]{{2}}|L|[mhgsl] "
        rf"(?!is|are|and|or|has|was|for|then|equals)[a-z]{{3}})({UNIT[1:-1]}|in)\b"
        rf"(?!['^/]|-(?!by|long|wide|tall|high|deep)){STOP}",
        lambda m: f"{number(m[1])}-{UNITS.get(m[2], 'inch').replace(' ', '-')}",
    ),
    # "5 in" is left alone
    (rf"{N}s(?![A-Za-z0-9'^])", unclear("which may be seconds or a plural")),
    (rf"({N})\s?{UNIT}{POWER}", lambda m: measure(number(m[1]), *m.groups()[1:])),
    (rf"(?<=\bper ){RAISED}", lambda m: measure("one", m[1], m[2] or m[3]).removeprefix("one ")),
    (RAISED, lambda m: measure("", m[1], m[2] or m[3])),
    (rf"{CLOSE}\s?{UNIT}{POWER}", lambda m: CLOSE + measure("", *m.groups())),
    (
        rf"(?<![\w.,{LETTER}])[{DOLLAR}√-]*{TERM}"
        rf"(?:\s*[+*=<>^×÷≤≥≠·−/-]\s*[{DOLLAR}√-]*{TERM})+(?!\w)",
        plain_formula,
    ),
    (
        rf"(?<=\d)-\s?[{DOLLAR}€£]|{PRICE}\s-(?=[{DOLLAR}€£])",
        unclear("which may be a difference or a debt"),
    ),
    (
        rf"(?<![\w.,){CLOSE}])-(?=[{DOLLAR}€£]\s?\.?\d)|(?<![\w.,)])[{DOLLAR}]-(?=\.?\d)",
        lambda m: f"negative {m[0].strip('-')}",
    ),
    (MONEY, lambda m: money(*m.groups(), adjective=before_thing(m))),
    # The period of "p.m." ends the sentence as well
    (r"(?<=[AaPp]\.[Mm])\.(?=\s+[A-Z]|\s*$)", ".."),
    (r"(?<![\d:])(\d{1,2}):(\d{2})(?![\d:])(?:\s?([aApP](?:\.[mM]\.|[mM]\b)))?", clock),
    (
        r"\b(\d{1,2}) ?([aApP])(?:\.[mM]\.|[mM]\b)",
        lambda m: f"{in_words(int(m[1]))} {half_of_day(m[2])}",
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
        rf"\b({MONTHS}) (\d{{1,2}})(?:st|nd|rd|th)?\b(?:(,?) (\d{{4}})\b)?",
        lambda m: f"{m[1]} {ordinal(m[2])}" + (f", {year(m[4])}" if m[4] else ""),
    ),
    (
        rf"\b({MONTHS}),? (1[1-9]\d\d|20\d\d)\b",
        lambda m: f"{m[1]} {year(m[2])}",
    ),
    (
        r"\b([Yy]ears?|[Ii]n|[Ss]ince|[Bb]y|[Uu]ntil) (1[5-9]\d\d|20\d\d)"
        r"(?=[,.;?!)]|$| (?:and|was|were|is|the|to|he|she|they|but|than)\b)",
        lambda m: f"{m[1]} {year(m[2])}",
    ),
    (rf"{OPEN}{LETTER}([{''.join(NTH)}]){CLOSE}\s?-?th\b", lambda m: OPEN + NTH[m[1]] + CLOSE),
    (
        rf"(?:{CLOSE}|[)²³])\s?-?(?:th|st|nd|rd)\b|(?:[+^*]|\b[A-Za-z]\s?-)\s?\d+(?:th|st|nd|rd)\b",
        lambda m: refuse("an ordinal of several parts"),
    ),
    (r"\b(\d{1,3}(?:,\d{3})*|\d+)(?:st|nd|rd|th)\b", lambda m: ordinal(m[1])),
    (rf"{HASH}\s?", "number "),
    (
        r"\b(?:sq|cu|fl|sqft)\b|\d[ -]?(?:pts?|doz|ea)\b"
        rf"|\d-(?:{'|'.join(unit for unit in UNITS if len(unit) > 1)})\b",
        lambda m: refuse(f"the unit {m[0]}"),
    ),
    (r"(^|[a-z,(] ?)No\. ?(?=\d)", r"\1number "),
    (r"\b[Nn]os?\. ?(?=\d)", unclear("which may be a number or the answer no")),
    (
        rf"({N})[ -](?:and )?(\d+)/(\d+)(?![\d/])",
        lambda m: f"{number(m[1])} and {fraction(m[2], m[3])}",
    ),
    (r"(?<![\d/.,])(\d+)/(\d+)(?![\d/]|[.,]\d)", lambda m: fraction(m[1], m[2])),
    (rf"({N})[-–](?={DOLLAR}?)({N})(?![-–]\d)", between),
    (rf"(?<![\w{CLOSE}]){DOLLAR}?[-−]({N})", r"negative \1"),
    (rf"(?<=\d|{CLOSE})\s?{PERCENT}", " percent"),
    (r"(\d)\s?¢", r"\1 cents"),
    (r"\d!(?!\S*[\"')])", unclear("which may be a factorial")),
    (rf"({N})(?=([A-Za-z])?)", lambda m: number(m[1]) + " " * bool(m[2])),
    (r"\band/or\b", "and or"),
    (r"\b(he|his|him|she|her|hers)/(she|her|hers|he|his|him)\b", r"\1 or \2"),
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
    (r"\[", "("),
    (r"\]", ")"),
]


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
        latin = character.isalpha() and unicodedata.name(character, "").startswith("LATIN")
        if not latin and character not in " .,;:?!'\"()-":
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
