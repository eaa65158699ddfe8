"""The benchmarks on CPU: they call what they time, count and record it as they say."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_attention, decode_selection, forward, gpu_tests, measure, rates, sharded, training
from dsa_jax import Config

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture
def small(monkeypatch):
    """Toy sizes and short windows."""
    windows = dict(REPEATS=2, WINDOW_SECONDS=0.001, PAUSE_SECONDS=0.0, LONG_WINDOW_SECONDS=0.001)
    for name, value in windows.items():
        monkeypatch.setattr(measure, name, value)
    sizes = dict(QUERIES=16, TOPK=8, LATENT=32, ROPE=8, INDEX_HEADS=4, INDEX_DIM=64, CHECKED_QUERIES=4)
    for name, value in (
        sizes | dict(ATTENTION=[(4, 64)], XLA_TIMED=[(4, 64)], INDEXER=[64], TOPK_ROWS=[(4, 64)])
    ).items():
        monkeypatch.setattr(forward, name, value)
    monkeypatch.setattr(forward, "IMPLEMENTATIONS", ("xla",))


PEAKS = {name: 1.0 for name in ("bf16_matmul_tflops", "fp8_matmul_tflops", "copy_tb_per_s")}


def timed_windows(monkeypatch, *seconds):
    """Scripts what windows take, in seconds a call; gives the list of how many calls each makes."""
    windows, calls = iter(seconds), []
    monkeypatch.setattr(measure, "window", lambda fn, inputs, count: (calls.append(count), next(windows))[1])
    monkeypatch.setattr(measure, "REPEATS", 3)
    monkeypatch.setattr(measure, "WINDOW_SECONDS", 0.11)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "LONG_WINDOW_SECONDS", 0.81)
    return calls


def test_seconds_are_the_median_of_windows_and_sustained_is_a_long_one(monkeypatch):
    calls = timed_windows(monkeypatch, 0.02, 3.0, 1.0, 2.0, 0.5)
    timed = measure.seconds_per_call(lambda x: x + 1, [(1,)])
    assert timed == {"seconds": 2.0, "least": 1.0, "most": 3.0, "sustained": 0.5, "first_call": mock.ANY}
    assert calls == [1, 6, 6, 6, 41]


def test_a_call_longer_than_the_long_window_is_timed_twice(monkeypatch):
    calls = timed_windows(monkeypatch, 2.0, 4.0)
    timed = measure.seconds_per_call(lambda x: x + 1, [(1,)])
    assert timed == {"seconds": 3.0, "least": 2.0, "most": 4.0, "first_call": mock.ANY} and calls == [1, 1]


def test_calls_rotate_over_the_inputs_and_the_compiled_one_is_not_timed(small):
    called = []
    timed = measure.seconds_per_call(lambda x: called.append(x) or x, [(0,), (1,), (2,)])
    assert called[:2] == [0, 0] and 1 in called and called[called.index(1) : called.index(1) + 3] == [1, 2, 0]
    assert timed["least"] > 0


def test_a_chain_goes_through_its_sets_and_is_timed_in_windows_long_enough(monkeypatch):
    """A window's `seconds` are those of a program, of six calls here; the first two windows end too soon."""
    windows, programs = iter([0.012, 0.008, 0.012, 0.006, 0.018, 0.036, 0.024]), []

    def window(fn, inputs, count):
        programs.append((count, fn(*inputs[0])))
        return next(windows)

    monkeypatch.setattr(measure, "window", window)
    seconds = measure.timed_chain(lambda x, y, after: after[:1] * y + x, [(1.0,), (2.0,), (3.0,)], (10.0,), calls=7)
    assert seconds == pytest.approx(0.018 / 6)
    assert [count for count, _ in programs] == [1, 2, 4, 4, 4, 4, 4]
    assert [out.tolist() for _, out in programs] == [[123123.0]] * 7


def test_a_case_that_fails_leaves_the_others():
    timed = measure.run_timings(
        [({"name": "a", "batch": 1}, lambda: {"microseconds": 2.0}), ({"name": "b"}, lambda: 1 / 0)]
    )
    assert timed["timings"] == [{"name": "a", "batch": 1, "microseconds": 2.0}]
    assert timed["failed"] == [{"name": "b", "right": False, "error": "ZeroDivisionError: division by zero"}]


def test_decode_rows_are_those_that_the_planner_looks_for():
    """One a batch and number of heads under the operation's name, and variants under others."""
    for operation, cases in (
        ("attention", decode_attention.times()),
        ("selection", decode_selection.timings()["joined"]),
    ):
        name = rates.DECODE[operation][1]
        found = [(labels["batch"], labels["heads"]) for labels, _ in cases if labels["name"] == name]
        assert len(found) == len(set(found)) >= 3 and len(found) < len(cases)


