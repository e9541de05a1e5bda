"""What tests/benchmarks/gpu.py reads and how it judges; its sides need a GPU, or --size tiny."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from jaxtune.hf import files
from jaxtune.models import families

# As `python tests/benchmarks/gpu.py` finds its modules.
gpu, gpu_inputs = map(importlib.import_module, ("gpu", "gpu_inputs"))


def _side(losses: list[float]) -> dict:
    seconds = [9.0] * gpu.WARM + [0.5] * (len(losses) - gpu.WARM)
    return {"seconds": seconds, "losses": losses, "device": "H200", "memory": 0, "note": ""}


@pytest.mark.parametrize(
    ("ours", "agree"),
    [
        ([6.0, 5.9, 5.8, 5.7, 5.6, 5.5], True),
        ([6.0, 5.9, 5.8, 5.7, 5.6, 5.4], False),  # another training
        ([6.0, 5.9, 5.8, 5.7, 5.6, float("nan")], False),
    ],
)
def test_there_is_a_ratio_only_of_the_same_training(capsys, ours, agree):
    found = {"jaxtune": _side(ours), "trl": _side([6.0, 5.9, 5.8, 5.7, 5.6, 5.5])}
    assert gpu.report("8b", 4096, 2e-3, found) is agree
    out = capsys.readouterr().out
    assert ("ratio 1.00 (" in out) == agree
    assert ("ratio void (" in out) == (not agree)
    assert f"MFU(4N) {8192 * gpu.flops('8b') / 989e12:.1%}" in out


def test_sides_that_learn_nothing_do_not_agree(capsys):
    found = {name: _side([6.0, 6.0, 6.0, 6.0, 6.0, 6.0]) for name in ("jaxtune", "trl")}
    assert not gpu.report("8b", 4096, 2e-3, found)


def test_a_token_of_an_8b_costs_four_times_its_matrices():
    assert gpu.numbers("8b") == 8_030_261_248 - 65 * 4096  # of Llama 3.1 8B, without its norms
    assert gpu.flops("8b") == 4 * (8_030_261_248 - 65 * 4096 - 128256 * 4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_find_the_checkpoint_they_expect(tmp_path, dtype):
    hf = gpu.config_of("tiny", 64)
    gpu_inputs.write_base(tmp_path / "base", hf, dtype)
    found = files.tensors(tmp_path / "base")
    assert sum(np.prod(t.shape) for t in found.values()) == gpu.numbers("tiny") + 5 * 128
    assert {t.dtype.name for t in found.values()} == {dtype}
    _, model = families.read(hf)
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (2, 2, 32)
    again = gpu_inputs.tensor((256, 128), 3, dtype)
    assert np.array_equal(again, gpu_inputs.tensor((256, 128), 3, dtype))
    assert again.astype(np.float32).std() == pytest.approx(0.02, rel=0.02)
