"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, as peft 0.21 has them.

    layers.3.mlp.up_proj.lora.A   base_model.model.model.layers.3.mlp.up_proj.lora_A.weight   [R, I]
    layers.3.mlp.up_proj.lora.B   base_model.model.model.layers.3.mlp.up_proj.lora_B.weight   [O, R]
    layers.3.mlp.up_proj.lora.magnitude     [...].mlp.up_proj.lora_magnitude_vector           [O]
    lm_head.embedding             base_model.model.lm_head.weight            (a module to save)
    score.kernel                  base_model.model.score.weight              (a classifier's head)

peft only warns about names it does not find, so they are checked against the base before writing.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import tree
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf import adapter_config, files
from jaxtune.hf.adapter_config import CONFIG
from jaxtune.hf.export import Export
from jaxtune.hf.write import oriented, save_verified, staged
from jaxtune.models.adapter import spec
from jaxtune.models.blocks import LayerConfig
from jaxtune.models.families import Family

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_MOST = 8  # names shown per side of an error


def write_adapter(
    out: Path,
    base: Path,
    rows: Family,
    config: LayerConfig,
    trained: Mapping[str, Any],
    *,
    lora: LoraConfig,
    base_name: str,
) -> Export:
    """Writes the adapters, and modules trained in full, for peft to load on the base.

    Args:
      trained: {path: array} of every adapter's leaves (also of one that a rule freezes; `scale`
        may be left out) and of every leaf trained in full, as `tree.split` names them.
      base_name: the base's hub id or folder, as peft shall find it.

    Raises:
      ConfigError: there is no adapter, something peft cannot express was trained, or `out` exists
        and is not an empty folder.
      ModelError: a trained leaf that does not belong to the base.
      NumericsError: a value that is not finite.
      StorageError: the disk is full, or gives back other bytes than were written.
    """
    _check_expressible(trained, lora, config)
    leaves = {path: leaf for path, leaf in trained.items() if not path.endswith(".lora.scale")}
    stored = files.tensors(base)
    names = _names(rows, leaves)
    known = _base_names(rows, config, stored, names)
    targets = {
        name.removeprefix(_PREFIX).removesuffix(f".{_PARTS['A']}"): leaves[path].shape[-1]
        for name, (path, _) in names.items()
        if name.endswith(_PARTS["A"])
    }
    saved = _saved_modules(names, targets, known, config, rows)
    tensors = {
        name: oriented(leaves[path], index, rows.turned(path))
        for name, (path, index) in names.items()
    }
    ends = _tied(rows, config)
    tied = ends is not None and ends[0] in tensors
    if ends and tied:  # peft wraps both ends of a tied model, and wants the matrix under both names
        tensors[ends[1]] = tensors[ends[0]]
        saved |= {_module(ends[1])}
    modules = {_module(name) for name in (*known, *stored)}
    settings = adapter_config.written(
        lora, base_name, targets, saved, modules, classifier=config.num_labels > 0, tied=tied
    )
    with staged(out) as stage:
        save_verified(stage / WEIGHTS, tensors)
        text = json.dumps(dict(sorted(settings.items())), indent=2) + "\n"
        (stage / CONFIG).write_text(text, encoding="utf-8")
        (stage / "README.md").write_text(_card(base_name, config.num_labels), encoding="utf-8")
    size = sum(values.nbytes for values in tensors.values())
    return Export(("README.md", CONFIG, WEIGHTS), len(tensors), len(tensors), size)


def refused_by_servers(lora: LoraConfig, trained: Iterable[str]) -> str | None:
    """Why common inference servers do not take this adapter, or None if they do.

    What vLLM's PEFTHelper refuses; and patterns, which all but its latest versions pass over in
    silence, so that the scale of some modules comes out wrong.

    Args:
      trained: paths of every leaf an adapter folder would hold.
    """
    paths = list(trained)
    full = sorted({path.split(".")[-2] for path in paths if ".lora." not in path})
    if lora.use_dora:
        return "it is DoRA"
    if any(".experts." in path for path in paths):
        return "it has adapters of experts"
    if lora.rank_pattern or lora.alpha_pattern:
        return "ranks or alphas differ between modules"
    return f"modules are trained in full ({', '.join(full)})" if full else None


def open_adapter(folder: Path, rows: Family, config: LayerConfig) -> dict[str, np.ndarray]:
    """{path: float32 array} of a PEFT adapter folder, whatever run or library wrote it.

    Every layer is a stack of its own, since each may have a rank of its own:
    `layers.3-3.self_attn.q_proj.lora.A` [1, I, R], `.lora.B` [1, R, O], `.lora.scale` [1], with
    DoRA `.lora.magnitude` [1, O]; modules saved in full as `score.kernel` [I, O].

    Raises:
      ModelError: no adapter, pickled weights, a damaged file, tensors of another base, or settings
        that our adapters cannot express.
    """
    settings, lora = adapter_config.read(folder)
    stored = _untied(folder, files.tensors(folder, single=WEIGHTS), settings, rows, config)
    paths = {rows.tensor(single): single for single in _singles(rows, config)}
    found: dict[str, np.ndarray] = {}
    strange = []
    for name, tensor in stored.items():
        path = _path(name, paths)
        if path is None:
            strange.append(name)
            continue
        values = tensor.read().astype(np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"{folder}: {name} is not finite", fix="another adapter")
        values = values.T if rows.turned(path) else values
        found[_stack_of_one(path)] = _leading(path, values)
    if strange:
        raise ModelError(
            f"{folder} holds what is no adapter of a projection, and no module, of this base: "
            f"{_few(sorted(strange))}",
            fix="an adapter of this base, with adapters on its projections only",
        )
    for path in [path for path in found if path.endswith(".lora.A")]:
        module, name = path.removesuffix(".lora.A"), _kernel(rows, path)
        own, rank = spec(lora, name), found[path].shape[-1]
        parts = ("B", "magnitude") if lora.use_dora else ("B",)
        lost = [part for part in parts if f"{module}.lora.{part}" not in found]
        if lost or rank != own.rank:
            wrong = f"{name} without {lost[0]}" if lost else f"{name} with rank {rank}"
            raise ModelError(
                f"{folder} has {wrong}, and its {CONFIG} says rank {own.rank}, use_dora "
                f"{lora.use_dora}",
                fix="fetch it again",
            )
        found[f"{module}.lora.scale"] = _leading(module, np.asarray(own.scale, np.float32))
    return found


def read_adapter(
    folder: Path,
    rows: Family,
    config: LayerConfig,
    lora: LoraConfig,
    shapes: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """{path: float32 array} for every path of `shapes`, from a PEFT adapter folder.

    Args:
      lora: of the run, whose ranks and scales must be the adapter's.
      shapes: {path: anything with a shape} of the run's adapters and modules to save.

    Raises:
      ConfigError: another rank, scale or set of modules than the run's; both are named.
      ModelError: as `open_adapter`, or an adapter of another base's shapes.
    """
    found = open_adapter(folder, rows, config)
    singles = {path: [_stack_of_one(s) for s in tree.layer_paths(path)] for path in shapes}
    theirs = {path for path in found if not path.endswith(".lora.scale")}
    ours = {single for path in shapes for single in singles[path]}
    modules = {_kernel(rows, path) for path in theirs if path.endswith(".lora.A")}
    adapter_config.check_same(folder, adapter_config.read(folder)[1], lora, modules)
    if ours != theirs:
        missing, surplus = (
            sorted(_name(rows, _one(path)) for path in side)
            for side in (ours - theirs, theirs - ours)
        )
        raise ConfigError(
            f"{folder} fits other modules than this run: only the run has {_few(missing)}; "
            f"only the adapter has {_few(surplus)}",
            fix="lora.target_modules, lora.layers_to_transform and lora.modules_to_save as it has",
        )
    result = {}
    for path, shape in shapes.items():
        parts = [found.pop(single) for single in singles[path]]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if whole.shape != tuple(shape.shape):
            raise ModelError(
                f"{folder} has {_name(rows, _one(singles[path][0]))} as {list(whole.shape)}, "
                f"the run as {list(shape.shape)}",
                fix="an adapter of this base",
            )
        result[path] = whole
    return result


def _name(rows: Family, single: str) -> str:
    module, _, part = single.partition(".lora.")
    if part:
        return f"{_PREFIX}{rows.module(f'{module}.kernel')}.{_PARTS[part]}"
    return _PREFIX + rows.tensor(single)


def _path(name: str, paths: Mapping[str, str]) -> str | None:
    """The path of one layer's leaf, `layers.3.mlp.up_proj.lora.A`; None where it is none of ours.

    Args:
      paths: {Hugging Face tensor: path}.
    """
    if not name.startswith(_PREFIX):
        return None
    name = name.removeprefix(_PREFIX)
    name = name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    for part, suffix in _PARTS.items():
        if name.endswith(f".{suffix}"):
            kernel = paths.get(f"{name.removesuffix(suffix)}weight", "")
            module = kernel.removesuffix(".kernel")
            return f"{module}.lora.{part}" if module != kernel else None
    return paths.get(name)


def _names(rows: Family, leaves: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor of the adapter file: (path of the leaf, where in it)}."""
    return {
        _name(rows, single): (path, (slot,) if tree.layer_range(path) else ())
        for path in leaves
        for slot, single in enumerate(tree.layer_paths(path))
    }


def _stack_of_one(single: str) -> str:
    """`layers.3.mlp.up_proj` -> `layers.3-3.mlp.up_proj`."""
    return re.sub(r"^layers\.(\d+)\.", r"layers.\1-\1.", single)


def _one(path: str) -> str:
    return tree.layer_paths(path)[0]


def _kernel(rows: Family, adapter: str) -> str:
    """Hugging Face's module of `layers.3-3.mlp.up_proj.lora.A`."""
    return rows.module(_one(adapter).replace(".lora.A", ".kernel"))


def _leading(path: str, values: np.ndarray) -> np.ndarray:
    return values[None] if path.startswith("layers.") else values


def _singles(rows: Family, config: LayerConfig) -> list[str]:
    """Paths of all leaves there may be, one a layer; experts are no modules to PEFT."""
    return [
        path.replace("{i}", str(layer))
        for path in rows.keys
        if ".experts." not in path
        for layer in (range(config.num_layers) if "{i}" in path else (0,))
    ]


def _base_names(
    rows: Family, config: LayerConfig, stored: Iterable[str], trained: Collection[str]
) -> set[str]:
    """Names in memory of the base's tensors, and of what was trained of a head it has not."""
    held = set(stored)
    disk = rows.on_disk(held)
    known = set()
    for single in _singles(rows, config):
        name = rows.tensor(single)
        head = config.num_labels > 0 and single.startswith(rows.heads)
        if disk.tensor(single) in held or (head and _PREFIX + name in trained):
            known.add(name)
    ends = _tied(rows, config)
    return known | {name.removeprefix(_PREFIX) for name in ends or ()}


def _tied(rows: Family, config: LayerConfig) -> tuple[str, str] | None:
    """Both names of a language model's one matrix, where input and output share it."""
    if config.num_labels or not getattr(config, "tie_embeddings", False):
        return None
    return _name(rows, "embed_tokens.embedding"), _name(rows, "lm_head.embedding")


def _untied(
    folder: Path,
    stored: Mapping[str, files.Tensor],
    settings: Mapping[str, Any],
    rows: Family,
    config: LayerConfig,
) -> dict[str, files.Tensor]:
    """The file's tensors, of a tied matrix only the first."""
    ends = _tied(rows, config)
    if ends is None or not set(ends) & set(stored):
        return dict(stored)
    embedding, head = ends
    if head in stored:
        same = embedding in stored and (
            settings.get("ensure_weight_tying")
            or stored[embedding].read().tobytes() == stored[head].read().tobytes()
        )
    else:  # peft unties what is to be saved by itself; a table that was resized stays tied
        saved = settings.get("modules_to_save") or ()
        knows = {name.rsplit(".", 1)[-1] for name in saved} & {"embed_tokens", "lm_head"}
        wrapped = any(_module(embedding).endswith(name) for name in saved)
        same = not wrapped or (settings.get("ensure_weight_tying") and knows)
    if not same:
        raise ModelError(
            f"{folder} trains one end of this base's tied embedding apart from the other",
            fix="an adapter trained with ensure_weight_tying, or without modules_to_save",
        )
    return {name: tensor for name, tensor in stored.items() if name != head}


def _module(name: str) -> str:
    return name.removeprefix(_PREFIX).rsplit(".", 1)[0]


def _check_expressible(trained: Iterable[str], lora: LoraConfig, config: LayerConfig) -> None:
    if lora.r == 0:
        raise ConfigError(
            "--format=peft holds adapters, and a full fine-tune (lora.r=0) has none",
            fix="--format=hf",
        )
    for path in trained:
        # In a model of experts, peft takes the names of any feed-forward block for theirs.
        if config.experts and ".mlp." in path:
            raise ConfigError(
                f"peft's versions do not agree on how {path} is to be written", fix="--format=hf"
            )


def _saved_modules(
    names: Iterable[str],
    targets: Iterable[str],
    known: set[str],
    config: LayerConfig,
    rows: Family,
) -> set[str]:
    """Hugging Face modules trained in full; peft replaces whole modules, without an adapter."""
    full = {name.removeprefix(_PREFIX) for name in names if ".lora_" not in name}
    lost = sorted((full | {f"{module}.weight" for module in targets}) - known)
    if lost:
        raise ModelError(
            f"the base has no {_few(lost)}, which was trained", fix="the base of this run"
        )
    modules = {_module(name) for name in full}
    partly = {_module(name) for name in known - full} & modules
    partly -= {_module(name) for name in _tied(rows, config) or ()}
    cannot = sorted(partly | modules & set(targets))
    if cannot:
        raise ConfigError(
            f"peft cannot express part of a module trained in full beside an adapter or frozen "
            f"weights: {_few(cannot)}",
            fix="--format=hf",
        )
    return modules


def _card(base_name: str, classes: int) -> str:
    """The model card peft writes, as a stub; a folder's path would be no use to others."""
    hub = not Path(base_name).expanduser().exists()
    base = [f"base_model: {json.dumps(base_name)}"] if hub else []
    tags = [*([f"base_model:adapter:{base_name}"] if hub else []), "lora", "transformers"]
    front = [
        *base,
        "library_name: peft",
        f"pipeline_tag: text-{'classification' if classes else 'generation'}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    lines = ["---", *front, "---", "", "# LoRA adapter"]
    if hub:
        lines += ["", f"Fine-tuned from {base_name} with jaxtune."]
    if classes:
        lines += ["", f"A classifier: load the base with num_labels={classes}."]
    return "\n".join(lines) + "\n"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return (", ".join(names[:_MOST]) or "nothing") + more
