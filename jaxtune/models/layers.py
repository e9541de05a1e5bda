"""The blocks every decoder is made of.

Letters: B rows, T tokens, S tokens attended to, D model width, F mlp width, N query heads, K key
and value heads, H width of a head, V vocabulary, R adapter rank, I and O inputs and outputs of a
linear. `stack` is the leading shape of parameters whose layers are stacked for `jax.lax.scan`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from jaxtune.kernels.attention import attention

Axes = tuple[str | None, ...]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (arXiv 2104.09864) and Hugging Face's scalings of it."""

    theta: float = 10000.0
    kind: str = "default"  # or linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    original_max_position: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position, float32 [H/2]."""
        freq = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        if self.kind == "linear":
            freq = freq / self.factor
        if self.kind == "llama3":
            wavelength = 2 * np.pi / freq
            low, high = self.low_freq_factor, self.high_freq_factor
            smooth = (self.original_max_position / wavelength - low) / (high - low)
            smooth = np.clip(smooth, 0.0, 1.0)  # 0: all scaled, 1: kept
            freq = (1 - smooth) * freq / self.factor + smooth * freq
        return freq.astype(np.float32)


class Cache(NamedTuple):
    """Keys and values of earlier tokens; slots from `offset` on are written by the next call."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


class Dropout(NamedTuple):
    """Dropout on the input of adapters: a traced rate and the key of this layer and step."""

    rate: jax.Array
    key: jax.Array


class Context(NamedTuple):
    """What all layers of one call share."""

    sin_BTH: jax.Array  # float32 [B, T, H/2]
    cos_BTH: jax.Array
    segments_BT: jax.Array  # int32; tokens attend within their own segment
    segments_BS: jax.Array  # of the keys: equal to segments_BT without a cache
    offset: jax.Array | int  # slot of the first query among the keys


def param(
    rngs: nnx.Rngs, stack: tuple[int, ...], shape: tuple[int, ...], axes: Axes, init, dtype
) -> nnx.Param:
    """Declares an array once: its shape, logical axes, initialiser and dtype."""
    value = init(rngs.params(), (*stack, *shape), dtype)
    return nnx.Param(value, axes=(*("layers",) * len(stack), *axes))


@jax.custom_vjp
def low_rank(x_BTI: jax.Array, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """x A B in the dtype of x; gradients of A and B in their own."""
    return _low_rank_forward(x_BTI, a_IR, b_RO)[0]


def _low_rank_forward(x_BTI, a_IR, b_RO):
    x_BTR = x_BTI @ a_IR.astype(x_BTI.dtype)
    return x_BTR @ b_RO.astype(x_BTI.dtype), (x_BTI, x_BTR, a_IR, b_RO)


def _low_rank_backward(residuals, dy_BTO):
    # XLA's CPU compiler folds the transposes of automatic gradients into these products and pays
    # with a transposed copy of a wide operand. Apart from them, a LoRA step takes 19% less time.
    x_BTI, x_BTR, a_IR, b_RO = residuals
    dy_BTR = jnp.einsum("BTO,RO->BTR", dy_BTO, b_RO.astype(dy_BTO.dtype))
    da_RI = jnp.einsum("BTR,BTI->RI", dy_BTR, x_BTI, preferred_element_type=a_IR.dtype)
    db_RO = jnp.einsum("BTR,BTO->RO", x_BTR, dy_BTO, preferred_element_type=b_RO.dtype)
    da_RI, db_RO = jax.lax.optimization_barrier((da_RI, db_RO))
    return jnp.einsum("BTR,IR->BTI", dy_BTR, a_IR.astype(dy_BTO.dtype)), da_RI.T, db_RO


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Adapter(nnx.Module):
    """Low-rank update of a projection (arXiv 2106.09685): x A B, scaled; PEFT stores A.T, B.T."""

    def __init__(
        self,
        rank: int,
        shape: tuple[int, int],
        axes: Axes,
        scale: float,
        salt: int,
        *,
        stack: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        # Uniform in +-1/sqrt(I): PEFT's kaiming_uniform with a = sqrt(5).
        init_a = initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack)))
        )
        self.A = param(rngs, stack, (shape[0], rank), (axes[0], None), init_a, jnp.float32)
        self.B = param(
            rngs, stack, (rank, shape[1]), (None, axes[1]), initializers.zeros, jnp.float32
        )
        self.scale = param(rngs, stack, (), (), initializers.constant(scale), jnp.float32)
        self.salt = salt  # sets this adapter's dropout apart from its neighbours'

    def __call__(self, x_BTI: jax.Array, dropout: Dropout | None) -> jax.Array:
        if dropout is not None:
            keep = 1 - dropout.rate
            mask = jax.random.bernoulli(
                jax.random.fold_in(dropout.key, self.salt), keep, x_BTI.shape
            )
            x_BTI = jnp.where(mask, x_BTI / keep.astype(x_BTI.dtype), 0)
        return low_rank(x_BTI, self.A[...], self.B[...] * self.scale[...])


class Linear(nnx.Module):
    """x W + b, plus a low-rank adapter once one is inserted."""

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
        self.lora: Adapter | None = nnx.data(None)  # an adapter may follow

    def __call__(self, x_BTI: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        y_BTO = x_BTI @ self.kernel[...].astype(x_BTI.dtype)
        if self.bias is not None:
            y_BTO += self.bias[...].astype(x_BTI.dtype)
        return y_BTO if self.lora is None else y_BTO + self.lora(x_BTI, dropout)


class Embedding(nnx.Module):
    """A table with one row per token: the input embedding, or the output head."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs, dtype):
        init = initializers.normal(0.02)
        self.embedding = param(rngs, (), (vocab, width), ("vocab", "embed"), init, dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.scale = param(rngs, stack, (width,), (None,), initializers.ones, dtype)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)


