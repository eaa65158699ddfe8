"""Cuts rows that are laid out by expert into tiles of rows of one expert each."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dsa_jax.pallas_kernels.grouped_product.pipeline import BLOCK_ROWS, COMPUTE_WARPGROUPS

# Every expert's rows begin at a multiple of `BLOCK_ROWS`, and are filled up with rows of zeros.
MAX_BLOCKS = COMPUTE_WARPGROUPS  # of a tile: one for each warpgroup that multiplies


def padded_rows(slots: int, num_experts: int) -> int:
    """Counts the rows that hold `slots` rows of any experts, and past them as many as a tile may read too far."""
    used = min(slots, num_experts)  # experts, at most
    return (slots + used * (BLOCK_ROWS - 1)) // BLOCK_ROWS * BLOCK_ROWS + (MAX_BLOCKS - 1) * BLOCK_ROWS


def max_tiles(slots: int, num_experts: int, tile_blocks: int) -> int:
    """Counts the most tiles that `slots` rows of any experts can make."""
    used = min(slots, num_experts)
    blocks = (slots + used * (BLOCK_ROWS - 1)) // BLOCK_ROWS
    return (blocks + used * (tile_blocks - 1)) // tile_blocks


def running_sums(counts):
    """Sums int32 counts [X] up to each, itself included, in one kernel; X is small."""
    expert = jnp.arange(len(counts))
    return jnp.sum(jnp.where(expert <= expert[:, None], counts, 0), axis=1, dtype=jnp.int32)


def make_tiles(blocks, slots: int, tile_blocks: int):
    """Cuts the blocks of each expert into as few tiles as can be, of about equal size.

    Args:
      blocks: int32 [X], how many blocks of rows each expert has.
      slots: how many rows there are that belong to an expert, at most.
      tile_blocks: blocks of a tile, at most.

    Returns:
      int32 [tiles + 1, 3]: of each tile the expert, its first block and its blocks, those of an expert next to each
      other; in the last row, first, how many tiles there are.
    """
    tiles = pl.cdiv(blocks, tile_blocks)
    last_tile, last_block = running_sums(tiles), running_sums(blocks)
    tile = jnp.arange(max_tiles(slots, len(blocks), tile_blocks), dtype=jnp.int32)
    # Counted by comparing with all experts at once: a binary search is a loop of kernels.
    expert = jnp.minimum(jnp.sum(tile[:, None] >= last_tile, axis=1, dtype=jnp.int32), len(blocks) - 1)
    rank = tile - (last_tile - tiles)[expert]
    count = jnp.maximum(tiles[expert], 1)
    bound = lambda i: i * blocks[expert] // count  # noqa: E731
    first = (last_block - blocks)[expert] + bound(rank)
    rows = jnp.stack([expert, first, bound(rank + 1) - bound(rank)], axis=1)
    end = jnp.stack([last_tile[-1], jnp.zeros_like(last_tile[-1]), jnp.zeros_like(last_tile[-1])])
    return jnp.concatenate([rows, end[None]]).astype(jnp.int32)


def item_at(index, tiles, columns: int, band: int):
    """Finds the tile of rows and of columns of an item: `band` tiles of rows at a time, all columns of them.

    Thread blocks take neighbouring items at a time, so the operands of a band are read from memory about once. From one
    tile of columns to the next the rows are turned by one, so that no thread block gets the smallest tiles of all.

    Args:
      index: int32, the item.
      tiles: int32, how many tiles of rows there are.
      columns: how many tiles of columns.
      band: how many tiles of rows are worked on at a time.
    """
    number = lax.div(index, band * columns)
    within = index - number * (band * columns)
    height = jnp.minimum(band, tiles - number * band)
    column = lax.div(within, height)
    row = lax.rem(within + column, height)
    return number * band + row, column
