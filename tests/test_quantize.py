"""Kernels in 8 and 4 bits: their bytes, how near they are to the weights, and their products."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from jaxtune.errors import ConfigError
from jaxtune.kernels import experts, quantize

SCHEMES = ("int8", "fp8", "int4", "nf4")


def layout(scheme: str, *shape: int) -> quantize.Layout:
    return quantize.Layout(scheme, shape, (None,) * len(shape))


def there_and_back(kernel: np.ndarray, scheme: str) -> np.ndarray:
    values, scale = quantize.quantize(jnp.asarray(kernel), scheme)
    kept = layout(scheme, *kernel.shape)
    assert (values.shape, values.dtype) == (kept.values.shape, kept.values.dtype)
    assert (scale.shape, scale.dtype) == (kept.scale.shape, kept.scale.dtype)
    return np.asarray(quantize.dequantize(values, scale, kept, jnp.float32))


def steps(kernel: np.ndarray, scheme: str) -> np.ndarray:
    """The scale of every weight, in the kernel's shape."""
    scale = np.asarray(quantize.quantize(jnp.asarray(kernel), scheme)[1], np.float32)
    rows = quantize.GROUP if scheme in ("int4", "nf4") else len(kernel)
    return np.repeat(scale.reshape(-1, kernel.shape[1]), rows, axis=0)[: len(kernel)]


def test_quantiles_are_those_the_paper_builds():
    """QLoRA, appendix E: 8 quantiles below zero and 9 from it on, scaled to reach -1 and 1."""
    last = 0.5 * (1 - 1 / 30 + 1 - 1 / 32)
    below = -norm.ppf(np.linspace(last, 0.5, 8))
    above = norm.ppf(np.linspace(0.5, last, 9))
    built = np.concatenate([below[:-1] / -below[0], [0], above[1:] / above[-1]])
    assert len(quantize.NF4) == 16
    np.testing.assert_allclose(quantize.NF4, built, atol=1e-6)
    assert list(quantize.NF4) == sorted(quantize.NF4)


def test_bytes_of_int4():
    kernel = np.zeros((70, 2), np.float32)
    kernel[[0, 1, 32, 33, 31, 63], 0] = 7, 1, -7, 2, -3, 5
    kernel[[64, 69], 1] = 14, -2  # a second group, of six inputs
    values, scale = quantize.quantize(jnp.asarray(kernel), "int4")
    assert scale.tolist() == [[1, 0], [0, 2]]
    expected = np.full((2, 32, 2), 0x88)
    expected[0, 0, 0] = (1 << 4) | 15  # input 32 above input 0, each plus 8
    expected[0, 1, 0] = (10 << 4) | 9
    expected[0, 31, 0] = (13 << 4) | 5
    expected[1, 0, 1], expected[1, 5, 1] = (8 << 4) | 15, (8 << 4) | 7
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(there_and_back(kernel, "int4"), kernel)


def test_bytes_of_nf4():
    kernel = np.zeros((64, 1), np.float32)
    kernel[:16, 0] = quantize.NF4
    kernel[32:48, 0] = quantize.NF4[::-1]
    kernel *= 2
    values, scale = quantize.quantize(jnp.asarray(kernel), "nf4")
    assert scale.tolist() == [[2]]
    expected = [code | (15 - code) << 4 for code in range(16)] + [0x77] * 16  # 0 has code 7
    assert values.ravel().tolist() == expected
    np.testing.assert_array_equal(there_and_back(kernel, "nf4"), kernel)


kernels = st.builds(
    lambda seed, inputs, outputs, size: (
        np.random.default_rng(seed).standard_t(3, (inputs, outputs)) * 10.0**size
    ).astype(np.float32),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 31, 64, 150]),
    st.sampled_from([1, 5]),
    st.integers(-12, 12),
)


