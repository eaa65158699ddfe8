"""Checkpoints: whole, kept as promised, refused when of another configuration."""

import dataclasses
import os
import types

import chex
import jax
import numpy as np
import pytest
from train_cases import small_phases, small_run, state_of

from train.run import Run
from train.saved.changes import Position
from train.saved.checkpoint import Checkpoints, load_params
from train.saved.folder import checkpoint_bytes, checkpoint_steps, read_position, read_saved
from train.settings import Stage
from train.state import abstract_params


@pytest.fixture
def run(tmp_path):
    """Makes a run of ten steps in each of two phases."""
    phases = small_phases(Stage(10, 2, 16))
    return small_run(tmp_path / "text", phases=(phases["BASE"], phases["SPARSE"]), keep_checkpoints=2)


def test_a_state_comes_back_bit_by_bit(run, tmp_path):
    state, position = state_of(run), Position(13, 1, 3, {"next_index": 3, "stream": "abc"})
    with Checkpoints(tmp_path / "checkpoints", run, data="a text") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state, position)
        assert checkpoints.latest() == 13
        assert read_position(tmp_path) == position
        assert read_saved(tmp_path, 13) == {
            "position": dataclasses.asdict(position),
            "run": run.to_json(),
            "data": "a text",
        }
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


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    Run(run, tmp_path / "out").open(resume=False)
    tmp_path /= "out"
    with Checkpoints(tmp_path / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run), Position(13, 1, 3, {}))
    path = tmp_path / "checkpoints" / "13" / "meta" / "metadata"
    for text in ("{}", "[]", '{"position": {"step": 13}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="13/meta/metadata must hold the position of a checkpoint"):
            read_position(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="the checkpoint of step 13 must say where it stands"):
        Run(run, tmp_path).open(resume=True)


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


def test_room_is_wanted_for_the_checkpoints_that_are_still_to_come(run, tmp_path, monkeypatch):
    """Two of the newest, one that is written before one is deleted, and the last of each of two phases: five."""
    out = tmp_path / "out"

    def free(checkpoints):
        size = types.SimpleNamespace(free=checkpoints * checkpoint_bytes(run))
        monkeypatch.setattr("train.saved.folder.shutil.disk_usage", lambda path: size)

    free(4.9)
    with pytest.raises(ValueError, match=r"must have room for 5 checkpoints, about"):
        Run(run, out).open(resume=False)
    with Checkpoints(out / "checkpoints", run) as checkpoints:
        for step in (4, 6):
            checkpoints.save(state_of(run), Position(step, 0, step, {}))
    free(3)
    Run(run, out).open(resume=True)
    free(2.9)
    with pytest.raises(ValueError, match="room for 3 checkpoints"):
        Run(run, out).open(resume=True)
    with Checkpoints(out / "checkpoints", run) as checkpoints:
        for step in (10, 12, 18):
            checkpoints.save(state_of(run), Position(step, 1, step - 10, {}))
    free(0.9)
    with pytest.raises(ValueError, match="room for 2 checkpoints"):  # 10, 12 and 18 are kept
        Run(run, out).open(resume=True)


def test_a_finished_run_is_opened_on_a_full_disk(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    Run(run, out).open(resume=False)
    with Checkpoints(out / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run, 1), Position(20, 1, 10, {}))
    monkeypatch.setattr("train.saved.folder.shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
    monkeypatch.setattr("train.saved.folder.replace_text", lambda *_: pytest.fail("wrote"))
    assert Run(run, out).open(resume=True).position == Position(20, 1, 10, {})
