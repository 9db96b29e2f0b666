"""What is said of what is written: sentences as in GSM8K and NuminaMath, word for word, and what
must be refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare.verbalise import verbalise

SAID = [
    # numbers and money
    ("He buys a house for $80,000.", "He buys a house for eighty thousand dollars."),
    (
        "She earns $12 an hour, or $12.50 on Sundays.",
        "She earns twelve dollars an hour, or twelve dollars and fifty cents on Sundays.",
    ),
    ("It costs $1 or $0.75.", "It costs one dollar or seventy-five cents."),
    ("A $20 bill", "A twenty dollar bill"),
    ("a $5-per-hour job at $5/hour", "a five dollar-per-hour job at five dollars per hour"),
    ("for $1.5 each", "for one point five dollars each"),
    ("worth $2.5 million", "worth two point five million dollars"),
    (r"It costs \$5 or $\$ 5.50$.", "It costs five dollars or five dollars and fifty cents."),
    ("José pays €5 and £1.01", "José pays five euros and one pound and one penny"),
    (
        "1,234 of 1234567",
        (
            "one thousand two hundred and thirty-four of one million two hundred and thirty-four"
            " thousand five hundred and sixty-seven"
        ),
    ),
    ("$10{,}000$ people", "ten thousand people"),
    ("3.05 is 3", "three point zero five is three"),
    ("-5 and 0", "negative five and zero"),
    # percent, fractions, ordinals, ranges
    (
        "150% more, $20\\%$ less, $x\\%$ off",
        "one hundred and fifty percent more, twenty percent less, x percent off",
    ),
    ("1/2 of 3/4 of 1/20", "one half of three quarters of one twentieth"),
    ("2 1/2 cups", "two and one half cups"),
    (r"$3\frac{1}{2}$ cups", "three and one half cups"),
    ("31/73 of them", "thirty-one over seventy-three of them"),
    ("the 1st, 2nd and 23rd", "the first, second and twenty-third"),
    (r"the $n$th and $5^{\text{th}}$ term", "the enth and fifth term"),
    ("a 3-page letter, $5$-digit", "a three-page letter, five-digit"),
    ("5-10 or 20–30 days", "five to ten or twenty to thirty days"),
    ("room #5", "room number five"),
    ("an 8x10 or 4 x 6 photo", "an eight by ten or four by six photo"),
    # units, times, dates
    ("5 km in 30 min at 10 km/h", "five kilometers in thirty minutes at ten kilometers per hour"),
    (
        "1 cm, 15 cm^2, 3m, 6 ft",
        "one centimeter, fifteen square centimeters, three meters, six feet",
    ),
    (
        r"$12 \mathrm{~km/h}$ and $5 \text{ cm}^2$",
        "twelve kilometers per hour and five square centimeters",
    ),
    (r"$9.8 \mathrm{~m} / \mathrm{s}^{2}$", "nine point eight meters per second squared"),
    (r"$r$ cm", "r centimeters"),
    (
        "at 60 mph, -5°C and 10 °F",
        "at sixty miles per hour, negative five degrees Celsius and ten degrees Fahrenheit",
    ),
    ("from 9:30 a.m. to 11:05 AM", "from nine thirty eh M to eleven oh five eh M"),
    ("It ends at 4 p.m. Then", "It ends at four P M. Then"),
    (
        "On January 5, 2019, in 1995, and in 1500 shops",
        (
            "On January fifth, twenty nineteen, in nineteen ninety-five, and in one thousand five"
            " hundred shops"
        ),
    ),
    ("in the ratio 3:5", "in the ratio three to five"),
    # formulas
    (
        r"If $\frac{3x+1}{2} \le 5$, what is $x^2$?",
        (
            "If the fraction three x plus one over two, end fraction, is less than or equal to"
            " five, what is x squared?"
        ),
    ),
    (r"$\frac12$, $\dfrac{2}{3}$, $\frac{a}{b}$", "one half, two thirds, eh over b"),
    (
        r"$\sqrt{2}$ and $\sqrt{x+1}$ and $\sqrt[3]{8}$",
        (
            "the square root of two and the square root of x plus one, end root, and the cube root"
            " of eight"
        ),
    ),
    (r"$x^3 + x^n - x^{n+1}$", "x cubed plus x to the power of n minus x to the n plus one power"),
    (r"$10^{-3}$, $2^{10}$", "ten to the power of negative three, two to the power of ten"),
    (r"$a_n$, $a_{n+1}$, $x_{12}$", "eh sub n, eh sub n plus one, end sub, x sub twelve"),
    (r"$2 \times 3 \cdot 4 \div 5$", "two times three times four divided by five"),
    (
        r"$a \ne b$, $a \ge b$, $a < b > c$",
        (
            "eh is not equal to b, eh is greater than or equal to b, eh is less than b is greater"
            " than c"
        ),
    ),
    (r"$2\pi r$, $\alpha$, $\xi$", "two pi r, alpha, zai"),
    (
        r"$\triangle ABC$ with $\angle B = 90^\circ$",
        "triangle eh B C with angle B equals ninety degrees",
    ),
    (r"$A$ and $a$", "capital eh and eh"),
    (r"\[\sum_{k=1}^{n} k^2.\]", "the sum from k equals one to n of k squared."),
    (
        r"$\lim_{x \to 0} \frac{\sin x}{x}$",
        "the limit as x approaches zero of the fraction sine of x over x, end fraction",
    ),
    (r"$\int_0^1 x^2 \, dx$", "the integral from zero to one of x squared d x"),
    (
        r"$\sin^2 x + \cos^2 x$, $\sin^{-1} x$, $\log_2 8$",
        "sine squared of x plus cosine squared of x, inverse sine of x, log base two of eight",
    ),
    (
        r"$2|x|$ and $-5$ and $\text{if } -x$",
        "two the absolute value of x, end absolute value, and negative five and if negative x",
    ),
    (
        r"$A=\{x|x^2=1\}$ and $l: y = 2x$",
        "eh equals open brace x such that x squared equals one close brace and l, y equals two x",
    ),
    (r"$|x-3| = 5$", "the absolute value of x minus three, end absolute value, equals five"),
    (r"$f(x) = f(x+1)$", "f of x equals f open parenthesis x plus one close parenthesis"),
    (
        r"$(x+1)(x-2)$",
        (
            "open parenthesis x plus one close parenthesis open parenthesis x minus two close"
            " parenthesis"
        ),
    ),
    (r"$(-3, 4)$", "open parenthesis negative three, four close parenthesis"),
    (
        r"$\{x \mid x > 0\}$, $3 \mid n$",
        "open brace x such that x is greater than zero close brace, three divides n",
    ),
    (r"$n!$ and $\binom{n}{k}$", "n factorial and n choose k"),
    (r"$a \equiv b \pmod{7}$", "eh is congruent to b modulo seven"),
    (r"$x \in \mathbb{R}$", "x in the real numbers"),
    (r"$AB \parallel CD \perp EF$", "eh B is parallel to C D is perpendicular to E F"),
    (r"$\overrightarrow{AB}$ and $\overline{CD}$", "vector eh B and overline C D"),
    (r"$1, 2, \ldots, n$", "one, two, dot dot dot, n"),
    (r"$1/2$, $x/y$, $AB:BC = 2:3$", "one half, x over y, eh B to B C equals two to three"),
    (r"$\frac{1}{2}(a+b)h$", "one half times open parenthesis eh plus b close parenthesis h"),
    (
        r"$f(x) = \begin{cases} x & x > 0 \\ -x & \text{if } x \le 0 \end{cases}$",
        (
            "f of x equals x if x is greater than zero, and negative x if x is less than or equal"
            " to zero"
        ),
    ),
    (
        r"$\left\{\begin{array}{l} x+y=1 \\ x-y=5 \end{array}\right.$",
        "x plus y equals one, and x minus y equals five",
    ),
    (r"$\left(\frac{1}{2}\right)^2$", "open parenthesis one half close parenthesis squared"),
    (r"$\text{the area}$, \textbf{bold}, $x$-axis", "the area, bold, x-axis"),
    (r"fill in $\underline{\quad}$ or ____", "fill in blank or blank"),
    (
        r"$$x = \frac{-b \pm \sqrt{b^2-4ac}}{2a}$$",
        (
            "x equals the fraction negative b plus or minus the square root of b squared minus four"
            " eh c, end root, over two eh, end fraction"
        ),
    ),
    # ranges and debts, sizes, units as GSM8K writes them
    ("$5-$8 each, $8-10 per hour", "five to eight dollars each, eight to ten dollars per hour"),
    (
        "$3,000-$4,000, $5–$8 tickets",
        "three thousand to four thousand dollars, five to eight dollar tickets",
    ),
    (
        "$5.50-$6.75 or $5-10 million",
        (
            "five dollars and fifty cents to six dollars and seventy-five cents or five to ten"
            " million dollars"
        ),
    ),
    (
        "$10-$5=$5 or $5 - $8 each",
        "ten dollars minus five dollars equals five dollars or five to eight dollars each",
    ),
    (
        "$50k-$60k, $1.5k or $70M",
        (
            "fifty thousand to sixty thousand dollars, one point five thousand dollars or seventy"
            " million dollars"
        ),
    ),
    (
        "-$5 or (−$5.50) or -$70k",
        (
            "negative five dollars or (negative five dollars and fifty cents) or negative seventy"
            " thousand dollars"
        ),
    ),
    ("Hat - $5", "Hat, five dollars"),
    (
        "$15/hr, $5/lb, $3/sq. ft",
        "fifteen dollars per hour, five dollars per pound, three dollars per square foot",
    ),
    (
        "a 10-lb bag, 3-kg, 2-L bottle, 8-oz, 12-in. pizza",
        "a ten-pound bag, three-kilogram, two-liter bottle, eight-ounce, twelve-inch pizza",
    ),
    ("a 10-ft-by-12-ft room", "a ten-foot-by-twelve-foot room"),
    ("a 3-in-1 tool at a 60-mph limit", "a three-in-one tool at a sixty-mile-per-hour limit"),
    (
        "100 sq. ft of it, 9 sq ft, 5 cu. ft. The",
        "one hundred square feet of it, nine square feet, five cubic feet. The",
    ),
    (
        "1 sq. ft, $2 per sq ft, 3 fl. oz. of",
        "one square foot, two dollars per square foot, three fluid ounces of",
    ),
    (
        "30 mpg, 1 gal, 2 tsp, 3 tbsp, 4 qt",
        "thirty miles per gallon, one gallon, two teaspoons, three tablespoons, four quarts",
    ),
    ("No. 5 and bus No. 7", "number five and bus number seven"),
    ("5 ft. long, 5-10 km", "five feet long, five to ten kilometers"),
    ("3x as many, 3x + 2", "three times as many, three x plus two"),
    ("a 5 x 3 rug, 2 x 3 x 4 feet", "a five by three rug, two by three by four feet"),
    ("5 ft x 3 ft", "five feet by three feet"),
    (r"fill \_\_\_\_ or $\_\_\_$", "fill blank or blank"),
    (
        "1/2 lb, 3 1/2 lbs, 3/4 km, 3/2 km/h",
        (
            "one half pound, three and one half pounds, three quarters kilometer, three halves"
            " kilometers per hour"
        ),
    ),
    (
        r"5 cm$^2$, in cm$^2$, $5$ m$^{3}$, in cm²",
        "five square centimeters, in square centimeters, five cubic meters, in square centimeters",
    ),
    ("It was 8:00 then", "It was eight o'clock then"),
    ("2/3rds of 3/4ths, 5 2/3rds", "two thirds of three quarters, five and two thirds"),
    ("the 4th-5th and mid-19th", "the fourth-fifth and mid-nineteenth"),
    ("on 1/2 of it, by 1/2, after 1/2 hour", "on one half of it, by one half, after one half hour"),
    # what a letter, a bar or a new line means
    (r"$x_1^2$ and $AC^2$", "x sub one squared and eh C squared"),
    (r"$P(A \mid B)=0.3$, $E[X|Y]$", "P of eh given B equals zero point three, E of X given Y"),
    (
        r"$P(A \mid B \cap C)$, $P(A|B)^2$",
        (
            "P open parenthesis eh given B intersection C close parenthesis, P open parenthesis eh"
            " given B close parenthesis squared"
        ),
    ),
    (
        r"$n \mid 2^n + 1$ and $P(|X|>2)$",
        (
            "n divides two to the power of n plus one and P open parenthesis the absolute value of"
            " X, end absolute value, is greater than two close parenthesis"
        ),
    ),
    (r"$$2x+3y=7 \\ x-y=1$$", "two x plus three y equals seven, x minus y equals one"),
    (r"$$2x+3y=7 \\[2pt] 2x-y=1$$", "two x plus three y equals seven, two x minus y equals one"),
    (r"(A) one \\ (B) two", "(eh) one, (B) two"),
    (
        r"$\triangle ABC \sim \triangle A'B'C'$",
        "triangle eh B C is similar to triangle eh prime B prime C prime",
    ),
    (r"$\vec a\cdot\vec b$", "vector eh times vector b"),
    # formulas without dollar signs, and money beside formulas
    (
        "If x^2 + 3x = 10, then 5 + 3 = 8.",
        "If x squared plus three x equals ten, then five plus three equals eight.",
    ),
    ("10^6 and a*b=12", "ten to the power of six and eh times b equals twelve"),
    ("It costs $5, where $n$ is $2$.", "It costs five dollars, where n is two."),
    ("Point A is on it, and A is far. A dog", "Point eh is on it, and eh is far. A dog"),
]


@pytest.mark.parametrize("written, said", SAID, ids=[written[:40] for written, _ in SAID])
def test_what_is_said(written, said):
    assert verbalise(written) == said


@pytest.mark.parametrize(
    "written, why",
    [
        ("[asy] draw((0,0)--(1,1)); [/asy]", "a diagram"),
        ("| a | b |\n|---|---|", "a table"),
        (r"$\begin{pmatrix}1&2\\3&4\end{pmatrix}$", "environment pmatrix"),
        (r"\begin{tabular}{cc} 1 & 2 \end{tabular}", "a table"),
        ("See https://a.b/c.png", "a web address"),
        ("![](x.png)", "an image"),
        ("小明有5个苹果", "script"),
        (r"What is $\foo{x}$?", r"\\foo"),
        (r"$\frac{1}{2$", "."),
        ("cost $x and more", "dollar signs"),
        ("on 12/25/2019", "a date in digits"),
        ("call 555-1234", "telephone"),
        ("a score of 10-5", "a difference or a score"),
        ("at room 007", "begins with a zero"),
        ("3:10 is it", "a time or a ratio"),
        ("$(1,234)$", "the comma in 1,234"),
        ("$x = 3,5$", "a comma between two numbers"),
        ("$x2$", "right behind"),
        ("$x^10$", "without braces"),
        ("$C_n^k$", "combinations"),
        ("$C_{n}^{2}$", "combinations"),
        ("$A_5^3$", "combinations"),
        ("$P_6^2$", "combinations"),
        ("$C^2_n$", "combinations"),
        (r"$P(3 \mid n)$", "divides or given"),
        (r"$P(3|n)$", "divides or given"),
        (r"$A \mid B$", "divides or given"),
        (r"$f(x \mid y)$", "divides or given"),
        (r"$\{x \mid 3 \mid x\}$", "two bars"),
        (r"$$x+y=7 \\ -x+y=1$$", "a new line"),
        (r"$X\sim N(1,4)$", "∼"),
        (r"$X\sim \text{Bin}(1,4)$", "∼"),
        (r"$a \sim b$", "∼"),
        (r"$\frac{d}{dx} f$", "derivative"),
        (r"$\frac{d^2}{dx^2} f$", "derivative"),
        (r"$n+1^{th}$", "several parts"),
        ("$10-$5 is", "a difference"),
        ("costs 10-$5", "a difference or a debt"),
        ("$1-$2-$3", "a difference or a range"),
        ("$5 -$3", "a difference or a debt"),
        (r"$\$5k$", "symbol"),
        ("$(n+1)$th term", "several parts"),
        ("$2^n$th", "several parts"),
        ("$n^2+1$th", "several parts"),
        ("$2k$th", "several parts"),
        ("$p$th", "several parts"),
        ("(n+1)th", "several parts"),
        ("n - 1th", "several parts"),
        ("9 sqft", "the unit"),
        ("3 pts", "the unit"),
        ("He said. No. 5 left", "the answer no"),
        ("no. 5", "the answer no"),
        ("5 x 3 is it", "a size or a product"),
        ("5x3", "a size or a product"),
        ("3 x $5", "a product"),
        ("$5 x 3 feet", "a size or a product"),
        (r"$\{1,2\}, (3 \mid n)$", "divides or given"),
        ("5 x 3 = 15 feet", "a size or a product"),
        ("5 x 3 in base 10", "a size or a product"),
        ("3x more", "times or a variable"),
        ("2'x3'", "feet and inches"),
        ("2’x3’", "feet and inches"),
        ("on 12/25", "a date in digits"),
        ("12 1/2-lb bags", "a number of things"),
        ("x - 5 m", "a difference or a range"),
        ("10-5 km", "a difference or a score"),
        ("in$^2$", "an exponent"),
        ("It was 8:30", "a time or a ratio"),
        ("shirts/hats, day/week", "character '/'"),
        ("$m | n$", "single vertical bar"),
        ("$a|b|c$", "may mean divides"),
        ("$||x|-1|$", "bars inside"),
        ("He said 5!", "a factorial"),
        ("run a 5k", None),
        ("$5x for it", "character"),
        ("5's and 1990s", "a decade"),
        ("5'10\" tall", "feet and inches"),
        ("1 000 000", "side by side"),
        ("1.2.3", "two points"),
        ("12345678901234567890", "too long"),
        ("$the cost of x$", "dollar signs"),
        (r"$0.\overline{3}$", "the number 0."),
        ("   ", "no words"),
        ("\\", "."),
        (r"\underline\underline", "."),
        ("🍎 + 🍎 = 4", "character"),
        ("{" * 3000 + "}" * 3000, "nested|no words"),
        ("CO_2 or H_2O", "character '_'"),
    ],
)
def test_what_cannot_be_said_for_certain_is_refused(written, why):
    if why is None:
        assert verbalise(written)  # "five k": read as it stands
    else:
        with pytest.raises(ValueError, match=why):
            verbalise(written)


PIECES = [
    "$",
    "$$",
    r"\$",
    "%",
    "{",
    "}",
    "^",
    "_",
    r"\frac",
    r"\sqrt",
    "[",
    "]",
    "(",
    ")",
    "|",
    "1",
    "12",
    "1,234",
    "0.5",
    "a",
    "x",
    "n",
    "th",
    "cm",
    "km/h",
    " ",
    "+",
    "-",
    "=",
    "/",
    "<",
    r"\le",
    r"\times",
    r"\text{cm}",
    r"\text{ if }",
    r"\sum",
    r"\lim",
    r"\to",
    r"\pi",
    r"\angle",
    r"\overline",
    r"\left(",
    r"\right)",
    r"\begin{cases}",
    r"\end{cases}",
    r"\\",
    "&",
    "'",
    "!",
    ":",
    ",",
    ".",
    "?",
    "~",
    r"\,",
    r"\[",
    r"\]",
    r"\mathbb{R}",
    r"^\circ",
    "°",
    "½",
    "²",
    "€",
    "and",
    "\n",
    r"\foo",
    r"\binom",
    "{2}",
    "{n+1}",
    r"\mid",
    r"\pmod",
    "√",
    "January 5",
    "3:30",
    "p.m.",
    "1/2",
    "3-5",
    "\\",
    '"',
    "*",
    "é",
    r"\underline",
    r"\mathrm{~m}",
    "lb",
    "sq. ft",
    "-$5",
    "$8-10",
    "k",
    "No.",
    " x ",
    "feet",
    r"\_",
    r"\sim",
    "P",
    "C",
    "(A|B)",
    "2/3rds",
    "$^2$",
    "8:00",
    r"\newline",
    "d",
    "fl oz",
]
PASTED = st.lists(st.sampled_from(PIECES), max_size=12)


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(
        PASTED.map("".join),
        PASTED.map(" ".join),
        PASTED.map(lambda parts: f"${' '.join(p for p in parts if '$' not in p)}$"),
        st.text(max_size=40),
    )
)
def test_whatever_comes_is_words_or_a_value_error(written):
    try:
        said = verbalise(written)
    except ValueError:
        return
    assert said and not re.search(r"[\d\\$^_{}%=<>+|]", said)


def test_long_texts_take_no_time_to_speak_of():
    """Nested repetitions in a regular expression would take longer than the universe lasts."""
    for text in (
        "1" * 5000 + "x",
        "1+" * 2000 + "?",
        "$5 " * 500,
        "a1" * 2000,
        "(" * 3000,
        "_ " * 3000,
        "1," * 3000,
    ):
        try:
            verbalise(text)
        except ValueError:
            pass


def test_one_line_from_the_command_line():
    command, root = [sys.executable, "-m", "prepare.verbalise"], Path(__file__).parent.parent
    done = subprocess.run(
        [*command, r"$\frac{1}{2}$ of \$80,000"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "one half of eighty thousand dollars\n"
    failed = subprocess.run(
        [*command, r"$\foo$"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (
        failed.returncode == 1
        and failed.stderr
        == "error: cannot say the command \\foo; leave it out, or write it in words\n"
    )
