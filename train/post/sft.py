"""Gives supervised stages what they learn from: demonstrations of tasks, and samples of specialists kept in files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.files import replace_arrays
from train.post.environment import Episode, Task
from train.post.rewards import Scores
from train.post.rows import Document, DocumentStream, row_of
from train.post.text import TurnText
from train.settings import PhaseSettings


def demonstration_stream(
    tasks: Sequence[Task], text: TurnText, phases: Sequence[PhaseSettings], seed: int
) -> DocumentStream:
    """Makes the stream of demonstrations: the tasks in turn, each of a problem that is drawn anew."""
    return DocumentStream(lambda number: demonstration(tasks, text, seed, number), batch_shapes(phases).__getitem__)


def demonstration(tasks: Sequence[Task], text: TurnText, seed: int, number: int) -> Document:
    """Plays the demonstration of a number: its turns are learnt, prompt and observations are not.

    Raises:
      ValueError: naming task and problem, if its environment raises, or ends before its last turn.
    """
    task = tasks[number % len(tasks)]
    problem = int(np.random.default_rng([seed, 1, number]).integers(task.held_out))
    try:
        return _played(task, problem, text)
    except Exception as error:  # whatever a user's environment raises
        raise ValueError(
            f"the demonstration of problem {problem} of task {task.name} raised {type(error).__name__}: "
            f"{str(error)[:300]}"
        ) from error


def _played(task: Task, problem: int, text: TurnText) -> Document:
    assert task.demonstrate is not None
    environment = task.make(problem)
    prompt = environment.reset()
    chat = None
    if not isinstance(prompt, str):
        chat = text.chat(prompt, getattr(environment, "tools", None), thinking=task.thinking)
    encode: Any = text.encode if chat is None else chat.answer
    parts, learnt = [encode(prompt) if chat is None else chat.prompt()], [False]
    done, turns = False, list(task.demonstrate(problem))
    for number, turn in enumerate(turns):
        if done:
            raise ValueError(f"the environment ended before turn {number + 1} of {len(turns)}")
        tokens, said = (text.encode_turn(turn), turn) if chat is None else chat.say(turn)
        parts.append(tokens)
        observation, done = environment.step(said)
        learnt.append(True)
        if not done and number + 1 < len(turns):
            parts.append(encode(observation))
            learnt.append(False)
    return np.concatenate(parts), np.repeat(learnt, [len(part) for part in parts])


def batch_shapes(phases: Sequence[PhaseSettings]) -> list[tuple[int, int]]:
    """Lists rows and tokens of the batch of every step of a run."""
    return [(each.batch_size, each.seq_len) for phase in phases for each in phase.stages for _ in range(each.steps)]


# Samples


def keep_best(episodes: Sequence[Episode], scores: Scores) -> list[int]:
    """Chooses the samples to learn from: sound ones with the greatest reward of their problem.

    Problems all of whose samples are below half of the task's greatest reward are left out.
    """
    total = np.where(scores.dropped, -np.inf, np.nan_to_num(scores.total, nan=-np.inf))
    least = max(total.max(), 0.0) / 2
    best: dict[int, float] = {}
    for episode, value in zip(episodes, total, strict=True):
        best[episode.problem] = max(best.get(episode.problem, -np.inf), value)
    return [
        i
        for i, episode in enumerate(episodes)
        if np.isfinite(total[i]) and total[i] >= max(best[episode.problem], least)
    ]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Holds documents one behind the other: `tokens` and `learnt` [n], and the `ends` of each."""

    tokens: np.ndarray
    learnt: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> "Samples":
        """Joins the episodes."""
        rows = [row_of(episode) for episode in episodes]
        ends = np.cumsum([len(row.tokens) for row in rows], dtype=np.int64)
        empty = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        tokens, learnt = [row.tokens for row in rows] or empty[0], [row.sampled for row in rows] or empty[1]
        return cls(np.concatenate(tokens), np.concatenate(learnt), ends)

    def save(self, path: Path) -> None:
        """Writes them as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_arrays(path, tokens=self.tokens, learnt=self.learnt, ends=self.ends)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Reads what `save` wrote.

        Raises:
          ValueError: if it is damaged.
        """
        try:
            with np.load(path) as arrays:
                return cls(arrays["tokens"], arrays["learnt"], arrays["ends"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} must hold samples, and cannot be read: {error}; remove it to sample anew"
            ) from error

    def document(self, number: int) -> Document:
        """Gives one of them."""
        begin = 0 if number == 0 else int(self.ends[number - 1])
        return self.tokens[begin : int(self.ends[number])], self.learnt[begin : int(self.ends[number])]


def sample_stream(files: Mapping[str, Samples], phases: Sequence[PhaseSettings], seed: int) -> DocumentStream:
    """Makes the stream of samples: the tasks in turn, the samples of each in an order that each epoch draws anew.

    Raises:
      ValueError: if a task has no samples.
    """
    for name, samples in files.items():
        if not len(samples.ends):
            raise ValueError(f"task {name} has no samples to learn from: none was good enough, try keep_samples 'all'")
    each = list(files.values())

    def document(number: int) -> Document:
        place, kind = divmod(number, len(each))
        epoch, index = divmod(place, len(each[kind].ends))
        order = np.random.default_rng([seed, 2, kind, epoch]).permutation(len(each[kind].ends))
        return each[kind].document(int(order[index]))

    return DocumentStream(document, batch_shapes(phases).__getitem__)
