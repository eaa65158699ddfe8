"""The face of post-training: what an environment, an episode, a reward and a task are.

A user brings `Task` objects in a Python file (`TASK` or `TASKS`) and names the file on the command line
(`--task my_task.py`). All else — rollouts, losses, stages — works on the types of this file alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

type Messages = Sequence[Mapping[str, Any]]
"""Messages as OpenAI's interface has them: `role`, `content` and the like."""


class Step(NamedTuple):
    """The answer of an environment to one turn: what the model reads next, and whether the episode is over.

    It is a text, or messages (of tools, of a user) where the prompt was messages.
    """

    observation: str | Messages
    done: bool


class Environment(Protocol):
    """One episode's world. An object is used for one episode; rewards may read its state afterwards.

    A prompt of messages, and the messages that answer, are written by the model's own template. The environment may
    then have `tools`, the functions that the model may call, as OpenAI's interface describes them.
    """

    def reset(self) -> str | Messages:
        """Returns the prompt, as text or as messages."""
        ...

    def step(self, text: Any) -> Step:
        """Takes the model's turn: its text without the end marker, or where the prompt was messages, its message."""
        ...


def no_tokens() -> np.ndarray:
    """Returns the empty int32 row of a turn that nothing was observed after."""
    return np.zeros(0, np.int32)


@dataclass
class Turn:
    """One turn of the model and what the environment answered.

    Args:
        text: The turn, without its end marker.
        tokens: int32, as sampled, the end marker included.
        log_probs: float32, one a token, of the engine that sampled them, after temperature and truncation.
        observation: The environment's answer, messages as JSON; empty after the last turn.
        observation_tokens: int32; they are read by the model and never carry loss.
    """

    text: str
    tokens: np.ndarray
    log_probs: np.ndarray
    observation: str = ""
    observation_tokens: np.ndarray = field(default_factory=no_tokens)


@dataclass
class Episode:
    """One sampled attempt at one problem.

    Args:
        task: The task's name.
        problem: The number that `Task.make` got.
        prompt: The environment's prompt, messages as JSON.
        prompt_tokens: int32; they never carry loss.
        turns: The model's turns with the answers they got.
        environment: The object that was played; rewards read its state.
        ended: Why it ended: "done", "turns", "tokens", "seconds", "full" or "error".
        error: The message, where an environment raised.
        recorded: Routes, kept sets and selections by position in the sequence, where asked for.
        version: The number of updates the weights had had when the episode was sampled.
    """

    task: str
    problem: int
    prompt: str
    prompt_tokens: np.ndarray
    turns: list[Turn]
    environment: Environment
    ended: str
    error: str = ""
    recorded: Any = None
    version: int = 0


Reward = Callable[[Sequence[Episode]], Sequence[float]]
"""A batched reward: one finite number an episode. NaN or a wrong count is refused by name."""


@dataclass(frozen=True)
class Task:
    """A family of problems with its rewards.

    Args:
        name: The name in metrics and on the command line.
        make: Problem number → environment; the same number gives the same problem.
        rewards: Reward functions with their weights.
        demonstrate: Problem number → the model's turns of a demonstration of mixed quality, in order (tool answers
            come from the environment), or None where a task has none. Turns are texts, or messages where prompts are.
        max_turns: The most turns an episode may take.
        held_out: Problems from this number on are never trained on.
        thinking: Whether the model thinks before each of its answers, where prompts are messages. What it thought of
            earlier answers stays in the episode.
    """

    name: str
    make: Callable[[int], Environment]
    rewards: tuple[tuple[Reward, float], ...]
    demonstrate: Callable[[int], Sequence[Any]] | None = None
    max_turns: int = 1
    held_out: int = 1_000_000
    thinking: bool = False
