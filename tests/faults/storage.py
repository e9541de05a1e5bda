"""Faults of storage: a damaged file, a small disk, a file size limit, a process killed midway."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def small_disk(path: Path, kibibytes: int) -> Iterator[Path]:
    """A disk of its own at `path`; skips where this process may not mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process grows past `limit` bytes: writes fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kill_at_file_operation(number: int) -> None:
    """SIGKILLs this process just before its `number`-th Python-level file operation from now."""
    left = number

    def hook(event: str, _: tuple[Any, ...]) -> None:
        nonlocal left
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def damage(rng: random.Random, folder: Path) -> str:
    """Damages a random file below `folder` in a random way and says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    kind = rng.choice(list(_DAMAGE))
    _DAMAGE[kind](rng, file, files)
    return f"{kind} {file.relative_to(folder)}"


def flip_bit(rng: random.Random, file: Path) -> None:
    """Flips one bit; an empty file gets a byte."""
    content = bytearray(file.read_bytes()) or bytearray(1)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _truncate(rng: random.Random, file: Path) -> None:
    os.truncate(file, rng.randrange(max(file.stat().st_size, 1)))


def _zero_page(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(max(len(content), 1))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    file.write_bytes(content)


def _swap(rng: random.Random, file: Path, files: list[Path]) -> None:
    other = rng.choice(files)
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def _edit_json(rng: random.Random, file: Path, files: list[Path]) -> None:
    """Changes one number, string or null of a JSON file, which stays JSON."""
    texts = [path for path in files if path.name == "jaxtune.json" or "META" in path.name]
    file = file if file in texts else rng.choice(texts)
    try:
        tree = json.loads(file.read_text())
    except ValueError:  # damaged before
        return
    if slots := list(_slots(tree)):
        parent, key = rng.choice(slots)
        value = parent[key]
        parent[key] = value + 1 if isinstance(value, int | float) else f"{value or ''}x"
    file.write_text(json.dumps(tree))


def _slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every leaf."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield from _slots(value)
        else:
            yield tree, key


_DAMAGE: dict[str, Callable[[random.Random, Path, list[Path]], None]] = {
    "flip a bit of": lambda rng, file, _: flip_bit(rng, file),
    "truncate": lambda rng, file, _: _truncate(rng, file),
    "zero a page of": lambda rng, file, _: _zero_page(rng, file),
    "delete": lambda rng, file, _: file.unlink(),
    "swap": _swap,
    "edit": _edit_json,
}
