"""Tiny stand-ins with the real architectures: a student that hears (Qwen2-Audio), tokenizers with
chat templates, and audio files."""

import math
import os

# One thread a process, here and in every process that a test starts: two tests run at once
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# Nothing heavy is imported here: pytest-xdist's first process needs none of it

# The files that take longest come first, so that both workers end at about the same time
LONGEST = ("test_train_cord", "test_run", "test_models", "test_pretend_gpu", "test_bad_days",
           "test_train_source_layer", "test_memory", "test_light", "test_bench", "test_recipes")


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


SENTENCES = [
    "What is seven plus two minus four?",
    "Which sound comes first: the knock, the beep or the siren?",
    "A man says: what is three plus five? Let us compute step by step.",
    "The answer is eight, so the choice is A.",
    "<THINK><PLANNING></PLANNING><CAPTION></CAPTION><REASONING></REASONING><SUMMARY></SUMMARY></THINK><RESPONSE></RESPONSE>",
]
STUDENT_TEMPLATE = (  # Qwen2-Audio's: one line per clip, contents as text or as parts
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"  # noqa: E501
    "{% else %}{% for part in message['content'] %}{% if 'audio' in part or 'audio_url' in part %}"
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"  # noqa: E501
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEACHER_TEMPLATE = (  # Qwen3's: an empty think block where thinking is switched off
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}<|im_end|>\n"  # noqa: E501
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"  # noqa: E501
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def bpe(special: list[str], template: str, sentences=SENTENCES):
    """A fast tokenizer of byte-level BPE, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens(special)  # ids from 330 on, in this order
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def tiny_processor():
    """A Qwen2AudioProcessor with a byte-level BPE and a 3 s window of 16 mel bins."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|AUDIO|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
    ]
    return Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=16, chunk_length=3),
        bpe(special, STUDENT_TEMPLATE),
        chat_template=STUDENT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_teacher_tokenizer():
    """The same BPE, but <|object_ref_start|> at the id of <|AUDIO|>, and <think> as one token, as
    Qwen3 has beside Qwen2.5-Omni."""
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<think>",
        "</think>",
    ]
    return bpe(special, TEACHER_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_student_model(tiny_processor):
    """A random Qwen2-Audio of 110 k parameters, in eval mode; do not train this one, copy it."""
    import torch
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = tiny_processor.tokenizer
    text = dict(
        model_type="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    audio = dict(
        model_type="qwen2_audio_encoder",
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        max_source_positions=150,
    )  # 3 s = 300 mel frames = 2 x 150
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_id=tiny_processor.audio_token_id
    )
    model = Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():  # far from zero, so that a wrong position shows
        for parameter in model.model.language_model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def make_wav():
    """make_wav(path, seconds=1.0, rate=16000, channels=1, frequency=440.0, **soundfile options)
    writes a tone of amplitude 0.5."""
    import soundfile
    import torch

    def make(path, seconds=1.0, rate=16_000, channels=1, frequency=440.0, **options):
        time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
        tone = 0.5 * torch.sin(2 * math.pi * frequency * time)  # [samples]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone[:, None].repeat(1, channels).numpy(), rate, **options)
        return path

    return make
