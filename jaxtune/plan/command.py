"""`jaxtune plan`: one configuration on one topology, or the best of many."""

import ast
import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtune import aot, assemble, setup
from jaxtune.config import Config
from jaxtune.console import bar, say
from jaxtune.errors import ConfigError
from jaxtune.plan import interrupt, topologies
from jaxtune.plan.facts import Facts, facts, mesh_of
from jaxtune.plan.report import peaks, show, summary
from jaxtune.plan.search import SECONDS, Found, describe, nearest, search
from jaxtune.plan.sizes import folder_of
from jaxtune.plan.topologies import Topology

_BEST = 5  # points of a search that are shown


class DoesNotFit(ConfigError):
    """The step needs more memory than the chips have; `result` is the plan as JSON values."""

    def __init__(self, result: dict[str, Any], fix: str):
        self.result = result
        largest = ", ".join(f"{name} {size:.2f}" for size, name in result["largest_buffers"])
        super().__init__(
            f"{result['model']} needs {result['memory_per_chip_gib']:.2f} GiB of a "
            f"{result['topology']} chip's {result['available_per_chip_gib']:.2f}; "
            f"largest: {largest} GiB",
            fix=fix,
        )


def stated_topology(file: str) -> str:
    """The topology a config file is for: `TOPOLOGY = "v5litepod-8"` beside its get_config.

    Raises:
      ConfigError: it states none.
    """
    path = file.partition(".py:")[0].removesuffix(".py") + ".py"
    for node in ast.parse(Path(path).read_text()).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
            continue
        if [getattr(target, "id", "") for target in node.targets] == ["TOPOLOGY"]:
            return str(node.value.value)
    raise ConfigError(
        "no topology to plan for", fix=f'--topology=v5litepod-8, or TOPOLOGY = "..." in {path}'
    )


def plan(config: Config, name: str, *, price: float | None = None) -> dict[str, Any]:
    """What the run needs of a topology; see report.summary.

    Raises:
      DoesNotFit: it says how much is missing, and the nearest setting that fits.
      ConfigError, ModelError: an unknown topology, a mesh that does not fill it, a model that
        cannot be read.
    """
    topology = topologies.find(name)
    setup.check_batch(config, mesh_of(config, topology))  # what the run would refuse
    with _model(config.model.path) as folder:
        settled, found = _settle(config, folder, topology)
        result = summary(settled, topology, found, price)
        if found.fits:
            return result
        say("it does not fit; looking for the nearest setting that does")
        with bar("compiling", 6) as tell:
            near = nearest(settled, folder, topology, lambda done, _, text: tell(done, text))
        if near is None:
            raise DoesNotFit(result, fix="more chips: nothing near these settings fits these")
        changes, better = near
        needs = better.needed * topology.chip.devices / aot.GIB
        raise DoesNotFit(result, fix=f"{describe(changes)} (compiled: {needs:.2f} GiB)")


@contextlib.contextmanager
def _model(path: str) -> Iterator[Path]:
    """A folder with the model's config.json, while signals are answered at once."""
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(folder_of(path))
        with interrupt.answered(opened.close):
            yield folder


def _settle(config: Config, folder: Path, topology: Topology) -> tuple[Config, Facts]:
    """The config with a policy for model.remat=auto, and its facts."""
    candidates: Iterable[Config] = [config]
    if config.model.remat == "auto":
        mesh = mesh_of(config, topology)
        assembly = assemble.assemble(config, folder, mesh, weights=False)
        candidates = aot.remat_candidates(config, assembly, mesh)
    settled = result = None
    for candidate in candidates:
        where = f"{topology.name} ({topology.raw}), remat {candidate.model.remat}"
        settled = candidate
        result = facts(
            candidate,
            folder,
            topology,
            partial(say, f"compiling for {where}: a minute or two, the first time only"),
        )
        if result.fits:
            break
    assert settled is not None, "the last policy is always a candidate"
    assert result is not None
    return settled, result


def plan_search(config: Config, name: str, *, price: float | None = None) -> dict[str, Any]:
    """The best settings for a topology: {"best": [plans with "flags"], fastest first}.

    Raises:
      ConfigError: nothing that was compiled fits.
    """
    topology = topologies.find(name)
    say(f"weighing layouts for {topology.name}, then compiling the best of them that are not known "
        f"yet, for {SECONDS // 60} minutes at most")  # fmt: skip
    with _model(config.model.path) as folder, bar("searching", 100) as tell:
        found = search(
            config, folder, topology, lambda done, all_, text: tell(100 * done // all_, text)
        )
    if not found:
        raise ConfigError(
            f"{config.model.path} does not fit {topology.name} in any way that was tried",
            fix="more chips, or a smaller data.max_length",
        )
    return {"topology": topology.name, "best": [_entry(one, topology, price) for one in found]}


def _entry(one: Found, topology: Topology, price: float | None) -> dict[str, Any]:
    flags = describe(one.point.changes)
    return summary(one.point.config, topology, one.facts, price) | {"flags": flags}


def show_best(result: dict[str, Any]) -> None:
    """The fastest points of a search on stdout, with lines to paste."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(
        box=None,
        pad_edge=False,
        title_justify="left",
        title=f"best on {result['topology']}, fastest first",
    )
    for name in ("", "tokens/s, at most", "bound by", "GiB a chip", "free"):
        table.add_column(name, justify="left" if name == "bound by" else "right")
    for number, one in enumerate(result["best"][:_BEST], 1):
        table.add_row(
            str(number),
            f"{one['tokens_per_second_at_most']:,.0f}",
            one["bound_by"],
            f"{one['memory_per_chip_gib']:.2f}",
            f"{one['parts_gib']['free']:.2f}",
        )
    console.print(table)
    for number, one in enumerate(result["best"][:_BEST], 1):
        console.print(f"{number}  {one['flags'] or '(as it is)'}", markup=False)
    known = sum(one["from_cache"] for one in result["best"])
    if known:
        console.print(f"{known} of {len(result['best'])} were compiled before.", style="dim")
    console.print(f"{peaks(result['best'][0])}. The batch of a step is as configured.", style="dim")


__all__ = ["DoesNotFit", "plan", "plan_search", "show", "show_best", "stated_topology"]
