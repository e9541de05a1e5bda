"""Hugging Face checkpoint -> sharded device arrays, one parameter at a time."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import tree
from jaxtune.errors import ModelError
from jaxtune.hf import files
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.families import Family, family

_MOST = 8  # names shown per side of an error
_READ_BYTES = 16 << 20  # held beside the parameter that is being filled


def load_model(path: str, dtype: str = "float32") -> Decoder:
    """A Hugging Face folder or hub id as a flax module, on the default device.

    `model(tokens_BT, positions=None, segments=None)` gives float32 logits [B, T, V].

    Raises:
      ModelError: a family we do not have, or a checkpoint that does not fit its config.
    """
    folder = files.resolve(path)
    rows, config = read_config(folder)
    kind = jnp.dtype(dtype)
    graphdef, shapes = tree.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=kind, param_dtype=kind))
    )
    return tree.merge(graphdef, load_params(folder, rows, config, shapes))


def read_config(folder: Path) -> tuple[Family, DecoderConfig]:
    """The family of a folder's config.json and its sizes."""
    hf = files.read_json(folder / "config.json")
    rows = family(hf)
    return rows, rows.config(hf)


def load_params(
    folder: Path, rows: Family, config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """{path: array} for every path of `shapes`, in its dtype and sharding.

    Each array is filled layer by layer in its target dtype, so the host holds one parameter's
    buffer beside what is already on the devices.

    Raises:
      ModelError: tensors that are missing, surplus or of another shape, both sides listed.
    """
    stored = _untie(files.tensors(folder), rows, config)
    sources = {p: [rows.tensor(single) for single in tree.layer_paths(p)] for p in shapes}
    _check(folder, stored, sources, shapes, rows)
    return {path: _place([stored[name] for name in sources[path]], path, shapes[path])
            for path in shapes}  # fmt: skip


def _place(stored: list[files.Tensor], path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    stacked, transposed = tree.layer_range(path) is not None, path.endswith(".kernel")

    def fill(index) -> np.ndarray:  # one slice a dimension
        layers, inner = (stored[index[0]], index[1:]) if stacked else (stored, index)
        sizes = [len(range(*i.indices(n))) for i, n in zip(index, shape.shape, strict=True)]
        out = np.empty(sizes, shape.dtype)
        for slot, tensor in enumerate(layers):
            _copy(tensor, out[slot] if stacked else out, inner, transposed)
        return out

    if shape.sharding is None:
        return jnp.asarray(fill((slice(None),) * len(shape.shape)))
    return jax.make_array_from_callback(shape.shape, shape.sharding, fill)


def _copy(
    tensor: files.Tensor, out: np.ndarray, inner: tuple[slice, ...], transposed: bool
) -> None:
    """Fills `out` with the slice `inner` of a tensor, cast, reading a few of its rows at a time."""
    rows, rest = (inner[-1], inner[:-1]) if transposed else (inner[0], inner[1:])
    first, last, _ = rows.indices(tensor.shape[0])
    step = max(1, _READ_BYTES // tensor.row_bytes)
    for start in range(first, last, step):
        values = tensor.read(start, min(start + step, last))
        at = slice(start - first, start - first + len(values))
        if transposed:
            np.copyto(out[:, at], values.T[rest], casting="unsafe")
        else:
            np.copyto(out[at], values[(slice(None), *rest)], casting="unsafe")


def _untie(
    stored: dict[str, files.Tensor], rows: Family, config: DecoderConfig
) -> dict[str, files.Tensor]:
    """Tied checkpoints may store the one matrix under either name, or under both."""
    if not config.tie_embeddings:
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
    sources: Mapping[str, list[str]],
    shapes: Mapping[str, Any],
    rows: Family,
) -> None:
    wanted: dict[str, Any] = {}  # shape of each tensor
    for path, names in sources.items():
        shape = shapes[path].shape[1:] if tree.layer_range(path) is not None else shapes[path].shape
        wanted |= dict.fromkeys(names, shape[::-1] if path.endswith(".kernel") else shape)
    missing = sorted(set(wanted) - set(stored))
    surplus = sorted(
        name
        for name in set(stored) - set(wanted)
        if not any(re.search(pattern, name) for pattern in rows.ignored)
    )
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in stored and stored[name].shape != shape
    ]
    if missing or surplus or wrong:
        sides = {"missing": missing, "surplus": surplus, "wrong shape": wrong}
        raise ModelError(
            f"{folder} does not fit its config.json: "
            + "; ".join(f"{len(v)} {k} ({_sample(v)})" for k, v in sides.items() if v),
            fix="the config.json that belongs to these weights",
        )


def _sample(names: list[str]) -> str:
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
