"""Labels on literal trees, schedules at literal points, and optimizers against optax's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import config, optim
from jaxtune.config import LoraConfig, OptimConfig
from jaxtune.errors import ConfigError

PATHS = [
    "embed_tokens.embedding",
    "layers.0.input_layernorm.scale",
    "layers.0.self_attn.q_proj.kernel",
    "layers.0.self_attn.q_proj.bias",
    "layers.1.input_layernorm.scale",
    "layers.1.self_attn.q_proj.kernel",
    "layers.1.self_attn.q_proj.bias",
    "lm_head.embedding",
]
ADAPTERS = [f"layers.{i}.self_attn.q_proj.lora.{leaf}" for i in (0, 1) for leaf in "AB"]
SCALES = [f"layers.{i}.self_attn.q_proj.lora.scale" for i in (0, 1)]


def trained(paths, lora=None, **changes) -> dict[str, str]:
    found = optim.labels(paths, lora or LoraConfig(), OptimConfig(**changes))
    assert found.keys() == set(paths)
    return {path: group for path, group in found.items() if group != "frozen"}


def test_lora_trains_adapters_only():
    assert trained(PATHS + ADAPTERS + SCALES) == {
        ADAPTERS[0]: "adapter_a", ADAPTERS[1]: "adapter_b",
        ADAPTERS[2]: "adapter_a", ADAPTERS[3]: "adapter_b",
    }  # fmt: skip


def test_full_fine_tuning_trains_everything_in_its_group():
    assert trained(PATHS, LoraConfig(r=0)) == dict(
        zip(PATHS, ["embedding", *["norm", "kernel", "bias"] * 2, "head"], strict=True)
    )


def test_modules_to_save_and_rules():
    lora = LoraConfig(modules_to_save=("lm_head",))
    rules = ((r"layers\.0\.", "freeze"), ("layernorm", "train"))
    assert trained(PATHS + ADAPTERS + SCALES, lora, rules=rules) == {
        ADAPTERS[2]: "adapter_a", ADAPTERS[3]: "adapter_b",
        "layers.1.input_layernorm.scale": "norm", "lm_head.embedding": "head",
    }  # fmt: skip


HEADS = ["head.dense.kernel", "head.dense.bias", "classifier.kernel", "classifier.bias"]


def test_modules_to_save_go_by_hugging_faces_names_too():
    paths = ["embed_tokens.embedding", "norm.scale", "norm.bias", *ADAPTERS[:1]]
    names = dict(
        zip(
            paths,
            [f"transformer.{n}" for n in ("wte.weight", "ln_f.weight", "ln_f.bias", "-")],
            strict=True,
        )
    )
    for saved in (("wte", "transformer.ln_f"), ("embed_tokens", "norm")):
        lora = LoraConfig(modules_to_save=saved)
        assert optim.labels(paths, lora, OptimConfig(), names=names) == dict(
            zip(paths, ["embedding", "norm", "bias", "adapter_a"], strict=True)
        )


def test_heads_are_trained_beside_adapters_unless_a_rule_freezes_them():
    paths = [*HEADS, "layers.0.mlp.router.weight", *ADAPTERS]
    groups = ["kernel", "bias", "head", "bias"]
    for heads in (HEADS, HEADS[2:]):
        found = optim.labels(paths, LoraConfig(), OptimConfig(), heads=heads)
        assert {p: g for p, g in found.items() if g != "frozen" and ".lora." not in p} == {
            p: g for p, g in zip(HEADS, groups, strict=True) if p in heads
        }
        assert found[ADAPTERS[0]] == "adapter_a"
    rules = OptimConfig(rules=((r"^head\.", "freeze"),))
    found = optim.labels(paths, LoraConfig(), rules, heads=HEADS)
    assert [found[path] for path in HEADS] == ["frozen", "frozen", "head", "bias"]


def test_every_leaf_of_every_model_has_a_group():
    paths = [
        *PATHS, *HEADS, "embed_positions.embedding", "embed_types.embedding", "embed_norm.scale",
        "embed_norm.bias", "score.kernel", "layers.0.mlp.router.weight",
        "layers.0.mlp.experts.up_proj.kernel",
    ]  # fmt: skip
    found = optim.labels(paths, LoraConfig(r=0), OptimConfig())
    assert found["embed_positions.embedding"] == found["embed_types.embedding"] == "embedding"
    assert found["embed_norm.scale"] == "norm"
    assert found["embed_norm.bias"] == "bias"
    assert found["score.kernel"] == "head"
    assert found["layers.0.mlp.router.weight"] == "router"
    assert found["layers.0.mlp.experts.up_proj.kernel"] == "kernel"


def test_magnitudes_are_trained_and_scales_are_not():
    leaves = [f"layers.0.self_attn.q_proj.lora.{leaf}" for leaf in ("magnitude", "scale")]
    assert trained(PATHS + leaves) == {leaves[0]: "adapter_magnitude"}


def test_freezing_the_first_layers_of_a_full_run():
    rules = ((r"^layers\.0\.|^embed_tokens", "freeze"),)
    assert list(trained(PATHS, LoraConfig(r=0), rules=rules)) == PATHS[4:]


@pytest.mark.parametrize(
    ("lora", "rules", "said"),
    [
        (LoraConfig(), ((r"layers\.7\.", "freeze"),), "decides nothing"),
        (LoraConfig(), (("kernel", "thaw"),), "freeze or train"),
        (LoraConfig(), ((".", "freeze"),), "every parameter is frozen"),
        (LoraConfig(modules_to_save=("score",)), (), "lora.modules_to_save 'score'"),
    ],
)
def test_rules_that_select_nothing_stop(lora, rules, said):
    with pytest.raises(ConfigError) as caught:
        trained(PATHS + ADAPTERS + SCALES, lora, rules=rules)
    assert said in caught.value.line()


@pytest.mark.parametrize(
    ("name", "expected"),  # at steps 0, 4, 9 (the last of the warm-up), 10, 55, 100
    [
        ("constant", [1 / 11, 5 / 11, 10 / 11, 1, 1, 1]),
        ("linear", [1 / 11, 5 / 11, 10 / 11, 1, 0.55, 0.1]),
        ("cosine", [1 / 11, 5 / 11, 10 / 11, 1, 0.55, 0.1]),
        ("wsd", [1 / 11, 5 / 11, 10 / 11, 1, 1, 0.1]),
    ],
)
def test_schedules(name, expected):
    which = optim.SCHEDULES.index(name)
    found = [optim.share_of_peak(which, step, 10, 100, 0.1) for step in (0, 4, 9, 10, 55, 100)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert optim.share_of_peak(which, 91, 10, 100, 0.1) == pytest.approx(
        {"constant": 1, "linear": 0.19, "cosine": 0.1221, "wsd": 0.55}[name], abs=2e-3
    )


def make(**changes) -> config.Config:
    values = config.Config().to_dict()
    for key, value in changes.items():
        group, name = key.split("__")
        values[group][name] = value
    return config.freeze(values)


def test_warmup_in_steps_or_as_a_fraction():
    assert optim.hyperparameters(make(optim__warmup=7), 200)["warmup"] == 7
    assert optim.hyperparameters(make(optim__warmup=0.05), 200)["warmup"] == 10


def test_learning_rate_by_method():
    assert optim.peak_lr(make()) == 2e-4
    assert optim.peak_lr(make(lora__r=0)) == 2e-5
    assert optim.peak_lr(make(optim__lr=1.0)) == 1.0


GROUPS = {"w": "kernel", "n": "norm", "a": "adapter_a", "b": "adapter_b"}
PARAMS = {name: jnp.linspace(-1, 1, 24).reshape(2, 3, 4) for name in GROUPS}
GRADS = {name: jnp.cos(5 * leaf) * (i + 1) for i, (name, leaf) in enumerate(PARAMS.items())}


def run(settings: config.Config, steps: int = 3) -> Any:
    """Parameters after some updates with the same gradients."""
    tx = optim.make(settings, GROUPS, 10)
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def reference(tx: optax.GradientTransformation, steps: int = 3) -> Any:
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


CONSTANT = {"optim__schedule": "constant", "optim__warmup": 0, "optim__lr": 0.1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, optax.adamw(0.1, 0.9, 0.999, 1e-8, weight_decay=0.0)),
        (
            {"optim__weight_decay": 0.1, "optim__b2": 0.95},
            optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.1, mask={k: k != "n" for k in GROUPS}),
        ),
        ({"optim__name": "lion"}, optax.lion(0.1, 0.9, 0.999, weight_decay=0.0)),
        (
            {"optim__name": "adafactor"},
            optax.adafactor(0.1, multiply_by_parameter_scale=False, min_dim_size_to_factor=128),
        ),
    ],
)
def test_updates_equal_optax_after_clipping_over_all_groups(changes, expected):
    found = run(make(**(CONSTANT | changes)))
    wanted = reference(optax.chain(optax.clip_by_global_norm(1.0), expected))
    for name in GROUPS:
        # Our betas are float32 scalars, those of the reference Python floats.
        np.testing.assert_allclose(found[name], wanted[name], atol=5e-6)


def test_lora_plus_multiplies_the_rate_of_b_alone():
    plain, plus = run(make(**CONSTANT), 1), run(make(**CONSTANT, lora__plus_ratio=4.0), 1)
    for name in ("w", "n", "a"):
        np.testing.assert_array_equal(plain[name], plus[name])
    moved = (plus["b"] - PARAMS["b"]) / (plain["b"] - PARAMS["b"])
    np.testing.assert_allclose(moved, 4.0, rtol=1e-4)


def test_muon_makes_each_layer_of_a_kernel_orthogonal():
    params = {"w": jnp.zeros((2, 4, 4))}
    grads = {"w": jax.random.normal(jax.random.key(0), (2, 4, 4))}
    tx = optim.make(make(**CONSTANT, optim__name="muon"), {"w": "kernel"}, 10)
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    singular = np.linalg.svd(np.asarray(updates["w"]), compute_uv=False)
    assert singular.shape == (2, 4)
    assert (singular > 0.05).all()
    assert (singular < 0.13).all()


def test_muon_takes_every_expert_for_a_matrix_of_its_own():
    grads = {"w": jax.random.normal(jax.random.key(0), (2, 3, 4, 4))}
    params = {"w": jnp.zeros((2, 3, 4, 4))}
    tx = optim.make(make(**CONSTANT, optim__name="muon"), {"w": "kernel"}, 10)
    found: Any = tx.update(grads, tx.init(params), params)[0]
    for expert in range(3):
        one = {"w": grads["w"][:, expert]}
        zeros = {"w": jnp.zeros((2, 4, 4))}
        # Clipping sees all of them; the direction of muon does not depend on it.
        wanted: Any = tx.update(one, tx.init(zeros), zeros)[0]
        np.testing.assert_allclose(found["w"][:, expert], wanted["w"], atol=1e-3)


def test_no_value_recompiles():
    settings = make()
    tx = optim.make(settings, GROUPS, 10)
    update: Any = jax.jit(tx.update)
    state: Any = tx.init(PARAMS)
    rates = []
    for lr, clip, warmup in ((0.1, 1.0, 0.0), (0.2, float("inf"), 3.0)):
        state.hyperparams.update(lr=jnp.float32(lr), clip_norm=jnp.float32(clip))
        state.hyperparams["warmup"] = jnp.float32(warmup)
        rates.append(float(jnp.abs(update(GRADS, state, PARAMS)[0]["w"]).max()))
    assert rates[0] != rates[1]
    assert update._cache_size() == 1
