"""A sweep while it runs: a table kept in place on a terminal, a line an event in a file or pipe."""

import dataclasses
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxtune.console import say, stderr
from jaxtune.sweep import findings, wording
from jaxtune.sweep.records import Record, Status, Summary

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"  # the second where the terminal has ASCII only
SPARK = 16  # characters of a sparkline
LONGEST = 24  # characters of a value: lists of modules or layers can be far longer
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
            width = stderr.size.width
            live.update(render(summary, rate(summary), room=room, width=width, blocks=blocks))

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
    summary: Summary,
    rate: float = 0.0,
    *,
    room: int = 40,
    width: int = 200,
    blocks: str = BLOCKS,
) -> RenderableType:
    """The table of running trials, under it how the sweep stands.

    Args:
      rate: tokens a second.
      room: rows at most; the trials that are furthest come first.
      width: characters of a line; where values need them, the curve and training losses go first.
      blocks: eight characters of a sparkline, lowest first.
    """
    running = [record for record in summary.records if record.status == "running"]
    running.sort(key=lambda record: (-position(record), record.number))
    rows, keys = running[:room], list(summary.space)
    ways = [
        _Way(keys, gap=2),
        *(_Way(keys, spark=spark) for spark in (SPARK, SPARK // 2, 0)),
        _Way(keys, spark=0, training=False),
        *(_Way(keys[:n], 0, training=False, cut=True) for n in range(len(keys), -1, -1)),
    ]
    drawn = ((way, _columns(summary, rows, way, blocks)) for way in ways)
    way, columns = next((w, c) for w, c in drawn if w is ways[-1] or _width(c, w.gap) <= width)
    shown = Table(box=None, padding=(0, way.gap, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        left = column.head == "curve"
        shown.add_column(Text(column.head), justify="left" if left else "right", no_wrap=True,
                         style="cyan" if left else "")  # fmt: skip
    for cells in zip(*(column.cells for column in columns), strict=True):
        shown.add_row(*map(Text, cells))
    more = [f"and {len(running) - room} more"] if len(running) > room else []
    if len(way.keys) < len(keys):
        more.append(f"no room for {', '.join(keys[len(way.keys) :])}")
    under = [Text(line, style="dim") for line in more]
    under += [Text(standing(summary, rate), style="bold"), Text(_best(summary))]
    for line in under:  # of more than the width they go on in the next line
        line.no_wrap, line.overflow = False, "fold"
    return Group(shown, *under)


class _Way(NamedTuple):
    """What a table has room for."""

    keys: list[str]
    spark: int = SPARK  # characters of the curve; 0 for none
    training: bool = True  # the training loss
    cut: bool = False  # heads of keys no wider than their values
    gap: int = 1  # between columns


class _Column(NamedTuple):
    head: str
    cells: list[str]


def _width(columns: Sequence[_Column], gap: int) -> int:
    widths = [max(map(cell_len, (column.head, *column.cells))) for column in columns]
    return sum(widths) + gap * (len(widths) - 1)


def _columns(summary: Summary, rows: Sequence[Record], way: _Way, blocks: str) -> list[_Column]:
    heads = wording.heads(summary.space)
    columns = [_Column("trial", [_name(record) for record in rows])]
    for key in way.keys:
        cells = [_value(record.params.get(key, "-")) for record in rows]
        most = max(4, *map(cell_len, cells)) if way.cut and cells else len(heads[key])
        columns.append(_Column(_shortened(heads[key], most), cells))
    columns += [
        _Column("rung", [f"{_rung(r, summary)}/{len(summary.rungs)}" for r in rows]),
        _Column("done", [f"{_part(position(r), summary.rungs[-1]):.0%}" for r in rows]),
        _Column("training", [wording.loss(r.curve[-1][1] if r.curve else None) for r in rows]),
        _Column("held out", [wording.loss(r.loss) for r in rows]),
        _Column("curve", [sparkline([y for _, y in r.curve], blocks, way.spark) for r in rows]),
    ]
    hidden = {"training": not way.training, "curve": not way.spark}
    return [column for column in columns if not hidden.get(column.head)]


def _name(record: Record) -> str:
    """Its number, and whose training it does again."""
    again = {"repeat": record.repeats, "final": f"trial {record.of}"}.get(record.role)
    return f"{record.number}, {again} again" if again else str(record.number)


def _value(of: Any) -> str:
    """As `wording.value`; long lists are cut, numbers never are."""
    return _shortened(wording.value(of), LONGEST)


def _shortened(text: str, most: int) -> str:
    return text if cell_len(text) <= most else f"{set_cell_size(text, most - 1)}…"


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
