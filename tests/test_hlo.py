"""The counter of HLO against programs of products whose cost is known."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.plan import hlo, hlo_text, topologies

# What is compiled for TPUs that are not here cannot be read back from jax's cache.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

N, D, L = 64, 128, 6
ONE = 2 * N * D * D  # a product [N, D] @ [D, D]


def _layers(x_ND, w_LDD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_ND, w_LDD)[0]


def _nested(x_ND, w_LDD):
    def outer(x, _):
        return _layers(x, w_LDD), None

    return jax.lax.scan(outer, x_ND, None, length=3)[0]


def _gradient(layer):
    """d sum / d x, by which each layer costs a product forward and one backward."""

    def total(x_ND, w_LDD):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x_ND, w_LDD)[0].sum()

    return jax.grad(total)


def _tanh(x, w):
    return jnp.tanh(jnp.sin(x) @ w)


def _batched(x_ND, w_LDD):
    x_LND = jnp.broadcast_to(x_ND, (L, N, D)) * jnp.arange(L, dtype=x_ND.dtype)[:, None, None]
    return jnp.einsum("lnd,lde->lne", x_LND, w_LDD)


PROGRAMS = {
    "one product": (lambda x, w: x @ w[0], ONE),
    "batched": (_batched, L * ONE),
    "scan": (_layers, L * ONE),
    "nested scan": (_nested, 3 * L * ONE),
    "gradient": (_gradient(_tanh), 2 * L * ONE),
    # Full remat: forward, forward again, backward. The last product's output is not needed again,
    # but tanh's derivative needs it, so that all three are there.
    "remat": (_gradient(jax.checkpoint(_tanh)), 3 * L * ONE),
}


def _text(program, place, dtype=jnp.float32) -> str:
    shapes = [jax.ShapeDtypeStruct(s, dtype, sharding=place) for s in ((N, D), (L, D, D))]
    return jax.jit(program).lower(*shapes).compile().as_text() or ""


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_a_cpu_program(name):
    program, flops = PROGRAMS[name]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert hlo.count(_text(program, place)).flops == flops


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_a_tpu_program(name):
    """There dots are convolutions inside fusions, and loops do not say how often they run."""
    program, flops = PROGRAMS[name]
    place = jax.sharding.SingleDeviceSharding(tpu("v5litepod-4")[0])
    counts = hlo.count(_text(program, place, jnp.bfloat16))
    assert (counts.flops, counts.unknown) == (flops, {})


def tpu(name: str) -> list:
    if os.environ.get("JAX_PLATFORMS") == "tpu":
        pytest.skip("this host has a TPU of its own")
    return topologies.devices(topologies.find(name))


def test_a_loop_that_depends_on_data_counts_as_often_as_it_is_said_to():
    def walk(x_ND, w_LDD):
        with jax.named_scope("walk"):
            times = jnp.sum(x_ND[:, 0] > 0)
            return jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(x @ w_LDD[0]), x_ND)

    for place in (tpu("v5litepod-4")[0], jax.devices()[0]):
        text = _text(walk, jax.sharding.SingleDeviceSharding(place))
        assert hlo.count(text, trips={"walk": 5}).flops == 5 * ONE
        unsaid = hlo.count(text)
        assert unsaid.flops == ONE
        assert [*unsaid.unknown.values()] == [1]


def test_scopes_are_kept_apart():
    def program(x_ND, w_LDD):
        with jax.named_scope("hidden"):
            x_ND = jnp.tanh(x_ND @ w_LDD[0])
        return jnp.tanh(x_ND @ w_LDD[1]) @ w_LDD[2]

    text = _text(program, jax.sharding.SingleDeviceSharding(tpu("v5litepod-4")[0]), jnp.bfloat16)
    counts = hlo.count(text, apart=("hidden",))
    assert (counts.flops, counts.apart) == (2 * ONE, ONE)


def test_the_dearer_branch_counts():
    def program(x_ND, w_LDD):
        return jax.lax.cond(
            x_ND[0, 0] > 0, lambda x: _layers(x, w_LDD), lambda x: jnp.tanh(x @ w_LDD[0]), x_ND
        )

    text = _text(program, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert hlo.count(text).flops == L * ONE


def _sharded(devices, local, rows: int, outputs) -> str:
    """A program on [count * rows, D] bf16, cut over all of these devices."""
    mesh = Mesh(np.asarray(devices), ("d",))
    cut, whole = P("d", None), P(None, None)
    program = jax.shard_map(local, mesh=mesh, in_specs=(cut, whole), out_specs=outputs)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((len(devices) * rows, D), cut), ((D, D), whole))
    ]
    return jax.jit(program).lower(*shapes).compile().as_text() or ""


@pytest.mark.parametrize("topology", ["v5litepod-4", "tpu7x-8"])
def test_bytes_that_a_device_sends(topology):
    """By hand, inside a loop of three; a tpu7x leaves collectives to its sparse cores."""
    devices = tpu(topology)
    count, rows, loops = len(devices), 4096, 3

    def local(x_ND, w_DD):
        def body(x_ND, _):
            gathered = jax.lax.all_gather(x_ND, "d", tiled=True)  # [count * rows, D]
            kept = jax.lax.psum_scatter(jnp.tanh(gathered @ w_DD), "d", tiled=True)
            summed = jax.lax.psum(jnp.tanh(kept), "d")
            ring = [(i, (i + 1) % count) for i in range(count)]
            return jax.lax.ppermute(jnp.sin(summed), "d", ring), None

        return jax.lax.scan(body, x_ND, None, length=loops)[0]

    counts = hlo.count(_sharded(devices, local, rows, P("d", None)), devices=count)
    shard = rows * D * 2 * loops
    assert counts.flops == loops * count * rows * D * D * 2
    assert counts.ici == {
        "all-gather": shard * (count - 1),
        "reduce-scatter": shard * (count - 1),
        "all-reduce": 2 * shard * (count - 1) / count,
        "collective-permute": shard,
    }


def test_what_passes_between_slices_is_kept_apart():
    """Summed inside a slice first: each of its devices then sends its part to the other slice."""
    devices = tpu("2xv5litepod-4")
    count, rows = len(devices), 4096
    text = _sharded(devices, lambda x, w: jax.lax.psum(jnp.tanh(x), "d"), rows, P(None, None))
    counts = hlo.count(text, slices=2, devices=count)
    whole, inside = rows * D * 2, count // 2
    assert counts.dcn == {"all-reduce": whole / inside}
    own = whole * (inside - 1) / inside
    assert counts.ici == {"reduce-scatter": own, "all-gather": own}


def test_a_stack_that_is_scanned_is_read_once():
    """Each turn of the loop reads its own slice of the stack, not all of it."""
    width, layers = 2048, 8

    def program(x_ND, w_LDD):
        return _layers(x_ND, w_LDD)

    place = jax.sharding.SingleDeviceSharding(tpu("v5litepod-4")[0])
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place)
        for s in ((N, width), (layers, width, width))
    ]
    counts = hlo.count(jax.jit(program).lower(*shapes).compile().as_text() or "")
    stack = layers * width * width * 2
    assert stack <= counts.hbm < 1.2 * stack


GROUPS = {
    "replica_groups={{0,2},{1,3}}, use": [0, 2],
    "replica_groups=[2,4]<=[8], use": [0, 1, 2, 3],
    "replica_groups=[4,2]<=[2,4]T(1,0), use": [0, 4],
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, use": [0, 4],
    "replica_groups=mesh['a'=8,'b'=1] {'a','b'}, use": [0, 1, 2, 3, 4, 5, 6, 7],
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, use": [0, 1],
    "replica_groups={}, use": [0, 1, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("printed", GROUPS)
def test_groups_as_xla_prints_them(printed):
    assert hlo_text.replica_group(printed, 8) == GROUPS[printed]


CONVOLUTIONS = {  # attributes, shapes of input, kernel and result: products by hand, times two
    # Every place sees both taps.
    ("window={size=2}, dim_labels=b0f_0io->b0f", (3, 5, 4), (2, 4, 6), (3, 4, 6)): 3
    * 4
    * 6
    * 4
    * 2,
    # Padding: of 4 x 3 pairs the first and the last fall outside.
    ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (2, 4, 3), (3, 3, 5), (2, 4, 5)): (
        2 * 5 * 3 * (4 * 3 - 2)
    ),
    # A stride of two.
    ("window={size=1 stride=2}, dim_labels=b0f_0io->b0f", (1, 6, 2), (1, 2, 2), (1, 3, 2)): 3 * 4,
}


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case[0].split("}")[0])
def test_only_products_inside_the_input_count(case):
    attributes, *shapes = case
    left, kernel, result = ("f32[" + ",".join(map(str, s)) + "]{2,1,0}" for s in shapes)
    text = (
        "ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {\n"
        f"  %a = {left} parameter(0)\n"
        f"  %b = {kernel} parameter(1)\n"
        f"  ROOT %c = {result} convolution(%a, %b), {attributes}\n"
        "}\n"
    )
    assert hlo.count(text).flops == 2 * CONVOLUTIONS[case]


def test_a_layout_says_where_an_array_lives():
    shape = "(bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0:T(128)}, s4[6]{0}, pred[])"
    found = hlo_text.leaves(shape)
    assert [leaf.bytes for leaf in found] == [32, 16, 3, 1]
    assert [leaf.in_hbm for leaf in found] == [False, True, True, True]
    assert np.isclose(hlo_text.size_of(shape), 52)
