"""Hugging Face checkpoint -> sharded device arrays, one parameter at a time.

A parameter's buffer is filled in its target dtype by a few threads, a chunk of a tensor each: while
one reads, another casts and turns what it has read. On a CPU the buffer becomes the array itself.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxtune import tree
from jaxtune.console import say
from jaxtune.errors import ModelError
from jaxtune.hf import files
from jaxtune.kernels import quantize
from jaxtune.models import families
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.encoder import Encoder
from jaxtune.models.families import Family, Slot

_MOST = 8  # names shown per side of an error
_CHUNK = 4 << 20  # bytes of a tensor that a thread handles at a time
_THREADS = min(8, os.cpu_count() or 1)
_ALIGNED = 64  # what jax asks of memory that it takes over without a copy
_FAST = frozenset(np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))


def load_model(path: str, dtype: str = "float32", ignore: Collection[str] = ()) -> Any:
    """A Hugging Face folder or hub id as a flax module, on the default device.

    `model(tokens_BT, positions=None, segments=None)` gives float32 logits [B, T, V], of a
    classifier those of its classes. A classifier's head that the checkpoint lacks is fresh, with a
    line that says so.

    Args:
      ignore: fields of config.json to disregard although they are not known.

    Raises:
      ModelError: a family we do not have, or a checkpoint that does not fit its config.
    """
    folder = files.resolve(path)
    rows, config = read_config(folder, ignore=ignore)
    kind = jnp.dtype(dtype)

    def build() -> Any:
        return module_of(config)(config, rngs=nnx.Rngs(0), dtype=kind, param_dtype=kind)

    graphdef, shapes = tree.split(nnx.eval_shape(build))
    fresh = missing_heads(folder, rows, config, shapes)
    stored = {path: shape for path, shape in shapes.items() if path not in fresh}
    params = load_params(folder, rows, config, stored)
    if fresh:
        say(f"{folder} has no {', '.join(sorted(fresh))}: started fresh")
        params |= jax.jit(lambda: {k: v for k, v in tree.split(build())[1].items() if k in fresh})()
    return tree.merge(graphdef, params)


def module_of(config: Any) -> Any:
    """The flax module that a config describes."""
    return Decoder if isinstance(config, DecoderConfig) else Encoder


def leaves_of(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape} of a model's leaves, without adapters."""
    return tree.split(nnx.eval_shape(lambda: module_of(config)(config, rngs=nnx.Rngs(0))))[1]


def read_config(
    folder: Path, *, num_labels: int | None = None, ignore: Collection[str] = ()
) -> tuple[Family, Any]:
    """The family of a folder's config.json and the model it describes, as `families.read`."""
    hf = files.read_json(folder / "config.json")
    return families.read(hf, num_labels=num_labels, ignore=ignore)


def read_config_leniently(
    folder: Path, *, num_labels: int | None = None
) -> tuple[Family, Any, dict[str, Any]]:
    """As `read_config`, past fields nobody knows: they are the third result, {name: value}."""
    hf = files.read_json(folder / "config.json")
    strange = families.strange(hf)
    return *families.read(hf, num_labels=num_labels, ignore=strange), strange


def missing_heads(
    folder: Path, rows: Family, config: Any, shapes: Mapping[str, Any]
) -> frozenset[str]:
    """Paths of the classifier's parts that the checkpoint has nothing of, to be started fresh."""
    if not config.num_labels:
        return frozenset()
    stored = files.tensors(folder)
    rows = rows.on_disk(stored)
    missing: set[str] = set()
    for prefix in rows.heads:
        paths = {path for path in shapes if path.startswith(prefix)}
        names = {name for path in paths for _, name in rows.slots(path, config)}
        if names.isdisjoint(stored):
            missing |= paths
    return frozenset(missing)


def check_fits(folder: Path, rows: Family, config: Any) -> None:
    """Raises ModelError, as `load_params`, where a checkpoint does not fit its config.json."""
    shapes = leaves_of(config)
    new = missing_heads(folder, rows, config, shapes)
    stored = files.tensors(folder)
    rows = rows.on_disk(stored)
    slots = {path: rows.slots(path, config) for path in shapes if path not in new}
    _check(folder, _untie(stored, rows, config), slots, shapes, rows, config)


