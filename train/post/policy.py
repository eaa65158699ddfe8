"""The settings of reinforcement learning, the batches that it trains on, and their loss as a phase takes it."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax import Output, Transformer
from train.checks import check_integer, check_number, shown
from train.data import Batch
from train.losses import Loss, log_probabilities
from train.post.objective import Terms, grpo_terms, has_tokens

REPLAYS = ("routes", "kept", "selections")
COUNTS = ("num_generations", "max_completion_length", "num_iterations", "steps_per_generation", "rollout_rows")


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """Holds the settings of rollouts and of their objective, by the names that they have in TRL.

    Args:
      num_generations: episodes of one problem, whose rewards are compared.
      max_completion_length: tokens of an episode behind its prompt: all turns and all observations together.
      off_policy_mask_threshold: δ: episodes with A < 0 whose mean log(π_old / π_θ) is above it give no gradient; None
        masks none. It has no default: 0.5 and 1e-4 are both in use, and mean different things.
      beta: the weight of the KL against the weights that the stage began with.
      epsilon: how far the ratio may fall below 1 before it is clipped.
      epsilon_high: how far it may rise above 1; None: as far as `epsilon`.
      scale_rewards: whether advantages are divided by the deviation of their group.
      num_iterations: how often an episode is trained on.
      steps_per_generation: updates that the episodes of one rollout are spread over.
      temperature: that turns are sampled at.
      top_p: the probability that the tokens to draw among have together.
      top_k: how many tokens to draw among; 0: all.
      attention: "sparse", or "dense" to compare with.
      freeze_indexer: whether the indexer stays as it is, instead of learning from its KL on the rollouts.
      replay: what training takes from the rollouts instead of computing it anew, among "routes", "kept", "selections".
      episode_seconds: the time that an episode may take, all its turns together.
      rollout_rows: episodes that are played at once.

    Raises:
      ValueError: naming a field that cannot be, or fields that contradict each other.
    """

    num_generations: int
    max_completion_length: int
    off_policy_mask_threshold: float | None
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    scale_rewards: bool = False
    num_iterations: int = 1
    steps_per_generation: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    attention: Literal["sparse", "dense"] = "sparse"
    freeze_indexer: bool = False
    replay: tuple[str, ...] = ()
    episode_seconds: float = 600.0
    rollout_rows: int = 64

    def __post_init__(self):
        for name in COUNTS:
            check_integer(name, getattr(self, name))
        check_integer("top_k", self.top_k, least=0)
        if self.off_policy_mask_threshold is not None:
            check_number("off_policy_mask_threshold", self.off_policy_mask_threshold, least=0)
        check_number("beta", self.beta, least=0)
        check_number("epsilon", self.epsilon, above=0, below=1)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high, above=0)
        for name in ("temperature", "episode_seconds"):
            check_number(name, getattr(self, name), above=0)
        check_number("top_p", self.top_p, above=0)
        for name in ("scale_rewards", "freeze_indexer"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        self._check_together()

    def _check_together(self) -> None:
        if self.attention not in ("sparse", "dense"):
            raise ValueError(f"attention must be 'sparse' or 'dense', got {shown(self.attention)}")
        unknown = [name for name in self.replay if name not in REPLAYS]
        if unknown or len(set(self.replay)) < len(self.replay):
            raise ValueError(f"replay must be different ones of {', '.join(REPLAYS)}, got {shown(self.replay)}")
        if self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {self.top_p}")
        if self.truncates and "kept" not in self.replay:
            raise ValueError(
                f"top_p {self.top_p} and top_k {self.top_k} truncate what is sampled: replay must have 'kept', so that "
                "training sees the same distribution, or set top_p 1 and top_k 0"
            )
        if "kept" in self.replay and not self.truncates:
            raise ValueError("replay of 'kept' needs top_p below 1 or top_k above 0: nothing is left out otherwise")
        if self.attention == "dense" and "selections" in self.replay:
            raise ValueError("replay of 'selections' needs attention 'sparse': dense attention selects nothing")
        if self.attention == "dense" and not self.freeze_indexer:
            raise ValueError(
                "attention 'dense' needs freeze_indexer true: nothing is selected that it could learn from"
            )

    @property
    def draws(self) -> dict[str, Any]:
        """Says how turns are drawn and what ends an episode, by the names of `Rollouts.sample`."""
        names = ("max_completion_length", "temperature", "top_p", "top_k", "episode_seconds")
        return {name: getattr(self, name) for name in names}

    @property
    def truncates(self) -> bool:
        """Says whether tokens are left out when one is drawn."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def updates_per_rollout(self) -> int:
        """Counts the updates on the episodes of one rollout; the last is made with samples that are one less stale."""
        return self.steps_per_generation * self.num_iterations

    def check_shape(self, batch_size: int, seq_len: int) -> None:
        """Checks that a stage's batches hold whole groups, and its rows a prompt beside a completion.

        Raises:
          ValueError: naming what does not fit.
        """
        if batch_size * self.steps_per_generation % self.num_generations:
            raise ValueError(
                f"batch_size {batch_size} times steps_per_generation {self.steps_per_generation} must be a multiple of "
                f"num_generations {self.num_generations}"
            )
        if self.max_completion_length >= seq_len:
            raise ValueError(
                f"max_completion_length must leave room for a prompt in seq_len {seq_len}, got "
                f"{self.max_completion_length}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutBatch(Batch):
    """Holds episodes, one a row; `valid` marks the targets that the model sampled.

    Attributes:
      advantages: f32[B, T], of each target.
      old_log_probs: f32[B, T], of each target when it was sampled.
      ref_log_probs: f32[B, T], of each target under the reference; None without one.
    """

    advantages: Any
    old_log_probs: Any
    ref_log_probs: Any = None

    def canonical(self) -> Self:
        """Converts what has other dtypes, as `Batch.canonical` does."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(Batch)}
        return dataclasses.replace(self, **vars(Batch(**plain).canonical()))


@dataclasses.dataclass(frozen=True)
class PolicyLoss(Loss):
    """Is the loss of `objective` as a term of a phase: a mean over the episodes of a batch.

    A phase that is only named, in `train.phases`, has it without settings; it cannot train before it has them.
    """

    settings: PolicySettings | None = None

    def measure(
        self, model: Transformer, output: Output, batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Computes the sum over episodes, and of what is watched beside it."""
        if self.settings is None or not isinstance(batch, RolloutBatch):
            raise ValueError("a phase of reinforcement learning needs its PolicySettings and batches of episodes")
        log_probs = log_probabilities(model, output, batch, temperature=self.settings.temperature)
        terms = self._terms(log_probs, batch, self.settings)
        sums = {"masked_share": terms.masked, "clipped_share": terms.clipped, "log_ratio": terms.log_ratio}
        if batch.ref_log_probs is not None:
            sums["reference_kl"] = terms.reference_kl
        return jnp.sum(terms.losses), {name: jnp.sum(each) for name, each in sums.items()}

    def _terms(self, log_probs: Array, batch: RolloutBatch, settings: PolicySettings) -> Terms:
        high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
        return grpo_terms(
            log_probs,
            batch.old_log_probs,
            batch.ref_log_probs,
            batch.advantages,
            batch.valid,
            epsilon=settings.epsilon,
            epsilon_high=high,
            beta=settings.beta,
            off_policy_mask_threshold=settings.off_policy_mask_threshold,
        )


def _count_episodes(batch: Batch) -> Array:
    """Counts the rows that have a token of the model's."""
    return jnp.sum(has_tokens(batch.valid))


def _no_total(model: Transformer, output: Output, batch: Batch) -> Array:
    raise ValueError("the loss of reinforcement learning is computed by PolicyLoss.measure")


def policy_loss(settings: PolicySettings | None = None) -> PolicyLoss:
    """Makes the loss with its settings; two of equal settings are equal, and share what is compiled."""
    return PolicyLoss(_no_total, _count_episodes, settings=settings)
