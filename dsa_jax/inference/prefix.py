"""Reuse of prefixes: full pages are kept under the hash of all tokens up to their end, until pages are wanted.

The keys of a sequence's pages are a chain: key i is SHA-256 of key i - 1 and the tokens of page i, and the chain begins
with a salt, so two salts never share. A kept page is a sequence of its own in the paged cache, of one page: the counts
of the cache then know of it as of any other. On a mesh each shard of rows keeps pages of its own.
"""

import collections
import dataclasses
import hashlib

import numpy as np

from dsa_jax.inference.pages import PagedCache
from dsa_jax.paged import PAGE


class Chain:
    """Computes the keys of a sequence's full pages, each once."""

    def __init__(self, salt: str = ""):
        # The words before them keep a salt from being taken for a key and tokens.
        self._keys = [hashlib.sha256(b"salt " + salt.encode("utf-8", "surrogatepass")).digest()]

    def keys(self, tokens: np.ndarray, pages: int) -> list[bytes]:
        """Returns the keys of the first pages of the tokens, int32, which may grow between calls but never change."""
        for page in range(len(self._keys) - 1, pages):
            text = b"page " + self._keys[-1] + tokens[page * PAGE : (page + 1) * PAGE].tobytes()
            self._keys.append(hashlib.sha256(text).digest())
        return self._keys[1 : pages + 1]

    def root(self) -> bytes:
        """Returns what stands before the first key."""
        return self._keys[0]


@dataclasses.dataclass(slots=True)
class _Kept:
    """Holds a page that is kept: which, of what tokens, behind which other."""

    sequence: int  # of the paged cache, one page long
    page: int
    tokens: bytes
    parent: bytes
    children: int = 0  # kept pages right behind this one


class PrefixCache:
    """Begins sequences with the pages that are known of their tokens, and makes room by forgetting such pages.

    Attributes:
      hits: how many pages were reused.
      asked: how many full pages the sequences that have begun could have reused at most.
      evicted: how many pages were forgotten because pages were wanted.
    """

    def __init__(self, cache: PagedCache, *, enabled: bool = True):
        self.cache, self.enabled = cache, enabled
        self.hits = self.asked = self.evicted = 0
        # Of each shard of rows, the longest unused first.
        self._kept = [collections.OrderedDict[bytes, _Kept]() for _ in range(cache.row_shards)]

    def __len__(self) -> int:
        return sum(map(len, self._kept))

    def known(self, tokens: np.ndarray, chain: Chain, rows: int = 0, *, reuse: bool = True, last: int = 1) -> int:
        """Counts the pages that a sequence of these tokens would begin with on a shard of rows."""
        return len(self._match(tokens, chain.keys(tokens, self._most(tokens, reuse, last)), rows))

    def begin(
        self, tokens: np.ndarray, chain: Chain, spare: int = 0, rows: int = 0, *, reuse: bool = True, last: int = 1
    ) -> int | None:
        """Begins a sequence with the pages that are known of its tokens, but those of the last: its logits are wanted.

        Args:
          tokens: int32 [T], all that the sequence will have to hold.
          chain: their keys.
          spare: how many pages must be left when it holds them.
          rows: the shard of rows that it will belong to.
          reuse: whether it may begin with pages that are known.
          last: how many of the last tokens are computed anew, at least.

        Returns:
          the sequence, which is as long as what it reuses, or None, and nothing has begun, if pages are too few.
        """
        most = self._most(tokens, reuse, last)
        keys = chain.keys(tokens, most)
        known = self._match(tokens, keys, rows)
        self._touch(keys[: len(known)], rows)
        sequence = self.cache.begin([kept.page for kept in known], rows)
        if not self.room(self.cache.missing(sequence, len(tokens) - len(known) * PAGE) + spare, rows):
            self.cache.free(sequence)
            return None
        self.hits, self.asked = self.hits + len(known), self.asked + most
        return sequence

    def keep(self, sequence: int, tokens: np.ndarray, chain: Chain) -> None:
        """Keeps the full pages of a sequence, of which the cache holds `tokens` at least, beside those known."""
        if not self.enabled:
            return
        rows = self.cache.rows_of(sequence)
        held = self._kept[rows]
        pages = self.cache.pages_of(sequence)[: len(tokens) // PAGE]
        keys = chain.keys(tokens, len(pages))
        parent = chain.root()
        for place, (key, page) in enumerate(zip(keys, pages, strict=True)):
            if key not in held:
                own = tokens[place * PAGE : (place + 1) * PAGE].tobytes()
                held[key] = _Kept(self.cache.begin([page], rows), page, own, parent)
                if parent in held:
                    held[parent].children += 1
            parent = key
        self._touch(keys, rows)

    def room(self, pages: int, rows: int = 0) -> bool:
        """Tells whether so many pages are free on a shard of rows, after forgetting as many as that takes."""
        held = self._kept[rows]
        for _ in range(len(held)):
            if self.cache.free_on(rows) >= pages:
                break
            key, kept = next(iter(held.items()))
            if kept.children or self.cache.owners(kept.page, rows) > 1:
                held.move_to_end(key)  # in use, by a sequence or by pages behind it
            else:
                self._forget(key, rows)
                self.evicted += 1
        return self.cache.free_on(rows) >= pages

    def clear(self) -> None:
        """Forgets every page, as is due when weights change."""
        for held in self._kept:
            for key in reversed(held):
                self.cache.free(held[key].sequence)
            held.clear()

    def check(self) -> None:
        """Raises AssertionError unless every kept page is one sequence's own, behind another or at the beginning."""
        for rows, held in enumerate(self._kept):
            children = collections.Counter(kept.parent for kept in held.values())
            for key, kept in held.items():
                assert self.cache.pages_of(kept.sequence) == [kept.page], kept
                assert self.cache.rows_of(kept.sequence) == rows, kept
                assert hashlib.sha256(b"page " + kept.parent + kept.tokens).digest() == key, kept
                assert kept.children == children[key], (kept, children[key])
            assert len({kept.page for kept in held.values()}) == len(held), "a page is kept twice"

    def _most(self, tokens, reuse, last) -> int:
        """Counts the pages that may be reused: all full ones but those of the last tokens."""
        return max(0, len(tokens) - last) // PAGE if self.enabled and reuse else 0

    def _match(self, tokens, keys, rows):
        """Finds the kept pages that the tokens begin with; equal hashes are not trusted alone."""
        found = []
        for place, key in enumerate(keys):
            kept = self._kept[rows].get(key)
            if kept is None or kept.tokens != tokens[place * PAGE : (place + 1) * PAGE].tobytes():
                break
            found.append(kept)
        return found

    def _touch(self, keys, rows):
        """Marks pages as just used, the last of the chain first: what is forgotten first is then the end of a chain."""
        for key in reversed(keys):
            self._kept[rows].move_to_end(key)

    def _forget(self, key, rows):
        held = self._kept[rows]
        kept = held.pop(key)
        self.cache.free(kept.sequence)
        if kept.parent in held:
            held[kept.parent].children -= 1
