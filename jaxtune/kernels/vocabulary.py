"""The two ends of a language model, walked over the vocabulary instead of materialised.

The head's logits exist for a chunk of tokens at a time, only tokens that bear loss are visited, and
the gradient with respect to the activations is formed in the forward pass, where the probabilities
still exist (the scheme of Liger Kernel's fused linear cross entropy). A frozen head gets no
gradient at all. With the vocabulary cut over the `fsdp` mesh axis, every device scores its own rows
for the tokens of all, and activations travel instead of weights.

Letters: N tokens (B * T), C tokens in a chunk, V vocabulary (rows on this device), D model width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxtune.sharding import BATCH, CONTEXT, TOKENS, platform

_VOCAB = "fsdp"  # mesh axis over which tables are cut
_ALL = (*BATCH, CONTEXT)  # axes over which tokens are shared out
_OTHERS = tuple(axis for axis in _ALL if axis != _VOCAB)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of an embedding table, [B, T, D]; a table cut over the vocabulary stays where it is."""
    if _shards(table_VD.shape[0]) == 1:
        return table_VD[tokens_BT]

    def local(table_VD, tokens_BT):
        tokens_BT = jax.lax.all_gather(tokens_BT, _VOCAB, tiled=True)
        row_BT = tokens_BT - jax.lax.axis_index(_VOCAB) * table_VD.shape[0]
        mine_BT = (row_BT >= 0) & (row_BT < table_VD.shape[0])
        x_BTD = jnp.where(mine_BT[..., None], table_VD[jnp.where(mine_BT, row_BT, 0)], 0)
        return jax.lax.psum_scatter(x_BTD, _VOCAB, tiled=True)

    specs = (P(_VOCAB, None), TOKENS)
    return jax.shard_map(local, in_specs=specs, out_specs=P(*TOKENS, None), check_vma=False)(
        table_VD, tokens_BT
    )


class TokenLoss(NamedTuple):
    """Sums over loss-bearing tokens, float32: divide by their weight at the very end."""

    loss: jax.Array  # sum of weight * -log p(target), nats
    correct: jax.Array  # sum of weight where the target alone is the most likely token


def token_loss(x_BTD, head_VD, targets_BT, weights_BT, softcap: float = 0.0) -> TokenLoss:
    """Cross entropy of `x @ head.T` against `targets`, summed with `weights`.

    Differentiable in x and head (of the `loss` field only). With a `softcap`, a Python number,
    logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118); 0 leaves them.
    """
    with jax.named_scope("vocabulary"):  # jaxtune plan finds the walk by it
        total: Any = _token_loss(x_BTD, head_VD, targets_BT, weights_BT, softcap)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_loss(x_BTD, head_VD, targets_BT, weights_BT, softcap: float) -> TokenLoss:
    return _sharded_walk(x_BTD, head_VD, targets_BT, weights_BT, softcap, False, False)[0]


def _forward(x_BTD, head_VD, targets_BT, weights_BT, softcap: float):
    return _sharded_walk(
        x_BTD.value,
        head_VD.value,
        targets_BT.value,
        weights_BT.value,
        softcap,
        x_BTD.perturbed,
        head_VD.perturbed,
    )


def _backward(softcap: float, gradients, cotangents):
    loss = cotangents.loss
    if isinstance(loss, SymbolicZero):
        return None, None, None, None
    dx_BTD, dhead_VD = [None if g is None else (g * loss).astype(g.dtype) for g in gradients]
    return dx_BTD, dhead_VD, None, None


_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _shards(vocab: int) -> int:
    """Devices over which a table of `vocab` rows is cut in the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1 if mesh.empty else mesh.shape[_VOCAB]
    return size if vocab % size == 0 else 1


def chunk_tokens(vocab: int) -> int:
    """Tokens whose logits exist together, over `vocab` rows on this device."""
    if platform() == "cpu":
        return 256  # 128 and 512 are slower
    # On a TPU 64 MB of logits stay in the vector memory, so only the head itself is read. Below
    # about 560 tokens that reading, and not the product, would take the time (v6e).
    return 1024 if 1024 * vocab * 4 <= 2**26 else 512


def _sharded_walk(
    x_BTD, head_VD, targets_BT, weights_BT, softcap: float, grad_x: bool, grad_head: bool
):
    """-> (TokenLoss, (dx or None, dhead or None)), over all devices of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _walk(x_BTD, head_VD, targets_BT, weights_BT, softcap, grad_x, grad_head)
    cut = _shards(head_VD.shape[0]) > 1
    rows, table = TOKENS, P(_VOCAB if cut else None, None)

    def local(x_BTD, head_VD, targets_BT, weights_BT):
        gather = [x_BTD, targets_BT, weights_BT]
        if cut:
            gather = [jax.lax.all_gather(a, _VOCAB, tiled=True) for a in gather]
        total, (dx_BTD, dhead_VD) = _walk(
            gather[0], head_VD, *gather[1:], softcap, grad_x, grad_head, sharded=True, cut=cut
        )
        # Cut: each device of the axis has seen all tokens. Whole: each has seen its own.
        total = jax.lax.psum(total, _OTHERS if cut else _ALL)
        if dx_BTD is not None and cut:
            dx_BTD = jax.lax.psum_scatter(dx_BTD, _VOCAB, tiled=True)
        if dhead_VD is not None:
            dhead_VD = jax.lax.psum(dhead_VD, _OTHERS if cut else _ALL)
        return total, (dx_BTD, dhead_VD)

    gradients = (P(*TOKENS, None) if grad_x else None, table if grad_head else None)
    return jax.shard_map(
        local,
        in_specs=(P(*TOKENS, None), table, rows, rows),
        out_specs=(P(), gradients),
        check_vma=False,
    )(x_BTD, head_VD, targets_BT, weights_BT)


