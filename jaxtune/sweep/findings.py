"""What a sweep's numbers say: who won, gain or noise, what mattered, what it cost.

Pure functions of a `Summary`. Losses are held out, in nats a token; lower is better.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxtune.sweep import halving
from jaxtune.sweep.records import SEARCH, Record, Summary

CONFIDENCE = 0.95
FEWEST_FOR_IMPORTANCE = 8  # below that, fANOVA's forest splits noise


def placed(summary: Summary) -> tuple[Record, ...]:
    """The trials of the search, best first: whole trainings, then by the last rung; by loss there.

    Losses of different rungs do not compare. Diverged trials and those without a score come last.
    """

    def order(record: Record) -> tuple[bool, int, float, int]:
        sound = _sound(record)
        loss = record.results[-1].loss if sound else 0.0
        return (not sound, -_reached(record), loss, record.number)

    return tuple(sorted((r for r in summary.records if r.role in SEARCH), key=order))


def winner(summary: Summary) -> Record | None:
    """The trial of the search that won, or is ahead; None while none has a score."""
    known = {record.number: record for record in summary.records}
    chosen = known.get(summary.winner) if summary.winner is not None else None
    if chosen is not None and chosen.of is not None:  # trained once more, on everything
        chosen = known.get(chosen.of)
    return chosen or halving.best(summary.records)


def final(summary: Summary) -> Record | None:
    """The winner's training on everything, where the search saw less than that."""
    best = winner(summary)
    finals = (r for r in summary.records if r.role == "final" and _sound(r))
    return next((r for r in finals if best is not None and r.of == best.number), None)


def baseline(summary: Summary) -> Record | None:
    """The trial of the defaults."""
    return next((r for r in summary.records if r.role == "baseline"), None)


def _reached(record: Record) -> int:
    """The last rung scored, from 1; a whole training is past all, at whatever rung it ended."""
    if record.status == "finished":
        return sys.maxsize
    return record.results[-1].rung + 1 if record.results else 0


def _sound(record: Record) -> bool:
    loss = record.loss
    return loss is not None and math.isfinite(loss) and record.status != "diverged"


class Gain(NamedTuple):
    """Winner against defaults, whole trainings with the same settings and several seeds."""

    winner: tuple[float, ...]  # held-out loss of each seed; in the same order as defaults if paired
    defaults: tuple[float, ...]
    difference: float  # mean of defaults - mean of winner: positive is a gain
    low: float  # ends of its interval; infinite where there are too few seeds for one
    high: float
    paired: bool

    @property
    def verdict(self) -> Literal["better", "worse", "noise", "unknown"]:
        if not math.isfinite(self.high - self.low):
            return "unknown"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "noise"

    @property
    def rule(self) -> str:
        """The statistical rule, in words."""
        if self.verdict == "unknown":
            return "two seeds or more of each are needed to tell a gain from noise"
        seeds = (
            f"{len(self.winner)} seeds of each, paired by seed"
            if self.paired
            else f"{len(self.winner)} and {len(self.defaults)} seeds, Welch"
        )
        return (
            f"{CONFIDENCE:.0%} t interval of the difference of means ({seeds}); "
            "a difference whose interval has zero in it is called noise"
        )


def gain(summary: Summary) -> Gain | None:
    """Winner against defaults from the repeated seeds; None where they are one, or do not compare.

    The search's own run of the winner does not count beside repeats: it was chosen for its loss,
    luck included. Without repeats there is one run of each and no interval.
    """
    best, base = winner(summary), baseline(summary)
    if best is None or best is base:
        return None
    tuned, plain = _repeats(summary, "winner"), _repeats(summary, "defaults")
    common = sorted({s for s, _ in tuned} & {s for s, _ in plain} - {None})
    if len(common) > 1:
        ours, theirs = ([dict(side)[seed] for seed in common] for side in (tuned, plain))
        return Gain(tuple(ours), tuple(theirs), *_paired(ours, theirs), paired=True)
    ours, theirs = ([loss for _, loss in side] for side in (tuned, plain))
    if min(len(ours), len(theirs)) > 1:
        return Gain(tuple(ours), tuple(theirs), *_welch(ours, theirs), paired=False)
    if base is None or not _sound(base) or _reached(base) != _reached(best):
        return None
    one, other = best.results[-1].loss, base.results[-1].loss
    return Gain((one,), (other,), other - one, -math.inf, math.inf, paired=False)


def _repeats(summary: Summary, of: str) -> list[tuple[Any, float]]:
    """(seed, loss) of the repeats that came to their end."""
    return [
        (record.params.get("train.seed"), record.results[-1].loss)
        for record in summary.records
        if record.role == "repeat" and record.repeats == of and _sound(record)
        if record.status == "finished"
    ]


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """(mean of theirs - ours, ends of its interval) over the differences of equal seeds."""
    differences = [b - a for a, b in zip(ours, theirs, strict=True)]
    mean, variance = _moments(differences)
    half = _quantile(len(differences) - 1) * math.sqrt(variance / len(differences))
    return mean, mean - half, mean + half


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The same of samples that do not pair, with Welch's degrees of freedom."""
    (mine, v), (other, w) = _moments(ours), _moments(theirs)
    v, w = v / len(ours), w / len(theirs)
    difference = other - mine
    if v + w == 0:
        return difference, difference, difference
    freedom = (v + w) ** 2 / (v**2 / (len(ours) - 1) + w**2 / (len(theirs) - 1))
    half = _quantile(freedom) * math.sqrt(v + w)
    return difference, difference - half, difference + half


