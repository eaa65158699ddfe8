"""Computes index scores on Hopper: I[t,s] = k_scale[s] · Σ_j w[t,j] · relu(q[t,j] · k[s]), FP8 or bfloat16 (Eq. 1).

A persistent grid, one block on each multiprocessor. The work is a line of key blocks: those that the first group of
queries reaches, then those of the second, and so on. It is cut into equal shares, one a thread block, wherever the cuts
fall, since a score is never summed over key blocks. A thread block has

- one producer warpgroup, whose TMA copies bring the queries and weights of a group and stream blocks of keys,
- math warpgroups, each with its own queries of the group: 128 (query, head) rows, the N operand of wgmma. Keys are
  the M operand, 64 at a time, so that the sum over heads runs along a row of the accumulator. All of them read the same
  keys, so a key is brought once for 128 / J · warpgroups queries.

The weighted sum, of a thread: in wgmma's layout it holds of each tile two rows (keys r and r + 8 of its warp's 16) and
in each 2 neighbouring columns in every 8, so four neighbouring lanes hold a row. It sums its columns, 2 · 128/J sums
for (query, row); then the four lanes add theirs up in two steps, each lane handing over half of its sums, so that every
lane ends with a quarter of the sums complete. Lane l of four holds, of the sums numbered 2 · query + half, those from
l · J' on, J' = 2 · 128/J / 4: one query and one row for J = 64, one and two for 32, two and two for 16.

Registers are short: with 4 math warpgroups a thread has 112, of which 64 hold products and 32 weights. So a query that
is not there is marked in its range, and the stores of a thread share one address.

What limits it is the relu and the weighted sum: a tile of 64 keys × 128 rows takes a warp 176 instructions for J 64,
128 of them these. Left out, the FP8 kernel ran at 1385 TFLOP/s instead of 1104, without its stores at 1125 (H200,
T 4096, J 64, E 128, S 32768; a plain FP8 matmul 1475).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import COLUMN_LAYOUT, SMEM_BYTES, WARPGROUP_THREADS, WGMMA_ROWS
from dsa_jax.pallas_kernels.hopper.work_split import for_each_part

TILE_KEYS = WGMMA_ROWS  # keys of one product
WARPGROUP_ROWS = 128  # (query, head) rows of a math warpgroup: the width of its accumulator
DTYPES = (jnp.float8_e4m3fn, jnp.bfloat16)
HEADS = (64, 32, 16)  # J
DIMS = (128, 64)  # E
BARRIER_BYTES = 2048  # of shared memory, at most


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets how the work is cut.

    Attributes:
      warpgroups: math warpgroups, each with 128 / J queries.
      tiles: 64-key tiles in a block of keys, the unit of copies and of work.
      stages: blocks of keys in shared memory.
      q_slots: groups of queries in shared memory; with 2 the next group arrives while one is worked on.
    """

    warpgroups: int = 4
    tiles: int = 2
    stages: int = 4
    q_slots: int = 2

    def __post_init__(self):
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"warpgroups must be between 1 and 4, got {self.warpgroups}")
        if self.tiles not in (1, 2, 4):
            raise ValueError(f"tiles must be 1, 2 or 4, got {self.tiles}")
        if not 1 <= self.stages <= 32:
            raise ValueError(f"stages must be between 1 and 32, got {self.stages}")
        if self.q_slots not in (1, 2):
            raise ValueError(f"q_slots must be 1 or 2, got {self.q_slots}")

    @property
    def key_block(self) -> int:
        """Keys in a block."""
        return TILE_KEYS * self.tiles

    def group_queries(self, heads: int) -> int:
        """Counts the queries of a group, all of one batch row."""
        return WARPGROUP_ROWS // heads * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the math and of the producer warpgroups, in eights.

        What one gives up another takes, of what the block had at its launch: asking for more waits for ever.
        """
        # A producer issues copies and little else. With 4 math warpgroups a thread has 96 at the launch, of which it
        # gives up 64, and a math thread then has 112.
        producer = {4: 32}.get(self.warpgroups, 40)
        at_launch = ptx.launch_registers(self.warpgroups + 1) * (self.warpgroups + 1)
        return min(240, (at_launch - producer) // self.warpgroups // 8 * 8), producer

    def smem_bytes(self, dtype, dim: int, scaled: bool) -> int:
        """Counts the bytes of shared memory of a thread block, barriers aside."""
        row = dim * jnp.dtype(dtype).itemsize
        arrays = [
            self.q_slots * self.warpgroups * WARPGROUP_ROWS * row,
            self.q_slots * self.warpgroups * WARPGROUP_ROWS * 4,
            self.stages * self.key_block * row,
            self.stages * self.key_block * 4 * scaled,
        ]
        return sum(map(ptx.allocated, arrays))


def default_config(dtype, dim: int) -> Config:
    """Chooses the configuration for inputs of this dtype and E.

    Of FP8, E 128, J 64 at T 4096 and S 32768 it is the fastest measured, 1124 TFLOP/s: with 3 warpgroups 1042, with 2
    967, with 1 tile and 8 stages 1099, with 4 and 2 1089, with 1 slot for queries 1098. The others were not compared.
    """
    if jnp.dtype(dtype).itemsize * dim == 256:  # bfloat16: the queries of a group take 128 KiB
        return Config(q_slots=1, stages=2)
    return Config()


class Plan(NamedTuple):
    """Lines up all work: where each of the G groups of queries stands on the line.

    Attributes:
      first: int32 [G], the first block of keys that each group reaches.
      offset: int32 [G + 1], where each group's blocks start on the line, and its end.
    """

    first: jax.Array
    offset: jax.Array


def why_not_shapes(q_index, k_index, weights, start, stop, k_scale=None) -> str | None:
    """Says why no kernel of index scores, forward or backward, can take these shapes, or None when one can."""
    if q_index.ndim != 4 or k_index.ndim != 3:
        return f"q_index must be [B, T, J, E] and k_index [B, S, E], got {q_index.shape} and {k_index.shape}"
    batch, length, heads, dim = q_index.shape
    if heads not in HEADS:
        return f"J must be one of {HEADS}, got {heads}"
    if dim not in DIMS:
        return f"E must be one of {DIMS}, got {dim}"
    if k_index.shape[0] != batch or k_index.shape[2] != dim:
        return f"k_index must be [{batch}, S, {dim}] like q_index {q_index.shape}, got {k_index.shape}"
    size = k_index.shape[1]
    if not all((batch, length, size)):
        return f"q_index and k_index must not be empty, got {q_index.shape} and {k_index.shape}"
    for name, array, shape, dtype in (
        ("weights", weights, (batch, length, heads), jnp.float32),
        ("start", start, (batch, length), jnp.int32),
        ("stop", stop, (batch, length), jnp.int32),
        ("k_scale", k_scale, (batch, size), jnp.float32),
    ):
        if array is not None and (array.shape != shape or array.dtype != dtype):
            return f"{name} must be {jnp.dtype(dtype).name} {shape}, got {array.dtype} {array.shape}"
    return None


def why_not(q_index, k_index, weights, start, stop, k_scale=None) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    reason = why_not_shapes(q_index, k_index, weights, start, stop, k_scale)
    if reason is not None:
        return reason
    if q_index.dtype not in DTYPES or k_index.dtype != q_index.dtype:
        return (
            f"q_index and k_index must both be float8_e4m3fn or both bfloat16, got {q_index.dtype} and {k_index.dtype}"
        )
    batch, length, heads, _ = q_index.shape
    size = k_index.shape[1]
    # int32 counts the rows, the bytes of a row of scores, and the key blocks of all groups together.
    if max(batch * length * heads, 4 * batch * size) > 2**31 - 2**16 or batch * length * size >= 2**40:
        return f"B·T·J and 4·B·S must be at most 2^31 - 2^16 and B·T·S below 2^40, got {q_index.shape} and S {size}"
    return None


def make_plan(start, stop, *, size: int, heads: int, config: Config) -> Plan:
    """Lines up the work of queries with these ranges, int32 [B, T], over `size` keys.

    Two small XLA kernels up to 2048 groups; made ahead of the call instead, nothing was gained at T 4096.
    """
    queries, key_block = config.group_queries(heads), config.key_block
    blocks = math.ceil(size / key_block)
    groups = start.shape[0] * math.ceil(start.shape[1] / queries)
    if groups * blocks >= 2**31:
        raise ValueError(f"make_plan counts blocks of keys in int32, got {groups} groups of queries × {blocks}")
    start, stop = jnp.maximum(start, 0), jnp.minimum(stop, size)
    has_keys = start < stop
    pad = ((0, 0), (0, -start.shape[1] % queries))
    first = jnp.pad(jnp.where(has_keys, start // key_block, blocks), pad, constant_values=blocks)
    end = jnp.pad(jnp.where(has_keys, (stop + (key_block - 1)) // key_block, 0), pad)
    first, end = lax.reduce(  # both at once
        (first.reshape(-1, queries), end.reshape(-1, queries)),
        (jnp.int32(blocks), jnp.int32(0)),
        lambda x, y: (jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1])),
        dimensions=(1,),
    )
    count = jnp.maximum(end - first, 0)  # 0 for a group of which no query has keys
    if groups <= 2048:  # short enough to sum every beginning anew, which fuses; a scan does not
        group = jnp.arange(groups + 1, dtype=jnp.int32)
        offset = jnp.sum(jnp.where(group[:-1] < group[:, None], count, 0), axis=1, dtype=jnp.int32)
    else:
        offset = jnp.cumsum(jnp.pad(count, (1, 0)), dtype=jnp.int32)
    return Plan(first, offset)


def index_scores(
    q_index,
    k_index,
    weights,
    start,
    stop,
    k_scale=None,
    *,
    fill: bool = True,
    config: Config | None = None,
    interpret: bool = False,
):
    """Scores the keys in [start, stop), -inf elsewhere.

    With `fill=False` blocks of keys that no query of a group reaches are left unwritten: they may hold anything.

    Args:
      q_index: [B, T, J, E], float8_e4m3fn or bfloat16; J 64, 32 or 16, E 128 or 64.
      k_index: [B, S, E], the dtype of `q_index`.
      weights: float32 [B, T, J].
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys; the range may be empty, reversed, or exceed S.
      k_scale: float32 [B, S], or None for ones.
      fill: whether keys out of reach are written.
      config: how the work is cut; None takes `default_config`.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      float32 [B, T, S].

    Raises:
      ValueError: if `why_not` has a reason, or the config needs more shared memory than there is.
    """
    reason = why_not(q_index, k_index, weights, start, stop, k_scale)
    if reason is not None:
        raise ValueError(f"index_scores: {reason}")
    batch, length, heads, dim = q_index.shape
    size = k_index.shape[1]
    config = config or default_config(q_index.dtype, dim)
    scaled = k_scale is not None
    used = config.smem_bytes(q_index.dtype, dim, scaled)
    there = SMEM_BYTES - BARRIER_BYTES
    if used > there:
        raise ValueError(f"config needs {used} bytes of shared memory, there are {there}: {config}")
    queries, key_block = config.group_queries(heads), config.key_block
    plan = make_plan(start, stop, size=size, heads=heads, config=config)
    kernel = _kernel(
        batch,
        length,
        size,
        heads,
        dim,
        q_index.dtype,
        scaled,
        fill,
        config,
        2 if interpret else ptx.multiprocessors(),  # thread blocks
        interpret,
    )
    # Whole blocks of keys: what copies a scale wants 16-byte addresses, and a block must not reach into the next row.
    ragged = -size % key_block
    k_index = jnp.pad(k_index, ((0, 0), (0, ragged), (0, 0)))
    scale = () if k_scale is None else (jnp.pad(k_scale, ((0, 0), (0, ragged))).reshape(-1),)
    # The last group's weights must be there, even of queries that are not: a copy past the end is none.
    weights = jnp.pad(weights.reshape(-1), (0, -length % queries * heads))
    scores = kernel(
        q_index.reshape(batch * length * heads, dim),
        k_index.reshape(-1, dim),
        weights,
        start.reshape(batch * length),
        stop.reshape(batch * length),
        *plan,
        *scale,
    )
    return scores.reshape(batch, length, size)


@functools.cache
def _kernel(batch, length, size, heads, dim, dtype, scaled, fill, config: Config, blocks: int, interpret: bool):
    """Makes the kernel for one shape: (q, k, weights, start, stop, first, offset, k_scale?) -> float32 [B · T, S]."""
    math_groups, stages, key_block = config.warpgroups, config.stages, config.key_block
    padded_size = math.ceil(size / key_block) * key_block
    queries = WARPGROUP_ROWS // heads  # of a math warpgroup
    groups_of_row = math.ceil(length / config.group_queries(heads))
    groups = batch * groups_of_row
    transforms = ptx.swizzled(dtype, dim)

    def body(q_gmem, k_gmem, weights_gmem, start_gmem, stop_gmem, first_gmem, offset_gmem, *refs):
        scale_gmem, refs = refs[: int(scaled)], refs[int(scaled) :]  # one, or none
        out_gmem, q_smem, weights_smem, k_smem, *refs = refs
        scale_smem, refs = refs[: int(scaled)], refs[int(scaled) :]
        # q_full[slot]: a group's queries and weights have landed. An arrival of each copy, two a math warpgroup; the
        # math warpgroups wait.
        # q_empty[slot]: the slot may be refilled. An arrival of each math warpgroup, at first and when it is done with
        # a group; the producer waits.
        # full[stage]: a block of keys and their scale have landed. An arrival of each copy; the math warpgroups wait.
        # empty[stage]: the stage may be refilled. An arrival of each math warpgroup, at first and when it is done with
        # a block; the producer waits.
        # A group's slot and a block's stage follow from their numbers, so that the loops carry little.
        q_full, q_empty, full, empty = refs
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def for_each_item(work):
            """Calls `work(group, low, high, shift)` for every group this block has keys of.

            `low` and `high` are its part of the line; `shift` more is the number of a block of keys.
            """

            def visit(group, low, high):
                work(group, low, high, first_gmem[group] - offset_gmem[group])

            for_each_part(offset_gmem, block, blocks, visit)

        def first_query(group):
            """Gives the group's batch row and first query."""
            row = lax.div(group, groups_of_row)
            return row, (group - row * groups_of_row) * config.group_queries(heads)

        def for_each_empty(call):
            """Calls `call` with each barrier that says that memory may be refilled."""
            for barriers, count in ((q_empty, config.q_slots), (empty, stages)):
                for i in range(count):
                    call(barriers.at[i])

        def produce():
            """Copies the operands of all items, each as soon as there is room."""

            def copy_item(group, low, high, shift):
                batch_row, query = first_query(group)
                slot = lax.rem(group, config.q_slots)
                plgpu.barrier_wait(q_empty.at[slot])
                # A group's last queries may belong to the next batch row or lie past the end (zeros then): such scores
                # are not stored. Likewise for the keys of the last block, which are out of everyone's range.
                for i in range(math_groups):
                    rows = pl.ds((batch_row * length + query) * heads + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    target = pl.ds(i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[rows], q_smem.at[slot, target], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(weights_gmem.at[rows], weights_smem.at[slot, target], q_full.at[slot])

                @pl.loop(low, high)
                def _(position):
                    stage = lax.rem(position, stages)
                    plgpu.barrier_wait(empty.at[stage])
                    keys = pl.ds(batch_row * padded_size + (position + shift) * key_block, key_block)
                    plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem.at[stage], full.at[stage])
                    for source, target in zip(scale_gmem, scale_smem, strict=True):  # one pair, or none
                        plgpu.copy_gmem_to_smem(source.at[keys], target.at[stage], full.at[stage])

            for_each_item(copy_item)
            if interpret:  # which insists that every phase of a barrier is waited for
                for_each_empty(plgpu.barrier_wait)

        def score():
            """Scores the keys of all items with the queries of this math warpgroup."""
            for_each_empty(plgpu.barrier_arrive)
            own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def score_item(group, low, high, shift):
                batch_row, query = first_query(group)
                query = query + warpgroup * queries
                slot = lax.rem(group, config.q_slots)
                row, left = batch_row * length + query, length - query  # `left`: queries from here on in the batch row
                # Before the wait: they are loaded while the queries are on their way.
                ranges = load_ranges(start_gmem, stop_gmem, row, left, size, heads, interpret)
                plgpu.barrier_wait(q_full.at[slot])
                # In registers for all key blocks of the group: 32 a thread, one for each of its columns.
                weights = plgpu.load(weights_smem.at[slot, own_rows], layout=COLUMN_LAYOUT, optimized=False)

                @pl.loop(low, high)
                def _(position):
                    stage = lax.rem(position, stages)
                    plgpu.barrier_wait(full.at[stage])

                    @pl.loop(0, config.tiles)
                    def _(tile):
                        keys = stage, pl.ds(tile * TILE_KEYS, TILE_KEYS)

                        # Products and sums of a warpgroup take turns: while it sums, other warpgroups multiply. The
                        # places of the operands depend on the loops, so no opaque zero is needed.
                        def multiply(accumulator):
                            plgpu.wgmma(accumulator, k_smem.at[keys], q_smem.at[slot, own_rows].transpose((1, 0)))
                            return accumulator[...]

                        products = pl.run_scoped(multiply, ptx.ACC((TILE_KEYS, WARPGROUP_ROWS), jnp.float32))
                        scales = [ref.at[keys] for ref in scale_smem]
                        key = (position + shift) * key_block + tile * TILE_KEYS
                        store_scores(products, weights, scales, ranges, out_gmem, row, key, heads, interpret)

                    plgpu.barrier_arrive(empty.at[stage])  # the products are done, and the scales are in registers

                plgpu.barrier_arrive(q_empty.at[slot])

            for_each_item(score_item)
            if fill:
                fill_unreached()

        def fill_unreached():
            """Stores -inf where no query of a group reaches: groups block, block + blocks, …, a row at a time."""

            @pl.loop(0, lax.div(groups - block + blocks - 1, blocks))
            def _(i):
                group = block + i * blocks
                batch_row, query = first_query(group)
                low = first_gmem[group] * key_block
                high = low + (offset_gmem[group + 1] - offset_gmem[group]) * key_block
                for j in range(queries):
                    at = query + warpgroup * queries + j

                    @pl.when(at < length)
                    def _(row=batch_row * length + at):
                        fill_row(out_gmem, row, jnp.int32(0), low, interpret)
                        fill_row(out_gmem, row, high, size, interpret)

        @pl.when(warpgroup == math_groups)
        def _():
            if not interpret:
                plgpu.set_max_registers(config.registers[1], action="decrease")
            produce()

        @pl.when(warpgroup < math_groups)
        def _():
            if not interpret:
                plgpu.set_max_registers(config.registers[0], action="increase")
            score()

    scratch = [  # with the KiB for FP8, E 128 and the default config
        plgpu.SMEM((config.q_slots, math_groups * WARPGROUP_ROWS, dim), dtype, transforms=transforms),  # q_smem, 128
        plgpu.SMEM((config.q_slots, math_groups * WARPGROUP_ROWS), jnp.float32),  # weights_smem, 4
        plgpu.SMEM((stages, key_block, dim), dtype, transforms=transforms),  # k_smem, 64
        *([plgpu.SMEM((stages, key_block), jnp.float32)] if scaled else []),  # scale_smem, 2
        plgpu.Barrier(num_arrivals=2 * math_groups, num_barriers=config.q_slots),  # q_full
        plgpu.Barrier(num_arrivals=math_groups, num_barriers=config.q_slots),  # q_empty
        plgpu.Barrier(num_arrivals=1 + scaled, num_barriers=stages),  # full
        plgpu.Barrier(num_arrivals=math_groups, num_barriers=stages),  # empty
    ]
    return ptx.persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * length, size), jnp.float32),
        scratch_types=tuple(scratch),
        blocks=blocks,
        interpret=interpret,
        warpgroups=math_groups + 1,
    )


