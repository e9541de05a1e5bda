"""The cores as devices: when, that weights are in memory once, and that a run stays the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune import assemble, config, cores, sharding
from jaxtune.config import MeshConfig, choice
from jaxtune.train import fit
from tests.test_train import _newest, _wait_for, numbers, settings, weights

PATIENCE = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=86400"
)
QUIET = {"JAX_PLATFORMS": "cpu", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


@pytest.fixture
def before_jax(monkeypatch: pytest.MonkeyPatch):
    """As in a process that has not imported jax, on a machine of so many cores."""

    def on(machine: int) -> None:
        monkeypatch.setattr(cores, "alike", lambda: machine)

    monkeypatch.setattr(cores, "_count", 1)
    monkeypatch.delitem(sys.modules, "jax")
    return on


def asked(**changes) -> config.Config:
    """A config of LoRA with batches of eight, and these keys changed."""
    values = config.Config().to_dict()
    values["lora"]["r"], values["train"]["batch_size"] = 4, 8
    for key, value in changes.items():
        group, name = key.split("__")
        values[group][name] = value
    return config.freeze(values)


def test_each_core_is_a_device_where_they_share_out_the_rows(before_jax):
    before_jax(2)
    environment = dict(QUIET)
    assert cores.share(asked(), environment=environment) == 2
    assert environment == QUIET | {
        "JAX_NUM_CPU_DEVICES": "2",
        "PJRT_NPROC": "1",
        "XLA_FLAGS": PATIENCE,
    }
    assert cores.count() == 2


def test_with_more_cores_than_divide_the_rows_threads_remain(before_jax):
    before_jax(3)
    environment = QUIET | {"XLA_FLAGS": "--xla_dump_to=there"}
    assert cores.share(asked(), environment=environment) == 2
    assert environment == QUIET | {
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": f"{PATIENCE} --xla_dump_to=there",
    }


@pytest.mark.parametrize(
    ("changes", "environment"),
    [
        ({"train__batch_size": 7}, {}),
        ({"train__batch_size": 8, "train__grad_accum": 8}, {}),
        ({"lora__r": 0}, {}),
        ({"mesh__tensor": 2}, {}),
        ({}, {"JAX_PLATFORMS": "tpu"}),
        ({}, {"JAX_NUM_CPU_DEVICES": "1"}),
        ({}, {"PJRT_NPROC": "2"}),
        ({}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}),
        ({}, {"XLA_FLAGS": "flags.txt"}),
        ({}, {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}),
    ],
)
def test_elsewhere_nothing_is_changed(before_jax, changes, environment):
    before_jax(4 if changes.get("train__batch_size") != 7 else 6)
    given = QUIET | environment
    found = dict(given)
    assert cores.share(asked(**changes), environment=found) == 1
    assert found == given
    assert cores.count() == 1


def test_devices_are_not_many_more_than_pay_for_their_own_adapters(before_jax):
    before_jax(64)
    environment = dict(QUIET)
    assert cores.share(asked(train__batch_size=64), environment=environment) == 8
    assert "PJRT_NPROC" not in environment


@pytest.mark.parametrize("hybrid", ["arm", "intel", ""])
def test_cores_of_two_kinds_do_not_wait_for_each_other(tmp_path, monkeypatch, hybrid):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for number, capacity in enumerate(("1024", "446") if hybrid == "arm" else ("1024", "1024")):
        folder = tmp_path / f"system/cpu/cpu{number}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text(capacity)
    if hybrid == "intel":
        (tmp_path / "cpu_atom").mkdir()
    assert cores.alike(tmp_path) == (1 if hybrid else 3)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.alike(tmp_path) == 1


def test_nothing_is_changed_once_jax_is_there(before_jax, monkeypatch):
    before_jax(2)
    monkeypatch.setitem(sys.modules, "jax", jax)
    assert cores.share(asked(), environment=dict(QUIET)) == 1


@pytest.mark.parametrize(
    ("space", "batch", "devices"),
    [
        ({}, 8, 4),  # its own space has batches of four too
        ({}, 6, 3),
        ({}, 3, 3),
        ({"optim.lr": choice(1e-3)}, 8, 8),
        ({"train.batch_size": choice(4, 6)}, 8, 2),
        ({"train.batch_size": choice(4, "x")}, 8, 1),  # refused later, in words
        ({"train.batch_size": 3}, 8, 1),
    ],
)
def test_a_sweep_has_devices_for_its_smallest_batch(before_jax, space, batch, devices):
    before_jax(8)
    found = asked(sweep__space=space, train__batch_size=batch)
    assert cores.share(found, search=True, environment=dict(QUIET)) == devices


def test_a_sweep_of_accumulated_batches_needs_no_smaller_micro_batch(before_jax):
    before_jax(8)
    found = asked(train__batch_size=8, train__grad_accum=4)
    assert cores.share(found, search=True, environment=dict(QUIET)) == 2


def test_the_devices_are_copies_of_the_model_unless_a_mesh_is_asked_for(monkeypatch):
    monkeypatch.setattr(cores, "_count", 8)
    assert sharding.make_mesh(MeshConfig()).shape["data"] == 8
    assert sharding.make_mesh(MeshConfig(tensor=2)).shape["fsdp"] == 4
    monkeypatch.setattr(cores, "_count", 1)
    assert sharding.make_mesh(MeshConfig()).shape["fsdp"] == 8


@pytest.mark.parametrize("changes", [{}, {"model__quantize": "int8"}])
def test_copies_of_the_base_are_the_same_memory(inputs, changes):
    mesh = sharding.make_mesh(MeshConfig(data=8, fsdp=1))
    found = settings(inputs, **changes)
    base = assemble.base(assemble.assemble(found, inputs / "base", mesh))
    assert any(leaf.dtype == np.int8 for leaf in base.values()) == bool(changes)
    for path, leaf in base.items():
        places = [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
        assert len(places) == 8, path
        assert len(set(places)) == 1, path


PAGE = """
from jaxtune.config import default_config


