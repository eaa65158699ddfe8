"""Copies rows of FP8 pages to shared memory as they are, and makes operands of wgmma of them in registers.

A block is 64 rows of 656 bytes. Row r begins at 1440 · (r // 2) + 704 · (r mod 2), so that neither of the two ways in
which they are read meets itself in a memory bank:
- as keys, 16 neighbouring bytes of a row a lane, by eight lanes of two neighbouring rows at a time;
- as values, 8 neighbouring bytes of a row a lane, by sixteen lanes of every other of eight rows at a time.

A lane's bytes are not the columns that wgmma wants of it, so columns are permuted: queries by `permute_query`, results
by `store_out`. Rows without a key are zeros.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsa_jax.pallas_kernels.decode import gather_rows
from dsa_jax.pallas_kernels.decode.gather_rows import (
    LEAST_SCALE_BITS,
    ROTARY_OFFSET,
    ROW_BYTES,
    SCALE_BITS_RANGE,
    SCALE_OFFSET,
    TILE_BYTES,
    VALUE_DIM,
)
from dsa_jax.pallas_kernels.hopper import ptx, simt, simt_copies
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_KEYS,
    COLUMN_LAYOUT,
    WARPGROUP_THREADS,
    WARPS_PER_WARPGROUP,
    WORD_PER_THREAD,
)

PAIR_PITCH, ODD_ROW = 1440, 704  # bytes from one pair of rows to the next, and from an even row to the odd one
EIGHT_ROWS = 4 * PAIR_PITCH
BLOCK_BYTES = BLOCK_KEYS // 2 * PAIR_PITCH  # 45 KiB
GROUPS = VALUE_DIM // 128  # scales of a row
TILE_COLUMNS = 64
VALUE_TILES = 4  # operands of 64 values made at a time: a lane has 8 neighbouring values of a row
TABLE_WORDS = GROUPS * BLOCK_KEYS // 2  # scales of a block in half precision, two rows a word

_SPLAT = ptx.Result((), jnp.int32, ptx.SPLAT(()))
_FULL, _FREE, _MASK, _STAGE_BYTES = 0, 8, 16, 24


def stage_barriers(stages: int):
    """Gives the scratch type of the barriers of `stages` blocks, has landed and is free, and of the rows with a key."""
    return plgpu.SMEM((stages, _STAGE_BYTES // 4), jnp.int32)


def init_barriers(barriers_smem) -> None:
    """Initialises what `stage_barriers` has, for one reader a stage. All threads of the block call it."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, barriers):
        address = simt.smem_address(barriers)
        with simt.when(simt.thread_id().equals(0)):
            for stage in range(barriers.type.shape[0]):
                simt_copies.init_barrier(address, WARPS_PER_WARPGROUP, _STAGE_BYTES * stage + _FULL)
                simt_copies.init_barrier(address, WARPGROUP_THREADS, _STAGE_BYTES * stage + _FREE)
        simt_copies.publish_barriers()

    init(barriers_smem)


def _wait(barriers_smem, stage, parity, offset):
    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT, ptx.SPLAT))
    def wait(ctx, barriers, stage, parity):
        address = simt.smem_address(barriers) + simt.scalar(stage) * _STAGE_BYTES
        simt_copies.wait_barrier(address, simt.scalar(parity), offset)

    wait(barriers_smem, jnp.int32(stage), jnp.int32(parity))


def wait_full(barriers_smem, stage, parity) -> None:
    """Waits until the rows of a stage have landed."""
    _wait(barriers_smem, stage, parity, _FULL)


def wait_free(barriers_smem, stage, parity) -> None:
    """Waits until its reader has released a stage; of a new one, parity 1 has been."""
    _wait(barriers_smem, stage, parity, _FREE)


def release(barriers_smem, stage) -> None:
    """Lets the copying warpgroup refill a stage. All threads of its reader call this."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT))
    def arrive(ctx, barriers, stage):
        simt_copies.arrive_only(simt.smem_address(barriers) + simt.scalar(stage) * _STAGE_BYTES, _FREE)

    arrive(barriers_smem, jnp.int32(stage))


def key_mask(barriers_smem, stage):
    """Loads which of the 64 rows of a stage have a key: bits 0 to 31 and 32 to 63."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT), return_type=(_SPLAT, _SPLAT))
    def read(ctx, barriers, stage):
        address = simt.smem_address(barriers) + simt.scalar(stage) * _STAGE_BYTES
        return tuple(gather_rows._splat(simt.load(address, _MASK + 4 * i)) for i in range(2))

    return read(barriers_smem, jnp.int32(stage))


