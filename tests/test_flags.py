"""Flags by generation: the real TPU compiler takes each, and what a user set stays."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune import flags
from jaxtune.flags import Chips

COMPILE = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtune import flags

name = sys.argv[1]
devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
mesh = Mesh(np.array(devices), ("x",))
cut = NamedSharding(mesh, PartitionSpec("x"))
a = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=cut)
options = flags.compiler_options(devices[0].device_kind)
assert options, devices[0].device_kind
jax.jit(lambda a, b: jnp.tanh(a @ b).sum()).lower(a, a).compile(compiler_options=options)
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu to compile with")
@pytest.mark.parametrize(
    "topology",
    [
        "v5e:2x4",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
        ],
    ],
)
def test_the_compiler_takes_every_flag_of_a_generation(topology):
    own = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology], env=os.environ | own,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["compiled"], done.stderr[-1500:]


def test_flags_a_user_named_stay_and_others_are_added():
    given = "--xla_tpu_enable_data_parallel_all_reduce_opt=false --mine=1"
    found = flags.libtpu_arguments("v6e", given).split()
    assert found[:2] == given.split()
    names = [word.partition("=")[0] for word in found]
    assert len(names) == len(set(names))
    assert {f"--{name}" for name in flags.compiler_options("TPU v6 lite")} <= set(names)
    assert flags.libtpu_arguments("v99", "--a=1") == "--a=1"


def test_a_variable_that_is_set_stays():
    environment = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere", "XDG_CACHE_HOME": "/caches"}
    found = flags.defaults(environment, Chips(0, ""), gpu=False)
    assert "JAX_COMPILATION_CACHE_DIR" not in found
    assert found["JAX_CPU_ENABLE_ASYNC_DISPATCH"] == "false"
    assert "LIBTPU_INIT_ARGS" not in found
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in found
    here = flags.defaults({"XDG_CACHE_HOME": "/caches"}, Chips(0, ""), gpu=True)
    assert here["JAX_COMPILATION_CACHE_DIR"] == "/caches/jaxtune/jax"
    assert here["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    chips = flags.defaults({"LIBTPU_INIT_ARGS": "--a=1"}, Chips(8, "v5e"), gpu=False)
    assert chips["LIBTPU_INIT_ARGS"].startswith("--a=1 --xla")


def test_a_machine_with_libtpu_and_no_chip_does_not_look_for_one():
    plain = Chips(0, "")
    assert flags.defaults({}, plain, gpu=False, libtpu=True)["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in flags.defaults({}, plain, gpu=False, libtpu=False)
    assert "JAX_PLATFORMS" not in flags.defaults({}, plain, gpu=True, libtpu=True)
    assert "JAX_PLATFORMS" not in flags.defaults({}, Chips(4, "v4"), gpu=False, libtpu=True)


def test_chips_are_found_on_the_bus(tmp_path: Path):
    for number, (vendor, device) in enumerate(
        [("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x8086", "0x0063"), ("0x1ae0", "0xabcd")]
    ):
        folder = tmp_path / f"0000:00:0{number}.0"
        folder.mkdir()
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    assert flags.tpu_chips(tmp_path) == Chips(2, "v5e")
    assert flags.tpu_chips(tmp_path / "none") == Chips(0, "")
