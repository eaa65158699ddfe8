"""The report says what the results say, a missed goal first, and can be written again from results.json."""

import dataclasses
import json
import re

import matplotlib.image
import numpy as np
import pytest
from report_cases import ALONE, first_words, make_results, make_seed, table_after
from rich.console import Console

from train.__main__ import main
from train.reporting.figures import training_figure
from train.reporting.layout import SELECTIONS, Goal, Layout
from train.reporting.report import markdown, summary, write_report
from train.reporting.results import Results, max_rss, read_curves

PLAIN = make_seed(parts=ALONE)


def shown(results, layout) -> list[str]:
    """Prints the short table, and reads its lines."""
    console = Console(record=True, width=120)
    console.print(summary(results, layout))
    return console.export_text().splitlines()


def test_without_goals_there_is_no_verdict():
    text = markdown(make_results(PLAIN))
    assert text.startswith("# tiny\n\n| setting | value |\n")
    assert not any(word in text.lower() for word in ("goal", "missed", "recall", "mixture", "answers"))
    assert "goal" not in "\n".join(shown(make_results(PLAIN), Layout()))


def test_a_callers_missed_goal_stands_first():
    goals = [Goal("one was reached", True), Goal("another was not", False)]
    layout = Layout(goals=lambda results: goals if results.name == "tiny" else [])
    text = markdown(make_results(PLAIN), layout=layout)
    assert text.startswith("# tiny: goal missed\n\n- **Missed**: another was not.\n- Met: one was reached.\n")
    lines = shown(make_results(PLAIN), layout)
    assert "goal missed" in lines[0] and "another was not" in lines[2] and not any("one was" in line for line in lines)
    met = dataclasses.replace(layout, goals=lambda results: goals[:1])
    assert markdown(make_results(PLAIN), layout=met).startswith("# tiny: goals met\n")
    assert markdown(make_results(PLAIN, name="other"), layout=layout).startswith("# other\n")


def test_tables_hold_the_numbers():
    text = markdown(make_results(PLAIN))
    assert table_after(text, "| setting")["K"] == ["32"]
    kept = table_after(text, "**Text** (1,234 queries)")
    assert kept["trained indexer"] == ["0.800", "0.700", "0.750"]
    assert kept["oracle top-K of the attention"] == ["0.900", "0.800", "0.850"]
    assert kept["indexer after warm-up alone"] == ["0.650", "0.550", "0.600"]
    assert kept["untrained indexer"] == ["0.300", "0.200", "0.250"]
    assert kept["last K keys"] == ["0.500", "0.400", "0.450"]
    assert kept["K random keys"] == ["0.100", "0.150", "0.125"]
    assert kept["**gap closed**"] == ["0.750", "0.750", "0.750"]
    losses = table_after(text, "## Held-out loss")
    assert losses == {"after BASE, dense": ["2.000"], "final, sparse": ["1.750"], "final, dense": ["1.500"]}
    selections = table_after(text, "| selection | text")
    assert list(selections) == [SELECTIONS[name][0] for name in ("dense", "oracle", "indexer", "window", "random")]
    assert selections["last K keys"] == ["1.625"]
    assert table_after(text, "KL of the indexer") == {"WARMUP": ["2.625", "0.375"], "SPARSE": ["0.500", "0.250"]}
    seconds = table_after(text, "| part | seconds")
    assert seconds == {"BASE": ["100.0"], "WARMUP": ["50.0"], "everything": ["400.4"]}
    assert "peaked at 2.00 GiB" in text
    assert "    def f(x):" in text.splitlines()


def test_several_seeds_and_controls():
    seeds = [make_seed(3, parts=ALONE, controls=True), make_seed(4, (0.7, 0.6), parts=ALONE, controls=True)]
    text = markdown(make_results(*seeds))
    assert first_words(text) == "Numbers are means over the seeds 3, 4, then each seed's own in brackets."
    losses = table_after(text, "## Held-out loss")
    assert losses["final, sparse"] == ["5.250 (4.750, 5.750)"]
    assert losses["DENSE_CONTROL, dense"] == ["1.375 (1.375, 1.375)"]
    assert losses["WINDOW_CONTROL, last K keys"] == ["2.500 (2.500, 2.500)"]
    kept = table_after(text, "**Text** (1,234, 1,234 queries)")
    assert kept["trained indexer"] == ["0.750 (0.800, 0.700)", "0.650 (0.700, 0.600)", "0.700 (0.750, 0.650)"]
    assert table_after(text, "| part | seconds")["BASE"] == ["100.0 (100.0, 100.0)"]


def test_the_last_kl_is_the_mean_of_the_last_tenth():
    curve = {"step": list(range(40)), "kl": [4.0] + [1.0] * 35 + [0.5, 0.25, 0.5, 0.25]}
    results = make_results(dataclasses.replace(PLAIN, curves={"WARMUP": curve}))
    assert table_after(markdown(results), "KL of the indexer") == {"WARMUP": ["4.000", "0.375"]}


def test_unnamed_parts_go_by_their_own_names():
    """Writes a report of parts that the general layout has never heard of."""
    text = markdown(make_results(make_seed()))
    assert list(table_after(text, "| weights, attention"))[0] == "after BASE, dense"
    assert "| weights, attention | all | text | recall | answers |" in text
    named = markdown(make_results(make_seed()), layout=Layout(part_names={"all": "the mixture"}))
    assert "| weights, attention | the mixture | text | recall | answers |" in named


@pytest.mark.parametrize("seeds", [(PLAIN,), (make_seed(0), make_seed(1, (0.7, 0.6), controls=True))])
def test_a_report_is_written_again_from_its_results(tmp_path, seeds, capsys):
    path = write_report(make_results(*seeds), tmp_path)
    text = path.read_text()
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(figures) == ["kept_mass.png", "training.png"]
    for figure in figures:
        pixels = matplotlib.image.imread(tmp_path / figure)
        assert pixels.shape[1] > 800 and pixels[..., :3].std() > 0.02  # something is drawn
    for stale in ["report.md", *figures]:
        (tmp_path / stale).unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert path.read_text() == text
    assert all((tmp_path / figure).exists() for figure in figures)
    assert "gap closed" in capsys.readouterr().out


def test_results_survive_json(tmp_path):
    results = make_results(PLAIN, make_seed(1))
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_results_with_limits_of_their_own_are_read(tmp_path):
    results = make_results(PLAIN)
    values = dataclasses.asdict(results) | {"limit_seconds": 480.0, "limit_rss": None}
    (tmp_path / "results.json").write_text(json.dumps(values))
    assert Results.load(tmp_path) == results


def test_bad_results(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'results.json'}: No such file" in capsys.readouterr().err
    assert main(["report"]) == 2
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
    figure = training_figure(make_results(make_seed(controls=True)))
    lines = {line.get_label(): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
    assert lines == {"BASE": [1, 2], "SPARSE": [5, 6], "DENSE_CONTROL": [5, 6]}


def test_memory_is_in_bytes():
    assert 2**25 < max_rss() < 2**37