def _walk(
    x_BTD,
    head_VD,
    targets_BT,
    weights_BT,
    softcap: float,
    grad_x: bool,
    grad_head: bool,
    *,
    sharded: bool = False,
    cut: bool = False,
):
    """Visits the loss-bearing tokens chunk by chunk.

    `sharded`: called on every device of a mesh; `cut`: each holds its own rows of the vocabulary.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    targets_N, weights_N = targets_BT.reshape(-1), weights_BT.reshape(-1)
    count, vocab = x_ND.shape[0], head_VD.shape[0]
    chunk = min(chunk_tokens(vocab), count)
    order_N = jnp.argsort(weights_N == 0, stable=True)  # loss-bearing tokens first
    order_N = jnp.pad(order_N, (0, -count % chunk), constant_values=count)
    chunks = -(-jnp.sum(weights_N != 0) // chunk)
    first_row = jax.lax.axis_index(_VOCAB) * vocab if cut else 0
    if sharded:
        chunks = jax.lax.pmax(chunks, _ALL)  # collectives in the loop need one trip count

    def combine(reduce, value):
        return reduce(value, _VOCAB) if cut else value

    def capped(logits):
        return softcap * jnp.tanh(logits / softcap) if softcap else logits

    def visit(i, carry):
        total, dx_ND, dhead_VD = carry
        at_C = jax.lax.dynamic_slice_in_dim(order_N, i * chunk, chunk)
        x_CD = x_ND.at[at_C].get(mode="fill", fill_value=0)
        weights_C = weights_N.at[at_C].get(mode="fill", fill_value=0)
        row_C = targets_N.at[at_C].get(mode="fill", fill_value=0) - first_row
        mine_C = (row_C >= 0) & (row_C < vocab)
        row_C = jnp.where(mine_C, row_C, 0)

        logits_CV = jnp.einsum("CD,VD->CV", x_CD, head_VD, preferred_element_type=jnp.float32)
        top_C = combine(jax.lax.pmax, logits_CV.max(axis=-1))
        target_C = jnp.take_along_axis(logits_CV, row_C[:, None], axis=1)[:, 0]
        target_C = combine(jax.lax.psum, jnp.where(mine_C, target_C, 0.0))
        # A model whose logits are all equal has predicted nothing: ties are not correct.
        at_top_C = combine(jax.lax.psum, jnp.sum(logits_CV == top_C[:, None], axis=-1))
        hits_C = (target_C >= top_C) & (at_top_C == 1)
        # A cap keeps the order of the logits, but rounding may make ties: it comes after the hits.
        logits_CV, top_C, target_C = capped(logits_CV), capped(top_C), capped(target_C)
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        sum_C = combine(jax.lax.psum, exp_CV.sum(axis=-1))
        total = TokenLoss(
            total.loss + jnp.sum(weights_C * (jnp.log(sum_C) + top_C - target_C)),
            total.correct + jnp.sum(weights_C * hits_C),
        )
        if grad_x or grad_head:  # d loss / d logits = weight * (softmax - one_hot)
            share_C = (weights_C / sum_C)[:, None]  # narrow tensors are scaled, not [C, V]
            hit_C = weights_C * mine_C
            if softcap:  # d capped / d logits = 1 - (capped / softcap)^2
                exp_CV *= 1 - jnp.square(logits_CV / softcap)
                hit_C *= 1 - jnp.square(target_C / softcap)
            exp_CV, hit_C = exp_CV.astype(x_CD.dtype), hit_C.astype(x_CD.dtype)[:, None]
        if grad_x:
            mean_CD = jnp.einsum("CV,VD->CD", exp_CV, head_VD, preferred_element_type=jnp.float32)
            dx_CD = (share_C * mean_CD).astype(x_CD.dtype) - hit_C * head_VD[row_C]
            dx_ND = dx_ND.at[at_C].set(dx_CD, mode="drop")
        if grad_head:
            dhead_VD += jnp.einsum(
                "CV,CD->VD", exp_CV, (share_C * x_CD).astype(x_CD.dtype),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            dhead_VD = dhead_VD.at[row_C].add(-(hit_C * x_CD).astype(jnp.float32))
        return total, dx_ND, dhead_VD

    zero = jnp.zeros((), jnp.float32)
    start = (
        TokenLoss(zero, zero),
        jnp.zeros_like(x_ND) if grad_x else None,
        jnp.zeros(head_VD.shape, jnp.float32) if grad_head else None,
    )
    total, dx_ND, dhead_VD = jax.lax.fori_loop(0, chunks, visit, start)
    dx_BTD = None if dx_ND is None else dx_ND.reshape(x_BTD.shape)
    return total, (dx_BTD, None if dhead_VD is None else dhead_VD.astype(head_VD.dtype))