@settings(max_examples=12, deadline=None)
@given(kernel=kernels)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_becomes_the_nearest_there_is(scheme, kernel):
    if scheme == "fp8":
        bits = np.arange(256, dtype=np.uint8)
        codes = bits.view(jnp.float8_e4m3fn).astype(np.float32)
        codes = codes[np.isfinite(codes)]
    else:
        codes = {"int8": np.arange(-127, 128), "int4": np.arange(-7, 8), "nf4": quantize.NF4}[
            scheme
        ]
    scale = steps(kernel, scheme)
    errors = np.abs(kernel[..., None] - scale[..., None] * np.asarray(codes, np.float32))
    found = np.abs(there_and_back(kernel, scheme) - kernel)
    assert (found <= errors.min(axis=-1) + 1e-5 * scale).all()
    # And the scale is no larger than it must be: the largest weight is met.
    largest = np.abs(kernel).max(axis=0)
    at = np.abs(kernel).argmax(axis=0), np.arange(kernel.shape[1])
    np.testing.assert_allclose(np.abs(there_and_back(kernel, scheme))[at], largest, rtol=0.005)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_columns_of_zeros_stay_zeros(scheme):
    kernel = np.zeros((70, 3), np.float32)
    kernel[5, 1] = 3.5
    found = there_and_back(kernel, scheme)
    assert found[5, 1] == pytest.approx(3.5)
    assert np.count_nonzero(found) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_outlier_is_felt_by_its_own_scale_only(scheme):
    kernel = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
    wild = kernel.copy()
    wild[70, 2] = 1000
    before, after = there_and_back(kernel, scheme), there_and_back(wild, scheme)
    assert after[70, 2] == pytest.approx(1000, rel=0.005)
    far = np.ones_like(kernel, bool)
    far[slice(64, 128) if scheme in ("int4", "nf4") else slice(None), 2] = False
    np.testing.assert_array_equal(after[far], before[far])
    assert not np.array_equal(after[~far], before[~far])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_hide(scheme, bad):
    kernel = np.ones((64, 2), np.float32)
    kernel[3, 1] = bad
    found = there_and_back(kernel, scheme)
    assert np.isfinite(found[:, 0]).all()
    assert not np.isfinite(found[3, 1])


def test_bytes_of_a_weight():
    def bits(scheme: str) -> float:
        kept = layout(scheme, 4096, 4096)
        arrays = (kept.values, kept.scale)
        return sum(8 * np.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays) / 4096**2

    assert [bits(scheme) for scheme in SCHEMES] == [8 + 32 / 4096, 8 + 32 / 4096, 4.25, 4.25]


def test_axes_of_the_parts():
    kept = quantize.Layout("nf4", (3, 8, 96, 40), ("layers", "experts", "embed", "mlp"))
    assert kept.values == ((3, 8, 2, 32, 40), jnp.uint8,
                           ("layers", "experts", "embed", None, "mlp"))  # fmt: skip
    assert kept.scale == ((3, 8, 2, 40), jnp.bfloat16, ("layers", "experts", "embed", "mlp"))
    kept = kept._replace(scheme="int8")
    assert kept.values == (kept.shape, jnp.int8, kept.axes)
    assert kept.scale == ((3, 8, 40), jnp.float32, ("layers", "experts", "mlp"))


def products(scheme: str, dtype: Any):
    """x, values and scale, their layout, and the kernel they stand for in float32."""
    keys = jax.random.split(jax.random.key(0), 2)
    x_BTI = jax.random.normal(keys[0], (2, 5, 150)).astype(dtype)
    kept = layout(scheme, 150, 48)
    values, scale = quantize.quantize(jax.random.normal(keys[1], (150, 48)), scheme)
    return x_BTI, values, scale, kept, quantize.dequantize(values, scale, kept, jnp.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.01)])
def test_product_and_its_gradient(scheme, dtype, tolerance):
    x_BTI, values, scale, kept, kernel_IO = products(scheme, dtype)
    weights_BTO = jax.random.normal(jax.random.key(1), (2, 5, 48))

    def loss(product, x_BTI):
        y_BTO = product(x_BTI)
        return jnp.sum(y_BTO.astype(jnp.float32) * weights_BTO), y_BTO

    ours = jax.grad(
        lambda x: loss(lambda x: quantize.matmul(x, values, scale, kept), x), has_aux=True
    )
    plain = jax.grad(lambda x: loss(lambda x: x @ kernel_IO, x), has_aux=True)
    found, expected = ours(x_BTI), plain(x_BTI.astype(jnp.float32))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        distance = jnp.linalg.norm(one.astype(jnp.float32) - other)
        assert distance < tolerance * jnp.linalg.norm(other)


