"""Measures the attention mass that a selection keeps, layer by layer, on one device or on a mesh.

It is the share of dense attention, head-summed and L1-normalised, that lies on the K keys of the selection: measured in
the model run dense, over queries that reach at least 4 K keys. Yardsticks stand beside the indexer: the oracle (top-K
of the attention itself), the last K keys, K random keys, indexers of earlier weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsa_jax import KeyRange, Transformer, dense_attention_target, multihead_attention, select_topk
from dsa_jax.blockwise import map_queries
from dsa_jax.decoder import DecoderLayer, split_stack
from dsa_jax.layers import SharedIndex
from dsa_jax.parallel.collectives import gather_parameters, gather_tokens, slice_tokens
from dsa_jax.parallel.sharding import parameter_specs, place_batch, spec
from dsa_jax.rope import rotation as rope_rotation
from train.data import Batch
from train.phases import window_selection

VALUE_COLUMNS = 64  # of values that nobody wants, the fewest that the attention's kernel takes
MASS_ELEMENTS = 1 << 24  # queries × keys whose attention is alive at a time: 64 MiB for each array
MIN_REACH = 4  # times K: queries that reach fewer keys have too little to choose from

IMPOSED = ("oracle", "window", "random")  # selections that no indexer makes
STREAMS = ("dense", "indexer", *IMPOSED)  # the runs whose losses are compared: all but the first are sparse
STREAM = "of the sparse run"  # the name of its selection among those that are handed on
MAX_SEED = 2**31 - 1  # of a query's random keys

TOKEN = spec("batch", "sequence")  # of arrays [B, T, …] on a mesh


@dataclasses.dataclass(frozen=True)
class KeptMass:
    """Holds the mass kept by selections of `k` keys: `mass[name][selection][layer]`, over `queries[name]` queries.

    Names are those of `HeldOut`; one without a query that reaches far enough is missing in `mass`.
    """

    k: int
    mass: dict[str, dict[str, list[float]]]
    queries: dict[str, int]

    def mean(self, selection: str, part: str) -> float | None:
        """Averages over layers; None where there was no query."""
        return float(np.mean(self.mass[part][selection])) if part in self.mass else None

    def gap_closed(self, selection: str = "indexer", *, part: str) -> list[float | None]:
        """Computes (selection - window) / (oracle - window) of each layer; None where those two keep the same."""
        kept, window, oracle = (self.mass[part][name] for name in (selection, "window", "oracle"))
        return [_ratio(x - w, o - w) for x, w, o in zip(kept, window, oracle, strict=True)]

    def mean_gap_closed(self, selection: str = "indexer", *, part: str) -> float | None:
        """Computes the same of the masses averaged over layers, so that a layer without a gap weighs nothing."""
        if part not in self.mass:
            return None
        kept, window, oracle = (np.mean(self.mass[part][name]) for name in (selection, "window", "oracle"))
        return _ratio(float(kept - window), float(oracle - window))


def _ratio(x: float, y: float) -> float | None:
    return x / y if y > 1e-9 else None


def on_shards(run: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """Has every shard of a mesh run a function on its part of the arguments; without a mesh it is the function."""
    if mesh is None:
        return run
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def measure_layers(
    model: Transformer,
    indexers: Mapping[str, Transformer],
    batch: Batch,
    *,
    rows: Int[np.ndarray, " B"] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Float[Array, "layers B T"]], dict[str, Float[Array, "B T D"]]]:
    """Runs the model dense and over each selection, all abreast, one layer after the other.

    One layer of a kind is compiled whatever the depth, and no selection outlives its layer.

    Args:
      model: the transformer; on a mesh its parameters live where `parameter_shardings` says.
      indexers: models with the backbone of `model`.
      batch: the tokens, on the host; its rows must split over the mesh.
      rows: the rows' numbers, by which random keys are drawn; without it they count from 0.
      seed: of the random keys.
      mesh: the devices; without it one.

    Returns:
      the mass that each selection keeps of the dense run's attention in every layer: of `indexers` and of "oracle",
      "window" and "random"; and what the model's last norm makes of each run, by the names of `STREAMS`. On a mesh the
      tokens stand as `place_batch` puts them.
    """
    place = (lambda tree: tree) if mesh is None else partial(place_batch, mesh=mesh)
    rows = np.arange(len(batch.tokens)) if rows is None else rows
    placed = place(batch)
    x, rotation = _begin(*nnx.split(model), placed, mesh=mesh)
    streams: dict[str, Any] = dict.fromkeys(STREAMS, x)
    masses: list[dict[str, Array]] = []
    chosen: dict[str, Any] = {}  # of the last layer with an indexer, which others may reuse
    for (stack, stacked), *others in zip(model.stacks(), *(each.stacks() for each in indexers.values()), strict=True):
        parts = split_stack(stack, stacked)
        chosen_by = {name: split_stack(*other).indexers for name, other in zip(indexers, others, strict=True)}
        for layer in range(stacked.count):
            seeds = place(_random_seeds(seed, rows, len(masses), batch.tokens.shape[1]))
            graph, number = parts.definition(layer)
            if number is not None:
                chosen = {}
            inputs = streams, chosen, rotation, placed.start, placed.stop, seeds
            states = (parts.indexers if number is not None else None), parts.others
            numbers = 0 if number is None else number, layer
            streams, chosen, mass = _measure_layer(graph, numbers, states, chosen_by, inputs, mesh=mesh)
            masses.append(mass)
    mass = {name: jnp.stack([layer[name] for layer in masses]) for name in masses[0]}
    return mass, {name: model.norm(x) for name, x in streams.items()}


def _random_seeds(seed: int, rows: Int[np.ndarray, " B"], layer: int, length: int) -> Int[np.ndarray, "B T"]:
    """Draws a seed for the random keys of every query, by the numbers of its row and layer alone."""
    draw = lambda row: np.random.default_rng((seed, int(row), layer)).integers(MAX_SEED, size=length)  # noqa: E731
    return np.stack([draw(row) for row in rows]).astype(np.int32)


@partial(jax.jit, static_argnames=("graph", "mesh"))
def _begin(graph, state, batch: Batch, *, mesh: Mesh | None):
    """Looks up the tokens' embeddings, and the rotations of their positions."""

    def begin(state, batch):
        model = nnx.merge(graph, state)
        return model.embed(batch.tokens), rope_rotation(batch.positions, model.config)

    return on_shards(begin, mesh, (parameter_specs(state), TOKEN), TOKEN)(state, batch)


