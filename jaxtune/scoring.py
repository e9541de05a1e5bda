"""Held-out loss: sums over batches, divided once at the end."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxtune.data.packing import Batch
from jaxtune.errors import DataError, NumericsError
from jaxtune.objectives import LossTerm


class Score(NamedTuple):
    """How well a model predicts held-out tokens."""

    loss: float  # nats a token
    perplexity: float
    accuracy: float  # tokens whose most likely prediction was right, of all
    tokens: int  # that bear loss

    @classmethod
    def of(cls, total: float, weight: float, correct: float) -> "Score":
        """Of the sums over all tokens."""
        loss = total / weight
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return cls(loss, perplexity, correct / weight, round(weight))


def evaluate(
    eval_step: Callable[[dict, dict, Any], LossTerm],
    trainable: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    batches: Iterable[Batch],
) -> Score:
    """Score of one set of parameters; other `trainable` leaves give the base's, or another run's.

    Args:
      eval_step: of `step.jit_eval`.
      batches: the whole evaluation set, as `eval_step` takes it.

    Raises:
      DataError: no token bears loss.
      NumericsError: the loss is not finite.
    """
    total = weight = correct = 0.0
    for batch in batches:
        # Read at once: programs in flight together on virtual CPU devices can deadlock.
        term = jax.device_get(eval_step(trainable, frozen, batch))
        total, weight = total + float(term.total), weight + float(term.weight)
        correct += float(term.correct)
    if weight == 0:
        raise DataError(
            "the evaluation set holds no token that bears loss",
            fix="data.eval with answers, or data.completion_only=False",
        )
    score = Score.of(total, weight, correct)
    if not math.isfinite(score.loss):
        raise NumericsError(f"evaluation loss is {score.loss}", fix="an earlier checkpoint")
    return score
