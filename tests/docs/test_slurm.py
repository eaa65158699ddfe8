"""The script for SLURM queues itself again when the run was stopped, and only then."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"


@pytest.fixture
def submit(tmp_path):
    """Runs the script with programs in place of SLURM's, which note how they were called."""
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n[ {name} = scontrol ] || eval "$RUN"\n')
        program.chmod(0o755)

    def submit(run):
        (tmp_path / "calls").write_text("")
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "OUT": f"{tmp_path}/out"}
        ended = subprocess.run(["bash", str(SCRIPT)], env=environment | {"RUN": run}, capture_output=True, text=True)
        assert not ended.stderr, ended.stderr
        return ended.returncode, (tmp_path / "calls").read_text().splitlines()

    return submit


@pytest.mark.parametrize("status", [143, 75])
def test_a_run_that_was_stopped_is_queued_again(submit, status):
    assert submit(f"exit {status}")[1][1:] == ["scontrol requeue 77"]


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_run_that_is_finished_or_needs_a_person_is_not(submit, status):
    found, calls = submit(f"exit {status}")
    assert found == status and len(calls) == 1


def test_a_signal_to_the_script_itself_leaves_it_alive(submit):
    assert submit("kill -TERM $PPID; exit 143")[1][1:] == ["scontrol requeue 77"]


def test_it_begins_a_run_and_then_resumes_it(submit, tmp_path):
    (begin,) = submit("exit 0")[1]
    assert begin.startswith("srun python -m train --distributed --mesh") and "--preset deepseek_v32 --init" in begin
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    (again,) = submit("exit 0")[1]
    assert again.endswith(f"--out {tmp_path}/out --resume")


def test_the_time_that_slurm_leaves_is_asked_for():
    assert "#SBATCH --signal=TERM@600\n" in SCRIPT.read_text()
