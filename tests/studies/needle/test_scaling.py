"""Every work is timed at every length, dense and sparse, and what cannot run leaves its row."""

import json

import pytest
from model_cases import small_config

from studies.needle import scaling
from studies.needle.scaling import crossover, draw, measure_lengths, sides_of, table

pytestmark = pytest.mark.usefixtures("in_a_hurry")
LENGTHS = (160, 192)


@pytest.mark.slow
def test_all_works_are_timed_at_all_lengths(monkeypatch):
    for name, value in (("WINDOW_SECONDS", 0.01), ("WINDOWS", 1), ("DECODE_STEPS", 2)):
        monkeypatch.setattr(scaling, name, value)
    told = []
    rows = measure_lengths(sides_of(small_config(max_position_embeddings=256)), LENGTHS, told.append)
    assert not [row for row in rows if "error" in row] and len(told) == len(rows) == 3 * 2 * len(LENGTHS)
    assert {(row["work"], row["attention"], row["length"]) for row in rows} == {
        (work, attention, length) for work in scaling.WORKS for attention in ("dense", "sparse") for length in LENGTHS
    }
    assert all(row["seconds"] > 0 for row in rows) and json.dumps(rows)
    assert all(row["temporary_gib"] > 0 for row in rows if row["work"] != "decode")
    lines = table(rows)
    assert len(lines) == 2 + 6 + 4 and lines[0] == "| work | attention | 160 | 192 |"
    assert [axes.get_title() for axes in draw(rows).axes] == [f"{name}, ms" for name in scaling.WORKS.values()]


def test_lines_that_do_not_cross_have_no_crossover():
    rows = [
        {"work": "step", "attention": side, "length": length, "seconds": 1.0 + (side == "sparse")}
        for length in (1, 2)
        for side in ("dense", "sparse")
    ]
    assert crossover(rows, "step") is None and crossover([], "decode") is None
