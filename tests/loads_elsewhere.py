"""
Does a saved model load where there is torch and transformers and nothing of ours, in another version too?

    python tests/loads_elsewhere.py runs/cord/step-0000050          # prints the same logits in every environment, and fails where a tensor is left over
"""
import sys

import numpy as np
import torch
import transformers

folder = sys.argv[1]
config, processor = transformers.AutoConfig.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)
name = config.architectures[0]
if hasattr(config, "thinker_config"):                                  # an Omni: its whole class has no forward, and wants the talker's voices
    config, name = config.thinker_config, name.replace("For", "ThinkerFor")
model, found = getattr(transformers, name).from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
model.eval()

wave = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)           # a second of noise
turn = [{"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "What is that?"}]}]
prompt = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
inputs = processor(text=[prompt], audio=[wave], sampling_rate=16_000, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]                             # [vocab]
best = logits.topk(3)

odd = {kind: len(found[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
print(f"transformers {transformers.__version__}: {config.model_type}, {type(processor).__name__}, {inputs['input_ids'].shape[1]} tokens, {odd}")
print("logits", *(f"{i} {x:.4f}" for i, x in zip(best.indices.tolist(), best.values.tolist())), f"norm {logits.norm():.4f}")
if any(odd.values()):
    raise SystemExit(f"{folder} does not fit {type(model).__name__} of transformers {transformers.__version__}")
