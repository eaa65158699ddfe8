"""Computes sparse attention of a few tokens a sequence over FP8 pages, for 64 heads and their multiples, on Hopper.

A unit of work is 64 heads of one query and one part of its keys, in blocks of 64. A thread block computes one unit
after another with four warpgroups:

  warpgroup 0     logits and softmax of the even key blocks, then the left half of the columns of `out` for both
  warpgroup 1     logits of the odd key blocks, their softmax while the tensor cores add the even block's values, then
                  the right half of the columns of `out` for both
  warpgroups 2, 3 gather the left and the right half of the columns of both blocks, and convert them; see `gather_rows`

as `sparse_attention`'s kernel does with a gather that converts nothing. A unit with a single block has it even.

Latents, the latent columns of Q and P are half precision, which is faster to convert to than bfloat16 and has 11 bits
instead of 8; rotary columns are bfloat16, so some memory has two types. Q is converted when it has landed: a kernel of
its own would take 10 µs at batch 128. A block of keys that half precision cannot hold comes in bfloat16; then P is
bfloat16 too, and Q is converted on its way to the tensor cores.

What limits it: with room for two blocks of keys, copying, converting and multiplying a block wait for each other. In a
prototype at K 2048, S 32768, batch 128, 128 heads, gather and conversion alone took 156 µs on an H200, the
multiplication alone 133, the traffic of shared memory 108.

Measured there: 180.9 µs at batch 128, and 184.3 with the softmax of the odd block before the even block's values. To
start a block's copies as soon as its slot is released, while the last block's are under way, took longer: 186.4, and at
batch 16 in four splits 41.5, where 38.8 were measured without either. With a gather that looked up fewer blocks in
advance, 64 heads took 103.8 at batch 128, and 128 heads at batch 1, whose parts are single blocks, 13.5 with the kernel
that joins them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.decode import gather_rows
from dsa_jax.pallas_kernels.decode.bfloat16_products import multiply_as_bfloat16
from dsa_jax.pallas_kernels.decode.gather_rows import DIM, HALF_COLUMNS, PAGE_ROWS, VALUE_DIM
from dsa_jax.pallas_kernels.decode.half_query import convert_query
from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_HEADS,
    BLOCK_KEYS,
    LOG2E,
    MAXIMUM_FLOOR,
    RESCALE_LOG2,
    ROW_LAYOUT,
    SWIZZLED_COLUMNS,
)

WARPGROUPS = 4
ACC_COLUMNS = 128  # of one accumulator: four warpgroups start with 128 registers, too few for a wgmma of 256 columns
ACCS = HALF_COLUMNS // ACC_COLUMNS  # accumulators of a warpgroup
LAUNCH_REGISTERS = ptx.launch_registers(WARPGROUPS)

# The compute warpgroups tell each other these, one value a head.
EVEN_MAX, ODD_MAX, EVEN_FACTOR, ODD_SUM = range(4)
# Warpgroup 1 has read both when odd_barrier completes for the last time, and q_barrier comes before their next use.
# With a single block, sum_barriers comes before.
LSE, EVEN_SUM = EVEN_MAX, EVEN_FACTOR


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the kernel; no result depends on it.

    Attributes:
      compute_registers: of a thread of the two compute warpgroups: 128 hold 64 × 256 of the accumulator in float32, 32
        the 64 × 64 logits. The gathering warpgroups have the rest.
      blocks: thread blocks at most; None for one on each multiprocessor.
      packed_q: whether the latent columns of q come in half precision, their bits taken for bfloat16; see `pack_query`.
    """

    compute_registers: int = 200
    blocks: int | None = None
    packed_q: bool = False

    def __post_init__(self):
        if not LAUNCH_REGISTERS <= self.compute_registers <= 232 or self.compute_registers % 8:
            raise ValueError(
                f"compute_registers must be a multiple of 8 from {LAUNCH_REGISTERS} to 232, "
                f"got {self.compute_registers}"
            )
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")

    @property
    def gather_registers(self) -> int:
        """Registers of a thread of the gathering warpgroups."""
        return 2 * LAUNCH_REGISTERS - self.compute_registers


