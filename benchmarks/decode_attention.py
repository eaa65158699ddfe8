"""Checks and times sparse attention over pages, of a few tokens a sequence, on a Hopper GPU.

    python -m benchmarks.decode_attention [--only checks hostile times variants rows] [--out FILE]

Every case is compared with float64 or float32 from the definition; a failure is recorded, and the rest goes on. A
call's time is that of a chain of calls in one program, each of which waits for the one before, on inputs that do not
fit into the L2 cache together: between programs the card idles for some 40 µs, which would count as the calls' own.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import pathlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from dsa_jax.pallas_kernels.decode import (
    attention_few_heads,
    attention_keys_as_rows,
    attention_many_heads,
    gather_rows,
    half_query,
)
from dsa_jax.pallas_kernels.decode.paged_sparse_attention import paged_sparse_attention

LENGTH, K, SCALE = 32768, 2048, 576**-0.5
POOL_PAGES = 110_000  # 4.6 GB, beyond what 32 bits address
PARTS = ("hostile", "checks", "times", "variants", "rows")
ROWS: list[dict] = []

# (heads, batch, tokens, splits, config, sets, microseconds to reach and to aim at)
TIMES = [
    (128, 1, 1, None, {}, 40, 14, 11.5),
    (128, 16, 1, None, {}, 8, 38, 28),
    (128, 128, 1, None, {}, 3, 175, 135),
    (64, 128, 1, None, {}, 3, None, None),
    (16, 1, 1, None, {}, 40, 11.5, 9),
    (16, 16, 1, None, {}, 8, 23, 17),
    (16, 128, 1, None, {}, 3, 90, 68),
    (32, 128, 1, None, {}, 3, None, None),
    (8, 128, 1, None, {}, 3, None, None),
    (128, 128, 1, None, {"packed_q": True}, 3, None, None),
    (128, 128, 1, None, {"compute_registers": 208}, 3, None, None),
    (128, 1, 1, 16, {}, 40, None, None),
    (128, 1, 1, None, {"packed_q": True}, 40, None, None),
    (128, 16, 1, 8, {}, 8, None, None),
    (128, 32, 1, 1, {}, 4, None, None),
    (128, 32, 1, 2, {}, 4, None, None),
    (128, 16, 4, None, {}, 4, None, None),
    (16, 1, 1, 16, {}, 40, None, None),
    (16, 16, 1, 4, {}, 8, None, None),
]


# (heads, batch, config, what is left out): one program each, all compiled before the first runs
AHEAD, OVERLAP = {"ahead": True, "overlap": False}, {"ahead": True, "overlap": True}
NEITHER = {"ahead": False, "overlap": False}
VARIANTS = [
    (128, 128, NEITHER, None),
    (128, 128, AHEAD, None),
    (128, 128, OVERLAP, None),
    (128, 128, {"ahead": False, "overlap": True}, None),
    (128, 128, OVERLAP | {"compute_registers": 208}, None),
    (128, 128, OVERLAP, "vote"),
    (128, 128, OVERLAP, "vote and types"),
    (128, 16, NEITHER, None),
    (128, 16, AHEAD, None),
    (128, 16, OVERLAP, None),
    (64, 128, OVERLAP, None),
    (32, 128, {}, None),
    (16, 128, {}, None),
]
ROW_SHAPES = [(64, 1, "fp8"), (128, 5, "fp8"), (8, 1, "fp8"), (16, 5, "fp8"), (32, 2, "fp8")]
ROW_VARIANTS = [
    (128, 128, {"rows": True}, None),
    (128, 128, {"rows": True, "compute_registers": 240}, None),
    (128, 16, {"rows": True}, None),
    (64, 128, {"rows": True}, None),
    (32, 128, {"rows": True}, None),
    (16, 128, {"rows": True}, None),
    (16, 128, {"rows": True, "halves": True}, None),
    (16, 16, {"rows": True}, None),
    (8, 128, {"rows": True}, None),
]


def attend(config, splits, q, table, indices, pages, after=None):
    """Calls a kernel, with tuning by the names of a config's fields; "rows" for the one that has keys as rows."""
    module = attention_few_heads if q.shape[2] in attention_few_heads.HEADS else attention_many_heads
    config = dict(config)
    if config.pop("rows", False):
        module = attention_keys_as_rows
    given = config or module is attention_keys_as_rows
    tuning = module.Config(**config) if given and pages.dtype == jnp.uint8 else None
    return paged_sparse_attention(q, pages, table, indices, scale=SCALE, splits=splits, config=tuning, after=after)


# Inputs.


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
    indices = np.sort(np.argpartition(random.random((batch * tokens, LENGTH), np.float32), K, 1)[:, :K], 1)
    indices = indices.astype(np.int32).reshape(batch, tokens, K)
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


# Parts.


def note(path, **row):
    """Records and prints a row."""
    ROWS.append(row)
    path.write_text(json.dumps(ROWS, indent=1) + "\n")
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def guarded(path, part, name, run):
    """Runs one case, and records what it returns or how it failed."""
    try:
        note(path, part=part, case=name, **run())
    except Exception as error:
        note(path, part=part, case=name, failed=f"{type(error).__name__}: {error}"[:400])


