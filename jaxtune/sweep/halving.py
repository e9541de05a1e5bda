"""Who goes on: rungs, quotas, promotion and early exit. Pure functions of what is recorded.

Successive halving (arXiv 1502.07943): all trials train to the first rung, one in `eta` of them to
the next, which is `eta` times as long. Trials go on where they stopped, so 16 trials on 3 rungs
cost 16/16 + 4 * 3/16 + 1 * 12/16 = 2.5 whole trainings.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxtune.sweep.records import SEARCH, Record

Curve = Sequence[tuple[int, float]]  # (position, mean training loss of the window that ends there)

_RISE, _NATS = 1.5, 0.5  # diverged: the loss is this many times, and nats, above where it began,
_WORSE = 1.5  # or no lower than there and this many times the best one's on the same rows,
_LAST = 3  # for so many windows in a row
# Dominated. On 16 trials of stories260k on Yoruba text, learning rates from 1e-4 to 0.1, these
# stopped 8 of 16 in the first rung and 3 of 4 in the second, a tenth of their cost, and none that
# was to go on. With 3 standard errors, 4 windows and half of the curve left out there was one.
_WINDOWS = 6  # paired windows before a trial can be called so
_CERTAIN = 5.0  # standard errors by which it must still be behind when the rung ends
_MARGIN = 0.01  # and by this share of the better one's loss

UPDATES = 32  # of a trial before it is first compared, where that is no more than an eighth
SCORED = 256  # held-out rows that rungs before the last are scored on at least


class Exit(NamedTuple):
    """Why a trial is not worth its rung."""

    status: Literal["stopped", "diverged"]
    why: str


class Agreement(NamedTuple):
    """How well the ranks of a rung held at the next."""

    rung: int  # 0 is the first
    trials: int  # with a score of both
    spearman: float | None  # None where they are fewer than three
    best_was: int  # rank at `rung`, 1 is first, of the one that is best at the next


def positions(longest: int, rungs: int, eta: int, every: int = 1) -> tuple[int, ...]:
    """Where trials are compared, in micro-batches; the last is `longest`, the whole training.

    Each is eta times the one before. In a training so short that the first would have fewer than
    UPDATES updates, which say little (high rates lead at first), it has these or an eighth of the
    training, and the others lie evenly between on a log scale. Rungs that cannot be kept apart are
    one.

    Args:
      every: micro-batches of an update.
    """
    if rungs == 1:
        return (longest,)
    first = max(longest / eta ** (rungs - 1), min(UPDATES * every, longest / 8))
    ratio = (longest / first) ** (1 / (rungs - 1))
    # Rounded first: 64 must not become 64.00000000000001, and so 65.
    return tuple(sorted({math.ceil(round(longest / ratio**back, 6)) for back in range(rungs)}))


def scored(rungs: Sequence[int], micro: int, rows: int) -> tuple[int, ...]:
    """On how many of the held-out `rows` each rung is scored.

    The last on all. The others on no more than they train on, `micro` a position, or SCORED: a
    score then costs a third of its rung, where all rows of a large file would cost many rungs.
    """
    trained = (micro * (end - begin) for begin, end in zip((0, *rungs), rungs[:-1], strict=False))
    return (*(min(rows, max(SCORED, count)) for count in trained), rows)


def quotas(trials: int, rungs: int, eta: int, finalists: int) -> tuple[int, ...]:
    """How many trials may enter each rung: one in eta, but at least `finalists`.

    Places that the last rung has more by that are taken from the rung before, which pays for them.
    """
    usual = [trials]
    while len(usual) < rungs:
        usual.append(max(1, usual[-1] // eta))
    found = [max(count, min(trials, finalists)) for count in usual]
    if rungs > 2:
        found[-2] = max(found[-1], found[-2] - (found[-1] - usual[-1]))
    return tuple(found)


def ranked(records: Sequence[Record], rung: int) -> list[Record]:
    """The trials with a finite score of a rung, best first, ties by number."""
    scored = [(result.loss, r.number, r) for r in records if (result := r.at(rung))]
    return [r for loss, _, r in sorted(scored, key=lambda s: s[:2]) if math.isfinite(loss)]


def promotable(
    records: Sequence[Record], enter: Sequence[int], me: str = ""
) -> tuple[Record, int] | None:
    """(the paused trial to go on with, the rung it enters), the lowest rung first.

    A rung that is complete sends its best. Where other workers still train members of it, a trial
    goes on that is among the best of those already judged, in the same proportion (ASHA, arXiv
    1810.05934); for members of its own a worker waits. One that diverges leaves its place to the
    next best. A whole training that was shorter than its rung takes none.

    Args:
      records: of the whole study.
      enter: how many may enter each rung.
      me: `owner` of the worker that asks.
    """
    trials = [r for r in records if r.role in SEARCH]
    complete, mine = len(trials) >= enter[0], False
    for rung in range(len(enter) - 1):
        members = [r for r in trials if r.rung >= rung]
        pending = [r for r in members if _pending(r, rung)]
        mine |= any(r.owner == me for r in pending)
        complete &= not pending
        quota = enter[rung + 1]
        if not complete:
            judged = len(members) - len(pending)
            quota = 0 if mine else min(quota, judged * quota // enter[rung])
        order = [r for r in ranked(members, rung) if r.rung > rung or r.status == "paused"]
        sent = sum(r.rung > rung and not _gone(r, rung + 1) for r in members)
        # Of a complete rung all may be sent, in the end, by the way of those that diverge.
        best_first = [r for r in order[: None if complete else quota] if r.rung == rung]
        if best_first and sent < quota:
            return best_first[0], rung + 1
    return None


def beaten(records: Sequence[Record], enter: Sequence[int]) -> list[tuple[Record, str]]:
    """(paused trial that no place can fall to any more, why it is stopped)."""
    trials = [r for r in records if r.role in SEARCH]
    found = []
    for rung in range(len(enter) - 1):
        # Until as many have passed the next rung as may, one of them can still diverge.
        passed = sum(bool(r.at(rung + 1)) or _stopped_in(r, rung + 1) for r in trials)
        if len(trials) < enter[0] or passed < enter[rung + 1]:
            continue
        order = [r.number for r in ranked(trials, rung)]
        for r in trials:
            if r.rung == rung and r.status == "paused":
                place = f"{order.index(r.number) + 1}" if r.number in order else "without rank"
                found.append((r, f"place {place} of {len(order)} at rung {rung + 1}"))
    return found


def _pending(record: Record, rung: int) -> bool:
    return record.at(rung) is None and record.status in ("waiting", "running")


def _gone(record: Record, rung: int) -> bool:
    """Diverged before it was judged there, so that another may have its place."""
    return record.status == "diverged" and record.at(rung) is None


def _stopped_in(record: Record, rung: int) -> bool:
    return record.status == "stopped" and record.rung == rung and record.at(rung) is None


def early_exit(
    record: Record, records: Sequence[Record], *, end: int, goes_on: int, epoch: int
) -> Exit | None:
    """Why a running trial should not be trained to the end of its rung.

    It diverges, or as many others as go on are certainly better. On rows that are new a training
    loss is a held-out loss, and all trials see the same rows, so their differences are far less
    noisy than their losses: a line through a difference must still be above zero at the rung's end
    by five of its standard errors. The best can therefore not be stopped as dominated.

    Args:
      record: of the trial, its curve up to now. Curves have their windows at the same positions.
      records: of all trials; those of this worker with their curves up to now.
      end: position at which the rung ends.
      goes_on: how many of the rung go on; 0 at the last.
      epoch: positions of one pass over the training rows.
    """
    others = [r for r in records if r.role in SEARCH and r.number != record.number]
    others = [r for r in others if r.status not in ("stopped", "diverged")]
    if why := _diverged(record.curve, [r.curve for r in others]):
        return Exit("diverged", why)
    if not goes_on:
        return None
    better = [
        r.number
        for r in others
        if r.rung >= record.rung and _comparable(r, record)
        if _certainly_better(r.curve, record.curve, end, epoch)
    ]
    if len(better) < goes_on:
        return None
    named = ", ".join(map(str, better[:4]))
    return Exit("stopped", f"training loss certainly above that of trial {named}")


def _diverged(curve: Curve, others: Sequence[Curve]) -> str:
    if not curve:
        return ""
    at, loss = curve[-1]
    if not math.isfinite(loss):
        return f"loss is {loss} at position {at}"
    if len(curve) < 2 + _LAST:
        return ""
    start = max(value for _, value in curve[:2])
    last = curve[-_LAST:]
    if all(value > max(_RISE * start, start + _NATS) for _, value in last):
        return f"loss rose from {start:.3f} to {loss:.3f}"
    best = {p: v for other in others for p, v in other if math.isfinite(v)}
    for other in others:
        best |= {p: min(v, best[p]) for p, v in other if p in best and math.isfinite(v)}
    if all(
        p in best and value >= start and value > max(_WORSE * best[p], best[p] + _NATS)
        for p, value in last
    ):
        return f"loss is {loss:.3f}, no lower than at the start, the best has {best[at]:.3f}"
    return ""


def _comparable(one: Record, other: Record) -> bool:
    """Whether training losses mean the same: what only training has is in them."""
    keys = ("lora.dropout", "train.label_smoothing")
    return all(one.params.get(key) == other.params.get(key) for key in keys)


def _certainly_better(better: Curve, worse: Curve, end: int, epoch: int) -> bool:
    """Whether, on the rows both saw once, a line says so for the end of the rung."""
    theirs = dict(better)
    # The first third of a curve is warm-up and what it left behind.
    mine = [(p, v) for p, v in worse if p <= epoch][len(worse) // 3 :]
    pairs = [(p, v - theirs[p], theirs[p]) for p, v in mine if p in theirs]
    if len(pairs) < _WINDOWS or len(pairs) < len(mine):
        return False
    at, gap, level = np.asarray(pairs, np.float64).T
    middle, count = at.mean(), len(at)
    spread = np.square(at - middle).sum()
    slope = np.dot(at - middle, gap) / spread
    rest = gap - gap.mean() - slope * (at - middle)
    noise = math.sqrt(np.square(rest).sum() / (count - 2))
    last = max(float(end), at[-1])
    then = gap.mean() + min(slope, 0.0) * (last - middle)
    error = noise * math.sqrt(1 / count + (last - middle) ** 2 / spread)
    return bool(then - _CERTAIN * error > _MARGIN * level.mean())


def best(records: Sequence[Record]) -> Record | None:
    """The winner: the lowest loss of whole trainings; before there is one, of the furthest rung."""
    scored = [r for r in records if r.role in SEARCH and r.status != "diverged"]
    scored = [r for r in scored if r.loss is not None and math.isfinite(r.loss)]
    return min(
        scored,
        key=lambda r: (
            r.status != "finished",
            0 if r.status == "finished" else -r.results[-1].rung,
            r.loss,
            r.number,
        ),
        default=None,
    )


def agreement(records: Sequence[Record]) -> tuple[Agreement, ...]:
    """How well early ranks held, from each rung to the next, over the trials that are in both."""
    trials = [r for r in records if r.role in SEARCH]
    found = []
    for rung in range(max((r.rung for r in trials), default=0)):
        order = [r.number for r in ranked(trials, rung)]
        both = [r for r in ranked(trials, rung + 1) if r.number in order]
        if not both:
            continue
        early = sorted(both, key=lambda r: order.index(r.number))
        rho = None
        if len(both) > 2:
            rho = float(np.corrcoef([early.index(r) for r in both], range(len(both)))[0, 1])
        found.append(Agreement(rung, len(both), rho, order.index(both[0].number) + 1))
    return tuple(found)
