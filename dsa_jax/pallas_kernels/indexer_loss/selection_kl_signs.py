"""Which logits of a block of keys are positive, a bit each, and what the gradients' products are given in their place.

The relu's derivative is all that the second pass over a query's keys needs of the logits. A thread's 32 of a block, in
the layout of wgmma, are the bits of one int32: for columns 8i + 2c and the next, c this lane's number of four, and its
upper row bits 7 - i and 15 - i, for the row 8 below 23 - i and 31 - i. So, shifted by i, these are the signs of bytes,
which `prmt` spreads over pairs of bfloat16.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsa_jax.pallas_kernels.hopper import ptx

BLOCK = 64  # keys, and heads
WORD_A_THREAD = plgpu.Layout.WG_STRIDED((ptx.WARPGROUP,), vec_size=1)
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMN_TILES = BLOCK // 8
PARTS = 2  # bfloat16 that a value is given in: the rounded one, and what that has left over


def signs(logits, interpret: bool = False):
    """An int32 a thread: where `logits` [64, 64] > 0."""
    if interpret:
        bits = (logits > 0).reshape(ptx.WARPGROUP, 32).astype(jnp.uint32)
        words = (bits << lax.broadcasted_iota(jnp.uint32, bits.shape, 1)).sum(axis=1, dtype=jnp.uint32)
        return lax.bitcast_convert_type(words, jnp.int32)

    @ptx.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=ptx.Result((ptx.WARPGROUP,), jnp.int32, WORD_A_THREAD)
    )
    def pack(ctx, logits):
        registers = logits.registers.reshape(COLUMN_TILES, 2)
        # 0 - x has a sign where x > 0 alone. Four chains of eight, as a chain of all would take four times as long.
        code = [".reg .b32 x, b<4>;", *(f"mov.b32 b{i}, 0;" for i in range(4))]
        values = []
        for tile in registers:
            for byte, (vector, element) in enumerate((v, e) for v in tile for e in range(2)):
                values.append(llvm.extractelement(vector, ptx.i32(element)))
                code.append(f"sub.f32 x, 0f00000000, ${len(values)}; shf.l.wrap.b32 b{byte}, x, b{byte}, 1;")
        code.append("prmt.b32 b0, b0, b1, 0x0040; prmt.b32 b2, b2, b3, 0x0040; prmt.b32 $0, b0, b2, 0x5410;")
        word = ptx.ptx("{" + "\n".join(code) + "}", *values, result_types=ptx.i32_type(), has_side_effects=True)
        return ptx.private_values([word], WORD_A_THREAD)

    return pack(logits)


def masked(words, values, interpret: bool = False):
    """The parts, each bfloat16 [64, 64], of `values` [64], float32, in rows where the bits are set, and else zeros."""
    if interpret:
        shifts = lax.broadcasted_iota(jnp.int32, (ptx.WARPGROUP, 32), 1)
        bits = ((words[:, None] >> shifts) & 1).reshape(BLOCK, BLOCK) != 0
        rounded = values.astype(jnp.bfloat16)
        rest = (values - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
        return [jnp.where(bits, x[:, None], 0) for x in (rounded, rest)]
    result = ptx.Result((BLOCK, BLOCK), jnp.bfloat16, plgpu.Layout.WGMMA)

    @ptx.inline_mgpu(arg_types=(WORD_A_THREAD, ROWS), return_type=[result] * PARTS)
    def spread(ctx, words, values):
        (word,) = ptx.elements(words)
        rounded = [_bfloat16_pairs(value) for value in ptx.elements(values)]
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((BLOCK, BLOCK))
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = [np.empty((COLUMN_TILES, 2), dtype=object) for _ in range(PARTS)]
        for tile in range(COLUMN_TILES):
            shifted = arith.shli(word, ptx.i32(tile))
            for row, selector in enumerate(("0x9988", "0xBBAA")):  # the signs of bytes 0 and 1, of 2 and 3
                mask = ptx.ptx(f"prmt.b32 $0, $1, 0, {selector};", shifted, result_types=ptx.i32_type())
                for part in range(PARTS):
                    registers[part][tile, row] = llvm.bitcast(pair, arith.andi(mask, rounded[row][part]))
        return [mgpu.FragmentedArray(_registers=x.reshape(shape), _layout=layout, _is_signed=None) for x in registers]

    return spread(words, values)


def _bfloat16_pairs(value):
    """A float32 rounded, twice in an int32, and the same of what is left over."""
    code = "cvt.rn.bf16x2.f32 $0, $1, $1;"
    first = ptx.ptx(code, value, result_types=ptx.i32_type())
    high = llvm.bitcast(ir.F32Type.get(), arith.andi(first, ptx.i32(-(1 << 16))))
    return [first, ptx.ptx(code, arith.subf(value, high), result_types=ptx.i32_type())]
