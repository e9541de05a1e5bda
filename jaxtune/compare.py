"""Are two models the same? Checkpoints, runs and adapters: their tensors, logits on a prompt."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxtune import setup
from jaxtune.console import say, stderr
from jaxtune.errors import ModelError
from jaxtune.hf import adapter, files, load
from jaxtune.hf.export import merged
from jaxtune.hf.tokenizer import load_tokenizer, tokenizer_files
from jaxtune.hf.verify import (
    Difference,
    Readable,
    by_canonical_name,
    compare_tensors,
    distance,
    single_layers,
)
from jaxtune.models.families import Family
from jaxtune.tuned import open_run

PROMPT = "The quick brown fox jumps over the lazy dog, and 12 hens look on."
_WORST = 10  # rows of the table


class Differs(ModelError):
    """Two sides that are not the same; `result` is what `verify` would have returned."""

    def __init__(self, what: str, result: dict[str, Any], fix: str):
        super().__init__(what, fix=fix)
        self.result = result


class Side(NamedTuple):
    """One of the two, opened as far as a comparison needs it."""

    name: str
    tensors: Mapping[str, Readable]  # of the whole model, or what an adapter holds
    rows: Family
    config: Any
    logits: Callable[[Any, str], Any] | None = None  # (tokens [1, T], dtype); None: an adapter
    tokenizer: Any = None
    dtype: str | None = None  # of the computation, where the model has one of its own
    held: str = "float32"  # coarsest dtype in which it keeps its weights
    trained: Mapping[str, Readable] | None = None  # of a run and an adapter, under our paths
    strange: Mapping[str, Any] = MappingProxyType({})  # fields of config.json that we do not know


def verify(a: str, b: str, prompt: str = PROMPT) -> dict[str, Any]:
    """Compares two models and shows what differs.

    Logits agree when they differ by no more than 16 steps of the coarsest dtype involved, of the
    largest logit. Beside an adapter only what was trained is compared.

    Args:
      a, b: Hugging Face folders, hub ids, workdirs of runs, or PEFT adapter folders.

    Returns:
      {"tensors", "differ", "beyond_rounding", "worst": fields of `Difference`, "settings": what
      config.json says otherwise, "logits": None or {"positions", "same_argmax", "most", "largest",
      "alike"}}.

    Raises:
      Differs: by more than rounding.
      ModelError: a damaged side, or an adapter beside a whole checkpoint.
    """
    left, right = _open(a, b), _open(b, a)
    whole = left.logits is not None and right.logits is not None
    if whole:
        differences = compare_tensors(left.tensors, right.tensors)
        names = {**left.tensors, **right.tensors}
    else:
        ours, theirs = _trained(left, right), _trained(right, left)
        differences, names = compare_tensors(ours, theirs), {**ours, **theirs}
    beyond = [d for d in differences if not d.rounding]
    result: dict[str, Any] = {
        "tensors": len(names),
        "differ": len(differences),
        "beyond_rounding": len(beyond),
        "worst": [d._asdict() for d in differences[:_WORST]],
        "logits": _logits(left, right, prompt) if whole else None,
    }
    settings = _settings(left, right) if whole else []
    result["settings"] = settings
    _show(result, differences)
    if beyond:
        what = f"{a} and {b} differ in {len(beyond)} of {len(names)} tensors, such as"
        raise Differs(f"{what} {beyond[0].name}", result, "the table above")
    if settings:
        what = f"{a} and {b} have the same tensors, and other models in config.json"
        raise Differs(f"{what}: {'; '.join(settings)}", result, "the config.json of the weights")
    if result["logits"] and not result["logits"]["alike"]:
        what = f"{a} and {b} have the same tensors and other logits on the prompt"
        raise Differs(what, result, "the same model.dtype and model.param_dtype on both sides")
    return result


def _settings(a: Side, b: Side) -> list[str]:
    """What config.json says otherwise on the two sides, of all that changes the maths."""
    values = [vars(side.config) | side.strange for side in (a, b)]
    return [
        f"{name} {values[0].get(name)} and {values[1].get(name)}"
        for name in {**values[0], **values[1]}
        if values[0].get(name) != values[1].get(name)
    ]


def _open(path: str, other: str) -> Side:
    if (Path(path) / "checkpoints").is_dir():
        return _run(path)
    if (Path(path) / adapter.CONFIG).is_file():
        return _adapter(path, other)
    folder = files.resolve(path)
    rows, config, strange = load.read_config_leniently(folder)
    if strange:
        say(f"warning: {path} has fields jaxtune does not know, which its logits here do without: "
            f"{', '.join(strange)}")  # fmt: skip
    tensors = by_canonical_name(files.tensors(folder), rows, config)

    def logits(tokens_BT: Any, dtype: str) -> Any:
        return load.load_model(str(folder), dtype, tuple(strange))(tokens_BT)

    has = tokenizer_files(str(folder))
    tokenizer = load_tokenizer(str(folder), config.vocab_size) if has else None
    return Side(path, tensors, rows, config, logits, tokenizer, strange=strange)


def _run(path: str) -> Side:
    run = open_run(path, quantized=False)  # exports are of the checkpoint's own weights
    rows, config = run.assembly.family, run.assembly.model
    leaves = jax.device_get(run.changes)
    tensors = by_canonical_name(merged(run.assembly.folder, rows, config, leaves), rows, config)

    def logits(tokens_BT: Any, dtype: str) -> Any:
        rows_BT = np.repeat(tokens_BT, run.mesh.size, axis=0)  # a batch is cut over the devices
        with jax.set_mesh(run.mesh):
            return run.model()(rows_BT)[:1]

    kind, held = run.config.model.dtype, run.config.model.param_dtype
    trained = single_layers(leaves)
    return Side(path, tensors, rows, config, logits, run.tokenizer, kind, held, trained)


def _adapter(path: str, other: str) -> Side:
    """A PEFT adapter, of the base that the other side's run has or that it names itself."""
    if (Path(other) / "checkpoints").is_dir():
        base = files.resolve(setup.read_config(Path(other)).model.path)
    else:
        settings = files.read_json(Path(path) / adapter.CONFIG)
        base = files.resolve(str(settings.get("base_model_name_or_path")))
    rows, config, _ = load.read_config_leniently(base)
    leaves = single_layers(adapter.open_adapter(Path(path), rows, config))
    return Side(path, leaves, rows, config, trained=leaves)


