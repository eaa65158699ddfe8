"""Computes the gradient of index scores by keys: the second kernel of `index_scores_backward`, and the sum after it.

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
from dsa_jax.pallas_kernels.hopper.constants import COLUMN_LAYOUT
from dsa_jax.pallas_kernels.hopper.work_split import for_each_part
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
    over_columns,
    store_sums,
    stream,
)

PIECE_ELEMENTS = 2048  # of d_k, that a thread block of the last kernel adds up


@functools.cache
def keys_kernel(shape: Shape, interpret: bool):
    """Makes the kernel for (q, k, weights, d_scores, ranges, first, offset, k_scale?): parts of d_k.

    Its result is float32 [(N + blocks) · 128, E]. The first N blocks of rows are the parts by who began a block of
    keys, the others are by thread block: its part of the block of keys that it continued.
    """
    heads, dim, blocks = shape.heads, shape.dim, shape.blocks
    queries = TILE_ROWS // heads  # of a tile
    tiles_of_row = math.ceil(shape.length / queries)
    items_of_row = math.ceil(shape.size / BLOCK_ROWS)
    items = shape.batch * items_of_row
    transforms = ptx.swizzled(jnp.bfloat16)

    def body(q_gmem, k_gmem, weights_gmem, d_scores_gmem, first_gmem, count_gmem, tile_gmem, offset_gmem, *refs):
        scale_gmem, refs = refs[: int(shape.scaled)], refs[int(shape.scaled) :]  # one, or none
        # k_full: the keys of an item have landed. One arrival, of the copy; the compute warpgroups wait.
        # k_empty: the keys may be replaced. An arrival of each compute warpgroup, at first and when it has them in
        # registers; the producer waits.
        # full[stage]: a tile has landed. Three arrivals, of the copies of queries and of weights and of the producer
        # when g is stored; the compute warpgroups wait.
        # empty[stage]: the stage may be refilled. An arrival of each compute warpgroup, at first and when it is done
        # with a tile; the producer waits.
        parts_gmem, k_smem, q_smem, weights_smem, g_smem, k_full, k_empty, full, empty = refs
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def for_each_item(work):
            """Calls `work(item, low, high)` for every block of keys that this thread block has tiles of."""
            for_each_part(offset_gmem, block, blocks, work)

        def produce():
            """Brings the keys of every item, and the tiles of queries that meet them."""

            def copy_item(item, low, high):
                row = lax.div(item, items_of_row)
                plgpu.barrier_wait(k_empty)
                plgpu.copy_gmem_to_smem(k_gmem.at[pl.ds(item * BLOCK_ROWS, BLOCK_ROWS)], k_smem, k_full)
                key = (item - row * items_of_row) * BLOCK_ROWS
                shift = tile_gmem[item] - offset_gmem[item]  # from a position on the line to a tile of queries

                def load(position):
                    """Loads g of a tile; behind the last that of the last, which nobody uses."""
                    query = (jnp.minimum(position, high - 1) + shift) * queries
                    return load_g(
                        d_scores_gmem, first_gmem, count_gmem, scale_gmem, row * shape.length + query,
                        row * tiles_of_row * queries + query, row * shape.size, key, queries, BLOCK_ROWS, interpret,
                    )  # fmt: skip

                def copy(position, stage):
                    # The last queries may belong to the next batch row or lie past the end: g is 0.
                    source = pl.ds((row * shape.length + (position + shift) * queries) * heads, TILE_ROWS)
                    plgpu.copy_gmem_to_smem(q_gmem.at[source], q_smem.at[stage], full.at[stage])
                    plgpu.copy_gmem_to_smem(weights_gmem.at[source], weights_smem.at[stage], full.at[stage])

                feed(low, high, load, copy, g_smem, full, empty, interpret)

            for_each_item(copy_item)

        def compute():
            """Sums d_k of this warpgroup's 64 keys of every item."""
            own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def compute_item(item, low, high):
                plgpu.barrier_wait(k_full)
                k = plgpu.load(k_smem.at[own_rows], layout=plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(k_empty)

                def prepare(stage):
                    weights = plgpu.load(weights_smem.at[stage], layout=COLUMN_LAYOUT, optimized=False)
                    g = over_columns(g_smem.at[stage, :, own_rows], heads, BLOCK_ROWS, interpret)

                    def combine(logits, state):
                        # Rounded to bfloat16 for the second product: the sums' error is that of this rounding.
                        # A logit of NaN passes, as in relu.
                        x = jnp.where(logits <= 0, 0.0, g * lax.broadcast_in_dim(weights, g.shape, [1]))
                        return x.astype(jnp.bfloat16), state

                    return combine

                d_k, _ = stream(k, q_smem, low, high, full, empty, prepare, (), interpret)
                # Begun here, or continued: whose part it is decides where it goes, so no two write to one place.
                place = jnp.where(low == offset_gmem[item], item, items + block)
                store_sums(d_k, parts_gmem, place * BLOCK_ROWS + warpgroup * WARPGROUP_ROWS, interpret)

            for_each_item(compute_item)

        in_roles(produce, compute, k_empty, empty, interpret)

    scratch = (  # with the KiB for J 64 and E 128
        plgpu.SMEM((BLOCK_ROWS, dim), jnp.bfloat16, transforms=transforms),  # k_smem, 32
        plgpu.SMEM((STAGES, TILE_ROWS, dim), jnp.bfloat16, transforms=transforms),  # q_smem, 128
        plgpu.SMEM((STAGES, TILE_ROWS), jnp.float32),  # weights_smem, 2
        plgpu.SMEM((STAGES, queries, BLOCK_ROWS), jnp.float32),  # g_smem, 4
        plgpu.Barrier(),  # k_full
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),  # k_empty
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),  # full
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=STAGES),  # empty
    )
    out = jax.ShapeDtypeStruct(((items + blocks) * BLOCK_ROWS, dim), jnp.float32)
    return ptx.persistent_kernel(
        body, out, scratch, blocks=blocks, interpret=interpret, warpgroups=COMPUTE_WARPGROUPS + 1
    )


