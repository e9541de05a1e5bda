"""Attention beside scores written out whole: values and gradients, packed, odd, sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.kernels import attention as module
from jaxtune.kernels.attention import attention

SCALE = 0.3
DOCUMENTS = {
    "one document": [[130], [130]],
    "packed": [[3, 70, 57], [100, 30]],
    "packed with padding": [[64, 20], [1, 1, 40]],
    "nothing but padding": [[], [5]],
}


def segments(documents: list[list[int]], length: int) -> np.ndarray:
    """[rows, length]: 1, 2, ... for documents of these lengths, cut or followed by zeros."""
    result = np.zeros((len(documents), length), np.int32)
    for row, lengths in zip(result, documents, strict=True):
        numbers = np.repeat(np.arange(len(lengths)) + 1, lengths)[:length]
        row[: len(numbers)] = numbers
    return result


def inputs(rows: int, length: int, heads: int, kv_heads: int, width: int = 8):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, segments):
    """The same by repeated heads, a [T, T] mask and jax.nn.softmax."""
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    mask = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])
    scores = jnp.where(mask[:, None], SCALE * jnp.einsum("btnh,bsnh->bnts", q, k), -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


@partial(jax.jit, static_argnums=0)
def values_and_gradients(function, q, k, v, cotangent, segments):
    """(output, dq, dk, dv)."""
    out, back = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
    return out, *back(cotangent)


@jax.jit
def ours(q, k, v, segments):
    return attention(q, k, v, segments, segments, 0, scale=SCALE)


def assert_close(found, expected, tolerance: float = 2e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_values_and_gradients(documents, kv_heads):
    given, numbers = inputs(2, 130, 4, kv_heads), segments(documents, 130)
    assert_close(
        values_and_gradients(ours, *given, numbers), values_and_gradients(plain, *given, numbers)
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 60), max_size=4), min_size=2, max_size=2),
    st.sampled_from([63, 150]),
)
def test_any_packing(documents, length):
    given, numbers = inputs(2, length, 2, 1, 4), segments(documents, length)
    assert_close(
        values_and_gradients(ours, *given, numbers), values_and_gradients(plain, *given, numbers)
    )


def test_segments_need_not_stand_together():
    given = inputs(1, 200, 2, 2)
    numbers = np.array([[2] * 90 + [1] * 50 + [2] * 60], np.int32)
    assert_close(
        values_and_gradients(ours, *given, numbers), values_and_gradients(plain, *given, numbers)
    )


def test_documents_do_not_see_each_other_or_the_future():
    q, k, v, _ = inputs(1, 200, 2, 2)
    numbers = segments([[90, 110]], 200)
    before = ours(q, k, v, numbers)
    changed = ours(q, k.at[:, 120].add(9.0), v.at[:, 120].add(9.0), numbers)
    differs = np.flatnonzero(np.any(np.asarray(before != changed), axis=(0, 2, 3)))
    assert differs.min() == 120
    assert differs.max() > 120
    first = ours(q, k.at[:, 40].add(9.0), v.at[:, 40].add(9.0), numbers)
    differs = np.flatnonzero(np.any(np.asarray(before != first), axis=(0, 2, 3)))
    assert (differs.min(), differs.max()) == (40, 89)


def test_blocks_without_a_common_segment_are_skipped():
    rows = segments([[64, 100, 92], [128, 64]], 256)
    # Blocks of the rows: [1, 2, 2+3, 3] and [1, 1, 2, padding].
    assert module._first_blocks(jnp.asarray(rows[:1]), 64).tolist() == [0, 1, 1, 2]
    assert module._first_blocks(jnp.asarray(rows[1:]), 64).tolist() == [0, 0, 2, 3]
    assert module._first_blocks(jnp.asarray(rows), 64).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [
        (MeshConfig(fsdp=8), 2),
        (MeshConfig(data=2, fsdp=4), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 2),
        (MeshConfig(data=2, fsdp=2, tensor=2), 1),  # one head does not split over two devices
    ],
)
def test_sharded(mesh, kv_heads):
    given = inputs(8, 100, 4, kv_heads)
    numbers = segments([[30 + 5 * row, 20] for row in range(8)], 100)
    expected = values_and_gradients(plain, *given, numbers)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(values_and_gradients(ours, *given, numbers), expected)


def test_a_batch_that_the_mesh_does_not_divide():
    q, k, v, _ = inputs(3, 70, 4, 2)
    numbers = segments([[70], [30, 40], [9]], 70)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=8))):
        found = ours(q, k, v, numbers)
    assert_close([found], [plain(q, k, v, numbers)])


def test_under_vmap_scan_and_checkpoint():
    q, k, v, cotangent = inputs(2, 70, 2, 2)
    numbers = segments([[70], [30, 40]], 70)

    def twice(function, factor):
        def body(x, _):
            return jax.checkpoint(function)(factor * x, k, v, numbers), None

        return jnp.sum(cotangent * jax.lax.scan(body, q, length=2)[0])

    factors = jnp.array([0.5, 1.0])
    found = jax.jit(jax.vmap(jax.grad(partial(twice, ours))))(factors)
    expected = jax.jit(jax.vmap(jax.grad(partial(twice, plain))))(factors)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bfloat16_stays_near_float32():
    given, numbers = inputs(2, 130, 4, 2), segments(DOCUMENTS["packed"], 130)
    small = [x.astype(jnp.bfloat16) for x in given]
    found = values_and_gradients(ours, *small, numbers)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    expected = values_and_gradients(plain, *given, numbers)
    assert_close([x.astype(jnp.float32) for x in found], expected, tolerance=0.06)


def test_a_cache_gives_what_the_whole_text_gives():
    q, k, v, _ = inputs(2, 20, 4, 2)
    numbers = segments([[20], [8, 12]], 20)
    whole = ours(q, k, v, numbers)
    decode = jax.jit(partial(attention, scale=SCALE))
    tail = decode(q[:, 15:], k, v, numbers[:, 15:], numbers, jnp.asarray(15, jnp.int32))
    assert_close([tail], [whole[:, 15:]])