def _trained(side: Side, other: Side) -> Mapping[str, Readable]:
    if side.trained is None:
        raise ModelError(
            f"{other.name} is an adapter and {side.name} a whole checkpoint",
            fix="a run or an adapter beside an adapter, or jaxtune convert --adapter first",
        )
    return side.trained


def _logits(a: Side, b: Side, prompt: str) -> dict[str, Any] | None:
    """Both sides' logits on a prompt, computed in one dtype; None where the shapes differ."""
    size = min(a.config.vocab_size, b.config.vocab_size)
    tokenizer = a.tokenizer or b.tokenizer
    if tokenizer is None:
        say("neither side has a tokenizer: the prompt is the ids 0, 1, 2, ...")
    ids = range(16) if tokenizer is None else tokenizer.encode(prompt)
    tokens_BT = np.array([[i for i in ids if i < size]], np.int32)
    dtype = a.dtype or b.dtype or "float32"
    x, y = (np.asarray(side.logits(tokens_BT, dtype), np.float64) for side in (a, b) if side.logits)
    if x.shape != y.shape:
        return None
    kinds = [dtype, a.held, b.held, *(t.dtype for s in (a, b) for t in s.tensors.values())]
    step = max(float(jnp.finfo(k).eps) for k in kinds if jnp.issubdtype(k, jnp.floating))
    most = float(distance(x, y).max())
    largest = float(np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max())
    same = x.argmax(-1) == y.argmax(-1)
    return {
        "positions": same.size,
        "same_argmax": int(same.sum()),
        "most": most,
        "largest": largest,
        "alike": bool(most <= (16 * step + 1e-5) * largest),
    }


def _show(result: dict[str, Any], differences: list[Difference]) -> None:
    say(f"{result['tensors']} tensors, {result['differ']} differ, "
        f"{result['beyond_rounding']} by more than rounding")  # fmt: skip
    if differences:
        table = Table(title=f"the worst {len(result['worst'])}", title_justify="left")
        table.add_column("tensor", overflow="fold")
        table.add_column("difference", overflow="fold")
        for difference in differences[:_WORST]:
            table.add_row(difference.name, _said(difference))
        stderr.print(table)
    logits = result["logits"]
    if logits:
        say(
            f"logits on the prompt: largest difference {logits['most']:.3g} of "
            f"{logits['largest']:.3g}, the same best token at {logits['same_argmax']} of "
            f"{logits['positions']} positions"
        )


def _said(d: Difference) -> str:
    if d.what != "values":
        return f"shape {d.a} and {d.b}" if d.what == "shape" else f"{d.what}: {d.a}{d.b}"
    kinds = "" if d.a == d.b else f"; {d.a} and {d.b}"
    rounding = ", which is rounding" if d.rounding else ""
    return f"{d.count:,} values, by at most {d.most:.3g}{rounding}{kinds}"
