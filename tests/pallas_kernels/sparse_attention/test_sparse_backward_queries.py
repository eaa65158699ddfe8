"""Tests the Hopper kernel of d_q: interpreted and lowered on a CPU, real on the card."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, hostile_indices, normal, poison_unselected, same_bits
from jax.experimental.pallas import mosaic_gpu as plgpu
from reference import f64

from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES, SMEM_GRANULE_BYTES
from dsa_jax.pallas_kernels.sparse_attention.backward_queries import (
    COMPUTE_REGISTERS,
    GATHER_REGISTERS,
    column_parts,
    smem_bytes,
    sparse_backward_queries,
    why_not,
)


def abstract(b, t, s, n, k, h) -> tuple[Any, Any, Any]:
    """Makes ds, kv and indices as shapes."""
    ds, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((b * t, n, k), (b, s, h)))
    return ds, kv, jax.ShapeDtypeStruct((b * t, k), jnp.int32)


def with_ds(seed, b, n, s, h, indices):
    """Makes random ds, 0 where there is no key, and kv, NaN where nothing looks, for indices [B, T, K]."""
    indices = np.asarray(indices)
    present = (indices >= 0) & (indices < s)
    rows, keys = b * indices.shape[1], indices.shape[2]
    ds = normal(seed, rows, n, keys, dtype="bfloat16") * present.reshape(rows, 1, keys)
    kv = poison_unselected(normal(seed + 1, b, s, h, dtype="bfloat16"), indices)
    return ds, kv, array(indices.reshape(rows, keys))


def inputs(seed, b, t, s, n, k, h):
    """Makes arguments: hostile indices (duplicates, every absence, an empty row), empty blocks, NaN in unread rows."""
    indices = np.array(hostile_indices(seed + 2, b, t, k, s))
    indices[-1, -1, :64] = -1
    indices[0, 0, k - 64 :] = s
    return with_ds(seed, b, n, s, h, indices)


def kernel(blocks=None, interpret=False) -> Any:
    """Makes the kernel a function of arrays, compiled unless it is interpreted."""
    call = functools.partial(sparse_backward_queries, blocks=blocks, interpret=interpret)
    return call if interpret else jax.jit(call)


def compare(d_q, ds, kv, indices):
    """Holds d_q against float64: 5e-3 in the norm, of which rounding the result to bfloat16 takes 1.7e-3."""
    chex.assert_shape(d_q, (*ds.shape[:2], kv.shape[2]))
    assert d_q.dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(d_q))
    length, size, kv, indices = len(ds) // len(kv), kv.shape[1], np.asarray(kv), np.asarray(indices)
    queries = np.arange(len(ds))
    if len(ds) > 16:  # the first, the last, those that hostile_indices empties, and some between
        queries = np.unique([0, 1, length // 2, len(ds) - length, len(ds) - 1, *range(2, len(ds), len(ds) // 8)])
    want = np.zeros((len(queries), *d_q.shape[1:]))
    for i, query in enumerate(queries):
        present = (indices[query] >= 0) & (indices[query] < size)
        rows = f64(kv[query // length][indices[query][present]])
        want[i] = f64(ds[query])[:, present] @ rows
    got = f64(d_q[queries])
    assert np.linalg.norm(got - want) <= 5e-3 * np.linalg.norm(want)
    np.testing.assert_array_equal(got[np.all(want == 0, axis=(1, 2))], 0.0)


def check(ds, kv, indices, **options):
    """Runs the kernel and holds it against the definition."""
    compare(kernel(**options)(ds, kv, indices), ds, kv, indices)


# B, T, S, N, K, H: parts of 3 tiles and of 2 by turns; three batch rows, both warpgroups with columns of their own; and
# 64 heads of 192 with a warpgroup idle. Slots of rows are refilled in all, and of ds in the first.
@pytest.mark.parametrize(
    "shape", [(1, 4, 20, 128, 128, 384), (3, 1, 20, 64, 128, 128), (2, 1, 40, 192, 128, 64)], ids=str
)
def test_equals_the_definition_and_races_for_nothing(monkeypatch, shape):
    """The interpreter follows every barrier and raises where loads and stores of two warpgroups are unordered.

    It does not notice rows gathered over others that wgmma still reads.
    """
    watched = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", watched)
    check(*inputs(0, *shape), blocks=2, interpret=True)


@pytest.mark.parametrize(("heads", "dim"), [(128, 576), (128, 64), (64, 576), (64, 64), (192, 640)])
def test_lowers_for_cuda(heads, dim):
    arguments = abstract(2, 3000, 131_072, heads, 2048, dim)
    text = kernel().trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "stablehlo.pad" not in text and "stablehlo.transpose" not in text


def test_fits_the_multiprocessor():
    for dim in range(64, 641, 64):
        assert smem_bytes(dim) <= SMEM_BYTES - SMEM_GRANULE_BYTES
        for heads in (64, 128):
            parts = column_parts(dim, heads)
            assert [first for first, _ in parts] == [0, parts[0][1]][: len(parts)]
            assert sum(count for _, count in parts) == dim
            assert all(count % 64 == 0 and 0 < count <= 320 for _, count in parts)
    assert smem_bytes(576) == 226 * 1024
    assert column_parts(576, 128) == column_parts(576, 64) == ((0, 320), (320, 256))


def test_registers_are_those_of_the_launch():
    assert COMPUTE_REGISTERS % 8 == 0 and GATHER_REGISTERS >= 24
    assert 2 * COMPUTE_REGISTERS + GATHER_REGISTERS == 3 * (65536 // 384 // 8 * 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 8, 96, 128, 64), "heads must be a multiple of 64, got 96"),
        ((1, 2, 8, 64, 192, 64), "K must be a multiple of 128, got 192"),
        ((1, 2, 8, 64, 128, 96), "H must be a multiple of 64 up to 640, got 96"),
        ((1, 2, 8, 64, 128, 704), "H must be a multiple of 64 up to 640, got 704"),
        ((1, 0, 8, 64, 128, 64), "no dimension may be 0"),
        ((1, 2, 0, 64, 128, 64), "no dimension may be 0"),
        ((1, 2, 8, 64, 0, 64), "no dimension may be 0"),
        ((1, 2**24, 8, 128, 2048, 576), "must be below 2³⁰"),
    ],
)
def test_says_why_it_cannot(shape, message):
    arguments = abstract(*shape)
    reason = why_not(*arguments)
    assert reason is not None and message in reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        sparse_backward_queries(*arguments)


def test_says_why_it_cannot_take_other_arrays():
    ds, kv, indices = abstract(2, 3, 9, 64, 128, 64)
    assert why_not(ds, kv, indices) is None
    float32 = jax.ShapeDtypeStruct(ds.shape, jnp.float32)
    assert "must be bfloat16 and indices int32, got float32, bfloat16, int32" in str(why_not(float32, kv, indices))
    assert "do not fit together" in str(why_not(ds, kv, abstract(1, 5, 9, 64, 128, 64)[2]))
    assert "do not fit together" in str(why_not(ds, abstract(4, 1, 9, 64, 128, 64)[1], indices))
    assert "expected ds [B·T, N, K]" in str(why_not(ds, kv, kv.update(dtype=jnp.int32)))


# On the card


def sweep(count):
    """Yields shapes B, T, S, N, K, H of every kind."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        yield (
            *(int(rng.integers(1, high)) for high in (4, 60)),
            int(rng.choice([1, 2, 63, 1000, 9000])),
            int(rng.choice([64, 128, 192])),
            int(rng.choice([128, 256, 384, 640, 2048])),
            64 * int(rng.integers(1, 11)),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", list(sweep(8)), ids=str)
