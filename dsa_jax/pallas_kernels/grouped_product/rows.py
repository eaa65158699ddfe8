"""Multiplies rows, laid out by expert, by the weights of their experts on Hopper's tensor cores, bfloat16.

A persistent grid, one block on each multiprocessor. An item is a tile of up to 128 rows of one expert and 256 columns
of products; three warpgroups work on it:

  warpgroup 0, 1   64 rows each × 256 columns, summed in registers: of one weight, or 128 columns each of two
  warpgroup 2      brings both operands by TMA, 64 of the inner dimension at a time, four such stages ahead

A tile with 64 rows leaves the second warpgroup without products.

Where experts have few rows each, reading weights takes longer than multiplying: then a tile is one block of 64 rows and
128 columns, half of them to each warpgroup, and up to ten stages are in flight, most of their bytes weights.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.grouped_product import fp8_tiles, pipeline
from dsa_jax.pallas_kernels.grouped_product.pipeline import BLOCK_ROWS, DEPTH
from dsa_jax.pallas_kernels.grouped_product.tiles import MAX_BLOCKS, item_at
from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import ROW_LAYOUT

NARROW, WIDE = 128, 256  # columns of a tile of the result
WRITTEN_COLUMNS = 64  # at a time
SLOTS = 2  # of each compute warpgroup, for what is written
STAGE_BYTES = 192 * 1024  # of all stages
BAND = 4  # tiles of rows that are worked on at a time


def tile_blocks(few: bool) -> int:
    """Gives the blocks of rows of a tile, at most."""
    return 1 if few else MAX_BLOCKS


class Shape(NamedTuple):
    """Holds all that a kernel is made for, so that it is made once for each."""

    rows: int  # P, padding included
    tiles: int
    weights: int  # that a row is multiplied with at a time
    inner: int  # columns of the rows
    outer: int  # columns of the result
    few: bool  # whether a tile has a single block of rows
    fp8: bool  # whether weights are e4m3, with a scale for each block of 128 × 128
    blocks: int  # thread blocks that share the work
    interpret: bool

    @classmethod
    def of(cls, x, weight, tiles, outer: int, weights: int, few: bool, blocks: int | None, interpret: bool) -> "Shape":
        """Takes the sizes from the operands."""
        blocks = blocks or (2 if interpret else ptx.multiprocessors())
        fp8 = weight.dtype == jnp.float8_e4m3fn
        return cls(x.shape[0], len(tiles) - 1, weights, x.shape[1], outer, few, fp8, blocks, interpret)

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """A result of the product's own shape."""
        return jax.ShapeDtypeStruct((self.rows, self.outer), jnp.bfloat16)

    @property
    def columns(self) -> int:
        """Columns of a tile of the result."""
        return NARROW if self.few or self.weights > 1 or self.outer % WIDE else WIDE

    @property
    def column_tiles(self) -> int:
        """Tiles of columns of the result."""
        return self.outer // self.columns

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, at most."""
        return tile_blocks(self.few) * BLOCK_ROWS

    @property
    def steps(self) -> int:
        """Stages of a product."""
        return self.inner // DEPTH


def gate_up(
    x,
    gate_proj,
    up_proj,
    row_gates,
    tiles,
    *,
    scales: tuple = (),
    keep: bool = False,
    few: bool = False,
    blocks: int | None = None,
    interpret: bool = False,
):
    """Computes hidden = row_gate · silu(x · gate_e) · (x · up_e) of every row, e being the expert of its tile.

    Both products are rounded to bfloat16 before the activation, which is in float32.

    Args:
      x: [P, D] bfloat16, rows laid out by expert.
      gate_proj: [X, D, F] bfloat16 or, of few rows, e4m3.
      up_proj: see `gate_proj`.
      row_gates: float32 [P].
      scales: of e4m3 weights, those of both, float32 [X, D / 128, F / 128].
      tiles: of `make_tiles`, of up to `tile_blocks(few)` blocks.
      keep: whether the products themselves are wanted, for the gradients.
      few: whether tiles have a single block of rows, so that weights are read as fast as memory gives them.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      hidden [P, F] bfloat16 and, to `keep`, both products likewise. Rows of no tile hold anything.
    """
    shape = Shape.of(x, gate_proj, tiles, gate_proj.shape[2], 2, few, blocks, interpret)
    return _gate_up_kernel(shape, keep)(x, gate_proj, up_proj, row_gates, tiles, *map(fp8_tiles.scale_bits, scales))


def multiply(
    x,
    weight,
    tiles,
    *,
    scales: tuple = (),
    few: bool = False,
    blocks: int | None = None,
    interpret: bool = False,
):
    """Computes x · weight_e: x [P, K] and weight [X, K, N] to [P, N]; dtypes and the rest as in `gate_up`."""
    shape = Shape.of(x, weight, tiles, weight.shape[2], 1, few, blocks, interpret)
    return _multiply_kernel(shape)(x, weight, tiles, *map(fp8_tiles.scale_bits, scales))


def d_hidden(dy, down_proj, gate, up, row_gates, tiles, *, blocks: int | None = None, interpret: bool = False):
    """Computes the gradients by what `gate_up` kept, from those by the rows' results.

    Args:
      dy: [P, D] bfloat16, the gradient by hidden · down_e.
      down_proj: [X, F, D] bfloat16.
      gate: [P, F] bfloat16, as `gate_up` kept it.
      up: see `gate`.
      row_gates: float32 [P].
      tiles: of `make_tiles`, of up to `tile_blocks(few=False)` blocks.
      blocks: see `gate_up`.
      interpret: see `gate_up`.

    Returns:
      Gradients by `gate` and `up` [P, F] bfloat16, hidden [P, F] bfloat16, and float32 [tiles of F, P] whose sums are
      the gradients by `row_gates`.
    """
    shape = Shape.of(dy, down_proj, tiles, down_proj.shape[1], 1, False, blocks, interpret)
    return _d_hidden_kernel(shape)(dy, down_proj, gate, up, row_gates, tiles)


def d_rows(d_gate, d_up, gate_proj, up_proj, tiles, *, blocks: int | None = None, interpret: bool = False):
    """Computes the gradient by x, d_gate · gate_eᵀ + d_up · up_eᵀ: [P, D] bfloat16; the rest is as in `gate_up`."""
    shape = Shape.of(d_gate, gate_proj, tiles, gate_proj.shape[1], 1, False, blocks, interpret)
    return _d_rows_kernel(shape)(d_gate, d_up, gate_proj, up_proj, tiles)


# The four kernels: which operands a stage holds, and what becomes of the sums.


class Item(NamedTuple):
    """Names the place of an item's tile."""

    expert: jax.Array
    row: jax.Array  # the first row
    column: jax.Array  # the tile of columns
    blocks: jax.Array  # of 64 rows


