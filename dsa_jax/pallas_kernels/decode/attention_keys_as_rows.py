"""Computes sparse attention of a few tokens a sequence over FP8 pages with keys as the rows of wgmma, on Hopper.

For 8 or 16 heads, where there are queries enough for every multiprocessor. Rows stay in shared memory as they are
stored, 45 KiB a block of 64, so that four or five blocks are under way at a time; operands are made of them in
registers, see `raw_rows`. A unit of work is one query. A thread block computes one unit after another:

  warpgroups 0, 1  S^T [64, N] = K Q^T, softmax down the columns, O^T [512, N] += V^T P^T, of every other block each;
                   at a unit's end they add up what they have
  warpgroup 2      copies rows, as far ahead as there is room

Latents are half precision without their scales in K, which float32 sums of 128 columns are multiplied by: every float32
scale is read right. In V they are multiplied by them; a block with scales that half precision cannot hold has V and P
in bfloat16.

Measured on an H200 at K 2048, S 32768, batch 128: 60.6 µs for 16 heads and 58.3 for 8, where `attention_few_heads`,
which has room for two blocks that it converts in place, takes 80.0 and 74.1. It is the faster one where keys are split:
18.1 µs for 16 heads at batch 16, in eight parts, against 21.1 for this design. For 32 heads and more, each latent of
which is converted twice too, half of the heads a warpgroup took longer than their own kernels: 101.3 µs for 32 heads,
128.5 for 64, 248 for 128.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.decode import gather_rows, raw_rows
from dsa_jax.pallas_kernels.decode.gather_rows import DIM, PAGE_ROWS, VALUE_DIM
from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_KEYS,
    COLUMN_LAYOUT,
    LOG2E,
    MAXIMUM_FLOOR,
    SMEM_BYTES,
    WARPS_PER_WARPGROUP,
)
from dsa_jax.pallas_kernels.hopper.key_rows import over_rows, reduce_keys, store_transposed, zeros

HEADS = (8, 16)  # that this kernel takes: columns of its accumulators
READERS = 2  # warpgroups that compute
ACC_ROWS = 64  # of one of the accumulators of O^T
ACCS = VALUE_DIM // ACC_ROWS
TILE = raw_rows.TILE_COLUMNS
TILES = raw_rows.VALUE_TILES


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the kernel; no result depends on it.

    Attributes:
      stages: blocks of raw rows in shared memory, or None for as many as there is room for.
      compute_registers: of a thread of the computing warpgroups; the copying one has the rest.
      blocks: thread blocks at most; None for one on each multiprocessor.
      packed_q: whether the latent columns of q come in half precision, from `half_query.pack_query`.
    """

    stages: int | None = None
    compute_registers: int = 232
    blocks: int | None = None
    packed_q: bool = False

    def __post_init__(self):
        if self.stages is not None and not 2 <= self.stages <= 5:
            raise ValueError(f"stages must be None or from 2 to 5, got {self.stages}")
        if not ptx.LAUNCH_REGISTERS <= self.compute_registers <= 240 or self.compute_registers % 8:
            raise ValueError(
                f"compute_registers must be a multiple of 8 from {ptx.LAUNCH_REGISTERS} to 240, "
                f"got {self.compute_registers}"
            )
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")


