"""Which projections get an adapter, and what inserting one does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import assemble, config, lora, setup, sharding, tree
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.hf.load import load_model
from jaxtune.lora import Spec
from jaxtune.models.adapter import Adapter, column_lengths, low_rank
from jaxtune.models.blocks import Experts
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.layers import Dropout, Linear
from tests import tiny

MODULES = {
    f"layers.{i}.{m}": f"model.layers.{i}.{m}"
    for i in range(3)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
}
MIXTURE = {
    f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}"
    for i in range(2)
    for ours, theirs in {
        "self_attn.q_proj": "self_attn.q_proj",
        "mlp.experts.up_proj": "mlp.experts.0.up_proj",
        "mlp.experts.down_proj": "mlp.experts.0.down_proj",
    }.items()
}
ROBERTA = {
    "layers.0.self_attn.q_proj": "roberta.encoder.layer.0.attention.self.query",
    "layers.0.self_attn.o_proj": "roberta.encoder.layer.0.attention.output.dense",
    "head.dense": "classifier.dense",
    "classifier": "classifier.out_proj",
}
BERT = {
    "layers.0.self_attn.o_proj": "bert.encoder.layer.0.attention.output.dense",
    "head.dense": "bert.pooler.dense",
    "classifier": "classifier",
}
CONFIG = DecoderConfig(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, num_kv_heads=1,
    head_dim=6, max_position=16,
)  # fmt: skip


def pick(**changes) -> list[str]:
    return sorted(lora.targets(LoraConfig(**changes), MODULES))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, sorted(MODULES)),
        ({"r": 0}, []),
        (
            {"target_modules": ("q_proj",)},
            [f"layers.{i}.self_attn.q_proj" for i in range(3)],
        ),
        (
            {"target_modules": "q_proj,mlp.up_proj", "layers_to_transform": (1,)},
            ["layers.1.mlp.up_proj", "layers.1.self_attn.q_proj"],
        ),
        ({"target_modules": ("layers.2.mlp.up_proj",)}, ["layers.2.mlp.up_proj"]),
        (
            {"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"},
            [f"layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"],
        ),
        (
            {"modules_to_save": ("up_proj", "v_proj")},
            [f"layers.{i}.self_attn.q_proj" for i in range(3)],
        ),
    ],
)
def test_targets_as_peft_means_them(changes, expected):
    assert pick(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ("k_proj",)}, "matches nothing: k_proj"),
        ({"target_modules": ("q_proj", "kproj")}, "matches nothing: kproj"),
        ({"target_modules": ("proj",)}, "of q_proj, up_proj, v_proj in layers 0 to 2"),
        ({"target_modules": r"layers\..*"}, "matches nothing"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"layers_to_transform": (7,)}, "names layers [7]"),
        ({"layers_to_transform": (0, 3)}, "names layers [3]; try: layers 0 to 2"),
        ({"target_modules": ".*", "layers_to_transform": (0,)}, "not with a regular expression"),
        ({"modules_to_save": ("q_proj", "v_proj", "up_proj")}, "matches nothing"),
    ],
)
def test_targets_that_match_nothing_name_what_there_is(changes, said):
    with pytest.raises(ConfigError) as caught:
        pick(**changes)
    assert said in caught.value.line()


@pytest.mark.parametrize(
    ("modules", "changes", "expected"),
    [
        (MIXTURE, {}, ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (
            MIXTURE,
            {"target_modules": ("experts.up_proj",), "layers_to_transform": (1,)},
            ["layers.1.mlp.experts.up_proj"],
        ),
        (
            MIXTURE,
            {"target_modules": r".*\.0\.mlp\.experts\.\w+"},
            ["layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.up_proj"],
        ),
        # What is in a classifier's head is trained in full, whatever the names say.
        (ROBERTA, {}, ["layers.0.self_attn.o_proj", "layers.0.self_attn.q_proj"]),
        (ROBERTA, {"target_modules": ("dense",)}, ["layers.0.self_attn.o_proj"]),
        (BERT, {}, ["head.dense", "layers.0.self_attn.o_proj"]),
        (BERT, {"layers_to_transform": (0,)}, ["layers.0.self_attn.o_proj"]),
        (BERT, {"modules_to_save": ("bert.pooler",)}, ["layers.0.self_attn.o_proj"]),
    ],
)
def test_experts_and_heads(modules, changes, expected):
    assert list(lora.targets(LoraConfig(**changes), modules)) == expected


def test_what_is_trained_in_full_gets_no_adapter():
    assert "head.dense" not in lora.targets(LoraConfig(), BERT, never=("head.dense",))


def test_patterns_set_rank_and_scale_as_peft_does():
    settings = LoraConfig(
        r=8,
        alpha=16.0,
        rank_pattern=(("layers.0.self_attn.q_proj", 2), ("q_proj", 4), (r"layers\.[12]\.mlp.*", 3)),
        alpha_pattern=(("v_proj", 1.0), ("self_attn.q_proj", 6.0)),
    )
    found = lora.targets(settings, MODULES)
    for layer in range(3):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp.up_proj"
        rank = 4 if layer else 2
        assert found[f"{attention}.q_proj"] == Spec(rank, 6 / rank)
        assert found[f"{attention}.v_proj"] == Spec(8, 1 / 8)
        assert found[mlp] == (Spec(3, 16 / 3) if layer else Spec(8, 2.0))


def test_the_stabilised_scale_goes_by_the_modules_own_rank():
    settings = LoraConfig(r=16, alpha=32.0, use_rslora=True, rank_pattern=(("v_proj", 4),))
    found = lora.targets(settings, MODULES)
    assert found["layers.0.self_attn.q_proj"] == Spec(16, 8.0)
    assert found["layers.0.self_attn.v_proj"] == Spec(4, 16.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": (("k_proj", 4),)}, "lora.rank_pattern 'k_proj' decides nothing"),
        ({"rank_pattern": (("proj", 4),)}, "of q_proj, up_proj, v_proj, or the end of model.lay"),
        ({"alpha_pattern": ((".*", 4.0), ("q_proj", 2.0))}, "'q_proj' decides nothing"),
        ({"alpha_pattern": (("(", 4.0),)}, "lora.alpha_pattern '(' is not a regular expression"),
        ({"rank_pattern": (("q_proj", 0),)}, "lora.rank_pattern gives 'q_proj' 0"),
        ({"r": 0, "use_dora": True}, "lora.use_dora is True and lora.r=0"),
        ({"r": 0, "rank_pattern": (("q_proj", 4),)}, "lora.r=0 trains without adapters"),
    ],
)
def test_patterns_that_decide_nothing(changes, said):
    with pytest.raises(ConfigError) as caught:
        pick(**changes)
    assert said in caught.value.line()


def test_dora_on_experts_is_refused():
    settings = LoraConfig(target_modules=("up_proj",), use_dora=True)
    with pytest.raises(ConfigError, match=r"use_dora .* experts"):
        lora.targets(settings, MIXTURE)


def adapted(settings: LoraConfig) -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), stacks=((0, 1), (1, 3)))
    own = Spec(settings.r, settings.alpha / settings.r)
    chosen = {f"layers.{i}.self_attn.q_proj": own for i in (1, 2)}
    return lora.insert(model, chosen, settings, nnx.Rngs(1))


def test_insert_adds_exactly_these_leaves():
    plain = tree.split(Decoder(CONFIG, rngs=nnx.Rngs(0), stacks=((0, 1), (1, 3))))[1]
    params = tree.split(adapted(LoraConfig(r=2, alpha=3.0)))[1]
    new = {path: params[path].shape for path in params.keys() - plain.keys()}
    module = "layers.1-2.self_attn.q_proj.lora"
    assert new == {f"{module}.A": (2, 8, 2), f"{module}.B": (2, 2, 12), f"{module}.scale": (2,)}
    assert (params[f"{module}.B"] == 0).all()
    np.testing.assert_allclose(params[f"{module}.scale"], 1.5)
    bound = 8**-0.5  # PEFT: kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
    assert 0.8 * bound < np.abs(params[f"{module}.A"]).max() <= bound


def test_step_zero_equals_the_base_exactly():
    tokens = np.arange(12).reshape(2, 6)
    base = Decoder(CONFIG, rngs=nnx.Rngs(0), stacks=((0, 1), (1, 3)))
    np.testing.assert_array_equal(base(tokens), adapted(LoraConfig(r=2))(tokens))


def test_every_expert_has_an_adapter_of_its_own():
    sizes = DecoderConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=6, max_position=16, experts=Experts(4, 2, 10, True),
    )  # fmt: skip
    model = Decoder(sizes, rngs=nnx.Rngs(0))
    chosen = {f"layers.{i}.mlp.experts.down_proj": Spec(3, 0.5) for i in range(2)}
    tokens = np.arange(12).reshape(2, 6)
    before = model(tokens)
    graphdef, params = tree.split(lora.insert(model, chosen, LoraConfig(r=3), nnx.Rngs(1)))
    module = "layers.0-1.mlp.experts.down_proj.lora"
    assert params[f"{module}.A"].shape == (2, 4, 10, 3)
    assert params[f"{module}.B"].shape == (2, 4, 3, 8)
    assert params[f"{module}.scale"].shape == (2, 4)
    np.testing.assert_array_equal(tree.merge(graphdef, params)(tokens), before)
    # Merged into the kernels, the same model.
    a_LEIR, b_LERO = params[f"{module}.A"], np.ones((2, 4, 3, 8), np.float32)
    b_LERO = b_LERO * np.arange(1, 5)[None, :, None, None]  # experts differ
    params[f"{module}.B"] = b_LERO
    found = tree.merge(graphdef, params)(tokens)
    kernel = "layers.0-1.mlp.experts.down_proj.kernel"
    params[kernel] = params[kernel] + 0.5 * jnp.einsum("LEIR,LERO->LEIO", a_LEIR, b_LERO)
    params[f"{module}.B"] = 0 * b_LERO
    merged = tree.merge(graphdef, params)(tokens)
    np.testing.assert_allclose(found, merged, atol=1e-5)
    assert np.abs(found - before).max() > 3e-3
    params[f"{module}.B"] = b_LERO

    def hidden(seed: int, rate: float):
        rows = jnp.arange(len(tokens))
        dropout = Dropout.of_rows(jnp.float32(rate), jax.random.key(seed), rows)
        return tree.merge(graphdef, params).hidden(tokens, dropout=dropout)

    plain = tree.merge(graphdef, params).hidden(tokens)
    np.testing.assert_allclose(hidden(0, 0.0), plain, atol=1e-5)
    assert np.abs(hidden(0, 0.5) - hidden(1, 0.5)).max() > 1e-3
    np.testing.assert_array_equal(hidden(1, 0.5), hidden(1, 0.5))


def _dora(dtype=jnp.float32) -> tuple[Any, jax.Array, jax.Array]:
    """A projection [24, 10] whose adapter has random leaves, its kernel and inputs."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    rngs = nnx.Rngs(0)
    adapter: Any = Adapter(3, (24, 10), (None, None), 0.7, 0, stack=(), rngs=rngs, dora=True)
    adapter.B[...] = jax.random.normal(next(keys), (3, 10))
    adapter.magnitude[...] = 1 + jax.random.uniform(next(keys), (10,))
    linear: Any = Linear((24, 10), (None, None), bias=False, stack=(), rngs=rngs, dtype=dtype)
    kernel = jax.random.normal(next(keys), (24, 10)).astype(dtype)
    linear.kernel[...], linear.lora = kernel, adapter
    return linear, kernel, jax.random.normal(next(keys), (2, 5, 24)).astype(dtype)