@functools.cache
def _gate_up_kernel(shape: Shape, keep: bool) -> Any:
    def body(x, gate_proj, up_proj, row_gates, tiles, *refs, **scratch):
        scales, (hidden, *kept) = refs[: 2 * shape.fp8], refs[2 * shape.fp8 :]

        def finish(item, row, columns, sums, out_smem, take):
            products = [each.astype(jnp.bfloat16) for each in sums]
            row_gate = plgpu.load(row_gates.at[pl.ds(row, BLOCK_ROWS)], layout=ROW_LAYOUT, optimized=False)
            gate, up = (each.astype(jnp.float32) for each in products)
            weighted = gate / (1 + jnp.exp(-gate)) * up * lax.broadcast_in_dim(row_gate, gate.shape, [0])
            for ref, value in zip((*kept, hidden), (*products[: len(kept)], weighted), strict=True):
                _store(value, ref.at[pl.ds(row, BLOCK_ROWS), columns], out_smem)

        copy = _copies(shape, x, gate_proj, up_proj)
        _run(shape, shape.steps, tiles, copy, finish, scales=scales, **scratch)

    return _make(body, shape, [shape.result] * (3 if keep else 1), transposed=False)


@functools.cache
def _multiply_kernel(shape: Shape) -> Any:
    def body(x, weight, tiles, *refs, **scratch):
        scales, out = refs[:-1], refs[-1]
        finish = functools.partial(_store_sums, out)
        _run(shape, shape.steps, tiles, _copies(shape, x, weight), finish, scales=scales, **scratch)

    return _make(body, shape, shape.result, transposed=False)


