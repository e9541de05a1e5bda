import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError, ModelError, NumericsError
from jaxtune.hf.adapter import open_adapter, read_adapter, refused_by_servers, write_adapter
from jaxtune.hf.load import read_config
from jaxtune.models.blocks import Experts
from tests import tiny

LORA = LoraConfig(r=3, alpha=6.0, dropout=0.1)
PREFIX = "base_model.model."


def _leaves(*modules: str, r: int = 3) -> dict[str, Any]:
    """Random adapters of q_proj ([16, 16]) of these stacks."""
    rng = np.random.default_rng(1)
    leaves = {}
    for module in modules:
        layers = module.split(".")[1].split("-")
        count = int(layers[1]) - int(layers[0]) + 1
        leaves[f"{module}.lora.A"] = rng.normal(size=(count, 16, r)).astype(np.float32)
        leaves[f"{module}.lora.B"] = rng.normal(size=(count, r, 16)).astype(np.float32)
    return leaves


TRAINED = _leaves("layers.0-2.self_attn.q_proj")


def _write(out: Path, base: Path, trained=None, lora: LoraConfig = LORA, name="owner/model"):
    rows, config = read_config(base)
    trained = TRAINED if trained is None else trained
    return write_adapter(out, base, rows, config, trained, lora=lora, base_name=name)


def _settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def _change(folder: Path, **settings: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(_settings(folder) | settings))


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.write(tmp_path / "base")


@pytest.fixture
def folder(tmp_path, base) -> Path:
    _write(tmp_path / "adapter", base)
    return tmp_path / "adapter"


def _read(folder: Path, base: Path, lora: LoraConfig = LORA, shapes=None):
    return read_adapter(folder, *read_config(base), lora, TRAINED if shapes is None else shapes)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_tensors_have_pefts_names_and_orientation(folder):
    found = load_file(folder / "adapter_model.safetensors")
    assert len(found) == 6
    for layer in range(3):
        module = f"{PREFIX}model.layers.{layer}.self_attn.q_proj"
        a, b = found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"]
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, TRAINED["layers.0-2.self_attn.q_proj.lora.A"][layer].T)
        np.testing.assert_array_equal(b, TRAINED["layers.0-2.self_attn.q_proj.lora.B"][layer].T)


def test_settings_are_those_peft_reads(folder):
    assert _settings(folder) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/model",
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": ["q_proj"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def test_the_card_names_a_hub_base_and_no_folder(folder, base, tmp_path):
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "owner/model"\nlibrary_name: peft\n')
    assert '- "base_model:adapter:owner/model"\n' in card
    _write(tmp_path / "local", base, name=str(base))
    assert str(base) not in (tmp_path / "local" / "README.md").read_text()
    assert _settings(tmp_path / "local")["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("stacks", "names", "layers"),
    [
        (("layers.0-2.self_attn.q_proj",), ["q_proj"], None),
        (("layers.0-0.self_attn.q_proj", "layers.2-2.self_attn.q_proj"), ["q_proj"], [0, 2]),
        (
            ("layers.0-1.self_attn.q_proj", "layers.1-1.self_attn.o_proj"),
            [
                "model.layers.0.self_attn.q_proj",
                "model.layers.1.self_attn.o_proj",
                "model.layers.1.self_attn.q_proj",
            ],
            None,
        ),
    ],
)
def test_targets_are_said_as_shortly_as_they_can(base, tmp_path, stacks, names, layers):
    _write(tmp_path / "out", base, _leaves(*stacks))
    found = _settings(tmp_path / "out")
    assert found["target_modules"] == names
    assert found["layers_to_transform"] == layers


def test_modules_trained_in_full_are_saved_by_names_that_mean_only_them(base, tmp_path):
    # peft matches by plain endswith, so "norm" would take input_layernorm too.
    full = {"norm.scale": np.ones(16, np.float32), "lm_head.embedding": np.ones((64, 16), "f4")}
    _write(tmp_path / "out", base, TRAINED | full)
    assert _settings(tmp_path / "out")["modules_to_save"] == ["lm_head", "model.norm"]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_array_equal(found[f"{PREFIX}model.norm.weight"], full["norm.scale"])
    np.testing.assert_array_equal(found[f"{PREFIX}lm_head.weight"], full["lm_head.embedding"])


def test_a_full_fine_tune_has_no_adapter(base, tmp_path):
    with pytest.raises(ConfigError, match=r"a full fine-tune .* has none; try: --format=hf"):
        _write(tmp_path / "out", base, {"norm.scale": np.ones(16)}, LoraConfig(r=0))


