"""The compiled steps of a model over pages: what goes into them, what they hand on, and the programs themselves.

Every step is one program of arrays alone, and takes the pools donated.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dsa_jax.cache import Pages
from dsa_jax.inference.sampling import Draw, Kind, Likeliest, Settings, draw, likeliest
from dsa_jax.inference.slots import SlotStep, pack_draw, unpack_rows
from dsa_jax.inference.speculative import Ahead, Drafted, Recent, Verified, drafting_layers, verify_drafts
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import Attention
from dsa_jax.paged import PAGE
from dsa_jax.parallel.collectives import copied_parameters, gather_candidates
from dsa_jax.parallel.sharding import parameter_specs, spec

# XLA copies each layer's weights out of their stack before it multiplies by them, unless the slice goes into the call
# of cuBLAS; Triton's products never take it. Four layers of the 671B shape at batch 16: 2.9 ms a step, 4.8 without.
# Where it joins small products of one operand it copies their weights side by side in every step: 2.65 ms against 2.47.
COMPILER_OPTIONS = {
    "gpu": {
        "xla_gpu_enable_dynamic_slice_fusion": True,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_dot_merger_threshold_mb": 0,
    }
}
SCORED_TOKENS = 128  # whose logits exist at a time where a prompt is scored: 66 MB of 129,280 in float32
NO_STOPS = np.full(1, -1, np.int32)  # where the host judges tokens, a step later: each request has stops of its own
MAX_PROGRAMS = 32  # models and options whose programs are kept


class Options(NamedTuple):
    """Says how a step runs; part of what is compiled."""

    attention: Attention = "sparse"
    return_selected: bool = False
    return_routed: bool = False
    mesh: Mesh | None = None
    predicting: bool = False  # prediction layers keep up with what is taken in, to draft


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Holds the tokens of a step: rows of one sequence, or of several behind each other in the row's pages.

    Attributes:
      tokens: int32 [B, T].
      positions: int32 [B, T], in their sequence: what rotates them.
      start: int32 [B, T], where their sequence begins in the row.
      stop: int32 [B, T], behind their own position in the row; 0 for padding.
      wanted: int32 [B, M], the columns of the tokens whose logits are wanted.
      following: int32 [B, n, T], the token 1, …, n places behind each, -1 where that is not known: for the prediction
        layers that draft.
    """

    tokens: Array | np.ndarray
    positions: Array | np.ndarray
    start: Array | np.ndarray
    stop: Array | np.ndarray
    wanted: Array | np.ndarray
    following: Array | np.ndarray | None = None


class StepOutput(NamedTuple):
    """Holds the results of a step: logits [B, M, vocab], and for every token what was asked for."""

    logits: Array
    selected: Array | None  # int32 [layers, B, T, K], positions of the token's own sequence
    routed: Array | None  # int32 [moe_layers, B, T, k]
    scores: Likeliest | None = None  # [B, T], of the targets
    # Where prediction layers go on from these: [B, M, D], or with those of the n - 1 tokens before each, [B, M, n, D].
    hidden: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """Holds what decode steps hand on, of each row, so that the next need not wait for the host.

    Attributes:
      token: int32 [B], the last one that was drawn, which the next step takes in.
      length: int32 [B], the tokens in the cache.
      number: int32 [B], how many were drawn.
      live: bool [B], whether the row goes on.
    """

    token: Array | np.ndarray
    length: Array | np.ndarray
    number: Array | np.ndarray
    live: Array | np.ndarray


class TurnOutput(NamedTuple):
    """Holds what a turn has drawn, of N tokens a row at most, and what led to it, if that was asked for.

    Attributes:
      count: int32 [B], how many tokens each row has drawn.
      tokens: int32 [N, B].
      log_probs: float32 [N, B], as `Draw` has them; NaN ends a row.
      kept: int32 [N, B, M], the ids that could be drawn, in order, then -1.
      selected: integers [N, layers, B, K], of the tokens as they were taken in: never of the last one of a row.
      routed: integers [N, moe_layers, B, k], of the same tokens.
    """

    count: Array
    tokens: Array
    log_probs: Array
    kept: Array | None
    selected: Array | None
    routed: Array | None


