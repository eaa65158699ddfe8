"""Problems by number: what one number draws, and that no problem is both trained on and held out."""

import functools
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from train.checks import check_integer, shown
from train.post.environment import Environment, Reward, Step, Task

HELD_OUT = 1_000_000  # the first number that is held out
HELD_SHARE = 8  # one problem of so many is held out, by a hash of all that it consists of
_ATTEMPTS = 2_000  # none of these is of the right side once in 10^115 draws


def draw[P](
    task: str,
    problem: int,
    make: Callable[[random.Random], P | None],
    *,
    good: Callable[[P], bool] = lambda made: True,
) -> P:
    """Draws the problem of a number: always the same one, and never one of the other side of the split.

    Small families repeat themselves. So numbers from `HELD_OUT` on draw only problems whose hash says that they are
    held out, and lower ones only others.

    Args:
      task: The name of the family; each has its own draws.
      problem: The number, at least 0.
      make: Makes a problem from a random state, or None where it fell out of bounds and is to be drawn anew. Its
        `repr` must hold all that makes it differ from others.
      good: What takes too long to ask of problems of the other side; a problem that is not is drawn anew.

    Raises:
      ValueError: if the number is none, or the family has nothing to draw from.
    """
    check_integer("problem", problem, least=0)
    for attempt in range(_ATTEMPTS):
        made = make(random.Random(f"{task} {problem} {attempt}"))
        if made is None or (zlib.crc32(repr(made).encode()) % HELD_SHARE == 0) != (problem >= HELD_OUT):
            continue
        if good(made):
            return made
    side = "held-out" if problem >= HELD_OUT else "trained"
    raise ValueError(f"{task} has no {side} problem at this size: make it larger")


def chosen(state: random.Random, shares: Sequence[tuple[str, float]]) -> str:
    """Draws one of some names by their shares."""
    return state.choices([name for name, _ in shares], [share for _, share in shares])[0]


def check_range(name: str, value: tuple[int, int], *, least: int, most: int) -> None:
    """Checks a pair of least and most, both included.

    Raises:
      ValueError: naming the field, if it is no ordered pair of integers within the bounds.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of least and most, got {shown(value)}")
    for each in value:
        check_integer(name, each, least=least, most=most)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be a pair of least and most, got {shown(value)}")


class Grade(NamedTuple):
    """How good an answer is (0 to 1), and the share of its chain that is in the right language."""

    outcome: float
    language: float = 1.0


class Question(Protocol):
    """A problem with one answer."""

    @property
    def prompt(self) -> str:
        """The prompt."""
        ...

    def grade(self, text: str) -> Grade:
        """Grades an answer, whatever it holds."""
        ...


@dataclass
class OneAnswer:
    """The environment of a problem with one answer.

    Args:
      problem: What is asked.
      outcome: How good the answer is; 0 until there is one.
      language: The share of its chain in the right language.
    """

    problem: Question
    outcome: float = 0.0
    language: float = 0.0

    def reset(self) -> str:
        """Returns the prompt."""
        return self.problem.prompt

    def step(self, text: str) -> Step:
        """Grades the answer and ends."""
        self.outcome, self.language = self.problem.grade(text)
        return Step("", True)


def make_task[P](
    name: str,
    make: Callable[[random.Random], P | None],
    world: Callable[[P], Environment],
    demonstrate: Callable[[P, random.Random], Sequence[str]],
    rewards: tuple[tuple[Reward, float], ...],
    *,
    max_turns: int = 1,
    good: Callable[[P], bool] = lambda made: True,
) -> Task:
    """Makes the task of a family of problems.

    Args:
      name: The name of the task and of its draws.
      make, good: As `draw` takes them.
      world: A problem → its environment.
      demonstrate: A problem and a random state → the turns of a demonstration.
      rewards: With their weights.
      max_turns: The most turns of an episode.
    """

    @functools.lru_cache(1_024)  # a group plays one problem
    def problem(number: int) -> P:
        return draw(name, number, make, good=good)

    def demonstration(number: int) -> Sequence[str]:
        return demonstrate(problem(number), random.Random(f"{name} demonstration {number}"))

    return Task(name, lambda number: world(problem(number)), rewards, demonstration, max_turns=max_turns)
