"""Speculative decoding: drafts of the tokens to come, which one step verifies together.

A draft is a fixed proposal. Every position of a verification is drawn from its own distribution, under the number that
the token has without drafts. Drafts are taken as long as they equal what was drawn; in place of the first that differs
stands what was drawn. A draft is thus taken with its probability, which is what rejection sampling does for a proposal
that is certain (Leviathan et al. 2023, arXiv:2211.17192), and the tokens are those that decode steps draw. As between
any two programs, the last bits of logits may differ, and so a choice between tokens that are as likely as each other.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.config import Config
from dsa_jax.inference.sampling import Controls, Draw, Kind, Settings, draw
from dsa_jax.inference.scheduler import Work

MAX_DRAFTS = 3  # of a row, beside its last token: decode kernels take four tokens a row
INDEXED_TOKENS = 4096  # that `NGram` indexes in a step, in 2 ms: a long prompt takes several, and stalls nobody


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafted:
    """Holds what a verification takes in.

    Attributes:
      tokens: int32 [B, T], the last token of each row, then its drafts.
      count: int32 [B], how many of these there are; 0 for a row of padding.
      length: int32 [B], the tokens in the cache.
      number: int32 [B], of the token that is drawn behind the last one.
    """

    tokens: Array | np.ndarray
    count: Array | np.ndarray
    length: Array | np.ndarray
    number: Array | np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Work | None], drafts: int) -> Self:
        """Makes it of the work of rows, None for padding, that have so many drafts at most."""
        tokens = np.zeros((len(rows), 1 + drafts), np.int32)
        count, length, number = np.zeros((3, len(rows)), np.int32)
        for row, work in enumerate(rows):
            if work is not None and work.number is not None:
                tokens[row, : work.count] = work.sequence.tokens[-1], *work.drafts
                count[row], length[row], number[row] = work.count, work.begin, work.number
        return cls(tokens, count, length, number)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Holds where prediction layers go on to draft, of rows whose last `taken` + 1 tokens were just drawn.

    Attributes:
      tokens: int32 [B, T] or [B · T], the token that was drawn behind each column.
      taken: int32 [B], the last column that counts.
      length: int32 [B], the position of the first column.
      number: int32 [B], of the token that was drawn behind the first column.
      room: int32 [B], positions that the row's pages have; 0 for a row of padding.
    """

    tokens: Array | np.ndarray
    taken: Array | np.ndarray
    length: Array | np.ndarray
    number: Array | np.ndarray
    room: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
    """Holds what prediction layers past the first take in anew, of the n - 1 columns before the next: see `MTP`.

    Attributes:
      hidden: [B, n - 1, D], of the model.
      tokens: int32 [B, n - 1], the token behind each.
    """

    hidden: Array
    tokens: Array | np.ndarray


class Verified(NamedTuple):
    """Holds the results of a verification: of each row the first `taken` + 1 tokens that were drawn count."""

    drawn: Draw  # of every position, those of a row behind each other, [B · T]
    taken: Array  # int32 [B], how many drafts are right
    last: Array  # int32 [B], the last token that counts


def verify_drafts(
    logits: Float[Array, "B T vocab"],
    drafted: Drafted,
    settings: Settings,
    *,
    kind: Kind = "truncated",
    controls: Controls | None = None,
) -> Verified:
    """Draws the token behind every position, and counts the drafts that are right: those before the first wrong one."""
    columns = jnp.arange(logits.shape[1])
    numbers = jnp.asarray(drafted.number) + columns[:, None]
    draw_column = partial(draw, settings=settings, kind=kind, controls=controls)
    drawn = jax.vmap(lambda x, number: draw_column(x, number=number), in_axes=(1, 0), out_axes=1)(logits, numbers)
    right = (jnp.asarray(drafted.tokens)[:, 1:] == drawn.token[:, :-1]) & (columns[1:] < drafted.count[:, None])
    taken = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
    last = jnp.take_along_axis(drawn.token, taken[:, None], axis=1)[:, 0]
    return Verified(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn), taken, last)


@jax.jit
def split_recent(hidden: Float[Array, "B n D"], tokens: Int[Array, "B m"]) -> tuple[Array, Recent | None]:
    """Takes what a prefill left of the last n tokens apart: the last one's hidden state, [B, 1, D], and those before.

    Args:
      hidden: of the model.
      tokens: the m = n - 1 that stand behind all but the last.
    """
    return hidden[:, -1:], Recent(hidden[:, :-1], tokens) if hidden.shape[1] > 1 else None


