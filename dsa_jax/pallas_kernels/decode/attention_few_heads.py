"""Computes sparse attention of a few tokens a sequence over FP8 pages, for 8, 16 or 32 heads, on Hopper.

Keys are the rows of wgmma, so no head is padding. A unit of work is one query and one part of its keys, in blocks of
64. A thread block computes one unit after another:

  warpgroup 0  computes, for every block: S^T [64, N] = K Q^T, softmax down the columns, O^T [512, N] += V^T P^T
  the others   each fill a slot of their own with every so many-th block, and convert it there; see `gather_rows`

Latents, the latent columns of Q and P are half precision, rotary columns bfloat16, as in `attention_many_heads`, with
the same treatment of blocks that half precision cannot hold. O^T stays in registers, 4 N a thread.

What limits it is the gather: 656 bytes a key, however few the heads, and the time that a slot waits for its rows.
"""

import dataclasses
import math

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
    BLOCK_KEYS,
    COLUMN_LAYOUT,
    LOG2E,
    SWIZZLED_COLUMNS,
    WARPS_PER_WARPGROUP,
)
from dsa_jax.pallas_kernels.hopper.key_rows import over_rows, reduce_keys, store_transposed, zeros

HEADS = (8, 16, 32)  # that this kernel takes: columns of its accumulators
ACC_ROWS = 128  # of one of the accumulators of O^T
PARTS = VALUE_DIM // ACC_ROWS


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the kernel; no result depends on it.

    Attributes:
      producers: warpgroups that gather, each with a slot of 72 KiB.
      compute_registers: of a thread of the computing warpgroup, or None for what suits the heads.
      blocks: thread blocks at most; None for one on each multiprocessor.
      packed_q: whether the latent columns of q come in half precision, from `half_query.pack_query`.
    """

    producers: int = 2
    compute_registers: int | None = None
    blocks: int | None = None
    packed_q: bool = False

    def __post_init__(self):
        if self.producers not in (1, 2):
            raise ValueError(f"producers must be 1 or 2, got {self.producers}")
        registers = self.compute_registers
        if registers is not None and (not 168 <= registers <= 240 or registers % 8):
            raise ValueError(f"compute_registers must be None or a multiple of 8 from 168 to 240, got {registers}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")

    def registers(self, heads: int, producers: int) -> tuple[int, int] | None:
        """Gives the registers of a thread that computes and of one that gathers; None leaves them as they start."""
        if producers == 1:  # two warpgroups start with 255
            return None
        compute = self.compute_registers or (232 if heads == 32 else 208)
        return compute, (ptx.LAUNCH_REGISTERS * 3 - compute) // 2 // 8 * 8


def attend_few_heads(q, pool, table, indices, *, scale: float, splits: int, config: Config, after=None):
    """Computes the attention of each query to each part of its keys.

    Args:
      q: [B·T, N, 576] bfloat16; N is 8, 16 or 32.
      pool: [n·64, 656] uint8.
      table: [B, P] int32.
      indices: [B·T, K] int32, K a multiple of 64 · `splits`.
      scale: of the logits.
      splits: parts of the keys.
      config: tuning.
      after: an array that is not read; what makes it runs first.

    Returns:
      out [B·T, N, 512] bfloat16 and lse [B·T, N] float32, both with `splits` in front if there is more than one.
    """
    steps = indices.shape[1] // BLOCK_KEYS // splits
    kernel = _kernel(q.shape, table.shape, steps, scale, splits, config, after is not None)
    return kernel(q, pool, table, indices, *(() if after is None else (after,)))


def _kernel(q_shape, table_shape, steps, scale, splits, config, has_after):
    """Makes the kernel for q [B·T, N, 576], table [B, P] and indices [B·T, 64·steps·splits]."""
    queries, heads, _ = q_shape
    per_batch = queries // table_shape[0]
    size = table_shape[1] * PAGE_ROWS
    units = queries * splits
    grid = min(units, config.blocks or ptx.multiprocessors())
    producers = min(config.producers, steps)
    registers = config.registers(heads, producers)
    log2_scale = scale * LOG2E

    def body(q_gmem, pool_gmem, table_gmem, indices_gmem, *refs):
        out_gmem, lse_gmem, q_union, k_union, p_union, warps_smem, lse_smem, full, empty, q_barrier = refs[
            int(has_after) :
        ]
        # The same memory twice: bfloat16, and half precision for latents, Q's latent columns and P.
        (q_smem, q_half_smem), (k_smem, k_half_smem), (p_smem, p_half_smem) = map(list, (q_union, k_union, p_union))
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        items = lax.div(units - 1 - block, grid) + 1  # units of this block
        gather_rows.init_barriers(full)

        def place(item):
            """Gives query and split of a unit."""
            return lax.div(block + item * grid, splits), lax.rem(block + item * grid, splits)

        def gather():
            """Gathers the key blocks `slot`, `slot + producers`, … of all units, one after the other."""
            if registers:
                plgpu.set_max_registers(registers[1], action="decrease")
            slot = warpgroup - 1
            total = items * steps

            def at(n):
                """Gives the query and number of this producer's n-th block; of the last block of all behind it."""
                i = jnp.minimum(slot + n * producers, total - 1)
                query, split = place(lax.div(i, steps))
                return query, split * steps + lax.rem(i, steps)

            def load_positions(n):
                query, i = at(n)
                return gather_rows.load_positions(indices_gmem.at[query, pl.ds(i * BLOCK_KEYS, BLOCK_KEYS)])

            def load_pages(n, positions):
                return gather_rows.load_pages(positions, table_gmem.at[lax.div(at(n)[0], per_batch)], size)

            def step(n, carry):
                # Rows of this block, positions of the next: each load has a block's time before its result is used.
                rows, positions = carry
                pages = load_pages(n + 1, positions)
                next_positions = load_positions(n + 2)
                scales = gather_rows.load_scales(rows, pool_gmem)
                for half in range(2):

                    @pl.when(n > 0)  # nobody has to release what has never been filled
                    def _(half=half):
                        plgpu.barrier_wait(empty.at[2 * slot + half])

                    gather_rows.start_copies(rows, pool_gmem, k_smem.at[slot], half)
                fits = gather_rows.choose_type(rows, scales, full, 2 * slot, 0)
                for half in range(2):
                    barrier = 2 * slot + half
                    gather_rows.convert(scales, fits, k_smem.at[slot], full, barrier, half, pending=1 - half)
                return gather_rows.slots_of(positions, pages, size), next_positions

            positions = load_positions(0)
            rows = gather_rows.slots_of(positions, load_pages(0, positions), size)
            lax.fori_loop(0, lax.div(total - 1 - slot, producers) + 1, step, (rows, load_positions(1)))

        def logits(n, zero):
            """Computes K · Q of the n-th key block, ready for exp2, [64 keys, N], and whether its type is bfloat16."""
            slot, parity = lax.rem(n, producers), lax.rem(lax.div(n, producers), 2)
            left, right = pl.ds(0, HALF_COLUMNS), pl.ds(HALF_COLUMNS, HALF_COLUMNS)
            ptx.wait_gather(full, 2 * slot, parity)
            wide = gather_rows.is_bfloat16(full, 2 * slot)
            mask = gather_rows.key_mask(full, slot)

            def in_half(acc):
                def add(k_ref, q_ref, columns):
                    plgpu.wgmma(acc, k_ref.at[slot, :, columns], q_ref.at[zero, :, columns].transpose((1, 0)))

                add(k_half_smem, q_half_smem, left)
                ptx.wait_gather(full, 2 * slot + 1, parity)
                add(k_half_smem, q_half_smem, right)
                add(k_smem, q_smem, pl.ds(VALUE_DIM, SWIZZLED_COLUMNS))
                return acc[...]

            def in_bfloat16():
                ptx.wait_gather(full, 2 * slot + 1, parity)
                return multiply_as_bfloat16(k_smem.at[slot], q_smem.at[0], "b")

            shape = ptx.ACC((BLOCK_KEYS, heads), jnp.float32)
            s = lax.cond(wide, in_bfloat16, lambda: pl.run_scoped(in_half, shape))
            return gather_rows.drop_absent_keys(s * log2_scale, mask, 0), wide

        def store_p(p, wide):
            """Writes the probabilities of a block, transposed, in the type of its keys."""
            pl.when(wide)(lambda: store_transposed(p_smem.at[0], p.astype(jnp.bfloat16)))
            pl.when(~wide)(lambda: store_transposed(p_half_smem.at[0], p.astype(jnp.float16)))

        def add_values(outs, n, zero, wide):
            """Adds V^T P^T of the n-th key block to the parts of O^T, and releases its halves when they are read."""
            slot = lax.rem(n, producers)

            def add(k_ref, p_ref):
                def product(accs):
                    for i, acc in enumerate(accs):
                        values = k_ref.at[slot, :, pl.ds(ACC_ROWS * i, ACC_ROWS)].transpose((1, 0))
                        plgpu.wgmma(acc, values, p_ref.at[zero].transpose((1, 0)))
                    for half in range(2):
                        plgpu.wgmma_wait(PARTS // 2 * (1 - half))
                        plgpu.barrier_arrive(empty.at[2 * slot + half])

                return lambda xs: pl.run_state(product)(tuple(ptx.ACC.init(x) for x in xs))

            return lax.cond(wide, add(k_smem, p_smem), add(k_half_smem, p_half_smem), outs)

        def compute():
            if registers:
                plgpu.set_max_registers(registers[0], action="increase")

            @pl.loop(0, items)
            def _(item):
                query, split = place(item)
                plgpu.copy_gmem_to_smem(q_gmem.at[query], q_smem.at[0], q_barrier)
                plgpu.barrier_wait(q_barrier)
                if not config.packed_q:
                    convert_query(q_smem.at[0], 0, heads)
                    plgpu.commit_smem()

                def step(i, carry):
                    outs, peak, total = carry
                    n, zero = item * steps + i, ptx.opaque_zero()
                    x, wide = logits(n, zero)
                    # Online softmax, a head a column: everything so far is over 2^peak, and decays when the peak rises.
                    new_peak = jnp.maximum(peak, reduce_keys(x, warps_smem, "max"))
                    base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)  # -inf - -inf would be NaN
                    decay = jnp.exp2(peak - base)
                    p = jnp.exp2(x - over_rows(base, BLOCK_KEYS))
                    store_p(p, wide)
                    plgpu.commit_smem()
                    # Kept a key of the block, and reduced over the keys once a unit: not block by block.
                    total = total * over_rows(decay, BLOCK_KEYS) + p
                    outs = tuple(out * over_rows(decay, ACC_ROWS) for out in outs)
                    return add_values(outs, n, zero, wide), new_peak, total

                peak = plgpu.layout_cast(jnp.full((heads,), -jnp.inf, jnp.float32), COLUMN_LAYOUT)
                carry = (zeros((ACC_ROWS, heads)),) * PARTS, peak, zeros((BLOCK_KEYS, heads))
                # For a loop of one turn that the compiler knows, it would have the products wait for each other.
                turns = steps + (ptx.opaque_zero() if steps == 1 else 0)
                outs, peak, total = lax.fori_loop(0, turns, step, carry)
                total = reduce_keys(total, warps_smem, "add")
                inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)  # a query without keys has zeros
                for i, out in enumerate(outs):  # O leaves through the memory of Q, transposed back to [N, 512]
                    out = (out * over_rows(inverse, ACC_ROWS)).astype(jnp.bfloat16)
                    store_transposed(q_smem.at[0, :, pl.ds(ACC_ROWS * i, ACC_ROWS)], out)
                # The natural logarithm; the peak is one of powers of two.
                lse_smem[...] = jnp.where(total == 0.0, -jnp.inf, peak * math.log(2.0) + jnp.log(total))
                plgpu.commit_smem()
                there = (query,) if splits == 1 else (split, query)
                plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[there])
                for row in range(0, heads, 8):  # eight rows are contiguous in tiles
                    part = q_smem.at[0, pl.ds(row, 8), pl.ds(0, VALUE_DIM)]
                    plgpu.copy_smem_to_gmem(part, out_gmem.at[(*there, pl.ds(row, 8))])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the next Q lands in the same memory

        pl.when(warpgroup == 0)(compute)
        pl.when(warpgroup > 0)(gather)

    transforms = ptx.swizzled(jnp.bfloat16)

    def two_types(shape):
        return plgpu.RefUnion(*(plgpu.SMEM(shape, x, transforms=transforms) for x in (jnp.bfloat16, jnp.float16)))

    lead = () if splits == 1 else (splits,)
    return ptx.persistent_kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*lead, queries, heads, VALUE_DIM), jnp.bfloat16),
            jax.ShapeDtypeStruct((*lead, queries, heads), jnp.float32),
        ),
        scratch_types=(  # with the KiB for 16 heads
            two_types((1, heads, DIM)),  # q_union, 18
            two_types((producers, BLOCK_KEYS, DIM)),  # k_union, 144
            two_types((1, heads, BLOCK_KEYS)),  # p_union, 2
            plgpu.SMEM((WARPS_PER_WARPGROUP, heads), jnp.float32),  # warps_smem, 1
            plgpu.SMEM((heads,), jnp.float32),  # lse_smem, 1
            gather_rows.block_barriers(producers),  # full: half of a slot has landed, 2 · slot + half
            plgpu.Barrier(num_barriers=2 * producers),  # empty: half of a slot has been read for the last time
            plgpu.Barrier(),  # q_barrier: Q has landed
        ),
        blocks=grid,
        interpret=False,
        warpgroups=1 + producers,
        approx_math=True,
    )