# The weighted sum and the stores: see above for who holds what.


def _lane_queries(heads: int) -> int:
    """Counts the queries whose scores a thread stores."""
    return max(1, WARPGROUP_ROWS // heads // 4)


def _ranges_layout(heads: int):
    """Gives the layout of one int32 for each query whose scores a thread stores."""
    count = _lane_queries(heads)
    return plgpu.Layout.WG_STRIDED((WARPGROUP_THREADS * count,), vec_size=count)


def load_ranges(start_gmem, stop_gmem, row, left, size, heads, interpret):
    """Loads the first key and the number of keys of the queries whose scores this thread stores.

    Args:
      start_gmem: int32 [B · T], the first key of each query.
      stop_gmem: int32 [B · T], the end of its keys.
      row: the first of the warpgroup's queries.
      left: how many queries are left of its batch row from there on. Those behind have -1 keys: nothing is stored.
      size: S, to which ranges are clamped.
      heads: J.
      interpret: whether the interpreter runs this.

    Returns:
      first and count, or what the interpreter needs in their place; for `store_scores`.
    """
    if interpret:
        return start_gmem, stop_gmem, left
    layout = _ranges_layout(heads)
    result = ptx.Result((WARPGROUP_THREADS * _lane_queries(heads),), jnp.int32, layout)

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ptx.SPLAT, ptx.SPLAT), return_type=(result, result))
    def load(ctx, start, stop, row, left):
        ranges = []
        for i in range(_lane_queries(heads)):
            query = arith.addi(_lane_query(heads), ptx.i32(i))
            there = arith.cmpi(arith.CmpIPredicate.slt, query, ptx.scalar(left))
            at = arith.select(there, arith.addi(ptx.scalar(row), query), ptx.i32(0))
            at = arith.shli(arith.extui(ptx.i64_type(), at), ptx.i64(2))
            addresses = [arith.addi(ptx.gmem_address(ref), at) for ref in (start, stop)]
            low, high = (ptx.ptx("ld.global.nc.b32 $0, [$1];", x, result_types=ptx.i32_type()) for x in addresses)
            low = arith.minsi(arith.maxsi(low, ptx.i32(0)), ptx.i32(size))
            high = arith.maxsi(arith.minsi(high, ptx.i32(size)), low)
            ranges.append((low, arith.select(there, arith.subi(high, low), ptx.i32(-1))))
        return tuple(ptx.private_values(column, layout) for column in zip(*ranges, strict=True))

    return load(start_gmem, stop_gmem, row, left)


