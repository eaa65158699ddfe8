"""Selects the exact top-k of a few long rows of scores: a cluster of thread blocks a row, its scores in registers.

The blocks of a cluster share a row's real length in order of position. The steps of a row:

1. load: each thread has its 32 scores in registers as `keys`, unsigned numbers in the order of the scores, 0 for -inf
   and NaN. Of rows longer than that (131072 scores of 8 blocks) the rest is read again in each pass, from the L2 cache.
2. guess: 2048 scores spread over the row, the same in every block, suggest a `low` which a little more than k reach,
   and where the highest are. Their loads are in flight with the others'.
3. narrow: the interval of the k-th key, at first from `low` up, is cut into 256 bins, all blocks count their keys, and
   each adds up the histograms of all through the cluster's shared memory. The bin of the k-th key is the next interval,
   until its keys are all wanted or all equal: twice or three times for scores that differ. A guess that was too high is
   found by its count, and the interval begins again at the lowest key.
4. emit: bitmaps in order of position of the keys above the k-th and of those equal to it, counts of the blocks before,
   and each thread writes the positions of one word.

Measured on an H200 with digits of 8 bits in place of 2 and 3, K 2048 of 131072: 14.0, 29.6 and 132 µs for 1, 16 and
128 rows. Reading others' shared memory, 17 cycles for 128 bytes, and waiting for each other were most of it.

Like `selection/select_topk.py`, which has one team of threads a row and is the faster one for many rows, it is written
with the vocabulary of `simt`, and the tests run it on NumPy threads.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.decode.few_rows_plan import BINS, VECTOR, WORD, Config, Plan, default_config
from dsa_jax.pallas_kernels.hopper import cluster, ptx, simt
from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES, WARP_THREADS, WARPGROUP_THREADS

PAGE = 64  # positions whose slots follow each other
MARGIN = 4.0  # standard deviations by which the guess's rank in the sample lies below the k-th
# The lowest finite float32: `x >= LOWEST_SCORE` excludes -inf and NaN alone.
LOWEST_SCORE = -float.fromhex("0x1.fffffep+127")
LOWEST_KEY, INFINITY_KEY = 0x00800000, 0xFF800000  # the keys of LOWEST_SCORE and of +inf
MINUS_INFINITY = 0xFF800000  # the bits of -inf, in place of scores that are not there
MAX_SIZE = 1 << 21  # positions of a row


def why_not(scores, k: int, *, start, stop, table=None, config: Config | None = None) -> str | None:
    """Says why this kernel cannot take these arguments (anything with shape and dtype), or None if it can."""
    if len(scores.shape) != 3 or scores.dtype != jnp.float32 or 0 in scores.shape:
        return f"scores must be float32 [B, T, S], not empty, got {scores.dtype} {list(scores.shape)}"
    batch, length, size = scores.shape
    if size % VECTOR or size > MAX_SIZE:
        return f"S must be a multiple of {VECTOR} up to {MAX_SIZE}, got {size}"
    if k < 1:
        return f"k must be at least 1, got {k}"
    for name, array, shape in (("start", start, (batch, length)), ("stop", stop, (batch, length))):
        if array.shape != shape or array.dtype != jnp.int32:
            return f"{name} must be int32 {list(shape)}, got {array.dtype} {list(array.shape)}"
    if table is not None and (table.shape != (batch, -(-size // PAGE)) or table.dtype != jnp.int32):
        return f"table must be int32 {[batch, -(-size // PAGE)]}, got {table.dtype} {list(table.shape)}"
    if batch * length * (config or Config()).blocks >= 1 << 31:
        return f"rows times blocks of a cluster must be below 2^31, got {batch * length} rows"
    return None


def select_few_rows(scores, k: int, *, start, stop, table=None, after=(), config: Config | None = None):
    """Selects the k highest scores of each row within [start, stop), exactly and canonically, as `select_topk` does.

    Scores are read up to 31 positions before and 3 behind a row's range: there they must be -inf.

    Args:
      scores: float32 [B, T, S].
      k: how many of each row; may exceed S.
      start: int32 [B, T], the first position of each row that may be selected.
      stop: int32 [B, T], the position behind the last.
      table: int32 [B, S / 64], the page of each 64 positions, or None.
      after: arrays that must be there before the kernel starts, which does not read them: for timing.
      config: tuning.

    Returns:
      int32 [B, T, k]: increasing positions, then -1; with a table the slots of these, page · 64 + position mod 64.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(scores, k, start=start, stop=stop, table=table, config=config)
    if reason is not None:
        raise ValueError(f"select_few_rows: {reason}")
    config = config or default_config(scores.shape[0] * scores.shape[1], scores.shape[2])
    batch, length, size = scores.shape
    p = Plan(size, k, length, 0 if table is None else table.shape[1], config)
    if 4 * p.smem_words >= SMEM_BYTES:
        raise ValueError(f"select_few_rows: no shared memory for rows of {size} in {config}")
    tables = () if table is None else (table,)

    def select_few_rows_kernel(*refs):
        refs, smem = refs[len(after) : -1], refs[-1]

        @ptx.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (len(refs) + 1), ptx.SPLAT, ptx.SPLAT))
        def run(ctx, scores, start, stop, *refs):
            *tables, out, smem, row, rank = refs
            table = tables[0] if tables else None
            run_block(p, scores, start, stop, table, out, smem, simt.scalar(row), simt.scalar(rank))

        run(*refs, smem, lax.axis_index("row"), lax.axis_index("rank"))

    kernel = ptx.kernel(
        select_few_rows_kernel,
        out_type=jax.ShapeDtypeStruct((batch * length, k), jnp.int32),
        scratch_types=(plgpu.SMEM((p.smem_words,), jnp.int32),),
        grid=(batch * length,),
        grid_names=("row",),
        cluster=(config.blocks,),
        cluster_names=("rank",),
        num_threads=config.threads // WARPGROUP_THREADS,
        thread_name="warpgroup",
        compiler_params=ptx.compiler_params(),
    )
    rows = batch * length
    arrays = scores.reshape(rows, size), start.reshape(rows), stop.reshape(rows), *tables
    return kernel(*after, *arrays).reshape(batch, length, k)


