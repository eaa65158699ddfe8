"""The indexer's sparse loss on Hopper: KL(p ‖ softmax(I)) over each query's selection, and its gradients (Eq. 4).

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

Measured on an H200 at T' 4096, K 2048, J 64, E 128, in ms:

                              S 8192   S 131072
  the KL and its gradients     1.311      1.551     4.3 GB are gathered and 2.1 GB written
  the KL alone                 0.403      0.425     2.1 GB are gathered

With M in one part it takes 1.204 and 1.526, but d_weights is good to 1e-3 instead of 1e-5. Computing the logits again
in the second pass, instead of noting their signs, took 1.332 and 1.534.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.indexer_loss.selection_kl_signs import PARTS, WORD_A_THREAD, masked, signs
from dsa_jax.pallas_kernels.indexer_loss.selection_kl_statistics import NOTES, statistics

HEADS = (64, 32, 16)
DIMS = (128, 64)
BLOCK_HEADS = 64  # rows of one wgmma; fewer heads are filled up with zeros
BLOCK_KEYS = 64
PAIR_KEYS = 128  # K is a multiple of it: a key for every thread of a team
TEAMS = 2
# Of 64 keys each, a team's, 2 where there is no room for 3: one is worked on or leaves as contributions, the others
# arrive. More leave less of the first-level cache: without gradients 5 were measured at 0.441 ms, 3 at 0.403.
STAGES = (3, 2)
BUFFERS = 2  # of M: one is multiplied, one made
TILE = 64  # columns of bfloat16 in a swizzled row
MATH_REGISTERS = 208  # of a thread: 64 hold d_q, 64 the contributions
GATHER_REGISTERS = 2 * ptx.launch_registers(2 * TEAMS) - MATH_REGISTERS
HEAD_ROW, HEAD_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def smem_bytes(keys: int, dim: int, stages: int, backward: bool) -> int:
    """Bytes of shared memory of a block, `backward` with gradients: 211 KiB for K 2048, E 128, 3 stages with them."""
    q, scores, stage = 2 * BLOCK_HEADS * dim, 4 * keys, 2 * BLOCK_KEYS * dim
    d_logits = backward * BUFFERS * PARTS * 2 * BLOCK_HEADS * BLOCK_KEYS
    arrays = [TEAMS * size for size in (q, scores, d_logits, stages * stage, 4 * NOTES)]
    return sum(map(ptx.allocated, arrays)) + 2 * ptx.SMEM_GRANULE  # the barriers of gathers and of Pallas


def stages_of(keys: int, dim: int, backward: bool) -> int:
    """How many stages a team has; 0 when there is no room."""
    return next((n for n in STAGES if smem_bytes(keys, dim, n, backward) <= ptx.SMEM_BYTES), 0)


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
    """KL(p ‖ softmax(I)) a query over its selection, I[k] = k_scale · Σ_j w_j · relu(q_j · k), and its gradients.

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
    more = BLOCK_HEADS - heads
    if more:
        q_index = jnp.pad(q_index, ((0, 0), (0, more), (0, 0)))
        weights = jnp.pad(weights, ((0, 0), (0, more)))
    arguments = (sums, q_index, k_index, weights, indices, k_scale, *(() if d_kl is None else (d_kl,)))
    kernel = _kernel(q_index.shape, indices.shape[1], k_index.shape[0], d_kl is not None, blocks, interpret)
    kl, *gradients = kernel(*arguments)
    if d_kl is None:
        return kl
    d_q, d_weights, contributions, _ = gradients
    return kl, d_q[:, :heads], d_weights[:, :heads], contributions


