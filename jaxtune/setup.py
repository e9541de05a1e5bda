"""What a run starts from: its program, first state, frozen weights, and batches in place."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import assemble, config, optim, sharding, tree
from jaxtune.assemble import Assembly
from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.data.labels import Form
from jaxtune.data.packing import WIDTH_MULTIPLE, Batch
from jaxtune.errors import ConfigError
from jaxtune.hf import adapter, files
from jaxtune.kernels import quantize
from jaxtune.models import families
from jaxtune.models.blocks import LayerConfig
from jaxtune.models.encoder import EncoderConfig
from jaxtune.objectives.classify import classify
from jaxtune.objectives.sft import next_token
from jaxtune.step import Program, TrainState, init_state

CONFIG = "config.json"  # of a workdir


def within_positions(config: Config, model: LayerConfig) -> Config:
    """The config with data.max_length no longer than the positions the model knows, said aloud."""
    if config.data.max_length <= model.max_position:
        return config
    say(
        f"data.max_length {config.data.max_length} is more than the model's "
        f"{model.max_position} positions: rows are {model.max_position} tokens"
    )
    data = dataclasses.replace(config.data, max_length=model.max_position)
    return dataclasses.replace(config, data=data)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where the mesh does not cut rows and their tokens evenly."""
    rows = config.train.batch_size // config.train.grad_accum
    devices = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    if rows % devices:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} / train.grad_accum "
            f"{config.train.grad_accum} = {rows} rows do not divide over {devices} devices",
            fix=f"a batch_size that is a multiple of {devices * config.train.grad_accum}",
        )
    parts, length = mesh.shape[sharding.CONTEXT], config.data.max_length
    if parts > 1 and (length % WIDTH_MULTIPLE or WIDTH_MULTIPLE % parts):
        raise ConfigError(
            f"rows of data.max_length {length} are not cut evenly by mesh.context {parts}",
            fix=f"mesh.context of 2, 4 or 8, and a max_length that is a multiple of {128 * parts}",
        )


def form(folder: Path, model: LayerConfig) -> Form:
    """How the model wants rows with a class, and the classes its checkpoint knows."""
    known: tuple[str, ...] = ()
    if model.num_labels:
        known = families.base_labels(files.read_json(folder / "config.json"))
    if isinstance(model, EncoderConfig):
        return Form("first", model.typed_pairs, known)
    return Form("last", False, known)


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of a training on so many rows: train.steps, or as train.epochs asks."""
    return config.train.steps or math.ceil(config.train.epochs * rows / config.train.batch_size)


def program(config: Config, assembly: Assembly, steps: int) -> Program:
    """What is fixed for a run of `steps` optimizer steps."""
    groups = {path: assembly.groups[path] for path in assembly.trained}
    return Program(
        graphdef=assembly.graphdef,
        optimizer=optim.make(config, groups, steps),
        objective=classify if config.task == "classify" else next_token,
        micro_batches=config.train.grad_accum,
        seed=config.train.seed,
        dropout=config.lora.dropout > 0,
        smoothing=config.train.label_smoothing > 0,
    )


def initial(
    config: Config, assembly: Assembly, program: Program, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state before step 0, frozen leaves): the base, and new adapters or those of lora.init.

    Raises:
      ModelError, ConfigError: a base or an adapter that does not fit.
    """
    known = _known(config, assembly)
    params = assemble.base(assembly) | assemble.fresh(config, assembly, known)
    if config.lora.r and config.lora.init == "default":
        params |= magnitudes(config, assembly, params)
    params |= {path: jax.device_put(x, assembly.shapes[path].sharding) for path, x in known.items()}
    trainable, frozen = tree.partition(params, assembly.groups)
    # Counters of the optimizer are born on one device; a step wants everything on the mesh.
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
        init_state(program, trainable),
    )
    return state, frozen


def _known(config: Config, assembly: Assembly) -> dict[str, np.ndarray]:
    """{path: first values} of what is trained, from the adapter that lora.init names, if any."""
    if not config.lora.r or config.lora.init == "default":
        return {}
    wanted = {
        path: shape
        for path, shape in assembly.shapes.items()
        if path in assembly.trained or path.endswith((".lora.A", ".lora.B", ".lora.magnitude"))
    }
    folder = files.resolve(config.lora.init)
    return adapter.read_adapter(folder, assembly.family, assembly.model, config.lora, wanted)


