"""Documents of one split, end to end in one order: in memory, or in shards on disk."""

import abc
import dataclasses
import threading
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool, Int, Integer

from train.data.shards import Shards


@dataclasses.dataclass(frozen=True)
class Documents(abc.ABC):
    """Holds where documents begin when they stand end to end: document i is `offsets[i]` to `offsets[i + 1]`."""

    offsets: np.ndarray  # int64 [documents + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def size(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Integer[np.ndarray, " n"]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @property
    def marks_targets(self) -> bool:
        """Says whether only some of the tokens are for the model to learn to write."""
        return False

    @abc.abstractmethod
    def read_into(self, out: Int[np.ndarray, " T"], reads: Int[np.ndarray, "n 3"]) -> None:
        """Copies tokens of all documents end to end, and reads no token besides.

        Args:
          out: what they are copied to.
          reads: of each run of tokens its place in `out`, where among the documents it begins, and its size.
        """

    def read(self, begin: int, end: int) -> Integer[np.ndarray, " T"]:
        """Reads the tokens from `begin` to `end` of all documents end to end."""
        out = np.empty(end - begin, np.int32)
        self.read_into(out, np.array([[0, begin, end - begin]]))
        return out

    def wanted(self, begin: int, end: int) -> Bool[np.ndarray, " T"]:
        """Says which of these tokens the model shall learn to write."""
        return np.ones(end - begin, bool)


@dataclasses.dataclass(frozen=True)
class MemoryDocuments(Documents):
    """Holds documents in memory."""

    tokens: np.ndarray  # uint8 or int32 [n]
    learnt: np.ndarray | None = None  # bool [n], the tokens that count as targets; None: all

    @classmethod
    def join(cls, documents: Sequence[np.ndarray], learnt: Sequence[np.ndarray] | None = None) -> Self:
        """Joins documents in the order given."""
        offsets = np.cumsum([0, *(len(document) for document in documents)])
        tokens = np.concatenate(documents) if documents else np.zeros(0, np.uint8)
        return cls(offsets, tokens, np.concatenate(learnt) if learnt else None)

    @property
    def marks_targets(self) -> bool:
        """Says whether there are marks."""
        return self.learnt is not None

    def read_into(self, out: Int[np.ndarray, " T"], reads: Int[np.ndarray, "n 3"]) -> None:
        """Copies slices."""
        for place, begin, size in reads.tolist():
            out[place : place + size] = self.tokens[begin : begin + size]

    def read(self, begin: int, end: int) -> Integer[np.ndarray, " T"]:
        """Takes a slice, without a copy."""
        return self.tokens[begin:end]

    def wanted(self, begin: int, end: int) -> Bool[np.ndarray, " T"]:
        """Takes a slice of the marks."""
        return super().wanted(begin, end) if self.learnt is None else self.learnt[begin:end]


@dataclasses.dataclass(frozen=True)
class ShardDocuments(Documents):
    """Names documents on disk by their numbers; a token is read when it is asked for."""

    reader: Shards
    numbers: np.ndarray  # int64 [documents]
    lock: threading.Lock  # a reader's own: streams read ahead in threads

    @classmethod
    def split(
        cls, reader: Shards, lengths: Integer[np.ndarray, " n"], *marks: Bool[np.ndarray, " n"]
    ) -> tuple[Self, ...]:
        """Takes the marked documents of a reader, for each of the marks."""
        lock, numbers = threading.Lock(), [np.flatnonzero(mark) for mark in marks]
        return tuple(cls(np.append(0, np.cumsum(lengths[n], dtype=np.int64)), reader, n, lock) for n in numbers)

    def read_into(self, out: Int[np.ndarray, " T"], reads: Int[np.ndarray, "n 3"]) -> None:
        """Reads the parts of the documents that are in each run."""
        begins, ends = reads[:, 1], reads[:, 1] + reads[:, 2]
        first = np.searchsorted(self.offsets, begins, side="right") - 1
        counts = np.maximum(np.searchsorted(self.offsets, ends) - first, 0)
        run = np.repeat(np.arange(len(reads)), counts)
        document = np.arange(len(run)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        low = np.maximum(self.offsets[document], begins[run])
        size = np.minimum(self.offsets[document + 1], ends[run]) - low
        place = reads[run, 0] + low - begins[run]
        with self.lock:
            self.reader.read_into(out, place, self.numbers[document], low - self.offsets[document], size)