def get_config():
    config = default_config()
    for group, changes in {changes!r}.items():
        config[group].update(changes)
    return config
"""
COMMAND = "import sys; from jaxtune.cli import main; sys.exit(main())"


def started(inputs: Path, workdir: Path) -> subprocess.Popen[str]:
    """`jaxtune train` as a person starts it, without the eight devices of the tests."""
    defaults, own = config.Config().to_dict(), settings(inputs).to_dict()
    groups = {name: values for name, values in own.items() if isinstance(values, dict)}
    changes = {
        name: {key: value for key, value in values.items() if value != defaults[name][key]}
        for name, values in groups.items()
    }
    page = workdir.with_suffix(".py")
    page.write_text(PAGE.format(changes=changes))
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "train", f"--config={page}", f"--workdir={workdir}"],
        cwd=Path(__file__).parents[1],
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        text=True,
        stderr=subprocess.PIPE,
    )


def test_a_run_on_all_cores_is_the_same_run_killed_or_not(inputs, tmp_path):
    expected = max(n for n in range(1, min(cores.alike(), 8) + 1) if 8 % n == 0)
    whole = started(inputs, tmp_path / "whole")
    _, said = whole.communicate(timeout=240)
    assert whole.returncode == 0, said
    assert f" on {expected} core" in said or expected == 1
    killed = started(inputs, tmp_path / "killed")
    _wait_for(lambda: _newest(tmp_path / "killed") >= 3, killed)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    again = started(inputs, tmp_path / "killed")
    _, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "killed", 12) == weights(tmp_path / "whole", 12)

    fit(settings(inputs), tmp_path / "shards")  # on eight devices, each with a shard of the base
    for one, other in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "shards"), strict=True):
        assert one.keys() == other.keys()
        assert one == {
            key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            for key, value in other.items()
        }
