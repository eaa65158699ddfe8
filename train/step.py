"""One training step: a pure function of the state and a batch, compiled once a shape."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from dsa_jax import Transformer
from dsa_jax.moe import update_bias
from dsa_jax.parallel.collectives import sum_statistics
from dsa_jax.parallel.sharding import parameter_shardings, parameter_specs, spec
from dsa_jax.stacks import PREDICTION_LAYERS
from train.checks import check_integer
from train.data import Batch
from train.losses import Loss, prediction_losses
from train.optimizer import learning_rates
from train.phases import Params, merge_groups, run_model, trained_params, with_trained
from train.settings import PhaseSettings
from train.state import TrainState, fresh_state, make_optimizers

MAX_STEPS = 16  # that are kept compiled: those of a run and of its controls, and a few more

# XLA starts collectives early and waits for them late of its own accord, but not where a ragged exchange is among them.
MESH_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}

type Metrics = dict[str, Array]
type Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@functools.lru_cache(maxsize=MAX_STEPS)
def make_step(
    graphdef: nnx.GraphDef, settings: PhaseSettings, *, micro_batches: int = 1, mesh: Mesh | None = None
) -> Step:
    """Makes the jitted step of a phase; it takes over (donates) the state that it is given.

    Runs of one model and one recipe share the compiled step; the latest `MAX_STEPS` are kept. A token or a counted
    target outside the vocabulary makes the losses, and with them the next parameters, NaN.

    Args:
      graphdef: the model's definition.
      settings: the phase, its optimizers and its length.
      micro_batches: into how many parts a batch is cut. Every loss is divided by its count over the whole batch, so
        that changes rounding alone. A shard of a mesh that has fewer rows takes them one by one.
      mesh: where the state is as `place_state` puts it, and batches as `sharding.place_batch` does.

    Raises:
      ValueError: if `micro_batches` is below 1; when it is traced, if it does not divide the rows.

    Returns:
      A function of a state and a batch that gives the next state and metrics: "loss", each of the phase's losses by its
      name, the KL also by layer ("kl_layers"), "tokens" (queries that have keys), gradient norms and learning rates by
      group, and the experts' imbalance. Of prediction layers that train along, "mtp_loss_1" and "mtp_kl_1" of the first
      and so on, unweighted, and "mtp_weight", lambda.

    Examples:
      >>> from train.phases import BASE, split_groups
      >>> from train.settings import OptimizerSettings, PhaseSettings, Stage
      >>> from train.state import init_state
      >>> settings = PhaseSettings(BASE, (Stage(100, 4, 16),), backbone=OptimizerSettings(learning_rate=1e-3))
      >>> graphdef, params = split_groups(model)
      >>> state, metrics = make_step(graphdef, settings)(init_state(params, settings, jax.random.PRNGKey(0)), batch)
    """
    return build_step(graphdef, settings, micro_batches=micro_batches, mesh=mesh)


@functools.lru_cache(maxsize=MAX_STEPS)
def make_begin(settings: PhaseSettings, mesh: Mesh | None = None) -> Callable[[Params, Any], TrainState]:
    """Makes the jitted function of parameters and key data that gives the state at the start of a phase.

    It takes over (donates) the parameters. The state is on the mesh, or on this process's first device.
    """

    def begin(params: Params, random: Array) -> TrainState:
        return fresh_state(params, random, settings)

    if mesh is None:
        return jax.jit(begin, out_shardings=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), donate_argnums=0)

    def on_mesh(params: Params, random: Array) -> TrainState:
        state = begin(params, random)
        return jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh))

    return jax.jit(on_mesh, donate_argnums=0)


def build_step(
    graphdef: nnx.GraphDef, settings: PhaseSettings, *, micro_batches: int = 1, mesh: Mesh | AbstractMesh | None = None
) -> Any:
    """Makes the jitted step of `make_step` anew, so that nothing of it stays when it is no longer used."""
    check_integer("micro_batches", micro_batches)
    phase, optimizers = settings.phase, make_optimizers(settings)
    gradients = functools.partial(_gradients, graphdef, settings, micro_batches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weight = jnp.asarray(settings.prediction_weight(state.step), jnp.float32)
        compute = gradients if mesh is None else _on_mesh(gradients, settings, mesh)
        grads, metrics, load = compute(state.params, batch, weight)
        if settings.predictions:
            metrics["mtp_weight"] = weight
        params, opt_state = trained_params(state.params, phase, predictions=settings.predictions), {}
        for group, optimizer in optimizers.items():
            with jax.named_scope(f"update_{group}"):
                updates, opt_state[group] = optimizer.update(
                    grads[group], state.opt_state[group], params[group], random=state.random, step=state.step
                )
                params[group] = optax.apply_updates(params[group], updates)
            metrics[f"grad_norm_{group}"] = optax.tree.norm(grads[group])
            for name, rate in learning_rates(getattr(settings, group), settings.steps, settings.rate_scale).items():
                metrics[f"{name}_{group}"] = jnp.asarray(rate(state.step), jnp.float32)
        if load.shape[0]:
            metrics["expert_imbalance"] = jnp.mean(load.max(-1) / jnp.maximum(load.mean(-1), 1e-9))
            if phase.balances:
                params["router_bias"] = _balance(state.params["router_bias"], load, settings.bias_rate)
        params = with_trained(state.params, params)
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh))
        return state, metrics

    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options(mesh))


def _balance(biases: Params, load: Array, rate: float) -> Params:
    """Moves the routers' biases, of one stack of layers after the other, against the load [moe_layers, X].

    The load of prediction layers stands last, or is not there if they have not run: theirs then stay.
    """
    moved, first = {}, 0
    for name in sorted(biases, key=lambda name: (name == PREDICTION_LAYERS, len(name), name)):  # as they are numbered
        if first == len(load):
            break
        count = jax.tree.leaves(biases[name])[0].shape[0]
        part = load[first : first + count]
        moved[name] = jax.tree.map(lambda bias, part=part: update_bias(bias, part, rate), biases[name])
        first += count
    return moved


def _compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, Any] | None:
    """Gives XLA's options for a step on a mesh of GPUs, None elsewhere."""
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    return MESH_OPTIONS if mesh.size > 1 else None


