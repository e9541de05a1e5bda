"""Attention, feed-forward and the layer around them: one block for every family, set by switches.

Letters as in layers.py; also R rotary tables of a model, M rows that are each one expert's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from jaxtune.kernels import experts
from jaxtune.kernels.attention import attention
from jaxtune.models.layers import Dropout, Linear, Norm, activate, param
from jaxtune.models.rope import Rope, rotate
from jaxtune.sharding import constrain_batch


class Pattern(NamedTuple):
    """What a layer is told beside its parameters."""

    window: Any  # tokens it sees, 0 is all
    rope: Any  # which rotary table it uses
    scale: Any  # factor of its queries


@dataclass(frozen=True)
class Experts:
    """A sparse feed-forward block: each token goes to the best `per_token` of `count` experts."""

    count: int
    per_token: int
    intermediate_size: int
    normalize: bool  # the chosen experts' probabilities are made to sum to one
    balance_weight: float = 0.0  # of the load balancing loss, where the checkpoint asks for it


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and switches of a model's layers; families make one from a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-6
    norm: str = "rms"  # see layers.Norm
    norm_bias: bool = False
    # Where: "pre" before attention and mlp; "post" on what they give; "sandwich" both;
    # "residual" after what they give is added, as in BERT.
    norms: str = "pre"
    activation: str = "silu"
    mlp: str = "gated"  # "fused": gate and up are one matrix; "plain": no gate
    fused_qkv: bool = False  # query, key and value are one matrix
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""  # of query and key: "head" each head, "width" all heads together
    query_scale: float = 0.0  # of scores; 0 is head_dim ** -0.5
    scale_by_layer: bool = False  # scores of layer i are also divided by i + 1
    softcap: float = 0.0  # of scores: softcap * tanh(scores / softcap)
    ropes: tuple[Rope, ...] = (Rope(),)
    float_rope: bool = False  # rotates in float32, and not in the dtype of the computation
    rope_of: tuple[int, ...] = ()  # which of them each layer uses; empty: all the first
    windows: tuple[int, ...] = ()  # tokens each layer sees, 0 is all; empty: all of them
    bare_start: bool = False  # layer 0 has no norm before its attention (ModernBERT)
    causal: bool = True
    experts: Experts | None = None
    sparse: tuple[bool, ...] = ()  # layers that have experts; empty: all, when there are experts
    num_labels: int = 0  # of a classifier; 0 is a language model

    def kind(self, layer: int) -> tuple[bool, bool]:
        """(has experts, has no first norm): what makes the parameters of a layer others."""
        sparse = self.experts is not None and (self.sparse[layer] if self.sparse else True)
        return sparse, self.bare_start and layer == 0

    def pattern(self, start: int, stop: int) -> Pattern:
        """What differs between layers [start, stop): numbers where all agree, else arrays [L]."""

        def joined(values: Sequence[Any], dtype):
            some = tuple(values[start:stop]) or (0,)
            return some[0] if len(set(some)) == 1 else np.asarray(some, dtype)

        scales = [1 / (i + 1) if self.scale_by_layer else 1.0 for i in range(self.num_layers)]
        return Pattern(
            joined(self.windows, np.int32),
            joined(self.rope_of, np.int32),
            joined(scales, np.float32),
        )


class Cache(NamedTuple):
    """Keys and values of earlier tokens; slots from `offset` on are written by the next call."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


class Context(NamedTuple):
    """What all layers of one call share."""

    angles: tuple[jax.Array, jax.Array]  # sine and cosine, float32 [R, B, T, H/2] each
    segments_BT: jax.Array  # int32; tokens attend within their own segment
    segments_BS: jax.Array  # of the keys: equal to segments_BT without a cache
    offset: jax.Array | int  # slot of the first query among the keys


