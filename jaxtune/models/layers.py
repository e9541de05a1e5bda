"""The parts every model is made of: declared arrays, projections, tables and norms.

Letters: B rows, T tokens, S tokens attended to, D model width, F mlp width, N query heads, K key
and value heads, H width of a head, V vocabulary, E experts, R adapter rank, I and O inputs and
outputs of a linear. `stack` is the leading shape of parameters that are stacked: (L,) for layers,
(L, E) for experts in layers, () outside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtune.kernels import experts, products, quantize

if TYPE_CHECKING:
    from jaxtune.models.adapter import Adapter

Axes = tuple[str | None, ...]
_STACK_AXES = ("layers", "experts")

_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
ACTIVATIONS = tuple(_FUNCTIONS)


def activate(name: str, x: jax.Array) -> jax.Array:
    """One of ACTIVATIONS, in float32 and rounded once."""
    return _FUNCTIONS[name](x.astype(jnp.float32)).astype(x.dtype)


class Dropout(NamedTuple):
    """Dropout on the input of adapters, every row with a rate and a key of its own.

    What a row loses depends on its key alone, so not on how a batch is cut into micro-batches or
    over devices, nor on which layers are stacked together.
    """

    rate_B: jax.Array
    key_B: jax.Array

    @classmethod
    def of_rows(cls, rate: jax.Array, key: jax.Array, rows: jax.Array) -> Dropout:
        """For the rows of these numbers [B] in a step's batch; rate and key are the step's."""
        keys_B = jax.vmap(partial(jax.random.fold_in, key))(rows)
        return cls(jnp.broadcast_to(rate, rows.shape), keys_B)

    def fold(self, number: jax.Array | int) -> Dropout:
        """Apart from that of other layers, or of other adapters in one."""
        fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return Dropout(self.rate_B, fold(self.key_B, number))

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        keep_B = 1 - self.rate_B
        draw = jax.vmap(partial(jax.random.bernoulli, shape=x_BTI.shape[1:]))
        keep_B11 = keep_B.astype(x_BTI.dtype)[:, None, None]
        return jnp.where(draw(self.key_B, keep_B), x_BTI / keep_B11, 0)


def param(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: Axes, init, dtype
) -> nnx.Param:
    """Declares an array once: its shape, logical axes, initialiser and dtype."""
    value = init(rngs.params(), (*stack, *shape), dtype)
    return nnx.Param(value, axes=(*_STACK_AXES[: len(stack)], *axes))


class Linear(nnx.Module):
    """x W + b, plus a low-rank adapter once one is inserted. W may be kept in fewer bits."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: Axes,
        *,
        bias: bool,
        stack: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype,
    ):
        self.shape, self.axes, self.stack = shape, axes, stack
        self.kernel = param(rngs, stack, shape, axes, initializers.normal(0.02), dtype)
        self.bias = (
            param(rngs, stack, shape[1:], axes[1:], initializers.zeros, dtype) if bias else None
        )
        self.layout: quantize.Layout | None = None  # of a quantised kernel
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.lora: Adapter | None = nnx.data(None)  # an adapter may follow

    def quantize(self, scheme: str) -> quantize.Layout:
        """Declares the kernel of an abstract model anew, as values and their scale."""
        axes = (*_STACK_AXES[: len(self.stack)], *self.axes)
        layout = quantize.Layout(scheme, (*self.stack, *self.shape), axes)
        self.layout = quantize.Layout(scheme, self.shape, self.axes)
        self.kernel, self.kernel_scale = (
            nnx.Param(jax.ShapeDtypeStruct(array.shape, array.dtype), axes=array.axes)
            for array in (layout.values, layout.scale)
        )
        return layout

    def __call__(self, x_BTI: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        # With a bias the sum is rounded once, as torch does it.
        kind = x_BTI.dtype if self.bias is None else jnp.float32
        y_BTO = self.product(x_BTI, kind)
        if self.lora is not None:
            y_BTO = self.lora(x_BTI, y_BTO, self, dropout)
        if self.bias is not None:
            y_BTO = y_BTO + self.bias[...].astype(x_BTI.dtype).astype(kind)
        return y_BTO.astype(x_BTI.dtype)

    def product(self, x_BTI: jax.Array, kind) -> jax.Array:
        """x W in the dtype `kind`, multiplied in that of x."""
        if self.layout is None:
            kernel_IO = self.kernel[...].astype(x_BTI.dtype)
            return products.matmul(x_BTI, kernel_IO, kind)
        return quantize.matmul(x_BTI, self.kernel[...], self._scale(), self.layout, kind)

    def grouped(self, x_MI: jax.Array, plan: experts.Plan) -> jax.Array:
        """The same for rows that are each one expert's, W [E, I, O]: [M, O]."""
        if self.layout is None:
            return experts.grouped(x_MI, self.kernel[...], plan)
        return quantize.grouped(x_MI, self.kernel[...], self._scale(), self.layout, plan)

    def dense(self, dtype) -> jax.Array:
        """W [I, O] in `dtype`, however it is kept."""
        if self.layout is None:
            return self.kernel[...].astype(dtype)
        return quantize.dequantize(self.kernel[...], self._scale(), self.layout, dtype)

    def _scale(self) -> jax.Array:
        assert self.kernel_scale is not None
        return self.kernel_scale[...]


class Embedding(nnx.Module):
    """A table with one row per token or position: an input embedding, or the output head."""

    def __init__(
        self, rows: int, width: int, *, rngs: nnx.Rngs, dtype, axes: Axes = ("vocab", "embed")
    ):
        init = initializers.normal(0.02)
        self.embedding = param(rngs, (), (rows, width), axes, init, dtype)


class Norm(nnx.Module):
    """Normalises the last axis in float32.

    Kinds: "rms", x / rms(x), cast, times scale (arXiv 1910.07467, as Llama has it); "rms_float",
    scaled before the cast (OLMo 2); "rms_plus_one", the same with 1 + scale (Gemma); "layer",
    LayerNorm (arXiv 1607.06450), with or without a bias.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        kind: str = "rms",
        *,
        bias: bool = False,
        stack: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype,
    ):
        one = initializers.zeros if kind == "rms_plus_one" else initializers.ones
        self.scale = param(rngs, stack, (width,), (None,), one, dtype)
        self.bias = (
            param(rngs, stack, (width,), (None,), initializers.zeros, dtype) if bias else None
        )
        self.eps, self.kind = eps, kind

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms":
            return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)
        scale = self.scale[...].astype(jnp.float32) + (1 if self.kind == "rms_plus_one" else 0)
        normed = normed * scale
        if self.bias is not None:
            normed = normed + self.bias[...].astype(jnp.float32)
        return normed.astype(x.dtype)
