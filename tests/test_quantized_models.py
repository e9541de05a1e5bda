"""Models whose frozen projections are quantised: loaded, sharded, trained, resumed, exported."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from jaxtune import assemble, compare, config, setup, sharding, step, tree, tuned
from jaxtune.config import MeshConfig
from jaxtune.data import pipeline
from jaxtune.data.packing import Batch
from jaxtune.errors import ConfigError
from jaxtune.hf import load, place
from jaxtune.hf.tokenizer import load_tokenizer
from jaxtune.kernels import quantize
from jaxtune.scoring import Score, evaluate
from jaxtune.train import fit
from tests import tiny

SCHEMES = ("int8", "fp8", "int4", "nf4")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2}
MIXTRAL = WIDE | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
    "num_experts_per_tok": 2, "intermediate_size": 72,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64, "n_embd": 128,
    "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip


def one() -> Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    gpt2 = folder / "gpt2"
    gpt2.mkdir()
    (gpt2 / "config.json").write_text(json.dumps(GPT2))
    save_file(tiny.tensors(GPT2), gpt2 / "model.safetensors")
    return {
        "llama": tiny.write_complete(folder / "llama", **WIDE),
        "mixtral": tiny.write(folder / "mixtral", **MIXTRAL),
        "gpt2": gpt2,
    }


def settings(base: Path, scheme: str, **changes: Any) -> config.Config:
    values = config.Config().to_dict()
    values["model"] |= {
        "path": str(base), "dtype": "float32", "param_dtype": "float32", "quantize": scheme,
    }  # fmt: skip
    values["lora"] |= {"r": 4}
    values["data"] |= {"train": "rows", "max_length": 64}
    values["train"] |= {"batch_size": 8}
    for key, value in changes.items():
        group, name = key.split("__")
        values[group][name] = value
    return config.freeze(values)


def loaded(base: Path, scheme: str, **changes: Any):
    """(assembly, base leaves and fresh adapters) of a run on one device."""
    asked = settings(base, scheme, **changes)
    assembly = assemble.assemble(asked, base, one())
    return assembly, assemble.base(assembly) | assemble.fresh(asked, assembly)


def stood_for(assembly, params) -> dict[str, jax.Array]:
    """{path: array} of the model in plain float32 that the quantised one stands for."""
    plain = {path: leaf for path, leaf in params.items() if not path.endswith(".kernel_scale")}
    for path, layout in assembly.quantized.items():
        scale = params[f"{path}_scale"]
        plain[path] = quantize.dequantize(params[path], scale, layout, jnp.float32)
    return plain


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_what_is_loaded_is_the_checkpoint_quantised(bases, family, scheme):
    """Also of a file with inputs first (GPT-2), in chunks of a few outputs."""
    assembly, params = loaded(bases[family], scheme)
    plain = loaded(bases[family], "none")[1]
    assert assembly.quantized.keys() == {
        path for path in plain if path.startswith("layers.") and path.endswith(".kernel")
    }
    for path, leaf in plain.items():
        if path in assembly.quantized:
            values, scale = jax.jit(lambda k: quantize.quantize(k, scheme))(leaf)
            np.testing.assert_array_equal(params[path], values, err_msg=path)
            np.testing.assert_array_equal(params[f"{path}_scale"], scale, err_msg=path)
        else:
            np.testing.assert_array_equal(params[path], leaf, err_msg=path)


def test_chunks_of_a_tensor_meet(bases, monkeypatch):
    whole = loaded(bases["llama"], "int4")[1]
    monkeypatch.setattr(place, "_CHUNK", 128 * 4 * 7)  # seven outputs; the last chunk reaches back
    parts = loaded(bases["llama"], "int4")[1]
    for path, leaf in whole.items():
        np.testing.assert_array_equal(parts[path], leaf, err_msg=path)


def first_step(asked: config.Config, mesh: Mesh):
    """(loss and gradient norm of a step on the mesh, frozen leaves on the host)."""
    assembly = assemble.assemble(asked, Path(asked.model.path), mesh)
    program = setup.program(asked, assembly, 10)
    state, frozen = setup.initial(asked, assembly, program, mesh)
    host = {path: np.asarray(leaf) for path, leaf in frozen.items()}
    with jax.set_mesh(mesh):
        batch = next(iter(setup.to_mesh([tokens(8, 16)], mesh)))
        _, metrics = step.jit_train(program, state)(state, frozen, batch)
    return [float(metrics.loss.total), float(metrics.grad_norm)], host


@pytest.mark.parametrize(
    ("family", "scheme", "mesh"),
    [
        ("llama", "nf4", MeshConfig(fsdp=2, data=2, tensor=2)),
        pytest.param("llama", "int8", MeshConfig(fsdp=2, tensor=4), marks=pytest.mark.slow),
        # More devices than groups:
        pytest.param("llama", "nf4", MeshConfig(fsdp=8), marks=pytest.mark.slow),
        ("mixtral", "nf4", MeshConfig(fsdp=2, expert=4)),
    ],
)
def test_every_mesh_has_the_same_values_and_gradients(bases, family, scheme, mesh):
    projections = ("q_proj", "w2") if family == "mixtral" else "all-linear"
    asked = settings(bases[family], scheme, lora__target_modules=projections)
    expected, leaves = first_step(asked, one())
    found, cut = first_step(asked, sharding.make_mesh(mesh))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(cut[path], leaf, err_msg=path)


def tokens(rows: int, length: int) -> Batch:
    """A batch in which every token bears loss."""
    ids = np.random.default_rng(0).integers(0, 64, (rows, length + 1)).astype(np.int32)
    whole = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), whole, ones)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [*(("llama", scheme) for scheme in SCHEMES), ("mixtral", "int8"), ("mixtral", "nf4")],
)
def test_logits_are_those_of_what_the_values_stand_for(bases, family, scheme):
    assembly, params = loaded(bases[family], scheme)
    plain_assembly = loaded(bases[family], "none")[0]
    ids = tokens(8, 16).tokens
    found = logits(assembly, params, ids)
    expected = logits(plain_assembly, stood_for(assembly, params), ids)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def logits(assembly, params, ids) -> np.ndarray:
    with jax.set_mesh(one()):
        return np.asarray(jax.jit(lambda p, x: tree.merge(assembly.graphdef, p)(x))(params, ids))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_remat_no_copy_of_all_kernels_is_kept(bases, family):
    """Of a stack of layers nothing but the values is in the compiled step."""
    asked = settings(bases[family], "int4", model__remat="none")
    grid = one()
    assembly = assemble.assemble(asked, bases[family], grid)
    program = setup.program(asked, assembly, 10)
    inputs = setup.abstract_inputs(asked, assembly, program, grid)
    with jax.set_mesh(grid):
        text = step.jit_train(program, inputs[0]).lower(*inputs).compile().as_text()
    assert "u8[2," in text
    for layout in assembly.quantized.values():
        shape = ",".join(map(str, layout.shape))
        assert f"f32[{shape}]" not in text


def test_what_travels_is_the_values(bases):
    asked = settings(bases["llama"], "nf4", data__max_length=48)  # activations have other sizes
    grid = sharding.make_mesh(MeshConfig(fsdp=2, data=4))
    assembly = assemble.assemble(asked, bases["llama"], grid)
    program = setup.program(asked, assembly, 10)
    inputs = setup.abstract_inputs(asked, assembly, program, grid)
    with jax.set_mesh(grid):
        text = step.jit_train(program, inputs[0]).lower(*inputs).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert sum("u8[" in line.split(" all-gather(")[0] for line in gathers) >= 2 * 7  # and back
    sizes = {math.prod(layout.shape[1:]) for layout in assembly.quantized.values()}
    for line in gathers:
        shape = line.split(" = ")[1].split("[")
        if shape[0] in ("f32", "bf16"):
            assert math.prod(map(int, shape[1].split("]")[0].split(","))) not in sizes, line


def test_full_fine_tuning_has_nothing_to_quantise(bases):
    with pytest.raises(ConfigError, match=r"model\.quantize is 'nf4' and every projection is tra"):
        loaded(bases["llama"], "nf4", lora__r=0)


def test_what_is_trained_in_full_is_not_quantised(bases):
    rules = (("layers.1.mlp", "train"),)
    assembly, params = loaded(
        bases["llama"], "int8", optim__rules=rules, lora__modules_to_save=("o_proj",)
    )
    kept = {p for p, leaf in params.items() if p.endswith(".kernel") and leaf.dtype == jnp.float32}
    assert kept == {
        "layers.0-0.self_attn.o_proj.kernel",
        "layers.1-1.self_attn.o_proj.kernel",
        "layers.1-1.mlp.down_proj.kernel",
        "layers.1-1.mlp.gate_proj.kernel",
        "layers.1-1.mlp.up_proj.kernel",
    }
    assert not kept & assembly.quantized.keys()
    plain = loaded(bases["llama"], "none", optim__rules=rules, lora__modules_to_save=("o_proj",))[0]
    assert assembly.sizes == plain.sizes
    assert not [path for path in assembly.trained if path.endswith("kernel_scale")]


def test_dora_begins_as_the_quantised_base(bases):
    asked = settings(bases["llama"], "nf4", lora__use_dora=True)
    grid = one()
    assembly = assemble.assemble(asked, bases["llama"], grid)
    state, frozen = setup.initial(asked, assembly, setup.program(asked, assembly, 10), grid)
    plain = stood_for(assembly, frozen | state.trainable)
    path = "layers.0-1.mlp.up_proj"
    lengths = np.linalg.norm(np.asarray(plain[f"{path}.kernel"]), axis=1)
    np.testing.assert_allclose(state.trainable[f"{path}.lora.magnitude"], lengths, rtol=1e-5)
    ids = tokens(8, 16).tokens
    bare, params = loaded(bases["llama"], "nf4")
    found = logits(assembly, frozen | state.trainable, ids)
    np.testing.assert_allclose(found, logits(bare, params, ids), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """(settings, workdir) of a run on NF4 over all devices."""
    folder = tmp_path_factory.mktemp("run")
    rows = tiny.write_rows(folder / "rows.jsonl")
    common = {
        "data__train": str(rows), "data__eval_fraction": 0.2, "train__tensorboard": False,
        "optim__lr": 1e-2, "checkpoint__every": 4, "optim__warmup": 0,
        "optim__schedule": "constant",
    }  # fmt: skip
    asked = settings(bases["llama"], "nf4", train__steps=8, **common)
    fit(asked, folder / "whole")
    return asked, folder / "whole"


def test_a_run_learns_on_it_and_scores_write_and_export(run, bases, tmp_path, capsys):
    _, workdir = run
    result = json.loads((workdir / "result.json").read_text())
    assert result["loss_after"] < 0.9 * result["loss_before"]
    scores = tuned.evaluate(workdir)
    assert scores["tuned"]["loss"] == pytest.approx(result["loss_after"], rel=1e-5)
    assert scores["base"]["loss"] == pytest.approx(result["loss_before"], rel=1e-5)
    assert len(tuned.generate(workdir, ["1 then"], max_new_tokens=3)) == 1
    tuned.export(workdir, tmp_path / "hf", format="hf")
    assert "trained on nf4 weights, merged into those of" in capsys.readouterr().err
    assert compare.verify(str(tmp_path / "hf"), str(workdir))["logits"]["alike"]
    tuned.export(workdir, tmp_path / "peft", format="peft")
    merged, base = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", bases["llama"]))
    opened = tuned.open_run(workdir)
    path = "layers.0-1.self_attn.q_proj"
    a, b = (opened.trainable[f"{path}.lora.{part}"][0] for part in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    # Into the checkpoint's own weights, not into the quantised ones.
    np.testing.assert_allclose(merged[name], base[name] + 8 * (a @ b).T, rtol=1e-4, atol=1e-5)
    untouched = "model.embed_tokens.weight"
    np.testing.assert_array_equal(merged[untouched], base[untouched])


def test_a_run_goes_on_as_if_never_stopped(run, tmp_path):
    asked, whole = run
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "8")
    fit(asked, half)
    ends = [
        json.loads((folder / "checkpoints" / "8" / "jaxtune.json").read_text())["arrays"]
        for folder in (whole, half)
    ]
    assert ends[0] == ends[1]
    other = config.freeze(
        asked.to_dict() | {"model": asked.to_dict()["model"] | {"quantize": "int8"}}
    )
    with pytest.raises(ConfigError, match=r'model\.quantize was "nf4", is now "int8"'):
        fit(other, half)


@pytest.fixture(scope="module")
def stories(shared_data):
    """Scores and logits of a real model on real text, for any scheme."""
    base = shared_data / "stories260k-hf"
    asked = settings(base, "none", data__train=str(shared_data / "text" / "tinystories.txt"))
    asked = config.freeze(asked.to_dict() | {"task": "pretrain"})
    prepared = pipeline.prepare(
        asked, load_tokenizer(str(base), 512), lambda *_: None, setup.form(base, describe(base))
    )
    batches = [prepared.train.batch(range(i, i + 64)) for i in range(0, 256, 64)]
    grid = one()

    def measure(scheme: str) -> tuple[Score, np.ndarray]:
        assembly, params = loaded(base, scheme)
        program = setup.program(settings(base, scheme), assembly, 1)
        trainable, frozen = tree.partition(params, assembly.groups)
        with jax.set_mesh(grid):
            placed = setup.to_mesh(batches, grid)
            score = evaluate(step.jit_eval(program), trainable, frozen, placed)
        return score, logits(assembly, params, batches[0].tokens)

    return measure, measure("none")


def describe(base: Path):
    return load.read_config(base)[1]


# Measured on all of the text: perplexity 9.039; int8 9.047, fp8 9.095, int4 10.68, nf4 10.28. This
# model has 64 inputs a column; larger ones lose far less.
QUALITY = {"int8": (0.004, 0.02), "fp8": (0.012, 0.06), "int4": (0.22, 0.21), "nf4": (0.17, 0.18)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quality_of_a_real_model(stories, scheme):
    """A wrong scale, nibble or quantile is far outside of these bounds."""
    measure, (exact, exact_BTV) = stories
    score, found_BTV = measure(scheme)
    worse, distance = QUALITY[scheme]
    assert abs(score.perplexity / exact.perplexity - 1) < worse
    centred = exact_BTV - exact_BTV.mean(axis=-1, keepdims=True)
    relative = np.sqrt(np.mean((found_BTV - exact_BTV) ** 2) / np.mean(centred**2))
    assert distance / 4 < relative < distance
