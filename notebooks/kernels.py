# %% [markdown]
# # Kernels: call them, check them, time them
#
# On an NVIDIA Hopper GPU (H100, H200) the operations run on kernels written in Pallas; elsewhere, and for sizes or
# dtypes that a kernel cannot take, they run as plain XLA. The result means the same. You never have to choose:
#
# | `implementation` | meaning |
# |---|---|
# | `None` | the kernel where device, dtype and shape allow it, else XLA |
# | `"xla"` | plain XLA |
# | `"pallas"` | the kernel, or an error that says why it cannot be |
#
# Here each operation that has a kernel is called both ways and held against a definition written in NumPy, in float64,
# straight from the equation. At the end all are timed. Without a Hopper GPU the XLA half runs, and nothing is timed.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from dsa_jax import (
    KeyRange,
    attention_target,
    dense_indexer_kl,
    hadamard,
    index_scores,
    multihead_attention,
    paged_index_scores,
    paged_select_keys,
    paged_sparse_attention,
    quantize,
    select_keys,
    select_topk,
    sparse_attention,
    sparse_indexer_kl,
)

HAS_HOPPER = jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"
IMPLEMENTATIONS = ("xla", "pallas") if HAS_HOPPER else ("xla",)
SMALL = {"T": 64, "S": 256, "N": 16, "J": 32, "K": 48}  # what is checked
LARGE = {"T": 2048, "S": 32768, "N": 128, "J": 64, "K": 2048}  # what is timed
C, R, P, V, E, PAGE = 512, 64, 128, 128, 128, 64  # the published widths, and the tokens of a page
SCALE = (C + R) ** -0.5
print("runs", " and ".join(IMPLEMENTATIONS), "on", jax.devices()[0].device_kind)

# %% [markdown]
# ## The inputs
#
# The letters are the project's: `T` queries, `S` keys, `N` heads, `K` selected keys, `J` index heads of width `E`, a
# latent of `C + R`, and in the multi-head form keys of `P + R` and values of `V`. The queries are the last `T` of `S`
# tokens, so each reaches the keys up to its own. Kernels take bfloat16.


# %%
def draw_inputs(*, T, S, N, J, K):
    """Draws what all operations take, for one sequence."""
    shapes = {
        "q_index": (1, T, J, E),
        "k_index": (1, S, E),
        "weights": (1, T, J),
        "q": (1, T, N, C + R),
        "kv": (1, S, C + R),
        "q_heads": (1, T, N, P + R),
        "k_heads": (1, S, N, P + R),
        "v_heads": (1, S, N, V),
    }
    random = jax.random.split(jax.random.key(0), len(shapes))
    x = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(random, shapes.items(), strict=True)
    }
    x["weights"] = x["weights"].astype(jnp.float32)
    x["keys"] = KeyRange.causal(1, T, offset=S - T)
    x["selected"] = select_keys(*index_inputs(x), x["keys"], k=K)
    return x


def index_inputs(x):
    """Lists what is scored: index queries, index keys, head weights."""
    return x["q_index"], x["k_index"], x["weights"]


def exact(x):
    """Takes an array to float64, in NumPy."""
    return np.asarray(x).astype(np.float64)


x = draw_inputs(**SMALL)
reach = np.asarray(x["keys"].mask(SMALL["S"]))[0]  # [T, S]
for name, array in x.items():
    print(f"{name:9}", f"{array.dtype} {array.shape}" if hasattr(array, "shape") else "the keys in reach")

# %% [markdown]
# `check` runs an operation by each implementation and prints the largest difference from the definition, as a share of
# the definition's largest number. bfloat16 results carry 8 bits, so 2⁻⁸ ≈ 0.4 % is what rounding the result alone
# costs.

# %%
calls = {}  # by name: functions of the inputs and an implementation


def check(name, call, *wanted, tolerance):
    """Holds the results of an operation against their definitions, and keeps the call to be timed."""
    calls[name] = call
    for implementation in IMPLEMENTATIONS:
        results = jax.jit(lambda x, how=implementation: call(x, how))(x)
        results = results if isinstance(results, tuple) else (results,)
        for result, want in zip(results, wanted, strict=True):
            finite = np.isfinite(want)  # keys out of reach score -inf
            result = exact(result)[0]
            assert np.array_equal(result[~finite], want[~finite])
            error = np.abs(result[finite] - want[finite]).max() / np.abs(want[finite]).max()
            print(f"{name:22} {implementation:6} {str(want.shape):14} error {error:.1e} of at most {tolerance:.0e}")
            assert error <= tolerance


