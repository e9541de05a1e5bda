"""Hugging Face checkpoint -> sharded device arrays, one parameter at a time."""

import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import tree
from jaxtune.console import say
from jaxtune.errors import ModelError
from jaxtune.hf import files, place
from jaxtune.kernels import quantize
from jaxtune.models import families
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.encoder import Encoder
from jaxtune.models.families import Family, Slot

_MOST = 8  # names shown per side of an error


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
    with ThreadPoolExecutor(place.THREADS) as pool:
        for path in slots:
            places = [(index, stored[name]) for index, name in slots[path]]
            turned = rows.turned(path)
            if path in quantized:
                both = (shapes[path], shapes[f"{path}_scale"])
                params[path], params[f"{path}_scale"] = place.place_quantized(
                    places, quantized[path], both, turned, pool
                )
            else:
                params[path] = place.place(places, shapes[path], turned, pool)
    return params


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
