"""Computes sparse attention forward for 64 heads and their multiples, bfloat16, on Hopper.

A block computes one query × 64 heads at a time with three warpgroups; keys go by in pairs of 64-key blocks:

  warpgroup 0   logits and softmax of the even key blocks, then the left half of the columns of `out` for both
  warpgroup 1   logits and softmax of the odd key blocks, then the right half of the columns of `out` for both
  warpgroup 2   gathers the rows of both blocks, each in two halves of its columns

so that the tensor cores work for one compute warpgroup while the other is in its softmax, and each of them holds only
half of the accumulator. The probabilities of both blocks go through shared memory, since both warpgroups need both. A
half of a key slot is refilled as soon as the warpgroup that owns these columns has finished with it. The accumulator is
rescaled only when a maximum has grown by more than `RESCALE_LOG2`.

Measured on an H200 at T 4096, N 128, C 512, R 64, K 2048, in TFLOP/s of 40 ms bursts [sustained under its 700 W], with
a bfloat16 matmul at 789 [696] in the same run: 677 [591] at S 8192, 613 [543] at S 131072. At S 8192 the schedule and
shared memory limit it, of which 227 KiB hold two 64-key blocks and no third, and the power: with a fifth of the gather
it sustains 621 instead of 612. At S 131072 the gather comes on top: alone it reaches 5.5 TB/s there, and 9.1 at S 8192.
Alternatives were slower, each against the same kernel without it in one earlier run, at S 8192 and at S 131072:

  warpgroup 1 multiplies the even block's values during its softmax   653 instead of 659   550 instead of 582
  rows are called into L2 one pair ahead                              653 instead of 654   550 instead of 587
  a block for every query and 64 heads, nothing gathered across       647 instead of 653   572 instead of 587
  the probabilities of the even block straight from registers         636 instead of 653
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_HEADS,
    BLOCK_KEYS,
    LOG2E,
    MAXIMUM_FLOOR,
    PAIR_KEYS,
    RESCALE_LOG2,
    ROW_LAYOUT,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the kernel; no result depends on it.

    Attributes:
      compute_registers: of a thread of the two compute warpgroups: 128 hold 64 × 256 of the accumulator in float32, 32
        the 64 × 64 logits. The gathering warpgroup has the rest.
      blocks: how many thread blocks share the work; None for one on each multiprocessor. With n blocks, block i takes
        items i, i + n, …, each a query and 64 heads: the rows of the next are gathered while the last is written.
    """

    compute_registers: int = 216
    blocks: int | None = None

    def __post_init__(self):
        if not ptx.LAUNCH_REGISTERS <= self.compute_registers <= 240 or self.compute_registers % 8:
            raise ValueError(
                f"compute_registers must be a multiple of 8 from {ptx.LAUNCH_REGISTERS} to 240, "
                f"got {self.compute_registers}"
            )
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")

    @property
    def gather_registers(self) -> int:
        """Registers of a thread of the gathering warpgroup."""
        return ptx.registers_left(self.compute_registers)


def smem_bytes(value_dim: int, dim: int) -> int:
    """Counts the bytes of shared memory of one block: 227 KiB, all there is, for C 512 and R 64."""
    row = 2 * dim
    q = BLOCK_HEADS * row
    slots = PAIR_KEYS * row  # and `out` at the end
    p = BLOCK_HEADS * BLOCK_KEYS * 2  # one: that of the even blocks lies in the rotary columns of its own slot
    p_even = 0 if dim > value_dim else p
    return q + slots + p + p_even + 3 * SMEM_GRANULE_BYTES  # `rows`, and the barriers of gathers and of Pallas


def column_halves(value_dim: int, dim: int) -> tuple[tuple[int, int], ...]:
    """Splits the columns between warpgroups 0 and 1: (first, count) of each; there is no second half for C 64, R 0."""
    left = pl.cdiv(value_dim, 2 * SWIZZLED_COLUMNS) * SWIZZLED_COLUMNS
    return ((0, left), (left, dim - left))[: 1 if left == dim else 2]


