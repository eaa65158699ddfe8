"""Measures a trained model: its loss on held-out text, and the attention mass that a selection keeps.

The mass kept by a selection is the share of dense attention, head-summed and L1-normalised, that lies on its K keys. It
is measured in the model run dense, layer by layer, over queries that reach at least 4 K keys. Yardsticks stand beside
the indexer: the oracle (top-K of the attention itself), the last K keys, K random keys, indexers of earlier weights.
"""

import dataclasses
import itertools
import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsa_jax import KeyRange, Transformer, select_topk
from dsa_jax.blockwise import contract, map_queries, queries_per_block
from dsa_jax.layers import Rotation
from dsa_jax.model import DecoderLayer
from dsa_jax.rope import rotation as rope_rotation
from train.data import Batch, BatchSource, Corpus
from train.losses import token_losses
from train.phases import PHASES, Params, Selection, merge_groups, run_model, window_selection

MIN_REACH = 4  # times K: queries that reach fewer keys have too little to choose from

IMPOSED = ("oracle", "window", "random")  # selections that no indexer makes
STREAMS = ("dense", "indexer", *IMPOSED)  # the runs whose losses are compared: all but the first are sparse
MIXTURE = "all"  # the name of the mixture of the parts, where there is one

type ByPart = dict[str, float | None]  # one number for each name of `HeldOut.names`, None where there was nothing


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Holds the batches that a model is measured on, by part.

    Args:
      parts: the batches of each part.
      subsets: of a part, further numbers by name: of the tokens [B, T] that a mask of each of its batches marks.
      mixture: weights of the parts in "all", which is what training sees; without them there is no "all".

    Raises:
      ValueError: if a subset or a weight is of no part, or a part has not a mask for each batch.

    Examples:
      >>> from train.data import DataConfig, load
      >>> corpus = load(DataConfig(data=("books/*.txt",)))
      >>> held_out = HeldOut({"text": draw_batches(corpus, 4, batch_size=4, seq_len=512)})
    """

    parts: Mapping[str, tuple[Batch, ...]]
    subsets: Mapping[str, Mapping[str, tuple[Bool[np.ndarray, "B T"], ...]]] = types.MappingProxyType({})
    mixture: Mapping[str, float] = types.MappingProxyType({})

    def __post_init__(self):
        unknown = (self.subsets.keys() | self.mixture.keys()) - self.parts.keys()
        if unknown:
            raise ValueError(f"subsets and mixture must be of the parts {[*self.parts]}, got {sorted(unknown)}")
        for part, masks in self.subsets.items():
            if any(len(each) != len(self.parts[part]) for each in masks.values()):
                raise ValueError(f"the subsets of {part} must have a mask for each batch, of {len(self.parts[part])}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which something is measured: the mixture, then each part and its subsets."""
        parts = [name for part in self.parts for name in (part, *self.subsets.get(part, ()))]
        return (MIXTURE, *parts) if self.mixture else tuple(parts)

    def batches(self) -> Iterator[tuple[Batch, dict[str, Bool[np.ndarray, "B T"]]]]:
        """Yields each batch with the tokens that count for each name it belongs to."""
        for part, batches in self.parts.items():
            for number, batch in enumerate(batches):
                masks = {name: masks[number] for name, masks in self.subsets.get(part, {}).items()}
                yield batch, {part: np.ones(batch.tokens.shape, bool), **masks}

    def mix(self, values: Mapping[str, Any]) -> Any:
        """Computes a number of the mixture from those of the parts; None where one of them has none."""
        if not self.mixture or any(values.get(part) is None for part in self.mixture):
            return None
        return sum(weight * values[part] for part, weight in self.mixture.items())


