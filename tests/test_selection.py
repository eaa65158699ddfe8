"""Selections: canonical, exact, and the same whatever the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import (
    FP8,
    array,
    as_numpy,
    causal_range,
    index_inputs,
    integers,
    keys_of,
    normal,
    poison,
    random_range,
    same_bits,
    scores_of,
    the_first,
    topk_of,
    unchecked,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax import KeyRange, index_scores, select_keys, select_topk

INF, NAN = np.inf, np.nan


def topk(row, k):
    return np.asarray(topk_of(array([[row]], "float32"), k))[0, 0].tolist()


@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([1, 5, 3, 4], 2, [1, 3]),
        ([5, 1, 4], 2, [0, 2]),  # positions ascend, whatever the order of the scores
        ([2, 2, 2, 2], 2, [0, 1]),  # ties: the lowest position
        ([1, 2, 1, 2, 1], 3, [0, 1, 3]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),  # −0.0 equals +0.0
        ([0.0, -0.0, 0.0], 1, [0]),
        ([-0.0, 0.0], 1, [0]),
        ([-INF, 1, -INF], 2, [1, -1]),  # −inf is never selected
        ([NAN, 1, NAN, 0], 3, [1, 3, -1]),  # nor is NaN
        ([-NAN, NAN, -INF], 2, [-1, -1]),
        ([INF, 1, INF], 2, [0, 2]),  # +inf may be
        ([3, 1], 5, [0, 1, -1, -1, -1]),  # k may exceed S
        ([-1e38, -3e38, 3e38], 2, [0, 2]),
        ([-1, -2, -3], 2, [0, 1]),
        ([7], 1, [0]),
    ],
)
def test_literal_rows(row, k, expected):
    assert topk(row, k) == expected


@pytest.mark.parametrize("value", [1.0, -1.0, 3e38, -3e38, 0.1])
def test_one_ulp_decides_and_equal_bits_go_to_the_lowest_position(value):
    x = np.float32(value)
    up = np.nextafter(x, np.float32(INF))
    assert topk([x, up, x, up], 1) == [1]
    assert topk([x, up, x, up], 2) == [1, 3]
    assert topk([x, up, x, up], 3) == [0, 1, 3]


def test_subnormal_scores_are_not_zero():
    """Comparisons in float32 may flush them; a selection is exact."""
    tiny = np.float32(1e-45)
    assert topk([0.0, tiny, -tiny, 2 * tiny], 1) == [3]
    assert topk([-tiny, 0.0, -tiny], 1) == [1]


def test_ranges_and_absent_keys():
    keys = KeyRange(jnp.array([[1, 2, 3, -5]]), jnp.array([[3, 2, 99, 1]]))
    scores = array(np.broadcast_to([9.0, 1.0, 2.0, 3.0], (1, 4, 4)))
    assert np.asarray(topk_of(scores, 2, keys))[0].tolist() == [[1, 2], [-1, -1], [3, -1], [0, -1]]


SPECIAL = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 0.5, float(np.nextafter(np.float32(1), np.float32(2)))]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([(1, 1, 1), (1, 3, 5), (2, 2, 12), (1, 2, 40)]), st.sampled_from([1, 3, 8, 50]))
def test_hostile_rows_against_the_definition(data, shape, k):
    """A fixed set of shapes, since each compiles; the values are free and full of ties."""
    b, t, s = shape
    scores = np.array(data.draw(st.lists(SPECIAL, min_size=b * t * s, max_size=b * t * s)), np.float32).reshape(shape)
    edge = np.array(data.draw(st.lists(st.integers(-1, s + 1), min_size=2 * b * t, max_size=2 * b * t))).reshape(
        b, t, 2
    )
    everything = reference.reachable(np.zeros((b, t)), np.full((b, t), s), s)
    assert np.array_equal(topk_of(scores, k), reference.select_topk(scores, k, everything))
    keys = KeyRange(array(edge[..., 0], jnp.int32), array(edge[..., 1], jnp.int32))
    rows = reference.reachable(keys.start, keys.stop, s)
    assert np.array_equal(topk_of(scores, k, keys), reference.select_topk(scores, k, rows))


@pytest.mark.parametrize("distinct", [3, 50, 10**6])
@pytest.mark.parametrize(("t", "s", "k"), [(3, 1000, 64), (130, 257, 31), (5, 5000, 2048)])
def test_long_rows_against_the_definition(t, s, k, distinct):
    scores = np.random.default_rng(0).integers(-distinct, distinct, (1, t, s)).astype(np.float32) / 7
    keys = causal_range(1, t, s - t)
    expected = reference.select_topk(scores, k, reference.reachable(keys.start, keys.stop, s))
    same_bits(topk_of(scores, k, keys), expected)


def test_selections_are_int32_strictly_increasing_then_minus_one():
    indices = np.asarray(topk_of(normal(0, 2, 9, 33), 12, random_range(1, 2, 9, 33)))
    assert indices.dtype == np.int32 and indices.shape == (2, 9, 12)
    present = indices >= 0
    assert np.all(present[..., :-1] >= present[..., 1:])
    assert np.all((np.diff(indices) > 0) | ~present[..., 1:])


def test_a_selection_is_a_constant_to_gradients():
    """The gradient of the selected scores' sum is 1 at the selected and 0 elsewhere, none through the positions."""
    scores = normal(0, 1, 2, 5)
    gradient = jax.jit(jax.grad(lambda x: jnp.take_along_axis(x, select_topk(x, 2), -1).sum()))(scores)
    ranks = np.argsort(np.argsort(-np.asarray(scores)))
    np.testing.assert_array_equal(gradient, ranks < 2)


