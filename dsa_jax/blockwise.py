"""The evaluation of the plain definitions: float32 contractions over blocks of queries, so that nothing is quadratic.

Every operation of the mechanism is row-wise in its queries. So a definition is written for a few queries and mapped
over blocks of them, which bounds memory without changing a bit of a row.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK_ELEMENTS = 1 << 24  # elements of the widest intermediate of a block: 64 MiB in float32


def contract(dims: str, *operands: Array) -> Float[Array, "..."]:
    """Contracts like `einsum`, accumulated and returned in float32, in float64 if an operand is.

    Operands of float32 are multiplied in full float32, never in TF32.
    """
    wide = accumulator(*operands)
    return jnp.einsum(dims, *operands, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


def accumulator(*arrays: Array) -> np.dtype:
    """Returns the dtype in which sums over these arrays are kept: float64 if one of them is, else float32."""
    return np.dtype(np.float64 if any(x.dtype == np.float64 for x in arrays) else np.float32)


def queries_per_block(elements_per_query: int) -> int:
    """Returns the number of queries in a block where each makes `elements_per_query` elements; at least 1."""
    return max(1, BLOCK_ELEMENTS // max(1, elements_per_query))


def even_block(length: int, block: int) -> int:
    """Returns the size of blocks of about equal length, of `block` at most.

    Padding copies all queries, so a block that divides the length is worth up to half the block.

    Examples:
      >>> [even_block(length, 100) for length in (128, 129, 101)]
      [64, 65, 51]
    """
    even = math.ceil(length / math.ceil(length / block))
    return next((size for size in range(min(block, length), block // 2, -1) if length % size == 0), even)


def split_queries(queries: Any, block: int) -> Any:
    """Cuts every [T, …] leaf into [T / block, block, …]; the last block is filled with 0, integers with -1.

    -1 is an absent index and an empty key range, so filled queries reach nothing.
    """

    def split(x):
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        pad = [(0, -x.shape[0] % block)] + [(0, 0)] * (x.ndim - 1)
        padded = jnp.pad(x, pad, constant_values=fill)
        return padded.reshape(-1, block, *x.shape[1:])

    return jax.tree.map(split, queries)


def join_queries(blocks: Any, length: int) -> Any:
    """Joins blocks [blocks, block, …] to [T, …] without the queries that filled the last: undoes `split_queries`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], blocks)


def scan(fn: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """Scans like `lax.scan`, but runs a single step without a loop, whose buffers would be copies."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(fn, carry, xs)
    carry, out = fn(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)


def map_rows(fn: Callable, arguments: Any) -> Any:
    """Maps a function over the leading axis, one row after the other."""
    return scan(lambda _, row: (None, fn(row)), None, arguments)[1]


def map_queries(fn: Callable, queries: Any, keys: Any, sums: Any = (), *, block: int) -> tuple[Any, Any]:
    """Applies a row-wise `fn` to blocks of queries, one after the other.

    Args:
      fn: `(queries, keys, sums) -> (results, sums)` for one batch row: leaves of `queries` and `results` are [t, …],
        those of `keys` and `sums` are whole, [S, …]. `sums` is what all queries add to, such as a gradient by keys.
      queries: leaves [B, T, …].
      keys: leaves [B, S, …].
      sums: leaves [B, S, …], the initial values.
      block: the largest number of queries at a time.

    Returns:
      results [B, T, …] and the final sums.
    """
    batch, length = jax.tree.leaves(queries)[0].shape[:2]
    if batch * length <= block:
        return jax.vmap(fn)(queries, keys, sums)
    block = even_block(length, block)

    def row(arguments):
        queries, keys, sums = arguments

        def step(sums, queries):
            results, sums = fn(queries, keys, sums)
            return sums, results

        sums, results = jax.lax.scan(step, sums, split_queries(queries, block))
        return join_queries(results, length), sums

    return map_rows(row, (queries, keys, sums))
