"""The letter that VoiceBench's evaluator reads out of an answer.

VoiceBench (arXiv 2410.17196) scores multiple choice by searching for fixed phrases. evaluate.py
gives this count beside our own (judge.extract_choice), so that published numbers can be compared.
"""

import re

import judge

# Where VoiceBench's evaluator looks for a letter (@, in lower case), in its order: the first that
# is found counts. It is as blind as it looks: "the answer is due to friction" chooses D. Those that
# an earlier one makes superfluous are left out.
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
    """The letter, A to D, that VoiceBench's evaluator reads out of an answer, its trace dropped.

    None where it guesses."""
    text = judge.final_answer(output_text).lower()
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
