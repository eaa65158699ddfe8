"""Programs that the interpreter runs: letters that lead from one value to another, and functions from a recipe.

    P03>07:                                                     →  d06a07=      letters; the digits are notes
    Write f(n): add 3; if it is odd, add 1; return it. f(4)=8:  →  def f(n){n=n+3;if n%2==1{n=n+1;}return n;}

The letters are run, not their notes: a program is right if it reaches the value. A function is right if it returns what
the recipe does for every test input, of which the prompt shows one.
"""

import random
import re
from dataclasses import dataclass, field

from train.checks import check_integer, shown
from train.post.environment import Task
from train.post.environments.letters import check_letters, value_after, values_after
from train.post.environments.problems import Grade, OneAnswer, check_range, chosen, make_task
from train.post.environments.recipes import (
    INPUTS,
    Instruction,
    function_of,
    make_instruction,
    other_numbers,
    results,
    share_right,
)
from train.post.rewards import LengthPenalty

NAME = "programs"
KINDS = ("reach", "write")


@dataclass(frozen=True)
class ProgramsSize:
    """How hard the problems are.

    Args:
      kinds: Some of `KINDS`; each is drawn as often.
      operations: Letters of `letters.STATEMENTS`, for "reach".
      letters: The least and the most that a demonstration takes to its value.
      digits: Of values, for "reach".
      distance: The largest difference between the start and the value to reach.
      steps: The least and the most of a recipe, for "write".
      length: Output tokens of which the length penalty takes its whole share.
    """

    kinds: tuple[str, ...] = ("reach",)
    operations: str = "ads"
    letters: tuple[int, int] = (2, 4)
    digits: int = 2
    distance: int = 6
    steps: tuple[int, int] = (2, 4)
    length: int = 40

    def __post_init__(self):
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {shown(self.kinds)}")
        check_letters("operations", self.operations)
        check_range("letters", self.letters, least=1, most=32)
        check_integer("digits", self.digits, most=6)
        check_integer("distance", self.distance)
        check_range("steps", self.steps, least=1, most=16)
        check_integer("length", self.length)


TINY = ProgramsSize()
LARGE = ProgramsSize(kinds=("write",), steps=(2, 6), length=200)  # "reach" is the harder kind: it must be planned


@dataclass(frozen=True)
class Reach:
    """A value to reach from another; `way` does, and others may."""

    start: int
    target: int
    digits: int
    way: str = field(repr=False)  # problems with one prompt are one problem

    @property
    def prompt(self) -> str:
        """Both values."""
        return f"P{self.start:0{self.digits}d}>{self.target:0{self.digits}d}:"

    def grade(self, text: str) -> Grade:
        """Grades by running the letters; digits between them are notes, and `=` ends the program."""
        if not re.fullmatch(rf"(?:[a-z][0-9]{{0,{self.digits}}})+=", text):
            return Grade(0.0)
        return Grade(float(value_after(re.sub(r"[^a-z]", "", text), self.start) == self.target))

    def demonstrate(self, state: random.Random) -> list[str]:
        """Writes the way that was drawn, which is seldom the shortest."""
        pairs = zip(self.way, values_after(self.way, self.start), strict=True)
        return ["".join(f"{letter}{value:0{self.digits}d}" for letter, value in pairs) + "="]


@dataclass(frozen=True)
class Write:
    """A recipe to write a function of."""

    steps: tuple[Instruction, ...]

    @property
    def expected(self) -> tuple[object, ...]:
        """Lists what the function returns for each test input."""
        return results(function_of(self.steps))

    @property
    def prompt(self) -> str:
        """The recipe in words, and one test."""
        words = "; ".join(step.words for step in self.steps)
        shown_input = 4
        return f"Write f(n): {words}; return it. f({shown_input})={self.expected[INPUTS.index(shown_input)]}:"

    def grade(self, text: str) -> Grade:
        """Grades by running the function: all tests or nothing."""
        return Grade(float(share_right(text, self.expected) == 1.0))

    def demonstrate(self, state: random.Random) -> list[str]:
        """Writes the function: half well, a fifth too long, the others without a step or with a wrong number."""
        kind = chosen(state, (("well", 50), ("long", 20), ("short", 15), ("wrong", 15)))
        steps, at = list(self.steps), state.randrange(len(self.steps))
        if kind == "short":
            del steps[at]
        elif kind == "wrong":
            steps[at] = other_numbers(steps[at], state)
        source = function_of(steps)
        return [source.replace("{", "{m=n;n=m;", 1) if kind == "long" else source]


def make_program(size: ProgramsSize, state: random.Random) -> Reach | Write | None:
    """Draws a problem of one of the kinds; None where a value has more digits than there are or stays what it was."""
    if state.choice(size.kinds) == "write":
        return Write(tuple(make_instruction(state) for _ in range(state.randint(*size.steps))))
    start = state.randrange(10**size.digits)
    way = "".join(state.choice(size.operations) for _ in range(state.randint(*size.letters)))
    values = values_after(way, start)
    if min(values) < 0 or max(values) >= 10**size.digits or not 0 < abs(values[-1] - start) <= size.distance:
        return None
    return Reach(start, values[-1], size.digits, way)


def programs(size: ProgramsSize = TINY, *, alpha: float = 0.1) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      alpha: The share that the length penalty takes from a right answer of `size.length` tokens; 0 for none.
    """
    rewards = ((LengthPenalty(alpha=alpha, tokens=size.length), 1.0),)
    demonstrate = lambda made, state: made.demonstrate(state)  # noqa: E731
    return make_task(NAME, lambda state: make_program(size, state), OneAnswer, demonstrate, rewards)
