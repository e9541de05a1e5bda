"""From `data.train` and `data.eval` to batches: read, encode, refuse, split, pack, shuffle.

`prepare` does all that happens once and reports it; `batches` is a pure function of (seed, step),
so a run that resumes at any step, on any number of hosts, sees what it would have seen.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.data import chat, formats, labels
from jaxtune.data.packing import Batch, Example, Rows, fit_length, pack
from jaxtune.data.readers import BadRow, Row
from jaxtune.data.templates import chat_template
from jaxtune.errors import ConfigError, DataError

CHUNK = 1024  # rows tokenised at once
NAMED = 5  # rows named where many have the same fault
SETTINGS = {"train": "data.train", "eval": "data.eval"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source. Every row read is in exactly one of the counts."""

    path: str
    kind: str
    columns: tuple[str, ...]
    ignored: tuple[str, ...]  # columns not used
    read: int
    bad: tuple[BadRow, ...]  # unreadable or unusable, tolerated by data.skip_bad_rows
    masked: tuple[str, ...]  # where: rows without a token that bears loss
    dropped: tuple[str, ...]  # where: rows over max_length, with too_long=drop
    cut: int  # rows cut to max_length
    split: int  # rows split into windows
    windows_without_loss: int  # of the split rows
    examples: int  # kept
    remarks: tuple[tuple[str, int], ...]  # what else was noticed, and in how many rows


@dataclass(frozen=True)
class Report:
    train: tuple[SourceReport, ...]
    eval: tuple[SourceReport, ...]
    duplicates: int  # training examples equal to an earlier one
    leaked_rows: int  # evaluation examples that are also training examples
    leaked_prompts: int  # evaluation examples of which the prompt alone is in training
    said: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    train: Rows
    eval: Rows | None
    report: Report
    labels: tuple[str, ...] = ()  # names of the classes in order, with task=classify


def prepare(
    config: Config, tokenizer: Any, say: Say, form: labels.Form = labels.LAST_TOKEN
) -> Prepared:
    """Reads, encodes and packs the training and evaluation data, saying what it decides.

    `form` is how the model to be trained wants rows with a class.

    Raises:
      DataError: for data that cannot be read, or of which nothing can be trained on.
      ConfigError: rows with a class that are to be split.
    """
    if config.task == "classify" and config.data.too_long == "split":
        raise ConfigError("data.too_long=split, and half a row has no class", fix="cut or drop")
    said: list[str] = []

    def tell(message: str) -> None:
        said.append(message)
        say(message)

    sources = formats.parse_sources(config.data.train, "train", _kinds(config))
    if not sources:
        raise DataError("data.train is empty", fix="--config.data.train=FILE")
    train, train_reports = _load(sources, "train", config, tokenizer, form, tell)
    held_sources = formats.parse_sources(config.data.eval, "eval", _kinds(config))
    held: list[list[Example]] = []
    held_reports: tuple[SourceReport, ...] = ()
    if held_sources:
        held, held_reports = _load(held_sources, "eval", config, tokenizer, form, tell)
    elif config.data.eval_fraction:
        train, held = _split(train, config.data.eval_fraction, tell)
    flat = [example for source in train for example in source]
    held_flat = [example for source in held for example in source]
    duplicates, rows, prompts = _compare(flat, held_flat)
    if duplicates:
        tell(f"train: {duplicates} of {len(flat)} examples repeat an earlier one")
    if rows or prompts:
        tell(
            f"leak: {rows} evaluation examples are also in training, {prompts} more share their "
            "prompt with a training example: scores on them are not clean"
        )
    width, packing = config.data.max_length, config.data.packing
    names: tuple[str, ...] = ()
    numbers: dict[str, list[int]] = {"train": [], "eval": []}
    if config.task == "classify":
        splits = {"train": flat, "eval": held_flat}
        names, numbers = labels.assign(config.data.labels, form, splits, tell)
    train_rows = pack(train, width, packing, _weights(sources, tell), numbers["train"])
    eval_rows = pack(held, width, packing, labels=numbers["eval"]) if held else None
    _tell_rows("train", train_rows, packing, tell)
    if eval_rows is not None:
        _tell_rows("eval", eval_rows, packing, tell)
    if len(train_rows) < config.train.batch_size:
        tell(
            f"warning: {len(train_rows)} rows are fewer than train.batch_size "
            f"{config.train.batch_size}: every step repeats some"
        )
    report = Report(train_reports, held_reports, duplicates, rows, prompts, tuple(said))
    return Prepared(train_rows, eval_rows, report, names)


