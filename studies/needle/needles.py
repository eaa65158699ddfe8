"""Needles: statements hidden in long text, and the questions that only they answer.

A needle is the paragraph `The code of W1 W2 is 48213.`, its question `Question: the code of W1 W2 is 48213.`, where W1
and W2 are words of one token and every digit is one, so that an answer cannot be guessed in fewer tokens than it has
digits. Both are written over the text, never between it: a row stays as long as it was.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Int, Integer
from tokenizers import Tokenizer

DIGITS = 5  # of a code
LEAST_WORDS = 100  # pairs of them must not run out
WORD = re.compile(r" [a-z]{3,}")
STATEMENT, QUESTION = ("\n\nThe code of", " is "), ("\n\nQuestion: the code of", " is ")
END = ".\n\n"


@dataclasses.dataclass(frozen=True)
class Needles:
    """Writes statements and questions as tokens; every statement is as long as every other, and so is every question.

    Attributes:
      words: ids of the words that needles are told apart by.
      digits: ids of the ten digits.
      statement: ids before the words, between them and the code, and behind it.
      question: the same of the question.
    """

    words: Integer[np.ndarray, " W"]
    digits: Integer[np.ndarray, "10"]
    statement: tuple[tuple[int, ...], ...]
    question: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Finds the tokens of needles.

        Raises:
          ValueError: if a code of five digits is not five tokens, or few words are one token.
        """
        code = "48213"
        found = tokenizer.encode(code, add_special_tokens=False).ids
        digits = [tokenizer.encode(str(digit), add_special_tokens=False).ids for digit in range(10)]
        if len(found) != DIGITS or any(len(ids) != 1 for ids in digits):
            raise ValueError(
                f"the tokenizer must have every digit as one token, so that codes cannot be guessed: {code} must be "
                f"{DIGITS} tokens, got {len(found)}"
            )
        spelled = {number: tokenizer.decode([number]) for number in range(tokenizer.get_vocab_size())}
        words = sorted(number for number, text in spelled.items() if WORD.fullmatch(text))
        if len(words) < LEAST_WORDS:
            raise ValueError(
                f"the tokenizer must have at least {LEAST_WORDS} lower-case words of one token, got {len(words)}"
            )
        encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)  # noqa: E731
        parts = [tuple(encode(text) for text in (*form, END)) for form in (STATEMENT, QUESTION)]
        return cls(np.asarray(words), np.asarray([ids[0] for ids in digits]), *parts)

    @property
    def cell(self) -> int:
        """Tokens of the longer of a statement and a question: the unit in which places for them are drawn."""
        return max(sum(map(len, parts)) for parts in (self.statement, self.question)) + 2 + DIGITS

    @property
    def answer(self) -> int:
        """The place of a code's first digit within its question."""
        return _code_place(self.question)

    def state(self, pair: Sequence[int], code: Sequence[int]) -> Int[np.ndarray, " n"]:
        """Writes the statement that a pair of words has a code."""
        return self._write(self.statement, pair, code)

    def ask(self, pair: Sequence[int], code: Sequence[int]) -> Int[np.ndarray, " n"]:
        """Writes the question for a pair's code, and the answer."""
        return self._write(self.question, pair, code)

    def _write(self, parts: Sequence[Sequence[int]], pair: Sequence[int], code: Sequence[int]) -> np.ndarray:
        before, between, end = parts
        digits = [self.digits[digit] for digit in code]
        return np.asarray([*before, *(self.words[word] for word in pair), *between, *digits, *end], np.int32)

    def find(self, tokens: Integer[np.ndarray, "*B T"]) -> np.ndarray:
        """Marks the digits of every question's answer in tokens [..., T]; what no question is, is not marked.

        An answer that the end of a row cuts is marked up to there.
        """
        before, between, _ = (np.asarray(part) for part in self.question)
        length = tokens.shape[-1]
        reach = np.concatenate([tokens, np.full((*tokens.shape[:-1], self.answer + DIGITS), -1)], axis=-1)
        windows = np.lib.stride_tricks.sliding_window_view(reach, self.answer, axis=-1)[..., :length, :]
        is_question = (windows[..., : len(before)] == before).all(-1)
        is_question &= (windows[..., len(before) + 2 :] == between).all(-1)
        is_question &= np.isin(windows[..., len(before) : len(before) + 2], self.words).all(-1)
        marked = np.zeros((*tokens.shape[:-1], length + self.answer + DIGITS), bool)
        for digit in range(DIGITS):
            marked[..., self.answer + digit : self.answer + digit + length] |= is_question
        return marked[..., :length]

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draws pairs of words, no two alike, and a code for each.

        Args:
          count: how many.
          rng: draws them.

        Returns:
          the words' numbers [count, 2] and the digits [count, 5].
        """
        numbers = rng.choice(len(self.words) ** 2, size=count, replace=False)
        return np.stack(np.divmod(numbers, len(self.words)), 1), rng.integers(10, size=(count, DIGITS))


def _code_place(parts: Sequence[Sequence[int]]) -> int:
    """Gives the place of a code's first digit in what is written: behind the words, of one token each."""
    before, between, _ = parts
    return len(before) + 2 + len(between)


