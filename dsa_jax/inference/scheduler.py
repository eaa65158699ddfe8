"""The scheduler: which sequences run in the next step, each with how many tokens. It runs on the host alone.

First come, first served. In every step each running sequence decodes one token, and prompts take what the budget
leaves, at most one chunk: a long prompt delays others by no more. Where pages run out, the youngest running sequence is
preempted: its pages are free, it waits in front of all others, and is computed anew when there is room.

On a mesh each shard of rows runs sequences of its own, and each takes a chunk of prompts in a step. A sequence begins
on the shard that knows most of its prefix, and else on that which runs fewest: a step lasts as long as on the fullest.
"""

import collections
import dataclasses
import math
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dsa_jax.inference.pieces import take_of
from dsa_jax.inference.prefix import Chain, PrefixCache
from dsa_jax.paged import PAGE


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds a step.

    Attributes:
      rows: how many sequences run at a time, on all shards together: a multiple of their number.
      budget: tokens, decoded and of prompts together.
      chunk: tokens of prompts, on each shard.
      invariant: whether a chunk is of one sequence and crosses no multiple of `chunk`, and what was preempted is
        generated anew instead of being taken for a longer prompt: its keys then have the same bits as before.
      drafts: of a sequence, at most.
      last: tokens of a prompt that its last chunk has at least, if it has so many.
    """

    rows: int
    budget: int
    chunk: int
    invariant: bool = False
    drafts: int = 0
    last: int = 1

    def __post_init__(self):
        if self.rows < 1 or self.chunk < 1:
            raise ValueError(f"rows and chunk must be at least 1, got {self.rows} and {self.chunk}")
        decoded = self.rows * (1 + self.drafts)
        if self.budget <= decoded:
            raise ValueError(
                f"budget must be more than the {decoded} tokens that {self.rows} rows decode, got {self.budget}"
            )


@dataclasses.dataclass(eq=False)
class Sequence:
    """Holds what the scheduler knows of a sequence.

    Attributes:
      prompt: int32 [T].
      max_tokens: how many tokens to draw at most.
      chain: the keys of its pages.
      leader: a sequence with the same prompt, whose pages this one waits for.
      waits: whether its next token is drawn only when the last one was read.
      reuses: whether it may begin with pages that others have left.
      keeps: whether it may leave pages to others.
      tokens: what was drawn and read.
      cached: its number in the paged cache while it runs, else -1.
      filled: tokens that the cache holds when the steps under way have run.
      target: tokens to prefill before the next one is drawn.
      drawn: tokens drawn, those of steps under way included; counted anew after a preemption under `invariant`.
      read: how many of these were read.
      slot: a number below `rows` that is its own while it runs.
      ended: whether it will not run again.
    """

    prompt: np.ndarray
    max_tokens: int
    chain: Chain
    leader: "Sequence | None" = None
    waits: bool = False
    reuses: bool = True
    keeps: bool = True
    tokens: list[int] = dataclasses.field(default_factory=list)
    cached: int = -1
    filled: int = 0
    target: int = 0
    drawn: int = 0
    read: int = 0
    slot: int = -1
    ended: bool = False

    @property
    def runs(self) -> bool:
        """Tells whether it has pages and a slot."""
        return self.cached >= 0

    @property
    def known(self) -> np.ndarray:
        """Returns the prompt and what was drawn and read."""
        return np.concatenate([self.prompt, np.asarray(self.tokens, np.int32)])

    @property
    def decodes(self) -> bool:
        """Tells whether its prompt is in the cache, and another token is to be drawn now."""
        is_due = not self.waits or self.read == self.drawn
        return self.filled >= self.target and self.drawn < self.max_tokens and is_due


class Work(NamedTuple):
    """Says what a step does for a sequence."""

    sequence: Sequence
    begin: int  # the first token that it takes in
    count: int
    number: int | None  # of the first token that it draws; None in the midst of a prompt
    drafts: list[int] = []  # the tokens that it takes in behind the first


@dataclasses.dataclass
class Plan:
    """Holds the work of a step, and which sequences had to go."""

    decode: list[Work] = dataclasses.field(default_factory=list)
    prefill: list[Work] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)


class _Left:
    """Counts the tokens of prompts that a step may still take, in all and on each shard."""

    def __init__(self, limits: Limits, decoding: int, shards: int):
        self._total, self._on, self._invariant = limits.budget - decoding, [limits.chunk] * shards, limits.invariant

    def on(self, shard: int) -> int:
        return max(0, min(self._total, self._on[shard]))

    def take(self, shard: int, count: int) -> None:
        self._total -= count
        self._on[shard] = 0 if self._invariant else self._on[shard] - count


class Scheduler:
    """Plans steps over a cache.

    `running` and `waiting` are in order of arrival. On one shard everything that runs came before everything that
    waits; on several a sequence that was preempted waits although younger ones run elsewhere.
    """

    def __init__(self, pages: PrefixCache, limits: Limits):
        shards = pages.cache.row_shards
        if limits.rows % shards:
            raise ValueError(f"rows must be a multiple of the mesh's {shards} shards of rows, got {limits.rows}")
        self.pages, self.limits = pages, limits
        self.running: list[Sequence] = []
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.preemptions = 0
        rows = limits.rows // shards
        self._slots = [list(range((shard + 1) * rows - 1, shard * rows - 1, -1)) for shard in range(shards)]

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its pages are free, even where a step under way still writes them."""
        sequence.ended = True
        if sequence.runs:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self, drafts: Mapping[Sequence, list[int]] = types.MappingProxyType({})) -> Plan:
        """Decides on the next step, and makes room in the cache for the tokens that it takes in.

        Args:
          drafts: of sequences that decode and whose last step was read. As many are taken as there is room for.
        """
        plan = Plan()
        decoding = sum(1 + len(drafts.get(sequence, ())) for sequence in self.running if sequence.decodes)
        left = _Left(self.limits, decoding, len(self._slots))
        for sequence in list(self.running):  # the oldest first: who is preempted has not been planned yet
            if sequence.runs:
                self._plan_one(plan, sequence, left, drafts.get(sequence, []))
        while not plan.preempted and (admitted := self._admit(left)):
            self._plan_one(plan, admitted, left)
        return plan

    def take(self, work: Work, count: int) -> None:
        """Counts how many of the tokens that a verification took in are right, and forgets the drafts that are not."""
        sequence = work.sequence
        self.pages.cache.truncate(sequence.cached, work.begin + count)
        sequence.filled = work.begin + count
        sequence.drawn -= 1 + len(work.drafts) - count

    def _plan_one(self, plan, sequence, left, drafts=()) -> None:
        """Plans a sequence's work."""
        decodes = sequence.decodes
        drafts = self._with_room(sequence, drafts) if drafts else []
        count = 1 + len(drafts) if decodes else self._chunk(sequence, left)
        if not count or not self._make_room(plan, sequence, count):
            return
        begin, ends = sequence.filled, sequence.filled + count >= sequence.target
        self.pages.cache.extend(sequence.cached, count)
        sequence.filled += count
        (plan.decode if decodes else plan.prefill).append(
            Work(sequence, begin, count, sequence.drawn if ends else None, drafts)
        )
        sequence.drawn += ends + len(drafts)
        if not decodes:
            left.take(self._shard(sequence), count)

    def _with_room(self, sequence, drafts) -> list[int]:
        """Returns the drafts that may be taken in: within `max_tokens`, and no page is taken that others will want."""
        drafts = drafts[: sequence.max_tokens - sequence.drawn - 1]
        least, most = (self.pages.cache.missing(sequence.cached, 1 + count) for count in (0, len(drafts)))
        shard = self._shard(sequence)
        if most > least and not self.pages.room(most + self._wanted_on(shard), shard):
            return []
        return drafts

    def _chunk(self, sequence, left) -> int:
        """Counts the tokens of a prompt that a step takes."""
        most = left.on(self._shard(sequence))
        if self.limits.invariant:
            most = min(most, self.limits.chunk - sequence.filled % self.limits.chunk)
        return take_of(sequence.target - sequence.filled, most, self.limits.last)

    def _shard(self, sequence) -> int:
        """Returns the shard of rows that a sequence runs on."""
        return self.pages.cache.rows_of(sequence.cached)

    def _on(self, shard) -> list[Sequence]:
        """Lists what runs on a shard of rows, in order of arrival."""
        return self.running if len(self._slots) == 1 else [own for own in self.running if self._shard(own) == shard]

    def _wanted_on(self, shard) -> int:
        """Counts the pages to leave to what runs on a shard of rows."""
        return sum(map(self._wants, self._on(shard)))

    def _make_room(self, plan, sequence, count) -> bool:
        """Preempts the youngest of its shard until there are pages; returns whether the sequence is still running."""
        shard = self._shard(sequence)
        while (wanted := self.pages.cache.missing(sequence.cached, count)) and not self.pages.room(wanted, shard):
            youngest = self._on(shard)[-1]
            self._preempt(youngest)
            plan.preempted.append(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence) -> None:
        self.preemptions += 1
        self._stop(sequence)
        self.waiting.appendleft(sequence)

    def _stop(self, sequence) -> None:
        """Takes a running sequence off the batch; its pages stay known as a prefix until they are wanted."""
        self.keep(sequence)
        self._slots[self._shard(sequence)].append(sequence.slot)
        self.pages.cache.free(sequence.cached)
        self.running.remove(sequence)
        sequence.cached = sequence.slot = -1

    def preempt_all(self) -> None:
        """Takes everything that runs off the batch, to be computed anew."""
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)

    def keep(self, sequence: Sequence) -> None:
        """Keeps the full pages of a running sequence as a prefix; of its prompt alone under `invariant`.

        Keys that decode steps have written may differ in their last bits from those of a prefill. The last token that
        was read has not been taken in, or by a step that nobody has read yet, whose results may be NaN.
        """
        if sequence.runs and sequence.tokens and sequence.keeps:
            tokens = sequence.prompt if self.limits.invariant else sequence.known[:-1]
            self.pages.keep(sequence.cached, tokens[: sequence.filled], sequence.chain)

    def _wants(self, sequence) -> int:
        """Counts the pages to leave to a running sequence: for the rest of its prompt, or for its next tokens."""
        if sequence.filled < sequence.target:
            return self.pages.cache.missing(sequence.cached, sequence.target - sequence.filled)
        return min(1, self.pages.cache.missing(sequence.cached, sequence.max_tokens - sequence.drawn))

    def _admit(self, left: _Left) -> Sequence | None:
        """Lets the first in the queue run, if a shard has pages for all its tokens and for a while of the others."""
        open = [shard for shard, slots in enumerate(self._slots) if slots and left.on(shard)]
        if not self.waiting or not open:
            return None
        sequence = self.waiting[0]
        leader = sequence.leader
        if leader is not None and not leader.ended and not leader.tokens:
            return None
        tokens = sequence.prompt if self.limits.invariant else sequence.known
        for shard in self._best(open, sequence, tokens):
            spare, last = self._wanted_on(shard), self.limits.last
            cached = self.pages.begin(tokens, sequence.chain, spare, shard, reuse=sequence.reuses, last=last)
            if cached is not None:
                break
        else:
            return None
        sequence.cached, sequence.slot = cached, self._slots[shard].pop()
        sequence.filled, sequence.target = self.pages.cache.length(cached), len(tokens)
        sequence.drawn = sequence.read = 0 if self.limits.invariant else len(sequence.tokens)
        self.running.append(self.waiting.popleft())
        return sequence

    def _best(self, shards, sequence, tokens) -> list[int]:
        """Orders shards of rows by what they know of a sequence's prefix, and then by how many more may run there."""
        if len(shards) == 1:
            return shards

        def known(shard):
            return self.pages.known(tokens, sequence.chain, shard, reuse=sequence.reuses, last=self.limits.last)

        return sorted(shards, key=lambda shard: (-known(shard), -len(self._slots[shard]), shard))


def pages_needed(prompt: int, max_tokens: int) -> int:
    """Counts the pages of a sequence that is as long as it may become; its last token is never taken in."""
    return math.ceil((prompt + max(max_tokens, 1) - 1) / PAGE)
