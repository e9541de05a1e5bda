"""How many programs XLA has compiled in this process, but for those an engine begins with."""

import functools
import threading
from collections.abc import Callable

import jax

from jaxtune.engine import COMPILING

_EVENT = "/jax/core/compile/backend_compile_duration"


@functools.cache
def count() -> Callable[[], int]:
    """A function that counts from this call on; the same one at every call.

    An engine asks for its programs when it is opened, and compiles them in threads of its own.
    """
    seen = [0]

    def listen(event: str, *_: object, **__: object) -> None:
        own = threading.current_thread().name.startswith(COMPILING)
        seen[0] += event == _EVENT and not own

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: seen[0]
