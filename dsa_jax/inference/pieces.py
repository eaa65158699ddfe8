"""Prompts in pieces: which tokens of them a prefill step takes, and what it leaves of each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsa_jax.inference.sampling import Likeliest


class Piece(NamedTuple):
    """Says which tokens of a prompt a prefill step takes."""

    item: int  # the prompt's number
    begin: int  # its first token, counted in the prompt
    count: int


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


class Prefilled(NamedTuple):
    """Holds the results of a prefill: logits behind each prompt, and for each prompt what was asked for."""

    rows: Array  # [n, vocab], n rounded up, so that few sizes are compiled
    prompts: int
    selected: list[np.ndarray] | None  # [layers, T, K] each
    routed: list[np.ndarray] | None  # [moe_layers, T, k] each
    scored: list[Scored]  # of the prompts that have targets, in order
    hidden: Array | None = None  # [n, D] behind each prompt, where prediction layers draft

    @property
    def logits(self) -> Array:
        """Returns the logits behind each prompt, [n, vocab]."""
        return self.rows[: self.prompts]


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
    return found if last is None else jnp.where(ended[:, None], found, last)


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
