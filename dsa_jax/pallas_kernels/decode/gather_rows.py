"""Gathers rows of FP8 pages for attention kernels: copies 656-byte rows, and makes 16-bit numbers of them in place.

A block is 64 selected rows of one query. It lies in shared memory as wgmma reads it, [64, 576] in swizzled tiles of
8 rows × 64 columns; its 512 latent columns are gathered in two halves. A warp owns 16 of the 64 rows, two groups of
eight: it copies them with `cp.async` and converts them itself, so that nothing but the vote below ties warps together.
A half's 256 bytes a row land in the upper half of the 512 bytes that they will take, and are converted from there.

What the latents become is chosen for each block:
- half precision, by the hardware's own conversion and one multiplication: 7 cycles a row where integer instructions to
  bfloat16 take 18. Exact for scales that are powers of two from 2^-15 to 2^7; of other scales in between, scale and
  product are rounded to 11 bits each.
- bfloat16, in any block in which the scale of a row that is present is outside of this range: the product is computed
  in float32 and rounded once, so every float32 is read right. The vote costs a named barrier; the blocks are rare.

The rotary columns are bfloat16 as they are stored. Positions outside [0, S) make rows of zeros, for which nothing is
read.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm

from dsa_jax.pallas_kernels.hopper import ptx, simt, simt_copies
from dsa_jax.pallas_kernels.hopper.constants import (
    PAIR_PER_THREAD,
    WARP_THREADS,
    WARPGROUP_THREADS,
    WARPS_PER_WARPGROUP,
    WORD_PER_THREAD,
)

VALUE_DIM = 512  # C, latent columns, one byte each
DIM = 576  # with the rotary columns, two bytes each
SCALE_BYTES = 16  # four float32, one for 128 columns
SCALE_OFFSET = VALUE_DIM
ROTARY_OFFSET = VALUE_DIM + SCALE_BYTES
ROW_BYTES = ROTARY_OFFSET + 2 * (DIM - VALUE_DIM)
PAGE_ROWS = 64
HALF_COLUMNS = VALUE_DIM // 2  # of a half of the latent columns

TILE_BYTES = 1024  # 8 rows × 128 bytes
GROUP_BYTES = DIM // 64 * TILE_BYTES  # of eight rows of a block: nine tiles
HALF_TILES = HALF_COLUMNS // 64

# The bits of scales whose products with all e4m3, 2^-9 to 448, are normal or exact in half precision.
LEAST_SCALE_BITS = 0x38000000  # 2^-15
SCALE_BITS_RANGE = 0x0B000000  # up to 2^7

_SPLAT = ptx.Result((), jnp.int32, ptx.SPLAT(()))
_WORD = ptx.Result((WARPGROUP_THREADS,), jnp.int32, WORD_PER_THREAD)
_PAIR = ptx.Result((2 * WARPGROUP_THREADS,), jnp.int32, PAIR_PER_THREAD)


def block_barriers(slots: int):
    """Gives the scratch type of what gathering and computing warpgroups tell each other of `slots` blocks.

    Of each half of a slot, number 2 · slot + half: an mbarrier for its landing, which `ptx.wait_gather` knows, and a
    word, whether its latents are bfloat16. Of each slot: 64 bits, which rows have a key. Then of each half: an mbarrier
    a warp for its raw rows, which nobody waits for, and one for its release by those who compute.
    """
    return plgpu.SMEM((slots, _SLOT_BYTES // 4), jnp.int32)


_SLOT_BYTES = 2 * (8 + 4) + 8 + 2 * 8 * WARPS_PER_WARPGROUP + 2 * 8


def _slots(barriers):
    return barriers.type.shape[0]


def _type_offset(barriers):
    """Gives the place of the words with the types, in bytes."""
    return _slots(barriers) * 16


def _mask_offset(barriers):
    """Gives the place of the masks, in bytes."""
    return _slots(barriers) * 24


def _raw_offset(barriers, i):
    """Gives the place of the barriers of the raw rows of half `i`, one a warp, in bytes."""
    return _slots(barriers) * 32 + 8 * WARPS_PER_WARPGROUP * i


def _free_offset(barriers, i):
    """Gives the place of the barrier of the release of half `i`, in bytes."""
    return _slots(barriers) * (32 + 16 * WARPS_PER_WARPGROUP) + 8 * i


def init_barriers(barriers_smem) -> None:
    """Initialises what `block_barriers` has. All threads of the block call it, before they part into roles."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, barriers):
        address, halves = simt.smem_address(barriers), 2 * _slots(barriers)
        with simt.when(simt.thread_id().equals(0)):
            for i in range(halves):
                simt_copies.init_barrier(address, WARPGROUP_THREADS, 8 * i)
                simt_copies.init_barrier(address, WARPGROUP_THREADS, _free_offset(barriers, i))
                for warp in range(WARPS_PER_WARPGROUP):
                    simt_copies.init_barrier(address, WARP_THREADS, _raw_offset(barriers, i) + 8 * warp)
        simt_copies.publish_barriers()

    init(barriers_smem)


