"""Computes weights of sparse attention and the gradient of its logits, for 64 heads and their multiples, bfloat16.

  p = exp(scale · q·k − lse)        ds = scale · p · (d_out·v − delta)

for the selected keys k of every query; v is the first C columns of k. A block computes one query × 64 heads at a time
with three warpgroups; keys go by 64 at a time:

  warpgroup 0   holds Q in registers: q·k of the key block, p to shared memory and from there to its place
  warpgroup 1   holds d_out in registers: d_out·v, then ds from it and p, likewise
  warpgroup 2   gathers the rows of the keys in pieces of three 64-column tiles into a ring of eight; Q and d_out of the
                next 64 heads pass through the same ring

With one operand in registers the products read shared memory half of the time that they take; with both there the
tensor cores would wait for it. Warpgroup 1 needs p of its key block, so it runs behind warpgroup 0 by about half a
block: one multiplies while the other is in its exponentials or stores. A piece of the ring is gathered anew as soon as
both have multiplied by it.

Measured on an H200 at T 4096, N 128, C 512, R 64, K 2048: 3.96 ms, 590 TFLOP/s, at S 8192 and 4.45 ms, 525 TFLOP/s, at
S 131072. With every index below 64, the gather nearly free, it takes 3.88 ms; with 232 `COMPUTE_REGISTERS` 4.02 ms.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_HEADS,
    BLOCK_KEYS,
    LOG2E,
    ROW_LAYOUT,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
)

PIECE_TILES = 3  # of 64 columns: what is gathered and released together
SLOTS = 8  # pieces in the ring, a power of two: 64 × 192 columns each, 192 KiB together
MAX_VALUE_DIM = 512  # C: with R 64, Q takes 144 registers a thread
COMPUTE_REGISTERS = 224  # of a thread: 144 hold 64 × 576 of Q, 32 the 64 × 64 products
GATHER_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


def smem_bytes() -> int:
    """Counts the bytes of shared memory of one block, whatever the shapes: 226 KiB."""
    ring = SLOTS * BLOCK_KEYS * PIECE_TILES * SWIZZLED_COLUMNS * 2
    tiles = 4 * BLOCK_HEADS * BLOCK_KEYS * 2  # two of p, two of ds
    return ring + tiles + 2 * SMEM_GRANULE_BYTES  # the barriers of gathers and of Pallas


def pieces(columns: int) -> list[int]:
    """Splits columns into pieces: how many tiles each has."""
    tiles = columns // SWIZZLED_COLUMNS
    return [min(PIECE_TILES, tiles - first) for first in range(0, tiles, PIECE_TILES)]


def why_not(q, d_out, kv, indices, lse, delta) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    if (q.ndim, d_out.ndim, kv.ndim, indices.ndim) != (3, 3, 3, 2):
        return (
            "expected q [B·T, N, H], d_out [B·T, N, C], kv [B, S, H] and indices [B·T, K], "
            f"got {q.shape}, {d_out.shape}, {kv.shape} and {indices.shape}"
        )
    queries, heads, dim = q.shape
    batch, size, _ = kv.shape
    value_dim, topk = d_out.shape[2], indices.shape[1]
    for name, array, shape, dtype in (
        ("q", q, q.shape, jnp.bfloat16),
        ("d_out", d_out, (queries, heads, value_dim), jnp.bfloat16),
        ("kv", kv, (batch, size, dim), jnp.bfloat16),
        ("indices", indices, (queries, topk), jnp.int32),
        ("lse", lse, (queries, heads), jnp.float32),
        ("delta", delta, (queries, heads), jnp.float32),
    ):
        if array.shape != shape or array.dtype != dtype:
            return f"{name} must be {jnp.dtype(dtype).name} {shape}, got {array.dtype} {array.shape}"
    if not all((queries, heads, batch, size, topk)):
        return f"no dimension may be 0, got q {q.shape}, kv {kv.shape} and indices {indices.shape}"
    if queries % batch:
        return f"the queries must be a multiple of the batch, got {queries} and {batch}"
    if heads % BLOCK_HEADS:
        return f"heads must be a multiple of {BLOCK_HEADS}, got {heads}"
    if value_dim not in range(SWIZZLED_COLUMNS, MAX_VALUE_DIM + 1, SWIZZLED_COLUMNS):
        step = SWIZZLED_COLUMNS
        return f"value_dim must be a multiple of {step} from {step} to {MAX_VALUE_DIM}, got {value_dim}"
    if dim - value_dim not in (0, SWIZZLED_COLUMNS):
        return f"the rotary columns must be 0 or {SWIZZLED_COLUMNS}, got {dim} - {value_dim} = {dim - value_dim}"
    if topk % BLOCK_KEYS:
        return f"K must be a multiple of {BLOCK_KEYS}, got {topk}"
    if queries * (heads // BLOCK_HEADS) * (topk // BLOCK_KEYS) >= 2**27:  # times pieces, in int32
        return f"B · T · N / 64 · K / 64 must be below 2²⁷, got {queries}, {heads} and {topk}"
    return None


def sparse_backward_weights(
    q, d_out, kv, indices, lse, delta, *, scale: float, blocks: int | None = None, interpret: bool = False
):
    """Computes p = exp(scale · q·k − lse) and ds = scale · p · (d_out·v − delta) of every head and selected key.

    Where an index is outside [0, S), and in rows whose lse is -inf, p is exactly 0, and so is ds unless delta is NaN:
    what ds of an absent key holds goes nowhere but into the query's own d_q.

    Args:
      q: [B·T, N, H] bfloat16, N a multiple of 64.
      d_out: [B·T, N, C] bfloat16.
      kv: [B, S, H] bfloat16; its first C columns are the values.
      indices: [B·T, K] int32, K a multiple of 64.
      lse: [B·T, N] float32, of the forward pass.
      delta: [B·T, N] float32, d_out·out.
      scale: of the logits.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      p and ds, [B·T, N, K] bfloat16.

    Raises:
      ValueError: if `why_not` has a reason, or the scale is not finite.
    """
    reason = why_not(q, d_out, kv, indices, lse, delta)
    if reason is not None:
        raise ValueError(f"sparse_backward_weights: {reason}")
    if not math.isfinite(scale):
        raise ValueError(f"sparse_backward_weights: scale must be finite, got {scale}")
    kernel = _kernel(q.shape, kv.shape, indices.shape[1], scale, blocks, interpret)
    return kernel(q, d_out, kv, indices, lse, delta)


def _kernel(q_shape, kv_shape, topk, scale, blocks, interpret):
    """Makes the kernel for (q, d_out, kv, indices, lse, delta) of these shapes."""
    queries, heads, _ = q_shape
    blocks = min(queries * (heads // BLOCK_HEADS), blocks or ptx.multiprocessors())
    swizzled = ptx.swizzled(jnp.bfloat16)
    out = jax.ShapeDtypeStruct((queries, heads, topk), jnp.bfloat16)

    def body(*refs):
        _block(*refs, blocks=blocks, per_batch=queries // kv_shape[0], scale=scale, interpret=interpret)

    return ptx.persistent_kernel(
        body,
        out_type=(out, out),
        scratch_types=(  # what each is for stands at the arguments of `_block`
            plgpu.SMEM(
                (SLOTS, BLOCK_KEYS, PIECE_TILES * SWIZZLED_COLUMNS), jnp.bfloat16, transforms=swizzled
            ),  # 192 KiB
            plgpu.SMEM((2, BLOCK_HEADS, BLOCK_KEYS), jnp.bfloat16, transforms=swizzled),  # p, 16 KiB
            plgpu.SMEM((2, BLOCK_HEADS, BLOCK_KEYS), jnp.bfloat16, transforms=swizzled),  # ds, 16 KiB
            ptx.gather_barriers(SLOTS, interpret),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        ),
        blocks=blocks,
        interpret=interpret,
        approx_math=True,
    )


def _block(
    q_gmem,  # [B·T, N, H] bfloat16
    d_out_gmem,  # [B·T, N, C] bfloat16
    kv_gmem,  # [B, S, H] bfloat16
    indices_gmem,  # [B·T, K] int32
    lse_gmem,  # [B·T, N] float32
    delta_gmem,  # [B·T, N] float32
    p_gmem,  # [B·T, N, K] bfloat16
    ds_gmem,  # [B·T, N, K] bfloat16
    ring_smem,  # [8, 64, 192]: of an item the pieces of Q, of d_out, then of every key block
    p_smem,  # [2, 64, 64]: of even and odd key blocks
    ds_smem,  # [2, 64, 64]
    gathered_barriers,  # a slot of the ring: its piece has landed; both compute warpgroups wait
    # A slot of the ring: an arrival each of the compute warpgroups, at first and when done with a piece; the gathering
    # one waits. Each arrives once for every piece, needed or not, and not before it has landed: so neither is ever more
    # than a phase ahead or behind.
    free_barriers,
    p_barriers,  # from warpgroup 0 to 1: p of an even or odd block is there. One arrival.
    p_read_barriers,  # from warpgroup 1 to 0, at first and when it has read p of an even or odd block. One arrival.
    *,
    blocks: int,
    per_batch: int,
    scale: float,
    interpret: bool,
):
    """Runs one thread block: one warpgroup for p, one for ds, one that gathers for both."""
    size = kv_gmem.shape[1]
    key_pieces, value_pieces = pieces(kv_gmem.shape[2]), pieces(d_out_gmem.shape[2])
    key_blocks = indices_gmem.shape[1] // BLOCK_KEYS
    head_blocks = q_gmem.shape[1] // BLOCK_HEADS
    block = lax.axis_index("block")
    items = lax.div(q_gmem.shape[0] * head_blocks - 1 - block, blocks) + 1  # of this block
    before_keys = len(key_pieces) + len(value_pieces)  # pieces of an item
    pieces_of_item = before_keys + key_blocks * len(key_pieces)
    ptx.init_gather_barriers(gathered_barriers, SLOTS, interpret)

    def place(item):
        """Gives the query and first head of an item of this block: neighbours have the same query, its other heads."""
        item = block + item * blocks
        return lax.div(item, head_blocks), lax.rem(item, head_blocks) * BLOCK_HEADS

    def key_block(item, i):
        """Refers to the 64 indices of an item's key block `i`, or of its last."""
        return indices_gmem.at[place(item)[0], pl.ds(jnp.minimum(i, key_blocks - 1) * BLOCK_KEYS, BLOCK_KEYS)]

    def rows(ref, item):
        """Loads one value a head of this item."""
        query, first_head = place(item)
        return plgpu.load(ref.at[query, pl.ds(first_head, BLOCK_HEADS)], layout=ROW_LAYOUT, optimized=False)

    def over(row_values):
        """Repeats one value a head along the keys of a block."""
        return lax.broadcast_in_dim(row_values, (BLOCK_HEADS, BLOCK_KEYS), [0])

    def slot_of(piece):
        """Gives the slot of a piece, counted from the first of this block."""
        return lax.bitwise_and(piece, SLOTS - 1)

    def wait_piece(piece):
        """Waits for a piece, counted from the first of this block, and returns its slot."""
        slot = slot_of(piece)
        parity = lax.bitwise_and(lax.shift_right_logical(piece, SLOTS.bit_length() - 1), 1)
        ptx.wait_gather(gathered_barriers, slot, parity, interpret)
        return slot

    def release(piece):
        """Tells the gathering warpgroup that this one does not need a piece any more."""
        plgpu.barrier_arrive(free_barriers.at[slot_of(piece)])

    def release_all():
        """Tells the gathering warpgroup that all slots are empty, at first."""
        for slot in range(SLOTS):
            plgpu.barrier_arrive(free_barriers.at[slot])

    def operand(item, skipped, widths):
        """Loads Q or d_out of an item into registers, from the pieces that stand behind `skipped` others."""
        loaded = []
        first = item * pieces_of_item
        for i in range(before_keys):
            slot = wait_piece(first + i)
            if skipped <= i < skipped + len(widths):
                ref = ring_smem.at[slot, :, pl.ds(0, SWIZZLED_COLUMNS * widths[i - skipped])]
                loaded.append(plgpu.load(ref, layout=plgpu.Layout.WGMMA))
            release(first + i)
        return loaded

    def product(operand, widths, item, i):
        """Multiplies the operand by the keys of a block, or by the first of their columns: [64 heads, 64 keys]."""
        first = item * pieces_of_item + before_keys + i * len(key_pieces)

        def run(accumulator):
            for j in range(len(key_pieces)):
                slot = wait_piece(first + j)
                if j < len(widths):
                    keys = ring_smem.at[slot, :, pl.ds(0, SWIZZLED_COLUMNS * widths[j])]
                    plgpu.wgmma(accumulator, operand[j], keys.transpose((1, 0)))
            # Products complete in the order of their issue. d_out·v leaves out the pieces without values.
            for j in range(len(key_pieces)):
                plgpu.wgmma_wait(max(len(widths) - 1 - j, 0))
                release(first + j)
            return accumulator[...]

        if interpret:  # which has no operands in registers
            return interpreted_product(operand, widths, first)
        return pl.run_scoped(run, ptx.ACC((BLOCK_HEADS, BLOCK_KEYS), jnp.float32))

    def interpreted_product(operand, widths, first):
        """Multiplies as `product` does, in the interpreter."""
        total = jnp.zeros((BLOCK_HEADS, BLOCK_KEYS), jnp.float32)
        for j in range(len(key_pieces)):
            slot = wait_piece(first + j)
            if j < len(widths):
                keys = ring_smem[slot, :, pl.ds(0, SWIZZLED_COLUMNS * widths[j])]
                total += jnp.dot(operand[j], keys.T, preferred_element_type=jnp.float32)
            release(first + j)
        return total

    def store(tile_smem, out_gmem, item, i):
        """Starts the copy of a tile [64 heads, 64 keys] from shared memory to its place."""
        query, first_head = place(item)
        columns = pl.ds(i * BLOCK_KEYS, BLOCK_KEYS)
        plgpu.copy_smem_to_gmem(tile_smem, out_gmem.at[query, pl.ds(first_head, BLOCK_HEADS), columns])

    @pl.when(lax.axis_index("warpgroup") == 2)
    def _gather():
        plgpu.set_max_registers(GATHER_REGISTERS, action="decrease")

        def gather(rows_gmem, ids, piece, widths):
            """Gathers 64 rows in pieces, from number `piece` on, each when its slot is free."""
            for j, width in enumerate(widths):
                slot = slot_of(piece + j)
                plgpu.barrier_wait(free_barriers.at[slot])
                tiles = range(PIECE_TILES * j, PIECE_TILES * j + width)
                to = ring_smem.at[slot]
                ptx.gather_64_rows(rows_gmem, ids, to, gathered_barriers, slot, tiles, interpret, first=tiles[0])

        @pl.loop(0, items)
        def _(item):
            query, first_head = place(item)
            first = item * pieces_of_item
            ids = ptx.load_row_ids(key_block(item, 0), interpret)
            # Q and d_out of an item are gathered too: rows are its 64 heads.
            heads = ptx.consecutive_row_ids(first_head, interpret)
            gather(q_gmem.at[query], heads, first, key_pieces)
            gather(d_out_gmem.at[query], heads, first + len(key_pieces), value_pieces)

            def step(i, ids):
                next_ids = ptx.load_row_ids(key_block(item, i + 1), interpret)
                latents_gmem = kv_gmem.at[lax.div(query, per_batch)]
                gather(latents_gmem, ids, first + before_keys + i * len(key_pieces), key_pieces)
                return next_ids

            lax.fori_loop(0, key_blocks, step, ids)

        for slot in range(SLOTS):  # every phase is waited for, as the interpreter demands
            plgpu.barrier_wait(free_barriers.at[slot])

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _weights():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        release_all()

        @pl.loop(0, items)
        def _(item):
            q = operand(item, 0, key_pieces)
            lse = rows(lse_gmem, item)
            # +inf where there is no key makes p 0 whatever the logit; -inf would make it NaN.
            log2_lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)

            def step(i, ids):
                next_ids = ptx.load_key_ids(key_block(item, i + 1), interpret)
                x = product(q, key_pieces, item, i) * (scale * LOG2E) - over(log2_lse)
                p = jnp.exp2(ptx.drop_absent_keys(x, ids, size, interpret))
                slot = lax.bitwise_and(item * key_blocks + i, 1)
                # The tile of two blocks ago is free: its copy has read it, and so has warpgroup 1.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                plgpu.barrier_wait(p_read_barriers.at[slot])
                p_smem[slot] = p.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_barriers.at[slot])
                store(p_smem.at[slot], p_gmem, item, i)
                return next_ids

            lax.fori_loop(0, key_blocks, step, ptx.load_key_ids(key_block(item, 0), interpret))

        for slot in range(2):
            plgpu.barrier_wait(p_read_barriers.at[slot])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _gradients():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        release_all()
        for slot in range(2):
            plgpu.barrier_arrive(p_read_barriers.at[slot])

        @pl.loop(0, items)
        def _(item):
            d_out = operand(item, len(key_pieces), value_pieces)
            # scale · p · (d_out·v − delta) with the scale inside, as p is read last and then multiplied once.
            scaled_delta = scale * rows(delta_gmem, item)

            @pl.loop(0, key_blocks)
            def _(i):
                d_p = product(d_out, value_pieces, item, i) * scale - over(scaled_delta)
                slot = lax.bitwise_and(item * key_blocks + i, 1)
                plgpu.barrier_wait(p_barriers.at[slot])
                p = plgpu.load(p_smem.at[slot], layout=plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(p_read_barriers.at[slot])
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                ds_smem[slot] = (p.astype(jnp.float32) * d_p).astype(jnp.bfloat16)
                plgpu.commit_smem()
                store(ds_smem.at[slot], ds_gmem, item, i)

        plgpu.wait_smem_to_gmem(0)