def _on_mesh(gradients: Callable, settings: PhaseSettings, mesh: Mesh | AbstractMesh) -> Callable:
    """Has every shard run `gradients` on its own tokens and its own part of the parameters."""

    def run(params: Params, batch: Batch, weight: Array) -> tuple[Params, Metrics, Array]:
        specs = parameter_specs(params)
        trained = trained_params(specs, settings.phase, predictions=settings.predictions)
        tokens = jax.tree.map(lambda _: spec("batch", "sequence"), batch)
        return jax.shard_map(
            gradients,
            mesh=mesh,
            in_specs=(specs, tokens, spec()),
            out_specs=(trained, spec(), spec()),
            check_vma=False,
        )(params, batch, weight)

    return run


def _gradients(
    graphdef: nnx.GraphDef, settings: PhaseSettings, micro_batches: int, params: Params, batch: Batch, weight: Array
) -> tuple[Params, Metrics, Array]:
    """Computes gradients of what is trained, metrics, and the expert load of the whole batch.

    `weight` is that of the prediction layers' cross-entropy. On a mesh `params` and `batch` are a shard's own, as are
    the gradients; metrics and load are of all shards.
    """
    phase = settings.phase
    depths = merge_groups(graphdef, params).config.num_nextn_predict_layers if settings.predictions else 0
    predicted = prediction_losses([loss for _, loss in phase.losses], depths, weight)
    losses = dict(phase.losses) | {name: loss for name, (loss, _) in predicted.items()}
    weights = {name: own for name, (_, own) in predicted.items()}
    counts = {name: _whole_count(loss.count(batch)) for name, loss in losses.items()}
    queries = sum_statistics(jnp.sum(batch.keys.nonempty()), "tokens")
    micro_batches = min(micro_batches, len(batch.tokens))
    if len(batch.tokens) % micro_batches:
        raise ValueError(f"micro_batches must divide the {len(batch.tokens)} rows of a batch, got {micro_batches}")
    trainable = trained_params(params, phase, predictions=settings.predictions)

    def loss(trainable: Params, micro: Batch) -> tuple[Array, tuple[Metrics, Array]]:
        model = merge_groups(graphdef, with_trained(params, trainable))
        totals, watched, load = _loss_totals(model, settings, losses, micro)
        means = {name: total / counts[name] for name, total in totals.items()}
        others = {name: each / counts[loss] for loss, sums in watched.items() for name, each in sums.items()}
        whole = sum((weights.get(name, 1.0) * mean for name, mean in means.items()), jnp.zeros(()))
        return whole, ({"loss": whole, **means, **others}, load)

    grad = jax.grad(loss, has_aux=True)
    if micro_batches == 1:
        grads, (metrics, load) = grad(trainable, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, trainable, first))
        add = lambda total, part: (jax.tree.map(jnp.add, total, grad(trainable, part)), None)  # noqa: E731
        (grads, (metrics, load)), _ = jax.lax.scan(add, zeros, parts)
    return grads, {**sum_statistics(metrics, "tokens"), "tokens": queries}, load


def _whole_count(count: Array) -> Array:
    """Counts over all shards, at least 1, in float32."""
    return jnp.maximum(sum_statistics(count, "tokens"), 1).astype(jnp.float32)


def _loss_totals(
    model: Transformer, settings: PhaseSettings, losses: Mapping[str, Loss], batch: Batch
) -> tuple[Metrics, dict[str, Metrics], Array]:
    """Sums the losses over a micro-batch, by loss what is watched beside it, and counts its expert load."""
    phase, predictions = settings.phase, settings.predictions
    options: dict[str, Any] = dict(attention=phase.attention, selection=phase.selection, keep=settings.keep)
    output = run_model(model, batch, predictions=predictions, **options)
    factor = _nan_outside(batch, model.config.vocab_size)
    totals, watched = {}, {}
    for name, loss in losses.items():
        total, sums = loss.measure(model, output, batch)
        layers = {} if loss.layers is None else {f"{name}_layers": loss.layers(model, output, batch)}
        totals[name], watched[name] = factor * total, {**sums, **layers}
    load = output.expert_load
    if output.predicted is not None:
        load = jnp.concatenate([load, output.predicted.expert_load])
    return totals, jax.lax.stop_gradient(watched), load


def _nan_outside(batch: Batch, vocab_size: int) -> Array:
    """Makes 1, or NaN if an id is none of the vocabulary, whose embedding and logit would be another's."""
    inside = lambda ids: (ids >= 0) & (ids < vocab_size)  # noqa: E731
    is_good = jnp.all(inside(batch.tokens)) & jnp.all(inside(batch.targets) | ~batch.valid)
    return jnp.where(is_good, 1.0, jnp.nan)
