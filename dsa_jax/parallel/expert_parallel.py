"""Experts spread over a mesh axis: each shard sends its tokens' rows to the shards of their experts and back.

Buffers have a quota for each pair of shards, near what even routing needs. What exceeds it goes in further rounds, as
many as the fullest pair needs, so no token is dropped and no buffer is made for the worst case.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.grouped_ffn import check_shapes, expert_ffn, rows_ffn, rows_gradients, sum_slots, take
from dsa_jax.pallas_kernels import dispatch as pallas_kernels
from dsa_jax.parallel.collectives import max_statistics

CAPACITY = 1.5  # of even routing: five standard deviations of chance where that is a hundred slots a pair
PIECES = 1024  # of what a pair exchanges: XLA copies each by a block of threads of its own, and one alone at 8 GB/s
HOST = 8  # GPUs that NVLink joins: XLA's ragged exchange is a kernel that writes to its neighbours' memory
FEWEST = 32  # slots of a pair, where it can have so many: for less, a round costs its latency and chance is larger


def expert_parallel_ffn(
    x: Float[Array, "M D"],
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
    gate_proj: Float[Array, "X D F"],
    up_proj: Float[Array, "X D F"],
    down_proj: Float[Array, "X F D"],
    *,
    axis: str,
    ragged: bool,
) -> Float[Array, "M D"]:
    """`expert_ffn` inside `jax.shard_map`, where shard i of `axis` holds the experts i·X … (i + 1)·X - 1.

    Every shard brings its own tokens and gets their results; `experts` numbers the experts of all shards, and a slot
    whose number is none of theirs contributes nothing. Rounding is that of `expert_ffn`: rows travel in the dtype of
    `x` and are summed in float32, and so do gradients; those by the weights accumulate in float32 over the rows of all
    shards, in a fixed order. Gradients are those of this shard's `y` by its `x` and `gates`, and of every shard's by
    the weights. The backward pass sends the rows again rather than keep them.

    Args:
      axis: the mesh axis; of size 1, this is `expert_ffn`.
      ragged: send only the rows that there are, by `jax.lax.ragged_all_to_all`, which `has_ragged` machines have; the
        whole quota if not. The result is the same.
    """
    check_shapes(x, experts, gates, gate_proj, up_proj, down_proj)
    if jax.lax.axis_size(axis) == 1:
        return expert_ffn(x, experts, gates, gate_proj, up_proj, down_proj)
    weights = gate_proj, up_proj, down_proj
    return _exchanged_ffn(axis, ragged, x, gates.astype(jnp.float32), weights, experts)


def has_ragged() -> bool:
    """Whether `jax.lax.ragged_all_to_all` can be had: in jax 0.11 XLA compiles it for GPUs of one host and process."""
    here = jax.sharding.get_abstract_mesh().size <= HOST and jax.process_count() == 1
    return here and pallas_kernels.gpu_capability() is not None


def pair_quota(tokens: int, slots: int, local_experts: int, shards: int) -> int:
    """How many slots a shard may send to another in a round; never more than distinct experts can give a pair."""
    even = math.ceil(CAPACITY * tokens * slots / shards)
    return max(1, min(max(even, FEWEST), tokens * min(slots, local_experts)))


def ragged_slices(
    sent: Int[Array, " n"], received: Int[Array, " n"], *, index: Array | int, shard: Array | int, quota: int
) -> tuple[Int[Array, " pieces"], Int[Array, " pieces"], Int[Array, " pieces"], Int[Array, " pieces"]]:
    """What `jax.lax.ragged_all_to_all` asks of shard `shard` in round `index`, where all buffers are [n · quota].

    What a pair exchanges is given in up to `PIECES` pieces.

    Args:
      sent: slots that this shard has for each other, in all rounds.
      received: slots that each other shard has for this one, in all rounds.

    Returns:
      input_offsets, send_sizes, output_offsets (in the receivers' buffers) and recv_sizes.
    """
    rows = -(-quota // PIECES)
    first = jnp.arange(0, quota, rows, dtype=jnp.int32)
    last = jnp.minimum(first + rows, quota)

    def sizes(slots):
        left = (slots[:, None] - index * quota).astype(jnp.int32)
        return (jnp.clip(left, first, last) - first).reshape(-1)

    def offsets(shards):
        return (shards[:, None] * quota + first).astype(jnp.int32).reshape(-1)

    others = jnp.arange(len(sent), dtype=jnp.int32)
    return offsets(others), sizes(sent), offsets(jnp.full_like(others, shard)), sizes(received)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which slots go where: those of a pair of shards by expert and then by number, `quota` of them a round."""

    order: Array  # int32 [M · k]: the slots by expert, those without one last
    first: Array  # int32 [n]: where in `order` those for each shard begin
    sent: Array  # int32 [n]: how many go to each shard
    received: Array  # int32 [n, X]: how many come from each shard for each expert here
    shard: Array  # int32 [M, k]: where each slot goes, n for nowhere
    rank: Array  # int32 [M, k]: which of the slots that go there it is
    rounds: Array  # int32: how many rounds all shards go through
    quota: int = dataclasses.field(metadata={"static": True})


def _make_plan(experts, local_experts, axis):
    shards, slots = jax.lax.axis_size(axis), experts.size
    quota = pair_quota(experts.shape[0], experts.shape[1], local_experts, shards)
    num_experts = shards * local_experts
    flat = experts.reshape(-1).astype(jnp.int32)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    first = bounds[:-1:local_experts]
    counts = jnp.diff(bounds).reshape(shards, local_experts)
    sent = counts.sum(1)
    place = jnp.zeros(slots, jnp.int32).at[order].set(jnp.arange(slots, dtype=jnp.int32), unique_indices=True)
    shard = flat // local_experts
    return _Plan(
        order=order,
        first=first,
        sent=sent,
        received=jax.lax.all_to_all(counts, axis, 0, 0, tiled=True),
        shard=shard.reshape(experts.shape),
        rank=(place - first.at[shard].get(mode="fill", fill_value=0)).reshape(experts.shape),
        # Whoever shares any collective stays in step, though only `axis` must.
        rounds=max_statistics(jax.lax.pmax(-(-sent.max() // quota), axis), "tokens"),
        quota=quota,
    )


def _leaving_slots(plan, index):
    """The slots [n · quota] that leave in a round; where a pair has no more, any, since no expert awaits them."""
    rank = index * plan.quota + jnp.arange(plan.quota, dtype=jnp.int32)
    return take(plan.order, plan.first[:, None] + rank).reshape(-1)


def _arriving_experts(plan, index):
    """The experts [n · quota] of the rows that arrive in a round, X where there is no row."""
    rank = index * plan.quota + jnp.arange(plan.quota, dtype=jnp.int32)
    ends = jnp.cumsum(plan.received, axis=1)
    return jax.vmap(lambda ends: jnp.searchsorted(ends, rank, side="right"))(ends).reshape(-1).astype(jnp.int32)


def _returned_rows(plan, index):
    """Where in a round's buffer [n · quota] each slot's result [M, k] comes back; past the end if in another round."""
    rank = plan.rank - index * plan.quota
    return jnp.where((rank >= 0) & (rank < plan.quota), plan.shard * plan.quota + rank, len(plan.sent) * plan.quota)


def _exchange(rows, plan, index, axis, *, ragged, back=False):
    """Sends rows [n · quota, …] to their experts, or `back`: each shard's share of the buffer to that shard."""
    if not ragged:
        return jax.lax.all_to_all(rows, axis, 0, 0, tiled=True)
    counts = (plan.received.sum(1), plan.sent) if back else (plan.sent, plan.received.sum(1))
    slices = ragged_slices(*counts, index=index, shard=jax.lax.axis_index(axis), quota=plan.quota)
    unset = jax.lax.empty(rows.shape, rows.dtype)  # what does not arrive is never read
    return jax.lax.ragged_all_to_all(rows, unset, *slices, axis_name=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged_ffn(axis, ragged, x, gates, weights, experts):
    return _exchanged_ffn_fwd(axis, ragged, x, gates, weights, experts)[0]


def _exchanged_ffn_fwd(axis, ragged, x, gates, weights, experts):
    plan = _make_plan(experts, weights[0].shape[0], axis)

    def round_(index, y):
        slot = _leaving_slots(plan, index)
        rows = _exchange(take(x, slot // gates.shape[1]), plan, index, axis, ragged=ragged)
        # One number a row is too little to be worth a ragged exchange.
        row_gates = _exchange(take(gates.reshape(-1), slot), plan, index, axis, ragged=False)
        out = rows_ffn(rows, _arriving_experts(plan, index), row_gates, weights)
        out = _exchange(out, plan, index, axis, ragged=ragged, back=True)
        return y + sum_slots(out, _returned_rows(plan, index))

    y = jax.lax.fori_loop(0, plan.rounds, round_, jnp.zeros(x.shape, jnp.float32))
    return y.astype(x.dtype), (x, gates, weights, plan)


def _exchanged_ffn_bwd(axis, ragged, residuals, dy):
    x, gates, weights, plan = residuals

    def round_(index, sums):
        dx, dgates, dweights = sums
        slot = _leaving_slots(plan, index)
        rows, drows = (_exchange(take(a, slot // gates.shape[1]), plan, index, axis, ragged=ragged) for a in (x, dy))
        row_gates = _exchange(take(gates.reshape(-1), slot), plan, index, axis, ragged=False)
        ids = _arriving_experts(plan, index)
        drows, drow_gates, dweights = rows_gradients(drows, rows, ids, row_gates, weights, dweights)
        drows = _exchange(drows, plan, index, axis, ragged=ragged, back=True)
        drow_gates = _exchange(drow_gates, plan, index, axis, ragged=False)
        place = _returned_rows(plan, index)
        return dx + sum_slots(drows, place), dgates + take(drow_gates, place), dweights

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (x, gates, weights))
    dx, dgates, dweights = jax.lax.fori_loop(0, plan.rounds, round_, zeros)
    dweights = tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True))
    return dx.astype(x.dtype), dgates, dweights, None


_exchanged_ffn.defvjp(_exchanged_ffn_fwd, _exchanged_ffn_bwd)
