"""Computes the indexer's sparse loss: KL(p ‖ softmax(I)) over each query's selection, and its gradients (Eq. 4).

A block has two teams, and a team takes one query after another on its own:

  warpgroups 0, 1   the arithmetic of a team each
  warpgroups 2, 3   gather the index keys of a team each, 64 at a time, into its ring of stages

so that the tensor cores work for one team while the other is at its relu, softmax or stores. A query's keys go by
twice, since 512 KiB of them do not stay, but come from the second-level cache. First time: keys are the M operand of
wgmma and the heads the N operand, so that the weighted sum over heads runs along a row of the accumulator; which logits
are positive is noted, a bit each. Then I, p and the softmax: `statistics`. Second time, for the gradients, none is
needed: with M the dI of a key where a bit is set, bfloat16 in shared memory, G = Mᵀ · keys stays in registers, d_q is w
· G and d_weights the sums of q · G, for which M is in two parts, and M · (w · q) are the contributions to d_k. These
are written over the keys' own stage, which is free to be refilled once they have left it. In both passes a team's
arithmetic for one block of keys is done while the tensor cores are at the one before or after.

The bits: the relu's derivative is all that the second pass needs of the logits. A thread's 32 of a block, in the layout
of wgmma, are the bits of one int32: for columns 8i + 2c and the next, c this lane's number of four, and its upper row
bits 7 - i and 15 - i, for the row 8 below 23 - i and 31 - i. So, shifted by i, these are the signs of bytes, which
`prmt` spreads over pairs of bfloat16.

The statistics between the passes: each of a team's 128 threads has keys of its own, looks up their ids, scales and p,
and tells the others only sums. Written with the small vocabulary of `simt`; the tests run it on NumPy threads.

Measured on an H200 at T' 4096, K 2048, J 64, E 128, in ms:

                              S 8192   S 131072
  the KL and its gradients     1.311      1.551     4.3 GB are gathered and 2.1 GB written
  the KL alone                 0.403      0.425     2.1 GB are gathered

With M in one part it takes 1.204 and 1.526, but d_weights is good to 1e-3 instead of 1e-5. Computing the logits again
in the second pass, instead of noting their signs, took 1.332 and 1.534.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from dsa_jax.pallas_kernels.hopper import ptx, simt, simt_softmax
from dsa_jax.pallas_kernels.hopper.constants import (
    BLOCK_HEADS,
    BLOCK_KEYS,
    COLUMN_LAYOUT,
    LOG2E,
    PAIR_KEYS,
    ROW_LAYOUT,
    SMEM_BYTES,
    SMEM_GRANULE_BYTES,
    SWIZZLED_COLUMNS,
    WARPGROUP_THREADS,
    WARPS_PER_WARPGROUP,
    WORD_PER_THREAD,
)

HEADS = (64, 32, 16)  # J; fewer than 64 are filled up with zeros
DIMS = (128, 64)  # E
TEAMS = 2  # of a thread block, each with a query of its own
# A team's stages of 64 keys: 3, or 2 where there is no room for them. One is worked on or leaves as contributions, the
# others arrive. More leave less of the first-level cache: without gradients 5 were measured at 0.441 ms, 3 at 0.403.
STAGES = (3, 2)
BUFFERS = 2  # of M: one is multiplied, one made
COLUMN_GROUPS = BLOCK_HEADS // 8  # of eight columns, in wgmma's layout
PARTS = 2  # bfloat16 numbers that a value is given in: the rounded one, and what that has left over
NOTES_FLOATS = 96  # of a team's notes: 64 of weights, later d_weights, and 4 × 4 that its warps tell each other
UNROLLED_KEYS = 16  # that a thread looks up at once: their ids, scales and p are on their way together
MATH_REGISTERS = 208  # of a thread: 64 hold d_q, 64 the contributions
GATHER_REGISTERS = 2 * ptx.launch_registers(2 * TEAMS) - MATH_REGISTERS


def smem_bytes(keys: int, dim: int, stages: int, backward: bool) -> int:
    """Counts the bytes of shared memory of a block: 211 KiB for K 2048, E 128 and 3 stages with gradients."""
    q, scores, stage = 2 * BLOCK_HEADS * dim, 4 * keys, 2 * BLOCK_KEYS * dim
    d_logits = backward * BUFFERS * PARTS * 2 * BLOCK_HEADS * BLOCK_KEYS
    arrays = [TEAMS * size for size in (q, scores, d_logits, stages * stage, 4 * NOTES_FLOATS)]
    return sum(map(ptx.allocated, arrays)) + 2 * SMEM_GRANULE_BYTES  # the barriers of gathers and of Pallas


def stages_of(keys: int, dim: int, backward: bool) -> int:
    """Chooses how many stages a team has; 0 when there is no room."""
    return next((n for n in STAGES if smem_bytes(keys, dim, n, backward) <= SMEM_BYTES), 0)


def why_not(sums, q_index, k_index, weights, indices, k_scale, d_kl=None) -> str | None:
    """Says why the kernel cannot take these arguments (anything with shape and dtype), or None when it can."""
    if q_index.ndim != 3 or k_index.ndim != 3:
        return f"q_index must be [T', J, E] and k_index [B, S, E], got {list(q_index.shape)} and {list(k_index.shape)}"
    if q_index.dtype != jnp.bfloat16 or k_index.dtype != jnp.bfloat16:
        return f"q_index and k_index must be bfloat16, got {q_index.dtype} and {k_index.dtype}"
    queries, heads, dim = q_index.shape
    batch, size = k_index.shape[:2]
    if heads not in HEADS or dim not in DIMS or k_index.shape[2] != dim:
        return f"J must be one of {HEADS} and E of {DIMS}, got {list(q_index.shape)} and {list(k_index.shape)}"
    if not all((queries, batch, size)) or queries % batch:
        return f"T' must be a multiple of B and nothing empty, got {list(q_index.shape)} and {list(k_index.shape)}"
    if indices.ndim != 2 or indices.shape[1] == 0 or indices.shape[1] % PAIR_KEYS:
        return f"K must be a multiple of {PAIR_KEYS}, got indices {list(indices.shape)}"
    keys = indices.shape[1]
    for name, array, shape, dtype in (
        ("indices", indices, (queries, keys), jnp.int32),
        ("sums", sums, (queries, keys), jnp.float32),
        ("weights", weights, (queries, heads), jnp.float32),
        ("k_scale", k_scale, (batch, size), jnp.float32),
        ("d_kl", d_kl, (queries,), jnp.float32),
    ):
        if array is not None and (array.shape != shape or array.dtype != dtype):
            return f"{name} must be {jnp.dtype(dtype).name} {list(shape)}, got {array.dtype} {list(array.shape)}"
    if not stages_of(keys, dim, d_kl is not None):
        return f"there is no shared memory for K = {keys}, E = {dim}"
    if max(queries * keys, batch * size) >= 2**31:
        return f"T' · K and B · S must be below 2^31, got {list(indices.shape)} and {list(k_scale.shape)}"
    return None


def selection_kl(
    sums, q_index, k_index, weights, indices, k_scale, d_kl=None, *, blocks: int | None = None, interpret=False
):
    """Computes KL(p ‖ softmax(I)) a query over its selection, I[k] = k_scale · Σ_j w_j · relu(q_j · k), and gradients.

    Args:
      sums: float32 [T', K], p before it is normalised; what stands at absent keys is not used.
      q_index: bfloat16 [T', J, E]; J 64, 32 or 16, E 128 or 64. 64 heads are computed in any case.
      k_index: bfloat16 [B, S, E]; query i belongs to row i // (T' / B). What nobody selects may be anything.
      weights: float32 [T', J].
      indices: int32 [T', K], K a multiple of 128; outside [0, S) there is no key.
      k_scale: float32 [B, S].
      d_kl: float32 [T'], or None for the KL alone.
      blocks: how many thread blocks share the work, None for one on each multiprocessor; no result depends on it.
      interpret: run in Pallas' interpreter, on a CPU.

    Returns:
      kl float32 [T'], 0 where p is 0 or there is no key. With `d_kl` also its gradients: d_q bfloat16 [T', J, E],
      d_weights float32 [T', J], and bfloat16 [T' · K, E], what each selected key contributes to d_k.
    """
    reason = why_not(sums, q_index, k_index, weights, indices, k_scale, d_kl)
    if reason is not None:
        raise ValueError(f"selection_kl: {reason}")
    heads = q_index.shape[1]
    missing_heads = BLOCK_HEADS - heads
    if missing_heads:
        q_index = jnp.pad(q_index, ((0, 0), (0, missing_heads), (0, 0)))
        weights = jnp.pad(weights, ((0, 0), (0, missing_heads)))
    arguments = (sums, q_index, k_index, weights, indices, k_scale, *(() if d_kl is None else (d_kl,)))
    kernel = _kernel(q_index.shape, indices.shape[1], k_index.shape[0], d_kl is not None, blocks, interpret)
    kl, *gradients = kernel(*arguments)
    if d_kl is None:
        return kl
    d_q, d_weights, contributions, _ = gradients
    return kl, d_q[:, :heads], d_weights[:, :heads], contributions


def _kernel(q_shape, keys, batch, backward, blocks, interpret):
    """Makes the kernel for (sums, q_index, k_index, weights, indices, k_scale, d_kl?) of these shapes."""
    queries, heads, dim = q_shape
    stages = stages_of(keys, dim, backward)
    blocks = min(pl.cdiv(queries, TEAMS), blocks or ptx.multiprocessors())
    swizzled = ptx.swizzled(jnp.bfloat16)
    out_type = [jax.ShapeDtypeStruct((queries,), jnp.float32)]
    if backward:
        out_type += [
            jax.ShapeDtypeStruct(q_shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((queries, heads), jnp.float32),
            jax.ShapeDtypeStruct((queries * keys, dim), jnp.bfloat16),
            # A team's notes of which logits of its query are positive: 16 KiB for K 2048, that stay in the cache.
            jax.ShapeDtypeStruct((TEAMS * blocks, keys // BLOCK_KEYS, WARPGROUP_THREADS), jnp.int32),
        ]
    scratch = dict(
        q_smem=plgpu.SMEM((TEAMS, BLOCK_HEADS, dim), jnp.bfloat16, transforms=swizzled),
        k_smem=plgpu.SMEM((TEAMS * stages, BLOCK_KEYS, dim), jnp.bfloat16, transforms=swizzled),
        scores_smem=plgpu.SMEM((TEAMS, keys), jnp.float32),
        notes_smem=plgpu.SMEM((TEAMS, NOTES_FLOATS), jnp.float32),
        gathered_barriers=ptx.gather_barriers(TEAMS * stages, interpret),
        # A team's queries and weights have landed. Two arrivals, of the copies; its arithmetic waits.
        q_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=TEAMS),
        # A team's stage may be refilled. One arrival, of its arithmetic, at first and when it is done with it; its
        # gathering waits.
        free_barriers=plgpu.Barrier(num_barriers=TEAMS * stages),
    )
    if backward:
        tiles = TEAMS * BUFFERS * PARTS
        scratch["d_logits_smem"] = plgpu.SMEM((tiles, BLOCK_KEYS, BLOCK_HEADS), jnp.bfloat16, transforms=swizzled)

    def body(*refs):
        inputs, outputs = 6 + backward, 1 + 4 * backward
        gmem, refs = refs[: inputs + outputs], refs[inputs + outputs :]
        _block(
            gmem[:inputs], gmem[inputs:], **dict(zip(scratch, refs, strict=True)), blocks=blocks,
            per_batch=queries // batch, stages=stages, interpret=interpret,
        )  # fmt: skip

    return ptx.persistent_kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=list(scratch.values()),
        blocks=blocks,
        interpret=interpret,
        warpgroups=2 * TEAMS,
    )


def _block(
    inputs,  # sums, q_index, k_index, weights, indices, k_scale, d_kl or not, as `selection_kl` takes them
    outputs,  # kl; with d_kl also d_q, d_weights, contributions, signs
    *,
    q_smem,  # [2, 64, E], 32 KiB for E 128; for the second pass w · q; at the end d_q
    k_smem,  # [2 · stages, 64, E], 96 KiB for 3 stages, a team's stages side by side
    scores_smem,  # [2, K], 16 KiB for K 2048: the weighted sums over heads, then I, then dI
    notes_smem,  # [2, NOTES_FLOATS]
    gathered_barriers,
    q_barriers,
    free_barriers,
    d_logits_smem: Any = None,  # [2 · 2 · 2, 64 keys, 64 heads], 64 KiB, for gradients: dI where relu passes
    blocks: int,
    per_batch: int,
    stages: int,
    interpret: bool,
):
    """Runs one thread block: two teams, each a warpgroup for the arithmetic and one that gathers for it."""
    sums_gmem, q_gmem, k_gmem, weights_gmem, indices_gmem, scale_gmem, *d_kl_gmem = inputs
    kl_gmem, *gradients_gmem = outputs
    gradients_gmem, signs_gmem = gradients_gmem[:3], gradients_gmem[3:]
    backward = bool(d_kl_gmem)
    queries, _, dim = q_gmem.shape
    size, keys = k_gmem.shape[1], indices_gmem.shape[1]
    key_blocks = keys // BLOCK_KEYS
    passes = 2 if backward else 1
    warpgroup = lax.axis_index("warpgroup")
    team = lax.rem(warpgroup, TEAMS)  # warpgroups t and t + 2 are team t
    first = lax.axis_index("block") * TEAMS + team
    items = lax.div(queries - 1 - first + TEAMS * blocks, TEAMS * blocks)  # of this team
    ptx.init_gather_barriers(gathered_barriers, TEAMS * stages, interpret)

    def query_of(item):
        """Gives the query of an item of this team."""
        return first + item * (TEAMS * blocks)

    def stage_of(step):
        """Gives the stage, counted over both teams, of a step of this team: a key block of a pass of an item."""
        return team * stages + lax.rem(step, stages)

    @pl.when(warpgroup >= TEAMS)
    def _gather():
        plgpu.set_max_registers(GATHER_REGISTERS, action="decrease")
        steps = items * (passes * key_blocks)

        def row_ids(step):
            """Loads the row numbers of a step; those of the last behind it."""
            step = jnp.minimum(step, steps - 1)
            block = pl.ds(lax.rem(step, key_blocks) * BLOCK_KEYS, BLOCK_KEYS)
            return ptx.load_row_ids(indices_gmem.at[query_of(lax.div(step, passes * key_blocks)), block], interpret)

        def gather(step, ids):
            """Gathers the keys of a step when its stage is free."""
            next_ids = row_ids(step + 1)
            stage = stage_of(step)
            rows_gmem = k_gmem.at[lax.div(query_of(lax.div(step, passes * key_blocks)), per_batch)]
            plgpu.barrier_wait(free_barriers.at[stage])
            ptx.gather_64_rows(
                rows_gmem, ids, k_smem.at[stage], gathered_barriers, stage, range(dim // SWIZZLED_COLUMNS), interpret
            )
            return next_ids

        @pl.when(items > 0)  # the last block's second team may have none
        def _():
            lax.fori_loop(0, steps, gather, row_ids(0))

        for i in range(stages):  # each has been released once more than it was filled
            plgpu.barrier_wait(free_barriers.at[team * stages + i])

    @pl.when(warpgroup < TEAMS)
    def _compute():
        plgpu.set_max_registers(MATH_REGISTERS, action="increase")
        weights_smem = notes_smem.at[team, pl.ds(0, BLOCK_HEADS)]
        scores = scores_smem.at[team]

        def load_q(item):
            """Starts the copies of an item's queries and weights."""
            query = query_of(item)
            plgpu.copy_gmem_to_smem(q_gmem.at[query], q_smem.at[team], q_barriers.at[team])
            plgpu.copy_gmem_to_smem(weights_gmem.at[query], weights_smem, q_barriers.at[team])

        def load_next_q(item):
            @pl.when(item + 1 < items)
            def _():
                load_q(item + 1)

        def key_block(block):
            """Refers to the scores of a block of keys."""
            return scores.at[pl.ds(block * BLOCK_KEYS, BLOCK_KEYS)]

        def wait_keys(step):
            """Waits for the keys of a step, and returns their stage."""
            stage = stage_of(step)
            ptx.wait_gather(gathered_barriers, stage, lax.rem(lax.div(step, stages), 2), interpret)
            return stage

        def release(step):
            """Lets the gathering warpgroup refill the stage of a step."""
            plgpu.barrier_arrive(free_barriers.at[stage_of(step)])

        def product(shape, *operands):
            """Multiplies two operands into a fresh accumulator of this shape."""

            def multiply(accumulator):
                plgpu.wgmma(accumulator, *operands)
                return accumulator[...]

            return pl.run_scoped(multiply, ptx.ACC(shape, jnp.float32))

        def score(start):
            """Scores all keys, Σ_j w_j · relu(q_j · k), from the team's step `start` on, and notes positive logits.

            A block is weighed while the tensor cores are at the next.
            """
            weights = plgpu.load(weights_smem, layout=COLUMN_LAYOUT, optimized=False)
            shape = (BLOCK_KEYS, BLOCK_HEADS)

            def logits_of(block, meanwhile):
                """Computes the logits of a block, [64 keys, 64 heads]; calls `meanwhile` between issue and wait."""
                zero = ptx.opaque_zero(interpret)
                stage = wait_keys(start + block)

                # The products are issued, then the block before is weighed, then they are waited for.
                def multiply(accumulator):
                    plgpu.wgmma(accumulator, k_smem.at[stage], q_smem.at[zero + team].transpose((1, 0)))
                    meanwhile()
                    return accumulator[...]

                logits = pl.run_scoped(multiply, ptx.ACC(shape, jnp.float32))
                release(start + block)
                return logits

            def weigh(block, logits):
                """Stores the weighted sums of a block, and for gradients the signs of its logits."""
                if backward:
                    signs_gmem[0][first, block] = signs(logits, interpret)
                # The sum over heads is one along a row, of 16 columns a thread and four lanes.
                # On the card the maximum is max.NaN, which keeps NaN; XLA's on a CPU may drop it.
                passed = jnp.where(logits <= 0, 0.0, logits) if interpret else jnp.maximum(logits, 0.0)
                terms = passed * lax.broadcast_in_dim(weights, shape, [1])
                key_block(block)[...] = terms.sum(axis=1)

            def step(block, logits):
                return logits_of(block + 1, lambda: weigh(block, logits))

            logits = lax.fori_loop(0, key_blocks - 1, step, logits_of(0, lambda: None))
            weigh(key_blocks - 1, logits)

        def weigh_queries():
            """Replaces q_j by w_j · q_j."""
            weights = plgpu.load(weights_smem, layout=ROW_LAYOUT, optimized=False)
            q = plgpu.load(q_smem.at[team], layout=plgpu.Layout.WGMMA)
            # For the contributions M · (w · q): weighing q once is less than weighing M for every key.
            q = q.astype(jnp.float32) * lax.broadcast_in_dim(weights, q.shape, [0])
            q_smem[team] = q.astype(jnp.bfloat16)

        def differentiate(query, start):
            """Computes gradients from the dI in `scores`, from the team's step `start` on.

            With M the dI of a key where a logit is positive, G = Mᵀ · keys is d_q but for the weights, G · q d_weights,
            and M · (w · q) the contributions. M of a block is made while the tensor cores are at the last.
            """
            d_q_gmem, d_weights_gmem, contributions_gmem = gradients_gmem
            weights = plgpu.load(weights_smem, layout=ROW_LAYOUT, optimized=False)

            def tile(block, part):
                """Gives the place of a part of M of a block."""
                return (team * BUFFERS + lax.rem(block, BUFFERS)) * PARTS + part

            def load_signs(block):
                """Loads the signs of a block's logits, two blocks ahead of their use; those of the last behind it."""
                block = jnp.minimum(block, key_blocks - 1)
                return plgpu.load(signs_gmem[0].at[first, block], layout=WORD_PER_THREAD, optimized=False)

            def make(block, words):
                """Makes M of a block, in one of its two places; behind the last something that nobody looks at."""
                d_scores = key_block(jnp.minimum(block, key_blocks - 1))
                d_scores = plgpu.load(d_scores, layout=ROW_LAYOUT, optimized=False)
                for part, m in enumerate(masked(words, d_scores, interpret)):
                    d_logits_smem[tile(block, part)] = m
                plgpu.commit_smem()

            def products(block, g, stage, words):
                """Computes g + Mᵀ · keys and M · (w · q), and makes the next M meanwhile."""
                zero = ptx.opaque_zero(interpret)
                m = [d_logits_smem.at[zero + tile(block, part)] for part in range(PARTS)]
                keys, queries = k_smem.at[stage], q_smem.at[zero + team]
                rows = (BLOCK_KEYS, dim)
                if interpret:  # which has no accumulators that start from a value
                    make(block + 1, words)
                    g = sum((product(g.shape, x.transpose((1, 0)), keys) for x in m), start=g)
                    return g, product(rows, m[0], queries)

                def multiply(refs):
                    # d_weights needs both parts of M, the contributions, which are rounded anyway, only the first.
                    for x in m:
                        plgpu.wgmma(refs[0], x.transpose((1, 0)), keys)
                    plgpu.wgmma(refs[1], m[0], queries)
                    make(block + 1, words)

                nothing = plgpu.layout_cast(jnp.zeros(rows, jnp.float32), plgpu.Layout.WGMMA)
                return pl.run_state(multiply)((ptx.ACC.init(g), ptx.ACC.init(nothing)))

            def step(block, carry):
                g, words = carry
                later_words = load_signs(block + 2)
                stage = wait_keys(start + block)
                g, contributions = products(block, g, stage, words)
                # All warps come to this: none reads this M or the keys any more, and the block before has left. Only
                # then may newly gathered keys be written over its contributions.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(block > 0)
                def _():
                    release(start + block - 1)

                k_smem[stage] = contributions.astype(jnp.bfloat16)
                plgpu.commit_smem()
                rows = pl.ds(query * keys + block * BLOCK_KEYS, BLOCK_KEYS)
                plgpu.copy_smem_to_gmem(k_smem.at[stage], contributions_gmem.at[rows])
                return g, later_words

            words = load_signs(0)
            make(0, words)
            g = plgpu.layout_cast(jnp.zeros((BLOCK_HEADS, dim), jnp.float32), plgpu.Layout.WGMMA)
            g, _ = lax.fori_loop(0, key_blocks, step, (g, load_signs(1)))
            # q itself again: shared memory has w · q.
            q = plgpu.load(q_gmem.at[query], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            q_smem[team] = (g * lax.broadcast_in_dim(weights, g.shape, [0])).astype(jnp.bfloat16)
            # d_weights, where the weights were: G · q, summed along a row.
            weights_smem[...] = (g * q).sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[team], d_q_gmem.at[query])
            plgpu.copy_smem_to_gmem(weights_smem, d_weights_gmem.at[query])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            release(start + key_blocks - 1)  # its contributions have left as well

        for i in range(stages):  # all are empty at first
            plgpu.barrier_arrive(free_barriers.at[team * stages + i])

        @pl.when(items > 0)
        def _():
            load_q(0)

        @pl.loop(0, items)
        def _(item):
            query = query_of(item)
            start = item * (passes * key_blocks)
            plgpu.barrier_wait(q_barriers.at[team])
            score(start)  # the first pass
            plgpu.commit_smem()
            if backward:
                weigh_queries()
            else:  # nobody needs the queries any more
                load_next_q(item)
            statistics(
                indices_gmem.at[query], sums_gmem.at[query], scale_gmem.at[lax.div(query, per_batch)], d_kl_gmem,
                kl_gmem, query, scores, notes_smem.at[team], size, interpret,
            )  # fmt: skip
            if backward:
                differentiate(query, start + key_blocks)  # the second pass
                load_next_q(item)


def statistics(ids_gmem, sums_gmem, scale_gmem, d_kl_gmem, kl_gmem, query, scores, notes, size, interpret):
    """Writes the KL of a query, and dI over its weighted sums in `scores` if there is a d_kl. A team calls it.

    Args:
      ids_gmem: int32 [K], the query's selection.
      sums_gmem: float32 [K], its p before it is normalised.
      scale_gmem: float32 [S], of the keys.
      d_kl_gmem: one float32 array [T'], or none.
      kl_gmem: float32 [T'], to which the KL goes.
      query: number of the query in these.
      scores: float32 [K] in shared memory, the weighted sums; then I, at last dI.
      notes: float32 [NOTES_FLOATS] of this team in shared memory.
      size: S.
      interpret: whether the interpreter runs this.
    """
    if interpret:
        ids, sums = ids_gmem[...], sums_gmem[...]
        present = (ids >= 0) & (ids < size)
        # The interpreter does not index by arrays.
        scale = lax.map(lambda i: scale_gmem[i], jnp.where(present, ids, 0))
        target = jnp.where(present, sums, 0.0)
        target = target / jnp.where(target.sum() == 0, 1.0, target.sum())
        x = jnp.where(present, scores[...] * scale, -jnp.inf)
        log_softmax = jnp.where(present, x - jax.nn.logsumexp(jnp.where(present.any(), x, 0.0)), -jnp.inf)
        terms = target * (jnp.log(jnp.where(target == 0, 1.0, target)) - log_softmax)
        kl_gmem[query] = jnp.where(present & (target != 0), terms, 0.0).sum()
        for ref in d_kl_gmem:
            scores[...] = jnp.where(present, (jnp.exp(log_softmax) - target) * ref[query] * scale, 0.0)
        return

    @ptx.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (6 + len(d_kl_gmem)), ptx.SPLAT))
    def run(ctx, ids, sums, scale, kl, scores, notes, *rest):
        *d_kl, query = rest
        run_statistics(
            ids_gmem.shape[0], size, simt.scalar(query), simt.gmem_address(ids), simt.gmem_address(sums),
            simt.gmem_address(scale), [simt.gmem_address(x) for x in d_kl], simt.gmem_address(kl),
            simt.smem_address(scores), simt.smem_address(notes) + 4 * BLOCK_HEADS,
        )  # fmt: skip

    run(ids_gmem, sums_gmem, scale_gmem, kl_gmem, scores, notes, *d_kl_gmem, query)


def run_statistics(keys, size, query, ids, sums, scale, d_kl, kl, scores, notes):
    """Does the work of one thread of a team's 128 in `statistics`. Thread t has keys t, t + 128, …, alone."""
    thread = simt.thread_id()
    number = (thread >> 7) + 1  # of the named barrier that Mosaic keeps for this warpgroup
    thread = thread & (WARPGROUP_THREADS - 1)
    lane, warp = thread & 31, thread >> 5
    rounds = keys // WARPGROUP_THREADS
    at_once = rounds <= UNROLLED_KEYS  # K up to 2048: registers hold what a thread has looked up for all passes
    kept = []  # what has been looked up, where that is all there is
    zero, minus_infinity = simt.f32(0.0), simt.f32(-math.inf)

    def for_each_key(carried, work):
        """Calls `carried = work(own, carried)` for `UNROLLED_KEYS` of this thread's keys at a time.

        `own` has for each whether it is one, and its offset in bytes.
        """

        def chunk(start, *carried):
            own = [(start + i < rounds, ((start + i) * WARPGROUP_THREADS + thread) << 2) for i in range(UNROLLED_KEYS)]
            # Behind its last key a thread looks at its first, and takes no notice.
            return work([(is_key, simt.where(is_key, at, thread << 2)) for is_key, at in own], list(carried))

        if at_once:
            return chunk(simt.i32(0), *carried)
        return simt.loop(simt.i32(0), rounds, UNROLLED_KEYS, carried, chunk)

    def look_up(own):
        """Loads whether the keys are present, their scales and p; once only where registers can keep them."""
        if kept:
            return kept[0]
        numbers = [simt.load_gmem_if(is_key, ids + at.long()) for is_key, at in own]
        present = [is_key & (number < size) for (is_key, _), number in zip(own, numbers, strict=True)]
        values = [simt.load_gmem_if(p, sums + at.long()).float() for p, (_, at) in zip(present, own, strict=True)]
        scales = [simt.load_gmem_if(p, scale + (n << 2).long()).float() for p, n in zip(present, numbers, strict=True)]
        if at_once:
            kept.append((present, scales, values))
        return present, scales, values

    def scores_of_keys():
        """Computes I, which replaces the weighted sums; its maximum, and the sum of p."""

        def work(own, carried):
            peak, total = carried
            present, scales, values = look_up(own)
            for (is_key, at), p, scale, value in zip(own, present, scales, values, strict=True):
                x = simt.where(p, simt.load(scores + at).float() * scale, minus_infinity)
                simt.store_if(is_key, scores + at, x.bits())
                peak, total = simt_softmax.maximum_f32(peak, x), total + value
            return [peak, total]

        return for_each_key([minus_infinity, zero], work)

    def exponentials(peak):
        """Sums exp(I - peak) over this thread's keys."""

        def work(own, carried):
            (total,) = carried
            for is_key, at in own:
                x = simt.where(is_key, simt.load(scores + at).float(), minus_infinity)
                total = total + simt_softmax.exp2((x - peak) * LOG2E)
            return [total]

        return for_each_key([zero], work)[0]

    def or_zero(x):
        """Replaces -inf, the maximum of no keys, by 0, since -inf - -inf would be NaN."""
        return simt.where(x.bits().equals(0xFF800000), zero, x)

    # First the maximum of I and the sum of p, then the sum of exponentials: in each warp over its own maximum, so that
    # one exchange between the warps is enough.
    peak, total = scores_of_keys()
    peak, total = simt_softmax.warp_maximum_f32(peak), simt_softmax.warp_sum_f32(total)
    exponential = simt_softmax.warp_sum_f32(exponentials(or_zero(peak)))
    with simt.when(lane.equals(0)):
        simt.store4(notes + (warp << 4), [x.bits() for x in (peak, total, exponential, zero)])
    simt.barrier(number, WARPGROUP_THREADS)
    parts = [[x.float() for x in simt.load4(notes, 16 * i)] for i in range(WARPS_PER_WARPGROUP)]
    # Every thread adds the four warps' parts in the same order, and has the same bits.
    peak = minus_infinity
    for part in parts:
        peak = simt_softmax.maximum_f32(peak, part[0])
    peak = or_zero(peak)
    total, exponential = zero, zero
    for part in parts:
        total = total + part[1]
        exponential = exponential + part[2] * simt_softmax.exp2((part[0] - peak) * LOG2E)
    # Where p is 0, or there is no key: nothing is divided by 0, and all terms are 0.
    total = simt.where(total.bits().equals(0), simt.f32(1.0), total)
    exponential = simt.where(exponential.bits().equals(0), simt.f32(1.0), exponential)
    log_sum = peak + simt_softmax.log2(exponential) * (1 / LOG2E)
    weight = [simt.load_gmem_if(simt.predicate(True), x + (query << 2).long()).float() for x in d_kl]

    def divergence(own, carried):
        """Sums p · (log p - log softmax(I)) over this thread's keys; where there is a d_kl stores dI."""
        (kl,) = carried
        present, scales, values = look_up(own)
        for (is_key, at), p, scale, value in zip(own, present, scales, values, strict=True):
            target = value / total
            log_softmax = simt.load(scores + at).float() - log_sum
            # log2 of a target of 0 is -inf, its term NaN: it is not taken.
            term = target * (simt_softmax.log2(target) * (1 / LOG2E) - log_softmax)
            kl = kl + simt.where(p & positive(target), term, zero)
            for d in weight:  # d_kl, one or none: dI = (softmax - p) · d_kl · k_scale
                d_score = (simt_softmax.exp2(log_softmax * LOG2E) - target) * d * scale
                simt.store_if(is_key, scores + at, simt.where(p, d_score, zero).bits())
        return [kl]

    def positive(x):
        """Tells whether x > 0, or is NaN, which shall show in the KL."""
        return ~zero.reaches(x)

    part = simt_softmax.warp_sum_f32(for_each_key([zero], divergence)[0])
    simt.barrier(number, WARPGROUP_THREADS)  # all have read the notes
    with simt.when(lane.equals(0)):
        simt.store(notes + (warp << 2), part.bits())
    simt.barrier(number, WARPGROUP_THREADS)
    parts = [x.float() for x in simt.load4(notes)]
    with simt.when(thread.equals(0)):
        simt.store_gmem(kl + (query << 2).long(), (parts[0] + parts[1] + parts[2] + parts[3]).bits())


def signs(logits, interpret: bool = False):
    """Packs where `logits` [64 keys, 64 heads] > 0, or NaN, into one int32 a thread."""
    if interpret:
        bits = (~(logits <= 0)).reshape(WARPGROUP_THREADS, 32).astype(jnp.uint32)
        words = (bits << lax.broadcasted_iota(jnp.uint32, bits.shape, 1)).sum(axis=1, dtype=jnp.uint32)
        return lax.bitcast_convert_type(words, jnp.int32)

    @ptx.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=ptx.Result((WARPGROUP_THREADS,), jnp.int32, WORD_PER_THREAD)
    )
    def pack(ctx, logits):
        registers = logits.registers.reshape(COLUMN_GROUPS, 2)
        # x less the least float32 has a sign where x <= 0 alone, and not where it is NaN: the bits are inverted at the
        # end. Four chains of eight, as a chain of all would take four times as long.
        code = [".reg .b32 x, b<4>;", *(f"mov.b32 b{i}, 0;" for i in range(4))]
        values = []
        for tile in registers:
            for byte, (vector, element) in enumerate((v, e) for v in tile for e in range(2)):
                values.append(llvm.extractelement(vector, ptx.i32(element)))
                code.append(f"sub.f32 x, ${len(values)}, 0f00000001; shf.l.wrap.b32 b{byte}, x, b{byte}, 1;")
        code.append(
            "prmt.b32 b0, b0, b1, 0x0040; prmt.b32 b2, b2, b3, 0x0040; prmt.b32 b0, b0, b2, 0x5410; not.b32 $0, b0;"
        )
        word = ptx.ptx("{" + "\n".join(code) + "}", *values, result_types=ptx.i32_type(), has_side_effects=True)
        return ptx.private_values([word], WORD_PER_THREAD)

    return pack(logits)


def masked(words, values, interpret: bool = False):
    """Spreads `values` [64], float32, along their rows where the bits are set, zeros elsewhere.

    Returns:
      PARTS arrays, each bfloat16 [64, 64]: the rounded values, and what rounding has left over of them.
    """
    if interpret:
        shifts = lax.broadcasted_iota(jnp.int32, (WARPGROUP_THREADS, 32), 1)
        bits = ((words[:, None] >> shifts) & 1).reshape(BLOCK_KEYS, BLOCK_HEADS) != 0
        rounded = values.astype(jnp.bfloat16)
        rest = (values - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
        return [jnp.where(bits, x[:, None], 0) for x in (rounded, rest)]
    result = ptx.Result((BLOCK_KEYS, BLOCK_HEADS), jnp.bfloat16, plgpu.Layout.WGMMA)

    @ptx.inline_mgpu(arg_types=(WORD_PER_THREAD, ROW_LAYOUT), return_type=[result] * PARTS)
    def spread(ctx, words, values):
        (word,) = ptx.elements(words)
        rounded = [_bfloat16_pairs(value) for value in ptx.elements(values)]
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((BLOCK_KEYS, BLOCK_HEADS))
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = [np.empty((COLUMN_GROUPS, 2), dtype=object) for _ in range(PARTS)]
        for tile in range(COLUMN_GROUPS):
            shifted = arith.shli(word, ptx.i32(tile))
            for row, selector in enumerate(("0x9988", "0xBBAA")):  # the signs of bytes 0 and 1, of 2 and 3
                mask = ptx.ptx(f"prmt.b32 $0, $1, 0, {selector};", shifted, result_types=ptx.i32_type())
                for part in range(PARTS):
                    registers[part][tile, row] = llvm.bitcast(pair, arith.andi(mask, rounded[row][part]))
        return [mgpu.FragmentedArray(_registers=x.reshape(shape), _layout=layout, _is_signed=None) for x in registers]

    return spread(words, values)


def _bfloat16_pairs(value):
    """Rounds a float32 to bfloat16, twice in an int32, and what is left over likewise."""
    code = "cvt.rn.bf16x2.f32 $0, $1, $1;"
    first = ptx.ptx(code, value, result_types=ptx.i32_type())
    high = llvm.bitcast(ir.F32Type.get(), arith.andi(first, ptx.i32(-(1 << 16))))  # the rounded one, as float32
    return [first, ptx.ptx(code, arith.subf(value, high), result_types=ptx.i32_type())]