def draw_batches(
    corpus: Corpus, batches: int, batch_size: int, seq_len: int, *, seed: int = 0, source: BatchSource | None = None
) -> tuple[Batch, ...]:
    """Takes up to `batches` held-out batches, no window of the text twice: what is little is measured once.

    Args:
      corpus: the text.
      batches: how many at most.
      batch_size: sequences of each.
      seq_len: tokens of a sequence.
      seed: of their order.
      source: makes the batches of the text; without it they are the text itself.

    Raises:
      ValueError: if `batches` is below 1, or the text is shorter than a sequence.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    windows = (corpus.tokens("held_out") - 1) // seq_len
    found = (source or corpus).batches("held_out", batch_size=batch_size, seq_len=seq_len, seed=seed)
    return tuple(itertools.islice(found, min(batches, max(1, windows // batch_size))))


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


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Holds all that is measured on one run's weights."""

    losses: dict[str, ByPart]
    """Held-out losses by weights and attention."""
    selections: dict[str, ByPart]
    """Held-out losses of the final weights by selection."""
    kept: KeptMass

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the held-out parts in their order; the first stands for all."""
        return tuple(next(iter(self.selections.values())))


def _ratio(x: float, y: float) -> float | None:
    return x / y if y > 1e-9 else None


def evaluate_run(
    graphdef: nnx.GraphDef,
    held_out: HeldOut,
    *,
    initial: Params,
    base: Params,
    warmed: Params,
    final: Params,
    controls: Mapping[str, Params] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluates a run.

    Args:
      graphdef: the model's definition.
      held_out: what it is measured on.
      initial: the weights that the run began with.
      base: those after BASE.
      warmed: those after WARMUP.
      final: those at its end.
      controls: those of its controls, by the names of their phases.
      seed: of the random selections.
    """
    indexers = {"warmed": warmed["indexer"], "untrained": initial["indexer"]}
    kept, selections = measure_selections(graphdef, final, held_out, indexers=indexers, seed=seed)
    losses = {
        "after BASE, dense": held_out_losses(graphdef, base, held_out, attention="dense"),
        "after WARMUP, sparse": held_out_losses(graphdef, warmed, held_out, attention="sparse"),
        "final, sparse": selections["indexer"],
        "final, dense": selections["dense"],
    }
    for name, params in (controls or {}).items():
        phase = PHASES[name]
        label = f"{name}, {'last K keys' if phase.selection is window_selection else phase.attention}"
        losses[label] = held_out_losses(
            graphdef, params, held_out, attention=phase.attention, selection=phase.selection
        )
    return Evaluation(losses, selections, kept)


def held_out_losses(
    graphdef: nnx.GraphDef,
    params: Params,
    held_out: HeldOut,
    *,
    attention: Literal["dense", "sparse"],
    selection: Selection | None = None,
) -> ByPart:
    """Computes the mean cross-entropy a target, in nats, of every name of `held_out`.

    `selection` makes what every layer selects, as in `train.phases.Phase`.
    """
    totals = _LossTotals()
    for batch, masks in held_out.batches():
        totals.add(_model_losses(graphdef, params, batch, masks, attention=attention, selection=selection))
    return totals.means(held_out)