def interval(losses: Sequence[float]) -> tuple[float, float, float]:
    """(mean, ends of its t interval) of one side's seeds."""
    mean, variance = _moments(losses)
    if len(losses) < 2:
        return mean, mean, mean
    half = _quantile(len(losses) - 1) * math.sqrt(variance / len(losses))
    return mean, mean - half, mean + half


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """(mean, unbiased variance)"""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)


def _quantile(freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


class Phase(NamedTuple):
    name: str
    trials: int
    tokens: int
    seconds: float  # of all machines together


def phases(summary: Summary) -> tuple[Phase, ...]:
    """What each rung, finalists on everything and repeated seeds took; empty ones left out.

    What a trial did of a rung that it did not come to the end of counts for that rung.
    """
    parts = []
    for rung in range(len(summary.rungs)):
        name = f"rung {rung + 1}"
        there = [r for r in summary.records if r.role in SEARCH and r.rung >= rung]
        done = [result for record in there if (result := record.at(rung))]
        lost = [record for record in there if record.rung == rung]
        tokens = sum(r.tokens for r in done) + sum(r.lost_tokens for r in lost)
        seconds = [r.seconds for r in done] + [r.lost_seconds for r in lost]
        parts.append(Phase(name, len(there), tokens, math.fsum(seconds)))
    for role, name in (("final", "finalists on everything"), ("repeat", "repeated seeds")):
        own = [record for record in summary.records if record.role == role]
        tokens, seconds = sum(r.tokens for r in own), [r.seconds for r in own]
        parts.append(Phase(name, len(own), tokens, math.fsum(seconds)))
    return tuple(part for part in parts if part.tokens)


class Cost(NamedTuple):
    """The sweep beside training each of its trials to the end, one after another."""

    phases: tuple[Phase, ...]
    tokens: int  # of the sweep
    seconds: float  # of its phases
    trials: int
    full_tokens: int  # all trials trained to the end
    full_seconds: float  # the same at the sweep's own seconds a token


def cost(summary: Summary) -> Cost:
    """What was spent, and what a whole training of every trial would have taken."""
    parts = phases(summary)
    tokens, seconds = sum(p.tokens for p in parts), math.fsum(p.seconds for p in parts)
    trials = sum(record.role in SEARCH for record in summary.records)
    full = trials * summary.full_tokens
    return Cost(parts, tokens, seconds, trials, full, full * seconds / tokens if tokens else 0.0)


class Importances(NamedTuple):
    """Share of the variance of the loss that each key explains by itself (fANOVA)."""

    shares: dict[str, float]  # largest first; they add up to 1; empty where not computable
    trials: int  # that were compared
    rung: int  # at which
    why: str  # it is empty


def importances(summary: Summary) -> Importances:
    """fANOVA (Hutter et al. 2014, through Optuna) of the losses at the first rung.

    All trials are scored there after equal training; later rungs know the survivors only.
    """
    keys = list(summary.space)
    scored = halving.ranked([r for r in summary.records if r.role in SEARCH], 0)
    seen = [r for r in scored if all(r.params.get(key) is not None for key in keys)]
    seen.sort(key=lambda record: record.number)
    losses = [record.results[0].loss for record in seen]
    fewest = max(FEWEST_FOR_IMPORTANCE, 2 * len(keys))
    if len(seen) < fewest:
        why = f"too few trials: {len(seen)} with a score at the first rung, {fewest} are needed"
        return Importances({}, len(seen), 0, why)
    if len(set(losses)) == 1:
        return Importances({}, len(seen), 0, "every trial has the same loss at the first rung")
    shares = _fanova(summary.space, [record.params for record in seen], losses)
    return Importances(shares, len(seen), 0, "")


def _fanova(space: dict, params: list[dict[str, Any]], losses: list[float]) -> dict[str, float]:
    import optuna

    axes = {key: _axis(domain, [p[key] for p in params]) for key, domain in space.items()}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study in memory is not news
    try:
        study = optuna.create_study()
        for values, loss in zip(params, losses, strict=True):
            study.add_trial(
                optuna.trial.create_trial(
                    params={k: place(values[k]) for k, (_, place) in axes.items()},
                    distributions={k: distribution for k, (distribution, _) in axes.items()},
                    value=loss,
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(level)
    return {key: float(share) for key, share in shares.items()}


def _axis(domain: tuple[Any, ...], values: list[Any]):
    """(Optuna distribution, value -> its place on it); wide enough for defaults outside the space.

    Choices of numbers are an order, such as ranks; other choices are not.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind, *rest = domain
    if kind == "choice":
        options = [*rest, *(v for v in dict.fromkeys(values) if v not in rest)]
        if all(type(option) in (int, float) for option in options):
            options.sort()
            return IntDistribution(0, len(options) - 1), options.index
        return CategoricalDistribution([*range(len(options))]), options.index
    low, high = min(rest[0], *values), max(rest[1], *values)
    return FloatDistribution(low, high, log=kind == "log"), float
