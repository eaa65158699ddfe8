"""Seven generated tasks: their problems follow from a number, and a rule grades what the model does.

Prompts, answers and demonstrations are ASCII. No turn of a model needs a line end, so that one may end its turns.
"""

from typing import Literal

from train.checks import shown
from train.post.environment import Reward, Task
from train.post.environments import arithmetic, coding, logic, programs, questions, search, writing

Size = Literal["tiny", "large"]

VERIFIABLE = ("arithmetic", "programs", "logic", "coding", "search")  # right or wrong, by a rule
BY_RUBRIC = ("writing", "questions")
NAMES = (*VERIFIABLE, *BY_RUBRIC)

__all__ = ["BY_RUBRIC", "NAMES", "VERIFIABLE", "Size", "make_tasks"]


def make_tasks(
    size: Size = "tiny", names: tuple[str, ...] = NAMES, *, judge: Reward | None = None, penalty: bool = True
) -> tuple[Task, ...]:
    """Makes some of the tasks, in the order of their names.

    Args:
      size: "tiny" for bytes, at most 96 an episode; "large" for a context of 4,096.
      names: Some of `NAMES`.
      judge: The reward of the tasks by rubric; None for the rules' grade.
      penalty: Whether rewards of the other tasks are multiplied by a length penalty.

    Raises:
      ValueError: if there is no such size, or no such task.
    """
    if size not in ("tiny", "large"):
        raise ValueError(f"size must be tiny or large, got {shown(size)}")
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"names must be some of {', '.join(NAMES)}, got {shown(names)}")
    tiny, keep = size == "tiny", {} if penalty else {"alpha": 0.0}
    made = {
        "arithmetic": lambda: arithmetic.arithmetic(arithmetic.TINY if tiny else arithmetic.LARGE, **keep),
        "programs": lambda: programs.programs(programs.TINY if tiny else programs.LARGE, **keep),
        "logic": lambda: logic.logic(logic.TINY if tiny else logic.LARGE, **keep),
        "coding": lambda: coding.coding(coding.TINY if tiny else coding.LARGE, **keep),
        "search": lambda: search.search(search.TINY if tiny else search.LARGE, **keep),
        "writing": lambda: writing.writing(writing.TINY if tiny else writing.LARGE, judge=judge),
        "questions": lambda: questions.questions(questions.TINY if tiny else questions.LARGE, judge=judge),
    }
    return tuple(made[name]() for name in names)
