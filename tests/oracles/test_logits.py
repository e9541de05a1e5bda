"""jaxtune's models against transformers': logits, losses and perplexity on the CPU."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxtune import tree
from jaxtune.data.packing import Batch, Example, fit_length, pack
from jaxtune.hf.load import load_model
from jaxtune.hf.tokenizer import load_tokenizer
from jaxtune.objectives.sft import next_token
from jaxtune.scoring import evaluate
from tests.oracles.families import (
    CAUSAL,
    ENCODERS,
    LONGROPE_START,
    PAD,
    SCORED,
    load,
    logits,
    one_each,
    v4_config,
    write,
)

NEAR = 1e-4  # largest difference in float32
LENGTH = 40  # longer than every window
REAL = ((0, 40), (0, 33), (9, 40), (3, 31))  # rows: full, padded right, left, on both sides


def _tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 90, (rows, length))


def _off(found, wanted: np.ndarray) -> float:
    """The largest difference, less where logits are beyond 10; infinite for another shape."""
    found = np.asarray(found, np.float64)
    if found.shape != wanted.shape:
        return np.inf
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max() / 10))


def _padded(real: tuple[tuple[int, int], ...] = REAL) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segments) of rows whose real tokens are [start, stop)."""
    at = np.arange(LENGTH)
    segments = np.stack([(at >= start) & (at < stop) for start, stop in real]).astype(np.int32)
    positions = np.stack([at - start for start, _ in real]).astype(np.int32) * segments
    return positions, segments


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_logits(tmp_path, name):
    theirs, ours = load(write(tmp_path, name)), load_model(str(tmp_path))
    tokens = _tokens(2, LENGTH)
    wanted = logits(theirs, tokens)
    assert 1 < np.abs(wanted).max() < 100  # logits of order 1, or the tolerance means nothing
    assert _off(ours(tokens), wanted) <= NEAR

    tokens = _tokens(len(REAL), LENGTH, seed=1)
    positions, segments = _padded()
    padded = np.where(segments > 0, tokens, PAD)
    wanted = logits(theirs, padded, attention_mask=segments, position_ids=positions)
    found = np.asarray(ours(tokens, positions, segments))  # what stands in padding is not seen
    for row, (start, stop) in enumerate(REAL):
        assert _off(found[row, start:stop], wanted[row, start:stop]) <= NEAR, f"row {row} of REAL"


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-partial_longrope_window"])
def test_short_rows_take_the_short_factors(tmp_path, name):
    theirs, ours = load(write(tmp_path, name)), load_model(str(tmp_path))
    for length in (LONGROPE_START, LONGROPE_START + 1):
        tokens = _tokens(2, length)
        assert _off(ours(tokens), logits(theirs, tokens)) <= NEAR, f"{length} tokens"


# Rows of several blocks of attention, where windows begin and end inside blocks.
@pytest.mark.parametrize(
    "name", ["mistral-window", "gemma2-even_caps", "gemma3-linear", "qwen2-windows"]
)
def test_logits_of_long_rows(tmp_path, name):
    sizes: dict[str, Any] = {"max_position_embeddings": 1024}
    if name == "mistral-window":
        sizes["sliding_window"] = 300
    theirs = load(write(tmp_path, name, **sizes))
    tokens = _tokens(1, 600)
    assert _off(load_model(str(tmp_path))(tokens), logits(theirs, tokens)) <= 2 * NEAR


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_logits(tmp_path, name):
    theirs, ours = load(write(tmp_path, name)), load_model(str(tmp_path))
    tokens = _tokens(3, LENGTH)
    wanted = logits(theirs, tokens)
    assert np.ptp(wanted, axis=0).max() > 0.01  # what the rows say makes a difference
    assert _off(ours(tokens), wanted) <= NEAR

    tokens = _tokens(len(REAL), LENGTH, seed=1)
    positions, segments = _padded()
    found = np.asarray(ours(tokens, positions, segments))
    pad = theirs.config.pad_token_id
    right = np.where(segments > 0, tokens, pad)[:2]
    wanted = logits(theirs, right, attention_mask=segments[:2])
    assert _off(found[:2], wanted) <= NEAR
    # transformers pools the first token of a row, also where that is padding.
    for row, (start, stop) in list(enumerate(REAL))[2:]:
        wanted = logits(theirs, tokens[row : row + 1, start:stop])
        assert _off(found[row : row + 1], wanted) <= NEAR, f"row {row} of REAL"


@pytest.mark.parametrize("name", ["bert-plain", "bert-gelu_new", "roberta-plain"])
def test_token_types(tmp_path, name):
    theirs, ours = load(write(tmp_path, name)), load_model(str(tmp_path))
    tokens = _tokens(2, LENGTH)
    types = np.random.default_rng(3).integers(0, theirs.config.type_vocab_size, tokens.shape)
    wanted = logits(theirs, tokens, token_type_ids=types)
    assert np.abs(wanted - logits(theirs, tokens)).max() > 0.01
    assert _off(ours(tokens, types=types), wanted) <= NEAR


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_the_last_token(tmp_path, name):
    theirs, ours = load(write(tmp_path, name)), load_model(str(tmp_path))
    tokens = _tokens(3, LENGTH)
    assert _off(ours(tokens), logits(theirs, tokens)) <= NEAR

    tokens = _tokens(len(REAL), LENGTH, seed=1)
    positions, segments = _padded()
    padded = np.where(segments > 0, tokens, theirs.config.pad_token_id)
    wanted = logits(theirs, padded, attention_mask=segments, position_ids=positions)
    assert _off(ours(tokens, positions, segments), wanted) <= NEAR


