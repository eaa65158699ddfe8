"""The probabilities of sparse attention summed over heads, the target of the indexer, bfloat16, on Hopper.

A block computes one query × up to 128 heads at a time with three warpgroups; keys go by in blocks of 64:

  warpgroup 0, 1   each holds Q of 64 heads in registers, and of every key block computes the logits [64 heads, 64
                   keys], their exponentials, and the sums of these over the heads of each warp, to shared memory
  warpgroup 2      gathers the rows of the key block after those being multiplied, and adds up the warps' sums

With Q in registers shared memory feeds but one operand. The two computing warpgroups take turns at the tensor cores, so
that one multiplies while the other is in its exponentials. For 64 heads both hold the same Q and take every other key
block. What limits it are the tensor cores, from about 10^5 keys on and for 64 heads the gather, which passes on a row
of H columns for 2·N·H operations.

Measured on an H200 at T 4096, N 128, K 2048, H 576: 1.91 ms, 649 TFLOP/s, at S 8192 and 2.31 ms, 535 TFLOP/s, at S
131072. Alternatives in the same run, in ms at these S, all with three key blocks in shared memory instead of two:

  no other difference                             1.948   2.323
  Q loaded 16 bytes a thread, then exchanged      1.941   2.309
  the turn passes after the last tile of columns  1.953   2.322
  the turn passes before the last three tiles     2.007   2.370
  no turns                                        1.969   2.372
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_HEADS,
    BLOCK_KEYS,
    LOG2E,
    PAIR_KEYS,
    ROW_LAYOUT,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
    WARPGROUP_THREADS,
    WARPS_PER_WARPGROUP,
    WORD_PER_THREAD,
)

MAX_DIM = 576  # H: 144 registers a thread for Q
L2_LINE_BYTES = 128
COMPUTE_REGISTERS = 216  # of a thread: 144 hold Q of 64 heads for H 576, 32 the logits
GATHER_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shares a block's warpgroups and shared memory among 64 or 128 heads."""

    heads: int

    @property
    def readers(self) -> int:
        """Computing warpgroups that read a key block."""
        return self.heads // BLOCK_HEADS

    @property
    def period(self) -> int:
        """Key blocks from one of a computing warpgroup's to its next: 1 at 128 heads, 2 at 64."""
        return 2 // self.readers

    @property
    def slots(self) -> int:
        """Key blocks in shared memory: those being multiplied and one more."""
        return self.period + 1

    @property
    def sums(self) -> int:
        """Key blocks that have room in shared memory for their sums by warp.

        When a warpgroup has multiplied block j - slots, the sums of its block before that are complete, and are added
        up before block j is gathered. All blocks from there to j - 1 may have sums by then.
        """
        return self.slots + self.period

    def smem_bytes(self, dim: int) -> int:
        """Counts the bytes of a block, barriers included. For H 576: 152 KiB with 128 heads, 223 KiB with 64."""
        rows = self.slots * BLOCK_KEYS * dim * 2
        sums = self.sums * self.readers * WARPS_PER_WARPGROUP * BLOCK_KEYS * 4
        return rows + ptx.allocated(sums) + 2 * SMEM_GRANULE_BYTES