@partial(jax.jit, static_argnames=("graph", "mesh"))
def _measure_layer(graph, numbers, states, chosen_by, inputs, *, mesh: Mesh | None):
    """Runs a layer over every stream, and measures what the selections of it keep.

    `numbers` are those of its indexer and of itself in their stacks; a layer that reuses a selection has no indexer.
    """

    def measure(numbers, states, chosen_by, inputs):
        (own, rest), (number, layer) = states, numbers
        rest = jax.tree.map(lambda x: x[layer], rest)
        own, chosen_by = jax.tree.map(lambda x: x[number], (own, chosen_by if own is not None else {}))
        merge = lambda own: nnx.merge(graph, *(() if own is None else (own,)), rest)  # noqa: E731
        dtype = merge(own).self_attn.config.dtype
        gather = lambda part: gather_parameters(part, dtype=dtype)  # noqa: E731
        own, rest, chosen_by = gather(own), gather(rest), {name: gather(part) for name, part in chosen_by.items()}
        return _run_streams(merge(own), {name: merge(other) for name, other in chosen_by.items()}, *inputs)

    specs = spec(), parameter_specs(states), parameter_specs(chosen_by), TOKEN
    return on_shards(measure, mesh, specs, TOKEN)(numbers, states, chosen_by, inputs)


