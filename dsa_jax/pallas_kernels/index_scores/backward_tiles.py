"""What the kernels of `index_scores_backward` share: sizes, roles, products, and g in shared memory."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsa_jax.pallas_kernels.hopper import ptx

ROWS = 64  # of one wgmma, and of a compute warpgroup
WARPGROUPS = 2  # of compute
TILE = 128  # what streams by: keys, or (query, head) pairs
BLOCK_ROWS = WARPGROUPS * ROWS  # what stays: (query, head) pairs, or keys; both kernels have the same groups of queries
STAGES = 4  # tiles in shared memory
# Of a thread: 64 hold the products, 64 (E 128) the sums, 32 the A operand.
COMPUTE_REGISTERS = 232
PRODUCER_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


def smem_bytes(heads: int, dim: int) -> int:
    """Of the larger kernel, that of `d_q`, barriers aside: 195 KiB for J 64 and E 128."""
    arrays = [
        2 * BLOCK_ROWS * dim * 2,  # q, and d_q on its way out
        BLOCK_ROWS * 4,  # w
        BLOCK_ROWS * 4,  # d_weights
        STAGES * TILE * dim * 2,
        STAGES * BLOCK_ROWS * TILE // heads * 4,  # g
    ]
    return sum(map(ptx.allocated, arrays))


class Shape(NamedTuple):
    """What a kernel is made for."""

    batch: int
    length: int
    size: int
    heads: int
    dim: int
    scaled: bool
    blocks: int


def in_roles(produce, compute, held_empty, empty, interpret):
    """What each warpgroup does: the last one produces. All that it fills is empty at first.

    `held_empty` is the barrier of what stays for an item, `empty` those of the stages.
    """
    warpgroup = lax.axis_index("warpgroup")
    all_empty = [held_empty, *(empty.at[stage] for stage in range(STAGES))]

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        if not interpret:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()
        if interpret:  # which insists that every phase of a barrier is waited for
            for barrier in all_empty:
                plgpu.barrier_wait(barrier)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        if not interpret:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for barrier in all_empty:
            plgpu.barrier_arrive(barrier)
        compute()


def feed(low, high, load, copy, g_smem, full, empty, interpret, *, before=0):
    """Brings tiles low, low + 1, …, high - 1, for `stream`: tile i to stage `before` + i modulo the stages.

    `copy(tile, stage)` starts the copies of a tile, `load(tile)` gives its g, of one past the last as well.
    """

    def bring(tile, g):
        following = load(tile + 1)  # a tile ahead: it takes its time
        stage = lax.rem(before + tile, STAGES)
        plgpu.barrier_wait(empty.at[stage])
        copy(tile, stage)
        store_g(g, g_smem.at[stage], interpret)
        plgpu.barrier_arrive(full.at[stage])
        return following

    lax.fori_loop(low, high, bring, load(low))


def product(a, b_smem, interpret, *, transposed=False):
    """a · b, or a · bᵀ, float32; `a` is in registers."""
    if interpret:  # which multiplies nothing in registers
        b = b_smem[...].astype(jnp.float32)
        return jnp.dot(a.astype(jnp.float32), b.T if transposed else b)
    b_smem = b_smem.transpose((1, 0)) if transposed else b_smem

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b_smem)
        return accumulator[...]

    return pl.run_scoped(multiply, ptx.ACC((a.shape[0], b_smem.shape[1]), jnp.float32))


def stream(a, b_smem, low, high, full, empty, prepare, state, interpret):
    """Σ_i x_i · b_i over tiles low, low + 1, …, high - 1, and the last state.

    Tile i is in `b_smem` at i modulo the stages. `prepare(stage)` loads what goes with it, and gives a function of the
    products a · b_iᵀ and of the state, to x_i and the new state.
    """

    def add_tile(position, carry):
        total, state = carry
        stage = lax.rem(position, STAGES)
        plgpu.barrier_wait(full.at[stage])
        b, combine = b_smem.at[stage + ptx.opaque_zero(interpret)], prepare(stage)
        x, state = combine(product(a, b, interpret, transposed=True), state)
        if interpret:
            total = total + product(x, b, interpret)
        else:
            total = pl.run_state(lambda ref: plgpu.wgmma(ref, x, b))(ptx.ACC.init(total))
        plgpu.barrier_arrive(empty.at[lax.rem(position, STAGES)])
        return total, state

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, b_smem.shape[2]), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(low, high, add_tile, (zeros, state))


# g: threads of the producer bring it to shared memory, [queries, keys] of a tile, thread i the elements i, i + 128, ….


def load_g(d_scores, first, count, scale, score_row, range_row, scale_row, key, queries, keys, interpret):
    """k_scale · d_scores of `queries` × `keys` from the given rows and `key` on, 0 where a query does not reach."""
    if interpret:
        position = key + lax.broadcasted_iota(jnp.int32, (queries, keys), 1)
        low, number = (ref[pl.ds(range_row, queries)][:, None] for ref in (first, count))
        g = d_scores[pl.ds(score_row, queries), pl.ds(key, keys)]
        for ref in scale:
            g = g * ref[pl.ds(scale_row + key, keys)][None]
        return jnp.where((position >= low) & (position < low + number), g, 0.0).reshape(-1)
    size, each = d_scores.shape[1], queries * keys // ptx.WARPGROUP
    layout = plgpu.Layout.WG_STRIDED((queries * keys,), vec_size=each)
    splats, gmem = [ptx.SPLAT] * 4, plgpu.RefType()

    @ptx.inline_mgpu(
        arg_types=(*splats, gmem, gmem, gmem, *[gmem for _ in scale]),
        return_type=ptx.Result((queries * keys,), jnp.float32, layout),
    )
    def load(ctx, score_row, range_row, scale_row, key, d_scores, first, count, *scale):
        f32 = ir.F32Type.get()

        def at(ref, element):
            return arith.addi(ptx.gmem_address(ref), arith.shli(arith.extui(ptx.i64_type(), element), ptx.i64(2)))

        def load_if(ref_address, reached):
            code = "mov.f32 $0, 0f00000000;\n@$2 ld.global.nc.f32 $0, [$1];"
            return ptx.ptx(code, ref_address, reached, result_types=f32, has_side_effects=True)

        values = []
        for query, column in _elements_of_thread(queries, keys):
            position = arith.addi(ptx.scalar(key), column)
            range_at = arith.addi(ptx.scalar(range_row), query)
            # Loaded anew for every tile: kept, the ranges of 8 queries would not fit the producer's registers.
            low, number = (
                ptx.ptx(
                    "ld.global.nc.b32 $0, [$1];", at(ref, range_at), result_types=ptx.i32_type(), has_side_effects=True
                )
                for ref in (first, count)
            )
            # Unsigned: a key before the first wraps around to a large number.
            reached = arith.cmpi(arith.CmpIPredicate.ult, arith.subi(position, low), number)
            row = arith.extui(ptx.i64_type(), arith.addi(ptx.scalar(score_row), query))
            address = arith.addi(at(d_scores, position), arith.muli(row, ptx.i64(4 * size)))
            value = load_if(address, reached)
            for ref in scale:
                value = arith.mulf(value, load_if(at(ref, arith.addi(ptx.scalar(scale_row), position)), reached))
            values.append(value)
        vector = llvm.mlir_undef(ir.VectorType.get((each,), f32))
        for i, value in enumerate(values):
            vector = llvm.insertelement(vector, value, ptx.i32(i))
        return mgpu.FragmentedArray(
            _registers=np.array([vector], dtype=object), _layout=layout.to_mgpu(), _is_signed=None
        )

    rows = (jnp.int32(x) for x in (score_row, range_row, scale_row, key))
    return load(*rows, d_scores, first, count, *scale)


def _elements_of_thread(queries: int, keys: int) -> list:
    """(query, key) of the elements of a tile that are this thread's."""
    thread = arith.andi(ptx.thread_id(), ptx.i32(ptx.WARPGROUP - 1))
    elements = []
    for i in range(0, queries * keys, ptx.WARPGROUP):
        element = arith.addi(thread, ptx.i32(i))
        query = arith.divui(element, ptx.i32(keys))
        elements.append((query, arith.subi(element, arith.muli(query, ptx.i32(keys)))))
    return elements


