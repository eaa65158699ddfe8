"""The benchmarks' plumbing on CPU: what they time is called, recorded and shown; the README shows what was recorded."""

import dataclasses
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from benchmarks import forward, gpu_tests, measure, sharded, tables, training
from dsa_jax import Config

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture
def small(monkeypatch):
    """Toy sizes and short windows."""
    for name, value in {"REPEATS": 2, "WINDOW": 0.001, "PAUSE": 0.0, "LONG_WINDOW": 0.001}.items():
        monkeypatch.setattr(measure, name, value)
    sizes = dict(QUERIES=16, TOPK=8, LATENT=32, ROPE=8, INDEX_HEADS=4, INDEX_DIM=64, CHECKED=4)
    for name, value in (
        sizes | dict(ATTENTION=[(4, 64)], XLA_TIMED=[(4, 64)], INDEXER=[64], TOPK_ROWS=[(4, 64)])
    ).items():
        monkeypatch.setattr(forward, name, value)
    monkeypatch.setattr(forward, "IMPLEMENTATIONS", ("xla",))


PEAKS = {name: 1.0 for name in ("bf16_matmul_tflops", "fp8_matmul_tflops", "copy_tb_per_s")}


def test_cases_run_and_are_worth_what_they_say(small):
    (case,) = forward.attention_cases()
    assert case.flops == 2 * 16 * 4 * 8 * (2 * 32 + 8)
    (row,) = case.run(PEAKS)
    assert row["least"] <= row["seconds"] <= row["most"]
    assert row["tflops"] == pytest.approx(case.flops / row["seconds"] / 1e12)
    (topk,) = forward.timings(forward.topk_cases(), PEAKS)
    assert topk["tb_per_s"] == pytest.approx(4 * 4 * 64 / topk["seconds"] / 1e12)


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
    assert [recorded[name]["a"] for name in ("first", "second")] == [1, 3]
    assert {"date", "card", "versions", "command"} <= set(recorded["first"]["circumstances"])
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_slow_calls_are_timed_too(small, monkeypatch):
    monkeypatch.setattr(measure, "LONG_WINDOW", 0.0)
    timed = measure.seconds_per_call(lambda x: x + 1, [(1,)])
    assert timed["least"] <= timed["seconds"] <= timed["most"] and "sustained" not in timed


@pytest.mark.parametrize("name", tables.SECTIONS)
def test_the_readme_shows_what_was_recorded(name):
    results = json.loads((measure.RESULTS / f"{name}.json").read_text())
    section = tables.SECTIONS[name](results)
    assert tables.README.read_text() == tables.updated(tables.README.read_text(), name, section)
    timed = []
    for part in results.values():
        assert "H200" in part["circumstances"]["card"] and part["circumstances"]["compute_capability"] == "9.0"
        timed += [row for row in part["timings"] if row["implementation"] == "pallas"]
    assert len(re.findall(r"TFLOP/s \(\d+%\)", section)) == sum("tflops" in row for row in timed)
    with pytest.raises(ValueError, match="once"):
        tables.updated("no markers", name, section)


def test_training_cases_run(small, monkeypatch):
    """The backward and the sparse loss at toy sizes, in plain XLA."""
    for name, value in dict(QUERIES=16, TOPK=8, LATENT=32, ROPE=8, INDEX_HEADS=4, INDEX_DIM=64).items():
        monkeypatch.setattr(training, name, value, raising=False)
    monkeypatch.setattr(training, "BACKWARD", [(4, 64)])
    monkeypatch.setattr(training, "LOSSES", [(4, 64)])
    for case in (*training.backward_cases(), *training.loss_cases()):
        case = dataclasses.replace(case, implementations=("xla",))
        (row,) = case.run(PEAKS)
        assert row["least"] <= row["seconds"]


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
    monkeypatch.setattr(sharded, "join", lambda x, _: jnp.concatenate([x, x], axis=1))  # the rows of one shard
    *_, compared = sharded.selection_rows(64, 32)
    assert not compared["same_bits"] and not compared["same_on_shards"]


def test_steps_on_meshes_are_held_against_one_gpu(monkeypatch):
    """One that fails leaves the others."""

    def run_steps(config, phase, length, *, steps, mesh):
        if mesh is not None and mesh.shape["tensor"] == 2:
            raise jax.errors.JaxRuntimeError("out of memory")
        times = [9.0] + [4.0 if mesh is None else 2.5] * (steps - 1)
        return {"operation": phase}, times, [{"loss": 2.0 if mesh is None else 2.1, "kl": 1.0}] * steps

    monkeypatch.setattr(sharded, "run_steps", run_steps)
    one, context, tensor, expert = sharded.step_rows("SPARSE")
    assert one["efficiency"] == 1 and one["seconds"] == 4 and one["mesh"] == "one GPU"
    assert context["efficiency"] == expert["efficiency"] == pytest.approx(0.8)
    assert context["relative_difference"] == pytest.approx({"loss": 0.05, "kl": 0})
    assert tensor["failed"] == "out of memory" and tensor["mesh"] == "tensor=2"


def test_the_readme_shows_the_recorded_meshes():
    results = json.loads((measure.RESULTS / "sharded.json").read_text())
    section, readme = tables.sharded(results), tables.README.read_text()
    assert readme == tables.updated(readme, "sharded", section)
    for phase in ("SPARSE", "WARMUP"):
        one, *rows = results[phase]["timings"]
        assert one["gpus"] == 1 and [row["mesh"] for row in rows] == list(sharded.MESHES[1:])
        for row in rows:
            assert row["efficiency"] > 0.5 and row["relative_difference"]["loss"] < 1e-4
    assert results["selection"]["timings"][-1] == {
        "operation": "select_keys",
        "same_bits": True,
        "same_on_shards": True,
    }


def test_the_outcomes_of_a_report():
    report = (
        '<testsuites><testsuite><testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two">'
        '<failure message="x"/></testcase><testcase classname="tests.b" name="three"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_tests.outcomes(report) == {
        "tests.a": {"counts": {"passed": 1, "failure": 1}, "not_passed": ["two failure"]},
        "tests.b": {"counts": {"skipped": 1}, "not_passed": ["three skipped"]},
    }