@functools.cache
def _d_rows_kernel(shape: Shape) -> Any:
    def body(d_gate, d_up, gate_proj, up_proj, tiles, out, **scratch):
        copies = [_copies(shape, d, weight, transposed=True) for d, weight in ((d_gate, gate_proj), (d_up, up_proj))]

        def copy(item, step, *place):
            """Brings the stages of one product, then those of the other."""
            pl.when(step < shape.steps)(lambda: copies[0](item, step, *place))
            pl.when(step >= shape.steps)(lambda: copies[1](item, step - shape.steps, *place))

        _run(shape, 2 * shape.steps, tiles, copy, functools.partial(_store_sums, out), **scratch)

    return _make(body, shape, shape.result, transposed=True)


@functools.cache
def _d_hidden_kernel(shape: Shape) -> Any:
    parts = shape.columns // WRITTEN_COLUMNS

    def body(dy, down_proj, gate, up, row_gates, tiles, d_gate, d_up, hidden, d_row_gates, **scratch):
        products = _copies(shape, dy, down_proj, transposed=True)

        def copy(item, step, a_smem, b_smem, full):
            """Brings the stages of the product; then in each the rows of 64 columns of `gate` and `up`."""
            pl.when(step < shape.steps)(lambda: products(item, step, a_smem, b_smem, full))

            @pl.when(step >= shape.steps)
            def _():
                first = item.column * shape.columns + (step - shape.steps) * WRITTEN_COLUMNS
                tile = pl.ds(item.row, shape.tile_rows), pl.ds(first, WRITTEN_COLUMNS)
                plgpu.copy_gmem_to_smem(gate.at[tile], a_smem, full)
                plgpu.copy_gmem_to_smem(up.at[tile], b_smem.at[0, pl.ds(0, shape.tile_rows)], full)

        def finish(item, row, columns, sums, out_smem, take):
            (d_weighted,), rows = sums, pl.ds(row, BLOCK_ROWS)
            row_gate = plgpu.load(row_gates.at[rows], layout=ROW_LAYOUT, optimized=False)
            over = lax.broadcast_in_dim(row_gate, (BLOCK_ROWS, WRITTEN_COLUMNS), [0])
            block = pl.ds(row - item.row, BLOCK_ROWS)

            def read(stage):
                refs = scratch["a_smem"].at[stage, block], scratch["b_smem"].at[stage, 0, block]
                return [plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32) for ref in refs]

            total, slot = None, 0
            for i in range(parts):
                first = i * WRITTEN_COLUMNS
                part = pl.ds(columns.start + first, WRITTEN_COLUMNS)
                g, u = take(i, read)
                sigmoid = 1 / (1 + jnp.exp(-g))
                silu = g * sigmoid
                d = d_weighted[:, first : first + WRITTEN_COLUMNS]
                d_activation = d * over
                weighted = jnp.sum(d * (silu * u), axis=1)
                total = weighted if total is None else total + weighted
                results = (
                    (d_gate, d_activation * u * (sigmoid * (1 + g * (1 - sigmoid)))),
                    (d_up, d_activation * silu),
                    (hidden, silu * u * over),
                )
                for ref, value in results:
                    _store_part(value, ref.at[rows, part], out_smem, slot)
                    slot = (slot + 1) % SLOTS
            d_row_gates[item.column, rows] = total

        _run(shape, shape.steps, tiles, copy, finish, extra=parts, **scratch)

    partial = jax.ShapeDtypeStruct((shape.column_tiles, shape.rows), jnp.float32)
    return _make(body, shape, [*[shape.result] * 3, partial], transposed=True)


