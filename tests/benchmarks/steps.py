"""The CPU rows beside PEFT and google-tunix. Part of run.py."""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import inputs
from table import PEFT, TUNIX, Result, Worker, processor, race, speed

Sides = tuple[Worker, ...]
ROUGH = 2e-3  # of losses in bfloat16, whose rounding differs between two orders of sums


def padded(work: Path, rounds: int) -> list[Result]:
    """The training step at 8 x 256 tokens, all of them with loss: float32, then best dtypes."""
    file = even(work)
    results = []
    for name, ours, theirs, target, agree in (
        ("float32", (), (), 1.6, 1e-4),
        ("bfloat16", ("--dtype", "bfloat16"), ("--dtype", "bfloat16"), 1.0, ROUGH),
    ):
        sides = (us(work, file, 8, 256, *ours), peft(work, file, *theirs))
        timed = rounds_of(sides, rounds)
        results += compared(f"8 x 256, {name}, over PEFT", timed, 32 * 256, target, agree)
    return results


def alpaca(work: Path, rounds: int) -> list[Result]:
    """Real tokens a second on instruction data: batches of 8 padded to the longest, or packed."""
    file, tokens = instructions(work)
    if file is None:
        return []
    # The longest document has 663 tokens. Each core takes two rows of the four.
    sides = (us(work, file, 4, 704), peft(work, file))
    return packed("alpaca_2k packed, over PEFT padded", sides, tokens, 5.0, max(3, rounds // 2))


def tunix(work: Path, rounds: int) -> list[Result]:
    """The same beside google-tunix, which pads every batch to one length."""
    file = even(work)
    sides = (us(work, file, 8, 256), theirs(work, file, 256))
    results = compared("8 x 256, over tunix", rounds_of(sides, rounds), 32 * 256, 1.25, 1e-4)
    file, tokens = instructions(work)
    if file is None:
        return results
    sides = (us(work, file, 4, 704), theirs(work, file, 704))
    return results + packed("alpaca_2k packed, over tunix padded", sides, tokens, 3.5, 1)


def start(work: Path, rounds: int) -> list[Result]:
    """Process start to the end of step 1, beside google-tunix: compiled anew, and from a cache.

    With a warm cache both sides have one; tunix sets none by itself.
    """
    file = even(work)
    found: dict[str, tuple[list[float], list[float]]] = {"cold": ([], []), "warm": ([], [])}
    for _ in range(max(2, rounds // 2)):
        for side, make in enumerate((_us, _theirs)):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    environment = {
                        "JAX_COMPILATION_CACHE_DIR": cache,
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                    }
                    started = time.perf_counter()
                    worker = make(work, file, environment)
                    worker.ask("first")
                    found[state][side].append(time.perf_counter() - started)
                    worker.close()
    results = []
    for state, target in (("cold", 0.5), ("warm", 0.3)):
        ours, peers = found[state]
        ratio = statistics.median(a / b for a, b in zip(ours, peers, strict=True))
        name = f"start to the end of step 1, {state} cache, over tunix"
        results.append(
            Result(name, ours, peers, "s", ratio, f"<= {target}", ratio <= target, "least is best")
        )
    return results


def _us(work: Path, file: Path, environment: dict[str, str]) -> Worker:
    return us(work, file, 8, 256, environment=environment)


def _theirs(work: Path, file: Path, environment: dict[str, str]) -> Worker:
    return theirs(work, file, 256, environment=environment)


def us(work: Path, file: Path, rows: int, length: int, *more: str, environment=None) -> Worker:
    where = ("--rows", rows, "--length", length)
    return Worker(
        sys.executable, "ours.py", *base(work), file, *where, *more,
        environment={"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"} | (environment or {}),
    )  # fmt: skip


def peft(work: Path, file: Path, *more: str) -> Worker:
    return Worker(PEFT, "peer.py", *base(work), file, "--rows", 8, *more)


def theirs(work: Path, file: Path, length: int, *, environment=None) -> Worker:
    where = ("--rows", 8, "--length", length)
    return Worker(TUNIX, "peer_tunix.py", *base(work), file, *where, environment=environment)


def base(work: Path) -> tuple[Path, Path]:
    return work / "base", work / "adapter"


def even(work: Path) -> Path:
    file = work / "even.npz"
    if not file.is_file():
        inputs.write_even_documents(file, 32, 256)
    return file


def instructions(work: Path) -> tuple[Path | None, int]:
    """(documents of alpaca_2k, their tokens), or None where the shared data is not there."""
    if not inputs.SHARED.is_dir():
        print("alpaca_2k is not here: ../shared/data is not part of the project", file=sys.stderr)
        return None, 0
    file = work / "alpaca.npz"
    return file, inputs.write_alpaca(file, 240)


def rounds_of(sides: Sides, rounds: int) -> list[list[dict[str, Any]]]:
    race(sides, "first")
    timed = [race(sides, "train") for _ in range(rounds)]
    for side in sides:
        side.close()
    return timed


def compared(name: str, timed, tokens: int, target: float, agree: float) -> list[Result]:
    """By the clock and by processor time, of sides that were given the same batches."""
    ours, peers = zip(*timed, strict=True)
    difference = max(
        abs(a - b) / b
        for one, other in timed
        for a, b in zip(one["losses"], other["losses"], strict=True)
    )
    return [
        speed(name, ours, peers, tokens, target, difference, agree),
        processor("the same by processor time", ours, peers, tokens, difference, agree),
    ]


def packed(name: str, sides: Sides, tokens: int, target: float, rounds: int) -> list[Result]:
    """The same for sides whose batches differ: the loss of all documents must agree."""
    ours, peers = (answer["loss"] for answer in race(sides, "evaluate"))
    difference = abs(ours - peers) / peers
    one, other = zip(*rounds_of(sides, rounds), strict=True)
    return [
        speed(name, one, other, tokens, target, difference),
        processor("the same by processor time", one, other, tokens, difference),
    ]
