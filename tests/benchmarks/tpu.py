"""The TPU rows: Llama LoRA compiled for a slice that is not here, beside google-tunix. For run.py.

Heavy: google-tunix takes minutes to compile its 8B step. Run alone with --only tpu.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from table import HERE, TUNIX, Result

GIB = 2**30
TOPOLOGY, CHIPS, LENGTH = "v5e:2x4", 8, 2048
MOST = 32  # rows a chip that are tried


def rows(work: Path, rounds: int) -> list[Result]:
    del work, rounds  # a compiler's answer does not vary
    ours, theirs = compiled(sys.executable, "8b", 1), compiled(TUNIX, "8b", 1)
    small = compiled(sys.executable, "1b", 1), compiled(TUNIX, "1b", 1)
    results = [
        memory("Llama 3.1 8B LoRA, memory a chip", ours, theirs, 4.3),
        memory("Llama 3.2 1B LoRA, memory a chip", *small, 1.1),
    ]
    for clock, name in (("seconds", "compiling the 8B step"), ("cpu", "the same, processor time")):
        ratio = ours[clock] / theirs[clock]
        results.append(
            Result(name, [ours[clock]], [theirs[clock]], "s", ratio, "<= 0.25", ratio <= 0.25)
        )
    most, theirs_most = (largest(python) for python in (sys.executable, TUNIX))
    ratio = most / theirs_most
    results.append(
        Result(
            "8B, largest tokens a chip", [most * LENGTH], [theirs_most * LENGTH], "tokens", ratio,
            ">= 8", ratio >= 8, f"in rows of {LENGTH}, doubled while they compile",
        )
    )  # fmt: skip
    return results


def compiled(python: str | Path, model: str, rows: int) -> dict[str, Any]:
    """What a side's compiler says of a global batch of `rows` a chip; bytes None: too large."""
    script = "peer_tunix_tpu.py" if python == TUNIX else "ours_tpu.py"
    command = [python, HERE / script, model, str(rows * CHIPS), str(LENGTH), TOPOLOGY]
    output = subprocess.run(
        [str(part) for part in command],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    ).stdout
    return json.loads(output)


def largest(python: str | Path) -> int:
    """Rows a chip of the 8B model that compile: the last of 1, 2, 4, ... that does."""
    most = 1
    while most < MOST and compiled(python, "8b", 2 * most)["bytes"]:
        most *= 2
    return most


def memory(name: str, ours: dict[str, Any], theirs: dict[str, Any], limit: float) -> Result:
    sizes = [side["bytes"] / GIB for side in (ours, theirs)]
    return Result(
        name, sizes[:1], sizes[1:], "GiB", sizes[0] / sizes[1], f"<= {limit} GiB",
        sizes[0] <= limit,
    )  # fmt: skip
