"""Tests the top-k kernel: its own Python on NumPy threads, its plans and its lowering anywhere; itself on the card."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_simt
import pytest
import reference
from cases import array, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import dsa_jax
from dsa_jax import KeyRange
from dsa_jax.pallas_kernels.selection.select_topk import BINS, CONTROL_WORDS, EDGE_SCORES, Config, Plan, plan, why_not

kernel = importlib.import_module("dsa_jax.pallas_kernels.selection.select_topk")  # the door has a function of this name
INF, NAN = np.inf, np.nan
TINY = np.float32(1e-45)  # the least subnormal


@dataclasses.dataclass(frozen=True)
class SmallPlan(Plan):
    """Holds a plan whose buffer is so small that short rows make it prune."""

    room: int = 0  # beyond what the buffer needs at least

    @property
    def capacity(self):
        return -(-(self.k + self.warp_step + EDGE_SCORES + self.room) // 4) * 4

    @property
    def smem_words(self):
        emit = 2 * self.config.threads * 4 + self.k
        return -(-(max(BINS + 2 * self.capacity, emit) + CONTROL_WORDS) // 4) * 4


def run(p, scores, start=None, stop=None, *, blocks=1, seed=0, offset=0, count=None):
    """Runs the kernel's Python on NumPy threads, on rows [rows, S] that lie `offset` words off a vector's alignment."""
    rows, size = scores.shape
    start = np.zeros(rows, np.int32) if start is None else np.asarray(start, np.int32)
    stop = np.full(rows, size, np.int32) if stop is None else np.asarray(stop, np.int32)
    assert p.fits()
    machine = numpy_simt.Machine(p.config.threads, p.config.teams * p.smem_words, seed)
    arrays = machine.put(scores, offset), machine.put(start), machine.put(stop)
    out = machine.put(np.full((rows, p.k), 77, np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "simt", numpy_simt)
        patch.setattr(numpy_simt, "machine", machine, raising=False)
        for name in () if count is None else ("_prune", "_stream"):
            patch.setattr(kernel, name, counted(getattr(kernel, name), count, machine))
        for block in range(blocks):
            for team in range(p.config.teams):
                machine.first_thread = team * p.config.threads
                machine.barriers += 1  # nothing is shared with the team before, nor with the block before
                kernel.run_team(p, rows, blocks, block, *arrays, out, 0)
    return machine.gmem[out // 4 : out // 4 + rows * p.k].view(np.int32).reshape(rows, p.k)


def counted(function, count, machine):
    def call(*args):
        count[function.__name__] = count.get(function.__name__, 0) + int(machine.active.all())
        return function(*args)

    return call


def expected(scores, k, start=None, stop=None):
    rows, size = scores.shape
    start = np.zeros(rows, int) if start is None else start
    stop = np.full(rows, size) if stop is None else stop
    return reference.select_topk(scores[None], k, reference.reachable([start], [stop], size))[0]


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def small(size, k, room=100, **config):
    return SmallPlan(size, k, Config(**({"threads": 128, "teams": 1, "vectors": 2} | config)), room)


def row_of(kind, size, seed):
    """Makes rows that are easy to get wrong, by name."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(size).astype(np.float32)
    choice = lambda *values: random.choice(np.array(values, np.float32), size)
    with np.errstate(invalid="ignore"):
        return {
            "normal": lambda: x,
            "constant": lambda: np.full(size, random.choice([1.5, 0.0, -0.0, -3e38, INF, TINY])),
            "two values": lambda: choice(0, 1),
            "ascending": lambda: np.sort(x),
            "descending": lambda: -np.sort(-x),
            "sawtooth": lambda: np.arange(size) % random.integers(1, 50),
            "all -inf": lambda: np.full(size, -INF),
            "all NaN": lambda: np.full(size, NAN),
            "few": lambda: np.where(random.random(size) < 0.99, -INF, x),
            "NaN mixed": lambda: np.where(random.random(size) < 0.5, NAN, x),
            "zeros of both signs": lambda: choice(0.0, -0.0, 0.0, TINY, -TINY),
            "subnormal": lambda: random.integers(-2000, 2000, size) * TINY,
            "+inf": lambda: np.where(random.random(size) < 0.1, INF, x),
            "any bits": lambda: random.integers(0, 1 << 32, size, np.uint32).view(np.float32),
            "rounded": lambda: np.round(x * 4) / 4,
            "relu": lambda: np.maximum(x, 0),
            "cluster": lambda: x + 9 * (np.abs(np.arange(size) - random.integers(0, size)) < size // 50),
            "narrow": lambda: 1 + x * np.float32(1e-6),
        }[kind]().astype(np.float32)


KINDS = "normal constant ascending descending sawtooth few subnormal +inf rounded relu cluster narrow".split() + [
    "two values",
    "all -inf",
    "all NaN",
    "NaN mixed",
    "zeros of both signs",
    "any bits",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 300])
