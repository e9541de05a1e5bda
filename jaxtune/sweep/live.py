"""A sweep while it runs: a table kept in place on a terminal, a line an event in a file or pipe."""

import dataclasses
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxtune.console import say, stderr
from jaxtune.sweep import findings, wording
from jaxtune.sweep.records import Record, Status, Summary

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"  # the second where the terminal has ASCII only
SPARK = 16  # characters of a sparkline
_MOST = 1e30  # a loss beyond that is as good as infinite
RATE_SECONDS = 60.0  # tokens/s are of the last minute
QUIET_SECONDS = 60.0  # a file or pipe hears how things stand after so long without an event


@contextmanager
def table() -> Iterator[Callable[..., None]]:
    """Shows a sweep: the yielded function is `show(summary, running=())`, called at any pace.

    `running` are records newer than those of the same number in the summary: of the trials of
    this process, which need not be read from the study for it.
    """
    rate = Rate()
    if not sys.stderr.isatty():
        last: list[Summary] = []  # the newest one shown
        told = 0.0  # seconds used at the last line

        def lines(summary: Summary, running: Sequence[Record] = ()) -> None:
            nonlocal told
            summary = _newer(summary, running)
            speed = rate(summary)
            found = events(last.pop() if last else None, summary)
            if not found and summary.seconds - told >= QUIET_SECONDS:
                found = [standing(summary, speed)]
            for line in found:
                say(line)
                told = summary.seconds
            last.append(summary)

        yield lines
        return
    blocks = PLAIN_BLOCKS if stderr.options.ascii_only else BLOCKS
    with Live(console=stderr, refresh_per_second=4) as live:

        def draw(summary: Summary, running: Sequence[Record] = ()) -> None:
            summary = _newer(summary, running)
            room = max(3, stderr.size.height - 8)  # a table taller than the terminal would scroll
            live.update(render(summary, rate(summary), room=room, blocks=blocks))

        yield draw


def _newer(summary: Summary, running: Sequence[Record]) -> Summary:
    own = {record.number: record for record in running}
    old = tuple(own.pop(record.number, record) for record in summary.records)
    return dataclasses.replace(summary, records=(*old, *own.values()))


