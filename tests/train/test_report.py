"""The report says what the results say, a missed goal first, and can be written again from results.json."""

import dataclasses
import json
import math
import re
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from train import report
from train.evaluate import Evaluation, KeptMass
from train.report import Results, SeedResult, markdown, read_curves, summary, write_report

RECALL = ("text", "recall", "answers", "all")
SELECTIONS = ("indexer", "warmed", "untrained", "oracle", "window", "random")


def make_kept(indexer, parts=RECALL) -> KeptMass:
    """Two layers with oracle 0.9 and 0.8, window 0.5 and 0.4."""
    mass = {
        "indexer": indexer,
        "warmed": [0.65, 0.55],
        "untrained": [0.3, 0.2],
        "oracle": [0.9, 0.8],
        "window": [0.5, 0.4],
        "random": [0.1, 0.15],
    }
    return KeptMass(32, {part: mass for part in parts}, {part: 1234 if part in parts else 0 for part in RECALL})


def make_seed(seed=0, indexer=(0.8, 0.7), *, text_alone=False, controls=False) -> SeedResult:
    def parts(base):
        recall = None if text_alone else base + 0.5
        return {"all": base, "text": base + 0.25, "recall": recall, "answers": recall and recall - 1}

    losses = {"after BASE, dense": parts(1.75 + seed), "final, sparse": parts(1.5 + seed), "final, dense": parts(1.25)}
    curves = {
        "BASE": {"step": [1.0, 2.0], "lm_loss": [5.5, 3.0]},
        "WARMUP": {"step": [3.0, 4.0], "kl": [2.625, 0.375]},
        "SPARSE": {"step": [5.0, 6.0], "lm_loss": [3.0, 2.5], "kl": [0.5, 0.25]},
    }
    if controls:
        curves["DENSE_CONTROL"] = {"step": [1.0, 2.0], "lm_loss": [3.0, 2.25]}
        losses |= {"DENSE_CONTROL, dense": parts(1.125), "WINDOW_CONTROL, last K keys": parts(2.25)}
    selections = {name: parts(1.0 + i / 8) for i, name in enumerate(("dense", "indexer", "oracle", "window", "random"))}
    kept = make_kept(list(indexer), ("text", "all") if text_alone else RECALL)
    return SeedResult(seed, Evaluation(losses, selections, kept), curves, {"BASE": 100.0, "WARMUP": 50.0})


def make_results(*seeds, **changes) -> Results:
    values: dict[str, Any] = dict(
        name="tiny",
        setup={"K": 32, "sequence length": 512},
        seeds=list(seeds) or [make_seed()],
        seconds=400.4,
        max_rss=2**31,
        limit_seconds=480.0,
        limit_rss=2**32,
        sample="def f(x):\n    return x\n",
    )
    return Results(**values | changes)


