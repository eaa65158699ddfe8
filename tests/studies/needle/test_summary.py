"""Tests the summary of the study: what it tells, and that the README says the same."""

import dataclasses
from pathlib import Path

import pytest

from studies.needle.found import gaps_by_position
from studies.needle.report import CONTROL, SPARSE, whole
from studies.needle.summary import recorded, summary

README = (Path(__file__).resolve().parents[3] / "README.md").read_text()
WINDOW = "WINDOW_CONTROL, last K keys"


def test_the_readme_says_what_was_recorded():
    founds = recorded()
    text = " ".join(README.split())
    right = sum(whole(found, SPARSE, 1).right for found in founds)
    asked = sum(whole(found, SPARSE, 1).asked for found in founds)
    assert f"finds {right} of {asked} needles" in text
    ours, window = (
        max(max(gaps_by_position(found, name, CONTROL).values()) for found in founds) for name in (SPARSE, WINDOW)
    )
    assert f"at most {ours:.2%} above" in text and f"up to {window:.1%} above" in text
    assert f"finds {sum(whole(found, WINDOW, 1).right for found in founds)} (" in text
    seeds = {1: "one seed", 2: "two seeds", 3: "three seeds"}[len(founds)]
    assert f"[{seeds}" in text


def test_seeds_are_added_up_and_must_be_alike():
    (first, *_), other = recorded(), 7
    second = dataclasses.replace(first, seed=other)
    text = summary([first, second])
    assert text.startswith("2 seeds recorded so far")
    assert "100.0% of 272" in text
    with pytest.raises(ValueError, match="every seed must come once"):
        summary([first, first])