def _lane_query(heads: int):
    """Emits the number, among its warpgroup's, of the first query whose scores this thread stores."""
    lane = arith.andi(ptx.thread_id(), ptx.i32(3))
    return arith.shrui(lane, ptx.i32(1)) if heads == 64 else arith.muli(lane, ptx.i32(_lane_queries(heads)))


def store_scores(products, weights, scales, ranges, out_gmem, row, key, heads, interpret):
    """Stores the scores of 64 keys and the queries of one warpgroup.

    Args:
      products: q · k, [64, 128].
      weights: of the 128 (query, head) rows.
      scales: of the keys, one array [64] in shared memory, or none.
      ranges: from `load_ranges`.
      out_gmem: [B · T, S].
      row: of `out_gmem`, that of the first query.
      key: the first key.
      heads: J.
      interpret: whether the interpreter runs this.
    """
    if interpret:
        _interpreted_store(products, weights, scales, ranges, out_gmem, row, key, heads)
        return
    size = out_gmem.shape[1]
    layout, gmem, smem = _ranges_layout(heads), plgpu.RefType(), [plgpu.RefType()] * len(scales)
    products_layout, weights_layout = plgpu.Layout.WGMMA, COLUMN_LAYOUT

    @ptx.inline_mgpu(arg_types=(products_layout, weights_layout, layout, layout, gmem, ptx.SPLAT, ptx.SPLAT, *smem))
    def store(ctx, products, weights, low, reach, out, row, key, *scales):
        f32 = ir.F32Type.get()
        sums = _lane_sums(products, weights, heads)
        thread = ptx.thread_of_warpgroup()
        tile_row = ptx.accumulator_row(thread)
        if heads == 64:  # this thread stores one of its two rows
            tile_row = arith.addi(tile_row, arith.shli(arith.andi(thread, ptx.i32(1)), ptx.i32(3)))
        position = arith.addi(ptx.scalar(key), tile_row)
        halves = 1 if heads == 64 else 2  # rows of a thread's sums
        scale_of = []
        for scale in scales:
            address = arith.addi(ptx.smem_address(scale), arith.shli(tile_row, ptx.i32(2)))
            scale_of = [
                ptx.ptx(f"ld.shared.f32 $0, [$1+{32 * half}];", address, result_types=f32, has_side_effects=True)
                for half in range(halves)
            ]
        address = arith.extui(ptx.i64_type(), arith.addi(ptx.scalar(row), _lane_query(heads)))
        address = arith.addi(ptx.gmem_address(out), arith.muli(address, ptx.i64(4 * size)))
        address = arith.addi(address, arith.shli(arith.extui(ptx.i64_type(), position), ptx.i64(2)))
        # One address serves all stores: what differs is a constant, which the instruction takes as an offset.
        for i in range(_lane_queries(heads)):
            first, count = (llvm.extractelement(x.registers.item(), ptx.i32(i)) for x in (low, reach))
            there = arith.cmpi(arith.CmpIPredicate.sge, count, ptx.i32(0))  # -1 marks a query that is not there
            for half in range(halves):
                score = sums[i * halves + half]
                if scales:
                    score = arith.mulf(score, scale_of[half])
                at = arith.addi(position, ptx.i32(8 * half))
                # Unsigned: a key before the first wraps around to a large number.
                reached = arith.cmpi(arith.CmpIPredicate.ult, arith.subi(at, first), count)
                score = arith.select(reached, score, arith.constant(f32, float("-inf")))
                # Keys of the last block may lie past the end: those are not stored at all.
                inside = arith.andi(there, arith.cmpi(arith.CmpIPredicate.slt, at, ptx.i32(size)))
                ptx.ptx(f"@$2 st.global.f32 [$0+{4 * size * i + 32 * half}], $1;", address, score, inside)

    store(products, weights, *ranges, out_gmem, row, key, *scales)


