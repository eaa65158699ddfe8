"""Tables, charts and the picture of the mechanism are what their programs write from what is recorded."""

import json
import re
import runpy
from pathlib import Path

import matplotlib
import pytest

from benchmarks import charts, measure, tables

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
