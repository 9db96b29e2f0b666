"""What every run of the scripts imports sooner or later, imported once: bad_days.py's fork server
loads this module, and a run that is forked from it starts in a second.

Only imports: a model that is loaded here would leave tqdm's monitor behind, a thread, and a fork of
a process with threads may wait for ever for what one of them held."""

import threading

import torch._dynamo  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen3ForCausalLM,
    WhisperFeatureExtractor,
)

import textualize  # noqa: F401
import train_cord  # noqa: F401
import train_source_layer  # noqa: F401

assert threading.active_count() == 1, threading.enumerate()
