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

from jaxtune.sharding import BATCH, CONTEXT, TOKENS, TRIAL, platform

_ROWS = 1024  # of the vocabulary at a time on a CPU, at most
_VOCAB = "fsdp"  # mesh axis over which tables are cut
_ALL = (*BATCH, CONTEXT)  # axes over which tokens are shared out


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
    """Sums over loss-bearing tokens, float32: divide by their weight at the very end.

    Scalars, or [P] where P trials share the batch.
    """

    loss: jax.Array  # sum of weight * -log p(target), nats
    correct: jax.Array  # sum of weight where the target alone is the most likely token


class _Tokens(NamedTuple):
    """What is known of each token beside its activation."""

    targets_BT: jax.Array
    weights_BT: jax.Array
    smoothing_BT: jax.Array | None  # share of the target's probability that goes to all tokens
    trial_BT: jax.Array | None  # whose loss it counts to, where trials share the batch


def token_loss(
    x_BTD,
    head_VD,
    targets_BT,
    weights_BT,
    softcap: float = 0.0,
    *,
    smoothing_B: jax.Array | None = None,
    trials: int = 1,
) -> TokenLoss:
    """Cross entropy of `x @ head.T` against `targets`, summed with `weights`.

    Differentiable in x and head (of the `loss` field only). With a `softcap`, a Python number,
    logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118); 0 leaves them.

    Args:
      smoothing_B: label smoothing of every row (arXiv 1512.00567, as torch has it); not with a cap.
      trials: that share the rows, each as many in turn; with more than one the sums are [trials].
    """
    shape = targets_BT.shape
    smoothing_BT = trial_BT = None
    if smoothing_B is not None:
        assert not softcap, "the mean of capped logits is no product"
        smoothing_BT = jnp.broadcast_to(smoothing_B[:, None], shape)
    if trials > 1:
        rows = jnp.arange(shape[0], dtype=jnp.int32)[:, None] // (shape[0] // trials)
        trial_BT = jnp.broadcast_to(rows, shape)
    tokens = _Tokens(targets_BT, weights_BT, smoothing_BT, trial_BT)
    with jax.named_scope("vocabulary"):  # jaxtune plan finds the walk by it
        total: Any = _token_loss(x_BTD, head_VD, tokens, softcap, trials)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_loss(x_BTD, head_VD, tokens: _Tokens, softcap: float, trials: int) -> TokenLoss:
    return _sharded_walk(x_BTD, head_VD, tokens, softcap, trials, False, False)[0]


def _forward(x_BTD, head_VD, tokens, softcap: float, trials: int):
    known = jax.tree.map(lambda leaf: leaf.value, tokens, is_leaf=lambda x: hasattr(x, "perturbed"))
    total, gradients = _sharded_walk(
        x_BTD.value, head_VD.value, known, softcap, trials, x_BTD.perturbed, head_VD.perturbed
    )
    return total, (gradients, known.trial_BT)


def _backward(softcap: float, trials: int, residuals, cotangents):
    (dx_BTD, dhead_VD), trial_BT = residuals
    loss = cotangents.loss
    if isinstance(loss, SymbolicZero):
        return None, None, None
    if trials > 1:
        assert dhead_VD is None, "trials share a frozen head"
        loss = loss[trial_BT][:, :, None]
    gradients = [None if g is None else (g * loss).astype(g.dtype) for g in (dx_BTD, dhead_VD)]
    return *gradients, None