def _row_place(row):
    return (row >> 1) * PAIR_PITCH + (row & 1) * ODD_ROW


def copy_rows(slots, pool_gmem, raw_smem, barriers_smem, stage) -> None:
    """Starts the copies of 64 rows into a stage; one warpgroup calls it, a lane copies a row.

    Args:
      slots: from `gather_rows.slots_of`.
      pool_gmem: [rows, 656] uint8.
      raw_smem: [stages, `BLOCK_BYTES`] uint8.
      barriers_smem: from `stage_barriers`.
      stage: which one; it must be free.
    """

    @ptx.inline_mgpu(arg_types=(WORD_PER_THREAD, plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), ptx.SPLAT))
    def copy(ctx, slots, pool, raw, barriers, stage):
        (mine,), place, stage = gather_rows._words(slots), gather_rows._Lane(), simt.scalar(stage)
        barrier = simt.smem_address(barriers) + stage * _STAGE_BYTES
        to = simt.smem_address(raw) + stage * BLOCK_BYTES + _row_place(place.row())
        present, copies = gather_rows._present(mine), place.lane < 16  # the other lanes know the same rows
        with simt.when(copies & ~present):

            def clear(i):
                simt.store4(to + (i << 4), [simt.i32(0)] * 4)
                return []

            simt.loop(0, ROW_BYTES // 16, 1, [], clear)
            simt_copies.fence_asynchronous()  # before a later copy to the same memory
        rows = simt_copies.ballot(present & copies)
        simt_copies.sync_warp()  # the zeros of other lanes come before this warp's arrival
        with simt.when(place.lane.equals(0)):
            simt_copies.store_byte(barrier + place.warp, rows, _MASK)
            simt_copies.store_byte(barrier + place.warp, rows >> 8, _MASK + 4)
            simt_copies.arrive_expecting(barrier, simt.ones(rows) * ROW_BYTES, _FULL)
        with simt.when(copies & present):
            source = simt_copies.row_address(simt.gmem_address(pool), mine, ROW_BYTES)
            simt_copies.start_bulk_copy(to, source, ROW_BYTES, barrier, _FULL)

    copy(slots, pool_gmem, raw_smem, barriers_smem, jnp.int32(stage))


class _Fragment:
    """Knows what this thread has of an operand: rows `row` and 8 below; of every eight columns, two from 2 · `pair`."""

    def __init__(self):
        thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
        self.warp, self.eighth, self.pair = thread >> 5, (thread >> 2) & 7, thread & 3
        self.row = (self.warp << 4) + self.eighth


def _operand(words, dtype):
    """Makes an operand [64, 64] of words [8 columns, 2 rows], each of two neighbouring numbers."""
    pair = ir.VectorType.get((2,), dtype.get())
    registers = np.empty((8, 2), dtype=object)
    for at, word in np.ndenumerate(words):
        registers[at] = llvm.bitcast(pair, word.value)
    layout = plgpu.Layout.WGMMA.to_mgpu()
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((64, 64))), _layout=layout, _is_signed=None
    )


def keys_tile(raw_smem, stage, tile: int):
    """Makes an operand [64 keys, 64 columns], without scales, of one of the eight tiles of latents in half precision.

    Of column 8 b + 2 j + i it has the latent 16 j + 2 b + i of the tile.
    """
    result = ptx.Result((64, 64), jnp.float16, plgpu.Layout.WGMMA)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT), return_type=result)
    def make(ctx, raw, stage):
        place = _Fragment()
        at = simt.smem_address(raw) + simt.scalar(stage) * BLOCK_BYTES + _row_place(place.row) + (place.pair << 4)
        words = np.empty((8, 2), dtype=object)
        for lower in range(2):
            for i, word in enumerate(simt.load4(at, EIGHT_ROWS * lower + TILE_COLUMNS * tile)):
                words[2 * i, lower], words[2 * i + 1, lower] = simt_copies.e4m3_as_half(word)
        return _operand(words, ir.F16Type)

    return make(raw_smem, jnp.int32(stage))


