"""What the math warpgroups of `index_scores` do with a tile of products: relu, the weighted sum over heads, the store.

In wgmma's layout a thread holds of each tile two rows (keys r and r + 8 of its warp's 16) and in each 2 neighbouring
columns in every 8, so four neighbouring lanes hold a row. Each thread sums its columns, 2 · 128/J sums for (query,
row); then the four lanes add theirs up in two steps, each lane handing over half of its sums, so that every lane ends
with a quarter of the sums complete. Lane l of four holds, of the sums numbered 2 · query + half, those from l · J' on,
J' = 2 · 128/J / 4: one query and one row for J = 64, one and two for 32, two and two for 16.

Registers are short: a thread has 112, of which 64 hold products and 32 weights. So a query that is not there is marked
in its range, and the stores of a thread share one address.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from dsa_jax.pallas_kernels.hopper import ptx

KEY_TILE = 64  # rows of one wgmma
ROWS = 128  # (query, head) rows of a math warpgroup: the width of its accumulator


def _lane_queries(heads: int) -> int:
    """The queries whose scores a thread stores."""
    return max(1, ROWS // heads // 4)


def _ranges_layout(heads: int):
    count = _lane_queries(heads)
    return plgpu.Layout.WG_STRIDED((ptx.WARPGROUP * count,), vec_size=count)


def load_ranges(start_gmem, stop_gmem, row, left, size, heads, interpret):
    """The first key and the number of keys of the queries whose scores this thread stores.

    `row` is the first of the warpgroup's queries and `left` how many are left of its batch row from there on: others
    have -1 keys, and nothing is stored for them.
    """
    if interpret:
        return start_gmem, stop_gmem, left
    layout = _ranges_layout(heads)
    result = ptx.Result((ptx.WARPGROUP * _lane_queries(heads),), jnp.int32, layout)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ptx.SPLAT, ptx.SPLAT), return_type=(result, result))
    def load(ctx, start, stop, row, left):
        ranges = []
        for i in range(_lane_queries(heads)):
            query = arith.addi(_lane_query(heads), ptx.i32(i))
            there = arith.cmpi(arith.CmpIPredicate.slt, query, ptx.scalar(left))
            at = arith.select(there, arith.addi(ptx.scalar(row), query), ptx.i32(0))
            at = arith.shli(arith.extui(ptx.i64_type(), at), ptx.i64(2))
            addresses = [arith.addi(ptx.gmem_address(ref), at) for ref in (start, stop)]
            low, high = (ptx.ptx("ld.global.nc.b32 $0, [$1];", x, result_types=ptx.i32_type()) for x in addresses)
            low = arith.minsi(arith.maxsi(low, ptx.i32(0)), ptx.i32(size))
            high = arith.maxsi(arith.minsi(high, ptx.i32(size)), low)
            ranges.append((low, arith.select(there, arith.subi(high, low), ptx.i32(-1))))
        return tuple(ptx.private_values(column, layout) for column in zip(*ranges, strict=True))

    return load(start_gmem, stop_gmem, row, left)


def _lane_query(heads: int):
    """The first query, of its warpgroup's, whose scores this thread stores."""
    lane = arith.andi(ptx.thread_id(), ptx.i32(3))
    return arith.shrui(lane, ptx.i32(1)) if heads == 64 else arith.muli(lane, ptx.i32(_lane_queries(heads)))


def store_scores(products, weights, scales, ranges, out_gmem, row, key, heads, interpret):
    """Stores the scores of 64 keys from `key` on and the queries of one warpgroup, from output row `row` on.

    `products` are q · k, [64, ROWS]; `weights` [ROWS]; `scales` those of the keys, [64] in shared memory, one array or
    none; `ranges` are from `load_ranges`.
    """
    if interpret:
        _interpreted_store(products, weights, scales, ranges, out_gmem, row, key, heads)
        return
    size = out_gmem.shape[1]
    layout, gmem, smem = _ranges_layout(heads), plgpu.RefType(), [plgpu.RefType()] * len(scales)
    products_layout, weights_layout = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)

    @ptx.inline_mgpu(arg_types=(products_layout, weights_layout, layout, layout, gmem, ptx.SPLAT, ptx.SPLAT, *smem))
    def store(ctx, products, weights, low, reach, out, row, key, *scales):
        f32 = ir.F32Type.get()
        sums = _lane_sums(products, weights, heads)
        thread = arith.andi(ptx.thread_id(), ptx.i32(ptx.WARPGROUP - 1))
        tile_row = arith.ori(
            arith.shli(arith.shrui(thread, ptx.i32(5)), ptx.i32(4)),
            arith.andi(arith.shrui(thread, ptx.i32(2)), ptx.i32(7)),
        )
        if heads == 64:  # this thread stores one of its two rows
            tile_row = arith.addi(tile_row, arith.shli(arith.andi(thread, ptx.i32(1)), ptx.i32(3)))
        position = arith.addi(ptx.scalar(key), tile_row)
        halves = 1 if heads == 64 else 2
        scale_of = []
        for scale in scales:
            address = arith.addi(ptx.smem_address(scale), arith.shli(tile_row, ptx.i32(2)))
            scale_of = [
                ptx.ptx(f"ld.shared.f32 $0, [$1+{32 * half}];", address, result_types=f32, has_side_effects=True)
                for half in range(halves)
            ]
        address = arith.extui(ptx.i64_type(), arith.addi(ptx.scalar(row), _lane_query(heads)))
        address = arith.addi(ptx.gmem_address(out), arith.muli(address, ptx.i64(4 * size)))
        address = arith.addi(address, arith.shli(arith.extui(ptx.i64_type(), position), ptx.i64(2)))
        for i in range(_lane_queries(heads)):
            first, count = (llvm.extractelement(x.registers.item(), ptx.i32(i)) for x in (low, reach))
            there = arith.cmpi(arith.CmpIPredicate.sge, count, ptx.i32(0))
            for half in range(halves):
                score = sums[i * halves + half]
                if scales:
                    score = arith.mulf(score, scale_of[half])
                at = arith.addi(position, ptx.i32(8 * half))
                # Unsigned: a key before the first wraps around to a large number.
                reached = arith.cmpi(arith.CmpIPredicate.ult, arith.subi(at, first), count)
                score = arith.select(reached, score, arith.constant(f32, float("-inf")))
                inside = arith.andi(there, arith.cmpi(arith.CmpIPredicate.slt, at, ptx.i32(size)))
                ptx.ptx(f"@$2 st.global.f32 [$0+{4 * size * i + 32 * half}], $1;", address, score, inside)

    store(products, weights, *ranges, out_gmem, row, key, *scales)


