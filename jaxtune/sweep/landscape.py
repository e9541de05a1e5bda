"""Pictures of the space that a sweep searched: which keys mattered, and where good trials lie."""

import itertools
import math
from typing import TYPE_CHECKING, Any

from jaxtune.sweep import canvas, findings, wording
from jaxtune.sweep.canvas import BEST, INK, OUTCOME, PAPER, RULE, drawn
from jaxtune.sweep.records import Record, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@drawn
def parallel(summary: Summary) -> "Figure":
    """One axis a key and one for the place in the sweep; a line a trial, the best bluest."""
    ranked = [
        r
        for r in findings.placed(summary)
        if all(r.params.get(k) is not None for k in summary.space)
    ]
    if len(ranked) < 2:
        return canvas.message("Parallel coordinates need two trials.")
    figure, (axes,) = canvas.sheet(3.6)
    scales = {key: _scale(domain, [r.params[key] for r in ranked])
              for key, domain in summary.space.items()}  # fmt: skip
    best = findings.winner(summary)
    spread = min(0.07, 0.004 * len(ranked))  # of equal choices, so that lines are not one line
    for place, record in reversed([*enumerate(ranked)]):
        heights = [scales[key][0](record.params[key]) + (
                   spread * (0.5 - place / len(ranked)) if domain[0] == "choice" else 0.0)
                   for key, domain in summary.space.items()]  # fmt: skip
        heights.append(1 - place / (len(ranked) - 1))
        won, lost = record is best, record.status == "diverged"
        color = BEST if won else OUTCOME["diverged"] if lost else canvas.shade(place / len(ranked))
        axes.plot(range(len(heights)), heights, color=color, linewidth=2.4 if won else 1.2,
                  linestyle=":" if lost else "--" if record.role == "baseline" else "-",
                  alpha=1.0 if won or len(ranked) < 40 else 0.6,
                  gid=canvas.trial_gid(record.number), zorder=3 + won)  # fmt: skip
    for at, (_, ticks) in enumerate([*scales.values(), (None, _place_ticks(len(ranked)))]):
        axes.axvline(at, color=RULE, linewidth=0.9, zorder=1)
        for height, label in ticks:
            axes.annotate(label, (at, height), (4, 0), textcoords="offset points", fontsize=7.5,
                          color=INK, va="center", zorder=8, bbox=_halo())  # fmt: skip
    names = [*wording.heads(scales).values(), "place"]
    axes.set_xticks(range(len(names)), names, **_slant(names))
    axes.set_xlim(-0.1, len(scales) + 0.3)
    axes.set_ylim(-0.05, 1.05)
    axes.tick_params(length=0, labelcolor=INK)
    axes.yaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    return figure


@drawn
def importances(found: findings.Importances) -> "Figure":
    """A bar a key: its share of the variance of the loss."""
    if not found.shares:
        return canvas.message(f"Importances cannot be told: {found.why}.")
    keys = list(found.shares)
    figure, (axes,) = canvas.sheet(0.9 + 0.3 * len(keys))
    axes.barh(keys, [100 * share for share in found.shares.values()], height=0.55,
              color=OUTCOME["finished"])  # fmt: skip
    for row, share in enumerate(found.shares.values()):
        shown = f"{share:.0%}" if share >= 0.005 else "<1%"
        axes.annotate(shown, (100 * share, row), (4, 0), textcoords="offset points",
                      va="center", fontsize=8, color=INK)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"share of the variance of the loss at rung {found.rung + 1}, % "
                    f"(fANOVA, {wording.counted(found.trials, 'trial')})")  # fmt: skip
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    return figure


@drawn
def lr_map(summary: Summary, found: findings.Importances) -> "Figure":
    """Where the good trials lie: learning rate across, rank (or the next key) up."""
    across, up = _map_keys(summary, found)
    ranked = [r for r in findings.placed(summary) if _have(r, across, up)]
    if not across or not ranked:
        return canvas.message("A map needs a key that varies and a trial with its value.")
    figure, (axes,) = canvas.sheet(3.4)
    best, base = findings.winner(summary), findings.baseline(summary)
    first = {r.number: r.results[0].loss for r in ranked if r.results}
    heights = _heights(axes, summary, up, ranked, first)
    widths = _widths(axes, summary, across, ranked)
    for place, record in reversed([*enumerate(ranked)]):
        if record.number not in heights:
            continue
        at = widths[record.number], heights[record.number]
        lost = record.status == "diverged"
        color = OUTCOME["diverged"] if lost else canvas.shade(place / len(ranked))
        axes.plot(*at, "X" if lost else "o", color=color, markeredgecolor=PAPER,
                  markersize=6 + 2.5 * len(record.results), gid=canvas.trial_gid(record.number),
                  zorder=3, markeredgewidth=0.8)  # fmt: skip
        if record is best or record is base:
            axes.plot(*at, "o" if record is best else "D", markerfacecolor="none", zorder=5,
                      markeredgecolor=BEST if record is best else INK, markeredgewidth=1.6,
                      markersize=12 + 2.5 * len(record.results))  # fmt: skip
    axes.grid(color=RULE, linewidth=0.6, zorder=0)
    canvas.marks(axes, [("winner", "o", BEST), ("defaults", "D", INK)], hollow=True, outside=True)
    return figure