def measure_selections(
    graphdef: nnx.GraphDef,
    params: Params,
    held_out: HeldOut,
    *,
    indexers: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[KeptMass, dict[str, ByPart]]:
    """Measures what selections keep of the dense attention, and what the model loses when it attends to them alone.

    Args:
      graphdef: the model's definition.
      params: the weights measured; their own indexer appears as "indexer".
      held_out: the batches.
      indexers: the "indexer" group of other weights by name, each put into the same backbone; kept mass alone.
      seed: of the random selections.

    Returns:
      the kept mass of "indexer", `indexers`, "oracle", "window" and "random", and the held-out losses with attention
      "dense" and over the selections "indexer", "oracle", "window" and "random". The oracle imposed is the dense run's.
    """
    masses, losses = _MassTotals(), {name: _LossTotals() for name in STREAMS}
    groups = {"indexer": params["indexer"], **(indexers or {})}
    model = merge_groups(graphdef, params)
    models = {name: merge_groups(graphdef, {**params, "indexer": indexer}) for name, indexer in groups.items()}
    for i, (batch, masks) in enumerate(held_out.batches()):
        mass, hidden = measure_layers(model, models, batch, jax.random.fold_in(jax.random.key(seed), i))
        masses.add(batch, masks, mass, model.config.index_topk)
        for name, total in losses.items():
            total.add(_hidden_losses(graphdef, params, hidden[name], batch, masks))
    kept = masses.kept(held_out, model.config.index_topk)
    return kept, {name: total.means(held_out) for name, total in losses.items()}


def measure_layers(
    model: Transformer, indexers: Mapping[str, Transformer], batch: Batch, random: Array
) -> tuple[dict[str, Float[np.ndarray, "layers B T"]], dict[str, Float[Array, "B T D"]]]:
    """Runs the model dense and over each selection, all abreast, one layer after the other.

    One layer of a kind is compiled whatever the depth, and no selection outlives its layer. `indexers` are models with
    the backbone of `model`.

    Returns:
      the mass that each selection keeps of the dense run's attention in every layer: of `indexers` and of "oracle",
      "window" and "random"; and what the model's last norm makes of each run, by the names of `STREAMS`.
    """
    keys = batch.keys
    rotation = rope_rotation(jnp.asarray(batch.positions), model.config)
    x = model.embed_tokens[...][jnp.asarray(batch.tokens)].astype(model.config.dtype)
    streams, masses = dict.fromkeys(STREAMS, x), []
    stacked = zip(model.layers(), *(other.layers() for other in indexers.values()), strict=True)
    for number, (layer, *others) in enumerate(stacked):
        graph, state = nnx.split(layer)
        states = {name: nnx.split(other)[1] for name, other in zip(indexers, others, strict=True)}
        streams, mass = _measure_layer(
            graph, state, states, streams, rotation, keys, jax.random.fold_in(random, number)
        )
        masses.append(jax.device_get(mass))
    mass = {name: np.stack([layer[name] for layer in masses]) for name in masses[0]}
    return mass, {name: model.norm(x) for name, x in streams.items()}


@partial(jax.jit, static_argnames="graph")
def _measure_layer(graph, state, states, streams, rotation: Rotation, keys: KeyRange, random: Array):
    layer: DecoderLayer = nnx.merge(graph, state)
    inputs = layer.input_layernorm(streams["dense"])
    config = layer.self_attn.config
    chosen = {
        name: nnx.merge(graph, other).self_attn(inputs, rotation, keys, attention="sparse").selected
        for name, other in states.items()
    }
    chosen["window"] = window_selection(keys, config.index_topk)
    projections = layer.self_attn.project(inputs, rotation)
    k, _ = layer.self_attn.expand(projections.kv)
    mass, found = kept_mass(projections.q, k, keys, chosen, random, top_k=config.index_topk, scale=config.softmax_scale)
    options: dict[str, Any] = {"dense": {"attention": "dense"}, "indexer": {"attention": "sparse"}}
    options |= {name: {"attention": "sparse", "selected": (chosen | found)[name]} for name in IMPOSED}
    return {name: layer(x, rotation, keys, **options[name]).x for name, x in streams.items()}, mass


def kept_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    keys: KeyRange,
    selections: Mapping[str, Int[Array, "B T K"]],
    random: Array,
    *,
    top_k: int,
    scale: float,
) -> tuple[dict[str, Float[Array, "B T"]], dict[str, Int[Array, "B T K"]]]:
    """Computes the attention of each query on selected keys: Σ_{s ∈ S_t} p[t,s], p summed over heads, of norm 1.

    Returns:
      the mass of every selection given and of two found here, "oracle", the `top_k` keys of the highest p, and
      "random", `top_k` of the reachable keys, drawn without replacement; and those two. A query without keys keeps 0.
    """
    size = k.shape[1]

    def block(queries, k, sums):
        q, start, stop, selections, seed = queries
        p = _attention_mass(q, k, KeyRange(start, stop).contains(jnp.arange(size)), scale)
        uniform = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (size,)))(seed)
        reach = KeyRange(start[None], stop[None])
        found = {
            name: select_topk(scores[None], top_k, keys=reach)[0]
            for name, scores in {"oracle": p, "random": uniform}.items()
        }
        mass = {name: _mass_on(p, selected) for name, selected in (selections | found).items()}
        return (mass, found), sums

    seeds = jax.random.randint(random, q.shape[:2], 0, jnp.iinfo(jnp.int32).max)
    queries = (q, keys.start, keys.stop, dict(selections), seeds)
    return map_queries(block, queries, k, block=queries_per_block(4 * size * q.shape[2]))[0]


