"""Computes dense multi-head attention forward over ranges of keys, bfloat16: every head has its own keys and values.

A persistent grid, one block on each multiprocessor. An item is a batch row, a head and 128 queries; three warpgroups
work on it:

  warpgroup 0, 1   64 queries each: logits, softmax, and `out` in registers
  warpgroup 2      brings keys and values by TMA, blocks of 128, two in flight of each

A compute warpgroup starts the logits of the next key block and the values of this one together, and does the softmax of
the next while the values are still being multiplied; the other warpgroup fills what gaps are left. The probabilities
stay in registers, where wgmma takes its left operand from. Key blocks that lie in the ranges of all 128 queries are not
masked. The accumulator is rescaled only when a maximum has grown by more than `RESCALE_LOG2`.

As many heads as have their keys and values fit into the L2 cache form a group, whose items all blocks work on at a
time, the longest first; the next group is dealt to the blocks from elsewhere on, so that the shares even out.

Measured on an H200 at N 128, H 192, V 128, in TFLOP/s of the (query, key) pairs in range, where JAX's `attention_mgpu`
has 627 (causal alone, H and V 128, S 32768) and a bfloat16 matmul 789 [696 sustained under its 700 W]:

  causal, S 32768            672   65.5 ms; 67.4 with the compute warpgroups in turns, 65.6 with 240 registers for them
  causal, S 8192             622
  packed documents, S 32768  545   of 1500 keys on average: more of the blocks are at an end, where half is masked

More in flight fits nowhere: a third block of keys and values takes 80 KiB more of shared memory than the 17 left, and
the logits of one more key block 64 registers of a thread's 232, of which 160 are taken, as are those of the addresses.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    LOG2E,
    MAXIMUM_FLOOR,
    RESCALE_LOG2,
    ROW_LAYOUT,
    SMEM_GRANULE_BYTES,
    WGMMA_ROWS,
)

WARPGROUP_QUERIES = WGMMA_ROWS
BLOCK_QUERIES = 2 * WARPGROUP_QUERIES  # of an item, a half for each compute warpgroup
BLOCK_KEYS = 128  # of a product and of a stage; not the 64 of the kernels that gather
STAGES = 2  # blocks of keys, and of values, in shared memory
DIMS = (192, 128, 64)  # H
VALUE_DIMS = (128, 64)  # V
# Of `out`, 64 × 128, a thread holds 64, of the logits of the next key block 64, of the probabilities of this one 32.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)
L2_BYTES = 32 * 2**20  # of keys and values that are worked on at a time: an H100 has 50 MB of L2
# By this fraction of the blocks the dealing of one group of heads is turned from the last one's: the golden ratio,
# whose multiples are spread evenly however many there are.
TURN_FRACTION = 0.618


def smem_bytes(dim: int, value_dim: int) -> int:
    """Counts the bytes of shared memory of one block: 210 KiB for H 192 and V 128."""
    q = BLOCK_QUERIES * dim * 2  # and `out` at the end of an item
    stages = STAGES * BLOCK_KEYS * (dim + value_dim) * 2
    return q + stages + 2 * SMEM_GRANULE_BYTES  # `lse`, and the barriers


def why_not(q, k, v, start, stop) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    if not q.ndim == k.ndim == v.ndim == 4:
        return f"q, k and v must be [B, T, N, H], [B, S, N, H] and [B, S, N, V], got {q.shape}, {k.shape} and {v.shape}"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v must be bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}"
    batch, length, heads, dim = q.shape
    size, value_dim = k.shape[1], v.shape[3]
    if dim not in DIMS or value_dim not in VALUE_DIMS or value_dim > dim:
        return f"H must be one of {DIMS} and V one of {VALUE_DIMS} and at most H, got {dim} and {value_dim}"
    for name, array, shape in (("k", k, (batch, size, heads, dim)), ("v", v, (batch, size, heads, value_dim))):
        if array.shape != shape:
            return f"{name} must be {shape} like q {q.shape}, got {array.shape}"
    for name, array in (("start", start), ("stop", stop)):
        if array.shape != (batch, length) or array.dtype != jnp.int32:
            return f"{name} must be int32 {(batch, length)}, got {array.dtype} {array.shape}"
    if not q.size or not k.size:
        return f"q and k must not be empty, got {q.shape} and {k.shape}"
    if batch * heads * max(length, size) >= 2**31 - 2**16:  # coordinates of copies, and items, are int32
        return f"B·N·T and B·N·S must be below 2^31 - 2^16, got {q.shape} and S {size}"
    return None


def multihead_attention(q, k, v, start, stop, *, scale: float, blocks: int | None = None, interpret: bool = False):
    """Attends from each query to the keys of its range: softmax(scale · q·k) · v, and the log of its denominator.

    Args:
      q: [B, T, N, H] bfloat16, H 192, 128 or 64.
      k: [B, S, N, H] bfloat16.
      v: [B, S, N, V] bfloat16, V 128 or 64, at most H.
      start: int32 [B, T], the first key of each query.
      stop: int32 [B, T], the end of its keys; the range may be empty, reversed, or exceed [0, S).
      scale: of the logits.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      out [B, T, N, V] bfloat16 and lse [B, T, N] float32; 0 and -inf for a query without keys.

    Raises:
      ValueError: if `why_not` has a reason.

    Of a block of 128 queries, the blocks of keys before the first and after the last that it reaches are not read.
    """
    reason = why_not(q, k, v, start, stop)
    if reason is not None:
        raise ValueError(f"multihead_attention: {reason}")
    batch, length, heads, dim = q.shape
    size = k.shape[1]
    blocks = blocks or (2 if interpret else ptx.multiprocessors())
    plan, low, high = make_plan(start, stop, size=size)
    q, k, v = (_pad_rows(x, interpret) for x in (q, k, v))
    kernel = _kernel(q.shape, k.shape, v.shape, float(scale), blocks, interpret)
    out, lse = kernel(q, k, v, plan, low, high)
    lse = lse.reshape(batch, heads, -1)[:, :, :length].transpose(0, 2, 1)
    return out[:, :length], lse


def _pad_rows(x, interpret):
    """Pads to whole tiles of 8 rows, and at least one block: TMA supplies the rest. The interpreter wants all of it."""
    length = x.shape[1]
    rows = max(BLOCK_KEYS, pl.cdiv(length, 8) * 8)
    if interpret:
        rows = pl.cdiv(rows, BLOCK_KEYS) * BLOCK_KEYS
    return x if rows == length else jnp.pad(x, ((0, 0), (0, rows - length), (0, 0), (0, 0)))


def make_plan(start, stop, *, size: int):
    """Plans the work of all blocks of queries, those of a batch row with the most work first.

    Returns:
      plan: int32 [B · T/128, 5]: the block of queries, and of its key blocks the first, the first and the last that
        need no mask (exclusive, as the next), and the last. There is always one, and the first is always masked.
      low, high: int32 [B, T] padded to whole blocks, the ranges within [0, S]; (0, 0) for empty ones.
    """
    batch, length = start.shape
    padded = pl.cdiv(length, BLOCK_QUERIES) * BLOCK_QUERIES
    low, high = jnp.maximum(start, 0), jnp.minimum(stop, size)
    has_keys = low < high
    low, high = jnp.where(has_keys, low, 0), jnp.where(has_keys, high, 0)
    there = jnp.arange(padded) < length  # queries past the end hold no one up
    has_keys, low, high = (jnp.pad(x, ((0, 0), (0, padded - length))) for x in (has_keys, low, high))

    def of_blocks(reduce, values, neutral, where):
        """Reduces the values of each block of queries, those outside of `where` left out."""
        values = jnp.where(where, values, neutral)
        return reduce(values.reshape(batch, -1, BLOCK_QUERIES), axis=2)

    first = of_blocks(jnp.min, low, size, has_keys) // BLOCK_KEYS
    last = pl.cdiv(of_blocks(jnp.max, high, 0, has_keys), BLOCK_KEYS)
    first = jnp.where(last > 0, first, 0)
    last = jnp.maximum(last, first + 1)  # the kernel's pipeline wants at least one block of keys
    # From here to there every query reaches every key.
    inner_first = pl.cdiv(of_blocks(jnp.max, low, 0, there), BLOCK_KEYS)
    inner_last = of_blocks(jnp.min, high, size, there) // BLOCK_KEYS
    inner_first = jnp.clip(inner_first, first + 1, last)
    inner_last = jnp.clip(inner_last, inner_first, last)
    order = jnp.argsort(first - last, axis=1)
    plan = jnp.stack([jnp.broadcast_to(jnp.arange(first.shape[1]), first.shape), first, inner_first, inner_last, last])
    plan = jnp.take_along_axis(plan, order[None], axis=2)
    return plan.reshape(5, -1).T.astype(jnp.int32), low, high


class Deal(NamedTuple):
    """Deals the items to the thread blocks: one group of heads after the other, in `rounds` rounds each.

    In every other round the blocks take their items in reverse.
    """

    query_blocks: int  # of a batch row
    heads: int  # of all batch rows
    group: int  # heads that are worked on at a time
    rounds: int  # of a group: items that a thread block has of it, at most
    blocks: int  # thread blocks

    @classmethod
    def of(cls, query_blocks: int, heads: int, head_bytes: int, blocks: int) -> "Deal":
        """Forms groups of about equal size, whose keys and values fit into `L2_BYTES`."""
        group = max(1, min(heads, L2_BYTES // head_bytes))
        group = pl.cdiv(heads, pl.cdiv(heads, group))
        return cls(query_blocks, heads, group, pl.cdiv(group * query_blocks, blocks), blocks)

    @property
    def all_rounds(self) -> int:
        """Counts the rounds of all groups."""
        return pl.cdiv(self.heads, self.group) * self.rounds

    def item(self, i, block):
        """Deals a thread block the item of its round i: head, rank of the queries, and whether there is one."""
        div, rem = lax.div, lax.rem
        group, i = div(i, self.rounds), rem(i, self.rounds)
        turned = rem(block + group * int(TURN_FRACTION * self.blocks), self.blocks)
        slot = i * self.blocks + jnp.where(rem(i, 2) == 0, turned, self.blocks - 1 - turned)
        first = group * self.group
        heads = jnp.minimum(self.group, self.heads - first)
        return first + rem(slot, heads), div(slot, heads), slot < heads * self.query_blocks


@functools.cache
def _kernel(q_shape, k_shape, v_shape, scale, blocks: int, interpret: bool):
    """Makes the kernel for (q, k, v, plan, low, high): out [B, T, N, V] and lse [B · N, T in whole blocks]."""
    batch, length, heads, dim = q_shape
    value_dim = v_shape[3]
    query_blocks = pl.cdiv(length, BLOCK_QUERIES)
    blocks = min(blocks, batch * heads * query_blocks)
    deal = Deal.of(query_blocks, batch * heads, k_shape[1] * (dim + value_dim) * 2, blocks)
    swizzled = ptx.swizzled(jnp.bfloat16)
    return ptx.persistent_kernel(
        functools.partial(_block, deal=deal, scale=scale, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct((*q_shape[:3], value_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch * heads, query_blocks * BLOCK_QUERIES), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=plgpu.SMEM((2, WARPGROUP_QUERIES, dim), jnp.bfloat16, transforms=swizzled),
            k_smem=plgpu.SMEM((STAGES, BLOCK_KEYS, dim), jnp.bfloat16, transforms=swizzled),
            v_smem=plgpu.SMEM((STAGES, BLOCK_KEYS, value_dim), jnp.bfloat16, transforms=swizzled),
            lse_smem=plgpu.SMEM((2, WARPGROUP_QUERIES), jnp.float32),
            # A compute warpgroup's queries have landed. One arrival, of the copy that it has started itself; it waits.
            q_barriers=plgpu.Barrier(num_barriers=2),
            # A stage has landed. One arrival, of its copy; both compute warpgroups wait.
            k_barriers=plgpu.Barrier(num_barriers=STAGES),
            v_barriers=plgpu.Barrier(num_barriers=STAGES),
            # A stage may be refilled. An arrival of each compute warpgroup, at first and when it is done with it; the
            # copying one waits.
            k_free_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            v_free_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        blocks=blocks,
        interpret=interpret,
        approx_math=True,
    )


def _block(
    q_gmem,  # [B, T, N, H] bfloat16
    k_gmem,  # [B, S, N, H] bfloat16
    v_gmem,  # [B, S, N, V] bfloat16
    plan_gmem,  # [B · T/128, 5] int32
    low_gmem,  # [B, T] int32, in whole blocks
    high_gmem,  # [B, T] int32
    out_gmem,  # [B, T, N, V] bfloat16
    lse_gmem,  # [B · N, T] float32
    *,
    q_smem,  # [2, 64, H], 48 KiB for H 192, a half for each compute warpgroup, and `out` at the end of an item
    k_smem,  # [2, 128, H], 96 KiB for H 192
    v_smem,  # [2, 128, V], 64 KiB for V 128
    lse_smem,  # [2, 64]
    q_barriers,
    k_barriers,
    v_barriers,
    k_free_barriers,
    v_free_barriers,
    deal: Deal,
    scale: float,
    interpret: bool,
):
    """Runs one thread block: two warpgroups that attend, one that copies keys and values ahead of them."""
    heads, value_dim = q_gmem.shape[2], v_gmem.shape[3]
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    # A positive scale is folded into the exponents; any other is applied before the maximum is taken.
    logit_scale, exponent_scale = (None, scale * LOG2E) if scale > 0 else (scale * LOG2E, 1.0)

    def for_each_item(work):
        """Calls `work(batch, head, plan, step)` for every item of this block; `step` counts its key blocks so far."""

        def visit(i, step):
            row, rank, has_item = deal.item(i, block)

            def item(step):
                batch = lax.div(row, heads)
                at = batch * deal.query_blocks + rank
                plan = [plan_gmem[at, j] for j in range(5)]
                work(batch, lax.rem(row, heads), plan, step)
                return step + plan[4] - plan[1]

            return lax.cond(has_item, item, lambda step: step, step)

        return lax.fori_loop(0, deal.all_rounds, visit, jnp.int32(0))

    def free_barriers():
        """Lists the barriers of all stages that say that they may be refilled."""
        return [barriers.at[i] for barriers in (k_free_barriers, v_free_barriers) for i in range(STAGES)]

    @pl.when(warpgroup == 2)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def copy(batch, head, plan, step):
            """Copies an item's keys and values, in the order in which they are used."""
            _, first, _, _, last = plan

            def stage_of(key_block):
                """Gives the stage of a block of keys, and its place among the keys."""
                return lax.rem(step + key_block - first, STAGES), pl.ds(key_block * BLOCK_KEYS, BLOCK_KEYS)

            def copy_keys(key_block):
                stage, keys = stage_of(key_block)
                plgpu.barrier_wait(k_free_barriers.at[stage])
                plgpu.copy_gmem_to_smem(k_gmem.at[batch, keys, head], k_smem.at[stage], k_barriers.at[stage])

            def copy_values(key_block):
                stage, keys = stage_of(key_block)
                plgpu.barrier_wait(v_free_barriers.at[stage])
                plgpu.copy_gmem_to_smem(v_gmem.at[batch, keys, head], v_smem.at[stage], v_barriers.at[stage])

            copy_keys(first)

            # The keys of a block are needed a step before its values.
            @pl.loop(first + 1, last)
            def _(key_block):
                copy_keys(key_block)
                copy_values(key_block - 1)

            copy_values(last - 1)

        for_each_item(copy)
        for barrier in free_barriers():  # every phase is waited for, as the interpreter demands
            plgpu.barrier_wait(barrier)

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for barrier in free_barriers():
            plgpu.barrier_arrive(barrier)

        def over(row_values, columns):
            """Repeats one value a query along `columns` columns."""
            return lax.broadcast_in_dim(row_values, (WARPGROUP_QUERIES, columns), [0])

        def masked(s, key_block, low, high):
            """Puts -inf where a key of the block is outside of a query's range."""
            if interpret:
                key = lax.broadcasted_iota(jnp.int32, s.shape, 1)
            else:
                key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            low, high = low - key_block * BLOCK_KEYS, high - key_block * BLOCK_KEYS
            return jnp.where((key >= over(low, BLOCK_KEYS)) & (key < over(high, BLOCK_KEYS)), s, -jnp.inf)

        def softmax(s, maximum, mask):
            """Computes unnormalised probabilities, their maximum, and the factor for sums under the last maximum."""
            s = mask(s if logit_scale is None else s * logit_scale)
            block_max = s.max(axis=1) * exponent_scale
            new_max = jnp.where(block_max > maximum + RESCALE_LOG2, block_max, maximum)
            p = jnp.exp2(s * exponent_scale - over(new_max, BLOCK_KEYS))
            return p, new_max, jnp.exp2(maximum - new_max)

        def rescaled(accumulator, factor):
            """Multiplies by the factor, unless a vote of the warp says that it is 1 for all of its rows."""
            return lax.cond(
                ptx.any_factor_not_one(factor, interpret),
                lambda x: x * over(factor, value_dim),
                lambda x: x,
                accumulator,
            )

        def attend(batch, head, plan, step):
            """Attends for one item's 64 queries of this warpgroup."""
            query_block, first, inner_first, inner_last, last = plan
            rows = pl.ds(query_block * BLOCK_QUERIES + warpgroup * WARPGROUP_QUERIES, WARPGROUP_QUERIES)
            plgpu.copy_gmem_to_smem(q_gmem.at[batch, rows, head], q_smem.at[warpgroup], q_barriers.at[warpgroup])
            low, high = (
                plgpu.load(ref.at[batch, rows], layout=ROW_LAYOUT, optimized=False) for ref in (low_gmem, high_gmem)
            )

            def stage_of(key_block):
                return lax.rem(step + key_block - first, STAGES)

            def await_keys(key_block):
                """Waits for the keys of a block, if there is such a block."""
                pl.when(key_block < last)(lambda: plgpu.barrier_wait(k_barriers.at[stage_of(key_block)]))

            def start_logits(s_ref, key_block):
                """Starts Q · K of a block."""
                stage = stage_of(key_block)
                q = q_smem.at[ptx.opaque_zero(interpret) + warpgroup]
                plgpu.wgmma(s_ref, q, k_smem.at[stage].transpose((1, 0)))

            def start_values(out_ref, p, key_block):
                """Starts adding P · V; the interpreter, whose wgmma takes no registers on the left, returns it."""
                stage = stage_of(key_block)
                plgpu.barrier_wait(v_barriers.at[stage])
                if interpret:
                    values = v_smem[stage].astype(jnp.float32)
                    plgpu.commit_smem()  # or its race detector minds a copy after a read that is not wgmma's
                    return jnp.dot(p.astype(jnp.float32), values)
                plgpu.wgmma(out_ref, p, v_smem.at[stage])

            def finished(out_ref, accumulator, added):
                """Waits for the products, and gives the accumulator with the values that were added."""
                return accumulator + added if interpret else lax.optimization_barrier(out_ref[...])

            def free(barriers, key_block):
                """Tells the copying warpgroup that this one is done with the keys, or the values, of a block."""
                plgpu.barrier_arrive(barriers.at[stage_of(key_block)])

            def first_logits(s_ref):
                """Computes Q · K of the first block, while nothing else can be done."""
                start_logits(s_ref, first)
                return s_ref[...]

            def next_block(key_block, carry, mask=None):
                """Computes the logits and the softmax of this key block, and adds the values of the one before."""
                accumulator, p, maximum, denominator = carry

                def products(s_ref, out_ref):
                    if not interpret:  # which has no accumulators that start from a value
                        out_ref[...] = accumulator
                    start_logits(s_ref, key_block)
                    added = start_values(out_ref, p, key_block - 1)
                    s = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
                    free(k_free_barriers, key_block)
                    p32, new_max, factor = softmax(s, maximum, mask or (lambda s: s))
                    total = denominator * factor + p32.sum(axis=1)
                    # In bfloat16 they take the registers of those that the values are still multiplied with.
                    p32, total, factor, new_max = lax.optimization_barrier((p32, total, factor, new_max))
                    # At this place, as ptxas would otherwise put the wait for the values before most of the softmax: it
                    # does not move it across a branch.
                    await_keys(key_block + 1)
                    summed = finished(out_ref, accumulator, added)
                    free(v_free_barriers, key_block - 1)
                    return rescaled(summed, factor), p32.astype(jnp.bfloat16), new_max, total

                shapes = (WARPGROUP_QUERIES, BLOCK_KEYS), (WARPGROUP_QUERIES, value_dim)
                return pl.run_scoped(products, *(ptx.ACC(shape, jnp.float32) for shape in shapes))

            def last_values(accumulator, p):
                """Adds the values of the last block."""

                def product(out_ref):
                    if not interpret:
                        out_ref[...] = accumulator
                    return finished(out_ref, accumulator, start_values(out_ref, p, last - 1))

                return pl.run_scoped(product, ptx.ACC((WARPGROUP_QUERIES, value_dim), jnp.float32))

            def mask_at(key_block):
                return functools.partial(masked, key_block=key_block, low=low, high=high)

            def next_masked(key_block, carry):
                return next_block(key_block, carry, mask_at(key_block))

            plgpu.barrier_wait(q_barriers.at[warpgroup])
            await_keys(first)
            s = pl.run_scoped(first_logits, ptx.ACC((WARPGROUP_QUERIES, BLOCK_KEYS), jnp.float32))
            free(k_free_barriers, first)
            floor = plgpu.layout_cast(jnp.full((WARPGROUP_QUERIES,), MAXIMUM_FLOOR, jnp.float32), ROW_LAYOUT)
            p, maximum, _ = softmax(s, floor, mask_at(first))
            await_keys(first + 1)
            accumulator = plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES, value_dim), jnp.float32), plgpu.Layout.WGMMA)
            carry = accumulator, p.astype(jnp.bfloat16), maximum, p.sum(axis=1)
            carry = lax.fori_loop(first + 1, inner_first, next_masked, carry)
            carry = lax.fori_loop(inner_first, inner_last, next_block, carry)
            accumulator, p, maximum, denominator = lax.fori_loop(inner_last, last, next_masked, carry)
            accumulator = last_values(accumulator, p)
            free(v_free_barriers, last - 1)
            store(batch, head, rows, accumulator, maximum, denominator)

        def store(batch, head, rows, accumulator, maximum, denominator):
            """Writes `out` over this warpgroup's queries, and from there to its place."""
            is_empty = denominator == 0  # not of NaN, which shall show
            inverse = jnp.where(is_empty, 0.0, 1 / denominator)
            # A block of keys out of everyone's reach was taken where there was none: its values may be NaN.
            result = jnp.where(over(is_empty, value_dim), 0.0, accumulator * over(inverse, value_dim))
            lse = jnp.where(is_empty, -jnp.inf, maximum * math.log(2) + jnp.log(denominator))
            plgpu.commit_smem()  # all of this warpgroup are done with the queries
            q_smem[warpgroup, :, pl.ds(0, value_dim)] = result.astype(jnp.bfloat16)
            lse_smem[warpgroup] = lse
            plgpu.commit_smem()
            for row in range(0, WARPGROUP_QUERIES, 8):  # eight rows are contiguous in tiles
                plgpu.copy_smem_to_gmem(
                    q_smem.at[warpgroup, pl.ds(row, 8), pl.ds(0, value_dim)],
                    out_gmem.at[batch, pl.ds(rows.start + row, 8), head],
                )
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_gmem.at[batch * heads + head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the next queries land in the same memory

        for_each_item(attend)
