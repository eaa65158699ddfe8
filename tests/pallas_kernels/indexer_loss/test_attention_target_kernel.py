"""Tests the Hopper kernel of the head-summed target: plan and errors, interpreted on a CPU, real on the card."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INT_MAX, INT_MIN, array, hostile_indices, normal, poison_unselected, same_bits
from jax.experimental.pallas import mosaic_gpu as plgpu
from reference import f64

from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES
from dsa_jax.pallas_kernels.indexer_loss.attention_target import (
    COMPUTE_REGISTERS,
    GATHER_REGISTERS,
    Plan,
    attention_target,
    why_not,
)

ABSENT = [-1, -2, INT_MIN, INT_MAX, 77]


def inputs(seed, b, t, s, n, h, k):
    """Makes arguments: hostile indices, NaN in every row that nobody selects, and heads that count for nothing."""
    q, kv = normal(seed, b * t, n, h, dtype="bfloat16"), normal(seed + 1, b, s, h, dtype="bfloat16")
    indices = np.array(hostile_indices(seed + 2, b, t, k, s))
    lse = np.array(normal(seed + 3, b * t, n)) + 2.0
    lse[0] = -np.inf
    lse[-1, ::3], lse[-1, 1::3] = np.inf, -np.inf
    return q, poison_unselected(kv, indices), array(lse), array(indices.reshape(b * t, k))


def kernel(scale=0.1, blocks=None, interpret=False) -> Any:
    """Makes the kernel a function of arrays, compiled unless it is interpreted."""
    call = functools.partial(attention_target, scale=scale, blocks=blocks, interpret=interpret)
    return call if interpret else jax.jit(call)


def definition(q, kv, lse, indices, scale, queries):
    """Computes the sums of the given queries, [P, K], one at a time, in float64."""
    per_batch = len(q) // len(kv)
    out = np.zeros((len(queries), indices.shape[1]))
    kv, lse, indices = np.asarray(kv), f64(lse), np.asarray(indices)
    for row, query in zip(out, queries, strict=True):
        present = (indices[query] >= 0) & (indices[query] < kv.shape[1])
        keys = f64(kv[query // per_batch, indices[query][present]])
        counts = np.isfinite(lse[query])
        logits = scale * f64(q[query])[counts] @ keys.T
        row[present] = np.exp(logits - lse[query][counts][:, None]).sum(0)
    return out


def compare(sums, q, kv, lse, indices, scale):
    """Holds the sums of up to 16 queries against float64, and at 0 where there is nothing.

    The tensor cores cut off what a float32 sum has no room for, which takes up to 2e-6 of a logit, and some logits here
    are 10: the exponential has as much of itself.
    """
    assert sums.shape == indices.shape and sums.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(sums))
    between = np.random.default_rng(0).integers(0, len(q), 8)
    queries = np.arange(len(q)) if len(q) <= 16 else np.array([0, len(q) // 2, len(q) - 1, *between])
    want = definition(q, kv, lse, indices, scale, queries)
    np.testing.assert_allclose(f64(sums)[queries], want, rtol=5e-5, atol=0)
    keys = np.asarray(indices)
    np.testing.assert_array_equal(np.asarray(sums)[(keys < 0) | (keys >= kv.shape[1])], 0.0)


def check(q, kv, lse, indices, scale=0.1, **options):
    """Runs the kernel and holds it against the definition."""
    compare(kernel(scale, **options)(q, kv, lse, indices), q, kv, lse, indices, scale)


def abstract(t, s, n, h, k, b=1) -> tuple[Any, Any, Any, Any]:
    """Makes the arguments as shapes."""
    q, kv = jax.ShapeDtypeStruct((t, n, h), jnp.bfloat16), jax.ShapeDtypeStruct((b, s, h), jnp.bfloat16)
    return q, kv, jax.ShapeDtypeStruct((t, n), jnp.float32), jax.ShapeDtypeStruct((t, k), jnp.int32)


# Anywhere.


# B, T, S, N, H, K: both computing warpgroups on every key block, and for the last 64 heads, on every other; several
# queries a block; and two batch rows.
@pytest.mark.parametrize(
    ("shape", "scale", "blocks"),
    [((1, 3, 50, 192, 128, 130), 0.1, 2), ((2, 2, 30, 64, 64, 70), -0.1, None)],
)
def test_equals_the_definition_and_races_for_nothing(monkeypatch, shape, scale, blocks):
    """The interpreter follows every barrier and raises where loads and stores of two warpgroups are unordered."""
    watched = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", watched)
    check(*inputs(0, *shape), scale, blocks=blocks, interpret=True)


@pytest.mark.parametrize("heads", [64, 128])
def test_lowers_for_cuda(heads):
    text = kernel().trace(*abstract(300, 131_072, heads, 576, 2048)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "stablehlo.pad" not in text and "stablehlo.transpose" not in text


def test_a_ragged_selection_is_padded():
    text = kernel().trace(*abstract(4, 50, 64, 64, 129)).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<4x256xi32>" in text


def test_fits_the_multiprocessor():
    sizes = [Plan(heads).smem_bytes(576) for heads in (128, 64)]
    assert sizes == [152 * 1024, 223 * 1024] and max(sizes) < SMEM_BYTES


def test_registers_are_those_of_the_launch():
    assert COMPUTE_REGISTERS % 8 == 0 and GATHER_REGISTERS >= 40
    assert 2 * COMPUTE_REGISTERS + GATHER_REGISTERS == 3 * (65536 // 384 // 8 * 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (abstract(4, 50, 32, 64, 128), "heads must be a multiple of 64, got 32"),
        (abstract(4, 50, 64, 96, 128), "the last dimension must be a multiple of 64 up to 576, got 96"),
        (abstract(4, 50, 64, 640, 128), "the last dimension must be a multiple of 64 up to 576, got 640"),
        (abstract(4, 50, 64, 64, 0), "no dimension may be 0"),
        (abstract(4, 50, 64, 64, 128, b=3), "do not fit together"),
        (abstract(2**26, 50, 64, 64, 2048), "must be below 2"),
        ((*abstract(4, 50, 64, 64, 128)[:3], jax.ShapeDtypeStruct((3, 128), jnp.int32)), "do not fit together"),
        ((*abstract(4, 50, 64, 64, 128)[:3], jax.ShapeDtypeStruct((4, 128), jnp.int16)), "indices int32, got .*int16"),
        ((*abstract(4, 50, 64, 64, 128)[:3], jax.ShapeDtypeStruct((4,), jnp.int32)), r"indices \[T, K\], got"),
    ],
)
def test_says_why_not(arguments, message):
    with pytest.raises(ValueError, match=f"attention_target: .*{message}"):
        jax.eval_shape(functools.partial(attention_target, scale=0.1), *arguments)


def test_takes_what_it_should():
    assert why_not(*abstract(4, 50, 128, 576, 2048)) is None
    assert why_not(*abstract(4, 1, 64, 64, 1, b=4)) is None


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    b, t, s = rng.integers(1, 4), rng.integers(1, 100), rng.integers(1, 2000)
    n, h, k = 64 * (seed % 4 + 1), 64 * rng.integers(1, 10), rng.integers(1, 700)
    scale = rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 2.0) * float(h) ** -0.5
    check(*inputs(seed, *map(int, (b, t, s, n, h, k))), float(scale))


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 3])
def test_any_share_of_the_work_has_the_same_bits(blocks):
    arguments = inputs(5, 1, 300, 1000, 192, 576, 512)
    check(*arguments, 0.05, blocks=blocks)
    same_bits(kernel(0.05, blocks)(*arguments), kernel(0.05)(*arguments))


@pytest.mark.gpu
def test_nothing_selected_at_all():
    q, kv, lse, _ = inputs(7, 1, 9, 77, 192, 576, 256)
    for absent in ABSENT:
        for level in (lse, jnp.full_like(lse, -jnp.inf), jnp.full_like(lse, -1e30)):
            sums = kernel()(q, jnp.full_like(kv, jnp.nan), level, jnp.full((9, 256), absent, jnp.int32))
            np.testing.assert_array_equal(np.asarray(sums), 0.0)


@pytest.mark.gpu
def test_a_query_depends_on_nothing_else():
    q, kv, lse, indices = inputs(8, 2, 250, 600, 192, 576, 256)
    whole = kernel()(q, kv, lse, indices)
    same_bits(whole[250:], kernel()(q[250:], kv[1:], lse[250:], indices[250:]))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_real_size_and_the_same_bits_again(heads):
    arguments = inputs(9, 1, 300, 8192, heads, 576, 2048)
    call = kernel(576**-0.5)
    first = call(*arguments)
    compare(first, *arguments, 576**-0.5)
    for _ in range(10):
        same_bits(call(*arguments), first)
