"""Who is trained, and how: path rules -> labels -> optax.multi_transform.

Every number is traced and lives in the optimizer state (`optax.inject_hyperparams`), so a change of
value never recompiles and a population of runs differs only in its state.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from jaxtune import tree
from jaxtune.config import Config, LoraConfig, OptimConfig
from jaxtune.errors import ConfigError

FROZEN = "frozen"
LORA_LR, FULL_LR = 2e-4, 2e-5  # defaults by method; LoRA wants about ten times more

SCHEDULES = ("constant", "linear", "cosine", "wsd")

# Group of a trained leaf by its path; the first match wins.
_GROUPS = (
    (r"\.lora\.A$", "adapter_a"),
    (r"\.lora\.B$", "adapter_b"),
    (r"\.lora\.magnitude$", "adapter_magnitude"),
    (r"\.scale$", "norm"),
    (r"\.bias$", "bias"),
    (r"^embed_(tokens|positions|types)\.", "embedding"),
    (r"^(lm_head|score|classifier)\.", "head"),
    (r"\.kernel$", "kernel"),
    (r"\.router\.weight$", "router"),
)
# Decay of DoRA's magnitudes would shrink the base's own weights, as that of a norm would.
_NO_DECAY = {"norm", "bias", "adapter_magnitude"}


def labels(
    paths: Iterable[str],
    lora: LoraConfig,
    optim: OptimConfig,
    heads: Collection[str] = (),
    names: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """{path of one layer's leaf: its optimizer group, or "frozen"}.

    `optim.rules` come first; then LoRA trains adapters, modules_to_save and `heads`, full
    fine-tuning all.

    Args:
      heads: paths of a classifier's leaves that are trained in full beside adapters.
      names: {path: Hugging Face tensor}; modules_to_save go by these names, or ours.

    Raises:
      ConfigError: a rule that decides nothing, an unknown verb, a module to save that is not there,
        or nothing left to train.
    """
    paths = list(paths)
    for pattern, verb in optim.rules:
        if verb not in ("freeze", "train"):
            raise ConfigError(f"optim.rules {pattern!r} -> {verb!r}", fix="freeze or train")
    full = set(heads)
    for name in lora.modules_to_save:
        saved = {p for p in paths if _in_module(name, p) or _in_module(name, names.get(p, ""))}
        if not saved:
            parts = sorted({path.split(".")[-2] for path in paths if ".lora." not in path})
            raise ConfigError(
                f"lora.modules_to_save {name!r} is no module of this model",
                fix=f"of {', '.join(parts)} (a tied head is embed_tokens)",
            )
        full |= saved
    rest = ((r"\.lora\.", "train"), (".", "freeze")) if lora.r else ((".", "train"),)
    exact = rf"^({'|'.join(map(re.escape, sorted(full)))})$"
    verbs = tree.label(paths, optim.rules, ((exact, "train"), *rest))
    # The scale of an adapter is a constant, whatever a rule says.
    verbs |= {path: "freeze" for path in paths if path.endswith(".lora.scale")}
    groups = tree.label(paths, (), _GROUPS)
    result = {p: groups[p] if verbs[p] == "train" else FROZEN for p in paths}
    if set(result.values()) <= {FROZEN}:
        raise ConfigError("every parameter is frozen", fix="an optim.rules entry that trains some")
    return result


def _in_module(module: str, name: str) -> bool:
    return ".lora." not in name and f".{module}." in f".{name}"


def peak_lr(config: Config) -> float:
    """optim.lr, or the default of the method."""
    if config.optim.lr is not None:
        return config.optim.lr
    return LORA_LR if config.lora.r else FULL_LR


def share_of_peak(schedule, count, warmup, steps, end_ratio) -> jax.Array:
    """Learning rate over its peak at step `count` (0 is the first): warm-up, then decay.

    The first step already learns: warm-up reaches the peak at step `warmup`. wsd is
    warm-up-stable-decay (arXiv 2404.06395), which decays linearly over the last fifth.

    Args:
      schedule: its place in SCHEDULES, which may be traced as all the others.
    """
    count, warmup, steps = (jnp.asarray(x, jnp.float32) for x in (count, warmup, steps))
    rise = jnp.minimum(1.0, (count + 1) / (warmup + 1))
    done = jnp.clip((count - warmup) / jnp.maximum(steps - warmup, 1), 0.0, 1.0)
    falls = {
        "constant": jnp.zeros_like(done),
        "linear": done,
        "cosine": 0.5 * (1 - jnp.cos(jnp.pi * done)),
        "wsd": jnp.clip((done - 0.8) / 0.2, 0.0, 1.0),
    }
    which = jnp.asarray(schedule, jnp.int32)
    fall = jax.lax.select_n(which, *(falls[name] for name in SCHEDULES))
    return rise * (1 - fall * (1 - end_ratio))


def hyperparameters(config: Config, steps: int) -> dict[str, float]:
    """Everything a run may vary without recompiling, in the units of the config."""
    optim = config.optim
    warmup = optim.warmup if isinstance(optim.warmup, int) else optim.warmup * steps
    return {
        "lr": peak_lr(config),
        "schedule": float(SCHEDULES.index(optim.schedule)),
        "warmup": float(warmup),
        "steps": float(steps),
        "end_ratio": optim.end_ratio,
        "weight_decay": optim.weight_decay,
        "clip_norm": optim.clip_norm or float("inf"),
        "b1": optim.b1,
        "b2": optim.b2,
        "eps": optim.eps,
        "plus_ratio": config.lora.plus_ratio,
        "dropout": config.lora.dropout,
        "label_smoothing": config.train.label_smoothing,
    }


def make(config: Config, groups: Mapping[str, str], steps: int) -> optax.GradientTransformation:
    """The optimizer of the trained leaves, whose groups are `{path: group}`.

    Clipping sees the trained leaves only: a norm over frozen ones would keep their gradients alive.
    """

    def build(lr, schedule, warmup, steps, end_ratio, weight_decay, clip_norm, b1, b2, eps,
              plus_ratio, dropout, label_smoothing) -> optax.GradientTransformation:  # fmt: skip
        del dropout, label_smoothing  # train_step reads them from the state

        def rate(count):
            return lr * share_of_peak(schedule, count, warmup, steps, end_ratio)

        def group(name: str) -> optax.GradientTransformation:
            decay = 0.0 if name in _NO_DECAY else weight_decay
            ratio = plus_ratio if name == "adapter_b" else 1.0
            return optax.chain(
                _direction(config.optim.name, name, b1, b2, eps),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(lambda count: rate(count) * ratio),
            )

        present = sorted(set(groups.values()) - {FROZEN})
        return optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.multi_transform({name: group(name) for name in present}, dict(groups)),
        )

    return optax.inject_hyperparams(build)(**hyperparameters(config, steps))


def learning_rate(state) -> jax.Array:
    """The rate of the next update, from the state `make` keeps."""
    hyper = state.hyperparams
    fall = (hyper["warmup"], hyper["steps"], hyper["end_ratio"])
    return hyper["lr"] * share_of_peak(hyper["schedule"], state.count, *fall)


def _direction(name: str, group: str, b1, b2, eps) -> optax.GradientTransformation:
    """Gradient -> direction of descent, before decay and learning rate."""
    if name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if name == "lion":
        return optax.scale_by_lion(b1, b2)
    if name == "muon" and group in ("kernel", "adapter_a", "adapter_b"):
        return optax.contrib.scale_by_muon(
            beta=b1, eps=eps, weight_dimension_numbers=_stacked_matrices
        )
    return optax.scale_by_adam(b1, b2, eps)


def _stacked_matrices(params):
    """Muon's axes of [L, I, O] kernels: reduce I, produce O, one matrix a layer."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda _: numbers, params)