def test_a_row_has_the_rates_of_its_work(monkeypatch):
    monkeypatch.setattr(measure, "seconds_per_call", lambda *_: {"seconds": 2.0, "sustained": 4.0, "first_call": 1.0})
    work = dict(flops=4e12, peak="bf16_matmul_tflops", bytes=6e12)
    case = forward.Case("square", "scalar", lambda x, implementation: x * x, [(3.0,)], **work)
    fast, slow = case.run({"bf16_matmul_tflops": 8.0})
    assert (fast["implementation"], slow["implementation"]) == ("pallas", "xla")
    assert fast["tflops"] == 2 and fast["tflops_sustained"] == 1 and fast["share_of_peak"] == 0.25
    assert fast["tb_per_s"] == 3


def test_forward_cases_run_and_count_their_work(small):
    (attention,) = forward.attention_cases()
    assert attention.flops == 2 * 16 * 4 * 8 * (2 * 32 + 8)
    (topk,) = forward.topk_cases()
    assert topk.bytes == 4 * 4 * 64
    indexer = list(forward.indexer_cases())
    assert [case.flops for case in indexer[:3]] == [2 * 4 * 64 * forward.pairs(16, 64)] * 3
    for case in (attention, topk, *indexer[:3]):
        (row,) = dataclasses.replace(case, implementations=("xla",)).run(PEAKS)
        assert ("tflops" in row) == (case.flops is not None) and ("tb_per_s" in row) == (case.bytes is not None)


def test_the_pairs_of_a_causal_tail():
    for queries, size in ((4, 4), (3, 10)):
        assert forward.pairs(queries, size) == int(forward.tail(queries, size).mask(size).sum())


def test_errors_are_held_against_float64(small):
    (attention,) = forward.attention_errors()
    assert 1e-4 < attention["out_relative_norm"] < 5e-3 and attention["lse_largest"] < 1e-5
    for row in forward.score_errors():
        assert row["largest_relative_error"] < 1e-3  # of sums that four heads may nearly cancel
        assert row["largest_distance_from_the_last"] <= 2 * row["largest_relative_error"] + 1e-7


def test_parts_are_recorded_whole_and_others_stay(tmp_path):
    path = tmp_path / "new" / "x.json"
    measure.record(path, {"first": {"a": 1}, "second": {"a": 2}})
    measure.record(path, {"second": {"a": 3}})
    recorded = json.loads(path.read_text())
    assert {name: part["a"] for name, part in recorded.items()} == {"first": 1, "second": 3}
    assert {"date", "card", "versions", "command"} <= set(recorded["first"]["circumstances"])
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
    measure.record(path, {"second": {"a": 4}}, keep=lambda name: name != "first")
    assert {name: part["a"] for name, part in json.loads(path.read_text()).items()} == {"second": 4}


def test_training_cases_run(small, monkeypatch):
    """The backward pass and the sparse loss at toy sizes, in plain XLA."""
    for name, value in dict(QUERIES=16, TOPK=8, LATENT=32, ROPE=8, INDEX_HEADS=4, INDEX_DIM=64).items():
        monkeypatch.setattr(training, name, value, raising=False)
    monkeypatch.setattr(training, "BACKWARD", [(4, 64)])
    monkeypatch.setattr(training, "LOSSES", [(4, 64)])
    for case in (*training.backward_cases(), *training.loss_cases()):
        chex.assert_tree_all_finite(jax.jit(lambda *x, fn=case.fn: fn(*x, implementation="xla"))(*case.inputs[0]))
        (row,) = dataclasses.replace(case, implementations=("xla",)).run(PEAKS)
        assert ("tflops" in row) == (case.flops is not None)


def test_a_step_is_timed(monkeypatch):
    """The step itself is held elsewhere, and takes long to compile."""
    monkeypatch.setattr(training, "SLICE", Config.tiny())
    monkeypatch.setattr(training, "initial_state", lambda *_: {"count": jnp.zeros(4)})
    step = jax.jit(lambda state, batch: (jax.tree.map(lambda x: x + 1, state), {"tokens": batch.valid.sum()}))
    make = mock.Mock(return_value=step)
    monkeypatch.setattr(training, "make_step", make)
    row = training.step_row("SPARSE", 16, "xla")
    assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"]) and row["peak_gib"] > 0
    assert row["metrics"] == {"tokens": 16.0} and row["parameters"] == 1469952
    assert make.call_args.args[1].phase.name == "SPARSE"


