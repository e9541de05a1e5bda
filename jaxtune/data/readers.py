"""Bytes on disk to rows of named values: JSON Lines, JSON, CSV, TSV, Parquet, text, datasets.

Readers are generators: a row that cannot be read is given as a `BadRow` and reading goes on, so one
place decides how many to tolerate. Nothing outside the path the user named is opened.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune import bucket
from jaxtune.errors import DataError

BAD_ROW_FIX = "mend it, delete it, or allow some with data.skip_bad_rows"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    values: dict[Any, Any]  # by column name, or number where the file has no header
    where: str  # file:line


@dataclass(frozen=True)
class BadRow:
    where: str
    why: str
    fix: str = BAD_ROW_FIX


Rows = Iterator[Row | BadRow]


def read_rows(path: str, split: str = "train", name: str = "", numbered: bool = False) -> Rows:
    """Rows of a file, a folder of files, a saved dataset, or a hub id.

    Args:
      path: what the user named.
      split: of a saved dataset or hub id.
      name: configuration of a hub id.
      numbered: CSV and TSV have no header line; columns are 1, 2, ...

    Raises:
      DataError: at once for what cannot be opened at all.
    """
    if bucket.is_bucket(path):
        path = str(bucket.local(path, DataError))
    if re.match(r"[a-z0-9]+://", path):
        raise DataError(f"data path {path} is a URL, which is never fetched", fix="a local copy")
    try:
        place = Path(path)
        if place.is_dir():
            return _read_folder(place, split, numbered)
        if place.exists():
            return _read_file(place, numbered)
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened: {error}", fix="a readable file") from error
    if place.suffix.lower() in _READERS or not HUB_ID.fullmatch(path):
        raise DataError(f"{path} does not exist", fix="a file, a saved dataset or a hub id")
    return _read_hub(path, split, name)


def _read_file(path: Path, numbered: bool) -> Rows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: no reader for {path.suffix or 'a file without a suffix'}",
            fix=f"one of {', '.join(_READERS)}",
        )
    if not path.is_file():
        raise DataError(f"{path} is not a regular file", fix="a file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", fix="a file with at least one row")
    if reader is _read_csv:
        return _read_csv(path, numbered)
    return reader(path)


def _read_folder(folder: Path, split: str, numbered: bool) -> Rows:
    """A saved dataset, else every data file that stands directly in the folder."""
    if any((folder / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
        return _read_saved(folder, split)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS)
    if not files:
        raise DataError(
            f"{folder} is neither a saved dataset nor a folder of data files",
            fix=f"files that end in {', '.join(_READERS)}",
        )
    readers = [_read_file(file, numbered) for file in files]
    return (row for reader in readers for row in reader)


def _decode(line: bytes) -> str:
    """UTF-8 without its mark; UnicodeDecodeError is a ValueError, as JSON's is."""
    return line.decode("utf-8-sig")


def _read_json_lines(path: Path) -> Rows:
    # Binary lines end at \n only: str.splitlines would also break at U+2028 inside strings.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(line, f"{path}:{number}")


