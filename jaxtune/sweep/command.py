"""`jaxtune sweep`, from the config to the winner: the order of things, read from top to bottom."""

import gc
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from jaxtune import population
from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.data.packing import digest
from jaxtune.hf import tokenizer
from jaxtune.sweep import compiles, ending, halving, prior, sampling, winner, worker
from jaxtune.sweep import space as spaces
from jaxtune.sweep.asked import Sweep, Trained, entered, summary
from jaxtune.sweep.budget import MOST, Ask
from jaxtune.sweep.pace import Pace, measure
from jaxtune.sweep.records import SEARCH, Job, Record, Role
from jaxtune.sweep.study import Study, open_study
from jaxtune.workdir import TRIALS

_SEEDS = 1000  # the seeds of repeats begin so far from the config's own


def search(
    config: Config, workdir: str | Path, clock: Callable[[], float] | None = None
) -> dict[str, Any]:
    """Searches hyperparameters as `config.sweep` says and hands over the winner.

    Goes on with what is in `workdir`. Several processes may work on one sweep by the same call; one
    of them ends it. Returns what result.json holds: winner, scores, counts and paths.

    Args:
      clock: seconds since the command began, which a budget of time limits; None begins here.
    Raises:
      Failure: see jaxtune.errors; every finished result is kept.
    """
    with entered(config, workdir, clock) as sweep:
        if (result := ending.done(sweep)) is not None:
            say(f"this sweep is over; its winner is in {result['best']}")
            return result
        return ending.end(sweep, _train(sweep))