def _lane_sums(products, weights, heads: int) -> list:
    """This lane's quarter of the sums Σ_j w_j · relu(x_j), complete."""
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, 0.0)
    products = products.registers.reshape(ROWS // 8, 2)
    weights = weights.registers.reshape(ROWS // 8)

    def part(number):
        """This thread's part of one sum, number 2 · query + half."""
        query, half = divmod(number, 2)
        total = zero  # and not a first product: a sum of -0.0 is +0.0
        for column in range(query * heads // 8, (query + 1) * heads // 8):
            for i in range(2):
                x, w = (llvm.extractelement(pair, ptx.i32(i)) for pair in (products[column, half], weights[column]))
                # maximumf keeps NaN; and relu(-inf), which only bfloat16 can make, is 0.
                total = mlir_math.fma(arith.maximumf(x, zero), w, total)
        return total

    quarter = ROWS // heads // 2
    return [
        _exchange(
            *(_exchange(part(i + j * quarter), part(i + (j + 2) * quarter), lane_bit=2) for j in range(2)), lane_bit=1
        )
        for i in range(quarter)
    ]


def _exchange(low, high, lane_bit: int):
    """Two lanes add up two sums: the one without the bit gets `low`, the other `high`."""
    upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(ptx.thread_id(), ptx.i32(lane_bit)), ptx.i32(0))
    kept, given = arith.select(upper, high, low), arith.select(upper, low, high)
    return arith.addf(kept, mgpu.utils.shfl_bfly(given, lane_bit))


def _interpreted_store(products, weights, scales, ranges, out_gmem, first_row, key, heads):
    start_gmem, stop_gmem, left = ranges
    x = jnp.where(products <= 0, 0.0, products)
    sums = jnp.sum((x * weights).reshape(KEY_TILE, ROWS // heads, heads), axis=2)
    for scale in scales:
        sums = sums * scale[...][:, None]
    for i in range(ROWS // heads):

        @pl.when(i < left)
        def _(row=first_row + i, sums=sums[:, i]):
            positions = key + lax.iota(jnp.int32, KEY_TILE)
            scores = jnp.where((positions >= start_gmem[row]) & (positions < stop_gmem[row]), sums, -jnp.inf)

            @pl.loop(0, jnp.minimum(KEY_TILE, out_gmem.shape[1] - key))
            def _(j):
                out_gmem[row, key + j] = lax.dynamic_index_in_dim(scores, j, keepdims=False)


def fill_row(out_gmem, row, low, high, interpret) -> None:
    """Stores -inf in columns [low, high) of a row, as far as there are any; one warpgroup calls this together."""
    size = out_gmem.shape[1]
    high = jnp.minimum(high, size)
    if interpret:

        @pl.loop(low, high)
        def _(i):
            out_gmem[row, i] = -jnp.inf

        return

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT, ptx.SPLAT, ptx.SPLAT))
    def store(ctx, out, row, column, high):
        at = arith.addi(ptx.scalar(column), arith.andi(ptx.thread_id(), ptx.i32(ptx.WARPGROUP - 1)))
        inside = arith.cmpi(arith.CmpIPredicate.slt, at, ptx.scalar(high))
        address = arith.muli(arith.extui(ptx.i64_type(), ptx.scalar(row)), ptx.i64(4 * size))
        address = arith.addi(address, arith.shli(arith.extui(ptx.i64_type(), at), ptx.i64(2)))
        address = arith.addi(ptx.gmem_address(out), address)
        ptx.ptx("@$2 st.global.f32 [$0], $1;", address, arith.constant(ir.F32Type.get(), float("-inf")), inside)

    @pl.loop(0, lax.div(jnp.maximum(high - low, 0) + ptx.WARPGROUP - 1, ptx.WARPGROUP))
    def _(i):
        store(out_gmem, row, low + i * ptx.WARPGROUP, high)
