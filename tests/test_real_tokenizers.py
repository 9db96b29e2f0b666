"""With the real vocabularies of Qwen3, Qwen2.5-Omni and Qwen2-Audio: which tokens are shared, what
may be said, and both prompts letter by letter. `python tests/real_tokenizers.py` fetches them."""

import os

import pytest
import real_tokenizers
import torch
import transformers
from families import OMNI_TEMPLATE

import data
import rollout

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ROWS = {"qwen2_5_omni": 152_064, "qwen2_audio": 156_032}  # of the head; more than there are tokens
EXAMPLE = data.Example(
    "x",
    None,
    "Which is heard?",
    ["a bell", "a dog"],
    "a dog",
    "sound",
    reasoning={
        "planning": "Listen for sources.",
        "caption": "Barks, twice; 3.5 s apart.",
        "reasoning": "Bells ring\n\nand ring: no.  So naïve 😀 狗!",
        "summary": " it barks ",
    },
    description="Two barks.",
    transcript="Which one is heard?",
)


@pytest.fixture(scope="module")
def qwen3():
    if not (real_tokenizers.FOLDER / "tokenizer.json").is_file():
        sentence = "Qwen3's tokenizer is not here; python tests/real_tokenizers.py fetches it"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    return transformers.AutoTokenizer.from_pretrained(real_tokenizers.FOLDER)


@pytest.fixture(scope="module")
def students(qwen3, tmp_path_factory):
    """name -> the processor of a student: real tokens, and Qwen2-Audio's template as transformers
    has it. (Omni's has no "Audio 1: "; its own processor wants pictures too.)"""
    made = {}
    for name in real_tokenizers.ADDED:
        folder = tmp_path_factory.mktemp("real") / name
        words = transformers.AutoTokenizer.from_pretrained(
            real_tokenizers.save_student(name, folder)
        )
        features = transformers.WhisperFeatureExtractor(feature_size=128)
        made[name] = transformers.Qwen2AudioProcessor(features, words)
        made[name].chat_template = made[name].default_chat_template
        if name == "qwen2_5_omni":
            made[name].chat_template = with_system_prompt(OMNI_TEMPLATE)
        words.chat_template = made[name].chat_template
    return made


def with_system_prompt(template):
    start = "{% for message in messages %}"
    first = "{% if loop.first and message['role'] != 'system' %}" + SYSTEM + "{% endif %}"
    return template.replace(start, start + first, 1)


def test_the_text_teachers_prompt_letter_by_letter(qwen3):
    """Thinking is off: the block is there, empty, as Qwen3 was trained to have it."""
    question = data.question_text(EXAMPLE)
    prompt = data.text_prompt(qwen3, EXAMPLE.description, question)
    assert prompt == (
        "<|im_start|>user\nTwo barks.\nWhich is heard?\nA. a bell\nB. a dog<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    ids = qwen3(prompt, add_special_tokens=False)["input_ids"]
    assert ids[-4:] == [151_667, 271, 151_668, 271]


@pytest.mark.parametrize(
    "name, clip",
    [
        ("qwen2_audio", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"),
        ("qwen2_5_omni", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
    ],
)
def test_the_students_prompts_letter_by_letter(students, name, clip):
    question = "Which is heard?\nA. a bell\nB. a dog<|im_end|>\n<|im_start|>assistant\n"
    heard = data.audio_prompt(students[name], data.question_text(EXAMPLE))
    assert heard == f"{SYSTEM}<|im_start|>user\n{clip}{question}"
    tokenizer = students[name].tokenizer
    read = data.text_prompt(tokenizer, EXAMPLE.transcript, data.question_text(EXAMPLE))
    assert read == f"{SYSTEM}<|im_start|>user\nWhich one is heard?\n{question}"


@pytest.mark.parametrize(
    "name, counts",
    [
        ("qwen2_5_omni", (151_658, 7, 11, 7)),
        ("qwen2_audio", (151_646, 3, 23, 3)),
    ],
)
def test_tokens_are_shared_by_name_not_by_id(qwen3, students, name, counts):
    """Id 151,646 is <|AUDIO|> in the students and <|object_ref_start|> in Qwen3."""
    ours = students[name].tokenizer
    student_ids, teacher_ids, summary = data.shared_vocabulary(ours, qwen3)
    assert tuple(summary.values()) == counts
    mapped = data.token_map(student_ids, teacher_ids, ROWS[name])
    assert torch.equal(mapped[:151_646], torch.arange(151_646))
    assert mapped[151_646] == -1 and (mapped[len(ours) :] == -1).all()
    vocabulary, theirs = ours.get_vocab(), qwen3.get_vocab()
    for token in set(vocabulary) & set(theirs):
        assert mapped[vocabulary[token]] == theirs[token], token


@pytest.mark.parametrize("name", ["qwen3", *real_tokenizers.ADDED])
def test_an_appended_response_is_what_the_whole_text_would_be(qwen3, students, name):
    """No merge reaches across the prompt's end, so that one tokenisation serves both views."""
    tokenizer = qwen3 if name == "qwen3" else students[name].tokenizer
    prompt = data.text_prompt(tokenizer, "A dog barks.", "Which?")
    for text in (data.response_text(EXAMPLE), "The answer is (B).", "\\boxed{3}", "是狗", " B"):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids += data.encode_response(tokenizer, text)
        whole = tokenizer(f"{prompt}{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        assert ids == whole, text
        assert tokenizer.decode(ids) == f"{prompt}{text}<|im_end|>"


@pytest.mark.parametrize(
    "name, stop",
    [("qwen2_5_omni", [151_645]), ("qwen2_audio", [151_643, 151_645])],
)
def test_what_ends_an_answer_and_what_is_never_said(students, name, stop):
    """Never: special tokens, the audio's placeholder and rows that are no token. Allowed: the
    tokens of tools, which are text to their tokenizers."""
    tokenizer = students[name].tokenizer
    assert rollout.stop_ids(tokenizer) == stop
    placeholder = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert placeholder == 151_646
    banned = data.control_ids(tokenizer, ROWS[name], keep=stop, placeholder=placeholder)
    added = real_tokenizers.ADDED[name]
    special = {151_643 + i for i, token in enumerate(added)
               if token not in real_tokenizers.NOT_SPECIAL}
    assert banned == sorted((special | {*range(151_643 + len(added), ROWS[name])}) - {*stop})


def test_both_views_of_an_example(qwen3, students, make_wav, tmp_path):
    """One second of sound, Omni's vocabulary beside Qwen3's: row k of both predicts the same."""
    example = data.Example(**{**vars(EXAMPLE), "audio": make_wav(tmp_path / "x.wav")})
    processor = students["qwen2_5_omni"]
    student_ids, teacher_ids, _ = data.shared_vocabulary(processor.tokenizer, qwen3)
    mapped = data.token_map(student_ids, teacher_ids, ROWS["qwen2_5_omni"])
    batch = data.collate([example], processor, qwen3, student_to_teacher=mapped)
    response = data.response_text(example) + "<|im_end|>"
    assert processor.tokenizer.decode(batch.labels) == response
    text = batch.text.inputs["input_ids"][0]
    assert qwen3.decode(text[batch.text.predict_positions + 1]) == response
    heard = batch.audio.inputs["input_ids"][0]
    assert torch.equal(heard[batch.audio.predict_positions + 1], batch.labels)
    assert (heard == 151_646).sum() == len(batch.audio.audio_positions) == 25
