"""What every side of a comparison shares: documents as batches, the clock, questions on stdin.

Needs numpy alone, so that it runs in the peers' environments.
"""

import json
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def serve(commands: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
    """Reads commands on stdin, one a line, and answers each with one JSON object on stdout."""
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


def processor_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def documents(file: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, which of them bear loss) of every document of a file of inputs.py."""
    arrays = np.load(file)
    parts = [np.split(arrays[name], arrays["ends"][:-1]) for name in ("tokens", "mask")]
    return list(zip(*parts, strict=True))


def padded(file: str, rows: int, length: int = 0) -> list[tuple[np.ndarray, ...]]:
    """Batches (tokens, attended, with loss), all [rows, T], of `rows` documents each.

    T is the longest document's of the batch, or `length` where that is given.
    """
    every, batches = documents(file), []
    for start in range(0, len(every), rows):
        some = every[start : start + rows]
        shape = (len(some), length or max(len(tokens) for tokens, _ in some))
        batch = (np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool))
        for row, (tokens, mask) in enumerate(some):
            for array, values in zip(batch, (tokens, 1, mask), strict=True):
                array[row, : len(tokens)] = values
        batches.append(batch)
    return batches
