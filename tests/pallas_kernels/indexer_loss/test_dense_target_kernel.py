"""Tests the Hopper kernel of the dense target: interpreted and lowered on a CPU, for real under the `gpu` marker."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INT_MAX, INT_MIN, array, normal, poison, random_range, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import f64

from dsa_jax import KeyRange
from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES, SMEM_GRANULE_BYTES
from dsa_jax.pallas_kernels.indexer_loss.dense_target import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    DIMS,
    KEY_SLOTS,
    TILE_KEYS,
    TILE_QUERIES,
    UNREACHED,
    WIDTH_TILES,
    dense_target,
    make_order,
    smem_bytes,
    why_not,
)

SCALE = 0.06


def inputs(seed, b, t, s, n, h) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes q, k and lse, where the first query has no keys and the middle one none for head 0."""
    q, k = normal(seed, b, t, n, h, dtype="bfloat16"), normal(seed + 1, b, s, n, h, dtype="bfloat16")
    lse = (3 + normal(seed + 2, b, t, n)).at[0, 0].set(-jnp.inf).at[:, t // 2, 0].set(-jnp.inf)
    return q, k, lse


def expected(q, k, lse, keys, scale=SCALE):
    """Computes the sums in float64, a head at a time."""
    q, k, lse = np.asarray(q), np.asarray(k), f64(lse)
    lse = np.where(lse == -np.inf, np.inf, lse)
    total = np.zeros((q.shape[0], q.shape[1], k.shape[1]))
    for n in range(q.shape[2]):
        total += np.exp(scale * f64(q[:, :, n]) @ f64(k[:, :, n]).swapaxes(1, 2) - lse[:, :, n, None])
    start, stop, key = np.asarray(keys.start)[..., None], np.asarray(keys.stop)[..., None], np.arange(k.shape[1])
    return np.where((start <= key) & (key < stop), total, 0)


def check(actual, q, k, lse, keys, scale=SCALE):
    """Holds the sums against float64: 1e-5 in the norm, and exact zeros where the definition has them."""
    wanted = expected(q, k, lse, keys, scale)
    chex.assert_shape(actual, wanted.shape)
    actual = np.asarray(actual)
    assert np.all(actual[wanted == 0] == 0)
    assert np.linalg.norm(actual - wanted) <= 1e-5 * np.linalg.norm(wanted)


@functools.partial(jax.jit, static_argnames=("clusters", "scale", "interpret"))
def compiled(q, k, lse, keys, clusters=None, scale=SCALE, interpret=False):
    return dense_target(q, k, lse, keys.start, keys.stop, scale=scale, clusters=clusters, interpret=interpret)


def abstract(b, t, s, n, h, dtype="bfloat16"):
    shapes = ((b, t, n, h), dtype), ((b, s, n, h), dtype), ((b, t, n), "float32"), ((b, t), "int32"), ((b, t), "int32")
    return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes)


# Anywhere.


def test_interpreted_equals_the_definition():
    """Two batch rows, neither length a multiple of anything, ranges of every kind, NaN where nobody looks.

    One cluster takes both tiles with 3 heads each, which is more keys than there are slots for.
    """
    q, k, lse = inputs(0, 2, 67, 141, 3, 64)
    edge = random_range(1, 2, 67, 100)
    start, stop = edge.start.at[1, 5:8].set(array([-9, 3, INT_MIN])), edge.stop.at[1, 5:8].set(array([9, 3, 1]))
    keys = KeyRange(start, stop)
    hidden = poison(k, jnp.broadcast_to(jnp.arange(141) >= 100, (2, 141)))
    sums = compiled(q, hidden, lse, keys, clusters=1, interpret=True)
    check(sums, q, k, lse, keys)


@pytest.mark.parametrize("dim", DIMS)
def test_lowers_for_cuda(dim):
    call = jax.jit(functools.partial(dense_target, scale=SCALE))
    text = call.trace(*abstract(2, 700, 40_003, 3, dim)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "tensor<2x700x40003xf32>" in text


@pytest.mark.parametrize("dim", DIMS)
def test_fits_the_multiprocessor(dim):
    assert KEY_SLOTS >= 2 * dim // 64  # two products
    assert smem_bytes(dim) <= SMEM_BYTES - SMEM_GRANULE_BYTES


def test_registers_are_those_of_the_launch():
    assert COMPUTE_REGISTERS % 8 == 0 and COPY_REGISTERS % 8 == 0 and COPY_REGISTERS >= 24
    assert 2 * COMPUTE_REGISTERS + COPY_REGISTERS <= 3 * (65536 // 384 // 8 * 8)


@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(1, 1500), st.integers(1, 1500), st.integers(0, 99))
def test_every_tile_is_listed_once_and_those_reached_first(b, t, s, seed):
    edge = np.random.default_rng(seed).integers(0, s + 1, (b, 2, 1))  # of a batch row, so that some tiles are empty
    low = array(np.broadcast_to(edge[:, 0], (b, t)), jnp.int32)
    count = array(np.broadcast_to(np.maximum(edge[:, 1] - edge[:, 0], 0), (b, t)), jnp.int32)
    numbers = np.asarray(jax.jit(functools.partial(make_order, size=s))(low, count))
    rows, blocks = b * -(-t // TILE_QUERIES), -(-s // TILE_KEYS)
    reached, numbers = numbers < UNREACHED, numbers % UNREACHED
    along_queries = numbers // (WIDTH_TILES * blocks) * WIDTH_TILES + numbers % WIDTH_TILES
    block = numbers // WIDTH_TILES % blocks
    assert sorted(zip(along_queries, block, strict=True)) == [(i, j) for i in range(rows) for j in range(blocks)]
    assert np.all(reached[:-1] >= reached[1:])
    row = along_queries // (rows // b)
    first, last = edge[row, 0, 0], edge[row, 1, 0] - 1
    wanted = (first <= last) & (first // TILE_KEYS <= block) & (block <= last // TILE_KEYS)
    np.testing.assert_array_equal(reached, wanted)


def test_causal_halves_the_tiles():
    stop = jnp.arange(1, 2049, dtype=jnp.int32)[None]
    numbers = jax.jit(functools.partial(make_order, size=2048))(jnp.zeros_like(stop), stop)
    assert int((numbers < UNREACHED).sum()) == 8 * 9 // 2


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 8, 4, 96), "bfloat16", "H must be one of"),
        ((1, 2, 8, 4, 64), "float32", "must be bfloat16, got float32"),
        ((1, 0, 8, 4, 64), "bfloat16", "must not be empty"),
        ((1, 2**24, 8, 128, 64), "bfloat16", "must be below 2\\^31"),
        ((1, 2**21, 2**21, 4, 64), "bfloat16", "B·T·S must be below"),
    ],
)
def test_says_why_it_cannot(shape, dtype, message):
    assert why_not(*abstract(1, 2, 8, 4, 192)) is None
    with pytest.raises(ValueError, match=message):
        dense_target(*abstract(*shape, dtype=dtype), scale=SCALE)


