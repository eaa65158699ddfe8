"""Tests the top-k of a few long rows: its own Python on NumPy threads, its plans and its lowering; itself on the card."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_cluster
import numpy_simt
import pytest
import reference
from cases import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.pallas_kernels.decode.select_few_rows import Config, Plan, why_not

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
    "normal", "constant", "two values", "ascending", "descending", "all -inf", "all NaN", "few", "NaN mixed",
    "zeros of both signs", "subnormal", "+inf", "any bits", "rounded", "relu", "cluster", "narrow", "negative", "lowest",
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
