"""Schedules, clipping by group, and Muon on stacked matrices."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FAST
from train_cases import small_config, small_params

from train.optimizer import (
    MATRICES,
    OptimizerSettings,
    decay_mask,
    learning_rates,
    make_optimizer,
    make_schedule,
    muon_dimensions,
    stage_scale,
)


def test_schedules():
    constant = make_schedule(2.0, OptimizerSettings(2.0, warmup_steps=3), 10)
    np.testing.assert_allclose(
        jnp.stack([jnp.asarray(constant(i)) for i in (0, 1, 2, 3, 9)]), [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6
    )
    cosine = make_schedule(2.0, OptimizerSettings(2.0, schedule="cosine"), 10)
    for step, rate in {0: 2.0, 5: 1.0, 10: 0.0}.items():
        np.testing.assert_allclose(jnp.asarray(cosine(step)), rate, atol=1e-6)


def test_stages_scale_a_schedule_from_their_first_step_to_their_last():
    constant = make_schedule(2.0, OptimizerSettings(2.0, warmup_steps=1), 9)
    scale = stage_scale([(3, (1.0, 1.0)), (1, (0.5, 9.0)), (5, (1.0, 0.2))])
    scaled = make_schedule(2.0, OptimizerSettings(2.0, warmup_steps=1), 9, scale)
    factors = [1, 1, 1, 0.5, 1, 0.8, 0.6, 0.4, 0.2]
    expected = [np.asarray(constant(step)) * factor for step, factor in enumerate(factors)]
    np.testing.assert_allclose([scaled(step) for step in range(9)], expected, rtol=1e-6)
    assert stage_scale([(3, (1.0, 1.0)), (2, (1, 1))]) is None
    rates = learning_rates(OptimizerSettings(1.0, muon_learning_rate=0.1), 9, scale)
    np.testing.assert_allclose([rates[name](8) for name in rates], [0.2, 0.02], rtol=1e-6)


@pytest.mark.parametrize("muon", [None, 0.5])
def test_a_scaled_step_is_that_part_of_a_whole_one(muon):
    settings = OptimizerSettings(0.1, muon_learning_rate=muon, weight_decay=0.0)
    params = {"moe_layers": {"gate_proj": np.eye(4, dtype=np.float32)[None]}, "bias": np.ones(3, np.float32)}
    grads = jax.tree.map(lambda x: x + 0.5, params)

    whole, part = (first_update(settings, grads, params, scale) for scale in (None, stage_scale([(4, (0.25, 1.0))])))
    chex.assert_trees_all_close(part, jax.tree.map(lambda x: 0.25 * x, whole), rtol=1e-5)


NO_NUMBERS = (float("nan"), float("inf"), True, "1", None, 10**400, 1e39)
BAD = {
    "schedule": ("linear", None, []),
    "learning_rate": (0.0, -1e-3, 1e-60, *NO_NUMBERS),
    "muon_learning_rate": (0.0, -1.0, *(x for x in NO_NUMBERS if x is not None)),
    "warmup_steps": (-1, 1.5, 2**31, 10**5000, *NO_NUMBERS),
    "b1": (1.0, 2, -0.1, 1 - 1e-12, *NO_NUMBERS),
    "b2": (1.0, 2, -0.1, 1 - 1e-12, *NO_NUMBERS),
    "weight_decay": (-1.0, *NO_NUMBERS),
    "clip": (0, -1.0, *NO_NUMBERS),
    "moment_dtype": ("float16", None, 16, []),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named_in_one_line(name):
    assert BAD.keys() == {field.name for field in dataclasses.fields(OptimizerSettings)}
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name} must be") as error:
            OptimizerSettings(**{"learning_rate": 1e-3, name: value})
        assert len(str(error.value)) < 200


def test_settings_at_the_edge_of_their_range():
    OptimizerSettings(1, muon_learning_rate=None, warmup_steps=0, b1=0, b2=0.0, weight_decay=0, clip=1e12)


def first_update(settings, grads, params, scale=None) -> Any:
    optimizer = make_optimizer(settings, 10, scale)
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0], compiler_options=FAST)
    return jax.device_get(update(grads))


def singular_values(update, reduction, output):
    """Those of each matrix of a stack, its head axes folded to the side they stand on; and both sides' sizes."""
    fan_in, fan_out = (int(np.prod([update.shape[axis] for axis in axes])) for axes in (reduction, output))
    lead = update.shape[: update.ndim - len(reduction) - len(output)]
    matrices = np.asarray(update, np.float64).reshape(*lead, fan_in, fan_out)
    return np.linalg.svd(matrices, compute_uv=False), fan_in, fan_out