def test_selections_on_shards_are_compared(small, monkeypatch):
    for name, value in dict(INDEX_HEADS=4, INDEX_DIM=32, TOPK=8).items():
        monkeypatch.setattr(sharded, name, value)
    *timed, compared = sharded.selection_rows(64, 32)
    assert compared["same_bits"] and compared["same_on_shards"] and all(row["seconds"] > 0 for row in timed)
    monkeypatch.setattr(sharded, "gather_tokens", lambda x, _: jnp.concatenate([x, x], axis=1))  # one shard's tokens
    *_, compared = sharded.selection_rows(64, 32)
    assert not compared["same_bits"] and not compared["same_on_shards"]


def test_steps_on_meshes_are_held_against_one_gpu(monkeypatch):
    """One that fails leaves the others."""

    def prepare(config, phase, length, *, steps, mesh):
        if mesh is not None and mesh.shape["tensor"] == 2:
            raise jax.errors.JaxRuntimeError("out of memory")
        sequences = 1 if mesh is None else mesh.shape["data"]
        batch = SimpleNamespace(tokens=np.zeros((sequences, 1)))
        return {"operation": phase}, mesh, batch, lambda state, batch: jnp.zeros(1)

    def take_steps(compiled, mesh, batch, steps):
        times = [9.0] + [4.0 if mesh is None else 2.5 * len(batch.tokens)] * (steps - 1)
        return times, [{"loss": 2.0 if mesh is None else 2.1, "kl": 1.0}] * steps, mesh

    monkeypatch.setattr(sharded, "prepare", prepare)
    monkeypatch.setattr(sharded, "take_steps", take_steps)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(jax.profiler, "trace", lambda folder: contextlib.nullcontext())
    one, context, expert, data, tensor = sharded.step_rows("SPARSE")
    assert one["efficiency"] == 1 and one["seconds"] == 4 and one["mesh"] == "one GPU"
    assert context["efficiency"] == expert["efficiency"] == data["efficiency"] == pytest.approx(0.8)
    assert context["relative_difference"] == pytest.approx({"loss": 0.05, "kl": 0})
    assert (data["sequences"], context["sequences"]) == (2, 1)
    assert context["exposed_seconds"] == 0 and "exposed_seconds" not in one
    assert tensor["failed"] == "out of memory" and tensor["mesh"] == "tensor=2"


def test_meshes_of_more_gpus():
    assert sharded.meshes(1) == [""]
    assert sharded.meshes(8)[1:] == ["context=8", "expert=8", "data=8", "tensor=8", *sharded.MIXED[8]]
    assert all(sharded.mesh_of(text).size == 8 for text in sharded.meshes(8)[1:])


REPORT = """<testsuites><testsuite>
<testcase classname="tests.parallel.test_a" name="one"/>
<testcase classname="tests.parallel.test_a" name="two"><failure message="x"/></testcase>
<testcase classname="tests.test_b" name="three"><skipped/></testcase>
<testcase classname="" name="interrupted"/>
</testsuite></testsuites>"""


def test_the_outcomes_of_a_report():
    assert gpu_tests.outcomes(REPORT) == {
        "tests/parallel/test_a.py": {"counts": {"passed": 1, "failure": 1}, "not_passed": ["two failure"]},
        "tests/test_b.py": {"counts": {"skipped": 1}, "not_passed": ["three skipped"]},
    }


@pytest.mark.slow
def test_gpu_tests_are_recorded_by_files_that_exist(tmp_path, monkeypatch):
    """Pytest runs for real, without the tests that need a GPU; its report names the file as it lies on the disk."""
    out, mine = tmp_path / "gpu_tests.json", "tests/benchmarks/test_benchmarks.py"
    other = "tests/test_moe.py"
    out.write_text(json.dumps({"tests/test_of_the_past.py": {}, "tests.test_moe": {}, other: {"counts": {}}}))
    monkeypatch.setattr(gpu_tests, "OUT", out)
    monkeypatch.setattr(gpu_tests, "WORKERS", 0)
    options = ["-m", "not gpu", "-q", "--no-header", "-p", "no:cacheprovider"]
    monkeypatch.setattr("sys.argv", ["gpu_tests", *options, f"{mine}::test_the_pairs_of_a_causal_tail"])
    assert gpu_tests.main() == 0
    recorded = json.loads(out.read_text())
    assert recorded.keys() == {mine, other} and recorded[mine]["counts"] == {"passed": 1}
