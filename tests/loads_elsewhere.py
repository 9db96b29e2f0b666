"""
Does a saved model load with transformers alone, without our code, in another version too?

    python tests/loads_elsewhere.py runs/cord/step-0000050

It prints the same logits in every environment, and fails where a tensor is left over.
"""
import sys

import numpy as np
import torch
import transformers

folder = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(folder)
processor = transformers.AutoProcessor.from_pretrained(folder)
name = config.architectures[0]
if hasattr(config, "thinker_config"):                       # an Omni's whole class has no forward
    config, name = config.thinker_config, name.replace("For", "ThinkerFor")
model, found = getattr(transformers, name).from_pretrained(
    folder, config=config, dtype=torch.float32, output_loading_info=True)
model.eval()

noise = np.random.default_rng(0).standard_normal(16_000)               # a second
wave = 0.1 * noise.astype(np.float32)
content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "What is that?"}]
turns = [{"role": "user", "content": content}]
prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
inputs = processor(text=[prompt], audio=[wave], sampling_rate=16_000, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]                             # [vocab]
best = logits.topk(3)

odd = {kind: len(found[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
version, length = transformers.__version__, inputs["input_ids"].shape[1]
reader = type(processor).__name__
print(f"transformers {version}: {config.model_type}, {reader}, {length} tokens, {odd}")
top = [f"{i} {x:.4f}" for i, x in zip(best.indices.tolist(), best.values.tolist())]
print("logits", *top, f"norm {logits.norm():.4f}")
if any(odd.values()):
    raise SystemExit(f"{folder} does not fit {type(model).__name__} of transformers {version}; "
                     "save it again, or load it with a version that it fits")
