"""Runs the pipeline that both kernels of `index_scores_backward` are made of.

In both, 128 rows stay with a thread block for an item, 64 with each compute warpgroup as A operand in registers, and
tiles of 128 rows of the other side stream by through a ring of stages. The producer warpgroup copies the tiles (`feed`)
and computes their g, the scaled gradients of scores; the compute warpgroups multiply twice for every tile (`stream`).
"""

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
from dsa_jax.pallas_kernels.hopper.constants import WARPGROUP_THREADS, WGMMA_ROWS

WARPGROUP_ROWS = WGMMA_ROWS  # of the A operand of a compute warpgroup
COMPUTE_WARPGROUPS = 2
TILE_ROWS = 128  # keys, or (query, head) pairs, that stream by together
# (query, head) pairs, or keys, that stay for an item. Both kernels have the same groups of queries.
BLOCK_ROWS = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
STAGES = 4  # tiles in shared memory
COMPUTE_REGISTERS = 232  # of a thread: 64 hold the products, 64 (E 128) the sums, 32 the A operand
PRODUCER_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


def smem_bytes(heads: int, dim: int) -> int:
    """Counts the bytes of shared memory of the larger kernel, that of d_q: 198 KiB for J 64 and E 128, and barriers."""
    arrays = [
        2 * BLOCK_ROWS * dim * 2,  # q, and d_q on its way out
        BLOCK_ROWS * 4,  # w
        BLOCK_ROWS * 4,  # d_weights
        STAGES * TILE_ROWS * dim * 2,
        STAGES * BLOCK_ROWS * TILE_ROWS // heads * 4,  # g
    ]
    return sum(map(ptx.allocated, arrays))


class Shape(NamedTuple):
    """Holds all that a kernel is made for, so that it is made once for each."""

    batch: int  # B
    length: int  # T
    size: int  # S
    heads: int  # J
    dim: int  # E
    scaled: bool  # whether keys have a scale
    blocks: int  # thread blocks that share the work


def in_roles(produce, compute, held_empty, empty, interpret):
    """Parts the warpgroups into roles: the last one produces, the others compute. All that it fills is empty at first.

    Args:
      produce: a function that brings all items' operands.
      compute: a function that works on all items.
      held_empty: the barrier of the rows that stay for an item: each compute warpgroup arrives when they may be
        replaced, and the producer waits.
      empty: the barriers of the stages, likewise.
      interpret: whether the interpreter runs this.
    """
    warpgroup = lax.axis_index("warpgroup")
    all_empty = [held_empty, *(empty.at[stage] for stage in range(STAGES))]

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        if not interpret:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()
        if interpret:  # which insists that every phase of a barrier is waited for
            for barrier in all_empty:
                plgpu.barrier_wait(barrier)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        if not interpret:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for barrier in all_empty:
            plgpu.barrier_arrive(barrier)
        compute()