def _json_row(line: bytes, where: str) -> Row | BadRow:
    try:
        values = json.loads(_decode(line.strip()))
    except json.JSONDecodeError as error:  # its own line number counts within this line
        return BadRow(where, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # UTF-8, huge integers, depth
        return BadRow(where, f"not JSON: {error}")
    return _object_row(values, where)


def _object_row(values: Any, where: str) -> Row | BadRow:
    if not isinstance(values, dict):
        return BadRow(where, f"a JSON {type(values).__name__}, not an object with columns")
    return Row(values, where)


def _read_json(path: Path) -> Rows:
    """A list of objects, one object of which a value is that list, or JSON Lines in disguise."""
    content = path.read_bytes()
    try:
        document = json.loads(_decode(content))
    except (ValueError, RecursionError) as error:
        first = content.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
        if isinstance(_json_row(first, ""), Row):
            yield from _read_json_lines(path)
            return
        raise DataError(f"{path} is not JSON: {error}", fix="mend it at that place") from error
    if isinstance(document, dict):
        wrapped = next((document[key] for key in ("data", "rows") if key in document), None)
        document = wrapped if isinstance(wrapped, list) else [document]
    if not isinstance(document, list):
        raise DataError(f"{path} holds one {type(document).__name__}", fix="a list of objects")
    for number, values in enumerate(document, start=1):
        yield _object_row(values, f"{path} row {number}")


def _read_csv(path: Path, numbered: bool) -> Rows:
    """Quoted as the csv module understands it: fields may hold tabs, line ends, doubled quotes.

    `strict` makes an unbalanced quote an error instead of swallowing the rest of the file.
    """
    csv.field_size_limit(1 << 30)  # documents are longer than the module's 128 KiB
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _csv_records(csv.reader(file, delimiter=delimiter, strict=True), path)
        header: list[Any] | None = None
        for record, where in records:
            if header is None and not numbered:
                header = _header(record, where)
            elif isinstance(record, BadRow):
                yield record
            else:
                header = header or list(range(1, len(record) + 1))
                yield _csv_row(header, record, where)


def _csv_records(reader: Any, path: Path) -> Iterator[tuple[list[str] | BadRow, str]]:
    while True:
        where = f"{path}:{reader.line_num + 1}"  # a record may span lines; name its first
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "double the quotes inside a quoted field, or allow some with data.skip_bad_rows"
            yield BadRow(where, f"not a CSV row: {error}", fix), where
            continue
        if record:
            yield record, where


def _header(record: list[str] | BadRow, where: str) -> list[str]:
    if isinstance(record, BadRow):
        raise DataError(f"{where}: {record.why}", fix="a header line of column names")
    repeated = {name for name in record if record.count(name) > 1}
    if repeated:
        raise DataError(
            f"{where}: the header names {', '.join(sorted(repeated))} twice",
            fix="one name for each column",
        )
    return record


def _csv_row(header: list[Any], record: list[str], where: str) -> Row | BadRow:
    if len(record) != len(header):
        return BadRow(where, f"{len(record)} fields, where the header has {len(header)}")
    if not all(map(_is_utf8, record)):
        return BadRow(where, "not UTF-8")
    return Row(dict(zip(header, record, strict=True)), where)


def _is_utf8(text: str) -> bool:
    """False for the lone surrogates that stand for undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> Rows:
    """Documents separated by blank lines; line ends inside a document are kept, as \\n."""
    lines: list[str] = []
    start = 1
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                start = start if lines else number
                lines.append(line)
            elif lines:
                yield _text_row(lines, f"{path}:{start}")
                lines = []
    if lines:
        yield _text_row(lines, f"{path}:{start}")


def _text_row(lines: list[str], where: str) -> Row | BadRow:
    text = "".join(lines).rstrip("\n")
    return Row({"text": text}, where) if _is_utf8(text) else BadRow(where, "not UTF-8")


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        names = _written_names(file.schema_arrow.metadata)
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(_named(values, names), f"{path} row {number}")
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is damaged Parquet after row {number}: {error}", fix="a fresh copy"
        ) from error


def _written_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """{column: names of its classes} that `datasets` wrote into the schema of a Parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        named = {
            column: feature["names"]
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}  # of another writer
    return {column: names for column, names in named.items() if isinstance(names, list)}


def _named(values: dict[Any, Any], names: Mapping[str, Sequence[str]]) -> dict[Any, Any]:
    """Numbers of classes as their names; those of no class, which test sets have, as null."""
    if not names:
        return values
    known = {
        column: names[column][value] if 0 <= value < len(names[column]) else None
        for column, value in values.items()
        if column in names and isinstance(value, int)
    }
    return values | known


def _read_saved(folder: Path, split: str) -> Rows:
    """A folder written by `datasets`' save_to_disk; its lists of files may not lead outside."""
    splits_file = folder / "dataset_dict.json"
    if splits_file.is_file():
        splits = _json_field(splits_file, "splits")
        if split not in splits:
            raise DataError(
                f"{folder} has no split {split!r}; it has {', '.join(map(str, splits))}",
                fix=f'{{"path": "{folder}", "split": "..."}}',
            )
        folder = _inside(folder, split)
    for entry in _json_field(folder / "state.json", "_data_files"):
        _inside(folder, entry.get("filename") if isinstance(entry, dict) else entry)

    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    try:
        table = Dataset.load_from_disk(str(folder))
    except Exception as error:  # datasets raises what its parts raise
        raise DataError(
            f"{folder} cannot be read as a saved dataset: {error}", fix="save it again"
        ) from error
    return _dataset_rows(table, str(folder))


def _json_field(path: Path, name: str) -> list[Any]:
    try:
        value = json.loads(path.read_bytes())[name]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path} has no list {name!r}: {error}", fix="save it again") from error
    if not isinstance(value, list):
        raise DataError(f"{path}: {name} is not a list", fix="save it again")
    return value


def _inside(folder: Path, name: Any) -> Path:
    """`folder/name`, which must be a plain relative name that stays inside the folder."""
    root = folder.resolve()
    place = root / str(name)
    if not isinstance(name, str) or "\0" in name or not place.resolve().is_relative_to(root):
        raise DataError(f"{folder} names {name!r}, outside itself", fix="a dataset you trust")
    return place


def _read_hub(path: str, split: str, name: str) -> Rows:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        table = load_dataset(path, name or None, split=split)
    except Exception as error:  # network, unknown id, missing split or configuration
        raise DataError(
            f"{path} is no file here, and as a hub id: {type(error).__name__}: {error}",
            fix='an existing path, or {"path": ID, "split": ..., "name": ...}',
        ) from error
    return _dataset_rows(table, path)


def _dataset_rows(table: Any, path: str) -> Rows:
    from datasets import ClassLabel

    features = table.features.items()
    names = {name: feature.names for name, feature in features if isinstance(feature, ClassLabel)}
    return (
        Row(_named(dict(values), names), f"{path} row {n}")
        for n, values in enumerate(table, start=1)
    )


_READERS: dict[str, Callable[..., Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
