"""Attention on TPUs: jax's splash kernel, which keeps scores in the chip's fast memory.

Masks are functions, so none is ever as large as the scores, and blocks of keys that no query of a
block sees are not visited. Off a TPU the kernel is interpreted, which is for tests.

Letters as in attention.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import sharding
from jaxtune.kernels.blockwise import Rules

_LANES = 128  # lengths are multiples of it
_BLOCKS = (1024, 512, 256, _LANES)
_WIDEST = 256  # bytes of a head up to which the largest block leaves room in 16 MiB, on a v4
_COMPUTED = 512  # keys of a block that are multiplied at a time
_FUSED = 4  # blocks of keys up to which one backward kernel makes all three gradients


def _blocks(width: int, dtype) -> tuple[int, ...]:
    """Blocks that may be taken with heads of this width."""
    narrow = max(width, _LANES) * jnp.dtype(dtype).itemsize <= _WIDEST
    return _BLOCKS if narrow else _BLOCKS[1:]


def padded(length: int, blocks: Sequence[int]) -> int:
    """A row's length in the kernel: whole blocks, the largest that add no more than an eighth."""
    block = next((b for b in blocks if -length % b <= length // 8), _LANES)
    return -(-length // block) * block


def make_kernels(
    spans: np.ndarray, k_BSKH: jax.Array, groups: int, windows: Sequence[int], rules: Rules
) -> list[Any]:
    """A kernel for each of these windows: a pytree whose leaves tell which blocks are visited.

    Args:
      spans: slots among the keys in which equally long spans of queries begin, [shards, P].
      k_BSKH: the keys, of whole rows.
      groups: query heads for each head of keys.
      windows: 0 is none.
    """
    keys, shards, blocks = k_BSKH.shape[1], len(spans), _blocks(k_BSKH.shape[3], k_BSKH.dtype)
    filled = padded(keys, blocks)
    inside_T = np.arange(filled if spans.size == 1 else keys // spans.size)
    slots_T = (spans.reshape(-1, 1) + inside_T).reshape(-1).astype(np.int32)
    shape = (len(slots_T), filled)
    block_T, block_S = (
        next(b for b in blocks if length % b == 0) for length in (len(slots_T) // shards, filled)
    )
    fused = shape[1] // block_S <= _FUSED
    sizes = kernels.BlockSizes(
        block_q=block_T,
        block_kv=block_S,
        block_kv_compute=min(block_S, _COMPUTED),
        block_q_dkv=block_T,
        block_kv_dkv=block_S,
        block_kv_dkv_compute=min(block_S, _COMPUTED),
        block_q_dq=None if fused else block_T,
        block_kv_dq=None if fused else block_S,
        use_fused_bwd_kernel=fused,
    )

    def make(window: int):
        mask, parts = _mask(window, shape, rules.causal), shards
        if isinstance(mask, masks.FullMask):  # one for all shards, which are alike
            mask, parts = masks.FullMask((shape[0] // shards, shape[1])), 1
        else:
            mask.q_sequence = slots_T
        return kernels.make_splash_mqa(
            masks.MultiHeadMask([mask] * groups),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=parts,
            attn_logits_soft_cap=rules.softcap or None,
            residual_checkpoint_name="context",
            interpret=sharding.platform() != "tpu",
        )

    return [make(window) for window in windows]


def _mask(window: int, shape: tuple[int, int], causal: bool) -> Any:
    if not window or window >= shape[1] - (not causal):  # as far as there are keys
        return masks.CausalMask(shape) if causal else masks.FullMask(shape)
    return masks.LocalMask(shape, (window - 1, 0) if causal else (window, window), 0)


def specs(made: list[Any], axis: str | None) -> list[Any]:
    """PartitionSpecs of the kernels' leaves for shard_map: queries are cut over this mesh axis."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return []

    def of(kernel):
        cut = P(None, None if kernel.fwd_mask_info.q_sequence is None else axis)
        return kernel.manual_sharding_spec(NamedSharding(mesh, cut))

    return [of(kernel) for kernel in made]


def number_of(window: jax.Array | int, windows: Sequence[int]) -> jax.Array:
    """Which of these windows, in ascending order, this one is: int32."""
    return jnp.sum(window > jnp.asarray(windows[:-1], jnp.int32), dtype=jnp.int32)


def splash(
    q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, made: list[Any], which, *, rules: Rules
) -> jax.Array:
    """Attention -> [B, T, N, H] with kernel number `which` of those made for these lengths."""
    rows, length, heads, width = q_BTNH.shape
    # The kernel knows no factor; this product is rounded once, like every product before it.
    q_BTNH = (q_BTNH.astype(jnp.float32) * rules.scale).astype(q_BTNH.dtype)
    keys = k_BSKH.shape[1]
    tail_S = ((0, 0), (0, padded(keys, _blocks(width, k_BSKH.dtype)) - keys))
    tail_T = tail_S if length == keys else ((0, 0), (0, 0))  # cut rows end with a block
    q_BTNH = jnp.pad(q_BTNH, (*tail_T, (0, 0), (0, 0)))
    k_BSKH, v_BSKH = [jnp.pad(x, (*tail_S, (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH)]
    # Filling sees filling, so no row of scores is empty; no token sees it.
    segments = kernels.SegmentIds(
        jnp.pad(segments_BT, tail_T, constant_values=-1),
        jnp.pad(segments_BS, tail_S, constant_values=-1),
    )
    q_BTKGH = q_BTNH.reshape(rows, -1, k_BSKH.shape[2], heads // k_BSKH.shape[2], width)
    q_BKGTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def run(kernel, q_BKGTH, k_BKSH, v_BKSH, segments):
        of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        return jax.vmap(of_heads)(q_BKGTH, k_BKSH, v_BKSH, segments)

    inputs = (q_BKGTH, k_BKSH, v_BKSH, segments)
    if len(made) == 1:
        out_BKGTH = run(made[0], *inputs)
    else:
        out_BKGTH = jax.lax.switch(which, [partial(run, kernel) for kernel in made], *inputs)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(q_BTNH.shape)[:, :length]
