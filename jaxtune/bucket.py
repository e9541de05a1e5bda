"""gs:// folders: what a run reads is copied to this host once, what it writes goes back.

    gs://data/rows.jsonl   ->  CACHE/jaxtune/buckets/data/<digest of names, sizes, sums>/rows.jsonl

A copy is verified (size, and crc32c or md5 as the bucket states it), gets its name by a rename, and
stays: an object that changes has another digest. What was copied before an interruption is kept.
"""

import base64
import contextlib
import fnmatch
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from jaxtune import flags
from jaxtune.console import say
from jaxtune.errors import ConfigError, Failure, StorageError

_SCHEME = "gs://"
_ENDPOINTS = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
_THREADS = 8
_PUSH_SECONDS = 30.0
_BLOCK = 16 << 20


class _Object(NamedTuple):
    name: str  # bucket/path
    size: int
    crc32c: str  # base64, as the bucket states it; empty where it does not
    md5: str


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def folder(path: str | os.PathLike[str]) -> Path:
    """A folder to read and write in, on a disk or in a bucket.

    Raises:
      ConfigError: a bucket, and what reads buckets is not installed.
    """
    text = os.fspath(path)
    if not is_bucket(text):
        return Path(text)
    _filesystem()
    from etils import epath

    return cast(Path, epath.Path(text))  # it has pathlib's methods, and knows buckets


def local(path: str, failure: type[Failure], only: Sequence[str] = ("*",)) -> Path:
    """A file or folder of a bucket as its verified copy on this host.

    Args:
      path: gs://BUCKET/NAME.
      failure: of what kind a missing or unreadable path is.
      only: patterns of the file names wanted of a folder.

    Raises:
      failure: nothing there, or no right to read it.
      StorageError: no room for the copy, or other bytes arrive than the bucket states.
    """
    inside = path.removeprefix(_SCHEME).rstrip("/")
    try:
        found = _filesystem().find(inside, detail=True)
    except Exception as error:  # of the network, of the credentials, of gcsfs
        raise failure(f"{path} cannot be listed: {_brief(error)}", fix=_HELP) from error
    objects = [_describe(about) for about in found.values() if not about["name"].endswith("/")]
    alone = [o for o in objects if o.name == inside]
    wanted = alone or [
        o for o in objects if any(fnmatch.fnmatch(o.name.rsplit("/", 1)[-1], p) for p in only)
    ]
    if not wanted:
        raise failure(f"{path} does not exist, or holds nothing that is wanted", fix=_HELP)
    seal = hashlib.sha256("\n".join(map(str, sorted(wanted))).encode()).hexdigest()[:16]
    root = flags.caches(os.environ) / "buckets" / inside.replace("/", "--") / seal
    start = inside.rsplit("/", 1)[0] if alone else inside
    places = {o: root / o.name.removeprefix(start).lstrip("/") for o in wanted}
    if any(".." in place.relative_to(root).parts for place in places.values()):
        raise failure(f"{path} names a file outside itself", fix="a folder you trust")
    missing = [o for o, place in places.items() if not place.is_file()]
    if missing:
        _fetch(path, {o: places[o] for o in missing}, root)
    return places[alone[0]] if alone else root


def _fetch(path: str, places: dict[_Object, Path], root: Path) -> None:
    size = sum(o.size for o in places)
    say(f"copying {len(places)} files ({size / 1e9:.2f} GB) of {path} to {root}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise StorageError(
            f"{root} cannot be made: {error}", fix="another XDG_CACHE_HOME"
        ) from error
    if free < size:
        raise StorageError(
            f"{path} takes {size / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free",
            fix="XDG_CACHE_HOME=FOLDER on a larger disk",
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda item: _fetch_one(*item), places.items()):
            pass  # which raises what a thread raised


def _fetch_one(wanted: _Object, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name, so that two processes on a host do not write into one file.
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=".partial-")
    os.close(handle)
    partial = Path(name)
    try:
        _filesystem().get_file(wanted.name, str(partial))
        size = partial.stat().st_size
        if size != wanted.size or not _same_sum(partial, wanted):
            raise StorageError(
                f"{_SCHEME}{wanted.name} arrived damaged: {size} bytes of {wanted.size}, or others",
                fix="the same command again",
            )
        partial.replace(place)
    except StorageError:
        raise
    except Exception as error:
        what = f"{_SCHEME}{wanted.name} could not be copied: {_brief(error)}"
        raise StorageError(what, fix="the same command again: what is copied stays") from error
    finally:
        partial.unlink(missing_ok=True)


