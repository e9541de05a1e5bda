"""Low-rank updates of projections: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

Letters as in layers.py; M counts rows sorted by expert (kernels/experts.py).
"""

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtune.config import LoraConfig
from jaxtune.kernels import experts, products
from jaxtune.models.layers import Axes, Dropout, Linear, param

Value = TypeVar("Value", int, float)

# What PEFT saves in full for every classifier; names that a model does not have do no harm.
CLASSIFIER = ("classifier", "score")


class Spec(NamedTuple):
    """What sets the adapter of one projection apart from another's."""

    rank: int
    scale: float


def spec(lora: LoraConfig, name: str) -> Spec:
    """Rank and scale that PEFT gives to the module of this Hugging Face name.

    The scale is alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (arXiv 2312.03732), of
    the module's own r and alpha.
    """
    rank = first_match(lora.rank_pattern, name, lora.r)
    alpha = first_match(lora.alpha_pattern, name, lora.alpha)
    return Spec(rank, alpha / (math.sqrt(rank) if lora.use_rslora else rank))


def first_match(patterns: Iterable[tuple[str, Value]], name: str, default: Value) -> Value:
    """The value of the first pattern for whole parts at the end of the name, as PEFT matches."""
    matching = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, default)


def in_classifier(name: str) -> bool:
    """Whether a Hugging Face name is a classifier's head or in one, which PEFT trains in full."""
    return any(part.endswith(CLASSIFIER) for part in name.split("."))


@jax.custom_vjp
def low_rank(x_BTI: jax.Array, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """x A B in the dtype of x; gradients of A and B in their own."""
    return _low_rank_forward(x_BTI, a_IR, b_RO)[0]


def _low_rank_forward(x_BTI, a_IR, b_RO):
    x_BTR = products.einsum("BTI,IR->BTR", x_BTI, a_IR.astype(x_BTI.dtype))
    y_BTO = products.einsum("BTR,RO->BTO", x_BTR, b_RO.astype(x_BTI.dtype))
    return y_BTO, (x_BTI, x_BTR, a_IR, b_RO)


def _low_rank_backward(residuals, dy_BTO):
    # XLA's CPU compiler folds the transposes of automatic gradients into these products and pays
    # with a transposed copy of a wide operand. Apart from them, a LoRA step takes 19% less time.
    x_BTI, x_BTR, a_IR, b_RO = residuals
    dy_BTR = products.einsum("BTO,RO->BTR", dy_BTO, b_RO.astype(dy_BTO.dtype))
    da_RI = products.einsum("BTR,BTI->RI", dy_BTR, x_BTI, a_IR.dtype)
    db_RO = products.einsum("BTR,BTO->RO", x_BTR, dy_BTO, b_RO.dtype)
    da_RI, db_RO = jax.lax.optimization_barrier((da_RI, db_RO))
    dx_BTI = products.einsum("BTR,IR->BTI", dy_BTR, a_IR.astype(dy_BTO.dtype))
    return dx_BTI, da_RI.T, db_RO


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype, *, salt: int, first: int) -> jax.Array:
    """First values of A, [..., I, R], uniform in +-1/sqrt(I): PEFT's kaiming_uniform_ (a=sqrt(5)).

    A column of one layer's A depends on seed, layer, module and its own number alone: the same for
    every rank and however layers are stacked, so that trials of a sweep differ in nothing else.

    Args:
      shape: begins with the layers of the stack, of which the first has the number `first`.
    """
    layers, *rest, inputs, rank = shape if len(shape) > 2 else (1, *shape)
    bound = inputs**-0.5
    key = jax.random.fold_in(key, salt)

    def draw(layer):
        key_of_layer = jax.random.fold_in(key, layer)
        # The rank comes first, so that a larger one only adds draws behind the others.
        a = jax.random.uniform(key_of_layer, (rank, *rest, inputs), dtype, -bound, bound)
        return jnp.moveaxis(a, 0, -1)

    return jax.vmap(draw)(first + jnp.arange(layers)).reshape(shape)


