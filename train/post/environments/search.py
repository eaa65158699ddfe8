"""Agentic search: a question whose answer is some look-ups away, over a corpus that is made for it.

Tiny, words of two letters that lead to each other; the prompt says how many look-ups there are to the answer:

    S2ab:  →  ?ab ← ab>ce   ?ce ← ce>xy   =xy

Large, pages about people, found by the words that they share with what is searched:

    Question: who is the mentor of the rival of Tola Vesk?  →  search rival of Tola Vesk ← 3 pages …  answer Mira Lund
"""

import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from train.checks import check_integer, shown
from train.post.environment import Step, Task
from train.post.environments.names import PLACES, TRADES, make_names
from train.post.environments.problems import check_range, chosen, make_task
from train.post.rewards import LengthPenalty

NAME = "search"
KINDS = ("words", "pages")
MAX_QUERY = 200  # characters
RELATIONS = ("mentor", "rival", "neighbour", "doctor")
_DEMONSTRATIONS = (("early", 30), ("over", 20), ("twice", 25), ("right", 25))


@dataclass(frozen=True)
class SearchSize:
    """How hard the problems are.

    Args:
      kind: One of `KINDS`.
      hops: The least and the most look-ups to the answer.
      people: How many have a page, for "pages".
      shown: Pages that one search finds, for "pages".
      max_turns: The most turns of an episode.
      length: Output tokens of which the length penalty takes its whole share.
    """

    kind: str = "words"
    hops: tuple[int, int] = (1, 3)
    people: int = 40
    shown: int = 2
    max_turns: int = 8
    length: int = 40

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(self.kind)}")
        check_range("hops", self.hops, least=1, most=9)
        check_integer("people", self.people, least=self.hops[1] + 2, most=400)
        check_integer("shown", self.shown, most=20)
        check_integer("max_turns", self.max_turns, least=self.hops[1] + 1)
        check_integer("length", self.length)


TINY = SearchSize()
LARGE = SearchSize(kind="pages", hops=(2, 4), max_turns=10, length=400)


