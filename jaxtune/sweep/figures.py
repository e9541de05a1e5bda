"""The pictures of a sweep, a function each: `Summary` in, a matplotlib figure out.

Trials wear their outcome's colour, and the winner a colour of its own in every picture. Losses of
trials that were trained equally long are compared, others are not.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxtune.sweep import canvas, findings, wording
from jaxtune.sweep.canvas import BEST, DIM, FAINT, INK, OUTCOME, PAPER, RULE, drawn
from jaxtune.sweep.records import SEARCH, Record, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 40  # of a curve that goes to the end
END_MARKS = {"stopped": "|", "diverged": "X", "finished": "o", "running": ">", "paused": ">"}


@drawn
def learning_curves(summary: Summary) -> "Figure":
    """Training loss over rows, coloured by outcome; the winner on top."""
    curves = [r for r in summary.records if r.role in SEARCH and len(r.curve) > 1]
    if not curves:
        return canvas.message("No learning curve yet: no trial has trained on enough rows.")
    figure, (axes,) = canvas.sheet(3.5)
    best = findings.winner(summary)
    means = {r.number: _averaged(r.curve, summary.rungs[-1]) for r in curves}
    sound = [y for r in curves if r.status != "diverged" for _, y in means[r.number]]
    low, high = min(sound, default=0.0), max(sound, default=1.0)
    order = {"stopped": 0, "diverged": 1}
    for record in sorted(curves, key=lambda r: (r is best, order.get(r.status, 2))):
        points = [(p * summary.micro, y) for p, y in means[record.number]]
        style, gid = _line(record, best), canvas.trial_gid(record.number)
        if (
            record.status == "diverged" and points
        ):  # ends at the frame, rather than flatten the others
            out = next((i for i, (_, y) in enumerate(points) if y > high), len(points) - 1)
            points = [(x, min(y, high)) for x, y in points[: out + 1]]
            axes.plot(*zip(*points[-1:], strict=True), "X", color=style["color"], markersize=6.5,
                      markeredgecolor=PAPER, zorder=6, gid=gid)  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), gid=gid, **style)
    axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
    axes.set_xscale("log")  # rungs are a constant factor apart
    axes.set_xlim(
        min(r.curve[0][0] for r in curves) * summary.micro,
        max(summary.rungs[-1], *(r.curve[-1][0] for r in curves)) * summary.micro * 1.02,
    )
    for number, position in enumerate(summary.rungs, 1):
        axes.axvline(position * summary.micro, color=RULE, linewidth=0.8, zorder=0)
        axes.annotate(f"rung {number}", (position * summary.micro, 1), (0, 3), color=DIM,
                      xycoords=("data", "axes fraction"), textcoords="offset points",
                      fontsize=7.5, ha="center")  # fmt: skip
    axes.set_xlabel("rows trained on (log scale)")
    axes.set_ylabel(f"training loss, {wording.unit(summary.task)}")
    axes.xaxis.set_major_formatter(_thousands())
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    _outcomes(axes, curves, best)
    return figure


@drawn
def rungs(summary: Summary) -> "Figure":
    """Left: how far each trial was trained. Right: held-out loss over the best at each rung."""
    ranked = findings.placed(summary)
    if not ranked:
        return canvas.message("No trial yet.")
    height = min(4.8, max(2.6, 1.2 + 0.14 * len(ranked)))
    least = _least(ranked)
    figure, (bars, losses) = canvas.sheet(height, 2, width_ratios=(1.15, 1))
    best = findings.winner(summary)
    for row, record in enumerate(ranked):
        reached = max(
            [p for p, _ in record.curve[-1:]] + [r.position for r in record.results] + [0]
        )
        color, gid = _color(record, best), canvas.trial_gid(record.number)
        bars.barh(row, reached * summary.micro, height=0.7 if len(ranked) <= 60 else 1.0,
                  color=color, gid=gid)  # fmt: skip
        mark = END_MARKS.get(record.status)
        if mark and len(ranked) <= 60:
            bars.plot(reached * summary.micro, row, mark, color=color, markersize=5, zorder=4)
        scored = [(r.rung + 1, r.loss - least[r.rung]) for r in record.results
                  if r.rung in least and math.isfinite(r.loss)]  # fmt: skip
        if scored:
            losses.plot(*zip(*scored, strict=True), marker="o", markersize=3.5, gid=gid,
                        **_line(record, best))  # fmt: skip
    for position in summary.rungs:
        bars.axvline(position * summary.micro, color=RULE, linewidth=0.8, zorder=0)
    bars.set_xlabel("rows trained on")
    bars.xaxis.set_major_formatter(_thousands())
    bars.set_xlim(0, summary.rungs[-1] * summary.micro * 1.03)
    bars.set_ylim(len(ranked) - 0.4, -0.6)
    shown = range(len(ranked)) if len(ranked) <= 40 else range(0, len(ranked), len(ranked) // 10)
    bars.set_yticks([*shown], [str(ranked[row].number) for row in shown], fontsize=7)
    bars.set_ylabel("trial, best at the top")
    bars.set_title("how far each was trained")
    bars.tick_params(axis="y", length=0)
    losses.set_xticks(range(1, len(summary.rungs) + 1))
    losses.set_xlim(0.8, len(summary.rungs) + 0.2)
    losses.set_xlabel("rung")
    losses.set_ylabel(f"above the rung's best, {wording.unit(summary.task)}")
    losses.set_title("held-out loss")
    _near_the_best(losses, ranked, least)
    _outcomes(bars, ranked, best, loc="lower right")
    return figure


@drawn
def bought(summary: Summary) -> "Figure":
    """Tokens and seconds of each phase, beside training every trial to its end."""
    cost = findings.cost(summary)
    if not cost.tokens:
        return canvas.message("Nothing has been trained to a rung yet.")
    figure, (tokens, seconds) = canvas.sheet(1.9, 2)
    full = f"{wording.counted(cost.trials, 'full training')}"
    for axes, field, whole, spell, unit in (
        (tokens, "tokens", cost.full_tokens, wording.amount, "tokens trained on"),
        (
            seconds,
            "seconds",
            cost.full_seconds,
            wording.duration,
            "machine time (dashed: estimated)",
        ),
    ):
        left, spent = 0.0, sum(getattr(phase, field) for phase in cost.phases)
        for index, phase in enumerate(cost.phases):
            size = getattr(phase, field)
            search = phase.name.startswith("rung")
            color = DIM if not search else canvas.shade(1 - (index + 1) / len(summary.rungs))
            axes.barh(0, size, left=left, height=0.5, color=color, label=phase.name,
                      edgecolor=PAPER, linewidth=0.8)  # fmt: skip
            left += size
        axes.barh(1, whole, height=0.5, color="none", edgecolor=DIM, linewidth=1, linestyle="--")
        for row, size in ((0, spent), (1, whole)):
            axes.annotate(spell(size), (size, row), (4, 0), textcoords="offset points",
                          va="center", fontsize=8, color=INK)  # fmt: skip
        axes.set_xlim(0, 1.3 * max(whole, spent))
        axes.set_ylim(1.5, -0.5)
        axes.set_xticks([])
        axes.set_title(unit)
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks((0, 1), ("this sweep", full), color=INK)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    seconds.set_yticks((0, 1), ("", ""))
    figure.legend(*tokens.get_legend_handles_labels(), loc="outside lower left", ncols=6,
                  handlelength=1)  # fmt: skip
    return figure


@drawn
def baseline(found: findings.Gain | None, unit: str) -> "Figure":
    """Held-out loss of defaults and winner, a point a seed, means with their intervals.

    Args:
      unit: of the losses.
    """
    if found is None:
        return canvas.message("Defaults and winner cannot be compared: they were not both scored "
                              "after equal training.")  # fmt: skip
    figure, (axes,) = canvas.sheet(1.9)
    sides = (("defaults", found.defaults, INK), ("winner", found.winner, BEST))
    for row, (_, losses, color) in enumerate(sides):
        beside = row + (0.3 if row else -0.3)
        axes.plot(losses, [row] * len(losses), "o", color=color, markersize=6, alpha=0.85,
                  markeredgecolor=PAPER, markeredgewidth=0.8, zorder=4)  # fmt: skip
        if len(losses) > 1:
            mean, low, high = findings.interval(losses)
            axes.plot([low, high], [beside] * 2, color=color, linewidth=1.4)
            axes.plot(mean, beside, "|", color=color, markersize=9, markeredgewidth=2)
        axes.annotate(f"mean {wording.loss(sum(losses) / len(losses))}", (1, row), (6, 0),
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", color=color, fontsize=8.5)  # fmt: skip
    if found.paired:
        for pair in zip(found.defaults, found.winner, strict=True):
            axes.plot(pair, (0, 1), color=FAINT, linewidth=0.9, zorder=2)
    axes.set_yticks((0, 1), [f"{name}, {wording.counted(len(losses), 'seed')}"
                             for name, losses, _ in sides])  # fmt: skip
    axes.set_ylim(1.6, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel(f"held-out loss after a whole training, {unit}")
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))  # no loss is lower, though an interval may be
    axes.grid(axis="x", color=RULE, linewidth=0.6, zorder=0)
    return figure


def _color(record: Record, best: Record | None) -> str:
    return BEST if record is best else OUTCOME[record.status]


def _line(record: Record, best: Record | None) -> dict[str, Any]:
    """Style of a trial's curve: what was stopped is thin, what diverged is dotted."""
    won, faint = record is best, record.status == "stopped"
    return {
        "color": _color(record, best),
        "linewidth": 2.2 if won else 0.8 if faint else 1.3,
        "linestyle": ":" if record.status == "diverged" else "-",
        "zorder": 5 if won else 2 if faint else 3,
    }


