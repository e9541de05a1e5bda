"""Adapter folders both ways: the same logits here and in peft, whoever wrote the folder."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from jaxtune import assemble, config, setup, sharding, tree
from jaxtune.hf.adapter import open_adapter, read_adapter, write_adapter
from jaxtune.hf.load import read_config
from tests.oracles.adapters import BLOCKS, random_adapter
from tests.oracles.families import load, logits, write

TOKENS = np.random.default_rng(0).integers(3, 90, (2, 11)).astype(np.int32)


class Case(NamedTuple):
    shape: str
    targets: str | tuple[str, ...] = "all-linear"
    lora: dict[str, Any] = {}  # noqa: RUF012  # settings both sides know under one name; never written to
    saved: tuple[str, ...] = ()  # modules trained in full, beside a classifier's head
    labels: int = 0
    peft: dict[str, Any] = {}  # noqa: RUF012  # settings that only peft has; never written to


CASES = {
    "patterns": Case(
        "llama-biases_llama3",
        ("q_proj", "v_proj", "down_proj"),
        {
            "rank_pattern": {"1.self_attn.q_proj": 5, "q_proj": 2, r"layers\.[02]\.mlp.+": 4},
            "alpha_pattern": {"v_proj": 2.5},
            "use_rslora": True,
        },
    ),
    "dora_patterns": Case(
        "phi3-partial",
        lora={"use_dora": True, "rank_pattern": {"qkv_proj": 1}, "alpha_pattern": {"o_proj": 9}},
    ),
    "embeddings": Case(
        "llama-gqa", lora={"use_rslora": True}, saved=("embed_tokens", "lm_head")
    ),
    "norms": Case("qwen3-wide_heads", ("up_proj",), saved=("model.norm", "q_norm")),
    "tied_embeddings": Case(
        "qwen3-tied_biases",
        ("o_proj",),
        {"use_dora": True},
        saved=("embed_tokens",),
        peft={"ensure_weight_tying": True},
    ),
    "conv1d": Case("gpt2-hub", lora={"use_dora": True}, saved=("wte",),
                   peft={"ensure_weight_tying": True, "modules_to_save": ["wte", "lm_head"]}),
    "some_layers": Case("gemma2-even_caps", ("k_proj",), peft={"layers_to_transform": [0, 2]}),
    "vision": Case("gemma3_vision-one_kv", r".*language_model.*\.(q_proj|down_proj)"),
    "experts": Case("qwen3_moe-mixed", ("q_proj", "o_proj")),
    "bert": Case("bert-plain", lora={"use_dora": True}, labels=3),
    "xlm_roberta": Case("xlm_roberta-plain", lora={"alpha_pattern": {"query": 1.5}}, labels=3),
    "distilbert": Case("distilbert-plain", BLOCKS, labels=3),
    "modernbert": Case("modernbert-biases", labels=3),
    "tied_score": Case("qwen3-score", labels=2),
    "score": Case("gpt2-score", labels=5),
}  # fmt: skip


def _settings(case: Case) -> dict[str, Any]:
    return {"r": 3, "use_rslora": False, "use_dora": False, **case.lora}


def _peft(base: Path, case: Case) -> peft.PeftModel:
    more: dict[str, Any] = {"modules_to_save": list(case.saved) or None, **case.peft}
    settings = _settings(case) | more
    return random_adapter(base, case.targets, classifier=case.labels > 0, **settings)


def _run(base: Path, adapter: Path, case: Case):
    """A run that goes on from the adapter: (its config, assembly, leaves)."""
    values = config.Config().to_dict()
    values["task"] = "classify" if case.labels else "sft"
    values["data"]["labels"] = [f"label {i}" for i in range(case.labels)]
    values["model"] |= {"path": str(base), "dtype": "float32", "param_dtype": "float32"}
    values["lora"] |= {
        **_settings(case),
        "alpha": 5.0,
        "init": str(adapter),
        "target_modules": case.targets,
        "modules_to_save": case.saved,
        "layers_to_transform": case.peft.get("layers_to_transform", ()),
    }
    for key in ("rank_pattern", "alpha_pattern"):
        values["lora"][key] = tuple(dict(values["lora"][key]).items())
    settings = config.freeze(values)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    assembly = assemble.assemble(settings, base, mesh)
    program = setup.program(settings, assembly, 1)
    state, frozen = setup.initial(settings, assembly, program, mesh)
    return settings, assembly, frozen | state.trainable


def _logits(assembly, leaves) -> np.ndarray:
    return jax.jit(lambda leaves: tree.merge(assembly.graphdef, leaves)(TOKENS))(leaves)


def _there(base: Path, adapter: Path) -> np.ndarray:
    """The logits of peft with an adapter folder; it must find every weight it looks for."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(load(base), str(adapter)).eval()
    assert not [str(w.message) for w in heard if "missing" in str(w.message)]
    return logits(model, TOKENS)


@pytest.mark.parametrize("which", CASES)
def test_folders_both_ways(tmp_path, which):
    case = CASES[which]
    base = write(tmp_path / "base", case.shape)
    theirs = _peft(base, case)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    wanted = logits(theirs, TOKENS)
    settings, assembly, leaves = _run(base, tmp_path / "theirs", case)
    scale = np.abs(wanted).max()
    assert np.abs(_logits(assembly, leaves) - wanted).max() <= 1e-4 * max(scale, 1)
    assert np.abs(logits(load(base), TOKENS) - wanted).max() > 1e-2 * scale  # it does something

    trained = {p: v for p, v in leaves.items() if ".lora." in p or p in assembly.trained}
    common = (base, assembly.family, assembly.model)
    more = {"lora": settings.lora, "base_name": str(base)}
    write_adapter(tmp_path / "ours", *common, jax.device_get(trained), **more)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.keys() == stored.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    np.testing.assert_array_equal(_there(base, tmp_path / "ours"), wanted)

    shapes = {path: v for path, v in trained.items() if not path.endswith(".lora.scale")}
    again = read_adapter(tmp_path / "ours", *common[1:], settings.lora, shapes)
    write_adapter(tmp_path / "again", *common, again, **more)
    for file in (tmp_path / "ours").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_scales_without_a_run_are_pefts(tmp_path):
    case = CASES["patterns"]
    base = write(tmp_path / "base", case.shape)
    model = _peft(base, case)
    model.save_pretrained(str(tmp_path / "theirs"))
    found = open_adapter(tmp_path / "theirs", *read_config(base))
    layers = [
        (name, m.scaling["default"]) for name, m in model.named_modules() if hasattr(m, "lora_A")
    ]
    assert len(layers) == 9
    assert len({scale for _, scale in layers}) == 5
    for name, scale in layers:
        _, layer, block, module = name.rsplit(".", 3)
        path = f"layers.{layer}-{layer}.{block}.{module}.lora.scale"
        np.testing.assert_allclose(found[path], [scale], rtol=1e-6)


def test_a_table_saved_because_it_was_resized_is_one_matrix_still(tmp_path):
    case = Case("llama-odd_heads_tied", ("q_proj",))
    base = write(tmp_path / "base", case.shape)
    theirs = _peft(base, case)
    with torch.no_grad():
        theirs.get_input_embeddings().weight.mul_(1.5)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    run = case._replace(saved=("embed_tokens",))
    _, assembly, leaves = _run(base, tmp_path / "theirs", run)
    np.testing.assert_allclose(_logits(assembly, leaves), logits(theirs, TOKENS), atol=1e-4)
