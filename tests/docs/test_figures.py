"""Tables, charts and the picture of the mechanism are what their programs write from what is recorded."""

import json
import re
import runpy
from pathlib import Path

import matplotlib
import pytest

from benchmarks import charts, cost_chart, measure, serving_tables, tables

ROOT = Path(__file__).parents[2]
ON_ONE_GPU = ("forward", "training")


def recorded(name):
    return json.loads((measure.RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_the_documents_show_what_was_recorded(name):
    document = (tables.DOCS / tables.DOCUMENTS[name]).read_text()
    assert document == tables.updated(document, name, tables.section(name))
    with pytest.raises(ValueError, match="once"):
        tables.updated("no markers", name, "")


@pytest.mark.parametrize("name", ON_ONE_GPU)
def test_the_tables_show_every_timing(name):
    timed = []
    for part in recorded(name).values():
        assert "H200" in part["circumstances"]["card"] and part["circumstances"]["compute_capability"] == "9.0"
        timed += [row for row in part["timings"] if row["implementation"] == "pallas"]
    assert len(re.findall(r"TFLOP/s \(\d+%\)", tables.section(name))) == sum("tflops" in row for row in timed)


def test_the_demos_figures_are_its_reports():
    table = re.search(r"^\| K = 32 .*?\n\n(.*?)\n", (tables.DOCS / "training.md").read_text(), re.S | re.M)
    assert table is not None
    figures = re.findall(r"\b\d\.\d{3}\b", table[0])
    assert len(figures) == 15
    report = (measure.RESULTS / "tiny" / "report.md").read_text()
    assert [figure for figure in figures if f"| {figure} (" not in report] == []


def test_the_figures_of_post_training_are_its_reports():
    document = (tables.DOCS / "post_training.md").read_text()
    rows = re.findall(r"^\| `.*\d tokens.*\|$", document.partition("small recipe: begin")[2], re.M)
    report = (measure.RESULTS / "post" / "report.md").read_text().splitlines()
    assert len(rows) >= 6 and [row for row in rows if row.replace("`", "") not in report] == []


def test_every_peer_has_a_source_and_a_timing_of_ours():
    peers = recorded("peers")
    assert re.match("measured on one NVIDIA H200 with the peer's own kernels", peers["kernels"]["source"])
    timings = charts.recorded(recorded("forward"), recorded("training"))
    for row in peers["kernels"]["rows"]:
        ours = timings[row["operation"], row["shape"]]
        found = ours["tflops"] if row["unit"] == "tflops" else 1e3 * ours["seconds"]
        assert row["value"] == pytest.approx(found, rel=0.2)  # bursts are up to 10 % faster, short calls more
    assert all(row["source"].startswith("published by ") for row in peers["published"])


@pytest.mark.parametrize("name", charts.CHARTS)
def test_charts_are_current(name):
    """To the byte under the version of matplotlib that drew them, and in every figure under any."""
    kept, drawn = (charts.FIGURES / f"{name}.svg").read_text(), charts.svg(name)
    version = re.search(r"Matplotlib v([\d.]+)", kept)
    assert version is not None
    if version[1] == matplotlib.__version__:
        assert drawn == kept
    assert texts(drawn) == texts(kept)


def test_charts_show_the_recorded_figures():
    shown = texts((charts.FIGURES / "kernels.svg").read_text())
    for row in charts.kernel_rows():
        assert {charts.number(row["ours"]), charts.number(row["recorded"])} <= shown
        assert f"{charts.number(row['theirs'])} {row['peer']}" in shown
    assert {"619", "593 FlashMLA", "365", "194 TileLang", "1,196", "986 DeepGEMM"} <= shown
    shown = texts((charts.FIGURES / "steps.svg").read_text())
    for place, row in enumerate(charts.step_rows()):
        note = "" if place else f" ({charts.gain():.1f} × dense)"
        assert {row["label"], charts.number(row["rate"]) + note} <= shown


def texts(svg):
    """Returns the texts of a chart."""
    return {each.strip() for each in re.findall(r"<text[^>]*>([^<]*)</text>", svg)}


def test_the_picture_of_the_mechanism_is_current():
    figures = ROOT / "docs" / "figures"
    drawing = runpy.run_path(str(figures / "draw_mechanism.py"))
    assert drawing["draw"]() == (figures / "mechanism.svg").read_text()
    scores = sorted(drawing["SCORES"])
    assert scores[-drawing["TOP_K"]] > scores[-drawing["TOP_K"] - 1]  # which keys are selected is no tie


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_fetch_nothing(path):
    assert not re.search(r"<image|<script|@import|url\((?!#)|href=\"(?!#)|src=", path.read_text())


# Decode and serving.

CIRCUMSTANCES = {
    "circumstances": {
        "card": "NVIDIA H200", "date": "2026-11-29", "versions": {"jax": "0.11.2"},
        "command": "python -m benchmarks.some --only decode --out /elsewhere/some.json",
    }
}  # fmt: skip


def cost_rows(*costs, batch=32):
    """Rows of decode by position, sparse and dense µs, beside projections that cost nothing."""
    return [
        {"position": position, "batch": batch, "attention_us": sparse, "dense_us": dense, "projections_us": 0.0}
        for position, sparse, dense in costs
    ]


def test_crossovers_lie_between_the_rows_that_enclose_them():
    rows = cost_rows((1024, 30.0, 10.0), (2048, 30.0, 20.0), (4096, 30.0, 60.0), (8192, 30.0, 120.0))
    assert serving_tables.crossover(rows, *serving_tables.DECODE) == pytest.approx(2048 + 2048 * 10 / 40)
    assert serving_tables.crossing(rows, *serving_tables.DECODE) == "2,560"
    assert serving_tables.crossing(rows[2:], *serving_tables.DECODE) == "below 4,096"
    assert serving_tables.crossing(rows[:2], *serving_tables.DECODE) == "beyond 2,048"
    assert serving_tables.crossover(rows[:2], *serving_tables.DECODE) is None
    exact = cost_rows((1024, 30.0, 10.0), (2048, 30.0, 30.0), (4096, 30.0, 60.0))
    assert serving_tables.crossover(exact, *serving_tables.DECODE) == 2048


def test_dollars_are_those_of_all_attention_layers():
    (row,) = cost_rows((1024, 32.0, 64.0))
    row["projections_us"] = 96.0
    us = serving_tables.decode_us(row, "attention")
    assert us == 4.0 and serving_tables.decode_us(row, "dense") == 5.0
    assert serving_tables.million_tokens(us) == pytest.approx(61 * 4.0 * 2 / 3600)


def test_parts_that_are_missing_or_failed_are_said():
    verified = {"work": "verification", "position": 131072, "batch": 1}
    rows = [
        verified | {"attention_of_1_us": 30.0, "attention_of_4_us": 45.0, "ratio": 1.5},
        verified | {"batch": 16, "error": "RuntimeError: out of memory"},
    ]
    section = serving_tables.cost({"verification": CIRCUMSTANCES | {"timings": rows}})
    assert "\n\nNot measured: prefill, decode." in section and "| 1 | 131,072 | 30.0 | 45.0 | 1.50 |" in section
    assert "Failed: work verification, batch 16, position 131072 (RuntimeError: out of memory)." in section
    assert "One NVIDIA H200, jax 0.11.2, 2026-11-29, `python -m benchmarks.some --only decode`." in section
    steps = {"steps: 4 layers": recorded("serving")["steps: 4 layers, 0 with experts"]}
    assert serving_tables.engine(steps).endswith("\n\nNot measured: load.")
    times = {"times": recorded("decode_attention")["times"]}
    assert serving_tables.decode(times, {}).endswith("\n\nNot measured: selection, index scores, top-k, writes.")
    for name, files in tables.FILES.items():
        assert "Not measured" not in tables.section(name) or name == "cost", files


def test_kernels_that_take_longer_than_was_asked_for_are_said():
    rows = [
        {"name": "one", "batch": 1, "microseconds": 9.0, "must": 10},
        {"name": "two", "batch": 2, "microseconds": 11.0, "must": 10, "note": "an earlier one"},
        {"name": "variant two", "batch": 2, "microseconds": 8.0},
    ]
    section = serving_tables.decode({"times": CIRCUMSTANCES | {"timings": rows, "note": "All of one day."}}, {})
    assert "| `one` | 1 |  |  | 9.0 |  | 10 |  |" in section
    assert "| `two` | 2 |  |  | 11.0 |  | 10, exceeded by 10.0% | an earlier one |" in section
    assert "variant two" not in section and "The record notes: All of one day." in section


def test_the_sections_on_decode_show_every_timing():
    lines = {name: tables.section(name).splitlines() for name in ("decode", "decode_step", "cost", "engine")}
    shown = {name: sum(bool(re.match(r"\| [`\d]", line)) for line in lines[name]) for name in lines}
    kept = {name: 0 for name in lines}
    for name in lines:
        for file in tables.FILES.get(name, (name,)):
            timed = [row for part in recorded(file).values() for row in part.get("timings", [])]
            kept[name] += sum(not row.get("name", "").startswith("variant") for row in timed)
    assert shown == kept and kept["cost"] > 40


def test_the_chart_of_costs_marks_the_crossovers_of_what_is_recorded():
    results = recorded("cost_by_position")
    shown = texts((charts.FIGURES / "cost.svg").read_text())
    place = serving_tables.crossing(cost_chart.part_rows(results, "decode"), *serving_tables.DECODE)
    assert f"dense costs more from {place} on" in shown
    assert {"sparse", "dense, computed from FlashMLA's figures"} <= shown
    prefill = [
        {"position": position, "sparse_us_per_token": 2.0, "dense_us_per_token": position / 1024}
        for position in (1024, 4096)
    ]
    figure = cost_chart.draw(results | {"prefill": {"timings": prefill}})
    titles = [axis.get_title(loc="left").split(",")[0] for axis in figure.axes]
    assert titles == ["decode", "prefill"]
    assert "dense costs more from 2,048 on" in [each.get_text() for each in figure.axes[1].texts]


def test_what_the_documents_say_of_serving_is_recorded():
    costs, limits = recorded("cost_by_position"), (tables.DOCS / "limits.md").read_text()
    ratios = {row["batch"]: row["ratio"] for row in costs["verification"]["timings"]}
    assert f"{ratios[1]:.1f} times the attention of one at batch 1, and {ratios[128]:.1f} times at batch 128" in limits
    rows = costs["decode"]["timings"]
    crossings = re.findall(r"batch (\d+)[^:,.]*? near\s+([\d,]+\d)", limits)
    assert [batch for batch, _ in crossings] == ["32", "1"]
    for batch, said in crossings:
        of_batch = [row for row in rows if row["batch"] == int(batch)]
        place = serving_tables.crossover(of_batch, *serving_tables.DECODE)
        assert place == pytest.approx(int(said.replace(",", "")), rel=0.02)
    (load,) = (part for name, part in recorded("serving").items() if name.startswith("load:"))
    assert all(row["good_share"] == 1 and row["programs_compiled"] == 0 for row in load["timings"])
