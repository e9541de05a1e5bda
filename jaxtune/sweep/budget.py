"""What a search has room for: trials, survivors and repeats that end inside a budget. Pure.

A search is a row of stages: every rung is one, then the finalists on all of the data where rungs
see less, then the repeats. A stage of n trials is walked in populations of the measured widths:

    stage cost = min over ways to cut n trials into populations of (positions * step + evaluation)

which is what a sweep takes that waits at every rung; one that fills free slots at once is quicker.
Costs are seconds of wall time or tokens, whichever the budget is in.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtune.budget import Unit, enough, spell
from jaxtune.errors import ConfigError
from jaxtune.sweep.halving import quotas

MOST = 1000  # trials, where only the budget limits them
_SHARE = 2 / 3  # of the budget for the search, where it takes all there is room for
_CAUTION = 1.05  # a machine is now and then slower than it was measured
_RECENT = 64  # measurements that count


@dataclass(frozen=True)
class Ask:
    """What the settings ask for."""

    rungs: tuple[int, ...]  # positions at which trials are compared; the last ends the training
    trials: int  # 0: as many as there is room for
    eta: int  # one in eta goes on
    finalists: int  # trials trained to the end
    repeats: int  # seeds that winner and defaults are both trained with, whole
    whole: int = 0  # positions of a training on all data, where rungs see less; 0: they see all
    most: int = MOST  # different trials that there are
    scored: tuple[float, ...] = ()  # share of the held-out rows for each rung; empty: all

    @property
    def stages(self) -> tuple[int, ...]:
        """Positions that each stage adds; the last is the end of a finalist's training."""
        ends = (0, *self.rungs)
        lengths = tuple(b - a for a, b in zip(ends, self.rungs, strict=False))
        return (*lengths, self.whole) if self.whole else lengths

    def share(self, stage: int) -> float:
        """Of the held-out rows, that a stage is scored on."""
        return self.scored[stage] if stage < len(self.scored) else 1.0

    @property
    def training(self) -> int:
        """Positions of one whole training."""
        return self.whole or self.rungs[-1]


@dataclass(frozen=True)
class Costs:
    """What things take, in the unit of the budget."""

    step: Mapping[int, float]  # {width: a micro-batch for each of its slots}
    evaluate: Mapping[int, float] = field(
        default_factory=dict
    )  # {width: of its slots, on all rows}
    keep: float = 0.0  # a paused trial, written and read again
    close: float = 0.0  # the last evaluation, save, export and report


@dataclass(frozen=True)
class Done:
    """How far a search has got."""

    used: float = 0.0  # since its start, by all processes that worked on it
    through: tuple[int, ...] = ()  # trials that a stage has behind it: scored, or stopped in it
    running: tuple[tuple[int, int], ...] = ()  # (stage, positions done of it) of those in work
    repeats: int = 0  # whole trainings of repeats that are done, two a seed


@dataclass(frozen=True)
class Plan:
    """What there is room for; counts include what is done."""

    trials: int
    enter: tuple[int, ...]  # how many trials each stage takes in; the first is `trials`
    repeats: int  # seeds
    cost: float  # of what is left, the close included
    end: float  # `used` by which the last step must be over; inf without a budget
    fits: bool  # False: not even one survivor does any more; go on until `end`


class Measured:
    """Costs from what was measured; the recent measurements of each width count."""

    def __init__(self, close: float = 0.0):
        """`close`: a first guess of the last save, export and report."""
        self._step: dict[int, collections.deque[tuple[float, int]]] = {}
        self._evaluate: dict[int, float] = {}
        self._keep = 0.0
        self._close = close

    def stepped(self, width: int, cost: float, count: int = 1) -> None:
        """`count` micro-batches of a population took `cost`; without compiling."""
        self._step.setdefault(width, collections.deque(maxlen=_RECENT)).append((cost, count))

    def evaluated(self, width: int, cost: float) -> None:
        """An evaluation of a population's slots on all rows takes `cost`; without compiling."""
        self._evaluate[width] = cost

    def kept(self, cost: float) -> None:
        """Writing and reading a paused trial took `cost`."""
        self._keep = cost

    def closed(self, cost: float) -> None:
        """Saving, exporting and reporting took `cost`."""
        self._close = cost

    def costs(self) -> Costs | None:
        """With some caution; None while no step is measured."""
        if not self._step:
            return None
        means = {w: sum(c for c, _ in seen) / sum(n for _, n in seen)
                 for w, seen in self._step.items()}  # fmt: skip
        close = self._close + max(self._evaluate.values(), default=0.0) + self._keep
        return Costs(
            step={width: _CAUTION * mean for width, mean in means.items()},
            evaluate={width: _CAUTION * cost for width, cost in self._evaluate.items()},
            keep=_CAUTION * self._keep,
            close=_CAUTION * close,
        )


