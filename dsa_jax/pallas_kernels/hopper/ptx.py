"""What kernels on Hopper share: what a multiprocessor has, how a persistent kernel is launched, and words of PTX.

Pallas lacks the latter: gathering rows, barriers that gathers complete, votes, opaque zeros.

Each device function has a twin for the interpreter, chosen by `interpret`; everything else in the kernels is Pallas.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

SMEM_BYTES = 227 * 1024  # shared memory of one block on sm_90, a byte of the compiler's own included
SMEM_GRANULE = 1024  # arrays are allocated in pieces of it, but for barriers
MULTIPROCESSORS = 132  # of an H100 or H200
REGISTERS = 65536  # of a multiprocessor
WARPGROUP = 128  # threads
SWIZZLE = 128  # bytes: one swizzled row of a tile, the K granule of wgmma
SPLAT = plgpu.Layout.WG_SPLAT
ptx = mgpu.utils.inline_ptx
inline_mgpu: Any = plgpu.inline_mgpu  # whose stated types count the context among the arguments
Result: Any = plgpu.ShapeDtypeStruct
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
Tiling: Any = plgpu.TilingTransform
Swizzle: Any = plgpu.SwizzleTransform


def swizzled(dtype, columns: int | None = None) -> tuple:
    """The transforms of an array that wgmma reads: tiles of 8 swizzled rows of 128 bytes, or of `columns` if less."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = SWIZZLE if columns is None else min(SWIZZLE, columns * itemsize)
    return Tiling((8, swizzle // itemsize)), Swizzle(swizzle)


def allocated(size: int) -> int:
    """The bytes of shared memory that an array of `size` bytes takes."""
    return -(-size // SMEM_GRANULE) * SMEM_GRANULE


def multiprocessors() -> int:
    """Of the GPU at hand, or of a Hopper GPU where there is none."""
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    return gpus[0].core_count if gpus else MULTIPROCESSORS


def launch_registers(warpgroups: int) -> int:
    """Of each thread at the launch, in eights, where a multiprocessor has one block of so many warpgroups."""
    return min(255, REGISTERS // (warpgroups * WARPGROUP)) // 8 * 8


LAUNCH_REGISTERS = launch_registers(3)  # 168


def registers_left(compute: int) -> int:
    """Of each thread of the third warpgroup of a block, where those of the other two have `compute`.

    Warpgroups can only pass on what they had at the launch: asking for more waits for ever.
    """
    return 3 * LAUNCH_REGISTERS - 2 * compute


def persistent_kernel(
    body, out_type, scratch_types, *, blocks: int, interpret: bool, warpgroups: int = 3, approx_math: bool = False
):
    """The kernel of so many blocks of threads; `body` knows its place from the axes "block" and "warpgroup".

    It says itself where threads wait for each other, and Pallas keeps no shared memory for reductions.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
    )


# MLIR shorthands, for use inside `plgpu.inline_mgpu`.


def i32_type():
    """int32."""
    return ir.IntegerType.get_signless(32)


def i64_type():
    """int64."""
    return ir.IntegerType.get_signless(64)


def i32(value):
    """An int32 constant."""
    return arith.constant(i32_type(), value)


def i64(value):
    """An int64 constant."""
    return arith.constant(i64_type(), value)


def smem_address(ref):
    """Of shared memory, 32 bits."""
    return llvm.ptrtoint(i32_type(), mgpu.utils.memref_ptr(ref))


def gmem_address(ref):
    """Of global memory, 64 bits."""
    return llvm.ptrtoint(i64_type(), mgpu.utils.memref_ptr(ref))


def thread_id():
    """Of this thread in the block."""
    return arith.index_cast(i32_type(), gpu.thread_id(gpu.Dimension.x))


def scalar(array):
    """The one register of a splat."""
    return array.registers.item()


def private_values(values, layout):
    """The int32 `values` of each thread, as the one register that an array of this layout has."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(values),), i32_type()))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, i32(i))
    registers = np.array([vector], dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)


def elements(array):
    """The elements of a thread, of an array that has vectors for registers."""
    return [
        llvm.extractelement(vector, i32(i))
        for vector in array.registers.flat
        for i in range(ir.VectorType(vector.type).shape[0])
    ]


def opaque_zero(interpret: bool = False):
    """An int32 zero that the compiler can neither fold nor hoist.

    A wgmma operand at a constant place has its descriptors computed ahead of the loop and spilled, all 36 of them;
    measured, that costs a quarter of the speed. Index the buffer with this, inside the loop.
    """
    if interpret:
        return jnp.int32(0)

    @inline_mgpu(return_type=Result((), jnp.int32, SPLAT(())))
    def zero(ctx):
        value = ptx("mov.b32 $0, 0;", result_types=i32_type(), has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return zero()


# Barriers that gathers complete. They are raw mbarriers, since `inline_mgpu` takes no `plgpu.Barrier`; each counts one
# arrival a thread of the gathering warpgroup. In the interpreter they are Pallas barriers of one arrival.


def gather_barriers(count: int, interpret: bool = False):
    """The scratch type of `count` barriers."""
    if interpret:
        return plgpu.Barrier(num_barriers=count)
    return plgpu.SMEM((2 * count,), jnp.int32)


def init_gather_barriers(barriers, count: int, interpret: bool = False) -> None:
    """Initialises the barriers. All threads of the block call it, before they part into roles."""
    if interpret:
        return

    @inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, barriers):
        address = smem_address(barriers)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread_id(), i32(0))):
            for i in range(count):
                ptx("mbarrier.init.shared::cta.b64 [$0], $1;", arith.addi(address, i32(8 * i)), i32(WARPGROUP))
            ptx("fence.mbarrier_init.release.cluster;")
        ptx("bar.sync 0;", convergent=True)

    init(barriers)


def wait_gather(barriers, i, parity, interpret: bool = False) -> None:
    """Waits until the gathers of phase `parity` (0 first) of barrier `i` have landed and wgmma may read them."""
    if interpret:
        plgpu.barrier_wait(barriers.at[i])
        return

    @inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def wait(ctx, barriers, i, parity):
        address = arith.addi(smem_address(barriers), arith.shli(scalar(i), i32(3)))
        ptx(
            "{\n.reg .pred p;\nWAIT_${:uid}:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;\n"
            "@!p bra WAIT_${:uid};\n}",
            address,
            scalar(parity),
            convergent=True,
        )
        ptx("fence.proxy.async.shared::cta;")

    wait(barriers, jnp.int32(i), jnp.int32(parity))


# The gather. 16 groups of 8 threads; group g copies rows g, g + 16, …, thread c of a group the 16-byte chunk c of each
# 128-byte tile of the row. An absent row is copied with size 0: zeros are written and nothing is read.


def load_row_ids(indices_gmem, interpret: bool = False):
    """The row numbers that this thread will gather: 4 of the 64 int32 at `indices_gmem`."""
    if interpret:
        return indices_gmem[...]
    layout = plgpu.Layout.WG_STRIDED((512,), vec_size=4)

    @inline_mgpu(arg_types=(plgpu.RefType(),), return_type=Result((512,), jnp.int32, layout))
    def load(ctx, indices):
        group = arith.shrui(arith.andi(thread_id(), i32(WARPGROUP - 1)), i32(3))
        address = arith.addi(gmem_address(indices), arith.extui(i64_type(), arith.shli(group, i32(2))))
        rows = [
            ptx(f"ld.global.nc.b32 $0, [$1+{64 * i}];", address, result_types=i32_type(), has_side_effects=True)
            for i in range(4)
        ]
        return private_values(rows, layout)

    return load(indices_gmem)


def consecutive_row_ids(first, interpret: bool = False):
    """The row numbers that this thread will gather of the 64 rows from `first`, as `load_row_ids` has them."""
    if interpret:
        return first + jnp.arange(64, dtype=jnp.int32)
    layout = plgpu.Layout.WG_STRIDED((512,), vec_size=4)

    @inline_mgpu(arg_types=(SPLAT,), return_type=Result((512,), jnp.int32, layout))
    def number(ctx, first):
        group = arith.shrui(arith.andi(thread_id(), i32(WARPGROUP - 1)), i32(3))
        row = arith.addi(scalar(first), group)
        return private_values([arith.addi(row, i32(16 * i)) for i in range(4)], layout)

    return number(first)


def gather_64_rows(x_gmem, ids, rows_smem, barriers, i, tiles, interpret: bool = False, first: int = 0) -> None:
    """Gathers column tiles of 64 rows of `x_gmem` [S, H], bfloat16, into swizzled `rows_smem` [64, …].

    `ids` are from `load_row_ids`; rows outside [0, S) become zeros. `tiles` are the 64-column tiles to copy; `first` is
    the one that `rows_smem` begins with. Barrier `i` completes a phase when they have landed. One warpgroup calls this
    together.
    """
    size, dim = x_gmem.shape
    if interpret:
        _interpreted_gather(x_gmem, ids, rows_smem, barriers.at[i], tiles, first)
        return
    group_bytes = rows_smem.shape[1] // 64 * 1024  # 8 rows
    layout = plgpu.Layout.WG_STRIDED((512,), vec_size=4)

    @inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.RefType(swizzled(jnp.bfloat16)), plgpu.RefType(), SPLAT))
    def gather(ctx, x, ids, rows, barriers, i):
        thread = arith.andi(thread_id(), i32(WARPGROUP - 1))
        group, chunk = arith.shrui(thread, i32(3)), arith.andi(thread, i32(7))
        row_of_8 = arith.andi(group, i32(7))
        to = arith.addi(smem_address(rows), arith.muli(arith.shrui(group, i32(3)), i32(group_bytes)))
        to = arith.addi(to, arith.shli(row_of_8, i32(7)))
        to = arith.addi(to, arith.shli(arith.xori(chunk, row_of_8), i32(4)))
        start = arith.addi(gmem_address(x), arith.extui(i64_type(), arith.shli(chunk, i32(4))))
        # L2::128B: from 131072 rows of 576, 151 MB, this gathers 5.5 TB/s, and with 256B 5.0.
        copies = "\n".join(
            f"cp.async.cg.shared.global.L2::128B [$0+{1024 * (tile - first)}], [$1+{128 * tile}], 16, $2;"
            for tile in tiles
        )
        for j in range(4):
            row = llvm.extractelement(ids.registers.flat[0], i32(j))
            present = arith.cmpi(arith.CmpIPredicate.ult, row, i32(size))  # unsigned: negative numbers are absent too
            row = arith.extui(i64_type(), arith.select(present, row, i32(0)))
            source = arith.addi(start, arith.muli(row, i64(2 * dim)))
            length = arith.select(present, i32(16), i32(0))
            ptx(copies, arith.addi(to, i32(2 * j * group_bytes)), source, length)
        barrier = arith.addi(smem_address(barriers), arith.shli(scalar(i), i32(3)))
        ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", barrier)

    gather(x_gmem, ids, rows_smem, barriers, jnp.int32(i))


