"""Generation: prompts in chunks through the model (prefill), then a token a row and step (decode).

`generate` gives the new tokens, `complete` all that is known of them, `stream` the tokens as they come. All three run
the same steps over a `PagedCache`; the host reads the tokens of one step while the device computes the next.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, Int32

from dsa_jax.inference.pages import PagedCache
from dsa_jax.inference.pieces import last_tokens
from dsa_jax.inference.programs import bucket
from dsa_jax.inference.sampling import Kind, Settings, check_sampling, kind_of, row_seeds
from dsa_jax.inference.speculative import Ahead, Drafted, check_most, split_recent
from dsa_jax.inference.step import PREFILL_CHUNK, Runner
from dsa_jax.inference.text import Decoder
from dsa_jax.layers import Attention
from dsa_jax.model import Transformer
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import check_model, shards

logger = logging.getLogger(__name__)

Prompts = Int[Array, "B T"] | Int[np.ndarray, "B T"] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Completions:
    """Holds what was generated behind each of B prompts, on the host.

    Attributes:
      tokens: int32 [B, max_new_tokens]; a row that has ended repeats its last token.
      lengths: int32 [B], how many were generated, a stop token included.
      finished: why each row ended: "stop" for a stop token or string, "length" for `max_new_tokens`, "nan" where its
        logits were NaN, whose token does not count; a warning names the row.
      log_probs: float32 [B, max_new_tokens], of each token under the distribution that it was drawn from, temperature
        and truncation included; where the temperature is 0, under the model's own. 0 behind a row's end.
      selected: if asked for, for each row int32 [layers, n, K]: the keys that each of its tokens selected, as positions
        in the row; of all n = prompt + lengths - 1 tokens that went through the model.
      routed: if asked for, for each row int32 [moe_layers, n, k]: the experts of the same tokens.
      kept: if asked for, for each row a list of one int32 array a token: the ids that could be drawn.
    """

    tokens: Int32[np.ndarray, "B new"]
    lengths: Int32[np.ndarray, " B"]
    finished: list[str]
    log_probs: Float32[np.ndarray, "B new"]
    selected: list[np.ndarray] | None = None
    routed: list[np.ndarray] | None = None
    kept: list[list[np.ndarray]] | None = None


class Step(NamedTuple):
    """Holds one token of each of B rows, as `stream` yields them."""

    tokens: np.ndarray  # int32 [B]
    log_probs: np.ndarray  # float32 [B]
    live: np.ndarray  # bool [B]: whether the token belongs to the row, which had not ended before it
    details: dict[str, np.ndarray]  # "selected" [layers, B, K], "routed" [moe_layers, B, k], "kept" [B, vocab / 8]


def generate(model: Transformer, tokens: Prompts, *, max_new_tokens: int, **options: Any) -> Int[Array, "B new"]:
    """Continues each prompt by `max_new_tokens` tokens.

    Args:
      model: the transformer.
      tokens: prompts, a list of lists or an array padded on the right.
      max_new_tokens: how many tokens to add to each.
      options: those of `complete`, of which `key`, `temperature`, `stop_token` are used most.

    Returns:
      the new tokens, without the prompts; a row that has ended repeats its last one.

    Examples:
      >>> generate(model, jnp.array([[1, 2, 3]]), max_new_tokens=4, temperature=0.0).shape
      (1, 4)

    Raises:
      ValueError: as `complete`.
    """
    return jnp.asarray(complete(model, tokens, max_new_tokens=max_new_tokens, **options).tokens)


def complete(
    model: Transformer,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    return_selected: bool = False,
    return_routed: bool = False,
    return_kept: bool = False,
    **options: Any,
) -> Completions:
    """Continues each prompt, and tells how likely each token was and what led to it.

    Args:
      model, tokens, max_new_tokens: as in `generate`.
      return_selected: whether each token's selections are wanted, as a training step takes them (`selected`).
      return_routed: whether each token's experts are wanted (`routed`).
      return_kept: whether the tokens that could be drawn are wanted.
      options: those of `stream`.

    Examples:
      >>> completions = complete(model, [[1, 2, 3], [4]], max_new_tokens=2, temperature=0.0)
      >>> completions.lengths.tolist(), completions.finished
      ([2, 2], ['length', 'length'])

    Raises:
      ValueError: as `stream`.
    """
    wanted = dict(return_selected=return_selected, return_routed=return_routed, return_kept=return_kept)
    stream = _Stream(model, tokens, max_new_tokens=max_new_tokens, **wanted, **options)
    steps = list(stream)
    rows = range(stream.rows)
    lengths = np.sum([step.live for step in steps], axis=0, dtype=np.int32)
    fill = [*steps, *[steps[-1]] * (max_new_tokens - len(steps))]
    log_probs = np.stack([np.where(step.live, step.log_probs, 0) for step in steps], axis=1)
    return Completions(
        tokens=np.stack([step.tokens for step in fill], axis=1),
        lengths=lengths,
        finished=["nan" if stream.failed[row] else "stop" if stream.stopped[row] else "length" for row in rows],
        log_probs=np.pad(log_probs, ((0, 0), (0, max_new_tokens - len(steps)))),
        selected=_of_rows(stream.prefilled.selected, steps, "selected", lengths) if return_selected else None,
        routed=_of_rows(stream.prefilled.routed, steps, "routed", lengths) if return_routed else None,
        kept=[_kept_ids(steps, row, lengths[row], model.config.vocab_size) for row in rows] if return_kept else None,
    )


def stream(model: Transformer, tokens: Prompts, *, max_new_tokens: int, **options: Any) -> Iterator[Step]:
    """Yields the next token of every row as soon as it is known, until all rows have ended.

    Args:
      model: the transformer; on a mesh its parameters should live where `parameter_shardings(copies=True)` says, as
        `load_hf(mesh=…, copies=True)` leaves them; others are moved there first.
      tokens: prompts, a list of lists or an array padded on the right.
      max_new_tokens: how many tokens to add to each, at most.
      options:
        lengths: the real length of each padded prompt; all of T if None.
        key: a random key, from which every row gets a seed.
        seed: in its place an integer (row i gets seed + i) or one for each row: a row with the same prompt, settings
          and seed draws the same whatever the other rows are.
        temperature, top_k, top_p: as in `sample`, or one for each row.
        stop_token: after this token, or any of these, a row ends.
        stop_strings: after text that holds one of these a row ends; needs `tokenizer`.
        tokenizer: what has a `decode`, for `stop_strings`.
        attention: "sparse" or "dense".
        prefill_chunk: tokens of prompts that go through the model at a time.
        dense_below: prompts up to this long attend in the multi-head form, the same attention as long as all keys are
          selected; `index_topk` if None.
        batch_invariant: makes logits the same bits whatever the other rows are and wherever chunks end.
        cache_format: "float32", "bfloat16" or "fp8"; the model's compute dtype if None.
        mesh: the devices that the model is on, one if None. Where pages are sharded, attention must be "sparse".
        drafts: how many tokens of a row the model's prediction layers draft for a step to verify, up to 3; 0 for a
          decode step a token. The tokens are the same, and rows wait for each other; `MTP` serves requests.

    Examples:
      >>> for step in stream(model, [[1, 2, 3]], max_new_tokens=2, temperature=0.0):
      ...     assert step.tokens.shape == (1,)

    Raises:
      ValueError: for ids outside the vocabulary, lengths outside [1, T], a total longer than the model's positions, or
        settings out of range; the message names the row.
    """
    return iter(_Stream(model, tokens, max_new_tokens=max_new_tokens, **options))


class _Stream:
    """Runs one batch: everything is checked and the cache made at once, the prompts run when the first step is due."""

    def __init__(
        self,
        model: Transformer,
        tokens: Prompts,
        *,
        max_new_tokens: int,
        lengths: Any = None,
        key: Array | None = None,
        seed: Any = None,
        temperature: Any = 1.0,
        top_k: Any = None,
        top_p: Any = 1.0,
        stop_token: Any = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Decoder | None = None,
        attention: Attention = "sparse",
        prefill_chunk: int = PREFILL_CHUNK,
        dense_below: int | None = None,
        batch_invariant: bool = False,
        cache_format: str | None = None,
        mesh: Mesh | None = None,
        return_selected: bool = False,
        return_routed: bool = False,
        return_kept: bool = False,
        drafts: int = 0,
    ):
        config = model.config
        if drafts and (batch_invariant or return_selected or return_routed or return_kept):
            raise ValueError(f"drafts must be 0 with batch_invariant and with return_…, got {drafts}")
        self.drafts = check_most(drafts) if drafts else 0
        if mesh is not None:
            check_model(mesh, config)
        self.prompts = check_prompts(tokens, lengths, config.vocab_size)
        self.rows = len(self.prompts)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        for row, prompt in enumerate(self.prompts):
            if len(prompt) + max_new_tokens > config.max_position_embeddings:
                raise ValueError(
                    f"prompt and continuation must fit max_position_embeddings = {config.max_position_embeddings}, "
                    f"got {len(prompt)} + {max_new_tokens} = {len(prompt) + max_new_tokens} in row {row}"
                )
        self.max_new_tokens = max_new_tokens
        self.stops = _check_stops(stop_token, config.vocab_size)
        self.strings, self.tokenizer = _check_strings(stop_strings, tokenizer)
        chosen = check_sampling(temperature, top_k, top_p, self.rows, config.vocab_size)
        if np.any(chosen[0] > 0) and key is None and seed is None:
            raise ValueError("sampling needs a random key: pass key=jax.random.key(…) or seed=…, or temperature=0")
        # Each kind is a program of its own, which may compute other bits of the same log-probabilities.
        self.kind: Kind = "truncated" if batch_invariant else kind_of(*chosen, config.vocab_size)
        self.settings = Settings(*chosen, row_seeds(key, seed, self.rows))
        self.return_kept = return_kept
        self.stopped, self.failed = np.zeros(self.rows, bool), np.zeros(self.rows, bool)
        self.alive = np.ones(self.rows, bool)
        cache_format = cache_format or config.dtype
        row_shards, page_shards = shards(mesh, "rows"), shards(mesh, "pages")
        of_shard = [row * row_shards // self.rows for row in range(self.rows)]
        pages = [math.ceil((len(prompt) + max_new_tokens) / PAGE / page_shards) for prompt in self.prompts]
        most = max(sum(n for n, own in zip(pages, of_shard, strict=True) if own == each) for each in range(row_shards))
        cache = PagedCache(config, bucket(max(most, 1)), format=cache_format, mesh=mesh, predicting=drafts > 0)
        self.runner = Runner(
            model,
            cache,
            attention=attention,
            prefill_chunk=prefill_chunk,
            dense_below=dense_below,
            batch_invariant=batch_invariant,
            return_selected=return_selected,
            return_routed=return_routed,
        )
        self.sequences = [cache.new(shard) for shard in of_shard]
        self.placed = self.runner.place(self.sequences)  # refuses too many rows before any work

    def __iter__(self) -> Iterator[Step]:
        self.prefilled = self.runner.prefill(self.sequences, self.prompts)
        for sequence in self.sequences:
            self.runner.cache.extend(sequence, self.max_new_tokens - 1)  # room for every token that will be taken in
        texts: list[list[int]] = [[] for _ in range(self.rows)]
        draws = self._draws_ahead() if self.drafts else self._draws()
        for number, (tokens, log_probs, details) in enumerate(draws):
            live = self._without_nan(self.alive, log_probs, number)
            ended = np.isin(tokens, self.stops)
            for row in np.flatnonzero(live):
                texts[row].append(int(tokens[row]))
                ended[row] |= bool(self.strings) and self._holds_string(texts[row])
            self.stopped |= live & ended
            self.alive = live & ~ended
            yield self._repeat(Step(tokens, log_probs, live, details))
            if not np.any(self.alive):
                return

    def _draws(self) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """Yields the tokens of all rows, their log-probabilities and details, a decode step at a time."""
        runner, table, settings, live, length, at = self._placed()
        stops = jnp.asarray(np.pad(self.stops, (0, bucket(len(self.stops)) - len(self.stops)), constant_values=-1))
        carry, drawn = runner.first(self.prefilled.rows, length, settings, stops, live, kind=self.kind)
        details: dict[str, Array | None] = {}
        for number in range(self.max_new_tokens):
            current, current_details = (carry, drawn), details
            if number + 1 < self.max_new_tokens:  # the device goes on while the host looks at what it has drawn
                carry, drawn, out = runner.decode(carry, table, settings, stops, kind=self.kind)
                details = dict(selected=out.selected, routed=out.routed)
            tokens, log_probs = np.asarray(current[0].token)[at], np.asarray(current[1].log_prob)[at]
            yield tokens, log_probs, self._host(current_details, current[1], at)

    def _draws_ahead(self) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """Yields the same, of steps that verify what the prediction layers have drafted: rows wait for the slowest."""
        runner, table, settings, live, length, at = self._placed()
        stops, zero, room = np.full(1, -1, np.int32), np.zeros_like(length), runner.room(self.placed)
        options: dict[str, Any] = dict(kind=self.kind, most=self.drafts)
        _, drawn = runner.first(self.prefilled.rows, length, settings, stops, live, kind=self.kind)
        lasts = np.zeros((len(zero), runner.depths - 1), np.int32)
        lasts[at] = last_tokens(self.prompts, runner.depths - 1)
        hidden: Any = self.prefilled.hidden
        ends, recent = split_recent(hidden, lasts)
        ahead = Ahead(drawn.token, zero, length - 1, zero, room)
        drafts, recent = runner.draft(ends, recent, ahead, table, settings, **options)
        found = [[each] for each in zip(*(np.asarray(x)[at] for x in (drawn.token, drawn.log_prob)), strict=True)]
        for number in range(self.max_new_tokens):
            while any(len(found[row]) <= number for row in np.flatnonzero(self.alive)):
                done, last, goes_on = zero + 1, zero.copy(), np.zeros_like(live)
                done[at], last[at] = [len(own) for own in found], [own[-1][0] for own in found]
                goes_on[at] = self.alive & (done[at] < self.max_new_tokens)
                count = np.where(goes_on, np.minimum(1 + self.drafts, self.max_new_tokens - done), 0)
                tokens = np.concatenate([last[:, None], np.asarray(drafts)], axis=1)
                drafted = Drafted(tokens, count.astype(np.int32), length + done - 1, done)
                verified, out = runner.verify(drafted, table, settings, kind=self.kind)
                hidden, drawn = out.hidden, verified.drawn
                ahead = Ahead(drawn.token, verified.taken, drafted.length, done, np.where(goes_on, room, 0))
                drafts, recent = runner.draft(hidden, recent, ahead, table, settings, **options)
                left = drawn.token, drawn.log_prob, verified.taken
                tokens, log_probs, taken = (np.asarray(x).reshape(len(zero), -1)[at] for x in left)
                for row in np.flatnonzero(goes_on[at]):
                    count = taken[row, 0] + 1
                    found[row] += zip(tokens[row, :count], log_probs[row, :count], strict=True)
            tokens, log_probs = zip(*(own[min(number, len(own) - 1)] for own in found), strict=True)
            yield np.array(tokens, np.int32), np.array(log_probs, np.float32), {}

    def _placed(self):
        """Returns the runner, inputs of a step, and the row of each prompt in it."""
        order = [self.sequences.index(sequence) if sequence is not None else None for sequence in self.placed]
        take = lambda x: jnp.stack([x[0] if row is None else x[row] for row in order])  # noqa: E731
        live = np.array([row is not None for row in order])
        length = np.array([0 if row is None else len(self.prompts[row]) for row in order], np.int32)
        table, settings = jnp.asarray(self.runner.table(self.placed)), jax.tree.map(take, self.settings)
        return self.runner, table, settings, live, length, np.array(self.prefilled.places)

    def _without_nan(self, live, log_probs, number):
        """Ends the rows whose logits are NaN, and says which they are."""
        bad = live & np.isnan(log_probs)
        for row in np.flatnonzero(bad):
            logger.warning("row %d has ended: its logits are NaN at token %d; the other rows go on", row, number)
        self.failed |= bad
        return live & ~bad

    def _repeat(self, step: Step) -> Step:
        """Has rows that a string has ended repeat their last token, as rows do that a token has ended."""
        if not hasattr(self, "_last"):
            self._last = step.tokens
        self._last = np.where(step.live, step.tokens, self._last)
        return step._replace(tokens=self._last)

    def _host(self, details, drawn, at) -> dict[str, np.ndarray]:
        """Brings what was asked for to the host, in the order of the prompts."""
        found = {name: np.asarray(x)[:, at, 0] for name, x in details.items() if x is not None}
        if self.return_kept:
            found["kept"] = np.asarray(jnp.packbits(drawn.kept, axis=1))[at]
        return found

    def _holds_string(self, ids) -> bool:
        """Tells whether the text ends in a stop string, by its last tokens: several may make one character."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(ids[-(4 * max(map(len, self.strings)) + 16) :])
        return any(string in text for string in self.strings)