def release(barriers_smem, i: int) -> None:
    """Lets a gathering warpgroup refill half `i`. All threads of the computing warpgroup that owns it call this."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),))
    def arrive(ctx, barriers):
        simt_copies.arrive_only(simt.smem_address(barriers), _free_offset(barriers, i))

    arrive(barriers_smem)


def wait_free(barriers_smem, i: int, parity, also=()) -> None:
    """Waits for the release of half `i` and those of `also`, of this parity: 1 for what has never been filled."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT))
    def wait(ctx, barriers, parity):
        for half in (i, *also):
            simt_copies.wait_barrier(simt.smem_address(barriers), simt.scalar(parity), _free_offset(barriers, half))

    wait(barriers_smem, jnp.int32(parity))


def close_without_copies() -> None:
    """Closes a group of no copies, so that the one before is always the last but one."""

    @ptx.inline_mgpu()
    def close(ctx):
        simt_copies.close_copies()

    close()


def is_bfloat16(barriers_smem, i):
    """Tells whether the latents that completed barrier `i` are bfloat16, and not half precision."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT), return_type=_SPLAT)
    def read(ctx, barriers, i):
        return _splat(simt.load(simt.smem_address(barriers) + (simt.scalar(i) << 2), _type_offset(barriers)))

    return read(barriers_smem, jnp.int32(i)) != 0


def key_mask(barriers_smem, slot):
    """Loads which of the 64 rows in a slot have a key: bits 0 to 31 and 32 to 63."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT), return_type=(_SPLAT, _SPLAT))
    def read(ctx, barriers, slot):
        address = simt.smem_address(barriers) + (simt.scalar(slot) << 3)
        return tuple(_splat(simt.load(address, _mask_offset(barriers) + 4 * i)) for i in range(2))

    return read(barriers_smem, jnp.int32(slot))


