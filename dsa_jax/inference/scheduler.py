"""The scheduler: which sequences run in the next step, each with how many tokens. It runs on the host alone.

First come, first served. In every step each running sequence decodes one token, and prompts take what the budget
leaves, at most one chunk: a long prompt delays others by no more. Where pages run out, the youngest running sequence is
preempted: its pages are free, it waits in front of all others, and is computed anew when there is room.
"""

import collections
import dataclasses
import math
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dsa_jax.inference.prefix import Chain, PrefixCache
from dsa_jax.paged import PAGE


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds a step.

    Attributes:
      rows: how many sequences run at a time.
      budget: tokens, decoded and of prompts together.
      chunk: tokens of prompts.
      invariant: whether a chunk is of one sequence and crosses no multiple of `chunk`, and what was preempted is
        generated anew instead of being taken for a longer prompt: its keys then have the same bits as before.
      drafts: of a sequence, at most.
    """

    rows: int
    budget: int
    chunk: int
    invariant: bool = False
    drafts: int = 0

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


class Scheduler:
    """Plans steps over a cache.

    `running` and `waiting` are in order of arrival, and everything that runs came before everything that waits.
    """

    def __init__(self, pages: PrefixCache, limits: Limits):
        self.pages, self.limits = pages, limits
        self.running: list[Sequence] = []
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.preemptions = 0
        self._slots = list(range(limits.rows - 1, -1, -1))

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
        left = min(self.limits.chunk, self.limits.budget - decoding)
        for sequence in list(self.running):  # the oldest first: who is preempted has not been planned yet
            if sequence.runs:
                left -= self._plan_one(plan, sequence, left, drafts.get(sequence, []))
        while not plan.preempted and self._takes_more(plan, left) and (admitted := self._admit()):
            left -= self._plan_one(plan, admitted, left)
        return plan

    def take(self, work: Work, count: int) -> None:
        """Counts how many of the tokens that a verification took in are right, and forgets the drafts that are not."""
        sequence = work.sequence
        self.pages.cache.truncate(sequence.cached, work.begin + count)
        sequence.filled = work.begin + count
        sequence.drawn -= 1 + len(work.drafts) - count

    def _plan_one(self, plan, sequence, left, drafts=()) -> int:
        """Plans a sequence's work; returns how many tokens of a prompt it takes."""
        decodes = sequence.decodes
        drafts = self._with_room(sequence, drafts) if drafts else []
        count = 1 + len(drafts) if decodes else self._chunk(plan, sequence, left)
        if not count or not self._make_room(plan, sequence, count):
            return 0
        begin, ends = sequence.filled, sequence.filled + count >= sequence.target
        self.pages.cache.extend(sequence.cached, count)
        sequence.filled += count
        (plan.decode if decodes else plan.prefill).append(
            Work(sequence, begin, count, sequence.drawn if ends else None, drafts)
        )
        sequence.drawn += ends + len(drafts)
        return 0 if decodes else count

    def _with_room(self, sequence, drafts) -> list[int]:
        """Returns the drafts that may be taken in: within `max_tokens`, and no page is taken that others will want."""
        drafts = drafts[: sequence.max_tokens - sequence.drawn - 1]
        least, most = (self.pages.cache.missing(sequence.cached, 1 + count) for count in (0, len(drafts)))
        if most > least and not self.pages.room(most + sum(map(self._wants, self.running))):
            return []
        return drafts

    def _takes_more(self, plan, left) -> bool:
        return left > 0 and not (self.limits.invariant and plan.prefill)

    def _chunk(self, plan, sequence, left) -> int:
        """Counts the tokens of a prompt that a step takes."""
        if not self._takes_more(plan, left):
            return 0
        if self.limits.invariant:
            left = min(left, self.limits.chunk - sequence.filled % self.limits.chunk)
        return max(0, min(left, sequence.target - sequence.filled))

    def _make_room(self, plan, sequence, count) -> bool:
        """Preempts the youngest until there are pages; returns whether the sequence is still running."""
        while (wanted := self.pages.cache.missing(sequence.cached, count)) and not self.pages.room(wanted):
            youngest = self.running[-1]
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
        self.pages.cache.free(sequence.cached)
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
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

    def _admit(self) -> Sequence | None:
        """Lets the first in the queue run, if there are pages for all its tokens and for a while of the others."""
        if not self.waiting or not self._slots:
            return None
        sequence = self.waiting[0]
        leader = sequence.leader
        if leader is not None and not leader.ended and not leader.tokens:
            return None
        spare = sum(map(self._wants, self.running))
        tokens = sequence.prompt if self.limits.invariant else sequence.known
        cached = self.pages.begin(tokens, sequence.chain, spare, reuse=sequence.reuses)
        if cached is None:
            return None
        sequence.cached, sequence.slot = cached, self._slots.pop()
        sequence.filled, sequence.target = self.pages.cache.length(cached), len(tokens)
        sequence.drawn = sequence.read = 0 if self.limits.invariant else len(sequence.tokens)
        self.running.append(self.waiting.popleft())
        return sequence


def pages_needed(prompt: int, max_tokens: int) -> int:
    """Counts the pages of a sequence that is as long as it may become; its last token is never taken in."""
    return math.ceil((prompt + max(max_tokens, 1) - 1) / PAGE)
