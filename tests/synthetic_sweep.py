"""Sweeps that never ran: a plausible loss surface, halving over it, and noise by seed."""

import dataclasses
import math
import random
from typing import Any

from jaxtune.sweep.records import Record, Result, Summary

SPACE = {
    "optim.lr": ("log", 1e-5, 3e-3),
    "lora.r": ("choice", 4, 8, 16, 64),
    "optim.schedule": ("choice", "cosine", "linear", "constant"),
    "lora.dropout": ("uniform", 0.0, 0.2),
}
DEFAULTS = {"optim.lr": 2e-4, "lora.r": 16, "optim.schedule": "cosine", "lora.dropout": 0.0}
RUNGS, ETA, MICRO, TOKENS = (8, 32, 128), 4, 4, 1000  # tokens: of a micro-batch


def end_loss(params: dict[str, Any]) -> float:
    """Held-out loss after a whole training: best at lr 5e-4 and rank 16, dropout is no help."""
    away = math.log10(params["optim.lr"] / 5e-4)
    slow = {"cosine": 0.0, "linear": 0.005, "constant": 0.02}[params["optim.schedule"]]
    rank = 0.01 * abs(math.log2(params["lora.r"] / 16))
    return 2.0 + 0.25 * away**2 + slow + rank + 0.1 * params["lora.dropout"]


def diverges(params: dict[str, Any]) -> bool:
    return params["optim.lr"] > 2e-3


def _loss(params: dict[str, Any], position: int) -> float:
    end, away = end_loss(params), math.log10(params["optim.lr"] / 5e-4)
    done = position / RUNGS[-1] / (1 + away**2)  # far from the best rate, it is slow as well
    return end + (4.5 - end) * math.exp(-4 * done - 2 * done**0.5)


def _curve(params: dict[str, Any], until: int, dice: random.Random):
    points = [(p, _loss(params, p) + dice.gauss(0, 0.01)) for p in range(1, until + 1)]
    if diverges(params):
        return (*points[:3], (4, 7.5), (5, 30.0), (6, math.nan))
    return tuple(points)


def _result(params: dict[str, Any], rung: int, noise: float, since: int) -> Result:
    position = RUNGS[rung]
    done = position - since
    return Result(rung, position, _loss(params, position) + noise, 0.5, done * TOKENS, done * 0.1)


def draw(dice: random.Random) -> dict[str, Any]:
    return {
        "optim.lr": math.exp(dice.uniform(math.log(1e-5), math.log(3e-3))),
        "lora.r": dice.choice([4, 8, 16, 64]),
        "optim.schedule": dice.choice(["cosine", "linear", "constant"]),
        "lora.dropout": dice.uniform(0.0, 0.2),
    }


def sweep(trials: int = 16, *, seed: int = 0, noise: float = 0.003, repeats: int = 3) -> Summary:
    """A sweep that is over; trial 0 has the defaults."""
    dice = random.Random(seed)
    all_params = [dict(DEFAULTS), *(draw(dice) for _ in range(trials - 1))]
    luck = [dice.gauss(0, noise) for _ in all_params]
    results: dict[int, list[Result]] = {n: [] for n in range(trials)}
    going, why = list(range(trials)), dict.fromkeys(range(trials), "")
    lost = [number for number in going if diverges(all_params[number])]
    going = [number for number in going if number not in lost]
    for rung, since in enumerate((0, *RUNGS[:-1])):
        for number in going:
            results[number].append(_result(all_params[number], rung, luck[number], since))
        going.sort(key=lambda n: results[n][-1].loss)
        if rung + 1 < len(RUNGS):
            for place, number in enumerate(going[max(1, len(going) // ETA) :], len(going) // ETA):
                why[number] = f"place {place + 1} of {len(going)} at rung {rung + 1}"
            going = going[: max(1, len(going) // ETA)]
    records = []
    for number, params in enumerate(all_params):
        status = "diverged" if number in lost else "finished" if number in going else "stopped"
        reached = results[number][-1].position if results[number] else 6
        records.append(
            Record(number, params, status, tuple(results[number]),
                   _curve(params, reached, random.Random(1)),
                   "loss not finite" if number in lost else why[number],
                   "baseline" if number == 0 else "search",
                   rung=len(results[number]) - 1 if results[number] else 0,
                   lost_tokens=6 * TOKENS if number in lost else 0)
        )  # fmt: skip
    records += _repeats(records, going[0], repeats, noise, dice)
    return Summary(
        name="yoruba", model="stories260k-hf", data="menyo20k", task="pretrain", space=SPACE,
        defaults=DEFAULTS, rungs=RUNGS, micro=MICRO, records=tuple(records), started=1.7e9,
        seconds=1234.5, budget_seconds=3600.0, tokens=sum(r.tokens for r in records),
        full_tokens=RUNGS[-1] * TOKENS,
        notes=("rungs at 32, 128 and 512 rows", "8 trials at once: what fits"),
    )  # fmt: skip


def _repeats(records: list[Record], best: int, count: int, noise: float, dice: random.Random):
    number = len(records)
    for side, params in (("winner", records[best].params), ("defaults", DEFAULTS)):
        for seed in range(count):
            loss = end_loss(params) + dice.gauss(0, noise)
            result = Result(2, RUNGS[-1], loss, 0.5, RUNGS[-1] * TOKENS, 12.8)
            with_seed = params | {"train.seed": 100 + seed}
            yield Record(number, with_seed, "finished", (result,), role="repeat", repeats=side,
                         rung=2)  # fmt: skip
            number += 1


def wider(summary: Summary, more: dict[str, tuple[Any, ...]]) -> Summary:
    """The same sweep with more keys; trials take turns with their choices."""
    records = [
        dataclasses.replace(
            record,
            params=record.params
            | {key: axis[1 + record.number % (len(axis) - 1)] for key, axis in more.items()},
        )
        for record in summary.records
    ]
    return dataclasses.replace(summary, space=summary.space | more, records=tuple(records))


MORE = {
    "train.batch_size": ("choice", 8, 16, 32),
    "optim.weight_decay": ("choice", 0.0, 1.25e-3, 0.1),
    "optim.warmup": ("choice", 0.03, 0.1),
    "lora.target_modules": ("choice", "all-linear", ("q_proj", "v_proj")),
}


def half_way(summary: Summary, running: int = 3) -> Summary:
    """The same sweep earlier: the first trials run, those after them wait."""
    records = [
        dataclasses.replace(
            record,
            status="running" if record.number < running else "waiting",
            results=record.results[:1] if record.number < running else (),
            curve=record.curve[:12] if record.number < running else (),
            why="",
        )
        for record in summary.records
        if record.role != "repeat"
    ]
    return dataclasses.replace(summary, records=tuple(records), seconds=60.0, tokens=100_000)