@pytest.mark.parametrize(
    "extra",
    [
        {"layers.0-2.self_attn.q_proj.kernel": np.ones((3, 16, 16), np.float32)},  # and an adapter
        {"layers.0-2.self_attn.o_proj.bias": np.ones((3, 16), np.float32)},  # the kernel is frozen
    ],
)
def test_what_peft_cannot_express_is_refused(tmp_path, extra):
    base = tiny.write(tmp_path / "base", attention_bias=True)
    with pytest.raises(ConfigError, match=r"peft cannot express .*layers.0.*try: --format=hf"):
        _write(tmp_path / "out", base, TRAINED | extra)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_names_the_base_does_not_have_are_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"the base has no model.layers.3.self_attn.q_proj.weight"):
        _write(tmp_path / "out", base, _leaves("layers.2-3.self_attn.q_proj"))


def test_values_that_are_not_finite_are_never_exported(base, tmp_path):
    wrong = {"layers.0-2.self_attn.q_proj.lora.A": np.full((3, 16, 3), np.nan, np.float32)}
    with pytest.raises(NumericsError, match=r"lora_A.weight holds 48 values"):
        _write(tmp_path / "out", base, TRAINED | wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_was_written_is_read_again(folder, base):
    found = _read(folder, base)
    assert found.keys() == TRAINED.keys()
    for path, values in found.items():
        np.testing.assert_array_equal(values, TRAINED[path])


def test_layers_may_be_stacked_otherwise_than_when_written(folder, base):
    wanted = TRAINED["layers.0-2.self_attn.q_proj.lora.A"]
    shapes = _leaves("layers.0-0.self_attn.q_proj", "layers.1-2.self_attn.q_proj")
    found = _read(folder, base, shapes=shapes)
    np.testing.assert_array_equal(found["layers.0-0.self_attn.q_proj.lora.A"], wanted[:1])
    np.testing.assert_array_equal(found["layers.1-2.self_attn.q_proj.lora.A"], wanted[1:])


def _adapter(module: str, rank: int, **more: Any) -> dict[str, Any]:
    """An adapter of [16, 16] in one layer, with all its leaves."""
    rng = np.random.default_rng(rank)
    leaves = {"A": rng.normal(size=(1, 16, rank)), "B": rng.normal(size=(1, rank, 16)), **more}
    return {f"{module}.lora.{name}": np.asarray(v, np.float32) for name, v in leaves.items()}


def test_ranks_and_alphas_of_their_own_are_written_and_read(base, tmp_path):
    lora = LoraConfig(
        r=3,
        alpha=6.0,
        rank_pattern=(("layers.2.self_attn.q_proj", 5), ("q_proj", 2)),  # in this order
        alpha_pattern=(("o_proj", 1.5),),
        use_rslora=True,
    )
    trained = {
        **_adapter("layers.0-0.self_attn.q_proj", 2, scale=[6 / 2**0.5]),
        **_adapter("layers.2-2.self_attn.q_proj", 5, scale=[6 / 5**0.5]),
        **_adapter("layers.0-0.self_attn.o_proj", 3, scale=[1.5 / 3**0.5]),
    }
    _write(tmp_path / "out", base, trained, lora)
    found = _settings(tmp_path / "out")
    assert list(found["rank_pattern"].items()) == [("layers.2.self_attn.q_proj", 5), ("q_proj", 2)]
    assert found["alpha_pattern"] == {"o_proj": 1.5}
    opened = open_adapter(tmp_path / "out", *read_config(base))
    assert opened.keys() == trained.keys()
    for path, values in trained.items():
        np.testing.assert_allclose(opened[path], values, rtol=1e-6)
    shapes = {path: v for path, v in trained.items() if not path.endswith("scale")}
    again = _read(tmp_path / "out", base, lora, shapes)
    _write(tmp_path / "again", base, again, lora)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "again")
    other = LoraConfig(r=3, alpha=6.0, rank_pattern=(("q_proj", 2),), use_rslora=True)
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path / "out", base, other, shapes)
    assert (
        'try: --config.lora.rank_pattern=\'[["layers.2.self_attn.q_proj", 5], ["q_proj", 2]]\' '
        "--config.lora.alpha_pattern='[[\"o_proj\", 1.5]]'"
    ) in caught.value.line()


def test_what_gives_every_module_the_same_rank_and_scale_may_be_said_otherwise(folder, base):
    other = LoraConfig(r=8, alpha=6.0, rank_pattern=(("self_attn.q_proj", 3),))
    assert _read(folder, base, other).keys() == TRAINED.keys()


