"""Tests the reading of schedules: bytes, times and waits of a few instructions, worked out by hand."""

import importlib.util
import json

import pytest

from benchmarks import overlap, schedule
from dsa_jax import Config
from train.planner.hardware import measured_rates, nvlink_rates

HEAD = "HloModule step, is_scheduled=true\n"
N = 1 << 20  # bytes of the arrays, of 2^18 float32
ALL = f"f32[{N // 4}]{{0}}"
HALF = f"f32[{N // 8}]{{0}}"


def program(*lines, extra=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}\n{extra}\nENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n"


START = f"%s = ({HALF}, {ALL}) all-gather-start(%p), replica_groups={{{{0,1}}}}"
DONE = f"%d = {ALL} all-gather-done(%s)"
COPY = f"%c = {ALL} copy(%q)"
INPUTS = f"%p = {HALF} parameter(0)", f"%q = {ALL} parameter(1)"
SENT = N / 2 / nvlink_rates()["all-gather"]  # seconds
COPIED = 2 * N / measured_rates().copy


def exposed(text):
    (message,) = schedule.read_sent(text, 2)
    assert (message.kind, message.bytes, message.seconds) == ("all-gather", N / 2, SENT)
    return message.exposed * message.times


def test_work_between_start_and_done_hides():
    assert exposed(program(*INPUTS, START, DONE, COPY)) == SENT
    assert exposed(program(*INPUTS, START, COPY, DONE)) == pytest.approx(SENT - COPIED)
    copies = [COPY.replace("%c", f"%c{i}") for i in range(8)]
    assert exposed(program(*INPUTS, START, *copies, DONE)) == 0


def test_a_collective_that_has_no_end_of_its_own_hides_nothing():
    text = program(*INPUTS, COPY, f"%s = {ALL} all-gather(%p), replica_groups={{{{0,1}}}}")
    assert exposed(text) == pytest.approx(SENT)


def test_messages_wait_for_each_other():
    second = [START.replace("%s", "%t"), DONE.replace("%s", "%t").replace("%d", "%e")]
    first, other = schedule.read_sent(program(*INPUTS, START, second[0], COPY, DONE, second[1]), 2)
    assert first.exposed == pytest.approx(SENT - COPIED) and other.exposed == pytest.approx(SENT)


def test_loops_run_as_often_as_they_say():
    loop = f"""
%body (p: (s32[], {HALF}, {ALL})) -> (s32[], {HALF}, {ALL}) {{
  %a = (s32[], {HALF}, {ALL}) parameter(0)
  %p = {HALF} get-tuple-element(%a), index=1
  {START}
  %d = {ALL} all-gather-done(%s)
}}
"""
    init = "%zero = s32[] constant(0)", f"%i = (s32[], {HALF}, {ALL}) tuple(%zero, %p, %q)"
    once = f"%w = (s32[], {HALF}, {ALL}) while(%i), condition=%cond, body=%body"
    known = once + ', backend_config={"known_trip_count":{"n":"3"}}'
    assert exposed(program(*INPUTS, *init, known, extra=loop)) == pytest.approx(3 * SENT)
    assert exposed(program(*INPUTS, *init, once, extra=loop)) == SENT
    rest = [line.replace("constant(0)", "constant(6)") for line in init]
    assert exposed(program(*INPUTS, *rest, once, extra=loop)) == 0


def test_a_fusion_is_timed_by_what_it_slices_and_by_its_products():
    fused = """
%sliced (x: f32[8,1024], i: s32[]) -> f32[1,1024] {
  %x = f32[8,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %y = f32[1,1024]{1,0} dynamic-slice(%x, %i), dynamic_slice_sizes={1,1024}
}
%product (a: bf16[4096,512], b: bf16[512,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,512]{1,0} parameter(0)
  %b = bf16[512,4096]{1,0} parameter(1)
  ROOT %c = bf16[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    lines = (
        "%f = f32[1,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced",
        "%g = bf16[4096,4096]{1,0} fusion(%a, %b), kind=kCustom, calls=%product",
    )
    module, entry = schedule.read_module(program(*lines, extra=fused))
    clock = schedule._Clock(module, 2)
    seconds = [clock._work(module[entry], one)[0] for one in module[entry]]
    assert seconds == pytest.approx(
        [(2 * 4096 + 4) / measured_rates().copy, 2 * 4096 * 4096 * 512 / measured_rates().product]
    )


def test_totals_are_by_kind():
    sent = schedule.read_sent(program(*INPUTS, START, COPY, DONE), 2)
    kinds = schedule.totals(sent)
    assert kinds["all"] == kinds["all-gather"]
    assert kinds["all"].gb_sent == N / 2e9 and kinds["all"].exposed_share == pytest.approx(1 - COPIED / SENT)


def test_only_schedules_are_read():
    with pytest.raises(ValueError, match="is_scheduled=true"):
        schedule.read_sent("HloModule step", 2)


@pytest.mark.parametrize("mesh", overlap.MESHES)
def test_less_than_a_fifth_of_what_two_gpus_send_is_exposed(mesh):
    row = json.loads(overlap.OUT.read_text())[mesh]
    assert row["mesh"] == mesh and row["seconds"] > 0
    assert row["exposed_seconds"] < row["seconds"] / 5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs XLA's compiler for GPUs")
def test_gathers_of_a_small_step_are_compiled_to_run_beside_it():
    config = Config.tiny()
    sent = schedule.read_sent(overlap.compile_step("data=2", config=config, length=64).as_text(), 2)
    assert {"all-gather", "reduce-scatter"} <= {each.kind for each in sent}