def test_dora_is_the_rescaled_sum():
    linear, kernel, x = _dora()
    whole = kernel + 0.7 * linear.lora.A[...] @ linear.lora.B[...]
    whole = whole * linear.lora.magnitude[...] / jnp.linalg.norm(whole, axis=0)
    np.testing.assert_allclose(linear(x), x @ whole, atol=1e-4)


def test_dropout_of_dora_takes_the_rescaled_kernels_input_too():
    # peft: W x + (m / |V| - 1) W drop(x) + m / |V| scale B A drop(x)
    linear, kernel, x = _dora()
    dropout = Dropout.of_rows(jnp.float32(0.4), jax.random.key(3), jnp.arange(2))
    b = 0.7 * linear.lora.B[...]
    ratio = linear.lora.magnitude[...] / jnp.linalg.norm(kernel + linear.lora.A[...] @ b, axis=0)
    mask = jnp.stack(
        [jax.random.bernoulli(jax.random.fold_in(k, 0), 0.6, x.shape[1:]) for k in dropout.key_B]
    )
    less = jnp.where(mask, x / 0.6, 0)
    wanted = x @ kernel + (ratio - 1) * (less @ kernel) + ratio * (less @ linear.lora.A[...] @ b)
    np.testing.assert_allclose(linear(x, dropout), wanted, atol=1e-4)


