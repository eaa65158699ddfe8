"""Steps with prediction layers: their losses by the definition, who moves, and what is computed where they do not."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close
from train_cases import compiled, small_batch, small_config, small_params, small_phases

from dsa_jax import Transformer
from train.losses import token_losses
from train.phases import BASE, SPARSE, WINDOW_CONTROL, Phase, merge_groups
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import abstract_params, abstract_state, init_state
from train.step import make_step

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=2)
STAGES = Stage(2, 4, 16, prediction_weight=0.3), Stage(1, 4, 16, prediction_weight=0.1)


def settings_of(name, *, predictions=True):
    """A phase with AdamW throughout, of two steps at one weight and one at another."""
    phases = small_phases(*STAGES)
    adamw = phases["SPARSE"].backbone
    backbone = adamw if "backbone" in phases[name].phase.trains else None
    return dataclasses.replace(phases[name], backbone=backbone, predictions=predictions)


def copy(tree):
    return jax.tree.map(np.array, tree)


@functools.cache
def steps(name, count=1, predictions=True):
    """The parameters before, and for each of so many steps over the small batch the state after and the metrics."""
    settings, batch = settings_of(name, predictions=predictions), small_batch()
    params = jax.tree.map(jnp.array, small_params(CONFIG))
    state = init_state(params, settings, jnp.zeros(2, jnp.uint32))
    before = copy(state.params)
    step, found = compiled(make_step(abstract_params(CONFIG)[0], settings), state, batch), []
    for _ in range(count):
        state, metrics = step(state, batch)
        found.append(copy((state, metrics)))
    return before, found


@functools.cache
def definition(attention) -> dict[str, float]:
    """The terms by their definition: means over what each depth has, found token by token."""
    batch: Any = small_batch()
    model: Transformer = merge_groups(abstract_params(CONFIG)[0], small_params(CONFIG))
    options: Any = dict(keys=batch.keys, positions=batch.positions, attention=attention, return_predicted=True)
    out = model(jnp.asarray(batch.tokens), **options)
    predicted: Any = out.predicted
    rows, length = batch.tokens.shape
    found = {}
    for depth in (1, 2):
        losses, divergences = [], []
        targets = np.zeros_like(batch.targets)
        targets[:, : length - depth] = batch.targets[:, depth:]
        by_token = np.asarray(token_losses(predicted.hidden[depth - 1], model.unembedding(), jnp.asarray(targets)))
        for row, at in np.ndindex(rows, length - depth):
            here, there = ((batch.start[row, i], batch.stop[row, i] > batch.start[row, i]) for i in (at, at + depth))
            if here == there and here[1]:
                divergences.append(predicted.indexer_kl[depth - 1, row, at])
                if batch.valid[row, at + depth]:
                    losses.append(by_token[row, at])
        assert len(losses) < len(divergences), "the last of a document has no target"
        found |= {f"mtp_loss_{depth}": np.mean(losses), f"mtp_kl_{depth}": np.mean(divergences)}
    return found


OTHERS = [pytest.param(name, marks=pytest.mark.variants) for name in ("WARMUP", "BASE")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SPARSE", *OTHERS])
def test_the_terms_are_those_of_the_definition(name):
    """L = the phase's own losses + lambda / D · sum of depths' cross-entropies + the KLs of their indexers."""
    _, [(_, metrics), *_] = steps(name, 3 if name == "SPARSE" else 1)
    expected = definition("sparse" if name == "SPARSE" else "dense")
    kinds = {"BASE": ["loss"], "WARMUP": ["kl"], "SPARSE": ["loss", "kl"]}[name]
    names = [f"mtp_{kind}_{depth}" for kind in kinds for depth in (1, 2)]
    assert sorted(each for each in metrics if each.startswith("mtp_")) == sorted([*names, "mtp_weight"])
    for each in names:
        close(metrics[each], expected[each], 1e-4)
    own = sum(metrics.get(each, 0.0) for each in ("lm_loss", "kl"))
    whole = own + sum(metrics[each] * (0.15 if "loss" in each else 1) for each in names)
    np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)


def test_the_weight_is_its_stages():
    _, found = steps("SPARSE", 3)
    np.testing.assert_allclose([metrics["mtp_weight"] for _, metrics in found], [0.3, 0.3, 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["SPARSE", OTHERS[0]])
def test_who_moves(name):
    """In the warm-up the indexers alone, those of prediction layers too; else everything, routers' biases as well."""
    before, [(state, metrics), *_] = steps(name, 3 if name == "SPARSE" else 1)
    moved = lambda group: [
        not np.array_equal(a, b)
        for a, b in zip(
            *(jax.tree.leaves(params[group]["prediction_layers"]) for params in (before, state.params)), strict=True
        )
    ]
    assert all(moved("indexer"))
    assert all(moved("backbone")) if name == "SPARSE" else not any(moved("backbone"))
    assert any(moved("router_bias")) == (name == "SPARSE")
    if name == "WARMUP":
        chex.assert_trees_all_equal(state.params["backbone"], before["backbone"])
        assert metrics["mtp_kl_1"] > 0


def test_layers_that_are_left_out_cost_nothing():
    """No moments, and the step of a model without them has as many operations."""
    settings = settings_of("SPARSE", predictions=False)
    state, batch = abstract_state(CONFIG, settings), small_batch()
    assert not any("prediction_layers" in str(path) for path, _ in jax.tree.leaves_with_path(state.opt_state))

    def flops(config):
        lowered = make_step(abstract_params(config)[0], settings).lower(abstract_state(config, settings), batch)
        return lowered.cost_analysis()["flops"]

    plain = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    assert flops(CONFIG) == flops(plain)


@pytest.mark.slow
def test_layers_that_are_left_out_stay():
    """The same bits, and nothing of them in the metrics."""
    before, [(after, metrics)] = steps("SPARSE", predictions=False)
    for group, params in before.items():
        chex.assert_trees_all_equal(after.params[group]["prediction_layers"], params["prediction_layers"])
    assert not any(name.startswith("mtp_") for name in metrics)


def test_bad_settings_are_refused():
    adamw = settings_of("SPARSE").backbone
    own = Phase("OWN", "sparse", ("backbone",), (("other", dataclasses.replace(SPARSE.losses[0][1], layers=min)),))
    for phase in (own, WINDOW_CONTROL):
        with pytest.raises(ValueError, match=f"predictions need LM_LOSS or KL_LOSS .* got phase {phase.name}"):
            PhaseSettings(phase, STAGES, backbone=adamw, predictions=True)
    with pytest.raises(ValueError, match="predictions must be True or False, got 1"):
        PhaseSettings(BASE, STAGES, backbone=adamw, predictions=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prediction_weight must be"):
        Stage(1, 1, 1, prediction_weight=-0.1)
    with pytest.raises(ValueError, match="predictions of phase BASE need num_nextn_predict_layers above 0, got 0"):
        RunConfig(small_config(), (PhaseSettings(BASE, STAGES, backbone=adamw, predictions=True),))


def test_settings_are_read_back():
    run = RunConfig(CONFIG, (settings_of("SPARSE"),))
    assert RunConfig.from_json(run.to_json()) == run
