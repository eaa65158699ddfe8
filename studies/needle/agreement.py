"""Compares what two models would write: the share of places at which their likeliest tokens are the same."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from studies.needle.questions import Attend
from train.data import Batch
from train.phases import Params, merge_groups

CHUNK_TOKENS = 1024  # whose logits are alive at once


def likeliest(
    graphdef: nnx.GraphDef, params: Params, attend: Attend, batches: Sequence[Batch]
) -> list[Int[np.ndarray, "B T"]]:
    """Finds the token that a model holds likeliest behind every token."""
    return [np.asarray(_argmax(graphdef, params, attend(graphdef, params, batch))) for batch in batches]


@partial(jax.jit, static_argnames="graphdef")
def _argmax(graphdef, params, hidden: Array) -> Int[Array, "B T"]:
    model = merge_groups(graphdef, params)
    batch, length, _ = hidden.shape
    width = next(size for size in range(min(length, CHUNK_TOKENS), 0, -1) if length % size == 0)
    chunks = jnp.moveaxis(hidden.reshape(batch, length // width, width, -1), 1, 0)
    tokens = jax.lax.map(lambda chunk: jnp.argmax(model.unembed(chunk), axis=-1).astype(jnp.int32), chunks)
    return jnp.moveaxis(tokens, 0, 1).reshape(batch, length)


def agreement(
    ours: Sequence[Int[np.ndarray, "B T"]],
    theirs: Sequence[Int[np.ndarray, "B T"]],
    masks: Mapping[str, Sequence[Bool[np.ndarray, "B T"]]],
) -> dict[str, float]:
    """Gives the share of equal tokens by the names of the masks.

    Args:
      ours: of one model, a batch after the other.
      theirs: of the other, the same batches.
      masks: which tokens of each batch count; a name without any is left out.
    """
    found = {}
    for name, each in masks.items():
        counts = sum(int(mask.sum()) for mask in each)
        if counts:
            same = sum(int((a == b)[mask].sum()) for a, b, mask in zip(ours, theirs, each, strict=True))
            found[name] = same / counts
    return found
