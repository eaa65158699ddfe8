"""Training where layers share selections: every phase's step, what moves, and the same numbers on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST
from sharded_cases import mesh_of
from train_cases import small_batch, small_config, small_params, small_phases

from dsa_jax.parallel.sharding import place_batch
from train.phases import BASE
from train.state import abstract_params, init_state, place_state
from train.step import make_step

TYPES = ("full", "shared") * 2
CONFIG = small_config(num_hidden_layers=4, first_k_dense_replace=0, indexer_types=TYPES)
MESH = "data=2,context=2,tensor=2"


@functools.cache
def stepped(config, name, mesh=None):
    """A step of a phase: the parameters before and after it, and its metrics."""
    settings, before = small_phases()[name], small_params(config)
    if settings.phase is BASE:
        settings = dataclasses.replace(settings, backbone=small_phases()["SPARSE"].backbone)
    state = init_state(jax.tree.map(jnp.array, before), settings, jnp.asarray([0, 7], jnp.uint32))
    batch = small_batch()
    if mesh is not None:
        state, batch = place_state(state, mesh), place_batch(batch, mesh)
    step = make_step(abstract_params(config)[0], settings, mesh=mesh)
    after, metrics = step.lower(state, batch).compile(compiler_options=FAST)(state, batch)
    return before, jax.device_get(after.params), jax.device_get(metrics)


@pytest.mark.parametrize("name", [pytest.param("BASE", marks=pytest.mark.variants), "WARMUP", "SPARSE"])
def test_a_step_moves_what_its_phase_trains(name):
    before, after, metrics = stepped(CONFIG, name)
    assert np.isfinite(metrics["loss"])
    trained = small_phases()[name].phase.trains
    for group in ("backbone", "indexer", "router_bias"):
        moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before[group], after[group])
        expected = group in trained or (group == "router_bias" and "backbone" in trained)
        assert all(each == expected for each in jax.tree.leaves(moved)), (group, moved)
    if name != "BASE":
        layers = metrics["kl_layers"]
        assert layers.shape == (4,) and np.all(layers > 0)
        np.testing.assert_allclose(layers.sum(), metrics["kl"], rtol=1e-5)


def test_the_loss_counts_an_indexer_once():
    """The layers of an indexer share one; alone it has its own layer's divergence, and the others have none."""
    shared = stepped(CONFIG, "WARMUP")[2]["kl_layers"]
    own = stepped(dataclasses.replace(CONFIG, index_share_kl="own"), "WARMUP")[2]["kl_layers"]
    leads = np.array([kind == "full" for kind in TYPES])
    np.testing.assert_allclose(own[leads], 2 * shared[leads], rtol=1e-5)
    assert not own[~leads].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("WARMUP", marks=pytest.mark.variants), "SPARSE"])
def test_a_mesh_steps_as_one_device_does(name):
    _, alone, of_one = stepped(CONFIG, name)
    _, after, metrics = stepped(CONFIG, name, mesh_of(MESH))
    np.testing.assert_allclose(metrics["kl_layers"], of_one["kl_layers"], rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], of_one["loss"], rtol=1e-4)
    assert metrics["grad_norm_indexer"] == pytest.approx(of_one["grad_norm_indexer"], rel=1e-2)
    assert jax.tree.structure(after) == jax.tree.structure(alone)
