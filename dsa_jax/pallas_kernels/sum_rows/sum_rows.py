"""Sums gathered rows: total[s] + Σ_{offsets[s] ≤ i < offsets[s+1]} rows[order[i]], in that order, in float32.

The last step of a deterministic scatter-add: contributions to keys are written in whatever order they arise, their
numbers sorted by key, and each key adds up its own. The sum is the same in every run, since its order is given.

A thread sums 16 bytes of the rows of one key and writes them into `total`, which is changed in place: a key without
rows costs the reading of its two offsets. Neighbouring threads have neighbouring columns, then the next key, so that
loads are whole lines for any width; a grid of one block a multiprocessor deals them out in turns. What limits it is the
memory: up to 2 · `ahead` loads of 16 bytes a thread are in flight, those of the next rows while the last are added.
Numbers and offsets are fetched one step ahead of that, across keys as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx, simt
from dsa_jax.pallas_kernels.hopper.constants import WARPGROUP_THREADS

VECTOR_BYTES = 16  # bytes of a load
WIDTH_STEP = 64  # elements of which a row has a multiple
MINUS_ZERO = {jnp.dtype(jnp.bfloat16): 0x80008000, jnp.dtype(jnp.float32): 0x80000000}  # x + -0.0 is x for every x


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets how many loads are in flight; no result depends on it.

    Attributes:
      threads: of the one block on each multiprocessor; each has 65536 / threads registers.
      ahead: rows in a step. A thread holds the rows of two steps: 8 registers for each row of one.
    """

    threads: int = 512
    ahead: int = 8

    def __post_init__(self):
        if self.threads not in (128, 256, 512, 1024):
            raise ValueError(f"threads must be 128, 256, 512 or 1024, got {self.threads}")
        if self.ahead not in (2, 4, 8, 16):
            raise ValueError(f"ahead must be 2, 4, 8 or 16, got {self.ahead}")


def why_not(rows, order, offsets, total) -> str | None:
    """Says why the kernel cannot take these arguments (anything with shape and dtype), or None when it can."""
    if rows.ndim != 2 or rows.dtype not in MINUS_ZERO:
        return f"rows must be [M, W] in bfloat16 or float32, got {rows.dtype}{list(rows.shape)}"
    if total.ndim != 2 or total.dtype != jnp.float32 or total.shape[1] != rows.shape[1]:
        return f"total must be float32 [S, {rows.shape[1]}] like rows, got {total.dtype}{list(total.shape)}"
    if rows.shape[1] == 0 or rows.shape[1] % WIDTH_STEP:
        return f"the width of rows must be a multiple of {WIDTH_STEP}, got {rows.shape[1]}"
    if rows.shape[0] == 0 or total.shape[0] == 0:
        return f"rows and total must not be empty, got {list(rows.shape)} and {list(total.shape)}"
    if order.shape != rows.shape[:1] or order.dtype != jnp.int32:
        return f"order must be int32 [{rows.shape[0]}], got {order.dtype}{list(order.shape)}"
    if offsets.shape != (total.shape[0] + 1,) or offsets.dtype != jnp.int32:
        return f"offsets must be int32 [{total.shape[0] + 1}], got {offsets.dtype}{list(offsets.shape)}"
    # A thread counts on, by at most 2^20, behind its last 16 bytes.
    if max(rows.shape[0], total.shape[0] * vectors_of(rows)) >= 2**31 - 2**20:
        return f"M and S · W must be below 2^31, got {list(rows.shape)} and {list(total.shape)}"
    return None


def vectors_of(rows) -> int:
    """Counts the 16-byte vectors of a row."""
    return rows.shape[1] * jnp.dtype(rows.dtype).itemsize // VECTOR_BYTES


