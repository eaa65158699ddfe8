"""Rewards by rule, and their weighted sum, in which nothing invalid passes.

A reward takes episodes and returns one finite number each. The rules here read what an environment left behind:
`outcome`, from 0 to 1, and `language`, the share of the chain of thought that is in the right language.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.checks import check_integer, check_number, shown
from train.post.environment import Episode, Reward


class RewardError(ValueError):
    """Says which reward returned or raised what it may not."""


def output_tokens(episode: Episode) -> int:
    """Counts what the model itself wrote in all turns, end markers included."""
    return sum(len(turn.tokens) for turn in episode.turns)


def _left(episode: Episode, name: str) -> float:
    """Reads a number that an environment left."""
    if not hasattr(episode.environment, name):
        kind = type(episode.environment).__name__
        raise RewardError(f"environments of {episode.task} need a number called {name}, {kind} has none")
    return float(getattr(episode.environment, name))


def outcome(episodes: Sequence[Episode]) -> list[float]:
    """Returns whether each problem was solved, as its environment says: 0 to 1."""
    return [_left(episode, "outcome") for episode in episodes]


def language(episodes: Sequence[Episode]) -> list[float]:
    """Returns the share of each chain of thought that is in the right language, as its environment says."""
    return [_left(episode, "language") for episode in episodes]


@dataclass(frozen=True)
class LengthPenalty:
    """Takes from what is right for what it took: `reward · (1 − alpha · min(1, output tokens / tokens))`.

    A wrong answer loses nothing, so that being short is never worth more than being right.

    Args:
      reward: What is multiplied, by itself at least 0.
      alpha: The share that an answer of `tokens` loses, 0 to 1.
      tokens: Output tokens over all turns from which on the penalty no longer grows.
    """

    reward: Reward = outcome
    alpha: float = 0.2
    tokens: int = 40

    def __post_init__(self):
        check_number("alpha", self.alpha, least=0)
        if self.alpha > 1:
            raise ValueError(f"alpha must be at most 1, got {shown(self.alpha)}")
        check_integer("tokens", self.tokens)

    @property
    def __name__(self) -> str:
        return f"{reward_name(self.reward)}_short"

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """Returns the rewards, each less the share for its length."""
        values = checked(self.reward, episodes)
        shares = [min(1.0, output_tokens(episode) / self.tokens) for episode in episodes]
        return [float(value) * (1 - self.alpha * share) for value, share in zip(values, shares, strict=True)]


@dataclass(frozen=True)
class ScriptConsistency:
    """Returns the share of the letters of all turns that are of one script, 1 where there are none.

    Args:
      script: The first word of its letters' Unicode names: LATIN, CYRILLIC, CJK, GREEK, ARABIC, …
    """

    script: str = "LATIN"

    def __post_init__(self):
        if not self.script.isascii() or not self.script.isalpha() or not self.script.isupper():
            raise ValueError(f"script must be the first word of letters' Unicode names, got {shown(self.script)}")

    @property
    def __name__(self) -> str:
        return f"script_{self.script.lower()}"

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """Returns the share of each episode."""
        return [self.share("".join(turn.text for turn in episode.turns)) for episode in episodes]

    def share(self, text: str) -> float:
        """Returns the share of the letters of a text that are of the script."""
        letters = [letter for letter in text if letter.isalpha()]
        right = sum(unicodedata.name(letter, "").split(" ")[0] == self.script for letter in letters)
        return right / len(letters) if letters else 1.0


def reward_name(reward: Any) -> str:
    """Returns the name under which a reward stands in errors and metrics."""
    return str(getattr(reward, "__name__", "") or type(reward).__name__)


def checked(reward: Reward, episodes: Sequence[Episode]) -> np.ndarray:
    """Calls a reward and lets nothing but one finite number an episode pass.

    Returns:
      float64, one an episode.

    Raises:
      RewardError: naming the reward, if it raises, or returns NaN, an infinity, no numbers or the wrong count.
    """
    name = reward_name(reward)
    try:
        values = list(reward(episodes))
    except RewardError:
        raise
    except Exception as error:
        # The message may hold a prompt or a key, the kind of error never does; the cause is chained for who debugs.
        raise RewardError(f"the reward {name} raised {type(error).__name__}") from error
    if len(values) != len(episodes):
        raise RewardError(f"the reward {name} must return {len(episodes)} numbers, one an episode, got {len(values)}")
    for position, (value, episode) in enumerate(zip(values, episodes, strict=True)):
        if not _is_finite(value):
            place = f"episode {position} ({episode.task}, problem {episode.problem})"
            raise RewardError(f"the reward {name} must return finite numbers, got {shown(value)} for {place}")
    return np.array([float(value) for value in values], np.float64)


def _is_finite(value: Any) -> bool:
    """Says whether something is one number that is neither NaN nor infinite; NumPy's and JAX's scalars are numbers."""
    if value is None or isinstance(value, str | bytes):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


@dataclass(frozen=True)
class Scores:
    """The rewards of some episodes.

    Args:
      total: float64, the weighted sum of each episode; NaN where it was dropped, so that none is trained on unseen.
      parts: The unweighted values by the reward's name; NaN where an episode was dropped.
      dropped: bool, true for episodes that ended in an error, before their rewards or in them.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


def score(rewards: Sequence[tuple[Reward, float]], episodes: Sequence[Episode]) -> Scores:
    """Sums rewards with their weights.

    An episode that has ended in an error gets no reward. A reward that can have no number for one episode (a judge
    that does not answer) sets its `ended` to "error" and says why in its `error`: the episode is dropped as well.

    Raises:
      RewardError: naming the reward that raised or returned what it may not.
      ValueError: if a weight is no finite number, two rewards have one name, or there is none.
    """
    if not rewards:
        raise ValueError("a task needs at least one reward, got none")
    names = [reward_name(reward) for reward, _ in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"the rewards of a task need different names, got {', '.join(names)}")
    for name, (_, weight) in zip(names, rewards, strict=True):
        check_number(f"the weight of {name}", weight)
    kept = [position for position, episode in enumerate(episodes) if episode.ended != "error"]
    total, parts = np.full(len(episodes), np.nan), {}
    total[kept] = 0
    for name, (reward, weight) in zip(names, rewards, strict=True):
        parts[name] = np.full(len(episodes), np.nan)
        parts[name][kept] = checked(reward, [episodes[position] for position in kept]) if kept else 0
        total += weight * parts[name]
    dropped = np.array([episode.ended == "error" for episode in episodes], bool)
    for values in (total, *parts.values()):
        values[dropped] = np.nan
    return Scores(total, parts, dropped)
