"""Turns: sequences that take in tokens and draw tokens by turns, as conversations with tools do, in one cache.

Rows are of a fixed number and tables of a fixed width, so few programs serve any conversation: one for each length that
tokens to be read are rounded up to, and one that draws a turn.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from dsa_jax.inference.programs import Carry, Rows, bucket
from dsa_jax.inference.sampling import Kind, Settings
from dsa_jax.inference.step import MIN_TOKENS, Runner
from dsa_jax.parallel.sharding import spec

Row = int | None  # a sequence of the cache, or padding


@dataclasses.dataclass(frozen=True)
class Taken:
    """Holds what tokens that a sequence has taken in have chosen; None of each that the runner does not return.

    Attributes:
      selected: integers [layers, n, K], positions in the sequence.
      routed: integers [moe_layers, n, k].
    """

    selected: np.ndarray | None = None
    routed: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Holds the turn of one row.

    Attributes:
      tokens: int32 [n].
      log_probs: float32 [n], of the distribution that each was drawn from; NaN where the model's logits are.
      kept: of each token the ids among which it was drawn, if they were asked for.
      taken: of the tokens but the last, which the cache does not hold yet.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    kept: list[np.ndarray] | None
    taken: Taken


class Turns:
    """Reads and draws for rows of sequences of one cache.

    Args:
      runner: with `max_length`; what it returns of selections and routes is recorded.
      most: tokens of a turn at most.
      stops: tokens that end a turn; they count among its tokens.

    Examples:
      >>> from dsa_jax import PagedCache
      >>> runner = Runner(model, PagedCache(model.config, 4, format="float32"), max_length=64)
      >>> turns, sequence = Turns(runner, most=4, stops=()), runner.cache.new()
      >>> logits, _ = turns.read([sequence], [np.arange(5)])
      >>> [turn] = turns.draw([sequence], logits, greedy_settings(1, 256), limit=[3], kind="greedy")
      >>> len(turn.tokens), runner.cache.length(sequence)
      (3, 7)
    """

    def __init__(self, runner: Runner, *, most: int, stops: Sequence[int]):
        if runner.max_length is None:
            raise ValueError("tables of turns have room for the longest sequence: give the Runner max_length")
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self.runner, self.cache, self.most = runner, runner.cache, most
        self.stops = np.asarray([*stops, -1], np.int32)

    def read(self, rows: Sequence[Row], tokens: Sequence[np.ndarray]) -> tuple[Array, list[Taken]]:
        """Takes in tokens behind each row's sequence, several at a time.

        Args:
          rows: sequences, each once; None for padding. On a mesh, of each shard's rows the same number.
          tokens: of each row, at least one; of padding they are not looked at.

        Returns:
          logits [B, vocab] behind each row, of padding any, and what the tokens have chosen.

        Raises:
          OutOfPages: if the cache has too few pages.
          ValueError: for a row without tokens, or a sequence that would be too long.
        """
        before = np.zeros(len(rows), np.int32)
        counts = np.zeros(len(rows), np.int32)
        for row, sequence in enumerate(rows):
            if sequence is not None:
                if not len(tokens[row]):
                    raise ValueError(f"every row must have at least one token to read, got none in row {row}")
                before[row], counts[row] = self.cache.length(sequence), len(tokens[row])
                self.cache.extend(sequence, int(counts[row]))
        chunk = max(self.runner.prefill_chunk // max(len(rows) // self.cache.row_shards, 1), MIN_TOKENS)
        width = min(bucket(int(counts.max(initial=1)), MIN_TOKENS), bucket(chunk + 1) // 2)
        table, logits, parts = self._table(rows), None, []
        for begin in range(0, max(int(counts.max(initial=0)), 1), width):
            size = np.clip(counts - begin, 0, width)
            arrays = _columns(tokens, before, begin, size, width)
            out = self.runner.read_rows(arrays, table)
            ended = (size > 0) & (begin + size == counts)
            logits = out.logits[:, 0] if logits is None else _choose(jnp.asarray(ended), out.logits[:, 0], logits)
            parts.append((size, _host(out.selected), _host(out.routed)))
        assert logits is not None
        return logits, [self._taken(parts, row) for row in range(len(rows))]

    def draw(
        self,
        rows: Sequence[Row],
        logits: Array,
        settings: Settings,
        *,
        limit: Sequence[int] | np.ndarray,
        number: Sequence[int] | np.ndarray | None = None,
        kind: Kind = "truncated",
        kept: int = 0,
    ) -> list[Drawn | None]:
        """Draws a turn of each row, on the device, and leaves in the cache all of its tokens but the last.

        Args:
          rows: sequences; None for rows that draw nothing.
          logits: [B, vocab], behind each.
          settings: of each row.
          limit: the tokens of each row at most, from 1 to `most`.
          number: how many tokens each row has drawn before, 0 if None: with the seed it says what is drawn.
          kind: what the settings need of a draw, `sampling.kind_of`.
          kept: how many ids of a kept set are recorded at most, 0 for none: `top_k` of every row, or more.

        Raises:
          OutOfPages: if the cache has too few pages for a turn as long as the limits; it is as it was.
          ValueError: for a limit out of its range, or a sequence that would be too long.
        """
        live = np.array([sequence is not None for sequence in rows])
        limit = np.where(live, np.asarray(limit, np.int32), 1)
        if limit.min() < 1 or limit.max() > self.most:
            raise ValueError(f"limit must be from 1 to {self.most} tokens, got {limit.min()} to {limit.max()}")
        length = np.array([0 if each is None else self.cache.length(each) for each in rows], np.int32)
        self._make_room(rows, length, limit)
        before = np.zeros(len(rows), np.int32) if number is None else np.asarray(number, np.int32)
        carry = Carry(np.zeros(len(rows), np.int32), length, before, live)
        mesh = self.cache.mesh
        if mesh is not None:  # wherever they were: one program takes them
            logits = jax.device_put(logits, NamedSharding(mesh, spec()))
        out = self.runner.turn(
            logits, carry, self._table(rows), settings, self.stops, limit, kind=kind, most=self.most, kept=kept
        )
        count = np.asarray(out.count)
        # What is read is as long as the longest turn, rounded up so that few slices are compiled.
        used = min(bucket(int(count.max(initial=1))), self.most)
        tokens, log_probs = np.asarray(out.tokens[:used]), np.asarray(out.log_probs[:used])
        kept_ids, selected, routed = (_host(x if x is None else x[:used]) for x in out[3:])
        turns: list[Drawn | None] = []
        for row, sequence in enumerate(rows):
            if sequence is None:
                turns.append(None)
                continue
            n = int(count[row])
            self.cache.truncate(sequence, int(length[row]) + n - 1)
            of_row = lambda x, n=n, row=row: None if x is None else x[: n - 1, :, row].swapaxes(0, 1)  # noqa: E731
            sets = None if kept_ids is None else [ids[ids >= 0].astype(np.int32) for ids in kept_ids[:n, row]]
            taken = Taken(of_row(selected), of_row(routed))
            turns.append(Drawn(tokens[:n, row].copy(), log_probs[:n, row].copy(), sets, taken))
        return turns

    def _make_room(self, rows, length, limit):
        """Makes room for the longest turn of every row, or of none."""
        done = []
        try:
            for row, sequence in enumerate(rows):
                if sequence is not None:
                    self.cache.extend(sequence, int(limit[row]) - 1)
                    done.append((sequence, int(length[row])))
        except Exception:
            for sequence, before in done:
                self.cache.truncate(sequence, before)
            raise

    def _table(self, rows):
        return self.cache.table(rows, self.runner.table_width)

    def _taken(self, parts, row) -> Taken:
        """Joins what one row's tokens have chosen, from the steps that took them in."""
        joined: list[Any] = []
        for which in (1, 2):
            found = [part[which][:, row, : part[0][row]] for part in parts if part[which] is not None]
            joined.append(np.concatenate(found, axis=1) if found else None)
        return Taken(*joined)


