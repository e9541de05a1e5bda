"""jaxtune's decoder against transformers': logits, losses and perplexity on CPU in float32."""

import jax
import numpy as np
import pytest
import torch

from jaxtune import tree
from jaxtune.data.packing import Example, fit_length, pack
from jaxtune.hf.load import load_model
from jaxtune.hf.tokenizer import load_tokenizer
from jaxtune.objectives.sft import next_token
from jaxtune.scoring import evaluate
from tests.oracles.llamas import SHAPES, load, logits, write


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


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_random_checkpoints(tmp_path, shape):
    write(tmp_path, **SHAPES[shape])
    tokens = np.random.default_rng(0).integers(0, 96, (2, 90))
    wanted = logits(load(tmp_path), tokens)
    found = np.asarray(load_model(str(tmp_path))(tokens))
    assert 1 < np.abs(wanted).max() < 100  # logits of order 1, or the tolerance means nothing
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_logits_of_a_sharded_bfloat16_checkpoint(tmp_path):
    write(tmp_path, dtype=torch.bfloat16, shard="15KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    wanted = logits(load(tmp_path), tokens)
    found = np.asarray(load_model(str(tmp_path))(tokens))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_logits_and_perplexity_of_stories260k(shared_data):
    folder = shared_data / "stories260k-hf"
    torch_model, model = load(folder), load_model(str(folder))
    tokenizer = load_tokenizer(str(folder))
    text = (shared_data / "text" / "tinystories.txt").read_text(encoding="utf-8")
    tokens = np.array(tokenizer(text[:30_000], verbose=False)["input_ids"], np.int32)
    whole = Example(tokens, np.ones(len(tokens), bool), "tinystories.txt")
    windows = fit_length(whole, 400, "split")
    documents = [window.tokens.tolist() for window in windows]
    longest = max(documents, key=len)
    assert len(longest) > 300  # more than one block of attention
    found = np.asarray(model(np.array([longest])))[0]
    np.testing.assert_allclose(
        found, logits(torch_model, np.array([longest]))[0], rtol=0, atol=1e-4
    )

    rows = pack([windows], 512, packing=True)
    step, params = _eval_step(model)
    batches = [rows.batch(range(i, min(i + 8, len(rows))), 8) for i in range(0, len(rows), 8)]
    score = evaluate(step, {}, params, batches)
    losses = np.concatenate([_nll(torch_model, d) for d in documents])
    assert score.tokens == losses.size == len(tokens) - 1 > 10_000
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert score.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert 3 < score.perplexity < 8  # a real model on its own domain


def test_packed_documents_lose_what_they_lose_alone(tmp_path):
    write(tmp_path, **SHAPES["biases_llama3"])
    torch_model, model = load(tmp_path), load_model(str(tmp_path))
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 96, n).tolist() for n in (17, 40, 5, 31, 2)]
    examples = [Example(np.array(d, np.int32), np.ones(len(d), bool), "") for d in documents]
    rows = pack([examples], 96, packing=True)
    assert len(rows) == 1
    batch = rows.batch([0])
    step, params = _eval_step(model)
    for segment, index in enumerate(rows.members.tolist(), start=1):
        alone = batch._replace(weights=batch.weights * (batch.segments == segment))
        term = step({}, params, alone)
        wanted = _nll(torch_model, documents[index])
        assert float(term.weight) == len(wanted)
        assert float(term.total) == pytest.approx(wanted.sum(), rel=1e-5)
