"""Shapes, inputs and cotangents for the tests of the attention."""

import numpy as np
from cases import hostile_indices, noise, normal

from dsa_jax import sparse_attention

# B, T, S, N, C, R, K
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (2, 9, 17, 3, 8, 4, 6), (1, 70, 300, 4, 16, 8, 40), (2, 33, 130, 2, 8, 8, 200)]
SCALE = 0.3


def inputs(shape, dtype="float32", seed=0):
    b, t, s, n, c, r, k = shape
    return (
        normal(seed, b, t, n, c + r, dtype=dtype),
        normal(seed + 1, b, s, c + r, dtype=dtype),
        hostile_indices(2, b, t, k, s),
    )


def heads_inputs(b, t, s, n, p, r, v, dtype="float32"):
    return (
        normal(0, b, t, n, p + r, dtype=dtype),
        normal(1, b, s, n, p + r, dtype=dtype),
        normal(2, b, s, n, v, dtype=dtype),
    )


def cotangents(value):
    """Makes cotangents of `out` and `lse`; zero where `lse` is −inf, as a mask downstream would leave it."""
    out, lse = value
    numpy = lse.__array_namespace__()  # JAX's in a program, NumPy's of its results
    d_lse = numpy.where(numpy.isfinite(lse), noise(8, *lse.shape), np.float32(0))
    return noise(7, *out.shape, dtype=out.dtype), d_lse


def sparse(value_dim, indices, scale=SCALE):
    return lambda q, kv: sparse_attention(q, kv, indices, value_dim=value_dim, scale=scale)
