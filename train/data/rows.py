"""The rows of a mixture in random access: from which source each is, what stands in it, and parts of it alone."""

import dataclasses
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from train.checks import shown
from train.data.batch import Batch
from train.data.documents import Documents
from train.data.mixing import Schedule
from train.data.packing import Packing, Row, Waste, make_packing, read_places


class Progress(NamedTuple):
    """Says how much of a source has been taken."""

    tokens: int
    epochs: float


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds the documents of one split of a source.

    Args:
      name: what it is called in reports.
      documents: what is mixed in.
      weight: its weight in the mixture; None: its tokens.
      pack: "concat" or "best_fit".
    """

    name: str
    documents: Documents
    weight: Fraction | None = None
    pack: str = "concat"


class Rows:
    """Gives the rows of a mixture, of `seq_len` tokens and their targets, without end.

    A row is a function of its number, the sources, `seq_len` and the seed.
    """

    def __init__(self, sources: Sequence[Source], *, seq_len: int, seed: int):
        self.seq_len = seq_len
        self.sources = tuple(sources)
        self._schedule = Schedule([source.weight or source.documents.size for source in sources])
        self._packings: list[Packing] = [
            make_packing(source.pack, source.documents, seq_len=seq_len, seed=seed) for source in sources
        ]

    def batch(self, rows: Iterable[int], places: Sequence[tuple[int, int]]) -> Batch:
        """Reads the given runs of places, from one to before the other, of rows by their numbers."""
        found = [self._find(row) for row in rows]
        return Batch.concatenate([read_places(found, begin, end) for begin, end in places])

    def _find(self, number: int) -> tuple[Documents, Row]:
        """Finds what stands in a row, and where it is read."""
        index, of_source = self._schedule.at(number)
        return self.sources[index].documents, self._packings[index].row(of_source)

    def progress(self, rows: int) -> dict[str, Progress]:
        """Says what the first rows have taken of each source: tokens that are no padding, and epochs."""
        found = {}
        for source, packing, count in zip(self.sources, self._packings, self._schedule.taken(rows), strict=True):
            epochs = packing.epochs(count)
            tokens = count * self.seq_len if source.pack == "concat" else round(epochs * source.documents.size)
            found[source.name] = Progress(tokens, epochs)
        return found

    def waste(self) -> dict[str, Waste]:
        """Says what the packing of each source loses."""
        return {source.name: packing.waste() for source, packing in zip(self.sources, self._packings, strict=True)}

    def get_state(self, row: int) -> dict[str, Any]:
        """Gives, as JSON values, what finds this row without those before it; empty where nothing is needed."""
        taken = self._schedule.taken(row)
        states = [packing.get_state(count) for packing, count in zip(self._packings, taken, strict=True)]
        state = {"taken": self._schedule.get_state(row)} if len(self.sources) > 1 else {}
        return state | ({"packings": states} if any(each is not None for each in states) else {})

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave; rows are the same without it, but those before are counted again.

        Raises:
          ValueError: if it is none of these rows.
        """
        if "taken" in state:
            self._schedule.set_state(state["taken"])
        states = state.get("packings", [None] * len(self.sources))
        if not isinstance(states, list) or len(states) != len(self.sources):
            raise ValueError(f"the saved data position must be of {len(self.sources)} sources, got {shown(states)}")
        for packing, each in zip(self._packings, states, strict=True):
            if each is not None:
                packing.set_state(each)


def whole_row(seq_len: int) -> list[tuple[int, int]]:
    """Gives the one run of places that is a whole row."""
    return [(0, seq_len)]


def row_numbers(batch: int, batch_size: int, rows: range | None = None) -> range:
    """Numbers the rows of a batch, or those of its rows that are asked for."""
    rows = range(batch_size) if rows is None else rows
    return range(batch * batch_size + rows.start, batch * batch_size + rows.stop)


def check_sizes(split: str, sources: Sequence[Source], *, batch_size: int, seq_len: int, seed: int) -> None:
    """Checks that rows of this length can be made of each source.

    Raises:
      ValueError: naming the size, the seed or the source that cannot be.
    """
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
    for source in sources:
        documents = source.documents
        needed = seq_len + 1 if source.pack == "concat" else 2
        longest = documents.size if source.pack == "concat" else int(np.max(documents.lengths, initial=0))
        if longest < needed:
            of = "" if len(sources) == 1 and source.name == "text" else f" of {source.name}"
            raise ValueError(
                f"one sequence takes {needed} tokens, but the {split} text{of} has {documents.size} "
                f"in {len(documents)} documents; give more text or a smaller seq_len"
            )
