"""Layers stacked on axis 0 and scanned, so that compiling does not take longer for more of them."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import tree
from jaxtune.kernels.experts import Balance
from jaxtune.models.blocks import Block, Cache, Context, LayerConfig, Pattern
from jaxtune.models.layers import Dropout

_saved = jax.checkpoint_policies

# What the backward pass finds instead of recomputing it, from the fastest to the smallest: all;
# what goes into attention and comes out of it, and gate and up, so that no large product is done
# again; the former alone; the layer's input; that, in the host's memory. Names: see blocks.py.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "projections": partial(
        jax.checkpoint, policy=_saved.save_only_these_names("qkv", "context", "mlp")
    ),
    "attention": partial(jax.checkpoint, policy=_saved.save_only_these_names("qkv", "context")),
    "full": jax.checkpoint,
    "offload": partial(
        jax.checkpoint,
        policy=_saved.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}


def make_layers(config: LayerConfig, stacks: tuple[tuple[int, int], ...], **kwargs) -> nnx.Dict:
    """{"start-last": Block}: runs of layers whose parameters are stacked and scanned together.

    `stacks` are runs [start, stop) that must not mix kinds of layers; by default the longest ones.
    """
    runs = stacks or tree.stacks(config.num_layers, config.kind)
    return nnx.Dict(
        {
            f"{start}-{stop - 1}": Block(
                config, config.kind(start), stack=(stop - start,), **kwargs
            )
            for start, stop in runs
        }
    )


def layers_of(name: str) -> range:
    """The layers in the stack of this name, "start-last"."""
    layers = tree.layer_range(f"layers.{name}.")
    assert layers is not None, name
    return layers


def run_layers(
    layers: nnx.Dict,
    config: LayerConfig,
    x_BTD: jax.Array,
    context: Context,
    *,
    remat: str,
    dropout: Dropout | None = None,
    caches: Mapping[str, Cache] | None = None,
) -> tuple[jax.Array, dict[str, Cache], Balance | None]:
    """Scans every stack in turn -> (x, new caches, sums over layers of the experts' balance).

    Without caches what stands for the new ones is None each.
    """
    new_caches: dict[str, Cache] = {}
    balance = None
    for name, stack in layers.items():
        graphdef, params = nnx.split(stack)
        run = layers_of(name)
        pattern = config.pattern(run.start, run.stop)
        # What differs between the layers of a stack is scanned; what does not is a constant.
        varying = Pattern(*(each if isinstance(each, np.ndarray) else None for each in pattern))

        def layer(x_BTD, scanned, graphdef=graphdef, pattern=pattern):
            params, number, cache, varying = scanned
            drop = None if dropout is None else dropout.fold(number)
            pairs = zip(varying, pattern, strict=True)
            own = Pattern(*(same if each is None else each for each, same in pairs))
            module: Block = nnx.merge(graphdef, params)
            x_BTD, cache, balance = module(x_BTD, context, own, drop, cache)
            return x_BTD, (cache, balance)

        numbers = None if dropout is None else jnp.arange(run.start, run.stop)
        scanned = (params, numbers, None if caches is None else caches[name], varying)
        x_BTD, (new_caches[name], sums) = jax.lax.scan(REMAT[remat](layer), x_BTD, scanned)
        if sums is not None:
            sums = jax.tree.map(lambda s: s.sum(axis=0), sums)
            balance = sums if balance is None else jax.tree.map(jnp.add, balance, sums)
    return x_BTD, new_caches, balance
