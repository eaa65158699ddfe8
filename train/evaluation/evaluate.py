"""Measures models on held-out text: their losses, and the attention mass that selections keep.

With a mesh, models and batches stay on it, and the numbers are those of one device up to rounding.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from dsa_jax import Config, Transformer
from dsa_jax.parallel.collectives import sum_statistics
from dsa_jax.parallel.sharding import parameter_specs, place_batch, shards, spec
from train.data import Batch
from train.evaluation.held_out import MIXTURE, ByPart, HeldOut
from train.evaluation.kept_mass import MIN_REACH, STREAMS, TOKEN, KeptMass, measure_layers, on_shards
from train.losses import token_losses
from train.phases import Params, Phase, Selection, merge_groups, run_model

type Sums = dict[str, tuple[Array, Array]]  # by name: a sum, and the count of what it runs over


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


@dataclasses.dataclass(frozen=True)
class Weights:
    """Names weights whose loss is wanted, and how they attend; they are read when their turn comes, and let go."""

    label: str
    read: Callable[[], Params]
    attention: Literal["dense", "sparse"]
    selection: Selection | None = None


def evaluate_run(
    graphdef: nnx.GraphDef,
    held_out: HeldOut,
    final: Params,
    *,
    before: Iterable[Weights] = (),
    controls: Iterable[Weights] = (),
    indexers: Mapping[str, Any] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Evaluates a run.

    Args:
      graphdef: the model's definition.
      held_out: what it is measured on.
      final: the weights at its end.
      before: weights that it passed through.
      controls: those of its controls.
      indexers: the "indexer" group of others of its weights, by the names of their selections.
      seed: of the random selections.
      mesh: where the weights are; without it on one device.
    """

    def losses(weights: Iterable[Weights]) -> dict[str, ByPart]:
        return {
            each.label: held_out_losses(
                graphdef, each.read(), held_out, attention=each.attention, selection=each.selection, mesh=mesh
            )
            for each in weights
        }

    kept, selections = measure_selections(graphdef, final, held_out, indexers=indexers, seed=seed, mesh=mesh)
    finals = {"final, sparse": selections["indexer"], "final, dense": selections["dense"]}
    return Evaluation(losses(before) | finals | losses(controls), selections, kept)


def attention_of(phase: Phase) -> Literal["dense", "sparse"]:
    """Says how what a phase trains is measured: sparse if it trains the indexer, which dense attention does not use."""
    return "sparse" if "indexer" in phase.trains else phase.attention


def held_out_losses(
    graphdef: nnx.GraphDef,
    params: Params,
    held_out: HeldOut,
    *,
    attention: Literal["dense", "sparse"],
    selection: Selection | None = None,
    mesh: Mesh | None = None,
) -> ByPart:
    """Computes the mean cross-entropy a target, in nats, of every name of `held_out`.

    Args:
      graphdef: the model's definition.
      params: its parameters, on the mesh if there is one.
      held_out: what they are measured on.
      attention: "dense", or "sparse" over the selected keys.
      selection: makes what every layer selects, as in `train.phases.Phase`.
      mesh: the devices; without it one.
    """
    totals = _LossTotals()
    for batch, masks, _ in held_out.batches(shards(mesh, "batch")):
        inputs = _placed((batch, masks), mesh)
        totals.add(_model_losses(graphdef, params, inputs, attention=attention, selection=selection, mesh=mesh))
    return totals.means(held_out)


def check_selects(config: Config) -> None:
    """Checks that a model has an indexer, whose selections can be measured.

    Raises:
      ValueError: if it has none.
    """
    if config.baseline == "nsa":
        raise ValueError(
            "selections are measured of a model with an indexer, got baseline 'nsa', which has none: train it with "
            "--no-evaluate, and see studies.nsa for what can be measured"
        )


