import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tree
from jaxtune.data.packing import Example, pack
from jaxtune.errors import DataError, NumericsError
from jaxtune.hf.load import load_model
from jaxtune.objectives import LossTerm
from jaxtune.objectives.sft import next_token
from jaxtune.scoring import Score, evaluate
from tests import tiny


def _step(trainable, frozen, batch: Any) -> LossTerm:
    """Batches are their own sums here."""
    return LossTerm(*(jnp.asarray(value, jnp.float32) for value in batch))


def _score(*sums: tuple[float, float, float]) -> Score:
    batches: Any = sums
    return evaluate(_step, {}, {}, batches)


def test_sums_are_divided_once():
    # Averages of the batches are 2.0 and 3.0; the average of all four tokens is 2.75.
    score = _score((2.0, 1, 0), (9.0, 3, 3))
    assert score.loss == 2.75
    assert score.perplexity == pytest.approx(math.exp(2.75))
    assert score.accuracy == 0.75
    assert score.tokens == 4


def test_many_small_losses_do_not_drown_in_a_large_sum():
    score = _score((16_777_216.0, 1, 0), *[(1.0, 1, 0)] * 100)  # float32 would lose each 1.0
    assert score.loss == (16_777_216 + 100) / 101


def test_a_hopeless_model_has_infinite_perplexity():
    assert _score((1e6, 1, 0)).perplexity == math.inf


@pytest.mark.parametrize("sums", [[], [(0.0, 0, 0)]])
def test_nothing_to_evaluate_is_an_error(sums):
    with pytest.raises(DataError, match="no token that bears loss"):
        _score(*sums)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss):
    with pytest.raises(NumericsError, match="evaluation loss is"):
        _score((1.0, 1, 1), (loss, 1, 0))


def test_batching_and_padding_do_not_change_the_score(tmp_path):
    model = load_model(str(tiny.write(tmp_path)))
    graphdef, params = tree.split(model)
    step = jax.jit(
        lambda trainable, frozen, batch: next_token(
            tree.merge(graphdef, {**frozen, **trainable}), batch, None
        )
    )
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(0, 64, n).astype(np.int32), rng.random(n) < 0.7, "row")
        for n in (9, 30, 14, 22, 5, 17, 40)
    ]
    head = {"lm_head.embedding": params.pop("lm_head.embedding")}
    scores = []
    for packing, size in ((True, 2), (False, 3)):
        rows = pack([examples], 64, packing)
        batches = [
            rows.batch(range(i, min(i + size, len(rows))), size) for i in range(0, len(rows), size)
        ]
        scores.append(evaluate(step, head, params, batches))
    assert scores[0].tokens == sum(example.loss_tokens for example in examples)
    for score in scores[1:]:
        assert score.tokens == scores[0].tokens
        assert score.accuracy == scores[0].accuracy
        assert score.loss == pytest.approx(scores[0].loss, rel=1e-5)
