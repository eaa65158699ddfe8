"""Tests what is read of traces: which launches are collectives, and for how long a GPU waits for them."""

import pytest

from benchmarks.traces import Launch, collective_seconds, kernels_of_step, overlap, union


def launch(begin, end, name="fusion", instruction=None, gpu="GPU:0"):
    return Launch(gpu, name, instruction, begin, end)


def test_a_collective_is_known_by_its_instruction_or_by_its_kernel():
    assert launch(0, 1, "ncclDevKernel_AllGather", "all-gather-start.3").collective == "all-gather"
    assert launch(0, 1, "memcpy", "ragged_all_to_all.1").collective == "ragged-all-to-all"
    assert launch(0, 1, "ncclDevKernel_SendRecv").collective == "others"
    assert launch(0, 1, "fusion.2", "fusion.2").collective is None


def test_seconds_in_which_only_a_collective_ran():
    gathers = dict(name="nccl", instruction="all-gather.1")
    launches = [
        launch(0, 4),
        launch(3, 6, **gathers),
        launch(5, 7, "nccl", "all-reduce.2"),
        launch(6.5, 8),
        launch(0, 1, gpu="GPU:1", **gathers),
    ]
    row = collective_seconds(launches)
    assert row["collective_seconds"] == pytest.approx(4)
    assert row["exposed_seconds"] == pytest.approx(2.5)  # from 4 to 6.5; the other GPU waits for 1
    assert row["kinds"] == {"all-gather": pytest.approx(3), "all-reduce": pytest.approx(2)}
    assert collective_seconds([])["exposed_seconds"] == 0


def test_spans_that_contain_each_other():
    assert union([(0, 10), (2, 3), (10, 11)]) == [(0, 11)]
    assert overlap([(0, 10)], [(2, 3), (9, 12)]) == 2


def test_kernels_of_a_step_are_those_of_the_busiest_gpu():
    launches = [launch(0, 1, "a"), launch(0.5, 2, "b"), launch(4, 5, "a"), launch(5, 8, "b"), launch(0, 3, gpu="GPU:1")]
    found = kernels_of_step(launches, 2, longest=1)
    assert found["kernel_seconds"] == pytest.approx(6.5 / 2) and found["kernels"] == 2
    assert found["idle_share"] == pytest.approx(2 / 8) and found["longest"] == {"b": pytest.approx(4.5 / 2)}
    assert kernels_of_step([], 2) == {"trace": "no events of a GPU"}
