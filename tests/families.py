"""
Tiny random models of eight families, each of its real classes with its real processor, and a text
teacher that speaks its chat format.

    save_family("qwen2_5_omni", folder) -> folder / "student", folder / "teacher"
"""

import torch
import transformers
from conftest import STUDENT_TEMPLATE, TEACHER_TEMPLATE, bpe
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

import models

OMNI_TEMPLATE = STUDENT_TEMPLATE.replace("Audio 1: ", "").replace(
    "<|audio_eos|>\n", "<|audio_eos|>"
)
FLAMINGO_TEMPLATE = OMNI_TEMPLATE.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "<sound>")
GRANITE_TEMPLATE = (  # knows no parts: contents are text
    "{% for m in messages %}<|start_of_role|>{{ m['role'] }}"
    "{{ '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def tokenizer(special, template, end, **named):
    made = bpe(special, template)
    made = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        pad_token=special[0],
        eos_token=end,
        extra_special_tokens=named,
    )
    made.chat_template = template
    return made


def text_shape(words, **more):
    return (
        dict(
            vocab_size=len(words),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            pad_token_id=words.pad_token_id,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )
        | more
    )


EARS = dict(
    num_mel_bins=16, d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64
)
WHISPER = dict(feature_size=16, chunk_length=3)


def qwen2_audio():
    words = tokenizer(
        [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|AUDIO|>",
            "<|audio_bos|>",
            "<|audio_eos|>",
        ],
        STUDENT_TEMPLATE,
        "<|im_end|>",
    )
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(**WHISPER), words, chat_template=STUDENT_TEMPLATE
    )
    config = Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", max_source_positions=150, **EARS),
        text_config=text_shape(words, model_type="qwen2"),
        audio_token_id=processor.audio_token_id,
    )
    return Qwen2AudioForConditionalGeneration(config), processor


def omni(processor_class):
    """A tokenizer with Omni's named tokens, its processor with the real 300 s window, and the ids
    that its config wants."""
    named = {f"{name}_token": f"<|{name.upper()}|>" for name in ("audio", "image", "video")}
    named |= {
        f"{name}_{side}_token": f"<|{name}_{side}|>"
        for name in ("audio", "vision")
        for side in ("bos", "eos")
    }
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        OMNI_TEMPLATE,
        "<|im_end|>",
        **named,
    )
    processor = processor_class(
        Qwen2VLImageProcessor(),
        Qwen2VLVideoProcessor(),
        WhisperFeatureExtractor(feature_size=16, chunk_length=300),
        words,
        chat_template=OMNI_TEMPLATE,
    )
    ids = {name: words.convert_tokens_to_ids(token) for name, token in named.items()}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    return words, processor, ids, rope


def qwen2_5_omni():
    words, processor, ids, rope = omni(Qwen2_5OmniProcessor)
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=48,
        fullatt_block_indexes=[0],
    )
    config = Qwen2_5OmniThinkerConfig(
        audio_config=dict(output_dim=48, n_window=50, **EARS),
        vision_config=vision,
        text_config=text_shape(words, rope_parameters=rope),
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def qwen3_omni():
    words, processor, ids, rope = omni(Qwen3OmniMoeProcessor)
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=48,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    )
    text = text_shape(
        words,
        rope_parameters=rope | {"mrope_interleaved": True},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=12,
    )
    config = Qwen3OmniMoeThinkerConfig(
        audio_config=dict(output_dim=48, n_window=50, downsample_hidden_size=8, **EARS),
        vision_config=vision,
        text_config=text,
        audio_token_id=ids["audio_token"],
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def audioflamingo3():
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>"], FLAMINGO_TEMPLATE, "<|im_end|>"
    )
    processor = AudioFlamingo3Processor(
        WhisperFeatureExtractor(**WHISPER), words, chat_template=FLAMINGO_TEMPLATE
    )
    ears = dict(
        num_mel_bins=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_source_positions=150,
    )
    config = AudioFlamingo3Config(
        audio_config=ears,
        text_config=text_shape(words, model_type="qwen2"),
        audio_token_id=processor.audio_token_id,
    )
    return AudioFlamingo3ForConditionalGeneration(config), processor


