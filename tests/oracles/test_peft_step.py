"""One LoRA step beside transformers + peft: the same gradients and the same adapters after it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from jaxtune import assemble, config, setup, sharding, step
from jaxtune.data.packing import Batch
from jaxtune.hf.adapter import write_adapter
from tests.oracles.adapters import BLOCKS, random_adapter
from tests.oracles.families import SCORED, write

ROWS, WIDTH, RATE, EPS = 4, 24, 5e-3, 1e-3  # an eps that damps what is left of tiny gradients
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Run(NamedTuple):
    targets: str | tuple[str, ...] = "all-linear"
    head: tuple[str, ...] = ()  # modules of a classifier, trained in full
    changes: dict[str, Any] = {}  # noqa: RUF012  # of the checkpoint's config; never written to
    lora: dict[str, Any] = {}  # noqa: RUF012  # settings both sides know under one name


RUNS: dict[str, tuple[str, Run]] = {
    "llama": ("llama-biases_llama3", Run()),
    "llama_tied": ("llama-odd_heads_tied", Run(lora={"use_rslora": True})),
    "llama_dora": ("llama-biases_llama3", Run(lora={"use_dora": True})),
    "qwen3": ("qwen3-wide_heads", Run()),
    "gemma2": ("gemma2-even_caps", Run()),
    "gemma3": ("gemma3-seven_layers", Run()),
    "phi3": ("phi3-partial", Run()),
    "phi3_dora": ("phi3-longrope", Run(lora={"use_dora": True})),
    "olmo2": ("olmo2-one_kv", Run()),
    "smollm3": ("smollm3-windows", Run()),
    "gpt2": ("gpt2-plain", Run()),
    "gpt2_dora": ("gpt2-hub", Run(lora={"use_dora": True})),
    "mixtral": ("mixtral-full", Run(ATTENTION)),
    "mixtral_aux": (
        "mixtral-full",
        Run(ATTENTION, changes={"output_router_logits": True, "router_aux_loss_coef": 0.5}),
    ),
    "qwen3_moe": ("qwen3_moe-mixed", Run(ATTENTION)),
    "bert": ("bert-plain", Run(head=("classifier",))),
    "distilbert": ("distilbert-plain", Run(BLOCKS, ("pre_classifier", "classifier"))),
    "roberta": ("roberta-plain", Run(head=("classifier",))),
    "modernbert": ("modernbert-cls", Run(head=("classifier",))),
    "llama_score": ("llama-score", Run(head=("score",))),
    "gemma3_score": ("gemma3-score", Run(head=("score",))),
}


def _batch(classes: int, causal: bool) -> Batch:
    """Rows of unequal length, padded on the right; a prompt bears no loss."""
    rng, at = np.random.default_rng(0), np.arange(WIDTH)
    length = np.array([[WIDTH], [17], [9], [20]])
    real = at < length
    tokens = np.where(real, rng.integers(3, 90, (ROWS, WIDTH)), 0).astype(np.int32)
    positions = np.where(real, at, 0).astype(np.int32)
    if classes:
        pooled = at == (length - 1 if causal else np.zeros_like(length))
        targets = np.where(pooled, rng.integers(0, classes, (ROWS, 1)), 0).astype(np.int32)
        weights = pooled.astype(np.float32)
    else:
        targets = np.roll(tokens, -1, axis=1)
        weights = ((at >= 3) & (at < length - 1)).astype(np.float32)
    return Batch(tokens, targets, weights, positions, real.astype(np.int32))


def _of_peft(model: peft.PeftModel, batch: Batch, run: Run) -> tuple[dict, dict]:
    """(gradients, adapters after one step of AdamW), by the names peft saves them under."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    where = batch.weights > 0
    if run.head:
        labels = torch.tensor(batch.targets[where], dtype=torch.long)
    else:  # transformers shifts labels itself: a token's label is set where it is predicted
        shifted = np.full((ROWS, WIDTH), -100)
        shifted[:, 1:][where[:, :-1]] = batch.targets[:, :-1][where[:, :-1]]
        labels = torch.tensor(shifted)
    model(input_ids=tokens, attention_mask=torch.tensor(batch.segments), labels=labels
          ).loss.backward()  # fmt: skip
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {}
    for name, values in trained.items():
        assert values.grad is not None, name
        gradients[_saved(name)] = values.grad.numpy().copy()
    optimizer = torch.optim.AdamW(list(trained.values()), lr=RATE, eps=EPS, weight_decay=0.0)
    optimizer.step()
    return gradients, {_saved(name): p.detach().numpy() for name, p in trained.items()}


