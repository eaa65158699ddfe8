"""The paged cache: its bookkeeping against plain Python, its files, and what steps read of its pages."""

import dataclasses
import math
import os
import resource
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import same_bits, the_first
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from model_cases import small_config, small_model, tokens
from safetensors.numpy import save_file

from dsa_jax.cache_shapes import pages_that_fit, token_bytes
from dsa_jax.inference import pages as module
from dsa_jax.inference.pages import FreePages, OutOfPages, PagedCache, check_table
from dsa_jax.inference.step import Runner
from dsa_jax.layers import Attention
from dsa_jax.parallel import make_mesh

pytestmark = pytest.mark.usefixtures("in_a_hurry")

TINY = small_config(
    num_hidden_layers=1, kv_lora_rank=2, qk_rope_head_dim=2, index_head_dim=4, max_position_embeddings=256
)
FORMATS = ["float32", "bfloat16", "fp8"]


def make(pages=6, format="float32", config=TINY) -> PagedCache:
    """Makes a cache, of FP8 index keys where the latents are FP8."""
    return PagedCache(dataclasses.replace(config, index_fp8=True) if format == "fp8" else config, pages, format=format)


def pages_of(cache, sequence) -> list[int]:
    """The pages that a sequence has."""
    count = math.ceil(cache.length(sequence) / 64)
    return cache.table([sequence], 4)[0, :count].tolist()


def fill(cache, latents, index_keys):
    """Fills the pools whole with one number each."""
    cache.update(*(jnp.full_like(x, value) for x, value in zip(pools(cache), (latents, index_keys), strict=True)))


def pools(cache):
    return cache.latents, cache.index_keys


