"""Several processes of a run: they refuse to differ, stop together, and end together whatever becomes of one."""

import json
import os
import re
import signal
import subprocess

import pytest
from cluster_cases import mount, started
from train_cases import one_layer_run, small_phases, write_preset

from train.processes.ending import AGAIN
from train.processes.lock import Lock
from train.saved.folder import checkpoint_steps
from train.settings import PhaseSettings, Stage

STEPS = 6
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def cluster(environment):
    with started(environment) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    phases = small_phases(Stage(STEPS, 4, 16))
    base = PhaseSettings(phases["BASE"].phase, phases["BASE"].stages, backbone=phases["SPARSE"].backbone)
    return write_preset(one_layer_run(folder / "text", phases=(base,), checkpoint_every=2), folder / "p.json")


@pytest.fixture
def run(cluster, preset, tmp_path):
    """Runs the command in several processes; gives how they ended."""

    def run(*arguments, name="run", **options):
        out = "--preset", str(preset), "--out", str(tmp_path / "out")
        return cluster.run(tmp_path / name, *out, *arguments, **options)

    return run


def lines(ended):
    """Reads the one line that a process leaves on stderr."""
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended
    return ended.err.strip()


def steps_in(path):
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_to_one_process_stops_all_at_one_step_and_they_go_on_from_it(run, tmp_path):
    one, two = run(events=[(1, "step 1", "SIGTERM")])
    step = checkpoint_steps(tmp_path / "out")[-1]
    assert 1 < step < STEPS and steps_in(tmp_path / "out") == list(range(1, step + 1))
    for index, ended in enumerate((one, two)):
        assert ended.status == 128 + signal.SIGTERM
        command = f"python -m train --resume --out {tmp_path}/out --distributed"
        assert lines(ended).startswith(f"saved step {step}; resume with {command} ")
        assert ended.err.endswith(f"--num-processes 2 --process-id {index}\n")
    ended = run("--resume", name="resumed")
    assert [(each.status, each.err) for each in ended] == [(0, ""), (0, "")]
    assert steps_in(tmp_path / "out") == list(range(1, STEPS + 1))
    assert checkpoint_steps(tmp_path / "out")[-1] == STEPS
    assert not (tmp_path / "out" / "owner.json").exists()


@pytest.mark.parametrize(
    ("differ", "message"),
    [
        (("--preset", "RATE"), "run.phases[0].backbone.learning_rate is 0.001 in process 0, 0.5 in process 1"),
        pytest.param(("--mesh", "context=2"), "mesh.context is 1 in process 0, 2 in process 1", marks=pytest.mark.slow),
    ],
)
def test_processes_that_differ_are_refused_before_they_train(run, preset, tmp_path, differ, message):
    values = json.loads(preset.read_text())
    values["phases"][0]["backbone"]["learning_rate"] = 0.5
    (tmp_path / "rate.json").write_text(json.dumps(values))
    ended = run(extra={1: [str(tmp_path / "rate.json") if part == "RATE" else part for part in differ]})
    assert [each.status for each in ended] == [2, 2], ended
    assert all(message in lines(each) for each in ended)
    assert not (tmp_path / "out").exists()


# Each death: what happens where and when, how each process ends, and what the others say. A process that sleeps leaves
# the others inside a collective.
LOST = "process 0, which coordinates the run, was lost"
DEATHS = {
    "killed before they compare": ([(1, "start", "SIGKILL")], (AGAIN, KILLED), "process 1 was lost"),
    "interrupted before they compare": ([(0, "start", "SIGINT")], (130, 130), "process 0 ended by SIGINT"),
    "an exception before they compare": ([(1, "start", "raise")], (2, 2), "process 1 ended: something went wrong"),
    "killed between steps": ([(1, "step 3", "SIGKILL")], (AGAIN, KILLED), "process 1 was lost"),
    "an exception between steps": ([(0, "step 3", "raise")], (2, 2), "process 0 ended: something went wrong"),
    "the coordinator killed between steps": (
        [(0, "step 3", "SIGKILL")],
        (KILLED, AGAIN),
        LOST,
    ),
    "suspended between steps": ([(1, "step 3", "SIGSTOP")], (AGAIN, AGAIN), "process 1 was lost: no sign of life"),
    "the coordinator suspended": ([(0, "step 3", "SIGSTOP")], (AGAIN, AGAIN), "was lost: no sign of life"),
    "killed while the coordinator is in a collective": (
        [(1, "step 2", "SIGKILL soon"), (1, "step 3", "sleep")],
        (AGAIN, KILLED),
        "process 1 was lost",
    ),
    "the coordinator killed in a collective": (
        [(0, "step 3", "SIGKILL soon"), (1, "step 3", "sleep")],
        (KILLED, AGAIN),
        "process 0, which coordinates the run, was lost: it closed its connection",
    ),
    "a second signal in a collective": (
        [(0, "step 2", "SIGTERM soon"), (0, "step 3", "SIGTERM soon"), (1, "step 3", "sleep")],
        (143, 143),
        "process 0 ended at once by a second signal, SIGTERM",
    ),
    "killed in a save": ([(1, "save 4", "SIGKILL")], (AGAIN, KILLED), "process 1 was lost"),
    "the coordinator killed in a save": ([(0, "save 4", "SIGKILL")], (KILLED, AGAIN), LOST),
    "an exception in a save": ([(1, "save 4", "raise")], (2, 2), "process 1 ended: something went wrong"),
}
ALWAYS = {  # of the rest each takes seconds
    "killed while the coordinator is in a collective",
    "the coordinator killed in a save",
    "an exception in a save",
}


