"""The demo's report: goals, recall answers, and the recorded report written again from its results."""

import dataclasses
import math
import re
import shutil

import matplotlib.image
import pytest
from report_cases import MIXED, first_words, make_results, make_seed, table_after
from rich.console import Console

from benchmarks.measure import RESULTS
from studies.tiny.report import CHANCE_NATS, LAYOUT, main
from train.evaluation.kept_mass import KeptMass
from train.reporting import report
from train.reporting.layout import SELECTIONS
from train.reporting.report import summary, write_report


def markdown(results) -> str:
    return report.markdown(results, layout=LAYOUT)


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
    console.print(summary(results, LAYOUT))
    assert "goal missed" in console.export_text().splitlines()[0]


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


@pytest.mark.parametrize("seeds", [(make_seed(controls=True),), (make_seed(0), make_seed(1))])
def test_limits_are_those_of_one_seed_alone(seeds):
    text = markdown(make_results(*seeds, seconds=5000.0))
    assert text.startswith("# tiny: goals met\n") and text.count("was asked") == 1


def test_a_gap_that_was_not_measured_is_a_missed_goal():
    seed = make_seed()
    kept = KeptMass(32, {}, dict.fromkeys(MIXED, 0))
    results = make_results(dataclasses.replace(seed, evaluation=dataclasses.replace(seed.evaluation, kept=kept)))
    assert "could not be measured" in first_words(markdown(results))


def test_without_an_indexer_trained_there_is_no_gap_to_close():
    base = dataclasses.replace(make_seed(indexer=(0.2, 0.1)), curves={"BASE": {"step": [1], "lm_loss": [5.5]}})
    text = markdown(make_results(base))
    assert text.startswith("# tiny: goals met\n") and "gap from" not in text


def test_tables_hold_the_numbers_of_all_parts():
    text = markdown(make_results())
    for part in ("Training's mixture", "Text", "Recall episodes", "Recall answers"):
        kept = table_after(text, f"**{part}** (1,234 queries)")
        assert kept["trained indexer"] == ["0.800", "0.700", "0.750"]
    assert "| weights, attention | training's mixture | text | recall episodes | recall answers |" in text
    losses = table_after(text, "## Held-out loss")
    assert losses["after BASE, dense"] == ["1.750", "2.000", "2.250", "1.250"]
    assert losses["final, sparse"] == ["1.500", "1.750", "2.000", "1.000"]
    assert losses["final, dense"] == ["1.250", "1.500", "1.750", "0.750"]
    selections = table_after(text, "| selection | training's mixture")
    assert list(selections) == [SELECTIONS[name][0] for name in ("dense", "oracle", "indexer", "window", "random")]
    assert selections["last K keys"] == ["1.375", "1.625", "1.875", "0.875"]
    assert "chance is ln 8 = 2.08" in text and math.isclose(CHANCE_NATS, 2.079, abs_tol=1e-3)


def test_text_alone_leaves_no_empty_columns(tmp_path):
    text = write_report(make_results(make_seed(parts=("all", "text"))), tmp_path, LAYOUT).read_text()
    assert "answers" not in text and "–" not in text
    assert not (tmp_path / "answers.png").exists()
    assert len(table_after(text, "## Held-out loss")["final, sparse"]) == 2


@pytest.mark.parametrize("seeds", [(make_seed(),), (make_seed(0), make_seed(1, (0.7, 0.6), controls=True))])
def test_a_report_is_written_again_from_its_results(tmp_path, seeds, capsys):
    path = write_report(make_results(*seeds), tmp_path, LAYOUT)
    text = path.read_text()
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(figures) == ["answers.png", "kept_mass.png", "training.png"]
    for figure in figures:
        pixels = matplotlib.image.imread(tmp_path / figure)
        assert pixels.shape[1] > 800 and pixels[..., :3].std() > 0.02  # something is drawn
    for stale in ["report.md", *figures]:
        (tmp_path / stale).unlink()
    assert main([str(tmp_path)]) == 0
    assert path.read_text() == text
    assert all((tmp_path / figure).exists() for figure in figures)
    assert "loss at recall answers" in capsys.readouterr().out


def test_the_recorded_report_is_written_again_word_for_word(tmp_path, capsys):
    """Makes today what the code of its day made of the numbers."""
    shutil.copy(RESULTS / "tiny" / "results.json", tmp_path)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == (RESULTS / "tiny" / "report.md").read_text()
    assert "goals met" in capsys.readouterr().out


def test_no_folder_is_named(capsys):
    assert main([]) == 2
    assert "python -m studies.tiny.report needs the folders" in capsys.readouterr().err