def _interpreted_gather(x_gmem, ids, rows_smem, barrier, tiles, first):
    present = (ids >= 0) & (ids < x_gmem.shape[0])
    rows = jnp.take(x_gmem[:, pl.ds(64 * tiles[0], 64 * len(tiles))], jnp.where(present, ids, 0), axis=0)
    rows_smem[:, pl.ds(64 * (tiles[0] - first), 64 * len(tiles))] = jnp.where(present[:, None], rows, 0)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


# Absent keys and votes. A warp asks first whether there is anything to do: mostly there is not.

PAIR_A_THREAD = plgpu.Layout.WG_STRIDED((2 * WARPGROUP,), vec_size=2)


def load_key_ids(indices_gmem, interpret: bool = False):
    """Two of the 64 int32 at `indices_gmem` a thread, all of them a warp, for `drop_absent_keys`."""
    if interpret:
        return indices_gmem[...]

    @inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=Result((2 * WARPGROUP,), jnp.int32, PAIR_A_THREAD),
    )
    def load(ctx, indices):
        address = arith.addi(gmem_address(indices), arith.extui(i64_type(), arith.shli(_lane_id(), i32(3))))
        pair = ptx(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", address, result_types=(i32_type(),) * 2, has_side_effects=True
        )
        return private_values(pair, PAIR_A_THREAD)

    return load(indices_gmem)


