"""Files, saved datasets and hub ids to rows, whatever their columns are called.

`data.train` and `data.eval` name a path, a hub id, or a list of them; an entry may be a mapping:

    {"path": "train.tsv",            file, folder of files, saved dataset or hub id
     "weight": 2.0,                  share of the rows drawn; without any weight, all rows once
     "format": "prompt_completion",  the kind of row, when the columns do not say
     "split": "train",               of a saved dataset or hub id
     "name": "main",                 of a hub id with several configurations
     "columns": {"prompt": "Translate to Yoruba: {English}\n", "completion": "Yoruba"}}

`columns` says what each of our columns is made of: a column of the file, a dotted path into nested
values ("translation.en", "instances.0.output"), a column number from 1 for a CSV or TSV without a
header line, or a text with columns in braces. Only the mapped columns are then used.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtune.data import readers
from jaxtune.data.readers import BadRow, Row
from jaxtune.errors import DataError

# Kind of row -> columns it needs, and columns it may have. The first that fits wins: richer ones
# stand before the plain `text` that some datasets add to them.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tokens": (("input_ids",), ("labels", "attention_mask")),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("tools", "system")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "alpaca": (("instruction", "output"), ("input",)),
    "text": (("text",), ()),
}
# The same for rows with a class: the columns of one text or of two, and that of the class.
LABELLED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text_pair": (("text", "text_pair", "label"), ()),
    "sentence_pair": (("sentence1", "sentence2", "label"), ()),
    "premise_hypothesis": (("premise", "hypothesis", "label"), ()),
    "question_pair": (("question1", "question2", "label"), ()),
    "question_sentence": (("question", "sentence", "label"), ()),
    "question_passage": (("question", "passage", "label"), ()),
    "labelled_text": (("text", "label"), ()),
    "labelled_sentence": (("sentence", "label"), ()),
}
Kinds = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
PEEK = 20  # rows whose columns decide the kind


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.eval`."""

    path: str
    weight: float | None = None
    format: str = ""
    split: str = "train"
    name: str = ""
    columns: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A source being read: its kind of row, and its rows, good and bad, in order."""

    kind: str
    columns: tuple[str, ...]  # used, in the order of its kind's
    ignored: tuple[str, ...]
    rows: Iterator[Row | BadRow]


def parse_sources(
    setting: str | tuple[Any, ...], key: str, kinds: Kinds = KINDS
) -> tuple[Source, ...]:
    """Sources of a config value such as `data.train`. Raises DataError for entries that are not."""
    entries = (setting,) if isinstance(setting, str) else tuple(setting)
    return tuple(_parse_source(entry, f"data.{key}", kinds) for entry in entries if entry != "")


def read(source: Source, kinds: Kinds = KINDS) -> Table:
    """Opens a source and recognises its rows by their columns as one of these kinds.

    Raises:
      DataError: for a missing, empty or unreadable file, and for columns that fit no kind of row.
    """
    rows = readers.read_rows(source.path, source.split, source.name, _has_numbers(source.columns))
    head = list(itertools.islice(rows, PEEK))
    good = [row for row in head if isinstance(row, Row)]
    if not good:
        if head and isinstance(head[0], BadRow):
            raise DataError(f"{head[0].where}: {head[0].why}", fix=head[0].fix)
        raise DataError(f"{source.path} holds no rows", fix="a file with at least one row")
    found = tuple(dict.fromkeys(name for row in good for name in row.values))
    nested = tuple(_names(good[0].values))
    everything = itertools.chain(head, rows)
    if source.columns:
        everything = (_mapped(row, source.columns) for row in everything)
        names = tuple(source.columns)
    else:
        names = found
    kind = _kind(source, names, nested, kinds)
    needed, optional = kinds[kind]
    used = needed + tuple(name for name in optional if name in names)
    ignored = () if source.columns else tuple(name for name in found if name not in used)
    return Table(kind, used, ignored, (_complete(row, needed) for row in everything))


def _parse_source(entry: Any, key: str, kinds: Kinds) -> Source:
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise DataError(f"{key} has the entry {entry!r}", fix='a path, or {"path": ...}')
    known = tuple(Source.__dataclass_fields__)
    for name in entry:
        if name not in known:
            raise DataError(
                f"{key}: unknown key {name!r} for {entry['path']}",
                fix=f"one of {', '.join(known)}",
            )
    source = Source(**entry)
    weight = source.weight
    if weight is not None and (type(weight) not in (int, float) or not 0 < weight < float("inf")):
        raise DataError(f"{key}: weight {weight!r} for {source.path}", fix="a number above 0")
    for name in ("format", "split", "name"):
        if not isinstance(getattr(source, name), str):
            raise DataError(f"{key}: {name} of {source.path} is not a text", fix=f'"{name}": "..."')
    if source.format and source.format not in kinds:
        raise DataError(
            f"{key}: format {source.format!r} for {source.path}", fix=f"one of {', '.join(kinds)}"
        )
    _check_columns(source, key, kinds)
    return source


def _check_columns(source: Source, key: str, kinds: Kinds) -> None:
    known = {name for needed, optional in kinds.values() for name in needed + optional}
    good = isinstance(source.columns, Mapping) and all(
        isinstance(spec, str) or (type(spec) is int and spec >= 1)
        for spec in source.columns.values()
    )
    if not good:
        raise DataError(
            f"{key}: columns of {source.path} are {source.columns!r}",
            fix='{"our column": "their column"}',
        )
    unknown = [name for name in source.columns if name not in known]
    if unknown:
        raise DataError(
            f"{key}: columns of {source.path} name {', '.join(map(repr, unknown))} on our side",
            fix=f"ours on the left, the file's on the right; ours are {', '.join(sorted(known))}",
        )


def _has_numbers(columns: Mapping[str, str | int]) -> bool:
    return any(isinstance(spec, int) for spec in columns.values())


def _names(values: Mapping[Any, Any]) -> Iterator[str]:
    """Column names, those inside nested values by their dotted path."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield str(name)


