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
    folder: Path, rows: Family, config: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """{path: array} for every path of `shapes`, in its dtype and sharding.

    The host holds one parameter's buffer beside what is already on the devices, and reads only the
    slices its own devices want.

    Raises:
      ModelError: tensors that are missing, surplus or of another shape, both sides listed.
    """
    stored = files.tensors(folder)
    rows = rows.on_disk(stored)
    stored = _untie(stored, rows, config)
    slots = {path: rows.slots(path, config) for path in shapes}
    _check(folder, stored, slots, shapes, rows, config)
    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            path: _place(
                [(index, stored[name]) for index, name in slots[path]],
                shapes[path],
                rows.turned(path),
                pool,
            )
            for path in shapes
        }


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
    others = _other_heads(rows, config)
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
        if not config.num_labels and set(surplus) & set(_heads(rows)):
            fix = "task='classify': it is a classifier's checkpoint"
        raise ModelError(
            f"{folder} does not fit its config.json: "
            + "; ".join(f"{len(v)} {k} ({_sample(v)})" for k, v in sides.items() if v),
            fix=fix,
        )


def _unread(name: str, rows: Family) -> bool:
    return any(re.search(pattern, name) for pattern in (*rows.ignored, *rows.untouched))


def _heads(rows: Family) -> list[str]:
    return [name for path, name in rows.keys.items() if path.startswith(rows.heads)]


def _other_heads(rows: Family, config: Any) -> set[str]:
    """Heads in a checkpoint that a classifier made from it does without, or starts anew."""
    others = ("lm_head.", *rows.heads) if config.num_labels else ()
    return {name for path, name in rows.keys.items() if path.startswith(others)}


def _sample(names: list[str]) -> str:
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
