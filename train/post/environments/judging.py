"""Judging words by one criterion at a time: what a small model must be able to do before it can be its own judge.

    J3f9a|kaoem|3f9abk:  →  y      the word between the codes begins with k
    J3f9a|kaoem|3f9ac4:  →  n      it does not have four characters

It is none of the seven tasks: it goes beside `writing` into a cold start.
"""

import random
from dataclasses import dataclass

from train.post.environment import Task
from train.post.environments.problems import Grade, OneAnswer, make_task
from train.post.environments.rubric import Criterion
from train.post.environments.writing import TINY, Word, WritingSize, make_writing
from train.post.judge import short_question
from train.post.rewards import outcome

NAME = "judging"
YES, NO = "y", "n"
_BROKEN = 0.5  # the share of rules that the judged words break, so that both answers are frequent


@dataclass(frozen=True)
class Judged:
    """A word, a criterion, and the code of the fence."""

    text: str
    criterion: Criterion
    code: str

    @property
    def prompt(self) -> str:
        """The question, as `SelfJudge` asks it."""
        return short_question(self.criterion, self.text, self.code)

    @property
    def answer(self) -> str:
        """Tells what the rule says."""
        return YES if self.criterion.met(self.text) else NO

    def grade(self, text: str) -> Grade:
        """Grades a verdict."""
        return Grade(float(text == self.answer))


def make_judged(size: WritingSize, state: random.Random) -> Judged | None:
    """Draws a word that was written to an order, and one criterion of the order; None for a criterion of notes."""
    order = make_writing(size, state)
    (text,) = order.demonstrate(_BROKEN, state)
    criterion = state.choice(order.rubric)
    return Judged(text, criterion, f"{state.randrange(16**4):04x}") if isinstance(order, Word) else None


def judging(size: WritingSize = TINY) -> Task:
    """Makes the task; its demonstrations are all right.

    Args:
      size: Of the words that are judged; its kind must be "word".
    """
    if size.kind != "word":
        raise ValueError(f"kind of what is judged must be word, got {size.kind}")
    demonstrate = lambda made, state: [made.answer]  # noqa: E731
    return make_task(NAME, lambda state: make_judged(size, state), OneAnswer, demonstrate, ((outcome, 1.0),))
