"""Runs the words of `dsa_jax.pallas_kernels.hopper.simt` in NumPy: a team in lockstep, registers as arrays.

Runs a kernel's own Python where there is no GPU. What it cannot see is the PTX behind the words, and what would come of
another order of atomic operations than any that lockstep has. It sees more than a GPU would: memory that nobody wrote
holds noise, and it raises on accesses outside of memory, on shifts by too much, on barriers that not all threads come
to, and on races: a word of shared memory that two threads touch between two barriers, one of them writing.
"""

import contextlib

import numpy as np

np.seterr(over="ignore")


class Machine:
    """Holds the memory, and which threads are active."""

    def __init__(self, threads, smem_words, seed):
        self.threads = threads
        self.random = np.random.default_rng(seed)
        self.smem = self.random.integers(0, 1 << 32, smem_words, np.uint32)
        self.gmem = np.zeros(0, np.uint32)
        self.masks = [np.ones(threads, bool)]
        self.first_thread = 0
        self.barriers = 0
        # When (in barriers) each word was last touched, and by which thread (-1: by several).
        self.touched = {kind: np.full((2, smem_words), -1) for kind in ("read", "write", "atomic")}

    @property
    def active(self):
        return self.masks[-1]

    def put(self, array, offset_words=0):
        """Copies an array into global memory, `offset_words` after a 256-byte boundary, and returns its address."""
        words = np.ascontiguousarray(array).view(np.uint32).ravel()
        start = -(-len(self.gmem) // 64) * 64 + offset_words
        self.gmem = np.concatenate([self.gmem, np.zeros(start - len(self.gmem), np.uint32), words])
        return 4 * start

    def touch(self, kind, place):
        """Notes that each active thread touches its word, and raises if another has done so since the last barrier."""
        place, thread = place[self.active], np.flatnonzero(self.active)
        for other, (when, who) in self.touched.items():
            if (other, kind) not in (("read", "read"), ("atomic", "atomic")):
                race = (when[place] == self.barriers) & (who[place] != thread)
                assert not race.any(), f"race: {kind} after {other} of word {place[race][0]}"
        when, who = self.touched[kind]
        alone = (when[place] < self.barriers) | (who[place] == thread)
        when[place] = self.barriers
        who[place] = np.where(alone, thread, -1)
        words, counts = np.unique(place, return_counts=True)
        who[words[counts > 1]] = -1

    def together(self):
        """Raises unless all threads have come, or none: a branch that nobody takes is walked through all the same."""
        assert self.active.all() or not self.active.any(), "not all threads have come"


machine: Machine


def _array(x, dtype):
    if isinstance(x, Reg):
        assert x.value.dtype == dtype, (x.value.dtype, dtype)
        return x.value
    return np.full(machine.threads, x, dtype)


class Reg:
    """Holds a register of all threads: uint32, uint64, float32 or bool."""

    def __init__(self, value):
        self.value = value

    def _with(self, other, op):
        with np.errstate(all="ignore"):  # threads that are not active hold noise
            return Reg(op(self.value, _array(other, self.value.dtype)))

    def __add__(self, other):
        return self._with(other, np.add)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __rsub__(self, other):
        return Reg(_array(other, self.value.dtype)) - self

    def __mul__(self, other):
        return self._with(other, np.multiply)

    def __truediv__(self, other):
        assert self.value.dtype == np.float32
        return self._with(other, np.divide)

    def __floordiv__(self, other):
        return self._with(other, np.floor_divide)

    def __and__(self, other):
        return self._with(other, np.bitwise_and)

    def __or__(self, other):
        return self._with(other, np.bitwise_or)

    def _shift(self, other, op):
        by = _array(other, self.value.dtype)
        assert (by[machine.active] < 8 * self.value.itemsize).all()
        return Reg(op(self.value, by & self.value.dtype.type(8 * self.value.itemsize - 1)))

    def __lshift__(self, other):
        return self._shift(other, np.left_shift)

    def __rshift__(self, other):
        return self._shift(other, np.right_shift)

    def __invert__(self):
        assert self.value.dtype == bool
        return Reg(~self.value)

    def __lt__(self, other):
        return self._with(other, np.less)

    def __le__(self, other):
        return self._with(other, np.less_equal)

    def __gt__(self, other):
        return self._with(other, np.greater)

    def __ge__(self, other):
        return self._with(other, np.greater_equal)

    def equals(self, other):
        assert self.value.dtype != np.float32
        return self._with(other, np.equal)

    def reaches(self, other):
        return self._with(other, np.greater_equal)

    def bits(self):
        assert self.value.dtype == np.float32
        return Reg(self.value.view(np.uint32))

    def float(self):
        assert self.value.dtype == np.uint32
        return Reg(self.value.view(np.float32))

    def long(self):
        return Reg(self.value.astype(np.uint64))


def i32(value):
    return Reg(_array(value, np.uint32))


def f32(value):
    return Reg(_array(value, np.float32))


def predicate(value):
    return Reg(_array(value, bool))


def scalar(value):
    return i32(value)


def smem_address(address):
    return i32(address)


def gmem_address(address):
    return Reg(_array(address, np.uint64))


def thread_id():
    return Reg(np.arange(machine.first_thread, machine.first_thread + machine.threads, dtype=np.uint32))


def opaque(x):
    return x


@contextlib.contextmanager
def when(condition):
    machine.masks.append(machine.active & condition.value)
    yield
    machine.masks.pop()


def _uniform(condition):
    values = condition.value[machine.active]
    assert len(set(values.tolist())) <= 1, "threads part ways"
    return bool(values.any())


def choose(condition, then, otherwise):
    return then() if _uniform(condition) else otherwise


def _merge(new, old):
    return [Reg(np.where(machine.active, a.value, b.value)) for a, b in zip(new, old, strict=True)]


def loop(start, stop, step, carried, body):
    i, stop, carried = i32(0) + start, i32(0) + stop, list(carried)
    assert (stop.value[machine.active] < 1 << 31).all()
    while (machine.active & (i < stop).value).any():
        with when(i < stop):
            carried = _merge(body(i, *carried), carried)
        i = i + step
    return carried


def repeat(state, test, body):
    again, state = test(*state)
    rounds = 0
    while _uniform(again):
        again, state = test(*body(*state))
        rounds += 1
        assert rounds < 10_000, "no progress"
    return list(state)


def barrier(number, threads):
    machine.together()
    assert threads == machine.threads and (number > 0).value.all()
    machine.barriers += 1


def barrier_any(number, threads, condition):
    barrier(number, threads)
    return predicate((machine.active & condition.value).any())


def where(condition, a, b):
    return Reg(np.where(condition.value, a.value, _array(b, a.value.dtype)))


def minimum(a, b):
    return a._with(b, np.minimum)


def maximum(a, b):
    return a._with(b, np.maximum)


def clamped(x, limit):
    return Reg(np.clip(x.value.view(np.int32), 0, limit).astype(np.uint32))


def bfloat16_pair(x):
    return (x << 16).float(), (x & 0xFFFF0000).float()


def low_word(x):
    return Reg(x.value.astype(np.uint32))


def leading_zeros(x):
    return Reg(np.array([32 - int(v).bit_length() for v in x.value], np.uint32))


def ones(x):
    return Reg(np.bitwise_count(x.value).astype(np.uint32))


def key_of(score):
    with np.errstate(invalid="ignore"):
        bits = (score.value + np.float32(0)).view(np.uint32)
    return Reg(np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)))


