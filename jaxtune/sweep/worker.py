"""A worker of a sweep: trains what the study hands out, a trial in each slot of its engine.

What keeps a kill at any time from losing or doubling anything:

1. A trial's state is on the disk before its result is in the study, and the study takes a result
   of a rung once.
2. All running trials are saved together every few minutes, and where a stop is asked for.
3. A trial goes on from its newest intact state, else from an older one, else from its beginning;
   since all that is random follows from its config and position, it comes to the same numbers.
"""

import contextlib
import dataclasses
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.errors import Failure, StorageError
from jaxtune.scoring import Score
from jaxtune.signals import Stop
from jaxtune.sweep import halving, trials
from jaxtune.sweep.pace import Pace, width_for
from jaxtune.sweep.records import SEARCH, Job, Record, Result, Role
from jaxtune.sweep.study import Study
from jaxtune.sweep.trials import Progress

SAVE_SECONDS = 180.0  # between two saves of trials in the middle of a rung
BEAT_SECONDS = 10.0  # between two signs of life
ASK_SECONDS = 5.0  # between two questions for work of which other workers may have made some
MOST_SKIPPED = 5  # micro-batches in a row without a finite loss that end a trial
_POINTS = 16  # of a curve, up to the first rung


class Engine(Protocol):
    """What of `engine.Engine` a worker needs."""

    widths: tuple[int, ...]  # largest first
    micro: int  # rows of a micro-batch
    rows: int  # of the training data

    def empty(self, width: int) -> Any: ...
    def member(self, config: Config) -> Any: ...
    def start(self, slots: Any, k: int, member: Any) -> Any: ...
    def put(self, slots: Any, k: int, saved: dict[str, np.ndarray]) -> Any: ...
    def take(self, slots: Any, k: int) -> dict[str, np.ndarray]: ...
    def step(self, slots: Any, members: list[Any], positions: list[int]) -> tuple[Any, Any]: ...
    def evaluate(self, slots: Any, rows: int | None = None) -> list[Score]: ...


class Setting(NamedTuple):
    """What a worker works with."""

    engine: Engine
    study: Study
    folder: Path  # of the trials' states
    configured: Callable[[Job], Config]  # a trial's own config
    scored: tuple[int, ...]  # held-out rows of each rung
    pace: Pace
    stop: Stop
    show: Callable[[Sequence[Record]], None]


@dataclasses.dataclass
class Trial:
    """A trial in a slot."""

    job: Job
    member: Any
    end: int  # position that ends the rung
    progress: Progress
    saved: int = -1  # position of its newest file

    def spent(self) -> tuple[int, float]:
        """Tokens and seconds since its last result."""
        tokens, seconds = self.progress.ends.get(str(self.job.start), (0, 0.0))
        return self.progress.tokens - tokens, self.progress.seconds - seconds


def work(setting: Setting, roles: Collection[Role]) -> None:
    """Trains all that the study has of these roles, until there is no more or the budget is used.

    Several workers may do so side by side; one that has nothing to do waits for the others.

    Raises:
      Cancelled, Interrupted: a stop was asked for; the trials are saved where they are.
      Failure: storage that failed, or a trial that cannot be trained; all results so far are kept.
    """
    study, stop, pace = setting.study, setting.stop, setting.pace
    population = _Population(setting)
    with _signs_of_life(study):
        try:
            population.plan()
            while not (stop.asked or pace.over()):
                population.fill(roles)
                if population.live:
                    population.advance()
                elif study.done(roles):
                    return
                else:
                    population.say_waiting()
                    _wait(ASK_SECONDS, stop)
            population.leave()
        except BaseException:
            population.abandon()
            raise


