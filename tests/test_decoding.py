from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import decoding as module
from jaxtune import tree
from jaxtune.assemble import assemble, base
from jaxtune.config import Config, LoraConfig, MeshConfig, ModelConfig
from jaxtune.decoding import generate
from jaxtune.errors import ConfigError, DataError
from jaxtune.hf.load import load_model
from jaxtune.sharding import make_mesh
from tests import tiny

PROMPTS = [[5, 6, 7], [9] * 20, [1, 2, 3, 4, 5, 6, 7, 8, 9], [60]]

run: Any = module._run  # a jitted function: its cache is not in its type


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder))


def _without_cache(model, prompt, count):
    """The textbook way: all tokens again for every new one."""
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    graphdef, params = tree.split(model)
    logits = jax.jit(lambda params, tokens: tree.merge(graphdef, params)(tokens))
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = np.argmax(logits(params, tokens)[0, at - 1])
    return tokens[0, len(prompt) :].tolist()


def test_greedy_equals_decoding_without_a_cache(model):
    found = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[])
    assert found == [_without_cache(model, prompt, 12) for prompt in PROMPTS]


def test_stops_at_a_stop_token_and_leaves_it_out(model):
    whole = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[])
    stops = [whole[0][4], whole[1][0]]

    def cut(tokens):
        return tokens[: next((i for i, t in enumerate(tokens) if t in stops), len(tokens))]

    found = generate(model, PROMPTS, max_new_tokens=12, stop_ids=stops)
    assert found == [cut(tokens) for tokens in whole]
    assert found[1] == []
    assert len(found[0]) < 12


def test_draws_depend_on_seed_and_place_only(model):
    options = {"max_new_tokens": 10, "stop_ids": [], "temperature": 1.5}
    first = generate(model, PROMPTS, seed=4, **options)
    assert generate(model, PROMPTS, seed=4, **options) == first
    assert generate(model, PROMPTS, seed=4, batch_size=2, **options) == first
    assert generate(model, PROMPTS[:3], seed=4, **options) == first[:3]
    assert generate(model, PROMPTS, seed=5, **options) != first
    same = generate(model, [PROMPTS[0]] * 4, seed=4, **options)
    assert len({tuple(tokens) for tokens in same}) == 4


def test_draws_follow_the_distribution(model):
    prompt, count, temperature = [5, 6, 7], 600, 2.0
    logits = np.asarray(model(np.array([prompt])))[0, -1] / temperature
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    options = {"max_new_tokens": 1, "stop_ids": [], "batch_size": count}
    drawn = generate(model, [prompt] * count, temperature=temperature, **options)
    counts = np.bincount([tokens[0] for tokens in drawn], minlength=64)
    # Pearson's chi-square over the likely tokens has a mean of their number.
    likely = probs * count > 5
    chi = (((counts - probs * count) ** 2) / (probs * count))[likely].sum()
    assert chi < 2 * likely.sum()

    order = np.argsort(-probs)
    nucleus = set(order[: np.searchsorted(np.cumsum(probs[order]), 0.6) + 1].tolist())
    drawn = generate(model, [prompt] * count, temperature=temperature, top_p=0.6, **options)
    assert {tokens[0] for tokens in drawn} == nucleus


def test_few_programs_serve_all_sizes_and_settings(model):
    start = run._cache_size()
    for length, count in ((3, 20), (40, 10), (7, 57)):
        prompts = [[1] * length] * 4
        generate(model, prompts, max_new_tokens=count, stop_ids=[2, 3])
        for temperature, top_p, seed in ((0.5, 1.0, 1), (1, 0.9, 2), (2.0, 1, -3)):
            generate(
                model,
                prompts[:3],
                max_new_tokens=count,
                stop_ids=[2],
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
    assert run._cache_size() - start <= 2  # greedy and sampled


def test_a_sharded_model_writes_the_same(folder, model):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = Config(model=ModelConfig(str(folder), "float32", "float32"), lora=LoraConfig(r=0))
    assembly = assemble(config, folder, mesh)
    sharded = tree.merge(assembly.graphdef, base(assembly))
    with jax.set_mesh(mesh):
        found = generate(sharded, PROMPTS[:3], max_new_tokens=8, stop_ids=[])
    assert found == generate(model, PROMPTS[:3], max_new_tokens=8, stop_ids=[])


def test_bfloat16_models_generate(folder):
    model = load_model(str(folder), "bfloat16")
    assert model.empty_cache(1, 4).stacks["0-2"].k_BSKH.dtype == jnp.bfloat16
    assert [len(t) for t in generate(model, PROMPTS, max_new_tokens=5, stop_ids=[])] == [5] * 4


def test_no_prompt_gives_no_text(model):
    assert generate(model, [], max_new_tokens=5, stop_ids=[]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "words"),
    [
        ([[1], []], {}, DataError, "prompt 2 has no token"),
        ([[1, 64]], {}, DataError, "token 64, the model knows 0 to 63"),
        ([[1, -1]], {}, DataError, "token -1"),
        ([[1] * 120], {}, ConfigError, "120 tokens and 10 may follow, the model has 128"),
        ([[1]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ([[1]], {"batch_size": 0}, ConfigError, "batch_size 0"),
        ([[1]], {"temperature": -1.0}, ConfigError, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, ConfigError, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, ConfigError, "top_p 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused(model, prompts, options, kind, words):
    with pytest.raises(kind, match=words):
        generate(model, prompts, **{"max_new_tokens": 10, "stop_ids": [], **options})


def test_ends_when_all_rows_have_stopped(model, monkeypatch):
    steps = []
    decode = type(model).decode

    def counted(self, tokens_BT, *rest):
        if tokens_BT.shape[1] == 1:
            jax.debug.callback(lambda: steps.append(1))
        return decode(self, tokens_BT, *rest)

    monkeypatch.setattr(type(model), "decode", counted)
    run.clear_cache()
    whole = generate(model, [[5, 6, 7]], max_new_tokens=30, stop_ids=[])[0]
    jax.effects_barrier()
    assert len(steps) == 29  # the first new token comes from the prompt's own pass
    steps.clear()
    found = generate(model, [[5, 6, 7]], max_new_tokens=30, stop_ids=[whole[3]])[0]
    jax.effects_barrier()
    assert len(steps) == len(found) <= 3
    run.clear_cache()


@given(st.integers(1, 100_000))
def test_sizes_are_few_and_large_enough(count):
    assert count <= module._slots(count) <= max(64, 2 * count)
    assert count <= module._rows(count) <= count + 7
    assert module._slots(count).bit_count() == 1
