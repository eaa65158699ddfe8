"""Checks and times sparse attention over pages, of a few tokens a sequence, on one Hopper GPU.

  python -m benchmarks.decode_attention                  # everything; writes benchmarks/results/decode_attention.json
  python -m benchmarks.decode_attention --only times     # a part alone, merged into the file

Every case is compared with float64 or float32 from the definition. One that fails is recorded, and the next one runs.
Times are of calls in one program, each after the other, over rows that do not fit the L2 cache together.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from benchmarks import measure
from dsa_jax.pallas_kernels.decode import (
    attention_few_heads,
    half_query,
)
from dsa_jax.pallas_kernels.decode.paged_sparse_attention import paged_sparse_attention

OUT = measure.RESULTS / "decode_attention.json"
LENGTH, K, SCALE = 32768, 2048, 576**-0.5
POOL_PAGES = 110_000  # 4.6 GB, beyond what 32 bits address
CHAIN = {1: (40, 120), 16: (8, 32), 32: (4, 16)}  # sets of inputs, and calls of a chain, by batch
LONG_CHAIN = (3, 12)  # of all others

# (heads, batch, microseconds not to exceed and to aim at) of one token a sequence, as it runs by default.
TIMES = [
    (128, 1, 14, 11.5),
    (128, 16, 38, 28),
    (128, 128, 175, 135),
    (64, 128, None, None),
    (32, 128, None, None),
    (16, 1, 11.5, 9),
    (16, 16, 23, 17),
    (16, 128, 90, 68),
    (8, 128, None, None),
]
# (what differs, heads, batch, tokens, splits, config)
VARIANTS: list[tuple[str, int, int, int, int | None, Any]] = [
    ("4 tokens", 128, 16, 4, None, None),
    ("attention_few_heads", 16, 128, 1, 1, attention_few_heads.Config()),
]
# (heads, splits, type of pages) of what is checked with hostile data
HOSTILE_SHAPES = [(64, 1, "fp8"), (64, 3, "fp8"), (128, 5, "fp8"), (8, 1, "fp8"), (16, 1, "fp8"), (16, 2, "fp8")]
HOSTILE_SHAPES += [(16, 5, "fp8"), (32, 1, "fp8"), (64, 3, "bfloat16"), (8, 2, "bfloat16")]
HOSTILE = (
    "plain", "absent", "empty", "tenths", "tiny", "large", "mixed", "groups", "zero", "negative", "edges", "nan latent",
    "nan rotary", "nan scale", "nan query", "large query", "inf scale",
)  # fmt: skip


def attend(config, splits, q, table, indices, pages, after=None):
    """Calls what is checked and timed."""
    return paged_sparse_attention(q, pages, table, indices, scale=SCALE, splits=splits, config=config, after=after)


# Inputs.


@functools.cache
def pool():
    """Makes the pages of the real shapes once."""
    return make_pages(jax.random.key(0), POOL_PAGES)


def make_pages(key, pages):
    """Makes FP8 pages of normal latents, quantised with powers of two."""

    @functools.partial(jax.jit, static_argnames="rows")
    def make(key, rows):
        a, b = jax.random.split(key)
        x = jax.random.normal(a, (rows, 4, 128), jnp.bfloat16).astype(jnp.float32)
        scale = jnp.exp2(jnp.ceil(jnp.log2(jnp.max(jnp.abs(x), -1) / 448.0)))
        values = (x / scale[..., None]).astype(jnp.float8_e4m3fn).reshape(rows, 512)
        rotary = jax.random.normal(b, (rows, 64), jnp.bfloat16)

        def bits(x):
            return lax.bitcast_convert_type(x, jnp.uint8).reshape(rows, -1)

        return jnp.concatenate([bits(values), bits(scale), bits(rotary)], axis=1).reshape(-1, 64, 656)

    return make(key, pages * 64)


def dequantised(rows):
    """Reads FP8 rows [..., 656] as float32 [..., 576]."""

    def read(x, dtype):
        return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, jnp.dtype(dtype).itemsize), dtype)

    values = lax.bitcast_convert_type(rows[..., :512], jnp.float8_e4m3fn).astype(jnp.float32)
    scale = jnp.repeat(read(rows[..., 512:528], jnp.float32), 128, -1)
    return jnp.concatenate([values * scale, read(rows[..., 528:], jnp.bfloat16).astype(jnp.float32)], -1)


def make_inputs(seed, batch, tokens, heads, absent=0):
    """Makes q, table and indices, of which the last `absent` of each query are -1."""
    random = np.random.default_rng(seed)
    q = jax.random.normal(jax.random.key(seed), (batch, tokens, heads, 576), jnp.bfloat16)
    pages = LENGTH // 64
    table = random.permutation(POOL_PAGES)[: batch * pages].reshape(batch, pages).astype(np.int32)
    step = LENGTH // K  # one of so many keys is selected
    indices = np.arange(K) * step + random.integers(0, step, (batch, tokens, K))
    indices = indices.astype(np.int32)
    if absent:
        indices[..., -absent:] = -1
    return q, jnp.asarray(table), jnp.asarray(indices)


@functools.partial(jax.jit, static_argnames="queries")
def reference(q, table, indices, pages, queries):
    """Computes the last queries in float32: out [queries, N, 512], lse."""
    tokens = q.shape[1]

    def one(i):
        b, t = i // tokens, i % tokens
        ids = indices[b, t]
        at = jnp.clip(ids, 0)
        rows = pages[table[b, at // 64], at % 64]
        kv = dequantised(rows) if pages.dtype == jnp.uint8 else rows.astype(jnp.float32)
        s = jnp.einsum("nh,kh->nk", q[b, t].astype(jnp.float32), kv, precision="highest") * SCALE
        s = jnp.where(ids[None] >= 0, s, -jnp.inf)
        lse = jax.nn.logsumexp(s, axis=1)
        return jnp.einsum("nk,kc->nc", jnp.exp(s - lse[:, None]), kv[:, :512], precision="highest"), lse

    total = q.shape[0] * tokens
    return lax.map(one, jnp.arange(total - queries, total))


def relative(a, b):
    """Computes the relative error in the 2-norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Checks. Each gives its row.


