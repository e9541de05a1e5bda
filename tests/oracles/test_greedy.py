"""jaxtune's batched, cached decoding against transformers' own, prompt by prompt."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from jaxtune.decoding import _truncate, complete, generate
from jaxtune.hf.load import load_model
from jaxtune.hf.tokenizer import load_tokenizer
from tests.oracles.families import CAUSAL, LONGROPE_START, greedy, load, write

# One or two shapes a family: those with windows, caps, two ropes, biases.
CACHED = [
    "llama-yarn_scaled",
    "mistral-window",
    "qwen2-windows",
    "qwen3-windows_yarn",
    "gemma-one_kv",
    "gemma2-even_caps",
    "gemma2-five_layers",
    "gemma3-seven_layers",
    "gemma3_vision-linear",
    "phi3-partial",
    "smollm3-windows",
    "olmo2-one_kv",
    "gpt2-hub",
    "mixtral-window",
    "qwen3_moe-mixed",
    "qwen3_moe-window_tied",
]


def _write(folder: Path, name: str) -> Path:
    return write(folder, name, seed=5, embedding=0.3)


def _prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(20, 90, n).tolist() for n in lengths]


@pytest.mark.parametrize("name", CACHED)
def test_greedy_equals_transformers(tmp_path, name):
    """Prompts of unequal lengths in one batch, running past the window."""
    torch_model, model = load(_write(tmp_path, name)), load_model(str(tmp_path))
    prompts = _prompts(1, 23, 6)
    torch_model.generation_config.eos_token_id = [2]
    wanted = [greedy(torch_model, prompt, 20) for prompt in prompts]
    assert len({token for tokens in wanted for token in tokens}) > 2  # not one thing for ever
    found = generate(model, prompts, max_new_tokens=20, stop_ids=[2])
    for prompt, ours, theirs in zip(prompts, found, wanted, strict=True):
        assert ours == theirs, f"{name}, after a prompt of {len(prompt)} tokens"


@pytest.mark.parametrize(
    ("name", "batch_size"), [("llama-odd_heads_tied", 64), ("llama-biases_llama3", 4)]
)
def test_greedy_of_many_prompts(tmp_path, name, batch_size):
    torch_model, model = load(_write(tmp_path, name)), load_model(str(tmp_path))
    prompts = _prompts(1, 64, 65, 7, 130, 2, 30)
    stops = list(range(2, 20))
    torch_model.generation_config.eos_token_id = stops
    wanted = [greedy(torch_model, prompt, 40) for prompt in prompts]
    assert len({len(tokens) for tokens in wanted}) > 1  # some stop
    options = {"max_new_tokens": 40, "stop_ids": stops, "batch_size": batch_size}
    assert generate(model, prompts, **options) == wanted


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-partial_longrope_window"])
def test_longrope_changes_its_factors_on_the_way(tmp_path, name):
    """Rows that stay short, become long and are long; a row's neighbours make no difference."""
    torch_model, model = load(_write(tmp_path, name)), load_model(str(tmp_path))
    torch_model.generation_config.eos_token_id = [2]
    prompts = _prompts(2, LONGROPE_START - 4, LONGROPE_START + 6)
    wanted = [greedy(torch_model, prompt, 12) for prompt in prompts]
    found = generate(model, prompts, max_new_tokens=12, stop_ids=[2])
    for prompt, ours, theirs in zip(prompts, found, wanted, strict=True):
        assert ours == theirs, f"{name}, after a prompt of {len(prompt)} tokens"


def test_every_causal_family_generates():
    generating = {name.split("-")[0] for name in CACHED} | {"phi3"}
    assert generating == {name.split("-")[0] for name in CAUSAL}


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
