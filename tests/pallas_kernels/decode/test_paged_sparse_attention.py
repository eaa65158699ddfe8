"""Tests sparse attention over pages: arguments, splits and lowering anywhere, bfloat16 pages interpreted, the card."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import the_first
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.pallas_kernels.decode import attention_few_heads, attention_keys_as_rows, attention_many_heads
from dsa_jax.pallas_kernels.decode.paged_sparse_attention import (
    MAX_SPLITS,
    paged_sparse_attention,
    split_keys,
    why_not,
)

SCALE = 576**-0.5
ABSENT = np.array([-1, -(2**31), 2**31 - 1, 384], np.int32)


def abstract(heads, fp8=True, batch=2, tokens=2, k=300, pages=40):
    """Shapes of q, pages, table and indices."""
    s = jax.ShapeDtypeStruct
    pool = s((pages, 64, 656), jnp.uint8) if fp8 else s((pages, 64, 576), jnp.bfloat16)
    return (
        s((batch, tokens, heads, 576), jnp.bfloat16), pool, s((batch, 6), jnp.int32), s((batch, tokens, k), jnp.int32),
    )  # fmt: skip


def make(seed, heads, fp8, tokens=2, k=300, scales=(2.0**-8, 2.0**-5)):
    """Makes q, pages, table and indices of two sequences of 384 positions, and the rows in float64."""
    random = np.random.default_rng(seed)
    bf16 = ml_dtypes.bfloat16
    e4m3 = random.integers(0, 256, (40, 64, 512), dtype=np.uint8)
    e4m3[(e4m3 & 0x7F) == 0x7F] = 0x30
    scale = random.choice(np.array(scales, np.float32), (40, 64, 4))
    rotary = random.standard_normal((40, 64, 64)).astype(bf16)
    latent = e4m3.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.repeat(scale, 128, -1).astype(np.float64)
    rows = np.concatenate([latent, rotary.astype(np.float64)], -1)
    pages = np.concatenate([e4m3, scale.view(np.uint8), rotary.view(np.uint8)], -1) if fp8 else rows.astype(bf16)
    rows = rows if fp8 else pages.astype(np.float64)
    q = random.standard_normal((2, tokens, heads, 576)).astype(bf16)
    table = random.permutation(40)[:12].reshape(2, 6).astype(np.int32)
    indices = np.stack([np.sort(random.permutation(384)[:k]) for _ in range(2 * tokens)]).astype(np.int32)
    return q, pages, table, indices.reshape(2, tokens, k), rows


def expected(q, rows, table, indices):
    """Computes `out` and `lse` in float64 from the definition."""
    out = np.zeros((*q.shape[:3], 512))
    lse = np.full(q.shape[:3], -np.inf)
    for b, t in np.ndindex(indices.shape[:2]):
        ids = indices[b, t][(indices[b, t] >= 0) & (indices[b, t] < 64 * table.shape[1])]
        if not len(ids):
            continue
        kv = rows[table[b, ids // 64], ids % 64]
        s = q[b, t].astype(np.float64) @ kv.T * SCALE
        lse[b, t] = s.max(1) + np.log(np.exp(s - s.max(1, keepdims=True)).sum(1))
        out[b, t] = np.exp(s - lse[b, t][:, None]) @ kv[:, :512]
    return out, lse


def check(q, pages, table, indices, rows, *, lse_rtol=0.0, **options):
    """Holds the kernel against float64; `out` and P are rounded to 8 bits, in FP8 q and P to 11."""
    out, lse = paged_sparse_attention(*map(jnp.asarray, (q, pages, table, indices)), scale=SCALE, **options)
    want_out, want_lse = expected(q, rows, table, indices)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(lse, np.float64), want_lse, rtol=lse_rtol, atol=4e-3)
    error = np.asarray(out, np.float64) - want_out
    assert np.linalg.norm(error) <= 8e-3 * np.linalg.norm(want_out)
    empty = np.isneginf(want_lse)
    assert not np.asarray(out, np.float64)[empty].any()


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("heads", the_first(2, [8, 192, 16, 32, 64]))
@pytest.mark.parametrize("splits", the_first(1, [3, None, 1]))
def test_lowers_for_cuda(heads, splits, fp8):
    call = jax.jit(functools.partial(paged_sparse_attention, scale=SCALE, splits=splits))
    text = call.trace(*abstract(heads, fp8)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("k", the_first(2, [1, 129, 64, 65, 128]))
@pytest.mark.parametrize("heads", [16, 64])
def test_any_number_of_keys_lowers_for_cuda(heads, k):
    call = jax.jit(functools.partial(paged_sparse_attention, scale=SCALE))
    assert "mosaic_gpu" in call.trace(*abstract(heads, k=k)).lower(lowering_platforms=("cuda",)).as_text()


@settings(max_examples=200)
@given(
    queries=st.integers(1, 600),
    heads=st.sampled_from([8, 16, 32, 64, 128, 192]),
    keys=st.integers(1, 5000),
    splits=st.sampled_from([None, 1, 2, 7, MAX_SPLITS]),
)
def test_splits_cover_the_keys(queries, heads, keys, splits):
    parts, part_keys = split_keys(queries, heads, keys, splits)
    assert parts == (splits or parts) and 1 <= parts <= MAX_SPLITS
    assert parts * part_keys >= keys and part_keys % 64 == 0
    assert heads < 64 or part_keys == 64 or part_keys % 128 == 0
    if splits is None:
        assert parts == 1 or (parts - 1) * part_keys < keys and parts * queries * -(-heads // 64) <= 132


@pytest.mark.parametrize(
    ("queries", "heads", "splits"), [(1, 128, 32), (16, 128, 4), (128, 128, 1), (1, 16, 32), (16, 16, 8), (128, 16, 1)]
)
def test_splits_of_the_published_shapes(queries, heads, splits):
    assert split_keys(queries, heads, 2048, None) == (splits, 2048 // splits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: ((2, 2, 24, 576), jnp.bfloat16)}, "heads must be"),
        ({0: ((2, 2, 16, 576), jnp.float32)}, "must be bfloat16"),
        ({0: ((2, 2, 16, 512), jnp.bfloat16)}, "576 columns"),
        ({1: ((40, 32, 656), jnp.uint8)}, "64 rows of 656"),
        ({1: ((40, 64, 656), jnp.bfloat16)}, "64 rows of 576"),
        ({1: ((2**25, 64, 656), jnp.uint8)}, "int32"),
        ({2: ((3, 6), jnp.int32)}, "do not fit"),
        ({3: ((2, 2, 0), jnp.int32)}, "may be 0"),
        ({3: ((2, 2, 300), jnp.int64)}, "int32"),
    ],
)
def test_says_what_it_cannot_take(change, words):
    arguments = list(abstract(16))
    with jax.enable_x64(True):
        for i, (shape, dtype) in change.items():
            arguments[i] = jax.ShapeDtypeStruct(shape, dtype)
    q, pages, table, keys = arguments
    assert words in (why_not(q, pages, table, keys, 512) or "")
    assert why_not(*abstract(16), 512) is None and "value_dim" in (why_not(*abstract(16), 448) or "")


MODULES = {"few": attention_few_heads, "rows": attention_keys_as_rows, "many": attention_many_heads}


@pytest.mark.parametrize(
    ("heads", "splits", "config", "kernel"),
    [
        (8, 1, None, "rows"),
        (16, 1, None, "rows"),
        (16, 1, "rows", "rows"),
        (16, 1, "few", "few"),
        (16, 2, None, "few"),
        (16, None, None, "few"),  # of four queries, whose keys are split
        (32, 1, None, "few"),
        (64, 1, None, "many"),
        (16, 2, "rows", None),
        (32, 1, "rows", None),
        (16, 1, "many", None),
        (64, 2, "few", None),
    ],
)
def test_the_kernel_is_chosen_by_heads_splits_and_config(heads, splits, config, kernel):
    config = config and MODULES[config].Config()
    call = functools.partial(paged_sparse_attention, scale=SCALE, splits=splits, config=config)
    if kernel is None:
        with pytest.raises(ValueError, match=f"for {heads} heads and {splits} splits"):
            jax.eval_shape(call, *abstract(heads))
        return
    with contextlib.ExitStack() as patches:
        made = {
            name: patches.enter_context(mock.patch.object(module, "_kernel", wraps=module._kernel))
            for name, module in MODULES.items()
        }
        jax.eval_shape(call, *abstract(heads))
    assert [name for name, make in made.items() if make.called] == [kernel]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splits": 0}, "splits"),
        ({"splits": 33}, "splits"),
        ({"scale": np.inf}, "scale"),
        ({"config": attention_many_heads.Config()}, "config"),
        ({"interpret": True}, "interpret"),
    ],
)
def test_refuses_options(options, words):
    q, pages, table, indices, _ = make(1, 16, True)
    with pytest.raises(ValueError, match=words):
        paged_sparse_attention(*map(jnp.asarray, (q, pages, table, indices)), **{"scale": SCALE} | options)


@pytest.mark.parametrize("module", MODULES.values())
@pytest.mark.parametrize("registers", [8, 201, 256])
def test_configs_refuse_registers(module, registers):
    with pytest.raises(ValueError, match="compute_registers"):
        module.Config(compute_registers=registers)


@pytest.mark.parametrize(("heads", "splits", "k"), [(8, 1, 70), (16, 2, 130)])
def test_bfloat16_pages_interpreted(heads, splits, k):
    q, pages, table, indices, rows = make(2, heads, False, tokens=1, k=k)
    indices[:, :, ::5] = ABSENT[np.arange(indices[:, :, ::5].size) % 4].reshape(indices[:, :, ::5].shape)
    indices[1, 0] = -1
    check(q, pages, table, indices, rows, splits=splits, interpret=True)


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_equals_the_definition(heads, tokens, splits, fp8):
    q, pages, table, indices, rows = make(3, heads, fp8, tokens)
    indices[:, :, ::5] = ABSENT[np.arange(indices[:, :, ::5].size) % 4].reshape(indices[:, :, ::5].shape)
    indices[1, 0] = -1
    check(q, pages, table, indices, rows, splits=splits)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "splits"), [(16, 1), (16, 2), (64, 2)])
@pytest.mark.parametrize("scale", [2.0**-30, 0.1, 3.7e4])
def test_any_scale_is_read_right(heads, splits, scale):
    # Latents whose scales are no powers of two are read as bfloat16: that alone moves logits of 40 by 0.05.
    q, pages, table, indices, rows = make(4, heads, True, scales=(scale,))
    if scale > 1:  # for logits that leave more than one key a weight
        q[..., :512] = (q[..., :512].astype(np.float32) * 7e-3).astype(q.dtype)
        pages[..., :512] = np.bitwise_and(pages[..., :512], 0x8F)
        latent = pages[..., :512].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(
            np.float32(scale)
        )
        rows = np.concatenate([latent, rows[..., 512:]], -1)
    check(q, pages, table, indices, rows, splits=splits, lse_rtol=4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "splits"), [(16, 1), (16, 4), (128, 4)])
def test_bits_do_not_depend_on_the_batch(heads, splits):
    q, pages, table, indices, _ = map(jnp.asarray, make(5, heads, True))
    call = functools.partial(paged_sparse_attention, scale=SCALE, splits=splits)
    whole, alone = call(q, pages, table, indices), call(q[1:], pages, table[1:], indices[1:])
    for a, b in zip(whole, alone, strict=True):
        assert bool(jnp.all(a[1:] == b))
