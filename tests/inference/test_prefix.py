"""The reuse of prefixes: what is a hit, who shares, what is forgotten first, and the books beside any operations."""

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from model_cases import small_config

from dsa_jax.inference.pages import PagedCache
from dsa_jax.inference.prefix import Chain, PrefixCache

pytestmark = pytest.mark.usefixtures("in_a_hurry")

TINY = small_config(
    num_hidden_layers=1, kv_lora_rank=2, qk_rope_head_dim=2, index_head_dim=4, max_position_embeddings=512
)


def make(pages=8) -> PrefixCache:
    return PrefixCache(PagedCache(TINY, pages, format="float32"))


def ids(*pages: int, more: int = 0) -> np.ndarray:
    """Tokens of whole pages, one number each, and of a begun one."""
    return np.concatenate([np.full(64, page, np.int32) for page in pages] + [np.full(more, 99, np.int32)])


def filled(prefix, tokens, salt="") -> int:
    """Begins a sequence, fills it up and keeps its pages."""
    chain = Chain(salt)
    sequence = prefix.begin(tokens, chain)
    assert sequence is not None
    prefix.cache.extend(sequence, len(tokens) - prefix.cache.length(sequence))
    prefix.keep(sequence, tokens, chain)
    return sequence


def reused(prefix, tokens, salt="", **options) -> int:
    """How many tokens a sequence begins with that ends at once."""
    sequence = prefix.begin(tokens, Chain(salt), **options)
    length = prefix.cache.length(sequence)
    prefix.cache.free(sequence)
    return length


def test_keys_are_a_chain_of_sha256_behind_the_salt():
    tokens = ids(1, 2)
    root = hashlib.sha256(b"salt me").digest()
    first = hashlib.sha256(b"page " + root + tokens[:64].tobytes()).digest()
    second = hashlib.sha256(b"page " + first + tokens[64:].tobytes()).digest()
    chain = Chain("me")
    assert chain.keys(tokens, 1) == [first] and chain.keys(tokens, 2) == [first, second]
    assert chain.keys(tokens, 1) == [first]


def test_equal_beginnings_share_pages_and_hits_are_counted():
    prefix = make()
    first = filled(prefix, ids(1, 2, more=5))
    second = filled(prefix, ids(1, 2, 3))
    assert prefix.cache.pages_of(second)[:2] == prefix.cache.pages_of(first)[:2]
    assert prefix.cache.pages_of(second)[2] != prefix.cache.pages_of(first)[2]
    assert (prefix.hits, prefix.asked, len(prefix)) == (2, 4, 3)
    assert reused(prefix, ids(1, 3, 2, more=1)) == 64, "a page counts with all that stands before it alone"
    assert reused(prefix, ids(2, 1, more=1)) == 0
    prefix.check(), prefix.cache.check()


def test_the_last_token_is_never_reused():
    """Of a prompt that ends with a page, the last page is computed: its last token's logits are wanted."""
    prefix = make()
    filled(prefix, ids(1, 2))
    assert reused(prefix, ids(1, 2)) == 64 and reused(prefix, ids(1, 2, more=1)) == 128
    assert [reused(prefix, ids(1, 2, more=more), last=3) for more in (0, 2, 3)] == [64, 64, 128]
    assert reused(prefix, ids(more=2), last=3) == 0


def test_two_salts_never_share():
    prefix = make()
    filled(prefix, ids(1, 2), salt="a")
    assert reused(prefix, ids(1, 2, more=1), salt="b") == reused(prefix, ids(1, 2, more=1)) == 0
    assert reused(prefix, ids(1, 2, more=1), salt="a") == 128
    assert Chain("\ud800").keys(ids(1), 1) != Chain("").keys(ids(1), 1), "any text is a salt"


def test_equal_hashes_of_other_tokens_are_no_hit():
    class Broken(Chain):
        def keys(self, tokens, pages):
            return [bytes([page]) for page in range(pages)]

    prefix = make()
    sequence = prefix.begin(ids(1, 2), Broken())
    prefix.cache.extend(sequence, 128)
    prefix.keep(sequence, ids(1, 2), Broken())
    assert len(prefix) == 2
    for tokens, length in ((ids(1, 2, more=1), 128), (ids(1, 3, more=1), 64), (ids(3, 2, more=1), 0)):
        other = prefix.begin(tokens, Broken())
        assert prefix.cache.length(other) == length
        prefix.cache.free(other)


def test_the_longest_unused_goes_first_and_the_end_before_the_beginning():
    prefix = make(pages=5)
    for tokens in (ids(1, 2), ids(3, 4)):
        prefix.cache.free(filled(prefix, tokens))
    assert prefix.cache.free_pages == 1 and reused(prefix, ids(1, 2, more=1)) == 128
    for pages, left in ((2, (128, 64)), (3, (128, 0)), (4, (64, 0)), (5, (0, 0))):
        assert prefix.room(pages) and prefix.cache.free_pages == pages == prefix.evicted + 1
        known = [[key in prefix._kept[0] for key in Chain().keys(tokens, 2)] for tokens in (ids(1, 2), ids(3, 4))]
        assert known == [[64 * place < tokens for place in range(2)] for tokens in left]
        prefix.check(), prefix.cache.check()


