"""SIGINT and SIGTERM as a flag that loops look at, so that a stop never tears a save."""

import signal
import threading
from types import FrameType

from jaxtune.console import say


class Stop:
    """While entered, the first Ctrl-C or SIGTERM sets `asked`; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False  # by all hosts of a run: this is where it stops
        self.by_user = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.by_user = True, number == signal.SIGINT
        say("stopping after this step and saving; Ctrl-C again stops at once")
