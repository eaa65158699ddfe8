"""The schedule of a mixture: even for every n, the same from anywhere, and places of data read strictly."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import DataConfig, mixing
from train.data.mixing import BLOCK, Schedule
from train.data.sources import parse_places

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=7)


@settings(max_examples=40)
@given(weights=WEIGHTS)
def test_every_beginning_holds_the_shares_to_less_than_one_row(weights):
    schedule, rows = Schedule(weights), 400
    shares = np.array(weights) / sum(weights)
    sources = [schedule.at(row)[0] for row in range(rows)]
    counts = np.cumsum(np.eye(len(weights), dtype=int)[sources], axis=0)
    error = np.abs(counts - shares * np.arange(1, rows + 1)[:, None]).max()
    assert error <= max(0.5, 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0) + 1e-9


def test_shares_hold_behind_many_blocks_of_awkward_weights():
    weights = [10**9 + 7, 3, 10**6 + 3, 5 * 10**8]
    rows = 7 * BLOCK + 13
    taken = Schedule(weights).taken(rows)
    assert sum(taken) == rows
    assert np.abs(np.array(taken) - rows * np.array(weights) / sum(weights)).max() < 1


@given(weights=WEIGHTS, seed=st.integers(0, 99))
def test_rows_are_the_same_from_anywhere(weights, seed):
    """Against brute force: each source's rows are counted one by one, in the order of the rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "BLOCK", 16)
        rows, schedule = 75, Schedule(weights)
        expected, counts = [], [0] * len(weights)
        for row in range(rows):
            source, index = schedule.at(row)
            assert index == counts[source] and schedule.taken(row) == tuple(counts)
            counts[source] += 1
            expected.append((source, index))
        order = np.random.default_rng(seed).permutation(rows)[:20].tolist()
        fresh, resumed = Schedule(weights), Schedule(weights)
        assert [fresh.at(row) for row in order] == [expected[row] for row in order]
        resumed.set_state(json.loads(json.dumps(schedule.get_state(69))))
        assert [resumed.at(row) for row in (69, 74, 7, 16)] == [expected[row] for row in (69, 74, 7, 16)]


def test_weights_are_the_decimals_that_were_written():
    weights = [weight for _, weight, _ in parse_places("data", ["a=0.1:x", "b=0.7:y", "c=0.2:z"])]
    assert weights == [Fraction(1, 10), Fraction(7, 10), Fraction(1, 5)]
    assert Schedule(weights).taken(10 * BLOCK) == (BLOCK, 7 * BLOCK, 2 * BLOCK)


@pytest.mark.parametrize("state", [None, [1], [-1, 1025], [BLOCK, 0.0], [3, 4], "ab", {"a": 1}])
def test_a_state_of_no_schedule_is_refused(state):
    with pytest.raises(ValueError, match="must count the rows of 2 sources before a block"):
        Schedule([1, 2]).set_state(state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a=0:x",), "weight of a in data must be a number from 1e-06 to 1e\\+06, got '0'"),
        (("a=-1:x",), "got '-1'"),
        (("a=nan:x",), "got 'nan'"),
        (("a=inf:x",), "got 'inf'"),
        (("a=1e999:x",), "got '1e999'"),
        (("a=much:x",), "got 'much'"),
        (("a=:x",), "got ''"),
        (("a=1:x", "a=2:y"), "must name each source once, got 'a' 2 times"),
        (("a=1:x", "y"), "a weight for each source or for none, got 'y' without one"),
    ],
)
def test_bad_weights_are_refused_where_they_enter(data, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(data=data)


def test_what_is_no_weight_is_a_glob():
    places = ["odd=name.txt", "a=1/b:c.txt", "=1:x", "C:/x", "plain"]
    assert [pattern for _, _, pattern in parse_places("data", places)] == places
