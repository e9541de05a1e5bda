"""Trials of a study as records: what stands in their user attributes.

A trial has three: `about`, which never changes ({"params", "role", "why", "repeats", "seed", "of"};
params also have what lies outside of the space), `state`, a `State`, and its loss `curve`. They are
few because a database reads all of them whenever a worker asks for something to do.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.sweep import sessions
from jaxtune.sweep.halving import Curve
from jaxtune.sweep.records import Record, Result, Status

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class State(NamedTuple):
    """What a trial's workers have done; written while it is RUNNING."""

    rung: int  # the last one it was let into
    owner: str  # session that has it, or ""
    results: tuple[tuple[Any, ...], ...] = ()  # fields of Result, then whether it is whole
    ended: tuple[Any, ...] = ()  # status, why, tokens and seconds of the rung it left

    def last(self) -> tuple[Any, ...] | None:
        """The result of its rung."""
        return next((row for row in self.results if row[0] == self.rung), None)


def ours(trial: "FrozenTrial") -> bool:
    """Not one that somebody put in by hand."""
    return "about" in trial.user_attrs and "state" in trial.user_attrs


def state(trial: "FrozenTrial") -> State:
    """Its state, from JSON."""
    rung, owner, results, ended = trial.user_attrs["state"]
    return State(rung, owner, tuple(map(tuple, results)), tuple(ended))


def record(trial: "FrozenTrial") -> Record:
    """A trial of ours as everyone else knows it."""
    about, now = trial.user_attrs["about"], state(trial)
    status: Status
    why, tokens, seconds = about["why"], 0, 0.0
    if trial.state.name == "COMPLETE":
        status = "finished"
    elif trial.state.is_finished():
        status, end, tokens, seconds = now.ended or ("stopped", "ended by hand", 0, 0.0)
        why = f"{why}; {end}" if why else end
    elif trial.state.name == "RUNNING":
        status = "running"
    else:
        status = "waiting" if now.last() is None else "paused"
    params = tuples(about["params"])
    if about["seed"] is not None:
        params["train.seed"] = about["seed"]
    return Record(
        number=trial.number,
        params=params,
        status=status,
        results=tuple(sorted(Result(*row[:-1]) for row in now.results)),
        curve=tuple((at, loss) for at, loss in trial.user_attrs.get("curve", ())),
        why=why,
        role=about["role"],
        repeats=about["repeats"],
        owner=sessions.spelled(now.owner),
        rung=now.rung,
        of=about["of"],
        lost_tokens=tokens,
        lost_seconds=seconds,
    )


def tuples(params: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the config has them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}


def rounded(curve: Curve) -> list[tuple[int, float]]:
    return [(at, float(f"{loss:.6g}")) for at, loss in curve]


def finite(loss: float) -> float:
    """Optuna takes no NaN as a trial's value."""
    return loss if math.isfinite(loss) else math.inf


def plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
