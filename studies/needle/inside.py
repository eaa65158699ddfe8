"""Looks inside a model: how far away the attention lies, what selections keep of it there, and which layers agree.

Everything is measured in the model run dense, for some queries of each row, and averaged over these and over heads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from dsa_jax import KeyRange, Transformer, dense_attention_target, select_topk
from dsa_jax.blockwise import map_queries
from dsa_jax.decoder import DecoderLayer
from dsa_jax.layers import SharedIndex
from dsa_jax.rope import rotation as rope_rotation
from train.data import Batch
from train.evaluation.kept_mass import MASS_ELEMENTS, attention_lse
from train.phases import window_selection

SELECTIONS = ("indexer", "oracle", "window")
NEAREST = 256  # keys of the first range of distances; every further one is as long as all before it


@dataclasses.dataclass(frozen=True)
class Inside:
    """Holds what was seen of one kind of queries.

    Attributes:
      distances: the ends of the ranges of distances between a query and its keys.
      mass: by "all" keys and by selection, the attention mass of each layer that lies in each range
        [layers][distances].
      overlap: the share of what a layer's indexer selects that another's selects too [layers][layers].
      queries: how many were measured.
    """

    distances: tuple[int, ...]
    mass: dict[str, list[list[float]]]
    overlap: list[list[float]]
    queries: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Reads what JSON has kept."""
        return cls(**{**values, "distances": tuple(values["distances"])})


def look_inside(model: Transformer, rows: Sequence[tuple[Batch, Integer[np.ndarray, " n"]]]) -> Inside:
    """Measures some queries of some rows, one row after the other.

    Args:
      model: the transformer.
      rows: batches of one row each, and the places of the queries in it; all rows have equally many.
    """
    ends = distance_ends(rows[0][0].tokens.shape[1])
    mass: dict[str, Any] = {}
    overlap = 0.0
    for batch, places in rows:
        found, shared = _look_at_row(model, batch, jnp.asarray(places, jnp.int32), ends)
        overlap = overlap + np.asarray(shared, np.float64) / len(rows)
        for name, each in found.items():
            mass[name] = mass.get(name, 0.0) + np.asarray(each, np.float64) / len(rows)
    queries = sum(len(places) for _, places in rows)
    return Inside(ends, {name: each.tolist() for name, each in mass.items()}, np.asarray(overlap).tolist(), queries)


def distance_ends(length: int) -> tuple[int, ...]:
    """Ends ranges of distances that double, so that the last one ends at a row's length.

    Examples:
      >>> distance_ends(2048)
      (256, 512, 1024, 2048)
    """
    ends = [length]
    while ends[-1] > NEAREST:
        ends.append(-(-ends[-1] // 2))
    return tuple(reversed(ends))


def far_queries(length: int, reach: int, count: int) -> Int[np.ndarray, " n"]:
    """Spreads queries over the places of a row that reach at least `reach` keys, or over its second half."""
    first = min(reach - 1, length // 2)
    return np.unique(np.linspace(first, length - 1, count).astype(np.int32))


def _look_at_row(model: Transformer, batch: Batch, places: Array, ends: tuple[int, ...]):
    """Runs the model dense, layer by layer; gives mass by name [layers, distances] and overlap [layers, layers]."""
    x, rotation = model.embed(jnp.asarray(batch.tokens)), rope_rotation(jnp.asarray(batch.positions), model.config)
    mass, chosen = [], []
    shared = None
    for layer in model.layers():
        shared = None if layer.self_attn.indexer is not None else shared
        x, shared, found, own = _look_at_layer(*nnx.split(layer), (x, rotation, batch.keys), shared, places, ends)
        mass.append(found)
        chosen.append(own)
    return {name: jnp.stack([each[name] for each in mass]) for name in mass[0]}, _overlap(jnp.stack(chosen))


@partial(jax.jit, static_argnames=("graph", "ends"))
def _look_at_layer(graph, state, inputs, shared: SharedIndex | None, places: Array, ends: tuple[int, ...]):
    x, rotation, keys = inputs
    layer = nnx.merge(graph, state)
    options: dict[str, Any] = dict(shared=shared, return_indexer_kl=False)
    out = layer.self_attn(layer.input_layernorm(x), rotation, keys, return_selected=True, **options)
    found, chosen = _mass_of_layer(layer, layer.input_layernorm(x), rotation, keys, out.selected, places, ends)
    shared = SharedIndex(out.selected)
    return layer(x, rotation, keys, attention="dense", **options).x, shared, found, chosen


def _mass_of_layer(
    layer: DecoderLayer, x, rotation, keys: KeyRange, selected, places: Array, ends: tuple[int, ...]
) -> tuple[Mapping[str, Float[Array, " ranges"]], Bool[Array, "n S"]]:
    """Measures one layer: the mean mass by name and range, and which keys its indexer selects for each query."""
    attention = layer.self_attn
    k_of, scale = attention.config.index_topk, attention.config.softmax_scale
    q, k, reach = attention.queries_and_keys(attention.project(x, rotation), keys)
    window = window_selection(keys, k_of)
    size = k.shape[1]

    def block(queries, k, sums):
        q, lse, start, stop, place, selected, window = queries
        reach = KeyRange(start[None], stop[None])
        p = dense_attention_target(q[None], k[None], lse[None], reach, scale=scale)[0]
        oracle = select_topk(p[None], k_of, keys=reach)[0]
        of = {"indexer": _mask(selected, size), "oracle": _mask(oracle, size), "window": _mask(window, size)}
        distance = place[:, None] - jnp.arange(size)
        within = [(distance >= low) & (distance < high) for low, high in zip((0, *ends), ends, strict=False)]
        by_range = lambda mass: jnp.stack([jnp.sum(jnp.where(each, mass, 0.0), axis=1) for each in within], axis=1)  # noqa: E731
        found = {"all": by_range(p), **{name: by_range(jnp.where(mask, p, 0.0)) for name, mask in of.items()}}
        return (found, of["indexer"]), sums

    take = lambda array: array[:, places]  # noqa: E731
    q, reach = take(q), KeyRange(take(reach.start), take(reach.stop))
    lse = attention_lse(q, k, reach, scale=scale)
    queries = q, lse, reach.start, reach.stop, places[None], take(selected), take(window)
    found, chosen = map_queries(block, queries, k, block=max(1, MASS_ELEMENTS // size))[0]
    return {name: jnp.mean(each[0], axis=0) for name, each in found.items()}, chosen[0]


def _mask(selected: Int[Array, "n K"], size: int) -> Bool[Array, "n S"]:
    """Marks the keys that are selected; -1 is none."""
    at = jnp.where(selected < 0, size, selected)
    return jax.vmap(lambda own: jnp.zeros(size, bool).at[own].set(True, mode="drop"))(at)


@jax.jit
def _overlap(chosen: Bool[Array, "layers n S"]) -> Float[Array, "layers layers"]:
    """Gives the share of the keys of each layer that each other selects too, averaged over queries."""
    marks = chosen.astype(jnp.float32)
    shared = jnp.einsum("ans,bns->abn", marks, marks, precision="highest")
    return jnp.mean(shared / jnp.maximum(jnp.sum(marks, axis=-1), 1)[:, None], axis=-1)
