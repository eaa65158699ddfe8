"""The mechanism over pages: keys of many sequences in pages of 64 tokens, in any order, found by a table.

A pool holds the pages of all sequences, `table[b, i]` says which page has the positions 64 · i … 64 · i + 63 of
sequence b, and a slot is a token's place in the pool: 64 · page + position mod 64. Outside, keys are positions of their
sequence; slots stay inside.

A page of latents is [64, C + R] in the compute dtype, or bytes [64, C + 4 · groups + 2 · R] of FP8: C e4m3 numbers, a
float32 scale for each group of 128 of them, and the rotary columns in bfloat16. A page of index keys is [64, E], or
e4m3 [64 + 256 / E, E] of FP8: the keys, then the bytes of their 64 float32 scales. At the published sizes that is 656
and 132 bytes a token. Scales that are written are powers of two; any float32 is read.

References:
  DeepSeek-V3.2-Exp's inference code, whose formats these are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt8

from dsa_jax.attention import check_indices, sparse_attention, static_scale
from dsa_jax.indexer import index_scores
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import decode as decode_kernels
from dsa_jax.quantization import E4M3, quantize
from dsa_jax.selection import select_keys

PAGE = 64  # tokens
GROUP = 128  # columns of a latent that share a scale
SCALE_BYTES = 4
FEW_QUERIES = 4  # of a sequence, for which the kernels over pages are made; more gather their keys once for all


# Formats.


def scale_groups(value_dim: int) -> int:
    """Counts the scales of one FP8 latent: one for 128 columns, or a single one where C is no multiple of 128."""
    return value_dim // GROUP if value_dim % GROUP == 0 else 1


def latent_bytes(value_dim: int, rotary_dim: int) -> int:
    """Counts the bytes of one FP8 latent.

    Examples:
      >>> latent_bytes(512, 64)
      656
    """
    return value_dim + SCALE_BYTES * scale_groups(value_dim) + 2 * rotary_dim


def index_page_rows(dim: int, fp8: bool) -> int:
    """Counts the rows of one page of index keys of width `dim`, those that hold scales included.

    Raises:
      ValueError: if the scales of an FP8 page do not fill whole rows.
    """
    if fp8 and PAGE * SCALE_BYTES % dim:
        raise ValueError(f"FP8 pages need index_head_dim to divide {PAGE * SCALE_BYTES}, got {dim}")
    return PAGE + (PAGE * SCALE_BYTES // dim if fp8 else 0)


def pack_latents(kv: Float[Array, "*M H"], value_dim: int) -> UInt8[Array, "*M bytes"]:
    """Packs latents into the bytes of their FP8 format, each group of columns rounded as `quantize` rounds a row.

    Examples:
      >>> pack_latents(jnp.ones((2, 576), jnp.bfloat16), 512).shape
      (2, 656)
    """
    values, rotary = jnp.split(kv, [value_dim], axis=-1)
    rounded, scale = quantize(values.reshape(*values.shape[:-1], scale_groups(value_dim), -1))
    parts = rounded.reshape(values.shape), scale, rotary.astype(jnp.bfloat16)
    return jnp.concatenate([_as_bytes(part) for part in parts], axis=-1)


def unpack_latents(rows: UInt8[Array, "*M bytes"], value_dim: int, dtype: DTypeLike) -> Float[Array, "*M H"]:
    """Computes latents from the bytes of their FP8 format: value · scale in float32, rounded to `dtype`."""
    groups = scale_groups(value_dim)
    values, scale, rotary = jnp.split(rows, [value_dim, value_dim + SCALE_BYTES * groups], axis=-1)
    wide = _from_bytes(values, E4M3).astype(jnp.float32).reshape(*values.shape[:-1], groups, -1)
    wide = (wide * _from_bytes(scale, jnp.float32)[..., None]).reshape(values.shape)
    return jnp.concatenate([wide.astype(dtype), _from_bytes(rotary, jnp.bfloat16).astype(dtype)], axis=-1)


def _as_bytes(x):
    """Shows each row's numbers as its bytes, the lowest first."""
    narrow = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return narrow if narrow.ndim == x.ndim else narrow.reshape(*x.shape[:-1], -1)


def _from_bytes(x, dtype):
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x if size == 1 else x.reshape(*x.shape[:-1], -1, size), dtype)


# Writing and reading.


