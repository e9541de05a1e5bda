"""A digest of an array that is the same on every mesh: what was read is what was written."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.jit
def digest(array: jax.Array) -> jax.Array:
    """Two 32-bit sums over bits mixed with their position: uint32[2], the same on every mesh.

    Integer sums do not depend on their order, so no sharding changes them. Finds accidents (a
    flipped bit, a swap, a shift), not attackers. The mixer is MurmurHash3's finaliser.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(8 * array.dtype.itemsize, 32)  # 64-bit elements become two, on a last axis
    bits = lax.bitcast_convert_type(array, f"uint{width}").astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, stride in enumerate(np.cumprod((1, *bits.shape[:0:-1]))[::-1][: bits.ndim]):
        # Not a reshape of an arange: iotas along the axes need no resharding.
        position += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
    return jnp.stack(
        [
            jnp.sum(_mix(bits ^ (position * jnp.uint32(constant))), dtype=jnp.uint32)
            for constant in (0x9E3779B1, 0x7FEB352D)
        ]
    )


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