def drafting_layers(config: Config) -> int:
    """Counts the prediction layers that draft, which is n: no more than there are drafts."""
    return min(config.num_nextn_predict_layers, MAX_DRAFTS)


class Known(Protocol):
    """Holds what the host knows of a sequence: its prompt, int32 [T], and the tokens drawn since, which only grow."""

    prompt: np.ndarray
    tokens: list[int]


class Drafter(Protocol):
    """Proposes how sequences go on.

    Attributes:
      most: how many tokens it proposes of a sequence at most, from 1 to 3.
    """

    most: int

    def propose(self, sequences: Sequence[Known]) -> tuple[np.ndarray, np.ndarray]:
        """Returns drafts, int32 [B, most], and how many of each row count, int32 [B].

        A sequence is the same object in every call, as long as it lives.
        """
        ...


def propose(drafter: Drafter, sequences: Sequence[Any], vocab: int) -> dict[Any, list[int]]:
    """Returns the drafts of those sequences that have any.

    Raises:
      ValueError: if the drafter returns anything but what `Drafter.propose` says.
    """
    drafts, counts = map(np.asarray, drafter.propose(sequences))
    shape = len(sequences), drafter.most
    if drafts.shape != shape or counts.shape != shape[:1]:
        raise ValueError(
            f"a drafter must propose {list(shape)} tokens and {list(shape[:1])} counts, "
            f"got {list(drafts.shape)} and {list(counts.shape)}"
        )
    if np.any((drafts < 0) | (drafts >= vocab)) or np.any((counts < 0) | (counts > drafter.most)):
        raise ValueError(
            f"a drafter's tokens must be from 0 to {vocab - 1} and its counts from 0 to {drafter.most}, "
            f"got {drafts.min()} to {drafts.max()} and {counts.min()} to {counts.max()}"
        )
    rows = zip(sequences, drafts.tolist(), counts.tolist(), strict=True)
    return {sequence: row[:count] for sequence, row, count in rows if count}


class MTP:
    """Proposes what the model's own prediction layers draft (multi-token prediction).

    Draft k is that of layer k, of what the layer before knows and the draft before; behind the last layer, it goes on
    from its own output. Each has an indexer and entries in the cache of its own, which are of the true tokens as soon
    as these are known: layer k joins a token with that k places behind it, so its last k - 1 entries are of drafts at
    first, and are made anew from the model's hidden states when the tokens have come. A draft is drawn by the row's
    settings from the random numbers that its token will be drawn from, so the closer both distributions are, the more
    often they draw the same.

    Args:
      most: how many tokens to propose at most.

    Examples:
      >>> from flax import nnx
      >>> from dsa_jax import LLM, MTP, Config, SamplingParams, Transformer
      >>> predicting = Transformer(Config.tiny(num_nextn_predict_layers=1), rngs=nnx.Rngs(0))
      >>> llm = LLM(predicting, pages=16, rows=1, drafter=MTP())
      >>> [result] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4))
      >>> llm.engine.stats().drafts_proposed
      3
    """

    def __init__(self, most: int = MAX_DRAFTS):
        self.most = check_most(most)
        self._drafts: weakref.WeakKeyDictionary[Known, list[int]] = weakref.WeakKeyDictionary()

    def learn(self, sequence: Known, drafts: list[int]) -> None:
        """Takes what was drafted behind a sequence's last token, for the next call of `propose`."""
        self._drafts[sequence] = drafts

    def propose(self, sequences: Sequence[Known]) -> tuple[np.ndarray, np.ndarray]:
        """Returns drafts, int32 [B, most], and how many of each row count, int32 [B]."""
        drafts, counts = np.zeros((len(sequences), self.most), np.int32), np.zeros(len(sequences), np.int32)
        for row, sequence in enumerate(sequences):
            found = self._drafts.pop(sequence, [])
            drafts[row, : len(found)], counts[row] = found, len(found)
        return drafts, counts


