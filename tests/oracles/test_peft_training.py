"""Thirty steps of LoRA training beside transformers + peft: the same loss at every step."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch: make test installs it")
peft = pytest.importorskip("peft", reason="the oracle needs peft: make test installs it")
from transformers import AutoModelForCausalLM

from jaxtune import assemble, config, setup, sharding, step
from jaxtune.data.packing import Batch
from tests import tiny

STEPS, ROWS, WIDTH, RATE = 30, 8, 16, 5e-3


def batches() -> list[Batch]:
    """Random rows of unequal length, padded on the right, with a prompt that bears no loss."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        tokens = rng.integers(1, 64, (ROWS, WIDTH)).astype(np.int32)
        length = rng.integers(8, WIDTH + 1, (ROWS, 1))
        at = np.arange(WIDTH)
        real = at < length
        weights = ((at >= 3) & (at < length - 1)).astype(np.float32)
        tokens = np.where(real, tokens, 0).astype(np.int32)
        targets = np.roll(tokens, -1, axis=1)
        positions = np.where(real, at, 0).astype(np.int32)
        made.append(Batch(tokens, targets, weights, positions, real.astype(np.int32)))
    return made


def of_peft(base, adapter, settings) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.optim.weight_decay
    )
    losses = []
    for batch in batches():
        # transformers shifts labels itself: the label of a token is set where it is predicted.
        labels = np.full((ROWS, WIDTH), -100)
        labels[:, 1:][batch.weights[:, :-1] > 0] = batch.targets[:, :-1][batch.weights[:, :-1] > 0]
        out = model(
            input_ids=torch.tensor(batch.tokens, dtype=torch.long),
            attention_mask=torch.tensor(batch.segments),
            labels=torch.tensor(labels),
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.optim.clip_norm)
        optimizer.step()
        losses.append(float(out.loss.detach()))
    return losses


def of_jaxtune(base, adapter, settings) -> list[float]:
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    assembly = assemble.assemble(settings, base, mesh)
    program = setup.program(settings, assembly, STEPS)
    state, frozen = setup.initial(settings, assembly, program, mesh)
    train = step.jit_train(program, state)
    losses = []
    with jax.set_mesh(mesh):
        for batch in setup.to_mesh(batches(), mesh):
            state, measured = train(state, frozen, batch)
            losses.append(float(measured.loss.total / measured.loss.weight))
    return losses


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_thirty_steps_of_adamw_equal_pefts(tmp_path, weight_decay):
    base = tiny.write(tmp_path / "base", hidden_size=32, num_attention_heads=4, head_dim=6)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shape = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, shape)
    model.save_pretrained(tmp_path / "adapter")

    values = config.Config().to_dict()
    values["model"] |= {"path": str(base), "dtype": "float32", "param_dtype": "float32"}
    values["lora"] |= {"r": 4, "alpha": 8.0, "init": str(tmp_path / "adapter")}
    values["optim"] |= {
        "lr": RATE, "schedule": "constant", "warmup": 0, "weight_decay": weight_decay,
    }  # fmt: skip
    values["train"]["batch_size"] = ROWS
    settings = config.freeze(values)
    theirs = of_peft(base, tmp_path / "adapter", settings)
    ours = of_jaxtune(base, tmp_path / "adapter", settings)
    assert theirs[-1] < theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
