"""Checkpoints under real faults: what is restored is what was saved, or it is said why not."""

import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.checkpoint import MANIFEST, Checkpoints, best_step, latest_meta, restore, steps
from jaxtune.errors import StorageError
from tests.faults.saver import TrainState, abstract, save_until_killed, state_of
from tests.faults.storage import damage, file_size_limit, flip_bit, small_disk

# What Orbax leaves to the garbage collector when a read or a write fails midway.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def save(store: Checkpoints, step: int, loss: float | None = None) -> None:
    store.save(step, state_of(step), meta={"examples": 8 * step}, loss=loss)


def attempt(action: Callable[[], Any]) -> Any:
    """What the action returns, or the StorageError it raises."""
    try:
        return action()
    except StorageError as error:
        return error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is kept -----------------------------------------------------------------------------


def test_the_state_and_the_meta_come_back_as_they_were(tmp_path: Path):
    state = state_of(7)
    meta = {"examples": 56, "history": [[0, 2.5], [7, math.inf]], "best": None, "2": "é"}
    Checkpoints(tmp_path, keep=2, best=True).save(7, state, meta=meta, loss=1.5)
    restored = restore(tmp_path, abstract(state))
    assert restored is not None
    assert_same(restored.state, state)
    assert isinstance(restored.state, TrainState)
    assert (restored.step, restored.meta, restored.skipped) == (7, meta, [])
    assert latest_meta(tmp_path) == meta


def test_a_new_folder_holds_nothing(tmp_path: Path):
    assert restore(tmp_path / "new", abstract(state_of(0))) is None
    Checkpoints(tmp_path / "new", keep=2, best=True)
    assert restore(tmp_path / "new", abstract(state_of(0))) is None
    assert (steps(tmp_path / "new"), best_step(tmp_path / "new")) == ([], None)
    assert latest_meta(tmp_path / "new") is None


@pytest.mark.parametrize(
    ("keep", "best", "losses", "left", "lowest"),
    [
        (2, True, {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 4.0}, [20, 40, 50], 20),
        (2, False, {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5}, [30, 40], 30),
        (1, True, {10: 1.0, 20: math.nan, 30: None, 40: math.inf}, [10, 40], 10),
        (1, True, {10: math.nan, 20: -math.inf}, [20], None),
        (3, True, {10: None, 20: None}, [10, 20], None),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path,
    keep: int,
    best: bool,
    losses: dict[int, float | None],
    left: list[int],
    lowest: int | None,
):
    store = Checkpoints(tmp_path, keep=keep, best=best)
    for step, loss in losses.items():
        save(store, step, loss)
    assert names(tmp_path) == [str(step) for step in left]
    assert steps(tmp_path) == left
    assert best_step(tmp_path) == lowest


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=2, best=False)
    for seed in (0, 1):
        store.save(5, state_of(5, seed), meta={"seed": seed}, loss=None)
    restored = restore(tmp_path, abstract(state_of(5)))
    assert restored is not None
    assert_same(restored.state, state_of(5, seed=1))
    assert restored.meta == {"seed": 1}
    assert names(tmp_path) == ["5"]


def test_steps_after_a_run_was_set_back_give_way(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=1, best=True)
    save(store, 10, loss=2.0)
    save(store, 30, loss=3.0)
    save(store, 20, loss=4.0)  # keep=1 must mean 20 here, not 30
    assert steps(tmp_path) == [10, 20]


def test_one_step_can_be_asked_for(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=2, best=False)
    save(store, 10)
    save(store, 20)
    restored = restore(tmp_path, abstract(state_of(0)), step=10)
    assert restored is not None
    assert_same(restored.state, state_of(10))
    with pytest.raises(StorageError, match=r"no checkpoint of step 15 .*saved steps: 10, 20"):
        restore(tmp_path, abstract(state_of(0)), step=15)
    (tmp_path / "20" / MANIFEST).unlink()
    with pytest.raises(StorageError, match=r"step 20: jaxtune\.json cannot be read"):
        restore(tmp_path, abstract(state_of(0)), step=20)


# --- device counts ----------------------------------------------------------------------------


def test_a_checkpoint_moves_between_device_counts(tmp_path: Path):
    def sharding(count: int) -> NamedSharding:
        mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    state = {
        "w": jax.random.normal(jax.random.key(0), (16, 8)),
        "h": jnp.arange(64).reshape(8, 8).astype(jnp.bfloat16),
        "flags": jnp.arange(16).reshape(2, 8) % 3 == 0,
    }
    manifests = set()
    for count in (1, 2, 4, 8):
        folder = tmp_path / str(count)
        Checkpoints(folder, keep=1, best=False).save(
            1, jax.device_put(state, sharding(count)), meta={}, loss=None
        )
        manifests.add((folder / "1" / MANIFEST).read_text())
    assert len(manifests) == 1, "digests depend on the mesh"
    for saved, wanted in itertools.product((1, 2, 4, 8), repeat=2):
        target = sharding(wanted)
        restored = restore(tmp_path / str(saved), abstract(state, target))
        assert restored is not None
        assert_same(restored.state, state)
        assert restored.skipped == []
        assert restored.state["w"].sharding == target