def table_after(text, heading) -> dict[str, list[str]]:
    """The rows of the first table after a line, by their first cell."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = rest
    return rows


def first_words(text) -> str:
    """What a reader sees first below the title."""
    return next(line for line in text.splitlines()[1:] if line)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [make_seed(indexer=(0.6, 0.5))]}, "closes 0.250 of the gap"),
        ({"seconds": 500.0}, "took 8 min 20 s; at most 8 min 00 s was asked"),
        ({"max_rss": 5 * 2**30}, "memory peaked at 5.00 GiB; at most 4.00 GiB was asked"),
    ],
)
def test_a_missed_goal_stands_first(changes, words):
    results = make_results(**changes)
    text = markdown(results)
    assert text.startswith("# tiny: goal missed\n")
    assert first_words(text).startswith("- **Missed**: ") and words in first_words(text)
    assert text.count("**Missed**") == 1 and text.count("- Met: ") == 2
    console = Console(record=True, width=120)
    console.print(summary(results))
    shown = console.export_text()
    assert "goal missed" in shown.splitlines()[0]
    assert "missed" in shown.splitlines()[2]


def test_met_goals_are_said_to_be_met():
    text = markdown(make_results())
    assert text.startswith("# tiny: goals met\n")
    assert "Missed" not in text and text.count("- Met: ") == 3


def test_the_goal_holds_for_the_mean_over_seeds_and_each_is_shown():
    met = make_results(make_seed(0, (0.8, 0.7)), make_seed(1, (0.65, 0.55)))  # 0.75 and 0.375
    assert "closes 0.562 (0.750, 0.375) of the gap" in first_words(markdown(met))
    assert markdown(met).startswith("# tiny: goals met")
    missed = make_results(make_seed(0, (0.65, 0.55)), make_seed(1, (0.65, 0.55)))
    assert markdown(missed).startswith("# tiny: goal missed")


def test_a_gap_that_was_not_measured_is_a_missed_goal():
    seed = make_seed()
    kept = KeptMass(32, {}, dict.fromkeys(RECALL, 0))
    results = make_results(dataclasses.replace(seed, evaluation=dataclasses.replace(seed.evaluation, kept=kept)))
    assert "could not be measured" in first_words(markdown(results))


def test_without_an_indexer_trained_there_is_no_gap_to_close():
    base = dataclasses.replace(make_seed(indexer=(0.2, 0.1)), curves={"BASE": {"step": [1], "lm_loss": [5.5]}})
    assert markdown(make_results(base)).startswith("# tiny: goals met\n")
    assert markdown(make_results(base, limit_seconds=None, limit_rss=None)).startswith("# tiny\n")


def test_tables_hold_the_numbers():
    text = markdown(make_results())
    assert table_after(text, "| setting")["K"] == ["32"]
    kept = table_after(text, "**Recall answers** (1,234 queries)")
    assert kept["trained indexer"] == ["0.800", "0.700", "0.750"]
    assert kept["oracle top-K of the attention"] == ["0.900", "0.800", "0.850"]
    assert kept["indexer after warm-up alone"] == ["0.650", "0.550", "0.600"]
    assert kept["untrained indexer"] == ["0.300", "0.200", "0.250"]
    assert kept["last K keys"] == ["0.500", "0.400", "0.450"]
    assert kept["K random keys"] == ["0.100", "0.150", "0.125"]
    assert kept["**gap closed**"] == ["0.750", "0.750", "0.750"]
    losses = table_after(text, "## Held-out loss")
    assert losses["after BASE, dense"] == ["1.750", "2.000", "2.250", "1.250"]
    assert losses["final, sparse"] == ["1.500", "1.750", "2.000", "1.000"]
    assert losses["final, dense"] == ["1.250", "1.500", "1.750", "0.750"]
    selections = table_after(text, "| selection | training's mixture")
    assert list(selections) == [report.SELECTIONS[n][0] for n in ("dense", "oracle", "indexer", "window", "random")]
    assert selections["last K keys"] == ["1.375", "1.625", "1.875", "0.875"]
    kl = table_after(text, "KL of the indexer")
    assert kl == {"WARMUP": ["2.625", "0.375"], "SPARSE": ["0.500", "0.250"]}
    seconds = table_after(text, "| part | seconds")
    assert seconds == {"BASE": ["100.0"], "WARMUP": ["50.0"], "everything": ["400.4"]}
    assert "peaked at 2.00 GiB" in text
    assert "    def f(x):" in text.splitlines()


def test_several_seeds_and_controls():
    text = markdown(make_results(make_seed(3, controls=True), make_seed(4, (0.7, 0.6), controls=True)))
    assert "means over the seeds 3, 4" in text
    losses = table_after(text, "## Held-out loss")
    assert losses["final, sparse"][0] == "5.000 (4.500, 5.500)"
    assert losses["DENSE_CONTROL, dense"][0] == "1.125 (1.125, 1.125)"
    assert losses["WINDOW_CONTROL, last K keys"][0] == "2.250 (2.250, 2.250)"
    kept = table_after(text, "**Text** (1,234, 1,234 queries)")
    assert kept["trained indexer"] == ["0.750 (0.800, 0.700)", "0.650 (0.700, 0.600)", "0.700 (0.750, 0.650)"]
    assert table_after(text, "| part | seconds")["BASE"] == ["100.0 (100.0, 100.0)"]


def test_the_last_kl_is_the_mean_of_the_last_tenth():
    seed = make_seed()
    curve = {"step": list(range(40)), "kl": [4.0] + [1.0] * 35 + [0.5, 0.25, 0.5, 0.25]}
    results = make_results(dataclasses.replace(seed, curves={"WARMUP": curve}))
    assert table_after(markdown(results), "KL of the indexer") == {"WARMUP": ["4.000", "0.375"]}


def test_text_alone_leaves_no_empty_columns(tmp_path):
    results = make_results(make_seed(text_alone=True))
    text = write_report(results, tmp_path).read_text()
    assert "answers" not in text and "–" not in text
    assert not (tmp_path / "answers.png").exists()
    assert len(table_after(text, "## Held-out loss")["final, sparse"]) == 2


@pytest.mark.parametrize("seeds", [(make_seed(),), (make_seed(0), make_seed(1, (0.7, 0.6), controls=True))])
def test_a_report_is_written_again_from_its_results(tmp_path, seeds, capsys):
    path = write_report(make_results(*seeds), tmp_path)
    text = path.read_text()
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(figures) == ["answers.png", "kept_mass.png", "training.png"]
    for figure in figures:
        pixels = matplotlib.image.imread(tmp_path / figure)
        assert pixels.shape[1] > 800 and pixels[..., :3].std() > 0.02  # something is drawn
    for stale in ["report.md", *figures]:
        (tmp_path / stale).unlink()
    assert report.main([str(tmp_path)]) == 0
    assert path.read_text() == text
    assert all((tmp_path / figure).exists() for figure in figures)
    assert "gap closed" in capsys.readouterr().out


def test_results_survive_json(tmp_path):
    results = make_results(make_seed(0, text_alone=True), make_seed(1))
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_bad_results(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'results.json'}: No such file" in capsys.readouterr().err
    assert report.main([]) == 2
    assert "got none" in capsys.readouterr().err
    for content in ("{", "{}", "[]", '{"seeds": [{"seed": 0}]}', '{"seeds": [], "name": "x", "setup": {}}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="must hold"):
            Results.load(tmp_path)
    with pytest.raises(ValueError, match="at least one seed"):
        make_results(seeds=[])


def test_curves_come_from_the_lines_of_a_run():
    records = [
        {"step": 1, "phase": "BASE", "phase_step": 1, "loss": 5.0, "lm_loss": 5.0, "seconds": 0.1},
        {"step": 2, "phase": "BASE", "phase_step": 2, "loss": 4.0, "lm_loss": 4.0, "seconds": 0.1},
        {"step": 3, "phase": "WARMUP", "phase_step": 1, "loss": 7.5, "kl": 7.5, "seconds": 0.1},
    ]
    assert read_curves(records) == {
        "BASE": {"step": [1, 2], "lm_loss": [5.0, 4.0]},
        "WARMUP": {"step": [3], "kl": [7.5]},
    }


def test_a_control_is_drawn_beside_the_phase_it_controls():
    figure = report._training_figure(make_results(make_seed(controls=True)))
    lines = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
    assert lines == {"BASE": [1, 2], "SPARSE": [5, 6], "DENSE_CONTROL": [5, 6]}


def test_memory_is_in_bytes():
    assert 2**25 < report.max_rss() < 2**37
    assert math.isclose(report.CHANCE, 2.079, abs_tol=1e-3)