def check_hostile(compiled, heads, kind) -> dict[str, Any]:
    """Compares a small shape, once it is compiled, with float64 on all kinds of hostile data."""
    call, wrong, errors = compiled.result(), [], {"out": 0.0, "lse": 0.0}
    for case in HOSTILE:
        found = hostile_case(call, heads, kind, case)
        if not found.pop("right"):
            wrong.append(case)
        errors = {name: max(error, found.get(name, 0.0)) for name, error in errors.items()}
    return {"right": not wrong, "kinds": len(HOSTILE), "wrong": wrong} | errors


def compile_hostile(shape):
    """Compiles the call of a small shape."""
    heads, splits, kind = shape
    s = jax.ShapeDtypeStruct
    pages = s((40, 64, 656), jnp.uint8) if kind == "fp8" else s((40, 64, 576), jnp.bfloat16)
    arguments = s((2, 2, heads, 576), jnp.bfloat16), s((2, 6), jnp.int32), s((2, 2, 300), jnp.int32), pages
    return jax.jit(functools.partial(attend, None, splits)).lower(*arguments).compile()


def hostile_case(call, heads, kind, case) -> dict[str, Any]:
    """Runs a compiled call on one kind of hostile data; gives the largest errors, and whether that is right."""
    random = np.random.default_rng(7)
    bf16 = ml_dtypes.bfloat16
    e4m3 = random.integers(0, 256, (40, 64, 512), dtype=np.uint8)
    e4m3[(e4m3 & 0x7F) == 0x7F] = 0x30
    scale = np.exp2(random.integers(-8, -4, (40, 64, 4))).astype(np.float32)
    q = random.standard_normal((2, 2, heads, 576)).astype(bf16)
    rotary = random.standard_normal((40, 64, 64)).astype(bf16)
    table = random.permutation(40)[:12].reshape(2, 6).astype(np.int32)
    indices = np.stack([np.sort(random.permutation(384)[:300]) for _ in range(4)]).reshape(2, 2, 300).astype(np.int32)
    latent_size = {"large": 7e-3, "mixed": 2e-3, "groups": 5e-3, "edges": 2e-4}.get(
        case, 1.0
    )  # of q: for modest logits
    q[..., :512] = (q[..., :512].astype(np.float32) * latent_size).astype(bf16)
    if case in ("large", "mixed", "groups"):
        e4m3 &= 0x8F  # up to 0.03
    if case in ("absent", "nan latent", "nan rotary", "nan scale"):
        indices[:, :, ::3] = random.choice([-1, 384, 2**31 - 1, -(2**31)], indices[:, :, ::3].shape)
    if case == "empty":
        indices[0, 1], indices[1, 0, 64:] = -1, -1
    if case == "zero":
        scale[random.random(scale.shape) < 0.3] = 0
    scales = {
        "tenths": (0.1,), "tiny": (2.0**-30,), "large": (3.7e4,), "mixed": (2.0**-30, 0.1, 2.0**-7, 3.7e4),
        "edges": (2.0**-15, 2.0**7, 1.9 * 2.0**-15, 2.0**-16, 2.0**8),
    }  # fmt: skip
    if case in scales:
        scale = random.choice(np.array(scales[case], np.float32), scale.shape)
    if case == "groups":
        scale *= np.array([2.0**-30, 1, 1e-3, 2.0**14], np.float32)
    if case == "negative":
        scale = -scale
    there = (indices[0, 0] >= 0) & (indices[0, 0] < 384)
    reached = indices[0, 0][there][5]  # a position that sequence 0's first query selects
    page, row = table[0, reached // 64], reached % 64
    if case == "nan latent":
        e4m3[page, row, 200] = 0x7F
    if case == "nan rotary":
        rotary[page, row, 3] = np.nan
    if case == "nan scale":
        scale[page, row, 1] = np.nan
    if case == "inf scale":
        scale[page, row, 1] = np.inf
    if case == "nan query":
        q[0, 0, 1, 7] = np.nan
    if case == "large query":
        q[0, 0, 1, 7], q[1, 1, 2, 9] = 1e5, -7e4
    with np.errstate(all="ignore"):
        latent = e4m3.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.repeat(scale, 128, -1).astype(np.float64)
        rows = np.concatenate([latent, rotary.astype(np.float64)], -1)
        if kind == "fp8":
            pages = np.concatenate([e4m3, scale.view(np.uint8), rotary.view(np.uint8)], -1)
        else:
            pages = rows.astype(bf16)
            rows = pages.astype(np.float64)
        present = (indices >= 0) & (indices < 384)
        at = np.where(present, indices, 0)
        got_out, got_lse = (np.asarray(x, np.float64) for x in call(q, table, indices, pages))
        want_out, want_lse = np.zeros_like(got_out), np.zeros_like(got_lse)
        for b in range(2):
            for t in range(2):
                kv = rows[table[b, at[b, t] // 64], at[b, t] % 64][present[b, t]]
                s = q[b, t].astype(np.float64) @ kv.T * SCALE
                top = np.max(s, 1, initial=-np.inf)
                p = np.exp(s - np.where(np.isfinite(top), top, 0)[:, None])
                want_lse[b, t] = np.where(np.isfinite(top), top, 0) + np.log(p.sum(1))
                want_out[b, t] = np.where(p.sum(1)[:, None] == 0, 0, p @ kv[:, :512] / p.sum(1)[:, None])
    if case in ("large query", "inf scale"):  # not finite is all that is asked for
        heads_hit = {"large query": [(0, 0, 1), (1, 1, 2)]}.get(case) if kind == "fp8" else []
        if heads_hit is None:
            heads_hit = [(0, 0, n) for n in range(heads)]
        bad = sum(np.isfinite(got_lse[i]) for i in heads_hit)
        return {"right": int(bad) == 0}
    nan_same = np.array_equal(np.isnan(got_lse), np.isnan(want_lse))
    nan_same &= np.array_equal(np.isnan(got_out).any(-1), np.isnan(want_out).any(-1))
    finite = np.isfinite(want_lse) & np.isfinite(got_lse)
    empty_same = np.array_equal(np.isneginf(got_lse), np.isneginf(want_lse))
    clean = finite & ~np.isnan(want_out).any(-1)
    lse_error = float(np.max(np.abs(got_lse[finite] - want_lse[finite]) / (1 + np.abs(want_lse[finite])), initial=0))
    # Each group of 128 columns has an error of its own, so that small ones count too.
    errors = []
    for group in range(4):
        columns = slice(128 * group, 128 * group + 128)
        a, b = got_out[clean][:, columns], want_out[clean][:, columns]
        errors.append(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)))
    right = nan_same and empty_same and max(errors) < 8e-3 and lse_error < 4e-3
    return {"right": bool(right), "out": max(errors), "lse": lse_error}


def check_shape(heads, batch, tokens) -> dict[str, Any]:
    """Compares a real shape with float32, and repeats its bits."""
    q, table, indices = make_inputs(3, batch, tokens, heads, absent=70)
    call = jax.jit(functools.partial(attend, None, None))
    first = call(q, table, indices, pool())
    found = errors_of(first, q, table, indices)
    found["same_bits"] = all(bool(jnp.all(call(q, table, indices, pool())[0] == first[0])) for _ in range(3))
    return {"right": found["same_bits"] and found["out"] < 5e-3 and found["lse"] < 1e-5} | found


def errors_of(got, q, table, indices) -> dict[str, float]:
    """Computes the errors of the last two queries."""
    heads, count = q.shape[2], min(2, q.shape[0] * q.shape[1])
    want_out, want_lse = reference(q, table, indices, pool(), count)
    return {
        "out": relative(got[0].reshape(-1, heads, 512)[-count:], want_out),
        "lse": relative(got[1].reshape(-1, heads)[-count:], want_lse),
    }


def check_batch(heads, splits) -> dict[str, Any]:
    """Compares the bits of a query alone with those that it gets among sixteen."""
    q, table, indices = make_inputs(4, 16, 1, heads, absent=70)
    call = jax.jit(functools.partial(attend, None, splits))
    whole, alone = call(q, table, indices, pool()), call(q[9:10], table[9:10], indices[9:10], pool())
    return {"right": all(bool(jnp.all(a[9:10] == b)) for a, b in zip(whole, alone, strict=True))}


def checks() -> list[dict[str, Any]]:
    """Runs the checks; hostile shapes compile beside each other."""
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        compiled = {shape: threads.submit(compile_hostile, shape) for shape in HOSTILE_SHAPES}
        cases: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (f"hostile data, N {heads}, splits {splits}, {kind}", functools.partial(check_hostile, call, heads, kind))
            for (heads, splits, kind), call in compiled.items()
        ]
        for heads, batch, tokens in ((128, 2, 4), (64, 5, 3), (16, 3, 2), (8, 1, 1)):
            cases.append((f"N {heads} B {batch} T {tokens}", functools.partial(check_shape, heads, batch, tokens)))
        for heads, splits in ((128, 4), (16, 4), (16, 1)):
            name = f"bits alone and among others, N {heads}, splits {splits}"
            cases.append((name, functools.partial(check_batch, heads, splits)))
        return [measure.run_case(*case) for case in cases]


