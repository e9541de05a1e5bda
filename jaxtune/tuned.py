"""A workdir, opened again: score it, write with it, export it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.table import Table

from jaxtune import assemble, bucket, checkpoint, decoding, pods, setup, sharding, tree
from jaxtune.assemble import Assembly
from jaxtune.config import Config, MeshConfig, replaced
from jaxtune.console import say, stderr
from jaxtune.data import audit, pipeline, templates
from jaxtune.errors import ConfigError, StorageError
from jaxtune.hf import adapter as peft
from jaxtune.hf import export as merged
from jaxtune.hf import files
from jaxtune.hf import tokenizer as tokenizers
from jaxtune.models.blocks import LayerConfig
from jaxtune.scoring import Score
from jaxtune.scoring import evaluate as score
from jaxtune.step import Program, jit_eval

FORMATS = ("hf", "peft", "serve")


class Tuned(NamedTuple):
    """A run's model at one checkpoint."""

    config: Config
    assembly: Assembly
    mesh: Mesh
    program: Program
    step: int
    trainable: dict[str, jax.Array]
    base: dict[str, jax.Array]  # the same leaves of the base model
    frozen: dict[str, jax.Array]
    tokenizer: Any
    template: str | None

    @property
    def changes(self) -> dict[str, jax.Array]:
        """All that sets the model apart from its base's files: also what a rule froze of it."""
        return self.trainable | {
            path: leaf
            for path, leaf in self.frozen.items()
            if ".lora." in path or path in self.assembly.new
        }

    def model(self, *, base: bool = False):
        """The decoder as a flax module."""
        leaves = self.base if base else self.trainable
        return tree.merge(self.program.graphdef, {**self.frozen, **leaves})


def open_run(workdir: str | Path, step: int | None = None, *, quantized: bool = True) -> Tuned:
    """The model of a workdir at `step`, by default the best evaluated, else the newest.

    Without `quantized` a quantised base is as the checkpoint has it, which is what exports hold.

    Raises:
      ConfigError: no run in that folder.
      StorageError: no checkpoint that verifies.
    """
    workdir = bucket.folder(workdir)
    with bucket.reaching(workdir):
        config = setup.read_config(workdir)
    if not quantized:
        config = replaced(config, {"model.quantize": "none"})
    folder = files.resolve(config.model.path)
    mesh = _mesh(config)
    assembly = assemble.assemble(config, folder, mesh)
    program = setup.program(config, assembly, max(config.train.steps, 1))
    state, frozen = setup.initial(config, assembly, program, mesh)
    where = workdir / "checkpoints"
    restored = _restore(where, setup.abstract(state), step, config.checkpoint.best)
    if restored is None:
        raise ConfigError(f"{workdir} holds no checkpoint yet", fix="jaxtune train in it first")
    for line in restored.skipped:
        say(f"skipped a damaged checkpoint: {line}")
    tokenizer = tokenizers.load_tokenizer(str(folder), assembly.model.vocab_size)
    return Tuned(
        config,
        assembly,
        mesh,
        program,
        restored.step,
        restored.state.trainable,
        _untuned(config, assembly, state.trainable, frozen),
        frozen,
        tokenizer,
        templates.chat_template(tokenizer, config.data.template),
    )


def _mesh(config: Config) -> Mesh:
    """The run's mesh, or on another machine the default one."""
    wanted = config.mesh
    if wanted.context > 1:  # texts are written a token at a time
        wanted = dataclasses.replace(wanted, context=1, data=wanted.data * wanted.context)
    try:
        return sharding.make_mesh(wanted)
    except ConfigError:
        mesh = sharding.make_mesh(MeshConfig())
        say(f"the run's mesh does not fit here: {mesh.size} device(s) share the model instead")
        return mesh