def bucket(size: int, least: int = 1) -> int:
    """Rounds a size up to a power of two, `least` or more, so that few sizes are compiled."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def _forward(graph, options: Options, pools: tuple[Array, Array], state, table, rows: Rows, targets=None):
    """Runs the model on this shard's rows; returns the wanted logits, of its part of the vocabulary, and the pools.

    Targets, int32 [B, T], are tokens to be scored, one behind each token.
    """
    model = nnx.merge(graph, state)
    keys = KeyRange(jnp.asarray(rows.start), jnp.asarray(rows.stop))
    latents, index_keys = pools
    cache = Pages.at(latents, index_keys, table, keys, value_dim=model.config.kv_lora_rank)
    out = model(
        jnp.asarray(rows.tokens),
        keys=keys,
        positions=jnp.asarray(rows.positions),
        attention=options.attention,
        cache=cache,
        return_selected=options.return_selected,
        return_routed=options.return_routed,
        return_indexer_kl=False,
    )
    hidden = jnp.take_along_axis(out.hidden, rows.wanted[..., None], axis=1)
    selected = out.selected
    if selected is not None:  # in the row they stand behind the beginning of their sequence
        selected = jnp.where(selected < 0, -1, selected - rows.start[..., None])
    scores = None if targets is None else _score(model, out.hidden, targets)
    logits, pools = model.unembed(hidden), (out.cache.latents, out.cache.index_keys)
    if rows.following is not None:
        hidden, pools = _keep_up(model, options, pools, out.hidden, table, rows)
    return StepOutput(logits, selected, out.routed, scores, hidden if options.predicting else None), pools


def _keep_up(model, options: Options, pools, hidden, table, rows: Rows):
    """Writes the entries of prediction layers whose tokens are known; returns hidden states to go on from and pools."""
    following, positions = jnp.asarray(rows.following), jnp.asarray(rows.positions)
    depths, by_depth = following.shape[1], hidden
    for depth in range(1, depths + 1):
        known = following[:, depth - 1] >= 0
        keys = KeyRange(jnp.asarray(rows.start), jnp.where(known, rows.stop, rows.start))
        pages = Pages.at(*pools, table, keys, value_dim=model.config.kv_lora_rank)
        arguments: dict[str, Any] = dict(positions=positions, attention=options.attention, cache=pages, depth=depth)
        tokens = jnp.where(known, following[:, depth - 1], 0)
        by_depth, cache = model.predict(by_depth, tokens, keys=keys, **arguments)
        pools = cache.latents, cache.index_keys
    columns = jnp.maximum(rows.wanted[..., None] - jnp.arange(depths - 1, -1, -1), 0)
    last = jnp.take_along_axis(hidden, columns.reshape(len(columns), -1, 1), axis=1)
    return last.reshape(*columns.shape, -1), pools


def _draft_on(
    graph, options: Options, pools, hidden, recent: Recent | None, ahead: Ahead, state, table, settings,
    *, kind: Kind, most: int,
):  # fmt: skip
    """Drafts the tokens behind those that were drawn, by one prediction layer after the other.

    The tokens that were drawn are taken in where they stand, and so are drafts by the layers past the first, which join
    them to the same columns. What the last layer drafts of its own output is taken in behind them as far as a row has
    room. All of that is written over. Each draft is drawn as the token itself will be, from the same random numbers, so
    that close distributions draw the same token. Returns the drafts, what to hand to the next call, and the pools.
    """
    ahead = jax.tree.map(jnp.asarray, ahead)
    depths, room = min(drafting_layers(nnx.merge(graph, state).config), most), ahead.room[:, None]
    ahead = dataclasses.replace(ahead, tokens=ahead.tokens.reshape(len(hidden), -1))
    if recent is not None:
        hidden, ahead = _last_columns(hidden, recent, ahead)
        at = ahead.taken[:, None] + jnp.arange(1 - recent.tokens.shape[1], 1)
        recent = Recent(jnp.take_along_axis(hidden, at[..., None], 1), jnp.take_along_axis(ahead.tokens, at, 1))

    rows, width = jnp.arange(len(hidden)), hidden.shape[1]
    taken, columns, drafts = ahead.taken[:, None], jnp.arange(width, dtype=jnp.int32), []
    last, positions = hidden, ahead.length[:, None] + columns
    is_real = (columns <= taken) & (positions >= 0) & (room > 0)
    behind = jnp.pad(ahead.tokens, ((0, 0), (0, depths - 1)))  # column c: what layer k joins to c + 1 - k
    for draft in range(1, most + 1):
        if draft <= depths:
            tokens = behind[:, draft - 1 : draft - 1 + width]
            inputs = hidden, tokens, positions, is_real, room, taken
        else:
            place = ahead.length[:, None] + taken + draft - depths
            inputs = last, drafts[-1][:, None], place, room > 0, room, jnp.zeros_like(taken)
        hidden, last, logits, pools = _predict_on(graph, options, pools, state, table, inputs, min(draft, depths))
        number = jnp.asarray(ahead.number) + ahead.taken + draft
        drafts.append(draw(logits, settings, number, kind=kind).token)
        if draft < depths:
            behind = behind.at[rows, ahead.taken + draft].set(drafts[-1])
    return *_everywhere(options.mesh, (jnp.stack(drafts, axis=1), recent)), pools


def _predict_on(graph, options: Options, pools, state, table, inputs, depth: int):
    """Runs a prediction layer on columns of every row, and writes their entries, as far as a row has room.

    Args:
      inputs: hidden states [B, T, D], tokens, positions, and which are real [B, T]; the room of each row and the
        column that is wanted of it, [B, 1].
      depth: which layer, from 1.

    Returns:
      hidden states, [B, T, D] and of the wanted columns [B, 1, D], logits of these, [B, vocab], and the pools.
    """

    def predict(pools, state, table, inputs):
        hidden, tokens, positions, is_real, room, wanted = inputs
        model = nnx.merge(graph, state)
        keys = KeyRange(jnp.zeros_like(positions), jnp.where(is_real, jnp.minimum(positions + 1, room), 0))
        pages = Pages.at(pools[0], pools[1], table, keys, value_dim=model.config.kv_lora_rank)
        pages = dataclasses.replace(pages, slots=jnp.where(positions < room, pages.slots, -1))
        arguments: dict[str, Any] = dict(positions=positions, attention=options.attention, cache=pages, depth=depth)
        hidden, cache = model.predict(hidden, tokens, keys=keys, **arguments)
        last = jnp.take_along_axis(hidden, wanted[..., None], axis=1)
        return hidden, last, model.unembed(last)[:, 0], (cache.latents, cache.index_keys)

    row = spec("rows")
    run = _on_shards(options.mesh, predict, state, (row,), (row, row, spec("rows", "vocabulary")))
    return run(pools, state, table, inputs)


def _last_columns(hidden, recent: Recent, ahead: Ahead) -> tuple[Array, Ahead]:
    """Puts recent columns before the new ones, and takes T or n of them, whichever is more, to the last that counts.

    Every entry of a layer that was not of true tokens is among these, and a step has no more columns than it verifies.
    """
    kept = recent.tokens.shape[1]
    width = max(hidden.shape[1], kept + 1)
    begin = jnp.maximum(ahead.taken + kept + 1 - width, 0)
    at = begin[:, None] + jnp.arange(width)
    hidden = jnp.take_along_axis(jnp.concatenate([recent.hidden, hidden], axis=1), at[..., None], axis=1)
    tokens = jnp.take_along_axis(jnp.concatenate([recent.tokens, ahead.tokens], axis=1), at, axis=1)
    earlier = kept - begin
    taken, length, number = ahead.taken + earlier, ahead.length - earlier, ahead.number - earlier
    return hidden, Ahead(tokens, taken, length, number, ahead.room)


def _score(model, hidden, targets) -> Likeliest:
    """Scores a target a token, [B, T], some tokens at a time: logits of all of them would be T × vocabulary."""
    count = targets.size
    blocks = -(-count // SCORED_TOKENS)
    padding = blocks * SCORED_TOKENS - count
    hidden = jnp.pad(hidden.reshape(count, -1), ((0, padding), (0, 0))).reshape(blocks, SCORED_TOKENS, -1)
    blocked = jnp.pad(targets.reshape(-1), (0, padding)).reshape(blocks, SCORED_TOKENS)

    def score(block):
        logits = gather_candidates(model.unembed(block[0])[None], "vocabulary")[0]
        return likeliest(logits, block[1])

    scores = jax.lax.map(score, (hidden, blocked))
    restore = lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*targets.shape, *x.shape[2:])  # noqa: E731
    return jax.tree.map(restore, scores)


def _forward_on(graph, options: Options, pools, state, table, rows, targets=None):
    """Runs `_forward` on one device, or on every shard of a mesh."""
    row, layer = spec("rows"), spec(None, "rows")
    selected, routed = (layer if wanted else None for wanted in (options.return_selected, options.return_routed))
    scored, hidden = None if targets is None else row, row if options.predicting else None
    specs: Any = spec("rows", None, "vocabulary"), selected, routed, scored, hidden
    run = _on_shards(options.mesh, partial(_forward, graph, options), state, (row, scored), (StepOutput(*specs),))
    return run(pools, state, table, rows, targets)


def _on_shards(mesh: Mesh | None, run: Callable, state, inputs: tuple, outputs: tuple) -> Callable:
    """Has a function run on every shard of a mesh, which has parameters whole; on one device it is left as it is.

    Args:
      run: takes pools, the state, a table, and more; returns arrays, and the pools last.
      state: the parameters.
      inputs: partitions of the arrays behind the table.
      outputs: those of what stands before the pools.
    """
    if mesh is None:
        return run

    def run_shard(*arguments):
        with copied_parameters():
            return run(*arguments)

    pools = spec(None, "pool"), spec(None, "pool")
    return jax.shard_map(
        run_shard,
        mesh=mesh,
        in_specs=(pools, parameter_specs(state, copies=True), spec("rows", "pages"), *inputs),
        out_specs=(*outputs, pools),
        check_vma=False,
    )


def _everywhere[T](mesh: Mesh | None, arrays: T) -> T:
    """Has every device get what a step hands on: wherever else it was, the next would be compiled for that anew."""
    return arrays if mesh is None else jax.lax.with_sharding_constraint(arrays, NamedSharding(mesh, spec()))


def _decode_on(graph, options: Options, pools, carry: Carry, state, table, settings, stops, controls, *, kind: Kind):
    """Takes in each row's last token and draws the next."""
    length = carry.length[:, None]
    zero = jnp.zeros_like(length)
    rows = Rows(carry.token[:, None], length, zero, jnp.where(carry.live[:, None], length + 1, 0), zero)
    out, pools = _forward_on(graph, options, pools, state, table, rows)
    drawn = draw(out.logits[:, 0], settings, jnp.asarray(carry.number), kind=kind, controls=controls)
    taken = dataclasses.replace(carry, length=carry.length + carry.live)
    return _everywhere(options.mesh, _advance(taken, drawn, stops)), drawn, out, pools