def store_g(g, g_smem, interpret):
    """Stores what `load_g` gave to [queries, keys] in shared memory."""
    if interpret:
        g_smem[...] = g.reshape(g_smem.shape)
        return
    queries, keys = g_smem.shape
    each = queries * keys // ptx.WARPGROUP

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WG_STRIDED((queries * keys,), vec_size=each), plgpu.RefType()))
    def store(ctx, g, g_smem):
        thread = arith.andi(ptx.thread_id(), ptx.i32(ptx.WARPGROUP - 1))
        address = arith.addi(ptx.smem_address(g_smem), arith.shli(thread, ptx.i32(2)))
        for i in range(each):
            value = llvm.extractelement(g.registers.item(), ptx.i32(i))
            ptx.ptx(f"st.shared.f32 [$0+{4 * ptx.WARPGROUP * i}], $1;", address, value)

    store(g, g_smem)


# g as it meets the products, in wgmma's layout: of every 8 columns a thread has 2, of its warp's 16 rows r and r + 8.


def _wgmma_array(vector_of, shape):
    """The array whose registers are `vector_of(eight columns, half)`."""
    layout = plgpu.Layout.WGMMA.to_mgpu()
    registers = np.empty((shape[1] // 8, 2), dtype=object)
    for at in np.ndindex(*registers.shape):
        registers[at] = vector_of(*at)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def _warp_and_lane():
    """The number of this thread's warp in its warpgroup, and of this thread in its warp."""
    thread = arith.andi(ptx.thread_id(), ptx.i32(ptx.WARPGROUP - 1))
    return arith.shrui(thread, ptx.i32(5)), arith.andi(thread, ptx.i32(31))


def over_heads(g_smem, heads: int, interpret):
    """[ROWS, TILE] of g, [queries, TILE] in shared memory: each query's row for each of its heads."""
    if interpret:
        return jnp.repeat(g_smem[...], heads, axis=0)
    shape = (ROWS, TILE)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=ptx.Result(shape, jnp.float32, plgpu.Layout.WGMMA))
    def load(ctx, g_smem):
        f32 = ir.F32Type.get()
        warp, lane = _warp_and_lane()
        query = arith.shrui(warp, ptx.i32((heads // 16).bit_length() - 1))  # a warp's 16 rows are of one query
        address = arith.addi(ptx.smem_address(g_smem), arith.muli(query, ptx.i32(4 * TILE)))
        address = arith.addi(address, arith.shli(arith.andi(lane, ptx.i32(3)), ptx.i32(3)))
        vectors = []
        for column in range(TILE // 8):
            code = f"ld.shared.v2.f32 {{$0, $1}}, [$2+{32 * column}];"
            vectors.append(_pair(ptx.ptx(code, address, result_types=(f32, f32), has_side_effects=True)))
        return _wgmma_array(lambda column, half: vectors[column], shape)

    return load(g_smem)


def over_columns(g_smem, heads: int, keys: int, interpret):
    """[ROWS, TILE] of g transposed, [queries, ROWS of `keys`] in shared memory: a query's column for all its heads."""
    if interpret:
        return jnp.repeat(g_smem[...].T, heads, axis=1)
    shape = (ROWS, TILE)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=ptx.Result(shape, jnp.float32, plgpu.Layout.WGMMA))
    def load(ctx, g_smem):
        warp, lane = _warp_and_lane()
        row = arith.addi(arith.shli(warp, ptx.i32(4)), arith.shrui(lane, ptx.i32(2)))
        address = arith.addi(ptx.smem_address(g_smem), arith.shli(row, ptx.i32(2)))
        values = {}
        for query, half in np.ndindex(TILE // heads, 2):
            code = f"ld.shared.f32 $0, [$1+{4 * keys * query + 32 * half}];"
            value = ptx.ptx(code, address, result_types=ir.F32Type.get(), has_side_effects=True)
            values[query, half] = _pair((value, value))
        return _wgmma_array(lambda column, half: values[8 * column // heads, half], shape)

    return load(g_smem)


def _pair(values):
    vector = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, ptx.i32(i))
    return vector


def store_sums(x, out_gmem, row, interpret):
    """Stores an accumulator, [ROWS, E], from `row` of `out_gmem` on."""
    if interpret:
        out_gmem[pl.ds(row, ROWS)] = x
        return
    dim = out_gmem.shape[1]

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), ptx.SPLAT))
    def store(ctx, x, out, row):
        warp, lane = _warp_and_lane()
        row = arith.addi(ptx.scalar(row), arith.addi(arith.shli(warp, ptx.i32(4)), arith.shrui(lane, ptx.i32(2))))
        address = arith.muli(arith.extui(ptx.i64_type(), row), ptx.i64(4 * dim))
        column = arith.shli(arith.extui(ptx.i64_type(), arith.andi(lane, ptx.i32(3))), ptx.i64(3))
        address = arith.addi(ptx.gmem_address(out), arith.addi(address, column))
        for (column, half), vector in np.ndenumerate(x.registers.reshape(dim // 8, 2)):
            values = [llvm.extractelement(vector, ptx.i32(i)) for i in range(2)]
            ptx.ptx(f"st.global.v2.f32 [$0+{32 * column + 32 * dim * half}], {{$1, $2}};", address, *values)

    store(x, out_gmem, row)
