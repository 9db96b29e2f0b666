"""
The papers' models by their shapes alone: random weights, so that a dry run, memory.py and bench.py can walk where no hub can be reached and 7B do not fit.

    python models.py Qwen/Qwen2-Audio-7B-Instruct --random-weights 1 --save Qwen/Qwen2-Audio-7B-Instruct        # one layer of its 32

writes a folder that goes by the model's name wherever that is asked for from the same place, so that every command of a recipe runs as it stands.
Width, heads and vocabulary are those of the models' config.json, in their own classes; depth is at most what is asked for. Their tokenizers cannot be
had without the hub: words stand for tokens, "w0" to "w151599", and every other word is "?". So the memory and the time of a step are the real ones
for so many layers, and what the model says is noise.
"""
import tokenizers
from tokenizers import Tokenizer
from transformers import (AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast, Qwen2_5OmniProcessor,
                          Qwen2_5OmniThinkerConfig, Qwen2AudioConfig, Qwen2AudioProcessor, Qwen2VLImageProcessor,
                          Qwen2VLVideoProcessor, Qwen3Config, WhisperFeatureExtractor)

STUDENT_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEACHER_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<think>", "</think>"]
OMNI_NAMED = {"audio_token": "<|AUDIO|>", "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_bos_token": "<|audio_bos|>",
              "audio_eos_token": "<|audio_eos|>", "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
# Qwen2-Audio's template without its system prompt, and Qwen3's: with thinking off the answer follows an empty think block.
STUDENT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEACHER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}")

EARS = dict(num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, max_source_positions=1500)
EYES = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)           # Omni carries them; nothing here looks
STUDENTS = {
    "Qwen/Qwen2-Audio-7B-Instruct": dict(vocab_size=156_032, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
    "Qwen/Qwen2.5-Omni-7B": dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)}
TEACHERS = {"Qwen/Qwen3-8B": dict(vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                                  head_dim=128)}


def word_tokenizer(specials, template, named={}, words=151_600):
    """One token a word, "w0" to "w151599": as many words as the real ones, and texts of any length."""
    tokenizer = Tokenizer(tokenizers.models.WordLevel({**{f"w{i}": i for i in range(words)}, "?": words}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", extra_special_tokens=named)
    fast.chat_template = template
    return fast


def _shape(table, name, layers):
    if name not in table:
        raise SystemExit(f"--random-weights knows the shapes of {', '.join(table)}, not of {name}; give one of these")
    shape = table[name]
    return {**shape, "num_hidden_layers": min(layers, shape["num_hidden_layers"]), "tie_word_embeddings": False, "max_position_embeddings": 32_768}


def random_student(name, layers, dtype):
    """-> (audio language model with at most so many layers in decoder, tower and eyes, its processor). Raises SystemExit for a name it does not know."""
    text, ears, eyes = _shape(STUDENTS, name, layers), {**EARS, "encoder_layers": min(layers, EARS["encoder_layers"])}, {**EYES, "depth": min(layers, EYES["depth"])}
    if "Omni" not in name:
        words = word_tokenizer(STUDENT_SPECIALS, STUDENT_TEMPLATE)
        processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=EARS["num_mel_bins"]), words, chat_template=STUDENT_TEMPLATE)
        config = Qwen2AudioConfig(audio_config=dict(model_type="qwen2_audio_encoder", **ears), text_config=dict(model_type="qwen2", **text),
                                  audio_token_id=words.convert_tokens_to_ids("<|AUDIO|>"))
        return AutoModelForMultimodalLM.from_config(config, dtype=dtype).eval(), processor
    words = word_tokenizer([*STUDENT_SPECIALS, *OMNI_NAMED.values()], STUDENT_TEMPLATE, OMNI_NAMED)
    ids = {key: words.convert_tokens_to_ids(token) for key, token in OMNI_NAMED.items()}
    processor = Qwen2_5OmniProcessor(Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), WhisperFeatureExtractor(feature_size=EARS["num_mel_bins"], chunk_length=300), words,
                                     chat_template=STUDENT_TEMPLATE)
    head = text["hidden_size"] // text["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head // 2 - head // 8 - head * 3 // 16]}     # 16, 24, 24 of 64 pairs
    config = Qwen2_5OmniThinkerConfig(
        audio_config={**ears, "output_dim": text["hidden_size"], "n_window": 100}, vision_config={**eyes, "out_hidden_size": text["hidden_size"]},
        text_config={**text, "rope_parameters": rope}, audio_token_index=ids["audio_token"], image_token_index=ids["image_token"], video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"], vision_start_token_id=ids["vision_bos_token"], vision_end_token_id=ids["vision_eos_token"])
    return AutoModelForMultimodalLM.from_config(config, dtype=dtype).eval(), processor


def random_teacher(name, layers, dtype):
    """-> (text LLM with at most so many layers, its tokenizer). Raises SystemExit for a name it does not know."""
    model = AutoModelForCausalLM.from_config(Qwen3Config(**_shape(TEACHERS, name, layers)), dtype=dtype)
    return model.eval(), word_tokenizer(TEACHER_SPECIALS, TEACHER_TEMPLATE)
