"""A sweep's trials in one program: slots that share the frozen base, a trial each.

Of a slot only adapters, optimizer state and a few numbers are its own. The rows of all slots stand
one after another in one batch, so every product with the base is one product, and only the
adapters and the sums of the losses know whose row is whose. Everything that trials may differ in is
traced: starting, stopping and replacing them compiles nothing.

    rank              A has zero columns and B zero rows from a trial's own rank on, and keeps them
    alpha, modules    each adapter's scale is the trial's; zero where it has none
    batch size        gradients are summed over `every` micro-batches, then the trial steps
    all other numbers hyperparameters in the optimizer state, as in a training of its own

A slot that is alone is a plain training, of whatever is trained: without the trial axis inside.

Letters: P slots, L layers of a stack, I inputs, R rank, B rows of a slot's micro-batch, T tokens.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune import tree
from jaxtune.data.packing import Batch
from jaxtune.models.layers import Dropout
from jaxtune.objectives import LossTerm
from jaxtune.step import Program, step_key, update


class Sums(NamedTuple):
    """Of the micro-batches since a trial's last update."""

    grads: dict[str, jax.Array]
    term: LossTerm


class Slots(NamedTuple):
    """Trials in training; every array begins with the slot, [P, ...]."""

    trainable: dict[str, jax.Array]
    opt_state: optax.OptState
    scales: dict[str, jax.Array]  # [P, L] of every adapter
    seed: jax.Array  # uint32
    every: jax.Array  # int32: micro-batches an update
    position: jax.Array  # int32: micro-batches trained on
    sums: Sums | None  # None where every trial updates after each micro-batch


class Measured(NamedTuple):
    """Of one micro-batch, [P] each."""

    term: LossTerm
    tokens: jax.Array  # real ones
    finite: jax.Array  # False: the update was skipped, or will be


def new_slot(
    program: Program,
    initial: dict[str, jax.Array],
    ranks: Mapping[str, jax.Array],
    scales: dict[str, jax.Array],
    hyper: dict[str, jax.Array],
    seed: jax.Array,
    every: jax.Array,
    accumulates: bool,
) -> Slots:
    """The state of one trial before its first micro-batch, without the slot axis.

    Args:
      initial: trained leaves, adapters with the rank of the widest trial.
      ranks: {path of A: [L]} of this trial.
      hyper: optim.hyperparameters.
    """
    trainable = dict(initial)
    for path, rank_L in ranks.items():
        kept_LR = jnp.arange(initial[path].shape[-1]) < rank_L[..., None]
        trainable[path] = initial[path] * kept_LR[..., None, :]
    opt_state: Any = program.optimizer.init(trainable)
    opt_state = opt_state._replace(
        hyperparams={name: jnp.asarray(hyper[name], jnp.float32) for name in opt_state.hyperparams}
    )
    sums = Sums(jax.tree.map(jnp.zeros_like, trainable), _no_loss()) if accumulates else None
    zero = jnp.zeros((), jnp.int32)
    return Slots(trainable, opt_state, scales, seed, every, zero, sums)


def micro_step(
    program: Program, slots: Slots, frozen: dict[str, jax.Array], batch: Batch
) -> tuple[Slots, Measured]:
    """A micro-batch for every slot, [P * B, T], those of the first slot first.

    Whose micro-batches are complete is updated; all others keep their parameters.
    """
    trials, rows = len(slots.position), batch.tokens.shape[0] // len(slots.position)
    hyper: dict[str, Any] = slots.opt_state.hyperparams  # type: ignore[union-attr]  # inject_hyperparams

    def loss(trainable: dict[str, jax.Array]):
        model = tree.merge(program.graphdef, {**frozen, **inside(trainable | slots.scales)})
        dropout = smoothing = None
        if program.dropout:
            first_P = slots.position % slots.every * rows
            rows_PB = first_P[:, None] + jnp.arange(rows)
            key_P = jax.vmap(step_key)(slots.seed, slots.position // slots.every)
            dropout = jax.vmap(Dropout.of_rows)(hyper["dropout"], key_P, rows_PB)
            dropout = jax.tree.map(lambda leaf: leaf.reshape(-1), dropout)
        if program.smoothing:
            smoothing = jnp.repeat(hyper["label_smoothing"], rows)
        term = program.objective(model, batch, dropout, smoothing, trials)
        return jnp.sum(term.total), jax.tree.map(lambda sum_: sum_.reshape(trials), term)

    grads, term = jax.grad(loss, has_aux=True)(slots.trainable)
    summed = Sums(grads, term)
    if slots.sums is not None:
        summed = jax.tree.map(jnp.add, slots.sums, summed)
    old = (slots.trainable, slots.opt_state)
    stepped = jax.vmap(partial(update, program))(old, summed.grads, summed.term)
    new, _, _, finite = stepped
    sums = None
    if slots.sums is not None:
        due = (slots.position + 1) % slots.every == 0
        new = _where(due, new, old)
        sums = _where(due, jax.tree.map(jnp.zeros_like, summed), summed)
    tokens = jnp.sum((batch.segments > 0).reshape(trials, -1), axis=1).astype(jnp.float32)
    slots = slots._replace(
        trainable=new[0], opt_state=new[1], sums=sums, position=slots.position + 1
    )
    return slots, Measured(term, tokens, finite)


def score(program: Program, slots: Slots, frozen: dict[str, jax.Array], batch: Batch) -> LossTerm:
    """Loss sums [P] of one evaluation batch [B, T], the same for all slots, without dropout."""
    trials = len(slots.position)
    model = tree.merge(program.graphdef, {**frozen, **inside(slots.trainable | slots.scales)})
    repeated = jax.tree.map(lambda x: jnp.tile(x, (trials, 1)), batch)
    term = program.objective(model, repeated, None, trials=trials)
    return jax.tree.map(lambda sum_: sum_.reshape(trials), term)


def inside(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """As the model takes them: the layers of a stack first, [L, P, ...], for the scan over layers.

    A slot that is alone has no axis at all.
    """
    if next(iter(leaves.values())).shape[0] == 1:
        return {path: leaf[0] for path, leaf in leaves.items()}
    stacked = {path for path in leaves if tree.layer_range(path) is not None}
    return {
        path: jnp.moveaxis(leaf, 0, 1) if path in stacked else leaf for path, leaf in leaves.items()
    }


def place(slots: Slots, k: jax.Array, one: Slots) -> Slots:
    """The slots with `one` trial in slot k."""
    return jax.tree.map(lambda all_, own: all_.at[k].set(own), slots, one)


def pick(slots: Slots, k: jax.Array) -> Slots:
    """The trial in slot k."""
    return jax.tree.map(lambda leaf: leaf[k], slots)


def _where(due_P: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jax.vmap(jnp.where)(due_P, a, b), new, old)


def _no_loss() -> LossTerm:
    zero = jnp.zeros((), jnp.float32)
    return LossTerm(zero, zero, zero)
