"""sweep.html: what a sweep found, on one page that needs nothing but itself, and its pictures.

Whatever comes from a person (names, paths, values, reasons) is escaped where it is put in.
"""

import contextlib
import math
import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.errors import StorageError
from jaxtune.sweep import canvas, figures, findings, halving, landscape, page, wording
from jaxtune.sweep.findings import Gain
from jaxtune.sweep.records import Record, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE, FIGURES = "sweep.html", "figures"
# Nothing may be fetched, whatever a name or a reason has in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Pictures(NamedTuple):
    """What takes seconds to make of a summary, and the page only puts together."""

    found: findings.Importances
    inline: dict[str, str]  # {name: <svg> element}
    files: dict[str, bytes]  # {name: PNG}


def pictures(summary: Summary) -> Pictures:
    """Draws a sweep whose trials are all done."""
    found = findings.importances(summary)
    drawn = draw(summary, found)
    tips = {record.number: _tip(record, summary) for record in summary.records}
    inline = {name: canvas.svg(figure, name, tips) for name, figure in drawn.items()}
    return Pictures(found, inline, {name: canvas.png(figure) for name, figure in drawn.items()})


def write(summary: Summary, drawn: Pictures, folder: Path) -> list[Path]:
    """Writes `sweep.html` and `figures/*.png` into the workdir; each is there whole or not at all.

    Returns:
      The files, the page first.
    Raises:
      StorageError: they cannot be written; those of before stay.
    """
    text = compose(summary, drawn.found, drawn.inline, folder)
    files = {folder / FILE: text.encode("utf-8", "replace")}
    files |= {folder / FIGURES / f"{name}.png": png for name, png in drawn.files.items()}
    for path, content in files.items():
        _write(path, content)
    return [*files]


def draw(summary: Summary, found: findings.Importances) -> "dict[str, Figure]":
    """{name: figure}"""
    return {
        "baseline": figures.baseline(findings.gain(summary), wording.unit(summary.task)),
        "importances": landscape.importances(found),
        "lr_map": landscape.lr_map(summary, found),
        "learning_curves": figures.learning_curves(summary),
        "parallel": landscape.parallel(summary),
        "rungs": figures.rungs(summary),
        "bought": figures.bought(summary),
    }


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error}",
            fix="free space there, then the same command again; every finished result is kept",
        ) from error


def compose(
    summary: Summary, found: findings.Importances, inline: dict[str, str], folder: Path
) -> str:
    """The page, from the summary and its figures as <svg> elements."""
    best, gain = findings.winner(summary), findings.gain(summary)
    title = f"{summary.name}: sweep of {wording.counted(_searched(summary), 'trial')}"
    parts = [
        f'<p class="over">jaxtune sweep · {_e(summary.name)}</p>',
        f"<h1>{_e(headline(summary, gain))}</h1>",
        f"<p>{_e(_support(summary, gain))}</p>",
        f'<p class="note">{_e(_subject(summary))}</p>',
        _facts(summary, gain),
        _section("The winner", _settings(summary, best)),
        _section(
            "Gain or noise?",
            _e(_noise(gain)),
            (inline["baseline"], "Points are whole trainings that differ in the seed only: order "
             "of the data, dropout, the adapters' start. Bars are "
             f"{findings.CONFIDENCE:.0%} intervals of the mean."),
        ),
        _section(
            "What mattered",
            _e(_importance(found)),
            (inline["importances"], ""),
            (inline["lr_map"], "Each trial at its values; the bluer, the better its place, the "
             "larger, the further it was trained. Crosses diverged."),
            (inline["parallel"], "A line a trial; orange is the winner, dashed the defaults, "
             "dotted what diverged. Place: by the last rung reached, then by its loss."),
        ),
        _section(
            "How the trials went",
            "",
            (inline["learning_curves"], "Training loss, means of windows that are the same for "
             "all: trials see the same rows in the same order, and a hard row is in every curve."),
            (inline["rungs"], "Left: how far each trial was trained, and how it ended. Right: "
             "how much worse than the best of the same rung."),
        ),
        _section("Did early ranks hold?", "".join(_ranks(summary))),
        _section("What the budget bought", _bought(summary), (inline["bought"], "")),
        _section("What was decided", _list(summary.notes) if summary.notes else ""),
        _section("Go on", _commands(summary, folder)),
        _section("All trials", _trials(summary, best), kind="wide"),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_e(_POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_e(title)}</title><style>{page.STYLE}</style></head>\n"
        f"<body>{''.join(parts)}<script>{page.SCRIPT}</script></body></html>\n"
    )


