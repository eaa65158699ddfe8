"""Gives the device the work of a step, and keeps there what the next step takes: tokens, and counts of tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.inference.controls import SlotControls
from dsa_jax.inference.pieces import Scored, last_tokens, take_rows
from dsa_jax.inference.programs import bucket
from dsa_jax.inference.sampling import Controls, Draw, Kind, Settings, draw, kind_of
from dsa_jax.inference.scheduler import Limits, Plan, Work
from dsa_jax.inference.slots import pack_rows, read_draw
from dsa_jax.inference.speculative import Ahead, Drafted, Recent, split_recent
from dsa_jax.inference.step import INVARIANT_ROWS, Runner

KINDS: tuple[Kind, ...] = ("greedy", "random", "truncated", "full")


class Ran(NamedTuple):
    """Holds what a step leaves on the device to be read.

    Attributes:
      rows: of each row its work, None for padding.
      drawn: their tokens; None where no prompt has come to its end. Where drafts were verified, of every position.
      kept: the tokens that could be drawn, packed bits [B, vocab / 8], if a row wants them.
      scored: pieces of prompts whose tokens were scored.
      taken: int32 [B], how many drafts of each row are right, where drafts were verified.
      found: what the tokens that were taken in have selected, [layers, B, 1, K], and where they were routed.
      drafts: int32 [B, most], what prediction layers have drafted behind the last token of each row.
      packed: `drawn` as `read_draw` reads it, on its way to the host, where nothing else is needed of it.
    """

    rows: list[Work | None]
    drawn: Draw | None
    kept: jax.Array | None = None
    scored: Sequence[tuple[Work, Scored]] = ()
    taken: jax.Array | None = None
    found: dict[str, jax.Array] = {}
    packed: jax.Array | None = None
    drafts: jax.Array | None = None

    def read(self) -> tuple[list[int], list[float]]:
        """Waits for what was drawn; returns tokens and log-probabilities."""
        if self.packed is not None:
            token, log_prob = read_draw(self.packed)
        else:
            assert self.drawn is not None
            token, log_prob = np.asarray(self.drawn.token), np.asarray(self.drawn.log_prob)
        return token.tolist(), log_prob.tolist()


class Batch:
    """Runs the works of `Continuation`s.

    Args:
      runner: of the model.
      limits: of a step.
      predicts: whether the model's prediction layers draft.
    """

    def __init__(self, runner: Runner, limits: Limits, *, predicts: bool = False):
        self.runner, self.limits, self._predicts = runner, limits, predicts
        # The last token of each slot; the last slot is padding's.
        self._last = runner.everywhere(jnp.zeros(limits.rows + 1, jnp.int32))
        self._tables = np.zeros((limits.rows + 1, runner.table_width), np.int32)  # the row of each slot
        self._tabled: dict[int, tuple[int, int, int]] = {}  # of which sequence each row is, its pages, the last of them
        self._controls = SlotControls(limits.rows, runner.config.vocab_size, runner.everywhere)
        self._recent: Recent | None = None  # of each slot, where several prediction layers draft
        if predicts and runner.depths > 1:
            before, config = (limits.rows + 1, runner.depths - 1), runner.config
            hidden = jnp.zeros((*before, config.hidden_size), config.dtype)
            self._recent = runner.everywhere(Recent(hidden, jnp.zeros(before, jnp.int32)))

    def run(self, plan: Plan) -> list[Ran]:
        """Gives the device the work of a step, and waits for nothing."""
        ran = self._prefill(plan.prefill) if plan.prefill else []
        # Prediction layers must see every token: where they draft, each is taken in by a verification.
        verifies = self._predicts or any(work.drafts for work in plan.decode)
        decode = self._verify if verifies else self._decode
        return [*ran, decode(plan.decode)] if plan.decode else ran

    def warm(self, kinds: Sequence[Kind]) -> None:
        """Compiles every size of step that may come, but for those that score prompts."""
        limits, vocab = self.limits, self.runner.config.vocab_size
        kinds = ("full",) if limits.invariant else kinds
        controls = self._controls.padding
        of_shard = limits.rows // self.runner.cache.row_shards
        self.runner.warm(
            rows=_sizes(of_shard), tokens=_sizes(limits.chunk), drafts=limits.drafts, kinds=kinds, controls=controls,
            slots=limits.rows + 1,
        )  # fmt: skip
        for size in [INVARIANT_ROWS] if limits.invariant else _sizes(of_shard):
            rows = size * self.runner.cache.row_shards
            for kind in kinds:
                self._draw(jnp.zeros((rows, vocab)), [None] * rows, kind)
            padding = np.full(rows, limits.rows, np.int32)
            self._keep_recent(padding, self._recent_of(padding))

    def _prefill(self, works: list[Work]) -> list[Ran]:
        owns: list[Any] = [work.sequence for work in works]
        texts, ends = [own.known for own in owns], [work.begin + work.count for work in works]
        chunks = [text[work.begin : end] for text, work, end in zip(texts, works, ends, strict=True)]
        targets = [own.scores and own.scores.targets(work) for own, work in zip(owns, works, strict=True)]
        behind = [text[end : end + self.runner.depths] for text, end in zip(texts, ends, strict=True)]
        names = [own.cached for own in owns]
        out = self.runner.prefill(names, chunks, extended=True, targets=targets, following=behind)
        for row, own in enumerate(owns):
            if own.trace is not None:
                found = dict(selected=out.selected, routed=out.routed)
                own.trace.add(works[row].begin, {name: x[row] for name, x in found.items() if x is not None})
        scored = [(works[each.piece.item], each) for each in out.scored]
        if all(work.number is None for work in works):
            return [Ran([], None, scored=scored)] if scored else []
        rows = [None if work is None or work.number is None else work for work in self._place(works)]
        drawn = self._draw(out.rows, rows)
        ran = Ran(rows, drawn, _pack(rows, drawn), scored)
        if self._predicts:
            assert out.hidden is not None
            last = [0 if work is None else work.begin + work.count - 1 for work in rows]
            taken = np.zeros(len(rows), np.int32)
            text_of = dict(zip(names, texts, strict=True))
            own = [[] if work is None else text_of[work.sequence.cached] for work in rows]
            lasts = last_tokens(own, self.runner.depths - 1)
            hidden, recent = split_recent(out.hidden, lasts)
            ran = ran._replace(drafts=self._draft(rows, hidden, recent, drawn.token, taken, last))
        return [ran]

    def _draft(self, rows: list[Work | None], hidden, recent, tokens, taken, first: list[int]) -> jax.Array:
        """Has the prediction layers draft behind what was drawn, in columns that begin at the position `first`."""
        settings, number, slots, kind = self._settings(rows)
        room = self.runner.room([None if work is None else work.sequence.cached for work in rows])
        ahead = Ahead(tokens, taken, np.array(first, np.int32), number, room)
        table = self._table(rows, slots)
        most = self.limits.drafts
        drafts, recent = self.runner.draft(hidden, recent, ahead, table, settings, kind=kind, most=most)
        self._keep_recent(slots, recent)
        return drafts

    def _recent_of(self, slots: np.ndarray) -> Recent | None:
        return None if self._recent is None else take_rows(self._recent, slots)

    def _keep_recent(self, slots: np.ndarray, recent: Recent | None) -> None:
        if recent is not None:
            self._recent = _put(self._recent, slots, recent)

    def _draw(self, logits, rows: list[Work | None], kind: Kind | None = None) -> Draw:
        """Draws the first token of each row."""
        settings, number, slots, needed = self._settings(rows)
        kind = kind or needed
        controls = self._controls.of(rows, slots) if kind == "full" else None
        drawn = _draw(self.runner.everywhere(logits), settings, number, kind=kind, controls=controls)
        self._keep(slots, drawn.token, controls)
        return drawn

    def _place(self, works: list[Work]) -> list[Work | None]:
        """Lays works out as the rows of a step."""
        by_name = {work.sequence.cached: work for work in works}
        return [None if name is None else by_name[name] for name in self.runner.place(list(by_name))]

    def _decode(self, works: list[Work]) -> Ran:
        rows = self._place(works)
        settings, number, slots, kind = self._settings(rows)
        controls = self._controls.of(rows, slots) if kind == "full" else None
        length = np.array([work.begin if work else 0 for work in rows], np.int32)
        live = np.array([work is not None for work in rows])
        packed = pack_rows(slots, length, number, live, settings)
        done, out = self.runner.decode_slots(self._last, packed, self._table(rows, slots), kind=kind, controls=controls)
        done.packed.copy_to_host_async()
        self._last = done.last
        if controls is not None:
            self._controls.count(slots, done.drawn.token)
        return Ran(rows, done.drawn, _pack(rows, done.drawn), found=_found(out), packed=done.packed)

    def _verify(self, works: list[Work]) -> Ran:
        rows = self._place(works)
        settings, _, slots, kind = self._settings(rows)
        controls = self._controls.of(rows, slots) if kind == "full" else None
        drafted = Drafted.of(rows, self.limits.drafts)
        verified, out = self.runner.verify(drafted, self._table(rows, slots), settings, kind=kind, controls=controls)
        self._keep(slots, verified.last, controls)
        drafts = None
        if self._predicts:
            first = [0 if work is None else work.begin for work in rows]
            drafts = self._draft(rows, out.hidden, self._recent_of(slots), verified.drawn.token, verified.taken, first)
        kept = _pack(rows, verified.drawn)
        return Ran(rows, verified.drawn, kept, taken=verified.taken, found=_found(out), drafts=drafts)

    def _keep(self, slots: np.ndarray, tokens: jax.Array, controls: Controls | None) -> None:
        """Keeps the last tokens for the next step; rows that count theirs have drawn one, since they take no drafts."""
        self._last = _put(self._last, slots, tokens)
        if controls is not None:
            self._controls.count(slots, tokens)

    def _settings(self, rows: list[Work | None]) -> tuple[Settings, np.ndarray, np.ndarray, Kind]:
        """Returns the settings of a batch, which token each row draws, its slot, and what the rows need of a draw."""
        vocab = self.runner.config.vocab_size
        values: list[tuple] = [(0.0, vocab, 1.0, 0, True, 0, self.limits.rows)] * len(rows)
        for row, work in enumerate(rows):
            if work is not None:
                own: Any = work.sequence
                values[row] = (*own.settings(vocab), work.number, own.slot)
        temperature, top_k, top_p, seed, plain, number, slot = zip(*values, strict=True)
        settings = Settings(
            np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32),
            np.array(seed, np.uint32),
        )  # fmt: skip
        # Every kind is a program of its own, whose other parts may be compiled to other bits.
        kind: Kind = "full"
        if not self.runner.batch_invariant and all(plain):
            kind = kind_of(np.array(temperature), np.array(top_k), np.array(top_p), vocab)
        return settings, np.array(number, np.int32), np.array(slot, np.int32), kind

    def _table(self, rows: list[Work | None], slots: np.ndarray) -> np.ndarray:
        """Makes the table of a decode step; a slot's row is made anew when its sequence has got another page.

        Of as many pages the last may be another: what wrong drafts had is given back, and somebody else may take it.
        """
        cache = self.runner.cache
        for work in rows:
            if work is not None:
                slot, name = work.sequence.slot, work.sequence.cached
                state = name, *cache.last_page(name)
                if self._tabled.get(slot) != state:
                    self._tabled[slot] = state
                    self._tables[slot] = cache.packed_table([[name]], self.runner.table_width)[0]
        return self._tables[slots]


def _sizes(most) -> list[int]:
    """Lists the powers of two up to the one that `most` is rounded up to."""
    return [1 << power for power in range(bucket(most).bit_length())]


def _found(out) -> dict[str, jax.Array]:
    """Returns what a step tells of the tokens that it took in."""
    found = dict(selected=out.selected, routed=out.routed)
    return {name: x for name, x in found.items() if x is not None}


def _pack(rows, drawn):
    """Packs the tokens that could be drawn, if a row wants them."""
    traces = (work.sequence.trace for work in rows if work is not None)
    return _packbits(drawn.kept) if any(trace is not None and trace.keeps for trace in traces) else None


_draw = jax.jit(draw, static_argnames="kind")
_packbits = jax.jit(partial(jnp.packbits, axis=1))


@partial(jax.jit, donate_argnums=0)
def _put(kept, slots, new):
    return jax.tree.map(lambda x, y: x.at[slots].set(y), kept, new)
