"""The comparison of rollouts with the training forward, at a size that takes seconds."""

import dataclasses
import functools
import re

import numpy as np
import pytest
from model_cases import small_config

from benchmarks import replay, tables
from dsa_jax.inference import Taken, Turns

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SMALL = replay.Case(small_config(num_attention_heads=4, initializer_range=0.2), rows=2, prompt=12, drawn=12)


@functools.cache
def compared():
    return replay.compare(SMALL)


@pytest.mark.slow
def test_both_sides_agree_in_float32():
    found = compared()
    assert [row["replay"] for row in found["comparisons"]] == list(replay.REPLAYS)
    assert all(row["max"] < 1e-5 and 0 < row["mean"] < 2e-6 for row in found["comparisons"])
    assert found["routes_differ"] == found["selections_differ"] == found["keys_differ"] == 0


def test_what_differs_is_found(monkeypatch):
    """Log-probabilities, selections and experts that a rollout has wrong."""
    before = Turns.draw

    def wrong(self, *args, **kwargs):
        own, other = before(self, *args, **kwargs)
        selected, routed = own.taken.selected.copy(), own.taken.routed.copy()
        selected[0, 1, 0] = np.setdiff1d(np.arange(20), selected[0, 1])[0]
        routed[1, 2] = (routed[1, 2] + 1) % 8
        return [dataclasses.replace(own, log_probs=own.log_probs + 0.5, taken=Taken(selected, routed)), other]

    monkeypatch.setattr(Turns, "draw", wrong)
    found = replay.compare(SMALL)
    queries = 2 * 23 * 2  # layers, tokens, rows
    assert found["selections_differ"] == pytest.approx(1 / queries) and found["keys_differ"] >= 1
    assert found["routes_differ"] == pytest.approx(1 / queries)
    assert found["comparisons"][0]["max"] == pytest.approx(0.5, abs=1e-4)


def test_the_table_has_a_row_for_each_part():
    circumstances = {"card": "a card", "date": "2026-01-01"}
    part = compared() | {"circumstances": circumstances}
    text = tables.replay({"one": part, "two": part | {"selections_differ": 0.25}})
    assert "24 tokens a row, on a card, 2026-01-01" in text.replace("\n", " ")
    rows = re.findall(r"^\| (one|two) \| (.*) \|$", text, re.M)
    assert [name for name, _ in rows] == ["one", "two"] and "none" in rows[0][1] and "25.00%" in rows[1][1]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
