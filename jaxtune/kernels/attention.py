"""Attention within segments: one signature for every platform, causal or both ways.

TPUs have a kernel of their own, splash, and NVIDIA's GPUs one of cuDNN; elsewhere, and where these
do not apply, blocks of queries and keys are walked. `chosen` says which it is.

Where the mesh cuts rows over `context`, keys and values are gathered, and queries change places so
that every device holds an early and a late span of its row. Late queries see more keys: without the
exchange the last of n devices would work 2 - 1/n times as long as the mean.

Letters: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H width of a head,
P spans of queries.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtune import sharding
from jaxtune.kernels import cudnn
from jaxtune.kernels.blockwise import LEAST, Rules, blockwise, einsum, reach_of, sees
from jaxtune.sharding import BATCH, CONTEXT


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
      windows: every value that a traced `window` can have; TPU kernels are built for each.
      causal: False lets a query see its whole segment; without a cache only.
    """
    rules, reach = Rules(scale, softcap, causal), reach_of(window, causal)
    if not isinstance(offset, int):
        assert causal, "with a cache, attention is causal"
        return _whole(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, reach, rules)
    assert (offset, q_BTNH.shape[1]) == (0, k_BSKH.shape[1]), "without a cache, keys are queries"
    mesh, length = jax.sharding.get_abstract_mesh(), q_BTNH.shape[1]
    shards = 1 if mesh.empty or length % mesh.shape[CONTEXT] else mesh.shape[CONTEXT]
    spans = _spans(length, shards, causal)
    case = Case(
        sharding.platform(),
        sharding.device_kind(),
        _capability(),
        q_BTNH.dtype,
        q_BTNH.shape[3],
        length,
        shards,
        rules,
        windows if isinstance(window, jax.Array) else (window,),
    )
    axis = CONTEXT if shards > 1 else None
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    form, extra, extra_specs = _form(case, spans, k_BSKH, groups, window, reach, axis)
    local = partial(_local, form=form, shards=shards, dealt=spans.shape[1] > 1)
    if not mesh.empty and mesh.size > 1:
        local = _on_devices(local, mesh, q_BTNH, k_BSKH, axis, extra_specs)
    return local(q_BTNH, k_BSKH, v_BSKH, segments_BT, extra)


def _on_devices(local, mesh, q_BTNH, k_BSKH, axis: str | None, extra_specs):
    """Every device skips blocks by its own rows, and nothing is left to the partitioner."""
    fits = q_BTNH.shape[0] % math.prod(mesh.shape[name] for name in BATCH) == 0
    split = k_BSKH.shape[2] % mesh.shape["tensor"] == 0
    tokens = P(BATCH if fits else None, axis)
    spec = P(*tokens, "tensor" if split else None, None)
    in_specs = (spec, spec, spec, tokens, extra_specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)


_NO_SPLASH = ("TPU v2", "TPU v3")  # Mosaic has no bfloat16 products for them


class Case(NamedTuple):
    """What decides which form of attention a program has."""

    platform: str
    kind: str  # of the device
    capability: str  # of an NVIDIA GPU
    dtype: Any
    width: int  # of a head
    length: int  # of a row
    shards: int  # of a row
    rules: Rules
    windows: tuple[int, ...]  # all that layers may have; empty: unknown


def chosen(case: Case) -> str:
    """The form for this case: "splash", "cudnn" or "blockwise"."""
    # Splash is built for each window there is, and a part of a row ends where its lanes end.
    whole = case.shards == 1 or case.length % (case.shards * 128) == 0
    if case.platform == "tpu" and case.kind not in _NO_SPLASH and case.windows and whole:
        return "splash"
    fits = cudnn.applies(case.capability, case.dtype, case.width, case.rules, case.windows)
    if case.platform == "gpu" and case.shards == 1 and fits:
        return "cudnn"
    return "blockwise"


def _capability() -> str:
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


