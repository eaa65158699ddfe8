"""Computes the gradients by experts' weights on Hopper's tensor cores: products of their rows with gradients.

A persistent grid, one block on each multiprocessor. An item is a tile of one expert's gradient, 128 × 256 or 128 × 128,
summed in float32 over all of the expert's rows, in their order; warpgroups divide the work as in `rows`, the two that
multiply taking half of the tile's rows each. An expert with few rows has more to write than to multiply: sums leave by
TMA from slots of shared memory, while the next tile's products run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.grouped_product import pipeline
from dsa_jax.pallas_kernels.grouped_product.pipeline import BLOCK_ROWS, COMPUTE_WARPGROUPS, DEPTH
from dsa_jax.pallas_kernels.grouped_product.tiles import item_at, running_sums
from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import SWIZZLE_BYTES

TILE_ROWS = COMPUTE_WARPGROUPS * BLOCK_ROWS  # of the gradient
NARROW, WIDE = 128, 256  # columns of a tile
STAGES = 4  # of 48 KiB
SLOTS = 2  # of 8 KiB, of each compute warpgroup
BAND = 8  # tiles of the gradient's rows that are worked on at a time


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
    dtype: Any  # of the gradient
    blocks: int  # thread blocks that share the work
    interpret: bool

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return NARROW if self.right % WIDE else WIDE

    @property
    def written_columns(self) -> int:
        """Columns of a slot, whose rows have 128 bytes."""
        return SWIZZLE_BYTES // jnp.dtype(self.dtype).itemsize


def d_weights(x, d, row_blocks, *, dtype=jnp.float32, blocks: int | None = None, interpret: bool = False):
    """Computes the gradients of x · weight_e by the weights, x_eᵀ · d_e of each expert's rows.

    Args:
      x: [P, M] bfloat16, rows laid out by expert, zeros where there is none.
      d: [P, N] bfloat16, the gradient by the results, likewise.
      row_blocks: int32 [X], how many blocks of 64 rows each expert has.
      dtype: of the result, float32 or bfloat16, to which the sums are rounded once.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      [X, M, N]; zeros for an expert without rows.
    """
    blocks = blocks or (2 if interpret else ptx.multiprocessors())
    shape = Shape(x.shape[0], len(row_blocks), x.shape[1], d.shape[1], jnp.dtype(dtype), blocks, interpret)
    plan = jnp.stack([running_sums(row_blocks) - row_blocks, row_blocks], axis=1).astype(jnp.int32)
    return _kernel(shape)(x, d, plan)


@functools.cache
def _kernel(shape: Shape) -> Any:
    slots = (COMPUTE_WARPGROUPS, SLOTS, BLOCK_ROWS, shape.written_columns)
    return ptx.persistent_kernel(
        functools.partial(_block, shape=shape),
        jax.ShapeDtypeStruct((shape.experts, shape.left, shape.right), shape.dtype),
        dict(
            out_smem=plgpu.SMEM(slots, shape.dtype, transforms=ptx.swizzled(shape.dtype)),
            **pipeline.ring(STAGES, (DEPTH, TILE_ROWS), (DEPTH, shape.columns), copies=2),
        ),
        blocks=shape.blocks,
        interpret=shape.interpret,
    )


def _block(x, d, plan, out, *, a_smem, b_smem, out_smem, shape: Shape, **barriers):
    """Runs one thread block; references as in `d_weights`, `plan` each expert's first block and its blocks."""
    block = lax.axis_index("block")
    rows, columns = shape.left // TILE_ROWS, shape.right // shape.columns
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
        plgpu.copy_gmem_to_smem(x.at[inner, pl.ds(item.row * TILE_ROWS, TILE_ROWS)], a_smem.at[stage], full)
        plgpu.copy_gmem_to_smem(d.at[inner, pl.ds(item.column * shape.columns, shape.columns)], b_smem.at[stage], full)

    def operands(item, warpgroup, step, stage, i):
        return a_smem.at[stage, :, pl.ds(warpgroup * BLOCK_ROWS, BLOCK_ROWS)].transpose((1, 0)), b_smem.at[stage]

    def finish(item, warpgroup, sums, take):
        rows = pl.ds(item.row * TILE_ROWS + warpgroup * BLOCK_ROWS, BLOCK_ROWS)
        parts = shape.columns // shape.written_columns
        slots = min(SLOTS, parts)
        for i in range(parts):
            slot, first = out_smem.at[warpgroup, i % slots], i * shape.written_columns
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # what was in the slot has left
            slot[...] = sums[0][:, first : first + shape.written_columns].astype(shape.dtype)
            plgpu.commit_smem()
            part = pl.ds(item.column * shape.columns + first, shape.written_columns)
            plgpu.copy_smem_to_gmem(slot, out.at[item.expert, rows, part])

    steps = dict(copy=copy, operands=operands, finish=finish, products=1, columns=shape.columns)
    pipeline.run(for_each_item, **steps, **barriers, interpret=shape.interpret)
