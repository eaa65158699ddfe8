"""One step: who moves, what is computed, and that splitting a batch changes rounding alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import the_first
from flax import nnx
from train_cases import compiled, small_batch, small_config, small_params, small_phases

from train.losses import LM_LOSS
from train.phases import GROUPS, PHASES, SPARSE, Phase, group_of, merge_groups, split_groups, window_selection
from train.settings import PhaseSettings
from train.state import abstract_params, abstract_state, init_state
from train.step import MAX_STEPS, make_step


def settings_of(name):
    """Gives a phase's settings; a control has those of SPARSE."""
    phases = small_phases()
    return phases[name] if name in phases else dataclasses.replace(phases["SPARSE"], phase=PHASES[name])


def start(name: str | PhaseSettings, **changes):
    """(graphdef, settings, state) of a small model at the start of a phase."""
    config = small_config(**changes)
    settings = settings_of(name) if isinstance(name, str) else name
    params = jax.tree.map(jnp.array, small_params(config))
    return abstract_params(config)[0], settings, init_state(params, settings, jnp.zeros(2, jnp.uint32))


def copy(tree):
    return jax.tree.map(np.array, tree)


@functools.cache
def first_step(name, micro_batches=1, padding_rows=0):
    """(the parameters before, the state after, the metrics) of one step over the small batch, compiled once for all."""
    graphdef, settings, state = start(name)
    before, batch = copy(state.params), small_batch()
    empty = jax.tree.map(lambda x: np.zeros((padding_rows, *x.shape[1:]), x.dtype), batch)
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), batch, empty)
    is_plain = micro_batches == 1 and not padding_rows
    step = (
        step_of(name)
        if is_plain
        else compiled(make_step(graphdef, settings, micro_batches=micro_batches), state, batch)
    )
    return before, *copy(step(state, batch))


def test_groups_partition_the_state_and_merge_back():
    config = small_config()
    model = merge_groups(abstract_params(config)[0], small_params(config))
    graphdef, params = split_groups(model)
    assert tuple(params) == GROUPS
    assert group_of(("moe_layers", "self_attn", "indexer", "wk")) == "indexer"
    assert jax.tree.leaves(params["router_bias"])[0].shape == (1, 4)
    assert not any("indexer" in str(path) for path, _ in jax.tree_util.tree_flatten_with_path(params["backbone"])[0])
    assert graphdef == abstract_params(config)[0]
    chex.assert_trees_all_equal(nnx.state(merge_groups(graphdef, params)), nnx.state(model))


def test_parameters_in_fp8_are_not_trained():
    words = r"training needs float32 parameters, got moe_layers\.mlp\.experts\.\w+ in float8_e4m3fn: load with"
    with pytest.raises(ValueError, match=words):
        abstract_state(small_config(expert_dtype="fp8"), settings_of("SPARSE"))


@pytest.mark.parametrize("name", the_first(1, ["SPARSE", "BASE", "WARMUP"]))
def test_only_the_trainable_groups_move(name):
    settings = settings_of(name)
    before, state, metrics = first_step(name)
    after = state.params
    assert set(state.opt_state) == set(settings.phase.trains)
    assert int(state.step) == 1
    for group in ("backbone", "indexer"):
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[group], after[group])), strict=True)]
        assert not any(same) if group in settings.phase.trains else all(same), (group, same)
        assert (f"grad_norm_{group}" in metrics) == (group in settings.phase.trains)
    moved = np.asarray(jax.tree.leaves(after["router_bias"])[0] - jax.tree.leaves(before["router_bias"])[0])
    steps = np.round(moved / 1e-2)
    np.testing.assert_allclose(moved, 1e-2 * steps, atol=1e-6)
    assert np.abs(steps).max() > 0 if name != "WARMUP" else not moved.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DENSE_CONTROL", "WINDOW_CONTROL"])
