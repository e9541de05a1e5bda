"""Training objectives: each is a function (model, batch, dropout) -> LossTerm."""

from typing import NamedTuple

import jax


class LossTerm(NamedTuple):
    """Sums over tokens, float32 scalars. They add up over micro-batches and hosts; divide once."""

    total: jax.Array  # loss, nats
    weight: jax.Array  # loss-bearing tokens
    correct: jax.Array  # of these, tokens whose most likely prediction is the target
