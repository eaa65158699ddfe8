"""The phases of training as data and functions: what attends, which losses count, which parameters move."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsa_jax import KeyRange, Output, Transformer, window_selection
from dsa_jax.stacks import PREDICTION_LAYERS
from train.data import Batch
from train.losses import KL_LOSS, LM_LOSS, Loss
from train.post.policy import PolicySettings, policy_loss

GROUPS = ("backbone", "indexer", "router_bias")
TRAINABLE = ("backbone", "indexer")  # the router's bias follows the expert load, by no gradient
METRICS = (  # no names of losses
    *("loss", "tokens", "expert_imbalance", "step", "phase", "phase_step", "seconds", "data_seconds", "time"),
    *("tokens_seen", "held_out_loss", "evaluation_seconds", "mtp_weight"),
)
SPARSE_STREAM, OTHER_STREAM, STREAMS = 2, 3, 10

type Params = dict[str, Any]  # group -> nested dict of arrays, keyed by the parts of the state's paths
type Selection = Callable[[KeyRange, int], Array]  # of the keys in reach and K: i32[B, T, K], canonical


@dataclasses.dataclass(frozen=True)
class Phase:
    """Describes a phase: the attention it runs, the parameter groups that move, the losses that it minimises.

    Args:
      name: its name in run.json and in the metrics.
      attention: "dense", or "sparse" over the selected keys.
      trains: the groups that have an optimizer, among "backbone" and "indexer".
      losses: terms of the objective by their names in the metrics; it is their plain sum.
      selection: makes the selection of every layer instead of the indexer; for sparse attention.
      stream: the number of the stream of batches, below 10: phases of one number see the same batches.

    Raises:
      ValueError: if a group or a name of a loss cannot be, or there is no loss.

    Examples:
      Fine-tuning that leaves the indexer as it is. A loss of one's own is a `train.losses.Loss`, and
      `RunConfig.from_json(values, phases=PHASES | {"SFT": SFT})` reads such a phase from a run.json by name.

      >>> SFT = Phase("SFT", "sparse", trains=("backbone",), losses=(("sft_loss", LM_LOSS),))
      >>> SFT.balances
      True
    """

    name: str
    attention: Literal["dense", "sparse"]
    trains: tuple[str, ...]
    losses: tuple[tuple[str, Loss], ...]
    selection: Selection | None = None
    stream: int = OTHER_STREAM

    def __post_init__(self):
        unknown = [group for group in self.trains if group not in TRAINABLE]
        if unknown or not self.trains:
            raise ValueError(f"phase {self.name} must train {' or '.join(TRAINABLE)}, got {self.trains}")
        names = [name for name, _ in self.losses]
        if not names or len(set(names)) < len(names) or set(names) & set(METRICS):
            raise ValueError(
                f"phase {self.name} must have losses, each of a name of its own and none of {', '.join(METRICS)}, "
                f"got {names}"
            )
        if self.selection is not None and self.attention != "sparse":
            raise ValueError(f"phase {self.name} imposes a selection: its attention must be 'sparse'")
        if not 0 <= self.stream < STREAMS:
            raise ValueError(f"the stream of phase {self.name} must be from 0 to {STREAMS - 1}, got {self.stream}")

    @property
    def balances(self) -> bool:
        """Says whether the router's bias follows the expert load: only where the router trains."""
        return "backbone" in self.trains


_LM, _KL = ("lm_loss", LM_LOSS), ("kl", KL_LOSS)
BASE = Phase("BASE", "dense", ("backbone",), (_LM,), stream=0)
WARMUP = Phase("WARMUP", "dense", ("indexer",), (_KL,), stream=1)
SPARSE = Phase("SPARSE", "sparse", ("backbone", "indexer"), (_LM, _KL), stream=SPARSE_STREAM)

# After SPARSE, or from any checkpoint: what an assistant wrote is learnt, of conversations or of specialists' samples.
SFT = Phase("SFT", "sparse", ("backbone", "indexer"), (_LM, _KL), stream=4)
DISTILL = Phase("DISTILL", "sparse", ("backbone", "indexer"), (_LM, _KL), stream=5)
# On episodes that the model samples. They are named here; `policy_phase` gives them the settings without which they
# cannot train, and the indexer to train.
_POLICY = (("policy_loss", policy_loss()),)
SPECIALIST = Phase("SPECIALIST", "sparse", ("backbone",), _POLICY, stream=6)
MIXED = Phase("MIXED", "sparse", ("backbone",), _POLICY, stream=7)
ON_POLICY = Phase("ON_POLICY", "sparse", ("backbone",), _POLICY, stream=8)
POLICY_PHASES = (SPECIALIST, MIXED, ON_POLICY)

