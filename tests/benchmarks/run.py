"""`make bench`: jaxtune beside transformers + peft, and its own memory and start-up. Minutes.

Builds an environment for the peers in .bench/ (peers.txt pins it), prints a table and writes
.bench/result.json. Rounds of the two sides alternate, so both see the same state of the machine,
and the losses must agree or there is no ratio. Exits with 1 when a target is missed.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import inputs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BENCH = ROOT / ".bench"
PEER = BENCH / "peers" / "bin" / "python"
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

    def __init__(self, python: str | Path, script: str, *args: Any):
        self.process = subprocess.Popen(
            [str(python), str(HERE / script), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("step", "alpaca", "loading", "start"))
    args = parser.parse_args()
    make_peers()
    work = BENCH / "work"
    shutil.rmtree(work, ignore_errors=True)
    parameters = inputs.write_base(work / "base", inputs.SMALL)
    inputs.write_adapter(work / "adapter", inputs.SMALL)
    parts = {
        "step": lambda: padded(work, args.rounds),
        "alpaca": lambda: alpaca(work, max(3, args.rounds // 2)),
        "loading": lambda: loading(work, args.rounds),
        "start": lambda: start(args.rounds),
    }
    results: list[Result] = []
    for name, part in parts.items():
        if args.only in (None, name):
            found = part()
            results += found
            for result in found:
                print(line(result), flush=True)
    shutil.rmtree(work)
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    report = {
        "machine": machine,
        "parameters": parameters,
        "results": [dataclasses.asdict(result) for result in results],
    }
    (BENCH / "result.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{machine['cpu']}, {machine['cores']} cores, load {machine['load'][0]:.1f} at the end")
    print(f"all numbers: {BENCH.relative_to(ROOT) / 'result.json'}")
    sys.exit(not all(result.met for result in results))


def padded(work: Path, rounds: int) -> list[Result]:
    """The training step at 8 x 256 tokens, all of them with loss, and the start of both sides."""
    file = work / "even.npz"
    inputs.write_even_documents(file, 32, 256)
    sides, starts, _ = launch("first", work, file, rows=8, length=256)
    timed = [race(sides, "train") for _ in range(rounds)]
    tokens = 32 * 256
    ours, theirs = zip(*timed, strict=True)
    differences = [
        abs(a - b) / b
        for one, other in timed
        for a, b in zip(one["losses"], other["losses"], strict=True)
    ]
    for side in sides:
        side.close()
    first = Result(
        "process start to the end of step 1", starts[:1], starts[1:], "s",
        starts[0] / starts[1], "", True, "seconds over seconds",
    )  # fmt: skip
    return [
        speed("training step, batch 8 x 256", ours, theirs, tokens, 1.4, max(differences)),
        processor("the same by processor time", ours, theirs, tokens, max(differences)),
        first,
    ]


def alpaca(work: Path, rounds: int) -> list[Result]:
    """Real tokens a second on instruction data: batches of 8 padded to the longest, or packed."""
    if not inputs.SHARED.is_dir():
        print("alpaca_2k is not here: ../shared/data is not part of the project", file=sys.stderr)
        return []
    file = work / "alpaca.npz"
    tokens = inputs.write_alpaca(file, 240)
    # Three rows of 704 have about as many slots as the padded batches; the longest row is 663.
    sides, _, losses = launch("evaluate", work, file, rows=3, length=704)
    difference = abs(losses[0]["loss"] - losses[1]["loss"]) / losses[1]["loss"]
    race(sides, "first")
    timed = [race(sides, "train") for _ in range(rounds)]
    for side in sides:
        side.close()
    ours, theirs = zip(*timed, strict=True)
    return [
        speed("alpaca_2k, real tokens", ours, theirs, tokens, 3.5, difference),
        processor("the same by processor time", ours, theirs, tokens, difference),
    ]


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


def measured(script: str, *args: Any) -> dict[str, Any]:
    """What a script of ours prints, from a process of its own."""
    command = [sys.executable, str(HERE / script), *map(str, args)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output)


def memory(name: str, found: dict[str, Any], limit: float, beside: str) -> Result:
    peak, size = found["peak_bytes"], found["bytes"]
    return Result(
        name, [peak / 1e6], [size / 1e6], "MB", peak / size, f"<= {limit / 1e6:.0f} MB",
        peak <= limit, f"beside {beside}",
    )  # fmt: skip


def start(rounds: int) -> list[Result]:
    """`jaxtune --help` over a bare interpreter, in processor seconds."""
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


def make_peers() -> None:
    """A virtual environment of transformers + peft + torch, made anew when the pins change."""
    pins = HERE / "peers.txt"
    stamp = BENCH / "peers" / pins.name
    if stamp.is_file() and stamp.read_bytes() == pins.read_bytes():
        return
    print(f"installing the peers into {PEER.parents[1].relative_to(ROOT)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", BENCH / "peers"], check=True)
    install = [PEER, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = ["--constraint", pins, "torch", "transformers", "peft"]
    subprocess.run([*install, *packages], check=True)
    shutil.copy(pins, stamp)


def launch(
    command: str, work: Path, documents: Path, rows: int, length: int
) -> tuple[tuple[Worker, Worker], list[float], list[dict[str, Any]]]:
    """(ours, theirs), seconds from start to the end of each one's first command, answers."""
    paths = (work / "base", work / "adapter", documents)
    sides, seconds, answers = [], [], []
    for python, script, *own in (
        (sys.executable, "ours.py", "--rows", rows, "--length", length),
        (PEER, "peer.py", "--rows", 8),
    ):
        started = time.perf_counter()
        sides.append(Worker(python, str(script), *paths, *own))
        answers.append(sides[-1].ask(command))
        seconds.append(time.perf_counter() - started)
    return (sides[0], sides[1]), seconds, answers


def race(sides: tuple[Worker, Worker], command: str) -> list[dict[str, Any]]:
    return [side.ask(command) for side in sides]


def speed(name: str, ours, theirs, tokens: int, target: float, difference: float) -> Result:
    return rates(name, ours, theirs, tokens, "seconds", target, difference)


def processor(name: str, ours, theirs, tokens: int, difference: float) -> Result:
    return rates(name, ours, theirs, tokens, "cpu", 0.0, difference)


def rates(
    name: str, ours, theirs, tokens: int, clock: str, target: float, difference: float
) -> Result:
    """Tokens a second of every round, and the median of the rounds' ratios."""
    rates_ours = [tokens / found[clock] for found in ours]
    rates_theirs = [tokens / found[clock] for found in theirs]
    agree = difference <= AGREE
    ratio = statistics.median(a / b for a, b in zip(rates_ours, rates_theirs, strict=True))
    note = f"losses differ by {difference:.0e}" + ("" if agree else ": void")
    met = agree and ratio >= target
    goal = f">= {target}" if target else ""
    unit = "tokens/s"
    return Result(name, rates_ours, rates_theirs, unit, ratio if agree else None, goal, met, note)


def line(result: Result) -> str:
    def spread(values: list[float]) -> str:
        digits = 2 if result.unit == "s" else 0
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


def cpu() -> str:
    """The processor's name, or its architecture where the kernel does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
