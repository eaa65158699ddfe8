"""Found measurements come back from their file; each is made once, and none begins when the time is over."""

import dataclasses
import json

import pytest
from needle_cases import make_found

from studies.needle.found import Found, Ledger, gaps_by_position
from train.processes.stopping import StoppedError, Stopping


def test_a_file_holds_it_whole(tmp_path):
    found = make_found(3)
    found.save(tmp_path / "seed3.json")
    assert Found.load(tmp_path / "seed3.json") == found


@pytest.mark.parametrize("text", [None, "{", "{}", '{"seed": 1}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "seed0.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="must hold what was measured of a seed"):
        Found.load(path)


def test_each_thing_is_measured_once(tmp_path):
    calls = []
    ledger = Ledger(tmp_path / "measured", 7, say=calls.append)
    assert ledger.once("a", lambda: {1: (2, 3)}) == {"1": [2, 3]}
    assert ledger.once("a", lambda: pytest.fail("measured twice")) == {"1": [2, 3]}
    assert calls == ["measuring a"] and ledger.seconds() >= 0
    over = dataclasses.replace(ledger, stopping=Stopping(after=0.0))
    assert over.once("a", lambda: pytest.fail("measured twice")) == {"1": [2, 3]}
    with pytest.raises(StoppedError) as stopped:
        over.once("b", lambda: pytest.fail("begun when the time was over"))
    assert stopped.value.step == 7 and not (tmp_path / "measured" / "b.json").exists()
    assert json.loads((tmp_path / "measured" / "a.json").read_text()).keys() == {"seconds", "found"}


def test_gaps_are_relative():
    gaps = gaps_by_position(make_found(gap=0.01), "SPARSE, sparse", "DENSE_CONTROL, dense")
    assert list(gaps) == ["positions 0 to 511", "positions 512 to 1023"]
    assert all(gap == pytest.approx(0.01) for gap in gaps.values())
