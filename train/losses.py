"""The two losses. Both are sums over valid entries; the caller divides by the whole batch's counts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.parallel.collectives import max_statistics, num_shards, shard_index, sum_shards

CHUNK = 1024  # tokens whose logits are alive at once


def token_losses(
    hidden: Float[Array, "B T D"],
    unembed: Callable[[Float[Array, "... D"]], Float[Array, "... vocab"]],
    targets: Int[Array, "B T"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B T"]:
    """The negative log-likelihood of each target, log sum_v exp z[t,v] - z[t,target], in float32.

    At most about `chunk` tokens' logits exist at a time, forward and backward. `unembed` may close over traced
    parameters; where the vocabulary is sharded it gives the logits of this shard's part.
    """
    batch, length, _ = hidden.shape
    if targets.shape != (batch, length):
        raise ValueError(f"targets must have the shape of hidden's tokens {(batch, length)}, got {targets.shape}")
    width = min(length, max(1, chunk // batch))
    blocks = -(-length // width)
    padding = blocks * width - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, blocks, width, -1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, blocks, width)

    @jax.checkpoint
    def block_losses(block):
        hidden, targets = block
        logits = unembed(hidden).astype(jnp.float32)
        peak = max_statistics(jnp.max(logits, axis=-1), "vocabulary")
        total = sum_shards(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1), "vocabulary")
        return peak + jnp.log(total) - _picked(logits, targets)

    with jax.named_scope("cross_entropy"):
        losses = jax.lax.map(block_losses, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]


def _picked(logits, targets):
    """The logits of the targets, from the shard of the vocabulary that has them."""
    if num_shards("vocabulary") == 1:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    here = targets - shard_index("vocabulary") * logits.shape[-1]
    some = (here >= 0) & (here < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(some, here, 0)[..., None], axis=-1)[..., 0]
    return sum_shards(jnp.where(some, picked, 0.0), "vocabulary")


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembed: Callable[[Float[Array, "... D"]], Float[Array, "... vocab"]],
    targets: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, ""]:
    """The sum of the valid targets' negative log-likelihoods; see `token_losses`."""
    return jnp.sum(jnp.where(valid, token_losses(hidden, unembed, targets, chunk=chunk), 0.0))


def indexer_loss(kl: Float[Array, "layers B T"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The sum of the valid queries' KL over all layers: the mean over queries is summed over layers, not averaged."""
    return jnp.sum(jnp.where(valid, kl, 0.0))