def _copies(shape: Shape, rows, *weights, transposed: bool = False):
    """Gives the function that starts the copies of a stage: of a tile of the rows, and of one of each weight."""

    def copy(item, step, a_smem, b_smem, full):
        inner, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(item.column * shape.columns, shape.columns)
        plgpu.copy_gmem_to_smem(rows.at[pl.ds(item.row, shape.tile_rows), inner], a_smem, full)
        for i, weight in enumerate(weights):
            place = (columns, inner) if transposed else (inner, columns)
            plgpu.copy_gmem_to_smem(weight.at[(item.expert, *place)], b_smem.at[i], full)

    return copy


def _store_sums(out, item, row, columns, sums, out_smem, take):
    """Writes the sums of a block of rows."""
    (product,) = sums
    _store(product, out.at[pl.ds(row, BLOCK_ROWS), columns], out_smem)


def _store(values, to_gmem, out_smem):
    """Writes values [64, …], rounded to bfloat16, by way of the slots of shared memory, 64 columns at a time."""
    parts = values.shape[1] // WRITTEN_COLUMNS
    for i in range(parts):
        part = pl.ds(i * WRITTEN_COLUMNS, WRITTEN_COLUMNS)
        values_of_part = values[:, part.start : part.start + WRITTEN_COLUMNS]
        _store_part(values_of_part, to_gmem.at[:, part], out_smem, i % SLOTS, min(SLOTS, parts))


def _store_part(values, to_gmem, out_smem, slot: int, slots: int = SLOTS):
    """Writes values [64, 64], rounded to bfloat16; callers take turns among the first `slots`."""
    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # what was in the slot has left
    out_smem[slot] = values.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[slot], to_gmem)


# What all have in common.


def _make(body, shape: Shape, results, *, transposed: bool) -> Any:
    """Makes a kernel; `transposed` weights lie [columns of the result, inner]."""
    tile = (shape.columns, DEPTH) if transposed else (DEPTH, shape.columns)
    dtype = jnp.float8_e4m3fn if shape.fp8 else jnp.bfloat16
    # Tiles of two steps, of the half of the columns that a warpgroup multiplies.
    converted = (pipeline.COMPUTE_WARPGROUPS, 2, shape.weights, fp8_tiles.ROWS, fp8_tiles.COLUMNS)
    converted_bytes = math.prod(converted) * 2 if shape.fp8 else 0
    weight_bytes = shape.weights * shape.columns * DEPTH * jnp.dtype(dtype).itemsize
    stages = (STAGE_BYTES - converted_bytes) // (shape.tile_rows * DEPTH * 2 + weight_bytes)  # 4 at least, 10 at most
    slots = (pipeline.COMPUTE_WARPGROUPS, SLOTS, BLOCK_ROWS, WRITTEN_COLUMNS)
    swizzled = ptx.swizzled(jnp.bfloat16)
    extra = {"converted_smem": plgpu.SMEM(converted, jnp.bfloat16, transforms=swizzled)} if shape.fp8 else {}
    ring = pipeline.ring(
        stages, (shape.tile_rows, DEPTH), (shape.weights, *tile), copies=1 + shape.weights, b_dtype=dtype
    )
    return ptx.persistent_kernel(
        body,
        results,
        dict(out_smem=plgpu.SMEM(slots, jnp.bfloat16, transforms=swizzled), **extra, **ring),
        blocks=shape.blocks,
        interpret=shape.interpret,
        approx_math=True,
    )


