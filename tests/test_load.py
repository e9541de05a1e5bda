"""Checkpoints read: single and sharded files, tied heads, meshes and dtypes; and refused."""

import contextlib
import json

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
from jaxtune.hf import files, load
from jaxtune.models.decoder import Decoder
from tests import tiny

TOKENS = np.arange(12).reshape(2, 6)


def rewrite(folder, change) -> None:
    """Applies `change` to the {name: array} of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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
    tensors = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, parts / file)
    (parts / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
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
