"""Tests the sums of gathered rows: the kernel's own Python on NumPy threads, its lowering; itself on the card."""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_simt
import pytest
from cases import array, normal, same_bits

from dsa_jax.pallas_kernels.sum_rows.sum_rows import Config, sum_rows, why_not

kernel = importlib.import_module("dsa_jax.pallas_kernels.sum_rows.sum_rows")  # the door has a function of this name


def inputs(seed, m, w, counts, dtype="bfloat16", unsorted=3):
    """Makes rows of which `unsorted` on each side of the sorted ones belong to no key, and NaN where nothing looks."""
    random = np.random.default_rng(seed)
    offsets = np.cumsum([unsorted, *counts]).astype(np.int32)
    order = random.integers(0, m, offsets[-1] + unsorted).astype(np.int32)
    order[:unsorted] = order[offsets[-1] :] = 2**30
    order = np.concatenate([order, np.full(m, -1, np.int32)])[:m]
    assert offsets[-1] <= m
    unused = np.ones(m, bool)
    unused[order[unsorted : offsets[-1]]] = False
    rows = np.where(unused[:, None], np.nan, normal(seed, m, w))
    total = normal(seed + 1, len(counts), w)
    return array(rows, dtype), array(order), array(offsets), total


def expected(rows, order, offsets, total):
    """Sums in float32, one row after another."""
    rows, out = np.asarray(rows).astype(np.float32), np.array(total)
    order, offsets = np.asarray(order), np.asarray(offsets)
    for s in range(len(out)):
        for i in range(offsets[s], offsets[s + 1]):
            out[s] += rows[order[i]]
    return out


def run(rows, order, offsets, total, config, blocks):
    """Runs the kernel's Python on NumPy threads."""
    machine = numpy_simt.Machine(config.threads, 0, 0)
    rows_at, order_at, offsets_at, out = (machine.put(np.asarray(x)) for x in (rows, order, offsets, total))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "simt", numpy_simt)
        patch.setattr(numpy_simt, "machine", machine, raising=False)
        for block in range(blocks):
            at: Any = (rows_at, order_at, offsets_at, out)
            kernel.run_thread(rows, total.shape[0], blocks, config, numpy_simt.i32(block), *at)
    return machine.gmem[out // 4 :].view(np.float32)[: total.size].reshape(total.shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("w", "counts"), [(64, [0, 1, 3, 0, 40, 8]), (576, [9, 0, 17]), (128, [0, 0]), (192, [1] * 21)]
)
def test_adds_in_order(dtype, w, counts):
    arguments = inputs(1, 100, w, counts, dtype)
    same_bits(run(*arguments, Config(threads=128, ahead=4), 2), expected(*arguments))


def test_config_changes_nothing():
    arguments = inputs(2, 80, 64, [30, 0, 2, 31])
    want = run(*arguments, Config(threads=128, ahead=8), 1)
    same_bits(run(*arguments, Config(threads=256, ahead=2), 3), want)
    same_bits(run(*arguments, Config(threads=128, ahead=16), 2), want)


def test_sign_of_zero_stays():
    rows, order = jnp.full((8, 64), -0.0, jnp.bfloat16), jnp.arange(8, dtype=jnp.int32)
    offsets, total = array([0, 3, 3], jnp.int32), jnp.full((2, 64), -0.0, jnp.float32)
    same_bits(run(rows, order, offsets, total, Config(threads=128), 1), np.asarray(total))