def greedy_settings(rows: int, vocab: int) -> Settings:
    """Makes the settings of rows that take the likeliest token."""
    return row_settings(rows, vocab, temperature=0.0, seeds=np.zeros(rows, np.uint32))


def row_settings(
    rows: int, vocab: int, *, temperature: float, seeds: np.ndarray, top_p: float = 1.0, top_k: int | None = None
) -> Settings:
    """Makes settings of rows that differ in their seeds alone, uint32 [rows]."""
    full = lambda value, dtype: np.full(rows, value, dtype)  # noqa: E731
    k = vocab if top_k is None else min(top_k, vocab)
    return Settings(full(temperature, np.float32), full(k, np.int32), full(top_p, np.float32), seeds)


def _columns(tokens, before, begin, size, width) -> Rows:
    """Makes the arrays of the tokens from `begin` on, `size` of each row, in rows of `width`."""
    columns = np.arange(width, dtype=np.int32)
    real = columns < size[:, None]
    ids = np.zeros(real.shape, np.int32)
    for row in np.flatnonzero(size):
        ids[row, : size[row]] = tokens[row][begin : begin + size[row]]
    positions = np.where(real, before[:, None] + begin + columns, 0).astype(np.int32)
    stop = np.where(real, positions + 1, 0).astype(np.int32)
    return Rows(ids, positions, np.zeros_like(ids), stop, np.maximum(size - 1, 0).astype(np.int32)[:, None])


def _host(x) -> np.ndarray | None:
    return None if x is None else np.asarray(x)


@jax.jit
def _choose(ended, logits, last):
    return jnp.where(ended[:, None], logits, last)
