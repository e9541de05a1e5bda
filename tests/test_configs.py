"""Every shipped config is compiled by the TPU compiler for the topology it states, and fits."""

from pathlib import Path

import pytest

from jaxtune import config
from jaxtune.errors import ConfigError
from jaxtune.plan import command, facts, topologies

ROOT = Path(__file__).parents[1] / "configs"


def _stated() -> dict[str, str]:
    """{file: topology} of the configs that are for one."""
    found = {}
    for file in sorted(ROOT.glob("*.py")):
        try:
            found[file.name] = command.stated_topology(str(file))
        except ConfigError:
            assert file.stem in ANYWHERE, f"{file.name} states no TOPOLOGY"
    return found


# Pages for any model on any machine.
ANYWHERE = {"classify", "full", "lora", "quickstart"}
STATED = _stated()
SMALLEST = "xlmr_classify.py"

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


def test_topologies_are_written_as_the_console_has_them():
    assert {topologies.find(name).name for name in STATED.values()} == set(STATED.values())
    assert len(STATED) >= 10


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == SMALLEST else pytest.mark.slow) for n in STATED],
)
def test_it_fits_the_topology_it_is_for(name, monkeypatch):
    kept = facts.cache_folder().parent / "tests" / "plan"  # not the user's own
    monkeypatch.setattr(facts, "cache_folder", lambda: kept)
    page = config.load(str(ROOT / name), {})
    result = command.plan(page, STATED[name])
    assert result["fits"]
    assert result["parts_gib"]["free"] > 0
    ratio = result["flops_per_token_hlo"] / result["flops_per_token"]
    assert 0.95 < ratio < 1.1