# Times.


@functools.lru_cache(maxsize=1)
def timed_inputs(heads, batch, tokens):
    """Makes sets of inputs; a few keys of the first are absent."""
    sets, _ = CHAIN.get(batch, LONG_CHAIN)
    return [make_inputs(100 + i, batch, tokens, heads, 0 if i else 70) for i in range(sets)]


def time_one(heads, batch, tokens=1, splits=None, config=None) -> dict[str, Any]:
    """Times chained calls; gives the first call's errors and whether its bits repeat beside it."""
    plain = sets = timed_inputs(heads, batch, tokens)
    if config is not None and config.packed_q:
        sets = [(half_query.pack_query(q), *rest) for q, *rest in sets]
    call = jax.jit(functools.partial(attend, config, splits))
    after = jnp.zeros((batch, tokens, heads), jnp.float32)
    first = call(*sets[0], pool(), after)
    _, calls = CHAIN.get(batch, LONG_CHAIN)
    seconds = measure.timed_chain(lambda *arrays: call(*arrays)[1], sets, (pool(),), calls)
    return {
        "microseconds": seconds * 1e6,
        "tflops": 2 * batch * tokens * heads * K * 1088 / seconds / 1e12,
        **errors_of(first, *plain[0]),
        "same_bits": bool(jnp.all(call(*sets[0], pool(), after)[0] == first[0])),
    }


def times() -> list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Lists what is timed: what runs by default, and variants of it."""
    cases = []
    for heads, batch, must, goal in TIMES:
        labels = {"name": "paged_sparse_attention", "batch": batch, "heads": heads, "keys": LENGTH}
        labels |= {"must": must, "goal": goal} if must else {}
        cases.append((labels, functools.partial(time_one, heads, batch)))
    for what, heads, batch, tokens, splits, config in VARIANTS:
        labels = {"name": f"variant {what}", "batch": batch, "heads": heads, "keys": LENGTH}
        cases.append((labels, functools.partial(time_one, heads, batch, tokens, splits, config)))
    return cases


def main() -> None:
    """Runs the parts, and records each at its end."""
    chosen, out = measure.command_line(__doc__, ("checks", "times"), OUT)
    wrong = []
    if "checks" in chosen:
        rows = checks()
        measure.record(out, {"checks": {"rows": rows}})
        wrong += [row["case"] for row in rows if not row["right"]]
    if "times" in chosen:
        part = measure.run_timings(times())
        measure.record(out, {"times": part})
        wrong += part.get("failed", [])
    print("wrong:", wrong or "none")


if __name__ == "__main__":
    main()
