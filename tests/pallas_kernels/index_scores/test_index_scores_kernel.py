"""Tests the Hopper kernel of `index_scores`: interpreted and lowered on a CPU, for real under the `gpu` marker."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import FP8, array, as_numpy, causal_range, index_inputs, integers, poison, random_range, same_bits, the_first
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax import KeyRange
from dsa_jax import index_scores as definition
from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES
from dsa_jax.pallas_kernels.index_scores.forward import (
    DIMS,
    HEADS,
    Config,
    default_config,
    index_scores,
    make_plan,
    why_not,
)

SMALL = Config(warpgroups=2, tiles=1, stages=2)  # four queries of 64 heads a group, for the interpreter
CONFIGS = [
    Config(warpgroups=1, tiles=2, stages=1, q_slots=1),
    Config(warpgroups=3, tiles=1, stages=3),
]


def integer_inputs(seed, b, t, s, j, e, dtype) -> tuple:
    """Makes arguments with exact products and sums, so that the kernel must be exact too. Scales are powers of two."""
    q, k = integers(seed, b, t, j, e, dtype=dtype), integers(seed + 1, b, s, e, dtype=dtype)
    return q, k, integers(seed + 2, b, t, j), array(np.exp2(np.asarray(integers(seed + 3, b, s))))


def expected(q, k, w, keys, k_scale=None):
    rows = reference.reachable(keys.start, keys.stop, k.shape[1])
    return reference.index_scores(q, k, w, rows, k_scale)


@functools.partial(jax.jit, static_argnames=("config", "fill"))
def interpreted(q, k, w, keys, k_scale=None, *, config=SMALL, fill=True):
    options = dict(k_scale=k_scale, config=config, fill=fill, interpret=True)
    return index_scores(q, k, w, keys.start, keys.stop, **options)


@functools.partial(jax.jit, static_argnames=("config", "fill"))
def on_card(q, k, w, keys, k_scale=None, config=None, fill=True):
    return index_scores(q, k, w, keys.start, keys.stop, k_scale=k_scale, config=config, fill=fill)


def abstract(b, t, s, j, e, dtype=FP8):
    shapes = ((b, t, j, e), dtype), ((b, s, e), dtype), ((b, t, j), "float32"), ((b, t), "int32"), ((b, t), "int32")
    return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes)


def reaches(keys, size):
    return np.asarray(jax.jit(keys.mask, static_argnums=0)(size))


@pytest.mark.parametrize(
    ("shape", "dtype", "scaled"),
    the_first(
        1, [((2, 5, 70, 64, 64), FP8, True), ((2, 5, 70, 64, 64), "bfloat16", True), ((1, 5, 70, 32, 64), FP8, False)]
    ),
)
def test_equals_the_definition_where_sums_are_exact(shape, dtype, scaled):
    q, k, w, k_scale = integer_inputs(0, *shape, dtype=dtype)
    keys, k_scale = random_range(3, *shape[:3]), k_scale if scaled else None
    scores = interpreted(q, k, w, keys, k_scale)
    chex.assert_shape(scores, shape[:3])
    np.testing.assert_array_equal(scores, expected(q, k, w, keys, k_scale).astype(np.float32))


@pytest.mark.slow
def test_every_schedule_gives_the_same_bits():
    q, k, w, k_scale = index_inputs(5, 1, 5, 66, 64, 64, FP8)
    keys = random_range(6, 1, 5, 66)
    scores = interpreted(q, k, w, keys, k_scale)
    for config in CONFIGS:
        same_bits(interpreted(q, k, w, keys, k_scale, config=config), scores)


def test_ranges_may_be_empty_reversed_and_out_of_bounds():
    start, stop = (
        array([[-9, 4, 50, 69, 2**31 - 1, -(2**31)]]),
        array([[3, 4, 40, 99, -(2**31), 2**31 - 1]]),
    )
    q, k, w, _ = integer_inputs(1, 1, 6, 70, 64, 64, "bfloat16")
    keys = KeyRange(start, stop)
    scores = np.asarray(interpreted(q, k, w, keys))
    assert np.isfinite(scores).sum(axis=2).tolist() == [[3, 0, 0, 1, 0, 70]]
    np.testing.assert_array_equal(scores, expected(q, k, w, keys))


@pytest.mark.parametrize("dtype", the_first(1, [FP8, "bfloat16"]))
def test_nan_stays_where_it_is(dtype):
    """A key of NaN that a query does not reach changes nothing for it; one that it reaches scores NaN."""
    q, k, w, k_scale = integer_inputs(2, 1, 5, 150, 64, 64, dtype)
    keys = KeyRange(array([[0, 3, 65, 10, 9]]), array([[2, 70, 100, 10, 66]]))
    absent = (np.arange(150) >= 64)[None]
    clean = np.asarray(interpreted(q, k, w, keys, k_scale))
    scores = np.asarray(interpreted(q, poison(k, absent), w, keys, poison(k_scale, absent)))
    same = ~absent[0]
    same_bits(scores[..., same], clean[..., same])
    np.testing.assert_array_equal(np.isnan(scores[..., ~same]), reaches(keys, 150)[..., ~same])


def test_without_fill_what_a_query_reaches_is_written():
    q, k, w, _ = integer_inputs(4, 1, 3, 200, 64, 64, FP8)
    keys = causal_range(1, 3, 60)
    reach = reaches(keys, 200)
    filled, unfilled = (np.asarray(interpreted(q, k, w, keys, fill=fill)) for fill in (True, False))
    same_bits(unfilled[reach], filled[reach])


@pytest.mark.parametrize(("dim", "scaled"), [(128, True), (64, False)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_lowers_for_cuda(dtype, heads, dim, scaled):
    q, k, w, start, stop = abstract(2, 70_001, 40_003, heads, dim, dtype)
    scale = (jax.ShapeDtypeStruct((2, 40_003), jnp.float32),) if scaled else ()
    call = jax.jit(lambda *x: index_scores(*x[:5], k_scale=x[5] if scaled else None))
    text = call.trace(q, k, w, start, stop, *scale).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "tensor<2x70001x40003xf32>" in text


@pytest.mark.parametrize("shape", [(1, 1, 1, 64, 128), (3, 1, 63, 16, 64)])
def test_lowers_what_is_smaller_than_a_tile(shape):
    call = jax.jit(index_scores)
    assert "mosaic_gpu" in call.trace(*abstract(*shape)).lower(lowering_platforms=("cuda",)).as_text()


@settings(max_examples=6)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 300), st.sampled_from(HEADS), st.integers(1, 4),
    st.sampled_from([1, 2]), st.integers(0, 99),
)  # fmt: skip
def test_the_plan_goes_from_the_first_to_the_last_block_that_is_reached(b, t, s, heads, warpgroups, tiles, seed):
    keys = random_range(seed, b, t, s)
    config = Config(warpgroups=warpgroups, tiles=tiles)
    plan = jax.jit(functools.partial(make_plan, size=s, heads=heads, config=config))(keys.start, keys.stop)
    first, offset = np.asarray(plan.first), np.asarray(plan.offset)
    queries, key_block = 128 // heads * warpgroups, 64 * tiles
    reach = np.pad(reaches(keys, s), ((0, 0), (0, -t % queries), (0, -s % key_block)))
    reached = reach.reshape(-1, queries, reach.shape[2] // key_block, key_block).any(axis=(1, 3))
    assert offset[0] == 0 and offset.shape == (len(reached) + 1,)
    for group, row in enumerate(reached):
        used = np.flatnonzero(row)
        assert offset[group + 1] - offset[group] == (used[-1] - used[0] + 1 if used.size else 0)
        assert not used.size or first[group] == used[0]


@functools.partial(jax.jit, static_argnums=1)
def plan(keys, size):
    return make_plan(keys.start, keys.stop, size=size, heads=64, config=Config())


def test_the_plan_halves_a_causal_prefill():
    keys = causal_range(1, 4096)
    assert np.asarray(plan(keys, 4096).offset)[-1] == 512 * 33 / 2  # of 512 groups × 32 blocks


def test_many_groups_are_summed_alike():
    keys = random_range(8, 1, 2050 * 8, 500)
    fewer, more = (as_numpy(plan(KeyRange(keys.start[:, :n], keys.stop[:, :n]), 500)) for n in (2048 * 8, 2050 * 8))
    np.testing.assert_array_equal(more.offset[:2049], fewer.offset)


def test_a_plan_refuses_what_int32_cannot_count():
    keys = jax.ShapeDtypeStruct((2**20, 2), jnp.int32)
    with pytest.raises(ValueError, match="1048576 groups of queries × 2048"):
        jax.eval_shape(functools.partial(make_plan, size=2**18, heads=64, config=Config()), keys, keys)


@pytest.mark.parametrize(("length", "size", "copies"), [(64, 256, 0), (64, 255, 2), (63, 256, 1)])
def test_no_array_is_copied_where_nothing_is_ragged(length, size, copies):
    *arrays, start, stop = abstract(2, length, size, 64, 128)
    scale = jax.ShapeDtypeStruct((2, size), jnp.float32)
    call = jax.jit(lambda *x: index_scores(*x[:5], k_scale=x[5]))
    text = call.trace(*arrays, start, stop, scale).lower(lowering_platforms=("cuda",)).as_text()
    pads = re.findall(r"stablehlo.pad .* : \((.*f.*), .*\) -> (.*)\n", text)  # that to no more is dropped by XLA
    assert len(pads) == 3 and sum(before != after for before, after in pads) == copies


@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
@pytest.mark.parametrize("dim", DIMS)
def test_the_default_fits_the_multiprocessor(dtype, dim):
    config = default_config(dtype, dim)
    assert config.smem_bytes(dtype, dim, True) <= SMEM_BYTES - 2048


@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
def test_registers_fit_those_of_the_launch(warpgroups):
    math, producer = Config(warpgroups=warpgroups).registers
    at_launch = min(255, 65536 // (128 * (warpgroups + 1))) // 8 * 8
    assert math % 8 == 0 and producer % 8 == 0 and math <= 240
    assert warpgroups * math + producer <= (warpgroups + 1) * at_launch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warpgroups": 5}, "warpgroups must be between 1 and 4, got 5"),
        ({"tiles": 3}, "tiles must be 1, 2 or 4, got 3"),
        ({"stages": 0}, "stages must be between 1 and 32, got 0"),
        ({"q_slots": 3}, "q_slots must be 1 or 2, got 3"),
    ],
)
def test_a_config_checks_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 8, 48, 128), FP8, "J must be one of"),
        ((1, 2, 8, 64, 96), FP8, "E must be one of"),
        ((1, 2, 8, 64, 128), "float32", "both be float8_e4m3fn or both bfloat16, got float32"),
        ((1, 0, 8, 64, 128), FP8, "must not be empty"),
        ((1, 2**26, 8, 64, 128), FP8, "B·T·J and 4·B·S must be at most"),
        ((2**9, 2**11, 2**20, 64, 128), FP8, "B·T·S below 2\\^40"),
    ],
)
def test_says_why_it_cannot(shape, dtype, message):
    arguments = abstract(*shape, dtype=dtype)
    assert why_not(*abstract(1, 2, 8, 64, 128)) is None
    reason = why_not(*arguments)
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        index_scores(*arguments)


@pytest.mark.parametrize(
    ("position", "shape", "dtype", "message"),
    [
        (0, (2, 64, 128), FP8, "q_index must be \\[B, T, J, E\\]"),
        (1, (1, 8, 64), FP8, "k_index must be \\[1, S, 128\\]"),
        (1, (1, 8, 128), "bfloat16", "got float8_e4m3fn and bfloat16"),
        (2, (1, 2, 32), "float32", "weights must be float32 \\(1, 2, 64\\)"),
        (2, (1, 2, 64), "bfloat16", "weights must be float32 \\(1, 2, 64\\), got bfloat16"),
        (3, (1, 3), "int32", "start must be int32 \\(1, 2\\)"),
        (4, (2, 2), "int32", "stop must be int32 \\(1, 2\\)"),
        (5, (1, 9), "float32", "k_scale must be float32 \\(1, 8\\)"),
    ],
)
def test_refuses_mismatched_arrays(position, shape, dtype, message):
    arguments = [*abstract(1, 2, 8, 64, 128), None]
    arguments[position] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    with pytest.raises(ValueError, match=message):
        index_scores(*arguments[:5], k_scale=arguments[5])


def test_refuses_a_config_that_does_not_fit():
    with pytest.raises(ValueError, match="bytes of shared memory"):
        index_scores(*abstract(1, 2, 8, 64, 128), config=Config(stages=32))


# On the card

REAL = [(64, 128), (64, 64), (32, 128), (32, 64), (16, 128), (16, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
@pytest.mark.parametrize(("heads", "dim"), REAL)
def test_integers_are_exact_on_the_card(heads, dim, dtype):
    for seed, (b, t, s) in enumerate([(1, 1, 1), (2, 37, 1031), (1, 300, 257), (3, 9, 64), (1, 1, 20_000)]):
        q, k, w, k_scale = integer_inputs(seed, b, t, s, heads, dim, dtype)
        keys = random_range(seed, b, t, s)
        scores = np.asarray(on_card(q, k, w, keys, k_scale))
        np.testing.assert_array_equal(scores, expected(q, k, w, keys, k_scale))
        same_bits(scores, definition(q, k, w, keys, k_scale=k_scale, implementation="xla"))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-6), (FP8, 5e-4)])
def test_error_on_the_card(dtype, tolerance):
    """Against float64, relative to Σ_j |w_j| · relu_j: measured 2.3e-7 and, over 1.5 million scores, 3.2e-4.

    Hopper sums FP8 products with about 13 bits after the point.
    """
    q, k, w, k_scale = index_inputs(0, 1, 64, 8192, 64, 128, dtype)
    keys = KeyRange.causal(1, 64, offset=8192 - 64)
    reach = reaches(keys, 8192)
    scores = np.asarray(on_card(q, k, w, keys, k_scale))[reach]
    exact, size = (expected(q, k, x, keys, k_scale)[reach] for x in (w, jnp.abs(w)))
    assert np.max(np.abs(scores - exact) / size) <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_nan_on_the_card(dtype):
    q, k, w, k_scale = integer_inputs(2, 2, 45, 1000, 64, 128, dtype)
    keys = random_range(8, 2, 45, 1000)
    absent = array(np.random.default_rng(0).random((2, 1000)) < 0.2)
    clean = np.asarray(on_card(q, k, w, keys, k_scale))
    scores = np.asarray(on_card(q, poison(k, absent), w, keys, poison(k_scale, absent)))
    bad = reaches(keys, 1000) & np.asarray(absent)[:, None]
    np.testing.assert_array_equal(np.isnan(scores), bad)
    same_bits(scores[~bad], clean[~bad])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_the_same_bits_every_time_on_the_card(dtype):
    q, k, w, k_scale = index_inputs(3, 1, 1000, 20_000, 64, 128, dtype)
    keys = KeyRange.causal(1, 1000, offset=19_000)
    first = on_card(q, k, w, keys, k_scale)
    assert all(bool(jnp.array_equal(first, on_card(q, k, w, keys, k_scale))) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_a_score_does_not_depend_on_its_place_on_the_card(dtype):
    """Alone, among other queries, in another batch row, at other positions, in a longer buffer, with another grid."""
    q, k, w, k_scale = index_inputs(4, 2, 200, 3000, 64, 128, dtype)
    keys = KeyRange(jnp.zeros((2, 200), jnp.int32), jnp.full((2, 200), 3000))
    whole = np.asarray(on_card(q, k, w, keys, k_scale))
    cut = lambda x, rows: None if x is None else x[1:, rows]
    one = slice(77, 78)
    alone = on_card(
        q[1:, one], k[1:], w[1:, one], KeyRange(keys.start[1:, one], keys.stop[1:, one]), cut(k_scale, slice(None))
    )
    same_bits(alone[0, 0], whole[1, 77])
    roll = lambda x: None if x is None else jnp.roll(jnp.concatenate([x, x[:, :777]], axis=1), 13, axis=1)
    longer = on_card(q, roll(k), w, KeyRange(keys.start, keys.stop + 777), roll(k_scale))
    same_bits(longer[:, :, 13 : 13 + 3000], whole)
    config = default_config(dtype, 128)
    for changes in ({"tiles": 1}, {"stages": 1}, {"warpgroups": 1}, {"q_slots": 1}):
        other = dataclasses.replace(config, **changes)
        same_bits(on_card(q, k, w, keys, k_scale, config=other), whole)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), [
    ((1, 4096, 131_072, 64, 128), FP8), ((1, 4096, 32_768, 64, 128), "bfloat16"), ((1, 70_001, 40_003, 16, 64), FP8),
])  # fmt: skip
def test_real_sizes_on_the_card(shape, dtype):
    """Rows of the whole, the last of them past 2^31 scores in the third case, against the same rows alone."""
    b, t, s, j, e = shape
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.randint(keys[0], (b, t, j, e), -2, 3, jnp.int8).astype(dtype)
    k = jax.random.randint(keys[1], (b, s, e), -2, 3, jnp.int8).astype(dtype)
    w = jax.random.randint(keys[2], (b, t, j), -2, 3).astype(jnp.float32)
    reach = KeyRange.causal(b, t, offset=max(0, s - t))
    whole = on_card(q, k, w, reach)
    for row in (0, 1, t // 2, t - 1):
        one = slice(row, row + 1)
        range_of_row = KeyRange(reach.start[:, one], reach.stop[:, one])
        same_bits(whole[:, one], expected(q[:, one], k, w[:, one], range_of_row).astype(np.float32))
