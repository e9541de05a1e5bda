"""One checkpoint folder into another: an adapter merged, another dtype, other files. Streamed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.console import say
from jaxtune.hf import files, load
from jaxtune.hf.adapter import open_adapter
from jaxtune.hf.export import Export, write_merged

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def convert(
    source: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    adapter: str | None = None,
    shard_bytes: int | None = None,
) -> Export:
    """Writes `source`, a folder or hub id, to the new folder `out`; read back to verify.

    Nothing is put on a device; memory holds about one tensor in float32, and the adapter.

    Args:
      dtype: of floating tensors, one of DTYPES; None keeps the source's.
      adapter: a PEFT adapter, folder or hub id, to merge: LoRA, rsLoRA, DoRA, modules to save.
      shard_bytes: most bytes of a file; None keeps the source's files where the dtype stays.

    Raises:
      ConfigError: `out` exists and is not an empty folder.
      ModelError: a damaged checkpoint, an unknown family, an adapter that does not fit.
      NumericsError: values that are not finite, or too large for float16.
      StorageError: the disk is full, or gives back other bytes than were written.
    """
    base = files.resolve(source)
    # Fields nobody knows do not stop a copy: only names and shapes are asked for.
    rows, config, strange = load.read_config_leniently(base)
    if strange:
        say(f"warning: config.json has fields jaxtune does not know: {', '.join(strange)}")
    load.check_fits(base, rows, config)
    trained: dict[str, Any] = {}
    if adapter is not None:
        folder = files.resolve(adapter)
        trained = open_adapter(folder, rows, config)
        if _changes_nothing(trained):
            say(f"warning: {folder} changes nothing: every B in it is zero")
            trained = {}
        classes = _classes(trained)
        if classes:
            rows, config, _ = load.read_config_leniently(base, num_labels=classes)
    kind = None if dtype is None else DTYPES[dtype]
    return write_merged(
        Path(out), base, rows, config, trained, dtype=kind, max_shard_bytes=shard_bytes
    )


def _changes_nothing(trained: Mapping[str, np.ndarray]) -> bool:
    """Whether there are only low-rank updates and all are zero."""
    parts = {path.rpartition(".lora.")[2] for path in trained}
    return parts <= {"A", "B", "scale"} and not any(
        leaf.any() for path, leaf in trained.items() if path.endswith(".lora.B")
    )


def _classes(trained: Mapping[str, np.ndarray]) -> int:
    """Classes of the classifier's head that an adapter brings along; 0 where it has none."""
    heads = [trained[path] for path in ("score.kernel", "classifier.kernel") if path in trained]
    return heads[0].shape[-1] if heads else 0
