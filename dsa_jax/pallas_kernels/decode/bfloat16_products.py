"""Multiplies blocks of shared memory whose types differ, half precision and bfloat16, for rare blocks of keys."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from dsa_jax.pallas_kernels.decode.gather_rows import GROUP_BYTES, TILE_BYTES, VALUE_DIM
from dsa_jax.pallas_kernels.hopper import ptx, simt, simt_copies
from dsa_jax.pallas_kernels.hopper.constants import SWIZZLED_COLUMNS, WARP_THREADS, WARPGROUP_THREADS


def multiply_as_bfloat16(a_smem, b_smem, half: str):
    """Computes A Bᵀ of [64, 576] and [N, 576] in swizzled tiles, with bfloat16 products and float32 sums.

    One warpgroup calls it. It goes without wgmma, which takes no operands of different types and wants more registers
    for a converted one than there are beside the accumulators of `out`; it takes a few microseconds.

    Args:
      a_smem: [64, 576], and
      b_smem: [N, 576], bfloat16 by their type.
      half: "a" or "b": whose first 512 columns are half precision. They are rounded to bfloat16.

    Returns:
      [64, N] float32 as wgmma accumulates it.
    """
    columns = b_smem.shape[0] // 8
    swizzled = plgpu.RefType(ptx.swizzled(jnp.bfloat16))
    result = ptx.Result((64, 8 * columns), jnp.float32, plgpu.Layout.WGMMA)

    @ptx.inline_mgpu(arg_types=(swizzled, swizzled), return_type=result)
    def multiply(ctx, a, b):
        thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
        lane, warp = thread & (WARP_THREADS - 1), thread >> 5
        row = lane >> 2  # of eight; a lane has two neighbouring columns of every eight
        in_tile = (row << 7) + ((lane & 3) << 2)
        chunks = [in_tile + simt_copies.xor(row << 4, simt.i32(16 * chunk)) for chunk in range(8)]
        rows = simt.smem_address(a) + warp * (2 * GROUP_BYTES)
        others = simt.smem_address(b)

        def step(tile, *sums):
            latent, at = tile < VALUE_DIM // SWIZZLED_COLUMNS, tile * TILE_BYTES

            def load(address, offset, operand):
                x = simt.load(address, offset)
                return simt.where(latent, simt_copies.half_to_bfloat16(x), x) if operand == half else x

            sums = list(sums)
            for left, right in zip(chunks[::2], chunks[1::2], strict=True):  # 16 columns
                x = [load(rows + chunk + at, GROUP_BYTES * lower, "a") for chunk in (left, right) for lower in range(2)]
                for i in range(columns):
                    y = [load(others + chunk + at, GROUP_BYTES * i, "b") for chunk in (left, right)]
                    sums[4 * i : 4 * i + 4] = simt_copies.multiply_16x8(x, y, sums[4 * i : 4 * i + 4])
            return sums

        tiles = GROUP_BYTES // TILE_BYTES
        sums = [x.value for x in simt.loop(0, tiles, 1, [simt.f32(0.0)] * (4 * columns), step)]
        # What is written over these operands next, P over rotary columns, waits for the slowest warp.
        simt.barrier((simt.thread_id() >> 7) + 1, WARPGROUP_THREADS)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = [vector.from_elements(pair, sums[i : i + 2]) for i in range(0, 4 * columns, 2)]
        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.array(registers, dtype=object).reshape(layout.registers_shape((64, 8 * columns)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return multiply(a_smem, b_smem)
