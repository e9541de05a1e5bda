"""A tuned model as a Hugging Face folder: the base checkpoint, streamed, with its changes.

Tensors keep the base's names, order, dtype and files. An adapter is merged in float32, in Hugging
Face's orientation, and the result is cast once:

    LoRA  W + scale * B A
    DoRA  m * V / |V| of each output's row, with V = W + scale * B A   (arXiv 2402.09353)
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import ModelError, NumericsError
from jaxtune.hf import files
from jaxtune.hf.tokenizer import tokenizer_files
from jaxtune.hf.write import oriented, save_streamed, staged
from jaxtune.models import families
from jaxtune.models.families import Family

# Copied byte for byte, beside the tokenizer's files; licences ask to travel with the weights.
_COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
_SHARD = 5_000_000_000


class Export(NamedTuple):
    """What an export wrote."""

    files: tuple[str, ...]
    tensors: int
    changed: int  # tensors that differ from the base by training
    bytes: int  # of all tensors


@dataclass(frozen=True)
class Merged:
    """One tensor of a tuned model; `read` computes it when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: str  # that it lies in among the base's; the last one for what the base has not
    changed: bool  # by training
    recast: bool  # to another dtype than the base's
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_merged(
    out: Path,
    base: Path,
    rows: Family,
    config: Any,
    trained: Mapping[str, Any],
    *,
    scale: float = 1.0,
    dtype: np.dtype | None = None,
    chat_template: str = "",
    labels: tuple[str, ...] = (),
    pad_token: int | None = None,
    max_shard_bytes: int | None = None,
) -> Export:
    """Writes the base with its trained leaves merged in; verified, then moved to `out` at once.

    Memory: about one tensor in float32, and one layer of a trained leaf.

    Args:
      trained: see `merged`.
      scale: of adapters without a `.lora.scale` leaf, alpha / r or alpha / sqrt(r).
      dtype: of floating tensors; None keeps the base's.
      chat_template: jinja text that takes the place of the base's own.
      labels: names of a classifier's classes, in order; empty keeps what config.json has.
      pad_token: id for a classifier's config.json that has none; it finds the pooled token by it.
      max_shard_bytes: None keeps the base's files, or 5 GB where the dtype changes.

    Raises:
      ConfigError: `out` exists and is not an empty folder.
      ModelError: a trained leaf that does not belong to the base.
      NumericsError: a value that is not finite, after the cast too.
      StorageError: the disk is full, or gives back other bytes than were written.
    """
    tensors = merged(base, rows, config, trained, scale=scale, dtype=dtype)
    most = max_shard_bytes
    if most is None and any(tensor.recast for tensor in tensors.values()):
        most = _SHARD
    shards = _same_files(tensors) if most is None else _shards(tensors, most)
    size = sum(tensor.bytes for tensor in tensors.values())
    with staged(out) as stage:
        for file, names in shards.items():
            sizes = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
            save_streamed(stage / file, sizes, lambda name: tensors[name].read())
        if len(shards) > 1 or (most is None and (base / files.INDEX).is_file()):
            count = sum(math.prod(tensor.shape) for tensor in tensors.values())
            metadata = {"total_parameters": count, "total_size": size}
            where = {name: file for file, names in shards.items() for name in names}
            weight_map = {name: where[name] for name in tensors}
            _write_json(stage / files.INDEX, {"metadata": metadata, "weight_map": weight_map})
        _copy_rest(base, stage, chat_template)
        edits = _config_edits(base, rows, config, dtype, labels, pad_token)
        if edits:
            _write_json(stage / "config.json", files.read_json(base / "config.json") | edits)
        found = {name: tensor.shape for name, tensor in files.tensors(stage).items()}
        assert found == {name: tensor.shape for name, tensor in tensors.items()}
        written = sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file())
    changed = sum(tensor.changed for tensor in tensors.values())
    return Export(tuple(written), len(tensors), changed, size)


