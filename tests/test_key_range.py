"""KeyRange: the only mask."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax import KeyRange
from dsa_jax.key_range import check_keys


def edges(keys):
    return np.asarray(keys.start).tolist(), np.asarray(keys.stop).tolist()


def test_causal_reaches_itself_and_all_before():
    assert edges(KeyRange.causal(2, 3)) == ([[0, 0, 0]] * 2, [[1, 2, 3]] * 2)


def test_causal_offset_shifts_the_stop_by_the_keys_that_precede():
    assert edges(KeyRange.causal(1, 3, offset=5)) == ([[0, 0, 0]], [[6, 7, 8]])
    assert edges(KeyRange.causal(2, 2, offset=jnp.array([0, 4]))) == ([[0, 0], [0, 0]], [[1, 2], [5, 6]])


def test_packed_is_causal_inside_each_run_of_equal_ids():
    keys = KeyRange.packed(jnp.array([[7, 7, 7, 2, 2, 7], [0, 1, 1, 1, 1, 1]]))
    assert edges(keys) == ([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]], [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])


def test_packed_padding_reaches_nothing_and_is_reached_by_nothing():
    keys = KeyRange.packed(jnp.array([[-1, 3, 3, -1, 4, -1]]))
    assert np.asarray(keys.nonempty()).tolist() == [[False, True, True, False, True, False]]
    assert np.asarray(keys.reached(6)).tolist() == [[False, True, True, False, True, False]]


def test_lengths_are_causal_over_real_tokens_only():
    keys = KeyRange.lengths(jnp.array([2, 0, 4]), 4)
    assert np.asarray(keys.nonempty()).tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    assert np.asarray(keys.mask(4)[0]).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize(
    "keys",
    [
        KeyRange.causal(2, 3, offset=1),
        KeyRange.packed(jnp.array([[1, 1, 2]])),
        KeyRange.lengths(jnp.array([2]), 3),
    ],
)
def test_edges_are_int32(keys):
    assert keys.start.dtype == keys.stop.dtype == jnp.int32
    chex.assert_equal_shape([keys.start, keys.stop])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(
        st.lists(st.tuples(st.integers(-3, 12), st.integers(-3, 12)), min_size=4, max_size=4), min_size=1, max_size=3
    ),
)
def test_mask_contains_nonempty_and_reached_agree_with_the_definition(size, pairs):
    """Any edges are legal: empty, reversed, negative, beyond the keys."""
    edge = np.array(pairs, np.int32)
    keys = KeyRange(jnp.asarray(edge[..., 0]), jnp.asarray(edge[..., 1]))
    expected = np.array([[[a <= s < z for s in range(size)] for a, z in row] for row in pairs])
    assert np.array_equal(keys.mask(size), expected)
    assert np.array_equal(keys.contains(jnp.arange(size)[::-1]), expected[..., ::-1])
    assert np.array_equal(keys.nonempty(), edge[..., 0] < edge[..., 1])
    assert np.array_equal(keys.reached(size), expected.any(1))


def test_it_is_a_pytree_that_survives_jit_vmap_scan_eval_shape_and_tree_maps():
    keys = KeyRange.causal(2, 3)
    assert len(jax.tree.leaves(keys)) == 2
    chex.assert_trees_all_equal(jax.jit(lambda x: x)(keys), keys)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), keys, KeyRange.causal(2, 3, offset=4))
    masks = jax.vmap(lambda x: x.mask(8))(stacked)
    assert np.array_equal(masks[0], keys.mask(8)) and masks.shape == (2, 2, 3, 8)
    per_row = jax.vmap(lambda x: x.mask(8))(KeyRange(keys.start[:, None], keys.stop[:, None]))
    assert np.array_equal(per_row[:, 0], keys.mask(8))
    shapes = jax.eval_shape(lambda x: x, keys)
    assert isinstance(shapes, KeyRange) and shapes.start.shape == (2, 3)
    _, scanned = jax.lax.scan(lambda c, x: (c, x.nonempty()), 0, stacked)
    assert scanned.shape == (2, 2, 3)
    assert jax.tree.leaves(jax.tree.map(lambda _: None, keys)) == []


def test_constructors_trace():
    traced = jax.jit(lambda ids, lengths: (KeyRange.packed(ids), KeyRange.lengths(lengths, 3)))
    packed, lengths = traced(jnp.array([[1, 1, 2]]), jnp.array([2]))
    chex.assert_trees_all_equal(packed, KeyRange.packed(jnp.array([[1, 1, 2]])))
    chex.assert_trees_all_equal(lengths, KeyRange.lengths(jnp.array([2]), 3))
    offset = jax.jit(lambda n: KeyRange.causal(1, 2, offset=n))(jnp.array([3]))
    assert edges(offset) == ([[0, 0]], [[4, 5]])


def test_numpy_arrays_are_accepted():
    array: Any = np.array
    assert edges(KeyRange.packed(array([[1, 1, 2]]))) == edges(KeyRange.packed(jnp.array([[1, 1, 2]])))
    assert edges(KeyRange.lengths(array([1]), 2)) == edges(KeyRange.lengths(jnp.array([1]), 2))
    assert edges(KeyRange.causal(1, 2, offset=array([1]))) == ([[0, 0]], [[2, 3]])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KeyRange.causal(1, -3), "length and offset must be at least 0, got -3 and 0"),
        (lambda: KeyRange.causal(1, 3, offset=-2), "at least 0, got 3 and -2"),
        (lambda: KeyRange.lengths(jnp.array([2.5]), 4), "lengths must be integers [B], got float32 [1]"),
        (
            lambda: check_keys(KeyRange(jnp.zeros((1, 8)), jnp.ones((1, 8))), 1, 8),
            "keys must hold integers, got float32",
        ),
    ],
)
def test_what_is_no_range_is_refused(make, words):
    with unchecked(), pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        setattr(KeyRange.causal(1, 2), "start", None)  # noqa: B010  the type checker knows better
