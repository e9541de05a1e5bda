"""Config stops at the door: types, unknown keys, overrides."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import config
from jaxtune.config import Config
from jaxtune.errors import ConfigError


@pytest.fixture
def page(tmp_path):
    """Writes a config file from the body of its get_config."""

    def write(body: str = "") -> str:
        file = tmp_path / "page.py"
        file.write_text(
            "from jaxtune.config import default_config\n"
            f"def get_config(arg=None):\n    c = default_config()\n    {body}\n    return c\n"
        )
        return str(file)

    return write


def test_a_page_without_changes_is_the_defaults(page):
    assert config.load(page(), {}) == Config()


def test_page_then_overrides(page):
    found = config.load(
        page("c.optim.lr = 3e-4; c.lora.target_modules = ['q_proj', 'v_proj']"),
        {"optim.lr": "1e-4", "train.batch_size": "8", "data.packing": "False", "lora.r": "4"},
    )
    assert found.optim.lr == 1e-4
    assert found.train.batch_size == 8
    assert found.data.packing is False
    assert found.lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.warmup", "10", 10),
        ("optim.warmup", "0.1", 0.1),
        ("optim.lr", "None", None),
        ("lora.alpha", "8", 8.0),
        ("lora.layers_to_transform", "0,2", (0, 2)),
        ("lora.layers_to_transform", "[0, 2]", (0, 2)),
        ("lora.modules_to_save", "lm_head,embed_tokens", ("lm_head", "embed_tokens")),
        ("lora.target_modules", "q_proj,v_proj", "q_proj,v_proj"),
        ("optim.rules", '[["layers.0.", "freeze"]]', (("layers.0.", "freeze"),)),
        ("data.train", '[{"path": "a.jsonl", "weight": 2}]', ({"path": "a.jsonl", "weight": 2},)),
        ("model.path", "007", "007"),
    ],
)
def test_flag_text_takes_the_type_of_its_key(page, key, text, value):
    group, name = key.split(".")
    found = getattr(getattr(config.load(page(), {key: text}), group), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"optim.lrr": "1"}, "did you mean optim.lr?"),
        ({"optin.lr": "1"}, "did you mean optim.lr?"),
        ({"optim.batch_size": "1"}, "did you mean train.batch_size?"),
        ({"lora.r": "four"}, "type int"),
        ({"lora.r": "1.5"}, "type int"),
        ({"task": "sftt"}, "did you mean 'sft'?"),
        ({"optim": "1"}, "--config.optim.name=..."),
        ({"optim.lr.x": "1"}, "unknown config key"),
        ({"train.batch_size": "6", "train.grad_accum": "4"}, "multiple of grad_accum"),
        ({"train.batch_size": "0"}, "above 0"),
        ({"lora.dropout": "1"}, "dropout in [0, 1)"),
        ({"data.eval_fraction": "-1"}, "in [0, 1)"),
        ({"optim.lr": "-1"}, "config.optim.lr is -1.0; try: 0.0 or more"),
        ({"optim.clip_norm": "-1"}, "config.optim.clip_norm"),
        ({"optim.end_ratio": "-3"}, "from 0.0 to 1.0"),
        ({"optim.b1": "1.5"}, "config.optim.b1"),
        ({"optim.warmup": "1.5"}, "from 0 to 1.0"),
        ({"optim.warmup": "-1"}, "0 or more"),
        ({"eval.every": "-5"}, "config.eval.every is -5"),
    ],
)
def test_mistakes_stop_with_one_line_that_helps(page, overrides, said):
    with pytest.raises(ConfigError) as caught:
        config.load(page(), overrides)
    assert said in caught.value.line()
    assert "\n" not in caught.value.line()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("c.optim.lrr = 1", "lr"),
        ("c.lora.r = 'four'", "type int"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_mistakes_in_a_page(page, body, said):
    with pytest.raises(ConfigError, match=said):
        config.load(page(body), {})


def test_missing_page():
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        config.load("nowhere.py", {})


def test_page_argument(page):
    assert config.load(page("c.lora.r = int(arg)") + ":3", {}).lora.r == 3


def test_json_round_trip():
    values = json.loads(json.dumps(Config().to_dict()))
    assert config.freeze(values) == Config()


_KEYS = [
    f"{group.name}.{leaf.name}"
    for group in dataclasses.fields(Config)
    if dataclasses.is_dataclass(getattr(Config(), group.name))
    for leaf in dataclasses.fields(getattr(Config(), group.name))
]


@given(key=st.sampled_from(_KEYS), text=st.text(max_size=20))
def test_any_text_for_any_key_is_a_value_or_a_config_error(key, text):
    values = Config().to_dict()
    group, name = key.split(".")
    said = ""
    try:
        values[group][name] = config._parse(
            text, config._field_type(config._field_type(Config, group, key), name, key), key
        )
        config.freeze(values)
    except ConfigError as error:
        said = error.line()
    assert "\n" not in said
