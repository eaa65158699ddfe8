"""Rubrics: what a text is judged by, a list of its own for every prompt.

A criterion stands in words, for a judge, and most have a rule as well: the truth that a judge can be compared with, and
the reward where there is no judge.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from train.post.environment import Reward
from train.post.environments.problems import Grade, OneAnswer, Question
from train.post.rewards import outcome


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


_RULES: dict[str, tuple[str, Callable[[str, str], bool]]] = {  # words, and whether a text follows the rule
    "begins": ("begins with '{}'", lambda text, wanted: text.startswith(wanted)),
    "ends": ("ends with '{}'", lambda text, wanted: text.endswith(wanted)),
    "characters": ("has exactly {} characters", lambda text, wanted: len(text) == int(wanted)),
    "words": ("has at least one and at most {} words", lambda text, wanted: 1 <= len(text.split()) <= int(wanted)),
    "mentions": ("mentions '{}'", _mentions),
    "omits": ("does not mention '{}'", lambda text, wanted: not _mentions(text, wanted)),
    "alphabet": ("has no characters but {}", lambda text, wanted: set(text) <= set(wanted)),
}


@dataclass(frozen=True)
class Criterion:
    """One thing that a text should do.

    Args:
      rule: A rule that a program can check, or "" for what a judge alone can tell.
      argument: What the rule is about; without a rule, the criterion in words.
      weight: Its share of the rubric, against the others' weights.
    """

    rule: str
    argument: str
    weight: float = 1.0

    def __post_init__(self):
        if self.rule and self.rule not in _RULES:
            raise ValueError(f"the rule of a criterion must be one of {', '.join(_RULES)}, or empty, got {self.rule!r}")
        if not self.weight > 0:
            raise ValueError(f"the weight of a criterion must be above 0, got {self.weight}")

    @property
    def words(self) -> str:
        """The criterion as a statement about the text."""
        return f"The text {_RULES[self.rule][0].format(self.argument)}." if self.rule else self.argument

    def met(self, text: str) -> bool:
        """Says whether a text follows the rule."""
        return _RULES[self.rule][1](text, self.argument)


def share_met(rubric: Sequence[Criterion], met: Sequence[float]) -> float:
    """Returns the weighted share of a rubric that is met; each entry is how sure it is that a criterion is, 0 to 1."""
    total = sum(criterion.weight for criterion in rubric)
    return sum(criterion.weight * each for criterion, each in zip(rubric, met, strict=True)) / total


def grade_by_rules(rubric: Sequence[Criterion], text: str) -> Grade:
    """Grades by the criteria that have rules."""
    ruled = [criterion for criterion in rubric if criterion.rule]
    return Grade(share_met(ruled, [criterion.met(text) for criterion in ruled]) if ruled else 0.0)


class RubricQuestion(Question, Protocol):
    """A problem whose answer a rubric grades."""

    @property
    def rubric(self) -> tuple[Criterion, ...]:
        """Lists what the answer is judged by."""
        ...


@dataclass
class RubricAnswer(OneAnswer):
    """The environment of a problem with a rubric; its outcome is the share of the rubric's rules that are followed."""

    problem: RubricQuestion

    @property
    def rubric(self) -> tuple[Criterion, ...]:
        """Lists what the answer is judged by."""
        return self.problem.rubric


def rubric_rewards(judge: Reward | None) -> tuple[tuple[Reward, float], ...]:
    """Chooses the rewards of a task with rubrics: the rules' grade, or a judge and that beside it with weight 0."""
    return ((outcome, 1.0),) if judge is None else ((judge, 1.0), (outcome, 0.0))
