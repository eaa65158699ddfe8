"""Tests the top-k of a few long rows: its own Python on NumPy threads, its lowering, and itself on the card."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_cluster
import numpy_simt
import pytest
import reference
from cases import array, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.pallas_kernels.decode.few_rows_plan import Config, Plan
from dsa_jax.pallas_kernels.decode.select_few_rows import why_not

kernel = importlib.import_module("dsa_jax.pallas_kernels.decode.select_few_rows")
INF, NAN = np.inf, np.nan
TINY = np.float32(1e-45)  # the least subnormal
SMALL = Config(blocks=2, threads=256)


def run(scores, k, start=None, stop=None, *, table=None, queries=1, config=SMALL, seed=0):
    """Runs the kernel's Python on NumPy threads, on rows [rows, S]."""
    rows, size = scores.shape
    start = np.zeros(rows, np.int32) if start is None else np.asarray(start, np.int32)
    stop = np.full(rows, size, np.int32) if stop is None else np.asarray(stop, np.int32)
    scores = covered(scores, start, stop)
    p = Plan(size, k, queries, 0 if table is None else table.shape[1], config)
    out = []
    for row in range(rows):
        machine = numpy_cluster.Machine(config.blocks, config.threads, p.smem_words, seed + row)
        arrays = [machine.put(x) for x in (scores, start, stop)]
        at = None if table is None else machine.put(table)
        result = machine.put(np.full((rows, k), 77, np.int32))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "simt", numpy_simt)
            patch.setattr(kernel, "cluster", numpy_cluster)
            numpy_cluster.install(patch, machine)
            kernel.run_block(p, *arrays, at, result, 0, numpy_simt.i32(row), numpy_cluster.rank())
        out.append(machine.gmem[result // 4 + row * k : result // 4 + (row + 1) * k].view(np.int32))
    return np.stack(out)


def covered(scores, start, stop):
    """Puts -inf around the ranges, as far as the kernel may read there, and NaN and +inf beyond."""
    at = np.arange(scores.shape[-1])
    start, stop = (np.asarray(x)[..., None] for x in (start, stop))
    near = (at >= start // 32 * 32) & (at < -(-stop // 4) * 4)
    return np.where((at >= start) & (at < stop), scores, np.where(near, -INF, np.where(at % 2, NAN, INF))).astype(
        np.float32
    )


def expected(scores, k, start=None, stop=None):
    rows, size = scores.shape
    start = np.zeros(rows, int) if start is None else start
    stop = np.full(rows, size) if stop is None else stop
    return reference.select_topk(scores[None], k, reference.reachable([start], [stop], size))[0]


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
            "negative": lambda: -1 - np.abs(x),
            "lowest": lambda: np.where(random.random(size) < 0.5, -np.finfo(np.float32).max, x),
        }[kind]().astype(np.float32)


KINDS = [
    "normal", "constant", "two values", "ascending", "descending", "all -inf", "all NaN", "few", "NaN mixed", "lowest",
    "zeros of both signs", "subnormal", "+inf", "any bits", "rounded", "relu", "cluster", "narrow", "negative",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 300])
def test_hostile_rows(kind, k):
    row = row_of(kind, 9024, 1)[None]
    same_bits(run(row, k), expected(row, k))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_row_any_plan(data):
    """Sizes, ranges, clusters of all kinds: exact, and no race, deadlock or endless loop."""
    draw = data.draw
    size = draw(st.sampled_from([4, 8, 64, 1000, 4096, 12000, 40000]))
    k = draw(st.sampled_from([1, 2, 7, 64, 257, 2048]))
    config = Config(draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([256, 512])))
    seed = draw(st.integers(0, 99))
    scores = row_of(draw(st.sampled_from(KINDS)), size, seed)[None]
    edges = [draw(st.integers(-5, size + 5)) for _ in range(2)] if draw(st.booleans()) else [0, size]
    got = run(scores, k, edges[:1], edges[1:], config=config, seed=seed)
    same_bits(got, expected(scores, k, np.array(edges[:1]), np.array(edges[1:])))


def test_rows_longer_than_the_registers_are_read_again():
    scores = np.stack([row_of(kind, 9024, 3) for kind in ("normal", "rounded", "relu")])
    config = Config(blocks=1, threads=256)
    assert Plan(9024, 300, config=config).share > Plan(9024, 300, config=config).in_registers
    same_bits(run(scores, 300, config=config), expected(scores, 300))


