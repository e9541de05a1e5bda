"""Rows cut over devices: losses and trained leaves of whole steps equal those of one device."""

import jax
import numpy as np
import pytest

from jaxtune import assemble, config, setup, sharding, step
from jaxtune.data.packing import Batch
from tests import tiny

ROWS, WIDTH = 4, 32
MESHES = {
    "context=2 data=2 tensor=2": {"context": 2, "data": 2, "fsdp": 1, "tensor": 2},
    "context=4 fsdp=2": {"context": 4, "fsdp": 2},
}
GEMMA = {  # windows that differ by layer, and a cap
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def packed(seed: int) -> Batch:
    """Rows of two documents and some padding; documents are of differing lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 64, (ROWS, WIDTH)).astype(np.int32)
    slots, segments = np.arange(WIDTH), np.zeros((ROWS, WIDTH), np.int32)
    positions = np.zeros((ROWS, WIDTH), np.int32)
    for row in range(ROWS):
        first, last = rng.integers(3, 20), rng.integers(22, WIDTH + 1)
        segments[row] = np.where(slots < first, 1, np.where(slots < last, 2, 0))
        positions[row] = np.where(slots < first, slots, slots - first)
    targets = np.roll(tokens, -1, axis=1)
    same = segments == np.roll(segments, -1, axis=1)
    weights = ((segments > 0) & same & (slots < WIDTH - 1)).astype(np.float32)
    return Batch(tokens, targets, weights, positions, segments)


def trained(base, devices: int, mesh: dict, remat: str):
    """(losses of two steps, trained leaves)"""
    values = config.Config().to_dict()
    values["model"] |= {"path": str(base), "dtype": "float32", "param_dtype": "float32"}
    values["model"]["remat"] = remat
    values["lora"] |= {"r": 2, "alpha": 4.0}
    values["optim"] |= {"lr": 1e-2, "warmup": 0}
    values["train"]["batch_size"] = ROWS
    values["mesh"] |= mesh
    wanted = config.freeze(values)
    grid = sharding.make_mesh(wanted.mesh, jax.devices()[:devices])
    assembly = assemble.assemble(wanted, base, grid)
    program = setup.program(wanted, assembly, 10)
    state, frozen = setup.initial(wanted, assembly, program, grid)
    train, losses = step.jit_train(program, state), []
    with jax.set_mesh(grid):
        for batch in setup.to_mesh([packed(seed) for seed in range(2)], grid):
            state, measured = train(state, frozen, batch)
            losses.append(float(measured.loss.total / measured.loss.weight))
    return losses, jax.device_get(state.trainable)


@pytest.mark.parametrize(
    ("model", "mesh", "remat"),
    [
        ({}, "context=2 data=2 tensor=2", "attention"),
        pytest.param({}, "context=4 fsdp=2", "none", marks=pytest.mark.slow),
        (GEMMA, "context=4 fsdp=2", "full"),
        pytest.param(MIXTRAL, "context=2 data=2 tensor=2", "none", marks=pytest.mark.slow),
    ],
    ids=["llama", "llama on 4 parts", "windows", "experts"],
)
def test_eight_devices_equal_one(tmp_path, model, mesh, remat):
    base = tiny.write(tmp_path, **model)
    one, leaves = trained(base, 1, {}, remat)
    eight, others = trained(base, 8, MESHES[mesh], remat)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(others[path], leaf, rtol=1e-3, atol=2e-5, err_msg=path)
