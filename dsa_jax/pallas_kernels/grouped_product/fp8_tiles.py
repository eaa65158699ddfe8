"""Converts tiles of FP8 weights to bfloat16 on their way into a product, in shared memory.

A weight of e4m3 is multiplied by its block's scale in float32 and rounded, as where a checkpoint is loaded: the product
has the bits that it would have of weights in bfloat16.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx, simt, simt_copies
from dsa_jax.pallas_kernels.hopper.constants import WARPGROUP_THREADS

BLOCK = 128  # of rows and of columns that share a scale
ROWS, COLUMNS = 64, 64  # of a tile that a warpgroup converts
CHUNK = 16  # bytes that stay together where rows are swizzled


def scale_bits(scales):
    """Gives float32 scales as int32, as which `convert` takes them."""
    return lax.bitcast_convert_type(scales, jnp.int32)


def convert(raw_smem, first, scale, to_smem, interpret: bool = False) -> None:
    """Writes scale · raw, 64 columns of it, to `to_smem`. A warpgroup calls it together.

    Args:
      raw_smem: [64, 128] e4m3, swizzled.
      first: the first column, a multiple of 64.
      scale: bits of a float32.
      to_smem: [64, 64] bfloat16, swizzled; wgmma may read it after `commit_smem`.
      interpret: whether the interpreter runs this.
    """
    if interpret:
        values = raw_smem[:, pl.ds(first, COLUMNS)].astype(jnp.float32)
        to_smem[...] = (values * lax.bitcast_convert_type(scale, jnp.float32)).astype(jnp.bfloat16)
        return

    @ptx.inline_mgpu(
        arg_types=(
            plgpu.RefType(ptx.swizzled(jnp.float8_e4m3fn)),
            ptx.SPLAT,
            ptx.SPLAT,
            plgpu.RefType(ptx.swizzled(jnp.bfloat16)),
        )
    )
    def run(ctx, raw, first, scale, to):
        convert_thread(simt.smem_address(raw), simt.scalar(first), simt.scalar(scale), simt.smem_address(to))

    run(raw_smem, jnp.int32(first), scale, to_smem)


def convert_thread(raw, first, scale, to) -> None:
    """Converts what a thread has of a tile; the arguments are those of `convert`, arrays by their addresses.

    Two threads have a row, 32 columns each: two chunks of e4m3, four of bfloat16. In tiles of eight rows of 128 bytes
    chunk c of row r is at (c xor r mod 8) · 16.
    """
    thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
    row, half = thread >> 1, thread & 1
    row_start, turn = row << 7, row & 7
    chunk = (first >> 4) + (half << 1)
    for i in range(2):
        words = simt.load4(raw + row_start + (simt_copies.xor(chunk + i, turn) << 4))
        halves = [pair for word in words for pair in simt_copies.e4m3_as_half(word)]
        pairs = [simt_copies.half_to_bfloat16(pair, scale) for pair in halves]
        for j in range(2):
            place = simt_copies.xor((half << 2) + (2 * i + j), turn) << 4
            simt.store4(to + row_start + place, pairs[4 * j : 4 * j + 4])
