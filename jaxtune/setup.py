"""What a run starts from: its program, first state, frozen weights, and batches in place."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import assemble, config, optim, sharding, tree
from jaxtune.assemble import Assembly
from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.data.labels import Form
from jaxtune.data.packing import Batch
from jaxtune.errors import ConfigError
from jaxtune.hf import adapter, files
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


def form(folder: Path, model: LayerConfig) -> Form:
    """How the model wants rows with a class, and the classes its checkpoint knows."""
    known: tuple[str, ...] = ()
    if model.num_labels:
        known = families.base_labels(files.read_json(folder / "config.json"))
    if isinstance(model, EncoderConfig):
        return Form("first", model.typed_pairs, known)
    return Form("last", False, known)


def program(config: Config, assembly: Assembly, steps: int) -> Program:
    """What is fixed for a run of `steps` optimizer steps."""
    groups = {path: assembly.groups[path] for path in assembly.trained}
    return Program(
        graphdef=assembly.graphdef,
        optimizer=optim.make(config, groups, steps),
        schedule=config.optim.schedule,
        objective=classify if config.task == "classify" else next_token,
        micro_batches=config.train.grad_accum,
        seed=config.train.seed,
        dropout=config.lora.dropout > 0,
    )


def initial(
    config: Config, assembly: Assembly, program: Program, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state before step 0, frozen leaves): the base, and new adapters or those of lora.init.

    Raises:
      ModelError, ConfigError: a base or an adapter that does not fit.
    """
    params = assemble.base(assembly) | assemble.fresh(config, assembly)
    if config.lora.r and config.lora.init == "default":
        params |= magnitudes(config, params)
    elif config.lora.r:
        wanted = {
            path: shape
            for path, shape in assembly.shapes.items()
            if path in assembly.trained or path.endswith((".lora.A", ".lora.B", ".lora.magnitude"))
        }
        folder = files.resolve(config.lora.init)
        found = adapter.read_adapter(folder, assembly.family, assembly.model, config.lora, wanted)
        params |= {path: jax.device_put(found[path], s.sharding) for path, s in wanted.items()}
    trainable, frozen = tree.partition(params, assembly.groups)
    # Counters of the optimizer are born on one device; a step wants everything on the mesh.
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
        init_state(program, trainable),
    )
    return state, frozen


def magnitudes(config: Config, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{path of DoRA's magnitudes: lengths of the columns of the kernel beside them}, float32.

    With these and B of zero a model is its base; the kernels are as the computation rounds them.
    """
    dtype = jnp.dtype(config.model.dtype)

    def lengths(kernel: jax.Array) -> jax.Array:
        squares = jnp.square(kernel.astype(dtype).astype(jnp.float32))
        return jnp.sqrt(jnp.sum(squares, axis=-2))

    return {
        path: jax.jit(lengths, out_shardings=leaf.sharding)(leaves[f"{module}.kernel"])
        for path, leaf in leaves.items()
        if (module := path.removesuffix(".lora.magnitude")) != path
    }


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings, for a checkpoint to be restored into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def abstract_inputs(
    config: Config, assembly: Assembly, program: Program, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], Batch]:
    """What `train_step` takes in this run, as shapes in their places: nothing is read or made."""
    trainable, frozen = tree.partition(assembly.shapes, assembly.groups)
    whole = NamedSharding(mesh, P())

    def placed(path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Moments are kept under the path of what they belong to; all else is on every device.
        owner = trainable.get(getattr(path[-1], "key", ""))
        same = owner is not None and owner.shape == leaf.shape
        place = owner.sharding if owner is not None and same else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    state = jax.eval_shape(lambda leaves: init_state(program, leaves), trainable)
    state = jax.tree_util.tree_map_with_path(placed, state)
    rows = NamedSharding(mesh, sharding.TOKENS)
    shape = (config.train.batch_size, config.data.max_length)
    kinds = {name: jnp.float32 if name == "weights" else jnp.int32 for name in Batch._fields}
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in kinds.items()}
    if not (isinstance(assembly.model, EncoderConfig) and assembly.model.typed_pairs):
        batch["types"] = None
    return state, frozen, Batch(**batch)


def to_mesh(batches: Iterable[Batch], mesh: Mesh) -> Iterator[Batch]:
    """This host's rows -> global batches, cut over the batch axes of the mesh."""
    rows = NamedSharding(mesh, sharding.TOKENS)
    for batch in batches:
        yield jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)


def portable(config: Config) -> dict[str, Any]:
    """The config as JSON values, local paths made absolute: a workdir is opened from anywhere."""

    def absolute(value: Any) -> Any:
        there = isinstance(value, str) and value and Path(value).expanduser().exists()
        return str(Path(value).expanduser().resolve()) if there else value

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
