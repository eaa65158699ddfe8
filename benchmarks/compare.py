"""Times this tree's operations beside another tree's, alternating in one process, on one Hopper GPU.

  git worktree add /tmp/before COMMIT
  python -m benchmarks.compare /tmp/before            # writes benchmarks/results/compare.json

Both trees' `dsa_jax` are loaded side by side and their public functions get the same inputs. Windows of back-to-back
calls alternate, so that both see the same clock of the card; the ratio is that of the medians. Results are compared
bit by bit, and where bits differ, beside the difference between two runs of the other tree compiled twice: XLA chooses
its products by timing them, and adds to embeddings in any order.
"""

import argparse
import hashlib
import importlib
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure

OUT = measure.RESULTS / "compare.json"
ROUNDS = 15  # windows of each tree
SECONDS_A_WINDOW = 0.03
SCALE = 576**-0.5


class Case(NamedTuple):
    """One operation: `make` gives the function of a tree's `dsa_jax`, `inputs` its arrays."""

    name: str
    make: Callable[[ModuleType], Callable]
    inputs: Callable[[ModuleType], tuple]


def load(tree: pathlib.Path) -> ModuleType:
    """Imports the `dsa_jax` of a tree, apart from one imported before."""
    if not (tree / "dsa_jax" / "__init__.py").is_file():
        raise ValueError(f"expected a tree with a folder dsa_jax, got {tree}")
    for name in [name for name in sys.modules if name.split(".")[0] == "dsa_jax"]:
        del sys.modules[name]
    sys.path.insert(0, str(tree.resolve()))
    try:
        module = importlib.import_module("dsa_jax")
    finally:
        sys.path.remove(str(tree.resolve()))
    assert pathlib.Path(module.__file__ or "").is_relative_to(tree.resolve()), module.__file__
    return module


def digest(tree: pathlib.Path) -> str:
    """Names the library's sources in a tree by their contents."""
    files = sorted((tree / "dsa_jax").rglob("*.py"))
    text = b"".join(str(path.relative_to(tree)).encode() + path.read_bytes() for path in files)
    return hashlib.blake2b(text, digest_size=6).hexdigest()


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Draws standard normal values."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def selection(seed: int, queries: int, size: int, k: int) -> jax.Array:
    """Draws random selections, canonical but for repeated keys."""
    return jnp.sort(jax.random.randint(jax.random.key(seed), (1, queries, k), 0, size), axis=-1)


def attention_inputs(queries, heads, size, k):
    return normal(0, 1, queries, heads, 576), normal(1, 1, size, 576), selection(2, queries, size, k)


def index_inputs(d, queries, size, heads=64, fp8=False):
    q, k = normal(3, 1, queries, heads, 128), normal(4, 1, size, 128)
    weights = jnp.abs(normal(5, 1, queries, heads, dtype=jnp.float32))
    scale = None
    if fp8:
        (q, q_scale), (k, scale) = d.quantize(q), d.quantize(k)
        weights = weights * q_scale
    keys = d.KeyRange.causal(1, queries, offset=size - queries)
    return q, k, weights, keys.start, keys.stop, jnp.ones((1, size)) if scale is None else scale


