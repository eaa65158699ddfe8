"""Tests the write of new entries: its own Python on NumPy threads, its lowering, and itself on the card."""

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_floats
import numpy_simt
import pytest
from cases import array

from dsa_jax.pallas_kernels.decode import why_not_write_entries, write_entries

kernel = importlib.import_module("dsa_jax.pallas_kernels.decode.write_entries")
rows = importlib.import_module("dsa_jax.pallas_kernels.quantization.rows")


def quantized(x):
    """Rounds rows to e4m3 bytes and float32 scales, with frexp."""
    x = x.astype(np.float32)
    amax = np.maximum(np.max(np.abs(x), -1), np.float32(1e-4))
    mantissa, exponent = np.frexp(amax / np.float32(448))  # 448 = 7 · 2^6: exact enough to tell powers of two
    scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
    return (x / scale[..., None]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def transformed(x):
    """Applies the orthonormal Hadamard transform by butterflies in float32, and rounds to bfloat16."""
    out, half = x.astype(np.float32), 1
    while half < x.shape[-1]:
        pairs = out.reshape(*x.shape[:-1], -1, 2, half)
        out = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(x.shape)
        half *= 2
    return (out * np.float32(x.shape[-1] ** -0.5)).astype(ml_dtypes.bfloat16)


def expected(latents, keys, kv, k_index, slots, hadamard):
    """Writes with NumPy: latents uint8 [n, 64, 656], keys uint8 [n, 66, 128]."""
    latents, keys = latents.copy(), keys.copy()
    flat, flat_keys = latents.reshape(-1, 656), keys.reshape(len(keys), -1)
    values, scale = quantized(kv[:, :512].reshape(len(kv), 4, 128))
    k_values, k_scale = quantized(transformed(k_index) if hadamard else k_index)
    for i, slot in enumerate(slots):
        if 0 <= slot < len(flat):
            rotary = kv[i, 512:].view(np.uint8)
            flat[slot] = np.concatenate([values[i].ravel(), scale[i].view(np.uint8), rotary])
            page, place = divmod(slot, 64)
            flat_keys[page, 128 * place : 128 * (place + 1)] = k_values[i]
            flat_keys[page, 8192 + 4 * place : 8196 + 4 * place] = k_scale[i : i + 1].view(np.uint8)
    return latents, keys


def inputs(seed, pages, tokens):
    """Pages of noise, and tokens of many magnitudes, zeros and extremes among them; some slots are none."""
    random = np.random.default_rng(seed)
    latents = random.integers(0, 256, (pages, 64, 656), np.uint8)
    keys = random.integers(0, 256, (pages, 66, 128), np.uint8)
    spread = lambda: np.exp(4 * random.standard_normal((tokens, 1)))
    kv = (random.standard_normal((tokens, 576)) * spread()).astype(ml_dtypes.bfloat16)
    k_index = (random.standard_normal((tokens, 128)) * spread()).astype(ml_dtypes.bfloat16)
    kv[0, :128], kv[0, 128:130], kv[0, 256] = 0, (448, -0.0), 3e38
    k_index[0] = 0
    slots = random.permutation(64 * pages)[:tokens].astype(np.int32)
    slots[1::5] = random.choice(np.array([-1, 64 * pages, -(2**31), 2**31 - 1]), len(slots[1::5]))
    return latents, keys, kv, k_index, slots


@pytest.mark.parametrize("hadamard", [True, False])
def test_bytes_are_those_of_the_reference(hadamard):
    latents, keys, kv, k_index, slots = inputs(0, 3, 21)
    machine = numpy_simt.Machine(128, 16, 0)
    arrays = [machine.put(x) for x in (kv, k_index, slots, latents, keys)]
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernel, rows):
            patch.setattr(module, "simt", numpy_simt)
        patch.setattr(rows, "floats", numpy_floats)
        patch.setattr(numpy_simt, "machine", machine, raising=False)
        for token in range(len(slots)):
            kernel.write_token(*arrays, numpy_simt.i32(token), size=64 * len(latents), hadamard=hadamard)
    want = expected(latents, keys, kv, k_index, slots, hadamard)
    for at, pages in zip(arrays[3:], want, strict=True):
        got = machine.gmem.view(np.uint8)[at : at + pages.size]
        np.testing.assert_array_equal(got.reshape(pages.shape), pages)


