"""Tests the Hopper kernel of what queries give to the gradient of their keys.

Interpreted and lowered on a CPU, real on the card.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal, same_bits
from jax.experimental.pallas import mosaic_gpu as plgpu
from reference import f64

from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES
from dsa_jax.pallas_kernels.sparse_attention.backward_keys import (
    STAGES,
    Config,
    column_parts,
    smem_bytes,
    sparse_backward_keys,
)

# T, N, K, C, R: one part and two, with rotary columns and without, the last part as large as the first and smaller
SMALL = [(3, 64, 128, 64, 64), (1, 64, 256, 192, 64), (2, 64, 256, 320, 0)]


def inputs(seed, t, n, k, c, r) -> tuple[Any, Any, Any, Any]:
    """Makes p, ds, q and d_out."""
    p, ds, q, d_out = (normal(seed + i, t, n, columns, dtype="bfloat16") for i, columns in enumerate((k, k, c + r, c)))
    return abs(p), ds, q, d_out


def abstract(t, n, k, c, r) -> tuple[Any, Any, Any, Any]:
    """Makes the same as shapes."""
    p, q, d_out = (jax.ShapeDtypeStruct((t, n, columns), jnp.bfloat16) for columns in (k, c + r, c))
    return p, p, q, d_out


def definition(p, ds, q, d_out):
    """Computes the contributions [T, K, H] in float64."""
    rows = np.swapaxes(f64(ds), 1, 2) @ f64(q)
    rows[..., : d_out.shape[2]] += np.swapaxes(f64(p), 1, 2) @ f64(d_out)
    return rows


def close(actual, expected, tolerance):
    """Holds rows against float64: in the norm, and no single row far off."""
    actual, expected = f64(actual).reshape(-1, expected.shape[-1]), expected.reshape(-1, expected.shape[-1])
    error, size = np.linalg.norm(actual - expected, axis=1), np.linalg.norm(expected, axis=1)
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(size)
    assert np.all(error <= 2 * tolerance * size.max())


def kernel(config=None, interpret=False) -> Any:
    call = functools.partial(sparse_backward_keys, config=config, interpret=interpret)
    return call if interpret else jax.jit(call)


def check_rows(arguments, **options):
    rows = kernel(**options)(*arguments)
    assert rows.dtype == jnp.bfloat16
    close(rows, definition(*arguments), 5e-3)
    return rows


@pytest.mark.parametrize(("shape", "stages"), list(zip(SMALL, (None, 3, 5), strict=True)))
def test_equals_the_definition(shape, stages):
    check_rows(inputs(0, *shape), config=Config(stages=stages, blocks=2), interpret=True)


def test_zeros_give_zeros():
    """Of an absent key ds and p are 0: its row is exactly 0, whatever q and d_out are."""
    p, ds, q, d_out = inputs(0, 1, 64, 128, 64, 0)
    absent = np.random.default_rng(0).random(128) < 0.5
    p, ds = (jnp.where(absent, 0, x).astype(x.dtype) for x in (p, ds))
    rows = sparse_backward_keys(p, ds, 1e30 * q, 1e30 * d_out, interpret=True)
    np.testing.assert_array_equal(f64(rows)[absent], 0.0)
    assert np.all(np.any(f64(rows)[~absent] != 0, axis=1))


def test_races_for_nothing(monkeypatch):
    """The interpreter raises where loads and stores of two warpgroups are unordered; it does not watch wgmma."""
    watched = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", watched)
    check_rows(inputs(0, 2, 64, 256, 64, 0), config=Config(blocks=1, stages=3), interpret=True)


@pytest.mark.parametrize(("heads", "rotary"), [(64, 0), (128, 64)])
def test_lowers_for_cuda(heads, rotary):
    arguments = abstract(4096, heads, 2048, 512, rotary)
    text = kernel().trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "stablehlo.transpose" not in text and "stablehlo.pad" not in text


def test_fits_the_multiprocessor():
    assert smem_bytes(128, 512, 576, STAGES[128]) == 225 * 1024
    assert smem_bytes(128, 512, 576, STAGES[128] + 1) > SMEM_BYTES - 1
    for heads, stages in STAGES.items():
        for value_dim in range(64, 1025, 64):
            for dim in (value_dim, value_dim + 64):
                assert smem_bytes(heads, value_dim, dim, stages) <= SMEM_BYTES - 1


@pytest.mark.parametrize("rotary", [0, 1])
@pytest.mark.parametrize("values", range(1, 13))
def test_parts_cover_the_columns(values, rotary):
    parts = column_parts(64 * values, 64 * (values + rotary))
    assert [x for part in parts for x in range(part.start, part.start + part.tiles)] == list(range(values + rotary))
    assert [x for part in parts for x in range(part.start, part.start + part.values)] == list(range(values))
    assert all(1 <= part.values <= part.tiles <= 3 for part in parts)
    assert max(part.tiles for part in parts) == parts[0].tiles <= parts[-1].tiles + 1
    assert parts[0].values == max(part.values for part in parts)


def test_the_published_parts():
    assert column_parts(512, 576) == ((0, 3, 3), (3, 3, 3), (6, 3, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(stages=2), "stages must be None or from 3 to 16, got 2"),
        (dict(stages=17), "stages must be None or from 3 to 16, got 17"),
        (dict(blocks=0), "blocks must be None or at least 1, got 0"),
    ],
)
def test_a_config_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_a_config_may_need_too_much():
    with pytest.raises(ValueError, match="config needs 246784 bytes of shared memory, there are 232447"):
        sparse_backward_keys(*inputs(0, 1, 128, 128, 192, 0), config=Config(stages=7), interpret=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 32, 128, 64, 0), r"N must be one of \(64, 128\), got 32"),
        ((2, 64, 64, 64, 0), "K must be a multiple of 128 and nothing empty"),
        ((0, 64, 128, 64, 0), "K must be a multiple of 128 and nothing empty"),
        ((2, 64, 128, 96, 0), "C must be a multiple of 64, and H as much or 64 more, got C 96 and H 96"),
        ((2, 64, 128, 64, 128), "C must be a multiple of 64, and H as much or 64 more, got C 64 and H 192"),
        ((2**20, 64, 2048, 64, 0), r"T·K must be below 2\^31"),
    ],
)
def test_refuses_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sparse_backward_keys, *abstract(*shape))


def test_refuses_other_arguments():
    p, ds, q, d_out = abstract(4, 64, 128, 64, 0)
    assert jax.eval_shape(sparse_backward_keys, p, ds, q, d_out).shape == (512, 64)
    for arguments, message in (
        ((p.update(dtype=jnp.float32), ds, q, d_out), "p must be bfloat16 of three dimensions"),
        ((p, ds, q.update(shape=(4, 32, 64)), d_out), r"q and d_out must be \[T, N, …\]"),
        ((p.update(shape=(4, 64, 256)), ds, q, d_out), r"q and d_out must be \[T, N, …\]"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(sparse_backward_keys, *arguments)


# 3 parts, 2 and 1; blocks with one item and with several
SWEEP = [
    (1, 128, 128, 512, 64), (50, 128, 256, 512, 64), (5, 128, 2048, 512, 0), (100, 64, 384, 512, 64),
    (9, 128, 384, 448, 64), (50, 64, 128, 192, 64), (50, 64, 256, 64, 0), (50, 128, 256, 128, 64),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SWEEP)
def test_equals_the_definition_on_the_card(shape):
    arguments = inputs(0, *shape)
    first = np.asarray(check_rows(arguments))
    for config in (None, Config(stages=3), Config(blocks=7), Config(blocks=1, stages=5)):
        same_bits(kernel(config)(*arguments), first)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_the_published_size_on_the_card(heads):
    """The error of five queries of 528, and 20 runs with the same bits."""
    columns = zip(jax.random.split(jax.random.key(0), 4), (2048, 2048, 576, 512), strict=True)
    arguments = [jax.random.normal(key, (528, heads, count), jnp.bfloat16) for key, count in columns]
    call = kernel()
    rows = call(*arguments)
    queries = np.array([0, 43, 44, 132, 527])
    close(rows.reshape(528, 2048, 576)[queries], definition(*(x[queries] for x in arguments)), 5e-3)
    for _ in range(20):
        assert jnp.array_equal(call(*arguments), rows)
