"""`jaxtune convert`: casts, other files, and adapters merged, from folder to folder."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune.cli import main
from jaxtune.errors import ConfigError, ModelError, NumericsError
from jaxtune.hf import files, load
from jaxtune.hf.convert import convert
from tests import tiny

RNG = np.random.default_rng(3)
Q = "model.layers.{}.self_attn.q_proj"


def _values(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in files.tensors(folder).items()}


def _adapter(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> str:
    """A PEFT adapter folder; names without `base_model.model.`."""
    folder.mkdir()
    full = {f"base_model.model.{name}": array.astype(np.float32) for name, array in tensors.items()}
    save_file(full, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    return str(folder)


def _pairs(rank: int = 2) -> dict[str, np.ndarray]:
    shapes = {"lora_A.weight": (rank, 16), "lora_B.weight": (16, rank)}
    return {
        f"{Q.format(layer)}.{part}": RNG.normal(size=shape)
        for layer in range(3)
        for part, shape in shapes.items()
    }


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.write(tmp_path / "base")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_rounds_once_and_config_says_so(base, tmp_path, dtype):
    convert(str(base), tmp_path / "out", dtype=dtype)
    kind = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    before, after = _values(base), _values(tmp_path / "out")
    assert list(after) == list(before)
    for name, values in before.items():
        assert after[name].dtype == kind
        np.testing.assert_array_equal(after[name], values.astype(kind))
    hf = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == hf | {"torch_dtype": dtype}
    load.load_model(str(tmp_path / "out"))


def test_without_a_wish_it_is_a_copy(base, tmp_path):
    (base / "tokenizer.json").write_text("{}")
    convert(str(base), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    for name, values in _values(base).items():
        assert _values(tmp_path / "out")[name].tobytes() == values.tobytes()


def test_shards_of_a_size_and_back_to_one_file(base, tmp_path):
    convert(str(base), tmp_path / "many", shard_bytes=4000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    convert(str(tmp_path / "many"), tmp_path / "one", shard_bytes=10**9)
    assert not (tmp_path / "one" / files.INDEX).exists()
    for name, values in _values(base).items():
        np.testing.assert_array_equal(_values(tmp_path / "one")[name], values)


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [({}, 2, 3.0), ({"use_rslora": True}, 2, 6 / 2**0.5), ({"lora_alpha": 1}, 2, 0.5)],
)
def test_an_adapter_is_merged_with_its_scale(base, tmp_path, settings, rank, scale):
    pairs = _pairs(rank)
    adapter = _adapter(tmp_path / "adapter", pairs, **settings)
    written = convert(str(base), tmp_path / "out", adapter=adapter)
    assert written.changed == 3
    before, after = _values(base), _values(tmp_path / "out")
    for layer in range(3):
        module = Q.format(layer)
        a, b = pairs[f"{module}.lora_A.weight"], pairs[f"{module}.lora_B.weight"]
        wanted = before.pop(f"{module}.weight") + scale * (b @ a)
        np.testing.assert_allclose(after.pop(f"{module}.weight"), wanted, rtol=1e-5, atol=1e-6)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_ranks_alphas_and_magnitudes_of_single_modules(base, tmp_path):
    pairs = _pairs()
    name = Q.format(1)
    wide = {"lora_A.weight": (4, 16), "lora_B.weight": (16, 4)}
    pairs |= {f"{name}.{part}": RNG.normal(size=shape) for part, shape in wide.items()}
    lengths = {f"{Q.format(i)}.lora_magnitude_vector": np.full(16, 1.0 + i) for i in range(3)}
    adapter = _adapter(
        tmp_path / "adapter",
        pairs | lengths,
        use_dora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 4},
        alpha_pattern={"layers.2.self_attn.q_proj": 8},
    )
    convert(str(base), tmp_path / "out", adapter=adapter)
    before, after = _values(base), _values(tmp_path / "out")
    for layer, scale in enumerate((6 / 2, 6 / 4, 8 / 2)):
        name = Q.format(layer)
        turned = before[f"{name}.weight"] + scale * (
            pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]
        )
        wanted = (1.0 + layer) * turned / np.linalg.norm(turned, axis=1, keepdims=True)
        np.testing.assert_allclose(after[f"{name}.weight"], wanted, rtol=1e-4, atol=1e-6)


def test_modules_saved_in_full_and_a_new_classifier(base, tmp_path):
    table, head = RNG.normal(size=(64, 16)), RNG.normal(size=(3, 16))
    saved = {"model.embed_tokens.weight": table, "score.weight": head}
    modules = {"modules_to_save": ["embed_tokens", "score"], "task_type": "SEQ_CLS"}
    adapter = _adapter(tmp_path / "adapter", _pairs() | saved, **modules)
    convert(str(base), tmp_path / "out", adapter=adapter)
    after = _values(tmp_path / "out")
    for name, values in saved.items():
        np.testing.assert_array_equal(after[name], np.float32(values))
    assert "lm_head.weight" not in after
    rows, config = load.read_config(tmp_path / "out")
    assert (rows.label, config.num_labels) == ("Llama", 3)
    assert load.load_model(str(tmp_path / "out"))(np.arange(12).reshape(2, 6)).shape == (2, 3)


def test_an_adapter_that_does_nothing_is_a_warning(base, tmp_path, capsys):
    pairs = {name: a * name.endswith("A.weight") for name, a in _pairs().items()}
    convert(str(base), tmp_path / "out", adapter=_adapter(tmp_path / "adapter", pairs))
    err = capsys.readouterr().err
    assert err.startswith("warning: ")
    assert "changes nothing" in err
    for name, values in _values(base).items():
        np.testing.assert_array_equal(_values(tmp_path / "out")[name], values)


def test_an_adapter_of_another_base_leaves_nothing(base, tmp_path):
    strange = {name.replace("layers", "blocks"): array for name, array in _pairs().items()}
    narrow = {name: array[..., :8] for name, array in _pairs(8).items()}
    for number, (tensors, settings) in enumerate([(strange, {}), (narrow, {"r": 8})]):
        adapter = _adapter(tmp_path / f"adapter{number}", tensors, **settings)
        with pytest.raises(ModelError):
            convert(str(base), tmp_path / "out", adapter=adapter)
        assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_named(base, tmp_path):
    values = _values(base)
    values["model.norm.weight"][:3] = (70_000, -70_000, 65_504)
    save_file(values, base / "model.safetensors")
    with pytest.raises(NumericsError, match=r"model.norm.weight holds 2 values beyond float16"):
        convert(str(base), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert(str(base), tmp_path / "out", dtype="bfloat16")


def test_fields_and_pickles(base, tmp_path):
    """Unknown fields do not stop a conversion; pickled weights are never opened."""
    hf = json.loads((base / "config.json").read_text()) | {"new_maths": 3}
    (base / "config.json").write_text(json.dumps(hf))
    convert(str(base), tmp_path / "out")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        convert(str(base), tmp_path / "other")
    adapter = Path(_adapter(tmp_path / "adapter", _pairs()))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        convert(str(tmp_path / "out"), tmp_path / "other", adapter=str(adapter))


def test_the_verb(base, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", str(base), out, "--dtype=bfloat16", "--shard-size=4KB", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["tensors"] == len(_values(base))
    assert len(result["files"]) > 3
    assert shown.err.count("\n") == 1
    assert main(["convert", str(base), out]) == ConfigError.exit_code
    assert main(["convert", str(base), f"{out}2", "--shard-size=lots"]) == ConfigError.exit_code
    assert "--shard-size=lots is no size" in capsys.readouterr().err
    assert not Path(f"{out}2").exists()


def test_a_checkpoint_that_does_not_fit_its_config_is_not_copied(base, tmp_path):
    values = _values(base)
    lost = values.pop(f"{Q.format(1)}.weight")
    save_file(values, base / "model.safetensors")
    with pytest.raises(ModelError, match="1 missing"):
        convert(str(base), tmp_path / "out")
    save_file(values | {f"{Q.format(1)}.weight": lost[:8]}, base / "model.safetensors")
    with pytest.raises(ModelError, match="1 wrong shape"):
        convert(str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