def test_magnitudes_of_dora(base, tmp_path):
    lora = LoraConfig(r=3, alpha=6.0, use_dora=True)
    magnitude = np.arange(1, 49, dtype=np.float32).reshape(3, 16)
    trained = TRAINED | {"layers.0-2.self_attn.q_proj.lora.magnitude": magnitude}
    _write(tmp_path / "out", base, trained, lora)
    assert _settings(tmp_path / "out")["use_dora"] is True
    file = tmp_path / "out" / "adapter_model.safetensors"
    stored = load_file(file)
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    np.testing.assert_array_equal(stored[name], magnitude[1])
    # Early files of peft end in .weight.
    save_file({k + ".weight" * k.endswith("vector"): v for k, v in stored.items()}, file)
    found = _read(tmp_path / "out", base, lora, trained)
    np.testing.assert_array_equal(found["layers.0-2.self_attn.q_proj.lora.magnitude"], magnitude)
    with pytest.raises(ConfigError, match=r"has use_dora True; .*--config.lora.use_dora=True"):
        _read(tmp_path / "out", base)
    del stored[name]
    save_file(stored, file)
    with pytest.raises(ModelError, match=r"q_proj without magnitude, .* rank 3"):
        _read(tmp_path / "out", base, lora, trained)


def test_a_new_head_of_a_classifier(base, tmp_path):
    rows, config = read_config(base, num_labels=3)
    score = np.arange(48, dtype=np.float32).reshape(16, 3)
    trained = TRAINED | {"score.kernel": score}
    out = tmp_path / "out"
    write_adapter(out, base, rows, config, trained, lora=LORA, base_name="owner/model")
    settings = _settings(out)
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["modules_to_save"] == ["classifier", "score"]
    found = load_file(out / "adapter_model.safetensors")
    np.testing.assert_array_equal(found[f"{PREFIX}score.weight"], score.T)
    assert "num_labels=3" in (out / "README.md").read_text()
    again = read_adapter(out, rows, config, LORA, trained)
    np.testing.assert_array_equal(again["score.kernel"], score)
    # Whoever merges it need not know beforehand that it is a classifier.
    np.testing.assert_array_equal(open_adapter(out, *read_config(base))["score.kernel"], score)


def test_adapters_of_experts_are_not_for_peft(base, tmp_path):
    rows, config = read_config(base)
    config = dataclasses.replace(config, experts=Experts(4, 2, 24, True))
    out = tmp_path / "out"
    write_adapter(out, base, rows, config, TRAINED, lora=LORA, base_name="owner/model")
    for module in ("experts.up_proj.lora.A", "up_proj.lora.A", "router.weight"):
        trained = TRAINED | {f"layers.0-2.mlp.{module}": np.ones((3, 4, 16, 3))}
        with pytest.raises(ConfigError, match=rf"mlp\.{module} .*try: --format=hf"):
            write_adapter(out, base, rows, config, trained, lora=LORA, base_name="owner/model")


@pytest.mark.parametrize(
    ("lora", "extra", "reason"),
    [
        (LORA, (), None),
        (LoraConfig(use_dora=True), (), "it is DoRA"),
        (LORA, ("layers.0-2.mlp.experts.up_proj.lora.A",), "it has adapters of experts"),
        (LORA, ("lm_head.embedding",), "modules are trained in full (lm_head)"),
        (LORA, ("score.kernel",), "modules are trained in full (score)"),
        (LoraConfig(rank_pattern=(("q_proj", 2),)), (), "ranks or alphas differ between modules"),
    ],
)
def test_what_servers_refuse(lora, extra, reason):
    assert refused_by_servers(lora, [*TRAINED, *extra]) == reason


def test_half_precision_adapters_are_read_as_float32(folder, base):
    file = folder / "adapter_model.safetensors"
    half = {name: values.astype(ml_dtypes.bfloat16) for name, values in load_file(file).items()}
    save_file(half, file)
    for path, values in _read(folder, base).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, TRAINED[path], rtol=0.01)


def test_both_ends_of_a_tied_model_are_one_leaf(tmp_path):
    base = tiny.write(tmp_path / "base", tie_word_embeddings=True)
    trained = TRAINED | {"embed_tokens.embedding": np.full((64, 16), 0.5, np.float32)}
    _write(tmp_path / "out", base, trained)
    settings = _settings(tmp_path / "out")
    assert settings["ensure_weight_tying"] is True
    assert settings["modules_to_save"] == ["embed_tokens", "lm_head"]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (found[f"{PREFIX}lm_head.weight"] == 0.5).all()
    again = _read(tmp_path / "out", base, shapes=trained)
    np.testing.assert_array_equal(
        again["embed_tokens.embedding"], trained["embed_tokens.embedding"]
    )


def _save(folder: Path, **tensors: np.ndarray) -> None:
    """Adds tensors to an adapter's file."""
    file = folder / "adapter_model.safetensors"
    named = {PREFIX + name: values for name, values in tensors.items()}
    save_file(load_file(file) | named, file)


