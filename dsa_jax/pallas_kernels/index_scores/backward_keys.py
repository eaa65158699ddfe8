"""The gradient of the index scores by keys: the second kernel of `index_scores_backward`, and the sum after it.

Rows are keys, (query, head) pairs stream by, 128 at a time. The tiles of all blocks of keys stand on one line that is
cut into equal shares. Who begins a block of keys writes its sum in place, who continues one (a thread block does so
once at most, first thing) writes to a slot of its own, and the last kernel adds up.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.work_split import for_each_part
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
    over_columns,
    store_sums,
    stream,
)

PIECE = 2048  # elements of d_k that a block of the last kernel adds up
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value a column


@functools.cache
def keys_kernel(shape: Shape, interpret: bool):
    """(q, k, weights, d_scores, ranges, first, offset, k_scale?) -> parts of d_k, float32 [(N + blocks) · rows, E].

    Of a block of keys it has the part of who began it; then, of every thread block, of the one that it continued.
    """
    heads, dim, blocks = shape.heads, shape.dim, shape.blocks
    queries = TILE // heads  # of a tile
    tiles_of_row = math.ceil(shape.length / queries)
    items_of_row = math.ceil(shape.size / BLOCK_ROWS)
    items = shape.batch * items_of_row
    transforms = ptx.swizzled(jnp.bfloat16)

    def body(q_gmem, k_gmem, weights_gmem, d_scores_gmem, first_gmem, count_gmem, tile_gmem, offset_gmem, *refs):
        scale_gmem, refs = refs[: int(shape.scaled)], refs[int(shape.scaled) :]  # one, or none
        # k_full: the copy of keys; compute waits. k_empty: each compute warpgroup, at first and when it has them in
        # registers; the producer waits.
        # full, a stage: the copies of queries and of weights, and the producer's g; compute waits. empty, a stage: each
        # compute warpgroup, at first and when done with a tile; the producer waits.
        parts_gmem, k_smem, q_smem, weights_smem, g_smem, k_full, k_empty, full, empty = refs
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def for_each_item(work):
            """Calls `work(item, low, high)` for every block of keys that this thread block has tiles of."""
            for_each_part(offset_gmem, block, blocks, work)

        def produce():
            def copy_item(item, low, high):
                row = lax.div(item, items_of_row)
                plgpu.barrier_wait(k_empty)
                plgpu.copy_gmem_to_smem(k_gmem.at[pl.ds(item * BLOCK_ROWS, BLOCK_ROWS)], k_smem, k_full)
                key = (item - row * items_of_row) * BLOCK_ROWS
                shift = tile_gmem[item] - offset_gmem[item]

                def load(position):
                    query = (jnp.minimum(position, high - 1) + shift) * queries
                    return load_g(
                        d_scores_gmem, first_gmem, count_gmem, scale_gmem, row * shape.length + query,
                        row * tiles_of_row * queries + query, row * shape.size, key, queries, BLOCK_ROWS, interpret,
                    )  # fmt: skip

                def copy(position, stage):
                    # The last queries may belong to the next batch row or lie past the end: g is 0.
                    source = pl.ds((row * shape.length + (position + shift) * queries) * heads, TILE)
                    plgpu.copy_gmem_to_smem(q_gmem.at[source], q_smem.at[stage], full.at[stage])
                    plgpu.copy_gmem_to_smem(weights_gmem.at[source], weights_smem.at[stage], full.at[stage])

                feed(low, high, load, copy, g_smem, full, empty, interpret)

            for_each_item(copy_item)

        def compute():
            here = pl.ds(warpgroup * ROWS, ROWS)

            def compute_item(item, low, high):
                plgpu.barrier_wait(k_full)
                k = plgpu.load(k_smem.at[here], layout=plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(k_empty)

                def prepare(stage):
                    weights = plgpu.load(weights_smem.at[stage], layout=COLUMN, optimized=False)
                    g = over_columns(g_smem.at[stage, :, here], heads, BLOCK_ROWS, interpret)

                    def combine(logits, state):
                        x = jnp.where(logits > 0, g * lax.broadcast_in_dim(weights, g.shape, [1]), 0.0)
                        return x.astype(jnp.bfloat16), state

                    return combine

                d_k, _ = stream(k, q_smem, low, high, full, empty, prepare, (), interpret)
                place = jnp.where(low == offset_gmem[item], item, items + block)
                store_sums(d_k, parts_gmem, place * BLOCK_ROWS + warpgroup * ROWS, interpret)

            for_each_item(compute_item)

        in_roles(produce, compute, k_empty, empty, interpret)

    scratch = (
        plgpu.SMEM((BLOCK_ROWS, dim), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((STAGES, TILE, dim), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((STAGES, TILE), jnp.float32),
        plgpu.SMEM((STAGES, queries, BLOCK_ROWS), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    )
    out = jax.ShapeDtypeStruct(((items + blocks) * BLOCK_ROWS, dim), jnp.float32)
    return ptx.persistent_kernel(body, out, scratch, blocks=blocks, interpret=interpret, warpgroups=WARPGROUPS + 1)


@functools.cache
def sum_kernel(shape: Shape, interpret: bool):
    """(parts, offset, continued, total?) -> d_k of whole blocks of keys, all one-dimensional."""
    block_size = BLOCK_ROWS * shape.dim
    items = shape.batch * math.ceil(shape.size / BLOCK_ROWS)
    pieces = block_size // PIECE

    def body(parts_gmem, offset_gmem, continued_gmem, *refs):
        total_gmem, (d_k_gmem,) = refs[:-1], refs[-1:]  # the total: one, or none
        item, piece = lax.axis_index("item"), lax.axis_index("piece")
        layout = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=4)

        def load(ref, block):
            return plgpu.load(ref.at[pl.ds(block * block_size + piece * PIECE, PIECE)], layout=layout, optimized=False)

        def parts():
            def add(block, x):
                return x + load(parts_gmem, items + block)

            first, last = continued_gmem[2 * item], continued_gmem[2 * item + 1]
            return lax.fori_loop(first, last, add, load(parts_gmem, item))

        zeros = plgpu.layout_cast(jnp.zeros((PIECE,), jnp.float32), layout)
        x = lax.cond(offset_gmem[item] < offset_gmem[item + 1], parts, lambda: zeros)
        for ref in total_gmem:
            x = load(ref, item) + x
        d_k_gmem[pl.ds(item * block_size + piece * PIECE, PIECE)] = x

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((items * block_size,), jnp.float32),
        grid=(items, pieces),
        grid_names=("item", "piece"),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
