"""What all parts of the benchmark share: sides, their environments, lines of a table."""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BENCH = ROOT / ".bench"
PEFT = BENCH / "peers" / "bin" / "python"
TUNIX = BENCH / "tunix" / "bin" / "python"
AGREE = 1e-4  # largest relative difference of the losses


@dataclasses.dataclass
class Result:
    """One line of the table. `ratio` is what the target is about; None is void."""

    name: str
    ours: list[float]
    theirs: list[float]
    unit: str
    ratio: float | None
    target: str
    met: bool
    note: str = ""


class Worker:
    """A side of the comparison in a process of its own, which answers one command at a time."""

    def __init__(
        self, python: str | Path, script: str, *args: Any, environment: dict[str, str] | None = None
    ):
        self.process = subprocess.Popen(
            [str(python), str(HERE / script), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | (environment or {}),
        )

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def make_environment(python: Path, pins: Path, *packages: str) -> None:
    """A virtual environment of pinned packages, made anew when the pins change."""
    folder = python.parents[1]
    stamp = folder / pins.name
    if not (stamp.is_file() and stamp.read_bytes() == pins.read_bytes()):
        print(f"installing {' '.join(packages)} into {folder.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--constraint", pins, *packages], check=True)
        shutil.copy(pins, stamp)


def versions(python: str | Path, *packages: str) -> dict[str, str]:
    """Installed versions of distributions in an environment."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    command = [str(python), "-c", code, *packages]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(output.stdout)


def measured(script: str, *args: Any) -> dict[str, Any]:
    """What a script of ours prints, from a process of its own."""
    command = [sys.executable, str(HERE / script), *map(str, args)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output)


def race(sides: tuple[Worker, ...], command: str) -> list[dict[str, Any]]:
    return [side.ask(command) for side in sides]


def speed(
    name: str, ours, theirs, tokens: int, target: float, difference: float, agree: float = AGREE
) -> Result:
    return rates(name, ours, theirs, tokens, "seconds", target, difference, agree)


def processor(
    name: str, ours, theirs, tokens: int, difference: float, agree: float = AGREE
) -> Result:
    return rates(name, ours, theirs, tokens, "cpu", 0.0, difference, agree)


def rates(
    name: str, ours, theirs, tokens: int, clock: str, target: float, difference: float, most: float
) -> Result:
    """Tokens a second of every round, and the median of the rounds' ratios."""
    rates_ours = [tokens / found[clock] for found in ours]
    rates_theirs = [tokens / found[clock] for found in theirs]
    agree = difference <= most
    ratio = statistics.median(a / b for a, b in zip(rates_ours, rates_theirs, strict=True))
    note = f"losses differ by {difference:.0e}" + ("" if agree else ": void")
    met = agree and ratio >= target
    goal = f">= {target}" if target else ""
    unit = "tokens/s"
    return Result(name, rates_ours, rates_theirs, unit, ratio if agree else None, goal, met, note)


def line(result: Result) -> str:
    def spread(values: list[float]) -> str:
        digits = 2 if result.unit in ("s", "GiB") else 0
        text = f"{statistics.median(values):,.{digits}f}"
        if len(values) > 1:
            text += f" ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
        return text

    ratio = "void" if result.ratio is None else f"{result.ratio:.2f}"
    verdict = "" if not result.target else "ok" if result.met else "MISSED"
    return (
        f"{result.name:50} {spread(result.ours):>22} {spread(result.theirs):>22} {result.unit:8} "
        f"{ratio:>5} {result.target:12} {verdict:6} {result.note}"
    )