def rotary_tile(raw_smem, stage):
    """Makes an operand [64 keys, 64 columns] of the rotary columns, bfloat16.

    Of column 32 h + 8 b + 2 j + i, b below 4, it has the rotary column 32 h + 8 j + 2 b + i.
    """
    result = ptx.Result((64, 64), jnp.bfloat16, plgpu.Layout.WGMMA)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT), return_type=result)
    def make(ctx, raw, stage):
        place = _Fragment()
        at = simt.smem_address(raw) + simt.scalar(stage) * BLOCK_BYTES + _row_place(place.row) + (place.pair << 4)
        words = np.empty((8, 2), dtype=object)
        for lower in range(2):
            for half in range(2):
                words[4 * half : 4 * half + 4, lower] = simt.load4(at, EIGHT_ROWS * lower + ROTARY_OFFSET + 64 * half)
        return _operand(words, ir.BF16Type)

    return make(raw_smem, jnp.int32(stage))


def add_scaled(logits, part, raw_smem, stage, group: int):
    """Computes logits + part · the scale of each key's latents of one of the four groups, in float32; [64 keys, N]."""
    result = ptx.Result(logits.shape, jnp.float32, plgpu.Layout.WGMMA)

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType(), ptx.SPLAT), return_type=result)
    def add(ctx, logits, part, raw, stage):
        place = _Fragment()
        at = simt.smem_address(raw) + simt.scalar(stage) * BLOCK_BYTES + _row_place(place.row)
        scales = [simt.load(at, SCALE_OFFSET + 4 * group + EIGHT_ROWS * lower).float() for lower in range(2)]
        # An infinite scale could give a key a logit of -inf, which nothing would tell from an absent key. ∞ · 0 is NaN.
        scales = [simt_copies.multiply_add(x, simt.f32(0.0), x) for x in scales]
        registers = logits.registers.copy()
        sums, parts = registers.reshape(-1, 2), part.registers.reshape(-1, 2)
        for column, lower in np.ndindex(sums.shape):
            vector = sums[column, lower]
            for i in range(2):
                x, y = (simt.Reg(llvm.extractelement(v, ptx.i32(i))) for v in (vector, parts[column, lower]))
                vector = llvm.insertelement(vector, simt_copies.multiply_add(y, scales[lower], x).value, ptx.i32(i))
            sums[column, lower] = vector
        return mgpu.FragmentedArray(_registers=sums.reshape(registers.shape), _layout=logits.layout, _is_signed=None)

    return add(logits, part, raw_smem, jnp.int32(stage))


def scale_table(raw_smem, stage, table_smem):
    """Writes the scales of a block in half precision, two rows a word; tells whether it does not hold them all.

    One warpgroup calls it together, and may read what it wrote. Word 32 g + 8 j + b has group g of rows 8 b + 2 j and
    the next.
    """

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT, plgpu.RefType()), return_type=_SPLAT)
    def write(ctx, raw, stage, table):
        thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
        pair, group = thread & 31, thread >> 5
        at = simt.smem_address(raw) + simt.scalar(stage) * BLOCK_BYTES + pair * PAIR_PITCH + (group << 2)
        scales = [simt.load(at, SCALE_OFFSET + ODD_ROW * i) for i in range(2)]
        outside = simt.predicate(False)
        for bits in scales:
            magnitude = bits & 0x7FFFFFFF
            outside = outside | ((magnitude - LEAST_SCALE_BITS > SCALE_BITS_RANGE) & (magnitude > 0))
        to = simt.smem_address(table) + (((group << 5) + ((pair & 3) << 3) + (pair >> 2)) << 2)
        simt.store(to, simt_copies.half_pair(*scales))
        wide = simt.barrier_any((simt.thread_id() >> 7) + 1, WARPGROUP_THREADS, outside)
        return gather_rows._splat(simt.where(wide, simt.i32(1), 0))

    return write(raw_smem, jnp.int32(stage), table_smem) != 0


