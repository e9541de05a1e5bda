"""A sweep's population at work: trials come and go in the slots of one loaded base.

Positions count micro-batches of `Engine.micro` rows. A trial's micro-batches follow from its config
alone, so those of trials with the same seed are the same rows: what they differ in is not luck.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtune import assemble, setup, sharding, slots, tree
from jaxtune.config import Config, replaced
from jaxtune.data import pipeline
from jaxtune.data.packing import Batch, Rows
from jaxtune.members import Layout, Member
from jaxtune.scoring import Score
from jaxtune.slots import Slots
from jaxtune.step import TrainState

COMPILING = "compile"  # how the threads are named that compile an engine's programs


class Measured(NamedTuple):
    """Of one micro-batch of every slot, [P]."""

    loss: np.ndarray  # nats a token
    tokens: np.ndarray
    finite: np.ndarray


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a population of one width, ready or under way."""

    step: Future[Any]
    score: Future[Any]
    place: Future[Any]
    pick: Future[Any]


class Engine:
    """A population whose base is loaded; population.py opens one.

    Slots are opaque; each call gives new ones and takes the old ones away.
    """

    def __init__(self, layout: Layout, widths: tuple[int, ...], train: Rows, held: Rows):
        self.config, self.folder = layout.config, layout.assembly.folder
        self.micro, self.widths, self.train, self.eval = layout.micro, widths, train, held
        self._layout, self._mesh = layout, layout.mesh
        self._orders: dict[int, Any] = {}
        self._samples: dict[int, Rows] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix=COMPILING)
        self._feeder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._next: tuple[Any, Future[Batch]] | None = None
        # Programs follow from shapes: they compile while the weights are read.
        self._places = jax.tree.map(lambda leaf: leaf.sharding, layout.one)  # of one trial
        new = jax.jit(layout.new_slot, out_shardings=self._places)
        arguments = layout.arguments(self.member(self.config), layout.assembly.trained)
        # The first needed first: a trial begins in the widest population.
        self._new = self._compile(lambda: new.lower(*arguments))
        self._programs = {width: self._build(width) for width in widths}
        state, frozen = setup.initial(layout.config, layout.assembly, layout.program, layout.mesh)
        self._given, self._frozen = state.trainable, layout.without_scales(frozen)

    @property
    def rows(self) -> int:
        """Of the training data."""
        return len(self.train)

    @property
    def outcomes(self) -> int:
        """What a prediction chooses from: words, or a classifier's classes."""
        labels = self.config.data.labels if self.config.task == "classify" else ()
        return len(labels) or self._layout.assembly.model.vocab_size

    def member(self, config: Config) -> Member:
        """A trial of this population; see `Layout.member`."""
        return self._layout.member(config, self.rows)

    def empty(self, width: int) -> Slots:
        """Slots without a trial; they must be filled before they are stepped in earnest."""
        return jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
            self._layout.population(width),
        )

    def start(self, population: Slots, k: int, member: Member) -> Slots:
        """A trial from its beginning in slot k."""
        one = self._new.result()(*self._layout.arguments(member, self._given))
        return self._placed(population, k, one)

    def put(self, population: Slots, k: int, saved: Mapping[str, np.ndarray]) -> Slots:
        """A trial as `take` gave it in slot k."""
        leaves, treedef = jax.tree.flatten_with_path(self._layout.one)
        found = [saved[_name(path)] for path, _ in leaves]
        one = jax.device_put(jax.tree.unflatten(treedef, found), self._places)
        return self._placed(population, k, one)

    def take(self, population: Slots, k: int) -> dict[str, np.ndarray]:
        """All that makes up the trial in slot k, by name."""
        one = self._of(population).pick.result()(population, np.int32(k))
        leaves = jax.tree.leaves_with_path(jax.device_get(one))
        return {_name(path): np.asarray(leaf) for path, leaf in leaves}

    def step(
        self, population: Slots, members: Sequence[Member | None], positions: Sequence[int]
    ) -> tuple[Slots, Measured]:
        """One micro-batch for every slot: slot k's is number positions[k] of its trial's."""
        wanted = [
            (-1, 0) if m is None else (m.config.train.seed, p)
            for m, p in zip(members, positions, strict=True)
        ]
        if self._next is not None and self._next[0] == wanted:
            batch = self._next[1].result()
        else:
            batch = self._batch(wanted)
        coming = [(seed, p + 1) for seed, p in wanted]
        self._next = (coming, self._feeder.submit(self._batch, coming))
        programs = self._of(population)
        population, measured = programs.step.result()(population, self._frozen, batch)
        found = jax.device_get(measured)
        weight = np.maximum(found.term.weight, 1)
        return population, Measured(found.term.total / weight, found.tokens, found.finite)

    def evaluate(self, population: Slots, rows: int | None = None) -> list[Score]:
        """Scores of every slot on the held-out rows; infinite where a loss is not finite.

        Args:
          rows: about so many of them, always the same; None is all.
        """
        width, held = len(population.position), self._held(rows)
        score = self._of(population).score.result()
        total, weight, correct = np.zeros((3, width))
        for batch in pipeline.eval_batches(held, self._eval_rows(width)):
            term = jax.device_get(score(population, self._frozen, self._on_mesh(batch)))
            total, weight, correct = (
                total + term.total,
                weight + term.weight,
                correct + term.correct,
            )
        total = np.where(np.isfinite(total), total, np.inf)
        return [Score.of(*map(float, sums)) for sums in zip(total, weight, correct, strict=True)]

    def export_state(self, population: Slots, k: int, member: Member) -> TrainState:
        """The trial in slot k as the state of a training of its own."""
        saved = self.take(population, k)
        config = replaced(member.config, {"train.steps": member.steps})
        alone = assemble.assemble(config, self.folder, self._mesh)
        program = setup.program(config, alone, member.steps)
        wanted = setup.abstract_inputs(config, alone, program, self._mesh)[0]
        layers = {
            single: (path, i)
            for path in self._given
            for i, single in enumerate(tree.layer_paths(path))
        }

        def leaf(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            name, last = _name(path), getattr(path[-1], "key", "")
            if name == "step":
                found = saved["position"] // saved["every"]
            elif last in alone.trained:
                found = _restacked(saved, name.removesuffix(last), last, layers, wanted.shape)
            else:
                found = saved[name]
            return jax.device_put(found.astype(wanted.dtype), wanted.sharding)

        return jax.tree_util.tree_map_with_path(leaf, wanted)

    def _build(self, width: int) -> Programs:
        layout, length = self._layout, self.train.width
        population, k = layout.population(width), np.int32(0)
        places = jax.tree.map(lambda leaf: leaf.sharding, population)
        held = setup.abstract_batch(
            layout.assembly, self._mesh, self._eval_rows(width), self.eval.width
        )
        score = jax.jit(partial(slots.score, layout.program))
        place = jax.jit(slots.place, donate_argnums=0, out_shardings=places)
        pick = jax.jit(slots.pick, out_shardings=self._places)
        return Programs(
            self._compile(lambda: layout.step(width, length)),
            self._compile(lambda: score.lower(population, layout.frozen, held)),
            self._compile(lambda: place.lower(population, k, layout.one)),
            self._compile(lambda: pick.lower(population, k)),
        )

    def _compile(self, lower: Callable[[], jax.stages.Lowered]) -> Future[Any]:
        """A program, compiled in the background."""

        def build() -> Any:
            with jax.set_mesh(self._mesh):
                return lower().compile()

        return self._pool.submit(build)

    def _of(self, population: Slots) -> Programs:
        return self._programs[len(population.position)]

    def _placed(self, population: Slots, k: int, one: Any) -> Slots:
        return self._of(population).place.result()(population, np.int32(k), one)

    def _eval_rows(self, width: int) -> int:
        """Rows of an evaluation batch: as many in all as the widest population trains on."""
        return self.micro * max(1, self.widths[0] // width)

    def _held(self, rows: int | None) -> Rows:
        if rows is None or rows >= len(self.eval):
            return self.eval
        if rows not in self._samples:
            share = rows / len(self.eval)
            self._samples[rows] = pipeline.subset(self.eval, share, self.config.train.seed)
        return self._samples[rows]

    def _batch(self, wanted: Sequence[tuple[int, int]]) -> Batch:
        """The micro-batches (seed, position) one after another; those of no trial are empty."""
        known: dict[tuple[int, int], Batch] = {}
        for seed, position in wanted:
            if (seed, position) not in known:
                numbers = [] if seed < 0 else self._row_numbers(seed, position)
                known[seed, position] = self.train.batch(numbers, size=self.micro)
        parts = [known[each] for each in wanted]
        return self._on_mesh(jax.tree.map(lambda *each: np.concatenate(each), *parts))

    def _row_numbers(self, seed: int, position: int) -> list[int]:
        if seed not in self._orders:
            self._orders[seed] = pipeline.order(self.train, seed, self.config.data.shuffle)
        order, first = self._orders[seed], position * self.micro
        return [int(order[i]) for i in range(first, first + self.micro)]

    def _on_mesh(self, batch: Batch) -> Batch:
        place = NamedSharding(self._mesh, sharding.TOKENS)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), batch
        )


def _restacked(
    saved: Mapping[str, np.ndarray],
    prefix: str,
    path: str,
    layers: Mapping[str, tuple[str, int]],
    shape: tuple[int, ...],
) -> np.ndarray:
    """A leaf of a training of its own from the population's wider ones, cut to its shape."""
    if tree.layer_range(path) is None:
        return saved[prefix + path]
    singles = [layers[single] for single in tree.layer_paths(path)]
    stacked = np.stack([saved[prefix + stack][i] for stack, i in singles])
    return stacked[tuple(slice(size) for size in shape)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
