"""Agentic coding: run the tests, edit, run them again, say when it is done. The tests run in our own interpreter.

Tiny, a row of digits that are added to a value:

    E124+07>15:  →  r ← 124+   2+ ← 134ok   =
    run: too small; digit 2 up by one: right; done. Answers say how the value compares: `+` too small, `-` too large.

Large, a function with a wrong line, and the recipe that it should follow:

    Repair f(n): [2] add 3; … Now: [1] def f(n){ [2] n=n+4; …  →  test ← fail: f(4) is 8, not 7   set 2 n=n+3; …   done

An unknown call is answered by an error and the episode goes on; nothing counts but what stands when the model says
that it is done, and then it is tested on inputs that no answer showed.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.checks import check_integer, shown
from train.post.environment import Step, Task
from train.post.environments.language import run
from train.post.environments.problems import check_range, chosen, make_task
from train.post.environments.recipes import (
    INPUTS,
    Instruction,
    make_instruction,
    other_numbers,
    result,
    results,
    share_right,
)
from train.post.rewards import LengthPenalty

NAME = "coding"
KINDS = ("digits", "function")
MAX_LINE = 200  # characters of an edited line
TESTS_SHOWN = 6  # the first of the test inputs; the others are asked when the model says that it is done


@dataclass(frozen=True)
class CodingSize:
    """How hard the problems are.

    Args:
      kind: One of `KINDS`.
      digits: How many digits are added, for "digits".
      off: The least and the most by which their sum is wrong, for "digits".
      steps: The least and the most lines of a function between its first and last, for "function".
      bugs: The least and the most wrong ones of these.
      max_turns: The most turns of an episode.
      length: Output tokens of which the length penalty takes its whole share.
    """

    kind: str = "digits"
    digits: int = 3
    off: tuple[int, int] = (1, 1)
    steps: tuple[int, int] = (3, 6)
    bugs: tuple[int, int] = (1, 1)
    max_turns: int = 6
    length: int = 40

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}")
        check_integer("digits", self.digits, most=9)
        check_range("off", self.off, least=1, most=9)
        check_range("steps", self.steps, least=1, most=16)
        check_range("bugs", self.bugs, least=1, most=self.steps[0])
        check_integer("max_turns", self.max_turns, least=2)
        check_integer("length", self.length)


TINY = CodingSize()
LARGE = CodingSize(kind="function", steps=(3, 8), max_turns=10, length=200)


@dataclass(frozen=True)
class Digits:
    """Digits that are added to a start, and the value that should come out."""

    digits: tuple[int, ...]
    start: int
    target: int


@dataclass
class DigitsFile:
    """The environment of a row of digits.

    Args:
      problem: The digits as they are at first.
      digits: The digits as they are now.
      outcome: 1 once the model says that it is done and the test passes.
      calls: How many turns there were.
    """

    problem: Digits
    digits: list[int] = field(default_factory=list)
    outcome: float = 0.0
    calls: int = 0

    def __post_init__(self):
        self.digits = list(self.problem.digits)

    def reset(self) -> str:
        """Returns the digits, the start and the target."""
        return f"E{self.row}+{self.problem.start:02d}>{self.problem.target:02d}:"

    def step(self, text: str) -> Step:
        """Runs the test, changes a digit and runs the test, or ends."""
        self.calls += 1
        if text == "=":
            self.outcome = float(self.verdict() == "ok")
            return Step("", True)
        if match := re.fullmatch(r"([1-9])([+-])", text):
            at, change = int(match[1]) - 1, 1 if match[2] == "+" else -1
            if at < len(self.digits) and 0 <= self.digits[at] + change <= 9:
                self.digits[at] += change
                return Step(f"{self.row}{self.verdict()}\n", False)
        return Step(f"{self.row}{self.verdict()}\n" if text == "r" else "!\n", False)

    @property
    def row(self) -> str:
        """The digits as they stand in prompts and answers."""
        return "".join(map(str, self.digits))

    def verdict(self) -> str:
        """Runs the digits as a program and compares."""
        source = "".join(f"x=x+{digit};" for digit in self.digits)
        value = run(source, {"x": self.problem.start}).variables["x"]
        return "ok" if value == self.problem.target else "+" if int(str(value)) < self.problem.target else "-"


@dataclass(frozen=True)
class Repair:
    """A recipe, and the lines of a function that are to follow it."""

    steps: tuple[Instruction, ...]
    lines: tuple[str, ...]


@dataclass
class FunctionFile:
    """The environment of a function with wrong lines.

    Args:
      problem: The recipe and the lines as they are at first.
      lines: The lines as they are now.
      outcome: 1 once the model says that it is done and all tests pass.
      calls: How many turns there were.
    """

    problem: Repair
    lines: list[str] = field(default_factory=list)
    outcome: float = 0.0
    calls: int = 0

    def __post_init__(self):
        self.lines = list(self.problem.lines)

    def reset(self) -> str:
        """Returns the recipe by lines, the lines, and what may be called."""
        words = "; ".join(f"[{at}] {step.words}" for at, step in enumerate(self.problem.steps, 2))
        lines = " ".join(f"[{at}] {line}" for at, line in enumerate(self.lines, 1))
        return f"Repair f(n): {words}; return it. Now: {lines} Calls: test, set LINE CODE, done.\n"

    def step(self, text: str) -> Step:
        """Answers one call."""
        self.calls += 1
        if text == "done":
            self.outcome = float(share_right("".join(self.lines), self.expected) == 1.0)
            return Step("", True)
        if text == "test":
            return Step(f"{report(self.lines, right_lines(self.problem.steps))}\n", False)
        match = re.fullmatch(r"set ([1-9][0-9]?) (.+)", text)
        if match is None or int(match[1]) > len(self.lines) or len(match[2]) > MAX_LINE:
            return Step(f"error: no call, or no line of {len(self.lines)}\n", False)
        self.lines[int(match[1]) - 1] = match[2]
        return Step(f"[{match[1]}] {match[2]}\n", False)

    @property
    def expected(self) -> tuple[object, ...]:
        """Lists what the function should return for each test input."""
        return results("".join(right_lines(self.problem.steps)))


def right_lines(steps: Sequence[Instruction]) -> list[str]:
    """Writes the function of a recipe, one step a line."""
    return ["def f(n){", *(step.code for step in steps), "return n;}"]


def make_coding(size: CodingSize, state: random.Random) -> Digits | Repair | None:
    """Draws a problem; None where no digits have the sum."""
    if size.kind == "digits":
        digits = tuple(state.randrange(10) for _ in range(size.digits))
        start = state.randrange(60)
        target = start + sum(digits) + state.choice((-1, 1)) * state.randint(*size.off)
        reachable = start <= target <= min(99, start + 9 * size.digits)
        return Digits(digits, start, target) if reachable else None
    steps = tuple(make_instruction(state) for _ in range(state.randint(*size.steps)))
    lines = right_lines(steps)
    for at in state.sample(range(len(steps)), state.randint(*size.bugs)):
        lines[at + 1] = other_numbers(steps[at], state).code
    return Repair(steps, tuple(lines))


def shows_its_bug(problem: Digits | Repair) -> bool:
    """Says whether a test that is shown fails at first; digits always do."""
    if isinstance(problem, Digits):
        return True
    return report(problem.lines, right_lines(problem.steps)).startswith("fail")


def report(lines: Sequence[str], right: Sequence[str]) -> str:
    """Runs the tests that are shown, and tells of the first that fails."""
    found, wanted = ("".join(each) for each in (lines, right))
    for given in INPUTS[:TESTS_SHOWN]:
        one, other = result(found, given), result(wanted, given)
        if one != other or one is None:
            return f"fail: f({given}) is {'an error' if one is None else str(one)[:20]}, not {other}"
    return f"{TESTS_SHOWN} tests pass"


def demonstrate_digits(problem: Digits, state: random.Random) -> list[str]:
    """Runs the test, changes digits and says that it is done: 20 % give up, 15 % go the wrong way."""
    if chosen(state, (("up", 20), ("on", 80))) == "up":
        return ["r", "="]
    file, turns = DigitsFile(problem), ["r"]
    up = problem.start + sum(problem.digits) < problem.target
    if chosen(state, (("right", 85), ("wrong", 15))) == "wrong":
        up = not up
    for _ in range(abs(problem.target - problem.start - sum(problem.digits))):
        free = [at for at, digit in enumerate(file.digits, 1) if 0 <= digit + (1 if up else -1) <= 9]
        if not free:
            break
        turns.append(f"{state.choice(free)}{'+' if up else '-'}")
        file.step(turns[-1])
    return [*turns, "="]


def demonstrate_function(problem: Repair, state: random.Random) -> list[str]:
    """Tests and sets lines: 45 % right, the others give up, test too often, or put in a wrong line."""
    kind = chosen(state, (("right", 45), ("often", 20), ("up", 20), ("wrong", 15)))
    if kind == "up":
        return ["test", "done"]
    turns = ["test"]
    for at, (line, right) in enumerate(zip(problem.lines, right_lines(problem.steps), strict=True), 1):
        if line != right:
            written = other_numbers(problem.steps[at - 2], state).code if kind == "wrong" else right
            turns += [f"set {at} {written}", *(["test", "test"] if kind == "often" else [])]
    return [*turns, *([] if kind == "often" else ["test"]), "done"]


def open_file(problem: Digits | Repair) -> DigitsFile | FunctionFile:
    """Makes the environment of a problem."""
    return DigitsFile(problem) if isinstance(problem, Digits) else FunctionFile(problem)


def demonstrate(problem: Digits | Repair, state: random.Random) -> list[str]:
    """Writes the turns of a demonstration."""
    return demonstrate_digits(problem, state) if isinstance(problem, Digits) else demonstrate_function(problem, state)


def coding(size: CodingSize = TINY, *, alpha: float = 0.1) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      alpha: The share that the length penalty takes from a right episode of `size.length` tokens; 0 for none.
    """
    rewards = ((LengthPenalty(alpha=alpha, tokens=size.length), 1.0),)
    make = lambda state: make_coding(size, state)  # noqa: E731
    return make_task(NAME, make, open_file, demonstrate, rewards, max_turns=size.max_turns, good=shows_its_bug)