def _decode_slots_on(graph, options: Options, pools, last, state, packed, table, controls, *, kind: Kind):
    """Takes in the last token of each row's slot and draws the next, which is kept there."""
    slots, length, number, live, settings = unpack_rows(jnp.asarray(packed))
    carry = Carry(last[slots], length, number, live)
    _, drawn, out, pools = _decode_on(
        graph, options, pools, carry, state, table, settings, NO_STOPS, controls, kind=kind
    )
    left = last.at[slots].set(drawn.token), drawn.token, pack_draw(drawn)
    last, token, packed = _everywhere(options.mesh, left)
    return SlotStep(last, dataclasses.replace(drawn, token=token), packed), out, pools


def _verify_on(graph, options: Options, pools, drafted: Drafted, state, table, settings, controls, *, kind: Kind):
    """Takes in each row's last token and its drafts, and draws behind each of them."""
    columns = jnp.arange(drafted.tokens.shape[1], dtype=jnp.int32)
    real = columns < drafted.count[:, None]
    positions = jnp.where(real, drafted.length[:, None] + columns, 0)
    wanted = jnp.broadcast_to(columns, real.shape)
    rows = Rows(drafted.tokens, positions, jnp.zeros_like(positions), jnp.where(real, positions + 1, 0), wanted)
    out, pools = _forward_on(graph, options, pools, state, table, rows)
    verified = verify_drafts(out.logits, drafted, settings, kind=kind, controls=controls)
    left = verified.drawn.token, verified.taken, verified.last, out.hidden
    token, taken, last, hidden = _everywhere(options.mesh, left)
    verified = Verified(dataclasses.replace(verified.drawn, token=token), taken, last)
    return verified, out._replace(hidden=hidden), pools


