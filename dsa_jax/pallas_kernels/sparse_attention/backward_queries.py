"""Computes the gradient of sparse attention by its queries: d_q[t,n] = Σ_k ds[t,n,k] · kv[indices[t,k]], bfloat16.

A persistent grid of blocks of three warpgroups; keys go by in blocks of 64. Warpgroups 0 and 1 multiply, each with 64
heads × at most 320 columns of d_q in float32 in its registers from an item's first key to its last; warpgroup 2 brings
what they multiply, ds by TMA and the rows of kv by gathering, into two rings that run on across items.

  128 heads  an item is a query × half of the columns: a warpgroup each for its own 64 heads, both read the same rows.
             Two neighbouring blocks have the two halves of a query at the same time, so that the second one finds ds
             in L2, and change halves from item to item, since nine tiles of 64 columns make halves of five and four.
  64 heads   an item is a query: a warpgroup each for its own half of the columns, with a ring of rows of its own, both
             read the same ds.

So a row is gathered once, and ds read twice or once. At the end d_q goes through memory that no copy of the next item
needs yet, a tile of columns at a time, while the other warpgroup may still be multiplying.

Two rates bind it at 128 heads and H 576, a block of keys of a five-tile half: 1280 clocks of tensor cores, and 56 KiB
from L2, 1400 clocks of what gathers alone reach (9.1 TB/s over the card).

Measured on an H200 at T 4096, K 2048, H 576, at S 8192 and at S 131072:

  128 heads   1.80 ms, 687 TFLOP/s   2.67 ms, 463 TFLOP/s
   64 heads   2.04 ms                2.33 ms

Taking 128 heads as two items of 64, which gathers every row twice, takes 3.90 ms instead of 1.80.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_HEADS,
    BLOCK_KEYS,
    PAIR_KEYS,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
)

PART_TILES = 5  # of 64 columns, a warpgroup's at most: 64 × 320 in float32 are 160 registers a thread
SLOTS = 4  # key blocks in either ring; at 64 heads each warpgroup has two of the slots for rows
COMPUTE_REGISTERS = 208  # of a thread: 160 hold the sums
GATHER_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


def column_parts(dim: int, item_heads: int) -> tuple[tuple[int, int], ...]:
    """Splits the columns: (first, count) of each part, which is an item's at 128 heads, a compute warpgroup's at 64."""
    tiles = dim // SWIZZLED_COLUMNS
    whole = item_heads == 128 and tiles <= PART_TILES or tiles == 1
    first = (tiles if whole else pl.cdiv(tiles, 2)) * SWIZZLED_COLUMNS
    return ((0, dim),) if whole else ((0, first), (first, dim - first))


def smem_bytes(dim: int) -> int:
    """Counts the bytes of shared memory of one block: 226 KiB for H 576."""
    columns = max(column_parts(dim, heads)[0][1] for heads in (64, 128))
    ds, rows = SLOTS * 2 * BLOCK_HEADS * BLOCK_KEYS * 2, SLOTS * BLOCK_KEYS * columns * 2
    return ds + rows + 2 * SMEM_GRANULE_BYTES  # the barriers of gathers and of Pallas


def why_not(ds, kv, indices) -> str | None:
    """Says in one sentence why the kernel cannot take these arguments, or None when it can."""
    dtypes = [str(x.dtype) for x in (ds, kv, indices)]
    if dtypes != ["bfloat16", "bfloat16", "int32"]:
        return f"ds and kv must be bfloat16 and indices int32, got {', '.join(dtypes)}"
    shapes = f"ds {ds.shape}, kv {kv.shape} and indices {indices.shape}"
    if ds.ndim != 3 or kv.ndim != 3 or indices.ndim != 2:
        return f"expected ds [B·T, N, K], kv [B, S, H] and indices [B·T, K], got {shapes}"
    if 0 in ds.shape or 0 in kv.shape:
        return f"no dimension may be 0, got {shapes}"
    queries, heads, keys = ds.shape
    if indices.shape != (queries, keys) or queries % kv.shape[0]:
        return f"{shapes} do not fit together"
    if heads % BLOCK_HEADS:
        return f"heads must be a multiple of {BLOCK_HEADS}, got {heads}"
    if keys % PAIR_KEYS:
        return f"K must be a multiple of {PAIR_KEYS}, got {keys}"
    if kv.shape[2] % SWIZZLED_COLUMNS or kv.shape[2] > 2 * PART_TILES * SWIZZLED_COLUMNS:
        return (
            f"H must be a multiple of {SWIZZLED_COLUMNS} up to {2 * PART_TILES * SWIZZLED_COLUMNS}, got {kv.shape[2]}"
        )
    # The kernel counts the key blocks of all items in int32.
    if queries * (heads // BLOCK_HEADS) * 2 * (keys // BLOCK_KEYS) >= 2**31:
        return f"B·T · N / 64 · K / 64 must be below 2³⁰, got ds {ds.shape}"
    return None


def sparse_backward_queries(ds, kv, indices, *, blocks: int | None = None, interpret: bool = False):
    """Computes d_q of sparse attention, from the gradient of its logits times the scale.

    Args:
      ds: [B·T, N, K] bfloat16; N is a multiple of 64, K of 128. NaN makes d_q of its query and head NaN.
      kv: [B, S, H] bfloat16, H a multiple of 64 up to 640; query i belongs to batch row i // T.
      indices: [B·T, K] int32; what lies outside [0, S) adds nothing.
      blocks: how many thread blocks share the work, in whole pairs where an item has half of the columns; None for one
        on each multiprocessor. No result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      d_q [B·T, N, H] bfloat16, summed in float32.
    """
    reason = why_not(ds, kv, indices)
    if reason is not None:
        raise ValueError(f"sparse_backward_queries has no kernel for this: {reason}")
    return _kernel(ds.shape, kv.shape, blocks, interpret)(ds, kv, indices)


def _kernel(ds_shape, kv_shape, blocks, interpret):
    """Makes the kernel for (ds, kv, indices) of these shapes."""
    queries, heads, _ = ds_shape
    item_heads = 128 if heads % 128 == 0 else 64
    parts = column_parts(kv_shape[2], item_heads)
    by_columns = item_heads == BLOCK_HEADS  # whether the warpgroups share an item's columns, not its heads
    item_parts = 1 if by_columns else len(parts)
    # A multiple of the parts: a query's parts are then the same-numbered items of neighbouring blocks.
    items = queries * (heads // item_heads) * item_parts
    blocks = min(items, max(1, (blocks or ptx.multiprocessors()) // item_parts) * item_parts)
    readers = len(parts) if by_columns else 2  # compute warpgroups at work
    swizzled = ptx.swizzled(jnp.bfloat16)
    scratch = dict(
        # A slot is a block of keys. At 64 heads only the first half is ds, and d_q leaves through the second halves.
        ds_smem=plgpu.SMEM((SLOTS, 2 * BLOCK_HEADS, BLOCK_KEYS), jnp.bfloat16, transforms=swizzled),
        rows_smem=plgpu.SMEM((SLOTS, BLOCK_KEYS, parts[0][1]), jnp.bfloat16, transforms=swizzled),
        rows_barriers=ptx.gather_barriers(SLOTS, interpret),
        # A slot's ds has landed: the arrival of its copy; the compute warpgroups wait.
        ds_barriers=plgpu.Barrier(num_barriers=SLOTS),
        # A slot's rows, or its ds, have been read: an arrival of each warpgroup that reads it; the gathering one waits.
        rows_free_barriers=plgpu.Barrier(num_arrivals=1 if by_columns else 2, num_barriers=SLOTS),
        ds_free_barriers=plgpu.Barrier(num_arrivals=readers, num_barriers=SLOTS),
    )

    def body(ds_gmem, kv_gmem, indices_gmem, d_q_gmem, *refs):
        _block(
            ds_gmem, kv_gmem, indices_gmem, d_q_gmem, **dict(zip(scratch, refs, strict=True)),
            blocks=blocks, items=items, item_heads=item_heads, parts=parts, interpret=interpret,
        )  # fmt: skip

    return ptx.persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((queries, heads, kv_shape[2]), jnp.bfloat16),
        scratch_types=list(scratch.values()),
        blocks=blocks,
        interpret=interpret,
    )


def _block(
    ds_gmem,  # [B·T, N, K] bfloat16
    kv_gmem,  # [B, S, H] bfloat16
    indices_gmem,  # [B·T, K] int32
    d_q_gmem,  # [B·T, N, H] bfloat16
    *,
    ds_smem,  # [SLOTS, 128, 64], 64 KiB
    rows_smem,  # [SLOTS, 64, columns of the larger part], 160 KiB for H 576
    rows_barriers,  # a slot's rows have landed
    ds_barriers,
    rows_free_barriers,
    ds_free_barriers,
    blocks: int,
    items: int,
    item_heads: int,
    parts: tuple[tuple[int, int], ...],
    interpret: bool,
):
    """Runs one thread block: two warpgroups that sum in registers, one that brings ds and rows."""
    queries, heads, keys = ds_gmem.shape
    by_columns = item_heads == BLOCK_HEADS
    item_parts = 1 if by_columns else len(parts)
    depth = SLOTS // 2 if by_columns else SLOTS  # slots of a ring of rows
    key_blocks = keys // BLOCK_KEYS
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    own_items = lax.div(items - 1 - block, blocks) + 1  # items block, block + blocks, …
    steps = own_items * key_blocks  # key blocks, one item's after the other's
    ptx.init_gather_barriers(rows_barriers, SLOTS, interpret)

    def place(item):
        """Gives the query, first head and part of an item of this block; at 64 heads the part is the warpgroup's."""
        number = block + item * blocks
        unit = lax.div(number, item_parts)  # a query and its heads
        query = lax.div(unit, heads // item_heads)
        first_head = (unit - query * (heads // item_heads)) * item_heads
        return query, first_head, lax.rem(number + item, item_parts)  # another part from item to item

    def row_slot(step, part):
        """Gives the slot of a step's rows, and the parity of the phase in which they land there."""
        first = depth * part if by_columns else 0
        return first + lax.rem(step, depth), lax.rem(lax.div(step, depth), 2)

    def keys_of(step):
        """Gives the places of a step's key block in a selection."""
        return pl.ds(lax.rem(step, key_blocks) * BLOCK_KEYS, BLOCK_KEYS)

    @pl.when(warpgroup == 2)
    def _gather():
        plgpu.set_max_registers(GATHER_REGISTERS, action="decrease")

        def row_ids(step):
            """Loads the row numbers of a step; those of the last behind it."""
            step = jnp.minimum(step, steps - 1)
            query, _, _ = place(lax.div(step, key_blocks))
            return ptx.load_row_ids(indices_gmem.at[query, keys_of(step)], interpret)

        def gather_rows(step, query, ids, part):
            """Gathers a part's columns of a step's rows."""
            first, columns = parts[part]
            slot, _ = row_slot(step, part)
            tiles = range(first // SWIZZLED_COLUMNS, (first + columns) // SWIZZLED_COLUMNS)
            latents_gmem = kv_gmem.at[lax.div(query, queries // kv_gmem.shape[0])]
            ptx.gather_64_rows(
                latents_gmem, ids, rows_smem.at[slot], rows_barriers, slot, tiles, interpret, first=tiles[0]
            )

        def wait_free(step, part):
            """Waits until a step's rows may be gathered; the first of a slot at once."""

            @pl.when(step >= depth)
            def _():
                plgpu.barrier_wait(rows_free_barriers.at[row_slot(step, part)[0]])

        def bring(step, ids):
            """Brings the rows and ds of a step, and loads the row numbers of the next meanwhile."""
            query, first_head, item_part = place(lax.div(step, key_blocks))
            next_ids = row_ids(step + 1)
            if by_columns:
                for part in range(len(parts)):
                    wait_free(step, part)
                    gather_rows(step, query, ids, part)
            else:
                wait_free(step, 0)
                for part in range(len(parts)):
                    pl.when(item_part == part)(lambda part=part: gather_rows(step, query, ids, part))
            ds_slot = lax.rem(step, SLOTS)

            @pl.when(step >= SLOTS)
            def _():
                plgpu.barrier_wait(ds_free_barriers.at[ds_slot])

            plgpu.copy_gmem_to_smem(
                ds_gmem.at[query, pl.ds(first_head, item_heads), keys_of(step)],
                ds_smem.at[ds_slot, pl.ds(0, item_heads)],
                ds_barriers.at[ds_slot],
            )
            return next_ids

        lax.fori_loop(0, steps, bring, row_ids(0))
        for i in range(SLOTS):  # each slot in use has been freed once more than was waited for
            pl.when(i < steps)(lambda i=i: plgpu.barrier_wait(ds_free_barriers.at[i]))
        for part in range(len(parts) if by_columns else 1):
            for i in range(depth):
                slot, _ = row_slot(i, part)
                pl.when(i < steps)(lambda slot=slot: plgpu.barrier_wait(rows_free_barriers.at[slot]))

    def free_rows(step, part):
        """Tells the gathering warpgroup that this one has read a step's rows."""
        plgpu.barrier_arrive(rows_free_barriers.at[row_slot(step, part)[0]])

    def free_ds(step):
        """Tells the gathering warpgroup that this one has read a step's ds."""
        plgpu.barrier_arrive(ds_free_barriers.at[lax.rem(step, SLOTS)])

    def multiply(item, part):
        """Sums the products of an item for the columns of `part` in registers, and stores them."""
        first, columns = parts[part]
        own_heads = 0 if by_columns else warpgroup * BLOCK_HEADS
        begin = item * key_blocks
        # A wgmma has at most 256 columns, and those of its operand start with a tile.
        widths = (columns,) if columns <= 256 else (192, columns - 192)
        starts = [sum(widths[:i]) for i in range(len(widths))]

        def sums(*accumulators):
            @pl.loop(0, key_blocks)
            def _(i):
                step = begin + i
                slot, parity = row_slot(step, part)
                ds_slot = lax.rem(step, SLOTS)
                plgpu.barrier_wait(ds_barriers.at[ds_slot])
                ptx.wait_gather(rows_barriers, slot, parity, interpret)
                for accumulator, start, width in zip(accumulators, starts, widths, strict=True):
                    plgpu.wgmma(
                        accumulator,
                        ds_smem.at[ds_slot, pl.ds(own_heads, BLOCK_HEADS)],
                        rows_smem.at[slot, :, pl.ds(start, width)],
                    )
                # The products of the step before are done, these run on: the tensor cores never wait for a release.
                plgpu.wgmma_wait(len(widths))

                @pl.when(i > 0)
                def _():
                    free_rows(step - 1, part)

                # At 128 heads the last two are kept for d_q to leave through.
                @pl.when((i > 0) & ((i < key_blocks - 1) | by_columns))
                def _():
                    free_ds(step - 1)

            return [accumulator[...] for accumulator in accumulators]

        values = pl.run_scoped(sums, *(ptx.ACC((BLOCK_HEADS, width), jnp.float32) for width in widths))
        # d_q leaves through two tiles in turns: at 64 heads the halves of this warpgroup's ds slots that ds does not
        # use, at 128 heads its own heads' halves of the item's last two ds slots, which are released afterwards.
        end = begin + key_blocks
        free_rows(end - 1, part)
        if by_columns:
            free_ds(end - 1)
            stages = [ds_smem.at[SLOTS // 2 * part + i, pl.ds(BLOCK_HEADS, BLOCK_HEADS)] for i in range(2)]
        else:
            stages = [ds_smem.at[lax.rem(end - 2 + i, SLOTS), pl.ds(own_heads, BLOCK_HEADS)] for i in range(2)]
        query, first_head, _ = place(item)
        target_gmem = d_q_gmem.at[query, pl.ds(first_head + own_heads, BLOCK_HEADS)]
        tiles = [
            (first + start + column, value[:, column : column + SWIZZLED_COLUMNS])
            for start, width, value in zip(starts, widths, values, strict=True)
            for column in range(0, width, SWIZZLED_COLUMNS)
        ]
        for i, (column, value) in enumerate(tiles):
            if i >= 2:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the copy before the last has read its tile
            stages[i % 2][...] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stages[i % 2], target_gmem.at[:, pl.ds(column, SWIZZLED_COLUMNS)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if not by_columns:
            free_ds(end - 2)
            free_ds(end - 1)

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        @pl.loop(0, own_items)
        def _(item):
            own_part = warpgroup if by_columns else place(item)[2]
            for part in range(len(parts)):
                pl.when(own_part == part)(lambda part=part: multiply(item, part))
