"""Two checkpoints side by side, tensor by tensor, under the names of transformers' modules."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np

from jaxtune import tree
from jaxtune.hf import load
from jaxtune.models.families import Family

_BLOCK = 1 << 20  # values compared at a time


class Readable(Protocol):
    """A tensor of a file, or one that is computed when it is read."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Held:
    """An array in memory as a tensor to read."""

    values: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> np.ndarray:
        return self.values


class Difference(NamedTuple):
    """What is not alike about one tensor."""

    name: str
    what: str  # "only in A", "only in B", "shape" or "values"
    a: str  # dtype and shape on either side
    b: str
    count: int  # values that differ at all
    most: float  # largest absolute difference
    rounding: bool  # no more than rounding to the coarser dtype explains


def compare_tensors(a: Mapping[str, Readable], b: Mapping[str, Readable]) -> list[Difference]:
    """Every tensor that is not the same on both sides, the worst first.

    Two values are alike within rounding when they differ by no more than one step of the coarser
    dtype, and what float32 arithmetic of the tensor's largest value loses.
    """
    found = []
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b or name not in a:
            side = "only in A" if name in a else "only in B"
            found.append(
                Difference(name, side, _kind(a.get(name)), _kind(b.get(name)), 0, 0, False)
            )
        elif a[name].shape != b[name].shape:
            sides = _kind(a[name]), _kind(b[name])
            found.append(Difference(name, "shape", *sides, 0, 0, False))
        else:
            found += _values(name, a[name], b[name])
    return sorted(found, key=lambda d: (d.rounding, d.what == "values", -d.most))


def by_canonical_name(
    tensors: Mapping[str, Readable], rows: Family, config: Any
) -> dict[str, Readable]:
    """The tensors under transformers' names, whatever beginning the files gave them.

    Without buffers that nobody reads, and without the second copy of a tied table.
    """
    disk = rows.on_disk(tensors)
    names = {
        stored: name
        for path in load.leaves_of(config)
        for (_, stored), (_, name) in zip(
            disk.slots(path, config), rows.slots(path, config), strict=True
        )
    }
    head = disk.keys.get("lm_head.embedding", "")
    embedding = disk.keys["embed_tokens.embedding"]
    found = dict(tensors)
    if getattr(config, "tie_embeddings", False) and head in found:
        table = found.pop(head)
        found.setdefault(embedding, table)
        names.setdefault(embedding, rows.keys["embed_tokens.embedding"])
    return {
        names.get(name, name): tensor
        for name, tensor in found.items()
        if not any(re.search(pattern, name) for pattern in rows.ignored)
    }


def single_layers(leaves: Mapping[str, Any]) -> dict[str, Held]:
    """{path of one layer's leaf: array} of stacked leaves."""
    return {
        single: Held(np.asarray(jax.device_get(leaf if index is None else leaf[index]), np.float32))
        for path, leaf in leaves.items()
        for index, single in (
            enumerate(tree.layer_paths(path)) if tree.layer_range(path) else [(None, path)]
        )
    }


def _values(name: str, a: Readable, b: Readable) -> list[Difference]:
    left, right = a.read().reshape(-1), b.read().reshape(-1)
    if a.dtype == b.dtype and np.array_equal(_bits(left), _bits(right)):
        return []
    step = max(_step(a.dtype), _step(b.dtype))
    count, most, alike = 0, 0.0, True
    blocks = range(0, left.size, _BLOCK)
    largest = max((float(np.abs(_wide(left[i : i + _BLOCK])).max()) for i in blocks), default=0.0)
    floor = 8 * _step(np.dtype(np.float32)) * largest if step else 0.0
    for start in blocks:
        x, y = _wide(left[start : start + _BLOCK]), _wide(right[start : start + _BLOCK])
        apart = distance(x, y)
        count += int(np.count_nonzero(apart))
        most = max(most, float(apart.max()))
        alike &= bool(np.all(apart <= step * np.maximum(np.abs(x), np.abs(y)) + floor))
    return [Difference(name, "values", _kind(a), _kind(b), count, most, alike)] if count else []


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Absolute differences; none between two NaN, or two infinities, and no end beside one NaN."""
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
    return np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, apart)


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


def _step(dtype: np.dtype) -> float:
    """Relative distance of neighbours in a floating type; 0 of whole numbers."""
    whole = np.issubdtype(dtype, np.integer) or dtype == np.bool_
    return 0.0 if whole else float(ml_dtypes.finfo(dtype).eps)


def _kind(tensor: Readable | None) -> str:
    return "" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
