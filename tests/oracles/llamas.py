"""Tiny random Llama checkpoints written by transformers, and its answers about them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)  # threads that wait for each other are slow where cores are shared

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "odd_heads_tied": {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "tie_word_embeddings": True,
    },
    "biases_llama3": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
    },
    "linear_gelu": {"rope_parameters": LINEAR, "hidden_act": "gelu", "rms_norm_eps": 1e-5},
}


def write(folder: Path, *, seed: int = 0, dtype=torch.float32, shard="1GB", **changes: Any) -> Path:
    """Saves a Llama whose weights are all random, also norms and biases, and its logits order 1."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    with torch.no_grad():
        for name, values in model.named_parameters():
            noise = torch.randn_like(values)
            narrow = values.ndim == 1
            values.copy_(0.3 * noise if narrow else noise * values.shape[-1] ** -0.5)
            if name.endswith("norm.weight"):
                values.add_(1.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of a [B, T] batch without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.numpy()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation, up to and without eos."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    new = out[0, len(prompt) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]
