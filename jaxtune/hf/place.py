"""One parameter's buffer, filled from its tensors by threads and put on the devices.

A thread handles a chunk of a tensor: while one reads, another casts, turns or quantises what it has
read. On a CPU the buffer becomes the array itself.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxtune.hf import files
from jaxtune.kernels import quantize

THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 4 << 20  # bytes of a tensor that a thread handles at a time
_ALIGNED = 64  # what jax asks of memory that it takes over without a copy
_FAST = frozenset(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))


def place(
    slots: list[tuple[tuple[int, ...], files.Tensor]],
    shape: jax.ShapeDtypeStruct,
    turned: bool,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """A parameter in its dtype and sharding.

    Args:
      slots: index into its leading axes, and the tensor there.
      turned: tensors lie in files with their axes swapped.
    """
    leading = len(slots[0][0])

    def fill(index) -> np.ndarray:  # one slice a dimension
        ranges = [range(*i.indices(n)) for i, n in zip(index, shape.shape, strict=True)]
        out = _empty([len(r) for r in ranges], shape.dtype)
        inner = index[leading:][::-1] if turned else index[leading:]
        work = []
        for at, tensor in slots:
            if all(i in r for i, r in zip(at, ranges, strict=False)):
                mine = out[tuple(i - r.start for i, r in zip(at, ranges, strict=False))]
                work += _chunks(tensor, mine.T if turned else mine, inner)
        for _ in pool.map(lambda chunk: chunk(), work):
            pass  # which raises what a thread raised
        return out

    if shape.sharding is None:
        return jax.device_put(fill((slice(None),) * len(shape.shape)))
    return jax.make_array_from_callback(shape.shape, shape.sharding, fill)


def place_quantized(
    slots: list[tuple[tuple[int, ...], files.Tensor]],
    layout: quantize.Layout,
    shapes: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    turned: bool,
    pool: ThreadPoolExecutor,
) -> tuple[jax.Array, jax.Array]:
    """(values, scale) of a kernel, as `place`: one reading fills buffers for all local devices."""
    leading = len(slots[0][0])
    boxes = [_box(shape) for shape in shapes]
    assert boxes[0][-1] == boxes[1][-1], "values and scales are cut at the same outputs"
    outs = [_empty([len(r) for r in box], s.dtype) for box, s in zip(boxes, shapes, strict=True)]
    work = []
    for at, tensor in slots:
        if all(i in r for i, r in zip(at, boxes[0], strict=False)):
            mine = tuple(i - r.start for i, r in zip(at, boxes[0], strict=False))
            parts = [out[mine] for out in outs]
            work += _quantized_chunks(tensor, layout, parts, boxes[0][leading:], turned)
    for _ in pool.map(lambda chunk: chunk(), work):
        pass  # which raises what a thread raised

    def part(number: int, index) -> np.ndarray:
        box, shape = boxes[number], shapes[number].shape
        ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
        inside = (
            slice(r.start - b.start, r.stop - b.start) for r, b in zip(ranges, box, strict=True)
        )
        return outs[number][tuple(inside)]

    values, scale = (
        jax.make_array_from_callback(shape.shape, shape.sharding, partial(part, number))
        for number, shape in enumerate(shapes)
    )
    return values, scale


def _box(shape: jax.ShapeDtypeStruct) -> list[range]:
    """The smallest box, a range a dimension, with all that devices of this process want."""
    assert shape.sharding is not None
    wanted = list(shape.sharding.addressable_devices_indices_map(shape.shape).values())
    found = []
    for dim, size in enumerate(shape.shape):
        ends = [index[dim].indices(size) for index in wanted if index is not None]
        found.append(range(min(first for first, _, _ in ends), max(last for _, last, _ in ends)))
    return found


def _quantized_chunks(
    tensor: files.Tensor,
    layout: quantize.Layout,
    outs: list[np.ndarray],
    box: list[range],
    turned: bool,
) -> Iterator[partial[None]]:
    """Work that fills `outs`, values and scale of one matrix, with what lies in `box` of it."""
    groups, outputs = box[0], box[-1]
    if layout.packed:
        last = min(groups.stop * quantize.GROUP, layout.shape[-2])
        inputs, kept = slice(groups.start * quantize.GROUP, last), slice(0, None)
    else:  # a scale is of all inputs
        inputs, kept = slice(0, layout.shape[-2]), slice(groups.start, groups.stop)
    width = inputs.stop - inputs.start
    # A file with inputs first is read whole: its outputs are not together.
    many = _CHUNK // (width * tensor.dtype.itemsize) if turned else len(outputs)
    count = max(1, min(len(outputs), many))
    for start in range(0, len(outputs), count):
        start = min(start, len(outputs) - count)  # chunks of one shape, as in `_chunks`
        columns = slice(outputs.start + start, outputs.start + start + count)
        parts = [out[..., start : start + count] for out in outs]
        rows, across = (columns, inputs) if turned else (inputs, columns)
        yield partial(_quantize, tensor, layout.scheme, parts, (rows, across, kept), turned)


def _quantize(
    tensor: files.Tensor,
    scheme: str,
    outs: list[np.ndarray],
    where: tuple[slice, slice, slice],
    turned: bool,
) -> None:
    """Quantises rows and columns of a tensor, and keeps some of the inputs' values."""
    rows, columns, kept = where
    values = _empty((rows.stop - rows.start, columns.stop - columns.start), tensor.dtype)
    tensor.read_into(values, rows.start, columns)
    # Where there is no CPU device one of the others does it, a chunk at a time.
    device = _host() or jax.local_devices()[0]
    found = _quantizer(scheme, turned)(jax.device_put(values, device))
    for out, new, some in zip(outs, found, (kept, slice(0, None)), strict=True):
        np.copyto(out.view(f"u{out.itemsize}"), np.asarray(new)[some].view(f"u{out.itemsize}"))


