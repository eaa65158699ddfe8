"""Computes what each query gives to the gradient of the keys it selected, over all heads: dsᵀ · q + pᵀ · d_out.

A persistent grid; an item is a query and a part of at most 192 columns. Three warpgroups:

  warpgroup 0   the even blocks of 64 keys: products, rounding, and the way out
  warpgroup 1   the odd ones
  warpgroup 2   brings everything by TMA: q and d_out of the part once an item, ds and p of key block after key block

Keys are the M operand of wgmma, read transposed from [heads, keys] as they lie in memory, heads the contraction, so no
head is summed anywhere but in the accumulator. The compute warpgroups take turns at the tensor cores: while one has
them, the other rounds its accumulator to bfloat16 into tiles of its own, and TMA writes from there.

The parts of one query are worked on by neighbouring blocks at the same time, so that ds and p come from memory once and
from L2 for the others. A block takes every part in turn, since the last one has columns without a value.

Of T 512, N 128, K 2048, C 512, R 64 the products are 0.29 TFLOP, 0.42 ms alone. Memory moves 1.9 GB: 1.2 of
contributions, 0.54 of ds and p, 0.14 of q and d_out, 0.45 ms at the 4.2 TB/s of a copy. Together they take 0.585 ms,
500 TFLOP/s and 3.2 TB/s. The way out does not limit it: 6 stages and 2 tiles beat 5 and 3 (0.63 ms). Asking L2 for ds
and p ahead of their copies costs 0.03 to 0.1 ms.

Adding to the keys' rows with float32 atomics instead took 1.30 ms (8192 keys) and 2.56 ms (131072 keys), where adding
up the written, in order, takes another 0.33 and 0.51 ms.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_KEYS,
    PAIR_KEYS,
    SMEM_BYTES,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
)

PART_TILES = 3  # of SWIZZLED_COLUMNS columns: 96 registers of accumulator a thread, 96 KiB of q and d_out for N 128
TILES_OUT = 2  # tiles [64 keys, 64 columns] of contributions on the way out, of each compute warpgroup
STAGES = {64: 16, 128: 6}  # by N: tiles of ds or p in shared memory, as many as there is room for, and at most 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the kernel; no contribution depends on it.

    Attributes:
      stages: tiles [N, 64 keys] of ds or of p in shared memory. None for as many as `STAGES` says.
      blocks: how many blocks at most share the work; None for one on each multiprocessor.
    """

    stages: int | None = None
    blocks: int | None = None

    def __post_init__(self):
        if self.stages is not None and not 3 <= self.stages <= 16:
            raise ValueError(f"stages must be None or from 3 to 16, got {self.stages}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be None or at least 1, got {self.blocks}")


class Part(NamedTuple):
    """Counts the columns that an item computes, in tiles of 64: `tiles` of them, the first `values` being values.

    The tiles behind the values have rotary columns, to which p · d_out gives nothing.
    """

    start: int
    tiles: int
    values: int


def column_parts(value_dim: int, dim: int) -> tuple[Part, ...]:
    """Splits the columns into parts as equal as can be, the larger ones first."""
    tiles, values = dim // SWIZZLED_COLUMNS, value_dim // SWIZZLED_COLUMNS
    count = pl.cdiv(tiles, PART_TILES)
    each, rest = divmod(tiles, count)
    parts = []
    for i in range(count):
        start, size = i * each + min(i, rest), each + (i < rest)
        parts.append(Part(start, size, min(size, values - start)))
    return tuple(parts)


def smem_bytes(heads: int, value_dim: int, dim: int, stages: int) -> int:
    """Counts the bytes of shared memory of one block: 225 KiB for N 128, C 512, R 64 and 6 stages."""
    part = column_parts(value_dim, dim)[0]
    rows = heads * (part.tiles + part.values) + stages * heads + 2 * TILES_OUT * BLOCK_KEYS
    return rows * SWIZZLED_COLUMNS * 2 + SMEM_GRANULE_BYTES  # the last for barriers