def _run(
    shape: Shape,
    steps: int,
    tiles,
    copy,
    finish,
    *,
    a_smem,
    b_smem,
    out_smem,
    converted_smem: Any = None,
    scales=(),
    extra: int = 0,
    **barriers,
):
    """Runs one thread block.

    Args:
      shape: of the kernel.
      steps: stages of an item's products.
      tiles: reference to what `make_tiles` made.
      copy: `copy(item, step, a_smem, b_smem, full)` starts the copies of a stage.
      finish: `finish(item, row, columns, sums, out_smem, take)` takes the sums of 64 rows from `row` and of the
        columns, of each weight, and extra stages by `take`, see `pipeline.run`.
      a_smem: [stages, rows of a tile, 64].
      b_smem: [stages, weights, 64, columns], or transposed [stages, weights, columns, 64].
      out_smem: [2, 2, 64, 64], two slots for each compute warpgroup.
      converted_smem: [2, 2, weights, 64, 64], likewise, of weights that come in FP8.
      scales: of these, references to their bits [X, inner / 128, columns / 128].
      extra: stages of an item behind those of its products.
      barriers: of the stages.

    Each compute warpgroup has a block of a tile's rows; of few rows, which are one block, a half of its columns.
    """
    transposed = b_smem.shape[2:] != (DEPTH, shape.columns)
    columns = shape.columns // 2 if shape.few else shape.columns  # of a warpgroup
    block, row_tiles = lax.axis_index("block"), tiles[shape.tiles, 0]
    items = row_tiles * shape.column_tiles

    def for_each_item(work):
        def visit(i, _):
            tile, column = item_at(block + i * shape.blocks, row_tiles, shape.column_tiles, BAND)
            expert, first, count = (tiles[tile, j] for j in range(3))
            work(Item(expert, first * BLOCK_ROWS, column, count), i * (steps + extra), steps)
            return 0

        lax.fori_loop(0, lax.div(items - block + shape.blocks - 1, shape.blocks), visit, 0)

    def operands(item, warpgroup, step, stage, i):
        a = a_smem.at[stage] if shape.few else a_smem.at[stage, pl.ds(warpgroup * BLOCK_ROWS, BLOCK_ROWS)]
        if converted_smem is not None:
            return a, converted_smem.at[warpgroup, lax.rem(step, 2), i]
        if transposed:
            return a, b_smem.at[stage, i].transpose((1, 0))
        return a, b_smem.at[stage, i, :, pl.ds(warpgroup * columns if shape.few else 0, columns)]

    def load(item, step):
        """Loads the scales of a step's tiles."""
        return [ref[item.expert, lax.div(step * DEPTH, fp8_tiles.BLOCK), item.column] for ref in scales]

    def prepare(bits, warpgroup, step, stage):
        """Converts the tiles of a step."""
        raw = [b_smem.at[stage, i] for i in range(shape.weights)]
        to = [converted_smem.at[warpgroup, lax.rem(step, 2), i] for i in range(shape.weights)]
        fp8_tiles.convert(raw, warpgroup * columns, bits, to, shape.interpret)
        plgpu.commit_smem()

    def finish_tile(item, warpgroup, sums, take):
        first = item.column * shape.columns
        row, column = (item.row, warpgroup * columns) if shape.few else (item.row + warpgroup * BLOCK_ROWS, 0)
        finish(item, row, pl.ds(first + column, columns), sums, out_smem.at[warpgroup], take)

    pipeline.run(
        for_each_item,
        copy=lambda item, step, stage, full: copy(item, step, a_smem.at[stage], b_smem.at[stage], full),
        operands=operands,
        finish=finish_tile,
        products=shape.weights,
        columns=columns,
        has_products=None if shape.few else lambda item, warpgroup: warpgroup < item.blocks,
        load=load if shape.fp8 else None,
        prepare=prepare if shape.fp8 else None,
        extra=extra,
        interpret=shape.interpret,
        **barriers,
    )
