"""Estimates how long a GPU waits for its network in a step: what is sent and no work that could run meanwhile hides.

A block of operations is played through with one stream of work and one of collectives, as XLA's scheduler gives them to
a GPU: a collective leaves when what it sends is there, the one whose result is read first before others; work runs in
the program's order as far as it has what it reads. So what hides a collective is neither what it needs nor what needs
it. What a loop sends and none of its steps reads, gradients above all, may arrive during the next step.
"""

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Mapping

from train.planner.costs import Done, collective, fewest_products, written_values
from train.planner.hardware import network_seconds, work
from train.planner.trace import Block, Op, Program


@dataclasses.dataclass(frozen=True)
class Span:
    """Holds seconds of one pass through a block: of its work, of what it sends, and of those that work waits.

    `tail` are those for which something is still on its way when all work is done.
    """

    compute: float
    network: float
    waited: float
    tail: float


def exposed_seconds(program: Program) -> float:
    """Computes the seconds of a step in which a GPU has nothing to compute until something arrives.

    Args:
      program: the step of one device, on a mesh of H200s.
    """
    span = _Player(program).span(program.block)
    return span.waited + span.tail


class _Player:
    """Times the blocks of a program, each once."""

    def __init__(self, program: Program):
        self.program = program
        self.known: dict[int, Span] = {}

    def span(self, block: Block) -> Span:
        """Plays a block through."""
        if id(block) not in self.known:
            written = written_values(block)
            self.known[id(block)] = play(block, [self._one(op, written) for op in block.ops])
        return self.known[id(block)]

    def _one(self, op: Op, written: frozenset[int]) -> Span:
        """Times an operation. A loop that sends something holds up all else, as it does on a GPU."""
        if op.name == "cond":
            return self.span(fewest_products(op))
        if op.blocks:
            step = self.span(op.blocks[0])
            waited = op.trips * max(step.waited, step.network - step.compute) + (step.tail if op.trips else 0.0)
            return Span(op.trips * step.compute, op.trips * step.network, waited, 0.0)
        if (message := collective(self.program, op)) is not None:
            return Span(0.0, network_seconds(self.program.shape, message), 0.0, 0.0)
        return Span(work(self.program, Done(op, written, 1, None)).seconds, 0.0, 0.0, 0.0)


def play(block: Block, spans: list[Span]) -> Span:
    """Plays a block through, given the seconds of each of its operations.

    Args:
      block: the operations.
      spans: what each takes alone. One without work is a collective.
    """
    links = _Links.of(block)
    is_sent = [span.network > 0 and span.compute == 0 for span in spans]
    streams = {True: _Stream(), False: _Stream()}
    ready = [0.0] * len(spans)
    left = [len(before) for before in links.before]
    for i in range(len(spans)):
        if not left[i]:
            streams[is_sent[i]].wait(0.0, links.first_reader[i] if is_sent[i] else i, i)
    waited = 0.0
    while any(stream.waiting or stream.at_hand for stream in streams.values()):
        sends = streams[True].next_start() <= streams[False].next_start()
        stream = streams[sends]
        before, i = stream.now, stream.take()
        waited += 0.0 if sends else stream.now - before + spans[i].waited
        stream.now += spans[i].network if sends else spans[i].compute + spans[i].waited
        if not sends:  # a loop's own messages stand in the way of others
            streams[True].now += spans[i].network
        for after in links.after[i]:
            ready[after] = max(ready[after], stream.now)
            left[after] -= 1
            if not left[after]:
                priority = links.first_reader[after] if is_sent[after] else after
                streams[is_sent[after]].wait(ready[after], priority, after)
    compute, network = (sum(getattr(span, name) for span in spans) for name in ("compute", "network"))
    return Span(compute, network, waited, max(0.0, streams[True].now - streams[False].now))


@dataclasses.dataclass(frozen=True)
class _Links:
    """Says of each operation of a block which ones it waits for, which wait for it, and the first work among these."""

    before: list[set[int]]
    after: Mapping[int, list[int]]
    first_reader: list[float]

    @classmethod
    def of(cls, block: Block) -> "_Links":
        maker = {value: i for i, op in enumerate(block.ops) for value in op.outputs}
        before = [{maker[value] for value in op.inputs if value in maker} for op in block.ops]
        after: dict[int, list[int]] = defaultdict(list)
        for i, needed in enumerate(before):
            for each in needed:
                after[each].append(i)
        return cls(before, after, [min(after[i], default=math.inf) for i in range(len(block.ops))])


class _Stream:
    """Runs one thing after another: of those at hand the one of the least priority number."""

    def __init__(self):
        self.now = 0.0
        self.waiting: list[tuple[float, float, int]] = []  # when it can begin, priority, number
        self.at_hand: list[tuple[float, int]] = []  # priority, number

    def wait(self, ready: float, priority: float, number: int) -> None:
        """Adds something that can begin when it is `ready`."""
        heapq.heappush(self.waiting, (ready, priority, number))

    def next_start(self) -> float:
        """Gives when the next thing begins, infinity where there is none."""
        if self.at_hand:
            return self.now
        return max(self.now, self.waiting[0][0]) if self.waiting else math.inf

    def take(self) -> int:
        """Goes on to when the next thing begins; returns its number."""
        self.now = self.next_start()
        while self.waiting and self.waiting[0][0] <= self.now:
            _, priority, number = heapq.heappop(self.waiting)
            heapq.heappush(self.at_hand, (priority, number))
        return heapq.heappop(self.at_hand)[1]
