"""Index scores on Hopper: I[t,s] = k_scale[s] · Σ_j w[t,j] · relu(q[t,j] · k[s]), FP8 or bfloat16 (Eq. 1).

A persistent grid, one block an SM. The work is a line of key blocks: those that the first group of queries reaches,
then those of the second, and so on. It is cut into equal shares, one a thread block, wherever the cuts fall, since a
score is never summed over key blocks. A thread block has

- one producer warpgroup, whose TMA copies bring the queries and weights of a group and stream blocks of keys,
- math warpgroups, each with its own queries of the group: 128 (query, head) rows, the N operand of wgmma. Keys are
  the M operand, 64 at a time, so that the sum over heads runs along a row of the accumulator. All of them read the same
  keys, so a key is brought once for 128 / J · warpgroups queries.

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
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.work_split import for_each_part
from dsa_jax.pallas_kernels.index_scores.epilogue import KEY_TILE, ROWS, fill_row, load_ranges, store_scores

DTYPES = (jnp.float8_e4m3fn, jnp.bfloat16)
HEADS = (64, 32, 16)
DIMS = (128, 64)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

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
        return KEY_TILE * self.tiles

    def group_queries(self, heads: int) -> int:
        """Queries of a group, all of one batch row."""
        return ROWS // heads * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the math and of the producer warpgroups, in eights.

        What one gives up another takes, of what the block had at its launch: asking for more waits for ever.
        """
        producer = {4: 32}.get(self.warpgroups, 40)
        at_launch = ptx.launch_registers(self.warpgroups + 1) * (self.warpgroups + 1)
        return min(240, (at_launch - producer) // self.warpgroups // 8 * 8), producer

    def smem_bytes(self, dtype, dim: int, scaled: bool) -> int:
        """Shared memory of a thread block, barriers aside; every array starts on a multiple of 1024 bytes."""
        row = dim * jnp.dtype(dtype).itemsize
        arrays = [
            self.q_slots * self.warpgroups * ROWS * row,
            self.q_slots * self.warpgroups * ROWS * 4,
            self.stages * self.key_block * row,
            self.stages * self.key_block * 4 * scaled,
        ]
        return sum(map(ptx.allocated, arrays))


def default_config(dtype, dim: int) -> Config:
    """The configuration for inputs of this dtype and E.

    Of FP8, E 128, J 64 at T 4096 and S 32768 it is the fastest measured, 1124 TFLOP/s: with 3 warpgroups 1042, with 2
    967, with 1 tile and 8 stages 1099, with 4 and 2 1089, with 1 slot for queries 1098. The others were not compared.
    """
    if jnp.dtype(dtype).itemsize * dim == 256:  # bfloat16: the queries of a group take 128 KiB
        return Config(q_slots=1, stages=2)
    return Config()


class Plan(NamedTuple):
    """The line of all work: where each of the G groups of queries stands on it.

    Attributes:
      first: int32 [G], the first block of keys that each group reaches.
      offset: int32 [G + 1], where each group's blocks start on the line, and its end.
    """

    first: jax.Array
    offset: jax.Array


def why_not_shapes(q_index, k_index, weights, start, stop, k_scale=None) -> str | None:
    """Says why no kernel of index scores, forward or backward, can take these shapes, or None when some can."""
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
    some = start < stop
    pad = ((0, 0), (0, -start.shape[1] % queries))
    first = jnp.pad(jnp.where(some, start // key_block, blocks), pad, constant_values=blocks)
    end = jnp.pad(jnp.where(some, (stop + (key_block - 1)) // key_block, 0), pad)
    first, end = lax.reduce(  # both at once
        (first.reshape(-1, queries), end.reshape(-1, queries)),
        (jnp.int32(blocks), jnp.int32(0)),
        lambda x, y: (jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1])),
        dimensions=(1,),
    )
    count = jnp.maximum(end - first, 0)
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
    """Scores float32 [B, T, S] of keys in [start, stop), -inf elsewhere.

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
      interpret: whether to run in the interpreter.
    """
    reason = why_not(q_index, k_index, weights, start, stop, k_scale)
    if reason is not None:
        raise ValueError(f"index_scores: {reason}")
    batch, length, heads, dim = q_index.shape
    size = k_index.shape[1]
    config = config or default_config(q_index.dtype, dim)
    scaled = k_scale is not None
    used = config.smem_bytes(q_index.dtype, dim, scaled)
    there = ptx.SMEM_BYTES - 2048  # the barriers take the rest
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
        2 if interpret else ptx.multiprocessors(),
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
    """The kernel for one shape: (q, k, weights, start, stop, first, offset, k_scale?) -> float32 [B · T, S]."""
    math_groups, stages, key_block = config.warpgroups, config.stages, config.key_block
    padded_size = math.ceil(size / key_block) * key_block
    queries = ROWS // heads  # of a math warpgroup
    groups_of_row = math.ceil(length / config.group_queries(heads))
    groups = batch * groups_of_row
    transforms = ptx.swizzled(dtype, dim)

    def body(q_gmem, k_gmem, weights_gmem, start_gmem, stop_gmem, first_gmem, offset_gmem, *refs):
        scale_gmem, refs = refs[: int(scaled)], refs[int(scaled) :]  # one, or none
        out_gmem, q_smem, weights_smem, k_smem, *refs = refs
        scale_smem, refs = refs[: int(scaled)], refs[int(scaled) :]
        # q_full, a slot: the producer's copies of queries and of weights, one each a math warpgroup; math waits.
        # q_empty, a slot: each math warpgroup, at first and when done with a group; the producer waits.
        # full, a stage: the producer's copies of keys and their scale; math waits.
        # empty, a stage: each math warpgroup, at first and when done with a block; the producer waits.
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
            """The group's batch row and first query."""
            row = lax.div(group, groups_of_row)
            return row, (group - row * groups_of_row) * config.group_queries(heads)

        def for_each_empty(call):
            for barriers, count in ((q_empty, config.q_slots), (empty, stages)):
                for i in range(count):
                    call(barriers.at[i])

        def produce():
            def copy_item(group, low, high, shift):
                batch_row, query = first_query(group)
                slot = lax.rem(group, config.q_slots)
                plgpu.barrier_wait(q_empty.at[slot])
                # A group's last queries may belong to the next batch row or lie past the end (zeros then): such scores
                # are not stored. Likewise for the keys of the last block, which are out of everyone's range.
                for i in range(math_groups):
                    rows, here = pl.ds((batch_row * length + query) * heads + i * ROWS, ROWS), pl.ds(i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[rows], q_smem.at[slot, here], q_full.at[slot])
                    plgpu.copy_gmem_to_smem(weights_gmem.at[rows], weights_smem.at[slot, here], q_full.at[slot])

                @pl.loop(low, high)
                def _(position):
                    stage = lax.rem(position, stages)
                    plgpu.barrier_wait(empty.at[stage])
                    keys = pl.ds(batch_row * padded_size + (position + shift) * key_block, key_block)
                    plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem.at[stage], full.at[stage])
                    for source, target in zip(scale_gmem, scale_smem, strict=True):
                        plgpu.copy_gmem_to_smem(source.at[keys], target.at[stage], full.at[stage])

            for_each_item(copy_item)
            if interpret:  # which insists that every phase of a barrier is waited for
                for_each_empty(plgpu.barrier_wait)

        def score():
            for_each_empty(plgpu.barrier_arrive)
            here = pl.ds(warpgroup * ROWS, ROWS)

            def score_item(group, low, high, shift):
                batch_row, query = first_query(group)
                query = query + warpgroup * queries
                slot = lax.rem(group, config.q_slots)
                row, left = batch_row * length + query, length - query
                ranges = load_ranges(start_gmem, stop_gmem, row, left, size, heads, interpret)
                plgpu.barrier_wait(q_full.at[slot])
                weights = plgpu.load(weights_smem.at[slot, here], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

                @pl.loop(low, high)
                def _(position):
                    stage = lax.rem(position, stages)
                    plgpu.barrier_wait(full.at[stage])

                    @pl.loop(0, config.tiles)
                    def _(tile):
                        keys = stage, pl.ds(tile * KEY_TILE, KEY_TILE)

                        def multiply(accumulator):
                            plgpu.wgmma(accumulator, k_smem.at[keys], q_smem.at[slot, here].transpose((1, 0)))
                            return accumulator[...]

                        products = pl.run_scoped(multiply, ptx.ACC((KEY_TILE, ROWS), jnp.float32))
                        scales = [ref.at[keys] for ref in scale_smem]
                        key = (position + shift) * key_block + tile * KEY_TILE
                        store_scores(products, weights, scales, ranges, out_gmem, row, key, heads, interpret)

                    plgpu.barrier_arrive(empty.at[stage])

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

    scratch = [
        plgpu.SMEM((config.q_slots, math_groups * ROWS, dim), dtype, transforms=transforms),
        plgpu.SMEM((config.q_slots, math_groups * ROWS), jnp.float32),
        plgpu.SMEM((stages, key_block, dim), dtype, transforms=transforms),
        *([plgpu.SMEM((stages, key_block), jnp.float32)] if scaled else []),
        plgpu.Barrier(num_arrivals=2 * math_groups, num_barriers=config.q_slots),
        plgpu.Barrier(num_arrivals=math_groups, num_barriers=config.q_slots),
        plgpu.Barrier(num_arrivals=1 + scaled, num_barriers=stages),
        plgpu.Barrier(num_arrivals=math_groups, num_barriers=stages),
    ]
    return ptx.persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * length, size), jnp.float32),
        scratch_types=tuple(scratch),
        blocks=blocks,
        interpret=interpret,
        warpgroups=math_groups + 1,
    )
