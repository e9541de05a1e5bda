"""Attention on NVIDIA GPUs by cuDNN, for rows that hold one document each.

jax's public call knows how long a row is, but no documents within it. What a row holds is data, so
the program looks at every batch: one with packed rows takes the other form.

Letters as in attention.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtune.kernels.blockwise import Rules


def applies(capability: str, dtype, width: int, rules: Rules, windows: tuple[int, ...]) -> bool:
    """Whether cuDNN has such a kernel.

    Args:
      capability: the GPU's compute capability, as in "9.0"; another maker's is no such number.
      width: of a head.
      windows: all of which a layer may have.
    """
    major = capability.partition(".")[0]
    widest = 0 if not major.isdigit() or int(major) < 8 else 128 if int(major) < 9 else 256
    fits = width <= widest and width % 8 == 0 and dtype in (jnp.bfloat16, jnp.float16)
    one_sided = rules.causal or windows == (0,)
    return fits and one_sided and not rules.softcap and len(windows) == 1


def cudnn(
    q_BTNH, k_BTKH, v_BTKH, segments_BT, *, window: int, rules: Rules, otherwise: Callable
) -> jax.Array:
    """Attention -> [B, T, N, H], zeros at padding; `otherwise()` where a row holds more documents.

    A row's document begins in slot 0, and padding, segment 0, follows it.
    """
    length_B = (segments_BT > 0).sum(axis=1, dtype=jnp.int32)
    inside_BT = jnp.arange(segments_BT.shape[1]) < length_B[:, None]
    alone = (segments_BT == jnp.where(inside_BT, segments_BT[:, :1], 0)).all()

    def whole():
        length_or_one_B = jnp.maximum(length_B, 1)  # an empty row has no softmax
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            scale=rules.scale,
            is_causal=rules.causal,
            query_seq_lengths=length_or_one_B,
            key_value_seq_lengths=length_or_one_B,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )

    return jax.lax.cond(alone, whole, otherwise)