# --- damage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    store = Checkpoints(folder, keep=2, best=False)
    save(store, 10)
    save(store, 20)
    return folder


def outcome(folder: Path) -> str:
    """What restoring a damaged folder does; fails on anything that is wrong and silent."""
    restored = attempt(lambda: restore(folder, abstract(state_of(0))))
    if isinstance(restored, StorageError):
        assert "step 20: " in restored.what
        assert "step 10: " in restored.what
        return "refused"
    assert restored is not None, "the run would have started over"
    assert_same(restored.state, state_of(restored.step))
    assert restored.meta == {"examples": 8 * restored.step}
    if restored.step == 20:
        assert restored.skipped == []
        return "unharmed"
    assert restored.step == 10
    assert [line[:8] for line in restored.skipped] == ["step 20:"]
    return "walked back"


@pytest.mark.parametrize("seed", range(8))
def test_no_damage_is_restored_silently(pristine: Path, tmp_path: Path, seed: int):
    rng = random.Random(seed)
    for number in range(10):
        folder = shutil.copytree(pristine, tmp_path / str(number))
        done = [damage(rng, folder) for _ in range(1 + number % 2)]
        print(done)  # shown by pytest for the mutation that fails
        assert outcome(folder) in ("unharmed", "walked back", "refused")
        shutil.rmtree(folder)


def test_a_flipped_bit_in_the_arrays_is_noticed_and_named(pristine: Path, tmp_path: Path):
    folder = shutil.copytree(pristine, tmp_path / "copy")
    data = [path for path in (folder / "20").rglob("*") if path.parent.name == "d"]
    for seed in range(20):
        largest = max(data, key=lambda path: path.stat().st_size)
        before = largest.read_bytes()
        flip_bit(random.Random(seed), largest)
        assert outcome(folder) == "walked back"
        largest.write_bytes(before)
    assert outcome(folder) == "unharmed"


def test_the_manifest_of_another_step_is_noticed(pristine: Path, tmp_path: Path):
    folder = shutil.copytree(pristine, tmp_path / "copy")
    shutil.copy(folder / "10" / MANIFEST, folder / "20" / MANIFEST)
    restored = restore(folder, abstract(state_of(0)))
    assert restored is not None
    assert restored.skipped == ["step 20: jaxtune.json is that of step 10"]


def test_an_edited_data_position_is_noticed(pristine: Path, tmp_path: Path):
    folder = shutil.copytree(pristine, tmp_path / "copy")
    path = folder / "20" / MANIFEST
    path.write_text(path.read_text().replace('"examples": 160', '"examples": 161'))
    restored = restore(folder, abstract(state_of(0)))
    assert restored is not None
    assert restored.skipped == ["step 20: jaxtune.json was changed after it was written"]
    assert latest_meta(folder) == {"examples": 80}


def test_a_manifest_of_a_later_format_is_named(pristine: Path, tmp_path: Path):
    folder = shutil.copytree(pristine, tmp_path / "copy")
    for step in (10, 20):
        path = folder / str(step) / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(StorageError, match=r"jaxtune\.json is of format 2, this is 1"):
        restore(folder, abstract(state_of(0)))


# Orbax alone casts the first two without a word.
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: s._replace(trainable=s.trainable | {"head": jnp.zeros((16, 32))}),
            "trainable/head is bfloat16[16, 32], not float32[16, 32]",
        ),
        (lambda s: s._replace(step=jnp.float32(0)), "step is int32[], not float32[]"),
        (
            lambda s: s._replace(trainable=s.trainable | {"head": jnp.zeros((8, 32))}),
            "trainable/head is bfloat16[16, 32], not float32[8, 32]",
        ),
        (
            lambda s: s._replace(trainable={"norm": jnp.zeros(3), "head": s.trainable["head"]}),
            "it holds trainable/layers.0-1.q_proj.lora_A, trainable/layers.0-1.q_proj.lora_B that "
            "this run does not have, and lacks trainable/norm",
        ),
    ],
)
def test_another_dtype_shape_or_name_is_not_taken(pristine: Path, change: Any, reason: str):
    with pytest.raises(StorageError) as caught:
        restore(pristine, abstract(change(state_of(0))))
    assert f"step 20: {reason}; step 10: {reason}" in caught.value.what


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path):
    for name in ("5", "notes", "20.orbax-checkpoint-tmp", "007"):
        (tmp_path / name).mkdir()
    store = Checkpoints(tmp_path, keep=1, best=False)
    for step in (10, 20):
        save(store, step)
    assert names(tmp_path) == ["007", "20", "20.orbax-checkpoint-tmp", "5", "notes"]


# --- killed processes -------------------------------------------------------------------------