def drop_absent_keys(logits, ids, size: int, interpret: bool = False):
    """`logits` [64, 64] in wgmma's layout with -inf in the columns whose key of `ids` is outside [0, size)."""
    if interpret:
        present = (ids >= 0) & (ids < size)
        return jnp.where(lax.broadcast_in_dim(present, logits.shape, [1]), logits, -jnp.inf)

    @inline_mgpu(arg_types=(PAIR_A_THREAD,), return_type=Result((), jnp.int32, SPLAT(())))
    def some_absent(ctx, ids):
        absent = ptx(
            "{\n.reg .pred p;\n"
            f"setp.ge.u32 p, $1, {size};\nsetp.ge.or.u32 p, $2, {size}, p;\n"
            "vote.sync.any.pred p, p, 0xffffffff;\nselp.b32 $0, 1, 0, p;\n}",
            *elements(ids),
            result_types=i32_type(),
            has_side_effects=True,
            convergent=True,
        )
        return mgpu.FragmentedArray.splat(absent, (), is_signed=True)

    @inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, PAIR_A_THREAD),
        return_type=Result(logits.shape, logits.dtype, plgpu.Layout.WGMMA),
    )
    def drop(ctx, logits, ids):
        # Bit l of the first word is for key 2l, of the second for key 2l + 1; lane l has, of every eight columns i, the
        # columns 2 (l mod 4) and the next: bits 4i + l mod 4.
        code = f"setp.lt.u32 p, $1, {size};\nvote.sync.ballot.b32 $0, p, 0xffffffff;"
        words = [
            ptx(f"{{\n.reg .pred p;\n{code}\n}}", x, result_types=i32_type(), has_side_effects=True, convergent=True)
            for x in elements(ids)
        ]
        words = [arith.shrui(word, arith.andi(_lane_id(), i32(3))) for word in words]
        minus_infinity = mgpu.utils.c(float("-inf"), ir.F32Type.get())
        registers = np.empty_like(logits.registers)
        for at, vector in np.ndenumerate(logits.registers):
            bit = i32(1 << (4 * at[1]))
            for i, word in enumerate(words):
                present = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(word, bit), i32(0))
                value = arith.select(present, llvm.extractelement(vector, i32(i)), minus_infinity)
                vector = llvm.insertelement(vector, value, i32(i))
            registers[at] = vector
        return mgpu.FragmentedArray(_registers=registers, _layout=logits.layout, _is_signed=None)

    return lax.cond(some_absent(ids) != 0, lambda logits: drop(logits, ids), lambda logits: logits, logits)


def some_not_one(factors, interpret: bool = False):
    """Whether a factor of the rows of this warp, [64] as reducing an accumulator leaves them, is not 1.

    The answer differs from warp to warp: branch on it around arithmetic alone, never around a barrier or wgmma.
    """
    if interpret:
        return jnp.any(factors != 1)

    @inline_mgpu(arg_types=(plgpu.Layout.WGMMA.reduce(1),), return_type=Result((), jnp.int32, SPLAT(())))
    def vote(ctx, factors):
        some = ptx(
            "{\n.reg .pred p;\nsetp.neu.f32 p, $1, 0f3F800000;\nsetp.neu.or.f32 p, $2, 0f3F800000, p;\n"
            "vote.sync.any.pred p, p, 0xffffffff;\nselp.b32 $0, 1, 0, p;\n}",
            *elements(factors),
            result_types=i32_type(),
            has_side_effects=True,
            convergent=True,
        )
        return mgpu.FragmentedArray.splat(some, (), is_signed=True)

    return vote(factors) != 0


def _lane_id():
    return arith.andi(thread_id(), i32(31))