def _kernel(q_shape, keys, batch, backward, blocks, interpret):
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
            jax.ShapeDtypeStruct((TEAMS * blocks, keys // BLOCK_KEYS, ptx.WARPGROUP), jnp.int32),
        ]
    scratch = dict(
        q_smem=plgpu.SMEM((TEAMS, BLOCK_HEADS, dim), jnp.bfloat16, transforms=swizzled),
        k_smem=plgpu.SMEM((TEAMS * stages, BLOCK_KEYS, dim), jnp.bfloat16, transforms=swizzled),
        scores_smem=plgpu.SMEM((TEAMS, keys), jnp.float32),
        notes_smem=plgpu.SMEM((TEAMS, NOTES), jnp.float32),
        gathered_barriers=ptx.gather_barriers(TEAMS * stages, interpret),
        # The team's queries and weights have landed: an arrival a copy. Its arithmetic waits.
        q_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=TEAMS),
        # A team's stage × its arithmetic, at first and when the stage may be refilled. Its gathering waits.
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
    q_smem,  # [2, 64, E]; for the second pass w · q; at the end d_q
    k_smem,  # [2 · stages, 64, E], a team's stages side by side
    scores_smem,  # [2, K]: the weighted sums over heads, then I, then dI
    notes_smem,  # [2, NOTES]
    gathered_barriers,
    q_barriers,
    free_barriers,
    d_logits_smem: Any = None,  # [2 · 2 · 2, 64 keys, 64 heads], for gradients: dI where relu passes
    blocks: int,
    per_batch: int,
    stages: int,
    interpret: bool,
):
    sums_gmem, q_gmem, k_gmem, weights_gmem, indices_gmem, scale_gmem, *d_kl_gmem = inputs
    kl_gmem, *gradients_gmem = outputs
    gradients_gmem, signs_gmem = gradients_gmem[:3], gradients_gmem[3:]
    backward = bool(d_kl_gmem)
    queries, _, dim = q_gmem.shape
    size, keys = k_gmem.shape[1], indices_gmem.shape[1]
    key_blocks = keys // BLOCK_KEYS
    passes = 2 if backward else 1
    warpgroup = lax.axis_index("warpgroup")
    team = lax.rem(warpgroup, TEAMS)
    first = lax.axis_index("block") * TEAMS + team
    items = lax.div(queries - 1 - first + TEAMS * blocks, TEAMS * blocks)  # of this team
    ptx.init_gather_barriers(gathered_barriers, TEAMS * stages, interpret)

    def query_of(item):
        return first + item * (TEAMS * blocks)

    def stage_of(step):
        """The stage, counted over both teams, of a step of this team: a key block of a pass of an item."""
        return team * stages + lax.rem(step, stages)

    @pl.when(warpgroup >= TEAMS)
    def _gather():
        plgpu.set_max_registers(GATHER_REGISTERS, action="decrease")
        steps = items * (passes * key_blocks)

        def row_ids(step):
            step = jnp.minimum(step, steps - 1)
            block = pl.ds(lax.rem(step, key_blocks) * BLOCK_KEYS, BLOCK_KEYS)
            return ptx.load_row_ids(indices_gmem.at[query_of(lax.div(step, passes * key_blocks)), block], interpret)

        def gather(step, ids):
            next_ids = row_ids(step + 1)
            stage = stage_of(step)
            rows_gmem = k_gmem.at[lax.div(query_of(lax.div(step, passes * key_blocks)), per_batch)]
            plgpu.barrier_wait(free_barriers.at[stage])
            ptx.gather_64_rows(
                rows_gmem, ids, k_smem.at[stage], gathered_barriers, stage, range(dim // TILE), interpret
            )
            return next_ids

        @pl.when(items > 0)
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
            query = query_of(item)
            plgpu.copy_gmem_to_smem(q_gmem.at[query], q_smem.at[team], q_barriers.at[team])
            plgpu.copy_gmem_to_smem(weights_gmem.at[query], weights_smem, q_barriers.at[team])

        def load_next_q(item):
            @pl.when(item + 1 < items)
            def _():
                load_q(item + 1)

        def key_block(block):
            return scores.at[pl.ds(block * BLOCK_KEYS, BLOCK_KEYS)]

        def wait_keys(step):
            stage = stage_of(step)
            ptx.wait_gather(gathered_barriers, stage, lax.rem(lax.div(step, stages), 2), interpret)
            return stage

        def release(step):
            plgpu.barrier_arrive(free_barriers.at[stage_of(step)])

        def product(shape, *operands):
            def multiply(accumulator):
                plgpu.wgmma(accumulator, *operands)
                return accumulator[...]

            return pl.run_scoped(multiply, ptx.ACC(shape, jnp.float32))

        def score(start):
            """Σ_j w_j · relu(q_j · k) of all keys, from the team's step `start` on, and which logits are positive.

            A block is weighed while the tensor cores are at the next.
            """
            weights = plgpu.load(weights_smem, layout=HEAD_COLUMN, optimized=False)
            shape = (BLOCK_KEYS, BLOCK_HEADS)

            def logits_of(block, meanwhile):
                zero = ptx.opaque_zero(interpret)
                stage = wait_keys(start + block)

                def multiply(accumulator):
                    plgpu.wgmma(accumulator, k_smem.at[stage], q_smem.at[zero + team].transpose((1, 0)))
                    meanwhile()
                    return accumulator[...]

                logits = pl.run_scoped(multiply, ptx.ACC(shape, jnp.float32))
                release(start + block)
                return logits

            def weigh(block, logits):
                if backward:
                    signs_gmem[0][first, block] = signs(logits, interpret)
                terms = jnp.maximum(logits, 0.0) * lax.broadcast_in_dim(weights, shape, [1])
                key_block(block)[...] = terms.sum(axis=1)

            def step(block, logits):
                return logits_of(block + 1, lambda: weigh(block, logits))

            logits = lax.fori_loop(0, key_blocks - 1, step, logits_of(0, lambda: None))
            weigh(key_blocks - 1, logits)

        def weigh_queries():
            """Replaces q_j by w_j · q_j."""
            weights = plgpu.load(weights_smem, layout=HEAD_ROW, optimized=False)
            q = plgpu.load(q_smem.at[team], layout=plgpu.Layout.WGMMA)
            q = q.astype(jnp.float32) * lax.broadcast_in_dim(weights, q.shape, [0])
            q_smem[team] = q.astype(jnp.bfloat16)

        def differentiate(query, start):
            """Gradients from the dI in `scores`, from the team's step `start` on.

            With M the dI of a key where a logit is positive, G = Mᵀ · keys is d_q but for the weights, G · q d_weights,
            and M · (w · q) the contributions. M of a block is made while the tensor cores are at the last.
            """
            d_q_gmem, d_weights_gmem, contributions_gmem = gradients_gmem
            weights = plgpu.load(weights_smem, layout=HEAD_ROW, optimized=False)

            def tile(block, part):
                return (team * BUFFERS + lax.rem(block, BUFFERS)) * PARTS + part

            def load_signs(block):
                block = jnp.minimum(block, key_blocks - 1)
                return plgpu.load(signs_gmem[0].at[first, block], layout=WORD_A_THREAD, optimized=False)

            def make(block, words):
                """M of a block, in one of its two places; behind the last something that nobody looks at."""
                d_scores = key_block(jnp.minimum(block, key_blocks - 1))
                d_scores = plgpu.load(d_scores, layout=HEAD_ROW, optimized=False)
                for part, m in enumerate(masked(words, d_scores, interpret)):
                    d_logits_smem[tile(block, part)] = m
                plgpu.commit_smem()

            def products(block, g, stage, words):
                """g + Mᵀ · keys, and M · (w · q); meanwhile the next M."""
                zero = ptx.opaque_zero(interpret)
                m = [d_logits_smem.at[zero + tile(block, part)] for part in range(PARTS)]
                keys, queries = k_smem.at[stage], q_smem.at[zero + team]
                rows = (BLOCK_KEYS, dim)
                if interpret:  # which has no accumulators that start from a value
                    make(block + 1, words)
                    g = sum((product(g.shape, x.transpose((1, 0)), keys) for x in m), start=g)
                    return g, product(rows, m[0], queries)

                def multiply(refs):
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
                # All warps come to this: none reads this M or the keys any more, and the block before has left.
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
            q = plgpu.load(q_gmem.at[query], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            q_smem[team] = (g * lax.broadcast_in_dim(weights, g.shape, [0])).astype(jnp.bfloat16)
            weights_smem[...] = (g * q).sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[team], d_q_gmem.at[query])
            plgpu.copy_smem_to_gmem(weights_smem, d_weights_gmem.at[query])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            release(start + key_blocks - 1)

        for i in range(stages):
            plgpu.barrier_arrive(free_barriers.at[team * stages + i])

        @pl.when(items > 0)
        def _():
            load_q(0)

        @pl.loop(0, items)
        def _(item):
            query = query_of(item)
            start = item * (passes * key_blocks)
            plgpu.barrier_wait(q_barriers.at[team])
            score(start)
            plgpu.commit_smem()
            if backward:
                weigh_queries()
            else:
                load_next_q(item)
            statistics(
                indices_gmem.at[query], sums_gmem.at[query], scale_gmem.at[lax.div(query, per_batch)], d_kl_gmem,
                kl_gmem, query, scores, notes_smem.at[team], size, interpret,
            )  # fmt: skip
            if backward:
                differentiate(query, start + key_blocks)
                load_next_q(item)
