"""Prompts in pieces: which tokens of them a prefill step takes, and what it leaves of each."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsa_jax.inference.pages import PagedCache
from dsa_jax.inference.sampling import Likeliest

MIN_TOKENS = 16  # the least size that those of prefills are rounded up to


class Piece(NamedTuple):
    """Says which tokens of a prompt a prefill step takes."""

    item: int  # the prompt's number
    begin: int  # its first token, counted in the prompt
    count: int


def take_of(count: int, room: int, least: int) -> int:
    """Counts the tokens to take of `count` where there is room for `room`: if not all, `least` at least stay behind.

    Examples:
      >>> take_of(10, 16, least=2), take_of(10, 6, least=2), take_of(10, 9, least=2)
      (10, 6, 8)
    """
    return max(0, count if count <= room else min(room, count - least))


def last_tokens(texts, count: int):
    """Makes an array of the last tokens of each text, int32 [B, count]; 0 before its first."""
    found = np.zeros((len(texts), count), np.int32)
    for row, text in zip(found, texts, strict=True):
        own = text[max(len(text) - count, 0) :]
        row[count - len(own) :] = own
    return found


def tokens_behind(prompt, following, piece: Piece, depths: int):
    """Lists for each token of a piece the one, two, … `depths` places behind it, int32 [depths, count]; -1 unknown."""
    end = piece.begin + piece.count
    behind = [*prompt[end : end + depths], *following][:depths]
    known = np.concatenate([prompt[piece.begin + 1 : end], behind, np.full(depths - len(behind), -1)])
    return np.lib.stride_tricks.sliding_window_view(known.astype(np.int32), piece.count)


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts prompts into pieces, as many at a time as a step takes.

    Attributes:
      cache: that they go to.
      chunk: tokens of a step, on each shard of rows.
      last: tokens of a prompt that its last piece has at least, if the prompt has so many.
      table_pages: of a row at most; any number if None.
      invariant: whether a piece has a step for itself and crosses no multiple of `chunk`.
    """

    cache: PagedCache
    chunk: int
    last: int
    table_pages: int | None
    invariant: bool

    def steps(self, sequences, prompts, before) -> Iterator[list[list[Piece]]]:
        """Yields for each step the pieces of each shard's row; `before` counts what each sequence has already."""
        rows: list[list[Piece]] = [[] for _ in range(self.cache.row_shards)]
        for item, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            begin = 0
            while begin < len(prompt):
                size = self.chunk
                if self.invariant:  # borders at the same positions, however many tokens are there already
                    size -= (before[item] + begin) % self.chunk
                count = take_of(len(prompt) - begin, size, self.last)
                rows[self.cache.rows_of(sequence)].append(Piece(item, begin, count))
                begin += count
        while any(rows):
            yield [self._take(row, sequences) for row in rows]

    def _take(self, row, sequences):
        """Takes the pieces of one step from a row's list: as many as fit a chunk, the last one cut to fit."""
        taken, room, pages = [], self.chunk, 0
        while row and room and not (self.invariant and taken):
            pages += self.cache.row_pages(sequences[row[0].item])
            if taken and self.table_pages is not None and pages > self.table_pages:
                break
            piece = row.pop(0)
            if piece.count > room:
                count = take_of(piece.count, room, self.last)
                if self.invariant or taken and count < MIN_TOKENS:
                    row.insert(0, piece)
                    break
                row.insert(0, Piece(piece.item, piece.begin + count, piece.count - count))
                piece = piece._replace(count=count)
            taken.append(piece)
            room -= piece.count
        return taken


class Scored(NamedTuple):
    """Says where the scores of a piece of a prompt are."""

    piece: Piece
    scores: Any  # Likeliest of a whole step [B, T], on the device
    row: int
    column: int  # of the piece's first token

    def read(self) -> Likeliest:
        """Waits for the piece's scores and returns them, [count] and [count, L]."""
        here = slice(self.column, self.column + self.piece.count)
        return jax.tree.map(lambda x: np.asarray(x)[self.row, here], self.scores)


@jax.jit
def take_rows(arrays, rows):
    """Takes some rows of every array of a tree."""
    return jax.tree.map(lambda x: x[rows], arrays)


class Prefilled(NamedTuple):
    """Holds the results of a prefill: logits behind each prompt, and for each prompt what was asked for."""

    rows: Array  # [n, vocab], as `Runner.place` lays the sequences out
    places: list[int]  # the row of each prompt
    selected: list[np.ndarray] | None  # [layers, T, K] each
    routed: list[np.ndarray] | None  # [moe_layers, T, k] each
    scored: list[Scored]  # of the prompts that have targets, in order
    hidden: Array | None = None  # [n, depths, D] of the last tokens of each row's prompt, where prediction layers draft

    @property
    def logits(self) -> Array:
        """Returns the logits behind each prompt, [prompts, vocab]."""
        return take_rows(self.rows, np.array(self.places, np.int32))


def pack_targets(places, targets, shape):
    """Makes the targets of a step, int32 [B, T], from those of its pieces; None if there are none."""
    if not places:
        return None
    packed = np.zeros(shape, np.int32)
    for piece, (row, column) in places:
        packed[row, column : column + piece.count] = targets[piece.item][piece.begin : piece.begin + piece.count]
    return packed


@jax.jit
def collect(last, logits, ended, row, column):
    """Takes the logits, or hidden states, of the prompts that have ended in a step, and leaves the others."""
    found = logits[row, column]
    return found if last is None else jnp.where(ended.reshape(-1, *[1] * (found.ndim - 1)), found, last)


def places_of(ends, size):
    """Returns of each prompt whether it has ended in a step, and where its logits are, as arrays of one size."""
    ended, places = np.zeros(size, bool), np.zeros((2, size), np.int32)
    for item, place in ends.items():
        ended[item], places[:, item] = True, place
    return ended, *places


def join_parts(parts, width):
    """Joins a prompt's selections of several steps, filled up with -1 to one width."""
    fill = lambda x: np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2])), constant_values=-1)  # noqa: E731
    return np.concatenate([fill(part) for part in parts], axis=1)
