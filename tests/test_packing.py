"""Packing: every target once, documents apart, rows within width."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.packing import Example, best_fit, digest, fit_length, pack


def example(tokens, mask=None, where="f:1") -> Example:
    mask = [True] * len(tokens) if mask is None else mask
    return Example(np.array(tokens, np.int32), np.array(mask, bool), where)


def test_a_row_of_two_documents_is_laid_out_as_the_module_draws_it():
    first = example([1, 7, 8, 9, 2], [False, False, True, True, True])
    second = example([1, 5, 2], [True, True, True])
    batch = pack([[first, second]], 10, True).batch([0])
    assert batch.tokens.tolist() == [[1, 7, 8, 9, 2, 1, 5, 2, 0, 0]]
    assert batch.targets.tolist() == [[7, 8, 9, 2, 0, 5, 2, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert [a.dtype.name for a in batch[:5]] == ["int32", "int32", "float32", "int32", "int32"]
    assert batch.types is None


def test_unpacked_rows_hold_one_document_each_and_share_a_width():
    rows = pack([[example([1] * 70), example([2] * 3)]], 1000, False)
    batch = rows.batch([0, 1])
    assert rows.width == 128  # the longest, in steps of 64
    assert batch.tokens.shape == (2, 128)
    assert batch.segments.max(axis=1).tolist() == [1, 1]
    assert pack([[example([1] * 70)]], 100, False).width == 100  # never over max_length


def test_rows_beyond_the_given_ones_are_padding_without_weight():
    batch = pack([[example([1, 2, 3])]], 8, True).batch([0], size=3)
    assert batch.tokens.shape == (3, 8)
    assert batch.weights.sum(axis=1).tolist() == [2, 0, 0]
    assert not batch.segments[1:].any()


def test_best_fit_decreasing_fills_the_fullest_row_that_still_fits():
    # 6, 5, 4, 3, 2: 6 opens a row; 5 another; 4 fits beside 6 exactly; 3 and 2 beside 5 exactly.
    assert best_fit([3, 4, 5, 6, 2], 10) == [[1, 3], [0, 2, 4]]


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 90))
def test_every_document_is_in_exactly_one_row_and_no_row_is_too_full(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= capacity for members in bins)
    # No two rows could be one: best fit never leaves two rows half empty.
    assert sum(sum(lengths[i] for i in members) * 2 <= capacity for members in bins) <= 1


documents = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=30), max_size=12
)


@given(documents, st.booleans())
def test_batches_hold_each_documents_tokens_targets_and_weights_once(raw, packing):
    examples = [example([t for t, _ in doc], [m for _, m in doc]) for doc in raw]
    rows = pack([examples], 32, packing)
    found = []
    for row in range(len(rows)):
        batch = rows.batch([row])
        for segment in range(1, batch.segments.max() + 1):
            at = np.flatnonzero(batch.segments[0] == segment)
            tokens, n = batch.tokens[0, at].tolist(), len(at)
            assert batch.positions[0, at].tolist() == list(range(n))
            assert batch.targets[0, at].tolist() == [*tokens[1:], 0]
            found.append((tokens, batch.weights[0, at].tolist()))
        padding = batch.segments[0] == 0
        assert not batch.tokens[0, padding].any()
        assert not batch.weights[0, padding].any()
    wanted = [(e.tokens.tolist(), [*e.mask[1:].astype(float).tolist(), 0.0]) for e in examples]
    assert sorted(found) == sorted(wanted)
    assert rows.loss_tokens == sum(e.loss_tokens for e in examples)


def test_too_long_is_dropped_cut_or_split():
    long = example([1, 2, 3, 4, 5, 6, 7])
    assert fit_length(long, 3, "drop") == []
    assert [e.tokens.tolist() for e in fit_length(long, 3, "cut")] == [[1, 2, 3]]
    assert [e.tokens.tolist() for e in fit_length(long, 3, "split")] == [
        [1, 2, 3],
        [3, 4, 5],
        [5, 6, 7],
    ]
    assert fit_length(long, 7, "drop") == [long]


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(2, 20))
def test_split_windows_predict_every_target_exactly_once(mask, max_length):
    whole = example(list(range(len(mask))), mask)
    windows = fit_length(whole, max_length, "split")
    assert all(2 <= len(w.tokens) <= max_length for w in windows)
    predicted = [
        (int(t), bool(m)) for w in windows for t, m in zip(w.tokens[1:], w.mask[1:], strict=True)
    ]
    assert predicted == [(n, mask[n]) for n in range(1, len(mask))]


def test_digest_tells_apart_whatever_changes_a_batch():
    base = [[example([1, 2, 3]), example([4, 5])]]
    others = [
        pack([[example([1, 2, 9]), example([4, 5])]], 8, True),  # a token
        pack([[example([1, 2, 3], [True, True, False]), example([4, 5])]], 8, True),  # a mask
        pack([[example([1, 2]), example([3, 4, 5])]], 8, True),  # a boundary
        pack(base, 8, False),  # what stands together
        pack(base, 9, True),  # the width
        pack([base[0][:1], base[0][1:]], 8, True, (1.0, 2.0)),  # the mix
    ]
    digests = {digest(rows) for rows in [pack(base, 8, True), *others]}
    assert len(digests) == 7
    assert digest(pack(base, 8, True)) == digest(pack(base, 8, True))
