"""Labels and partitions on literal trees."""

import doctest

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=3, num_heads=2, num_kv_heads=1,
    head_dim=2, max_position=8,
)  # fmt: skip
PATHS = ["embed_tokens.embedding", "layers.0.mlp.up_proj.kernel", "layers.1.mlp.up_proj.kernel"]


def test_split_names_every_leaf_and_merge_undoes_it():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), stacks=((0, 1), (1, 3)))
    graphdef, params = tree.split(model)
    linears = {"self_attn.q_proj": (4, 4), "self_attn.k_proj": (4, 2), "self_attn.v_proj": (4, 2),
               "self_attn.o_proj": (4, 4), "mlp.gate_proj": (4, 6), "mlp.up_proj": (4, 6),
               "mlp.down_proj": (6, 4)}  # fmt: skip
    expected = {"embed_tokens.embedding": (10, 4), "lm_head.embedding": (10, 4), "norm.scale": (4,)}
    for name, depth in (("0-0", 1), ("1-2", 2)):
        for linear, shape in linears.items():
            expected[f"layers.{name}.{linear}.kernel"] = (depth, *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"layers.{name}.{norm}.scale"] = (depth, 4)
    assert {path: leaf.shape for path, leaf in params.items()} == expected
    again = tree.split(tree.merge(graphdef, params))[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))


def test_layer_paths():
    assert tree.layer_paths("layers.1-2.a.kernel") == ["layers.1.a.kernel", "layers.2.a.kernel"]
    assert tree.layer_paths("norm.scale") == ["norm.scale"]
    assert tree.layer_range("layers.4-6.x") == range(4, 7)
    assert tree.layer_range("norm.scale") is None


def test_first_matching_rule_wins():
    rules = ((r"layers\.0\.", "frozen"), ("kernel", "train"), (".", "other"))
    assert tree.label(PATHS, rules) == {
        "embed_tokens.embedding": "other",
        "layers.0.mlp.up_proj.kernel": "frozen",
        "layers.1.mlp.up_proj.kernel": "train",
    }


@pytest.mark.parametrize(
    ("rules", "defaults", "said"),
    [
        ((("kernel", "train"),), (), "no rule covers embed_tokens.embedding"),
        (
            (("typo", "train"),),
            ((".", "frozen"),),
            "'typo' -> 'train' decides nothing: it",
        ),
        (((".", "a"), ("kernel", "b")), (), "earlier rules take all it matches"),
        ((("(", "a"),), (), "not a regular expression"),
    ],
)
def test_rules_that_decide_nothing_or_leave_gaps_stop(rules, defaults, said):
    with pytest.raises(ConfigError) as caught:
        tree.label(PATHS, rules, defaults)
    assert said in caught.value.line()


def test_a_dead_rule_names_what_there_is():
    with pytest.raises(ConfigError, match=r"embed_tokens\.embedding, layers\.N\.mlp\.up_proj"):
        tree.label(PATHS, (("typo", "train"),), ((".", "frozen"),))


def test_partition():
    params = {"a": 1, "b": 2, "c": 3}
    labels = {"a": "frozen", "b": "kernel", "c": "norm"}
    assert tree.partition(params, labels) == ({"b": 2, "c": 3}, {"a": 1})


def test_stack_labels():
    labels = {"layers.0.x": "a", "layers.1.x": "a", "y": "b"}
    assert tree.stack_labels(["layers.0-1.x", "y"], labels) == {"layers.0-1.x": "a", "y": "b"}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_stacks_are_the_longest_runs(signatures):
    runs = tree.stacks(len(signatures), lambda i: signatures[i])
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(len(signatures)))
    assert all(len(set(signatures[start:stop])) == 1 for start, stop in runs)
    joints = [start for start, _ in runs[1:]]
    assert all(signatures[start - 1] != signatures[start] for start in joints)


def test_docstring_examples():
    result = doctest.testmod(tree)
    assert result.attempted > 0
    assert result.failed == 0
