"""The phases of training as data: what attends, which loss counts, which parameters move."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsa_jax import KeyRange, Output, Transformer
from train.data import Batch

GROUPS = ("backbone", "indexer", "router_bias")

type Params = dict[str, Any]  # group -> nested dict of arrays, keyed by the parts of the state's paths


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase: the attention it runs, the losses it minimises, the parameter groups that its optimizer moves."""

    name: str
    attention: Literal["dense", "sparse"]
    lm_loss: bool
    kl_loss: bool
    trains: tuple[str, ...]
    window: bool = False  # impose the last K reachable keys as the selection

    @property
    def balances(self) -> bool:
        """Whether the router's bias follows the expert load: only where the router trains."""
        return "backbone" in self.trains


BASE = Phase("BASE", "dense", lm_loss=True, kl_loss=False, trains=("backbone",))
WARMUP = Phase("WARMUP", "dense", lm_loss=False, kl_loss=True, trains=("indexer",))
SPARSE = Phase("SPARSE", "sparse", lm_loss=True, kl_loss=True, trains=("backbone", "indexer"))
PHASES = (BASE, WARMUP, SPARSE)

# What SPARSE is compared with, from the same weights over the same batches.
DENSE_CONTROL = Phase("DENSE_CONTROL", "dense", lm_loss=True, kl_loss=False, trains=("backbone",))
WINDOW_CONTROL = Phase("WINDOW_CONTROL", "sparse", lm_loss=True, kl_loss=False, trains=("backbone",), window=True)
CONTROLS = (DENSE_CONTROL, WINDOW_CONTROL)


def phase_named(name: str) -> Phase:
    """The phase or control of that name."""
    for phase in PHASES + CONTROLS:
        if phase.name == name:
            return phase
    raise ValueError(f"phase must be one of {', '.join(p.name for p in PHASES + CONTROLS)}, got {name!r}")


def group_of(path: tuple[Any, ...]) -> str:
    """The parameter group of a state path."""
    if "indexer" in path:
        return "indexer"
    return "router_bias" if path[-1] == "e_score_correction_bias" else "backbone"


def split_groups(model: Transformer) -> tuple[nnx.GraphDef, Params]:
    """Takes a model apart into its definition and its parameters by group."""
    graphdef, *states = nnx.split(model, _is_group("backbone"), _is_group("indexer"), ...)
    return graphdef, {group: nnx.to_pure_dict(state) for group, state in zip(GROUPS, states, strict=True)}


def merge_groups(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """The model of these parameters: the inverse of `split_groups`, usable inside jit."""
    return nnx.merge(graphdef, *(params[group] for group in GROUPS))


def _is_group(group: str):
    return lambda path, _: group_of(path) == group


def window_selection(keys: KeyRange, k: int) -> Int[Array, "B T K"]:
    """The canonical selection of the last `k` reachable keys of each query."""
    first = jnp.maximum(keys.start, keys.stop - k)[..., None]
    index = first + jnp.arange(k, dtype=jnp.int32)
    return jnp.where(index < keys.stop[..., None], index, -1)


def run_model(model: Transformer, batch: Batch, *, attention: str, window: bool) -> Output:
    """Runs the model over a batch; `window` imposes the last K keys as the selection of every layer."""
    selected = None
    if window:
        selected = window_selection(batch.keys, model.config.index_topk)
        selected = jnp.broadcast_to(selected, (model.config.num_hidden_layers, *selected.shape))
    return model(batch.tokens, keys=batch.keys, positions=batch.positions, attention=attention, selected=selected)
