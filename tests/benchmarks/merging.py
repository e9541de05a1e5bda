"""Merges a LoRA adapter into a sharded checkpoint and prints the memory it took. Run by run.py.

`bytes` are those of the largest shard, `peak_bytes` those beyond what the imports took.
"""

import argparse
import json
from pathlib import Path

from loading import peak_bytes

from jaxtune.hf.convert import convert


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "adapter", "out"):
        parser.add_argument(name)
    args = parser.parse_args()
    before = peak_bytes()
    written = convert(args.base, args.out, adapter=args.adapter)
    assert written.changed
    shard = max(path.stat().st_size for path in Path(args.base).glob("*.safetensors"))
    print(json.dumps({"bytes": shard, "peak_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main()