def _attention_mass(
    q: Float[Array, "T N H"], k: Float[Array, "S N H"], reach: Bool[Array, "T S"], scale: float
) -> Float[Array, "T S"]:
    """Averages dense attention probabilities over heads, which is their sum with L1 norm 1."""
    logits = jnp.where(reach[:, None], contract("tnh,snh->tns", q, k) * scale, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)  # finite for a query without keys
    weights = jnp.exp(logits - peak)
    return jnp.mean(weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30), axis=1)


def _mass_on(p: Float[Array, "T S"], selected: Int[Array, "T K"]) -> Float[Array, " T"]:
    present = (selected >= 0) & (selected < p.shape[1])
    return jnp.sum(jnp.where(present, jnp.take_along_axis(p, jnp.where(present, selected, 0), axis=1), 0.0), axis=1)


@partial(jax.jit, static_argnames=("graphdef", "attention", "selection"))
def _model_losses(graphdef, params, batch: Batch, masks, *, attention, selection) -> dict[str, tuple[Array, Array]]:
    model = merge_groups(graphdef, params)
    hidden = run_model(model, batch, attention=attention, selection=selection).hidden
    return _loss_sums(model, hidden, batch, masks)


@partial(jax.jit, static_argnames="graphdef")
def _hidden_losses(graphdef, params, hidden: Array, batch: Batch, masks) -> dict[str, tuple[Array, Array]]:
    return _loss_sums(merge_groups(graphdef, params), hidden, batch, masks)


def _loss_sums(
    model: Transformer, hidden: Array, batch: Batch, masks: Mapping[str, Any]
) -> dict[str, tuple[Array, Array]]:
    """Sums and counts the losses of one batch, where each mask and the batch say that they count."""
    losses = token_losses(hidden, model.unembed, batch.targets)
    counted = {name: mask & batch.valid for name, mask in masks.items()}
    return {name: (jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask)) for name, mask in counted.items()}


class _LossTotals:
    """Sums losses in float64."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = {}

    def add(self, sums: Mapping[str, tuple[Array, Array]]) -> None:
        for name, (total, count) in jax.device_get(dict(sums)).items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + (float(total), float(count))

    def means(self, held_out: HeldOut) -> ByPart:
        means = {name: float(total / count) if count else None for name, (total, count) in self._sums.items()}
        means[MIXTURE] = held_out.mix(means)
        return {name: means.get(name) for name in held_out.names}


class _MassTotals:
    """Sums kept mass by name, selection and layer in float64."""

    def __init__(self):
        self._sums: dict[str, dict[str, np.ndarray]] = {}
        self._queries: dict[str, int] = {}

    def add(self, batch: Batch, masks: Mapping[str, np.ndarray], mass: Mapping[str, np.ndarray], k: int) -> None:
        far = np.asarray(batch.stop) - np.asarray(batch.start) >= MIN_REACH * k
        for name, mask in masks.items():
            queries = far & mask
            self._queries[name] = self._queries.get(name, 0) + int(queries.sum())
            sums = self._sums.setdefault(name, {each: np.zeros(len(layers)) for each, layers in mass.items()})
            for each, layers in mass.items():
                sums[each] += layers[:, queries].sum(axis=1, dtype=np.float64)

    def kept(self, held_out: HeldOut, k: int) -> KeptMass:
        means = {
            name: {each: total / count for each, total in self._sums[name].items()}
            for name, count in self._queries.items()
            if count
        }
        queries = {MIXTURE: sum(self._queries.get(part, 0) for part in held_out.mixture), **self._queries}
        if held_out.mixture and held_out.mixture.keys() <= means.keys():
            of_parts = {part: means[part] for part in held_out.mixture}
            selections = next(iter(of_parts.values()))
            means[MIXTURE] = {
                each: held_out.mix({part: mass[each] for part, mass in of_parts.items()}) for each in selections
            }
        measured = [name for name in held_out.names if name in means]
        mass = {name: {each: [float(x) for x in v] for each, v in means[name].items()} for name in measured}
        return KeptMass(k, mass, {name: queries.get(name, 0) for name in held_out.names})
