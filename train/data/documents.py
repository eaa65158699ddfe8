"""Documents of one split, end to end in one order: in memory, or in shards on disk."""

import abc
import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from jaxtyping import Bool, Int, Integer


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
    def read_into(self, out: Int[np.ndarray, " T"], begin: int, end: int) -> None:
        """Reads the tokens from `begin` to `end` of all documents end to end, and no token besides."""

    def read(self, begin: int, end: int) -> Integer[np.ndarray, " T"]:
        """Reads the same into an array of its own."""
        out = np.empty(end - begin, np.int32)
        self.read_into(out, begin, end)
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

    def read_into(self, out: Int[np.ndarray, " T"], begin: int, end: int) -> None:
        """Copies a slice."""
        out[:] = self.tokens[begin:end]

    def read(self, begin: int, end: int) -> Integer[np.ndarray, " T"]:
        """Takes a slice, without a copy."""
        return self.tokens[begin:end]

    def wanted(self, begin: int, end: int) -> Bool[np.ndarray, " T"]:
        """Takes a slice of the marks."""
        return super().wanted(begin, end) if self.learnt is None else self.learnt[begin:end]


class DocumentReader(Protocol):
    """Reads tokens of numbered documents: an `IndexedDataset`, or `Shards`."""

    def read(self, document: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Reads the tokens from `begin` to `end` of a document."""
        ...


@dataclasses.dataclass(frozen=True)
class ShardDocuments(Documents):
    """Names documents on disk by their numbers; a token is read when it is asked for."""

    reader: DocumentReader
    numbers: np.ndarray  # int64 [documents]
    lock: threading.Lock  # a reader's own: streams read ahead in threads

    @classmethod
    def split(
        cls, reader: DocumentReader, lengths: Integer[np.ndarray, " n"], *marks: Bool[np.ndarray, " n"]
    ) -> tuple[Self, ...]:
        """Takes the marked documents of a reader, for each of the marks."""
        lock, numbers = threading.Lock(), [np.flatnonzero(mark) for mark in marks]
        return tuple(cls(np.append(0, np.cumsum(lengths[n], dtype=np.int64)), reader, n, lock) for n in numbers)

    def read_into(self, out: Int[np.ndarray, " T"], begin: int, end: int) -> None:
        """Reads each document's part."""
        first = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        within = end <= self.offsets[first + 1]  # as a packed document is, and the search costs as much as the reading
        behind = first + 1 if within else int(np.searchsorted(self.offsets, end))
        edges, numbers = self.offsets[first : behind + 1].tolist(), self.numbers[first:behind].tolist()
        with self.lock:
            for number, low, high in zip(numbers, edges[:-1], edges[1:], strict=True):
                a, b = max(low, begin), min(high, end)
                if a < b:
                    out[a - begin : b - begin] = self.reader.read(number, a - low, b - low)
