"""How a sweep ends: the winner handed over, the report written, the result in one file."""

import gc
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jaxtune
from jaxtune import setup
from jaxtune.console import say
from jaxtune.sweep import findings, halving, report, trials, winner
from jaxtune.sweep import space as spaces
from jaxtune.sweep.asked import Sweep, Trained, summary
from jaxtune.sweep.records import SEARCH, Record, Summary
from jaxtune.workdir import TRIALS, InUse, lock

RELOADS = 1.5  # times the way to the first step: the base is loaded to score and to export it
_RISE = 0.01  # of the held-out loss towards the end that is worth a word
_LOCK = ".ending.lock"  # of the worker that ends the sweep


def done(sweep: Sweep) -> dict[str, Any] | None:
    """The result of a sweep that has ended and was asked for the same."""
    try:
        result = json.loads((sweep.workdir / winner.RESULT).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(result, dict) and result.get("asked") == _asked(sweep)
    return result if same and (sweep.workdir / winner.BEST).is_dir() else None


def _asked(sweep: Sweep) -> str:
    """A digest of all settings and the model's files."""
    text = json.dumps([setup.portable(sweep.config), sweep.model], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def end(sweep: Sweep, trained: Trained) -> dict[str, Any]:
    """Hands the winner over and reports, unless another worker does, or has done so.

    Raises:
      Failure: what has been trained is kept; the same command ends the sweep.
    """
    try:
        with lock(sweep.workdir, name=_LOCK):
            return done(sweep) or _end(sweep, trained)
    except InUse:
        say(f"nothing is left to train; another worker ends the sweep in {sweep.workdir}")
        return {"workdir": str(sweep.workdir), "ended_by": "another worker"}


def _end(sweep: Sweep, trained: Trained) -> dict[str, Any]:
    study, workdir = trained.study, sweep.workdir
    records = study.records()
    best = winner.choose(records)
    given = winner.outdone(records) or best
    config = spaces.configured(trained.engine.config, given.params)
    rows = trained.scored[given.results[-1].rung]
    before = winner.base_loss(trained.engine, config, rows)
    winner.require_gain(before, given, records, trained.engine.outcomes)
    number = best.number if best.of is None else best.of
    say(f"the winner is trial {number}, held-out loss {best.loss:.4f}")
    for line in warnings(records, best, trained.scored):
        say(f"warning: {line}")
        study.note(line)
    for line in _notes(sweep, records, best, trained.scored):
        study.note(line)
    folder, name = workdir / TRIALS, repr(study.started)
    state = winner.state_of(trained.engine, config, given, folder, name, sweep.check_stop)
    made = workdir / f"{winner.BEST}.saving"
    step = winner.write(trained.engine, config, given, state, made, before)
    del state
    trained.engine = None
    gc.collect()  # the base is loaded again, to score and export what is on the disk
    sweep.check_stop()
    text = winner.page(config, sweep.space, given.params, sweep.own)
    winner.write_text(workdir / winner.PAGE, text)
    with ThreadPoolExecutor(1) as beside:
        drawing = beside.submit(report.pictures, summary(sweep, trained, records, best))
        everything = rows == trained.scored[-1]
        scores = winner.hand_over(given, step, made, workdir, whole=everything)
    whole = summary(sweep, trained, records, best)
    pages = report.write(whole, drawing.result(), workdir)
    result = _result(sweep, whole, given, scores) | {"steps": step, "report": str(pages[0])}
    winner.write_json(workdir / winner.RESULT, result)
    for record in records:
        if record.status in ("stopped", "diverged"):
            trials.drop(folder, record.number)
    return result


def warnings(records: Sequence[Record], best: Record, scored: Sequence[int]) -> list[str]:
    """What speaks against the winner: rows learnt by heart, defaults that do better.

    Args:
      scored: held-out rows of each rung.
    """
    found = []
    last = best.results[-1]
    same = [result for result in best.results if scored[result.rung] == scored[last.rung]]
    least = min(same, key=lambda result: result.loss)
    if least.loss < (1 - _RISE) * last.loss:
        found.append(
            f"the winner's held-out loss was {least.loss:.4f} after {least.position} of "
            f"{last.position} micro-batches and is {last.loss:.4f} at the end: it learns its rows "
            f"by heart; search with about {least.position / last.position:.0%} of the steps"
        )
    if winner.outdone(records) is not None:
        ours, theirs = map(statistics.fmean, winner.again(records).values())
        found.append(
            f"with other seeds the defaults are better, {theirs:.4f} against {ours:.4f} in the "
            "mean: they are handed over, not the winner"
        )
    return found


def _notes(
    sweep: Sweep, records: Sequence[Record], best: Record, scored: Sequence[int]
) -> list[str]:
    """What is to be said of the search."""
    found = [winner.sound_rates(records)]
    part = [(at, rows) for at, rows in enumerate(scored, 1) if rows < scored[-1]]
    if part:
        rungs = ", ".join(f"rung {at} on {rows}" for at, rows in part)
        found.append(f"of the {scored[-1]} held-out rows, {rungs} scored; the last on all")
    if best.status != "finished":
        found.append(f"the winner is trained as far as micro-batch {best.results[-1].position}")
    if sweep.partial and best.role != "final":
        found.append("there was no time to train finalists on everything")
    for held in halving.agreement(records):
        if held.trials > 1:
            found.append(
                f"of {held.trials} trials, the best at rung {held.rung + 2} was number "
                f"{held.best_was} at rung {held.rung + 1}"
            )
    return [line for line in found if line]


def _result(sweep: Sweep, whole: Summary, given: Record, scores: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds; `given` is the trial that is handed over."""
    records, workdir = whole.records, sweep.workdir
    baseline = findings.baseline(whole)
    gain = findings.gain(whole)
    again = winner.again(records)
    early = baseline.loss if baseline else None  # where there was no time for repeats
    return {
        "winner": given.number if given.of is None else given.of,
        "handed_over": "defaults" if given.repeats else "winner",
        "params": dict(given.params),
        "loss": scores["tuned"]["loss"],
        "accuracy": scores["tuned"]["accuracy"],
        "loss_before": scores["base"]["loss"],
        "defaults": {
            "params": sweep.own,
            "loss": statistics.fmean(again["defaults"]) if again["defaults"] else early,
            "whole": bool(again["defaults"]) or (bool(baseline) and baseline.status == "finished"),
        },
        "repeats": again | {"verdict": gain.verdict if gain else "unknown"},
        "trials": dict(Counter(r.status for r in records if r.role in SEARCH)),
        "tokens": whole.tokens,
        "seconds": round(whole.seconds, 3),
        "programs_after_first_rung": whole.programs_after_first_rung,
        "best": str(workdir / winner.BEST),
        "config": str(workdir / winner.PAGE),
        "export": str(workdir / winner.EXPORT),
        "notes": list(whole.notes),
        "asked": _asked(sweep),
        "version": jaxtune.__version__,
    }
