"""Checkpoints that verify themselves: Orbax writes the arrays, a manifest proves them.

    checkpoints/
      100/                 complete by construction: it got this name by a rename, after everything
        state/ ...         below was written and flushed to the disk
        jaxtune.json       the manifest: digest, dtype and shape of every array, the run's `meta`,
                           and a SHA-256 of itself
      200.saving/          a save under way, or what a killed one left (removed at the next start)
      100.deleting/        likewise for a deletion

Orbax restores a flipped bit and casts a changed dtype without a word, so `restore` compares keys,
shapes, dtypes and digests itself and walks back to the newest step that verifies. Old steps go only
after the new one is on the disk, which is why retention is here and not an Orbax policy: those
delete before a manifest could be written. Saves are synchronous: the state is of adapter size.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxtune import pods
from jaxtune.digest import digest
from jaxtune.errors import StorageError

MANIFEST = "jaxtune.json"
FORMAT = 1

_STEP = re.compile(r"0|[1-9][0-9]*")
_UNFINISHED = re.compile(r"[0-9]+\.(saving|deleting)(\.orbax-checkpoint-tmp.*)?")
# TensorStore reports absl statuses as ValueError, Orbax its own failures as RuntimeError.
_WRITE_FAILURES = (OSError, ValueError, RuntimeError)


class Restored(NamedTuple):
    """A verified checkpoint; `skipped` says, a line each, which newer steps failed and why."""

    step: int
    state: Any
    meta: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """Writes the checkpoints of one run; hold `workdir.lock` while one exists.

    Make it before calling `restore`: it first mends what a killed run left.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int, best: bool):
        """Makes the folder, proves it can be written, removes what killed saves left behind.

        Args:
          directory: local folder, or gs:// folder.
          keep: how many of the newest steps to keep.
          best: also keep the step with the lowest loss.
        Raises:
          StorageError: the folder cannot be written.
        """
        self.directory = _folder(directory)
        self.keep = keep
        self.best = best
        if jax.process_index() == 0:
            _prepare(self.directory)
        multihost_utils.sync_global_devices("checkpoints:open")

    def save(self, step: int, state: Any, *, meta: dict[str, Any], loss: float | None) -> None:
        """Saves and returns once a fresh look at the disk finds the step and its manifest.

        Replaces an older save of the same step. Steps after this one, left from before the run was
        set back, are removed with the ones `keep` and `best` no longer want.

        Args:
          step: optimizer steps done.
          state: pytree of arrays.
          meta: JSON values handed back by `restore`; NaN and infinities survive.
          loss: evaluation loss that ranks the best step; None and NaN never win.
        Raises:
          StorageError: the disk is full or failed; earlier steps are untouched.
        """
        arrays = _flatten(state)
        manifest = {
            "format": FORMAT,
            "step": step,
            "loss": None if loss is None else float(loss),
            "arrays": _describe(arrays),
            "meta": meta,
        }
        try:
            self._commit(step, arrays, _seal(manifest))
            if jax.process_index() == 0:
                for old in self._unwanted(step):
                    self._set_aside(old).rmtree()
        except _WRITE_FAILURES as error:
            self._clean_up(step)
            raise self._failed(step, arrays, error) from error
        multihost_utils.sync_global_devices("checkpoints:saved")

    def _commit(self, step: int, arrays: dict[str, jax.Array], manifest: str) -> None:
        saving, final = self.directory / f"{step}.saving", self.directory / str(step)
        with _orbax():
            ocp.save(saving, arrays, overwrite=True)
        if jax.process_index() == 0:
            (saving / MANIFEST).write_text(manifest)
            _flush_to_disk(saving)
            if final.exists():
                replaced = self._set_aside(step)
                saving.rename(final)
                replaced.rmtree()
            else:
                saving.rename(final)
            _flush_to_disk(self.directory, inside=False)
            if step not in steps(self.directory) or (final / MANIFEST).read_text() != manifest:
                raise OSError(f"{final} is not there, or differs, after it was written")

    def _unwanted(self, step: int) -> list[int]:
        """Steps to delete; a step without an intact manifest may not be ours and is left alone."""
        losses = _losses(self.directory)
        sane = {known: loss for known, loss in losses.items() if known <= step}
        kept = {*sorted(sane)[-self.keep :], _lowest(sane) if self.best else None}
        return sorted(losses.keys() - kept)

    def _set_aside(self, step: int) -> epath.Path:
        # Renamed first, so that a kill midway never leaves half a step under a step's name.
        doomed = self.directory / f"{step}.deleting"
        doomed.rmtree(missing_ok=True)
        return (self.directory / str(step)).rename(doomed)

    def _clean_up(self, step: int) -> None:
        """Gives the space of a failed save back; what resists goes at the next start."""
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                if path.name.startswith(f"{step}.") and _UNFINISHED.fullmatch(path.name):
                    path.rmtree()

    def _failed(self, step: int, arrays: dict[str, jax.Array], error: Exception) -> StorageError:
        size = f"{sum(array.nbytes for array in arrays.values()) / 1e6:.1f} MB"
        fix = "free space there, then the same command again"
        with contextlib.suppress(OSError):  # a bucket does not say what is free
            size += f", {shutil.disk_usage(self.directory).free / 1e6:.1f} MB free there"
            fix += f"; {_spell_steps(steps(self.directory))}"
        what = f"step {step} ({size}) could not be saved in {self.directory}: {_brief(error)}"
        return StorageError(what, fix=fix)


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps saved in a folder, ascending, from a fresh listing; verified only by `restore`."""
    root = _folder(directory)
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if _STEP.fullmatch(path.name))


def best_step(directory: str | os.PathLike[str]) -> int | None:
    """The step with the lowest finite loss among those with an intact manifest."""
    return _lowest(_losses(_folder(directory)))


def latest_meta(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`meta` of the newest intact manifest, to compare fingerprints before arrays are restored."""
    root = _folder(directory)
    for step in reversed(steps(root)):
        with contextlib.suppress(_Broken):
            return _read_manifest(root / str(step), step)["meta"]
    return None


