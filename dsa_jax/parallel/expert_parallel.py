"""Runs experts that are spread over a mesh axis: rows travel to the shards of their experts and back.

One round sends at most a quota of slots (pairs of a token and one of its experts) from each shard to each other; the
quota is near what even routing needs. What exceeds it goes in further rounds, as many as the fullest pair of shards
needs. So no token is dropped, and no buffer is made for the worst case, in which one shard gets everything.

A large round goes in pieces that do not wait for each other: while the experts' products of one are computed, the rows
of the next are on their way here, and the results of the one before on their way back.

`expert_parallel_ffn` is the layer; `has_ragged_exchange` says which of two collectives this machine can have.
"""

import dataclasses
import functools
import itertools
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

# Pieces into which the first round is cut, at most. Even routing fills 1 / CAPACITY_FACTOR of a round, four of six: a
# quarter of the rows travels before the first product, a quarter of the results after the last one.
PIECES_PER_ROUND = 6

# Rows of a shard's buffer for a piece, at least: fewer are sent, and multiplied, in little more than the latency of it.
MIN_ROWS_PER_PIECE = 8192

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
        says so, or the whole quota. The result has the same bits. Rounds in pieces send the whole quota all the same:
        XLA takes a ragged exchange to cost nothing, and puts no work beside it. Its rate on two GPUs is 0.7 of the
        other's, so that both take as long.

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
    """Computes how many slots a shard may send to another in a round, in all of its pieces.

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


def round_pieces(quota: int, shards: int) -> int:
    """Computes into how many pieces a round is cut.

    Args:
      quota: slots of a pair of shards in the round.
      shards: shards of experts.

    Examples:
      >>> [round_pieces(quota, 16) for quota in (512, 1536, 6144)]
      [1, 3, 6]
    """
    return max(1, min(PIECES_PER_ROUND, quota * shards // MIN_ROWS_PER_PIECE))


def ragged_slices(
    sent: Int[Array, " n"], received: Int[Array, " n"], *, index: Array | int, shard: Array | int, quota: int
) -> tuple[Int[Array, " slices"], Int[Array, " slices"], Int[Array, " slices"], Int[Array, " slices"]]:
    """Computes the arguments of `jax.lax.ragged_all_to_all` for one shard and piece, all buffers being [n · quota].

    A pair's rows are cut into up to `MAX_SLICES_PER_PAIR` slices, those of one pair next to each other.

    Args:
      sent: slots that this shard has for each shard, in all pieces.
      received: slots that each shard has for this one, in all pieces.
      index: the piece's number.
      shard: this shard's number.
      quota: slots of a pair in a piece, at most.

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
    """Holds which slots go where: those of a pair of shards by expert and then by number, `quota` of them a piece."""

    order: Array  # int32 [M · k]: the slots by expert, those without one last
    first: Array  # int32 [n]: where in `order` the slots for each shard begin
    sent: Array  # int32 [n]: how many slots go to each shard
    received: Array  # int32 [n, X]: how many slots come from each shard for each of this shard's experts
    shard: Array  # int32 [M, k]: where each slot goes, n for nowhere
    rank: Array  # int32 [M, k]: the slot's number among those that go to the same shard
    pieces: Array  # int32: how many pieces all shards send
    quota: int = dataclasses.field(metadata={"static": True})
    first_pieces: int = dataclasses.field(metadata={"static": True})  # those of the first round, which no loop sends


