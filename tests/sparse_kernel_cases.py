"""Inputs, the definition in float64 and comparisons for the kernels of `sparse_attention`."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from cases import array, hostile_indices, normal, poison_unselected
from reference import f64

from dsa_jax.pallas_kernels.sparse_attention.forward import sparse_attention


def abstract(b, t, s, n, c, r, k) -> tuple[Any, Any, Any]:
    """Makes q, kv and indices as shapes."""
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b, t, n, c + r), (b, s, c + r)))
    return q, kv, jax.ShapeDtypeStruct((b, t, k), jnp.int32)


def inputs(seed, b, t, s, n, c, r, k):
    """Makes arguments: hostile indices (duplicates, every absence, an empty row), empty blocks, NaN in unread rows."""
    q, kv = normal(seed, b, t, n, c + r, dtype="bfloat16"), normal(seed + 1, b, s, c + r, dtype="bfloat16")
    indices = np.array(hostile_indices(seed + 2, b, t, k, s))
    if k > 64:
        indices[-1, -1, :64] = -1
    if k > 200:
        indices[0, 0, 64:192] = s
    return q, poison_unselected(kv, indices), array(indices)


def kernel(value_dim, scale=0.1, config=None, interpret=False) -> Any:
    """Makes the kernel a compiled function of arrays."""
    options = dict(value_dim=value_dim, scale=scale, config=config, interpret=interpret)
    return jax.jit(functools.partial(sparse_attention, **options))


def compared_queries(b, t):
    """Chooses places (b, t) to compare: all of up to 16, else the first, the last, the hostile ones, and 8 between."""
    if b * t <= 16:
        return tuple(np.indices((b, t)).reshape(2, -1))
    between = np.random.default_rng(0).integers(0, (b, t), (8, 2))
    return tuple(np.array([(0, 0), (0, t // 2), (b - 1, 0), (b - 1, t - 1), *between]).T)


def compare(results, q, kv, indices, value_dim, scale=0.1):
    """Holds results against float64: 5e-3 in the norm of `out`, which P in bfloat16 takes, and 1e-4 in `lse`."""
    out, lse, q, indices = map(np.asarray, (*results, q, indices))
    chex.assert_shape(out, (*q.shape[:3], value_dim))
    chex.assert_shape(lse, q.shape[:3])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert np.all(np.isfinite(out)) and not np.any(np.isnan(lse))
    places = compared_queries(*q.shape[:2])
    want_out, want_lse = _definition(places, q[places], kv, indices[places], value_dim, scale)
    got_out, got_lse = f64(out[places]), f64(lse[places])
    empty = np.isneginf(want_lse)
    assert np.linalg.norm(got_out - want_out) <= 5e-3 * np.linalg.norm(want_out)
    np.testing.assert_array_equal(np.isneginf(got_lse), empty)
    np.testing.assert_array_equal(got_out[empty], 0.0)
    np.testing.assert_allclose(got_lse[~empty], want_lse[~empty], rtol=1e-4, atol=1e-4)


def check(q, kv, indices, value_dim, scale=0.1, **options):
    """Runs the kernel and holds it against the definition."""
    compare(kernel(value_dim, scale, **options)(q, kv, indices), q, kv, indices, value_dim, scale)


def _definition(places, q, kv, indices, value_dim, scale):
    """Computes out and lse in float64, for q [P, N, H] and indices [P, K] of the queries at `places`, one at a time."""
    q, kv = f64(q), np.asarray(kv)
    out, lse = np.zeros((*q.shape[:2], value_dim)), np.full(q.shape[:2], -np.inf)
    for i, (b, keys) in enumerate(zip(places[0], indices, strict=True)):
        rows = f64(kv[b, keys[(keys >= 0) & (keys < kv.shape[1])]])
        if len(rows):
            logits = scale * q[i] @ rows.T
            lse[i] = np.logaddexp.reduce(logits, axis=1)
            out[i] = np.exp(logits - lse[i][:, None]) @ rows[:, :value_dim]
    return out, lse
