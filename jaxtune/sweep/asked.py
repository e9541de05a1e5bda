"""What a sweep is asked to do, checked as far as that goes before a model is loaded."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune import assemble, bucket, cores
from jaxtune import budget as budgets
from jaxtune.budget import Budget
from jaxtune.config import Config, replaced
from jaxtune.errors import Cancelled, ConfigError, Interrupted
from jaxtune.hf import files
from jaxtune.signals import Stop
from jaxtune.sweep import compiles, live, prior, wording
from jaxtune.sweep import space as spaces
from jaxtune.sweep.pace import Pace
from jaxtune.sweep.records import SEARCH, Record, Summary
from jaxtune.sweep.space import Space
from jaxtune.sweep.study import Study, reach, winners
from jaxtune.workdir import lock


class Sweep(NamedTuple):
    """A search that is about to begin."""

    config: Config
    space: Space
    hidden: int  # width of the model
    family: str  # its name
    model: str  # fingerprint of its files
    earlier: tuple[dict[str, Any], ...]  # what won earlier sweeps of it, the latest last
    workdir: Path
    budget: Budget | None  # of all devices together
    began: float  # seconds since the epoch, when this process was asked
    stop: Stop
    show: Callable[[Summary], None]

    @property
    def searched(self) -> Config:
        """The config of all trainings but those on everything."""
        length = self.config.sweep.max_length
        return replaced(self.config, {"data.max_length": length}) if length else self.config

    @property
    def partial(self) -> bool:
        """Whether the search sees less than everything."""
        return self.config.sweep.data_fraction < 1 or self.searched != self.config

    @property
    def own(self) -> dict[str, Any]:
        """What the config itself says for the keys of the space."""
        return spaces.defaults(self.config, self.space)

    def check_stop(self) -> None:
        """Raises Cancelled or Interrupted where a stop is asked for; everything is saved then."""
        if not self.stop.asked:
            return
        kind = Cancelled if self.stop.by_user else Interrupted
        raise kind(
            f"the sweep in {self.workdir} is stopped, its trials saved where they are",
            fix="the same command to go on",
        )


@dataclass
class Trained:
    """What a worker of a sweep has at hand."""

    engine: Any  # engine.Engine; None once its memory is given back
    study: Study
    micro: int  # rows of a micro-batch
    scored: tuple[int, ...]  # held-out rows that each rung is scored on
    pace: Pace
    before: int  # results there were when this process began
    compiled: int | None = None  # programs by the end of its first rung
    after: int | None = None  # programs from there to the end of the search

    def programs(self, records: Sequence[Record]) -> int | None:
        """How many programs the search has compiled after this process ended its first rung."""
        if self.after is not None:
            return self.after
        if sum(len(record.results) for record in records) <= self.before:
            return None
        if self.compiled is None:
            self.compiled = compiles.count()()
        return compiles.count()() - self.compiled


@contextlib.contextmanager
def entered(
    config: Config, workdir: str | Path, clock: Callable[[], float] | None = None
) -> Iterator[Sweep]:
    """Checks a sweep, cheapest first, and keeps trainings out of its workdir meanwhile.

    Args:
      clock: seconds since the command began; None begins here.
    Raises:
      ConfigError: settings that no search can be done with, or a workdir in use.
      StorageError: the study's storage cannot be reached.
    """
    began = time.time() - (clock() if clock else 0.0)
    _check(config, workdir)
    path = Path(workdir).expanduser().absolute()
    folder = files.resolve(config.model.path)
    family, model = assemble.describe(config, folder)
    chips = jax.device_count() // cores.count()
    space = prior.space_of(config, model.hidden_size, family.label, chips)
    budget = budgets.parse(config.sweep.budget, "sweep.budget")
    if budget is None and not config.sweep.trials:
        raise ConfigError("sweep.trials is 0, and there is no sweep.budget", fix="either of them")
    fingerprint = files.fingerprint(folder)
    with lock(path, shared=True), Stop() as stop, live.table() as show:
        reach(config.sweep.storage, path)
        earlier = winners(config, path, fingerprint)
        yield Sweep(
            config=config,
            space=space,
            hidden=model.hidden_size,
            family=family.label,
            model=fingerprint,
            earlier=earlier,
            workdir=path,
            budget=budget and budget.on(chips),
            began=began,
            stop=stop,
            show=show,
        )


def _check(config: Config, workdir: str | Path) -> None:
    if bucket.is_bucket(workdir):
        raise ConfigError(f"{workdir} is in a bucket", fix="a --workdir on a disk, for a sweep")
    if not config.model.path:
        raise ConfigError("model.path is empty", fix="--config.model.path=FOLDER_OR_HUB_ID")
    if not config.data.train:
        raise ConfigError("data.train is empty", fix="--config.data.train=FILE")
    if not config.data.eval and not config.data.eval_fraction:
        raise ConfigError(
            "a sweep compares losses on held-out rows, and there are none",
            fix="data.eval=FILE, or data.eval_fraction=0.1 of the training rows",
        )
    if config.sweep.max_length > config.data.max_length:
        raise ConfigError(
            f"sweep.max_length is {config.sweep.max_length}, more than data.max_length, "
            f"{config.data.max_length}: rows of the search are the same or shorter",
            fix="a smaller sweep.max_length, or 0",
        )
    if config.train.budget:
        raise ConfigError(
            "train.budget is of one training; how long trials take must not decide their schedules",
            fix="sweep.budget (--budget), and train.budget empty",
        )
    if (Path(workdir) / "checkpoints").is_dir():
        raise ConfigError(f"{workdir} holds a training", fix="another --workdir for the sweep")


def summary(
    sweep: Sweep,
    trained: Trained,
    records: Sequence[Record],
    best: Record | None = None,
) -> Summary:
    """The sweep as live table and report show it.

    Args:
      records: of the study, or newer.
      best: the trial that won.
    """
    config, budget = sweep.config, sweep.budget
    spent = sum(record.tokens for record in records)
    done = sum(record.curve[-1][0] for record in records if record.curve)
    whole = [r.tokens for r in records if r.role in SEARCH and r.status == "finished"]
    return Summary(
        name=sweep.workdir.name,
        model=config.model.path,
        data=wording.sources(config.data.train),
        task=config.task,
        space=sweep.space,
        defaults=sweep.own,
        rungs=trained.study.rungs,
        micro=trained.micro,
        records=tuple(records),
        started=trained.study.started,
        seconds=trained.study.seconds(),
        budget_seconds=budget.amount if budget and budget.unit == "seconds" else None,
        budget_tokens=round(budget.amount) if budget and budget.unit == "tokens" else None,
        tokens=spent,
        full_tokens=max(whole, default=round(spent / max(done, 1) * trained.study.rungs[-1])),
        programs_after_first_rung=trained.programs(records),
        winner=best.number if best else None,
        notes=trained.study.notes(),
    )
