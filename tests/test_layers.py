"""The low-rank product and its written-out gradients beside automatic ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.models.adapter import low_rank

ROWS, LENGTH, WIDTH, RANK = 8, 20, 32, 3


def inputs(layers: int, dtype):
    """x in `dtype`; A and B of `layers` layers in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTI = jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH)).astype(dtype)
    a_LIR = jax.random.normal(keys[1], (layers, WIDTH, RANK)) / 4
    b_LRO = jax.random.normal(keys[2], (layers, RANK, WIDTH)) / 4
    return x_BTI, a_LIR, b_LRO


def gradients(product, x_BTI, a_LIR, b_LRO):
    """Of a stack of layers with adapters, as the decoder scans them, in float32."""

    def loss(x_BTI, a_LIR, b_LRO):
        def layer(x_BTI, adapter):
            return jnp.sin(x_BTI + product(x_BTI, *adapter)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x_BTI, (a_LIR, b_LRO))[0] ** 2)

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(x_BTI, a_LIR, b_LRO)
    assert [g.dtype for g in found] == [x_BTI.dtype, jnp.float32, jnp.float32]
    return [np.asarray(g, np.float32) for g in found]


def plain(x_BTI, a_IR, b_RO):
    return (x_BTI @ a_IR.astype(x_BTI.dtype)) @ b_RO.astype(x_BTI.dtype)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)], ids=["f32", "bf16"]
)
def test_gradients(dtype, tolerance, layers):
    given = inputs(layers, dtype)
    exact = gradients(plain, given[0].astype(jnp.float32), *given[1:])
    for found, expected in zip(gradients(low_rank, *given), exact, strict=True):
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_gradients_over_a_mesh():
    given = inputs(2, jnp.float32)
    expected = gradients(plain, *given)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = gradients(low_rank, *given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_of_many_adapters_on_one_base():
    x_BTI, a_LIR, b_LRO = inputs(1, jnp.float32)
    a_NLIR = jnp.stack([a_LIR, 2 * a_LIR])

    def slope(product, a_LIR):
        return jax.grad(lambda a: jnp.sum(jnp.sin(product(x_BTI, a[0], b_LRO[0]))))(a_LIR)

    found = jax.jit(jax.vmap(lambda a: slope(low_rank, a)))(a_NLIR)
    expected = jax.jit(jax.vmap(lambda a: slope(plain, a)))(a_NLIR)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