# %% [markdown]
# ## Index scores
#
# `I[t,s] = Σ_j w[t,j] · relu(q[t,j] · k[s])` (Eq. 1).

# %%
products = np.maximum(np.einsum("tje,se->tjs", exact(x["q_index"])[0], exact(x["k_index"])[0]), 0)  # [T, J, S]
scores = np.where(reach, np.einsum("tj,tjs->ts", exact(x["weights"])[0], products), -np.inf)

check(
    "index_scores",
    lambda x, how: index_scores(*index_inputs(x), x["keys"], implementation=how),
    scores,
    tolerance=1e-4,
)

# %% [markdown]
# ## Top-k, and both joined
#
# A selection is increasing positions, then `-1`; of equal scores the lowest position wins. It has no tolerance: given
# the scores, it is exact. `select_keys` must give what `select_topk` makes of `index_scores`, bit for bit.

# %%
K = SMALL["K"]


def topk_by_sorting(scores):
    """Selects the K highest scores of each row [T, S] by a stable sort."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return np.sort(best, axis=1)


for implementation in IMPLEMENTATIONS:
    options = {"implementation": implementation}
    scored = index_scores(*index_inputs(x), x["keys"], **options)
    selected = select_topk(scored, K, **options)
    joined = select_keys(*index_inputs(x), x["keys"], k=K, **options)
    assert np.array_equal(selected[0], topk_by_sorting(np.asarray(scored)[0]))
    assert np.array_equal(joined, selected)
    print(f"select_topk, select_keys {implementation}: the same keys in all {joined.shape[1]} rows")

calls["select_keys"] = lambda x, how: select_keys(
    *index_inputs(x), x["keys"], k=x["selected"].shape[2], implementation=how
)

# %% [markdown]
# ## Attention over the selection
#
# All heads read the selected latents; the first `C` columns are the values (Eq. 2). `lse` is the logarithm of the
# softmax's denominator.

# %%
selected = np.asarray(x["selected"])[0]
assert (selected >= 0).all()  # every query reaches at least K keys here
rows = exact(x["kv"])[0][selected]  # [T, K, C + R]
logits = np.einsum("tnh,tkh->tnk", exact(x["q"])[0], rows) * SCALE
lse = np.log(np.exp(logits).sum(axis=2))
probabilities = np.exp(logits - lse[..., None])

check(
    "sparse_attention",
    lambda x, how: sparse_attention(x["q"], x["kv"], x["selected"], value_dim=C, scale=SCALE, implementation=how),
    np.einsum("tnk,tkc->tnc", probabilities, rows[..., :C]),
    lse,
    tolerance=1e-2,
)

# %% [markdown]
# Its gradients, for a cotangent of `out` that is 1 everywhere. Those by the latents add up over all queries that have
# selected one, which the kernel does in a fixed order: the bits repeat.


# %%
def attention_gradients(x, how):
    """Differentiates the sum of the attention's output by queries and latents."""

    def total(q, kv):
        out, _ = sparse_attention(q, kv, x["selected"], value_dim=C, scale=SCALE, implementation=how)
        return out.astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1))(x["q"], x["kv"])


by_p = rows[..., :C].sum(axis=2)[:, None]  # [T, 1, K]
by_logits = probabilities * (by_p - (probabilities * by_p).sum(axis=2, keepdims=True))
by_q = np.einsum("tnk,tkh->tnh", by_logits, rows) * SCALE
by_rows = np.einsum("tnk,tnh->tkh", by_logits, exact(x["q"])[0]) * SCALE
by_rows[..., :C] += probabilities.sum(axis=1)[..., None]
by_kv = np.zeros(x["kv"].shape[1:])
np.add.at(by_kv, selected, by_rows)

check("d sparse_attention", attention_gradients, by_q, by_kv, tolerance=2e-2)

# %% [markdown]
# ## Dense attention
#
# In the multi-head form, each head with keys and values of its own, over all keys in reach.

# %%
logits = np.einsum("tnh,snh->tns", exact(x["q_heads"])[0], exact(x["k_heads"])[0]) * SCALE
logits = np.where(reach[:, None], logits, -np.inf)
dense_lse = np.log(np.exp(logits).sum(axis=2))
dense_probabilities = np.exp(logits - dense_lse[..., None])

check(
    "multihead_attention",
    lambda x, how: multihead_attention(
        x["q_heads"], x["k_heads"], x["v_heads"], x["keys"], scale=SCALE, implementation=how
    ),
    np.einsum("tns,snv->tnv", dense_probabilities, exact(x["v_heads"])[0]),
    dense_lse,
    tolerance=1e-2,
)