class Rate:
    """Tokens a second of all trials together, over the last minute of summaries."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []  # (seconds, tokens)

    def __call__(self, summary: Summary) -> float:
        """0 until time has passed between two summaries."""
        self._seen.append((summary.seconds, summary.tokens))
        while len(self._seen) > 2 and summary.seconds - self._seen[1][0] >= RATE_SECONDS:
            self._seen.pop(0)
        (since, before), (now, tokens) = self._seen[0], self._seen[-1]
        return (tokens - before) / (now - since) if now > since else 0.0


def render(
    summary: Summary, rate: float = 0.0, *, room: int = 40, blocks: str = BLOCKS
) -> RenderableType:
    """The table of running trials, under it how the sweep stands.

    Args:
      rate: tokens a second.
      room: rows at most; the trials that are furthest come first.
      blocks: eight characters of a sparkline, lowest first.
    """
    keys = list(summary.space)
    shown = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    shown.add_column("trial", justify="right", no_wrap=True)
    for key in keys:
        shown.add_column(Text(key.rpartition(".")[2]), justify="right")
    shown.add_column("rung", justify="right", no_wrap=True)
    shown.add_column("done", justify="right", no_wrap=True)
    shown.add_column("training", justify="right", no_wrap=True)
    shown.add_column("held out", justify="right", no_wrap=True)
    shown.add_column("curve", no_wrap=True, min_width=SPARK)
    running = [record for record in summary.records if record.status == "running"]
    running.sort(key=lambda record: (-position(record), record.number))
    for record in running[:room]:
        shown.add_row(
            str(record.number),
            *(Text(wording.value(record.params.get(key, "-"))) for key in keys),
            f"{_rung(record, summary)}/{len(summary.rungs)}",
            f"{_part(position(record), summary.rungs[-1]):.0%}",
            wording.loss(record.curve[-1][1] if record.curve else None),
            wording.loss(record.loss),
            Text(sparkline([loss for _, loss in record.curve], blocks), style="cyan"),
        )
    more = [Text(f"and {len(running) - room} more", style="dim")] if len(running) > room else []
    return Group(shown, *more, Text(standing(summary, rate), style="bold"), Text(_best(summary)))


def standing(summary: Summary, rate: float) -> str:
    """Counts by status, speed and budget, in a line."""
    counts = Counter(record.status for record in summary.records)
    parts = [f"{counts[status]} {status}" for status in get_args(Status) if counts[status]]
    used = f"{wording.duration(summary.seconds)} used"
    if summary.budget_seconds is not None:
        left = max(0.0, summary.budget_seconds - summary.seconds)
        used += f", {wording.duration(left)} left"
    speed = [f"{wording.amount(rate)} tokens/s"] if rate else []
    spent = f"{wording.amount(summary.tokens)} tokens"
    if summary.budget_tokens is not None:
        left = max(0, summary.budget_tokens - summary.tokens)
        spent += f", {wording.amount(left)} left"
    return " · ".join([", ".join(parts) or "no trials yet", *speed, spent, used])


def _best(summary: Summary) -> str:
    best = findings.winner(summary)
    if best is None:
        return "best so far: none yet"
    return (
        f"best so far: {wording.loss(best.loss)} of trial {best.number} after rung "
        f"{best.results[-1].rung + 1} of {len(summary.rungs)}: "
        f"{wording.params(best.params, summary.space)}"
    )


def position(record: Record) -> int:
    """Micro-batches that a trial has been trained on, as far as is known."""
    return max(
        record.curve[-1][0] if record.curve else 0,
        record.results[-1].position if record.results else 0,
    )


def _rung(record: Record, summary: Summary) -> int:
    """The rung a trial is on its way to, from 1."""
    return min(record.results[-1].rung + 2 if record.results else 1, len(summary.rungs))


def _part(done: int, of: int) -> float:
    return min(1.0, done / of) if of else 0.0


def sparkline(losses: Sequence[float], blocks: str = BLOCKS, width: int = SPARK) -> str:
    """A curve in block characters, "█▆▄▃▂▁▁"; equal parts of it are averaged, ! has blown up."""
    parts = min(width, len(losses))
    bounds = [len(losses) * i // parts for i in range(parts + 1)] if parts else []
    means = []
    for a, b in itertools.pairwise(bounds):
        sound = all(abs(loss) < _MOST for loss in losses[a:b])
        means.append(math.fsum(losses[a:b]) / (b - a) if sound else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    span, top = high - low or 1.0, len(blocks) - 1
    return "".join(
        blocks[round((mean - low) / span * top)] if math.isfinite(mean) else "!" for mean in means
    )


def events(before: Summary | None, now: Summary) -> list[str]:
    """What has happened between two summaries, a line each.

    The first summary of a sweep that goes on is told in one line, not rung by rung.
    """
    if before is None:
        done = sum(len(record.results) for record in now.records)
        return [f"going on after {wording.counted(done, 'rung')} done; {_best(now)}"] * bool(done)
    old = {record.number: record for record in before.records}
    lines = [note for note in now.notes if note not in before.notes]
    for record in now.records:
        lines += _changes(old.get(record.number), record, now)
    best, was = findings.winner(now), findings.winner(before)
    if best is not None and (was is None or (best.number, best.loss) != (was.number, was.loss)):
        lines.append(f"{_best(now)}; {standing(now, 0.0)}")
    return lines


def _changes(old: Record | None, new: Record, summary: Summary) -> list[str]:
    name = {
        "repeat": f"trial {new.number} ({new.repeats}, seed {new.params.get('train.seed')})",
        "final": f"trial {new.number} (trial {new.of} on everything)",
    }.get(new.role, f"trial {new.number}")
    settings = wording.params(new.params, summary.space)
    whole = len(summary.rungs)
    lines = [
        f"{name} rung {result.rung + 1}/{whole}: loss {wording.loss(result.loss)}  {settings}"
        for result in new.results[len(old.results) if old else 0 :]
    ]
    ended = new.status in ("stopped", "diverged") and (old is None or old.status != new.status)
    if ended:
        lines.append(f"{name} {new.status}: {new.why or 'no reason given'}  {settings}")
    return lines
