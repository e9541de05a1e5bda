"""Next-token cross entropy: supervised fine-tuning, and pretraining when every token bears loss."""

import jax
import jax.numpy as jnp

from jaxtune.data.packing import Batch
from jaxtune.kernels.experts import balance_loss
from jaxtune.kernels.vocabulary import token_loss
from jaxtune.models.decoder import Decoder
from jaxtune.models.layers import Dropout
from jaxtune.objectives import LossTerm


def next_token(
    model: Decoder,
    batch: Batch,
    dropout: Dropout | None,
    smoothing_B: jax.Array | None = None,
    trials: int = 1,
) -> LossTerm:
    """Loss of `batch.targets` under the model, summed with `batch.weights`.

    `trials` that share the batch, as many rows each in turn, have sums of their own, [trials].

    A model of experts is also pulled towards an even load (arXiv 2101.03961, as transformers has
    it), weighted per micro-batch by its tokens. That pull is in the gradient only: the loss that is
    reported stays the cross entropy, with and without it.
    """
    config, weight = model.config, jnp.sum(batch.weights)
    if trials > 1:
        weight = jnp.sum(batch.weights.reshape(trials, -1), axis=1)
    x_BTD, balance = model.hidden_and_balance(
        batch.tokens, batch.positions, batch.segments, dropout
    )
    loss, correct = token_loss(
        x_BTD,
        model.head_VD,
        batch.targets,
        batch.weights,
        config.final_softcap,
        smoothing_B=smoothing_B,
        trials=trials,
    )
    if balance is not None and config.experts and config.experts.balance_weight:
        pull = config.experts.balance_weight * weight * balance_loss(balance)
        loss = loss + pull - jax.lax.stop_gradient(pull)
    return LossTerm(loss, weight, correct)
