"""What the model will see: rows with their masks in colour, lengths, packing, refusals, leaks."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data.packing import Rows
from jaxtune.data.pipeline import Prepared, SourceReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SHOWN_ROWS = 3
SHOWN_TOKENS = 400  # of each shown row
BINS = 12
BAR = 40  # columns of the longest bar
NAMED = 5


def show(prepared: Prepared, tokenizer: Any, console: "Console") -> None:
    """Prints the audit: learnt tokens green, context dim, a heading a document."""
    from rich.text import Text

    report = prepared.report
    console.print(_source_table([*report.train], "train"))
    if report.eval:
        console.print(_source_table([*report.eval], "eval"))
    for source in report.train + report.eval:
        for line in _refusals(source):
            console.print(Text(line, style="yellow"))
    for name, rows in _splits(prepared):
        console.print(Text(f"\n{name}: {_summary(rows)}", style="bold"))
        console.print(_histogram_text(rows))
    if prepared.labels:
        console.print(_class_table(prepared))
    repeats = f"{report.duplicates} training examples repeat an earlier one; "
    leaks = f"{report.leaked_rows} evaluation examples are also in training, "
    console.print(Text(f"{repeats}{leaks}{report.leaked_prompts} more by prompt"))
    for name, rows in _splits(prepared):
        picks = sorted({*np.linspace(0, len(rows) - 1, SHOWN_ROWS).astype(int).tolist()})
        for row in picks:
            console.print()
            console.print(Text(f"{name} row {row} of {len(rows)}", style="bold"))
            marked = not console.color_system
            for line in _row_text(rows, row, tokenizer, prepared.labels, marked=marked):
                console.print(line)


def as_json(prepared: Prepared) -> dict[str, Any]:
    """The same as plain values, for `--json`."""
    report = prepared.report
    result: dict[str, Any] = {
        "duplicates": report.duplicates,
        "leaked_rows": report.leaked_rows,
        "leaked_prompts": report.leaked_prompts,
        "said": list(report.said),
    }
    for name, rows in _splits(prepared):
        lengths = np.diff(rows.starts)
        quantiles = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1]).round().astype(int).tolist()
        result[name] = {
            "rows": len(rows),
            "width": rows.width,
            "fill": rows.fill,
            "examples": rows.examples,
            "tokens": rows.real_tokens,
            "loss_tokens": rows.loss_tokens,
            "lengths": dict(zip(("min", "p50", "p90", "p99", "max"), quantiles, strict=True)),
            "histogram": [list(item) for item in _histogram(rows)],
        }
        if prepared.labels:
            amounts = _class_counts(rows, prepared.labels)
            result[name]["classes"] = dict(zip(prepared.labels, amounts, strict=True))
    for name, sources in (("train", report.train), ("eval", report.eval)):
        if sources:
            result.setdefault(name, {})["sources"] = [dataclasses.asdict(s) for s in sources]
    return result


def _splits(prepared: Prepared) -> Iterator[tuple[str, Rows]]:
    yield "train", prepared.train
    if prepared.eval is not None:
        yield "eval", prepared.eval


def _summary(rows: Rows) -> str:
    share = rows.loss_tokens / max(rows.real_tokens, 1)
    loss = "" if rows.labels.size else f", {rows.loss_tokens} bear loss ({share:.1%})"
    return (
        f"{rows.examples} examples in {len(rows)} rows of {rows.width}, {rows.fill:.1%} filled; "
        f"{rows.real_tokens} tokens{loss}"
    )


def _class_counts(rows: Rows, names: Sequence[str]) -> list[int]:
    return np.bincount(rows.labels, minlength=len(names)).tolist()


def _class_table(prepared: Prepared) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="classes", title_justify="left")
    table.add_column("")
    table.add_column("class")
    splits = list(_splits(prepared))
    for name, _ in splits:
        table.add_column(name, justify="right")
    columns = [_class_counts(rows, prepared.labels) for _, rows in splits]
    for number, name in enumerate(prepared.labels):
        amounts = (str(column[number]) for column in columns)
        table.add_row(str(number), Text(_printable(name)), *amounts)
    return table


def _source_table(sources: list[SourceReport], name: str) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=name, title_justify="left")
    for heading in ("source", "rows are", "read", "learnt", "bad", "no loss", "too long"):
        table.add_column(heading, justify="left" if heading in ("source", "rows are") else "right")
    for source in sources:
        long = {"dropped": len(source.dropped), "cut": source.cut, "split": source.split}
        table.add_row(
            Text(source.path, overflow="fold"),
            Text(f"{source.kind} ({', '.join(source.columns)})"),
            str(source.read),
            str(source.examples),
            str(len(source.bad)),
            str(len(source.masked)),
            ", ".join(f"{count} {what}" for what, count in long.items() if count) or "0",
        )
    return table


def _refusals(source: SourceReport) -> Iterator[str]:
    """One line per refused row, the first few by name, and the remarks."""
    groups = {
        "bad": [f"{row.where}: {row.why}" for row in source.bad],
        "refused": [f"{where}: no token bears loss" for where in source.masked],
        "dropped": [f"{where}: over data.max_length" for where in source.dropped],
    }
    for what, lines in groups.items():
        yield from (f"{what}: {line}" for line in lines[:NAMED])
        if len(lines) > NAMED:
            yield f"{what}: and {len(lines) - NAMED} more in {source.path}"
    yield from (f"{source.path}: in {count} rows {remark}" for remark, count in source.remarks)


def _histogram(rows: Rows) -> list[tuple[int, int, int]]:
    """(shortest, longest, examples) of bins of equal width over the lengths in tokens."""
    lengths = np.diff(rows.starts)
    longest = int(lengths.max())
    step = -(-longest // BINS)
    counts = np.bincount((lengths - 1) // step).tolist()
    return [(n * step + 1, min((n + 1) * step, longest), count) for n, count in enumerate(counts)]


def _histogram_text(rows: Rows) -> "Text":
    from rich.text import Text

    bins = _histogram(rows)
    most = max(count for _, _, count in bins)
    text = Text()
    for low, high, count in bins:
        bar = "\u2588" * -(-count * BAR // most)
        text.append(f"{f'{low}-{high}':>13} tokens ").append(bar, style="cyan").append(
            f" {count}\n"
        )
    return text


def _row_text(
    rows: Rows, row: int, tokenizer: Any, classes: Sequence[str], *, marked: bool
) -> Iterator["Text"]:
    """The documents of a row, each under a heading, learnt runs green and context dim.

    With `classes` the heading names that of the document, and green is the token read for it.
    `marked` also puts guillemets around learnt runs, for where there is no colour.
    """
    from rich.text import Text

    room = SHOWN_TOKENS
    members = rows.members[rows.row_starts[row] : rows.row_starts[row + 1]]
    for segment, index in enumerate(members, start=1):
        if room <= 0:
            yield Text(f"... and {len(members) - segment + 1} more documents", style="magenta")
            return
        tokens, mask = rows.example(index)
        name = f", {_printable(classes[int(rows.labels[index])])}" if classes else ""
        yield Text(f"-- segment {segment}: {len(tokens)} tokens{name}", style="magenta")
        # Without classes the first token is never predicted.
        learnt_at = [bool(classes) and bool(mask[0]), *mask[1:].tolist()][:room]
        line = Text()
        shown, end = "", 0
        for learnt, run in itertools.groupby(learnt_at):
            end += len(list(run))
            # Tokens alone may be parts of a character, so runs are cut out of the whole text.
            text = tokenizer.decode(tokens[:end].tolist())
            run_text = _printable(text[len(shown) :])
            run_text = f"\u00ab{run_text}\u00bb" if learnt and marked else run_text
            line.append(run_text, style="green" if learnt else "dim")
            shown = text
        if len(tokens) > room:
            line.append(" ...", style="magenta")
        room -= len(tokens)
        yield line


def _printable(text: str) -> str:
    """Data must not be able to drive the terminal: control characters are spelt out."""
    return "".join(
        character
        if character.isprintable()
        else "\u21b5\n"
        if character == "\n"
        else ascii(character)[1:-1]
        for character in text
    )
