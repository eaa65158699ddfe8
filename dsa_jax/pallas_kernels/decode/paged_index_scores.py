"""Computes the index scores of one to four tokens a sequence over paged keys on Hopper, FP8 or bfloat16 (Eq. 1).

A persistent grid, one block on each multiprocessor. The work is a line of blocks of 256 keys, four pages: those that
the queries of the first sequence reach, then those of the second, and so on. It is cut into equal shares, one a thread
block, wherever the cuts fall. A thread block has

- one producer warpgroup, whose TMA copies bring the queries and weights of a sequence and stream its pages, the keys
  and the scales of a page apart, since only the keys are swizzled;
- four math warpgroups. Keys are the M operand of wgmma, 64 at a time, one page; queries and heads, 128 at most, are
  the N operand. Where all queries fit, the warpgroups take the pages of a block in turn; three or four queries of 64
  heads are two groups, and two warpgroups take each. Narrower than 128 is a query of 64 heads alone: with 128 rows half
  of the sums would be of nothing, and at batch 1 that took 11.9 µs instead of 9.8.

What limits it: the memory's rate from batch 16 on, 132 bytes a key; at batch 1 the launch and dependent loads (the
line, the table, the page), without which 3 of 10 µs were left (H200, S 131072, one query of 64 heads).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.decode.score_sums import lane_range, lane_sums, pairs_of, store_tile
from dsa_jax.pallas_kernels.hopper import ptx, simt
from dsa_jax.pallas_kernels.hopper.constants import COLUMN_LAYOUT, PAIR_PER_THREAD, SMEM_BYTES
from dsa_jax.pallas_kernels.hopper.work_split import for_each_part, share_bounds

PAGE = 64  # tokens, and keys of one product
DIM = 128  # E
SCALE_ROWS = 2  # of a page in FP8, behind its keys: 64 float32, 4 bytes each, in rows of 128 bytes
MATH_WARPGROUPS = 4
WARPGROUP_ROWS = 128  # (query, head) rows of a math warpgroup at most: the width of its accumulator
HEADS = (64, 32)  # J
MAX_LENGTH = 4  # T
DTYPES = (jnp.float8_e4m3fn, jnp.bfloat16)
BARRIER_BYTES = 2048  # of shared memory, at most
# Registers a thread of the math warpgroups and of the producer. At the launch five warpgroups have 96 a thread, which
# 64 products and 32 weights would fill; the producer gives up what it does not need.
REGISTERS = 112, 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets how the work is cut; no result depends on it.

    Attributes:
      pages: of a block of keys, the unit of work.
      stages: blocks of keys in shared memory.
    """

    pages: int = 4
    stages: int = 4

    def __post_init__(self):
        if self.pages not in (4, 8):
            raise ValueError(f"pages must be 4 or 8, got {self.pages}")
        if not 1 <= self.stages <= 32:
            raise ValueError(f"stages must be between 1 and 32, got {self.stages}")

    def smem_bytes(self, dtype, rows: int) -> int:
        """Counts the bytes of shared memory of a thread block with `rows` rows of queries, barriers aside."""
        itemsize = jnp.dtype(dtype).itemsize
        keys = self.stages * self.pages * PAGE
        arrays = [rows * DIM * itemsize, rows * 4, keys * DIM * itemsize, keys * 4 * (itemsize == 1)]
        return sum(map(ptx.allocated, arrays))


def default_config(dtype, length: int, table_pages: int) -> Config:
    """Chooses the configuration that was found fastest on an H200, of FP8.

    Of one query a sequence at S 128K: 9.8 µs at batch 1 with 3 stages, 11.8 with 4; 79.0 at batch 16 with 4, 80.7 with
    5. For two queries of 64 heads 5 stages were fastest, and bfloat16 pages, which were not compared, leave room for 2.

    Args:
      dtype: of the pages.
      length: T.
      table_pages: B · P.
    """
    if jnp.dtype(dtype).itemsize == 2:
        return Config(stages=2)
    if length > 1:
        return Config(stages=5)
    few = table_pages <= 4 * Config.pages * ptx.multiprocessors()  # at most four blocks of keys a thread block
    return Config(stages=3 if few else 4)