def _saved(name: str) -> str:
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "lora_magnitude" in name else name


def _of_jaxtune(
    base: Path, adapter: Path, batch: Batch, run: Run, classes: int, out: Path
) -> tuple[dict, dict]:
    """The same of jaxtune, brought to peft's names by its own writer of adapters."""
    values = config.Config().to_dict()
    values["task"] = "classify" if run.head else "sft"
    if run.head:
        values["data"]["labels"] = [f"LABEL_{i}" for i in range(classes)]
    values["model"] |= {"path": str(base), "dtype": "float32", "param_dtype": "float32"}
    values["lora"] |= {"r": 3, "alpha": 5.0, "init": str(adapter), **run.lora}
    values["lora"]["target_modules"] = run.targets
    values["lora"]["modules_to_save"] = run.head
    values["optim"] |= {
        "lr": RATE, "schedule": "constant", "warmup": 0, "eps": EPS, "clip_norm": 0.0,
    }  # fmt: skip
    values["train"]["batch_size"] = ROWS
    settings = config.freeze(values)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    assembly = assemble.assemble(settings, base, mesh)
    program = setup.program(settings, assembly, 1)
    state, frozen = setup.initial(settings, assembly, program, mesh)

    with jax.set_mesh(mesh):
        (placed,) = setup.to_mesh([batch], mesh)
        after, _ = step.jit_train(program, state)(state, frozen, placed)
    after = jax.device_get(after)
    moments = {  # Adam's first moment after one step is 1 - b1 times the gradient
        where[-1].key: leaf / (1 - settings.optim.b1)
        for where, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
        if ".mu" in jax.tree_util.keystr(where)
    }
    gradients = {path: moments[path] for path in after.trainable}
    named = []
    for name, leaves in (("gradients", gradients), ("after", after.trainable)):
        pieces = (out / name, base, assembly.family, assembly.model, leaves)
        write_adapter(*pieces, lora=settings.lora, base_name=str(base))
        named.append(load_file(out / name / "adapter_model.safetensors"))
    return named[0], named[1]


def _apart(found: dict, wanted: dict) -> dict[str, float]:
    """{tensor: largest difference over its largest value} of those off by more than 1e-4."""
    off = {
        name: np.abs(found[name] - values).max() / np.abs(values).max()
        for name, values in wanted.items()
    }
    return {name: worst for name, worst in off.items() if not worst <= 1e-4}  # nor NaN


SLOW = {"llama_tied", "gemma2", "phi3_dora", "olmo2", "smollm3", "mixtral", "qwen3_moe"}
SLOW |= {"distilbert", "gemma3_score"}


@pytest.mark.parametrize(
    "which", [pytest.param(run, marks=[pytest.mark.slow] * (run in SLOW)) for run in RUNS]
)
def test_one_step_equals_pefts(tmp_path, which):
    name, run = RUNS[which]
    base = write(tmp_path / "base", name, **run.changes)
    model = random_adapter(base, run.targets, classifier=bool(run.head), r=3, **run.lora)
    model.save_pretrained(str(tmp_path / "adapter"))
    classes = model.config.num_labels if run.head else 0
    batch = _batch(classes, name in SCORED)
    gradients, after = _of_peft(model, batch, run)
    assert min(np.abs(values).max() for values in gradients.values()) > 1e-6
    ours = _of_jaxtune(base, tmp_path / "adapter", batch, run, classes, tmp_path)
    assert ours[0].keys() == ours[1].keys() == gradients.keys()
    assert _apart(ours[0], gradients) == {}
    assert _apart(ours[1], after) == {}
