"""Checkpoints read: single and sharded files, tied heads, meshes and dtypes; and refused."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxtune import sharding, tree
from jaxtune.config import MeshConfig
from jaxtune.errors import ModelError
from jaxtune.hf import files, load, place
from jaxtune.models.decoder import Decoder
from tests import tiny

TOKENS = np.arange(12).reshape(2, 6)


def rewrite(folder, change) -> None:
    """Applies `change` to the {name: array} of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split(folder: Path, count: int) -> None:
    """Spreads the tensors of a folder's model.safetensors over files model-0, -1, ..."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_every_leaf_comes_from_its_tensor_in_its_orientation(tmp_path):
    stored = tiny.tensors(tiny.SIZES)
    _, params = tree.split(load.load_model(str(tiny.write(tmp_path))))
    q = params["layers.0-2.self_attn.q_proj.kernel"]
    np.testing.assert_array_equal(q[1], stored["model.layers.1.self_attn.q_proj.weight"].T)
    np.testing.assert_array_equal(params["lm_head.embedding"], stored["lm_head.weight"])
    norms = params["layers.0-2.input_layernorm.scale"]
    np.testing.assert_array_equal(norms[2], stored["model.layers.2.input_layernorm.weight"])
    assert sum(leaf.size for leaf in params.values()) == sum(a.size for a in stored.values())


def test_sharded_files_equal_one(tmp_path):
    whole, parts = tiny.write(tmp_path / "whole"), tiny.write(tmp_path / "parts")
    split(parts, 3)
    np.testing.assert_array_equal(
        load.load_model(str(parts))(TOKENS), load.load_model(str(whole))(TOKENS)
    )


@pytest.mark.parametrize("kept", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_model_stored_under_either_name(tmp_path, kept):
    folder = tiny.write(tmp_path, tie_word_embeddings=True)
    wanted = load.load_model(str(folder))(TOKENS)

    def change(tensors):
        matrix = tensors.pop("model.embed_tokens.weight")
        names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
        tensors.update({names[name]: matrix.copy() for name in kept})

    rewrite(folder, change)
    np.testing.assert_array_equal(load.load_model(str(folder))(TOKENS), wanted)


def test_a_tied_model_with_two_different_matrices_is_refused(tmp_path):
    folder = tiny.write(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match="tie"):
        load.load_model(str(folder))


def test_missing_surplus_and_wrong_shapes_are_listed_together(tmp_path):
    folder = tiny.write(tmp_path)

    def change(tensors):
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = np.zeros((63, 16), np.float32)

    rewrite(folder, change)
    with pytest.raises(ModelError) as caught:
        load.load_model(str(folder))
    for part in (
        "1 missing (model.norm.weight)",
        "1 surplus (model.layers.9.mlp.up_proj.weight)",
        "1 wrong shape (lm_head.weight [63, 16] instead of [64, 16])",
    ):
        assert part in caught.value.line()


def test_old_rotary_buffers_are_nobodys_business(tmp_path):
    folder = tiny.write(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: np.ones(2, np.float32)}))
    assert load.load_model(str(folder))(TOKENS).shape == (2, 6, 64)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_cut_over_devices_and_cast_it_holds_the_same_numbers(tmp_path, mesh):
    folder = tiny.write(tmp_path)
    rows, config = load.read_config(folder)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    _, shapes = tree.split(model)
    grid = sharding.make_mesh(mesh)
    places = sharding.param_shardings(shapes, tree.axes(model), grid)
    wanted = {
        path: jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16, sharding=places[path])
        for path, shape in shapes.items()
    }
    found = load.load_params(folder, rows, config, wanted)
    _, plain = tree.split(load.load_model(str(folder)))
    cut = NamedSharding(grid, P(None, "fsdp", "tensor" if mesh.tensor > 1 else None))
    up = found["layers.0-2.mlp.up_proj.kernel"]
    assert up.sharding.is_equivalent_to(cut, 3)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(found[path], leaf.astype(jnp.bfloat16), err_msg=path)


@pytest.mark.parametrize("wanted", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4, tensor=2)])
def test_large_tensors_are_turned_and_cast_piece_by_piece(
    tmp_path, monkeypatch, stored, wanted, mesh
):
    """Pieces of 4 KB, the last of which reaches back over the one before it."""
    monkeypatch.setattr(place, "_CHUNK", 4096)
    sizes = {"vocab_size": 72, "hidden_size": 64, "intermediate_size": 88}
    folder = tiny.write(tmp_path, **sizes)
    rewrite(folder, lambda t: t.update({n: a.astype(jnp.dtype(stored)) for n, a in t.items()}))
    values = {name: tensor.read() for name, tensor in files.tensors(folder).items()}
    rows, config = load.read_config(folder)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=wanted))
    _, shapes = tree.split(model)
    places = sharding.param_shardings(shapes, tree.axes(model), sharding.make_mesh(mesh))
    shapes = {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[p])
              for p, s in shapes.items()}  # fmt: skip
    for path, leaf in load.load_params(folder, rows, config, shapes).items():
        assert leaf.dtype == wanted
        for index, name in rows.slots(path, config):
            tensor = values[name].T if rows.turned(path) else values[name]
            np.testing.assert_array_equal(
                np.asarray(leaf)[index], tensor.astype(wanted), err_msg=name
            )


def test_devices_read_their_own_slices_only(tmp_path, monkeypatch):
    folder = tiny.write(tmp_path, vocab_size=64, hidden_size=64, intermediate_size=64)
    rows, config = load.read_config(folder)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    _, shapes = tree.split(model)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    places = sharding.param_shardings(shapes, tree.axes(model), mesh)
    path = "layers.0-2.self_attn.q_proj.kernel"
    assert places[path].spec == P(None, "fsdp", "tensor")
    shapes = {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[p])
              for p, s in shapes.items()}  # fmt: skip
    read: dict[int, int] = {}
    fill = files.Tensor._fill

    def counting(tensor, file, at, raw):
        read[tensor.start] = read.get(tensor.start, 0) + len(raw)
        fill(tensor, file, at, raw)

    monkeypatch.setattr(files.Tensor, "_fill", counting)
    load.load_params(folder, rows, config, shapes)
    stored = files.tensors(folder)
    for _, name in rows.slots(path, config):
        # Each of the eight devices has an eighth, and what is read once is a whole.
        assert read[stored[name].start] == stored[name].bytes


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_is_stored_inputs_first_and_with_or_without_its_prefix(tmp_path, prefix):
    hf = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    stored = tiny.tensors(hf)
    named = {name.replace("transformer.", prefix, 1): array for name, array in stored.items()}
    named[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(named, tmp_path / "model.safetensors")
    _, params = tree.split(load.load_model(str(tmp_path)))
    up = params["layers.0-1.mlp.up_proj.kernel"]
    np.testing.assert_array_equal(up[1], stored["transformer.h.1.mlp.c_fc.weight"])


def test_experts_are_stacked_by_layer_and_number(tmp_path):
    hf = tiny.SIZES | {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 3}
    stored = tiny.tensors(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(stored, tmp_path / "model.safetensors")
    _, params = tree.split(load.load_model(str(tmp_path)))
    down = params["layers.0-1.mlp.experts.down_proj.kernel"]
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    np.testing.assert_array_equal(down[1, 2], stored[name].T)


def _classifier(folder, **changes):
    architectures = ["LlamaForSequenceClassification"]
    return tiny.write(folder, architectures=architectures, **changes)


def test_a_classifier_gets_a_fresh_head_and_is_told(tmp_path, capsys):
    folder = _classifier(tmp_path, id2label={"0": "a", "1": "b", "2": "c"})
    head = tiny.tensors(json.loads((folder / "config.json").read_text()))["score.weight"]
    _, params = tree.split(load.load_model(str(folder)))
    np.testing.assert_array_equal(params["score.kernel"], head.T)
    assert capsys.readouterr().err == ""

    def change(tensors):
        del tensors["score.weight"]
        tensors["lm_head.weight"] = np.zeros((64, 16), np.float32)  # which it does without

    rewrite(folder, change)
    models = [tree.split(load.load_model(str(folder)))[1] for _ in range(2)]
    assert "score.kernel" in capsys.readouterr().err
    assert models[0]["score.kernel"].shape == (16, 3)
    assert 0 < np.abs(models[0]["score.kernel"]).max() < 0.2
    np.testing.assert_array_equal(models[0]["score.kernel"], models[1]["score.kernel"])


def test_a_classifier_is_no_language_model(tmp_path):
    folder = _classifier(tmp_path)
    rows, config = load.read_config(folder, num_labels=0)
    _, shapes = tree.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    assert load.missing_heads(folder, rows, config, shapes) == frozenset()
    with pytest.raises(ModelError, match=r"1 missing \(lm_head.weight\).*classifier"):
        load.load_params(folder, rows, config, shapes)


def test_half_a_head_is_an_error(tmp_path):
    hf = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}
    hf |= {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    hf |= {"num_attention_heads": 2, "max_position_embeddings": 34, "type_vocab_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    rows, config = load.read_config(tmp_path)
    module = load.module_of(config)
    _, shapes = tree.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    stored = {}
    for path, leaf in shapes.items():
        for index, name in rows.slots(path, config):
            shape = leaf.shape[len(index) :]
            stored[name] = np.zeros(shape[::-1] if rows.turned(path) else shape, np.float32)
    heads = {name for name in stored if name.startswith("classifier.out_proj")}
    assert len(heads) == 2
    body = {name: array for name, array in stored.items() if name not in heads}
    save_file(body, tmp_path / "model.safetensors")
    missing = load.missing_heads(tmp_path, rows, config, shapes)
    assert missing == {"classifier.kernel", "classifier.bias"}
    half = body | {"classifier.out_proj.bias": stored["classifier.out_proj.bias"]}
    save_file(half, tmp_path / "model.safetensors")
    assert load.missing_heads(tmp_path, rows, config, shapes) == frozenset()
    with pytest.raises(ModelError, match=r"1 missing \(classifier.out_proj.weight\)"):
        load.load_params(tmp_path, rows, config, shapes)


def test_a_vision_tower_is_left_alone(tmp_path):
    text = {
        key: value for key, value in tiny.SIZES.items() if "tie" not in key and "torch" not in key
    }
    text |= {"model_type": "gemma3_text", "head_dim": 4}
    text.pop("architectures")
    hf = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 4}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    stored = {
        name.replace("model.language_model.", "language_model.model.", 1): array
        for name, array in tiny.tensors(hf).items()
    }
    stored["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(stored, tmp_path / "model.safetensors")
    _, params = tree.split(load.load_model(str(tmp_path)))
    np.testing.assert_array_equal(
        params["embed_tokens.embedding"], stored["language_model.model.embed_tokens.weight"]
    )


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    folder = tiny.write(tmp_path)
    split(folder, 2)
    whole = files.tensors(folder)
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model-1\.safetensors has \d+ bytes"):
        load.load_model(str(folder))
    last = max((t for t in whole.values() if t.file == shard), key=lambda t: t.start)
    with pytest.raises(ModelError, match=r"model-1\.safetensors ends early"):
        last.read()  # cut after its header was read


def test_names_in_an_index_stay_in_the_folder(tmp_path):
    folder = tiny.write(tmp_path / "base")
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "x.bin"):
        (folder / files.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ModelError, match="names the file"):
            files.tensors(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}" + b"tail",
        (58).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,800]}}  '
        + b"\x00" * 8,
        (57).to_bytes(8, "little")
        + b'{"a":{"dtype":"F8","shape":[8],"data_offsets":[0,8]}}    '
        + b"\x00" * 8,
        b"version https://git-lfs.github.com/spec/v1",
        b"<!DOCTYPE html><html></html>",
    ],
)
def test_files_that_are_no_weights(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        files.read_header(file)
    assert str(file) in caught.value.line()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_means_the_same(tmp_path_factory, data):
    """Any byte of the header changed: a ModelError, or tensors that still lie within the file."""
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, file)
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, 8 + int.from_bytes(content[:8], "little") - 1))
    content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    size, found = len(content), {}
    with contextlib.suppress(ModelError):
        found = files.read_header(file)
    assert all(t.start + t.read().nbytes <= size for t in found.values())


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    one, same = tiny.write(tmp_path / "one"), tiny.write(tmp_path / "same")
    other = tiny.write(tmp_path / "other", seed=1)
    assert files.fingerprint(one) == files.fingerprint(same) != files.fingerprint(other)
