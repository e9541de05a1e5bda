"""cuDNN's attention: when it is taken, what it is told, and on a GPU what it gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import cudnn
from jaxtune.kernels.blockwise import Rules
from tests.test_attention import SCALE, inputs, plain, segments

RULES = Rules(SCALE, 0.0, True)
ALONE, PACKED = segments([[60], [40], []], 60), segments([[60], [20, 30], [7]], 60)


@pytest.mark.parametrize(
    ("changes", "applies"),
    [
        ({}, True),
        ({"dtype": jnp.float32}, False),
        ({"dtype": jnp.float16}, True),
        ({"width": 256}, True),
        ({"width": 256, "capability": "8.6"}, False),
        ({"width": 100}, False),
        ({"capability": "8.0"}, True),
        ({"capability": "7.5"}, False),
        ({"capability": "gfx90a"}, False),
        ({"capability": ""}, False),
        ({"capability": "12.0"}, True),
        ({"rules": RULES._replace(softcap=30.0)}, False),
        ({"windows": (512,)}, True),
        ({"windows": (0, 512)}, False),  # layers differ
        ({"windows": ()}, False),
        ({"rules": RULES._replace(causal=False)}, True),
        ({"rules": RULES._replace(causal=False), "windows": (512,)}, False),
    ],
)
def test_when_it_applies(changes, applies):
    case = {"capability": "9.0", "dtype": jnp.bfloat16, "width": 128, "rules": RULES}
    assert cudnn.applies(**{**case, "windows": (0,), **changes}) == applies


def by_xla(monkeypatch):
    """jax's public call means the same everywhere; without cuDNN it can be XLA that computes it."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **kwargs: call(*args, implementation="xla", **kwargs),
    )


def results(function, given, numbers):
    """(output at tokens, gradients), where padding's output does not count."""

    @jax.jit
    def both(q, k, v, cotangent, numbers):
        real_BT11 = (numbers > 0)[:, :, None, None]
        out, back = jax.vjp(lambda *x: real_BT11 * function(*x, numbers), q, k, v)
        return out, *back(cotangent)

    return both(*given, numbers)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (7, True), (0, False)])
@pytest.mark.parametrize("numbers", [ALONE, PACKED], ids=["alone", "packed"])
def test_rows_of_one_document_are_its_and_no_others(monkeypatch, numbers, window, causal):
    by_xla(monkeypatch)
    rules = RULES._replace(causal=causal)

    def ours(q, k, v, numbers):
        return cudnn.cudnn(
            q, k, v, numbers, window=window, rules=rules, otherwise=lambda: jnp.full_like(q, 5.0)
        )

    given = inputs(3, 60, 4, 2)
    found = results(ours, given, numbers)
    if numbers is PACKED:
        assert np.all(found[0][numbers > 0] == 5.0)
        return
    expected = results(partial(plain, window=window, causal=causal), given, numbers)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [0, 7])
def test_what_the_program_for_cuda_calls(monkeypatch, window):
    """Lowered without a GPU: only the look at the installed library is skipped."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def loss(q, k, v, numbers):
        out = cudnn.cudnn(
            q, k, v, numbers, window=window, rules=RULES, otherwise=lambda: jnp.zeros_like(q)
        )
        return out.astype(jnp.float32).sum()

    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(3, 60, 4, 2))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, ALONE)
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    for call in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert call in text
    assert text.count('"mask_type": "PADDING_CAUSAL"') == 2
    assert text.count(f'"sliding_window_length": {window},') == 2
    assert text.count(f'"fmha_scale": {SCALE},') == 2


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: JAX_PLATFORMS=cuda needs one")
@pytest.mark.parametrize("window", [0, 7])
def test_on_a_gpu(window):
    """Values and gradients near those of float32, in the dtype that cuDNN takes."""
    from jaxtune.kernels.attention import attention

    def ours(q, k, v, numbers):
        return attention(q, k, v, numbers, numbers, 0, scale=SCALE, window=window)

    given = inputs(3, 60, 4, 2, 64)
    small = [x.astype(jnp.bfloat16) for x in given]
    assert "__cudnn$fmha" in str(jax.jit(ours).lower(*small[:3], ALONE).compile().as_text())
    for numbers in (ALONE, PACKED):
        found = results(ours, small, numbers)
        expected = results(partial(plain, window=window), given, numbers)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.float32(one), other, atol=0.06, rtol=0.06)
