"""Computes the indexer's Hadamard transform and its rounding to e4m3 on Hopper: one read and one write of the rows.

A group of E / 8 threads holds a row, 8 neighbouring columns a thread: 16 bytes of bfloat16. The butterfly's first three
stages are in a thread's registers, the others are shuffles, in the order of the definition, so that bits agree with it.
Bound by device memory: XLA makes a pass over float32 copies for each of the stages and takes ten times as long.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx, simt
from dsa_jax.pallas_kernels.hopper.constants import WARPGROUP_THREADS
from dsa_jax.pallas_kernels.quantization.rows import THREAD_COLUMNS, hadamard_row, quantize_row, widened

WIDTHS = (64, 128)  # E
THREAD_ROWS = 4  # that a thread loads before it works on the first: enough bytes in flight to fill the memory's latency


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

        @ptx.inline_mgpu(arg_types=(plgpu.RefType(),) * (1 + len(out_gmem)) + (plgpu.Layout.WG_SPLAT,))
        def run(ctx, x, *refs):
            *outs, block = refs
            thread = simt.thread_id()
            lane = thread & (threads - 1)  # among the threads of its row
            first = simt.scalar(block) * rows_per_block + (thread >> int(math.log2(threads)))
            numbers = [first + i * WARPGROUP_THREADS // threads for i in range(THREAD_ROWS)]
            # For a row past the end the last one is read, and not stored: its group still takes part in shuffles.
            present = [number < rows for number in numbers]
            numbers = [simt.minimum(number, simt.i32(rows - 1)) for number in numbers]
            # All rows are asked for before the first is worked on.
            loaded = [_load(simt.gmem_address(x), number, lane, dim) for number in numbers]
            for values, number, is_row in zip(loaded, numbers, present, strict=True):
                work(values, [simt.gmem_address(out) for out in outs], number, lane, is_row, dim)

        run(x_gmem, *out_gmem, block)

    return ptx.kernel(
        body,
        out_type=out,
        grid=(pl.cdiv(rows, rows_per_block),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x.reshape(rows, dim))


def _transform_rows(values, outs, row, lane, is_row, dim):
    """Transforms a row, and stores it if it `is_row`, and not one past the end."""
    words = hadamard_row(values, lane, dim)
    with simt.when(is_row):
        simt.store4_gmem(_address(outs[0], row, lane, 2 * dim, 2 * THREAD_COLUMNS), words)


def _quantize_rows(values, outs, row, lane, is_row, dim):
    """Rounds a row, and stores it and its scale if it `is_row`, and not one past the end."""
    words, scale = quantize_row(values, dim)
    with simt.when(is_row):
        simt.store2_gmem(_address(outs[0], row, lane, dim, THREAD_COLUMNS), words)
    with simt.when(is_row & lane.equals(0)):  # one thread of a row stores its scale
        simt.store_gmem(_address(outs[1], row, simt.i32(0), 4, 0), scale.bits())


def _load(base, row, lane, dim):
    """Loads the thread's 8 columns of a row, 16 bytes, as float32."""
    vector = simt.load_gmem_vector(_address(base, row, lane, 2 * dim, 2 * THREAD_COLUMNS))
    return widened([x.bits() for x in vector])


def _address(base, row, lane, row_bytes, lane_bytes):
    """Computes the address of a thread's part of a row; rows may lie beyond 2^32 bytes."""
    return base + row.long() * row_bytes + (lane * lane_bytes).long()
