"""Many token files read as one, in place: see `train.data.indexed` for what each holds."""

import collections
import functools
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from train.data.indexed import Header, IndexedDataset, file_of

# Before Python 3.13 a map keeps its file open, of which a process may often have 1024 only; of maps it may have 65530.
MAP: dict[str, Any] = {"access": mmap.ACCESS_READ} | ({"trackfd": False} if sys.version_info >= (3, 13) else {})
MAX_MAPPED = 16384 if "trackfd" in MAP else 512  # shards mapped at once


class Shards:
    """Reads many pairs of files as one: the documents of the first, of the second, and so on.

    At most `MAX_MAPPED` of them are mapped at a time.
    """

    def __init__(self, prefixes: Sequence[str | Path]):
        if not prefixes:
            raise ValueError("shards must be one or more, got none")
        self.prefixes = tuple(Path(prefix) for prefix in prefixes)
        self.headers = tuple(Header.read(prefix) for prefix in prefixes)
        self.bytes_read = 0
        """Bytes of tokens that were asked for."""
        self._firsts = np.cumsum([0, *(header.documents for header in self.headers)])
        self._mapped: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def tokens(self) -> int:
        """Counts the tokens of all documents."""
        return sum(header.tokens for header in self.headers)

    @property
    def dtype(self) -> np.dtype:
        """Gives a type that holds the tokens of all."""
        return np.result_type(*{header.dtype for header in self.headers})

    @functools.cached_property
    def lengths(self) -> Integer[np.ndarray, " documents"]:
        """Gives the tokens of each document, as int32; reads the .idx of all."""
        lengths = np.empty(len(self), np.int32)
        for prefix, first, behind in zip(self.prefixes, self._firsts[:-1], self._firsts[1:], strict=True):
            lengths[first:behind] = IndexedDataset(prefix).lengths  # copied: a view keeps its .idx open
        return lengths

    def read(self, document: int, begin: int = 0, end: int | None = None) -> Integer[np.ndarray, " T"]:
        """Gives the tokens from `begin` to before `end` of a document, without a copy of them.

        Raises:
          ValueError: if there is no such document, or it has no such tokens.
        """
        self._check(np.array([document]), np.array([begin]), np.array([begin if end is None else end]))
        first = int(self._begins[document])
        end = int(self.lengths[document]) if end is None else end
        shard = int(np.searchsorted(self._firsts, document, side="right")) - 1
        found = self._tokens(shard)[first + begin : first + end]
        self.bytes_read += found.nbytes
        return found

    def read_into(
        self,
        out: Int[np.ndarray, " T"],
        places: Integer[np.ndarray, " n"],
        documents: Integer[np.ndarray, " n"],
        begins: Integer[np.ndarray, " n"],
        sizes: Integer[np.ndarray, " n"],
    ) -> None:
        """Copies `sizes` tokens of each document, from `begins` on, to `places` of `out`.

        Raises:
          ValueError: if there is no such document, or it has no such tokens.
        """
        self._check(documents, begins, begins + sizes)
        # Places are found for all at once: one by one that took longer than the copies.
        shards = np.searchsorted(self._firsts, documents, side="right") - 1
        firsts = self._begins[documents] + begins
        for place, shard, first, size in zip(*(a.tolist() for a in (places, shards, firsts, sizes)), strict=True):
            found = self._tokens(shard)[first : first + size]
            out[place : place + size] = found
            self.bytes_read += found.nbytes

    def _check(self, documents: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        if wrong := documents[(documents < 0) | (documents >= len(self))].tolist():
            raise ValueError(
                f"document must be from 0 to {len(self) - 1} of {len(self.prefixes)} shards, got {wrong[0]}"
            )
        lengths = self.lengths[documents]
        if len(wrong := np.flatnonzero((begins < 0) | (begins > ends) | (ends > lengths))):
            document, length, begin, end = (int(a[wrong[0]]) for a in (documents, lengths, begins, ends))
            raise ValueError(f"tokens of document {document} must be from 0 to {length}, got {begin} to {end}")

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        """Gives the place of each document's first token in its .bin, where one follows the other."""
        begins = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        return begins - np.repeat(begins[self._firsts[:-1]], np.diff(self._firsts))

    def _tokens(self, shard: int) -> np.ndarray:
        """Maps the tokens of a shard, and lets go of those that were used longest ago; what was read stays valid."""
        if shard not in self._mapped:
            with file_of(self.prefixes[shard], ".bin").open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, **MAP)
            self._mapped[shard] = np.frombuffer(view, self.headers[shard].dtype)
            if len(self._mapped) > MAX_MAPPED:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(shard)
        return self._mapped[shard]
