"""Computes the gradients by experts' weights on Hopper's tensor cores: products of their rows with gradients.

A persistent grid, one block on each multiprocessor. An item is a tile of one expert's gradient, 256 × 128 or 128 × 128,
summed in float32 over all of the expert's rows, in their order; warpgroups divide the work as in `rows`, the two that
multiply taking half of the tile's rows each. Sums go from registers to memory: 32 bytes of a row at a time, which are
whole sectors.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.grouped_product import pipeline
from dsa_jax.pallas_kernels.grouped_product.pipeline import BLOCK_ROWS, DEPTH
from dsa_jax.pallas_kernels.grouped_product.tiles import item_at
from dsa_jax.pallas_kernels.hopper import ptx

TILE_COLUMNS = 128  # of the gradient
STAGES = 4  # of 48 KiB
BAND = 8  # tiles of its rows that are worked on at a time


class Item(NamedTuple):
    """Names the place of an item's tile, and the rows that it sums over."""

    expert: jax.Array
    first: jax.Array  # block of rows
    row: jax.Array  # of the gradient
    column: jax.Array


class Shape(NamedTuple):
    """Holds all that a kernel is made for, so that it is made once for each."""

    rows: int
    experts: int
    left: int
    right: int
    blocks: int  # thread blocks that share the work
    interpret: bool

    @property
    def products(self) -> int:
        """Products [64, 128] of a compute warpgroup: 2 where the gradient's rows make whole tiles of 256."""
        most = pipeline.MAX_PRODUCTS
        return 1 if self.left % (most * pipeline.COMPUTE_WARPGROUPS * BLOCK_ROWS) else most

    @property
    def tile_rows(self) -> int:
        """Rows of the gradient in a tile."""
        return self.products * pipeline.COMPUTE_WARPGROUPS * BLOCK_ROWS


def d_weights(x, d, row_blocks, *, blocks: int | None = None, interpret: bool = False):
    """Computes the gradients of x · weight_e by the weights, x_eᵀ · d_e of each expert's rows.

    Args:
      x: [P, M] bfloat16, rows laid out by expert, zeros where there is none.
      d: [P, N] bfloat16, the gradient by the results, likewise.
      row_blocks: int32 [X], how many blocks of 64 rows each expert has.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      float32 [X, M, N]; zeros for an expert without rows.
    """
    blocks = blocks or (2 if interpret else ptx.multiprocessors())
    shape = Shape(x.shape[0], len(row_blocks), x.shape[1], d.shape[1], blocks, interpret)
    plan = jnp.stack([jnp.cumsum(row_blocks) - row_blocks, row_blocks], axis=1).astype(jnp.int32)
    return _kernel(shape)(x, d, plan)


@functools.cache
def _kernel(shape: Shape) -> Any:
    return ptx.persistent_kernel(
        functools.partial(_block, shape=shape),
        jax.ShapeDtypeStruct((shape.experts, shape.left, shape.right), jnp.float32),
        pipeline.ring(STAGES, (DEPTH, shape.tile_rows), (DEPTH, TILE_COLUMNS), copies=2),
        blocks=shape.blocks,
        interpret=shape.interpret,
    )


def _block(x, d, plan, out, *, a_smem, b_smem, shape: Shape, **barriers):
    """Runs one thread block; references as in `d_weights`, `plan` each expert's first block and its blocks."""
    block = lax.axis_index("block")
    rows, columns = shape.left // shape.tile_rows, shape.right // TILE_COLUMNS
    items = shape.experts * rows * columns

    def for_each_item(work):
        def visit(i, before):
            index = block + i * shape.blocks
            expert = lax.div(index, rows * columns)
            row, column = item_at(index - expert * (rows * columns), rows, columns, BAND)
            steps = plan[expert, 1]
            work(Item(expert, plan[expert, 0], row, column), before, steps)
            return before + steps

        lax.fori_loop(0, lax.div(items - block + shape.blocks - 1, shape.blocks), visit, jnp.int32(0))

    def copy(item, step, stage, full):
        inner = pl.ds((item.first + step) * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(x.at[inner, pl.ds(item.row * shape.tile_rows, shape.tile_rows)], a_smem.at[stage], full)
        plgpu.copy_gmem_to_smem(d.at[inner, pl.ds(item.column * TILE_COLUMNS, TILE_COLUMNS)], b_smem.at[stage], full)

    def place(warpgroup, i):
        return pl.ds((warpgroup * shape.products + i) * BLOCK_ROWS, BLOCK_ROWS)

    def operands(item, warpgroup, step, stage, i):
        return a_smem.at[stage, :, place(warpgroup, i)].transpose((1, 0)), b_smem.at[stage]

    def finish(item, warpgroup, sums):
        for i, each in enumerate(sums):
            rows = pl.ds(item.row * shape.tile_rows + place(warpgroup, i).start, BLOCK_ROWS)
            out[item.expert, rows, pl.ds(item.column * TILE_COLUMNS, TILE_COLUMNS)] = each

    steps = dict(copy=copy, products=lambda *_: shape.products, operands=operands, finish=finish, columns=TILE_COLUMNS)
    pipeline.run(for_each_item, **steps, **barriers, interpret=shape.interpret)