def _run_streams(
    layer: DecoderLayer, others: Mapping[str, DecoderLayer], streams, reused, rotation, start, stop, seeds
):
    """Runs a layer over this shard's tokens of every stream; finds the selections in the dense one.

    Those that a layer with an indexer made are handed on, to be `reused` by the layers behind it that have none.
    """
    attention, keys = layer.self_attn, KeyRange(start, stop)
    config, inputs = attention.config, layer.input_layernorm(streams["dense"])
    made = {name: other.self_attn(inputs, rotation, keys).selected for name, other in others.items()}
    made |= {name: selected for name, selected in reused.items() if name != STREAM}
    chosen = made | {"window": window_selection(keys, config.index_topk)}
    q, k, reach = attention.queries_and_keys(attention.project(inputs, rotation), keys)
    mine, seeds = jax.tree.map(lambda x: slice_tokens(x, "heads"), (chosen, seeds))
    measured = kept_mass(q, k, reach, mine, seeds, top_k=config.index_topk, scale=config.softmax_scale)
    mass, found = jax.tree.map(lambda x: gather_tokens(x, "heads"), measured)
    options: dict[str, Any] = {"dense": {"attention": "dense"}, "indexer": {"attention": "sparse"}}
    options |= {name: {"attention": "sparse", "selected": (chosen | found)[name]} for name in IMPOSED}
    if attention.indexer is None:
        options = {name: {"shared": SharedIndex(None), **each} for name, each in options.items()}
        options["indexer"]["shared"] = SharedIndex(reused[STREAM])
    outs = {name: layer(x, rotation, keys, **options[name]) for name, x in streams.items()}
    return {name: out.x for name, out in outs.items()}, made | {STREAM: outs["indexer"].selected}, mass


def kept_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    keys: KeyRange,
    selections: Mapping[str, Int[Array, "B T K"]],
    seeds: Int[Array, "B T"],
    *,
    top_k: int,
    scale: float,
) -> tuple[dict[str, Float[Array, "B T"]], dict[str, Int[Array, "B T K"]]]:
    """Computes the attention of each query on selected keys: Σ_{s ∈ S_t} p[t,s], p summed over heads, of norm 1.

    Returns:
      the mass of every selection given and of two found here, "oracle", the `top_k` keys of the highest p, and
      "random", `top_k` of the reachable keys, drawn without replacement by each query's seed; and those two. A query
      without keys keeps 0.
    """
    size = k.shape[1]

    def block(queries, k, sums):
        q, lse, start, stop, selections, seed = queries
        reach = KeyRange(start[None], stop[None])
        p = dense_attention_target(q[None], k[None], lse[None], reach, scale=scale)[0]
        uniform = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (size,)))(seed)
        found = {
            name: select_topk(scores[None], top_k, keys=reach)[0]
            for name, scores in {"oracle": p, "random": uniform}.items()
        }
        mass = {name: _mass_on(p, selected) for name, selected in (selections | found).items()}
        return (mass, found), sums

    lse = attention_lse(q, k, keys, scale=scale)
    queries = (q, lse, keys.start, keys.stop, dict(selections), seeds)
    return map_queries(block, queries, k, block=max(1, MASS_ELEMENTS // size))[0]


def attention_lse(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], keys: KeyRange, *, scale: float
) -> Float[Array, "B T N"]:
    """Computes the log-sum-exp of dense attention alone: of values it takes as few columns as the kernel does."""
    return multihead_attention(q, k, k[..., :VALUE_COLUMNS], keys, scale=scale)[1]


def _mass_on(p: Float[Array, "T S"], selected: Int[Array, "T K"]) -> Float[Array, " T"]:
    present = (selected >= 0) & (selected < p.shape[1])
    return jnp.sum(jnp.where(present, jnp.take_along_axis(p, jnp.where(present, selected, 0), axis=1), 0.0), axis=1)
