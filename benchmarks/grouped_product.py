"""Measures the experts' grouped products on one Hopper GPU: each kernel, the layer with its gradients, and peers.

  python -m benchmarks.grouped_product                  # everything; writes benchmarks/results/grouped_product.json
  python -m benchmarks.grouped_product --only decode    # a part alone, merged into the file

Rows stand on 16 experts of 7168 × 2048, what a shard of the 671B plan holds, in uneven groups. FLOPs are those of the
real rows: 2 · rows · 7168 · 2048 for every product with a weight. Few rows, as in decoding, are measured by the bytes
of the weights that they touch. Errors are those of sampled rows against float64, over the root mean square.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from dsa_jax.grouped_ffn import expert_ffn
from dsa_jax.pallas_kernels.grouped_product import rows, tiles, weights
from dsa_jax.pallas_kernels.grouped_product.expert_ffn import lay_out
from dsa_jax.quantization import cast_weight, quantize_blocks

OUT = measure.RESULTS / "grouped_product.json"
DIM, WIDTH, LOCAL_EXPERTS = 7168, 2048, 16
ROWS = (8192, 65536)
SPREAD = 0.35  # standard deviation of the logarithm of an expert's load: the fullest has about twice the mean
DECODE_EXPERTS, DECODE_SLOTS = 256, 8  # of the layer, and of a token
DECODE_TOKENS = (1, 4, 16, 64)
IMPLEMENTATIONS = ("pallas", "xla")
CHECKED_SLOTS = 6  # whose experts' weights come to the host


class Problem(NamedTuple):
    """Holds rows with one expert each, in no order, their weights, and the rows laid out."""

    x: jax.Array
    dy: jax.Array
    experts: jax.Array
    gates: jax.Array
    weights: tuple[jax.Array, jax.Array, jax.Array]


def draw_experts(seed: int, count: int, num_experts: int, slots: int) -> np.ndarray:
    """Draws the experts [count, slots] of rows: unevenly chosen, each row's distinct."""
    rng = np.random.default_rng(seed)
    preference = SPREAD * rng.normal(size=num_experts)
    return np.argsort(-(preference + rng.gumbel(size=(count, num_experts))), axis=1)[:, :slots]


def draw(seed: int, count: int, num_experts: int, slots: int = 1) -> Problem:
    """Draws rows with `slots` experts each, and the weights of all."""
    experts = draw_experts(seed, count, num_experts, slots)
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = ((num_experts, DIM, WIDTH),) * 2 + ((num_experts, WIDTH, DIM),)
    x, dy = (jax.random.normal(key, (count, DIM), jnp.bfloat16) for key in keys[:2])
    of_weights = [
        (shape[1] ** -0.5 * jax.random.normal(key, shape, jnp.bfloat16)).astype(jnp.bfloat16)
        for key, shape in zip(keys[2:], shapes, strict=True)
    ]
    gates = jnp.asarray(np.random.default_rng(seed).uniform(0.1, 1, experts.shape), jnp.float32)
    return Problem(x, dy, jnp.asarray(experts, jnp.int32), gates, tuple(of_weights))


def timed(fn: Callable, arguments: tuple, flops: float) -> dict[str, Any]:
    """Times calls of a jitted function; TFLOP/s in short windows and in a long one."""
    found = measure.seconds_per_call(fn, [arguments])
    rates = {"tflops": flops / found["seconds"] / 1e12}
    if "sustained" in found:
        rates["tflops_sustained"] = flops / found["sustained"] / 1e12
    return {"milliseconds": 1e3 * found["seconds"]} | rates


def kernels() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Times each kernel by itself, on rows that are laid out."""
    for count in ROWS:
        problem = draw(0, count, LOCAL_EXPERTS)
        layout = jax.jit(functools.partial(lay_out, num_experts=LOCAL_EXPERTS))(problem.experts)
        plan = tiles.make_tiles(layout.blocks, count, rows.tile_blocks(few=False))
        x, dy = (a.at[layout.slot].get(mode="fill", fill_value=0) for a in (problem.x, problem.dy))
        gates = problem.gates.reshape(-1).at[layout.slot].get(mode="fill", fill_value=0)
        gate, up, down = problem.weights
        product = 2 * count * DIM * WIDTH
        labels = {"rows": count, "rows_with_padding": int(layout.blocks.sum()) * 64}
        keep = jax.jit(functools.partial(rows.gate_up, keep=True))
        hidden, *kept = keep(x, gate, up, gates, plan)
        d_gate, d_up, *_ = jax.jit(rows.d_hidden)(dy, down, *kept, gates, plan)
        for name, fn, arguments, products in (
            ("gate_up", rows.gate_up, (x, gate, up, gates, plan), 2),
            ("gate_up, products kept", keep, (x, gate, up, gates, plan), 2),
            ("multiply", rows.multiply, (hidden, down, plan), 1),
            ("d_hidden", rows.d_hidden, (dy, down, *kept, gates, plan), 1),
            ("d_rows", rows.d_rows, (d_gate, d_up, gate, up, plan), 2),
            ("d_weights", weights.d_weights, (x, d_gate, layout.blocks), 1),
        ):
            yield {"name": name} | labels, functools.partial(timed, jax.jit(fn), arguments, products * product)


def layer() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Times the whole layer, forward and backward: sorting, gathering and adding up included."""
    for count in ROWS:
        problem = draw(0, count, LOCAL_EXPERTS)
        arguments = (problem.x, problem.experts, problem.gates, *problem.weights)
        flops = 2 * count * DIM * WIDTH
        for implementation in IMPLEMENTATIONS:
            forward = jax.jit(functools.partial(expert_ffn, implementation=implementation))
            labels = {"rows": count, "implementation": implementation}

            def run(forward=forward, arguments=arguments, flops=flops, problem=problem):
                return timed(forward, arguments, 3 * flops) | {"deviation": forward_error(forward(*arguments), problem)}

            yield {"name": "forward"} | labels, run

            def gradients(dy, x, experts, gates, *of_weights, implementation=implementation):
                function = lambda *args: expert_ffn(args[0], experts, *args[1:], implementation=implementation)  # noqa: E731
                return jax.vjp(function, x, gates, *of_weights)[1](dy)

            backward = jax.jit(gradients)
            # Six products, and two of the forward pass again.
            yield (
                {"name": "backward"} | labels,
                functools.partial(timed, backward, (problem.dy, *arguments), 8 * flops),
            )