def headline(summary: Summary, gain: Gain | None) -> str:
    """The result in a sentence, which claims no more than was measured."""
    best = findings.winner(summary)
    if best is None:
        lost = sum(record.status == "diverged" for record in summary.records)
        return f"No trial has a score; {wording.counted(lost, 'trial')} diverged"
    name = f"Trial {best.number}"
    if best.role == "baseline":
        return "The defaults win: no other trial did better"
    if gain is None:
        return f"{name} leads with a held-out loss of {wording.loss(_loss(summary, best))}"
    return {
        "better": f"{name} beats the defaults by more than noise",
        "worse": f"{name} won the search, yet over several seeds the defaults are better and "
        "handed over",
        "noise": f"{name} won the search, but its lead over the defaults is within noise",
        "unknown": f"{name} is ahead of the defaults; whether by more than noise is not known"
        if gain.difference > 0
        else f"{name} won the search, but at the same rung the defaults are no worse",
    }[gain.verdict]


def _support(summary: Summary, gain: Gain | None) -> str:
    if gain is None:
        return ""
    ours, theirs = (math.fsum(x) / len(x) for x in (gain.winner, gain.defaults))
    word = "below" if gain.difference >= 0 else "above"
    text = (
        f"Held-out loss {wording.loss(ours)} against {wording.loss(theirs)} "
        f"{wording.unit(summary.task)}: "
        f"{abs(gain.difference):.4f} ({abs(gain.difference) / theirs:.2%}) {word} the defaults"
    )
    if gain.verdict == "unknown":
        return f"{text}, one run of each."
    return f"{text}; {findings.CONFIDENCE:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}."


def _noise(gain: Gain | None) -> str:
    if gain is None:
        return "Defaults and winner were not both scored after equal training."
    text = f"Rule: {gain.rule}."
    if gain.verdict != "unknown":
        text += (
            " The search's own run of the winner does not count: it was chosen for its loss, "
            "luck included. The interval is about seeds; the held-out rows are the same for all."
        )
    return text


def _subject(summary: Summary) -> str:
    return f"{summary.model} on {summary.data}, task {summary.task}"


def _searched(summary: Summary) -> int:
    return len(findings.placed(summary))


def _loss(summary: Summary, best: Record) -> float | None:
    """Of the winner; trained again on everything, where that was done."""
    final = findings.final(summary)
    return final.loss if final else best.loss


def _facts(summary: Summary, gain: Gain | None) -> str:
    best, cost = findings.winner(summary), findings.cost(summary)
    budget = "no limit was set"
    if summary.budget_seconds is not None:
        budget = f"of {wording.duration(summary.budget_seconds)}"
    elif summary.budget_tokens is not None:
        budget = f"of a budget of {wording.amount(summary.budget_tokens)} tokens"
    facts = []
    if gain is not None:
        for name, losses, kind in (("Winner", gain.winner, "won"), ("Defaults", gain.defaults, "")):
            mean = math.fsum(losses) / len(losses)
            over = f"mean of {len(losses)} seeds" if len(losses) > 1 else "one run"
            facts.append((name, wording.loss(mean), f"held-out loss, {over}", kind))
    elif best is not None:
        own = "whole training" if best.status == "finished" else "so far"
        facts.append(("Winner", wording.loss(_loss(summary, best)), f"held-out loss, {own}", "won"))
    facts.append(("Trials", str(_searched(summary)), _outcomes(summary), ""))
    if cost.full_tokens:
        share = f"{cost.tokens / cost.full_tokens:.2f} of all trials in full"
        facts.append(("Tokens", wording.amount(cost.tokens), share, ""))
    facts.append(("Time", wording.duration(summary.seconds), budget, ""))
    if summary.programs_after_first_rung is not None:
        compiled = "programs after the first rung"
        facts.append(("Compiled", str(summary.programs_after_first_rung), compiled, ""))
    cells = (
        f'<div class="{kind}"><dt>{_e(name)}</dt><dd>{_e(value)}</dd><dd>{_e(more)}</dd></div>'
        for name, value, more, kind in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _outcomes(summary: Summary) -> str:
    states = [record.status for record in findings.placed(summary)]
    return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))