def test_controls_train_the_backbone_alone(name):
    before, state, metrics = first_step(name)
    chex.assert_trees_all_equal(before["indexer"], state.params["indexer"])
    assert not np.array_equal(before["backbone"]["lm_head"], state.params["backbone"]["lm_head"])
    assert "kl" not in metrics


def test_window_selection_is_canonical():
    keys = small_batch(length=12).keys
    selection = np.asarray(window_selection(keys, 4))
    for row, query in np.ndindex(selection.shape[:2]):
        begin, end = int(keys.start[row, query]), int(keys.stop[row, query])
        expected = list(range(max(begin, end - 4), end))
        assert selection[row, query].tolist() == expected + [-1] * (4 - len(expected))


def assert_rounding_alone(one, other):
    """Two steps gave the same metrics and gradients; AdamW's first step is a sign: its moments are the gradient."""
    (_, state, metrics), (_, other_state, other_metrics) = one, other
    chex.assert_trees_all_close(other_metrics, metrics, rtol=2e-5, atol=1e-7)
    chex.assert_trees_all_close(other_state.opt_state, state.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", the_first(1, ["SPARSE", "DENSE_CONTROL", "WARMUP"]))
def test_micro_batches_change_rounding_alone(name):
    """Each row has another share of padding, so means of micro-batch means would be wrong.

    The control has the gradients of BASE, and AdamW compiles faster than Muon.
    """
    assert len(set(np.asarray(small_batch().valid).sum(1))) > 1
    assert_rounding_alone(first_step(name), first_step(name, micro_batches=4))


def test_loss_is_a_mean_over_valid_targets_and_a_sum_over_layers():
    graphdef, _, state = start("SPARSE")
    batch, model = small_batch(), merge_groups(graphdef, state.params)
    output = model(batch.tokens, keys=batch.keys, positions=batch.positions)
    log_p = jax.nn.log_softmax(model.unembed(output.hidden))
    nll = -np.take_along_axis(np.asarray(log_p), batch.targets[..., None], -1)[..., 0]
    kl = np.asarray(output.indexer_kl)[:, np.asarray(batch.keys.nonempty())]
    _, _, metrics = first_step("SPARSE")
    np.testing.assert_allclose(metrics["lm_loss"], nll[batch.valid].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl.mean(axis=1).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["lm_loss"] + metrics["kl"], rtol=1e-6)
    assert metrics["tokens"] == np.asarray(batch.keys.nonempty()).sum()
    assert metrics["learning_rate_backbone"] == metrics["learning_rate_indexer"] == np.float32(1e-3)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("DENSE_CONTROL", "tokens", 256), ("DENSE_CONTROL", "targets", 300), ("WARMUP", "tokens", -1)],
)
def test_ids_outside_the_vocabulary_make_nan(name, field, value):
    graphdef, settings, state = start(name)
    batch = small_batch()
    getattr(batch, field)[1, 2] = value
    assert batch.valid[1, 2]
    state, metrics = step_of(name)(state, batch)
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["kl" if name == "WARMUP" else "lm_loss"])
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(state.params[settings.phase.trains[0]]))


def test_targets_that_do_not_count_may_be_anything():
    _, _, state = start("DENSE_CONTROL")
    batch = small_batch()
    batch.targets[~batch.valid] = -100
    _, metrics = step_of("DENSE_CONTROL")(state, batch)
    assert metrics["loss"] == first_step("DENSE_CONTROL")[2]["loss"]


@functools.cache
def step_of(name):
    """Compiles the step of a phase for the small batch, once for all."""
    graphdef, settings, state = start(name)
    return compiled(make_step(graphdef, settings), state, small_batch())


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_a_step_leaves_the_callers_arrays(key):
    """The model of `nnx` that the parameters are of, and the key, are read after a step that took over its state."""
    graphdef, settings, _ = start("DENSE_CONTROL")
    params, random = jax.tree.map(jnp.array, small_params(small_config())), key(3)
    model = merge_groups(graphdef, params)
    state = init_state(split_groups(model)[1], settings, random)
    step_of("DENSE_CONTROL")(state, small_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params["backbone"]))  # else this shows nothing
    chex.assert_trees_all_equal(split_groups(model)[1], small_params(small_config()))
    assert jax.random.bits(random) == jax.random.bits(key(3))


