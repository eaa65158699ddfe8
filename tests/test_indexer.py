"""Index scores (Eq. 1) against float64 NumPy, and their bits against every layout of the same row."""

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
    close,
    index_inputs,
    integers,
    normal,
    poison,
    powers,
    random_range,
    same_bits,
    scores_of,
    the_first,
    unchecked,
)

from dsa_jax import KeyRange, index_scores

SHAPES = [(1, 1, 1, 1, 1), (2, 7, 13, 2, 8), (1, 1, 300, 4, 16), (2, 131, 70, 16, 32), (1, 40, 1030, 4, 128)]


def expected_scores(q, k, w, keys, k_scale=None):
    rows = reference.reachable(keys.start, keys.stop, k.shape[1])
    return reference.index_scores(q, k, w, rows, k_scale)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, "float32") for s in SHAPES] + [(s, d) for s in SHAPES[3:] for d in ("bfloat16", FP8)]
)
def test_values_against_float64(shape, dtype):
    """Products of bfloat16 or e4m3 inputs are exact in float32, so one tolerance holds for every dtype."""
    b, t, s, j, e = shape
    q, k, w, k_scale = index_inputs(0, b, t, s, j, e, dtype)
    keys = random_range(3, b, t, s)
    scores = scores_of(q, k, w, keys, k_scale)
    assert scores.shape == (b, t, s) and scores.dtype == jnp.float32
    close(scores, expected_scores(q, k, w, keys, k_scale), 2e-5)


def test_literal_numbers():
    """J = 2: 2·relu(1·3 + 2·1) − 1·relu(−3 + 1) = 10; the second key is cut off by the ReLU in one head only."""
    q = jnp.array([[[[1.0, 2.0], [-1.0, 1.0]]]])
    k = jnp.array([[[3.0, 1.0], [-2.0, 0.5], [9.0, 9.0]]])
    scores = scores_of(q, k, jnp.array([[[2.0, -1.0]]]), KeyRange(jnp.array([[0]]), jnp.array([[2]])))
    assert scores.tolist() == [[[10.0, -2.5, -jnp.inf]]]


def test_unreachable_keys_score_minus_infinity_and_empty_rows_nothing_else():
    q, k, w, _ = index_inputs(0, 1, 3, 5, 2, 4)
    keys = KeyRange(jnp.array([[1, 4, 5]]), jnp.array([[3, 2, 9]]))
    finite = np.isfinite(np.asarray(scores_of(q, k, w, keys)))[0]
    assert finite.tolist() == [[False, True, True, False, False], [False] * 5, [False] * 5]


def test_small_integers_are_exact():
    w, keys = integers(2, 2, 9, 4), causal_range(2, 9, 12)
    for dtype in ("float32", "bfloat16", FP8):
        q, k = integers(0, 2, 9, 4, 8, dtype=dtype), integers(1, 2, 21, 8, dtype=dtype)
        scores = scores_of(q, k, w, keys)
        assert np.array_equal(scores, expected_scores(q, k, w, keys))


def test_key_scale_multiplies_the_head_sum():
    q, k, w, _ = index_inputs(0, 2, 5, 9, 4, 8)
    k_scale, keys = powers(7, 2, 9, spread=2), causal_range(2, 5, 4)
    plain, scaled = scores_of(q, k, w, keys), scores_of(q, k, w, keys, k_scale)
    same_bits(scaled, np.asarray(plain) * np.asarray(k_scale)[:, None])


@pytest.mark.parametrize("j", [2, 64])
def test_quantised_path_equals_the_dequantised_path_in_every_bit(j):
    """Scales are powers of two, so they commute with every rounding of float32."""
    q, k, w, k_scale = index_inputs(5, 2, 33, 150, j, 128, FP8)
    keys = causal_range(2, 33, 100)
    wide_k = np.asarray(k, np.float32) * np.asarray(k_scale)[..., None]
    wide = scores_of(array(q, "float32"), array(wide_k), w, keys)
    same_bits(scores_of(q, k, w, keys, k_scale), wide)