def _make_plan(experts, local_experts, axis):
    """Sorts this shard's slots by expert, and tells every shard how many come to it."""
    shards, slots = jax.lax.axis_size(axis), experts.size
    quota = pair_quota(experts.shape[0], experts.shape[1], local_experts, shards)
    round_of = round_pieces(quota, shards)
    quota = -(-quota // round_of)
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
        # Shards of `axis` alone must agree on the pieces; but those of other axes share collectives with them later,
        # and a loop of another length would leave these waiting in different ones.
        pieces=max_statistics(jax.lax.pmax(-(-sent.max() // quota), axis), "tokens"),
        quota=quota,
        first_pieces=round_of if round_of > 1 else 0,
    )


def _leaving_slots(plan, index):
    """Lists the slots [n · quota] that leave in a piece; past a pair's last one any, since no expert awaits them."""
    rank = index * plan.quota + jnp.arange(plan.quota, dtype=jnp.int32)
    return take(plan.order, plan.first[:, None] + rank).reshape(-1)


def _arriving_experts(plan, index):
    """Lists the experts [n · quota] of the rows that arrive in a piece, X where no row arrives."""
    rank = index * plan.quota + jnp.arange(plan.quota, dtype=jnp.int32)
    ends = jnp.cumsum(plan.received, axis=1)
    return jax.vmap(lambda ends: jnp.searchsorted(ends, rank, side="right"))(ends).reshape(-1).astype(jnp.int32)


def _returned_rows(plan, index):
    """Finds the row of a piece's buffer [n · quota] where each slot's result [M, k] comes back.

    It is past the end where the slot goes in another piece, or nowhere.
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


def _exchange_together(arrays, axis):
    """Sends arrays [n · quota, D] side by side: each shard's part of them to that shard."""
    if not arrays:
        return []
    joined = jax.lax.all_to_all(jnp.concatenate(arrays, axis=1), axis, 0, 0, tiled=True)
    return jnp.split(joined, list(itertools.accumulate(each.shape[1] for each in arrays[:-1])), axis=1)


def _exchange_pieces(numbers, axis):
    """Sends one number a slot [n · quota] of each piece, of all pieces at once."""
    joined = jnp.stack(numbers, axis=1)
    return jnp.unstack(jax.lax.all_to_all(joined, axis, 0, 0, tiled=True), axis=1)


def _first_round(plan, axis, leave, run, arrive, sums):
    """Sends the pieces of the first round, and adds up what comes back.

    What one piece brings back and what another takes there go in one exchange, which waits for nothing but the products
    of the piece before: it lasts while the next ones run. XLA has one exchange at a time beside work, and of two would
    leave one without.

    Args:
      plan: the round's.
      axis: the mesh axis.
      leave: gives the rows that leave in a piece, a list of arrays [n · quota, D].
      run: of a piece, what came of it, and the sums gives the sums and a list of arrays to send back.
      arrive: of a piece, what came back of it, and the sums gives the sums.
      sums: what is added to.
    """
    here, made = _exchange_together(leave(0), axis), []
    for index in range(plan.first_pieces):
        leaving = leave(index + 1) if index + 1 < plan.first_pieces else []
        travelled = _exchange_together([*leaving, *made], axis)
        sums, results = run(index, here, sums)
        if made:
            sums = arrive(index - 1, travelled[len(leaving) :], sums)
        here, made = travelled[: len(leaving)], results
    return arrive(plan.first_pieces - 1, _exchange_together(made, axis), sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged_ffn(axis, ragged, x, gates, weights, experts):
    return _exchanged_ffn_fwd(axis, ragged, x, gates, weights, experts)[0]


def _exchanged_ffn_fwd(axis, ragged, x, gates, weights, experts):
    plan = _make_plan(experts, weights[0].shape[0], axis)
    ragged = ragged and not plan.first_pieces
    token, gate = lambda slot: slot // gates.shape[1], lambda slot: take(gates.reshape(-1), slot)

    def run_piece(index, y):
        slot = _leaving_slots(plan, index)
        rows = _exchange(take(x, token(slot)), plan, index, axis, ragged=ragged)
        # One number a row is too little to be worth a ragged exchange.
        row_gates = _exchange(gate(slot), plan, index, axis, ragged=False)
        out = rows_ffn(rows, _arriving_experts(plan, index), row_gates, weights)
        out = _exchange(out, plan, index, axis, ragged=ragged, back=True)
        return arrive(index, [out], y)

    def run(index, rows, y):
        return y, [rows_ffn(rows[0], _arriving_experts(plan, index), row_gates[index], weights)]

    def arrive(index, out, y):
        return y + sum_slots(out[0], _returned_rows(plan, index))

    y = jnp.zeros(x.shape, jnp.float32)
    if plan.first_pieces:
        slots = [_leaving_slots(plan, index) for index in range(plan.first_pieces)]
        row_gates = _exchange_pieces([gate(slot) for slot in slots], axis)
        y = _first_round(plan, axis, lambda index: [take(x, token(slots[index]))], run, arrive, y)
    y = jax.lax.fori_loop(plan.first_pieces, plan.pieces, run_piece, y)
    return y.astype(x.dtype), (x, gates, weights, plan)


def _exchanged_ffn_bwd(axis, ragged, residuals, dy):
    x, gates, weights, plan = residuals
    check_gradients(weights)
    ragged = ragged and not plan.first_pieces
    token, gate = lambda slot: slot // gates.shape[1], lambda slot: take(gates.reshape(-1), slot)

    def run_piece(index, sums):
        dx, dgates, dweights = sums
        slot = _leaving_slots(plan, index)
        rows, drows = (_exchange(take(a, token(slot)), plan, index, axis, ragged=ragged) for a in (x, dy))
        row_gates = _exchange(gate(slot), plan, index, axis, ragged=False)
        row_experts = _arriving_experts(plan, index)
        drows, drow_gates, dweights = rows_gradients(drows, rows, row_experts, row_gates, weights, dweights)
        drows = _exchange(drows, plan, index, axis, ragged=ragged, back=True)
        drow_gates = _exchange(drow_gates, plan, index, axis, ragged=False)
        returned = _returned_rows(plan, index)
        return dx + sum_slots(drows, returned), dgates + take(drow_gates, returned), dweights

    def run(index, came, sums):
        (rows, drows), (dx, dweights) = came, sums
        row_experts = _arriving_experts(plan, index)
        drows, each, dweights = rows_gradients(drows, rows, row_experts, row_gates[index], weights, dweights)
        drow_gates.append(each)
        return (dx, dweights), [drows]

    def arrive(index, drows, sums):
        return sums[0] + sum_slots(drows[0], _returned_rows(plan, index)), sums[1]

    dx, dgates, dweights = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (x, gates, weights))
    if plan.first_pieces:
        slots = [_leaving_slots(plan, index) for index in range(plan.first_pieces)]
        row_gates, drow_gates = _exchange_pieces([gate(slot) for slot in slots], axis), []
        leave = lambda index: [take(a, token(slots[index])) for a in (x, dy)]  # noqa: E731
        dx, dweights = _first_round(plan, axis, leave, run, arrive, (dx, dweights))
        for index, each in enumerate(_exchange_pieces(drow_gates, axis)):
            dgates += take(each, _returned_rows(plan, index))
    dx, dgates, dweights = jax.lax.fori_loop(plan.first_pieces, plan.pieces, run_piece, (dx, dgates, dweights))
    dweights = tuple(d.astype(w.dtype) for d, w in zip(dweights, weights, strict=True))
    return dx.astype(x.dtype), dgates, dweights, None


_exchanged_ffn.defvjp(_exchanged_ffn_fwd, _exchanged_ffn_bwd)
