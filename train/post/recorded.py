"""Holds what an engine recorded of an episode, by position, and makes its rows in a batch of training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data import Replay
from train.post.environment import Episode


@dataclasses.dataclass(frozen=True)
class Recording:
    """Says what rollouts record; what is not asked for costs nothing.

    Attributes:
      routes: the experts of each token, k bytes a layer with experts (two each above 256 experts).
      kept: the ids among which each token was drawn, 4 bytes each.
      selections: the keys that each token selected, 2 K bytes a layer (4 K where sequences may pass 32,767 tokens).
    """

    routes: bool = False
    kept: bool = False
    selections: bool = False


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Holds what was recorded of the n tokens of an episode; None of each that was not.

    Attributes:
      routes: uint8 or uint16 [n - 1, moe_layers, k], of each token but the last, which the model never read.
      selections: int16 or int32 [n - 1, layers, K], positions in the sequence, of the same tokens.
      kept_ids: int32 [m], the ids among which each token was drawn, of one token behind those of the other.
      kept_offsets: int32 [n + 1], where those of each token begin; tokens that were not drawn have none.
    """

    routes: np.ndarray | None = None
    selections: np.ndarray | None = None
    kept_ids: np.ndarray | None = None
    kept_offsets: np.ndarray | None = None

    def kept(self, position: int) -> np.ndarray:
        """Returns the ids among which the token at a position was drawn."""
        if self.kept_ids is None or self.kept_offsets is None:
            raise ValueError("kept sets were not recorded")
        return self.kept_ids[self.kept_offsets[position] : self.kept_offsets[position + 1]]


def join_kept(sets: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """Joins the kept set of each token, None of those that were not drawn, to ids and offsets.

    Examples:
      >>> [x.tolist() for x in join_kept([None, np.array([4, 7]), np.array([2])])]
      [[4, 7, 2], [0, 0, 2, 3]]
    """
    sizes = [0 if each is None else len(each) for each in sets]
    ids = [each for each in sets if each is not None]
    joined = np.concatenate(ids) if ids else np.zeros(0)
    return joined.astype(np.int32), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def narrow_routes(routes: np.ndarray) -> np.ndarray:
    """Stores experts in a byte each where all numbers fit."""
    return routes.astype(np.uint8 if routes.max(initial=0) < 256 else np.uint16)


def replay_rows(episodes: Sequence[Episode], seq_len: int, *, kept_width: int | None = None) -> dict[str, np.ndarray]:
    """Makes the arrays of a `Replay`, [B, T, …], of episodes that each begin a row and are padded to its length.

    The input of a row at t is token t of the episode, and its target token t + 1, so the kept set at t is that of
    token t + 1. The last token of an episode was never read: its router chooses itself, and it selects nothing.

    Args:
      episodes: all with records of the same kinds.
      seq_len: T.
      kept_width: M; None: the largest set, rounded up to a power of two, so that few shapes are compiled.

    Returns:
      those of "routes" (int16), "kept" (int32) and "selections" that were recorded; `Replay(**arrays)`.

    Raises:
      ValueError: for an episode without a record that another has, or a kept set that is wider than `kept_width`.
    """
    records = [each.recorded or Recorded() for each in episodes]
    arrays: dict[str, np.ndarray] = {}
    for name, dtype in (("routes", np.int16), ("selections", None)):
        found = _all_or_none(name, episodes, [getattr(each, name) for each in records])
        if found:
            arrays[name] = _padded(found, seq_len, dtype or max((x.dtype for x in found), key=lambda x: x.itemsize))
    if _all_or_none("kept", episodes, [each.kept_ids for each in records]):
        arrays["kept"] = _kept_rows(records, seq_len, kept_width)
    return arrays


def replay_of(episodes: Sequence[Episode], seq_len: int, *, kept_width: int | None = None) -> Replay | None:
    """Makes the replay of a batch of episodes, one a row; None where nothing was recorded."""
    arrays: dict[str, Any] = replay_rows(episodes, seq_len, kept_width=kept_width)
    return Replay(**arrays) if arrays else None


def _all_or_none(name, episodes, found):
    missing = [episode for episode, each in zip(episodes, found, strict=True) if each is None]
    if missing and len(missing) < len(found):
        first = missing[0]
        raise ValueError(
            f"{name} must be recorded of all episodes of a batch or of none, got none for problem {first.problem} of "
            f"task {first.task}"
        )
    return [] if missing else found


def _padded(found, seq_len, dtype):
    width = max(x.shape[2] for x in found)
    rows = np.full((len(found), seq_len, found[0].shape[1], width), -1, dtype)
    for row, x in zip(rows, found, strict=True):
        count = min(len(x), seq_len)
        row[:count, :, : x.shape[2]] = x[:count]
    return rows


def _kept_rows(records, seq_len, width):
    largest = max((int(np.diff(each.kept_offsets).max(initial=1)) for each in records), default=1)
    width = 1 << max(largest - 1, 0).bit_length() if width is None else width
    if largest > width:
        raise ValueError(f"kept sets must be at most {width} ids to be replayed, got one of {largest}")
    rows = np.full((len(records), seq_len, width), -1, np.int32)
    for row, each in zip(rows, records, strict=True):
        sizes = np.diff(each.kept_offsets)
        at = np.repeat(np.arange(len(sizes)), sizes)  # the token of each id
        column = np.arange(len(each.kept_ids)) - each.kept_offsets[at]
        inside = (at >= 1) & (at <= seq_len)
        row[at[inside] - 1, column[inside]] = each.kept_ids[inside]
    return rows
