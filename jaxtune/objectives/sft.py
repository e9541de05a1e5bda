"""Next-token cross entropy: supervised fine-tuning, and pretraining when every token bears loss."""

import jax.numpy as jnp

from jaxtune.data.packing import Batch
from jaxtune.kernels.vocabulary import token_loss
from jaxtune.models.decoder import Decoder
from jaxtune.models.layers import Dropout
from jaxtune.objectives import LossTerm


def next_token(model: Decoder, batch: Batch, dropout: Dropout | None) -> LossTerm:
    """Loss of `batch.targets` under the model, summed with `batch.weights`."""
    x_BTD = model.hidden(batch.tokens, batch.positions, batch.segments, dropout)
    loss, correct = token_loss(x_BTD, model.head_VD, batch.targets, batch.weights)
    return LossTerm(loss, jnp.sum(batch.weights), correct)