def killed_midway(folder: Path, rng: random.Random, kill_at: int) -> int:
    """Lets a process save into `folder` until it is killed; the last step it reported as saved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxtune.checkpoint", "optax"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=save_until_killed, args=(str(folder), there, kill_at))
    child.start()
    there.close()
    reported = here.recv()
    if not kill_at:
        child.join(rng.uniform(0.0, 0.6))
        child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    while True:
        try:
            reported = here.recv()
        except EOFError:
            return reported


def check_killed(folder: Path, reported: int) -> None:
    restored = restore(folder, abstract(state_of(0)))
    if restored is None:
        assert reported == 0
        return
    assert restored.step - reported in (0, 1), "a saved step was lost"
    assert restored.skipped == []
    assert_same(restored.state, state_of(restored.step))
    assert restored.meta == {"examples": 8 * restored.step}


def check_tidied(folder: Path) -> None:
    save(Checkpoints(folder, keep=1, best=False), 1000)
    assert names(folder) == ["1000"]


def test_sigkill_at_any_time_leaves_no_half_written_step(tmp_path: Path):
    rng = random.Random(0)
    for _ in range(10):
        check_killed(tmp_path, killed_midway(tmp_path, rng, kill_at=0))
    check_tidied(tmp_path)


def test_sigkill_before_a_file_operation_leaves_no_half_written_step(tmp_path: Path):
    """A save that also removes the step before it makes about 80 of them outside TensorStore."""
    save(Checkpoints(tmp_path, keep=1, best=False), 1)
    for number in range(6, 80, 12):
        check_killed(tmp_path, killed_midway(tmp_path, random.Random(0), kill_at=number))
    check_tidied(tmp_path)


def test_a_save_that_only_lacks_its_name_gets_it(tmp_path: Path):
    save(Checkpoints(tmp_path, keep=1, best=False), 10)
    (tmp_path / "10").rename(tmp_path / "10.saving")  # killed between the last two renames
    (tmp_path / "20.saving.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "30.saving").mkdir()
    (tmp_path / "5.deleting").mkdir()
    Checkpoints(tmp_path, keep=1, best=False)
    assert names(tmp_path) == ["10"]
    restored = restore(tmp_path, abstract(state_of(0)))
    assert restored is not None
    assert_same(restored.state, state_of(10))


def test_all_is_on_the_disk_before_the_step_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a power cut leaves: a step with its name has every byte below it flushed."""
    flushed: list[str] = []
    fsync = os.fsync

    def recorded(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) or not (tmp_path / "10").exists():
            flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    save(Checkpoints(tmp_path, keep=1, best=False), 10)
    written = {str(path) for path in (tmp_path / "10").rglob("*")}
    assert written <= {name.replace("10.saving", "10") for name in flushed}
    assert flushed[-1] == str(tmp_path)


# --- full and unwritable disks ----------------------------------------------------------------


def used(folder: Path) -> int:
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def test_a_full_disk_keeps_the_steps_there_are(tmp_path: Path):
    with small_disk(tmp_path / "disk", 2048) as disk:
        store = Checkpoints(disk / "checkpoints", keep=1, best=False)
        save(store, 10)
        one, failures = used(disk), 0
        # From nothing left to all but enough: the arrays, the metadata or the manifest fail.
        for number, share in enumerate((0.0, 0.05, 0.3, 0.8, 0.9, 0.95, 0.99)):
            filler = disk / "filler"
            filler.write_bytes(bytes(2048 * 1024 - one - int(share * one)))
            before = used(disk)
            failure = attempt(lambda step=20 + number: save(store, step))
            if failure:
                failures += 1
                assert failure.exit_code == 74
                assert "\n" not in failure.line()
                assert "MB free" in failure.what
                assert used(disk) == before
                assert len(names(disk / "checkpoints")) == 1
            restored = restore(disk / "checkpoints", abstract(state_of(0)))
            assert restored is not None
            assert_same(restored.state, state_of(restored.step))
            filler.unlink()
        assert failures >= 4
        save(store, 99)
        assert steps(disk / "checkpoints") == [99]


def test_a_file_that_cannot_grow_is_a_storage_error(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=2, best=False)
    save(store, 10)
    with file_size_limit(50_000), pytest.raises(StorageError) as caught:
        save(store, 20)
    assert caught.value.exit_code == 74
    assert "step 20 " in caught.value.what
    assert "File too large" in caught.value.what
    assert "saved steps: 10" in caught.value.fix
    assert names(tmp_path) == ["10"]
    save(store, 20)
    assert steps(tmp_path) == [10, 20]


def test_an_unwritable_folder_stops_before_training(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints", Path("/proc/checkpoints")):
        with pytest.raises(StorageError, match="checkpoints cannot be written to"):
            Checkpoints(folder, keep=1, best=False)


def test_a_read_only_disk_stops_before_training(tmp_path: Path):
    with small_disk(tmp_path / "disk", 64) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="Read-only file system"):
            Checkpoints(disk, keep=1, best=False)