def check_prompts(tokens: Any, lengths: Any, vocab: int) -> list[np.ndarray]:
    """Returns prompts as a list of int32 arrays, without padding.

    Raises:
      ValueError: for ids outside the vocabulary, an empty prompt, or lengths that do not fit; the row is named.
    """
    ragged = not hasattr(tokens, "ndim")
    if ragged and lengths is None and isinstance(tokens, Sequence) and not isinstance(tokens, str):
        rows = [np.asarray(row) for row in tokens]
    else:
        array = np.asarray(tokens)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
            raise ValueError(f"tokens must be integers [B, T] with at least one token, got {array.dtype} {array.shape}")
        rows = list(array[:, : array.shape[1]])
        if lengths is not None:
            real = np.asarray(lengths)
            whole = np.issubdtype(real.dtype, np.integer) and real.shape == (len(rows),)
            if not whole or real.min() < 1 or real.max() > array.shape[1]:
                raise ValueError(f"lengths must be [{len(rows)}] integers from 1 to {array.shape[1]}, got {real}")
            rows = [row[:length] for row, length in zip(rows, real, strict=True)]
    if not rows:
        raise ValueError("tokens must hold at least one prompt, got none")
    for number, row in enumerate(rows):
        if row.ndim == 1 and not row.size:
            raise ValueError(f"every prompt must have at least one token, got none in row {number}")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"every prompt must be a list of integers, got {row.dtype} {row.shape} in row {number}")
        if row.min() < 0 or row.max() >= vocab:
            raise ValueError(f"tokens must lie in [0, {vocab}), got {row.min()} … {row.max()} in row {number}")
    return [row.astype(np.int32) for row in rows]