def batches(
    rows: Rows,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    start_step: int = 0,
    mine: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Endless training batches from step `start_step` on.

    Each epoch has an order of its own. A batch is a function of (seed, step); a host among several
    takes the rows `mine` of it, so the batches are the same on any number of hosts. Rows are
    assembled in background threads.
    """
    import grain

    mine = np.arange(batch_size) if mine is None else np.asarray(mine)
    steps = order(rows, seed, shuffle).batch(batch_size)[start_step:]
    drawn = steps.map(lambda numbers: rows.batch(numbers[mine]))
    return iter(drawn.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def order(rows: Rows, seed: int, shuffle: bool = True) -> Any:
    """Numbers of the rows in the order of training: an endless grain.MapDataset."""
    import grain

    parts = rows.parts if rows.weights else ((0, len(rows)),)  # without weights all are one
    streams = []
    for start, end in parts:
        stream = grain.MapDataset.source(range(start, end)).seed((seed + start) % 2**32)
        streams.append((stream.shuffle() if shuffle else stream).repeat())
    return grain.MapDataset.mix(streams, weights=rows.weights or [1.0])


def subset(rows: Rows, fraction: float, seed: int) -> Rows:
    """A part of the rows, drawn by seed from every source alike; at least one of each."""
    random = np.random.default_rng(seed)
    chosen = [
        np.sort(
            random.permutation(np.arange(*part))[: max(1, round(fraction * (part[1] - part[0])))]
        )
        for part in rows.parts
    ]
    numbers, counts = np.concatenate(chosen), np.cumsum([0, *map(len, chosen)])
    members = _spans(rows.row_starts, numbers)
    kept = rows.members[members]
    tokens = _spans(rows.starts, kept)
    return replace(
        rows,
        tokens=rows.tokens[tokens],
        mask=rows.mask[tokens],
        starts=np.cumsum([0, *np.diff(rows.starts)[kept]]),
        members=np.arange(len(kept)),
        row_starts=np.cumsum([0, *np.diff(rows.row_starts)[numbers]]),
        parts=tuple(zip(counts[:-1].tolist(), counts[1:].tolist(), strict=True)),
        labels=rows.labels[kept] if rows.labels.size else rows.labels,
        types=rows.types[tokens] if rows.types.size else rows.types,
    )


def _spans(starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """What stands between starts[n] and starts[n + 1], for each n in turn."""
    return np.concatenate([np.arange(int(starts[n]), int(starts[n + 1])) for n in numbers])


def eval_batches(
    rows: Rows, batch_size: int, mine: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Every row exactly once, in order; the last batch is filled up with rows without weight.

    Of each batch a host among several takes the rows `mine`, ascending numbers below `batch_size`.
    """
    mine = np.arange(batch_size) if mine is None else np.asarray(mine)
    for start in range(0, len(rows), batch_size):
        numbers = start + mine
        yield rows.batch(numbers[numbers < len(rows)], size=len(mine))


def _kinds(config: Config) -> formats.Kinds:
    return formats.LABELLED if config.task == "classify" else formats.KINDS


def _load(
    sources: Sequence[formats.Source],
    split: str,
    config: Config,
    tokenizer: Any,
    form: labels.Form,
    tell: Say,
) -> tuple[list[list[Example]], tuple[SourceReport, ...]]:
    """The usable examples of each source. At most `data.skip_bad_rows` rows may be bad in all."""
    examples, reports = [], []
    spare = config.data.skip_bad_rows
    for source in sources:
        table = formats.read(source, _kinds(config))
        unused = f"; not used: {', '.join(map(str, table.ignored))}" if table.ignored else ""
        tell(f"{split}: {source.path}: {table.kind} rows from {', '.join(table.columns)}{unused}")
        found, report = _load_source(source, table, spare, config, tokenizer, form)
        spare -= len(report.bad)
        _tell_source(split, report, config, tell)
        if not found:
            raise DataError(
                f"{SETTINGS[split]}: {source.path} has no row to learn from: {len(report.masked)} "
                f"without a token that bears loss{_names(report.masked)}, {len(report.dropped)} "
                f"over max_length{_names(report.dropped)}",
                fix="rows with an answer, a larger data.max_length, or data.completion_only=False",
            )
        examples.append(found)
        reports.append(report)
    return examples, tuple(reports)


def _load_source(
    source: formats.Source,
    table: formats.Table,
    spare: int,
    config: Config,
    tokenizer: Any,
    form: labels.Form,
) -> tuple[list[Example], SourceReport]:
    # Continued pretraining reads a stream of documents: windows of it lose nothing.
    too_long = "split" if config.task == "pretrain" else config.data.too_long
    encode = _encoder(table, config, tokenizer, form)
    kept: list[Example] = []
    bad: list[BadRow] = []
    masked: list[str] = []
    dropped: list[str] = []
    counts: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    for chunk in _chunks(table.rows, CHUNK):
        good = [row for row in chunk if isinstance(row, Row)]
        encoded = encode(good)
        remarks += encoded.remarks
        counts["read"] += len(chunk)
        unread = [row for row in chunk if isinstance(row, BadRow)]
        for result in itertools.chain(unread, encoded.results):
            if isinstance(result, BadRow):
                bad.append(result)
                _check_bad(bad, spare, config.data.skip_bad_rows)
            elif not result.loss_tokens:
                masked.append(result.where)
            else:
                pieces = fit_length(result, config.data.max_length, too_long)
                learnable = [piece for piece in pieces if piece.loss_tokens]
                kept += learnable
                if not pieces:
                    dropped.append(result.where)
                elif not learnable:
                    masked.append(result.where)
                elif result.cut or len(result.tokens) > config.data.max_length:
                    counts[too_long] += 1
                    counts["empty windows"] += len(pieces) - len(learnable)
    return kept, SourceReport(
        path=source.path,
        kind=table.kind,
        columns=table.columns,
        ignored=tuple(map(str, table.ignored)),
        read=counts["read"],
        bad=tuple(bad),
        masked=tuple(masked),
        dropped=tuple(dropped),
        cut=counts["cut"],
        split=counts["split"],
        windows_without_loss=counts["empty windows"],
        examples=len(kept),
        remarks=tuple(sorted(remarks.items())),
    )


def _encoder(
    table: formats.Table, config: Config, tokenizer: Any, form: labels.Form
) -> Callable[[list[Row]], chat.Encoded]:
    """Rows of this table to examples, as the task wants them."""
    data = config.data
    if config.task == "classify":
        texts = table.columns[:-1]  # the last is the label
        return lambda rows: labels.encode(
            texts, rows, tokenizer, form, data.max_length, data.too_long
        )
    template = chat_template(tokenizer, data.template)
    completion_only = data.completion_only and config.task != "pretrain"
    return lambda rows: chat.encode(table.kind, rows, tokenizer, template, completion_only)


def _chunks(rows: Iterator[Row | BadRow], size: int) -> Iterator[list[Row | BadRow]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _check_bad(bad: Sequence[BadRow], spare: int, allowed: int) -> None:
    if len(bad) > spare:
        over = f" (one more than data.skip_bad_rows={allowed} allows)" if allowed else ""
        raise DataError(f"{bad[-1].where}: {bad[-1].why}{over}", fix=bad[-1].fix)


def _names(where: Sequence[str]) -> str:
    """The first few of many, in brackets."""
    if not where:
        return ""
    more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
    return f" ({', '.join(where[:NAMED])}{more})"


def _tell_source(split: str, report: SourceReport, config: Config, tell: Say) -> None:
    head = f"{split}: {report.path}"
    length = config.data.max_length
    tell(f"{head}: {report.read} rows read, {report.examples} examples to learn from")
    if report.bad:
        tell(f"{head}: skipped {len(report.bad)} bad rows{_names([b.where for b in report.bad])}")
    if report.masked:
        tell(
            f"{head}: refused {len(report.masked)} rows without a token that bears loss within "
            f"{length} tokens{_names(report.masked)}"
        )
    if report.dropped:
        tell(f"{head}: dropped {len(report.dropped)} rows over max_length {length}")
    if report.cut:
        tell(f"{head}: cut {report.cut} rows to max_length {length}")
    if report.split:
        without = f", {report.windows_without_loss} of them without loss and left out"
        tell(
            f"{head}: split {report.split} rows into windows of max_length {length}"
            f"{without if report.windows_without_loss else ''}"
        )
    for remark, count in report.remarks:
        tell(f"{head}: in {count} rows {remark}")


def _tell_rows(split: str, rows: Rows, packing: bool, tell: Say) -> None:
    how = "packed" if packing else "padded"
    loss = "" if rows.labels.size else f", {rows.loss_tokens} bear loss"
    tell(
        f"{split}: {rows.examples} examples {how} into {len(rows)} rows of {rows.width}, "
        f"{rows.fill:.1%} filled; {rows.real_tokens} tokens{loss}"
    )


def _weights(sources: Sequence[formats.Source], tell: Say) -> tuple[float, ...]:
    """Shares of the mix; none where no source has a weight, and then every row comes once."""
    given = [source.weight for source in sources]
    if all(weight is None for weight in given):
        return ()
    weights = [1.0 if weight is None else float(weight) for weight in given]
    shares = [f"{s.path} {w / sum(weights):.1%}" for s, w in zip(sources, weights, strict=True)]
    tell(f"mix of rows by weight: {', '.join(shares)}")
    return tuple(weights)


def _key(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _prompt_key(example: Example) -> bytes | None:
    """What stands before the first answer; None where everything is learnt, or a class."""
    first = 0 if example.label else int(example.mask.argmax())
    return _key(example.tokens[:first]) if first > 1 else None


def _compare(train: Iterable[Example], held: Iterable[Example]) -> tuple[int, int, int]:
    """Repeats within train; examples of held that are in train; further ones by prompt only."""
    seen: set[bytes] = set()
    prompts: set[bytes | None] = set()
    duplicates = 0
    for example in train:
        key = _key(example.tokens)
        duplicates += key in seen
        seen.add(key)
        prompts.add(_prompt_key(example))
    prompts.discard(None)
    rows = by_prompt = 0
    for example in held:
        known = _key(example.tokens) in seen
        rows += known
        by_prompt += not known and _prompt_key(example) in prompts
    return duplicates, rows, by_prompt


def _split(
    sources: list[list[Example]], fraction: float, tell: Say
) -> tuple[list[list[Example]], list[list[Example]]]:
    """Holds out a fraction of each source, the same for every train.seed, so that scores compare.

    Equal examples stay on one side.
    """
    train, held = [], []
    for number, source in enumerate(sources):
        groups: dict[bytes, list[int]] = {}
        for index, example in enumerate(source):
            groups.setdefault(_key(example.tokens), []).append(index)
        order = np.random.default_rng([0, number]).permutation(len(groups))
        wanted, chosen = round(fraction * len(source)), set()
        members = list(groups.values())
        for group in order[: len(groups) - 1]:
            if len(chosen) >= max(wanted, 1):
                break
            chosen.update(members[group])
        train.append([example for n, example in enumerate(source) if n not in chosen])
        held.append([example for n, example in enumerate(source) if n in chosen])
    count, total = sum(map(len, held)), sum(map(len, sources))
    if not count:
        raise DataError(
            f"data.eval_fraction={fraction} of {total} examples leaves none to hold out",
            fix="rows that differ, data.eval_fraction=0, or a file in data.eval",
        )
    tell(f"eval: held out {count} of {total} training examples (data.eval_fraction)")
    return train, held
