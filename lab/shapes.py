"""
The papers' models by their shapes alone, with random weights: so that a dry run, memory.py and
bench.py work where no hub can be reached and 7B do not fit.

    python -m lab.shapes Qwen/Qwen2-Audio-7B-Instruct --layers 1 --save Qwen/Qwen2-Audio-7B-Instruct

writes a folder that goes by the model's name wherever that is asked for from the same place, so
that every command of a recipe runs as it stands.

Width, heads and vocabulary are those of the models' config.json, in their own classes; depth is at
most what is asked for. The tokenizers cannot be had without the hub: words stand for tokens, "w0"
to "w151599", and every other word is "?". So memory and time of a step are the real ones for that
many layers, and what the model says is noise.
"""
import argparse
from pathlib import Path

import torch
import transformers

# -------------------------------- 1. what the real models are made of ---------------------------

STUDENT_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
                    "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEACHER_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
                    "<|object_ref_start|>", "<|object_ref_end|>", "<think>", "</think>"]
OMNI_NAMED = {
    "audio_token": "<|AUDIO|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>"}

# Qwen2-Audio's template without its system prompt
STUDENT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Qwen3's: with thinking off the answer follows an empty think block
TEACHER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}")

EARS = dict(num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20,
            encoder_ffn_dim=5120, max_source_positions=1500)
# Omni has a vision tower; nothing here uses it
EYES = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
STUDENTS = {
    "Qwen/Qwen2-Audio-7B-Instruct": dict(
        vocab_size=156_032, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32),
    "Qwen/Qwen2.5-Omni-7B": dict(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4)}
TEACHERS = {
    "Qwen/Qwen3-8B": dict(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128)}


def word_tokenizer(specials, template, named=None, words=151_600):
    """One token a word, "w0" to "w151599": as many words as the real tokenizers have tokens."""
    import tokenizers
    vocabulary = {f"w{i}": i for i in range(words)} | {"?": words}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        extra_special_tokens=named or {})
    fast.chat_template = template
    return fast


# ----------------------------------------- 2. the models ----------------------------------------

def random_student(name, layers, dtype):
    """-> (audio language model with at most so many layers in decoder, tower and vision tower, its
    processor). name: one of STUDENTS."""
    text = _text_shape(STUDENTS[name], layers)
    ears = EARS | {"encoder_layers": min(layers, EARS["encoder_layers"])}
    make = _omni if "Omni" in name else _qwen2_audio
    config, processor = make(text, ears, layers)
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=dtype)
    return model.eval(), processor


def random_teacher(name, layers, dtype):
    """-> (text LLM with at most so many layers, its tokenizer). name: one of TEACHERS."""
    config = transformers.Qwen3Config(**_text_shape(TEACHERS[name], layers))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval(), word_tokenizer(TEACHER_SPECIALS, TEACHER_TEMPLATE)


def _text_shape(shape, layers):
    return shape | {"num_hidden_layers": min(layers, shape["num_hidden_layers"]),
                    "tie_word_embeddings": False, "max_position_embeddings": 32_768}


def _qwen2_audio(text, ears, layers):
    words = word_tokenizer(STUDENT_SPECIALS, STUDENT_TEMPLATE)
    processor = transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor(feature_size=EARS["num_mel_bins"]), words,
        chat_template=STUDENT_TEMPLATE)
    config = transformers.Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", **ears),
        text_config=dict(model_type="qwen2", **text),
        audio_token_id=words.convert_tokens_to_ids("<|AUDIO|>"))
    return config, processor


def _omni(text, ears, layers):
    words = word_tokenizer([*STUDENT_SPECIALS, *OMNI_NAMED.values()], STUDENT_TEMPLATE, OMNI_NAMED)
    processor = transformers.Qwen2_5OmniProcessor(
        transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor(),
        transformers.WhisperFeatureExtractor(feature_size=EARS["num_mel_bins"], chunk_length=300),
        words, chat_template=STUDENT_TEMPLATE)
    id_of = words.convert_tokens_to_ids

    # Rotary pairs of a head, 64, for time, height and width: 16, 24, 24
    width = text["hidden_size"]
    head = width // text["num_attention_heads"]
    time, height = head // 8, head * 3 // 16
    rope = {"rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [time, height, head // 2 - time - height]}
    eyes = EYES | {"depth": min(layers, EYES["depth"]), "out_hidden_size": width}
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=ears | {"output_dim": width, "n_window": 100},
        vision_config=eyes,
        text_config=text | {"rope_parameters": rope},
        audio_token_index=id_of("<|AUDIO|>"),
        image_token_index=id_of("<|IMAGE|>"),
        video_token_index=id_of("<|VIDEO|>"),
        audio_start_token_id=id_of("<|audio_bos|>"),
        vision_start_token_id=id_of("<|vision_bos|>"),
        vision_end_token_id=id_of("<|vision_eos|>"))
    return config, processor


def main(argv=None):
    parser = argparse.ArgumentParser(description="Save a model of the papers with random weights.")
    parser.add_argument("model", choices=[*STUDENTS, *TEACHERS], help="whose shape")
    parser.add_argument("--layers", type=int, default=1, help="of each part, at most so many")
    parser.add_argument("--save", metavar="OUT", required=True, help="a new folder")
    args = parser.parse_args(argv)
    if Path(args.save).exists():
        raise SystemExit(f"--save {args.save}: is there already; name a new folder")
    from plumbing import saving
    make = random_teacher if args.model in TEACHERS else random_student
    model, reader = make(args.model, args.layers, torch.bfloat16)
    saving.save_new(model, reader, args.save)


if __name__ == "__main__":
    main()