def hostile(path, shapes=None, config=None):
    """Compares hostile rows, scales and queries with float64, at small shapes."""
    shapes = shapes or [
        (heads, splits, kind)
        for heads, splits in ((64, 1), (64, 3), (128, 5), (8, 1), (16, 2), (16, 5), (32, 1))
        for kind in ("fp8",)
    ] + [(64, 3, "bfloat16"), (8, 2, "bfloat16")]

    def compile_one(shape):
        heads, splits, kind = shape
        sd = jax.ShapeDtypeStruct
        pool = sd((40, 64, 656), jnp.uint8) if kind == "fp8" else sd((40, 64, 576), jnp.bfloat16)
        arguments = sd((2, 2, heads, 576), jnp.bfloat16), sd((2, 6), jnp.int32), sd((2, 2, 300), jnp.int32), pool
        return jax.jit(functools.partial(attend, config or {}, splits)).lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = {shape: pool.submit(compile_one, shape) for shape in shapes}
    for shape, future in compiled.items():
        for case in HOSTILE:
            run = functools.partial(hostile_case, future, shape, case)
            guarded(path, "hostile", f"{shape} {case} {config or ''}", run)


HOSTILE = (
    "plain", "absent", "empty", "tenths", "tiny", "large", "mixed", "groups", "zero", "negative", "edges", "nan latent",
    "nan rotary", "nan scale", "nan query", "large query", "inf scale",
)  # fmt: skip


def hostile_case(compiled, shape, case):
    """Runs one kernel, once it is compiled, on one kind of hostile data; returns its errors."""
    call = compiled.result()
    heads, _, kind = shape
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
        return {"ok": int(bad) == 0, "hidden": int(bad)}
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
    ok = nan_same and empty_same and max(errors) < 8e-3 and lse_error < 4e-3
    return {"ok": bool(ok), "nan": bool(nan_same), "empty": bool(empty_same), "out": max(errors), "lse": lse_error}


def checks(path, pages):
    """Compares real shapes with float32, repeats their bits, and holds a query's bits against another batch's."""
    cases = [(h, b, t, s) for h, b, t, s in ((128, 2, 4, None), (64, 5, 3, None), (16, 3, 2, None), (8, 1, 1, None))]

    def run(heads, batch, tokens, splits):
        q, table, indices = make_inputs(3, batch, tokens, heads, absent=70)
        call = jax.jit(functools.partial(attend, {}, splits))
        out, lse = call(q, table, indices, pages)
        count = min(2, batch * tokens)
        want_out, want_lse = reference(q, table, indices, pages, count)
        same = all(bool(jnp.all(call(q, table, indices, pages)[0] == out)) for _ in range(3))
        return {
            "out": relative(out.reshape(-1, heads, 512)[-count:], want_out),
            "lse": relative(lse.reshape(-1, heads)[-count:], want_lse),
            "same_bits": same,
        }

    for case in cases:
        guarded(path, "checks", str(case), lambda case=case: run(*case))

    def invariant(heads, splits):
        q, table, indices = make_inputs(4, 16, 1, heads, absent=70)
        call = jax.jit(functools.partial(attend, {}, splits))
        whole, alone = call(q, table, indices, pages), call(q[9:10], table[9:10], indices[9:10], pages)
        equal = all(bool(jnp.all(a[9:10] == b)) for a, b in zip(whole, alone, strict=True))
        return {"ok": equal}

    for heads in (128, 16):
        guarded(path, "checks", f"batch invariance, {heads} heads", lambda heads=heads: invariant(heads, 4))


def times(path, pages):
    """Times chains of calls, with the first call's error and whether its bits repeat."""
    inputs: dict = {}

    def run(heads, batch, tokens, splits, config, sets, must, goal):
        shape = heads, batch, tokens
        if shape not in inputs:
            inputs.clear()
            inputs[shape] = [make_inputs(100 + i, batch, tokens, heads, 0 if i else 70) for i in range(sets)]
        data, plain = inputs[shape], inputs[shape][0]
        if config.get("packed_q"):
            data = [(half_query.pack_query(q), *rest) for q, *rest in data]
        call = jax.jit(functools.partial(attend, config, splits))
        after = jnp.zeros((batch, tokens, heads), jnp.float32)
        out, lse = call(*data[0], pages, after)
        want_out, want_lse = reference(*plain, pages, min(2, batch * tokens))
        count = want_lse.shape[0]
        seconds = chained_seconds(call, data, pages, after)
        row = {"us": seconds * 1e6, "must": must, "goal": goal} if must else {"us": seconds * 1e6}
        return row | {
            "tflops": 2 * batch * tokens * heads * K * 1088 / seconds / 1e12,
            "out": relative(out.reshape(-1, heads, 512)[-count:], want_out),
            "lse": relative(lse.reshape(-1, heads)[-count:], want_lse),
            "same_bits": bool(jnp.all(call(*data[0], pages, after)[0] == out)),
        }

    for case in TIMES:
        heads, batch, tokens, splits, config, *_ = case
        name = f"N {heads} B {batch} T {tokens} splits {splits} {config or ''}"
        guarded(path, "times", name, lambda case=case: run(*case))


