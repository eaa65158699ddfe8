"""Launches persistent kernels on Hopper, and supplies the PTX that Pallas lacks.

That is: rows gathered by index, barriers that gathers complete, votes of a warp, zeros that the compiler cannot fold.
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

from dsa_jax.pallas_kernels.hopper.constants import (
    MULTIPROCESSORS,
    PAIR_PER_THREAD,
    REGISTERS_PER_MULTIPROCESSOR,
    ROW_LAYOUT,
    SMEM_GRANULE_BYTES,
    SWIZZLE_BYTES,
    SWIZZLED_COLUMNS,
    WARP_THREADS,
    WARPGROUP_THREADS,
)

SPLAT = plgpu.Layout.WG_SPLAT
ptx = mgpu.utils.inline_ptx
# Typed as Any, since the stated types of these count the context among the arguments, or are not exported.
inline_mgpu: Any = plgpu.inline_mgpu
Result: Any = plgpu.ShapeDtypeStruct
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
Tiling: Any = plgpu.TilingTransform
Swizzle: Any = plgpu.SwizzleTransform


def swizzled(dtype, columns: int | None = None) -> tuple:
    """Gives the transforms of a shared array that wgmma reads: tiles of 8 swizzled rows.

    Args:
      dtype: of the array.
      columns: of the array, where a row may have fewer than 128 bytes; None for rows of at least 128.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = SWIZZLE_BYTES if columns is None else min(SWIZZLE_BYTES, columns * itemsize)
    return Tiling((8, swizzle // itemsize)), Swizzle(swizzle)


def allocated(size: int) -> int:
    """Counts the bytes of shared memory that an array of `size` bytes takes."""
    return -(-size // SMEM_GRANULE_BYTES) * SMEM_GRANULE_BYTES


def multiprocessors() -> int:
    """Counts the multiprocessors of the GPU at hand, or of an H100 or H200 where there is none."""
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    return gpus[0].core_count if gpus else MULTIPROCESSORS


def launch_registers(warpgroups: int) -> int:
    """Counts the registers of a thread at the launch, where a multiprocessor has one block of `warpgroups`.

    They come in multiples of 8, and the hardware's limit is 255.
    """
    return min(255, REGISTERS_PER_MULTIPROCESSOR // (warpgroups * WARPGROUP_THREADS)) // 8 * 8


LAUNCH_REGISTERS = launch_registers(3)  # 168 a thread: most kernels have three warpgroups


def registers_left(compute: int) -> int:
    """Counts the registers a thread of the third warpgroup of a block, where the other two have `compute` a thread.

    Warpgroups can only pass on what they had at the launch (`set_max_registers`): asking for more waits for ever.
    """
    return 3 * LAUNCH_REGISTERS - 2 * compute  # a multiple of 8 where `compute` is one, as `set_max_registers` wants


def compiler_params(approx_math: bool = False):
    """Gives the compiler's options for kernels that say themselves where threads wait for each other.

    Lane semantics, as the default (Warpgroup) cannot lower constant indices into shared memory; no barriers of Pallas'
    own around each access, and no shared memory kept for reductions, which would take a granule.

    Args:
      approx_math: whether exponentials, logarithms and divisions may be the hardware's approximations.
    """
    return plgpu.CompilerParams(
        approx_math=approx_math,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
    )


def kernel(body, *, interpret: bool = False, **options):
    """Makes a kernel as `plgpu.kernel` does, whose bytes are those of its function alone.

    Args:
      body: a function of the references. Traces call the kernel by its name or, where that says little, by its package
        and module.
      interpret: run in Pallas' interpreter, on a CPU.
      options: as `plgpu.kernel` takes them.
    """
    function = getattr(body, "func", body)  # of a partial function
    package, module = function.__module__.split(".")[-2:]
    name = function.__name__ if function.__name__.endswith("_kernel") else f"{package}_{module}"

    def named(*refs, **scratch):
        _name_dumps(name)
        body(*refs, **scratch)

    return plgpu.kernel(
        body if interpret else named,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name=name,
        **options,
    )


def _name_dumps(name: str) -> None:
    """Names a kernel where it would be dumped; jaxlib 0.11 else counts the kernels of the process in that name."""

    @inline_mgpu()
    def mark(ctx):
        op: Any = ir.InsertionPoint.current.block.owner
        while op.name != "builtin.module":
            op = op.parent
        op.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)

    mark()


def persistent_kernel(
    body, out_type, scratch_types, *, blocks: int, interpret: bool, warpgroups: int = 3, approx_math: bool = False
):
    """Makes a kernel of a fixed number of thread blocks, mostly one a multiprocessor, that share the work in loops.

    Args:
      body: a function of the references; it knows its place from the axes "block" and "warpgroup".
      out_type: shapes and dtypes of the results.
      scratch_types: arrays in shared memory and barriers, in the order in which `body` takes them after the results.
      blocks: thread blocks of the grid.
      interpret: run in Pallas' interpreter, on a CPU.
      warpgroups: of a block.
      approx_math: see `compiler_params`.
    """
    return kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=compiler_params(approx_math),
    )


# MLIR shorthands, for use inside `plgpu.inline_mgpu`: what they return is one thread's view.


def i32_type():
    """Gives the type int32."""
    return ir.IntegerType.get_signless(32)


def i64_type():
    """Gives the type int64."""
    return ir.IntegerType.get_signless(64)


def i32(value):
    """Emits an int32 constant."""
    return arith.constant(i32_type(), value)


def i64(value):
    """Emits an int64 constant."""
    return arith.constant(i64_type(), value)


def smem_address(ref):
    """Emits the address of an array in shared memory, 32 bits."""
    return llvm.ptrtoint(i32_type(), mgpu.utils.memref_ptr(ref))


def gmem_address(ref):
    """Emits the address of an array in global memory, 64 bits."""
    return llvm.ptrtoint(i64_type(), mgpu.utils.memref_ptr(ref))


def thread_id():
    """Emits the number of this thread in its block."""
    return arith.index_cast(i32_type(), gpu.thread_id(gpu.Dimension.x))


def thread_of_warpgroup():
    """Emits the number of this thread in its warpgroup, 0 to 127."""
    return arith.andi(thread_id(), i32(WARPGROUP_THREADS - 1))


def lane_of_warp():
    """Emits the number of this thread in its warp, 0 to 31."""
    return arith.andi(thread_id(), i32(WARP_THREADS - 1))


def accumulator_row(thread):
    """Emits the upper row that a thread of a warpgroup holds of a 64-row accumulator; its other row is 8 below.

    A warp holds 16 rows, and four neighbouring lanes hold a row: of every eight columns, two each.
    """
    first_of_warp = arith.shli(arith.shrui(thread, i32(5)), i32(4))
    return arith.ori(first_of_warp, arith.andi(arith.shrui(thread, i32(2)), i32(7)))


def scalar(array):
    """Takes the one register of a splat."""
    return array.registers.item()


def private_values(values, layout):
    """Packs the int32 `values` of each thread into the one register that an array of this layout has."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(values),), i32_type()))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, i32(i))
    registers = np.array([vector], dtype=object)  # a strided layout has a thread's elements in one vector
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)


def elements(array):
    """Lists the elements that a thread holds of an array whose registers are vectors."""
    return [
        llvm.extractelement(vector, i32(i))
        for vector in array.registers.flat
        for i in range(ir.VectorType(vector.type).shape[0])
    ]


def opaque_zero(interpret: bool = False):
    """Gives an int32 zero that the compiler can neither fold nor hoist. Index a wgmma operand with it, inside the loop.

    An operand at a constant place has its descriptors computed ahead of the loop and spilled, all 36 of them: measured,
    441 to 494 TFLOP/s instead of 632.
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
# A waiting warpgroup names the parity of the phase, 0 for a barrier's first. It must not fall two phases behind, where
# the parity is the same again.


def gather_barriers(count: int, interpret: bool = False):
    """Gives the scratch type of `count` barriers."""
    if interpret:
        return plgpu.Barrier(num_barriers=count)
    return plgpu.SMEM((2 * count,), jnp.int32)  # an mbarrier has 8 bytes


def init_gather_barriers(barriers, count: int, interpret: bool = False) -> None:
    """Initialises the barriers. All threads of the block call it, before they part into roles."""
    if interpret:
        return  # Pallas does it

    @inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, barriers):
        address = smem_address(barriers)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread_id(), i32(0))):
            for i in range(count):
                ptx("mbarrier.init.shared::cta.b64 [$0], $1;", arith.addi(address, i32(8 * i)), i32(WARPGROUP_THREADS))
            ptx("fence.mbarrier_init.release.cluster;")  # before the asynchronous copies that will arrive
        ptx("bar.sync 0;", convergent=True)  # no thread waits at a barrier that is not there yet

    init(barriers)


