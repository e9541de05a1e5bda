"""Where a study is kept: an SQLite file, a journal file or a database, and one worker at a time.

Optuna's storages keep single changes apart. What a worker decides from many of them (who goes on,
is there room for one more trial) is decided in `Store.turn`, which one worker has at a time.
"""

import contextlib
import fcntl
import json
import os
import time
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.errors import ConfigError, StorageError

if typing.TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

PATIENCE = 30.0  # seconds to wait for others' locks
_JOURNAL = (".journal", ".log")
_LINE = b'{"op_code":'  # how a journal's lines begin


def resolve(text: str, folder: Path) -> str:
    """`sweep.storage` as a database URL or the absolute path of a journal file.

    Empty is sweep.db in the folder; any other path is an SQLite file.
    """
    if "://" in text:
        return text
    path = Path(text).expanduser() if text else folder / "sweep.db"
    path = path.resolve()
    return str(path) if path.suffix in _JOURNAL else f"sqlite:///{path}"


def shared(text: str) -> bool:
    """Whether workers on several machines can have it: SQLite's locks are of one machine."""
    return bool(text) and not resolve(text, Path()).startswith("sqlite")


def exists(url: str) -> bool:
    """Whether there is a file, as far as it is one."""
    path = _file(url)
    return path is None or path.is_file()


def _file(url: str) -> Path | None:
    """The file of an SQLite URL or a journal; None for a database elsewhere."""
    if url.startswith("sqlite:///"):
        return Path(url.removeprefix("sqlite:///"))
    return None if "://" in url else Path(url)


class Store:
    """An open storage.

    Args:
      url: of `resolve`.
      patience: seconds to wait for locks.
    Raises:
      StorageError: it cannot be reached, is locked, damaged or of another version of Optuna.
    """

    def __init__(self, url: str, patience: float):
        self.url, self.patience = url, patience
        self._path = _file(url)
        self.name = str(self._path or _hidden(url))
        self.storage = self._open()

    def _open(self) -> "BaseStorage":
        import optuna
        from optuna.storages import journal

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            if self._path is not None:
                # A workdir is made; of a path that is given, a folder that is not there is a slip.
                self._path.parent.mkdir(exist_ok=True)
            if self._path is None or self.url.startswith("sqlite"):
                arguments = {"timeout": self.patience} if self._path is not None else {}
                # Two workers that make the tables at once would be in each other's way.
                with self._file_lock() if self._path is not None else contextlib.nullcontext():
                    self._rdb = optuna.storages.RDBStorage(
                        self.url, engine_kwargs={"connect_args": arguments}
                    )
                    if self._path is not None:
                        _hasten(self._rdb)
                return optuna.storages.get_storage(self._rdb)
            lock = journal.JournalFileSymlinkLock(str(self._path))
            backend = journal.JournalFileBackend(str(self._path), lock)
            lock.acquire()
            try:
                _require_journal(self._path)
                _mend(self._path)
            finally:
                lock.release()
            return optuna.storages.JournalStorage(backend)
        except (StorageError, ConfigError):
            raise
        # Drivers, SQLAlchemy, alembic and a damaged journal each raise what they please.
        except Exception as error:
            raise self._failure(error) from error

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns what storages raise into a StorageError of one line."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (
            StorageInternalError,
            SQLAlchemyError,
            json.JSONDecodeError,
            OSError,
        ) as error:
            raise self._failure(error) from error

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """`guarded`, and no other worker has its turn: the lock goes with the process.

        Raises:
          StorageError: another worker did not end its turn within `patience`.
        """
        with self.guarded(), self._file_lock() if self._path is not None else self._database_lock():
            yield

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        with Path(f"{self._path}.turn").open("a") as file:
            end = time.monotonic() + self.patience
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise StorageError(
                            f"sweep.storage {self.name} is locked by another worker",
                            fix="end that worker, or wait for it",
                        ) from None
                    time.sleep(0.01)
            yield

    @contextlib.contextmanager
    def _database_lock(self) -> Iterator[None]:
        """The database's own named lock; one that has none leaves it at Optuna's care."""
        import sqlalchemy

        key = zlib.crc32(b"jaxtune sweep")
        ways = {
            "postgresql": ("SELECT pg_try_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"),
            "mysql": ("SELECT GET_LOCK(:key, 0)", "SELECT RELEASE_LOCK(:key)"),
            "mariadb": ("SELECT GET_LOCK(:key, 0)", "SELECT RELEASE_LOCK(:key)"),
        }
        way = ways.get(self._rdb.engine.dialect.name)
        if way is None:
            yield
            return
        take, give = (sqlalchemy.text(text).bindparams(key=key) for text in way)
        with self._rdb.engine.connect() as connection:
            end = time.monotonic() + self.patience
            while not connection.execute(take).scalar():
                if time.monotonic() > end:
                    raise StorageError(
                        f"sweep.storage {self.name} is locked by another worker",
                        fix="end that worker, or wait for it",
                    )
                time.sleep(0.05)
            try:
                yield
            finally:
                connection.execute(give)

    _rdb: "RDBStorage"

    def _failure(self, error: Exception) -> StorageError:
        cause: Any = error.__cause__ or error
        text = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
        fix = "another sweep.storage, or mend this one"
        if isinstance(cause, json.JSONDecodeError):
            text = f"a line of it is damaged ({text})"
        if "locked" in text:
            fix = "end what holds it, or wait for that"
        elif isinstance(error, ImportError):
            fix = "pip install the driver of that database"
        return StorageError(f"sweep.storage {self.name}: {text or type(cause).__name__}", fix=fix)


def _hasten(storage: "RDBStorage") -> None:
    """A log beside the file takes the place of two flushes of the disk a write (30 ms each here).

    What is in it outlives the process; with the machine the last results may go, not the study.
    """
    from sqlalchemy import event

    @event.listens_for(storage.engine, "connect")
    def set_modes(connection, _record) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.engine.dispose()  # connections from before


def _hidden(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as error:
        raise ConfigError(
            f"sweep.storage {url!r} is no database URL",
            fix="postgresql://user@host/name, or a path that ends in .db or .journal",
        ) from error


def _require_journal(path: Path) -> None:
    """Raises ConfigError for a file that is something else: not to be mended, nor added to."""
    with path.open("rb") as file:
        head = file.read(len(_LINE))
    if head != _LINE[: len(head)]:
        raise ConfigError(
            f"sweep.storage {path} is no journal of Optuna",
            fix="a path where there is no file yet, or an Optuna journal",
        )


def _mend(path: Path) -> None:
    """Cuts off a last line that a full disk left unended: no one was told that it is there."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        back = min(size, 1 << 20)
        file.seek(size - back)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - back + tail.rfind(b"\n") + 1)
