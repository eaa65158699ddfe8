"""Tests the Hopper kernel of p and ds for the backward pass: interpreted and lowered on a CPU, real on the card."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, hostile_indices, normal, poison_unselected
from jax.experimental.pallas import mosaic_gpu as plgpu
from reference import f64

from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES
from dsa_jax.pallas_kernels.sparse_attention.backward_weights import (
    COMPUTE_REGISTERS,
    GATHER_REGISTERS,
    pieces,
    smem_bytes,
    sparse_backward_weights,
    why_not,
)

# B, T, S, N, C, R, K: one piece of the ring a block of keys and several, the last one of Q and of d_out alike or not
SMALL = [
    ((1, 3, 50, 64, 192, 64, 128), 0.1),
    ((2, 2, 40, 64, 64, 0, 128), -0.2),
]


def abstract(b, t, s, n, c, r, k) -> Any:
    """Makes the arguments as shapes."""
    shape = jax.ShapeDtypeStruct
    q, d_out, kv = (shape(x, jnp.bfloat16) for x in ((b * t, n, c + r), (b * t, n, c), (b, s, c + r)))
    row = shape((b * t, n), jnp.float32)
    return q, d_out, kv, shape((b * t, k), jnp.int32), row, row


def inputs(seed, shape, scale) -> Any:
    """Makes arguments: hostile indices (duplicates, every absence, an empty row), empty blocks, NaN in unread rows.

    `lse` is that of the rows, as the forward pass leaves it, but -inf for head 3; `delta` is nothing in particular.
    """
    b, t, s, n, c, r, k = shape
    q, kv = normal(seed, b * t, n, c + r, dtype="bfloat16"), normal(seed + 1, b, s, c + r, dtype="bfloat16")
    d_out, delta = normal(seed + 2, b * t, n, c, dtype="bfloat16"), normal(seed + 3, b * t, n)
    indices = np.array(hostile_indices(seed + 4, b, t, k, s))
    indices[-1, -1, :64] = -1
    if k > 200:
        indices[0, 0, 64:192] = s
    kv, indices = poison_unselected(kv, indices), indices.reshape(b * t, k)
    rows_of, q_rows = np.asarray(kv), np.asarray(q)
    lse = np.full((b * t, n), -np.inf, np.float32)
    for i in range(b * t):
        rows = present_rows(rows_of[i // t], indices[i]).astype(np.float32)
        if len(rows):
            lse[i] = np.logaddexp.reduce(scale * q_rows[i].astype(np.float32) @ rows.T, axis=1)
    lse[:, 3] = -np.inf
    return q, d_out, kv, array(indices), array(lse), delta


def present_rows(kv, keys):
    """Selects the rows of kv [S, H] at those of `keys` that are in it."""
    return kv[keys[(keys >= 0) & (keys < len(kv))]]


def definition(place, arguments, scale):
    """Computes p and ds [N, K] of one query, in float64, and which keys are there."""
    q, d_out, kv, indices, lse, delta = arguments
    keys = indices[place]
    present = (keys >= 0) & (keys < kv.shape[1])
    rows = f64(present_rows(kv[place // (len(q) // len(kv))], keys))
    p, ds = np.zeros((2, q.shape[1], len(keys)))
    if len(rows):
        log_sums = np.where(np.isneginf(lse[place]), np.inf, f64(lse[place]))  # a head without one has no weights
        weights = np.exp(scale * f64(q[place]) @ rows.T - log_sums[:, None])
        p[:, present] = weights
        d_p = f64(d_out[place]) @ rows[:, : d_out.shape[2]].T
        ds[:, present] = scale * weights * (d_p - f64(delta[place])[:, None])
    return p, ds, present


def kernel(scale, blocks=None, interpret=False) -> Any:
    """Makes the kernel a function of arrays, compiled unless it is interpreted."""
    call = functools.partial(sparse_backward_weights, scale=scale, blocks=blocks, interpret=interpret)
    return call if interpret else jax.jit(call)


def compare(results, arguments, scale):
    """Holds results against float64: 5e-3 in the norm, which rounding p and ds to bfloat16 takes half of.

    Where there is no key or no lse they are exactly 0.
    """
    q, *_, indices, lse, _ = arguments
    for x in results:
        chex.assert_shape(x, (*q.shape[:2], indices.shape[1]))
        assert x.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(x))
    count = len(q)
    between = np.random.default_rng(0).integers(0, count, 8)
    places = range(count) if count <= 16 else sorted({0, count - 1, count // 2, *between.tolist()})
    on_host = jax.tree.map(np.asarray, arguments)
    wants = [definition(i, on_host, scale) for i in places]
    for i, got in enumerate(results):
        got = f64(got[np.array(places)])
        want = np.stack([x[i] for x in wants])
        assert np.linalg.norm(got - want) <= 5e-3 * np.linalg.norm(want)
        for row, (_, _, present) in zip(got, wants, strict=True):
            np.testing.assert_array_equal(row[:, ~present], 0.0)
        np.testing.assert_array_equal(got[np.isneginf(lse)[np.array(places)]], 0.0)


def check(shape, scale, seed=0, **options):
    """Runs the kernel and holds it against the definition."""
    arguments = inputs(seed, shape, scale)
    compare(kernel(scale, **options)(*arguments), arguments, scale)


@pytest.mark.parametrize(("shape", "scale"), SMALL)
def test_equals_the_definition_and_races_for_nothing(monkeypatch, shape, scale):
    """The interpreter follows every barrier and raises where loads and stores of two warpgroups are unordered."""
    watched = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", watched)
    check(shape, scale, blocks=1, interpret=True)  # one block, so that it has several items


@pytest.mark.parametrize(("value_dim", "rotary"), [(64, 0), (512, 0), (512, 64)])
def test_lowers_for_cuda(value_dim, rotary):
    arguments = abstract(1, 512, 131_072, 128, value_dim, rotary, 2048)
    text = kernel(0.1).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "stablehlo.pad" not in text and "stablehlo.transpose" not in text


def test_fits_the_multiprocessor():
    assert smem_bytes() == 226 * 1024 < SMEM_BYTES


def test_the_pieces_of_a_row():
    assert pieces(64) == [1] and pieces(192) == [3] and pieces(512) == [3, 3, 2] and pieces(576) == [3, 3, 3]


def test_registers_are_those_of_the_launch():
    assert COMPUTE_REGISTERS % 8 == 0 and GATHER_REGISTERS >= 40
    assert 2 * COMPUTE_REGISTERS + GATHER_REGISTERS == 3 * (65536 // 384 // 8 * 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 8, 96, 64, 0, 128), "heads must be a multiple of 64, got 96"),
        ((1, 2, 8, 64, 96, 0, 128), "value_dim must be a multiple of 64 from 64 to 512, got 96"),
        ((1, 2, 8, 64, 576, 0, 128), "value_dim must be a multiple of 64 from 64 to 512, got 576"),
        ((1, 2, 8, 64, 64, 32, 128), "the rotary columns must be 0 or 64, got 96 - 64 = 32"),
        ((1, 2, 8, 64, 64, 0, 100), "K must be a multiple of 64, got 100"),
        ((1, 0, 8, 64, 64, 0, 128), "no dimension may be 0"),
        ((1, 2, 0, 64, 64, 0, 128), "no dimension may be 0"),
        ((1, 2**22, 8, 128, 64, 0, 2048), "must be below 2²⁷"),
    ],
)
def test_says_why_it_cannot(shape, message):
    arguments = abstract(*shape)
    reason = why_not(*arguments)
    assert reason is not None and message in reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        sparse_backward_weights(*arguments, scale=1.0)


def test_says_why_it_cannot_take_other_arrays():
    arguments = abstract(2, 3, 9, 64, 64, 64, 128)
    assert why_not(*arguments) is None
    for i, name in enumerate(("q", "d_out", "kv", "indices", "lse", "delta")):
        other = jax.ShapeDtypeStruct(arguments[i].shape, jnp.float16)
        with_other: Any = (*arguments[:i], other, *arguments[i + 1 :])
        reason = why_not(*with_other)
        assert reason is not None and re.match(rf"{name} must be \w+ \(.*\), got float16 ", reason)
    q, d_out, kv, *rest = arguments
    assert "lse must be float32 (6, 64)" in str(why_not(q, d_out, kv, rest[0], kv, rest[2]))
    assert "kv must be bfloat16 (2, 9, 128)" in str(why_not(q, d_out, abstract(2, 3, 9, 64, 64, 0, 128)[2], *rest))
    four = jax.ShapeDtypeStruct((4, 9, 128), jnp.bfloat16)
    assert "the queries must be a multiple of the batch, got 6 and 4" in str(why_not(q, d_out, four, *rest))
    assert "expected q [B·T, N, H]" in str(why_not(rest[0], d_out, kv, *rest))
    for scale in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
            sparse_backward_weights(*arguments, scale=scale)


# On the card


def sweep(count):
    """Yields shapes B, T, S, N, C, R, K of every kind."""
    rng = np.random.default_rng(11)
    for _ in range(count):
        yield (
            *(int(rng.integers(1, high)) for high in (4, 12)),
            int(rng.choice([1, 2, 63, 1000, 20_000])),
            int(rng.choice([64, 128, 192])),
            64 * int(rng.integers(1, 9)),
            64 * int(rng.integers(0, 2)),
            int(rng.choice([64, 128, 256, 512, 2048])),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", list(sweep(8)), ids=str)
def test_equals_the_definition_on_the_card(shape):
    check(shape, 0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.06, 0.0, 1.0])
def test_takes_any_scale_on_the_card(scale):
    check((1, 5, 300, 128, 512, 64, 512), scale)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_any_share_of_the_work_on_the_card(blocks):
    check((1, 7, 300, 128, 512, 64, 256), 0.05, blocks=blocks)


@pytest.mark.gpu
def test_the_published_size_and_the_same_bits_each_time_on_the_card():
    scale, t, n, k, size = 576**-0.5, 512, 128, 2048, 8192
    key = jax.random.split(jax.random.key(0), 5)
    shapes = (t, n, 576), (t, n, 512), (1, size, 576)
    q, d_out, kv = (jax.random.normal(*x, jnp.bfloat16) for x in zip(key[:3], shapes, strict=True))
    indices, delta = jax.random.randint(key[3], (t, k), 0, size, jnp.int32), jax.random.normal(key[4], (t, n))
    whole = q, d_out, kv, indices, jnp.full((t, n), 8.0), delta
    call = kernel(scale)
    first = call(*whole)
    compare(first, whole, scale)
    for _ in range(3):
        assert all(map(jnp.array_equal, call(*whole), first))
