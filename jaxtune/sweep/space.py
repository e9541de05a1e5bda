"""The space of a sweep: which settings vary, between what, and a trial's own config.

A space is {config key: ("log", low, high) | ("uniform", low, high) | ("choice", value, ...)}, as
`log`, `uniform` and `choice` of jaxtune.config write it; the params of a trial are {key: value}.
"""

import difflib
import itertools
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

from jaxtune import config as settings
from jaxtune.config import VARIES, Config
from jaxtune.errors import ConfigError

if typing.TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = dict[str, tuple[Any, ...]]

_NUMBERS = {int, float}
_AXES = "log(low, high), uniform(low, high) or choice(a, b, ...)"
# What other trainers call the settings that can vary.
_USUAL = {
    "learning_rate": "lr", "wd": "weight_decay", "rank": "r", "batch": "batch_size",
    "num_train_epochs": "epochs", "max_steps": "steps", "max_grad_norm": "clip_norm",
}  # fmt: skip


def parse(config: Config) -> Space:
    """`config.sweep.space`, every value checked and of its key's own type.

    Raises:
      ConfigError: a key that is not there or cannot vary, a range that is none, a value the config
        refuses. Names the key.
    """
    space = {}
    for key, (kind, *values) in _pairs(config):
        _check_key(key, config)
        if kind == "choice":
            space[key] = (kind, *_choices(key, values, config))
        elif kind in ("log", "uniform"):
            space[key] = (kind, *_bounds(key, kind, values, config))
        else:
            raise ConfigError(f"sweep.space {key} is {(kind, *values)!r}", fix=_AXES)
    if "train.epochs" in space and (config.train.steps or "train.steps" in space):
        raise ConfigError(
            "sweep.space varies train.epochs, which train.steps overrides", fix="train.steps = 0"
        )
    _check_batches(space)
    return space


def _pairs(config: Config) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for key, axis in config.sweep.space:
        if not isinstance(axis, (tuple, list)) or not axis:
            raise ConfigError(f"sweep.space {key} is {axis!r}", fix=_AXES)
        if key in dict(found):
            raise ConfigError(f"sweep.space has {key} twice", fix="one line for it")
        found.append((key, tuple(axis)))
    return found


def _check_key(key: str, config: Config) -> None:
    known = settings.dotted(Config().to_dict())
    if key not in known:
        close = _closest(key)
        hint = f"did you mean {close}? " if close else ""
        raise ConfigError(
            f"sweep.space has an unknown config key {key!r}",
            fix=f"{hint}one of {', '.join(VARIES)}",
        )
    if key not in VARIES:
        raise ConfigError(
            f"sweep.space has {key}, which cannot vary within a sweep",
            fix=f"one of {', '.join(VARIES)}",
        )
    if key.startswith("lora.") and not config.lora.r:
        raise ConfigError(
            f"sweep.space has {key}, but lora.r = 0 is full fine-tuning",
            fix=f"lora.r above 0, or one of {', '.join(k for k in VARIES if k[:5] != 'lora.')}",
        )


def _closest(key: str) -> str:
    """The key that can vary whose last part is most like this one's; empty where none is."""
    names = {k.split(".")[-1]: k for k in VARIES}
    names |= {usual: names[own] for usual, own in _USUAL.items()}
    last = key.split(".")[-1].lower()
    # "lora_alpha", "warmup_ratio" and "per_device_train_batch_size" have a name as a part.
    parts = [name for name in names if len(name) > 2 and f"_{name}_" in f"_{last}_"]
    close = [max(parts, key=len)] if parts else difflib.get_close_matches(last, names, n=1)
    return names[last] if last in names else names[close[0]] if close else ""


def _annotation(key: str) -> Any:
    group, name = key.split(".")
    return typing.get_type_hints(typing.get_type_hints(Config)[group])[name]


def _choices(key: str, values: list[Any], config: Config) -> list[Any]:
    if not values:
        raise ConfigError(f"sweep.space {key} is an empty choice", fix="choice(...) of some values")
    found = []
    for value in values:
        checked = _checked(key, value, config)
        if checked in found:
            raise ConfigError(f"sweep.space {key} has {value!r} twice", fix="each value once")
        found.append(checked)
    return found


def _bounds(key: str, kind: str, values: list[Any], config: Config) -> tuple[Any, Any]:
    kinds = set(typing.get_args(_annotation(key)) or (_annotation(key),))
    if not kinds & _NUMBERS or key == "train.batch_size":
        # Trials share micro-batches of the largest number of rows that divides all batch sizes.
        raise ConfigError(f"sweep.space {key} is a range", fix=f"choice(...) of values of {key}")
    wrong = [f"{v!r} is no number" for v in values if type(v) not in _NUMBERS]
    wrong += [f"{v} is not finite" for v in values if type(v) is float and not math.isfinite(v)]
    if len(values) != 2:
        wrong = [f"a range has two ends, not {len(values)}"]
    if wrong:
        spelled = f"{kind}({', '.join(map(repr, values))})"
        raise ConfigError(
            f"sweep.space {key} is {spelled}: {', '.join(wrong)}", fix=f"{kind}(low, high)"
        )
    if any(type(value) is float for value in values) and float in kinds:
        values = [float(value) for value in values]
    low, high = (_checked(key, value, config) for value in values)
    if low >= high:
        raise ConfigError(
            f"sweep.space {key} is {kind}({low}, {high})", fix="the smaller bound first"
        )
    if kind == "log" and low <= 0:
        raise ConfigError(
            f"sweep.space {key} is log({low}, {high})", fix="bounds above 0, or uniform(...)"
        )
    return low, high


