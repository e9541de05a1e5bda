"""Rows with a class: which classes there are, and one text or two to tokens.

The tokenizer's own special tokens stand around the texts ([CLS] a [SEP] b [SEP], <s> a </s></s> b
</s>, or what a causal model's tokenizer adds by habit), and one token stands for the whole row.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxtune.data.chat import Encoded
from jaxtune.data.conversations import Unusable, text_of
from jaxtune.data.packing import Example
from jaxtune.data.readers import BadRow, Row
from jaxtune.errors import DataError

SHOWN = 20  # classes named in one line
_NUMBER = re.compile(r"-?\d+")

TOUCH = (
    "nothing stands between the two texts of a pair: this tokenizer adds no mark; "
    'columns={"text": "{premise}\\n{hypothesis}", ...} can make them one text'
)


@dataclass(frozen=True)
class Form:
    """How a model wants its rows, and the classes it knows already."""

    pooled: Literal["first", "last"] = "last"  # the token that stands for the row
    types: bool = False  # the model is told which text of a pair a token is of
    labels: tuple[str, ...] = ()  # of a trained classifier, in order; see `families.base_labels`


LAST_TOKEN = Form()


def encode(
    texts: Sequence[str],
    rows: Sequence[Row],
    tokenizer: Any,
    form: Form,
    max_length: int,
    too_long: str,
) -> Encoded:
    """Tokens and class of each row; a row that cannot be used becomes a `BadRow`.

    Args:
      texts: names of the one or two columns of text; the class is in `label`.
      max_length: with `too_long="cut"`, rows are cut to it so that the special tokens stay, of a
        pair the longer text first (transformers' longest_first); else they are left as they are.

    Raises:
      DataError: max_length leaves no room beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length <= special:
        raise DataError(
            f"data.max_length {max_length} leaves no room beside {special} special tokens",
            fix="a larger data.max_length",
        )
    read: list[tuple[list[str], str] | BadRow] = []
    for row in rows:
        try:
            columns = [text_of(row.values, name) for name in texts]
            read.append((columns, spell(row.values.get("label"))))
        except Unusable as error:
            read.append(BadRow(row.where, str(error)))
    good = [item for item in read if not isinstance(item, BadRow)]
    encoded = iter(_tokenize(tokenizer, [columns for columns, _ in good], form))
    results: list[Example | BadRow] = []
    remarks: Counter[str] = Counter()
    if len(texts) == 2 and special == tokenizer.num_special_tokens_to_add(pair=False):
        remarks[TOUCH] = len(good)
    for row, item in zip(rows, read, strict=True):
        if isinstance(item, BadRow):
            results.append(item)
            continue
        columns, label = item
        ids, types = next(encoded)
        cut = len(ids) > max_length and too_long == "cut"
        if cut:
            options = {"truncation": "longest_first", "max_length": max_length}
            ((ids, types),) = _tokenize(tokenizer, [columns], form, **options)
        if not ids:
            results.append(BadRow(row.where, "the text is empty"))
            continue
        tokens, mask = np.array(ids, np.int32), np.zeros(len(ids), bool)
        mask[0 if form.pooled == "first" else -1] = True
        types = np.array(types, np.int32) if form.types else None
        results.append(Example(tokens, mask, row.where, label, types, cut))
    return Encoded(results, remarks)


def _tokenize(tokenizer: Any, rows: list[list[str]], form: Form, **options: Any):
    """-> (ids, types) of each row of one or two texts."""
    if not rows:
        return []
    first, *second = (list(column) for column in zip(*rows, strict=True))
    encoding = tokenizer(
        first,
        *second,
        return_attention_mask=False,
        return_token_type_ids=form.types,
        verbose=False,
        **options,
    )
    ids = encoding["input_ids"]
    return list(zip(ids, encoding["token_type_ids"] if form.types else ids, strict=True))


def spell(value: Any) -> str:
    """A class as text: names without space around them, whole numbers by their digits.

    Raises:
      Unusable: a list, a fraction, or nothing.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        raise Unusable("label is a list; a row has one class")
    if isinstance(value, float) and not value.is_integer():
        raise Unusable(f"label is {value}; classes are names or whole numbers")
    if isinstance(value, (bool, int, float, np.integer)):
        return str(int(value))
    if not isinstance(value, str):
        raise Unusable(f"label is a {type(value).__name__}, not a name or a number")
    name = text_of({"label": value}, "label").strip()
    if not name:
        raise Unusable("label is empty")
    return name


def assign(
    setting: Sequence[str],
    form: Form,
    splits: Mapping[str, Sequence[Example]],
    tell: Callable[[str], None],
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """-> (the classes in order, the number of each example's class in every split).

    The classes are `data.labels`, else the base's own where the rows know any of them, else those
    of the split "train".

    Raises:
      DataError: fewer than two classes, or a label that is none of them.
    """
    names, origin = _choose(setting, form, splits["train"])
    found = {split: _numbers(examples, names, origin) for split, examples in splits.items()}
    for split, numbers in found.items():
        if numbers:
            amounts = np.bincount(numbers, minlength=len(names))
            order = np.argsort(-amounts, kind="stable")
            shown = ", ".join(f"{names[n]} {amounts[n]}" for n in order[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            tell(f"{split}: {len(names)} classes of {origin}: {shown}{more}")
    return names, found


def _choose(
    setting: Sequence[str], form: Form, examples: Sequence[Example]
) -> tuple[tuple[str, ...], str]:
    """The classes in order, and where they come from; numbers by value, names by the alphabet."""
    found = {example.label for example in examples}
    known = form.labels if _shared(found, form.labels) else ()
    digits = all(_NUMBER.fullmatch(label) for label in found)
    candidates = (
        (tuple(label.strip() for label in setting), "data.labels"),
        (known, "the base's config.json"),
        (tuple(sorted(found, key=int if digits else str)), "the training rows"),
    )
    labels, origin = next(item for item in candidates if item[0])
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"the classes of {origin} are {', '.join(map(repr, labels))}",
            fix="two or more, each once",
        )
    return labels, origin


def _shared(found: set[str], known: Sequence[str]) -> bool:
    """Whether rows speak of the classes of a base at all, by name or number."""
    numbers = {str(place) for place in range(len(known))}
    return bool(found & {*known, *numbers})


def _numbers(examples: Sequence[Example], labels: Sequence[str], origin: str) -> list[int]:
    """The number of each example's class: its place among the names.

    A label that is a number is a place itself, unless some of the names are numbers.
    """
    places = {label: place for place, label in enumerate(labels)}
    if not any(_NUMBER.fullmatch(label) for label in labels):
        places |= {str(place): place for place in range(len(labels))}
    for example in examples:
        if example.label not in places:
            raise DataError(
                f"{example.where}: label {example.label!r} is none of the {len(labels)} classes of "
                f"{origin}: {', '.join(labels[:SHOWN])}{', ...' if len(labels) > SHOWN else ''}",
                fix="mend the row, or name all classes in order with data.labels",
            )
    return [places[example.label] for example in examples]