def restore(
    directory: str | os.PathLike[str], abstract_state: Any, step: int | None = None
) -> Restored | None:
    """The newest step that verifies, or `step` and no other; None where nothing was ever saved.

    Args:
      directory: the folder given to `Checkpoints`.
      abstract_state: the state as jax.ShapeDtypeStruct leaves with the shardings wanted now, which
        need not be those of the run that saved.
      step: this step only.
    Raises:
      StorageError: there are steps and none verifies, or `step` is missing or does not.
    """
    root = _folder(directory)
    # Disks that several hosts share may list a new step on one of them before another.
    there: list[int] = json.loads(pods.from_first(json.dumps(steps(root))))
    if step is not None and step not in there:
        raise StorageError(f"no checkpoint of step {step} in {root}", fix=_spell_steps(there))
    skipped: list[str] = []
    for candidate in [step] if step is not None else there[::-1]:
        # Each attempt ends the same on all hosts: the arrays are read by all of them or by none.
        try:
            manifest = _together(lambda at=candidate: _read_manifest(root / str(at), at))
            state = _together(lambda saved=manifest: _load(root, saved, abstract_state))
        except _Broken as error:
            skipped.append(f"step {candidate}: {error}")
            continue
        return Restored(candidate, state, manifest["meta"], skipped)
    if not there:
        return None
    raise StorageError(
        f"no checkpoint in {root} can be restored: {'; '.join(skipped)}",
        fix="an intact copy of the folder, another workdir, or removing it to start over",
    )


class _Broken(Exception):
    """Why a step does not verify, as a phrase."""


def _together(action: Callable[[], Any]) -> Any:
    """What the action gives, if no host finds the step broken; then all of them do."""
    result, broken = None, None
    try:
        result = action()
    except _Broken as error:
        broken = error
    if not pods.all_agree(broken is None):
        raise broken or _Broken("another host cannot read it")
    return result


def _load(root: epath.Path, manifest: dict[str, Any], abstract_state: Any) -> Any:
    target = _flatten(abstract_state)
    saved = manifest["arrays"]
    if saved.keys() != target.keys():
        raise _Broken(
            f"it holds {_spell_names(saved.keys() - target.keys())} that this run does not have, "
            f"and lacks {_spell_names(target.keys() - saved.keys())}"
        )
    for name, leaf in target.items():
        was = (saved[name]["dtype"], tuple(saved[name]["shape"]))
        if was != (leaf.dtype.name, leaf.shape):
            raise _Broken(f"{name} is {was[0]}{list(was[1])}, not {leaf.dtype}{list(leaf.shape)}")
    try:
        with _orbax():
            arrays = ocp.load(root / str(manifest["step"]), target)
    except Exception as error:  # damaged files make the libraries below raise nearly anything
        raise _Broken(f"cannot be read: {_brief(error)}") from error
    read = _describe(arrays)
    if damaged := [name for name in saved if saved[name] != read[name]]:
        raise _Broken(f"other bytes were read than written: {_spell_names(damaged)}")
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in target])


