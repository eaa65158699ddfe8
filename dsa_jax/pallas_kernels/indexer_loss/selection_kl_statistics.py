"""What comes between the two passes of `selection_kl` over a query's keys: I, p, the KL and dI.

Each of a team's 128 threads has keys of its own, looks up their ids, scales and p, and tells the others only sums.
Written with the small vocabulary of `simt`; the tests run it on NumPy threads.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx, simt

HEADS = 64  # float32 of the notes that are not for this
NOTES = 96  # float32 of a team: 64 of weights, later d_weights, and 4 × 4 that its warps tell each other
WARPS = 4  # of a team
UNROLL = 16  # keys a thread looks up at once: their ids, scales and p are on their way together
LOG2E = math.log2(math.e)


def statistics(ids_gmem, sums_gmem, scale_gmem, d_kl_gmem, kl_gmem, query, scores, notes, size, interpret):
    """Writes the KL of a query, and dI over its weighted sums in `scores` if there is a d_kl. A team calls it."""
    if interpret:
        ids, sums = ids_gmem[...], sums_gmem[...]
        present = (ids >= 0) & (ids < size)
        # The interpreter does not index by arrays.
        scale = lax.map(lambda i: scale_gmem[i], jnp.where(present, ids, 0))
        target = jnp.where(present, sums, 0.0)
        target = target / jnp.where(target.sum() == 0, 1.0, target.sum())
        x = jnp.where(present, scores[...] * scale, -jnp.inf)
        log_softmax = jnp.where(present, x - jax.nn.logsumexp(jnp.where(present.any(), x, 0.0)), -jnp.inf)
        terms = target * (jnp.log(jnp.where(target > 0, target, 1.0)) - log_softmax)
        kl_gmem[query] = jnp.where(target > 0, terms, 0.0).sum()
        for ref in d_kl_gmem:
            scores[...] = jnp.where(present, (jnp.exp(log_softmax) - target) * ref[query] * scale, 0.0)
        return

    @ptx.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (6 + len(d_kl_gmem)), ptx.SPLAT))
    def run(ctx, ids, sums, scale, kl, scores, notes, *rest):
        *d_kl, query = rest
        run_statistics(
            ids_gmem.shape[0], size, simt.scalar(query), simt.gmem_address(ids), simt.gmem_address(sums),
            simt.gmem_address(scale), [simt.gmem_address(x) for x in d_kl], simt.gmem_address(kl),
            simt.smem_address(scores), simt.smem_address(notes) + 4 * HEADS,
        )  # fmt: skip

    run(ids_gmem, sums_gmem, scale_gmem, kl_gmem, scores, notes, *d_kl_gmem, query)


def run_statistics(keys, size, query, ids, sums, scale, d_kl, kl, scores, notes):
    """What a thread of a team's 128 does: see `statistics`. Thread t has keys t, t + 128, …, alone."""
    thread = simt.thread_id()
    number = (thread >> 7) + 1  # of Mosaic's own barrier of a warpgroup
    thread = thread & (ptx.WARPGROUP - 1)
    lane, warp = thread & 31, thread >> 5
    rounds = keys // ptx.WARPGROUP
    at_once = rounds <= UNROLL
    kept = []  # what has been looked up, where that is all there is
    zero, minus_infinity = simt.f32(0.0), simt.f32(-math.inf)

    def for_each_key(carried, work):
        """`carried = work(look, carried)` for `UNROLL` of this thread's keys at a time; `look(ref)` reads theirs."""

        def chunk(start, *carried):
            own = [(start + i < rounds, ((start + i) * ptx.WARPGROUP + thread) << 2) for i in range(UNROLL)]
            # Behind its last key a thread looks at its first, and takes no notice.
            return work([(here, simt.where(here, at, thread << 2)) for here, at in own], list(carried))

        if at_once:
            return chunk(simt.i32(0), *carried)
        return simt.loop(simt.i32(0), rounds, UNROLL, carried, chunk)

    def look_up(own):
        """Whether the keys are present, their scale and p."""
        if kept:
            return kept[0]
        numbers = [simt.load_gmem_if(here, ids + at.long()) for here, at in own]
        present = [here & (number < size) for (here, _), number in zip(own, numbers, strict=True)]
        values = [simt.load_gmem_if(p, sums + at.long()).float() for p, (_, at) in zip(present, own, strict=True)]
        scales = [simt.load_gmem_if(p, scale + (n << 2).long()).float() for p, n in zip(present, numbers, strict=True)]
        if at_once:
            kept.append((present, scales, values))
        return present, scales, values

    def scores_of_keys():
        """I, which replaces the weighted sums; its maximum, and the sum of p."""

        def work(own, carried):
            peak, total = carried
            present, scales, values = look_up(own)
            for (here, at), p, scale, value in zip(own, present, scales, values, strict=True):
                x = simt.where(p, simt.load(scores + at).float() * scale, minus_infinity)
                simt.store_if(here, scores + at, x.bits())
                peak, total = simt.maximum_f32(peak, x), total + value
            return [peak, total]

        return for_each_key([minus_infinity, zero], work)

    def exponentials(peak):
        def work(own, carried):
            (total,) = carried
            for here, at in own:
                x = simt.where(here, simt.load(scores + at).float(), minus_infinity)
                total = total + simt.exp2((x - peak) * LOG2E)
            return [total]

        return for_each_key([zero], work)[0]

    def or_zero(x):
        """A maximum that was taken of something."""
        return simt.where(x.bits().equals(0xFF800000), zero, x)

    peak, total = scores_of_keys()
    peak, total = simt.warp_maximum_f32(peak), simt.warp_sum_f32(total)
    exponential = simt.warp_sum_f32(exponentials(or_zero(peak)))
    with simt.when(lane.equals(0)):
        simt.store4(notes + (warp << 4), [x.bits() for x in (peak, total, exponential, zero)])
    simt.barrier(number, ptx.WARPGROUP)
    parts = [[x.float() for x in simt.load4(notes, 16 * i)] for i in range(WARPS)]
    peak = minus_infinity
    for part in parts:
        peak = simt.maximum_f32(peak, part[0])
    peak = or_zero(peak)
    total, exponential = zero, zero
    for part in parts:
        total = total + part[1]
        exponential = exponential + part[2] * simt.exp2((part[0] - peak) * LOG2E)
    total = simt.where(total.bits().equals(0), simt.f32(1.0), total)
    exponential = simt.where(exponential.bits().equals(0), simt.f32(1.0), exponential)
    log_sum = peak + simt.log2(exponential) * (1 / LOG2E)
    weight = [simt.load_gmem_if(simt.predicate(True), x + (query << 2).long()).float() for x in d_kl]

    def divergence(own, carried):
        (kl,) = carried
        present, scales, values = look_up(own)
        for (here, at), p, scale, value in zip(own, present, scales, values, strict=True):
            target = value / total
            log_softmax = simt.load(scores + at).float() - log_sum
            term = target * (simt.log2(target) * (1 / LOG2E) - log_softmax)
            kl = kl + simt.where(p & positive(target), term, zero)
            for d in weight:
                d_score = (simt.exp2(log_softmax * LOG2E) - target) * d * scale
                simt.store_if(here, scores + at, simt.where(p, d_score, zero).bits())
        return [kl]

    def positive(x):
        return ~zero.reaches(x)

    part = simt.warp_sum_f32(for_each_key([zero], divergence)[0])
    simt.barrier(number, ptx.WARPGROUP)  # all have read the notes
    with simt.when(lane.equals(0)):
        simt.store(notes + (warp << 2), part.bits())
    simt.barrier(number, ptx.WARPGROUP)
    parts = [x.float() for x in simt.load4(notes)]
    with simt.when(thread.equals(0)):
        simt.store_gmem(kl + (query << 2).long(), (parts[0] + parts[1] + parts[2] + parts[3]).bits())
