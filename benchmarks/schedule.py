"""Reads the schedule of a compiled program: what each collective sends, and how much of it no computation hides.

XLA writes a program's instructions in the order in which a GPU is given them. A collective that is sent beside other
work stands there twice, as it starts and where its result is first needed; `exposed` adds up how long the work between
the two falls short of it. Computation is timed at the recorded rates, so no GPU is needed: products by their
operations, everything else by the bytes that it reads and writes. That is less than the kernels of this package take,
so exposed seconds are an upper bound.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.hlo import Computation, Instruction, moved_bytes, parse
from dsa_jax.parallel.expert_parallel import CAPACITY_FACTOR
from train.planner.hardware import FLOAT32_FLOPS, measured_rates, nvlink_rates

COLLECTIVES = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "ragged all-to-all",
}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "opt-barrier"}
START, DONE = "-start", "-done"


type Module = Mapping[str, Computation]


@dataclasses.dataclass(frozen=True)
class Sent:
    """Holds what a collective sends in a step: its kind, its times, and of each time bytes, seconds, seconds waited."""

    kind: str
    place: str
    times: float
    bytes: float
    seconds: float
    exposed: float


# The text


def read_module(text: str) -> tuple[Module, str]:
    """Reads the text of a compiled program, as `compiled.as_text()` gives it.

    Returns:
      Its computations by name, and the name of the first that runs.

    Raises:
      ValueError: if it is not scheduled, so that the order of its lines says nothing, or none runs first.
    """
    if "is_scheduled=true" not in text[:2000]:
        raise ValueError("the program must be scheduled (is_scheduled=true): take the text of a compiled executable")
    entry = re.search(r"^ENTRY %?([\w.-]+) ", text, re.M)
    if entry is None:
        raise ValueError("the program must say which computation runs first (ENTRY)")
    return parse(text), entry[1]


# The time of computation


def _flops(module: Module, block: Computation, one: Instruction) -> float:
    """Counts seconds times rate of the products of an instruction, and of what it calls."""
    if one.opcode == "fusion" or one.opcode == f"fusion{START}":
        return sum(_flops(module, module[name], each) for name in one.called("calls") for each in module[name])
    is_product = one.opcode == "dot" or (one.opcode == "custom-call" and "matmul" in one.attributes)
    if not is_product:
        return 0.0
    shapes = {each.name: each.results for each in block}
    left = shapes[one.operands[0]][0]
    contracted = re.search(r"lhs_contracting_dim\w*\"?[=:][\[{]\"?([\d\",]+)[\]}]", one.attributes)
    dims = [int(dim) for dim in re.findall(r"\d+", contracted[1])] if contracted else []
    flops = 2.0 * one.results[0].size * math.prod(left.dims[dim] for dim in dims)
    return flops / (FLOAT32_FLOPS if left.itemsize == 4 else measured_rates().product)


def _trips(module: Module, block: Computation, loop: Instruction, sends: bool) -> int:
    """Counts how often a loop runs; where that depends on the data, as often as with experts chosen evenly.

    Then pieces of an exchange that are left to a loop behind others do not exist, one that a loop begins with is all,
    and chunks of rows fill 1 / CAPACITY_FACTOR of those that there is room for.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known is not None:
        return int(known[1])
    if sends:
        return 0 if any(_begins(block, loop)) else 1
    return math.ceil(max(_sliced(module, loop.called("body")[0]), default=1) / CAPACITY_FACTOR)


def _begins(block: Computation, loop: Instruction) -> Iterator[int]:
    """Yields the whole numbers with which a loop begins to count, where the program says them."""
    made = {each.name: each for each in block}
    for name in made[loop.operands[0]].operands:
        one = made[name]
        while one.opcode in ("copy", "bitcast"):
            one = made[one.operands[0]]
        value = re.fullmatch(r"(\d+)", one.arguments)
        if one.opcode == "constant" and value is not None and not one.results[0].dims:
            yield int(value[1])


def _sliced(module: Module, name: str) -> Iterator[int]:
    """Yields the lengths of the arrays of which a computation, or one that it calls, takes one part at a time."""
    shapes = {each.name: each.results for each in module[name]}
    for each in module[name]:
        if each.opcode == "dynamic-slice" and "dynamic_slice_sizes={1," in each.attributes:
            yield shapes[each.operands[0]][0].dims[0]
        for inner in each.called("calls"):
            yield from _sliced(module, inner)


# The clock