def test_gradients_of_the_reference_are_central_differences():
    q, k, w, _ = (None if x is None else reference.f64(x) for x in index_inputs(0, 1, 3, 4, 2, 3))
    keys, scale = causal_range(1, 3, 1), np.array([[1.0, 2.0, 0.5, 4.0]])
    rows, cotangent = reference.reachable(keys.start, keys.stop, 4), reference.f64(normal(5, 1, 3, 4))

    def total(q, k, w):
        scores = reference.index_scores(q, k, w, rows, scale)
        return (cotangent * np.where(np.isfinite(scores), scores, 0)).sum()

    gradients = reference.index_scores_vjp(q, k, w, rows, cotangent, scale)
    numeric = (
        reference.central_difference(lambda x: total(x, k, w), q),
        reference.central_difference(lambda x: total(q, x, w), k),
        reference.central_difference(lambda x: total(q, k, x), w),
    )
    for a, b in zip(gradients, numeric, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def score_gradients(q, k, w, keys, cotangent, k_scale=None):
    """By jax, of Σ cotangent · I over reachable pairs."""

    def total(q, k, w):
        scores = scores_of(q, k, w, keys, k_scale)
        return jnp.where(keys.mask(k.shape[1]), scores * cotangent, 0.0).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, w)


@pytest.mark.parametrize("shape", [(2, 7, 13, 2, 8), (1, 70, 300, 4, 16)])
def test_gradients_against_float64(shape):
    b, t, s, j, e = shape
    q, k, w, _ = index_inputs(0, b, t, s, j, e)
    keys, cotangent = random_range(3, b, t, s), normal(4, b, t, s)
    k_scale = powers(7, b, s)
    rows = reference.reachable(keys.start, keys.stop, s)
    expected = reference.index_scores_vjp(q, k, w, rows, cotangent, k_scale)
    for actual, want in zip(score_gradients(q, k, w, keys, cotangent, k_scale), expected, strict=True):
        close(actual, want, 2e-5)


def test_gradient_is_zero_where_the_logit_is_exactly_zero():
    q, k, one = array(np.zeros((1, 1, 1, 2))), array(np.ones((1, 1, 2))), array(np.ones((1, 1, 1)))
    dq, dk, dw = as_numpy(score_gradients(q, k, one, causal_range(1, 1), one))
    assert not np.any(dq) and not np.any(dk) and not np.any(dw)


def test_nan_in_unreached_keys_changes_nothing():
    """Values and gradients: the gradient of where(mask, relu(q·k), 0) alone would be NaN."""
    q, k, w, _ = index_inputs(0, 2, 5, 40, 4, 8)
    keys = KeyRange(jnp.array([[3, 5, 0, 7, 7], [20] * 5]), jnp.array([[6, 9, 0, 30, 7], [22] * 5]))
    absent = ~np.asarray(jax.jit(keys.mask, static_argnums=0)(40)).any(1)
    assert absent[:, [0, -1]].all()
    clean, dirty = poison(k, absent, 0.0), poison(k, absent)
    cotangent = normal(4, 2, 5, 40)
    same_bits(scores_of(q, dirty, w, keys), scores_of(q, clean, w, keys))
    for a, b in zip(
        score_gradients(q, dirty, w, keys, cotangent), score_gradients(q, clean, w, keys, cotangent), strict=True
    ):
        same_bits(a, b)
    dirty_scale = array(np.where(absent, np.nan, 2.0))
    same_bits(scores_of(q, dirty, w, keys, dirty_scale), 2 * np.asarray(scores_of(q, clean, w, keys)))


