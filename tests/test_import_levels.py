"""Imports run only downward: a module imports from lower levels, or from its own package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "jaxtune"

# The architecture of docs/design.md. A folder's level holds for all of its files.
LEVELS = {
    "errors": 0, "budget": 0, "config": 0, "tree": 0, "sharding": 0, "console": 0, "digest": 0,
    "flags": 0, "heap": 0, "cores": 0,
    "kernels": 1, "signals": 1, "bucket": 1,
    "models": 2, "data": 2, "pods": 2,
    "lora": 3, "optim": 3, "objectives": 3, "hf": 3,
    "step": 4, "assemble": 4, "manifest": 4,
    "checkpoint": 5, "metrics": 5, "decoding": 5, "workdir": 5, "setup": 5, "slots": 5,
    "deadline": 5,
    "estimate": 6, "members": 6, "scoring": 6, "aot": 7, "engine": 7, "population": 8,
    "train": 8, "tuned": 8,
    "compare": 9, "plan": 9, "doctor": 9, "sweep": 9,
    "cli": 10,
    "demo": 11, "__init__": 11,
}  # fmt: skip
# Level 0 modules build on each other in this order.
GROUND = [
    "errors", "budget", "config", "console", "tree", "flags", "heap", "cores", "sharding", "digest",
]  # fmt: skip


def _imports(file: Path) -> set[str]:
    """Top-level names below `jaxtune` that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts == ["jaxtune"]:
                found |= {alias.name for alias in node.names}
            elif parts[0] == "jaxtune":
                found.add(parts[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jaxtune.")}
    return found & LEVELS.keys()


def test_every_module_has_a_level():
    names = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}
    assert names - {"__pycache__"} == LEVELS.keys()


def test_imports_run_downward():
    wrong = []
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in _imports(file) - {own}:
            same_ground = own in GROUND and other in GROUND
            below = LEVELS[other] < LEVELS[own]
            if not (below or (same_ground and GROUND.index(other) < GROUND.index(own))):
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert wrong == []
