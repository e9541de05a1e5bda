"""The train step, compiled ahead of its run: what it needs of a device, and what fits there.

The step is lowered by the code that the run uses, from shapes alone, so it may be compiled for
devices that are not here (`jaxtune plan`).
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, SingleDeviceSharding

from jaxtune import assemble, cores, estimate, setup
from jaxtune.assemble import Assembly
from jaxtune.config import Config, replaced
from jaxtune.console import say
from jaxtune.data.packing import Batch
from jaxtune.errors import ConfigError
from jaxtune.models.stacks import REMAT
from jaxtune.step import Program, jit_eval, jit_train

GIB = 2**30


class Buffer(NamedTuple):
    """One allocation of a device."""

    bytes: int
    name: str


class Compiled(NamedTuple):
    """A compiled train step; bytes are those of one device, as the compiler laid them out."""

    executable: Any  # jax.stages.Compiled: (state, frozen, batch) -> (state, StepMetrics)
    arguments: int
    temporaries: int
    outputs: int
    aliased: int  # outputs that take the place of donated arguments
    seconds_lower: float
    seconds_compile: float

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def hlo(self) -> str:
        """The optimized program."""
        return self.executable.as_text()


class OutOfMemory(ConfigError):
    """The step does not fit its devices. `buffers` are the largest, as far as they are known."""

    def __init__(self, needed: int, available: int, buffers: tuple[Buffer, ...]):
        self.needed, self.available, self.buffers = needed, available, buffers
        largest = ", ".join(f"{b.name} {b.bytes / GIB:.2f}" for b in buffers[:3])
        super().__init__(
            f"the step needs {needed / GIB:.2f} GiB of a device that has {available / GIB:.2f}; "
            f"largest: {largest} GiB",
            fix="model.remat=full, a larger train.grad_accum, model.quantize=int8 or more devices",
        )


def compile_step(
    config: Config,
    assembly: Assembly,
    program: Program,
    mesh: Mesh,
    *,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles the run's train step for the devices of `mesh`.

    Args:
      options: XLA's compiler_options, by their names without dashes.

    Raises:
      OutOfMemory: what the compiler, or the memory of a GPU that is here, says of it.
    """
    state, frozen, batch = setup.abstract_inputs(config, assembly, program, mesh)
    started = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = jit_train(program, state).lower(state, frozen, batch)
        middle = time.monotonic()
        try:
            executable = lowered.compile(compiler_options=dict(options or {}))
        except JaxRuntimeError as error:
            needed, available, buffers = read_out_of_memory(str(error))
            if not needed:
                raise
            guessed = largest(config, assembly, program, mesh)
            raise OutOfMemory(needed, available, buffers or guessed) from None
    memory = executable.memory_analysis()
    assert memory is not None, "every platform we compile for reports its memory"
    compiled = Compiled(
        executable,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        seconds_lower=middle - started,
        seconds_compile=time.monotonic() - middle,
    )
    available = memory_of(own_device(mesh))
    if available and compiled.total > available:  # XLA compiles for a GPU what does not fit it
        raise OutOfMemory(compiled.total, available, largest(config, assembly, program, mesh))
    return compiled


def steps(
    config: Config,
    assembly: Assembly,
    program: Program,
    mesh: Mesh,
    widths: tuple[int, int | None],
    *,
    resumes: bool = False,
) -> tuple[Callable, Callable]:
    """`jit_train` and `jit_eval` of a run, which compile while its weights are read.

    Args:
      widths: slots of a training row, and of one held out; None where there are none.
      resumes: it trains before it evaluates, and so that step comes first.
    """
    state, frozen, _ = setup.abstract_inputs(config, assembly, program, mesh)

    def batch(width: int) -> Batch:
        return setup.abstract_batch(assembly, mesh, config.train.batch_size, width)

    train = (jit_train(program, state), (state, frozen, batch(widths[0])))
    if widths[1] is None:
        return ahead(mesh, train)[0], jit_eval(program)
    evaluation = (jit_eval(program), (state.trainable, frozen, batch(widths[1])))
    if resumes:
        train_step, eval_step = ahead(mesh, train, evaluation)
    else:
        eval_step, train_step = ahead(mesh, evaluation, train)
    return train_step, eval_step


def ahead(mesh: Mesh, *programs: tuple[Callable, tuple[Any, ...]]) -> list[Callable]:
    """Jitted functions, which a thread compiles one after another for the shapes beside each.

    What jax has compiled it finds again, so a call waits for the thread and computes. Where its
    inputs turn out others it compiles for itself; what fails here, fails again and aloud there.
    """

    def compile(jitted: Callable, shapes: tuple[Any, ...]) -> None:
        with jax.set_mesh(mesh):
            jitted.lower(*shapes).compile()

    thread = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def waiting(jitted: Callable, shapes: tuple[Any, ...]) -> Callable:
        done = thread.submit(compile, jitted, shapes)

        def call(*args: Any) -> Any:
            wait((done,))
            return jitted(*args)

        return call

    return [waiting(*program) for program in programs]