def drop_absent_keys(logits, mask, keys_axis: int):
    """Puts -inf where there is no key into `logits`, an accumulator whose 64 rows (axis 0) or columns (1) are keys."""

    @ptx.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, ptx.SPLAT, ptx.SPLAT),
        return_type=ptx.Result(logits.shape, logits.dtype, plgpu.Layout.WGMMA),
    )
    def drop(ctx, logits, low, high):
        words, lane = [simt.scalar(low), simt.scalar(high)], _Lane()
        registers = logits.registers.copy()
        of_lane = registers.reshape(-1, 2)  # eight columns × the two rows of this lane, eight apart
        minus_infinity = simt.f32(float("-inf"))
        # Lane l of warp w has rows 16 w + l // 4 and eight below, of every eight columns 2 (l mod 4) and the next.
        if keys_axis == 0:
            word = simt.where(lane.warp < 2, words[0], words[1]) >> (((lane.warp & 1) << 4) + (lane.lane >> 2))
        else:
            words = [x >> ((lane.lane & 3) << 1) for x in words]
        for column, row in np.ndindex(of_lane.shape):
            vector = of_lane[column, row]
            for i in range(2):
                bits = word >> 8 * row if keys_axis == 0 else words[column // 4] >> (8 * (column % 4) + i)
                value = simt.Reg(llvm.extractelement(vector, ptx.i32(i)))
                value = simt.where((bits & 1) > 0, value, minus_infinity)
                vector = llvm.insertelement(vector, value.value, ptx.i32(i))
            of_lane[column, row] = vector
        return mgpu.FragmentedArray(_registers=of_lane.reshape(registers.shape), _layout=logits.layout, _is_signed=None)

    # Mostly there is nothing to drop.
    return lax.cond((mask[0] & mask[1]) != -1, lambda x: drop(x, *mask), lambda x: x, logits)


class _Lane:
    """Knows this thread's place: its warp owns rows 8 w to 8 w + 7 of a block, and the same 32 below."""

    def __init__(self):
        thread = simt.thread_id() & (WARPGROUP_THREADS - 1)
        self.lane, self.warp = thread & (WARP_THREADS - 1), thread >> 5

    def row(self):
        """Gives the row that this lane, and the lane 16 on, knows the position of."""
        return (self.lane & 7) + (self.warp << 3) + ((self.lane & 8) << 2)

    def group_address(self, block):
        """Gives the address of the warp's first group of eight rows; the other one is four groups on."""
        return simt.smem_address(block) + self.warp * GROUP_BYTES


def _splat(value):
    """Makes a scalar of an int32 that is the same in all threads."""
    return mgpu.FragmentedArray.splat(value.value, (), is_signed=True)


def _word(value):
    """Packs one int32 a thread."""
    return ptx.private_values([value.value], WORD_PER_THREAD)


def _words(array):
    """Unpacks the int32 that a thread has."""
    return [simt.Reg(x) for x in ptx.elements(array)]


def load_positions(indices_gmem):
    """Loads the position that this lane knows of the 64 int32 at `indices_gmem`."""

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_WORD)
    def load(ctx, indices):
        return _word(simt.load_gmem(simt.gmem_address(indices) + (_Lane().row() << 2).long()))

    return load(indices_gmem)


def load_pages(positions, table_gmem, size: int):
    """Loads the page of this lane's position from its sequence's part of the table; some page for what is no key.

    Nothing here waits for the load: what it returns is first looked at by `slots_of`.
    """

    @ptx.inline_mgpu(arg_types=(WORD_PER_THREAD, plgpu.RefType()), return_type=_WORD)
    def load(ctx, positions, table):
        (position,) = _words(positions)
        page = simt.where(position < size, position, 0) >> 6
        return _word(simt.load_gmem(simt.gmem_address(table) + (page << 2).long()))

    return load(positions, table_gmem)


def slots_of(positions, pages, size: int):
    """Computes the row of the pool of this lane's position, -1 for what is no key."""

    @ptx.inline_mgpu(arg_types=(WORD_PER_THREAD, WORD_PER_THREAD), return_type=_WORD)
    def compute(ctx, positions, pages):
        (position,), (page,) = _words(positions), _words(pages)
        slot = (page << 6) + (position & (PAGE_ROWS - 1))
        return _word(simt.where(position < size, slot, 0xFFFFFFFF))

    return compute(positions, pages)


def load_scales(slots, pool_gmem):
    """Loads one scale of a row of either group: lane l has scale l mod 4 of rows l // 4. 0 where there is no row."""

    @ptx.inline_mgpu(arg_types=(WORD_PER_THREAD, plgpu.RefType()), return_type=_PAIR)
    def load(ctx, slots, pool):
        (mine,), lane = _words(slots), _Lane().lane
        base = simt.gmem_address(pool) + (((lane & 3) << 2) + SCALE_OFFSET).long()
        scales = []
        for group in range(2):
            row = simt_copies.lane_value(mine, (lane >> 2) + 8 * group)
            address = simt_copies.row_address(base, _row_or_first(row), ROW_BYTES)
            scales.append(simt.load_gmem_if(_present(row), address))
        return ptx.private_values([x.value for x in scales], PAIR_PER_THREAD)

    return load(slots, pool_gmem)


def _present(slot):
    return ~simt_copies.signed_negative(slot)


def _row_or_first(slot):
    return simt.where(_present(slot), slot, 0)