@functools.cache
def sum_kernel(shape: Shape, interpret: bool):
    """Makes the kernel for (parts, offset, continued, total?): d_k of whole blocks of keys, all one-dimensional.

    It adds up the parts in the order of thread blocks, so that the bits are the same every time.
    """
    block_size = BLOCK_ROWS * shape.dim
    items = shape.batch * math.ceil(shape.size / BLOCK_ROWS)
    pieces = block_size // PIECE_ELEMENTS

    def body(parts_gmem, offset_gmem, continued_gmem, *refs):
        total_gmem, (d_k_gmem,) = refs[:-1], refs[-1:]  # the total: one, or none
        item, piece = lax.axis_index("item"), lax.axis_index("piece")
        layout = plgpu.Layout.WG_STRIDED((PIECE_ELEMENTS,), vec_size=4)

        def load(ref, block):
            return plgpu.load(
                ref.at[pl.ds(block * block_size + piece * PIECE_ELEMENTS, PIECE_ELEMENTS)],
                layout=layout,
                optimized=False,
            )

        def parts():
            """Adds up the part of who began the block of keys, and those of who continued it."""

            def add(block, x):
                return x + load(parts_gmem, items + block)

            first, last = continued_gmem[2 * item], continued_gmem[2 * item + 1]
            return lax.fori_loop(first, last, add, load(parts_gmem, item))

        zeros = plgpu.layout_cast(jnp.zeros((PIECE_ELEMENTS,), jnp.float32), layout)
        # A block of keys that nobody reaches has no part: its place holds anything.
        x = lax.cond(offset_gmem[item] < offset_gmem[item + 1], parts, lambda: zeros)
        for ref in total_gmem:
            x = load(ref, item) + x
        d_k_gmem[pl.ds(item * block_size + piece * PIECE_ELEMENTS, PIECE_ELEMENTS)] = x

    return ptx.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((items * block_size,), jnp.float32),
        grid=(items, pieces),
        grid_names=("item", "piece"),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
