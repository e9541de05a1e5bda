"""`train.budget`: runs whose every cost is known end inside it, and go on as they were planned."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from jaxtune import aot, config, optim, train
from jaxtune.deadline import Deadline, Used
from jaxtune.errors import ConfigError
from jaxtune.step import TrainState
from tests.faults import host
from tests.test_train import numbers, settings, weights


class Run:
    """The loop of `fit`, of which steps, evaluations and saves only move a clock on."""

    def __init__(self, budget: str, step: float | Callable[[int], float] = 1.0, **changes: Any):
        """Every `saves` steps it saves, every `evals` it evaluates."""
        options = {"evaluation": 1.0, "save": 2.0, "saves": 20, "evals": 0, "most": 1000} | changes
        values = config.Config().to_dict()
        values["train"]["budget"] = budget
        values["checkpoint"]["every"], values["eval"]["every"] = options["saves"], options["evals"]
        self.config = config.freeze(values)
        self.cost = step if callable(step) else lambda _: step
        self.evaluation, self.save = options["evaluation"], options["save"]
        self.most = options["most"]
        self.now = self.trained = 0.0
        self.tokens, self.used = 0, Used()
        self.saved: tuple[int, dict] = (0, {})

    def go(self, start: float = 0.0, dies_at: int = -1) -> int:
        """Steps that are done when it ends; it goes on from the last save."""
        first, known = self.saved
        self.now, self.trained, self.used = start, 0.0, Used(**known)
        used = self.used
        hyper = {"steps": jnp.float32(self.most), "warmup": jnp.float32(0.03 * self.most)}
        opt_state = optax.InjectStatefulHyperparamsState(jnp.int32(0), hyper, {}, ())
        state = TrainState(jnp.int32(first), {}, opt_state)
        deadline = Deadline(
            self.config,
            self.most,
            state=state,
            progress=self,
            clock=lambda: self.now,
            trained=lambda: self.trained,
            devices=2,
        )

        def evaluate() -> None:
            for _ in deadline.evaluating(range(2)):
                self.now += self.evaluation / 2

        def save(step: int) -> None:
            deadline.note()
            self.saved = (step, dataclasses.asdict(used))
            with deadline.saving():
                self.now += self.save

        deadline.open()
        if first in (0, deadline.steps):
            evaluate()
        step = first
        while step < deadline.steps:
            step += 1
            if step == dies_at:
                return step
            self.now += self.cost(step)
            self.trained += self.cost(step) * (step > first + 1)
            self.tokens += 100 + step % 7
            due_eval = self.config.eval.every and step % self.config.eval.every == 0
            due_save = bool(due_eval) or step % self.config.checkpoint.every == 0
            if due_save or deadline.due(step) or step == deadline.steps:
                state, refitted = deadline.refit(step, state, saved=due_save)
                if due_eval or step == deadline.steps:
                    evaluate()
                if due_save or refitted or step == deadline.steps:
                    save(step)
        if used.refits:
            hyper = state.opt_state.hyperparams  # type: ignore[union-attr]  # inject_hyperparams
            known = (float(hyper["steps"]), float(hyper["warmup"]))
            assert first or known == pytest.approx(tuple(used.refits[-1][1:]))
        return step

    @property
    def refits(self) -> list[list]:
        return self.saved[1]["refits"]


def test_as_many_steps_as_there_is_time_for():
    run = Run("100s")
    steps = run.go(start=10.0)
    # 10 to start, two evaluations of 1, saves of 2 at the decisions, at 20, 40, 60 and the end;
    # a margin of 2 stays.
    assert 92 <= run.now <= 98
    assert run.refits[0][0] == 3  # two steps measured, after the one that compiles
    assert run.refits[-1][1] == steps
    assert run.refits[-1][2] == pytest.approx(0.03 * run.refits[0][1], abs=1)
    assert run.saved[0] == steps


def test_a_machine_that_slows_down_takes_fewer_steps():
    run = Run("10m", lambda step: 1.0 if step <= 200 else 2.0)
    steps = run.go()
    assert 350 <= steps <= 380
    assert 570 <= run.now <= 590
    assert run.refits[0][1] > 500
    warmups = {warmup for *_, warmup in run.refits}
    assert len(warmups) == 1  # it was behind


def test_a_machine_that_speeds_up_takes_more_steps():
    run = Run("10m", lambda step: 2.0 if step <= 100 else 1.0)
    steps = run.go()
    assert run.refits[0][1] < 300
    assert steps >= 350
    assert run.now <= 590
    for before, now in itertools.pairwise(run.refits):
        if now[1] > before[1] and now[0] % 20:  # which costs a save
            assert now[1] > 1.1 * before[1]


def test_a_first_guess_on_a_busy_machine_is_mended_before_the_first_save():
    run = Run("150s", lambda step: 1.7 if step < 10 else 0.8, saves=1000)
    assert run.go() > 150
    assert 140 <= run.now <= 150


def test_a_hiccup_is_no_reason_to_end_early():
    run = Run("10m", lambda step: 20.0 if step == 100 else 1.0)
    assert 505 <= run.go() <= 530  # twenty fewer than without
    assert run.now <= 590
    assert min(steps for _, steps, _ in run.refits) > 500


def test_saves_and_evaluations_on_the_way_are_counted():
    run = Run("10m", evaluation=6.0, save=4.0, saves=10, evals=15)
    run.go()
    assert 550 <= run.now <= 590
    assert len(run.refits) <= 4


def test_the_steps_of_the_config_stay_the_most():
    run = Run("10m", most=100)
    assert run.go() == 100
    assert run.refits == []
    # One that slows down all the same.
    run = Run("3m", lambda step: 1.0 if step < 50 else 3.0, most=100)
    assert run.go() < 100
    assert run.now <= 180


def test_chips_share_their_hours():
    one, two = Run("2 chip-hours", 10.0), Run("1h", 10.0)
    assert one.go() == two.go()
    assert one.now <= 3600


def test_a_killed_run_goes_on_with_its_schedule_and_its_time():
    whole = Run("100s")
    steps = whole.go()
    for dies_at in (25, 45, 65):
        killed = Run("100s")
        killed.go(dies_at=dies_at)
        at, known = killed.saved
        assert at == dies_at - 5
        assert killed.go() == steps
        assert killed.saved == whole.saved
        assert known["refits"] == whole.refits[: len(known["refits"])]
        assert known["seconds"] + killed.now == pytest.approx(whole.now)


def test_the_time_of_earlier_processes_and_of_starting_again_counts():
    killed = Run("100s")
    killed.go(dies_at=45)
    spent = killed.saved[1]["seconds"]
    late = Run("100s")
    late.saved = killed.saved
    assert 60 <= killed.go(start=20.0) <= 75
    assert spent + killed.now <= 100
    # No time is left at all: what was reached is evaluated.
    assert late.go(start=70.0) == 40


def test_tokens_are_a_budget_too():
    run = Run("20k tokens")
    run.go()
    assert 19_500 <= run.tokens <= 20_000


def test_a_budget_too_short_says_what_takes_how_long():
    with pytest.raises(ConfigError, match=r"train\.budget 30s is too short: starting took 40 s"):
        Run("30s").go(start=40.0)
    with pytest.raises(ConfigError, match="starting took 41 s, a step takes 2 s") as caught:
        Run("45s", 2.0).go(start=38.0)
    assert "train.budget='5m' or more" in caught.value.fix


def test_what_is_no_budget_is_an_error_at_the_door():
    with pytest.raises(ConfigError, match=r"train\.budget '500M' is no amount"):
        Run("500M")


class World:
    """Where training is real, and time is what it says: a second a step, two a save."""

    def __init__(self):
        self.now = 0.0
        self.steps = 0
        self.programs: list = []

    def train(self, config, workdir: Path, monkeypatch, dies_at: int = -1) -> dict:
        """`fit`; step `dies_at` of this process is never done."""
        begins, done = self.now, 0
        make, save = aot.jit_train, train.Checkpoints.save

        def jit_train(*given):
            program = make(*given)
            self.programs.append(program)

            def step(*inputs):
                nonlocal done
                done += 1
                if done == dies_at:
                    raise KeyboardInterrupt
                self.now += 1.0
                return program(*inputs)

            return step

        def slow_save(*given, **named):
            save(*given, **named)
            self.now += 2.0

        with monkeypatch.context() as patch:
            patch.setattr(aot, "jit_train", jit_train)
            patch.setattr(train.Checkpoints, "save", slow_save)
            return train.fit(config, workdir, clock=lambda: self.now - begins)


def used(workdir: Path, step: int) -> dict:
    manifest = json.loads((workdir / "checkpoints" / str(step) / "jaxtune.json").read_text())
    return manifest["meta"]["progress"]["used"]


def rates(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["lr"] for row in numbers(workdir) if row["split"] == "train"}


def test_training_follows_bit_for_bit_after_a_kill_too(inputs, tmp_path, monkeypatch):
    limited = settings(
        inputs, train__budget="26s", train__steps=1000, train__log_every=1, eval__every=0,
        checkpoint__every=6, checkpoint__keep=9,
    )  # fmt: skip
    world = World()
    steps = world.train(limited, tmp_path / "whole", monkeypatch)["steps"]
    assert 12 <= steps <= 18
    assert world.now <= 26
    assert (tmp_path / "whole" / "checkpoints" / str(steps)).is_dir()
    decided = used(tmp_path / "whole", steps)["refits"]
    warmup = decided[-1][2]
    assert decided[-1][1] == steps
    # The rates are those of a cosine over as many steps, with the warm-up of as many.
    cosine = optim.SCHEDULES.index("cosine")
    for step in (steps, steps - 3):
        share = float(optim.share_of_peak(cosine, step - 1, warmup, steps, 0.1))
        assert rates(tmp_path / "whole")[step] == pytest.approx(1e-2 * share, rel=1e-5)
    assert [program._cache_size() for program in world.programs] == [1]  # nothing compiled again

    with pytest.raises(KeyboardInterrupt):
        World().train(limited, tmp_path / "killed", monkeypatch, dies_at=12)
    again = World().train(limited, tmp_path / "killed", monkeypatch)
    assert again["steps"] == steps
    assert used(tmp_path / "killed", steps) == used(tmp_path / "whole", steps)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "killed", steps) == weights(tmp_path / "whole", steps)


@pytest.mark.slow
def test_two_hosts_follow_the_first_ones_clock(inputs, tmp_path):
    from tests.test_pods import PATIENCE, flags

    limits = {"train__steps": "100000", "train__budget": "60s", "checkpoint__every": "50",
              "eval__every": "0"}  # fmt: skip
    ended = host.ends(host.start(2, 2, flags(inputs, tmp_path, **limits)), PATIENCE)
    assert [code for code, _, _ in ended] == [0, 0], ended
    result = json.loads((tmp_path / "result.json").read_text())
    assert 10 < result["steps"] < 100_000
    assert result["seconds"] <= 60
    assert used(tmp_path, result["steps"])["refits"][-1][1] == result["steps"]
