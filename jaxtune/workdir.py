"""One workdir, one run: a lock against a second process, a fingerprint against other settings."""

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtune
from jaxtune import pods
from jaxtune.config import Config, dotted
from jaxtune.data.packing import Rows, digest
from jaxtune.errors import ConfigError, StorageError
from jaxtune.hf import files, tokenizer

TRIALS = "trials"  # folder in a sweep's workdir

_DIGEST = re.compile(r'"[0-9a-f]{64}"')


def refuse_sweep(workdir: str | os.PathLike[str]) -> None:
    """Raises ConfigError where a training would write over a sweep."""
    if "://" not in os.fspath(workdir) and (Path(workdir) / TRIALS).is_dir():
        raise ConfigError(f"{workdir} holds a sweep", fix="another --workdir for the training")


class InUse(ConfigError):
    """Another process works in that workdir."""


@contextlib.contextmanager
def lock(
    workdir: str | os.PathLike[str], *, shared: bool = False, name: str = ".lock"
) -> Iterator[None]:
    """Keeps a second run out of a workdir, which it makes if need be; one for all hosts.

    The kernel drops the lock with the process, so kill -9 leaves nothing to clear by hand. Buckets
    have no locks: there it does nothing, and of several hosts only the first takes it.

    Args:
      shared: others that share it are let in too, such as the workers of a sweep.
      name: of the file, where a workdir has several locks.
    Raises:
      InUse: another process holds it; names its host and pid.
      StorageError: the lock file cannot be made or locked.
    """
    if "://" in os.fspath(workdir) or not pods.is_first():
        yield
        return
    path = Path(workdir) / name
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise StorageError(
            f"workdir {workdir} cannot be written: {error}", fix="a --workdir that can be written"
        ) from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InUse(
                f"workdir {workdir} is in use by {file.read().strip() or 'another run'}",
                fix="another --workdir, or wait for that run to end",
            ) from None
        except OSError as error:
            raise StorageError(
                f"{path} cannot be locked: {error}", fix="a --workdir on a disk with file locks"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        except BaseException:
            if new and [entry.name for entry in path.parent.iterdir()] == [path.name]:
                path.unlink()  # a run that failed before it wrote anything leaves no folder
                path.parent.rmdir()
            raise


def fingerprint_of(
    config: Config, folder: Path, train: Rows, evals: Rows | None, steps: int
) -> dict[str, Any]:
    """Everything that decides a run's numbers; a workdir only goes on with the same."""
    values = config.to_dict()
    for key in ("checkpoint", "mesh", "eval", "sweep"):
        del values[key]  # a run may move to other devices and be watched more or less closely
    for key in ("log_every", "tensorboard", "wandb", "steps", "epochs"):
        del values["train"][key]  # the number of steps that follows stands beside the config
    del values["model"]["path"], values["data"]["train"], values["data"]["eval"]
    return {
        "version": jaxtune.__version__,
        "config": values,
        "steps": steps,
        "data": digest(train),
        "eval_data": digest(evals) if evals is not None else None,
        "model": files.fingerprint(folder),
        "tokenizer": tokenizer.tokenizer_digest(str(folder)),
    }


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with a run that was started with other settings, data, tokenizer or model.

    Args:
      saved: nested JSON values from a checkpoint's `meta`.
      now: the same of this run.
    Raises:
      ConfigError: names every field that differs, with both values.
    """
    old, new = dotted(json.loads(json.dumps(saved))), dotted(json.loads(json.dumps(now)))
    differ = [
        f"{name} was {_show(old, name)}, is now {_show(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...)
    ]
    if differ:
        raise ConfigError(
            f"the checkpoints here are of another run: {'; '.join(differ)}",
            fix="the old values again, or another --workdir (lora.init=ADAPTER goes on there)",
        )


def _show(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "absent"
    text = json.dumps(values[name], sort_keys=True)
    return f'{text[:12]}..."' if _DIGEST.fullmatch(text) else text
