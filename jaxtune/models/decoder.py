"""One decoder for every causal family: embedding, scanned layers, norm, head."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.vocabulary import look_up
from jaxtune.models.layers import (
    MLP,
    Attention,
    Cache,
    Context,
    Dropout,
    Embedding,
    RMSNorm,
    Rope,
)
from jaxtune.sharding import constrain_batch


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder; `families` makes one from a Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope: Rope = field(default_factory=Rope)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False


class KVCache(NamedTuple):
    """Cache of all layers, one entry a stack: `{name: Cache}` of [L, B, S, K, H] arrays."""

    stacks: dict[str, Cache]
    segments_BS: jax.Array  # 0 marks slots that hold nothing or padding
    offset: jax.Array  # tokens written so far


class DecoderLayer(nnx.Module):
    def __init__(self, config: DecoderConfig, **kwargs: Any):
        def norm():
            return RMSNorm(config.hidden_size, config.norm_eps, **kwargs)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, **kwargs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, **kwargs)

    def __call__(self, x_BTD, context: Context, dropout: Dropout | None, cache: Cache | None):
        attended, cache = self.self_attn(self.input_layernorm(x_BTD), context, dropout, cache)
        x_BTD = x_BTD + attended
        x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), dropout)
        return constrain_batch(x_BTD), cache


# What the backward pass may keep of a layer instead of recomputing it.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": lambda layer: jax.checkpoint(
        layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": jax.checkpoint,
}


class Decoder(nnx.Module):
    """A causal language model. `model(tokens_BT)` gives float32 logits [B, T, V].

    `stacks` are the runs [start, stop) of layers whose parameters are stacked and scanned together;
    by default all layers are one run.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "full",
        stacks: tuple[tuple[int, int], ...] = (),
    ):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        kwargs: dict[str, Any] = {"rngs": rngs, "dtype": param_dtype}
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **kwargs)
        self.layers = nnx.Dict(
            {
                f"{start}-{stop - 1}": DecoderLayer(config, stack=(stop - start,), **kwargs)
                for start, stop in stacks or ((0, config.num_layers),)
            }
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, stack=(), **kwargs)
        if not config.tie_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, **kwargs)

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix: lm_head, or the input embedding when they are tied."""
        source = self.embed_tokens if self.config.tie_embeddings else self.lm_head
        return source.embedding[...].astype(self.dtype)

    def __call__(self, tokens_BT, positions_BT=None, segments_BT=None) -> jax.Array:
        x_BTD = self.hidden(tokens_BT, positions_BT, segments_BT)
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.head_VD, preferred_element_type=jnp.float32)

    def hidden(
        self, tokens_BT, positions_BT=None, segments_BT=None, dropout: Dropout | None = None
    ) -> jax.Array:
        """Activations after the last norm, [B, T, D], for the head to read.

        Positions default to 0, 1, 2, ...; segments to one document a row.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        context = self._context(positions_BT, segments_BT, segments_BT, 0)
        return self._run(tokens_BT, context, dropout, None)[0]

    def decode(self, tokens_BT, positions_BT, segments_BT, cache: KVCache):
        """Like `hidden` for tokens that follow those in the cache; returns (x_BTD, new cache)."""
        segments_BS = jax.lax.dynamic_update_slice(
            cache.segments_BS, segments_BT, (0, cache.offset)
        )
        context = self._context(positions_BT, segments_BT, segments_BS, cache.offset)
        x_BTD, stacks = self._run(tokens_BT, context, None, cache.stacks)
        return x_BTD, KVCache(stacks, segments_BS, cache.offset + tokens_BT.shape[1])

    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """Room for `slots` tokens of each of `rows` texts."""
        heads = (self.config.num_kv_heads, self.config.head_dim)
        shapes = {k: (_depth(layer), rows, slots, *heads) for k, layer in self.layers.items()}
        stacks = {k: Cache(jnp.zeros(s, self.dtype), jnp.zeros(s, self.dtype))
                  for k, s in shapes.items()}  # fmt: skip
        return KVCache(stacks, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32))

    def _context(self, positions_BT, segments_BT, segments_BS, offset) -> Context:
        frequencies = self.config.rope.frequencies(self.config.head_dim)
        angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies
        return Context(jnp.sin(angles_BTH), jnp.cos(angles_BTH), segments_BT, segments_BS, offset)

    def _run(self, tokens_BT, context: Context, dropout: Dropout | None, caches):
        x_BTD = look_up(self.embed_tokens.embedding[...], tokens_BT).astype(self.dtype)
        x_BTD = constrain_batch(x_BTD)
        new_caches = {}
        for salt, (name, stack) in enumerate(self.layers.items()):
            graphdef, params = nnx.split(stack)

            def layer(x_BTD, scanned, graphdef=graphdef):
                params, key, cache = scanned
                drop = None if dropout is None else Dropout(dropout.rate, key)
                return nnx.merge(graphdef, params)(x_BTD, context, drop, cache)

            keys = None
            if dropout is not None:
                keys = jax.random.split(jax.random.fold_in(dropout.key, salt), _depth(stack))
            scanned = (params, keys, None if caches is None else caches[name])
            x_BTD, new_caches[name] = jax.lax.scan(REMAT[self.remat](layer), x_BTD, scanned)
        return self.norm(x_BTD), new_caches


def _depth(stack: DecoderLayer) -> int:
    return stack.input_layernorm.scale.shape[0]
