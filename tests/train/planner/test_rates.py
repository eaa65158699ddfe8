"""The rates that are shipped with the planner: those of the recorded benchmarks, and all that it needs."""

import importlib.resources
import json
import shutil

import pytest

from benchmarks import measure, rates
from train.planner import hardware


def test_what_is_shipped_is_what_was_recorded():
    """Else `python -m benchmarks.rates` was forgotten."""
    shipped = importlib.resources.files("train.planner") / "rates.json"
    assert shipped.read_text() == rates.as_text(rates.gather())


def test_another_recording_gives_other_rates(monkeypatch, tmp_path):
    """Every rate comes from the files: with all of them twice as fast, and steps half as long."""
    for name in ("forward", "training", "sharded", "grouped_product"):
        shutil.copy(measure.RESULTS / f"{name}.json", tmp_path)
        values = json.loads((tmp_path / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(faster(values)))
    before = rates.gather()
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    rates.recorded.cache_clear()
    try:
        after = rates.gather()
    finally:
        rates.recorded.cache_clear()
    for name, rate in before["rates"].items():
        expected = {heads: 2 * each for heads, each in rate.items()} if isinstance(rate, dict) else 2 * rate
        assert after["rates"][name] == pytest.approx(expected), name
    assert after["exchanges"] == pytest.approx({kind: 2 * rate for kind, rate in before["exchanges"].items()})
    for phase, step in before["steps"].items():
        assert after["steps"][phase] == step | {"seconds": pytest.approx(step["seconds"] / 2)}


def faster(values):
    """Doubles all rates and halves all times."""
    if isinstance(values, list):
        return [faster(each) for each in values]
    if not isinstance(values, dict):
        return values
    factors = {
        "tflops": 2,
        "tflops_sustained": 2,
        "gb_per_s": 2,
        "seconds": 0.5,
        "bf16_matmul_tflops_sustained": 2,
        "copy_tb_per_s": 2,
    }
    return {name: each * factors[name] if name in factors else faster(each) for name, each in values.items()}


def test_the_planner_knows_all_rates():
    found = hardware.measured_rates()
    assert set(found.sparse_forward) == {16, 32, 64, 128} and set(found.sparse_backward) == {16, 64, 128}
    assert hardware.measured_step("SPARSE").seq_len == hardware.measured_step("WARMUP").seq_len == 131072
    assert set(hardware.nvlink_rates()) >= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}


def test_the_rates_of_serving_are_what_was_recorded():
    shipped = importlib.resources.files("train.planner") / "serving_rates.json"
    assert shipped.read_text() == rates.as_text(rates.gather_serving())
    gathered = rates.gather_serving()
    figures = [*gathered["rates"].values(), *gathered["exchanges"].values()]
    assert all(figure["source"] and figure["value"] > 0 for figure in figures)
    assert all(row["source"] for name in ("attention", "selection") for row in gathered[name])


@pytest.fixture
def other_results(monkeypatch, tmp_path):
    """A copy of the results, to write others into."""
    for path in measure.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    rates.recorded.cache_clear()
    yield tmp_path
    rates.recorded.cache_clear()


def write_decode(folder, name, *rows):
    part = {"circumstances": {"card": "NVIDIA H200", "date": "2027-01-02"}}
    (folder / f"{name}.json").write_text(json.dumps({"kernels": part | {"timings": rows}, "checks": part}))
    rates.recorded.cache_clear()


def test_decode_kernels_are_gathered_from_the_rows_of_their_names(other_results):
    row = {"name": "paged_sparse_attention", "batch": 1, "heads": 128, "microseconds": 11.5, "splits": 32}
    other = {"name": "combine", "batch": 1, "heads": 128, "microseconds": 3.0}
    before = rates.gather_serving()
    write_decode(other_results, "decode_attention", row, other)
    after = rates.gather_serving()
    source = "benchmarks/results/decode_attention.json, NVIDIA H200, 2027-01-02"
    assert after["attention"] == [{"batch": 1, "heads": 128, "microseconds": 11.5, "source": source}]
    assert after | {"attention": None} == before | {"attention": None}
    write_decode(other_results, "decode_selection", row | {"name": "paged_select_keys"})
    assert rates.gather_serving()["selection"][0]["keys"] == 131072


def test_ambiguous_decode_rows_are_refused(other_results):
    row = {"name": "paged_sparse_attention", "batch": 1, "heads": 128, "microseconds": 11.5}
    for rows in ([], [row, row]):
        write_decode(other_results, "decode_attention", *rows)
        with pytest.raises(ValueError, match="one row of paged_sparse_attention for each batch"):
            rates.gather_serving()
