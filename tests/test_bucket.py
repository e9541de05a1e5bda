"""Buckets, against a server on 127.0.0.1 that speaks their protocol."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed", allow_module_level=True)

from jaxtune import bucket, pods
from jaxtune.checkpoint import MANIFEST, Checkpoints, restore, steps
from jaxtune.errors import ConfigError, DataError, Interrupted, ModelError, StorageError
from jaxtune.plan import sizes
from jaxtune.train import fit
from tests.faults import bucket_server
from tests.faults.saver import abstract, state_of
from tests.test_train import numbers, settings, weights


@pytest.fixture(scope="module")
def server() -> Iterator[bucket_server.Bucket]:
    """One for all tests here: the libraries below keep the address they have seen first."""
    objects = bucket_server.Bucket()
    with bucket_server.serving(objects) as url, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_server.environment(url).items():
            patch.setenv(name, value)
        yield objects


@pytest.fixture
def things(server, tmp_path, monkeypatch) -> bucket_server.Bucket:
    """An empty bucket, and an empty cache for what is copied from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.objects.clear()
    server.log.clear()
    server.damage.clear()
    server.refuse = False
    return server


def downloads(things: bucket_server.Bucket) -> int:
    return sum(verb == "GET" and "alt=media" in path for verb, path in things.log)


def left(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- what is read -----------------------------------------------------------------------------


def test_a_folder_is_copied_once_and_again_only_when_it_changes(things):
    things.put("models/tiny/config.json", b"{}")
    things.put("models/tiny/sub/x.jinja", b"x")
    things.put("models/tiny/pytorch_model.bin", b"pickled")
    copy = bucket.local("gs://any/models/tiny", ModelError, ("*.json", "*.jinja"))
    assert left(copy) == ["config.json", "sub/x.jinja"]
    assert (copy / "config.json").read_bytes() == b"{}"
    before = downloads(things)
    assert bucket.local("gs://any/models/tiny/", ModelError, ("*.json", "*.jinja")) == copy
    assert downloads(things) == before
    things.put("models/tiny/config.json", b"[]")
    changed = bucket.local("gs://any/models/tiny", ModelError, ("*.json", "*.jinja"))
    assert changed != copy
    assert (changed / "config.json").read_bytes() == b"[]"


def test_a_file_is_copied_under_its_own_name(things):
    things.put("rows.jsonl", b"1\n2\n")
    things.put("rows.jsonl.old", b"3\n")
    copy = bucket.local("gs://any/rows.jsonl", DataError)
    assert (copy.name, copy.read_bytes()) == ("rows.jsonl", b"1\n2\n")
    assert left(copy.parent) == ["rows.jsonl"]


def test_damaged_bytes_never_get_a_name_and_what_is_whole_stays(things, tmp_path):
    things.put("data/a.jsonl", b"first")
    things.put("data/b.jsonl", b"second")
    things.damage.add("data/b.jsonl")
    with pytest.raises(StorageError, match=r"gs://any/data/b\.jsonl arrived damaged"):
        bucket.local("gs://any/data", DataError)
    assert [Path(name).name for name in left(tmp_path / "cache")] == ["a.jsonl"]
    things.damage.clear()
    before = downloads(things)
    assert left(bucket.local("gs://any/data", DataError)) == ["a.jsonl", "b.jsonl"]
    assert downloads(things) == before + 1


def test_what_is_not_there_or_leads_outside_is_refused(things):
    with pytest.raises(DataError, match="gs://any/none does not exist"):
        bucket.local("gs://any/none", DataError)
    things.put("evil/../../x", b"x")
    with pytest.raises(ModelError):
        bucket.local("gs://any/evil", ModelError)


def test_an_endpoint_that_is_not_this_machine_is_refused(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.example.com")
    bucket._filesystem.cache_clear()
    with pytest.raises(ConfigError, match=r"STORAGE_EMULATOR_HOST sends .* to storage.example.com"):
        bucket.folder("gs://any/run")


# --- what is written --------------------------------------------------------------------------


def save(store: Checkpoints, step: int, loss: float | None = None) -> None:
    store.save(step, state_of(step), meta={"step": step}, loss=loss)


def test_checkpoints_come_back_and_old_ones_go(things):
    store = Checkpoints("gs://any/run/checkpoints", keep=1, best=True)
    for step, loss in {3: 1.0, 6: 2.0, 9: 3.0}.items():
        save(store, step, loss)
    assert steps("gs://any/run/checkpoints") == [3, 9]
    assert not any(name.startswith("run/checkpoints/6") for name in things.objects)
    restored = restore("gs://any/run/checkpoints", abstract(state_of(9)))
    assert restored is not None
    assert (restored.step, restored.meta, restored.skipped) == (9, {"step": 9}, [])
    for got, expected in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(state_of(9)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_the_manifest_completes_a_step_and_a_folder_without_one_is_none(things):
    store = Checkpoints("gs://any/run", keep=5, best=False)
    save(store, 3)
    writes = [path for verb, path in things.log if verb in ("POST", "PUT") and "run" in path]
    assert MANIFEST in writes[-1]
    save(store, 6)
    del things.objects[f"run/6/{MANIFEST}"]  # killed before it was written
    assert steps("gs://any/run") == [3]
    restored = restore("gs://any/run", abstract(state_of(3)))
    assert restored is not None
    assert restored.step == 3
    Checkpoints("gs://any/run", keep=5, best=False)
    assert not any(name.startswith("run/6/") for name in things.objects)


def test_a_bucket_that_takes_nothing_leaves_the_last_step(things):
    store = Checkpoints("gs://any/run", keep=5, best=False)
    save(store, 3)
    things.refuse = True
    with pytest.raises(StorageError, match=r"step 6 .* could not be saved in gs://any/run"):
        save(store, 6)
    things.refuse = False
    assert steps("gs://any/run") == [3]


# --- a run ------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_stops_resumes_and_ends_as_one_on_a_disk(
    things, inputs, tmp_path, monkeypatch
):
    for file in (inputs / "base").iterdir():
        things.put(f"in/base/{file.name}", file.read_bytes())
    things.put("in/rows.jsonl", (inputs / "rows.jsonl").read_bytes())
    there = settings(
        inputs, model__path="gs://any/in/base", data__train="gs://any/in/rows.jsonl",
        train__tensorboard=True,
    )  # fmt: skip
    fit(settings(inputs), tmp_path / "run")
    asked = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(pods, "stops", lambda stop: _stop(stop, next(asked) > 6))
        with pytest.raises(Interrupted, match="gs://any/run"):
            fit(there, "gs://any/run")
    fit(there, "gs://any/run")

    copy = tmp_path / "copy"
    for name, thing in things.objects.items():
        if name.startswith("run/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(thing.data)
    assert numbers(copy / "run") == numbers(tmp_path / "run")
    assert weights(copy / "run", 12) == weights(tmp_path / "run", 12)
    assert {"config.json", "result.json"} <= {p.name for p in (copy / "run").iterdir()}
    assert list((copy / "run" / "tensorboard").iterdir())


def _stop(stop, now: bool) -> bool:
    stop.agreed = now
    return now


def test_a_plan_reads_nothing_but_the_sizes_of_a_model(things):
    things.put("models/tiny/config.json", b'{"model_type": "llama"}')
    things.put("models/tiny/model.safetensors", bytes(64))
    with sizes.folder_of("gs://any/models/tiny") as folder:
        assert [file.name for file in folder.iterdir()] == ["config.json"]
        assert (folder / "config.json").read_text() == '{"model_type": "llama"}'
    assert downloads(things) == 1
