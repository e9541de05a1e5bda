import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.errors import ConfigError, ModelError, NumericsError, StorageError
from jaxtune.hf import export, files, write
from jaxtune.hf.export import write_merged
from jaxtune.hf.load import read_config
from tests import tiny

Q = "model.layers.{}.self_attn.q_proj.weight"
RNG = np.random.default_rng(11)
A = RNG.normal(size=(2, 16, 3)).astype(np.float32)  # of layers 1 and 2
B = RNG.normal(size=(2, 3, 16)).astype(np.float32)
ADAPTER: dict[str, Any] = {
    "layers.1-2.self_attn.q_proj.lora.A": A,
    "layers.1-2.self_attn.q_proj.lora.B": B,
}


def _export(out: Path, base: Path, trained=None, **options) -> export.Export:
    rows, config = read_config(base)
    trained = ADAPTER if trained is None else trained
    return write_merged(out, base, rows, config, trained, **{"scale": 0.5, **options})


def _values(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in files.tensors(folder).items()}


def _rewrite(base: Path, change) -> Path:
    """The base with its tensors changed by `change(tensors)`."""
    values = _values(base)
    change(values)
    save_file(values, base / "model.safetensors")
    return base


def _of(folder: Path, hf: dict[str, Any]) -> Path:
    """A random checkpoint of any causal family."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tiny.tensors(hf), folder / "model.safetensors")
    return folder


MIXTRAL = tiny.SIZES | {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_local_experts": 3,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "vision_config": {"hidden_size": 4},
    "text_config": {
        "model_type": "gemma3_text",
        "dtype": "float32",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
    },
}


def _nothing_left(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.write(tmp_path / "base")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_adapters_are_merged_in_float32_and_cast_once(base, tmp_path, dtype):
    def cast(values):
        values.update({name: array.astype(dtype) for name, array in values.items()})

    _rewrite(base, cast)
    result = _export(tmp_path / "out", base)
    before, after = _values(base), _values(tmp_path / "out")
    assert list(after) == list(before)
    for layer in (1, 2):
        name, slot = Q.format(layer), layer - 1
        wanted = before[name].astype(np.float32) + np.float32(0.5) * (B[slot].T @ A[slot].T)
        assert np.abs(wanted - before[name].astype(np.float32)).max() > 0.1
        np.testing.assert_array_equal(after.pop(name), wanted.astype(dtype))
    for name, values in after.items():
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, before[name])
    assert (result.tensors, result.changed) == (len(before), 2)
    assert result.bytes == sum(values.nbytes for values in before.values())


def test_leaves_trained_in_full_take_the_place_of_the_base(base, tmp_path):
    kernel = RNG.normal(size=(3, 16, 24)).astype(np.float32)
    trained = {
        "layers.0-2.mlp.up_proj.kernel": kernel,
        "norm.scale": np.full(16, 3.0, np.float32),
        "lm_head.embedding": np.ones((64, 16), np.float32),
        "layers.0-0.self_attn.q_proj.kernel": np.zeros((1, 16, 16), np.float32),
        "layers.0-0.self_attn.q_proj.lora.A": A[:1],
        "layers.0-0.self_attn.q_proj.lora.B": B[:1],
    }
    _export(tmp_path / "out", base, trained, scale=2.0)
    found = _values(tmp_path / "out")
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        np.testing.assert_array_equal(found[name], kernel[layer].T)
    np.testing.assert_array_equal(found["model.norm.weight"], np.full(16, 3.0))
    np.testing.assert_array_equal(found["lm_head.weight"], np.ones((64, 16)))
    np.testing.assert_allclose(found[Q.format(0)], 2.0 * (A[0] @ B[0]).T, rtol=1e-6)


@pytest.mark.parametrize("stored", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_tied_checkpoints_keep_the_names_they_stored(tmp_path, stored):
    base = tiny.write(tmp_path / "base", tie_word_embeddings=True)
    keys = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}

    def rename(values):
        table = values.pop(keys["embed_tokens"])
        values.update({keys[name]: table for name in stored})

    _rewrite(base, rename)
    new = RNG.normal(size=(64, 16)).astype(np.float32)
    result = _export(tmp_path / "out", base, {"embed_tokens.embedding": new})
    found = _values(tmp_path / "out")
    assert found.keys() == _values(base).keys()
    assert result.changed == len(stored)
    for name in stored:
        np.testing.assert_array_equal(found[keys[name]], new)


def test_shards_hold_what_they_may_and_the_index_says_where(base, tmp_path):
    most = 3000
    result = _export(tmp_path / "out", base, max_shard_bytes=most)
    whole = _export(tmp_path / "whole", base)
    index = json.loads((tmp_path / "out" / files.INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert count > 3
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    total = 0
    for name in names:
        held = files.read_header(tmp_path / "out" / name)
        assert {index["weight_map"][tensor] for tensor in held} == {name}
        size = sum(tensor.read().nbytes for tensor in held.values())
        assert size <= most or len(held) == 1
        total += size
    assert index["metadata"] == {"total_parameters": total // 4, "total_size": total}
    assert result.bytes == whole.bytes == total
    assert "model.safetensors" in whole.files
    assert files.INDEX not in whole.files
    one, many = _values(tmp_path / "whole"), _values(tmp_path / "out")
    assert one.keys() == many.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, many[name])


def test_memory_holds_one_tensor_whatever_the_shard(tmp_path):
    base = tiny.write(tmp_path / "base", vocab_size=2000, hidden_size=256, intermediate_size=600)
    size = (base / "model.safetensors").stat().st_size
    tracemalloc.start()
    _export(tmp_path / "out", base, {}, max_shard_bytes=2 * size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 9_000_000
    assert peak < 5_000_000  # the largest tensor, 2 MB, twice, and change


def _cut(base: Path) -> dict[str, list[str]]:
    """Splits the base into three files with names of their own; {file: tensors}."""
    values = _values(base)
    (base / "model.safetensors").unlink()
    held = {f"part-{i}.safetensors": sorted(values)[i::3] for i in range(3)}
    for file, names in held.items():
        save_file({name: values[name] for name in names}, base / file)
    where = {name: file for file, names in held.items() for name in names}
    (base / files.INDEX).write_text(json.dumps({"weight_map": where}))
    return held


def test_tensors_stay_in_the_files_of_the_base(base, tmp_path):
    held = _cut(base)
    _export(tmp_path / "out", base)
    for file, names in held.items():
        assert sorted(files.read_header(tmp_path / "out" / file)) == sorted(names)
    weight_map = json.loads((tmp_path / "out" / files.INDEX).read_text())["weight_map"]
    assert list(weight_map) == list(json.loads((base / files.INDEX).read_text())["weight_map"])
    _export(tmp_path / "half", base, dtype=np.dtype(np.float16))
    assert (tmp_path / "half" / "model.safetensors").is_file()


def test_what_was_not_trained_is_byte_equal(tmp_path):
    """Also whole numbers, other dtypes side by side, an odd number of bytes and empty tensors."""
    base = tiny.write(tmp_path / "base")

    def change(values):
        values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float64)
        values["steps"] = np.arange(3, dtype=np.int8)
        values["mask"] = np.array([True, False, True])
        values["empty"] = np.zeros((0, 4), np.float32)
        values["model.norm.weight"] = values["model.norm.weight"].astype(ml_dtypes.bfloat16)

    _rewrite(base, change)
    _export(tmp_path / "out", base, {})
    before, after = _values(base), _values(tmp_path / "out")
    assert list(after) == list(before)
    for name, values in before.items():
        assert after[name].dtype == values.dtype
        assert after[name].tobytes() == values.tobytes()
    opened = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: array.shape for name, array in opened.items()} == {
        name: array.shape for name, array in before.items()
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_scales_and_magnitudes_of_their_own(base, tmp_path):
    """DoRA: each output's row is turned by the update and has the trained length."""
    path = "layers.1-2.self_attn.q_proj.lora."
    scale, magnitude = np.array([0.5, 2.0], np.float32), np.array([[1.5] * 16, [0.25] * 16])
    _export(tmp_path / "scaled", base, ADAPTER | {path + "scale": scale}, scale=99.0)
    dora = ADAPTER | {path + "scale": scale, path + "magnitude": magnitude}
    _export(tmp_path / "dora", base, dora)
    before, scaled, dora = (_values(tmp_path / name) for name in ("base", "scaled", "dora"))
    for slot in range(2):
        name = Q.format(slot + 1)
        wanted = before[name] + scale[slot] * (B[slot].T @ A[slot].T)
        np.testing.assert_allclose(scaled[name], wanted, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(dora[name], axis=1), magnitude[slot], rtol=1e-5)
        rows = magnitude[slot][:, None] * wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(dora[name], rows, rtol=1e-5)


GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_keeps_inputs_before_outputs_and_its_prefix(tmp_path, prefix):
    base = _of(tmp_path / "base", GPT2)

    def rename(values):
        for name in list(values):
            values[name.replace("transformer.", prefix, 1)] = values.pop(name)
        values[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)

    _rewrite(base, rename)
    a, b = RNG.normal(size=(1, 16, 2)), RNG.normal(size=(1, 2, 48))
    path = "layers.1-1.self_attn.qkv_proj.lora."
    magnitude = {path + "magnitude": np.full((1, 48), 3.0)}
    kernel = RNG.normal(size=(2, 16, 64)).astype(np.float32)
    trained = {path + "A": a, path + "B": b, "layers.0-1.mlp.up_proj.kernel": kernel}
    _export(tmp_path / "lora", base, trained)
    _export(tmp_path / "dora", base, trained | magnitude)
    before, lora, dora = (_values(tmp_path / name) for name in ("base", "lora", "dora"))
    assert list(lora) == list(before)
    name = f"{prefix}h.1.attn.c_attn.weight"
    np.testing.assert_allclose(lora[name], before[name] + 0.5 * a[0] @ b[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(dora[name], axis=0), np.full(48, 3.0), rtol=1e-5)
    np.testing.assert_array_equal(lora[f"{prefix}h.0.mlp.c_fc.weight"], kernel[0])


def test_adapters_of_experts_are_merged_expert_by_expert(tmp_path):
    base = _of(tmp_path / "base", MIXTRAL)
    path = "layers.0-1.mlp.experts.up_proj.lora."
    a, b = RNG.normal(size=(2, 3, 16, 2)), RNG.normal(size=(2, 3, 2, 24))
    scale = RNG.normal(size=(2, 3)).astype(np.float32)
    _export(tmp_path / "out", base, {path + "A": a, path + "B": b, path + "scale": scale})
    before, after = _values(base), _values(tmp_path / "out")
    for layer in range(2):
        for expert in range(3):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"
            delta = scale[layer, expert] * (a[layer, expert] @ b[layer, expert]).T
            wanted = before.pop(name) + delta.astype(np.float32)
            np.testing.assert_allclose(after.pop(name), wanted, rtol=1e-4, atol=1e-5)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_a_text_model_goes_back_among_the_untouched_tensors(tmp_path):
    base = _of(tmp_path / "base", GEMMA3)

    def wrap(values):
        for name in list(values):
            new = name.replace("model.language_model.", "language_model.model.", 1)
            values[new] = values.pop(name)
        values["vision_tower.patch.weight"] = RNG.normal(size=(4, 4)).astype(np.float16)
        values["multi_modal_projector.weight"] = RNG.normal(size=(4, 4)).astype(np.float16)

    _rewrite(base, wrap)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (base / name).write_text(f"{{ {json.dumps(name)}: 1}}")
    scale = np.full(16, 0.25, np.float32)
    result = _export(tmp_path / "out", base, {"norm.scale": scale})
    before, after = _values(base), _values(tmp_path / "out")
    np.testing.assert_array_equal(after.pop("language_model.model.norm.weight"), scale)
    for name, values in after.items():
        assert values.tobytes() == before[name].tobytes()
    assert {"preprocessor_config.json", "processor_config.json"} <= set(result.files)
    _export(tmp_path / "bf16", base, {}, dtype=np.dtype(ml_dtypes.bfloat16))
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["text_config"]["dtype"] == "bfloat16"
    assert config | {"text_config": GEMMA3["text_config"]} == GEMMA3


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_made_of_a_language_model(tmp_path, tied):
    base = tiny.write(tmp_path / "base", tie_word_embeddings=tied, id2label={"0": "x", "1": "y"})
    if tied:  # the one table stands under the name that goes
        _rewrite(base, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    rows, config = read_config(base, num_labels=3)
    head = RNG.normal(size=(16, 3)).astype(np.float32)
    labels = ("no", "perhaps", "yes")
    given = {"labels": labels, "pad_token": 7}
    write_merged(tmp_path / "out", base, rows, config, {"score.kernel": head}, **given)
    before, after = _values(base), _values(tmp_path / "out")
    np.testing.assert_array_equal(after["score.weight"], head.T)
    assert after.keys() ^ before.keys() == {"lm_head.weight", "score.weight"} | (
        {"model.embed_tokens.weight"} if tied else set()
    )
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf == json.loads((base / "config.json").read_text()) | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "no", "1": "perhaps", "2": "yes"},
        "label2id": {"no": 0, "perhaps": 1, "yes": 2},
        "pad_token_id": 7,
    }
    rows, config = read_config(tmp_path / "out")
    assert config.num_labels == 3
    again = {
        "layers.1-1.self_attn.q_proj.lora.A": A[:1],
        "layers.1-1.self_attn.q_proj.lora.B": B[:1],
    }
    write_merged(tmp_path / "again", tmp_path / "out", rows, config, again, pad_token=9)
    one, two = ((tmp_path / name / "config.json").read_bytes() for name in ("out", "again"))
    assert one == two
    np.testing.assert_array_equal(_values(tmp_path / "again")["score.weight"], head.T)


