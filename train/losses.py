"""Losses as sums over a batch's tokens, with what they are divided by: a phase minimises one or several of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax import Config, Output, Transformer
from dsa_jax.parallel.collectives import max_statistics, num_shards, shard_index, sum_shards
from dsa_jax.prediction import shift_tokens, tokens_ahead
from dsa_jax.stacks import kl_shares
from train.data import Batch

CHUNK_TOKENS = 1024  # whose logits are alive at once


@dataclasses.dataclass(frozen=True)
class Loss:
    """Describes one term of a phase's objective: `total` over a batch, divided by `count` over the whole batch.

    Both are traced inside the training step. A batch may be taken through in micro-batches and over the shards of a
    mesh: `total` and `count` see a part of it, and are summed over all parts. So both must be sums over tokens.

    Args:
      total: computes the sum from the model, its output and the batch; differentiable, float32.
      count: counts what the sum runs over, from the batch alone.
      layers: computes the share of each layer in the sum [layers], which the metrics show beside it; None where it has
        none.

    Examples:
      The cross-entropy of what a document says after its first 16 tokens:

      >>> def counted(batch):
      ...     return batch.valid & (batch.positions >= 16)
      >>> COMPLETION = Loss(
      ...     total=lambda model, output, batch: cross_entropy(
      ...         output.hidden, model.unembedding(), batch.targets, counted(batch)
      ...     ),
      ...     count=lambda batch: jnp.sum(counted(batch)),
      ... )
    """

    total: Callable[[Transformer, Output, Batch], Float[Array, ""]]
    count: Callable[[Batch], Int[Array, ""]]
    layers: Callable[[Transformer, Output, Batch], Float[Array, " layers"]] | None = None

    def measure(
        self, model: Transformer, output: Output, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Computes `total`, and other sums over the batch by their names in the metrics, divided by the same count.

        A subclass whose sums share what `total` computes gives them here; without one there are none.
        """
        return self.total(model, output, batch), {}


def token_losses(
    hidden: Float[Array, "B T D"],
    unembed: Callable[[Float[Array, "... D"]], Float[Array, "... vocab"]],
    targets: Int[Array, "B T"],
    *,
    chunk: int = CHUNK_TOKENS,
    temperature: float = 1.0,
    kept: Int[Array, "B T M"] | None = None,
) -> Float[Array, "B T"]:
    """Computes the negative log-likelihood of each target, log sum_v exp z[t,v] - z[t,target], in float32.

    z are the logits divided by the temperature; the sum runs over the ids that are kept.

    Args:
      hidden: the last hidden states.
      unembed: makes logits of hidden states; it may close over traced parameters. Where the vocabulary is sharded it
        gives the logits of this shard's part.
      targets: ids of the vocabulary.
      chunk: about how many tokens' logits exist at a time, forward and backward.
      temperature: that targets were drawn at, more than 0.
      kept: the ids among which each target was drawn, then -1; where there are none, the whole vocabulary.

    Raises:
      ValueError: if `targets` or `kept` has another shape than the tokens of `hidden`.
    """
    batch, length, _ = hidden.shape
    if targets.shape != (batch, length):
        raise ValueError(f"targets must have the shape of hidden's tokens {(batch, length)}, got {targets.shape}")
    kept = jnp.zeros((batch, length, 0), jnp.int32) if kept is None else jnp.asarray(kept, jnp.int32)
    if kept.shape[:2] != (batch, length):
        raise ValueError(f"kept must be [{batch}, {length}, M] as hidden's tokens, got {list(kept.shape)}")
    width = min(length, max(1, chunk // batch))
    blocks = -(-length // width)
    padding = blocks * width - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, blocks, width, -1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, blocks, width)
    kept = jnp.pad(kept, ((0, 0), (0, padding), (0, 0)), constant_values=-1).reshape(batch, blocks, width, -1)

    @jax.checkpoint
    def block_losses(block):
        hidden, targets, kept = block
        logits = unembed(hidden).astype(jnp.float32) / temperature
        peak = max_statistics(jnp.max(logits, axis=-1), "vocabulary")
        total = sum_shards(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1), "vocabulary")
        whole = peak + jnp.log(total)
        if kept.shape[-1]:
            whole = jnp.where(kept[..., 0] < 0, whole, _log_total_of(logits, kept))
        return whole - _logits_of(logits, targets[..., None])[..., 0]

    with jax.named_scope("cross_entropy"):
        losses = jax.lax.map(block_losses, tuple(x.swapaxes(0, 1) for x in (hidden, targets, kept)))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]


def _logits_of(logits, ids):
    """Takes the logits of ids [..., M], from the shards of the vocabulary that have them."""
    if num_shards("vocabulary") == 1:
        return jnp.take_along_axis(logits, ids, axis=-1)
    local = ids - shard_index("vocabulary") * logits.shape[-1]
    is_local = (local >= 0) & (local < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(is_local, local, 0), axis=-1)
    return sum_shards(jnp.where(is_local, picked, 0.0), "vocabulary")


def _log_total_of(logits, kept):
    """Computes log sum exp over the ids that are kept, by their own peak: all may be far below the likeliest."""
    is_kept = kept >= 0
    picked = jnp.where(is_kept, _logits_of(logits, jnp.maximum(kept, 0)), -jnp.inf)
    peak = jnp.maximum(jax.lax.stop_gradient(jnp.max(picked, axis=-1)), jnp.finfo(jnp.float32).min)
    total = jnp.sum(jnp.where(is_kept, jnp.exp(picked - peak[..., None]), 0.0), axis=-1)
    return peak + jnp.log(jnp.where(is_kept[..., 0], total, 1.0))


