"""Our side: the training step that `jaxtune train` runs. Run by run.py.

Reads commands on stdin, one a line, and answers each with one JSON object on stdout.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import protocol

from jaxtune import cores, heap
from jaxtune.config import Config, freeze


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("documents")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    config = _config(args.adapter, args.dtype, args.rows, args.length)
    os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    cores.share(config)  # all as `jaxtune train` does, before jax is there
    heap.keep_freed()
    heap.pause_collector()
    serve(config, args)


def serve(config: Config, args: argparse.Namespace) -> None:
    import jax

    from jaxtune import aot, assemble, setup, sharding
    from jaxtune.data import packing, pipeline

    mesh = sharding.make_mesh(config.mesh)
    assembly = assemble.assemble(config, Path(args.base), mesh)
    config, assembly = aot.resolve_remat(config, assembly, mesh)
    jax.set_mesh(mesh)
    program = setup.program(config, assembly, steps=1)
    train_step, eval_step = aot.steps(config, assembly, program, mesh, (args.length, None))
    state, frozen = setup.initial(config, assembly, program, mesh)
    documents = protocol.documents(args.documents)
    rows = packing.pack([[packing.Example(*each, "") for each in documents]], args.length, True)
    batches = list(setup.to_mesh(pipeline.eval_batches(rows, args.rows), mesh))
    heap.resume_collector()

    def first() -> dict[str, Any]:
        nonlocal state
        state, measured = train_step(state, frozen, batches[0])
        return {"loss": float(measured.loss.total / measured.loss.weight)}

    def evaluate() -> dict[str, Any]:
        terms = [eval_step(state.trainable, frozen, batch) for batch in batches]
        return {"loss": float(sum(t.total for t in terms) / sum(t.weight for t in terms))}

    def train() -> dict[str, Any]:
        nonlocal state
        started, used, terms = time.perf_counter(), protocol.processor_seconds(), []
        for batch in batches:
            state, measured = train_step(state, frozen, batch)
            terms.append(measured.loss)
        jax.block_until_ready(state)
        seconds, used = time.perf_counter() - started, protocol.processor_seconds() - used
        losses = [float(term.total / term.weight) for term in terms]
        return {"seconds": seconds, "cpu": used, "losses": losses}

    protocol.serve({"evaluate": evaluate, "train": train, "first": first})


def _config(adapter: str, dtype: str, rows: int, length: int) -> Config:
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    values = Config().to_dict()
    values["model"] |= {"dtype": dtype, "param_dtype": dtype}
    values["lora"] |= {"r": settings["r"], "alpha": float(settings["lora_alpha"]), "init": adapter}
    values["optim"] |= {"lr": 1e-4, "schedule": "constant", "warmup": 0}
    values["train"]["batch_size"], values["data"]["max_length"] = rows, length
    return freeze(values)


if __name__ == "__main__":
    main()