@dataclasses.dataclass(frozen=True)
class Planted:
    """Holds a row with needles in it.

    Attributes:
      tokens: the row.
      stated: where each code's first digit stands in its statement.
      asked: where it stands in its question; the tokens before these are where it must be known.
      codes: the digits.
    """

    tokens: Int[np.ndarray, " L"]
    stated: Integer[np.ndarray, " n"]
    asked: Integer[np.ndarray, " n"]
    codes: Integer[np.ndarray, "n 5"]


def plant(text: Integer[np.ndarray, " L"], needles: Needles, count: int, rng: np.random.Generator) -> Planted:
    """Writes needles and their questions over random cells of a row, each statement before its question.

    Raises:
      ValueError: if there is no room for so many.
    """
    cells = len(text) // needles.cell
    _check_room(count, 2 * count, cells, len(text))
    chosen = np.sort(rng.choice(cells, size=(count, 2), replace=False) if count else np.zeros((0, 2), int), axis=1)
    return _written(text, needles, chosen[:, 0] * needles.cell, chosen[:, 1] * needles.cell, rng)


def plant_at(
    text: Integer[np.ndarray, " L"], needles: Needles, depths: Sequence[float], rng: np.random.Generator
) -> Planted:
    """Writes a needle at each depth of a row, and all questions at its end, in a random order.

    Args:
      text: the row.
      needles: how they are written.
      depths: of each statement, from 0, the row's beginning, up to but without 1, where the questions begin.
      rng: draws words, codes and the order.

    Raises:
      ValueError: if a depth cannot be, or there is no room for so many.
    """
    if not all(0 <= depth < 1 for depth in depths):
        raise ValueError(f"depths must be from 0 up to but without 1, got {list(depths)}")
    count = len(depths)
    end = len(text) - count * needles.cell
    cells = max(end, 0) // needles.cell
    _check_room(count, count, cells, len(text))
    places = np.floor(np.asarray(depths) * cells).astype(int)
    for before, after in itertools.pairwise(np.argsort(places, kind="stable")):  # two of one depth stand side by side
        places[after] = max(places[after], places[before] + 1)
    over = places.max(initial=0) - (cells - 1)
    if over > 0:
        raise ValueError(f"depths must leave room for {count} needles in {cells} cells, got {list(depths)}")
    asked = end + needles.cell * rng.permutation(count)
    return _written(text, needles, places * needles.cell, asked, rng)


def _check_room(count: int, needed: int, cells: int, length: int) -> None:
    if needed > cells:
        raise ValueError(f"{count} needles must have {needed} cells of a row, got {cells} in {length} tokens")


def _written(
    text: np.ndarray, needles: Needles, stated: np.ndarray, asked: np.ndarray, rng: np.random.Generator
) -> Planted:
    tokens = np.array(text, np.int32)
    pairs, codes = needles.draw(len(stated), rng)
    for pair, code, begin, question in zip(pairs, codes, stated, asked, strict=True):
        for place, ids in ((begin, needles.state(pair, code)), (question, needles.ask(pair, code))):
            tokens[place : place + len(ids)] = ids
    return Planted(tokens, stated + _code_place(needles.statement), asked + needles.answer, codes)
