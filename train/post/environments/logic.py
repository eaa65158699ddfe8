"""Logic puzzles: cups that change places, and an order from clues.

    L2;13;24;12;34;13:       →  2,,4,,4,,3,,1,,=1      the ball is under cup 2; cups 1 and 3 change places, …
    O;b>c;>>a;a>b:           →  >>a;a>b;b>c;=abc       a is first, b behind it, …

Every step of a chain is as wide as the swap that it comes from. A prompt has empty ones (`..;`) where there are fewer
than the most, so that a swap always stands at the same distance before its step.
"""

import random
from dataclasses import dataclass

from train.checks import check_integer, shown
from train.post.environment import Task
from train.post.environments.problems import Grade, OneAnswer, check_range, chosen, make_task
from train.post.rewards import LengthPenalty

NAME = "logic"
KINDS = ("cups", "order")
_DEMONSTRATIONS = (("at once", 30), ("steps", 40), ("twice", 30))


@dataclass(frozen=True)
class LogicSize:
    """How hard the problems are.

    Args:
      kinds: Some of `KINDS`; each is drawn as often.
      cups: How many there are.
      swaps: The least and the most changes of places.
      people: The least and the most that stand in an order.
      length: Output tokens of which the length penalty takes its whole share.
    """

    kinds: tuple[str, ...] = ("cups",)
    cups: int = 4
    swaps: tuple[int, int] = (5, 5)
    people: tuple[int, int] = (4, 4)
    length: int = 40

    def __post_init__(self):
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {shown(self.kinds)}")
        check_integer("cups", self.cups, least=2, most=9)
        check_range("swaps", self.swaps, least=1, most=200)
        check_range("people", self.people, least=2, most=26)
        check_integer("length", self.length)


TINY = LogicSize()
LARGE = LogicSize(kinds=KINDS, cups=6, swaps=(8, 20), people=(5, 12), length=150)


@dataclass(frozen=True)
class Cups:
    """A ball under one of some cups, two of which change places at a time; the prompt has so many slots for swaps."""

    start: int
    swaps: tuple[tuple[int, int], ...]
    slots: int

    @property
    def prompt(self) -> str:
        """The ball's cup and the swaps."""
        empty = [".."] * (self.slots - len(self.swaps))
        return ";".join([f"L{self.start}", *(f"{one}{other}" for one, other in self.swaps), *empty]) + ":"

    @property
    def places(self) -> list[int]:
        """Where the ball is after each swap."""
        place, places = self.start, []
        for one, other in self.swaps:
            place = {one: other, other: one}.get(place, place)
            places.append(place)
        return places

    @property
    def chain(self) -> str:
        """The right chain of thought."""
        return "".join(f"{place},," for place in self.places)

    @property
    def answer(self) -> str:
        """The right end of an answer."""
        return f"={self.places[-1]}"

    def grade(self, text: str) -> Grade:
        """Grades by the answer alone."""
        return _by_the_end(text, self.answer)


@dataclass(frozen=True)
class Order:
    """People in a row, from clues in any order: `>>a` stands first, `a>b` means that b is next to a, behind it.

    The chain follows the clues; the answer names the row: `O;b>c;>>a;a>b:` → `>>a;a>b;b>c;=abc`.
    """

    row: str
    clues: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The clues, in no order."""
        return "O;" + ";".join(self.clues) + ":"

    @property
    def chain(self) -> str:
        """The right chain of thought."""
        return "".join(f"{clue};" for clue in clues_of(self.row))

    @property
    def answer(self) -> str:
        """The right end of an answer."""
        return f"={self.row}"

    def grade(self, text: str) -> Grade:
        """Grades by the answer alone."""
        return _by_the_end(text, self.answer)


def clues_of(row: str) -> list[str]:
    """Lists the clues of a row from its first to its last."""
    return [f">>{row[0]}", *(f"{one}>{other}" for one, other in zip(row, row[1:], strict=False))]


def _by_the_end(text: str, answer: str) -> Grade:
    _, mark, end = text.partition("=")
    return Grade(float(mark + end == answer))


def make_puzzle(size: LogicSize, state: random.Random) -> Cups | Order:
    """Draws a puzzle of one of the kinds."""
    if state.choice(size.kinds) == "cups":
        cups = range(1, size.cups + 1)
        pairs = [(one, other) for one in cups for other in cups if one < other]
        return Cups(
            state.choice(cups), tuple(state.choice(pairs) for _ in range(state.randint(*size.swaps))), size.swaps[1]
        )
    row = list("abcdefghijklmnopqrstuvwxyz")
    state.shuffle(row)
    row = "".join(row[: state.randint(*size.people)])
    clues = clues_of(row)
    state.shuffle(clues)
    return Order(row, tuple(clues))


def demonstrate(puzzle: Cups | Order, state: random.Random) -> list[str]:
    """Writes a demonstration: 30 % answer at once, 30 % go through all steps twice."""
    return [puzzle.chain * {"at once": 0, "steps": 1, "twice": 2}[chosen(state, _DEMONSTRATIONS)] + puzzle.answer]


def logic(size: LogicSize = TINY, *, alpha: float = 0.2) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      alpha: The share that the length penalty takes from a right answer of `size.length` tokens; 0 for none.
    """
    rewards = ((LengthPenalty(alpha=alpha, tokens=size.length), 1.0),)
    return make_task(NAME, lambda state: make_puzzle(size, state), OneAnswer, demonstrate, rewards)
