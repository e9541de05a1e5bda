"""Our side of gpu.py: the step of `jaxtune train`, model.remat=auto, on what gpu_inputs.py wrote.

Prints one JSON object: seconds and loss of every step, the device, its peak memory.
"""

import argparse
import json
import time
from pathlib import Path

from jaxtune import flags, heap

flags.apply()
heap.keep_freed()  # both as the command line does, before jax starts

import jax  # see above
import numpy as np

from jaxtune import aot, assemble, setup, sharding
from jaxtune.config import Config, freeze
from jaxtune.data.packing import Batch
from jaxtune.step import jit_train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--lr", type=float, required=True)
    args = parser.parse_args()
    tokens_SBT = np.load(args.folder / "tokens.npy")
    config = config_of(args.folder, args.dtype, args.lr, tokens_SBT.shape)
    base = args.folder / "base"
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    assembly = assemble.assemble(config, base, mesh)
    config, assembly = aot.resolve_remat(config, assembly, mesh)
    jax.set_mesh(mesh)
    program = setup.program(config, assembly, len(tokens_SBT))
    state, frozen = setup.initial(config, assembly, program, mesh)
    step = jit_train(program, state)
    seconds, losses = [], []
    for given in setup.to_mesh(map(batch, tokens_SBT), mesh):
        started = time.perf_counter()
        state, measured = step(state, frozen, given)
        losses.append(float(measured.loss.total / measured.loss.weight))  # waits for the step
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    note = f"jax {jax.__version__}, remat {config.model.remat}"
    found = {"seconds": seconds, "losses": losses, "device": device.device_kind}
    print(json.dumps(found | {"memory": memory, "note": note}))


def config_of(folder: Path, dtype: str, lr: float, shape: tuple[int, ...]) -> Config:
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    values = Config().to_dict()
    values["model"] |= {"dtype": dtype, "param_dtype": dtype}
    values["lora"] |= {
        "r": adapter["r"],
        "alpha": float(adapter["lora_alpha"]),
        "init": str(folder / "adapter"),
    }
    values["optim"] |= {"lr": lr, "schedule": "constant", "warmup": 0}
    values["train"]["batch_size"], values["data"]["max_length"] = shape[1:]
    return freeze(values)


def batch(tokens_BT: np.ndarray) -> Batch:
    """One document a row; the last token of a row has no next one, as in transformers' loss."""
    weights_BT = np.ones(tokens_BT.shape, np.float32)
    weights_BT[:, -1] = 0
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    ones_BT = np.ones(tokens_BT.shape, np.int32)
    return Batch(tokens_BT, np.roll(tokens_BT, -1, axis=1), weights_BT, positions_BT, ones_BT)


if __name__ == "__main__":
    main()
