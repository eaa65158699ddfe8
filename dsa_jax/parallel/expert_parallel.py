"""Runs experts that are spread over a mesh axis: rows travel to the shards of their experts and back.

One round sends at most a quota of slots (pairs of a token and one of its experts) from each shard to each other; the
quota is near what even routing needs. What exceeds it goes in further rounds, as many as the fullest pair of shards
needs. So no token is dropped, and no buffer is made for the worst case, in which one shard gets everything.

`expert_parallel_ffn` is the layer; `has_ragged_exchange` says which of two collectives this machine can have.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.grouped_ffn import check_gradients, check_shapes, expert_ffn, rows_ffn, rows_gradients, sum_slots, take
from dsa_jax.pallas_kernels import dispatch as pallas_kernels
from dsa_jax.parallel.collectives import max_statistics
from dsa_jax.quantization import BlockScaled

# A pair's quota over what even routing gives it. The half on top is five standard deviations of chance where that is
# a hundred slots.
CAPACITY_FACTOR = 1.5

# Slots of a pair's quota, at least, where tokens give it so many. For fewer, a round costs no more than its latency,
# and chance is a larger part of them.
MIN_SLOTS_PER_PAIR = 32

# Slices into which a pair's rows are cut, at most. XLA copies each slice with a thread block of its own, and one block
# alone copies 8 GB/s.
MAX_SLICES_PER_PAIR = 1024

# GPUs that NVLink joins. XLA's ragged exchange is a kernel that writes to its neighbours' memory, so it ends there.
GPUS_PER_HOST = 8


def expert_parallel_ffn(
    x: Float[Array, "M D"],
    experts: Int[Array, "M k"],
    gates: Float[Array, "M k"],
    gate_proj: Float[Array, "X D F"] | BlockScaled,
    up_proj: Float[Array, "X D F"] | BlockScaled,
    down_proj: Float[Array, "X F D"] | BlockScaled,
    *,
    axis: str,
    ragged: bool,
) -> Float[Array, "M D"]:
    """Computes `expert_ffn` inside `jax.shard_map`, where shard i of `axis` holds the experts i·X … (i + 1)·X - 1.

    Rounding is that of `expert_ffn`: rows travel in the dtype of `x` and are summed in float32, and so do gradients;
    those by the weights accumulate in float32 over the rows of all shards, in a fixed order. Gradients are those of
    this shard's result by its `x` and `gates`, and of every shard's by the weights. The backward pass sends the rows
    again rather than keep them.

    Args:
      x: this shard's tokens.
      experts: the experts of each token, numbered over all shards. A slot outside these numbers contributes nothing.
      gates: what each expert's result is multiplied by.
      gate_proj: this shard's experts alone, as are the next two.
      up_proj: see `gate_proj`.
      down_proj: see `gate_proj`.
      axis: the mesh axis; if its size is 1, this is `expert_ffn`.
      ragged: whether to send only the rows that there are, by `jax.lax.ragged_all_to_all`, where `has_ragged_exchange`
        says so, or the whole quota. The result has the same bits.

    Returns:
      The results for this shard's tokens.

    Raises:
      ValueError: if an array's shape does not fit the others.
    """
    check_shapes(x, experts, gates, gate_proj, up_proj, down_proj)
    if jax.lax.axis_size(axis) == 1:
        return expert_ffn(x, experts, gates, gate_proj, up_proj, down_proj)
    weights = gate_proj, up_proj, down_proj
    return _exchanged_ffn(axis, ragged, x, gates.astype(jnp.float32), weights, experts)


def has_ragged_exchange() -> bool:
    """Tells whether XLA compiles `jax.lax.ragged_all_to_all` here: in jax 0.11, for GPUs of one host and process."""
    one_host = jax.sharding.get_abstract_mesh().size <= GPUS_PER_HOST and jax.process_count() == 1
    return one_host and pallas_kernels.gpu_capability() is not None


def pair_quota(tokens: int, slots: int, local_experts: int, shards: int) -> int:
    """Computes how many slots a shard may send to another in a round.

    Never more than a pair can have, since a token's experts are distinct.

    Args:
      tokens: tokens of a shard.
      slots: experts of a token.
      local_experts: experts of a shard.
      shards: shards of experts.

    Examples:
      >>> pair_quota(4096, 8, 32, 8)  # 1.5 times the 4096 · 8 / 8 of even routing
      6144
    """
    even = math.ceil(CAPACITY_FACTOR * tokens * slots / shards)
    return max(1, min(max(even, MIN_SLOTS_PER_PAIR), tokens * min(slots, local_experts)))


def ragged_slices(
    sent: Int[Array, " n"], received: Int[Array, " n"], *, index: Array | int, shard: Array | int, quota: int
) -> tuple[Int[Array, " slices"], Int[Array, " slices"], Int[Array, " slices"], Int[Array, " slices"]]:
    """Computes the arguments of `jax.lax.ragged_all_to_all` for one shard and round, all buffers being [n · quota].

    A pair's rows are cut into up to `MAX_SLICES_PER_PAIR` slices, those of one pair next to each other.

    Args:
      sent: slots that this shard has for each shard, in all rounds.
      received: slots that each shard has for this one, in all rounds.
      index: the round's number.
      shard: this shard's number.
      quota: slots of a pair in a round, at most.

    Returns:
      input_offsets, send_sizes, output_offsets (in the receivers' buffers) and recv_sizes, int32.

    Examples:
      >>> sent, received = jnp.array([3, 1]), jnp.array([3, 0])
      >>> [x.tolist() for x in ragged_slices(sent, received, index=0, shard=0, quota=2)]
      [[0, 1, 2, 3], [1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
    """
    slice_rows = -(-quota // MAX_SLICES_PER_PAIR)
    first = jnp.arange(0, quota, slice_rows, dtype=jnp.int32)
    stop = jnp.minimum(first + slice_rows, quota)

    def sizes(slots):
        left = (slots[:, None] - index * quota).astype(jnp.int32)
        return (jnp.clip(left, first, stop) - first).reshape(-1)

    def offsets(shards):
        return (shards[:, None] * quota + first).astype(jnp.int32).reshape(-1)

    shards = jnp.arange(len(sent), dtype=jnp.int32)
    return offsets(shards), sizes(sent), offsets(jnp.full_like(shards, shard)), sizes(received)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Holds which slots go where: those of a pair of shards by expert and then by number, `quota` of them a round."""

    order: Array  # int32 [M · k]: the slots by expert, those without one last
    first: Array  # int32 [n]: where in `order` the slots for each shard begin
    sent: Array  # int32 [n]: how many slots go to each shard
    received: Array  # int32 [n, X]: how many slots come from each shard for each of this shard's experts
    shard: Array  # int32 [M, k]: where each slot goes, n for nowhere
    rank: Array  # int32 [M, k]: the slot's number among those that go to the same shard
    rounds: Array  # int32: how many rounds all shards go through
    quota: int = dataclasses.field(metadata={"static": True})


def _make_plan(experts, local_experts, axis):
    """Sorts this shard's slots by expert, and tells every shard how many come to it."""
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
        # Shards of `axis` alone must agree on the rounds; but those of other axes share collectives with them later,
        # and a loop of another length would leave these waiting in different ones.
        rounds=max_statistics(jax.lax.pmax(-(-sent.max() // quota), axis), "tokens"),
        quota=quota,
    )


def _leaving_slots(plan, index):
    """Lists the slots [n · quota] that leave in a round; past a pair's last one any, since no expert awaits them."""
    rank = index * plan.quota + jnp.arange(plan.quota, dtype=jnp.int32)
    return take(plan.order, plan.first[:, None] + rank).reshape(-1)


def _arriving_experts(plan, index):
    """Lists the experts [n · quota] of the rows that arrive in a round, X where no row arrives."""
    rank = index * plan.quota + jnp.arange(plan.quota, dtype=jnp.int32)
    ends = jnp.cumsum(plan.received, axis=1)
    return jax.vmap(lambda ends: jnp.searchsorted(ends, rank, side="right"))(ends).reshape(-1).astype(jnp.int32)


def _returned_rows(plan, index):
    """Finds the row of a round's buffer [n · quota] where each slot's result [M, k] comes back.

    It is past the end where the slot goes in another round, or nowhere.
    """
    rank = plan.rank - index * plan.quota
    return jnp.where((rank >= 0) & (rank < plan.quota), plan.shard * plan.quota + rank, len(plan.sent) * plan.quota)


def _exchange(rows, plan, index, axis, *, ragged, back=False):
    """Sends rows [n · quota, …] to their experts, or `back`: each shard's part of the buffer to that shard."""
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

    def run_round(index, y):
        slot = _leaving_slots(plan, index)
        rows = _exchange(take(x, slot // gates.shape[1]), plan, index, axis, ragged=ragged)
        # One number a row is too little to be worth a ragged exchange.
        row_gates = _exchange(take(gates.reshape(-1), slot), plan, index, axis, ragged=False)
        out = rows_ffn(rows, _arriving_experts(plan, index), row_gates, weights)
        out = _exchange(out, plan, index, axis, ragged=ragged, back=True)
        return y + sum_slots(out, _returned_rows(plan, index))

    y = jax.lax.fori_loop(0, plan.rounds, run_round, jnp.zeros(x.shape, jnp.float32))
    return y.astype(x.dtype), (x, gates, weights, plan)


def _exchanged_ffn_bwd(axis, ragged, residuals, dy):
    x, gates, weights, plan = residuals
    check_gradients(weights)

    def run_round(index, sums):
        dx, dgates, dweights = sums
        slot = _leaving_slots(plan, index)
        rows, drows = (_exchange(take(a, slot // gates.shape[1]), plan, index, axis, ragged=ragged) for a in (x, dy))
        row_gates = _exchange(take(gates.reshape(-1), slot), plan, index, axis, ragged=False)
        row_experts = _arriving_experts(plan, index)
        drows, drow_gates, dweights = rows_gradients(drows, rows, row_experts, row_gates, weights, dweights)
        drows = _exchange(drows, plan, index, axis, ragged=ragged, back=True)
        drow_gates = _exchange(drow_gates, plan, index, axis, ragged=False)
        returned = _returned_rows(plan, index)
        return dx + sum_slots(drows, returned), dgates + take(drow_gates, returned), dweights

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (x, gates, weights))
    dx, dgates, dweights = jax.lax.fori_loop(0, plan.rounds, run_round, zeros)
    dweights = tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True))
    return dx.astype(x.dtype), dgates, dweights, None


_exchanged_ffn.defvjp(_exchanged_ffn_fwd, _exchanged_ffn_bwd)