@dataclass(frozen=True)
class Words:
    """Words that lead to each other: each to the next, past the answer as well."""

    hops: int
    words: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The word that many look-ups away."""
        return self.words[self.hops]


@dataclass
class WordsIndex:
    """The environment of words.

    Args:
      problem: The words and the number of look-ups.
      outcome: 1 once the answer is given and right.
      calls: How many turns there were.
    """

    problem: Words
    outcome: float = 0.0
    calls: int = 0

    def reset(self) -> str:
        """Returns the number of look-ups and the first word."""
        return f"S{self.problem.hops}{self.problem.words[0]}:"

    def step(self, text: str) -> Step:
        """Looks a word up, or ends with an answer."""
        self.calls += 1
        if text.startswith("="):
            self.outcome = float(text[1:] == self.problem.answer)
            return Step("", True)
        if not re.fullmatch(r"\?[a-z][a-z]", text):
            return Step("!\n", False)
        pairs = dict(zip(self.problem.words, self.problem.words[1:], strict=False))
        return Step(f"{text[1:]}>{pairs.get(text[1:], '--')}\n", False)


@dataclass(frozen=True)
class Person:
    """Somebody with a page: a name, a trade, a place, and the number of another person for each relation."""

    name: str
    trade: str
    place: str
    others: tuple[int, ...]


@dataclass(frozen=True)
class Pages:
    """People who know each other, and a question about one of them: relations to follow in order."""

    people: tuple[Person, ...]
    start: int
    relations: tuple[int, ...]
    shown: int

    @property
    def question(self) -> str:
        """The question; the relation to follow first stands last."""
        asked = "".join(f"the {RELATIONS[each]} of " for each in reversed(self.relations))
        return f"Question: who is {asked}{self.people[self.start].name}?"

    @property
    def way(self) -> list[int]:
        """The people from the one who is named to the answer."""
        way = [self.start]
        for relation in self.relations:
            way.append(self.people[way[-1]].others[relation])
        return way

    @property
    def answer(self) -> str:
        """The name that is asked for."""
        return self.people[self.way[-1]].name

    def page(self, number: int) -> str:
        """The page of a person."""
        person = self.people[number]
        known = [f"the {RELATIONS[at]} is {self.people[other].name}" for at, other in enumerate(person.others)]
        return f"{person.name}: a {person.trade} in {person.place}; {'; '.join(known)}."


@dataclass
class PagesIndex:
    """The environment of pages.

    Args:
      problem: The people and the question.
      outcome: 1 once the answer is given and right.
      calls: How many turns there were.
    """

    problem: Pages
    outcome: float = 0.0
    calls: int = 0

    def reset(self) -> str:
        """Returns the question and what may be called."""
        return f"{self.problem.question} Calls: search WORDS, answer NAME.\n"

    def step(self, text: str) -> Step:
        """Searches, or ends with an answer."""
        self.calls += 1
        call, _, words = text.partition(" ")
        if call == "answer":
            self.outcome = float(words.strip() == self.problem.answer)
            return Step("", True)
        if call != "search" or not words.strip() or len(words) > MAX_QUERY:
            return Step(f"error: no call, or no words, or more than {MAX_QUERY} characters\n", False)
        found = self.found(words)
        return Step((" ".join(self.problem.page(each) for each in found) or "nothing found") + "\n", False)

    def found(self, words: str) -> list[int]:
        """Ranks pages by the rare words that they share with a query, in their own name above all; ties by number."""
        wanted = set(_words(words))
        scores = []
        for number, person in enumerate(self.problem.people):
            shared = sum(self._rarity[word] for word in wanted & self._sets[number])
            scores.append((shared + 2 * sum(self._rarity[word] for word in wanted & set(_words(person.name))), -number))
        best = sorted(scores, reverse=True)[: self.problem.shown]
        return [-number for value, number in best if value > 0]

    @cached_property
    def _sets(self) -> list[set[str]]:
        return [set(_words(self.problem.page(number))) for number in range(len(self.problem.people))]

    @cached_property
    def _rarity(self) -> dict[str, float]:
        counts = Counter(word for words in self._sets for word in words)
        return {word: math.log(1 + len(self._sets) / count) for word, count in counts.items()}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def make_search(size: SearchSize, state: random.Random) -> Words | Pages | None:
    """Draws a problem; None where a way leads back to where it was."""
    hops = state.randint(*size.hops)
    if size.kind == "words":
        words: list[str] = []
        while len(words) < size.hops[1] + 3:  # demonstrations look up one or two too many
            word = "".join(chr(97 + state.randrange(26)) for _ in range(2))
            words += [] if word in words else [word]
        return Words(hops, tuple(words))
    names = make_names(size.people, state)
    people = [
        Person(
            name,
            state.choice(TRADES),
            state.choice(PLACES),
            tuple((number + state.randrange(1, size.people)) % size.people for _ in RELATIONS),
        )
        for number, name in enumerate(names)
    ]
    relations = tuple(state.randrange(len(RELATIONS)) for _ in range(hops))
    problem = Pages(tuple(people), state.randrange(size.people), relations, size.shown)
    return problem if len(set(problem.way)) == hops + 1 else None


def demonstrate_words(problem: Words, state: random.Random) -> list[str]:
    """Looks words up: 30 % stop early, 20 % go too far, 25 % look each up twice, 25 % do right."""
    kind = chosen(state, _DEMONSTRATIONS)
    last = problem.hops + (kind == "over") - (kind == "early")
    asked = [f"?{word}" for word in problem.words[:last] for _ in range(1 + (kind == "twice"))]
    return [*asked, f"={problem.words[last]}"]


def demonstrate_pages(problem: Pages, state: random.Random) -> list[str]:
    """Searches page by page: of the same qualities as the words' demonstrations."""
    kind = chosen(state, _DEMONSTRATIONS)
    way = [problem.people[number].name for number in problem.way]
    if kind == "over":
        way.append(problem.people[problem.people[problem.way[-1]].others[problem.relations[-1]]].name)
    if kind == "early":
        del way[-1]
    asked = [f"search {name}" for name in way[:-1] for _ in range(1 + (kind == "twice"))]
    return [*asked, f"answer {way[-1]}"]


def open_index(problem: Words | Pages) -> WordsIndex | PagesIndex:
    """Makes the environment of a problem."""
    return WordsIndex(problem) if isinstance(problem, Words) else PagesIndex(problem)


def demonstrate(problem: Words | Pages, state: random.Random) -> list[str]:
    """Writes the turns of a demonstration."""
    return demonstrate_words(problem, state) if isinstance(problem, Words) else demonstrate_pages(problem, state)


def search(size: SearchSize = TINY, *, alpha: float = 0.1) -> Task:
    """Makes the task.

    Args:
      size: How hard it is.
      alpha: The share that the length penalty takes from a right episode of `size.length` tokens; 0 for none.
    """
    rewards = ((LengthPenalty(alpha=alpha, tokens=size.length), 1.0),)
    make = lambda state: make_search(size, state)  # noqa: E731
    return make_task(NAME, make, open_index, demonstrate, rewards, max_turns=size.max_turns)
