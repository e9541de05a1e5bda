"""What both sides of gpu.py read: a random checkpoint, an adapter on it, rows of tokens.

    python gpu_inputs.py FOLDER CONFIG_JSON --rows 1 --length 4096 --steps 8 --dtype bfloat16

writes FOLDER/base (safetensors in shards), FOLDER/adapter (PEFT's files) and FOLDER/tokens.npy
(int32 [steps, rows, length]). Numbers come from the seed and the tensor's place alone, by as many
threads as there are cores: 16 GB take half a minute on sixteen.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

RANK, ALPHA = 16, 32
SHARD = 1 << 30  # bytes of one file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=json.loads)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    args = parser.parse_args()
    write_base(args.folder / "base", args.config, args.dtype)
    write_adapter(args.folder / "adapter", args.config)
    shape = (args.rows, args.length)
    tokens = np.random.default_rng(0).integers(0, args.config["vocab_size"], shape, np.int32)
    # The same rows at every step: nothing else of random tokens can be learnt.
    np.save(args.folder / "tokens.npy", np.broadcast_to(tokens, (args.steps, *shape)))


def projections(hf: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{name below `model.layers.N.`: (outputs, inputs)}."""
    width, inner = hf["hidden_size"], hf["intermediate_size"]
    keys = width // hf["num_attention_heads"] * hf["num_key_value_heads"]
    return {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def write_base(folder: Path, hf: dict[str, Any], dtype: str) -> None:
    """A random Llama; matrices of deviation 0.02, norms of one."""
    folder.mkdir(parents=True)
    layers = range(hf["num_hidden_layers"])
    table, vector = (hf["vocab_size"], hf["hidden_size"]), (hf["hidden_size"],)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
    }
    for layer in layers:
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.{n}.weight": shape for n, shape in projections(hf).items()}
        shapes |= dict.fromkeys(
            (f"{start}.input_layernorm.weight", f"{start}.post_attention_layernorm.weight"), vector
        )
    shapes["model.norm.weight"] = vector
    shards: list[dict[str, int]] = [{}]  # {name: place among all}
    size = 0
    for place, (name, shape) in enumerate(shapes.items()):
        size += int(np.prod(shape)) * (2 if dtype == "bfloat16" else 4)
        if shards[-1] and size > SHARD * len(shards):
            shards.append({})
        shards[-1][name] = place
    where = {}
    with ThreadPoolExecutor() as pool:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            made = pool.map(lambda item: tensor(shapes[item[0]], item[1], dtype), shard.items())
            save_file(dict(zip(shard, made, strict=True)), folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf))


def tensor(shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    if len(shape) == 1:
        values = np.ones(shape, np.float32)
    else:
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)
        values *= 0.02
    if dtype == "float32":
        return values
    # Cut, not rounded: a shift runs without Python's lock, ml_dtypes' conversion does not.
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def write_adapter(folder: Path, hf: dict[str, Any]) -> None:
    """A new LoRA on every projection as peft makes it, but with the same A for both sides."""
    folder.mkdir(parents=True)
    random, tensors = np.random.default_rng(1), {}
    for layer in range(hf["num_hidden_layers"]):
        for name, (outputs, inputs) in projections(hf).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            a_RI = random.uniform(-(inputs**-0.5), inputs**-0.5, (RANK, inputs))
            tensors[f"{module}.lora_A.weight"] = a_RI.astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = np.zeros((outputs, RANK), np.float32)
    save_adapter(folder, tensors, hf, RANK, ALPHA)


def save_adapter(
    folder: Path, tensors: dict[str, np.ndarray], hf: dict[str, Any], rank: int, alpha: int
) -> None:
    """PEFT's files of an adapter on every projection."""
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.split(".")[-1] for name in projections(hf)}),
        "bias": "none",
        "inference_mode": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
