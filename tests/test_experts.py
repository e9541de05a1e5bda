"""Mixtures of experts beside every expert on every token: values, gradients, meshes, balance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import sharding
from jaxtune.config import MeshConfig
from jaxtune.kernels import experts as module
from jaxtune.kernels.experts import Plan, balance, balance_loss, dropped, grouped, routed

D, F, E, R = 12, 20, 8, 3
MESHES = {
    "fsdp=8": (MeshConfig(fsdp=8), 40),
    "fsdp=4 expert=2": (MeshConfig(fsdp=4, expert=2), 80),
    "fsdp=2 expert=4": (MeshConfig(fsdp=2, expert=4), 80),
    "context=2 fsdp=2 expert=2": (MeshConfig(context=2, fsdp=2, expert=2), 80),
    # 21 tokens do not divide
    "data=2 expert=2 tensor=2": (MeshConfig(data=2, fsdp=1, expert=2, tensor=2), 21),
}


def choices(kind: str, tokens: int) -> np.ndarray:
    """[N, 2] expert numbers, two different ones each."""
    random = np.random.default_rng(0)
    if kind == "one expert":  # and its neighbour, by all tokens
        return np.tile(np.array([[5, 2]], np.int32), (tokens, 1))
    shares = np.ones(E) / E
    if kind == "uneven":  # experts 1 and 6 get no token
        shares = np.array([0.5, 0, 0.2, 0.1, 0.1, 0.05, 0, 0.05])
    return np.stack([random.choice(E, 2, False, shares) for _ in range(tokens)]).astype(np.int32)


def inputs(tokens: int, kind: str = "uneven"):
    """(x, chosen, probs, experts)."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"up": (E, D, F), "down": (E, F, D), "A": (E, D, R), "B": (E, R, F)}
    kernels = {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    probs_NK = jax.nn.softmax(jax.random.normal(keys[4], (tokens, 2)))
    x_ND, chosen_NK = jax.random.normal(keys[5], (tokens, D)), jnp.asarray(choices(kind, tokens))
    return x_ND, chosen_NK, probs_NK, kernels


def forward(experts, shared, x_MD, plan: Plan):
    """Two layers with an adapter on the first."""
    up_MF = grouped(x_MD, experts["up"], plan)
    up_MF += grouped(grouped(x_MD, experts["A"], plan), experts["B"], plan)
    return grouped(jax.nn.silu(up_MF), experts["down"], plan)


def ours(x_ND, chosen_NK, probs_NK, experts):
    return routed(x_ND, chosen_NK, probs_NK, experts, forward)


def plain(x_ND, chosen_NK, probs_NK, experts):
    """Every expert on every token."""
    y_ND = jnp.zeros_like(x_ND)
    for number in range(len(experts["up"])):
        kernel = {name: array[number] for name, array in experts.items()}
        up_NF = x_ND @ (kernel["up"] + kernel["A"] @ kernel["B"])
        share_N = jnp.sum(jnp.where(chosen_NK == number, probs_NK, 0), axis=1)
        y_ND += share_N[:, None] * (jax.nn.silu(up_NF) @ kernel["down"])
    return y_ND


@partial(jax.jit, static_argnums=0)
def values_and_gradients(function, x_ND, chosen_NK, probs_NK, experts):
    """{name: array}: the output and gradients of x, probs and every array of the experts."""
    out, back = jax.vjp(
        lambda x, probs, experts: function(x, chosen_NK, probs, experts), x_ND, probs_NK, experts
    )
    dx, dprobs, dexperts = back(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))
    return {"out": out, "dx": dx, "dprobs": dprobs, **dexperts}


