"""Random adapters of random checkpoints, as peft makes them."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from tests.oracles.families import load

BLOCKS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")  # peft's all-linear fails there


def random_adapter(
    base: Path, targets: str | tuple[str, ...], *, classifier: bool, **settings: Any
) -> peft.PeftModel:
    """A peft model, alpha 5, in which everything that training would change is random."""
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        lora_alpha=5,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=False,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        model = peft.get_peft_model(load(base), lora).eval()  # type: ignore[arg-type]  # torch's
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_magnitude" in name:
                values.mul_(1 + 0.1 * torch.randn_like(values))
            elif "lora_" in name or "modules_to_save" in name:
                values.copy_(0.15 * torch.randn_like(values))
    return model
