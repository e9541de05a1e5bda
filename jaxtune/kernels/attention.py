"""Causal attention within segments: one signature for every platform.

Letters: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H width of a head.
"""

import jax
import jax.numpy as jnp

_BLOCK = 256  # queries scored at once: bounds memory, and skips keys that lie in the future


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    offset: jax.Array | int,
    *,
    scale: float,
) -> jax.Array:
    """Query t sees key s when s <= t + offset and both stand in one segment. Returns [B, T, N, H].

    `offset` is the slot of the first query among the keys: 0 in training, the number of cached
    tokens in decoding. Scores and softmax are float32.
    """
    length = q_BTNH.shape[1]
    if not isinstance(offset, int):
        return _attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, scale)
    blocks = []
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        last = stop + offset
        blocks.append(
            _attend(
                q_BTNH[:, start:stop],
                k_BSKH[:, :last],
                v_BSKH[:, :last],
                segments_BT[:, start:stop],
                segments_BS[:, :last],
                start + offset,
                scale,
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, scale) -> jax.Array:
    rows, length, heads, width = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(rows, length, k_BSKH.shape[2], -1, width)
    scores_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    causal_TS = jnp.arange(k_BSKH.shape[1]) <= jnp.arange(length)[:, None] + offset
    mask_BTS = causal_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    return out_BTKGH.reshape(rows, length, heads, width)