def why_not(q, kv, lse, indices) -> str | None:
    """Says in one sentence why the kernel cannot take these arguments, or None when it can."""
    dtypes = [str(x.dtype) for x in (q, kv, lse, indices)]
    if dtypes != ["bfloat16", "bfloat16", "float32", "int32"]:
        return f"q and kv must be bfloat16, lse float32 and indices int32, got {', '.join(dtypes)}"
    if q.ndim != 3 or kv.ndim != 3 or lse.ndim != 2 or indices.ndim != 2:
        return (
            "expected q [T, N, H], kv [B, S, H], lse [T, N], indices [T, K], "
            f"got {q.shape}, {kv.shape}, {lse.shape}, {indices.shape}"
        )
    queries, heads, dim = q.shape
    shapes = f"q {q.shape}, kv {kv.shape}, lse {lse.shape} and indices {indices.shape}"
    if 0 in (*q.shape, *kv.shape, *indices.shape):
        return f"no dimension may be 0, got {shapes}"
    if kv.shape[2] != dim or lse.shape != (queries, heads) or indices.shape[0] != queries or queries % kv.shape[0]:
        return f"{shapes} do not fit together"
    if heads % BLOCK_HEADS:
        return f"heads must be a multiple of {BLOCK_HEADS}, got {heads}"
    if dim % SWIZZLED_COLUMNS or dim > MAX_DIM:
        return f"the last dimension must be a multiple of {SWIZZLED_COLUMNS} up to {MAX_DIM}, got {dim}"
    if queries * (pl.cdiv(indices.shape[1], PAIR_KEYS) * 2 + 1) >= 2**31 - 2**20:  # key blocks count in int32
        return f"T · ⌈K / 64⌉ must be below 2³¹, got {shapes}"
    return None


def attention_target(q, kv, lse, indices, *, scale: float, blocks: int | None = None, interpret: bool = False):
    """Sums the probabilities of the selected keys over heads: Σ_n exp(scale · q[t, n] · kv[indices[t, k]] - lse[t, n]).

    Args:
      q: [T, N, H] bfloat16; N a multiple of 64, H of 64 up to 576. Queries lie in B rows of equal length.
      kv: [B, S, H] bfloat16.
      lse: [T, N] float32; a head with +inf or -inf contributes nothing.
      indices: [T, K] int32; what lies outside [0, S) is no key.
      scale: of the logits.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      [T, K] float32, exactly 0 where there is no key. Not normalised. The same bits in every run.
    """
    reason = why_not(q, kv, lse, indices)
    if reason is not None:
        raise ValueError(f"attention_target: {reason}")
    keys = indices.shape[1]
    # Pairs of key blocks: at 64 heads each computing warpgroup has one of a pair.
    padding = -keys % PAIR_KEYS
    if padding:
        indices = jnp.pad(indices, ((0, 0), (0, padding)), constant_values=-1)
    # A block holds Q of 128 heads; more heads take more passes, added in their order.
    sums = None
    for first_head in range(0, q.shape[1], 2 * BLOCK_HEADS):
        plan = Plan(min(2 * BLOCK_HEADS, q.shape[1] - first_head))
        kernel = _kernel(q.shape, kv.shape, indices.shape[1], first_head, plan, scale, blocks, interpret)
        part = kernel(q, kv, lse, indices)
        sums = part if sums is None else sums + part
    assert sums is not None
    return sums[:, :keys]


def _kernel(q_shape, kv_shape, keys, first_head, plan, scale, blocks, interpret):
    """Makes the kernel for (q, kv, lse, indices) that sums over `plan.heads` heads from `first_head` on."""
    queries, _, dim = q_shape
    slots = plan.slots
    blocks = min(queries, blocks or ptx.multiprocessors())
    scratch = dict(
        k_smem=plgpu.SMEM((slots, BLOCK_KEYS, dim), jnp.bfloat16, transforms=ptx.swizzled(jnp.bfloat16)),
        sums_smem=plgpu.SMEM((plan.sums, plan.readers * WARPS_PER_WARPGROUP, BLOCK_KEYS), jnp.float32),
        # A slot has been gathered: an arrival of each gathering thread; computing warpgroups wait.
        gathered_barriers=ptx.gather_barriers(slots, interpret),
        # A slot is done with: an arrival of each computing warpgroup, which has multiplied it or, where the other one
        # does so, has seen it gathered; the gathering one waits.
        free_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        # It is the turn of computing warpgroup 0 or 1: an arrival of the other.
        turn_barriers=plgpu.Barrier(num_barriers=2),
        # The sums of the last blocks are there: an arrival of each computing warpgroup; the gathering one waits.
        done_barrier=plgpu.Barrier(num_arrivals=2),
    )

    def body(q_gmem, kv_gmem, lse_gmem, indices_gmem, sums_gmem, *refs):
        _block(
            q_gmem, kv_gmem, lse_gmem, indices_gmem, sums_gmem, **dict(zip(scratch, refs, strict=True)),
            blocks=blocks, per_batch=queries // kv_shape[0], first_head=first_head, scale=scale, plan=plan,
            interpret=interpret,
        )  # fmt: skip

    return ptx.persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((queries, keys), jnp.float32),
        scratch_types=list(scratch.values()),
        blocks=blocks,
        interpret=interpret,
        approx_math=True,
    )