def granite_speech():
    words = tokenizer(
        ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>"],
        GRANITE_TEMPLATE,
        "<|end_of_text|>",
    )
    processor = GraniteSpeechProcessor(
        GraniteSpeechFeatureExtractor(), words, chat_template=GRANITE_TEMPLATE
    )
    ears = dict(
        input_dim=160,
        num_layers=2,
        hidden_dim=32,
        num_heads=2,
        dim_head=16,
        output_dim=12,
        context_size=20,
        max_pos_emb=32,
        feedforward_mult=2,
        conv_kernel_size=3,
    )
    queries = dict(
        model_type="blip_2_qformer",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_hidden_size=32,
        cross_attention_frequency=1,
    )
    config = GraniteSpeechConfig(
        text_config=text_shape(words, model_type="granite", tie_word_embeddings=True),
        encoder_config=ears,
        projector_config=queries,
        audio_token_index=words.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
        tie_word_embeddings=True,
    )
    return GraniteSpeechForConditionalGeneration(config), processor


def musicflamingo():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<sound>", "<|sound_bos|>", "<|sound_eos|>"]
    words = tokenizer(special, FLAMINGO_TEMPLATE, "<|im_end|>")
    processor = transformers.MusicFlamingoProcessor(
        WhisperFeatureExtractor(**WHISPER), words, chat_template=FLAMINGO_TEMPLATE
    )
    ears = dict(
        model_type="audioflamingo3_encoder",
        num_mel_bins=16,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_source_positions=150,
    )
    config = transformers.MusicFlamingoConfig(
        audio_config=ears,
        text_config=text_shape(words, model_type="qwen2"),
        audio_token_id=processor.audio_token_id,
        audio_bos_token_id=processor.audio_bos_token_id,
        audio_eos_token_id=processor.audio_eos_token_id,
    )
    return transformers.MusicFlamingoForConditionalGeneration(config), processor


def qwen3_asr():
    template = OMNI_TEMPLATE.replace("<|AUDIO|>", "<|audio_pad|>")
    named = {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    words = tokenizer(special, template, "<|im_end|>", **named)
    # Its own since transformers 5.20 or so
    features = getattr(transformers, "Qwen3ASRFeatureExtractor", WhisperFeatureExtractor)
    processor = transformers.Qwen3ASRProcessor(
        features(feature_size=16), words, chat_template=template
    )
    config = transformers.Qwen3ASRConfig(
        audio_config=dict(output_dim=48, downsample_hidden_size=8, **EARS),
        text_config=text_shape(words, model_type="qwen3", head_dim=12, tie_word_embeddings=True),
        audio_token_id=processor.audio_token_id,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return transformers.Qwen3ASRForConditionalGeneration(config), processor


def glmasr():
    """With a template that closes turns; its own does not, and is refused."""
    template = FLAMINGO_TEMPLATE.replace("<sound>", "<|begin_of_audio|><|pad|><|end_of_audio|>")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>"]
    words = tokenizer(special, template, "<|im_end|>")
    processor = transformers.GlmAsrProcessor(
        WhisperFeatureExtractor(feature_size=16, chunk_length=4), words, chat_template=template
    )
    ears = dict(
        num_mel_bins=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=200,
    )
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.GlmAsrConfig(
        audio_config=ears,
        text_config=text_shape(words, model_type="llama", rope_parameters=rope),
        audio_token_id=processor.audio_token_id,
        tie_word_embeddings=False,
    )
    return transformers.GlmAsrForConditionalGeneration(config), processor


FAMILIES = {
    make.__name__: make
    for make in (
        qwen2_audio,
        qwen2_5_omni,
        qwen3_omni,
        audioflamingo3,
        granite_speech,
        musicflamingo,
        qwen3_asr,
        glmasr,
    )
}


def make_family(name):
    """-> (model with weights that are no longer close to zero, so that a wrong position shows,
    processor)"""
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    with torch.no_grad():
        for parameter in [*model.get_decoder().parameters(), *models.tower(model).parameters()]:
            parameter.mul_(3)
    return model.eval(), processor


def save_family(name, folder):
    """Student and text teacher (Qwen3) as saved by transformers itself, below folder."""
    model, processor = make_family(name)
    model.save_pretrained(folder / "student")
    processor.save_pretrained(folder / "student")
    granite = name == "granite_speech"
    words = (
        tokenizer(
            ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
            GRANITE_TEMPLATE,
            "<|end_of_text|>",
        )
        if granite
        else tokenizer(
            [
                "<|endoftext|>",
                "<|im_start|>",
                "<|im_end|>",
                "<|object_ref_start|>",
                "<think>",
                "</think>",
            ],
            TEACHER_TEMPLATE,
            "<|im_end|>",
        )
    )
    teacher = Qwen3ForCausalLM(
        Qwen3Config(**text_shape(words, hidden_size=64, num_hidden_layers=4, head_dim=16))
    )
    teacher.save_pretrained(folder / "teacher")
    words.save_pretrained(folder / "teacher")
    return folder / "student", folder / "teacher"