def feed(low, high, load, copy, g_smem, full, empty, interpret, *, before=0):
    """Brings tiles low, low + 1, …, high - 1, for `stream`: tile i to stage `before` + i modulo the stages.

    Args:
      low: the first tile.
      high: the end of the tiles.
      load: `load(tile)` loads its g into registers; it is called for one past the last as well.
      copy: `copy(tile, stage)` starts the copies of a tile.
      g_smem: [STAGES, queries, keys] float32.
      full: barriers of the stages; the copies arrive, and this warpgroup when g is there; compute waits.
      empty: barriers of the stages; each compute warpgroup arrives when it is done; this one waits.
      interpret: whether the interpreter runs this.
      before: how many tiles were brought before tile 0.
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
    """Multiplies a · b, or a · bᵀ, to float32; `a` is in registers."""
    if interpret:  # which multiplies nothing in registers
        b = b_smem[...].astype(jnp.float32)
        return jnp.dot(a.astype(jnp.float32), b.T if transposed else b)
    b_smem = b_smem.transpose((1, 0)) if transposed else b_smem

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b_smem)
        return accumulator[...]

    return pl.run_scoped(multiply, ptx.ACC((a.shape[0], b_smem.shape[1]), jnp.float32))


def stream(a, b_smem, low, high, full, empty, prepare, state, interpret):
    """Sums x_i · b_i over tiles i = low, low + 1, …, high - 1, where x_i is made of the products a · b_iᵀ.

    Args:
      a: the rows that stay, [64, E] bfloat16 in registers.
      b_smem: [STAGES, 128, E] bfloat16; tile i is at i modulo the stages.
      low: the first tile.
      high: the end of the tiles.
      full: barriers of the stages; this warpgroup waits.
      empty: barriers of the stages; this warpgroup arrives when it is done with a tile.
      prepare: `prepare(stage)` loads what goes with a tile, and returns a function of its products and of the state
        that gives x_i, bfloat16, and the new state.
      state: the first state.
      interpret: whether the interpreter runs this.

    Returns:
      the sum, [64, E] float32, and the last state.
    """

    def add_tile(position, carry):
        total, state = carry
        stage = lax.rem(position, STAGES)
        plgpu.barrier_wait(full.at[stage])
        b, combine = b_smem.at[stage + ptx.opaque_zero(interpret)], prepare(stage)
        x, state = combine(product(a, b, interpret, transposed=True), state)
        if interpret:
            total = total + product(x, b, interpret)
        else:  # x is the A operand from registers: it never sees shared memory
            total = pl.run_state(lambda ref: plgpu.wgmma(ref, x, b))(ptx.ACC.init(total))
        plgpu.barrier_arrive(empty.at[lax.rem(position, STAGES)])
        return total, state

    zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, b_smem.shape[2]), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(low, high, add_tile, (zeros, state))


# g, that is k_scale · d_scores in reach and 0 elsewhere: threads of the producer bring it to shared memory, [queries,
# keys] of a tile, thread i the elements i, i + 128, …. They load it a tile ahead, and hold it in registers meanwhile.


def load_g(d_scores, first, count, scale, score_row, range_row, scale_row, key, queries, keys, interpret):
    """Loads k_scale · d_scores of `queries` × `keys`, 0 where a query does not reach: what is there is not read.

    Args:
      d_scores: float32 [B · T, S].
      first: int32, the first key of each query, padded to whole groups.
      count: int32, the number of its keys.
      scale: one float32 array [B · S], or none.
      score_row: the first query's row of `d_scores`.
      range_row: its place in `first` and `count`.
      scale_row: the place in `scale` of its batch row's first key.
      key: the first key.
      queries: how many.
      keys: how many.
      interpret: whether the interpreter runs this.
    """
    if interpret:
        position = key + lax.broadcasted_iota(jnp.int32, (queries, keys), 1)
        low, number = (ref[pl.ds(range_row, queries)][:, None] for ref in (first, count))
        g = d_scores[pl.ds(score_row, queries), pl.ds(key, keys)]
        for ref in scale:
            g = g * ref[pl.ds(scale_row + key, keys)][None]
        return jnp.where((position >= low) & (position < low + number), g, 0.0).reshape(-1)
    size, each = d_scores.shape[1], queries * keys // WARPGROUP_THREADS  # elements of a thread
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
    """Emits the (query, key) of the elements of a tile that are this thread's."""
    thread = ptx.thread_of_warpgroup()
    elements = []
    for i in range(0, queries * keys, WARPGROUP_THREADS):
        element = arith.addi(thread, ptx.i32(i))
        query = arith.divui(element, ptx.i32(keys))
        elements.append((query, arith.subi(element, arith.muli(query, ptx.i32(keys)))))
    return elements


def store_g(g, g_smem, interpret):
    """Stores g, as `load_g` gave it, to [queries, keys] in shared memory."""
    if interpret:
        g_smem[...] = g.reshape(g_smem.shape)
        return
    queries, keys = g_smem.shape
    each = queries * keys // WARPGROUP_THREADS

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WG_STRIDED((queries * keys,), vec_size=each), plgpu.RefType()))
    def store(ctx, g, g_smem):
        thread = ptx.thread_of_warpgroup()
        address = arith.addi(ptx.smem_address(g_smem), arith.shli(thread, ptx.i32(2)))
        for i in range(each):
            value = llvm.extractelement(g.registers.item(), ptx.i32(i))
            ptx.ptx(f"st.shared.f32 [$0+{4 * WARPGROUP_THREADS * i}], $1;", address, value)

    store(g, g_smem)


