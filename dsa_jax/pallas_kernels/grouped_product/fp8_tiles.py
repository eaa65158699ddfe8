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


def convert(raw_smem, first, scales, to_smem, interpret: bool = False) -> None:
    """Writes scale · raw, 64 columns of it, of each tile. A warpgroup calls it together.

    Args:
      raw_smem: tiles [64, 128] e4m3, swizzled.
      first: the first column, a multiple of 64.
      scales: of each tile, bits of a float32.
      to_smem: [64, 64] bfloat16, swizzled, for each tile; wgmma may read it after `commit_smem`.
      interpret: whether the interpreter runs this.
    """
    if interpret:
        for raw, scale, to in zip(raw_smem, scales, to_smem, strict=True):
            values = raw[:, pl.ds(first, COLUMNS)].astype(jnp.float32)
            to[...] = (values * lax.bitcast_convert_type(scale, jnp.float32)).astype(jnp.bfloat16)
        return
    count = len(raw_smem)
    kinds = plgpu.RefType(ptx.swizzled(jnp.float8_e4m3fn)), ptx.SPLAT, plgpu.RefType(ptx.swizzled(jnp.bfloat16))

    @ptx.inline_mgpu(arg_types=(ptx.SPLAT, *(kind for kind in kinds for _ in range(count))))
    def run(ctx, first, *arguments):
        raw, scale, to = (arguments[i * count : (i + 1) * count] for i in range(3))
        addresses, places = ([simt.smem_address(each) for each in refs] for refs in (raw, to))
        convert_thread(addresses, simt.scalar(first), [simt.scalar(each) for each in scale], places)

    run(jnp.int32(first), *raw_smem, *scales, *to_smem)


def convert_thread(raw, first, scales, to) -> None:
    """Converts what a thread has of each tile; the arguments are those of `convert`, arrays by their addresses.

    Two threads have a row, 32 columns each: two chunks of e4m3, four of bfloat16. In tiles of eight rows of 128 bytes
    chunk c of row r is at (c xor r mod 8) · 16. All are loaded before the first is converted.
    """
    thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
    row, half = thread >> 1, thread & 1
    row_start, turn = row << 7, row & 7
    chunk = (first >> 4) + (half << 1)
    places = [row_start + (simt_copies.xor(chunk + i, turn) << 4) for i in range(2)]
    loaded = [[simt.load4(tile + place) for place in places] for tile in raw]
    for tile, scale, chunks in zip(to, scales, loaded, strict=True):
        for i, words in enumerate(chunks):
            halves = [pair for word in words for pair in simt_copies.e4m3_as_half(word)]
            pairs = [simt_copies.half_to_bfloat16(pair, scale) for pair in halves]
            for j in range(2):
                place = simt_copies.xor((half << 2) + (2 * i + j), turn) << 4
                simt.store4(tile + row_start + place, pairs[4 * j : 4 * j + 4])
