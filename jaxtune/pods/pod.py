"""This host among the others of a run: a thread that watches, and words exchanged over the service.

alive/2         = "17 408"           ticks of a host, and how often it asked whether to stop
notice/failed/2 = '{"code": 65, ...'  a host ends and says why: all others end too
notice/lost     = "host 2 (t1v-2)"   process 0 has not heard from a host
notice/stop     = "cancelled"        a host was asked to stop: all stop at the same place
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxtune.errors import Interrupted
from jaxtune.signals import Stop

_SLOWEST = 24 * 3600  # of anything hosts wait for together; a lost one ends the wait long before
_TICK = 1.0  # seconds


class Pod:
    """This host among the others, with a thread that watches over all of them."""

    def __init__(self, client: Any, index: int, count: int, heartbeat: float, stuck: float):
        self.index = index
        self.count = count
        self._client = client
        self._heartbeat = heartbeat
        self._stuck = stuck
        self._lock = threading.Lock()  # held while the hosts agree where to stop
        self._questions = 0
        self._stop_at: int | None = None
        self._stop_asked = False
        self._exchanges = 0
        self._ending = threading.Event()
        # Process 0: the last text of each host and when it came; how far each is, and since when.
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(
            range(count), ("", time.monotonic())
        )
        self._moved: dict[int, tuple[int, float]] = {}
        self._say_at("name", socket.gethostname())
        self._thread = threading.Thread(target=self._watch, name="pods", daemon=True)
        self._thread.start()

    def stops(self, stop: Stop) -> bool:
        """Whether all hosts stop here. Every host must ask at the same places in the same order.

        The first host that is asked to stop (a signal) tells the others. Where they stop is one
        question after the furthest that any of them has passed, so nobody waits for an answer.
        """
        with self._lock:
            self._questions += 1
            if stop.asked and not self._stop_asked:
                self._stop_asked = True
                self._set("notice/stop", "cancelled" if stop.by_user else "interrupted")
            if self._stop_at is None or self._questions < self._stop_at:
                return False
        stop.agreed = True
        stop.by_user = self._client.key_value_try_get("jaxtune/notice/stop") == "cancelled"
        return True

    def exchange(self, text: str) -> list[str]:
        """What every host gave here, in order. Every host must call it at the same places."""
        self._exchanges += 1
        name = f"exchange/{self._exchanges}"
        self._say_at(name, text)
        self._wait(name)
        return [text for _, text in sorted(self._read(f"{name}/").items(), key=lambda x: int(x[0]))]

    def name(self, index: int) -> str:
        """A host as people know it."""
        with contextlib.suppress(RuntimeError):
            host = self._client.key_value_try_get(f"jaxtune/name/{index}")
            return f"host {index} ({host})"
        return f"host {index}"

    def fail(self, line: str, code: int) -> None:
        """Tells the others that this host ends; process 0, which carries their words, ends last."""
        self._ending.set()
        with contextlib.suppress(RuntimeError):
            self._set(f"notice/failed/{self.index}", json.dumps({"code": code, "line": line}))
            deadline = time.monotonic() + 5 * _TICK
            while self.index == 0 and time.monotonic() < deadline:
                left = self._read("notice/failed/").keys() | self._read("ended/").keys()
                if len(left) >= self.count:
                    return
                time.sleep(_TICK / 5)

    def await_news(self) -> None:
        """After a failure that a lost host explains: time enough for the watch to find it."""
        self._ending.wait(self._heartbeat + 5 * _TICK)

    def close(self) -> None:
        """Waits until every host is done. Beyond this no host misses another."""
        self._wait("end")
        self._ending.set()
        self._thread.join(timeout=5 * _TICK)

    # --- the watch, in a thread of its own ---

    def _watch(self) -> None:
        ticks, last = 0, time.monotonic()
        while not self._ending.wait(_TICK):
            ticks += 1
            try:
                self._set(f"alive/{self.index}", f"{ticks} {self._questions}")
                notices = self._read("notice/")
                if self.index == 0:
                    self._listen()
                last = time.monotonic()
                self._obey(notices)
            except RuntimeError:  # of jax: the service does not answer
                if time.monotonic() - last > self._heartbeat and not self._ending.is_set():
                    self._leave("the first host does not answer any more", Interrupted.exit_code)

    def _obey(self, notices: Mapping[str, str]) -> None:
        if "lost" in notices:
            self._leave(f"{notices['lost']}; the others stop", Interrupted.exit_code)
        failed = {name: text for name, text in notices.items() if name.startswith("failed/")}
        others = {name: text for name, text in failed.items() if name != f"failed/{self.index}"}
        if others and not self._ending.is_set():
            name, text = sorted(others.items())[0]
            told = json.loads(text)
            who = self.name(int(name.removeprefix("failed/")))
            self._leave(f"{who} ended: {told['line']}", told["code"], plain=True)
        if "stop" in notices and self._stop_at is None:
            with self._lock:  # nobody here gets past a question meanwhile
                self._say_at("passed", str(self._questions))
                self._wait("stop", seconds=self._heartbeat)
                self._stop_at = 1 + max(map(int, self._read("passed/").values()))

    def _listen(self) -> None:
        """Process 0: who has been silent for too long, or stands still while others get on."""
        now = time.monotonic()
        for index, text in ((int(i), t) for i, t in self._read("alive/").items()):
            if self._heard[index][0] != text:
                self._heard[index] = (text, now)
            asked = int(text.split()[1])
            if self._moved.get(index, (-1, now))[0] != asked:
                self._moved[index] = (asked, now)
        silent = self.silent()
        furthest = max((asked for asked, _ in self._moved.values()), default=0)
        behind = [
            i for i, (n, at) in self._moved.items() if n < furthest and now - at > self._stuck
        ]
        if silent:
            self._set("notice/lost", f"nothing was heard from {self._spell(silent)}")
        elif behind:
            self._set("notice/lost", f"{self._spell(behind)} stood still for {self._stuck:.0f} s")

    def silent(self) -> list[int]:
        """Process 0: the hosts that count as lost, some time before jax itself ends everything."""
        limit = time.monotonic() - 0.6 * self._heartbeat
        return [i for i, (_, at) in self._heard.items() if self.index == 0 and at < limit]

    def _spell(self, indices: list[int]) -> str:
        first = ", ".join(self.name(index) for index in sorted(indices)[:3])
        return first + (f" and {len(indices) - 3} more" if len(indices) > 3 else "")

    def _leave(self, what: str, code: int, *, plain: bool = False) -> NoReturn:
        """Ends this process now: its main thread may be in a collective that never returns."""
        with contextlib.suppress(RuntimeError):
            self._say_at("ended", "")
        deadline = time.monotonic() + 3 * _TICK
        while self.index == 0 and time.monotonic() < deadline:  # the others hear of it from here
            with contextlib.suppress(RuntimeError):
                if len(self._read("ended/")) >= self.count - len(self.silent()):
                    break
            time.sleep(_TICK / 5)
        name = "host" if plain else Interrupted.name
        fix = "" if plain else "; try: the same command on every host goes on from the last save"
        leave(code, f"jaxtune: error[{name}]: {what}{fix}")

    # --- the service ---

    def _say_at(self, name: str, text: str) -> None:
        self._set(f"{name}/{self.index}", text)

    def _set(self, name: str, text: str) -> None:
        self._client.key_value_set(f"jaxtune/{name}", text, allow_overwrite=True)

    def _read(self, folder: str) -> dict[str, str]:
        start = f"jaxtune/{folder}"
        return {k.removeprefix(start): v for k, v in self._client.key_value_dir_get(start)}

    def _wait(self, name: str, seconds: float = _SLOWEST) -> None:
        self._client.wait_at_barrier(f"jaxtune/{name}", int(1000 * seconds))


def leave(code: int, line: str = "") -> NoReturn:
    """Ends the process now: jax would wait for hosts that do not come any more."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        if line:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    os._exit(code)