# select_keys


def expected_keys(q, k, w, keys, count, k_scale=None):
    rows = reference.reachable(keys.start, keys.stop, k.shape[1])
    return reference.select_topk(reference.index_scores(q, k, w, rows, k_scale).astype(np.float32), count, rows)


@pytest.mark.parametrize(
    ("t", "s", "count", "j"),
    the_first(3, [(9, 21, 6, 2), (65, 130, 16, 4), (4, 5, 9, 4), (9, 21, 6, 1), (3, 700, 40, 2), (3, 700, 40, 16)]),
)
def test_integer_keys_are_selected_exactly(t, s, count, j):
    """Integer scores are exact in any order and full of ties, so the selection must be the definition's."""
    make = lambda dtype: (integers(0, 2, t, j, 4, dtype=dtype), integers(1, 2, s, 4, dtype=dtype), integers(2, 2, t, j))
    q, k, w = make("float32")
    keys = causal_range(2, t, s - t)
    expected = expected_keys(q, k, w, keys, count)
    scores = np.sort(reference.index_scores(q, k, w, reference.reachable(keys.start, keys.stop, s)), -1)
    assert count >= s or np.any(scores[..., -count] == scores[..., -count - 1]), "no ties: the test shows nothing"
    for dtype in ("float32", "bfloat16", FP8):
        same_bits(keys_of(*make(dtype), keys, count), expected)


def test_relu_makes_ties_of_zeros_that_go_to_the_lowest_position():
    q, k, w = np.ones((1, 1, 2, 4)), -np.ones((1, 20, 4)), [[[2.0, -1.0]]]
    k[0, 13] = 1.0
    found = keys_of(array(q), array(k), array(w), KeyRange(jnp.array([[2]]), jnp.array([[20]])), 4)
    assert np.asarray(found)[0, 0].tolist() == [2, 3, 4, 13]


def test_future_keys_are_never_selected_when_few_are_reachable():
    q, k, w, _ = index_inputs(0, 1, 12, 12, 4, 8)
    indices = np.asarray(keys_of(q, k, w, causal_range(1, 12), 8))[0].tolist()
    for t, row in enumerate(indices[:8]):
        assert row == [*range(t + 1), *[-1] * (7 - t)]


