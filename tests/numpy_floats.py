"""Runs the words of `dsa_jax.pallas_kernels.hopper.floats` in NumPy; see `numpy_simt`."""

import ml_dtypes
import numpy as np
from numpy_simt import Reg, _warps


def _float32(function, *registers):
    assert all(x.value.dtype == np.float32 for x in registers)
    with np.errstate(all="ignore"):
        return Reg(function(*(x.value for x in registers)).astype(np.float32))


def add(a, b):
    return _float32(np.add, a, b)


def subtract(a, b):
    return _float32(np.subtract, a, b)


def multiply(a, b):
    return _float32(np.multiply, a, b)


def multiply_add(a, b, c):
    """Rounds once: the product is exact in float64, and so are sums of the small numbers of the tests."""
    return _float32(lambda a, b, c: a.astype(np.float64) * b + c, a, b, c)


def relu(x):
    return _float32(lambda x: np.where(x <= 0, np.float32(0), x), x)


def larger_magnitude(a, b):
    return _float32(lambda a, b: np.maximum(np.abs(a), np.abs(b)), a, b)


def nan_if_infinite(x):
    return _float32(lambda x: np.where(np.isinf(x), np.float32(np.nan), x), x)


def two_bfloat16(low, high):
    halves = [x.value.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for x in (low, high)]
    return Reg(halves[0] | halves[1] << 16)


def four_e4m3(*values):
    """Puts NaN where a value is, and the largest finite number beyond it."""
    with np.errstate(all="ignore"):
        bytes_ = [np.clip(x.value, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for x in values]
    return Reg(sum(byte.astype(np.uint32) << (8 * i) for i, byte in enumerate(bytes_)))


def from_lane(x, distance):
    assert x.value.dtype == np.float32
    return Reg(_warps(x)[:, np.arange(32) ^ distance].ravel())