def wait_gather(barriers, i, parity, interpret: bool = False) -> None:
    """Waits until the gathers of phase `parity` (0 first) of barrier `i` have landed and wgmma may read them."""
    if interpret:  # whose barriers count their phases themselves
        plgpu.barrier_wait(barriers.at[i])
        return

    @inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def wait(ctx, barriers, i, parity):
        address = arith.addi(smem_address(barriers), arith.shli(scalar(i), i32(3)))
        # try_wait sleeps for up to 10 ms before it asks again.
        ptx(
            "{\n.reg .pred p;\nWAIT_${:uid}:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;\n"
            "@!p bra WAIT_${:uid};\n}",
            address,
            scalar(parity),
            convergent=True,
        )
        # cp.async writes through the generic proxy and wgmma reads through the asynchronous one.
        ptx("fence.proxy.async.shared::cta;")

    wait(barriers, jnp.int32(i), jnp.int32(parity))


# The gather, by one warpgroup. 16 groups of 8 threads; group g copies rows g, g + 16, g + 32 and g + 48, thread c of a
# group the 16-byte chunk c of each 128-byte tile of the row: 8 threads read a whole line of 128 bytes. An absent row is
# copied with size 0: zeros are written, nothing is read.

_ROWS_PER_THREAD = plgpu.Layout.WG_STRIDED((4 * WARPGROUP_THREADS,), vec_size=4)