def plan(
    budget: float | None,
    ask: Ask,
    costs: Costs,
    done: Done | None = None,
    *,
    unit: Unit = "seconds",
    workers: int = 1,
) -> Plan:
    """The most trials that end inside the budget with the winner trained whole; then the rest.

    Repeats are given up first, then trials, then survivors. Where ask.trials is 0 the search takes
    two thirds of the budget; more where the repeats do not need their third, and all of it where
    that would not pay for one seed of them.

    Args:
      budget: in all; None is without limit.
      done: nothing, before a search begins.
      unit: of the budget and all costs.
      workers: processes that share the trials of a stage, when costs are seconds.

    Raises:
      ConfigError: no trial is through a stage, and there is no room for one.
    """
    done = done or Done()
    room = math.inf if budget is None else budget - done.used - costs.close
    if budget is None and not ask.trials:
        raise ConfigError("sweep.trials is 0, and there is no sweep.budget", fix="either of them")

    def cost(enter: tuple[int, ...], repeats: int = 0) -> float:
        found = sum(
            _walk(_jobs(stage, count, ask, done), costs, workers, ask.share(stage))
            for stage, count in enumerate(enter)
        )
        again = [ask.training] * max(0, 2 * repeats - done.repeats) if repeats else []
        return found + _walk(again, costs, workers)

    least = max(1, _through(done, 0))
    most = max(least, min(ask.trials or MOST, ask.most))
    search = room
    if not ask.trials:
        every = _walk([ask.training] * max(0, 2 * ask.repeats - done.repeats), costs, workers)
        share = _SHARE * ((budget or 0.0) - costs.close) - done.used
        search = max(room - every, min(room, share))
        if not done.repeats and _walk([ask.training] * 2, costs, workers) > room - search:
            search = room
    fits = cost(_enter(ask, done, least, 1)) <= room
    trials = _largest(least, most, lambda n: cost(_enter(ask, done, n, 1)) <= search)
    enter = _enter(ask, done, trials, 1)
    if not fits:
        if not any(done.through):
            raise _too_short(budget or 0.0, cost(enter), costs.close, done.used, unit)
        most_on = max(enter[1:], default=1)
        cap = _largest(1, most_on, lambda n: cost(_enter(ask, done, trials, 1, n)) <= room)
        enter = _enter(ask, done, trials, 1, cap)
        fits = cost(enter) <= room
    else:
        finalists = _largest(
            1, max(1, ask.finalists), lambda n: cost(_enter(ask, done, trials, n)) <= room
        )
        enter = _enter(ask, done, trials, finalists)
    repeats = _largest(0, ask.repeats, lambda n: cost(enter, n) <= room) if fits else 0
    return Plan(
        trials=trials,
        enter=enter,
        repeats=repeats,
        cost=cost(enter, repeats) + costs.close,
        end=math.inf if budget is None else budget - costs.close,
        fits=fits,
    )


def finish(costs: Costs, positions: int, trials: int = 1) -> float:
    """What it takes to train `trials` for the positions they lack, and to close."""
    return _walk([positions] * trials, costs, 1) + costs.close


def describe(
    plan: Plan, ask: Ask, budget: float | None, used: float, unit: Unit = "seconds"
) -> str:
    """The plan as a line for people."""
    stages = list(zip(plan.enter, (*ask.rungs, *([ask.whole] if ask.whole else [])), strict=True))
    text = f"plan: {plan.trials} trial{'s' * (plan.trials != 1)}; " + ", ".join(
        f"{count} to {positions} micro-batches" for count, positions in stages
    )
    if ask.repeats:
        text += f"; {plan.repeats} of {ask.repeats} seeds of winner and defaults"
    text += f"; about {spell(plan.cost, unit)} to go"
    if budget is not None:
        text += f" of the {spell(max(0.0, budget - used), unit)} left"
    return text


def _through(done: Done, stage: int) -> int:
    return done.through[stage] if stage < len(done.through) else 0


def _enter(
    ask: Ask, done: Done, trials: int, finalists: int, cap: int | None = None
) -> tuple[int, ...]:
    """How many trials each stage takes in, of `trials` in the first; `cap` holds for the others."""
    usual = quotas(trials, len(ask.rungs), ask.eta, finalists)
    if ask.whole:
        usual = (*usual, min(usual[-1], finalists))
    enter, cap = [trials], trials if cap is None else cap
    for stage, count in enumerate(usual[1:], 1):
        enter.append(max(_through(done, stage), min(count, enter[-1], cap)))
    return tuple(enter)


def _jobs(stage: int, count: int, ask: Ask, done: Done) -> list[int]:
    """Positions that trials of a stage still lack, longest first, where `count` may enter it."""
    length, left = ask.stages[stage], count - _through(done, stage)
    lack = sorted((length - p for at, p in done.running if at == stage), reverse=True)
    if left <= 0:
        return []
    return [length] * (left - len(lack)) + lack[:left]


def _walk(jobs: Sequence[int], costs: Costs, workers: int, share: float = 1.0) -> float:
    """The least that populations take for jobs of these positions, which come longest first.

    Args:
      share: of the held-out rows, that they are scored on.
    """
    mine = jobs[::workers]  # the share of the worker with the longest ones
    evaluations = max(costs.evaluate.values(), default=0.0)
    best = [0.0] * (len(mine) + 1)
    for at in reversed(range(len(mine))):
        best[at] = min(
            mine[at] * step
            + share * costs.evaluate.get(width, evaluations)
            + best[min(len(mine), at + width)]
            for width, step in costs.step.items()
        )
    return best[0] + len(mine) * costs.keep


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest count in [low, high] that fits, where larger ones fit less; low if none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _too_short(budget: float, one: float, close: float, used: float, unit: Unit) -> ConfigError:
    needed = 1.1 * (used + one + close)
    more = f", to save and export it {spell(close, unit)}" if close else ""
    more += f", and {spell(used, unit)} are used" if used else ""
    return ConfigError(
        f"a budget of {spell(budget, unit)} is too short for one trial: to train it whole takes "
        f"{spell(one, unit)}{more}",
        fix=f"sweep.budget={enough(needed, unit)!r}, or fewer train.epochs",
    )
