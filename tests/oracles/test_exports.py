"""What transformers and peft make of an export: the same tensors, the same logits and text."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from jaxtune import tree
from jaxtune.assemble import Assembly, assemble, base, fresh
from jaxtune.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimConfig
from jaxtune.decoding import generate
from jaxtune.hf.adapter import read_adapter, write_adapter
from jaxtune.hf.export import write_merged
from jaxtune.sharding import make_mesh
from tests.oracles.families import ALL, CAUSAL, greedy, load, logits, v4_config, write

TOKENS = np.random.default_rng(0).integers(3, 90, (2, 33))
PROMPT = TOKENS[0, :9].tolist()
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

RUNS: dict[str, tuple[str, LoraConfig, OptimConfig]] = {
    "all_linear": ("llama-biases_llama3", LoraConfig(r=4, alpha=6), OptimConfig()),
    "some_layers_rslora": (
        "llama-gqa",
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
        "llama-linear_gelu",
        LoraConfig(r=2, alpha=4, target_modules=r".*\.0\.mlp\.up_proj|.*\.1\.self_attn\.[kv]_proj"),
        OptimConfig(),
    ),
    "modules_to_save": (
        "llama-gqa",
        LoraConfig(
            r=2, alpha=4, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head")
        ),
        OptimConfig(),
    ),
    "tied_embedding_saved": (
        "llama-odd_heads_tied",
        LoraConfig(r=2, alpha=4, modules_to_save=("embed_tokens",)),
        OptimConfig(),
    ),
    "norms_by_rule": (
        "llama-biases_llama3",
        LoraConfig(
            r=2, alpha=4, target_modules=("v_proj",), modules_to_save=("norm", "mlp.up_proj")
        ),
        OptimConfig(rules=((r"^layers\.1\.input_layernorm", "train"),)),
    ),
    "dora": ("llama-biases_llama3", LoraConfig(r=3, alpha=4, use_dora=True), OptimConfig()),
    "mistral": ("mistral-window", LoraConfig(r=2, alpha=4), OptimConfig()),
    "qwen2": ("qwen2-windows", LoraConfig(r=2, alpha=4), OptimConfig()),
    "qwen3": ("qwen3-tied_biases", LoraConfig(r=2, alpha=4), OptimConfig()),
    "gemma": ("gemma-one_kv", LoraConfig(r=2, alpha=4), OptimConfig()),
    "gemma2": ("gemma2-five_layers", LoraConfig(r=2, alpha=4), OptimConfig()),
    "gemma3": (
        "gemma3-seven_layers",
        LoraConfig(r=2, alpha=4, modules_to_save=("embed_tokens",)),
        OptimConfig(),
    ),
    "gemma3_vision": (
        "gemma3_vision-linear",
        LoraConfig(r=2, alpha=4, target_modules=r".*language_model.*\.(q_proj|down_proj)"),
        OptimConfig(),
    ),
    "phi3": ("phi3-partial", LoraConfig(r=2, alpha=4), OptimConfig()),
    "smollm3": ("smollm3-windows", LoraConfig(r=2, alpha=4), OptimConfig()),
    "olmo2": ("olmo2-one_kv", LoraConfig(r=2, alpha=4), OptimConfig()),
    "gpt2": ("gpt2-plain", LoraConfig(r=2, alpha=4), OptimConfig()),
    "gpt2_hub_dora": ("gpt2-hub", LoraConfig(r=2, alpha=4, use_dora=True), OptimConfig()),
    "mixtral": ("mixtral-full", LoraConfig(r=2, alpha=4, target_modules=ATTENTION), OptimConfig()),
    "qwen3_moe": (
        "qwen3_moe-mixed",
        LoraConfig(r=2, alpha=4, target_modules=ATTENTION),
        OptimConfig(),
    ),
    "bert": (
        "bert-plain",
        LoraConfig(r=2, alpha=4, modules_to_save=("classifier",)),
        OptimConfig(),
    ),
    "roberta": (
        "roberta-plain",
        LoraConfig(r=2, alpha=4, modules_to_save=("classifier",)),
        OptimConfig(),
    ),
    "modernbert": (
        "modernbert-mean",
        LoraConfig(r=2, alpha=4, modules_to_save=("classifier",)),
        OptimConfig(),
    ),
    "llama_score": (
        "llama-score",
        LoraConfig(r=2, alpha=4, modules_to_save=("score",)),
        OptimConfig(),
    ),
}


def _assemble(
    folder: Path, adapters: LoraConfig, optim: OptimConfig, name: str = ""
) -> tuple[Config, Assembly]:
    classifier = name in ALL.keys() - CAUSAL.keys()
    classes = ALL[name].sizes.get("num_labels", 2) if classifier else 0
    config = Config(
        task="classify" if classifier else "sft",
        model=ModelConfig(str(folder), "float32", "float32"),
        data=DataConfig(labels=tuple(f"LABEL_{i}" for i in range(classes))),
        lora=adapters,
        optim=optim,
    )
    return config, assemble(config, folder, make_mesh(MeshConfig(), jax.devices()[:1]))


def _start(config: Config, assembly: Assembly) -> dict[str, Any]:
    """Every leaf before training."""
    return base(assembly) | fresh(config, assembly)


def _tuned(config: Config, assembly: Assembly) -> tuple[dict[str, Any], Any]:
    """(trained leaves as after some training and scales of adapters, the whole model)."""
    params, rng = _start(config, assembly), np.random.default_rng(7)
    trained = {
        path: np.asarray(params[path]) + 0.1 * rng.standard_normal(shape.shape, np.float32)
        for path, shape in assembly.trained.items()
    }
    scales = {path: leaf for path, leaf in params.items() if path.endswith(".lora.scale")}
    return trained | jax.device_get(scales), tree.merge(assembly.graphdef, params | trained)


def _logits(model) -> np.ndarray:
    graphdef, params = tree.split(model)
    return np.asarray(jax.jit(lambda p: tree.merge(graphdef, p)(TOKENS))(params))


def _peft(base_folder: Path, adapter: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|no effect|unexpected).*")
        return PeftModel.from_pretrained(load(base_folder), str(adapter)).eval()


def _tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # safe_open is no mapping
                tensor = stored.get_tensor(name)
                raw = tensor.contiguous().flatten().view(torch.uint8)
                found[name] = (tensor.dtype, tensor.shape, raw.numpy().tobytes())
    return found


def _same_folder(found: Path, wanted: Path) -> None:
    ours, theirs = _tensors(found), _tensors(wanted)
    assert ours.keys() == theirs.keys(), f"{sorted(ours.keys() ^ theirs.keys())[:8]}"
    changed = [name for name, tensor in theirs.items() if ours[name] != tensor]
    assert not changed, f"{len(changed)} tensors differ: {changed[:8]}"
    assert (found / "config.json").read_bytes() == (wanted / "config.json").read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_what_was_loaded_is_written_back_to_the_bit(tmp_path, name):
    """Every parameter through a model and back, from one file or several, float32 or bfloat16."""
    number = list(ALL).index(name)
    kind = (torch.float32, torch.bfloat16)[number % 2]
    shard = "1GB" if ALL[name].relaid else ("1GB", "20KB")[number // 2 % 2]
    folder = write(tmp_path / "base", name, dtype=kind, shard=shard)
    if number // 4 % 2:  # as transformers 4 wrote it
        file = folder / "config.json"
        file.write_text(json.dumps(v4_config(json.loads(file.read_text()))))
    config, assembly = _assemble(folder, LoraConfig(r=0), OptimConfig(), name)
    leaves = jax.device_get(_start(config, assembly))
    assert leaves.keys() == assembly.trained.keys()  # all of them are written, none is copied
    write_merged(tmp_path / "hf", folder, assembly.family, assembly.model, leaves)
    _same_folder(tmp_path / "hf", folder)


@pytest.mark.parametrize("run", RUNS)
def test_transformers_and_peft_agree_with_the_tuned_model(tmp_path, run):
    shape, adapters, optim = RUNS[run]
    folder = write(tmp_path / "base", shape)
    config, assembly = _assemble(folder, adapters, optim, shape)
    trained, model = _tuned(config, assembly)
    wanted = _logits(model)
    moved = np.abs(wanted - logits(load(folder), TOKENS)).max()
    assert moved > 0.1, f"{run}: tuning made a difference of only {moved:.1e}"
    pieces = (folder, assembly.family, assembly.model, trained)
    write_merged(tmp_path / "hf", *pieces)
    write_adapter(tmp_path / "peft", *pieces, lora=adapters, base_name=str(folder))
    for what, found in (
        ("merged", load(tmp_path / "hf")),
        ("adapter", _peft(folder, tmp_path / "peft")),
    ):
        off = np.abs(logits(found, TOKENS) - wanted).max()
        assert off <= 1e-4 * max(1.0, np.abs(wanted).max() / 10), f"{run}, {what}: off by {off:.1e}"

    again = read_adapter(
        tmp_path / "peft", assembly.family, assembly.model, adapters, assembly.trained
    )
    assert again.keys() == assembly.trained.keys()
    for path, values in again.items():
        np.testing.assert_array_equal(values, trained[path])


@pytest.mark.parametrize("name", ["mixtral-full", "qwen3_moe-mixed"])
def test_adapters_of_experts_are_merged(tmp_path, name):
    folder = write(tmp_path / "base", name)
    adapters = LoraConfig(r=2, alpha=4, target_modules=r".*experts.*|.*q_proj")
    config, assembly = _assemble(folder, adapters, OptimConfig())
    assert any("experts" in path and ".lora." in path for path in assembly.trained)
    trained, model = _tuned(config, assembly)
    pieces = (folder, assembly.family, assembly.model, trained)
    write_merged(tmp_path / "hf", *pieces)
    off = np.abs(logits(load(tmp_path / "hf"), TOKENS) - _logits(model)).max()
    assert off <= 1e-4, f"{name}: off by {off:.1e}"


def test_a_full_fine_tune(tmp_path):
    folder = write(tmp_path / "base", "llama-odd_heads_tied", shard="15KB")
    config, assembly = _assemble(
        folder, LoraConfig(r=0), OptimConfig(rules=((r"^layers\.0\.", "freeze"),))
    )
    trained, model = _tuned(config, assembly)
    write_merged(tmp_path / "hf", folder, assembly.family, assembly.model, trained)
    found = load(tmp_path / "hf")
    np.testing.assert_allclose(logits(found, TOKENS), _logits(model), rtol=0, atol=1e-4)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_an_adapter_peft_wrote_goes_on_here(tmp_path):
    folder = write(tmp_path / "base", "llama-gqa")
    torch.manual_seed(3)
    settings = PeftConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["lm_head"],
    )
    tuned = get_peft_model(load(folder), settings).eval()  # type: ignore[arg-type]  # torch's
    with torch.no_grad():
        for values in tuned.parameters():
            if values.requires_grad:
                values.add_(0.1 * torch.randn_like(values))
    tuned.save_pretrained(str(tmp_path / "peft"))
    adapters = LoraConfig(
        r=4, alpha=12, target_modules=("q_proj", "up_proj"), modules_to_save=("lm_head",)
    )
    config, assembly = _assemble(folder, adapters, OptimConfig())
    leaves = read_adapter(
        tmp_path / "peft", assembly.family, assembly.model, adapters, assembly.trained
    )
    params = _start(config, assembly) | leaves
    found = _logits(tree.merge(assembly.graphdef, params))
    np.testing.assert_allclose(found, logits(tuned, TOKENS), rtol=0, atol=1e-4)


def test_stories260k_both_ways(tmp_path, shared_data):
    folder = shared_data / "stories260k-hf"
    adapters = LoraConfig(r=4, alpha=8)
    config, assembly = _assemble(folder, adapters, OptimConfig())
    trained, model = _tuned(config, assembly)
    pieces = (folder, assembly.family, assembly.model, trained)
    write_merged(tmp_path / "hf", *pieces)
    write_adapter(tmp_path / "peft", *pieces, lora=adapters, base_name="someone/stories260k")
    text = generate(model, [PROMPT], max_new_tokens=20, stop_ids=[1, 2])[0]
    wanted = _logits(model)
    for found in (load(tmp_path / "hf"), _peft(folder, tmp_path / "peft")):
        np.testing.assert_allclose(logits(found, TOKENS), wanted, rtol=0, atol=1e-4)
        assert greedy(found, PROMPT, 20) == text
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
