"""Tests the Hopper kernel of dense attention: interpreted and lowered on a CPU, for real under the `gpu` marker."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INT_MAX, INT_MIN, array, integers, normal, same_bits
from reference import f64

from dsa_jax.pallas_kernels.dense_attention.multihead_attention import (
    BLOCK_KEYS,
    BLOCK_QUERIES,
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    Deal,
    make_plan,
    multihead_attention,
    smem_bytes,
    why_not,
)
from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES

KINDS = ("causal", "documents", "random", "hostile", "all")


def ranges(kind, seed, b, t, s) -> tuple[Any, Any]:
    """Makes start and stop [B, T]; the hostile ones are empty, reversed, and anywhere in int32."""
    rng = np.random.default_rng(seed)
    row = np.broadcast_to(np.arange(t), (b, t))
    start, stop = np.zeros((b, t), np.int64), row + 1 + max(0, s - t)
    if kind == "documents":  # packed, with the queries at the positions of the keys
        cuts = np.sort(rng.integers(0, t, (b, max(1, t // 90))), axis=1)
        start = np.stack(
            [np.concatenate([[0], c])[np.searchsorted(c, r, side="right")] for c, r in zip(cuts, row, strict=True)]
        )
        stop = row + 1
    elif kind == "random":
        start, stop = np.sort(rng.integers(0, s + 1, (2, b, t)), axis=0)
    elif kind == "hostile":
        edges = np.array([INT_MIN, -s, -1, 0, 1, s // 2, s - 1, s, s + 1, 2 * s, INT_MAX])
        start, stop = rng.choice(edges, (2, b, t))
        start[0, : min(t, BLOCK_QUERIES)] = s  # a block of queries without keys
    elif kind == "all":
        stop = np.full((b, t), s)
    return array(start, jnp.int32), array(stop, jnp.int32)


def inputs(kind, seed, b, t, s, n, h, v):
    """Makes arguments with NaN in whole blocks of keys before the first and after the last that a batch row reaches."""
    start, stop = ranges(kind, seed, b, t, s)
    q = normal(seed, b, t, n, h, dtype="bfloat16")
    keys, values = (normal(seed + i, b, s, n, d, dtype="bfloat16") for i, d in ((1, h), (2, v)))
    low, high = np.maximum(start, 0), np.minimum(stop, s)
    has_keys = low < high
    first = np.where(has_keys, low, s).min(axis=1) // BLOCK_KEYS * BLOCK_KEYS
    last = -(-np.where(has_keys, high, 0).max(axis=1) // BLOCK_KEYS) * BLOCK_KEYS
    nowhere = (np.arange(s) < first[:, None]) | (np.arange(s) >= last[:, None])
    keys, values = (jnp.where(nowhere[:, :, None, None], jnp.nan, x) for x in (keys, values))
    return q, keys, values, start, stop


@functools.partial(jax.jit, static_argnames="size")
def plan_of(start, stop, size):
    """Calls `make_plan`, compiled once a shape."""
    return make_plan(start, stop, size=size)


def kernel(scale=0.1, blocks=None, interpret=False) -> Any:
    """Makes the kernel a function of arrays."""
    return jax.jit(functools.partial(multihead_attention, scale=scale, blocks=blocks, interpret=interpret))


def definition(q, k, v, start, stop, scale):
    """Computes out [P, N, V] and lse [P, N] in float64, of q [P, N, H] with ranges [P] over k and v [S, N, …]."""
    out, lse = np.zeros((*q.shape[:2], v.shape[2])), np.full(q.shape[:2], -np.inf)
    for i, (low, high) in enumerate(zip(np.maximum(start, 0), np.minimum(stop, len(k)), strict=True)):
        if low < high:
            logits = scale * np.einsum("nh,snh->ns", f64(q[i]), f64(k[low:high]))
            lse[i] = np.logaddexp.reduce(logits, axis=1)
            out[i] = np.einsum("ns,snv->nv", np.exp(logits - lse[i][:, None]), f64(v[low:high]))
    return out, lse


def compare(results, q, k, v, start, stop, scale=0.1, places: Any = slice(None)):
    """Holds results against float64: 5e-3 in the norm of `out`, which P in bfloat16 takes, and 1e-4 in `lse`."""
    out, lse = results
    chex.assert_shape(out, (*q.shape[:3], v.shape[3]))
    chex.assert_shape(lse, q.shape[:3])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    for b in range(q.shape[0]):
        arguments = (np.asarray(x) for x in (q[b, places], k[b], v[b], start[b, places], stop[b, places]))
        want_out, want_lse = definition(*arguments, scale=scale)
        got_out, got_lse = f64(out[b, places]), f64(lse[b, places])
        empty = np.isneginf(want_lse)
        assert np.isfinite(got_out).all()
        assert np.linalg.norm(got_out - want_out) <= 5e-3 * np.linalg.norm(want_out)
        np.testing.assert_array_equal(np.isneginf(got_lse), empty)
        np.testing.assert_array_equal(got_out[empty], 0.0)
        np.testing.assert_allclose(got_lse[~empty], want_lse[~empty], rtol=1e-4, atol=1e-4)


def check(kind, seed, *shape, scale=0.1, **options):
    arguments = inputs(kind, seed, *shape)
    compare(kernel(scale, **options)(*arguments), *arguments, scale=scale)


def abstract(b=1, t=300, s=500, n=4, h=192, v=128) -> list[Any]:
    floats = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b, t, n, h), (b, s, n, h), (b, s, n, v))]
    return floats + [jax.ShapeDtypeStruct((b, t), jnp.int32)] * 2


@pytest.mark.parametrize(("kind", "scale", "s", "blocks"), [("hostile", 0.1, 300, 2), ("random", -2.0, 200, 1)])
def test_equals_the_definition(kind, scale, s, blocks):
    """Two items: each a block's own, and both of one block."""
    check(kind, 0, 1, 140, s, 1, 64, 64, scale=scale, blocks=blocks, interpret=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_covers_what_is_reached_and_masks_what_is_not(kind):
    b, t, s = 2, 700, 1000
    start, stop = ranges(kind, 3, b, t, s)
    plan, low, high = (np.asarray(x) for x in plan_of(start, stop, s))
    key = np.arange(s + BLOCK_KEYS)
    reached = (key >= np.asarray(start)[..., None]) & (key < np.minimum(stop, s)[..., None])
    np.testing.assert_array_equal(reached, (key >= low[:, :t, None]) & (key < high[:, :t, None]))
    assert np.all((low >= 0) & (low <= high) & (high <= s))
    plan = plan.reshape(b, -1, 5)
    np.testing.assert_array_equal(np.sort(plan[..., 0]), np.broadcast_to(np.arange(6), (b, 6)))
    for row, of_row in zip(reached, plan, strict=True):
        counts = of_row[:, 4] - of_row[:, 1]
        assert np.all(np.diff(counts) <= 0)
        for block, first, inner_first, inner_last, last in of_row:
            reached_here = row[block * BLOCK_QUERIES : (block + 1) * BLOCK_QUERIES]
            keys = np.flatnonzero(reached_here.any(axis=0))
            assert first < inner_first <= inner_last <= last <= -(-s // BLOCK_KEYS)
            if len(keys):
                assert (first, last) == (keys[0] // BLOCK_KEYS, keys[-1] // BLOCK_KEYS + 1)
            assert reached_here[:, inner_first * BLOCK_KEYS : inner_last * BLOCK_KEYS].all()


def test_the_plan_masks_nothing_that_needs_no_mask():
    """Causal: the first block, and the one on the diagonal."""
    start, stop = (jnp.concatenate([x, x]) for x in ranges("causal", 0, 1, 700, 700))
    plan, _, _ = plan_of(start, stop, 1000)
    np.testing.assert_array_equal(plan, 2 * [[i, 0, 1, max(1, i), i + 1] for i in reversed(range(6))])


@pytest.mark.parametrize("shape", [(256, 128, 21 << 20, 132), (3, 5, 1 << 20, 7), (1, 1, 1, 1), (9, 33, 6 << 20, 16)])
def test_every_item_is_dealt_once(shape):
    deal = Deal.of(*shape)
    rounds, block = np.meshgrid(np.arange(deal.all_rounds), np.arange(deal.blocks), indexing="ij")
    head, rank, has_item = (np.asarray(x) for x in jax.jit(deal.item)(rounds, block))
    items = (head * deal.query_blocks + rank)[has_item]
    np.testing.assert_array_equal(np.sort(items), np.arange(deal.query_blocks * deal.heads))


def test_causal_work_is_dealt_evenly():
    deal = Deal.of(256, 128, 32768 * 640, 132)
    rounds, block = np.meshgrid(np.arange(deal.all_rounds), np.arange(deal.blocks), indexing="ij")
    _, rank, has_item = (np.asarray(x) for x in jax.jit(deal.item)(rounds, block))
    work = np.where(has_item, 256 - rank, 0).sum(axis=0)
    assert work.max() <= 1.001 * work.mean()


@pytest.mark.parametrize(("shape", "scale"), [({}, 0.1), ({"h": 64, "v": 64, "t": 1, "s": 1}, -0.1)])
def test_lowers_for_the_card(shape, scale):
    text = kernel(scale).trace(*abstract(**shape)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def test_fits_into_shared_memory():
    assert smem_bytes(192, 128) < SMEM_BYTES


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"h": 96}, "H must be one of (192, 128, 64) and V one of (128, 64) and at most H, got 96 and 128"),
        ({"h": 64}, "at most H, got 64 and 128"),
        ({"v": 192}, "got 192 and 192"),
        ({"t": 0}, "must not be empty"),
        ({"s": 0}, "must not be empty"),
        ({"b": 512, "s": 32768, "n": 128}, "must be below 2^31"),
    ],
)
def test_refuses_shapes(shape, message):
    arguments = abstract(**shape)
    assert message in str(why_not(*arguments))
    with pytest.raises(ValueError, match=re.escape(message)):
        multihead_attention(*arguments, scale=0.1)


