"""Products of activations with kernels, in the form that a platform is fast at.

XLA's CPU compiler multiplies bfloat16 natively where the processor can (AVX512_BF16, AMX), but only
into float32: a bfloat16 result takes two to five times as long. So on a CPU products are made in
float32 and rounded after, which gives the same numbers.

Letters: B rows, T tokens, I and O inputs and outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxtune.sharding import platform


def einsum(spec: str, a: jax.Array, b: jax.Array, kind: Any = None) -> jax.Array:
    """The product of two arrays of one dtype, in the dtype `kind` (by default theirs)."""
    kind = jnp.dtype(kind or a.dtype)
    inside = jnp.float32 if kind == jnp.bfloat16 and platform() == "cpu" else kind
    return jnp.einsum(spec, a, b, preferred_element_type=inside).astype(kind)


def matmul(x_BTI: jax.Array, kernel_IO: jax.Array, kind: Any = None) -> jax.Array:
    """x W in the dtype `kind`, x and W being of one dtype; differentiable in both."""
    y_BTO: Any = _matmul(x_BTI, kernel_IO, jnp.dtype(kind or x_BTI.dtype))
    return y_BTO


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_BTI, kernel_IO, kind) -> jax.Array:
    return einsum("...I,IO->...O", x_BTI, kernel_IO, kind)


def _forward(x_BTI, kernel_IO, kind):
    # A frozen kernel has no gradient, so its input need not be kept.
    kept_BTI = x_BTI.value if kernel_IO.perturbed else None
    return _matmul(x_BTI.value, kernel_IO.value, kind), (kept_BTI, kernel_IO.value)


def _backward(kind, residuals, dy_BTO):
    x_BTI, kernel_IO = residuals
    if isinstance(dy_BTO, SymbolicZero):
        return None, None
    dy_BTO = dy_BTO.astype(kernel_IO.dtype)
    dx_BTI = einsum("...O,IO->...I", dy_BTO, kernel_IO)
    if x_BTI is None:
        return dx_BTI, None
    x_NI, dy_NO = (a.reshape(-1, a.shape[-1]) for a in (x_BTI, dy_BTO))
    return dx_BTI, einsum("NI,NO->IO", x_NI, dy_NO)


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
