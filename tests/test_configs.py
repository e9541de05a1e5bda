"""Every shipped config is compiled by the TPU compiler for the topology it states, and fits."""

from pathlib import Path

import pytest

from jaxtune import config
from jaxtune.demo import prepare
from jaxtune.plan import command, facts, topologies

ROOT = Path(__file__).parents[1] / "configs"
STATED = {file.name: command.stated_topology(str(file)) for file in sorted(ROOT.glob("*.py"))}
# What the pages for any model are tried with.
MODELS = {
    "lora.py": "google/gemma-3-12b-it",
    "full.py": "meta-llama/Llama-3.2-3B",
    "classify.py": "FacebookAI/xlm-roberta-base",
}
SMALLEST = "quickstart.py"

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


def test_topologies_are_written_as_the_console_has_them():
    assert {topologies.find(name).name for name in STATED.values()} == set(STATED.values())
    assert len(STATED) >= 16


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == SMALLEST else pytest.mark.slow) for n in STATED],
)
def test_it_fits_the_topology_it_is_for(name, monkeypatch, tmp_path):
    kept = facts.cache_folder().parent / "tests" / "plan"  # not the user's own
    monkeypatch.setattr(facts, "cache_folder", lambda: kept)
    overrides = {"model.path": MODELS[name]} if name in MODELS else {}
    if name == SMALLEST:
        prepare.write_random_llama(tmp_path)
        overrides = {"model.path": str(tmp_path)}
    result = command.plan(config.load(str(ROOT / name), overrides), STATED[name])
    assert result["fits"]
    assert result["parts_gib"]["free"] > 0
    ratio = result["flops_per_token_hlo"] / result["flops_per_token"]
    assert 0.95 < ratio < 1.1
