"""Loads a checkpoint as `jaxtune train` does and prints its peak memory. Run by run.py."""

import argparse
import json
from pathlib import Path

import jax

from jaxtune import assemble, sharding
from jaxtune.config import Config, ModelConfig, freeze


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    args = parser.parse_args()
    model = ModelConfig(path=args.base, dtype="bfloat16", param_dtype="bfloat16")
    config = freeze(Config(model=model).to_dict())
    mesh = sharding.make_mesh(config.mesh)
    params = assemble.base(assemble.assemble(config, Path(args.base), mesh))
    jax.block_until_ready(params)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    result = {
        "bytes": sum(leaf.nbytes for leaf in params.values()),
        "peak_bytes": int(peak.split()[1]) << 10,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
