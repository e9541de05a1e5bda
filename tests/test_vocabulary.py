"""Look-up and loss over the vocabulary beside jax.nn.log_softmax: values, gradients, meshes."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.kernels import vocabulary
from jaxtune.kernels.vocabulary import look_up, token_loss

MESHES = {
    "fsdp=8": MeshConfig(fsdp=8),
    "data=2 fsdp=4": MeshConfig(data=2, fsdp=4),
    "data=2 fsdp=2 tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp=2 expert=4": MeshConfig(fsdp=2, expert=4),
    "context=2 fsdp=2 tensor=2": MeshConfig(context=2, fsdp=2, tensor=2),
}
ROWS, LENGTH, WIDTH = 8, 38, 16


def inputs(vocab: int, bearing: float = 0.5):
    """(x, head, targets, weights); about `bearing` of the tokens have a weight, not always 1."""
    keys = jax.random.split(jax.random.key(0), 5)
    x_BTD = jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH))
    head_VD = jax.random.normal(keys[1], (vocab, WIDTH))
    targets_BT = jax.random.randint(keys[2], (ROWS, LENGTH), 0, vocab)
    weights_BT = jax.random.uniform(keys[3], (ROWS, LENGTH)) + 0.5
    bears_BT = jax.random.uniform(keys[4], (ROWS, LENGTH)) < bearing
    return x_BTD, head_VD, targets_BT, jnp.where(bears_BT, weights_BT, 0.0)


def plain(x_BTD, head_VD, targets_BT, weights_BT, softcap=0.0):
    """(loss, correct) from all logits at once."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD)
    right_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    logp_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights_BT * logp_BT), jnp.sum(weights_BT * right_BT)


def measured(function, given, wanted: tuple[int, ...]):
    """((loss, correct), gradients of the arguments numbered `wanted`), jitted."""
    gradient = jax.value_and_grad(function, wanted, has_aux=True)
    (loss, correct), gradients = jax.jit(gradient)(*given)
    return [loss, correct, *gradients]


def ours(*given, softcap=0.0):
    loss, correct = token_loss(*given, softcap=softcap)
    return loss, correct


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [7, 256])  # 7 divides nothing here
@pytest.mark.parametrize(
    "wanted", [(0,), (0, 1), (1,)], ids=["frozen head", "trained", "head only"]
)
def test_loss_and_gradients(monkeypatch, chunk, wanted):
    monkeypatch.setattr(vocabulary, "chunk_tokens", lambda vocab: chunk)
    given = inputs(50)
    assert_close(measured(ours, given, wanted), measured(plain, given, wanted))


@pytest.mark.parametrize(
    "wanted", [(0,), (0, 1), (1,)], ids=["frozen head", "trained", "head only"]
)
def test_soft_cap(wanted):
    given = inputs(50)
    found = measured(partial(ours, softcap=3.0), given, wanted)
    assert_close(found, measured(partial(plain, softcap=3.0), given, wanted))
    uncapped = measured(plain, given, wanted)
    assert float(found[1]) == pytest.approx(float(uncapped[1]))
    assert abs(float(found[0]) - float(uncapped[0])) > 1


def smoothed(x_BTD, head_VD, targets_BT, weights_BT, share_B):
    """(loss, correct) as torch.nn.CrossEntropyLoss(label_smoothing=...) has it, by row."""
    logp_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x_BTD, head_VD))
    own_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    share_B1 = share_B[:, None]
    mixed_BT = (1 - share_B1) * own_BT + share_B1 * logp_BTV.mean(axis=-1)
    return -jnp.sum(weights_BT * mixed_BT), plain(x_BTD, head_VD, targets_BT, weights_BT)[1]


