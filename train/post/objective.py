"""The objective of reinforcement learning: group-relative policy optimisation, as pure functions of arrays.

For a group of G completions o_i of one prompt, with rewards R_i,

    loss = -1/G Σ_i 1/|o_i| Σ_t [ min(r A, clip(r, 1 - ε, 1 + ε_high) A) · M_i - β · KL ]

    r    = π_θ(o_t) / π_old(o_t)                            π_old: probabilities of the engine that sampled
    A_i  = R_i - mean_group(R)                              optionally divided by the group's deviation
    M_i  = 0 where A_i < 0 and mean_t log(π_old / π_θ) > δ  else 1
    KL   = r (ρ - log ρ - 1),  ρ = π_ref / π_θ              unbiased for samples of π_old

A sequence may lie on several shards of a mesh: each computes the part of its tokens, and their sum is the sequence's.

All probabilities are after temperature and truncation. The mask of tokens has those that the model sampled: prompts and
answers of tools are outside it and carry no loss.

References:
  DeepSeekMath (GRPO), 2024; DeepSeek-V3.2's technical report, section 3.1 (unbiased KL, off-policy masking).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike

from dsa_jax.parallel.collectives import shard_index, sum_statistics

MAX_LOG_RATIO = 20.0  # beyond it exp is of no use, and its product with a zero gradient would be NaN
MIN_DEVIATION = 1e-4  # is added to a group's deviation, as TRL does

# Host: rewards to advantages


def group_advantages(
    rewards: ArrayLike, num_generations: int, *, scale_rewards: bool = False, counted: ArrayLike | None = None
) -> Float[np.ndarray, " B"]:
    """Computes A_i = R_i - mean of the group, in float32 from sums in float64.

    Args:
      rewards: [B], groups adjacent.
      num_generations: G, the episodes of a group.
      scale_rewards: whether A is divided by the group's standard deviation.
      counted: [B], episodes that take part; the others get 0 and are in no mean. None: all.

    Raises:
      ValueError: if B is no multiple of G, or a reward that is counted is not finite.

    Examples:
      >>> group_advantages([1.0, 0.0, 0.0, 0.0], 2).tolist()
      [0.5, -0.5, 0.0, 0.0]
    """
    groups, taken = _groups(rewards, num_generations, counted)
    count = np.maximum(taken.sum(axis=1, keepdims=True), 1)
    mean = groups.sum(axis=1, keepdims=True) / count
    centred = np.where(taken & ~_is_equal(groups, taken)[:, None], groups - mean, 0.0)
    if scale_rewards:
        deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
        centred = centred / (deviation + MIN_DEVIATION)
    return centred.reshape(-1).astype(np.float32)


def equal_groups(rewards: ArrayLike, num_generations: int, *, counted: ArrayLike | None = None) -> int:
    """Counts the groups whose counted rewards are all equal: they give no gradient.

    Examples:
      >>> equal_groups([1.0, 0.0, 0.5, 0.5], 2)
      1
    """
    return int(_is_equal(*_groups(rewards, num_generations, counted)).sum())


def _groups(rewards: ArrayLike, size: int, counted: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Reshapes to [groups, G]; what is not counted becomes 0."""
    values = np.asarray(rewards, np.float64)
    taken = np.ones(values.shape, bool) if counted is None else np.asarray(counted, bool)
    if values.ndim != 1 or taken.shape != values.shape or size < 1 or values.size % size:
        raise ValueError(
            f"rewards must be [B] with B a multiple of num_generations {size}, got {list(values.shape)} and counted "
            f"{list(taken.shape)}"
        )
    if not np.isfinite(values[taken]).all():
        raise ValueError(f"rewards must be finite, got {values[taken][~np.isfinite(values[taken])][0]}")
    return np.where(taken, values, 0.0).reshape(-1, size), taken.reshape(-1, size)


def _is_equal(groups: np.ndarray, taken: np.ndarray) -> np.ndarray:
    low, high = np.where(taken, groups, np.inf).min(axis=1), np.where(taken, groups, -np.inf).max(axis=1)
    return low >= high  # also where none, or one alone, is counted


