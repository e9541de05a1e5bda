"""The load balancing loss beside transformers' own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen3_moe

from jaxtune.kernels.experts import balance, balance_loss

LAYERS, ROWS, LENGTH = 3, 4, 11


def ours(logits_LNE, mask_N, k: int):
    """Statistics of every layer added up, then the loss."""

    def layer(logits_NE):
        probs_NE = jax.nn.softmax(logits_NE)
        return balance(probs_NE, jax.lax.top_k(probs_NE, k)[1], mask_N)

    sums = jax.vmap(layer)(logits_LNE)
    return balance_loss(jax.tree.map(lambda a: a.sum(axis=0), sums))


@pytest.mark.parametrize("theirs", [mixtral, qwen3_moe])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (5, 1), (16, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(theirs, experts, k, padded):
    random = np.random.default_rng(0)
    logits_LNE = 2 * random.normal(size=(LAYERS, ROWS * LENGTH, experts)).astype(np.float32)
    mask_BT = np.ones((ROWS, LENGTH), np.int64)
    if padded:
        mask_BT[1, 7:], mask_BT[3, :4] = 0, 0
    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(logits_LNE), mask_BT.reshape(-1), k)

    gates = tuple(torch.tensor(layer, requires_grad=True) for layer in logits_LNE)
    expected = theirs(gates, experts, k, torch.tensor(mask_BT) if padded else None)
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    theirs_LNE = np.stack([np.asarray(gate.grad) for gate in gates])
    np.testing.assert_allclose(gradient, theirs_LNE, atol=1e-7)
