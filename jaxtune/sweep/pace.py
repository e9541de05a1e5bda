"""How a sweep keeps its budget: what things take here, and what there is still room for."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.budget import Budget, spell
from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.sweep.budget import Ask, Done, Measured, Plan, describe, plan
from jaxtune.sweep.records import SEARCH, Record

_AGAIN = 120.0  # seconds between two plans, where nothing else asks for one
_BEFORE = 4  # micro-batches to measure before time is planned
_MEASURED = 2  # micro-batches of each width, before a search whose budget is time
_LOOK = 10.0  # seconds between two looks at what other processes used
_ENDED = ("stopped", "diverged", "finished")


class Pace:
    """Measures and plans, in seconds of wall time or in tokens, as the budget is."""

    def __init__(
        self,
        budget: Budget | None,
        ask: Ask,
        used: Callable[[], float],
        workers: Callable[[], int] = lambda: 1,
        *,
        widths: Sequence[int],
        tokens: float,
        close: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Without a budget everything is asked and nothing ends early.

        Args:
          budget: of all devices together, so not in chip time.
          used: seconds so far, of all processes and sessions.
          workers: how many share the trials now.
          widths: of the populations there may be.
          tokens: of a micro-batch of one trial, at most.
          close: seconds that it takes to end a sweep, at a guess.
        """
        self.ask = ask
        self.plan: Plan | None = None
        self._budget = budget
        self._used = used
        self._workers = workers
        self._clock = clock
        self._in_tokens = budget is not None and budget.unit == "tokens"
        self._measured = Measured(close=0.0 if self._in_tokens else close)
        self._seen: set[tuple[str, int]] = set()
        self._steps = 0
        self._planned = -math.inf
        self._spent = 0.0
        self._looked = (-math.inf, 0.0)  # when, and what was used by then
        if self._in_tokens:
            self._steps = _BEFORE
            for width in widths:
                self._measured.stepped(width, tokens * width)

    def stepped(self, width: int, seconds: float, tokens: int) -> None:
        """A micro-batch for every slot took so long, and was of so many tokens."""
        self._spent += tokens
        if self._compiled("step", width):
            self._steps += 1
            self._measured.stepped(width, float(tokens) if self._in_tokens else seconds)

    def evaluated(self, width: int, seconds: float, share: float) -> None:
        """An evaluation of all slots on this share of the held-out rows took so long."""
        if self._compiled("evaluate", width) and not self._in_tokens:
            self._measured.evaluated(width, seconds / share)

    def kept(self, seconds: float) -> None:
        """Writing a trial's state took so long."""
        if not self._in_tokens:
            self._measured.kept(2 * seconds)  # it is read again

    def _compiled(self, what: str, width: int) -> bool:
        """Whether this is not the first time, which compiles."""
        known = (what, width) in self._seen
        self._seen.add((what, width))
        return known

    def used(self) -> float:
        """So far, in the budget's unit."""
        if self._in_tokens:
            return self._spent
        now = self._clock()
        if now - self._looked[0] > _LOOK:
            self._looked = (now, self._used())
        return self._looked[1] + now - self._looked[0]

    def over(self) -> bool:
        """Whether the sweep has to be ended with what there is."""
        if self._budget is None:
            return False
        return self.used() >= (self.plan.end if self.plan else self._budget.amount)

    def too_short(self) -> ConfigError:
        """That the budget was used before a trial was through its first rung."""
        assert self._budget is not None
        amount, unit = self._budget
        return ConfigError(
            f"a budget of {spell(amount, unit)} is too short for one trial: "
            f"{spell(self.used(), unit)} were used before its first rung ended",
            fix="a longer sweep.budget; the same command goes on",
        )

    def due(self) -> bool:
        """Whether to plan, though no rung has ended."""
        enough = self._budget is not None and self._steps >= _BEFORE
        return enough and self._clock() - self._planned > _AGAIN

    def replan(self, records: Sequence[Record], live: Mapping[int, int]) -> str | None:
        """Plans what is left; says so in a line where it is not what was planned before.

        Args:
          live: {number: position} of the trials in this worker's slots.
        Raises:
          ConfigError: the budget is too short for one trial.
        """
        costs = self._measured.costs()
        if self._budget is None or costs is None or self._steps < _BEFORE:
            return None
        self._planned = self._clock()
        if self._in_tokens:
            self._spent = float(sum(record.tokens for record in records))
        done = progress(records, live, self.ask, self.used())
        before, (amount, unit) = self.plan, self._budget
        workers = 1 if self._in_tokens else self._workers()  # tokens are counted, not shared
        self.plan = plan(amount, self.ask, costs, done, unit=unit, workers=workers)
        if before and (before.enter, before.repeats) == (self.plan.enter, self.plan.repeats):
            return None
        return describe(self.plan, self.ask, amount, done.used, unit)


def width_for(count: int, widths: Sequence[int]) -> int:
    """The width that trains so many trials soonest, where idle slots cost as much as others.

    A micro-batch of all slots costs about one slot more than they do. What was measured is left out
    of it: another width rounds otherwise, and a sweep should come to the same on another day.
    """
    return max(widths, key=lambda width: (min(count, width) / (1 + width), width))


def measure(engine: Any, pace: Pace, config: Config) -> None:
    """Steps every width a few times, all slots with trials of `config`, and forgets them.

    What is left when few trials live decides how many may begin, so it is measured first.
    """
    member = engine.member(config)
    for width in engine.widths:
        slots = engine.empty(width)
        for k in range(width):
            slots = engine.start(slots, k, member)
        for position in range(_MEASURED + 1):  # the first may wait for a compiler
            began = time.monotonic()
            slots, measured = engine.step(slots, [member] * width, [position] * width)
            pace.stepped(width, time.monotonic() - began, int(sum(measured.tokens)))


def progress(records: Sequence[Record], live: Mapping[int, int], ask: Ask, used: float) -> Done:
    """How far a sweep has got, stage by stage."""
    through = [0] * len(ask.stages)
    running, repeats = [], 0
    for record in records:
        if record.role == "repeat":
            repeats += bool(record.results)
            continue
        first = 0 if record.role in SEARCH else len(ask.stages) - 1
        last = record.rung if record.role in SEARCH else first
        for stage in range(first, last):
            through[stage] += 1
        if record.at(record.rung) is not None or record.status in _ENDED:
            through[last] += 1
        else:
            begun = record.results[-1].position if record.results else 0
            reached = live.get(record.number, record.curve[-1][0] if record.curve else begun)
            running.append((last, min(max(0, reached - begun), ask.stages[last])))
    return Done(used, tuple(through), tuple(running), repeats)
