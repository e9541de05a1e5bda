"""`jaxtune sweep` beside one training after another. For run.py: --only sweep, quality, sweep-tpu.

The base is stories260k and the rows are Yoruba, both of ../shared/data; without them nothing runs.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import inputs
import numpy as np
from table import HERE, PEFT, ROOT, Result, Worker

PROGRAM = ROOT / ".venv" / "bin" / "jaxtune"
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 6e-2, 8))
RANKS = (4, 16)
TRIALS = len(RATES) * len(RANKS)
ROWS, LENGTH, STEPS = 8, 64, 256
SEEDS = 10
NEAR = 0.005  # a winner is right within this much of the grid's best final loss

_PAGE = """
from jaxtune.config import choice, default_config


def get_config():
    config = default_config()
    config.task = "pretrain"
    config.model.path = {base!r}
    config.model.dtype = config.model.param_dtype = "float32"
    config.data.train, config.data.eval = {train!r}, {held!r}
    config.data.max_length = {length}
    config.train.batch_size, config.train.steps = {rows}, {steps}
    config.train.tensorboard = False
    config.optim.lr = 1e-2
    config.sweep.space = {{"optim.lr": choice(*{rates!r}), "lora.r": choice(*{ranks!r})}}
    config.sweep.sampler, config.sweep.trials, config.sweep.repeats = "grid", {trials}, 0
    return config
"""


def clock(work: Path, rounds: int) -> list[Result]:
    """Wall time from the command to the end, beside 16 trainings and 16 processes of PEFT."""
    del rounds  # each is minutes long
    if (page := prepare(work)) is None:
        return []
    whole, ours = swept(page, work / "whole", "--config.sweep.rungs=1")
    halved, found = swept(page, work / "halved")
    one_by_one = [trained(page, work / "one", rate, rank) for rank in RANKS for rate in RATES]
    sequential = sum(one_by_one)
    # The processes have nothing in common: a quarter of them, four times.
    peft = TRIALS / 4 * sum(peft_process(work) for _ in range(4))
    return [
        ratio("16 trials to the end, over 16 trainings", whole, sequential, 0.8),
        ratio("the search with halving, over 16 trainings", halved, sequential, 0.25),
        ratio("the search, over 16 processes of PEFT", halved, peft, 0.2),
        Result(
            "programs compiled after the first rung", [found["programs_after_first_rung"]],
            [0.0], "", float(found["programs_after_first_rung"]), "0",
            found["programs_after_first_rung"] == 0,
            f"tokens {found['tokens'] / ours['tokens']:.3f} of all to the end",
        ),
    ]  # fmt: skip


def quality(work: Path, rounds: int) -> list[Result]:
    """Tokens of the search, and how often its winner is as good as the best of the whole grid."""
    del rounds
    if (page := prepare(work)) is None:
        return []
    shares, gaps = [], []
    for seed in range(SEEDS):
        same = (f"--config.train.seed={seed}", f"--config.sweep.seed={seed}")
        _, grid = swept(page, work / "whole", "--config.sweep.rungs=1", *same)
        _, found = swept(page, work / "halved", *same)
        shares.append(found["tokens"] / grid["tokens"])
        gaps.append(found["loss"] / grid["loss"] - 1)
        print(f"seed {seed}: {shares[-1]:.3f} of the tokens, {gaps[-1]:+.3%}", file=sys.stderr)
    right = sum(gap <= NEAR for gap in gaps)
    worst = f"worst {max(gaps):+.2%}"
    return [
        Result(
            "tokens of the search, over the grid's", shares, [1.0], "", max(shares), "<= 0.25",
            max(shares) <= 0.25, "the largest of all seeds",
        ),
        Result(
            f"winners within {NEAR:.1%} of the grid's best", [float(right)], [float(SEEDS)],
            "seeds", right / SEEDS, ">= 0.9", right >= 0.9 * SEEDS, worst,
        ),
    ]  # fmt: skip


def tpu(work: Path, rounds: int) -> list[Result]:
    """Memory of a chip with eight trials and with one: Llama 3.2 1B, 256 tokens a trial."""
    del work, rounds
    command = [sys.executable, str(HERE / "ours_sweep_tpu.py")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    one, eight = (each / 2**30 for each in json.loads(output.stdout)["bytes"])
    return [
        Result(
            "8 trials over 1, memory a chip of v5e:2x4", [eight], [one], "GiB", eight / one,
            "<= 2.0", eight <= 2 * one,
        )
    ]  # fmt: skip


def prepare(work: Path) -> Path | None:
    """A page for the sweep, its rows written beside it; None where the data is not there."""
    if not inputs.SHARED.is_dir():
        print("stories260k is not here: ../shared/data is no part of the project", file=sys.stderr)
        return None
    for name, most in (("train", 4000), ("dev", 400)):
        with (inputs.SHARED / "yoruba" / "menyo20k" / f"{name}.tsv").open() as file:
            texts = [row["Yoruba"] for row in csv.DictReader(file, delimiter="\t")][:most]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (work / f"{name}.jsonl").write_text("".join(lines))
    page = work / "page.py"
    page.write_text(
        _PAGE.format(
            base=str(inputs.SHARED / "stories260k-hf"),
            train=str(work / "train.jsonl"),
            held=str(work / "dev.jsonl"),
            length=LENGTH,
            rows=ROWS,
            steps=STEPS,
            rates=RATES,
            ranks=RANKS,
            trials=TRIALS,
        )
    )
    return page


def swept(page: Path, workdir: Path, *more: str) -> tuple[float, dict[str, Any]]:
    """(seconds, result) of a sweep from nothing."""
    shutil.rmtree(workdir, ignore_errors=True)
    return run("sweep", f"--config={page}", f"--workdir={workdir}", *more)


def trained(page: Path, workdir: Path, rate: float, rank: int) -> float:
    """Seconds of one plain training."""
    shutil.rmtree(workdir, ignore_errors=True)
    same = (f"--config={page}", f"--workdir={workdir}")
    return run("train", *same, f"--config.optim.lr={rate}", f"--config.lora.r={rank}")[0]


def run(verb: str, *arguments: str) -> tuple[float, dict[str, Any]]:
    began = time.perf_counter()
    done = subprocess.run(
        [str(PROGRAM), verb, *arguments, "--json"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return time.perf_counter() - began, json.loads(done.stdout)


def peft_process(work: Path) -> float:
    """Seconds of one training by PEFT, from the start of its process, on rows as long."""
    file, adapter = work / "even.npz", work / "sweep-adapter"
    base = inputs.SHARED / "stories260k-hf"
    if not adapter.is_dir():
        hf = json.loads((base / "config.json").read_text())
        inputs.write_adapter(adapter, hf)
        inputs.write_even_documents(file, ROWS * STEPS, LENGTH, hf["vocab_size"])
    began = time.perf_counter()
    side = Worker(PEFT, "peer.py", base, adapter, file, "--rows", ROWS)
    side.ask("train")
    side.close()
    return time.perf_counter() - began


def ratio(name: str, ours: float, theirs: float, most: float) -> Result:
    share = ours / theirs
    return Result(name, [ours], [theirs], "s", share, f"<= {most}", share <= most)