def mark(cache, sequence, begin, value):
    """Writes a number into the latents and index keys of a sequence's tokens from `begin` on."""
    latents, index_keys = map(np.array, pools(cache))
    for position in range(begin, cache.length(sequence)):
        page = pages_of(cache, sequence)[position // 64]
        latents[:, page, position % 64] = value
        index_keys[:, page, position % 64] = -value
    cache.update(jnp.asarray(latents), jnp.asarray(index_keys))


def marks(cache, sequence) -> list[int]:
    """The number that stands in each token of a sequence, the same in latents and index keys."""
    at = pages_of(cache, sequence)
    rows = [np.asarray(pool)[:, at].reshape(-1, pool.shape[-1])[: cache.length(sequence)] for pool in pools(cache)]
    assert np.all(rows[0] == rows[0][:, :1]) and np.all(rows[1] == -rows[0][:, :1])
    return rows[0][:, 0].astype(int).tolist()


# Bookkeeping


class Pages(RuleBasedStateMachine):
    """Runs any operations beside a model in plain Python: of each sequence its tokens, and its pages as objects."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.cache, self.number = make(), 0
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, list[object]] = {}

    def owners(self, page) -> int:
        return sum(page in pages for pages in self.pages.values())

    def free(self) -> int:
        return 6 - len({id(page) for pages in self.pages.values() for page in pages})

    def needed(self, sequence, count) -> tuple[bool, int]:
        """Whether the last page is copied, and how many pages are taken in all."""
        own, pages = self.tokens[sequence], self.pages[sequence]
        copied = bool(count and len(own) % 64 and self.owners(pages[-1]) > 1)
        return copied, math.ceil((len(own) + count) / 64) - len(pages) + copied

    @rule(target=sequences)
    def new(self):
        sequence = self.cache.new()
        assert sequence not in self.tokens
        self.tokens[sequence], self.pages[sequence] = [], []
        return sequence

    @rule(sequence=sequences, count=st.sampled_from([0, 1, 2, 30, 63, 64, 65, 130, 250]))
    def extend(self, sequence, count):
        own, before = self.tokens[sequence], self.cache.free_pages
        copied, needed = self.needed(sequence, count)
        assert self.cache.missing(sequence, count) == needed
        if len(own) + count > 256:
            with pytest.raises(ValueError, match="max_position_embeddings = 256 tokens, got"):
                self.cache.extend(sequence, count)
        elif needed > before:
            with pytest.raises(OutOfPages, match=f"sequence {sequence} needs {needed} more pages, got {before} free"):
                self.cache.extend(sequence, count)
        else:
            self.cache.extend(sequence, count)
            assert before - self.cache.free_pages == needed
            kept = self.pages[sequence][:-1] if copied else self.pages[sequence]
            self.pages[sequence] = kept + [object() for _ in range(needed)]
            self.number += 1
            own += [self.number] * count
            mark(self.cache, sequence, len(own) - count, self.number)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        before = self.cache.free_pages
        other = self.cache.fork(sequence)
        assert other not in self.tokens and self.cache.free_pages == before
        self.tokens[other], self.pages[other] = list(self.tokens[sequence]), list(self.pages[sequence])
        return other

    @rule(sequence=sequences, share=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    def truncate(self, sequence, share):
        length = int(share * len(self.tokens[sequence]))
        self.cache.truncate(sequence, length)
        del self.tokens[sequence][length:]
        del self.pages[sequence][math.ceil(length / 64) :]

    @rule(sequence=consumes(sequences))
    def end(self, sequence):
        self.cache.free(sequence)
        del self.tokens[sequence], self.pages[sequence]
        with pytest.raises(ValueError, match=f"sequence must be one of .*, got {sequence}"):
            self.cache.length(sequence)

    @invariant()
    def counts(self):
        self.cache.check()
        assert self.cache.free_pages == self.free()
        assert self.cache.sequences == list(self.tokens)

    @invariant()
    def pages_are_shared_by_forks_alone(self):
        pairs = {
            (id(page), number)
            for sequence, pages in self.pages.items()
            for page, number in zip(pages, pages_of(self.cache, sequence), strict=True)
        }
        assert len(pairs) == len({page for page, _ in pairs}) == len({number for _, number in pairs})

    @invariant()
    def every_sequence_has_its_own_tokens(self):
        """What one writes is seen by no other: a shared page is copied, and whole."""
        for sequence, own in self.tokens.items():
            assert self.cache.length(sequence) == len(own)
            assert marks(self.cache, sequence) == own


def test_any_operations_keep_the_books():
    run_state_machine_as_test(Pages, settings=settings(max_examples=40, stateful_step_count=25))


def test_check_finds_what_is_wrong():
    for spoil in (
        lambda cache: cache._free[0][0].share(0),
        lambda cache: cache._free[0][0].counts.__setitem__(0, 0),
        lambda cache: cache._free[0][0]._free.pop(),
        lambda cache: cache._sequences[0].pages.append(0),
    ):
        cache = make()
        cache.extend(cache.new(), 70)
        cache.check()
        spoil(cache)
        with pytest.raises(AssertionError):
            cache.check()


def test_free_pages_are_handed_out_once():
    free = FreePages(2)
    assert [free.take(), free.take()] == [0, 1] and len(free) == 0
    with pytest.raises(OutOfPages, match="all 2 pages"):
        free.take()
    free.share(1)
    free.release(1)
    assert len(free) == 0
    free.release(1)
    assert len(free) == 1 and free.take() == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_shared_page_is_copied_with_all_its_bytes(format):
    """Two layers, pools of random bits: the fork gets what its parent has, who keeps it, and no other page changes."""
    cache = make(4, format, small_config(max_position_embeddings=256))
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (*x.shape[:-1], x.shape[-1] * x.dtype.itemsize), np.uint8) for x in pools(cache)]
    cache.update(*(jnp.asarray(x.view(pool.dtype)) for x, pool in zip(noise, pools(cache), strict=True)))
    parent = cache.new()
    cache.extend(parent, 100)
    fork = cache.fork(parent)
    cache.extend(fork, 1)
    assert pages_of(cache, parent) == [0, 1] and pages_of(cache, fork) == [0, 2]
    for before, pool in zip(noise, pools(cache), strict=True):
        before[:, 2] = before[:, 1]
        same_bits(np.asarray(pool).view(np.uint8), before)
    cache.extend(parent, 1)  # nobody else has its last page any longer
    assert pages_of(cache, parent) == [0, 1] and cache.free_pages == 1


def test_a_fork_that_forgets_tokens_copies_what_it_overwrites():
    cache = make()
    parent = cache.new()
    cache.extend(parent, 128)
    mark(cache, parent, 0, 7)
    fork = cache.fork(parent)
    cache.truncate(fork, 100)
    assert cache.free_pages == 4 and cache.missing(fork, 1) == 1
    cache.extend(fork, 1)
    mark(cache, fork, 100, 9)
    assert marks(cache, parent) == [7] * 128 and marks(cache, fork) == [7] * 100 + [9]
    whole = cache.fork(parent)
    cache.truncate(whole, 64)
    assert cache.missing(whole, 1) == 1  # a page that is full is written by nobody
    cache.extend(whole, 1)
    assert pages_of(cache, whole)[0] == pages_of(cache, parent)[0]


def test_too_few_pages_change_nothing():
    cache = make(2)
    parent = cache.new()
    cache.extend(parent, 100)
    fork = cache.fork(parent)
    mark(cache, parent, 0, 5)
    before = pools(cache)
    for tokens_ in (1, 40):
        with pytest.raises(OutOfPages):
            cache.extend(fork, tokens_)
    assert all(x is y for x, y in zip(before, pools(cache), strict=True))
    assert cache.length(fork) == 100 and pages_of(cache, fork) == pages_of(cache, parent) and cache.free_pages == 0
    cache.extend(fork, 0)
    cache.check()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda cache: PagedCache(TINY, 0), ["pages", "1", "0"]),
        (lambda cache: PagedCache(TINY, 1, format="fp8"), ["'fp8'", "index_fp8"]),
        (lambda cache: PagedCache(TINY, 1, format="int4"), ["format", "'int4'"]),
        (lambda cache: cache.new(1), ["rows", "0 to 0", "1"]),
        (lambda cache: cache.new(-1), ["rows", "-1"]),
        (lambda cache: cache.extend(0, -1), ["256", "70 + -1"]),
        (lambda cache: cache.extend(0, 187), ["256", "70 + 187"]),
        (lambda cache: cache.truncate(0, 71), ["length", "70", "71"]),
        (lambda cache: cache.truncate(0, -1), ["length", "70", "-1"]),
        (lambda cache: cache.extend(5, 1), ["sequence", "1 in the cache", "5"]),
        (lambda cache: cache.fork(5), ["sequence", "5"]),
        (lambda cache: cache.free(5), ["sequence", "5"]),
        (lambda cache: cache.table([5], 2), ["sequence", "5"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, words):
    cache = make()
    cache.extend(cache.new(), 70)
    with pytest.raises(ValueError) as error:
        call(cache)
    assert all(word in str(error.value) for word in words), error.value
    assert cache.length(0) == 70 and cache.free_pages == 4
    cache.check()


# Tables


def test_tables():
    """One sequence a row, or several behind each other; the rest of a row is page 0."""
    cache = make(8)
    first, second, empty = cache.new(), cache.new(), cache.new()
    cache.extend(first, 64)
    cache.extend(second, 130)
    cache.extend(first, 1)
    assert pages_of(cache, first) == [0, 4] and pages_of(cache, second) == [1, 2, 3]
    table = cache.table([second, None, first, empty], 4)
    assert table.dtype == np.int32
    assert table.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]]
    packed = cache.packed_table([[second, first], [None, first], []], 6)
    assert packed.tolist() == [[1, 2, 3, 0, 4, 0], [0, 4, 0, 0, 0, 0], [0] * 6]
    assert [cache.row_pages(sequence) for sequence in (first, second, empty)] == [2, 3, 0]


@pytest.mark.parametrize(
    ("table", "lengths", "words"),
    [
        ([[0, 1], [1, 2]], [128, 1], ["page 1", "rows 0 and 1"]),
        ([[3, 1], [2, 2]], [128, 128], ["page 2", "rows 1 and 1"]),
        ([[0, 1], [2, 4]], [128, 65], ["row 1", "0 to 3", "4"]),
        ([[0, 1], [-1, 2]], [128, 1], ["row 1", "0 to 3", "-1"]),
        ([[0, 1], [2, 3]], [129, 1], ["row 0", "2 pages", "129 tokens"]),
    ],
)
def test_a_table_that_would_mix_rows_up_is_refused(table, lengths, words):
    with pytest.raises(ValueError) as error:
        check_table(np.array(table, np.int32), np.array(lengths), 4)
    assert all(word in str(error.value) for word in words), error.value


def test_a_table_is_checked_where_it_is_used_alone():
    check_table(np.array([[3, 1], [2, 1], [0, 9]]), np.array([128, 64, 1]), 4)
    check_table(np.array([[9, 9]]), np.array([0]), 4)


# Sizes


@pytest.mark.parametrize("format", FORMATS)
def test_pages_that_fit_take_the_bytes_that_they_count(format):
    config = small_config(index_fp8=format == "fp8")
    cache = PagedCache(config, 3, format=format)
    page = sum(x.nbytes for x in pools(cache)) // 3
    assert page == 64 * 2 * token_bytes(config, format)
    options: dict[str, Any] = dict(format=format, batch=5, length=90)
    memory = math.ceil((7 * page + 4 * 5 * 90) / 0.9)
    assert pages_that_fit(config, **options, memory=memory) == 7
    assert pages_that_fit(config, **options, memory=memory - 2) == 6
    assert PagedCache.sized(config, **options, memory=memory, most=3).pages == 3
    sized = PagedCache.sized(config, **options, memory=memory)
    assert sized.pages == sized.free_pages == 7 and sized.format == format
    with pytest.raises(ValueError, match=f"a page takes {page:,} bytes beside 1,800 bytes of index scores, got 99 "):
        PagedCache.sized(config, **options, memory=99)


def test_free_memory_is_asked_of_the_device(monkeypatch):
    """A CPU does not say: half of what its host has is taken."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < module._free_memory() <= available / 2

    class Device:
        platform = "gpu"

        def __init__(self, **stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(module.jax, "local_devices", lambda: [Device(bytes_limit=1_000_000, bytes_in_use=600_000)])
    assert module._free_memory() == 400_000
    monkeypatch.setattr(module.jax, "local_devices", lambda: [Device()])
    options: dict[str, Any] = dict(format="float32", batch=1, length=64)
    with pytest.raises(ValueError, match="give memory"):
        PagedCache.sized(TINY, **options)


# Files


def filled(format, length=100) -> tuple[PagedCache, int]:
    """A cache with pools of random bits, NaN of every sort among them, and a sequence in pages out of order."""
    cache = make(5, format, small_config(max_position_embeddings=256))
    random = np.random.default_rng(1)
    for _ in range(2):
        cache.extend(cache.new(), 1)
    sequence = cache.new()
    cache.extend(sequence, min(length, 64))
    cache.free(0)
    cache.extend(sequence, max(length - 64, 0))
    noise = [random.integers(0, 256, (*x.shape[:-1], x.shape[-1] * x.dtype.itemsize), np.uint8) for x in pools(cache)]
    cache.update(*(jnp.asarray(x.view(pool.dtype)) for x, pool in zip(noise, pools(cache), strict=True)))
    return cache, sequence


def contents(cache, sequence) -> list[np.ndarray]:
    """The bytes of a sequence's pages."""
    return [np.asarray(pool)[:, pages_of(cache, sequence)].view(np.uint8) for pool in pools(cache)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_sequence_comes_back_bit_by_bit(format, tmp_path):
    cache, sequence = filled(format)
    assert pages_of(cache, sequence) == [2, 0]
    path = tmp_path / "sequence"
    cache.save(sequence, path)
    assert [file.name for file in tmp_path.iterdir()] == ["sequence"]
    other = make(4, format, small_config(max_position_embeddings=256))
    held = other.new()
    other.extend(held, 65)
    for target in (cache, other):
        others = {each: contents(target, each) for each in target.sequences}
        restored = target.restore(path)
        assert target.length(restored) == 100
        for found, expected in zip(contents(target, restored), contents(cache, sequence), strict=True):
            same_bits(found, expected)
        for each, before in others.items():
            for found, expected in zip(contents(target, each), before, strict=True):
                same_bits(found, expected)
        target.check()
    assert pages_of(other, restored) == [2, 3] and other.free_pages == 0


def test_an_empty_sequence_comes_back(tmp_path):
    cache = make()
    cache.save(cache.new(), tmp_path / "empty")
    assert cache.length(cache.restore(tmp_path / "empty")) == 0 and cache.free_pages == 6


def test_a_file_needs_pages(tmp_path):
    cache, sequence = filled("float32", 130)
    cache.save(sequence, tmp_path / "sequence")
    assert cache.free_pages == 1
    before = pools(cache), cache.sequences
    with pytest.raises(OutOfPages, match="needs 3 more pages, got 1 free"):
        cache.restore(tmp_path / "sequence")
    assert cache.sequences == before[1] and cache.free_pages == 1
    assert all(x is y for x, y in zip(before[0], pools(cache), strict=True))
    cache.check()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"\xff" * 3000)


def rewritten(metadata=None, **arrays):
    """Has the file hold other metadata or arrays; None leaves one out."""

    def damage(path):
        own = dict(latents=np.zeros((2, 2, 64, 96), np.uint8), index_keys=np.zeros((2, 2, 64, 64), np.uint8)) | arrays
        own = {name: x for name, x in own.items() if x is not None}
        save_file(own, path, metadata=dict(format="float32", length="100") | (metadata or {}))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, ["holds no sequence"]),
        (emptied, ["holds no sequence"]),
        (overwritten, ["holds no sequence"]),
        (rewritten(index_keys=None), ["holds no sequence", "index_keys"]),
        (rewritten(dict(length="many")), ["holds no sequence", "many"]),
        (rewritten(dict(length="-64")), ["256", "-64"]),
        (rewritten(dict(length="257")), ["256", "257"]),
        (rewritten(dict(length="64")), ["latents", "[2, 1, 64, 96]", "[2, 2, 64, 96]"]),
        (rewritten(dict(format="fp8")), ["'float32'", "'fp8'"]),
        (rewritten(latents=np.zeros((2, 2, 64, 96), np.float32)), ["latents", "uint8", "float32"]),
        (rewritten(latents=np.zeros((3, 2, 64, 96), np.uint8)), ["latents", "[2, 2, 64, 96]", "[3, 2, 64, 96]"]),
        (rewritten(index_keys=np.zeros((2, 2, 64, 32), np.uint8)), ["index_keys", "[2, 2, 64, 64]", "64, 32]"]),
        (lambda path: save_file({}, path), ["holds no sequence"]),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage, words, tmp_path):
    cache, sequence = filled("float32")
    path = tmp_path / "sequence"
    cache.save(sequence, path)
    rewritten()(path)
    cache.free(cache.restore(path))  # what `rewritten` leaves alone is right
    damage(path)
    before = cache.sequences, cache.free_pages
    with pytest.raises(ValueError) as error:
        cache.restore(path)
    text = str(error.value)
    assert all(word in text for word in [*words, str(path)]) and "\n" not in text, text
    assert (cache.sequences, cache.free_pages) == before