def _untuned(
    config: Config,
    assembly: Assembly,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The trained leaves with which the model is its base, whatever adapter the run began from."""
    lengths = setup.magnitudes(config, assembly, {**frozen, **trainable})
    zeros = {k: jnp.zeros_like(v) for k, v in trainable.items() if k.endswith(".lora.B")}
    return {k: v for k, v in {**trainable, **lengths, **zeros}.items() if k in trainable}


def _restore(
    where: Path, abstract: Any, step: int | None, best: bool
) -> checkpoint.Restored | None:
    """`step`, else the best evaluated, else (also when that one is damaged) the newest."""
    chosen = checkpoint.best_step(where) if step is None and best else step
    try:
        return checkpoint.restore(where, abstract, chosen)
    except StorageError as error:
        if step is not None or chosen is None:
            raise
        say(f"the best checkpoint cannot be used, taking the newest that can: {error.what}")
        return checkpoint.restore(where, abstract)


def evaluate(
    workdir: str | Path, *, data: str | None = None, step: int | None = None
) -> dict[str, Any]:
    """Scores of the base and of the tuned model on the run's evaluation rows, or those of `data`.

    Returns {"task", "step", "rows", "base": {loss, perplexity, accuracy, tokens}, "tuned": {...}}.
    """
    tuned = open_run(workdir, step)
    config = tuned.config
    config = setup.within_positions(config, tuned.assembly.model)
    if data is not None:
        only = dataclasses.replace(config.data, train=data, eval="", eval_fraction=0.0)
        config = dataclasses.replace(config, data=only)
    prepared = pipeline.prepare(
        config, tuned.tokenizer, say, setup.form(tuned.assembly.folder, tuned.assembly.model)
    )
    rows = prepared.eval if data is None else prepared.train
    if rows is None:
        raise ConfigError("the run has no evaluation rows", fix="--data=FILE")
    eval_step = jit_eval(tuned.program)

    def scored(leaves: dict[str, jax.Array]) -> dict[str, Any]:
        size = config.train.batch_size
        batches = pipeline.eval_batches(rows, size, sharding.local_rows(tuned.mesh, size))
        with jax.set_mesh(tuned.mesh):
            placed = setup.to_mesh(batches, tuned.mesh, size)
            return score(eval_step, leaves, tuned.frozen, placed)._asdict()

    return {
        "task": config.task,
        "step": tuned.step,
        "rows": len(rows),
        "base": scored(tuned.base),
        "tuned": scored(tuned.trainable),
    }


def show_scores(scores: dict[str, Any]) -> None:
    """The scores as a table on stderr."""
    rows = scores["task"] == "classify"
    counted = f"{scores['base']['tokens']:,} {'rows' if rows else 'tokens that count'}"
    table = Table(title=f"step {scores['step']}, {counted}")
    columns = ("", "loss", "accuracy") if rows else ("", "loss", "perplexity", "token accuracy")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name in ("base", "tuned"):
        one = Score(**scores[name])
        perplexity = () if rows else (f"{one.perplexity:.3f}",)
        table.add_row(name, f"{one.loss:.4f}", *perplexity, f"{one.accuracy:.1%}")
    stderr.print(table)


def generate(
    workdir: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    base: bool = False,
    step: int | None = None,
) -> list[str]:
    """What the tuned model writes after each prompt; `chat` makes each a user's turn first.

    Raises:
      ConfigError: the run trains a classifier.
    """
    tuned = open_run(workdir, step)
    if tuned.config.task == "classify":
        raise ConfigError(f"{workdir} is a classifier, which writes no text", fix="jaxtune eval")
    turns = [[{"role": "user", "content": text}] if chat else text for text in prompts]
    with jax.set_mesh(tuned.mesh):
        return decoding.complete(
            tuned.model(base=base),
            tuned.tokenizer,
            turns,
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizers.stop_ids(
                tuned.tokenizer, _generation_config(tuned.assembly.folder)
            ),
            template=tuned.template,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return files.read_json(file) if file.is_file() else {}


def export(
    workdir: str | Path, out: str | Path, *, format: str = "hf", step: int | None = None
) -> dict[str, Any]:
    """Writes a Hugging Face folder, read back to verify.

    Formats: `hf` the merged model; `peft` the adapter; `serve` the adapter where inference servers
    take it, else the merged model. What PEFT cannot hold is merged as well, with a line why.

    Raises:
      ConfigError: an unknown format, `out` is not empty, or full fine-tuning asked for as peft.
      Failure: see `write_merged` and `write_adapter`; nothing is left in `out`.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known", fix=f"of {', '.join(FORMATS)}")
    if bucket.is_bucket(out):
        raise ConfigError(
            f"{out} is in a bucket, and an export is read back from a disk",
            fix=f"--out=DIR, then gcloud storage cp -r DIR {out}",
        )
    tuned = open_run(workdir, step)
    config, assembly = tuned.config, tuned.assembly
    leaves = pods.gather(tuned.changes)
    format = _format(config, assembly.model, leaves, format)
    if not pods.is_first():
        return {"format": format, "step": tuned.step, "out": str(out)}
    common = (Path(out), assembly.folder, assembly.family, assembly.model, leaves)
    if format == "hf":
        if assembly.quantized:
            say(
                f"trained on {config.model.quantize} weights, merged into those of "
                f"{assembly.folder} as they are there"
            )
        template = (tuned.template or "") if config.data.template else ""
        written = merged.write_merged(
            *common,
            chat_template=template,
            labels=config.data.labels,
            pad_token=_pad_token(tuned.tokenizer) if config.data.labels else None,
        )
    else:
        written = peft.write_adapter(*common, lora=config.lora, base_name=config.model.path)
    return {"format": format, "step": tuned.step, "out": str(out), **written._asdict()}


def _pad_token(tokenizer: Any) -> int | None:
    """What transformers may pad a classifier's rows with, when nothing is meant for it.

    It reads the last token that is another one, so not the token that ends every row.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    ended = tokenizer("a")["input_ids"][-1:]
    return next((i for i in sorted(tokenizer.all_special_ids) if [i] != ended), None)


def _format(config: Config, model: LayerConfig, leaves: Mapping[str, Any], format: str) -> str:
    """`hf` or `peft`: what is asked for, as far as the adapter can be had in it."""
    if format == "hf" or config.lora.r == 0:
        return "hf" if format == "serve" else format
    refused = peft.refused_by_servers(config.lora, leaves)
    if model.experts and any(".mlp." in path for path in leaves):
        say(
            f"merged instead of {format}: PEFT's versions write adapters beside experts differently"
        )
        return "hf"
    if refused and format == "serve":
        say(f"merged instead of an adapter: {refused}, which inference servers do not take")
        return "hf"
    if refused:
        say(f"inference servers such as vLLM do not take this adapter: {refused}; --format=hf")
    return "peft"


def show_data(config: Config) -> dict[str, Any]:
    """Shows on stderr what the model will see; returns the same as JSON values."""
    folder = files.resolve(config.model.path)
    _, model = assemble.describe(config, folder)
    config = setup.within_positions(config, model)
    tokenizer = tokenizers.load_tokenizer(str(folder), model.vocab_size)
    prepared = pipeline.prepare(config, tokenizer, say, setup.form(folder, model))
    audit.show(prepared, tokenizer, stderr)
    return audit.as_json(prepared)