def _averaged(curve: tuple[tuple[int, float], ...], last: int) -> list[tuple[float, float]]:
    """Means over parts that are equally wide on a log scale up to `last`, the same for all trials.

    Single windows are mostly the rows they happen to have; what is not finite is left out.
    """
    width = math.log(max(last, 2)) / POINTS
    parts: dict[int, list[tuple[int, float]]] = {}
    for position, loss in curve:
        if math.isfinite(loss):
            part = min(POINTS - 1, int(math.log(max(position, 1)) / width))
            parts.setdefault(part, []).append((position, loss))
    return [
        (math.fsum(p for p, _ in part) / len(part), math.fsum(y for _, y in part) / len(part))
        for _, part in sorted(parts.items())
    ]


def _outcomes(
    axes: "Axes",
    records: Sequence[Record],
    best: Record | None,
    loc: Literal["best", "lower right"] = "best",
) -> None:
    """A legend of the outcomes that occur, with how many trials have each."""
    handles: list[tuple[str, str, str]] = []
    if best is not None:
        handles.append((f"winner: trial {best.number}", "s", BEST))
    for status in ("finished", "running", "paused", "stopped", "diverged"):
        count = sum(record.status == status and record is not best for record in records)
        if count:
            handles.append((f"{status} ({count})", "s", OUTCOME[status]))
    canvas.marks(axes, handles, loc=loc)


