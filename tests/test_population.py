"""Trials in one program: each equals the same training alone, and nothing compiles for another."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtune import config as configs
from jaxtune import population, sharding, train
from jaxtune.checkpoint import best_step, restore
from jaxtune.config import Config, replaced
from jaxtune.data import pipeline
from jaxtune.errors import ConfigError
from jaxtune.metrics import read_metrics
from jaxtune.plan.hlo_text import replica_group
from jaxtune.setup import abstract
from jaxtune.slots import Slots
from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Trainings and populations on the first of the virtual devices."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    tiny.write_complete(folder / "base")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("eval", 9)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                words = " ".join(rng.choice(["ab", "cd", "ba", "dc"], rng.integers(3, 12)))
                file.write(json.dumps({"prompt": words[:6], "completion": words[6:]}) + "\n")
    return folder


def base(folder: Path, **changes: Any) -> Config:
    values = Config().to_dict()
    values["model"] |= {"path": str(folder / "base"), "dtype": "float32", "param_dtype": "float32"}
    values["data"] |= {
        "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 64,
        "packing": False,
    }  # fmt: skip
    values["train"] |= {"steps": 6, "batch_size": 4, "log_every": 1, "tensorboard": False}
    values["checkpoint"] |= {"every": 100}
    for key, value in changes.items():
        group, name = key.split("__")
        values[group][name] = value
    return configs.freeze(values)


TRIALS: list[dict[str, Any]] = [
    {"optim.lr": 1e-2, "lora.r": 4, "train.seed": 3},
    {"optim.lr": 3e-3, "lora.r": 2, "optim.schedule": "linear", "optim.warmup": 2},
    {"optim.lr": 1e-2, "lora.alpha": 8.0, "train.batch_size": 8, "train.steps": 3,
     "train.grad_accum": 2, "lora.dropout": 0.2},
    {"optim.lr": 2e-2, "lora.target_modules": ("q_proj",), "lora.layers_to_transform": (0, 2),
     "optim.weight_decay": 0.1, "optim.b1": 0.8, "optim.clip_norm": 0.05},
    {"lora.plus_ratio": 4.0, "train.label_smoothing": 0.1, "lora.dropout": 0.3,
     "optim.schedule": "wsd", "optim.end_ratio": 0.0, "lora.use_rslora": True},
]  # fmt: skip


def points(config: Config) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for trial in TRIALS:
        for key, value in trial.items():
            group, name = key.split(".")
            own = getattr(getattr(config, group), name)
            found.setdefault(key, [own]).append(value)
    return found


def run(engine, trials: list[Config], width: int) -> tuple[Slots, list[list[float]]]:
    """All of them to their ends, side by side -> (slots, losses of their micro-batches)."""
    members = [engine.member(trial) for trial in trials]
    slots = engine.empty(width)
    for k, member in enumerate(members):
        slots = engine.start(slots, k, member)
    curves: list[list[float]] = [[] for _ in members]
    for position in range(max(m.positions for m in members)):
        alive = [m if position < m.positions else None for m in members]
        alive += [None] * (width - len(alive))
        slots, measured = engine.step(slots, alive, [position] * width)
        for k, curve in enumerate(curves):
            if alive[k] is not None:
                curve.append(float(measured.loss[k]))
    return slots, curves


@pytest.fixture(scope="module")
def engine(folder):
    return population.open_engine(base(folder), points(base(folder)), (8, 2, 1))


def losses(workdir: Path, split: str) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir) if row["split"] == split]


def test_every_trial_is_the_training_it_would_be_alone(folder, engine, tmp_path):
    trials = [replaced(base(folder), trial) for trial in TRIALS]
    slots, curves = run(engine, trials, 8)
    scores = engine.evaluate(slots)
    for k, trial in enumerate(trials):
        workdir = tmp_path / str(k)
        train.fit(trial, workdir)
        every = trial.train.batch_size // engine.micro
        alone = losses(workdir, "train")
        if every == 1:
            np.testing.assert_allclose(curves[k], alone, rtol=1e-5)
        else:  # the mean of a step's micro-batches, by their tokens; here all weigh about the same
            steps = np.reshape(curves[k], (-1, every)).mean(axis=1)
            np.testing.assert_allclose(steps, alone, rtol=0.05)
        assert scores[k].loss == pytest.approx(losses(workdir, "eval")[-1], rel=1e-5)

        state = engine.export_state(slots, k, engine.member(trial))
        where = workdir / "checkpoints"
        wanted = restore(where, abstract(state), best_step(where))
        assert wanted is not None
        assert wanted.step == trial.train.steps
        for (path, one), (_, other) in zip(
            jax.tree.leaves_with_path(jax.device_get(state)),
            jax.tree.leaves_with_path(jax.device_get(wanted.state)),
            strict=True,
        ):
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-6, err_msg=name)


def test_a_part_of_the_held_out_rows_is_always_the_same(folder, engine):
    trials = [replaced(base(folder), trial) for trial in TRIALS[:2]]
    slots = engine.empty(2)
    for k, trial in enumerate(trials):
        slots = engine.start(slots, k, engine.member(trial))
    wanted = len(engine.eval) // 3
    part = pipeline.subset(engine.eval, wanted / len(engine.eval), engine.config.train.seed)
    assert len(part) == wanted
    scores = engine.evaluate(slots, wanted)
    assert [score.tokens for score in scores] == [part.mask.sum()] * 2
    assert engine.evaluate(slots, wanted) == scores
    assert engine.evaluate(slots, len(engine.eval)) == engine.evaluate(slots)


def test_nothing_compiles_when_trials_start_stop_and_are_replaced(folder, engine, caplog):
    trials = [replaced(base(folder), trial) for trial in TRIALS]
    for width in engine.widths:  # what an engine compiles at its start must be ready
        run(engine, trials[:width], width)
        engine.take(engine.empty(width), 0)
        engine.evaluate(engine.empty(width))
    slots = engine.empty(8)
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, "jax"):
            member = engine.member(replaced(trials[3], {"optim.lr": 5e-4, "train.seed": 9}))
            slots = engine.start(slots, 5, member)
            slots, _ = engine.step(slots, [None] * 5 + [member] + [None] * 2, [0] * 8)
            saved = engine.take(slots, 5)
            narrow = engine.put(engine.empty(2), 1, saved)
            narrow, _ = engine.step(narrow, [None, member], [0, 1])
            engine.evaluate(narrow)
    finally:
        jax.config.update("jax_log_compiles", False)
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []


def test_a_trial_goes_on_bit_for_bit_in_another_slot_of_another_width(folder, engine):
    trial = replaced(base(folder), TRIALS[4])
    member = engine.member(trial)
    whole, curves = run(engine, [trial], 2)
    slots = engine.start(engine.empty(2), 0, member)
    found = []
    for position in range(3):
        slots, measured = engine.step(slots, [member, None], [position, 0])
        found.append(float(measured.loss[0]))
    saved = engine.take(slots, 0)
    slots = engine.put(engine.empty(2), 1, saved)
    for position in range(3, 6):
        slots, measured = engine.step(slots, [None, member], [0, position])
        found.append(float(measured.loss[1]))
    assert found == curves[0]
    for name, leaf in engine.take(whole, 0).items():
        np.testing.assert_array_equal(engine.take(slots, 1)[name], leaf, err_msg=name)


def test_one_trial_of_full_fine_tuning_at_a_time(folder, tmp_path, capsys):
    config = base(folder, lora__r=0, optim__lr=1e-3)
    engine = population.open_engine(config, {"optim.lr": [1e-4, 1e-3]}, (4, 1))
    assert engine.widths == (1,)
    assert "one trial at a time: all weights are trained" in capsys.readouterr().err
    slots, curves = run(engine, [config], 1)
    train.fit(config, tmp_path / "alone")
    np.testing.assert_allclose(curves[0], losses(tmp_path / "alone", "train"), rtol=1e-6)
    assert engine.evaluate(slots)[0].loss == pytest.approx(
        losses(tmp_path / "alone", "eval")[-1], rel=1e-6
    )
    _, other = run(engine, [replaced(config, {"optim.lr": 1e-4})], 1)
    assert other[0][0] == curves[0][0]
    assert other[0][-1] != curves[0][-1]


def test_what_cannot_be_in_one_population_is_refused(folder, engine):
    with pytest.raises(ConfigError, match=r"model\.dtype is 'bfloat16' in a trial and 'float32'"):
        engine.member(replaced(base(folder), {"model.dtype": "bfloat16"}))
    with pytest.raises(ConfigError, match=r"train\.batch_size 6 is no multiple of 4 rows"):
        engine.member(replaced(base(folder), {"train.batch_size": 6}))
    with pytest.raises(ConfigError, match=r"rows that none of them trains on.*data\.eval"):
        population.open_engine(base(folder, data__eval=""), {})


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, [0, 4], r"lora\.r is of 0, 4, 16 in one population.*two sweeps"),
        ({"optim__name": "muon"}, [4, 8], r"optim\.name is muon.*adamw or lion"),
        ({"lora__init": "adapter"}, [4, 8], r"lora\.init is an adapter of one rank"),
    ],
)
def test_ranks_that_cannot_be_padded_are_refused(folder, changes, ranks, message):
    with pytest.raises(ConfigError, match=message):
        population.open_engine(base(folder, **changes), {"lora.r": ranks})


def test_smoothing_of_capped_logits_is_refused(folder, tmp_path):
    sizes = {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 4,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 32,
        "query_pre_attn_scalar": 4, "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }  # fmt: skip
    tiny.write_complete(tmp_path / "gemma2", **sizes)
    capped = base(folder, model__path=str(tmp_path / "gemma2"))
    message = r"train\.label_smoothing is 0\.1 and .* caps its logits"
    with pytest.raises(ConfigError, match=message):
        population.open_engine(capped, {"train.label_smoothing": [0.0, 0.1]})
    with pytest.raises(ConfigError, match=message):
        train.fit(replaced(capped, {"train.label_smoothing": 0.1}), tmp_path / "run")


def test_unused_slots_and_diverging_neighbours_change_nothing(folder, engine):
    trial = replaced(base(folder), TRIALS[0])
    _, quiet = run(engine, [trial], 8)
    wild = replaced(base(folder), {"optim.lr": 1e9, "optim.clip_norm": 0.0})
    _, loud = run(engine, [trial, wild], 8)
    assert loud[0] == quiet[0]
    assert loud[1][-1] > loud[0][-1] + 0.5


def test_a_mesh_cuts_the_population_and_nothing_travels_between_its_parts(folder):
    config = base(folder, mesh__trial=4, mesh__fsdp=2)
    devices = jax.devices()[:8]
    with pytest.MonkeyPatch.context() as patch:
        mesh = Mesh(np.asarray(devices).reshape(1, 4, 1, 2, 1, 1, 1), sharding.AXES)
        patch.setattr(sharding, "make_mesh", lambda _: mesh)
        cut = population.open_engine(config, points(config), (8,))
        trials = [replaced(config, trial | {"train.label_smoothing": 0.1}) for trial in TRIALS]
        _, found = run(cut, trials, 8)
        text = cut._programs[8].step.result().as_text()
    collectives = [line for line in text.splitlines() if "replica_groups=" in line]
    assert len(collectives) > 5
    for line in collectives:  # devices 2k and 2k + 1 are one part
        assert len({device // 2 for device in replica_group(line, 8)}) == 1, line
    whole = population.open_engine(base(folder), points(base(folder)), (8,))
    alone = [replaced(base(folder), trial | {"train.label_smoothing": 0.1}) for trial in TRIALS]
    for one, other in zip(found, run(whole, alone, 8)[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
