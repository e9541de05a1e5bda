"""`jaxtune sweep --ray=ADDRESS`: a worker on every node of a Ray cluster, all on one study.

    head (this process)          node 1                      node 2
    looks at the nodes    ->     same version, same disk?    same version, same disk?
    starts a worker on each ->   command.search              command.search
    waits, reports, starts anew  trials of the study ...     ... each by one of them
    hands the result over  <-    one of them ends the sweep

A worker is what `jaxtune sweep` is on a machine of its own; Ray only starts it where it belongs and
says when it is gone. Its trials are taken over by the others, as the study's leases have it.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxtune
from jaxtune import budget, errors
from jaxtune.config import Config, freeze, replaced
from jaxtune.console import say, stderr
from jaxtune.errors import Cancelled, ConfigError, Failure, Interrupted, StorageError
from jaxtune.signals import Stop
from jaxtune.sweep import storage

_LOOK = 5.0  # seconds between two looks at the cluster
_KNOCK = 10.0  # seconds in which a cluster must take a connection
_ANSWER = 120.0  # seconds in which a node must answer
_STARTS = 3  # of a worker on a node, before the node is given up
_SAVING = 300.0  # seconds that workers have to save in, once they are to stop


class Node(NamedTuple):
    """A machine of the cluster."""

    id: str
    name: str
    gpus: float
    tpus: float


def search(config: Config, workdir: str | Path, address: str) -> dict[str, Any]:
    """Searches as `command.search` does, with a worker on every node of the cluster.

    Args:
      workdir: a folder that all nodes have.
      address: of a Ray cluster: "auto" on one of its nodes, or HOST:PORT.
    Returns:
      The result of the worker that ended the sweep.

    Raises:
      ConfigError: Ray is not installed, no cluster answers, or nodes that cannot share the sweep.
      Interrupted: all workers are gone; the same command goes on.
      Failure: what ended a worker, where no other could end the sweep.
    """
    require_ray()
    workdir = Path(workdir).expanduser().absolute()
    with _joined(address) as ray, Stop() as stop:  # Ray has a handler of its own
        nodes = _nodes(ray)
        if not nodes:
            raise ConfigError(f"the Ray cluster at {address} has no nodes", fix="ray start on some")
        check_storage(config, len(nodes))
        config = portable(config, workdir, len(nodes))
        with _marked(workdir) as word:
            head = _Head(ray, config, workdir, word, stop)
            for node in nodes:
                head.start(node)
            return head.wait()


def require_ray() -> None:
    """Raises ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray", fix="pip install 'jaxtune[ray]', on every node")


def check_storage(config: Config, nodes: int) -> None:
    """Raises ConfigError where several nodes cannot have the study's storage."""
    if nodes > 1 and not storage.shared(config.sweep.storage):
        raise ConfigError(
            f"sweep.storage {config.sweep.storage or 'sweep.db'!r} is SQLite, which is of one "
            f"machine, and the cluster has {nodes} nodes",
            fix="sweep.storage=FOLDER/sweep.journal on a disk that all nodes have, or the URL of a "
            "database",
        )


def portable(config: Config, workdir: Path, nodes: int) -> Config:
    """The config as any node can use it: absolute paths, and its part of a budget of chip-hours."""
    from jaxtune import setup  # with jax, which on a node is told of its chips first

    config = freeze(setup.portable(config))
    asked = config.sweep
    changes: dict[str, Any] = {
        "sweep.prior": tuple(storage.resolve(text, workdir) for text in asked.prior)
    }
    if asked.storage:
        changes["sweep.storage"] = storage.resolve(asked.storage, workdir)
    found = budget.parse(asked.budget, "sweep.budget")
    if found is not None and found.unit == "chip-seconds":
        changes["sweep.budget"] = f"{found.amount / 3600 / nodes:.6g} chip-hours"
    return replaced(config, changes)