def _turn_on(
    graph, options: Options, pools, logits, carry: Carry, state, table, settings, stops, limit,
    *, kind: Kind, most: int, kept: int,
):  # fmt: skip
    """Draws of each row until it has stopped or has its limit of tokens; the host is not asked in between.

    Args:
      logits: [B, vocab], behind what the cache holds.
      limit: int32 [B], tokens of each row, from 1 to `most`.
      most: N.
      kept: M, or 0 where kept sets are not wanted.
    """
    position = jnp.int16 if table.shape[1] * PAGE < 2**15 else jnp.int32

    def decode(pools, carry):
        carry, drawn, out, pools = _decode_on(
            graph, options, pools, carry, state, table, settings, stops, None, kind=kind
        )
        dtypes = dict(selected=position, routed=jnp.int16)
        taken_in = {name: getattr(out, name) for name in dtypes}
        found = {name: x[:, :, 0].astype(dtypes[name]) for name, x in taken_in.items() if x is not None}
        return carry, drawn, found, pools

    def of_draw(carry, drawn):
        values = dict(tokens=carry.token, log_probs=drawn.log_prob)
        return values | (dict(kept=list_kept(drawn.kept, kept)) if kept else {})

    def put(buffers, number, values):
        return buffers | {name: buffers[name].at[number].set(value) for name, value in values.items()}

    def within(carry, count):
        return dataclasses.replace(carry, live=carry.live & (count < limit))

    def step(turn):
        number, carry, count, buffers, pools = turn
        count = count + carry.live
        carry, drawn, found, pools = decode(pools, carry)
        buffers = put(put(buffers, number, of_draw(carry, drawn)), number - 1, found)
        return number + 1, within(carry, count), count, buffers, pools

    carry = jax.tree.map(jnp.asarray, carry)
    drawn, count = draw(logits, settings, jnp.asarray(carry.number), kind=kind), jnp.asarray(carry.live, jnp.int32)
    carry = _everywhere(options.mesh, within(_advance(carry, drawn, stops), count))
    first, shapes = of_draw(carry, drawn), jax.eval_shape(decode, pools, carry)[2]
    buffers = {name: jnp.zeros((most, *x.shape), x.dtype) for name, x in (shapes | first).items()}
    going = lambda turn: (turn[0] < most) & jnp.any(turn[1].live)  # noqa: E731
    turn = jnp.int32(1), carry, count, put(buffers, 0, first), pools
    _, _, count, buffers, pools = jax.lax.while_loop(going, step, turn)
    found: dict[str, Any] = dict.fromkeys(("kept", "selected", "routed")) | buffers
    return TurnOutput(count=jnp.asarray(count), **found), pools