def load_row_ids(indices_gmem, interpret: bool = False):
    """Loads the row numbers that this thread will gather: 4 of the 64 int32 at `indices_gmem`."""
    if interpret:
        return indices_gmem[...]

    @inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=Result((4 * WARPGROUP_THREADS,), jnp.int32, _ROWS_PER_THREAD)
    )
    def load(ctx, indices):
        group = arith.shrui(thread_of_warpgroup(), i32(3))
        address = arith.addi(gmem_address(indices), arith.extui(i64_type(), arith.shli(group, i32(2))))
        # The rows of a thread are 16 apart, so its numbers 64 bytes.
        rows = [
            ptx(f"ld.global.nc.b32 $0, [$1+{64 * i}];", address, result_types=i32_type(), has_side_effects=True)
            for i in range(4)
        ]
        return private_values(rows, _ROWS_PER_THREAD)

    return load(indices_gmem)


def consecutive_row_ids(first, interpret: bool = False):
    """Computes the row numbers that this thread will gather of the 64 rows from `first`, as `load_row_ids` has them."""
    if interpret:
        return first + jnp.arange(64, dtype=jnp.int32)

    @inline_mgpu(arg_types=(SPLAT,), return_type=Result((4 * WARPGROUP_THREADS,), jnp.int32, _ROWS_PER_THREAD))
    def number(ctx, first):
        group = arith.shrui(thread_of_warpgroup(), i32(3))
        row = arith.addi(scalar(first), group)
        return private_values([arith.addi(row, i32(16 * i)) for i in range(4)], _ROWS_PER_THREAD)

    return number(first)


def gather_64_rows(x_gmem, ids, rows_smem, barriers, i, tiles, interpret: bool = False, first: int = 0) -> None:
    """Gathers column tiles of 64 rows into shared memory. One warpgroup calls this together, and waits for nothing.

    Args:
      x_gmem: [S, H] bfloat16.
      ids: from `load_row_ids`; rows outside [0, S) become zeros.
      rows_smem: [64, …] bfloat16, swizzled.
      barriers: from `gather_barriers`.
      i: which of them completes a phase when the rows have landed.
      tiles: numbers of the 64-column tiles to copy.
      interpret: whether the interpreter runs this.
      first: number of the tile that `rows_smem` begins with.
    """
    size, dim = x_gmem.shape
    if interpret:
        _interpreted_gather(x_gmem, ids, rows_smem, barriers.at[i], tiles, first)
        return
    group_bytes = rows_smem.shape[1] // SWIZZLED_COLUMNS * 8 * SWIZZLE_BYTES  # of 8 rows, tile after tile

    @inline_mgpu(
        arg_types=(plgpu.RefType(), _ROWS_PER_THREAD, plgpu.RefType(swizzled(jnp.bfloat16)), plgpu.RefType(), SPLAT)
    )
    def gather(ctx, x, ids, rows, barriers, i):
        thread = thread_of_warpgroup()
        group, chunk = arith.shrui(thread, i32(3)), arith.andi(thread, i32(7))
        row_of_8 = arith.andi(group, i32(7))  # the same for all four rows of a thread, which are 16 apart
        # Row r of tile t is at ((r // 8) · tiles + t) · 1024 + (r mod 8) · 128, its chunk c (c xor r mod 8) · 16 on.
        to = arith.addi(smem_address(rows), arith.muli(arith.shrui(group, i32(3)), i32(group_bytes)))
        to = arith.addi(to, arith.shli(row_of_8, i32(7)))
        to = arith.addi(to, arith.shli(arith.xori(chunk, row_of_8), i32(4)))
        start = arith.addi(gmem_address(x), arith.extui(i64_type(), arith.shli(chunk, i32(4))))
        # L2::128B: from 131072 rows of 576, 151 MB, this gathers 5.5 TB/s, and with 256B 5.0. `cg` leaves rows out of
        # the first-level cache, which lies in the memory that the kernels use as shared memory.
        copies = "\n".join(
            f"cp.async.cg.shared.global.L2::128B [$0+{1024 * (tile - first)}], [$1+{128 * tile}], 16, $2;"
            for tile in tiles
        )
        for j in range(4):  # rows 16 apart, 2 groups of 8 rows
            row = llvm.extractelement(ids.registers.flat[0], i32(j))
            present = arith.cmpi(arith.CmpIPredicate.ult, row, i32(size))  # unsigned: negative numbers are absent too
            row = arith.extui(i64_type(), arith.select(present, row, i32(0)))
            source = arith.addi(start, arith.muli(row, i64(2 * dim)))
            length = arith.select(present, i32(16), i32(0))
            ptx(copies, arith.addi(to, i32(2 * j * group_bytes)), source, length)
        barrier = arith.addi(smem_address(barriers), arith.shli(scalar(i), i32(3)))
        # Arrives when this thread's copies have landed. noinc: the barrier has expected all 128 from its beginning.
        ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", barrier)

    gather(x_gmem, ids, rows_smem, barriers, jnp.int32(i))


