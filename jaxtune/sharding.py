"""Where arrays live: a mesh from the config, and one table from logical axes to mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.config import MeshConfig
from jaxtune.errors import ConfigError

BATCH = ("data", "fsdp", "expert")  # mesh axes that share out the rows of a batch

# The vocabulary and every matrix are cut over fsdp; heads and mlp over tensor as well.
_LOGICAL = {
    "vocab": "fsdp",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, expert, tensor; one may be -1 and takes the remaining devices."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in (*BATCH, "tensor")}
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
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> P:
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


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins the first axis of an activation to the batch axes of the current mesh, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH, *[None] * (x.ndim - 1)))
