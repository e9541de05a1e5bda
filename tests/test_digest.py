"""The digest: its value is part of the checkpoint format, and small changes change it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.digest import digest


def reference(array: np.ndarray[Any, Any]) -> list[int]:
    """The same sums in plain Python integers, over the flat array."""
    width = min(array.dtype.itemsize, 4)
    words = np.frombuffer(array.tobytes(), f"<u{width}").tolist()
    sums = []
    for constant in (0x9E3779B1, 0x7FEB352D):
        total = 0
        for index, word in enumerate(words):
            bits = word ^ (index * constant & 0xFFFFFFFF)
            bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
            bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
            total += bits ^ bits >> 16
        sums.append(total & 0xFFFFFFFF)
    return sums


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
def test_the_value_is_that_of_the_recipe(dtype: str, shape: tuple[int, ...]):
    array = (100 * np.random.default_rng(0).standard_normal(shape)).astype(jnp.dtype(dtype))
    assert digest(jnp.asarray(array)).tolist() == reference(np.asarray(array))


def test_the_value_is_the_one_in_checkpoints_already_written():
    array = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    assert digest(array).tolist() == [1893641108, 2403849761]


def test_64_bit_elements_are_digested_whole():
    with jax.enable_x64(True):
        array = np.random.default_rng(0).standard_normal((3, 4))
        assert digest(jnp.asarray(array)).tolist() == reference(array)


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (None, None)])
def test_every_sharding_gives_the_same_value(spec: tuple[str | None, ...]):
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
    array = jax.random.normal(jax.random.key(0), (16, 24))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digest(sharded).tolist() == digest(array).tolist()


@settings(deadline=None)
@given(st.integers(0, 63), st.integers(0, 31))
def test_every_single_bit_counts(index: int, bit: int):
    words = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    flipped = words.copy()
    flipped[index] ^= np.uint32(1 << bit)
    assert digest(words).tolist() != digest(flipped).tolist()


@settings(deadline=None)
@given(st.permutations(range(16)))
def test_the_order_counts(order: list[int]):
    values = np.arange(16, dtype=np.float32)
    same = digest(values[order]).tolist() == digest(values).tolist()
    assert same == (order == sorted(order))
