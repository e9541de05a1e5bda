"""Another side: google-tunix's LoRA step, its own model, loss and adapters. Run by run.py.

Reads commands on stdin, one a line, and answers each with one JSON object on stdout.
"""

# pyright: reportMissingImports=false
# These packages are in the environment that run.py makes, not in ours.

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
import qwix
from flax import nnx
from safetensors.numpy import load_file
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.sft import peft_trainer

PROJECTIONS = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("documents")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, default=0)
    args = parser.parse_args()
    hf = json.loads((Path(args.base) / "config.json").read_text())
    model = adapted(load(args.base, hf), args.adapter, hf)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.0))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam)
    batches = [inputs(*batch) for batch in protocol.padded(args.documents, args.rows, args.length)]

    def update(model, optimizer, *batch):
        gradient = nnx.value_and_grad(
            peft_trainer._default_loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )
        loss, gradients = gradient(model, *batch)
        optimizer.update(model, gradients)
        return loss

    step = nnx.cached_partial(nnx.jit(update, donate_argnames=("optimizer",)), model, optimizer)
    score = nnx.cached_partial(nnx.jit(peft_trainer._default_loss_fn), model)

    def evaluate() -> dict:
        weights = [float(jnp.sum(mask_BT[:, 1:])) for _, mask_BT, _, _ in batches]
        losses = [float(score(*batch)) for batch in batches]
        return {"loss": float(np.average(losses, weights=weights))}

    def train() -> dict:
        started, used = time.perf_counter(), protocol.processor_seconds()
        losses = jax.block_until_ready([step(*batch) for batch in batches])
        seconds = time.perf_counter() - started
        used = protocol.processor_seconds() - used
        return {"seconds": seconds, "cpu": used, "losses": [float(loss) for loss in losses]}

    def first() -> dict:
        return {"loss": float(step(*batches[0]))}

    protocol.serve({"evaluate": evaluate, "train": train, "first": first})


def load(folder: str, hf: dict) -> llama.Llama3:
    """Their model with the checkpoint's weights, read by their loader."""
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=hf["rms_norm_eps"],
    )
    return params.create_model_from_safe_tensors(folder, config, dtype=jnp.float32)


def adapted(model: llama.Llama3, adapter: Path, hf: dict) -> llama.Llama3:
    """The same with qwix's adapters, which get the weights of a PEFT adapter."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    provider = qwix.LoraProvider(
        module_path=PROJECTIONS, rank=settings["r"], alpha=settings["lora_alpha"]
    )
    inputs = model.get_model_input()
    model = qwix.apply_lora_to_model(model, provider, **inputs, rngs=nnx.Rngs(0))
    tensors = load_file(adapter / "adapter_model.safetensors")
    filled = 0
    for number in range(hf["num_hidden_layers"]):
        layer = model.layers[number]
        for theirs, name, part in (
            *((layer.attn, f"self_attn.{x}_proj", f"{x}_proj") for x in "qkvo"),
            *((layer.mlp, f"mlp.{x}_proj", f"{x}_proj") for x in ("gate", "up", "down")),
        ):
            module = getattr(theirs, part)
            kernel = "w" if hasattr(module, "w_lora_a") else "kernel"
            for factor in "ab":
                stored = f"base_model.model.model.layers.{number}.{name}.lora_{factor.upper()}"
                variable = getattr(module, f"{kernel}_lora_{factor}")
                values = tensors[f"{stored}.weight"].T.reshape(variable.value.shape)
                variable.value = jnp.asarray(values)
                filled += 1
    assert filled == len(tensors), "some adapters found no place"
    return model


def inputs(tokens_BT, attended_BT, mask_BT) -> tuple[jax.Array, ...]:
    """(tokens, which bear loss, positions, who sees whom) as their trainer takes them."""
    rows, length = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(length), (rows, length))
    sees_BTT = np.tril(np.ones((length, length), bool)) & attended_BT[:, None, :].astype(bool)
    whole = (tokens_BT.astype(np.int32), mask_BT.astype(np.int32), positions_BT, sees_BTT)
    return tuple(jnp.asarray(array) for array in whole)


if __name__ == "__main__":
    main()