def sum_rows(rows, order, offsets, total, *, config: Config | None = None, interpret: bool = False):
    """Adds Σ rows[order[i]] over offsets[s] ≤ i < offsets[s+1] to total[s], in that order in float32.

    Args:
      rows: [M, W] bfloat16 or float32, W a multiple of 64. Those that `order` does not name are not read.
      order: int32 [M], the numbers of rows; outside of [offsets[0], offsets[S]) they are not read.
      offsets: int32 [S + 1], increasing, within [0, M].
      total: float32 [S, W]; changed in place where the caller has no further use of it.
      config: tuning.
      interpret: whether to do without a GPU. The interpreter knows no PTX, so that XLA then adds, in the same order.

    Returns:
      float32 [S, W].

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(rows, order, offsets, total)
    if reason is not None:
        raise ValueError(f"sum_rows: {reason}")
    if interpret:
        return _scatter(rows, order, offsets, total)
    config = config or Config()
    keys, blocks = total.shape[0], ptx.multiprocessors()

    def sum_rows_kernel(rows_gmem, order_gmem, offsets_gmem, total_gmem):
        @ptx.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, ptx.SPLAT))
        def run(ctx, rows_gmem, order_gmem, offsets_gmem, total_gmem, block):
            refs = rows_gmem, order_gmem, offsets_gmem, total_gmem
            run_thread(rows, keys, blocks, config, simt.scalar(block), *refs)

        run(rows_gmem, order_gmem, offsets_gmem, total_gmem, lax.axis_index("block"))

    warpgroups = config.threads // WARPGROUP_THREADS
    kernel = ptx.persistent_kernel(sum_rows_kernel, (), (), blocks=blocks, interpret=False, warpgroups=warpgroups)
    total_ref = jax.new_ref(total)  # the kernel changes it in place; XLA copies it first where it is needed again
    kernel(rows, order, offsets, total_ref)
    return jax.freeze(total_ref)


def _scatter(rows, order, offsets, total):
    """Sums as the definition has it: XLA's scatter on a CPU adds one row after another."""
    # The key of each place of `order`: before the first offset and behind the last there is none.
    at = jnp.arange(order.shape[0], dtype=jnp.int32)
    key = jnp.searchsorted(offsets, at, side="right").astype(jnp.int32) - 1
    key = jnp.where(key < 0, total.shape[0], key)  # before the first: dropped, as behind the last
    summed = key < total.shape[0]
    values = jnp.where(summed[:, None], rows[jnp.where(summed, order, 0)].astype(jnp.float32), 0.0)
    return total.at[key].add(values, mode="drop")


def run_thread(rows, keys, blocks, config, block, rows_gmem, order_gmem, offsets_gmem, total_gmem):
    """Sums for one thread of the grid: number t of G takes tasks t, t + G, …, each 16 bytes of a key's rows.

    Four steps overlap: while the rows of one step are added, those of the next are loaded, the numbers of the one after
    are on their way, and for the key after next its bounds.

    Args:
      rows: anything with the shape and dtype of the rows.
      keys: S.
      blocks: thread blocks of the grid.
      config: tuning.
      block: the number of this thread's block.
      rows_gmem: [M, W].
      order_gmem: int32 [M].
      offsets_gmem: int32 [S + 1].
      total_gmem: float32 [S, W].
    """
    vectors, ahead, stride = vectors_of(rows), config.ahead, blocks * config.threads
    tasks = keys * vectors  # neighbouring threads have neighbouring 16 bytes of a row, then the next key's
    row_bytes, total_bytes = VECTOR_BYTES * vectors, 4 * rows.shape[1]
    is_bfloat16 = rows.dtype == jnp.bfloat16
    rows_address, order_address = simt.gmem_address(rows_gmem), simt.gmem_address(order_gmem)
    offsets_address, total_address = simt.gmem_address(offsets_gmem), simt.gmem_address(total_gmem)

    def bounds(task):
        """Loads where the rows of a task's key begin and end; both 0 behind the last task."""
        address = offsets_address + ((task // vectors) << 2).long()
        exists = task < tasks
        return simt.load_gmem_if(exists, address), simt.load_gmem_if(exists, address + 4)

    def numbers(at, end):
        """Loads the numbers of the `ahead` rows from `at` on; 0 behind the last."""
        address = order_address + (at << 2).long()
        return [simt.load_gmem_if(at + i < end, address + 4 * i) for i in range(ahead)]

    def load_rows(numbers, at, end, column):
        """Loads this thread's 16 bytes of these rows; behind the last, zeros that change no sum."""
        loaded = []
        for i, number in enumerate(numbers):
            address = column + number.long() * row_bytes
            # -0.0 and not 0: a sum of -0.0 stays -0.0.
            loaded += simt.load4_gmem_if(at + i < end, address, MINUS_ZERO[jnp.dtype(rows.dtype)])
        return loaded

    def add(sums, words):
        """Adds rows to `sums`, one after the other."""
        for i in range(0, len(words), 4):  # a row's 16 bytes
            row = [
                x for word in words[i : i + 4] for x in (simt.bfloat16_pair(word) if is_bfloat16 else [word.float()])
            ]
            sums = [x + y for x, y in zip(sums, row, strict=True)]
        return sums

    def sum_key(task, begin, end, first_numbers):
        """Sums the rows of one task onto its place in `total`."""
        key = task // vectors
        vector = task - key * vectors
        column = rows_address + (vector << 4).long()
        # 8 bfloat16 make 32 bytes of float32, 4 float32 stay 16.
        place = total_address + key.long() * total_bytes + (vector << (5 if is_bfloat16 else 4)).long()
        # What `total` holds is the first summand, read before the rows are.
        old = [simt.read4_gmem(place, 16 * i) for i in range(2 if is_bfloat16 else 1)]
        sums = [word.float() for words in old for word in words]
        # Two steps of rows are in flight before the first is added.
        first = load_rows(first_numbers, begin, end, column)
        second_numbers = numbers(begin + ahead, end)

        def step(at, *carried):
            """Adds the rows that were loaded; starts the loads of the next and of the numbers after these."""
            sums, loaded, next_numbers = carried[:count], carried[count:-ahead], carried[-ahead:]
            next_loaded = load_rows(next_numbers, at + ahead, end, column)
            return [*add(sums, loaded), *next_loaded, *numbers(at + 2 * ahead, end)]

        count = len(sums)
        sums = simt.loop(begin, end, ahead, [*sums, *first, *second_numbers], step)[:count]
        for i in range(len(old)):
            simt.store4_gmem(place, [x.bits() for x in sums[4 * i : 4 * i + 4]], 16 * i)

    def take(task, begin, end, next_begin, next_end, *first_numbers):
        """Sums the rows of one task, and first starts the loads of what the next one needs."""
        third = bounds(task + 2 * stride)
        next_numbers = numbers(next_begin, next_end)
        with simt.when(begin < end):  # a key without rows keeps its total: nothing of it is read or written
            sum_key(task, begin, end, first_numbers)
        return next_begin, next_end, *third, *next_numbers

    start = simt.thread_id() + block * config.threads
    begin, end = bounds(start)
    simt.loop(start, tasks, stride, [begin, end, *bounds(start + stride), *numbers(begin, end)], take)


SEARCH_BITS = 3  # of a place, found in one round of the search with 2^3 - 1 loads at once


def sort_by_key(indices, size: int, *, interpret: bool = False):
    """Sorts the places of `indices`, counted in one line, by the key that they hold, for `sum_rows`.

    Args:
      indices: int32; what lies outside [0, size) is no key.
      size: how many keys there are.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      order int32 [indices.size], each key's places in their own order, and offsets int32 [size + 1]; places of what is
      no key come last, beyond the last offset.
    """
    keys = indices.reshape(-1)
    # The sort is a radix sort: keys of 16 bits take half its rounds.
    dtype = jnp.uint16 if size < 1 << 16 else jnp.uint32
    keys = jnp.where((keys >= 0) & (keys < size), keys, size).astype(dtype)
    keys, order = lax.sort((keys, lax.iota(jnp.int32, keys.shape[0])), num_keys=1, is_stable=True)
    return order, offsets_of(keys, size, interpret=interpret)


def offsets_of(keys, size: int, *, interpret: bool = False):
    """Counts the sorted `keys`, uint16 or uint32 [M], that are below each of 0, …, size: int32 [size + 1].

    A thread searches for each: log_8 M rounds of loads, of which neighbours share most, whatever the keys are. XLA's
    search takes a kernel for each of its rounds.
    """
    if interpret:
        return jnp.searchsorted(keys.astype(jnp.uint32), jnp.arange(size + 1, dtype=jnp.uint32)).astype(jnp.int32)
    if keys.dtype == jnp.uint16 and keys.shape[0] % 2:  # they are loaded in pairs
        keys = keys.astype(jnp.uint32)

    def offsets_kernel(keys_gmem, offsets_gmem):
        @ptx.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ptx.SPLAT))
        def run(ctx, keys_gmem, offsets_gmem, block):
            search_thread(keys, size, simt.scalar(block), keys_gmem, offsets_gmem)

        run(keys_gmem, offsets_gmem, lax.axis_index("block"))

    offsets, blocks = jax.ShapeDtypeStruct((size + 1,), jnp.int32), size // WARPGROUP_THREADS + 1
    return ptx.persistent_kernel(offsets_kernel, offsets, (), blocks=blocks, interpret=False, warpgroups=1)(keys)