@pytest.mark.parametrize(
    ("position", "shape", "dtype", "message"),
    [
        (0, (2, 4, 64), "bfloat16", "q must be \\[B, T, N, H\\]"),
        (1, (1, 8, 2, 64), "bfloat16", "k must be \\[1, S, 4, 64\\]"),
        (2, (1, 2, 5), "float32", "lse must be float32 \\(1, 2, 4\\)"),
        (3, (1, 3), "int32", "start must be int32 \\(1, 2\\)"),
        (4, (1, 2), "float32", "stop must be int32 \\(1, 2\\), got float32"),
    ],
)
def test_refuses_mismatched_arrays(position, shape, dtype, message):
    arguments = list(abstract(1, 2, 8, 4, 64))
    arguments[position] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    with pytest.raises(ValueError, match=message):
        dense_target(*arguments, scale=SCALE)


# On the card.


def hostile_range(seed, b, t, s):
    """Makes ranges of every kind, some as far out of bounds as int32 goes."""
    keys = random_range(seed, b, t, s)
    far = [(INT_MIN, INT_MAX), (INT_MAX, INT_MIN), (0, s), (s - 1, INT_MAX), (-7, 1)][:t]
    start, stop = keys.start, keys.stop
    for i, (low, high) in enumerate(far):
        start, stop = start.at[-1, -1 - i].set(low), stop.at[-1, -1 - i].set(high)
    return KeyRange(start, stop)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(2, 300, 1031, 5), (1, 513, 2048, 8), (3, 129, 700, 3)])
def test_equals_the_definition_on_the_card(shape, dim):
    b, t, s, n = shape
    q, k, lse = inputs(0, b, t, s, n, dim)
    keys = hostile_range(1, b, t, s)
    check(compiled(q, k, lse, keys), q, k, lse, keys)


@pytest.mark.gpu
def test_a_query_and_a_key_on_the_card():
    q, k, _ = inputs(0, 1, 1, 1, 1, 192)
    lse, keys = jnp.zeros((1, 1, 1)), KeyRange.causal(1, 1)
    check(compiled(q, k, lse, keys), q, k, lse, keys)


@pytest.mark.gpu
def test_any_scale_on_the_card():
    q, k, lse = inputs(2, 1, 200, 300, 2, 64)
    keys = hostile_range(3, 1, 200, 300)
    for scale in (-0.1, 0.0):
        check(compiled(q, k, lse, keys, scale=scale), q, k, lse, keys, scale)


@pytest.mark.gpu
def test_nan_that_nobody_reaches_on_the_card():
    q, k, lse = inputs(4, 2, 300, 1000, 3, 192)
    keys = random_range(5, 2, 300, 500)
    hidden = poison(k, jnp.broadcast_to(jnp.arange(1000) >= 500, (2, 1000)))
    check(compiled(q, hidden, lse, keys), q, k, lse, keys)


@pytest.mark.gpu
def test_no_result_depends_on_the_clusters_on_the_card():
    q, k, lse = inputs(6, 1, 700, 1031, 5, 192)
    keys = hostile_range(7, 1, 700, 1031)
    whole = compiled(q, k, lse, keys)
    for clusters in (1, 5):
        same_bits(compiled(q, k, lse, keys, clusters=clusters), whole)


@pytest.mark.gpu
def test_the_real_size_on_the_card():
    """Compares four rows of T 2048, S 16384, N 128, causal; the whole is zero where it must be, and repeats."""
    t, s, n, h = 2048, 16_384, 128, 192
    random = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(random[0], (1, t, n, h), jnp.bfloat16)
    k = jax.random.normal(random[1], (1, s, n, h), jnp.bfloat16)
    keys = KeyRange.causal(1, t, offset=s - t)
    lse = jnp.log(1.0 * keys.stop)[..., None] + jax.random.normal(random[2], (1, t, n))
    whole = compiled(q, k, lse, keys)
    rows = np.array([0, 127, 1024, t - 1])
    check(whole[:, rows], q[:, rows], k, lse[:, rows], KeyRange(keys.start[:, rows], keys.stop[:, rows]))
    assert bool(jnp.all((whole == 0) == ~keys.mask(s)))
    assert all(bool(jnp.array_equal(whole, compiled(q, k, lse, keys))) for _ in range(10))
