"""Our own memory, reading and start-up. Part of run.py."""

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import inputs
from table import ROOT, Result, measured


def loading(work: Path, rounds: int) -> list[Result]:
    """Reading about 1 GB beside a plain read of the same bytes; peaks of reading and of merging."""
    results = []
    for dtype, name, layers in (("float32", "float32", 2), (inputs.BFLOAT16, "bfloat16", 6)):
        folder = work / f"large-{name}"
        sizes = inputs.LARGE | {"num_hidden_layers": layers}
        inputs.write_base(folder, sizes, dtype)
        timed = measured("loading.py", "time", folder, 3 * rounds)
        # Their best rounds: what else the machine does only ever adds to either side.
        ratio = min(timed["ours"]) / min(timed["plain"])
        results.append(
            Result(
                f"reading {name} to bfloat16, over a plain read", timed["ours"], timed["plain"],
                "s", ratio, "<= 1.5", ratio <= 1.5, "best round over best round",
            )
        )  # fmt: skip
        found = measured("loading.py", "memory", folder)
        limit = 1.15 * found["bytes"] + 300e6
        results.append(memory(f"peak memory of that, {name}", found, limit, "the loaded size"))
        inputs.write_adapter(work / f"adapter-{name}", sizes)
        merge = measured("merging.py", folder, work / f"adapter-{name}", work / f"merged-{name}")
        limit = 1.5 * merge["bytes"] + 500e6
        results.append(memory(f"memory of merging LoRA, {name}", merge, limit, "one shard"))
        for made in ("large", "adapter", "merged"):
            shutil.rmtree(work / f"{made}-{name}")
    return results


def memory(name: str, found: dict[str, Any], limit: float, beside: str) -> Result:
    peak, size = found["peak_bytes"], found["bytes"]
    return Result(
        name, [peak / 1e6], [size / 1e6], "MB", peak / size, f"<= {limit / 1e6:.0f} MB",
        peak <= limit, f"beside {beside}",
    )  # fmt: skip


def start(work: Path, rounds: int) -> list[Result]:
    """`jaxtune --help` over a bare interpreter, in processor seconds."""
    del work
    program = ROOT / ".venv" / "bin" / "jaxtune"
    commands = ([str(program), "--help"], [sys.executable, "-c", "pass"])
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 * rounds):
        for command, seconds in zip(commands, times, strict=True):
            before = os.times()
            subprocess.run(command, check=True, capture_output=True)
            after = os.times()
            children = ("children_user", "children_system")
            seconds.append(sum(getattr(after, k) - getattr(before, k) for k in children))
    over = statistics.median(times[0]) - statistics.median(times[1])
    return [
        Result(
            "jaxtune --help beside bare python, processor time", *times, "s", over,
            "<= 0.30 s over", over <= 0.3,
        )
    ]  # fmt: skip
