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
from jaxtune.kernels import attention as attention_module
from jaxtune.kernels import blockwise as module
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


def plain(q, k, v, segments, softcap=0.0, window=0, causal=True):
    """The same by repeated heads, a [T, T] mask and jax.nn.softmax."""
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    distance = np.arange(length)[:, None] - np.arange(length)
    mask = segments[:, :, None] == segments[:, None]
    if causal:
        mask = mask & (distance >= 0) & (distance < (window or length))
    else:
        mask = mask & (np.abs(distance) <= (window or length))
    scores = SCALE * jnp.einsum("btnh,bsnh->bnts", q, k)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


@partial(jax.jit, static_argnums=0)
def values_and_gradients(function, q, k, v, cotangent, segments):
    """(output, dq, dk, dv)."""
    out, back = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
    return out, *back(cotangent)


@partial(jax.jit, static_argnames=("softcap", "window", "causal"))
def ours(q, k, v, segments, **rules):
    return attention(q, k, v, segments, segments, 0, scale=SCALE, **rules)


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


def key_blocks(rows, window: int = 0, causal: bool = True) -> list[tuple[int, int]]:
    """(first, last) key block of each block of 64 queries."""
    rules, reach = module.Rules(SCALE, 0.0, causal), module.reach_of(window, causal)
    rows, starts = jnp.asarray(rows), jnp.arange(0, rows.shape[1], 64)
    first, stop = module.key_blocks(rows, rows, starts, reach, rules, 64)
    return list(zip(first.tolist(), (stop - 1).tolist(), strict=True))


def test_blocks_without_a_common_segment_are_skipped():
    rows = segments([[64, 100, 92], [128, 64]], 256)
    # Blocks of the rows: [1, 2, 2+3, 3] and [1, 1, 2, padding].
    assert key_blocks(rows[:1]) == [(0, 0), (1, 1), (1, 2), (2, 3)]
    assert key_blocks(rows[1:]) == [(0, 0), (0, 1), (2, 2), (3, 3)]
    assert key_blocks(rows) == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert key_blocks(rows[:1], causal=False) == [(0, 0), (1, 2), (1, 3), (2, 3)]
    assert key_blocks(rows[1:], causal=False) == [(0, 1), (0, 1), (2, 2), (3, 3)]


def test_blocks_outside_the_window_are_skipped():
    row = np.ones((1, 256), np.int32)
    assert key_blocks(row, window=1) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert key_blocks(row, window=65) == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert key_blocks(row, window=66) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert key_blocks(row, window=1, causal=False) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert key_blocks(row, window=65, causal=False) == [(0, 2), (0, 3), (0, 3), (1, 3)]
    packed = segments([[64, 100, 92]], 256)
    assert key_blocks(packed, window=66) == [(0, 0), (1, 1), (1, 2), (2, 3)]


RULES = {
    "window": {"window": 7},
    "window of a block": {"window": 64},
    "wider window": {"window": 100},
    "window longer than the text": {"window": 500},
    "cap": {"softcap": 0.7},
    "cap and window": {"softcap": 0.7, "window": 70},
    "both ways": {"causal": False},
    "both ways with a window": {"causal": False, "window": 9},
    "both ways, window, cap": {"causal": False, "window": 64, "softcap": 0.7},
}
PADDED_LEFT = np.array([[0] * 75 + [1] * 55, [0] * 3 + [1] * 90 + [2] * 37], np.int32)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rules(rules):
    theirs, found = partial(plain, **rules), partial(ours, **rules)
    for numbers, kv_heads in [
        (segments(DOCUMENTS["one document"], 130), 1),
        (segments(DOCUMENTS["packed with padding"], 130), 2),
        (PADDED_LEFT, 1),
    ]:
        given = inputs(2, 130, 4, kv_heads)
        assert_close(
            values_and_gradients(found, *given, numbers),
            values_and_gradients(theirs, *given, numbers),
        )


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_differs_by_layer(causal):
    """Traced, scanned and checkpointed, as a decoder runs it; 0 among windows is none."""
    q, k, v, cotangent = inputs(2, 130, 4, 2)
    numbers, windows = jnp.asarray(segments(DOCUMENTS["packed"], 130)), [0, 5, 80]

    @jax.jit
    def scanned(q, k, v):
        @jax.checkpoint
        def layer(x, window):
            rules = {"window": window, "softcap": 2.0, "causal": causal}
            return x + attention(x, k, v, numbers, numbers, 0, scale=SCALE, **rules), None

        return jnp.sum(cotangent * jax.lax.scan(layer, q, jnp.array(windows))[0])

    def one_by_one(q, k, v):
        for window in windows:
            q = q + plain(q, k, v, numbers, 2.0, window, causal)
        return jnp.sum(cotangent * q)

    assert_close(
        jax.grad(scanned, (0, 1, 2))(q, k, v), jax.grad(one_by_one, (0, 1, 2))(q, k, v), 1e-4
    )


def test_no_rule_costs_nothing():
    """Neither a cap nor a window that is off leaves a trace in the program."""
    given, numbers = inputs(1, 130, 2, 1), segments([[130]], 130)

    def program(**rules) -> str:
        return str(
            jax.make_jaxpr(partial(values_and_gradients, partial(ours, **rules)))(*given, numbers)
        )

    assert "tanh" not in program()
    assert "abs" not in program()
    assert "tanh" in program(softcap=2.0)
    assert "abs" in program(window=3)


