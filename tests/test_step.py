"""The step: what it trains, how it averages, what it skips, and that it compiles once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import aot, assemble, config, setup, sharding, step, tree
from jaxtune.data.packing import Batch
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.stacks import REMAT
from tests import tiny

ROWS, WIDTH = 8, 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("base"))


def settings(base, **changes) -> config.Config:
    values = config.Config().to_dict()
    values["model"] |= {"path": str(base), "dtype": "float32", "param_dtype": "float32"}
    values["lora"] |= {"r": 2, "alpha": 4.0}
    values["optim"] |= {"lr": 1e-2, "warmup": 0}
    values["train"]["batch_size"] = ROWS
    for key, value in changes.items():
        group, name = key.split("__")
        values[group][name] = value
    return config.freeze(values)


def start(base, devices: int = 1, **changes):
    """(program, state, frozen, mesh) of a run on the first `devices` devices."""
    wanted = settings(base, **changes)
    mesh = sharding.make_mesh(wanted.mesh, jax.devices()[:devices])
    assembly = assemble.assemble(wanted, base, mesh)
    program = setup.program(wanted, assembly, 10)
    return program, *setup.initial(wanted, assembly, program, mesh), mesh


def batch(seed: int = 0, uneven: bool = True) -> Batch:
    """Random rows whose loss weights differ in number from row to row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (ROWS, WIDTH)).astype(np.int32)
    keep = rng.integers(1, WIDTH, ROWS) if uneven else np.full(ROWS, WIDTH)
    positions = np.tile(np.arange(WIDTH, dtype=np.int32), (ROWS, 1))
    weights = (positions < keep[:, None]).astype(np.float32)
    targets = np.roll(tokens, -1, axis=1)
    return Batch(tokens, targets, weights, positions, np.ones_like(tokens))


def run(started, batches, train=None):
    """(losses, final state)"""
    program, state, frozen, mesh = started
    train = train or step.jit_train(program, state)
    losses = []
    with jax.set_mesh(mesh):
        for one in setup.to_mesh(batches, mesh):
            state, measured = train(state, frozen, one)
            losses.append(float(measured.loss.total / measured.loss.weight))
    return losses, state


def test_learns_and_compiles_once(base):
    started = start(base)
    train = step.jit_train(*started[:2])
    losses, state = run(started, [batch()] * 6, train)
    assert losses[-1] < losses[0] - 0.1
    assert int(state.step) == 6
    assert train._cache_size() == 1


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("resumes", [False, True])
def test_a_call_finds_what_the_thread_compiled(base, devices, resumes):
    """The shapes and places it was compiled for are those that the run then has."""
    wanted = settings(base)
    mesh = sharding.make_mesh(wanted.mesh, jax.devices()[:devices])
    assembly = assemble.assemble(wanted, base, mesh)
    program = setup.program(wanted, assembly, 10)
    widths = (WIDTH, WIDTH)
    train, evaluate = aot.steps(wanted, assembly, program, mesh, widths, resumes=resumes)
    state, frozen = setup.initial(wanted, assembly, program, mesh)
    (one,) = setup.to_mesh([batch()], mesh)
    compiled = []

    def note(event: str, duration_secs: float, **kwargs) -> None:
        if "compile" in event and threading.current_thread() is threading.main_thread():
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        with jax.set_mesh(mesh):
            before = evaluate(state.trainable, frozen, one)
            state, measured = train(state, frozen, one)
            jax.block_until_ready(state)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []
    assert float(before.total) == pytest.approx(float(measured.loss.total), rel=1e-5)


def test_what_cannot_be_compiled_ahead_is_said_by_the_call(base):
    def wrong(x):
        raise ValueError("no such program")

    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    (call,) = aot.ahead(mesh, (jax.jit(wrong), (jax.ShapeDtypeStruct((2,), jnp.float32),)))
    with pytest.raises(ValueError, match="no such program"):
        call(jnp.zeros(2))


def test_first_loss_is_the_bases_own(base):
    from jaxtune.hf.load import load_model

    one = batch()
    logp = jax.nn.log_softmax(load_model(str(base))(one.tokens))
    nll = -np.take_along_axis(np.asarray(logp), one.targets[..., None], axis=-1)[..., 0]
    wanted = (nll * one.weights).sum() / one.weights.sum()
    assert run(start(base), [one])[0][0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"lora__r": 0}])