def sparse_attention_many_heads(
    q, kv, indices, *, value_dim: int, scale: float, config: Config | None = None, interpret: bool = False
):
    """Computes `sparse_attention`, which has checked the arguments, for N a multiple of 64.

    Args:
      q: [B·T, N, H] bfloat16.
      kv: [B, S, H] bfloat16.
      indices: [B·T, K] int32, K a multiple of `PAIR_KEYS`.
      value_dim: C.
      scale: of the logits.
      config: tuning.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      out [B·T, N, C] bfloat16 and lse [B·T, N] float32.
    """
    return _kernel(q.shape, kv.shape, value_dim, scale, config or Config(), interpret)(q, kv, indices)


def _kernel(q_shape, kv_shape, value_dim, scale, config, interpret):
    """Makes the kernel for (q, kv, indices) of these shapes."""
    queries, heads, dim = q_shape
    blocks = min(queries * (heads // BLOCK_HEADS), config.blocks or ptx.multiprocessors())
    p_shape = (BLOCK_HEADS, BLOCK_KEYS)
    swizzled = ptx.swizzled(jnp.bfloat16)
    scratch = dict(
        q_smem=plgpu.SMEM((1, BLOCK_HEADS, dim), jnp.bfloat16, transforms=swizzled),
        k_smem=plgpu.SMEM((2, BLOCK_KEYS, dim), jnp.bfloat16, transforms=swizzled),
        p_odd_smem=plgpu.SMEM(p_shape, jnp.bfloat16, transforms=swizzled),
        p_even_smem=None if dim > value_dim else plgpu.SMEM(p_shape, jnp.bfloat16, transforms=swizzled),
        rows_smem=plgpu.SMEM((4 * BLOCK_HEADS,), jnp.float32),
        gathered_barriers=ptx.gather_barriers(4, interpret),
        # Q has landed, and warpgroup 1 is done with the query before: an arrival each.
        q_barrier=plgpu.Barrier(num_arrivals=2),
        # Half of a key slot may be refilled: slot 0 or 1 × left or right columns. One arrival, of the compute warpgroup
        # that owns the columns; the gathering one waits.
        free_barriers=plgpu.Barrier(num_barriers=4),
        # P, maximum and factor of an even block are in shared memory. One arrival, of warpgroup 0; warpgroup 1 waits.
        even_barrier=plgpu.Barrier(),
        # P and maximum of an odd block are in shared memory, and both warpgroups have their products with Q behind
        # them. One arrival, of warpgroup 1; warpgroup 0 waits.
        odd_barrier=plgpu.Barrier(),
        # The denominator of warpgroup i is in shared memory. One arrival, of warpgroup i; the other waits.
        sum_barriers=plgpu.Barrier(num_barriers=2),
    )
    names = [name for name, kind in scratch.items() if kind is not None]  # their order is that of the memory

    def body(q_gmem, kv_gmem, indices_gmem, out_gmem, lse_gmem, *refs):
        _block(
            q_gmem, kv_gmem, indices_gmem, out_gmem, lse_gmem, **dict(zip(names, refs, strict=True)),
            blocks=blocks, per_batch=queries // kv_shape[0], value_dim=value_dim, scale=scale, config=config,
            interpret=interpret,
        )  # fmt: skip

    return ptx.persistent_kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((queries, heads, value_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((queries, heads), jnp.float32),
        ),
        scratch_types=[scratch[name] for name in names],
        blocks=blocks,
        interpret=interpret,
        approx_math=True,
    )


def _block(
    q_gmem,  # [B·T, N, H] bfloat16
    kv_gmem,  # [B, S, H] bfloat16
    indices_gmem,  # [B·T, K] int32
    out_gmem,  # [B·T, N, C] bfloat16
    lse_gmem,  # [B·T, N] float32
    *,
    q_smem,  # [1, 64, H], 72 KiB for H 576
    k_smem,  # [2, 64, H], 144 KiB: slot 0 the even key blocks, slot 1 the odd ones and `out` at the end
    p_odd_smem,  # [64, 64], 8 KiB
    rows_smem,  # 4 × [64], one value a head: what the warpgroups tell each other
    gathered_barriers,  # slot 0 or 1 × left or right columns have landed
    q_barrier,
    free_barriers,
    even_barrier,
    odd_barrier,
    sum_barriers,
    blocks: int,
    per_batch: int,
    value_dim: int,
    scale: float,
    config: Config,
    interpret: bool,
    p_even_smem=None,  # [64, 64] when there are no rotary columns to hold it
):
    """Runs one thread block: parts its three warpgroups into roles, which go through the block's items in step."""
    _, size, dim = kv_gmem.shape
    pairs = indices_gmem.shape[1] // PAIR_KEYS
    head_blocks = q_gmem.shape[1] // BLOCK_HEADS
    block = lax.axis_index("block")
    items = lax.div(q_gmem.shape[0] * head_blocks - 1 - block, blocks) + 1  # of this block
    halves = column_halves(value_dim, dim)
    log2_scale = scale * LOG2E
    if p_even_smem is None:
        # The logits of an even block are done when its probabilities are written, so its rotary columns are free. They
        # stay so until both warpgroups have used P: the gathering one waits for both halves before refilling the right.
        p_even_smem = k_smem.at[0, :, pl.ds(value_dim, SWIZZLED_COLUMNS)]
    even_max_smem, odd_max_smem, even_factor_smem, odd_sum_smem = (
        rows_smem.at[pl.ds(BLOCK_HEADS * i, BLOCK_HEADS)] for i in range(4)
    )
    # Warpgroup 1 has read both when odd_barrier completes for the last time, and q_barrier comes before their next use.
    lse_smem, even_sum_smem = even_max_smem, even_factor_smem
    ptx.init_gather_barriers(gathered_barriers, 4, interpret)

    def place(item):
        """Gives the query and first head of an item of this block: neighbours have the same query, its other heads."""
        item = block + item * blocks
        return lax.div(item, head_blocks), lax.rem(item, head_blocks) * BLOCK_HEADS

    def over(row_values, columns):
        """Repeats one value a head along `columns` columns."""
        return lax.broadcast_in_dim(row_values, (BLOCK_HEADS, columns), [0])

    def row_values(ref):
        """Loads one value a head from shared memory."""
        return plgpu.load(ref, layout=ROW_LAYOUT, optimized=False)

    def load_q(item):
        """Starts the copy of Q of an item. Only warpgroup 0 calls it, when nobody reads the last Q any more."""
        query, first_head = place(item)
        plgpu.copy_gmem_to_smem(q_gmem.at[query, pl.ds(first_head, BLOCK_HEADS)], q_smem.at[0], q_barrier)

    def key_block(query, pair, slot):
        """Refers to the 64 indices of a query's even (`slot` 0) or odd (1) key block of a pair."""
        return indices_gmem.at[query, pl.ds((2 * pair + slot) * BLOCK_KEYS, BLOCK_KEYS)]

    def key_ids(item, pair, slot):
        """Loads the ids that `logits` needs. Called a pair ahead: the compiler waits for loads where they are used."""
        return ptx.load_key_ids(key_block(place(item)[0], jnp.minimum(pair, pairs - 1), slot), interpret)

    def products(item, pair, slot, zero):
        """Computes Q · K of a key block, [64 heads, 64 keys]: each half of the columns as soon as it has landed."""
        parity = lax.rem(item * pairs + pair, 2)

        def product(accumulator):
            for half, (start, columns) in enumerate(halves):
                ptx.wait_gather(gathered_barriers, 2 * slot + half, parity, interpret)
                columns = pl.ds(start, columns)
                keys = k_smem.at[zero + slot, :, columns]
                plgpu.wgmma(accumulator, q_smem.at[zero, :, columns], keys.transpose((1, 0)))
            return accumulator[...]

        return pl.run_scoped(product, ptx.ACC((BLOCK_HEADS, BLOCK_KEYS), jnp.float32))

    def logits(s, ids):
        """Scales products for exp2, and puts -inf where there is no key."""
        # Scaled before the maximum is taken: right for any sign, and no fused rounding lets a weight exceed its bound.
        return ptx.drop_absent_keys(s * log2_scale, ids, size, interpret)

    def raised(maximum, block_max):
        """Chooses the reference of exponents: the maximum seen, unless the old one is at most RESCALE_LOG2 below."""
        return jnp.where(block_max > maximum + RESCALE_LOG2, block_max, maximum)

    def add_values(accumulator, factor, p_smem, slot, columns, zero):
        """Computes factor · accumulator + P · V for the columns (first, count) of the values."""
        if columns[1] == 0:
            return accumulator
        # A vote of the warp skips the multiplications where no row has a new maximum: that is most of the time.
        accumulator = lax.cond(
            ptx.any_factor_not_one(factor, interpret), lambda x: x * over(factor, columns[1]), lambda x: x, accumulator
        )
        values = k_smem.at[zero + slot, :, pl.ds(*columns)]

        def product(ref):
            plgpu.wgmma(ref, p_smem, values)
            return ref[...] if interpret else None

        if interpret:  # which has no accumulators that start from a value
            return accumulator + pl.run_scoped(product, ptx.ACC(accumulator.shape, jnp.float32))
        return pl.run_state(product)(ptx.ACC.init(accumulator))

    def release(slot, half, condition=True):
        """Lets the gathering warpgroup refill half a slot, if there is such a half."""
        if half < len(halves):
            pl.when(condition)(lambda: plgpu.barrier_arrive(free_barriers.at[2 * slot + half]))

    def initial(columns):
        """Makes the state before the first key: accumulator, maximum and denominator."""
        rows = jnp.full((BLOCK_HEADS,), MAXIMUM_FLOOR, jnp.float32), jnp.zeros((BLOCK_HEADS,), jnp.float32)
        return (
            columns and plgpu.layout_cast(jnp.zeros((BLOCK_HEADS, columns), jnp.float32), plgpu.Layout.WGMMA),
            *(plgpu.layout_cast(x, ROW_LAYOUT) for x in rows),
        )

    def store_out(item, accumulator, denominator, columns):
        """Writes `out` over the columns of key slot 1 that this warpgroup read last, and from there to its place."""
        start, count = columns
        if count == 0:
            return
        query, first_head = place(item)
        inverse = jnp.where(denominator == 0, 0.0, 1 / denominator)  # a query without keys has zeros
        k_smem[1, :, pl.ds(start, count)] = (accumulator * over(inverse, count)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        for row in range(0, BLOCK_HEADS, 8):  # eight rows are contiguous in tiles
            plgpu.copy_smem_to_gmem(
                k_smem.at[1, pl.ds(row, 8), pl.ds(start, count)],
                out_gmem.at[query, pl.ds(first_head + row, 8), pl.ds(start, count)],
            )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(lax.axis_index("warpgroup") == 2)
    def _gather():
        plgpu.set_max_registers(config.gather_registers, action="decrease")
        steps = items * pairs  # pairs of key blocks, one item's after the other's

        def at(step):
            """Gives the query and the pair of a step; those of the last for steps behind it."""
            step = jnp.minimum(step, steps - 1)
            query, _ = place(lax.div(step, pairs))
            return query, lax.rem(step, pairs)

        def row_ids(step):
            """Loads the row numbers of both key blocks of a step, a step ahead of their use."""
            return tuple(ptx.load_row_ids(key_block(*at(step), slot), interpret) for slot in range(2))

        def gather(step, ids):
            """Gathers a pair's four halves, each when it is free, in the order in which they are multiplied."""
            query = at(step)[0]
            next_ids = row_ids(step + 1)
            for slot in range(2):
                for half, (start, columns) in enumerate(halves):
                    i = 2 * slot + half

                    @pl.when(step > 0)  # nobody has to release what has never been filled
                    def _(i=i):
                        plgpu.barrier_wait(free_barriers.at[i])

                    tiles = range(start // SWIZZLED_COLUMNS, (start + columns) // SWIZZLED_COLUMNS)
                    latents_gmem = kv_gmem.at[lax.div(query, per_batch)]
                    ptx.gather_64_rows(latents_gmem, ids[slot], k_smem.at[slot], gathered_barriers, i, tiles, interpret)
            return next_ids

        lax.fori_loop(0, steps, gather, row_ids(0))
        # Every phase of a barrier is waited for, as the interpreter demands.
        for slot in range(2):
            for half in range(len(halves)):
                plgpu.barrier_wait(free_barriers.at[2 * slot + half])

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _even():
        plgpu.set_max_registers(config.compute_registers, action="increase")
        columns = halves[0]  # the left half, all of it values
        load_q(0)

        @pl.loop(0, items)
        def _(item):
            plgpu.barrier_wait(q_barrier)

            def step(pair, carry):
                accumulator, old_max, denominator, ids = carry
                zero = ptx.opaque_zero(interpret)
                next_ids = key_ids(item, pair + 1, 0)
                s = logits(products(item, pair, 0, zero), ids)
                even_max = raised(old_max, s.max(axis=1))
                factor = jnp.exp2(old_max - even_max)
                p = jnp.exp2(s - over(even_max, BLOCK_KEYS))
                # To warpgroup 1: it adds the even block's values to its half, and its own softmax starts from even_max.
                p_even_smem[...] = p.astype(jnp.bfloat16)
                even_max_smem[...] = even_max
                even_factor_smem[...] = factor
                plgpu.commit_smem()
                plgpu.barrier_arrive(even_barrier)
                denominator = denominator * factor + p.sum(axis=1)
                accumulator = add_values(accumulator, factor, p_even_smem, 0, columns, zero)
                release(0, 0)
                plgpu.barrier_wait(odd_barrier)  # warpgroup 1 has been at its softmax meanwhile

                @pl.when((pair == pairs - 1) & (item + 1 < items))
                def _():  # both warpgroups have read Q for the last time
                    load_q(item + 1)

                odd_max = row_values(odd_max_smem)
                factor = jnp.exp2(even_max - odd_max)
                accumulator = add_values(accumulator, factor, p_odd_smem, 1, columns, zero)
                release(1, 0, pair < pairs - 1)  # the last time `out` goes through this half first
                return accumulator, odd_max, denominator * factor, next_ids

            carry = (*initial(columns[1]), key_ids(item, 0, 0))
            accumulator, maximum, denominator, _ = lax.fori_loop(0, pairs, step, carry)
            # The denominators of the even and of the odd blocks, both over the last maximum.
            even_sum_smem[...] = denominator
            plgpu.barrier_arrive(sum_barriers.at[0])
            plgpu.barrier_wait(sum_barriers.at[1])
            denominator = denominator + row_values(odd_sum_smem)
            # The natural logarithm; the maximum is one of powers of two. A denominator of NaN shows in it.
            lse_smem[...] = jnp.where(denominator == 0, -jnp.inf, maximum * math.log(2) + jnp.log(denominator))
            plgpu.commit_smem()
            query, first_head = place(item)
            plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[query, pl.ds(first_head, BLOCK_HEADS)])
            store_out(item, accumulator, denominator, columns)
            release(1, 0)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _odd():
        plgpu.set_max_registers(config.compute_registers, action="increase")
        left = halves[0][1]
        columns = (left, value_dim - left)  # of the right half the values; its rotary columns are for the logits alone
        plgpu.barrier_arrive(q_barrier)  # for the first item: there is no query before it

        @pl.loop(0, items)
        def _(item):
            plgpu.barrier_wait(q_barrier)

            def step(pair, carry):
                accumulator, _, denominator, ids = carry
                zero = ptx.opaque_zero(interpret)
                next_ids = key_ids(item, pair + 1, 1)
                s = products(item, pair, 1, zero)  # while warpgroup 0 is in its softmax
                plgpu.barrier_wait(even_barrier)
                even_max, even_factor = row_values(even_max_smem), row_values(even_factor_smem)
                x = logits(s, ids)
                odd_max = raised(even_max, x.max(axis=1))
                p = jnp.exp2(x - over(odd_max, BLOCK_KEYS))
                p_odd_smem[...] = p.astype(jnp.bfloat16)
                odd_max_smem[...] = odd_max
                odd_sum_smem[...] = p.sum(axis=1)  # parked there: registers are short until P · V is done
                plgpu.commit_smem()
                plgpu.barrier_arrive(odd_barrier)
                accumulator = add_values(accumulator, even_factor, p_even_smem, 0, columns, zero)
                release(0, 1)
                odd_max = row_values(odd_max_smem)  # like the sum below, read back rather than kept
                factor = jnp.exp2(even_max - odd_max)
                accumulator = add_values(accumulator, factor, p_odd_smem, 1, columns, zero)
                release(1, 1, pair < pairs - 1)
                denominator = denominator * (even_factor * factor) + row_values(odd_sum_smem)
                return accumulator, odd_max, denominator, next_ids

            carry = (*initial(columns[1]), key_ids(item, 0, 1))
            accumulator, _, denominator, _ = lax.fori_loop(0, pairs, step, carry)
            odd_sum_smem[...] = denominator
            plgpu.barrier_arrive(sum_barriers.at[1])
            plgpu.barrier_wait(sum_barriers.at[0])
            denominator = denominator + row_values(even_sum_smem)

            @pl.when(item + 1 < items)
            def _():
                plgpu.barrier_arrive(q_barrier)

            store_out(item, accumulator, denominator, columns)
            release(1, 1)