def score_of(key):
    bits = np.where(key.value >> 31, key.value ^ np.uint32(1 << 31), ~key.value)
    return Reg(bits.view(np.float32))


def share_and_deviations(total, part, deviations):
    n = np.float32(part) / total.value.astype(np.float32)
    return Reg((n + np.float32(deviations) * np.sqrt(n) + 2).astype(np.uint32))


def how_many_reach(pairs):
    return Reg(sum(np.greater_equal(x.value, y.value).astype(np.uint32) for x, y in pairs))


def _words(memory, address, offset=0, align=4):
    """Finds where the active threads' addresses are in a memory of words; 0 for the others."""
    place = np.where(machine.active, address.value.astype(np.int64) + offset, 0)
    assert (place % align == 0).all() and (place >= 0).all()
    assert (place + align <= 4 * len(memory)).all(), "outside of memory"
    return place // 4


def _noise_where_inactive(values):
    noise = machine.random.integers(0, 1 << 32, machine.threads, np.uint32)
    return Reg(np.where(machine.active, values, noise))


def _load(memory, address, offset, count):
    first = _words(memory, address, offset, align=4 * count)
    return [_noise_where_inactive(memory[first + i]) for i in range(count)]


def _load_smem(address, offset, count):
    for i in range(count):
        machine.touch("read", _words(machine.smem, address, offset + 4 * i))
    return _load(machine.smem, address, offset, count)


def load(address, offset=0):
    return _load_smem(address, offset, 1)[0]


