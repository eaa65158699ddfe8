"""The gradients of the index scores by queries and weights: the first kernel of `index_scores_backward`.

Rows are (query, head) pairs, keys stream by in tiles of 128. Groups of queries are dealt to the blocks by length,
longest first, back and forth.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.index_scores.backward_tiles import (
    BLOCK_ROWS,
    ROWS,
    STAGES,
    TILE,
    WARPGROUPS,
    Shape,
    feed,
    in_roles,
    load_g,
    over_heads,
    stream,
)

ROW = plgpu.Layout.WGMMA.reduce(1)  # one value a row, as reducing the accumulator leaves it


@functools.cache
def queries_kernel(shape: Shape, interpret: bool):
    """(q, k, weights, d_scores, ranges, plan, k_scale?) -> d_q bfloat16 [B · T · J, E], d_weights float32."""
    heads, dim, blocks = shape.heads, shape.dim, shape.blocks
    queries, mine = BLOCK_ROWS // heads, ROWS // heads  # of a block, of a warpgroup
    groups_of_row = math.ceil(shape.length / queries)
    groups = shape.batch * groups_of_row
    padded_size = math.ceil(shape.size / TILE) * TILE
    transforms = ptx.swizzled(jnp.bfloat16)

    def body(q_gmem, k_gmem, weights_gmem, d_scores_gmem, first_gmem, count_gmem, order_gmem, tile_gmem, tiles_gmem,
             *refs):  # fmt: skip
        scale_gmem, refs = refs[: int(shape.scaled)], refs[int(shape.scaled) :]  # one, or none
        # q_full: the copies of queries and of weights; compute waits. q_empty: each compute warpgroup, at first and
        # when it has them in registers; the producer waits.
        # full, a stage: the copy of keys, and the producer's g; compute waits. empty, a stage: each compute warpgroup,
        # at first and when done with a tile; the producer waits.
        (d_q_gmem, d_weights_gmem, q_smem, d_q_smem, weights_smem, d_weights_smem, k_smem, g_smem,
         q_full, q_empty, full, empty) = refs  # fmt: skip
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def for_each_item(work):
            """Calls `work(group, step)` for the groups of this block; `step` tiles were before."""

            def visit(i, step):
                turn = jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)
                place = i * blocks + turn
                group = order_gmem[jnp.minimum(place, groups - 1)]

                @pl.when(place < groups)
                def _():
                    work(group, step)

                return step + jnp.where(place < groups, tiles_gmem[group], 0)

            lax.fori_loop(0, pl.cdiv(groups, blocks), visit, jnp.int32(0))

        def first_query(group):
            """The group's batch row and first query."""
            row = lax.div(group, groups_of_row)
            return row, (group - row * groups_of_row) * queries

        def produce():
            def copy_item(group, step):
                row, query = first_query(group)
                score_row = row * shape.length + query
                plgpu.barrier_wait(q_empty)
                # The last queries may belong to the next batch row or lie past the end: g is 0, nothing is stored.
                for i in range(WARPGROUPS):
                    rows, here = pl.ds(score_row * heads + i * ROWS, ROWS), pl.ds(i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[rows], q_smem.at[here], q_full)
                    plgpu.copy_gmem_to_smem(weights_gmem.at[rows], weights_smem.at[here], q_full)

                def load(tile):
                    key = (tile_gmem[group] + tile) * TILE
                    return load_g(
                        d_scores_gmem, first_gmem, count_gmem, scale_gmem, score_row, group * queries,
                        row * shape.size, key, queries, TILE, interpret,
                    )  # fmt: skip

                def copy(tile, stage):
                    keys = pl.ds(row * padded_size + (tile_gmem[group] + tile) * TILE, TILE)
                    plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem.at[stage], full.at[stage])

                feed(0, tiles_gmem[group], load, copy, g_smem, full, empty, interpret, before=step)

            for_each_item(copy_item)

        def compute():
            here = pl.ds(warpgroup * ROWS, ROWS)

            def compute_item(group, step):
                plgpu.barrier_wait(q_full)
                q = plgpu.load(q_smem.at[here], layout=plgpu.Layout.WGMMA)
                weights = plgpu.load(weights_smem.at[here], layout=ROW, optimized=False)
                plgpu.barrier_arrive(q_empty)

                def prepare(stage):
                    g = over_heads(g_smem.at[stage, pl.ds(warpgroup * mine, mine)], heads, interpret)

                    def combine(logits, d_weights):
                        x = jnp.where(logits > 0, g, 0.0)
                        return x.astype(jnp.bfloat16), d_weights + (x * logits).sum(axis=1)

                    return combine

                def add_tiles():
                    low, high = step, step + tiles_gmem[group]
                    return stream(q, k_smem, low, high, full, empty, prepare, zero_row, interpret)

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
                zero_row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                d_q, d_weights = lax.cond(tiles_gmem[group] > 0, add_tiles, lambda: (zeros, zero_row))
                d_q = d_q * lax.broadcast_in_dim(weights, (ROWS, dim), [0])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the group before
                d_q_smem[here] = d_q.astype(jnp.bfloat16)
                d_weights_smem[here] = d_weights
                plgpu.commit_smem()
                row, query = first_query(group)
                for i in range(mine):
                    at = query + warpgroup * mine + i

                    @pl.when(at < shape.length)
                    def _(i=i, at=at):
                        source = pl.ds(warpgroup * ROWS + i * heads, heads)
                        target = pl.ds((row * shape.length + at) * heads, heads)
                        plgpu.copy_smem_to_gmem(d_q_smem.at[source], d_q_gmem.at[target])
                        plgpu.copy_smem_to_gmem(d_weights_smem.at[source], d_weights_gmem.at[target])

            for_each_item(compute_item)
            plgpu.wait_smem_to_gmem(0)

        in_roles(produce, compute, q_empty, empty, interpret)

    scratch = (
        plgpu.SMEM((BLOCK_ROWS, dim), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((BLOCK_ROWS, dim), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((BLOCK_ROWS,), jnp.float32),
        plgpu.SMEM((BLOCK_ROWS,), jnp.float32),
        plgpu.SMEM((STAGES, TILE, dim), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((STAGES, queries, TILE), jnp.float32),
        plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    )
    rows = shape.batch * shape.length * heads
    out = jax.ShapeDtypeStruct((rows, dim), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.float32)
    return ptx.persistent_kernel(body, out, scratch, blocks=blocks, interpret=interpret, warpgroups=WARPGROUPS + 1)