def why_not(p, ds, q, d_out) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    for name, x in (("p", p), ("ds", ds), ("q", q), ("d_out", d_out)):
        if x.ndim != 3 or x.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16 of three dimensions, got {x.dtype} {x.shape}"
    queries, heads, selected = ds.shape
    if heads not in STAGES:
        return f"N must be one of {tuple(STAGES)}, got {heads}"
    if selected % PAIR_KEYS or not queries * selected:
        return f"K must be a multiple of {PAIR_KEYS} and nothing empty, got ds {ds.shape}"
    if p.shape != ds.shape or q.shape[:2] != (queries, heads) or d_out.shape[:2] != (queries, heads):
        return f"p, q and d_out must be [T, N, …] like ds {ds.shape}, got {p.shape}, {q.shape} and {d_out.shape}"
    dim, value_dim = q.shape[2], d_out.shape[2]
    if value_dim % SWIZZLED_COLUMNS or not value_dim or dim - value_dim not in (0, SWIZZLED_COLUMNS):
        step = SWIZZLED_COLUMNS
        return f"C must be a multiple of {step}, and H as much or {step} more, got C {value_dim} and H {dim}"
    if queries * selected >= 2**31:
        return f"T·K must be below 2^31, got ds {ds.shape}"
    return None


def sparse_backward_keys(p, ds, q, d_out, *, config: Config | None = None, interpret: bool = False):
    """Computes what each query gives to the gradient of each key it selected.

    Row t·K + k is Σ_n ds[t,n,k] · q[t,n,:], and in the first C columns Σ_n p[t,n,k] · d_out[t,n,:] more; summed in
    float32. The same bits in every run.

    Args:
      p: [T, N, K] bfloat16, K a multiple of `PAIR_KEYS`, N 64 or 128.
      ds: like `p`.
      q: [T, N, H] bfloat16.
      d_out: [T, N, C] bfloat16, C a multiple of 64, H as much or 64 more.
      config: tuning.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      contributions [T·K, H] bfloat16.
    """
    reason = why_not(p, ds, q, d_out)
    if reason is not None:
        raise ValueError(f"sparse_backward_keys: {reason}")
    rows = ds.shape[0] * ds.shape[2]
    out_type = jax.ShapeDtypeStruct((rows, q.shape[2]), jnp.bfloat16)
    return _kernel(ds.shape, d_out.shape[2], q.shape[2], config or Config(), interpret, out_type)(ds, p, q, d_out)