@pytest.mark.parametrize(
    ("t", "s", "count", "j", "dtype"),
    the_first(
        4,
        [
            (33, 1100, 100, 4, "bfloat16"),
            (70, 333, 24, 4, "float32"),
            (5, 40, 64, 4, FP8),
            (1, 1, 1, 2, "bfloat16"),
            (33, 1100, 100, 2, "float32"),
            (33, 1100, 100, 16, "float32"),
            (33, 1100, 100, 16, "bfloat16"),
            (33, 1100, 100, 2, FP8),
            (33, 1100, 100, 16, FP8),
        ],
    ),
)
def test_select_keys_is_topk_of_the_scores_bitwise(t, s, count, j, dtype):
    q, k, w, scale = index_inputs(3, 2, t, s, j, 32, dtype)
    for keys in (causal_range(2, t, s - t), random_range(8, 2, t, s)):
        scores = scores_of(q, k, w, keys, scale)
        selected = keys_of(q, k, w, keys, count, scale)
        same_bits(selected, topk_of(scores, count))
        same_bits(selected, topk_of(scores, count, keys))


@pytest.mark.parametrize(("j", "dtype"), the_first(2, [(2, FP8), (4, "bfloat16"), (2, "float32"), (16, "float32")]))
def test_a_row_selects_the_same_in_every_layout(j, dtype):
    """Alone, in a batch, padded, in a longer buffer, under jit, inside a larger program."""
    b, t, s, e, count = 3, 45, 290, 16, 20
    q, k, w, scale = index_inputs(21, b, t, s, j, e, dtype)
    keys = causal_range(b, t, s - t)

    def select(q, k, w, start, stop, scale):
        return keys_of(q, k, w, KeyRange(jnp.asarray(start), jnp.asarray(stop)), count, scale)

    whole = np.asarray(select(q, k, w, keys.start, keys.stop, scale))
    same_bits(select_keys(q, k, w, keys, k=count, k_scale=scale), whole)
    q, k, w, keys, scale = as_numpy((q, k, w, keys, scale))

    def take(batch, rows):
        arrays = (q[batch, rows], k[batch], w[batch, rows], keys.start[batch, rows], keys.stop[batch, rows])
        return (*arrays, None if scale is None else scale[batch])

    for batch, rows in [(slice(2, 3), slice(44, 45)), (slice(0, 2), slice(7, 40))]:
        same_bits(select(*take(batch, rows)), whole[batch, rows])

    order = np.array([2, 0, 1])
    same_bits(select(*take(order, slice(0, t))), whole[order])

    grow, pad = ((0, 0), (0, 800)), ((0, 0), (3, 90))
    long = np.pad(k.astype(np.float32), (*grow, (0, 0)), constant_values=np.nan).astype(k.dtype)
    padded = np.asarray(
        select(
            np.pad(q, (*pad, (0, 0), (0, 0))),
            long,
            np.pad(w, (*pad, (0, 0))),
            np.pad(keys.start, pad),
            np.pad(keys.stop, pad),
            None if scale is None else np.pad(scale, grow),
        )
    )
    same_bits(padded[:, 3 : 3 + t], whole)
    assert np.all(padded[:, :3] == -1) and np.all(padded[:, 3 + t :] == -1)

    @jax.jit
    def step_by_step(q, w, start, stop):
        """Decode: one query at a time, in a scan, its scores part of a larger program."""

        def step(_, x):
            at = [v[:, None] for v in x]
            return None, select(at[0] * 1, k, at[1] * 1, at[2], at[3], scale)[:, 0]

        rows = [jnp.moveaxis(x, 1, 0) for x in (q, w, start, stop)]
        return jnp.moveaxis(jax.lax.scan(step, None, rows)[1], 0, 1)

    same_bits(step_by_step(q, w, keys.start, keys.stop), whole)