def _settings(summary: Summary, best: Record | None) -> str:
    if best is None:
        return ""
    rows = "".join(
        f'<tr><td class="text"><code>{_e(key)}</code></td>'
        f"<td><b>{_e(wording.value(best.params.get(key, '-')))}</b></td>"
        f"<td>{_e(wording.value(summary.defaults.get(key, '-')))}</td>"
        f'<td class="text">{_e(_domain(domain))}</td></tr>'
        for key, domain in summary.space.items()
    )
    return (
        '<table class="plain"><thead><tr><th class="text">setting</th><th>winner</th>'
        f'<th>defaults</th><th class="text">searched</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _domain(domain: tuple[Any, ...]) -> str:
    kind, *rest = domain
    if kind == "choice":
        return " · ".join(map(wording.value, rest))
    return f"{wording.value(float(rest[0]))} to {wording.value(float(rest[1]))}, {kind}"


def _importance(found: findings.Importances) -> str:
    if not found.shares:
        return ""
    return (
        f"Of what made losses differ at rung {found.rung + 1}, where all of "
        f"{wording.counted(found.trials, 'trial')} compare, {next(iter(found.shares))} explains "
        "most. Shares hold for the searched ranges: a key that is searched narrowly looks small."
    )


def _ranks(summary: Summary) -> Iterable[str]:
    held = halving.agreement(summary.records)
    if not held:
        yield '<p class="note">Fewer than two rungs have scores.</p>'
    for at in held:
        order = (
            f"their order held with a rank correlation (Spearman) of {at.spearman:+.2f}"
            if at.spearman is not None
            else "too few to say how far their order held"
        )
        scored = halving.ranked(findings.placed(summary), at.rung)
        yield (
            f"<p>Rung {at.rung + 1} to {at.rung + 2}: {at.trials} of "
            f"{wording.counted(len(scored), 'trial')} went on, {order}; the best at rung "
            f"{at.rung + 2} was {wording.ordinal(at.best_was)} before.</p>"
        )


def _bought(summary: Summary) -> str:
    cost = findings.cost(summary)
    if not cost.tokens:
        return ""
    rows = [(p.name, p.trials, p.tokens, p.seconds) for p in cost.phases]
    rows.append(("this sweep", cost.trials, cost.tokens, cost.seconds))
    rows.append(("all trials in full, at this pace", cost.trials, cost.full_tokens,
                 cost.full_seconds))  # fmt: skip
    body = "".join(
        f'<tr><td class="text">{_e(name)}</td><td>{trials}</td>'
        f"<td>{wording.amount(tokens)}</td><td>{wording.duration(seconds)}</td></tr>"
        for name, trials, tokens, seconds in rows
    )
    return (
        '<table class="plain"><thead><tr><th class="text">phase</th><th>trials</th><th>tokens</th>'
        f"<th>machine time</th></tr></thead><tbody>{body}</tbody></table>"
    )


def _commands(summary: Summary, folder: Path) -> str:
    """Command lines, of what is there."""
    names = ("best.py", "best", "export", "again")
    page_, best, export, new = (shlex.quote(str(folder / name)) for name in names)
    lines = []
    if (folder / "best.py").exists():
        again = f"jaxtune train --config={page_} --workdir={new}"
        lines.append(("what was handed over, trained again from its own config", again))
    if (folder / "best").exists():
        lines.append(("its scores, beside the base model's", f"jaxtune eval --workdir={best}"))
        if summary.task != "classify":
            lines.append(("a try", f"jaxtune generate --workdir={best} --prompt='...'"))
        if any(key.startswith("lora.") for key in summary.space):
            peft = f"jaxtune export --workdir={best} --format=peft --out=DIR"
            lines.append(("its adapter alone", peft))
        if (folder / "export").exists():
            proof = f"jaxtune verify {export} {best}"
            lines.append(("the exported model is the one that was scored", proof))
    if (folder / "sweep.db").exists():
        url = shlex.quote(f"sqlite:///{folder / 'sweep.db'}")
        lines.append(("every trial in Optuna's own dashboard", f"optuna-dashboard {url}"))
    rows = (f'<span class="say"># {_e(say)}</span>\n{_e(line)}' for say, line in lines)
    return f"<pre>{chr(10).join(rows)}</pre>" if lines else ""


def _trials(summary: Summary, best: Record | None) -> str:
    ranked = [*findings.placed(summary)]
    others = [record for record in summary.records if record not in ranked]
    heads = [("trial", "number"), ("place", "number"), ("outcome", "text")]
    heads += [(key, "number" if _numeric(summary.space[key]) else "text") for key in summary.space]
    heads += [(f"loss, rung {rung + 1}", "number") for rung in range(len(summary.rungs))]
    heads += [("tokens", "number"), ("seconds", "number"), ("why", "text")]
    top = "".join(
        f'<th class="{kind}" data-kind="{kind}"><button type="button">{_e(name)}</button></th>'
        for name, kind in heads
    )
    rows = "".join(
        _row(record, place if place <= len(ranked) else None, summary, record is best)
        for place, record in enumerate([*ranked, *others], 1)
    )
    return (
        '<p class="note">Click a head to sort; the pointer on a row shows its trial in the '
        f'pictures.</p><div class="frame"><table id="trials"><thead><tr>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(record: Record, place: int | None, summary: Summary, won: bool) -> str:
    at = {result.rung: result for result in record.results}
    outcome = "winner" if won else record.status
    role = {
        "search": "",
        "baseline": "defaults",
        "repeat": f"repeat of the {record.repeats}",
        "final": f"trial {record.of} once more, on everything",
    }.get(record.role, record.role)
    said = record.why.startswith(role)  # as the first trials do of themselves
    why = record.why if said else "; ".join(filter(None, (role, record.why)))
    cells = [
        _cell(record.number, str(record.number)),
        _cell(place, str(place) if place else "-"),
        _cell(record.status, record.status, kind="text", dot=outcome),
    ]
    for key, domain in summary.space.items():
        of = record.params.get(key)
        cells.append(_cell(of, "-" if of is None else wording.value(of),
                           kind="" if _numeric(domain) else "text"))  # fmt: skip
    for rung in range(len(summary.rungs)):
        loss = at[rung].loss if rung in at else None
        finite = loss if loss is not None and math.isfinite(loss) else None
        cells.append(_cell(finite, wording.loss(loss)))
    cells += [
        _cell(record.tokens, f"{record.tokens:,}"),
        _cell(round(record.seconds, 3), f"{record.seconds:,.1f}"),
        _cell(why, why, kind="text why"),
    ]
    mark = ' class="winner"' if won else ""
    return f'<tr data-trial="{record.number}"{mark}>{"".join(cells)}</tr>'


def _cell(value: Any, shown: str, *, kind: str = "", dot: str = "") -> str:
    spot = f'<span class="dot {dot}"></span>' if dot else ""
    of = "" if value is None else str(value)
    return f'<td class="{kind}" data-value="{_e(of)}">{spot}{_e(shown)}</td>'


def _numeric(domain: tuple[Any, ...]) -> bool:
    return all(type(value) in (int, float) for value in domain[1:])


def _section(title: str, text: str, *pictures: tuple[str, str], kind: str = "") -> str:
    """A heading with text (HTML already) and figures; nothing where both are missing."""
    if not text and not pictures:
        return ""
    body = text if not text or text.startswith("<") else f"<p>{text}</p>"
    for svg, caption in pictures:
        under = f"<figcaption>{_e(caption)}</figcaption>" if caption else ""
        body += f"<figure>{svg}{under}</figure>"
    return f'<section class="{kind}"><h2>{_e(title)}</h2>{body}</section>'


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"


def _tip(record: Record, summary: Summary) -> str:
    return (
        f"trial {record.number}, {record.status}: {wording.params(record.params, summary.space)}, "
        f"loss {wording.loss(record.loss)}"
    )


def _e(text: str) -> str:
    return escape(text, quote=True)