def _block(
    q_gmem,  # [T, N, H] bfloat16
    kv_gmem,  # [B, S, H] bfloat16
    lse_gmem,  # [T, N] float32
    indices_gmem,  # [T, K] int32
    sums_gmem,  # [T, K] float32
    *,
    k_smem,  # [slots, 64, H], 144 KiB for 128 heads and H 576, 216 KiB for 64 heads
    sums_smem,  # [plan.sums, warps, 64]: over the heads of a warp
    gathered_barriers,
    free_barriers,
    turn_barriers,
    done_barrier,
    blocks: int,
    per_batch: int,
    first_head: int,
    scale: float,
    plan: Plan,
    interpret: bool,
):
    """Runs one thread block: two warpgroups that compute in turns, one that gathers and adds up."""
    _, size, dim = kv_gmem.shape
    slots, period, entries = plan.slots, plan.period, plan.sums
    key_blocks = indices_gmem.shape[1] // BLOCK_KEYS
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    items = lax.div(q_gmem.shape[0] - 1 - block, blocks) + 1  # queries of this block
    steps = items * key_blocks  # key blocks, one query's after the other's
    ptx.init_gather_barriers(gathered_barriers, slots, interpret)

    def place(step):
        """Gives the query and the keys of a step; those of the first or last step beyond them."""
        step = jnp.clip(step, 0, steps - 1)
        item = lax.div(step, key_blocks)
        return block + item * blocks, pl.ds((step - item * key_blocks) * BLOCK_KEYS, BLOCK_KEYS)

    def wait_gathered(step):
        """Waits until the rows of a step's key block have landed."""
        ptx.wait_gather(gathered_barriers, lax.rem(step, slots), lax.rem(lax.div(step, slots), 2), interpret)

    def see_gathered(step):
        """Waits for a block of the other warpgroup, so that no phase of its slot is passed over, and leaves it."""
        wait_gathered(step)
        plgpu.barrier_arrive(free_barriers.at[lax.rem(step, slots)])

    @pl.when(warpgroup == 2)
    def _gather():
        plgpu.set_max_registers(GATHER_REGISTERS, action="decrease")

        def row_ids(step):
            """Loads the row numbers of a step, for the gather."""
            return ptx.load_row_ids(indices_gmem.at[place(step)], interpret)

        def key_id(step):
            """Loads the ids of a step again, for its sums."""
            return _load_key_id(indices_gmem.at[place(step)], interpret)

        def add_up(step, key):
            """Writes the sums of a step. The computing warpgroups have its entry again after the next gather."""
            _add_warps(sums_smem.at[lax.rem(step, entries)], key, size, sums_gmem.at[place(step)], interpret)

        def fetch_next_query(step):
            """Has the next Q read from HBM into L2: the computing warpgroups have nothing to do while they load it."""
            query, _ = place(step + key_blocks)
            heads = pl.ds(first_head, plan.heads)
            _fetch_into_l2(q_gmem.at[query, heads], interpret)
            _fetch_into_l2(lse_gmem.at[query, heads], interpret)

        def gather(step, carry):
            """Gathers a step's rows; before that, adds up the sums whose memory the computing warpgroups need next."""
            ids, key = carry
            next_ids, next_key = row_ids(step + 1), key_id(step + 1 - entries)
            slot = lax.rem(step, slots)
            # The wait for the slot tells as well that the sums of `entries` steps ago are complete: see `Plan.sums`.
            pl.when(step >= slots)(lambda: plgpu.barrier_wait(free_barriers.at[slot]))
            pl.when(step >= entries)(lambda: add_up(step - entries, key))
            pl.when(lax.rem(step, key_blocks) == 0)(lambda: fetch_next_query(step))
            latents_gmem = kv_gmem.at[lax.div(place(step)[0], per_batch)]
            ptx.gather_64_rows(
                latents_gmem, ids, k_smem.at[slot], gathered_barriers, slot, range(dim // SWIZZLED_COLUMNS), interpret
            )
            return next_ids, next_key

        _, key = lax.fori_loop(0, steps, gather, (row_ids(0), key_id(-entries)))

        def drain(i, key):
            """Adds up the sums of the last steps, and waits for every phase of the barriers."""
            step = steps + i
            next_key = key_id(step + 1 - entries)
            last_wait = (i < slots) & (step >= slots)
            pl.when(last_wait)(lambda: plgpu.barrier_wait(free_barriers.at[lax.rem(step, slots)]))
            pl.when(i == slots)(lambda: plgpu.barrier_wait(done_barrier))
            pl.when(step >= entries)(lambda: add_up(step - entries, key))
            return next_key

        lax.fori_loop(0, entries, drain, key)

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        own_heads = first_head + (warpgroup * BLOCK_HEADS if plan.readers == 2 else 0)
        # The turn passes while the last tile of columns is still to be issued, so that the tensor cores do not run dry.
        parts = (
            [pl.ds(0, dim - SWIZZLED_COLUMNS), pl.ds(dim - SWIZZLED_COLUMNS, SWIZZLED_COLUMNS)]
            if dim > SWIZZLED_COLUMNS
            else [pl.ds(0, SWIZZLED_COLUMNS)]
        )
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn_barriers.at[0]))  # warpgroup 0 has the first turn

        @pl.loop(0, items)
        def _(item):
            query = block + item * blocks
            heads = pl.ds(own_heads, BLOCK_HEADS)
            # Straight from global memory into registers: 64 × 576 in bfloat16 are 144 a thread.
            q = [
                plgpu.load(q_gmem.at[query, heads, part], layout=plgpu.Layout.WGMMA, optimized=False) for part in parts
            ]
            lse = plgpu.load(lse_gmem.at[query, heads], layout=ROW_LAYOUT, optimized=False)
            # exp2(logit · scale · log2 e + offset). A head without keys has an offset of -inf too: it gives 0, not NaN.
            offset = jnp.where(lse == -jnp.inf, -jnp.inf, lse * -LOG2E)

            @pl.loop(0, key_blocks // period)
            def _(i):
                step = item * key_blocks + period * i
                if period == 2:  # 64 heads: the even key blocks are warpgroup 0's, the odd ones warpgroup 1's
                    step = step + warpgroup
                    pl.when(step > 0)(lambda: see_gathered(step - 1))
                wait_gathered(step)
                slot = lax.rem(step, slots) + ptx.opaque_zero(interpret)
                plgpu.barrier_wait(turn_barriers.at[warpgroup])

                def product(accumulator):
                    """Multiplies Q by the key block, [64 heads, 64 keys], and passes the turn on."""
                    for i, (columns, operand) in enumerate(zip(parts, q, strict=True)):
                        accumulator = _add_product(accumulator, operand, k_smem.at[slot, :, columns], interpret)
                        if i == 0:  # all but the last tile are issued
                            plgpu.barrier_arrive(turn_barriers.at[1 - warpgroup])
                    return accumulator[...]

                if interpret:
                    s = product(jnp.zeros((BLOCK_HEADS, BLOCK_KEYS), jnp.float32))
                else:
                    s = pl.run_scoped(product, ptx.ACC((BLOCK_HEADS, BLOCK_KEYS), jnp.float32))
                plgpu.barrier_arrive(
                    free_barriers.at[slot]
                )  # before the exponentials: the gather need not wait for them
                # At 128 heads both warpgroups have sums of every key block, 8 warps in all.
                first_warp = WARPS_PER_WARPGROUP * warpgroup if plan.readers == 2 else 0
                sums = sums_smem.at[lax.rem(step, entries), pl.ds(first_warp, WARPS_PER_WARPGROUP)]
                _sum_heads(s, offset, scale * LOG2E, sums, interpret)

        # Every completed phase is waited for.
        if period == 2:
            pl.when(warpgroup == 0)(lambda: see_gathered(steps - 1))
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn_barriers.at[0]))
        plgpu.barrier_arrive(done_barrier)