@pytest.mark.parametrize("mesh", [None, "data=2 fsdp=4"])
@pytest.mark.parametrize("wanted", [(0,), (0, 1)], ids=["frozen head", "trained"])
def test_label_smoothing_of_every_row(wanted, mesh):
    given, share_B = inputs(48), jnp.linspace(0, 0.4, ROWS)
    expected = measured(partial(smoothed, share_B=share_B), given, wanted)

    def found(*given):
        loss, correct = token_loss(*given, smoothing_B=share_B)
        return loss, correct

    if mesh is None:
        assert_close(measured(found, given, wanted), expected)
    else:
        with jax.set_mesh(sharding.make_mesh(MESHES[mesh])):
            assert_close(measured(found, given, wanted), expected)


@pytest.mark.parametrize("mesh", [None, MeshConfig(trial=2, data=2, fsdp=2), MeshConfig(fsdp=8)])
def test_trials_that_share_a_batch_have_sums_and_gradients_of_their_own(mesh):
    given = inputs(48)
    halves = [tuple(a[half] if a.shape[0] == ROWS else a for a in given)
              for half in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))]  # fmt: skip
    expected = [measured(plain, (h[0], given[1], *h[2:]), (0,)) for h in halves]

    def found(*given):
        loss, correct = token_loss(*given, trials=2)
        return 2 * loss[0] + 3 * loss[1], (loss, correct)

    with jax.set_mesh(sharding.make_mesh(mesh)) if mesh else nullcontext():
        (_, (loss, correct)), dx_BTD = jax.jit(jax.value_and_grad(found, 0, has_aux=True))(*given)
    for k, (factor, (own, right, own_dx)) in enumerate(zip((2, 3), expected, strict=True)):
        assert_close([loss[k], correct[k]], [own, right])
        rows = slice(k * ROWS // 2, (k + 1) * ROWS // 2)
        np.testing.assert_allclose(dx_BTD[rows], factor * own_dx, rtol=2e-5, atol=4e-5)


@pytest.mark.parametrize("rows", [7, 10, 50])  # of the vocabulary in a block, at most
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_blocks_of_the_vocabulary(monkeypatch, rows, softcap):
    """Blocks that do and do not divide it, and chunks that do not divide the tokens."""
    monkeypatch.setattr(vocabulary, "_ROWS", rows)
    monkeypatch.setattr(vocabulary, "chunk_tokens", lambda vocab: 7)
    given = inputs(50)
    found = measured(partial(ours, softcap=softcap), given, (0,))
    assert_close(found, measured(partial(plain, softcap=softcap), given, (0,)))


def test_a_tie_across_blocks_is_no_prediction(monkeypatch):
    monkeypatch.setattr(vocabulary, "_ROWS", 5)
    x_BTD, head_VD, _, _ = inputs(20)
    weights_BT = jnp.ones((ROWS, LENGTH))
    best_BT = jnp.argmax(jnp.einsum("btd,vd->btv", x_BTD, head_VD), axis=-1)
    assert float(token_loss(x_BTD, head_VD, best_BT, weights_BT).correct) == ROWS * LENGTH
    twice_VD = jnp.concatenate([head_VD, head_VD])
    assert float(token_loss(x_BTD, twice_VD, best_BT, weights_BT).correct) == 0.0


def test_a_cap_that_rounds_logits_together_keeps_the_hits():
    x_BTD, head_VD, targets_BT, weights_BT = inputs(50)
    given = (100.0 * x_BTD, head_VD, targets_BT, weights_BT)
    found, expected = measured(partial(ours, softcap=1.0), given, (0,)), plain(*given)
    assert float(found[1]) == pytest.approx(float(expected[1]))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_soft_cap_sharded(mesh):
    given = inputs(64)
    expected = measured(partial(plain, softcap=3.0), given, (0, 1))
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(measured(partial(ours, softcap=3.0), given, (0, 1)), expected)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("vocab", [64, 50])  # 50 rows do not divide over 8, 4 devices
@pytest.mark.parametrize("wanted", [(0,), (0, 1)], ids=["frozen head", "trained head"])
def test_sharded(monkeypatch, mesh, vocab, wanted):
    monkeypatch.setattr(vocabulary, "chunk_tokens", lambda vocab: 16)
    given = inputs(vocab)
    expected = measured(plain, given, wanted)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(measured(ours, given, wanted), expected)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_devices_with_unequal_work_end_together(monkeypatch, mesh):
    """All loss in one row: without one trip count, collectives would hang or mix chunks."""
    monkeypatch.setattr(vocabulary, "chunk_tokens", lambda vocab: 8)
    x_BTD, head_VD, targets_BT, weights_BT = inputs(64, bearing=1.0)
    given = (x_BTD, head_VD, targets_BT, weights_BT * (jnp.arange(ROWS) == 5)[:, None])
    expected = measured(plain, given, (0, 1))
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(measured(ours, given, (0, 1)), expected)


def test_no_token_bears_loss():
    loss, correct, dx_BTD = measured(ours, inputs(50, bearing=0.0), (0,))
    assert (float(loss), float(correct)) == (0.0, 0.0)
    assert not np.asarray(dx_BTD).any()


def test_tokens_without_loss_are_not_visited():
    """A NaN in a token that bears no loss would reach the sums if it were scored."""
    x_BTD, head_VD, targets_BT, weights_BT = inputs(50)
    ahead = jnp.where((weights_BT == 0)[..., None], jnp.nan, x_BTD)
    # Chunks of one token: with larger ones a last chunk is filled up with its neighbours.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "chunk_tokens", lambda vocab: 1)
        found = measured(ours, (ahead, head_VD, targets_BT, weights_BT), (0,))
    assert_close(found, measured(plain, (x_BTD, head_VD, targets_BT, weights_BT), (0,)))


def test_a_frozen_head_costs_no_gradient(monkeypatch):
    monkeypatch.setattr(vocabulary, "chunk_tokens", lambda vocab: 8)
    given = inputs(50)
    program = jax.jit(jax.grad(lambda *args: token_loss(*args).loss)).lower(*given).as_text()
    trained = jax.jit(jax.grad(lambda *args: token_loss(*args).loss, (0, 1))).lower(*given)
    assert program.count("dot_general") == 2  # logits and dx
    assert trained.as_text().count("dot_general") == 3


def test_extreme_logits():
    x_BTD, head_VD, targets_BT, weights_BT = inputs(50)
    given = (300.0 * x_BTD, head_VD, targets_BT, weights_BT)
    found, expected = measured(ours, given, (0,)), measured(plain, given, (0,))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-4)


