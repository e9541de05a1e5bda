"""One encoder for every bidirectional family: embeddings, scanned layers, a classification head."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.vocabulary import look_up
from jaxtune.models.blocks import LayerConfig, context
from jaxtune.models.layers import Dropout, Embedding, Linear, Norm, activate
from jaxtune.models.stacks import make_layers, run_layers
from jaxtune.sharding import constrain_batch


@dataclass(frozen=True)
class EncoderConfig(LayerConfig):
    """Sizes and switches of an encoder; `families` makes one from a Hugging Face config."""

    learned_positions: bool = True  # a table of positions is added to the embeddings
    position_offset: int = 0  # row of that table where a document begins
    types: int = 0  # rows of the table that tells apart the texts of a pair; 0: there is none
    typed_pairs: bool = False  # the family's tokenizers give the second text of a pair type 1
    final_norm: bool = False
    head_activation: str = "tanh"
    head_bias: bool = True
    head_norm: bool = False
    pooling: str = "cls"  # the head reads the first token of a document, or the "mean" of all


class Head(nnx.Module):
    """What stands between the pooled activations and the classifier."""

    def __init__(self, config: EncoderConfig, **kwargs: Any):
        shape, axes = (config.hidden_size, config.hidden_size), ("embed", "heads")
        self.activation = config.head_activation
        self.dense = Linear(shape, axes, bias=config.head_bias, stack=(), **kwargs)
        if config.head_norm:
            self.norm = _norm(config, **kwargs)

    def __call__(self, x_BTD: jax.Array, dropout: Dropout | None) -> jax.Array:
        x_BTD = activate(self.activation, self.dense(x_BTD, dropout))
        return self.norm(x_BTD) if hasattr(self, "norm") else x_BTD


class Encoder(nnx.Module):
    """A classifier. `model(tokens_BT)` gives the float32 logits [B, C] of one document a row.

    `stacks` are the runs [start, stop) of layers whose parameters are stacked and scanned together;
    by default the longest runs of layers with the same parameters.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "full",
        stacks: tuple[tuple[int, int], ...] = (),
    ):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        kwargs: dict[str, Any] = {"rngs": rngs, "dtype": param_dtype}
        width, small = config.hidden_size, (None, "embed")
        self.embed_tokens = Embedding(config.vocab_size, width, **kwargs)
        if config.learned_positions:
            rows = config.max_position + config.position_offset
            self.embed_positions = Embedding(rows, width, axes=small, **kwargs)
        if config.types:
            self.embed_types = Embedding(config.types, width, axes=small, **kwargs)
        self.embed_norm = _norm(config, **kwargs)
        self.layers = make_layers(config, stacks, **kwargs)
        if config.final_norm:
            self.norm = _norm(config, **kwargs)
        self.head = Head(config, **kwargs)
        shape = (width, config.num_labels)
        self.classifier = Linear(shape, ("embed", None), bias=True, stack=(), **kwargs)

    def __call__(self, tokens_BT, positions=None, segments=None, types=None) -> jax.Array:
        """Logits of the classes; arguments as those of `hidden`, with one document a row."""
        tokens_BT = jnp.asarray(tokens_BT)
        segments_BT = jnp.ones_like(tokens_BT) if segments is None else jnp.asarray(segments)
        x_BTD = self.hidden(tokens_BT, positions, segments_BT, types=types)
        logits_BTC = self.label_logits(x_BTD, segments_BT)
        first_B = jnp.argmax(segments_BT > 0, axis=1)
        return logits_BTC[jnp.arange(len(first_B)), first_B]

    def label_logits(
        self, x_BTD: jax.Array, segments_BT: jax.Array, dropout: Dropout | None = None
    ) -> jax.Array:
        """Float32 logits [B, T, C] of the classes; those at the first token of a document count."""
        if self.config.pooling == "mean":
            same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]).astype(x_BTD.dtype)
            sum_BTD = jnp.einsum(
                "BTS,BSD->BTD", same_BTS, x_BTD, preferred_element_type=jnp.float32
            )
            count_BT1 = same_BTS.sum(axis=-1, keepdims=True, dtype=jnp.float32)
            x_BTD = (sum_BTD / count_BT1).astype(x_BTD.dtype)
        return self.classifier(self.head(x_BTD, dropout)).astype(jnp.float32)

    def hidden(
        self,
        tokens_BT,
        positions_BT=None,
        segments_BT=None,
        dropout: Dropout | None = None,
        types=None,
    ) -> jax.Array:
        """Activations for the head to read, [B, T, D].

        Args:
          tokens_BT: int32 ids.
          positions_BT: 0, 1, 2, ... in each document; by default counted from a row's first token.
          segments_BT: 1, 2, ... for the documents of a row, 0 for padding; by default all are one.
          types: int32 [B, T], which text of a pair each token is of; by default 0.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else jnp.asarray(segments_BT)
        if positions_BT is None:
            first_B1 = jnp.argmax(segments_BT > 0, axis=1, keepdims=True)
            positions_BT = jnp.maximum(jnp.arange(tokens_BT.shape[1]) - first_B1, 0)
        positions_BT = jnp.asarray(positions_BT)
        shared = context(self.config, positions_BT, segments_BT, segments_BT, 0)
        x_BTD, _, _ = run_layers(
            self.layers,
            self.config,
            self._embed(tokens_BT, positions_BT, types),
            shared,
            remat=self.remat,
            dropout=dropout,
        )
        return self.norm(x_BTD) if self.config.final_norm else x_BTD

    def _embed(self, tokens_BT, positions_BT, types) -> jax.Array:
        x_BTD = look_up(self.embed_tokens.embedding[...], tokens_BT).astype(self.dtype)
        if self.config.types:
            rows_BT = jnp.zeros_like(tokens_BT) if types is None else jnp.asarray(types)
            x_BTD = x_BTD + self.embed_types.embedding[...][rows_BT].astype(self.dtype)
        if self.config.learned_positions:
            rows_BT = positions_BT + self.config.position_offset
            x_BTD = x_BTD + self.embed_positions.embedding[...][rows_BT].astype(self.dtype)
        return constrain_batch(self.embed_norm(x_BTD))


def _norm(config: EncoderConfig, **kwargs: Any) -> Norm:
    width, eps = config.hidden_size, config.norm_eps
    return Norm(width, eps, config.norm, bias=config.norm_bias, stack=(), **kwargs)
