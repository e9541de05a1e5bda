"""Folders that appear whole or not at all, and safetensors files read back before they count."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.errors import ConfigError, NumericsError, StorageError
from jaxtune.hf import files

_BLOCK = 1 << 20
# Floating types as integers, and the bits that are all set in what is not finite.
_EXPONENT = {
    np.dtype(np.float64): (np.uint64, np.uint64(0x7FF << 52)),
    np.dtype(np.float32): (np.uint32, np.uint32(0xFF << 23)),
    np.dtype(np.float16): (np.uint16, np.uint16(0x1F << 10)),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, np.uint16(0xFF << 7)),
}


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends well, and else is removed.

    What a killed process left beside `out` is removed too.

    Raises:
      ConfigError: `out` is a file, or a folder that holds something.
      StorageError: for every OSError, also those of the block.
    """
    out = Path(os.path.abspath(out))
    stage = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    made: list[Path] = []
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"{out} exists and is not an empty folder", fix="a folder that is new or empty"
            )
        made = [parent for parent in out.parents if not parent.exists()]
        _sweep(out)
        stage.mkdir(parents=True)
        with _locked(stage):
            yield stage
            for path in (*stage.rglob("*"), stage):
                sync(path)
            stage.rename(out)  # an empty folder is replaced, a full one never
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise StorageError(
                f"{out} cannot be written: {error}", fix="an --out on a disk with room and rights"
            ) from error
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder as long as the process lives. Raises OSError where another does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sweep(out: Path) -> None:
    """Removes what killed processes left: stages of `out` that nobody holds."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    left = out.parent.iterdir() if out.parent.is_dir() else ()
    for stage in [path for path in left if name.fullmatch(path.name)]:
        with contextlib.suppress(OSError), _locked(stage):
            shutil.rmtree(stage)


def save_verified(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file of arrays; see `save_streamed`."""
    sizes = {name: (values.dtype, values.shape) for name, values in tensors.items()}
    save_streamed(file, sizes, tensors.__getitem__)


def save_streamed(
    file: Path,
    sizes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, a tensor at a time, and compares what the disk gives back.

    Args:
      sizes: {name: (dtype, shape)}, in the order of the header.
      value: the tensor of a name, asked for when its turn comes, so that memory holds one.

    Raises:
      NumericsError: a value is not finite.
      StorageError: it cannot be written, or reads back otherwise.
    """
    # Wide types first, as the format's own library: every tensor lies at a multiple of its type.
    order = sorted(sizes, key=lambda name: -sizes[name][0].itemsize)
    wanted: dict[str, bytes] = {}
    with file.open("wb") as stream:
        stream.write(_header(sizes, order))
        for name in order:
            values = np.ascontiguousarray(value(name))
            assert (values.dtype, values.shape) == sizes[name], f"{name} is not as announced"
            check_finite(name, values)
            raw = values.reshape(-1).view(np.uint8).data
            wanted[name] = hashlib.sha256(raw).digest()
            stream.write(raw)
            del values, raw  # before the next one is made
        stream.flush()
        os.fsync(stream.fileno())
    found = files.read_header(file)
    kept = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
    wrong = [n for n, t in found.items() if kept != sizes or _digest(t) != wanted[n]]
    if wrong:
        raise StorageError(
            f"{file} reads back otherwise than it was written: {wrong[0]}", fix="another disk"
        )


def oriented(leaf: Any, index: tuple[int, ...], turned: bool) -> np.ndarray:
    """One tensor of a leaf as Hugging Face stores it, in float32.

    Args:
      index: where it lies in the leaf, as `Family.slots` says.
      turned: with its axes swapped, outputs before inputs; see `Family.turned`.
    """
    values = np.asarray(leaf[index], np.float32)
    return values.T if turned else values


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises NumericsError for an infinity or a NaN."""
    if values.dtype not in _EXPONENT:
        return
    bits, mask = _EXPONENT[values.dtype]
    flat, count = values.reshape(-1).view(bits), 0
    for start in range(0, flat.size, _BLOCK):  # a cache's worth: ml_dtypes' own test is slow
        count += int(np.count_nonzero((flat[start : start + _BLOCK] & mask) == mask))
    if count:
        raise NumericsError(
            f"{name} holds {count} values that are not finite, so nothing is exported",
            fix="an earlier checkpoint, a lower learning rate, or a dtype of wider range",
        )


def _header(sizes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], order: list[str]) -> bytes:
    names = {dtype: name for name, dtype in files.DTYPES.items()}
    starts, at = {}, 0
    for name in order:
        dtype, shape = sizes[name]
        starts[name] = at
        at += math.prod(shape) * dtype.itemsize
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in sizes.items():
        stop = starts[name] + math.prod(shape) * dtype.itemsize
        offsets = [starts[name], stop]
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(tensor: files.Tensor) -> bytes:
    """sha256 of what the disk has of a tensor, read in pieces."""
    state, left = hashlib.sha256(), tensor.bytes
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        while left and (part := file.read(min(left, _BLOCK))):
            state.update(part)
            left -= len(part)
    return state.digest()


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