def work(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains for a sweep until nothing is left, and leaves its ending to others.

    Returns {"trials": how many there are, "seconds": of this process}.

    Raises:
      Failure: see jaxtune.errors.
    """
    began = time.monotonic()
    with entered(config, workdir) as sweep:
        trained = _train(sweep)
        count = len(trained.study.records())
        return {"trials": count, "seconds": round(time.monotonic() - began, 3)}


def _train(sweep: Sweep) -> Trained:
    """The search; then the finalists on everything; then winner and defaults with other seeds."""
    config = sweep.config
    trained = _begun(sweep)
    study, pace = trained.study, trained.pace
    _run(sweep, trained, SEARCH)
    records = study.records()
    trained.after = trained.programs(records)
    if pace.over() and not any(record.results for record in records):
        raise pace.too_short()
    winner.choose(records)  # where all diverged it ends here
    if sweep.partial:
        for record in _finalists(records, config.sweep.finalists):
            study.add("final", record.params, of=record.number)
        trained.engine = None
        gc.collect()  # the base of the search, before that of the finalists is loaded
        trained.engine = _opened(sweep, config, 1.0)
        _run(sweep, trained, ("final",))
    records = study.records()
    best = winner.choose(records)
    pace.replan(records, {})  # how many repeats there is time for
    repeats = pace.plan.repeats if pace.plan else config.sweep.repeats
    if best.params == sweep.own:
        study.note("the defaults won, so there is nothing to compare them with")
    elif repeats:
        first = config.train.seed + _SEEDS
        for seed in range(first, first + repeats):
            for name, params in (("winner", best.params), ("defaults", sweep.own)):
                study.add("repeat", params, repeats=name, seed=seed)
        _run(sweep, trained, ("repeat",))
    return trained


def _run(sweep: Sweep, trained: Trained, roles: Collection[Role]) -> None:
    """Trains what the study has of these roles."""

    def show(records: Sequence[Record]) -> None:
        sweep.show(summary(sweep, trained, records))

    def configured(job: Job) -> Config:
        seed = {} if job.seed is None else {"train.seed": job.seed}
        return spaces.configured(trained.engine.config, job.params | seed)

    setting = worker.Setting(
        trained.engine,
        trained.study,
        sweep.workdir / TRIALS,
        configured,
        trained.scored,
        trained.pace,
        sweep.stop,
        show,
    )
    worker.work(setting, roles)
    sweep.check_stop()


def _begun(sweep: Sweep) -> Trained:
    """The engine of the search, and the study of this model, data and space."""
    asked = sweep.config.sweep
    compiles.count()  # from here on
    engine = _opened(sweep, sweep.searched, asked.data_fraction)
    every = engine.member(engine.config).every
    shortest, longest = _lengths(sweep, engine)
    rungs = halving.positions(longest, asked.rungs, asked.eta, every)
    held = len(engine.eval)
    scored = halving.scored(rungs, engine.micro, held)
    if len(rungs) > 1 and shortest <= rungs[-2]:  # a trial may end at any rung
        scored = (held,) * len(rungs)
    identity = {
        "model": sweep.model,
        "tokenizer": tokenizer.tokenizer_digest(str(engine.folder)),
        "data": digest(engine.train),
        "eval_data": digest(engine.eval),
        "micro": engine.micro,
    }
    first = prior.first_trials(sweep.config, sweep.space, sweep.hidden, sweep.family, sweep.earlier)
    most = min(MOST, sampling.of(asked.sampler, sweep.space, sweep.config).limit(first))
    # Where the budget decides, a first population is measured before it is known how many.
    trials = min(asked.trials or engine.widths[0], int(most))
    if trials < asked.trials:
        say(f"sweep.space has {trials} different trials, so there are not {asked.trials}")
    enter = halving.quotas(trials, len(rungs), asked.eta, asked.finalists)
    study = open_study(
        sweep.config, sweep.workdir, identity, rungs, enter, first,
        space=sweep.space, began=sweep.began,
    )  # fmt: skip
    if sweep.budget is None:
        study.allow(enter)  # also where the sweep was begun with another number
    pace = _pace(sweep, engine, study, scored, int(most))
    if sweep.budget is not None and sweep.budget.unit == "seconds":
        measure(engine, pace, engine.config)
    before = sum(len(record.results) for record in study.records())
    return Trained(engine, study, engine.micro, scored, pace, before)


def _opened(sweep: Sweep, config: Config, fraction: float) -> Any:
    most, widths = config.sweep.population, []
    while most:
        widths.append(most)
        most = max(1, most // config.sweep.eta) if most > 1 else 0
    points = spaces.points(config, sweep.space)
    return population.open_engine(config, points, tuple(widths), fraction=fraction)


def _lengths(sweep: Sweep, engine: Any) -> tuple[int, int]:
    """Micro-batches of the shortest and of the longest training in the space."""
    points = spaces.points(engine.config, sweep.space)
    keys = [k for k in ("train.epochs", "train.steps", "train.batch_size") if k in points]
    found = [
        engine.member(
            spaces.configured(engine.config, dict(zip(keys, values, strict=True)))
        ).positions
        for values in itertools.product(*(points[key] for key in keys))
    ]
    return min(found), max(found)


def _pace(sweep: Sweep, engine: Any, study: Study, scored: Sequence[int], most: int) -> Pace:
    asked, rungs, whole = sweep.config.sweep, study.rungs, 0
    if sweep.partial:
        shorter = sweep.searched.data.max_length / sweep.config.data.max_length
        whole = round(rungs[-1] / asked.data_fraction / shorter)
    shares = tuple(rows / scored[-1] for rows in scored)
    ask = Ask(rungs, asked.trials, asked.eta, asked.finalists, asked.repeats, whole, most, shares)
    return Pace(
        sweep.budget,
        ask,
        study.seconds,
        study.workers,
        widths=engine.widths,
        tokens=engine.micro * sweep.searched.data.max_length,
        close=ending.RELOADS * (time.time() - sweep.began),
    )


def _finalists(records: Sequence[Record], most: int) -> list[Record]:
    """The best of the furthest rung, to be trained again on everything."""
    trials = [record for record in records if record.role in SEARCH and record.results]
    return halving.ranked(trials, max(r.results[-1].rung for r in trials))[:most]