def _form(case: Case, spans, k_BSKH, groups: int, window, reach, axis: str | None):
    """-> (function of q, k, v, segments of both and `extra`; extra; its PartitionSpecs)."""
    kind, rules = chosen(case), case.rules
    if kind == "splash":
        from jaxtune.kernels import splash  # only TPUs need it, and it takes a while

        made = splash.make_kernels(spans, k_BSKH, groups, case.windows, rules)
        extra = (made, splash.number_of(window, case.windows))
        return partial(splash.splash, rules=rules), extra, (splash.specs(made, axis), P())
    extra = (jnp.asarray(spans.reshape(-1), jnp.int32), reach)
    form = partial(blockwise, rules=rules)
    if kind == "cudnn":
        form = partial(_cudnn, window=window, rules=rules)
    return form, extra, (P(axis), P())


def _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT, *rest, window: int, rules: Rules) -> jax.Array:
    inputs = (q_BTNH, k_BSKH, v_BSKH, segments_BT)
    blocks = partial(blockwise, *inputs, *rest, rules=rules)
    return cudnn.cudnn(*inputs, window=window, rules=rules, otherwise=blocks)


def _spans(length: int, shards: int, causal: bool) -> np.ndarray:
    """Slots in which the spans of queries begin that each shard works on: [shards, P].

    _spans(80, 4, True) is [[0, 70], [60, 10], [20, 50], [40, 30]]: of its two spans the first has
    an even number, counted in tens, so that one exchange each brings the even and the odd ones.
    """
    if shards == 1 or not causal or length % (2 * shards):
        return np.arange(shards)[:, None] * (length // shards)
    last = 2 * shards - 1
    pairs = [sorted((i, last - i), key=lambda number: number % 2) for i in range(shards)]
    return np.array(pairs) * (length // (2 * shards))


def _local(q_BTNH, k_BSKH, v_BSKH, segments_BT, extra, *, form, shards: int, dealt: bool):
    """What one device does, given its part of the rows and of their tokens."""
    if shards == 1:
        return form(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT, *extra)
    gather = partial(jax.lax.all_gather, axis_name=CONTEXT, axis=1, tiled=True)
    k_BSKH, v_BSKH, segments_BS = gather(k_BSKH), gather(v_BSKH), gather(segments_BT)
    if dealt:
        q_BTNH, segments_BT = _deal(q_BTNH, shards), _deal(segments_BT, shards)
    out_BTNH = form(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, *extra)
    return _collect(out_BTNH, shards) if dealt else out_BTNH


def _moves(shards: int, parity: int) -> list[tuple[int, int]]:
    """(from, to) of the half rows 2 i + parity, which lie on shard i, to where _spans has them."""
    numbers = range(parity, 2 * shards, 2)
    return [(i, min(number, 2 * shards - 1 - number)) for i, number in enumerate(numbers)]


def _deal(x_BT: jax.Array, shards: int) -> jax.Array:
    """From each shard's tokens of the row in order to the spans it works on."""
    halves = jnp.split(x_BT, 2, axis=1)
    moves = (_moves(shards, parity) for parity in (0, 1))
    moved = [jax.lax.ppermute(x, CONTEXT, to) for x, to in zip(halves, moves, strict=True)]
    return jnp.concatenate(moved, axis=1)


def _collect(x_BT: jax.Array, shards: int) -> jax.Array:
    """The way back from _deal."""
    halves = jnp.split(x_BT, 2, axis=1)
    moves = ([(to, i) for i, to in _moves(shards, parity)] for parity in (0, 1))
    moved = [jax.lax.ppermute(x, CONTEXT, to) for x, to in zip(halves, moves, strict=True)]
    return jnp.concatenate(moved, axis=1)


def _whole(
    q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, reach, rules: Rules
) -> jax.Array:
    rows, length, heads, width = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(rows, length, k_BSKH.shape[2], -1, width)
    scores_BKGTS = rules.scale * einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    if rules.softcap:
        scores_BKGTS = rules.softcap * jnp.tanh(scores_BKGTS / rules.softcap)
    slots_T = jnp.arange(length)[:, None] + offset
    sees_TS = sees(slots_T, jnp.arange(k_BSKH.shape[1]), reach, rules)
    mask_BTS = sees_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, LEAST)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    return out_BTKGH.reshape(rows, length, heads, width)
