"""Attention by blocks of queries and keys: the form for CPUs, and for what no other kernel takes.

A running softmax walks the blocks (FlashAttention-2, arXiv 2307.08691), so scores never exist as a
whole, and no key block is visited that lies in the future, in other documents or outside the
window. On a CPU forward and backward take 2.7x less time than with whole scores at 256 tokens, and
5x less at 704 tokens of packed documents.

Letters as in attention.py; also C tokens of a block, M blocks of queries, J blocks of keys. A name
ending in _i or _j is that block's part.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune import sharding

_BLOCK_CPU = 64  # scores of a block stay in the cache; 32 and 128 are slower
_BLOCK = 512  # elsewhere, the largest block; lengths are padded to multiples of the CPU's
LEAST = float(jnp.finfo(jnp.float32).min)
_ENDLESS = 2**30  # a reach that covers every distance, and two of which do not overflow


class Rules(NamedTuple):
    """What is fixed when the program is built."""

    scale: float
    softcap: float  # 0: none
    causal: bool


def reach_of(window: jax.Array | int, causal: bool) -> jax.Array | None:
    """The largest distance between a query and a key it sees, int32; None: any."""
    if not isinstance(window, jax.Array) and window == 0:
        return None
    window = jnp.asarray(window, jnp.int32)
    return jnp.where(window > 0, window - int(causal), _ENDLESS)


def sees(query_T, key_S, reach, rules: Rules) -> jax.Array | bool:
    """Whether queries in slots [T, 1] may see keys in slots [S], by their distance alone."""
    sees_TS = key_S <= query_T if rules.causal else True
    if reach is not None:
        sees_TS &= jnp.abs(query_T - key_S) <= reach
    return sees_TS


def blockwise(
    q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, starts_P, reach, *, rules: Rules
) -> jax.Array:
    """Attention -> [B, T, N, H]; segments and rules as in attention.py.

    Args:
      starts_P: slots among the keys of the first query of each of P equally long spans, which
        the queries consist of.
    """
    (rows, length, heads, width), spans = q_BTNH.shape, len(starts_P)
    tail = ((0, 0), (0, -k_BSKH.shape[1] % _BLOCK_CPU))
    k_BKSH, v_BKSH = [jnp.pad(x, (*tail, (0, 0), (0, 0))).swapaxes(1, 2) for x in (k_BSKH, v_BSKH)]
    # No token's padding sees or is seen by a row's own padding, whose segment is 0.
    segments_BS = jnp.pad(segments_BS, tail, constant_values=-1)
    tail = ((0, 0), (0, 0), (0, -(length // spans) % _BLOCK_CPU))
    q_BPTKGH = q_BTNH.reshape(rows, spans, length // spans, k_BSKH.shape[2], -1, width)
    q_BPTKGH = jnp.pad(q_BPTKGH, (*tail, *[(0, 0)] * 3))
    q_BTKGH = q_BPTKGH.reshape(rows, -1, *q_BPTKGH.shape[3:])
    segments_BPT = jnp.pad(segments_BT.reshape(rows, spans, -1), tail, constant_values=-1)
    size = _BLOCK_CPU
    if sharding.platform() != "cpu":
        size = math.gcd(segments_BPT.shape[2], segments_BS.shape[1], _BLOCK)
    inside = jnp.arange(0, segments_BPT.shape[2], size)
    starts_M = (jnp.asarray(starts_P, jnp.int32)[:, None] + inside).reshape(-1)
    out_BKGTH: Any = _attend(
        jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4)),
        k_BKSH,
        v_BKSH,
        segments_BPT.reshape(rows, -1),
        segments_BS,
        starts_M,
        reach,
        rules,
        size,
    )
    out_BPTNH = jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(rows, spans, -1, heads, width)
    return out_BPTNH[:, :, : length // spans].reshape(q_BTNH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, starts_M, reach, rules: Rules, size: int
) -> jax.Array:
    inputs = (q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, starts_M, reach)
    return _forward(*inputs, rules, size)[0]


def _forward(
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, starts_M, reach, rules: Rules, size: int
):
    inputs = (q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, starts_M, reach)
    # Saved by name, both, the backward pass need not walk forward again.
    out_BKGTH, lse_BKGT = (checkpoint_name(x, "context") for x in _walk(*inputs, rules, size))
    return out_BKGTH, (*inputs, out_BKGTH, lse_BKGT)


def _backward(rules: Rules, size: int, residuals, dout_BKGTH):
    gradients = _walk_back(*residuals, dout_BKGTH=dout_BKGTH, rules=rules, size=size)
    return *gradients, None, None, None, None


_attend.defvjp(_forward, _backward)


def _walk(
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, segments_BS, starts_M, reach, rules: Rules, size: int
):
    """-> (output, log of the sum of exponentials [B, K, G, T])."""
    first_M, stop_M = key_blocks(segments_BT, segments_BS, starts_M, reach, rules, size)

    def queries(i, carry):
        out_BKGTH, lse_BKGT = carry
        q_i, segments_i = _block(q_BKGTH, i, 3, size), _block(segments_BT, i, 1, size)

        def keys(j, carry):
            top_i, sum_i, out_i = carry
            k_j, v_j = _block(k_BKSH, j, 2, size), _block(v_BKSH, j, 2, size)
            mask_ij = _mask(segments_i, segments_BS, starts_M[i], j, reach, rules, size)
            scores_ij, _ = _scores(q_i, k_j, mask_ij, rules)
            new_i = jnp.maximum(top_i, scores_ij.max(axis=-1))
            exp_ij, shrink_i = jnp.exp(scores_ij - new_i[..., None]), jnp.exp(top_i - new_i)
            out_i = shrink_i[..., None] * out_i + einsum(
                "BKGTS,BKSH->BKGTH", exp_ij.astype(v_j.dtype), v_j
            )
            return new_i, shrink_i * sum_i + exp_ij.sum(axis=-1), out_i

        zero_i = jnp.zeros(q_i.shape[:-1], jnp.float32)
        start = (zero_i + LEAST, zero_i, jnp.zeros(q_i.shape, jnp.float32))
        top_i, sum_i, out_i = jax.lax.fori_loop(first_M[i], stop_M[i], keys, start)
        sum_i = jnp.where(sum_i > 0, sum_i, 1)  # a block of mere filling may visit no key
        out_i = (out_i / sum_i[..., None]).astype(out_BKGTH.dtype)
        return _put(out_BKGTH, out_i, i, 3), _put(lse_BKGT, top_i + jnp.log(sum_i), i, 3)

    start = (jnp.zeros_like(q_BKGTH), jnp.zeros(q_BKGTH.shape[:-1], jnp.float32))
    return jax.lax.fori_loop(0, len(first_M), queries, start)


def _walk_back(
    q_BKGTH,
    k_BKSH,
    v_BKSH,
    segments_BT,
    segments_BS,
    starts_M,
    reach,
    out_BKGTH,
    lse_BKGT,
    *,
    dout_BKGTH,
    rules: Rules,
    size: int,
):
    """-> gradients of q, k and v; probabilities are made again, block by block."""
    first_M, stop_M = key_blocks(segments_BT, segments_BS, starts_M, reach, rules, size)
    mean_BKGT = (dout_BKGTH.astype(jnp.float32) * out_BKGTH).sum(axis=-1)

    def queries(i, carry):
        dq_BKGTH, dk_BKSH, dv_BKSH = carry
        q_i, dout_i = _block(q_BKGTH, i, 3, size), _block(dout_BKGTH, i, 3, size)
        lse_i, mean_i = _block(lse_BKGT, i, 3, size), _block(mean_BKGT, i, 3, size)
        segments_i = _block(segments_BT, i, 1, size)

        def keys(j, carry):
            dq_i, dk_BKSH, dv_BKSH = carry
            k_j, v_j = _block(k_BKSH, j, 2, size), _block(v_BKSH, j, 2, size)
            mask_ij = _mask(segments_i, segments_BS, starts_M[i], j, reach, rules, size)
            scores_ij, slope_ij = _scores(q_i, k_j, mask_ij, rules)
            probs_ij = jnp.exp(scores_ij - lse_i[..., None])
            dprobs_ij = einsum("BKGTH,BKSH->BKGTS", dout_i, v_j)
            dscores_ij = slope_ij * probs_ij * (dprobs_ij - mean_i[..., None])
            dscores_ij = dscores_ij.astype(k_j.dtype)
            dv_j = einsum("BKGTS,BKGTH->BKSH", probs_ij.astype(v_j.dtype), dout_i)
            dk_j = einsum("BKGTS,BKGTH->BKSH", dscores_ij, q_i)
            dq_i += einsum("BKGTS,BKSH->BKGTH", dscores_ij, k_j)
            dk_BKSH = _put(dk_BKSH, _block(dk_BKSH, j, 2, size) + dk_j, j, 2)
            return dq_i, dk_BKSH, _put(dv_BKSH, _block(dv_BKSH, j, 2, size) + dv_j, j, 2)

        start = (jnp.zeros(q_i.shape, jnp.float32), dk_BKSH, dv_BKSH)
        dq_i, dk_BKSH, dv_BKSH = jax.lax.fori_loop(first_M[i], stop_M[i], keys, start)
        return _put(dq_BKGTH, dq_i.astype(q_i.dtype), i, 3), dk_BKSH, dv_BKSH

    zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
    start = (jnp.zeros_like(q_BKGTH), zeros_BKSH, zeros_BKSH)
    dq_BKGTH, dk_BKSH, dv_BKSH = jax.lax.fori_loop(0, len(first_M), queries, start)
    return dq_BKGTH, dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype)


def key_blocks(segments_BT, segments_BS, starts_M, reach, rules: Rules, size: int):
    """The first key block each query block visits and the one behind its last: [M], [M].

    Visited are blocks that have a segment in common with it, in any row, and are within reach.
    """
    low_BM, high_BM = _range(segments_BT, size)
    low_BJ, high_BJ = _range(segments_BS, size)
    above_BMJ = low_BM[:, :, None] <= high_BJ[:, None, :]
    common_MJ = (above_BMJ & (low_BJ[:, None, :] <= high_BM[:, :, None])).any(axis=0)
    count, last_M = common_MJ.shape[1], starts_M + size - 1
    first_M = jnp.argmax(common_MJ, axis=1)
    stop_M = count - jnp.argmax(common_MJ[:, ::-1], axis=1)
    if rules.causal:
        stop_M = jnp.minimum(stop_M, last_M // size + 1)
    if reach is not None:
        first_M = jnp.maximum(first_M, (starts_M - reach) // size)
        stop_M = jnp.minimum(stop_M, (last_M + reach) // size + 1)
    return first_M, stop_M


def _range(segments_BT, size: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest segment of each block: [B, M], [B, M]."""
    # Padding stands behind the documents, so as the highest segment it keeps the ranges narrow.
    order_BT = jnp.where(segments_BT <= 0, jnp.iinfo(jnp.int32).max, segments_BT)
    order_BMC = order_BT.reshape(order_BT.shape[0], -1, size)
    return order_BMC.min(axis=-1), order_BMC.max(axis=-1)


