"""`jaxtune verify`: equal within rounding, or what differs; runs and adapters too."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtune import compare
from jaxtune.cli import main
from jaxtune.errors import ModelError
from jaxtune.hf import files
from jaxtune.hf.convert import convert
from jaxtune.hf.verify import Held, compare_tensors
from tests import tiny


def _values(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in files.tensors(folder).items()}


def _changed(base: Path, out: Path, change) -> str:
    """A copy of the base with `change(tensors)` applied."""
    convert(str(base), out)
    values = _values(out)
    change(values)
    save_file(values, out / "model.safetensors")
    return str(out)


def _one(a: np.ndarray, b: np.ndarray):
    return compare_tensors({"x": Held(a)}, {"x": Held(b)})


def test_one_step_of_the_coarser_dtype_is_rounding_and_two_are_not():
    exact = np.linspace(0.01, 3.0, 4000, dtype=np.float32)
    rounded = exact.astype(ml_dtypes.bfloat16)
    (found,) = _one(exact, rounded)
    assert found.rounding
    assert found.count == np.count_nonzero(exact != rounded.astype(np.float32))
    assert found.most == np.abs(exact - rounded.astype(np.float32)).max()
    up = (rounded.view(np.uint16) + 1).view(ml_dtypes.bfloat16)
    assert _one(rounded, up)[0].rounding
    twice = (rounded.view(np.uint16) + 3).view(ml_dtypes.bfloat16)
    assert not _one(rounded, twice)[0].rounding
    # A small value beside large ones is held to its own size.
    wrong = exact.copy()
    wrong[0] *= 1.05
    assert not _one(wrong, exact.astype(ml_dtypes.bfloat16))[0].rounding


def test_not_a_number_is_never_alike_another():
    one = np.array([1.0, np.nan], np.float32)
    assert _one(one, one.copy()) == []  # the same bytes
    (found,) = _one(one, np.ones(2, np.float32))
    assert not found.rounding
    assert _one(np.arange(3), np.arange(3)) == []
    assert _one(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float16)) == []
    assert not _one(np.arange(3), np.array([0, 1, 3]))[0].rounding


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.write_complete(tmp_path / "base")


def test_a_copy_is_equal_and_a_cast_is_rounding(base, tmp_path):
    convert(str(base), tmp_path / "copy", shard_bytes=4000)
    same = compare.verify(str(base), str(tmp_path / "copy"))
    assert (same["differ"], same["logits"]["most"]) == (0, 0.0)
    assert same["logits"]["positions"] == same["logits"]["same_argmax"] > 20
    convert(str(base), tmp_path / "half", dtype="bfloat16")
    half = compare.verify(str(base), str(tmp_path / "half"))
    assert half["differ"] == half["tensors"] == len(_values(base))
    assert half["beyond_rounding"] == 0
    assert 0 < half["logits"]["most"] < 0.1


def test_everything_that_differs_is_said(base, tmp_path, capsys):
    up, norm, q = ("model.layers.{}.mlp.up_proj.weight", "model.norm.weight",
                   "model.layers.2.self_attn.q_proj.weight")  # fmt: skip

    def change(values):
        values[up.format(0)][2, 3] += 0.5
        values[q][:2] += 0.25
        del values["lm_head.weight"]
        values[norm] = np.ones(15, np.float32)

    other = _changed(base, tmp_path / "other", change)
    found = compare_tensors(files.tensors(base), files.tensors(Path(other)))
    by_name = {d.name: d for d in found}
    assert by_name["lm_head.weight"].what == "only in A"
    assert by_name[norm].what == "shape"
    assert (by_name[up.format(0)].count, by_name[q].count) == (1, 32)
    assert by_name[up.format(0)].most == pytest.approx(0.5)
    assert [d.name for d in found[2:]] == [up.format(0), q]  # the worst first
    one = _changed(base, tmp_path / "one", lambda v: v[up.format(1)].__setitem__((0, 0), 9.0))
    with pytest.raises(compare.Differs, match=r"differ in 1 of 30 tensors") as caught:
        compare.verify(str(base), one)
    assert caught.value.exit_code == 65
    assert caught.value.result["logits"]["most"] > 0
    assert up.format(1) in capsys.readouterr().err


def test_names_may_begin_otherwise_and_tied_tables_lie_twice(tmp_path):
    base = tiny.write(tmp_path / "base", tie_word_embeddings=True)

    def bare(values):
        for name in list(values):
            values[name.removeprefix("model.")] = values.pop(name)
        values["lm_head.weight"] = values["embed_tokens.weight"].copy()
        values["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    other = _changed(base, tmp_path / "other", bare)
    assert compare.verify(str(base), other)["differ"] == 0


def test_the_verb(base, tmp_path, capsys):
    convert(str(base), tmp_path / "same")
    assert main(["verify", str(base), str(tmp_path / "same"), "--json", "--prompt=Hello"]) == 0
    assert json.loads(capsys.readouterr().out)["differ"] == 0
    name = "model.norm.weight"
    other = _changed(base, tmp_path / "other", lambda v: v[name].__setitem__(0, 9.0))
    assert main(["verify", str(base), other, "--json"]) == 65
    shown = capsys.readouterr()
    assert json.loads(shown.out)["worst"][0]["name"] == name
    assert "jaxtune: error[model]" in shown.err


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short LoRA run, with its base beside it."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_complete(folder / "base")
    tiny.write_rows(folder / "rows.jsonl")
    command = ["train", "--config=configs/lora.py", f"--workdir={folder / 'workdir'}"]
    command += [f"--config.model.path={folder / 'base'}"]
    command += [f"--config.data.train={folder / 'rows.jsonl'}", "--config.data.max_length=64"]
    command += ["--config.train.steps=3", "--config.train.batch_size=8", "--config.optim.lr=0.05"]
    assert main(command) == 0
    for kind in ("hf", "peft"):
        out = ["export", f"--workdir={folder / 'workdir'}", f"--format={kind}"]
        assert main([*out, f"--out={folder / kind}"]) == 0
    return folder


def test_a_run_and_its_exports(run, capsys):
    workdir, base = str(run / "workdir"), str(run / "base")
    whole = compare.verify(workdir, str(run / "hf"))
    assert (whole["differ"], whole["beyond_rounding"]) == (0, 0)
    assert compare.verify(str(run / "peft"), workdir)["differ"] == 0
    assert compare.verify(str(run / "peft"), str(run / "peft"))["logits"] is None
    with pytest.raises(compare.Differs, match=r"differ in 21 of"):  # every projection
        compare.verify(base, workdir)
    with pytest.raises(ModelError, match="a whole checkpoint"):
        compare.verify(base, str(run / "peft"))


def test_another_config_with_the_same_tensors_is_named(base, tmp_path):
    other = Path(_changed(base, tmp_path / "other", lambda values: None))
    _set(other, rope_theta=5e5)
    with pytest.raises(ModelError, match=r"other models in config.json: ropes .*500000"):
        compare.verify(str(base), str(other))
    _set(other, rope_theta=1e4, use_cache=False, transformers_version="4.0")
    assert compare.verify(str(base), str(other))["settings"] == []


def test_fields_nobody_knows_are_a_warning_and_a_difference(base, tmp_path, capsys):
    other = Path(_changed(base, tmp_path / "other", lambda values: None))
    _set(other, logit_scale=2.0)
    compare.verify(str(other), str(other))
    assert "warning: " in (said := capsys.readouterr().err)
    assert "logit_scale" in said
    with pytest.raises(ModelError, match=r"logit_scale None and 2.0"):
        compare.verify(str(base), str(other))


def test_equal_folders_that_hold_a_nan_are_equal(base, tmp_path):
    def spoil(values):
        values["model.norm.weight"][3] = np.nan

    spoilt = _changed(base, tmp_path / "spoilt", spoil)
    assert compare.verify(spoilt, spoilt)["differ"] == 0
    with pytest.raises(ModelError, match=r"differ in 1 of \d+ tensors, such as model.norm.weight"):
        compare.verify(str(base), spoilt)


def _set(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