def start_copies(slots, pool_gmem, block_smem, half: int, barriers_smem=None, number: int = 0) -> None:
    """Starts the copies of half of the latent columns, and, with the right half, of the rotary ones.

    With barriers, those of the raw rows of half `number` complete a phase when the copies have landed: to wait for them
    was slower, and the kernel that was measured without still arrives there.

    e4m3 land where 16-bit numbers of the same rows will be; see the top. In odd rows the two 64-byte halves of each
    128 bytes change places, or the reads of `convert` would meet in the same banks.
    """

    @ptx.inline_mgpu(
        arg_types=(WORD_PER_THREAD, plgpu.RefType(), plgpu.RefType(ptx.swizzled(jnp.bfloat16)))
        + (plgpu.RefType(),) * (barriers_smem is not None),
    )
    def start(ctx, slots, pool, block, *barriers):
        (mine,), place = _words(slots), _Lane()
        lane, base, smem = place.lane, simt.gmem_address(pool), place.group_address(block)

        def copy(row_lane, source, to, to_offset, source_offset):
            row = simt_copies.lane_value(mine, row_lane)
            address = simt_copies.row_address(source, _row_or_first(row), ROW_BYTES)
            count = simt.where(_present(row), simt.i32(16), 0)
            simt_copies.start_copy16(to, address, count, to_offset, source_offset)

        # Sixteen lanes copy 256 bytes of a row; the warp's halves take rows of either parity.
        parity, chunk = lane >> 4, lane & 15
        source = base + (chunk << 4).long()
        to = smem + (parity << 8) + (simt_copies.xor(chunk, parity << 2) << 4)
        for group in range(2):
            for i in range(4):
                to_offset = 4 * GROUP_BYTES * group + TILE_BYTES * (HALF_TILES * half + 2) + 512 * i
                copy(parity + (8 * group + 2 * i), source, to, to_offset, HALF_COLUMNS * half)
        if half:  # eight lanes copy the 128 bytes of a row's rotary columns, into their swizzled tile
            chunk = lane & 7
            source = base + (chunk << 4).long()
            for i in range(2):
                row = (lane >> 3) + 4 * i
                to = smem + (row << 7) + (simt_copies.xor(chunk, row) << 4)
                for group in range(2):
                    to_offset = 4 * GROUP_BYTES * group + 2 * HALF_TILES * TILE_BYTES
                    copy(row + 8 * group, source, to, to_offset, ROTARY_OFFSET)
        for x in barriers:
            simt_copies.arrive_after_copies(simt.smem_address(x) + (place.warp << 3), _raw_offset(x, number))
        simt_copies.close_copies()

    start(slots, pool_gmem, block_smem, *(() if barriers_smem is None else (barriers_smem,)))


def choose_type(slots, scales, barriers_smem, i, half: int):
    """Tells whether half precision holds what all scales of the block make of e4m3, and leaves word for the readers.

    Each gathering warpgroup asks for all scales of the 64 rows, so that those of both halves of the columns agree. It
    calls this together, once nobody reads what the last block of this slot has left.

    Args:
      slots: from `slots_of`.
      scales: from `load_scales`.
      barriers_smem: from `block_barriers`.
      i: the barrier of this half, 2 · slot + half.
      half: of the columns; the left one says which rows have a key.
    """

    @ptx.inline_mgpu(arg_types=(WORD_PER_THREAD, PAIR_PER_THREAD, plgpu.RefType(), ptx.SPLAT), return_type=_SPLAT)
    def vote(ctx, slots, scales, barriers, i):
        (mine,), place = _words(slots), _Lane()
        outside = simt.predicate(False)
        for bits in _words(scales):
            magnitude = bits & 0x7FFFFFFF
            outside = outside | ((magnitude - LEAST_SCALE_BITS > SCALE_BITS_RANGE) & (magnitude > 0))
        # Pallas' own barriers of a warpgroup have the same numbers; all its threads take either kind in turn.
        number = (simt.thread_id() >> 7) + 1
        wide = simt.where(simt.barrier_any(number, WARPGROUP_THREADS, outside), simt.i32(1), 0)
        address = simt.smem_address(barriers) + (simt.scalar(i) << 2)
        present = simt_copies.ballot(_present(mine))
        with simt.when(place.lane.equals(0)):
            # Each warp says it of its own rows, and of the type all say the same.
            simt.store(address, wide, _type_offset(barriers))
            if half == 0:
                simt_copies.store_byte(address + place.warp, present, _mask_offset(barriers))
                simt_copies.store_byte(address + place.warp, present >> 8, _mask_offset(barriers) + 4)
        return _splat(simt.where(wide > 0, simt.i32(0), 1))

    return vote(slots, scales, barriers_smem, jnp.int32(i))