def forward_error(y, problem: Problem) -> float:
    """Compares sampled rows of the forward pass with float64."""
    count = max(1, CHECKED_SLOTS // problem.experts.shape[1])
    sample = np.unique(np.linspace(0, len(problem.x) - 1, count).astype(int))
    worst = 0.0
    for row in sample:
        want = np.zeros(DIM)
        x = np.asarray(problem.x[row], np.float64)
        for expert, gate in zip(np.asarray(problem.experts[row]), np.asarray(problem.gates[row]), strict=True):
            of_expert = [jax.tree.map(lambda a, e=expert: a[e], w) for w in problem.weights]
            g, u, d = (np.asarray(cast_weight(w, jnp.bfloat16), np.float64) for w in of_expert)
            pre = x @ g
            want += (pre / (1 + np.exp(-pre)) * (x @ u) * gate) @ d
        worst = max(worst, float(np.abs(np.asarray(y[row], np.float64) - want).max() / np.sqrt(np.mean(want**2))))
    return worst


def decode() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Times few tokens on 256 experts: the bytes of the weights that are touched, over the time."""
    problem = draw(1, max(DECODE_TOKENS), DECODE_EXPERTS, DECODE_SLOTS)
    in_fp8 = [jax.jit(functools.partial(jax.lax.map, quantize_blocks))(weight) for weight in problem.weights]
    for tokens in DECODE_TOKENS:
        experts = problem.experts[:tokens]
        used = len(np.unique(np.asarray(experts)))
        for implementation, fp8 in [*((each, False) for each in IMPLEMENTATIONS), (IMPLEMENTATIONS[0], True)]:
            held: Any = tuple(in_fp8) if fp8 else problem.weights
            part = Problem(problem.x[:tokens], problem.dy[:tokens], experts, problem.gates[:tokens], held)
            touched = used * 3 * DIM * WIDTH * (1 if fp8 else 2)
            forward = jax.jit(functools.partial(expert_ffn, implementation=implementation))

            def run(forward=forward, part=part, touched=touched):
                arguments = part.x, part.experts, part.gates, *part.weights
                seconds = measure.seconds_per_call(forward, [arguments])["seconds"]
                rates = {"milliseconds": 1e3 * seconds, "tb_per_s": touched / seconds / 1e12}
                return rates | {"deviation": forward_error(forward(*arguments), part)}

            labels = {"name": "decode", "tokens": tokens, "weights": "e4m3" if fp8 else "bfloat16"}
            yield labels | {"touched_gb": touched / 1e9, "implementation": implementation}, run


def peers() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Times what exists: one product x · weight_e of sorted rows, and a plain product of the same size."""
    for count in ROWS:
        problem = draw(0, count, LOCAL_EXPERTS)
        sizes = jnp.bincount(problem.experts.reshape(-1), length=LOCAL_EXPERTS).astype(jnp.int32)
        flops, weight = 2 * count * DIM * WIDTH, problem.weights[0]
        labels = {"rows": count}
        plain = jax.jit(lambda x, w: jnp.einsum("md,df->mf", x, w, preferred_element_type=jnp.bfloat16))
        yield {"name": "a plain product"} | labels, functools.partial(timed, plain, (problem.x, weight[0]), flops)
        for name, fn in _grouped_peers():
            yield {"name": name} | labels, functools.partial(timed, jax.jit(fn), (problem.x, weight, sizes), flops)


def _grouped_peers() -> Iterator[tuple[str, Callable]]:
    yield "jax.lax.ragged_dot", lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes)
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    for block_m, block_n in ((128, 128), (128, 192), (64, 192)):
        config = dict(block_m=block_m, block_n=block_n, block_k=64, max_concurrent_steps=4, grid_block_n=8)
        name = f"jax.experimental.pallas.ops.gpu.ragged_dot_mgpu, {block_m} × {block_n}"
        yield name, functools.partial(_mosaic, ragged_dot_mgpu.ragged_dot, config)
    if importlib.util.find_spec("tokamax"):
        import tokamax

        yield "tokamax.ragged_dot", lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes, implementation="mosaic")


def _mosaic(ragged_dot, config, x, w, sizes):
    return ragged_dot(x, w, group_sizes=sizes, **config)


PARTS = {"kernels": kernels, "layer": layer, "decode": decode, "peers": peers}


def main() -> None:
    """Measures the parts that the command line names, and records them."""
    names, out = measure.command_line(__doc__, PARTS, OUT)
    peaks = measure.peaks()
    for name in names:
        measure.record(out, {name: {"peaks": peaks} | measure.run_timings(PARTS[name]())}, keep=PARTS.__contains__)


if __name__ == "__main__":
    main()