def test_hostile_rows(kind, k):
    row = row_of(kind, 9001, 1)[None]
    same_bits(run(small(9001, k), row), expected(row, k))


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_row_any_plan(data):
    """Sizes, ranges, alignments and buffers of all kinds: exact, and no race, deadlock or endless loop."""
    draw = data.draw
    size = draw(st.sampled_from([1, 2, 3, 5, 31, 64, 1000, 4097, 12000])) + draw(st.integers(0, 3))
    k = draw(st.sampled_from([1, 2, 7, 64, 257, 500]))
    config = Config(
        threads=draw(st.sampled_from([128, 256])),
        teams=1,
        vectors=draw(st.sampled_from([1, 2, 4])),
        margin=draw(st.sampled_from([None, 0.0, 1.0, 6.0])),
    )
    p = SmallPlan(size, k, config, draw(st.sampled_from([0, 100, 1000])))
    seed = draw(st.integers(0, 99))
    scores = np.stack([row_of(draw(st.sampled_from(KINDS)), size, seed + i) for i in range(2)])
    edges = [draw(st.integers(-5, size + 5)) for _ in range(4)] if draw(st.booleans()) else [0, 0, size, size]
    start, stop = np.array(edges[:2], np.int32), np.array(edges[2:], np.int32)
    got = run(p, scores, start, stop, seed=seed, offset=draw(st.integers(0, 3)))
    same_bits(got, expected(scores, k, start, stop))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "k", "config"),
    [
        (32768, 2048, None),
        (131072, 2048, None),
        (131073, 4096, None),
        (40003, 8192, None),
        (40003, 1000, Config(threads=128, teams=8)),
        (40003, 1000, Config(threads=512, teams=2)),
        (40003, 1000, Config(threads=512, teams=1, vectors=8)),
        (40003, 1000, Config(vectors=1, margin=None)),
        (200003, 500, Config(threads=128, teams=4, vectors=1)),  # several bitmaps a row
    ],
)
def test_plans_of_the_real_size(size, k, config):
    scores = noise(0, 2, size)
    same_bits(run(plan(size, k, config), scores), expected(scores, k))


def test_rows_are_dealt_to_blocks_and_teams():
    p = small(700, 9, teams=3)
    scores = noise(1, 23, 700)
    for blocks in (1, 2, 5):
        same_bits(run(p, scores, blocks=blocks), expected(scores, 9))


def test_any_order_of_the_warps_gives_the_same_bits():
    scores = np.stack([row_of(kind, 9001, 2) for kind in ("normal", "rounded", "two values")])
    results = {run(small(9001, 200, room=0), scores, seed=seed).tobytes() for seed in range(5)}
    assert results == {expected(scores, 200).tobytes()}


def test_what_lies_outside_of_the_range_does_not_matter():
    scores, start, stop = noise(3, 3, 6000), np.array([5, 1000, 4099]), np.array([5990, 1003, 4100])
    outside = (np.arange(6000) < start[:, None]) | (np.arange(6000) >= stop[:, None])
    for value in (NAN, INF, -INF, 1e30):
        got = run(small(6000, 50), np.where(outside, np.float32(value), scores), start, stop)
        same_bits(got, expected(scores, 50, start, stop))


def test_a_guess_spares_prunes_and_one_that_is_too_high_is_taken_back():
    count = {}
    scores = noise(4, 1, 30000)
    run(small(30000, 300, room=600), scores, count=count)
    assert count == {"_stream": 1, "_prune": 1}, "only the last prune, to k exactly"
    count = {}
    run(small(30000, 300, room=600, margin=None), scores, count=count)
    assert count["_stream"] == 1 and count["_prune"] > 3
    # The sample, 16 scores of every 30000 / 64, sees nothing but the few high ones.
    group = np.arange(64) * 7500 >> 6
    scores[0, (4 * group[:, None] + np.arange(16)).ravel()[:1000]] += 99
    count = {}
    p = small(30000, 1000 + 500, room=3000, margin=0.0)
    same_bits(run(p, scores, count=count), expected(scores, p.k))
    assert count["_stream"] == 2, "the second without a guess"


