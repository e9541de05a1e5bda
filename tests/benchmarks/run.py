"""`make bench`: jaxtune beside transformers + peft and google-tunix, its memory and start-up.

Builds environments for the peers in .bench/ (peers.txt and peers_tunix.txt pin them), prints a
table and writes .bench/result.json. Rounds of two sides alternate, so both see the same state of
the machine, and the losses must agree or there is no ratio. Exits with 1 when a target is missed.
The TPU rows take an hour of two cores, and those of the sweep half of one, and so they run only
when asked for: --only tpu, sweep, quality or sweep-tpu.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import inputs
import own
import steps
import sweep
import tpu
from table import BENCH, HERE, PEFT, ROOT, TUNIX, Result, line, make_environment, versions

PARTS = {
    "step": steps.padded,
    "alpaca": steps.alpaca,
    "tunix": steps.tunix,
    "start": steps.start,
    "loading": own.loading,
    "help": own.start,
}
HEAVY = {
    "tpu": tpu.rows,
    "sweep": sweep.clock,
    "quality": sweep.quality,
    "sweep-tpu": sweep.tpu,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=(*PARTS, *HEAVY))
    args = parser.parse_args()
    make_environment(PEFT, HERE / "peers.txt", "torch", "transformers", "peft")
    make_environment(TUNIX, HERE / "peers_tunix.txt", "google-tunix", "libtpu")
    used = {
        "jaxtune": versions(sys.executable, "jax", "jaxlib", "flax", "optax", "libtpu"),
        "peft": versions(PEFT, "torch", "transformers", "peft"),
        "tunix": versions(TUNIX, "google-tunix", "qwix", "jax", "jaxlib", "flax", "libtpu"),
    }
    for side, packages in used.items():
        print(f"{side}: " + ", ".join(f"{name} {number}" for name, number in packages.items()))
    work = BENCH / "work"
    shutil.rmtree(work, ignore_errors=True)
    parameters = inputs.write_base(work / "base", inputs.SMALL)
    inputs.write_adapter(work / "adapter", inputs.SMALL)
    results: list[Result] = []
    for name in (args.only,) if args.only else PARTS:
        found = (PARTS | HEAVY)[name](work, args.rounds)
        results += found
        for result in found:
            print(line(result), flush=True)
    shutil.rmtree(work)
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    report = {
        "machine": machine,
        "versions": used,
        "parameters": parameters,
        "results": [dataclasses.asdict(result) for result in results],
    }
    (BENCH / "result.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{machine['cpu']}, {machine['cores']} cores, load {machine['load'][0]:.1f} at the end")
    print(f"all numbers: {BENCH.relative_to(ROOT) / 'result.json'}")
    sys.exit(not all(result.met for result in results))


def cpu() -> str:
    """The processor's name, or its architecture where the kernel does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