@cache
def _quantizer(scheme: str, turned: bool) -> Any:
    return jax.jit(lambda stored: quantize.quantize(stored.T if turned else stored, scheme))


def _chunks(
    tensor: files.Tensor, out: np.ndarray, inner: tuple[slice, ...]
) -> Iterator[partial[None]]:
    """Work that fills `out`, oriented as the file, with the slice `inner` of a tensor."""
    along, *across = inner
    columns = across[0] if across else slice(None)
    first, last, _ = along.indices(tensor.shape[0])
    count = max(1, min(last - first, _CHUNK * len(out) // max(1, out.size * tensor.dtype.itemsize)))
    for start in range(first, last, count):
        # All chunks are of one shape, so that one program serves them: the last reaches back.
        start = min(start, last - count)
        part = out[start - first : start - first + count]
        yield partial(_copy, tensor, part, start, columns)


def _copy(tensor: files.Tensor, out: np.ndarray, first: int, columns: slice) -> None:
    """Fills `out`, cast and perhaps a transposed view, with rows of a tensor."""
    direct = out.flags.c_contiguous
    if direct and out.dtype == tensor.dtype:
        tensor.read_into(out, first, columns)
        return
    values = _empty(out.shape, tensor.dtype)
    tensor.read_into(values, first, columns)
    across = None if direct else _turn(values, out.dtype)
    if across is None:
        np.copyto(out, values, casting="unsafe")
    else:
        # As integers: numpy copies ml_dtypes' types one by one.
        np.copyto(out.T.view(f"u{out.itemsize}"), across.view(f"u{out.itemsize}"))


def _turn(values: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The transpose, cast, by XLA: ten times as fast as numpy. None where it does not pay."""
    small = values.nbytes < _CHUNK // 4
    if small or not {values.dtype, dtype} <= _FAST or _host() is None:
        return None
    if values.dtype == dtype:
        return np.asarray(jax.device_put(values.T, _host()))
    return np.asarray(_transpose(dtype)(jax.device_put(values, _host())))


@cache
def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None


@cache
def _transpose(dtype: np.dtype) -> Any:
    return jax.jit(lambda values_OI: values_OI.T.astype(dtype))


def _empty(shape: Any, dtype: Any) -> np.ndarray:
    """Like np.empty, at an address that jax can take over."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)
