"""What people see while something runs: lines and bars on stderr; stdout is for results."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line to the person watching."""
    stderr.print(text, markup=False)


@contextmanager
def bar(task: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; the yielded function takes (steps done, a short text of numbers).

    A third argument is a new total. Into a file or a pipe it prints a line every tenth of the way.
    """
    if not sys.stderr.isatty():
        tenth = 0

        def line(step: int, text: str, total: int = total) -> None:
            nonlocal tenth
            now = 10 * (step - done) // max(1, total - done)
            if now > tenth:
                say(f"{task} {step}/{total}  {text}")
            tenth = max(tenth, now)

        yield line
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=False) as progress:
        row = progress.add_task(task, total=total, completed=done, numbers="")
        yield lambda step, text, total=total: progress.update(
            row, completed=step, numbers=text, total=total
        )
