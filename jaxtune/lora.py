"""Low-rank adapters (arXiv 2106.09685): which projections get one, and inserting them.

Before `insert`                          after, with q_proj of layers 0 and 1 targeted
  layers.0-1.self_attn.q_proj.kernel       layers.0-1.self_attn.q_proj.kernel
                                           layers.0-1.self_attn.q_proj.lora.A      [2, I, R]
                                           layers.0-1.self_attn.q_proj.lora.B      [2, R, O] zeros
                                           layers.0-1.self_attn.q_proj.lora.scale  [2]
"""

import math
import re
import zlib
from collections.abc import Mapping

from flax import nnx

from jaxtune import tree
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.models.decoder import Decoder
from jaxtune.models.layers import Adapter, Linear

_NAMES = re.compile(r"[\w.]+(,[\w.]+)*")  # plain names, against a regular expression


def scale(lora: LoraConfig) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def targets(lora: LoraConfig, modules: Mapping[str, str]) -> frozenset[str]:
    """The modules that get an adapter, chosen as PEFT does.

    Args:
      lora: `target_modules` is "all-linear", names ("q_proj", matched as whole suffixes) or one
        regular expression for the whole Hugging Face name; modules_to_save never get an adapter.
      modules: {path of one layer's projection: its Hugging Face name}, such as
        {"layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj"}.

    Raises:
      ConfigError: a name, expression or layer that matches nothing; the names there are, listed.
    """
    if lora.r == 0:
        return frozenset()
    saved = set(_matching(lora.modules_to_save, modules))
    names = lora.target_modules
    if isinstance(names, str) and names != "all-linear" and _NAMES.fullmatch(names):
        names = tuple(names.split(","))
    if names == "all-linear":
        chosen = set(modules)
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
    chosen = {path for path in chosen - saved if _in_layers(path, lora.layers_to_transform)}
    lost_layers = set(lora.layers_to_transform) - {int(path.split(".")[1]) for path in modules}
    if lost_layers:
        raise ConfigError(
            f"lora.layers_to_transform names layers {sorted(lost_layers)}",
            fix=f"layers 0 to {_last_layer(modules)}",
        )
    if not chosen:
        raise _no_target([lora.target_modules], modules)
    return frozenset(chosen)


def insert(model: Decoder, chosen: frozenset[str], lora: LoraConfig, rngs: nnx.Rngs) -> Decoder:
    """Gives every chosen projection an adapter; stacks must not mix chosen and other layers."""
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, Linear):
            continue
        name = ".".join(map(str, path))
        singles = set(tree.layer_paths(name))
        if singles <= chosen:
            module.lora = Adapter(
                lora.r,
                module.shape,
                module.axes,
                scale(lora),
                zlib.crc32(name.encode()) >> 1,
                stack=module.stack,
                rngs=rngs,
            )
        else:
            assert not singles & chosen, f"{name} holds layers with and without adapters"
    return model


def _last_layer(modules: Mapping[str, str]) -> int:
    return max(int(path.split(".")[1]) for path in modules)


def _matching(names: tuple[str, ...], modules: Mapping[str, str]) -> list[str]:
    return [p for p, name in modules.items() if any(f".{name}".endswith(f".{n}") for n in names)]


def _in_layers(path: str, layers: tuple[int, ...]) -> bool:
    return not layers or int(path.split(".")[1]) in layers


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(
            f"lora.target_modules {pattern!r} is not a regular expression: {error}",
            fix="all-linear, names such as q_proj,v_proj, or an expression for whole names",
        ) from error


def _no_target(wanted: list, modules: Mapping[str, str]) -> ConfigError:
    names = sorted({name.rsplit(".", 1)[-1] for name in modules.values()})
    return ConfigError(
        f"lora.target_modules matches nothing: {', '.join(map(str, wanted))}",
        fix=f"all-linear, or of {', '.join(names)} in layers 0 to {_last_layer(modules)}",
    )