def test_ends_of_a_tied_matrix_that_went_apart_are_refused(tmp_path):
    base, out = tiny.write(tmp_path / "base", tie_word_embeddings=True), tmp_path / "out"
    _write(out, base)
    ones, embedding = np.ones((64, 16), np.float32), "model.embed_tokens.weight"
    wanted = TRAINED | {"embed_tokens.embedding": ones}
    # peft's save_embedding_layers: the base's own matrix, of both ends
    _save(out, **{embedding: ones})
    np.testing.assert_array_equal(
        _read(out, base, shapes=wanted)["embed_tokens.embedding"], ones
    )  # fmt: skip
    _save(out, **{"lm_head.weight": ones})
    assert _read(out, base, shapes=wanted).keys() == wanted.keys()
    _save(out, **{"lm_head.weight": 2 * ones})
    with pytest.raises(ModelError, match=r"one end of .* tied embedding apart"):
        _read(out, base, shapes=wanted)
    # modules_to_save of one end: peft leaves the other as it was
    _write(tmp_path / "one", base)
    _save(tmp_path / "one", **{embedding: ones})
    _change(tmp_path / "one", modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"one end of .* tied embedding apart"):
        _read(tmp_path / "one", base, shapes=wanted)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraConfig(r=4, alpha=6.0), r"has r 3; this run has r 4; try: --config.lora.r=3"),
        (
            LoraConfig(r=3, alpha=8.0),
            r"has alpha 6.0; this run has alpha 8.0; try: --config.lora.alpha=6$",
        ),
        (LoraConfig(r=3, alpha=6.0, use_rslora=True), r"has use_rslora False; .* use_rslora True"),
    ],
)
def test_another_rank_or_scale_is_refused(folder, base, lora, words):
    with pytest.raises(ConfigError, match=words):
        _read(folder, base, lora)


def test_other_modules_are_refused_and_both_sides_named(folder, base):
    with pytest.raises(ConfigError) as caught:
        _read(
            folder,
            base,
            shapes=_leaves("layers.0-1.self_attn.q_proj", "layers.0-0.self_attn.o_proj"),
        )
    run, adapter = str(caught.value).split("only the adapter has")
    assert "layers.0.self_attn.o_proj.lora_A" in run
    assert "q_proj" not in run
    assert "layers.2.self_attn.q_proj.lora_A" in adapter
    assert "o_proj" not in adapter


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("a_setting_of_tomorrow", 0.5),
    ],
)
def test_settings_that_mean_something_else_are_refused(folder, base, key, value):
    _change(folder, **{key: value})
    with pytest.raises(ModelError, match=f"has {key} .* cannot express"):
        _read(folder, base)


@pytest.mark.parametrize(
    "settings",
    [{"r": "many"}, {"rank_pattern": ["q_proj"]}, {"alpha_pattern": {"(": 2}}, {"r": None}],
)
def test_damaged_settings_are_refused(folder, base, settings):
    _change(folder, **settings)
    with pytest.raises(ModelError, match=r"adapter_config.json is damaged"):
        _read(folder, base)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.lora_embedding_A",
        "lm_head.lora_A.weight",
        "model.layers.3.self_attn.q_proj.lora_A.weight",  # of a deeper base
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.vision.q_proj.weight",
    ],
)
def test_tensors_that_we_cannot_place_are_named(folder, base, name):
    _save(folder, **{name: np.ones((3, 16), np.float32)})
    with pytest.raises(ModelError, match=f"no module, of this base: {PREFIX}{name}"):
        _read(folder, base)


def test_a_rank_that_is_not_the_configs_is_refused(folder, base):
    _change(folder, r=4)
    with pytest.raises(ModelError, match=r"q_proj with rank 3, .* says rank 4"):
        _read(folder, base, LoraConfig(r=4, alpha=6.0))


def test_an_adapter_of_a_wider_model_is_refused(folder, base):
    wide = {path: np.empty((3, 32, 3) if path.endswith("A") else (3, 3, 16)) for path in TRAINED}
    with pytest.raises(ModelError, match=r"lora_A.weight as \[3, 16, 3\], the run as \[3, 32, 3\]"):
        _read(folder, base, shapes=wide)


def test_damage_is_refused(folder, base):
    file = folder / "adapter_model.safetensors"
    values = load_file(file)
    next(iter(values.values()))[0, 0] = np.nan
    save_file(values, file)
    with pytest.raises(ModelError, match="is not finite"):
        _read(folder, base)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="bytes"):
        _read(folder, base)


def test_pickled_weights_and_missing_files_are_refused(folder, base):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"only pickled weights \(adapter_model.bin\)"):
        _read(folder, base)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config.json is missing"):
        _read(folder, base)