@pytest.mark.parametrize(
    ("at", "shape", "dtype", "message"),
    [
        (0, (1, 300, 4, 192), jnp.float32, "must be bfloat16, got float32"),
        (0, (300, 4, 192), jnp.bfloat16, "q, k and v must be"),
        (1, (1, 500, 2, 192), jnp.bfloat16, "k must be (1, 500, 4, 192)"),
        (2, (1, 499, 4, 128), jnp.bfloat16, "v must be (1, 500, 4, 128)"),
        (3, (1, 299), jnp.int32, "start must be int32 (1, 300)"),
        (4, (1, 300), jnp.uint32, "stop must be int32 (1, 300), got uint32"),
    ],
)
def test_refuses_arguments(at, shape, dtype, message):
    arguments = abstract()
    arguments[at] = jax.ShapeDtypeStruct(shape, dtype)
    assert message in str(why_not(*arguments))


def test_registers_are_those_of_the_launch():
    assert COMPUTE_REGISTERS % 8 == 0 and COPY_REGISTERS % 8 == 0 and COPY_REGISTERS >= 24
    assert 2 * COMPUTE_REGISTERS + COPY_REGISTERS <= 3 * (65536 // 384 // 8 * 8)


# On the card


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "v"), [(192, 64), (128, 128), (64, 64)])
def test_equals_the_definition_on_the_card(h, v):
    shapes = (1, 1, 1, 1), (2, 37, 131, 3), (1, 300, 257, 5), (3, 129, 700, 2), (1, 515, 515, 2)
    for seed, (kind, shape) in enumerate(zip(("all", "random", "documents", "hostile", "causal"), shapes, strict=True)):
        check(kind, seed, *shape, h, v)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_every_kind_on_the_card(kind):
    for seed, shape in enumerate([(2, 37, 131, 3), (1, 300, 257, 5), (3, 129, 700, 2), (1, 515, 515, 2)]):
        check(kind, seed, *shape, 192, 128)


