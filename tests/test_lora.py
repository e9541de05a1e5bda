"""Which projections get an adapter, and what inserting one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import lora, tree
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.layers import Dropout

MODULES = {
    f"layers.{i}.{m}": f"model.layers.{i}.{m}"
    for i in range(3)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
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


def adapted(settings: LoraConfig) -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), stacks=((0, 1), (1, 3)))
    chosen = frozenset({f"layers.{i}.self_attn.q_proj" for i in (1, 2)})
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


def test_scale():
    assert lora.scale(LoraConfig(r=16, alpha=32.0)) == 2.0
    assert lora.scale(LoraConfig(r=16, alpha=32.0, use_rslora=True)) == 8.0


def test_dropout_acts_on_the_adapter_alone_and_keeps_its_mean():
    graphdef, params = tree.split(adapted(LoraConfig(r=2)))
    tokens = np.arange(12).reshape(2, 6)

    def hidden(params, seed, rate=0.5):
        dropout = Dropout(jnp.float32(rate), jax.random.key(seed))
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