def log_probabilities(
    model: Transformer, output: Output, batch: Batch, *, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Computes how likely each target is, as an engine does that draws it: of the tempered, kept distribution.

    Args:
      model, output: the model, and its output over the batch.
      batch: with the kept sets in `replay`, if targets were drawn from a truncated distribution.
      temperature: that they were drawn at.
    """
    kept = None if batch.replay is None else batch.replay.kept
    options: dict[str, Any] = dict(temperature=temperature, kept=kept)
    return -token_losses(output.hidden, model.unembedding(), batch.targets, **options)


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembed: Callable[[Float[Array, "... D"]], Float[Array, "... vocab"]],
    targets: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    chunk: int = CHUNK_TOKENS,
) -> Float[Array, ""]:
    """Sums the negative log-likelihoods of the valid targets; see `token_losses`."""
    return jnp.sum(jnp.where(valid, token_losses(hidden, unembed, targets, chunk=chunk), 0.0))


def indexer_loss(
    kl: Float[Array, "layers B T"], valid: Bool[Array, "B T"], config: Config | None = None
) -> Float[Array, ""]:
    """Sums the valid queries' KL over all layers: the mean over queries is summed over layers, not averaged.

    Of the layers that one indexer selects for, as `config` says, the mean counts. Its gradient is that of the KL to the
    mean of their targets: softmax(I) - p is linear in p. The two differ by how far the targets p are from each other
    (their generalised Jensen-Shannon divergence), which no indexer changes, and no layer need keep its target for it.
    """
    if config is None or not config.indexer_types:
        return jnp.sum(jnp.where(valid, kl, 0.0))
    return jnp.sum(_layer_sums(kl, valid, config))


def _layer_sums(kl, valid, config) -> Float[Array, " layers"]:
    sums = jnp.sum(jnp.where(valid, kl, 0.0), axis=(1, 2))
    return sums * jnp.asarray(kl_shares(config), sums.dtype) if config.indexer_types else sums


def _kl_layers(model: Transformer, output: Output, batch: Batch) -> Float[Array, " layers"]:
    return _layer_sums(output.indexer_kl, batch.keys.nonempty(), model.config)


def _lm_total(model: Transformer, output: Output, batch: Batch) -> Float[Array, ""]:
    return cross_entropy(output.hidden, model.unembedding(), batch.targets, batch.valid)


def _kl_total(model: Transformer, output: Output, batch: Batch) -> Float[Array, ""]:
    kl: Any = output.indexer_kl  # there unless it was not asked for
    return indexer_loss(kl, batch.keys.nonempty(), model.config)


LM_LOSS = Loss(_lm_total, lambda batch: jnp.sum(batch.valid))  # nats a target
KL_LOSS = Loss(
    _kl_total, lambda batch: jnp.sum(batch.keys.nonempty()), _kl_layers
)  # Eqs. 3-4, nats a query, of all layers


# Prediction layers: each depth has a mean of its own, over the targets and queries that it has.


def prediction_losses(
    losses: Sequence[Loss], depths: int, weight: Array | float = 1.0
) -> dict[str, tuple[Loss, Array | float]]:
    """Makes the terms that prediction layers add to an objective, by their names, and the weight of each.

    Beside `LM_LOSS` stands the cross-entropy of each depth, `mtp_loss_1` and so on, with the weight lambda / D; beside
    `KL_LOSS` the divergence of each layer's own indexer, `mtp_kl_1`, with the weight 1 that it has in all other layers.

    Args:
      losses: the phase's own.
      depths: D, the number of prediction layers.
      weight: lambda.

    References:
      DeepSeek-V3, arXiv:2412.19437, Eqs. 24–25; there a depth's sum is divided by the length of the whole sequence.
    """
    terms: dict[str, tuple[Loss, Array | float]] = {}
    for depth in range(1, depths + 1):
        if LM_LOSS in losses:
            terms[f"mtp_loss_{depth}"] = _prediction_loss(depth), weight / depths
        if KL_LOSS in losses:
            terms[f"mtp_kl_{depth}"] = _prediction_kl(depth), 1.0
    return terms


def _prediction_loss(depth: int) -> Loss:
    """Makes the cross-entropy of the tokens that stand `depth` + 1 places ahead, within a document and where learnt."""

    def learnt(batch: Batch) -> Bool[Array, "B T"]:
        return _are_ahead(batch, depth) & (shift_tokens(jnp.asarray(batch.valid, jnp.int32), depth) > 0)

    def total(model: Transformer, output: Output, batch: Batch) -> Float[Array, ""]:
        predicted: Any = output.predicted
        targets = shift_tokens(jnp.asarray(batch.targets), depth)
        return cross_entropy(predicted.hidden[depth - 1], model.unembedding(), targets, learnt(batch))

    return Loss(total, lambda batch: jnp.sum(learnt(batch)))


def _prediction_kl(depth: int) -> Loss:
    """Makes the divergence of a prediction layer's indexer, of the queries whose token ahead is there."""

    def total(model: Transformer, output: Output, batch: Batch) -> Float[Array, ""]:
        predicted: Any = output.predicted
        return jnp.sum(jnp.where(predicted.valid[depth - 1], predicted.indexer_kl[depth - 1], 0.0))

    return Loss(total, lambda batch: jnp.sum(_are_ahead(batch, depth)))


def _are_ahead(batch: Batch, depth: int) -> Bool[Array, "B T"]:
    return tokens_ahead(jnp.asarray(batch.tokens), batch.keys, depth)[1].nonempty()[depth - 1]