def write_entries(
    latents: Shaped[Array, "n 64 W"],
    index_keys: Float[Array, "n rows E"],
    slots: Int[Array, " M"],
    kv: Float[Array, "M H"],
    k_index: Float[Array, "M E"],
    *,
    value_dim: int,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "n 64 W"], Float[Array, "n rows E"]]:
    """Writes what pools keep of M tokens, in place where the pools are donated.

    Args:
      latents, index_keys: the pools.
      slots: where, in [0, 64 · n); a token with another slot is dropped, and of several with one slot any is written.
      kv: latents.
      k_index: index keys; rounded by `quantize` where their pages are FP8.
      value_dim: C.
      implementation: None, "xla" or "pallas".
    """
    write = choose_implementation(
        "write_entries",
        implementation,
        decode_kernels.why_not_write_entries(latents, index_keys, kv, k_index, slots),
        xla=partial(_write_both, value_dim=value_dim),
        pallas=partial(decode_kernels.write_entries, hadamard=False),
    )
    return write(latents, index_keys, kv, k_index, slots)


def _write_both(latents, index_keys, kv, k_index, slots, *, value_dim):
    return (
        write_latents(latents, slots, kv, value_dim=value_dim),
        write_index_keys(index_keys, slots, k_index),
    )


def write_latents(
    pool: Shaped[Array, "n rows W"], slots: Int[Array, " M"], kv: Float[Array, "M H"], *, value_dim: int
) -> Shaped[Array, "n rows W"]:
    """Writes M latents at their slots; a slot outside of the pool drops its latent.

    Args:
      pool: the pages, uint8 of FP8; of 64 rows, or of fewer where a row stands for several tokens.
      slots: where, in [0, rows · n).
      kv: the latents.
      value_dim: C.
    """
    rows = pack_latents(kv, value_dim) if pool.dtype == jnp.uint8 else kv.astype(pool.dtype)
    flat = pool.reshape(-1, pool.shape[-1])
    return flat.at[_at(slots, flat.shape[0])].set(rows, mode="drop").reshape(pool.shape)