def test_packed_sequences_select_as_they_do_apart():
    q, k, w, _ = as_numpy(index_inputs(4, 1, 60, 60, 4, 16))
    packed = np.asarray(keys_of(q, k, w, jax.jit(KeyRange.packed)(np.array([[0] * 25 + [1] * 35], np.int32)), 8))
    first = keys_of(q[:, :25], k[:, :25], w[:, :25], causal_range(1, 25), 8)
    second = np.asarray(keys_of(q[:, 25:], k[:, 25:], w[:, 25:], causal_range(1, 35), 8))
    same_bits(packed[:, :25], first)
    same_bits(packed[:, 25:], np.where(second >= 0, second + 25, np.int32(-1)))


def test_nan_and_infinite_scores():
    """A NaN key that is reached is never selected; one that is not changes nothing."""
    q, k, w, _ = index_inputs(0, 1, 6, 30, 2, 8)
    keys = KeyRange(array(np.full((1, 6), 4), "int32"), array(np.full((1, 6), 28), "int32"))
    outside = ~((np.arange(30) >= 4) & (np.arange(30) < 28))[None]
    same_bits(keys_of(q, poison(k, outside), w, keys, 5), keys_of(q, k, w, keys, 5))
    reached = np.zeros((1, 30), bool)
    reached[0, [5, 9]] = True
    selected = np.asarray(keys_of(q, poison(k, reached), w, keys, 30))
    assert not np.isin(selected, [5, 9]).any() and (selected >= 0).sum() == 6 * 22


def test_numpy_arrays_are_accepted():
    q, k, w, scale = index_inputs(0, 2, 5, 9, 4, 8, FP8)
    keys = causal_range(2, 5)
    expected = select_keys(q, k, w, keys, k=3, k_scale=scale)
    scores = index_scores(q, k, w, keys, k_scale=scale)
    with unchecked():
        same_bits(select_keys(*as_numpy((q, k, w, keys)), k=3, k_scale=as_numpy(scale)), expected)
        same_bits(select_topk(as_numpy(scores), 3, keys=as_numpy(keys)), expected)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=rf"at least 1.*{k}"):
        select_topk(array(np.ones((1, 1, 4))), k)
    with pytest.raises(ValueError, match=rf"at least 1.*{k}"):
        select_keys(*(array(np.ones(shape)) for shape in ((1, 1, 2, 4), (1, 3, 4), (1, 1, 2))), causal_range(1, 1), k=k)


def test_mismatched_shapes_and_dtypes_are_named():
    with unchecked(), pytest.raises(ValueError, match="scores"):
        select_topk(np.ones((2, 3), np.float32), 1)
    with unchecked(), pytest.raises(ValueError, match="int32"):
        select_topk(np.ones((1, 2, 3), np.int32), 1)
    with unchecked(), pytest.raises(ValueError, match="(?s)keys.*5|5.*keys"):
        select_topk(np.ones((1, 2, 3), np.float32), 1, keys=causal_range(1, 5))
    with unchecked(), pytest.raises(ValueError, match="(?s)weights.*5|5.*weights"):
        select_keys(
            *(np.ones(shape, np.float32) for shape in ((1, 2, 4, 8), (1, 3, 8), (1, 2, 5))), causal_range(1, 2), k=1
        )


def test_implementation_insists_or_says_why_it_cannot():
    q, k, w, scale = index_inputs(0, 2, 5, 9, 4, 8, FP8)
    keys, scores = causal_range(2, 5), normal(0, 2, 5, 9)
    of_keys = functools.partial(select_keys, q, k, w, keys, k=3, k_scale=scale)
    of_scores = functools.partial(select_topk, scores, 3, keys=keys)
    same_bits(of_keys(implementation="xla"), of_keys())
    same_bits(of_scores(implementation="xla"), of_scores())
    for implementation, match in (("pallas", "(?i)cpu|gpu|hopper|sm_90|kernel"), ("cuda_magic", "cuda_magic")):
        with unchecked(), pytest.raises(ValueError, match=match):
            of_keys(implementation=implementation)
        with unchecked(), pytest.raises(ValueError, match=match):
            of_scores(implementation=implementation)