def merged(
    base: Path,
    rows: Family,
    config: Any,
    trained: Mapping[str, Any],
    *,
    scale: float = 1.0,
    dtype: np.dtype | None = None,
) -> dict[str, Merged]:
    """{name: tensor} of a checkpoint with its trained leaves merged in, nothing read yet.

    A classifier made from a language model loses its head and gains the classifier's.

    Args:
      trained: {path: array} of every adapter's leaves (A and B, also of one that a rule freezes;
        scale and magnitude where it has them) and of every leaf trained in full, as `tree.split`
        names them.

    Raises:
      ModelError: a trained leaf that does not belong to the base.
    """
    stored = files.tensors(base)
    memory, rows = rows, rows.on_disk(stored)
    kept, titles = _as_classifier(stored, memory, rows, config)
    changes, inputs_first = _changes(kept, rows, config, trained)
    heads = rows.named(rows.heads)
    floating = next(t.dtype for t in kept.values() if _is_floating(t.dtype))
    last = list(kept.values())[-1].file.name
    result = {}
    for name in (*kept, *(name for name in changes if name not in kept)):
        tensor, change = kept.get(name), changes.get(name, {})
        if name in heads and "value" in change:
            tensor = None  # trained in full, and perhaps for another number of classes
        shape = change["value"]().shape if tensor is None else tensor.shape
        old = floating if tensor is None else tensor.dtype
        kind = dtype if dtype is not None and _is_floating(old) else old
        file = last if tensor is None else tensor.file.name
        read = partial(_merge, name, tensor, shape, change, scale, kind, name in inputs_first)
        title = titles.get(name, name)
        result[title] = Merged(kind, shape, file, bool(change), kind != old, read)
    return result


Change = dict[str, Callable[[], np.ndarray]]  # "value", "A", "B", ... -> read when its turn comes


def _as_classifier(
    stored: dict[str, files.Tensor], memory: Family, rows: Family, config: Any
) -> tuple[dict[str, files.Tensor], dict[str, str]]:
    """-> (tensors a classifier keeps, {name: its new name}).

    What becomes a classifier loses its other heads, one of which may hold the embedding. Its names
    are transformers' own, which takes a checkpoint for one of the bare body otherwise.
    """
    heads = rows.named(rows.heads)
    if not config.num_labels or heads & set(stored):
        return stored, {}
    head, embedding = (rows.keys.get(k) for k in ("lm_head.embedding", "embed_tokens.embedding"))
    kept = {
        name: tensor
        for name, tensor in stored.items()
        if name != head and not any(re.search(pattern, name) for pattern in rows.ignored)
    }
    if head in stored and embedding not in stored:
        kept = {str(embedding): stored[str(head)], **kept}
    counts = (config.num_layers, config.experts.count if config.experts else 1)
    titles = {
        rows.keys[path].format(i=layer, e=expert): name.format(i=layer, e=expert)
        for path, name in memory.keys.items()
        for layer in range(counts[0])
        for expert in range(counts[1])
    }
    return kept, titles


def _changes(
    stored: Mapping[str, files.Tensor],
    rows: Family,
    config: Any,
    trained: Mapping[str, Any],
) -> tuple[dict[str, Change], set[str]]:
    """({tensor: what training changed about it}, tensors stored inputs first).

    Also of a classifier's head that the base has not.
    """
    changes: dict[str, Change] = {}
    inputs_first: set[str] = set()
    for path, leaf in trained.items():
        module, _, part = path.partition(".lora.")
        whole = f"{module}.kernel" if part else path
        new = config.num_labels and whole.startswith(rows.heads) and not part
        for index, name in rows.slots(whole, config):
            names = [n for n in _aliases(name, rows, config) if new or n in stored]
            if not names:
                raise ModelError(
                    f"the base has no {name}, which was trained", fix="the base of this run"
                )
            for name in names:
                read = partial(oriented, leaf, index, rows.turned(path))
                changes.setdefault(name, {})[part or "value"] = read
            inputs_first |= set() if rows.turned(whole) else set(names)
    return changes, inputs_first


def _aliases(name: str, rows: Family, config: Any) -> tuple[str, ...]:
    """Tied checkpoints may store their one matrix under either name, or under both."""
    tied = (rows.keys["embed_tokens.embedding"], rows.keys.get("lm_head.embedding", ""))
    return tied if getattr(config, "tie_embeddings", False) and name in tied else (name,)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused when written
