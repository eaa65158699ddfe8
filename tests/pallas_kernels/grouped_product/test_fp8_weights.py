"""Tests products with weights in FP8: they have the bits of weights that were converted when they were loaded."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_simt
import numpy_simt_copies
import pytest
from cases import array, normal, same_bits

from dsa_jax.pallas_kernels.grouped_product import fp8_tiles, rows, tiles
from dsa_jax.pallas_kernels.grouped_product.pipeline import BLOCK_ROWS

E4M3 = ml_dtypes.float8_e4m3fn


def swizzled(tile):
    """Orders a tile's bytes as they stand in memory: chunk c of row r is at (c xor r mod 8) · 16."""
    chunks = np.ascontiguousarray(tile).view(np.uint8).reshape(len(tile), -1, 16)
    return np.stack([row[np.arange(8) ^ r % 8] for r, row in enumerate(chunks)])


@pytest.mark.parametrize("first", [0, 64])
def test_a_warpgroup_converts_a_tile(monkeypatch, first):
    every = np.arange(256, dtype=np.uint8).view(E4M3)  # NaN and both zeros among them
    raw = np.resize(np.random.default_rng(0).permutation(every), (64, 128))
    scale = np.float32(0.0123)
    machine = numpy_simt.Machine(128, 4096, 0)
    monkeypatch.setattr(fp8_tiles, "simt", numpy_simt)
    monkeypatch.setattr(fp8_tiles, "simt_copies", numpy_simt_copies)
    monkeypatch.setattr(numpy_simt, "machine", machine, raising=False)
    machine.smem[:2048] = swizzled(raw).view(np.uint32).ravel()
    i32 = numpy_simt.i32
    fp8_tiles.convert_thread([i32(0)], i32(first), [i32(int(scale.view(np.int32)))], [i32(8192)])
    with np.errstate(invalid="ignore"):
        want = (raw[:, first : first + 64].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    found = machine.smem[2048:].view(np.uint8).reshape(64, 8, 16)
    expected = swizzled(want)
    is_nan = np.isnan(swizzled(want).view(ml_dtypes.bfloat16).astype(np.float32))
    found, expected = found.view(np.uint16).reshape(64, -1), expected.view(np.uint16).reshape(64, -1)
    np.testing.assert_array_equal(
        np.where(is_nan.reshape(64, -1), 0, found), np.where(is_nan.reshape(64, -1), 0, expected)
    )
    assert np.isnan(found.view(ml_dtypes.bfloat16).astype(np.float32))[is_nan.reshape(64, -1)].all()


def weight(seed, experts, inner, outer):
    """Draws e4m3 values, scales of their blocks, and the same in bfloat16."""
    random = np.random.default_rng(seed)
    values = array(random.normal(scale=30, size=(experts, inner, outer)), jnp.float8_e4m3fn)
    scales = array(random.uniform(1e-3, 1e-2, (experts, inner // 128, outer // 128)), jnp.float32)
    spread = jnp.repeat(jnp.repeat(scales, 128, 1), 128, 2)
    return values, scales, (values.astype(jnp.float32) * spread).astype(jnp.bfloat16)


@pytest.mark.slow
def test_products_have_the_bits_of_converted_weights():
    sizes = (7, 0, 60)
    blocks = -(-np.asarray(sizes) // BLOCK_ROWS)
    plan = tiles.make_tiles(array(blocks, jnp.int32), sum(sizes), 1)
    x = normal(0, tiles.padded_rows(sum(sizes), 3), 256, dtype="bfloat16")
    gates = array(np.random.default_rng(1).uniform(size=len(x)), jnp.float32)
    (gate, gate_scale, gate_16), (up, up_scale, up_16) = (weight(i, 3, 256, 128) for i in (2, 3))
    down, down_scale, down_16 = weight(4, 3, 128, 256)
    options: dict[str, Any] = dict(few=True, interpret=True)
    (want,) = rows.gate_up(x, gate_16, up_16, gates, plan, **options)
    (found,) = rows.gate_up(x, gate, up, gates, plan, scales=(gate_scale, up_scale), **options)
    there = slice(0, blocks.sum() * BLOCK_ROWS)
    same_bits(found[there], want[there])
    want = rows.multiply(want, down_16, plan, **options)
    found = rows.multiply(found, down, plan, scales=(down_scale,), **options)
    same_bits(found[there], want[there])


def test_lowers_for_cuda():
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((tiles.padded_rows(64, 8), 256), jnp.bfloat16),
        shape((8, 256, 128), jnp.float8_e4m3fn),
        shape((tiles.max_tiles(64, 8, 1) + 1, 3), jnp.int32),
        shape((8, 2, 1), jnp.float32),
    )
    run = jax.jit(lambda x, weight, plan, scale: rows.multiply(x, weight, plan, scales=(scale,), few=True))
    assert run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 1
