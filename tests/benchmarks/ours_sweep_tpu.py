"""Our side of the sweep's TPU row: a population's step compiled for a slice that is not here."""

import json
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from jax.experimental import topologies

from jaxtune import assemble, population, sharding
from jaxtune.config import Config, freeze
from jaxtune.plan import sizes

MODEL, TOPOLOGY = "meta-llama/Llama-3.2-1B", "v5e:2x4"
ROWS, LENGTH = 8, 32  # of a trial: 256 tokens, a row for each chip


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    values = Config().to_dict()
    values["model"] |= {"path": MODEL, "remat": "full"}
    values["lora"] |= {"r": 16, "alpha": 32.0}
    values["train"]["batch_size"], values["data"]["max_length"] = ROWS, LENGTH
    config = freeze(values)
    with sizes.folder_of(MODEL) as folder:
        mesh = sharding.make_mesh(config.mesh, devices)
        assembly = assemble.assemble(config, folder, mesh, weights=False)
        layout = population.lay_out(config, assembly, mesh, ROWS)
        found = []
        for width in (1, 8):
            memory = layout.step(width, LENGTH).compile().memory_analysis()
            assert memory is not None
            found.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    print(json.dumps({"bytes": found}))


if __name__ == "__main__":
    main()
