"""Sums attention's probabilities over heads for every query and key: the target of the dense warm-up (Eq. 3).

  sums[t,s] = Σ_n exp(scale · q[t,n] · k[s,n] − lse[t,n])

A tile of 128 queries × 256 keys is held in registers while all heads go by: each brings new queries and new keys, used
once, so that bytes are what limits it. Two thread blocks therefore form a cluster, with other queries and the same
keys: each copies half of the keys and the copy reaches both (multicast), 32 bytes a clock and multiprocessor at the
full rate of the tensor cores instead of 48. Warpgroups of a block:

  0, 1   64 queries each, against the 256 keys in two pieces of 128: logits, exponentials, sums
  2      copies

The exponentials of one compute warpgroup (512 clocks a piece at 16 a clock) run under the products of the other (768
clocks): they issue the products of a piece in turn. Nothing is masked before the end, since no sum involves two keys:
what is out of a query's range, be it NaN, is replaced by 0 where the tile is stored.

Tiles that any query reaches are listed first, in an order in which those worked on together cover a square, so that
L2 serves their heads; of n clusters, number i takes tiles i, i + n, …. At last they fill unreached tiles with zeros.

Measured on an H200 at N 128, H 192, causal, T and S 32768: 50.0 ms, 528 TFLOP/s of the (query, key) pairs in range.
Alternatives were slower in the same run:

  the turn goes on when 2, 1 or 0 of the 3 products of a piece are left to finish   52.2, 51.3, 54.6 ms
  no turns                                                                          53.4 ms

With 1 left, 4 or 16 tiles side by side instead of 8 took 51.0 and 51.7 ms, and a chunk of 2048 queries had 547 TFLOP/s
at the end of S 32768, 548 at the end of S 131072.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import LOG2E, ROW_LAYOUT, SWIZZLED_COLUMNS, WGMMA_ROWS

CLUSTER = 2  # thread blocks that share keys
WARPGROUP_QUERIES = WGMMA_ROWS
BLOCK_QUERIES = 2 * WARPGROUP_QUERIES  # of a thread block, a half for each compute warpgroup
TILE_QUERIES = CLUSTER * BLOCK_QUERIES
PIECE_KEYS = 128  # of one product
PIECES = 2  # of a tile
TILE_KEYS = PIECES * PIECE_KEYS
DIMS = (64, 128, 192)  # H
Q_STAGES = 2  # heads whose queries are in shared memory
# Pieces of 128 keys × 64 columns in shared memory, 16 KiB each: as many as fit beside H 192. For every H, since with a
# number that is no power of two the copying warpgroup may run out of registers.
KEY_SLOTS = 8
WIDTH_TILES = 8  # along the queries, that are worked on side by side
UNREACHED = 1 << 30  # marks the tiles of the list that only get zeros
# The sums of 64 × 256 take 128 registers of a thread, the logits of 64 × 128 take 64.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


def smem_bytes(dim: int) -> int:
    """Counts the bytes of shared memory of a thread block, barriers aside: two heads' queries and lse; keys."""
    lse = ptx.allocated(Q_STAGES * BLOCK_QUERIES * 4)
    return Q_STAGES * BLOCK_QUERIES * dim * 2 + lse + KEY_SLOTS * PIECE_KEYS * SWIZZLED_COLUMNS * 2


def why_not(q, k, lse, start, stop) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    if q.ndim != 4 or k.ndim != 4:
        return f"q must be [B, T, N, H] and k [B, S, N, H], got {q.shape} and {k.shape}"
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        return f"q and k must be bfloat16, got {q.dtype} and {k.dtype}"
    batch, length, heads, dim = q.shape
    if dim not in DIMS:
        return f"H must be one of {DIMS}, got {dim}"
    if k.shape[0] != batch or k.shape[2:] != (heads, dim):
        return f"k must be [{batch}, S, {heads}, {dim}] like q {q.shape}, got {k.shape}"
    size = k.shape[1]
    if not all((batch, length, heads, size)):
        return f"q and k must not be empty, got {q.shape} and {k.shape}"
    for name, array, shape, dtype in (
        ("lse", lse, (batch, length, heads), jnp.float32),
        ("start", start, (batch, length), jnp.int32),
        ("stop", stop, (batch, length), jnp.int32),
    ):
        if array.shape != shape or array.dtype != dtype:
            return f"{name} must be {jnp.dtype(dtype).name} {shape}, got {array.dtype} {array.shape}"
    # int32 counts the values of lse, the rows of keys, the columns of a row, the bytes of a row of sums.
    if max(batch * (length + TILE_QUERIES) * heads, batch * (size + TILE_KEYS), heads * dim, 4 * size) >= 2**31:
        return f"B·T·N, B·S, N·H and 4·S must be below 2^31, got {q.shape} and S {size}"
    if batch * math.ceil(length / TILE_QUERIES) * math.ceil(size / TILE_KEYS) >= UNREACHED // 16:
        return f"B·T·S must be below 2^42, got {q.shape} and S {size}"
    return None