def test_the_compiled_steps_that_are_kept_are_few():
    assert make_step.cache_info().maxsize == MAX_STEPS <= 16


@pytest.mark.parametrize(
    ("micro_batches", "message"), [(0, "micro_batches must be at least 1"), (3, "divide the 4 rows")]
)
def test_bad_micro_batches_are_named(micro_batches, message):
    graphdef, settings, state = start("WARMUP")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make_step(graphdef, settings, micro_batches=micro_batches), state, small_batch())


@pytest.mark.slow
def test_padding_rows_change_nothing():
    """Adds a row of padding to the batch: the same losses and the same moments."""
    assert_rounding_alone(first_step("SPARSE"), first_step("SPARSE", padding_rows=1))


@functools.cache
def flops(name, **changes):
    """FLOPs of a step as it is lowered: what nothing depends on is not even in the program that XLA gets.

    Of one dense layer with 4 index heads, 256 words and a feed-forward of width 512 but for `changes`.
    """
    adamw = small_phases()["SPARSE"].backbone  # Muon's FLOPs are another matter
    settings = small_phases()[name]
    settings = dataclasses.replace(settings, backbone=adamw) if settings.backbone else settings
    sizes = dict(num_hidden_layers=1, first_k_dense_replace=1, intermediate_size=512)
    graphdef, settings, state = start(settings, **sizes | changes)
    return make_step(graphdef, settings).lower(state, small_batch(vocab=16)).cost_analysis()["flops"]


def test_base_does_not_compute_the_indexer():
    """Sixteen times the index heads cost BASE nothing at all, and WARMUP a great deal."""
    assert flops("BASE", index_n_heads=64) == flops("BASE")
    assert flops("WARMUP", index_n_heads=64) > 2 * flops("WARMUP")


def test_warmup_does_not_compute_the_lm_loss():
    """Sixteen times the vocabulary costs WARMUP nothing at all, and BASE a great deal."""
    assert flops("WARMUP", vocab_size=4096) == flops("WARMUP")
    assert flops("BASE", vocab_size=4096) > 2 * flops("BASE")


def test_warmup_differentiates_the_indexer_alone():
    """Its FLOPs are those of the forward pass and the indexer's loss, not of a backward pass through the backbone."""
    forward = 2 * 3 * 16 * 1024 * 4 * 16  # one pass of the dense layer's feed-forward over the batch
    grown = flops("WARMUP", intermediate_size=1024) - flops("WARMUP")
    assert grown < 2.5 * forward / 2, grown / forward


def test_a_phase_needs_the_settings_of_what_it_trains():
    with pytest.raises(ValueError, match="SPARSE trains the indexer"):
        PhaseSettings(SPARSE, small_phases()["SPARSE"].stages, backbone=small_phases()["SPARSE"].backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(trains=("backbone", "router_bias")), "must train backbone or indexer"),
        (dict(trains=()), "must train backbone or indexer"),
        (dict(losses=()), "must have losses"),
        (dict(losses=(("kl", LM_LOSS), ("kl", LM_LOSS))), "each of a name of its own"),
        (dict(losses=(("loss", LM_LOSS),)), "none of loss, tokens"),
        (dict(attention="dense", selection=window_selection), "attention must be 'sparse'"),
        (dict(stream=10), "must be from 0 to 9, got 10"),
    ],
)
def test_a_bad_phase_is_named(changes, message):
    good = dict(name="MINE", attention="sparse", trains=("backbone",), losses=(("lm_loss", LM_LOSS),))
    Phase(**good)
    with pytest.raises(ValueError, match=message):
        Phase(**good | changes)