_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _shards(vocab: int) -> int:
    """Devices over which a table of `vocab` rows is cut in the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1 if mesh.empty else mesh.shape[_VOCAB]
    return size if vocab % size == 0 else 1


def chunk_tokens(vocab: int) -> int:
    """Tokens whose logits exist together, over `vocab` rows on this device."""
    if platform() == "cpu":
        return 128  # 256 are 4% faster, and score twice as many that bear no loss
    # On a TPU 64 MB of logits stay in the vector memory, so only the head itself is read. Below
    # about 560 tokens that reading, and not the product, would take the time (v6e).
    return 1024 if 1024 * vocab * 4 <= 2**26 else 512


def _sharded_walk(
    x_BTD,
    head_VD,
    tokens: _Tokens,
    softcap: float,
    trials: int,
    grad_x: bool,
    grad_head: bool,
):
    """-> (TokenLoss, (dx or None, dhead or None)), over all devices of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    sharded = not mesh.empty and mesh.size > 1
    cut = sharded and _shards(head_VD.shape[0]) > 1
    # No trial waits for another: a mesh that cuts the population sums up within its parts.
    apart = sharded and trials > 1
    parts = mesh.shape[TRIAL] if apart else 1
    over = tuple(axis for axis in _ALL if not (apart and axis == TRIAL))
    walk = partial(
        _walk,
        softcap=softcap,
        trials=trials // parts,
        grad_x=grad_x,
        grad_head=grad_head,
        over=over if sharded else (),
        cut=cut,
    )
    if not sharded:
        return walk(x_BTD, head_VD, tokens)
    table = P(_VOCAB if cut else None, None)
    others = tuple(axis for axis in over if axis != _VOCAB)

    def local(x_BTD, head_VD, tokens: _Tokens):
        if tokens.trial_BT is not None:
            first = jax.lax.axis_index(TRIAL) * (trials // parts)
            tokens = tokens._replace(trial_BT=tokens.trial_BT - first)
        if cut:
            x_BTD, tokens = jax.tree.map(
                lambda a: jax.lax.all_gather(a, _VOCAB, tiled=True), (x_BTD, tokens)
            )
        total, (dx_BTD, dhead_VD) = walk(x_BTD, head_VD, tokens)
        # Cut: each device of the axis has seen all tokens. Whole: each has seen its own.
        total = jax.lax.psum(total, others if cut else over)
        if dx_BTD is not None and cut:
            dx_BTD = jax.lax.psum_scatter(dx_BTD, _VOCAB, tiled=True)
        if dhead_VD is not None:
            dhead_VD = jax.lax.psum(dhead_VD, others if cut else over)
        return total, (dx_BTD, dhead_VD)

    gradients = (P(*TOKENS, None) if grad_x else None, table if grad_head else None)
    return jax.shard_map(
        local,
        in_specs=(P(*TOKENS, None), table, jax.tree.map(lambda _: TOKENS, tokens)),
        out_specs=(P(TRIAL) if apart else P(), gradients),
        check_vma=False,
    )(x_BTD, head_VD, tokens)


def _walk(
    x_BTD,
    head_VD,
    tokens: _Tokens,
    *,
    softcap: float,
    trials: int,
    grad_x: bool,
    grad_head: bool,
    over: tuple[str, ...],
    cut: bool,
):
    """Visits the loss-bearing tokens chunk by chunk.

    `over`: axes of a mesh on each of whose devices it is called; `cut`: each of them holds its own
    rows of the vocabulary.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    tokens_N = jax.tree.map(lambda a: a.reshape(-1), tokens)
    weights_N = tokens_N.weights_BT
    count, vocab = x_ND.shape[0], head_VD.shape[0]
    size = min(chunk_tokens(vocab), count)
    # The gradient of a head takes all logits of a token at once.
    by_blocks = platform() == "cpu" and not grad_head
    score = _score_by_blocks if by_blocks else _score_whole
    order_N = jnp.argsort(weights_N == 0, stable=True)  # loss-bearing tokens first
    order_N = jnp.pad(order_N, (0, size), constant_values=count)
    bearing = jnp.sum(weights_N != 0)
    first_row = jax.lax.axis_index(_VOCAB) * vocab if cut else 0
    if over:
        bearing = jax.lax.pmax(bearing, over)  # collectives in the loop need one trip count

    def combine(reduce, value):
        return reduce(value, _VOCAB) if cut else value

    zero = jnp.zeros((trials,) if tokens.trial_BT is not None else (), jnp.float32)
    mean_D = None
    if tokens.smoothing_BT is not None:  # of the head's rows: times x, the mean of all logits
        mean_D = combine(jax.lax.pmean, head_VD.astype(jnp.float32).mean(axis=0))

    def visit(at_C, carry):
        total, dx_ND, dhead_VD = carry
        x_CD, own_C = jax.tree.map(
            lambda a: a.at[at_C].get(mode="fill", fill_value=0), (x_ND, tokens_N)
        )
        weights_C, smoothing_C = own_C.weights_BT, own_C.smoothing_BT
        row_C = own_C.targets_BT - first_row
        mine_C = (row_C >= 0) & (row_C < vocab)
        row_C = jnp.where(mine_C, row_C, 0)

        own, exp_CV = score(x_CD, head_VD, row_C, softcap, grad_x)
        top_C = combine(jax.lax.pmax, own.top_C)
        target_C = combine(jax.lax.psum, jnp.where(mine_C, own.target_C, 0.0))
        # A model whose logits are all equal has predicted nothing: ties are not correct.
        at_top_C = combine(jax.lax.psum, jnp.where(own.top_C == top_C, own.at_top_C, 0))
        hits_C = (target_C >= top_C) & (at_top_C == 1)
        # A cap keeps the order of the logits, but rounding may make ties: it comes after the hits.
        top_C, own_top_C, target_C = (_cap(a, softcap) for a in (top_C, own.top_C, target_C))
        shrink_C = jnp.exp(own_top_C - top_C)
        sum_C = combine(jax.lax.psum, shrink_C * own.sum_C)
        hit_C = weights_C * mine_C * _slope(target_C, softcap)
        if smoothing_C is not None:
            mean_C = x_CD.astype(jnp.float32) @ mean_D
            target_C = (1 - smoothing_C) * target_C + smoothing_C * mean_C
            hit_C *= 1 - smoothing_C
        loss_C = weights_C * (jnp.log(sum_C) + top_C - target_C)
        total = TokenLoss(
            *(
                old
                + (new_C.sum() if own_C.trial_BT is None else zero.at[own_C.trial_BT].add(new_C))
                for old, new_C in zip(total, (loss_C, weights_C * hits_C), strict=True)
            )
        )
        # d loss / d logits = weight * (softmax - one_hot); narrow tensors are scaled, not [C, V]
        share_C1, hit_C1 = (weights_C * shrink_C / sum_C)[:, None], hit_C[:, None]
        if grad_x:
            dx_CD = share_C1 * own.mean_CD - hit_C1 * head_VD[row_C].astype(jnp.float32)
            if smoothing_C is not None and mean_D is not None:
                # Of devices that share out the vocabulary each gives its part.
                dx_CD -= (weights_C * smoothing_C)[:, None] * mean_D / combine(jax.lax.psum, 1.0)
            dx_ND = dx_ND.at[at_C].set(dx_CD.astype(x_ND.dtype), mode="drop")
        if grad_head:
            shared_CD = (share_C1 * x_CD).astype(x_CD.dtype)
            dhead_VD += _einsum("CV,CD->VD", exp_CV, shared_CD)
            dhead_VD = dhead_VD.at[row_C].add(-hit_C1 * x_CD.astype(jnp.float32))
            if smoothing_C is not None:
                rows = vocab * combine(jax.lax.psum, 1.0)
                smooth_D = (weights_C * smoothing_C) @ x_CD.astype(jnp.float32)
                dhead_VD -= smooth_D / rows
        return total, dx_ND, dhead_VD

    carry: Any = (
        TokenLoss(zero, zero),
        jnp.zeros_like(x_ND) if grad_x else None,
        jnp.zeros(head_VD.shape, jnp.float32) if grad_head else None,
    )

    def chunk(i, carry):
        return visit(jax.lax.dynamic_slice_in_dim(order_N, i * size, size), carry)

    total, dx_ND, dhead_VD = jax.lax.fori_loop(0, -(-bearing // size), chunk, carry)
    dx_BTD = None if dx_ND is None else dx_ND.reshape(x_BTD.shape)
    return total, (dx_BTD, None if dhead_VD is None else dhead_VD.astype(head_VD.dtype))


class _Scores(NamedTuple):
    """What a chunk's logits over the rows of one device come to, float32."""

    top_C: jax.Array  # the largest, before any cap
    at_top_C: jax.Array  # how many are as large
    target_C: jax.Array  # that of `row_C`, before any cap
    sum_C: jax.Array  # of exp(logit - top), both capped
    mean_CD: jax.Array | None  # the same sum, of these times slope times row of the head


def _score_whole(x_CD, head_VD, row_C, softcap: float, grad_x: bool):
    """-> (_Scores, slope * exp(logit - top) [C, V] in the dtype of x)."""
    logits_CV = _einsum("CD,VD->CV", x_CD, head_VD)
    top_C = logits_CV.max(axis=-1)
    target_C = jnp.take_along_axis(logits_CV, row_C[:, None], axis=1)[:, 0]
    at_top_C = jnp.sum(logits_CV == top_C[:, None], axis=-1)
    logits_CV = _cap(logits_CV, softcap)
    exp_CV = jnp.exp(logits_CV - _cap(top_C, softcap)[:, None])
    sum_C = exp_CV.sum(axis=-1)
    exp_CV = (exp_CV * _slope(logits_CV, softcap)).astype(x_CD.dtype)
    mean_CD = _einsum("CV,VD->CD", exp_CV, head_VD) if grad_x else None
    return _Scores(top_C, at_top_C, target_C, sum_C, mean_CD), exp_CV


def _score_by_blocks(x_CD, head_VD, row_C, softcap: float, grad_x: bool):
    """-> (_Scores, None), with a running softmax over blocks of the vocabulary.

    As in FlashAttention-2 (arXiv 2307.08691), so that logits never leave the cache.
    """
    vocab = head_VD.shape[0]
    block = -(-vocab // -(-vocab // _ROWS))

    def visit(first, size: int, own: _Scores) -> _Scores:
        head_UD = jax.lax.dynamic_slice_in_dim(head_VD, first, size)
        logits_CU = _einsum("CD,UD->CU", x_CD, head_UD)
        new_C = logits_CU.max(axis=-1)
        top_C = jnp.maximum(own.top_C, new_C)
        at_top_C = jnp.where(own.top_C == top_C, own.at_top_C, 0) + jnp.sum(
            logits_CU == top_C[:, None], axis=-1
        )
        at_C = row_C - first
        here_C = (at_C >= 0) & (at_C < size)
        at_C = jnp.where(here_C, at_C, 0)
        target_C = jnp.take_along_axis(logits_CU, at_C[:, None], axis=1)[:, 0]
        capped_C = _cap(top_C, softcap)
        shrink_C = jnp.exp(_cap(own.top_C, softcap) - capped_C)
        logits_CU = _cap(logits_CU, softcap)
        exp_CU = jnp.exp(logits_CU - capped_C[:, None])
        mean_CD = own.mean_CD
        if mean_CD is not None:
            slopes_CU = (exp_CU * _slope(logits_CU, softcap)).astype(x_CD.dtype)
            mean_CD = shrink_C[:, None] * mean_CD + _einsum("CU,UD->CD", slopes_CU, head_UD)
        return _Scores(
            top_C,
            at_top_C,
            jnp.where(here_C, target_C, own.target_C),
            shrink_C * own.sum_C + exp_CU.sum(axis=-1),
            mean_CD,
        )

    zero_C = jnp.zeros(x_CD.shape[:1], jnp.float32)
    mean_CD = jnp.zeros(x_CD.shape, jnp.float32) if grad_x else None
    least_C, none_C = zero_C + jnp.finfo(jnp.float32).min, zero_C.astype(jnp.int32)
    own = _Scores(least_C, none_C, zero_C, zero_C, mean_CD)
    blocks, rest = divmod(vocab, block)
    own = jax.lax.fori_loop(0, blocks, lambda i, own: visit(i * block, block, own), own)
    return (visit(blocks * block, rest, own) if rest else own), None


def _cap(logits: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _slope(capped: jax.Array, softcap: float) -> jax.Array | float:
    """d capped / d logits."""
    return 1 - jnp.square(capped / softcap) if softcap else 1.0


_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
