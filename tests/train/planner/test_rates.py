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
    for name in ("forward", "training", "sharded"):
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
    factors = {"tflops": 2, "gb_per_s": 2, "seconds": 0.5, "bf16_matmul_tflops_sustained": 2, "copy_tb_per_s": 2}
    return {name: each * factors[name] if name in factors else faster(each) for name, each in values.items()}


def test_the_planner_knows_all_rates():
    found = hardware.measured_rates()
    assert set(found.sparse_forward) == {16, 32, 64, 128} and set(found.sparse_backward) == {16, 64, 128}
    assert hardware.measured_step("SPARSE").seq_len == hardware.measured_step("WARMUP").seq_len == 131072
    assert set(hardware.nvlink_rates()) >= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