def _flatten(state: Any) -> dict[str, Any]:
    """{"opt_state/0/mu/NAME": leaf} in tree order, so that no optax class reaches the disk."""
    leaves = jax.tree.leaves_with_path(state)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError(f"two leaves of the state share a path among {sorted(flat)}")
    return flat


def _describe(arrays: dict[str, jax.Array]) -> dict[str, dict[str, Any]]:
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


def _seal(manifest: dict[str, Any]) -> str:
    # Through JSON first: a key that is a number would sort otherwise after it was read back.
    manifest = json.loads(json.dumps(manifest))
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def _read_manifest(folder: epath.Path, step: int) -> dict[str, Any]:
    """The manifest of a step, proven to be as written. Raises _Broken."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        seal = manifest.pop("sha256")
        body = json.dumps(manifest, sort_keys=True)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _Broken(f"{MANIFEST} cannot be read: {_brief(error)}") from error
    if manifest.get("format") != FORMAT:
        raise _Broken(f"{MANIFEST} is of format {manifest.get('format')}, this is {FORMAT}")
    if hashlib.sha256(body.encode()).hexdigest() != seal:
        raise _Broken(f"{MANIFEST} was changed after it was written")
    if manifest["step"] != step:
        raise _Broken(f"{MANIFEST} is that of step {manifest['step']}")
    return manifest


def _losses(root: epath.Path) -> dict[int, float | None]:
    """{step: loss} of the steps whose manifest is intact."""
    losses = {}
    for step in steps(root):
        with contextlib.suppress(_Broken):
            losses[step] = _read_manifest(root / str(step), step)["loss"]
    return losses


def _lowest(losses: dict[int, float | None]) -> int | None:
    finite = [(loss, s) for s, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return min(finite)[1] if finite else None


def _prepare(directory: epath.Path) -> None:
    probe = directory / f"probe-{socket.gethostname()}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        _mend(directory)
    except OSError as error:
        raise StorageError(
            f"checkpoints cannot be written to {directory}: {_brief(error)}",
            fix="a --workdir that can be written",
        ) from error


def _mend(directory: epath.Path) -> None:
    """Removes what killed saves and deletions left; a save that only lacks its name gets it."""
    for path in [path for path in directory.iterdir() if _UNFINISHED.fullmatch(path.name)]:
        step, _, rest = path.name.partition(".")
        if rest == "saving" and not (directory / step).exists():
            with contextlib.suppress(_Broken):
                _read_manifest(path, int(step))
                path.rename(directory / step)
                continue
        path.rmtree()


def _folder(directory: str | os.PathLike[str]) -> epath.Path:
    # TensorStore's file driver takes absolute paths only; buckets are absolute already.
    path = epath.Path(directory)
    return path if "://" in os.fspath(path) else path.absolute()


def _flush_to_disk(folder: epath.Path, *, inside: bool = True) -> None:
    """fsync of a folder and of all in it: Orbax leaves its metadata and its renames unflushed."""
    if "://" in os.fspath(folder):
        return
    local = Path(folder)
    for path in [*(local.rglob("*") if inside else ()), local]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _orbax() -> Iterator[None]:
    """Orbax without its log, which repeats every failure as pages of tracebacks."""
    context = ocp.Context()
    # Otherwise a folder that cannot be made leaves threads behind that wait for it for minutes.
    context.async_options.create_directories_asynchronously = False
    log = logging.getLogger("absl")
    level, threads = log.level, set(threading.enumerate())
    log.setLevel(logging.CRITICAL)
    try:
        with context:
            yield
    except Exception:
        # Its other threads still write, and would write again what is cleaned up meanwhile.
        for thread in set(threading.enumerate()) - threads:
            thread.join(timeout=10)
        raise
    finally:
        log.setLevel(level)


def _spell_names(names: Any) -> str:
    first = sorted(names)
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return ", ".join(first[:3]) + more if first else "nothing"


def _spell_steps(there: list[int]) -> str:
    return f"saved steps: {', '.join(map(str, there)) or 'none'}"


def _brief(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]
