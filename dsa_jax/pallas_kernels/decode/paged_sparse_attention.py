"""Computes sparse MLA attention of a few tokens a sequence over pages of cached latents, on Hopper.

A few tokens leave most of the card idle, so the selected keys of a query are split among thread blocks, whose results
`combine` joins. FP8 pages have kernels of their own: `attention_many_heads` for multiples of 64 heads,
`attention_keys_as_rows` for 8 and 16 whose keys are not split, and `attention_few_heads` for 8 and 16 whose keys are,
and for 32. bfloat16 pages go to the kernels of `sparse_attention`, as one long sequence that is the whole pool, the
splits as further queries of it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from dsa_jax.pallas_kernels import sparse_attention as contiguous
from dsa_jax.pallas_kernels.decode.attention_few_heads import HEADS as FEW_HEADS
from dsa_jax.pallas_kernels.decode.attention_few_heads import Config as FewHeadsConfig
from dsa_jax.pallas_kernels.decode.attention_few_heads import attend_few_heads
from dsa_jax.pallas_kernels.decode.attention_keys_as_rows import HEADS as KEYS_AS_ROWS_HEADS
from dsa_jax.pallas_kernels.decode.attention_keys_as_rows import Config as KeysAsRowsConfig
from dsa_jax.pallas_kernels.decode.attention_keys_as_rows import attend_keys_as_rows
from dsa_jax.pallas_kernels.decode.attention_many_heads import Config as ManyHeadsConfig
from dsa_jax.pallas_kernels.decode.attention_many_heads import attend_many_heads
from dsa_jax.pallas_kernels.decode.combine import combine
from dsa_jax.pallas_kernels.decode.gather_rows import DIM, PAGE_ROWS, ROW_BYTES, VALUE_DIM
from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import BLOCK_HEADS, BLOCK_KEYS

MAX_SPLITS = 32  # `combine` holds four columns of every part in registers
LEAST_CONTIGUOUS_HEADS = 16  # of the kernels for bfloat16: fewer are filled up


def why_not(q, pages, table, indices, value_dim: int) -> str | None:
    """Says in one sentence why no kernel can take these arguments, or None when one can."""
    dtypes = [str(x.dtype) for x in (q, pages, table, indices)]
    if dtypes[0] != "bfloat16" or dtypes[1] not in ("uint8", "bfloat16") or dtypes[2:] != ["int32", "int32"]:
        return f"q must be bfloat16, pages uint8 or bfloat16, table and indices int32, got {', '.join(dtypes)}"
    shapes = f"q {q.shape}, pages {pages.shape}, table {table.shape} and indices {indices.shape}"
    if (q.ndim, pages.ndim, table.ndim, indices.ndim) != (4, 3, 2, 3):
        return f"expected q [B, T, N, H], pages [n, 64, row], table [B, P] and indices [B, T, K], got {shapes}"
    if table.shape[0] != q.shape[0] or indices.shape[:2] != q.shape[:2]:
        return f"{shapes} do not fit together"
    if 0 in (*q.shape, *pages.shape, *table.shape, *indices.shape):
        return f"no dimension may be 0, got {shapes}"
    row = ROW_BYTES if dtypes[1] == "uint8" else DIM
    if pages.shape[1:] != (PAGE_ROWS, row) or q.shape[3] != DIM or value_dim != VALUE_DIM:
        return (
            f"q must have {DIM} columns, {VALUE_DIM} of them values, and {dtypes[1]} pages {PAGE_ROWS} rows of {row}, "
            f"got {shapes} and value_dim {value_dim}"
        )
    heads = q.shape[2]
    if heads not in FEW_HEADS and heads % BLOCK_HEADS:
        return f"heads must be 8, 16, 32 or a multiple of {BLOCK_HEADS}, got {heads}"
    if pages.shape[0] * PAGE_ROWS >= 2**31 or table.shape[1] * PAGE_ROWS >= 2**31:
        return f"rows of pages are counted in int32, got {shapes}"
    # The kernels count blocks of keys, and up to nine pieces of each, in int32, splits and their padding included.
    if math.prod(q.shape[:2]) * math.ceil(heads / 64) * (math.ceil(indices.shape[2] / 64) + 2 * MAX_SPLITS) >= 2**27:
        return f"B · T · ⌈N / 64⌉ · ⌈K / 64⌉ must be below 2²⁷, got {shapes}"
    return None


def paged_sparse_attention(
    q,
    pages,
    table,
    indices,
    *,
    value_dim: int = VALUE_DIM,
    scale: float,
    splits: int | None = None,
    config: Any = None,
    interpret: bool = False,
    after=None,
):
    """Attends to the selected rows of pages alone.

    With `splits` given, what a query gets does not depend on the batch: the same bits in any other. NaN in a row that
    is selected, or in q, comes out as NaN, in `out` and `lse` of the heads that meet it.

    Args:
      q: [B, T, N, 576] bfloat16; N is 8, 16, 32 or a multiple of 64. With FP8 pages its 512 latent columns are rounded
        to half precision: beyond ±65504 they make NaN, and below 2^-14 they are rounded to multiples of 2^-24.
      pages: [n, 64, 656] uint8, rows of 512 e4m3, 4 float32 scales of 128 of them each, 64 bfloat16 rotary columns; or
        [n, 64, 576] bfloat16. Products of e4m3 and scales that are no powers of two are rounded to bfloat16.
      table: [B, P] int32, the page of each 64 positions of a sequence: within [0, n), also where no key is selected.
      indices: [B, T, K] int32, positions in the sequence; what lies outside [0, 64·P) is no key.
      value_dim: 512, the first columns of a row, which are its values.
      scale: of the logits.
      splits: parts that the selection is cut into, 1 to 32; None for as many as fill the card.
      config: tuning of the kernel for this type of pages, number of heads and splits. For 8 and 16 heads without splits
        that of `attention_few_heads` has this kernel run.
      interpret: run in Pallas' interpreter, on a CPU; bfloat16 pages alone.
      after: an array that is not read; what makes it runs first. For timing one call after another.

    Returns:
      out [B, T, N, 512] bfloat16 and lse [B, T, N] float32, the natural logarithm of the sum of exponentials; 0 and
      -inf for a query without keys.

    Raises:
      ValueError: if `why_not` has a reason, the scale is not finite, splits are out of range, the config is another
        kernel's, or FP8 pages are to be interpreted.
    """
    reason = why_not(q, pages, table, indices, value_dim)
    if reason is not None:
        raise ValueError(f"paged_sparse_attention has no kernel for this: {reason}")
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits must be None or from 1 to {MAX_SPLITS}, got {splits}")
    batch, length, heads, dim = q.shape
    fp8 = pages.dtype == jnp.uint8
    splits, part_keys = split_keys(batch * length, heads, indices.shape[2], splits)
    padding = splits * part_keys - indices.shape[2]
    indices = indices.reshape(batch * length, -1)
    if padding:
        indices = jnp.pad(indices, ((0, 0), (0, padding)), constant_values=-1)
    if fp8:
        if interpret:
            raise ValueError("interpret: FP8 pages cannot be interpreted, their kernels are written in PTX")
        attend, config = _choose_kernel(heads, splits, config)
        out, lse = attend(
            q.reshape(-1, heads, dim), pages.reshape(-1, ROW_BYTES), table, indices,
            scale=scale, config=config, after=after,
        )  # fmt: skip
    else:
        out, lse = _attend_bfloat16(q, pages, table, indices, scale, splits, config, interpret)
    if splits > 1:
        out, lse = combine(out, lse, interpret)
    return out.reshape(batch, length, heads, value_dim), lse.reshape(batch, length, heads)


def split_keys(queries: int, heads: int, keys: int, splits: int | None) -> tuple[int, int]:
    """Chooses how many parts the keys of each query are cut into, and their length, in which -1 fill up the last.

    As many as give every multiprocessor work, a power of two; a part is a block of 64 keys or, for 64 heads and more,
    an even number of blocks.
    """
    blocks = -(-keys // BLOCK_KEYS)
    step = 1 if heads in FEW_HEADS else 2
    fixed = splits is not None
    if splits is None:
        room = max(1, ptx.multiprocessors() // (queries * -(-heads // BLOCK_HEADS)))
        splits = min(MAX_SPLITS, 1 << room.bit_length() - 1, blocks)
    each = -(-blocks // splits)
    if each > 1:
        each = -(-each // step) * step
    if not fixed:
        splits = -(-blocks // each)  # none without a key
    return splits, each * BLOCK_KEYS


def _choose_kernel(heads: int, splits: int, config: Any) -> tuple[Callable[..., Any], Any]:
    """Chooses the kernel for FP8 pages that a config is for, or without one the fastest; returns it and its config."""
    kernels: list[tuple[Any, Callable[..., Any]]] = []
    if heads in KEYS_AS_ROWS_HEADS and splits == 1:
        kernels.append((KeysAsRowsConfig, attend_keys_as_rows))
    if heads in FEW_HEADS:
        kernels.append((FewHeadsConfig, functools.partial(attend_few_heads, splits=splits)))
    else:
        kernels.append((ManyHeadsConfig, functools.partial(attend_many_heads, splits=splits)))
    for tuning, attend in kernels:
        if config is None or isinstance(config, tuning):
            return attend, config or tuning()
    names = " or ".join(f"{tuning.__module__}.Config" for tuning, _ in kernels)
    raise ValueError(f"config must be a {names} for {heads} heads and {splits} splits, got {config}")


def _attend_bfloat16(q, pages, table, indices, scale, splits, config, interpret):
    """Attends to rows of bfloat16 pages, each part of the selection as a query of its own."""
    batch, length, heads, dim = q.shape
    queries = batch * length
    # Positions become rows of the pool. Those of absent keys are never negative where they are looked up.
    present = (indices >= 0) & (indices < table.shape[1] * PAGE_ROWS)
    positions = jnp.where(present, indices, 0)
    rows_of_table = jnp.take_along_axis(jnp.repeat(table, length, axis=0), positions // PAGE_ROWS, axis=1)
    rows = jnp.where(present, rows_of_table * PAGE_ROWS + positions % PAGE_ROWS, -1)
    rows = rows.reshape(queries, splits, -1).swapaxes(0, 1).reshape(1, splits * queries, -1)
    q = q.reshape(queries, heads, dim)
    missing = max(0, LEAST_CONTIGUOUS_HEADS - heads)
    if missing:
        q = jnp.pad(q, ((0, 0), (0, missing), (0, 0)))
    q = jnp.broadcast_to(q[None], (splits, *q.shape)).reshape(1, splits * queries, heads + missing, dim)
    out, lse = contiguous.sparse_attention(
        q, pages.reshape(1, -1, dim), rows, value_dim=VALUE_DIM, scale=scale, config=config, interpret=interpret
    )
    lead = (splits, queries) if splits > 1 else (queries,)
    return out[:, :, :heads].reshape(*lead, heads, VALUE_DIM), lse[:, :, :heads].reshape(*lead, heads)