@pytest.mark.parametrize(("j", "dtype"), the_first(1, [(16, FP8), (4, "bfloat16"), (2, "float32")]))
def test_bits_do_not_depend_on_the_layout(j, dtype):
    """One row alone, in a batch, padded, in a longer buffer, at another place, jitted: the same bits."""
    b, t, s, e = 2, 70, 333, 32
    q, k, w, scale = index_inputs(11, b, t, s, j, e, dtype)
    keys = causal_range(b, t, s - t)
    scores = np.asarray(scores_of(q, k, w, keys, scale))
    same_bits(index_scores(q, k, w, keys, k_scale=scale), scores)

    q, k, w, scale, keys = as_numpy((q, k, w, scale, keys))
    row = slice(1, 2)
    own = jax.tree.map(lambda x: x[row], keys)
    of_row = None if scale is None else scale[row]
    same_bits(scores_of(q[row], k[row], w[row], own, of_row), scores[row])
    for at in (0, 31, t - 1):
        one = slice(at, at + 1)
        where = jax.tree.map(lambda x, one=one: x[:, one], own)
        same_bits(scores_of(q[row, one], k[row], w[row, one], where, of_row), scores[row, one])

    long = s + 900
    padded_k = np.concatenate([k, np.full((b, long - s, e), np.nan).astype(k.dtype)], 1)
    padded_scale = None if scale is None else np.pad(scale, ((0, 0), (0, long - s)))
    pad = ((0, 0), (5, 72))
    padded_q, padded_w = np.pad(q, (*pad, (0, 0), (0, 0))), np.pad(w, (*pad, (0, 0)))
    padded_keys = jax.tree.map(lambda x: np.pad(x, pad), keys)
    padded = np.asarray(scores_of(padded_q, padded_k, padded_w, padded_keys, padded_scale))
    same_bits(padded[:, 5 : 5 + t, :s], scores)
    assert np.all(padded[:, :, s:] == -np.inf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(q=(2, 5, 4, 9)), ["k_index", "9", "8"]),
        (dict(q=(3, 5, 4, 8)), ["3"]),
        (dict(q=(5, 4, 8)), ["q_index"]),
        (dict(k=(2, 9)), ["k_index"]),
        (dict(w=(2, 5, 3)), ["weights", "3"]),
        (dict(w=(2, 6, 4)), ["weights", "6"]),
        (dict(k_scale=(2, 8)), ["k_scale", "8"]),
        (dict(t=6), ["keys", "6"]),
    ],
)
def test_mismatched_shapes_are_named(change, words):
    shapes = dict(q=(2, 5, 4, 8), k=(2, 9, 8), w=(2, 5, 4), t=5) | change
    keys, k_scale = causal_range(2, shapes["t"]), shapes.get("k_scale")
    with unchecked(), pytest.raises(ValueError) as error:
        q, k, w = (np.ones(shapes[name], np.float32) for name in "qkw")
        index_scores(q, k, w, keys, k_scale=None if k_scale is None else np.ones(k_scale, np.float32))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("q", "k", "words"), [("float32", "bfloat16", ["float32", "bfloat16"]), ("int32", "int32", ["int32"])]
)
def test_mismatched_dtypes_are_named(q, k, words):
    with unchecked(), pytest.raises(ValueError) as error:
        ones = [array(np.ones(shape), dtype) for shape, dtype in (((1, 1, 1, 4), q), ((1, 2, 4), k))]
        index_scores(*ones, array(np.ones((1, 1, 1))), causal_range(1, 1))
    assert all(word in str(error.value) for word in words), error.value


def test_numpy_arrays_are_accepted():
    q, k, w, scale = index_inputs(0, 2, 5, 9, 4, 8, FP8)
    keys = causal_range(2, 5)
    with unchecked():
        numpy = index_scores(*as_numpy((q, k, w, keys)), k_scale=as_numpy(scale))
    same_bits(numpy, index_scores(q, k, w, keys, k_scale=scale))


def test_implementation_insists_or_says_why_it_cannot():
    q, k, w, scale = index_inputs(0, 2, 5, 9, 4, 8, FP8)
    call = functools.partial(index_scores, q, k, w, causal_range(2, 5), k_scale=scale)
    same_bits(call(implementation="xla"), call())
    with pytest.raises(ValueError, match="(?i)cpu|gpu|hopper|sm_90|kernel"):
        call(implementation="pallas")
    with unchecked(), pytest.raises(ValueError, match="cuda_magic"):
        call(implementation="cuda_magic")
