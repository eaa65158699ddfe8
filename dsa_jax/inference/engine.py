"""The engine: many requests in one running batch, which sequences join and leave at every step.

A step is schedule → run → postprocess: the scheduler plans it, the device is given its work, and while that runs the
host reads and judges the tokens of the step before. What a step under way draws for a sequence that has ended meanwhile
is dropped.
"""

import asyncio
import collections
import itertools
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dsa_jax.inference.batch import KINDS, Batch, Ran
from dsa_jax.inference.continuation import Continuation, PromptScores, Trace, check_biases
from dsa_jax.inference.generate import check_prompts
from dsa_jax.inference.pages import OutOfPages
from dsa_jax.inference.params import Finished, Request, Stats, Token
from dsa_jax.inference.prefix import Chain, PrefixCache
from dsa_jax.inference.sampling import Kind
from dsa_jax.inference.scheduler import Limits, Plan, Scheduler, Sequence, Work, pages_needed
from dsa_jax.inference.speculative import MTP, Drafter, check_drafter, propose
from dsa_jax.inference.step import INVARIANT_ROWS, Runner
from dsa_jax.inference.structured import Grammars
from dsa_jax.inference.text import TextStream, encode_text
from dsa_jax.model import Transformer
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import describe_mesh, shards

ROWS = 64  # sequences that run at a time
PAUSE_SECONDS = 0.05  # that a step waits for while the engine is paused
CHECK_SECONDS = 10  # between two checks when idle: one of 100,000 kept pages takes 0.2 s


