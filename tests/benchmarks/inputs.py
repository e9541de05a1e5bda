"""What both sides of a benchmark read: a random checkpoint, an adapter on it, tokenised documents.

A file of documents holds `tokens` and `mask` (of tokens that bear loss), end to end, and `ends`.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gpu_inputs import projections, save_adapter
from safetensors.numpy import save_file

from jaxtune.config import Config, DataConfig, freeze
from jaxtune.data import pipeline
from jaxtune.hf.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
SEED = 0
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# The model of the step benchmarks (15M parameters in the layers and norms, 2 x 9M in the tables).
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LARGE = SMALL | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}  # of the loading benchmark: 131M parameters and 67M a layer
RANK, ALPHA = 8, 16
SHARD = 256 << 20  # bytes of one file of a large checkpoint


def write_base(folder: Path, hf: dict[str, Any], dtype: Any = np.float32) -> int:
    """A random checkpoint in shards; returns its number of parameters."""
    folder.mkdir(parents=True)
    shapes = {f"model.{name}.weight": (hf["hidden_size"],) for name in _norms(hf)}
    shapes |= {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(hf["num_hidden_layers"])
        for name, shape in projections(hf).items()
    }
    table = (hf["vocab_size"], hf["hidden_size"])
    shapes |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    random = np.random.default_rng(SEED)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes.items():
        if sum(values.nbytes for values in shards[-1].values()) > SHARD:
            shards.append({})
        noise = 0.02 * random.standard_normal(shape, np.float32)
        shards[-1][name] = (noise + (len(shape) == 1)).astype(dtype)
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf))
    return sum(int(np.prod(shape)) for shape in shapes.values())


def write_adapter(folder: Path, hf: dict[str, Any]) -> None:
    """A PEFT adapter with a B that is not zero, so that every part of it shows in the loss."""
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(SEED), {}
    for layer in range(hf["num_hidden_layers"]):
        for name, (outputs, inputs) in projections(hf).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            bound = inputs**-0.5
            a_RI = random.uniform(-bound, bound, (RANK, inputs))
            b_OR = 0.02 * random.standard_normal((outputs, RANK))
            tensors[f"{module}.lora_A.weight"] = a_RI.astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = b_OR.astype(np.float32)
    save_adapter(folder, tensors, hf, RANK, ALPHA)


def write_even_documents(
    file: Path, count: int, length: int, vocab: int = SMALL["vocab_size"]
) -> None:
    """Random documents of one length; every token bears loss."""
    random = np.random.default_rng(SEED)
    documents = random.integers(0, vocab, (count, length), np.int32)
    _save(file, [(tokens, np.ones(length, bool)) for tokens in documents])


def write_alpaca(file: Path, count: int) -> int:
    """A random sample of alpaca_2k rows, by jaxtune's own reader and the Llama-2 tokenizer.

    Returns its number of tokens.
    """
    data = DataConfig(train=str(SHARED / "instruct" / "alpaca_2k.json"), max_length=2048)
    config = freeze(Config(data=data).to_dict())
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "llama2"))
    rows = pipeline.prepare(config, tokenizer, lambda message: None).train
    chosen = np.random.default_rng(SEED).choice(rows.examples, count, replace=False)
    documents = [rows.example(index) for index in chosen]
    _save(file, documents)
    return sum(len(tokens) for tokens, _ in documents)


def _norms(hf: dict[str, Any]) -> list[str]:
    layers = range(hf["num_hidden_layers"])
    names = ("input_layernorm", "post_attention_layernorm")
    return [f"layers.{layer}.{name}" for layer in layers for name in names] + ["norm"]


def _save(file: Path, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
    tokens, masks = zip(*documents, strict=True)
    ends = np.cumsum([len(part) for part in tokens])
    np.savez(file, tokens=np.concatenate(tokens), mask=np.concatenate(masks), ends=ends)
