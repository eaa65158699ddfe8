"""One training step: a pure function of the state and a batch, compiled once a shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from dsa_jax.moe import update_bias
from dsa_jax.parallel.collectives import sum_statistics
from dsa_jax.parallel.sharding import parameter_shardings, parameter_specs, spec
from train.data import Batch
from train.losses import cross_entropy, indexer_loss
from train.optimizer import make_optimizer
from train.phases import Params, Phase, merge_groups, run_model
from train.presets import PhaseSettings

type Metrics = dict[str, Array]
type Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes."""

    step: Array  # int32, steps done within the phase
    params: Params  # group -> parameters, float32
    opt_state: dict[str, Any]  # group -> optax state, of the groups that the phase trains alone
    random: Array  # uint32 [2], key data for what is drawn in and after training


def make_optimizers(settings: PhaseSettings) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each group that the phase trains."""
    return {group: make_optimizer(getattr(settings, group), settings.steps) for group in settings.phase.trains}


def init_state(params: Params, settings: PhaseSettings, random: Array) -> TrainState:
    """The state at the start of a phase: fresh optimizers, the parameters as they come."""
    opt_state = {group: optimizer.init(params[group]) for group, optimizer in make_optimizers(settings).items()}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, random)


@functools.cache
def make_step(
    graphdef: nnx.GraphDef, settings: PhaseSettings, *, micro_batches: int = 1, mesh: Mesh | None = None
) -> Step:
    """The jitted step of a phase; it takes over (donates) the state that it is given.

    Both losses are divided by the valid targets and valid queries of the whole batch, so `micro_batches` changes
    rounding alone. A loss that the phase does not minimise is not computed. Runs of one model and one recipe share the
    compiled step.

    On a mesh it takes the state as `place_state` and batches as `sharding.place_batch` put them there; a shard takes
    its rows in as many micro-batches, or one by one if it has fewer.
    """
    phase, optimizers = settings.phase, make_optimizers(settings)
    gradients = functools.partial(_gradients, graphdef, phase, micro_batches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics, load = (gradients if mesh is None else _on_mesh(gradients, phase, mesh))(state.params, batch)
        params, opt_state = dict(state.params), {}
        for group, optimizer in optimizers.items():
            with jax.named_scope(f"update_{group}"):
                updates, opt_state[group] = optimizer.update(grads[group], state.opt_state[group], params[group])
                params[group] = optax.apply_updates(params[group], updates)
            metrics[f"grad_norm_{group}"] = optax.tree.norm(grads[group])
        if load.shape[0]:
            metrics["expert_imbalance"] = jnp.mean(load.max(-1) / jnp.maximum(load.mean(-1), 1e-9))
            if phase.balances:
                params["router_bias"] = jax.tree.map(
                    lambda bias: update_bias(bias, load, settings.bias_rate), params["router_bias"]
                )
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh))
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """A state on a mesh."""
    return jax.device_put(state, parameter_shardings(state, mesh))


def _on_mesh(gradients: Callable, phase: Phase, mesh: Mesh) -> Callable:
    """`gradients` run by every shard on its own tokens and its own part of the parameters."""

    def run(params: Params, batch: Batch) -> tuple[Params, Metrics, Array]:
        specs = parameter_specs(params)
        trained = {group: specs[group] for group in phase.trains}
        tokens = jax.tree.map(lambda _: spec("batch", "sequence"), batch)
        return jax.shard_map(
            gradients, mesh=mesh, in_specs=(specs, tokens), out_specs=(trained, spec(), spec()), check_vma=False
        )(params, batch)

    return run


def _gradients(
    graphdef: nnx.GraphDef, phase: Phase, micro_batches: int, params: Params, batch: Batch
) -> tuple[Params, Metrics, Array]:
    """Gradients of the trainable groups, metrics, and the expert load of the whole batch.

    On a mesh `params` and `batch` are a shard's own, as are the gradients; metrics and load are of all shards.
    """
    targets = jnp.maximum(sum_statistics(jnp.sum(batch.valid), "tokens"), 1).astype(jnp.float32)
    queries = sum_statistics(jnp.sum(batch.keys.nonempty()), "tokens")
    micro_batches = min(micro_batches, len(batch.tokens))
    trainable = {group: params[group] for group in phase.trains}

    def loss(trainable: Params, micro: Batch) -> tuple[Array, tuple[Metrics, Array]]:
        losses, load = _losses(merge_groups(graphdef, {**params, **trainable}), phase, micro)
        scale = {"lm_loss": targets, "kl": jnp.maximum(queries, 1).astype(jnp.float32)}
        losses = {name: value / scale[name] for name, value in losses.items()}
        whole = sum(losses.values(), jnp.zeros(()))
        return whole, ({"loss": whole, **losses}, load)

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


def _losses(model: Any, phase: Phase, batch: Batch) -> tuple[Metrics, Array]:
    """The sums of the phase's losses over a micro-batch, and its expert load."""
    output = run_model(model, batch, attention=phase.attention, window=phase.window)
    losses = {}
    if phase.lm_loss:
        losses["lm_loss"] = cross_entropy(output.hidden, model.unembedding(), batch.targets, batch.valid)
    if phase.kl_loss:
        losses["kl"] = indexer_loss(output.indexer_kl, batch.keys.nonempty())
    return losses, output.expert_load
