"""Tests the Hopper kernels of the index scores' gradients: interpreted and lowered on a CPU, for real when `gpu`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, normal, random_range, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import f64

from dsa_jax import KeyRange
from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES, SMEM_GRANULE_BYTES
from dsa_jax.pallas_kernels.index_scores.backward import (
    TILE_ROWS,
    index_scores_backward,
    make_key_plan,
    make_query_plan,
    make_ranges,
    why_not,
)
from dsa_jax.pallas_kernels.index_scores.backward_pipeline import (
    COMPUTE_REGISTERS,
    COMPUTE_WARPGROUPS,
    PRODUCER_REGISTERS,
    smem_bytes,
)
from dsa_jax.pallas_kernels.index_scores.forward import DIMS, HEADS


def inputs(seed, b, t, s, j, e, *, scaled=True, keys=None) -> tuple:
    """Scores' gradients are NaN out of reach; keys that nobody reaches are 0."""
    keys = random_range(seed + 5, b, t, s) if keys is None else keys
    reach = np.asarray(keys.mask(s))
    q, k = normal(seed, b, t, j, e, dtype="bfloat16"), normal(seed + 1, b, s, e, dtype="bfloat16")
    k = jnp.where(reach.any(axis=1)[..., None], k, 0)
    d_scores = jnp.where(reach, normal(seed + 2, b, t, s), jnp.nan)
    k_scale = normal(seed + 3, b, s) if scaled else None
    return q, k, normal(seed + 4, b, t, j), d_scores, keys.start, keys.stop, k_scale


def expected(q, k, w, d_scores, start, stop, k_scale=None):
    """Computes the gradients in float64."""
    keys = KeyRange(start, stop)
    b, t, j, e = q.shape
    size = k.shape[1]
    q, k, w = f64(q).reshape(b, t * j, e), f64(k), f64(w)
    g = np.where(np.asarray(keys.mask(size)), f64(d_scores), 0.0) * (1 if k_scale is None else f64(k_scale)[:, None])
    logits = (q @ k.transpose(0, 2, 1)).reshape(b, t, j, size)
    d_logits = (g[:, :, None] * w[..., None] * (logits > 0)).reshape(b, t * j, size)
    d_weights = (np.maximum(logits, 0) @ g[..., None])[..., 0]
    return (d_logits @ k).reshape(b, t, j, e), d_logits.transpose(0, 2, 1) @ q, d_weights


def error(actual, expected):
    return np.linalg.norm(f64(actual) - expected) / np.linalg.norm(expected)


def compare(results, arguments, total=None):
    """Holds results against float64: 5e-3 is what rounding g to bfloat16 takes; d_weights is float32 throughout."""
    q, k, w, *_ = arguments
    want_q, want_k, want_w = expected(*arguments)
    want_k = want_k if total is None else want_k + f64(total)
    for got, like, dtype in zip(results, (q, k, w), ("bfloat16", "float32", "float32"), strict=True):
        chex.assert_shape(got, like.shape)
        assert got.dtype == dtype
    assert error(results[0], want_q) <= 5e-3
    assert error(results[1], want_k) <= 5e-3
    assert error(results[2], want_w) <= 1e-5


@functools.partial(jax.jit, static_argnames="interpret")
def compiled(q, k, w, d_scores, start, stop, k_scale=None, total=None, interpret=False):
    return index_scores_backward(q, k, w, d_scores, start, stop, k_scale, total=total, interpret=interpret)


def abstract(b, t, s, j, e, dtype="bfloat16"):
    shapes = (
        ((b, t, j, e), dtype), ((b, s, e), dtype), ((b, t, j), "float32"), ((b, t, s), "float32"),
        ((b, t), "int32"), ((b, t), "int32"),
    )  # fmt: skip
    return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes)


def test_gradients_in_the_interpreter():
    """Two batch rows of an odd length, the last tile of keys ragged, an empty range among the others, a total.

    There are more tiles than stages, 5 of d_k for each of the two thread blocks, the second of which continues a block
    of keys that the first began.
    """
    edge = [[[0, 150], [10, 140], [150, 20], [7, 150], [1, 150]], [[0, 0], [0, 0], [100, 150], [3, 90], [30, 149]]]
    start, stop = np.moveaxis(np.asarray(edge, np.int32), 2, 0)
    arguments = inputs(0, 2, 5, 150, 64, 64, keys=KeyRange(array(start), array(stop)))
    total = normal(9, 2, 150, 64)
    results = compiled(*arguments, total=total, interpret=True)
    compare(results, arguments, total)
    np.testing.assert_array_equal(f64(results[0])[0, 2], 0)
    np.testing.assert_array_equal(f64(results[2])[1, 0], 0)