def _checked(key: str, value: Any, config: Config) -> Any:
    """The value as the config would have it. Raises ConfigError where it would not."""
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"sweep.space {key} has {value}", fix="a finite number")
    if value is None and key == "optim.lr":
        raise ConfigError(f"sweep.space {key} has None, which is no number", fix="numbers only")
    if key == "lora.r" and isinstance(value, (int, float)) and value <= 0:
        raise ConfigError(
            f"sweep.space {key} has {value}: adapters have a rank of 1 or more",
            fix="ranks from 1; full fine-tuning, lora.r = 0, is a sweep of its own",
        )
    try:
        trial = configured(config, {key: value})
    except ConfigError as error:
        raise ConfigError(f"sweep.space {key}: {error.what}", fix=error.fix) from error
    return _get(trial, key)


def _get(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _check_batches(space: Space) -> None:
    sizes = [v for v in space.get("train.batch_size", ()) if type(v) is int]
    if sizes and math.gcd(*sizes) == 1 < min(sizes):
        raise ConfigError(
            f"sweep.space train.batch_size {', '.join(map(str, sizes))} have only micro-batches of "
            "one row in common",
            fix="multiples of one number, such as 8, 16, 32",
        )


def configured(config: Config, params: Mapping[str, Any]) -> Config:
    """A trial's own config: what `jaxtune train` needs to do the same.

    Another batch size trains on as many rows: `train.steps`, the config's or the trial's, counts
    steps of the config's batch size; `train.grad_accum` becomes what keeps micro-batches no larger
    than the config's. Another `lora.r` leaves alpha as it is, so that the adapter's scale,
    alpha / r, changes with it.

    Raises:
      ConfigError: values the config refuses.
    """
    changes = dict(params)
    steps = params.get("train.steps", config.train.steps)
    rows = params.get("train.batch_size", config.train.batch_size)
    # Values of the wrong type go on as they are, for `freeze` to name them.
    own = config.train.batch_size
    if type(steps) is int and type(rows) is int and rows > 0 and rows != own:
        changes["train.grad_accum"] = rows // math.gcd(rows, own // config.train.grad_accum)
        if steps > 0:
            changes["train.steps"] = max(1, round(steps * own / rows))
    return settings.freeze(settings.replaced(config, changes).to_dict())


def defaults(config: Config, space: Space) -> dict[str, Any]:
    """The params of the config as it is, in the keys of the space."""
    from jaxtune import optim  # and with it jax, which whoever only follows a study can do without

    found = {key: _get(config, key) for key in space}
    if "optim.lr" in found:
        found["optim.lr"] = optim.peak_lr(config)
    return found


def points(config: Config, space: Space) -> dict[str, tuple[Any, ...]]:
    """{key: its choices, or the ends of its range, and the config's own value}."""
    own = defaults(config, space)
    return {
        key: (*axis[1:], *(() if own[key] in axis[1:] else (own[key],)))
        for key, axis in space.items()
    }


def contains(axis: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is one of an axis: a choice, or within the range."""
    kind, *values = axis
    if kind == "choice":
        return value in values
    return type(value) in _NUMBERS and values[0] <= value <= values[1]


def clipped(axis: tuple[Any, ...], value: Any) -> Any:
    """The value of an axis that is nearest: the first choice where nothing is near."""
    kind, *values = axis
    if kind != "choice":
        low, high = values
        return type(low)(min(max(value, low), high))
    if value in values:
        return value
    if type(value) in _NUMBERS and all(type(v) in _NUMBERS for v in values):
        return min(values, key=lambda v: abs(v - value))
    return values[0]


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of the choices, the first key's changing last.

    Raises:
      ConfigError: a range, which has no end of values; says how to write it as a choice.
    """
    for key, (kind, *values) in space.items():
        if kind != "choice":
            low, high = values
            middle = math.sqrt(low * high) if kind == "log" else (low + high) / 2
            shown = ", ".join(f"{v:.3g}" for v in (low, middle, high))
            raise ConfigError(
                f"sweep.sampler grid cannot go through {key} = {kind}({low}, {high})",
                fix=f"choice({shown}), or another sampler",
            )
    axes = [axis[1:] for axis in space.values()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def distributions(space: Space) -> dict[str, "BaseDistribution"]:
    """The space as Optuna has it; choices that are no plain values go by their JSON."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for key, (kind, *values) in space.items():
        if kind == "choice":
            found[key] = CategoricalDistribution([encoded(value) for value in values])
        elif type(values[0]) is int:
            found[key] = IntDistribution(values[0], values[1], log=kind == "log")
        else:
            found[key] = FloatDistribution(values[0], values[1], log=kind == "log")
    return found


def encoded(value: Any) -> bool | int | float | str | None:
    """A value as Optuna keeps it."""
    return json.dumps(value) if isinstance(value, (list, tuple)) else value


def decoded(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler chose, as values of the space; four digits of a number are enough."""
    found = {}
    for key, value in params.items():
        kind, *values = space[key]
        if kind == "choice":
            found[key] = next(v for v in values if encoded(v) == value)
        elif isinstance(value, float):
            found[key] = clipped(space[key], float(f"{value:.4g}"))
        else:
            found[key] = value
    return found