def values_tiles(raw_smem, stage, table_smem, first: int, wide: bool):
    """Makes four operands [64 columns, 64 keys] of 256 values from `first`, half precision or `wide`, bfloat16.

    A lane has two neighbouring columns of each. Row 16 w + 8 h + g of operand t has column
    `first` + 64 w + 8 g + 2 t + h.
    """
    dtype, mlir_type = (jnp.bfloat16, ir.BF16Type) if wide else (jnp.float16, ir.F16Type)
    result = (ptx.Result((64, 64), dtype, plgpu.Layout.WGMMA),) * VALUE_TILES

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT, plgpu.RefType()), return_type=result)
    def make(ctx, raw, stage, table):
        place = _Fragment()
        rows = simt.smem_address(raw) + simt.scalar(stage) * BLOCK_BYTES + place.pair * PAIR_PITCH
        columns = rows + place.warp * (16 * VALUE_TILES) + place.eighth * (2 * VALUE_TILES)
        group = place.warp >> 1  # of those among these columns
        scales = simt.smem_address(table) + (((group << 5) + (place.pair << 3)) << 2)
        if not wide:
            words_of = [y for i in range(2) for y in simt.load4(scales, 4 * (32 * (first // 128)) + 16 * i)]
        out = [np.empty((8, 2), dtype=object) for _ in range(VALUE_TILES)]
        for b in range(8):
            at = EIGHT_ROWS * b + first
            upper, lower = (simt_copies.load2(columns, at + ODD_ROW * i) for i in range(2))
            if wide:
                base = rows + (group << 2)
                of_group = EIGHT_ROWS * b + SCALE_OFFSET + 4 * (first // 128)
                both = [simt.load(base, of_group + ODD_ROW * i) for i in range(2)]
            for i, (x, y) in enumerate(zip(upper, lower, strict=True)):
                for tile, selector in ((2 * i, 0x5140), (2 * i + 1, 0x7362)):
                    halves = simt_copies.e4m3_as_half(simt_copies.permute_bytes(x, y, selector))
                    for h, pair in enumerate(halves):
                        if wide:
                            out[tile][b, h] = simt_copies.half_pair_to_bfloat16(pair, *both)
                        else:
                            out[tile][b, h] = simt_copies.multiply_halves(pair, words_of[b])
        return tuple(_operand(words, mlir_type) for words in out)

    return make(raw_smem, jnp.int32(stage), table_smem)


def permute_query(q_smem, heads: int, packed: bool) -> None:
    """Permutes the columns of q [heads, 576] as `keys_tile` and `rotary_tile` have them, in place.

    Latents become half precision, unless they are `packed` as such. A warpgroup calls it together, and lets wgmma read
    q afterwards (`commit_smem`).
    """

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(ptx.swizzled(jnp.bfloat16)),))
    def permute(ctx, q):
        base = simt.smem_address(q)

        def row_of_tile(i):  # a thread has 128 bytes, whose chunks are permuted by the row already
            row, tile = i & 7, i >> 3
            at = base + tile * TILE_BYTES + (row << 7)
            chunks = [at + (simt_copies.xor(row, simt.i32(c)) << 4) for c in range(8)]
            words = [y for chunk in chunks for y in simt.load4(chunk)]
            rotary = (tile - (tile // 9) * 9).equals(8)
            for c in range(8):
                moved = []
                for j in range(4):
                    latent = words[8 * j + c]
                    if not packed:
                        latent = simt_copies.bfloat16_to_half(latent)
                    moved.append(simt.where(rotary, words[16 * (c // 4) + 4 * j + c % 4], latent))
                simt.store4(chunks[c], moved)
            return []

        thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
        simt.loop(thread, 9 * heads, WARPGROUP_THREADS, [], row_of_tile)

    permute(q_smem)


def _values(array):
    """Lists a thread's float32 of an accumulator [64, N]: for every eight columns, of the upper row and the lower."""
    return [
        [simt.Reg(llvm.extractelement(vector, ptx.i32(i))) for i in range(2)] for vector in array.registers.reshape(-1)
    ]


def store_out(accs, first: int, out_gmem) -> None:
    """Writes accumulators [64 columns, N] of `values_tiles` to `out_gmem`.

    Args:
      accs: four of [64, N] float32.
      first: their first column.
      out_gmem: [N, 512] bfloat16.
    """

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * VALUE_TILES + (plgpu.RefType(),))
    def store(ctx, *args):
        *accs, out = args
        place = _Fragment()
        row = place.pair << 1
        column = place.warp * (16 * VALUE_TILES) + place.eighth * (2 * VALUE_TILES) + first
        at = simt.gmem_address(out) + ((row * VALUE_DIM + column) * 2).long()
        values = [_values(acc) for acc in accs]
        for b in range(len(values[0]) // 2):
            for i in range(2):
                numbers = [[values[t][2 * b + h][i] for h in range(2)] for t in range(VALUE_TILES)]
                words = [simt_copies.bfloat16_pair_of(*x) for x in numbers]
                simt.store4_gmem(at, words, (8 * b + i) * VALUE_DIM * 2)

    store(*accs, out_gmem)


def exchange(accs, memory_smem, write: bool):
    """Leaves four accumulators in shared memory, or adds to them what the same thread of the other warpgroup left."""
    shape = accs[0].shape
    result = (ptx.Result(shape, jnp.float32, plgpu.Layout.WGMMA),) * len(accs)
    layouts = (plgpu.Layout.WGMMA,) * len(accs) + (plgpu.RefType(ptx.swizzled(jnp.bfloat16)),)

    @ptx.inline_mgpu(arg_types=layouts, **({} if write else {"return_type": result}))
    def move(ctx, *args):
        *accs, memory = args
        at = simt.smem_address(memory) + ((simt.thread_id() & (WARPGROUP_THREADS - 1)) << 4)
        each = len(_values(accs[0])) // 2  # of 16 bytes
        results = []
        for n, acc in enumerate(accs):
            registers = acc.registers.copy()
            flat = registers.reshape(-1)
            for k in range(each):
                offset = 16 * WARPGROUP_THREADS * (each * n + k)
                mine = [y for x in _values(acc)[2 * k : 2 * k + 2] for y in x]
                if write:
                    simt.store4(at, [x.bits() for x in mine], offset)
                    continue
                sums = [x + y.float() for x, y in zip(mine, simt.load4(at, offset), strict=True)]
                for half in range(2):
                    vector = flat[2 * k + half]
                    for i in range(2):
                        vector = llvm.insertelement(vector, sums[2 * half + i].value, ptx.i32(i))
                    flat[2 * k + half] = vector
            results.append(
                mgpu.FragmentedArray(_registers=flat.reshape(registers.shape), _layout=acc.layout, _is_signed=None)
            )
        return None if write else tuple(results)

    return move(*accs, memory_smem)


def _partial_layout(heads):
    """Gives the layout of what a thread has of sums over keys: one number of each of its columns."""
    return plgpu.Layout.WG_STRIDED((WARPGROUP_THREADS * heads // 4,), vec_size=heads // 4)


def partial_zeros(heads: int):
    """Makes sums over no keys, for `add_partial`."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_THREADS * heads // 4,), jnp.float32), _partial_layout(heads))


def add_partial(sums, decay, p):
    """Computes sums · decay + p, with p [64 keys, N] summed over the two keys that a thread has; decay is [N]."""
    heads = p.shape[1]
    layout = _partial_layout(heads)

    @ptx.inline_mgpu(
        arg_types=(layout, COLUMN_LAYOUT, plgpu.Layout.WGMMA), return_type=ptx.Result(sums.shape, jnp.float32, layout)
    )
    def add(ctx, sums, decay, p):
        vector = sums.registers.item()
        factors, rows = [x for two in _values(decay) for x in two], _values(p)
        for column, factor in enumerate(factors):
            b, i = divmod(column, 2)
            old = simt.Reg(llvm.extractelement(vector, ptx.i32(column)))
            new = simt_copies.multiply_add(old, factor, rows[2 * b][i] + rows[2 * b + 1][i])
            vector = llvm.insertelement(vector, new.value, ptx.i32(column))
        return mgpu.FragmentedArray(_registers=np.array([vector], dtype=object), _layout=sums.layout, _is_signed=None)

    return add(sums, decay, p)


def spread(sums, heads: int):
    """Makes [64 keys, N] of `add_partial`'s sums, whose sum over the keys is theirs."""
    shape = (BLOCK_KEYS, heads)

    @ptx.inline_mgpu(
        arg_types=(_partial_layout(heads),), return_type=ptx.Result(shape, jnp.float32, plgpu.Layout.WGMMA)
    )
    def make(ctx, sums):
        vector, layout = sums.registers.item(), plgpu.Layout.WGMMA.to_mgpu()
        pair, zero = ir.VectorType.get((2,), ir.F32Type.get()), simt.f32(0.0)
        registers = np.empty((heads // 8, 2), dtype=object)
        for b, lower in np.ndindex(registers.shape):
            two = llvm.mlir_undef(pair)
            for i in range(2):
                value = zero.value if lower else llvm.extractelement(vector, ptx.i32(2 * b + i))
                two = llvm.insertelement(two, value, ptx.i32(i))
            registers[b, lower] = two
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
        )

    return make(sums)


def store_by_head(x, to_gmem) -> None:
    """Writes one float32 a head, [N] of `COLUMN_LAYOUT`, to `to_gmem` [N]."""

    @ptx.inline_mgpu(arg_types=(COLUMN_LAYOUT, plgpu.RefType()))
    def store(ctx, x, to):
        place = _Fragment()
        at = simt.gmem_address(to) + (place.pair << 3).long()
        with simt.when(place.row < 1):
            for b, two in enumerate(_values(x)):
                for i in range(2):
                    simt.store_gmem(at + simt.i32(4 * (8 * b + i)).long(), two[i].bits())

    store(x, to_gmem)