def _interpreted_gather(x_gmem, ids, rows_smem, barrier, tiles, first):
    """Gathers as `gather_64_rows` does, in the interpreter."""
    present = (ids >= 0) & (ids < x_gmem.shape[0])
    rows = jnp.take(
        x_gmem[:, pl.ds(SWIZZLED_COLUMNS * tiles[0], SWIZZLED_COLUMNS * len(tiles))], jnp.where(present, ids, 0), axis=0
    )
    rows_smem[:, pl.ds(SWIZZLED_COLUMNS * (tiles[0] - first), SWIZZLED_COLUMNS * len(tiles))] = jnp.where(
        present[:, None], rows, 0
    )
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


# Absent keys and votes. A warp asks first whether there is anything to do: mostly there is not, and a vote takes one
# instruction where masking 64 × 64 logits takes one for each of a thread's 32.


def load_key_ids(indices_gmem, interpret: bool = False):
    """Loads two of the 64 int32 at `indices_gmem` a thread, all 64 in every warp, for `drop_absent_keys`."""
    if interpret:
        return indices_gmem[...]

    @inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=Result((2 * WARPGROUP_THREADS,), jnp.int32, PAIR_PER_THREAD),
    )
    def load(ctx, indices):
        address = arith.addi(gmem_address(indices), arith.extui(i64_type(), arith.shli(lane_of_warp(), i32(3))))
        pair = ptx(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", address, result_types=(i32_type(),) * 2, has_side_effects=True
        )
        return private_values(pair, PAIR_PER_THREAD)

    return load(indices_gmem)


def drop_absent_keys(logits, ids, size: int, interpret: bool = False):
    """Puts -inf into the columns of `logits` [64, 64], in wgmma's layout, whose key of `ids` is outside [0, size)."""
    if interpret:
        present = (ids >= 0) & (ids < size)
        return jnp.where(lax.broadcast_in_dim(present, logits.shape, [1]), logits, -jnp.inf)

    @inline_mgpu(arg_types=(PAIR_PER_THREAD,), return_type=Result((), jnp.int32, SPLAT(())))
    def any_absent(ctx, ids):  # one answer for the warp; unsigned comparisons, so that negative numbers are absent too
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
        arg_types=(plgpu.Layout.WGMMA, PAIR_PER_THREAD),
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
        words = [arith.shrui(word, arith.andi(lane_of_warp(), i32(3))) for word in words]
        # A register has two neighbouring columns of one row, so one key of either word.
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

    return lax.cond(any_absent(ids) != 0, lambda logits: drop(logits, ids), lambda logits: logits, logits)


def any_factor_not_one(factors, interpret: bool = False):
    """Tells whether any factor of this warp's rows, of [64] as reducing an accumulator leaves them, is not 1.

    The answer differs from warp to warp: branch on it around arithmetic alone, never around a barrier or wgmma.
    """
    if interpret:
        return jnp.any(factors != 1)

    @inline_mgpu(arg_types=(ROW_LAYOUT,), return_type=Result((), jnp.int32, SPLAT(())))
    def vote(ctx, factors):
        not_one = ptx(
            "{\n.reg .pred p;\nsetp.neu.f32 p, $1, 0f3F800000;\nsetp.neu.or.f32 p, $2, 0f3F800000, p;\n"
            "vote.sync.any.pred p, p, 0xffffffff;\nselp.b32 $0, 1, 0, p;\n}",
            *elements(factors),
            result_types=i32_type(),
            has_side_effects=True,
            convergent=True,
        )
        return mgpu.FragmentedArray.splat(not_one, (), is_signed=True)

    return vote(factors) != 0
