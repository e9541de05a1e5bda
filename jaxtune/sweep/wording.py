"""How a sweep's values, times and amounts are written for people."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def value(of: Any) -> str:
    """A hyperparameter's value in few characters: 0.00031623 -> "3.16e-4", ("q", "v") -> "q, v"."""
    if isinstance(of, (tuple, list)):
        return ", ".join(map(value, of)) or "all"
    if isinstance(of, float) and math.isfinite(of) and of != 0:
        if 0.01 <= abs(of) < 1e4:
            return f"{of:.3g}"
        digits, power = f"{of:.2e}".split("e")
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return f"{digits}e{int(power)}"
    return "0" if of == 0 and isinstance(of, float) else str(of)


def params(of: dict[str, Any], keys: Iterable[str] = ()) -> str:
    """{"optim.lr": 3e-4, "lora.r": 8} -> "optim.lr=3e-4 lora.r=8", of the keys or of all."""
    return " ".join(f"{key}={value(of[key])}" for key in (tuple(keys) or of) if key in of)


def heads(keys: Iterable[str]) -> dict[str, str]:
    """{"lora.r": "r"}: each key's last part, or the whole key where two have the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: name if count[name] == 1 else key for key, name in last.items()}


def sources(of: str | Iterable[Any]) -> str:
    """What `data.train` names, ({"path": "a.tsv", "weight": 2}, "b") -> "a.tsv, b"."""
    entries = (of,) if isinstance(of, str) else of
    return ", ".join(str(e.get("path", e) if isinstance(e, Mapping) else e) for e in entries)


def unit(task: str) -> str:
    """Of a loss."""
    return "nats a row" if task == "classify" else "nats a token"


def loss(of: float | None) -> str:
    """Nats with four digits after the point; a dash where there is none."""
    if of is None:
        return "-"
    return f"{of:.4f}" if math.isfinite(of) else "not finite"


def amount(of: float) -> str:
    """A count with three digits and its thousands' letter: 1234567 -> "1.23M"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(of) >= 0.9995 * size:
            digits = 2 - int(math.log10(max(1.0, abs(of) / size * 1.0005)))
            return f"{of / size:.{digits}f}{letter}"
    return f"{of:.0f}"


def duration(seconds: float) -> str:
    """Two units at most: 45 -> "45 s", 200 -> "3 min 20 s", 7500 -> "2 h 05 min"."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def ordinal(of: int) -> str:
    """1 -> "1st", 12 -> "12th"."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(of % 10, "th")
    return f"{of}{'th' if of % 100 in (11, 12, 13) else ending}"


def counted(number: int, noun: str) -> str:
    """(1, "trial") -> "1 trial", (1200, "trial") -> "1,200 trials"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
