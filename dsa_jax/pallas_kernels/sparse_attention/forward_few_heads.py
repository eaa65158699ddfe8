"""Computes sparse attention forward for 16 or 32 heads, bfloat16, on Hopper: keys are the rows of wgmma, no padding.

A persistent thread block on each multiprocessor, with two roles:
- The last warpgroup gathers: for every block of 64 selected keys, 64 rows of the latent into a ring in shared memory,
  up to `slot_tiles` column tiles a slot, never waiting for anything but a free slot.
- Each of the first `streams` warpgroups has a query of its own. For every block: S^T [64, N] = K Q^T, softmax down
  the columns (keys lie along lanes and warps), then O^T [C, N] += V^T P^T, V being the first columns of the same rows.
  O^T stays in registers (C·N/128 a thread). Streams share the ring and nothing else; they take their blocks in turn.
What limits it is the gather: 128 (C + R) bytes a block of 64 keys from the L2 cache, however few the heads: 9.7 GB for
4096 queries of 2048 keys of 576. The tensor cores read a block twice from shared memory, 16 cycles for 16 columns.
On an H200 such a gather alone takes 1.07 ms at S 8192, 9.1 TB/s whatever the ring, the hint or the number of blocks an
SM, and 1.74 ms at S 131072; with the attention of 16 heads 1.29 and 1.88 ms, of 32 heads 1.82 ms at S 8192.
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
    BLOCK_KEYS,
    COLUMN_LAYOUT,
    ROW_LAYOUT,
    SMEM_BYTES,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
)
from dsa_jax.pallas_kernels.hopper.key_rows import over_heads, over_rows, reduce_keys, store_transposed, zeros

HEADS = (16, 32)  # that this kernel takes: columns of its accumulators


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets how the kernel is cut.

    Attributes:
      streams: warpgroups that compute, each with a query of its own.
      slot_tiles: 64-column tiles of a slot of the ring, gathered and released together.
      slots: slots of the ring; None fills the shared memory.
      blocks: persistent thread blocks, None for one on each multiprocessor; no result depends on it.
    """

    streams: int = 2
    slot_tiles: int = 3
    slots: int | None = None
    blocks: int | None = None

    def __post_init__(self):
        if self.streams not in (1, 2):
            raise ValueError(f"streams must be 1 or 2, got {self.streams}")
        if not 1 <= self.slot_tiles <= 9:
            raise ValueError(f"slot_tiles must be from 1 to 9, got {self.slot_tiles}")
        if self.slots is not None and self.slots < 2:
            raise ValueError(f"slots must be None or at least 2, got {self.slots}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Budgets shared memory and registers of one shape under one config."""

    heads: int
    dim: int
    value_dim: int
    config: Config

    def __post_init__(self):
        if self.ring_slots < len(self.slot_columns):
            raise ValueError(
                f"a ring of {self.ring_slots} slots cannot hold the {len(self.slot_columns)} slots of a block of keys; "
                f"{self.config} leaves {self.ring_bytes_left} bytes of shared memory for it"
            )
        if self.smem_bytes > SMEM_BYTES:
            raise ValueError(f"{self.config} needs {self.smem_bytes} bytes of shared memory, there are {SMEM_BYTES}")

    @property
    def slot_tiles(self) -> int:
        """Column tiles of a slot: no more than the latent has."""
        return min(self.config.slot_tiles, self.dim // SWIZZLED_COLUMNS)

    @property
    def slot_columns(self) -> tuple[tuple[range, int], ...]:
        """The column tiles of each slot of a block of keys, and how many of them, the first, are values."""
        tiles, values = self.dim // SWIZZLED_COLUMNS, self.value_dim // SWIZZLED_COLUMNS
        cuts = [range(i, min(i + self.slot_tiles, tiles)) for i in range(0, tiles, self.slot_tiles)]
        return tuple((cut, max(0, min(values, cut.stop) - cut.start)) for cut in cuts)

    @property
    def q_bytes(self) -> int:
        """Bytes of Q of all streams; `out` leaves through the same memory."""
        return self.config.streams * self.heads * self.dim * 2

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all but the ring: Q, P [N, 64], a vector by warp [4, N], lse [N], and three granules of barriers."""
        streams = self.config.streams
        p, warps = streams * self.heads * BLOCK_KEYS * 2, streams * 4 * self.heads * 4
        return self.q_bytes + ptx.allocated(p) + ptx.allocated(warps) + 4 * SMEM_GRANULE_BYTES

    @property
    def ring_bytes_left(self) -> int:
        """Bytes that the ring may take."""
        return SMEM_BYTES - self.fixed_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: 64 rows of `slot_tiles` tiles."""
        return BLOCK_KEYS * self.slot_tiles * SWIZZLED_COLUMNS * 2

    @property
    def ring_slots(self) -> int:
        """Slots of the ring: as many as fit, or as the config says."""
        if self.config.slots is not None:
            return self.config.slots
        return self.ring_bytes_left // self.slot_bytes

    @property
    def smem_bytes(self) -> int:
        """Bytes of shared memory of one thread block."""
        return self.fixed_bytes + self.ring_slots * self.slot_bytes

    @property
    def registers(self) -> tuple[int, int] | None:
        """Registers a thread of the computing warpgroups and of the gathering one; None leaves them as they start.

        Computing takes C·N/128 for O^T (64 for 512 × 16, 128 for 512 × 32), N/2 each for S^T and the sums, addresses.
        One stream has 255 of the 65536; with two they start at 168, and gathering gives away what it does not need.
        """
        return (216, ptx.registers_left(216)) if self.config.streams == 2 else None


def default_config(heads: int, queries: int) -> Config:
    """Chooses the streams: two hide each other's latencies, where Q leaves room for the ring and both have queries."""
    return Config(streams=2 if heads == 16 and queries > ptx.multiprocessors() else 1)


def sparse_attention_few_heads(
    q, kv, indices, *, value_dim: int, scale: float, config: Config | None = None, interpret: bool = False
):
    """Computes `sparse_attention`, which has checked the arguments, for 16 or 32 heads.

    Args:
      q: [B·T, N, H] bfloat16.
      kv: [B, S, H] bfloat16.
      indices: [B·T, K] int32, K a multiple of `BLOCK_KEYS`.
      value_dim: C.
      scale: of the logits.
      config: tuning.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      out [B·T, N, C] bfloat16 and lse [B·T, N] float32.
    """
    queries, heads, dim = q.shape
    batch, size, _ = kv.shape
    plan = Plan(heads, dim, value_dim, config or default_config(heads, queries))
    kernel = _kernel(plan, batch, queries // batch, size, indices.shape[1] // BLOCK_KEYS, scale, interpret)
    return kernel(q, kv, indices)


def _kernel(plan: Plan, batch: int, length: int, size: int, blocks: int, scale: float, interpret: bool):
    """Makes the kernel for q [B·T, N, H], kv [B, S, H] and indices [B·T, 64·blocks]: `blocks` of keys a query."""
    heads, value_dim, streams = plan.heads, plan.value_dim, plan.config.streams
    slots, cuts = plan.ring_slots, plan.slot_columns
    queries = batch * length
    grid = min(plan.config.blocks or ptx.multiprocessors(), queries)  # thread blocks
    log2_scale = scale * math.log2(math.e)  # the softmax works in powers of two

    def query_of(turn, stream):
        """Gives the query of a stream in a turn. It may lie behind the last one: then nothing is read or written."""
        return lax.axis_index("block") + (turn * streams + stream) * grid

    def body(
        q_gmem, kv_gmem, indices_gmem, out_gmem, lse_gmem, q_smem, ring_smem, p_smem, warps_smem, lse_smem, *barriers
    ):
        # full[slot]: the slot's tiles have landed. 128 arrivals, by the gather's copies; the stream whose block it is
        # waits.
        # empty[slot]: the slot has been read for the last time. One arrival, of that stream; the gathering warpgroup
        # waits.
        # q_barrier[stream]: Q has landed. One arrival, of its copy; the stream waits.
        full, empty, q_barrier = barriers
        warpgroup = lax.axis_index("warpgroup")
        turns = pl.cdiv(queries - lax.axis_index("block"), streams * grid)  # of this block; a turn is a query a stream
        ptx.init_gather_barriers(full, slots, interpret)

        def scores_of(first, stream):
            """Computes K Q^T [64, N] of the block whose first slot is use `first` of the ring; a slot as it lands."""

            def multiply(acc):
                # Slots are used in turn, over all blocks and queries: use n is in slot n mod slots, phase n // slots.
                for i, (tiles, _) in enumerate(cuts):
                    slot, columns = lax.rem(first + i, slots), SWIZZLED_COLUMNS * len(tiles)
                    ptx.wait_gather(full, slot, lax.rem((first + i) // slots, 2), interpret)
                    q_part = q_smem.at[stream, :, pl.ds(SWIZZLED_COLUMNS * tiles.start, columns)]
                    plgpu.wgmma(acc, ring_smem.at[slot, :, pl.ds(0, columns)], q_part.transpose((1, 0)))
                return acc[...]

            scores = pl.run_scoped(multiply, ptx.ACC((BLOCK_KEYS, heads), jnp.float32))
            # Slots of rotary columns alone are not read again. Those with values are, by `add_values`.
            for i, (_, values) in enumerate(cuts):
                if not values:
                    plgpu.barrier_arrive(empty.at[lax.rem(first + i, slots)])
            return scores

        def add_values(outs, first, stream):
            """Adds V^T P^T of the block to the parts of O^T, and releases each slot when it has been read."""
            slots_of = [(lax.rem(first + i, slots), values) for i, (_, values) in enumerate(cuts) if values]
            p_part = p_smem.at[stream].transpose((1, 0))

            def multiply(accs):
                for acc, (slot, values) in zip(accs, slots_of, strict=True):
                    plgpu.wgmma(
                        acc, ring_smem.at[slot, :, pl.ds(0, SWIZZLED_COLUMNS * values)].transpose((1, 0)), p_part
                    )

            def release():
                for i, (slot, _) in enumerate(slots_of):
                    plgpu.wgmma_wait(len(slots_of) - 1 - i)  # products complete in the order of their issue
                    plgpu.barrier_arrive(empty.at[slot])

            def in_place(accs):
                multiply(accs)
                release()

            if not interpret:
                return pl.run_state(in_place)(tuple(ptx.ACC.init(out) for out in outs))

            def fresh(*accs):  # the interpreter has no accumulators that start from a value
                in_place(accs)
                return tuple(acc[...] for acc in accs)

            added = pl.run_scoped(fresh, *[ptx.ACC(out.shape, jnp.float32) for out in outs])
            return tuple(out + new for out, new in zip(outs, added, strict=True))

        @pl.when(warpgroup == streams)
        def _gather():
            if plan.registers and not interpret:
                plgpu.set_max_registers(plan.registers[1], action="decrease")

            def place(block):
                """Gives the query, and the block within it, of a block counted over all turns; streams alternate."""
                turn = block // (streams * blocks)
                return query_of(turn, lax.rem(block, streams)), lax.rem(block // streams, blocks)

            def load_ids(block):
                """Loads the row numbers of a block: -1, for zeros, where there is no query."""
                query, i = place(jnp.minimum(block, turns * (streams * blocks) - 1))
                ids = ptx.load_row_ids(
                    indices_gmem.at[jnp.minimum(query, queries - 1), pl.ds(i * BLOCK_KEYS, BLOCK_KEYS)], interpret
                )
                return jnp.where(query < queries, ids, -1)  # the phases of the barriers go on all the same

            def step(block, ids):
                next_ids = load_ids(block + 1)  # ahead of the wait for the slots
                query = place(block)[0]
                rows_gmem = kv_gmem.at[jnp.minimum(query, queries - 1) // length]
                for i, (tiles, _) in enumerate(cuts):
                    use = block * len(cuts) + i
                    slot = lax.rem(use, slots)
                    # The first use of a slot waits for nobody.
                    pl.when(use >= slots)(lambda slot=slot: plgpu.barrier_wait(empty.at[slot]))
                    ptx.gather_64_rows(rows_gmem, ids, ring_smem.at[slot], full, slot, tiles, interpret, tiles.start)
                return next_ids

            lax.fori_loop(0, turns * (streams * blocks), step, load_ids(0))
            if interpret:  # which wants every completed phase observed
                uses = turns * (streams * blocks * len(cuts))
                for i in range(slots):

                    @pl.when(uses - slots + i >= 0)
                    def _(i=i):
                        plgpu.barrier_wait(empty.at[lax.rem(uses - slots + i, slots)])

        @pl.when(warpgroup < streams)
        def _compute():
            stream = warpgroup  # its query, and its part of every array
            if plan.registers and not interpret:
                plgpu.set_max_registers(plan.registers[0], action="increase")

            @pl.loop(0, turns)
            def _(turn):
                query = query_of(turn, stream)
                safe_query = jnp.minimum(query, queries - 1)  # the last one again where there is none
                plgpu.copy_gmem_to_smem(q_gmem.at[safe_query], q_smem.at[stream], q_barrier.at[stream])
                plgpu.barrier_wait(q_barrier.at[stream])

                def load_ids(i):
                    """Loads the ids of a block, one a row of the accumulator."""
                    ids = indices_gmem.at[safe_query, pl.ds(jnp.minimum(i, blocks - 1) * BLOCK_KEYS, BLOCK_KEYS)]
                    return ids[...] if interpret else plgpu.load(ids, layout=ROW_LAYOUT, optimized=False)

                def step(i, carry):
                    outs, peak, total, ids = carry
                    first = ((turn * blocks + i) * streams + stream) * len(cuts)
                    zero = ptx.opaque_zero(interpret)
                    scores = scores_of(first, stream + zero)
                    present = (ids >= 0) & (ids < size)  # rows of absent keys are zeros in the ring
                    # Online softmax, per head: everything so far is over 2^peak, and decays when the peak rises.
                    scores = jnp.where(over_heads(present, heads), scores * log2_scale, -jnp.inf)
                    new_peak = jnp.maximum(peak, reduce_keys(scores, warps_smem.at[stream], "max", interpret))
                    base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)  # -inf - -inf would be NaN
                    decay = jnp.exp2(peak - base)
                    p = jnp.exp2(scores - over_rows(base, BLOCK_KEYS))
                    store_transposed(p_smem.at[stream], p.astype(jnp.bfloat16), interpret)
                    plgpu.commit_smem()
                    next_ids = load_ids(i + 1)  # not sooner: the fences of the waits above would wait for it
                    # Kept a key of the block, and reduced over the keys once a query: not block by block.
                    total = total * over_rows(decay, BLOCK_KEYS) + p
                    outs = tuple(out * over_rows(decay, out.shape[0]) for out in outs)
                    return add_values(outs, first, stream + zero), new_peak, total, next_ids

                # O^T in parts, one for each slot that has values: wgmma reads a slot at a time as its left operand.
                outs = tuple(zeros((SWIZZLED_COLUMNS * values, heads), interpret) for _, values in cuts if values)
                peak = jnp.full((heads,), -jnp.inf, jnp.float32)
                if not interpret:
                    peak = plgpu.layout_cast(peak, COLUMN_LAYOUT)
                carry = outs, peak, zeros((BLOCK_KEYS, heads), interpret), load_ids(0)
                outs, peak, total, _ = lax.fori_loop(0, blocks, step, carry)

                total = reduce_keys(total, warps_smem.at[stream], "add", interpret)
                # 0 for a query without keys, which then has zeros in `out`.
                inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
                # O leaves through the memory of Q, transposed back to [N, C].
                column = 0
                for out in outs:
                    out = out * over_rows(inverse, out.shape[0])
                    part = q_smem.at[stream, :, pl.ds(column, out.shape[0])]
                    store_transposed(part, out.astype(jnp.bfloat16), interpret)
                    column += out.shape[0]
                lse = peak * math.log(2.0) + jnp.log(total)  # the natural logarithm
                lse_smem[stream] = jnp.where(total == 0.0, -jnp.inf, lse)
                plgpu.commit_smem()

                @pl.when(query < queries)
                def _():
                    plgpu.copy_smem_to_gmem(lse_smem.at[stream], lse_gmem.at[safe_query])
                    for row in range(0, heads, 8):  # what is contiguous: tiles of 8 rows
                        part = q_smem.at[stream, pl.ds(row, 8), pl.ds(0, value_dim)]
                        plgpu.copy_smem_to_gmem(part, out_gmem.at[safe_query, pl.ds(row, 8)])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the next Q lands in the same memory

    out_type = (
        jax.ShapeDtypeStruct((queries, heads, value_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((queries, heads), jnp.float32),
    )
    swizzled = ptx.swizzled(jnp.bfloat16)
    return ptx.persistent_kernel(
        body,
        out_type=out_type,
        scratch_types=(  # with the KiB for 16 heads, C 512, R 64 and the default config
            plgpu.SMEM((streams, heads, plan.dim), jnp.bfloat16, transforms=swizzled),  # q_smem, 36
            # ring_smem, 168: 7 slots of 24
            plgpu.SMEM((slots, BLOCK_KEYS, SWIZZLED_COLUMNS * plan.slot_tiles), jnp.bfloat16, transforms=swizzled),
            plgpu.SMEM((streams, heads, BLOCK_KEYS), jnp.bfloat16, transforms=swizzled),  # p_smem, 4
            plgpu.SMEM((streams, 4, heads), jnp.float32),  # warps_smem, 1
            plgpu.SMEM((streams, heads), jnp.float32),  # lse_smem, 1
            ptx.gather_barriers(slots, interpret),  # full
            plgpu.Barrier(num_barriers=slots),  # empty
            plgpu.Barrier(num_barriers=streams),  # q_barrier
        ),
        blocks=grid,
        interpret=interpret,
        warpgroups=streams + 1,
        approx_math=True,
    )