class _Queue:
    """Sends one collective after another, and knows of each how long the GPU waited while it was on its way."""

    def __init__(self):
        self.rows: list[tuple[Sent, float, float, float]] = []  # a message, when it begins and ends, seconds waited

    def add(self, message: Sent, now: float) -> int:
        """Queues a message; returns its number."""
        begin = max(now, self.rows[-1][2] if self.rows else 0.0)
        self.rows.append((message, begin, begin + message.seconds, 0.0))
        return len(self.rows) - 1

    def wait(self, number: int, now: float) -> float:
        """Waits until a message has arrived; returns when that is."""
        then = max(now, self.rows[number][2])
        for i, (message, begin, end, waited) in enumerate(self.rows):
            self.rows[i] = message, begin, end, waited + max(0.0, min(end, then) - max(begin, now))
        return then

    def delay(self, now: float, seconds: float) -> None:
        """Lets what is on its way arrive later, for a loop has sent something in between."""
        for i, (message, begin, end, waited) in enumerate(self.rows):
            if end > now:
                self.rows[i] = message, begin, end + seconds, waited

    def messages(self) -> list[Sent]:
        """Lists the messages with the seconds waited for each."""
        return [dataclasses.replace(message, exposed=waited) for message, _, _, waited in self.rows]


class _Clock:
    """Goes through a computation's instructions in their order, with one stream of work and one of collectives."""

    def __init__(self, module: Module, gpus: int):
        self.module, self.gpus = module, gpus
        self.known: dict[str, tuple[float, list[Sent]]] = {}

    def run(self, name: str) -> tuple[float, list[Sent]]:
        """Times a computation: its seconds, and what its collectives send."""
        if name not in self.known:
            self.known[name] = self._run(self.module[name])
        return self.known[name]

    def _run(self, block: Computation) -> tuple[float, list[Sent]]:
        now, sent, started = 0.0, _Queue(), {}
        found: list[Sent] = []
        for one in block:
            message = self._message(block, one)
            if message is not None:
                started[one.name] = sent.add(message, now)
                if not one.opcode.endswith(START):
                    now = sent.wait(started[one.name], now)
            elif one.opcode.endswith(DONE) and one.operands[0] in started:
                now = sent.wait(started[one.operands[0]], now)
            else:
                seconds, inner = self._work(block, one)
                sent.delay(now, sum(each.times * each.seconds for each in inner))
                now += seconds
                found += inner
        return now, found + sent.messages()

    def _work(self, block: Computation, one: Instruction) -> tuple[float, list[Sent]]:
        if one.opcode == "while":
            seconds, inner = self.run(one.called("body")[0])
            times = _trips(self.module, block, one, bool(inner))
            return times * seconds, [dataclasses.replace(each, times=each.times * times) for each in inner]
        if one.opcode == "conditional":
            branches = one.called("branch_computations", "true_computation", "false_computation")
            return min((self.run(name) for name in branches), key=lambda run: run[0])
        if one.opcode == "call":
            return self.run(one.called("to_apply")[0])
        if one.opcode in FREE or one.opcode.endswith(DONE):
            return 0.0, []
        moved = moved_bytes(self.module, block, one) / measured_rates().copy
        return max(_flops(self.module, block, one), moved), []

    def _message(self, block: Computation, one: Instruction) -> Sent | None:
        kind = COLLECTIVES.get(one.opcode.removesuffix(START))
        if kind is None:
            return None
        shapes = {each.name: each.bytes for each in block}
        given = [shapes[name] for name in one.operands]
        total = given[0] / CAPACITY_FACTOR if kind.startswith("ragged") else sum(given)
        share = (self.gpus - 1) / self.gpus
        sent = total * {"all-gather": self.gpus - 1, "all-reduce": 2 * share}.get(kind, share)
        seconds = sent / nvlink_rates()[kind]
        return Sent(kind, one.op_name or one.name, 1.0, sent, seconds, seconds)


def read_sent(text: str, gpus: int) -> list[Sent]:
    """Lists what the collectives of a compiled program send in a step, and how long the GPU waits for each.

    Experts are taken to be chosen evenly, and of a choice the shorter branch.

    Args:
      text: the program, as `compiled.as_text()` gives it.
      gpus: the GPUs of one host over which every collective goes.

    Raises:
      ValueError: if the program is not scheduled.
    """
    module, entry = read_module(text)
    return _Clock(module, gpus).run(entry)[1]


@dataclasses.dataclass(frozen=True)
class Total:
    """Holds what a GPU sends in a step, seconds of it, seconds in which it waits, and their share in all of them."""

    gb_sent: float
    seconds: float
    exposed_seconds: float
    exposed_share: float


def totals(sent: Sequence[Sent]) -> dict[str, Total]:
    """Adds up by kind of collective, and under "all"."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for each in sent:
        amounts = each.bytes / 1e9, each.seconds, each.exposed
        for name in (each.kind, "all"):
            sums[name] = [total + each.times * amount for total, amount in zip(sums[name], amounts, strict=True)]
    return {
        name: Total(gb, seconds, exposed, exposed / seconds if seconds else 0.0)
        for name, (gb, seconds, exposed) in sums.items()
    }