# The work of a block's threads. `p` is a `Plan` throughout.


@dataclasses.dataclass(frozen=True)
class _Row:
    """Describes a row's range and the part of it that a block has: what all its threads agree on."""

    length: simt.Reg  # of the whole range
    first: simt.Reg  # the position of the first word of the range
    span: simt.Reg  # from there to the end of the range
    begin: simt.Reg  # the position of the block's first word
    count: simt.Reg  # scores from there that are the block's
    address: simt.Reg  # of the row's first score, in global memory

    @classmethod
    def of(cls, p, scores, start, stop, row, rank):
        """Reads the range of a row and shares it out, whole words to a block."""
        at = (row << 2).long()
        low, high = (simt.clamped(simt.load_gmem(simt.gmem_address(ref) + at), p.size) for ref in (start, stop))
        length = simt.where(low < high, high - low, 0)
        first = low & ((1 << 32) - WORD)
        span = simt.where(low < high, high - first, 0)
        blocks = p.config.blocks
        share = ((span + (WORD * blocks - 1)) >> int(math.log2(WORD * blocks))) << int(math.log2(WORD))
        before = rank * share
        count = simt.where(before < span, simt.minimum(span - before, share), 0)
        return cls(length, first, span, first + before, count, simt.gmem_address(scores) + row.long() * (4 * p.size))

    def keys_at(self, offset):
        """Loads the keys of 4 scores, `offset` behind the block's first; 0 where there are none."""
        address = self.address + ((self.begin + offset) << 2).long()
        return _keys_of(simt.load4_gmem_if(offset < self.count, address, MINUS_INFINITY))