def _thousands() -> Callable[[float, Any], str]:
    return lambda x, _: f"{x:,.0f}"


def _least(records: Sequence[Record]) -> dict[int, float]:
    """{rung: lowest finite loss}"""
    least: dict[int, float] = {}
    for result in (result for record in records for result in record.results):
        if math.isfinite(result.loss):
            least[result.rung] = min(result.loss, least.get(result.rung, math.inf))
    return least


def _near_the_best(axes: "Axes", records: Sequence[Record], least: dict[int, float]) -> None:
    """Limits that show those that went on; how many are further off is written at the top."""
    over = {
        record.number: [x.loss - least[x.rung] for x in record.results if math.isfinite(x.loss)]
        for record in records
    }
    went_on = [gap for gaps in over.values() if len(gaps) > 1 for gap in gaps]
    top = 2 * max(went_on, default=0) or max((g for gaps in over.values() for g in gaps), default=1)
    axes.set_ylim(-0.04 * (top or 1), top or 1)
    above = sum(max(gaps, default=0) > top for gaps in over.values())
    if above:
        axes.annotate(f"↑ {wording.counted(above, 'trial')} above", (1, 1), (4, -2), va="top",
                      xycoords=("data", "axes fraction"), textcoords="offset points",
                      fontsize=7.5, color=DIM)  # fmt: skip