def test_accumulating_equals_one_batch(base, changes):
    batches = [batch(i) for i in range(3)]
    whole, state = run(start(base, **changes), batches)
    parts, accumulated = run(start(base, train__grad_accum=4, **changes), batches)
    np.testing.assert_allclose(parts, whole, rtol=2e-6)
    for path, leaf in state.trainable.items():
        np.testing.assert_allclose(accumulated.trainable[path], leaf, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("remat", sorted({*REMAT} - {"full"}))
def test_remat_changes_no_number(base, remat):
    batches = [batch(i) for i in range(3)]
    np.testing.assert_allclose(
        run(start(base, model__remat=remat), batches)[0], run(start(base), batches)[0], rtol=1e-6
    )


def test_each_policy_keeps_less_than_the_one_before():
    sizes = DecoderConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_layers=8,
        num_heads=4, num_kv_heads=4, head_dim=16, max_position=512,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)

    def temporaries(remat: str) -> int:
        model = nnx.eval_shape(lambda: Decoder(sizes, rngs=nnx.Rngs(0), remat=remat))
        graphdef, params = tree.split(model)

        def loss(params, tokens_BT):
            return tree.merge(graphdef, params).hidden(tokens_BT).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    order = ["none", "projections", "attention", "full"]
    found = [temporaries(remat) for remat in order]
    assert found == sorted({*found}, reverse=True)


@pytest.mark.parametrize(
    "mesh", [{}, {"mesh__data": 2}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}]
)
def test_eight_devices_equal_one(base, mesh):
    batches = [batch(i) for i in range(3)]
    one, eight = run(start(base), batches)[0], run(start(base, devices=8, **mesh), batches)[0]
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_frozen_layers_get_no_gradient_and_adapters_start_at_zero(base):
    program, state, frozen, mesh = start(
        base, lora__target_modules=("q_proj",), lora__layers_to_transform=(2,)
    )
    module = "layers.2-2.self_attn.q_proj.lora"
    assert state.trainable.keys() == {f"{module}.A", f"{module}.B"}
    before = jax.device_get(state.trainable)
    _, after = run((program, state, frozen, mesh), [batch()])
    assert (np.asarray(before[f"{module}.B"]) == 0).all()
    assert np.abs(after.trainable[f"{module}.B"]).max() > 0


def test_freezing_by_rule_in_a_full_run(base):
    rules = ((r"^layers\.[01]\.|^embed_tokens", "freeze"),)
    started = start(base, lora__r=0, optim__rules=rules)
    assert {path.split(".")[1] for path in started[1].trainable if path.startswith("layers")} == {
        "2-2"
    }
    assert "embed_tokens.embedding" in started[2]
    losses, _ = run(started, [batch()] * 4)
    assert losses[-1] < losses[0]


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(base):
    program, state, frozen, mesh = start(base)
    bad = batch()._replace(weights=np.full((ROWS, WIDTH), np.nan, np.float32))
    before = jax.device_get((state.trainable, state.opt_state))
    train = step.jit_train(program, state)
    with jax.set_mesh(mesh):
        after, measured = train(state, frozen, next(setup.to_mesh([bad], mesh)))
    assert not measured.finite
    assert int(after.step) == 1
    same = jax.tree.map(np.array_equal, before, jax.device_get((after.trainable, after.opt_state)))
    assert jax.tree.all(same)


def test_a_batch_without_loss_tokens_is_harmless(base):
    losses, state = run(
        start(base), [batch()._replace(weights=np.zeros((ROWS, WIDTH), np.float32))]
    )
    assert np.isnan(losses[0])  # nothing over nothing, and nobody divided by it
    assert all(np.isfinite(leaf).all() for leaf in state.trainable.values())


def test_dropout_depends_on_step_and_seed_only_and_is_off_in_evaluation(base):
    batches = [batch()] * 3
    once = run(start(base, lora__dropout=0.5), batches)[0]
    assert run(start(base, lora__dropout=0.5), batches)[0] == once
    assert run(start(base, lora__dropout=0.5, train__seed=1), batches)[0] != once
    program, state, frozen, mesh = start(base, lora__dropout=0.5)
    evaluate = step.jit_eval(program)
    one = next(setup.to_mesh([batch()], mesh))
    with jax.set_mesh(mesh):
        assert float(evaluate(state.trainable, frozen, one).total) == float(
            evaluate(state.trainable, frozen, one).total
        )


def test_the_optimizer_holds_moments_of_trained_leaves_only(base):
    _, state, frozen, _ = start(base)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if jnp.ndim(leaf) > 0}
    assert shapes <= {leaf.shape for leaf in state.trainable.values()}
    assert not any(path.endswith((".lora.A", ".lora.B")) for path in frozen)
