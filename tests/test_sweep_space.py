"""The space of a sweep: what may vary, what a trial's config is, what is tried first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import config as settings
from jaxtune.config import Config, choice, log, uniform
from jaxtune.errors import ConfigError
from jaxtune.sweep import prior, space

AXES = "log(low, high), uniform(low, high) or choice(a, b, ...)"


def with_space(axes: dict, **changes) -> Config:
    config = settings.replaced(Config(), {k.replace("__", "."): v for k, v in changes.items()})
    return settings.freeze(settings.replaced(config, {"sweep.space": axes}).to_dict())


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        (
            {"optim.learning_rate": log(1e-4, 1e-3)},
            ("optim.learning_rate", "did you mean optim.lr?"),
        ),
        ({"optim.lrr": log(1e-4, 1e-3)}, ("did you mean optim.lr? one of optim.lr, optim.weight",)),
        ({"lora.zzz": log(1e-4, 1e-3)}, ("'lora.zzz'; try: one of optim.lr, optim.weight_decay",)),
        ({"train.lr": log(1e-4, 1e-3)}, ("did you mean optim.lr?",)),
        ({"data.packing": choice(True, False)}, ("cannot vary", "optim.lr, optim.weight_decay")),
        ({"optim.name": choice("adamw", "lion")}, ("optim.name", "cannot vary")),
        ({"optim.lr": log(1e-3, 1e-4)}, ("log(0.001, 0.0001)", "smaller bound first")),
        ({"optim.lr": uniform(1e-3, 1e-3)}, ("smaller bound first",)),
        ({"optim.weight_decay": log(0.0, 0.1)}, ("bounds above 0",)),
        (
            {"optim.lr": ("log", 1e-4)},
            ("log(0.0001): a range has two ends, not 1", "log(low, high)"),
        ),
        ({"optim.lr": log(1e-4, float("inf"))}, ("log(0.0001, inf): inf is not finite",)),
        (
            {"optim.lr": ("log", "1e-4", 1e-3)},
            ("log('1e-4', 0.001): '1e-4' is no number; try: log(",),
        ),
        ({"optim.lr": ("normal", 1e-4, 1e-3)}, ("optim.lr is ('normal', 0.0001, 0.001)", AXES)),
        ({"optim.lr": 1e-3}, ("sweep.space optim.lr is 0.001; ", AXES)),
        ({"optim.lr": None}, ("sweep.space optim.lr is None; ", AXES)),
        ({"optim.lr": []}, ("sweep.space optim.lr is (); ", AXES)),
        ({"optim.lr": ["optim.lr"]}, ("sweep.space optim.lr is ('optim.lr',); ", AXES)),
        ({"optim.lr": [1e-4, 3e-4]}, ("sweep.space optim.lr is (0.0001, 0.0003); ", AXES)),
        ({"optim.lr": choice()}, ("empty choice",)),
        ({"optim.lr": choice(1e-4, None)}, ("optim.lr has None",)),
        ({"optim.lr": choice(1e-4, 1e-4)}, ("0.0001 twice",)),
        ({"lora.dropout": choice(0.0, 1.5)}, ("lora.dropout", "[0, 1)")),
        ({"lora.dropout": uniform(0.0, 1.5)}, ("lora.dropout", "[0, 1)")),
        ({"lora.r": choice(4, 8.5)}, ("lora.r", "8.5", "int")),
        ({"lora.r": choice(0, 8)}, ("lora.r has 0: adapters have a rank of 1 or more",)),
        ({"lora.r": choice(4, None)}, ("lora.r is None", "int")),
        ({"lora.r": uniform(4.0, 64.0)}, ("lora.r", "int")),
        ({"optim.schedule": choice("cosine", "linaer")}, ("did you mean 'linear'",)),
        ({"optim.schedule": uniform(0, 1)}, ("is a range", "choice")),
        ({"train.batch_size": uniform(4, 16)}, ("is a range", "choice")),
        ({"train.batch_size": choice(7, 16)}, ("7, 16", "micro-batches of one row")),
        ({"train.epochs": choice(1.0, 2.0), "train.steps": choice(3, 4)}, ("overrides",)),
    ],
)
def test_wrong_spaces_are_one_line_that_names_the_key(axes, parts):
    with pytest.raises(ConfigError) as caught:
        space.parse(with_space(axes))
    line = caught.value.line()
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learning_rate", "optim.lr"), ("train.learning_rate", "optim.lr"), ("lr", "optim.lr"),
        ("optim.wd", "optim.weight_decay"), ("lora.rank", "lora.r"), ("lora.lora_rank", "lora.r"),
        ("lora.lora_alpha", "lora.alpha"), ("lora.lora_dropout", "lora.dropout"),
        ("optim.warmup_ratio", "optim.warmup"), ("train.batch", "train.batch_size"),
        ("per_device_train_batch_size", "train.batch_size"), ("data.seed", "train.seed"),
        ("train.num_train_epochs", "train.epochs"), ("train.max_steps", "train.steps"),
    ],
)  # fmt: skip
def test_usual_names_find_their_key(written, meant):
    with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
        space.parse(with_space({written: log(1e-4, 1e-3)}))


def test_what_the_config_rules_out_is_named():
    with pytest.raises(ConfigError, match="full fine-tuning"):
        space.parse(with_space({"lora.r": choice(4, 8)}, lora__r=0))
    with pytest.raises(ConfigError, match=r"train\.epochs, which train\.steps overrides"):
        space.parse(with_space({"train.epochs": choice(1.0, 2.0)}, train__steps=10))


def test_values_take_the_type_of_their_key():
    found = space.parse(
        with_space(
            {
                "lora.alpha": choice(8, 16),
                "lora.target_modules": choice("all-linear", ["q_proj", "v_proj"]),
                "optim.warmup": uniform(0, 0.1),
                "lora.r": log(2, 64),
            }
        )
    )
    assert found == {
        "lora.alpha": ("choice", 8.0, 16.0),
        "lora.target_modules": ("choice", "all-linear", ("q_proj", "v_proj")),
        "optim.warmup": ("uniform", 0.0, 0.1),
        "lora.r": ("log", 2, 64),
    }
    assert all(type(v) is float for v in found["lora.alpha"][1:])


def test_a_space_may_come_from_the_command_line(tmp_path):
    page = tmp_path / "page.py"
    page.write_text(
        "from jaxtune.config import default_config, log\n"
        "def get_config():\n    c = default_config()\n"
        "    c.sweep.space = {'optim.lr': log(1e-5, 1e-3)}\n    return c\n"
    )
    assert space.parse(settings.load(str(page), {})) == {"optim.lr": ("log", 1e-5, 1e-3)}
    given = {"sweep.space": '{"lora.r": ["choice", 4, 8]}'}
    assert space.parse(settings.load(str(page), given)) == {"lora.r": ("choice", 4, 8)}
    with pytest.raises(ConfigError, match=r"sweep\.space lora\.r is 8; try: log"):
        space.parse(settings.load(str(page), {"sweep.space": '{"lora.r": 8}'}))


@given(st.integers(1, 500), st.integers(1, 8), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_another_batch_size_sees_as_many_rows(steps, own, other):
    config = settings.replaced(Config(), {"train.steps": steps, "train.batch_size": own})
    trial = space.configured(config, {"train.batch_size": other})
    assert trial.train.batch_size == other
    assert abs(trial.train.steps * other - steps * own) <= max(other / 2, other - steps * own)


@pytest.mark.parametrize(
    ("own", "accum", "other", "expected"),
    [(8, 1, 16, 2), (8, 1, 4, 1), (16, 4, 8, 2), (16, 4, 6, 3), (16, 1, 24, 3), (16, 2, 16, 2)],
)
def test_micro_batches_do_not_grow_with_the_batch(own, accum, other, expected):
    values = {"train.batch_size": own, "train.grad_accum": accum}
    trial = space.configured(settings.replaced(Config(), values), {"train.batch_size": other})
    assert trial.train.grad_accum == expected


def test_steps_that_vary_count_the_configs_batches():
    config = settings.replaced(Config(), {"train.steps": 10, "train.batch_size": 16})
    trial = space.configured(config, {"train.steps": 40, "train.batch_size": 8})
    assert (trial.train.steps, trial.train.batch_size) == (80, 8)
    assert space.configured(config, {"train.steps": 40}).train.steps == 40
    assert space.configured(config, {"lora.r": 4}).lora.alpha == config.lora.alpha


def test_defaults_and_points_hold_the_configs_own_values():
    config = Config()
    axes: space.Space = {
        "optim.lr": ("log", 1e-3, 1e-2),
        "lora.r": ("choice", 4, 8),
        "train.batch_size": ("choice", 8, 16),
    }
    assert space.defaults(config, axes) == {
        "optim.lr": 2e-4,
        "lora.r": 16,
        "train.batch_size": 16,
    }
    assert space.points(config, axes) == {
        "optim.lr": (1e-3, 1e-2, 2e-4),
        "lora.r": (4, 8, 16),
        "train.batch_size": (8, 16),
    }


def test_a_grid_is_every_combination_and_needs_choices():
    axes: space.Space = {"lora.r": ("choice", 4, 8), "optim.lr": ("choice", 1e-4, 1e-3, 1e-2)}
    found = space.grid(axes)
    assert len(found) == 6
    assert {(p["lora.r"], p["optim.lr"]) for p in found} == {
        (r, lr) for r in (4, 8) for lr in (1e-4, 1e-3, 1e-2)
    }
    with pytest.raises(ConfigError, match=r"choice\(0.0001, 0.001, 0.01\)"):
        space.grid({"optim.lr": ("log", 1e-4, 1e-2)})


def test_clipping():
    assert space.clipped(("log", 1e-4, 1e-3), 5e-3) == 1e-3
    assert space.clipped(("choice", 8, 16, 32), 100) == 32
    assert space.clipped(("choice", "linear", "cosine"), "wsd") == "linear"
    assert space.clipped(("choice", ("q",), "all-linear"), ("q",)) == ("q",)
    assert space.clipped(("uniform", 4, 8), 6.0) == 6
    assert not space.contains(("uniform", 0.0, 1.0), True)


def test_rates_follow_the_formula():
    config = Config()
    # 5e-5 * 10 * (2000 / 2048) ** 0.781
    assert prior.rates(config, 2048, "llama") == {"by width": 4.91e-4, "usual": 3e-4}
    assert prior.rates(config, 4096, "qwen3")["by width"] == 4.73e-4
    full = settings.replaced(config, {"lora.r": 0})
    assert prior.rates(full, 2048, "llama") == {"by width": 4.91e-5, "usual": 3e-5}


@pytest.mark.parametrize("hidden", [64, 896, 2048, 8192])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("changes", [{}, {"lora.r": 0}, {"train.batch_size": 1, "lora.r": 1}])
def test_the_default_space_is_one_the_parser_takes_and_holds_the_prior(hidden, family, changes):
    config = settings.replaced(Config(), changes)
    found = prior.space_of(config, hidden, family)
    again = settings.freeze(settings.replaced(config, {"sweep.space": found}).to_dict())
    assert space.parse(again) == found
    assert all(
        space.contains(found["optim.lr"], lr) for lr in prior.rates(config, hidden, family).values()
    )
    assert ("lora.r" in found) == (config.lora.r > 0)
    # What the defaults are is in it as well.
    own = space.defaults(config, found)
    assert all(space.contains(found[key], own[key]) for key in found if key != "optim.lr")


def test_the_default_batch_sizes_share_out_over_devices():
    found = prior.space_of(settings.replaced(Config(), {"train.batch_size": 8}), 2048, "llama", 8)
    assert found["train.batch_size"] == ("choice", 8, 16)


def test_first_trials_are_defaults_prior_and_earlier_winners():
    config = settings.replaced(Config(), {"sweep.trials": 32})
    axes: space.Space = {"optim.lr": ("log", 1e-5, 4e-4), "lora.r": ("choice", 8, 16)}
    won = ({"optim.lr": 1e-4, "lora.r": 64}, {"optim.lr": 2e-4, "optim.b1": 0.8})
    found = prior.first_trials(config, axes, 2048, "llama", won)
    assert [(f.params["optim.lr"], f.params["lora.r"], f.role) for f in found] == [
        (2e-4, 16, "baseline"),
        (4e-4, 16, "prior"),  # 4.91e-4, within the space
        (3e-4, 16, "prior"),
        (1e-4, 16, "prior"),  # the later winner is the baseline once more
    ]
    assert found[0].why == "defaults"
    few = settings.replaced(config, {"sweep.trials": 4})
    assert [f.role for f in prior.first_trials(few, axes, 2048, "llama", won)] == [
        "baseline",
        "prior",
    ]
