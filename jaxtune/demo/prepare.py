"""Everything the quickstart starts from, made from nothing: the sentence pairs, and a tiny base.

    python -m jaxtune.demo.prepare --out=quickstart

writes `data/train.jsonl`, `data/test.jsonl`, `data/test.txt` (the prompts of the latter, a line
each) and `base/`, a Llama in a Hugging Face folder that has read English and nothing else.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import Config, freeze
from jaxtune.console import say
from jaxtune.demo.games import documents
from jaxtune.demo.grammar import Part, english, esperanto, sentences
from jaxtune.errors import Failure
from jaxtune.hf.write import save_verified, staged

TRAIN_ROWS, TEST_ROWS = 20_000, 200
_VOCABULARY = 1024
_STEPS = 600
_BATCH = 8  # rows of _WIDTH tokens a step
_WIDTH = 128
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": _VOCABULARY,
}


def prompt(text: str) -> str:
    """How the demo asks for a translation."""
    return f"In Esperanto: {text}"


def write_data(
    folder: Path, seed: int = 0, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS
) -> None:
    """Writes train.jsonl and test.jsonl, rows of {"prompt", "completion"}, each pair once.

    test.txt has the prompts of test.jsonl, a line each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[Part, int] = {"train": train_rows, "test": test_rows}
    for part, count in counts.items():
        pairs = dict.fromkeys(
            (english(s), esperanto(s)) for s in islice(sentences(part, seed), 2 * count)
        )
        rows = [
            {"prompt": prompt(source), "completion": f" {target}"}
            for source, target in islice(pairs, count)
        ]
        _write_jsonl(folder / f"{part}.jsonl", rows)
    lines = [f"{row['prompt']}\n" for row in rows]
    (folder / "test.txt").write_text("".join(lines), "utf-8")


def build_base(folder: Path, seed: int = 0, steps: int = _STEPS) -> None:
    """Trains a tiny Llama on English, in about a minute on two cores, into a Hugging Face folder.

    It takes the road of any model: random weights in a Hugging Face folder, continued pretraining
    by `jaxtune.fit`, export. The run stays beside it, in `pretraining/`, and is gone on with.

    Raises:
      ConfigError: `folder` is there already and not empty.
    """
    from jaxtune.train import fit
    from jaxtune.tuned import export

    work = folder.parent / "pretraining"
    if not (work / "random").exists():  # else an earlier run was stopped, and goes on
        with staged(work / "random") as start:
            write_tokenizer(start, seed)
            write_random_llama(start, seed)
    rows = ({"text": text} for text in islice(documents(seed), steps * _BATCH * 6))
    _write_jsonl(work / "english.jsonl", rows)
    fit(_pretraining(work, seed, steps), work / "run")
    export(work / "run", folder, format="hf")


def _pretraining(work: Path, seed: int, steps: int) -> Config:
    return freeze(
        {
            "task": "pretrain",
            "model": {
                "path": str(work / "random"),
                "dtype": "float32",
                "param_dtype": "float32",
                "remat": "none",
            },
            "lora": {"r": 0},
            "data": {"train": str(work / "english.jsonl"), "max_length": _WIDTH},
            "train": {
                "steps": steps,
                "batch_size": _BATCH,
                "seed": seed,
                "tensorboard": False,
                "log_every": 50,
            },
            "optim": {"name": "muon", "lr": 1e-2, "warmup": 0.05},
            "checkpoint": {"every": steps, "best": False},
        }
    )


def write_tokenizer(folder: Path, seed: int = 0) -> None:
    """Trains a sentencepiece BPE on English, saved so that AutoTokenizer loads it.

    Letters that English lacks, such as ĉ, fall back to bytes. There is no dummy space in front, so
    a prompt and its completion are cut alike together and apart.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]  # made at import time
        sentence_iterator=_tokenizer_lines(seed),
        model_writer=model,
        model_type="bpe",
        vocab_size=_VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(ord("!"), ord("~") + 1))),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": _LLAMA["max_position_embeddings"],
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    converted = LlamaTokenizer.from_pretrained(folder)
    converted.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _tokenizer_lines(seed: int) -> Iterable[str]:
    """Texts of the base, and how the demo will ask: sentencepiece takes a line a sentence."""
    for text in islice(documents(seed), 5_000):
        if not text.startswith(("Backwards", "In Pig Latin")):
            yield text
    yield from [prompt("")] * 500


def write_random_llama(folder: Path, seed: int = 0) -> None:
    """Writes config.json, generation_config.json and random float32 weights, as Llama starts."""
    rng = np.random.default_rng(seed)
    hidden, inner = _LLAMA["hidden_size"], _LLAMA["intermediate_size"]

    def normal(*shape: int, std: float = _LLAMA["initializer_range"]) -> np.ndarray:
        return rng.normal(0, std, shape).astype(np.float32)

    ones = np.ones(hidden, np.float32)
    # English never shows the bytes of a letter such as ĉ, so Adam moves all their rows alike: only
    # what they start with tells them apart, in an adapter that cannot train them.
    embeddings = normal(_VOCABULARY, hidden, std=0.3)
    tensors = {"model.embed_tokens.weight": embeddings, "model.norm.weight": ones}
    for layer in range(_LLAMA["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part in ("q", "k", "v", "o"):
            tensors[f"{name}.self_attn.{part}_proj.weight"] = normal(hidden, hidden)
        tensors[f"{name}.mlp.gate_proj.weight"] = normal(inner, hidden)
        tensors[f"{name}.mlp.up_proj.weight"] = normal(inner, hidden)
        tensors[f"{name}.mlp.down_proj.weight"] = normal(hidden, inner)
        tensors[f"{name}.input_layernorm.weight"] = ones
        tensors[f"{name}.post_attention_layernorm.weight"] = ones
    ends = {key: _LLAMA[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "config.json", _LLAMA)
    _write_json(folder / "generation_config.json", ends)
    save_verified(folder / "model.safetensors", tensors)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _write_jsonl(file: Path, rows: Iterable[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns an exit code. A base that is there already is kept."""
    parser = argparse.ArgumentParser(prog="python -m jaxtune.demo.prepare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    data, base = args.out / "data", args.out / "base"
    try:
        write_data(data, args.seed)
        say(f"{data}: {TRAIN_ROWS:,} sentence pairs to learn from, {TEST_ROWS} held out")
        if base.exists():
            say(f"{base} is kept")
        else:
            say(f"{base}: made from nothing, in about a minute on two cores")
            build_base(base, args.seed)
            say(f"{base}: a tiny Llama that knows English, as a Hugging Face folder")
    except Failure as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
