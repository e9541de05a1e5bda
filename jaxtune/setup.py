"""What a run starts from: its program, first state, frozen weights, and batches in place."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import assemble, config, optim, sharding, tree
from jaxtune.assemble import Assembly
from jaxtune.config import Config
from jaxtune.console import say
from jaxtune.data.packing import Batch
from jaxtune.errors import ConfigError
from jaxtune.hf import adapter, files
from jaxtune.models.decoder import DecoderConfig
from jaxtune.objectives.sft import next_token
from jaxtune.step import Program, TrainState, init_state

CONFIG = "config.json"  # of a workdir


def within_positions(config: Config, decoder: DecoderConfig) -> Config:
    """The config with data.max_length no longer than the positions the model knows, said aloud."""
    if config.data.max_length <= decoder.max_position:
        return config
    say(
        f"data.max_length {config.data.max_length} is more than the model's "
        f"{decoder.max_position} positions: rows are {decoder.max_position} tokens"
    )
    data = dataclasses.replace(config.data, max_length=decoder.max_position)
    return dataclasses.replace(config, data=data)


def program(config: Config, assembly: Assembly, steps: int) -> Program:
    """What is fixed for a run of `steps` optimizer steps."""
    groups = {path: assembly.groups[path] for path in assembly.trained}
    return Program(
        graphdef=assembly.graphdef,
        optimizer=optim.make(config, groups, steps),
        schedule=config.optim.schedule,
        objective=next_token,
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
    if config.lora.r and config.lora.init != "default":
        wanted = {
            path: shape
            for path, shape in assembly.shapes.items()
            if path in assembly.trained or path.endswith((".lora.A", ".lora.B"))
        }
        folder = files.resolve(config.lora.init)
        found = adapter.read_adapter(folder, assembly.family, config.lora, wanted)
        params |= {path: jax.device_put(found[path], s.sharding) for path, s in wanted.items()}
    trainable, frozen = tree.partition(params, assembly.groups)
    # Counters of the optimizer are born on one device; a step wants everything on the mesh.
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
        init_state(program, trainable),
    )
    return state, frozen


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings, for a checkpoint to be restored into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def to_mesh(batches: Iterable[Batch], mesh: Mesh) -> Iterator[Batch]:
    """This host's rows -> global batches, cut over the batch axes of the mesh."""
    rows = NamedSharding(mesh, P(sharding.BATCH, None))
    for batch in batches:
        yield Batch(*(jax.make_array_from_process_local_data(rows, x) for x in batch))


def portable(config: Config) -> dict[str, Any]:
    """The config as JSON values, local paths made absolute: a workdir is opened from anywhere."""

    def absolute(value: Any) -> Any:
        there = isinstance(value, str) and value and Path(value).expanduser().exists()
        return str(Path(value).expanduser().resolve()) if there else value

    model = dataclasses.replace(config.model, path=absolute(config.model.path))
    data = dataclasses.replace(
        config.data, train=absolute(config.data.train), eval=absolute(config.data.eval)
    )
    return dataclasses.replace(config, model=model, data=data).to_dict()


def read_config(workdir: Path) -> Config:
    """The config a workdir was made with. Raises ConfigError where there is none."""
    if not (workdir / CONFIG).is_file():
        raise ConfigError(f"{workdir} holds no run", fix="the --workdir of a jaxtune train")
    return config.freeze(files.read_json(workdir / CONFIG))
