"""The TPU's kernel, interpreted, beside scores written out whole; and what is compiled for TPUs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.kernels import attention as module
from jaxtune.kernels import splash
from jaxtune.kernels.attention import attention
from tests.test_attention import PADDED_LEFT, SCALE, assert_close, inputs, plain, segments

PACKED = [[3, 170, 57], [100, 30]]  # and padding


@pytest.fixture
def on_tpu(monkeypatch):
    """Attention takes splash, with several blocks to a row."""
    monkeypatch.setattr(module, "chosen", lambda case: "splash")
    monkeypatch.setattr(splash, "_blocks", lambda width, dtype: (128,))
    return monkeypatch


def results(function, given, numbers):
    """(output, dq, dk, dv), compiled anew: the platform is no part of what jax compares."""

    @jax.jit
    def both(q, k, v, cotangent, numbers):
        out, back = jax.vjp(lambda q, k, v: function(q, k, v, numbers), q, k, v)
        return out, *back(cotangent)

    return both(*given, numbers)


def ours(q, k, v, numbers, **rules):
    return attention(q, k, v, numbers, numbers, 0, scale=SCALE, **rules)


@pytest.mark.parametrize(
    ("rules", "fused"),
    [
        ({}, True),
        ({"window": 70, "softcap": 0.7}, False),
        ({"causal": False}, True),
        ({"causal": False, "window": 9}, False),
    ],
)
def test_values_and_gradients(on_tpu, rules, fused):
    """280 tokens fill three blocks; four query heads share two heads of keys."""
    on_tpu.setattr(splash, "_FUSED", 4 if fused else 0)
    given, numbers = inputs(2, 280, 4, 2), segments(PACKED, 280)
    expected = results(partial(plain, **rules), given, numbers)
    assert_close(results(partial(ours, **rules), given, numbers), expected)


def test_padding_before_the_text(on_tpu):
    given = inputs(2, 130, 2, 1)
    assert_close(results(ours, given, PADDED_LEFT), results(plain, given, PADDED_LEFT))


def test_bfloat16_stays_near_float32(on_tpu):
    """Less near than blocks are: the factor of the scores rounds the queries once more."""
    given, numbers = inputs(2, 280, 4, 2, 64), segments(PACKED, 280)
    small = [x.astype(jnp.bfloat16) for x in given]
    exact = results(plain, [x.astype(jnp.float32) for x in small], numbers)

    def distances() -> np.ndarray:
        found = results(ours, small, numbers)
        assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
        return np.array(
            [np.sqrt(np.mean((np.float32(x) - y) ** 2)) for x, y in zip(found, exact, strict=True)]
        )

    by_splash = distances()
    on_tpu.undo()
    assert np.all(by_splash < 2 * distances())


def scanned(q, k, v, numbers, windows, policy=None):
    """The mean over layers of differing windows, checkpointed, as a decoder runs them."""

    @partial(jax.checkpoint, policy=policy)
    def layer(x, window):
        given = {"window": window, "windows": tuple(sorted({*windows}))}
        return x + ours(q, k, v, numbers, **given) / len(windows), None

    return jax.lax.scan(layer, jnp.zeros_like(q), jnp.array(windows))[0]


def test_a_window_that_differs_by_layer(on_tpu):
    given, numbers, windows = inputs(1, 256, 2, 1), segments([[30, 200]], 256), [0, 150, 20, 0]

    def one_by_one(q, k, v, numbers):
        return sum(plain(q, k, v, numbers, window=w) for w in windows) / len(windows)

    found = results(partial(scanned, windows=windows), given, numbers)
    assert_close(found, results(one_by_one, given, numbers))


@pytest.mark.parametrize("windows", [[0], [0, 20]])
def test_saved_by_name_it_is_not_computed_again(on_tpu, windows):
    q, k, v, _ = inputs(1, 128, 2, 1)

    def computed_again(name: str) -> bool:
        policy = jax.checkpoint_policies.save_only_these_names(name)

        def loss(q, k, v):
            return scanned(q, k, v, segments([[128]], 128), windows, policy).sum()

        text = str(jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text())
        assert "splash_mqa_fwd" in text
        return bool(re.search('rematted_computation[^"]*splash_mqa_fwd', text))

    assert computed_again("nothing")
    assert not computed_again("context")


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), {}),
        (MeshConfig(context=2, data=2, fsdp=1, tensor=2), {"window": 300}),
        (MeshConfig(context=4, fsdp=2), {}),
        (MeshConfig(context=2, fsdp=4), {"causal": False}),
    ],
)
def test_sharded(on_tpu, mesh, rules):
    given = inputs(4, 1024, 2, 2)
    numbers = segments([[300 + 50 * row, 400] for row in range(4)], 1024)
    expected = results(partial(plain, **rules), given, numbers)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(results(partial(ours, **rules), given, numbers), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 7, 14, 15, 16, 20])
def test_masks(window, causal):
    mask = splash._mask(window, (16, 16), causal)[:, :]
    distance = np.arange(16)[:, None] - np.arange(16)
    if causal:
        expected = (distance >= 0) & (distance < (window or 16))
    else:
        expected = np.abs(distance) <= (window or 16)
    np.testing.assert_array_equal(mask, expected)


def test_blocks_fill_rows_up_by_an_eighth_at_most():
    lengths = [1, 128, 130, 1000, 1100, 2048, 2100, 32768]
    assert [splash.padded(n, splash._BLOCKS) for n in lengths] == [
        128,
        128,
        256,
        1024,
        1152,
        2048,
        2304,
        32768,
    ]


def program_for_tpu(function, *shapes) -> str:
    """What libtpu makes of it for one v5e chip; such compiles need no TPU."""
    from jax.experimental import topologies

    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    host = {"topology_name": "v5e:2x2", "platform": "tpu"}
    mesh = sharding.make_mesh(MeshConfig(), topologies.get_topology_desc(**host).devices)
    given = [
        jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, P(sharding.BATCH)))
        for s, t in shapes
    ]
    with jax.set_mesh(mesh):
        return str(jax.jit(function).lower(*given).compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_tpus_compile_it_without_collectives(width):
    def gradients(q, k, v, numbers):
        def loss(q, k, v):
            return ours(q, k, v, numbers).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    shapes = [((4, 1024, n, width), jnp.bfloat16) for n in (4, 2, 2)]
    text = program_for_tpu(gradients, *shapes, ((4, 1024), jnp.int32))
    assert "splash_mqa_fwd" in text
    assert "splash_mqa_dkv" in text
    assert not re.search(r"all-(reduce|gather|to-all)|collective-permute|reduce-scatter", text)
