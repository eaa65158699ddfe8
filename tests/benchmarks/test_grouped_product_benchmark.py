"""The benchmark of grouped products on CPU: it counts and checks what it times."""

import numpy as np
import pytest

from benchmarks import grouped_product, measure

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture
def small(monkeypatch):
    sizes = dict(DIM=64, WIDTH=32, LOCAL_EXPERTS=3, ROWS=(40,), DECODE_EXPERTS=6, DECODE_SLOTS=2, DECODE_TOKENS=(1, 3))
    for name, value in (sizes | dict(IMPLEMENTATIONS=("xla",))).items():
        monkeypatch.setattr(grouped_product, name, value)
    windows = dict(REPEATS=2, WINDOW_SECONDS=0.001, PAUSE_SECONDS=0.0, LONG_WINDOW_SECONDS=0.001)
    for name, value in windows.items():
        monkeypatch.setattr(measure, name, value)


@pytest.mark.slow
def test_layer_and_decode_run_and_are_held_against_float64(small):
    layer, decode = (measure.run_timings(part()) for part in (grouped_product.layer, grouped_product.decode))
    assert "failed" not in layer | decode
    assert [row["name"] for row in layer["timings"]] == ["forward", "backward"]
    assert all(0 < row["deviation"] < 0.05 for row in (layer["timings"][0], *decode["timings"]))
    items = {"bfloat16": 2, "e4m3": 1}
    touched = [round(row["touched_gb"] * 1e9 / (3 * 64 * 32 * items[row["weights"]])) for row in decode["timings"]]
    assert touched[:2] == [2, 2] and touched[2] == touched[3] and 2 <= touched[2] <= 6


def test_a_wrong_row_shows(small):
    problem = grouped_product.draw(0, 5, 3)
    y = grouped_product.expert_ffn(problem.x, problem.experts, problem.gates, *problem.weights)
    assert grouped_product.forward_error(y, problem) < 0.05
    assert grouped_product.forward_error(2 * y, problem) > 0.5


def test_loads_are_uneven():
    loads = np.bincount(np.asarray(grouped_product.draw_experts(0, 4000, 16, 1))[:, 0], minlength=16)
    assert 1.3 < loads.max() / loads.mean() < 3