def test_a_file_of_another_format_or_model_is_refused(tmp_path):
    cache, sequence = filled("bfloat16")
    path = tmp_path / "sequence"
    cache.save(sequence, path)
    for other, words in (
        (make(5, "float32"), "the cache's format 'float32', got 'bfloat16'"),
        (make(5, "bfloat16"), "must be uint8"),  # one layer, and narrower
        (
            make(5, "bfloat16", small_config(index_fp8=True, max_position_embeddings=256)),
            "index_keys in .* must be uint8",
        ),
    ):
        with pytest.raises(ValueError, match=words) as error:
            other.restore(path)
        assert str(path) in str(error.value) and not other.sequences
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cache.restore(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    """A limit on the size of files stands for the disk."""
    cache, sequence = filled("float32")
    path = tmp_path / "sequence"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write a sequence of 100 tokens to .*sequence") as error:
            cache.save(sequence, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["sequence"] and path.read_bytes() == b"before"


def test_an_interrupted_save_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(arrays, part, **_):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    cache, sequence = filled("float32")
    monkeypatch.setattr(module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.save(sequence, tmp_path / "sequence")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="nowhere"):
        cache.save(sequence, tmp_path / "nowhere" / "sequence")


def test_files_of_a_cache_on_a_mesh_are_refused(tmp_path):
    single = make()
    single.save(single.new(), tmp_path / "sequence")
    cache = PagedCache(TINY, 2, format="float32", mesh=make_mesh({"context": 2}, jax.devices()[:2]))
    with pytest.raises(ValueError, match="on a mesh cannot be saved"):
        cache.save(cache.new(), tmp_path / "other")
    with pytest.raises(ValueError, match="into a cache on a mesh"):
        cache.restore(tmp_path / "sequence")
    assert os.listdir(tmp_path) == ["sequence"]


# What steps read

MODEL = small_config(first_k_dense_replace=2, max_position_embeddings=192)  # no experts: they know nothing of caches
PROMPTS = [np.asarray(tokens(1, length, seed)[0]) for seed, length in enumerate([70, 5, 12])]


def runner(format, attention: Attention = "sparse", pages=9) -> Runner:
    """A runner over pages out of order, whose chunks end within prompts and pages."""
    config = dataclasses.replace(MODEL, index_fp8=format == "fp8")
    cache = PagedCache(config, pages, format=format)
    return Runner(small_model(config), cache, attention=attention, prefill_chunk=32)


def begin(runner) -> tuple[list[int], np.ndarray]:
    """Sequences with the prompts, the short one on its own (it attends densely), and the logits behind them."""
    first, short, last = (runner.cache.new() for _ in PROMPTS)
    alone = runner.prefill([short], PROMPTS[1:2]).logits
    packed = runner.prefill([first, last], [PROMPTS[0], PROMPTS[2]]).logits
    return [first, short, last], np.concatenate([packed, alone])


def continued(runner, sequences) -> list[np.ndarray]:
    """The logits of one more token, of three more, and behind ten more, which are packed into one row."""
    one = runner.extend([*sequences, None], np.full((4, 1), 7))[:3]
    three = runner.extend([*sequences, None], np.full((4, 3), 9))[:3]
    more = runner.prefill(sequences, [PROMPTS[0][:10]] * 3).logits
    return [np.asarray(x).reshape(3, -1) for x in (one, three, more)]


STEPS = the_first(1, [("float32", "sparse"), ("float32", "dense"), ("fp8", "sparse")])


@pytest.mark.slow
@pytest.mark.parametrize(("format", "attention"), STEPS)
def test_what_a_step_reads_is_its_own(format, attention):
    """Whatever pages held before, and whatever another sequence of the step holds, a sequence's logits are the same.

    Pools are filled with zeros, with NaN, and with NaN where other sequences have had pages; then one sequence's
    latents, or all that it has, are spoiled: its own logits are NaN, where it selects what is spoiled.
    """
    found = []
    for junk in (0, np.nan, "freed"):
        run = runner(format, attention)
        cache = run.cache
        if junk == "freed":
            old = [cache.new() for _ in range(3)]
            for sequence in old:
                cache.extend(sequence, 130)
            for sequence in (old[1], old[2], old[0]):
                cache.free(sequence)
        number = 0 if junk == 0 else np.nan
        fill(cache, number if format != "fp8" else 255 * (junk != 0), number)
        sequences, logits = begin(run)
        assert junk != "freed" or pages_of(cache, sequences[0]) != [1, 2]
        found.append([logits, *continued(run, sequences)])
    for logits in found[0]:
        assert np.isfinite(logits).all() and np.ptp(logits, axis=0).max() > 0.1
    for other in found[1:]:
        for logits, expected in zip(other, found[0], strict=True):
            same_bits(logits, expected)

    for spoiled in (1, 2):
        run = runner(format, attention)
        sequences, _ = begin(run)
        at = np.array(pages_of(run.cache, sequences[0]))
        junk = [x.at[:, at].set(255 if x.dtype == jnp.uint8 else jnp.nan) for x in pools(run.cache)]
        run.cache.update(*[*junk[:spoiled], *pools(run.cache)[spoiled:]])
        for logits, expected in zip(continued(run, sequences), found[0][1:], strict=True):
            same_bits(logits[1:], expected[1:])
            assert spoiled == 2 or np.isnan(logits[0]).all()
