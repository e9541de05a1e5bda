"""Low-rank adapters (arXiv 2106.09685): which projections get one, and inserting them.

Before `insert`                          after, with q_proj of layers 0 and 1 targeted
  layers.0-1.self_attn.q_proj.kernel       layers.0-1.self_attn.q_proj.kernel
                                           layers.0-1.self_attn.q_proj.lora.A      [2, I, R]
                                           layers.0-1.self_attn.q_proj.lora.B      [2, R, O] zeros
                                           layers.0-1.self_attn.q_proj.lora.scale  [2]
                         and with DoRA     layers.0-1.self_attn.q_proj.lora.magnitude  [2, O]

Each expert of a mixture has an adapter of its own: [2, E, I, R] and so on.
"""

import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from flax import nnx

from jaxtune import tree
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.models.adapter import Adapter, Spec, in_classifier, spec
from jaxtune.models.layers import Linear

_NAMES = re.compile(r"[\w.]+(,[\w.]+)*")  # plain names, against a regular expression

Model = TypeVar("Model", bound=nnx.Module)


def targets(
    lora: LoraConfig, modules: Mapping[str, str], never: Collection[str] = ()
) -> dict[str, Spec]:
    """{path of one layer's projection that gets an adapter: its rank and scale}, as PEFT chooses.

    All experts of a layer are one module, named without a number: `model.layers.0.mlp.experts.
    up_proj`. As in PEFT they are not in "all-linear", and get adapters where names ask for them.

    Args:
      lora: `target_modules` is "all-linear", names ("q_proj", matched as whole suffixes) or one
        regular expression for the whole Hugging Face name; modules_to_save and the heads of
        classifiers never get an adapter.
      modules: {path of one layer's projection: its Hugging Face name}, such as
        {"layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj"}.
      never: more paths that get no adapter, since they are trained in full.

    Raises:
      ConfigError: a name, expression, pattern or layer that matches nothing; the names there are,
        listed. DoRA on experts. Adapter settings of a full fine-tune.
    """
    if lora.r == 0:
        _check_unused(lora)
        return {}
    modules = {path: name.replace(".experts.0.", ".experts.") for path, name in modules.items()}
    kept = {p for p, name in modules.items() if p not in never and _adaptable(lora, p, name)}
    names = lora.target_modules
    if isinstance(names, str) and names != "all-linear" and _NAMES.fullmatch(names):
        names = tuple(names.split(","))
    if names == "all-linear":
        chosen = {path for path in kept if ".experts." not in path}
    elif isinstance(names, str):
        if lora.layers_to_transform:
            raise ConfigError(
                "lora.layers_to_transform goes with names, not with a regular expression",
                fix="the layers inside the expression, or a list of names",
            )
        chosen = {path for path, name in modules.items() if _fullmatch(names, name)}
    else:
        chosen = set(_matching(names, modules))
        lost = [name for name in names if not _matching((name,), modules)]
        if lost:
            raise _no_target(lost, modules)
    layers = {_layer(path) for path in modules}
    lost_layers = set(lora.layers_to_transform) - layers
    if lost_layers:
        raise ConfigError(
            f"lora.layers_to_transform names layers {sorted(lost_layers)}",
            fix=f"layers 0 to {_last_layer(modules)}",
        )
    if lora.layers_to_transform:
        kept = {path for path in kept if _layer(path) in lora.layers_to_transform}
    chosen &= kept
    if not chosen:
        raise _no_target([lora.target_modules], modules)
    if lora.use_dora and any(".experts." in path for path in chosen):
        raise ConfigError(
            "lora.use_dora is not to be had for the projections of experts",
            fix="lora.use_dora=False, or lora.target_modules without them",
        )
    return _specs(lora, {path: modules[path] for path in sorted(chosen)})


def insert(model: Model, chosen: Mapping[str, Spec], lora: LoraConfig, rngs: nnx.Rngs) -> Model:
    """Gives every chosen projection an adapter; the layers of a stack must agree about it."""
    key = rngs.lora()  # the same for all: salt and layer tell them apart
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Linear):
            continue
        name = ".".join(map(str, path))
        layers = tree.layer_range(name)
        in_layer = name if layers is None else name.split(".", 2)[2]
        specs = {chosen.get(single) for single in tree.layer_paths(name)}
        assert len(specs) == 1, f"{name} holds layers with different adapters"
        own = specs.pop()
        if own is not None:
            module.lora = Adapter(
                own.rank,
                module.shape,
                module.axes,
                own.scale,
                zlib.crc32(in_layer.encode()) >> 1,
                stack=module.stack,
                rngs=nnx.Rngs(params=key),
                first=0 if layers is None else layers.start,
                dora=lora.use_dora,
            )
    return model


def _check_unused(lora: LoraConfig) -> None:
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(lora, key):
            raise ConfigError(
                f"lora.{key} is {getattr(lora, key)} and lora.r=0 trains without adapters",
                fix=f"lora.r above 0, or no lora.{key}",
            )


def _specs(lora: LoraConfig, chosen: Mapping[str, str]) -> dict[str, Spec]:
    """Rank and scale of every chosen module, {path: Hugging Face name}; all patterns are used."""
    for key in ("rank_pattern", "alpha_pattern"):
        left = list(chosen.values())
        for pattern, value in getattr(lora, key):
            if value <= 0:
                raise ConfigError(f"lora.{key} gives {pattern!r} {value}", fix="a number above 0")
            rest = [name for name in left if not _fullmatch(pattern, name, key)]
            if len(rest) == len(left):
                raise ConfigError(
                    f"lora.{key} {pattern!r} decides nothing: it matches no module with an "
                    "adapter, or earlier patterns take them all",
                    fix=f"of {', '.join(_lasts(chosen.values()))}, or the end of "
                    f"{next(iter(chosen.values()))}",
                )
            left = rest
    return {path: spec(lora, name) for path, name in chosen.items()}


def _adaptable(lora: LoraConfig, path: str, name: str) -> bool:
    """Whether a module is neither saved in full, nor part of one that is."""
    saved = [rf"(^|\.){re.escape(module)}(\.|$)" for module in lora.modules_to_save]
    return not in_classifier(name) and not any(
        re.search(pattern, text) for pattern in saved for text in (path, name)
    )


def _layer(path: str) -> int | None:
    match = re.match(r"layers\.(\d+)\.", path)
    return int(match[1]) if match else None


def _last_layer(modules: Mapping[str, str]) -> int:
    return max(layer for path in modules if (layer := _layer(path)) is not None)


def _matching(names: tuple[str, ...], modules: Mapping[str, str]) -> list[str]:
    return [p for p, name in modules.items() if any(f".{name}".endswith(f".{n}") for n in names)]


def _fullmatch(pattern: str, name: str, key: str = "target_modules") -> bool:
    """Whether a target's expression is for this name; that of other settings, for its end."""
    try:
        whole = pattern if key == "target_modules" else rf"(.*\.)?({pattern})"
        return re.fullmatch(whole, name) is not None
    except re.error as error:
        raise ConfigError(
            f"lora.{key} {pattern!r} is not a regular expression: {error}",
            fix="names such as q_proj, or an expression for Hugging Face's names",
        ) from error


def _lasts(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _no_target(wanted: list, modules: Mapping[str, str]) -> ConfigError:
    names = _lasts(name for name in modules.values() if not in_classifier(name))
    return ConfigError(
        f"lora.target_modules matches nothing: {', '.join(map(str, wanted))}",
        fix=f"all-linear, or of {', '.join(names)} in layers 0 to {_last_layer(modules)}",
    )
