"""Which workers of a study are alive, and for how long there were any.

Every process that works on a study has a session, an attribute of the study: where it is, since
when, and its last sign of life.
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study

_PREFIX = "session "


def spelled(key: str) -> str:
    """`host:pid` of a session's key."""
    return key.rpartition(":")[0]


def _place() -> str:
    """Processes with the same place see each other's ids: of one boot and one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # no Linux: signs of life alone decide


def _born(pid: int) -> str:
    """When a process started, so that another one with its id is not taken for it."""
    try:
        # Field 22; the name in parentheses may hold spaces.
        return re.split(r"\s+", Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2])[20]
    except (OSError, IndexError):
        return ""


class Session:
    """This process's session.

    Args:
      lease: seconds without a sign of life after which a session is over.
      began: when it began, in seconds since the epoch; None is now.
    """

    def __init__(self, study: "Study", lease: float, began: float | None = None):
        self._study, self._lease = study, lease
        self.owner = f"{socket.gethostname()}:{os.getpid()}"
        self.key = f"{self.owner}:{uuid.uuid4().hex[:8]}"
        now = time.time()
        self._values: dict[str, Any] = {
            "began": now if began is None else began,
            "seen": now,
            "place": _place(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        # {session: (its last sign of life, when this process first saw that)}: clocks of machines
        # differ, so a sign is old when it has not changed for a lease by our own.
        self._signs: dict[str, tuple[float, float]] = {}

    def renew(self) -> None:
        """A sign of life; the first begins the session."""
        self._values = {**self._values, "seen": time.time()}
        self._study.set_user_attr(_PREFIX + self.key, self._values)

    def alive(self, keys: Collection[str]) -> set[str]:
        """Those sessions that may still be at work."""
        if not set(keys) - {self.key}:
            return set(keys)
        attrs = self._study.user_attrs
        return {key for key in keys if self._alive(key, attrs.get(_PREFIX + key))}

    def count(self) -> int:
        """How many are at work, this one included once it has begun.

        At work is who gave a sign of life within a lease.
        """
        late = time.time() - self._lease
        own = {k.removeprefix(_PREFIX): v for k, v in self._study.user_attrs.items()
               if k.startswith(_PREFIX)}  # fmt: skip
        return len(self.alive({key for key, values in own.items() if values["seen"] > late}))

    def _alive(self, key: str, values: dict[str, Any] | None) -> bool:
        if key == self.key or values is None:
            return key == self.key
        here = values["place"] and values["place"] == self._values["place"]
        if here and _born(values["pid"]) != values["born"]:
            return False
        now = time.monotonic()
        seen, since = self._signs.get(key, (None, now))
        if seen != values["seen"]:
            since = now
        self._signs[key] = (values["seen"], since)
        return now - since <= self._lease

    def union(self) -> float:
        """Seconds that lie within a session or several."""
        own = [v for k, v in self._study.user_attrs.items() if k.startswith(_PREFIX)]
        total, end = 0.0, 0.0
        for began, seen in sorted((v["began"], v["seen"]) for v in own):
            total += max(0.0, seen - max(began, end))
            end = max(end, seen)
        return total