def test_product_in_another_dtype():
    x_BTI, values, scale, kept, _ = products("int8", jnp.bfloat16)
    exact = quantize.matmul(x_BTI, values, scale, kept, jnp.float32)
    assert exact.dtype == jnp.float32
    rounded = quantize.matmul(x_BTI, values, scale, kept)
    np.testing.assert_array_equal(np.asarray(exact.astype(jnp.bfloat16)), np.asarray(rounded))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_backward_pass_is_left_with_no_copy_of_the_kernel(scheme):
    x_BTI, values, scale, kept, _ = products(scheme, jnp.bfloat16)
    _, backward = jax.vjp(lambda x: quantize.matmul(x, values, scale, kept), x_BTI)
    left = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert left <= values.nbytes + scale.nbytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_of_rows_and_their_gradient(scheme):
    keys = jax.random.split(jax.random.key(0), 3)
    chosen_NK = jax.random.randint(keys[0], (40, 2), 0, 5)  # 4 is no expert here
    plan = experts.dispatch(chosen_NK, jnp.arange(80).reshape(40, 2), 4)
    x_MI = jax.random.normal(keys[1], (80, 70))
    values, scale = quantize.quantize(jax.random.normal(keys[2], (4, 70, 24)), scheme)
    kept = layout(scheme, 70, 24)
    kernel_EIO = quantize.dequantize(values, scale, kept, jnp.float32)

    def ours(x_MI):
        return quantize.grouped(x_MI, values, scale, kept, plan)

    def plain(x_MI):
        return experts.grouped(x_MI, kernel_EIO, plan)

    np.testing.assert_allclose(ours(x_MI), plain(x_MI), rtol=1e-4, atol=1e-4)
    (found, expected) = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))))(x_MI) for f in (ours, plain)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    left = jax.tree.leaves(jax.vjp(ours, x_MI)[1])
    assert not [leaf.shape for leaf in left if leaf.ndim == 3 and leaf.dtype == jnp.float32]


def chip(platform: str, kind: str, capability: str | None = None):
    return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


CHIPS = {
    "v6e": (chip("tpu", "TPU v6 lite"), True),
    "7x": (chip("tpu", "TPU7x"), True),
    "H200": (chip("gpu", "NVIDIA H200", "9.0"), True),
    "L4": (chip("gpu", "NVIDIA L4", "8.9"), True),
    "B200": (chip("gpu", "NVIDIA B200", "10.0"), True),
    "CPU": (chip("cpu", "cpu"), True),
    "v5e": (chip("tpu", "TPU v5 lite"), False),
    "v5p": (chip("tpu", "TPU v5"), False),
    "v4": (chip("tpu", "TPU v4"), False),
    "A100": (chip("gpu", "NVIDIA A100", "8.0"), False),
    "MI300X": (chip("gpu", "AMD Instinct MI300X", "gfx942"), False),
}


@pytest.mark.parametrize(("device", "has"), CHIPS.values(), ids=CHIPS)
def test_chips_that_have_fp8(device, has):
    quantize.check("int8", device)
    if has:
        quantize.check("fp8", device)
        return
    with pytest.raises(ConfigError, match=f"{device.device_kind} does not have") as caught:
        quantize.check("fp8", device)
    assert "int8" in caught.value.fix


def test_the_chips_are_those_the_compiler_knows():
    from jax.experimental.pallas import tpu

    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite",
             "7x": "TPU7x"}  # fmt: skip
    for name, kind in kinds.items():
        has = tpu.get_tpu_info_for_chip(tpu.ChipVersion(name), 1).fp8_ops_per_second > 0
        if has:
            quantize.check("fp8", chip("tpu", kind))
        else:
            with pytest.raises(ConfigError):
                quantize.check("fp8", chip("tpu", kind))