def test_everything_else_is_copied_byte_for_byte(base, tmp_path):
    rest = {
        "config.json": (base / "config.json").read_bytes() + b"\n\n",
        "generation_config.json": b'{"eos_token_id": [2, 3]}',
        "tokenizer.json": b"{ }\n",
        "tokenizer_config.json": b'{"a":   1}',
        "tokenizer.model": b"\x00\xff",
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE.txt": b"terms",
    }
    for name, content in rest.items():
        (base / name).write_bytes(content)
    for name in ("pytorch_model.bin", "optimizer.pt", "README.md", "trainer_state.json"):
        (base / name).write_bytes(b"not part of a model")
    result = _export(tmp_path / "out", base)
    assert set(result.files) == {*rest, "model.safetensors"}
    assert _nothing_left(tmp_path / "out", *rest, "model.safetensors")
    for name, content in rest.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_the_template_of_the_run_takes_the_place_of_the_bases(base, tmp_path):
    (base / "chat_template.jinja").write_text("old")
    _export(tmp_path / "out", base, chat_template="{{ 'nové' }}")
    assert (tmp_path / "out" / "chat_template.jinja").read_text("utf-8") == "{{ 'nové' }}"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_said_under_the_key_the_base_has(base, tmp_path, key):
    config = json.loads((base / "config.json").read_text())
    del config["torch_dtype"]
    (base / "config.json").write_text(json.dumps(config | {key: "float32"}))
    _export(tmp_path / "out", base, dtype=np.dtype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {key: "bfloat16"}
    before = _values(base)
    for name, values in _values(tmp_path / "out").items():
        if name not in (Q.format(1), Q.format(2)):
            np.testing.assert_array_equal(values, before[name].astype(ml_dtypes.bfloat16))


def test_an_empty_folder_is_filled_and_a_full_one_refused(base, tmp_path):
    (tmp_path / "empty").mkdir()
    _export(tmp_path / "empty", base)
    assert (tmp_path / "empty" / "config.json").is_file()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    for taken in (full, full / "mine.txt"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            _export(taken, base)
    assert _nothing_left(full, "mine.txt")
    assert _nothing_left(tmp_path, "base", "empty", "full")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_never_exported(base, tmp_path, value):
    wrong = np.full((2, 3, 16), value, np.float32)
    trained = ADAPTER | {"layers.1-2.self_attn.q_proj.lora.B": wrong}
    with pytest.raises(NumericsError, match=r"layers.1.self_attn.q_proj.weight holds 256 values"):
        _export(tmp_path / "new" / "out", base, trained)
    assert _nothing_left(tmp_path, "base")


def test_a_cast_that_overflows_is_refused(base, tmp_path):
    def cast(values):
        values.update({name: array.astype(np.float16) for name, array in values.items()})

    _rewrite(base, cast)
    trained = {"norm.scale": np.full(16, 70_000.0, np.float32)}  # float16 ends at 65,504
    with pytest.raises(NumericsError, match=r"norm.weight holds 16 values beyond float16"):
        _export(tmp_path / "out", base, trained)
    assert _nothing_left(tmp_path, "base")


def test_a_disk_that_gives_back_other_bytes_is_found_out(base, tmp_path, monkeypatch):
    def flipping(descriptor):
        os.pwrite(descriptor, b"\x55", os.fstat(descriptor).st_size - 5)

    monkeypatch.setattr(write.os, "fsync", flipping)
    with pytest.raises(StorageError, match="reads back otherwise"):
        _export(tmp_path / "out", base)
    assert _nothing_left(tmp_path, "base")


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_nothing_behind(base, tmp_path, monkeypatch, fault):
    flushed = []

    def failing(descriptor):
        if len(flushed) == 2:
            raise fault
        flushed.append(descriptor)

    monkeypatch.setattr(write.os, "fsync", failing)
    kind = StorageError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        _export(tmp_path / "deep" / "er" / "out", base, max_shard_bytes=3000)
    assert len(flushed) == 2
    assert _nothing_left(tmp_path, "base")


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxtune.hf import load, write
from jaxtune.hf.export import write_merged

base = Path(sys.argv[1])
flush, flushed = os.fsync, []
def fsync(descriptor):
    flush(descriptor)
    flushed.append(descriptor)
    if len(flushed) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
write.os.fsync = fsync
rows, config = load.read_config(base)
write_merged(Path(sys.argv[2]), base, rows, config, {}, max_shard_bytes=3000)
"""


def test_after_a_kill_there_is_no_export_and_the_next_clears_up(base, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(base), str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    other = left.with_name(left.name.replace("out", "other"))
    other.mkdir()
    _export(out, base)
    assert _nothing_left(tmp_path, "base", "out", other.name)


def test_a_stage_in_use_is_not_cleared(tmp_path):
    with write.staged(tmp_path / "out") as one:
        (one / "half").write_text("")
        with write.staged(tmp_path / "out") as two:
            (two / "whole").write_text("")
        assert (one / "half").exists()
        (tmp_path / "out" / "whole").unlink()
    assert _nothing_left(tmp_path, "out")
    assert _nothing_left(tmp_path / "out", "half")


def test_a_folder_that_cannot_be_made_is_a_storage_error(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        _export(tmp_path / "file" / "out", base)


def test_leaves_of_another_model_are_refused(base, tmp_path):
    bias = {"layers.0-2.self_attn.q_proj.bias": np.zeros((3, 16), np.float32)}
    with pytest.raises(ModelError, match=r"no model.layers.0.self_attn.q_proj.bias"):
        _export(tmp_path / "out", base, bias)
    for path, shape in (("norm.scale", (1,)), ("layers.1-2.self_attn.q_proj.lora.A", (2, 1, 3))):
        with pytest.raises(ModelError, match=r"was trained as .* the base has"):
            _export(tmp_path / "out", base, ADAPTER | {path: np.ones(shape, np.float32)})
    assert _nothing_left(tmp_path, "base")