def list_kept(kept: Array, width: int) -> Array:
    """Lists the ids of each row of a mask [B, vocab], the lowest first, then -1: int32 [B, width]."""
    place = jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1
    rows, ids = jnp.arange(len(kept))[:, None], jnp.arange(kept.shape[1], dtype=jnp.int32)
    listed = jnp.full((len(kept), width), -1, jnp.int32)
    return listed.at[rows, jnp.where(kept, place, width)].set(jnp.broadcast_to(ids, kept.shape), mode="drop")


@partial(jax.jit, static_argnums=0, static_argnames="kind")
def draw_first(mesh: Mesh | None, logits, length, settings: Settings, stops, live, *, kind: Kind):
    """Draws the first token of each row, from the logits of its prompt."""
    zero = jnp.zeros_like(length)
    drawn = draw(logits, settings, zero, kind=kind)
    return _everywhere(mesh, _advance(Carry(zero, length, zero, live), drawn, stops)), drawn


def _advance(carry: Carry, drawn: Draw, stops) -> Carry:
    """Counts what was drawn; a row that has stopped keeps its last token."""
    token = jnp.where(carry.live, drawn.token, carry.token)
    # Of NaN logits every log-probability is NaN: such a row ends here, and the others go on.
    live = carry.live & ~jnp.any(token[:, None] == stops, axis=-1) & ~jnp.isnan(drawn.log_prob)
    return Carry(token, carry.length, carry.number + 1, live)