def assert_close(found, expected, tolerance: float = 5e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("even", 300), ("uneven", 300), ("one expert", 300), ("uneven", 5)],  # 5: less than a block
)
def test_values_and_gradients(kind, tokens):
    given = inputs(tokens, kind)
    assert_close(values_and_gradients(ours, *given), values_and_gradients(plain, *given))


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_walks_give_what_ragged_dot_gives(size):
    """The two ways of each product; the walks leave anything in rows behind the groups."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_MI, kernel_EIO = jax.random.normal(keys[0], (400, D)), jax.random.normal(keys[1], (E, D, F))
    dy_MO = jax.random.normal(keys[2], (400, F))

    @jax.jit
    def both_ways(sizes_E):
        inside = (jnp.arange(400) < sizes_E.sum())[:, None]
        walks, raggeds = [], []
        for transposed, given in [(False, x_MI), (True, dy_MO)]:
            found = module._walk(given, kernel_EIO, sizes_E, transposed=transposed, size=size)
            walks.append(jnp.where(inside, found, 0))
            expected = module._ragged(given, kernel_EIO, sizes_E, transposed=transposed)
            raggeds.append(jnp.where(inside, expected, 0))
        walks.append(module._walk_kernel(x_MI, dy_MO, sizes_E, size=size))
        return walks, [*raggeds, module._ragged_kernel(x_MI, dy_MO, sizes_E)]

    for sizes in [[3, 0, 130, 64, 0, 1, 0, 2], [0] * 8, [0] * 7 + [400], [50] * 8]:
        for found, expected in zip(*both_ways(jnp.array(sizes, jnp.int32)), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("mesh", "tokens"), MESHES.values(), ids=MESHES)
def test_sharded(mesh, tokens):
    given = inputs(tokens)
    expected = values_and_gradients(plain, *given)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(values_and_gradients(ours, *given), expected)


def test_experts_that_the_mesh_does_not_divide():
    x_ND, chosen_NK, probs_NK, experts = inputs(16)
    given = (x_ND, chosen_NK % 6, probs_NK, {name: array[:6] for name, array in experts.items()})
    expected = plain(*given)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, expert=4))):
        np.testing.assert_allclose(jax.jit(ours)(*given), expected, atol=5e-5)


def test_experts_stay_where_they_are():
    """Placed as `sharding` places them, no device ever holds the kernels of all."""
    x_ND, chosen_NK, probs_NK, experts = inputs(80)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=4))
    spec = sharding.spec(("experts", "embed", "mlp"), experts["up"].shape, mesh)
    assert spec == P("expert", "fsdp", None)
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(a, NamedSharding(mesh, P("expert"))) for name, a in experts.items()
        }
        placed["up"] = jax.device_put(experts["up"], NamedSharding(mesh, spec))
        program = jax.jit(ours).lower(x_ND, chosen_NK, probs_NK, placed).compile().as_text()
    assert program is not None
    assert f"f32[{E // 4},{D},{F}]" in program
    assert f"f32[{E},{D},{F}]" not in program


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), MeshConfig(fsdp=4, expert=2)])
def test_scanned_and_checkpointed_layers(mesh):
    x_ND, chosen_NK, probs_NK, experts = inputs(40)
    stack = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), experts)

    def scanned(x_ND, stack):
        @jax.checkpoint
        def layer(x_ND, experts):
            return x_ND + ours(x_ND, chosen_NK, probs_NK, experts), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x_ND, stack)[0]))

    def one_by_one(x_ND, stack):
        for number in range(2):
            layer = jax.tree.map(lambda a, n=number: a[n], stack)
            x_ND = x_ND + plain(x_ND, chosen_NK, probs_NK, layer)
        return jnp.sum(jnp.sin(x_ND))

    expected = jax.jit(jax.grad(one_by_one, (0, 1)))(x_ND, stack)
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.expert])):
        found = jax.jit(jax.grad(scanned, (0, 1)))(x_ND, stack)
    assert_close({"dx": found[0], **found[1]}, {"dx": expected[0], **expected[1]}, 2e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1), MeshConfig(fsdp=4, expert=2)])
def test_frozen_kernels_cost_no_gradient(mesh):
    x_ND, chosen_NK, probs_NK, experts = inputs(40)

    def gradients_of_kernels(trained: set[str]) -> int:
        """How many sums over rows the scanned and checkpointed program has."""
        stacks = jax.tree.map(lambda a: a[None], experts)
        frozen = {name: a for name, a in stacks.items() if name not in trained}

        def loss(x_ND, trained):
            @jax.checkpoint
            def layer(x_ND, scanned):
                return x_ND + ours(x_ND, chosen_NK, probs_NK, {**scanned[0], **scanned[1]}), None

            return jax.lax.scan(layer, x_ND, (frozen, trained))[0].sum()

        trained_stacks = {name: stacks[name] for name in trained}
        program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x_ND, trained_stacks))
        # The ragged sum is one branch of the platforms, found by what it contracts.
        return program.count("dot_dimension_numbers=(((0,), (0,)), ((), ()))")

    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.expert])):
        assert gradients_of_kernels(set()) == 0
        assert gradients_of_kernels({"A", "B"}) == 2
        assert gradients_of_kernels({"A", "B", "up", "down"}) == 4


def test_a_number_that_is_no_expert_adds_nothing():
    """Padding may be sent nowhere; what it holds reaches nobody, and nobody's result changes."""
    x_ND, chosen_NK, probs_NK, experts = inputs(100)
    padding = (np.arange(100) % 3 == 0)[:, None]
    nowhere = np.where(padding, E, chosen_NK)
    run = jax.jit(ours)
    found = run(jnp.where(padding, jnp.nan, x_ND), nowhere, probs_NK, experts)
    expected = jnp.where(padding, 0, run(x_ND, chosen_NK, probs_NK, experts))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bfloat16_stays_near_float32():
    x_ND, chosen_NK, probs_NK, experts = inputs(100)
    small = {name: array.astype(jnp.bfloat16) for name, array in experts.items()}
    small |= {name: experts[name] for name in ("A", "B")}  # adapters are float32
    found = values_and_gradients(ours, x_ND.astype(jnp.bfloat16), chosen_NK, probs_NK, small)
    assert found["out"].dtype == found["dx"].dtype == found["up"].dtype == jnp.bfloat16
    assert found["A"].dtype == found["dprobs"].dtype == jnp.float32
    expected = values_and_gradients(plain, x_ND, chosen_NK, probs_NK, experts)
    for name, value in expected.items():
        error = jnp.linalg.norm(found[name].astype(jnp.float32) - value) / jnp.linalg.norm(value)
        assert error < 0.02, name


