"""A model's config.json without its weights: from a folder, the shipped table, or the hub."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxtune import bucket
from jaxtune.errors import ConfigError, ModelError
from jaxtune.hf import files

# {hub id: config.json, the fields that we read}; harmless fields and weights left out.
_TABLE = Path(__file__).parents[1] / "models" / "sizes.json"
_SECONDS = 5  # that the hub may take to answer


@contextmanager
def folder_of(path: str) -> Iterator[Path]:
    """A folder with the config.json of a local folder, a bucket's folder, or of a hub id.

    Raises:
      ConfigError: no path.
      ModelError: neither a folder, nor in the table, nor to be had from the hub.
    """
    if not path:
        raise ConfigError("model.path is empty", fix="--config.model.path=FOLDER_OR_HUB_ID")
    if bucket.is_bucket(path):
        yield bucket.local(path, ModelError, ("config.json",))
        return
    local = Path(path).expanduser()
    if local.is_dir():
        yield local
        return
    found = shipped().get(path.lower())
    with TemporaryDirectory() as folder:
        text = json.dumps(found) if found is not None else _from_hub(path)
        (Path(folder) / "config.json").write_text(text)
        yield Path(folder)


def shipped() -> dict[str, dict[str, Any]]:
    """{hub id in small letters: config} of the models whose sizes come with jaxtune."""
    return {name.lower(): config for name, config in files.read_json(_TABLE).items()}


def _from_hub(path: str) -> str:
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(
            f"model folder {path!r} does not exist",
            fix="an existing folder, or a hub id owner/name",
        )
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    try:
        # One question, once: a download alone asks six times, with a warning and a pause for each.
        get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=_SECONDS)
        return Path(hf_hub_download(path, "config.json")).read_text(encoding="utf-8")
    # An answer of the hub, an id it does not take, HF_HUB_OFFLINE, or an error of the HTTP library
    # that this version of it uses.
    except Exception as error:
        cached = None
        with contextlib.suppress(ValueError):  # no id
            cached = try_to_load_from_cache(path, "config.json")
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        said = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ModelError(
            f"{path!r} is no folder here, not in the shipped table, and the hub did not give its "
            f"config.json: {said}",
            fix="a folder with its config.json, or check the id, the network and `hf auth login`",
        ) from error