# %% [markdown]
# ## The indexer's target and losses
#
# The target is the attention, summed over heads and divided by its sum. The loss is `KL(target ‖ softmax(I))`: over
# the selection (Eq. 4), or over all keys in reach (Eq. 3). Both take the attention's `lse`.


# %%
def divergence(target, scores):
    """Computes KL(target ‖ softmax(scores)) of each row; where the target is 0 it adds nothing."""
    log_softmax = scores - np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True))
    log_softmax -= scores.max(1, keepdims=True)
    terms = target * (np.log(np.maximum(target, 1e-300)) - np.where(target > 0, log_softmax, 0))
    return terms.sum(axis=1)


x["lse"] = sparse_attention(x["q"], x["kv"], x["selected"], value_dim=C, scale=SCALE)[1]
x["dense_lse"] = multihead_attention(x["q_heads"], x["k_heads"], x["v_heads"], x["keys"], scale=SCALE)[1]
target, selected_scores = probabilities.mean(axis=1), np.take_along_axis(scores, selected, axis=1)

check(
    "attention_target",
    lambda x, how: attention_target(x["q"], x["kv"], x["lse"], x["selected"], scale=SCALE, implementation=how),
    target,
    tolerance=1e-2,
)
check(
    "sparse_indexer_kl",
    lambda x, how: sparse_indexer_kl(
        *index_inputs(x), x["q"], x["kv"], x["lse"], x["selected"], scale=SCALE, implementation=how
    ),
    divergence(target, selected_scores),
    tolerance=1e-2,
)
check(
    "dense_indexer_kl",
    lambda x, how: dense_indexer_kl(
        *index_inputs(x), x["q_heads"], x["k_heads"], x["dense_lse"], x["keys"], scale=SCALE, implementation=how
    ),
    divergence(dense_probabilities.mean(axis=1), scores),
    tolerance=1e-2,
)

# %% [markdown]
# The gradient of a query's KL by its scores is `softmax(I) - target`, and the scores are linear in the head weights.
# That gives the gradient by these in one line of NumPy.


# %%
def loss_gradient(x, how):
    """Differentiates the sum of Eq. 4 over queries by the head weights."""

    def total(weights):
        index = x["q_index"], x["k_index"], weights
        constants = x["q"], x["kv"], x["lse"], x["selected"]
        return sparse_indexer_kl(*index, *constants, scale=SCALE, implementation=how).sum()

    return jax.grad(total)(x["weights"])


softmax = np.exp(selected_scores - selected_scores.max(axis=1, keepdims=True))
softmax /= softmax.sum(axis=1, keepdims=True)
by_weights = np.einsum("tk,tjk->tj", softmax - target, np.take_along_axis(products, selected[:, None], axis=2))

check("d sparse_indexer_kl", loss_gradient, by_weights, tolerance=1e-2)

# %% [markdown]
# ## FP8
#
# The indexer can run in FP8: queries and keys go through a Hadamard transform, which spreads outliers over all columns
# and leaves dot products as they are, and are rounded to e4m3 with a scale for each row. The scale is the power of two
# `2^ceil(log2(amax / 448))`, so scaling is exact and nothing saturates.

# %%
matrix = np.ones((1, 1))
while len(matrix) < E:
    matrix = np.kron([[1, 1], [1, -1]], matrix)

check(
    "hadamard",
    lambda x, how: hadamard(x["k_index"], implementation=how),
    exact(x["k_index"])[0] @ matrix / np.sqrt(E),
    tolerance=1e-2,
)

row_scale = 2.0 ** np.ceil(np.log2(np.abs(exact(x["k_index"])[0]).max(axis=1) / 448))
rounded = (exact(x["k_index"])[0] / row_scale[:, None]).astype(jnp.float8_e4m3fn)
check("quantize", lambda x, how: quantize(x["k_index"], implementation=how), exact(rounded), row_scale, tolerance=0)

# %% [markdown]
# With e4m3 arrays `index_scores` takes the keys' scale apart; the queries' scale goes into the head weights. Hopper's
# tensor cores keep some 13 bits of a sum of FP8 products, so the error is larger there than on a CPU.

# %%
q8, q_scale = (exact(part)[0] for part in quantize(x["q_index"]))
products8 = np.maximum(np.einsum("tje,se->tjs", q8, exact(rounded)), 0) * row_scale
scores8 = np.where(reach, np.einsum("tj,tjs->ts", exact(x["weights"])[0] * q_scale, products8), -np.inf)