# Device: log-probabilities to losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """Holds each sequence's part of the objective and what is watched of it; each is float32 [B], of this shard.

    Attributes:
      losses: 1/|o| Σ_t of the negated bracket; 0 for a sequence without tokens.
      masked: 1 for a sequence whose M is 0.
      clipped: the share of tokens whose ratio was clipped in effect.
      reference_kl: the mean of the unbiased KL; 0 without a reference.
      log_ratio: the mean of |log(π_θ / π_old)|.
    """

    losses: Array
    masked: Array
    clipped: Array
    reference_kl: Array
    log_ratio: Array


def log_ratios(log_probs: Float[Array, "B T"], old: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Array:
    """Computes log(π_θ / π_old) in float32, bounded by `MAX_LOG_RATIO`; 0 outside the mask."""
    difference = log_probs.astype(jnp.float32) - old.astype(jnp.float32)
    return jnp.clip(jnp.where(mask, difference, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_objective(log_ratio: Array, advantages: Array, *, epsilon: float, epsilon_high: float) -> Array:
    """Computes min(r A, clip(r, 1 - ε, 1 + ε_high) A)."""
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high) * advantages)


def unbiased_kl(log_ratio: Array, log_probs: Array, ref_log_probs: Array) -> Array:
    """Computes (π_θ/π_old)(π_ref/π_θ - log(π_ref/π_θ) - 1), whose mean over samples of π_old is KL(π_θ ‖ π_ref).

    Its gradient at π_θ = π_old is (log π_θ - log π_ref) ∇ log π_θ.
    """
    log_rho = jnp.clip(ref_log_probs - log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(log_ratio) * (jnp.expm1(log_rho) - log_rho)


def off_policy_mask(log_ratio: Array, advantages: Array, mask: Array, threshold: float | None) -> Float[Array, " B"]:
    """Computes M: 0 for sequences with A < 0 whose mean log(π_old / π_θ) exceeds the threshold, 1 for others.

    Where advantages are given by token, their mean over the sequence decides. It has no gradient.
    """
    if threshold is None:
        return jnp.ones(log_ratio.shape[0], jnp.float32)
    drift, advantage = (
        sum_statistics(_mean(jax.lax.stop_gradient(x), mask), "sequence") for x in (-log_ratio, advantages)
    )
    return jnp.where((advantage < 0) & (drift > threshold), 0.0, 1.0)


def grpo_terms(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    ref_log_probs: Float[Array, "B T"] | None,
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    off_policy_mask_threshold: float | None,
) -> Terms:
    """Computes every sequence's part of the objective at the top of this file; their mean is the loss.

    Args:
      log_probs: log π_θ of each token; the only argument with a gradient.
      old_log_probs: log π_old, of the sampling engine.
      ref_log_probs: log π_ref, None where β is 0.
      advantages: A of each sequence, or of each token.
      mask: the tokens that the model sampled.
      epsilon: ε below.
      epsilon_high: ε above.
      beta: β.
      off_policy_mask_threshold: δ, None for no masking.

    Raises:
      ValueError: if β is not 0 and there is no reference.
    """
    if beta and ref_log_probs is None:
        raise ValueError(f"beta {beta} needs ref_log_probs, got None")
    by_token = jnp.broadcast_to(advantages[:, None] if advantages.ndim == 1 else advantages, mask.shape)
    log_ratio = log_ratios(log_probs, old_log_probs, mask)
    objective = clipped_objective(log_ratio, by_token, epsilon=epsilon, epsilon_high=epsilon_high)
    kept = off_policy_mask(log_ratio, by_token, mask, off_policy_mask_threshold)
    kl = jnp.zeros_like(log_ratio)
    if ref_log_probs is not None:
        safe, reference = (jnp.where(mask, x, 0.0) for x in (log_probs, ref_log_probs))
        kl = unbiased_kl(log_ratio, safe, reference)
    bracket = objective * kept[:, None] - beta * kl
    clipped = objective < jnp.exp(log_ratio) * by_token
    measured = {"clipped": clipped.astype(jnp.float32), "reference_kl": kl, "log_ratio": jnp.abs(log_ratio)}
    watched = {name: jax.lax.stop_gradient(_mean(x, mask)) for name, x in measured.items()}
    return Terms(losses=-_mean(bracket, mask), masked=has_tokens(mask) * (1 - kept), **watched)


def has_tokens(mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Marks the sequences that have a token of the mask by 1; of several shards of a sequence the first alone does."""
    found = sum_statistics(jnp.sum(mask, axis=1), "sequence") > 0
    return jnp.where(found & (shard_index("sequence") == 0), 1.0, 0.0)


def _mean(values: Array, mask: Array) -> Float[Array, " B"]:
    """Averages over a sequence's tokens, of which this shard adds its own; 0 where there are none."""
    count = sum_statistics(jnp.sum(mask, axis=1), "sequence")
    return jnp.sum(jnp.where(mask, values, 0.0), axis=1) / jnp.maximum(count, 1)
