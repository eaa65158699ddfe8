"""Tests the quantisation kernels: lowered for Hopper, their refusals, and on the card bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, normal

from dsa_jax import quantize
from dsa_jax.pallas_kernels import quantization as kernels
from dsa_jax.quantization import hadamard

SHAPES = [(1, 128), (3, 37, 5, 64), (2, 1000, 64, 128), (131072, 128)]


def rows(shape, seed=0):
    """Rows of many magnitudes, the first of zeros, the last with an extreme number that differs from shape to shape."""
    spread = np.exp(4 * np.random.default_rng(seed).normal(size=(*shape[:-1], 1)))
    x = normal(seed, *shape) * array(spread, jnp.float32)
    extreme = (0.0, 3e38, 1e-38, -0.0)[min(shape[0], 4) - 1]
    return x.at[0].set(0.0).astype(jnp.bfloat16).at[-1, ..., 0].set(extreme)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", [quantize, hadamard])
def test_kernels_lower_for_cuda(operation, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    traced = jax.jit(lambda x: operation(x, implementation="pallas")).trace(x)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (jnp.zeros((3, 128)), "bfloat16, got float32"),
        (jnp.zeros((3, 32), jnp.bfloat16), r"rows of 64 or 128, got shape \(3, 32\)"),
        (jnp.zeros((0, 64), jnp.bfloat16), "at least one row"),
    ],
)
def test_kernels_refuse_what_they_cannot_take(x, match):
    for operation in (quantize, hadamard):
        with pytest.raises(ValueError, match=match):
            operation(x, implementation="pallas")
    with pytest.raises(ValueError, match=match):
        kernels.quantize(x)


def test_rounding_has_no_gradient():
    gradient = jax.grad(lambda x: jnp.sum(quantize(x)[1]))(normal(0, 4, 64))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", [quantize, hadamard])
def test_kernels_agree_with_xla_bit_for_bit(operation, shape):
    x = rows(shape)
    results = [
        jax.tree.leaves(jax.jit(lambda x, i=i: operation(x, implementation=i))(x)) for i in ("pallas", "xla", "pallas")
    ]
    for kernel, xla, again in zip(*results, strict=True):
        assert np.asarray(kernel).tobytes() == np.asarray(xla).tobytes() == np.asarray(again).tobytes()


@pytest.mark.gpu
def test_the_transform_is_its_own_gradient():
    x, d_out = normal(0, 7, 128, dtype="bfloat16"), normal(1, 7, 128, dtype="bfloat16")
    gradients = [jax.vjp(lambda x, i=i: hadamard(x, implementation=i), x)[1](d_out)[0] for i in ("pallas", "xla")]
    np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in gradients), atol=0.05)
