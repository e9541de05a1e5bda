"""jaxtune's batched, cached decoding against transformers' own, prompt by prompt."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from jaxtune.decoding import _truncate, complete, generate
from jaxtune.hf.load import load_model
from jaxtune.hf.tokenizer import load_tokenizer
from tests.oracles.llamas import SHAPES, greedy, load, write


@pytest.mark.parametrize(("shape", "batch_size"), [("odd_heads_tied", 64), ("biases_llama3", 4)])
def test_greedy_equals_transformers(tmp_path, shape, batch_size):
    write(tmp_path, seed=5, **SHAPES[shape])
    torch_model, model = load(tmp_path), load_model(str(tmp_path))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 96, n).tolist() for n in (1, 64, 65, 7, 130, 2, 30)]
    stops = list(range(2, 20))
    torch_model.generation_config.eos_token_id = stops
    wanted = [greedy(torch_model, prompt, 40) for prompt in prompts]
    assert len({len(tokens) for tokens in wanted}) > 1  # some stop
    options = {"max_new_tokens": 40, "stop_ids": stops, "batch_size": batch_size}
    assert generate(model, prompts, **options) == wanted


def test_stories260k_tells_its_authors_story(shared_data):
    folder = shared_data / "stories260k-hf"
    sample = (shared_data / "stories260k-llama2c" / "greedy_sample.txt").read_text("utf-8")
    prompts = ["Once upon a time", "Lily", "The big dog said"]
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    found = complete(model, tokenizer, prompts, max_new_tokens=120, stop_ids=[1, 2])
    assert (prompts[0] + found[0]).strip() == sample[: len(prompts[0] + found[0])].strip()
    torch_model = load(folder)
    for prompt, text in zip(prompts, found, strict=True):
        ids = greedy(torch_model, tokenizer(prompt)["input_ids"], 120)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_tokens_transformers_keeps(top_p):
    scores = np.random.default_rng(3).normal(0, 2, (16, 50)).astype(np.float32)
    wanted = TopPLogitsWarper(top_p)(torch.LongTensor(16, 1), torch.FloatTensor(scores)).numpy()
    np.testing.assert_array_equal(np.asarray(_truncate(jnp.asarray(scores), top_p)), wanted)
