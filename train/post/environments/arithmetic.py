"""Arithmetic with written steps: a start value, operations in order, the value after each, the answer.

    M07a??d??s??a??:  →  a08d16s13a14#14

The prompt has a slot as wide as a step of the chain for every operation, and empty ones (`...`) where there are fewer
than the most, so that an operation always stands at the same distance before its step. The other language of the chain
writes digits as letters: `aai` is `a08`.
"""

import random
import re
from dataclasses import dataclass

from train.checks import check_integer
from train.post.environment import Task
from train.post.environments.letters import check_letters, values_after
from train.post.environments.problems import Grade, OneAnswer, check_range, chosen, make_task
from train.post.rewards import LengthPenalty, language

NAME = "arithmetic"
_LETTERS = str.maketrans("0123456789", "abcdefghij")


@dataclass(frozen=True)
class ArithmeticSize:
    """How hard the problems are.

    Args:
      steps: The least and the most operations.
      digits: Of every value.
      operations: Letters of `letters.STATEMENTS`.
      length: Output tokens of which the length penalty takes its whole share.
    """

    steps: tuple[int, int] = (4, 4)
    digits: int = 2
    operations: str = "ads"
    length: int = 40

    def __post_init__(self):
        check_range("steps", self.steps, least=1, most=64)
        check_integer("digits", self.digits, most=6)
        check_letters("operations", self.operations)
        check_integer("length", self.length)


TINY = ArithmeticSize()
LARGE = ArithmeticSize(steps=(6, 16), operations="adsftn", length=100)


@dataclass(frozen=True)
class Sums:
    """One problem: where it starts, its operations, the digits of a value, and how many slots the prompt has."""

    start: int
    operations: str
    digits: int
    slots: int

    @property
    def prompt(self) -> str:
        """The start and a slot for each operation."""
        slots = "".join(f"{letter}{'?' * self.digits}" for letter in self.operations)
        empty = "." * (self.digits + 1) * (self.slots - len(self.operations))
        return f"M{self.start:0{self.digits}d}{slots}{empty}:"

    @property
    def values(self) -> list[int]:
        """The value after each operation."""
        return values_after(self.operations, self.start)

    @property
    def chain(self) -> str:
        """The right chain of thought, in digits."""
        pairs = zip(self.operations, self.values, strict=True)
        return "".join(f"{letter}{value:0{self.digits}d}" for letter, value in pairs)

    @property
    def answer(self) -> str:
        """The right end of an answer."""
        return f"#{self.values[-1]:0{self.digits}d}"

    def grade(self, text: str) -> Grade:
        """Grades by the answer alone; the share of the chain's steps that are written in digits is its language."""
        chain, mark, answer = text.partition("#")
        steps = re.findall(rf"[a-z][0-9]+|[a-z]{{{self.digits + 1}}}", chain)
        in_digits = sum(step[1:].isdigit() for step in steps)
        return Grade(float(mark + answer == self.answer), in_digits / len(steps) if steps else 0.0)


def make_sums(size: ArithmeticSize, state: random.Random) -> Sums | None:
    """Draws a problem whose values all have the digits that there are."""
    count, start = state.randint(*size.steps), state.randrange(10**size.digits)
    value, operations = start, ""
    for _ in range(count):
        fits = [letter for letter in size.operations if 0 <= values_after(letter, value)[0] < 10**size.digits]
        if not fits:
            return None
        operations += state.choice(fits)
        value = values_after(operations[-1], value)[0]
    return Sums(start, operations, size.digits, size.steps[1])


def demonstrate(sums: Sums, state: random.Random) -> list[str]:
    """Writes a demonstration: a quarter answers at once, a quarter goes through all steps twice, 15 % in letters."""
    kind = chosen(state, (("at once", 25), ("steps", 35), ("twice", 25), ("letters", 15)))
    chain = {"at once": "", "steps": sums.chain, "twice": sums.chain * 2}.get(kind, sums.chain.translate(_LETTERS))
    return [chain + sums.answer]


def arithmetic(size: ArithmeticSize = TINY, *, alpha: float = 0.2) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      alpha: The share that the length penalty takes from a right answer of `size.length` tokens; 0 for none.
    """
    rewards = ((LengthPenalty(alpha=alpha, tokens=size.length), 1.0), (language, 0.1))
    return make_task(NAME, lambda state: make_sums(size, state), OneAnswer, demonstrate, rewards)
