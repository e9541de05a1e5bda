"""adapter_config.json: the settings of a PEFT adapter, as peft 0.21 has them, read and written."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf import files
from jaxtune.models.adapter import CLASSIFIER, in_classifier, spec

CONFIG = "adapter_config.json"
# Settings that change what the weights mean, and the values under which they mean what ours do.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (pissa, olora, corda, loftq) also change the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Settings that are read here, or say nothing about the weights in the file. Any other must be off.
_HARMLESS = re.compile(
    r"task_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|r"
    r"|lora_(alpha|dropout)|use_(rslora|dora)|(rank|alpha)_pattern|(target|exclude)_modules"
    r"|layers_to_transform|layers_pattern|modules_to_save|ensure_weight_tying|fan_in_fan_out"
    r"|(loftq|eva|corda|lora_ga|megatron|runtime)_config|megatron_core|qalora_group_size"
)
_OURS = ("r", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def read(folder: Path) -> tuple[dict[str, Any], LoraConfig]:
    """(the settings as they are, those that say rank and scale as a LoraConfig).

    Raises:
      ModelError: no adapter, or a setting under which its weights mean what ours cannot.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{CONFIG} is missing in the adapter folder {folder}",
            fix="a PEFT adapter folder, such as jaxtune export --format=peft writes",
        )
    settings = files.read_json(folder / CONFIG)
    for key, value in settings.items():
        plain = _PLAIN.get(key, (None, False, [], {}))
        if value not in plain and not _HARMLESS.fullmatch(key):
            raise ModelError(
                f"{folder / CONFIG} has {key} {value!r}, which jaxtune's adapters cannot express",
                fix=f"an adapter with {key} {plain[0]!r}",
            )
    try:
        lora = LoraConfig(
            r=int(settings.get("r", 8)),
            alpha=float(settings.get("lora_alpha", 8)),
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            rank_pattern=_pairs(settings.get("rank_pattern"), int),
            alpha_pattern=_pairs(settings.get("alpha_pattern"), float),
        )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ModelError(f"{folder / CONFIG} is damaged: {error}", fix="fetch it again") from error
    return settings, lora


def check_same(folder: Path, theirs: LoraConfig, run: LoraConfig, modules: Collection[str]) -> None:
    """Raises ConfigError where the run gives one of these modules another rank or scale."""
    same = all(spec(theirs, name) == spec(run, name) for name in modules)
    if same and theirs.use_dora == run.use_dora:
        return
    differ = [key for key in _OURS if getattr(theirs, key) != getattr(run, key)]
    raise ConfigError(
        f"lora.init {folder} has {', '.join(f'{k} {getattr(theirs, k)}' for k in differ)}; "
        f"this run has {', '.join(f'{k} {getattr(run, k)}' for k in differ)}",
        fix=" ".join(f"--config.lora.{key}={_flag(getattr(theirs, key))}" for key in differ),
    )


def written(
    lora: LoraConfig,
    base_name: str,
    targets: Mapping[str, int],
    saved: set[str],
    modules: set[str],
    *,
    classifier: bool,
    tied: bool,
) -> dict[str, Any]:
    """The settings under which peft loads an adapter of a run.

    Args:
      targets: Hugging Face modules with an adapter, and the rank it was trained with.
      saved: those trained in full.
      modules: all of the base.
      classifier: whether the base is loaded with a classifier's head.
      tied: whether both ends of a tied model were trained, as one.
    """
    assert all(spec(lora, name).rank == rank for name, rank in targets.items())
    target_names, layers = _compact(set(targets), modules - saved)
    full = _suffixes({name for name in saved if not (classifier and in_classifier(name))}, modules)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": lora.r,
        "lora_alpha": _short(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,  # of a Conv1D, peft finds out by itself
        "init_lora_weights": True,
        "target_modules": target_names,
        "exclude_modules": None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        # Of several patterns that match, peft takes the first: their order stays.
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {name: _short(alpha) for name, alpha in lora.alpha_pattern},
        "modules_to_save": [*(CLASSIFIER if classifier else ()), *full] or None,
    }
    return settings | ({"ensure_weight_tying": True} if tied else {})


def _pairs(patterns: Any, kind: type) -> tuple[tuple[str, Any], ...]:
    pairs = tuple((str(name), kind(value)) for name, value in (patterns or {}).items())
    for name, _ in pairs:
        re.compile(name)
    return pairs


def _short(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _flag(value: Any) -> str:
    """A value as a flag of a shell has it."""
    if isinstance(value, tuple):
        pairs = ", ".join(f'["{name}", {_short(number)}]' for name, number in value)
        return f"'[{pairs}]'"
    return str(_short(value) if isinstance(value, float) else value)


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