class Programs(NamedTuple):
    """Holds the compiled steps of a model: functions of arrays alone, the parameters as a flat list."""

    prefill: Callable  # (pools, parameters, table, rows, targets=None) -> (StepOutput, pools)
    # (pools, carry, parameters, table, settings, stops, kind, controls=None) -> (Carry, Draw, StepOutput, pools)
    decode: Callable
    # (pools, last, parameters, packed, table, kind, controls=None) -> (SlotStep, StepOutput, pools)
    decode_slots: Callable
    # (pools, drafted, parameters, table, settings, kind, controls=None) -> (Verified, StepOutput, pools)
    verify: Callable
    # (pools, logits, carry, parameters, table, settings, stops, limit, kind, most, kept) -> (TurnOutput, pools)
    turn: Callable
    # (pools, hidden, recent, ahead, parameters, table, settings, kind, most) -> (drafts, Recent | None, pools)
    draft: Callable


@lru_cache(maxsize=MAX_PROGRAMS)
def programs(graph, tree, options: Options) -> Programs:
    """Makes the programs of a model's steps, the same for the same model and options.

    A step at a time takes but a few milliseconds, so the host must not go through a model's description at every call:
    hashing it and flattening its state took longer than a step of four layers.
    """

    def prefill(pools, parameters, table, rows, targets=None):
        return _forward_on(graph, options, pools, jax.tree.unflatten(tree, parameters), table, rows, targets)

    def decode(pools, carry, parameters, table, settings, stops, kind, controls=None):
        state = jax.tree.unflatten(tree, parameters)
        return _decode_on(graph, options, pools, carry, state, table, settings, stops, controls, kind=kind)

    def decode_slots(pools, last, parameters, packed, table, kind, controls=None):
        state = jax.tree.unflatten(tree, parameters)
        return _decode_slots_on(graph, options, pools, last, state, packed, table, controls, kind=kind)

    def verify(pools, drafted, parameters, table, settings, kind, controls=None):
        state = jax.tree.unflatten(tree, parameters)
        return _verify_on(graph, options, pools, drafted, state, table, settings, controls, kind=kind)

    def turn(pools, logits, carry, parameters, table, settings, stops, limit, kind, most, kept):
        state, sizes = jax.tree.unflatten(tree, parameters), dict(kind=kind, most=most, kept=kept)
        return _turn_on(graph, options, pools, logits, carry, state, table, settings, stops, limit, **sizes)

    def draft(pools, hidden, recent, ahead, parameters, table, settings, kind, most):
        state = jax.tree.unflatten(tree, parameters)
        return _draft_on(graph, options, pools, hidden, recent, ahead, state, table, settings, kind=kind, most=most)

    compile = partial(jax.jit, compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
    return Programs(
        compile(prefill, donate_argnums=0),
        compile(decode, donate_argnums=0, static_argnums=6),
        compile(decode_slots, donate_argnums=(0, 1), static_argnums=5),
        compile(verify, donate_argnums=0, static_argnums=5),
        compile(turn, donate_argnums=0, static_argnums=(8, 9, 10)),
        compile(draft, donate_argnums=0, static_argnums=(7, 8)),
    )


def padding_settings(rows: int, vocab: int) -> Settings:
    """Makes the settings of rows that nobody reads: greedy."""
    return Settings(
        np.zeros(rows, np.float32), np.full(rows, vocab, np.int32), np.ones(rows, np.float32), np.zeros(rows, np.uint32)
    )