def cases(queries: int, long: int, k: int) -> Iterator[Case]:
    """Yields every operation with kernels, forward and backward, at the published widths."""
    short = 2 * queries

    def attend(d):
        return lambda q, kv, indices: d.sparse_attention(q, kv, indices, value_dim=512, scale=SCALE)

    def attend_gradients(d):
        loss = lambda q, kv, indices: attend(d)(q, kv, indices)[0].astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))

    for heads, size in ((128, short), (128, long), (64, short), (16, short)):
        arrays = lambda d, heads=heads, size=size: attention_inputs(queries, heads, size, k)  # noqa: E731
        yield Case(f"sparse_attention N {heads} S {size}", attend, arrays)
    for heads in (128, 16):
        arrays = lambda d, heads=heads: attention_inputs(queries, heads, short, k)  # noqa: E731
        yield Case(f"sparse_attention and gradients N {heads} S {short}", attend_gradients, arrays)

    def ranged(operation):
        def make(d):
            def call(q, k_index, weights, start, stop, scale):
                return operation(d)(q, k_index, weights, d.KeyRange(start, stop), k_scale=scale)

            return call

        return make

    scores, keys = ranged(lambda d: d.index_scores), ranged(lambda d: lambda *a, **b: d.select_keys(*a, k=k, **b))
    for name, fp8 in (("e4m3", True), ("bf16", False)):
        yield Case(f"index_scores {name} S {long}", scores, lambda d, fp8=fp8: index_inputs(d, queries, long, fp8=fp8))
    yield Case(f"select_keys e4m3 S {long}", keys, lambda d: index_inputs(d, queries, long, fp8=True))
    yield Case(
        f"select_topk S {long}",
        lambda d: lambda x: d.select_topk(x, k),
        lambda d: (normal(6, 1, queries // 4, long, dtype=jnp.float32),),
    )
    yield Case(
        "hadamard, quantize",
        lambda d: lambda x: d.quantize(d.hadamard(x)),
        lambda d: (normal(7, 1, queries, 64, 128),),
    )

    def loss_gradients(d):
        def loss(index, q, kv, lse, indices):
            return d.sparse_indexer_kl(*index, q, kv, lse, indices, scale=SCALE).mean()

        return jax.value_and_grad(loss)

    def loss_inputs(d):
        q, kv, indices = attention_inputs(queries, 128, short, k)
        lse = jax.jit(attend(d))(q, kv, indices)[1]
        return index_inputs(d, queries, short)[:3], q, kv, lse, indices

    yield Case(f"sparse_indexer_kl and gradients N 128 S {short}", loss_gradients, loss_inputs)

    def dense(d):
        return lambda q, k, v: d.multihead_attention(q, k, v, d.KeyRange.causal(1, q.shape[1]), scale=192**-0.5)

    def dense_inputs(d):
        return normal(8, 1, short, 128, 192), normal(9, 1, short, 128, 192), normal(10, 1, short, 128, 128)

    yield Case(f"multihead_attention T {short}", dense, dense_inputs)

    def warmup(d):
        def loss(index, q, k, lse):
            keys = d.KeyRange.causal(1, q.shape[1])
            return d.dense_indexer_kl(*index, q, k, lse, keys, scale=192**-0.5).mean()

        return jax.value_and_grad(loss)

    def warmup_inputs(d):
        q, k_heads, v = dense_inputs(d)
        lse = jax.jit(dense(d))(q, k_heads, v)[1]
        return index_inputs(d, short, short)[:3], q, k_heads, lse

    yield Case(f"dense_indexer_kl and gradients T {short}", warmup, warmup_inputs)
    yield from model_cases(queries, k)


def model_cases(length: int, k: int) -> Iterator[Case]:
    """Yields the gradients of both training objectives through four layers of the published widths."""

    def config(d):
        sizes = dict(vocab_size=16384, num_hidden_layers=4, first_k_dense_replace=0, index_topk=min(k, length))
        experts = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024, n_group=1, topk_group=1)
        return d.Config(**sizes, **experts, index_fp8=True, param_dtype="bfloat16")

    def inputs(d):
        make = jax.jit(lambda: nnx.split(d.Transformer(config(d), rngs=nnx.Rngs(0)))[1])
        return nnx.to_pure_dict(make()), jax.random.randint(jax.random.key(11), (1, length), 0, 16384)

    def make(attention):
        def of(d):
            graph, state = nnx.split(nnx.eval_shape(lambda: d.Transformer(config(d), rngs=nnx.Rngs(0))))

            def loss(params, tokens):
                full = nnx.State(state)
                nnx.replace_by_pure_dict(full, params)
                output = nnx.merge(graph, full)(tokens, attention=attention)
                return output.hidden.astype(jnp.float32).mean() + output.indexer_kl.mean()

            return jax.value_and_grad(loss)

        return of

    yield Case(f"model gradients, sparse, 4 layers, T {length}", make("sparse"), inputs)
    yield Case(f"model gradients, dense, 4 layers, T {length}", make("dense"), inputs)


def compare(case: Case, trees: dict[str, ModuleType], rounds: int = ROUNDS) -> dict[str, Any]:
    """Times one case in both trees, by turns."""
    functions, results = {}, {}
    inputs = jax.block_until_ready(case.inputs(trees["before"]))
    for name, module in trees.items():
        functions[name] = jax.jit(case.make(module))
        results[name] = jax.tree.map(np.asarray, functions[name](*inputs))
    found = {"difference": difference(results["after"], results["before"])}
    if found["difference"]:
        again = jax.jit(lambda *arrays: functions["before"].__wrapped__(*arrays))
        found["own_difference"] = difference(jax.tree.map(np.asarray, again(*inputs)), results["before"])
    once = window(functions["before"], inputs, 1)
    calls = max(1, round(SECONDS_A_WINDOW / once))
    times = {name: [] for name in trees}
    for turn in range(rounds):
        for name in list(trees) if turn % 2 else reversed(list(trees)):
            times[name].append(window(functions[name], inputs, calls))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["after"] / medians["before"]
    return {
        "operation": case.name,
        **found,
        **{f"{n}_seconds": m for n, m in medians.items()},
        "ratio": ratio,
    }


def difference(actual: Any, expected: Any) -> float:
    """Returns the largest relative norm of a difference between two trees' arrays, 0 where all bits are the same."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if a.tobytes() != b.tobytes():
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return worst


def window(function: Callable, inputs: tuple, calls: int) -> float:
    """Returns the seconds of a call in a window of back-to-back calls."""
    began = time.perf_counter()
    for _ in range(calls):
        out = function(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / calls


def main() -> int:
    """Compares and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=pathlib.Path, help="a tree of another commit")
    parser.add_argument("--label", default="before", help="what the other tree is, for the record")
    parser.add_argument("--only", default="", help="only operations whose name holds this")
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--long", type=int, default=131072)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    here = pathlib.Path(__file__).resolve().parents[1]
    paths = {"before": arguments.before, "after": here}
    trees = {name: load(path) for name, path in paths.items()}
    rows = []
    for case in cases(arguments.queries, arguments.long, arguments.topk):
        if arguments.only in case.name:
            rows.append(compare(case, trees, arguments.rounds))
            row = rows[-1]
            own = f", by itself {row['own_difference']:.1e}" if "own_difference" in row else ""
            bits = f"differs by {row['difference']:.1e}{own}" if row["difference"] else "same bits"
            print(
                f"{row['operation']:60} {1e3 * row['before_seconds']:9.3f} ms {1e3 * row['after_seconds']:9.3f} ms "
                f"{row['ratio']:6.3f}  {bits}",
                flush=True,
            )
            part = dict(digests={name: digest(path) for name, path in paths.items()}, rounds=arguments.rounds)
            measure.record(arguments.out, {arguments.label: part | {"timings": rows}})  # after each, should time end
            jax.clear_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
