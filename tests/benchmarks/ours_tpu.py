"""Our side of the TPU rows: compiles the LoRA step for a topology without one. Run by run.py.

Prints one JSON object: bytes a chip, and seconds (of the clock, of
processors) from the config to the compiled program.
"""

import argparse
import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import protocol
from jax.experimental import topologies

from jaxtune import aot, assemble, setup, sharding
from jaxtune.config import Config, freeze
from jaxtune.plan import sizes

MODELS = {"8b": "meta-llama/Llama-3.1-8B", "1b": "meta-llama/Llama-3.2-1B"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("rows", type=int, help="of the global batch")
    parser.add_argument("length", type=int)
    parser.add_argument("topology")
    args = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    started, used = time.perf_counter(), protocol.processor_seconds()
    values = Config().to_dict()
    values["model"] |= {"path": MODELS[args.model], "remat": "full"}
    values["lora"] |= {"r": 16, "alpha": 32.0}
    values["train"]["batch_size"], values["data"]["max_length"] = args.rows, args.length
    config = freeze(values)
    with sizes.folder_of(config.model.path) as folder:
        mesh = sharding.make_mesh(config.mesh, devices)
        assembly = assemble.assemble(config, folder, mesh, weights=False)
        try:
            compiled = aot.compile_step(config, assembly, setup.program(config, assembly, 1), mesh)
        except aot.OutOfMemory as error:
            print(json.dumps({"bytes": None, "needed": error.needed}))
            return
    seconds, used = time.perf_counter() - started, protocol.processor_seconds() - used
    print(json.dumps({"bytes": compiled.total, "seconds": seconds, "cpu": used}))


if __name__ == "__main__":
    main()