STACKS = {
    ("self_attn", "q_b_proj"): ((-3,), (-2, -1)),
    ("self_attn", "o_proj"): ((-3, -2), (-1,)),
    ("mlp", "experts", "down_proj"): ((-2,), (-1,)),
}


def test_muon_orthogonalises_every_matrix_of_a_stack_by_itself():
    """Gradients whose layers differ a million-fold in size still give updates of one spectrum."""
    params = small_params(small_config(first_k_dense_replace=0))["backbone"]
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    for stack in jax.tree.leaves(grads["moe_layers"]):
        stack[0] *= 1e6
    update = first_update(OptimizerSettings(1.0, muon_learning_rate=1.0, weight_decay=0.0, clip=1e12), grads, params)
    update = update["moe_layers"]
    for path, axes in STACKS.items():
        values, fan_in, fan_out = singular_values(functools.reduce(lambda tree, name: tree[name], path, update), *axes)
        values = values / max(1.0, fan_out / fan_in) ** 0.5
        assert values.min() > 0.3 and values.max() < 1.6, (path, values)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest():
    params = small_params(small_config())["backbone"]
    leaf = lambda x: x is None or isinstance(x, tuple)
    flat = jax.tree_util.tree_flatten_with_path(muon_dimensions(params), is_leaf=leaf)[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): axes is not None for path, axes in flat}
    assert names["dense_layers/self_attn/kv_b_proj"] and names["moe_layers/mlp/experts/gate_proj"]
    for name in ("embed_tokens", "lm_head", "moe_layers/mlp/gate/weight", "dense_layers/input_layernorm/weight"):
        assert not names[name], name
    state = make_optimizer(OptimizerSettings(1e-3, muon_learning_rate=0.02), 10).init(params)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


def test_normalisations_do_not_decay():
    norms = {"norm": {"weight": jnp.ones(2)}, "q_a_layernorm": {"weight": jnp.ones(2)}, "k_norm": {"bias": jnp.ones(2)}}
    params = norms | {"lm_head": jnp.ones((2, 2))}
    updates = first_update(OptimizerSettings(0.1, weight_decay=0.5), jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["lm_head"], -0.05, rtol=1e-6)
    assert all(not leaf.any() for name in norms for leaf in jax.tree.leaves(updates[name]))
    assert jax.tree.leaves(decay_mask(params)) == [False, True, False, False]


def test_what_muon_leaves_to_adamw_decays_too():
    """By each part's own rate; normalisations never."""
    params = jax.tree.map(np.ones_like, small_params(small_config())["backbone"])
    settings = OptimizerSettings(0.1, muon_learning_rate=0.02, weight_decay=0.5)
    updates = first_update(settings, jax.tree.map(np.zeros_like, params), params)
    flat = jax.tree_util.tree_flatten_with_path(updates)[0]
    updates = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    for name, leaf in updates.items():
        is_norm, is_matrix = "norm" in name, name.rsplit("/", 1)[-1] in MATRICES
        np.testing.assert_allclose(leaf, 0.0 if is_norm else -0.01 if is_matrix else -0.05, rtol=1e-5, err_msg=name)
    assert {"embed_tokens", "lm_head", "moe_layers/mlp/gate/weight", "norm/weight"} <= updates.keys()


def test_a_group_is_clipped_by_its_own_norm():
    """Adam forgets scale, so it is seen in the first moment: norm 0.1 of a gradient of norm 500 clipped to 1."""
    params = {"lm_head": jnp.zeros((3, 4))}
    optimizer = make_optimizer(OptimizerSettings(0.1), 10)
    _, state = optimizer.update({"lm_head": jnp.full((3, 4), 500.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, "mu")), 0.1, rtol=1e-5)
