"""What every run of the scripts imports sooner or later, imported once: bad_days.py's fork server
loads this module, and a run that is forked from it starts in a second."""

import torch._dynamo  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import models
import textualize  # noqa: F401
import train_cord  # noqa: F401
import train_source_layer  # noqa: F401

# Both classes, their readers, and what transformers imports while it loads them
models.load_audio_model(models.MINI / "student")
models.load_text_model(models.MINI / "teacher")
