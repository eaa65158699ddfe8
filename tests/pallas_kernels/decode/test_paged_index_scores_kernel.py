"""Tests the scores over pages: interpreted and lowered on a CPU, their sums on NumPy threads, for real on the card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_floats
import numpy_simt
import pytest
import reference
from cases import FP8, array, integers, normal, same_bits, the_first

from dsa_jax import KeyRange, index_scores, select_topk
from dsa_jax.pallas_kernels.decode import paged_index_scores, paged_select_keys, why_not_index_scores
from dsa_jax.pallas_kernels.decode import score_sums as sums
from dsa_jax.pallas_kernels.decode.paged_index_scores import Config, Split, default_config, make_plan

SMALL = Config(stages=2)


def pages_of(keys, scales):
    """Joins e4m3 keys [n, 64, 128] and their float32 scales [n, 64] into pages; bfloat16 keys are pages."""
    if scales is None:
        return keys
    rows = jax.lax.bitcast_convert_type(scales, jnp.uint8).reshape(scales.shape[0], 2, 128)
    return jnp.concatenate([keys, jax.lax.bitcast_convert_type(rows, keys.dtype)], axis=1)


def inputs(seed, batch, length, heads, pages, dtype, make=integers):
    """Makes queries, keys, scales, weights and a shuffled table. Integers make products and sums exact."""
    n = batch * pages + 3
    q, keys = make(seed, batch, length, heads, 128).astype(dtype), make(seed + 1, n, 64, 128).astype(dtype)
    weights = make(seed + 2, batch, length, heads)
    scales = jnp.exp2(integers(seed + 3, n, 64)) if dtype == FP8 else None
    table = np.random.default_rng(seed).permutation(n)[: batch * pages].reshape(batch, pages).astype(np.int32)
    return q, keys, scales, weights, array(table)


def ranges(seed, batch, length, size):
    """Makes ranges of every kind: empty, reversed and beyond the ends."""
    edges = np.random.default_rng(seed).integers(-9, size + 10, (2, batch, length)).astype(np.int32)
    return array(edges[0]), array(edges[1])


def flat(x, table):
    """Lines up the keys, or their scales, of each sequence."""
    return None if x is None else x[table].reshape(table.shape[0], -1, *x.shape[2:])


def expected(q, keys, scales, weights, table, start, stop):
    reach = reference.reachable(start, stop, 64 * table.shape[1])
    return reference.index_scores(q, flat(keys, table), weights, reach, flat(scales, table))


@pytest.mark.parametrize(
    ("batch", "length", "heads", "pages", "dtype"),
    the_first(
        2, [(2, 4, 32, 3, FP8), (1, 2, 64, 4, "bfloat16"), (1, 3, 64, 6, FP8), (2, 1, 64, 5, FP8), (3, 1, 32, 2, FP8)]
    ),
)
def test_equals_the_definition_where_sums_are_exact(batch, length, heads, pages, dtype):
    q, keys, scales, weights, table = inputs(0, batch, length, heads, pages, dtype)
    start, stop = ranges(1, batch, length, 64 * pages)
    arrays = q, pages_of(keys, scales), weights, table, start, stop
    scores = paged_index_scores(*arrays, config=SMALL, interpret=True)
    np.testing.assert_array_equal(scores, expected(q, keys, scales, weights, table, start, stop).astype(np.float32))


@pytest.mark.parametrize(("heads", "queries"), [(64, 1), (64, 2), (32, 1), (32, 2), (32, 4)])
def test_sums_and_stores_on_numpy_threads(heads, queries):
    """The layout of a product, the exchange between lanes, ranges, and a query that is not there."""
    random, size, key = np.random.default_rng(0), 192, 64
    products, weights = (random.integers(-2, 3, s).astype(np.float32) for s in ((64, queries * heads), queries * heads))
    scale = np.exp2(random.integers(-2, 3, 64)).astype(np.float32)
    products[5, 3] = np.nan
    start, stop = random.integers(50, 90, queries).astype(np.int32), random.integers(100, 150, queries).astype(np.int32)
    left = max(1, queries - 1)
    machine = numpy_simt.Machine(128, 64, 0)
    machine.smem[:] = scale.view(np.uint32)
    at = [machine.put(x) for x in (start, stop, np.full((queries, size), 77, np.float32))]
    # Thread t has of every 8 columns two, from 2 · (t mod 4), in rows 16 · (t // 32) + t mod 32 // 4 and 8 below.
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
    pair = lambda x, c: [numpy_simt.Reg(x[..., 8 * c + column + i]) for i in (0, 1)]
    blocks = range(queries * heads // 8)
    mine = [[numpy_simt.Reg(products[row + 8 * h, 8 * c + column + i]) for i in (0, 1)] for c in blocks for h in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "simt", numpy_simt)
        patch.setattr(sums, "floats", numpy_floats)
        patch.setattr(numpy_simt, "machine", machine, raising=False)
        low, count = sums.lane_range(at[0], at[1], numpy_simt.i32(0), numpy_simt.i32(left), size, queries)
        totals = sums.lane_sums(mine, [pair(weights, c) for c in blocks], queries)
        zero, place = numpy_simt.i32(0), numpy_simt.i32(key)
        sums.store_tile(totals, zero, low, count, at[2], zero, place, size, queries)
        sums.store_tile(totals, zero, low, count, at[2], zero, place + 128, size, queries)  # behind the last page
    got = machine.gmem[at[2] // 4 :][: queries * size].view(np.float32).reshape(queries, size)
    want = np.full((queries, size), 77, np.float32)
    relu = np.where(products <= 0, 0, products) * weights
    position = key + np.arange(64)
    for query in range(left):
        score = relu.reshape(64, queries, heads)[:, query].sum(1) * scale
        reached = (position >= start[query]) & (position < stop[query])
        want[query, key : key + 64] = np.where(reached, score, -np.inf)
    np.testing.assert_array_equal(got, want)


def test_only_pages_that_are_reached_are_followed():
    q, keys, scales, weights, table = inputs(2, 2, 2, 64, 6, FP8)
    start, stop = array([[70, 100], [0, 0]]), array([[80, 200], [0, 1]])
    reached = np.zeros((2, 6), bool)
    reached[0, 1:4] = reached[1, 0] = True
    used = np.isin(np.arange(len(keys)), np.asarray(table)[reached])
    poisoned = jnp.where(used[:, None, None], keys, jnp.nan).astype(keys.dtype)
    hostile = jnp.where(reached, table, 2**31 - 1)
    arrays = pages_of(poisoned, scales), weights, hostile, start, stop
    got = paged_index_scores(q, *arrays, config=SMALL, interpret=True)
    np.testing.assert_array_equal(got, expected(q, keys, scales, weights, table, start, stop).astype(np.float32))


def test_the_plan_has_the_blocks_that_are_reached():
    start, stop = (
        np.array(x, np.int32)
        for x in ([[0, 9], [300, 700], [5, 5], [-9, 0]], [[1, 10], [200, 1300], [5, 4], [9999, 2]])
    )
    plan = jax.jit(functools.partial(make_plan, size=1280, config=Config()))(start, stop)
    plan = jax.tree.map(np.asarray, plan)
    assert plan.first[:2].tolist() == [0, 10] and plan.stop[[0, 1, 3]].tolist() == [1, 20, 20]
    assert np.diff(plan.offset).tolist() == [1, 3, 0, 5] and plan.offset[0] == 0


def test_queries_are_dealt_to_warpgroups():
    assert [Split.of(t, 64) for t in (1, 2, 3, 4)] == [(1, 1), (2, 1), (2, 2), (2, 2)]
    assert [Split.of(t, 32) for t in (1, 2, 3, 4)] == [(1, 1), (2, 1), (4, 1), (4, 1)]


def abstract(batch=2, length=1, heads=64, pages=2047, dtype=FP8):
    s = jax.ShapeDtypeStruct
    rows = 66 if dtype == FP8 else 64
    return {
        "q_index": s((batch, length, heads, 128), jnp.dtype(dtype)),
        "pages": s((70_000, rows, 128), jnp.dtype(dtype)),
        "weights": s((batch, length, heads), jnp.float32),
        "table": s((batch, pages), jnp.int32),
        "start": s((batch, length), jnp.int32),
        "stop": s((batch, length), jnp.int32),
    }


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("dtype", [FP8, "bfloat16"])
def test_lowers_for_cuda(length, heads, dtype):
    arrays = abstract(3, length, heads, dtype=dtype).values()
    traced = jax.jit(functools.partial(paged_select_keys, k=2048, slots=True)).trace(*arrays)
    lowered = traced.lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 2
    assert lowered.out_info.shape == (3, length, 2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_index": ((2, 1, 64, 64), FP8)}, "J must be one of .* and E 128, got 64 and 64"),
        ({"q_index": ((2, 1, 16, 128), FP8)}, "J must be one of .* got 16 and 128"),
        ({"q_index": ((2, 5, 64, 128), FP8)}, "T must be 1 to 4, got 5"),
        ({"q_index": ((2, 1, 64, 128), "float32")}, "both be float8_e4m3fn or both bfloat16, got float32 and"),
        ({"pages": ((9, 64, 128), FP8)}, r"pages must be \[n, 66, 128\] of float8_e4m3fn, got \[9, 64, 128\]"),
        ({"weights": ((2, 1, 32), "float32")}, r"weights must be float32 \[2, 1, 64\]"),
        ({"table": ((3, 7), "int32")}, r"table must be int32 \[2, 7\], got int32 \[3, 7\]"),
        ({"table": ((2, 0), "int32")}, r"B and P must be at least 1, got table \[2, 0\]"),
        ({"stop": ((2, 2), "int32")}, r"stop must be int32 \[2, 1\]"),
        ({"table": ((2, 1 << 23), "int32")}, "must be below 2\\^31"),
        ({"pages": ((66, 128), FP8)}, "q_index must be .* got"),
    ],
)
def test_what_the_kernel_cannot_take(change, message):
    assert why_not_index_scores(**abstract()) is None
    change = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, (shape, dtype) in change.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(paged_index_scores, *(abstract() | change).values())


def test_configs_validate_themselves():
    for config, message in (({"pages": 3}, "pages must be 4 or 8, got 3"), ({"stages": 0}, "between 1 and 32, got 0")):
        with pytest.raises(ValueError, match=message):
            Config(**config)
    with pytest.raises(ValueError, match="config needs .* bytes of shared memory"):
        jax.eval_shape(functools.partial(paged_index_scores, config=Config(stages=9)), *abstract().values())
    assert default_config(jnp.bfloat16, 4, 100).smem_bytes(jnp.bfloat16, 256) < 225 << 10


# On the card: bitwise what the kernel for contiguous keys computes.


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("dtype", [FP8, "bfloat16"])
def test_bits_are_those_of_contiguous_keys_on_the_card(length, heads, dtype):
    q, keys, scales, weights, table = inputs(3, 7, length, heads, 37, dtype, normal)
    for start, stop in (
        ranges(4, 7, length, 64 * 37),
        (jnp.zeros((7, length), jnp.int32), jnp.full((7, length), 2368)),
    ):
        got = jax.jit(paged_index_scores)(q, pages_of(keys, scales), weights, table, start, stop)
        keys_of = KeyRange(start, stop)
        want = index_scores(
            q, flat(keys, table), weights, keys_of, k_scale=flat(scales, table), implementation="pallas"
        )
        same_bits(got, want)
        chosen = jax.jit(functools.partial(paged_select_keys, k=300))(
            q, pages_of(keys, scales), weights, table, start, stop
        )
        same_bits(chosen, select_topk(want, 300, keys=keys_of, implementation="xla"))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(stages=1), Config(stages=3), Config(pages=8, stages=2)])
def test_configs_change_no_bit_on_the_card(config):
    q, keys, scales, weights, table = inputs(5, 3, 3, 64, 21, FP8, normal)
    arrays = q, pages_of(keys, scales), weights, table, *ranges(6, 3, 3, 64 * 21)
    same_bits(
        jax.jit(functools.partial(paged_index_scores, config=config))(*arrays), jax.jit(paged_index_scores)(*arrays)
    )


@pytest.mark.gpu
def test_a_key_of_nan_scores_nan_where_it_is_reached_on_the_card():
    q, keys, scales, weights, table = inputs(7, 1, 2, 64, 3, FP8, normal)
    page = int(table[0, 1])
    keys = keys.at[page, 7, 100].set(jnp.nan)
    start, stop = array([[0, 0]]), array([[192, 71]])
    scores = np.asarray(paged_index_scores(q, pages_of(keys, scales), weights, table, start, stop))
    assert np.argwhere(np.isnan(scores)).tolist() == [[0, 0, 71]]
    chosen = np.asarray(paged_select_keys(q, pages_of(keys, scales), weights, table, start, stop, k=300))
    assert 71 not in chosen and (chosen[0, 0] >= 0).sum() == 191 and (chosen[0, 1] >= 0).sum() == 71