def make_order(low, count, *, size: int):
    """Lists the tiles: int32 [tiles], those to be computed first, the others with `UNREACHED` added.

    A tile's number counts `WIDTH_TILES` tiles along the queries of all batch rows, then the keys, then the next
    `WIDTH_TILES` tiles along the queries.

    Args:
      low: int32 [B, T], the first key of each query.
      count: int32 [B, T], the number of its keys.
      size: S.
    """
    blocks = math.ceil(size / TILE_KEYS)  # of keys
    pad = ((0, 0), (0, -low.shape[1] % TILE_QUERIES))
    first = jnp.where(count > 0, low // TILE_KEYS, blocks)
    end = jnp.where(count > 0, (low + count + (TILE_KEYS - 1)) // TILE_KEYS, 0)
    first = jnp.pad(first, pad, constant_values=blocks).reshape(-1, TILE_QUERIES).min(axis=1)
    end = jnp.pad(end, pad).reshape(-1, TILE_QUERIES).max(axis=1)
    rows = first.shape[0]
    first, end = (jnp.pad(x, (0, -rows % WIDTH_TILES)).reshape(-1, 1, WIDTH_TILES) for x in (first, end))
    block = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    number = jnp.arange(first.size * blocks, dtype=jnp.int32).reshape(-1, blocks, WIDTH_TILES)
    there = lax.div(number, WIDTH_TILES * blocks) * WIDTH_TILES + lax.rem(number, WIDTH_TILES) < rows
    # A sort puts tiles in their order, those that nobody reaches behind all others, and those that are not there last.
    number = jnp.where((first <= block) & (block < end), number, number + UNREACHED)
    number = jnp.where(there, number, jnp.iinfo(jnp.int32).max)
    return lax.sort(number.reshape(-1), is_stable=False)[: rows * blocks]


def dense_target(q, k, lse, start, stop, *, scale: float, clusters: int | None = None, interpret: bool = False):
    """Sums probabilities over heads, Σ_n exp(scale · q[t,n] · k[s,n] − lse[t,n]); 0 out of [start, stop).

    Args:
      q: [B, T, N, H] bfloat16; H 64, 128 or 192.
      k: [B, S, N, H] bfloat16.
      lse: float32 [B, T, N]; -inf stands for no keys and gives zeros.
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys; the range may be empty, reversed, or exceed S.
      scale: of the logits.
      clusters: how many pairs of thread blocks share the work, None for one on every two multiprocessors; no result
        depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      float32 [B, T, S], not normalised.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(q, k, lse, start, stop)
    if reason is not None:
        raise ValueError(f"dense_target: {reason}")
    batch, length, heads, dim = q.shape
    size = k.shape[1]
    low = jnp.clip(start, 0, size)
    count = jnp.maximum(jnp.minimum(stop, size) - low, 0)
    # Ready for exp2: a row without keys has an exponent of -inf. A head's values are contiguous for whole tiles.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    lse = jnp.pad(lse, ((0, 0), (0, -length % TILE_QUERIES), (0, 0))).transpose(2, 0, 1)
    q, k = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k))  # copies count in eights
    clusters = clusters or (2 if interpret else ptx.multiprocessors() // CLUSTER)
    kernel = _kernel(batch, length, size, heads, dim, float(scale), clusters, interpret)
    sums = kernel(
        q.reshape(-1, heads * dim),
        k.reshape(-1, heads * dim),
        lse.reshape(-1),
        low.reshape(-1),
        count.reshape(-1),
        make_order(low, count, size=size),
    )
    return sums.reshape(batch, length, size)


@functools.cache
def _kernel(batch, length, size, heads, dim, scale, clusters: int, interpret: bool):
    """Makes the kernel for one shape: (q, k, lse, low, count, order) -> float32 [B · T, S]."""
    swizzled = ptx.swizzled(jnp.bfloat16)
    scratch = dict(
        q_smem=plgpu.SMEM((Q_STAGES, BLOCK_QUERIES, dim), jnp.bfloat16, transforms=swizzled),
        k_smem=plgpu.SMEM((KEY_SLOTS, PIECE_KEYS, SWIZZLED_COLUMNS), jnp.bfloat16, transforms=swizzled),
        lse_smem=plgpu.SMEM((Q_STAGES, BLOCK_QUERIES), jnp.float32),
        # A head's queries and lse have landed. An arrival of each copy; both compute warpgroups wait.
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=Q_STAGES),
        # They may be replaced. An arrival of both compute warpgroups, at first and when done with a head; the copying
        # one waits.
        q_empty=plgpu.Barrier(num_arrivals=2, num_barriers=Q_STAGES),
        # Both halves of 128 keys × 64 columns have landed here, one of them copied by the other block. Both compute
        # warpgroups wait.
        k_full=plgpu.Barrier(num_barriers=KEY_SLOTS),
        # A slot may be refilled in both blocks, since a copy writes to both. An arrival of the compute warpgroups of
        # both, at first and when done with a slot; the copying one waits.
        k_empty=plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=2, num_barriers=KEY_SLOTS),
        # It is the turn of compute warpgroup i at the tensor cores. One arrival, of the other; it waits.
        turn=plgpu.Barrier(num_barriers=2),
    )

    def body(q_gmem, k_gmem, lse_gmem, low_gmem, count_gmem, order_gmem, out_gmem, *refs):
        _block(
            q_gmem, k_gmem, lse_gmem, low_gmem, count_gmem, order_gmem, out_gmem,
            **dict(zip(scratch, refs, strict=True)),
            length=length, heads=heads, dim=dim, batch=batch, scale=scale, clusters=clusters,
            interpret=interpret,
        )  # fmt: skip

    return ptx.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * length, size), jnp.float32),
        scratch_types=tuple(scratch.values()),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=ptx.compiler_params(approx_math=True),
    )


def _block(
    q_gmem,  # [B · T in eights, N · H] bfloat16
    k_gmem,  # [B · S in eights, N · H] bfloat16
    lse_gmem,  # [N · B · T in tiles] float32, times log2 e
    low_gmem,  # [B · T] int32
    count_gmem,  # [B · T] int32
    order_gmem,  # [tiles] int32
    out_gmem,  # [B · T, S] float32
    *,
    q_smem,  # [2, 128, H], 96 KiB for H 192
    k_smem,  # [8, 128, 64], 128 KiB
    lse_smem,  # [2, 128]
    q_full,
    q_empty,
    k_full,
    k_empty,
    turn,
    length: int,
    heads: int,
    dim: int,
    batch: int,
    scale: float,
    clusters: int,
    interpret: bool,
):
    """Runs one thread block of a cluster: two warpgroups that compute in turns, one that copies for both blocks."""
    tiles, size = order_gmem.shape[0], out_gmem.shape[1]
    blocks = math.ceil(size / TILE_KEYS)
    tiles_of_row = math.ceil(length / TILE_QUERIES)
    columns = dim // SWIZZLED_COLUMNS
    cluster, block, warpgroup = (lax.axis_index(name) for name in ("cluster", "block", "warpgroup"))
    items = lax.div(tiles - 1 - cluster + clusters, clusters)  # of this cluster

    def place(item):
        """Gives batch row, first query and first key of a tile for this block, and its number of heads: all or none.

        Tiles to be computed come first, so that an item of this cluster has all heads of the items before it behind it.
        """
        number = order_gmem[cluster + item * clusters]
        reached = number < UNREACHED
        number = jnp.where(reached, number, number - UNREACHED)
        along_queries = lax.div(number, WIDTH_TILES * blocks) * WIDTH_TILES + lax.rem(number, WIDTH_TILES)
        batch_row = lax.div(along_queries, tiles_of_row)
        query = (along_queries - batch_row * tiles_of_row) * TILE_QUERIES + block * BLOCK_QUERIES
        key = lax.rem(lax.div(number, WIDTH_TILES), blocks) * TILE_KEYS
        return batch_row, query, key, jnp.where(reached, heads, 0)

    def slot_of(step, piece, column):
        """Gives the slot of a piece of 128 keys × 64 columns of the `step`-th head of this cluster."""
        return lax.rem((step * PIECES + piece) * columns + column, KEY_SLOTS)

    def for_each_empty(call):
        """Calls `call` with each barrier that says that memory may be refilled."""
        for barriers, count in ((q_empty, Q_STAGES), (k_empty, KEY_SLOTS)):
            for i in range(count):
                call(barriers.at[i])

    @pl.when(warpgroup == 2)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.loop(0, items)
        def _(item):
            batch_row, query, key, heads_here = place(item)
            # Rows past those of this batch row are another's or, past the end, zeros: such sums are not stored.
            q_rows = pl.ds(batch_row * (q_gmem.shape[0] // batch) + query, BLOCK_QUERIES)
            k_row = batch_row * (k_gmem.shape[0] // batch) + key
            lse_row = batch_row * (tiles_of_row * TILE_QUERIES) + query

            @pl.loop(0, heads_here)
            def _(head):
                step = item * heads + head
                stage = lax.rem(step, Q_STAGES)
                plgpu.barrier_wait(q_empty.at[stage])
                plgpu.copy_gmem_to_smem(q_gmem.at[q_rows, pl.ds(head * dim, dim)], q_smem.at[stage], q_full.at[stage])
                lse_rows = pl.ds(head * (lse_gmem.shape[0] // heads) + lse_row, BLOCK_QUERIES)
                plgpu.copy_gmem_to_smem(lse_gmem.at[lse_rows], lse_smem.at[stage], q_full.at[stage])
                for piece in range(PIECES):
                    for column in range(columns):
                        slot = slot_of(step, piece, column)
                        plgpu.barrier_wait(k_empty.at[slot])
                        plgpu.copy_gmem_to_smem(
                            k_gmem.at[
                                pl.ds(k_row + piece * PIECE_KEYS, PIECE_KEYS),
                                pl.ds(head * dim + column * SWIZZLED_COLUMNS, SWIZZLED_COLUMNS),
                            ],
                            k_smem.at[slot],
                            k_full.at[slot],
                            collective_axes=None if interpret else "block",  # the interpreter copies all for each
                        )

        # Until all have arrived, the other block's warpgroups included: then nothing reaches for this block any more.
        for_each_empty(plgpu.barrier_wait)

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for_each_empty(plgpu.barrier_arrive)
        mine = pl.ds(warpgroup * WARPGROUP_QUERIES, WARPGROUP_QUERIES)
        over = functools.partial(lax.broadcast_in_dim, shape=(WARPGROUP_QUERIES, PIECE_KEYS), broadcast_dimensions=[0])

        def give_turn():
            """Passes the turn at the tensor cores to the other compute warpgroup."""
            plgpu.barrier_arrive(turn.at[1 - warpgroup])

        def products(step, piece):
            """Computes Q · K of a piece, [64 queries, 128 keys], in this warpgroup's turn."""
            plgpu.barrier_wait(turn.at[warpgroup])

            def multiply(accumulator):
                for column in range(columns):
                    slot = slot_of(step, piece, column)
                    plgpu.barrier_wait(k_full.at[slot])
                    queries = q_smem.at[
                        lax.rem(step, Q_STAGES), mine, pl.ds(column * SWIZZLED_COLUMNS, SWIZZLED_COLUMNS)
                    ]
                    plgpu.wgmma(accumulator, queries, k_smem.at[slot].transpose((1, 0)))
                give_turn()  # all are issued: the other's products queue up behind them
                return accumulator[...]

            logits = pl.run_scoped(multiply, ptx.ACC((WARPGROUP_QUERIES, PIECE_KEYS), jnp.float32))
            for column in range(columns):
                plgpu.barrier_arrive(k_empty.at[slot_of(step, piece, column)])
            return logits

        def add_piece(total, logits, lse):
            """Adds a head's probabilities of a piece; exp2, with scale and lse in powers of two."""
            return total + jnp.exp2(logits * (scale * LOG2E) - over(lse))

        pl.when(warpgroup == 1)(give_turn)

        @pl.loop(0, items)
        def _(item):
            batch_row, query, key, heads_here = place(item)

            def add_head(head, sums):
                """Adds one head's probabilities of both pieces to the sums."""
                step = item * heads + head
                stage = lax.rem(step, Q_STAGES)
                plgpu.barrier_wait(q_full.at[stage])
                lse = plgpu.load(lse_smem.at[stage, mine], layout=ROW_LAYOUT, optimized=False)
                total = []
                for piece in range(PIECES):
                    logits = products(step, piece)
                    if piece == PIECES - 1:
                        plgpu.barrier_arrive(q_empty.at[stage])
                    # The compiler cannot know that the condition holds. Without a branch ptxas delays half of the
                    # exponentials until the next turn has come, and then the tensor cores wait for them.
                    total.append(lax.cond(key >= 0, add_piece, lambda total, *_: total, sums[piece], logits, lse))
                return tuple(total)

            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES, PIECE_KEYS), jnp.float32), plgpu.Layout.WGMMA)
            sums = lax.fori_loop(0, heads_here, add_head, (zeros,) * PIECES)
            query = query + warpgroup * WARPGROUP_QUERIES
            for piece in range(PIECES):
                _store(
                    sums[piece], low_gmem, count_gmem, out_gmem,
                    batch_row * length + query, length - query, key + piece * PIECE_KEYS, interpret,
                )  # fmt: skip

        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))  # the turn that nobody took