def search_thread(keys, size, block, keys_gmem, offsets_gmem):
    """Finds one offset, for one thread of the grid. `keys` is anything with their shape and dtype."""
    count, halves = keys.shape[0], keys.dtype == jnp.uint16
    keys_address, offsets_address = simt.gmem_address(keys_gmem), simt.gmem_address(offsets_gmem)
    key = (simt.thread_id() & (WARPGROUP_THREADS - 1)) + block * WARPGROUP_THREADS  # whose offset this thread finds

    def is_below(at):
        """Tells whether there is a sorted key at a place, and it is below this thread's."""
        exists = at < count
        if not halves:
            return exists & (simt.load_gmem_if(exists, keys_address + (at << 2).long()) < key)
        # Two keys of 16 bits are loaded together, and the half that is meant is shifted down.
        pair = simt.load_gmem_if(exists, keys_address + ((at >> 1) << 2).long())
        return exists & (((pair >> ((at & 1) << 4)) & 0xFFFF) < key)

    # `place` keys are below for certain. A round finds, of the next 7 steps of its stride, how many are as well.
    place = simt.i32(0)
    digits = -(-count.bit_length() // SEARCH_BITS)
    for digit in reversed(range(digits)):
        stride = 1 << (SEARCH_BITS * digit)
        found = simt.i32(0)
        for i in range(1, 1 << SEARCH_BITS):
            if i * stride <= count:
                found = found + simt.where(is_below(place + (i * stride - 1)), simt.i32(stride), 0)
        place = place + found
    with simt.when(key <= size):
        simt.store_gmem(offsets_address + (key << 2).long(), place)
