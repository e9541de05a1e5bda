"""From a config to a model in its place: its leaves, who trains them, where they live."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtune import lora, optim, sharding, tree
from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.hf import files, load
from jaxtune.kernels import quantize
from jaxtune.models import families
from jaxtune.models.adapter import Spec, in_classifier
from jaxtune.models.blocks import LayerConfig
from jaxtune.models.families import Family
from jaxtune.models.layers import Linear


@dataclass(frozen=True)
class Assembly:
    """The abstract model of a run; nothing is on a device yet."""

    folder: Path  # the base checkpoint
    family: Family
    model: LayerConfig  # a DecoderConfig or an EncoderConfig
    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]  # of every leaf, with dtype and sharding
    groups: dict[str, str]  # optimizer group of every leaf, or "frozen"
    targets: dict[str, Spec]  # rank and scale of projections with an adapter, one path a layer
    new: frozenset[str]  # leaves of a head that the checkpoint lacks
    seed: int
    quantized: dict[str, quantize.Layout]  # kernels that are kept in fewer bits

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        return tree.partition(self.shapes, self.groups)[0]

    @property
    def sizes(self) -> dict[str, int]:
        """{path: numbers in every parameter, however it is kept}."""
        scales = {f"{path}_scale" for path in self.quantized}
        return {
            path: math.prod(self.quantized.get(path, shape).shape)
            for path, shape in self.shapes.items()
            if path not in scales
        }


def assemble(
    config: Config,
    folder: Path,
    mesh: Mesh,
    *,
    weights: bool = True,
    targets: Mapping[str, Spec] | None = None,
) -> Assembly:
    """Decides everything about a run's parameters before one of them is read.

    Without `weights` the folder has a config.json alone, and a classifier's head counts as new.
    With `targets` the projections of these paths get adapters, whatever the config says.

    Raises:
      ConfigError: targets or rules that match nothing, or nothing frozen to be quantised.
      ModelError: a model family or config that is not supported.
    """
    family, model = describe(config, folder)
    leaves = load.leaves_of(model)
    if weights:
        missing = load.missing_heads(folder, family, model, leaves)
        new = missing | _other_classes(config, folder, leaves)
    else:
        new = frozenset(path for path in leaves if _is_head(family, model, path))
    heads = tuple(path for path in leaves if path in new or _is_head(family, model, path))
    modules = _modules(family, leaves)
    if targets is None:
        targets = lora.targets(config.lora, modules, _projections(heads))
    labels = _labels(config, family, leaves, heads, targets)

    def signature(layer: int):
        prefix = f"layers.{layer}."
        own = {
            path.removeprefix(prefix): v for path, v in labels.items() if path.startswith(prefix)
        }
        adapters = {p.removeprefix(prefix): v for p, v in targets.items() if p.startswith(prefix)}
        return model.kind(layer), own, adapters

    runs = tree.stacks(model.num_layers, signature)
    abstract = nnx.eval_shape(lambda: _build(config, model, targets, runs, config.train.seed))
    quantized = _quantize(config, abstract, labels, mesh)
    labels |= {
        f"{single}_scale": optim.FROZEN for path in quantized for single in tree.layer_paths(path)
    }
    graphdef, shapes = tree.split(abstract)
    groups = tree.stack_labels(shapes, labels)
    places = sharding.param_shardings(shapes, tree.axes(abstract), mesh)
    shapes = {
        path: jax.ShapeDtypeStruct(
            shape.shape,
            shape.dtype if groups[path] == optim.FROZEN else jnp.float32,
            sharding=places[path],
        )
        for path, shape in shapes.items()
    }
    seed = config.train.seed
    return Assembly(
        folder, family, model, graphdef, shapes, groups, dict(targets), new, seed, quantized
    )


def with_remat(assembly: Assembly, policy: str) -> Assembly:
    """The same leaves in a model whose backward pass recomputes what `policy` says."""
    model = tree.merge(assembly.graphdef, assembly.shapes)
    model.remat = policy
    return replace(assembly, graphdef=tree.split(model)[0])


def targets(config: Config, family: Family, model: LayerConfig) -> dict[str, Spec]:
    """Rank and scale of the projections that get an adapter, {path of one layer's: spec}."""
    leaves = load.leaves_of(model)
    heads = tuple(path for path in leaves if _is_head(family, model, path))
    return lora.targets(config.lora, _modules(family, leaves), _projections(heads))


def fresh(config: Config, assembly: Assembly, known: Collection[str] = ()) -> dict[str, jax.Array]:
    """New adapters and heads but those `known`, placed; B is zero: the model equals its base."""
    init = initialiser(config, assembly, known)
    places = {path: assembly.shapes[path].sharding for path in _new(assembly, known)}
    if not places:
        return {}
    # Only these are asked for, so the compiler never makes the base.
    return jax.jit(init, out_shardings=places)(assembly.seed)


def initialiser(
    config: Config, assembly: Assembly, known: Collection[str] = ()
) -> Callable[[int | jax.Array], dict[str, jax.Array]]:
    """Seed -> new adapters and heads but those `known`, for jit; a traced seed will do."""
    wanted = {path: assembly.shapes[path] for path in _new(assembly, known)}
    runs = _stacks_of(assembly)

    def init(seed: int | jax.Array) -> dict[str, jax.Array]:
        leaves = tree.split(_build(config, assembly.model, assembly.targets, runs, seed))[1]
        return {path: leaves[path].astype(s.dtype) for path, s in wanted.items()}

    return init


def base(assembly: Assembly) -> dict[str, jax.Array]:
    """The base checkpoint's leaves, placed; trained ones in float32."""
    new = set(_new(assembly))
    wanted = {path: s for path, s in assembly.shapes.items() if path not in new}
    return load.load_params(
        assembly.folder, assembly.family, assembly.model, wanted, assembly.quantized
    )


def _quantize(
    config: Config, model: nnx.Module, labels: Mapping[str, str], mesh: Mesh
) -> dict[str, quantize.Layout]:
    """Declares the frozen projections of an abstract model's layers anew -> {path of kernel: how}.

    What is trained stays as it is, and so does all outside the layers.
    """
    if config.model.quantize == "none":
        return {}
    quantize.check(config.model.quantize, mesh.devices.flat[0])
    found = {}
    for parts, module in nnx.iter_modules(model):
        path = f"{'.'.join(map(str, parts))}.kernel"
        if not (isinstance(module, Linear) and path.startswith("layers.")):
            continue
        if labels[tree.layer_paths(path)[0]] == optim.FROZEN:
            found[path] = module.quantize(config.model.quantize)
    if not found:
        raise ConfigError(
            f"model.quantize is {config.model.quantize!r} and every projection is trained: only "
            "frozen ones are quantised",
            fix="lora.r above 0, or --config.model.quantize=none",
        )
    return found


def _new(assembly: Assembly, known: Collection[str] = ()) -> list[str]:
    """Paths of leaves that no checkpoint gives."""
    new = (path for path in assembly.shapes if ".lora." in path or path in assembly.new)
    return [path for path in new if path not in known]


def describe(config: Config, folder: Path) -> tuple[Family, LayerConfig]:
    """The family and the model that a run makes of a checkpoint."""
    classes = (len(config.data.labels) or 2) if config.task == "classify" else 0
    family, model = load.read_config(folder, num_labels=classes, ignore=config.model.ignore)
    if not (classes or model.causal):
        raise ConfigError(
            f"task={config.task} needs a model that writes text, and {folder} is an encoder",
            fix="--config.task=classify, or a causal model",
        )
    if config.train.label_smoothing and getattr(model, "final_softcap", 0.0):
        raise ConfigError(
            f"train.label_smoothing is {config.train.label_smoothing} and {folder} caps its logits",
            fix="train.label_smoothing=0",
        )
    if config.model.router_aux is not None:
        if model.experts is None:
            raise ConfigError(
                f"model.router_aux is {config.model.router_aux} and the model has no experts",
                fix="model.router_aux=None",
            )
        experts = replace(model.experts, balance_weight=config.model.router_aux)
        model = replace(model, experts=experts)
    return family, model


def _other_classes(config: Config, folder: Path, leaves: Mapping[str, Any]) -> set[str]:
    """The last layer of a trained classifier whose classes are not the run's."""
    hf, wanted = files.read_json(folder / "config.json"), config.data.labels
    if not (wanted and families.is_classifier(hf)):
        return set()
    known = families.base_labels(hf)
    if len(wanted) == families.labels(hf) and known in ((), wanted):
        return set()
    return {path for path in leaves if path.startswith(("score.", "classifier."))}


def _is_head(family: Family, model: LayerConfig, path: str) -> bool:
    """Whether PEFT trains a leaf of a classifier in full beside adapters: by its module's name."""
    head = bool(model.num_labels) and path.startswith(family.heads)
    return head and in_classifier(family.tensor(path))


def _modules(family: Family, leaves: Mapping[str, Any]) -> dict[str, str]:
    """{path of one layer's projection: its Hugging Face name}"""
    paths = [single for path in leaves for single in tree.layer_paths(path)]
    return {
        path.removesuffix(".kernel"): family.module(path)
        for path in paths
        if path.endswith(".kernel")
    }


def _projections(heads: tuple[str, ...]) -> set[str]:
    return {path.removesuffix(".kernel") for path in heads}


def _labels(
    config: Config,
    family: Family,
    leaves: Mapping[str, Any],
    heads: tuple[str, ...],
    targets: Mapping[str, Spec],
) -> dict[str, str]:
    """{path of one layer's leaf: group}, adapters too."""
    paths = [single for path in leaves for single in tree.layer_paths(path)]
    parts = ("A", "B", "scale", "magnitude") if config.lora.use_dora else ("A", "B", "scale")
    adapters = [f"{module}.lora.{leaf}" for module in sorted(targets) for leaf in parts]
    names = {path: family.tensor(path) for path in paths}
    everyone = [*paths, *adapters]
    return optim.labels(everyone, config.lora, config.optim, heads=heads, names=names)


def _build(
    config: Config, model: LayerConfig, targets: Mapping[str, Spec], stacks, seed: Any
) -> nnx.Module:
    # Adapters draw from a stream of their own, wherever the layers are cut into stacks.
    key = jax.random.key(seed)
    rngs = nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))
    module = load.module_of(model)(
        model,
        rngs=rngs,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        remat="full" if config.model.remat == "auto" else config.model.remat,
        stacks=stacks,
    )
    return lora.insert(module, targets, config.lora, rngs)


def _stacks_of(assembly: Assembly) -> tuple[tuple[int, int], ...]:
    runs = {tree.layer_range(path) for path in assembly.shapes} - {None}
    return tuple(sorted((run.start, run.stop) for run in runs if run is not None))
