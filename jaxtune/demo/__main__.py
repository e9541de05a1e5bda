"""The quickstart: commands a person can copy, shown and run one after the other.

What is done already is kept, so a run that was stopped goes on where it was.
"""

import contextlib
import io
import json
import os
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxtune import cli
from jaxtune.console import say, stderr
from jaxtune.demo import prepare
from jaxtune.errors import ConfigError

_CONFIG = "configs/quickstart.py"
_HOME = Path("quickstart")
_RUN = f"--workdir={_HOME}/run"
_MOST_TOKENS = 64  # of a translation; the longest has 57
_SHOWN = 5
_BIN = os.path.relpath(sysconfig.get_path("scripts"))


def main() -> int:
    """Runs everything; returns the exit code of the first command that fails, else 0."""
    if not Path(_CONFIG).is_file():
        error = ConfigError(f"{_CONFIG} is not here", fix="cd to jaxtune's repository")
        print(error.line(), file=sys.stderr)
        return error.exit_code
    try:
        return _run_all()
    except KeyboardInterrupt:
        print("jaxtune: error[cancelled]: stopped; try: the same command", file=sys.stderr)
        return 130


def _run_all() -> int:
    started = time.monotonic()
    _show(f"python -m jaxtune.demo.prepare --out={_HOME}")
    if code := prepare.main([f"--out={_HOME}"]):
        return code
    trained = _jaxtune("train", f"--config={_CONFIG}", _RUN)
    texts = {"base": _translate("--base"), "tuned": _translate()}
    for format, folder in (("hf", _HOME / "merged"), ("peft", _HOME / "adapter")):
        if folder.exists():
            say(f"\n{folder} is kept")
        else:
            _jaxtune("export", _RUN, f"--format={format}", f"--out={folder}")
    texts["exported"] = _reload(_HOME / "merged")
    _report(trained, _held_out(), texts)
    say(f"\nall of this took {time.monotonic() - started:.0f} s\n")
    ask = shlex.quote(prepare.prompt("The brave mouse sees two cats."))
    say(f"ask it:   {_BIN}/jaxtune generate {_RUN} --prompt={ask}")
    say(
        f"your own: {_BIN}/jaxtune train --config=configs/lora.py --config.model.path=MODEL "
        "--config.data.train=ROWS.jsonl --workdir=runs/mine\n"
        "          MODEL is a Hugging Face folder or hub id; rows have prompt and completion, "
        "messages, or text"
    )
    return 0


def _show(command: str) -> None:
    stderr.print(f"\n$ {_BIN}/{command}", style="bold", markup=False)


def _jaxtune(*arguments: str) -> dict[str, Any]:
    """Shows a command, runs it in this process and returns its JSON; a failure ends the program."""
    _show(f"jaxtune {shlex.join(arguments)}")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main([*arguments, "--json"])
    if code:
        sys.exit(code)
    return json.loads(out.getvalue())


def _translate(*flags: str) -> list[str]:
    prompts = f"--prompts={_HOME}/data/test.txt"
    most = f"--max-new-tokens={_MOST_TOKENS}"
    texts = _jaxtune("generate", _RUN, prompts, most, *flags)["texts"]
    return [text.strip() for text in texts]


def _reload(folder: Path) -> list[str]:
    """Translations by the exported model, loaded like any other."""
    import jaxtune
    from jaxtune.decoding import complete
    from jaxtune.hf.tokenizer import load_tokenizer

    say(f"\n>>> jaxtune.load_model({str(folder)!r})")
    prompts = [row["prompt"] for row in _held_out()]
    model, tokenizer = jaxtune.load_model(str(folder)), load_tokenizer(str(folder))
    ends = [tokenizer.eos_token_id]
    texts = complete(model, tokenizer, prompts, max_new_tokens=_MOST_TOKENS, stop_ids=ends)
    return [text.strip() for text in texts]


def _held_out() -> list[dict[str, str]]:
    lines = (_HOME / "data" / "test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _report(
    trained: dict[str, Any], rows: list[dict[str, str]], texts: dict[str, list[str]]
) -> None:
    """Before and after: the numbers, some translations, and whether the export gives the same."""
    truth = [row["completion"].strip() for row in rows]
    scores = Table(title=f"{len(rows)} held-out sentences", title_justify="left")
    for column in ("", "before", "after"):
        scores.add_column(column, justify="right" if column else "left")
    losses = [f"{trained[key]:.3f}" for key in ("loss_before", "loss_after")]
    scores.add_row("loss (nats a token)", *losses)
    measures: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
        "chrF (0 to 100)": _chrf,
        "exact match (%)": _exact,
    }
    for name, measure in measures.items():
        values = [f"{measure(texts[which], truth):.1f}" for which in ("base", "tuned")]
        scores.add_row(name, *values)
    stderr.print(scores)

    samples = Table(show_lines=True)
    for column in ("English", "Esperanto", "before", "after"):
        samples.add_column(column, ratio=1)
    for number, row in enumerate(rows[:_SHOWN]):
        source = row["prompt"].removeprefix(prepare.prompt(""))
        samples.add_row(source, truth[number], texts["base"][number], texts["tuned"][number])
    stderr.print(samples)
    same = sum(a == b for a, b in zip(texts["tuned"], texts["exported"], strict=True))
    say(f"the exported model translates {same} of {len(rows)} the same way")


def _chrf(texts: Sequence[str], truth: Sequence[str]) -> float:
    from sacrebleu import corpus_chrf

    return corpus_chrf(texts, [truth]).score


def _exact(texts: Sequence[str], truth: Sequence[str]) -> float:
    return 100 * sum(a == b for a, b in zip(texts, truth, strict=True)) / len(truth)


if __name__ == "__main__":
    sys.exit(main())
