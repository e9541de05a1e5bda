"""Checkpoints that verify themselves: Orbax writes the arrays, a manifest proves them.

    checkpoints/
      100/                 complete by construction: it got this name by a rename, after everything
        state/ ...         below was written and flushed to the disk
        jaxtune.json       the manifest: digest, dtype and shape of every array, the run's `meta`,
                           and a SHA-256 of itself
      200.saving/          a save under way, or what a killed one left (removed at the next start)
      100.deleting/        likewise for a deletion

In a bucket nothing can be renamed at once. There the manifest, written last, is what completes a
step, and is the first to go when the step is deleted: a folder without one is no step.

Orbax restores a flipped bit and casts a changed dtype without a word, so `restore` compares keys,
shapes, dtypes and digests itself and walks back to the newest step that verifies. Old steps go only
after the new one is on the disk, which is why retention is here and not an Orbax policy: those
delete before a manifest could be written. Saves are synchronous: the state is of adapter size.
"""

import contextlib
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

from jaxtune import bucket, pods
from jaxtune import manifest as manifests
from jaxtune.errors import StorageError
from jaxtune.hf.write import sync
from jaxtune.manifest import Broken

MANIFEST = manifests.NAME

_STEP = re.compile(r"0|[1-9][0-9]*")
_UNFINISHED = re.compile(r"[0-9]+\.(saving|deleting)(\.orbax-checkpoint-tmp.*)?")


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
        self._in_bucket = bucket.is_bucket(directory)
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
            "format": manifests.FORMAT,
            "step": step,
            "loss": None if loss is None else float(loss),
            "arrays": manifests.describe(arrays),
            "meta": meta,
        }
        try:
            if self._in_bucket:
                self._commit_in_bucket(step, arrays, manifests.seal(manifest))
            else:
                self._commit(step, arrays, manifests.seal(manifest))
            if jax.process_index() == 0:
                for old in self._unwanted(step):
                    self._remove(old)
        except _write_failures(self.directory) as error:
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

    def _commit_in_bucket(self, step: int, arrays: dict[str, jax.Array], manifest: str) -> None:
        final = self.directory / str(step)
        if jax.process_index() == 0:
            (final / MANIFEST).unlink(missing_ok=True)
        multihost_utils.sync_global_devices("checkpoints:replace")
        with _orbax():
            ocp.save(final, arrays, overwrite=True)
        if jax.process_index() == 0:
            (final / MANIFEST).write_text(manifest)
            if step not in steps(self.directory) or (final / MANIFEST).read_text() != manifest:
                raise OSError(f"{final} is not there, or differs, after it was written")

    def _unwanted(self, step: int) -> list[int]:
        """Steps to delete; a step without an intact manifest may not be ours and is left alone."""
        losses = _losses(self.directory)
        sane = {known: loss for known, loss in losses.items() if known <= step}
        kept = {*sorted(sane)[-self.keep :], _lowest(sane) if self.best else None}
        return sorted(losses.keys() - kept)

    def _remove(self, step: int) -> None:
        if self._in_bucket:
            (self.directory / str(step) / MANIFEST).unlink()
            (self.directory / str(step)).rmtree()
        else:
            self._set_aside(step).rmtree()

    def _set_aside(self, step: int) -> epath.Path:
        # Renamed first, so that a kill midway never leaves half a step under a step's name.
        doomed = self.directory / f"{step}.deleting"
        doomed.rmtree(missing_ok=True)
        return (self.directory / str(step)).rename(doomed)

    def _clean_up(self, step: int) -> None:
        """Gives the space of a failed save back; what resists goes at the next start."""
        with contextlib.suppress(*_write_failures(self.directory)):
            if self._in_bucket:
                if not (self.directory / str(step) / MANIFEST).exists():
                    (self.directory / str(step)).rmtree()
                return
            for path in self.directory.iterdir():
                if path.name.startswith(f"{step}.") and _UNFINISHED.fullmatch(path.name):
                    path.rmtree()

    def _failed(self, step: int, arrays: dict[str, jax.Array], error: Exception) -> StorageError:
        size = f"{sum(array.nbytes for array in arrays.values()) / 1e6:.1f} MB"
        fix = "free space there, then the same command again"
        with contextlib.suppress(OSError):  # a bucket does not say what is free
            size += f", {shutil.disk_usage(self.directory).free / 1e6:.1f} MB free there"
            fix += f"; {_spell_steps(steps(self.directory))}"
        what = (
            f"step {step} ({size}) could not be saved in {self.directory}: {manifests.brief(error)}"
        )
        return StorageError(what, fix=fix)


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps saved in a folder, ascending, from a fresh listing; verified only by `restore`."""
    root = _folder(directory)
    if bucket.is_bucket(directory):
        with bucket.reaching(str(root)):
            names = [path.name for path in root.iterdir()] if root.exists() else []
            named = [name for name in names if _STEP.fullmatch(name)]
            return sorted(int(name) for name in named if (root / name / MANIFEST).exists())
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
        with contextlib.suppress(Broken):
            return manifests.read(root / str(step), step)["meta"]
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
    there: list[int] = json.loads(pods.exchange(json.dumps(steps(root)))[0])
    if step is not None and step not in there:
        raise StorageError(f"no checkpoint of step {step} in {root}", fix=_spell_steps(there))
    skipped: list[str] = []
    for candidate in [step] if step is not None else there[::-1]:
        # Each attempt ends the same on all hosts: the arrays are read by all of them or by none.
        try:
            manifest = _together(lambda at=candidate: manifests.read(root / str(at), at))
            state = _together(lambda saved=manifest: _load(root, saved, abstract_state))
        except Broken as error:
            skipped.append(f"step {candidate}: {error}")
            continue
        return Restored(candidate, state, manifest["meta"], skipped)
    if not there:
        return None
    raise StorageError(
        f"no checkpoint in {root} can be restored: {'; '.join(skipped)}",
        fix="an intact copy of the folder, another workdir, or removing it to start over",
    )


def _together(action: Callable[[], Any]) -> Any:
    """What the action gives, if no host finds the step broken; then all of them do."""
    result, broken = None, None
    try:
        result = action()
    except Broken as error:
        broken = error
    if not pods.all_agree(broken is None):
        raise broken or Broken("another host cannot read it")
    return result


def _load(root: epath.Path, manifest: dict[str, Any], abstract_state: Any) -> Any:
    target = _flatten(abstract_state)
    saved = manifest["arrays"]
    if saved.keys() != target.keys():
        raise Broken(
            f"it holds {_spell_names(saved.keys() - target.keys())} that this run does not have, "
            f"and lacks {_spell_names(target.keys() - saved.keys())}"
        )
    for name, leaf in target.items():
        was = (saved[name]["dtype"], tuple(saved[name]["shape"]))
        if was != (leaf.dtype.name, leaf.shape):
            raise Broken(f"{name} is {was[0]}{list(was[1])}, not {leaf.dtype}{list(leaf.shape)}")
    try:
        with _orbax():
            arrays = ocp.load(root / str(manifest["step"]), target)
    except Exception as error:  # damaged files make the libraries below raise nearly anything
        raise Broken(f"cannot be read: {manifests.brief(error)}") from error
    read = manifests.describe(arrays)
    if damaged := [name for name in saved if saved[name] != read[name]]:
        raise Broken(f"other bytes were read than written: {_spell_names(damaged)}")
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in target])


def _flatten(state: Any) -> dict[str, Any]:
    """{"opt_state/0/mu/NAME": leaf} in tree order, so that no optax class reaches the disk."""
    leaves = jax.tree.leaves_with_path(state)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError(f"two leaves of the state share a path among {sorted(flat)}")
    return flat


def _losses(root: epath.Path) -> dict[int, float | None]:
    """{step: loss} of the steps whose manifest is intact."""
    losses = {}
    for step in steps(root):
        with contextlib.suppress(Broken):
            losses[step] = manifests.read(root / str(step), step)["loss"]
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
    except _write_failures(directory) as error:
        raise StorageError(
            f"checkpoints cannot be written to {directory}: {manifests.brief(error)}",
            fix="a --workdir that can be written",
        ) from error


def _write_failures(directory: epath.Path) -> tuple[type[Exception], ...]:
    """What a full or failing disk makes the libraries raise; buckets raise nearly anything."""
    if bucket.is_bucket(directory):
        return (Exception,)
    # TensorStore reports absl statuses as ValueError, Orbax its own failures as RuntimeError.
    return (OSError, ValueError, RuntimeError)


def _mend(directory: epath.Path) -> None:
    """Removes what killed saves and deletions left; a save that only lacks its name gets it."""
    found = list(directory.iterdir()) if directory.exists() else []  # empty folders of a bucket
    if bucket.is_bucket(directory):
        for path in found:
            if _STEP.fullmatch(path.name) and not (path / MANIFEST).exists():
                path.rmtree()
        return
    for path in [path for path in found if _UNFINISHED.fullmatch(path.name)]:
        step, _, rest = path.name.partition(".")
        if rest == "saving" and not (directory / step).exists():
            with contextlib.suppress(Broken):
                manifests.read(path, int(step))
                path.rename(directory / step)
                continue
        path.rmtree()


def _folder(directory: str | os.PathLike[str]) -> epath.Path:
    # TensorStore's file driver takes absolute paths only; buckets are absolute already.
    path = bucket.folder(directory)
    return epath.Path(path) if bucket.is_bucket(path) else epath.Path(path).absolute()


def _flush_to_disk(folder: epath.Path, *, inside: bool = True) -> None:
    """fsync of a folder and of all in it: Orbax leaves its metadata and its renames unflushed."""
    if "://" in os.fspath(folder):
        return
    local = Path(folder)
    for path in [*(local.rglob("*") if inside else ()), local]:
        sync(path)


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
