"""The engine: many requests in one running batch, which sequences join and leave at every step.

A step is schedule → run → postprocess: the scheduler plans it, the device is given its work, and while that runs the
host reads and judges the tokens of the step before. What a step under way draws for a sequence that has ended meanwhile
is dropped.
"""

import asyncio
import collections
import dataclasses
import itertools
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.inference.generate import check_prompts
from dsa_jax.inference.pages import OutOfPages
from dsa_jax.inference.params import Finished, Request, SamplingParams, Token
from dsa_jax.inference.prefix import Chain, PrefixCache
from dsa_jax.inference.programs import Carry, bucket
from dsa_jax.inference.sampling import Draw, Kind, Settings, draw, kind_of
from dsa_jax.inference.scheduler import Limits, Plan, Scheduler, Sequence, Work, pages_needed
from dsa_jax.inference.step import INVARIANT_ROWS, Runner
from dsa_jax.inference.text import TextStream
from dsa_jax.paged import PAGE

ROWS = 64  # sequences that run at a time
CHECK_SECONDS = 10  # between two checks when idle: one of 100,000 kept pages takes 0.2 s
NO_STOPS = np.full(1, -1, np.int32)  # the host judges tokens, a step later: each request has stops of its own


@dataclasses.dataclass(eq=False, kw_only=True)
class _Continuation(Sequence):
    """Holds one continuation of a request."""

    request: int
    index: int
    params: SamplingParams
    seed: int
    stops: frozenset[int]
    text: TextStream | None


class _Ran(NamedTuple):
    """Holds what a step draws: of each row its work, None for padding, and the tokens on the device."""

    rows: list[Work | None]
    drawn: Draw


