"""Recipes: what a function is to do, in words, in the small language, and in what it returns.

A recipe takes `n` through a few steps. Programs are written from recipes and repaired by them.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from train.post.environments.language import Limits, call

INPUTS = (*range(10), 13, 20, 31, 50)  # what every program is tested on
LIMITS = Limits(steps=2_000, memory=20_000)
KINDS = {  # words, and code
    "add": ("add {0}", "n=n+{0};"),
    "subtract": ("subtract {0}", "n=n-{0};"),
    "multiply": ("multiply by {0}", "n=n*{0};"),
    "halve": ("halve it, rounding down", "n=n/2;"),
    "odd": ("if it is odd, add {0}", "if n%2==1{{n=n+{0};}}"),
    "above": ("if it is above {1}, subtract {0}", "if n>{1}{{n=n-{0};}}"),
    "below": ("if it is below {1}, add {0}", "if n<{1}{{n=n+{0};}}"),
    "repeat": ("{0} times, add {1}", "i=0;while i<{0}{{n=n+{1};i=i+1;}}"),
}


@dataclass(frozen=True)
class Instruction:
    """One step of a recipe: its kind and its numbers."""

    kind: str
    first: int
    second: int

    @property
    def words(self) -> str:
        """The step in words."""
        return KINDS[self.kind][0].format(self.first, self.second)

    @property
    def code(self) -> str:
        """The step in the small language."""
        return KINDS[self.kind][1].format(self.first, self.second)


def make_instruction(state: random.Random) -> Instruction:
    """Draws one step."""
    kind = state.choice(tuple(KINDS))
    first = state.randint(2, 5) if kind in ("multiply", "repeat") else state.randint(1, 9)
    return Instruction(kind, first, state.randint(2, 9) if kind == "repeat" else state.randint(5, 40))


def other_numbers(step: Instruction, state: random.Random) -> Instruction:
    """Makes a step that is wrong: of the same kind with another first number, or of another kind where it has none."""
    if step.kind == "halve":
        return Instruction("add", state.randint(1, 9), step.second)
    numbers = [number for number in range(2, 10) if number != step.first]
    return Instruction(step.kind, state.choice(numbers), step.second)


def function_of(steps: Sequence[Instruction]) -> str:
    """Writes the function `f` of a recipe on one line."""
    return "def f(n){" + "".join(step.code for step in steps) + "return n;}"


@functools.lru_cache(4_096)  # tests are run again and again
def result(source: str, given: int) -> object:
    """Calls `f` of a source; None where it was stopped."""
    return call(source, "f", [given], limits=LIMITS).value


def results(source: str) -> tuple[object, ...]:
    """Calls `f` of a source with every test input; None where it was stopped."""
    return tuple(result(source, each) for each in INPUTS)


def share_right(source: str, expected: Sequence[object]) -> float:
    """Returns the share of test inputs for which `f` of a source returns what is expected."""
    found = results(source)
    return sum(one is not None and one == other for one, other in zip(found, expected, strict=True)) / len(INPUTS)
