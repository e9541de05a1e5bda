"""What a population is made of, before anything is loaded: its members, its shapes, its step.

All of it follows from config.json and the settings, so a population may be compiled for devices
that are not here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import assemble, optim, setup, sharding, slots, tree
from jaxtune.assemble import Assembly
from jaxtune.config import VARIES, Config, dotted
from jaxtune.errors import ConfigError
from jaxtune.models.adapter import Spec
from jaxtune.slots import Slots
from jaxtune.step import Program

ADAPTER = (".lora.A", ".lora.B")
_MAY = (*VARIES, "train.grad_accum")  # differ in one population
_SCALE = ".lora.scale"


class Member(NamedTuple):
    """A trial, as its config has it."""

    config: Config
    steps: int  # optimizer steps of its whole training
    every: int  # micro-batches a step
    hyper: dict[str, np.float32]  # optim.hyperparameters
    ranks: dict[str, np.ndarray]  # {path of A: by layer}
    scales: dict[str, np.ndarray]

    @property
    def positions(self) -> int:
        """Micro-batches of the whole training."""
        return self.steps * self.every


@dataclass(frozen=True)
class Layout:
    """A population without its weights; `assembly` has room for the widest of its trials."""

    config: Config
    assembly: Assembly
    mesh: Mesh
    program: Program
    micro: int  # rows of a micro-batch
    accumulates: bool  # some trial needs several of them for a step

    def member(self, config: Config, rows: int) -> Member:
        """A trial of this population, on so many rows of training data.

        Raises:
          ConfigError: it differs in more than VARIES, or its batch is not made of micro-batches.
        """
        own, theirs = dotted(self.config.to_dict()), dotted(config.to_dict())
        for key in own.keys() | theirs.keys():
            if key in _MAY or key.startswith(("sweep.", "checkpoint.", "eval.")):
                continue
            if own.get(key) != theirs.get(key):
                raise ConfigError(
                    f"{key} is {theirs.get(key)!r} in a trial and {own.get(key)!r} in its "
                    "population",
                    fix=f"of {', '.join(VARIES)}",
                )
        batch = config.train.batch_size
        if batch % self.micro:
            raise ConfigError(
                f"train.batch_size {batch} is no multiple of {self.micro} rows, the population's "
                "micro-batch",
                fix=f"a multiple of {self.micro}",
            )
        steps = setup.total_steps(config, rows)
        hyper = optim.hyperparameters(config, steps)
        targets = assemble.targets(config, self.assembly.family, self.assembly.model)
        return Member(
            config,
            steps,
            batch // self.micro,
            {name: np.float32(value) for name, value in hyper.items()},
            self._by_layer(".lora.A", targets, lambda spec: spec.rank, np.int32),
            self._by_layer(_SCALE, targets, lambda spec: spec.scale, np.float32),
        )

    def _by_layer(self, leaf: str, targets: Mapping[str, Spec], value, dtype):
        """{path of this leaf of every adapter: the trial's own value, 0 where it has none}"""
        found = {}
        for path, shape in self.assembly.shapes.items():
            if not path.endswith(leaf):
                continue
            specs = [targets.get(p.removesuffix(leaf)) for p in tree.layer_paths(path)]
            values = np.asarray([0 if spec is None else value(spec) for spec in specs], dtype)
            lead = shape.shape[:-2] if leaf == ".lora.A" else shape.shape
            values = values.reshape(-1, *[1] * (len(lead) - 1)) if lead else values[0]
            found[path] = np.broadcast_to(values, lead)
        return found

    def without_scales(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Frozen leaves that trials share: not the scales of their adapters."""
        return {path: leaf for path, leaf in leaves.items() if not path.endswith(_SCALE)}

    def arguments(self, member: Member, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Of `new_slot`."""
        seed, every = np.uint32(member.config.train.seed), np.int32(member.every)
        return dict(given), member.ranks, member.scales, member.hyper, seed, every

    def new_slot(self, given, ranks, scales, hyper, seed, every) -> Slots:
        """A trial before its first micro-batch; `given` are trained leaves that no seed decides."""
        fresh = assemble.initialiser(self.config, self.assembly)(seed)
        keep = (".scale", ".magnitude")
        if self.config.lora.init != "default":
            keep += ADAPTER  # those that are given
        initial = given | {k: v for k, v in fresh.items() if k in given and not k.endswith(keep)}
        return slots.new_slot(
            self.program, initial, ranks, scales, hyper, seed, every, self.accumulates
        )

    @cached_property
    def one(self) -> Slots:
        """The shapes of one trial, in their places."""
        member = self.member(self.config, self.config.train.batch_size)
        leaves = jax.eval_shape(self.new_slot, *self.arguments(member, self.assembly.trained))
        return setup.in_place(leaves, self.assembly.trained, self.mesh)

    def population(self, width: int) -> Slots:
        """The shapes of so many. Where it goes up, a device has whole trials and their rows."""
        axes = self.apart(width)

        def widened(leaf: Any) -> jax.ShapeDtypeStruct:
            rest = [None if name in axes else name for name in leaf.sharding.spec]
            place = NamedSharding(self.mesh, P(axes or None, *rest))
            return jax.ShapeDtypeStruct((width, *leaf.shape), leaf.dtype, sharding=place)

        return jax.tree.map(widened, self.one)

    def apart(self, width: int) -> tuple[str, ...]:
        """Axes of the mesh that share out the trials: the first that share out rows, while it
        goes up."""
        found: tuple[str, ...] = ()
        for axis in sharding.BATCH:
            if width % math.prod(self.mesh.shape[name] for name in (*found, axis)):
                break
            found = (*found, axis)
        return tuple(name for name in found if self.mesh.shape[name] > 1)

    @property
    def frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what trials share."""
        leaves = tree.partition(self.assembly.shapes, self.assembly.groups)[1]
        return self.without_scales(leaves)

    def step(self, width: int, length: int) -> jax.stages.Lowered:
        """A micro-batch for so many trials, rows of so many tokens, lowered for the mesh."""
        population = self.population(width)
        places = jax.tree.map(lambda leaf: leaf.sharding, population)
        step = jax.jit(
            partial(slots.micro_step, self.program), donate_argnums=0, out_shardings=(places, None)
        )
        batch = setup.abstract_batch(self.assembly, self.mesh, width * self.micro, length)
        with jax.set_mesh(self.mesh):
            return step.lower(population, self.frozen, batch)