def abstract(pages, tokens):
    s = jax.ShapeDtypeStruct
    return (
        s((pages, 64, 656), jnp.uint8),
        s((pages, 66, 128), jnp.float8_e4m3fn),
        s((tokens, 576), jnp.bfloat16),
        s((tokens, 128), jnp.bfloat16),
        s((tokens,), jnp.int32),
    )


@pytest.mark.parametrize(("pages", "tokens"), [(1, 1), (8_000_000, 4096)])
def test_it_lowers_for_cuda_and_writes_in_place(pages, tokens):
    lowered = jax.jit(write_entries, donate_argnums=(0, 1)).trace(*abstract(pages, tokens))
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == 2, "both pools"


@pytest.mark.parametrize(
    ("at", "array", "message"),
    [
        (0, ((3, 64, 576), jnp.bfloat16), r"latent_pages must be uint8 \[3, 64, 656\], got bfloat16 \[3, 64, 576\]"),
        (1, ((4, 66, 128), jnp.float8_e4m3fn), r"key_pages must be float8_e4m3fn \[3, 66, 128\], got .*\[4, 66, 128\]"),
        (2, ((5, 576), jnp.float32), r"kv must be bfloat16 \[5, 576\], got float32"),
        (3, ((4, 128), jnp.bfloat16), r"k_index must be bfloat16 \[5, 128\], got bfloat16 \[4, 128\]"),
        (4, ((5,), jnp.uint32), r"slots must be int32 \[5\], got uint32"),
    ],
)
def test_what_the_kernel_cannot_take(at, array, message):
    arguments = list(abstract(3, 5))
    assert why_not_write_entries(*arguments) is None
    arguments[at] = jax.ShapeDtypeStruct(*array)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(write_entries, *arguments)


def test_there_must_be_something_to_write():
    assert "pages and tokens, got 3 and 0" in (why_not_write_entries(*abstract(3, 0)) or "")


def as_e4m3(bytes_):
    return jax.lax.bitcast_convert_type(array(bytes_), jnp.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_bytes_are_those_of_the_reference_on_the_card(tokens, hadamard):
    latents, keys, kv, k_index, slots = inputs(tokens, 20, max(tokens, 7))
    kv, k_index, slots = kv[:tokens], k_index[:tokens], slots[:tokens]
    write = jax.jit(write_entries, static_argnames="hadamard", donate_argnums=(0, 1))
    got = write(array(latents), as_e4m3(keys), kv, k_index, slots, hadamard=hadamard)
    want = expected(latents, keys, kv, k_index, slots, hadamard)
    for pages, bytes_ in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(pages).view(np.uint8), bytes_)


@pytest.mark.gpu
def test_nan_and_infinity_become_nan_on_the_card():
    latents, keys, kv, k_index, slots = inputs(1, 2, 4)
    slots = np.arange(4, dtype=np.int32)
    kv[0, 3], kv[1, 200], kv[2, 575], k_index[3, 9] = np.nan, np.inf, np.nan, -np.inf
    got, got_keys = write_entries(array(latents), as_e4m3(keys), kv, k_index, slots, hadamard=False)
    values = np.asarray(got)[0, :4, :512].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.argwhere(np.isnan(values)).tolist() == [[0, 3], [1, 200]]
    rotary = np.asarray(got)[0, :4, 528:].copy().view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.argwhere(np.isnan(rotary)).tolist() == [[2, 63]]
    assert np.argwhere(np.isnan(np.asarray(got_keys)[0, :4].astype(np.float32))).tolist() == [[3, 9]]


@pytest.mark.gpu
def test_pages_are_kept_where_they_are_needed_again():
    latents, keys, kv, k_index, slots = inputs(2, 3, 10)
    pages = array(latents), as_e4m3(keys)
    jax.block_until_ready(jax.jit(write_entries)(*pages, kv, k_index, slots))
    np.testing.assert_array_equal(pages[0], latents)
    np.testing.assert_array_equal(np.asarray(pages[1]).view(np.uint8), keys)
