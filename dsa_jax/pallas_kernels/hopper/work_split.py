"""Splits work whose items have different lengths into equal shares, one for each block of a persistent kernel.

The items' pieces stand end to end on a line. The cuts fall wherever equal lengths want them, inside of items too, so
that no block works longer than another by more than a piece.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def share_bounds(block, total, blocks: int):
    """Computes where a block's share of a line of `total` pieces begins and ends."""
    each, rest = lax.div(total, jnp.int32(blocks)), lax.rem(total, jnp.int32(blocks))
    begin = block * each + jnp.minimum(block, rest)
    return begin, begin + each + jnp.where(block < rest, 1, 0)  # the first blocks have the pieces that are left over


def for_each_part(offset_gmem, block, blocks: int, work) -> None:
    """Calls `work(item, low, high)` for every item that a block has pieces of: [low, high) of the line.

    Args:
      offset_gmem: int32 [items + 1], where each item starts on the line, and at last the line's end.
      block: the number of this block.
      blocks: how many share the line.
      work: a function; all threads of the block call it, in the order of the line.
    """
    items = offset_gmem.shape[0] - 1
    begin, end = share_bounds(block, offset_gmem[items], blocks)

    def visit(state):
        item, low = state
        high = jnp.minimum(offset_gmem[item + 1], end)

        @pl.when(low < high)  # items without pieces are passed over
        def _():
            work(item, low, high)

        return item + 1, high

    lax.while_loop(lambda state: state[1] < end, visit, (_item_at(offset_gmem, begin), begin))


def _item_at(offset_gmem, position):
    """Finds the last item that starts at or before a position on the line, by bisection: a load for each bit."""
    items = offset_gmem.shape[0] - 1
    item = jnp.int32(0)
    for bit in reversed(range(items.bit_length())):
        further = item + (1 << bit)
        reached = (further <= items) & (offset_gmem[jnp.minimum(further, items)] <= position)
        item = jnp.where(reached, further, item)
    return item