def _same_sum(file: Path, wanted: _Object) -> bool:
    if wanted.crc32c and importlib.util.find_spec("google_crc32c"):
        import google_crc32c

        state, stated = google_crc32c.Checksum(), wanted.crc32c
    elif wanted.md5:
        state, stated = hashlib.md5(usedforsecurity=False), wanted.md5
    else:
        return True  # an object made of parts states a crc32c alone
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return base64.b64encode(state.digest()).decode() == stated


class Desk:
    """A folder on this host for files of a run that are appended to, which objects cannot be."""

    def __init__(self, workdir: Path, kept: Sequence[str]):
        """A local workdir is its own desk. Of a bucket's, the files `kept` are fetched first.

        Raises:
          StorageError: the bucket does not answer.
        """
        self._remote = workdir if is_bucket(workdir) else None
        self.folder = workdir
        self._sent: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        if self._remote is None:
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="jaxtune-")
        self.folder = Path(self._temporary.name)
        for name in kept:
            with reaching(workdir / name):
                if (workdir / name).exists():
                    (self.folder / name).write_bytes((workdir / name).read_bytes())
        self._thread = threading.Thread(target=self._push_often, daemon=True)
        self._thread.start()

    def push(self) -> None:
        """Sends what has changed; what was written before it is in the bucket when it returns.

        Raises:
          StorageError: the bucket does not take it.
        """
        if self._remote is None:
            return
        with self._lock:
            for file in sorted(self.folder.rglob("*")):
                about = file.stat()
                state = (about.st_size, about.st_mtime_ns)
                if file.is_file() and self._sent.get(file) != state:
                    target = self._remote / str(file.relative_to(self.folder))
                    with reaching(target):
                        target.write_bytes(file.read_bytes())
                    self._sent[file] = state

    def close(self) -> None:
        """Sends the rest and gives the folder back."""
        if self._remote is None:
            return
        self._done.set()
        self._thread.join()
        self.push()
        self._temporary.cleanup()

    def _push_often(self) -> None:
        while not self._done.wait(_PUSH_SECONDS):
            try:
                self.push()
            except StorageError as error:  # the next checkpoint asks again, and fails if it must
                say(f"{error.what}; trying again")


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes a StorageError of whatever a bucket's library raises inside; nothing on a disk."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        raise StorageError(f"{path} cannot be reached: {_brief(error)}", fix=_HELP) from error


@functools.cache
def _filesystem() -> Any:
    """gcsfs, told what suits a run, before anything else opens a bucket."""
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError("gs:// paths need gcsfs", fix="pip install 'jaxtune[gcs]'")
    for name in _ENDPOINTS:
        host = urlsplit(os.environ.get(name, "")).hostname
        if host not in (None, "127.0.0.1", "localhost", "::1"):
            raise ConfigError(
                f"{name} sends what is written, credentials too, to {host}", fix=f"unset {name}"
            )
    # It would ask over gRPC first, for a minute, where only JSON is served.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config

    # Other hosts write too, so a listing from before tells nothing. etils asks the same gcsfs.
    settings = fsspec.config.conf.setdefault("gcs", {})
    settings.setdefault("use_listings_cache", False)
    if os.environ.get(_ENDPOINTS[0]):
        settings.setdefault("token", "anon")
    return fsspec.filesystem("gcs")


def _describe(about: dict[str, Any]) -> _Object:
    sums = (about.get("crc32c") or "", about.get("md5Hash") or "")
    return _Object(about["name"], int(about["size"]), *sums)


def _brief(error: BaseException) -> str:
    """The kind of an error and its first line, without what a request carried."""
    line = next(iter(str(error).splitlines()), "").split("Authorization")[0]
    return f"{type(error).__name__}: {line}"[:200]


_HELP = "the name, `gcloud auth application-default login`, or the rights of this machine"
