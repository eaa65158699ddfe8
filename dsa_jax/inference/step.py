"""Runs a model over a paged cache: prompts in chunks, packed (prefill), then one to four tokens a row (decode).

Every step is one compiled program. Shapes are rounded up to powers of two, so few are compiled; `Runner.warm` compiles
them ahead of time. The pools are donated: a step updates them in place.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from dsa_jax.inference.pages import PagedCache
from dsa_jax.inference.pieces import (
    MIN_TOKENS,
    Cutter,
    Prefilled,
    Scored,
    collect,
    join_parts,
    pack_targets,
    places_of,
    tokens_behind,
)
from dsa_jax.inference.programs import (
    Carry,
    Options,
    Rows,
    StepOutput,
    TurnOutput,
    bucket,
    draw_first,
    padding_settings,
    programs,
)
from dsa_jax.inference.sampling import Controls, Draw, Kind, Settings
from dsa_jax.inference.slots import SlotStep, padding_rows
from dsa_jax.inference.speculative import (
    MAX_DRAFTS,
    Ahead,
    Drafted,
    Recent,
    Verified,
    drafting_layers,
    split_recent,
)
from dsa_jax.layers import Attention
from dsa_jax.model import Transformer
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import describe_mesh, place_copies, spec

MIN_PAGES = 1  # the least size that those of tables are rounded up to
PREFILL_CHUNK = 4096  # tokens of prompts at a time on a shard: bounds the memory of activations
MAX_DECODED = 1 + MAX_DRAFTS  # tokens of a row in a decode step, as many as the kernels take
# Prompts that end in one step: so many logits cost what one does, the reading of the vocabulary's weights.
MANY_ENDS = 64
INVARIANT_ROWS = 64  # rows of every decode step under `batch_invariant`, the one shape that it has


class Runner:
    """Runs one model over one paged cache.

    Args:
      model: the transformer; on a mesh its parameters live where `parameter_shardings(copies=True)` says, or are moved
        there from one device or from where they are trained.
      cache: of the model, and on the same mesh.
      attention: "sparse" or "dense".
      prefill_chunk: tokens of prompts at a time, on each shard of rows.
      dense_below: prompts that reach no more keys than this attend densely in the multi-head form, which is the same
        attention as long as all keys are selected, and cheaper; `index_topk` at most.
      batch_invariant: gives every step one shape and every chunk fixed borders, so that a row's logits have the same
        bits whatever is run beside it.
      max_length: the longest sequence that will come, in tokens; every table then has room for it, and one program
        serves all lengths. None has tables as wide as a batch needs, rounded up.
      return_selected: whether selections are wanted; they are then made for short prompts too.
      return_routed: whether each token's experts are wanted.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        *,
        attention: Attention = "sparse",
        prefill_chunk: int = PREFILL_CHUNK,
        dense_below: int | None = None,
        batch_invariant: bool = False,
        max_length: int | None = None,
        return_selected: bool = False,
        return_routed: bool = False,
    ):
        config = model.config
        if batch_invariant:
            max_length = config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"max_length must be from 1 to max_position_embeddings = {limit}, got {max_length}")
        # Last tokens of a prompt that stay together; under `batch_invariant`, where borders are fixed, nothing drafts.
        self.depths = drafting_layers(config) if cache.predicting and not batch_invariant else 1
        if prefill_chunk < self.depths:
            raise ValueError(f"prefill_chunk must be at least {self.depths}, got {prefill_chunk}")
        if dense_below is not None and not 0 <= dense_below <= config.index_topk:
            raise ValueError(f"dense_below must be from 0 to index_topk = {config.index_topk}, got {dense_below}")
        if return_routed and not config.num_moe_layers:
            raise ValueError("return_routed needs layers with experts, got a config that has none")
        if cache.config != config:
            raise ValueError("the cache must be of the model's config: make it with PagedCache(model.config, …)")
        if attention == "dense" and cache.page_shards > 1:
            raise ValueError(
                f"attention must be 'sparse' where pages are sharded, as on {describe_mesh(cache.mesh)}, got 'dense'"
            )
        self.cache, self.config = cache, config
        self.predicting = cache.predicting
        self.options = Options(attention, return_selected, return_routed, cache.mesh, cache.predicting)
        graph, state = nnx.split(model)
        self.parameters, self._tree = jax.tree.flatten(place_copies(state, cache.mesh))
        self.programs = programs(graph, self._tree, self.options)
        self.dense_programs = programs(graph, self._tree, self.options._replace(attention="dense"))
        self.prefill_chunk, self.batch_invariant = prefill_chunk, batch_invariant
        self.max_length = max_length
        self.table_pages = None if max_length is None else math.ceil(max_length / PAGE)
        self._cutter = Cutter(cache, prefill_chunk, self.depths, self.table_pages, batch_invariant)
        skips = attention == "sparse" and not return_selected and not batch_invariant and cache.page_shards == 1
        skips &= config.baseline != "nsa"  # which has no dense form
        self.dense_below = (config.index_topk if dense_below is None else dense_below) if skips else 0

    def replace_parameters(self, new: Transformer | nnx.State) -> None:
        """Runs other weights from the next step on; what the cache holds was computed by those before.

        Raises:
          ValueError: unless they have the shapes and dtypes of those before; the first that differs is named.
        """
        state = nnx.split(new)[1] if isinstance(new, Transformer) else new
        before = jax.tree.leaves_with_path(jax.tree.unflatten(self._tree, self.parameters))
        after = dict(jax.tree.leaves_with_path(state))
        for path, own in before:
            found = after.pop(path, None)
            if found is None or (found.shape, found.dtype) != (own.shape, own.dtype):
                got = "none" if found is None else f"{found.dtype} {found.shape}"
                raise ValueError(f"{jax.tree_util.keystr(path)} must be {own.dtype} {own.shape}, got {got}")
        if after:
            raise ValueError(f"the model has no {jax.tree_util.keystr(next(iter(after)))}, got one")
        self.parameters = jax.tree.leaves(place_copies(state, self.cache.mesh))

    # Prefill.

    def prefill(
        self,
        sequences: Sequence[int],
        prompts: Sequence[np.ndarray],
        *,
        extended: bool = False,
        targets: Sequence[np.ndarray | None] | None = None,
        following: Sequence[Any] | None = None,
    ) -> Prefilled:
        """Appends a prompt, int32 [T], to each sequence.

        Args:
          sequences: of the cache.
          prompts: one for each.
          extended: whether the sequences have room for them already.
          targets: for each prompt None, or int32 [T]: for each of its tokens, the one to be scored behind it.
          following: for each prompt what is known of the tokens behind it, as prediction layers take them in: `depths`
            of them at most. None is of no prompt.

        Raises:
          OutOfPages: if the cache has too few pages for all of them; no sequence is then any longer.
          ValueError: for an empty prompt, or one that would make its sequence too long.
        """
        targets = [None] * len(prompts) if targets is None else targets
        following = [()] * len(prompts) if following is None else following
        counts, placed = [len(prompt) for prompt in prompts], self.place(sequences)
        row_of = {sequence: row for row, sequence in enumerate(placed)}
        lengths = map(self.cache.length, sequences)
        before = list(map(int.__sub__, lengths, counts)) if extended else self._extend(sequences, counts)
        last, hidden = None, None
        selected: list[list[np.ndarray]] = [[] for _ in prompts]
        routed: list[list[np.ndarray]] = [[] for _ in prompts]
        scored: list[Scored] = []
        for step in self._cutter.steps(sequences, prompts, before):
            rows, table, ends, places = self._pack(step, sequences, prompts, before, following)
            wanted = [(piece, place) for piece, place in places if targets[piece.item] is not None]
            dense, own = self._is_short(step, before), pack_targets(wanted, targets, rows.tokens.shape)
            out = self._run_prefill(rows, table, own, dense=dense)
            scored += [Scored(piece, out.scores, *place) for piece, place in wanted]
            ended = places_of({row_of[sequences[item]]: place for item, place in ends.items()}, len(placed))
            last = collect(last, out.logits, *ended)
            if out.hidden is not None:
                hidden = collect(hidden, out.hidden, *ended)
            for kept, found in ((selected, out.selected), (routed, out.routed)):
                if found is not None:
                    found = np.asarray(found)
                    for piece, (row, column) in places:
                        kept[piece.item].append(found[:, row, column : column + piece.count])
        return Prefilled(
            last if last is not None else jnp.zeros((0, self.config.vocab_size)),
            [row_of[sequence] for sequence in sequences],
            [join_parts(parts, self.config.index_topk) for parts in selected] if self.options.return_selected else None,
            [np.concatenate(parts, 1) for parts in routed] if self.options.return_routed else None,
            scored,
            self.everywhere(hidden),
        )

    def _extend(self, sequences, counts):
        """Makes room for all, or for none; returns the lengths before."""
        before = [self.cache.length(sequence) for sequence in sequences]
        done = 0
        try:
            for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
                if count < 1:
                    raise ValueError(f"every prompt must have at least one token, got none in row {row}")
                self.cache.extend(sequence, count)
                done += 1
        except Exception:
            for sequence, length in zip(sequences[:done], before[:done], strict=True):
                self.cache.truncate(sequence, length)
            raise
        return before

    def _is_short(self, step, before):
        reach = max(before[piece.item] + piece.begin + piece.count for row in step for piece in row)
        return reach <= self.dense_below

    def _pack(self, step, sequences, prompts, before, following):
        """Makes the arrays of one step, and where in them each piece's last token and first column are."""
        width = self.prefill_chunk
        if not self.batch_invariant:
            width = min(width, bucket(max(sum(piece.count for piece in row) for row in step), MIN_TOKENS))
        shape = len(step), width
        names = "tokens", "positions", "start", "stop"
        arrays: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
        if self.predicting:
            arrays["following"] = np.full((len(step), self.depths, width), -1, np.int32)
        ends, places, pages, wanted = {}, [], [], [[] for _ in step]
        for number, row in enumerate(step):
            column = page = 0
            for piece in row:
                position = before[piece.item] + piece.begin
                if self.batch_invariant:
                    column = position % width
                here = number, slice(column, column + piece.count)
                own = np.arange(position, position + piece.count)
                arrays["tokens"][here] = prompts[piece.item][piece.begin : piece.begin + piece.count]
                if self.predicting:
                    behind = tokens_behind(prompts[piece.item], following[piece.item], piece, self.depths)
                    arrays["following"][number, :, here[1]] = behind
                arrays["positions"][here] = own
                arrays["start"][here] = page * PAGE
                arrays["stop"][here] = page * PAGE + own + 1
                places.append((piece, (number, column)))
                column += piece.count
                page += self.cache.row_pages(sequences[piece.item])
                if piece.begin + piece.count == len(prompts[piece.item]):
                    ends[piece.item] = number, len(wanted[number])
                    wanted[number].append(column - 1)
            pages.append(page)
        columns = np.zeros((len(step), self._ends(width, max(map(len, wanted)))), np.int32)
        for line, values in zip(columns, wanted, strict=True):
            line[: len(values)] = values
        table = self.cache.packed_table(
            [[sequences[piece.item] for piece in row] for row in step], self._table_width(max(pages))
        )
        return Rows(**arrays, wanted=columns), table, ends, places

    def _ends(self, tokens, count=1):
        """Rounds up how many prompts end in a step of so many tokens: to all that may, if sizes are compiled ahead."""
        ahead = self.max_length is not None and not self.batch_invariant
        return bucket(count, min(tokens, MANY_ENDS) if ahead else 1)

    def _table_width(self, pages):
        """Rounds the pages of a row up: to the longest sequence's, if that is known."""
        pages = max(pages, self.table_pages or 0)
        shards = self.cache.page_shards
        return shards * bucket(math.ceil(pages / shards), MIN_PAGES)

    def _run_prefill(self, rows: Rows, table, targets=None, *, dense: bool) -> StepOutput:
        chosen = self.dense_programs if dense else self.programs
        pools = self.cache.latents, self.cache.index_keys
        out, pools = chosen.prefill(pools, self.parameters, table, rows, targets)
        self.cache.update(*pools)
        return out

    # Decode.

    def extend(self, sequences: Sequence[int | None], tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B T vocab"]:
        """Appends the same number of tokens, one to four, to each row, and returns the logits behind each of them.

        This is what verifies drafts: what is not taken is forgotten by `PagedCache.truncate`. None is a padding row.
        On a mesh the rows stand as `place` lays them out.
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= MAX_DECODED or len(tokens) != len(sequences):
            raise ValueError(f"tokens must be [{len(sequences)}, 1 to {MAX_DECODED}], got {list(tokens.shape)}")
        self.cache.check_places(sequences)
        live = [sequence for sequence in sequences if sequence is not None]
        before = dict(zip(live, self._extend(live, [tokens.shape[1]] * len(live)), strict=True))
        length = np.array([-1 if each is None else before[each] for each in sequences], np.int32)[:, None]
        positions = np.maximum(length + np.arange(tokens.shape[1], dtype=np.int32), 0)
        stop = np.where(length < 0, 0, positions + 1)
        columns = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        rows = Rows(tokens, positions, np.zeros_like(positions), stop, columns)
        table = self.cache.table(sequences, self._table_width(max(map(self.cache.row_pages, live), default=1)))
        return self._run_prefill(rows, table, dense=False).logits

    def place(self, sequences: Sequence[int]) -> list[int | None]:
        """Lays sequences out as the rows of a decode step: those of a shard together, filled up with padding."""
        by_shard: list[list[int | None]] = [[] for _ in range(self.cache.row_shards)]
        for sequence in sequences:
            by_shard[self.cache.rows_of(sequence)].append(sequence)
        most = max(map(len, by_shard))
        if self.batch_invariant and most > INVARIANT_ROWS:
            raise ValueError(f"batch_invariant takes at most {INVARIANT_ROWS} rows on a shard, got {most}")
        rows = INVARIANT_ROWS if self.batch_invariant else bucket(most)
        return [sequence for row in by_shard for sequence in (*row, *[None] * (rows - len(row)))]

    @property
    def table_width(self) -> int:
        """Returns the pages of a row of every table, where `max_length` is known."""
        return self._table_width(0)

    def table(self, rows: Sequence[int | None]) -> Int[np.ndarray, "B P"]:
        """Makes the table of a decode step, with every page that the rows have, written or not."""
        pages = max(self.cache.row_pages(row) for row in rows if row is not None)
        return self.cache.table(rows, self._table_width(pages))

    def first(self, logits, length, settings: Settings, stops, live, *, kind: Kind = "truncated") -> tuple[Carry, Draw]:
        """Draws the first token of each row from logits [B, vocab], those of padding among them."""
        return draw_first(self.cache.mesh, self.everywhere(logits), length, settings, stops, live, kind=kind)

    def everywhere[T](self, arrays: T) -> T:
        """Puts arrays on every device of the mesh, wherever they were, so that one program takes them."""
        mesh = self.cache.mesh
        return arrays if mesh is None else jax.device_put(arrays, NamedSharding(mesh, spec()))

    def decode(
        self,
        carry: Carry,
        table,
        settings: Settings,
        stops,
        *,
        kind: Kind = "truncated",
        controls: Controls | None = None,
    ) -> tuple[Carry, Draw, StepOutput]:
        """Takes in the last token of each row and draws the next. The host need not know what was drawn before.

        Every `kind`, which `sampling.kind_of` tells from settings, is a program of its own; "truncated" serves all that
        need no `controls`, "full" takes these as well.
        """
        pools = self.cache.latents, self.cache.index_keys
        carry, drawn, out, pools = self.programs.decode(
            pools, carry, self.parameters, table, settings, stops, kind, controls
        )
        self.cache.update(*pools)
        return carry, drawn, out

    def decode_slots(
        self, last: Array, packed: np.ndarray, table, *, kind: Kind = "truncated", controls: Controls | None = None
    ) -> tuple[SlotStep, StepOutput]:
        """Decodes as `decode` does for rows of slots, whose last tokens the device keeps; `last` is donated.

        Args:
          last: int32 [slots], the last token of each slot.
          packed: of `slots.pack_rows`.
          table, kind, controls: as `decode` takes them.
        """
        pools = self.cache.latents, self.cache.index_keys
        done, out, pools = self.programs.decode_slots(pools, last, self.parameters, packed, table, kind, controls)
        self.cache.update(*pools)
        return done, out

    def verify(
        self, drafted: Drafted, table, settings: Settings, *, kind: Kind = "truncated", controls: Controls | None = None
    ) -> tuple[Verified, StepOutput]:
        """Takes in the last token of each row and its drafts, and draws behind each; sequences have room for all.

        What was not taken is forgotten by `PagedCache.truncate`. On a mesh the rows stand as `place` lays them out.
        """
        pools = self.cache.latents, self.cache.index_keys
        verified, out, pools = self.programs.verify(pools, drafted, self.parameters, table, settings, kind, controls)
        self.cache.update(*pools)
        return verified, out

    def draft(
        self, hidden: Array, recent: Recent | None, ahead: Ahead, table, settings: Settings, *, kind: Kind, most: int
    ) -> tuple[Array, Recent | None]:
        """Drafts `most` tokens behind what was just drawn of each row, int32 [B, most], by the prediction layers.

        Args:
          hidden: [B, T, D], what a verification or a prefill left of the columns.
          recent: of the `depths` - 1 columns before, of `split_recent` or the last call's; None where that is 0.
          ahead: what was drawn there.
          table, settings: of the rows.
          kind: of the draw; "full" is taken for "truncated", without controls.
        """
        pools = self.cache.latents, self.cache.index_keys
        kind = "truncated" if kind == "full" else kind
        # Of a verification these lie there already.
        hidden, recent, tokens, taken = self.everywhere((hidden, recent, ahead.tokens, ahead.taken))
        ahead = dataclasses.replace(ahead, tokens=tokens, taken=taken)
        drafts, recent, pools = self.programs.draft(
            pools, hidden, recent, ahead, self.parameters, table, settings, kind, most
        )
        self.cache.update(*pools)
        return drafts, recent

    def room(self, rows: Sequence[int | None]) -> Int[np.ndarray, " B"]:
        """Counts the positions that the pages of each row have; 0 for padding."""
        return np.array([0 if row is None else PAGE * self.cache.row_pages(row) for row in rows], np.int32)

    def read_rows(self, rows: Rows, table) -> StepOutput:
        """Takes in the tokens of rows that each hold one sequence, which have room for them, with sparse attention."""
        return self._run_prefill(rows, table, dense=False)

    def turn(
        self, logits: Array, carry: Carry, table, settings: Settings, stops, limit, *, kind: Kind, most: int, kept: int
    ) -> TurnOutput:
        """Draws a turn of each row in one program: see `programs.TurnOutput`; sequences have room for all but its last.

        Args:
          logits: [B, vocab], behind what the cache holds of each row.
          carry, table, settings, stops, kind: as `decode` takes them; the carry's tokens are not read.
          limit: int32 [B], tokens of each row, from 1 to `most`.
          most: tokens of a row at most; the same number runs the same program.
          kept: ids of a kept set at most, 0 where these are not wanted.
        """
        pools = self.cache.latents, self.cache.index_keys
        out, pools = self.programs.turn(
            pools, logits, carry, self.parameters, table, settings, stops, limit, kind, most, kept
        )
        self.cache.update(*pools)
        return out

    def warm(
        self,
        *,
        rows: Sequence[int],
        tokens: Sequence[int] = (),
        drafts: int = 0,
        kinds: Sequence[Kind] = ("greedy", "random", "truncated"),
        controls: Callable[[int], Controls] | None = None,
        slots: int | None = None,
    ) -> None:
        """Compiles the steps that will be needed, by running them on padding; `max_length` must be known.

        Args:
          rows: numbers of rows of decode steps, on each shard.
          tokens: sizes of prefill steps, on each shard.
          drafts: how many a row of a verification has at most; 0 where none comes.
          kinds: of the draws; with `batch_invariant` all are of the one that serves all.
          controls: makes those of so many padding rows, for kind "full".
          slots: compiles decode steps of rows of so many slots, instead of those that hand on their carry.
        """
        kinds = kinds if not self.batch_invariant else ("truncated",) if controls is None else ("full",)
        if self.table_pages is None:
            raise ValueError("to compile ahead of time, give the Runner max_length: tables are as wide, got None")
        width = self._table_width(self.table_pages)
        of_shard = {INVARIANT_ROWS if self.batch_invariant else bucket(each) for each in rows}
        totals = [count * self.cache.row_shards for count in sorted(of_shard)]
        for total in totals:
            table = np.zeros((total, width), np.int32)
            settings = padding_settings(total, self.config.vocab_size)
            stops, length = np.full(1, -1, np.int32), np.zeros(total, np.int32)
            logits = jnp.zeros((total, self.config.vocab_size), jnp.float32)
            for kind in kinds:
                own = controls(total) if kind == "full" and controls is not None else None
                if slots is not None:
                    last = self.everywhere(jnp.zeros(slots, jnp.int32))
                    self.decode_slots(last, padding_rows(total, slots - 1, settings), table, kind=kind, controls=own)
                else:
                    carry, _ = self.first(logits, length, settings, stops, np.zeros(total, bool), kind=kind)
                    self.decode(carry, table, settings, stops, kind=kind)
                if drafts:
                    drafted = Drafted(np.zeros((total, 1 + drafts), np.int32), length, length, length)
                    self.verify(drafted, table, settings, kind=kind, controls=own)
                for count in (1, 1 + drafts) if drafts and self.predicting else ():
                    hidden = jnp.zeros((total, count, self.config.hidden_size), self.config.dtype)
                    ahead = Ahead(jnp.zeros(total * count, jnp.int32), length, length, length, length)
                    tail = jnp.zeros((total, self.depths, self.config.hidden_size), self.config.dtype)
                    _, recent = split_recent(self.everywhere(tail), np.zeros((total, self.depths - 1), np.int32))
                    self.draft(hidden, recent, ahead, table, settings, kind=kind, most=drafts)
        for count in tokens:
            size = self.prefill_chunk if self.batch_invariant else min(bucket(count, MIN_TOKENS), self.prefill_chunk)
            empty = np.zeros((self.cache.row_shards, size), np.int32)
            arrays: dict[str, Any] = dict(tokens=empty, positions=empty, start=empty, stop=empty)
            arrays["wanted"] = np.zeros((self.cache.row_shards, self._ends(size)), np.int32)
            if self.predicting:
                arrays["following"] = np.full((len(empty), self.depths, size), -1, np.int32)
            table = np.zeros((self.cache.row_shards, width), np.int32)
            for dense in {False, self.dense_below > 0}:
                out = self._run_prefill(Rows(**arrays), table, dense=dense)
            for placed in totals:
                for found in (out.logits, out.hidden) if self.predicting else (out.logits,):
                    collect(collect(None, found, *places_of({}, placed)), found, *places_of({}, placed))
