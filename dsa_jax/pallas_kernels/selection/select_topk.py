"""Selects the exact top-k of long rows of scores: one pass over each row, a buffer of candidates in shared memory.

One thread block a multiprocessor, of several teams; a team takes one row after another, on its own part of the shared
memory and with its own named barrier, so that the bookkeeping of one team hides behind the loads of the others. (Teams,
not small blocks: the compiler holds the registers down to what a block needs, not to what several need side by side.)
The steps of a row:

1. guess: a sample of the row, spread over all of it, suggests a `floor` which a little more than k scores reach.
2. stream: the row is read once, 16 bytes a load, the next step's loads in flight while this step's scores are
   compared. Scores ≥ `edge` go to the buffer with their positions. The order there is whatever the warps make it: the
   result is a set that (score, position) defines, so it is the same in every run.
3. prune, whenever the buffer is full: the k-th best candidate is narrowed down with histograms of 2048 bins, what
   cannot be among the k best is dropped, and `floor` rises to what is left.
4. Fewer than k candidates after all, because the guess was too high: the row is streamed again without one.
5. prune to k exactly: equal scores by position. Then emit: a bitmap of the row and its prefix sums give each position
   its rank.

Scores are compared as floats while streaming (NaN fails every comparison, -0.0 equals +0.0) and as `keys` in the
histograms: unsigned numbers in the order of the scores. -inf and NaN never reach the buffer.

What limits it: the memory's rate and the bookkeeping of a row. On an H200 with K 2048, 1024 rows of 131072 take
0.181 ms, 3.0 TB/s of the 4.2 of a copy, and 4096 rows of 32768, the same bytes, 0.270 ms.

Pallas cannot index shared memory by arrays, so a team's work is MLIR and PTX, written with the small vocabulary of
`simt`; the tests run it on NumPy threads.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx, simt
from dsa_jax.pallas_kernels.hopper.constants import (
    SMEM_BYTES,
    SMEM_GRANULE_BYTES,
    WARP_THREADS,
    WARPGROUP_THREADS,
)

VECTOR_SCORES = 4  # scores of a 16-byte load
BINS = 2048  # of a histogram, a word each: 11 bits of the key a level
EDGE_SCORES = 2 * (VECTOR_SCORES - 1)  # at most 3 scores before the first whole vector, and 3 behind the last
CONTROL_WORDS = 64  # of 4 bytes: warp sums, minima, maxima (16 each); the found bin; fill, valid, floor; the row
# The lowest finite float32: `x >= LOWEST_SCORE` excludes -inf and NaN alone.
LOWEST_SCORE = -float.fromhex("0x1.fffffep+127")
LOWEST_KEY, INFINITY_KEY = 0x00800000, 0xFF800000  # the keys of LOWEST_SCORE and of +inf
MAX_BLOCK_THREADS = 1024
MAX_ROW_SCORES = 1 << 24  # S
MAX_K = 8192  # each thread holds its share of the selected positions in registers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets how rows are dealt out and streamed; no result depends on it.

    Attributes:
      threads: of a team.
      teams: of a thread block; each has its part of the shared memory for its buffer, and a thread 65536 / (threads ·
        teams) registers: 64 with 1024 threads.
      vectors: 16-byte loads a thread has in flight, and compares in one step.
      margin: by how many standard deviations the floor's rank in the sample lies below the k-th; None guesses no floor.
      blocks: thread blocks at most, None for one on each multiprocessor.
    """

    threads: int = 256
    teams: int = 4
    vectors: int = 4
    margin: float | None = 6.0
    blocks: int | None = None

    def __post_init__(self):
        if self.threads not in (128, 256, 512):
            raise ValueError(f"threads must be 128, 256 or 512, got {self.threads}")
        if not 1 <= self.teams <= MAX_BLOCK_THREADS // self.threads:
            raise ValueError(
                f"teams must be 1 to {MAX_BLOCK_THREADS // self.threads} of {self.threads}, got {self.teams}"
            )
        if self.vectors not in (1, 2, 4, 8):
            raise ValueError(f"vectors must be 1, 2, 4 or 8, got {self.vectors}")
        if self.margin is not None and not 0 <= self.margin <= 100:
            raise ValueError(f"margin must be None or within 0 to 100, got {self.margin}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Budgets the shared memory of one kernel: rows of `size` scores, of which `k` are selected."""

    size: int
    k: int
    config: Config

    @property
    def warp_step(self) -> int:
        """Scores that a warp compares in one step."""
        return WARP_THREADS * VECTOR_SCORES * self.config.vectors

    @property
    def step(self) -> int:
        """Scores that the team compares in one step."""
        return self.config.threads * VECTOR_SCORES * self.config.vectors

    @property
    def smem_words(self) -> int:
        """Words of 4 bytes of a team's shared memory: histogram, scores and positions of the buffer, control words."""
        return (SMEM_BYTES - SMEM_GRANULE_BYTES) // self.config.teams // 16 * 4

    @property
    def capacity(self) -> int:
        """Candidates that the buffer holds."""
        return (self.smem_words - BINS - CONTROL_WORDS) // 8 * 4

    @property
    def limit(self) -> int:
        """Candidates that streaming may fill: the row's ragged ends come last and find room without a prune."""
        return self.capacity - EDGE_SCORES

    @property
    def target(self) -> int:
        """Candidates that a prune may leave while streaming: a warp's step then finds room, which is progress."""
        return self.k + max(0, self.limit - self.warp_step - self.k) // 4

    @property
    def samples(self) -> int:
        """Scores that the guess looks at."""
        return self.step

    @property
    def shortest_guess(self) -> int:
        """Rows with fewer reachable scores are streamed without a guess."""
        return max(4 * self.samples, self.limit + 1)

    @property
    def bitmap_words(self) -> int:
        """Words a thread of the bitmap that ranks positions: a power of two, 4 to 16; longer rows take several maps."""
        words = 4
        while words < 16 and self.config.threads * words * 32 < self.size:
            words *= 2
        while self._emit_words(words) > self.smem_words - CONTROL_WORDS:
            words //= 2
        return words

    def _emit_words(self, bitmap_words):
        """Counts the words of shared memory that `_emit` needs."""
        return 2 * self.config.threads * bitmap_words + self.k  # bitmap, prefix sums, the row's result

    @property
    def segment(self) -> int:
        """Positions that one bitmap covers."""
        return 32 * self.config.threads * self.bitmap_words

    def fits(self) -> bool:
        """Tells whether there is room for the candidates that pruning must leave, and for emitting."""
        fits = self.limit >= self.k + self.warp_step
        return fits and self._emit_words(4) <= self.smem_words - CONTROL_WORDS


def plan(size: int, k: int, config: Config | None = None) -> Plan:
    """Plans for rows of `size` scores: with `config`, or with the config that was found fastest for this k."""
    if config is not None:
        return Plan(size, k, config)
    default = Plan(size, k, Config())
    return default if default.fits() else Plan(size, k, Config(threads=512, teams=2))


def why_not(scores, k: int, *, start, stop, config: Config | None = None) -> str | None:
    """Says why this kernel cannot take these arguments (anything with shape and dtype), or None if it can."""
    if len(scores.shape) != 3 or scores.dtype != jnp.float32:
        return f"select_topk's kernel needs scores [B, T, S] in float32, got {scores.dtype}{list(scores.shape)}"
    for name, edge in (("start", start), ("stop", stop)):
        if edge.shape != scores.shape[:2] or edge.dtype != jnp.int32:
            return (
                f"select_topk's kernel needs {name} {list(scores.shape[:2])} in int32, "
                f"got {edge.dtype}{list(edge.shape)}"
            )
    if k < 1:
        return f"select_topk's kernel needs k of at least 1, got {k}"
    size = scores.shape[2]
    if size > MAX_ROW_SCORES:
        return f"select_topk's kernel takes rows of at most {MAX_ROW_SCORES} scores, got {size}"
    if math.prod(scores.shape[:2]) >= 1 << 31:
        return f"select_topk's kernel takes fewer than 2**31 rows, got {math.prod(scores.shape[:2])}"
    if k > MAX_K:
        return f"select_topk's kernel takes k of at most {MAX_K}, got {k}"
    if not plan(size, k, config).fits():
        return f"select_topk's kernel has no shared memory for k = {k} in {config}"
    return None


def select_topk(scores, k: int, *, start, stop, config: Config | None = None):
    """Selects the positions of the k highest scores of each row within [start, stop), exactly.

    Strictly increasing positions, then -1. Of equal scores the lowest position wins, and -0.0 equals +0.0. -inf and NaN
    are never selected, +inf may be; ranges are clamped to the row and may be empty; `k` may exceed S. What lies outside
    a row's range is not read into the result.

    Args:
      scores: [B, T, S] float32.
      k: how many of each row.
      start: [B, T] int32, the first position of each row that may be selected.
      stop: [B, T] int32, the position behind the last.
      config: overrides the one that was found fastest.

    Returns:
      [B, T, k] int32.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(scores, k, start=start, stop=stop, config=config)
    if reason:
        raise ValueError(reason)
    batch, length, size = scores.shape
    rows = batch * length
    if rows * size == 0:
        return jnp.full((batch, length, k), -1, jnp.int32)
    p = plan(size, k, config)
    blocks = min(p.config.blocks or ptx.multiprocessors(), -(-rows // p.config.teams))

    def select_topk_kernel(scores_gmem, start_gmem, stop_gmem, out_gmem, smem):
        @ptx.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 5, ptx.SPLAT))
        def run(ctx, scores_gmem, start_gmem, stop_gmem, out_gmem, smem, block):
            run_team(p, rows, blocks, simt.scalar(block), scores_gmem, start_gmem, stop_gmem, out_gmem, smem)

        run(scores_gmem, start_gmem, stop_gmem, out_gmem, smem, lax.axis_index("block"))

    kernel = ptx.persistent_kernel(
        select_topk_kernel,
        jax.ShapeDtypeStruct((rows, k), jnp.int32),
        (plgpu.SMEM((p.config.teams * p.smem_words,), jnp.int32),),
        blocks=blocks,
        interpret=False,
        warpgroups=p.config.teams * p.config.threads // WARPGROUP_THREADS,
    )
    flat = scores.reshape(rows, size), start.reshape(rows), stop.reshape(rows)
    return kernel(*flat).reshape(batch, length, k)


# The work of a team's threads. `p` is a `Plan` throughout.


@dataclasses.dataclass(frozen=True)
class _Range:
    """Describes the part of a row that may be selected: up to 3 scores, whole vectors, up to 3 scores."""

    vector_start: simt.Reg  # the position of the first whole vector
    length: simt.Reg  # in scores
    head: simt.Reg  # scores before the first whole vector
    vectors: simt.Reg  # whole vectors
    address: simt.Reg  # of the first score, in global memory

    @property
    def start(self):
        return self.vector_start - self.head

    @property
    def vector_address(self):
        return self.address + (self.head << 2).long()

    def store(self, smem):
        simt.store4(smem, (self.vector_start, self.length, self.head, self.vectors))
        simt.store(smem, self.address, 16)

    @classmethod
    def load(cls, smem):
        vector_start, length, head, vectors = simt.load4(smem)
        return cls(vector_start, length, head, vectors, simt.load_long(smem, 16))


class _Team:
    """Knows where a team's shared memory is, and has the steps that its threads do together: all call its methods.

    A team's memory: the histogram; the scores of the buffer; their positions; 64 control words.
    """

    def __init__(self, p, smem_of_block):
        thread = simt.thread_id()
        self.plan = p
        self.threads = p.config.threads
        self.warps = self.threads // WARP_THREADS
        self.thread = thread & (self.threads - 1)
        self.number = thread >> self.threads.bit_length() - 1  # threads are a power of two
        self.lane, self.warp = self.thread & (WARP_THREADS - 1), self.thread >> 5
        self.smem_of_block = smem_of_block
        self.smem = smem_of_block + self.number * (4 * p.smem_words)
        self.histogram = self.smem
        self.buffer = self.smem + 4 * BINS  # scores; positions stand `positions` bytes behind
        self.positions = 4 * p.capacity
        control = self.smem + 4 * (p.smem_words - CONTROL_WORDS)
        self.sums, self.minima, self.maxima = control, control + 64, control + 128
        # found: the bin of a rank, what is above it and in it. fill: candidates in the buffer, and those that failed to
        # find room. valid: candidates in the buffer alone. floor: the score that candidates reach, as bits.
        self.found, self.fill, self.valid, self.floor = control + 192, control + 208, control + 212, control + 216
        # What the phases know of the row is in shared memory, since registers are scarce while it is streamed.
        self.range, self.row, self.next_row = control + 224, control + 248, control + 252

    def fresh(self):
        """Makes the same team, with registers of its own for one phase.

        The compiler would keep what phases have in common, addresses above all, in more registers than there are.
        """
        return _Team(self.plan, self.smem_of_block)

    def barrier(self):
        """Waits for the team's threads. Named barrier 0 is Pallas' own, of the whole block."""
        simt.barrier(self.number + 1, self.threads)

    def barrier_any(self, condition):
        """Waits for the team's threads, and tells every one whether any came with `condition`."""
        return simt.barrier_any(self.number + 1, self.threads, condition)

    def each_warp(self, words):
        """Loads the words that the team's warps have left at `words`."""
        return [x for i in range(self.warps // 4) for x in simt.load4(words, 16 * i)]

    def scan(self, count):
        """Sums `count` over the threads before this one, and over all. One barrier."""
        inclusive = simt.warp_sum_so_far(count)
        with simt.when(self.lane.equals(WARP_THREADS - 1)):
            simt.store(self.sums + (self.warp << 2), inclusive)
        self.barrier()
        before, total = inclusive - count, simt.i32(0)
        for i, x in enumerate(self.each_warp(self.sums)):
            before = simt.where(self.warp > i, before + x, before)
            total = total + x
        return before, total

    def extremes(self, low, high):
        """Takes the least `low` and the greatest `high` of all threads. One barrier."""
        low, high = simt.warp_minimum(low), simt.warp_maximum(high)
        with simt.when(self.lane.equals(0)):
            simt.store(self.minima + (self.warp << 2), low)
            simt.store(self.maxima + (self.warp << 2), high)
        self.barrier()
        for x, y in zip(self.each_warp(self.minima), self.each_warp(self.maxima), strict=True):
            low, high = simt.minimum(low, x), simt.maximum(high, y)
        return low, high

    def count(self, number, base, shift, condition):
        """Adds `number` to the histogram: numbers below `base` to the first bin, those too high to the last."""
        place = simt.minimum((simt.maximum(number, base) - base) >> shift, BINS - 1)
        simt.count_if(condition, self.histogram + (place << 2))

    def find(self, rank):
        """Finds the bin of the rank-th highest number (1 first), how many are above it and in it, and the total.

        Leaves the histogram empty. A rank beyond the total finds nothing of meaning. Three barriers: the histogram is
        complete; the warps' sums are; the bin is found.
        """
        self.barrier()
        per_thread = BINS // self.threads
        first = (self.threads - 1 - self.thread) * per_thread  # the first thread has the highest bins
        address = self.histogram + (first << 2)
        zero = simt.i32(0)
        bins = []
        for i in range(per_thread // 4):
            bins += simt.load4(address, 16 * i)
            simt.store4(address, [zero] * 4, 16 * i)
        above, total = self.scan(_sum(bins))
        for i, x in reversed(list(enumerate(bins))):  # from the highest bin down: one thread finds the rank in one bin
            with simt.when((above < rank) & (above + x >= rank)):
                simt.store(self.found, first + i)
                simt.store(self.found, above, 4)
                simt.store(self.found, x, 8)
            above = above + x
        self.barrier()
        return [simt.load(self.found, 4 * i) for i in range(3)], total

    def append(self, slots):
        """Puts the (score, bound, position, offset of the position) of each thread into the buffer, warp by warp.

        Those whose score is ≥ bound, that is. Returns whether this warp found too little room: then it has stored
        nothing, and the first warp to whom that happens, the only one that found the fill within the limit, has left
        the number of valid candidates.
        """
        count = simt.how_many_reach([(score, bound) for score, bound, *_ in slots])
        upto = simt.warp_sum_so_far(count)
        total = simt.warp_last(upto)
        first = simt.warp_reserve(self.fill, total, self.lane)
        failed = (total > 0) & (first + total > self.plan.limit)
        with simt.when(failed & (first <= self.plan.limit)):
            simt.store(self.valid, first)
        with simt.when(~failed):
            address = self.buffer + ((first + upto - count) << 2)
            for score, bound, position, offset in slots:
                address = simt.store_pair_if_reaches(score, bound, position + offset, address, self.positions)
        return failed

    def candidate(self, i):
        """Loads the score and the position of candidate i."""
        address = self.buffer + (i << 2)
        return simt.load(address).float(), simt.load(address, self.positions)


def _sum(registers):
    """Adds up registers, one after the other."""
    total = registers[0]
    for x in registers[1:]:
        total = total + x
    return total


def _bin_shift(width):
    """Computes by how many bits numbers up to `width` are shifted to fall into BINS bins."""
    bits = 33 - BINS.bit_length()
    zeros = simt.leading_zeros(width)
    return simt.where(zeros < bits, bits - zeros, 0)


# The phases of a row, as listed at the top.


def run_team(p, rows, blocks, block, scores_gmem, start_gmem, stop_gmem, out_gmem, smem):
    """Goes through a team's rows: of all teams of all blocks, number n of N takes rows n, n + N, …."""
    team = _Team(p, simt.smem_address(smem))
    with simt.when(team.thread.equals(0)):
        simt.store(team.next_row, team.number + block * p.config.teams)
    team.barrier()

    def select():
        _select_row(team, blocks * p.config.teams, scores_gmem, start_gmem, stop_gmem, out_gmem)
        return ()

    simt.repeat((), lambda: (simt.load(team.fresh().next_row) < rows, ()), select)


def _select_row(team, stride, scores_gmem, start_gmem, stop_gmem, out_gmem):
    """Selects from the team's next row, and notes which comes after it."""
    team, p = team.fresh(), team.plan
    row = simt.load(team.next_row)
    keys = _range_of(p, scores_gmem, start_gmem, stop_gmem, row)
    zero = simt.i32(0)
    team.barrier()  # the row before is written, and all know which comes next
    for i in range(BINS // (4 * team.threads)):
        simt.store4(team.histogram + (team.thread << 4), [zero] * 4, 16 * team.threads * i)
    with simt.when(team.thread.equals(0)):
        keys.store(team.range)
        simt.store(team.row, row)
        simt.store(team.next_row, row + stride)
        simt.store(team.fill, 0)
    team.barrier()
    floor = _guess(team)  # three barriers or more, or none: all threads of a team agree
    with simt.when(team.thread.equals(0)):
        simt.store(team.floor, floor.bits())
    team.barrier()

    def attempt():
        """Streams the row; the guess was too high if fewer than k candidates came of it."""
        _stream(team)
        team.barrier()
        return (simt.load(team.fill) < p.k) & ~simt.load(team.floor).equals(simt.f32(LOWEST_SCORE).bits()), ()

    def without_a_guess():
        """Lowers the floor to the lowest score of all, and empties the buffer."""
        team.barrier()  # all have read the fill and the floor
        with simt.when(team.thread.equals(0)):
            simt.store(team.fill, 0)
            simt.store(team.floor, simt.f32(LOWEST_SCORE).bits())
        team.barrier()
        return ()

    simt.repeat((), attempt, without_a_guess)
    found = simt.load(team.fill)  # all of them valid: the last attempt has found room
    with simt.when(found > p.k):
        _prune(team, found, p.k)
    _emit(team, out_gmem)


def _range_of(p, scores_gmem, start_gmem, stop_gmem, row):
    """Computes the range of a row, and where its whole vectors are: vectors begin at multiples of 16 bytes."""
    at = (row << 2).long()  # a byte offset: rows · 4 stay below 2^33, rows below 2^31
    start, stop = (simt.clamped(simt.load_gmem(simt.gmem_address(ref) + at), p.size) for ref in (start_gmem, stop_gmem))
    length = simt.where(start < stop, stop - start, 0)
    row_address = simt.gmem_address(scores_gmem) + row.long() * (4 * p.size)
    address = row_address + (start << 2).long()
    head = simt.minimum(((0 - simt.low_word(address)) >> 2) & (VECTOR_SCORES - 1), length)
    return _Range(start + head, length, head, (length - head) >> 2, address)


def _guess(team):
    """Guesses a floor that more than k scores reach, if the sample is like the row; LOWEST_SCORE without a guess.

    The floor lies within the top half of the sample, so the histogram is spread over what is above the least of the
    threads' highest scores: that cuts off two thirds or so, and its bins are the finer.
    """
    team, p, config = team.fresh(), team.plan, team.plan.config
    if config.margin is None or p.size < p.shortest_guess:
        return simt.f32(LOWEST_SCORE)

    keys = _Range.load(team.range)

    def guess():
        groups = team.threads * config.vectors // 4  # of 4 lanes: 64 bytes, which the memory reads at once
        slots = []
        for u in range(config.vectors):
            group = ((team.thread >> 2) + u * team.threads // 4) * keys.vectors >> groups.bit_length() - 1
            address = keys.vector_address + ((group + (team.thread & 3)) << 4).long()
            slots += simt.load_gmem_vector(address)
        # -inf and NaN are number 0, which is not counted.
        numbers = [simt.where(x.reaches(simt.f32(LOWEST_SCORE)), simt.key_of(x), 0) for x in slots]
        highest = numbers[0]
        for x in numbers[1:]:
            highest = simt.maximum(highest, x)
        low, high = team.extremes(highest, highest)
        shift = _bin_shift(high - low)
        for x in numbers:
            team.count(x, low, shift, (x >= low) & (x > 0))
        # Of k scores of the row, k · samples / length are expected in the sample, give or take the root of that.
        rank = simt.share_and_deviations(keys.length, p.k * p.samples, config.margin)
        (place, *_), total = team.find(rank)
        key = simt.where(rank <= total, simt.maximum(low + (place << shift), simt.i32(LOWEST_KEY)), LOWEST_KEY)
        return simt.score_of(key)

    return simt.choose(keys.length >= p.shortest_guess, guess, simt.f32(LOWEST_SCORE))


def _stream(team):
    """Puts every score of the row that may be among the k best into the buffer, in one pass.

    All candidates reach the `floor`. After a prune k of them do, so that what is streamed later, at higher positions,
    must exceed it: `edge` is what a later score must reach.
    """
    team, p, vectors = team.fresh(), team.plan, team.plan.config.vectors
    keys = _Range.load(team.range)
    per_step = team.threads * vectors  # vectors of the team
    not_a_number = simt.f32(math.nan)  # a bound that no score reaches

    def load(first):
        """Loads this thread's vectors of a step, 16 bytes each, all in flight together."""
        # What lies beyond the last vector is that vector again, and not compared.
        places = [simt.minimum(first + u * team.threads, keys.vectors - 1) for u in range(vectors)]
        return [
            x
            for place in places
            for x in simt.load_gmem_vector(keys.vector_address + place.long() * (4 * VECTOR_SCORES))
        ]

    def step(i, edge, *scores):
        """Compares one step's scores while the next step's are loaded; prunes until the warps find room for them."""
        first = i + team.thread  # the thread's first vector of this step

        def attempt(pending, pruned, bound, *both):
            bounds = [
                simt.where(pending & (first + u * team.threads < keys.vectors), bound, not_a_number)
                for u in range(vectors)
            ]
            position = simt.load(team.range) + (first << 2)  # of the vectors' start, not kept in a register
            offsets = [u * VECTOR_SCORES * team.threads + c for u in range(vectors) for c in range(VECTOR_SCORES)]
            slots = [
                (x, bounds[j // VECTOR_SCORES], position, offset)
                for j, (x, offset) in enumerate(zip(both, offsets, strict=False))
            ]
            failed = team.append(slots)
            return team.barrier_any(failed), (failed, pruned, bound, *both)

        def make_room(pending, pruned, bound, *both):
            """Prunes, and raises the bound. A warp that has stored its step does not store it again."""
            key = _prune(team, simt.load(team.valid), p.target)
            with simt.when(team.thread.equals(0)):
                simt.store(team.floor, simt.score_of(key).bits())
            bound = simt.score_of(key)
            # What was loaded is loaded again: a prune needs the registers.
            return pending, simt.predicate(True), bound, *load(first), *load(first + per_step)

        state = simt.predicate(True), simt.predicate(False), edge, *scores, *load(first + per_step)
        _, pruned, bound, *both = simt.repeat(state, attempt, make_room)
        # Beyond +inf lies a NaN, which nothing reaches.
        return simt.where(pruned, simt.score_of(simt.key_of(bound) + 1), bound), *both[len(scores) :]

    with simt.when(keys.vectors > 0):
        simt.loop(0, keys.vectors, per_step, (simt.load(team.floor).float(), *load(team.thread)), step)
    _append_ends(team)


def _append_ends(team):
    """Puts what stands before the row's first whole vector (threads 0 to 2) and behind the last (3 to 5) in the buffer.

    Their positions are in no order with those of the candidates, so they need but reach the floor; the limit of the
    buffer has left room for them.
    """
    team = team.fresh()
    keys = _Range.load(team.range)
    head = team.thread < keys.head
    tail = keys.head + (keys.vectors << 2) + (team.thread - (VECTOR_SCORES - 1))
    offset = simt.where(head, team.thread, tail)
    inside = head | (team.thread >= VECTOR_SCORES - 1) & (tail < keys.length)
    with simt.when((team.thread < EDGE_SCORES) & inside):
        score = simt.load_gmem(keys.address + (offset << 2).long()).float()
        with simt.when(score.reaches(simt.load(team.floor).float())):
            place = simt.take_number(team.fill)
            address = team.buffer + (place << 2)
            simt.store(address, score.bits())
            simt.store(address, keys.start + offset, team.positions)


def _prune(team, count, target):
    """Drops candidates that k others beat until at most `target` are left, k ≤ target < count.

    Returns the lowest key that the candidates left may have, which at least k of them reach.
    """
    team, p = team.fresh(), team.plan
    # One candidate a thread tells about where the keys are; those outside fall into the first and the last bin.
    score, _ = team.candidate(team.thread * count >> team.threads.bit_length() - 1)
    low, high = team.extremes(simt.key_of(score), simt.key_of(score))
    with simt.when(team.thread.equals(0)):
        simt.store(team.fill, 0)  # all have read it, before the barrier in `extremes`
    interval = simt.i32(LOWEST_KEY), simt.i32(INFINITY_KEY)
    state = *interval, simt.i32(0), count, low, _bin_shift(high - low)
    key, _, above, kept, *_ = _narrow(
        team, count, target, state, lambda score, _: (simt.key_of(score), simt.predicate(True))
    )

    # Equal scores by position. Turned around, the highest number is the best again.
    def turned(position):
        return p.size - 1 - position

    state = simt.i32(0), simt.i32(p.size - 1), above, kept, simt.i32(0), _bin_shift(simt.i32(p.size - 1))
    tie, *_ = _narrow(team, count, target, state, lambda x, position: (turned(position), simt.key_of(x).equals(key)))

    not_a_number = simt.f32(math.nan)
    chunk = 4  # candidates that a thread reads before it writes: loads in flight
    per_round = chunk * team.threads

    def compact(first):
        """Moves what is kept of a round to the buffer's front. Nothing moves up, so nothing unread is written over."""
        slots = []
        for j in range(chunk):
            i = first + (team.thread + j * team.threads)
            inside = i < count  # the last round is ragged; its spare threads read the last place of the buffer
            score, position = team.candidate(simt.minimum(i, simt.i32(p.capacity - 1)))
            mine = simt.key_of(score)
            keep = (mine > key) | (mine.equals(key) & (turned(position) >= tie))
            slots.append((score, simt.where(inside & keep, score, not_a_number), position, 0))
        team.barrier()  # this round is read, so what is kept of it and of those before may be written over it
        team.append(slots)
        return ()

    simt.loop(0, count, per_round, (), compact)
    team.barrier()  # nobody streams into the buffer before all have appended what they keep: that must find its room
    return key


def _narrow(team, count, target, state, number_of):
    """Narrows the interval of the k-th best candidate until the candidates at or above it are at most `target`.

    The state: the interval (first, last), the candidates above it, those above or within, and where and how wide the
    bins are. `number_of(score, position)` gives a candidate's number and whether it takes part.
    """
    team, p = team.fresh(), team.plan

    def level(first, last, above, kept, base, shift):
        """Counts the candidates within the interval by bins, and narrows it to the bin of the k-th best."""

        def count_one(i):
            number, member = number_of(*team.candidate(i))
            team.count(number, base, shift, member & (number >= first) & (number <= last))
            return ()

        simt.loop(team.thread, count, team.threads, (), count_one)
        (place, higher, within), _ = team.find(p.k - above)
        above = above + higher
        # Numbers below `base` fell into the first bin, those too high into the last: these two reach further.
        lowest, highest = place.equals(0), place.equals(BINS - 1)
        upto = simt.where(lowest, base, base + (place << shift)) + ((simt.i32(1) << shift) - 1)
        first = simt.where(lowest, first, base + (place << shift))
        # The first and the last bin reach to the ends of the interval. `upto` may have wrapped around.
        last = simt.where(highest | (upto < first), last, simt.minimum(upto, last))
        return first, last, above, above + within, first, _bin_shift(last - first)

    def test(first, last, above, kept, base, shift):
        """Tells whether too many are kept, and the interval holds more than one number."""
        return (kept > target) & (first < last), (first, last, above, kept, base, shift)

    return simt.repeat(state, test, level)


def _emit(team, out_gmem):
    """Writes the positions of the candidates, now k at most, in order, and -1 behind them.

    Each thread holds its share of the positions in registers, so that all shared memory is free for the bitmap, its
    prefix sums and the result.
    """
    team, p = team.fresh(), team.plan
    keys, count = _Range.load(team.range), simt.load(team.fill)
    shares = range(-(-p.k // team.threads))
    positions = []
    for j in shares:
        slot = team.thread + j * team.threads
        at = team.buffer + (simt.minimum(slot, simt.i32(p.capacity - 1)) << 2)
        positions.append(simt.where(slot < count, simt.load(at, team.positions), 0xFFFFFFFF))
    words = p.bitmap_words
    bitmap = team.smem
    prefixes = 4 * team.threads * words  # bytes from a word of the bitmap to its prefix sum
    result = team.smem + 2 * prefixes
    own = bitmap + team.thread * (4 * words)
    zero = simt.i32(0)
    team.barrier()  # the positions are in registers

    def rank(base, ranked):
        """Ranks the positions from `base` to one segment further, behind `ranked` lower ones, and places them."""
        for i in range(words // 4):
            simt.store4(own, [zero] * 4, 16 * i)
        team.barrier()  # the bitmap is empty
        for position in positions:
            bit = position - base
            address = bitmap + ((bit >> 5) << 2)
            mask = simt.i32(1) << (
                bit & 31
            )  # a position outside of the segment has a `bit` too high, or wrapped around
            simt.or_if(bit < p.segment, address, mask)
        team.barrier()  # the bitmap is complete
        chunks = range(0, 4 * words, 16)
        # A thread's own words, and what all threads before it have: the prefix sums of its words follow.
        before, total = team.scan(_sum([simt.ones(x) for chunk in chunks for x in simt.load4(own, chunk)]))
        before = before + ranked
        for chunk in chunks:
            sums = []
            for x in simt.load4(own, chunk):  # again: registers are full of positions
                sums.append(before)
                before = before + simt.ones(x)
            simt.store4(own, sums, prefixes + chunk)
        team.barrier()  # the prefix sums are complete
        for position in map(simt.opaque, positions):  # or what it is made into below would stay in registers from above
            bit = position - base
            with simt.when(bit < p.segment):
                address = bitmap + ((bit >> 5) << 2)
                lower = (simt.i32(1) << (bit & 31)) - 1
                place = simt.load(address, prefixes) + simt.ones(simt.load(address) & lower)
                simt.store(result + (place << 2), position)
        team.barrier()  # the bitmap may be emptied, the result read
        return (ranked + total,)

    simt.loop(keys.start, keys.start + keys.length, p.segment, (zero,), rank)
    team = team.fresh()
    # Neighbouring threads write neighbouring positions.
    out = simt.gmem_address(out_gmem) + simt.load(team.row).long() * (4 * p.k)
    for j in shares:
        slot = team.thread + j * team.threads
        with simt.when(slot < p.k):
            position = simt.where(
                slot < simt.load(team.fill), simt.load(team.smem + (slot << 2), 2 * prefixes), 0xFFFFFFFF
            )
            simt.store_gmem(out + (slot << 2).long(), position)
