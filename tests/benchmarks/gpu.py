"""Tokens a second of a LoRA step on one GPU, beside transformers + peft: no network, ten minutes.

    python tests/benchmarks/gpu.py [--size 8b|3b|1b|tiny] [--sides ours,peft]

The shape of Llama 3.1 8B (or the largest below it that both sides have memory for), random bfloat16
weights, r = 16 on every projection, rows of 4,096 packed tokens, AdamW. Each side runs in its own
process, one after the other, and makes its weights on the device. The peer is transformers' model
with peft and the fastest attention of those installed (flash_attention_2, else sdpa), gradient
checkpointing on only where it does not fit without. MFU is at 4 FLOPs a parameter and token
of the layers and the head, of the GPU's dense bfloat16 peak. Prints a table and one JSON line.

Weights are random on both sides and not the same, so losses are only checked to be ln(vocabulary).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    # width, mlp width, layers, heads, key and value heads, vocabulary
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (128, 256, 2, 4, 2, 512),
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
STEPS, WARM = 8, 3


def config_of(size: str, length: int) -> dict[str, Any]:
    width, inner, layers, heads, kv_heads, vocab = SHAPES[size]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max(length, 4096),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def flops(size: str) -> float:
    """4N a token: N of the projections and the head, frozen, so no gradient of a weight."""
    width, inner, layers, heads, kv_heads, vocab = SHAPES[size]
    attention = 2 * width * width * (1 + kv_heads / heads)
    return 4 * (layers * (attention + 3 * width * inner) + width * vocab)


def ours(size: str, rows: int, length: int) -> dict[str, Any]:
    """jaxtune's own step, with its remat policy `auto`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxtune import aot, assemble, setup, sharding, tree
    from jaxtune.config import Config, freeze
    from jaxtune.step import init_state, jit_train

    values = Config().to_dict()
    values["lora"] |= {"r": 16, "alpha": 32.0}
    values["train"]["batch_size"], values["data"]["max_length"] = rows, length
    config = freeze(values)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_of(size, length)))
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        config = aot.resolve_remat(config, folder, mesh)
        assembly = assemble.assemble(config, folder, mesh, weights=False)
    program = setup.program(config, assembly, steps=STEPS)
    jax.set_mesh(mesh)
    random = np.random.default_rng(0)
    base = {}
    for path, leaf in assembly.shapes.items():
        if ".lora." not in path:
            norm = "norm" in path
            draw = jnp.ones if norm else _normal(len(base))
            base[path] = jax.jit(draw, static_argnums=(0, 1), out_shardings=leaf.sharding)(
                leaf.shape, leaf.dtype
            )
    trainable, frozen = tree.partition(base | assemble.fresh(config, assembly), assembly.groups)
    state = init_state(program, trainable)
    _, _, shapes = setup.abstract_inputs(config, assembly, program, mesh)
    tokens = random.integers(0, SHAPES[size][-1], (rows, length + 1), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    given = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}
    batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    batch = batch._replace(**{name: jnp.asarray(array) for name, array in given.items()})
    step = jit_train(program, state)
    seconds, loss = [], math.nan
    for _ in range(STEPS):
        started = time.perf_counter()
        state, measured = step(state, frozen, batch)
        loss = float(measured.loss.total / measured.loss.weight)  # waits for the step
        seconds.append(time.perf_counter() - started)
    device = jax.devices()[0]
    note = f"jax {jax.__version__}, remat {config.model.remat}"
    return {"seconds": seconds, "loss": loss, "device": device.device_kind, "note": note}


def _normal(salt: int):
    import jax

    def draw(shape, dtype):
        return 0.02 * jax.random.normal(jax.random.key(salt), shape, dtype)

    return draw


def peft(size: str, rows: int, length: int) -> dict[str, Any]:
    """transformers + peft, its forward and backward as TRL's SFTTrainer calls them, packed rows."""
    import importlib.util

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
    attention = "flash_attention_2" if flash else "sdpa"
    settings = config_of(size, length)
    settings["attn_implementation"] = attention
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    tokens = torch.randint(0, SHAPES[size][-1], (rows, length), device=device)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    remat = False
    try:
        step()
    except torch.OutOfMemoryError:
        remat = True
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    seconds, loss = [], math.nan
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    note = f"torch {torch.__version__}, {attention}, checkpointing {'on' if remat else 'off'}"
    return {"seconds": seconds, "loss": loss, "device": name, "note": note}


SIDES = {"ours": ours, "peft": peft}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--sides", default="ours,peft")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", choices=SIDES, help="run this side here and print its JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(SIDES[args.only](args.size, args.rows, args.length)))
        return
    names = list(SHAPES)
    for size in names[names.index(args.size) :]:
        found = {side: apart(side, size, args) for side in args.sides.split(",")}
        if all(found.values()):
            break
        print(f"{size}: not on every side, trying a smaller one", file=sys.stderr)
    else:
        raise SystemExit("no size runs on every side")
    report(size, args.rows * args.length, found)


def apart(side: str, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """A side in a process of its own, so that it has the memory for itself; {} where it failed."""
    command = [sys.executable, __file__, "--only", side, "--size", size]
    command += ["--rows", str(args.rows), "--length", str(args.length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{side} {size}: {done.stderr.strip()[-800:]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def report(size: str, tokens: int, found: dict[str, dict[str, Any]]) -> None:
    expected, speeds = math.log(SHAPES[size][-1]), {}
    for side, result in found.items():
        assert abs(result["loss"] - expected) < 0.2 * expected, f"{side}: loss {result['loss']}"
        timed = sorted(result["seconds"][WARM:])
        speeds[side] = tokens / timed[len(timed) // 2]
        peak = next((p for name, p in PEAKS.items() if name in result["device"]), None)
        mfu = f"{speeds[side] * flops(size) / peak:.1%}" if peak else "unknown peak"
        print(f"{side:5} {size} {speeds[side]:>10,.0f} tokens/s  MFU(4N) {mfu}  {result['note']}")
    if len(speeds) == 2:
        print(f"ratio {speeds['ours'] / speeds['peft']:.2f} (target 1.25; MFU 45%)")
    print(json.dumps({"size": size, "tokens_per_second": speeds, "sides": found}))


if __name__ == "__main__":
    main()