def load4(address, offset=0):
    return _load_smem(address, offset, 4)


def load_long(address, offset=0):
    low, high = _load_smem(address, offset, 2)
    return low.long() | (high.long() << 32)


def store(address, value, offset=0):
    value = value if isinstance(value, Reg) else i32(value)
    if value.value.dtype == np.uint64:
        _words(machine.smem, address, offset, align=8)
        store(address, low_word(value), offset)
        return store(address, low_word(value >> 32), offset + 4)
    place = _words(machine.smem, address, offset)
    machine.touch("write", place)
    place, values = place[machine.active], _array(value, np.uint32)[machine.active]
    machine.smem[place] = values
    assert (machine.smem[place] == values).all(), "threads store different numbers in one place"


def store4(address, values, offset=0):
    _words(machine.smem, address, offset, align=16)
    for i, value in enumerate(values):
        store(address, value, offset + 4 * i)


def store_if(condition, address, value):
    with when(condition):
        store(address, value)


def store_pair_if_reaches(score, bound, number, address, distance):
    reaches = score.reaches(bound)
    with when(reaches):
        store(address, score.bits())
        store(address, number, distance)
    return where(reaches, address + 4, address)


def count_if(condition, address):
    with when(condition):
        place = _words(machine.smem, address)
        machine.touch("atomic", place)
        place = place[machine.active]
        np.add.at(machine.smem, place, np.uint32(1))


def or_if(condition, address, bits):
    with when(condition):
        place = _words(machine.smem, address)
        machine.touch("atomic", place)
        place = place[machine.active]
        np.bitwise_or.at(machine.smem, place, bits.value[machine.active])


def take_number(address):
    place = _words(machine.smem, address)
    machine.touch("atomic", place)
    out = np.zeros(machine.threads, np.uint32)
    for thread in machine.random.permutation(np.flatnonzero(machine.active)):
        out[thread] = machine.smem[place[thread]]
        machine.smem[place[thread]] += np.uint32(1)
    return Reg(out)


def load_gmem(address):
    return _load(machine.gmem, address, 0, 1)[0]


def load_gmem_vector(address):
    return [x.float() for x in _load(machine.gmem, address, 0, 4)]


def _load_if(condition, address, count, otherwise):
    with when(condition):
        loaded = _load(machine.gmem, address, 0, count)
    taken = machine.active & condition.value
    return [Reg(np.where(taken, x.value, np.uint32(otherwise))) for x in loaded]


def load_gmem_if(condition, address):
    return _load_if(condition, address, 1, 0)[0]


def load4_gmem_if(condition, address, otherwise):
    return _load_if(condition, address, 4, otherwise)


def read4_gmem(address, offset=0):
    return _load(machine.gmem, address, offset, 4)


def store_gmem(address, value):
    machine.gmem[_words(machine.gmem, address)[machine.active]] = value.value[machine.active]


def store_gmem_if(condition, address, value, offset=0):
    with when(condition):
        store_gmem(address + offset, value)


def store2_gmem(address, values):
    store_gmem(address, values[0])
    store_gmem(address + 4, values[1])


def store4_gmem(address, values, offset=0):
    place = _words(machine.gmem, address, offset, align=16)[machine.active]
    for i, value in enumerate(values):
        machine.gmem[place + i] = value.value[machine.active]


def _warps(x):
    assert machine.active.reshape(-1, 32).all(1).tolist() == machine.active.reshape(-1, 32).any(1).tolist()
    return x.value.reshape(-1, 32)


def _spread(x):
    return Reg(np.repeat(x.astype(np.uint32), 32))


def warp_sum_so_far(x):
    return Reg(np.cumsum(_warps(x), 1, dtype=np.uint32).ravel())


def warp_last(x):
    return _spread(_warps(x)[:, -1])


def warp_sum(x):
    return _spread(_warps(x).sum(1, dtype=np.uint32))


def warp_minimum(x):
    return _spread(_warps(x).min(1))


def warp_maximum(x):
    return _spread(_warps(x).max(1))


def warp_reserve(address, count, lane):
    """Adds the warps' counts in a random order."""
    machine.together()
    places, counts = _words(machine.smem, address), _warps(count)
    with when(lane.equals(31)):
        machine.touch("atomic", places)
    place = places[0]
    out = np.zeros(len(counts), np.uint32)
    if not machine.active.any():
        return _spread(out)
    for warp in machine.random.permutation(len(counts)):
        out[warp] = machine.smem[place]
        machine.smem[place] += counts[warp, -1]
    return _spread(out)
