"""Failures people can act on: one line that names the thing, the value seen and what to do.

Anything a user can cause is a `Failure`; the command line prints it as
`jaxtune: error[NAME]: WHAT; try: FIX` and exits with its code. Everything else is a
bug of ours (70).
"""


class Failure(Exception):
    """Base of every failure a user can act on. `fix` says what to do next."""

    name = "internal"
    exit_code = 70

    def __init__(self, what: str, *, fix: str):
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}; try: {self.fix}"

    def line(self) -> str:
        """The one line for stderr; newlines inside messages of other libraries are folded."""
        return " ".join(f"jaxtune: error[{self.name}]: {self}".split())


class ConfigError(Failure):
    """A wrong flag, key, type or combination of settings."""

    name, exit_code = "config", 2


class DataError(Failure):
    """Rows that cannot be read or cannot be trained on."""

    name, exit_code = "data", 65


class ModelError(Failure):
    """A checkpoint, tokenizer or adapter that is damaged, unsafe or of another model."""

    name, exit_code = "model", 65


class StorageError(Failure):
    """A disk or bucket that is full, unwritable or gives back other bytes than were written."""

    name, exit_code = "storage", 74


class Interrupted(Failure):
    """Preempted, hung, or a host was lost: the same command goes on from the last checkpoint."""

    name, exit_code = "interrupted", 75


class Cancelled(Failure):
    """Ctrl-C: saved, and the same command goes on from there."""

    name, exit_code = "cancelled", 130


class NumericsError(Failure):
    """Loss or gradients were not finite several steps in a row."""

    name, exit_code = "numerics", 76