class _Head:
    """The workers on the nodes, as Ray knows them."""

    def __init__(self, ray: Any, config: Config, workdir: Path, word: str, stop: Stop):
        self._ray = ray
        self._config, self._workdir = config, workdir
        self._word = word  # stands in a file of the workdir
        self._stop = stop
        self._working: dict[Any, Node] = {}  # by what Ray promises of each
        self._starts: dict[str, int] = {}  # by node
        self._failures: list[Failure] = []
        self._ended = False  # a worker found nothing left to train

    def start(self, node: Node) -> None:
        """Starts a worker on a node.

        Raises:
          ConfigError: the node does not answer, is of another version, or lacks the workdir.
        """
        look = self._on(node, num_cpus=0)(_look)
        try:
            version, word = self._ray.get(look.remote(str(self._workdir)), timeout=_ANSWER)
        except self._ray.exceptions.RayError as error:
            raise ConfigError(
                f"jaxtune cannot be started on node {node.name}: {_first(error)}",
                fix="the same installation of jaxtune on every node",
            ) from error
        if version != jaxtune.__version__:
            raise ConfigError(
                f"node {node.name} has jaxtune {version}, this one {jaxtune.__version__}",
                fix="the same installation of jaxtune on every node",
            )
        if word != self._word:
            raise ConfigError(
                f"the workdir {self._workdir} is not the same folder on node {node.name}",
                fix="a --workdir that all nodes mount (NFS)",
            )
        quiet = bool(self._starts)  # what one says of a sweep all would say
        self._starts[node.id] = self._starts.get(node.id, 0) + 1
        work = self._on(node, num_gpus=node.gpus, tpus=node.tpus)(_work)
        config = dataclasses.asdict(self._config)
        self._working[work.remote(config, str(self._workdir), quiet)] = node
        say(f"a worker starts on node {node.name}")

    def _on(self, node: Node, num_cpus: float = 0, num_gpus: float = 0, tpus: float = 0) -> Any:
        """Ray's decorator for what runs on this node alone, once, in a process of its own."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return self._ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources={"TPU": tpus} if tpus else {},
            max_retries=0,
            max_calls=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )

    def wait(self) -> dict[str, Any]:
        """The result of the sweep; workers that are gone are started anew, on new nodes too."""
        result = None
        while self._working:
            done, _ = self._ray.wait(list(self._working), num_returns=1, timeout=_LOOK)
            for promise in done:
                result = self._ends(promise) or result
            if self._stop.asked:
                self._stop_all()
            if result is None and not self._failures:
                self._look_for_nodes()
        if result is not None:
            return result
        if self._failures:
            raise self._failures[0]
        raise Interrupted(
            f"no worker is left on any node for the sweep in {self._workdir}",
            fix="the same command goes on: every finished result is kept",
        )

    def _ends(self, promise: Any) -> dict[str, Any] | None:
        """What a worker comes back with, if that is the result of the sweep."""
        node = self._working.pop(promise)
        try:
            told = self._ray.get(promise)
        except self._ray.exceptions.RayTaskError as error:
            self._fail(node, Failure(_first(error), fix="the worker's log, under Ray's session"))
            return None
        except self._ray.exceptions.RayError as error:
            kind = type(error).__name__
            say(f"the worker on node {node.name} is gone ({kind}); its trials wait for others")
            return None
        if "failed" in told:
            self._fail(node, _failure(told))
            return None
        self._ended = True
        return told if "best" in told else None

    def _fail(self, node: Node, failure: Failure) -> None:
        say(f"the worker on node {node.name} ended: {failure}")
        self._failures.append(failure)

    def _look_for_nodes(self) -> None:
        """Starts workers on nodes without one: new ones, and where one was lost."""
        busy = {node.id for node in self._working.values()}
        # Once there is nothing left to train, one worker is enough to end the sweep.
        if self._ended and busy:
            return
        for node in _nodes(self._ray):
            if node.id not in busy and self._starts.get(node.id, 0) < _STARTS:
                try:
                    self.start(node)
                except ConfigError as error:  # it may be gone meanwhile
                    say(str(error))
                    self._starts[node.id] = _STARTS

    def _stop_all(self) -> None:
        """Has all workers save; raises what a stopped sweep ends with."""
        for promise in self._working:
            self._ray.cancel(promise, force=False)
        self._ray.wait(list(self._working), num_returns=len(self._working), timeout=_SAVING)
        kind = Cancelled if self._stop.by_user else Interrupted
        raise kind(
            f"the sweep in {self._workdir} is stopped, its trials saved where they are",
            fix="the same command to go on",
        )


def _look(workdir: str) -> tuple[str, str]:
    """On a node: (version of jaxtune, the word that stands in the workdir)."""
    with contextlib.suppress(OSError):
        return jaxtune.__version__, _mark(Path(workdir)).read_text()
    return jaxtune.__version__, ""


def _work(config: dict[str, Any], workdir: str, quiet: bool) -> dict[str, Any]:
    """On a node: the result of its `command.search`, or {"failed", "what", "fix"}."""
    from jaxtune import cores, flags, heap

    flags.apply()
    cores.share(freeze(config), search=True)
    heap.keep_freed()
    stderr.quiet = quiet
    from jaxtune.sweep.command import search as search_here

    try:
        return search_here(freeze(config), workdir)
    except Failure as failure:  # its keyword arguments would not survive a pickle
        return {"failed": type(failure).__name__, "what": failure.what, "fix": failure.fix}


def _failure(told: dict[str, Any]) -> Failure:
    kind = getattr(errors, told["failed"], Failure)
    return kind(told["what"], fix=told["fix"])


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster."""
    import ray

    try:
        _knock(address)
        ray.init(address, logging_level=logging.ERROR, log_to_driver=True)
    except Exception as error:  # gRPC's, Ray's own, or a plain ConnectionError
        raise ConfigError(
            f"no Ray cluster answers at {address}: {_first(error)}",
            fix="ray start --head on one machine, then --ray=auto there, or --ray=HOST:6379",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK).close()


def _nodes(ray: Any) -> list[Node]:
    """The living nodes that take work; one started with --num-cpus=0 and no chips does not."""
    found = []
    for about in ray.nodes():
        has = about["Resources"]
        node = Node(
            about["NodeID"],
            about["NodeManagerHostname"],
            has.get("GPU", 0.0),
            has.get("TPU", 0.0),
        )
        if about["Alive"] and (has.get("CPU", 0) or node.gpus or node.tpus):
            found.append(node)
    return found


@contextlib.contextmanager
def _marked(workdir: Path) -> Iterator[str]:
    """A word that stands in a file of the workdir meanwhile, for nodes to look for."""
    word = secrets.token_hex(8)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _mark(workdir).write_text(word)
    except OSError as error:
        raise StorageError(
            f"workdir {workdir} cannot be written: {error}", fix="a --workdir that can be written"
        ) from error
    try:
        yield word
    finally:
        with contextlib.suppress(OSError):
            _mark(workdir).unlink()


def _mark(workdir: Path) -> Path:
    return workdir / ".ray"


def _first(error: BaseException) -> str:
    """The last line of an error that says something: Ray puts a traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