class Engine:
    """Runs requests over one `Runner`, each as if it were alone.

    `add` and `cancel` may be called from any thread; they take effect at the next step.

    Args:
      runner: with a cache of its own and `max_length`; on one device, or on a mesh of one process that does not split
        sequences.
      tokenizer: turns texts into tokens and back; needed for prompts that are text, and for stop strings.
      end_tokens: end every continuation that does not ignore them.
      rows: how many sequences run at a time, on a mesh a multiple of its shards of rows.
      budget: tokens of a step, decoded and of prompts; None for a chunk of prompts on each shard beside full rows.
      reuse_prefixes: whether pages of equal prefixes are computed once.
      drafter: proposes tokens that a step then verifies; the tokens that come out are the same. A draft follows the
        tokens before it, so a step is then read before the next is dispatched, and the device waits for the host in
        between: to let half of the sequences run while the other half is read would read the weights twice as often.

    Examples:
      >>> from dsa_jax import PagedCache, SamplingParams
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
        drafter: Drafter | None = None,
    ):
        if runner.max_length is None:
            raise ValueError("an engine's tables have room for the longest sequence: give the Runner max_length")
        check_mesh(runner.options.mesh)
        drafts, row_shards = check_drafter(drafter), runner.cache.row_shards
        if runner.batch_invariant and rows > INVARIANT_ROWS * row_shards:
            raise ValueError(f"rows must be at most {INVARIANT_ROWS} a shard with batch_invariant, got {rows}")
        if runner.batch_invariant and drafter is not None:
            raise ValueError(
                "drafter must be None with batch_invariant: a token has other bits where it is verified than where it "
                f"is decoded, got {type(drafter).__name__}"
            )
        predicts = isinstance(drafter, MTP)
        if predicts and not runner.predicting:
            raise ValueError("drafter MTP needs a Runner over PagedCache(…, predicting=True), got one without")
        chunk = runner.prefill_chunk
        budget = chunk * row_shards + rows * (1 + drafts) if budget is None else budget
        limits = Limits(rows, budget, chunk, runner.batch_invariant, drafts, runner.depths)
        self.runner, self.cache, self.tokenizer = runner, runner.cache, tokenizer
        self.max_length, self.end_tokens = runner.max_length, frozenset(end_tokens)
        self.prefix = PrefixCache(self.cache, enabled=reuse_prefixes)
        self.scheduler = Scheduler(self.prefix, limits)
        self._continuations: dict[int, list[Continuation]] = {}  # of each request, those that have not ended
        self._inbox: collections.deque[list[Continuation] | int] = collections.deque()
        self._names, self._lock = itertools.count(), threading.Lock()
        self._pending: list[Ran] = []
        self._check_due = 0.0
        self._queues: dict[int, asyncio.Queue[Token | Exception]] = {}
        self._serving: asyncio.Task | None = None
        # A thread of its own: those that all share may be full of grammars.
        self._stepper = ThreadPoolExecutor(1, "dsa_jax engine")
        self._grammars: Grammars | None = None
        self._batch = Batch(runner, limits, predicts=predicts)
        self._resumed = threading.Event()
        self._resumed.set()
        self._due: list[Token] = []  # read between two steps
        self._prompt_tokens = self._generated_tokens = self._weights_version = 0
        self.drafter, self._proposed, self._accepted = drafter, 0, 0

    # Requests.

    def add(self, request: Request) -> int:
        """Puts a request at the end of the queue; returns its number.

        Text is encoded and grammars are compiled here, in the caller's thread: the engine's steps go on meanwhile.

        Raises:
          ValueError: for ids outside the vocabulary, too long a request, one that needs a tokenizer, or a grammar that
            is wrong, too large or too slow.
          OutOfPages: if the cache could not hold it even alone.
        """
        group = self._prepare(request)
        self._inbox.append(group)
        return group[0].request

    def _prepare(self, request: Request) -> list[Continuation]:
        """Makes the continuations of a request, or refuses it."""
        name, params = next(self._names), request.params
        prompt, most = self._check(name, request)
        seed = secrets.randbits(32) if params.seed is None else params.seed
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_tokens)
        check_biases(params, stops, self.runner.config.vocab_size)
        constraint = self._constrain(params.structured_outputs)
        traced = params.return_selected or params.return_routed or params.return_kept
        salt = f"{self._weights_version} {request.salt}"
        group: list[Continuation] = []
        for index in range(params.n):
            scores = None
            if params.prompt_logprobs is not None and not index:
                scores = PromptScores(prompt, params.prompt_logprobs)
            group.append(
                Continuation(
                    prompt, most, Chain(salt), leader=group[0] if group else None, request=name, index=index,
                    params=params, seed=(seed + index) % 2**32, stops=stops, scores=scores,
                    text=TextStream(self.tokenizer, tuple(params.stop)) if self.tokenizer is not None else None,
                    constraint=None if constraint is None else constraint.fork(), waits=constraint is not None,
                    trace=Trace(params) if traced else None,
                    reuses=scores is None and not params.return_selected and not params.return_routed,
                    # Scoring is a program of its own, whose keys may differ in their last bits.
                    keeps=scores is None or not self.runner.batch_invariant,
                )
            )  # fmt: skip
        return group

    def cancel(self, request: int) -> None:
        """Ends a request; its pages are free at the next step. One that has ended already is let be."""
        self._inbox.append(request)

    @property
    def busy(self) -> bool:
        """Tells whether there is anything left to do."""
        return bool(self._inbox or self._continuations or self._pending or self._due)

    def _check(self, name, request) -> tuple[np.ndarray, int]:
        """Returns the prompt's tokens, and how many may follow."""
        ids, params = request.prompt, request.params
        tokenizer: Any = self.tokenizer
        if tokenizer is None and (isinstance(ids, str) or params.stop):
            raise ValueError(f"request {name} has text or stop strings, which need a tokenizer, got None")
        ids = encode_text(tokenizer, ids, add_special_tokens=True) if isinstance(ids, str) else ids
        (ids,) = check_prompts([ids], None, self.runner.config.vocab_size)
        options = self.runner.options
        for wanted in ("return_selected", "return_routed"):
            if getattr(params, wanted) and not getattr(options, wanted):
                raise ValueError(f"request {name} wants {wanted}: the engine's Runner must be made with it, got False")
        most = params.max_tokens
        if most is None:
            most = min(self.max_length, self.cache.pages * PAGE + 1) - len(ids)
        if params.max_tokens is None and most < 1 or len(ids) + most > self.max_length:
            raise ValueError(
                f"request {name} must fit max_length = {self.max_length} tokens, got {len(ids)} + {params.max_tokens}"
            )
        needed = pages_needed(len(ids), most)
        if needed > self.cache.pages:
            raise OutOfPages(f"request {name} needs {needed} pages, got {self.cache.pages} in the cache")
        return ids, most

    def _constrain(self, wanted):
        """Returns a constraint at its beginning, or None."""
        if wanted is None:
            return None
        if not isinstance(self.tokenizer, Tokenizer):
            raise ValueError(f"structured_outputs need a tokenizers.Tokenizer, got {type(self.tokenizer).__name__}")
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.runner.config.vocab_size, self.end_tokens)
        return self._grammars.begin(wanted)

    # From outside.

    def pause(self) -> None:
        """Lets no further step begin; what was begun is read. Requests wait, and may be cancelled."""
        with self._lock:
            self._resumed.clear()

    def resume(self) -> None:
        """Goes on."""
        self._resumed.set()

    def update_weights(self, new: Transformer | nnx.State) -> None:
        """Exchanges the model's weights; the prefixes that are known are forgotten.

        Sequences that run keep their tokens, whose keys are computed anew.

        Raises:
          ValueError: for weights of other shapes or dtypes; under `batch_invariant` while requests run, since these
            would be generated anew.
        """
        with self._lock:
            begun = sum(each.runs or len(each.tokens) > 0 for group in self._continuations.values() for each in group)
            if self.runner.batch_invariant and begun:
                raise ValueError(f"update_weights under batch_invariant needs that nothing runs, got {begun} sequences")
            self.runner.replace_parameters(new)
            self._due += self._read_pending()
            self.scheduler.preempt_all()
            self.prefix.clear()
            self._weights_version += 1

    def stats(self) -> Stats:
        """Returns the counts of this moment; from any thread, it waits for no step."""
        prefix, scheduler = self.prefix, self.scheduler
        waiting = sum(len(group) for group in self._inbox.copy() if not isinstance(group, int))
        return Stats(
            queued=waiting + len(scheduler.waiting),
            running=len(scheduler.running),
            pages=self.cache.total_pages,
            pages_used=self.cache.total_pages - self.cache.free_pages,
            pages_kept=len(prefix),
            prefix_hits=prefix.hits,
            prefix_asked=prefix.asked,
            prefix_evicted=prefix.evicted,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            drafts_proposed=self._proposed,
            drafts_accepted=self._accepted,
            weights_version=self._weights_version,
        )

    # The loop.

    def step(self) -> list[Token]:
        """Runs one step; returns the tokens of the step before, and the ends of requests.

        While the engine is paused it waits for a moment, and runs nothing.
        """
        if not self._pending:
            self._resumed.wait(PAUSE_SECONDS)
        with self._lock:
            tokens = self._take_in()
            if self.drafter is not None:
                tokens += self._read_pending()
            plan = self.scheduler.plan(self._propose()) if self._resumed.is_set() else Plan()
            ran = self._batch.run(plan)
            tokens += self._read_pending()
            self._pending = ran
            if not self.busy and time.monotonic() >= self._check_due:
                self.check()
                self._check_due = time.monotonic() + CHECK_SECONDS
            return tokens

    def check(self) -> None:
        """Raises AssertionError unless the books of the pages agree, and whoever has a page runs or is a prefix."""
        self.cache.check()
        self.prefix.check()
        assert len(self.cache.sequences) == len(self.prefix) + len(self.scheduler.running)

    def warm(self, kinds: Iterable[Kind] = KINDS) -> None:
        """Compiles every size of step that may come, but for those that score prompts."""
        self._batch.warm(tuple(kinds))

    def _take_in(self) -> list[Token]:
        """Takes in what was added and cancelled since the last step."""
        tokens, self._due = self._due, []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, int):
                tokens += [self._end(each, "cancelled") for each in list(self._continuations.get(item, ()))]
            else:
                self._continuations[item[0].request] = item
                self._prompt_tokens += len(item[0].prompt)
                for each in item:
                    self.scheduler.add(each)
        return tokens

    def _propose(self) -> dict[Sequence, list[int]]:
        """Asks the drafter how the sequences go on that decode."""
        if self.drafter is None:
            return {}
        running: list[Any] = self.scheduler.running
        able = [own for own in running if own.decodes and own.takes_drafts]
        return propose(self.drafter, able, self.runner.config.vocab_size) if able else {}

    # Postprocess.

    def _read_pending(self) -> list[Token]:
        """Reads the steps that were dispatched."""
        ran, self._pending = self._pending, []
        return [token for each in ran for token in self._read(each)]

    def _read(self, ran: Ran) -> list[Token]:
        """Waits for what a step has left, and judges what it has drawn."""
        for work, scored in ran.scored:
            _of(work).scores.add(work.begin + scored.piece.begin, scored)
        if ran.drawn is None:
            return []
        live = [(row, work) for row, work in enumerate(ran.rows) if work is not None and not work.sequence.ended]
        self._trace(ran, live)
        tokens, log_probs = ran.read()
        likeliest = ran.drawn.likeliest
        if likeliest is not None and any(_of(work).params.logprobs is not None for _, work in live):
            likeliest = jax.tree.map(np.asarray, likeliest)
        width = len(tokens) // len(ran.rows)
        taken = [0] * len(ran.rows) if ran.taken is None else np.asarray(ran.taken).tolist()
        found = []
        for row, work in live:
            own = _of(work)
            for number, at in enumerate(range(row * width, row * width + taken[row] + 1), work.number or 0):
                if not own.ended:
                    found.append(self._judge(own, number, tokens[at], log_probs[at], own.top(likeliest, at)))
            self._count_drafts(work, taken[row])
        self._learn(ran)
        return [token for token in found if token is not None]

    def _learn(self, ran: Ran) -> None:
        """Hands the drafter what prediction layers have drafted of those that go on."""
        if ran.drafts is None or not isinstance(self.drafter, MTP):
            return
        for work, drafts in zip(ran.rows, np.asarray(ran.drafts).tolist(), strict=True):
            if work is not None and not work.sequence.ended and work.sequence.runs:
                self.drafter.learn(_of(work), drafts)

    def _count_drafts(self, work: Work, taken: int) -> None:
        """Counts the drafts of a row, and forgets the wrong ones."""
        if work.drafts and not work.sequence.ended:
            self.scheduler.take(work, 1 + taken)
        self._proposed += len(work.drafts)
        self._accepted += taken

    def _trace(self, ran: Ran, live) -> None:
        """Hands on what training wants to know of a step."""
        traced = [(row, work) for row, work in live if _of(work).trace is not None]
        found = {name: np.asarray(x) for name, x in ran.found.items()} if traced else {}
        for row, work in traced:
            trace = _of(work).trace
            if found:
                trace.add(work.begin, {name: x[:, row, :1] for name, x in found.items()})
            if trace.keeps:
                kept = np.asarray(ran.kept)
                bits = np.unpackbits(kept[row * len(kept) // len(ran.rows)])[: self.runner.config.vocab_size]
                trace.add_kept(work.number, np.flatnonzero(bits).astype(np.int32))

    def _judge(self, own: Continuation, number, token: int, log_prob: float, likeliest) -> Token | None:
        """Adds a token to its sequence, which may end there."""
        own.read = number + 1
        if not math.isfinite(log_prob):
            words = "its logits are NaN" if math.isnan(log_prob) else "no token may be drawn"
            return self._end(own, "error", error=f"request {own.request} has ended: {words} at token {number}")
        if not own.max_tokens:
            return self._end(own, "length")
        if number < len(own.tokens):  # generated anew after a preemption
            same = own.is_again(number, token)
            return None if same else self._end(own, "error", error=f"request {own.request} came out otherwise anew")
        text, finished, error = own.push(token)
        self._generated_tokens += 1
        if number == 0:
            self.scheduler.keep(own)
        made = own.token(token, log_prob, text, likeliest)
        if finished is None:
            return made
        error = error and f"request {own.request} has ended: {error}"
        return self._end(own, finished, made, error=error)

    def _end(self, own: Continuation, finished: Finished, last: Token | None = None, *, error=None) -> Token:
        """Ends a continuation: its pages are free at once, and the steps under way cannot harm who takes them next."""
        self.scheduler.end(own)
        group = self._continuations[own.request]
        group.remove(own)
        if not group:
            del self._continuations[own.request]
        last = own.token() if last is None else last
        record = None if own.trace is None else own.trace.record()
        text = last.text + (own.text.finish() if own.text is not None else "")
        return last._replace(text=text, finished=finished, error=error, record=record)

    # Streams.

    async def stream(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yields the tokens of a request as they come; whoever leaves early cancels it.

        Raises:
          ValueError, OutOfPages: as `add`.
          RuntimeError: if a step has failed.
        """
        group = await asyncio.to_thread(self._prepare, request)
        name, left = group[0].request, len(group)
        queue = self._queues[name] = asyncio.Queue()
        self._inbox.append(group)  # now that there is somebody to listen
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
        loop = asyncio.get_running_loop()
        try:
            while self.busy:
                for token in await loop.run_in_executor(self._stepper, self.step):
                    if token.request in self._queues:
                        self._queues[token.request].put_nowait(token)
        except Exception as error:
            for queue in self._queues.values():
                queue.put_nowait(error)


def _of(work: Work) -> Any:
    """Returns the continuation that a work is for."""
    return work.sequence


def check_mesh(mesh: Mesh | None) -> None:
    """Checks that an engine can run on a mesh.

    Raises:
      ValueError: if its devices are of several processes, or it splits sequences.
    """
    if mesh is not None and mesh.is_multi_process:
        raise ValueError(f"an engine runs in one process, got devices of several on {describe_mesh(mesh)}")
    if shards(mesh, "pages") > 1:
        raise ValueError(f"an engine's pages must not be sharded, got {describe_mesh(mesh)}")
