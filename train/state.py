"""The state that a training step reads and writes: made, described without arrays, and placed on a mesh."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array

from dsa_jax import Config, Transformer
from dsa_jax.parallel.sharding import AXES, check_batch, parameter_shardings, path_names, shards, spec
from train.data import Batch
from train.optimizer import make_optimizer
from train.phases import Params, split_groups, trained_params
from train.settings import PhaseSettings, Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Holds all that a step reads and writes."""

    step: Array  # int32, steps done within the phase
    params: Params  # group -> parameters, float32
    opt_state: dict[str, Any]  # group -> optax state, of the groups that the phase trains alone
    random: Array  # uint32 [2], key data for what is drawn in and after training, and for how moments are rounded


def make_optimizers(settings: PhaseSettings) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Makes the optimizer of each group that the phase trains."""
    scale = settings.rate_scale
    return {group: make_optimizer(getattr(settings, group), settings.steps, scale) for group in settings.phase.trains}


def init_state(params: Params, settings: PhaseSettings, random: Any) -> TrainState:
    """Makes the state at the start of a phase: fresh optimizers, and copies of the parameters and of the key.

    A step takes over the state that it is given; what the caller holds stays.

    Args:
      params: parameters by group, as `split_groups` gives them.
      settings: the phase.
      random: a key, of `jax.random.key` or of `jax.random.PRNGKey`.
    """
    if jnp.issubdtype(random.dtype, jax.dtypes.prng_key):
        random = jax.random.key_data(random)
    params, random = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, random))
    return fresh_state(params, random, settings)


def fresh_state(params: Params, random: Array, settings: PhaseSettings) -> TrainState:
    """Makes the state of `init_state` from parameters and key data that it takes over."""
    check_trainable(params)
    trained = trained_params(params, settings.phase, predictions=settings.predictions)
    opt_state = {group: optimizer.init(trained[group]) for group, optimizer in make_optimizers(settings).items()}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, random)


def check_trainable(params: Params) -> None:
    """Checks that parameters may be trained.

    Raises:
      ValueError: naming one in FP8, which has no gradients.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if x.dtype.itemsize == 1:
            name = ".".join(path_names(path)[1:])
            raise ValueError(f"training needs float32 parameters, got {name} in {x.dtype}: load with expert_dtype=None")


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Puts a copy of a state on a mesh."""
    return jax.device_put(state, parameter_shardings(state, mesh), may_alias=False)


# Without arrays


@functools.lru_cache(maxsize=32)
def abstract_params(config: Config, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, Params]:
    """Gives the model's definition, and shapes, dtypes and places of its parameters, without making them."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params = split_groups(model)
    return graphdef, placed(params, mesh)


@functools.lru_cache(maxsize=32)
def abstract_state(config: Config, settings: PhaseSettings) -> TrainState:
    """Gives the shapes of the state at the start of a phase."""
    _, params = abstract_params(config)
    return jax.eval_shape(lambda p: fresh_state(p, jnp.zeros(2, jnp.uint32), settings), params)


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """Makes a mesh of no devices, from the sizes of all axes."""
    return AbstractMesh(tuple(shape[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_batch(batch_size: int, seq_len: int, mesh: Mesh | AbstractMesh | None) -> Batch:
    """Gives the shapes of a batch, placed on a mesh; without one it is the host's."""
    place = None if mesh is None else NamedSharding(mesh, spec("batch", "sequence"))
    shape = batch_size, seq_len
    ids, flags = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in (jnp.int32, jnp.bool))
    return Batch(tokens=ids, targets=ids, valid=flags, start=ids, stop=ids, positions=ids)


def placed(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """Places shapes and dtypes of parameters or of a state on a mesh, or on this process's first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: first, tree) if mesh is None else parameter_shardings(tree, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def check_stage(mesh: Mesh | AbstractMesh, stage: Stage) -> None:
    """Checks that batches of a stage can be split over the mesh, and a shard's rows into its micro-batches.

    Raises:
      ValueError: if they cannot, with the nearest number that can be.
    """
    check_batch(mesh, batch_size=stage.batch_size, seq_len=stage.seq_len)
    rows = stage.batch_size // shards(mesh, "batch")
    if rows % min(rows, stage.micro_batches):
        nearest = max(n for n in range(1, stage.micro_batches + 1) if rows % n == 0)
        raise ValueError(
            f"micro_batches must divide the {rows} rows of a shard of the batch, got {stage.micro_batches}; "
            f"nearest: {nearest}"
        )
