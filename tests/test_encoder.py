"""Encoders: what is read off a config.json, documents apart, who gets a gradient, key tables."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune import tree
from jaxtune.errors import ModelError
from jaxtune.models import families
from jaxtune.models.bidirectional import BIDIRECTIONAL
from jaxtune.models.encoder import Encoder

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 40,
    "dim": 12,
    "hidden_dim": 20,
    "n_layers": 3,
    "n_heads": 2,
    "max_position_embeddings": 32,
}
MODERNBERT = BERT | {"model_type": "modernbert", "local_attention": 6}
CONFIGS = {
    "bert": BERT,
    "roberta": BERT | {"model_type": "roberta", "pad_token_id": 1},
    "xlm-roberta": BERT | {"model_type": "xlm-roberta", "type_vocab_size": 1},
    "camembert": BERT | {"model_type": "camembert"},
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "modernbert, mean": MODERNBERT | {"classifier_pooling": "mean", "norm_bias": True},
}
families_of = pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "modernbert", "modernbert, mean"]
)
WIDTH = 16  # one shape for all, so that a family compiles once


def make(hf: dict[str, Any], seed: int = 0) -> Encoder:
    """A model with noise in every parameter, so that none can hide."""
    config = families.read(hf)[1]
    model = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0), remat="none"))
    graphdef, shapes = tree.split(model)
    rng = np.random.default_rng(seed)
    noise = {k: rng.normal(0, 0.3, s.shape).astype(np.float32) for k, s in shapes.items()}
    params = {k: jnp.asarray(v + 1 if k.endswith(".scale") else v) for k, v in noise.items()}
    return tree.merge(graphdef, params)


def documents(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(2, 40, n).astype(np.int32) for n in lengths]


def packed(docs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """One row of documents and padding: tokens, positions, segments [1, T]."""
    pad = np.zeros(WIDTH - sum(map(len, docs)), np.int32)
    counts = [np.arange(len(d), dtype=np.int32) for d in docs]
    numbers = [np.full(len(d), n, np.int32) for n, d in enumerate(docs, start=1)]
    return tuple(np.concatenate([*parts, pad])[None] for parts in (docs, counts, numbers))


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens, positions, segments, types):
    model = tree.merge(graphdef, params)
    x_BTD = model.hidden(tokens, positions, segments, types=types)
    return model.label_logits(x_BTD, segments)[0]


def logits(model: Encoder, *docs: np.ndarray, types=None) -> np.ndarray:
    """[T, C] of one row of these documents."""
    rows = packed([*docs])
    types = np.zeros((1, WIDTH), np.int32) if types is None else types
    return np.asarray(_logits(*tree.split(model), *rows, types))


@families_of
def test_documents_of_a_row_get_the_logits_they_get_alone(name):
    model, docs = make(CONFIGS[name]), documents(6, 3, 5)
    together = logits(model, *docs)
    assert together.shape == (WIDTH, 2 if name == "distilbert" else 3)
    for start, doc in zip((0, 6, 9), docs, strict=True):
        np.testing.assert_allclose(together[start], logits(model, doc)[0], atol=2e-6)


@pytest.mark.parametrize("name", ["bert", "modernbert, mean"])
def test_padding_on_either_side_changes_nothing(name):
    model, (doc,) = make(CONFIGS[name]), documents(7)
    call = jax.jit(lambda tokens, segments: model(tokens, segments=segments))
    pad, real = np.zeros(9, np.int32), np.ones(7, np.int32)
    for tokens, segments in (([doc, pad], [real, pad]), ([pad, doc], [pad, real])):
        found = call(np.concatenate(tokens)[None], np.concatenate(segments)[None])
        np.testing.assert_allclose(found[0], logits(model, doc)[0], atol=2e-6)


@pytest.mark.parametrize("name", ["bert", "modernbert, mean"])
def test_every_token_sees_those_behind_it_and_no_other_document(name):
    model, docs = make(CONFIGS[name]), documents(6, 6)
    tokens, positions, segments = packed(docs)
    graphdef, params = tree.split(model)

    @jax.jit
    def first_logit(rows_TD):
        # One row of the table for each slot, so that the gradient tells slots apart.
        changed = params | {"embed_tokens.embedding": rows_TD}
        slots = np.arange(WIDTH, dtype=np.int32)[None]
        return _logits(graphdef, changed, slots, positions, segments, None)[0, 0]

    grads = np.abs(jax.grad(first_logit)(params["embed_tokens.embedding"][tokens[0]])).sum(axis=-1)
    assert (grads[:6] > 0).all()
    assert (grads[6:] == 0).all()


def test_local_layers_see_half_the_window_on_either_side():
    hf = MODERNBERT | {"layer_types": ["sliding_attention"], "num_hidden_layers": 1}
    model, (doc,) = make(hf), documents(12)
    for distance, same in ((3, False), (4, True)):
        other = doc.copy()
        other[distance] = (doc[distance] + 1) % 40
        assert np.array_equal(logits(model, doc)[0], logits(model, other)[0]) == same
    config = families.read(MODERNBERT)[1]
    assert (config.windows, config.rope_of) == ((0, 3, 3), (0, 1, 1))
    assert [rope.theta for rope in config.ropes] == [160000.0, 10000.0]


def test_the_mean_is_that_of_the_documents_own_tokens():
    model, docs = make(CONFIGS["modernbert, mean"]), documents(5, 3)
    segments = jnp.asarray(packed(docs)[2])
    x_TD = np.random.default_rng(0).normal(size=(WIDTH, 12)).astype(np.float32)
    other_TD = x_TD.copy()
    other_TD[5:8] = x_TD[5:8].mean(axis=0)  # the same mean, told otherwise
    read = jax.jit(model.label_logits)
    found, wanted = (read(x[None], segments)[0, 5] for x in (x_TD, other_TD))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    other_TD[7] += 1
    assert np.abs(found - read(other_TD[None], segments)[0, 5]).max() > 1e-2


def test_types_are_added_and_the_models_that_want_them_say_so():
    model, (doc,) = make(BERT), documents(6)
    ones = np.ones((1, WIDTH), np.int32)
    assert np.abs(logits(model, doc) - logits(model, doc, types=ones)).max() > 1e-2
    typed = {name: families.read(hf)[1].typed_pairs for name, hf in CONFIGS.items()}
    assert [name for name, given in typed.items() if given] == ["bert"]


def test_positions_of_roberta_begin_behind_the_padding_row():
    hf = CONFIGS["roberta"]
    config = families.read(hf)[1]
    assert (config.position_offset, config.max_position) == (2, 30)
    model, docs = make(hf), documents(4)
    graphdef, params = tree.split(model)

    @jax.jit
    def logit(table):
        changed = params | {"embed_positions.embedding": table}
        return _logits(graphdef, changed, *packed(docs), None)[0].sum()

    grads = np.abs(jax.grad(logit)(params["embed_positions.embedding"])).sum(axis=-1)
    assert np.flatnonzero(grads).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_leaf_has_a_tensor_of_its_own(name):
    family, config = families.read(CONFIGS[name])
    leaves = tree.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))[1]
    names = [tensor for path in leaves for _, tensor in family.slots(path, config)]
    assert len(names) == len(set(names))
    heads = [path for path in leaves if path.startswith(family.heads)]
    assert {"head.dense.kernel", "classifier.kernel", "classifier.bias"} <= {*heads}
    assert all(path.startswith(("layers.", "embed_", "norm.")) for path in leaves.keys() - heads)


def test_old_names_and_bare_files_are_recognised():
    family, config = families.read(BERT)
    leaves = tree.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))[1]
    canonical = {tensor for path in leaves for _, tensor in family.slots(path, config)}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in canonical
    }
    bare_old = {n.removeprefix("bert.") for n in old if n.startswith("bert.")}
    for stored in (canonical, old, bare_old, {n.removeprefix("bert.") for n in canonical}):
        found = family.on_disk(stored)
        names = {tensor for path in leaves for _, tensor in found.slots(path, config)}
        assert names >= stored
        assert names - stored <= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"is_decoder": True}, "config.json has is_decoder True"),
        ({"pooler_type": "mean"}, "pooler_type"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"rotary": 3}, "rotary 3"),
        ({"model_type": "modernbert", "layer_types": ["linear"] * 3}, "'linear'"),
        ({"model_type": "modernbert", "classifier_pooling": "max"}, "max"),
        (
            {
                "model_type": "modernbert",
                "rope_parameters": {"full_attention": {"rope_type": "yarn"}},
            },
            "yarn",
        ),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(changes, why):
    with pytest.raises(ModelError) as caught:
        families.read(BERT | changes)
    assert why in caught.value.what


def test_fields_of_published_configs_that_change_nothing_are_known():
    published = {
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "directionality": "bidi",
        "position_embedding_type": "absolute",
        "output_past": True,
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": 0.1,
        "gradient_checkpointing": False,
        "use_cache": True,
    }
    for name in ("bert", "roberta", "xlm-roberta"):
        families.read(CONFIGS[name] | published)
    old = {"tie_weights_": True, "sinusoidal_pos_embds": True, "seq_classif_dropout": 0.2}
    families.read(DISTILBERT | old)
    modern = {"global_rope_theta": 160000.0, "local_rope_theta": 5000.0, "reference_compile": True}
    config = families.read(MODERNBERT | modern)[1]
    assert [rope.theta for rope in config.ropes] == [160000.0, 5000.0]


def test_all_families_of_the_table_are_here():
    assert BIDIRECTIONAL.keys() <= CONFIGS.keys()