def _fetch_into_l2(x_gmem, interpret):
    """Has one warpgroup read a contiguous array into the L2 cache; it begins at a multiple of 128 bytes."""
    lines = pl.cdiv(math.prod(x_gmem.shape) * x_gmem.dtype.itemsize, L2_LINE_BYTES)
    if interpret:
        return

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(),))
    def call(ctx, x):
        thread = ptx.thread_of_warpgroup()
        for first in range(0, lines, WARPGROUP_THREADS):  # neighbouring threads ask for neighbouring lines
            line = arith.addi(thread, ptx.i32(first))
            address = arith.addi(
                ptx.gmem_address(x), arith.extui(ptx.i64_type(), arith.muli(line, ptx.i32(L2_LINE_BYTES)))
            )
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, line, ptx.i32(lines))):
                ptx.ptx("prefetch.global.L2 [$0];", address)

    call(x_gmem)


def _add_product(accumulator, q, k_smem, interpret):
    """Adds Q [64, columns] · K [64, columns] transposed to the accumulator, in place; Q is in registers."""
    if not interpret:
        plgpu.wgmma(accumulator, q, k_smem.transpose((1, 0)))
        return accumulator
    # The interpreter has no products of registers.
    return accumulator + jnp.dot(q, k_smem[...].T, preferred_element_type=jnp.float32)


