"""One decoder for every causal family: embedding, scanned layers, norm, head."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.experts import Balance
from jaxtune.kernels.vocabulary import look_up
from jaxtune.models.blocks import Cache, LayerConfig, context
from jaxtune.models.layers import Dropout, Embedding, Linear, Norm
from jaxtune.models.stacks import layers_of, make_layers, run_layers
from jaxtune.sharding import constrain_batch


@dataclass(frozen=True)
class DecoderConfig(LayerConfig):
    """Sizes and switches of a decoder; `families` makes one from a Hugging Face config."""

    tie_embeddings: bool = False
    embed_scale: float = 1.0  # embeddings are multiplied by it, rounded to their dtype
    learned_positions: bool = False  # a table of positions is added to the embeddings
    final_softcap: float = 0.0  # of logits: softcap * tanh(logits / softcap)


class KVCache(NamedTuple):
    """Cache of all layers, one entry a stack: `{name: Cache}` of [L, B, S, K, H] arrays."""

    stacks: dict[str, Cache]
    segments_BS: jax.Array  # 0 marks slots that hold nothing or padding
    offset: jax.Array  # tokens written so far


class Decoder(nnx.Module):
    """A causal model. `model(tokens_BT)` gives float32 logits [B, T, V], a classifier's [B, C].

    `stacks` are the runs [start, stop) of layers whose parameters are stacked and scanned together;
    by default the longest runs of layers with the same parameters.
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
        width = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, width, **kwargs)
        if config.learned_positions:
            self.embed_positions = Embedding(
                config.max_position, width, axes=(None, "embed"), **kwargs
            )
        self.layers = make_layers(config, stacks, **kwargs)
        self.norm = Norm(
            width, config.norm_eps, config.norm, bias=config.norm_bias, stack=(), **kwargs
        )
        if config.num_labels:
            axes = ("embed", None)
            self.score = Linear((width, config.num_labels), axes, bias=False, stack=(), **kwargs)
        elif not config.tie_embeddings:
            self.lm_head = Embedding(config.vocab_size, width, **kwargs)

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix: lm_head, or the input embedding when they are tied."""
        source = self.embed_tokens if self.config.tie_embeddings else self.lm_head
        return source.embedding[...].astype(self.dtype)

    def __call__(self, tokens_BT, positions=None, segments=None) -> jax.Array:
        """Logits of every token, or of the class of each row, which is one document then."""
        x_BTD = self.hidden(tokens_BT, positions, segments)
        if not self.config.num_labels:
            return self.logits(x_BTD)
        segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32) if segments is None else segments
        logits_BTC = self.label_logits(x_BTD, jnp.asarray(segments_BT))
        last_B = x_BTD.shape[1] - 1 - jnp.argmax(jnp.asarray(segments_BT)[:, ::-1] > 0, axis=1)
        return logits_BTC[jnp.arange(len(last_B)), last_B]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of what `hidden` gives."""
        logits_BTV = jnp.einsum(
            "BTD,VD->BTV", x_BTD, self.head_VD, preferred_element_type=jnp.float32
        )
        cap = self.config.final_softcap
        return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV

    def label_logits(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """Float32 logits [B, T, C] of the classes; those at the last token of a document count."""
        del segments_BT
        return self.score(x_BTD).astype(jnp.float32)

    def hidden(
        self, tokens_BT, positions_BT=None, segments_BT=None, dropout: Dropout | None = None
    ) -> jax.Array:
        """Activations after the last norm, [B, T, D], for the head to read.

        Positions default to 0, 1, 2, ...; segments to one document a row.
        """
        return self.hidden_and_balance(tokens_BT, positions_BT, segments_BT, dropout)[0]

    def hidden_and_balance(
        self, tokens_BT, positions_BT=None, segments_BT=None, dropout: Dropout | None = None
    ) -> tuple[jax.Array, Balance | None]:
        """`hidden`, and how the tokens were shared out among experts, where there are any."""
        tokens_BT = jnp.asarray(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        segments_BT = jnp.asarray(segments_BT)
        shared = context(self.config, jnp.asarray(positions_BT), segments_BT, segments_BT, 0)
        x_BTD = self._embed(tokens_BT, positions_BT)
        x_BTD, _, balance = run_layers(
            self.layers, self.config, x_BTD, shared, remat=self.remat, dropout=dropout
        )
        return self.norm(x_BTD), balance

    def decode(self, tokens_BT, positions_BT, segments_BT, cache: KVCache):
        """Like `hidden` for tokens that follow those in the cache; returns (x_BTD, new cache)."""
        segments_BS = jax.lax.dynamic_update_slice(
            cache.segments_BS, segments_BT, (0, cache.offset)
        )
        shared = context(self.config, positions_BT, segments_BT, segments_BS, cache.offset)
        x_BTD = self._embed(tokens_BT, positions_BT)
        x_BTD, stacks, _ = run_layers(
            self.layers, self.config, x_BTD, shared, remat=self.remat, caches=cache.stacks
        )
        return self.norm(x_BTD), KVCache(stacks, segments_BS, cache.offset + tokens_BT.shape[1])

    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """Room for `slots` tokens of each of `rows` texts."""
        heads = (self.config.num_kv_heads, self.config.head_dim)
        stacks = {}
        for name in self.layers:
            zeros = jnp.zeros((len(layers_of(name)), rows, slots, *heads), self.dtype)
            stacks[name] = Cache(zeros, zeros)
        return KVCache(stacks, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32))

    def _embed(self, tokens_BT, positions_BT) -> jax.Array:
        x_BTD = look_up(self.embed_tokens.embedding[...], tokens_BT).astype(self.dtype)
        if self.config.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, self.dtype)
        if self.config.learned_positions:
            x_BTD = x_BTD + self.embed_positions.embedding[...][positions_BT].astype(self.dtype)
        return constrain_batch(x_BTD)