@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (32, 128), (16, 64)])
def test_lowers_for_cuda(heads, dim):
    arguments = abstract(2, 301, 1003, heads, dim)
    scale, total = (jax.ShapeDtypeStruct(x, jnp.float32) for x in ((2, 1003), (2, 1003, dim)))
    call = jax.jit(lambda *x: index_scores_backward(*x[:7], total=x[7]))
    text = call.trace(*arguments, scale, total).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@settings(max_examples=4)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 900), st.sampled_from(HEADS), st.integers(0, 99))
def test_the_query_plan_has_every_group_once_the_longest_first(b, t, s, heads, seed):
    keys, queries = random_range(seed, b, t, s), 128 // heads
    plan = jax.jit(lambda start, stop: make_query_plan(make_ranges(start, stop, s, queries), queries, s))
    reach = np.pad(np.asarray(keys.mask(s)), ((0, 0), (0, -t % queries), (0, -s % TILE_ROWS)))
    reached = reach.reshape(-1, queries, reach.shape[2] // TILE_ROWS, TILE_ROWS).any(axis=(1, 3))
    order, first, count = map(np.asarray, plan(keys.start, keys.stop))
    np.testing.assert_array_equal(np.sort(order), np.arange(len(reached)))
    assert (np.diff(count[order]) <= 0).all()
    for group, row in enumerate(reached):
        used = np.flatnonzero(row)
        assert count[group] == (used[-1] - used[0] + 1 if used.size else 0)
        assert not used.size or first[group] == used[0]


@settings(max_examples=4)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 900), st.integers(1, 12), st.integers(0, 99))
def test_the_key_plan_gives_every_part_of_a_key_block_to_one_thread_block(b, t, s, blocks, seed):
    keys, queries, rows = random_range(seed, b, t, s), 2, TILE_ROWS
    plan = jax.jit(lambda start, stop: make_key_plan(make_ranges(start, stop, s, queries), b, queries, s, blocks))
    first, offset, continued = map(np.asarray, plan(keys.start, keys.stop))
    reach = np.pad(np.asarray(keys.mask(s)), ((0, 0), (0, -t % queries), (0, -s % rows)))
    reached = reach.reshape(b, -1, queries, reach.shape[2] // rows, rows).any(axis=(2, 4)).transpose(0, 2, 1)
    for block, row in enumerate(reached.reshape(-1, reached.shape[2])):
        used, count = np.flatnonzero(row), offset[block + 1] - offset[block]
        if used.size:  # by hulls of a tile's queries, so some more may be met
            assert first[block] <= used[0] and first[block] + count >= used[-1] + 1
    each, rest = divmod(int(offset[-1]), blocks)
    begins = [i * each + min(i, rest) for i in range(blocks)]
    for block in range(len(first)):
        inside = [i for i, begin in enumerate(begins) if offset[block] < begin < offset[block + 1]]
        assert list(range(*continued[block])) == inside


def test_fits_the_multiprocessor():
    for heads in HEADS:
        assert smem_bytes(heads, 128) <= SMEM_BYTES - SMEM_GRANULE_BYTES


def test_registers_are_those_of_the_launch():
    assert COMPUTE_REGISTERS % 8 == 0 and PRODUCER_REGISTERS % 8 == 0 and PRODUCER_REGISTERS >= 24
    threads = 128 * (COMPUTE_WARPGROUPS + 1)
    assert COMPUTE_WARPGROUPS * COMPUTE_REGISTERS + PRODUCER_REGISTERS <= (COMPUTE_WARPGROUPS + 1) * (
        65536 // threads // 8 * 8
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 8, 48, 128), "bfloat16", "J must be one of"),
        ((1, 2, 8, 64, 96), "bfloat16", "E must be one of"),
        ((1, 2, 8, 64, 128), "float8_e4m3fn", "must be bfloat16, got float8_e4m3fn"),
        ((1, 0, 8, 64, 128), "bfloat16", "must not be empty"),
        ((1, 2**26, 8, 64, 128), "bfloat16", "B·T·J and B·S·E must be below"),
    ],
)
def test_says_why_it_cannot(shape, dtype, message):
    arguments = abstract(*shape, dtype=dtype)
    assert why_not(*abstract(1, 2, 8, 64, 128)) is None
    with pytest.raises(ValueError, match=message):
        index_scores_backward(*arguments)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 64, 128), "q_index must be \\[B, T, J, E\\]"),
        (1, (1, 8, 64), "k_index must be \\[1, S, 128\\]"),
        (2, (1, 2, 32), "weights must be float32 \\(1, 2, 64\\)"),
        (3, (1, 2, 9), "d_scores must be float32 \\(1, 2, 8\\)"),
        (4, (1, 3), "start must be int32 \\(1, 2\\)"),
        (5, (2, 2), "stop must be int32 \\(1, 2\\)"),
        (6, (1, 9), "k_scale must be float32 \\(1, 8\\)"),
        (7, (1, 8, 64), "total must be float32 \\(1, 8, 128\\)"),
    ],
)
def test_refuses_mismatched_arrays(position, shape, message):
    arguments = [*abstract(1, 2, 8, 64, 128), None, None]
    dtype = jnp.float32 if position >= 6 or arguments[position] is None else arguments[position].dtype
    arguments[position] = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=message):
        index_scores_backward(*arguments[:7], total=arguments[7])