def _sum_heads(s, offset, scale, sums_smem, interpret):
    """Writes the sums of exp2(s · scale + offset), s [64 heads, 64 keys], over the heads of each warp: [4, 64].

    A warp has 16 heads. A thread has two of them, eight apart, and adds them; then lanes that differ in bit 4 exchange
    half of their columns and add, then in bit 3, then in bit 2: 14 shuffles, after which lane l has columns 2l, 2l + 1.
    """
    if interpret:
        p = jnp.exp2(s * scale + lax.broadcast_in_dim(offset, s.shape, [0]))
        sums_smem[...] = p.reshape(WARPS_PER_WARPGROUP, BLOCK_HEADS // WARPS_PER_WARPGROUP, BLOCK_KEYS).sum(1)
        return

    @ptx.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, ROW_LAYOUT, plgpu.RefType()))
    def reduce(ctx, s, offset, sums):
        f32 = ir.F32Type.get()
        thread = ptx.thread_of_warpgroup()
        lane = arith.andi(thread, ptx.i32(31))
        factor = mgpu.utils.c(scale, f32)

        def element(value, i):
            """Takes an element of a register that is a vector."""
            return vector.extract(value, [], ir.DenseI64ArrayAttr.get([i]))

        def exponential(logit, row_offset):
            """Computes exp2(logit · scale + offset): two instructions, the second on the special function unit."""
            code = "{\n.reg .f32 x;\nfma.rn.f32 x, $1, $2, $3;\nex2.approx.ftz.f32 $0, x;\n}"
            return ptx.ptx(code, logit, factor, row_offset, result_types=f32)

        offsets = [element(x, 0) for x in offset.registers.flat]  # of this thread's two heads
        values = []  # of columns 8 i + 2 (lane mod 4) and the next, for i in 0 … 7
        for rows in s.registers.reshape(BLOCK_KEYS // 8, 2):
            for i in range(2):
                upper, lower = (exponential(element(x, i), y) for x, y in zip(rows, offsets, strict=True))
                values.append(arith.addf(upper, lower))
        for bit in (16, 8, 4):  # 16 values, then 8, 4 and at last 2; the sums' order is the same in every run
            half = len(values) // 2
            high = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, ptx.i32(bit)), ptx.i32(0))
            kept = [arith.select(high, b, a) for a, b in zip(values[:half], values[half:], strict=True)]
            sent = [arith.select(high, a, b) for a, b in zip(values[:half], values[half:], strict=True)]
            values = [arith.addf(a, mgpu.utils.shfl_bfly(b, bit)) for a, b in zip(kept, sent, strict=True)]
        to = arith.addi(ptx.smem_address(sums), arith.shli(thread, ptx.i32(3)))
        ptx.ptx("st.shared.v2.f32 [$0], {$1, $2};", to, *values)

    reduce(s, offset, sums_smem)