class Engine:
    """Runs requests over one `Runner`, each as if it were alone.

    `add` and `cancel` may be called from any thread; they take effect at the next step.

    Args:
      runner: with a cache of its own, on one device, and `max_length`.
      tokenizer: turns texts into tokens and back; needed for prompts that are text, and for stop strings.
      end_tokens: end every continuation that does not ignore them.
      rows: how many sequences run at a time.
      budget: tokens of a step, decoded and of prompts; None for a chunk of prompts beside full rows.
      reuse_prefixes: whether pages of equal prefixes are computed once.

    Examples:
      >>> from dsa_jax import PagedCache
      >>> engine = Engine(Runner(model, PagedCache(model.config, 16, format="float32"), max_length=64))
      >>> request = engine.add(Request([1, 2, 3], SamplingParams(max_tokens=2)))
      >>> tokens = []
      >>> while engine.busy:
      ...     tokens += engine.step()
      >>> len(tokens), tokens[-1].finished
      (2, 'length')
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: Any = None,
        end_tokens: Iterable[int] = (),
        rows: int = ROWS,
        budget: int | None = None,
        reuse_prefixes: bool = True,
    ):
        if runner.max_length is None:
            raise ValueError("an engine's tables have room for the longest sequence: give the Runner max_length")
        if runner.batch_invariant and rows > INVARIANT_ROWS:
            raise ValueError(f"rows must be at most {INVARIANT_ROWS} with batch_invariant, got {rows}")
        chunk = runner.prefill_chunk
        limits = Limits(rows, chunk + rows if budget is None else budget, chunk, runner.batch_invariant)
        self.runner, self.cache, self.tokenizer = runner, runner.cache, tokenizer
        self.max_length, self.end_tokens = runner.max_length, frozenset(end_tokens)
        self.prefix = PrefixCache(self.cache, enabled=reuse_prefixes)
        self.scheduler = Scheduler(self.prefix, limits)
        self._continuations: dict[int, list[_Continuation]] = {}  # of each request, those that have not ended
        self._inbox: collections.deque[list[_Continuation] | int] = collections.deque()
        self._names, self._lock = itertools.count(), threading.Lock()
        self._pending: list[_Ran] = []
        self._last = jnp.zeros(rows + 1, jnp.int32)  # the last token of each slot; the last slot is padding's
        self._tables: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # of each slot: of what sequence, and its row
        self._check_due = 0.0
        self._queues: dict[int, asyncio.Queue[Token | Exception]] = {}
        self._serving: asyncio.Task | None = None

    # Requests.

    def add(self, request: Request) -> int:
        """Puts a request at the end of the queue; returns its number.

        Raises:
          ValueError: for ids outside the vocabulary, too long a request, or one that needs a tokenizer.
          OutOfPages: if the cache could not hold it even alone.
        """
        name, params = next(self._names), request.params
        prompt, most = self._check(name, request)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_tokens)
        group: list[_Continuation] = []
        for index in range(params.n):
            group.append(
                _Continuation(
                    prompt, most, Chain(request.salt), leader=group[0] if group else None, request=name, index=index,
                    params=params, seed=(seed + index) % 2**32, stops=stops,
                    text=TextStream(self.tokenizer, tuple(params.stop)) if self.tokenizer is not None else None,
                )
            )  # fmt: skip
        self._inbox.append(group)
        return name

    def cancel(self, request: int) -> None:
        """Ends a request; its pages are free at the next step. One that has ended already is let be."""
        self._inbox.append(request)

    @property
    def busy(self) -> bool:
        """Tells whether there is anything left to do."""
        return bool(self._inbox or self._continuations or self._pending)

    def _check(self, name, request) -> tuple[np.ndarray, int]:
        """Returns the prompt's tokens, and how many may follow."""
        ids, params, tokenizer = request.prompt, request.params, self.tokenizer
        if tokenizer is None and (isinstance(ids, str) or params.stop):
            raise ValueError(f"request {name} has text or stop strings, which need a tokenizer, got None")
        ids = tokenizer.encode(ids).ids if isinstance(ids, str) and tokenizer is not None else ids
        (ids,) = check_prompts([ids], None, self.runner.config.vocab_size)
        most = params.max_tokens
        if most is None:
            most = min(self.max_length, self.cache.pages * PAGE + 1) - len(ids)
        if most < 1 or len(ids) + most > self.max_length:
            raise ValueError(
                f"request {name} must fit max_length = {self.max_length} tokens, got {len(ids)} + {params.max_tokens}"
            )
        needed = pages_needed(len(ids), most)
        if needed > self.cache.pages:
            raise OutOfPages(f"request {name} needs {needed} pages, got {self.cache.pages} in the cache")
        return ids, most

    # The loop.

    def step(self) -> list[Token]:
        """Runs one step; returns the tokens of the step before, and the ends of requests."""
        with self._lock:
            tokens = self._take_in()
            plan = self.scheduler.plan()
            before, self._pending = self._pending, self._run(plan)
            for ran in before:
                tokens += self._read(ran)
            if not self.busy and time.monotonic() >= self._check_due:
                self.check()
                self._check_due = time.monotonic() + CHECK_SECONDS
            return tokens

    def check(self) -> None:
        """Raises AssertionError unless the books of the pages agree, and whoever has a page runs or is a prefix."""
        self.cache.check()
        self.prefix.check()
        assert len(self.cache.sequences) == len(self.prefix) + len(self.scheduler.running)

    def warm(self, kinds: Iterable[Kind] = ("greedy", "random", "truncated")) -> None:
        """Compiles every size of step that may come."""
        limits = self.scheduler.limits
        sizes = lambda most: [1 << power for power in range(bucket(most).bit_length())]  # noqa: E731
        self.runner.warm(rows=sizes(limits.rows), tokens=sizes(limits.chunk), kinds=tuple(kinds))

    def _take_in(self) -> list[Token]:
        """Takes in what was added and cancelled since the last step."""
        tokens = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, int):
                tokens += [self._end(each, "cancelled") for each in list(self._continuations.get(item, ()))]
            else:
                self._continuations[item[0].request] = item
                for each in item:
                    self.scheduler.add(each)
        return tokens

    # Run.

    def _run(self, plan: Plan) -> list[_Ran]:
        """Gives the device the work of a step, and waits for nothing."""
        ran = self._prefill(plan.prefill) if plan.prefill else []
        return [*ran, self._decode(plan.decode)] if plan.decode else ran

    def _prefill(self, works: list[Work]) -> list[_Ran]:
        sequences = [work.sequence.cached for work in works]
        chunks = [work.sequence.known[work.begin : work.begin + work.count] for work in works]
        logits = self.runner.prefill(sequences, chunks, extended=True).logits
        last = [row for row, work in enumerate(works) if work.number is not None]
        if not last:
            return []
        padding = (INVARIANT_ROWS if self.runner.batch_invariant else bucket(len(last))) - len(last)
        rows = [*(works[row] for row in last), *[None] * padding]
        settings, number, slots, kind = self._settings(rows)
        drawn = _draw(logits[np.array([*last, *[0] * padding])], settings, number, kind=kind)
        self._last = _put(self._last, slots, drawn.token)
        return [_Ran(rows, drawn)]

    def _decode(self, works: list[Work]) -> _Ran:
        by_name = {work.sequence.cached: work for work in works}
        rows = [None if name is None else by_name[name] for name in self.runner.place(list(by_name))]
        settings, number, slots, kind = self._settings(rows)
        length = np.array([work.begin if work else 0 for work in rows], np.int32)
        live = np.array([work is not None for work in rows])
        carry = Carry(_take(self._last, slots), length, number, live)
        _, drawn, _ = self.runner.decode(carry, self._table(rows), settings, NO_STOPS, kind=kind)
        self._last = _put(self._last, slots, drawn.token)
        return _Ran(rows, drawn)

    def _settings(self, rows: list[Work | None]) -> tuple[Settings, np.ndarray, np.ndarray, Kind]:
        """Returns the settings of a batch, which token each row draws, its slot, and what the rows need of a draw."""
        vocab = self.runner.config.vocab_size
        values: list[tuple] = [(0.0, vocab, 1.0, 0, 0, self.scheduler.limits.rows)] * len(rows)
        for row, work in enumerate(rows):
            if work is not None:
                own: Any = work.sequence
                params = own.params
                top_k = min(params.top_k, vocab) if params.top_k > 0 else vocab
                values[row] = params.temperature, top_k, params.top_p, own.seed, work.number, own.slot
        temperature, top_k, top_p, seed, number, slot = zip(*values, strict=True)
        settings = Settings(
            np.array(temperature, np.float32), np.array(top_k, np.int32), np.array(top_p, np.float32),
            np.array(seed, np.uint32),
        )  # fmt: skip
        # Every kind is a program of its own, whose other parts may be compiled to other bits.
        kind: Kind = "truncated"
        if not self.runner.batch_invariant:
            kind = kind_of(np.array(temperature), np.array(top_k), np.array(top_p), vocab)
        return settings, np.array(number, np.int32), np.array(slot, np.int32), kind

    def _table(self, rows: list[Work | None]) -> np.ndarray:
        """Makes the table of a decode step; a sequence's row is made anew when it has got another page."""
        found = []
        for work in rows:
            if work is None:
                found.append(None)
                continue
            slot, name = work.sequence.slot, work.sequence.cached
            state = name, self.cache.row_pages(name)
            if slot not in self._tables or self._tables[slot][0] != state:
                self._tables[slot] = state, self.runner.table([name])[0]
            found.append(self._tables[slot][1])
        padding = np.zeros_like(next(row for row in found if row is not None))
        return np.stack([padding if row is None else row for row in found])

    # Postprocess.

    def _read(self, ran: _Ran) -> list[Token]:
        """Waits for what a step has drawn, and judges it."""
        drawn = zip(
            ran.rows, np.asarray(ran.drawn.token).tolist(), np.asarray(ran.drawn.log_prob).tolist(), strict=True
        )
        found = [self._judge(work, *each) for work, *each in drawn if work is not None and not work.sequence.ended]
        return [token for token in found if token is not None]

    def _judge(self, work, token: int, log_prob: float) -> Token | None:
        """Adds a token to its sequence, which may end there."""
        own, number = work.sequence, work.number
        if math.isnan(log_prob):
            return self._end(
                own, "error", error=f"request {own.request} has ended: its logits are NaN at token {number}"
            )
        if number < len(own.tokens):  # generated anew after a preemption
            same = own.tokens[number] == token
            return None if same else self._end(own, "error", error=f"request {own.request} came out otherwise anew")
        own.tokens.append(token)
        if number == 0:
            self.scheduler.keep(own)
        may_stop = len(own.tokens) > own.params.min_tokens
        ends = may_stop and token in own.stops
        text = own.text.push(token, may_stop=may_stop) if own.text is not None and not ends else ""
        if ends or own.text is not None and own.text.stopped:
            return self._end(own, "stop", token, log_prob, text)
        if len(own.tokens) == own.max_tokens:
            return self._end(own, "length", token, log_prob, text)
        return Token(own.request, own.index, token, log_prob, text)

    def _end(self, own, finished: Finished, token=None, log_prob=None, text="", error=None) -> Token:
        """Ends a continuation: its pages are free at once, and the steps under way cannot harm who takes them next."""
        self.scheduler.end(own)
        group = self._continuations[own.request]
        group.remove(own)
        if not group:
            del self._continuations[own.request]
        text += own.text.finish() if own.text is not None else ""
        return Token(own.request, own.index, token, log_prob, text, finished, error)

    # Streams.

    async def stream(self, request: Request) -> AsyncIterator[Token]:
        """Yields the tokens of a request as they come; whoever leaves early cancels it.

        Raises:
          ValueError, OutOfPages: as `add`.
          RuntimeError: if a step has failed.
        """
        name, left = self.add(request), request.params.n
        queue = self._queues[name] = asyncio.Queue()
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        try:
            while left:
                token = await queue.get()
                if isinstance(token, Exception):
                    raise RuntimeError(f"request {name} has ended: a step has failed: {token}") from token
                left -= token.finished is not None
                yield token
        finally:
            del self._queues[name]
            if left:
                self.cancel(name)

    async def _serve(self) -> None:
        """Runs steps in a thread as long as there is work, and hands their tokens out."""
        try:
            while self.busy:
                for token in await asyncio.to_thread(self.step):
                    if token.request in self._queues:
                        self._queues[token.request].put_nowait(token)
        except Exception as error:
            for queue in self._queues.values():
                queue.put_nowait(error)


_draw = jax.jit(draw, static_argnames="kind")


@jax.jit
def _take(last, slots):
    return last[slots]


@partial(jax.jit, donate_argnums=0)
def _put(last, slots, tokens):
    return last.at[slots].set(tokens)
