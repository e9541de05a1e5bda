"""Tokenised examples into rows of fixed width: several documents a row, kept apart by segments.

One document of five tokens whose last three are the answer, in a row of seven slots:

    tokens      1  7  8  9  2  .  .
    mask        -  -  #  #  #             bears loss when predicted
    targets     7  8  9  2  .  .  .       the next token of the same document
    weights     .  1  1  1  .  .  .       1 where the target bears loss
    positions   0  1  2  3  4  .  .
    segments    1  1  1  1  1  .  .       2, 3, ... for the next documents, 0 for padding

Of a document with a class, `mask` marks the one token that stands for it; there the target is the
number of the class and the weight is 1.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

WIDTH_MULTIPLE = 64  # rows are as wide as the longest one needs, in steps that suit the hardware


class Batch(NamedTuple):
    """What crosses from data to step: numpy, `[B, T]` each."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32
    weights: np.ndarray  # float32
    positions: np.ndarray  # int32
    segments: np.ndarray  # int32
    types: np.ndarray | None = None  # int32, which text of a pair; None where no model asks for it


@dataclass(frozen=True)
class Example:
    """One tokenised document; `mask[i]` says that `tokens[i]` bears loss when predicted.

    With a `label`, `mask` marks the token that stands for the document.
    """

    tokens: np.ndarray  # int32 [N]
    mask: np.ndarray  # bool [N]
    where: str  # file:line, for messages
    label: str = ""  # name of its class, when documents are classified
    types: np.ndarray | None = None  # int32 [N], which text of a pair each token is of
    cut: bool = False  # what is missing was too long

    @property
    def loss_tokens(self) -> int:
        """The first token is never predicted, so it never counts; a class always does."""
        return 1 if self.label else int(self.mask[1:].sum())


@dataclass(frozen=True)
class Rows:
    """Examples end to end, and which of them stand in each row. Indexing makes batches.

    Row `r` holds the examples `members[row_starts[r]:row_starts[r + 1]]`, in that order; example
    `e` holds the tokens `starts[e]:starts[e + 1]`. `parts` are the row ranges of the sources, to be
    mixed by `weights` (empty: every row once an epoch).
    """

    tokens: np.ndarray  # int32 [all tokens]
    mask: np.ndarray  # bool [all tokens]
    starts: np.ndarray  # int64 [examples + 1]
    members: np.ndarray  # int64 [examples]
    row_starts: np.ndarray  # int64 [rows + 1]
    width: int  # slots a row
    parts: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()
    # int32 [examples], numbers of their classes; empty where the next token is the target
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    # int32 [all tokens], which text of a pair; empty where no model asks for it
    types: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def examples(self) -> int:
        return len(self.starts) - 1

    @property
    def real_tokens(self) -> int:
        return len(self.tokens)

    @property
    def loss_tokens(self) -> int:
        """Targets that bear loss in one pass over all rows."""
        if self.labels.size:
            return self.examples
        first = np.zeros(len(self.mask), bool)
        first[self.starts[:-1]] = True
        return int((self.mask & ~first).sum())

    @property
    def fill(self) -> float:
        """Real tokens over slots."""
        return len(self.tokens) / (len(self) * self.width)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of one example."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[span], self.mask[span]

    def batch(self, rows: Sequence[int] | np.ndarray, size: int | None = None) -> Batch:
        """The rows of these numbers; up to `size` rows, the rest padding without weight."""
        shape = (len(rows) if size is None else size, self.width)
        batch = Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32) if self.types.size else None,
        )
        for b, row in enumerate(rows):
            at = 0
            members = self.members[self.row_starts[row] : self.row_starts[row + 1]]
            for segment, index in enumerate(members, start=1):
                tokens, mask = self.example(index)
                end = at + len(tokens)
                batch.tokens[b, at:end] = tokens
                if self.labels.size:
                    batch.targets[b, at:end] = mask * self.labels[index]
                    batch.weights[b, at:end] = mask
                else:
                    batch.targets[b, at : end - 1] = tokens[1:]
                    batch.weights[b, at : end - 1] = mask[1:]
                if batch.types is not None:
                    span = slice(self.starts[index], self.starts[index + 1])
                    batch.types[b, at:end] = self.types[span]
                batch.positions[b, at:end] = np.arange(len(tokens))
                batch.segments[b, at:end] = segment
                at = end
        return batch


def fit_length(
    example: Example, max_length: int, too_long: Literal["drop", "cut", "split"]
) -> list[Example]:
    """The example within `max_length` tokens: dropped, cut to its start, or split into windows.

    Windows overlap by one token, which the earlier predicts and the later starts from, so no target
    is lost and none is trained twice.
    """
    if len(example.tokens) <= max_length:
        return [example]
    if too_long == "drop":
        return []
    if too_long == "cut":
        return [Example(example.tokens[:max_length], example.mask[:max_length], example.where)]
    stride = max(max_length - 1, 1)
    return [
        Example(
            example.tokens[at : at + max_length], example.mask[at : at + max_length], example.where
        )
        for at in range(0, len(example.tokens) - 1, stride)
    ]


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices per bin, deterministic.

    The longest go first, each into the fullest row it still fits. `free` has bit `c` set while some
    bin has exactly `c` slots left, so the best bin is the lowest set bit at or above the length.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for index in order.tolist():
        length = int(lengths[index])
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                free &= ~(1 << room)
            bins[number].append(index)
        else:
            room, number = capacity, len(bins)
            bins.append([index])
        by_room[room - length].append(number)
        free |= 1 << (room - length)
    return [sorted(members) for members in bins]


def pack(
    sources: Sequence[Sequence[Example]],
    max_length: int,
    packing: bool,
    weights: Sequence[float] = (),
    labels: Sequence[int] = (),
) -> Rows:
    """Rows of the examples, none over `max_length` tokens, packed within each source.

    Without `packing` every example has a row of its own. All rows share one width, so a training
    step compiles once. `labels` are the numbers of the classes of all examples, when they have any.
    """
    examples = [example for source in sources for example in source]
    lengths = np.array([len(example.tokens) for example in examples], np.int64)
    bins: list[list[int]] = []
    parts = []
    at = 0
    for source in sources:
        before, end = len(bins), at + len(source)
        if packing:
            found = best_fit(lengths[at:end], max_length)
            bins += [[at + index for index in members] for members in found]
        else:
            bins += [[index] for index in range(at, end)]
        parts.append((before, len(bins)))
        at = end
    longest = max((int(lengths[members].sum()) for members in bins), default=0)
    return Rows(
        tokens=_join([example.tokens for example in examples], np.int32),
        mask=_join([example.mask for example in examples], np.bool_),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        members=np.array([index for members in bins for index in members], np.int64),
        row_starts=np.cumsum([0, *map(len, bins)]).astype(np.int64),
        width=min(max_length, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE),
        parts=tuple(parts),
        weights=tuple(weights),
        labels=np.array(labels, np.int32),
        types=_join([example.types for example in examples if example.types is not None], np.int32),
    )


def digest(rows: Rows) -> str:
    """sha256 of all that decides the batches: tokens, targets, what stands together, the mix."""
    state = hashlib.sha256(repr((rows.width, rows.parts, rows.weights)).encode())
    arrays = (rows.tokens, rows.mask, rows.starts, rows.members, rows.row_starts)
    for array in (*arrays, rows.labels, rows.types):
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def _join(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
