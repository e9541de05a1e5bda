"""Cross entropy of a document's class."""

import jax
import jax.numpy as jnp

from jaxtune.data.packing import Batch
from jaxtune.models.decoder import Decoder
from jaxtune.models.encoder import Encoder
from jaxtune.models.layers import Dropout
from jaxtune.objectives import LossTerm


def classify(
    model: Decoder | Encoder,
    batch: Batch,
    dropout: Dropout | None,
    smoothing_B: jax.Array | None = None,
    trials: int = 1,
) -> LossTerm:
    """Loss of the classes in `batch.targets`, where `batch.weights` marks the token read for them.

    Correct are documents whose class alone is the most likely one: ties predict nothing. A model of
    experts is not pulled towards an even load here, as in transformers.
    """
    assert trials == 1, "classifiers have heads of their own"
    segments_BT = jnp.asarray(batch.segments)
    if isinstance(model, Encoder):
        x_BTD = model.hidden(batch.tokens, batch.positions, segments_BT, dropout, batch.types)
        logits_BTC = model.label_logits(x_BTD, segments_BT, dropout)
    else:
        x_BTD = model.hidden(batch.tokens, batch.positions, segments_BT, dropout)
        logits_BTC = model.label_logits(x_BTD, segments_BT)
    chosen_BT1 = jnp.asarray(batch.targets)[:, :, None]
    logits_BT = jnp.take_along_axis(logits_BTC, chosen_BT1, axis=-1)[:, :, 0]
    target_BT = logits_BT
    if smoothing_B is not None:
        share_B1 = smoothing_B[:, None]
        target_BT = (1 - share_B1) * logits_BT + share_B1 * jnp.mean(logits_BTC, axis=-1)
    loss_BT = jax.nn.logsumexp(logits_BTC, axis=-1) - target_BT
    correct_BT = jnp.sum(logits_BTC >= logits_BT[:, :, None], axis=-1) == 1
    return LossTerm(
        jnp.sum(batch.weights * loss_BT),
        jnp.sum(batch.weights),
        jnp.sum(batch.weights * correct_BT),
    )
