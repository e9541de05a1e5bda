"""Mixtures of experts: every gradient of the loss, balancing included, against transformers'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune import sharding, tree
from jaxtune.config import MeshConfig
from jaxtune.data.packing import Batch
from jaxtune.hf import load as loading
from jaxtune.hf.load import load_model
from jaxtune.objectives.sft import next_token
from tests.oracles import families

ROWS, LENGTH = 8, 24


def _batch() -> tuple[Batch, np.ndarray, np.ndarray]:
    """Right-padded rows, and what transformers wants of them: (batch, attention mask, labels)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 90, (ROWS, LENGTH)).astype(np.int32)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, ROWS)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    labels = np.where(mask, tokens, -100)
    targets = np.roll(tokens, -1, axis=1)
    weights = np.concatenate([mask[:, 1:], np.zeros((ROWS, 1))], axis=1).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, targets, weights, positions, mask)
    return jax.tree.map(jnp.asarray, batch), mask, labels


def _theirs(folder, mask, labels, tokens) -> dict[str, np.ndarray]:
    model = families.load(folder)
    model.config.output_router_logits = True
    out = model(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask),
        labels=torch.tensor(labels, dtype=torch.long),
        output_router_logits=True,
    )
    assert float(out.aux_loss.detach()) > 0
    out.loss.backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def _ours(folder, batch: Batch, mesh=None) -> dict[str, np.ndarray]:
    """{Hugging Face tensor on disk: gradient of the mean loss}."""
    rows, config = loading.read_config(folder)
    graphdef, params = tree.split(load_model(str(folder)))

    def loss(params):
        term = next_token(tree.merge(graphdef, params), batch, None)
        return term.total / term.weight

    if mesh is None:
        grads = jax.grad(loss)(params)
    else:
        axes = tree.axes(load_model(str(folder)))
        places = sharding.param_shardings(params, axes, mesh)
        with jax.set_mesh(mesh):
            grads = jax.jit(jax.grad(loss))(jax.device_put(params, places))
    found = {}
    for path, leaf in grads.items():
        for index, name in rows.slots(path, config):
            one = np.asarray(leaf[index])
            found[name] = one.T if rows.turned(path) else one
    return found


def _set(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["mixtral-full", "qwen3_moe-mixed"])
def test_gradients_with_the_balancing_loss(tmp_path, name):
    folder = families.write(tmp_path, name)
    _set(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    batch, mask, labels = _batch()
    theirs = _theirs(folder, mask, labels, np.asarray(batch.tokens))
    ours = _ours(folder, batch)
    for tensor, wanted in theirs.items():
        if ".experts." in tensor:
            continue  # fused in memory: compared below, expert by expert
        gate = "block_sparse_moe.gate." if "mixtral" in name else "mlp.gate."
        name_on_disk = tensor.replace("mlp.gate.", gate)
        _close(ours[name_on_disk], wanted, tensor)
    fused = {n: g for n, g in theirs.items() if n.endswith("experts.down_proj")}
    assert fused
    for tensor, wanted in fused.items():
        for expert, each in enumerate(wanted):
            found = [
                g
                for n, g in ours.items()
                if n.endswith((f"experts.{expert}.w2.weight", f"experts.{expert}.down_proj.weight"))
                and n.split(".layers.")[1].split(".")[0]
                == tensor.split(".layers.")[1].split(".")[0]
            ]
            _close(found[0], each, f"{tensor} of expert {expert}")


@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (1, 2, 4, 1), (2, 1, 2, 2)])
def test_experts_cut_over_devices_give_the_same_gradients(tmp_path, sizes):
    folder = families.write(tmp_path, "mixtral-three_of_four")
    _set(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    batch, _, _ = _batch()
    data, fsdp, expert, tensor = sizes
    count = data * fsdp * expert * tensor
    mesh = sharding.make_mesh(
        MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor), jax.devices()[:count]
    )
    whole, cut = _ours(folder, batch), _ours(folder, batch, mesh)
    assert whole.keys() == cut.keys()
    for tensor_name, wanted in whole.items():
        _close(cut[tensor_name], wanted, tensor_name)


def _close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    limit = 1e-4 * max(np.abs(wanted).max(), 1e-3)
    assert found.shape == wanted.shape, what
    worst = np.abs(found - wanted).max()
    assert worst <= limit, f"{what}: off by {worst:.2e}, more than {limit:.1e}"