def _rms(difference: np.ndarray, *, typical: bool) -> float:
    """Root mean square; of the typical row of logits where one may go to another expert."""
    squares = np.mean(np.asarray(difference, np.float64) ** 2, axis=-1)
    return float(np.sqrt(np.median(squares) if typical else np.mean(squares)))


# Distances in bfloat16, in units of transformers' own distance from its float32. Two roundings of
# the same size that know nothing of each other are 1.41 apart: less means the same order of
# operations. A classifier's few numbers say less about it.
APART, APART_CLASSES, FROM_EXACT = 1.15, 1.3, 1.15


@pytest.mark.parametrize("name", one_each(0))
def test_bfloat16_logits(tmp_path, name):
    write(tmp_path, name, dtype=torch.bfloat16)
    tokens = _tokens(8 if name in CAUSAL else 64, LENGTH)
    exact, rounded = (
        logits(load(tmp_path, kind), tokens) for kind in (torch.float32, torch.bfloat16)
    )
    found = np.asarray(load_model(str(tmp_path), dtype="bfloat16")(tokens))
    typical = "moe" in name or "mixtral" in name
    theirs, apart, ours = (
        _rms(difference, typical=typical)
        for difference in (rounded - exact, found - rounded, found - exact)
    )
    said = (
        f"{name}: {apart / theirs:.2f} from transformers' bfloat16, {ours / theirs:.2f} from exact"
    )
    assert apart <= (APART if name in CAUSAL else APART_CLASSES) * theirs, said
    assert ours <= FROM_EXACT * theirs, said


@pytest.mark.parametrize("name", one_each(2))
def test_configs_of_transformers_4(tmp_path, name):
    folder = write(tmp_path, name)
    tokens = _tokens(1, LENGTH)
    wanted = logits(load(folder), tokens)
    file = folder / "config.json"
    old = v4_config(json.loads(file.read_text()))
    file.write_text(json.dumps(old))
    assert _off(logits(load(folder), tokens), wanted) == 0  # to transformers the same model
    assert _off(load_model(str(folder))(tokens), wanted) <= NEAR


def test_logits_of_a_sharded_bfloat16_checkpoint(tmp_path):
    write(tmp_path, "llama-gqa", dtype=torch.bfloat16, shard="15KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = _tokens(2, 20)
    assert _off(load_model(str(tmp_path))(tokens), logits(load(tmp_path), tokens)) <= NEAR


def _nll(model, tokens: list[int]) -> np.ndarray:
    """transformers' -log p of every token but the first, float64."""
    scores = logits(model, np.array([tokens])).astype(np.float64)[0, :-1]
    top = scores.max(axis=-1, keepdims=True)
    logs = scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
    return -logs[np.arange(len(tokens) - 1), tokens[1:]]


def _eval_step(model):
    graphdef, params = tree.split(model)
    step = jax.jit(lambda _, params, batch: next_token(tree.merge(graphdef, params), batch, None))
    return step, params


def test_logits_and_perplexity_of_stories260k(shared_data):
    folder = shared_data / "stories260k-hf"
    torch_model, model = load(folder), load_model(str(folder))
    tokenizer = load_tokenizer(str(folder))
    text = (shared_data / "text" / "tinystories.txt").read_text(encoding="utf-8")
    tokens = np.array(tokenizer(text[:30_000], verbose=False)["input_ids"], np.int32)
    whole = Example(tokens, np.ones(len(tokens), bool), "tinystories.txt")
    windows = fit_length(whole, 400, "split")
    documents = [window.tokens.tolist() for window in windows]
    longest = np.array([max(documents, key=len)])
    assert longest.size > 300  # more than one block of attention
    assert _off(model(longest), logits(torch_model, longest)) <= NEAR

    rows = pack([windows], 512, packing=True)
    step, params = _eval_step(model)
    batches = [rows.batch(range(i, min(i + 8, len(rows))), 8) for i in range(0, len(rows), 8)]
    score = evaluate(step, {}, params, batches)
    losses = np.concatenate([_nll(torch_model, d) for d in documents])
    assert score.tokens == losses.size == len(tokens) - 1 > 10_000
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert score.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert 3 < score.perplexity < 8  # a real model on its own domain


@pytest.mark.parametrize(
    "name",
    ["llama-biases_llama3", "mistral-window", "gemma3-linear", "smollm3-windows", "gpt2-plain"],
)
def test_packed_documents_lose_what_they_lose_alone(tmp_path, name):
    torch_model, model = load(write(tmp_path, name)), load_model(str(tmp_path))
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 90, n).tolist() for n in (17, 40, 5, 31, 2)]
    examples = [Example(np.array(d, np.int32), np.ones(len(d), bool), "") for d in documents]
    rows = pack([examples], 96, packing=True)
    assert len(rows) == 1
    batch: Batch = rows.batch([0])
    step, params = _eval_step(model)
    for segment, index in enumerate(rows.members.tolist(), start=1):
        alone = batch._replace(weights=batch.weights * (batch.segments == segment))
        term = step({}, params, alone)
        wanted = _nll(torch_model, documents[index])
        assert float(term.weight) == len(wanted)
        assert float(term.total) == pytest.approx(wanted.sum(), rel=1e-5), f"document {index}"
