"""Rows of documents: cut wherever a row is full, or packed whole where they fit best.

A row is T tokens and the target behind the last, T + 1 places in all. Both packings are endless, visit every document
in each epoch, and are pure functions of the documents, T and the seed, in random access.
"""

import bisect
import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Integer

from train.checks import shown
from train.data.batch import TOKEN_FIELDS, Batch, window_row
from train.data.documents import Documents

ENDLESS = 2**40  # rows, more than any run takes; grain's own endless length overflows in rows of one
WINDOW_ROWS = 256  # that the documents of a window fill, about; 18 rows lost 3 % to padding, 256 a fifth of a percent
LEAST_WINDOW, MOST_WINDOW = 1024, 65536  # documents


@dataclasses.dataclass(frozen=True)
class Row:
    """Says what stands in a row.

    Attributes:
      edges: the places at which its documents, or their parts, begin; the last is where padding begins.
      reads: of each run of tokens its place in the row, where among the documents' tokens it begins, and its size.
    """

    edges: np.ndarray  # int64 [parts + 1]
    reads: np.ndarray  # int64 [runs, 3]


@dataclasses.dataclass(frozen=True)
class Waste:
    """Says what a packing loses: the share of places that are padding, and of documents that are cut."""

    padding: float
    cut: float


class Packing(Protocol):
    """Gives rows by their number, without end."""

    def row(self, number: int) -> Row:
        """Says what stands in a row."""
        ...

    def epochs(self, rows: int) -> float:
        """Says how often the first rows have gone through the documents."""
        ...

    def waste(self) -> Waste:
        """Says what it loses."""
        ...

    def get_state(self, row: int) -> Any:
        """Gives what finds rows from this on without those before, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Takes what `get_state` gave."""
        ...


def make_packing(pack: str, documents: Documents, *, seq_len: int, seed: int) -> Packing:
    """Makes the packing of that name."""
    return (Concat if pack == "concat" else BestFit)(documents, seq_len=seq_len, seed=seed)


