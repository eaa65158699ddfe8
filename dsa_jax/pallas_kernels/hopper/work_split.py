"""A line of work for persistent kernels: items of different lengths end to end, cut into equal shares, one a block."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def share(block, total, blocks: int):
    """Where a block's share of a line of `total` pieces begins and ends."""
    each, rest = lax.div(total, jnp.int32(blocks)), lax.rem(total, jnp.int32(blocks))
    begin = block * each + jnp.minimum(block, rest)
    return begin, begin + each + jnp.where(block < rest, 1, 0)


def for_each_part(offset_gmem, block, blocks: int, work) -> None:
    """Calls `work(item, low, high)` for every item that a block has pieces of: [low, high) of the line.

    `offset_gmem` int32 [items + 1] is where each item starts on the line, and its end.
    """
    items = offset_gmem.shape[0] - 1
    begin, end = share(block, offset_gmem[items], blocks)

    def visit(state):
        item, low = state
        high = jnp.minimum(offset_gmem[item + 1], end)

        @pl.when(low < high)
        def _():
            work(item, low, high)

        return item + 1, high

    lax.while_loop(lambda state: state[1] < end, visit, (_item_at(offset_gmem, begin), begin))


def _item_at(offset_gmem, position):
    """The last item that starts at or before a position on the line."""
    items = offset_gmem.shape[0] - 1
    item = jnp.int32(0)
    for bit in reversed(range(items.bit_length())):
        further = item + (1 << bit)
        reached = (further <= items) & (offset_gmem[jnp.minimum(further, items)] <= position)
        item = jnp.where(reached, further, item)
    return item
