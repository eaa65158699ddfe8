"""FP8 blocks and the Hadamard transform against float64 NumPy and ml_dtypes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import array, noise, pulled, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.quantization import dequantize, dequantize_blocks, hadamard, quantize, straight_through_quantize


def reference_scale(amax):
    """The smallest power of two s with max(amax, 1e-4) <= 448 s, by search: no logarithm that could round."""
    amax = max(np.float64(amax), np.float64(np.float32(1e-4)))
    exponent = -40
    while 448.0 * 2.0**exponent < amax:
        exponent += 1
    return 2.0**exponent


def reference_quantize(x):
    scale = np.array([reference_scale(amax) for amax in np.abs(x).max(-1).ravel()]).reshape(x.shape[:-1])
    return (x / scale[..., None]).astype(np.float32).astype(ml_dtypes.float8_e4m3fn), scale


jitted_quantize = jax.jit(quantize)
transform = jax.jit(hadamard)  # eager, each of its 30 operations is compiled by itself


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_scale_is_exact_at_and_around_powers_of_two(jit):
    edges = np.ldexp(np.float32(448), np.arange(-24, 60)).astype(np.float32)
    amax = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    amax = np.concatenate([amax, np.ldexp(np.float32(1), np.arange(-30, 60)), [0.0, 1e-4, 1.0, 3e38]]).astype(
        np.float32
    )
    x = np.stack([amax, -amax / 3, np.zeros_like(amax)], -1)
    values, scale = (jitted_quantize if jit else quantize)(array(x))
    np.testing.assert_array_equal(scale, [reference_scale(a) for a in amax])
    assert np.isfinite(np.asarray(values, np.float32)).all()


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30), rows=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_quantize_rounds_as_ml_dtypes(seed, exponent, rows):
    x = (np.random.default_rng(seed).standard_normal((rows, 64)) * 2.0**exponent).astype(np.float32)
    values, scale = jitted_quantize(x)
    expected_values, expected_scale = reference_quantize(x)
    assert values.dtype == jnp.float8_e4m3fn and scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected_values.view(np.uint8))
    assert np.abs(np.asarray(values, np.float32)).max() <= 448


def test_rounding_is_to_nearest_even_between_every_two_neighbours():
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    middle = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, middle, np.nextafter(middle, np.float32(500)), np.nextafter(middle, np.float32(-500))])
    values, scale = jitted_quantize(array(x))  # amax is 448, so the scale is 1
    assert scale == 1
    np.testing.assert_array_equal(np.asarray(values, np.float32), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantize_is_exact_and_close(dtype):
    x = noise(0, 2, 3, 128)
    values, scale = jitted_quantize(x)
    restored = jax.jit(functools.partial(dequantize, dtype=dtype))(values, scale)
    assert restored.dtype == dtype
    exact = np.asarray(values).astype(np.float64) * np.asarray(scale, np.float64)[..., None]
    np.testing.assert_array_equal(np.asarray(restored, np.float64), exact)
    error = np.abs(exact - np.asarray(x, np.float64))
    assert (error <= np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * np.asarray(scale)[..., None])).all()


def test_requantizing_changes_nothing():
    run = jax.jit(straight_through_quantize)
    x = run(noise(3, 4, 32))
    np.testing.assert_array_equal(run(x), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_rounds_forward_and_passes_gradients(dtype):
    x = array(np.random.default_rng(1).standard_normal((3, 16)), dtype)
    weight = array(np.random.default_rng(2).standard_normal((3, 16)), dtype)
    rounded, (gradient,) = pulled(straight_through_quantize, x, cotangent=lambda _: weight)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, np.asarray(jax.jit(lambda x: dequantize(*quantize(x)))(x)).astype(dtype))
    assert not np.array_equal(rounded, x)
    np.testing.assert_array_equal(gradient, weight)
    np.testing.assert_array_equal(jax.jit(jax.vmap(straight_through_quantize))(x), rounded)


def test_rows_with_nan_stay_nan_and_others_are_untouched():
    x = np.ones((3, 8), np.float32)
    x[1, 2], x[2, 3] = np.nan, np.inf
    restored = np.asarray(jax.jit(lambda x: dequantize(*quantize(x)))(x))
    np.testing.assert_array_equal(restored[0], 1)
    assert np.isnan(restored[1, 2]) and np.isnan(restored[2, 3])


def natural_order(size):
    """Entry (i, j) is -1 to the number of ones that the bits of i and j share."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("size", [1, 2, 128])
@pytest.mark.parametrize("rows", [(), (2, 3)])
def test_hadamard_is_the_orthonormal_matrix(size, rows):
    x = np.random.default_rng(size).standard_normal((*rows, size)).astype(np.float32)
    expected = x.astype(np.float64) @ natural_order(size) / np.sqrt(size)
    np.testing.assert_allclose(transform(x), expected, atol=2e-6)
    np.testing.assert_allclose(transform(transform(x)), x, atol=2e-6)
    gradient = jax.jit(jax.grad(lambda y: jnp.vdot(hadamard(y), x)))(np.zeros_like(x))
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_hadamard_keeps_products_when_on_both_sides_only():
    q, k = noise(0, 2, 128)
    both = np.asarray(transform(q)), np.asarray(transform(k))
    np.testing.assert_allclose(np.vdot(*both), np.vdot(q, k), atol=1e-4)
    assert abs(np.vdot(both[0], k) - np.vdot(q, k)) > 1


def test_hadamard_computes_in_float32_and_keeps_the_dtype():
    x = array(np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    assert transform(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(transform(x), np.asarray(transform(array(x, "float32"))).astype(jnp.bfloat16))


def test_bits_of_a_row_do_not_depend_on_its_company():
    x = noise(0, 37, 128)
    whole = np.asarray(transform(x))
    np.testing.assert_array_equal(whole[5], transform(x[5]))
    np.testing.assert_array_equal(whole[5:6], transform(x[5:6]))
    values, alone = np.asarray(jitted_quantize(whole)[0]), np.asarray(jitted_quantize(whole[5])[0])
    np.testing.assert_array_equal(values[5].view(np.uint8), alone.view(np.uint8))


@pytest.mark.parametrize("size", [0, 3, 96])
def test_hadamard_names_a_wrong_size(size):
    with pytest.raises(ValueError, match=f"power of two, got shape \\(2, {size}\\)"):
        hadamard(array(np.zeros((2, size))))


@pytest.mark.parametrize("shape", [(128, 128), (130, 7), (1, 300), (256, 384)])
def test_block_scales_multiply_their_own_block(shape):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, [-(-size // 128) for size in shape]).astype(np.float32)
    expected = weight.astype(np.float64)
    for row in range(shape[0]):
        for column in range(0, shape[1], 128):
            expected[row, column : column + 128] *= scale[row // 128, column // 128]
    result = jax.jit(dequantize_blocks)(weight, scale)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-7)


def test_wrong_scale_shapes_are_named(unchecked):
    with pytest.raises(ValueError, match=r"needs scales of shape \(2, 1\), got \(1, 2\)"):
        dequantize_blocks(array(np.zeros((130, 7)), "float8_e4m3fn"), array(np.zeros((1, 2))))
    with pytest.raises(ValueError, match=r"scale of shape \(2,\), got \(3,\)"):
        dequantize(array(np.zeros((2, 8)), "float8_e4m3fn"), array(np.zeros(3)))


@pytest.mark.parametrize("operation", [quantize, hadamard])
def test_integers_are_refused(operation):
    with unchecked(), pytest.raises(ValueError, match=f"{operation.__name__} takes floats, got int32"):
        operation(array([[1, 2, 3, 5]]))
