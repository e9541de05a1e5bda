"""Folders that appear whole or not at all, and safetensors files read back before they count."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxtune import tree
from jaxtune.errors import ConfigError, NumericsError, StorageError
from jaxtune.hf import files


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends well, and else is removed.

    Raises:
      ConfigError: `out` is a file, or a folder that holds something.
      StorageError: for every OSError, also those of the block.
    """
    out = Path(os.path.abspath(out))
    stage = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    made: list[Path] = []
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is not an empty folder", fix="another --out")
        made = [parent for parent in out.parents if not parent.exists()]
        stage.mkdir(parents=True)
        yield stage
        for path in (*stage.rglob("*"), stage):
            _sync(path)
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


def save_verified(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file and compares what the disk gives back, tensor by tensor.

    Raises:
      NumericsError: a value is not finite; nothing is written.
      StorageError: it cannot be written, or reads back otherwise.
    """
    ready = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    for name, values in ready.items():
        _check_finite(name, values)
    wanted = {name: _digest(values) for name, values in ready.items()}
    try:
        save_file(ready, file, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        file.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        raise StorageError(f"{file} cannot be written: {error}", fix="more disk space") from error
    _sync(file)
    found = files.read_header(file)
    wrong = sorted(wanted.keys() ^ found.keys()) or [
        name for name, tensor in found.items() if _digest(tensor.read()) != wanted[name]
    ]
    if wrong:
        raise StorageError(
            f"{file} reads back otherwise than it was written: {wrong[0]}", fix="another disk"
        )


def oriented(path: str, leaf: Any, slot: int) -> np.ndarray:
    """Layer number `slot` of a leaf as Hugging Face stores it: float32, outputs before inputs."""
    one = leaf if tree.layer_range(path) is None else leaf[slot]
    values = np.asarray(one, np.float32)
    return values.T if path.endswith((".kernel", ".lora.A", ".lora.B")) else values


def _check_finite(name: str, values: np.ndarray) -> None:
    if np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_:
        return
    count = values.size - int(np.count_nonzero(np.isfinite(values)))
    if count:
        raise NumericsError(
            f"{name} holds {count} values that are not finite, so nothing is exported",
            fix="an earlier checkpoint, or a lower learning rate",
        )


def _digest(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    raw = hashlib.sha256(values.reshape(-1).view(np.uint8).data)
    return values.dtype.name, values.shape, raw.digest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
