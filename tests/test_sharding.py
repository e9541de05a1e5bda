"""The mesh of a config, and what of each array stands where."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.errors import ConfigError


def test_one_axis_takes_the_devices_that_remain():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {
        "data": 1,
        "fsdp": 8,
        "expert": 1,
        "tensor": 1,
    }
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, expert=-1, tensor=2))
    assert tuple(mesh.shape.values()) == (2, 1, 2, 2)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(expert=3), MeshConfig(fsdp=2, expert=2), MeshConfig(fsdp=-1, expert=-1)],
)
def test_sizes_that_do_not_fill_the_devices(mesh):
    named = f"mesh.data=1, mesh.fsdp={mesh.fsdp}, mesh.expert={mesh.expert}, mesh.tensor=1"
    with pytest.raises(ConfigError, match=f"{named} does not fill 8 devices"):
        sharding.make_mesh(mesh)


def test_experts_are_cut_over_their_own_axis():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    axes = ("layers", "experts", "embed", "mlp")
    assert sharding.spec(axes, (3, 8, 4, 6), mesh) == P(None, "expert", "fsdp", "tensor")
    assert sharding.spec(axes, (3, 7, 4, 5), mesh) == P(None, None, "fsdp", None)  # 7 experts


def test_rows_are_shared_out_over_all_but_the_tensor_axis():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        x = jax.jit(sharding.constrain_batch)(jax.numpy.ones((8, 3)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