def _load_key_id(indices_gmem, interpret):
    """Loads one of the 64 int32 at `indices_gmem` a thread, the same for threads t and t + 64, for `_add_warps`."""
    if interpret:
        return indices_gmem[...]

    @ptx.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=ptx.Result((WARPGROUP_THREADS,), jnp.int32, WORD_PER_THREAD)
    )
    def load(ctx, indices):
        key = ptx.i32(BLOCK_KEYS - 1)
        offset = arith.shli(arith.andi(ptx.thread_id(), key), ptx.i32(2))
        address = arith.addi(ptx.gmem_address(indices), arith.extui(ptx.i64_type(), offset))
        value = ptx.ptx("ld.global.nc.b32 $0, [$1];", address, result_types=ptx.i32_type(), has_side_effects=True)
        return ptx.private_values((value,), WORD_PER_THREAD)

    return load(indices_gmem)


def _add_warps(sums_smem, key, size, out_gmem, interpret):
    """Writes the sum of `sums_smem` [warps, 64] over warps, in their order, to `out_gmem` [64]: 0 for absent keys."""
    warps = sums_smem.shape[0]
    if interpret:
        present = (key >= 0) & (key < size)
        out_gmem[...] = jnp.where(present, sums_smem[...].sum(0), 0.0)
        return

    @ptx.inline_mgpu(arg_types=(plgpu.RefType(), WORD_PER_THREAD, plgpu.RefType()))
    def add(ctx, sums, key, out):
        f32 = ir.F32Type.get()
        thread = ptx.thread_of_warpgroup()
        # A thread a key; the other half of the warpgroup has nothing to add.
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, ptx.i32(BLOCK_KEYS))):
            offset = arith.shli(thread, ptx.i32(2))
            source = arith.addi(ptx.smem_address(sums), offset)
            parts = [
                ptx.ptx(
                    f"ld.shared.f32 $0, [$1+{4 * BLOCK_KEYS * w}];", source, result_types=f32, has_side_effects=True
                )
                for w in range(warps)
            ]
            while len(parts) > 1:  # pairwise, in the same order every time
                parts = [arith.addf(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            # The sums of an absent key are those of a row of zeros: they are replaced, not multiplied.
            absent = arith.cmpi(arith.CmpIPredicate.uge, _only(key), ptx.i32(size))  # unsigned: negative ones too
            total = arith.select(absent, mgpu.utils.c(0.0, f32), parts[0])
            to = arith.addi(ptx.gmem_address(out), arith.extui(ptx.i64_type(), offset))
            ptx.ptx("st.global.f32 [$0], $1;", to, total)

    add(sums_smem, key, out_gmem)


def _only(array):
    """Takes the one element that a thread has of an array."""
    return vector.extract(array.registers.item(), [], ir.DenseI64ArrayAttr.get([0]))
