"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, as peft 0.21 has them.

    layers.3.mlp.up_proj.lora.A   base_model.model.model.layers.3.mlp.up_proj.lora_A.weight   [R, I]
    layers.3.mlp.up_proj.lora.B   base_model.model.model.layers.3.mlp.up_proj.lora_B.weight   [O, R]
    lm_head.embedding             base_model.model.lm_head.weight            (a module to save)

peft only warns about names it does not find, so they are checked against the base before writing.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import tree
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf import files
from jaxtune.hf.export import Export
from jaxtune.hf.write import oriented, save_verified, staged
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import Family

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_MOST = 8  # names shown per side of an error

# Settings that change what the weights mean, and the values under which they are plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    # Others (pissa, olora, corda, loftq) also change the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def write_adapter(
    out: Path,
    base: Path,
    rows: Family,
    config: DecoderConfig,
    trained: Mapping[str, Any],
    *,
    lora: LoraConfig,
    base_name: str,
) -> Export:
    """Writes the adapters, and modules trained in full, for peft to load on the base.

    Args:
      trained: {path: array} of every adapter's A and B (also of one that a rule freezes) and of
        every leaf trained in full, as `tree.split` names them.
      base_name: the base's hub id or folder, as peft shall find it.

    Raises:
      ConfigError: there is no adapter, something peft cannot express was trained, or `out` exists
        and is not an empty folder.
      ModelError: a trained leaf that does not belong to the base.
      NumericsError: a value that is not finite.
      StorageError: the disk is full, or gives back other bytes than were written.
    """
    if lora.r == 0:
        raise ConfigError(
            "--format=peft holds adapters, and a full fine-tune (lora.r=0) has none",
            fix="--format=hf",
        )
    stored = files.tensors(base)
    names = _names(rows, trained)
    _check_base(names, stored, config, rows)
    saved = _saved_modules(names, stored, config, rows)
    tensors = {name: oriented(path, trained[path], slot) for name, (path, slot) in names.items()}
    embedding, head = _tied(rows)
    tied = config.tie_embeddings and embedding in tensors
    if tied:  # peft wraps both ends of a tied model, and wants the one matrix under both names
        tensors[head] = tensors[embedding]
        saved |= {rows.module("lm_head.embedding")}
    settings = _settings(lora, base_name, _targets(names), saved, stored)
    if tied:
        settings["ensure_weight_tying"] = True
    with staged(out) as stage:
        save_verified(stage / WEIGHTS, tensors)
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (stage / CONFIG).write_text(text, encoding="utf-8")
        (stage / "README.md").write_text(_card(base_name), encoding="utf-8")
    size = sum(values.nbytes for values in tensors.values())
    return Export(("README.md", CONFIG, WEIGHTS), len(tensors), len(tensors), size)


