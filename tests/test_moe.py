"""The router and the grouped product against float64 NumPy loops over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, as_numpy, equations, pulled, the_first
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import problem

from dsa_jax import grouped_ffn
from dsa_jax.config import Config
from dsa_jax.grouped_ffn import block_rows, expert_ffn
from dsa_jax.moe import MoE, expert_load, route, update_bias

pytestmark = pytest.mark.usefixtures("in_a_hurry")

WEIGHTS = (3, 4, 5)


def reference_route(x, weight, bias, config):
    """Routes one token at a time in float64, by sorting (score, index) pairs."""
    size = config.n_routed_experts // config.n_group
    experts, gates = [], []
    for token in np.asarray(x, np.float64):
        scores = 1 / (1 + np.exp(-token @ np.asarray(weight, np.float64)))
        biased = scores + np.asarray(bias, np.float64)
        group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
        groups = sorted(range(config.n_group), key=lambda g: (-group[g], g))[: config.topk_group]
        eligible = [e for e in range(config.n_routed_experts) if e // size in groups]
        chosen = sorted(eligible, key=lambda e: (-biased[e], e))[: config.num_experts_per_tok]
        gate = scores[chosen]
        experts.append(chosen)
        gates.append(config.routed_scaling_factor * (gate / (gate.sum() + 1e-20) if config.norm_topk_prob else gate))
    return np.array(experts), np.array(gates)


def reference_ffn(x, experts, gates, gate_proj, up_proj, down_proj):
    """Computes `expert_ffn` in float64, one slot at a time."""
    x, gates, gate_proj, up_proj, down_proj = (
        np.asarray(a, np.float64) for a in (x, gates, gate_proj, up_proj, down_proj)
    )
    y = np.zeros_like(x)
    for m, token in enumerate(x):
        for e, gate in zip(experts[m], gates[m], strict=True):
            if 0 <= e < len(gate_proj):
                z = token @ gate_proj[e]
                y[m] += gate * ((z / (1 + np.exp(-z)) * (token @ up_proj[e])) @ down_proj[e])
    return y


def reference_gradients(x, experts, gates, gate_proj, up_proj, down_proj, dy):
    """Computes the gradients of sum(dy · y) by hand in float64, one slot at a time."""
    x, gates, gate_proj, up_proj, down_proj, dy = (
        np.asarray(a, np.float64) for a in (x, gates, gate_proj, up_proj, down_proj, dy)
    )
    dx, dgates, dgate_proj, dup_proj, ddown_proj = (np.zeros_like(a) for a in (x, gates, gate_proj, up_proj, down_proj))
    for m, slot in np.ndindex(*experts.shape):
        e, token = experts[m, slot], x[m]
        if not 0 <= e < len(gate_proj):
            continue
        z, u = token @ gate_proj[e], token @ up_proj[e]
        s = 1 / (1 + np.exp(-z))
        h = z * s * u
        dgates[m, slot] = dy[m] @ (h @ down_proj[e])
        ddown_proj[e] += np.outer(h, dy[m]) * gates[m, slot]
        dh = down_proj[e] @ dy[m] * gates[m, slot]
        dz, du = dh * u * s * (1 + z * (1 - s)), dh * z * s
        dgate_proj[e] += np.outer(token, dz)
        dup_proj[e] += np.outer(token, du)
        dx[m] += gate_proj[e] @ dz + up_proj[e] @ du
    return dx, dgates, dgate_proj, dup_proj, ddown_proj


def pull_back(x, experts, gates, *weights, **options):
    """`expert_ffn` and its gradients by all but the experts."""
    return as_numpy(pulled(lambda x, gates, *w: expert_ffn(x, experts, gates, *w), x, gates, *weights, **options))


SHAPES = {  # tokens, experts of a token, experts, skew
    "idle_experts": (40, 2, 8, 3.0),
    "few_rows": (5, 2, 8, 0.5),
    "demo": (96, 2, 8, 0.0),
    "one_token": (1, 4, 16, 0.0),
    "one_expert": (300, 1, 1, 0.0),
    "all_to_one": (300, 1, 4, 50.0),
    "many_experts": (70, 3, 40, 0.1),
}


@pytest.mark.parametrize(("shape",), the_first(3, [(shape,) for shape in SHAPES.values()]), ids=SHAPES)
def test_values_and_gradients_match_a_loop_over_tokens(shape):
    tokens, slots, num_experts, skew = shape
    arrays = problem(0, tokens, slots, num_experts, skew=skew)
    dy = array(np.random.default_rng(1).standard_normal(arrays[0].shape))
    y, gradients = pull_back(*arrays, cotangent=lambda _: dy)
    np.testing.assert_allclose(y, reference_ffn(*map(np.asarray, arrays)), atol=1e-5)
    expected = reference_gradients(*map(np.asarray, arrays), dy)
    for name, gradient, reference in zip(["x", "gates", "gate", "up", "down"], gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-5 * max(1, np.abs(reference).max()), err_msg=name)


@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 7, 60]),
    num_experts=st.sampled_from([1, 5, 8]),
    slots=st.sampled_from([1, 3]),
    skew=st.sampled_from([0.0, 1.0, 20.0]),
)
@settings(max_examples=20, deadline=None)
def test_every_slot_has_its_own_row(seed, tokens, num_experts, slots, skew):
    slots = min(slots, num_experts)
    experts = np.asarray(problem(seed, tokens, slots, num_experts, 2, 2, skew=skew)[1])
    layout = jax.jit(grouped_ffn._lay_out, static_argnums=(1, 2))(experts, num_experts, 3)
    slot, row = np.asarray(layout.slot).ravel(), np.asarray(layout.row).ravel()
    np.testing.assert_array_equal(slot[row], np.arange(tokens * slots))
    assert (np.sort(slot)[tokens * slots :] == tokens * slots).all()
    owner = np.repeat(np.asarray(layout.expert).ravel(), layout.slot.shape[-1])
    np.testing.assert_array_equal(owner[row], experts.ravel())
    assert (np.diff(np.asarray(layout.expert).ravel()) >= 0).all()


def test_slots_of_experts_outside_the_range_contribute_nothing():
    """Two shards that hold half of the experts each add up to the whole, gradients included."""
    x, experts, gates, *weights = as_numpy(problem(2, 50, 3, 8))

    @jax.jit
    def run(experts, weights):
        y, gradients = pulled(lambda x, gates, *w: expert_ffn(x, experts, gates, *w), x, gates, *weights)
        return y, *gradients

    whole = as_numpy(run(experts, weights))
    halves = [as_numpy(run(experts - 4 * i, [w[4 * i : 4 * i + 4] for w in weights])) for i in range(2)]
    for i in range(3):  # y, dx, dgates
        np.testing.assert_allclose(halves[0][i] + halves[1][i], whole[i], atol=1e-5)
    for i in WEIGHTS:
        np.testing.assert_allclose(np.concatenate([h[i] for h in halves]), whole[i], atol=1e-5)


@pytest.mark.parametrize("num_experts", [8, 40])
def test_chunks_of_blocks_change_nothing(monkeypatch, num_experts):
    arrays = problem(3, 200, 2, num_experts, skew=0.3)
    loss = lambda x, e, *rest: jnp.sum(jnp.sin(expert_ffn(x, e, *rest)))
    run = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4, 5)))(*arrays)
    whole = run()
    monkeypatch.setattr(grouped_ffn, "CHUNK_BYTES", 5 * 3 * 4 * 8 * 6)
    assert "scan" in str(jax.make_jaxpr(expert_ffn)(*arrays))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_computes_in_bfloat16_and_accumulates_weight_gradients_in_float32():
    """2000 equal rows: adding them up in bfloat16 would stop growing at 256 times the first."""
    x, experts, gates, *weights = problem(4, 2000, 1, 1, dtype=jnp.bfloat16)
    x = array(np.broadcast_to(np.asarray(x)[:1], x.shape), x.dtype)
    weights = [array(w, "float32") for w in weights]
    y, gradients = pull_back(x, experts, array(np.ones(gates.shape)), *weights)
    assert y.dtype == jnp.bfloat16 and [g.dtype for g in gradients] == [jnp.bfloat16] + [jnp.float32] * 4
    rounded = [np.asarray(array(w, jnp.bfloat16), np.float64) for w in weights]
    arrays = np.asarray(x, np.float64), np.asarray(experts), np.ones(gates.shape), *rounded
    np.testing.assert_allclose(np.asarray(y, np.float64), reference_ffn(*arrays), rtol=0.03, atol=0.02)
    expected = reference_gradients(*arrays, np.ones(x.shape))
    for gradient, reference in zip(gradients[2:], expected[2:], strict=True):
        np.testing.assert_allclose(gradient, reference, atol=0.02 * np.abs(reference).max())


def test_bfloat16_parameters_get_bfloat16_gradients():
    x, experts, gates, *weights = problem(5, 20, 2, 4, dtype=jnp.bfloat16)
    _, gradients = pulled(lambda *w: expert_ffn(x, experts, gates, *w), *weights)
    assert {g.dtype for g in gradients} == {jnp.dtype("bfloat16")}


def test_results_are_bitwise_repeatable():
    arrays = problem(6, 300, 2, 8)
    run = jax.jit(
        jax.value_and_grad(lambda x, e, *rest: jnp.sum(expert_ffn(x, e, *rest) ** 2), argnums=(0, 2, 3, 4, 5))
    )
    first = run(*arrays)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, first, run(*arrays))


def test_no_scatter_adds_to_rows_that_repeat():
    """On GPUs a scatter that adds to one place twice does so in any order."""
    arrays = problem(6, 300, 2, 8)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x, e, *rest: jnp.sum(expert_ffn(x, e, *rest)), argnums=(0, 2, 3)))(*arrays)

    names = "scatter-add", "scatter_add"
    found = [equation for equation in equations(jaxpr) if equation.primitive.name.startswith(names)]
    assert found and all(equation.params["unique_indices"] for equation in found)


@pytest.mark.parametrize(
    ("slots", "num_experts", "rows"),
    [(8, 256, 1), (2048 * 8, 256, 64), (4096, 8, 128), (768, 256, 2), (2**18, 8, 2048), (2**20, 256, 256)],
)
def test_blocks_fit_the_rows_of_an_expert(slots, num_experts, rows):
    assert block_rows(slots, num_experts) == rows


ROUTERS = {
    "tiny": Config.tiny(),
    "published": Config.deepseek_v32(),
    "no_groups": Config.tiny(n_group=1, topk_group=1, norm_topk_prob=False),
    "two_groups": Config.tiny(n_group=2, topk_group=1, routed_scaling_factor=0.7),
}


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_routing_matches_a_loop_over_tokens(config):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 24)).astype(np.float32)
    weight = (rng.standard_normal((24, config.n_routed_experts)) * 0.2).astype(np.float32)
    bias = (rng.standard_normal(config.n_routed_experts) * 0.1).astype(np.float32)
    experts, gates = jax.jit(lambda *a: route(*a, config=config))(x, weight, bias)
    expected_experts, expected_gates = reference_route(x, weight, bias, config)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5)
    assert experts.dtype == jnp.int32 and gates.dtype == jnp.float32


def test_ties_go_to_the_lowest_expert_of_the_lowest_groups():
    config = Config.tiny(num_experts_per_tok=3)
    experts, gates = jax.jit(lambda *a: route(*a, config=config))(
        *(np.zeros(n, np.float32) for n in [(2, 4), (4, 8), 8])
    )
    np.testing.assert_array_equal(experts, [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_allclose(gates, config.routed_scaling_factor / 3, rtol=1e-6)


def test_the_bias_chooses_and_does_not_weigh():
    config = Config.tiny(n_group=1, topk_group=1, num_experts_per_tok=1, norm_topk_prob=False)
    x, weight, bias = np.zeros((1, 4), np.float32), np.zeros((4, 8), np.float32), np.zeros(8, np.float32)
    x[0, 0], weight[0, 2], bias[5] = 1.0, 1.0, 10.0

    def total(bias):
        experts, gates = route(jnp.asarray(x), jnp.asarray(weight), bias, config=config)
        return gates.sum(), (experts, gates)

    gradient, (experts, gates) = jax.jit(jax.grad(total, has_aux=True))(bias)
    np.testing.assert_array_equal(experts, [[5]])
    np.testing.assert_allclose(gates, [[0.5 * config.routed_scaling_factor]], rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_routing_is_float32_whatever_the_input():
    config = Config.tiny()
    rng = np.random.default_rng(0)
    x = array(rng.standard_normal((3, 50, 16)), jnp.bfloat16)
    weight = array(rng.standard_normal((16, 8)), jnp.float32)
    of = jax.jit(lambda x: route(x, weight, jnp.zeros(8), config=config))
    low, wide = of(x), of(array(x, "float32"))
    jax.tree.map(np.testing.assert_array_equal, low, wide)


def test_load_counts_valid_slots_alone():
    experts = jnp.asarray([[[0, 1], [1, 3], [1, 2]]])
    np.testing.assert_array_equal(expert_load(experts, None, 4), [1, 3, 1, 1])
    np.testing.assert_array_equal(expert_load(experts, jnp.asarray([[True, False, True]]), 4), [1, 2, 1, 0])


def test_the_bias_moves_against_the_load():
    load = jnp.asarray([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    moved = update_bias(jnp.zeros((2, 4)), load, 0.01)
    np.testing.assert_allclose(moved, [[-0.01, 0.01, 0, 0], [0, 0, 0, 0]])


def test_updating_the_bias_evens_the_load():
    config = Config.tiny()
    rng = np.random.default_rng(0)
    x = array(rng.standard_normal((512, 16)) + 0.5, jnp.float32)
    weight = array(rng.standard_normal((16, 8)) * 0.3, jnp.float32)
    step = jax.jit(
        lambda bias: (
            update_bias(bias, load := expert_load(route(x, weight, bias, config=config)[0], None, 8), 0.01),
            load,
        )
    )
    bias, first = step(jnp.zeros(8))
    for _ in range(100):
        bias, load = step(bias)
    assert first.max() > 1.5 * first.mean() and load.max() < 1.2 * load.mean()


def test_module_is_experts_plus_shared():
    config = Config.tiny()
    layer = MoE(config, rngs=nnx.Rngs(0))
    x = array(np.random.default_rng(0).standard_normal((2, 9, config.hidden_size)), jnp.float32)
    valid = jnp.arange(9)[None] < jnp.asarray([9, 4])[:, None]
    y, load, chosen = jax.jit(lambda x: layer(x, valid=valid))(x)
    flat = np.asarray(x).reshape(18, -1)
    experts, gates = reference_route(flat, layer.gate.weight[...], layer.gate.e_score_correction_bias[...], config)
    weights = (layer.experts.gate_proj[...], layer.experts.up_proj[...], layer.experts.down_proj[...])
    routed = reference_ffn(flat, experts, gates, *weights).reshape(x.shape)
    np.testing.assert_allclose(y, routed + np.asarray(jax.jit(layer.shared_experts)(x)), atol=1e-5)
    assert load.sum() == 13 * config.num_experts_per_tok and load.dtype == jnp.float32
    without = MoE(dataclasses.replace(config, n_shared_experts=0), rngs=nnx.Rngs(0))
    assert without.shared_experts is None and jax.eval_shape(without, x)[0].shape == x.shape


def test_imposed_experts_get_the_routers_gates():
    config = Config.tiny()
    layer = MoE(config, rngs=nnx.Rngs(0))
    x = array(np.random.default_rng(0).standard_normal((2, 9, config.hidden_size)), jnp.float32)
    graph, state = nnx.split(layer)
    run = jax.jit(lambda x, **options: nnx.merge(graph, state)(x, **options))
    y, load, chosen = as_numpy(run(x))
    again = run(x, routed=chosen[..., ::-1])
    np.testing.assert_allclose(again[0], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(again[1], load)
    some = np.where(np.arange(x.shape[1])[:, None] < 2, np.int32(-1), chosen)
    np.testing.assert_array_equal(run(x, routed=some)[2], chosen)
    other = (chosen + 1) % config.n_routed_experts
    experts, gates = jax.jit(lambda x, other: nnx.merge(graph, state).gate(x, other))(x, other)
    np.testing.assert_array_equal(experts, other)
    scores = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(layer.gate.weight[...], np.float64)))
    picked = np.take_along_axis(scores, other, -1)
    want = config.routed_scaling_factor * picked / picked.sum(-1, keepdims=True)
    np.testing.assert_allclose(gates, want, rtol=1e-5)
    assert np.abs(np.asarray(run(x, routed=other)[0]) - y).max() > 1e-3


def test_module_state_is_named_as_in_checkpoints():
    config = Config.tiny(param_dtype="bfloat16")
    state = nnx.split(MoE(config, rngs=nnx.Rngs(0)))[1]
    shapes = {".".join(map(str, path)): (leaf.shape, str(leaf.dtype)) for path, leaf in nnx.to_flat_state(state)}
    assert shapes == {
        "gate.weight": ((128, 8), "bfloat16"),
        "gate.e_score_correction_bias": ((8,), "float32"),
        "experts.gate_proj": ((8, 128, 128), "bfloat16"),
        "experts.up_proj": ((8, 128, 128), "bfloat16"),
        "experts.down_proj": ((8, 128, 128), "bfloat16"),
        "shared_experts.gate_proj": ((128, 128), "bfloat16"),
        "shared_experts.up_proj": ((128, 128), "bfloat16"),
        "shared_experts.down_proj": ((128, 128), "bfloat16"),
    }


def test_wrong_shapes_are_named(unchecked):
    x, experts, gates, *weights = problem(0, 6, 2, 4)
    with pytest.raises(ValueError, match=r"gates must be of shape \(6, 2\), got \(6, 1\)"):
        expert_ffn(x, experts, gates[:, :1], *weights)
    with pytest.raises(ValueError, match=r"x must be of shape \(6, 8\), got \(6, 7\)"):
        expert_ffn(x[:, :7], experts, gates, *weights)
    with pytest.raises(ValueError, match=r"down_proj must be of shape \(4, 6, 8\), got \(4, 8, 6\)"):
        expert_ffn(x, experts, gates, *weights[:2], weights[0])
