"""Parameters as one flat dict, and rules that say what each of them is for.

A model is split into a graph definition and `{path: array}`, such as

    embed_tokens.embedding                  [V, D]
    layers.0-3.self_attn.q_proj.kernel      [4, D, N*H]   layers 0 to 3, stacked on axis 0
    layers.4-15.self_attn.q_proj.kernel     [12, D, N*H]
    norm.scale                              [D]

Rules are regular expressions on the path of one layer (`layers.3.self_attn.q_proj.kernel`). Layers
that a rule sets apart live in stacks of their own (`stacks`), so every leaf has exactly one label
and no gradient flows below the lowest trained layer.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flax import nnx

from jaxtune.errors import ConfigError

Leaf = TypeVar("Leaf")
Params = dict[str, Any]
Rules = Sequence[tuple[str, str]]

_STACK = re.compile(r"^layers\.(\d+)-(\d+)\.")


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Module -> (graph definition, flat dict of its arrays, real or abstract)."""
    graphdef, state = nnx.split(model)
    return graphdef, {_join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Any:
    """The inverse of `split`."""
    nested: dict[str, Any] = {}
    for path, leaf in params.items():
        *parents, name = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nnx.merge(graphdef, nested)


def axes(model: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """{path: logical axis names}, as declared beside each parameter."""
    state = nnx.to_flat_state(nnx.state(model))
    return {_join(path): leaf.get_metadata()["axes"] for path, leaf in state}


def layer_range(path: str) -> range | None:
    """Layers a stacked leaf holds, in order; None for a leaf outside the layers."""
    match = _STACK.match(path)
    return range(int(match[1]), int(match[2]) + 1) if match else None


def layer_paths(path: str) -> list[str]:
    """`layers.0-1.a.kernel` -> [`layers.0.a.kernel`, `layers.1.a.kernel`]; others -> [path]."""
    layers = layer_range(path)
    return [path] if layers is None else [_STACK.sub(f"layers.{i}.", path) for i in layers]


def label(paths: Iterable[str], rules: Rules, defaults: Rules = ()) -> dict[str, str]:
    """{path: label of the first matching rule}; rules first, then defaults.

    Raises:
      ConfigError: a rule that is no regular expression or decides nothing, a path no rule covers.
    """
    paths = list(paths)
    used: set[int] = set()
    labels: dict[str, str] = {}
    everything = [*rules, *defaults]
    patterns = [_compile(pattern) for pattern, _ in everything]
    for path in paths:
        hit = next((i for i, pattern in enumerate(patterns) if pattern.search(path)), None)
        if hit is None:
            raise ConfigError(f"no rule covers {path}", fix="a last rule that matches everything")
        used.add(hit)
        labels[path] = everything[hit][1]
    for i, (pattern, name) in enumerate(rules):
        if i not in used:
            matched = any(patterns[i].search(path) for path in paths)
            why = "earlier rules take all it matches" if matched else "it matches no parameter"
            raise ConfigError(
                f"rule {pattern!r} -> {name!r} decides nothing: {why}",
                fix=f"a pattern for one of {_sample(paths)}",
            )
    return labels


def stacks(num_layers: int, signature: Callable[[int], Any]) -> tuple[tuple[int, int], ...]:
    """Longest runs [start, stop) of layers with equal signatures.

    >>> stacks(6, lambda i: i < 2)
    ((0, 2), (2, 6))
    """
    cuts = [i for i in range(1, num_layers) if signature(i) != signature(i - 1)]
    return tuple(zip([0, *cuts], [*cuts, num_layers], strict=True))


def stack_labels(paths: Iterable[str], labels: Mapping[str, str]) -> dict[str, str]:
    """Labels of single layers -> labels of stacked leaves."""
    result = {}
    for path in paths:
        found = {labels[single] for single in layer_paths(path)}
        assert len(found) == 1, f"{path} holds layers of several labels {found}"
        result[path] = found.pop()
    return result


def partition(
    params: Mapping[str, Leaf], labels: Mapping[str, str], frozen: str = "frozen"
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """(leaves with other labels, leaves labelled `frozen`); together they are all of `params`."""
    trainable = {path: leaf for path, leaf in params.items() if labels[path] != frozen}
    return trainable, {path: leaf for path, leaf in params.items() if labels[path] == frozen}


def _join(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is not a regular expression: {error}",
            fix=r"for example 'layers\.[0-3]\.'",
        ) from error


def _sample(paths: Sequence[str], most: int = 12) -> str:
    short = sorted({re.sub(r"^layers\.\d+\.", "layers.N.", path) for path in paths})
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")
