"""Ctrl-C and SIGTERM while a compiler works: one line and the exit code, at once.

Python runs its own handlers only when the compiler has returned, minutes later. What it does at
once, in C, is to write the signal's number to a pipe; a thread reads it and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from jaxtune.console import stderr
from jaxtune.errors import Cancelled, Failure, Interrupted

_FIX = "the same command; what has been compiled to its end is kept"


@contextlib.contextmanager
def answered(leaving: Callable[[], None]) -> Iterator[None]:
    """While entered, the first SIGINT or SIGTERM ends this process with 130 or 75.

    Args:
      leaving: removes what would be left behind; called from another thread.
    """
    if threading.current_thread() is not threading.main_thread():  # Python's rule for handlers
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {n: signal.signal(n, _nothing) for n in (signal.SIGINT, signal.SIGTERM)}
    pipe = signal.set_wakeup_fd(write)
    thread = threading.Thread(target=_await, args=(read, leaving), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # ends the thread
        thread.join()
        os.close(read)


def put_back() -> None:
    """Takes signals back from a library that has installed handlers in C, as libtpu does."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)


def _await(read: int, leaving: Callable[[], None]) -> None:
    failures: dict[int, Failure] = {
        signal.SIGINT: Cancelled("interrupted", fix=_FIX),
        signal.SIGTERM: Interrupted("told to end by SIGTERM", fix=_FIX),
    }
    while number := os.read(read, 1):
        if (failure := failures.get(number[0])) is not None:
            with contextlib.suppress(Exception):  # nothing may keep this process alive
                leaving()
                stderr.show_cursor()  # which a progress bar hides
            start = "\n" if sys.stderr.isatty() else ""  # after a bar that is not finished
            os.write(2, f"{start}{failure.line()}\n".encode())
            os._exit(failure.exit_code)


def _nothing(*_: object) -> None:
    """A handler in Python is what makes C write to the pipe."""
