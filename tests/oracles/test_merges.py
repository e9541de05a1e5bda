"""`jaxtune convert` merges adapters that peft wrote as peft itself does."""

from typing import Any

import numpy as np
import peft
import pytest
import torch

from jaxtune.hf import files
from jaxtune.hf.convert import convert
from tests.oracles import families


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_a_merge_equals_pefts(tmp_path, family, dora):
    """Ranks and alphas of single modules, rank-stabilised; then reopened by transformers."""
    name = families.of_family(family)[0]
    base = families.write(tmp_path / "base", name)
    model = families.load(base)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        use_dora=dora,
        use_rslora=True,
        rank_pattern={r"1\..*": 2},
        alpha_pattern={r"0\..*": 7},
        fan_in_fan_out=family == "gpt2",
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for key, value in tuned.named_parameters():
            if "lora_" in key:
                value += 0.05 * torch.randn_like(value)
    tuned.save_pretrained(tmp_path / "adapter")
    merged: Any = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    written = convert(str(base), tmp_path / "ours", adapter=str(tmp_path / "adapter"))
    assert written.changed
    theirs, ours = (files.tensors(tmp_path / side) for side in ("theirs", "ours"))
    for tensor in theirs:
        np.testing.assert_allclose(
            ours[tensor].read(), theirs[tensor].read(), rtol=1e-4, atol=1e-6, err_msg=tensor
        )
    families.load(tmp_path / "ours")
