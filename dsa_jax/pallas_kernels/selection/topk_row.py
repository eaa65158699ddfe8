"""What one team of `select_topk`'s threads does with one row: see there for the plan of it.

Pallas cannot index shared memory by arrays, so all of this is MLIR and PTX, written with the small vocabulary of
`simt`; the tests run it on NumPy threads. `p` is a `select_topk.Plan` throughout.
"""

import dataclasses
import math

from dsa_jax.pallas_kernels.hopper import simt

WARP = 32
VECTOR = 4  # scores of a 16-byte load
BINS = 2048  # of a histogram: 11 bits of the key a level
EDGE_SCORES = 2 * (VECTOR - 1)  # at most 3 scores before the first whole vector, and 3 behind the last
CONTROL_WORDS = 64  # warp sums, minima, maxima (16 words each); the found bin; fill, valid, floor; the row
LOWEST = -float.fromhex("0x1.fffffep+127")  # the lowest finite float32: `x >= LOWEST` excludes -inf and NaN alone
LOWEST_KEY, INF_KEY = 0x00800000, 0xFF800000  # the keys of LOWEST and of +inf


@dataclasses.dataclass(frozen=True)
class _Range:
    """The part of a row that may be selected: up to 3 scores, whole vectors, up to 3 scores."""

    vector_start: simt.Reg  # the position of the first whole vector
    length: simt.Reg
    head: simt.Reg  # scores before that
    vectors: simt.Reg
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
    """What one team shares, and what its threads do together: all of them call its methods."""

    def __init__(self, p, smem_of_block):
        thread = simt.thread_id()
        self.plan = p
        self.threads = p.config.threads
        self.warps = self.threads // WARP
        self.thread = thread & (self.threads - 1)
        self.number = thread >> self.threads.bit_length() - 1
        self.lane, self.warp = self.thread & (WARP - 1), self.thread >> 5
        self.smem_of_block = smem_of_block
        self.smem = smem_of_block + self.number * (4 * p.smem_words)
        self.histogram = self.smem
        self.buffer = self.smem + 4 * BINS  # scores; positions stand `positions` bytes behind
        self.positions = 4 * p.capacity
        control = self.smem + 4 * (p.smem_words - CONTROL_WORDS)
        self.sums, self.minima, self.maxima = control, control + 64, control + 128
        self.found, self.fill, self.valid, self.floor = control + 192, control + 208, control + 212, control + 216
        # What the phases know of the row is in shared memory, since registers are scarce while it is streamed.
        self.range, self.row, self.next_row = control + 224, control + 248, control + 252

    def fresh(self):
        """The same team, with registers of its own for one phase.

        The compiler would keep what phases have in common, addresses above all, in more registers than there are.
        """
        return _Team(self.plan, self.smem_of_block)

    def barrier(self):
        """Waits for the team's threads. Named barrier 0 is Pallas' own, of the whole block."""
        simt.barrier(self.number + 1, self.threads)

    def barrier_any(self, condition):
        """A barrier that tells every thread whether any came with `condition`."""
        return simt.barrier_any(self.number + 1, self.threads, condition)

    def each_warp(self, words):
        """The words that the warps have left at `words`."""
        return [x for i in range(self.warps // 4) for x in simt.load4(words, 16 * i)]

    def scan(self, count):
        """The sum of `count` over the threads before this one, and over all. One barrier."""
        inclusive = simt.warp_sum_so_far(count)
        with simt.when(self.lane.equals(WARP - 1)):
            simt.store(self.sums + (self.warp << 2), inclusive)
        self.barrier()
        before, total = inclusive - count, simt.i32(0)
        for i, x in enumerate(self.each_warp(self.sums)):
            before = simt.where(self.warp > i, before + x, before)
            total = total + x
        return before, total

    def extremes(self, low, high):
        """The least `low` and the greatest `high` of all threads. One barrier."""
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
        """The bin of the rank-th highest number (1 first): (bin, numbers above it, numbers in it), and the total.

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
        for i, x in reversed(list(enumerate(bins))):
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
        """Score and position of candidate i."""
        address = self.buffer + (i << 2)
        return simt.load(address).float(), simt.load(address, self.positions)


def _sum(registers):
    total = registers[0]
    for x in registers[1:]:
        total = total + x
    return total


def _bin_shift(width):
    """How far numbers up to `width` are shifted to fall into BINS bins."""
    bits = 33 - BINS.bit_length()
    zeros = simt.leading_zeros(width)
    return simt.where(zeros < bits, bits - zeros, 0)


# The phases.


def run_team(p, rows, blocks, block, scores_gmem, start_gmem, stop_gmem, out_gmem, smem):
    """Each team takes every so many-th row."""
    team = _Team(p, simt.smem_address(smem))
    with simt.when(team.thread.equals(0)):
        simt.store(team.next_row, team.number + block * p.config.teams)
    team.barrier()

    def select():
        _select_row(team, blocks * p.config.teams, scores_gmem, start_gmem, stop_gmem, out_gmem)
        return ()

    simt.repeat((), lambda: (simt.load(team.fresh().next_row) < rows, ()), select)


def _select_row(team, stride, scores_gmem, start_gmem, stop_gmem, out_gmem):
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
    floor = _guess(team)
    with simt.when(team.thread.equals(0)):
        simt.store(team.floor, floor.bits())
    team.barrier()

    def attempt():
        _stream(team)
        team.barrier()
        return (simt.load(team.fill) < p.k) & ~simt.load(team.floor).equals(simt.f32(LOWEST).bits()), ()

    def without_a_guess():
        team.barrier()  # all have read the fill and the floor
        with simt.when(team.thread.equals(0)):
            simt.store(team.fill, 0)
            simt.store(team.floor, simt.f32(LOWEST).bits())
        team.barrier()
        return ()

    simt.repeat((), attempt, without_a_guess)
    found = simt.load(team.fill)
    with simt.when(found > p.k):
        _prune(team, found, p.k)
    _emit(team, out_gmem)


def _range_of(p, scores_gmem, start_gmem, stop_gmem, row):
    at = (row << 2).long()
    start, stop = (simt.clamped(simt.load_gmem(simt.gmem_address(ref) + at), p.size) for ref in (start_gmem, stop_gmem))
    length = simt.where(start < stop, stop - start, 0)
    row_address = simt.gmem_address(scores_gmem) + row.long() * (4 * p.size)
    address = row_address + (start << 2).long()
    head = simt.minimum(((0 - simt.low_word(address)) >> 2) & (VECTOR - 1), length)
    return _Range(start + head, length, head, (length - head) >> 2, address)


def _guess(team):
    """A floor that more than k scores reach, if the sample is like the row; LOWEST where it says nothing.

    The floor lies within the top half of the sample, so the histogram is spread over what is above the least of the
    threads' highest scores: that cuts off two thirds or so, and its bins are the finer.
    """
    team, p, config = team.fresh(), team.plan, team.plan.config
    if config.margin is None or p.size < p.shortest_guess:
        return simt.f32(LOWEST)

    keys = _Range.load(team.range)

    def guess():
        groups = team.threads * config.vectors // 4  # of 4 lanes: 64 bytes, what the memory reads at once
        slots = []
        for u in range(config.vectors):
            group = ((team.thread >> 2) + u * team.threads // 4) * keys.vectors >> groups.bit_length() - 1
            address = keys.vector_address + ((group + (team.thread & 3)) << 4).long()
            slots += simt.load_gmem_vector(address)
        numbers = [simt.where(x.reaches(simt.f32(LOWEST)), simt.key_of(x), 0) for x in slots]
        highest = numbers[0]
        for x in numbers[1:]:
            highest = simt.maximum(highest, x)
        low, high = team.extremes(highest, highest)
        shift = _bin_shift(high - low)
        for x in numbers:
            team.count(x, low, shift, (x >= low) & (x > 0))
        rank = simt.share_and_deviations(keys.length, p.k * p.samples, config.margin)
        (place, *_), total = team.find(rank)
        key = simt.where(rank <= total, simt.maximum(low + (place << shift), simt.i32(LOWEST_KEY)), LOWEST_KEY)
        return simt.score_of(key)

    return simt.choose(keys.length >= p.shortest_guess, guess, simt.f32(LOWEST))


def _stream(team):
    """Puts every score of the row that may be among the k best into the buffer, in one pass.

    All candidates reach the `floor`. After a prune k of them do, so that what is streamed later, at higher positions,
    must exceed it: `edge` is what a later score must reach.
    """
    team, p, vectors = team.fresh(), team.plan, team.plan.config.vectors
    keys = _Range.load(team.range)
    per_step = team.threads * vectors  # vectors of the team
    not_a_number = simt.f32(math.nan)

    def load(first):
        # What lies beyond the last vector is that vector again, and not compared.
        places = [simt.minimum(first + u * team.threads, keys.vectors - 1) for u in range(vectors)]
        return [x for place in places for x in simt.load_gmem_vector(keys.vector_address + place.long() * (4 * VECTOR))]

    def step(i, edge, *scores):
        first = i + team.thread  # the thread's first vector of this step

        def attempt(pending, pruned, bound, *both):
            bounds = [
                simt.where(pending & (first + u * team.threads < keys.vectors), bound, not_a_number)
                for u in range(vectors)
            ]
            position = simt.load(team.range) + (first << 2)  # of the vectors' start, not kept in a register
            offsets = [u * VECTOR * team.threads + c for u in range(vectors) for c in range(VECTOR)]
            slots = [
                (x, bounds[j // VECTOR], position, offset)
                for j, (x, offset) in enumerate(zip(both, offsets, strict=False))
            ]
            failed = team.append(slots)
            return team.barrier_any(failed), (failed, pruned, bound, *both)

        def make_room(pending, pruned, bound, *both):
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
    tail = keys.head + (keys.vectors << 2) + (team.thread - (VECTOR - 1))
    offset = simt.where(head, team.thread, tail)
    inside = head | (team.thread >= VECTOR - 1) & (tail < keys.length)
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
    interval = simt.i32(LOWEST_KEY), simt.i32(INF_KEY)
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
        slots = []
        for j in range(chunk):
            i = first + (team.thread + j * team.threads)
            inside = i < count
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
        def count_one(i):
            number, member = number_of(*team.candidate(i))
            team.count(number, base, shift, member & (number >= first) & (number <= last))
            return ()

        simt.loop(team.thread, count, team.threads, (), count_one)
        (place, higher, within), _ = team.find(p.k - above)
        above = above + higher
        lowest, highest = place.equals(0), place.equals(BINS - 1)
        upto = simt.where(lowest, base, base + (place << shift)) + ((simt.i32(1) << shift) - 1)
        first = simt.where(lowest, first, base + (place << shift))
        # The first and the last bin reach to the ends of the interval. `upto` may have wrapped around.
        last = simt.where(highest | (upto < first), last, simt.minimum(upto, last))
        return first, last, above, above + within, first, _bin_shift(last - first)

    def test(first, last, above, kept, base, shift):
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
        for i in range(words // 4):
            simt.store4(own, [zero] * 4, 16 * i)
        team.barrier()  # the bitmap is empty
        for position in positions:
            bit = position - base
            address = bitmap + ((bit >> 5) << 2)
            mask = simt.i32(1) << (bit & 31)
            simt.or_if(bit < p.segment, address, mask)
        team.barrier()  # the bitmap is complete
        chunks = range(0, 4 * words, 16)
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
    out = simt.gmem_address(out_gmem) + simt.load(team.row).long() * (4 * p.k)
    for j in shares:
        slot = team.thread + j * team.threads
        with simt.when(slot < p.k):
            position = simt.where(
                slot < simt.load(team.fill), simt.load(team.smem + (slot << 2), 2 * prefixes), 0xFFFFFFFF
            )
            simt.store_gmem(out + (slot << 2).long(), position)
