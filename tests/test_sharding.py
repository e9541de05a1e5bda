"""The mesh of a config, and what of each array stands where."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.errors import ConfigError


def test_one_axis_takes_the_devices_that_remain():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {
        "slices": 1,
        "trial": 1,
        "data": 1,
        "fsdp": 8,
        "expert": 1,
        "context": 1,
        "tensor": 1,
    }
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, expert=-1, tensor=2))
    assert tuple(mesh.shape.values()) == (1, 1, 2, 1, 2, 1, 2)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(expert=3), MeshConfig(fsdp=2, expert=2), MeshConfig(fsdp=-1, expert=-1)],
)
def test_sizes_that_do_not_fill_the_devices(mesh):
    named = f"mesh.data=1, mesh.fsdp={mesh.fsdp}, mesh.expert={mesh.expert}, mesh.context=1, mesh"
    with pytest.raises(ConfigError, match=rf"{named}\.tensor=1 does not fill 8 devices"):
        sharding.make_mesh(mesh)


def test_experts_are_cut_over_their_own_axis():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    axes = ("layers", "experts", "embed", "mlp")
    assert sharding.spec(axes, (3, 8, 4, 6), mesh) == P(None, "expert", "fsdp", "tensor")
    assert sharding.spec(axes, (3, 7, 4, 5), mesh) == P(None, None, "fsdp", None)  # 7 experts


@pytest.mark.parametrize(
    ("mesh", "shard"),
    [
        (MeshConfig(fsdp=2, expert=2, tensor=2), (2, 6, 3)),
        (MeshConfig(fsdp=2, context=2, tensor=2), (4, 3, 3)),
        (MeshConfig(slices=2, data=2, fsdp=2), (1, 6, 3)),
    ],
)
def test_rows_and_their_tokens_are_shared_out_over_all_but_the_tensor_axis(mesh, shard):
    with jax.set_mesh(sharding.make_mesh(mesh)):
        x = jax.jit(sharding.constrain_batch)(jax.numpy.ones((8, 6, 3)))
    assert {part.data.shape for part in x.addressable_shards} == {shard}


def test_slices_are_the_outermost_axis():
    class Chip:
        platform = "other"

        def __init__(self, slice_index: int):
            self.slice_index = slice_index

    chips = [Chip(0), Chip(0), Chip(1), Chip(1)]
    mesh = sharding.make_mesh(MeshConfig(), chips)
    assert (mesh.shape["slices"], mesh.shape["fsdp"]) == (2, 2)
    assert [chip.slice_index for chip in mesh.devices.ravel()] == [0, 0, 1, 1]


def test_the_platform_is_that_of_the_mesh():
    assert sharding.platform() == "cpu"
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        assert jax.jit(lambda: sharding.platform() == "cpu")()


def test_slices_that_the_hardware_does_not_have_are_refused():
    class Chip:
        platform, slice_index = "tpu", 0

    with pytest.raises(ConfigError, match=r"mesh\.slices is 2 and the hardware has 1"):
        sharding.make_mesh(MeshConfig(slices=2), [Chip()] * 4)
