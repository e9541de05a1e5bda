"""Config files people have: both styles, missing fields, fields nobody knows."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.errors import ModelError
from jaxtune.hf.load import load_model
from jaxtune.models import families
from jaxtune.models.rope import rope_table
from tests import tiny

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 7,
    "sliding_window": 4,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}


def test_a_family_we_lack_names_the_closest():
    with pytest.raises(ModelError) as error:
        families.read({"model_type": "lama"})
    assert "model_type 'lama'" in error.value.what
    assert "(closest: llama)" in error.value.fix
    assert "qwen3_moe" in error.value.fix
    assert "modernbert" in error.value.fix


def test_a_config_without_a_model_type_is_an_error():
    with pytest.raises(ModelError, match="has no model_type"):
        families.read({"vocab_size": 3})


def test_unknown_fields_stop_unless_ignored_or_off():
    hf = tiny.SIZES | {"attention_sinks": 4}
    with pytest.raises(ModelError, match="attention_sinks 4") as error:
        families.read(hf)
    assert "--config.model.ignore=attention_sinks" in error.value.fix
    plain = families.read(tiny.SIZES)
    assert families.read(hf, ignore=("attention_sinks",)) == plain
    assert families.read(tiny.SIZES | {"attention_sinks": None, "other_switch": False}) == plain


@pytest.mark.parametrize(
    "field", ["attention_dropout", "unsloth_fixed", "_name_or_path", "transformers_version"]
)
def test_fields_without_maths_pass(field):
    plain = families.read(tiny.SIZES)
    assert families.read(tiny.SIZES | {field: "something"}) == plain


def test_quantised_checkpoints_are_refused():
    with pytest.raises(ModelError, match="quantised"):
        families.read(tiny.SIZES | {"quantization_config": {"quant_method": "gptq"}})


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_named(field):
    hf = {name: value for name, value in tiny.SIZES.items() if name != field}
    with pytest.raises(ModelError, match=f"has no {field}"):
        families.read(hf)


def test_gemma3_takes_the_defaults_of_transformers_where_fields_are_missing():
    _, config = families.read(GEMMA3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262208
    assert config.windows == (4, 4, 4, 4, 4, 0, 4)
    assert config.rope_of == (1, 1, 1, 1, 1, 0, 1)
    full, local = config.ropes
    assert (full.theta, full.kind, full.factor) == (1e6, "linear", 8.0)
    assert (local.theta, local.kind) == (1e4, "default")
    assert config.query_scale == 256**-0.5


def test_layer_types_rule_over_the_pattern():
    kinds = ["full_attention"] * 6 + ["sliding_attention"]
    assert families.read(GEMMA3 | {"layer_types": kinds})[1].windows == (0,) * 6 + (4,)
    with pytest.raises(ModelError, match="layer_types"):
        families.read(GEMMA3 | {"layer_types": kinds[:3]})
    with pytest.raises(ModelError, match="chunked_attention"):
        families.read(GEMMA3 | {"layer_types": ["chunked_attention"] * 7})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'"),
        ({"rope_type": "linear"}, "without a factor"),
        ({"rope_type": "linear", "factor": 2.0, "warp": 3}, "warp"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}, "1 numbers"),
    ],
)
def test_rotary_settings_that_would_change_the_maths_are_errors(found, words):
    with pytest.raises(ModelError) as error:
        rope_table(found, 1e4, head_dim=8, max_position=64)
    assert words in str(error.value)


def test_old_and_new_rotary_settings_are_the_same_model():
    scaling = {"factor": 4.0, "rope_type": "linear"}
    old = tiny.SIZES | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = tiny.SIZES | {"rope_parameters": scaling | {"rope_theta": 5e5}}
    also = tiny.SIZES | {"rope_theta": 5e5, "rope_scaling": {"factor": 4.0, "type": "linear"}}
    assert families.read(old)[1] == families.read(new)[1] == families.read(also)[1]
    assert families.read(old)[1].ropes[0].factor == 4.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_files_are_understood(name):
    """Fields as the hub's files have them (some shortened), among them many that say nothing."""
    hf = PUBLISHED[name]
    _, config = families.read(hf)
    text = hf.get("text_config", hf)
    layers = text.get("num_hidden_layers") or text.get("n_layers") or text.get("n_layer")
    assert config.num_layers == layers
    assert config.hidden_size == (text.get("hidden_size") or text.get("dim") or text["n_embd"])


def test_a_window_that_is_switched_off_is_none():
    assert families.read(PUBLISHED["Qwen2.5-0.5B"])[1].windows == ()
    on = PUBLISHED["Qwen2.5-0.5B"] | {"use_sliding_window": True}
    assert families.read(on)[1].windows == (0,) * 21 + (32768,) * 3


def test_slots_of_stacks_and_experts():
    mixtral = {
        **tiny.SIZES,
        "model_type": "mixtral",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    rows, config = families.read(mixtral)
    assert rows.slots("norm.scale", config) == [((), "model.norm.weight")]
    assert rows.slots("layers.1-2.self_attn.q_proj.kernel", config) == [
        ((0,), "model.layers.1.self_attn.q_proj.weight"),
        ((1,), "model.layers.2.self_attn.q_proj.weight"),
    ]
    up = "block_sparse_moe.experts.{}.w3.weight"
    assert rows.slots("layers.0-1.mlp.experts.up_proj.kernel", config) == [
        ((layer, expert), f"model.layers.{layer}.{up.format(expert)}")
        for layer in (0, 1)
        for expert in (0, 1)
    ]


def test_names_in_files_may_lack_the_prefix_or_have_another():
    rows, _ = families.read(tiny.SIZES)
    bare = rows.on_disk({"embed_tokens.weight", "layers.0.self_attn.q_proj.weight"})
    assert bare.tensor("layers.3.mlp.up_proj.kernel") == "layers.3.mlp.up_proj.weight"
    assert rows.on_disk({"model.embed_tokens.weight"}).keys == rows.keys
    wrapper, _ = families.read({"model_type": "gemma3", "text_config": GEMMA3})
    assert wrapper.tensor("norm.scale") == "model.language_model.norm.weight"
    hub = wrapper.on_disk({"language_model.model.embed_tokens.weight"})
    assert hub.tensor("norm.scale") == "language_model.model.norm.weight"


def test_an_ignored_field_loads_the_model(tmp_path):
    folder = tiny.write(tmp_path / "model")
    tokens = np.arange(5)[None]
    wanted = np.asarray(load_model(str(folder))(tokens))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_sinks": 4}))
    with pytest.raises(ModelError, match="attention_sinks"):
        load_model(str(folder))
    found = load_model(str(folder), ignore=("attention_sinks",))(tokens)
    np.testing.assert_array_equal(np.asarray(found), wanted)
