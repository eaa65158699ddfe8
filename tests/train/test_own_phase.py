"""A phase of one's own: its losses, its selection, its name in run.json; on one device and on meshes."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_cases import mesh_of
from train_cases import compiled, one_layer_run, small_batch, small_config, small_params, write_preset

from dsa_jax.parallel.sharding import place_batch
from train.data import load
from train.losses import Loss, cross_entropy
from train.optimizer import OptimizerSettings
from train.phases import PHASES, Phase, merge_groups
from train.presets import load_preset
from train.run import Run, load_model
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import abstract_params, init_state, place_state
from train.step import make_step

pytestmark = pytest.mark.usefixtures("in_a_hurry")
PROMPT = 3  # tokens of each document that are given, not learnt


def is_answer(batch):
    return batch.valid & (batch.positions >= PROMPT)


ANSWER_LOSS = Loss(
    total=lambda model, output, batch: cross_entropy(
        output.hidden, model.unembedding(), batch.targets, is_answer(batch)
    ),
    count=lambda batch: jnp.sum(is_answer(batch)),
)
SIZE_LOSS = Loss(
    total=lambda model, output, batch: 0.1 * jnp.sum(jnp.mean(output.hidden**2, axis=-1) * batch.keys.nonempty()),
    count=lambda batch: jnp.sum(batch.keys.nonempty()),
)
ANSWERS = Phase("ANSWERS", "sparse", trains=("backbone",), losses=(("answer_loss", ANSWER_LOSS), ("size", SIZE_LOSS)))


def settings(*stages: Stage) -> PhaseSettings:
    return PhaseSettings(ANSWERS, stages or (Stage(3, 8, 16),), backbone=OptimizerSettings(1e-3), bias_rate=1e-2)


CONFIG = small_config(num_attention_heads=4, num_hidden_layers=1, first_k_dense_replace=0)
BATCH = small_batch(8, 16)


def first_step(mesh=None, micro_batches=1):
    """Takes one step; (the state after it, its metrics)."""
    state = init_state(jax.tree.map(jnp.array, small_params(CONFIG)), settings(), jnp.zeros(2, jnp.uint32))
    state, batch = (state, BATCH) if mesh is None else (place_state(state, mesh), place_batch(BATCH, mesh))
    step = make_step(abstract_params(CONFIG)[0], settings(), micro_batches=micro_batches, mesh=mesh)
    return jax.device_get(compiled(step, state, batch)(state, batch))


@pytest.fixture(scope="module")
def one():
    return first_step()


@pytest.mark.slow
def test_its_losses_are_means_over_what_they_count(one):
    _, metrics = one
    model = merge_groups(abstract_params(CONFIG)[0], jax.tree.map(jnp.array, small_params(CONFIG)))
    output = jax.jit(lambda tokens: model(tokens, keys=BATCH.keys, positions=BATCH.positions))(BATCH.tokens)
    log_p = jax.nn.log_softmax(model.unembed(output.hidden))
    nll = -np.take_along_axis(np.asarray(log_p), BATCH.targets[..., None], -1)[..., 0]
    answers, queries = np.asarray(is_answer(BATCH)), np.asarray(BATCH.keys.nonempty())
    assert 0 < answers.sum() < BATCH.valid.sum() < queries.sum()
    np.testing.assert_allclose(metrics["answer_loss"], nll[answers].mean(), rtol=1e-5)
    size = 0.1 * np.square(np.asarray(output.hidden)).mean(-1)[queries].mean()
    np.testing.assert_allclose(metrics["size"], size, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["answer_loss"] + metrics["size"], rtol=1e-6)
    assert "lm_loss" not in metrics and "kl" not in metrics and metrics["tokens"] == queries.sum()


@pytest.mark.slow
def test_meshes_and_micro_batches_change_rounding_alone(one):
    """Shards and micro-batches sum their own tokens, of which each has another share that counts."""
    state, metrics = first_step(mesh_of("data=2,context=2,tensor=2"), micro_batches=2)
    chex.assert_trees_all_close(metrics, one[1], rtol=2e-5)
    chex.assert_trees_all_close(state.opt_state, one[0].opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_it_runs_on_a_mesh_and_comes_back_from_run_json(tmp_path):
    config, mesh = one_layer_run(tmp_path / "text", phases=(settings(Stage(3, 2, 16)),)), mesh_of("data=2,tensor=2")
    out = tmp_path / "out"
    Run(config, out, mesh=mesh).train(load(config.data))
    values = json.loads((out / "run.json").read_text())["run"]
    assert values["phases"][0]["name"] == "ANSWERS"
    found = RunConfig.from_json(values, phases=PHASES | {"ANSWERS": ANSWERS})
    assert found == config
    records = Run(found, out).records()
    assert [(record["phase"], record["phase_step"]) for record in records] == [("ANSWERS", i) for i in (1, 2, 3)]
    assert all({"answer_loss", "size"} < record.keys() and "lm_loss" not in record for record in records)
    state = Run(found, out).train(load(config.data), resume=True)  # on one device, where nothing is left to do
    chex.assert_trees_all_equal(state.params, Run(found, out).params_after("ANSWERS"))
    assert load_model(out).config == config.model  # whose phases need not be known for that
    path = str(write_preset(config, tmp_path / "mine.json"))
    with pytest.raises(ValueError, match=r"run.phases\[0\].name must be one of BASE, .*, got 'ANSWERS'"):
        load_preset(path)