def context(config: LayerConfig, positions_BT, segments_BT, segments_BS, offset) -> Context:
    """Rotary angles of these positions, made once for all layers."""
    tables = [rope.angles(positions_BT, config.head_dim) for rope in config.ropes]
    sin, cos = (jnp.stack(parts) for parts in zip(*tables, strict=True))
    return Context((sin, cos), segments_BT, segments_BS, offset)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: LayerConfig, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.config = config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width, q_width, kv_width = config.hidden_size, heads * head_dim, kv_heads * head_dim

        def linear(shape, axes, bias):
            return Linear(shape, axes, bias=bias, stack=stack, rngs=rngs, dtype=dtype)

        into, bias = ("embed", "heads"), config.qkv_bias
        if config.fused_qkv:
            self.qkv_proj = linear((width, q_width + 2 * kv_width), into, bias)
        else:
            self.q_proj = linear((width, q_width), into, bias)
            self.k_proj = linear((width, kv_width), into, bias)
            self.v_proj = linear((width, kv_width), into, bias)
        self.o_proj = linear((q_width, width), into[::-1], config.o_bias)
        if config.qk_norm:

            def norm(count: int):
                wide = head_dim * (count if config.qk_norm == "width" else 1)
                return Norm(wide, config.norm_eps, config.norm, stack=stack, rngs=rngs, dtype=dtype)

            self.q_norm, self.k_norm = norm(heads), norm(kv_heads)

    def __call__(
        self,
        x_BTD,
        context: Context,
        pattern: Pattern,
        dropout: Dropout | None,
        cache: Cache | None,
    ):
        config = self.config
        q_BTNH, k_BSKH, v_BSKH = self._project(x_BTD, dropout)
        kind = jnp.float32 if config.float_rope else x_BTD.dtype
        sin, cos = (table[pattern.rope].astype(kind) for table in context.angles)
        q_BTNH, k_BSKH = rotate(q_BTNH, sin, cos), rotate(k_BSKH, sin, cos)
        if self.config.scale_by_layer:
            q_BTNH = q_BTNH * jnp.asarray(pattern.scale, q_BTNH.dtype)
        if cache is not None:
            start = (0, context.offset, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(cache.k_BSKH, k_BSKH, start)
            v_BSKH = jax.lax.dynamic_update_slice(cache.v_BSKH, v_BSKH, start)
            cache = Cache(k_BSKH, v_BSKH)
        with jax.named_scope("attention"):  # jaxtune plan finds it by this
            out_BTNH = attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                context.segments_BT,
                context.segments_BS,
                context.offset,
                scale=config.query_scale or config.head_dim**-0.5,
                softcap=config.softcap,
                window=pattern.window,
                windows=tuple(sorted({*config.windows})),
                causal=config.causal,
            )
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1), dropout), cache

    def _project(self, x_BTD, dropout: Dropout | None) -> list[jax.Array]:
        """-> q [B, T, N, H], k and v [B, T, K, H], normalised where the family does so."""
        config = self.config
        if config.fused_qkv:
            sizes = np.cumsum([config.num_heads, config.num_kv_heads]) * config.head_dim
            parts = jnp.split(self.qkv_proj(x_BTD, dropout), sizes, axis=-1)
        else:
            parts = [proj(x_BTD, dropout) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        parts = [checkpoint_name(part, "qkv") for part in parts]
        if config.qk_norm == "width":
            parts[:2] = self.q_norm(parts[0]), self.k_norm(parts[1])
        parts = [part.reshape(*part.shape[:2], -1, config.head_dim) for part in parts]
        if config.qk_norm == "head":
            parts[:2] = self.q_norm(parts[0]), self.k_norm(parts[1])
        return parts


class MLP(nnx.Module):
    """Feed-forward block, gated (arXiv 2002.05202) or plain."""

    def __init__(self, config: LayerConfig, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.kind, self.activation = config.mlp, config.activation

        def linear(shape, axes):
            return Linear(shape, axes, bias=config.mlp_bias, stack=stack, rngs=rngs, dtype=dtype)

        width, inner, axes = config.hidden_size, config.intermediate_size, ("embed", "mlp")
        if config.mlp == "fused":
            self.gate_up_proj = linear((width, 2 * inner), axes)
        else:
            self.up_proj = linear((width, inner), axes)
        if config.mlp == "gated":
            self.gate_proj = linear((width, inner), axes)
        self.down_proj = linear((inner, width), axes[::-1])

    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None) -> jax.Array:
        if self.kind == "plain":
            up_BTF = checkpoint_name(self.up_proj(x_BTD, dropout), "mlp")
            inner_BTF = activate(self.activation, up_BTF)
            return self.down_proj(inner_BTF, dropout)
        if self.kind == "fused":
            both_BTF = checkpoint_name(self.gate_up_proj(x_BTD, dropout), "mlp")
            gate_BTF, up_BTF = jnp.split(both_BTF, 2, axis=-1)
        else:
            gate_BTF = checkpoint_name(self.gate_proj(x_BTD, dropout), "mlp")
            up_BTF = checkpoint_name(self.up_proj(x_BTD, dropout), "mlp")
        return self.down_proj(activate(self.activation, gate_BTF) * up_BTF, dropout)


class SparseMLP(nnx.Module):
    """Gated feed-forward of the best experts of each token (arXiv 2101.03961, 2401.04088)."""

    def __init__(self, config: LayerConfig, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        assert config.experts is not None
        self.config, self.activation = config.experts, config.activation
        count, inner = config.experts.count, config.experts.intermediate_size
        self.router = Router(config.hidden_size, count, stack=stack, rngs=rngs, dtype=dtype)

        def linear(shape, axes):
            inside = (*stack, count)
            return Linear(shape, axes, bias=False, stack=inside, rngs=rngs, dtype=dtype)

        width, axes = config.hidden_size, ("embed", "mlp")
        self.experts = nnx.Dict(
            gate_proj=linear((width, inner), axes),
            up_proj=linear((width, inner), axes),
            down_proj=linear((inner, width), axes[::-1]),
        )

    def __call__(self, x_BTD: jax.Array, segments_BT, dropout: Dropout | None):
        """-> (what the experts give, how the real tokens were shared out)."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        all_NE = jax.nn.softmax(self.router(x_ND).astype(jnp.float32), axis=-1)
        probs_NK, chosen_NK = jax.lax.top_k(all_NE, self.config.per_token)
        if self.config.normalize:
            probs_NK = probs_NK / probs_NK.sum(axis=-1, keepdims=True)
        graphdef, params = nnx.split(self.experts)

        def forward(params, dropout, x_MD, plan):
            linears = nnx.merge(graphdef, params)

            def project(name: str, x):
                linear: Linear = linears[name]
                y = linear.grouped(x, plan)
                return y if linear.lora is None else linear.lora.grouped(x, y, dropout, plan)

            gate_MF = activate(self.activation, project("gate_proj", x_MD))
            return project("down_proj", gate_MF * project("up_proj", x_MD))

        real_N = segments_BT.reshape(-1) > 0
        visited_NK = jnp.where(real_N[:, None], chosen_NK, self.config.count)  # padding: none
        y_ND = experts.routed(x_ND, visited_NK, probs_NK, params, forward, dropout)
        return y_ND.reshape(x_BTD.shape), experts.balance(all_NE, chosen_NK, real_N)


class Router(nnx.Module):
    """Scores of the experts. No projection in PEFT's sense, so no adapter goes there."""

    def __init__(self, width: int, count: int, *, stack: tuple[int, ...], rngs: nnx.Rngs, dtype):
        init = initializers.normal(0.02)
        self.weight = param(rngs, stack, (count, width), (None, "embed"), init, dtype)

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        return x_ND @ self.weight[...].astype(x_ND.dtype).T


# Names of a layer's norms: before attention, after it, before the mlp, after it.
_NORMS = {
    "pre": ("input_layernorm", "", "post_attention_layernorm", ""),
    "post": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "residual": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def _same(x_BTD: jax.Array) -> jax.Array:
    return x_BTD


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each added to what came in."""

    def __init__(
        self,
        config: LayerConfig,
        kind: tuple[bool, bool] = (False, False),
        *,
        stack: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype,
    ):
        kwargs: dict[str, Any] = {"stack": stack, "rngs": rngs, "dtype": dtype}
        sparse, bare = kind
        self.norms = config.norms
        for name in filter(None, _NORMS[config.norms][1 if bare else 0 :]):
            norm = Norm(
                config.hidden_size, config.norm_eps, config.norm, bias=config.norm_bias, **kwargs
            )
            setattr(self, name, norm)
        self.self_attn = Attention(config, **kwargs)
        self.mlp = (SparseMLP if sparse else MLP)(config, **kwargs)

    def __call__(self, x_BTD, context: Context, pattern: Pattern, dropout, cache):
        """-> (x, cache, Balance of the experts or None)."""
        x_BTD = checkpoint_name(x_BTD, "layer")
        before, after, before_mlp, after_mlp = (
            getattr(self, name, _same) for name in _NORMS[self.norms]
        )

        def add(x_BTD, given_BTD, norm):
            return norm(x_BTD + given_BTD) if self.norms == "residual" else x_BTD + norm(given_BTD)

        given_BTD, cache = self.self_attn(before(x_BTD), context, pattern, dropout, cache)
        x_BTD = add(x_BTD, given_BTD, after)
        balance = None
        if isinstance(self.mlp, SparseMLP):
            given_BTD, balance = self.mlp(before_mlp(x_BTD), context.segments_BT, dropout)
        else:
            given_BTD = self.mlp(before_mlp(x_BTD), dropout)
        return constrain_batch(add(x_BTD, given_BTD, after_mlp)), cache, balance
