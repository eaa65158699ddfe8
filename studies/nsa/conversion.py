"""Begins Native Sparse Attention with the weights of a dense model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsa_jax import Config
from dsa_jax.parallel.sharding import path_names
from train.phases import Params
from train.saved.initial import InitialParams, random_params

GATES = (-3.0, 3.0, -3.0)  # of the branches, before the sigmoid: almost all of it the selected blocks'


@dataclasses.dataclass(frozen=True)
class FromDense(InitialParams):
    """Names the run of a dense model whose weights Native Sparse Attention begins with."""

    def params(self, config: Config, *, seed: int = 0, mesh: Mesh | None = None) -> Params:
        """Reads the dense model's parameters, and makes of them those of the attention with `from_dense`."""
        dense = super().params(dataclasses.replace(config, baseline="none"), seed=seed, mesh=mesh)
        return from_dense(dense, random_params(config, seed=seed, mesh=mesh))


def from_dense(dense: Params, fresh: Params) -> Params:
    """Makes parameters of Native Sparse Attention that begin close to a dense model.

    All that the dense model has is taken over. Each branch expands latents as it does, compressed entries are means of
    keys, and the gates, the same for all tokens at first, open the selected blocks' branch and nearly close the others.

    Args:
      dense: the parameters by group of a model without a baseline; its indexer is left out.
      fresh: new ones of the same model with Native Sparse Attention.
    """

    def take(path: Any, leaf: jax.Array) -> jax.Array:
        names = path_names(path)
        if names[-1] == "branch_gate":
            return jnp.zeros_like(leaf)
        if names[-1] == "branch_bias":
            return jnp.broadcast_to(jnp.asarray(GATES, leaf.dtype), leaf.shape)
        own: Any = dense
        for name in (each for each in names if each not in ("compression", "window")):
            own = own.get(name) if isinstance(own, dict) else None
        return leaf if own is None else jnp.array(own, copy=True)  # of two branches that begin alike, each its own

    return jax.tree_util.tree_map_with_path(take, fresh)