@pytest.mark.gpu
def test_takes_any_scale_on_the_card():
    for scale in (-0.07, 0.0, 3.0, 1e-30):
        check("hostile", 0, 1, 300, 900, 4, 192, 128, scale=scale)


@pytest.mark.gpu
def test_maxima_that_move_on_the_card():
    """Rows whose logits grow steadily, which rescales every time, or fall from the first key on."""
    q = jnp.ones((1, 256, 2, 192), jnp.bfloat16)
    k, v = normal(0, 1, 3000, 2, 192, dtype="bfloat16"), normal(1, 1, 3000, 2, 128, dtype="bfloat16")
    start, stop = ranges("random", 0, 1, 256, 3000)
    slope = jnp.linspace(0, 4, 3000)[:, None, None]
    for moving in (slope, slope[::-1]):
        keys = (k + moving).astype(jnp.bfloat16)
        compare(kernel(0.3)(q, keys, v, start, stop), q, keys, v, start, stop, scale=0.3)


@pytest.mark.gpu
def test_large_logits_on_the_card():
    """Up to 10^8, all of them exact: the largest alone count."""
    _, k, v, start, stop = inputs("causal", 0, 1, 400, 400, 2, 192, 128)
    q, k = (x.astype(jnp.bfloat16) for x in (65536 * integers(1, 1, 400, 2, 192), integers(2, *k.shape)))
    compare(kernel(1.0)(q, k, v, start, stop), q, k, v, start, stop, scale=1.0)


@pytest.mark.gpu
def test_real_sizes_on_the_card():
    """10 runs with the same bits, and some rows against the definition."""
    call = kernel(0.072)
    for kind in ("causal", "documents"):
        arguments = inputs(kind, 0, 1, 8192, 8192, 16, 192, 128)
        first = call(*arguments)
        compare(first, *arguments, scale=0.072, places=np.array([0, 127, 128, 4097, 8191]))
        for _ in range(10):
            assert all(map(jnp.array_equal, call(*arguments), first))


@pytest.mark.gpu
def test_more_items_than_a_grid_dimension_on_the_card():
    arguments = inputs("all", 0, 1, 3, 5, 70_001, 64, 64)
    compare(kernel()(*arguments), *arguments)


@pytest.mark.gpu
def test_a_query_depends_on_nothing_else_on_the_card():
    q, k, v, start, stop = (jnp.nan_to_num(x) for x in inputs("hostile", 0, 2, 700, 700, 6, 192, 128))
    first = jax.device_get(kernel()(q, k, v, start, stop))
    for blocks in (3, 1000):
        jax.tree.map(same_bits, kernel(blocks=blocks)(q, k, v, start, stop), first)
    one = kernel()(q[1:, :, 2:4], k[1:, :, 2:4], v[1:, :, 2:4], start[1:], stop[1:])
    jax.tree.map(same_bits, one, jax.tree.map(lambda x: x[1:, :, 2:4], first))
    rows = kernel()(q[:, 256:512], k, v, start[:, 256:512], stop[:, 256:512])
    jax.tree.map(same_bits, rows, jax.tree.map(lambda x: x[:, 256:512], first))
