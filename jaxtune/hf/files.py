"""Safetensors checkpoints as data: what tensors a folder holds, and the bytes of any of them.

Files are read with plain reads, not mapped, so that reading a checkpoint does not count twice in
memory. Headers are checked before anything is allocated; names in an index never leave the folder.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune import bucket
from jaxtune.errors import ModelError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20  # the safetensors format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows `first` to `last` of axis 0, by default all, in the stored dtype."""
        shape = self.shape
        if shape:
            shape = (len(range(*slice(first, last).indices(shape[0]))), *shape[1:])
        values = np.empty(shape, self.dtype)
        self.read_into(values, first)
        return values

    def read_into(self, out: np.ndarray, first: int = 0, columns: slice = slice(None)) -> None:
        """Fills `out` (contiguous, of the stored dtype) with its number of rows from `first` on.

        Of a matrix it may hold only some `columns`, and then only those are read.

        Raises:
          ModelError: the file has become shorter.
        """
        # ml_dtypes' arrays are no buffers, their bytes are.
        raw = out.reshape(-1).view(np.uint8).data
        begin = self.start + first * self.row_bytes
        start, stop, _ = columns.indices(self.shape[1] if len(self.shape) > 1 else 0)
        width = (stop - start) * self.dtype.itemsize
        with self.file.open("rb", buffering=0) as file:
            if len(self.shape) < 2 or (start, stop) == (0, self.shape[1]):
                self._fill(file, begin, raw)
                return
            begin += start * self.dtype.itemsize
            for row in range(len(out)):
                at = begin + row * self.row_bytes
                self._fill(file, at, raw[row * width : (row + 1) * width])

    def _fill(self, file: FileIO, at: int, raw: memoryview) -> None:
        file.seek(at)
        while len(raw):  # one read gives at most 2 GB
            count = file.readinto(raw)
            if not count:
                raise ModelError(f"{self.file} ends early", fix="fetch it again")
            raw = raw[count:]


def resolve(path: str) -> Path:
    """A local folder as it is; of a bucket or a hub id a copy of the files we read.

    Raises:
      ModelError: neither a folder nor a repository that can be had.
    """
    if bucket.is_bucket(path):
        return bucket.local(path, ModelError, _HUB_FILES)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(
            f"model folder {path!r} does not exist",
            fix="an existing folder, or a hub id owner/name",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{path!r} is no folder here and the hub did not give it: {str(error)[:150]}",
            fix="a local folder, or check the id, the network and `hf auth login`",
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing", fix="a complete Hugging Face folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}", fix="fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object", fix="fetch it again")
    return value


def tensors(folder: Path, single: str = "model.safetensors") -> dict[str, Tensor]:
    """{name: Tensor} of a folder with one safetensors file or an index of several.

    Raises:
      ModelError: no safetensors (pickled weights are refused by name), a damaged or unsafe file.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / single).is_file():
        return read_header(folder / single)
    others = sorted(folder.glob("*.safetensors"))
    if others:
        raise ModelError(
            f"{folder} holds {', '.join(f.name for f in others)} but no {single} and no {INDEX}",
            fix="fetch the index file too",
        )
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run code",
            fix="a safetensors version of the model, or convert it elsewhere with "
            "transformers' save_pretrained",
        )
    raise ModelError(f"{folder} holds no {single}", fix="a Hugging Face model folder")


def _indexed(folder: Path) -> dict[str, Tensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{folder / INDEX} has no weight_map", fix="fetch it again")
    found: dict[str, Tensor] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX} names the file {name!r}", fix="plain file names")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing", fix="fetch the rest of the checkpoint")
        found |= read_header(folder / name)
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise ModelError(
            f"{folder / INDEX} lists {len(lost)} tensors no file has, such as {lost[0]}",
            fix="fetch the checkpoint again",
        )
    return {name: found[name] for name in weight_map}


def read_header(file: Path) -> dict[str, Tensor]:
    """{name: Tensor} of one safetensors file, checked against the file's size."""
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith((b"version ", b"<!DOCTYP", b"<html")):
            raise ModelError(
                f"{file} is a git-lfs pointer or a web page, not weights", fix="git lfs pull"
            )
        if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
            raise ModelError(f"{file} ({size} bytes) is no safetensors file", fix="fetch it again")
        header = stream.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_no_duplicates)
        entries.pop("__metadata__", None)
        found = {name: _tensor(file, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a damaged header: {error}", fix="fetch it again") from error
    _check_layout(file, found, 8 + length, size)
    return found


def _tensor(file: Path, entry: Mapping[str, Any], base: int) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ModelError(f"{file} holds dtype {entry['dtype']}", fix=f"one of {', '.join(DTYPES)}")
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape {shape}")
    start, stop = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    if not 0 <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {start}..{stop} for shape {shape}")
    return Tensor(file, dtype, shape, base + start)


def _check_layout(file: Path, found: Mapping[str, Tensor], base: int, size: int) -> None:
    """The format's own rule: tensors follow each other without holes and fill the file."""
    end = base
    for tensor in sorted(found.values(), key=lambda t: (t.start, math.prod(t.shape))):
        if tensor.start != end:
            raise ModelError(f"{file} has overlapping tensors or holes", fix="fetch it again")
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        raise ModelError(f"{file} has {size} bytes, its header {end}", fix="fetch it again")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def fingerprint(folder: Path) -> str:
    """sha256 of a checkpoint's config, headers and 64 KiB samples spread over every file.

    Tells two checkpoints apart within a second at any size; it is no proof against tampering.
    """
    state = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted({tensor.file for tensor in tensors(folder).values()}):
        size = os.path.getsize(file)
        with file.open("rb") as stream:
            for start in range(0, size, max(size // 64, 1 << 16)):
                stream.seek(start)
                state.update(stream.read(1 << 16))
        state.update(str(size).encode())
    return state.hexdigest()
