"""Verdicts say what was asked for and what came; seeds of different text or setup do not stand in one table."""

import dataclasses
import json

import pytest
from needle_cases import make_found

from studies.needle import ablations, report, scaling
from studies.needle.questions import Cell


def texts(founds):
    return [(goal.met, goal.text) for goal in report.verdicts(founds)]


def test_all_goals_are_met():
    found = texts([make_found(0), make_found(1)])
    assert [met for met, _ in found] == [True] * 5
    assert "4 of 4, 4 of 4" in found[0][1] and "0.20%" in found[3][1]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"right": 3}, {0, 1, 2}),
        ({"gap": 0.005}, {4}),
        ({"gap": 0.02}, {3, 4}),
        ({"generated": {"generated": Cell(3, 4), "forward": Cell(4, 4)}}, {1}),
    ],
)
def test_one_seed_misses_a_goal_for_all(changes, missed):
    goals = report.verdicts([make_found(0), make_found(1, **changes)])
    assert {number for number, goal in enumerate(goals) if not goal.met} == missed


def test_without_a_control_nothing_is_said_of_it():
    found = make_found()
    alone = {name: each for name, each in found.losses.items() if "CONTROL" not in name}
    assert len(report.verdicts([dataclasses.replace(found, losses=alone)])) == 2


def test_seeds_must_be_alike():
    with pytest.raises(ValueError, match="at least one seed, got none"):
        report.check_alike([])
    with pytest.raises(ValueError, match=r"must come once, got \[1, 1\]"):
        report.check_alike([make_found(1), make_found(1)])
    other = dataclasses.replace(make_found(1), setup={"K": 16, "model": "small"})
    with pytest.raises(ValueError, match="one setup: seeds 0 and 1 differ in K"):
        report.check_alike([make_found(0), other])


def test_the_report_has_all_sections(tmp_path, capsys):
    paths = []
    for seed in (1, 0):
        paths.append(tmp_path / "seeds" / f"seed{seed}.json")
        made = make_found(seed)
        own = made.circumstances | ({"beside": "rows of a table"} if seed else {})
        dataclasses.replace(made, circumstances=own).save(paths[-1])
    row = {"losses": make_found().losses["SPARSE, sparse"], "answers": {"1": [4, 4], "8": [3, 4]}, "kl": [0.2]}
    row |= {"kept": {"indexer": 0.8, "oracle": 0.9, "window": 0.3}, "train_seconds": 3.0, "beside": "the study"}
    control = {"losses": make_found().losses["DENSE_CONTROL, dense"], "answers": row["answers"], "kl": []}
    rows = {"dense": control | {"train_seconds": 2.0}, "default": row, "k256": row}
    (tmp_path / "out").mkdir()
    ablations.write_rows(tmp_path / "out", rows, "0123456789abcdef")
    times = [
        {"work": "step", "attention": side, "length": length, "seconds": seconds, "temporary_gib": 1.5}
        for length, dense, sparse in ((1024, 0.1, 0.2), (2048, 0.4, 0.3))
        for side, seconds in (("dense", dense), ("sparse", sparse))
    ]
    where = {"date": "2026-11-30", "device": "cpu", "jax": "0.11.2"}
    (tmp_path / "out" / scaling.FILE).write_text(json.dumps({"circumstances": where, "rows": times}))
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# needle: goals met" and lines[2].startswith("- Met: one needle")
    for words in (
        "## Answers", "## Loss by position", "## Where the loss comes from", "## Agreement", "## Curves",
        "## Selections of layers", "## Time and memory by length", "training step from 1,536 tokens on",
        "## One change each", "`k256` K 256.", "## What it ran on", "1 files identical", "0.10 (0.10, 0.10) % for data",
        "Beside seed 1 the device also did other work (rows of a table)", "| 0.200 | ≤ 3 |", "| 2 |\n",
    ):  # fmt: skip
        assert words in text, words
    assert "| 0–511 | " in text and "0.20 (0.20, 0.20) %" in text
    for name in ("answers", "distances", "curves", "gaps", "scaling", "training"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    ablations.write_rows(tmp_path / "out", rows, "another")
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_small_study_says_that_needles_are_not_learnt(tmp_path):
    path = report.write([make_found(right=0)], tmp_path, learns=False)
    text = path.read_text()
    assert "needles are not learnt" in text and "Missed" not in text.split("##")[0]
