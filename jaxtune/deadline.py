"""`train.budget`: as many steps as there is time for, by measuring; anew as the speed changes.

    0   8          100         200        283        end of the budget
    |---|-----------|-----------|----------|----reserve--|
     measured: 290   284: slower  still 284  evaluated and saved inside the budget

The number of steps and the warm-up are numbers in the optimizer's state, so nothing compiles again.
Every change is saved with a checkpoint before a step is taken with it: a run that is killed goes on
with the schedule that it had. Of several hosts the first measures and decides.
"""

import collections
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from jaxtune import optim, pods
from jaxtune.budget import Unit, enough, parse, spell
from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.errors import ConfigError
from jaxtune.step import TrainState

_FIRST = 8  # steps to measure before the first decision, or fewer that take _LOOK
_LOOK = 0.02  # of the budget: the most between two looks at the clock
_SAVES = 1e8  # bytes a second, until a save is measured
_LATE = 0.8  # of the steps; from there on the number only shrinks, since rates have fallen

T = TypeVar("T")


@dataclass
class Used:
    """What a run has cost and decided; saved in every checkpoint."""

    seconds: float = 0.0  # by all processes that worked on the run, that save included
    refits: list[list[Any]] = field(default_factory=list)  # [step, steps, warmup] each
    # In the budget's unit: an evaluation, a save, a step, as measured last
    evaluation: float = 0.0
    save: float | None = None
    rate: float = 0.0


class Seen(Protocol):
    """What a run's progress says of its cost."""

    tokens: int  # trained on so far
    used: Used