def test_a_sample_that_sees_only_the_highest_is_taken_back():
    size, config = 16384, SMALL
    place = (np.arange(config.threads) * size // config.threads)[:, None] + np.arange(4)
    scores = row_of("normal", size, 4)[None]
    scores[0, place.ravel()] += 99
    same_bits(run(scores, 1500), expected(scores, 1500))


def test_positions_come_out_as_slots():
    scores = np.stack([row_of(kind, 640, 5) for kind in ("normal", "few", "rounded", "all NaN")])
    table = np.random.default_rng(6).permutation(100)[:20].reshape(2, 10).astype(np.int32)
    want = expected(scores, 50)
    at = np.maximum(want, 0)
    slots = np.where(want < 0, -1, table[np.arange(4)[:, None] // 2, at // 64] * 64 + at % 64).astype(np.int32)
    same_bits(run(scores, 50, table=table, queries=2), slots)


@pytest.mark.parametrize("skipped", range(6))
def test_races_are_seen(skipped, monkeypatch):
    """The NumPy threads are a test of the barriers of a block, too."""
    plain, calls = kernel._Block.barrier, iter(range(10**9))
    monkeypatch.setattr(kernel._Block, "barrier", lambda block: None if next(calls) == skipped else plain(block))
    with pytest.raises(AssertionError, match="race"):
        run(row_of("normal", 9024, 5)[None], 100)


@pytest.mark.parametrize("skipped", range(3))
def test_races_between_blocks_are_seen(skipped, monkeypatch):
    plain, calls = numpy_cluster.barrier, iter(range(10**9))
    of_block = lambda: numpy_simt.barrier(numpy_simt.i32(1), SMALL.threads)
    barrier = lambda: of_block() if next(calls) == skipped else plain()

    monkeypatch.setattr(numpy_cluster, "barrier", barrier)
    with pytest.raises(AssertionError, match="race"):
        run(row_of("normal", 9024, 5)[None], 100)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks": 3}, "blocks must be 1, 2, 4 or 8, got 3"),
        ({"threads": 128}, "threads must be 256, 512 or 1024, got 128"),
    ],
)
def test_configs_validate_themselves(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)


def shapes(batch, length, size, dtype=jnp.float32):
    edges = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return jax.ShapeDtypeStruct((batch, length, size), dtype), edges, edges


def select(scores, start, stop, table=None, *, k, config=None):
    return kernel.select_few_rows(scores, k, start=start, stop=stop, table=table, config=config)


@pytest.mark.parametrize(
    ("arguments", "k", "message"),
    [
        (shapes(1, 2, 8, jnp.bfloat16), 4, "scores must be float32 .* got bfloat16"),
        (shapes(1, 2, 0), 4, r"not empty, got float32 \[1, 2, 0\]"),
        (shapes(1, 2, 9), 4, "S must be a multiple of 4 up to 2097152, got 9"),
        (shapes(1, 2, 1 << 22), 4, "S must be a multiple of 4"),
        (shapes(1, 2, 8), 0, "k must be at least 1, got 0"),
        ((shapes(1, 2, 8)[0], *shapes(1, 3, 8)[1:]), 4, "start must be int32"),
        ((*shapes(1, 2, 8)[:2], jax.ShapeDtypeStruct((1, 2), jnp.float32)), 4, "stop must be int32 .* got float32"),
        ((*shapes(1, 2, 8), jax.ShapeDtypeStruct((1, 2), jnp.int32)), 4, r"table must be int32 \[1, 1\]"),
        (shapes(1 << 15, 1 << 14, 4), 4, "must be below 2\\^31, got 536870912 rows"),
    ],
)
def test_what_the_kernel_cannot_take(arguments, k, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: select(*x, k=k), *arguments)
    scores, start, stop, *table = arguments
    assert why_not(scores, k, start=start, stop=stop, table=table[0] if table else None)


@pytest.mark.parametrize(
    ("shape", "k", "slots", "config"),
    [
        ((1, 1, 131072), 2048, True, None),
        ((16, 4, 131072), 2048, False, Config(4, 512)),
        ((2, 2, 1 << 20), 8192, True, None),
        ((1, 1, 4), 9, False, None),
    ],
)
def test_it_lowers_for_cuda(shape, k, slots, config):
    tables = (jax.ShapeDtypeStruct((shape[0], -(-shape[2] // 64)), jnp.int32),) if slots else ()
    traced = jax.jit(lambda *x: select(*x, k=k, config=config)).trace(*shapes(*shape), *tables)
    lowered = traced.lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.shape == (*shape[:2], k)


# On the card, bitwise against NumPy.


def on_card(scores, k, start=None, stop=None, config=None):
    rows, size = scores.shape
    start = np.zeros(rows, np.int32) if start is None else np.asarray(start, np.int32)
    stop = np.full(rows, size, np.int32) if stop is None else np.asarray(stop, np.int32)
    bits = array(covered(scores, start, stop).view(np.uint32))[:, None]
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
    call = jax.jit(lambda bits, *edges: select(as_float(bits), *edges, k=k, config=config))
    got = np.asarray(call(bits, start[:, None], stop[:, None]))[:, 0]
    same_bits(got, expected(scores, k, start, stop))
    return got


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 300, 2048, 9000])
def test_hostile_rows_on_the_card(k):
    scores = np.stack([row_of(kind, 40000, 7) for kind in KINDS])
    on_card(scores, k)
    on_card(scores, k, *np.random.default_rng(k).integers(-9, 40010, (2, len(KINDS))))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [4, 64, 1000, 131072, 1 << 20])
def test_real_sizes_on_the_card(size):
    scores = np.stack([row_of(kind, size, 8) for kind in ("normal", "rounded", "relu", "narrow")])
    on_card(scores, 2048)
    on_card(scores, 2048, *np.random.default_rng(size).integers(-9, size + 10, (2, 4)))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(1), Config(2, 1024), Config(4, 256), Config(8, 1024)])
def test_configs_change_no_bit_on_the_card(config):
    on_card(np.stack([row_of(kind, 40000, 9) for kind in KINDS]), 1000, config=config)


@pytest.mark.gpu
def test_the_same_bits_in_20_runs_alone_and_together_on_the_card():
    scores = np.stack([row_of(kind, 32768, 9) for kind in KINDS])
    first = on_card(scores, 500)
    for _ in range(20):
        same_bits(on_card(scores, 500), first)
    for row in range(len(KINDS)):
        same_bits(on_card(scores[row : row + 1], 500)[0], first[row])
