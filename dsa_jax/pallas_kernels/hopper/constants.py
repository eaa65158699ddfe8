"""Names the numbers that several kernels share: of a multiprocessor, of the tiles that wgmma multiplies, of softmax.

A number that means something of one kernel alone stays in that kernel's file, even where its value is the same.
"""

import math

import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

# A multiprocessor of an H100 or H200 (sm_90).

MULTIPROCESSORS = 132  # of one GPU, where there is none to ask
SMEM_BYTES = 227 * 1024  # shared memory of one thread block, a byte of the compiler's own included
SMEM_GRANULE_BYTES = 1024  # every array in shared memory, barriers aside, takes a multiple of it
REGISTERS_PER_MULTIPROCESSOR = 65536  # of 32 bits each
WARP_THREADS = 32
WARPGROUP_THREADS = 128  # the four warps that issue a wgmma together
WARPS_PER_WARPGROUP = WARPGROUP_THREADS // WARP_THREADS

# Tiles. wgmma multiplies 64 rows at a time. An operand in shared memory consists of tiles of 8 rows of 128 bytes, whose
# 16-byte chunks are permuted (swizzled) by the row, so that no two chunks of a column share memory banks.

WGMMA_ROWS = 64  # of the left operand and of the accumulator
SWIZZLE_BYTES = 128  # one row of a tile, the granule of a product's inner dimension
SWIZZLED_COLUMNS = SWIZZLE_BYTES // 2  # bfloat16 columns of a tile
BLOCK_HEADS = WGMMA_ROWS  # heads that a warpgroup multiplies at a time; fewer are filled up
BLOCK_KEYS = 64  # selected keys that are gathered and multiplied at a time
PAIR_KEYS = 2 * BLOCK_KEYS  # selections are padded to a multiple of it, with -1

# Layouts of arrays in registers.

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one value a row, as reducing an accumulator over its columns leaves it
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)  # one value a column, as reducing it over its rows leaves it
WORD_PER_THREAD = plgpu.Layout.WG_STRIDED((WARPGROUP_THREADS,), vec_size=1)  # one 4-byte value a thread
PAIR_PER_THREAD = plgpu.Layout.WG_STRIDED((2 * WARPGROUP_THREADS,), vec_size=2)  # two neighbouring ones

# Softmax. Exponentials are powers of two, as the hardware's `ex2` takes them: logits are multiplied by log2 e first.

LOG2E = math.log2(math.e)
# How far a weight may exceed 1, as a power of 2, before the accumulator is rescaled to a new maximum. A reference that
# is too low by less costs no accuracy, as float32 has room for such sums; rescaling takes a pass over the registers.
RESCALE_LOG2 = 8.0
MAXIMUM_FLOOR = float(np.finfo(np.float32).min)  # where a running maximum begins: finite, or no keys would make a NaN