class Deadline:
    """How many steps a run takes; without a budget as many as the config says."""

    def __init__(
        self,
        config: Config,
        steps: int,
        *,
        state: TrainState,
        progress: Seen,
        clock: Callable[[], float],
        trained: Callable[[], float],
        devices: int,
    ):
        """
        Args:
          steps: the most, by train.steps or train.epochs.
          state: that this process begins with.
          progress: of the run; `used` is kept up to date.
          clock: seconds since this process's command began.
          trained: seconds of training steps alone, in this process.
          devices: that share a budget of chip-hours.
        """
        before, size = progress.used.seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        budget = parse(config.train.budget, "train.budget")
        self._config = config
        self._most = steps
        self._first = first = int(state.step)
        self.used = used = progress.used
        self.steps = used.refits[-1][1] if used.refits else steps
        self._budget = budget.on(devices) if budget else None
        self._unit: Unit = self._budget.unit if self._budget else "seconds"
        self._seconds = lambda: before + clock()
        # What the budget counts: of the whole run, and of training steps in this process.
        self._spent, self._stepped = self._seconds, trained
        if self._unit == "tokens":
            self._spent = self._stepped = lambda: progress.tokens
        self._seen: collections.deque[tuple[int, float]] = collections.deque()
        self._guess = 0.0 if self._unit == "tokens" else 1.0 + size / _SAVES
        self._next = first + 1  # step of the next look
        self._started = 0.0  # what it took to get there
        self._decided = bool(used.rate)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, whose cost counts from then on."""
        since = self._spent()
        yield
        self.used.save = self._spent() - since

    def evaluating(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an evaluation, whose cost counts from then on; the first may compile."""
        times = []
        for batch in batches:
            times.append(self._spent())
            yield batch
        times.append(self._spent())
        count = len(times) - 1
        if count > 1:
            self.used.evaluation = (times[-1] - times[1]) * count / (count - 1)
        elif count:
            self.used.evaluation = times[-1] - times[0]

    def note(self) -> None:
        """Just before a save: what the run will have used after it."""
        self.used.seconds = self._seconds() + (0.0 if self._unit == "tokens" else self._saving())

    def open(self) -> None:
        """Before the first step of this process: is there time for one?

        Raises:
          ConfigError: a new run that has no time left.
        """
        if self._budget is None or self._first >= self.steps:
            return
        left = self._left() > 0
        if json.loads(pods.exchange(json.dumps(left))[0]):
            return
        if not self.used.refits:
            raise self._too_short()
        self.used.refits.append([self._first, self._first, self.used.refits[-1][2]])
        self.steps = self._first

    def due(self, step: int) -> bool:
        """Whether `refit` is to look at the clock after this step; the same on every host."""
        return self._budget is not None and step >= self._next

    def refit(self, step: int, state: TrainState, *, saved: bool) -> tuple[TrainState, bool]:
        """(state with the steps there is budget for, whether that is another number than before).

        Args:
          saved: this step is saved anyway; else only what is worth a save is changed.

        Raises:
          ConfigError: the first look, and the budget is too short to end the run well.
        """
        if self._budget is None:
            return state, False
        decided = self._decide(step, saved)
        self._next, steps = json.loads(pods.exchange(json.dumps(decided))[0])
        if steps == self.steps:
            return state, False
        warmup = self.used.refits[-1][2] if self.used.refits else self._warmup(self.steps)
        if step <= warmup:  # a rise that is behind us would begin again
            warmup = self._warmup(steps)
        self.used.refits.append([step, steps, warmup])
        self.steps = steps
        hyper: dict[str, jax.Array] = state.opt_state.hyperparams  # type: ignore[union-attr]  # inject_hyperparams
        new = {"steps": _like(hyper["steps"], steps), "warmup": _like(hyper["warmup"], warmup)}
        opt_state = state.opt_state._replace(hyperparams=hyper | new)  # type: ignore[union-attr]
        return state._replace(opt_state=opt_state), True

    def _decide(self, step: int, saved: bool) -> tuple[int, int]:
        """(step of the next look, steps in all), by this host's clock."""
        if not self._measure(step):
            return step + 1, self.steps
        left = self._left()
        if not self._decided and left < 0:
            raise self._too_short()
        left -= self.used.evaluation if _divides(self._config.eval.every, step) else 0.0
        # A change costs a save: where none is due a little more is bearable.
        slack = 0.0 if saved or not self._decided else self._margin() / 2
        fitting = self._fitting(step, left - self._saving())
        if not self._decided:
            steps = fitting
        elif fitting < self.steps:
            bearable = slack and self._fitting(step, left + slack) >= self.steps
            steps = self.steps if bearable else fitting
        else:
            worth = fitting > (1.02 if saved else 1.1) * self.steps
            steps = fitting if worth and step < _LATE * self.steps else self.steps
        self._say(step, steps)
        self._decided = True
        assert self._budget is not None
        # Ever closer ones towards the end, which then is met to a step.
        look = min(_LOOK * self._budget.amount / self.used.rate, (steps - step) / 2)
        return step + max(1, int(look)), steps

    def _measure(self, step: int) -> bool:
        """Measures a step over the last quarter of those of this process; whether one is known."""
        assert self._budget is not None
        if not self._seen:  # after the step that compiles
            self._started = self._spent()
        self._seen.append((step, self._stepped()))
        window = max(_FIRST, (step - self._first) // 4)
        while len(self._seen) > 2 and self._seen[1][0] <= step - window:
            self._seen.popleft()
        (at, before), (_, now) = self._seen[0], self._seen[-1]
        if step - at >= _FIRST or now - before >= _LOOK * self._budget.amount:
            self.used.rate = _middle(itertools.pairwise(self._seen))
        return self.used.rate > 0

    def _fitting(self, step: int, left: float) -> int:
        """The most steps in all whose rest, from `step` on, costs no more than `left`."""
        evaluations, saves = self._config.eval.every, self._config.checkpoint.every

        def cost(steps: int) -> float:
            evaluated = _multiples(evaluations, step, steps)
            saved = evaluated + _multiples(saves, step, steps)
            if evaluations:
                saved -= _multiples(math.lcm(evaluations, saves), step, steps)
            watched = evaluated * self.used.evaluation + saved * self._saving()
            return (steps - step) * self.used.rate + watched

        low, high = step, max(step, self._most)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= left else (low, middle - 1)
        return low

    def _left(self) -> float:
        """What steps may still take: beside the last evaluation and save, and some for the end."""
        assert self._budget is not None
        end = self._end() + self._margin()
        return self._budget.amount - self._spent() - end

    def _end(self) -> float:
        return self.used.evaluation + self._saving()

    def _saving(self) -> float:
        return self._guess if self.used.save is None else self.used.save

    def _margin(self) -> float:
        assert self._budget is not None
        if self._unit == "tokens":
            return self.used.rate
        return min(60.0, max(1.0, _LOOK * self._budget.amount))

    def _warmup(self, steps: int) -> float:
        return optim.hyperparameters(self._config, steps)["warmup"]

    def _say(self, step: int, steps: int) -> None:
        each, budget = spell(self.used.rate, self._unit), self._config.train.budget
        if not self._decided:
            share = f"all {steps}" if steps == self._most else f"{steps} of {self._most}"
            say(f"step {step}: {each} a step, {share} steps fit into {budget}")
        elif steps != self.steps:
            say(f"step {step}: {each} a step, {steps} steps fit instead of {self.steps}")

    def _too_short(self) -> ConfigError:
        assert self._budget is not None
        started = self._started or self._spent()
        end = self._end()
        parts = []
        if self._unit == "seconds":
            parts.append(f"starting took {spell(started)}")
        if self.used.rate:
            parts.append(f"a step takes {spell(self.used.rate, self._unit)}")
        if end:
            parts.append(f"the last evaluation and save take about {spell(end)}")
        need = 1.1 * (started + end + self._margin() + 100 * self.used.rate)
        return ConfigError(
            f"train.budget {self._config.train.budget} is too short: {', '.join(parts)}",
            fix=f"train.budget={enough(need, self._unit)!r} or more",
        )


def _middle(spans: Iterable[tuple[tuple[int, float], tuple[int, float]]]) -> float:
    """Cost of a step in the median of spans of (step, cost so far): one hiccup changes little."""
    rates = [((cost - before) / (step - at), step - at) for (at, before), (step, cost) in spans]
    half, so_far = sum(count for _, count in rates) / 2, 0
    for rate, count in sorted(rates):
        so_far += count
        if so_far >= half:
            return rate
    raise ValueError("no span")


def _divides(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _multiples(every: int, after: int, before: int) -> int:
    """Multiples of `every` in (after, before); none of 0."""
    return max(0, (before - 1) // every - after // every) if every else 0


def _like(old: jax.Array, value: float) -> jax.Array:
    """`value` in the place and type of `old`, so that a step that took one takes the other."""
    return jax.device_put(np.asarray(value, old.dtype), old.sharding)
