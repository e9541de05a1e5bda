"""Every setting, once: its type, its default, its unit and why.

A config file is a page of Python whose `get_config()` starts from `default_config()`. Flags
override it (`--config.optim.lr=1e-4`), and `freeze` turns the result into the frozen dataclasses
below at the door: nothing past `load` sees a ConfigDict. Unknown keys and wrong types stop here.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxtune import budget
from jaxtune.errors import ConfigError

if typing.TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # Hugging Face folder or hub id
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # frozen weights; trained are float32
    # What the backward pass recomputes of a layer (models/stacks.py); auto: as little as fits
    remat: Literal["auto", "none", "projections", "attention", "full", "offload"] = "auto"
    # How the frozen projections are kept; they are read from the checkpoint as it is
    quantize: Literal["none", "int8", "int4", "nf4", "fp8"] = "none"
    ignore: tuple[str, ...] = ()  # fields of config.json to disregard although they are unknown
    # Weight of the experts' load balancing loss; None is the checkpoint's own, as in transformers
    router_aux: float | None = None


@dataclass(frozen=True)
class LoraConfig:
    r: int = 16  # rank; 0 is full fine-tuning
    alpha: float = 32.0  # scale is alpha / r, or alpha / sqrt(r) with use_rslora
    dropout: float = 0.0  # on the adapter's input, in training only
    target_modules: str | tuple[str, ...] = "all-linear"  # PEFT: names, one regex, or all-linear
    layers_to_transform: tuple[int, ...] = ()  # layer numbers; empty is all
    modules_to_save: tuple[str, ...] = ()  # modules trained in full beside the adapters
    # (pattern, value) of modules with their own rank or alpha; matched as PEFT: (.*\.)?(pattern)$
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_rslora: bool = False  # arXiv 2312.03732
    use_dora: bool = False  # trains each output's magnitude apart (arXiv 2402.09353)
    init: str = "default"  # or a PEFT adapter folder to go on from
    plus_ratio: float = 1.0  # LoRA+ (arXiv 2402.12354): learning rate of B over that of A


@dataclass(frozen=True)
class DataConfig:
    # A path, a hub id, or [{"path":, "weight":, "format":, "split":, "columns":, "name":}, ...]
    train: str | tuple[Any, ...] = ""
    eval: str | tuple[Any, ...] = ""  # the same; empty takes eval_fraction of train
    eval_fraction: float = 0.0  # of the training rows, when `eval` is empty
    max_length: int = 1024  # tokens a row
    packing: bool = True  # several documents a row, kept apart by segment ids
    shuffle: bool = True
    completion_only: bool = True  # train on answers only; plain text is always trained in full
    template: str = ""  # jinja file, or plain or chatml: replaces the tokenizer's chat template
    too_long: Literal["drop", "cut", "split"] = "cut"  # rows over max_length; pretrain splits
    labels: tuple[str, ...] = ()  # classes in order; empty takes the checkpoint's or the data's
    skip_bad_rows: int = 0  # unreadable rows to tolerate; 0 stops at the first


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 0  # optimizer steps; 0 counts from epochs
    epochs: float = 3.0  # used when steps is 0
    batch_size: int = 16  # rows a step over all devices
    grad_accum: int = 1  # micro-batches a step; each has batch_size / grad_accum rows
    # "8h", "64 chip-hours" or "500M tokens": fewer steps where there is no time for all of them
    budget: str = ""
    seed: int = 0
    label_smoothing: float = 0.0  # arXiv 1512.00567, in training only: scores are without
    log_every: int = 10  # steps between lines of metrics.jsonl
    tensorboard: bool = True
    wandb: str = ""  # Weights & Biases project; empty is off


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    lr: float | None = None  # peak; None is 2e-4 for LoRA and 2e-5 for full fine-tuning
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    end_ratio: float = 0.1  # last learning rate over the peak
    warmup: int | float = 0.03  # steps (int) or fraction of the run (float)
    weight_decay: float = 0.0  # never on norms and biases
    clip_norm: float = 1.0  # global norm over the trained parameters; 0 is off
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    rules: tuple[tuple[str, str], ...] = ()  # (regex on parameter paths, "freeze" or "train")


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # steps; 0 evaluates at the start and the end only
    patience: int = 0  # evaluations without a better loss before stopping; 0 is off


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps
    keep: int = 2  # newest checkpoints kept
    best: bool = True  # also keep the one with the lowest evaluation loss


# What may differ between the trials of a sweep that train in one program.
VARIES = (
    "optim.lr", "optim.weight_decay", "optim.b1", "optim.b2", "optim.eps", "optim.warmup",
    "optim.clip_norm", "optim.end_ratio", "optim.schedule",
    "lora.r", "lora.alpha", "lora.dropout", "lora.plus_ratio", "lora.use_rslora",
    "lora.target_modules", "lora.layers_to_transform",
    "train.seed", "train.batch_size", "train.epochs", "train.steps", "train.label_smoothing",
)  # fmt: skip


@dataclass(frozen=True)
class SweepConfig:
    """`jaxtune sweep`; a plain training does not look at it."""

    # {"optim.lr": log(1e-5, 3e-3), "lora.r": choice(4, 8, 16)}; empty is the default space
    # What is no axis goes on to the sweep as it is, which names its key
    space: tuple[tuple[str, tuple[Any, ...] | Any], ...] = ()
    trials: int = 16  # 0: as many as the budget has room for
    sampler: str = "tpe"  # or random, grid, or a sampler class by name, "package.module.Class"
    budget: str = ""  # of the whole search, "24h", "64 chip-hours", "500M tokens"; empty: none
    rungs: int = 3  # how often trials are compared, the end of the training included
    eta: int = 4  # one in eta goes on to the next rung, which is eta times as long
    population: int = 0  # trials trained at once; 0 is as many as fit and pay
    data_fraction: float = 1.0  # training rows that all but the finalists see
    max_length: int = 0  # tokens a row for all but the finalists; 0 is data.max_length
    finalists: int = 2  # trials trained to the end; early leaders are not always the best
    repeats: int = 3  # seeds that winner and defaults are trained with to tell gain from noise
    storage: str = ""  # database URL or journal file of the study; empty is sweep.db in the workdir
    prior: tuple[str, ...] = ()  # storages of earlier studies to learn from
    seed: int = 0  # of the sampler


@dataclass(frozen=True)
class MeshConfig:
    trial: int = 1  # parts of a sweep's population; no collective crosses them
    slices: int = 0  # TPU slices joined by a slower network, a copy of the model each; 0: as found
    data: int = 1  # copies of the model
    fsdp: int = -1  # shards of weights and batch; -1 is all remaining devices
    expert: int = 1  # shards of a mixture's experts; they share out the batch as fsdp does
    context: int = 1  # parts of each row, for rows too long for one device
    tensor: int = 1  # shards of each matrix


@dataclass(frozen=True)
class Config:
    task: Literal["sft", "pretrain", "classify"] = "sft"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON."""
        return dataclasses.asdict(self)