# On the card


@pytest.mark.gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_gradients_on_the_card(heads, dim):
    for seed, (b, t, s) in enumerate([(1, 1, 1), (2, 37, 1031), (1, 300, 257), (3, 9, 64), (1, 1, 5000)]):
        keys = KeyRange(jnp.zeros((b, t), jnp.int32), jnp.full((b, t), s)) if t == 1 else None
        arguments = inputs(seed, b, t, s, heads, dim, scaled=seed % 2 == 1, keys=keys)
        compare(compiled(*arguments), arguments)


@pytest.mark.gpu
def test_adds_to_a_total_on_the_card():
    arguments = inputs(1, 2, 45, 1000, 64, 128)
    total = normal(7, 2, 1000, 128)
    results = compiled(*arguments, total=total)
    compare(results, arguments, total)
    same_bits(results[1], total + compiled(*arguments)[1])


@pytest.mark.gpu
def test_empty_ranges_give_zeros_on_the_card():
    q, k, w, d_scores, start, _, k_scale = inputs(2, 1, 45, 1000, 64, 128)
    total = normal(7, 1, 1000, 128)
    d_q, d_k, d_w = compiled(q, k, w, jnp.full_like(d_scores, jnp.nan), start, start, k_scale, total)
    np.testing.assert_array_equal(f64(d_q), 0)
    np.testing.assert_array_equal(f64(d_w), 0)
    same_bits(d_k, total)


@pytest.mark.gpu
def test_ranges_may_exceed_the_keys_on_the_card():
    q, k, w, _, _, _, k_scale = inputs(3, 1, 4, 300, 64, 128)
    start = array([[-(2**31), 250, 2**31 - 1, -7]], jnp.int32)
    stop = array([[2**31 - 1, 301, -(2**31), 9]], jnp.int32)
    arguments = inputs(3, 1, 4, 300, 64, 128, keys=KeyRange(start, stop))
    compare(compiled(*arguments), arguments)


@pytest.mark.gpu
def test_the_same_bits_every_time_on_the_card():
    keys = KeyRange.causal(1, 1000, offset=19_000)
    arguments = inputs(4, 1, 1000, 20_000, 64, 128, keys=keys)
    first = compiled(*arguments)
    for _ in range(5):
        jax.tree.map(same_bits, compiled(*arguments), first)


@pytest.mark.gpu
def test_a_real_size_on_the_card():
    """A chunk of 128K tokens: d_q and d_weights of some queries, d_k of some keys, in float64."""
    t, s = 2048, 131_072
    a, b, c, d = jax.random.split(jax.random.key(0), 4)
    q, k = jax.random.normal(a, (1, t, 64, 128), jnp.bfloat16), jax.random.normal(b, (1, s, 128), jnp.bfloat16)
    w, d_scores = jax.random.normal(c, (1, t, 64)), jax.random.normal(d, (1, t, s))
    keys = KeyRange.causal(1, t, offset=s - t)
    d_q, d_k, d_w = compiled(q, k, w, d_scores, keys.start, keys.stop)
    queries = np.array([0, 1, 777, t - 1])
    want = expected(
        q[:, queries], k, w[:, queries], d_scores[:, queries], keys.start[:, queries], keys.stop[:, queries]
    )
    assert error(d_q[:, queries], want[0]) <= 5e-3 and error(d_w[:, queries], want[2]) <= 1e-5
    positions = np.array([0, 1, 65_536, s - t - 1, s - t, s - 1])
    reach = np.asarray(keys.mask(s))[0][:, positions]
    logits = (f64(q[0]).reshape(t * 64, 128) @ f64(k[0][positions]).T).reshape(t, 64, len(positions))
    d_logits = np.where(reach, f64(d_scores[0][:, positions]), 0)[:, None] * f64(w[0])[..., None] * (logits > 0)
    assert error(d_k[0][positions], d_logits.reshape(t * 64, -1).T @ f64(q[0]).reshape(t * 64, 128)) <= 5e-3