def test_equal_scores_do_not_prune_without_end():
    """After a prune only what exceeds the k-th best enters in later steps: a row of few values prunes few times."""
    for row, most in ((np.ones(60000), 3), (np.arange(60000) * 5 // 60000, 15)):
        count = {}
        scores = row.astype(np.float32)[None]
        same_bits(run(small(60000, 400, room=1000, margin=None), scores, count=count), expected(scores, 400))
        assert count["_prune"] <= most, "of the 59 steps"


@pytest.mark.parametrize("skipped", range(5))
def test_races_are_seen(skipped, monkeypatch):
    """The NumPy threads are a test of the barriers, too."""
    plain, calls = kernel._Team.barrier, iter(range(10**9))
    skip_one = lambda team: None if next(calls) == skipped else plain(team)
    monkeypatch.setattr(kernel._Team, "barrier", skip_one)
    with pytest.raises(AssertionError, match="race"):
        run(small(9001, 100), noise(5, 2, 9001))


# Plans and arguments.


@pytest.mark.parametrize("k", [1, 64, 2048, 4096, 5000, 8192])
@pytest.mark.parametrize("size", [1, 63, 32768, 131072, 1 << 20, kernel.MAX_ROW_SCORES])
def test_plans_fit_the_shared_memory(size, k):
    p = plan(size, k)
    assert p.fits()
    assert p.config.threads * p.config.teams == 1024, "64 registers a thread, all of the multiprocessor's"
    assert 4 * p.config.teams * p.smem_words <= 227 * 1024
    assert BINS + 2 * p.capacity + CONTROL_WORDS <= p.smem_words
    assert 2 * p.config.threads * p.bitmap_words + k + CONTROL_WORDS <= p.smem_words
    assert k <= p.target <= p.limit - p.warp_step, "a prune makes room for a warp's step: progress"
    assert p.limit + EDGE_SCORES == p.capacity
    assert p.smem_words % 4 == 0 and p.capacity % 4 == 0, "16-byte accesses"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"threads": 96}, "threads must be 128, 256 or 512, got 96"),
        ({"teams": 5}, "teams must be 1 to 4 of 256, got 5"),
        ({"teams": 0}, "teams must be 1 to 4 of 256, got 0"),
        ({"vectors": 3}, "vectors must be 1, 2, 4 or 8, got 3"),
        ({"margin": -1.0}, "margin must be None or within 0 to 100, got -1.0"),
        ({"blocks": 0}, "blocks must be None or at least 1, got 0"),
    ],
)
def test_configs_validate_themselves(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)


def shapes(batch, length, size, dtype=jnp.float32):
    edges = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return jax.ShapeDtypeStruct((batch, length, size), dtype), edges, edges


@pytest.mark.parametrize(
    ("arguments", "k", "config", "message"),
    [
        (shapes(1, 2, 9, jnp.bfloat16), 4, None, "needs scores .* in float32, got bfloat16"),
        ((shapes(1, 2, 9)[0], *shapes(1, 3, 9)[1:]), 4, None, "needs start .* in int32, got int32"),
        ((*shapes(1, 2, 9)[:2], jax.ShapeDtypeStruct((1, 2), jnp.float32)), 4, None, "needs stop .* got float32"),
        (shapes(1, 2, 9), 0, None, "needs k of at least 1, got 0"),
        (shapes(1, 2, 9), 8193, None, "takes k of at most 8192, got 8193"),
        (shapes(1, 2, (1 << 24) + 1), 4, None, "takes rows of at most 16777216 scores, got 16777217"),
        (shapes(1 << 16, 1 << 15, 1), 4, None, "takes fewer than 2\\*\\*31 rows"),
        (shapes(1, 2, 9), 4096, Config(threads=128, teams=8), "has no shared memory for k = 4096"),
    ],
)
def test_what_the_kernel_cannot_take(arguments, k, config, message):
    scores, start, stop = arguments
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: kernel.select_topk(x[0], k, start=x[1], stop=x[2], config=config), *arguments)
    assert why_not(scores, k, start=start, stop=stop, config=config)


def test_what_the_kernel_can_take():
    for size, k in ((1, 4096), (131072, 2048), (1 << 20, 4096), (0, 3)):
        scores, start, stop = shapes(2, 70000, size)
        assert why_not(scores, k, start=start, stop=stop) is None


def test_no_scores_at_all():
    for batch, length, size in ((1, 3, 0), (0, 3, 5), (2, 0, 5)):
        edges = jnp.zeros((batch, length), jnp.int32)
        out = kernel.select_topk(jnp.zeros((batch, length, size)), 4, start=edges, stop=edges)
        same_bits(out, np.full((batch, length, 4), -1, np.int32))