def searched(keys, size):
    """Runs the search's Python on NumPy threads: blocks of 128, one after another."""
    machine = numpy_simt.Machine(128, 0, 0)
    keys_at, out = machine.put(keys), machine.put(np.full(size + 1, 77, np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "simt", numpy_simt)
        patch.setattr(numpy_simt, "machine", machine, raising=False)
        for block in range(size // 128 + 1):
            at: Any = (keys_at, out)
            kernel.search_thread(keys, size, numpy_simt.i32(block), *at)
    return machine.gmem[out // 4 :].view(np.int32)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("kind", ["random", "few", "first", "last", "none"])
@pytest.mark.parametrize(("m", "size"), [(2, 1), (8, 127), (64, 128), (1022, 300), (4098, 5)])
def test_search(dtype, kind, m, size):
    random = np.random.default_rng(m)
    among = {"random": size + 1, "few": [0, size // 2, size], "first": 1, "last": [size - 1], "none": [size]}[kind]
    keys = np.sort(random.choice(among, m)).astype(dtype)
    np.testing.assert_array_equal(searched(keys, size), np.searchsorted(keys, np.arange(size + 1)))


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("m", "size"), [(1, 3), (700, 40), (5000, 70_000), (5001, 8192), (1 << 20, 131_072)])
def test_sort_by_key(m, size, interpret):
    random = np.random.default_rng(m)
    indices = random.integers(0, size, m).astype(np.int32)
    indices = np.where(random.random(m) < 0.3, random.choice([-1, size, 2**31 - 1, -(2**31)], m), indices)
    sort = functools.partial(kernel.sort_by_key, size=size, interpret=interpret)
    order, offsets = jax.jit(sort)(array(indices, jnp.int32))
    keys = np.where((indices >= 0) & (indices < size), indices, size)
    np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(offsets, np.searchsorted(np.sort(keys), np.arange(size + 1)))


@pytest.mark.parametrize("size", [8192, 131_072])
def test_sort_lowers(size):
    sort = functools.partial(kernel.sort_by_key, size=size)
    traced = jax.jit(sort).trace(jax.ShapeDtypeStruct((396, 2048), jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_interpreted(dtype):
    arguments = inputs(3, 60, 64, [0, 20, 0, 5, 1], dtype)
    same_bits(sum_rows(*arguments, interpret=True), expected(*arguments))


@pytest.mark.parametrize(("dtype", "w"), [("bfloat16", 576), ("float32", 128)])
def test_lowers_in_place(dtype, w):
    shapes = [(1000, w), (1000,), (301,), (300, w)]
    dtypes = [dtype, jnp.int32, jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    lowered = jax.jit(sum_rows, donate_argnums=3).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in lowered and "output_operand_aliases = [#stablehlo.output_operand_alias" in lowered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (100, 60)}, "must be float32"),
        ({"rows": (100, 96), "total": (7, 96)}, "multiple of 64"),
        ({"rows": ((100, 64), jnp.float16)}, "bfloat16 or float32"),
        ({"rows": (0, 64), "order": (0,)}, "empty"),
        ({"total": ((7, 64), jnp.bfloat16)}, "must be float32"),
        ({"order": (99,)}, "order must be"),
        ({"offsets": (7,)}, "offsets must be"),
        ({"rows": (2**31 - 5, 64), "order": (2**31 - 5,)}, "below"),
    ],
)
def test_refuses(change, message):
    shapes = {"rows": (100, 64), "order": (100,), "offsets": (8,), "total": (7, 64)}
    dtypes = {"rows": jnp.bfloat16, "order": jnp.int32, "offsets": jnp.int32, "total": jnp.float32}
    arguments = {}
    for name, shape in (shapes | change).items():
        shape, dtype = shape if isinstance(shape[0], tuple) else (shape, dtypes[name])
        arguments[name] = jax.ShapeDtypeStruct(shape, dtype)
    assert message in why_not(**arguments)
    with pytest.raises(ValueError, match=message):
        sum_rows(**arguments)


def test_accepts():
    assert why_not(*inputs(0, 10, 64, [1])) is None


@pytest.mark.parametrize("change", [{"threads": 96}, {"ahead": 3}])
def test_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(Config(), **change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("w", [64, 128, 192, 576])
def test_on_the_card(dtype, w):
    random = np.random.default_rng(w)
    counts = random.integers(0, 20, 3000) * (random.random(3000) < 0.7)
    counts[[0, 77]] = 700
    arguments = inputs(w, 40_000, w, counts, dtype)
    got = jax.jit(sum_rows)(*arguments)
    same_bits(got, expected(*arguments))
    same_bits(jax.jit(sum_rows)(*arguments), np.asarray(got))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8192, 131072])
def test_a_chunk_of_512_queries(size):
    """2^20 rows of 576, sorted by random keys; compared with float64 sums of a few columns."""
    m, w = 1 << 20, 576
    key = np.random.default_rng(0).integers(0, size, m)
    order = np.argsort(key, kind="stable").astype(np.int32)
    offsets = np.searchsorted(key[order], np.arange(size + 1)).astype(np.int32)
    rows = jax.random.normal(jax.random.key(1), (m, w), jnp.bfloat16)
    total = jax.random.normal(jax.random.key(2), (size, w))
    got = jax.jit(sum_rows)(rows, order, offsets, total)
    for column in (0, 7, 300, 575):
        want = np.asarray(total[:, column], np.float64)
        np.add.at(want, key, np.asarray(rows[:, column].astype(jnp.float32), np.float64))
        difference = np.linalg.norm(np.asarray(got[:, column]) - want)
        assert difference <= 1e-6 * np.linalg.norm(want)