def test_dropout_is_the_same_on_every_mesh():
    x_ND, chosen_NK, probs_NK, experts = inputs(80)

    def lossy(experts, shared, x_MD, plan):
        rate, key = shared
        return forward(experts, None, dropped(x_MD, plan, rate, key), plan)

    @jax.jit
    def run(rate, key):
        return routed(x_ND, chosen_NK, probs_NK, experts, lossy, (rate, key))

    rate, key = jnp.float32(0.4), jax.random.key(3)
    expected = run(rate, key)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        np.testing.assert_allclose(run(rate, key), expected, atol=1e-5)
    assert np.abs(np.asarray(run(rate, jax.random.key(4)) - expected)).max() > 0.01
    number_NK = jnp.arange(160).reshape(80, 2)
    plan = module.dispatch(chosen_NK, number_NK, E)
    kept_MI = dropped(jnp.ones((160, 500)), plan, rate, key)
    assert float(jnp.mean(kept_MI == 0)) == pytest.approx(0.4, abs=0.01)
    assert float(kept_MI.mean()) == pytest.approx(1.0, abs=0.01)


def test_balance_of_an_even_router_is_the_number_of_choices():
    probs_NE, mask_N = jnp.full((E, E), 1 / E), jnp.ones(E)
    chosen_NK = (jnp.arange(E)[:, None] + jnp.arange(3)) % E
    assert float(balance_loss(balance(probs_NE, chosen_NK, mask_N))) == pytest.approx(3.0)
    ignored = balance(probs_NE, chosen_NK, mask_N.at[2:].set(0))
    assert ignored.counts_E.tolist() == [1, 2, 2, 1, 0, 0, 0, 0]
    assert float(ignored.tokens) == 2
    assert float(balance_loss(balance(probs_NE, chosen_NK, 0 * mask_N))) == 0