def rounds_of(sets):
    """Says how often a program goes through its sets of inputs."""
    return 4 if sets < 20 else 3


def chain_of(call, sets):
    """Makes a program of many calls, each waiting for the one before; it returns the first and the last."""

    @jax.jit
    def chain(data, pages, after):
        outs = []
        for arguments in data * rounds_of(sets):
            outs.append(call(*arguments, pages, after))
            after = outs[-1][1]
        return outs[0], outs[-1]

    return chain


def program_seconds(program, arguments, calls):
    """Times a program, for one of its calls."""
    jax.block_until_ready(program(*arguments))
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(6):
            out = program(*arguments)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - began) / 6 / calls)
    return sorted(seconds)[2]


def chained_seconds(call, data, pages, after):
    """Times a call in a program of many."""
    sets = len(data)
    return program_seconds(chain_of(call, sets), (data, pages, after), sets * rounds_of(sets))


def leave_out(part):
    """Replaces parts of the kernels, for what they cost, while it is entered; scales must fit half precision then."""
    patches = contextlib.ExitStack()
    if part in ("vote", "vote and types"):  # each warp decides for itself
        warp_any = lambda number, threads, condition: gather_rows.simt_copies.ballot(condition) > 0  # noqa: E731
        patches.enter_context(mock.patch.object(gather_rows.simt, "barrier_any", warp_any))
    if part == "vote and types":
        patches.enter_context(mock.patch.object(gather_rows, "is_bfloat16", lambda *_: lax.axis_index("block") < 0))
    return patches


def variants(path, pages, cases, part):
    """Times variants of the kernels, with errors, and whether they give the bits of the first of their shape."""
    sets = {batch: [make_inputs(100 + i, batch, 1, 128, 0 if i else 70) for i in range(3)] for batch in (16, 128)}
    lowered = {}
    for number, (heads, batch, config, missing) in enumerate(cases):
        data = [(q[:, :, :heads], *rest) for q, *rest in sets[batch]]
        if config.get("packed_q"):
            data = [(half_query.pack_query(q), *rest) for q, *rest in data]
        after = jnp.zeros((batch, 1, heads), jnp.float32)
        try:
            with leave_out(missing):
                call = jax.jit(functools.partial(attend, dict(config), None))
                lowered[number] = chain_of(call, len(data)).lower(data, pages, after), data, after
        except Exception as error:
            note(path, part=part, case=str(cases[number]), failed=f"{type(error).__name__}: {error}"[:400])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = {number: pool.submit(program.compile) for number, (program, *_) in lowered.items()}
        firsts: dict = {}

        def run(number):
            heads, batch, *_ = cases[number]
            _, data, after = lowered[number]
            program = compiled[number].result()
            (out, lse), _ = program(data, pages, after)
            if (heads, batch) not in firsts:
                firsts[heads, batch] = out, *reference(sets[batch][0][0][:, :, :heads], *data[0][1:], pages, 2)
            first, want_out, want_lse = firsts[heads, batch]
            seconds = program_seconds(program, (data, pages, after), rounds_of(len(data)) * len(data))
            return {
                "us": seconds * 1e6,
                "tflops": 2 * batch * heads * K * 1088 / seconds / 1e12,
                "out": relative(out.reshape(-1, heads, 512)[-2:], want_out),
                "lse": relative(lse.reshape(-1, heads)[-2:], want_lse),
                "same_bits": bool(jnp.all(program(data, pages, after)[0][0] == out)),
                "bits_of_first": bool(jnp.all(out == first)),
            }

        for number in lowered:
            guarded(path, part, str(cases[number]), functools.partial(run, number))


def main():
    """Runs the parts and writes the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("decode_attention.json"))
    arguments = parser.parse_args()
    began = time.perf_counter()
    if "hostile" in arguments.only:
        hostile(arguments.out)
    pages = make_pages(jax.random.key(0), POOL_PAGES) if set(PARTS[1:]) & set(arguments.only) else None
    if "checks" in arguments.only:
        checks(arguments.out, pages)
    if "times" in arguments.only:
        times(arguments.out, pages)
    if "variants" in arguments.only:
        variants(arguments.out, pages, VARIANTS, "variants")
        hostile(arguments.out, [(64, 1, "fp8"), (64, 3, "fp8")], OVERLAP)
    if "rows" in arguments.only:
        hostile(arguments.out, ROW_SHAPES, {"rows": True})
        variants(arguments.out, pages, ROW_VARIANTS, "rows")
    failed = [row["case"] for row in ROWS if "failed" in row or row.get("ok") is False]
    print(f"{len(ROWS)} cases, {len(failed)} failed: {failed[:20]}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