# g as it meets the products, in wgmma's layout: of every 8 columns a thread has 2, of its warp's 16 rows r and r + 8.


def _wgmma_array(vector_of, shape):
    """Makes the array whose registers are `vector_of(number of eight columns, upper or lower row)`."""
    layout = plgpu.Layout.WGMMA.to_mgpu()
    registers = np.empty((shape[1] // 8, 2), dtype=object)
    for at in np.ndindex(*registers.shape):
        registers[at] = vector_of(*at)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def _warp_and_lane():
    """Emits the number of this thread's warp in its warpgroup, and of this thread in its warp."""
    thread = ptx.thread_of_warpgroup()
    return arith.shrui(thread, ptx.i32(5)), arith.andi(thread, ptx.i32(31))


def over_heads(g_smem, heads: int, interpret):
    """Loads g [queries, 128 keys] as [64 rows, 128 keys], in wgmma's layout: each query's row for each of its heads."""
    if interpret:
        return jnp.repeat(g_smem[...], heads, axis=0)
    shape = (WARPGROUP_ROWS, TILE_ROWS)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=ptx.Result(shape, jnp.float32, plgpu.Layout.WGMMA))
    def load(ctx, g_smem):
        f32 = ir.F32Type.get()
        warp, lane = _warp_and_lane()
        query = arith.shrui(warp, ptx.i32((heads // 16).bit_length() - 1))  # a warp's 16 rows are of one query
        address = arith.addi(ptx.smem_address(g_smem), arith.muli(query, ptx.i32(4 * TILE_ROWS)))
        address = arith.addi(address, arith.shli(arith.andi(lane, ptx.i32(3)), ptx.i32(3)))  # two columns of 4 bytes
        vectors = []
        for column in range(TILE_ROWS // 8):
            code = f"ld.shared.v2.f32 {{$0, $1}}, [$2+{32 * column}];"
            vectors.append(_pair(ptx.ptx(code, address, result_types=(f32, f32), has_side_effects=True)))
        return _wgmma_array(lambda column, half: vectors[column], shape)

    return load(g_smem)


def over_columns(g_smem, heads: int, keys: int, interpret):
    """Loads g transposed, [64 keys, 128 rows], in wgmma's layout: a query's column for all its heads.

    In shared memory it is [queries, 64 of `keys` columns].
    """
    if interpret:
        return jnp.repeat(g_smem[...].T, heads, axis=1)
    shape = (WARPGROUP_ROWS, TILE_ROWS)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=ptx.Result(shape, jnp.float32, plgpu.Layout.WGMMA))
    def load(ctx, g_smem):
        warp, lane = _warp_and_lane()
        row = arith.addi(arith.shli(warp, ptx.i32(4)), arith.shrui(lane, ptx.i32(2)))
        address = arith.addi(ptx.smem_address(g_smem), arith.shli(row, ptx.i32(2)))
        values = {}
        for query, half in np.ndindex(TILE_ROWS // heads, 2):
            code = f"ld.shared.f32 $0, [$1+{4 * keys * query + 32 * half}];"
            value = ptx.ptx(code, address, result_types=ir.F32Type.get(), has_side_effects=True)
            values[query, half] = _pair((value, value))
        return _wgmma_array(lambda column, half: values[8 * column // heads, half], shape)

    return load(g_smem)


def _pair(values):
    """Packs two float32 into a register of an accumulator."""
    vector = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, ptx.i32(i))
    return vector


def store_sums(x, out_gmem, row, interpret):
    """Stores an accumulator [64, E] from `row` of `out_gmem` on, straight from registers, 8 bytes at a time."""
    if interpret:
        out_gmem[pl.ds(row, WARPGROUP_ROWS)] = x
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