def test_pages_in_use_stay():
    prefix = make(pages=4)
    running = filled(prefix, ids(1, 2))
    prefix.cache.free(filled(prefix, ids(1, 3)))
    assert not prefix.room(3) and prefix.evicted == 1 and prefix.cache.free_pages == 2
    assert reused(prefix, ids(1, 2, more=1)) == 128
    prefix.cache.free(running)
    assert prefix.room(4) and len(prefix) == 0


def test_a_page_stays_as_long_as_one_behind_it_is_in_use():
    """Two have computed the same first page; the one whose page is kept has ended, the other goes on behind it."""
    prefix = make(pages=4)
    chain = Chain()
    first, second = (prefix.begin(ids(1, 2), chain) for _ in range(2))
    for sequence, tokens in ((first, ids(1)), (second, ids(1, 2))):
        prefix.cache.extend(sequence, 128)
        prefix.keep(sequence, tokens, chain)
    prefix.cache.free(first)
    assert not prefix.room(2) and prefix.cache.free_pages == 1
    assert reused(prefix, ids(1, 2, more=1)) == 128
    prefix.check()


def test_a_sequence_that_finds_no_room_changes_nothing():
    prefix = make(pages=4)
    running = filled(prefix, ids(1, 2, more=1))
    counted = prefix.hits, prefix.asked
    assert prefix.begin(ids(1, 2, 3, 4, 5), Chain()) is None
    assert prefix.begin(ids(1, 2, 3), Chain(), spare=1) is None
    assert (prefix.hits, prefix.asked) == counted and prefix.cache.free_pages == 1
    assert len(prefix.cache.sequences) == 1 + len(prefix)
    assert prefix.begin(ids(1, 2, 3), Chain()) is not None
    prefix.cache.free(running)
    prefix.cache.check()


def test_everything_is_forgotten_at_once():
    prefix = make()
    running = filled(prefix, ids(1, 2, 3))
    prefix.clear()
    assert len(prefix) == 0 and reused(prefix, ids(1, 2, 3)) == 0
    prefix.cache.free(running)
    assert prefix.cache.free_pages == 8


def test_switched_off_it_keeps_nothing():
    prefix = PrefixCache(PagedCache(TINY, 4, format="float32"), enabled=False)
    prefix.cache.free(filled(prefix, ids(1, 2)))
    assert prefix.cache.free_pages == 4 and len(prefix) == prefix.hits == 0


def test_the_check_finds_what_is_wrong():
    for spoil in ("tokens", "children", "page"):
        prefix = make()
        filled(prefix, ids(1, 2))
        kept = next(iter(prefix._kept[0].values()))
        setattr(kept, spoil, dict(tokens=bytes(256), children=5, page=7)[spoil])
        with pytest.raises(AssertionError):
            prefix.check()


class Prefixes(RuleBasedStateMachine):
    """Runs any operations; beside them stands what was written into each page, which every reuse must agree with."""

    running = Bundle("running")

    def __init__(self):
        super().__init__()
        self.prefix = make(pages=6)
        self.cache = self.prefix.cache
        self.written: dict[int, bytes] = {}

    @rule(
        target=running,
        pages=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4),
        more=st.sampled_from([0, 1]),
        salt=st.sampled_from(["", "a"]),
        spare=st.sampled_from([0, 1]),
    )
    def begin(self, pages, more, salt, spare):
        tokens, chain = ids(*pages, more=more), Chain(salt)
        before = self.cache.free_pages
        sequence = self.prefix.begin(tokens, chain, spare)
        if sequence is None:
            assert self.cache.free_pages >= before
            return None
        held = self.cache.pages_of(sequence)
        for place, page in enumerate(held):
            assert self.written[page] == salt.encode() + tokens[place * 64 : (place + 1) * 64].tobytes()
        assert self.cache.free_pages >= self.cache.missing(sequence, len(tokens) - 64 * len(held)) + spare
        self.cache.extend(sequence, len(tokens) - 64 * len(held))
        for place, page in enumerate(self.cache.pages_of(sequence)):
            text = salt.encode() + tokens[place * 64 : (place + 1) * 64].tobytes()
            if place >= len(held):
                self.written[page] = text
        return sequence, tokens, chain

    @rule(one=running, share=st.sampled_from([0.5, 1.0]))
    def keep(self, one, share):
        if one is not None and one[0] in self.cache.sequences:
            sequence, tokens, chain = one
            self.prefix.keep(sequence, tokens[: int(share * len(tokens))], chain)

    @rule(one=consumes(running))
    def end(self, one):
        if one is not None:
            self.cache.free(one[0])

    @rule(pages=st.integers(0, 6))
    def room(self, pages):
        used = {page for name in self.names() for page in self.cache.pages_of(name)}
        assert self.prefix.room(pages) == (pages <= 6 - len(used)), "whatever no sequence uses can be had"

    def names(self):
        kept = {kept.sequence for kept in self.prefix._kept[0].values()}
        return [name for name in self.cache.sequences if name not in kept]

    @invariant()
    def books(self):
        self.cache.check()
        self.prefix.check()


def test_any_operations_keep_the_books():
    run_state_machine_as_test(Prefixes, settings=settings(max_examples=40, stateful_step_count=25))
