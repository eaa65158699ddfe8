"""Adds words to `simt` for the softmax of a row: approximate powers and logarithms, maxima and sums of float32.

`tests/numpy_simt_softmax.py` has the same words.
"""

from dsa_jax.pallas_kernels.hopper.simt import asm


def maximum_f32(a, b):
    """Takes the greater float32; of a number and NaN the number."""
    # `max.f32`, unlike MLIR's maximumf, which keeps NaN.
    return asm("max.f32 $0, $1, $2;", a, b, results="f", pure=True)


def exp2(x):
    """Computes 2^x of float32, to about 2^-22 of it."""
    return asm("ex2.approx.f32 $0, $1;", x, results="f", pure=True)


def log2(x):
    """Computes the logarithm of a float32 to base 2, to about 2^-22."""
    return asm("lg2.approx.f32 $0, $1;", x, results="f", pure=True)


def warp_sum_f32(x):
    """Sums the warp's float32: the same bits in all lanes, and in every run."""
    for distance in (16, 8, 4, 2, 1):
        text = f"{{.reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, 0xffffffff; add.f32 $0, $1, t;}}"
        x = asm(text, x, results="f", convergent=True)
    return x


def warp_maximum_f32(x):
    """Takes the greatest float32 of the warp."""
    for distance in (16, 8, 4, 2, 1):
        text = f"{{.reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, 0xffffffff; max.f32 $0, $1, t;}}"
        x = asm(text, x, results="f", convergent=True)
    return x
