"""Multiplies rows, laid out by expert, by the weights of their experts on Hopper's tensor cores, bfloat16.

A persistent grid, one block on each multiprocessor. An item is a tile of up to 256 rows of one expert and 128 columns
of the result; three warpgroups work on it:

  warpgroup 0, 1   a half of the rows each: 64 or 128 rows × 128 columns, summed in registers
  warpgroup 2      brings both operands by TMA, 64 of the inner dimension at a time, four such stages ahead

A tile has as few blocks of 64 rows as its rows need, and only these are multiplied. Products with two weights at a time
have tiles of up to 128 rows, of which each warpgroup sums both products of a half.

Where experts have few rows each, reading weights takes longer than multiplying: then a tile is one block of 64 rows, of
which each warpgroup sums half of the columns, and up to eight stages are in flight, most of their bytes weights.
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
from dsa_jax.pallas_kernels.grouped_product.tiles import item_at
from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import ROW_LAYOUT

TILE_COLUMNS = 128
HALF_COLUMNS = TILE_COLUMNS // 2  # that are written at a time
STAGE_BYTES = 192 * 1024  # of all stages
BAND = 8  # tiles of rows that are worked on at a time


def tile_blocks(weights: int, few: bool) -> int:
    """Gives the blocks of rows of a tile, at most, for products with one weight or with two at a time."""
    return 1 if few else 4 // weights


class Shape(NamedTuple):
    """Holds all that a kernel is made for, so that it is made once for each."""

    rows: int  # P, padding included
    tiles: int
    experts: int  # X
    inner: int  # columns of the rows
    outer: int  # columns of the result
    few: bool  # whether a tile has a single block of rows
    fp8: bool  # whether weights are e4m3, with a scale for each block of 128 × 128
    blocks: int  # thread blocks that share the work
    interpret: bool

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """A result of the product's own shape."""
        return jax.ShapeDtypeStruct((self.rows, self.outer), jnp.bfloat16)

    @classmethod
    def of(cls, x, weight, tiles, outer: int, few: bool, blocks: int | None, interpret: bool) -> "Shape":
        """Takes the sizes from the operands."""
        blocks = blocks or (2 if interpret else ptx.multiprocessors())
        fp8 = weight.dtype == jnp.float8_e4m3fn
        return cls(x.shape[0], len(tiles) - 1, weight.shape[0], x.shape[1], outer, few, fp8, blocks, interpret)


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
      tiles: of `make_tiles`, of as many blocks as `tile_blocks` says.
      keep: whether the products themselves are wanted, for the gradients.
      few: whether tiles have a single block of rows, so that weights are read as fast as memory gives them.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      hidden [P, F] bfloat16 and, to `keep`, both products likewise. Rows of no tile hold anything.
    """
    shape = Shape.of(x, gate_proj, tiles, gate_proj.shape[2], few, blocks, interpret)
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
    shape = Shape.of(x, weight, tiles, weight.shape[2], few, blocks, interpret)
    return _multiply_kernel(shape)(x, weight, tiles, *map(fp8_tiles.scale_bits, scales))


def d_hidden(dy, down_proj, gate, up, row_gates, tiles, *, blocks: int | None = None, interpret: bool = False):
    """Computes the gradients by what `gate_up` kept, from those by the rows' results.

    Args:
      dy: [P, D] bfloat16, the gradient by hidden · down_e.
      down_proj: [X, F, D] bfloat16.
      gate: [P, F] bfloat16, as `gate_up` kept it.
      up: see `gate`.
      row_gates: float32 [P].
      tiles: of `make_tiles`, of four blocks.
      blocks: see `gate_up`.
      interpret: see `gate_up`.

    Returns:
      Gradients by `gate` and `up` [P, F] bfloat16, hidden [P, F] bfloat16, and float32 [F / 128, P] whose sums are the
      gradients by `row_gates`.
    """
    shape = Shape.of(dy, down_proj, tiles, down_proj.shape[1], False, blocks, interpret)
    return _d_hidden_kernel(shape)(dy, down_proj, gate, up, row_gates, tiles)


def d_rows(d_gate, d_up, gate_proj, up_proj, tiles, *, blocks: int | None = None, interpret: bool = False):
    """Computes the gradient by x, d_gate · gate_eᵀ + d_up · up_eᵀ: [P, D] bfloat16; the rest is as in `gate_up`."""
    shape = Shape.of(d_gate, gate_proj, tiles, gate_proj.shape[1], False, blocks, interpret)
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
    columns = shape.outer // TILE_COLUMNS

    def body(x, gate_proj, up_proj, row_gates, tiles, *refs, **scratch):
        scales, (hidden, *kept) = refs[: 2 * shape.fp8], refs[2 * shape.fp8 :]

        def copy(item, step, a_smem, b_smems, full):
            inner, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(item.column * TILE_COLUMNS, TILE_COLUMNS)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(item.row, a_smem.shape[0]), inner], a_smem, full)
            for weight, b_smem in zip((gate_proj, up_proj), b_smems, strict=True):
                plgpu.copy_gmem_to_smem(weight.at[item.expert, inner, columns], b_smem, full)

        def finish(item, row, columns, sums, out_smem):
            products = [each.astype(jnp.bfloat16) for each in sums]
            row_gate = plgpu.load(row_gates.at[pl.ds(row, BLOCK_ROWS)], layout=ROW_LAYOUT, optimized=False)
            gate, up = (each.astype(jnp.float32) for each in products)
            weighted = gate / (1 + jnp.exp(-gate)) * up * lax.broadcast_in_dim(row_gate, gate.shape, [0])
            for ref, value in zip((*kept, hidden), (*products[: len(kept)], weighted), strict=True):
                _store(value, ref.at[pl.ds(row, BLOCK_ROWS), columns], out_smem)

        _run(shape, columns, shape.inner // DEPTH, tiles, copy, finish, scales=scales, **scratch)

    return _make(body, shape, [shape.result] * (3 if keep else 1), weights=2, transposed=False)


@functools.cache
def _multiply_kernel(shape: Shape) -> Any:
    def body(x, weight, tiles, *refs, **scratch):
        scales, out = refs[:-1], refs[-1]

        def copy(item, step, a_smem, b_smems, full):
            inner, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(item.column * TILE_COLUMNS, TILE_COLUMNS)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(item.row, a_smem.shape[0]), inner], a_smem, full)
            plgpu.copy_gmem_to_smem(weight.at[item.expert, inner, columns], b_smems[0], full)

        finish = functools.partial(_store_sums, out)
        columns = shape.outer // TILE_COLUMNS
        _run(shape, columns, shape.inner // DEPTH, tiles, copy, finish, scales=scales, **scratch)

    return _make(body, shape, shape.result, weights=1, transposed=False)


@functools.cache
def _d_rows_kernel(shape: Shape) -> Any:
    steps = shape.inner // DEPTH  # of each of the two products

    def body(d_gate, d_up, gate_proj, up_proj, tiles, out, **scratch):
        def copy(item, step, a_smem, b_smems, full):
            columns = pl.ds(item.column * TILE_COLUMNS, TILE_COLUMNS)

            def copy_of(d, weight, step):
                inner = pl.ds(step * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(d.at[pl.ds(item.row, a_smem.shape[0]), inner], a_smem, full)
                plgpu.copy_gmem_to_smem(weight.at[item.expert, columns, inner], b_smems[0], full)

            pl.when(step < steps)(lambda: copy_of(d_gate, gate_proj, step))
            pl.when(step >= steps)(lambda: copy_of(d_up, up_proj, step - steps))

        finish = functools.partial(_store_sums, out)
        _run(shape, shape.outer // TILE_COLUMNS, 2 * steps, tiles, copy, finish, **scratch)

    return _make(body, shape, shape.result, weights=1, transposed=True)


@functools.cache
def _d_hidden_kernel(shape: Shape) -> Any:
    columns = shape.outer // TILE_COLUMNS

    def body(dy, down_proj, gate, up, row_gates, tiles, d_gate, d_up, hidden, d_row_gates, **scratch):
        def copy(item, step, a_smem, b_smems, full):
            inner, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(item.column * TILE_COLUMNS, TILE_COLUMNS)
            plgpu.copy_gmem_to_smem(dy.at[pl.ds(item.row, a_smem.shape[0]), inner], a_smem, full)
            plgpu.copy_gmem_to_smem(down_proj.at[item.expert, columns, inner], b_smems[0], full)

        def finish(item, row, columns, sums, out_smem):
            (d_weighted,), rows = sums, pl.ds(row, BLOCK_ROWS)
            row_gate = plgpu.load(row_gates.at[rows], layout=ROW_LAYOUT, optimized=False)
            total, slot = None, 0
            for first in range(0, TILE_COLUMNS, HALF_COLUMNS):
                half = pl.ds(columns.start + first, HALF_COLUMNS)
                g, u = (
                    plgpu.load(ref.at[rows, half], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                    for ref in (gate, up)
                )
                over = lax.broadcast_in_dim(row_gate, g.shape, [0])
                sigmoid = 1 / (1 + jnp.exp(-g))
                silu = g * sigmoid
                d = d_weighted[:, first : first + HALF_COLUMNS]
                d_activation = d * over
                part = jnp.sum(d * (silu * u), axis=1)
                total = part if total is None else total + part
                results = (
                    (d_gate, d_activation * u * (sigmoid * (1 + g * (1 - sigmoid)))),
                    (d_up, d_activation * silu),
                    (hidden, silu * u * over),
                )
                for ref, value in results:
                    _store_half(value, ref.at[rows, half], out_smem, slot)
                    slot = 1 - slot
            d_row_gates[item.column, rows] = total

        _run(shape, columns, shape.inner // DEPTH, tiles, copy, finish, **scratch)

    partial = jax.ShapeDtypeStruct((columns, shape.rows), jnp.float32)
    return _make(body, shape, [*[shape.result] * 3, partial], weights=1, transposed=True)


def _store_sums(out, item, row, columns, sums, out_smem):
    """Writes the sums of a block of rows."""
    (product,) = sums
    _store(product, out.at[pl.ds(row, BLOCK_ROWS), columns], out_smem)


def _store(values, to_gmem, out_smem):
    """Writes values [64, …], rounded to bfloat16, by way of the two slots of shared memory, 64 columns at a time."""
    for slot, first in enumerate(range(0, values.shape[1], HALF_COLUMNS)):
        _store_half(values[:, first : first + HALF_COLUMNS], to_gmem.at[:, pl.ds(first, HALF_COLUMNS)], out_smem, slot)


def _store_half(values, to_gmem, out_smem, slot: int):
    """Writes values [64, 64], rounded to bfloat16; callers take turns between the two slots."""
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what was in the slot has left
    out_smem[slot] = values.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[slot], to_gmem)


# What all have in common.


def _make(body, shape: Shape, results, *, weights: int, transposed: bool) -> Any:
    """Makes a kernel of products with one weight or two; `transposed` weights lie [columns of the result, inner]."""
    tile = (TILE_COLUMNS, DEPTH) if transposed else (DEPTH, TILE_COLUMNS)
    tile_rows = tile_blocks(weights, shape.few) * BLOCK_ROWS
    dtype = jnp.float8_e4m3fn if shape.fp8 else jnp.bfloat16
    # Tiles of two steps, of the half of the columns that a warpgroup multiplies.
    converted = (pipeline.COMPUTE_WARPGROUPS, 2, weights, fp8_tiles.ROWS, fp8_tiles.COLUMNS)
    converted_bytes = math.prod(converted) * 2 if shape.fp8 else 0
    stage_bytes = tile_rows * DEPTH * 2 + weights * TILE_COLUMNS * DEPTH * jnp.dtype(dtype).itemsize
    stages = (STAGE_BYTES - converted_bytes) // stage_bytes  # 4 at least, 10 at most
    slots = (pipeline.COMPUTE_WARPGROUPS, 2, BLOCK_ROWS, HALF_COLUMNS)
    swizzled = ptx.swizzled(jnp.bfloat16)
    extra = {"converted_smem": plgpu.SMEM(converted, jnp.bfloat16, transforms=swizzled)} if shape.fp8 else {}
    return ptx.persistent_kernel(
        body,
        results,
        dict(
            out_smem=plgpu.SMEM(slots, jnp.bfloat16, transforms=swizzled),
            **extra,
            **pipeline.ring(stages, (tile_rows, DEPTH), (weights, *tile), copies=1 + weights, b_dtype=dtype),
        ),
        blocks=shape.blocks,
        interpret=shape.interpret,
        approx_math=True,
    )


def _run(
    shape: Shape,
    columns: int,
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
    **barriers,
):
    """Runs one thread block.

    Args:
      shape: of the kernel.
      columns: tiles of columns.
      steps: stages of an item.
      tiles: reference to what `make_tiles` made.
      copy: `copy(item, step, a_smem, b_smems, full)` starts the copies of a stage.
      finish: `finish(item, row, columns, sums, out_smem)` takes the sums of 64 rows from `row` and of the columns, of
        each weight.
      a_smem: [stages, rows of a tile, 64].
      b_smem: [stages, weights, 64, 128], or transposed [stages, weights, 128, 64].
      out_smem: [2, 2, 64, 64], two slots for each compute warpgroup.
      converted_smem: [2, 2, weights, 64, 64], likewise, of weights that come in FP8.
      scales: of these, references to their bits [X, inner / 128, columns / 128].
      barriers: of the stages.

    Each compute warpgroup has a half of a tile's blocks of rows; of few rows, which are one block, of its columns.
    """
    weights, transposed = b_smem.shape[1], b_smem.shape[2] == TILE_COLUMNS
    block, row_tiles = lax.axis_index("block"), tiles[shape.tiles, 0]
    items = row_tiles * columns

    def for_each_item(work):
        def visit(i, _):
            tile, column = item_at(block + i * shape.blocks, row_tiles, columns, BAND)
            expert, first, count = (tiles[tile, j] for j in range(3))
            work(Item(expert, first * BLOCK_ROWS, column, count), i * steps, steps)
            return 0

        lax.fori_loop(0, lax.div(items - block + shape.blocks - 1, shape.blocks), visit, 0)

    def place(item, warpgroup, i):
        """Gives the block of rows of a product, and its columns in the tile."""
        if shape.few:
            return 0, pl.ds(warpgroup * HALF_COLUMNS, HALF_COLUMNS)
        return jnp.where(warpgroup == 0, 0, lax.div(item.blocks + 1, 2)) + i // weights, pl.ds(0, TILE_COLUMNS)

    def products(item, warpgroup):
        return weights if shape.few else weights * lax.div(item.blocks + 1 - warpgroup, 2)

    def operands(item, warpgroup, step, stage, i):
        row_block, columns = place(item, warpgroup, i)
        a = a_smem.at[stage, pl.ds(row_block * BLOCK_ROWS, BLOCK_ROWS)]
        if converted_smem is not None:
            return a, converted_smem.at[warpgroup, lax.rem(step, 2), i]
        if transposed:
            return a, b_smem.at[stage, i % weights].transpose((1, 0))
        return a, b_smem.at[stage, i % weights, :, columns]

    def prepare(item, warpgroup, step):
        """Loads the scales of a step's tiles; then converts these."""
        at = item.expert, lax.div(step * DEPTH, fp8_tiles.BLOCK), item.column
        bits = [ref[at] for ref in scales]

        def ready(stage):
            for i, scale in enumerate(bits):
                to = converted_smem.at[warpgroup, lax.rem(step, 2), i]
                fp8_tiles.convert(b_smem.at[stage, i], warpgroup * HALF_COLUMNS, scale, to, shape.interpret)
            plgpu.commit_smem()

        return ready

    def copy_stage(item, step, stage, full):
        copy(item, step, a_smem.at[stage], [b_smem.at[stage, i] for i in range(weights)], full)

    def finish_all(item, warpgroup, sums):
        for i in range(0, len(sums), weights):
            row_block, columns = place(item, warpgroup, i)
            columns = pl.ds(item.column * TILE_COLUMNS + columns.start, columns.size)
            row = item.row + row_block * BLOCK_ROWS
            finish(item, row, columns, sums[i : i + weights], out_smem.at[warpgroup])

    pipeline.run(
        for_each_item,
        copy=copy_stage,
        products=products,
        operands=operands,
        prepare=prepare if shape.fp8 else None,
        finish=finish_all,
        columns=HALF_COLUMNS if shape.few else TILE_COLUMNS,
        unit=weights,
        interpret=shape.interpret,
        **barriers,
    )