def _check_stops(stop_token, vocab) -> np.ndarray:
    stops = [] if stop_token is None else list(np.atleast_1d(stop_token))
    for stop in stops:
        if not isinstance(stop, int | np.integer) or not 0 <= stop < vocab:
            raise ValueError(f"stop_token must be ids in [0, {vocab}), got {stop!r}")
    return np.asarray(stops, np.int32)


def _check_strings(strings, tokenizer) -> tuple[list[str], Decoder | None]:
    strings = [strings] if isinstance(strings, str) else list(strings)
    if any(not isinstance(string, str) or not string for string in strings):
        raise ValueError(f"stop_strings must be texts that are not empty, got {strings}")
    if strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, whose decode gives the text, got None")
    return strings, tokenizer


def _of_rows(prompts, steps, name, lengths):
    """Joins what a prompt's tokens and those generated behind it had; the last one never went through the model."""
    joined = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        parts = [step.details[name][:, row, None] for step in steps[1:length]]
        parts = [np.pad(x, ((0, 0), (0, 0), (0, prompt.shape[2] - x.shape[2])), constant_values=-1) for x in parts]
        joined.append(np.concatenate([prompt, *parts], axis=1))
    return joined


def _kept_ids(steps, row, length, vocab) -> list[np.ndarray]:
    """Lists the ids that could be drawn at each step of a row."""
    masks = [np.unpackbits(step.details["kept"][row])[:vocab] for step in steps[:length]]
    return [np.flatnonzero(mask).astype(np.int32) for mask in masks]
