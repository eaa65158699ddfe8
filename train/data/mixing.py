"""Which source each row comes from: even, deterministic, and by the row's number alone."""

import functools
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Integer

from train.checks import shown

BLOCK = 1024  # rows whose sources are chosen at once


class Schedule:
    """Chooses the source of each row: of the first n rows each has its share of n, to less than one row, for every n.

    Of the sources that are due, the one whose next row would come too late soonest is taken. In integers, so that the
    schedule is the same everywhere.

    References:
      R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): 1 - 1 / (2 k - 2) rows for k
      sources, and no schedule can do better for all weights.

    Args:
      weights: of the sources, positive; shares are their proportions.

    Examples:
      >>> schedule = Schedule([2, 1])
      >>> [schedule.at(row) for row in range(6)]
      [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    """

    def __init__(self, weights: Sequence[int | Fraction]):
        exact = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = math.gcd(*whole)
        self._weights = [weight // common for weight in whole]
        self._total = sum(self._weights)
        least = math.lcm(*self._weights)
        self._spacing = [least // weight for weight in self._weights]  # of a source's rows, in a common unit
        self._taken = [tuple(0 for _ in exact)]  # rows of each source before each known block
        self._first = 0  # the first known block
        self._lock = threading.Lock()  # rows are read ahead in another thread
        self._block = functools.lru_cache(maxsize=4)(self._choose)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each source."""
        return tuple(weight / self._total for weight in self._weights)

    def at(self, row: int) -> tuple[int, int]:
        """Gives the source of a row, and which of the source's rows it is."""
        if len(self._weights) == 1:
            return 0, row
        block, place = divmod(row, BLOCK)
        before = self._before(block)
        chosen = self._block(block, before)
        source = int(chosen[place])
        return source, before[source] + int(np.count_nonzero(chosen[:place] == source))

    def taken(self, rows: int) -> tuple[int, ...]:
        """Counts each source's rows among the first rows of all."""
        if len(self._weights) == 1:
            return (rows,)
        block, place = divmod(rows, BLOCK)
        before = self._before(block)
        counts = np.bincount(self._block(block, before)[:place], minlength=len(before))
        return tuple(old + int(new) for old, new in zip(before, counts, strict=True))

    def get_state(self, row: int) -> list[int]:
        """Gives the rows of each source before the row's block, from which the schedule can be continued."""
        return list(self._before(row // BLOCK)) if len(self._weights) > 1 else [row // BLOCK * BLOCK]

    def set_state(self, taken: Any) -> None:
        """Continues from what `get_state` gave.

        Raises:
          ValueError: if that is none of this schedule.
        """
        good = isinstance(taken, list) and len(taken) == len(self._weights)
        if not good or not all(type(x) is int and x >= 0 for x in taken) or sum(taken) % BLOCK:
            raise ValueError(
                f"the saved data position must count the rows of {len(self._weights)} sources before a block of "
                f"{BLOCK}, got {shown(taken)}"
            )
        with self._lock:
            self._first, self._taken = sum(taken) // BLOCK, [tuple(taken)]

    def _before(self, block: int) -> tuple[int, ...]:
        """Counts the rows of each source before a block, from the nearest one that is known."""
        with self._lock:
            if block < self._first:
                self._first, self._taken = 0, [tuple(0 for _ in self._weights)]
            while len(self._taken) <= block - self._first:
                before = self._taken[-1]
                chosen = self._block(self._first + len(self._taken) - 1, before)
                counts = np.bincount(chosen, minlength=len(before))
                self._taken.append(tuple(old + int(new) for old, new in zip(before, counts, strict=True)))
            return self._taken[block - self._first]

    def _choose(self, block: int, before: tuple[int, ...]) -> Integer[np.ndarray, " n"]:
        """Chooses the sources of a block's rows."""
        weights, total, k = self._weights, self._total, 2 * len(self._weights) - 2
        # What each source is behind its share, times `total`; it is due when that is 1 / k of a row or more.
        behind = [block * BLOCK * w - count * total for w, count in zip(weights, before, strict=True)]
        chosen = np.empty(BLOCK, np.int32)
        for place in range(BLOCK):
            behind = [x + w for x, w in zip(behind, weights, strict=True)]
            due = [i for i, x in enumerate(behind) if k * x >= total]
            source = min(due, key=lambda i: ((k - 1) * total - k * behind[i]) * self._spacing[i])
            behind[source] -= total
            chosen[place] = source
        return chosen
