"""Rotary positions (arXiv 2104.09864) and the scalings of them that Hugging Face configs name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ModelError


@dataclass(frozen=True)
class Rope:
    """One table of angles. `kind` is transformers' rope_type; "none" rotates nothing."""

    theta: float = 10000.0
    kind: str = "default"  # or none, linear, llama3, yarn (arXiv 2309.00071), longrope (2402.13753)
    dims: int = 0  # of a head that turn, the first ones; 0 is all of them
    factor: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    beta_fast: float = 32.0  # yarn: turns within the original length above which angles are kept
    beta_slow: float = 1.0  # yarn: turns below which they are divided by factor
    truncate: bool = True  # yarn: the limits are whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: sine and cosine are multiplied by it
    short_factor: tuple[float, ...] = ()  # longrope: divides each frequency
    long_factor: tuple[float, ...] = ()  # longrope: the same once a position passes the original

    def frequencies(self, head_dim: int, *, long: bool = False) -> np.ndarray:
        """Angle per position, float32 [dims / 2]."""
        dims = self.dims or head_dim
        if self.kind == "none":
            return np.zeros(dims // 2, np.float32)
        powers = self.theta ** (np.arange(0, dims, 2, dtype=np.float32) / dims)
        freq = 1.0 / powers
        if self.kind == "linear":
            freq = freq / self.factor
        if self.kind == "llama3":
            wavelength = 2 * np.pi / freq
            low, high = self.low_freq_factor, self.high_freq_factor
            smooth = (self.original_max_position / wavelength - low) / (high - low)
            smooth = np.clip(smooth, 0.0, 1.0)  # 0: all scaled, 1: kept
            freq = (1 - smooth) * freq / self.factor + smooth * freq
        if self.kind == "yarn":
            kept = 1 - self._ramp(dims)
            freq = freq / self.factor * (1 - kept) + freq * kept
        if self.kind == "longrope":
            freq = 1.0 / (
                np.asarray(self.long_factor if long else self.short_factor, np.float32) * powers
            )
        return freq.astype(np.float32)

    def angles(self, positions_BT: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """(sine, cosine), float32 [B, T, dims / 2]."""
        freq = jnp.asarray(self.frequencies(head_dim))
        if self.kind == "longrope":
            # As transformers does it: one longer text switches the whole batch.
            passed = jnp.max(positions_BT) + 1 > self.original_max_position
            freq = jnp.where(passed, self.frequencies(head_dim, long=True), freq)
        angles_BTH = positions_BT[..., None].astype(jnp.float32) * freq
        return jnp.sin(angles_BTH) * self.attention_factor, jnp.cos(
            angles_BTH
        ) * self.attention_factor

    def _ramp(self, dims: int) -> np.ndarray:
        """YaRN: 0 where angles are kept, 1 where they are scaled."""

        def dimension(turns: float) -> float:
            ratio = self.original_max_position / (turns * 2 * math.pi)
            return dims * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        return np.clip((np.arange(dims // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def rotate(x_BTNH: jax.Array, sin_BTH: jax.Array, cos_BTH: jax.Array) -> jax.Array:
    """Half-split rotation, Hugging Face's layout, of the first 2 * sin.shape[-1] dims of a head.

    In the dtype of sine and cosine, then rounded to that of x.
    """
    sin, cos = sin_BTH[:, :, None, :], cos_BTH[:, :, None, :]
    half = sin_BTH.shape[-1]
    a, b, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], axis=-1)


# Which fields each rope_type reads, beside rope_theta and partial_rotary_factor.
_ROPE_FIELDS = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor",
    "yarn": "factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim",
    "longrope": "factor attention_factor short_factor long_factor",
}
_ROPE_ALWAYS = "rope_type type rope_theta partial_rotary_factor original_max_position_embeddings"


def rope_table(found: Mapping[str, Any], theta: float, head_dim: int, max_position: int) -> Rope:
    """A Rope from a dict of Hugging Face's rotary settings. Raises ModelError for unknown ones."""
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in _ROPE_FIELDS:
        raise ModelError(f"config.json has rope_type {kind!r}", fix=f"of {', '.join(_ROPE_FIELDS)}")
    known = f"{_ROPE_FIELDS[kind]} {_ROPE_ALWAYS}".split()
    unknown = [name for name, value in found.items() if value and name not in known]
    if unknown:
        raise ModelError(
            f"config.json has rotary settings that rope_type {kind!r} does not read: "
            f"{', '.join(unknown)}",
            fix="the checkpoint's own config.json",
        )
    theta = float(found.get("rope_theta") or theta)
    dims = int(head_dim * float(found.get("partial_rotary_factor") or 1.0))
    if kind == "default":
        return Rope(theta, dims=dims)
    original = int(found.get("original_max_position_embeddings") or max_position)
    factor = found.get("factor")
    if factor is None and kind in ("linear", "llama3"):
        raise ModelError(f"config.json has rope_type {kind!r} without a factor", fix="its factor")
    factor = float(max_position / original if factor is None else factor)
    common: dict[str, Any] = {"dims": dims, "factor": factor, "original_max_position": original}
    if kind == "llama3":
        common |= {name: float(found[name]) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        common |= {
            "beta_fast": float(found.get("beta_fast") or 32),
            "beta_slow": float(found.get("beta_slow") or 1),
            "truncate": bool(found.get("truncate", True)),
            "attention_factor": _yarn_attention(found, factor),
        }
    if kind == "longrope":
        given = found.get("attention_factor")
        derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        common |= {
            "attention_factor": float(derived if given is None else given),
            "short_factor": _factors(found, "short_factor", dims),
            "long_factor": _factors(found, "long_factor", dims),
        }
    return Rope(theta, kind, **common)


def _yarn_attention(found: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, top, bottom = (found.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return scale(top) / scale(bottom) if top and bottom else scale(1.0)


def _factors(found: Mapping[str, Any], name: str, dims: int) -> tuple[float, ...]:
    values = found.get(name) or ()
    if len(values) != dims // 2:
        raise ModelError(
            f"config.json has {len(values)} numbers in {name}", fix=f"{dims // 2} of them"
        )
    return tuple(map(float, values))


def single_rope(
    f: Mapping[str, Any], defaults: Mapping[str, Any], head_dim: int, max_position: int
) -> Rope:
    """The one rotary table of most families, from a config.json in either style."""
    found = dict(f.get("rope_scaling") or f.get("rope_parameters") or {})
    f.get("rope_parameters")
    theta = f.get("rope_theta", defaults.get("rope_theta", 1e4))
    partial = f.get("partial_rotary_factor")
    if partial is not None:
        found.setdefault("partial_rotary_factor", partial)
    if "original" in defaults:  # Phi-3
        found["original_max_position_embeddings"] = defaults["original"]
        kind = found.get("rope_type", found.get("type", "default"))
        found["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    return rope_table(found, theta, head_dim, max_position)