def test_bfloat16_stays_near_float32():
    x_BTD, head_VD, *rest = inputs(50)
    small = (x_BTD.astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16), *rest)
    found, expected = (
        measured(ours, small, (0, 1)),
        measured(plain, (x_BTD, head_VD, *rest), (0, 1)),
    )
    assert found[0].dtype == jnp.float32
    assert found[2].dtype == found[3].dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-2)
    for one, other in zip(found[2:], expected[2:], strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("vocab", [64, 50])
def test_look_up(mesh, vocab):
    _, table_VD, tokens_BT, _ = inputs(vocab)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        np.testing.assert_array_equal(jax.jit(look_up)(table_VD, tokens_BT), table_VD[tokens_BT])
        found = jax.jit(jax.grad(lambda table: jnp.sum(jnp.sin(look_up(table, tokens_BT)))))(
            table_VD
        )
    expected = jax.grad(lambda table: jnp.sum(jnp.sin(table[tokens_BT])))(table_VD)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_tie_is_no_prediction():
    """Equal logits for all tokens, as of a ruined model, are right about nothing."""
    x_BTD, head_VD, targets_BT, weights_BT = inputs(16)
    _, correct = token_loss(jnp.zeros_like(x_BTD), head_VD, targets_BT, weights_BT)
    assert float(correct) == 0.0
