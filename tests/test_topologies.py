"""Names of TPU slices, and what their chips can do."""

import math
import os
import subprocess
import sys

import pytest
from jax._src.pallas.mosaic import tpu_info

from jaxtune.errors import ConfigError
from jaxtune.plan import topologies
from jaxtune.plan.topologies import CHIPS, find

FORMS = {
    # console name -> (raw, slices, chips, devices of jax)
    "v5litepod-1": ("v5e:1x1", 1, 1, 1),
    "v5litepod-8": ("v5e:2x4", 1, 8, 8),
    "v5litepod-256": ("v5e:16x16", 1, 256, 256),
    "v6e-16": ("v6e:4x4", 1, 16, 16),
    "v5p-8": ("v5p:2x2x1", 1, 4, 4),
    "v5p-64": ("v5p:2x4x4", 1, 32, 32),
    "v4-32": ("v4:2x2x4", 1, 16, 16),
    "v3-8": ("v3:2x2", 1, 4, 8),
    "tpu7x-8": ("tpu7x:2x2x1", 1, 4, 8),
    "2xv5litepod-16": ("v5e:4x4", 2, 32, 32),
    "v5e:2x4": ("v5e:2x4", 1, 8, 8),
    "v5p:4x4x12": ("v5p:4x4x12", 1, 192, 192),
}


@pytest.mark.parametrize("name", FORMS)
def test_names_and_their_devices(name):
    topology = find(name)
    raw, slices, chips, count = FORMS[name]
    assert (topology.raw, topology.slices, topology.chips) == (raw, slices, chips)
    devices = topologies.devices(topology)
    assert len(devices) == count == chips * topology.chip.devices
    assert {device.platform for device in devices} == {"tpu"}
    assert len({getattr(device, "slice_index", 0) for device in devices}) == slices


def test_every_name_is_one_that_libtpu_knows():
    for name, topology in topologies.named().items():
        assert find(name) == topology
        assert len(topologies.devices(topology)) == topology.chips * topology.chip.devices
        assert int(name.split("-")[1]) == math.prod(topology.shape) * topology.chip.cores


def test_a_raw_name_is_shown_by_the_consoles():
    assert find("v5e:2x4").name == find("v5e-8").name == find("V5LITEPOD-8").name == "v5litepod-8"
    assert find("2xv5e:4x4").name == "2xv5litepod-16"
    assert find("v7x-8") == find("tpu7x-8")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("v5litepod-9", "v5litepod-8"), ("v6-8", "v6e-8"), ("v5p-65", "v5p-64"), ("v5e:2x", "v5e:2x")],
)
def test_a_wrong_name_is_told_what_was_meant(name, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        find(name)


@pytest.mark.parametrize("name", ["", "0xv5e-8", "h100", "v5e:0x4", "2x4"])
def test_what_is_no_topology(name):
    with pytest.raises(ConfigError, match="is not known"):
        find(name)


def test_one_slice_has_one_name():
    for name in ("v5e:2x4x1", "v5e:4x2", "2xv5e:4x2x1", "v5e:1x1x1"):
        slices = 2 if name.startswith("2x") else 1
        chips = 1 if name == "v5e:1x1x1" else 8
        found = find(name)
        assert (found.slices, found.name[-1]) == (slices, str(chips))
        assert found.raw == ("v5e:2x4" if chips == 8 else "v5e:1x1")
    assert find("v5p:2x2").name == find("v5p:1x2x2").name == "v5p-8"
    assert find("v4:4x2x2").raw == "v4:2x2x4"


@pytest.mark.parametrize(
    ("name", "shape", "there"),
    [
        ("v5e:2x3", "v5e:2x3", "v5e has 1x1, 2x2, 2x4, 4x4"),
        ("v5e:1x2", "v5e:1x2", "2x2"),
        ("v5e:2x2x2", "v5e:2x2x2", "2x4"),
        ("v6e:6x4", "v6e:4x6", "4x8"),
        ("v5p:3x5x7", "v5p:3x5x7", "2x2x1, 2x2x2, "),
        ("v4:2x2x3", "v4:2x2x3", "or whole cubes such as 4x4x12"),
    ],
)
def test_a_shape_that_nobody_has_names_those_there_are(name, shape, there):
    with pytest.raises(ConfigError, match=f"there is no slice {shape}") as refused:
        find(name)
    assert there in refused.value.fix
    assert "INVALID_ARGUMENT" not in refused.value.line()


def test_a_slice_that_this_libtpu_does_not_build():
    odd = topologies.Topology("v5p:3x5x7", CHIPS["v5p"], (3, 5, 7), 1)
    with pytest.raises(ConfigError, match="libtpu has no v5p:3x5x7: Topology") as refused:
        topologies.devices(odd)
    assert "INVALID_ARGUMENT" not in str(refused.value)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxtune\[tpu\]'"):
        topologies.devices(find("v5litepod-8"))


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_are_those_that_jax_ships(name):
    """Their table is for one core; a chip has `cores` of them."""
    chip = CHIPS[name]
    version = tpu_info.ChipVersion(name.removeprefix("tpu"))
    info = tpu_info._get_tpu_info_impl(version, 1)
    assert version.num_physical_tensor_cores_per_chip == chip.cores
    assert version.supports_megacore == (chip.cores == 2 and chip.devices == 1)
    theirs = (
        info.bf16_ops_per_second,
        info.int8_ops_per_second,
        info.fp8_ops_per_second,
        info.mem_bw_bytes_per_second,
    )
    ours = (chip.bf16, chip.int8, chip.fp8, chip.hbm)
    assert [each * chip.cores for each in theirs] == pytest.approx(ours, rel=1e-6)


def test_libtpu_says_nothing_to_people():
    """In a process of its own, since libtpu speaks once, when it is loaded."""
    program = (
        "from jaxtune.plan import topologies as t; "
        "from jaxtune import aot; "
        "print(aot.memory_of(t.devices(t.find('v5litepod-8'))[0]))"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "ALLOW_", "LIBTPU"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert int(done.stdout) == int(15.75 * 2**30)
