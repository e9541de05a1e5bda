"""What a sweep knows of its trials: read from the study by whoever shows or ranks them.

Positions count micro-batches of `Summary.micro` rows that a trial has trained on.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["waiting", "running", "paused", "stopped", "diverged", "finished"]
# search: asked of the sampler; baseline: the config as it is; prior: what is known of such models;
# repeat: once more with another seed; final: a finalist once more, on everything
Role = Literal["search", "baseline", "prior", "repeat", "final"]
SEARCH: tuple[Role, ...] = ("search", "baseline", "prior")  # those that rungs compare


class Result(NamedTuple):
    """A rung that a trial has done, scored on the held-out rows."""

    rung: int  # 0 is the first
    position: int  # micro-batches done in all
    loss: float  # nats a token, held out
    accuracy: float
    tokens: int  # real ones trained on for this rung
    seconds: float  # of its share of the machine


class Job(NamedTuple):
    """A rung of a trial for a worker to do."""

    number: int  # of the Optuna trial
    params: dict[str, Any]  # {config key: value}
    role: Role
    rung: int  # to do now
    start: int  # position of the last result; a file of the trial may be further
    repeats: str = ""  # of a repeat: "winner" or "defaults"
    seed: int | None = None  # of a repeat: its train.seed
    of: int | None = None  # of a final training: the trial whose params it has


@dataclass(frozen=True)
class Record:
    """One trial.

    It is waiting in the middle of a rung (or for the first), paused between rungs, and stopped,
    diverged or finished at its end.
    """

    number: int  # of the Optuna trial
    params: dict[str, Any]  # {config key: value}
    status: Status
    results: tuple[Result, ...] = ()  # in order of rungs
    curve: tuple[tuple[int, float], ...] = ()  # (position, training loss), means of windows
    why: str = ""  # why it was stopped, or what was special: "defaults", "prior 3e-4", ...
    role: Role = "search"
    repeats: str = ""  # of a repeat: "winner" or "defaults"
    owner: str = ""  # "host:pid" of the worker that has it
    rung: int = 0  # the last one it was let into, done or not
    of: int | None = None  # of a final training: the trial whose params it has
    lost_tokens: int = 0  # trained on in a rung that was not done to its end
    lost_seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """The last held-out loss."""
        return self.results[-1].loss if self.results else None

    @property
    def tokens(self) -> int:
        return sum(result.tokens for result in self.results) + self.lost_tokens

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.results) + self.lost_seconds

    def at(self, rung: int) -> Result | None:
        """Its result of that rung."""
        return next((result for result in self.results if result.rung == rung), None)


@dataclass(frozen=True)
class Summary:
    """The whole sweep, as far as it has got: what the report is made of."""

    name: str
    model: str
    data: str
    task: str
    space: dict[str, tuple[Any, ...]]
    defaults: dict[str, Any]  # what the config says for the keys of the space
    rungs: tuple[int, ...]  # positions at which trials are compared; the last is a whole training
    micro: int  # rows of a micro-batch
    records: tuple[Record, ...]
    started: float  # seconds since the epoch
    seconds: float  # used
    budget_seconds: float | None = None
    budget_tokens: int | None = None
    tokens: int = 0  # trained on in all
    full_tokens: int = 0  # one whole training's
    programs_after_first_rung: int | None = None  # compiled; None where none was counted
    winner: int | None = None  # number of the trial that won, once that is decided
    notes: tuple[str, ...] = field(default_factory=tuple)  # what the sweep decided, a line each
