"""Rows of training batches: episodes one a row, and demonstrations or samples packed whole."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from train.data import Batch, window_row
from train.post.environment import Episode

type Document = tuple[np.ndarray, np.ndarray]  # tokens, and which of them the model shall learn


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds an episode as tokens.

    Attributes:
      tokens: int32 [n], prompt, turns and observations in their order.
      sampled: bool [n], those that the model wrote: they alone carry loss.
      log_probs: float32 [n], of the engine; 0 where nothing was sampled.
    """

    tokens: np.ndarray
    sampled: np.ndarray
    log_probs: np.ndarray


EMPTY = Row(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32))


def row_of(episode: Episode) -> Row:
    """Joins what was read and what was written."""
    parts: list[tuple[np.ndarray, np.ndarray]] = [(episode.prompt_tokens, np.zeros(len(episode.prompt_tokens)))]
    written = [False]
    for turn in episode.turns:
        parts += [(turn.tokens, turn.log_probs), (turn.observation_tokens, np.zeros(len(turn.observation_tokens)))]
        written += [True, False]
    return Row(
        tokens=np.concatenate([ids for ids, _ in parts]).astype(np.int32),
        sampled=np.concatenate([np.full(len(ids), is_own) for (ids, _), is_own in zip(parts, written, strict=True)]),
        log_probs=np.concatenate([values for _, values in parts]).astype(np.float32),
    )


def episode_rows(episodes: Sequence[Episode], seq_len: int) -> dict[str, np.ndarray]:
    """Makes the rows of episodes, each by itself and padded: the arrays [B, T] of a `Batch`, and `old_log_probs`.

    The row of an episode without turns is empty: nothing of it is learnt, and its prompt may be longer than a row.

    Raises:
      ValueError: naming an episode that is longer than a row.
    """
    rows = [row_of(episode) if episode.turns else EMPTY for episode in episodes]
    windows, learnt, old = (np.zeros((len(rows), seq_len + 1), kind) for kind in (np.int32, bool, np.float32))
    filled = np.array([len(row.tokens) for row in rows], np.int32)
    for i, (row, episode) in enumerate(zip(rows, episodes, strict=True)):
        count = len(row.tokens)
        if count > seq_len + 1:
            raise ValueError(
                f"an episode of task {episode.task} must have at most {seq_len + 1} tokens, got {count} for problem "
                f"{episode.problem}"
            )
        windows[i, :count], learnt[i, :count], old[i, :count] = row.tokens, row.sampled, row.log_probs
    batch = window_row(windows, np.zeros_like(windows), filled=filled, learnt=learnt)
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    return {name: np.asarray(x) for name, x in arrays.items() if x is not None} | {"old_log_probs": old[:, 1:]}


def pack_batch(documents: Iterator[Document], batch_size: int, seq_len: int) -> Batch:
    """Fills rows with whole documents in their order; a row ends before the one that no longer fits.

    It takes one document more than it has room for, and at least one that it has.

    Raises:
      ValueError: if a document is longer than a row.
    """
    windows, learnt = (np.zeros((batch_size, seq_len + 1), kind) for kind in (np.int32, bool))
    starts, filled = np.zeros((batch_size, seq_len + 1), np.int32), np.zeros(batch_size, np.int32)
    row = 0
    for tokens, own in documents:
        if len(tokens) > seq_len:
            raise ValueError(f"a document must fit in a row of {seq_len} tokens, got {len(tokens)}")
        if filled[row] + len(tokens) > seq_len:
            row += 1
            if row == batch_size:
                break
        begin, end = int(filled[row]), int(filled[row]) + len(tokens)
        windows[row, begin:end], learnt[row, begin:end], starts[row, begin:] = tokens, own, begin
        filled[row] = end
    for i in range(batch_size):
        starts[i, filled[i] :] = filled[i]  # padding is no part of the last document
    return window_row(windows, starts, filled=filled, learnt=learnt)


class DocumentStream:
    """Gives packed batches of documents that are found by their numbers, without end: a `BatchStream`.

    Args:
      document: number → tokens, and which of them the model shall learn.
      shapes: rows and tokens of each batch by its number.
    """

    def __init__(self, document: Callable[[int], Document], shapes: Callable[[int], tuple[int, int]]):
        self._document, self._shapes = document, shapes
        self._batches, self._next = 0, 0

    def __next__(self) -> Batch:
        batch = pack_batch(self._numbered(), *self._shapes(self._batches))
        self._next -= 1  # the last one did not fit: it begins the next batch
        self._batches += 1
        return batch

    def _numbered(self) -> Iterator[Document]:
        while True:
            self._next += 1
            yield self._document(self._next - 1)

    def get_state(self) -> Any:
        """Gives how many batches and documents were taken."""
        return {"batches": self._batches, "documents": self._next}

    def set_state(self, state: Any) -> None:
        """Continues behind the batch after which `get_state` gave this."""
        self._batches, self._next = int(state["batches"]), int(state["documents"])