def test_gradients_of_dora_take_the_length_for_a_constant():
    linear, kernel, x = _dora()
    graphdef, params = tree.split(linear)

    def loss(params):
        return jnp.sum(jnp.sin(tree.merge(graphdef, params)(x)))

    length = jnp.linalg.norm(kernel + 0.7 * params["lora.A"] @ params["lora.B"], axis=0)

    def plain(params):
        whole = kernel + params["lora.scale"] * params["lora.A"] @ params["lora.B"]
        return jnp.sum(jnp.sin(x @ whole * params["lora.magnitude"] / length))

    found, wanted = jax.grad(loss)(params), jax.grad(plain)(params)
    for name in ("lora.A", "lora.B", "lora.magnitude"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lengths_are_exact_to_float32(dtype):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(0, 0.02, (512, 64)), dtype)
    # An update as large as what it is added to, and columns it all but cancels.
    a, b = rng.normal(0, 0.05, (512, 8)), rng.normal(0, 0.2, (8, 64))
    a, b = a.astype(np.float32), b.astype(np.float32)
    exact = np.asarray(kernel, np.float64) + a.astype(np.float64) @ b
    found = column_lengths(kernel, jnp.asarray(a), jnp.asarray(b))
    assert found.dtype == jnp.float32
    tolerance = 3e-6 if dtype == jnp.float32 else 1e-5
    np.testing.assert_allclose(found, np.linalg.norm(exact, axis=0), rtol=tolerance)