def attend_many_heads(q, pool, table, indices, *, scale: float, splits: int, config: Config, after=None):
    """Computes the attention of each query to each part of its keys.

    Args:
      q: [B·T, N, 576] bfloat16, N a multiple of 64.
      pool: [n·64, 656] uint8.
      table: [B, P] int32.
      indices: [B·T, K] int32, K a multiple of 64 · `splits`, and of 128 · `splits` unless it is just that.
      scale: of the logits.
      splits: parts of the keys.
      config: tuning.
      after: an array that is not read; what makes it runs first.

    Returns:
      out [B·T, N, 512] bfloat16 and lse [B·T, N] float32, both with `splits` in front and `out` in float32 if there
      is more than one.
    """
    kernel = _kernel(q.shape, table.shape, indices.shape[1] // BLOCK_KEYS, scale, splits, config, after is not None)
    return kernel(q, pool, table, indices, *(() if after is None else (after,)))


def _kernel(q_shape, table_shape, key_blocks, scale, splits, config, has_after):
    """Makes the kernel for q [B·T, N, 576], table [B, P] and indices [B·T, 64·key_blocks]."""
    queries, heads, _ = q_shape
    head_blocks = heads // BLOCK_HEADS
    units = queries * head_blocks * splits
    per_batch = queries // table_shape[0]
    size = table_shape[1] * PAGE_ROWS
    single = key_blocks == splits  # one block of keys a unit
    pairs = 1 if single else key_blocks // splits // 2
    slots = 1 if single else 2
    grid = min(units, config.blocks or ptx.multiprocessors())
    log2_scale = scale * LOG2E

    def body(q_gmem, pool_gmem, table_gmem, indices_gmem, *refs):
        (
            out_gmem, lse_gmem, q_union, k_union, p_odd_union, rows_smem, gathered, q_barrier, q_ready,
            even_barrier, odd_barrier, sum_barriers,
        ) = refs[int(has_after):]  # fmt: skip
        # The same memory twice: bfloat16, and half precision for latents, Q's latent columns and P.
        (q_smem, q_half_smem), (k_smem, k_half_smem) = list(q_union), list(k_union)
        # The logits of an even block are done when its probabilities are written, so its rotary columns are free; the
        # right gathering warpgroup waits for both halves of slot 0 before it refills them.
        rotary = pl.ds(VALUE_DIM, SWIZZLED_COLUMNS)
        p_odd_refs = list(p_odd_union)

        def p_even(zero):
            return k_smem.at[zero, :, rotary], k_half_smem.at[zero, :, rotary]

        def p_odd(zero):
            return tuple(ref.at[zero] for ref in p_odd_refs)

        def rows(i, zero: Any = 0):
            """Refers to one value a head that the compute warpgroups tell each other."""
            return rows_smem.at[zero + i]

        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        items = lax.div(units - 1 - block, grid) + 1  # units of this block
        gather_rows.init_barriers(gathered)

        def place(item):
            """Gives query, split and first head of a unit: neighbours have the same keys and other heads."""
            part, head_block = lax.div(block + item * grid, head_blocks), lax.rem(block + item * grid, head_blocks)
            return lax.div(part, splits), lax.rem(part, splits), head_block * BLOCK_HEADS

        def gather(half):
            """Gathers half of the columns of all key blocks, a unit's after the other's."""
            plgpu.set_max_registers(config.gather_registers, action="decrease")
            unit_blocks = pairs * slots
            total = items * unit_blocks

            def at(n):
                """Gives query, split and number in its unit of the n-th key block; the last one's behind it."""
                n = jnp.minimum(n, total - 1)
                query, split, _ = place(lax.div(n, unit_blocks))
                return query, split, lax.rem(n, unit_blocks)

            def load_positions(n):
                query, split, i = at(n)
                first = (split * unit_blocks + i) * BLOCK_KEYS
                return gather_rows.load_positions(indices_gmem.at[query, pl.ds(first, BLOCK_KEYS)])

            def load_pages(n, positions):
                return gather_rows.load_pages(positions, table_gmem.at[lax.div(at(n)[0], per_batch)], size)

            def start(n, slot, rows):
                """Starts the copies of the n-th block when its slot is free."""
                parity = lax.rem(lax.div(n, slots) + 1, 2)
                gather_rows.wait_free(gathered, 2 * slot + half, parity, also=p_halves(slot))
                gather_rows.start_copies(rows, pool_gmem, k_smem.at[slot], half, gathered, 2 * slot + half)

            def p_halves(slot):
                """Lists the other halves whose release frees this one: P of the even block is in rotary columns."""
                return (0,) if half and slot == 0 else ()

            def step(i, carry):
                # The copies of this block have started. Of the next one are known: rows; of the one after: positions.
                # Each load has a block's time before its result is used.
                rows, scales, next_rows, positions = carry
                for slot in range(slots):
                    n, other = i * slots + slot, (slot + 1) % slots
                    pages = load_pages(n + 2, positions)
                    next_positions = load_positions(n + 3)
                    next_scales = gather_rows.load_scales(next_rows, pool_gmem)
                    late = n + 1 < total
                    gather_rows.close_without_copies()
                    fits = gather_rows.choose_type(rows, scales, gathered, 2 * slot + half, half)
                    gather_rows.convert(scales, fits, k_smem.at[slot], gathered, 2 * slot + half, half, pending=1)
                    pl.when(late)(functools.partial(start, n + 1, other, next_rows))
                    rows, scales, next_rows = next_rows, next_scales, gather_rows.slots_of(positions, pages, size)
                    positions = next_positions
                return rows, scales, next_rows, positions

            first, second = load_positions(0), load_positions(1)
            rows = gather_rows.slots_of(first, load_pages(0, first), size)
            start(0, 0, rows)
            scales = gather_rows.load_scales(rows, pool_gmem)
            next_rows = gather_rows.slots_of(second, load_pages(1, second), size)
            lax.fori_loop(0, items * pairs, step, (rows, scales, next_rows, load_positions(2)))

        def over(row_values, columns):
            """Repeats one value a head along `columns` columns."""
            return lax.broadcast_in_dim(row_values, (BLOCK_HEADS, columns), [0])

        def row_values(ref):
            """Loads one value a head from shared memory."""
            return plgpu.load(ref, layout=ROW_LAYOUT, optimized=False)

        def load_q(item):
            """Starts the copy of Q of a unit. Only warpgroup 0 calls it, when nobody reads the last Q any more."""
            query, _, first_head = place(item)
            plgpu.copy_gmem_to_smem(q_gmem.at[query, pl.ds(first_head, BLOCK_HEADS)], q_smem.at[0], q_barrier)

        def take_q(half):
            """Waits for Q; each compute warpgroup converts half of its heads, and waits for the other one."""
            plgpu.barrier_wait(q_barrier)
            if not config.packed_q:
                convert_query(q_smem.at[0], half * BLOCK_HEADS // 2, BLOCK_HEADS // 2)
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_ready)
                plgpu.barrier_wait(q_ready)

        def logits(item, pair, slot, zero):
            """Computes Q · K of a key block, ready for exp2, [64 heads, 64 keys], and whether its type is bfloat16."""
            parity = lax.rem(item * pairs + pair, 2)
            left, right = pl.ds(0, HALF_COLUMNS), pl.ds(HALF_COLUMNS, HALF_COLUMNS)
            ptx.wait_gather(gathered, 2 * slot, parity)
            wide = gather_rows.is_bfloat16(gathered, 2 * slot)
            mask = gather_rows.key_mask(gathered, slot)

            def in_half(acc):
                def add(q_ref, k_ref, columns):
                    plgpu.wgmma(acc, q_ref.at[zero, :, columns], k_ref.at[zero + slot, :, columns].transpose((1, 0)))

                add(q_half_smem, k_half_smem, left)
                ptx.wait_gather(gathered, 2 * slot + 1, parity)
                add(q_half_smem, k_half_smem, right)
                add(q_smem, k_smem, rotary)
                return acc[...]

            def in_bfloat16():
                ptx.wait_gather(gathered, 2 * slot + 1, parity)
                return multiply_as_bfloat16(q_smem.at[0], k_smem.at[slot], "a")

            shape = ptx.ACC((BLOCK_HEADS, BLOCK_KEYS), jnp.float32)
            s = lax.cond(wide, in_bfloat16, lambda: pl.run_scoped(in_half, shape))
            # Scaled before the maximum is taken: right for any sign.
            return gather_rows.drop_absent_keys(s * log2_scale, mask, 1), wide

        def raised(maximum, block_max):
            """Chooses the reference of exponents: the maximum, unless the old one is at most RESCALE_LOG2 below."""
            return jnp.where(block_max > maximum + RESCALE_LOG2, block_max, maximum)

        def store_p(p_refs, p, wide):
            """Writes the probabilities of a block in the type of its keys."""
            p_smem, p_half_smem = p_refs

            @pl.when(wide)
            def _():
                p_smem[...] = p.astype(jnp.bfloat16)

            @pl.when(~wide)
            def _():
                p_half_smem[...] = p.astype(jnp.float16)

        def products(accs, p_refs, slot, first, zero, wide, meanwhile=None):
            """Adds P · V to accumulators for the columns of the values from `first`; runs `meanwhile` beside it."""

            def add(p_ref, k_ref):
                def product(refs):
                    for i, ref in enumerate(refs):
                        values = k_ref.at[zero + slot, :, pl.ds(first + ACC_COLUMNS * i, ACC_COLUMNS)]
                        plgpu.wgmma(ref, p_ref, values)
                    if meanwhile:
                        meanwhile()
                    plgpu.wgmma_wait(0)

                return lambda xs: pl.run_state(product)(tuple(ptx.ACC.init(x) for x in xs))

            return lax.cond(wide, add(p_refs[0], k_smem), add(p_refs[1], k_half_smem), accs)

        def add_values(accs, factor, p_refs, slot, first, zero, wide, meanwhile=None):
            """Computes factor · accumulators + P · V for the columns of the values from `first`."""
            # A vote of the warp skips the multiplications where no row has a new maximum: that is most of the time.
            accs = lax.cond(
                ptx.any_factor_not_one(factor),
                lambda xs: tuple(x * over(factor, ACC_COLUMNS) for x in xs),
                lambda xs: xs,
                accs,
            )
            return products(accs, p_refs, slot, first, zero, wide, meanwhile)

        def release(slot, half, condition=True):
            """Lets a gathering warpgroup refill half a slot."""
            if slot < slots:
                pl.when(condition)(lambda: gather_rows.release(gathered, 2 * slot + half))

        def initial():
            """Makes the state before the first key: accumulators, maximum and denominator."""
            rows = jnp.full((BLOCK_HEADS,), MAXIMUM_FLOOR, jnp.float32), jnp.zeros((BLOCK_HEADS,), jnp.float32)
            zeros = plgpu.layout_cast(jnp.zeros((BLOCK_HEADS, ACC_COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
            return (zeros,) * ACCS, *(plgpu.layout_cast(x, ROW_LAYOUT) for x in rows)

        def all_pairs(step):
            """Runs `step` for the pairs of key blocks of a unit."""
            # For a loop of one turn that the compiler knows, it wants more registers than there are.
            return lax.fori_loop(0, pairs + (ptx.opaque_zero() if pairs == 1 else 0), step, initial())

        def store_out(item, accs, denominator, first):
            """Writes `out` of this warpgroup's columns: parts straight from registers, a whole through key slot 1."""
            query, split, first_head = place(item)
            inverse = jnp.where(denominator == 0, 0.0, 1 / denominator)  # a query without keys has zeros
            for i, acc in enumerate(accs):
                columns = pl.ds(first + ACC_COLUMNS * i, ACC_COLUMNS)
                x = acc * over(inverse, ACC_COLUMNS)
                if splits > 1:
                    out_gmem.at[split, query, pl.ds(first_head, BLOCK_HEADS), columns][...] = x
                else:
                    k_smem[1, :, columns] = x.astype(jnp.bfloat16)
            if splits == 1:
                plgpu.commit_smem()
                columns = pl.ds(first, HALF_COLUMNS)
                for row in range(0, BLOCK_HEADS, 8):  # eight rows are contiguous in tiles
                    plgpu.copy_smem_to_gmem(
                        k_smem.at[1, pl.ds(row, 8), columns], out_gmem.at[query, pl.ds(first_head + row, 8), columns]
                    )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def compute_even():
            plgpu.set_max_registers(config.compute_registers, action="increase")
            load_q(0)

            @pl.loop(0, items)
            def _(item):
                take_q(0)

                def step(pair, carry):
                    accs, old_max, denominator = carry
                    zero = ptx.opaque_zero()
                    x, wide = logits(item, pair, 0, zero)
                    even_max = raised(old_max, x.max(axis=1))
                    factor = jnp.exp2(old_max - even_max)
                    p = jnp.exp2(x - over(even_max, BLOCK_KEYS))
                    if single:
                        store_p(p_even(zero), p, wide)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(even_barrier)
                        accs = products(accs, p_even(zero), 0, 0, zero, wide)
                        release(0, 0)
                        return accs, even_max, p.sum(axis=1)
                    # To warpgroup 1: it adds the even block's values to its half, and its softmax starts from even_max.
                    store_p(p_even(zero), p, wide)
                    rows(EVEN_MAX, zero)[...] = even_max
                    rows(EVEN_FACTOR, zero)[...] = factor
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(even_barrier)
                    denominator = denominator * factor + p.sum(axis=1)
                    accs = add_values(accs, factor, p_even(zero), 0, 0, zero, wide)
                    release(0, 0)
                    plgpu.barrier_wait(odd_barrier)  # warpgroup 1 has been at its softmax meanwhile

                    @pl.when((pair == pairs - 1) & (item + 1 < items))
                    def _():  # both warpgroups have read Q for the last time
                        load_q(item + 1)

                    odd_max = row_values(rows(ODD_MAX, zero))
                    factor = jnp.exp2(even_max - odd_max)
                    accs = add_values(accs, factor, p_odd(zero), 1, 0, zero, gather_rows.is_bfloat16(gathered, 2))
                    release(1, 0, pair < pairs - 1)  # the last time `out` goes through this half first
                    return accs, odd_max, denominator * factor

                accs, maximum, denominator = all_pairs(step)
                if single:  # warpgroup 1 has no logits to read Q for, but converts half of it
                    plgpu.barrier_wait(sum_barriers.at[1])
                    pl.when(item + 1 < items)(lambda: load_q(item + 1))
                    rows(EVEN_SUM)[...] = denominator
                    plgpu.barrier_arrive(sum_barriers.at[0])
                else:  # the denominators of the even and of the odd blocks, both over the last maximum
                    rows(EVEN_SUM)[...] = denominator
                    plgpu.barrier_arrive(sum_barriers.at[0])
                    plgpu.barrier_wait(sum_barriers.at[1])
                    denominator = denominator + row_values(rows(ODD_SUM))
                # The natural logarithm; the maximum is one of powers of two. A denominator of NaN shows in it.
                rows(LSE)[...] = jnp.where(denominator == 0, -jnp.inf, maximum * math.log(2) + jnp.log(denominator))
                plgpu.commit_smem()
                query, split, first_head = place(item)
                there = (query,) if splits == 1 else (split, query)
                plgpu.copy_smem_to_gmem(rows(LSE), lse_gmem.at[(*there, pl.ds(first_head, BLOCK_HEADS))])
                store_out(item, accs, denominator, 0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                release(1, 0)

        def compute_odd():
            plgpu.set_max_registers(config.compute_registers, action="increase")
            plgpu.barrier_arrive(q_barrier)  # for the first unit: there is none before it

            @pl.loop(0, items)
            def _(item):
                take_q(1)

                def step(pair, carry):
                    accs, _, denominator = carry
                    zero = ptx.opaque_zero()
                    if single:
                        plgpu.barrier_wait(even_barrier)
                        ptx.wait_gather(gathered, 1, lax.rem(item, 2))
                        wide = gather_rows.is_bfloat16(gathered, 1)
                        accs = products(accs, p_even(zero), 0, HALF_COLUMNS, zero, wide)
                        release(0, 1)
                        return accs, denominator, denominator
                    x, wide = logits(item, pair, 1, zero)  # while warpgroup 0 is in its softmax
                    plgpu.barrier_wait(even_barrier)
                    even_max, even_factor = row_values(rows(EVEN_MAX, zero)), row_values(rows(EVEN_FACTOR, zero))

                    def softmax():
                        odd_max = raised(even_max, x.max(axis=1))
                        p = jnp.exp2(x - over(odd_max, BLOCK_KEYS))
                        store_p(p_odd(zero), p, wide)
                        rows(ODD_MAX, zero)[...] = odd_max
                        rows(ODD_SUM, zero)[...] = p.sum(axis=1)  # parked: registers are short until P · V is done
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(odd_barrier)

                    even_wide = gather_rows.is_bfloat16(gathered, 1)
                    accs = add_values(accs, even_factor, p_even(zero), 0, HALF_COLUMNS, zero, even_wide, softmax)
                    release(0, 1)
                    odd_max = row_values(rows(ODD_MAX, zero))  # like the sum below, read back rather than kept
                    factor = jnp.exp2(even_max - odd_max)
                    accs = add_values(accs, factor, p_odd(zero), 1, HALF_COLUMNS, zero, wide)
                    release(1, 1, pair < pairs - 1)
                    denominator = denominator * (even_factor * factor) + row_values(rows(ODD_SUM, zero))
                    return accs, odd_max, denominator

                accs, _, denominator = all_pairs(step)
                if not single:
                    rows(ODD_SUM)[...] = denominator
                plgpu.barrier_arrive(sum_barriers.at[1])
                plgpu.barrier_wait(sum_barriers.at[0])
                even_sum = row_values(rows(EVEN_SUM))
                denominator = even_sum if single else denominator + even_sum

                @pl.when(item + 1 < items)
                def _():
                    plgpu.barrier_arrive(q_barrier)

                store_out(item, accs, denominator, HALF_COLUMNS)
                release(1, 1)

        pl.when(warpgroup == 0)(compute_even)
        pl.when(warpgroup == 1)(compute_odd)
        pl.when(warpgroup == 2)(lambda: gather(0))
        pl.when(warpgroup == 3)(lambda: gather(1))

    transforms = ptx.swizzled(jnp.bfloat16)

    def two_types(shape):
        return plgpu.RefUnion(*(plgpu.SMEM(shape, x, transforms=transforms) for x in (jnp.bfloat16, jnp.float16)))

    lead = () if splits == 1 else (splits,)
    return ptx.persistent_kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*lead, queries, heads, VALUE_DIM), jnp.bfloat16 if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((*lead, queries, heads), jnp.float32),
        ),
        scratch_types=(  # 227 KiB, all there is
            two_types((1, BLOCK_HEADS, DIM)),  # q_union, 72 KiB
            two_types((2, BLOCK_KEYS, DIM)),  # k_union, 144
            two_types((1, BLOCK_HEADS, BLOCK_KEYS)),  # p_odd_union, 8
            plgpu.SMEM((4, BLOCK_HEADS), jnp.float32),  # rows_smem, 1: what the compute warpgroups tell each other
            gather_rows.block_barriers(2),  # gathered, 1: slot 0 or 1 × left or right columns have landed, or are free
            # Pallas' barriers, 1. Q has landed, and warpgroup 1 is done with the unit before: an arrival each.
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),  # q_ready: Q is converted; both compute warpgroups arrive and wait
            plgpu.Barrier(),  # even_barrier: P and the maxima of the even block are there, from warpgroup 0 to 1
            plgpu.Barrier(),  # odd_barrier: those of the odd block, from warpgroup 1 to 0
            plgpu.Barrier(num_barriers=2),  # sum_barriers: a unit's denominators, from warpgroup 0 and from 1
        ),
        blocks=grid,
        interpret=False,
        warpgroups=WARPGROUPS,
        approx_math=True,
    )