def _mask(segments_i, segments_BS, start, j, reach, rules: Rules, size: int) -> jax.Array:
    """Which keys of block j the queries see that begin in slot `start`: [B, C, C]."""
    slots = jnp.arange(size)
    sees_CC = sees(start + slots[:, None], j * size + slots, reach, rules)
    segments_j = _block(segments_BS, j, 1, size)
    return sees_CC & (segments_i[:, :, None] == segments_j[:, None, :])


def _scores(q_i, k_j, mask_BCC, rules: Rules):
    """Masked scores [B, K, G, C, C] of a block of queries and one of keys, and their derivative.

    The derivative is with respect to q k: a factor of the same shape, or one number.
    """
    scores_ij = rules.scale * einsum("BKGTH,BKSH->BKGTS", q_i, k_j)
    slope_ij = rules.scale
    if rules.softcap:
        tanh_ij = jnp.tanh(scores_ij / rules.softcap)
        scores_ij, slope_ij = rules.softcap * tanh_ij, rules.scale * (1 - tanh_ij * tanh_ij)
    return jnp.where(mask_BCC[:, None, None], scores_ij, LEAST), slope_ij


einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _block(x: jax.Array, number, axis: int, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _put(x: jax.Array, part: jax.Array, number, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * part.shape[axis], axis)
