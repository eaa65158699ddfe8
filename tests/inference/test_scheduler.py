"""The scheduler beside a device that only remembers: any requests, limits and cancels, read a step late as they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import small_config
from sharded_cases import mesh_of

from dsa_jax.inference.pages import PagedCache
from dsa_jax.inference.prefix import Chain, PrefixCache
from dsa_jax.inference.scheduler import Limits, Scheduler, Sequence, pages_needed

pytestmark = pytest.mark.usefixtures("in_a_hurry")

TINY = small_config(
    num_hidden_layers=1, kv_lora_rank=2, qk_rope_head_dim=2, index_head_dim=4, max_position_embeddings=512
)
PAGES = 6


def make(rows=3, budget=40, chunk=32, invariant=False, pages=PAGES, mesh=None, last=1) -> Scheduler:
    cache = PagedCache(TINY, pages, format="float32", mesh=mesh)
    return Scheduler(PrefixCache(cache), Limits(rows, budget, chunk, invariant, last=last))


def request(length, new, seed=0, leader=None) -> Sequence:
    prompt = np.random.default_rng(seed).integers(0, 64, length).astype(np.int32)
    return Sequence(prompt, new, Chain(), leader)


def drawn(sequence, number) -> int:
    """The token that a device would draw: one for each sequence and number."""
    return int(sequence.prompt[0]) * 1000 + number


@dataclasses.dataclass
class Device:
    """Runs plans: writes tokens into pages, and tells what it drew when the next step is planned."""

    scheduler: Scheduler
    written: dict[tuple[int, int, int], int] = dataclasses.field(default_factory=dict)
    unread: list = dataclasses.field(default_factory=list)
    steps: int = 0

    def step(self):
        scheduler, limits = self.scheduler, self.scheduler.limits
        deciding = [each for each in scheduler.running if each.decodes]
        plan = scheduler.plan()
        works = [*plan.decode, *plan.prefill]
        assert len(plan.decode) + sum(work.count for work in plan.prefill) <= limits.budget
        assert all(work.count == 1 for work in plan.decode)
        shards = scheduler.pages.cache.row_shards
        on = [[w for w in plan.prefill if scheduler.pages.cache.rows_of(w.sequence.cached) == s] for s in range(shards)]
        assert all(sum(work.count for work in prefill) <= limits.chunk for prefill in on)
        for work in plan.prefill:
            assert work.number is None or work.count >= min(limits.last, len(work.sequence.prompt))
        if limits.invariant:
            assert all(len(prefill) <= 1 for prefill in on)
            assert all(work.begin // limits.chunk == (work.begin + work.count - 1) // limits.chunk for work in works)
        assert [work.sequence for work in plan.decode] == [each for each in deciding if each not in plan.preempted]
        assert len({work.sequence.slot for work in works}) == len(works)
        rows = limits.rows // shards
        for own in (work.sequence for work in works):
            assert own.slot // rows == scheduler.pages.cache.rows_of(own.cached) and 0 <= own.slot < limits.rows
        for work in works:
            self.write(work)
        read, self.unread = self.unread, [work for work in works if work.number is not None]
        for work in read:
            self.read(work)
        self.steps += 1
        assert self.steps < 1500, "it does not come to an end"
        return plan

    def write(self, work):
        """Writes the tokens that a sequence takes in, behind those that its pages must hold already."""
        own = work.sequence
        tokens = [*own.prompt, *(drawn(own, number) for number in range(own.max_tokens))]
        cache = self.scheduler.pages.cache
        pages, shard = cache.pages_of(own.cached), cache.rows_of(own.cached)
        for position in range(work.begin, work.begin + work.count):
            self.written[shard, pages[position // 64], position % 64] = int(tokens[position])
        held = [self.written[shard, pages[at // 64], at % 64] for at in range(work.begin + work.count)]
        assert held == [int(token) for token in tokens[: len(held)]]
        if work.number is not None:
            assert len(held) == len(own.prompt) + work.number, "what draws a token has taken in all before it"

    def read(self, work):
        own = work.sequence
        if own.ended:
            return
        token = drawn(own, work.number)
        if work.number < len(own.tokens):
            assert self.scheduler.limits.invariant, "drawn twice"
            return
        assert work.number == len(own.tokens), "one was lost"
        own.tokens.append(token)
        if work.number == 0:
            self.scheduler.keep(own)
        if len(own.tokens) == own.max_tokens:
            self.scheduler.end(own)


def in_order(scheduler, arrived):
    """Whether what runs came before what waits, each in order of arrival."""
    places = [arrived.index(each) for each in (*scheduler.running, *scheduler.waiting)]
    return places == sorted(places)


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 200), st.integers(1, 90), st.integers(0, 3), st.integers(0, 12), st.sampled_from([None, None, 7])
    ),
    min_size=1,
    max_size=9,
)


@given(
    asked=REQUESTS, rows=st.integers(1, 4), chunk=st.sampled_from([5, 32, 64, 300]), invariant=st.booleans(),
    pages=st.sampled_from([5, 8]), shards=st.sampled_from([1, 1, 2]), last=st.sampled_from([1, 3]),
)  # fmt: skip
@settings(max_examples=80)
def test_any_requests_end_and_nothing_is_lost_or_repeated(asked, rows, chunk, invariant, pages, shards, last):
    """Prompts of few seeds, so that they share; some are cancelled some steps after they came."""
    rows *= shards
    mesh, last = mesh_of("data=2") if shards > 1 else None, 1 if invariant else last
    scheduler = make(rows, chunk + rows, chunk, invariant, pages, mesh, last)
    device = Device(scheduler)
    coming = sorted(asked, key=lambda each: each[3])
    arrived: list[Sequence] = []
    cancels: dict[int, list[Sequence]] = {}
    cancelled_early: set[Sequence] = set()
    while coming or scheduler.running or scheduler.waiting or device.unread:
        while coming and coming[0][3] <= device.steps:
            length, new, seed, _, cancelled = coming.pop(0)
            arrived.append(request(length, new, seed))
            assert pages_needed(length, new) <= 5
            scheduler.add(arrived[-1])
            if cancelled is not None:
                cancels.setdefault(device.steps + cancelled, []).append(arrived[-1])
        for each in cancels.pop(device.steps, ()):
            if not each.ended:
                scheduler.end(each)
                cancelled_early.add(each)
        cache = scheduler.pages.cache
        before = [(each, cache.rows_of(each.cached)) for each in scheduler.running]
        plan = device.step()
        assert shards > 1 or in_order(scheduler, arrived)
        for shard in range(shards):
            ran = [each for each, own in before if own == shard]
            gone = [each for each in ran if each in plan.preempted]
            assert gone == ran[len(ran) - len(gone) :], "the youngest go"
        cache.check()
    assert all(each.ended for each in arrived)
    for each in arrived:
        assert each.tokens == [drawn(each, number) for number in range(len(each.tokens))]
        assert len(each.tokens) == each.max_tokens or each in cancelled_early
    assert sorted(slot for slots in scheduler._slots for slot in slots) == list(range(rows))
    scheduler.pages.check()
    scheduler.pages.clear()
    assert scheduler.pages.cache.free_pages == pages * shards


def test_a_long_prompt_takes_what_the_budget_leaves():
    """One that decodes does so in every step, while a prompt comes in by chunks; then both decode."""
    scheduler = make(rows=2, budget=17, chunk=16)
    device = Device(scheduler)
    scheduler.add(request(3, 50))
    device.step()
    scheduler.add(request(100, 5, seed=1))
    counts = [
        (len(plan.decode), sum(work.count for work in plan.prefill)) for plan in (device.step() for _ in range(9))
    ]
    assert counts == [(1, 16)] * 6 + [(1, 4), (2, 0), (2, 0)]
    scheduler = make(rows=2, budget=10, chunk=16)
    device = Device(scheduler)
    scheduler.add(request(3, 50)), device.step(), scheduler.add(request(100, 5, seed=1))
    assert [sum(work.count for work in device.step().prefill) for _ in range(2)] == [9, 9]


def test_first_come_first_served():
    """A short request behind one that finds no pages waits, though there is room for it."""
    scheduler = make(rows=4)
    device = Device(scheduler)
    first, large, small = request(200, 60), request(300, 20, seed=1), request(3, 3, seed=2)
    for each in (first, large, small):
        scheduler.add(each)
    device.step()
    while not first.ended:
        assert list(scheduler.waiting) == [large, small]
        device.step()
    device.step()
    assert scheduler.running[0] is large


def test_the_youngest_is_preempted_and_goes_first_again():
    scheduler = make(rows=4, budget=300, chunk=200)
    device = Device(scheduler)
    old, young, last = request(120, 150), request(120, 100, seed=1), request(2, 2, seed=2)
    for each in (old, young):
        scheduler.add(each)
    while not scheduler.preemptions:
        plan = device.step()
    scheduler.add(last)
    assert plan.preempted == [young] and list(scheduler.waiting) == [young, last] and scheduler.running == [old]
    had = len(young.tokens)
    while not young.ended:
        device.step()
    assert 0 < had < 100 and len(young.tokens) == 100 and len(old.tokens) == 150


def test_what_was_preempted_begins_with_its_own_pages_if_nobody_took_them():
    scheduler = make(rows=2, budget=300, chunk=200, pages=8)
    device = Device(scheduler)
    one = request(130, 60)
    scheduler.add(one)
    for _ in range(20):
        device.step()
    device.read(device.unread.pop())
    scheduler._preempt(one)
    plan = device.step()
    assert [work.begin for work in plan.prefill] == [128] and scheduler.pages.hits == 2


def test_followers_wait_for_the_pages_of_their_leader():
    """Continuations of one prompt compute its full pages once, whatever the number of them."""
    scheduler = make(rows=3, budget=300, chunk=200, pages=5)
    device = Device(scheduler)
    leader = request(150, 5)
    for each in (leader, request(150, 5, leader=leader), request(150, 5, leader=leader)):
        scheduler.add(each)
    taken = [sum(work.count for work in device.step().prefill) for _ in range(4)]
    assert sum(taken) == 150 + 22 + 22 and scheduler.pages.hits == 4


def test_sequences_spread_over_shards_and_go_where_their_prefix_is():
    scheduler = make(rows=4, budget=300, chunk=200, mesh=mesh_of("data=2"))
    device = Device(scheduler)
    one, other = request(130, 60), request(10, 60, seed=1)
    scheduler.add(one)
    device.step(), device.step()  # now its full pages are known
    for each in (other, again := request(130, 60), third := request(10, 60, seed=2)):
        scheduler.add(each)
    plan = device.step()
    on = [scheduler.pages.cache.rows_of(each.cached) for each in (one, other, again, third)]
    assert on == [0, 1, 0, 1] and [work.begin for work in plan.prefill] == [0, 128, 0]
    assert scheduler.pages.hits == 2


def test_each_shard_takes_a_chunk_and_has_slots_of_its_own():
    scheduler = make(rows=2, budget=66, chunk=32, mesh=mesh_of("data=2"))
    device = Device(scheduler)
    for seed in range(3):
        scheduler.add(request(50, 4, seed=seed))
    counts = [[work.count for work in device.step().prefill] for _ in range(2)]
    assert counts == [[32, 32], [18, 18]] and len(scheduler.waiting) == 1
    with pytest.raises(ValueError, match="rows must be a multiple of the mesh's 2 shards of rows, got 3"):
        make(rows=3, mesh=mesh_of("data=2"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(rows=0), ["rows", "0"]),
        (dict(chunk=0), ["chunk", "0"]),
        (dict(rows=8, budget=8), ["budget", "8 rows"]),
    ],
    ids=str,
)
def test_bad_limits_are_refused(options, words):
    with pytest.raises(ValueError) as caught:
        Limits(**dict(rows=3, budget=40, chunk=32) | options)
    assert all(word in str(caught.value) for word in words)
