"""Tests the sparse KL's kernel: its softmax on NumPy threads, all of it interpreted, lowered, and on the card."""

import importlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy_simt
import numpy_simt_softmax
import pytest
from cases import array, hostile_indices, normal, poison_unselected, same_bits
from reference import f64

from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES, WARPGROUP_THREADS
from dsa_jax.pallas_kernels.indexer_loss.selection_kl import (
    GATHER_REGISTERS,
    MATH_REGISTERS,
    TEAMS,
    masked,
    selection_kl,
    signs,
    smem_bytes,
    stages_of,
    why_not,
)

kernel = importlib.import_module("dsa_jax.pallas_kernels.indexer_loss.selection_kl")  # to be patched


def inputs(seed, b, t, s, k, j, e, scale=0.02) -> tuple[Any, ...]:
    """Makes arguments: hostile indices, an empty row, one whose p is 0, NaN in unread rows, p where there is no key."""
    random = np.random.default_rng(seed)
    indices = np.array(hostile_indices(seed, b, t, k, s))
    if k > 200:
        indices[0, 0, 64:192] = s
    sums = random.exponential(size=indices.shape) * (random.random(indices.shape) < 0.8)
    sums[0, -1] = 0
    k_index = poison_unselected(normal(seed + 1, b, s, e, dtype="bfloat16"), indices)
    k_scale = poison_unselected(array(random.uniform(0.5, 2, (b, s)), jnp.float32), indices)
    sums, indices = array(sums.reshape(b * t, k), jnp.float32), array(indices.reshape(b * t, k))
    q_index, weights = normal(seed + 2, b * t, j, e, dtype="bfloat16"), scale * normal(seed + 3, b * t, j)
    return sums, q_index, k_index, weights, indices, k_scale, normal(seed + 4, b * t)


def definition(sums, q_index, k_index, weights, indices, k_scale, d_kl):
    """Computes one query after another, in float64: kl, d_q, d_weights, contributions [T', K, E]."""
    sums, q_index, weights, d_kl, indices = f64(sums), f64(q_index), f64(weights), f64(d_kl), np.asarray(indices)
    (queries, keys), size, dim = indices.shape, k_index.shape[1], k_index.shape[2]
    kl, d_q, d_weights = np.zeros(queries), np.zeros_like(q_index), np.zeros_like(weights)
    contributions = np.zeros((queries, keys, dim))
    for i, row in enumerate(indices):
        b, there = i // (queries // len(k_index)), (row >= 0) & (row < size)
        if not there.any():
            continue
        rows, scale = f64(np.asarray(k_index)[b, row[there]]), f64(k_scale)[b, row[there]]
        logits = q_index[i] @ rows.T
        scores = scale * (weights[i] @ np.maximum(logits, 0))
        target = sums[i, there] / (sums[i, there].sum() or 1)
        log_softmax = scores - np.logaddexp.reduce(scores)
        counts = target > 0
        kl[i] = target[counts] @ (np.log(target[counts]) - log_softmax[counts])
        d_scores = (np.exp(log_softmax) - target) * d_kl[i] * scale
        d_logits = np.where(logits > 0, d_scores * weights[i][:, None], 0)
        d_q[i], contributions[i, there] = d_logits @ rows, d_logits.T @ q_index[i]
        d_weights[i] = np.maximum(logits, 0) @ d_scores
    return kl, d_q, d_weights, contributions


