"""A process that saves checkpoints until it is killed."""

from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.checkpoint import Checkpoints, restore
from tests.faults.storage import kill_at_file_operation

# As the loop builds it: two labels, one of them frozen, hyperparameters as traced state.
OPTIMIZER = optax.multi_transform(
    {
        "adapter": optax.chain(
            optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(1e-3)
        ),
        "head": optax.sgd(1e-2, momentum=0.9),
    },
    {"layers.0-1.q_proj.lora_A": "adapter", "layers.0-1.q_proj.lora_B": "adapter", "head": "head"},
)


class TrainState(NamedTuple):
    step: Any
    trainable: dict[str, Any]
    opt_state: Any


_TRAINABLE = {
    "layers.0-1.q_proj.lora_A": jax.ShapeDtypeStruct((2, 128, 64), jnp.float32),
    "layers.0-1.q_proj.lora_B": jax.ShapeDtypeStruct((2, 128, 64), jnp.float32),
    "head": jax.ShapeDtypeStruct((16, 32), jnp.bfloat16),
}
_SHAPES = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), _TRAINABLE, jax.eval_shape(OPTIMIZER.init, _TRAINABLE)
)


def state_of(step: int, seed: int = 0) -> TrainState:
    """A state of about 400 kB in which every array depends on the step."""
    rng = np.random.default_rng((seed, step))

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 100 * rng.standard_normal(leaf.shape) + step
        return jax.device_put(np.asarray(values, leaf.dtype))

    return jax.tree.map(fill, _SHAPES)._replace(step=jax.device_put(np.int32(step)))


def abstract(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    """The state as shapes, with its own shardings or another one."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding
        ),
        state,
    )


def save_until_killed(directory: str, pipe: Connection, kill_at: int) -> None:
    """Resumes, then saves step after step with keep=1, and sends the number of each saved step.

    With `kill_at` it dies just before that file operation, counted from its first save.
    """
    store = Checkpoints(directory, keep=1, best=False)
    restored = restore(directory, abstract(state_of(0)))
    step = restored.step if restored else 0
    pipe.send(step)
    if kill_at:
        kill_at_file_operation(kill_at)
    while True:
        step += 1
        store.save(step, state_of(step), meta={"examples": 8 * step}, loss=None)
        pipe.send(step)
