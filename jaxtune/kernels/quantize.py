"""Frozen kernels in 8 or 4 bits a weight: how they are kept, made and multiplied with.

    scheme   values                          scale                    bits a weight
    int8     int8 [..., I, O]                float32 [..., O]         8
    fp8      float8_e4m3fn [..., I, O]       float32 [..., O]         8
    int4     uint8 [..., G, P, O]            bfloat16 [..., G, O]     4.25
    nf4      uint8 [..., G, P, O]            bfloat16 [..., G, O]     4.25

In 8 bits a kernel is values * scale of its column. In 4 bits, 64 inputs of one output are a group
with one scale, and byte p of a group holds the codes of its inputs p (low half) and p + 32 (high
half): a device that has some of the groups has all of their bytes. A code c of int4 means c - 8, of
NF4 (QLoRA, arXiv 2305.14314) the c-th of 16 quantiles of the normal distribution. A float32 scale
would make 4.5 bits a weight; codes are chosen for the scale that bfloat16 makes of it.
Inputs that do not fill the last group are followed by zeros.

Letters: I inputs, O outputs, G groups of 64 inputs, P bytes of a group, J inputs in one half of the
bytes, E experts, M rows sorted by expert, `...` stacks of layers and of experts.
"""

import math
import re
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import ConfigError
from jaxtune.kernels import experts
from jaxtune.sharding import gathered

GROUP = 64  # inputs that share a scale in 4 bits
_PACKED = GROUP // 2
_MOST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0, "nf4": 1.0}  # largest value under the scale
_WHOLE = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# Appendix E of the paper; 0 is among them, and there is one more above it than below.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Array(NamedTuple):
    """An array to be: what it is like, and the logical axis of each dimension."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


class Layout(NamedTuple):
    """How a kernel [..., I, O] is kept."""

    scheme: str  # of model.quantize, not none
    shape: tuple[int, ...]  # of the kernel itself
    axes: tuple[str | None, ...]

    @property
    def packed(self) -> bool:
        """Whether a byte holds two values."""
        return self.scheme not in _WHOLE

    @property
    def values(self) -> Array:
        *stack, inputs, outputs = self.shape
        *across, into, out = self.axes
        if not self.packed:
            return Array(self.shape, _WHOLE[self.scheme], self.axes)
        shape = (*stack, math.ceil(inputs / GROUP), _PACKED, outputs)
        return Array(shape, jnp.uint8, (*across, into, None, out))

    @property
    def scale(self) -> Array:
        *stack, inputs, outputs = self.shape
        *across, into, out = self.axes
        if not self.packed:
            return Array((*stack, outputs), jnp.float32, (*across, out))
        groups = math.ceil(inputs / GROUP)
        return Array((*stack, groups, outputs), jnp.bfloat16, (*across, into, out))


def check(scheme: str, device: Any) -> None:
    """Raises ConfigError for fp8 on a chip without it; a CPU emulates it."""
    kind = getattr(device, "device_kind", "")
    if scheme != "fp8" or device.platform == "cpu":
        return
    if device.platform == "tpu":
        has = not re.match(r"TPU v[2-5](?!\d)", kind)  # jax.experimental.pallas.tpu's TpuInfo
    else:
        capability = str(getattr(device, "compute_capability", ""))
        has = bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.9
    if not has:
        raise ConfigError(
            f"model.quantize is 'fp8', which {kind or device.platform} does not have",
            fix="--config.model.quantize=int8, as small and at least as exact",
        )


def quantize(kernel: jax.Array, scheme: str) -> tuple[jax.Array, jax.Array]:
    """Kernel [..., I, O] -> (values, scale), each value the nearest there is.

    What is not finite is so in the scale, and so in every weight under it afterwards.
    """
    kernel = kernel.astype(jnp.float32)
    if scheme not in _WHOLE:
        *stack, inputs, outputs = kernel.shape
        rest = [(0, 0)] * len(stack) + [(0, -inputs % GROUP), (0, 0)]
        kernel = jnp.pad(kernel, rest).reshape(*stack, -1, GROUP, outputs)
    # Codes are of the scale as it is kept, so its rounding adds nothing to their error.
    kind = jnp.float32 if scheme in _WHOLE else jnp.bfloat16
    scale = (jnp.max(jnp.abs(kernel), axis=-2) / _MOST[scheme]).astype(kind)
    ratio = kernel / jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None, :]
    if scheme == "int8":
        return jnp.clip(jnp.round(ratio), -127, 127).astype(jnp.int8), scale
    if scheme == "fp8":
        return jnp.clip(ratio, -448, 448).astype(jnp.float8_e4m3fn), scale
    if scheme == "int4":
        codes = (jnp.clip(jnp.round(ratio), -7, 7) + 8).astype(jnp.uint8)
    else:
        between = [(low + high) / 2 for low, high in pairwise(NF4)]
        codes = sum((ratio > middle).astype(jnp.uint8) for middle in between)
    low, high = jnp.split(codes, 2, axis=-2)
    return low | (high << 4), scale


def dequantize(values: jax.Array, scale: jax.Array, layout: Layout, dtype) -> jax.Array:
    """The kernel [..., I, O] that is kept so, in `dtype`; the layout's stack does not matter."""
    scale = scale.astype(jnp.float32)
    if not layout.packed:
        return (values.astype(jnp.float32) * scale[..., None, :]).astype(dtype)
    codes = jnp.stack([values & 15, values >> 4], axis=-3).astype(jnp.int32)
    kernel = (_decode(codes, layout.scheme) * scale[..., None, None, :]).astype(dtype)
    *stack, outputs = (*values.shape[:-3], values.shape[-1])
    return kernel.reshape(*stack, -1, outputs)[..., : layout.shape[-2], :]


