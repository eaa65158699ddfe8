"""Batches: rows of packed documents, with their targets and the keys that each token may reach."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

from dsa_jax.key_range import KeyRange
from train.checks import MAX_COUNT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """Holds what a rollout chose for the tokens of a batch, to be taken again in training; any may be None.

    Tokens stand first, so that a batch is cut into rows and shards as one. Integers are as narrow as the values allow.

    Attributes:
      routes: [B, T, moe_layers, k], each token's experts; -1 leaves the choice to the router.
      kept: [B, T, M], the ids among which the target of each token was drawn, then -1; none where it was drawn among
        the whole vocabulary, or not drawn.
      selections: [B, T, layers, K], canonical positions in the row; a token without any attends to nothing.
    """

    routes: Any = None
    kept: Any = None
    selections: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Holds rows of packed documents; `start` and `stop` are their KeyRange. The loader's leaves are NumPy arrays."""

    tokens: Any  # i32[B, T]
    targets: Any  # i32[B, T], the next token
    valid: Any  # bool[B, T], this target counts: it belongs to the document of its token
    start: Any  # i32[B, T]
    stop: Any  # i32[B, T]
    positions: Any  # i32[B, T], from 0 in every document
    replay: Replay | None = None  # of tokens that an engine has drawn

    @property
    def keys(self) -> KeyRange:
        """Reaches causally within each document."""
        return KeyRange(jnp.asarray(self.start), jnp.asarray(self.stop))

    def canonical(self) -> Self:
        """Converts what has other dtypes to int32 and booleans, as the loader's batches have them."""
        dtypes = {name: np.bool_ if name == "valid" else np.int32 for name in TOKEN_FIELDS}
        is_so = lambda name: getattr(getattr(self, name), "dtype", None) == dtypes[name]  # noqa: E731
        others = {name: np.asarray(getattr(self, name), dtype) for name, dtype in dtypes.items() if not is_so(name)}
        return dataclasses.replace(self, **others) if others else self

    @classmethod
    def from_tokens(
        cls, tokens: ArrayLike, segment_ids: ArrayLike | None = None, *, padding_id: int | None = None
    ) -> Self:
        """Makes the batch of rows of token ids: targets shifted within documents, ranges and positions.

        The last token of a document has no target; so has the last of a row, whose document may go on in another row.

        Args:
          tokens: integers [B, T].
          segment_ids: integers [B, T]; each run of equal ids is a document, negative ones are padding. Without it a row
            is one document.
          padding_id: the token that pads rows, before or behind what they hold; it may be no id of the vocabulary.
            Where it stands between other tokens it is a token.

        Raises:
          ValueError: if a shape or a dtype is another.

        Examples:
          >>> batch = Batch.from_tokens([[5, 6, 7, 8, 9, 0]], [[0, 0, 0, 1, 1, 1]], padding_id=0)
          >>> batch.targets[batch.valid].tolist(), batch.positions.tolist()
          ([6, 7, 9], [[0, 1, 2, 0, 1, 0]])
        """
        ids = _integers("tokens", tokens)
        segments = np.zeros_like(ids) if segment_ids is None else _integers("segment_ids", segment_ids)
        if segments.shape != ids.shape:
            raise ValueError(f"segment_ids must have the shape of tokens {ids.shape}, got {segments.shape}")
        if padding_id is not None:
            others = ids != padding_id
            inside = np.maximum.accumulate(others, 1) & np.maximum.accumulate(others[:, ::-1], 1)[:, ::-1]
            segments, ids = np.where(inside, segments, -1), np.where(inside, ids, 0)
        return cls._of_segments(ids, segments)

    @classmethod
    def _of_segments(cls, tokens: np.ndarray, segments: np.ndarray) -> Self:
        begins = np.ones(tokens.shape, bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        start = np.maximum.accumulate(np.where(begins, place, 0), axis=1).astype(np.int32)
        is_padding = segments < 0
        valid = np.zeros(tokens.shape, bool)
        valid[:, :-1] = ~begins[:, 1:] & ~is_padding[:, :-1]
        targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
        stop = np.where(is_padding, start, place + 1).astype(np.int32)
        return cls(tokens, targets, valid, start, stop, place - start)

    @classmethod
    def stack(cls, rows: Sequence["Batch"]) -> Self:
        """Stacks rows of [T] to one batch of [B, T]."""
        return jax.tree.map(lambda *each: np.stack(each), *rows)

    @classmethod
    def concatenate(cls, parts: Sequence["Batch"]) -> Self:
        """Joins parts of rows [B, T] in their order."""
        if len(parts) == 1:
            return cls(**vars(parts[0]))
        return jax.tree.map(lambda *each: np.concatenate(each, axis=1), *parts)


TOKEN_FIELDS = tuple(field.name for field in dataclasses.fields(Batch) if field.name != "replay")  # all [B, T]


def _integers(name: str, values: ArrayLike) -> np.ndarray:
    """Reads integers [B, T] as int32."""
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [B, T], got {array.dtype} {list(array.shape)}")
    if array.min() < -MAX_COUNT or array.max() > MAX_COUNT:
        raise ValueError(f"{name} must be integers of 32 bits, got {array.min()} to {array.max()}")
    return array.astype(np.int32)


def window_row(
    window: Int[np.ndarray, "*B L"],
    start: Int[np.ndarray, "*B L"],
    *,
    begin: int = 0,
    filled: Int[np.ndarray, "*B"] | None = None,
    learnt: Bool[np.ndarray, "*B L"] | None = None,
) -> Batch:
    """Makes L - 1 tokens of a row, or of several, and their targets; what can be is a view of `window` and `start`.

    Args:
      window: the tokens, and the target of the last.
      start: the place in the row where the document of each begins.
      begin: the place in the row of the first.
      filled: the place in each row from which on it is padding, which reaches nothing; None: nowhere.
      learnt: which of the window count as targets; None: all.
    """
    place = np.arange(begin, begin + window.shape[-1] - 1, dtype=np.int32)
    valid = start[..., 1:] <= place  # the target's document has begun by its token
    stop = np.broadcast_to(place + 1, valid.shape)
    if filled is not None and (filled < begin + window.shape[-1]).any():
        is_text = place < filled[..., None]
        valid &= is_text
        stop = np.where(is_text, stop, start[..., :-1])
    if learnt is not None:
        valid &= learnt[..., 1:]
    return Batch(window[..., :-1], window[..., 1:], valid, start[..., :-1], stop, place - start[..., :-1])