def _merge(
    name: str,
    tensor: files.Tensor | None,
    shape: tuple[int, ...],
    change: Change,
    scale: float,
    kind: np.dtype,
    inputs_first: bool,
) -> np.ndarray:
    """A tensor with its change, in its new dtype."""
    values = change["value"]() if "value" in change or tensor is None else tensor.read()
    if "A" in change:
        own = change["scale"]() if "scale" in change else np.float32(scale)
        delta = own * (change["B"]() @ change["A"]())
        delta = delta.T if inputs_first else delta
        # A delta of another shape must not broadcast: it is refused below.
        values = values.astype(np.float32) + delta if delta.shape == values.shape else delta
    if values.shape != shape:
        raise ModelError(
            f"{name} was trained as {list(values.shape)}, the base has {list(shape)}",
            fix="the base of this run",
        )
    if "magnitude" in change:
        inputs = 0 if inputs_first else 1
        norm = np.linalg.norm(values, axis=inputs, keepdims=True)
        values = values * (np.expand_dims(change["magnitude"](), inputs) / norm)
    return _cast(name, values, kind)


def _cast(name: str, values: np.ndarray, kind: np.dtype) -> np.ndarray:
    if kind == np.float16 and values.dtype != kind:
        count = int(np.count_nonzero(np.abs(values) >= 65520))  # what rounds to infinity
        if count:
            raise NumericsError(
                f"{name} holds {count} values beyond float16's 65,504, so nothing is exported",
                fix="bfloat16",
            )
    return values.astype(kind, copy=False)


def _is_floating(dtype: np.dtype) -> bool:
    return not np.issubdtype(dtype, np.integer) and dtype != np.bool_


def _same_files(tensors: Mapping[str, Merged]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(tensor.file, []).append(name)
    return shards


def _shards(tensors: Mapping[str, Merged], most: int) -> dict[str, list[str]]:
    """Tensors in the base's order, as many a file as fit; one that is larger has its own."""
    shards: list[list[str]] = [[]]
    room = most
    for name, tensor in tensors.items():
        if shards[-1] and tensor.bytes > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= tensor.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def _config_edits(
    base: Path,
    rows: Family,
    config: Any,
    dtype: np.dtype | None,
    labels: tuple[str, ...],
    pad_token: int | None,
) -> dict[str, Any]:
    """Fields of config.json that must change; none where the base's own file stays."""
    hf = files.read_json(base / "config.json")
    edits = {} if dtype is None else _dtype_edits(hf, dtype.name)
    if config.num_labels:
        architecture = f"{rows.label}ForSequenceClassification"
        same = families.labels(hf) == config.num_labels
        if labels or hf.get("architectures") != [architecture] or not same:
            old = dict(enumerate((hf.get("id2label") or {}).values())) if same else {}
            names = labels or [old.get(i, f"LABEL_{i}") for i in range(config.num_labels)]
            edits["architectures"] = [architecture]
            edits["id2label"] = {str(i): name for i, name in enumerate(names)}
            edits["label2id"] = {name: i for i, name in enumerate(names)}
        if hf.get("pad_token_id") is None and pad_token is not None:
            edits["pad_token_id"] = pad_token
        inner = hf.get("text_config") or {}  # a wrapper's, where null is not the same as missing
        if pad_token is not None and "pad_token_id" in inner and inner["pad_token_id"] is None:
            edits["text_config"] = inner | {"pad_token_id": pad_token}
    return {name: value for name, value in edits.items() if hf.get(name) != value}


def _dtype_edits(hf: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The dtype under the keys that the base has, in a wrapper's parts too."""
    keys = ("dtype", "torch_dtype")
    edits: dict[str, Any] = {key: dtype for key in keys if key in hf}
    for part, fields in hf.items():
        if part.endswith("_config") and isinstance(fields, dict):
            inner = {key: dtype for key in keys if key in fields}
            edits |= {part: fields | inner} if inner else {}
    return edits or {"torch_dtype": dtype}


def _copy_rest(base: Path, stage: Path, chat_template: str) -> None:
    for file in _rest(base):
        target = stage / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if chat_template:
        (stage / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _rest(base: Path) -> list[Path]:
    found = {file for pattern in _COPIED for file in base.glob(pattern) if file.is_file()}
    return sorted({*found, *tokenizer_files(str(base))})


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
