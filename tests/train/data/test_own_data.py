"""Data of one's own: batches of token ids, and iterators whose position is kept in the checkpoints."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import the_first
from hypothesis import given
from hypothesis import strategies as st
from train_cases import fake_step, one_layer_run, small_params

from dsa_jax import KeyRange
from train.data import TOKEN_FIELDS, Batch, load
from train.run import Run
from train.saved.folder import checkpoint_steps

T = 7


class Counted:
    """Gives batches that are a function of their number."""

    def __init__(self, batch_size=2, seq_len=16, end=None):
        self.taken, self.shape, self.end = 0, (batch_size, seq_len), end

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.end:
            raise StopIteration
        self.taken += 1
        return Batch.from_tokens(np.random.default_rng(self.taken).integers(256, size=self.shape))

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


def test_a_row_is_a_document():
    batch = Batch.from_tokens([[5, 6, 7, 8]])
    chex.assert_trees_all_equal(
        batch,
        Batch(
            tokens=np.array([[5, 6, 7, 8]], np.int32),
            targets=np.array([[6, 7, 8, 8]], np.int32),
            valid=np.array([[True, True, True, False]]),
            start=np.zeros((1, 4), np.int32),
            stop=np.array([[1, 2, 3, 4]], np.int32),
            positions=np.array([[0, 1, 2, 3]], np.int32),
        ),
    )


def test_padding_is_what_stands_at_the_ends_of_a_row():
    batch = Batch.from_tokens(jnp.array([[-1, 4, -1, 6, 7, -1, -1]]), padding_id=-1)
    assert batch.keys.nonempty().tolist() == [[False, True, True, True, True, False, False]]
    assert batch.tokens.tolist() == [[0, 4, -1, 6, 7, 0, 0]]  # and so a token that is none is refused in a run
    assert batch.valid.tolist() == [[False, True, True, True, False, False, False]]
    assert batch.positions.tolist() == [[0, 0, 1, 2, 3, 0, 1]]
    nothing = Batch.from_tokens([[3, 3, 3]], padding_id=3)
    assert not nothing.valid.any() and not nothing.keys.nonempty().any()


rows = st.lists(st.lists(st.integers(-1, 2), min_size=T, max_size=T), min_size=1, max_size=3)


@given(segments=rows, seed=st.integers(0, 9))
def test_documents_share_nothing(segments, seed):
    segments = np.array(segments)
    tokens = np.random.default_rng(seed).integers(100, size=segments.shape)
    batch = Batch.from_tokens(tokens, segments)
    keys = KeyRange.packed(jnp.asarray(segments))
    np.testing.assert_array_equal(batch.start, keys.start)
    np.testing.assert_array_equal(batch.stop, keys.stop)
    for row, place in np.ndindex(segments.shape):
        here = segments[row, place]
        follows = place + 1 < T and segments[row, place + 1] == here and here >= 0
        assert batch.valid[row, place] == follows
        if follows:
            assert batch.targets[row, place] == tokens[row, place + 1]
    assert {name: getattr(batch, name).dtype.name for name in TOKEN_FIELDS} == {
        name: "bool" if name == "valid" else "int32" for name in "tokens targets valid start stop positions".split()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), r"tokens must be integers \[B, T\], got int64 \[2\]"),
        (([[1.0, 2.0]],), "tokens must be integers .* got float64"),
        (([[]],), "tokens must be integers"),
        (([[2**40]],), "tokens must be integers of 32 bits"),
        (([[1, 2]], [[0]]), r"segment_ids must have the shape of tokens \(1, 2\), got \(1, 1\)"),
        (([[1, 2]], [[True, False]]), "segment_ids must be integers"),
    ],
)
def test_bad_tokens_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_tokens(*arguments)


@pytest.fixture
def counting(monkeypatch):
    """Has steps count, and note the batches that they are given."""
    seen = []

    def make_step(*arguments, **options):
        step = fake_step(None)(*arguments, **options)
        return lambda state, batch: seen.append(int(batch.tokens[0, 0])) or step(state, batch)

    monkeypatch.setattr("train.run.make_step", make_step)
    monkeypatch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))
    return seen


@pytest.mark.parametrize("cut", the_first(2, [3, 8, 1, 5, 6]))
def test_an_iterator_is_continued_where_it_was(tmp_path, counting, cut):
    """Through phases and checkpoints, in the midst of one and at its end, with a folder given as a string."""
    config, out = one_layer_run(tmp_path / "text", checkpoint_every=1), str(tmp_path / "out")
    stream = Counted()
    expected = [int(next(stream).tokens[0, 0]) for _ in range(config.steps)]
    with pytest.raises(ValueError, match="data must not end before the run does"):
        Run(config, out).train(Counted(end=cut))
    assert counting == expected[:cut]
    assert checkpoint_steps(Run(config, out).folder)[-1] == cut
    position = json.loads((tmp_path / "out" / "checkpoints" / str(cut) / "meta" / "metadata").read_text())["position"]
    assert position["data"] == {"taken": cut}
    Run(config, out).train(Counted(), resume=True)
    assert counting == expected


def test_a_source_gives_each_stage_a_stream(tmp_path, counting):
    config = one_layer_run(tmp_path / "text")
    Run(config, tmp_path / "out").train(load(config.data))
    corpus = load(config.data)
    expected = [
        int(batch.tokens[0, 0])
        for phase in range(3)
        for batch, _ in zip(corpus.batches("train", batch_size=2, seq_len=16, seed=100 * phase), range(3), strict=False)
    ]
    assert counting == expected


class Broken(Counted):
    """Gives another batch than it should."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def __next__(self):
        return self.spoil(super().__next__())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([]), "data must have `batches`.* or be an iterator of batches with `get_state`"),
        (None, "data must have `batches`"),
        (Counted(4, 16), r"tokens of a batch must be integers \[2, 16\], got int32 \[4, 16\]"),
        (Broken(lambda batch: batch.tokens), "data must give a train.data.Batch"),
        (Broken(lambda batch: dataclasses.replace(batch, valid=batch.tokens)), "valid of a batch must be booleans"),
        (Broken(lambda batch: dataclasses.replace(batch, stop=None)), "stop of a batch must be integers"),
        (
            Broken(lambda batch: dataclasses.replace(batch, tokens=batch.tokens + 256)),
            "tokens must be ids",
        ),
    ],
)
def test_bad_data_are_named(tmp_path, counting, data, message):
    with pytest.raises(ValueError, match=message):
        Run(one_layer_run(tmp_path / "text"), tmp_path / "out").train(data)


def test_a_position_that_is_no_json_is_named(tmp_path):
    stream = Counted()
    stream.get_state = lambda: {"rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match="get_state must give JSON values, got"):
        Run(one_layer_run(tmp_path / "text"), tmp_path / "out").train(stream)
    assert not (tmp_path / "out").exists()


def in_a_process(code: str) -> str:
    """Runs code where nothing of ours is imported yet; returns what it prints."""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_package_alone_is_enough_to_import():
    assert in_a_process("import sys, train; print('jax' in sys.modules, hasattr(train, 'x'))") == "False False\n"
    code = "import train; print(train.run.Run.__name__, train.data.Batch.__name__, train.planner.__name__)"
    assert in_a_process(code) == "Run Batch train.planner\n"
