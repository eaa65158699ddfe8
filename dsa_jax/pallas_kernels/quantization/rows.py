"""Transforms and rounds one row whose columns a group of threads holds, 8 neighbouring ones each, in registers.

The order of operations is that of the definitions in `dsa_jax/quantization.py`, so bits agree with them.
"""

from dsa_jax.pallas_kernels.hopper import floats, simt

THREAD_COLUMNS = 8  # of a row, that one thread holds: 16 bytes of bfloat16
SMALLEST_AMAX = 1e-4  # keeps the scale of an all-zero row away from zero


def widened(words):
    """Lists the float32 of some int32 of two bfloat16 each."""
    return [x for word in words for x in simt.bfloat16_pair(word)]


def hadamard_row(values, lane, dim: int):
    """Transforms a row of `dim` columns by butterflies; rounded to bfloat16, two to an int32.

    Args:
      values: this thread's 8 float32.
      lane: its number among the threads of the row. All 32 threads of a warp call this.
      dim: of the row, a power of two from 16 to 256.
    """
    # Stage by stage: columns whose numbers differ in the bit `half` become their sum and difference. The first three
    # stages stay in a thread.
    values, half = list(values), 1
    while half < THREAD_COLUMNS:
        for i in range(THREAD_COLUMNS):
            if not i & half:
                a, b = values[i], values[i + half]
                values[i], values[i + half] = floats.add(a, b), floats.subtract(a, b)
        half *= 2
    while half < dim:
        other = half // THREAD_COLUMNS  # how far the partner's lane is
        upper = (lane & other) > 0  # the upper of two lanes has the second operand: its sum becomes a difference
        for i, mine in enumerate(values):
            theirs = floats.from_lane(mine, other)
            first, second = simt.where(upper, theirs, mine), simt.where(upper, mine, theirs)
            values[i] = simt.where(upper, floats.subtract(first, second), floats.add(first, second))
        half *= 2
    scale = simt.f32(dim**-0.5)  # makes the transform orthonormal, rounded once at the end
    pairs = zip(values[::2], values[1::2], strict=True)
    return [floats.two_bfloat16(floats.multiply(a, scale), floats.multiply(b, scale)) for a, b in pairs]


def quantize_row(values, dim: int):
    """Rounds a row of `dim` columns to e4m3 by its largest magnitude.

    Args:
      values: this thread's 8 float32. All 32 threads of a warp call this.
      dim: of the row, a power of two from 16 to 256.

    Returns:
      two int32 of four e4m3 each, and the row's scale, a power of two, in all threads.
    """
    amax = simt.f32(SMALLEST_AMAX)
    for value in values:
        amax = floats.larger_magnitude(amax, value)
    # The maximum over the row's threads: in any order the same bits.
    other = 1
    while other < dim // THREAD_COLUMNS:
        amax = floats.larger_magnitude(amax, floats.from_lane(amax, other))
        other *= 2
    # 2^ceil(log2(amax / 448)) by its exponent bits, and its inverse, both exact: see the definition.
    exponent = ((amax.bits() + ((1 << 21) - 1)) >> 23) - 8
    scale, inverse = (exponent << 23).float(), ((254 - exponent) << 23).float()
    scaled = [floats.nan_if_infinite(floats.multiply(value, inverse)) for value in values]
    return [floats.four_e4m3(*scaled[i : i + 4]) for i in (0, 4)], scale