def test_a_small_change_of_magnitude_is_not_lost_in_bfloat16():
    linear, kernel, _ = _dora(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(9), (8, 64, 24)).astype(jnp.bfloat16)
    lengths = column_lengths(kernel, linear.lora.A[...], 0.7 * linear.lora.B[...])
    found = []
    for factor in (1.0, 1.001):  # a bfloat16 near 1 has steps of 0.0039 and 0.0078
        linear.lora.magnitude[...] = lengths * factor
        found.append(linear(x))
    same, moved = (np.asarray(y, np.float64) for y in found)
    assert found[0].dtype == jnp.bfloat16
    assert 0.0007 < np.sum((moved - same) * same) / np.sum(same * same) < 0.0013


def test_at_the_start_dora_is_the_base():
    linear, kernel, x = _dora(jnp.bfloat16)
    linear.lora.B[...] *= 0
    linear.lora.magnitude[...] = jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
    np.testing.assert_array_equal(linear(x), x @ kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_dora_starts_from_the_base(tmp_path, dtype):
    base = tiny.write(tmp_path / "base")
    settings = config.Config(
        model=config.ModelConfig(path=str(base), dtype=dtype, param_dtype="float32"),
        lora=LoraConfig(r=2, use_dora=True, layers_to_transform=(0, 1)),
    )
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    assembly = assemble.assemble(settings, base, mesh)
    state, frozen = setup.initial(settings, assembly, setup.program(settings, assembly, 1), mesh)
    leaves = {**frozen, **state.trainable}
    module = "layers.0-1.mlp.down_proj"
    kernel = np.asarray(leaves[f"{module}.kernel"].astype(dtype), np.float64)
    lengths = leaves[f"{module}.lora.magnitude"]
    assert lengths.dtype == jnp.float32
    np.testing.assert_allclose(lengths, np.linalg.norm(kernel, axis=1), rtol=1e-6)
    assert assembly.groups[f"{module}.lora.magnitude"] == "adapter_magnitude"
    tokens = np.arange(12).reshape(2, 6)
    wanted = load_model(str(base), dtype)(tokens)
    with jax.set_mesh(mesh):
        found = tree.merge(assembly.graphdef, leaves)(tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-5 if dtype == "float32" else 0.05)


def test_where_a_run_began_is_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    written = setup.portable(config.Config(lora=LoraConfig(init="adapter")))
    assert written["lora"]["init"] == str(tmp_path / "adapter")
    assert setup.portable(config.Config())["lora"]["init"] == "default"


def test_low_rank_has_the_gradients_of_its_product():
    keys = jax.random.split(jax.random.key(0), 3)
    x, a, b = (
        jax.random.normal(k, s) for k, s in zip(keys, [(2, 3, 5), (5, 2), (2, 4)], strict=True)
    )
    grads = jax.grad(lambda *args: jnp.sum(jnp.cos(low_rank(*args))), argnums=(0, 1, 2))(x, a, b)
    plain = jax.grad(lambda x, a, b: jnp.sum(jnp.cos(x @ a @ b)), argnums=(0, 1, 2))(x, a, b)
    for found, wanted in zip(grads, plain, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_dropout_acts_on_the_adapter_alone_and_keeps_its_mean():
    graphdef, params = tree.split(adapted(LoraConfig(r=2)))
    tokens = np.arange(12).reshape(2, 6)

    def hidden(params, seed, rate=0.5):
        rows = jnp.arange(len(tokens))
        dropout = Dropout.of_rows(jnp.float32(rate), jax.random.key(seed), rows)
        return tree.merge(graphdef, params).hidden(tokens, dropout=dropout)

    plain = tree.merge(graphdef, params).hidden(tokens)
    np.testing.assert_array_equal(hidden(params, 0), plain)  # B is zero: nothing to drop
    params["layers.1-2.self_attn.q_proj.lora.B"] = jnp.full((2, 2, 12), 0.01)
    trained = tree.merge(graphdef, params).hidden(tokens)
    assert np.abs(hidden(params, 0) - hidden(params, 1)).max() > 1e-6
    np.testing.assert_array_equal(hidden(params, 3), hidden(params, 3))
    np.testing.assert_allclose(hidden(params, 0, rate=0.0), trained, atol=1e-6)
    many = jax.vmap(lambda seed: hidden(params, seed))(jnp.arange(400))
    effect = np.abs(trained - plain).mean()
    assert np.abs(many.mean(0) - trained).mean() < 0.2 * effect
