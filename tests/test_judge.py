"""The judge: what an answer is, when two agree by the rule, and a model that is asked."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import data
import judge
import mini.world
import models
from judge import agree, open_answer
from plumbing.quantities import number


def example(question="", choices=(), transcript="two plus two"):
    return data.Example("e", None, question, list(choices), "four", "speech", transcript=transcript)


@pytest.mark.parametrize(
    "text, value",
    [
        ("12", 12),
        ("twelve", 12),
        ("Twelve.", 12),
        ("2/4", Fraction(1, 2)),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("$1,000", 1000),
        ("1000", 1000),
        ("18 dollars", 18),
        ("$18.00", 18),
        ("-3", -3),
        ("minus three", -3),
        ("one hundred and five", 105),
        ("eighty thousand dollars", 80_000),
        ("twenty-one apples", 21),
        ("3 + 4 = 7", 7),
        ("10-3", None),
        ("x = 5", 5),
        ("50%", 50),
        ("1,000,000", 1_000_000),
        ("zero", 0),
        ("one", 1),
        ("no idea", None),
        ("", None),
        ("1/0", None),
        ("2:30", None),
        ("x+3", None),
        ("2x", None),
        ("x2", None),
        ("3\\sqrt{2}", None),
        ("2^3", None),
        ("\\frac{1}{2}", Fraction(1, 2)),
        ("\\dfrac{-3}{4}", Fraction(-3, 4)),
        ("\\frac12", Fraction(1, 2)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("10{,}000", 10_000),
        ("1,\\!000", 1000),
        ("12 500 000", 12_500_000),
        ("18\\text{ dollars}", 18),
        ("\u22123", -3),
        ("- 3", -3),
        ("10 - 3", None),
        ("12 T-shirts", 12),
        ("60 km/h", 60),
        ("x/y", None),
        ("2-x", None),
        ("one half", Fraction(1, 2)),
        ("two and a half", Fraction(5, 2)),
        ("5 or 6", None),
        ("5 apples or 6", None),
        ("9" * 5000, None),
    ],
)
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "said, reference, same",
    [
        ("2/4", "0.5", True),
        ("$1,000", "1000", True),
        ("twelve", "12", True),
        ("12", "13", False),
        ("twelve", "yes", False),
        ("Paris", "paris.", True),
        ("The answer is 366 downloads in 3 months.", "366", True),
        ("The answer is $460 for 45 hours.", "460", True),
        ("The answer is 366 downloads in 3 months.", "3", False),
        ("The answer is 2 + 3 = 5 for all 4 of them.", "5", True),
        ("The answer is 18, not 19.", "18", True),
        ("The answer is 2 1/2 in all.", "2.5", True),
        ("Paris", "London", False),
        ("", "", False),
        ("", "5", False),
        ("The answer is 3.5.", "7/2", True),
        ("The answer is .5", "5", False),
        ("The answer is .5", "1/2", True),
        ("The answer is -5.", "5", False),
        ("So x is 4, and the answer is \\boxed{\\frac{1}{2}}.", "0.5", True),
        ("\\boxed{x + 3}", "\\boxed{x+3}", True),
        ("\\boxed{x+3}", "3", False),
        ("<THINK><PLANNING>five</PLANNING></THINK><RESPONSE>six</RESPONSE>", "6", True),
        ("<THINK><PLANNING>it may be five", "5", False),
    ],
)
def test_open_answers(said, reference, same):
    assert agree(said, reference) is same and agree(reference, said) is same


# What models write under GSM8K's and NuminaMath's problems -> does it say the reference's answer?
# Symbolic algebra is out of reach, so "no" there.
MATH = r"""
#### 18 | 18 | yes
so $18 every day.⏎#### 1,234 | 1234 | yes
She sold 48/2 = 24 clips in May. Altogether she sold 48+24 = 72 clips. | 72 | yes
We get 2^3 = 8 cells. There are 8 cells. | 8 | yes
Let x + 3 = 43, so x = 40. | 40 | yes
The answer is $18. | 18 | yes
**Answer:** 72. | 72 | yes
He made a profit of 70 thousand dollars. | 70000 | yes
It was $1.25 million. | 1250000 | yes
The answer is 5:00 PM | 5 | no
The answer is 18 | 1.8 | no
Answer: 5 * 4 = 20 | 20 | yes
5 \times 4 = 20 | 20 | yes
#### 5⏎the answer is 5 a day⏎#### 10 | 10 | yes
x^2 = 9 | 9 | no
x \approx 3.14 | 3.14 | yes
Thus the answer is \(\boxed{72}\). | 72 | yes
\[⏎\fbox{72}⏎\] | 72 | yes
\boxed 5 | 5 | yes
\boxed{} so the answer is 5. | 5 | yes
x = 3/4 | \frac{3}{4} | yes
the answer is $\frac{3}{4}$. | 0.75 | yes
\boxed{\dfrac{3}{4}} | \frac34 | yes
-1/2 | -\frac{1}{2} | yes
\boxed{\frac{1}{2}} | -\frac{1}{2} | no
7\frac{1}{2} | \frac{15}{2} | yes
7\frac{1}{2}\pi | \frac{71}{2}\pi | no
50\% | 50 | yes
0.5 | 50\% | no
30^\circ | 30^{\circ} | yes
30 degrees | \boxed{30°} | yes
30^{3} | 30^\circ | no
12\,\text{cm}^2 | 12 cm^2 | yes
12 \mathrm{~km} | 12 | yes
12\,345 | \$12{,}345 | yes
\boxed{2 \sqrt 3} | 2\sqrt{3} | yes
2√3 | 2\sqrt{3} | yes
Hence, the answer is $2\sqrt{3}$. | 2\sqrt{3} | yes
2\sqrt{3} | 3\sqrt{2} | no
2√3 | 3 | no
the answer is ±2 | 2 | no
±2 | \pm 2 | yes
\sqrt{12} | 2\sqrt{3} | no
\left(1, 2\right) | (1,2) | yes
The answer is $(1,2)$. | (1, 2) | yes
(3, 2) | (1, 2) | no
2 | (1, 2) | no
3, 2 | 1, 2 | no
\{1, 2\} | \{1,2\} | yes
[1, 2] | [1, 2) | no
\left[0, 3\right] | [0,3] | yes
k \in [1, 3] | [1,3] | yes
the answer is $(-\infty, 3]$ | (-\infty,3] | yes
x=1,y=2 | x = 1, y = 2 | yes
x = 1, y = 2 | 2 | no
\pi/4 | \frac{\pi}{4} | yes
4 pi | 4\pi | yes
4π | 4\pi | yes
4\pi | 4 | no
10^{3} | 10^3 | yes
10^3 | 10^{4} | no
x^2 + 1 | x^{2}+1 | yes
2^{1/3} | 2^{\frac{1}{3}} | yes
\sqrt{3}/2 | \dfrac{\sqrt3}2 | yes
\frac{n(n-1)}{2} | \frac{n(n+1)}{2} | no
\frac{\frac{a}{b}}{2} | \frac{a/b}{2} | yes
y = 2x + 3 | 2x+3 | yes
2x+3 | 5x+3 | no
3+4i | 3-4i | no
a \geq 2 | a≥2 | yes
a > 2 | a < 2 | no
2 < x < 5 | 5 | no
x \neq 3 | x \ne 3 | yes
2 : 3 | 2:3 | yes
2:3 | 3 | no
1010_2 | 1010_{2} | yes
1010_{2} | 1010 | no
\log_2 3 | \log_{2} 3 | yes
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix} | yes
\boxed{\text{(B)}} | B | yes
The answer is (B). | \text{B} | yes
\text{(B)} | \text{(C)} | no
\textbf{(C)}\ 10 | 10 | yes
\boxed{\text{No solution}} | no solution | yes
\boxed{\text{odd}} | even | no
"""


@pytest.mark.parametrize("case", MATH.strip().splitlines())
def test_math_as_models_write_it(case):
    said, reference, same = case.replace("⏎", "\n").split(" | ")
    assert agree(said, reference) is agree(reference, said) is (same == "yes")


TRICKY = [
    json.loads(line)
    for line in (Path(__file__).parent / "tricky_answers.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


@pytest.mark.parametrize("case", TRICKY, ids=lambda case: case["said"])
def test_tricky_answers(case):
    """Short answers, labelled by one careful reader."""
    if case["kind"] == "choice":
        assert judge.extract_choice(case["said"], case["choices"]) == case["chosen"]
    else:
        assert (
            agree(case["said"], case["reference"])
            is agree(case["reference"], case["said"])
            is case["agree"]
        )


@pytest.mark.parametrize(
    "said, chosen",
    [
        ("The correct answer is B. A dog would bark.", "cat"),
        ("The answer is C because B is a cat", "white gold"),
        ("\\boxed{B}", "cat"),
        ("<answer>B</answer>", "cat"),
        ("答案是B", "cat"),
        ("I'd go with C.", "white gold"),
        ("It's a cat, not a dog", "cat"),
        ("The answer is a cat or a dog. I say cat.", None),
        ("A dog would bark, and it is a cat.", None),
        ("A. dog\nB. cat\nC. white gold\nD. gold", None),
        ("A. dog B. cat C. white gold D. gold", None),
        ("dog\ncat\nwhite gold\ngold", None),
        ("(A) dog (B) cat (C) white gold (D) gold", None),
        ("A dog would bark, so it is a cat.", "cat"),
        ("A dog would bark.\n\nB", "cat"),
    ],
)
def test_the_answers_own_statement_decides(said, chosen):
    assert judge.extract_choice(said, ["dog", "cat", "white gold", "gold"]) == chosen


@pytest.mark.parametrize(
    "said, reference, same",
    [
        ("$20 every day, 7 days a week", "$18 every day, 7 days a week", False),
        ("x = 1, y = 2", "x = 7, y = 2", False),
        ("x = 1, y = 2", "y = 2, x = 1", True),
        ("x = 7, y = 12", "y = 7, x = 12", False),
        ("8 out of 10", "10", False),
        ("at least 5", "5", False),
        ("at least 5", "at least 5", True),
        ("not 7", "7", False),
        ("15 minutes", "900 seconds", True),
        ("$12", "£12", False),
        (
            "Half of the 26 letters is 26 / 2 = 13.0 letters.\nShe has written 52 + 13 = 65 letters.",  # noqa: E501
            "65",
            True,
        ),
        ("A third of 12 is 4.\nA: 4", "4", True),
        ("3 hours and 20 minutes", "200 minutes", True),
        ("1 in 6", "1/6", True),
    ],
)
def test_open_answers_say_what_they_say(said, reference, same):
    assert agree(said, reference) is agree(reference, said) is same


@pytest.mark.parametrize(
    "said",
    [
        "9" * 20_000,
        "123 " * 5000,
        "\\boxed{" * 2000,
        "\\frac{" * 2000,
        "the answer is " + "(" * 5000,
        "1," * 10_000,
    ],
)
def test_a_model_that_never_stops_is_judged_in_no_time(said):
    start = time.perf_counter()
    assert not agree(said, "18") and time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "said, reference, same",
    [
        ("B", "five", True),
        ("(B) five", "<RESPONSE>five</RESPONSE>", True),
        ("A", "five", False),
        ("four or five", "five", False),
        ("six", "six", False),
        ("nothing", "nothing", False),
    ],
)
def test_choices(said, reference, same):
    assert agree(said, reference, ["four", "five"]) is same


def test_the_last_box_counts_and_braces_match():
    assert open_answer("first \\boxed{1}, then \\boxed{\\frac{3}{4}}") == "\\frac{3}{4}"
    assert open_answer("\\boxed{unfinished") == "unfinished"


def test_a_model_is_asked_with_both_answers_and_batches_do_not_matter(monkeypatch):
    """With weights of our own making: the head prefers "yes" exactly when the hidden state says
    that the given answer has the token "four"."""
    model, tokenizer = models.load_text_model(mini.world.MINI / "teacher")
    seen = []

    class Says:
        device = torch.device("cpu")

        def __call__(self, input_ids, attention_mask, position_ids, logits_to_keep):
            texts = [
                tokenizer.decode(row[keep.bool()]) for row, keep in zip(input_ids, attention_mask)
            ]
            seen.extend(texts)
            logits = torch.zeros(len(texts), 1, 50)
            for i, text in enumerate(texts):
                logits[i, 0, 7 if "Given answer: four" in text else 9] = 3.0
            return type("Output", (), {"logits": logits})

    triples = [
        (example("What is it?"), f"<RESPONSE>{said}</RESPONSE>", "The answer is four.")
        for said in ("four", "five", "", "four")
    ]
    verdicts = judge.ask(Says(), tokenizer, triples, [7, 8], [9], batch_size=3)
    assert (
        verdicts
        == [True, False, False, True]
        == sum((judge.ask(Says(), tokenizer, [t], [7, 8], [9]) for t in triples), [])
    )
    assert "Question: two plus two\nWhat is it?" in seen[0] and "Reference answer: four" in seen[
        0
    ].replace("four.", "four")


def test_a_real_model_gives_verdicts_and_a_wrong_name_one_sentence(tmp_path):
    triples = [(example(), "four", "four"), (example(), "", "four")]
    verdicts = judge.load(str(mini.world.MINI / "teacher"), torch.device("cpu"))(triples)
    assert len(verdicts) == 2 and verdicts[1] is False and isinstance(verdicts[0], bool)
    with pytest.raises(SystemExit, match="cannot load a causal language model"):
        judge.load(str(tmp_path), torch.device("cpu"))


def test_the_rule_is_the_default_judge():
    verdicts = judge.load("rule", torch.device("cpu"))
    assert verdicts(
        [(example(), "4", "four"), (example(choices=["four", "five"]), "B", "four")]
    ) == [True, False]
    assert verdicts([]) == []


def test_choices_that_stand_in_the_transcript_are_choices():
    """VoiceBench's questions speak their options: the group reward reads them there, as the
    evaluation does."""
    asked = example(transcript="What barks?\nA. a cat\nB. a dog\nC. rain\nD. thunder")
    asked.answer = "B"
    verdicts = judge.load("rule", torch.device("cpu"))
    assert verdicts(
        [
            (asked, "It's a dog, not a cat.", "The answer is B."),
            (asked, "B. a cat", "The answer is B."),
        ]
    ) == [True, False]


def test_a_spoken_list_may_be_long_and_its_choices_of_several_lines():
    long = "What is it?\n" + "\n".join(f"{letter}. note{letter}" for letter in "ABCDEFGH")
    assert judge.spoken_choices(long) == [f"note{letter}" for letter in "ABCDEFGH"]
    several = "Which?\nA. gold\n which shines\nB. silver"
    assert len(judge.spoken_choices(several)) == 2
    asked = example(transcript=long)
    asked.answer = "F"
    verdicts = judge.load("rule", torch.device("cpu"))
    assert verdicts([(asked, "noteF", "The answer is F."), (asked, "noteE", "F")]) == [True, False]


def test_a_list_in_the_transcript_is_no_choices_where_the_answer_is_a_number():
    asked = example(transcript="How many are prime?\nA. 2\nB. 4\nC. 5\nD. 7")
    asked.answer = "3"
    assert judge.load("rule", torch.device("cpu"))([(asked, "\\boxed{3}", "\\boxed{3}")]) == [True]


@pytest.mark.parametrize(
    "said",
    ["C. E", "(C) E", "C) E", "The answer is (C) E.", "<RESPONSE>C. E</RESPONSE>", "E", "c. e"],
)
def test_a_choice_that_is_a_letter_itself(said):
    """MMAU asks for notes and chords: option C is E, and there is an option called C."""
    assert judge.extract_choice(said, ["G", "D", "E", "C"]) == "E"


@pytest.mark.parametrize(
    "said, chosen", [("C. Em", "Em"), ("D. C", "C"), ("G. Em", None), ("B", "F#m"), ("C", "C")]
)
def test_chords(said, chosen):
    assert judge.extract_choice(said, ["G", "F#m", "Em", "C"]) == chosen


# ------------------------------------------------- what a reader of the code found wrong


@pytest.mark.parametrize(
    "said, chosen",
    [
        ("What follows after the bell is a dog.", "dog"),
        ("The sound you hear before the explosion is a cat.", "cat"),
        ("After careful listening I think it is B.", "cat"),
        ("I thought about it and it is a dog.", "dog"),
        ("I thought it was a dog, but it is a cat.", "cat"),
        ("At first I thought dog, but it is a cat.", "cat"),
        ("Without any doubt it is a dog.", "dog"),
        ("What comes after the dog is a cat.", "cat"),
        ("A dog barks before the cat meows.", None),
        ("The cat after the dog.", None),
        ("I believe B is the answer.", "cat"),
    ],
)
def test_words_around_a_choice(said, chosen):
    assert judge.extract_choice(said, ["dog", "cat", "bird", "cow"]) == chosen


@pytest.mark.parametrize(
    "said", ["The correct one is B.", "I would say one of the options fits: B"]
)
def test_one_is_not_always_a_number(said):
    assert judge.extract_choice(said, ["1", "2", "3", "4"]) == "2"


@pytest.mark.parametrize(
    "said",
    [
        "B, since 12 is 2 more than 10.",
        "B, not 10 or 14",
        "The answer is B because between 12 and 14 it is louder.",
        "Option B, which is 2 more than 10.",
        "The answer is 12, i.e. twelve.",
    ],
)
def test_a_letter_may_have_a_reason_with_numbers(said):
    assert judge.extract_choice(said, ["10", "12", "14"]) == "12"


@pytest.mark.parametrize(
    "said, chosen",
    [
        ("It's unlikely that she is sad.", None),
        ("The answer is hardly sad.", None),
        ("It is far from sad.", None),
        ("It is everything but sad.", None),
        ("I doubt that she is sad.", None),
        ("The wrong answer is A.", None),
        ("The incorrect option is A.", None),
        ("The least likely answer is A.", None),
        ("Wrong, it's sad.", "sad"),
        ("No doubt she is sad.", "sad"),
        ("There is no doubt that she is sad.", "sad"),
        ("Without a doubt, sad.", "sad"),
        ("The most likely answer is sad.", "sad"),
        ("A is wrong, so B.", "happy"),
    ],
)
def test_what_denies_a_choice_from_before_it(said, chosen):
    assert judge.extract_choice(said, ["sad", "happy"]) == chosen


@pytest.mark.parametrize(
    "said, chosen",
    [
        ("negative 5", "-5"),
        ("The answer is minus five.", "-5"),
        ("-5", "-5"),
        ("five", "5"),
        ("5 minus 3", None),
    ],
)
def test_a_spoken_minus_is_a_sign(said, chosen):
    assert judge.extract_choice(said, ["5", "-5", "3"]) == chosen


@pytest.mark.parametrize("said", ["1/" + "3" * 5000, "1" * 5000 + " 1/2"])
def test_endless_digits_are_no_choice(said):
    assert judge.extract_choice(said, ["1", "2"]) is None


@pytest.mark.parametrize("said", ["at least 2", "The answer is 2 or 3.", "It was 2 or 5."])
def test_a_bound_or_an_alternative_is_no_choice(said):
    assert judge.extract_choice(said, ["1", "2", "3", "4"]) is None


@pytest.mark.parametrize("said", ["The answer is unclear. " * 500, "The answer is " * 800])
def test_a_choice_of_a_model_that_never_stops(said):
    start = time.perf_counter()
    assert judge.extract_choice(said, ["dog", "cat", "white gold", "gold"]) is None
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "said, reference, same",
    [
        ("Let me answer step by step: 5 + 3 = 8. Then 8 * 2 = 16. She has 16 apples.", "16", True),
        (
            "I'll answer this step by step:\n1. She has 3.\n2. She buys 4.\nShe has 7 apples.",
            "7",
            True,
        ),
        ("To find the answer, we compute 3 + 4 = 7. Then 7 * 2 = 14.", "14", True),
        ("If I choose 2 of them, the probability is 1/6.", "1/6", True),
        ("The answer is:\n\\[\n12\n\\]", "12", True),
        ("The answer is as follows:\n5 + 3 = 8\nSo she has 8 apples.", "8", True),
        ("The answer is yes, since 3 > 2.", "Yes", True),
        ("The answer is Monday, 3 days later.", "Monday", True),
        ("We get x=3 and y=4, so x+y = 7.", "7", True),
        ("She ran 15 miles over 5 days.", "15", True),
        ("The total number of apples is 3 x 4 which is 12.", "12", True),
        ("**Answer:** 5", "5", True),
        ("x^2 = 9", "9", False),
        ("5 is not the answer.", "5", False),
        ("The answer is the square root of 16.", "16", False),
        ("5 kg", "5 lb", False),
        ("5 to the power of 2", "5", False),
        ("5 divided by 2", "5", False),
        ("20 percent of 50", "20", False),
        ("5 more than 3", "5", False),
        ("5 of 6", "5", False),
        ("5 squared", "5", False),
    ],
)
def test_what_states_a_number(said, reference, same):
    assert agree(said, reference) is same
