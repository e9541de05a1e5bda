"""What makes two sweeps the same, so that one can go on with the other's study."""

from collections.abc import Mapping, Sequence
from typing import Any

import jaxtune
from jaxtune import config as settings
from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.sweep.attributes import plain
from jaxtune.sweep.space import Space

# Settings that may be other ones when a sweep goes on, or on another of its machines.
_FREE = (
    "sweep.space", "sweep.trials", "sweep.sampler", "sweep.budget", "sweep.population",
    "sweep.finalists", "sweep.repeats", "sweep.storage", "sweep.prior", "model.path", "data.train",
    "data.eval", "train.log_every", "train.tensorboard", "train.wandb",
)  # fmt: skip
_FREE_GROUPS = ("mesh", "checkpoint", "eval")


def whole(
    given: Mapping[str, Any], config: Config, space: Space, rungs: Sequence[int]
) -> dict[str, Any]:
    """What a study is compared by: what is given, the settings, the space, rungs and version."""
    return plain(
        {
            **given,
            "config": _shared_settings(config),
            "space": space,
            "rungs": rungs,
            "version": jaxtune.__version__,
        }
    )


def _shared_settings(config: Config) -> dict[str, Any]:
    values = settings.dotted(config.to_dict())
    kept = {k: v for k, v in values.items() if k.split(".")[0] not in _FREE_GROUPS}
    return {k: v for k, v in kept.items() if k not in _FREE}


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    old, new = settings.dotted(saved), settings.dotted(now)
    differ = [
        f"{key} was {_short(old.get(key))}, is now {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise ConfigError(
            f"the study in {name} is another one: {'; '.join(differ)}",
            fix="the old values again, or another --workdir",
        )


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
