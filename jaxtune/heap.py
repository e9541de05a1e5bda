"""How the C library keeps this process's memory, and when Python looks for what it lost."""

import ctypes
import gc
import os

from jaxtune import flags

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Makes freed memory stay with the process, on machines that compute on their processor.

    A step on a CPU asks for its activations anew; from the kernel they come as pages that must be
    cleared and mapped one by one, which takes an eighth of the step. Threads share one heap then,
    since others than the first give memory back. To be called before there are threads.

    Returns whether it is so: not beside an accelerator, nor without glibc.
    """
    if not flags.on_processor():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))  # -1: never
    done = [mallopt(name, value) for name, value in settings]
    return all(done)


def pause_collector() -> None:
    """Python's collector of cycles rests until `resume_collector`.

    Imports and tracing make a million objects that stay; it would walk them time and again, which
    takes a tenth of a start.
    """
    gc.disable()


def resume_collector() -> None:
    """It works again, and leaves alone what is there by now."""
    gc.freeze()
    gc.enable()