@pytest.mark.parametrize(
    ("shape", "k", "config"),
    [
        ((1, 1024, 131072), 2048, None),
        ((1, 4096, 32768), 2048, None),
        ((2, 5, 1 << 20), 4096, None),
        ((1, 20000, 131073), 4096, None),  # more than 2**31 scores
        ((1, 100000, 63), 8, None),
        ((3, 7, 1), 1, None),
        ((1, 9, 5000), 8192, None),
        ((1, 9, 50000), 64, Config(threads=128, teams=8, vectors=2, margin=None)),
    ],
)
def test_it_lowers_for_cuda(shape, k, config):
    f = jax.jit(lambda scores, start, stop: kernel.select_topk(scores, k, start=start, stop=stop, config=config))
    lowered = f.trace(*shapes(*shape)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.shape == (*shape[:2], k)


# On the card, bitwise against XLA.


@jax.jit
def _with_bits(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def on_card(scores, k, start=None, stop=None, config=None):
    """Compares both implementations; scores go there as bits, so that nothing on the way flushes or quiets them."""
    if isinstance(scores, np.ndarray):
        scores = _with_bits(array(scores.view(np.uint32)))
    batch, length, size = scores.shape
    start = jnp.zeros((batch, length), jnp.int32) if start is None else array(start, jnp.int32)
    stop = jnp.full((batch, length), size, jnp.int32) if stop is None else array(stop, jnp.int32)
    got = jax.jit(kernel.select_topk, static_argnames=("k", "config"))(scores, k, start=start, stop=stop, config=config)
    same_bits(got, dsa_jax.select_topk(scores, k, keys=KeyRange(start, stop), implementation="xla"))
    return got


def random_edges(seed, batch, length, size):
    edges = np.random.default_rng(seed).integers(-9, size + 10, (2, batch, length))
    return edges.astype(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_on_the_card(seed):
    random = np.random.default_rng(seed)
    size = int(random.choice([1, 2, 3, 63, 1000, 4099, 32768, 50000, 131072])) + int(random.integers(0, 4))
    k = int(random.choice([1, 2, 17, 64, 500, 2048, 4096]))
    batch, length = int(random.integers(1, 4)), int(random.integers(1, 60))
    scores = noise(seed, batch, length, size)
    if random.random() < 0.5:
        scores = np.round(scores * 8) / 8
    on_card(scores, k, *(random_edges(seed, batch, length, size) if random.random() < 0.7 else ()))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 300, 2048, 4096, 8192])
def test_hostile_rows_on_the_card(k):
    scores = np.stack([row_of(kind, 40003, 7) for kind in KINDS])[None]
    on_card(scores, k)
    on_card(scores, k, *random_edges(k, 1, len(KINDS), 40003))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        Config(threads=128, teams=8),
        Config(threads=512, teams=2),
        Config(threads=512, teams=1, vectors=8),
        Config(vectors=1, margin=None),
        Config(margin=0.0),
        Config(blocks=7),
    ],
)
def test_configs_change_no_bit_on_the_card(config):
    on_card(np.stack([row_of(kind, 40003, 8) for kind in KINDS])[None], 1000, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1024, 131072), 2048), ((1, 4096, 32768), 2048), ((1, 9, 1 << 20), 4096), ((1, 70000, 63), 8)],
)
def test_real_sizes_on_the_card(shape, k):
    scores = jax.random.normal(jax.random.key(0), shape)
    on_card(scores, k)
    on_card(scores, k, *random_edges(1, *shape))


@pytest.mark.gpu
def test_more_scores_than_32_bits_can_count_on_the_card():
    """Rows beyond 2**31 elements, and 2**33 bytes."""
    length, size = 16500, 131072
    scores = jax.random.normal(jax.random.key(1), (1, length, size))
    got = kernel.select_topk(
        scores, 256, start=jnp.zeros((1, length), jnp.int32), stop=jnp.full((1, length), size, jnp.int32)
    )
    for row in (0, 16383, 16384, length - 1):
        same_bits(got[:, row], dsa_jax.select_topk(scores[:, row : row + 1], 256, implementation="xla")[:, 0])


@pytest.mark.gpu
def test_the_same_bits_in_20_runs_alone_and_together_on_the_card():
    scores = np.stack([row_of(kind, 32771, 9) for kind in KINDS])[None]
    first = np.asarray(on_card(scores, 500))
    for _ in range(20):
        same_bits(on_card(scores, 500), first)
    for row in range(len(KINDS)):
        same_bits(on_card(scores[:, row : row + 1], 500)[:, 0], first[:, row])


@pytest.mark.gpu
def test_what_lies_outside_of_the_range_does_not_matter_on_the_card():
    scores, (start, stop) = noise(3, 1, 100, 20000), random_edges(4, 1, 100, 20000)
    at = np.arange(20000)
    outside = (at < start[..., None]) | (at >= stop[..., None])
    first = on_card(scores, 300, start, stop)
    for value in (NAN, INF, 1e30):
        same_bits(on_card(np.where(outside, np.float32(value), scores), 300, start, stop), first)