@pytest.mark.parametrize(
    "death", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in DEATHS]
)
def test_the_death_of_one_of_two_ends_both_with_a_line(run, tmp_path, death):
    events, statuses, message = DEATHS[death]
    ended = run(events=events)
    assert tuple(each.status for each in ended) == statuses, ended
    said = [lines(each) for each in ended if each.status != KILLED]
    assert any(message in line for line in said), said
    if any(moment != "start" for _, moment, _ in events):
        assert all(f"; resume with python -m train --resume --out {tmp_path}/out" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("events", "statuses", "message"),
    [
        ([(2, "start", "SIGKILL")], (AGAIN, AGAIN, KILLED, AGAIN), "process 2 was lost"),
        ([(3, "step 3", "SIGKILL")], (AGAIN, AGAIN, AGAIN, KILLED), "process 3 was lost"),
        ([(0, "step 3", "SIGKILL")], (KILLED, AGAIN, AGAIN, AGAIN), LOST),
        ([(2, "step 2", "SIGKILL soon"), (2, "step 3", "sleep")], (AGAIN, AGAIN, KILLED, AGAIN), "process 2 was lost"),
        ([(1, "save 4", "raise")], (2, 2, 2, 2), "process 1 ended: something went wrong"),
        ([(1, "save 4", "SIGKILL")], (AGAIN, KILLED, AGAIN, AGAIN), "process 1 was lost"),
        ([(i, "step 2", "SIGTERM") for i in range(4)], (143,) * 4, "saved step 4"),
        ([(3, "step 1", "SIGINT")], (130,) * 4, "saved step "),
    ],
)
def test_the_death_of_one_of_four_ends_all_with_a_line(run, events, statuses, message):
    ended = run(count=4, events=events)
    assert tuple(each.status for each in ended) == statuses, ended
    said = [lines(each) for each in ended if each.status != KILLED]
    assert sum(message in line for line in said) >= len(said) - 1, said


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_nobody_joins_gives_up_in_words(run, index):
    (ended,) = run(count=1, extra={0: ["--num-processes", "2", "--process-id", str(index), "--join-timeout", "2"]})
    assert ended.status == AGAIN
    assert lines(ended) == "error: the processes of the run did not come together within 2 s"


# One process


def test_one_process_saves_and_stops_and_is_refused_while_another_has_the_folder(run, tmp_path):
    (ended,) = run(count=1, alone=True, events=[(0, "step 3", "SIGINT")])
    assert ended.status == 130
    assert lines(ended) == f"saved step 3; resume with python -m train --resume --out {tmp_path}/out"
    before = sorted((tmp_path / "out").rglob("*"))
    with Lock(tmp_path / "out"):
        (ended,) = run("--resume", name="locked", count=1, alone=True)
    assert ended.status == 2
    assert f"error: {tmp_path}/out is being written by process {os.getpid()} on " in lines(ended)
    assert sorted((tmp_path / "out").rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk; files of limited size stand in for it elsewhere")
@pytest.mark.parametrize("moment", ["step 4", pytest.param("save 4", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_ends_the_run_in_words_and_it_goes_on_when_there_is_room(run, tmp_path, moment):
    (tmp_path / "out").mkdir()
    if not mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path / "out")):
        pytest.skip("this machine lets nothing be mounted")
    try:
        (ended,) = run(count=1, alone=True, events=[(0, moment, f"fill {tmp_path}/out")])
        assert ended.status == 2 and f"{tmp_path}/out" in lines(ended), ended
        assert re.search("No space left|RESOURCE_EXHAUSTED", ended.err)
        assert re.search(r"the last (good checkpoint|whole one): ", ended.err)
        (tmp_path / "out" / "filling").unlink()
        (ended,) = run("--resume", name="resumed", count=1, alone=True)
        assert (ended.status, ended.err) == (0, "")
        assert steps_in(tmp_path / "out") == list(range(1, STEPS + 1))
        assert checkpoint_steps(tmp_path / "out")[-1] == STEPS
    finally:
        subprocess.run(["umount", str(tmp_path / "out")], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_mount_that_is_gone_ends_the_run_and_nothing_is_written_beside_it(run, tmp_path):
    (tmp_path / "out").mkdir()
    if not mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path / "out")):
        pytest.skip("this machine lets nothing be mounted")
    (ended,) = run(count=1, alone=True, events=[(0, "step 3", f"detach {tmp_path}/out")])
    assert ended.status == 2 and f"{tmp_path}/out" in lines(ended), ended
    assert checkpoint_steps(tmp_path / "out") == []