def _scale(domain: tuple[Any, ...], values: list[Any]):
    """(value -> height from 0 to 1, [(height, label)] of the ticks) of a key's axis."""
    kind, *rest = domain
    if kind == "choice":
        options = [*rest, *(v for v in dict.fromkeys(values) if v not in rest)]
        if all(type(option) in (int, float) for option in options):
            options.sort()
        top = max(1, len(options) - 1)
        return (
            lambda value: options.index(value) / top,
            [(i / top, wording.value(option)) for i, option in enumerate(options)],
        )
    low, high = min(rest[0], *values), max(rest[1], *values)
    warp = math.log if kind == "log" else float
    bottom, span = warp(low), warp(high) - warp(low) or 1.0
    middle = math.sqrt(low * high) if kind == "log" else (low + high) / 2
    return (
        lambda value: (warp(value) - bottom) / span,
        [((warp(x) - bottom) / span, wording.value(float(x))) for x in (low, middle, high)],
    )


def _slant(names: list[str]) -> dict[str, Any]:
    """Style of the axes' names: at an angle where two that are level would meet."""
    room = 72 * canvas.WIDTH / len(names) / 5  # characters of the ticks' size, with a gap
    if all((len(a) + len(b)) / 2 < room for a, b in itertools.pairwise(names)):
        return {}
    return {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}


def _place_ticks(count: int) -> list[tuple[float, str]]:
    return [(1.0, "1st"), (0.0, wording.ordinal(count))]


def _map_keys(summary: Summary, found: findings.Importances) -> tuple[str, str]:
    """(across, up): learning rate and rank where they vary, else the keys that matter most."""
    ranked = [*found.shares, *(key for key in summary.space if key not in found.shares)]
    wanted = [key for key in ("optim.lr", "lora.r") if key in summary.space]
    across, up = [*wanted, *(key for key in ranked if key not in wanted), "", ""][:2]
    return across, up


def _have(record: Record, *keys: str) -> bool:
    return all(record.params.get(key) is not None for key in keys if key)


def _heights(
    axes: "Axes", summary: Summary, up: str, ranked: list[Record], first: dict[int, float]
) -> dict[int, float]:
    """{trial: its height on the map}, and the axis set up for it.

    With one key there is no second: the loss at the first rung goes up instead.
    """
    if not up:
        axes.set_ylabel(f"held-out loss at rung 1, {wording.unit(summary.task)}")
        canvas.keep_in_view(axes, list(first.values()))
        return first
    scale, ticks = _scale(summary.space[up], [record.params[up] for record in ranked])
    axes.set_yticks([height for height, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(-0.12, 1.12)
    axes.set_ylabel(up)
    return {record.number: scale(record.params[up]) for record in ranked}


def _widths(axes: "Axes", summary: Summary, across: str, ranked: list[Record]) -> dict[int, float]:
    """{trial: where it is across the map}, and the axis set up for it."""
    values = [record.params[across] for record in ranked]
    kind = summary.space[across][0]
    axes.set_xlabel(across + (" (log scale)" if kind == "log" else ""))
    if kind == "choice":
        scale, ticks = _scale(summary.space[across], values)
        axes.set_xticks([width for width, _ in ticks], [label for _, label in ticks])
        axes.set_xlim(-0.12, 1.12)
        return {record.number: scale(record.params[across]) for record in ranked}
    low, high = (pick(summary.space[across][at], *values) for at, pick in ((1, min), (2, max)))
    axes.set_xlim(low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1))
    if kind == "log":
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, high * 1.15)
        axes.xaxis.set_major_formatter(lambda x, _: wording.value(float(x)))
        axes.xaxis.set_minor_formatter(lambda x, _: "")
    return {record.number: record.params[across] for record in ranked}


def _halo() -> dict[str, Any]:
    return {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.75}
