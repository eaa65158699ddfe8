"""Answering questions from a text, graded by a rubric of each prompt's own.

Qb7c2k4?c:                                                        →  c is 2
Tola Vesk is a baker in Corin. … What does Tola Vesk do, and where? →  Tola Vesk is a baker in Corin.
"""

import random
from dataclasses import dataclass

from train.checks import check_integer, shown
from train.post.environment import Reward, Task
from train.post.environments.names import PLACES, TRADES, make_names
from train.post.environments.problems import Grade, chosen, make_task
from train.post.environments.rubric import Criterion, RubricAnswer, grade_by_rules, rubric_rewards

NAME = "questions"
KINDS = ("pairs", "people")
_DEMONSTRATIONS = (("full", 40), ("short", 25), ("wrong", 20), ("all", 15))


@dataclass(frozen=True)
class QuestionsSize:
    """How hard the problems are.

    Args:
      kind: One of `KINDS`.
      facts: How many there are, of which one is asked for; at most 9 for "pairs".
    """

    kind: str = "pairs"
    facts: int = 3

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}")
        check_integer("facts", self.facts, least=2, most=9 if self.kind == "pairs" else 400)


TINY = QuestionsSize()
LARGE = QuestionsSize(kind="people", facts=40)


@dataclass(frozen=True)
class Pairs:
    """Letters with a digit each, all different."""

    pairs: tuple[tuple[str, int], ...]
    asked: int

    @property
    def prompt(self) -> str:
        """The pairs, and the letter that is asked for."""
        return "Q" + "".join(f"{letter}{digit}" for letter, digit in self.pairs) + f"?{self.pairs[self.asked][0]}:"

    @property
    def rubric(self) -> tuple[Criterion, ...]:
        """The right digit and the letter, in a sentence, and none of the other digits."""
        letter, digit = self.pairs[self.asked]
        others = tuple(Criterion("omits", f"{other}") for at, (_, other) in enumerate(self.pairs) if at != self.asked)
        return (Criterion("ends", f"{digit}", 2.0), Criterion("begins", f"{letter} is"), *others)

    def grade(self, text: str) -> Grade:
        """Grades by the rules."""
        return grade_by_rules(self.rubric, text)

    def demonstrate(self, state: random.Random) -> list[str]:
        """Writes an answer: 40 % well, the others too short, of another letter, or with all that is known."""
        kind, (letter, digit) = chosen(state, _DEMONSTRATIONS), self.pairs[self.asked]
        if kind == "wrong":
            digit = self.pairs[self.asked - 1][1]
        everything = " ".join(f"{one} is {other}" for one, other in self.pairs)
        return [{"short": f"{digit}", "all": everything}.get(kind, f"{letter} is {digit}")]


@dataclass(frozen=True)
class People:
    """People with a trade and a place each."""

    people: tuple[tuple[str, str, str], ...]
    asked: int

    @property
    def prompt(self) -> str:
        """The facts and the question."""
        name = self.people[self.asked][0]
        return f"{' '.join(map(_sentence, self.people))} What does {name} do, and where?\n"

    @property
    def rubric(self) -> tuple[Criterion, ...]:
        """The trade, the place, the name, in few words, and that it answers, which no rule can tell."""
        name, trade, place = self.people[self.asked]
        return (
            Criterion("mentions", trade, 2.0),
            Criterion("mentions", place, 2.0),
            Criterion("begins", name),
            Criterion("words", "9"),
            Criterion("", f"The text says what {name} does and where, and says nothing else."),
        )

    def grade(self, text: str) -> Grade:
        """Grades by the rules."""
        return grade_by_rules(self.rubric, text)

    def demonstrate(self, state: random.Random) -> list[str]:
        """Writes an answer: 40 % well, the others too short, of somebody else, or with more than was asked for."""
        kind, person = chosen(state, _DEMONSTRATIONS), self.people[self.asked]
        other = self.people[self.asked - 1]
        if kind == "wrong":
            return [_sentence((person[0], *other[1:]))]
        short, everything = f"A {person[1]}.", f"{_sentence(person)} {_sentence(other)}"
        return [{"short": short, "all": everything}.get(kind, _sentence(person))]


def _sentence(person: tuple[str, str, str]) -> str:
    name, trade, place = person
    return f"{name} is a {trade} in {place}."


def make_question(size: QuestionsSize, state: random.Random) -> Pairs | People:
    """Draws a problem."""
    if size.kind == "pairs":
        letters, digits = list("abcdefghijklmnopqrstuvwxyz"), list(range(1, 10))
        state.shuffle(letters)
        state.shuffle(digits)
        pairs = tuple(zip(letters[: size.facts], digits[: size.facts], strict=True))
        return Pairs(pairs, state.randrange(size.facts))
    names = make_names(size.facts, state)
    people = tuple((name, state.choice(TRADES), state.choice(PLACES)) for name in names)
    return People(people, state.randrange(size.facts))


def questions(size: QuestionsSize = TINY, *, judge: Reward | None = None) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      judge: The reward, one of `train.post.judge`; the rules' own grade is then reported beside it, with weight 0.
        None for the rules' grade as the reward.
    """
    rewards = rubric_rewards(judge)
    demonstrate = lambda made, state: made.demonstrate(state)  # noqa: E731
    return make_task(NAME, lambda state: make_question(size, state), RubricAnswer, demonstrate, rewards)