def default_config() -> Any:
    """The defaults as a locked ml_collections.ConfigDict, for config files to start from."""
    from ml_collections import ConfigDict

    # Types are checked in `freeze`, where unions are known; ConfigDict would refuse tuple for str.
    values = Config().to_dict()
    # sweep.space is a dict whose keys have dots in them, which ConfigDict would make fields of.
    values["sweep"] = ConfigDict(values["sweep"], type_safe=False, convert_dict=False)
    return ConfigDict(values, type_safe=False).lock()


def log(low: float, high: float) -> tuple[Any, ...]:
    """Of sweep.space: any number between the two, each factor as likely as another."""
    return ("log", low, high)


def uniform(low: float, high: float) -> tuple[Any, ...]:
    """Of sweep.space: any number between the two."""
    return ("uniform", low, high)


def choice(*values: Any) -> tuple[Any, ...]:
    """Of sweep.space: one of these."""
    return ("choice", *values)


def load(file: str, overrides: dict[str, str]) -> Config:
    """Runs `get_config` of a config file, applies `{"optim.lr": "1e-4"}`-style overrides, freezes.

    Raises:
      ConfigError: for a file that is missing or broken, an unknown key or a wrong type.
    """
    values = _run_config_file(file).to_dict()
    for key, text in overrides.items():
        *parents, leaf = key.split(".")
        node, annotation = values, Config
        for name in parents:
            annotation = _field_type(annotation, name, key)
            node = node[name]
        annotation = _field_type(annotation, leaf, key)
        if dataclasses.is_dataclass(annotation):
            raise ConfigError(
                f"--config.{key} is a group of settings, not a value",
                fix=f"--config.{key}.{dataclasses.fields(annotation)[0].name}=...",
            )
        node[leaf] = _parse(text, annotation, key)
    return freeze(values)


