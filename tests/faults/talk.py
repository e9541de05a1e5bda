"""What two hosts of two devices each say to one another: one JSON object on the last line."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune import config, pods, setup, sharding
from jaxtune.data.packing import Batch
from jaxtune.errors import ConfigError
from jaxtune.signals import Stop


def refusal(action: Any) -> str:
    """What a ConfigError says; empty where there is none."""
    try:
        action()
    except ConfigError as error:
        return str(error)
    return ""


def batch_on(mesh: Any, numbers_BT: np.ndarray) -> tuple[list[int], bool]:
    """The rows this host gives, and whether all devices together hold what was meant."""
    mine = sharding.local_rows(mesh, len(numbers_BT))
    batch = Batch(*(numbers_BT[mine] for _ in range(5)), types=None)
    (placed,) = setup.to_mesh([batch], mesh, len(numbers_BT))
    found = pods.gather({"tokens": placed.tokens})["tokens"]
    return mine.tolist(), bool(np.array_equal(found, numbers_BT))


def main(folder: Path) -> dict[str, Any]:
    index = jax.process_index()
    said: dict[str, Any] = {"index": index, "first": pods.is_first()}
    said["exchanged"] = pods.exchange(f"word {index}")
    said["agree"] = [pods.all_agree(True), pods.all_agree(index == 0)]

    run = {"data": "a" * 64, "steps": 4, "config": {"optim": {"lr": 0.1}}}
    base = {"config": {"optim": {"lr": 0.1}, "seed": 0}, "run": run}
    said["same"] = refusal(lambda: pods.check_same(base))
    changes = [
        (
            "config.optim.lr",
            {
                "config": {"optim": {"lr": 0.2}, "seed": 0},
                "run": run | {"config": {"optim": {"lr": 0.2}}},
            },
        ),
        ("config.seed", {"config": {"optim": {"lr": 0.1}, "seed": 1}}),
        ("run.data", {"run": run | {"data": "b" * 64}}),
        ("run.steps", {"run": run | {"steps": 5}}),
        ("run.tokenizer", {"run": run | {"tokenizer": "c"}}),
    ]
    said["differ"] = {
        field: refusal(lambda change=change: pods.check_same(base | (change if index else {})))
        for field, change in changes
    }
    own = folder / f"host{index}"
    own.mkdir()
    (folder / "shared").mkdir(exist_ok=True)
    said["shared"] = refusal(lambda: pods.check_shared(folder / "shared"))
    said["not shared"] = refusal(lambda: pods.check_shared(own))
    said["left"] = sorted(path.name for path in folder.rglob(".shared"))

    numbers_BT = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    said["rows"] = {}
    for name, sizes in {
        "fsdp": {}, "half": {"fsdp": 2, "tensor": 2}, "tensor": {"fsdp": 1, "tensor": 4},
        "context": {"fsdp": 1, "context": 4}, "replicated": {"data": 4, "fsdp": 1},
    }.items():  # fmt: skip
        mesh = sharding.make_mesh(config.MeshConfig(**sizes))
        said["rows"][name] = batch_on(mesh, numbers_BT)

    mesh = sharding.make_mesh(config.MeshConfig())
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    whole = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    cut = jax.make_array_from_callback(whole.shape, place, lambda at: whole[at])
    back = pods.gather({"stack": cut, "matrix": cut.sum(axis=0), "host": whole})
    said["gathered"] = [
        bool(np.array_equal(back["stack"], whole) and np.array_equal(back["host"], whole)),
        bool(np.allclose(back["matrix"], whole.sum(axis=0), atol=1e-6)),
    ]

    stop = Stop()
    for count in range(10_000):
        stop.asked |= index == 1 and count == 20
        stop.by_user = stop.asked
        pods.all_agree(True)  # as a collective does, it keeps the hosts side by side
        if pods.stops(stop):
            said["stopped"] = [count >= 20, stop.agreed, stop.by_user]
            said["at"] = count
            break
    return said


if __name__ == "__main__":
    pods.start(**json.loads(sys.argv[1]))
    with pods.together():
        print(json.dumps(main(Path(sys.argv[2]))))
