"""Writing to order, graded by a rubric of each prompt's own.

    Wkm5:                                                                      →  kaoem
    Write a note to Mira Lund, at most 20 words, that mentions 'lantern' …     →  Dear Mira Lund, …

Tiny: a word with this first letter, this last one, and so many letters.
"""

import random
from dataclasses import dataclass

from train.checks import check_integer, shown
from train.post.environment import Reward, Task
from train.post.environments.names import make_names
from train.post.environments.problems import Grade, check_range, make_task
from train.post.environments.rubric import Criterion, RubricAnswer, grade_by_rules, rubric_rewards

NAME = "writing"
KINDS = ("word", "note")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TOPICS = ("bridge", "harbour", "orchard", "library", "market", "workshop", "garden", "station")
THINGS = ("lantern", "river", "letter", "ladder", "basket", "whistle", "blanket", "kettle", "compass", "violin")


@dataclass(frozen=True)
class WritingSize:
    """How hard the problems are.

    Args:
      kind: One of `KINDS`.
      letters: The least and the most letters of a word, for "word"; one digit.
      things: How many things a note must mention, for "note".
      broken: The share of its rules that a demonstration breaks, about.
    """

    kind: str = "word"
    letters: tuple[int, int] = (3, 7)
    things: int = 2
    broken: float = 0.2

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}")
        check_range("letters", self.letters, least=2, most=9)
        check_integer("things", self.things, most=len(THINGS) - 1)
        if not 0 <= self.broken <= 1:
            raise ValueError(f"broken must be a share from 0 to 1, got {shown(self.broken)}")


TINY = WritingSize()
LARGE = WritingSize(kind="note", things=3)


@dataclass(frozen=True)
class Word:
    """A word to make up."""

    first: str
    last: str
    letters: int

    @property
    def prompt(self) -> str:
        """Its first letter, its last and their number."""
        return f"W{self.first}{self.last}{self.letters}:"

    @property
    def rubric(self) -> tuple[Criterion, ...]:
        """First letter, last letter, number, and nothing but letters."""
        rules = (("begins", self.first), ("ends", self.last), ("characters", f"{self.letters}"), ("alphabet", ALPHABET))
        return tuple(Criterion(*rule) for rule in rules)

    def grade(self, text: str) -> Grade:
        """Grades by the rules."""
        return grade_by_rules(self.rubric, text)

    def demonstrate(self, broken: float, state: random.Random) -> list[str]:
        """Writes a word that breaks each of its first three rules now and then."""
        first, last, letters = self.first, self.last, self.letters
        if state.random() < broken:
            first = state.choice(ALPHABET)
        if state.random() < broken:
            last = state.choice(ALPHABET)
        if state.random() < broken:
            letters += state.choice((-1, 1))
        return [first + "".join(state.choice("aeiou") for _ in range(letters - 2)) + last]


@dataclass(frozen=True)
class Note:
    """A note to somebody."""

    name: str
    topic: str
    things: tuple[str, ...]
    avoided: str
    words: int

    @property
    def prompt(self) -> str:
        """Says what to write."""
        things = " and ".join(f"'{thing}'" for thing in self.things)
        return (
            f"Write a note about the {self.topic}. Begin with 'Dear {self.name},'. Mention {things}. "
            f"Do not mention '{self.avoided}'. Use at most {self.words} words. End with a question mark.\n"
        )

    @property
    def rubric(self) -> tuple[Criterion, ...]:
        """Lists what the prompt asks for, and that it is a note, which no rule can tell."""
        return (
            Criterion("begins", f"Dear {self.name},"),
            *(Criterion("mentions", thing) for thing in (self.topic, *self.things)),
            Criterion("omits", self.avoided),
            Criterion("words", f"{self.words}"),
            Criterion("ends", "?"),
            Criterion("", f"The text is a friendly note about the {self.topic} that one could send as it is."),
        )

    def grade(self, text: str) -> Grade:
        """Grades by the rules."""
        return grade_by_rules(self.rubric, text)

    def demonstrate(self, broken: float, state: random.Random) -> list[str]:
        """Writes a note that breaks each of its rules now and then."""
        fails = lambda: state.random() < broken  # noqa: E731 - a draw for each rule
        things = [f"the {thing}" for thing in self.things if not fails()]
        if fails():
            things.append(f"the {self.avoided}")
        text = "Hello," if fails() else f"Dear {self.name},"
        text += f" we are at the {self.topic}" + (f" with {' and '.join(things)}" if things else "")
        if fails():
            text += ", and we will stay for a long while, for there is much to see and to do and to talk about"
        return [text + (". Do come." if fails() else ". Will you come?")]


def make_writing(size: WritingSize, state: random.Random) -> Word | Note:
    """Draws a problem."""
    if size.kind == "word":
        return Word(state.choice(ALPHABET), state.choice(ALPHABET), state.randint(*size.letters))
    things = list(THINGS)
    state.shuffle(things)
    name, words = make_names(1, state)[0], 16 + 3 * size.things + state.randrange(6)
    return Note(name, state.choice(TOPICS), tuple(things[: size.things]), things[size.things], words)


def writing(size: WritingSize = TINY, *, judge: Reward | None = None) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      judge: The reward, one of `train.post.judge`; the rules' own grade is then reported beside it, with weight 0.
        None for the rules' grade as the reward.
    """
    rewards = rubric_rewards(judge)
    demonstrate = lambda made, state: made.demonstrate(size.broken, state)  # noqa: E731
    return make_task(NAME, lambda state: make_writing(size, state), RubricAnswer, demonstrate, rewards)