def freeze(values: dict[str, Any]) -> Config:
    """Nested dict -> validated `Config`. Raises ConfigError for unknown keys and wrong types."""
    config = _freeze(values, Config, "")
    _check_values(config)
    return config


def replaced(config: Config, changes: dict[str, Any]) -> Config:
    """The config with dotted settings changed, {"train.grad_accum": 2}."""
    for key, value in changes.items():
        group, name = key.split(".")
        part = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: part})
    return config


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _freeze(values: Any, annotation: Any, path: str) -> Any:
    if not dataclasses.is_dataclass(annotation):
        return _coerce(values, annotation, path)
    if not isinstance(values, dict):
        raise ConfigError(f"config.{path} is {values!r}, not a group of settings", fix="a dict")
    for name in values:
        _field_type(annotation, name, f"{path}.{name}".strip("."))
    hints = typing.get_type_hints(annotation)
    return annotation(  # type: ignore[operator]  # is_dataclass does not narrow to a class
        **{
            name: _freeze(value, hints[name], f"{path}.{name}".strip("."))
            for name, value in values.items()
        }
    )


def _field_type(annotation: Any, name: str, key: str) -> Any:
    names = typing.get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
    if name in names:
        return names[name]
    close = difflib.get_close_matches(name, names, n=1)
    if not close:  # the right name under the wrong group, such as optim.batch_size
        close = [k for k in _all_keys() if k.split(".")[-1] == name][:1]
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(names) or 'none'}"
    else:
        hint = f"did you mean {key.replace(name, close[0], 1)}?"
    raise ConfigError(f"unknown config key {key!r}", fix=hint)


def _all_keys() -> list[str]:
    return [
        f"{group.name}.{leaf.name}"
        for group in dataclasses.fields(Config)
        if dataclasses.is_dataclass(kind := typing.get_type_hints(Config)[group.name])
        for leaf in dataclasses.fields(kind)
    ]


def _coerce(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the annotated type, or ConfigError. int passes as float; lists become tuples."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
        close = difflib.get_close_matches(str(value), map(str, args), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"config.{path} is {value!r}", fix=f"{hint}one of {', '.join(map(repr, args))}"
        )
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option, path)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, dict):
        return _coerce(tuple(value.items()), annotation, path)  # of settings that are pairs
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_coerce(v, k, path) for v, k in zip(value, kinds, strict=True))
    elif annotation is type(None) and value is None:
        return None
    elif annotation is float and type(value) in (int, float):
        return float(value)
    elif type(value) is annotation:
        return value
    raise ConfigError(f"config.{path} is {value!r}", fix=f"a value of type {_spell(annotation)}")


def _spell(annotation: Any) -> str:
    return str(
        getattr(annotation, "__name__", annotation)
        if not typing.get_args(annotation)
        else annotation
    )