def _kind(source: Source, names: tuple[str, ...], found: tuple[str, ...], kinds: Kinds) -> str:
    """The kind of row these columns make, or a DataError that says how to name them."""
    have = set(names)
    if source.format:
        missing = [name for name in kinds[source.format][0] if name not in have]
        if not missing:
            return source.format
        why = f"lacks the column {missing[0]!r} of {source.format} rows"
        raise _unfit(source, why, found, kinds)
    if {"chosen", "rejected"} <= have:
        why = "holds preference pairs, which supervised tasks do not train on"
        raise _unfit(source, why, found, kinds)
    for kind, (needed, _) in kinds.items():
        if have.issuperset(needed):
            return kind
    raise _unfit(source, "has columns that no kind of row is made of", found, kinds)


def _unfit(source: Source, why: str, found: tuple[str, ...], kinds: Kinds) -> DataError:
    """Names what was found, what would do, and the setting that makes these columns do."""
    wanted = "; ".join(" + ".join(needed) for needed, _ in kinds.values())
    first, second = (list(found) * 2)[:2]
    if kinds is LABELLED:  # which mostly stands last
        columns = f'{{"text": "{first}", "label": "{found[-1]}"}}'
    else:
        columns = f'{{"prompt": "{first}", "completion": "{second}"}}'
    entry = f'{{"path": "{source.path}", "columns": {columns}}}'
    return DataError(
        f"{source.path} {why}; columns found: {', '.join(map(str, found))}; wanted: {wanted}",
        fix=f"name them, as in data.train=[{entry}]",
    )


def _mapped(row: Row | BadRow, columns: Mapping[str, str | int]) -> Row | BadRow:
    if isinstance(row, BadRow):
        return row
    values = {}
    for name, spec in columns.items():
        try:
            values[name] = _look_up(row.values, spec)
        except KeyError:
            fix = f"columns found: {', '.join(map(str, row.values))}"
            return BadRow(row.where, f"no column {spec!r}, wanted for {name!r}", fix)
    return Row(values, row.where)


def _look_up(values: Mapping[Any, Any], spec: str | int) -> Any:
    """A column, a dotted path, a column number, or a text with columns in braces."""
    if spec in values:
        return values[spec]
    if isinstance(spec, int):
        raise KeyError(spec)
    if "{" in spec:
        return re.sub(r"\{([^{}]+)\}", lambda match: str(_look_up(values, match[1])), spec)
    if spec.isdigit() and int(spec) in values:
        return values[int(spec)]
    node: Any = values
    for step in spec.split("."):
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        else:
            raise KeyError(spec)
    return node


def _complete(row: Row | BadRow, needed: tuple[str, ...]) -> Row | BadRow:
    if isinstance(row, BadRow):
        return row
    missing = [name for name in needed if row.values.get(name) is None]
    if not missing:
        return row
    found = ", ".join(str(name) for name, value in row.values.items() if value is not None)
    return BadRow(
        row.where,
        f"the row lacks {' and '.join(missing)} (it has: {found or 'nothing'})",
        "complete it, delete it, or allow some with data.skip_bad_rows",
    )