def _kernel(shape, value_dim, dim, config, interpret, out_type):
    """Makes the kernel for (ds, p, q, d_out)."""
    queries, heads, selected = shape
    stages = config.stages or STAGES[heads]
    used = smem_bytes(heads, value_dim, dim, stages)
    if used > SMEM_BYTES - 1:
        raise ValueError(f"config needs {used} bytes of shared memory, there are {SMEM_BYTES - 1}: {config}")
    parts = column_parts(value_dim, dim)
    # A group of as many blocks as there are parts works on one query at a time.
    groups = min(queries, max(1, (config.blocks or ptx.multiprocessors()) // len(parts)))
    key_blocks = selected // BLOCK_KEYS
    swizzled = ptx.swizzled(jnp.bfloat16)
    scratch = dict(
        q_smem=plgpu.SMEM((1, heads, parts[0].tiles * SWIZZLED_COLUMNS), jnp.bfloat16, transforms=swizzled),
        d_out_smem=plgpu.SMEM((1, heads, parts[0].values * SWIZZLED_COLUMNS), jnp.bfloat16, transforms=swizzled),
        stages_smem=plgpu.SMEM((stages, heads, SWIZZLED_COLUMNS), jnp.bfloat16, transforms=swizzled),
        out_smem=plgpu.SMEM((2 * TILES_OUT, BLOCK_KEYS, SWIZZLED_COLUMNS), jnp.bfloat16, transforms=swizzled),
        # q and d_out of an item have landed: one copy each. Both compute warpgroups wait, for both at once: with a wait
        # between the products, ptxas serialises them at times.
        operands_barrier=plgpu.Barrier(num_arrivals=2),
        # The products with them are done: an arrival a key block, from its compute warpgroup. The copying one waits.
        q_free_barrier=plgpu.Barrier(num_arrivals=key_blocks),
        d_out_free_barrier=plgpu.Barrier(num_arrivals=key_blocks),
        # ds and p of a key block have landed: one copy each. The compute warpgroup whose block it is waits: always the
        # same for a barrier, since their number is even; there are as many as key blocks that the stages have begun.
        full_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=pl.cdiv(stages, 4) * 2),
        # A stage has been multiplied: one arrival, of that warpgroup. The copying one waits.
        free_barriers=plgpu.Barrier(num_barriers=stages),
        # The tensor cores are compute warpgroup i's: one arrival, of the other. It waits.
        turn_barriers=plgpu.Barrier(num_barriers=2),
    )

    def body(ds_gmem, p_gmem, q_gmem, d_out_gmem, out_gmem, *refs):
        _block(
            ds_gmem, p_gmem, q_gmem, d_out_gmem, out_gmem, **dict(zip(scratch, refs, strict=True)),
            groups=groups, parts=parts, value_tiles=value_dim // SWIZZLED_COLUMNS, interpret=interpret,
        )  # fmt: skip

    return ptx.persistent_kernel(
        body,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        blocks=groups * len(parts),
        interpret=interpret,
        warpgroups=3,  # 168 registers a thread: the accumulator's 96 and what the compiler needs
    )


def _block(
    ds_gmem,  # [T, N, K] bfloat16
    p_gmem,  # [T, N, K] bfloat16
    q_gmem,  # [T, N, H] bfloat16
    d_out_gmem,  # [T, N, C] bfloat16
    out_gmem,  # [T·K, H] bfloat16
    *,
    q_smem,  # [1, N, the columns of the largest part], 48 KiB for N 128
    d_out_smem,  # [1, N, its value columns], 48 KiB
    stages_smem,  # [stages, N, 64], 96 KiB: ds and p of key block after key block, in turn
    out_smem,  # [4, 64, 64], 32 KiB: contributions, of the one and the other compute warpgroup
    operands_barrier,
    q_free_barrier,
    d_out_free_barrier,
    full_barriers,
    free_barriers,
    turn_barriers,
    groups: int,
    parts: tuple[Part, ...],
    value_tiles: int,
    interpret: bool,
):
    """Runs one thread block: two warpgroups that multiply in turns, one that copies ahead of them."""
    queries, _, selected = ds_gmem.shape
    key_blocks = selected // BLOCK_KEYS
    stages = stages_smem.shape[0]
    fulls = pl.cdiv(stages, 4) * 2  # barriers in `full_barriers`
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    group = lax.div(block, len(parts))
    items = lax.div(queries - 1 - group, groups) + 1  # of this block

    def place(item):
        """Gives the query of an item, and the number of the part: every item the next, the same for no two blocks."""
        return group + item * groups, lax.rem(block + item, len(parts))

    def operands(item):
        """Refers to the columns of q and of d_out of the part: as many as the largest has, up to the end of this one.

        So every copy has one size, whichever the part.
        """
        query, part = place(item)
        each = parts[-1].tiles
        end = (part + 1) * each + jnp.minimum(part + 1, sum(part.tiles > each for part in parts))
        value_end = jnp.minimum(end, value_tiles)
        for x_gmem, x_smem, x_end in ((q_gmem, q_smem, end), (d_out_gmem, d_out_smem, value_end)):
            columns = x_smem.shape[2]
            yield x_gmem.at[
                query, :, pl.ds(pl.multiple_of(x_end * SWIZZLED_COLUMNS - columns, SWIZZLED_COLUMNS), columns)
            ]

    @pl.when(warpgroup == 2)
    def _copy():
        @pl.loop(0, items)
        def _(item):
            query, _ = place(item)

            def copy(i):
                """Copies ds of a key block where `i` is even, else its p, as soon as a stage is free."""
                number = item * (2 * key_blocks) + i
                key_block, is_p = lax.div(i, 2), lax.rem(i, 2)
                stage, full = lax.rem(number, stages), lax.rem(lax.div(number, 2), fulls)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(free_barriers.at[stage]))
                keys = pl.ds(pl.multiple_of(key_block * BLOCK_KEYS, BLOCK_KEYS), BLOCK_KEYS)
                for j, x_gmem in enumerate((ds_gmem, p_gmem)):

                    @pl.when(is_p == j)
                    def _(x_gmem=x_gmem):
                        plgpu.copy_gmem_to_smem(
                            x_gmem.at[query, :, keys], stages_smem.at[stage], full_barriers.at[full]
                        )

            # The stages of the item before become free ahead of its q and d_out: what is next for them goes first.
            ahead = min(stages - 2, 2 * key_blocks)
            pl.loop(0, ahead)(copy)
            operand_free_barriers = (q_free_barrier, d_out_free_barrier)
            for x_gmem, x_smem, free_barrier in zip(
                operands(item), (q_smem, d_out_smem), operand_free_barriers, strict=True
            ):
                pl.when(item > 0)(lambda free_barrier=free_barrier: plgpu.barrier_wait(free_barrier))
                plgpu.copy_gmem_to_smem(x_gmem, x_smem.at[0], operands_barrier)
            pl.loop(ahead, 2 * key_blocks)(copy)

        # Every phase of a barrier is waited for, as the interpreter demands.
        plgpu.barrier_wait(q_free_barrier)
        plgpu.barrier_wait(d_out_free_barrier)

        @pl.loop(0, jnp.minimum(stages, items * (2 * key_blocks)))
        def _(i):
            plgpu.barrier_wait(free_barriers.at[i])

    def write(sums, query, key_block, pair, column):
        """Rounds `sums` [64, columns] into tiles of this warpgroup's, and writes them to the keys' rows."""
        rows = pl.ds(pl.multiple_of(query * selected + key_block * BLOCK_KEYS, BLOCK_KEYS), BLOCK_KEYS)
        tiles = sums.shape[1] // SWIZZLED_COLUMNS
        # Within an item tiles are used in turn; an item begins with the first one, whichever was used last.
        pl.when(pair == 0)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
        for i in range(tiles):
            slot = lax.rem(pair * tiles + i, TILES_OUT) if tiles % TILES_OUT else i % TILES_OUT
            tile_smem = out_smem.at[warpgroup * TILES_OUT + slot]
            # All but the last TILES_OUT - 1 copies have read their tiles: this one is free.
            plgpu.wait_smem_to_gmem(TILES_OUT - 1, wait_read_only=True)
            tile_smem[...] = sums[:, i * SWIZZLED_COLUMNS : (i + 1) * SWIZZLED_COLUMNS].astype(jnp.bfloat16)
            plgpu.commit_smem()
            columns = pl.ds(pl.multiple_of(column + i * SWIZZLED_COLUMNS, SWIZZLED_COLUMNS), SWIZZLED_COLUMNS)
            plgpu.copy_smem_to_gmem(tile_smem, out_gmem.at[rows, columns])

    def multiply(item, first, part):
        """Multiplies this warpgroup's key blocks of an item. `part` is number `first`; those behind it may be as large.

        So the code is there once for all parts of one size, whose columns differ by a multiple of it.
        """
        query, number = place(item)
        column = (part.start + (number - first) * part.tiles) * SWIZZLED_COLUMNS
        q_columns = pl.ds(q_smem.shape[2] - part.tiles * SWIZZLED_COLUMNS, part.tiles * SWIZZLED_COLUMNS)
        d_out_columns = pl.ds(d_out_smem.shape[2] - part.values * SWIZZLED_COLUMNS, part.values * SWIZZLED_COLUMNS)
        plgpu.barrier_wait(operands_barrier)

        @pl.loop(0, key_blocks // 2)
        def _(pair):
            key_block = 2 * pair + warpgroup
            number = item * key_blocks + key_block
            stage, p_stage = lax.rem(2 * number, stages), lax.rem(2 * number + 1, stages)
            full = lax.rem(number, fulls)
            plgpu.barrier_wait(full_barriers.at[full])
            pl.when(number > 0)(
                lambda: plgpu.barrier_wait(turn_barriers.at[warpgroup])
            )  # key block 0 has the first turn

            def products(accumulator):
                zero = ptx.opaque_zero(interpret)
                ds, p = (stages_smem.at[i].transpose((1, 0)) for i in (stage, p_stage))
                plgpu.wgmma(accumulator, ds, q_smem.at[zero, :, q_columns])
                values = (
                    accumulator
                    if part.values == part.tiles
                    else accumulator.at[:, pl.ds(0, part.values * SWIZZLED_COLUMNS)]
                )
                plgpu.wgmma(values, p, d_out_smem.at[zero, :, d_out_columns])
                # Both products are issued: the other warpgroup's may queue up behind them.
                plgpu.barrier_arrive(turn_barriers.at[1 - warpgroup])
                plgpu.wgmma_wait(1)  # the first is done: ds and q have been read
                plgpu.barrier_arrive(free_barriers.at[stage])
                plgpu.barrier_arrive(q_free_barrier)
                return accumulator[...]  # waits for the second

            sums = pl.run_scoped(products, ptx.ACC((BLOCK_KEYS, part.tiles * SWIZZLED_COLUMNS), jnp.float32))
            plgpu.barrier_arrive(free_barriers.at[p_stage])
            plgpu.barrier_arrive(d_out_free_barrier)
            write(sums, query, key_block, pair, column)

    @pl.when(warpgroup < 2)
    def _compute():
        @pl.loop(0, items)
        def _(item):
            first = 0
            # Parts of one size share their code; which of them is at hand is known when the kernel runs.
            for _, same in itertools.groupby(parts, lambda part: part[1:]):
                count = len(list(same))
                has_this_size = (place(item)[1] >= first) & (place(item)[1] < first + count)
                pl.when(has_this_size)(lambda first=first: multiply(item, first, parts[first]))
                first += count

        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn_barriers.at[0]))  # warpgroup 1's last turn is over
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
