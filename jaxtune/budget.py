"""What a run or a search may cost, as people write it: "1h30m", "64 chip-hours", "500M tokens"."""

import math
import re
from typing import Literal, NamedTuple

from jaxtune.errors import ConfigError

Unit = Literal["seconds", "chip-seconds", "tokens"]

_NUMBER = r"(\d[\d_,]*(?:\.\d+)?(?:e[+-]?\d+)?|\.\d+)"
_UNITS = r"d|days?|h|hrs?|hours?|m|mins?|minutes?|s|secs?|seconds?"
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_THOUSANDS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PART = re.compile(rf"{_NUMBER}\s*({_UNITS})(?![a-z])", re.I)
_CHIPS = re.compile(rf"{_NUMBER}\s*chip[-\s]?(h|hour)s?", re.I)
_TOKENS = re.compile(rf"{_NUMBER}\s*([kmbt]?)\s*tokens?", re.I)
_UNDERSTOOD = "24h, 1h30m, 90m, 64 chip-hours or 500M tokens"


class Budget(NamedTuple):
    """An amount of time or tokens."""

    amount: float
    unit: Unit

    def on(self, devices: int) -> "Budget":
        """The same with time of all `devices` at once instead of chip time."""
        if self.unit != "chip-seconds":
            return self
        return Budget(self.amount / devices, "seconds")

    def __str__(self) -> str:
        return spell(*self)


def parse(text: str, key: str) -> Budget | None:
    """The budget that a text names; None of an empty one.

    Args:
      text: hours, minutes, seconds or days ("1h30m", "2 days"), chip-hours, or tokens.
      key: of the setting, for the error.

    Raises:
      ConfigError: anything else.
    """
    words = text.strip()
    if not words:
        return None
    found = _read(words)
    if found is None or not 0 < found.amount < math.inf:
        hint = _UNDERSTOOD
        if re.fullmatch(rf"{_NUMBER}\s*[kmbt]?", words, re.I):
            number = words.rstrip("kmbtKMBT ")
            hint = f"{number}h, {number}m (minutes) or {words} tokens"
        raise ConfigError(f"{key} {text!r} is no amount of time or tokens", fix=hint)
    return found


def _read(words: str) -> Budget | None:
    if match := _CHIPS.fullmatch(words):
        return Budget(3600 * _number(match[1]), "chip-seconds")
    if match := _TOKENS.fullmatch(words):
        return Budget(_number(match[1]) * _THOUSANDS[match[2].lower()], "tokens")
    parts = list(_PART.finditer(words))
    between = _PART.sub("", words).replace("and", "")
    # 500M may be meant as tokens: a capital M alone is no minute.
    if not parts or between.strip(" ,") or any(part[2] == "M" for part in parts):
        return None
    return Budget(sum(_number(p[1]) * _SECONDS[p[2][0].lower()] for p in parts), "seconds")


def _number(text: str) -> float:
    return float(text.replace("_", "").replace(",", ""))


def spell(amount: float, unit: Unit = "seconds") -> str:
    """An amount as people read it: "2h 30m", "2.5 chip-hours", "500M tokens"."""
    if unit == "tokens":
        for letter, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if amount >= size:
                return f"{amount / size:.4g}{letter} tokens"
        return f"{amount:.0f} tokens"
    if unit == "chip-seconds":
        return f"{amount / 3600:.4g} chip-hours"
    if amount < 10:
        return f"{amount:.2g} s"
    whole = round(amount)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        pairs = ((whole // 60, "m"), (whole % 60, "s"))
    elif whole < 48 * 3600:
        pairs = ((whole // 3600, "h"), (whole // 60 % 60, "m"))
    else:
        pairs = ((whole // 86400, "d"), (whole // 3600 % 24, "h"))
    return " ".join(f"{count}{name}" for count, name in pairs if count)


def enough(amount: float, unit: Unit = "seconds") -> str:
    """At least the amount, in round numbers that `parse` takes."""
    if unit == "tokens":
        size, letter = (1e6, "M") if amount >= 1e6 else (1e3, "k")
        return f"{math.ceil(amount / size)}{letter} tokens"
    if amount < 100:
        return f"{10 * math.ceil(amount / 10)}s"
    return f"{math.ceil(amount / 60)}m" if amount < 7200 else f"{math.ceil(amount / 3600)}h"