class Split(NamedTuple):
    """Says how queries and heads are dealt to the math warpgroups.

    Attributes:
      queries: of a warpgroup: 1, 2 or 4. The last group may have fewer.
      groups: of queries; 4 / groups warpgroups have the same one.
    """

    queries: int
    groups: int

    @classmethod
    def of(cls, length: int, heads: int) -> "Split":
        """Splits `length` queries of `heads` heads."""
        queries = min(1 << (length - 1).bit_length(), WARPGROUP_ROWS // heads)
        return cls(queries, -(-length // queries))


class Plan(NamedTuple):
    """Lines up the work of all sequences.

    Attributes:
      first: int32 [B], the first page that a query of each sequence reaches.
      stop: int32 [B], the page behind the last.
      offset: int32 [B + 1], where each sequence's blocks of keys start on the line, and the line's end.
    """

    first: jax.Array
    stop: jax.Array
    offset: jax.Array


def make_plan(start, stop, *, size: int, config: Config) -> Plan:
    """Lines up the work of queries with these ranges, int32 [B, T], over `size` keys.

    In a model's decode step ranges are the same in all layers, and XLA computes this once.
    """
    start, stop = jnp.maximum(start, 0), jnp.minimum(stop, size)
    has_keys = start < stop
    first = jnp.min(jnp.where(has_keys, start // PAGE, size // PAGE), axis=1)
    end = jnp.max(jnp.where(has_keys, (stop + (PAGE - 1)) // PAGE, 0), axis=1)
    blocks = jnp.maximum(-(-end // config.pages) - first // config.pages, 0)  # 0 where no query has keys
    # Every beginning is summed anew, which fuses with the rest; a scan does not.
    before = jnp.arange(blocks.shape[0]) < jnp.arange(blocks.shape[0] + 1)[:, None]
    return Plan(first, end, jnp.sum(jnp.where(before, blocks, 0), axis=1, dtype=jnp.int32))


def why_not(q_index, pages, weights, table, start, stop) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    if q_index.ndim != 4 or pages.ndim != 3 or table.ndim != 2:
        shapes = f"{list(q_index.shape)}, {list(pages.shape)} and {list(table.shape)}"
        return f"q_index must be [B, T, J, E], pages [n, rows, E] and table [B, P], got {shapes}"
    batch, length, heads, dim = q_index.shape
    if q_index.dtype not in DTYPES or pages.dtype != q_index.dtype:
        got = f"{q_index.dtype} and {pages.dtype}"
        return f"q_index and pages must both be float8_e4m3fn or both bfloat16, got {got}"
    if heads not in HEADS or dim != DIM:
        return f"J must be one of {HEADS} and E {DIM}, got {heads} and {dim}"
    if not 1 <= length <= MAX_LENGTH:
        return f"T must be 1 to {MAX_LENGTH}, got {length}"
    rows = PAGE + (SCALE_ROWS if jnp.dtype(pages.dtype).itemsize == 1 else 0)
    if pages.shape[1:] != (rows, dim) or pages.shape[0] < 1:
        return f"pages must be [n, {rows}, {dim}] of {pages.dtype}, got {list(pages.shape)}"
    for name, array, shape, dtype in (
        ("weights", weights, (batch, length, heads), jnp.float32),
        ("table", table, (batch, table.shape[1]), jnp.int32),
        ("start", start, (batch, length), jnp.int32),
        ("stop", stop, (batch, length), jnp.int32),
    ):
        if array.shape != shape or array.dtype != dtype:
            return f"{name} must be {jnp.dtype(dtype).name} {list(shape)}, got {array.dtype} {list(array.shape)}"
    if not batch or not table.shape[1]:
        return f"B and P must be at least 1, got table {list(table.shape)}"
    # int32 counts the bytes of a row of scores, and the blocks of all sequences together.
    if max(4 * PAGE * table.shape[1], batch * table.shape[1]) >= 2**31 - 2**16:
        return f"256·P and B·P must be below 2^31 - 2^16, got table {list(table.shape)}"
    return None


def paged_index_scores(
    q_index, pages, weights, table, start, stop, *, config: Config | None = None, interpret: bool = False
):
    """Scores the keys in [start, stop) of each query, -inf elsewhere: bitwise as `index_scores` of the same keys.

    Args:
      q_index: [B, T, J, 128], float8_e4m3fn or bfloat16; T 1 to 4, J 64 or 32.
      pages: float8_e4m3fn [n, 66, 128], 64 keys and the bytes of their float32 scales, or bfloat16 [n, 64, 128].
      weights: float32 [B, T, J].
      table: int32 [B, P], the pages of each sequence. Entries of pages that no query reaches are not followed.
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys; the range may be empty, reversed, or exceed 64 · P.
      config: how the work is cut; None takes `default_config`.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      float32 [B, T, 64 · P].

    Raises:
      ValueError: if `why_not` has a reason, or the config needs more shared memory than there is.
    """
    scores = unfilled_scores(q_index, pages, weights, table, start, stop, config=config, interpret=interpret)
    position = jnp.arange(scores.shape[2])
    return jnp.where((position >= start[..., None]) & (position < stop[..., None]), scores, -jnp.inf)


def unfilled_scores(
    q_index, pages, weights, table, start, stop, *, after=(), config: Config | None = None, interpret: bool = False
):
    """Computes `paged_index_scores` for the pages that some query of the sequence reaches.

    What lies in these, out of a query's own range, is -inf; what lies in others may be anything. The kernel starts when
    the arrays `after` are there, which it does not read: so that calls can be timed one after the other.
    """
    reason = why_not(q_index, pages, weights, table, start, stop)
    if reason is not None:
        raise ValueError(f"paged_index_scores: {reason}")
    batch, length, heads, _ = q_index.shape
    size = PAGE * table.shape[1]
    config = config or default_config(pages.dtype, length, table.size)
    split = Split.of(length, heads)
    used, there = config.smem_bytes(pages.dtype, split.groups * split.queries * heads), SMEM_BYTES - BARRIER_BYTES
    if used > there:
        raise ValueError(f"config needs {used} bytes of shared memory, there are {there}: {config}")
    blocks = 2 if interpret else min(ptx.multiprocessors(), batch * -(-table.shape[1] // config.pages))
    kernel = _kernel(batch, length, heads, size, pages.dtype, config, blocks, len(after), interpret)
    scores = kernel(
        *after,
        q_index.reshape(batch, length * heads, DIM),
        pages,
        weights.reshape(batch, length * heads),
        table,
        start.reshape(batch * length),
        stop.reshape(batch * length),
        *make_plan(start, stop, size=size, config=config),
    )
    return scores.reshape(batch, length, size)


@functools.cache
def _kernel(batch, length, heads, size, dtype, config: Config, blocks: int, ignored: int, interpret: bool):
    """Makes the kernel for one shape: (*ignored, q, pages, weights, table, start, stop, *plan) -> [B · T, size]."""
    stages, block_pages = config.stages, config.pages
    queries, groups = Split.of(length, heads)
    turns = MATH_WARPGROUPS // groups  # warpgroups that take the pages of a block in turn
    rows = queries * heads  # of a warpgroup
    scaled = jnp.dtype(dtype).itemsize == 1
    swizzled = ptx.swizzled(dtype)

    def body(*refs):
        q_gmem, pages_gmem, weights_gmem, table_gmem, start_gmem, stop_gmem, *refs = refs[ignored:]
        first_gmem, end_gmem, offset_gmem, out_gmem, *refs = refs
        q_smem, weights_smem, k_union, scale_smem, q_full, q_empty, full, empty = refs
        # q_full: a sequence's queries and weights have landed. An arrival of each copy; the math warpgroups wait.
        # q_empty: they may be overwritten. An arrival of each math warpgroup, at first and when it is done with a
        # sequence; the producer waits.
        # full[stage]: a block of keys has landed. An arrival of each copy; the math warpgroups wait.
        # empty[stage]: the stage may be refilled. An arrival of each math warpgroup, at first and when it is done with
        # a block; the producer waits.
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        copied_smem, k_smem = (k_union, k_union) if interpret else tuple(k_union)
        begin, end = share_bounds(block, offset_gmem[batch], blocks)

        def for_each_sequence(work):
            """Calls `work(row, low, high)` for every sequence this block has keys of: [low, high) of the line."""
            if batch == 1:  # nothing to look for, which spares loads that wait for each other
                pl.when(begin < end)(lambda: work(jnp.int32(0), begin, end))
            else:
                for_each_part(offset_gmem, block, blocks, work)

        def produce():
            """Copies what all sequences need, as soon as there is room."""

            def copy_sequence(row, low, high):
                plgpu.barrier_wait(q_empty)
                here = pl.ds(0, length * heads)  # the rows of a query that is not there keep what they have
                plgpu.copy_gmem_to_smem(q_gmem.at[row], q_smem.at[here], q_full)
                plgpu.copy_gmem_to_smem(weights_gmem.at[row], weights_smem.at[here], q_full)
                first, stop = first_gmem[row], end_gmem[row]
                shift = lax.div(first, block_pages) - offset_gmem[row]  # from a place on the line to a block of keys

                def page_ids(position):
                    # In place of pages out of everyone's reach the nearest that is not: what the table has is unknown.
                    at = (jnp.minimum(position, high - 1) + shift) * block_pages
                    return tuple(table_gmem[row, jnp.clip(at + i, first, stop - 1)] for i in range(block_pages))

                def step(position, ids):
                    next_ids = page_ids(position + 1)  # in flight while this block waits for room
                    stage = lax.rem(position - begin, stages)
                    plgpu.barrier_wait(empty.at[stage])
                    for i, page in enumerate(ids):
                        keys = copied_smem.at[stage, pl.ds(i * PAGE, PAGE)]
                        plgpu.copy_gmem_to_smem(pages_gmem.at[page, pl.ds(0, PAGE)], keys, full.at[stage])
                        if scaled:
                            scales = scale_smem.at[stage, i]
                            source = pages_gmem.at[page, pl.ds(PAGE, SCALE_ROWS)]
                            plgpu.copy_gmem_to_smem(source, scales, full.at[stage])
                    return next_ids

                lax.fori_loop(low, high, step, page_ids(low))

            for_each_sequence(copy_sequence)
            if interpret:  # which insists that every phase of a barrier is waited for
                plgpu.barrier_wait(q_empty)
                for i in range(stages):
                    plgpu.barrier_wait(empty.at[i])

        def score():
            """Scores the pages of this math warpgroup with its queries."""
            plgpu.barrier_arrive(q_empty)
            for i in range(stages):
                plgpu.barrier_arrive(empty.at[i])
            group, turn = lax.div(warpgroup, turns), lax.rem(warpgroup, turns)
            own_rows = pl.ds(group * rows, rows)

            def score_sequence(row, low, high):
                query = row * length + group * queries
                # Before the wait: they are loaded while the queries are on their way.
                ranges = _load_ranges(start_gmem, stop_gmem, query, length - group * queries, size, queries, interpret)
                shift = lax.div(first_gmem[row], block_pages) - offset_gmem[row]
                plgpu.barrier_wait(q_full)
                # In registers for all keys of the sequence: 2 of each 8 a thread.
                weights = plgpu.load(weights_smem.at[own_rows], layout=COLUMN_LAYOUT, optimized=False)

                @pl.loop(low, high)
                def _(position):
                    stage = lax.rem(position - begin, stages)
                    plgpu.barrier_wait(full.at[stage])

                    @pl.loop(0, block_pages // turns)
                    def _(i):
                        page = i * turns + turn
                        keys = stage, pl.ds(page * PAGE, PAGE)

                        # Products and sums of a warpgroup take turns: while it sums, others multiply.
                        def multiply(accumulator):
                            plgpu.wgmma(accumulator, k_smem.at[keys], q_smem.at[own_rows].transpose((1, 0)))
                            return accumulator[...]

                        products = pl.run_scoped(multiply, ptx.ACC((PAGE, rows), jnp.float32))
                        scale = scale_smem.at[stage, page] if scaled else None
                        key = ((position + shift) * block_pages + page) * PAGE
                        _store(products, weights, scale, ranges, out_gmem, query, key, queries, interpret)

                    plgpu.barrier_arrive(empty.at[stage])  # the products are done, and the scales are in registers

                plgpu.barrier_arrive(q_empty)

            for_each_sequence(score_sequence)

        @pl.when(warpgroup == MATH_WARPGROUPS)
        def _():
            if not interpret:
                plgpu.set_max_registers(REGISTERS[1], action="decrease")
            produce()

        @pl.when(warpgroup < MATH_WARPGROUPS)
        def _():
            if not interpret:
                plgpu.set_max_registers(REGISTERS[0], action="increase")
            score()

    k_shape = stages, block_pages * PAGE, DIM
    keys = plgpu.SMEM(k_shape, dtype, transforms=swizzled)
    if not interpret:
        # The same memory twice: a copy wants the 66 rows of a page in whole tiles, which they are not. 64 rows of 128
        # bytes lie in order with tiles or without; two tiles of 64 bfloat16 columns do not, but there are no scales.
        keys = plgpu.RefUnion(plgpu.SMEM(k_shape, dtype, transforms=swizzled[-1:] if scaled else swizzled), keys)
    scratch = [  # with the KiB for FP8, one query of 64 heads and the default config
        plgpu.SMEM((groups * rows, DIM), dtype, transforms=swizzled),  # q_smem, 8
        plgpu.SMEM((groups * rows,), jnp.float32),  # weights_smem, 1
        keys,  # k_union, 128
        plgpu.SMEM((stages, block_pages, SCALE_ROWS, DIM), dtype) if scaled else None,  # scale_smem, 4
        plgpu.Barrier(num_arrivals=2),  # q_full
        plgpu.Barrier(num_arrivals=MATH_WARPGROUPS),  # q_empty
        plgpu.Barrier(num_arrivals=(1 + scaled) * block_pages, num_barriers=stages),  # full
        plgpu.Barrier(num_arrivals=MATH_WARPGROUPS, num_barriers=stages),  # empty
    ]
    return ptx.persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * length, size), jnp.float32),
        scratch_types=tuple(scratch),
        blocks=blocks,
        interpret=interpret,
        warpgroups=MATH_WARPGROUPS + 1,
    )


def _load_ranges(start_gmem, stop_gmem, row, left, size, queries, interpret):
    """Loads what `_store` needs to know of the range of this thread's query."""
    if interpret:
        return start_gmem, stop_gmem, left

    result = ptx.Result((256,), jnp.int32, PAIR_PER_THREAD)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ptx.SPLAT, ptx.SPLAT), return_type=result)
    def load(ctx, start, stop, row, left):
        pair = lane_range(start, stop, simt.scalar(row), simt.scalar(left), size, queries)
        return ptx.private_values([x.value for x in pair], PAIR_PER_THREAD)

    return load(start_gmem, stop_gmem, row, left)


def _store(products, weights, scale, ranges, out_gmem, row, key, queries, interpret):
    """Stores the scores of one page's keys for the queries of a warpgroup, whose first is `row`."""
    if interpret:
        _interpreted_store(products, weights, scale, ranges, out_gmem, row, key, queries)
        return
    scales, size = [] if scale is None else [scale], out_gmem.shape[1]
    refs = [plgpu.RefType()] * (1 + len(scales))

    @ptx.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, COLUMN_LAYOUT, PAIR_PER_THREAD, ptx.SPLAT, ptx.SPLAT, *refs),
    )
    def store(ctx, products, weights, ranges, row, key, out, *scales):
        sums = lane_sums(pairs_of(products), pairs_of(weights), queries)
        address = simt.smem_address(scales[0]) if scales else None
        low, count = map(simt.Reg, ptx.elements(ranges))
        store_tile(sums, address, low, count, out, simt.scalar(row), simt.scalar(key), size, queries)

    store(products, weights, ranges, row, key, out_gmem, *scales)


def _interpreted_store(products, weights, scale, ranges, out_gmem, row, key, queries):
    """Stores as `_store` does, in the interpreter."""
    start_gmem, stop_gmem, left = ranges
    x = jnp.where(products <= 0, 0.0, products)  # keeps NaN
    sums = jnp.sum((x * weights).reshape(PAGE, queries, -1), axis=2)
    if scale is not None:
        scales = lax.bitcast_convert_type(scale[...], jnp.uint8).reshape(PAGE, 4)
        sums = sums * lax.bitcast_convert_type(scales, jnp.float32)[:, None]
    for i in range(queries):

        @pl.when((i < left) & (key < out_gmem.shape[1]))
        def _(row=row + i, sums=sums[:, i]):
            positions = key + lax.iota(jnp.int32, PAGE)
            out_gmem[row, pl.ds(key, PAGE)] = jnp.where(
                (positions >= start_gmem[row]) & (positions < stop_gmem[row]), sums, -jnp.inf
            )
