"""Checkpoints: whole, kept as promised, refused when of another configuration."""

import dataclasses
import os
import types

import chex
import jax
import numpy as np
import pytest
from train_cases import small_config, small_phases, small_run, state_of

from train.checkpoint import Checkpoints, Position, load_params
from train.folder import checkpoint_steps, identity
from train.run import Run
from train.settings import Stage
from train.state import abstract_params


@pytest.fixture
def run(tmp_path):
    """Makes a run of ten steps in each of two phases."""
    phases = small_phases(Stage(10, 2, 16))
    return small_run(tmp_path / "text", phases=(phases["BASE"], phases["SPARSE"]), keep_checkpoints=2)


def test_a_state_comes_back_bit_by_bit(run, tmp_path):
    state, position = state_of(run), Position(13, 1, 3, {"next_index": 3, "stream": "abc"})
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state, position)
        assert checkpoints.latest() == 13
        assert checkpoints.position(13) == position
        restored = checkpoints.restore(13, state)
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(load_params(tmp_path, abstract_params(run.model)[1]), state.params)


def test_the_state_may_be_donated_while_it_is_written(run, tmp_path):
    """Saves the state as it was, whatever the next step does to its buffers meanwhile."""
    state = state_of(run)
    before = jax.tree.map(np.array, state)
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        checkpoints.save(state, Position(13, 1, 3, {}))
        for _ in range(3):
            state = spoil(state)
        assert checkpoints.latest() == 13
        chex.assert_trees_all_equal(checkpoints.restore(13, state), before)


def test_the_newest_and_the_last_of_each_phase_are_kept(run, tmp_path):
    state = state_of(run)
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        for step in (4, 10, 12, 14, 16, 20):
            checkpoints.save(state, Position(step, step // 11, step, {}))
        checkpoints.wait()
    assert checkpoint_steps(tmp_path) == [10, 16, 20]


def test_a_checkpoint_of_another_configuration_is_refused_by_name(run, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run), Position(13, 1, 3, {}))
    other = dataclasses.replace(run, model=small_config(index_topk=5), seed=3, checkpoint_every=7)
    with Checkpoints(tmp_path / "checkpoints", other) as checkpoints:
        with pytest.raises(ValueError, match=r"model.index_topk 4, here 5; seed 0, here 3") as error:
            checkpoints.position(13)
    assert "checkpoint_every" not in str(error.value)


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes(run, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run), Position(12, 1, 2, {}))
    left = tmp_path / "checkpoints" / "13.orbax-checkpoint-tmp-0"
    (left / "params").mkdir(parents=True)
    assert checkpoint_steps(tmp_path) == [12]
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        assert checkpoints.latest() == 12
        checkpoints.save(state_of(run), Position(13, 1, 3, {}))
        assert checkpoints.latest() == 13
    assert not left.exists()


def test_no_checkpoint_to_begin_from_is_named(run, tmp_path):
    like = abstract_params(run.model)[1]
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        load_params(tmp_path, like)
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run), Position(12, 1, 2, {}))
    with pytest.raises(ValueError, match=r"checkpoint of step 11, got \[12\]"):
        load_params(tmp_path, like, step=11)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_named(run, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="must be writable"):
        Run(run, tmp_path / "out").open(resume=False)


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be"):
        Run(run, tmp_path / "file" / "out").open(resume=False)
    with pytest.raises(ValueError, match="must be"):
        Run(run, tmp_path / "file").open(resume=False)


def test_too_little_room_is_said_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.folder.shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"must have room for the run's checkpoints"):
        Run(run, tmp_path / "out").open(resume=False)


def test_what_decides_no_number_is_no_part_of_a_runs_identity(run):
    model = dataclasses.replace(run.model, eos_token_id=(1, 2))
    other = dataclasses.replace(run, model=model, checkpoint_every=7, evaluation_batches=9)
    assert identity(other) == identity(run)
    assert identity(dataclasses.replace(run, seed=3)) != identity(run)
