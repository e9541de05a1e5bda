"""Where arrays live: a mesh from the config, and one table from logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import cores
from jaxtune.config import MeshConfig
from jaxtune.errors import ConfigError

TRIAL = "trial"  # cuts the population of a sweep; a plain batch as well, though nobody asks for it
BATCH = (TRIAL, "slices", "data", "fsdp", "expert")  # axes that share out the rows of a batch
CONTEXT = "context"  # the one that shares out the tokens of a row
AXES = ("slices", TRIAL, "data", "fsdp", "expert", CONTEXT, "tensor")
TOKENS = P(BATCH, CONTEXT)  # of arrays [B, T]

# The vocabulary and every matrix are cut over fsdp; heads and mlp over tensor as well.
_LOGICAL = {
    "vocab": "fsdp",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the axes AXES; one may be -1 and takes the remaining devices.

    Where the cores are the devices, they are copies unless the config says otherwise.
    Neighbours on a TPU's torus are neighbours in the mesh; slices are joined by the slower network.

    Raises:
      ConfigError: sizes that do not fill the devices.
    """
    if devices is None and cores.count() > 1 and config == MeshConfig():
        config = dataclasses.replace(config, data=-1, fsdp=1)
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in AXES}
    found = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform == "tpu" and sizes["slices"] not in (0, found):
        raise ConfigError(
            f"mesh.slices is {sizes['slices']} and the hardware has {found}",
            fix=f"mesh.slices=0, which takes what there is, or mesh.data={sizes['slices']}",
        )
    sizes["slices"] = sizes["slices"] or found
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and known > 0:
        sizes[free[0]] = len(devices) // known
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        asked = ", ".join(f"mesh.{name}={getattr(config, name)}" for name in sizes)
        raise ConfigError(
            f"{asked} does not fill {len(devices)} devices",
            fix="sizes whose product is the number of devices, at most one of them -1",
        )
    # Explicit is the default since jax 0.10 and refuses the propagation this code relies on.
    grid = _arrange(devices, tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the shape of a mesh whose first axis are the slices."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    by_slice = sorted(devices, key=lambda d: getattr(d, "slice_index", 0))
    parts = np.asarray(by_slice).reshape(shape[0], -1)
    inner = [
        mesh_utils.create_device_mesh(shape[1:], list(part), allow_split_physical_axes=True)
        for part in parts
    ]
    return np.stack(inner)


def platform() -> str:
    """Where the program being traced will run: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of its devices, such as "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Logical axes -> PartitionSpec; a mesh axis is used once, and only on a dim it divides."""
    taken: set[str] = set()
    result: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = _LOGICAL.get(name or "")
        if axis is None or axis in taken or mesh.shape[axis] == 1 or size % mesh.shape[axis]:
            result.append(None)
        else:
            taken.add(axis)
            result.append(axis)
    return P(*result)


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, Sequence[str | None]], mesh: Mesh
) -> dict[str, NamedSharding]:
    """{path: sharding} from the axes declared beside each parameter."""
    return {k: NamedSharding(mesh, spec(axes[k], v.shape, mesh)) for k, v in shapes.items()}


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a batch [B, T] that this process's devices want a part of, ascending.

    Processes that share rows (a tensor or context axis spans them) get the same numbers.
    """
    places = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_size,))
    wanted = {range(*index[0].indices(batch_size)) for index in places.values() if index}
    return np.asarray(sorted({row for rows in wanted for row in rows}), np.int64)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins an activation [B, T, ...] to the batch and context axes of the current mesh, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*TOKENS, *[None] * (x.ndim - 2)))


def gathered(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins one layer's part of a parameter: whole along fsdp, so that it travels as it is kept.

    Without this the partitioner may make of it what a product wants, and send that instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return x
    kept = [None if _LOGICAL.get(name or "") == "fsdp" else name for name in axes]
    return jax.lax.with_sharding_constraint(x, spec(kept, x.shape, mesh))
