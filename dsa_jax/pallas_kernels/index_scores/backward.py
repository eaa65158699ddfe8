"""Computes the gradients of index scores, I[t,s] = k_scale[s] · Σ_j w[t,j] · relu(q[t,j] · k[s]) (Eq. 1), bfloat16.

With g[t,s] = k_scale[s] · d_scores[t,s] in reach, 0 elsewhere, and L = q · k, which both kernels compute anew,

  d_q[t,j] = w[t,j] · Σ_s (g · 1[L > 0]) · k[s]      d_weights[t,j] = Σ_s g · relu(L)
  d_k[s] = Σ_t Σ_j (g · w · 1[L > 0]) · q[t,j]       what is in brackets rounded to bfloat16

so that every sum has one order, and no block adds to what another does. A fused kernel would have 3 products instead of
4, but would add float32 of the size of d_k to memory for every group of queries, or d_q for every block of keys.

Both kernels are persistent, one block on each multiprocessor, of a producer warpgroup and compute warpgroups of 64 rows
whose A operands are in registers: backward_queries.py and backward_keys.py, which share backward_pipeline.py. The
producer's TMA copies bring the operands; its threads bring g, scaled and with zeros out of reach, so that the compute
warpgroups know neither ranges nor scales. A tile of 64 rows takes the tensor cores 1024 cycles, twice 64 × 128 × 128.

Measured on an H200 at J 64, E 128, causal, in TFLOP/s of the 2 products of each kernel over the pairs in reach:

                                   d_q, d_weights    d_k
  T 2048 at the end of S 131072    725   12.0 ms     716   12.2 ms
  T and S 32768                    734   24.0 ms     653   26.9 ms

which is near what a bfloat16 matmul has, 789 in bursts and 696 under 700 W of power. Issuing a tile's second product
together with the next one's first made 764 and 719 of 725 and 716, in turns 713 and 696: not worth their code.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.work_split import share_bounds
from dsa_jax.pallas_kernels.index_scores.backward_keys import keys_kernel, sum_kernel
from dsa_jax.pallas_kernels.index_scores.backward_pipeline import BLOCK_ROWS, TILE_ROWS, Shape
from dsa_jax.pallas_kernels.index_scores.backward_queries import queries_kernel
from dsa_jax.pallas_kernels.index_scores.forward import why_not_shapes


def why_not(q_index, k_index, weights, d_scores, start, stop, k_scale=None, total=None) -> str | None:
    """Says why the kernels cannot take these arguments, or None when they can."""
    reason = why_not_shapes(q_index, k_index, weights, start, stop, k_scale)
    if reason is not None:
        return reason
    if q_index.dtype != jnp.bfloat16 or k_index.dtype != jnp.bfloat16:
        return f"q_index and k_index must be bfloat16, got {q_index.dtype} and {k_index.dtype}"
    batch, length, heads, dim = q_index.shape
    size = k_index.shape[1]
    for name, array, shape in (
        ("d_scores", d_scores, (batch, length, size)),
        ("total", total, (batch, size, dim)),
    ):
        if array is not None and (array.shape != shape or array.dtype != jnp.float32):
            return f"{name} must be float32 {shape}, got {array.dtype} {array.shape}"
    # int32 counts the rows, the elements of k, and the tiles of all key blocks together.
    if max(batch * length * heads, batch * size * dim) > 2**31 - 2**20 or batch * length * size >= 2**40:
        return f"B·T·J and B·S·E must be below 2^31 - 2^20 and B·T·S below 2^40, got {q_index.shape} and S {size}"
    return None


class Ranges(NamedTuple):
    """Holds the keys in reach, of queries padded with empty ranges to whole groups: int32 [B · groups · queries] each.

    Query t has the keys from `first` to `first + count`.
    """

    first: jax.Array
    count: jax.Array


class QueryPlan(NamedTuple):
    """Plans the kernel for `d_q`: which tiles of keys each of the G groups of queries reaches.

    Attributes:
      order: int32 [G], the groups, those with the most tiles first.
      first: int32 [G], the first tile that each group reaches.
      count: int32 [G], how many from there to the last, those in between included.
    """

    order: jax.Array
    first: jax.Array
    count: jax.Array


class KeyPlan(NamedTuple):
    """Plans the kernel for `d_k`: the line of all tiles of (query, head) pairs that the N blocks of keys meet.

    Attributes:
      first: int32 [N], the first tile that each block of keys meets.
      offset: int32 [N + 1], where each block's tiles start on the line, and its end.
      continued: int32 [N, 2], the thread blocks [first, last) that continue a block of keys begun by another.
    """

    first: jax.Array
    offset: jax.Array
    continued: jax.Array


def make_ranges(start, stop, size: int, queries: int) -> Ranges:
    """Clamps the ranges to [0, size), and fills them up to whole groups of `queries`."""
    first = jnp.clip(start, 0, size)
    count = jnp.maximum(jnp.minimum(stop, size), first) - first
    pad = ((0, 0), (0, -start.shape[1] % queries))
    return Ranges(*(jnp.pad(x, pad).reshape(-1) for x in (first, count)))


def _hulls(ranges: Ranges, queries: int, size: int):
    """Computes the first key of each group of queries and the end of its keys: [size, 0) for none."""
    first, count = (x.reshape(-1, queries) for x in ranges)
    low = jnp.min(jnp.where(count > 0, first, size), axis=1)
    return low, jnp.max(jnp.where(count > 0, first + count, 0), axis=1)


def make_query_plan(ranges: Ranges, queries: int, size: int) -> QueryPlan:
    """Plans the kernel for `d_q`, whose groups have `queries` queries."""
    low, high = _hulls(ranges, queries, size)
    first = low // TILE_ROWS
    count = jnp.maximum((high + (TILE_ROWS - 1)) // TILE_ROWS - first, 0)
    # The longest first, so that the last round has only short ones to wait for.
    return QueryPlan(jnp.argsort(-count, stable=True).astype(jnp.int32), first, count)


def make_key_plan(ranges: Ranges, batch: int, queries: int, size: int, blocks: int) -> KeyPlan:
    """Plans the kernel for `d_k`, whose tiles have `queries` queries, for `blocks` thread blocks."""
    low, high = (x.reshape(batch, 1, -1) for x in _hulls(ranges, queries, size))
    tiles, key_blocks = low.shape[2], math.ceil(size / BLOCK_ROWS)
    key = jnp.arange(key_blocks, dtype=jnp.int32)[:, None] * BLOCK_ROWS  # the first of each block
    tile = jnp.arange(tiles, dtype=jnp.int32)
    met = (low < key + BLOCK_ROWS) & (high > key)  # by the hulls of a tile's queries
    first = jnp.min(jnp.where(met, tile, tiles), axis=2).reshape(-1)
    count = jnp.maximum(jnp.max(jnp.where(met, tile + 1, 0), axis=2).reshape(-1) - first, 0)
    offset = jnp.cumsum(jnp.pad(count, (1, 0)), dtype=jnp.int32)
    begins = share_bounds(jnp.arange(blocks, dtype=jnp.int32), offset[-1], blocks)[0]
    # Thread blocks that begin strictly inside of a block of keys continue what another has begun. They are counted: how
    # many begin up to its first tile, and how many before its end. `searchsorted` would be a loop.
    bounds = jnp.stack([offset[:-1], offset[1:] - 1], axis=1)
    continued = jnp.sum(begins <= bounds[..., None], axis=2, dtype=jnp.int32)
    return KeyPlan(first, offset, continued)


def index_scores_backward(
    q_index,
    k_index,
    weights,
    d_scores,
    start,
    stop,
    k_scale=None,
    *,
    total=None,
    interpret: bool = False,
):
    """Computes the gradients of `index_scores` by q_index, k_index and weights, from those by the scores.

    Args:
      q_index: [B, T, J, E] bfloat16; J 64, 32 or 16, E 128 or 64. T may be a part of the queries.
      k_index: [B, S, E] bfloat16. Keys must be finite in all tiles of 128 from the first
        to the last that a group of 128 / J queries reaches.
      weights: float32 [B, T, J].
      d_scores: float32 [B, T, S], which may hold anything out of reach.
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys; the range may be empty, reversed, or exceed S.
      k_scale: float32 [B, S], or None for ones.
      total: float32 [B, S, E], to which d_k_index is added, or None for zeros.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      d_q_index bfloat16 [B, T, J, E], d_k_index float32 [B, S, E], d_weights float32 [B, T, J].

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(q_index, k_index, weights, d_scores, start, stop, k_scale, total)
    if reason is not None:
        raise ValueError(f"index_scores_backward: {reason}")
    batch, length, heads, dim = q_index.shape
    size = k_index.shape[1]
    d_scores = d_scores.reshape(batch * length, size)
    if interpret:  # which reads whole tiles, and masks them afterwards
        d_scores = jnp.pad(d_scores, ((0, 64), (0, 2 * TILE_ROWS)))
        k_scale = None if k_scale is None else jnp.pad(k_scale.reshape(-1), (0, 2 * TILE_ROWS))
    shape = Shape(batch, length, size, heads, dim, k_scale is not None, 2 if interpret else ptx.multiprocessors())
    queries = TILE_ROWS // heads
    ranges = make_ranges(start, stop, size, queries)
    k = jnp.pad(k_index, ((0, 0), (0, -size % TILE_ROWS), (0, 0))).reshape(-1, dim)
    weights_of_groups = jnp.pad(weights.reshape(-1), (0, -length % queries * heads))  # a copy past the end is none
    operands = q_index.reshape(-1, dim), k, weights_of_groups, d_scores
    scale = () if k_scale is None else (k_scale.reshape(-1),)
    d_q, d_weights = _call_queries(shape, interpret, operands, ranges, scale)
    d_k = _call_keys(shape, interpret, operands, ranges, scale, total)
    return d_q.reshape(q_index.shape), d_k, d_weights.reshape(weights.shape)


def _call_queries(shape: Shape, interpret: bool, operands, ranges: Ranges, scale):
    """Computes d_q [B · T · J, E] and d_weights [B · T · J]."""
    plan = make_query_plan(ranges, TILE_ROWS // shape.heads, shape.size)
    return queries_kernel(shape, interpret)(*operands, *ranges, *plan, *scale)


def _call_keys(shape: Shape, interpret: bool, operands, ranges: Ranges, scale, total):
    """Computes d_k [B, S, E]: parts of it by thread blocks, then their sums."""
    plan = make_key_plan(ranges, shape.batch, TILE_ROWS // shape.heads, shape.size, shape.blocks)
    parts = keys_kernel(shape, interpret)(*operands, *ranges, plan.first, plan.offset, *scale)
    ragged = ((0, 0), (0, -shape.size % BLOCK_ROWS), (0, 0))
    total = () if total is None else (jnp.pad(total, ragged).reshape(-1),)
    d_k = sum_kernel(shape, interpret)(parts.reshape(-1), plan.offset, plan.continued.reshape(-1), *total)
    return d_k.reshape(shape.batch, -1, shape.dim)[:, : shape.size]
