"""From a config to a model in its place: its leaves, who trains them, where they live."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtune import lora, optim, sharding, tree
from jaxtune.config import Config
from jaxtune.hf import load
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.families import Family


@dataclass(frozen=True)
class Assembly:
    """The abstract model of a run; nothing is on a device yet."""

    folder: Path  # the base checkpoint
    family: Family
    decoder: DecoderConfig
    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]  # of every leaf, with dtype and sharding
    groups: dict[str, str]  # optimizer group of every leaf, or "frozen"
    targets: frozenset[str]  # projections with an adapter, one path a layer
    seed: int

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        return tree.partition(self.shapes, self.groups)[0]


def assemble(config: Config, folder: Path, mesh: Mesh) -> Assembly:
    """Decides everything about a run's parameters from the base's config.json alone.

    Raises:
      ConfigError: targets or rules that match nothing.
      ModelError: a model family or config that is not supported.
    """
    family, decoder = load.read_config(folder)
    targets, labels = _decide(config, family, decoder)

    def signature(layer: int):
        prefix = f"layers.{layer}."
        own = {
            path.removeprefix(prefix): v for path, v in labels.items() if path.startswith(prefix)
        }
        return own, {path.removeprefix(prefix) for path in targets if path.startswith(prefix)}

    model = nnx.eval_shape(
        lambda: _build(config, decoder, targets, tree.stacks(decoder.num_layers, signature))
    )
    graphdef, shapes = tree.split(model)
    groups = tree.stack_labels(shapes, labels)
    places = sharding.param_shardings(shapes, tree.axes(model), mesh)
    shapes = {
        path: jax.ShapeDtypeStruct(
            shape.shape,
            shape.dtype if groups[path] == optim.FROZEN else jnp.float32,
            sharding=places[path],
        )
        for path, shape in shapes.items()
    }
    return Assembly(folder, family, decoder, graphdef, shapes, groups, targets, config.train.seed)


def fresh(config: Config, assembly: Assembly) -> dict[str, jax.Array]:
    """New adapters, placed; B is zero, so the model equals its base exactly. Full runs: empty."""
    wanted = {path: s for path, s in assembly.shapes.items() if ".lora." in path}
    runs = _stacks_of(assembly)

    def init() -> dict[str, jax.Array]:
        leaves = tree.split(_build(config, assembly.decoder, assembly.targets, runs))[1]
        return {path: leaves[path] for path in wanted}

    # Only the adapters are asked for, so the compiler never makes the base.
    return jax.jit(init, out_shardings={path: s.sharding for path, s in wanted.items()})()


def base(assembly: Assembly) -> dict[str, jax.Array]:
    """The base checkpoint's leaves, placed; trained ones in float32."""
    wanted = {path: s for path, s in assembly.shapes.items() if ".lora." not in path}
    return load.load_params(assembly.folder, assembly.family, assembly.decoder, wanted)


def _decide(config: Config, family: Family, decoder: DecoderConfig):
    """-> (targeted modules, {path of one layer's leaf: group}), adapters' leaves included."""
    model = nnx.eval_shape(lambda: Decoder(decoder, rngs=nnx.Rngs(0)))
    paths = [single for path in tree.split(model)[1] for single in tree.layer_paths(path)]
    modules = {
        path.removesuffix(".kernel"): family.module(path)
        for path in paths
        if path.endswith(".kernel")
    }
    targets = lora.targets(config.lora, modules)
    adapters = [
        f"{module}.lora.{leaf}" for module in sorted(targets) for leaf in ("A", "B", "scale")
    ]
    return targets, optim.labels([*paths, *adapters], config.lora, config.optim)


def _build(config: Config, decoder: DecoderConfig, targets: frozenset[str], stacks) -> Decoder:
    rngs = nnx.Rngs(config.train.seed)
    model = Decoder(
        decoder,
        rngs=rngs,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        remat=config.model.remat,
        stacks=stacks,
    )
    return lora.insert(model, targets, config.lora, rngs)


def _stacks_of(assembly: Assembly) -> tuple[tuple[int, int], ...]:
    runs = {tree.layer_range(path) for path in assembly.shapes} - {None}
    return tuple(sorted((run.start, run.stop) for run in runs if run is not None))