def measure_selections(
    graphdef: nnx.GraphDef,
    params: Params,
    held_out: HeldOut,
    *,
    indexers: Mapping[str, Any] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[KeptMass, dict[str, ByPart]]:
    """Measures what selections keep of the dense attention, and what the model loses when it attends to them alone.

    Args:
      graphdef: the model's definition.
      params: the weights measured; their own indexer appears as "indexer".
      held_out: the batches.
      indexers: the "indexer" group of other weights by name, each put into the same backbone; kept mass alone.
      seed: of the random selections.
      mesh: the devices; without it one.

    Returns:
      the kept mass of "indexer", `indexers`, "oracle", "window" and "random", and the held-out losses with attention
      "dense" and over the selections "indexer", "oracle", "window" and "random". The oracle imposed is the dense run's.
    """
    masses, losses = _MassTotals(), {name: _LossTotals() for name in STREAMS}
    groups = {"indexer": params["indexer"], **(indexers or {})}
    model = merge_groups(graphdef, params)
    check_selects(model.config)
    models = {name: merge_groups(graphdef, {**params, "indexer": indexer}) for name, indexer in groups.items()}
    k = model.config.index_topk
    for batch, masks, rows in held_out.batches(shards(mesh, "batch")):
        mass, hidden = measure_layers(model, models, batch, rows=rows, seed=seed, mesh=mesh)
        is_far = batch.stop - batch.start >= MIN_REACH * k
        far = _placed({name: mask & is_far for name, mask in masks.items()}, mesh)
        masses.add(_mass_sums(mass, far, mesh=mesh))
        inputs = _placed((batch, masks), mesh)
        for name, total in losses.items():
            total.add(_hidden_losses(graphdef, params, hidden[name], inputs, mesh=mesh))
    return masses.kept(held_out, k), {name: total.means(held_out) for name, total in losses.items()}


def _placed(tree: Any, mesh: Mesh | None) -> Any:
    return tree if mesh is None else place_batch(tree, mesh)


@partial(jax.jit, static_argnames=("graphdef", "attention", "selection", "mesh"))
def _model_losses(graphdef, params, inputs, *, attention, selection, mesh) -> Sums:
    def run(params, inputs):
        batch, masks = inputs
        model = merge_groups(graphdef, params)
        hidden = run_model(model, batch, attention=attention, selection=selection).hidden
        return _loss_sums(model, hidden, batch, masks)

    return on_shards(run, mesh, (parameter_specs(params), TOKEN), spec())(params, inputs)


@partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _hidden_losses(graphdef, params, hidden: Array, inputs, *, mesh) -> Sums:
    def run(params, hidden, inputs):
        return _loss_sums(merge_groups(graphdef, params), hidden, *inputs)

    return on_shards(run, mesh, (parameter_specs(params), TOKEN, TOKEN), spec())(params, hidden, inputs)


def _loss_sums(model: Transformer, hidden: Array, batch: Batch, masks: Mapping[str, Any]) -> Sums:
    """Sums and counts the losses of one batch, of all shards, where each mask and the batch say that they count."""
    losses = token_losses(hidden, model.unembedding(), batch.targets)
    counted = {name: mask & batch.valid for name, mask in masks.items()}
    sums = {name: (jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask)) for name, mask in counted.items()}
    return sum_statistics(sums, "tokens")


@partial(jax.jit, static_argnames="mesh")
def _mass_sums(mass, masks, *, mesh) -> dict[str, tuple[dict[str, Array], Array]]:
    """Sums the kept mass of every layer over the queries of each mask, and counts these, of all shards."""

    def run(mass, masks):
        found = {
            name: ({each: jnp.sum(jnp.where(mask, m, 0.0), axis=(1, 2)) for each, m in mass.items()}, jnp.sum(mask))
            for name, mask in masks.items()
        }
        return sum_statistics(found, "tokens")

    return on_shards(run, mesh, (spec(None, "batch", "sequence"), TOKEN), spec())(mass, masks)


class _LossTotals:
    """Sums losses in float64."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = {}

    def add(self, sums: Sums) -> None:
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

    def add(self, found: Mapping[str, tuple[Mapping[str, Array], Array]]) -> None:
        for name, (mass, count) in jax.device_get(dict(found)).items():
            self._queries[name] = self._queries.get(name, 0) + int(count)
            sums = self._sums.setdefault(name, {})
            for each, layers in mass.items():
                sums[each] = sums.get(each, 0.0) + np.asarray(layers, np.float64)

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