class _Population:
    """The trials in the slots: all that changes while a worker works."""

    def __init__(self, setting: Setting):
        self._setting = setting
        self._engine = setting.engine
        self._study = setting.study
        self._width = 0
        self._slots: Any = None
        self._trials: list[Trial | None] = []
        self._records: tuple[Record, ...] = ()
        self._claimed: list[int] = []  # trials that are ours, in slots or not yet
        self._window = max(1, self._study.rungs[0] // _POINTS)
        self._asked = -math.inf  # when the study had nothing for us
        self._shown = -math.inf
        self._kept = time.monotonic()
        self._waiting = False

    @property
    def live(self) -> list[tuple[int, Trial]]:
        """(slot, trial) of the taken slots."""
        return [(k, trial) for k, trial in enumerate(self._trials) if trial is not None]

    def fill(self, roles: Collection[Role]) -> None:
        """Puts trials of the study into free slots; the width follows their number."""
        live, widths = len(self.live), self._engine.widths
        full = 0 < self._width == live
        if full or time.monotonic() - self._asked < ASK_SECONDS:
            return
        jobs: list[Job] = []
        while live + len(jobs) < widths[0]:
            job = self._study.claim(roles)
            if job is None:
                self._asked = time.monotonic()
                break
            self._claimed.append(job.number)
            self._waiting = False
            jobs.append(job)
        if not live and not jobs:
            return
        width = width_for(live + len(jobs), widths)
        # The turn of the others comes when these are through.
        for k, _ in sorted(self.live, key=lambda slot: slot[1].job.number)[width:]:
            self._park(k)
        self._resize(width)
        room = self._trials.count(None)
        for job in jobs[room:]:
            self._study.release(job.number)
            self._claimed.remove(job.number)
        for job in jobs[:room]:
            trial, saved = self._opened(job)
            k = self._trials.index(None)
            self._trials[k] = trial
            if saved is None:
                self._slots = self._engine.start(self._slots, k, trial.member)
            else:
                self._slots = self._engine.put(self._slots, k, saved.arrays)
        if jobs:
            self._records = self._study.records()

    def _opened(self, job: Job) -> tuple[Trial, trials.Saved | None]:
        """A trial as its newest intact state has it, or new."""
        member = self._engine.member(self._setting.configured(job))
        rungs = self._study.rungs
        last = job.rung >= len(rungs) - 1
        end = member.positions if last else min(rungs[job.rung], member.positions)
        sweep = repr(self._study.started)
        saved, damaged = trials.newest(self._setting.folder, job.number, end, sweep)
        progress = Progress.restored(saved.about) if saved else Progress()
        if damaged or progress.position < job.start:
            why = "; ".join(damaged) or "its state is not here"
            say(f"trial {job.number} goes on from micro-batch {progress.position}: {why}")
        trial = Trial(job, member, end, progress, saved=progress.position if saved else -1)
        return trial, saved

    def _resize(self, width: int) -> None:
        """Moves the trials into slots of another width."""
        if width == self._width:
            return
        old, taken = self._slots, self.live
        self._width = width
        self._trials = [None for _ in range(width)]
        self._slots = self._engine.empty(width)
        for k, (at, trial) in enumerate(taken):
            self._trials[k] = trial
            arrays = self._engine.take(old, at)
            self._slots = self._engine.put(self._slots, k, arrays)

    def advance(self) -> None:
        """A micro-batch for each trial, and what follows from it."""
        if self._finish_rungs():  # of trials that were killed between their save and their result
            return
        self._step()
        self._leave_early()
        changed = self._finish_rungs()
        if time.monotonic() - self._kept > SAVE_SECONDS:
            self._save_all()
        if changed or self._setting.pace.due():
            self.plan()
        if changed or time.monotonic() - self._shown > 1:
            self._shown = time.monotonic()
            self._setting.show(self._current())

    def _step(self) -> None:
        began = time.monotonic()
        members = [trial and trial.member for trial in self._trials]
        positions = [trial.progress.position if trial else 0 for trial in self._trials]
        self._slots, measured = self._engine.step(self._slots, members, positions)
        seconds = time.monotonic() - began
        tokens = sum(int(measured.tokens[k]) for k, _ in self.live)
        self._setting.pace.stepped(self._width, seconds, tokens)
        share = seconds / len(self.live)
        for k, trial in self.live:
            numbers = (float(measured.loss[k]), int(measured.tokens[k]), bool(measured.finite[k]))
            trial.progress.add(*numbers, share, self._window)
            if trial.progress.position == trial.job.start:  # it does a part of it once more
                self._mark(trial)

    def _leave_early(self) -> None:
        """Stops trials that diverge or are beaten, by their loss curves."""
        for k, trial in self.live:
            progress, job = trial.progress, trial.job
            if progress.skipped >= MOST_SKIPPED:
                why = f"{MOST_SKIPPED} losses in a row were not finite"
                self._stop(k, "diverged", f"{why} up to micro-batch {progress.position}")
            elif progress.position % self._window == 0 and job.role in SEARCH:
                records = {record.number: record for record in self._current()}
                last = job.rung == len(self._study.rungs) - 1
                found = halving.early_exit(
                    records[job.number],
                    [*records.values()],
                    end=trial.end,
                    goes_on=0 if last else self._study.enter[job.rung + 1],
                    epoch=math.ceil(self._engine.rows / self._engine.micro),
                )
                if found is not None:
                    self._stop(k, found.status, found.why)

    def _finish_rungs(self) -> bool:
        """Scores, saves and records the trials whose rung is done; whether there are such."""
        ended = [(k, t) for k, t in self.live if t.progress.position >= t.end]
        if not ended:
            return False
        sizes = {self._setting.scored[trial.job.rung] for _, trial in ended}
        scores = {rows: self._scores(rows) for rows in sizes}
        for k, trial in ended:
            score, progress = scores[self._setting.scored[trial.job.rung]][k], trial.progress
            if not math.isfinite(score.loss):
                self._stop(k, "diverged", f"its held-out loss is {score.loss}")
                continue
            tokens, used = trial.spent()
            self._mark(trial)
            self._save(k, trial)  # before the study has it: see the top of this file
            result = Result(
                trial.job.rung, progress.position, score.loss, score.accuracy, tokens, used
            )
            self._study.record(
                trial.job.number,
                result,
                progress.curve,
                finished=progress.position >= trial.member.positions,
            )
            self._free(k)
        return True

    def _scores(self, rows: int) -> list[Score]:
        """Of all slots, on so many held-out rows."""
        began = time.monotonic()
        scores = self._engine.evaluate(self._slots, rows)
        seconds = time.monotonic() - began
        self._setting.pace.evaluated(self._width, seconds, rows / self._setting.scored[-1])
        for _, trial in self.live:
            trial.progress.seconds += seconds / len(self.live)
        return scores

    def _mark(self, trial: Trial) -> None:
        progress = trial.progress
        progress.ends[str(progress.position)] = (progress.tokens, progress.seconds)

    def _stop(self, k: int, status: Literal["stopped", "diverged"], why: str) -> None:
        trial = self._trials[k]
        assert trial is not None
        self._study.stop(trial.job.number, status, why, trial.progress.curve, *trial.spent())
        trials.drop(self._setting.folder, trial.job.number)
        self._free(k)
        self._records = self._study.records()

    def _free(self, k: int) -> None:
        """Empties a slot whose trial the study has back; there may be work for it at once."""
        trial = self._trials[k]
        assert trial is not None
        self._claimed.remove(trial.job.number)
        self._trials[k] = None
        self._asked = -math.inf

    def _park(self, k: int) -> None:
        """Saves a trial in the middle of a rung and gives it back."""
        trial = self._trials[k]
        assert trial is not None
        self._save(k, trial)
        self._study.release(trial.job.number, trial.progress.curve)
        self._claimed.remove(trial.job.number)
        self._trials[k] = None

    def _save(self, k: int, trial: Trial) -> None:
        if trial.saved == trial.progress.position:
            return
        began = time.monotonic()
        about = dataclasses.asdict(trial.progress) | {"started": repr(self._study.started)}
        arrays = self._engine.take(self._slots, k)
        saved = trials.Saved(trial.progress.position, arrays, about)
        trials.save(self._setting.folder, trial.job.number, saved)
        trial.saved = trial.progress.position
        self._setting.pace.kept(time.monotonic() - began)

    def _save_all(self) -> None:
        for k, trial in self.live:
            self._save(k, trial)
        self._kept = time.monotonic()

    def plan(self) -> None:
        """Plans what is left of the budget, now that there is something new to go by."""
        self._records = self._study.records()
        live = {trial.job.number: trial.progress.position for _, trial in self.live}
        line = self._setting.pace.replan(self._records, live)
        if (plan := self._setting.pace.plan) is not None:
            self._study.allow(plan.enter[: len(self._study.rungs)])
        if line is not None:
            self._study.note(line)

    def _current(self) -> list[Record]:
        """All records, those of trials here as they are now."""
        live = {trial.job.number: trial for _, trial in self.live}
        return [
            dataclasses.replace(
                record,
                status="running",
                curve=tuple(live[record.number].progress.curve),
                lost_tokens=live[record.number].spent()[0],
                lost_seconds=live[record.number].spent()[1],
                owner=f"{socket.gethostname()}:{os.getpid()}",
            )
            if record.number in live
            else record
            for record in self._records
        ]

    def say_waiting(self) -> None:
        """Says, once until there is work again, who has what is left."""
        if not self._waiting:
            self._waiting = True
            owners = {r.owner for r in self._study.records() if r.status == "running"}
            say(f"waiting for {', '.join(sorted(owners)) or 'other workers'}")

    def leave(self) -> None:
        """Saves the trials where they are and gives them back."""
        for k, _ in self.live:
            self._park(k)

    def abandon(self) -> None:
        """Gives the trials back as the disk has them, whatever went wrong."""
        with contextlib.suppress(Failure):
            for number in self._claimed:
                self._study.release(number)


@contextlib.contextmanager
def _signs_of_life(study: Study) -> Iterator[None]:
    """Shows from a thread that this worker lives: to compile takes longer than a lease lasts."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            # What is wrong with the storage shows where a result is recorded.
            with contextlib.suppress(StorageError):
                study.renew()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _wait(seconds: float, stop: Stop) -> None:
    until = time.monotonic() + seconds
    while not stop.asked and time.monotonic() < until:
        time.sleep(0.05)
