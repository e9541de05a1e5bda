"""Tiny random Llama checkpoints, written without transformers or torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxtune import tree
from jaxtune.models import families
from jaxtune.models.decoder import Decoder
from tests.byte_tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors(hf: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """{Hugging Face name: random float32 array} of a config."""
    rng = np.random.default_rng(seed)
    rows, config = families.read(hf)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    found = {}
    for path, leaf in tree.split(model)[1].items():
        for index, name in rows.slots(path, config):
            shape = leaf.shape[len(index) :]
            noise = rng.normal(0, 0.2, shape[::-1] if rows.turned(path) else shape).astype(
                np.float32
            )
            found[name] = 1 + noise if path.endswith(".scale") else noise
    return found


def write(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder of config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = SIZES | changes
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors(hf, seed), folder / "model.safetensors")
    return folder


def write_complete(folder: Path, **changes: Any) -> Path:
    """A Hugging Face folder with a byte tokenizer too, enough to train and generate."""
    write(folder, vocab_size=264, bos_token_id=256, eos_token_id=257, **changes)
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int = 40) -> Path:
    """Prompt/completion rows that a tiny model can learn: count on."""
    rows = [{"prompt": f"{i} then", "completion": f" {i + 1}"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