class Concat:
    """Cuts documents, end to end, into windows of T tokens, and shuffles the windows anew in every epoch."""

    def __init__(self, documents: Documents, *, seq_len: int, seed: int):
        self._documents, self._seq_len = documents, seq_len
        self._count = (documents.size - 1) // seq_len
        self._order: Any = shuffled_windows(self._count, seed)

    def row(self, number: int) -> Row:
        """Says which documents stand in the window."""
        return window(self._documents, self._order[number] * self._seq_len, self._seq_len)

    def epochs(self, rows: int) -> float:
        """Counts windows."""
        return rows / self._count

    def waste(self) -> Waste:
        """Counts the documents that begin in one window and end in another."""
        begin, end = self._documents.offsets[:-1], self._documents.offsets[1:]
        cut = (begin // self._seq_len < (end - 1) // self._seq_len) & (end > begin)
        return Waste(0.0, float(cut.mean()))

    def get_state(self, row: int) -> None:
        """Needs none: windows are found by their number."""

    def set_state(self, state: Any) -> None:
        """Needs none."""
        _check_state(state, state is None)


def shuffled_windows(count: int, seed: int) -> grain.MapDataset[int]:
    """Shuffles the numbers of windows, anew in every epoch, without end."""
    return grain.MapDataset.range(count).shuffle(seed=seed).repeat(ENDLESS // count + 1)


def window(documents: Documents, begin: int, seq_len: int) -> Row:
    """Says which documents stand in `seq_len` tokens from `begin` on and the target behind them."""
    end = begin + seq_len + 1
    offsets = documents.offsets
    inner = offsets[np.searchsorted(offsets, begin, side="right") : np.searchsorted(offsets, end)]
    edges = np.unique(np.concatenate([[begin], inner, [end]]))
    return Row(edges - begin, np.array([[0, begin, seq_len + 1]]))


class BestFit:
    """Packs whole documents into rows; those longer than a row are cut into rows of their own and a rest.

    An epoch shuffles the documents and takes them in windows of a bounded number; the documents of a window are packed
    best-fit decreasing, and its rows are shuffled. Only sizes are looked at, so a window costs no reading. How many
    rows a window makes is known when it is packed: the saved state is a window and the number of its first row.
    """

    def __init__(self, documents: Documents, *, seq_len: int, seed: int):
        self._documents, self._places, self._seed = documents, seq_len + 1, seed
        rows = WINDOW_ROWS * seq_len * len(documents) // max(1, documents.size)
        self._width = min(max(rows, LEAST_WINDOW), MOST_WINDOW, len(documents))
        self._windows = math.ceil(len(documents) / self._width)
        self._begins, self._first = [0], 0  # the first rows of the known windows, and the first known window
        self._lock = threading.Lock()  # rows are read ahead in another thread
        self._order = functools.lru_cache(maxsize=2)(self._shuffled_documents)
        self._packed = functools.lru_cache(maxsize=4)(self._pack)

    def row(self, number: int) -> Row:
        """Says which documents, or parts of them, stand in a row."""
        index, begin = self._find(number)
        begins, sizes, bounds = self._packed(index)
        parts = slice(bounds[number - begin], bounds[number - begin + 1])
        edges = np.append(0, np.cumsum(sizes[parts]))
        return Row(edges, np.stack([edges[:-1], begins[parts], sizes[parts]], axis=1))

    def epochs(self, rows: int) -> float:
        """Counts windows, and rows within the last."""
        index, begin = self._find(rows)
        return (index + (rows - begin) / self._rows_of(index)) / self._windows

    def waste(self) -> Waste:
        """Measures padding over the first window, and counts the documents that are longer than a row."""
        _, sizes, bounds = self._packed(0)
        padding = 1 - float(sizes.sum()) / ((len(bounds) - 1) * self._places)
        return Waste(padding, float((self._documents.lengths > self._places).mean()))

    def get_state(self, row: int) -> list[int]:
        """Gives the row's window and that window's first row."""
        return list(self._find(row))

    def set_state(self, state: Any) -> None:
        """Continues from a window."""
        good = isinstance(state, list) and len(state) == 2 and all(type(x) is int and x >= 0 for x in state)
        _check_state(state, good)
        with self._lock:
            self._first, self._begins = state[0], [state[1]]

    def _find(self, row: int) -> tuple[int, int]:
        """Finds the window of a row, and the first row of that window."""
        with self._lock:
            if row < self._begins[0]:
                self._first, self._begins = 0, [0]
            while True:
                last = self._first + len(self._begins) - 1
                end = self._begins[-1] + self._rows_of(last)
                if row < end:
                    break
                self._begins.append(end)
            place = bisect.bisect_right(self._begins, row) - 1
            return self._first + place, self._begins[place]

    def _rows_of(self, index: int) -> int:
        return len(self._packed(index)[2]) - 1

    def _pack(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Packs a window: where the parts of documents begin, their sizes, and the bounds of rows among the parts."""
        epoch, place = divmod(index, self._windows)
        numbers = self._order(epoch)[place * self._width : (place + 1) * self._width]
        begins, sizes = cut_documents(
            self._documents.offsets[numbers], self._documents.offsets[numbers + 1], self._places
        )
        rows = best_fit(sizes, self._places)
        count = int(rows.max(initial=-1)) + 1
        rows = np.argsort(self._draw(count, epoch, place + 1), kind="stable")[rows]
        order = np.argsort(rows, kind="stable")
        return begins[order], sizes[order], np.searchsorted(rows[order], np.arange(count + 1))

    def _shuffled_documents(self, epoch: int) -> np.ndarray:
        return np.argsort(self._draw(len(self._documents), epoch, 0), kind="stable")

    def _draw(self, count: int, epoch: int, stream: int) -> np.ndarray:
        # A bit generator's output stays the same in all versions of NumPy; a Generator's shuffle may not.
        return np.random.Philox(key=[self._seed, epoch], counter=[0, 0, 0, stream]).random_raw(count)


def cut_documents(
    begin: Integer[np.ndarray, " n"], end: Integer[np.ndarray, " n"], places: int
) -> tuple[Integer[np.ndarray, " m"], Integer[np.ndarray, " m"]]:
    """Cuts documents into parts of at most `places`; gives where each part begins and its size.

    A part begins with the token that is the last target of the part before. A part of one token has no target, and is
    left out.

    Examples:
      >>> cut_documents(np.array([0, 9]), np.array([9, 11]), 4)
      (array([0, 3, 6, 9]), array([4, 4, 3, 2]))
    """
    counts = np.maximum(-(-(end - begin - 1) // (places - 1)), 0)
    document = np.repeat(np.arange(len(begin)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = begin[document] + number * (places - 1)
    return first, np.minimum(end[document] - first, places)


def best_fit(sizes: Integer[np.ndarray, " n"], places: int) -> Integer[np.ndarray, " n"]:
    """Gives each size a row of `places`: the largest first, each where it leaves the least room (best-fit decreasing).

    Examples:
      >>> best_fit(np.array([5, 2, 4, 3, 1]), 6)
      array([0, 1, 1, 2, 0])
    """
    rows = np.empty(len(sizes), np.int64)
    room: list[tuple[int, int]] = []  # sorted pairs of the places left and the row
    count = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        found = bisect.bisect_left(room, (size, 0))
        if found < len(room):
            left, row = room.pop(found)
        else:
            left, row, count = places, count, count + 1
        rows[item] = row
        if left > size:
            bisect.insort(room, (left - size, row))
    return rows


def read_places(rows: Sequence[tuple[Documents, Row]], begin: int, end: int) -> Batch:
    """Reads the places from `begin` to `end` of rows and their targets, and no token besides."""
    shape = (len(rows), end + 1 - begin)
    tokens, start = np.empty(shape, np.int32), np.empty(shape, np.int32)
    learnt = np.ones(shape, bool) if any(documents.marks_targets for documents, _ in rows) else None
    for number, (documents, row) in enumerate(rows):
        _fill(documents, row, begin, tokens[number], start[number], None if learnt is None else learnt[number])
    filled = np.array([row.edges[-1] for _, row in rows])
    return window_row(tokens, start, begin=begin, filled=filled, learnt=learnt)


def _fill(
    documents: Documents, row: Row, begin: int, tokens: np.ndarray, start: np.ndarray, learnt: np.ndarray | None
) -> None:
    """Writes what stands in a row from `begin` on: tokens, where their documents begin, and what is learnt of them."""
    stop = begin + len(tokens)
    place, first, size = row.reads.T
    low, high = np.maximum(place, begin), np.minimum(place + size, stop)
    reads = np.stack([low - begin, first + low - place, high - low], axis=1)[low < high]
    documents.read_into(tokens, reads)
    if learnt is not None and documents.marks_targets:
        for here, there, count in reads.tolist():
            learnt[here : here + count] = documents.wanted(there, there + count)
    tokens[max(0, int(row.edges[-1]) - begin) :] = 0
    bounds = np.append(np.clip(row.edges, begin, stop), stop)
    start[:] = np.repeat(row.edges.astype(np.int32), np.diff(bounds))


def text_row(documents: Documents, begin: int, seq_len: int) -> Batch:
    """Cuts one window of text; a document that begins before it starts at the window's edge, at position 0."""
    batch = read_places([(documents, window(documents, begin, seq_len))], 0, seq_len)
    return Batch(**{name: getattr(batch, name)[0] for name in TOKEN_FIELDS})


def _check_state(state: Any, is_good: bool) -> None:
    if not is_good:
        raise ValueError(f"the saved data position must be one that this packing gave, got {shown(state)}")