class _Block:
    """Knows where a block's shared memory is, and has the steps that its threads do together: all call its methods."""

    def __init__(self, p, smem, row, rank):
        self.plan, self.row, self.rank = p, row, rank
        self.smem, self.thread = simt.smem_address(smem), simt.thread_id()
        self.lane, self.warp = self.thread & (WARP_THREADS - 1), self.thread >> 5
        self.found = self.smem + p.found_at

    def barrier(self):
        """Waits for the block's threads. Named barrier 0 is Pallas' own."""
        simt.barrier(simt.i32(1), self.plan.config.threads)

    def scan(self, *counts):
        """Sums each count over the threads before this one, and over all: (before, total) of each. One barrier."""
        sums_at = [self.smem + (self.plan.sums_at + 128 * i) for i in range(len(counts))]
        inclusive = [simt.warp_sum_so_far(x) for x in counts]
        with simt.when(self.lane.equals(WARP_THREADS - 1)):
            for at, x in zip(sums_at, inclusive, strict=True):
                simt.store(at + (self.warp << 2), x)
        self.barrier()
        out = []
        for at, x, count in zip(sums_at, inclusive, counts, strict=True):
            sums = self.of_warps(at)
            out.append((x - count + simt.warp_sum(simt.where(self.lane < self.warp, sums, 0)), simt.warp_sum(sums)))
        return out

    def of_warps(self, at):
        """Loads what the block's warps have left at `at`, a warp's a lane, and 0 in lanes without one."""
        # Added up by instructions of the warp: with loads of all, all warps spend some 300 cycles on it.
        return simt.where(self.lane < self.plan.config.threads // WARP_THREADS, simt.load(at + (self.lane << 2)), 0)

    def find(self, count, rank):
        """Finds the bin of the rank-th highest number (1 first), from the count of bin 255 - t that thread t has.

        Returns the bin, how many are above it and in it, and the total. A rank beyond the total finds nothing of
        meaning. Two barriers: the warps' sums are complete; the bin is found.
        """
        ((above, total),) = self.scan(count)
        with simt.when((above < rank) & (above + count >= rank)):
            simt.store(self.found, BINS - 1 - self.thread)
            simt.store(self.found, above, 4)
            simt.store(self.found, count, 8)
        self.barrier()
        return *(simt.load(self.found, 4 * i) for i in range(3)), total

    def own_bin(self, histogram):
        """Computes the address of the bin that `find` wants this thread to have; some bin for those without one."""
        return histogram + ((BINS - 1 - simt.minimum(self.thread, simt.i32(BINS - 1))) << 2)


def run_block(p, scores, start, stop, table, out, smem, row, rank):
    """Selects the part of one row that a block has, together with the other blocks of the cluster."""
    block = _Block(p, smem, row, rank)
    keys = _Row.of(p, scores, start, stop, row, rank)
    sample = _load_sample(p, block, keys)
    step = VECTOR * p.config.threads
    held = [keys.keys_at((block.thread << 2) + v * step) for v in range(p.vectors)]
    zero = simt.i32(0)
    for first in range(0, p.zeroed, 16 * p.config.threads):
        with simt.when((block.thread << 4) + first < p.zeroed):
            simt.store4(block.smem + (block.thread << 4), [zero] * 4, first)
    with simt.when(block.thread.equals(0)):
        simt.store(block.found, zero, 12)  # need
    block.barrier()
    # A row of at most k scores keeps all that are any: every key exceeds 0, and none is needed besides.
    last = simt.choose(keys.length > p.k, lambda: _search(p, block, keys, held, sample), zero)
    _mark(p, block, keys, held, last)
    _emit(p, block, keys, table, out)


def _keys_of(words):
    """Maps the bits of scores to their keys, 0 for -inf and NaN."""
    scores = [x.float() for x in words]
    return [simt.where(x.reaches(simt.f32(LOWEST_SCORE)), simt.key_of(x), 0) for x in scores]


def _load_sample(p, block, keys):
    """Loads the keys of this thread's 4 scores of the sample, which are spread over the whole range."""
    place = keys.first + ((block.thread * keys.span) >> int(math.log2(p.config.threads)) & 0xFFFFFFFC)
    address = keys.address + (place << 2).long()
    return _keys_of(simt.load4_gmem_if(keys.length > p.k, address, MINUS_INFINITY))


def _for_each_vector(p, block, keys, held, visit):
    """Calls `visit(offset, keys)` for all vectors of this thread: those in registers, then those that are not."""
    step = VECTOR * p.config.threads
    for v, vector in enumerate(held):
        with simt.when(simt.i32(v * step) < keys.count):  # a branch of the whole block: short rows spend nothing on it
            visit((block.thread << 2) + v * step, vector)
    if p.share <= p.in_registers:
        return

    def visit_more(first):
        """Reads and visits four vectors, whose loads are in flight together."""
        offsets = [first + (block.thread << 2) + u * step for u in range(4)]
        for offset, vector in zip(offsets, [keys.keys_at(offset) for offset in offsets], strict=True):
            visit(offset, vector)
        return ()

    simt.loop(simt.i32(p.in_registers), keys.count, 4 * step, (), visit_more)


def _search(p, block, keys, held, sample):
    """Finds a key that fewer than k keys of the row exceed, and stores as `need` how many equal ones are wanted.

    Ends behind a barrier.
    """
    zero = simt.i32(0)
    low, high = _guess(p, block, keys, sample)
    first = simt.where(low > 0, low, LOWEST_KEY)
    shift = _bin_shift(simt.maximum(high, first) - first)
    state = first, simt.i32(INFINITY_KEY), shift, zero, block.smem + (8 * BINS), block.smem + (12 * BINS)

    def level(first, last, shift, above, histogram, other):
        """Counts the keys in [first, last] by bins, and narrows the interval to the bin of the k-th key."""
        width = last - first

        def count(_, vector):
            for key in vector:
                above_first = key - first
                place = simt.minimum(above_first >> shift, simt.i32(BINS - 1))
                simt.count_if(above_first <= width, histogram + (place << 2))

        _for_each_vector(p, block, keys, held, count)
        cluster.barrier()  # all histograms are complete, and the other one is no longer read
        mine = block.own_bin(histogram)
        counts = [cluster.load_from(rank, mine) for rank in range(p.config.blocks)]
        own = simt.where(block.thread < BINS, _sum(counts), 0)
        with simt.when(block.thread < BINS):
            simt.store(block.own_bin(other), 0)
        place, higher, within, total = block.find(own, p.k - above)
        # Fewer than wanted: the guess was too high, or no key is missing even of all.
        short = above + total < p.k
        everything = short & first.equals(LOWEST_KEY)
        begin = first + (place << shift)
        upto = begin + ((simt.i32(1) << shift) - 1)
        # The last bin reaches to the end of the interval. `upto` may have wrapped around.
        end = simt.where(place.equals(BINS - 1) | (upto < begin), last, simt.minimum(upto, last))
        above = above + higher
        taken = (above + within).equals(p.k)
        # Of keys that are all wanted the lowest counts as exceeded.
        begin, need = simt.where(taken, begin - 1, begin), simt.where(taken | short, zero, p.k - above)
        begin = simt.where(short, simt.where(everything, simt.i32(LOWEST_KEY - 1), LOWEST_KEY), begin)
        end, above = simt.where(short, simt.i32(INFINITY_KEY), end), simt.where(short, zero, above)
        with simt.when(block.thread.equals(0)):
            simt.store(block.found, need, 12)
        again = (begin < end) & ~everything & (short | ~taken)
        return again, (begin, end, _bin_shift(end - begin), above, other, histogram)

    last, *_ = simt.repeat(state, level, lambda *state: state)
    block.barrier()  # need is stored
    return last


def _guess(p, block, keys, sample):
    """Guesses from the sample a key that more than k keys of the row reach, 0 without a guess, and its highest key.

    Two levels of 8 bits on the sample alone, and a barrier behind each histogram.
    """
    # Of k scores of the row, k · samples / length are expected in the sample, give or take the root of that.
    rank = simt.share_and_deviations(keys.length, p.k * p.samples, MARGIN)
    for key in sample:
        simt.count_if(key > 0, block.smem + ((key >> 24) << 2))
    highest = simt.warp_maximum(_greatest(sample))
    with simt.when(block.lane.equals(0)):
        simt.store(block.smem + (p.sums_at + 128) + (block.warp << 2), highest)
    block.barrier()
    own = simt.where(block.thread < BINS, simt.load(block.own_bin(block.smem)), 0)
    digit, above, _, total = block.find(own, rank)
    highest = simt.warp_maximum(block.of_warps(block.smem + (p.sums_at + 128)))
    for key in sample:
        simt.count_if((key >> 24).equals(digit), block.smem + (4 * BINS) + (((key >> 16) & (BINS - 1)) << 2))
    block.barrier()
    own = simt.where(block.thread < BINS, simt.load(block.own_bin(block.smem + 4 * BINS)), 0)
    second, *_ = block.find(own, rank - above)
    low = simt.maximum((digit << 24) | (second << 16), simt.i32(LOWEST_KEY))
    return simt.where(rank <= total, low, 0), highest


def _mark(p, block, keys, held, last):
    """Sets the bits of the keys that exceed `last`, and those of the keys that equal it."""

    def mark(offset, vector):
        above = equal = simt.i32(0)
        for i, key in enumerate(vector):
            above = above | simt.where(key > last, simt.i32(1 << i), 0)
            equal = equal | simt.where(key.equals(last) & (key > 0), simt.i32(1 << i), 0)
        word = block.smem + ((offset >> 5) << 2)
        simt.or_if(above > 0, word + p.above_at, above << (offset & 28))
        simt.or_if(equal > 0, word + p.equal_at, equal << (offset & 28))

    _for_each_vector(p, block, keys, held, mark)
    block.barrier()


def _emit(p, block, keys, table, out):
    """Writes the positions that the bitmaps have, of the equal ones the first `need`, and -1 behind them."""
    words = [block.thread * p.thread_words + j for j in range(p.thread_words)]

    def load(word, bitmap_at):
        at = block.smem + (simt.minimum(word, simt.i32(p.words - 1)) << 2)
        return simt.where(word < p.words, simt.load(at, bitmap_at), 0)

    above, equal = ([load(word, at) for word in words] for at in (p.above_at, p.equal_at))
    need = simt.load(block.found, 12)
    (above_before, above_all), (equal_before, equal_all) = block.scan(
        _sum([simt.ones(x) for x in above]), _sum([simt.ones(x) for x in equal])
    )
    with simt.when(block.thread.equals(0)):
        simt.store(block.found, above_all, 16)
        simt.store(block.found, equal_all, 20)
    cluster.barrier()  # the counts are stored
    above_total = equal_total = simt.i32(0)
    for rank in range(p.config.blocks):
        for_block = [cluster.load_from(rank, block.found, offset) for offset in (16, 20)]
        above_total, equal_total = above_total + for_block[0], equal_total + for_block[1]
        above_before = above_before + simt.where(block.rank > rank, for_block[0], 0)
        equal_before = equal_before + simt.where(block.rank > rank, for_block[1], 0)
    cluster.arrive()  # with the counts of all
    row_out = simt.gmem_address(out) + block.row.long() * (4 * p.k)
    for word, bits, ties in zip(words, above, equal, strict=True):
        room = simt.where(need > equal_before, need - equal_before, 0)  # equals that may still be taken
        place = above_before + simt.minimum(equal_before, need)
        above_before, equal_before = above_before + simt.ones(bits), equal_before + simt.ones(ties)
        (ties,) = simt.loop(
            simt.minimum(room, simt.ones(ties)), simt.ones(ties), 1, (ties,), lambda _, x: (_without_highest_bit(x),)
        )
        bits = bits | ties
        first = _first_slot(p, block, keys.begin + (word << 5), table, bits)

        def store(i, left, place=place, first=first):
            lowest = left & (0 - left)
            simt.store_gmem(row_out + ((place + i) << 2).long(), first + (31 - simt.leading_zeros(lowest)))
            return (left - lowest,)

        simt.loop(0, simt.ones(bits), 1, (bits,), store)
    # All blocks of the cluster share the rest.
    selected = above_total + simt.minimum(equal_total, need)
    stride = p.config.blocks * p.config.threads
    fill_from = selected + (block.rank * p.config.threads + block.thread)

    def fill(i):
        simt.store_gmem(row_out + (i << 2).long(), simt.i32(0xFFFFFFFF))
        return ()

    simt.loop(fill_from, simt.i32(p.k), stride, (), fill)
    cluster.wait()  # nobody leaves while its shared memory is read


def _first_slot(p, block, position, table, bits):
    """Computes what the first position of a word comes out as: itself, or its slot, a page having whole words."""
    if table is None:
        return position
    at = (block.row // p.queries) * p.pages + (position >> 6)
    page = simt.load_gmem_if(bits > 0, simt.gmem_address(table) + at.long() * 4)
    return (page << 6) + (position & (PAGE - 1))


def _bin_shift(width):
    """Computes by how many bits numbers up to `width` are shifted to fall into BINS bins."""
    bits = 33 - BINS.bit_length()
    zeros = simt.leading_zeros(width)
    return simt.where(zeros < bits, bits - zeros, 0)


def _without_highest_bit(x):
    """Clears the highest bit that is set."""
    return x - (simt.i32(1 << 31) >> simt.leading_zeros(x))


def _sum(registers):
    """Adds up registers, one after the other."""
    total = registers[0]
    for x in registers[1:]:
        total = total + x
    return total


def _greatest(registers):
    """Takes the greatest of some int32."""
    greatest = registers[0]
    for x in registers[1:]:
        greatest = simt.maximum(greatest, x)
    return greatest
