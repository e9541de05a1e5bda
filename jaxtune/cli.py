"""The command line: verbs, flags, one line per failure.

Heavy imports wait for the verb that needs them, so that --help answers at once.
"""

import argparse
import difflib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxtune import __version__, flags
from jaxtune.errors import ConfigError, Failure

_BEGAN = time.monotonic()  # what a budget of time counts from

_EPILOG = """\
config overrides: --config.KEY=VALUE, such as --config.optim.lr=1e-4 --config.train.epochs=2

first runs:
  make quickstart                    (or: python -m jaxtune.demo)
  jaxtune train --config=configs/lora.py --config.model.path=FOLDER_OR_HUB_ID \\
                --config.data.train=rows.jsonl --workdir=runs/mine
  jaxtune export --workdir=runs/mine --format=hf --out=mine-merged
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, fix=f"{self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code of DESIGN's contract (0, 2, 65, 70, 74, 75, 76, 130)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    flags.apply()
    try:
        args, overrides = _parse(arguments)
        result = _run(args, overrides)
    except Failure as error:
        return _fail(error.line(), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("jaxtune: error[cancelled]: interrupted; try: the same command", 130, debug)
    except BrokenPipeError:  # the reader of stdout has gone, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        name = type(error).__name__
        text = " ".join(str(error).split())[:500]
        return _fail(f"jaxtune: error[internal]: {name}: {text}; try: --debug", 70, debug)
    if args.json and result is not None:
        print(json.dumps(result))
    return 0


def _run(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any] | None:
    """Runs a verb, on a pod on all of its hosts; None where another one has the result."""
    if args.run not in (_train, _eval, _generate, _export):
        return args.run(args, overrides)
    from jaxtune import pods

    pods.start()
    with pods.together():
        result = args.run(args, overrides)
        return result if pods.is_first() else None


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    pods = sys.modules.get("jaxtune.pods")  # only if the verb has got that far
    return pods.end(code) if pods else code


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _Parser(
        prog="jaxtune",
        description="Fine-tune language models with JAX.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxtune {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    for name, (run, about, own) in _VERBS.items():
        verb = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        verb.set_defaults(run=run)
        for flag, options in (own | _COMMON).items():
            verb.add_argument(flag, **options)
    args, rest = parser.parse_known_args(arguments)
    return args, _overrides(rest, [*_VERBS], hasattr(args, "config"))


def _overrides(rest: list[str], verbs: list[str], takes_config: bool) -> dict[str, str]:
    """["--config.a.b=1", "--config.c", "2"] -> {"a.b": "1", "c": "2"}; the rest is an error."""
    overrides: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not takes_config or not word.startswith("--config."):
            close = difflib.get_close_matches(word, ["--config", "--workdir", *verbs], n=1)
            raise ConfigError(
                f"unknown argument {word!r}",
                fix=f"did you mean {close[0]}?" if close else "jaxtune VERB --help",
            )
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{word} has no value", fix=f"{word}=VALUE")
        overrides[key] = value
    return overrides


def _config(args: argparse.Namespace, overrides: dict[str, str]):
    from jaxtune import config

    if not args.config:
        raise ConfigError("no config file", fix="--config=configs/lora.py")
    return config.load(args.config, overrides)


def _train(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    config = _config(args, overrides)
    from jaxtune import cores, heap

    cores.share(config)  # both before jax starts its threads
    heap.keep_freed()
    heap.pause_collector()
    from jaxtune.console import say
    from jaxtune.train import fit

    result = fit(config, _workdir(args), clock=lambda: time.monotonic() - _BEGAN)
    if result["loss_before"] is not None:
        say(f"evaluation loss {result['loss_before']:.4f} -> {result['loss_after']:.4f}")
    say(f"done: {result['steps']} steps in {args.workdir}; next: "
        f"jaxtune export --workdir={args.workdir} --format=hf --out=DIR")  # fmt: skip
    return result


def _sweep(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    budget = {} if args.budget is None else {"sweep.budget": args.budget}
    config = _config(args, overrides | budget)
    from jaxtune import cores, heap

    if not args.ray:  # whose nodes do it for themselves
        cores.share(config, search=True)  # both before jax starts its threads
    heap.keep_freed()
    from jaxtune.console import say

    if args.ray:
        from jaxtune.sweep import cluster

        result = cluster.search(config, _workdir(args), args.ray)
    else:
        from jaxtune.sweep.command import search

        result = search(config, _workdir(args), clock=lambda: time.monotonic() - _BEGAN)
    if "best" in result:
        verdict = result["repeats"]["verdict"]
        if verdict != "unknown":
            say(f"beside the defaults with other seeds: {verdict}")
        say(f"done: held-out loss {result['loss']:.4f} in {result['best']}; again with "
            f"jaxtune train --config={result['config']} --workdir=DIR")  # fmt: skip
    return result


def _eval(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    from jaxtune.tuned import evaluate, show_scores

    scores = evaluate(_workdir(args), data=args.data, step=args.step)
    show_scores(scores)
    return scores


def _generate(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    from jaxtune import pods
    from jaxtune.tuned import generate

    if (args.prompt is None) == (args.prompts is None):
        raise ConfigError(
            "either --prompt or --prompts is needed",
            fix="--prompt=TEXT, as often as you like, or --prompts=FILE (a line each)",
        )
    prompts = args.prompt or _lines(Path(args.prompts))
    texts = generate(
        _workdir(args),
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        chat=args.chat,
        base=args.base,
        step=args.step,
    )
    if not args.json and pods.is_first():
        print("\n".join(texts))
    return {"prompts": prompts, "texts": texts}


def _export(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    from jaxtune.console import say
    from jaxtune.tuned import export

    if not args.out:
        raise ConfigError("no output folder", fix="--out=DIR")
    result = export(_workdir(args), args.out, format=args.format, step=args.step)
    say(f"{result['format']} export of step {result['step']} written to {args.out} and verified")
    return result


def _convert(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    from jaxtune.console import say
    from jaxtune.hf.convert import convert

    shard = None if args.shard_size is None else _bytes(args.shard_size)
    written = convert(
        args.source, args.out, dtype=args.dtype, adapter=args.adapter, shard_bytes=shard
    )
    changed = f", {written.changed} of them changed by the adapter," if args.adapter else ""
    say(f"{written.tensors} tensors ({written.bytes / 1e9:.2f} GB){changed} written to {args.out} "
        "and verified")  # fmt: skip
    return {"out": args.out, **written._asdict()}


def _verify(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    from jaxtune import compare

    try:
        return compare.verify(args.a, args.b, args.prompt or compare.PROMPT)
    except compare.Differs as error:
        if args.json:
            print(json.dumps(error.result))
        raise


def _data(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    config = _config(args, overrides)
    from jaxtune.tuned import show_data

    return show_data(config)


def _plan(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    config = _config(args, overrides)
    # No device of this machine is opened, and what is compiled here for others is kept by plan.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    from jaxtune.plan import command

    if args.price is not None and not args.price >= 0:
        raise ConfigError(f"--price is {args.price:g}", fix="what a chip costs an hour, 0 or more")
    topology = args.topology or command.stated_topology(args.config)
    run = command.plan_search if args.search else command.plan
    try:
        result = run(config, topology, price=args.price)
    except command.DoesNotFit as error:
        if args.json:
            print(json.dumps(error.result))
        raise
    if not args.json:
        command.show_best(result) if args.search else command.show(result)
    return result


def _doctor(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    from jaxtune import doctor

    kinds = flags.GENERATIONS if args.chip == "all" else [args.chip] if args.chip else []
    lines = doctor.examine(kinds=kinds)
    if not args.json:
        doctor.show(lines)
    try:
        doctor.require_sound(lines)
    except ConfigError:
        if args.json:
            print(json.dumps(doctor.as_json(lines)))
        raise
    return doctor.as_json(lines)


def _workdir(args: argparse.Namespace) -> str:
    if not args.workdir:
        raise ConfigError("no workdir", fix="--workdir=DIR, a folder for this run")
    return args.workdir


def _bytes(text: str) -> int:
    """Bytes of a size such as 5GB, 300MB or 4096."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--shard-size={text} is no size", fix="--shard-size=5GB")
    unit = {"KB": 1e3, "MB": 1e6, "GB": 1e9}.get((match[2] or "B").upper(), 1)
    return int(float(match[1]) * unit)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts={file} cannot be read: {error}", fix="a text file") from None


