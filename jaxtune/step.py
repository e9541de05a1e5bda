"""One optimizer step and one evaluation step: pure functions of (state, frozen, batch)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune import optim, tree
from jaxtune.data.packing import Batch
from jaxtune.models.layers import Dropout
from jaxtune.objectives import LossTerm

Objective = Callable[..., LossTerm]  # (model, batch, dropout, smoothing_B, trials)


class TrainState(NamedTuple):
    """All that a step changes; donated to it, and all that a checkpoint saves."""

    step: jax.Array  # int32 []: batches consumed, also those whose update was skipped
    trainable: dict[str, jax.Array]
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Float32 scalars of one step, on device."""

    loss: LossTerm
    tokens: jax.Array  # real ones, padding not counted
    grad_norm: jax.Array  # before clipping, over the trained parameters
    lr: jax.Array  # of this update
    finite: jax.Array  # False: the update was skipped


class Program(NamedTuple):
    """What is fixed for a run. Hashed once by jit, never traced."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    objective: Objective
    micro_batches: int
    seed: int
    dropout: bool  # False leaves dropout out of the program altogether
    smoothing: bool  # the same of label smoothing


def init_state(program: Program, trainable: dict[str, jax.Array]) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, program.optimizer.init(trainable))


def step_key(seed: int | jax.Array, step: jax.Array) -> jax.Array:
    """Key of all that is random in a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def train_step(
    program: Program, state: TrainState, frozen: dict[str, jax.Array], batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One update from a global batch of [B, T] arrays, B a multiple of `program.micro_batches`.

    Gradients of the summed loss are accumulated and divided once by the tokens of the whole batch.
    An update that is not finite is skipped: only `step` advances.
    """
    hyper: dict[str, Any] = state.opt_state.hyperparams  # type: ignore[union-attr]  # inject_hyperparams
    key = step_key(program.seed, state.step)

    def loss(trainable: dict[str, jax.Array], micro: Batch, rows_B: jax.Array):
        model = tree.merge(program.graphdef, {**frozen, **trainable})
        dropout = smoothing_B = None
        if program.dropout:
            dropout = Dropout.of_rows(hyper["dropout"], key, rows_B)
        if program.smoothing:
            smoothing_B = jnp.broadcast_to(hyper["label_smoothing"], rows_B.shape)
        term = program.objective(model, micro, dropout, smoothing_B)
        return term.total, term

    gradient = jax.grad(loss, has_aux=True)

    def accumulate(carry, scanned):
        new = gradient(state.trainable, *scanned)
        return jax.tree.map(jnp.add, carry, new), None

    count, rows_B = program.micro_batches, jnp.arange(batch.tokens.shape[0])
    if count == 1:
        grads, term = gradient(state.trainable, batch, rows_B)
    else:
        # Every count-th row goes to one micro-batch, so a batch cut over devices stays where it is.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), (batch, rows_B)
        )
        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, state.trainable), LossTerm(zero, zero, zero))
        (grads, term), _ = jax.lax.scan(accumulate, start, micro)
    kept, norm, lr, finite = update(program, (state.trainable, state.opt_state), grads, term)
    tokens = jnp.sum(batch.segments > 0).astype(jnp.float32)
    return TrainState(state.step + 1, *kept), StepMetrics(term, tokens, norm, lr, finite)


def update(
    program: Program,
    old: tuple[dict[str, jax.Array], Any],
    grads: dict[str, jax.Array],
    term: LossTerm,
) -> tuple[tuple[dict[str, jax.Array], Any], jax.Array, jax.Array, jax.Array]:
    """-> ((trainable, opt_state), gradient norm, learning rate, finite); `grads` are of term.total.

    An update that is not finite leaves both as they were.
    """
    trainable, opt_state = old
    grads = jax.tree.map(lambda g: g / jnp.maximum(term.weight, 1.0), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(term.total)
    lr = optim.learning_rate(opt_state)
    changes, opt_state = program.optimizer.update(grads, opt_state, trainable)
    new = (optax.apply_updates(trainable, changes), opt_state)
    return jax.tree.map(partial(jnp.where, finite), new, old), norm, lr, finite


def eval_step(
    program: Program,
    trainable: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    batch: Batch,
) -> LossTerm:
    """Loss sums of one batch, without dropout."""
    model = tree.merge(program.graphdef, {**frozen, **trainable})
    return program.objective(model, batch, None)


def jit_train(program: Program, state: TrainState) -> Callable:
    """`train_step` of `program`, jitted: (state, frozen, batch) -> (state, StepMetrics).

    The state is donated and comes back where it was; otherwise the second step compiles again.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        lambda *args: train_step(program, *args), donate_argnums=0, out_shardings=(places, None)
    )


def jit_eval(program: Program) -> Callable:
    """`eval_step` of `program`, jitted: (trainable, frozen, batch) -> LossTerm."""
    return jax.jit(lambda *args: eval_step(program, *args))
