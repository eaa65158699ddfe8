"""Writes arithmetic whose bits are part of a contract, in the vocabulary of `simt`: nothing is contracted or reordered.

`tests/numpy_floats.py` has the same words.
"""

from dsa_jax.pallas_kernels.hopper.simt import asm


def add(a, b):
    """Adds two float32, rounding once."""
    return asm("add.rn.f32 $0, $1, $2;", a, b, results="f", pure=True)


def subtract(a, b):
    """Subtracts two float32, rounding once."""
    return asm("sub.rn.f32 $0, $1, $2;", a, b, results="f", pure=True)


def multiply(a, b):
    """Multiplies two float32, rounding once."""
    return asm("mul.rn.f32 $0, $1, $2;", a, b, results="f", pure=True)


def multiply_add(a, b, c):
    """Computes a · b + c of float32, rounding once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", a, b, c, results="f", pure=True)


def relu(x):
    """Computes max(x, +0.0) of a float32; NaN stays NaN."""
    return asm("max.NaN.f32 $0, $1, 0f00000000;", x, results="f", pure=True)


def larger_magnitude(a, b):
    """Takes the larger of |a| and |b| of float32; NaN if either is."""
    text = "{.reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b;}"
    return asm(text, a, b, results="f", pure=True)


def nan_if_infinite(x):
    """Computes x + 0 · x: NaN of an infinite number, which e4m3 has none of, and all others as they are, -0.0 too."""
    return asm("fma.rn.f32 $0, $1, 0f00000000, $1;", x, results="f", pure=True)


def two_bfloat16(low, high):
    """Rounds two float32 to bfloat16, to the nearest and of two to the even one, and puts them into an int32."""
    return asm("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, results="r", pure=True)


def four_e4m3(a, b, c, d):
    """Rounds four float32 to e4m3, to the nearest even, and puts them into an int32, the first lowest.

    Beyond the largest finite number they become that.
    """
    text = (
        "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;"
        " mov.b32 $0, {a, b};}"
    )
    return asm(text, a, b, c, d, results="r", pure=True)


def from_lane(x, distance):
    """Gets the float32 of the lane whose number differs in the bit `distance`, an int; all 32 lanes call this."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
    return asm(text, x, results="f", convergent=True)