def write_index_keys(
    pool: Float[Array, "n rows E"], slots: Int[Array, " M"], k_index: Float[Array, "M E"]
) -> Float[Array, "n rows E"]:
    """Writes the index keys of M tokens at their slots, rounded by `quantize` where the pages are FP8."""
    if pool.dtype != E4M3:
        flat = pool.reshape(-1, pool.shape[-1])
        return flat.at[_at(slots, flat.shape[0])].set(k_index.astype(pool.dtype), mode="drop").reshape(pool.shape)
    values, scale = quantize(k_index)
    pages, dim = pool.shape[0], pool.shape[2]
    page, row = jnp.divmod(_at(slots, pages * PAGE), PAGE)  # a page past the last is dropped
    byte = (row[:, None] * SCALE_BYTES + jnp.arange(SCALE_BYTES)).reshape(-1)
    scales = jax.lax.bitcast_convert_type(_as_bytes(scale[:, None]), E4M3).reshape(-1)
    pool = pool.at[page, row].set(values, mode="drop")
    return pool.at[jnp.repeat(page, SCALE_BYTES), PAGE + byte // dim, byte % dim].set(scales, mode="drop")


def _at(slots, size):
    """Takes every slot that is none past the end, where a scatter drops it: a negative one would count from there."""
    return jnp.where((slots >= 0) & (slots < size), slots, size)


def read_latents(
    pool: Shaped[Array, "n rows W"], table: Int[Array, "B P"], *, value_dim: int, dtype: DTypeLike
) -> Float[Array, "B S H"]:
    """Gathers the latents of whole sequences, S = rows · P, in `dtype`."""
    rows = pool[table].reshape(table.shape[0], -1, pool.shape[-1])
    return unpack_latents(rows, value_dim, dtype) if pool.dtype == jnp.uint8 else rows.astype(dtype)


def gather_latents(
    pool: Shaped[Array, "n 64 W"],
    table: Int[Array, "B P"],
    positions: Int[Array, "B M"],
    *,
    value_dim: int,
    dtype: DTypeLike,
) -> Float[Array, "B M H"]:
    """Gathers the latents at positions of sequences in `dtype`; of what is no position, any."""
    slots = jnp.maximum(to_slots(positions, table), 0)
    rows = pool.reshape(-1, pool.shape[-1]).at[slots].get(mode="promise_in_bounds")
    return unpack_latents(rows, value_dim, dtype) if pool.dtype == jnp.uint8 else rows.astype(dtype)


def read_index_keys(
    pool: Float[Array, "n rows E"], table: Int[Array, "B P"]
) -> tuple[Float[Array, "B S E"], Float[Array, "B S"]]:
    """Gathers the index keys of whole sequences and their scales, which are 1 where the pages are not FP8."""
    pages = pool[table]
    keys = pages[:, :, :PAGE].reshape(table.shape[0], -1, pool.shape[-1])
    if pool.dtype != E4M3:
        return keys, jnp.ones(keys.shape[:2], jnp.float32)
    scales = _as_bytes(pages[:, :, PAGE:].reshape(table.shape[0], -1, SCALE_BYTES))
    return keys, jax.lax.bitcast_convert_type(scales, jnp.float32)


def to_slots(
    positions: Int[Array, "B *places"], table: Int[Array, "B P"], *, rows: int = PAGE
) -> Int[Array, "B *places"]:
    """Turns positions of sequences into slots of a pool whose pages have `rows`; what is no position becomes -1."""
    present = (positions >= 0) & (positions < rows * table.shape[1])
    safe = jnp.where(present, positions, 0)
    pages = jnp.take_along_axis(table, (safe // rows).reshape(table.shape[0], -1), axis=1).reshape(positions.shape)
    return jnp.where(present, pages * rows + safe % rows, -1)


# The operations.


def paged_sparse_attention(
    q: Float[Array, "B T N H"],
    latents: Shaped[Array, "n 64 W"],
    table: Int[Array, "B P"],
    indices: Int[Array, "B T K"],
    *,
    value_dim: int,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attends to the selected latents of each sequence: `sparse_attention` over pages. No gradient is meant.

    Args:
      q: queries in latent form, float32 or bfloat16.
      latents: the pages, bytes of FP8 or numbers.
      table: the page of each 64 positions of each sequence; those that hold nothing yet may be any.
      indices: the selections, positions of the sequences.
      value_dim, scale, implementation: as in `sparse_attention`.

    Returns:
      out and lse as in `sparse_attention`.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.
    """
    q, latents, indices = jnp.asarray(q), jnp.asarray(latents), jnp.asarray(indices)
    _check_pages(q, latents, table, value_dim)
    check_indices(indices, *q.shape[:2])
    many = f"T must be at most {FEW_QUERIES}, got {q.shape[1]}" if q.shape[1] > FEW_QUERIES else None
    options: dict[str, Any] = dict(value_dim=value_dim, scale=static_scale(scale))
    attend = choose_implementation(
        "paged_sparse_attention",
        implementation,
        many or decode_kernels.why_not_attention(q, latents, table, indices, value_dim),
        xla=partial(_gathered_attention, **options, implementation=_inner(implementation)),
        pallas=partial(decode_kernels.paged_sparse_attention, **options),
    )
    return attend(q, latents, table, indices)


def _gathered_attention(q, latents, table, indices, *, value_dim, scale, implementation):
    """Gathers what is selected, or the whole sequences where queries are so many that these are shorter."""
    batch, length, k = indices.shape
    attend = partial(sparse_attention, value_dim=value_dim, scale=scale, implementation=implementation)
    if length * k >= table.shape[1] * PAGE:
        return attend(q, read_latents(latents, table, value_dim=value_dim, dtype=q.dtype), indices)
    kv = gather_latents(latents, table, indices.reshape(batch, -1), value_dim=value_dim, dtype=q.dtype)
    present = (indices >= 0) & (indices < table.shape[1] * PAGE)
    own = jnp.where(present, jnp.arange(length * k).reshape(length, k), -1)
    return attend(q, kv, own)


def paged_index_scores(
    q_index: Float[Array, "B T J E"],
    index_keys: Float[Array, "n rows E"],
    weights: Float[Array, "B T J"],
    table: Int[Array, "B P"],
    keys: KeyRange,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T S"]:
    """Scores every reachable key of each sequence: `index_scores` over pages, S = 64 · P.

    Args:
      q_index, weights, keys, implementation: as in `index_scores`; positions of the sequences.
      index_keys: the pages, in the dtype of `q_index`.
      table: the page of each 64 positions of each sequence.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.
    """
    arrays = _check_index_inputs(q_index, index_keys, weights, table, keys)
    score = choose_implementation(
        "paged_index_scores",
        implementation,
        decode_kernels.why_not_index_scores(*arrays),
        xla=partial(_read_scores, implementation=_inner(implementation)),
        pallas=decode_kernels.paged_index_scores,
    )
    return score(*arrays)


def _inner(implementation):
    """Says what the operations of a definition may run: kernels over gathered keys too, unless "xla" was told."""
    return "xla" if implementation == "xla" else None


def _read_scores(q_index, index_keys, weights, table, start, stop, *, implementation):
    k_index, k_scale = read_index_keys(index_keys, table)
    k_index, keys = k_index.astype(q_index.dtype), KeyRange(start, stop)
    return index_scores(q_index, k_index, weights, keys, k_scale=k_scale, implementation=implementation)


def paged_select_keys(
    q_index: Float[Array, "B T J E"],
    index_keys: Float[Array, "n rows E"],
    weights: Float[Array, "B T J"],
    table: Int[Array, "B P"],
    keys: KeyRange,
    *,
    k: int,
    implementation: Implementation | None = None,
) -> Int[Array, "B T K"]:
    """Selects the k best keys of each query: `select_keys` over pages.

    Args:
      q_index, index_keys, weights, table, keys, implementation: as in `paged_index_scores`.
      k: how many keys each query keeps.

    Returns:
      int32 positions of the sequences, canonical.
    """
    arrays = _check_index_inputs(q_index, index_keys, weights, table, keys)
    select = choose_implementation(
        "paged_select_keys",
        implementation,
        decode_kernels.why_not_select_keys(*arrays, k=k),
        xla=partial(_read_and_select, k=k, implementation=_inner(implementation)),
        pallas=partial(decode_kernels.paged_select_keys, k=k),
    )
    return select(*arrays)


def _read_and_select(q_index, index_keys, weights, table, start, stop, *, k, implementation):
    k_index, k_scale = read_index_keys(index_keys, table)
    k_index, keys = k_index.astype(q_index.dtype), KeyRange(start, stop)
    return select_keys(q_index, k_index, weights, keys, k=k, k_scale=k_scale, implementation=implementation)


def _check_pages(q, latents, table, value_dim):
    """Raises ValueError unless queries, pages and table fit together."""
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, N, C+R], got shape {q.shape}")
    dim = q.shape[3]
    if not 1 <= value_dim <= dim:
        raise ValueError(f"value_dim must be from 1 to the {dim} columns of q, got {value_dim}")
    if latents.dtype not in (jnp.uint8, jnp.float32, jnp.bfloat16):
        raise ValueError(f"pages of latents must be uint8, of FP8, or float32 or bfloat16, got {latents.dtype}")
    width = latent_bytes(value_dim, dim - value_dim) if latents.dtype == jnp.uint8 else dim
    if latents.shape[1:] != (PAGE, width):
        raise ValueError(f"pages of latents must be [n, {PAGE}, {width}] for q {q.shape}, got {latents.shape}")
    _check_table(table, q.shape[0])


def _check_index_inputs(q_index, index_keys, weights, table, keys):
    """Checks shapes and dtypes before any work, and lists the arrays that a kernel takes."""
    q_index, weights = jnp.asarray(q_index), jnp.asarray(weights)
    if q_index.ndim != 4:
        raise ValueError(f"q_index must be [B, T, J, E], got shape {q_index.shape}")
    if weights.shape != q_index.shape[:3]:
        raise ValueError(f"weights must be {list(q_index.shape[:3])} like q_index, got shape {weights.shape}")
    rows = index_page_rows(q_index.shape[-1], q_index.dtype == E4M3)
    fits = index_keys.dtype == q_index.dtype or E4M3 not in (index_keys.dtype, q_index.dtype)
    if not fits or index_keys.shape[1:] != (rows, q_index.shape[-1]):
        raise ValueError(
            f"pages of index keys must be {q_index.dtype} [n, {rows}, {q_index.shape[-1]}] like q_index, "
            f"got {index_keys.dtype} {index_keys.shape}"
        )
    check_keys(keys, *q_index.shape[:2])
    _check_table(table, q_index.shape[0])
    return q_index, index_keys, weights.astype(jnp.float32), table, keys.start, keys.stop


def _check_table(table, batch):
    if table.ndim != 2 or table.shape[0] != batch or not table.shape[1] or table.dtype != jnp.int32:
        raise ValueError(f"table must be int32 [{batch}, P], got {table.dtype} {table.shape}")