def compare(results, *arguments):
    """Holds results against float64: 5e-3 of the norm where they are bfloat16, 1e-5 of it in kl.

    In d_weights 2^-14: wgmma truncates its sums, by 2^-24 for each 16 keys of up to 8192, and dI comes in two bfloat16.
    """
    dim = arguments[1].shape[2]
    want = definition(*arguments)
    kl, d_q, d_weights, contributions = results
    assert (kl.dtype, d_q.dtype, d_weights.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    chex.assert_shape(contributions, (arguments[4].size, dim))
    got = kl, d_q, d_weights, contributions.reshape(want[3].shape)
    bounds = (1e-5, 5e-3, 2.0**-14, 5e-3)
    for name, x, y, bound in zip(("kl", "d_q", "d_weights", "d_k"), got, want, bounds, strict=True):
        assert np.isfinite(f64(x)).all(), name
        assert np.linalg.norm(f64(x) - y) <= bound * np.linalg.norm(y), name
    absent = (np.asarray(arguments[4]) < 0) | (np.asarray(arguments[4]) >= arguments[2].shape[1])
    np.testing.assert_array_equal(f64(got[3])[absent], 0.0)
    empty = absent.all(1)
    assert empty.any()
    for x in got:
        np.testing.assert_array_equal(f64(x)[empty], 0.0)


call = jax.jit(selection_kl, static_argnames=("blocks", "interpret"))


@pytest.mark.parametrize(("k", "backward"), [(128, True), (384, False), (2176, True)])
@pytest.mark.parametrize("kind", ["some", "none", "all", "one", "p is 0", "far apart", "low", "NaN", "inf", "p is NaN"])
def test_statistics(k, backward, kind):
    """The softmax's own Python: I, KL and dI of one query, at the edges of its unrolling."""
    random = np.random.default_rng(k)
    size, query = 1000, 3
    ids = random.integers(0, size, k).astype(np.int32)
    if kind not in ("all", "p is 0"):
        ids = np.where(random.random(k) < 0.4, random.choice([-1, size, 2**31 - 1, -(2**31)], k), ids).astype(np.int32)
    if kind in ("none", "one"):
        ids[:] = -1
    if kind == "one":
        ids[k - 1] = 7
    there = (ids >= 0) & (ids < size)
    sums = (random.exponential(size=k) * (random.random(k) < 0.7)).astype(np.float32)
    sums = np.where(there, sums, np.float32(np.nan)) if kind != "p is 0" else np.zeros(k, np.float32)
    spread, shift = {"far apart": (300, 0), "low": (1, -500)}.get(kind, (2, 0))
    weighted = (spread * random.standard_normal(k) + shift).astype(np.float32)
    scale, d_kl = random.uniform(0.5, 2, size).astype(np.float32), random.standard_normal(5).astype(np.float32)
    shows = kind in ("NaN", "inf", "p is NaN")
    if shows:
        spoilt, value = (sums, np.nan) if kind == "p is NaN" else (weighted, float(kind))
        spoilt[np.flatnonzero(there)[1]] = value
    machine = numpy_simt.Machine(WARPGROUP_THREADS, k + 16, 0)
    machine.smem[:k] = weighted.view(np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "simt", numpy_simt)
        patch.setattr(kernel, "simt_softmax", numpy_simt_softmax)
        patch.setattr(numpy_simt, "machine", machine, raising=False)
        at = [numpy_simt.gmem_address(machine.put(x)) for x in (ids, sums, scale, d_kl, np.full(5, 9, np.float32))]
        query_at = numpy_simt.i32(query)
        scores, notes = numpy_simt.smem_address(0), numpy_simt.smem_address(4 * k)
        arguments: Any = (query_at, at[0], at[1], at[2], at[3:4] if backward else [], at[4], scores, notes)
        kernel.run_statistics(k, size, *arguments)
    kl = machine.gmem[int(at[4].value[0]) // 4 :].view(np.float32)[:5]
    if shows:
        np.testing.assert_array_equal(kl, [9, 9, 9, np.nan, 9])
        if backward:
            np.testing.assert_array_equal(machine.smem[:k].view(np.float32), np.where(there, np.nan, 0.0))
        return
    x = weighted[there].astype(np.float64) * scale[ids[there]]
    p = sums[there] / (sums[there].sum(dtype=np.float64) or 1)
    log_softmax = x - np.logaddexp.reduce(x) if len(x) else x
    want = p[p > 0] @ (np.log(p[p > 0]) - log_softmax[p > 0])
    np.testing.assert_allclose(kl, [9, 9, 9, want, 9], rtol=2e-5, atol=2e-6)
    d_scores = np.zeros(k)
    d_scores[there] = (np.exp(log_softmax) - p) * d_kl[query] * scale[ids[there]]
    if backward:
        got = machine.smem[:k].view(np.float32)
        np.testing.assert_allclose(got, d_scores, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(got[~there], 0.0)


def test_interpreted():
    arguments = inputs(0, 1, 3, 60, 128, 32, 64)
    # One team has two queries, and its ring of 3 stages turns over.
    compare(call(*arguments, blocks=1, interpret=True), *arguments)


@pytest.mark.parametrize(("j", "e", "k"), [(64, 128, 2048), (16, 64, 128)])
@pytest.mark.parametrize("backward", [True, False])
def test_lowers(j, e, k, backward):
    arguments = abstract(4, 2, 500, k, j, e)[: 6 + backward]
    lowered = jax.jit(selection_kl).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in lowered


def abstract(t, b, s, k, j, e) -> list[Any]:
    shapes = [(t, k), (t, j, e), (b, s, e), (t, j), (t, k), (b, s), (t,)]
    dtypes = [jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.int32, jnp.float32, jnp.float32]
    return [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]


def test_budget():
    assert stages_of(2048, 128, True) == stages_of(8192, 128, False) == 3
    assert stages_of(8192, 128, True) == 2 and stages_of(1 << 15, 128, False) == 0
    assert smem_bytes(2048, 128, 3, True) == 211 * 1024 < SMEM_BYTES < smem_bytes(2048, 128, 4, True)
    assert TEAMS * (MATH_REGISTERS + GATHER_REGISTERS) == 512 and GATHER_REGISTERS % 8 == 0


def test_signs_and_masks():
    """Tests the interpreter's bits and masks, of zeros of either sign and NaN too; the kernel's own run on the card."""
    logits = normal(0, 64, 64).at[3].set(0.0).at[5].set(-0.0).at[7].set(jnp.nan)
    values = normal(1, 64)
    total = sum(x.astype(jnp.float32) for x in masked(signs(logits, True), values, True))
    want = jnp.where(logits <= 0, 0.0, values[:, None])
    assert jnp.abs(total - want).max() <= 2.0**-16 * jnp.abs(values).max()
    np.testing.assert_array_equal(np.asarray(total)[np.asarray(logits <= 0)], 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"j": 48}, "J must be"),
        ({"e": 96}, "E of"),
        ({"k": 200}, "multiple of 128"),
        ({"k": 1 << 15}, "no shared memory"),
        ({"t": 5}, "multiple of B"),
        ({"s": 0}, "nothing empty"),
    ],
)
def test_refuses_shapes(change, message):
    arguments = abstract(**({"t": 4, "b": 2, "s": 50, "k": 128, "j": 64, "e": 128} | change))
    assert message in str(why_not(*arguments))
    with pytest.raises(ValueError, match=message):
        selection_kl(*arguments)


