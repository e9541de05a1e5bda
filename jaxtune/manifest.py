"""The manifest of a checkpoint: what was saved, under a seal that shows any change."""

import hashlib
import json
from typing import Any

import jax
from etils import epath

from jaxtune.digest import digest

NAME = "jaxtune.json"
FORMAT = 1


class Broken(Exception):
    """Why a step does not verify, as a phrase."""


def describe(arrays: dict[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """{name: {dtype, shape, digest}} of a state, as a manifest holds it."""
    # One at a time: programs in flight together on virtual CPU devices can deadlock.
    sums = {name: jax.device_get(digest(array)) for name, array in arrays.items()}
    return {
        name: {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "digest": "".join(f"{int(part):08x}" for part in sums[name]),
        }
        for name, array in arrays.items()
    }


def seal(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with a SHA-256 of itself."""
    # Through JSON first: a key that is a number would sort otherwise after it was read back.
    manifest = json.loads(json.dumps(manifest))
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def read(folder: epath.Path, step: int) -> dict[str, Any]:
    """The manifest of a step, proven to be as written. Raises Broken."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        stated = manifest.pop("sha256")
        body = json.dumps(manifest, sort_keys=True)
    except Exception as error:  # of the file, of JSON, of a bucket's library
        raise Broken(f"{NAME} cannot be read: {brief(error)}") from error
    if manifest.get("format") != FORMAT:
        raise Broken(f"{NAME} is of format {manifest.get('format')}, this is {FORMAT}")
    if hashlib.sha256(body.encode()).hexdigest() != stated:
        raise Broken(f"{NAME} was changed after it was written")
    if manifest["step"] != step:
        raise Broken(f"{NAME} is that of step {manifest['step']}")
    return manifest


def brief(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]