def convert(scales, fits, block_smem, barriers_smem, i, half: int, pending: int = 0) -> None:
    """Waits for the copies of half of a block's columns, converts them in place, and arrives at barrier `i`.

    Args:
      scales: from `load_scales`.
      fits: from `choose_type`: half precision, or else bfloat16.
      block_smem: [64, 576], the memory of the block.
      barriers_smem: from `block_barriers`; each expects the 128 threads of this warpgroup.
      i: which of them, 2 · slot + half.
      half: of the columns.
      pending: how many `start_copies` since that of this half need not have landed.
    """

    @ptx.inline_mgpu(
        arg_types=(
            PAIR_PER_THREAD, ptx.SPLAT, plgpu.RefType(ptx.swizzled(jnp.bfloat16)), plgpu.RefType(),
            ptx.SPLAT,
        ),
    )  # fmt: skip
    def run(ctx, scales, fits, block, barriers, i):
        scales, place, fits = _words(scales), _Lane(), simt.scalar(fits) > 0
        row, quarter = place.lane >> 2, place.lane & 3  # a lane reads 16 of the 64 bytes of a row and tile
        smem = place.group_address(block)
        raw = smem + (row << 8) + (quarter << 4)
        swapped = (row & 1) << 6  # see `start_copies`
        even, odd = raw + swapped, raw - swapped  # of tiles 0 and 2, of tiles 1 and 3
        chunk = simt_copies.xor(quarter << 1, row) << 4  # where 16 numbers go: two 16-byte chunks
        left = smem + (row << 7) + chunk
        right = smem + (row << 7) + simt_copies.xor(chunk, simt.i32(16))
        first = (place.lane & 0x1C) + 2 * half  # the lane with the first scale of this half of a row
        simt_copies.wait_copies(pending)
        simt_copies.sync_warp()
        for group in range(2):
            at = 4 * GROUP_BYTES * group + HALF_TILES * TILE_BYTES * half
            tiles = [
                simt.load4(odd if tile % 2 else even, at + 2 * TILE_BYTES + 64 * tile) for tile in range(HALF_TILES)
            ]
            simt_copies.sync_warp()  # the lanes have read what they overwrite next
            row_scales = [simt_copies.lane_value(scales[group], first + n) for n in range(2)]

            for tile, words in enumerate(tiles):
                if tile % 2 == 0:
                    factor = simt_copies.half_twice(simt.where(fits, row_scales[tile // 2], simt_copies.ONE_BITS))
                for to, pair in ((left, words[:2]), (right, words[2:])):
                    halves = [y for x in pair for y in simt_copies.e4m3_to_half(x, factor)]
                    simt.store4(to, halves, at + TILE_BYTES * tile)
            with simt.when(~fits):  # what is written is e4m3 without the scale, in half precision: exact

                def scale_tile(tile, row_scales=row_scales, at=at):
                    scale = simt.where(tile < 2, *row_scales)
                    for to in (left, right):
                        to = to + tile * TILE_BYTES
                        words = [simt_copies.half_to_bfloat16(x, scale) for x in simt.load4(to, at)]
                        simt.store4(to, words, at)
                    return []

                simt.loop(0, HALF_TILES, 1, [], scale_tile)
        simt_copies.arrive(simt.smem_address(barriers) + (simt.scalar(i) << 3))

    run(scales, jnp.int32(fits), block_smem, barriers_smem, jnp.int32(i))