def read_adapter(
    folder: Path, rows: Family, lora: LoraConfig, shapes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """{path: float32 array} for every path of `shapes`, from a PEFT adapter folder.

    Args:
      lora: of the run, whose rank and scale must be the adapter's.
      shapes: {path: anything with a shape} of the run's adapters and modules to save.

    Raises:
      ConfigError: another rank, scale or set of modules than the run's; both are named.
      ModelError: no adapter, pickled weights, a damaged file, or more than plain LoRA.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{CONFIG} is missing in the lora.init folder {folder}",
            fix="a PEFT adapter folder, such as jaxtune export --format=peft writes",
        )
    settings = files.read_json(folder / CONFIG)
    _check_settings(folder, settings, lora)
    stored = files.tensors(folder, single=WEIGHTS)
    if settings.get("ensure_weight_tying"):
        stored.pop(_tied(rows)[1], None)
    names = _names(rows, shapes)
    missing, surplus = sorted(set(names) - set(stored)), sorted(set(stored) - set(names))
    if missing or surplus:
        raise ConfigError(
            f"{folder} fits other modules than this run: only the run has {_few(missing)}; "
            f"only the adapter has {_few(surplus)}",
            fix="lora.target_modules, lora.layers_to_transform and lora.modules_to_save as it has",
        )
    result = {}
    for path, shape in shapes.items():
        whole = np.empty(shape.shape, np.float32)
        result[path] = whole
        for slot, single in enumerate(tree.layer_paths(path)):
            name = _name(rows, single)
            values = stored[name].read().astype(np.float32)
            target = oriented(path, whole, slot)  # a view: what is written there lands in `whole`
            if values.shape != target.shape:
                raise ModelError(
                    f"{folder} has {name} {list(values.shape)}, the run {list(target.shape)}",
                    fix="an adapter of this base",
                )
            target[...] = values
            if not np.isfinite(values).all():
                raise ModelError(f"{folder}: {name} is not finite", fix="another adapter")
    return result


def _name(rows: Family, single: str) -> str:
    module, _, part = single.partition(".lora.")
    if part:
        return f"{_PREFIX}{rows.module(f'{module}.kernel')}.lora_{part}.weight"
    return _PREFIX + rows.tensor(single)


def _names(rows: Family, leaves: Iterable[str]) -> dict[str, tuple[str, int]]:
    """{tensor of the adapter file: (path of the leaf, layer of it)}."""
    return {
        _name(rows, single): (path, slot)
        for path in leaves
        for slot, single in enumerate(tree.layer_paths(path))
    }


def _tied(rows: Family) -> tuple[str, str]:
    return _name(rows, "embed_tokens.embedding"), _name(rows, "lm_head.embedding")


def _targets(names: Iterable[str]) -> set[str]:
    """Hugging Face modules with an adapter."""
    ends = (".lora_A.weight", ".lora_B.weight")
    return {name[len(_PREFIX) : -len(ends[0])] for name in names if name.endswith(ends)}


def _check_base(
    names: Iterable[str],
    stored: Mapping[str, files.Tensor],
    config: DecoderConfig,
    rows: Family,
) -> None:
    full = {n.removeprefix(_PREFIX) for n in names if ".lora_" not in n}
    wanted = full | {f"{module}.weight" for module in _targets(names)}
    known = set(stored)
    if config.tie_embeddings:
        known.add(rows.tensor("embed_tokens.embedding"))
    lost = sorted(wanted - known)
    if lost:
        raise ModelError(
            f"the base has no {_few(lost)}, which was trained", fix="the base of this run"
        )


def _saved_modules(
    names: Iterable[str],
    stored: Mapping[str, files.Tensor],
    config: DecoderConfig,
    rows: Family,
) -> set[str]:
    """Hugging Face modules trained in full; peft replaces whole modules, without an adapter."""
    full = {n.removeprefix(_PREFIX) for n in names if ".lora_" not in n}
    modules = {name.rsplit(".", 1)[0] for name in full}
    partly = {name.rsplit(".", 1)[0] for name in set(stored) - full} & modules
    if config.tie_embeddings:
        partly -= {rows.module("embed_tokens.embedding"), rows.module("lm_head.embedding")}
    cannot = sorted(partly | modules & _targets(names))
    if cannot:
        raise ConfigError(
            f"peft cannot express part of a module trained in full beside an adapter or frozen "
            f"weights: {_few(cannot)}",
            fix="--format=hf",
        )
    return modules


def _settings(
    lora: LoraConfig,
    base_name: str,
    targets: set[str],
    saved: set[str],
    stored: Iterable[str],
) -> dict[str, Any]:
    modules = {name.rsplit(".", 1)[0] for name in stored}
    target_names, layers = _compact(targets, modules - saved)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": target_names,
        "exclude_modules": None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": _suffixes(saved, modules) or None,
    }


def _compact(targets: set[str], modules: set[str]) -> tuple[list[str], list[int] | None]:
    """Last names and layer numbers that mean exactly these modules; failing that, full names."""
    lasts = {target.rsplit(".", 1)[-1] for target in targets}
    layers = {_layer(target) for target in targets}
    alike = {module for module in modules if module.rsplit(".", 1)[-1] in lasts}
    if targets == alike:
        return sorted(lasts), None
    if None not in layers and targets == {m for m in alike if _layer(m) in layers}:
        return sorted(lasts), sorted(number for number in layers if number is not None)
    return sorted(targets), None


def _layer(module: str) -> int | None:
    numbers = [part for part in module.split(".") if part.isdecimal()]
    return int(numbers[0]) if numbers else None


def _suffixes(saved: set[str], modules: Collection[str]) -> list[str]:
    """Last names where they mean just the saved modules; peft matches them by plain `endswith`."""
    result = set()
    for module in saved:
        last = module.rsplit(".", 1)[-1]
        alike = {other for other in modules if other.endswith(last)}
        result.add(last if alike <= saved else module)
    return sorted(result)


def _check_settings(folder: Path, settings: Mapping[str, Any], lora: LoraConfig) -> None:
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise ModelError(
                f"{folder / CONFIG} has {key} {settings[key]!r}, which is not plain LoRA",
                fix=f"an adapter with {key} {plain[0]!r}",
            )
    theirs = {
        "r": settings.get("r", 8),
        "alpha": settings.get("lora_alpha", 8),
        "use_rslora": settings.get("use_rslora", False),
    }
    differ = {key: value for key, value in theirs.items() if value != getattr(lora, key)}
    if differ:
        ours = ", ".join(f"{key} {getattr(lora, key)}" for key in differ)
        raise ConfigError(
            f"lora.init {folder} has {', '.join(f'{k} {v}' for k, v in differ.items())}; "
            f"this run has {ours}",
            fix=" ".join(f"--config.lora.{key}={value}" for key, value in differ.items()),
        )


def _card(base_name: str) -> str:
    """The model card peft writes, as a stub; a folder's path would be no use to others."""
    hub = not Path(base_name).expanduser().exists()
    base = [f"base_model: {json.dumps(base_name)}"] if hub else []
    tags = [*([f"base_model:adapter:{base_name}"] if hub else []), "lora", "transformers"]
    front = [
        *base,
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    lines = ["---", *front, "---", "", "# LoRA adapter"]
    if hub:
        lines += ["", f"Fine-tuned from {base_name} with jaxtune."]
    return "\n".join(lines) + "\n"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return (", ".join(names[:_MOST]) or "nothing") + more