def magnitudes(
    config: Config, assembly: Assembly, leaves: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """{path of DoRA's magnitudes: lengths of the columns of the kernel beside them}, float32.

    With these and B of zero a model is its base; the kernels are as the computation has them.
    """
    dtype = jnp.dtype(config.model.dtype)
    found = {}
    for path, leaf in leaves.items():
        module = path.removesuffix(".lora.magnitude")
        if module == path:
            continue
        kernel, scale = leaves[f"{module}.kernel"], leaves.get(f"{module}.kernel_scale")
        measure = partial(_lengths, assembly.quantized.get(f"{module}.kernel"), dtype)
        found[path] = jax.jit(measure, out_shardings=leaf.sharding)(kernel, scale)
    return found


def _lengths(
    layout: quantize.Layout | None, dtype: jnp.dtype, kernel: jax.Array, scale: jax.Array | None
) -> jax.Array:
    """Euclidean lengths [..., O] of a kernel's columns, in float32."""

    def lengths(kernel: jax.Array) -> jax.Array:
        squares = jnp.square(kernel.astype(dtype).astype(jnp.float32))
        return jnp.sqrt(jnp.sum(squares, axis=-2))

    if layout is None:
        return lengths(kernel)
    # A layer at a time: a whole stack would be large once it is dequantised.
    return jax.lax.map(
        lambda layer: lengths(quantize.dequantize(layer[0], layer[1], layout, dtype)),
        (kernel, scale),
    )


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings, for a checkpoint to be restored into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def abstract_inputs(
    config: Config, assembly: Assembly, program: Program, mesh: Mesh
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct], Any]:
    """(state, frozen, batch): what `train_step` takes in this run, as shapes in their places."""
    trainable, frozen = tree.partition(assembly.shapes, assembly.groups)
    state = jax.eval_shape(lambda leaves: init_state(program, leaves), trainable)
    shape = (config.train.batch_size, config.data.max_length)
    return in_place(state, trainable, mesh), frozen, abstract_batch(assembly, mesh, *shape)


def in_place(state: Any, trained: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> Any:
    """The shapes of a state in their places: each moment is where what it belongs to is."""
    whole = NamedSharding(mesh, P())

    def placed(path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Moments are kept under the path of what they belong to; all else is on every device.
        owner = trained.get(getattr(path[-1], "key", ""))
        same = owner is not None and owner.shape == leaf.shape
        place = owner.sharding if owner is not None and same else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(placed, state)


def abstract_batch(assembly: Assembly, mesh: Mesh, rows: int, width: int) -> Batch:
    """A global batch of so many rows of `width` slots, as shapes in their places."""
    place = NamedSharding(mesh, sharding.TOKENS)
    kinds = {name: jnp.float32 if name == "weights" else jnp.int32 for name in Batch._fields}
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((rows, width), kind, sharding=place)
        for name, kind in kinds.items()
    }
    if not (isinstance(assembly.model, EncoderConfig) and assembly.model.typed_pairs):
        batch["types"] = None
    return Batch(**batch)


def to_mesh(batches: Iterable[Batch], mesh: Mesh, batch_size: int | None = None) -> Iterator[Batch]:
    """This host's rows -> global batches, cut over the batch and context axes of the mesh.

    Args:
      batches: the rows `sharding.local_rows(mesh, batch_size)` of each global batch.
      batch_size: rows of a global batch; None where they are all there.
    """
    place = NamedSharding(mesh, sharding.TOKENS)

    def placed(x: np.ndarray, mine: np.ndarray) -> jax.Array:
        shape = (batch_size or len(x), x.shape[1])

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            start = int(np.searchsorted(mine, first))
            return x[start : start + last - first, index[1]]

        return jax.make_array_from_callback(shape, place, part)

    for batch in batches:
        mine = sharding.local_rows(mesh, batch_size or len(batch.tokens))
        yield jax.tree.map(lambda x, mine=mine: placed(x, mine), batch)


def portable(config: Config) -> dict[str, Any]:
    """The config as JSON values, local paths made absolute: a workdir is opened from anywhere."""

    def absolute(value: Any) -> Any:
        there = isinstance(value, str) and value and Path(value).expanduser().exists()
        return str(Path(value).expanduser().absolute()) if there else value

    model = dataclasses.replace(config.model, path=absolute(config.model.path))
    data = dataclasses.replace(
        config.data, train=absolute(config.data.train), eval=absolute(config.data.eval)
    )
    init = config.lora.init if config.lora.init == "default" else absolute(config.lora.init)
    lora = dataclasses.replace(config.lora, init=init)
    return dataclasses.replace(config, model=model, data=data, lora=lora).to_dict()


def read_config(workdir: Path) -> Config:
    """The config a workdir was made with. Raises ConfigError where there is none."""
    if not (workdir / CONFIG).is_file():
        raise ConfigError(f"{workdir} holds no run", fix="the --workdir of a jaxtune train")
    return config.freeze(files.read_json(workdir / CONFIG))
