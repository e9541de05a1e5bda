"""Attention within segments: one signature for every platform, causal or both ways.

Training walks blocks of queries and keys with a running softmax (FlashAttention-2, arXiv
2307.08691), so scores never exist as a whole, and visits no key block that lies in the future, in
other documents or outside the window. On a CPU forward and backward take 2.7x less time than with
whole scores at 256 tokens, and 5x less at 704 tokens of packed documents.

Letters: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H width of a head,
C tokens of a block, M blocks of a row. A name ending in _i or _j is that block's part.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtune.sharding import BATCH

_BLOCK_CPU = 64  # scores of a block stay in the cache; 32 and 128 are slower
_BLOCK = 512  # elsewhere, the largest block; lengths are padded to multiples of the CPU's
_LEAST = float(jnp.finfo(jnp.float32).min)
_ENDLESS = 2**30  # a reach that covers every distance, and two of which do not overflow


class _Rules(NamedTuple):
    """What is fixed when the program is built."""

    scale: float
    softcap: float  # 0: none
    causal: bool


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    offset: jax.Array | int,
    *,
    scale: float,
    softcap: float = 0.0,
    window: jax.Array | int = 0,
    windows: tuple[int, ...] = (),
    causal: bool = True,
) -> jax.Array:
    """Query t sees key s when both stand in one segment and s <= t + offset. Returns [B, T, N, H].

    Scores and softmax are float32. Differentiable in training only.

    Args:
      offset: slot of the first query among the keys: the number 0 in training, where keys and
        queries are the same tokens, and in decoding the number of cached tokens, an array.
      scale: factor of the scores.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118); 0: off.
      window: in tokens, a number or a traced int32 that differs by layer; 0: no window. Causal, it
        counts the keys a query sees, itself among them: (t + offset) - s < window. Otherwise it is
        the distance on either side: |t - s| <= window. Both are `config.sliding_window` of
        transformers; ModernBERT's `local_attention` is twice the latter.
      windows: every value that a traced `window` can have.
      causal: False lets a query see its whole segment; without a cache only.
    """
    rules, reach = _Rules(scale, softcap, causal), _reach(window, causal)
    if not isinstance(offset, int):
        assert causal, "with a cache, attention is causal"
        return _whole(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, reach, rules)
    assert (offset, q_BTNH.shape[1]) == (0, k_BSKH.shape[1]), "without a cache, keys are queries"
    mesh = jax.sharding.get_abstract_mesh()
    blockwise = partial(_padded, rules=rules)
    if not mesh.empty and mesh.size > 1:
        # Every device skips blocks by its own rows, and nothing is left to the partitioner.
        fits = q_BTNH.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH) == 0
        split = k_BSKH.shape[2] % mesh.shape["tensor"] == 0
        rows = BATCH if fits else None
        spec = P(rows, None, "tensor" if split else None, None)
        blockwise = jax.shard_map(
            blockwise,
            in_specs=(spec, spec, spec, P(rows, None), P()),
            out_specs=spec,
            check_vma=False,
        )
    return blockwise(q_BTNH, k_BSKH, v_BSKH, segments_BT, reach)


def _reach(window: jax.Array | int, causal: bool) -> jax.Array | None:
    """The largest distance between a query and a key it sees, int32; None: any."""
    if not isinstance(window, jax.Array) and window == 0:
        return None
    window = jnp.asarray(window, jnp.int32)
    return jnp.where(window > 0, window - int(causal), _ENDLESS)


def _whole(
    q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, reach, rules: _Rules
) -> jax.Array:
    rows, length, heads, width = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(rows, length, k_BSKH.shape[2], -1, width)
    scores_BKGTS = rules.scale * _einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    if rules.softcap:
        scores_BKGTS = rules.softcap * jnp.tanh(scores_BKGTS / rules.softcap)
    slots_T = jnp.arange(length)[:, None] + offset
    sees_TS = _sees(slots_T, jnp.arange(k_BSKH.shape[1]), reach, rules)
    mask_BTS = sees_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, _LEAST)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    return out_BTKGH.reshape(rows, length, heads, width)


def _padded(q_BTNH, k_BSKH, v_BSKH, segments_BT, reach, *, rules: _Rules) -> jax.Array:
    """Heads before tokens, whole blocks, and back."""
    rows, length, heads, width = q_BTNH.shape
    tail = ((0, 0), (0, -length % _BLOCK_CPU))
    q_BTNH, k_BSKH, v_BSKH = [jnp.pad(x, (*tail, (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH)]
    q_BTKGH = q_BTNH.reshape(rows, -1, k_BSKH.shape[2], heads // k_BSKH.shape[2], width)
    q_BKGTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    segments_BT = jnp.pad(segments_BT, tail, constant_values=-1)  # no padding of a row sees it
    out_BKGTH: Any = _blockwise(q_BKGTH, k_BKSH, v_BKSH, segments_BT, reach, rules)
    out_BTNH = jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(q_BTNH.shape)
    return out_BTNH[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(q_BKGTH, k_BKSH, v_BKSH, segments_BT, reach, rules: _Rules) -> jax.Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT, reach, rules)[0]


def _forward(q_BKGTH, k_BKSH, v_BKSH, segments_BT, reach, rules: _Rules):
    inputs = (q_BKGTH, k_BKSH, v_BKSH, segments_BT, reach)
    out_BKGTH, lse_BKGT = _by_platform(_walk, rules, *inputs)
    return out_BKGTH, (*inputs, out_BKGTH, lse_BKGT)


def _backward(rules: _Rules, residuals, dout_BKGTH):
    return *_by_platform(_walk_back, rules, *residuals, dout_BKGTH), None, None


_blockwise.defvjp(_forward, _backward)


def _by_platform(walk: Callable, rules: _Rules, q_BKGTH, *rest) -> Any:
    length = q_BKGTH.shape[3]
    return jax.lax.platform_dependent(
        q_BKGTH,
        *rest,
        cpu=partial(walk, rules=rules, size=_BLOCK_CPU),
        default=partial(walk, rules=rules, size=math.gcd(length, _BLOCK)),
    )


def _walk(q_BKGTH, k_BKSH, v_BKSH, segments_BT, reach, *, rules: _Rules, size: int):
    """-> (output, log of the sum of exponentials [B, K, G, T])."""
    first_M, stop_M = _key_blocks(segments_BT, reach, rules, size)

    def queries(i, carry):
        out_BKGTH, lse_BKGT = carry
        q_i = _block(q_BKGTH, i, 3, size)

        def keys(j, carry):
            top_i, sum_i, out_i = carry
            v_j = _block(v_BKSH, j, 2, size)
            scores_ij, _ = _scores(q_i, k_BKSH, segments_BT, reach, i, j, rules, size)
            new_i = jnp.maximum(top_i, scores_ij.max(axis=-1))
            exp_ij, shrink_i = jnp.exp(scores_ij - new_i[..., None]), jnp.exp(top_i - new_i)
            out_i = shrink_i[..., None] * out_i + _einsum(
                "BKGTS,BKSH->BKGTH", exp_ij.astype(v_j.dtype), v_j
            )
            return new_i, shrink_i * sum_i + exp_ij.sum(axis=-1), out_i

        zero_i = jnp.zeros(q_i.shape[:-1], jnp.float32)
        start = (zero_i + _LEAST, zero_i, jnp.zeros(q_i.shape, jnp.float32))
        top_i, sum_i, out_i = jax.lax.fori_loop(first_M[i], stop_M[i], keys, start)
        out_i = (out_i / sum_i[..., None]).astype(out_BKGTH.dtype)
        return _put(out_BKGTH, out_i, i, 3), _put(lse_BKGT, top_i + jnp.log(sum_i), i, 3)

    start = (jnp.zeros_like(q_BKGTH), jnp.zeros(q_BKGTH.shape[:-1], jnp.float32))
    return jax.lax.fori_loop(0, len(first_M), queries, start)


def _walk_back(
    q_BKGTH,
    k_BKSH,
    v_BKSH,
    segments_BT,
    reach,
    out_BKGTH,
    lse_BKGT,
    dout_BKGTH,
    *,
    rules: _Rules,
    size: int,
):
    """-> gradients of q, k and v; probabilities are made again, block by block."""
    first_M, stop_M = _key_blocks(segments_BT, reach, rules, size)
    mean_BKGT = (dout_BKGTH.astype(jnp.float32) * out_BKGTH).sum(axis=-1)

    def queries(i, carry):
        dq_BKGTH, dk_BKSH, dv_BKSH = carry
        q_i, dout_i = _block(q_BKGTH, i, 3, size), _block(dout_BKGTH, i, 3, size)
        lse_i, mean_i = _block(lse_BKGT, i, 3, size), _block(mean_BKGT, i, 3, size)

        def keys(j, carry):
            dq_i, dk_BKSH, dv_BKSH = carry
            k_j, v_j = _block(k_BKSH, j, 2, size), _block(v_BKSH, j, 2, size)
            scores_ij, slope_ij = _scores(q_i, k_BKSH, segments_BT, reach, i, j, rules, size)
            probs_ij = jnp.exp(scores_ij - lse_i[..., None])
            dprobs_ij = _einsum("BKGTH,BKSH->BKGTS", dout_i, v_j)
            dscores_ij = slope_ij * probs_ij * (dprobs_ij - mean_i[..., None])
            dscores_ij = dscores_ij.astype(k_j.dtype)
            dv_j = _einsum("BKGTS,BKGTH->BKSH", probs_ij.astype(v_j.dtype), dout_i)
            dk_j = _einsum("BKGTS,BKGTH->BKSH", dscores_ij, q_i)
            dq_i += _einsum("BKGTS,BKSH->BKGTH", dscores_ij, k_j)
            dk_BKSH = _put(dk_BKSH, _block(dk_BKSH, j, 2, size) + dk_j, j, 2)
            return dq_i, dk_BKSH, _put(dv_BKSH, _block(dv_BKSH, j, 2, size) + dv_j, j, 2)

        start = (jnp.zeros(q_i.shape, jnp.float32), dk_BKSH, dv_BKSH)
        dq_i, dk_BKSH, dv_BKSH = jax.lax.fori_loop(first_M[i], stop_M[i], keys, start)
        return _put(dq_BKGTH, dq_i.astype(q_i.dtype), i, 3), dk_BKSH, dv_BKSH

    zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    start = (jnp.zeros_like(q_BKGTH), zeros_BKSH, zeros_BKSH)
    dq_BKGTH, dk_BKSH, dv_BKSH = jax.lax.fori_loop(0, len(first_M), queries, start)
    return dq_BKGTH, dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype)


def _key_blocks(segments_BT, reach, rules: _Rules, size: int):
    """The first key block each query block visits and the one behind its last: [M], [M].

    Visited are blocks that have a segment in common with it, in any row, and are within reach.
    """
    # Padding stands behind the documents, so as the highest segment it keeps the ranges narrow.
    order_BT = jnp.where(segments_BT <= 0, jnp.iinfo(jnp.int32).max, segments_BT)
    order_BMC = order_BT.reshape(order_BT.shape[0], -1, size)
    low_BM, high_BM = order_BMC.min(axis=-1), order_BMC.max(axis=-1)
    below_BMM = low_BM[:, :, None] <= high_BM[:, None, :]
    common_MM = (below_BMM & below_BMM.swapaxes(1, 2)).any(axis=0)
    count = len(common_MM)
    block_M = jnp.arange(count)
    first_M, stop_M = jnp.argmax(common_MM, axis=1), block_M + 1
    if not rules.causal:
        stop_M = count - jnp.argmax(common_MM[:, ::-1], axis=1)
    if reach is not None:
        first_M = jnp.maximum(first_M, (block_M * size - reach) // size)
        stop_M = jnp.minimum(stop_M, ((block_M + 1) * size - 1 + reach) // size + 1)
    return first_M, stop_M


def _scores(q_i, k_BKSH, segments_BT, reach, i, j, rules: _Rules, size: int):
    """Masked scores [B, K, G, C, C] of query block i and key block j, and their derivative.

    The derivative is with respect to q k: a factor of the same shape, or one number.
    """
    scores_ij = rules.scale * _einsum("BKGTH,BKSH->BKGTS", q_i, _block(k_BKSH, j, 2, size))
    slope_ij = rules.scale
    if rules.softcap:
        tanh_ij = jnp.tanh(scores_ij / rules.softcap)
        scores_ij, slope_ij = rules.softcap * tanh_ij, rules.scale * (1 - tanh_ij * tanh_ij)
    slots = jnp.arange(size)
    sees_CC = _sees(i * size + slots[:, None], j * size + slots, reach, rules)
    segments_i, segments_j = (_block(segments_BT, at, 1, size) for at in (i, j))
    mask_BCC = sees_CC & (segments_i[:, :, None] == segments_j[:, None, :])
    return jnp.where(mask_BCC[:, None, None], scores_ij, _LEAST), slope_ij


def _sees(query_T, key_S, reach, rules: _Rules) -> jax.Array | bool:
    """Whether queries in slots [T, 1] may see keys in slots [S], by their distance alone."""
    sees_TS = key_S <= query_T if rules.causal else True
    if reach is not None:
        sees_TS &= jnp.abs(query_T - key_S) <= reach
    return sees_TS


_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _block(x: jax.Array, number, axis: int, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _put(x: jax.Array, part: jax.Array, number, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * part.shape[axis], axis)
