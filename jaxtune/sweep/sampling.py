"""Which trial is next: Optuna's samplers, asked about a copy of what is known.

Optuna's own `ask` would take up paused trials, and its samplers do not look at them. So each
question goes to a study in memory, where a trial has the score of its furthest rung; the answer
depends on the seed, the number of the trial and the records, not on the process.
"""

import importlib
import inspect
import math
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.sweep import space as spaces
from jaxtune.sweep.attributes import finite
from jaxtune.sweep.prior import First
from jaxtune.sweep.records import Record
from jaxtune.sweep.space import Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_TRIES = 20  # for a trial that is not there yet, in spaces of choices


class Sampler:
    """A sampler by its name. Raises ConfigError for one that is not there."""

    def __init__(self, name: str, space: Space, seed: int):
        self._make, self._space, self._seed = _maker(name), space, seed
        ranges = any(axis[0] != "choice" for axis in space.values())
        self._size = math.inf if ranges else len(spaces.grid(space))

    def limit(self, first: Sequence[First]) -> float:
        """How many different trials there are."""
        outside = [one for one in first if not self._inside(one.params)]
        return self._size + len(outside)

    def ask(self, trials: Sequence[Record]) -> tuple[First, dict[str, Any]]:
        """(the trial after these, what the sampler wants kept with it)."""
        known = [trial.params for trial in trials]
        for attempt in range(_TRIES):
            params, system = self._sample(trials, f"{self._seed} {len(trials)} {attempt}")
            if params not in known:
                return First(params, "search", ""), system
        if self._size < math.inf:
            params = next(p for p in spaces.grid(self._space) if p not in known)
        return First(params, "search", ""), system

    def _sample(self, trials: Sequence[Record], seed: str) -> tuple[dict[str, Any], dict[str, Any]]:
        import optuna

        sampler = self._make(random.Random(seed).getrandbits(32))
        study = optuna.create_study(sampler=sampler)
        for record in trials:
            if self._inside(record.params):
                study.add_trial(self._shown(record))
        trial = study.ask(spaces.distributions(self._space))
        system = study.trials[-1].system_attrs
        # TPE tells other processes what it is about to choose; here that is known at once.
        kept = {key: value for key, value in system.items() if not key.startswith("tpe:")}
        return spaces.decoded(self._space, trial.params), kept

    def _inside(self, params: dict[str, Any]) -> bool:
        return all(spaces.contains(axis, params[key]) for key, axis in self._space.items())

    def _shown(self, record: Record) -> "FrozenTrial":
        """A trial as a sampler should see it: what was scored is over, as far as it went."""
        from optuna.trial import TrialState, create_trial

        scores = {r.position: finite(r.loss) for r in record.results}
        if record.status == "finished":
            state = TrialState.COMPLETE
        elif scores or record.status in ("stopped", "diverged"):
            state = TrialState.PRUNED
            if not scores and record.curve:
                scores = {record.curve[-1][0]: finite(record.curve[-1][1])}
        else:
            state = TrialState.RUNNING
        return create_trial(
            state=state,
            value=record.loss if record.status == "finished" else None,
            params={key: spaces.encoded(record.params[key]) for key in self._space},
            distributions=spaces.distributions(self._space),
            intermediate_values=scores,
        )


class Grid(Sampler):
    """Every combination once, in a seeded order. Raises ConfigError for ranges, or too few trials.

    Optuna's own would suggest a paused trial's combination again.
    """

    def __init__(self, space: Space, config: Config):
        self._points = spaces.grid(space)
        trials = config.sweep.trials
        if 0 < trials < len(self._points):
            raise ConfigError(
                f"the grid of sweep.space has {len(self._points)} trials, sweep.trials is {trials}",
                fix=f"sweep.trials={len(self._points)}, or sweep.sampler=random",
            )
        self._own = spaces.defaults(config, space)
        random.Random(config.sweep.seed).shuffle(self._points)

    def limit(self, first: Sequence[First]) -> float:
        del first
        return len(self._points)

    def ask(self, trials: Sequence[Record]) -> tuple[First, dict[str, Any]]:
        known = [trial.params for trial in trials]
        params = next(point for point in self._points if point not in known)
        if params == self._own:
            return First(params, "baseline", "defaults"), {}
        return First(params, "search", ""), {}


def of(name: str, space: Space, config: Config) -> Sampler:
    """The sampler of `config.sweep`. Raises ConfigError where it is none."""
    return Grid(space, config) if name == "grid" else Sampler(name, space, config.sweep.seed)


def _maker(name: str):
    """seed -> a sampler of that name."""
    import optuna

    if name in ("tpe", "random"):
        made = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[name]
        return lambda seed: made(seed=seed)
    module, _, wanted = name.rpartition(".")

    def made_with(seed: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return found(seed=seed) if seeded else found()

    try:
        found = getattr(importlib.import_module(module), wanted)
        seeded = "seed" in inspect.signature(found).parameters
        made = made_with(0)
    except Exception as error:  # whatever the import or the class of the user raises
        raise ConfigError(
            f"sweep.sampler {name!r}: {type(error).__name__}: {error}",
            fix='tpe, random, grid, or a sampler class such as "optuna.samplers.GPSampler"',
        ) from error
    if not isinstance(made, optuna.samplers.BaseSampler):
        raise ConfigError(
            f"sweep.sampler {name!r} is no sampler of Optuna",
            fix="a subclass of optuna.samplers.BaseSampler",
        )
    return made_with