def _store(sums, low_gmem, count_gmem, out_gmem, row, left, key, interpret):
    """Stores `sums` [64, 128] in wgmma's layout from row `row` and column `key` on, zeros out of the rows' ranges.

    Only the first `left` rows are there; columns past the end are not.
    """
    if interpret:
        _interpreted_store(sums, low_gmem, count_gmem, out_gmem, row, left, key)
        return
    size = out_gmem.shape[1]
    gmem = plgpu.RefType()

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, gmem, gmem, gmem, ptx.SPLAT, ptx.SPLAT, ptx.SPLAT))
    def store(ctx, sums, low, count, out, row, left, key):
        # A thread has rows r and r + 8 of its warp's 16, and in each 2 neighbouring columns in every 8.
        registers = sums.registers.reshape(PIECE_KEYS // 8, 2)
        thread = ptx.thread_of_warpgroup()
        first = ptx.accumulator_row(thread)
        column = arith.addi(ptx.scalar(key), arith.shli(arith.andi(thread, ptx.i32(3)), ptx.i32(1)))
        zero = arith.constant(ir.F32Type.get(), 0.0)
        for half in range(2):
            tile_row = arith.addi(first, ptx.i32(8 * half))
            there = arith.cmpi(arith.CmpIPredicate.slt, tile_row, ptx.scalar(left))
            at = arith.select(there, arith.addi(ptx.scalar(row), tile_row), ptx.i32(0))
            at = arith.extui(ptx.i64_type(), at)
            begin, reach = (
                ptx.ptx(
                    "ld.global.nc.b32 $0, [$1];",
                    arith.addi(ptx.gmem_address(ref), arith.shli(at, ptx.i64(2))),
                    result_types=ptx.i32_type(),
                )
                for ref in (low, count)
            )
            address = arith.addi(ptx.gmem_address(out), arith.muli(at, ptx.i64(4 * size)))
            address = arith.addi(address, arith.shli(arith.extui(ptx.i64_type(), column), ptx.i64(2)))
            for group in range(PIECE_KEYS // 8):
                values, inside = [], []
                for i in range(2):
                    position = arith.addi(column, ptx.i32(8 * group + i))
                    # Unsigned: a key before the first wraps around to a large number.
                    reached = arith.cmpi(arith.CmpIPredicate.ult, arith.subi(position, begin), reach)
                    value = llvm.extractelement(registers[group, half], ptx.i32(i))
                    values.append(arith.select(reached, value, zero))
                    inside.append(arith.andi(there, arith.cmpi(arith.CmpIPredicate.slt, position, ptx.i32(size))))
                to = 32 * group
                if size % 2 == 0:  # 8-byte aligned, and both are inside or neither
                    ptx.ptx(f"@$3 st.global.v2.f32 [$0+{to}], {{$1, $2}};", address, *values, inside[0])
                else:
                    for i in range(2):
                        ptx.ptx(f"@$2 st.global.f32 [$0+{to + 4 * i}], $1;", address, values[i], inside[i])

    store(sums, low_gmem, count_gmem, out_gmem, row, left, key)


def _interpreted_store(sums, low_gmem, count_gmem, out_gmem, first_row, left, key):
    """Stores as `_store` does, in the interpreter."""
    size = out_gmem.shape[1]

    @pl.loop(0, jnp.clip(left, 0, WARPGROUP_QUERIES))
    def _(i):
        row = first_row + i
        position = key + lax.iota(jnp.int32, PIECE_KEYS)
        reached = (position >= low_gmem[row]) & (position < low_gmem[row] + count_gmem[row])
        values = jnp.where(reached, lax.dynamic_index_in_dim(sums, i, keepdims=False), 0.0)
        for width in {min(PIECE_KEYS, size), size % PIECE_KEYS} - {0}:  # of a whole piece and of the last one

            @pl.when(jnp.minimum(size - key, PIECE_KEYS) == width)
            def _(width=width):
                out_gmem[row, pl.ds(key, width)] = values[:width]