def attend_keys_as_rows(q, pool, table, indices, *, scale: float, config: Config, after=None):
    """Computes the attention of each query to all of its keys.

    Args:
      q: [B·T, N, 576] bfloat16; N is 8 or 16.
      pool: [n·64, 656] uint8.
      table: [B, P] int32.
      indices: [B·T, K] int32, K a multiple of 64.
      scale: of the logits.
      config: tuning.
      after: an array that is not read; what makes it runs first.

    Returns:
      out [B·T, N, 512] bfloat16 and lse [B·T, N] float32.
    """
    kernel = _kernel(q.shape, table.shape, indices.shape[1] // BLOCK_KEYS, scale, config, after is not None)
    return kernel(q, pool, table, indices, *(() if after is None else (after,)))


def _kernel(q_shape, table_shape, steps, scale, config, has_after):
    """Makes the kernel for q [B·T, N, 576], table [B, P] and indices [B·T, 64·steps]."""
    queries, heads, _ = q_shape
    per_batch = queries // table_shape[0]
    size = table_shape[1] * PAGE_ROWS
    grid = min(queries, config.blocks or ptx.multiprocessors())
    # Of 227 KiB: Q and P; 2 of scales, 1 of maxima, 1 of sums, 2 of barriers; the rest for blocks of 45.
    room = SMEM_BYTES - 2 * (heads * DIM + READERS * heads * BLOCK_KEYS) - 6 * 1024
    stages = min(config.stages or 5, room // raw_rows.BLOCK_BYTES)
    copy_registers = 3 * ptx.LAUNCH_REGISTERS - READERS * config.compute_registers
    log2_scale = scale * LOG2E

    def body(q_gmem, pool_gmem, table_gmem, indices_gmem, *refs):
        (
            out_gmem, lse_gmem, q_union, raw_smem, p_union, table_smem, warps_smem, rows_smem, barriers,
            q_barrier, meeting,
        ) = refs[int(has_after):]  # fmt: skip
        # The same memory twice: bfloat16, and half precision for Q's latent columns and P.
        (q_smem, q_half_smem), (p_smem, p_half_smem) = map(list, (q_union, p_union))
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        items = lax.div(queries - 1 - block, grid) + 1  # units of this block
        raw_rows.init_barriers(barriers)

        def copy():
            """Copies the rows of all units, block after block."""
            plgpu.set_max_registers(copy_registers, action="decrease")
            total = items * steps

            def at(n):
                """Gives the query and number of the n-th block, and of the last block behind it."""
                n = jnp.minimum(n, total - 1)
                return block + lax.div(n, steps) * grid, lax.rem(n, steps)

            def load_positions(n):
                query, i = at(n)
                return gather_rows.load_positions(indices_gmem.at[query, pl.ds(i * BLOCK_KEYS, BLOCK_KEYS)])

            def load_pages(n, positions):
                return gather_rows.load_pages(positions, table_gmem.at[lax.div(at(n)[0], per_batch)], size)

            def step(n, carry):
                # Of this block and the next, positions and pages are known; of the one after, positions.
                positions, pages, next_positions, next_pages, third_positions = carry
                third_pages = load_pages(n + 2, third_positions)
                fourth_positions = load_positions(n + 3)
                stage = lax.rem(n, stages)
                raw_rows.wait_free(barriers, stage, lax.rem(lax.div(n, stages) + 1, 2))
                slots = gather_rows.slots_of(positions, pages, size)
                raw_rows.copy_rows(slots, pool_gmem, raw_smem, barriers, stage)
                return next_positions, next_pages, third_positions, third_pages, fourth_positions

            first, second, third = (load_positions(n) for n in range(3))
            carry = first, load_pages(0, first), second, load_pages(1, second), third
            lax.fori_loop(0, total, step, carry)

        def logits(stage, zero):
            """Computes K · Q of a block, ready for exp2, [64 keys, heads]."""

            def multiply(tiles, operand, q_ref):
                def run(acc):
                    for tile in tiles:
                        columns = pl.ds(TILE * tile, TILE)
                        plgpu.wgmma(acc, operand(tile), q_ref.at[zero, :, columns].transpose((1, 0)))
                    return acc[...]

                return pl.run_scoped(run, ptx.ACC((BLOCK_KEYS, heads), jnp.float32))

            s = multiply((VALUE_DIM // TILE,), lambda _: raw_rows.rotary_tile(raw_smem, stage), q_smem)
            for group in range(raw_rows.GROUPS):
                part = multiply(
                    (2 * group, 2 * group + 1), lambda tile: raw_rows.keys_tile(raw_smem, stage, tile), q_half_smem
                )
                s = raw_rows.add_scaled(s, part, raw_smem, stage, group)
            return gather_rows.drop_absent_keys(s * log2_scale, raw_rows.key_mask(barriers, stage), 0)

        def store_p(p, wide):
            """Writes the probabilities of a block, transposed, in the type of its values."""
            to, to_half = p_smem.at[warpgroup], p_half_smem.at[warpgroup]
            pl.when(wide)(lambda: store_transposed(to, p.astype(jnp.bfloat16)))
            pl.when(~wide)(lambda: store_transposed(to_half, p.astype(jnp.float16)))

        def add_values(outs, stage, scales, zero, wide):
            """Adds V^T P^T of a block to the parts of O^T, and releases the block."""

            def add(p_ref, is_wide):
                def product(accs):
                    for first in range(0, ACCS, TILES):
                        values = raw_rows.values_tiles(raw_smem, stage, scales, TILE * first, is_wide)
                        if first == ACCS - TILES:
                            raw_rows.release(barriers, stage)
                        for acc, tile in zip(accs[first:], values, strict=False):
                            plgpu.wgmma(acc, tile, p_ref.at[warpgroup + zero].transpose((1, 0)))
                        plgpu.wgmma_wait(0)

                return lambda xs: pl.run_state(product)(tuple(ptx.ACC.init(x) for x in xs))

            return lax.cond(wide, add(p_smem, True), add(p_half_smem, False), outs)

        def step(item, i, carry):
            outs, peak, total = carry
            n, zero = item * steps + i, ptx.opaque_zero()
            stage = lax.rem(n, stages)
            raw_rows.wait_full(barriers, stage, lax.rem(lax.div(n, stages), 2))
            # Two tables in turn: slow warps may read the last one yet.
            scales = table_smem.at[2 * warpgroup + lax.rem(lax.div(i, 2), 2)]
            wide = raw_rows.scale_table(raw_smem, stage, scales)
            x = logits(stage, zero)
            # Online softmax, a head a column: everything so far is over 2^peak, and decays when the peak rises.
            new_peak = jnp.maximum(peak, reduce_keys(x, warps_smem.at[warpgroup], "max"))
            decay = jnp.exp2(peak - new_peak)
            p = jnp.exp2(x - over_rows(new_peak, BLOCK_KEYS))
            store_p(p, wide)
            plgpu.commit_smem()
            # Kept a thread, and reduced over the keys once a unit: not block by block.
            total = raw_rows.add_partial(total, decay, p)
            outs = tuple(out * over_rows(decay, ACC_ROWS) for out in outs)
            return add_values(outs, stage, scales, zero, wide), new_peak, total

        def load_q(item):
            """Loads Q, converts it and permutes its columns."""
            plgpu.copy_gmem_to_smem(q_gmem.at[block + item * grid], q_smem.at[0], q_barrier)
            plgpu.barrier_wait(q_barrier)
            raw_rows.permute_query(q_smem.at[0], heads, config.packed_q)
            plgpu.commit_smem()

        def meet():
            """Waits for the other reader."""
            plgpu.barrier_arrive(meeting)
            plgpu.barrier_wait(meeting)

        def join(outs, peak, total):
            """Adds up both readers' results, each for half of the columns: one leaves its own in the memory of Q."""
            mine, other = (rows_smem.at[pl.ds(2 * i, 2)] for i in (warpgroup, 1 - warpgroup))
            mine[0, ...], mine[1, ...] = peak, total
            meet()
            other_peak, other_total = (plgpu.load(other.at[i], layout=COLUMN_LAYOUT, optimized=False) for i in range(2))
            both = jnp.maximum(peak, other_peak)
            factor = jnp.exp2(peak - both)
            total = total * factor + other_total * jnp.exp2(other_peak - both)
            outs = tuple(out * over_rows(factor, ACC_ROWS) for out in outs)
            memory, middle = q_smem.at[0], ACCS // 2
            for writer in (1, 0):
                there = outs[:middle] if writer else outs[middle:]  # reader 0 has the left half at last
                pl.when(warpgroup == writer)(lambda there=there: raw_rows.exchange(there, memory, True))
                meet()
                sums = lax.cond(
                    warpgroup == writer,
                    lambda xs: xs,
                    lambda xs: raw_rows.exchange(xs, memory, False),
                    there,
                )
                outs = (*sums, *outs[middle:]) if writer else (*outs[:middle], *sums)
            plgpu.commit_smem()
            meet()  # the next Q may land
            return outs, both, total

        def compute():
            plgpu.set_max_registers(config.compute_registers, action="increase")

            @pl.loop(0, items)
            def _(item):
                pl.when(warpgroup == 0)(lambda: load_q(item))
                meet()
                peak = plgpu.layout_cast(jnp.full((heads,), MAXIMUM_FLOOR, jnp.float32), COLUMN_LAYOUT)
                carry = (zeros((ACC_ROWS, heads)),) * ACCS, peak, raw_rows.partial_zeros(heads)
                # For a loop of one turn that the compiler knows, it would have the products wait for each other.
                turns: Any = lax.div(steps - warpgroup + 1, 2)
                turns += ptx.opaque_zero()
                outs, peak, total = lax.fori_loop(
                    0, turns, lambda i, carry: step(item, 2 * i + warpgroup, carry), carry
                )
                total = reduce_keys(raw_rows.spread(total, heads), warps_smem.at[warpgroup], "add")
                outs, peak, total = join(outs, peak, total)
                inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)  # a query without keys has zeros
                query = block + item * grid
                for first in range(0, ACCS, TILES):
                    some = [out * over_rows(inverse, ACC_ROWS) for out in outs[first : first + TILES]]

                    def store(some=some, first=first):
                        raw_rows.store_out(some, TILE * first, out_gmem.at[query])

                    pl.when(warpgroup == first // (ACCS // 2))(store)
                # The natural logarithm; the peak is one of powers of two.
                lse = jnp.where(total == 0.0, -jnp.inf, peak * math.log(2.0) + jnp.log(total))
                pl.when(warpgroup == 0)(lambda: raw_rows.store_by_head(lse, lse_gmem.at[query]))

        pl.when(warpgroup < READERS)(compute)
        pl.when(warpgroup == READERS)(copy)

    transforms = ptx.swizzled(jnp.bfloat16)

    def two_types(shape):
        return plgpu.RefUnion(*(plgpu.SMEM(shape, x, transforms=transforms) for x in (jnp.bfloat16, jnp.float16)))

    return ptx.persistent_kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((queries, heads, VALUE_DIM), jnp.bfloat16),
            jax.ShapeDtypeStruct((queries, heads), jnp.float32),
        ),
        scratch_types=(  # with the KiB for 16 heads
            two_types((1, heads, DIM)),  # q_union, 18
            plgpu.SMEM((stages, raw_rows.BLOCK_BYTES), jnp.uint8),  # raw_smem, 180
            two_types((READERS, heads, BLOCK_KEYS)),  # p_union, 4
            plgpu.SMEM((2 * READERS, raw_rows.TABLE_WORDS), jnp.int32),  # table_smem, 2
            plgpu.SMEM((READERS, WARPS_PER_WARPGROUP, heads), jnp.float32),  # warps_smem, 1
            plgpu.SMEM((2 * READERS, heads), jnp.float32),  # rows_smem, 1: a reader's maxima and sums
            raw_rows.stage_barriers(stages),  # barriers, 1
            # Pallas' barriers, 1: Q has landed; the readers meet.
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=READERS),
        ),
        blocks=grid,
        interpret=False,
        warpgroups=READERS + 1,
        approx_math=True,
    )