def test_equals_the_definition_on_the_card(shape):
    check(*inputs(0, *shape))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8192, 131_072])
@pytest.mark.parametrize("heads", [64, 128])
def test_the_published_size_on_the_card(heads, size):
    """512 queries with 2048 keys each: the error, and 20 runs with the same bits."""
    a, b, c = jax.random.split(jax.random.key(0), 3)
    ds, kv = (jax.random.normal(*x, jnp.bfloat16) for x in ((a, (512, heads, 2048)), (b, (1, size, 576))))
    indices = jax.random.randint(c, (512, 2048), 0, size, jnp.int32)
    call = kernel()
    first = call(ds, kv, indices)
    compare(first, ds, kv, indices)
    for _ in range(20):
        assert jnp.array_equal(call(ds, kv, indices), first)


@pytest.mark.gpu
def test_a_query_depends_on_nothing_else_on_the_card():
    ds, kv, indices = inputs(0, 1, 300, 5000, 128, 1024, 576)
    first = jax.device_get(kernel()(ds, kv, indices))
    for blocks in (3, 1000):
        same_bits(kernel(blocks)(ds, kv, indices), first)
    same_bits(kernel()(ds[101:108], kv, indices[101:108]), first[101:108])
    twice = kernel()(*(jnp.concatenate([x, x]) for x in (ds, kv, indices)))
    same_bits(twice, np.concatenate([first, first]))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_is_part_of_a_program_on_the_card(heads):
    """Compiled with what makes its arguments and uses its results, it reads and writes what it should."""
    ds, kv, indices = inputs(0, 2, 50, 300, heads, 256, 192)
    indices = jnp.where((indices >= 0) & (indices < 300), indices, -1)

    @jax.jit
    def program(ds, kv, indices):
        return kernel()(ds * 1, kv[:, ::-1], kv.shape[1] - 1 - indices)[::-1]

    same_bits(program(ds, kv, indices), kernel()(ds, kv, indices)[::-1])