def load_params(
    folder: Path,
    rows: Family,
    config: Any,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    quantized: Mapping[str, quantize.Layout] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """{path: array} for every path of `shapes`, in its dtype and sharding.

    The host holds one parameter's buffer beside what is already on the devices, and reads only the
    slices its own devices want.

    Args:
      quantized: kernels that are quantised as they are read, each with its scale in `shapes`.

    Raises:
      ModelError: tensors that are missing, surplus or of another shape, both sides listed.
    """
    stored = files.tensors(folder)
    rows = rows.on_disk(stored)
    stored = _untie(stored, rows, config)
    scales = {f"{path}_scale" for path in quantized}
    whole = {path: quantized.get(path, shape) for path, shape in shapes.items()}
    slots = {path: rows.slots(path, config) for path in shapes if path not in scales}
    _check(folder, stored, slots, whole, rows, config)
    params: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for path in slots:
            places = [(index, stored[name]) for index, name in slots[path]]
            turned = rows.turned(path)
            if path in quantized:
                both = (shapes[path], shapes[f"{path}_scale"])
                params[path], params[f"{path}_scale"] = _place_quantized(
                    places, quantized[path], both, turned, pool
                )
            else:
                params[path] = _place(places, shapes[path], turned, pool)
    return params


def _place(
    slots: list[tuple[tuple[int, ...], files.Tensor]],
    shape: jax.ShapeDtypeStruct,
    turned: bool,
    pool: ThreadPoolExecutor,
) -> jax.Array:
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


def _place_quantized(
    slots: list[tuple[tuple[int, ...], files.Tensor]],
    layout: quantize.Layout,
    shapes: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    turned: bool,
    pool: ThreadPoolExecutor,
) -> tuple[jax.Array, jax.Array]:
    """(values, scale) of a kernel: both come from one reading, in buffers for all local devices."""
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


def _untie(stored: dict[str, files.Tensor], rows: Family, config: Any) -> dict[str, files.Tensor]:
    """Tied checkpoints may store the one matrix under either name, or under both."""
    if not getattr(config, "tie_embeddings", False):  # encoders have no such switch
        return stored
    embedding, head = rows.keys["embed_tokens.embedding"], rows.keys["lm_head.embedding"]
    if embedding in stored and head in stored:
        if not np.array_equal(stored[embedding].read(), stored[head].read()):
            raise ModelError(
                f"config.json ties the embeddings but {embedding} and {head} differ",
                fix='"tie_word_embeddings": false in config.json',
            )
    elif head in stored:
        stored = {embedding: stored[head], **stored}
    return {name: tensor for name, tensor in stored.items() if name != head}


def _check(
    folder: Path,
    stored: Mapping[str, files.Tensor],
    slots: Mapping[str, list[Slot]],
    shapes: Mapping[str, Any],
    rows: Family,
    config: Any,
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}  # shape of each tensor
    for path, places in slots.items():
        shape = tuple(shapes[path].shape[len(places[0][0]) :])
        shape = shape[::-1] if rows.turned(path) else shape
        wanted |= dict.fromkeys((name for _, name in places), shape)
    # Heads that a classifier made from a checkpoint does without, or starts anew.
    others = rows.named(("lm_head.", *rows.heads) if config.num_labels else ())
    surplus = sorted(n for n in set(stored) - set(wanted) if not _unread(n, rows) | (n in others))
    missing = sorted(set(wanted) - set(stored))
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in stored and stored[name].shape != shape
    ]
    if missing or surplus or wrong:
        sides = {"missing": missing, "surplus": surplus, "wrong shape": wrong}
        fix = "the config.json that belongs to these weights"
        if not config.num_labels and set(surplus) & rows.named(rows.heads):
            fix = "task='classify': it is a classifier's checkpoint"
        raise ModelError(
            f"{folder} does not fit its config.json: "
            + "; ".join(f"{len(v)} {k} ({_sample(v)})" for k, v in sides.items() if v),
            fix=fix,
        )


def _unread(name: str, rows: Family) -> bool:
    return any(re.search(pattern, name) for pattern in (*rows.ignored, *rows.untouched))


def _sample(names: list[str]) -> str:
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