def scores_in_fp8(x, how):
    """Rounds queries and keys, and scores."""
    (q, q_scale), (k, k_scale) = (quantize(x[name], implementation=how) for name in ("q_index", "k_index"))
    return index_scores(q, k, x["weights"] * q_scale, x["keys"], k_scale=k_scale, implementation=how)


check("index_scores, e4m3", scores_in_fp8, scores8, tolerance=2e-3)

# %% [markdown]
# ## Decode: keys in pages
#
# While a model generates, the keys of many sequences lie in pages of 64 tokens, in any order, and a table says which
# page holds which part of a sequence. The `paged_` operations take one to four queries a sequence and find the keys by
# the table. Here the pages of our sequence are shuffled. The results must be those of the last two queries above.

# %%
FEW = 2  # queries


def add_pages(x):
    """Cuts latents and index keys into pages, shuffles these, and takes the last queries."""
    pages = x["kv"].shape[1] // PAGE
    order = jax.random.permutation(jax.random.key(1), pages)  # part i of the sequence lies in page order[i]
    cut = {name: x[name][0].reshape(pages, PAGE, -1) for name in ("kv", "k_index")}
    shuffled = {f"{name}_pages": jnp.zeros_like(array).at[order].set(array) for name, array in cut.items()}
    last = {f"{name}_last": x[name][:, -FEW:] for name in ("q", "q_index", "weights", "selected")}
    last["keys_last"] = KeyRange(x["keys"].start[:, -FEW:], x["keys"].stop[:, -FEW:])
    return x | shuffled | last | {"table": order[None].astype(jnp.int32)}


def paged_index_inputs(x):
    """Lists what is scored: index queries, pages of index keys, head weights, the table, and the keys in reach."""
    return x["q_index_last"], x["k_index_pages"], x["weights_last"], x["table"], x["keys_last"]


x = add_pages(x)
check(
    "paged_index_scores",
    lambda x, how: paged_index_scores(*paged_index_inputs(x), implementation=how),
    scores[-FEW:],
    tolerance=1e-4,
)
calls["paged_select_keys"] = lambda x, how: paged_select_keys(
    *paged_index_inputs(x), k=x["selected_last"].shape[2], implementation=how
)
check(
    "paged_sparse_attention",
    lambda x, how: paged_sparse_attention(
        x["q_last"], x["kv_pages"], x["table"], x["selected_last"], value_dim=C, scale=SCALE, implementation=how
    ),
    np.einsum("tnk,tkc->tnc", probabilities, rows[..., :C])[-FEW:],
    lse[-FEW:],
    tolerance=1e-2,
)
for implementation in IMPLEMENTATIONS:
    scored, chosen = (calls[name](x, implementation) for name in ("paged_index_scores", "paged_select_keys"))
    assert np.array_equal(chosen[0], topk_by_sorting(np.asarray(scored)[0]))
    print(f"paged_select_keys {implementation}: the keys of the highest scores")

# %% [markdown]
# ## Time
#
# Each call, at the sizes of the published model, in milliseconds: the median of five windows of calls made back to
# back. A call that takes less than some 50 µs is bound by the host that starts it. `benchmarks/` measures with more
# care; its tables are in `docs/performance.md`.


# %%
def milliseconds(call, x, how):
    """Times a call, compiled and warm."""
    run = jax.jit(lambda x: call(x, how))
    jax.block_until_ready(run(x))
    windows = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            result = run(x)
        jax.block_until_ready(result)
        windows.append((time.perf_counter() - began) / 10)
    return 1e3 * sorted(windows)[2]


times = {}
if HAS_HOPPER:
    x = draw_inputs(**LARGE)
    x["lse"] = sparse_attention(x["q"], x["kv"], x["selected"], value_dim=C, scale=SCALE)[1]
    x["dense_lse"] = multihead_attention(x["q_heads"], x["k_heads"], x["v_heads"], x["keys"], scale=SCALE)[1]
    x = add_pages(x)
    for name, call in calls.items():
        times[name] = [milliseconds(call, x, how) for how in IMPLEMENTATIONS]
        print(f"{name:22} XLA {times[name][0]:9.3f} ms   kernel {times[name][1]:9.3f} ms")
else:
    print("There is no Hopper GPU here, so nothing is timed.")

# %%
if times:
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    speedups = {name: xla / pallas for name, (xla, pallas) in times.items()}
    axis.barh(list(speedups)[::-1], list(speedups.values())[::-1], color="0.6")
    axis.set(xscale="log", xlabel="times as fast as XLA", title=f"kernels on {jax.devices()[0].device_kind}")
    plt.show()
