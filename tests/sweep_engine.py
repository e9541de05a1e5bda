"""A stand-in for `engine.Engine`: quadratic bowls in numpy, for tests of what is around it.

A trial walks down 0.5 |w - target|^2 with momentum. Micro-batches are noisy by their position, so
that the order of rows matters; a rate above 2 diverges; rank is the number of free dimensions.
"""

import dataclasses
import itertools
import math
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import config as settings
from jaxtune.config import Config, SweepConfig
from jaxtune.scoring import Score
from jaxtune.signals import Stop
from jaxtune.sweep import halving, worker
from jaxtune.sweep import space as spaces
from jaxtune.sweep.budget import Ask
from jaxtune.sweep.pace import Pace
from jaxtune.sweep.prior import First
from jaxtune.sweep.records import SEARCH
from jaxtune.sweep.study import Study, open_study
from jaxtune.sweep.worker import Setting

DIM = 8
TARGET = np.linspace(-2.0, 2.0, DIM)


class Member(NamedTuple):
    positions: int
    every: int
    lr: float
    free: np.ndarray  # [DIM] 1 where it may move
    seed: int


class Measured(NamedTuple):
    loss: np.ndarray
    tokens: np.ndarray
    finite: np.ndarray


class StandIn:
    """Trains `positions` micro-batches a trial; `on_step` sees every call, to inject faults."""

    micro = 4
    held = 400  # held-out rows

    def __init__(self, widths: tuple[int, ...] = (4, 2, 1), positions: int = 32, on_step=None):
        self.widths = widths
        self.positions = positions
        self.rows = 4 * positions
        self.on_step = on_step or (lambda: None)
        self.calls: list[int] = []  # widths stepped

    def empty(self, width: int) -> list[dict[str, Any]]:
        return [self._fresh(0) for _ in range(width)]

    def _fresh(self, seed: int) -> dict[str, Any]:
        start = np.random.default_rng(seed).normal(0, 0.1, DIM)
        return {"w": start, "m/w": np.zeros(DIM), "sum": np.zeros(DIM), "step": np.int32(0)}

    def member(self, config: Config) -> Member:
        free = (np.arange(DIM) < max(1, config.lora.r)).astype(float)
        every = max(1, config.train.batch_size // self.micro)
        lr = config.optim.lr if config.optim.lr is not None else 0.05
        return Member(self.positions, every, lr, free, config.train.seed)

    def start(self, slots, k: int, member: Member):
        return [*slots[:k], self._fresh(member.seed), *slots[k + 1 :]]

    def put(self, slots, k: int, saved: dict[str, np.ndarray]):
        return [*slots[:k], {name: x.copy() for name, x in saved.items()}, *slots[k + 1 :]]

    def take(self, slots, k: int) -> dict[str, np.ndarray]:
        return {name: np.asarray(x).copy() for name, x in slots[k].items()}

    def step(self, slots, members, positions):
        self.on_step()
        self.calls.append(len(slots))
        out, losses = [], []
        for slot, member, position in zip(slots, members, positions, strict=True):
            if member is None:
                out.append(slot)
                losses.append(0.0)
                continue
            noise = np.random.default_rng(position).normal(0, 0.05, DIM)
            off = slot["w"] - TARGET + noise
            losses.append(float(0.5 * np.sum(off**2) + 1))
            gradient = slot["sum"] + off / member.every
            slot = slot | {"sum": gradient}
            if (position + 1) % member.every == 0:
                momentum = 0.5 * slot["m/w"] + gradient
                with np.errstate(over="ignore", invalid="ignore"):
                    w = slot["w"] - member.lr * momentum * member.free
                slot = {
                    "w": w, "m/w": momentum, "sum": np.zeros(DIM), "step": slot["step"] + 1,
                }  # fmt: skip
            out.append(slot)
        loss = np.array(losses)
        return out, Measured(loss, np.full(len(slots), 10), np.isfinite(loss) & (loss < 1e6))

    def evaluate(self, slots, rows: int | None = None) -> list[Score]:
        """On all rows the loss; on fewer of them it is higher by what is missing."""
        with np.errstate(over="ignore", invalid="ignore"):
            losses = [float(0.5 * np.sum((slot["w"] - TARGET) ** 2) + 1) for slot in slots]
        missing = 0.0 if rows is None else 1 - rows / self.held
        losses = [loss + missing if loss < 1e6 else math.inf for loss in losses]
        return [Score(loss, math.inf, 0.5, 100) for loss in losses]


SPACE = {"optim.lr": ("log", 0.003, 0.3), "lora.r": ("choice", 2, 4, 8)}
BASE = settings.freeze({"lora": {"r": 8}, "optim": {"lr": 0.01}, "train": {"batch_size": 8}})


def setting(folder: Path, engine: StandIn, **changes) -> Setting:
    """A worker's setting on a study in `folder`; changes are of config.sweep or the setting."""
    own = {key: changes.pop(key) for key in ("stop", "budget", "show", "scored") if key in changes}
    values = {"trials": 8, "sampler": "random", "eta": 2, **changes}
    sweep = dataclasses.replace(SweepConfig(), **values)
    config = dataclasses.replace(BASE, sweep=sweep)
    rungs = halving.positions(engine.positions, sweep.rungs, sweep.eta)
    first = [First({"optim.lr": 0.01, "lora.r": 8}, "baseline", "defaults")]
    enter = halving.quotas(sweep.trials or 4, len(rungs), sweep.eta, sweep.finalists)
    identity = {"model": "stand-in"}
    study = open_study(config, folder, identity, rungs, enter, first, space=SPACE)
    ask = Ask(rungs, sweep.trials, sweep.eta, sweep.finalists, sweep.repeats)
    budget = own.get("budget")
    pace = Pace(budget, ask, study.seconds, widths=engine.widths, tokens=10, close=0.0)

    def configured(job):
        return spaces.configured(config, job.params)

    show = own.get("show", lambda records: None)
    stop = own.get("stop", Stop())
    scored = own.get("scored", (engine.held,) * len(rungs))
    return Setting(engine, study, folder / "trials", configured, scored, pace, stop, show)


def facts(setting: Setting) -> list[tuple]:
    """All that a study holds of its trials but who had them and for how long."""
    return [
        (
            r.number, r.params, r.status, r.role, r.rung, r.curve, r.why, r.lost_tokens,
            [result._replace(seconds=0.0) for result in r.results],
        )
        for r in setting.study.records()
    ]  # fmt: skip


def killed_again_and_again(folder: Path, seed: int) -> int:
    """Works on a sweep in children that kill themselves at random moments; how many it took.

    A moment is before a step, and before and after a claim, a result and the flush of a file.
    """
    rng = random.Random(seed)
    for attempt in range(1, 100):
        after = rng.randint(30, 160)
        child = os.fork()
        if child == 0:
            moment = killer(after)
            worker.SAVE_SECONDS = 0.0
            os.fsync = around(os.fsync, moment)
            Study.claim = around(Study.claim, moment)
            Study.record = around(Study.record, moment)
            work_without_exits(setting(folder, StandIn(on_step=moment)))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return attempt
    raise AssertionError("it does not get anywhere")


def killer(after: int):
    """A function of which this call is the process's last."""
    calls = itertools.count(1)

    def moment() -> None:
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def around(function, moment):
    """The function with `moment` called before and after it."""

    def called(*args, **kwargs):
        moment()
        found = function(*args, **kwargs)
        moment()
        return found

    return called


def work_without_exits(setting: Setting) -> None:
    """Without early exits, which depend on how far the others are at the time."""
    halving.early_exit = lambda *args, **kwargs: None
    worker.work(setting, SEARCH)


def two_workers(folder: Path) -> None:
    """Two processes on one sweep; the first is killed on the way and nobody comes for it."""
    ended, alive = os.pipe()  # at its end once the first is dead
    steps = itertools.count(1)

    def wait_for_the_first() -> None:
        if next(steps) == 4:
            os.read(ended, 1)

    children = []
    for on_step in (killer(6), wait_for_the_first):
        if (child := os.fork()) == 0:
            work_without_exits(setting(folder, StandIn(on_step=on_step)))
            os._exit(0)
        if not children:
            os.close(alive)  # only the first has it now
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert ends == [signal.SIGKILL, 0], ends


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        print(killed_again_and_again(Path(sys.argv[2]), seed=3))
    else:
        two_workers(Path(sys.argv[2]))