def _lane_sums(products, weights, heads: int) -> list:
    """Emits this lane's quarter of the sums Σ_j w_j · relu(x_j), complete."""
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, 0.0)
    products = products.registers.reshape(WARPGROUP_ROWS // 8, 2)
    weights = weights.registers.reshape(WARPGROUP_ROWS // 8)

    def part(number):
        """Emits this thread's part of one sum, number 2 · query + half."""
        query, half = divmod(number, 2)
        total = zero  # and not a first product: a sum of -0.0 is +0.0
        for column in range(query * heads // 8, (query + 1) * heads // 8):
            for i in range(2):
                x, w = (llvm.extractelement(pair, ptx.i32(i)) for pair in (products[column, half], weights[column]))
                # maximumf keeps NaN; and relu(-inf), which only bfloat16 can make, is 0.
                total = mlir_math.fma(arith.maximumf(x, zero), w, total)
        return total

    # Of 4 · quarter sums, bit 2 of the lane decides which half is kept, then bit 1 which half of that.
    quarter = WARPGROUP_ROWS // heads // 2
    return [
        _exchange(
            *(_exchange(part(i + j * quarter), part(i + (j + 2) * quarter), lane_bit=2) for j in range(2)), lane_bit=1
        )
        for i in range(quarter)
    ]


def _exchange(low, high, lane_bit: int):
    """Adds up two sums between two lanes: the one without the bit gets `low`, the other `high`."""
    upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(ptx.thread_id(), ptx.i32(lane_bit)), ptx.i32(0))
    kept, given = arith.select(upper, high, low), arith.select(upper, low, high)
    return arith.addf(kept, mgpu.utils.shfl_bfly(given, lane_bit))  # one shuffle for two sums


def _interpreted_store(products, weights, scales, ranges, out_gmem, first_row, key, heads):
    """Stores as `store_scores` does, in the interpreter."""
    start_gmem, stop_gmem, left = ranges
    x = jnp.where(products <= 0, 0.0, products)  # keeps NaN
    sums = jnp.sum((x * weights).reshape(TILE_KEYS, WARPGROUP_ROWS // heads, heads), axis=2)
    for scale in scales:
        sums = sums * scale[...][:, None]
    for i in range(WARPGROUP_ROWS // heads):

        @pl.when(i < left)
        def _(row=first_row + i, sums=sums[:, i]):
            positions = key + lax.iota(jnp.int32, TILE_KEYS)
            scores = jnp.where((positions >= start_gmem[row]) & (positions < stop_gmem[row]), sums, -jnp.inf)

            @pl.loop(0, jnp.minimum(TILE_KEYS, out_gmem.shape[1] - key))
            def _(j):
                out_gmem[row, key + j] = lax.dynamic_index_in_dim(scores, j, keepdims=False)


def fill_row(out_gmem, row, low, high, interpret) -> None:
    """Stores -inf in columns [low, high) of a row, as far as there are any; one warpgroup calls this together.

    A thread stores one column in 128: a row may begin at any multiple of 4 bytes, so that wider stores would not do.
    """
    size = out_gmem.shape[1]
    high = jnp.minimum(high, size)
    if interpret:

        @pl.loop(low, high)
        def _(i):
            out_gmem[row, i] = -jnp.inf

        return

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SPLAT, ptx.SPLAT, ptx.SPLAT))
    def store(ctx, out, row, column, high):
        at = arith.addi(ptx.scalar(column), ptx.thread_of_warpgroup())
        inside = arith.cmpi(arith.CmpIPredicate.slt, at, ptx.scalar(high))
        address = arith.muli(arith.extui(ptx.i64_type(), ptx.scalar(row)), ptx.i64(4 * size))
        address = arith.addi(address, arith.shli(arith.extui(ptx.i64_type(), at), ptx.i64(2)))
        address = arith.addi(ptx.gmem_address(out), address)
        ptx.ptx("@$2 st.global.f32 [$0], $1;", address, arith.constant(ir.F32Type.get(), float("-inf")), inside)

    @pl.loop(0, lax.div(jnp.maximum(high - low, 0) + WARPGROUP_THREADS - 1, WARPGROUP_THREADS))
    def _(i):
        store(out_gmem, row, low + i * WARPGROUP_THREADS, high)
