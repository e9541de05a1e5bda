"""Our side: the training step that `jaxtune train` runs. Run by run.py.

Reads commands on stdin, one a line, and answers each with one JSON object on stdout.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import assemble, setup, sharding
from jaxtune.config import Config, freeze
from jaxtune.data import packing, pipeline
from jaxtune.step import jit_eval, jit_train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("documents")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    args = parser.parse_args()
    config = _config(args.adapter)
    mesh = sharding.make_mesh(config.mesh)
    jax.set_mesh(mesh)
    assembly = assemble.assemble(config, Path(args.base), mesh)
    program = setup.program(config, assembly, steps=1)
    state, frozen = setup.initial(config, assembly, program, mesh)
    train_step, eval_step = jit_train(program, state), jit_eval(program)
    rows = pipeline.eval_batches(_rows(args.documents, args.length), args.rows)
    batches = list(setup.to_mesh(rows, mesh))

    def first() -> dict[str, Any]:
        nonlocal state
        state, measured = train_step(state, frozen, batches[0])
        return {"loss": float(measured.loss.total / measured.loss.weight)}

    def evaluate() -> dict[str, Any]:
        terms = [eval_step(state.trainable, frozen, batch) for batch in batches]
        return {"loss": float(sum(t.total for t in terms) / sum(t.weight for t in terms))}

    def train() -> dict[str, Any]:
        nonlocal state
        started, used, terms = time.perf_counter(), _cpu(), []
        for batch in batches:
            state, measured = train_step(state, frozen, batch)
            terms.append(measured.loss)
        jax.block_until_ready(state)
        seconds, used = time.perf_counter() - started, _cpu() - used
        losses = [float(term.total / term.weight) for term in terms]
        return {"seconds": seconds, "cpu": used, "losses": losses}

    commands = {"evaluate": evaluate, "train": train, "first": first}
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _config(adapter: str) -> Config:
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    values = Config().to_dict()
    values["model"] |= {"dtype": "float32", "param_dtype": "float32"}
    values["lora"] |= {"r": settings["r"], "alpha": float(settings["lora_alpha"]), "init": adapter}
    values["optim"] |= {"lr": 1e-4, "schedule": "constant", "warmup": 0}
    return freeze(values)


def _rows(file: str, length: int) -> packing.Rows:
    arrays = np.load(file)
    tokens = np.split(arrays["tokens"], arrays["ends"][:-1])
    masks = np.split(arrays["mask"], arrays["ends"][:-1])
    documents = [packing.Example(t, m, "") for t, m in zip(tokens, masks, strict=True)]
    return packing.pack([documents], length, True)


if __name__ == "__main__":
    main()
