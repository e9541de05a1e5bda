"""What transformers and peft make of an export: the same logits, the same greedy text."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from jaxtune import lora, tree
from jaxtune.assemble import Assembly, assemble, base
from jaxtune.config import Config, LoraConfig, MeshConfig, ModelConfig, OptimConfig
from jaxtune.decoding import generate
from jaxtune.hf.adapter import read_adapter, write_adapter
from jaxtune.hf.export import write_merged
from jaxtune.sharding import make_mesh
from tests.oracles.llamas import SHAPES, greedy, load, logits, write

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 33))
PROMPT = TOKENS[0, :9].tolist()

RUNS: dict[str, tuple[str, LoraConfig, OptimConfig]] = {
    "all_linear": ("biases_llama3", LoraConfig(r=4, alpha=6), OptimConfig()),
    "some_layers_rslora": (
        "gqa",
        LoraConfig(
            r=3,
            alpha=5.5,
            use_rslora=True,
            target_modules=("q_proj", "down_proj"),
            layers_to_transform=(0, 2),
        ),
        OptimConfig(),
    ),
    "regex_uneven": (
        "linear_gelu",
        LoraConfig(r=2, target_modules=r".*\.0\.mlp\.up_proj|.*\.1\.self_attn\.[kv]_proj"),
        OptimConfig(),
    ),
    "modules_to_save": (
        "gqa",
        LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head")),
        OptimConfig(),
    ),
    "tied_embedding_saved": (
        "odd_heads_tied",
        LoraConfig(r=2, modules_to_save=("embed_tokens",)),
        OptimConfig(),
    ),
    "norms_by_rule": (
        "biases_llama3",
        LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("norm", "mlp.up_proj")),
        OptimConfig(rules=((r"^layers\.1\.input_layernorm", "train"),)),
    ),
}


def _assemble(folder: Path, adapters: LoraConfig, optim: OptimConfig) -> tuple[Config, Assembly]:
    config = Config(
        model=ModelConfig(str(folder), "float32", "float32"), lora=adapters, optim=optim
    )
    return config, assemble(config, folder, make_mesh(MeshConfig(), jax.devices()[:1]))


def _tuned(config: Config, assembly: Assembly) -> tuple[dict[str, Any], Any]:
    """(trained leaves as after some training, the whole model)."""
    params, rng = _frozen(config, assembly), np.random.default_rng(7)
    trained = {
        path: np.asarray(params.get(path, 0)) + 0.1 * rng.standard_normal(shape.shape, np.float32)
        for path, shape in assembly.trained.items()
    }
    return trained, tree.merge(assembly.graphdef, params | trained)


def _frozen(config: Config, assembly: Assembly) -> dict[str, Any]:
    """The base and the scales of the adapters."""
    scales = {
        path: np.full(shape.shape, lora.scale(config.lora), np.float32)
        for path, shape in assembly.shapes.items()
        if path.endswith(".lora.scale")
    }
    return base(assembly) | scales


def _logits(model) -> np.ndarray:
    graphdef, params = tree.split(model)
    return np.asarray(jax.jit(lambda p: tree.merge(graphdef, p)(TOKENS))(params))


def _peft(base_folder: Path, adapter: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|no effect|unexpected).*")
        return PeftModel.from_pretrained(load(base_folder), str(adapter)).eval()


@pytest.mark.parametrize("run", RUNS)
def test_transformers_and_peft_agree_with_the_tuned_model(tmp_path, run):
    shape, adapters, optim = RUNS[run]
    folder = write(tmp_path / "base", **SHAPES[shape])
    config, assembly = _assemble(folder, adapters, optim)
    trained, model = _tuned(config, assembly)
    wanted = _logits(model)
    assert np.abs(wanted - logits(load(folder), TOKENS)).max() > 0.1  # tuning made a difference
    pieces = (folder, assembly.family, assembly.decoder, trained)
    write_merged(tmp_path / "hf", *pieces, scale=lora.scale(adapters))
    write_adapter(tmp_path / "peft", *pieces, lora=adapters, base_name=str(folder))
    for found in (load(tmp_path / "hf"), _peft(folder, tmp_path / "peft")):
        np.testing.assert_allclose(logits(found, TOKENS), wanted, rtol=0, atol=1e-4)

    again = read_adapter(tmp_path / "peft", assembly.family, adapters, assembly.trained)
    assert again.keys() == trained.keys()
    for path, values in again.items():
        np.testing.assert_array_equal(values, trained[path])


def test_a_full_fine_tune(tmp_path):
    folder = write(tmp_path / "base", shard="15KB", **SHAPES["odd_heads_tied"])
    config, assembly = _assemble(
        folder, LoraConfig(r=0), OptimConfig(rules=((r"^layers\.0\.", "freeze"),))
    )
    trained, model = _tuned(config, assembly)
    write_merged(tmp_path / "hf", folder, assembly.family, assembly.decoder, trained, scale=1.0)
    found = load(tmp_path / "hf")
    np.testing.assert_allclose(logits(found, TOKENS), _logits(model), rtol=0, atol=1e-4)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_an_adapter_peft_wrote_goes_on_here(tmp_path):
    folder = write(tmp_path / "base", **SHAPES["gqa"])
    torch.manual_seed(3)
    settings = PeftConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["lm_head"],
    )
    tuned = get_peft_model(load(folder), settings).eval()
    with torch.no_grad():
        for values in tuned.parameters():
            if values.requires_grad:
                values.add_(0.1 * torch.randn_like(values))
    tuned.save_pretrained(str(tmp_path / "peft"))
    adapters = LoraConfig(
        r=4, alpha=12, target_modules=("q_proj", "up_proj"), modules_to_save=("lm_head",)
    )
    config, assembly = _assemble(folder, adapters, OptimConfig())
    leaves = read_adapter(tmp_path / "peft", assembly.family, adapters, assembly.trained)
    params = _frozen(config, assembly) | leaves
    found = _logits(tree.merge(assembly.graphdef, params))
    np.testing.assert_allclose(found, logits(tuned, TOKENS), rtol=0, atol=1e-4)


def test_stories260k_both_ways(tmp_path, shared_data):
    folder = shared_data / "stories260k-hf"
    adapters = LoraConfig(r=4, alpha=8)
    config, assembly = _assemble(folder, adapters, OptimConfig())
    trained, model = _tuned(config, assembly)
    pieces = (folder, assembly.family, assembly.decoder, trained)
    write_merged(tmp_path / "hf", *pieces, scale=2.0)
    write_adapter(tmp_path / "peft", *pieces, lora=adapters, base_name="someone/stories260k")
    text = generate(model, [PROMPT], max_new_tokens=20, stop_ids=[1, 2])[0]
    wanted = _logits(model)
    for found in (load(tmp_path / "hf"), _peft(folder, tmp_path / "peft")):
        np.testing.assert_allclose(logits(found, TOKENS), wanted, rtol=0, atol=1e-4)
        assert greedy(found, PROMPT, 20) == text
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
