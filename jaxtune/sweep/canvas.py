"""What a sweep's pictures share: sizes, type, colours in light and dark, and how they are saved.

A figure is drawn once, in the light colours. In the page those become CSS variables, so that it
follows the reader's light or dark scheme; as PNG it has the light colours on white.
"""

import functools
import io
import math
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

# {name: (in light, in dark)}. Outcomes are of Okabe and Ito's colours, which colour-blind people
# tell apart; each is also told by a mark, a label or a line's style.
COLOURS = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "dim": ("#646b75", "#9aa3ae"),
    "rule": ("#d5d9de", "#3a4048"),
    "faint": ("#b3bac3", "#59616c"),
    "best": ("#d55e00", "#ff8a3d"),
    "finished": ("#0072b2", "#4fb3ef"),
    "running": ("#009e73", "#35c79b"),
    "diverged": ("#a3407f", "#e08cc0"),
    "paper": ("#fefefe", "#15181c"),
}


def _mixed(step: int) -> tuple[str, str]:
    """(light, dark) that many of SHADES steps on the way from blue to grey."""

    def between(first: str, last: str) -> str:
        pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
        return "#" + "".join(f"{a + (b - a) * step // SHADES:02x}" for a, b in pairs)

    light, dark = zip(COLOURS["finished"], COLOURS["faint"], strict=True)
    return between(*light), between(*dark)


SHADES = 6  # steps from the best trial's colour to the last one's
COLOURS |= {f"shade{step}": _mixed(step) for step in range(1, SHADES)}
INK, DIM, RULE, FAINT = (COLOURS[name][0] for name in ("ink", "dim", "rule", "faint"))
BEST, PAPER = COLOURS["best"][0], COLOURS["paper"][0]
# Colour of a trial's outcome: a sweep has many that were stopped, which are the background.
OUTCOME = {
    "finished": COLOURS["finished"][0],
    "running": COLOURS["running"][0],
    "paused": COLOURS["running"][0],
    "waiting": COLOURS["running"][0],
    "stopped": FAINT,
    "diverged": COLOURS["diverged"][0],
}
WIDTH = 7.4  # inches
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a name with $ in it is a name
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": DIM,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titlecolor": DIM,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": DIM,
    "ytick.labelcolor": DIM,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": DIM,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text
}


def drawn(draw: Callable[P, "Figure"]) -> Callable[P, "Figure"]:
    """Decorates a function that makes a figure: with our settings, whatever a matplotlibrc says."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, and not for every file anew
        return figure

    return run


def sheet(height: float, columns: int = 1, **options: Any) -> tuple["Figure", list["Axes"]]:
    """An empty figure of `height` inches and its axes side by side; no pyplot, so no global."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def message(text: str) -> "Figure":
    """A figure that says why there is nothing to draw."""
    figure, (axes,) = sheet(1.1)
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color=DIM, transform=axes.transAxes)
    return figure


def shade(place: float) -> str:
    """Colour of a trial by its place, 0 the best and 1 the last: blue fades into grey.

    Lightness and strength change together, so it reads without seeing hue.
    """
    step = round(SHADES * min(1.0, max(0.0, 1.6 * place)) ** 0.6)
    return COLOURS.get(f"shade{step}", COLOURS["faint" if step else "finished"])[0]


def png(figure: "Figure") -> bytes:
    """The picture on white, 160 dots an inch."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        FigureCanvasAgg(figure).print_figure(target, format="png", dpi=160, facecolor="white")
    return target.getvalue()


def svg(figure: "Figure", name: str, tips: dict[int, str]) -> str:
    """The picture as an <svg> element to stand inside a page.

    Args:
      name: of the figure, unlike any other of the page: ids inside are made from it.
      tips: {trial: text shown under the pointer}; of artists whose gid is `trial_gid`.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    target = io.StringIO()
    settings: dict[Any, Any] = _SETTINGS | {"svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(figure).print_figure(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL
    )  # would be the whole page's
    text = re.sub(r'<g id="[^"]*"\s*/>', "", text)  # of what is out of view
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)

    def trial(match: re.Match[str]) -> str:
        tip = escape(tips.get(int(match[1]), ""))
        return f'<g class="trial" data-trial="{match[1]}"><title>{tip}</title>'

    text = re.sub(r'<g id="trial-(\d+)">', trial, text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # figure_1 and so on: once a page at most
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "var(--sans)", text)
    for colour, (light, _) in COLOURS.items():
        text = re.sub(re.escape(light), f"var(--{colour})", text, flags=re.IGNORECASE)
    return text


def trial_gid(number: int) -> str:
    """What an artist of a trial is marked with, for `svg`."""
    return f"trial-{number}"


def marks(
    axes: "Axes",
    entries: list[tuple[str, str, str]],
    *,
    hollow: bool = False,
    loc: Literal["best", "lower right"] = "best",
    outside: bool = False,
) -> None:
    """A legend of (label, marker, colour), in the axes or above them."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=marker, color=color, label=label, markersize=7,
               markerfacecolor="none" if hollow else color, markeredgewidth=1.4)
        for label, marker, color in entries
    ]  # fmt: skip
    if outside:
        axes.legend(handles=handles, handletextpad=0.2, loc="lower right",
                    bbox_to_anchor=(1, 1), ncols=len(handles))  # fmt: skip
    else:
        axes.legend(handles=handles, handletextpad=0.2, loc=loc)


def keep_in_view(axes: "Axes", values: list[float]) -> None:
    """Limits of the losses without those far above the rest, which diverging leaves behind."""
    losses = sorted(value for value in values if math.isfinite(value))
    if losses:
        low, typical = losses[0], losses[(3 * len(losses)) // 4]
        high = max(y for y in losses if y <= typical + 2.5 * (typical - low or 1))
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