def largest(config: Config, assembly: Assembly, program: Program, mesh: Mesh) -> tuple[Buffer, ...]:
    """What takes most memory of a device, by name, largest first, counted and not compiled.

    Of buffers as large as each other those of different kinds come first: what is made anew, what
    is trained or frozen, what the optimizer keeps.
    """
    state, frozen, _ = setup.abstract_inputs(config, assembly, program, mesh)
    leaves = {**frozen, **state.trainable}
    kinds = [
        estimate.temporaries(config, assembly, mesh),
        {path: estimate.leaf_bytes(leaf) for path, leaf in leaves.items()},
        _moments(state.opt_state),
    ]
    ranked = []
    for order, sizes in enumerate(kinds):
        descending = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
        seen: dict[int, int] = {}
        for name, size in descending:
            ranked.append((-size, seen.get(size, 0), order, name))
            seen[size] = seen.get(size, 0) + 1
    return tuple(Buffer(-size, name) for size, _, _, name in sorted(ranked)[:8])


def _moments(opt_state: Any) -> dict[str, int]:
    """{"mu of PATH": bytes on one device} of what an optimizer keeps for each trained leaf."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        names = [getattr(key, "name", None) or getattr(key, "key", None) for key in path]
        words = [name for name in names if isinstance(name, str)]
        if len(words) > 1 and leaf.ndim:
            found[f"{words[-2]} of {words[-1]}"] = estimate.leaf_bytes(leaf)
    return found


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_EARLY = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", re.I)
_LATE = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.I)
_ALLOCATION = re.compile(r"Size: ([\d.]+)([KMGT]?)(?:.*?Operator: op_name=\"([^\"]*)\")?", re.S)


def read_out_of_memory(message: str) -> tuple[int, int, tuple[Buffer, ...]]:
    """(needed, available, largest buffers) of XLA's error for TPUs; zeros for another error."""
    match = _EARLY.search(message) or _LATE.search(message)
    if match is None:
        return 0, 0, ()
    needed, available = _size(match[1], match[2]), _size(match[3], match[4])
    buffers = []
    for part in re.split(r"\n\s*\d+\. (?=Size:)", message)[1:]:
        if (found := _ALLOCATION.match(part)) is not None:
            buffers.append(Buffer(_size(found[1], found[2]), found[3] or "a buffer"))
    return needed, available, tuple(sorted(buffers, reverse=True))


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit.upper()])


def own_device(mesh: Mesh) -> Any:
    """One of the mesh's devices that this process may ask."""
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return (own or list(mesh.devices.flat))[0]


def memory_of(device: Any) -> int:
    """Bytes that programs may use on a device; 0 where nobody says so, as on a CPU.

    A TPU's are the compiler's own limit: it is asked for a program that cannot fit.
    """
    if device.platform == "tpu":
        place = SingleDeviceSharding(device)
        huge = jax.ShapeDtypeStruct((1 << 40, 8), jnp.bfloat16, sharding=place)
        try:
            jax.jit(lambda x: x + 1).lower(huge).compile()
        except JaxRuntimeError as error:
            return read_out_of_memory(str(error))[1]
        return 0
    if device.platform == "cpu":
        return 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def resolve_remat(config: Config, assembly: Assembly, mesh: Mesh) -> tuple[Config, Assembly]:
    """model.remat=auto becomes the policy that recomputes least and fits; others come back as is.

    On a CPU nothing is compiled for it: what is kept may take a quarter of the machine's memory.

    Raises:
      OutOfMemory: not even the smallest policy fits.
    """
    if config.model.remat != "auto":
        return config, assembly
    tried: OutOfMemory | None = None
    for candidate in remat_candidates(config, assembly, mesh):
        changed = assemble.with_remat(assembly, candidate.model.remat)
        if mesh.devices.flat[0].platform == "cpu":
            return candidate, changed
        try:
            compiled = compile_step(candidate, changed, setup.program(candidate, changed, 1), mesh)
        except OutOfMemory as error:
            tried = error
            continue
        say(
            f"model.remat=auto is {candidate.model.remat} here: {compiled.total / GIB:.2f} GiB a "
            f"device, compiled in {compiled.seconds_lower + compiled.seconds_compile:.0f} s"
        )
        return candidate, changed
    assert tried is not None, "the last policy is always tried"
    raise tried


def remat_candidates(config: Config, assembly: Assembly, mesh: Mesh) -> Iterator[Config]:
    """What model.remat=auto may be, from the fastest on, without those that cannot fit."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    policies = [policy for policy in REMAT if not (on_cpu and policy == "offload")]
    there = 0 if on_cpu else memory_of(own_device(mesh))
    program = setup.program(config, assembly, steps=1)
    for policy in policies:
        candidate = replaced(config, {"model.remat": policy})
        least = estimate.memory(candidate, assembly, program, mesh)
        available = cpu_share(least.base) if on_cpu else there
        if policy == policies[-1] or least.arguments + least.saved <= (available or math.inf):
            yield candidate


def cpu_share(base: int) -> int:
    """Bytes that training may take of this machine's memory for each of its CPU devices.

    Args:
      base: bytes of the frozen weights of one, which are the same pages where cores are devices.
    """
    usable = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    common = base if cores.count() > 1 else 0
    return common + (usable - common) // jax.local_device_count()
