"""A tuned model as a Hugging Face folder: the base checkpoint, streamed, with its changes.

Tensors keep the base's names, order and dtype. An adapter is merged in float32 (W + scale * B A, in
Hugging Face's orientation) and the result is cast once.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import tree
from jaxtune.errors import ModelError
from jaxtune.hf import files
from jaxtune.hf.tokenizer import tokenizer_files
from jaxtune.hf.write import oriented, save_verified, staged
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import Family

# Copied byte for byte, beside the tokenizer's files; licences ask to travel with the weights.
_COPIED = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*")


class Export(NamedTuple):
    """What an export wrote."""

    files: tuple[str, ...]
    tensors: int
    changed: int  # tensors that differ from the base by training
    bytes: int  # of all tensors


def write_merged(
    out: Path,
    base: Path,
    rows: Family,
    config: DecoderConfig,
    trained: Mapping[str, Any],
    *,
    scale: float,
    dtype: np.dtype | None = None,
    chat_template: str = "",
    max_shard_bytes: int = 5_000_000_000,
) -> Export:
    """Writes the base with its trained leaves merged in; verified, then moved to `out` at once.

    Memory: about one shard, and one layer of a trained leaf.

    Args:
      trained: {path: array} of every adapter's A and B (also of one that a rule freezes) and of
        every leaf trained in full, as `tree.split` names them.
      scale: of the adapters, alpha / r or alpha / sqrt(r).
      dtype: of floating tensors; None keeps the base's.
      chat_template: jinja text that takes the place of the base's own.

    Raises:
      ConfigError: `out` exists and is not an empty folder.
      ModelError: a trained leaf that does not belong to the base.
      NumericsError: a value that is not finite, after the cast too.
      StorageError: the disk is full, or gives back other bytes than were written.
    """
    stored = files.tensors(base)
    changes = _changes(stored, rows, config, trained)
    kinds = {name: _kind(tensor, dtype) for name, tensor in stored.items()}
    shards = _shards({name: _bytes(t, kinds[name]) for name, t in stored.items()}, max_shard_bytes)
    with staged(out) as stage:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            single = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else single
            merged = {}
            for name in names:
                # What overflows is not finite, and is refused as such before it is written.
                with np.errstate(over="ignore", invalid="ignore"):
                    values = _merged(name, stored[name], changes.get(name, {}), scale)
                    merged[name] = values.astype(kinds[name], copy=False)
            save_verified(stage / file, merged)
            weight_map |= dict.fromkeys(names, file)
        size = sum(_bytes(tensor, kinds[name]) for name, tensor in stored.items())
        if len(shards) > 1:
            count = sum(math.prod(tensor.shape) for tensor in stored.values())
            metadata = {"total_parameters": count, "total_size": size}
            _write_json(stage / files.INDEX, {"metadata": metadata, "weight_map": weight_map})
        _copy_rest(base, stage, dtype, chat_template)
        found = {name: tensor.shape for name, tensor in files.tensors(stage).items()}
        assert found == {name: tensor.shape for name, tensor in stored.items()}
        written = sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file())
    return Export(tuple(written), len(stored), len(changes), size)


Change = dict[str, Callable[[], np.ndarray]]  # "value", "A" and "B" -> read it when its turn comes


def _changes(
    stored: Mapping[str, files.Tensor],
    rows: Family,
    config: DecoderConfig,
    trained: Mapping[str, Any],
) -> dict[str, Change]:
    """{stored tensor: what training changed about it}."""
    changes: dict[str, Change] = {}
    for path, leaf in trained.items():
        for slot, single in enumerate(tree.layer_paths(path)):
            module, _, part = single.partition(".lora.")
            name = rows.tensor(f"{module}.kernel" if part else single)
            names = [n for n in _aliases(name, rows, config) if n in stored]
            if not names:
                raise ModelError(
                    f"the base has no {name}, which was trained", fix="the base of this run"
                )
            for name in names:
                changes.setdefault(name, {})[part or "value"] = partial(oriented, path, leaf, slot)
    return changes


def _aliases(name: str, rows: Family, config: DecoderConfig) -> tuple[str, ...]:
    """Tied checkpoints may store their one matrix under either name, or under both."""
    tied = (rows.keys["embed_tokens.embedding"], rows.keys["lm_head.embedding"])
    return tied if config.tie_embeddings and name in tied else (name,)


def _merged(name: str, tensor: files.Tensor, change: Change, scale: float) -> np.ndarray:
    values = change["value"]() if "value" in change else tensor.read()
    if "A" in change or "B" in change:
        delta = np.float32(scale) * (change["B"]() @ change["A"]())
        # A delta of another shape must not broadcast: it is refused below.
        values = values.astype(np.float32) + delta if delta.shape == values.shape else delta
    if values.shape != tensor.shape:
        raise ModelError(
            f"{name} was trained as {list(values.shape)}, the base has {list(tensor.shape)}",
            fix="the base of this run",
        )
    return values


def _kind(tensor: files.Tensor, dtype: np.dtype | None) -> np.dtype:
    whole = np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == np.bool_
    return tensor.dtype if dtype is None or whole else dtype


def _bytes(tensor: files.Tensor, kind: np.dtype) -> int:
    return math.prod(tensor.shape) * kind.itemsize


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Tensors in the base's order, as many a shard as fit; one that is larger has its own."""
    shards: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _copy_rest(base: Path, stage: Path, dtype: np.dtype | None, chat_template: str) -> None:
    for file in _rest(base):
        target = stage / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if dtype is not None:
        values = files.read_json(base / "config.json")
        styles = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]
        _write_json(stage / "config.json", values | dict.fromkeys(styles, dtype.name))
    if chat_template:
        (stage / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _rest(base: Path) -> list[Path]:
    found = {file for pattern in _COPIED for file in base.glob(pattern) if file.is_file()}
    return sorted({*found, *tokenizer_files(str(base))})


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
