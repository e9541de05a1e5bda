"""Files of paused trials: what comes back is what was written, or it is called damaged."""

import errno
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.errors import StorageError
from jaxtune.sweep import trials
from jaxtune.sweep.trials import Saved

ARRAYS = {
    "trainable/layers.0.q.lora.A": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "frozen/16 bits": np.asarray([[1.5, -2.25]], ml_dtypes.bfloat16),
    "step": np.asarray(7, np.int32),
    "done": np.asarray(True),
    "none of it": np.zeros((0, 4)),
    "file": np.asarray([3], np.uint32),  # an argument's name of np.savez
    "about": np.asarray([1.0]),  # a member's name of ours
}
ABOUT = {"started": "1.5", "curve": [[1, 2.5]], "total": 0.1 + 0.2}


def saved(position: int = 5, **about) -> Saved:
    return Saved(position, ARRAYS, ABOUT | about)


def same(one: Saved | None, other: Saved) -> bool:
    return (
        one is not None
        and (one.position, one.about) == (other.position, other.about)
        and one.arrays.keys() == other.arrays.keys()
        and all(
            one.arrays[name].dtype == array.dtype
            and one.arrays[name].shape == array.shape
            and one.arrays[name].tobytes() == array.tobytes()
            for name, array in other.arrays.items()
        )
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    trials.save(tmp_path, 3, saved())
    found, damaged = trials.newest(tmp_path, 3, 5, "1.5")
    assert same(found, saved())
    assert damaged == []


def test_the_two_newest_stay_and_no_further_than_asked_is_taken(tmp_path):
    for position in (2, 4, 9, 16):
        trials.save(tmp_path, 3, saved(position))
    assert trials.positions(tmp_path, 3) == [9, 16]
    found, _ = trials.newest(tmp_path, 3, 15, "1.5")
    assert found is not None
    assert found.position == 9
    assert trials.newest(tmp_path, 3, 8, "1.5") == (None, [])
    trials.drop(tmp_path, 3)
    assert trials.positions(tmp_path, 3) == []


def test_states_of_another_sweep_are_left_alone(tmp_path):
    trials.save(tmp_path, 0, saved(started="an older one"))
    assert trials.newest(tmp_path, 0, 5, "1.5") == (None, [])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_bit_flips_it_is_noticed_or_does_not_matter(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flips")
    trials.save(folder, 1, saved(4))
    trials.save(folder, 1, saved(8))
    file = folder / "1" / "8.npz"
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    found, damaged = trials.newest(folder, 1, 9, "1.5")
    if damaged:
        assert same(found, saved(4))
        assert len(damaged) == 1
        assert "8.npz is damaged" in damaged[0]
    else:
        assert same(found, saved(8))


@pytest.mark.parametrize("length", [0, 1, 100, 1000])
def test_a_file_cut_short_is_damaged(tmp_path, length):
    trials.save(tmp_path, 1, saved(4))
    trials.save(tmp_path, 1, saved(8))
    os.truncate(tmp_path / "1" / "8.npz", length)
    found, damaged = trials.newest(tmp_path, 1, 9, "1.5")
    assert same(found, saved(4))
    assert len(damaged) == 1


def test_flipped_array_bytes_are_always_noticed(tmp_path):
    trials.save(tmp_path, 1, saved(8))
    file = tmp_path / "1" / "8.npz"
    content = file.read_bytes()
    start = content.index(ARRAYS["trainable/layers.0.q.lora.A"].tobytes())
    for at in range(start, start + 96):
        file.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        assert trials.newest(tmp_path, 1, 9, "1.5")[0] is None


def test_a_full_disk_leaves_the_older_state_and_nothing_else(tmp_path, monkeypatch):
    trials.save(tmp_path, 1, saved(4))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=r"trial 1 \(0\.0 MB\) could not be saved.*No space left"
    ):
        trials.save(tmp_path, 1, saved(8))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["4.npz"]
    assert same(trials.newest(tmp_path, 1, 9, "1.5")[0], saved(4))


def test_what_a_killed_save_left_is_no_state_and_goes(tmp_path):
    trials.save(tmp_path, 1, saved(4))
    left = tmp_path / "1" / "8.4711.partial"
    left.write_bytes(b"PK")
    assert same(trials.newest(tmp_path, 1, 9, "1.5")[0], saved(4))
    trials.save(tmp_path, 1, saved(9))
    assert not left.exists()