_WORKDIR: dict[str, dict[str, Any]] = {"--workdir": {"metavar": "DIR", "help": "folder of the run"}}
_CONFIG: dict[str, dict[str, Any]] = {
    "--config": {"metavar": "FILE", "help": "page of Python with get_config()"}
}
_STEP: dict[str, dict[str, Any]] = {
    "--step": {"type": int, "help": "checkpoint to use (default: the best, else the newest)"}
}
_COMMON: dict[str, dict[str, Any]] = {
    "--json": {"action": "store_true", "help": "one JSON object on stdout"},
    "--debug": {"action": "store_true", "help": "show tracebacks"},
}
_VERBS: dict[str, tuple[Callable[..., dict[str, Any]], str, dict[str, dict[str, Any]]]] = {
    "train": (
        _train,
        "fine-tune; goes on from the workdir's newest checkpoint",
        _CONFIG | _WORKDIR,
    ),
    "sweep": (
        _sweep,
        "search hyperparameters; goes on with what is in the workdir, also from several machines",
        _CONFIG
        | _WORKDIR
        | {
            "--budget": {
                "metavar": "AMOUNT",
                "help": "24h, 90m, '64 chip-hours', '500M tokens' (default: sweep.budget)",
            },
            "--ray": {
                "metavar": "ADDRESS",
                "help": "a worker on every node of this Ray cluster: auto, or HOST:6379",
            },
        },
    ),
    "eval": (
        _eval,
        "loss, perplexity and token accuracy of base and tuned model",
        _WORKDIR | _STEP | {"--data": {"help": "rows to score (default: the run's own)"}},
    ),
    "generate": (
        _generate,
        "text from prompts",
        _WORKDIR
        | _STEP
        | {
            "--prompt": {"metavar": "TEXT", "action": "append", "help": "may be repeated"},
            "--prompts": {"metavar": "FILE", "help": "one prompt a line"},
            "--max-new-tokens": {"type": int, "default": 128},
            "--temperature": {"type": float, "default": 0.0, "help": "0 is greedy"},
            "--top-p": {"type": float, "default": 1.0},
            "--seed": {"type": int, "default": 0},
            "--chat": {"action": "store_true", "help": "each prompt is a user's turn"},
            "--base": {"action": "store_true", "help": "of the base model, without the tuning"},
        },
    ),
    "export": (
        _export,
        "a Hugging Face folder: the merged model or a PEFT adapter, verified",
        _WORKDIR
        | _STEP
        | {
            "--format": {
                "choices": ("hf", "peft", "serve"),
                "default": "hf",
                "help": "merged model; adapter; adapter where inference servers take it",
            },
            "--out": {"metavar": "DIR"},
        },
    ),
    "convert": (
        _convert,
        "a checkpoint into a new folder: merge an adapter, another dtype, other files",
        {
            "source": {"metavar": "SRC", "help": "Hugging Face folder or hub id"},
            "out": {"metavar": "DST", "help": "new folder"},
            "--dtype": {
                "choices": ("float32", "bfloat16", "float16"),
                "help": "(default: the source's)",
            },
            "--adapter": {"metavar": "PATH", "help": "PEFT adapter folder or hub id to merge"},
            "--shard-size": {"metavar": "SIZE", "help": "most of one file, such as 5GB"},
        },
    ),
    "verify": (
        _verify,
        "two checkpoints, or an export and its run: tensor by tensor, and logits on a prompt",
        {
            "a": {"metavar": "A", "help": "Hugging Face folder, hub id, workdir or PEFT adapter"},
            "b": {"metavar": "B", "help": "the same; exit code 65 where they differ"},
            "--prompt": {"metavar": "TEXT", "help": "(default: a sentence)"},
        },
    ),
    "data": (_data, "what the model will see: masks, lengths, packing, rejects", _CONFIG),
    "doctor": (
        _doctor,
        "what this machine and installation can do, and what is amiss",
        {
            "--chip": {
                "choices": (*flags.GENERATIONS, "all"),
                "help": "show the flags of TPU chips that are not here",
            },
        },
    ),
    "plan": (
        _plan,
        "memory, work and a floor of time on a TPU slice, before you rent it",
        _CONFIG
        | {
            "--topology": {
                "metavar": "NAME",
                "help": "v5litepod-8, v6e-16, v5p-64, 2xv5litepod-16 (two slices) or v5e:2x4 "
                "(default: TOPOLOGY in the config file)",
            },
            "--search": {"action": "store_true", "help": "the best remat, mesh and base for it"},
            "--price": {"type": float, "metavar": "P", "help": "of a chip for an hour"},
        },
    ),
}
