import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

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


def test_memory_stays_near_one_shard(tmp_path):
    base = tiny.write(tmp_path / "base", vocab_size=2000, hidden_size=256, intermediate_size=600)
    size = (base / "model.safetensors").stat().st_size
    tracemalloc.start()
    _export(tmp_path / "out", base, {}, max_shard_bytes=2_100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 9_000_000
    assert peak < 6_000_000  # a shard, the largest tensor read back, and change


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
    with pytest.raises(NumericsError, match=r"norm.weight holds 16 values"):
        _export(tmp_path / "out", base, trained)
    assert _nothing_left(tmp_path, "base")


def test_a_disk_that_gives_back_other_bytes_is_found_out(base, tmp_path, monkeypatch):
    def flipping(tensors, file, metadata):
        save_file(tensors, file, metadata=metadata)
        content = bytearray(Path(file).read_bytes())
        content[-5] ^= 1
        Path(file).write_bytes(content)

    monkeypatch.setattr(write, "save_file", flipping)
    with pytest.raises(StorageError, match="reads back otherwise"):
        _export(tmp_path / "out", base)
    assert _nothing_left(tmp_path, "base")


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_nothing_behind(base, tmp_path, monkeypatch, fault):
    saved = []

    def failing(tensors, file, metadata):
        if len(saved) == 2:
            raise fault
        saved.append(file)
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(write, "save_file", failing)
    kind = StorageError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        _export(tmp_path / "deep" / "er" / "out", base, max_shard_bytes=3000)
    assert len(saved) == 2
    assert _nothing_left(tmp_path, "base")


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
