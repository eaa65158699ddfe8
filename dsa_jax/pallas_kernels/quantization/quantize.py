"""Computes the indexer's Hadamard transform and its rounding to e4m3 on Hopper: one read and one write of the rows.

A group of E / 8 threads holds a row, 8 neighbouring columns a thread: 16 bytes of bfloat16. The butterfly's first three
stages are in a thread's registers, the others are shuffles, in the order of the definition, so that bits agree with it.
Bound by device memory: XLA makes a pass over float32 copies for each of the stages and takes ten times as long.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from dsa_jax.pallas_kernels.hopper.constants import WARPGROUP_THREADS
from dsa_jax.pallas_kernels.hopper.ptx import (
    gmem_address,
    i32,
    i32_type,
    i64,
    i64_type,
    ptx,
    scalar,
    thread_id,
)

THREAD_COLUMNS = 8  # of a row, that one thread holds: 16 bytes of bfloat16
WIDTHS = (64, 128)  # E
THREAD_ROWS = 4  # that a thread loads before it works on the first: enough bytes in flight to fill the memory's latency
SMALLEST_AMAX = 1e-4  # keeps the scale of an all-zero row away from zero


def why_not(x: jax.Array) -> str | None:
    """Says why the kernels cannot take `x` [..., E], or None if they can."""
    if x.dtype != jnp.bfloat16:
        return f"the quantisation kernels take bfloat16, got {x.dtype}"
    if x.ndim < 1 or x.shape[-1] not in WIDTHS:
        return f"the quantisation kernels take rows of {' or '.join(map(str, WIDTHS))}, got shape {x.shape}"
    if x.size == 0:
        return f"the quantisation kernels need at least one row, got shape {x.shape}"
    return None


def hadamard(x: jax.Array) -> jax.Array:
    """Computes the orthonormal Walsh-Hadamard transform of each row of `x` [..., E], bfloat16; float32 inside."""
    _check(x)
    shape = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    return _call(_transform_rows, x, shape).reshape(x.shape)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds each row of bfloat16 `x` [..., E] to e4m3 with a power-of-two scale.

    Returns:
      values [..., E] float8_e4m3fn, and scale [...] float32; a row is about values · scale.
    """
    _check(x)
    rows, dim = x.size // x.shape[-1], x.shape[-1]
    out = jax.ShapeDtypeStruct((rows, dim), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((rows,), jnp.float32)
    values, scale = _call(_quantize_rows, x, out)
    return values.reshape(x.shape), scale.reshape(x.shape[:-1])


def _check(x):
    """Raises ValueError where `why_not` has a reason."""
    if reason := why_not(x):
        raise ValueError(reason)


def _call(work, x, out):
    """Calls a kernel in which each thread has 8 columns of 4 rows; `work` is done with each row.

    A block is one warpgroup, and there are as many blocks as the rows need: each is short, and none waits for another.
    """
    rows, dim = x.size // x.shape[-1], x.shape[-1]
    threads = dim // THREAD_COLUMNS  # of one row
    rows_per_block = WARPGROUP_THREADS // threads * THREAD_ROWS

    def body(x_gmem, *out_gmem):
        block = jax.lax.axis_index("block")

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (1 + len(out_gmem)) + (plgpu.Layout.WG_SPLAT,))
        def run(ctx, x, *refs):
            *outs, block = refs
            thread = thread_id()
            lane = arith.andi(thread, i32(threads - 1))  # among the threads of its row
            first = arith.addi(
                arith.muli(scalar(block), i32(rows_per_block)),
                arith.shrui(thread, i32(int(math.log2(threads)))),
            )
            numbers = [arith.addi(first, i32(i * WARPGROUP_THREADS // threads)) for i in range(THREAD_ROWS)]
            # For a row past the end the last one is read, and not stored: its group still takes part in shuffles.
            present = [arith.cmpi(arith.CmpIPredicate.ult, number, i32(rows)) for number in numbers]
            numbers = [arith.minui(number, i32(rows - 1)) for number in numbers]
            # All rows are asked for before the first is worked on.
            loaded = [_load(gmem_address(x), number, lane, dim) for number in numbers]
            for values, number, is_row in zip(loaded, numbers, present, strict=True):
                work(values, [gmem_address(out) for out in outs], number, lane, is_row, dim)

        run(x_gmem, *out_gmem, block)

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(pl.cdiv(rows, rows_per_block),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x.reshape(rows, dim))


def _transform_rows(values, outs, row, lane, is_row, dim):
    """Transforms a row by butterflies, and stores it if it `is_row`, and not one past the end."""
    # Stage by stage: columns whose numbers differ in the bit `half` become their sum and difference. The first three
    # stages stay in a thread.
    half = 1
    while half < THREAD_COLUMNS:
        for i in range(THREAD_COLUMNS):
            if not i & half:
                values[i], values[i + half] = _add(values[i], values[i + half]), _sub(values[i], values[i + half])
        half *= 2
    while half < dim:
        other = half // THREAD_COLUMNS  # how far the partner's lane is
        # The upper of two lanes has the second operand: its sum becomes a difference.
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, i32(other)), i32(0))
        for i, mine in enumerate(values):
            theirs = _shuffle(mine, other)
            first, second = arith.select(upper, theirs, mine), arith.select(upper, mine, theirs)
            values[i] = arith.select(upper, _sub(first, second), _add(first, second))
        half *= 2
    scale = arith.constant(ir.F32Type.get(), dim**-0.5)  # makes the transform orthonormal, rounded once at the end
    words = [_two_bf16(_mul(a, scale), _mul(b, scale)) for a, b in zip(values[::2], values[1::2], strict=True)]
    address = _offset(outs[0], row, lane, 2 * dim, 2 * THREAD_COLUMNS)
    with mgpu.utils.when(is_row):
        ptx("st.global.v4.b32 [$0], {$1, $2, $3, $4};", address, *words)


def _quantize_rows(values, outs, row, lane, is_row, dim):
    """Rounds a row by its largest magnitude, and stores it and its scale if it `is_row`, and not one past the end."""
    amax = arith.constant(ir.F32Type.get(), SMALLEST_AMAX)
    for value in values:
        amax = _largest(amax, value)
    # The maximum over the row's threads: in any order the same bits.
    other = 1
    while other < dim // THREAD_COLUMNS:
        amax = _largest(amax, _shuffle(amax, other))
        other *= 2
    # 2^ceil(log2(amax / 448)) by its exponent bits, and its inverse, both exact: see the definition.
    bits = arith.bitcast(i32_type(), amax)
    exponent = arith.subi(arith.shrui(arith.addi(bits, i32((1 << 21) - 1)), i32(23)), i32(8))
    scale = arith.bitcast(ir.F32Type.get(), arith.shli(exponent, i32(23)))
    inverse = arith.bitcast(ir.F32Type.get(), arith.shli(arith.subi(i32(254), exponent), i32(23)))
    words = [_four_e4m3([_nan_if_infinite(_mul(value, inverse)) for value in values[i : i + 4]]) for i in (0, 4)]
    address = _offset(outs[0], row, lane, dim, THREAD_COLUMNS)
    first = arith.cmpi(arith.CmpIPredicate.eq, lane, i32(0))  # one thread of a row stores its scale
    with mgpu.utils.when(is_row):
        ptx("st.global.v2.b32 [$0], {$1, $2};", address, *words)
    with mgpu.utils.when(arith.andi(is_row, first)):
        ptx("st.global.f32 [$0], $1;", _offset(outs[1], row, i32(0), 4, 0), scale)


def _load(base, row, lane, dim):
    """Loads the thread's 8 columns of a row, 16 bytes, as float32."""
    words = ptx(
        "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
        _offset(base, row, lane, 2 * dim, 2 * THREAD_COLUMNS),
        result_types=[i32_type()] * 4,
        has_side_effects=True,
    )
    values = []
    for word in words:
        for bits in (arith.shli(word, i32(16)), arith.andi(word, i32(-65536))):
            values.append(arith.bitcast(ir.F32Type.get(), bits))  # bfloat16 is the upper half of float32
    return values


def _offset(base, row, lane, row_bytes, lane_bytes):
    """Emits the address of a thread's part of a row; rows may lie beyond 2^32 bytes."""
    wide = arith.muli(arith.extui(i64_type(), row), i64(row_bytes))
    return arith.addi(arith.addi(base, wide), arith.extui(i64_type(), arith.muli(lane, i32(lane_bytes))))


# The compiler may not contract or reorder these: bits must be those of the definition.


def _float(text, *operands, **options):
    """Emits PTX whose result is a float32."""
    return ptx(text, *operands, result_types=ir.F32Type.get(), **options)


def _add(a, b):
    return _float("add.rn.f32 $0, $1, $2;", a, b)


def _sub(a, b):
    return _float("sub.rn.f32 $0, $1, $2;", a, b)


def _mul(a, b):
    return _float("mul.rn.f32 $0, $1, $2;", a, b)


def _nan_if_infinite(x):
    """Computes x + 0 · x: NaN of an infinite number, which e4m3 has none of, and all others as they are, -0.0 too."""
    return _float("fma.rn.f32 $0, $1, 0f00000000, $1;", x)


def _largest(amax, value):
    """Takes the larger of `amax` and |value|; NaN if either is."""
    return _float("{.reg .f32 a; abs.f32 a, $2; max.NaN.f32 $0, $1, a;}", amax, value)


def _shuffle(value, lanes):
    """Gets the value of the lane whose number differs in the bit `lanes`."""
    text = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"
    return _float(text, value, has_side_effects=True, convergent=True)


def _two_bf16(low, high):
    """Rounds two float32 into an int32 of bfloat16."""
    return ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=i32_type())


def _four_e4m3(values):
    """Rounds four float32 into an int32 of e4m3; beyond the largest finite number, inf included, they become that."""
    return ptx(
        "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;"
        " mov.b32 $0, {a, b};}",
        *values,
        result_types=i32_type(),
    )