@pytest.mark.parametrize("i", range(7))
def test_refuses_dtypes(i):
    arguments = abstract(4, 2, 50, 128, 64, 128)
    assert why_not(*arguments) is None
    arguments[i] = jax.ShapeDtypeStruct(arguments[i].shape, jnp.float16)
    with pytest.raises(ValueError, match="must be"):
        selection_kl(*arguments)


SHAPES = [
    # b, t, s, k, j, e
    (1, 8, 300, 128, 64, 128),
    (2, 300, 1000, 384, 64, 128),
    (3, 5, 77, 256, 32, 64),
    (1, 9, 5000, 2048, 64, 128),
    (1, 4, 5000, 2176, 16, 128),
    (2, 3, 9000, 8192, 64, 128),
    (1, 400, 500, 128, 64, 64),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_card(shape):
    arguments = inputs(sum(shape), *shape)
    results = call(*arguments)
    compare(results, *arguments)
    again = call(*arguments, blocks=3)
    for x, y in zip(results, again, strict=True):
        same_bits(jax.lax.bitcast_convert_type(x, _integer(x)), jax.lax.bitcast_convert_type(y, _integer(y)))
    same_bits(call(*arguments[:6]), results[0])


def _integer(x):
    return jnp.int16 if x.dtype == jnp.bfloat16 else jnp.int32


@pytest.mark.gpu
def test_real_size_repeats():
    """T' 4096, K 2048, the same bits in three runs, some queries against the definition."""
    b, t, s, k, j, e = 1, 4096, 8192, 2048, 64, 128
    key = jax.random.split(jax.random.key(0), 6)
    indices = jax.random.randint(key[0], (t, k), -200, s).astype(jnp.int32).at[7].set(-1)
    sums = jnp.where(indices >= 0, jax.random.exponential(key[1], (t, k)), 0.0)
    q_index = jax.random.normal(key[2], (t, j, e), jnp.bfloat16)
    k_index = jax.random.normal(key[3], (b, s, e), jnp.bfloat16)
    weights, d_kl = 0.02 * jax.random.normal(key[4], (t, j)), jax.random.normal(key[5], (t,))
    arguments = sums, q_index, k_index, weights, indices, jnp.ones((b, s)), d_kl
    first = call(*arguments)
    for _ in range(2):  # 2 GiB of contributions each, on a card that other tests use as well
        assert all(bool(jnp.array_equal(x, y)) for x, y in zip(first, call(*arguments), strict=True))
    queries = np.array([0, 7, 1000, 2047, 4095])
    rows = (k * queries[:, None] + np.arange(k)).ravel()
    results = [x[queries] for x in first[:3]] + [first[3][rows]]
    compare(results, *(x[queries] if i not in (2, 5) else x for i, x in enumerate(arguments)))
