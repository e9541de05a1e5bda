"""google-tunix's side of the TPU rows: compiles its LoRA step for a topology. Run by run.py.

Its own sharding over "fsdp", its remat by decoder layer, base in bfloat16, as its guides have it.
Prints one JSON object: bytes a chip, and seconds (of the clock, of
processors) from the config to the compiled program.
"""

# pyright: reportMissingImports=false
# These packages are in the environment that run.py makes, not in ours.

import argparse
import dataclasses
import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
import optax
import protocol
import qwix
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from peer_tunix import PROJECTIONS
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer

MODELS = {"8b": llama.ModelConfig.llama3p1_8b, "1b": llama.ModelConfig.llama3p2_1b}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("rows", type=int, help="of the global batch")
    parser.add_argument("length", type=int)
    parser.add_argument("topology")
    args = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    started, used = time.perf_counter(), protocol.processor_seconds()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(MODELS[args.model]())))
    state = jax.tree.map(lambda *both: placed(mesh, *both), state, nnx.get_partition_spec(state))

    def step(state, *batch):
        model, optimizer = nnx.merge(graphdef, state)
        gradient = nnx.value_and_grad(
            peft_trainer._default_loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )
        loss, gradients = gradient(model, *batch)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        rows = NamedSharding(mesh, P("fsdp", *[None] * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    rows, length = args.rows, args.length
    batch = [array(jnp.int32, rows, length)] * 3 + [array(jnp.bool_, rows, length, length)]
    try:
        with mesh:
            compiled = jax.jit(step, donate_argnums=0).lower(state, *batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(json.dumps({"bytes": None, "needed": str(error)[:300]}))
        return
    seconds, used = time.perf_counter() - started, protocol.processor_seconds() - used
    memory = compiled.memory_analysis()
    assert memory is not None
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    print(json.dumps({"bytes": size, "seconds": seconds, "cpu": used}))


def build(config: llama.ModelConfig):
    """The model with adapters and its optimizer; its CLI also puts adapters in without remat."""
    plain = dataclasses.replace(config, remat_config=llama.RematConfig.NONE)
    model = llama.Llama3(plain, rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=16, alpha=32)
    inputs = model.get_model_input()
    model = qwix.apply_lora_to_model(model, provider, **inputs, rngs=nnx.Rngs(1))
    config = dataclasses.replace(config, remat_config=llama.RematConfig.DECODER)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "config"):
            setattr(module, "config", config)  # noqa: B010  # not every module declares it
        if hasattr(module, "remat_config"):
            setattr(module, "remat_config", config.remat_config)  # noqa: B010
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    return model, nnx.Optimizer(model, transform, wrt=nnx.LoRAParam)


def placed(mesh: Mesh, leaf, spec) -> jax.ShapeDtypeStruct:
    """A leaf on the mesh where its model wants it; large ones, the base, in bfloat16."""
    base = leaf.dtype == jnp.float32 and leaf.size > 5e6
    spec = getattr(spec, "value", spec)
    axes = [axis if axis in ("fsdp", "tp") else None for axis in spec] if spec else []
    place = NamedSharding(mesh, P(*axes))
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if base else leaf.dtype, sharding=place)


if __name__ == "__main__":
    main()