def _parse(text: str, annotation: Any, key: str) -> Any:
    """Flag text -> value: JSON where it is JSON of the right type, else the text, else a list."""
    parts = [part for part in text.split(",") if part]
    for candidate in (_literal(text), text, [_literal(part) for part in parts], parts):
        try:
            return _coerce(candidate, annotation, key)
        except ConfigError:
            continue
    return _coerce(_literal(text), annotation, key)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def _run_config_file(file: str) -> "ConfigDict":
    """Runs the user's own page of Python; `file.py:arg` passes arg to its get_config."""
    path, _, argument = file.partition(".py:")
    path = Path(path + ".py" if argument else path)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist", fix="configs/lora.py")
    spec = importlib.util.spec_from_file_location("jaxtune_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {str(path)!r} is not Python", fix="a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's page raises is a config error with its text
        raise ConfigError(
            f"config file {str(path)!r} failed: {type(error).__name__}: {error}",
            fix="mend get_config() in it",
        ) from error


def _check_values(config: Config) -> None:
    """Values no type can rule out."""
    for key, text in {
        "train.budget": config.train.budget,
        "sweep.budget": config.sweep.budget,
    }.items():
        budget.parse(text, key)
    positive = {
        "data.max_length": config.data.max_length,
        "train.batch_size": config.train.batch_size,
        "train.grad_accum": config.train.grad_accum,
        "train.log_every": config.train.log_every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "lora.plus_ratio": config.lora.plus_ratio,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"config.{key} is {value}", fix="a number above 0")
    if config.train.steps < 0 or (config.train.steps == 0 and config.train.epochs <= 0):
        raise ConfigError("nothing to train", fix="train.steps or train.epochs above 0")
    if config.train.batch_size % config.train.grad_accum:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} does not divide by "
            f"train.grad_accum {config.train.grad_accum}",
            fix="a batch_size that is a multiple of grad_accum",
        )
    if config.lora.r < 0 or not 0 <= config.lora.dropout < 1:
        raise ConfigError(
            f"lora.r is {config.lora.r}, lora.dropout is {config.lora.dropout}",
            fix="r of 0 or more, dropout in [0, 1)",
        )
    if not 0 <= config.data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction is {config.data.eval_fraction}", fix="in [0, 1)")
    optim = config.optim
    ranges = {  # value, least, most; both may be reached
        "optim.lr": (1.0 if optim.lr is None else optim.lr, 0.0, math.inf),
        "optim.end_ratio": (optim.end_ratio, 0.0, 1.0),
        "train.label_smoothing": (config.train.label_smoothing, 0.0, 0.9999999),
        "optim.warmup": (optim.warmup, 0, math.inf if isinstance(optim.warmup, int) else 1.0),
        "optim.weight_decay": (optim.weight_decay, 0.0, math.inf),
        "optim.clip_norm": (optim.clip_norm, 0.0, math.inf),
        "optim.b1": (optim.b1, 0.0, 0.9999999),
        "optim.b2": (optim.b2, 0.0, 0.9999999),
        "optim.eps": (optim.eps, 0.0, 1.0),
        "eval.every": (config.eval.every, 0, math.inf),
        "eval.patience": (config.eval.patience, 0, math.inf),
        "data.skip_bad_rows": (config.data.skip_bad_rows, 0, math.inf),
        "sweep.trials": (config.sweep.trials, 0, math.inf),
        "sweep.rungs": (config.sweep.rungs, 1, math.inf),
        "sweep.eta": (config.sweep.eta, 2, math.inf),
        "sweep.population": (config.sweep.population, 0, math.inf),
        "sweep.data_fraction": (config.sweep.data_fraction, 1e-6, 1.0),
        "sweep.max_length": (config.sweep.max_length, 0, math.inf),
        "sweep.finalists": (config.sweep.finalists, 1, math.inf),
        "sweep.repeats": (config.sweep.repeats, 0, math.inf),
    }
    for key, (value, least, most) in ranges.items():
        if not least <= value <= most:
            limits = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise ConfigError(f"config.{key} is {value}", fix=limits)