def _decode(codes: jax.Array, scheme: str, shift: int = 0) -> jax.Array:
    """int32 with codes 0 to 15 from bit `shift` on -> float32 under the scale."""
    if scheme == "int4":
        return ((codes >> shift & 15) - 8).astype(jnp.float32)
    # A tree of selects by the bits of the code: a TPU gathers single numbers slowly.
    table: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(shift, shift + 4):
        is_set = codes & (1 << bit) != 0
        table = [jnp.where(is_set, *pair) for pair in zip(table[1::2], table[::2], strict=True)]
    return table[0]


def matmul(
    x_BTI: jax.Array, values: jax.Array, scale: jax.Array, layout: Layout, out=None
) -> jax.Array:
    """x W in the dtype `out` (that of x by default), multiplied in that of x, summed in float32.

    Only x has a gradient. The backward pass is left with the values and no copy of the kernel, and
    in a mesh it is the values that travel.
    """
    return _matmul(x_BTI, values, scale, layout, x_BTI.dtype, x_BTI.dtype if out is None else out)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _matmul(x_BTI, values, scale, layout: Layout, kind, out):
    values = gathered(values, layout.values.axes)
    scale = gathered(scale, layout.scale.axes)
    if layout.packed:
        kernels = _halves(values, scale, layout.scheme, kind)
        parts = zip(_split(x_BTI), kernels, strict=True)
        y_BTO = sum(_einsum("...J,JO->...O", x_BTJ, kernel_JO) for x_BTJ, kernel_JO in parts)
    else:  # such values are exact in bfloat16
        y_BTO = _einsum("...I,IO->...O", x_BTI, values.astype(kind)) * scale
    return jnp.asarray(y_BTO, out)


def _forward(x_BTI, values, scale, layout: Layout, kind, out):
    return _matmul(x_BTI, values, scale, layout, kind, out), (values, scale)


def _backward(layout: Layout, kind, out, residuals, dy_BTO):
    del out
    values = gathered(residuals[0], layout.values.axes)
    scale = gathered(residuals[1], layout.scale.axes)
    if layout.packed:
        dy_BTO, kernels = dy_BTO.astype(kind), _halves(values, scale, layout.scheme, kind)
        parts = [_einsum("...O,JO->...J", dy_BTO, kernel_JO).astype(kind) for kernel_JO in kernels]
        return _join(parts)[..., : layout.shape[-2]], None, None
    dx_BTI = _einsum("...O,IO->...I", (dy_BTO * scale).astype(kind), values.astype(kind))
    return dx_BTI.astype(kind), None, None


_matmul.defvjp(_forward, _backward)
_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _halves(values_GPO: jax.Array, scale_GO: jax.Array, scheme: str, kind) -> list[jax.Array]:
    """The two kernels [J, O] of the inputs J in low halves of bytes, and in high ones.

    Multiplied one by one: to bring them in the order of the inputs costs a TPU more than to unpack
    them (NF4, 2048 tokens on a v5e: 72% of the product instead of 42%, by its compiler).
    """
    codes_GPO = values_GPO.astype(jnp.int32)
    scale_GPO = scale_GO.astype(jnp.float32)[:, None]
    halves = [_decode(codes_GPO, scheme, shift) * scale_GPO for shift in (0, 4)]
    return [half.astype(kind).reshape(-1, values_GPO.shape[-1]) for half in halves]


def _split(x_BTI: jax.Array) -> list[jax.Array]:
    """Activations -> [B, T, J] of the inputs in low halves, and of those in high ones."""
    *rows, inputs = x_BTI.shape
    x_BTI = jnp.pad(x_BTI, [(0, 0)] * len(rows) + [(0, -inputs % GROUP)])
    x_BTGHP = x_BTI.reshape(*rows, -1, 2, _PACKED)
    return [x_BTGHP[..., half, :].reshape(*rows, -1) for half in (0, 1)]


def _join(parts: list[jax.Array]) -> jax.Array:
    """The inverse of `_split`, with the inputs that fill up the last group."""
    rows = parts[0].shape[:-1]
    x_BTGHP = jnp.stack([part.reshape(*rows, -1, _PACKED) for part in parts], axis=-2)
    return x_BTGHP.reshape(*rows, -1)


def grouped(
    x_MI: jax.Array, values: jax.Array, scale: jax.Array, layout: Layout, plan: experts.Plan
) -> jax.Array:
    """`experts.grouped` with kernels [E, I, O] that are kept so; only x has a gradient.

    Checkpoints keep copies of kernels, and a scale for every row, out of the residuals.
    """
    if not layout.packed:
        y_MO = experts.grouped(x_MI, values, plan)

        @jax.checkpoint
        def scaled(y_MO, scale_EO, sizes_E):
            row_M = jnp.arange(len(y_MO))
            expert_M = jnp.sum(row_M[:, None] >= jnp.cumsum(sizes_E)[:-1], axis=1)
            return (y_MO * scale_EO[expert_M]).astype(y_MO.dtype)

        return scaled(y_MO, scale, plan.sizes_E)

    @jax.checkpoint
    def product(x_MI, values, scale, plan):
        return experts.grouped(x_MI, dequantize(values, scale, layout, x_MI.dtype), plan)

    return product(x_MI, values, scale, plan)
