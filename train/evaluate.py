"""What the trained model is held to: loss on held-out text, and the attention mass that a selection keeps.

The mass kept by a selection is the share of dense attention, head-summed and L1-normalised, that lies on its K keys. It
is measured in the model run dense, layer by layer, over queries that reach at least 4 K keys. Yardsticks stand beside
the indexer: the oracle (top-K of the attention itself), the last K keys, K random keys, indexers of earlier weights.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

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
from train.data import Batch, Corpus
from train.losses import token_losses
from train.phases import Params, merge_groups, phase_named, run_model, window_selection

MIN_REACH = 4  # times K: queries that reach fewer keys have too little to choose from

IMPOSED = ("oracle", "window", "random")  # selections that no indexer makes
STREAMS = ("dense", "indexer", *IMPOSED)  # the runs whose losses are compared: all but the first are sparse
PARTS = ("all", "text", "recall", "answers")

type Parts = dict[str, float | None]  # one number for each of PARTS, None where there was nothing to measure


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out batches of text alone and of recall episodes alone, and the share of the latter in training."""

    text: tuple[Batch, ...]
    recall: tuple[Batch, ...]
    share: float

    @classmethod
    def draw(cls, corpus: Corpus, *, batches: int, batch_size: int, seq_len: int, seed: int = 0) -> Self:
        """Takes up to `batches` batches of each kind from files that are never trained on."""
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")

        # No window twice: what is little is measured once.
        windows = (len(corpus.held_out.tokens) - 1) // seq_len
        count = min(batches, max(1, windows // batch_size))

        def take(recall: float) -> tuple[Batch, ...]:
            found = corpus.batches("held_out", batch_size=batch_size, seq_len=seq_len, seed=seed, recall=recall)
            return tuple(itertools.islice(found, count))

        share = corpus.recall
        return cls(take(0.0) if share < 1 else (), take(1.0) if share > 0 else (), share)

    def __iter__(self):
        """Yields (kind, batch), kind one of 'text' and 'recall'."""
        yield from (("text", batch) for batch in self.text)
        yield from (("recall", batch) for batch in self.recall)

    def combine(self, text: Any, recall: Any) -> Any:
        """What training's own mixture gives, from what its two kinds give."""
        if self.share in (0, 1):
            return recall if self.share else text
        return None if text is None or recall is None else (1 - self.share) * text + self.share * recall


@dataclasses.dataclass(frozen=True)
class KeptMass:
    """The mass kept by selections of `k` keys: `mass[part][selection][layer]`, over `queries[part]` queries."""

    k: int
    mass: dict[str, dict[str, list[float]]]
    queries: dict[str, int]

    def mean(self, selection: str, part: str = "all") -> float | None:
        """The mean over layers, None where there was no query."""
        return float(np.mean(self.mass[part][selection])) if part in self.mass else None

    def gap_closed(self, selection: str = "indexer", part: str = "all") -> list[float | None]:
        """(selection - window) / (oracle - window) of each layer; None where the window keeps all that can be kept."""
        kept, window, oracle = (self.mass[part][name] for name in (selection, "window", "oracle"))
        return [_ratio(x - w, o - w) for x, w, o in zip(kept, window, oracle, strict=True)]

    def mean_gap_closed(self, selection: str = "indexer", part: str = "all") -> float | None:
        """The same ratio of the masses averaged over layers, so that a layer without a gap weighs nothing."""
        if part not in self.mass:
            return None
        kept, window, oracle = (np.mean(self.mass[part][name]) for name in (selection, "window", "oracle"))
        return _ratio(float(kept - window), float(oracle - window))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that is measured on one run's weights."""

    losses: dict[str, Parts]
    """Held-out losses by weights and attention."""
    selections: dict[str, Parts]
    """Held-out losses of the final weights by selection."""
    kept: KeptMass


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
    """Evaluates a run from the weights it began with, those after each phase, and those of its controls by name."""
    indexers = {"warmed": warmed["indexer"], "untrained": initial["indexer"]}
    kept, selections = measure_selections(graphdef, final, held_out, indexers=indexers, seed=seed)
    losses = {
        "after BASE, dense": held_out_losses(graphdef, base, held_out, attention="dense"),
        "after WARMUP, sparse": held_out_losses(graphdef, warmed, held_out, attention="sparse"),
        "final, sparse": selections["indexer"],
        "final, dense": selections["dense"],
    }
    for name, params in (controls or {}).items():
        phase = phase_named(name)
        label = f"{name}, {'last K keys' if phase.window else phase.attention}"
        losses[label] = held_out_losses(graphdef, params, held_out, attention=phase.attention, window=phase.window)
    return Evaluation(losses, selections, kept)


def held_out_losses(
    graphdef: nnx.GraphDef, params: Params, held_out: HeldOut, *, attention: str, window: bool = False
) -> Parts:
    """Mean cross-entropy a target, in nats: of training's mixture, of text, of recall episodes, and of their answers.

    `window` imposes the last K keys as the selection of sparse attention.
    """
    totals = _LossTotals()
    for kind, batch in held_out:
        totals.add(kind, _model_losses(graphdef, params, batch, attention=attention, window=window))
    return totals.parts(held_out)


def measure_selections(
    graphdef: nnx.GraphDef,
    params: Params,
    held_out: HeldOut,
    *,
    indexers: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[KeptMass, dict[str, Parts]]:
    """Measures what selections keep of the dense attention, and what the model loses when it attends to them alone.

    Args:
      params: the weights measured; their own indexer appears as "indexer".
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
    for i, (kind, batch) in enumerate(held_out):
        mass, hidden = measure_layers(model, models, batch, jax.random.fold_in(jax.random.key(seed), i))
        masses.add(kind, batch, mass, model.config.index_topk)
        for name, total in losses.items():
            total.add(kind, _hidden_losses(graphdef, params, hidden[name], batch))
    kept = masses.kept(held_out, model.config.index_topk)
    return kept, {name: total.parts(held_out) for name, total in losses.items()}


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
    """The share of each query's attention on selected keys: Σ_{s ∈ S_t} p[t,s], with p summed over heads, of norm 1.

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
    """Dense attention probabilities averaged over heads, which is their sum with L1 norm 1."""
    logits = jnp.where(reach[:, None], contract("tnh,snh->tns", q, k) * scale, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)  # finite for a query without keys
    weights = jnp.exp(logits - peak)
    return jnp.mean(weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30), axis=1)


def _mass_on(p: Float[Array, "T S"], selected: Int[Array, "T K"]) -> Float[Array, " T"]:
    present = (selected >= 0) & (selected < p.shape[1])
    return jnp.sum(jnp.where(present, jnp.take_along_axis(p, jnp.where(present, selected, 0), axis=1), 0.0), axis=1)


@partial(jax.jit, static_argnames=("graphdef", "attention", "window"))
def _model_losses(graphdef, params, batch: Batch, *, attention: str, window: bool) -> dict[str, Array]:
    model = merge_groups(graphdef, params)
    return _loss_sums(model, run_model(model, batch, attention=attention, window=window).hidden, batch)


@partial(jax.jit, static_argnames="graphdef")
def _hidden_losses(graphdef, params, hidden: Array, batch: Batch) -> dict[str, Array]:
    return _loss_sums(merge_groups(graphdef, params), hidden, batch)


def _loss_sums(model: Transformer, hidden: Array, batch: Batch) -> dict[str, Array]:
    """Sums and counts of the losses of one batch."""
    losses = token_losses(hidden, model.unembed, batch.targets)
    answers = batch.answers & batch.valid
    return {
        "sum": jnp.sum(jnp.where(batch.valid, losses, 0.0)),
        "count": jnp.sum(batch.valid),
        "answers_sum": jnp.sum(jnp.where(answers, losses, 0.0)),
        "answers_count": jnp.sum(answers),
    }


class _LossTotals:
    """Running sums of losses in float64."""

    def __init__(self):
        self._sums = {part: np.zeros(2) for part in ("text", "recall", "answers")}

    def add(self, kind: str, sums: Mapping[str, Array]) -> None:
        host = {name: float(value) for name, value in jax.device_get(dict(sums)).items()}
        self._sums[kind] += host["sum"], host["count"]
        self._sums["answers"] += host["answers_sum"], host["answers_count"]

    def parts(self, held_out: HeldOut) -> Parts:
        means = {part: float(total / count) if count else None for part, (total, count) in self._sums.items()}
        return {"all": held_out.combine(means["text"], means["recall"]), **means}


class _MassTotals:
    """Running sums of kept mass by part, selection and layer in float64."""

    def __init__(self):
        self._sums: dict[str, dict[str, np.ndarray]] = {}
        self._queries: dict[str, int] = dict.fromkeys(("text", "recall", "answers"), 0)

    def add(self, kind: str, batch: Batch, mass: Mapping[str, np.ndarray], k: int) -> None:
        far = np.asarray(batch.stop) - np.asarray(batch.start) >= MIN_REACH * k
        for part, queries in ((kind, far), ("answers", far & np.asarray(batch.answers))):
            self._queries[part] += int(queries.sum())
            sums = self._sums.setdefault(part, {name: np.zeros(len(layers)) for name, layers in mass.items()})
            for name, layers in mass.items():
                sums[name] += layers[:, queries].sum(axis=1, dtype=np.float64)

    def kept(self, held_out: HeldOut, k: int) -> KeptMass:
        means = {
            part: {name: total / count for name, total in self._sums[part].items()}
            for part, count in self._queries.items()
            if count
        }
        text, recall = means.get("text"), means.get("recall")
        names: Sequence[str] = tuple(text or recall or ())
        both = {name: held_out.combine((text or {}).get(name), (recall or {}).get(name)) for name in names}
        if names and all(value is not None for value in both.values()):
            means["all"] = both
        mass = {p: {n: [float(x) for x in v] for n, v in means[p].items()} for p in PARTS if p in means}
        queries = {**self._queries, "all": self._queries["text"] + self._queries["recall"]}
        return KeptMass(k, mass, {part: queries[part] for part in PARTS})
