"""Computes the gradients of index scores by queries and weights: the first kernel of `index_scores_backward`.

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
from dsa_jax.pallas_kernels.hopper.constants import ROW_LAYOUT
from dsa_jax.pallas_kernels.index_scores.backward_pipeline import (
    BLOCK_ROWS,
    COMPUTE_WARPGROUPS,
    STAGES,
    TILE_ROWS,
    WARPGROUP_ROWS,
    Shape,
    feed,
    in_roles,
    load_g,
    over_heads,
    stream,
)


@functools.cache
def queries_kernel(shape: Shape, interpret: bool):
    """Makes the kernel for (q, k, weights, d_scores, ranges, plan, k_scale?).

    Its results are d_q bfloat16 [B · T · J, E] and d_weights float32 [B · T · J].
    """
    heads, dim, blocks = shape.heads, shape.dim, shape.blocks
    queries, own_queries = BLOCK_ROWS // heads, WARPGROUP_ROWS // heads  # of a block, of a warpgroup
    groups_of_row = math.ceil(shape.length / queries)
    groups = shape.batch * groups_of_row
    padded_size = math.ceil(shape.size / TILE_ROWS) * TILE_ROWS
    transforms = ptx.swizzled(jnp.bfloat16)

    def body(q_gmem, k_gmem, weights_gmem, d_scores_gmem, first_gmem, count_gmem, order_gmem, tile_gmem, tiles_gmem,
             *refs):  # fmt: skip
        scale_gmem, refs = refs[: int(shape.scaled)], refs[int(shape.scaled) :]  # one, or none
        # q_full: the queries and weights of a group have landed. Four arrivals, two copies a compute warpgroup; the
        # compute warpgroups wait.
        # q_empty: they may be replaced. An arrival of each compute warpgroup, at first and when it has them in
        # registers; the producer waits.
        # full[stage]: a tile of keys has landed. Two arrivals, of its copy and of the producer when g is stored; the
        # compute warpgroups wait.
        # empty[stage]: the stage may be refilled. An arrival of each compute warpgroup, at first and when it is done
        # with a tile; the producer waits.
        (d_q_gmem, d_weights_gmem, q_smem, d_q_smem, weights_smem, d_weights_smem, k_smem, g_smem,
         q_full, q_empty, full, empty) = refs  # fmt: skip
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def for_each_item(work):
            """Calls `work(group, step)` for the groups of this block; `step` tiles were before."""

            def visit(i, step):
                # Back and forth: who has the longest group of one round has the shortest of the next.
                turn = jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)
                place = i * blocks + turn
                group = order_gmem[jnp.minimum(place, groups - 1)]

                @pl.when(place < groups)
                def _():
                    work(group, step)

                return step + jnp.where(place < groups, tiles_gmem[group], 0)

            lax.fori_loop(0, pl.cdiv(groups, blocks), visit, jnp.int32(0))

        def first_query(group):
            """Gives the group's batch row and first query."""
            row = lax.div(group, groups_of_row)
            return row, (group - row * groups_of_row) * queries

        def produce():
            """Brings the queries of every group, and the tiles of keys that it reaches."""

            def copy_item(group, step):
                row, query = first_query(group)
                score_row = row * shape.length + query
                plgpu.barrier_wait(q_empty)
                # The last queries may belong to the next batch row or lie past the end: g is 0, nothing is stored.
                for i in range(COMPUTE_WARPGROUPS):
                    rows = pl.ds(score_row * heads + i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    target = pl.ds(i * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[rows], q_smem.at[target], q_full)
                    plgpu.copy_gmem_to_smem(weights_gmem.at[rows], weights_smem.at[target], q_full)

                def load(tile):
                    """Loads g of a tile; one past the last is out of reach, and zeros."""
                    key = (tile_gmem[group] + tile) * TILE_ROWS
                    return load_g(
                        d_scores_gmem, first_gmem, count_gmem, scale_gmem, score_row, group * queries,
                        row * shape.size, key, queries, TILE_ROWS, interpret,
                    )  # fmt: skip

                def copy(tile, stage):
                    keys = pl.ds(row * padded_size + (tile_gmem[group] + tile) * TILE_ROWS, TILE_ROWS)
                    plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem.at[stage], full.at[stage])

                feed(0, tiles_gmem[group], load, copy, g_smem, full, empty, interpret, before=step)

            for_each_item(copy_item)

        def compute():
            """Sums d_q and d_weights of this warpgroup's 64 (query, head) rows of every group."""
            own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def compute_item(group, step):
                plgpu.barrier_wait(q_full)
                q = plgpu.load(q_smem.at[own_rows], layout=plgpu.Layout.WGMMA)
                weights = plgpu.load(weights_smem.at[own_rows], layout=ROW_LAYOUT, optimized=False)
                plgpu.barrier_arrive(q_empty)

                def prepare(stage):
                    g = over_heads(g_smem.at[stage, pl.ds(warpgroup * own_queries, own_queries)], heads, interpret)

                    def combine(logits, d_weights):
                        # The weights come in at the end: they are the same for all keys of a row.
                        x = jnp.where(logits <= 0, 0.0, g)  # a logit of NaN passes, as in relu
                        return x.astype(jnp.bfloat16), d_weights + (x * logits).sum(axis=1)

                    return combine

                def add_tiles():
                    low, high = step, step + tiles_gmem[group]
                    return stream(q, k_smem, low, high, full, empty, prepare, zero_row, interpret)

                zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
                zero_row = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW_LAYOUT)
                d_q, d_weights = lax.cond(tiles_gmem[group] > 0, add_tiles, lambda: (zeros, zero_row))
                d_q = d_q * lax.broadcast_in_dim(weights, (WARPGROUP_ROWS, dim), [0])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the group before
                d_q_smem[own_rows] = d_q.astype(jnp.bfloat16)
                d_weights_smem[own_rows] = d_weights
                plgpu.commit_smem()
                row, query = first_query(group)
                for i in range(own_queries):
                    at = query + warpgroup * own_queries + i

                    @pl.when(at < shape.length)
                    def _(i=i, at=at):
                        source = pl.ds(warpgroup * WARPGROUP_ROWS + i * heads, heads)
                        target = pl.ds((row * shape.length + at) * heads, heads)
                        plgpu.copy_smem_to_gmem(d_q_smem.at[source], d_q_gmem.at[target])
                        plgpu.copy_smem_to_gmem(d_weights_smem.at[source], d_weights_gmem.at[target])

            for_each_item(compute_item)
            plgpu.wait_smem_to_gmem(0)

        in_roles(produce, compute, q_empty, empty, interpret)

    scratch = (  # with the KiB for J 64 and E 128
        plgpu.SMEM((BLOCK_ROWS, dim), jnp.bfloat16, transforms=transforms),  # q_smem, 32
        plgpu.SMEM((BLOCK_ROWS, dim), jnp.bfloat16, transforms=transforms),  # d_q_smem, 32: on its way out
        plgpu.SMEM((BLOCK_ROWS,), jnp.float32),  # weights_smem, 1
        plgpu.SMEM((BLOCK_ROWS,), jnp.float32),  # d_weights_smem, 1
        plgpu.SMEM((STAGES, TILE_ROWS, dim), jnp.bfloat16, transforms=transforms),  # k_smem, 128
        plgpu.SMEM((STAGES, queries, TILE_ROWS), jnp.float32),  # g_smem, 4
        plgpu.Barrier(num_arrivals=2 * COMPUTE_WARPGROUPS),  # q_full
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),  # q_empty
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # full
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=STAGES),  # empty
    )
    rows = shape.batch * shape.length * heads
    out = jax.ShapeDtypeStruct((rows, dim), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.float32)
    return ptx.persistent_kernel(
        body, out, scratch, blocks=blocks, interpret=interpret, warpgroups=COMPUTE_WARPGROUPS + 1
    )