def rotate(x_BTNH: jax.Array, context: Context) -> jax.Array:
    """Half-split rotation, Hugging Face's layout of rotary embeddings."""
    sin, cos = context.sin_BTH[:, :, None, :], context.cos_BTH[:, :, None, :]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.head_dim = config.head_dim
        width, q_width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim

        def linear(shape, axes, bias):
            return Linear(shape, axes, bias=bias, stack=stack, rngs=rngs, dtype=dtype)

        self.q_proj = linear((width, q_width), ("embed", "heads"), config.qkv_bias)
        self.k_proj = linear((width, kv_width), ("embed", "heads"), config.qkv_bias)
        self.v_proj = linear((width, kv_width), ("embed", "heads"), config.qkv_bias)
        self.o_proj = linear((q_width, width), ("heads", "embed"), config.o_bias)

    def __call__(self, x_BTD, context: Context, dropout: Dropout | None, cache: Cache | None):
        def heads(x):
            return x.reshape(*x.shape[:2], -1, self.head_dim)

        q_BTNH = rotate(heads(self.q_proj(x_BTD, dropout)), context)
        k_BSKH = rotate(heads(self.k_proj(x_BTD, dropout)), context)
        v_BSKH = heads(self.v_proj(x_BTD, dropout))
        if cache is not None:
            start = (0, context.offset, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(cache.k_BSKH, k_BSKH, start)
            v_BSKH = jax.lax.dynamic_update_slice(cache.v_BSKH, v_BSKH, start)
            cache = Cache(k_BSKH, v_BSKH)
        out_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            context.segments_BT,
            context.segments_BS,
            context.offset,
            scale=self.head_dim**-0.5,
        )
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1), dropout), cache


class MLP(nnx.Module):
    """Gated feed-forward block (arXiv 2002.05202)."""

    def __init__(self, config, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.activation = config.activation

        def linear(shape, axes):
            return Linear(shape, axes, bias=config.mlp_bias, stack=stack, rngs=rngs, dtype=dtype)

        inner = (config.hidden_size, config.intermediate_size)
        self.gate_proj = linear(inner, ("embed", "mlp"))
        self.up_proj = linear(inner, ("embed", "mlp"))
        self.down_proj = linear(inner[::-1], ("mlp", "embed"))

    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None) -> jax.Array:
        gate_BTF = ACTIVATIONS[self.activation](self.gate_proj(x_BTD, dropout))
        return self.down_proj(gate_BTF * self.up_proj(x_BTD, dropout), dropout)