class NGram:
    """Proposes what followed the last tokens of a sequence where they stood before, in its prompt or its output.

    Of the places where they did the latest counts, and a longer match before a shorter. A step costs the same however
    long the sequence is; a token of it takes some 0.5 kB of the host's memory.

    Args:
      longest: how many of the last tokens are looked for first.
      shortest: how many at least.
      most: how many tokens to propose at most.

    Examples:
      >>> from dsa_jax import LLM, SamplingParams
      >>> llm = LLM(model, pages=16, rows=1, drafter=NGram())
      >>> [result] = llm.generate([[1, 2, 3] * 8], SamplingParams(temperature=0.0, max_tokens=4))
      >>> llm.engine.stats().drafts_proposed >= llm.engine.stats().drafts_accepted
      True
    """

    def __init__(self, longest: int = 4, shortest: int = 2, most: int = MAX_DRAFTS):
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be from 1 to longest = {longest}, got {shortest}")
        self.most, self._lengths = check_most(most), range(shortest, longest + 1)
        self._indices: weakref.WeakKeyDictionary[Known, _Index] = weakref.WeakKeyDictionary()

    def propose(self, sequences: Sequence[Known]) -> tuple[np.ndarray, np.ndarray]:
        """Returns drafts, int32 [B, most], and how many of each row count, int32 [B]."""
        drafts, counts = np.zeros((len(sequences), self.most), np.int32), np.zeros(len(sequences), np.int32)
        left = INDEXED_TOKENS
        for row, sequence in enumerate(sequences):
            index = self._indices.get(sequence)
            if index is None:
                index = self._indices[sequence] = _Index(self._lengths)
            left -= index.extend(sequence, left)
            found = index.continuation(sequence, self.most)
            counts[row] = len(found)
            drafts[row, : len(found)] = found
        return drafts, counts


class _Index:
    """Finds where the last tokens of a sequence stood before."""

    def __init__(self, lengths: range):
        self._lengths = lengths
        self._behind: dict[tuple[int, ...], int] = {}  # where each run of tokens ends that another token follows
        self._read = 0  # tokens up to which runs are known

    def extend(self, sequence: Known, most: int) -> int:
        """Takes in `most` tokens or what there is; returns how many. The last one is left: nothing follows it yet."""
        begin, end = self._read, min(_length(sequence) - 1, self._read + most)
        first = max(0, begin - self._lengths[-1] + 1)
        tokens = _part(sequence, first, end)
        for length in self._lengths:
            own = tokens[max(0, begin - length + 1) - first :]
            runs = zip(*(own[shift:] for shift in range(length)), strict=False)
            self._behind.update(zip(runs, itertools.count(max(begin + 1, length)), strict=False))
        self._read = end
        return end - begin

    def continuation(self, sequence: Known, most: int) -> list[int]:
        """Returns the tokens behind the place that was found; behind the sequence's end it goes on as from there."""
        length = _length(sequence)
        if self._read < length - 1:
            return []
        last = _part(sequence, max(0, length - self._lengths[-1]), length)
        places = (self._behind.get(tuple(last[-run:])) for run in reversed(self._lengths) if run <= len(last))
        place = next((place for place in places if place is not None), length)
        found = _part(sequence, place, min(place + most, length))
        while found and len(found) < most:
            found.append(found[place - length])
        return found


def _length(sequence):
    return len(sequence.prompt) + len(sequence.tokens)


def _part(sequence, begin, end) -> list[int]:
    """Lists the tokens of a sequence from one place to another."""
    behind = len(sequence.prompt)
    return [*sequence.prompt[begin:end].tolist(), *sequence.tokens[max(0, begin - behind) : max(0, end - behind)]]


def check_most(most: int) -> int:
    """Returns how many tokens a drafter proposes at most.

    Raises:
      ValueError: unless a verification can take as many.
    """
    if not isinstance(most, int) or isinstance(most, bool) or not 1 <= most <= MAX_DRAFTS:
        raise ValueError(f"a drafter's most must be from 1 to {MAX_DRAFTS}, got {most!r}")
    return most


def check_drafter(drafter: Any) -> int:
    """Returns how many tokens a drafter proposes at most, 0 without one.

    Raises:
      ValueError: for anything else than a drafter or None, or a wrong number.
    """
    if drafter is None:
        return 0
    if isinstance(drafter, type) or not hasattr(drafter, "most") or not hasattr(drafter, "propose"):
        raise ValueError(f"drafter must be one such as NGram() or MTP(), or None, got {drafter!r}")
    return check_most(drafter.most)
