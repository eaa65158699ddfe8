"""Measures how far the selections of layers agree: which of them could share one."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsa_jax import KeyRange, Transformer
from dsa_jax.layers import SharedIndex
from dsa_jax.rope import rotation as rope_rotation
from train.data import Batch
from train.evaluation.kept_mass import MIN_REACH


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Holds the share of the keys of each layer that each other selects too, `share[layer][other]`, over `queries`.

    `k` is how many keys a query selects. Rows are not symmetric where layers select different numbers of keys.
    """

    k: int
    queries: int
    share: list[list[float]]

    def pattern(self, least: float) -> tuple[str, ...]:
        """Proposes `indexer_types`: a layer shares if at least so much of what it selects, its leader selects too.

        Examples:
          >>> Overlap(8, 1, [[1.0, 0.9, 0.2], [0.9, 1.0, 0.5], [0.2, 0.5, 1.0]]).pattern(0.8)
          ('full', 'shared', 'full')
        """
        types, leader = ["full"], 0
        for layer in range(1, len(self.share)):
            is_shared = self.share[layer][leader] >= least
            types.append("shared" if is_shared else "full")
            leader = leader if is_shared else layer
        return tuple(types)


def measure_overlap(model: Transformer, batches: Iterable[Batch], *, queries: int, seed: int = 0) -> Overlap:
    """Runs the model sparse, and compares what its layers select for some queries that have much to choose from.

    Args:
      model: the transformer, on one device.
      batches: the text.
      queries: how many of each row are compared, drawn among those that reach `MIN_REACH` times K keys.
      seed: of the draw.

    Raises:
      ValueError: if no query reaches as many.
    """
    k, rng = model.config.index_topk, np.random.default_rng(seed)
    total: Any = 0.0
    count = 0
    for batch in batches:
        for row in range(len(batch.tokens)):
            one = jax.tree.map(lambda x, row=row: np.asarray(x)[row : row + 1], batch)
            far = np.flatnonzero(one.stop[0] - one.start[0] >= MIN_REACH * k)
            if not far.size:
                continue
            places = np.sort(rng.choice(far, queries, replace=far.size < queries)).astype(np.int32)
            selected = _selections(model, one, places)
            total += np.asarray(_shares(selected, one.tokens.shape[1]), np.float64) * queries
            count += queries
    if not count:
        raise ValueError(
            f"no query reaches {MIN_REACH} times index_topk = {k} keys: give longer sequences, with --seq-len"
        )
    return Overlap(k, count, (total / count).tolist())


def _selections(model: Transformer, batch: Batch, places: Int[np.ndarray, " n"]) -> Int[Array, "layers n K"]:
    """Runs one row layer by layer, and keeps what each selects for the queries at some places."""
    keys = KeyRange(jnp.asarray(batch.start), jnp.asarray(batch.stop))
    x, rotation = model.embed(jnp.asarray(batch.tokens)), rope_rotation(jnp.asarray(batch.positions), model.config)
    shared, found = None, []
    for layer in model.layers():
        reused = shared if layer.self_attn.indexer is None else None
        x, shared, chosen = _run_layer(*nnx.split(layer), x, rotation, keys, reused, places)
        found.append(chosen)
    return jnp.stack(found)


@partial(jax.jit, static_argnums=0)
def _run_layer(graph, state, x, rotation, keys: KeyRange, shared: SharedIndex | None, places):
    out = nnx.merge(graph, state)(x, rotation, keys, shared=shared, return_indexer_kl=False)
    selected: Any = out.selected
    return out.x, SharedIndex(selected), selected[0, places]


@partial(jax.jit, static_argnums=1)
def _shares(selected: Int[Array, "layers n K"], size: int) -> Float[Array, "layers layers"]:
    """Computes the share of the keys of each layer that each other selects too, averaged over queries."""
    present = selected >= 0

    def of_other(chosen: Int[Array, "n K"]) -> Float[Array, " layers"]:
        marks = _mask(chosen, size)
        both = jnp.take_along_axis(jnp.broadcast_to(marks, (len(selected), *marks.shape)), jnp.maximum(selected, 0), -1)
        return jnp.mean(jnp.sum(both & present, -1) / jnp.maximum(jnp.sum(present, -1), 1), axis=-1)

    return jax.lax.map(of_other, selected).T


def _mask(selected: Int[Array, "n K"], size: int) -> Bool[Array, "n S"]:
    """Marks the keys that are selected; -1 is none."""
    at = jnp.where(selected < 0, size, selected)
    return jax.vmap(lambda own: jnp.zeros(size, bool).at[own].set(True, mode="drop"))(at)


def letters(types: Sequence[str]) -> str:
    """Writes a pattern of layers as letters, F for those with an indexer and S for those that share.

    Examples:
      >>> letters(("full", "shared"))
      'FS'
    """
    return "".join("F" if kind == "full" else "S" for kind in types)
