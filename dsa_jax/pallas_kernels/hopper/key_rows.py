"""Has the steps of attention whose accumulators have keys for rows and heads for columns, so that few heads suffice."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import COLUMN_LAYOUT


def zeros(shape, interpret: bool = False):
    """Makes float32 zeros in the layout of an accumulator."""
    x = jnp.zeros(shape, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def over_rows(by_head, rows):
    """Repeats one value a head along rows: [N] -> [rows, N]."""
    return lax.broadcast_in_dim(by_head, (rows, by_head.shape[0]), [1])


def over_heads(by_key, heads):
    """Repeats one value a key along heads: [64] -> [64, heads]."""
    return lax.broadcast_in_dim(by_key, (by_key.shape[0], heads), [0])


def store_transposed(to_smem, x, interpret: bool = False) -> None:
    """Writes x [rows, N] of an accumulator to `to_smem` [N, rows]."""
    if interpret:
        to_smem[...] = x.T
        return
    # In this layout a thread holds two neighbours of a column, which are neighbours in `to_smem`.
    to_smem.transpose((1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def reduce_keys(x, warps_smem, op: str, interpret: bool = False):
    """Reduces x [64, N] over its keys to the maximum or sum, [N], in every thread; always in the same order.

    A warp has 16 keys: two in each thread, eight along its lanes. Then the four warps exchange through `warps_smem`
    [4, N], which may be written again once the warpgroup has met at another barrier.
    """
    if interpret:
        return jnp.max(x, axis=0) if op == "max" else jnp.sum(x, axis=0)
    heads = x.shape[1]
    combine = {"max": arith.maximumf, "add": arith.addf}[op]

    @ptx.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=ptx.Result((heads,), jnp.float32, COLUMN_LAYOUT),
    )
    def reduce(ctx, x, warps):
        f32, pair = ir.F32Type.get(), ir.VectorType.get((2,), ir.F32Type.get())
        thread = ptx.thread_of_warpgroup()
        warp, lane = arith.shrui(thread, ptx.i32(5)), arith.andi(thread, ptx.i32(31))
        # Lane l has columns 2 (l mod 4) and the next of every eight.
        source = arith.addi(ptx.smem_address(warps), arith.shli(arith.andi(lane, ptx.i32(3)), ptx.i32(3)))
        to = arith.addi(source, arith.muli(warp, ptx.i32(4 * heads)))

        def halves(value):
            return [vector.extract(value, [], ir.DenseI64ArrayAttr.get([i])) for i in range(2)]

        columns = []  # of every eight, this thread's two, reduced over the warp's keys
        for upper, lower in x.registers.reshape(heads // 8, 2):
            values = [combine(a, b) for a, b in zip(halves(upper), halves(lower), strict=True)]
            for distance in (4, 8, 16):  # lanes that have the same columns and other keys
                values = [combine(value, mgpu.utils.shfl_bfly(value, distance)) for value in values]
            columns.append(values)
        # Four lanes of each warp have all columns between them, and write the warp's row.
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, ptx.i32(4))):
            for i, values in enumerate(columns):
                ptx.ptx(f"st.shared.v2.f32 [$0+{32 * i}], {{$1, $2}};", to, *values)
        mgpu.utils.warpgroup_barrier()
        registers = []
        for i in range(heads // 8):
            parts = [
                ptx.ptx(
                    f"ld.shared.v2.f32 {{$0, $1}}, [$2+{4 * heads * w + 32 * i}];",
                    source,
                    result_types=[f32, f32],
                    has_side_effects=True,
                )
                for w in range(4)
            ]
            # The same order in every thread, so that all have the same bits.
            values = [combine(combine(a, b), combine(c, d)) for a, b, c, d in zip(*parts, strict=True)]
            registers.append(vector.from_elements(pair, values))
        layout = COLUMN_LAYOUT.to_mgpu()
        registers = np.array(registers, dtype=object).reshape(layout.registers_shape((heads,)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return reduce(x, warps_smem)
