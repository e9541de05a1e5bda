"""Loads a checkpoint as `jaxtune train` does: its time beside a plain read, or its peak memory.

Run by run.py, in a process for each, so that the peak is of one load and of nothing else.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxtune import assemble, sharding
from jaxtune.config import Config, ModelConfig, freeze


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("base", type=Path)
    parser.add_argument("rounds", type=int, nargs="?", default=1)
    args = parser.parse_args()
    model = ModelConfig(path=str(args.base), dtype="bfloat16", param_dtype="bfloat16")
    config = freeze(Config(model=model).to_dict())
    assembly = assemble.assemble(config, args.base, sharding.make_mesh(config.mesh))
    if args.what == "memory":
        params = jax.block_until_ready(assemble.base(assembly))
        size = sum(leaf.nbytes for leaf in params.values())
        print(json.dumps({"bytes": size, "peak_bytes": peak_bytes()}))
        return
    load = partial(assemble.base, assembly)
    load()  # compiles, as the first run on a machine does
    sides: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(args.rounds):
        sides["plain"].append(seconds(partial(read_plainly, args.base)))
        sides["ours"].append(seconds(load))
    print(json.dumps(sides))


def read_plainly(folder: Path) -> None:
    """Every byte once, a file at a time, into memory that is new."""
    for path in sorted(folder.glob("*.safetensors")):
        content = np.empty(path.stat().st_size, np.uint8)
        with path.open("rb", buffering=0) as file:
            assert file.readinto(content.data) == content.size


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    result = jax.block_until_ready(work())
    spent = time.perf_counter() - started
    del result
    return spent


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) << 10


if __name__ == "__main__":
    main()