# What SPARSE is compared with, from the same weights over the same batches.
DENSE_CONTROL = Phase("DENSE_CONTROL", "dense", ("backbone",), (_LM,), stream=SPARSE_STREAM)
WINDOW_CONTROL = Phase(
    "WINDOW_CONTROL", "sparse", ("backbone",), (_LM,), selection=window_selection, stream=SPARSE_STREAM
)
CONTROLS = (DENSE_CONTROL, WINDOW_CONTROL)

# From the start through an attention that selects without an indexer: Native Sparse Attention, or the last keys.
NATIVE = Phase("NATIVE", "sparse", ("backbone",), (_LM,), stream=0)
PHASES = {phase.name: phase for phase in (BASE, WARMUP, SPARSE, NATIVE, SFT, DISTILL, *POLICY_PHASES, *CONTROLS)}


def policy_phase(phase: Phase, settings: PolicySettings) -> Phase:
    """Gives a phase of `POLICY_PHASES` its settings: its attention, whether the indexer learns, and its objective."""
    losses, trains = (("policy_loss", policy_loss(settings)),), phase.trains
    if not settings.freeze_indexer:
        losses, trains = (*losses, _KL), (*trains, "indexer")
    return dataclasses.replace(phase, attention=settings.attention, trains=trains, losses=losses)


def group_of(path: tuple[Any, ...]) -> str:
    """Names the parameter group of a state path."""
    if "indexer" in path:
        return "indexer"
    return "router_bias" if path[-1] == "e_score_correction_bias" else "backbone"


def split_groups(model: Transformer) -> tuple[nnx.GraphDef, Params]:
    """Takes a model apart into its definition and its parameters by group."""
    graphdef, *states = nnx.split(model, _is_group("backbone"), _is_group("indexer"), ...)
    return graphdef, {group: nnx.to_pure_dict(state) for group, state in zip(GROUPS, states, strict=True)}


def trained_params(params: Params, phase: Phase, *, predictions: bool) -> Params:
    """Takes what a phase trains: its groups, and of these the prediction layers only where they train along."""
    left_out = () if predictions else (PREDICTION_LAYERS,)
    return {
        group: {name: part for name, part in params[group].items() if name not in left_out} for group in phase.trains
    }


def with_trained(params: Params, trained: Params) -> Params:
    """Puts what was trained back among all parameters."""
    return {group: {**own, **trained.get(group, {})} for group, own in params.items()}


def merge_groups(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """Puts a model together from its parameters: the inverse of `split_groups`, usable inside jit."""
    return nnx.merge(graphdef, *(params[group] for group in GROUPS))


def _is_group(group: str):
    return lambda path, _: group_of(path) == group


def run_model(
    model: Transformer,
    batch: Batch,
    *,
    attention: Literal["dense", "sparse"],
    selection: Selection | None = None,
    keep: tuple[str, ...] = (),
    predictions: bool = False,
) -> Output:
    """Runs the model over a batch.

    Args:
      model: the model.
      batch: the batch.
      attention: as the model takes it.
      selection: makes what every layer selects, instead of its indexer; what the batch replays goes before it.
      keep: what is kept for the backward pass, as the model takes it.
      predictions: whether the prediction layers run too.
    """
    selected, routed = _replayed(batch)
    if selected is None and selection is not None:
        selected = selection(batch.keys, model.config.index_topk)
        selected = jnp.broadcast_to(selected, (model.config.num_hidden_layers, *selected.shape))
    options: dict[str, Any] = dict(attention=attention, selected=selected, routed=routed, keep=keep)
    options |= dict(return_predicted=predictions)
    return model(batch.tokens, keys=batch.keys, positions=batch.positions, **options)


def _replayed(batch: Batch) -> tuple[Array | None, Array | None]:
    """Gives the selections and the routes that a batch replays as the model takes them, layers first."""
    replay = batch.replay
    if replay is None:
        return None, None
    layers_first = lambda x: None if x is None else jnp.moveaxis(jnp.asarray(x, jnp.int32), 2, 0)  # noqa: E731
    return layers_first(replay.selections), layers_first(replay.routes)
