"""The states of trials between rungs: files that are whole or not there, proven when read.

    trials/
      12/
        480.npz     all arrays of trial 12 at position 480, and what the worker knew of it
        960.npz     the newest; the one before stays, should this one be damaged

A file gets its name by a rename after it is on the disk. The CRC that a zip keeps of each member is
compared before any of it is used. Only the worker that has a trial writes in its folder.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.errors import StorageError
from jaxtune.hf.write import sync

_NAME = re.compile(r"(0|[1-9][0-9]*)\.npz")
_ABOUT = "about"
_KEPT = 2  # files of a trial
# All that damaged bytes make zipfile and numpy raise.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Saved(NamedTuple):
    """A trial as it was at a position."""

    position: int
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]  # JSON values of the worker


@dataclasses.dataclass
class Progress:
    """Where a trial is; saved beside its state, so a resumed trial counts as if undisturbed."""

    position: int = 0  # micro-batches done
    tokens: int = 0
    seconds: float = 0.0  # of its share of the machine
    skipped: int = 0  # micro-batches in a row that were not finite
    total: float = 0.0  # nats of the window of the curve under way
    weight: float = 0.0  # and its tokens
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    # {position of a rung's end: (tokens, seconds) by then}
    ends: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)

    def add(self, loss: float, tokens: int, finite: bool, seconds: float, window: int) -> None:
        """Counts a micro-batch; every `window` of them are a point of the curve."""
        self.position += 1
        self.tokens += tokens
        self.seconds += seconds
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            self.total += loss * tokens
            self.weight += tokens
        if self.position % window == 0:
            if self.weight:
                self.curve.append((self.position, self.total / self.weight))
            self.total = self.weight = 0.0

    @classmethod
    def restored(cls, about: dict[str, Any]) -> "Progress":
        """As it was saved; JSON has made lists of its pairs."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in about.items() if name in names}
        values["curve"] = [(at, loss) for at, loss in values["curve"]]
        values["ends"] = {at: (tokens, seconds) for at, (tokens, seconds) in values["ends"].items()}
        return cls(**values)


def save(folder: Path, number: int, saved: Saved) -> None:
    """Writes a trial's state to the disk and removes all but its two newest.

    Raises:
      StorageError: the disk is full or failed; the older files are untouched.
    """
    place = folder / str(number)
    final = place / f"{saved.position}.npz"
    partial = place / f"{saved.position}.{os.getpid()}.partial"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob("*.partial"):  # of a killed worker
            left.unlink(missing_ok=True)
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **_packed(saved))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
        sync(place)
        for position in positions(folder, number)[:-_KEPT]:
            (place / f"{position}.npz").unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        size = sum(array.nbytes for array in saved.arrays.values()) / 1e6
        raise StorageError(
            f"trial {number} ({size:.1f} MB) could not be saved in {place}: {error}",
            fix="free space there, then the same command again; no finished rung is lost",
        ) from error


def newest(folder: Path, number: int, most: int, started: str) -> tuple[Saved | None, list[str]]:
    """The newest intact state no further than `most`, and a line for each that is damaged.

    Args:
      started: states with another value of this key in `about` are of another sweep, and ignored.
    """
    damaged = []
    for position in reversed(positions(folder, number)):
        if position > most:
            continue
        file = folder / str(number) / f"{position}.npz"
        try:
            saved = _read(file, position)
        except _DAMAGE as error:
            text = next(iter(str(error).splitlines()), "")
            damaged.append(f"{file} is damaged ({type(error).__name__}: {text[:100]})")
            continue
        if saved.about.get("started") == started:
            return saved, damaged
    return None, damaged


def positions(folder: Path, number: int) -> list[int]:
    """The positions that a trial has files of, ascending."""
    place = folder / str(number)
    if not place.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in place.iterdir())
    return sorted(int(name[1]) for name in names if name)


def drop(folder: Path, number: int) -> None:
    """Removes the files of a trial that will not be gone on with."""
    shutil.rmtree(folder / str(number), ignore_errors=True)


def _packed(saved: Saved) -> dict[str, np.ndarray]:
    """Arrays as numpy's own kinds; names get a prefix, so that none is an argument of savez."""
    kinds = {name: array.dtype.name for name, array in saved.arrays.items()}
    text = json.dumps({"position": saved.position, "kinds": kinds, "about": saved.about})
    members = {_ABOUT: np.frombuffer(text.encode(), np.uint8)}
    for name, array in saved.arrays.items():
        # Of dtypes that numpy does not know, such as bfloat16, it would lose the name.
        raw = array.dtype.isbuiltin != 1
        members[f"/{name}"] = array.view(f"u{array.dtype.itemsize}") if raw else array
    return members


def _read(file: Path, position: int) -> Saved:
    with zipfile.ZipFile(file) as members:
        if (bad := members.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {bad}")
    with np.load(file, allow_pickle=False) as members:
        found = {name: members[name] for name in members.files}
    known = json.loads(found.pop(_ABOUT).tobytes())
    kinds = known["kinds"]
    if known["position"] != position or {f"/{name}" for name in kinds} != found.keys():
        raise ValueError("other members than were written")
    arrays = {
        name: found[f"/{name}"]
        if found[f"/{name}"].dtype.name == kind
        else found[f"/{name}"].view(_dtype(kind))
        for name, kind in kinds.items()
    }
    return Saved(position, arrays, known["about"])


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name))