class Adapter(nnx.Module):
    """Low-rank update of a projection: x A B, scaled; PEFT stores A.T and B.T.

    With DoRA each output's column of W + scale A B is also rescaled to the length `magnitude`.
    """

    def __init__(
        self,
        rank: int,
        shape: tuple[int, int],
        axes: Axes,
        scale: float,
        salt: int,
        *,
        stack: tuple[int, ...],
        rngs: nnx.Rngs,
        first: int = 0,
        dora: bool = False,
    ):
        init_a = partial(_uniform, salt=salt, first=first)
        zeros, ones = initializers.zeros, initializers.ones
        self.A = param(rngs, stack, (shape[0], rank), (axes[0], None), init_a, jnp.float32)
        self.B = param(rngs, stack, (rank, shape[1]), (None, axes[1]), zeros, jnp.float32)
        self.scale = param(rngs, stack, (), (), initializers.constant(scale), jnp.float32)
        # `setup` fills it with the lengths of the base's columns.
        self.magnitude = (
            param(rngs, stack, shape[1:], axes[1:], ones, jnp.float32) if dora else None
        )
        self.salt = salt  # sets this adapter apart from its neighbours in a layer

    def __call__(
        self, x_BTI: jax.Array, y_BTO: jax.Array, linear: Linear, dropout: Dropout | None
    ) -> jax.Array:
        """The output x W of `linear` in `y_BTO`, with this update of it.

        With DoRA, dropout acts on the input of what is added to x W, the rescaled W too (as PEFT).
        """
        if dropout is not None:
            x_BTI = dropout.fold(self.salt)(x_BTI)
        if self.A.ndim == 3:
            return y_BTO + self._of_trials(x_BTI)
        update_BTO = low_rank(x_BTI, self.A[...], self.B[...] * self.scale[...])
        if self.magnitude is None:
            return y_BTO + update_BTO
        kernel_IO = linear.dense(x_BTI.dtype)
        lengths_O = column_lengths(kernel_IO, self.A[...], self.B[...] * self.scale[...])
        ratio_O = self.magnitude[...] / lengths_O
        dropped_BTO = y_BTO if dropout is None else linear.product(x_BTI, x_BTI.dtype)
        # In float32: a ratio in bfloat16 could not be told from 1 for most of a training.
        added_BTO = (ratio_O - 1) * dropped_BTO + ratio_O * update_BTO
        return (y_BTO + added_BTO).astype(y_BTO.dtype)

    def _of_trials(self, x_BTI: jax.Array) -> jax.Array:
        """The update where P trials of a sweep share the batch, as many rows each in turn.

        A is [P, I, R] then, B [P, R, O] and scale [P] (population.py).
        """
        trials = self.A.shape[0]
        x_PBTI = x_BTI.reshape(trials, -1, *x_BTI.shape[1:])
        b_PRO = self.B[...] * self.scale[...][:, None, None]
        y_PBTO = jax.vmap(low_rank)(x_PBTI, self.A[...], b_PRO)
        return y_PBTO.reshape(*x_BTI.shape[:2], -1)

    def grouped(
        self, x_MI: jax.Array, y_MO: jax.Array, dropout: Dropout | None, plan: experts.Plan
    ) -> jax.Array:
        """The same for rows that are each one expert's: plain LoRA, A [E, I, R] and B [E, R, O]."""
        if dropout is not None:
            key = jax.random.fold_in(dropout.key_B[0], self.salt)
            x_MI = experts.dropped(x_MI, plan, dropout.rate_B[0], key)
        b_ERO = self.B[...] * self.scale[...][:, None, None]
        return y_MO + experts.grouped(experts.grouped(x_MI, self.A[...], plan), b_ERO, plan)


def column_lengths(kernel_IO: jax.Array, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """Euclidean lengths [O] of the columns of W + A B in float32, without making that matrix.

    |w + A b|^2 = |w|^2 + (2 A.T w + A.T A b) . b for a column w of W and b of B. A constant to
    gradients, as DoRA's authors advise (section 4.3) and PEFT does.
    """
    kernel_IO, a_IR, b_RO = jax.lax.stop_gradient((kernel_IO, a_IR, b_RO))
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    # A bfloat16 W is not made float32 for this: A becomes two bfloat16 parts instead.
    parts = [a_IR.astype(kernel_IO.dtype)]
    if kernel_IO.dtype != a_IR.dtype:
        parts.append((a_IR - parts[0].astype(a_IR.dtype)).astype(kernel_IO.dtype))
    aw_RO = sum(jnp.einsum("IR,IO->RO", part, kernel_IO, **exact) for part in parts)
    aa_RR = jnp.einsum("IR,IS->RS", a_IR, a_IR, **exact)
    aab_RO = jnp.einsum("RS,SO->RO", aa_RR, b_RO, **exact)
    own_O = jnp.sum(jnp.square(kernel_IO.astype(jnp.float32)), axis=0)
    return jnp.sqrt(jnp.maximum(own_O + jnp.sum(b_RO * (2 * aw_RO + aab_RO), axis=0), 0))
