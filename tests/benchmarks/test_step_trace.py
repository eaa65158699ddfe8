"""Tests the table of a step's kernels: from a written trace, and from a program."""

import gzip
import json

import pytest

from benchmarks import step_trace
from benchmarks.step_trace import Kernel, kernels_of, table

PEAKS = {"copy_tb_per_s": 4.0, "bf16_matmul_tflops": 700.0}
TEXT = """
ENTRY %main (a: f32[1000000]) -> f32[1000000] {
  %a = f32[1000000]{0} parameter(0)
  %wrapped.1 = f32[1000000]{0} exponential(%a), metadata={op_name="jit(step)/exp"}
  ROOT %ours.2 = f32[1000000]{0} custom-call(%wrapped.1), custom_call_target="mosaic_gpu_v2"
}
"""


def test_kernels_of_a_trace_are_added_up_by_their_instruction(tmp_path):
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 3, "args": {"name": "Stream #13(Compute)"}},
        {"ph": "X", "name": "loop_fusion", "pid": 1, "tid": 3, "ts": 0.0, "dur": 5.0, "args": {"hlo_op": "fusion.1"}},
        {"ph": "X", "name": "loop_fusion", "pid": 1, "tid": 3, "ts": 5.0, "dur": 7.0, "args": {"hlo_op": "fusion.1"}},
        {"ph": "X", "name": "nameless", "pid": 1, "tid": 3, "ts": 12.0, "dur": 1.0},
        {"ph": "X", "name": "on the host", "pid": 2, "tid": 3, "ts": 0.0, "dur": 100.0},
    ]
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / "a.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = {kernel.name: (kernel.count, kernel.seconds) for kernel in kernels_of(str(tmp_path))}
    assert found == {"fusion.1": (2, pytest.approx(12e-6)), "nameless": (1, pytest.approx(1e-6))}


def test_a_kernel_stands_beside_its_floor():
    kernels = [
        Kernel("wrapped_1", 2, 8e-6),
        Kernel("ours.2", 1, 9e-6),
        Kernel("unknown", 1, 1e-6),
        Kernel("least", 1, 1e-9),
    ]
    ours, exp, unknown = table(kernels, TEXT, PEAKS)
    assert (ours["kernel"], exp["kernel"], unknown["kernel"]) == ("ours.2", "wrapped_1", "unknown")
    assert exp["floor_milliseconds"] == pytest.approx(2 * 8e6 / 4e12 * 1e3)
    assert exp["times_floor"] == pytest.approx(2.0) and exp["op_name"] == "jit(step)/exp"
    assert "times_floor" not in ours and ours["megabytes"] == 8
    assert "<" not in step_trace.describe(exp) and "exp" in step_trace.describe(exp)
    assert exp["share"] == pytest.approx(8 / 18.001, rel=1e-3)