@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [
        (MeshConfig(fsdp=8), 2),
        (MeshConfig(data=2, fsdp=4), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 2),
        (MeshConfig(data=2, fsdp=2, tensor=2), 1),  # one head does not split over two devices
        (MeshConfig(fsdp=2, expert=2, tensor=2), 2),
    ],
)
def test_sharded(mesh, kv_heads):
    given = inputs(8, 100, 4, kv_heads)
    numbers = segments([[30 + 5 * row, 20] for row in range(8)], 100)
    expected = values_and_gradients(plain, *given, numbers)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(values_and_gradients(ours, *given, numbers), expected)


@pytest.mark.parametrize("rules", [RULES["cap and window"], RULES["both ways with a window"]])
def test_rules_sharded(rules):
    given = inputs(8, 100, 4, 2)
    numbers = segments([[30 + 5 * row, 20] for row in range(8)], 100)
    expected = values_and_gradients(partial(plain, **rules), *given, numbers)

    def traced(q, k, v, segments, window):
        given = {**rules, "window": window}
        return attention(q, k, v, segments, segments, 0, scale=SCALE, **given)

    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert_close(values_and_gradients(partial(ours, **rules), *given, numbers), expected)
        window = jnp.asarray(rules["window"], jnp.int32)
        assert_close([jax.jit(traced)(*given[:3], numbers, window)], expected[:1])


ON_CONTEXT = [
    (MeshConfig(context=2, data=2, fsdp=2), 120, {}),
    (MeshConfig(context=4, tensor=2, fsdp=1), 120, {"window": 70, "softcap": 0.7}),
    (MeshConfig(context=8, fsdp=1), 400, {}),
    (MeshConfig(context=4, fsdp=2), 100, {"causal": False, "window": 9}),
    (MeshConfig(context=4, fsdp=2), 100, {"window": 5}),  # parts of 25 tokens have no halves
    (MeshConfig(context=8, fsdp=1), 100, {}),  # 100 tokens have no eight equal parts
]


@pytest.mark.parametrize(("mesh", "length", "rules"), ON_CONTEXT)
def test_rows_cut_over_devices(mesh, length, rules):
    given = inputs(4, length, 4, 2)
    numbers = segments([[30 + 5 * row, 41] for row in range(4)], length)
    expected = values_and_gradients(partial(plain, **rules), *given, numbers)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(values_and_gradients(partial(ours, **rules), *given, numbers), expected)


def test_every_device_has_early_and_late_queries():
    """Of n devices each has spans i and 2 n - 1 - i, so all see equally many keys."""
    assert attention_module._spans(80, 4, causal=True).tolist() == [
        [0, 70],
        [60, 10],
        [20, 50],
        [40, 30],
    ]
    assert attention_module._spans(80, 4, causal=False).tolist() == [[0], [20], [40], [60]]
    assert attention_module._spans(81, 1, causal=True).tolist() == [[0]]


@pytest.mark.parametrize(("name", "walks"), [("context", 4), ("nothing", 6)])
def test_saved_by_name_it_is_not_computed_again(name, walks):
    """Forward and backward are two loops each."""
    (q, k, v, _), numbers = inputs(1, 130, 2, 1), segments([[130]], 130)
    policy = jax.checkpoint_policies.save_only_these_names(name)
    layer = jax.checkpoint(partial(ours, segments=numbers), policy=policy)
    text = str(jax.make_jaxpr(jax.grad(lambda *given: layer(*given).sum(), (0, 1, 2)))(q, k, v))
    assert text.count("scan[") + text.count("while[") == walks


def test_which_form():
    rules = module.Rules(SCALE, 0.0, True)
    tpu = attention_module.Case("tpu", "TPU v5", "", jnp.bfloat16, 128, 1000, 1, rules, (0, 512))
    assert attention_module.chosen(tpu) == "splash"
    assert attention_module.chosen(tpu._replace(windows=())) == "blockwise"  # unknown ones
    assert attention_module.chosen(tpu._replace(shards=4)) == "blockwise"  # 250 is no whole block
    assert attention_module.chosen(tpu._replace(shards=4, length=1024)) == "splash"
    assert attention_module.chosen(tpu._replace(platform="cpu")) == "blockwise"
    assert attention_module.chosen(tpu._replace(kind="TPU v3")) == "blockwise"
    gpu = tpu._replace(platform="gpu", capability="9.0", windows=(0,))
    assert attention_module.chosen(gpu) == "cudnn"
    assert attention_module.chosen(gpu._replace(shards=4, length=1024)) == "blockwise"


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
    rules = RULES["cap and window"]
    found = values_and_gradients(partial(ours, **rules), *small, numbers)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    expected = values_and_gradients(partial(plain, **rules), *given, numbers)
    assert_close([x.astype(jnp.float32) for x in found], expected, tolerance=0.06)


@pytest.mark.parametrize("rules", [{}, {"window": 6}, {"softcap": 0.7, "window": 3}])
def test_a_cache_gives_what_the_whole_text_gives(rules):
    q, k, v, _ = inputs(2, 20, 4, 2)
    numbers = segments([[20], [8, 12]], 20)
    whole = ours(q, k, v, numbers, **rules)
    decode = jax.jit(partial(attention, scale=SCALE, **rules))
    tail = decode(q[:, 15:], k, v, numbers[:, 15:], numbers, jnp.asarray(15, jnp.int32))
    assert_close([tail], [whole[:, 15:]])
