"""Random inputs, hostile indices and comparisons shared by the tests of the operations."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from reference import f64, quantize

from dsa_jax import KeyRange, index_scores, select_keys, select_topk
from dsa_jax import blockwise as blocks

INT_MIN, INT_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max
FP8 = "float8_e4m3fn"
FAST = {"xla_backend_optimization_level": 0}  # what runs once or twice spends most of its time in the compiler


def array(x, dtype=None) -> jax.Array:
    """`jnp.asarray`, cast by NumPy: by JAX it would be a program more for every shape."""
    dtype = jax.dtypes.canonicalize_dtype(np.asarray(x).dtype if dtype is None else dtype)
    return jnp.asarray(np.asarray(x).astype(dtype), dtype)


def noise(seed, *shape, dtype="float32"):
    """Standard normal values, rounded to `dtype`, in NumPy."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def normal(seed, *shape, dtype="float32"):
    """Standard normal values, rounded to `dtype`."""
    return array(noise(seed, *shape, dtype=dtype), dtype)


def integers(seed, *shape, low=-2, high=3, dtype="float32"):
    """Small integers as float32, or narrower: every product and sum of them is exact in any order."""
    return array(np.random.default_rng(seed).integers(low, high, shape), dtype)


def powers(seed, *shape, spread=1):
    """Powers of two near 1."""
    return array(np.exp2(np.round(spread * noise(seed, *shape))))


def index_inputs(seed, b, t, s, j, e, dtype="float32") -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """q_index, k_index, weights and k_scale (None but for FP8, where the weights carry q's scale)."""
    weights = normal(seed + 2, b, t, j)
    if dtype != FP8:
        return normal(seed, b, t, j, e, dtype=dtype), normal(seed + 1, b, s, e, dtype=dtype), weights, None
    (q, q_scale), (k, k_scale) = quantize(noise(seed, b, t, j, e)), quantize(3 * noise(seed + 1, b, s, e))
    return array(q, FP8), array(k, FP8), array(np.asarray(weights) * q_scale), array(k_scale)


def as_numpy(tree) -> Any:
    """The arrays of a tree as NumPy's: the operations accept them as well, and parts of them cost no program."""
    return jax.tree.map(np.asarray, tree)


def random_range(seed, b, t, s):
    """Ranges of every kind, empty and reversed ones among them."""
    edge = np.random.default_rng(seed).integers(0, s + 1, (b, t, 2)).astype(np.int32)
    return KeyRange(array(edge[..., 0], "int32"), array(edge[..., 1], "int32"))


def causal_range(b, t, offset=0):
    """`KeyRange.causal`, written again in NumPy, where it compiles nothing."""
    stop = np.broadcast_to(np.arange(t) + offset + 1, (b, t))
    return KeyRange(array(np.zeros((b, t)), "int32"), array(stop, "int32"))


def hostile_indices(seed, b, t, k, size):
    """Unsorted rows with duplicates, absent slots of every sort at any place, and one row of nothing."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, size, (b, t, k)).astype(np.int32)
    absent = rng.choice(np.array([-1, -2, -size, size, size + 1, INT_MIN, INT_MAX], np.int32), (b, t, k))
    indices = np.where(rng.random((b, t, k)) < 0.4, absent, indices)
    indices[0, t // 2] = absent[0, t // 2]
    if t > 1:
        indices[-1, 0] = -1
        indices[-1, 0, k // 2] = size - 1
    return array(indices, "int32")


def causal_indices(b, t, s, k):
    """Every key up to the query's own, in canonical form: K ≥ S sparse attention is dense."""
    row = np.arange(k)
    return array(np.broadcast_to(np.where(row <= np.arange(t)[:, None] + s - t, row, -1), (b, t, k)), "int32")


def poison(x, absent, value=np.nan):
    """NaN, or another value, in the rows of x [B, S, …] where `absent` [B, S]."""
    poisoned = np.array(x)
    poisoned[np.asarray(absent)] = value
    return array(poisoned, x.dtype)


def poison_unselected(x, indices):
    """NaN in the rows of x [B, S, …] that are not among indices [B, T, K]."""
    absent = np.ones(x.shape[:2], bool)
    for row, keys in zip(absent, np.asarray(indices), strict=True):
        row[keys[(keys >= 0) & (keys < x.shape[1])]] = False
    return poison(x, absent)


def pulled(function, *arguments, cotangent=jnp.ones_like):
    """The value of a function and its gradients for `cotangent(value)`, compiled as one program."""

    def run(*arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(jax.tree.map(jnp.asarray, cotangent(value)))

    return jax.jit(run)(*arguments)


@jax.jit
def scores_of(q_index, k_index, weights, keys, k_scale=None):
    """`index_scores`, compiled once a shape."""
    return index_scores(q_index, k_index, weights, keys, k_scale=k_scale)


@functools.partial(jax.jit, static_argnums=4)
def keys_of(q_index, k_index, weights, keys, k, k_scale=None):
    """`select_keys`, compiled once a shape."""
    return select_keys(q_index, k_index, weights, keys, k=k, k_scale=k_scale)


@functools.partial(jax.jit, static_argnums=1)
def topk_of(scores, k, keys=None):
    """`select_topk`, compiled once a shape."""
    return select_topk(scores, k, keys=keys)


def many_blocks(monkeypatch, shape, block=40_000):
    """Has the larger test shapes evaluated in many blocks of queries, the last one padded, as long ones are."""
    if shape[1] > 30:
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)


def close(actual, expected, tolerance):
    """|actual − expected| ≤ tolerance · (|expected| + the largest finite |expected|, at most 1 of it)."""
    expected = f64(expected)
    finite = np.abs(expected[np.isfinite(expected)])
    size = min(1.0, finite.max()) if finite.size else 0.0
    np.testing.assert_allclose(f64(actual), expected, rtol=tolerance, atol=tolerance * size)


def error(actual, expected):
    """Computes the norm of the difference over that of what is expected; nothing may be NaN or infinite."""
    actual, expected = f64(actual), f64(expected)
    assert np.all(np.isfinite(actual))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def same_bits(actual, expected):
    """Equal in every bit, the sign of zero included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), f"{(actual != expected).sum()} of {actual.size} differ"


def equations(jaxpr) -> Iterator[Any]:
    """Yields all equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def variants_except(cases, always):
    """Marks as variants all of a test's cases, tuples of parameters, but those for which `always(*case)` is true."""
    return [case if always(*case) else pytest.param(*case, marks=pytest.mark.variants) for case in cases]


def the_first(count, cases):
    """Marks as variants all of a test's cases, single parameters or tuples of them, but the first `count`."""
    rest = (case if isinstance(case, tuple) else (case,) for case in cases[count:])
    return [*cases[:count], *(pytest.param(*case, marks=pytest.mark.variants) for case in rest)]


@contextlib.contextmanager
def unchecked():
    """Without the shape checker of the tests: what a caller meets."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
